//! What a schema cannot say about a spec, checked before anything follows from it. Pure.

use std::collections::BTreeMap;

use crate::api::DeploymentSpec;
use crate::api::deployment::{EnvVar, GitSource, Process, ResourceLimits};
use crate::api::reasons::Reason;

use super::references::{self, KeyReference, Kind};
use super::source::range::Range;

/// Why a spec cannot be carried out, and what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// `InvalidSpec` or `PolicyDenied`.
    pub reason: Reason,
    /// What to change.
    pub message: String,
}

/// The least memory that a service is limited to, as the schema's description says.
const LEAST_MEMORY_BYTES: u64 = 4 * 1024 * 1024;

/// ConfigMaps and Secrets that one Deployment refers to: each is a request to the API server at every look.
const MOST_OBJECTS: usize = 32;

/// The source of a spec that can be carried out.
///
/// Refused are a spec without a source, a range of versions or quantities that cannot be read, references to too many
/// objects, a command that names a variable which the process may not have (`InvalidSpec`), and an insecure scheme where the administrator does not
/// allow it (`PolicyDenied`).
pub fn check(spec: &DeploymentSpec, insecure_source_schemes: bool) -> Result<&GitSource, Refusal> {
    let invalid = |message: String| Refusal {
        reason: Reason::InvalidSpec,
        message,
    };
    let source = spec
        .source
        .git
        .as_ref()
        .ok_or_else(|| invalid("spec.source: set git".to_owned()))?;
    let insecure = ["http://", "git://"]
        .into_iter()
        .find(|scheme| source.url.starts_with(scheme));
    if let Some(scheme) = insecure.filter(|_| !insecure_source_schemes) {
        return Err(Refusal {
            reason: Reason::PolicyDenied,
            message: format!(
                "spec.source.git.url: {scheme} is not allowed here; use https:// or ssh://, or have the administrator start the controller with --insecure-source-schemes"
            ),
        });
    }
    if let Some(range) = source.reference.as_ref().and_then(|r| r.semver.as_deref()) {
        Range::parse(range).map_err(|e| invalid(format!("spec.source.git.ref.semver: {e}")))?;
    }
    if references::count(spec) > MOST_OBJECTS {
        return Err(invalid(format!(
            "env and envFrom refer to more than {MOST_OBJECTS} ConfigMaps and Secrets; put what belongs together into one"
        )));
    }
    let mut of_build = spec.build.iter().flat_map(|build| &build.env);
    if let Some(variable) = of_build.find(|variable| is_secret(variable)) {
        return Err(invalid(format!(
            "spec.build.env[{}]: a build gets no Secrets; use a plain value or configMapKeyRef",
            variable.name
        )));
    }
    let build_limits = spec
        .build
        .as_ref()
        .and_then(|build| build.resources.as_ref())
        .and_then(|resources| resources.limits.as_ref());
    check_limits(build_limits).map_err(|m| invalid(format!("spec.build.resources.limits.{m}")))?;
    check_certificates(spec).map_err(invalid)?;
    for process in &spec.processes {
        check_process(process, spec)
            .map_err(|m| invalid(format!("spec.processes[{}].{m}", process.name)))?;
    }
    Ok(source)
}

/// What an admission policy says against a spec that is there already is a refusal like any other.
pub fn check_policies(denied: Option<&str>) -> Result<(), Refusal> {
    match denied {
        None => Ok(()),
        Some(message) => Err(Refusal {
            reason: Reason::PolicyDenied,
            message: message.to_owned(),
        }),
    }
}

/// A host is served with one certificate, whichever process has a path of it.
fn check_certificates(spec: &DeploymentSpec) -> Result<(), String> {
    let mut certificates = BTreeMap::new();
    for process in &spec.processes {
        let Some(route) = &process.route else {
            continue;
        };
        let Some(tls) = &route.tls else { continue };
        for host in &route.hosts {
            let other = certificates.insert(host, &tls.secret_name);
            if other.is_some_and(|other| *other != tls.secret_name) {
                return Err(format!(
                    "spec.processes[{}].route.tls: another process serves {host} with another Secret; a host has one",
                    process.name
                ));
            }
        }
    }
    Ok(())
}

fn check_limits(limits: Option<&ResourceLimits>) -> Result<(), String> {
    let Some(ResourceLimits {
        cpu,
        memory,
        tasks: _,
    }) = limits
    else {
        return Ok(());
    };
    if let Some(cpu) = cpu {
        cpu.millis().map_err(|e| format!("cpu: {e}"))?;
    }
    if let Some(memory) = memory {
        let bytes = memory.bytes().map_err(|e| format!("memory: {e}"))?;
        if bytes < LEAST_MEMORY_BYTES {
            return Err("memory: must be at least 4Mi".to_owned());
        }
    }
    Ok(())
}

