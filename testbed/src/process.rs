//! Processes that outlive the one that started them.
//!
//! A process is told from every other that ever had its number by its start
//! time, and every process of a testbed carries the testbed's id in its
//! environment. So a reused number is never signalled, and `down` finds all
//! that belongs to it even where a record is missing.

use std::{
    fs::{self, OpenOptions},
    io::Read,
    path::Path,
    process::{Command, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// The environment variable that holds the testbed's id in each of its processes.
pub const ID_VARIABLE: &str = "KARI_TESTBED";

/// How long a command may take that is run to its end.
const RUN_LIMIT: Duration = Duration::from_secs(300);

/// How often a process is looked at while its end is awaited.
const END_POLL: Duration = Duration::from_millis(5);

/// A process, or what is left of its name when it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number in the machine's own PID namespace.
    pub pid: i32,
    /// When it started, in clock ticks since the machine's boot.
    pub start_ticks: u64,
}

impl Process {
    /// The process that has this number now, unless it has ended.
    pub fn observe(pid: i32) -> Option<Self> {
        let stat = Stat::read(pid)?;
        (!stat.ended).then_some(Self {
            pid,
            start_ticks: stat.start_ticks,
        })
    }

    /// Whether it still runs (or is stopped); a zombie does not.
    pub fn is_alive(self) -> bool {
        Self::observe(self.pid) == Some(self)
    }

    /// Whether a signal has stopped it for now.
    pub fn is_stopped(self) -> bool {
        Stat::read(self.pid).is_some_and(|stat| stat.stopped)
    }

    /// Sends a signal; one that has ended is left in peace.
    pub fn signal(self, signal: Signal) -> Result<()> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(());
        };
        let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else {
            return Ok(());
        };
        // The descriptor holds the number now, so this comparison stays true.
        if !self.is_alive() {
            return Ok(());
        }
        match pidfd_send_signal(descriptor, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error).context(|| format!("signal process {}", self.pid)),
        }
    }

    /// Waits for its end; false when it still runs after `limit`.
    pub fn wait_end(self, limit: Duration) -> bool {
        let start = Instant::now();
        while self.is_alive() {
            if start.elapsed() > limit {
                return false;
            }
            std::thread::sleep(END_POLL);
        }
        true
    }

    /// Its first child, for programs such as `nsenter` that fork what they run.
    pub fn child(self) -> Option<Self> {
        all_pids()
            .filter(|&pid| Stat::read(pid).is_some_and(|stat| stat.parent == self.pid))
            .find_map(Self::observe)
    }

    /// Whether this process carries the id of that testbed.
    pub fn belongs_to(self, id: &str) -> bool {
        let entry = format!("{ID_VARIABLE}={id}");
        fs::read(format!("/proc/{}/environ", self.pid)).is_ok_and(|environment| {
            environment
                .split(|&byte| byte == 0)
                .any(|variable| variable == entry.as_bytes())
        })
    }
}

/// All processes of the testbed with this id, but for the calling one.
pub fn of_testbed(id: &str) -> Vec<Process> {
    let own = std::process::id().cast_signed();
    all_pids()
        .filter(|&pid| pid != own)
        .filter_map(Process::observe)
        .filter(|process| process.belongs_to(id))
        .collect()
}

/// Starts a program that goes on when its starter ends: in a session of its
/// own, its output appended to `log`, with nothing of the starter's
/// environment but PATH, HOME and what `command` sets.
pub fn start(command: &Command, id: &str, log: &Path) -> Result<Process> {
    let output = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .context(|| format!("open {}", log.display()))?;
    let error_output = output
        .try_clone()
        .context(|| format!("open {}", log.display()))?;
    let program = command.get_program();
    let mut detached = Command::new("setsid");
    detached
        .arg(program)
        .args(command.get_args())
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", std::env::var_os("HOME").unwrap_or_default())
        .env(ID_VARIABLE, id)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(error_output);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => detached.env(name, value),
            None => detached.env_remove(name),
        };
    }
    let mut child = detached
        .spawn()
        .context(|| format!("start {}", program.to_string_lossy()))?;
    let pid = child.id().cast_signed();
    let process = Process::observe(pid);
    // Its end is collected, or it would stay a zombie as long as this process lives.
    std::thread::spawn(move || child.wait());
    process.ok_or_else(|| {
        Error::State(format!(
            "{} ended at once{}",
            program.to_string_lossy(),
            log_tail(log)
        ))
    })
}

/// The end of a log for a message, with its path; empty where there is none.
pub fn log_tail(log: &Path) -> String {
    const LINES: usize = 15;
    let Ok(text) = fs::read(log) else {
        return String::new();
    };
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(LINES)..].join("\n  ");
    format!("\nthe end of {}:\n  {tail}", log.display())
}

/// Runs a command to its end, for at most 300 s, and returns what it printed.
pub fn run(command: &mut Command) -> Result<String> {
    let line = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ");
    let action = || format!("run `{line}`");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(action)?;
    let printed = read_aside(child.stdout.take());
    let said = read_aside(child.stderr.take());
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().context(action)? {
            break status;
        }
        if start.elapsed() > RUN_LIMIT {
            child.kill().context(action)?;
            child.wait().context(action)?;
            return Err(Error::NotReady {
                what: format!("`{line}` did not end"),
                limit: RUN_LIMIT,
                seen: format!("it printed {:?}", printed.join().unwrap_or_default()),
                log: String::new(),
            });
        }
        std::thread::sleep(END_POLL);
    };
    let text = |reader: JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&reader.join().unwrap_or_default())
            .trim_end()
            .to_owned()
    };
    if status.success() {
        return Ok(text(printed));
    }
    Err(Error::Command {
        command: line,
        status: status.to_string(),
        output: text(said),
    })
}

/// Reads a signal's name: `KILL`, `SIGKILL` or `9`.
pub fn parse_signal(text: &str) -> std::result::Result<Signal, String> {
    let name = text.to_ascii_uppercase();
    match name.strip_prefix("SIG").unwrap_or(&name) {
        "HUP" | "1" => Ok(Signal::HUP),
        "INT" | "2" => Ok(Signal::INT),
        "QUIT" | "3" => Ok(Signal::QUIT),
        "KILL" | "9" => Ok(Signal::KILL),
        "USR1" | "10" => Ok(Signal::USR1),
        "USR2" | "12" => Ok(Signal::USR2),
        "TERM" | "15" => Ok(Signal::TERM),
        "CONT" | "18" => Ok(Signal::CONT),
        "STOP" | "19" => Ok(Signal::STOP),
        _ => Err(format!(
            "{text:?} is no signal known here: use HUP, INT, QUIT, KILL, USR1, USR2, TERM, CONT or STOP"
        )),
    }
}

/// Whether a process is expected to end by this signal.
pub fn ends_by(signal: Signal) -> bool {
    [Signal::TERM, Signal::KILL, Signal::INT, Signal::QUIT].contains(&signal)
}

fn read_aside(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before an error is still worth showing.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn all_pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

struct Stat {
    ended: bool,
    stopped: bool,
    parent: i32,
    start_ticks: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the program's name in brackets and may hold anything.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        Some(Self {
            ended: matches!(*fields.first()?, "Z" | "X"),
            stopped: *fields.first()? == "T",
            parent: fields.get(1)?.parse().ok()?,
            start_ticks: fields.get(19)?.parse().ok()?,
        })
    }
}
