//! What the ConfigMaps and Secrets hold that Deployments refer to: read by name outside reconciling.
//!
//! Invariants: one read per Deployment at a time, a bounded number in all, each bounded in time and in what is
//! kept of it; nothing follows from a spec before what it refers to was read for this very spec and request. A
//! read that fails by the API server's fault changes nothing and is made again.
//!
//! [`resolve`] (pure) makes a revision's environment of it, [`credentials`] what sources and routes need, and
//! [`digests`] the keyed digests that stand for secrets.
//! Deliberately absent: watching and listing. Whoever reads all of a cluster's secrets to use a few of them is a
//! risk to the others.

mod credentials;
pub mod digests;
mod resolve;
mod schedule;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
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
use crate::api::deployment::{EnvFromSource, EnvSource, EnvVar, EnvVarSource, KeySelector};
use crate::runtime::error_chain;
use crate::runtime::serve::Heartbeat;
use crate::runtime::supervise::Trigger;
use crate::seal::SecretBytes;

use super::Key;
pub use credentials::{credentials, git_credential, known_credentials};
use digests::{DigestKeys, Digests};
pub use resolve::{Environment, held, resolve};
pub use schedule::Question;
use schedule::Schedule;

/// Bytes of names and values of all variables of a Deployment: a Release carries them all, and etcd takes 1.5 MiB.
/// Also of all that is kept of what one Deployment refers to.
const ENVIRONMENT_LIMIT: usize = 512 * 1024;

/// Objects that are read at once, for all Deployments: the API server has other things to do.
const SLOTS: usize = 8;

/// How long one object may take.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// How often the loop turns at least, for its heartbeat.
const BEAT: Duration = Duration::from_secs(10);

/// A kind that can be referred to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// What anybody who may view the namespace may know.
    ConfigMap,
    /// What only its processes may know.
    Secret,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// An object of the Deployment's namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Object {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: String,
}

impl Object {
    /// A ConfigMap.
    pub fn config_map(name: impl Into<String>) -> Self {
        Self {
            kind: Kind::ConfigMap,
            name: name.into(),
        }
    }

    /// A Secret.
    pub fn secret(name: impl Into<String>) -> Self {
        Self {
            kind: Kind::Secret,
            name: name.into(),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// What one object held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// There is none of this name.
    Absent,
    /// The controller may not read it.
    Forbidden,
    /// What is referred to is more than an environment may be.
    TooLarge,
    /// The keys that are referred to, as far as they are there.
    Held(BTreeMap<String, SecretBytes>),
}

/// What was read for one Deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// By object.
    pub objects: BTreeMap<Object, Content>,
    /// What stands for the secrets among it; there whenever a Secret is referred to and the key could be had.
    pub digests: Option<Digests>,
}

impl Contents {
    /// Of a Deployment that refers to nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// One object's, without secrets.
    #[cfg(test)]
    pub fn of(object: Object, content: Content) -> Self {
        Self {
            objects: BTreeMap::from([(object, content)]),
            digests: None,
        }
    }
}

/// What is read of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Keys {
    All,
    Some(BTreeSet<String>),
}

/// The objects that a spec refers to, and which keys of them.
fn wanted(spec: &DeploymentSpec) -> BTreeMap<Object, Keys> {
    let mut wanted: BTreeMap<Object, Keys> = BTreeMap::new();
    for reference in variables(spec).filter_map(KeyReference::of) {
        let keys = wanted
            .entry(reference.object())
            .or_insert_with(|| Keys::Some(BTreeSet::new()));
        if let Keys::Some(keys) = keys {
            keys.insert(reference.key.to_owned());
        }
    }
    for (purpose, name, _) in credentials::wanted(spec) {
        let keys = wanted
            .entry(Object::secret(name))
            .or_insert_with(|| Keys::Some(BTreeSet::new()));
        if let Keys::Some(keys) = keys {
            keys.extend(
                credentials::keys_of(purpose)
                    .iter()
                    .map(|key| (*key).to_owned()),
            );
        }
    }
    for whole in spec.env_from.iter().filter_map(WholeReference::of) {
        wanted.insert(whole.object(), Keys::All);
    }
    wanted
}

/// How many objects a spec refers to.
pub fn count(spec: &DeploymentSpec) -> usize {
    wanted(spec).len()
}

fn variables(spec: &DeploymentSpec) -> impl Iterator<Item = &EnvVar> {
    let build = spec.build.iter().flat_map(|build| &build.env);
    let processes = spec.processes.iter().flat_map(|process| &process.env);
    spec.env.iter().chain(build).chain(processes)
}

/// Where a variable's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyReference<'a> {
    /// The object's kind.
    pub kind: Kind,
    /// Its name.
    pub name: &'a str,
    /// The key within it.
    pub key: &'a str,
    /// Whether the variable may be left out.
    pub optional: bool,
}

impl<'a> KeyReference<'a> {
    /// Of a variable; nothing for one with a plain value.
    pub fn of(variable: &'a EnvVar) -> Option<Self> {
        let EnvVarSource {
            config_map_key_ref,
            secret_key_ref,
        } = variable.value_from.as_ref()?;
        let config_map = config_map_key_ref.as_ref().map(|s| (Kind::ConfigMap, s));
        let secret = secret_key_ref.as_ref().map(|s| (Kind::Secret, s));
        let (
            kind,
            KeySelector {
                name,
                key,
                optional,
            },
        ) = config_map.or(secret)?;
        Some(Self {
            kind,
            name,
            key,
            optional: *optional,
        })
    }

