//! What wakes which reconcile: every change that a decision could depend on, and nothing that happens
//! all the time.
//!
//! A node's Lease is renewed each few seconds and a Node's status changes often: only freshness,
//! the sealing key, presence, labels and schedulability wake anything. The controller's own status writes wake nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::core::DeserializeGuard;
use kube::{Resource, ResourceExt};
use tokio_util::sync::CancellationToken;

use crate::api::names::{NODE_LEASE_PREFIX, NodeName};
use crate::api::{ANNOTATION_PUBLIC_KEY, Deployment, LABEL_DEPLOYMENT, Release};
use crate::runtime::serve::Heartbeat;
use crate::runtime::supervise::Trigger;
use crate::seal::NodePublicKey;

use super::Key;
use super::observe::{Cache, Caches, reference};
use super::placement;

/// How often it is looked whether a Lease has become stale: a fortieth of its duration.
const CLOCK: Duration = Duration::from_secs(1);

/// How often everything is looked at whatever wakes it: bounds what a bug or a lost event can cost.
const RESYNC: Duration = Duration::from_secs(600);

/// The caches, and what is woken by a change in them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Triggers {
    /// What is watched.
    pub caches: Caches,
    /// The Leases of the system namespace.
    pub leases: Cache<Lease>,
    /// Cancelled when the first list of Leases was taken. A cache wakes only the last of those that wait
    /// for it (kube's `DelayedInit` holds one waker), so each has exactly one waiter.
    pub leases_listed: CancellationToken,
    /// Wakes the reconcile of a Deployment.
    pub deployment: Trigger<Key>,
    /// Wakes the reconcile of a Release.
    pub release: Trigger<Key>,
}

fn key<K: ResourceExt>(object: &K) -> Key {
    Key {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
    }
}

impl Triggers {
    /// A change of spec, annotations or life, by whoever; not of status.
    pub async fn watch_deployments(
        self,
        stream: impl Stream<Item = DeserializeGuard<Deployment>> + Send,
    ) {
        type Seen = (Option<String>, Option<i64>, Vec<(String, String)>, bool);
        let mut seen: HashMap<Key, Seen> = HashMap::new();
        let mut stream = std::pin::pin!(stream);
        while let Some(object) = stream.next().await {
            let key = key(&object);
            if self.caches.deployments.get(&reference(&key)).is_none() {
                seen.remove(&key);
                self.deployment.wake(key);
                continue;
            }
            let meta = object.meta();
            let annotations = object.annotations().clone().into_iter().collect();
            let now: Seen = (
                meta.uid.clone(),
                meta.generation,
                annotations,
                meta.deletion_timestamp.is_some(),
            );
            if seen.get(&key) != Some(&now) {
                seen.insert(key.clone(), now);
                self.deployment.wake(key);
            }
        }
    }

    /// Every change of a Release.
    pub async fn watch_releases(
        self,
        stream: impl Stream<Item = DeserializeGuard<Release>> + Send,
    ) {
        let mut stream = std::pin::pin!(stream);
        while let Some(object) = stream.next().await {
            let key = key(&object);
            let deployment = match &object.0 {
                Ok(release) => Some(release.spec.deployment.clone()),
                Err(_) => object.labels().get(LABEL_DEPLOYMENT).cloned(),
            };
            if let Some(name) = deployment {
                self.deployment.wake(Key {
                    namespace: key.namespace.clone(),
                    name,
                });
            }
            self.release.wake(key);
        }
    }

    /// Every change of the history.
    pub async fn watch_revisions(
        self,
        stream: impl Stream<Item = DeserializeGuard<ControllerRevision>> + Send,
    ) {
        let mut stream = std::pin::pin!(stream);
        while let Some(object) = stream.next().await {
            if let Some(name) = object.labels().get(LABEL_DEPLOYMENT) {
                self.deployment.wake(Key {
                    namespace: object.namespace().unwrap_or_default(),
                    name: name.clone(),
                });
            }
        }
    }

    /// A Node that comes, goes, or changes in what placement depends on.
    pub async fn watch_nodes(self, stream: impl Stream<Item = DeserializeGuard<Node>> + Send) {
        let mut seen = HashMap::new();
        let mut stream = std::pin::pin!(stream);
        while let Some(object) = stream.next().await {
            let name = NodeName::new(object.name_any());
            if !self.caches.has_node(&name) {
                let labels = seen.remove(&name).map(|(labels, _)| labels);
                self.wake_node(&name, &[labels.unwrap_or_default()]);
                continue;
            }
            let spec = object.0.as_ref().ok().and_then(|n| n.spec.as_ref());
            let cordoned = spec.and_then(|s| s.unschedulable);
            let now = (object.labels().clone(), cordoned);
            let before = seen.insert(name.clone(), now.clone());
            if before.as_ref() != Some(&now) {
                let before = before.map(|(labels, _)| labels);
                self.wake_node(&name, &[now.0, before.unwrap_or_default()]);
            }
        }
    }

