//! From the caches to plain data: everything that a plan for one Deployment depends on.
//!
//! Invariants: raw objects end here; one that cannot be read hides itself only, and is never taken for
//! absent. What a cache cannot say (how long something has lasted, what this process wrote and the cache
//! does not show yet) is remembered here, by this process's own clock; losing it costs time only.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::Node;
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Resource, ResourceExt};
use tokio::time::Instant;

use crate::api::names::{NodeName, ReleaseId, RevisionName, release_name};
use crate::api::{
    ANNOTATION_REQUESTED_AT, ANNOTATION_RETRY, Deployment, LABEL_CANARY, LABEL_DEPLOYMENT, Release,
};

use super::Key;
use super::check::check;
use super::observed::{
    FailureClass, Lookup, Observed, ObservedDeployment, ObservedNode, ObservedRelease,
    ObservedRevision, Outcome, Presence, Reach,
};
use super::placement;
use super::policies::Policies;
use super::reach::Leases;
use super::references::{self, Contents, Question, References};
use super::revision;
use super::source::schedule::Interest;
use super::source::{Repository, Sources};

/// A cache of objects, each of which may be unreadable.
pub type Cache<K> = Store<DeserializeGuard<K>>;

/// All that is watched.
#[derive(Clone, Debug)]
pub struct Caches {
    /// Deployments of all namespaces.
    pub deployments: Cache<Deployment>,
    /// Releases of all namespaces.
    pub releases: Cache<Release>,
    /// ControllerRevisions that carry Kari's label.
    pub revisions: Cache<ControllerRevision>,
    /// Nodes.
    pub nodes: Cache<Node>,
    /// The Leases of the nodes' agents.
    pub leases: Arc<Mutex<Leases>>,
    epoch: Instant,
}

/// How long a cache is given to show what was written. A Release that was made and went again between two
/// looks is never shown; a watch that lags for longer is restarted by its watchdog, and what is planned from
/// it is refused for its old version.
const UNSEEN_LIMIT: Duration = Duration::from_secs(60);

/// What there is under a key.
#[derive(Debug)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// A Deployment in deletion: the garbage collector does the rest.
    Deleting,
    /// The cache does not show yet what this process wrote last.
    Behind,
    /// What the Deployment refers to is being read: nothing may follow before it is, and then the key is woken.
    Unread,
    /// A Deployment that this version cannot read.
    Unreadable(Box<InvalidObject>),
    /// All that a plan needs.
    Observed(Box<Observed>),
}

/// Why a Release of a Deployment cannot have its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    /// It is that of an earlier Deployment, or of nobody.
    ByAnother,
    /// What has it cannot be read.
    Unreadable,
}

/// What no cache says.
#[derive(Debug, Default)]
pub struct Memory {
    /// Since when a release has been held up by its node's surroundings.
    held_up: HashMap<Key, (ReleaseId, Instant)>,
    /// The nodes that gave their slot back, and for which revision.
    gave_back: HashMap<Key, (String, BTreeSet<NodeName>)>,
    /// The version that a status was planned from when this process last wrote one.
    superseded: HashMap<Key, String>,
    /// The Releases of a Deployment that this process wrote, and which the cache may not show yet.
    unseen: HashMap<Key, Vec<Unseen>>,
}

/// A Release that was written.
#[derive(Debug)]
struct Unseen {
    release: Key,
    /// The version that was written over; none where there was no such Release.
    over: Option<String>,
    at: Instant,
}

impl Memory {
    /// A status was written over this version: a cache that still shows it is behind.
    pub fn wrote_status(&mut self, key: &Key, over: &str) {
        self.superseded.insert(key.clone(), over.to_owned());
    }

    /// A Release of the Deployment was written over this version, or made where there was none: a cache that
    /// still shows that is behind, and a slot that was freed by it would be given away twice.
    pub fn wrote_release(&mut self, key: &Key, name: String, over: Option<String>) {
        self.unseen.entry(key.clone()).or_default().push(Unseen {
            release: Key {
                namespace: key.namespace.clone(),
                name,
            },
            over,
            at: Instant::now(),
        });
    }

