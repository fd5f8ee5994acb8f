//! What admission policies say now of the Deployments that are there. They judge what is written, and may have been
//! tightened since.
//!
//! The rules stand in the policies and nowhere else: the API server is asked, by the dry run of a status that changes
//! nothing, for which the chart's policies judge the spec as if it had just been written. One question at a time, each
//! bounded. One that fails changes nothing.
//! Deliberately absent: reading what the policies read. The controller has no right to labels of namespaces, and rules
//! that are written twice come to differ.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kube::api::{Api, Patch, PatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::api::Deployment;
use crate::api::conditions::STALLED;
use crate::api::reasons::Reason;
use crate::runtime::error_chain;
use crate::runtime::serve::Heartbeat;
use crate::runtime::supervise::Trigger;

use super::Key;
use super::observe::Cache;

/// Between two rounds: an administrator who tightens a policy waits no longer to see whom it meets. A thousand
/// Deployments cost the API server some seconds of one request at a time.
const PAUSE: Duration = Duration::from_secs(30);

/// How long one question may take.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// What was said. Cheap to clone.
#[derive(Clone)]
pub struct Policies {
    client: Client,
    answers: Arc<Mutex<HashMap<Key, Answer>>>,
    wake: Trigger<Key>,
}

/// What was said of a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    uid: Option<String>,
    generation: Option<i64>,
    denied: Option<String>,
}

impl Policies {
    /// Nothing was said yet. `wake` is told of Deployments of which something else is said than before.
    pub fn new(client: Client, wake: Trigger<Key>) -> Self {
        Self {
            client,
            answers: Arc::default(),
            wake,
        }
    }

    /// What is said against the Deployment's spec, if anything. Of one that nobody has asked about, it is what the
    /// controller before this one has put into its status; a new spec was taken just now.
    pub fn denied(&self, key: &Key, deployment: &Deployment) -> Option<String> {
        match self.answers().get(key) {
            Some(answer)
                if answer.uid == deployment.metadata.uid
                    && answer.generation == deployment.metadata.generation =>
            {
                answer.denied.clone()
            }
            Some(_) | None => said_before(deployment),
        }
    }

    /// Asks about every Deployment, round after round, until `shutdown`.
    pub async fn run(
        &self,
        deployments: &Cache<Deployment>,
        heartbeat: Heartbeat,
        shutdown: CancellationToken,
    ) {
        let rounds = async {
            loop {
                self.round(deployments, &heartbeat).await;
                heartbeat.beat();
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = rounds => {}
        }
        heartbeat.retire();
    }

    async fn round(&self, deployments: &Cache<Deployment>, heartbeat: &Heartbeat) {
        let objects = deployments.state();
        let there: Vec<_> = objects.iter().filter_map(|o| o.0.as_ref().ok()).collect();
        let keys: HashSet<_> = there.iter().map(|deployment| key_of(deployment)).collect();
        self.answers().retain(|key, _| keys.contains(key));
        for deployment in there {
            let key = key_of(deployment);
            heartbeat.beat();
            let denied = match tokio::time::timeout(TIME_LIMIT, self.ask(&key)).await {
                Ok(Ok(denied)) => denied,
                Ok(Err(error)) => {
                    debug!(%key, "what policies say of it is not known: {}", error_chain(&error));
                    continue;
                }
                Err(_) => {
                    debug!(%key, "what policies say of it is not known: no answer in time");
                    continue;
                }
            };
            let before = self.denied(&key, deployment);
            let answer = Answer {
                uid: deployment.metadata.uid.clone(),
                generation: deployment.metadata.generation,
                denied,
            };
            let news = answer.denied != before;
            self.answers().insert(key.clone(), answer);
            if news {
                self.wake.wake(key);
            }
        }
    }

    /// Writes nothing: a dry run, of a status to which nothing is changed.
    async fn ask(&self, key: &Key) -> Result<Option<String>, kube::Error> {
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), &key.namespace);
        let parameters = PatchParams {
            dry_run: true,
            ..PatchParams::default()
        };
        let nothing = Patch::Merge(json!({}));
        match api.patch_status(&key.name, &parameters, &nothing).await {
            Ok(_) => Ok(None),
            Err(kube::Error::Api(status)) if status.code == 403 => Ok(denial(&status.message)),
            Err(error) => Err(error),
        }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<Key, Answer>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key_of(deployment: &Deployment) -> Key {
    Key {
        namespace: deployment.namespace().unwrap_or_default(),
        name: deployment.name_any(),
    }
}

/// What the status says of this very spec.
fn said_before(deployment: &Deployment) -> Option<String> {
    let status = deployment.status.as_ref()?;
    let stalled = status.conditions.iter().find(|c| c.type_ == STALLED)?;
    let denied = stalled.status == "True"
        && stalled.reason == Reason::PolicyDenied.as_str()
        && stalled.observed_generation == deployment.metadata.generation;
    denied.then(|| stalled.message.clone())
}

/// What a policy has to say, out of the API server's words for it; nothing where no policy speaks, such as where
/// the controller has not the right to ask.
fn denial(message: &str) -> Option<String> {
    let (_, why) = message.split_once(" denied request: ")?;
    Some(format!(
        "{}. It was taken when it was written: what runs goes on, and nothing new is started",
        why.trim_end_matches('.')
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::testing::deployment_spec;

    #[test]
    fn what_a_policy_says_is_told_and_what_the_api_server_says_for_itself_is_not() {
        let said = "deployments.kari.dev \"shop\" is forbidden: ValidatingAdmissionPolicy 'kari-tenants' with binding 'kari-tenants-again' denied request: the namespace web may not deploy";
        let message = denial(said).unwrap_or_default();
        assert!(
            message.starts_with("the namespace web may not deploy. It was taken"),
            "{message}"
        );
        let said = "deployments.kari.dev \"shop\" is forbidden: User \"x\" cannot patch resource \"deployments/status\"";
        assert_eq!(denial(said), None);
    }

    #[test]
    fn until_it_is_asked_about_a_spec_is_denied_as_its_status_says_and_a_new_one_is_not() {
        let status = |reason: &str, status: &str| {
            serde_json::from_value(json!({
                "observedGeneration": 3,
                "conditions": [{
                    "type": "Stalled", "status": status, "reason": reason, "message": "no",
                    "observedGeneration": 3, "lastTransitionTime": "2026-01-01T00:00:00Z",
                }],
            }))
            .unwrap_or_else(|e| panic!("{e}"))
        };
        let mut deployment = Deployment::new("shop", deployment_spec());
        deployment.metadata.generation = Some(3);
        assert_eq!(said_before(&deployment), None);
        deployment.status = Some(status("PolicyDenied", "True"));
        assert_eq!(said_before(&deployment).as_deref(), Some("no"));
        deployment.metadata.generation = Some(4);
        assert_eq!(said_before(&deployment), None, "it was taken just now");
        deployment.metadata.generation = Some(3);
        deployment.status = Some(status("BuildFailed", "True"));
        assert_eq!(said_before(&deployment), None);
        deployment.status = Some(status("PolicyDenied", "False"));
        assert_eq!(said_before(&deployment), None);
    }
}
