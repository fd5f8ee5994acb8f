//! Units: what they are called and what they say. Pure.
//!
//! - A **service** is a file whose name carries the digest of its content, so it
//!   is never edited, needs no daemon-reload, and cannot be mistaken for another.
//! - The **target** of an app names exactly the committed services; its rename
//!   is the commit.
//! - A **step** (build, fetch) is a transient oneshot unit with a deterministic
//!   name, so that an agent that was restarted finds it and carries on.
//!
//! Deliberately absent: I/O, and any text of a user's that did not pass
//! [`super::quote`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::jail::{
    self, APP_PATH, JAIL_VERSION, MIRROR_PATH, SCRIPT_PATH, STATE_PATH, Setting, Value,
};
use super::quote::{self, QuoteError};
use super::records::{BuildKey, ContentDigest};
use crate::api::deployment::{Build, EnvVar, Process, ProcessType, ResourceLimits};
use crate::api::names::{AppName, Commit, NodeName, ReleaseId};
use crate::api::quantity::QuantityError;

/// A unit that cannot be made from the spec: it has to be changed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Text that cannot reach a program.
    #[error("{place}: {source}")]
    Quote {
        /// Where in the spec.
        place: String,
        /// What is wrong with it.
        #[source]
        source: QuoteError,
    },
    /// `$(NAME)` of a variable that the process does not have.
    #[error(
        "process {process}: $({name}) in its command is not a variable of this process; write $$({name}) if the text itself is meant"
    )]
    UnknownVariable {
        /// The process.
        process: String,
        /// The name.
        name: String,
    },
    /// A limit that cannot be read.
    #[error("{place}: {source}")]
    Quantity {
        /// Where in the spec.
        place: String,
        /// What is wrong with it.
        #[source]
        source: QuantityError,
    },
    /// A port for a process that listens on nothing, or none for one that does.
    #[error("process {process}: it has {}, and the unit was given {}", if *.wants { "a port" } else { "no port" }, if *.wants { "none" } else { "one" })]
    Port {
        /// The process.
        process: String,
        /// Whether its spec has a port.
        wants: bool,
    },
}

// ---- Names ----------------------------------------------------------------

/// Which of Kari's a unit is, told by its name alone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum OwnUnit {
    /// The target of an app.
    Target(AppName),
    /// A service of an app.
    Service {
        /// The app.
        app: AppName,
        /// The process's name.
        process: String,
    },
    /// A build of an app.
    Build {
        /// The app.
        app: AppName,
        /// The release that it is for.
        release_id: ReleaseId,
        /// Which try within the attempt, from 0.
        build_try: u32,
    },
    /// A fetch into a mirror.
    Fetch {
        /// The mirror's key.
        mirror: String,
    },
    /// The agent's own: its proxy, its slices, its canaries.
    Agent,
}

/// Matches the names of all units of Kari's, and of few others.
pub const ALL_UNITS: &str = "kari*";

/// Reads a unit's name; nothing for a name that is not Kari's.
pub fn parse_unit_name(name: &str) -> Option<OwnUnit> {
    if name == "kari.slice" {
        return Some(OwnUnit::Agent);
    }
    if let Some(rest) = name.strip_prefix("kari.") {
        if let Some(app) = rest.strip_suffix(".target") {
            return AppName::parse(app).ok().map(OwnUnit::Target);
        }
        let mut parts = rest.strip_suffix(".service")?.splitn(4, '.');
        let app = AppName::new(parts.next()?, parts.next()?).ok()?;
        let process = parts.next()?.to_owned();
        let is_digest = |text: &str| {
            text.len() == UNIT_DIGEST_DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit())
        };
        return parts
            .next()
            .is_some_and(is_digest)
            .then_some(OwnUnit::Service { app, process });
    }
    if let Some(rest) = name.strip_prefix(BUILD_PREFIX) {
        let mut parts = rest.strip_suffix(".service")?.splitn(4, '.');
        let app = AppName::new(parts.next()?, parts.next()?).ok()?;
        let release_id = ReleaseId(Uuid::try_parse(parts.next()?).ok()?);
        let build_try = parts.next()?.parse().ok()?;
        return Some(OwnUnit::Build {
            app,
            release_id,
            build_try,
        });
    }
    if let Some(rest) = name.strip_prefix(FETCH_PREFIX) {
        return Some(OwnUnit::Fetch {
            mirror: rest.strip_suffix(".service")?.to_owned(),
        });
    }
    name.starts_with("kari-").then_some(OwnUnit::Agent)
}

/// The target of an app, its only enabled unit.
pub fn target_name(app: &AppName) -> String {
    format!("kari.{app}.target")
}

/// Patterns that match the loaded units of an app: services, target and builds.
pub fn app_patterns(app: &AppName) -> [String; 2] {
    [format!("kari.{app}.*"), format!("{BUILD_PREFIX}{app}.*")]
}

