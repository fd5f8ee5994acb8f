//! From what the references of a spec hold to the environment of its revision. Pure.
//!
//! Invariant: what came from a Secret is in [`Environment::secret`] by digest and in [`Environment::sealed`] by
//! value, and in no plain variable.

use std::collections::{BTreeMap, BTreeSet};

use super::{Content, Contents, ENVIRONMENT_LIMIT, KeyReference, Kind, Object, WholeReference};
use crate::api::DeploymentSpec;
use crate::api::deployment::{EnvFromSource, EnvVar};
use crate::api::reasons::Reason;
use crate::api::release::{SecretVariables, Template};
use crate::controller::check::is_variable_name;
use crate::controller::observed::LookupFailure;
use crate::seal::SecretBytes;
use crate::seal::environment::SecretEnvironment;

use super::digests::DIGEST_KEY_SECRET;

/// The variables of a Deployment with nothing left to look up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// Of every process.
    pub shared: Vec<EnvVar>,
    /// Of the build.
    pub build: Vec<EnvVar>,
    /// Of each process, by its name.
    pub processes: BTreeMap<String, Vec<EnvVar>>,
    /// What the template says of those whose values are secret.
    pub secret: Vec<SecretVariables>,
    /// Their values, as they are sealed; nothing where there are none, or where the values of an earlier
    /// revision are not known any more.
    pub sealed: Option<SecretBytes>,
}

impl Environment {
    /// The one that was rendered into a template.
    fn of(template: &Template) -> Self {
        Self {
            shared: template.env.clone(),
            build: template
                .build
                .as_ref()
                .map_or_else(Vec::new, |build| build.env.clone()),
            processes: template
                .processes
                .iter()
                .map(|process| (process.name.clone(), process.env.clone()))
                .collect(),
            secret: template.secret_env.clone(),
            sealed: None,
        }
    }

    fn size(&self) -> usize {
        self.shared
            .iter()
            .chain(&self.build)
            .chain(self.processes.values().flatten())
            .map(|variable| variable.name.len() + variable.plain_value().len())
            .sum()
    }
}

/// The environment of a spec, from what its references hold.
///
/// # Errors
/// `ReferenceNotFound`: an object or a key that is not optional is not there, or cannot be used.
/// `ReferenceTooLarge`: all together is more than 512 KiB.
pub fn resolve(spec: &DeploymentSpec, contents: &Contents) -> Result<Environment, LookupFailure> {
    let mut secret = SecretEnvironment::default();
    let mut shared = imported(&spec.env_from, contents)?;
    let own = listed(&spec.env, "spec.env", contents)?;
    shared.retain(|(name, _)| own.iter().all(|(o, _)| o != name));
    shared.extend(own);
    let build = spec.build.as_ref().map_or(&[][..], |build| &build.env);
    let mut processes = BTreeMap::new();
    for process in &spec.processes {
        let place = format!("spec.processes[{}].env", process.name);
        let variables = listed(&process.env, &place, contents)?;
        let plain = part(variables, Some(&process.name), &mut secret);
        processes.insert(process.name.clone(), plain);
    }
    // What the schema refuses as well: a build has no secrets.
    let mut of_build = SecretEnvironment::default();
    let mut environment = Environment {
        shared: part(shared, None, &mut secret),
        build: part(
            listed(build, "spec.build.env", contents)?,
            None,
            &mut of_build,
        ),
        processes,
        secret: Vec::new(),
        sealed: None,
    };
    if environment.size() + secret.size() > ENVIRONMENT_LIMIT {
        return Err(too_large());
    }
    if !secret.is_empty() {
        let Some(digests) = &contents.digests else {
            return Err(without_digests());
        };
        environment.secret =
            secret.summary(|process, bytes| digests.digest(&["Env", process], bytes));
        environment.sealed = Some(secret.to_bytes());
    }
    Ok(environment)
}

/// A variable's value, and whether anybody may know it.
enum Value {
    Plain(String),
    Secret(SecretBytes),
}

/// Parts what anybody may know, which is returned, from what goes into `secret`.
fn part(
    variables: Vec<(String, Value)>,
    process: Option<&str>,
    secret: &mut SecretEnvironment,
) -> Vec<EnvVar> {
    let mut plain = Vec::new();
    for (name, value) in variables {
        match value {
            Value::Plain(value) => plain.push(EnvVar::plain(name, value)),
            Value::Secret(value) => secret.insert(process, &name, value),
        }
    }
    plain
}

