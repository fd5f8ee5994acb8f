//! Services: their environment and their unit.

use std::collections::BTreeMap;
use std::path::Path;

use zeroize::Zeroizing;

use super::{DEFAULT_TASKS, ENV_PROGRAM, UNIT_DIGEST_DIGITS, UnitError, in_app};
use crate::agent::host::jail::{self, APP_PATH, STATE_PATH, Setting, Value};
use crate::agent::host::quote;
use crate::agent::host::records::{ContentDigest, EnvDigest};
use crate::api::deployment::{EnvVar, Process, ProcessType, ResourceLimits};
use crate::api::names::{AppName, Commit, NodeName};
use crate::api::release::SecretVariables;
use crate::seal::environment::SecretEnvironment;

/// The variables of a process as its environment file has them: the Deployment's, then the process's own, less
/// those that Kari sets itself in the unit, which win.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessVariables {
    /// Those whose values anybody may know: what `$(NAME)` in a command stands for.
    pub plain: BTreeMap<String, String>,
    /// Those whose values are secret, and whether each is the process's own.
    secret: BTreeMap<String, bool>,
    /// What stands for the secret values.
    digests: Vec<String>,
}

impl ProcessVariables {
    /// Those of `process` in a template that has `env` and `secret_env`.
    pub fn of(env: &[EnvVar], secret_env: &[SecretVariables], process: &Process) -> Self {
        let is_ours = |name: &str| {
            name.starts_with("KARI_")
                || matches!(name, "HOME" | "STATE_DIRECTORY")
                || process.port.as_ref().is_some_and(|port| port.env == name)
        };
        let mut variables = Self::default();
        for (env, own) in [(env, false), (&process.env[..], true)] {
            for variable in env.iter().filter(|variable| !is_ours(&variable.name)) {
                variables.secret.remove(&variable.name);
                let value = variable.plain_value().to_owned();
                variables.plain.insert(variable.name.clone(), value);
            }
            let place = own.then_some(process.name.as_str());
            let here = secret_env.iter().filter(|s| s.process.as_deref() == place);
            for secret in here {
                variables.digests.push(secret.digest.clone());
                for name in secret.names.iter().filter(|name| !is_ours(name)) {
                    variables.plain.remove(name);
                    variables.secret.insert(name.clone(), own);
                }
            }
        }
        variables
    }

    /// Whether any value is secret.
    pub fn has_secrets(&self) -> bool {
        !self.digests.is_empty()
    }

    /// The digest that names the environment file. Of secret values only what stands for them goes into it: the
    /// name is in units, which anybody on the node can read.
    pub fn digest(&self, process: &Process) -> Result<EnvDigest, UnitError> {
        let mut content = self.render(process, None)?.to_vec();
        for digest in &self.digests {
            content.extend(format!("\0{digest}").bytes());
        }
        Ok(EnvDigest::of(&content))
    }

    /// The environment file, with the values of `secrets`.
    pub fn content(
        &self,
        process: &Process,
        secrets: &SecretEnvironment,
    ) -> Result<Zeroizing<Vec<u8>>, UnitError> {
        self.render(process, Some(secrets))
    }

    fn render(
        &self,
        process: &Process,
        secrets: Option<&SecretEnvironment>,
    ) -> Result<Zeroizing<Vec<u8>>, UnitError> {
        let plain = self.plain.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        let mut all: BTreeMap<&str, &str> = plain.collect();
        for (name, own) in self.secret.iter().filter(|_| secrets.is_some()) {
            let place = own.then_some(process.name.as_str());
            let value = secrets.and_then(|secrets| secrets.get(place, name));
            let value = value.and_then(|value| std::str::from_utf8(value.expose()).ok());
            let value = value.ok_or_else(|| UnitError::SecretMissing {
                process: process.name.clone(),
                name: name.clone(),
            })?;
            all.insert(name, value);
        }
        quote::environment_file(all)
            .map(Zeroizing::new)
            .map_err(|source| UnitError::Quote {
                place: format!("process {}: env", process.name),
                source,
            })
    }
}