/// The build step of a release. Another try has another name, so that a result is never taken for
/// another try's.
pub fn build_unit_name(app: &AppName, release_id: &ReleaseId, build_try: u32) -> String {
    format!("{BUILD_PREFIX}{app}.{release_id}.{build_try}.service")
}

/// The fetch into a mirror: one name, so one fetch at a time.
pub fn fetch_unit_name(mirror_key: &str) -> String {
    format!("{FETCH_PREFIX}{mirror_key}.service")
}

const BUILD_PREFIX: &str = "kari-build.";
const FETCH_PREFIX: &str = "kari-fetch.";

/// Hexadecimal digits of a content's digest in a service's name: 64 bits among the few units of one
/// process, and the whole name stays far below systemd's 255 characters.
const UNIT_DIGEST_DIGITS: usize = 16;

// ---- Builds ---------------------------------------------------------------

/// The key of the tree that a build results in: a digest of all that the tree follows from. The limits
/// and the deadline of a build are not part of it.
pub fn build_key(commit: &Commit, directory: Option<&str>, build: Option<&Build>) -> BuildKey {
    let build = build.map(
        |Build {
             run,
             command,
             env,
             network,
             timeout_seconds: _,
             resources: _,
         }| {
            let env: BTreeMap<_, _> = env
                .iter()
                .map(|EnvVar { name, value }| (name, value))
                .collect();
            serde_json::json!({"run": run, "command": command, "env": env, "network": network})
        },
    );
    let content = serde_json::json!({
        "commit": commit.as_str(),
        // Without a build the whole checkout is what runs, from whatever directory.
        "directory": if build.is_some() { directory } else { None },
        "build": build,
        "jail": JAIL_VERSION,
    });
    BuildKey::of(content.to_string().as_bytes())
}

/// The script that a build step runs, as a file: a build's words reach systemd as its name alone.
pub fn build_script(build: &Build) -> Result<String, UnitError> {
    let place = |source| UnitError::Quote {
        place: "build".to_owned(),
        source,
    };
    match (&build.run, &build.command) {
        (Some(script), _) if script.contains('\0') => Err(place(QuoteError::Nul {
            what: "run".to_owned(),
        })),
        (Some(script), _) => Ok(format!("{}\n", script.trim_end_matches('\n'))),
        (None, Some(words)) => {
            quote::check_program(words).map_err(place)?;
            Ok(format!(
                "exec /usr/bin/env -- {}\n",
                quote::shell_words(words).map_err(place)?
            ))
        }
        (None, None) => Err(place(QuoteError::NoProgram)),
    }
}

/// The environment file of a build.
pub fn build_environment(build: &Build) -> Result<Vec<u8>, UnitError> {
    quote::environment_file(
        build
            .env
            .iter()
            .map(|EnvVar { name, value }| (name.as_str(), value.as_str())),
    )
    .map_err(|source| UnitError::Quote {
        place: "build.env".to_owned(),
        source,
    })
}

/// What a build step is made of.
#[derive(Debug, Clone, Copy)]
pub struct BuildSpec<'a> {
    /// The app.
    pub app: &'a AppName,
    /// What is checked out.
    pub commit: &'a Commit,
    /// The bare mirror on the node that has it.
    pub mirror: &'a Path,
    /// The stage, made by [`super::store::AppFolder::create_stage`].
    pub stage: &'a super::store::Stage,
    /// The folder of the repository that the build starts in.
    pub directory: Option<&'a str>,
    /// The build; without it the checkout is all.
    pub build: Option<&'a Build>,
    /// The file of [`build_environment`].
    pub env_file: Option<&'a Path>,
    /// The app's build user.
    pub user: &'a str,
    /// `$PATH` of the node's tools.
    pub tool_path: &'a str,
    /// Where its output goes.
    pub log: &'a Path,
}

/// Seconds in which a checkout without a build must be done.
const CHECKOUT_TIMEOUT_SECONDS: u32 = 900;