    /// Notes every renewal; wakes what depends on a node that became reachable or came and went.
    pub async fn watch_leases(self, stream: impl Stream<Item = DeserializeGuard<Lease>> + Send) {
        let mut stream = std::pin::pin!(stream);
        loop {
            let next = tokio::select! {
                biased;
                _ = self.leases.wait_until_ready(), if !self.leases_listed.is_cancelled() => {
                    self.take_first_list();
                    continue;
                }
                next = stream.next() => next,
            };
            let Some(object) = next else {
                return;
            };
            let Some(node) = node_of(&object) else {
                continue;
            };
            let now = self.caches.now();
            if self.leases.get(&reference(&key(&object))).is_none() {
                self.caches.leases().removed(&node);
            } else {
                let key = public_key(&object);
                self.caches
                    .leases()
                    .changed(node, renewal(&object), key, now);
            }
            self.wake_changes();
        }
    }

    fn take_first_list(&self) {
        let now = self.caches.now();
        let mut leases = self.caches.leases();
        for object in self.leases.state() {
            if let Some(node) = node_of(&object) {
                leases.found(node, renewal(&object), public_key(&object), now);
            }
        }
        self.leases_listed.cancel();
    }

    /// Wakes what depends on a node whose Lease has become stale.
    pub async fn watch_time(self, heartbeat: Heartbeat) {
        loop {
            heartbeat.beat();
            self.wake_changes();
            tokio::time::sleep(CLOCK).await;
        }
    }

    fn wake_changes(&self) {
        let changes = self.caches.leases().changes(self.caches.now());
        for node in changes {
            let found = self
                .caches
                .nodes
                .get(&kube::runtime::reflector::ObjectRef::new(node.as_str()));
            let labels = found.map(|n| n.labels().clone()).unwrap_or_default();
            self.wake_node(&node, &[labels]);
        }
    }

    /// Wakes the Deployments that are on a node or meant for one with any of these labels, and the
    /// Releases of the node.
    fn wake_node(&self, node: &NodeName, labels: &[std::collections::BTreeMap<String, String>]) {
        for object in self.caches.releases.state() {
            if let Ok(release) = &object.0
                && release.spec.node_name == node.as_str()
            {
                self.release.wake(key(&*object));
                self.deployment.wake(Key {
                    namespace: object.namespace().unwrap_or_default(),
                    name: release.spec.deployment.clone(),
                });
            }
        }
        for object in self.caches.deployments.state() {
            if let Ok(deployment) = &object.0
                && labels
                    .iter()
                    .any(|labels| placement::matches(&deployment.spec.placement, labels))
            {
                self.deployment.wake(key(&*object));
            }
        }
    }

    /// Returns when everything that is watched was listed once: what is not there then is absent.
    pub async fn filled(&self) {
        // A writer that is gone is noticed where its task is awaited.
        let _ = tokio::join!(
            self.caches.deployments.wait_until_ready(),
            self.caches.releases.wait_until_ready(),
            self.caches.revisions.wait_until_ready(),
            self.caches.nodes.wait_until_ready(),
            self.leases_listed.cancelled(),
        );
    }

    /// Wakes everything.
    pub fn wake_all(&self) {
        self.each(|triggers, key, is_release| {
            if is_release {
                triggers.release.wake(key);
            } else {
                triggers.deployment.wake(key);
            }
        });
    }

    /// Wakes everything again and again, spread over the time between.
    pub async fn resync(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RESYNC) => {}
            }
            self.each(|triggers, key, is_release| {
                let delay = RESYNC.mul_f64(fastrand::f64());
                if is_release {
                    triggers.release.wake_after(key, delay);
                } else {
                    triggers.deployment.wake_after(key, delay);
                }
            });
        }
    }

    fn each(&self, wake: impl Fn(&Self, Key, bool)) {
        let deployments: Vec<Arc<_>> = self.caches.deployments.state();
        for object in deployments {
            wake(self, key(&*object), false);
        }
        for object in self.caches.releases.state() {
            wake(self, key(&*object), true);
        }
    }
}

/// The node whose agent renews this Lease; nothing for Leases of others.
fn node_of(object: &DeserializeGuard<Lease>) -> Option<NodeName> {
    object
        .name_any()
        .strip_prefix(NODE_LEASE_PREFIX)
        .map(NodeName::new)
}

/// What values for the node are sealed to. A key that is none counts as not said: nothing is sealed to it.
fn public_key(object: &DeserializeGuard<Lease>) -> Option<NodePublicKey> {
    NodePublicKey::parse(object.annotations().get(ANNOTATION_PUBLIC_KEY)?).ok()
}

