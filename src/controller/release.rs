//! The second reconcile, keyed by Release: the condition `Reachable` and the finalizer.
//!
//! It has a key of its own because a Deployment that was deleted in the background is never reconciled
//! again, and its Releases must still go. Invariants: the finalizer goes only when the node has reported
//! `Removed` for the generation that asks for it, or when its Node object is gone; of the status only the
//! one condition is written, by a field manager of its own.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use crate::api::conditions::REACHABLE;
use crate::api::names::NodeName;
use crate::api::reasons::Reason;
use crate::api::release::Phase;
use crate::api::{GROUP, RELEASE_FINALIZER, Release, VERSION};

use super::Key;
use super::apply::{Refused, refused};
use super::observe::Caches;
use super::observed::Reach;
use super::reach::STALE_AFTER;

/// Owns `Reachable` and nothing else, so that an Apply of it removes nothing else.
const FIELD_MANAGER: &str = "kari-controller-reachable";

/// What is done to a Release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing of it is left on the node: let the API server forget it.
    DropFinalizer,
    /// Say whether the node's agent is there.
    Reachable(bool),
}

/// Decides what is done to a Release. Pure.
pub fn decide(release: &Release, node_exists: bool, reach: Reach) -> Option<Step> {
    let deleting = release.metadata.deletion_timestamp.is_some();
    if deleting && release.finalizers().iter().any(|f| f == RELEASE_FINALIZER) {
        let removed = release.status.as_ref().is_some_and(|status| {
            status.phase == Phase::Removed
                && Some(status.observed_generation) == release.metadata.generation
        });
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
    let says = release
        .status
        .iter()
        .flat_map(|status| &status.conditions)
        .find(|c| c.type_ == REACHABLE)
        .map(|c| c.status == "True");
    (says != Some(wanted)).then_some(Step::Reachable(wanted))
}

/// Does what [`decide`] says for the Release under `key`.
pub async fn reconcile(client: &Client, caches: &Caches, key: &Key) -> Result<(), Refused> {
    let Some(release) = caches.release(key) else {
        return Ok(());
    };
    let node = NodeName::new(release.spec.node_name.clone());
    let api: Api<Release> = Api::namespaced(client.clone(), &key.namespace);
    match decide(&release, caches.has_node(&node), caches.reach(&node)) {
        None => Ok(()),
        Some(Step::DropFinalizer) => drop_finalizer(&api, &release).await,
        Some(Step::Reachable(reachable)) => {
            let condition = condition(&release, &node, reachable, Timestamp::now());
            let body = json!({
                "apiVersion": format!("{GROUP}/{VERSION}"),
                "kind": "Release",
                // The identity keeps it from another Release of the name; its version would only
                // conflict with what the agent writes.
                "metadata": {"name": release.name_any(), "uid": release.uid()},
                "status": {"conditions": [condition]},
            });
            let params = PatchParams::apply(FIELD_MANAGER).force();
            api.patch_status(&release.name_any(), &params, &Patch::Apply(&body))
                .await
                .map(|_| ())
                .map_err(refused)
        }
    }
}

async fn drop_finalizer(api: &Api<Release>, release: &Release) -> Result<(), Refused> {
    let others: Vec<_> = release
        .finalizers()
        .iter()
        .filter(|f| *f != RELEASE_FINALIZER)
        .collect();
    let patch = serde_json::from_value(json!([
        {"op": "test", "path": "/metadata/uid", "value": release.uid()},
        {"op": "test", "path": "/metadata/finalizers", "value": release.finalizers()},
        {"op": "replace", "path": "/metadata/finalizers", "value": others},
    ]))
    .map_err(Refused::Body)?;
    api.patch(
        &release.name_any(),
        &PatchParams::default(),
        &Patch::Json::<()>(patch),
    )
    .await
    .map(|_| ())
    .map_err(refused)
}

fn condition(release: &Release, node: &NodeName, reachable: bool, now: Timestamp) -> Condition {
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

    /// A Release of a world, as an object.
    fn release(change: impl FnOnce(&mut Release)) -> Release {
        let mut world = World::deployed(1);
        let observed = world.release("n1").clone();
        let mut release = Release::new(&observed.name, observed.spec);
        release.metadata.generation = Some(2);
        release.metadata.finalizers = Some(vec![RELEASE_FINALIZER.to_owned()]);
        let mut status = observed.status;
        status.observed_generation = 2;
        status.conditions = vec![condition(
            &release,
            &NodeName::new("n1"),
            true,
            Timestamp::UNIX_EPOCH,
        )];
        release.status = Some(status);
        change(&mut release);
        release
    }

    fn deleting(release: &mut Release) {
        release.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    }

    fn phase(release: &mut Release, phase: Phase) {
        if let Some(status) = &mut release.status {
            status.phase = phase;
        }
    }

    #[test]
    fn the_finalizer_goes_when_the_node_has_removed_the_app_or_is_gone() {
        let removed = |r: &mut Release| {
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
}