fn check_process(process: &Process, spec: &DeploymentSpec) -> Result<(), String> {
    let limits = process.resources.as_ref().and_then(|r| r.limits.as_ref());
    check_limits(limits).map_err(|m| format!("resources.limits.{m}"))?;
    for word in &process.command {
        for name in named_variables(word) {
            let is_port = process.port.as_ref().is_some_and(|port| port.env == name);
            let mut variables = process.env.iter().chain(&spec.env);
            let variable = variables.find(|variable| variable.name == name);
            if !is_port && variable.is_some_and(is_secret) {
                return Err(format!(
                    "command: $({name}) is the value of a Secret, and command lines are public: have the process read its environment instead"
                ));
            }
            let sure = |variable: &EnvVar| {
                let optional = KeyReference::of(variable).is_some_and(|r| r.optional);
                variable.name == name && !optional && !is_secret(variable)
            };
            let known = is_port || process.env.iter().chain(&spec.env).any(sure);
            if !known {
                return Err(format!(
                    "command: $({name}) is not a variable of this process that is sure to be set; set it in env (envFrom and optional references do not count), or write $$({name}) for the text itself"
                ));
            }
        }
    }
    Ok(())
}

fn is_secret(variable: &EnvVar) -> bool {
    KeyReference::of(variable).is_some_and(|reference| reference.kind == Kind::Secret)
}

/// The names that `$(NAME)` in a word of a command stands for; `$$(NAME)` is the text itself, as in core/v1.
fn named_variables(word: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut rest = word;
    while let Some(at) = rest.find('$') {
        let after = &rest[at + 1..];
        if let Some(escaped) = after.strip_prefix('$') {
            rest = escaped;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|n| n.split_once(')')) {
            if is_variable_name(name) {
                names.push(name);
            }
            rest = tail;
        } else {
            rest = after;
        }
    }
    names
}

/// Whether a variable can have this name.
pub fn is_variable_name(text: &str) -> bool {
    !text.starts_with(|c: char| c.is_ascii_digit())
        && !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::testing::deployment_spec;
    use serde_json::json;

    #[test]
    fn a_spec_that_cannot_be_carried_out_says_what_to_change() {
        for (case, pointer, value, reason, says) in [
            (
                "insecure scheme",
                "/source/git/url",
                json!("http://a.example/x"),
                Reason::PolicyDenied,
                "https://",
            ),
            (
                "git scheme",
                "/source/git/url",
                json!("git://a.example/x"),
                Reason::PolicyDenied,
                "git://",
            ),
            (
                "unknown variable",
                "/processes/0/command",
                json!(["x", "--at=$(NOPE)"]),
                Reason::InvalidSpec,
                "processes[web].command: $(NOPE)",
            ),
            (
                "a variable that may be absent",
                "/env",
                json!([{"name": "LOG", "valueFrom": {"configMapKeyRef": {"name": "a", "key": "b", "optional": true}}}]),
                Reason::InvalidSpec,
                "processes[web].command: $(LOG)",
            ),
            (
                "a variable of a Secret",
                "/env",
                json!([{"name": "LOG", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]),
                Reason::InvalidSpec,
                "$(LOG) is the value of a Secret",
            ),
            (
                "a Secret of the process before a plain one",
                "/processes/0/env",
                json!([{"name": "LOG", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b", "optional": true}}}]),
                Reason::InvalidSpec,
                "$(LOG) is the value of a Secret",
            ),
            (
                "a Secret for the build",
                "/build/env",
                json!([{"name": "A", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]),
                Reason::InvalidSpec,
                "spec.build.env[A]: a build gets no Secrets",
            ),
            (
                "no range",
                "/source/git/ref",
                json!({"semver": "latest"}),
                Reason::InvalidSpec,
                "spec.source.git.ref.semver: \"latest\" is not a range",
            ),
            (
                "many objects",
                "/envFrom",
                (0..33)
                    .map(|n| json!({"configMapRef": {"name": format!("c{n}")}}))
                    .collect(),
                Reason::InvalidSpec,
                "more than 32 ConfigMaps",
            ),
            (
                "little memory",
                "/processes/0/resources",
                json!({"limits": {"memory": "1Mi"}}),
                Reason::InvalidSpec,
                "at least 4Mi",
            ),
            (
                "no source",
                "/source",
                json!({}),
                Reason::InvalidSpec,
                "spec.source",
            ),
        ] {
            let mut spec = serde_json::to_value(deployment_spec()).unwrap_or_default();
            let (parent, key) = pointer.rsplit_once('/').unwrap_or_default();
            let parent = spec.pointer_mut(parent).and_then(|p| p.as_object_mut());
            parent
                .unwrap_or_else(|| panic!("{case}"))
                .insert(key.to_owned(), value);
            let spec: DeploymentSpec =
                serde_json::from_value(spec).unwrap_or_else(|e| panic!("{case}: {e}"));
            let refusal = check(&spec, false)
                .err()
                .unwrap_or_else(|| panic!("{case}: taken"));
            assert_eq!(refusal.reason, reason, "{case}");
            assert!(refusal.message.contains(says), "{case}: {refusal}");
            if reason == Reason::PolicyDenied {
                assert!(
                    check(&spec, true).is_ok(),
                    "{case}: refused although allowed"
                );
            }
        }
    }

    #[test]
    fn variables_of_a_command_are_found_as_core_v1_spells_them() {
        assert_eq!(named_variables("a$(B)c$(D)"), ["B", "D"]);
        assert_eq!(
            named_variables("$$(B) $ $(not a name) $(C"),
            Vec::<&str>::new()
        );
        assert_eq!(named_variables("$$$(B)"), ["B"]);
    }
}
