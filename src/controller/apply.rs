//! Carries a plan out: the history, then the status, then Releases with removals first, then what the
//! history has no room for.
//!
//! Invariants: every write names what it was planned from (POST for what is new, Apply with uid *and*
//! resourceVersion, delete with both as preconditions), never an upsert. A write that is refused because
//! something has changed drops the decision. The status, and with it every slot, stands before the first
//! Release is written.

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

use crate::api::names::RevisionName;
use crate::api::{
    ANNOTATION_RETRY, Deployment, GROUP, LABEL_DEPLOYMENT, RELEASE_FINALIZER, Release, ReleaseSpec,
    VERSION,
};

use super::observe::observed_revision;
use super::observed::{ObservedDeployment, ObservedRevision, RevisionData};
use super::plan::{Plan, RevisionStep};
use super::revision::same_content;
use super::rollout::Step;
use super::sealing::sealed;
use crate::seal::SealError;

/// Owns what the controller writes.
pub const FIELD_MANAGER: &str = "kari-controller";

/// Why a write was not made.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// What it was planned from has changed: the decision is dropped, and what is there is observed anew.
    #[error("the object has changed meanwhile")]
    Changed,
    /// The object, or its namespace, is going away: there is nothing to do.
    #[error("the object or its namespace is being deleted")]
    Gone,
    /// Something else has the name of a revision.
    #[error(
        "the ControllerRevision {0} is not Kari's, and has the name of one; rename or delete it"
    )]
    NameTaken(RevisionName),
    /// The body could not be made; a fault of the program.
    #[error("the body of a write could not be made")]
    Body(#[source] serde_json::Error),
    /// A secret could not be sealed.
    #[error("a secret was not sealed")]
    Seal(#[from] SealError),
    /// The API server.
    #[error("the API server refused a write")]
    Api(#[source] Box<kube::Error>),
}

/// Sorts what the API server answers.
pub fn refused(error: kube::Error) -> Refused {
    tracing::debug!("a write was refused: {error}");
    if let kube::Error::Api(status) = &error {
        // 422 for an Apply with another uid: the object of that name is a new one.
        let other_uid = status.code == 422 && status.message.contains("uid");
        if status.code == 409 || other_uid {
            return Refused::Changed;
        }
        let terminating = status.code == 403
            && (status.message.contains("being terminated")
                || status.message.contains("being deleted"));
        if status.code == 404 || terminating {
            return Refused::Gone;
        }
    }
    Refused::Api(Box::new(error))
}

/// What was carried out, also where not all of it could be.
#[derive(Debug, Default)]
pub struct Applied {
    /// The status was written, and the object has another version for it.
    pub status: bool,
    /// The Releases that have another version now, by name, with the version that was written over; none
    /// where there was no such Release.
    pub releases: Vec<(String, Option<String>)>,
    /// Decisions on Releases were dropped, and are to be taken anew.
    pub dropped: bool,
    /// Why a Release could not be written.
    pub failed: Option<Refused>,
}

/// Carries `plan` out for the Deployment that it was made for.
pub async fn apply(
    client: &Client,
    deployment: &ObservedDeployment,
    plan: &Plan,
) -> Result<Applied, Refused> {
    let writer = Writer { client, deployment };
    if let Some(step) = &plan.revision {
        writer.write_revision(step).await?;
    }
    let differs = plan.status != deployment.status;
    let mut applied = Applied {
        status: differs && writer.write_status(plan).await? != deployment.resource_version,
        ..Applied::default()
    };
    for step in &plan.steps {
        // One Release does not keep the others waiting.
        match writer.write_release(step).await {
            Ok(Some(over)) => applied.releases.push(over),
            Ok(None) => {}
            Err(Refused::Changed) => applied.dropped = true,
            Err(Refused::Gone) if matches!(step, Step::Delete { .. }) => {}
            Err(error) => applied.failed = Some(error),
        }
    }
    if !applied.dropped && applied.failed.is_none() {
        for revision in &plan.surplus {
            if let Err(error) = writer.delete_revision(revision).await {
                applied.failed = Some(error);
            }
        }
    }
    Ok(applied)
}

/// Creates a ControllerRevision whose `data` the API server will later find unchanged.
///
/// `data` is immutable and compared byte by byte, but a patch of any other field makes the API server write
/// it anew in Go's notation, in which `<`, `>`, `&` and two line separators are escaped: a patch of a history
/// with `>` in a build script was refused for ever (422, seen). So it is written in that notation from the first.
async fn create_revision(
    api: &Api<ControllerRevision>,
    params: &PostParams,
    object: &ControllerRevision,
) -> Result<Result<ControllerRevision, kube::Error>, Refused> {
    let body = as_go_writes(&serde_json::to_string(object).map_err(Refused::Body)?);
    let request = kube::core::Request::new(api.resource_url())
        .create(params, body.into_bytes())
        .map_err(|error| Refused::Api(Box::new(kube::Error::BuildRequest(error))))?;
    Ok(api.clone().into_client().request(request).await)
}

/// JSON in the notation of Go's encoder. The characters stand only within strings, where an escape means
/// the same.
fn as_go_writes(json: &str) -> String {
    json.replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

struct Writer<'a> {
    client: &'a Client,
    deployment: &'a ObservedDeployment,
}

impl Writer<'_> {
    fn owner(&self) -> OwnerReference {
        OwnerReference {
            api_version: format!("{GROUP}/{VERSION}"),
            kind: "Deployment".to_owned(),
            name: self.deployment.name.clone(),
            uid: self.deployment.uid.clone(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }
    }

    fn labels(&self) -> Value {
        json!({LABEL_DEPLOYMENT: self.deployment.name})
    }

    /// Writes the status, and returns the object's version after it.
    async fn write_status(&self, plan: &Plan) -> Result<String, Refused> {
        let deployment = self.deployment;
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), &deployment.namespace);
        let body = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": "Deployment",
            "metadata": {
                "name": deployment.name,
                "uid": deployment.uid,
                "resourceVersion": deployment.resource_version,
            },
            "status": plan.status,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        api.patch_status(&deployment.name, &params, &Patch::Apply(&body))
            .await
            .map(|written| written.resource_version().unwrap_or_default())
            .map_err(refused)
    }

    /// Writes a Release, and returns its name with the version that was written over, if it has another now.
    async fn write_release(
        &self,
        step: &Step,
    ) -> Result<Option<(String, Option<String>)>, Refused> {
        let api: Api<Release> = Api::namespaced(self.client.clone(), &self.deployment.namespace);
        match step {
            Step::Delete {
                name,
                uid,
                resource_version,
            } => {
                let params = deletion(uid, resource_version);
                api.delete(name, &params).await.map_err(refused)?;
                Ok(Some((name.clone(), Some(resource_version.clone()))))
            }
            Step::Create {
                name,
                spec,
                unsealed,
                retry,
            } => {
                let spec = sealed(&self.deployment.namespace, name, spec, unsealed)?;
                let release: Release =
                    serde_json::from_value(self.release(name, None, &spec, retry.as_ref()))
                        .map_err(Refused::Body)?;
                let params = PostParams {
                    field_manager: Some(FIELD_MANAGER.to_owned()),
                    ..PostParams::default()
                };
                api.create(&params, &release).await.map_err(refused)?;
                Ok(Some((name.clone(), None)))
            }
            Step::Update {
                name,
                uid,
                resource_version,
                spec,
                unsealed,
                retry,
            } => {
                let read = Some((uid, resource_version));
                let spec = sealed(&self.deployment.namespace, name, spec, unsealed)?;
                let body = self.release(name, read, &spec, retry.as_ref());
                let params = PatchParams::apply(FIELD_MANAGER).force();
                let written = api
                    .patch(name, &params, &Patch::Apply(&body))
                    .await
                    .map_err(refused)?;
                let changed = written.resource_version().as_ref() != Some(resource_version);
                Ok(changed.then(|| (name.clone(), Some(resource_version.clone()))))
            }
        }
    }

    fn release(
        &self,
        name: &str,
        read: Option<(&String, &String)>,
        spec: &ReleaseSpec,
        retry: Option<&String>,
    ) -> Value {
        let mut body = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": "Release",
            "metadata": {
                "name": name,
                "namespace": self.deployment.namespace,
                "labels": self.labels(),
                "finalizers": [RELEASE_FINALIZER],
                "ownerReferences": [self.owner()],
            },
            "spec": spec,
        });
        if let Some((uid, resource_version)) = read {
            body["metadata"]["uid"] = json!(uid);
            body["metadata"]["resourceVersion"] = json!(resource_version);
        }
        if let Some(retry) = retry {
            body["metadata"]["annotations"] = json!({ANNOTATION_RETRY: retry});
        }
        body
    }

    fn revisions(&self) -> Api<ControllerRevision> {
        Api::namespaced(self.client.clone(), &self.deployment.namespace)
    }

    async fn write_revision(&self, step: &RevisionStep) -> Result<(), Refused> {
        let api = self.revisions();
        match step {
            RevisionStep::Create { name, number, data } => {
                let object = ControllerRevision {
                    metadata: ObjectMeta {
                        name: Some(name.to_string()),
                        namespace: Some(self.deployment.namespace.clone()),
                        labels: Some(
                            [(LABEL_DEPLOYMENT.to_owned(), self.deployment.name.clone())].into(),
                        ),
                        owner_references: Some(vec![self.owner()]),
                        ..ObjectMeta::default()
                    },
                    revision: *number,
                    data: Some(RawExtension(
                        serde_json::to_value(data).map_err(Refused::Body)?,
                    )),
                };
                let params = PostParams {
                    field_manager: Some(FIELD_MANAGER.to_owned()),
                    ..PostParams::default()
                };
                match create_revision(&api, &params, &object).await? {
                    Ok(_) => Ok(()),
                    Err(kube::Error::Api(status)) if status.is_already_exists() => {
                        self.take_on_revision(name, data).await
                    }
                    Err(error) => Err(refused(error)),
                }
            }
            RevisionStep::Renumber {
                name,
                uid,
                resource_version,
                number,
            } => {
                let body = json!({
                    "apiVersion": "apps/v1",
                    "kind": "ControllerRevision",
                    "metadata": {
                        "name": name,
                        "uid": uid,
                        "resourceVersion": resource_version,
                        "labels": self.labels(),
                        "ownerReferences": [self.owner()],
                    },
                    "revision": number,
                });
                let params = PatchParams::apply(FIELD_MANAGER).force();
                api.patch(name.as_str(), &params, &Patch::Apply(&body))
                    .await
                    .map(|_| ())
                    .map_err(refused)
            }
        }
    }

    /// A revision of the name exists that the history does not show: the cache is behind, or an earlier
    /// Deployment of the name left it behind.
    async fn take_on_revision(
        &self,
        name: &RevisionName,
        data: &RevisionData,
    ) -> Result<(), Refused> {
        let api = self.revisions();
        let object = api.get(name.as_str()).await.map_err(refused)?;
        if object.metadata.deletion_timestamp.is_some() {
            return Err(Refused::Changed);
        }
        let found = observed_revision(&object);
        let same = found.data.as_ref().is_some_and(|d| same_content(d, data));
        let owner = object
            .owner_references()
            .iter()
            .find(|owner| owner.controller == Some(true));
        match owner {
            Some(owner) if owner.uid == self.deployment.uid && same => Ok(()),
            // The garbage collector takes it: its owner is gone, or soon is.
            Some(owner) if owner.kind == "Deployment" && owner.api_version.starts_with(GROUP) => {
                Err(Refused::Changed)
            }
            None if same => self.write_revision_owner(&found).await,
            Some(_) | None => Err(Refused::NameTaken(name.clone())),
        }
    }

    async fn write_revision_owner(&self, found: &ObservedRevision) -> Result<(), Refused> {
        let body = json!({
            "metadata": {
                "uid": found.uid,
                "resourceVersion": found.resource_version,
                "labels": self.labels(),
                "ownerReferences": [self.owner()],
            },
        });
        self.revisions()
            .patch(
                found.name.as_str(),
                &PatchParams::default(),
                &Patch::Merge(&body),
            )
            .await
            .map(|_| ())
            .map_err(refused)
    }

    async fn delete_revision(&self, revision: &ObservedRevision) -> Result<(), Refused> {
        let params = deletion(&revision.uid, &revision.resource_version);
        match self
            .revisions()
            .delete(revision.name.as_str(), &params)
            .await
            .map_err(refused)
        {
            Ok(_) | Err(Refused::Gone | Refused::Changed) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn deletion(uid: &str, resource_version: &str) -> DeleteParams {
    DeleteParams {
        preconditions: Some(Preconditions {
            uid: Some(uid.to_owned()),
            resource_version: Some(resource_version.to_owned()),
        }),
        ..DeleteParams::background()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_is_written_as_go_writes_it_and_means_the_same() {
        let text = json!({"run": "a < b > c && d \u{2028}"});
        let written = as_go_writes(&text.to_string());
        assert_eq!(
            written,
            r#"{"run":"a \u003c b \u003e c \u0026\u0026 d \u2028"}"#
        );
        assert_eq!(serde_json::from_str::<Value>(&written).ok(), Some(text));
    }
}
