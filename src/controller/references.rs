//! What the ConfigMaps hold that Deployments refer to: read by name outside reconciling, and put into the
//! environment of a revision.
//!
//! Invariants: one read per Deployment at a time, a bounded number in all, each bounded in time and in what is
//! kept of it; nothing follows from a spec before what it refers to was read for this very spec and request. A
//! read that fails by the API server's fault changes nothing and is made again.
//!
//! [`resolve`] and [`held`] are pure. Deliberately absent: watching and listing ConfigMaps. Whoever reads all of a
//! cluster's configuration to use a few names of it is a risk to the others.

mod schedule;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::api::DeploymentSpec;
use crate::api::deployment::{
    ConfigMapEnvSource, ConfigMapKeySelector, EnvFromSource, EnvVar, EnvVarSource,
};
use crate::api::reasons::Reason;
use crate::api::release::Template;
use crate::runtime::error_chain;
use crate::runtime::serve::Heartbeat;
use crate::runtime::supervise::Trigger;

use super::Key;
use super::check::is_variable_name;
use super::observed::LookupFailure;
pub use schedule::Question;
use schedule::Schedule;

/// Bytes of names and values of all variables of a Deployment: a Release carries them all, and etcd takes 1.5 MiB.
const ENVIRONMENT_LIMIT: usize = 512 * 1024;

/// ConfigMaps that are read at once, for all Deployments: the API server has other things to do.
const SLOTS: usize = 8;

/// How long one ConfigMap may take.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// How often the loop turns at least, for its heartbeat.
const BEAT: Duration = Duration::from_secs(10);

/// What one ConfigMap held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// There is none of this name.
    Absent,
    /// The controller may not read it.
    Forbidden,
    /// What is referred to is more than an environment may be.
    TooLarge,
    /// The keys that are referred to, as far as they are there.
    Held(BTreeMap<String, String>),
}

/// What was read, by the name of the ConfigMap.
pub type Contents = BTreeMap<String, Content>;

/// What is read of a ConfigMap.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Keys {
    All,
    Some(BTreeSet<String>),
}

/// The variables of a Deployment with nothing left to look up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// Of every process.
    pub shared: Vec<EnvVar>,
    /// Of the build.
    pub build: Vec<EnvVar>,
    /// Of each process, by its name.
    pub processes: BTreeMap<String, Vec<EnvVar>>,
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

/// The ConfigMaps that a spec refers to, and which keys of them.
fn wanted(spec: &DeploymentSpec) -> BTreeMap<String, Keys> {
    let mut wanted: BTreeMap<String, Keys> = BTreeMap::new();
    for selector in variables(spec).filter_map(key_reference) {
        let keys = wanted
            .entry(selector.name.clone())
            .or_insert_with(|| Keys::Some(BTreeSet::new()));
        if let Keys::Some(keys) = keys {
            keys.insert(selector.key.clone());
        }
    }
    for source in spec
        .env_from
        .iter()
        .filter_map(|from| from.config_map_ref.as_ref())
    {
        wanted.insert(source.name.clone(), Keys::All);
    }
    wanted
}

/// How many ConfigMaps a spec refers to.
pub fn count(spec: &DeploymentSpec) -> usize {
    wanted(spec).len()
}

fn variables(spec: &DeploymentSpec) -> impl Iterator<Item = &EnvVar> {
    let build = spec.build.iter().flat_map(|build| &build.env);
    let processes = spec.processes.iter().flat_map(|process| &process.env);
    spec.env.iter().chain(build).chain(processes)
}

fn key_reference(variable: &EnvVar) -> Option<&ConfigMapKeySelector> {
    let EnvVarSource { config_map_key_ref } = variable.value_from.as_ref()?;
    config_map_key_ref.as_ref()
}

/// The environment of a spec, from what its references hold.
///
/// # Errors
/// `ReferenceNotFound`: a ConfigMap or a key that is not optional is not there, or cannot be used.
/// `ReferenceTooLarge`: all together is more than 512 KiB.
pub fn resolve(spec: &DeploymentSpec, contents: &Contents) -> Result<Environment, LookupFailure> {
    let mut shared = imported(&spec.env_from, contents)?;
    let own = plain(&spec.env, "spec.env", contents)?;
    shared.retain(|variable| own.iter().all(|o| o.name != variable.name));
    shared.extend(own);
    let build = spec.build.as_ref().map_or(&[][..], |build| &build.env);
    let environment = Environment {
        shared,
        build: plain(build, "spec.build.env", contents)?,
        processes: spec
            .processes
            .iter()
            .map(|process| {
                let place = format!("spec.processes[{}].env", process.name);
                Ok((process.name.clone(), plain(&process.env, &place, contents)?))
            })
            .collect::<Result<_, LookupFailure>>()?,
    };
    if environment.size() > ENVIRONMENT_LIMIT {
        return Err(too_large());
    }
    Ok(environment)
}

fn too_large() -> LookupFailure {
    LookupFailure {
        reason: Reason::ReferenceTooLarge,
        message: format!(
            "the variables of build and processes are more than {} KiB all together; refer to the keys that are needed, instead of whole ConfigMaps",
            ENVIRONMENT_LIMIT / 1024
        ),
    }
}