/// What a service unit is made of.
#[derive(Debug, Clone, Copy)]
pub struct ServiceSpec<'a> {
    /// The app.
    pub app: &'a AppName,
    /// The process.
    pub process: &'a Process,
    /// [`ProcessVariables::plain`], for `$(NAME)`.
    pub variables: &'a BTreeMap<String, String>,
    /// The file of [`ProcessVariables::content`].
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
        env_file,
        directory,
        commit: _,
        node: _,
        tree: _,
        state: _,
        user: _,
        tool_path: _,
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
        Setting::new("SyslogIdentifier", Value::Text(process.name.clone())),
        Setting::new("Restart", Value::Text("always".to_owned())),
        Setting::new("RestartSec", Value::Seconds(1)),
        Setting::new("TimeoutStartSec", Value::Seconds(start_seconds(process))),
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
    settings.extend(surroundings(spec)?);

    let port_text = port.map(|port| port.to_string()).unwrap_or_default();
    let assignments = assignments(spec, &port_text);

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

/// Who runs where, with what in sight and how much: of a process and of the commands that probe it.
fn surroundings(spec: &ServiceSpec<'_>) -> Result<Vec<Setting>, UnitError> {
    let process = spec.process;
    let path = |path: &Path| {
        quote::plain_path(path)
            .map(str::to_owned)
            .map_err(|source| UnitError::Quote {
                place: format!("process {}", process.name),
                source,
            })
    };
    let mut settings = vec![
        Setting::new("User", Value::Text(spec.user.to_owned())),
        Setting::new("WorkingDirectory", Value::Text(APP_PATH.to_owned())),
        Setting::new(
            "BindReadOnlyPaths",
            Value::Bind(path(spec.tree)?, APP_PATH.to_owned()),
        ),
    ];
    if let Some(state) = spec.state {
        settings.push(Setting::new(
            "BindPaths",
            Value::Bind(path(state)?, STATE_PATH.to_owned()),
        ));
    }
    settings.extend(service_limits(process)?);
    settings.extend(jail::service_jail(process.sandbox.as_ref()));
    Ok(settings)
}

/// All variables that anybody on the node may read.
fn assignments<'a>(spec: &ServiceSpec<'a>, port: &'a str) -> Vec<(&'a str, &'a str)> {
    let mut assignments = vec![("PATH", spec.tool_path), ("LANG", "C.UTF-8")];
    assignments.append(&mut own_variables(
        spec.process,
        spec.commit,
        spec.node,
        spec.app,
        spec.state.is_some(),
    ));
    if let Some(variable) = &spec.process.port {
        assignments.push((&variable.env, port));
    }
    assignments
}

/// A command that probes the service `unit` of `spec`, as properties of a transient unit: as the same
/// user in the same jail, with its environment and its /tmp, ended after `timeout_seconds`.
pub fn probe_properties(
    spec: &ServiceSpec<'_>,
    unit: &str,
    command: &[String],
    timeout_seconds: u32,
) -> Result<Vec<Setting>, UnitError> {
    let place = format!("the probe of process {}", spec.process.name);
    let wrong = |source| UnitError::Quote {
        place: place.clone(),
        source,
    };
    quote::check_program(command).map_err(wrong)?;
    let mut words = vec![
        format!("--chdir={}", in_app(spec.directory)),
        "--".to_owned(),
    ];
    words.extend_from_slice(command);
    let port = spec.port.map(|port| port.to_string()).unwrap_or_default();
    let environment = assignments(spec, &port)
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let text = |text: &str| Value::Text(text.to_owned());

    let mut settings = vec![
        Setting::new("Description", Value::Text(format!("Kari: probe of {unit}"))),
        // Stopped with the service, never the reason for its start.
        Setting::new("PartOf", Value::Words(vec![unit.to_owned()])),
        Setting::new("JoinsNamespaceOf", Value::Words(vec![unit.to_owned()])),
        Setting::new("Type", text("oneshot")),
        // It stays, with its result, until the agent has read it.
        Setting::new("RemainAfterExit", Value::Switch(true)),
        Setting::new("TimeoutStartSec", Value::Seconds(timeout_seconds)),
        // At the deadline it is over.
        Setting::new("KillSignal", Value::Signed(9)),
        Setting::new("TimeoutStopSec", Value::Seconds(1)),
        Setting::new(
            "SyslogIdentifier",
            Value::Text(format!("{}-probe", spec.process.name)),
        ),
        Setting::new("Environment", Value::Environment(environment)),
        Setting::new(
            "EnvironmentFile",
            Value::EnvironmentFile(
                quote::plain_path(spec.env_file)
                    .map(str::to_owned)
                    .map_err(wrong)?,
            ),
        ),
    ];
    settings.extend(surroundings(spec)?);
    settings.push(Setting::new(
        "ExecStart",
        Value::Command(ENV_PROGRAM, quote::exec_arguments(&words).map_err(wrong)?),
    ));
    Ok(settings)
}