/// A build step: git checks the commit out, then the script runs. The checkout is `ExecStartPre=`, so
/// a step whose main process never ran (`ExecMainCode` 0) failed in the checkout, and a reload of
/// systemd in the middle cannot make it skip the build.
pub fn build_step(spec: &BuildSpec<'_>) -> Result<StepSpec, UnitError> {
    let BuildSpec {
        app,
        commit,
        mirror,
        stage,
        directory,
        build,
        env_file,
        user,
        tool_path,
        log,
    } = *spec;
    // Nothing of the build's environment reaches git, and nothing of the node's configuration.
    let checkout: Vec<String> = [
        "-i",
        &format!("PATH={tool_path}"),
        "HOME=/tmp/home",
        "LANG=C.UTF-8",
        "GIT_CONFIG_NOSYSTEM=1",
        "GIT_CONFIG_GLOBAL=/dev/null",
        "GIT_INDEX_FILE=/tmp/kari-index",
        "GIT_TERMINAL_PROMPT=0",
        "git",
        "-c",
        "core.hooksPath=/dev/null",
        "-c",
        "advice.detachedHead=false",
        &format!("--git-dir={MIRROR_PATH}"),
        &format!("--work-tree={APP_PATH}"),
        "checkout",
        "-f",
        commit.as_str(),
        "--",
        ".",
    ]
    .map(str::to_owned)
    .to_vec();

    let mut writable = vec![
        (stage.source(), APP_PATH.to_owned()),
        (stage.temporary(), "/tmp".to_owned()),
        (stage.temporary(), "/var/tmp".to_owned()),
    ];
    writable.sort_by(|a, b| a.1.cmp(&b.1));
    let mut step = StepSpec {
        description: format!("Kari: build of {app} at {}", commit.short()),
        user: user.to_owned(),
        timeout_seconds: CHECKOUT_TIMEOUT_SECONDS,
        limits: DEFAULT_BUILD_LIMITS,
        network: true,
        environment: vec![
            ("PATH".to_owned(), tool_path.to_owned()),
            ("HOME".to_owned(), "/tmp/home".to_owned()),
            ("TMPDIR".to_owned(), "/tmp".to_owned()),
            ("XDG_CACHE_HOME".to_owned(), "/tmp/cache".to_owned()),
            ("LANG".to_owned(), "C.UTF-8".to_owned()),
            ("CI".to_owned(), "true".to_owned()),
        ],
        environment_file: None,
        read_only: vec![(mirror.to_owned(), MIRROR_PATH.to_owned())],
        writable,
        working_directory: APP_PATH.to_owned(),
        log: log.to_owned(),
        before: vec![],
        command: checkout.clone(),
    };
    if let Some(build) = build {
        step.timeout_seconds = build.timeout_seconds;
        step.limits = build_limits(build)?;
        step.network = build.network;
        step.environment_file = env_file.map(Path::to_owned);
        step.read_only
            .push((stage.script(), SCRIPT_PATH.to_owned()));
        step.before = vec![checkout];
        step.command = [
            &format!("--chdir={}", in_app(directory)),
            "/bin/sh",
            "-eu",
            SCRIPT_PATH,
        ]
        .map(str::to_owned)
        .to_vec();
    }
    Ok(step)
}

/// The exit status of `env --chdir` for a folder that is not there; a program may end with it too, so
/// the stage is looked at before it is said.
pub const EXIT_NO_DIRECTORY: i32 = 125;

/// What a build may use unless its spec says otherwise.
pub const DEFAULT_BUILD_LIMITS: StepLimits = StepLimits {
    cpu_millis: 2000,
    memory_bytes: 2 << 30,
    tasks: DEFAULT_TASKS,
};

/// Processes and threads of a build or a service unless its spec says otherwise.
const DEFAULT_TASKS: u32 = 512;

fn build_limits(build: &Build) -> Result<StepLimits, UnitError> {
    let limits = build
        .resources
        .as_ref()
        .and_then(|resources| resources.limits.as_ref());
    let Some(ResourceLimits { cpu, memory, tasks }) = limits else {
        return Ok(DEFAULT_BUILD_LIMITS);
    };
    let wrong = |source| UnitError::Quantity {
        place: "build.resources.limits".to_owned(),
        source,
    };
    let StepLimits {
        cpu_millis,
        memory_bytes,
        tasks: default_tasks,
    } = DEFAULT_BUILD_LIMITS;
    Ok(StepLimits {
        cpu_millis: cpu
            .as_ref()
            .map_or(Ok(cpu_millis), |cpu| cpu.millis())
            .map_err(wrong)?,
        memory_bytes: memory
            .as_ref()
            .map_or(Ok(memory_bytes), |memory| memory.bytes())
            .map_err(wrong)?,
        tasks: tasks.unwrap_or(default_tasks),
    })
}

// ---- Steps of any kind ----------------------------------------------------

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

/// The program of every command: it finds the real one on `$PATH` and in the working directory, in the jail.
const ENV_PROGRAM: &str = "/usr/bin/env";

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

// ---- Services -------------------------------------------------------------

/// Variables of a process as its environment file has them: the Deployment's, then the process's own,
/// less those that Kari sets itself in the unit, which win.
pub fn process_variables(env: &[EnvVar], process: &Process) -> BTreeMap<String, String> {
    let own = |name: &str| {
        name.starts_with("KARI_")
            || matches!(name, "HOME" | "STATE_DIRECTORY")
            || process.port.as_ref().is_some_and(|port| port.env == name)
    };
    env.iter()
        .chain(&process.env)
        .filter(|variable| !own(&variable.name))
        .map(|EnvVar { name, value }| (name.clone(), value.clone()))
        .collect()
}

