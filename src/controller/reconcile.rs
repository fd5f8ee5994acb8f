//! The reconcile of one Deployment: observe, plan, apply, and the events of what changed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::error_boundary::InvalidObject;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Api, Client};
use serde_json::json;
use tracing::{debug, info, warn};

use crate::api::conditions::{READY, RECONCILING, STALLED, Statement, conditions, cut};
use crate::api::reasons::Reason;
use crate::api::{Deployment, DeploymentStatus, GROUP, VERSION};
use crate::runtime::error_chain;
use crate::runtime::supervise::{Action, ReconcileError, Retry};

use super::Key;
use super::apply::{Applied, FIELD_MANAGER, Refused, apply, refused};
use super::observe::{Caches, Found, Memory};
use super::observed::{Observed, ObservedDeployment};
use super::plan::plan;
use super::policies::Policies;
use super::references::References;
use super::source::Sources;
use super::{release, rollout};

/// How soon to look again when the caches do not show yet what was written, or a decision was dropped.
/// What is awaited wakes the key anyway.
const CATCH_UP: Duration = Duration::from_millis(500);

/// How long an event may take: it is told to people, and nothing waits for it.
const EVENT_LIMIT: Duration = Duration::from_secs(5);

/// Bytes of an event's note at most, by the API's own rule.
const NOTE_LIMIT: usize = 1000;

/// What both reconciles share. Cheap to clone.
#[derive(Clone)]
pub struct Context {
    /// The API server.
    pub client: Client,
    /// What is watched.
    pub caches: Caches,
    /// What is looked up.
    pub sources: Sources,
    /// What is referred to.
    pub references: References,
    /// What is still allowed.
    pub policies: Policies,
    /// What no cache says.
    pub memory: Arc<Mutex<Memory>>,
    /// Where events go.
    pub recorder: Recorder,
    /// Whether `http://` and `git://` are allowed.
    pub insecure_source_schemes: bool,
}

/// Why a reconcile failed.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileFailure {
    /// A write was refused.
    #[error(transparent)]
    Refused(#[from] Refused),
}

impl ReconcileError for ReconcileFailure {
    fn reason(&self) -> &'static str {
        let Self::Refused(refused) = self;
        match refused {
            Refused::Changed => "Changed",
            Refused::Gone => "Gone",
            Refused::NameTaken(_) => "NameTaken",
            Refused::Body(_) => "Body",
            Refused::Seal(_) => "Seal",
            Refused::Api(_) => "Api",
        }
    }

    fn retry(&self) -> Retry {
        Retry::Backoff
    }
}

impl Context {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the Deployment under `key` one step on.
    pub async fn reconcile_deployment(self, key: Key) -> Result<Action, ReconcileFailure> {
        let found = {
            let mut memory = self.memory();
            let insecure = self.insecure_source_schemes;
            self.caches.observe(
                &key,
                &mut memory,
                &self.sources,
                &self.references,
                &self.policies,
                insecure,
            )
        };
        let outcome = match found {
            Found::Nothing | Found::Deleting => {
                self.sources.forget(&key);
                self.references.forget(&key);
                self.memory().forget(&key);
                return Ok(Action::Done);
            }
            Found::Unread => return Ok(Action::Done),
            Found::Behind => return Ok(Action::After(CATCH_UP)),
            Found::Unreadable(invalid) => self.say_unreadable(&key, &invalid).await,
            Found::Observed(observed) => self.carry_on(&key, &observed).await,
        };
        settle(outcome)
    }

    /// Brings the Release under `key` one step on.
    pub async fn reconcile_release(self, key: Key) -> Result<Action, ReconcileFailure> {
        let outcome = release::reconcile(&self.client, &self.caches, &key).await;
        if self.caches.release(&key).is_none() {
            self.memory().forget_release(&key);
        }
        settle(outcome.map(|()| Action::Done))
    }

    async fn carry_on(&self, key: &Key, observed: &Observed) -> Result<Action, Refused> {
        let deployment = &observed.deployment;
        let plan = plan(observed, Timestamp::now());
        let Applied {
            status,
            releases,
            dropped,
            failed,
        } = match apply(&self.client, deployment, &plan).await {
            Ok(applied) => applied,
            Err(error) => {
                debug!(%key, "{}", error_chain(&error));
                return Err(error);
            }
        };
        for (name, over) in releases {
            self.memory().wrote_release(key, name, over);
        }
        for step in &plan.steps {
            match step {
                rollout::Step::Create { name, spec, .. }
                | rollout::Step::Update { name, spec, .. } => {
                    info!(%key, release = name, node = spec.node_name, revision = spec.revision, id = %spec.release_id, "told a node what to serve");
                }
                rollout::Step::Delete { name, .. } => {
                    info!(%key, release = name, "told a node to remove the app")
                }
            }
        }
        if status {
            {
                let mut memory = self.memory();
                memory.wrote_status(key, &deployment.resource_version);
                if let Some(revision) = &plan.status.revision {
                    memory.give_back(key, revision, &plan.giving_back);
                }
            }
            self.tell(deployment, &plan.status).await;
        } else if let Some(revision) = &plan.status.revision {
            self.memory().give_back(key, revision, &plan.giving_back);
        }
        if let Some(error) = failed {
            debug!(%key, "{}", error_chain(&error));
            return Err(error);
        }
        Ok(match plan.look_again {
            _ if dropped => Action::After(CATCH_UP),
            Some(after) => Action::After(after),
            None => Action::Done,
        })
    }