    /// These nodes gave their slot back.
    pub fn give_back(&mut self, key: &Key, revision: &str, nodes: &BTreeSet<NodeName>) {
        if nodes.is_empty() {
            return;
        }
        let entry = self.gave_back.entry(key.clone()).or_default();
        if entry.0 != revision {
            *entry = (revision.to_owned(), BTreeSet::new());
        }
        entry.1.extend(nodes.iter().cloned());
    }

    /// The Deployment is gone.
    pub fn forget(&mut self, key: &Key) {
        self.gave_back.remove(key);
        self.superseded.remove(key);
        self.unseen.remove(key);
    }

    /// The Release is gone.
    pub fn forget_release(&mut self, key: &Key) {
        self.held_up.remove(key);
    }

    fn gave_back(&self, key: &Key, revision: Option<&str>, node: &NodeName) -> bool {
        self.gave_back
            .get(key)
            .is_some_and(|(of, nodes)| Some(of.as_str()) == revision && nodes.contains(node))
    }

    fn held_up_for(&mut self, key: &Key, release: &ObservedRelease) -> Option<Duration> {
        let passing = release
            .failure()
            .is_some_and(|(_, class)| class == FailureClass::Passing);
        if !passing {
            self.held_up.remove(key);
            return None;
        }
        let id = release.spec.release_id;
        let entry = self
            .held_up
            .entry(key.clone())
            .or_insert((id, Instant::now()));
        if entry.0 != id {
            *entry = (id, Instant::now());
        }
        Some(entry.1.elapsed())
    }
}

impl Caches {
    /// The caches behind one process.
    pub fn new(
        deployments: Cache<Deployment>,
        releases: Cache<Release>,
        revisions: Cache<ControllerRevision>,
        nodes: Cache<Node>,
    ) -> Self {
        Self {
            deployments,
            releases,
            revisions,
            nodes,
            leases: Arc::default(),
            epoch: Instant::now(),
        }
    }

    /// The clock of [`Caches::leases`].
    pub fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// The Leases.
    pub fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of the agent of `node`.
    pub fn reach(&self, node: &NodeName) -> Reach {
        self.leases().reach(node, self.now())
    }

    /// There is a Node object of this name.
    pub fn has_node(&self, node: &NodeName) -> bool {
        self.nodes.get(&ObjectRef::new(node.as_str())).is_some()
    }

    /// The Release under `key`, if it is there and can be read.
    pub fn release(&self, key: &Key) -> Option<Release> {
        let found = self.releases.get(&reference(key))?;
        found.0.as_ref().ok().cloned()
    }

    /// All that a plan for the Deployment under `key` depends on.
    pub fn observe(
        &self,
        key: &Key,
        memory: &mut Memory,
        sources: &Sources,
        references: &References,
        policies: &Policies,
        insecure_source_schemes: bool,
    ) -> Found {
        let Some(found) = self.deployments.get(&reference(key)) else {
            return Found::Nothing;
        };
        let deployment = match &found.0 {
            Err(invalid) => return Found::Unreadable(Box::new(invalid.clone())),
            Ok(deployment) => deployment,
        };
        if deployment.meta().deletion_timestamp.is_some() {
            return Found::Deleting;
        }
        let denied = policies.denied(key, deployment);
        let deployment = observed_deployment(key, deployment);
        if memory.superseded.get(key) == Some(&deployment.resource_version) {
            return Found::Behind;
        }
        if let Some(unseen) = memory.unseen.get_mut(key) {
            unseen.retain(|unseen| self.is_unseen(unseen));
            if !unseen.is_empty() {
                return Found::Behind;
            }
        }
        let contents = contents(key, &deployment, references, insecure_source_schemes);
        // Asked in any case, so that both go on at once, but for a source that is read with a Secret.
        let lookup = lookup(
            key,
            &deployment,
            contents.as_ref(),
            sources,
            insecure_source_schemes,
        );
        let Some(contents) = contents else {
            return Found::Unread;
        };
        Found::Observed(Box::new(Observed {
            nodes: self.nodes_of(key, &deployment, memory),
            revisions: self.revisions_of(key, &deployment),
            lookup,
            contents,
            deployment,
            denied,
            insecure_source_schemes,
        }))
    }