/// The environment file of a process.
pub fn process_environment(
    process: &Process,
    variables: &BTreeMap<String, String>,
) -> Result<Vec<u8>, UnitError> {
    quote::environment_file(
        variables
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str())),
    )
    .map_err(|source| UnitError::Quote {
        place: format!("process {}: env", process.name),
        source,
    })
}

/// What a service unit is made of.
#[derive(Debug, Clone, Copy)]
pub struct ServiceSpec<'a> {
    /// The app.
    pub app: &'a AppName,
    /// The process.
    pub process: &'a Process,
    /// What [`process_variables`] gave, for `$(NAME)`.
    pub variables: &'a BTreeMap<String, String>,
    /// The file of [`process_environment`].
    pub env_file: &'a Path,
    /// The port it is given, exactly if its spec has one.
    pub port: Option<u16>,
    /// What runs.
    pub commit: &'a Commit,
    /// The node.
    pub node: &'a NodeName,
    /// The sealed tree on the node.
    pub tree: &'a Path,
    /// The folder of the tree that it starts in; resolved beneath the tree before the start.
    pub directory: Option<&'a str>,
    /// Its state folder on the node, if its spec asks for one.
    pub state: Option<&'a Path>,
    /// The app's service user.
    pub user: &'a str,
    /// `$PATH` of the node's tools.
    pub tool_path: &'a str,
}

/// A service unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceUnit {
    /// `kari.<ns>.<name>.<process>.<digest of text>.service`.
    pub name: String,
    /// The file's content.
    pub text: String,
    /// The digest of all that the text says but the port.
    pub content: ContentDigest,
}

/// A service: same spec, same unit. Units of equal `content` differ at most in the port, and the one
/// that runs need not be touched.
pub fn service_unit(spec: &ServiceSpec<'_>) -> Result<ServiceUnit, UnitError> {
    let text = service_text(spec, spec.port)?;
    let content = service_text(spec, spec.port.map(|_| 0))?;
    let digest = ContentDigest::of(text.as_bytes());
    let name = format!(
        "kari.{}.{}.{}.service",
        spec.app,
        spec.process.name,
        &digest.as_str()[..UNIT_DIGEST_DIGITS]
    );
    Ok(ServiceUnit {
        name,
        text,
        content: ContentDigest::of(content.as_bytes()),
    })
}

fn service_text(spec: &ServiceSpec<'_>, port: Option<u16>) -> Result<String, UnitError> {
    let ServiceSpec {
        app,
        process,
        commit,
        node,
        env_file,
        tree,
        directory,
        state,
        user,
        tool_path,
        variables: _,
        port: _,
    } = *spec;
    let wrong = |source| UnitError::Quote {
        place: format!("process {}", process.name),
        source,
    };
    let path = |path: &Path| quote::plain_path(path).map(str::to_owned).map_err(wrong);
    if process.port.is_some() != port.is_some() {
        return Err(UnitError::Port {
            process: process.name.clone(),
            wants: process.port.is_some(),
        });
    }

    let mut settings = vec![
        Setting::new(
            "Type",
            Value::Text(match process.process_type {
                ProcessType::Simple => "exec".to_owned(),
                ProcessType::Notify => "notify".to_owned(),
            }),
        ),
        Setting::new("User", Value::Text(user.to_owned())),
        Setting::new("Restart", Value::Text("always".to_owned())),
        Setting::new("RestartSec", Value::Seconds(1)),
        Setting::new("TimeoutStartSec", Value::Seconds(SERVICE_START_SECONDS)),
        Setting::new("WorkingDirectory", Value::Text(APP_PATH.to_owned())),
        Setting::new(
            "BindReadOnlyPaths",
            Value::Bind(path(tree)?, APP_PATH.to_owned()),
        ),
    ];
    if process.process_type == ProcessType::Notify {
        settings.push(Setting::new("NotifyAccess", Value::Text("main".to_owned())));
    }
    match process.termination_grace_period_seconds {
        // No grace: to systemd a timeout of 0 means none.
        0 => settings.extend([
            Setting::new("KillSignal", Value::Text("SIGKILL".to_owned())),
            Setting::new("TimeoutStopSec", Value::Seconds(1)),
        ]),
        seconds => settings.push(Setting::new("TimeoutStopSec", Value::Seconds(seconds))),
    }
    if let Some(state) = state {
        settings.push(Setting::new(
            "BindPaths",
            Value::Bind(path(state)?, STATE_PATH.to_owned()),
        ));
    }
    settings.extend(service_limits(process)?);
    settings.extend(jail::service_jail(process.sandbox.as_ref()));

    let mut assignments = vec![("PATH", tool_path), ("LANG", "C.UTF-8")];
    let port_text = port.map(|port| port.to_string()).unwrap_or_default();
    let mut own = own_variables(process, commit, node, app, state.is_some());
    if let Some(port) = &process.port {
        own.push((&port.env, &port_text));
    }
    assignments.append(&mut own);

    let mut text = format!(
        "# Made by Kari and never edited: its name carries the digest of its content.\n\
         [Unit]\n\
         Description=Kari: {} of {app}\n\
         After=network.target nss-user-lookup.target\n\
         StartLimitIntervalSec=0\n\
         \n\
         [Service]\n",
        process.name
    );
    for line in settings.iter().filter_map(Setting::line) {
        text.push_str(&line);
        text.push('\n');
    }
    for (name, value) in assignments {
        text.push_str(&format!(
            "Environment={}\n",
            quote::environment_assignment(name, value).map_err(wrong)?
        ));
    }
    text.push_str(&format!("EnvironmentFile={}\n", path(env_file)?));

    let expanded = expand_command(spec, &port_text)?;
    quote::check_program(&expanded).map_err(wrong)?;
    let mut words = vec![format!("--chdir={}", in_app(directory)), "--".to_owned()];
    words.extend(expanded);
    text.push_str(&format!(
        "ExecStart={}\n",
        quote::exec_line(ENV_PROGRAM, &words).map_err(wrong)?
    ));
    Ok(text)
}