fn not_found(message: String) -> LookupFailure {
    LookupFailure {
        reason: Reason::ReferenceNotFound,
        message,
    }
}

/// What a ConfigMap holds; nothing if it is not there and need not be.
fn held_by<'a>(
    name: &str,
    optional: bool,
    place: &str,
    contents: &'a Contents,
) -> Result<Option<&'a BTreeMap<String, String>>, LookupFailure> {
    match contents.get(name) {
        Some(Content::Held(data)) => Ok(Some(data)),
        Some(Content::TooLarge) => Err(too_large()),
        Some(Content::Forbidden) => Err(not_found(format!(
            "{place}: the controller may not read the ConfigMap {name}; its ClusterRole needs get on configmaps"
        ))),
        Some(Content::Absent) | None if optional => Ok(None),
        Some(Content::Absent) | None => Err(not_found(format!(
            "{place}: there is no ConfigMap {name} in the Deployment's namespace; create it, change the name, or set optional"
        ))),
    }
}

/// The variables of `envFrom`, sorted by name; of two of one name, the later object's.
fn imported(sources: &[EnvFromSource], contents: &Contents) -> Result<Vec<EnvVar>, LookupFailure> {
    let mut variables = BTreeMap::new();
    for EnvFromSource {
        config_map_ref,
        prefix,
    } in sources
    {
        let Some(ConfigMapEnvSource { name, optional }) = config_map_ref else {
            continue;
        };
        let data = held_by(name, *optional, "spec.envFrom", contents)?;
        let prefix = prefix.as_deref().unwrap_or_default();
        for (key, value) in data.into_iter().flatten() {
            let variable = format!("{prefix}{key}");
            if is_variable_name(&variable) {
                let value = usable(value, name, key, "spec.envFrom")?;
                variables.insert(variable, value.to_owned());
            }
        }
    }
    Ok(variables
        .into_iter()
        .map(|(name, value)| EnvVar::plain(name, value))
        .collect())
}

/// The variables of an `env`, in its order; those that are optional and not there left out.
fn plain(env: &[EnvVar], place: &str, contents: &Contents) -> Result<Vec<EnvVar>, LookupFailure> {
    let mut variables = Vec::new();
    for variable in env {
        let Some(ConfigMapKeySelector {
            name,
            key,
            optional,
        }) = key_reference(variable)
        else {
            variables.push(EnvVar::plain(&variable.name, variable.plain_value()));
            continue;
        };
        let place = format!("{place}[{}]", variable.name);
        let data = held_by(name, *optional, &place, contents)?;
        match data.and_then(|data| data.get(key)) {
            Some(value) => {
                let value = usable(value, name, key, &place)?;
                variables.push(EnvVar::plain(&variable.name, value));
            }
            None if *optional => {}
            None => {
                return Err(not_found(format!(
                    "{place}: the ConfigMap {name} has no key {key}; add it, change the key, or set optional"
                )));
            }
        }
    }
    Ok(variables)
}

fn usable<'a>(
    value: &'a str,
    name: &str,
    key: &str,
    place: &str,
) -> Result<&'a str, LookupFailure> {
    if value.contains('\0') {
        return Err(not_found(format!(
            "{place}: the key {key} of the ConfigMap {name} holds a NUL, which no variable can; change it"
        )));
    }
    Ok(value)
}

/// The environment of an earlier template, if the spec could have been rendered to it but for what its references
/// held then: what goes on while a reference is not there.
pub fn held(spec: &DeploymentSpec, template: &Template) -> Option<Environment> {
    let environment = Environment::of(template);
    let build = spec.build.as_ref().map_or(&[][..], |build| &build.env);
    let fits = could_be(&spec.env, !spec.env_from.is_empty(), &environment.shared)
        && could_be(build, false, &environment.build)
        && spec.processes.iter().all(|process| {
            let held = environment.processes.get(&process.name);
            held.is_some_and(|held| could_be(&process.env, false, held))
        });
    fits.then_some(environment)
}

fn could_be(env: &[EnvVar], imports: bool, held: &[EnvVar]) -> bool {
    let all_there = env.iter().all(|variable| {
        let found = held.iter().find(|h| h.name == variable.name);
        match (key_reference(variable), found) {
            (None, Some(found)) => found.plain_value() == variable.plain_value(),
            (Some(selector), None) => selector.optional,
            (Some(_), Some(_)) => true,
            (None, None) => false,
        }
    });
    let known = |h: &EnvVar| env.iter().any(|variable| variable.name == h.name);
    all_there && (imports || held.iter().all(known))
}

/// What Deployments refer to. Cheap to clone.
#[derive(Clone)]
pub struct References {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    schedule: Mutex<Schedule<Key>>,
    changed: Notify,
    epoch: Instant,
    wake: Trigger<Key>,
    reads: Family<ReadLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReadLabels {
    result: &'static str,
}

impl References {
    /// None yet. `wake` is told of Deployments whose answer is new.
    pub fn new(client: Client, wake: Trigger<Key>, registry: &mut Registry) -> Self {
        let reads = Family::default();
        registry.register(
            "kari_reference_reads",
            "Reads of ConfigMaps that Deployments refer to, by result",
            reads.clone(),
        );
        Self {
            shared: Arc::new(Shared {
                client,
                schedule: Mutex::new(Schedule::default()),
                changed: Notify::new(),
                epoch: Instant::now(),
                wake,
                reads,
            }),
        }
    }

