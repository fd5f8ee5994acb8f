//! The second reconcile, keyed by Release: the condition `Reachable` and the finalizer.
//!
//! It has a key of its own because a Deployment that was deleted in the background is never reconciled
//! again, and its Releases must still go. Invariants: the finalizer goes only when the node has reported
//! `Removed` for the generation that asks for it, or when its Node object is gone; of the status only the
//! one condition is written, by a field manager of its own.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, ObjectMeta, Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::{Api, Client};
use serde_json::json;

use crate::api::conditions::REACHABLE;
use crate::api::names::NodeName;
use crate::api::reasons::Reason;
use crate::api::release::Phase;
use crate::api::{GROUP, RELEASE_FINALIZER, Release, ReleaseStatus, VERSION};

use super::Key;
use super::apply::{Refused, refused};
use super::observe::{Caches, reference};
use super::observed::Reach;
use super::reach::STALE_AFTER;

/// Owns `Reachable` and nothing else, so that an Apply of it removes nothing else.
const FIELD_MANAGER: &str = "kari-controller-reachable";

/// What is decided from: all Releases have it, also those that this version cannot read, as after a return
/// to an older one. Such a one must be able to go, too.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The Release's own.
    pub metadata: ObjectMeta,
    /// The node that it is on.
    pub node: NodeName,
    /// What is said of it.
    pub status: ReleaseStatus,
}

impl From<Release> for Seen {
    fn from(release: Release) -> Self {
        Self {
            metadata: release.metadata,
            node: NodeName::new(release.spec.node_name),
            status: release.status.unwrap_or_default(),
        }
    }
}

/// What is done to a Release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing of it is left on the node: let the API server forget it.
    DropFinalizer,
    /// Say whether the node's agent is there.
    Reachable(bool),
}

/// Decides what is done to a Release. Pure.
pub fn decide(release: &Seen, node_exists: bool, reach: Reach) -> Option<Step> {
    let Seen {
        metadata,
        node: _,
        status,
    } = release;
    let deleting = metadata.deletion_timestamp.is_some();
    if deleting && finalizers(metadata).iter().any(|f| f == RELEASE_FINALIZER) {
        let removed = status.phase == Phase::Removed
            && Some(status.observed_generation) == metadata.generation;
        if removed || !node_exists {
            return Some(Step::DropFinalizer);
        }
    }
    let wanted = match reach {
        Reach::Fresh => true,
        Reach::Stale | Reach::NoAgent => false,
        // The one before this controller may know more.
        Reach::Unknown => return None,
    };
    let says = status
        .conditions
        .iter()
        .find(|c| c.type_ == REACHABLE)
        .map(|c| c.status == "True");
    (says != Some(wanted)).then_some(Step::Reachable(wanted))
}

/// Does what [`decide`] says for the Release under `key`.
pub async fn reconcile(client: &Client, caches: &Caches, key: &Key) -> Result<(), Refused> {
    let Some(release) = see(client, caches, key).await? else {
        return Ok(());
    };
    let node = &release.node;
    // The answer to a write is the whole object, which this version may not be able to read.
    let api: Api<DeserializeGuard<Release>> = Api::namespaced(client.clone(), &key.namespace);
    match decide(&release, caches.has_node(node), caches.reach(node)) {
        None => Ok(()),
        Some(Step::DropFinalizer) => drop_finalizer(&api, key, &release.metadata).await,
        Some(Step::Reachable(reachable)) => {
            let condition = condition(&release, reachable, Timestamp::now());
            let body = json!({
                "apiVersion": format!("{GROUP}/{VERSION}"),
                "kind": "Release",
                // The identity keeps it from another Release of the name; its version would only
                // conflict with what the agent writes.
                "metadata": {"name": key.name, "uid": release.metadata.uid},
                "status": {"conditions": [condition]},
            });
            let params = PatchParams::apply(FIELD_MANAGER).force();
            api.patch_status(&key.name, &params, &Patch::Apply(&body))
                .await
                .map(|_| ())
                .map_err(refused)
        }
    }
}

/// The Release under `key`: as the cache has it, or, where this version cannot read it, what can be told
/// from the object itself.
async fn see(client: &Client, caches: &Caches, key: &Key) -> Result<Option<Seen>, Refused> {
    match caches.releases.get(&reference(key)) {
        None => return Ok(None),
        Some(cached) => {
            if let Ok(release) = &cached.0 {
                return Ok(Some(release.clone().into()));
            }
        }
    }
    let resource = ApiResource::erase::<Release>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &key.namespace, &resource);
    let object = api.get_opt(&key.name).await.map_err(refused)?;
    Ok(object.and_then(told_by))
}

/// What an object that is no Release of this version tells all the same; nothing without a node.
fn told_by(object: DynamicObject) -> Option<Seen> {
    let node = object.data.pointer("/spec/nodeName")?.as_str()?;
    let status = object.data.get("status").cloned().unwrap_or_default();
    Some(Seen {
        node: NodeName::new(node),
        status: serde_json::from_value(status).unwrap_or_default(),
        metadata: object.metadata,
    })
}

