//! Nodes: real systemd as PID 1 of namespaces, on an overlay of the machine's
//! own root. `node.sh` boots them; this starts and ends it, and runs programs
//! inside.
//!
//! A node's upper layer and /var/lib/kari stay in the testbed's folder, so a
//! boot finds what the boot before left.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    error::{Context, Error, Result},
    network,
    process::{self, ID_VARIABLE, Process},
    state::{Description, Directory, NodeName, Part, write_file},
    toolchains::Toolchain,
    wait::{Seen, until},
};

const SCRIPT: &str = include_str!("node.sh");

/// How long a node may take to boot: it needs half a second, but an enabled
/// service may take its time.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// How long a node may take to shut down by itself: systemd gives a service 90 s.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(120);

/// How long a node's bus may take to answer.
const BUS_LIMIT: Duration = Duration::from_secs(5);

/// How long a killed node may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(20);

/// How long an emptied cgroup may take to let itself be removed.
const CGROUP_LIMIT: Duration = Duration::from_secs(10);

/// The search path inside a node.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the `kari` program is in a node.
pub const KARI_PROGRAM: &str = "/opt/kari/kari";

/// The certificates that git trusts, on the machine and in a node.
pub const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// The host keys that ssh knows, in a node and in the controller's Pod.
pub const HOST_KEYS: &str = "/etc/ssh/ssh_known_hosts";

/// Where the agent's kubeconfig and token are in a node.
pub const CREDENTIALS: &str = "/run/kari-testbed";

/// Makes sure that a folder can hold the layers of nodes.
pub fn check_file_system(path: &Path) -> Result<()> {
    /// OVERLAYFS_SUPER_MAGIC of the kernel's linux/magic.h.
    const OVERLAY: i64 = 0x794c_7630;
    let file_system = rustix::fs::statfs(path).context(|| format!("look at {}", path.display()))?;
    if file_system.f_type == OVERLAY {
        return Err(Error::State(format!(
            "{} is on an overlay file system, which cannot hold another overlay's layers: name a folder on a disk or a tmpfs with --dir, in a container for instance below /dev/shm",
            path.display()
        )));
    }
    Ok(())
}

/// Makes the folders of a node, before its first boot, in which the files and
/// folders of `binds` are shown at the second path of each.
pub fn create(
    directory: &Directory,
    name: NodeName,
    toolchains: &[Toolchain],
    mut binds: Vec<(PathBuf, PathBuf)>,
) -> Result<()> {
    let folder = directory.node(name);
    for path in ["upper", "work", "root", "kari", "credentials"] {
        directory.make_folder(folder.join(path))?;
    }
    // Roots of the node's own file system: everybody may pass, as on any machine.
    for path in ["upper", "kari"] {
        let path = folder.join(path);
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .context(|| format!("open the folder {} for all", path.display()))?;
    }
    binds.extend(
        toolchains
            .iter()
            .map(|toolchain| (toolchain.source.clone(), toolchain.target())),
    );
    let text: String = binds
        .iter()
        .map(|(source, target)| format!("{}\t{}\n", source.display(), target.display()))
        .collect();
    write_file(&folder.join("binds"), text.as_bytes())?;
    let libraries: String = toolchains
        .iter()
        .filter_map(Toolchain::libraries)
        .map(|libraries| format!("{}\n", libraries.display()))
        .collect();
    write_file(&folder.join("libraries"), libraries.as_bytes())
}

/// Boots a node and waits until systemd says that all enabled units were
/// started, be it with failures.
pub async fn boot(directory: &Directory, description: &Description, name: NodeName) -> Result<()> {
    let part = Part::Node(name);
    let folder = directory.node(name);
    if directory.running(part)?.is_some() {
        return Err(Error::State(format!("node {name} is running already")));
    }
    remove_cgroups(&folder)?;
    let pid_file = folder.join("pid");
    remove_if_there(&pid_file)?;
    let script = folder.join("node.sh");
    write_file(&script, SCRIPT.as_bytes())?;
    let namespace = network::namespace(directory, description)?;
    let mut command = Command::new("bash");
    command
        .arg(&script)
        .arg("launch")
        .env("PATH", PATH)
        .env("NODE_NAME", name.to_string())
        .env("NODE_DIR", &folder)
        .env(
            "NODE_GROUP",
            format!("kari-testbed-{}-{name}", description.id),
        )
        .env("NODE_BINDS", folder.join("binds"))
        .env("NODE_LIBRARIES", folder.join("libraries"))
        .env(
            "NODE_ADDRESS",
            format!("{}/24", description.node_address(name)),
        )
        .env(
            "NODE_GATEWAY",
            if description.kubelet {
                network::GATEWAY.to_string()
            } else {
                String::new()
            },
        )
        .env("LAB_NETNS", namespace.unwrap_or_default());
    let launcher = process::start(&command, &description.id, &directory.log(part))?;
    let log = || directory.log_tail(part);
    let what = format!("node {name} did not boot");
    let init = until(&what, BOOT_LIMIT, log, async || {
        match fs::read_to_string(&pid_file) {
            Ok(pid) => match pid.trim().parse().ok().and_then(Process::observe) {
                Some(init) => Seen::Ready(init),
                None => Seen::Never("its PID 1 ended".to_owned()),
            },
            Err(_) if launcher.is_alive() => {
                Seen::NotYet("its namespaces are being made".to_owned())
            }
            Err(_) => Seen::Never("its launcher ended".to_owned()),
        }
    })
    .await?;
    directory.record_process(part, init)?;
    until(&what, BOOT_LIMIT, log, async || {
        if !init.is_alive() {
            return Seen::Never("its PID 1 ended".to_owned());
        }
        match system_state(init).await {
            Ok(state) if matches!(state.as_str(), "running" | "degraded") => Seen::Ready(()),
            Ok(state) => Seen::NotYet(format!("systemd says that it is {state}")),
            Err(error) => Seen::NotYet(format!("its bus does not answer ({error})")),
        }
    })
    .await
}