    /// What the Deployment's references hold; nothing while that is being read for this question. Never waits.
    pub fn want(&self, key: &Key, question: Question) -> Option<Contents> {
        if wanted(&question.spec).is_empty() {
            self.forget(key);
            return Some(Contents::new());
        }
        let now = self.shared.epoch.elapsed();
        let (contents, hastened) = self.shared.schedule().want(key, question, now);
        if hastened {
            self.shared.changed.notify_one();
        }
        contents
    }

    /// The Deployment is gone, or refers to nothing.
    pub fn forget(&self, key: &Key) {
        self.shared.schedule().forget(key);
    }

    /// Reads what is due until `shutdown`.
    pub async fn run(&self, heartbeat: Heartbeat, shutdown: CancellationToken) {
        let mut running = JoinSet::new();
        loop {
            heartbeat.beat();
            let now = self.shared.epoch.elapsed();
            let free = SLOTS.saturating_sub(running.len());
            for (key, question) in self.shared.schedule().start(now, free) {
                running.spawn(self.clone().read(key, question));
            }
            let next = self.shared.schedule().next_due();
            let sleep = match next {
                Some(next) if running.len() < SLOTS => next.saturating_sub(now).min(BEAT),
                Some(_) | None => BEAT,
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(_) = running.join_next() => {}
                () = self.shared.changed.notified() => {}
                () = tokio::time::sleep(sleep) => {}
            }
        }
        running.shutdown().await;
        heartbeat.retire();
    }

    async fn read(self, key: Key, question: Question) {
        let contents = self.read_all(&key, &question.spec).await;
        let resolved = contents
            .as_ref()
            .map(|contents| resolve(&question.spec, contents));
        if let Some(Err(failure)) = &resolved {
            info!(%key, reason = %failure.reason, "{failure}");
        }
        let complete = matches!(resolved, Some(Ok(_)));
        let now = self.shared.epoch.elapsed();
        let jitter = fastrand::f64();
        let news = self
            .shared
            .schedule()
            .answer(&key, question, contents, complete, now, jitter);
        if news {
            self.shared.wake.wake(key);
        }
        self.shared.changed.notify_one();
    }

    /// Nothing if the API server did not answer one of the reads.
    async fn read_all(&self, key: &Key, spec: &DeploymentSpec) -> Option<Contents> {
        let api: Api<ConfigMap> = Api::namespaced(self.shared.client.clone(), &key.namespace);
        let mut contents = Contents::new();
        let mut size = 0;
        for (name, keys) in wanted(spec) {
            let read = tokio::time::timeout(TIME_LIMIT, api.get_opt(&name)).await;
            let (result, content) = match read {
                Ok(Ok(Some(object))) => {
                    let mut data = object.data.unwrap_or_default();
                    if let Keys::Some(keys) = &keys {
                        data.retain(|key, _| keys.contains(key));
                    }
                    size += data.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
                    if size > ENVIRONMENT_LIMIT {
                        ("Found", Some(Content::TooLarge))
                    } else {
                        ("Found", Some(Content::Held(data)))
                    }
                }
                Ok(Ok(None)) => ("NotFound", Some(Content::Absent)),
                Ok(Err(kube::Error::Api(status))) if status.code == 403 => {
                    ("Forbidden", Some(Content::Forbidden))
                }
                Ok(Err(error)) => {
                    debug!(%key, name, "a ConfigMap was not read: {}", error_chain(&error));
                    ("Failed", None)
                }
                Err(_) => ("Failed", None),
            };
            self.shared
                .reads
                .get_or_create(&ReadLabels { result })
                .inc();
            contents.insert(name, content?);
        }
        Some(contents)
    }
}

impl Shared {
    fn schedule(&self) -> MutexGuard<'_, Schedule<Key>> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::testing::deployment_spec;
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
        maps.into_iter()
            .map(|(name, data)| (name, Content::Held(data)))
            .collect()
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
        let large = contents(json!({"shop": {"level": "x".repeat(ENVIRONMENT_LIMIT)}}));
        let one = |content| Contents::from([("shop".to_owned(), content)]);
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

    #[test]
    fn only_what_is_referred_to_is_read() {
        let spec = spec(json!({
            "/envFrom": [{"configMapRef": {"name": "whole"}}],
            "/env": [reference("A", "a", true), reference("B", "b", false)],
            "/build/env": [reference("C", "c", false)],
        }));
        let keys = ["a", "b", "c"].map(str::to_owned).into();
        assert_eq!(
            wanted(&spec),
            [
                ("whole".to_owned(), Keys::All),
                ("shop".to_owned(), Keys::Some(keys))
            ]
            .into()
        );
        assert_eq!(count(&deployment_spec()), 0);
    }
}
