//! Steps of any kind, as transient units.

use std::path::{Path, PathBuf};

use super::{ENV_PROGRAM, UnitError};
use crate::agent::host::jail::{self, Setting, Value};
use crate::agent::host::quote;

/// A step: commands that run one after the other as a user in the build jail, once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepSpec {
    /// For people; of validated names only.
    pub description: String,
    /// The user's name.
    pub user: String,
    /// Seconds that each command may take.
    pub timeout_seconds: u32,
    /// What they may use together.
    pub limits: StepLimits,
    /// Whether there is a network.
    pub network: bool,
    /// Variables that anybody on the node may read.
    pub environment: Vec<(String, String)>,
    /// A 0600 file with further variables, which win.
    pub environment_file: Option<PathBuf>,
    /// Paths of the node and where they are in the jail, to read.
    pub read_only: Vec<(PathBuf, String)>,
    /// Paths of the node and where they are in the jail, to write.
    pub writable: Vec<(PathBuf, String)>,
    /// Where the commands start, in the jail.
    pub working_directory: String,
    /// The file that their output is appended to; its folder is root's alone.
    pub log: PathBuf,
    /// Arguments of `/usr/bin/env` for each command that must succeed before the main one.
    pub before: Vec<Vec<String>>,
    /// Arguments of `/usr/bin/env` for the main command, whose end is the result.
    pub command: Vec<String>,
}

/// What a step may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Thousandths of a CPU.
    pub cpu_millis: u64,
    /// Bytes; swap is not used.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub tasks: u32,
}

/// Seconds between SIGTERM and SIGKILL of a step: it has nothing to save.
const STEP_STOP_SECONDS: u32 = 10;

/// A step as properties of a transient unit. Success is `Result=success`, `ExecMainCode=1` and
/// `ExecMainStatus=0` together: only of a oneshot unit do the three mean that it did what it should.
pub fn step_properties(spec: &StepSpec) -> Result<Vec<Setting>, UnitError> {
    let StepSpec {
        description,
        user,
        timeout_seconds,
        limits:
            StepLimits {
                cpu_millis,
                memory_bytes,
                tasks,
            },
        network,
        environment,
        environment_file,
        read_only,
        writable,
        working_directory,
        log,
        before,
        command,
    } = spec;
    let wrong = |source| UnitError::Quote {
        place: description.clone(),
        source,
    };
    let path = |path: &Path| quote::plain_path(path).map(str::to_owned).map_err(wrong);

    let mut settings = vec![
        Setting::new("Description", Value::Text(description.clone())),
        Setting::new("Type", Value::Text("oneshot".to_owned())),
        // The unit stays, with its result, until the agent has read it.
        Setting::new("RemainAfterExit", Value::Switch(true)),
        Setting::new("TimeoutStartSec", Value::Seconds(*timeout_seconds)),
        Setting::new("TimeoutStopSec", Value::Seconds(STEP_STOP_SECONDS)),
        Setting::new("User", Value::Text(user.clone())),
        Setting::new("WorkingDirectory", Value::Text(working_directory.clone())),
        Setting::new("MemoryMax", Value::Number(*memory_bytes)),
        Setting::new("MemorySwapMax", Value::Number(0)),
        Setting::new("TasksMax", Value::Number(u64::from(*tasks))),
        Setting::new("CPUQuota", Value::CpuMillis(*cpu_millis)),
        Setting::new("StandardOutputFileToAppend", Value::Text(path(log)?)),
        Setting::new("StandardErrorFileToAppend", Value::Text(path(log)?)),
        Setting::new("Environment", Value::Environment(environment.clone())),
    ];
    settings.extend(jail::build_jail());
    if !network {
        settings.push(Setting::new("PrivateNetwork", Value::Switch(true)));
    }
    if let Some(file) = environment_file {
        settings.push(Setting::new(
            "EnvironmentFile",
            Value::EnvironmentFile(path(file)?),
        ));
    }
    for (from, to) in read_only {
        settings.push(Setting::new(
            "BindReadOnlyPaths",
            Value::Bind(path(from)?, to.clone()),
        ));
    }
    for (from, to) in writable {
        settings.push(Setting::new(
            "BindPaths",
            Value::Bind(path(from)?, to.clone()),
        ));
    }
    for words in before {
        let words = quote::exec_arguments(words).map_err(wrong)?;
        settings.push(Setting::new(
            "ExecStartPre",
            Value::Command(ENV_PROGRAM, words),
        ));
    }
    let words = quote::exec_arguments(command).map_err(wrong)?;
    settings.push(Setting::new(
        "ExecStart",
        Value::Command(ENV_PROGRAM, words),
    ));
    Ok(settings)
}