/// Cuts the power: every process of the node is killed, nothing is written.
pub fn power_off(directory: &Directory, name: NodeName) -> Result<()> {
    if let Some(init) = directory.running(Part::Node(name))? {
        init.signal(Signal::KILL)?;
        wait_end(init, name, END_LIMIT)?;
    }
    remove_cgroups(&directory.node(name))
}

/// Shuts a node down in order, as `systemctl poweroff` does.
pub async fn shut_down(
    directory: &Directory,
    description: &Description,
    name: NodeName,
) -> Result<()> {
    let init = init(directory, name)?;
    let mut command = enter(description, init, "systemctl");
    command.arg("poweroff");
    process::run(&mut command)?;
    tokio::task::spawn_blocking(move || wait_end(init, name, SHUTDOWN_LIMIT))
        .await
        .map_err(|error| Error::State(error.to_string()))??;
    remove_cgroups(&directory.node(name))
}

/// PID 1 of a node that runs.
pub fn init(directory: &Directory, name: NodeName) -> Result<Process> {
    directory.running(Part::Node(name))?.ok_or_else(|| {
        Error::State(format!(
            "node {name} is not running: `testbed start node/{name}` boots it"
        ))
    })
}

/// A program in all namespaces of a node, with an environment of its own.
pub fn enter(description: &Description, init: Process, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command
        .env_clear()
        .env("PATH", PATH)
        .env("LANG", "C.UTF-8")
        .env("HOME", "/root")
        .env(
            "TERM",
            std::env::var_os("TERM").unwrap_or_else(|| "dumb".into()),
        )
        .env("SYSTEMD_PAGER", "")
        .env(ID_VARIABLE, &description.id)
        .arg(format!("--target={}", init.pid))
        .args([
            "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd",
        ])
        .arg("--")
        .arg(program);
    command
}

/// Replaces this process by a program in a node; returns only when that fails.
pub fn become_command(description: &Description, init: Process, words: &[String]) -> Error {
    let Some((program, arguments)) = words.split_first() else {
        return Error::State("no command was given: testbed exec nX -- COMMAND".to_owned());
    };
    let source = enter(description, init, program)
        .args(arguments)
        .stdin(Stdio::inherit())
        .exec();
    Error::Io {
        action: "run `nsenter`".to_owned(),
        source,
    }
}

/// The address of a node's system bus, as any process of the machine sees it.
pub fn bus_address(init: Process) -> String {
    format!(
        "unix:path=/proc/{}/root/run/dbus/system_bus_socket",
        init.pid
    )
}

/// What systemd says of the node as a whole: `running`, `degraded`, `starting`, …
///
/// # Errors
/// Why it cannot be asked, for people.
pub async fn system_state(init: Process) -> std::result::Result<String, String> {
    match tokio::time::timeout(BUS_LIMIT, ask_system_state(init)).await {
        Ok(state) => state.map_err(|error| error.to_string()),
        Err(_elapsed) => Err(format!("no answer within {} s", BUS_LIMIT.as_secs())),
    }
}

async fn ask_system_state(init: Process) -> zbus::Result<String> {
    let bus = zbus::connection::Builder::address(bus_address(init).as_str())
        .build()
        .await?;
    let answer = bus
        .call_method(
            Some("org.freedesktop.systemd1"),
            "/org/freedesktop/systemd1",
            Some("org.freedesktop.DBus.Properties"),
            "Get",
            &("org.freedesktop.systemd1.Manager", "SystemState"),
        )
        .await?;
    let value: zbus::OwnedVariant = answer.body().deserialize()?;
    String::try_from(value)
}

/// Removes the cgroups of a node that has ended.
pub fn remove_cgroups(folder: &Path) -> Result<()> {
    let list = folder.join("cgroups");
    let Ok(text) = fs::read_to_string(&list) else {
        return Ok(());
    };
    for group in text.lines().map(Path::new) {
        let start = Instant::now();
        // A killed process leaves its cgroup a moment after it is gone from /proc.
        while let Err(error) = remove_cgroup(group) {
            if start.elapsed() > CGROUP_LIMIT {
                return Err(error).context(|| format!("remove the cgroup {}", group.display()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    remove_if_there(&list)
}

fn remove_cgroup(group: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    match fs::remove_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn wait_end(init: Process, name: NodeName, limit: Duration) -> Result<()> {
    if init.wait_end(limit) {
        return Ok(());
    }
    Err(Error::NotReady {
        what: format!("node {name} did not end"),
        limit,
        seen: format!("its PID 1, process {}, still runs", init.pid),
        log: String::new(),
    })
}