    /// Says of an object that this version cannot read why it is left alone. All else in its status
    /// stays as it is.
    async fn say_unreadable(&self, key: &Key, invalid: &InvalidObject) -> Result<Action, Refused> {
        warn!(%key, "cannot be read: {}", invalid.error);
        let resource = ApiResource::erase::<Deployment>(&());
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &key.namespace, &resource);
        let object = api.get(&key.name).await.map_err(refused)?;
        if object.metadata.deletion_timestamp.is_some() {
            return Ok(Action::Done);
        }
        let mut status = object
            .data
            .get("status")
            .cloned()
            .unwrap_or_else(|| json!({}));
        let before: Vec<Condition> = status
            .get("conditions")
            .and_then(|c| serde_json::from_value(c.clone()).ok())
            .unwrap_or_default();
        let message = format!(
            "the object cannot be read, so nothing of it is changed: {}; correct it",
            invalid.error
        );
        let says = |kind, status| Statement {
            kind,
            status: Some(status),
            reason: Reason::InvalidSpec,
            message: message.clone(),
        };
        let statements = [
            says(READY, false),
            says(RECONCILING, false),
            says(STALLED, true),
        ];
        let generation = object.metadata.generation.unwrap_or_default();
        let after = conditions(&statements, generation, &before, Timestamp::now());
        if after == before {
            return Ok(Action::Done);
        }
        status["observedGeneration"] = json!(generation);
        status["conditions"] = json!(after);
        let body = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": "Deployment",
            "metadata": {
                "name": key.name,
                "uid": object.metadata.uid,
                "resourceVersion": object.metadata.resource_version,
            },
            "status": status,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        api.patch_status(&key.name, &params, &Patch::Apply(&body))
            .await
            .map_err(refused)?;
        Ok(Action::Done)
    }

    /// Tells people what changed. An event that is lost is lost.
    async fn tell(&self, deployment: &ObservedDeployment, status: &DeploymentStatus) {
        let reference = ObjectReference {
            api_version: Some(format!("{GROUP}/{VERSION}")),
            kind: Some("Deployment".to_owned()),
            name: Some(deployment.name.clone()),
            namespace: Some(deployment.namespace.clone()),
            uid: Some(deployment.uid.clone()),
            ..ObjectReference::default()
        };
        for event in events(&deployment.status, status) {
            let published = self.recorder.publish(&event, &reference);
            match tokio::time::timeout(EVENT_LIMIT, published).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!("an event was not taken: {}", error_chain(&error)),
                Err(_) => debug!("an event was not taken in time"),
            }
        }
    }
}

/// The events of a change of status: one for each condition that says something else for another reason,
/// and one for a new revision. Pure.
pub fn events(before: &DeploymentStatus, after: &DeploymentStatus) -> Vec<Event> {
    let find = |status: &DeploymentStatus, kind: &str| {
        let found = status.conditions.iter().find(|c| c.type_ == kind);
        found.cloned()
    };
    let revision = after.revision.clone().unwrap_or_default();
    let changed = |kind: &str| {
        let (before, after) = (find(before, kind), find(after, kind)?);
        let differs = before
            .as_ref()
            .is_none_or(|b| b.status != after.status || b.reason != after.reason);
        differs.then_some(after)
    };
    let mut said: Vec<Condition> = Vec::new();
    said.extend(changed(STALLED).filter(|c| c.status == "True"));
    let ready = if before.revision == after.revision {
        changed(READY)
    } else {
        find(after, READY)
    };
    said.extend(ready.filter(|ready| said.iter().all(|s| s.reason != ready.reason)));
    said.into_iter()
        .map(|condition| {
            let bad = condition.type_ == STALLED || is_bad(&condition.reason);
            Event {
                type_: if bad {
                    EventType::Warning
                } else {
                    EventType::Normal
                },
                reason: condition.reason,
                note: Some(cut(&condition.message, NOTE_LIMIT).to_owned()),
                // Events of one action are counted as one: those of two revisions are two.
                action: cut(&format!("RollOut {revision}"), 128).to_owned(),
                secondary: None,
            }
        })
        .collect()
}

fn is_bad(reason: &str) -> bool {
    use crate::api::reasons::Class;
    let reason = reason.parse().unwrap_or(Reason::Unknown);
    match reason.class() {
        Class::Revision | Class::Environment | Class::Node | Class::Invalid => true,
        Class::Progress => reason == Reason::ProgressDeadlineExceeded,
    }
}

fn settle(outcome: Result<Action, Refused>) -> Result<Action, ReconcileFailure> {
    match outcome {
        Ok(action) => Ok(action),
        Err(Refused::Changed) => Ok(Action::After(CATCH_UP)),
        Err(Refused::Gone) => Ok(Action::Done),
        Err(
            error @ (Refused::NameTaken(_) | Refused::Body(_) | Refused::Seal(_) | Refused::Api(_)),
        ) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::testing::World;

    fn said(before: &DeploymentStatus, after: &DeploymentStatus) -> Vec<(bool, String)> {
        events(before, after)
            .into_iter()
            .map(|e| (e.type_ == EventType::Warning, e.reason))
            .collect()
    }

    #[test]
    fn an_event_tells_of_a_change_and_not_of_a_state() {
        let mut world = World::new(1);
        let unseen = world.status().clone();
        world.reconcile();
        let rolling = world.status().clone();
        assert_eq!(said(&unseen, &rolling), [(false, "Progressing".into())]);
        assert_eq!(said(&rolling, &rolling), []);
        world.agent_commits("n1");
        world.reconcile();
        let deployed = world.status().clone();
        assert_eq!(said(&rolling, &deployed), [(false, "Deployed".into())]);
        world.push('b');
        world.reconcile();
        world.agent_fails("n1", Reason::BuildFailed);
        let rolling = world.status().clone();
        world.reconcile();
        let failed = said(&rolling, world.status());
        assert_eq!(
            failed,
            [(true, "BuildFailed".into())],
            "told once, not by each condition"
        );
    }
}