    fn object(&self) -> Object {
        Object {
            kind: self.kind,
            name: self.name.to_owned(),
        }
    }
}

/// An object whose every key is a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WholeReference<'a> {
    kind: Kind,
    name: &'a str,
    optional: bool,
}

impl<'a> WholeReference<'a> {
    fn of(source: &'a EnvFromSource) -> Option<Self> {
        let EnvFromSource {
            config_map_ref,
            secret_ref,
            prefix: _,
        } = source;
        let config_map = config_map_ref.as_ref().map(|s| (Kind::ConfigMap, s));
        let secret = secret_ref.as_ref().map(|s| (Kind::Secret, s));
        let (kind, EnvSource { name, optional }) = config_map.or(secret)?;
        Some(Self {
            kind,
            name,
            optional: *optional,
        })
    }

    fn object(&self) -> Object {
        Object {
            kind: self.kind,
            name: self.name.to_owned(),
        }
    }
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
    keys: DigestKeys,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReadLabels {
    result: &'static str,
}

impl References {
    /// None yet. `wake` is told of Deployments whose answer is new; the key of digests is kept in `namespace`.
    pub fn new(
        client: Client,
        namespace: &str,
        wake: Trigger<Key>,
        registry: &mut Registry,
    ) -> Self {
        let reads = Family::default();
        registry.register(
            "kari_reference_reads",
            "Reads of ConfigMaps and Secrets that Deployments refer to, by result",
            reads.clone(),
        );
        Self {
            shared: Arc::new(Shared {
                keys: DigestKeys::new(client.clone(), namespace),
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
        let resolved = contents.as_ref().map(|contents| {
            resolve(&question.spec, contents)?;
            credentials(&question.spec, contents)
        });
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
        let mut contents = Contents::new();
        let mut size = 0;
        for (object, keys) in wanted(spec) {
            let read = tokio::time::timeout(TIME_LIMIT, self.read_object(key, &object)).await;
            let (result, content) = match read {
                Ok(Ok(Some(mut data))) => {
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
                    debug!(%key, "the {object} was not read: {}", error_chain(&error));
                    ("Failed", None)
                }
                Err(_) => ("Failed", None),
            };
            self.shared
                .reads
                .get_or_create(&ReadLabels { result })
                .inc();
            if object.kind == Kind::Secret && contents.digests.is_none() {
                let had = tokio::time::timeout(TIME_LIMIT, self.shared.keys.get()).await;
                let digest_key = had.ok()?.ok()?;
                contents.digests = digest_key.map(|k| Digests::new(k, &key.namespace, &key.name));
            }
            contents.objects.insert(object, content?);
        }
        Some(contents)
    }

    async fn read_object(
        &self,
        key: &Key,
        object: &Object,
    ) -> Result<Option<BTreeMap<String, SecretBytes>>, kube::Error> {
        let client = self.shared.client.clone();
        Ok(match object.kind {
            Kind::ConfigMap => {
                let api: Api<ConfigMap> = Api::namespaced(client, &key.namespace);
                let found = api.get_opt(&object.name).await?;
                found.map(|found| {
                    let data = found.data.unwrap_or_default().into_iter();
                    data.map(|(k, v)| (k, SecretBytes::new(v.into_bytes())))
                        .collect()
                })
            }
            Kind::Secret => {
                let api: Api<Secret> = Api::namespaced(client, &key.namespace);
                let found = api.get_opt(&object.name).await?;
                found.map(|found| {
                    let data = found.data.unwrap_or_default().into_iter();
                    data.map(|(k, v)| (k, SecretBytes::new(v.0))).collect()
                })
            }
        })
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

    fn config_map(name: &str, key: &str) -> serde_json::Value {
        json!({"name": name, "valueFrom": {"configMapKeyRef": {"name": "shop", "key": key}}})
    }

    fn secret(name: &str, key: &str) -> serde_json::Value {
        json!({"name": name, "valueFrom": {"secretKeyRef": {"name": "shop", "key": key}}})
    }

    #[test]
    fn only_what_is_referred_to_is_read() {
        let spec = spec(json!({
            "/envFrom": [{"configMapRef": {"name": "whole"}}, {"secretRef": {"name": "whole"}}],
            "/env": [config_map("A", "a"), config_map("B", "b"), secret("D", "a"), secret("E", "b")],
            "/build/env": [config_map("C", "c")],
            "/processes/0/env": [secret("F", "c")],
        }));
        let keys: BTreeSet<String> = ["a", "b", "c"].map(str::to_owned).into();
        assert_eq!(
            wanted(&spec),
            [
                (Object::config_map("whole"), Keys::All),
                (Object::config_map("shop"), Keys::Some(keys.clone())),
                (Object::secret("whole"), Keys::All),
                (Object::secret("shop"), Keys::Some(keys)),
            ]
            .into()
        );
        assert_eq!(count(&deployment_spec()), 0);
    }
}