    fn is_unseen(&self, unseen: &Unseen) -> bool {
        let shown = self.releases.get(&reference(&unseen.release));
        let version = shown.and_then(|release| release.meta().resource_version.clone());
        version == unseen.over && unseen.at.elapsed() < UNSEEN_LIMIT
    }

    fn nodes_of(
        &self,
        key: &Key,
        deployment: &ObservedDeployment,
        memory: &mut Memory,
    ) -> Vec<ObservedNode> {
        let (mut releases, taken) = self.releases_of(key, deployment, memory);
        let taken = |node: &NodeName| taken.get(&release_name(&deployment.name, node)).copied();
        let revision = deployment.status.revision.as_deref();
        let mut nodes: Vec<ObservedNode> = Vec::new();
        for node in self.nodes.state() {
            let name = NodeName::new(node.name_any());
            let presence = Presence::There {
                matches: placement::matches(&deployment.spec.placement, node.labels()),
                canary: node.labels().get(LABEL_CANARY).is_some_and(|v| v == "true"),
                cordoned: node.0.as_ref().is_ok_and(|n| {
                    let spec = n.spec.as_ref();
                    spec.and_then(|s| s.unschedulable) == Some(true)
                }),
            };
            nodes.push(ObservedNode {
                presence,
                reach: self.reach(&name),
                key: self.leases().key(&name).cloned(),
                release: releases.remove(&name),
                name_taken: taken(&name).is_some(),
                unreadable: taken(&name) == Some(Taken::Unreadable),
                gave_back: memory.gave_back(key, revision, &name),
                name,
            });
        }
        for (name, release) in releases {
            nodes.push(ObservedNode {
                presence: Presence::Gone,
                reach: self.reach(&name),
                key: self.leases().key(&name).cloned(),
                release: Some(release),
                name_taken: false,
                unreadable: false,
                gave_back: false,
                name,
            });
        }
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }

    /// The Deployment's Releases by node, and the names that are taken.
    fn releases_of(
        &self,
        key: &Key,
        deployment: &ObservedDeployment,
        memory: &mut Memory,
    ) -> (BTreeMap<NodeName, ObservedRelease>, BTreeMap<String, Taken>) {
        let mut releases = BTreeMap::new();
        let mut taken = BTreeMap::new();
        let prefix = format!("{}-", key.name);
        for object in self.releases.state() {
            let meta = object.meta();
            let name = object.name_any();
            if meta.namespace.as_deref() != Some(&key.namespace) || !name.starts_with(&prefix) {
                continue;
            }
            let owner = meta
                .owner_references
                .iter()
                .flatten()
                .find(|owner| owner.controller == Some(true));
            let ours = owner.is_none_or(|owner| owner.uid == deployment.uid);
            let release = match &object.0 {
                Ok(release) if release.spec.deployment == key.name && ours => release,
                Ok(_) => {
                    taken.insert(name, Taken::ByAnother);
                    continue;
                }
                Err(_) => {
                    taken.insert(name, Taken::Unreadable);
                    continue;
                }
            };
            let node = NodeName::new(release.spec.node_name.clone());
            if name != release_name(&key.name, &node) {
                taken.insert(name, Taken::ByAnother);
                continue;
            }
            let mut observed = ObservedRelease {
                uid: meta.uid.clone().unwrap_or_default(),
                resource_version: meta.resource_version.clone().unwrap_or_default(),
                generation: meta.generation.unwrap_or_default(),
                deleting: meta.deletion_timestamp.is_some(),
                orphaned: owner.is_none(),
                retry: release.annotations().get(ANNOTATION_RETRY).cloned(),
                spec: release.spec.clone(),
                status: release.status.clone().unwrap_or_default(),
                held_up_for: None,
                name,
            };
            let release_key = Key {
                namespace: key.namespace.clone(),
                name: observed.name.clone(),
            };
            observed.held_up_for = memory.held_up_for(&release_key, &observed);
            releases.insert(node, observed);
        }
        (releases, taken)
    }