/// Secrets are referred to, and there is nothing that could stand for them.
pub(super) fn without_digests() -> LookupFailure {
    not_found(format!(
        "the controller cannot use the Secret {DIGEST_KEY_SECRET} of its own namespace, without which no Secret is used: its Role needs get and create on secrets there; the controller's log says more"
    ))
}

pub(super) fn too_large() -> LookupFailure {
    LookupFailure {
        reason: Reason::ReferenceTooLarge,
        message: format!(
            "the variables of build and processes are more than {} KiB all together; refer to the keys that are needed, instead of whole ConfigMaps and Secrets",
            ENVIRONMENT_LIMIT / 1024
        ),
    }
}

pub(super) fn not_found(message: String) -> LookupFailure {
    LookupFailure {
        reason: Reason::ReferenceNotFound,
        message,
    }
}

/// What an object holds; nothing if it is not there and need not be. `place` says who refers to it.
///
/// # Errors
/// `ReferenceNotFound` or `ReferenceTooLarge`.
pub fn held_by<'a>(
    object: &Object,
    optional: bool,
    place: &str,
    contents: &'a Contents,
) -> Result<Option<&'a BTreeMap<String, SecretBytes>>, LookupFailure> {
    match contents.objects.get(object) {
        Some(Content::Held(data)) => Ok(Some(data)),
        Some(Content::TooLarge) => Err(too_large()),
        Some(Content::Forbidden) => {
            let resource = match object.kind {
                Kind::ConfigMap => "configmaps",
                Kind::Secret => "secrets",
            };
            Err(not_found(format!(
                "{place}: the controller may not read the {object}; its ClusterRole, or a Role in this namespace, needs get on {resource}"
            )))
        }
        Some(Content::Absent) | None if optional => Ok(None),
        Some(Content::Absent) | None => Err(not_found(format!(
            "{place}: there is no {object} in the Deployment's namespace; create it, change the name, or set optional"
        ))),
    }
}

/// The variables of `envFrom`, sorted by name; of two of one name, the later object's.
fn imported(
    sources: &[EnvFromSource],
    contents: &Contents,
) -> Result<Vec<(String, Value)>, LookupFailure> {
    let mut variables = BTreeMap::new();
    for source in sources {
        let Some(reference) = WholeReference::of(source) else {
            continue;
        };
        let object = reference.object();
        let data = held_by(&object, reference.optional, "spec.envFrom", contents)?;
        let prefix = source.prefix.as_deref().unwrap_or_default();
        for (key, value) in data.into_iter().flatten() {
            let variable = format!("{prefix}{key}");
            if is_variable_name(&variable) {
                let value = usable(value, &object, key, "spec.envFrom")?;
                variables.insert(variable, value);
            }
        }
    }
    Ok(variables.into_iter().collect())
}

/// The variables of an `env`, in its order; those that are optional and not there left out.
fn listed(
    env: &[EnvVar],
    place: &str,
    contents: &Contents,
) -> Result<Vec<(String, Value)>, LookupFailure> {
    let mut variables = Vec::new();
    for variable in env {
        let name = variable.name.clone();
        let Some(reference) = KeyReference::of(variable) else {
            variables.push((name, Value::Plain(variable.plain_value().to_owned())));
            continue;
        };
        let place = format!("{place}[{name}]");
        let (object, key) = (reference.object(), reference.key);
        let data = held_by(&object, reference.optional, &place, contents)?;
        match data.and_then(|data| data.get(key)) {
            Some(value) => variables.push((name, usable(value, &object, key, &place)?)),
            None if reference.optional => {}
            None => {
                return Err(not_found(format!(
                    "{place}: the {object} has no key {key}; add it, change the key, or set optional"
                )));
            }
        }
    }
    Ok(variables)
}

/// Bytes of a variable's value at most: Linux gives no program one of 128 KiB with its name.
const LONGEST_VALUE: usize = 127 * 1024;