fn finalizers(metadata: &ObjectMeta) -> &[String] {
    metadata.finalizers.as_deref().unwrap_or_default()
}

async fn drop_finalizer(
    api: &Api<DeserializeGuard<Release>>,
    key: &Key,
    metadata: &ObjectMeta,
) -> Result<(), Refused> {
    let others: Vec<_> = finalizers(metadata)
        .iter()
        .filter(|f| *f != RELEASE_FINALIZER)
        .collect();
    let patch = serde_json::from_value(json!([
        {"op": "test", "path": "/metadata/uid", "value": metadata.uid},
        {"op": "test", "path": "/metadata/finalizers", "value": finalizers(metadata)},
        {"op": "replace", "path": "/metadata/finalizers", "value": others},
    ]))
    .map_err(Refused::Body)?;
    api.patch(
        &key.name,
        &PatchParams::default(),
        &Patch::Json::<()>(patch),
    )
    .await
    .map(|_| ())
    .map_err(refused)
}

fn condition(release: &Seen, reachable: bool, now: Timestamp) -> Condition {
    let node = &release.node;
    let (status, reason, message) = if reachable {
        (
            "True",
            Reason::AgentReachable.as_str(),
            format!("the agent of {node} renews its Lease"),
        )
    } else {
        (
            "False",
            Reason::AgentUnreachable.as_str(),
            format!(
                "the agent of {node} has not renewed its Lease for {} s; what runs there goes on by itself",
                STALE_AFTER.as_secs()
            ),
        )
    };
    Condition {
        type_: REACHABLE.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        observed_generation: release.metadata.generation,
        last_transition_time: Time(now),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::testing::World;

    /// A Release of a world, as it is seen.
    fn release(change: impl FnOnce(&mut Seen)) -> Seen {
        let mut world = World::deployed(1);
        let observed = world.release("n1").clone();
        let mut release = Seen::from(Release::new(&observed.name, observed.spec));
        release.metadata.generation = Some(2);
        release.metadata.finalizers = Some(vec![RELEASE_FINALIZER.to_owned()]);
        let mut status = observed.status;
        status.observed_generation = 2;
        status.conditions = vec![condition(&release, true, Timestamp::UNIX_EPOCH)];
        release.status = status;
        change(&mut release);
        release
    }

    fn deleting(release: &mut Seen) {
        release.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    }

    fn phase(release: &mut Seen, phase: Phase) {
        release.status.phase = phase;
    }

    #[test]
    fn the_finalizer_goes_when_the_node_has_removed_the_app_or_is_gone() {
        let removed = |r: &mut Seen| {
            deleting(r);
            phase(r, Phase::Removed);
        };
        for (case, release, node_exists, expected) in [
            (
                "not in deletion",
                release(|r| phase(r, Phase::Removed)),
                true,
                None,
            ),
            ("not in deletion, node gone", release(|_| ()), false, None),
            ("removing", release(deleting), true, None),
            ("removed", release(removed), true, Some(Step::DropFinalizer)),
            (
                "node gone",
                release(deleting),
                false,
                Some(Step::DropFinalizer),
            ),
            (
                "removed, but for an older generation",
                release(|r| {
                    removed(r);
                    r.metadata.generation = Some(3);
                }),
                true,
                None,
            ),
            (
                "the finalizer is another's",
                release(|r| {
                    removed(r);
                    r.metadata.finalizers = Some(vec!["example.com/x".into()]);
                }),
                true,
                None,
            ),
        ] {
            assert_eq!(
                decide(&release, node_exists, Reach::Fresh),
                expected,
                "{case}"
            );
        }
    }

    #[test]
    fn reachable_is_written_when_it_changes_and_left_alone_while_nothing_is_known() {
        let release = release(|_| ());
        for (reach, expected) in [
            (Reach::Fresh, None),
            (Reach::Unknown, None),
            (Reach::Stale, Some(Step::Reachable(false))),
            (Reach::NoAgent, Some(Step::Reachable(false))),
        ] {
            assert_eq!(decide(&release, true, reach), expected, "{reach:?}");
        }
    }

    #[test]
    fn a_release_that_cannot_be_read_tells_where_it_is_and_what_is_said_of_it() {
        let object = |data| {
            let mut object = DynamicObject::new("shop", &ApiResource::erase::<Release>(&()));
            object.data = data;
            object
        };
        let spec = json!({"nodeName": "n1", "onDelete": "Later"});
        let seen = told_by(object(json!({
            "spec": spec.clone(),
            "status": {"observedGeneration": 2, "phase": "Removed", "later": 1},
        })));
        let seen = seen.unwrap();
        assert_eq!(seen.node, NodeName::new("n1"));
        assert_eq!(seen.status.phase, Phase::Removed);
        let seen = told_by(object(json!({"spec": spec, "status": {"phase": 1}})));
        assert_eq!(seen.unwrap().status, ReleaseStatus::default());
        assert!(told_by(object(json!({}))).is_none());
    }
}