/// Seconds in which a service must be executed, or have said READY=1.
const SERVICE_START_SECONDS: u32 = 90;

/// What Kari tells every process, and users cannot change: nothing that changes when the content does not.
fn own_variables<'a>(
    process: &'a Process,
    commit: &'a Commit,
    node: &'a NodeName,
    app: &'a AppName,
    has_state: bool,
) -> Vec<(&'a str, &'a str)> {
    let mut own = vec![
        ("KARI_NAMESPACE", app.namespace()),
        ("KARI_DEPLOYMENT", app.name()),
        ("KARI_PROCESS", process.name.as_str()),
        ("KARI_NODE", node.as_str()),
        ("KARI_COMMIT", commit.as_str()),
    ];
    if has_state {
        own.extend([("HOME", STATE_PATH), ("STATE_DIRECTORY", STATE_PATH)]);
    } else {
        own.push(("HOME", "/tmp"));
    }
    own
}

fn service_limits(process: &Process) -> Result<Vec<Setting>, UnitError> {
    let default = ResourceLimits::default();
    let limits = process
        .resources
        .as_ref()
        .and_then(|resources| resources.limits.as_ref());
    let ResourceLimits { cpu, memory, tasks } = limits.unwrap_or(&default);
    let wrong = |source| UnitError::Quantity {
        place: format!("process {}: resources.limits", process.name),
        source,
    };

    let mut settings = vec![Setting::new(
        "TasksMax",
        Value::Number(u64::from(tasks.unwrap_or(DEFAULT_TASKS))),
    )];
    if let Some(cpu) = cpu {
        settings.push(Setting::new(
            "CPUQuota",
            Value::CpuMillis(cpu.millis().map_err(wrong)?),
        ));
    }
    if let Some(memory) = memory {
        settings.push(Setting::new(
            "MemoryMax",
            Value::Number(memory.bytes().map_err(wrong)?),
        ));
        settings.push(Setting::new("MemorySwapMax", Value::Number(0)));
    }
    Ok(settings)
}

/// Replaces `$(NAME)` in a command as core/v1 does, but for unknown names, which are refused; `$$`
/// stands for `$`.
fn expand_command(spec: &ServiceSpec<'_>, port: &str) -> Result<Vec<String>, UnitError> {
    let value_of = |name: &str| match &spec.process.port {
        Some(variable) if variable.env == name => Some(port),
        Some(_) | None => spec.variables.get(name).map(String::as_str),
    };
    spec.process
        .command
        .iter()
        .map(|word| {
            expand_word(word, value_of).map_err(|name| UnitError::UnknownVariable {
                process: spec.process.name.clone(),
                name,
            })
        })
        .collect()
}

fn expand_word<'a>(
    word: &str,
    value_of: impl Fn(&str) -> Option<&'a str>,
) -> Result<String, String> {
    let mut expanded = String::with_capacity(word.len());
    let mut rest = word;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            expanded.push('$');
            rest = after;
        } else if let Some((name, after)) = after
            .strip_prefix('(')
            .and_then(|inner| inner.split_once(')'))
        {
            expanded.push_str(value_of(name).ok_or_else(|| name.to_owned())?);
            rest = after;
        } else {
            expanded.push('$');
            rest = after;
        }
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn in_app(directory: Option<&str>) -> String {
    match directory {
        None | Some("" | ".") => APP_PATH.to_owned(),
        Some(directory) => format!("{APP_PATH}/{directory}"),
    }
}

// ---- Targets -------------------------------------------------------------

/// The target of an app: it wants exactly `units`.
pub fn target_text(app: &AppName, units: &[String]) -> String {
    let mut text = format!(
        "# Made by Kari: names the committed services of {app}. Its rename is the commit.\n\
         [Unit]\n\
         Description=Kari: {app}\n"
    );
    for unit in units {
        text.push_str(&format!("Wants={unit}\n"));
    }
    text.push_str("\n[Install]\nWantedBy=multi-user.target\n");
    text
}