/// The Lease's renewTime as opaque text.
fn renewal(object: &DeserializeGuard<Lease>) -> String {
    let spec = object.0.as_ref().ok().and_then(|lease| lease.spec.as_ref());
    format!("{:?}", spec.and_then(|spec| spec.renew_time.clone()))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures::channel::mpsc::unbounded;
    use kube::runtime::reflector::{self, store::Writer};
    use kube::runtime::watcher::Event;
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::controller::testing::deployment_spec;
    use crate::runtime::supervise::{
        Action, Options, ReconcileError, ReconcileMetrics, Retry, Supervisor,
    };

    #[derive(Debug, thiserror::Error)]
    #[error("never")]
    struct Never;

    impl ReconcileError for Never {
        fn reason(&self) -> &'static str {
            "Never"
        }
        fn retry(&self) -> Retry {
            Retry::Never
        }
    }

    /// A supervisor's trigger, and the keys that it was woken for.
    fn woken(stop: &CancellationToken) -> (Trigger<Key>, Arc<Mutex<Vec<String>>>) {
        let metrics = Arc::new(ReconcileMetrics::new(&mut Registry::default()));
        let (supervisor, trigger) = Supervisor::new("test", Options::default(), metrics);
        let keys = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&keys);
        tokio::spawn(supervisor.run(stop.clone(), move |key: Key| {
            noted.lock().unwrap().push(key.to_string());
            async { Ok::<_, Never>(Action::Done) }
        }));
        (trigger, keys)
    }

    fn deployment(version: &str, change: impl FnOnce(&mut Deployment)) -> Deployment {
        let mut object = Deployment::new("shop", deployment_spec());
        object.metadata.namespace = Some("web".into());
        object.metadata.uid = Some("uid".into());
        object.metadata.generation = Some(1);
        object.metadata.resource_version = Some(version.into());
        change(&mut object);
        object
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_wakes_nothing_and_every_other_change_of_a_deployment_does() {
        let stop = CancellationToken::new();
        let (store, mut writer): (_, Writer<DeserializeGuard<Deployment>>) = reflector::store();
        let caches = Caches::new(
            store,
            reflector::store().0,
            reflector::store().0,
            reflector::store().0,
        );
        let (trigger, keys) = woken(&stop);
        let triggers = Triggers {
            caches,
            leases: reflector::store().0,
            leases_listed: CancellationToken::new(),
            deployment: trigger,
            release: woken(&stop).0,
        };
        let (sender, stream) = unbounded();
        tokio::spawn(triggers.watch_deployments(stream));

        let annotate = |object: &mut Deployment| {
            object
                .annotations_mut()
                .insert("kari.dev/retry".into(), "1".into());
        };
        let say = |object: &mut Deployment| {
            object.status = Some(crate::api::DeploymentStatus::default());
        };
        let rows: [(&str, Event<Deployment>, bool); 7] = [
            ("it is made", Event::Apply(deployment("1", |_| ())), true),
            (
                "its status is written",
                Event::Apply(deployment("2", say)),
                false,
            ),
            (
                "it is told again",
                Event::Apply(deployment("2", say)),
                false,
            ),
            (
                "its spec changes",
                Event::Apply(deployment("3", |d| d.metadata.generation = Some(2))),
                true,
            ),
            (
                "it is annotated",
                Event::Apply(deployment("4", |d| {
                    d.metadata.generation = Some(2);
                    annotate(d);
                })),
                true,
            ),
            (
                "another of its name takes its place",
                Event::Apply(deployment("5", |d| {
                    d.metadata.generation = Some(2);
                    d.metadata.uid = Some("other".into());
                    annotate(d);
                })),
                true,
            ),
            (
                "it is deleted",
                Event::Delete(deployment("6", |_| ())),
                true,
            ),
        ];
        for (row, event, wakes) in rows {
            let guard = |object| DeserializeGuard(Ok(object));
            let (event, object) = match event {
                Event::Apply(object) => (Event::Apply(guard(object.clone())), object),
                Event::Delete(object) => (Event::Delete(guard(object.clone())), object),
                Event::Init | Event::InitApply(_) | Event::InitDone => unreachable!("{row}"),
            };
            writer.apply_watcher_event(&event);
            sender.unbounded_send(guard(object)).unwrap();
            tokio::time::sleep(Duration::from_secs(60)).await;
            let keys = std::mem::take(&mut *keys.lock().unwrap());
            let expected: &[&str] = if wakes { &["web/shop"] } else { &[] };
            assert_eq!(keys, expected, "{row}");
        }
        stop.cancel();
    }
}