    fn revisions_of(&self, key: &Key, deployment: &ObservedDeployment) -> Vec<ObservedRevision> {
        let mut revisions: Vec<_> =
            self.revisions
                .state()
                .into_iter()
                .filter(|object| {
                    let meta = object.meta();
                    meta.namespace.as_deref() == Some(&key.namespace)
                        && object.labels().get(LABEL_DEPLOYMENT) == Some(&key.name)
                        && meta.deletion_timestamp.is_none()
                        && meta.owner_references.iter().flatten().any(|owner| {
                            owner.controller == Some(true) && owner.uid == deployment.uid
                        })
                })
                .filter_map(|object| object.0.as_ref().ok().map(observed_revision))
                .collect();
        revisions.sort_by(|a, b| a.number.cmp(&b.number).then_with(|| a.name.cmp(&b.name)));
        revisions
    }
}

/// A ControllerRevision as plain data.
pub fn observed_revision(object: &ControllerRevision) -> ObservedRevision {
    ObservedRevision {
        name: RevisionName::new(object.name_any()),
        uid: object.uid().unwrap_or_default(),
        resource_version: object.resource_version().unwrap_or_default(),
        number: object.revision,
        data: object
            .data
            .as_ref()
            .and_then(|raw| serde_json::from_value(raw.0.clone()).ok()),
    }
}

fn observed_deployment(key: &Key, object: &Deployment) -> ObservedDeployment {
    ObservedDeployment {
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        uid: object.uid().unwrap_or_default(),
        resource_version: object.resource_version().unwrap_or_default(),
        generation: object.meta().generation.unwrap_or_default(),
        spec: object.spec.clone(),
        status: object.status.clone().unwrap_or_default(),
        requested_at: object.annotations().get(ANNOTATION_REQUESTED_AT).cloned(),
        retry: object.annotations().get(ANNOTATION_RETRY).cloned(),
    }
}

/// Says to the sources what the Deployment wants, and returns what is known of it.
fn lookup(
    key: &Key,
    deployment: &ObservedDeployment,
    contents: Option<&Contents>,
    sources: &Sources,
    insecure_source_schemes: bool,
) -> Lookup {
    let wanted = check(&deployment.spec, insecure_source_schemes)
        .ok()
        .and_then(|source| {
            let reference = revision::full_reference(source.reference.as_ref())?;
            Some((source, reference))
        });
    let Some((source, reference)) = wanted else {
        // Nothing to look up, or nothing that may be: whoever asks for a look has had it.
        sources.forget(key);
        return Lookup {
            outcome: Outcome::Pending,
            answered_request: deployment.requested_at.clone(),
        };
    };
    let credential = match contents {
        None if source.secret_ref.is_some() => {
            return Lookup {
                outcome: Outcome::Pending,
                answered_request: None,
            };
        }
        None => Ok(None),
        Some(contents) => references::git_credential(source, contents),
    };
    let credential = match credential {
        Ok(credential) => credential.map(Arc::new),
        Err(failure) => {
            // The Secret was looked at, which is all that can be done.
            sources.forget(key);
            return Lookup {
                outcome: Outcome::Failed(failure),
                answered_request: deployment.requested_at.clone(),
            };
        }
    };
    let known = deployment.status.source.as_ref().is_some_and(|s| {
        s.url == source.url && revision::may_stand_for(source.reference.as_ref(), &s.reference)
    });
    let handled = deployment
        .status
        .last_handled
        .as_ref()
        .and_then(|h| h.requested_at.clone());
    let request = deployment
        .requested_at
        .clone()
        .filter(|requested| Some(requested) != handled.as_ref());
    let interest = Interest {
        repository: Repository {
            url: source.url.clone(),
            credential,
        },
        reference,
        range: revision::range(source.reference.as_ref()).map(str::to_owned),
        interval: Duration::from_secs(u64::from(source.interval_seconds)),
        known,
        request,
    };
    sources.want(key, interest)
}