/// Seconds in which a service must be executed, or have said READY=1, unless its probe allows another time.
const SERVICE_START_SECONDS: u32 = 90;

/// What is not ready yet has the time that its probe's failures take, whichever way it says that it is.
fn start_seconds(process: &Process) -> u32 {
    match (&process.process_type, &process.readiness_probe) {
        (ProcessType::Notify, Some(probe)) => probe
            .period_seconds
            .saturating_mul(probe.failure_threshold)
            .saturating_add(probe.initial_delay_seconds),
        (ProcessType::Notify, None) | (ProcessType::Simple, _) => SERVICE_START_SECONDS,
    }
}

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

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    use proptest::prelude::*;

    use super::*;
    use crate::api::deployment::ProcessResources;
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
        EnvVar::plain(name, value)
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
            variables: &ProcessVariables::of(env, &[], process).plain,
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
            "SyslogIdentifier=web",
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
        let env = [variable("LOG", "info"), variable("PORT", "1")];
        assert_eq!(
            ProcessVariables::of(&env, &[], &process).plain,
            BTreeMap::from([("LOG".to_owned(), "debug".to_owned())]),
            "what Kari sets is not the user's"
        );
    }

    #[test]
    fn secret_variables_are_in_the_environment_file_alone_and_win_where_they_are_nearer() {
        let process = process(serde_json::json!({
            "name": "web", "command": ["x", "$(A)"],
            "env": [{"name": "A", "value": "own"}, {"name": "C", "value": "own"}],
            "port": {"env": "PORT"},
        }));
        let env = [variable("B", "shared"), variable("D", "shared")];
        let secret = |process: Option<&str>, names: &[&str], digest: &str| SecretVariables {
            process: process.map(str::to_owned),
            names: names.iter().map(|&name| name.to_owned()).collect(),
            digest: digest.to_owned(),
        };
        let secret_env = [
            secret(None, &["A", "PORT", "S"], "d1"),
            secret(Some("other"), &["O"], "d2"),
            secret(Some("web"), &["B"], "d3"),
        ];
        let variables = ProcessVariables::of(&env, &secret_env, &process);
        let plain: Vec<_> = variables.plain.keys().map(String::as_str).collect();
        assert_eq!(plain, ["A", "C", "D"], "B is the process's own secret");
        let mut values = SecretEnvironment::default();
        for (place, name, value) in [
            (None, "A", "hidden by the process's own"),
            (None, "S", "s\"1"),
            (Some("web"), "B", "b1"),
        ] {
            values.insert(place, name, crate::seal::SecretBytes::new(value.into()));
        }
        let content = variables.content(&process, &values).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&content),
            "A=\"own\"\nB=\"b1\"\nC=\"own\"\nD=\"shared\"\nS=\"s\\\"1\"\n"
        );
        let digest = |secret_env: &[SecretVariables]| {
            let variables = ProcessVariables::of(&env, secret_env, &process);
            variables.digest(&process).unwrap()
        };
        let named = digest(&secret_env);
        assert_ne!(
            named,
            EnvDigest::of(&content),
            "the name does not tell the values"
        );
        let mut changed = secret_env.clone();
        changed[1].digest = "d4".to_owned();
        assert_eq!(
            digest(&changed),
            named,
            "another process's secret is not of this one"
        );
        changed[2].digest = "d4".to_owned();
        assert_ne!(digest(&changed), named);
        let none = SecretEnvironment::default();
        let error = variables.content(&process, &none).unwrap_err();
        assert!(matches!(error, UnitError::SecretMissing { .. }), "{error}");
        let without = ProcessVariables::of(&env, &[], &process);
        let content = without.content(&process, &none).unwrap();
        assert_eq!(without.digest(&process).unwrap(), EnvDigest::of(&content));
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