fn usable(
    value: &SecretBytes,
    object: &Object,
    key: &str,
    place: &str,
) -> Result<Value, LookupFailure> {
    let refused = |why: &str| {
        Err(not_found(format!(
            "{place}: the key {key} of the {object} {why}; change it"
        )))
    };
    let Ok(text) = std::str::from_utf8(value.expose()) else {
        return refused("is not UTF-8, which every variable must be");
    };
    if text.contains('\0') {
        return refused("holds a NUL, which no variable can");
    }
    if text.len() > LONGEST_VALUE {
        return Err(LookupFailure {
            reason: Reason::ReferenceTooLarge,
            message: format!(
                "{place}: the key {key} of the {object} is longer than the 127 KiB that Linux lets a variable have; have the process read a file instead"
            ),
        });
    }
    Ok(match object.kind {
        Kind::ConfigMap => Value::Plain(text.to_owned()),
        Kind::Secret => Value::Secret(value.clone()),
    })
}

/// The environment of an earlier template, if the spec could have been rendered to it but for what its references
/// held then: what goes on while a reference is not there.
pub fn held(spec: &DeploymentSpec, template: &Template) -> Option<Environment> {
    let environment = Environment::of(template);
    let build = spec.build.as_ref().map_or(&[][..], |build| &build.env);
    let secret = |process: Option<&str>| -> BTreeSet<&str> {
        let found = template
            .secret_env
            .iter()
            .filter(|s| s.process.as_deref() == process);
        found.flat_map(|s| &s.names).map(String::as_str).collect()
    };
    let fits = could_be(
        &spec.env,
        !spec.env_from.is_empty(),
        &environment.shared,
        &secret(None),
    ) && could_be(build, false, &environment.build, &BTreeSet::new())
        && spec.processes.iter().all(|process| {
            let held = environment.processes.get(&process.name);
            let secret = secret(Some(&process.name));
            held.is_some_and(|held| could_be(&process.env, false, held, &secret))
        });
    fits.then_some(environment)
}