/// The units that a target's text wants, in its order.
pub fn target_units(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.strip_prefix("Wants="))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    use proptest::prelude::*;

    use super::*;
    use crate::agent::host::store::Stage;
    use crate::api::deployment::{BuildResources, ProcessResources};
    use crate::api::quantity::{Cpu, Memory};

    fn app() -> AppName {
        AppName::new("web", "shop").unwrap()
    }

    fn commit() -> Commit {
        Commit::parse(&"4b825dc0".repeat(5)).unwrap()
    }

    fn process(json: serde_json::Value) -> Process {
        serde_json::from_value(json).unwrap()
    }

    fn variable(name: &str, value: &str) -> EnvVar {
        EnvVar {
            name: name.to_owned(),
            value: value.to_owned(),
        }
    }

    fn service(
        process: &Process,
        env: &[EnvVar],
        port: Option<u16>,
    ) -> Result<ServiceUnit, UnitError> {
        let state = process
            .state_directory
            .then_some(Path::new("/var/lib/kari/apps/web.shop/state/web"));
        service_unit(&ServiceSpec {
            app: &app(),
            process,
            variables: &process_variables(env, process),
            env_file: Path::new("/var/lib/kari/apps/web.shop/env/abc"),
            port,
            commit: &commit(),
            node: &NodeName::new("n1"),
            tree: Path::new("/var/lib/kari/apps/web.shop/builds/key"),
            directory: Some("services/shop"),
            state,
            user: "kari-50001",
            tool_path: "/usr/local/bin:/usr/bin:/bin",
        })
    }

    fn build(json: serde_json::Value) -> Build {
        serde_json::from_value(json).unwrap()
    }

    fn step(build: Option<&Build>) -> StepSpec {
        build_step(&BuildSpec {
            app: &app(),
            commit: &commit(),
            mirror: Path::new("/var/lib/kari/mirrors/m.git"),
            stage: &Stage {
                path: "/var/lib/kari/apps/web.shop/stage/k.0".into(),
            },
            directory: Some("services/shop"),
            build,
            env_file: Some(Path::new("/var/lib/kari/apps/web.shop/env/b")),
            user: "kari-50000",
            tool_path: "/usr/bin:/bin",
            log: Path::new("/var/lib/kari/apps/web.shop/logs/r.build"),
        })
        .unwrap()
    }

    #[test]
    fn a_name_tells_what_a_unit_is() {
        let release_id = ReleaseId(Uuid::from_u128(7));
        let web = service(
            &process(serde_json::json!({"name": "web", "command": ["x"]})),
            &[],
            None,
        )
        .unwrap();
        for (name, unit) in [
            (target_name(&app()), Some(OwnUnit::Target(app()))),
            (
                web.name,
                Some(OwnUnit::Service {
                    app: app(),
                    process: "web".to_owned(),
                }),
            ),
            (
                build_unit_name(&app(), &release_id, 3),
                Some(OwnUnit::Build {
                    app: app(),
                    release_id,
                    build_try: 3,
                }),
            ),
            (
                fetch_unit_name("abc"),
                Some(OwnUnit::Fetch {
                    mirror: "abc".to_owned(),
                }),
            ),
            ("kari-proxy.service".to_owned(), Some(OwnUnit::Agent)),
            ("kari.slice".to_owned(), Some(OwnUnit::Agent)),
            ("kari.web.target".to_owned(), None),
            ("kari.web.shop.web.nodigest.service".to_owned(), None),
            ("kari.web.shop.web.0123456789abcdef.timer".to_owned(), None),
            ("karina.service".to_owned(), None),
            ("sshd.service".to_owned(), None),
        ] {
            assert_eq!(parse_unit_name(&name), unit, "{name}");
        }
        let longest = AppName::new(&"n".repeat(63), &"d".repeat(52)).unwrap();
        let name = format!(
            "kari.{longest}.{}.{}.service",
            "p".repeat(32),
            "0".repeat(UNIT_DIGEST_DIGITS)
        );
        assert!(name.len() < 256 && build_unit_name(&longest, &release_id, u32::MAX).len() < 256);
    }

    #[test]
    fn a_service_says_what_its_spec_does() {
        let process = process(serde_json::json!({
            "name": "web",
            "command": ["./serve", "--port=$(PORT)", "--log", "$(LOG)", "$$(LOG)", "100%", "$HOME"],
            "env": [{"name": "LOG", "value": "debug"}, {"name": "HOME", "value": "/mine"}],
            "type": "Notify",
            "port": {"env": "PORT"},
            "terminationGracePeriodSeconds": 7,
            "stateDirectory": true,
        }));
        let unit = service(
            &process,
            &[variable("LOG", "info"), variable("PORT", "1")],
            Some(20_001),
        )
        .unwrap();
        for line in [
            "Type=notify",
            "NotifyAccess=main",
            "User=kari-50001",
            "Restart=always",
            "StartLimitIntervalSec=0",
            "TimeoutStopSec=7",
            "Slice=kari-apps.slice",
            "SystemCallFilter=~@privileged @resources",
            "TasksMax=512",
            "BindReadOnlyPaths=/var/lib/kari/apps/web.shop/builds/key:/var/lib/kari/app",
            "BindPaths=/var/lib/kari/apps/web.shop/state/web:/var/lib/kari/state",
            "EnvironmentFile=/var/lib/kari/apps/web.shop/env/abc",
            "Environment=\"PORT=20001\"",
            "Environment=\"HOME=/var/lib/kari/state\"",
            "Environment=\"KARI_DEPLOYMENT=shop\"",
            r#"ExecStart=/usr/bin/env "--chdir=/var/lib/kari/app/services/shop" "--" "./serve" "--port=20001" "--log" "debug" "$$(LOG)" "100%%" "$$HOME""#,
        ] {
            assert!(
                unit.text.lines().any(|l| l == line),
                "{line}\n{}",
                unit.text
            );
        }
        assert!(!unit.text.contains("MemoryMax="), "no limit of its own");
        let variables =
            process_variables(&[variable("LOG", "info"), variable("PORT", "1")], &process);
        assert_eq!(
            variables,
            BTreeMap::from([("LOG".to_owned(), "debug".to_owned())]),
            "what Kari sets is not the user's"
        );
    }

    #[test]
    fn another_port_is_another_unit_of_the_same_content() {
        let process = process(
            serde_json::json!({"name": "web", "command": ["x", "$(PORT)"], "port": {"env": "PORT"}}),
        );
        let one = service(&process, &[], Some(20_001)).unwrap();
        let two = service(&process, &[], Some(20_002)).unwrap();
        assert_ne!(one.name, two.name);
        assert_eq!(one.content, two.content);
        let mut other = process.clone();
        other.termination_grace_period_seconds = 31;
        assert_ne!(
            service(&other, &[], Some(20_001)).unwrap().content,
            one.content
        );
        assert_eq!(service(&process, &[], Some(20_001)).unwrap(), one);
    }

    #[test]
    fn limits_are_written_in_systemds_units() {
        let mut process = process(serde_json::json!({"name": "web", "command": ["x"]}));
        let limits = ResourceLimits {
            cpu: Some(Cpu(IntOrString::String("1500m".to_owned()))),
            memory: Some(Memory(IntOrString::String("256Mi".to_owned()))),
            tasks: Some(9),
        };
        process.resources = Some(ProcessResources {
            limits: Some(limits.clone()),
        });
        process.termination_grace_period_seconds = 0;
        let text = service(&process, &[], None).unwrap().text;
        for line in [
            "CPUQuota=150.0%",
            "MemoryMax=268435456",
            "MemorySwapMax=0",
            "TasksMax=9",
            "KillSignal=SIGKILL",
            "TimeoutStopSec=1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        let mut of_build = build(serde_json::json!({"run": "make"}));
        assert_eq!(step(Some(&of_build)).limits, DEFAULT_BUILD_LIMITS);
        of_build.resources = Some(BuildResources {
            limits: Some(limits),
        });
        assert_eq!(
            step(Some(&of_build)).limits,
            StepLimits {
                cpu_millis: 1500,
                memory_bytes: 256 << 20,
                tasks: 9
            }
        );
    }

    #[test]
    fn what_cannot_be_run_is_refused_and_named() {
        let refused = |json, port| service(&process(json), &[], port).unwrap_err().to_string();
        let with = |command: &[&str]| serde_json::json!({"name": "web", "command": command});
        assert!(refused(with(&["x", "$(NOPE)"]), None).contains("process web: $(NOPE)"));
        assert!(refused(with(&[""]), None).contains("name of a program"));
        assert!(refused(with(&["A=1", "x"]), None).contains("without '='"));
        assert!(refused(with(&["x", "a\0b"]), None).contains("NUL"));
        assert!(refused(with(&["x"]), Some(1)).contains("no port"));
        assert!(
            refused(
                serde_json::json!({"name": "web", "command": ["x"], "port": {"env": "P"}}),
                None
            )
            .contains("a port")
        );
    }

    #[test]
    fn a_variable_in_a_command_expands_as_core_v1_says() {
        let value_of = |name: &str| (name == "A").then_some("1");
        for (word, expanded) in [
            ("$(A)", Ok("1")),
            ("x$(A)$(A)y", Ok("x11y")),
            ("$$(A)", Ok("$(A)")),
            ("$$$(A)", Ok("$1")),
            ("$", Ok("$")),
            ("$(A", Ok("$(A")),
            ("$A ${A}", Ok("$A ${A}")),
            ("$(B)", Err("B")),
            ("$()", Err("")),
        ] {
            let expected = expanded.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(expand_word(word, value_of), expected, "{word}");
        }
    }

    #[test]
    fn a_build_is_checked_out_before_it_runs_and_its_words_do_not_reach_systemd() {
        let of_build = build(
            serde_json::json!({"run": "make; echo $$ %n\n", "network": false, "timeoutSeconds": 60}),
        );
        let spec = step(Some(&of_build));
        assert!(spec.before[0].contains(&"checkout".to_owned()) && spec.before[0][0] == "-i");
        assert_eq!(
            spec.command,
            [
                "--chdir=/var/lib/kari/app/services/shop",
                "/bin/sh",
                "-eu",
                "/var/lib/kari/build"
            ]
        );
        assert_eq!((spec.network, spec.timeout_seconds), (false, 60));
        assert_eq!(build_script(&of_build).unwrap(), "make; echo $$ %n\n");
        let settings = step_properties(&spec).unwrap();
        assert!(settings.contains(&Setting::new("PrivateNetwork", Value::Switch(true))));
        assert!(!format!("{settings:?}").contains("echo"));

        let words = build(serde_json::json!({"command": ["npm", "run", "it's"]}));
        assert_eq!(
            build_script(&words).unwrap(),
            r"exec /usr/bin/env -- 'npm' 'run' 'it'\''s'".to_owned() + "\n"
        );

        let checkout = step(None);
        assert!(checkout.before.is_empty() && checkout.command.contains(&"checkout".to_owned()));
    }

    #[test]
    fn a_build_key_follows_from_what_the_tree_follows_from_and_from_nothing_else() {
        let json = |extra: serde_json::Value| {
            let mut json = serde_json::json!({"run": "make", "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]});
            json.as_object_mut()
                .unwrap()
                .extend(extra.as_object().unwrap().clone());
            build(json)
        };
        let base = json(serde_json::json!({}));
        let key = |build: &Build| build_key(&commit(), Some("d"), Some(build));
        for same in [
            serde_json::json!({"timeoutSeconds": 60}),
            serde_json::json!({"resources": {"limits": {"tasks": 7}}}),
            serde_json::json!({"env": [{"name": "B", "value": "2"}, {"name": "A", "value": "1"}]}),
        ] {
            assert_eq!(key(&json(same.clone())), key(&base), "{same}");
        }
        for other in [
            serde_json::json!({"run": "make all"}),
            serde_json::json!({"env": []}),
            serde_json::json!({"network": false}),
        ] {
            assert_ne!(key(&json(other.clone())), key(&base), "{other}");
        }
        assert_ne!(build_key(&commit(), Some("e"), Some(&base)), key(&base));
        assert_ne!(build_key(&commit(), Some("d"), None), key(&base));
        assert_eq!(
            build_key(&commit(), Some("d"), None),
            build_key(&commit(), None, None),
            "a checkout is the whole tree"
        );
        let other = Commit::parse(&"0".repeat(40)).unwrap();
        assert_ne!(build_key(&other, Some("d"), Some(&base)), key(&base));
    }

    #[test]
    fn a_target_reads_back() {
        let units = [
            "kari.web.shop.web.0.service".to_owned(),
            "kari.web.shop.worker.1.service".to_owned(),
        ];
        let text = target_text(&app(), &units);
        assert_eq!(target_units(&text), units);
        assert!(text.contains("WantedBy=multi-user.target"));
        assert_eq!(
            target_units(&target_text(&app(), &[])),
            Vec::<String>::new()
        );
    }

    proptest! {
        /// Whatever users write into a command and a directory, the unit has the same lines but for ExecStart.
        #[test]
        fn no_text_of_a_user_adds_a_directive(command in prop::collection::vec("[^\\x00$]{1,30}", 1..4), directory in "[^\\x00]{0,20}") {
            prop_assume!(!command[0].contains('='));
            let process = process(serde_json::json!({"name": "web", "command": command}));
            let plain = process_with(&process, "d");
            let odd = process_with(&process, &directory);
            let names = |text: &str| text.lines().map(|l| l.split('=').next().unwrap_or_default().to_owned()).collect::<Vec<_>>();
            prop_assert_eq!(names(&plain), names(&odd));
            prop_assert_eq!(plain.lines().filter(|l| l.starts_with("Exec")).count(), 1);
        }
    }

    fn process_with(process: &Process, directory: &str) -> String {
        service_unit(&ServiceSpec {
            app: &app(),
            process,
            variables: &BTreeMap::new(),
            env_file: Path::new("/e"),
            port: None,
            commit: &commit(),
            node: &NodeName::new("n1"),
            tree: Path::new("/t"),
            directory: Some(directory),
            state: None,
            user: "kari-50001",
            tool_path: "/bin",
        })
        .unwrap()
        .text
    }
}