/// What the Deployment's references hold; nothing while that is being read.
fn contents(
    key: &Key,
    deployment: &ObservedDeployment,
    references: &References,
    insecure_source_schemes: bool,
) -> Option<Contents> {
    if check(&deployment.spec, insecure_source_schemes).is_err() {
        references.forget(key);
        return Some(Contents::new());
    }
    let question = Question {
        uid: deployment.uid.clone(),
        spec: deployment.spec.clone(),
        request: deployment.requested_at.clone(),
    };
    references.want(key, question)
}

/// Where a cache keeps the object under `key`.
pub fn reference<K>(key: &Key) -> ObjectRef<DeserializeGuard<K>>
where
    K: Resource<DynamicType = ()>,
{
    ObjectRef::new(&key.name).within(&key.namespace)
}

#[cfg(test)]
mod tests {
    use kube::runtime::reflector::{self, store::Writer};
    use kube::runtime::watcher::Event;
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::controller::source::SourceMetrics;
    use crate::controller::testing::{World, deployment_spec};
    use crate::runtime::client::{self, ApiMetrics};
    use crate::runtime::supervise::{Options, ReconcileMetrics, Supervisor};

    #[tokio::test(start_paused = true)]
    async fn nothing_is_decided_from_a_cache_that_does_not_show_the_last_writes_yet() {
        let (store, mut writer): (_, Writer<DeserializeGuard<Deployment>>) = reflector::store();
        let (releases, mut release_writer): (_, Writer<DeserializeGuard<Release>>) =
            reflector::store();
        let caches = Caches::new(store, releases, reflector::store().0, reflector::store().0);
        let mut registry = Registry::default();
        let metrics = Arc::new(ReconcileMetrics::new(&mut registry));
        let trigger = Supervisor::new("test", Options::default(), metrics).1;
        let sources = Sources::new(trigger.clone(), SourceMetrics::new(&mut registry));
        // Nobody listens there, and nothing refers to anything.
        let nobody = kube::Config::new("http://127.0.0.1:9".parse().unwrap());
        let client = client::build(nobody, &ApiMetrics::new(&mut registry)).unwrap();
        let policies = Policies::new(client.clone(), trigger.clone());
        let references = References::new(client, "kari-system", trigger, &mut registry);
        let key = Key {
            namespace: "web".into(),
            name: "shop".into(),
        };
        let mut shows = |version: &str| {
            let mut object = Deployment::new("shop", deployment_spec());
            object.metadata.namespace = Some("web".into());
            object.metadata.resource_version = Some(version.into());
            writer.apply_watcher_event(&Event::Apply(DeserializeGuard(Ok(object))));
        };
        let mut memory = Memory::default();
        let observe = |memory: &mut Memory| {
            caches.observe(&key, memory, &sources, &references, &policies, false)
        };

        assert!(matches!(observe(&mut memory), Found::Nothing));
        shows("1");
        assert!(matches!(observe(&mut memory), Found::Observed(_)));
        memory.wrote_status(&key, "1");
        assert!(matches!(observe(&mut memory), Found::Behind));
        shows("2");
        assert!(matches!(observe(&mut memory), Found::Observed(_)));

        let spec = World::deployed(1).release("n1").spec.clone();
        let mut release_shows = |version: &str| {
            let mut object = Release::new("shop-n1", spec.clone());
            object.metadata.namespace = Some("web".into());
            object.metadata.resource_version = Some(version.into());
            release_writer.apply_watcher_event(&Event::Apply(DeserializeGuard(Ok(object))));
        };
        memory.wrote_release(&key, "shop-n1".into(), None);
        assert!(matches!(observe(&mut memory), Found::Behind));
        release_shows("3");
        assert!(matches!(observe(&mut memory), Found::Observed(_)));
        memory.wrote_release(&key, "shop-n1".into(), Some("3".into()));
        assert!(matches!(observe(&mut memory), Found::Behind));
        release_shows("4");
        assert!(matches!(observe(&mut memory), Found::Observed(_)));

        // Made and gone between two looks.
        memory.wrote_release(&key, "shop-n2".into(), None);
        assert!(matches!(observe(&mut memory), Found::Behind));
        tokio::time::advance(UNSEEN_LIMIT).await;
        assert!(matches!(observe(&mut memory), Found::Observed(_)));
    }
}