fn could_be(env: &[EnvVar], imports: bool, held: &[EnvVar], secret: &BTreeSet<&str>) -> bool {
    let all_there = env.iter().all(|variable| {
        let name = variable.name.as_str();
        let plain = held.iter().find(|h| h.name == name);
        match (KeyReference::of(variable), plain) {
            (None, Some(found)) => found.plain_value() == variable.plain_value(),
            (None, None) => false,
            (Some(reference), found) => match reference.kind {
                Kind::ConfigMap => found.is_some() || reference.optional,
                Kind::Secret => secret.contains(name) || (found.is_none() && reference.optional),
            },
        }
    });
    let known = |name: &str| env.iter().any(|variable| variable.name == name);
    let names = held.iter().map(|h| h.name.as_str());
    all_there && (imports || names.chain(secret.iter().copied()).all(known))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::references::digests::Digests;
    use crate::controller::testing::deployment_spec;
    use crate::seal::DigestKey;
    use serde_json::json;

    fn spec(change: serde_json::Value) -> DeploymentSpec {
        let mut spec = serde_json::to_value(deployment_spec()).unwrap_or_default();
        for (pointer, value) in change.as_object().into_iter().flatten() {
            let (parent, key) = pointer.rsplit_once('/').unwrap_or_default();
            let parent = spec.pointer_mut(parent).and_then(|p| p.as_object_mut());
            parent
                .unwrap_or_else(|| panic!("{pointer}"))
                .insert(key.to_owned(), value.clone());
        }
        serde_json::from_value(spec).unwrap_or_else(|e| panic!("{e}"))
    }

    fn reference(name: &str, key: &str, optional: bool) -> serde_json::Value {
        json!({"name": name, "valueFrom": {"configMapKeyRef": {"name": "shop", "key": key, "optional": optional}}})
    }

    fn contents(maps: serde_json::Value) -> Contents {
        let maps: BTreeMap<String, BTreeMap<String, String>> =
            serde_json::from_value(maps).unwrap_or_else(|e| panic!("{e}"));
        let held = |(name, data): (String, BTreeMap<String, String>)| {
            let bytes =
                |(key, value): (String, String)| (key, SecretBytes::new(value.into_bytes()));
            let data = data.into_iter().map(bytes).collect();
            (Object::config_map(name), Content::Held(data))
        };
        Contents {
            objects: maps.into_iter().map(held).collect(),
            digests: None,
        }
    }

    fn pairs(env: &[EnvVar]) -> Vec<(&str, &str)> {
        env.iter()
            .map(|v| (v.name.as_str(), v.plain_value()))
            .collect()
    }

    #[test]
    fn an_environment_is_imported_and_overridden_in_the_documented_order() {
        let spec = spec(json!({
            "/envFrom": [
                {"configMapRef": {"name": "first"}},
                {"configMapRef": {"name": "second"}, "prefix": "S_"},
                {"configMapRef": {"name": "third", "optional": true}},
                {"configMapRef": {"name": "shop"}},
            ],
            "/env": [{"name": "LOG", "value": "info"}, reference("LEVEL", "level", false), reference("NONE", "none", true)],
            "/build/env": [reference("LEVEL", "level", false)],
            "/processes/0/env": [reference("LOG", "level", false), {"name": "EMPTY"}],
        }));
        let contents = contents(json!({
            "first": {"A": "1", "B": "1", "LOG": "1", "not.a.name": "1", "9": "1"},
            "second": {"9": "2"},
            "shop": {"B": "3", "level": "high"},
        }));
        let environment = resolve(&spec, &contents).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(
            pairs(&environment.shared),
            [
                ("A", "1"),
                ("B", "3"),
                ("S_9", "2"),
                ("level", "high"),
                ("LOG", "info"),
                ("LEVEL", "high")
            ]
        );
        assert_eq!(pairs(&environment.build), [("LEVEL", "high")]);
        assert_eq!(
            pairs(&environment.processes["web"]),
            [("LOG", "high"), ("EMPTY", "")]
        );
    }

    #[test]
    fn what_is_not_there_is_named_with_what_to_do() {
        let by_key = spec(json!({"/processes/0/env": [reference("LEVEL", "level", false)]}));
        let whole = spec(json!({"/envFrom": [{"configMapRef": {"name": "shop"}}]}));
        let many: BTreeMap<_, _> = (0..5)
            .map(|n| (format!("V{n}"), "x".repeat(LONGEST_VALUE)))
            .collect();
        let large = contents(json!({"shop": many}));
        let long = contents(json!({"shop": {"level": "x".repeat(LONGEST_VALUE + 1)}}));
        let one = |content| Contents {
            objects: BTreeMap::from([(Object::config_map("shop"), content)]),
            digests: None,
        };
        for (case, spec, contents, reason, says) in [
            (
                "no ConfigMap",
                &by_key,
                Contents::new(),
                Reason::ReferenceNotFound,
                "processes[web].env[LEVEL]: there is no ConfigMap shop",
            ),
            (
                "no key",
                &by_key,
                contents(json!({"shop": {}})),
                Reason::ReferenceNotFound,
                "the ConfigMap shop has no key level; add it",
            ),
            (
                "absent",
                &whole,
                one(Content::Absent),
                Reason::ReferenceNotFound,
                "spec.envFrom: there is no ConfigMap shop",
            ),
            (
                "forbidden",
                &whole,
                one(Content::Forbidden),
                Reason::ReferenceNotFound,
                "get on configmaps",
            ),
            (
                "NUL",
                &by_key,
                contents(json!({"shop": {"level": "a\u{0}"}})),
                Reason::ReferenceNotFound,
                "NUL",
            ),
            ("long", &by_key, long, Reason::ReferenceTooLarge, "127 KiB"),
            ("large", &whole, large, Reason::ReferenceTooLarge, "512 KiB"),
            (
                "larger than is kept",
                &whole,
                one(Content::TooLarge),
                Reason::ReferenceTooLarge,
                "512 KiB",
            ),
        ] {
            let failure = resolve(spec, &contents)
                .err()
                .unwrap_or_else(|| panic!("{case}: resolved"));
            assert_eq!(failure.reason, reason, "{case}");
            assert!(failure.message.contains(says), "{case}: {failure}");
            assert!(failure.reason.needs_a_person(), "{case}");
        }
    }

    fn secret(name: &str, key: &str, optional: bool) -> serde_json::Value {
        json!({"name": name, "valueFrom": {"secretKeyRef": {"name": "shop", "key": key, "optional": optional}}})
    }

    /// The ConfigMaps and Secrets of one name, with one key of digests.
    fn with_secrets(config_maps: serde_json::Value, secrets: serde_json::Value) -> Contents {
        let mut all = contents(config_maps);
        for (object, content) in contents(secrets).objects {
            all.objects.insert(Object::secret(object.name), content);
        }
        let key = DigestKey::from_bytes(vec![7; 32]).unwrap_or_else(|| panic!("32 bytes"));
        all.digests = Some(Digests::new(key, "web", "shop"));
        all
    }

    #[test]
    fn what_comes_from_a_secret_is_sealed_and_never_plain() {
        let spec = spec(json!({
            "/envFrom": [
                {"configMapRef": {"name": "shop"}},
                {"secretRef": {"name": "whole"}, "prefix": "S_"},
                {"secretRef": {"name": "none", "optional": true}},
            ],
            "/env": [secret("DB", "url", false), secret("NONE", "none", true), {"name": "S_B", "value": "plain"}],
            "/processes/0/env": [secret("LOG", "url", false)],
        }));
        let resolved = |url: &str| {
            let contents = with_secrets(
                json!({"shop": {"DB": "hidden by env", "C": "1"}}),
                json!({"shop": {"url": url}, "whole": {"A": "a1", "B": "b1", "not.a.name": "x"}}),
            );
            resolve(&spec, &contents).unwrap_or_else(|e| panic!("{e}"))
        };
        let environment = resolved("postgres://secret");
        assert_eq!(pairs(&environment.shared), [("C", "1"), ("S_B", "plain")]);
        assert_eq!(pairs(&environment.processes["web"]), []);
        let names: Vec<_> = environment
            .secret
            .iter()
            .map(|s| (s.process.as_deref(), s.names.join(" ")))
            .collect();
        assert_eq!(
            names,
            [(None, "DB S_A".to_owned()), (Some("web"), "LOG".to_owned())]
        );
        let sealed = environment
            .sealed
            .clone()
            .unwrap_or_else(|| panic!("sealed"));
        let opened = SecretEnvironment::from_bytes(&sealed).unwrap_or_else(|e| panic!("{e}"));
        let values: Vec<_> = opened
            .of(None)
            .chain(opened.of(Some("web")))
            .map(|(name, value)| (name, String::from_utf8_lossy(value.expose()).into_owned()))
            .collect();
        assert_eq!(
            values,
            [
                ("DB", "postgres://secret".to_owned()),
                ("S_A", "a1".to_owned()),
                ("LOG", "postgres://secret".to_owned())
            ]
        );
        assert!(
            !format!("{environment:?}").contains("postgres"),
            "not shown"
        );
        assert_eq!(resolved("postgres://secret"), environment);
        let other = resolved("postgres://other");
        assert_ne!(other.secret[0].digest, environment.secret[0].digest);
        assert_ne!(other.secret[1].digest, environment.secret[1].digest);
    }

    #[test]
    fn a_secret_that_cannot_be_used_says_which_and_what_to_do() {
        let by_key = spec(json!({"/env": [secret("DB", "url", false)]}));
        let held = |value: &[u8]| {
            let mut contents = with_secrets(json!({}), json!({"shop": {"url": ""}}));
            let data = [("url".to_owned(), SecretBytes::new(value.to_vec()))].into();
            contents
                .objects
                .insert(Object::secret("shop"), Content::Held(data));
            contents
        };
        let mut without_key = held(b"x");
        without_key.digests = None;
        let mut forbidden = held(b"x");
        forbidden
            .objects
            .insert(Object::secret("shop"), Content::Forbidden);
        let absent = with_secrets(json!({"shop": {"url": "a ConfigMap's"}}), json!({}));
        for (case, contents, says) in [
            ("absent", absent, "spec.env[DB]: there is no Secret shop"),
            (
                "no key",
                with_secrets(json!({}), json!({"shop": {}})),
                "the Secret shop has no key url",
            ),
            ("forbidden", forbidden, "needs get on secrets"),
            ("no digest key", without_key, "kari-digest-key"),
            ("binary", held(&[0xff]), "not UTF-8"),
            ("NUL", held(b"a\0b"), "NUL"),
        ] {
            let failure = resolve(&by_key, &contents)
                .err()
                .unwrap_or_else(|| panic!("{case}: resolved"));
            assert_eq!(failure.reason, Reason::ReferenceNotFound, "{case}");
            assert!(failure.message.contains(says), "{case}: {failure}");
        }
        let many: Vec<_> = (0..5)
            .map(|n| secret(&format!("V{n}"), "url", false))
            .collect();
        let failure = resolve(&spec(json!({"/env": many})), &held(&vec![b'x'; 130_000]));
        let reason = failure.map(|_| ()).map_err(|failure| failure.reason);
        assert_eq!(reason, Err(Reason::ReferenceTooLarge), "all together");
    }
}
