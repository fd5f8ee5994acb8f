//! From a Release to what is wanted: parsed once, here, into what the planner
//! can take as valid.

use std::collections::BTreeSet;

use kube::core::DeserializeGuard;
use kube::{Resource, ResourceExt};

use super::host::mirror::{CredentialId, SourceUrl, Want};
use super::host::proxy::{HostName, RoutePath};
use super::host::records::{AppliedRecord, AttemptRecord, RecordedFailure, Wish};
use super::view::Wanted;
use crate::api::Release;
use crate::api::deployment::DeletionPolicy;
use crate::api::names::{AppName, Commit, NodeName, ReleaseId, RevisionName, release_name};
use crate::api::reasons::Reason;
use crate::api::release::{OnDelete, Purpose, SealedValue, Template};

/// The app that a Release on this node is about; nothing for one that is another node's or cannot be told.
pub fn app_of(object: &DeserializeGuard<Release>, node: &NodeName) -> Option<AppName> {
    let namespace = object.namespace()?;
    match &object.0 {
        Ok(release) if release.spec.node_name == node.as_str() => {
            AppName::new(&namespace, &release.spec.deployment).ok()
        }
        Ok(_) => None,
        // It cannot be decoded, but its name tells the Deployment's where it is well formed.
        Err(_) => {
            let name = object.name_any();
            let deployment = name.rsplit_once('-')?.0;
            (release_name(deployment, node) == name)
                .then(|| AppName::new(&namespace, deployment).ok())
                .flatten()
        }
    }
}

/// What a Release wants.
pub fn wanted(object: &DeserializeGuard<Release>) -> Wanted {
    if object.meta().deletion_timestamp.is_some() {
        return farewell(object);
    }
    let release = match &object.0 {
        Ok(release) => release,
        Err(error) => {
            return invalid(
                ReleaseId(uuid::Uuid::nil()),
                format!(
                    "this version of Kari cannot read the Release: {}",
                    error.error
                ),
            );
        }
    };
    match wish(release) {
        Ok(wish) => Wanted::Release(Box::new(wish)),
        Err(message) => invalid(release.spec.release_id, message),
    }
}

/// What becomes of the app whose Release is deleted. Where the Release cannot be read nothing that could
/// be missed is deleted.
fn farewell(object: &DeserializeGuard<Release>) -> Wanted {
    let Ok(release) = &object.0 else {
        return Wanted::Removal { keep_state: true };
    };
    match (
        release.spec.on_delete,
        release.spec.template.deletion_policy,
    ) {
        (OnDelete::KeepState, _) => Wanted::Removal { keep_state: true },
        (OnDelete::Orphan, _) | (OnDelete::FollowPolicy, DeletionPolicy::Orphan) => Wanted::Orphan,
        (OnDelete::FollowPolicy, DeletionPolicy::Delete) => Wanted::Removal { keep_state: false },
    }
}

fn invalid(release_id: ReleaseId, message: String) -> Wanted {
    Wanted::Invalid {
        release_id,
        failure: RecordedFailure {
            reason: Reason::InvalidSpec,
            message,
            log_tail: None,
        },
    }
}

fn wish(release: &Release) -> Result<Wish, String> {
    let spec = &release.spec;
    let namespace = release.namespace().unwrap_or_default();
    let app = AppName::new(&namespace, &spec.deployment).map_err(|error| error.to_string())?;
    let commit = Commit::parse(&spec.commit).map_err(|error| error.to_string())?;
    SourceUrl::parse(&spec.template.source.url).map_err(|error| error.to_string())?;
    check_routes(&spec.template)?;
    let owner = release
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true));
    Ok(Wish {
        app,
        deployment_uid: owner.map(|owner| owner.uid.clone()),
        release_id: spec.release_id,
        attempt: spec.attempt,
        generation: release.metadata.generation.unwrap_or_default(),
        revision: RevisionName::new(spec.revision.clone()),
        commit,
        template: spec.template.clone(),
        retain: spec
            .retain
            .iter()
            .map(|revision| RevisionName::new(revision.clone()))
            .collect(),
        sealed: spec.sealed.clone(),
    })
}

/// What the mirror is asked for; nothing where the url is none, which no wish has.
pub fn source_want(attempt: &AttemptRecord, applied: Option<&AppliedRecord>) -> Option<Want> {
    let Wish {
        commit, template, ..
    } = &attempt.wish;
    Some(Want {
        source: SourceUrl::parse(&template.source.url).ok()?,
        reference: template.source.reference.clone(),
        commit: commit.clone(),
        base: rewind_base(attempt, applied).cloned(),
        submodules: template.source.submodules,
        credential: credential_id(&attempt.wish.app, &attempt.wish.sealed),
    })
}

/// What a release's repository is read with.
pub fn credential_id(app: &AppName, sealed: &[SealedValue]) -> Option<CredentialId> {
    let git = sealed.iter().find(|s| s.purpose == Purpose::Git)?;
    Some(CredentialId {
        namespace: app.namespace().to_owned(),
        digest: git.digest.clone(),
    })
}

/// The commit that the attempt's must descend from; nothing where any will do.
pub fn rewind_base<'a>(
    attempt: &AttemptRecord,
    applied: Option<&'a AppliedRecord>,
) -> Option<&'a Commit> {
    let running = &applied?.release.as_ref()?.commit;
    let is_bound = !attempt.wish.template.source.allow_rewind && *running != attempt.wish.commit;
    is_bound.then_some(running)
}

/// The proxy takes host names and paths as they are, and each path of a host once.
fn check_routes(template: &Template) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    let routes = template
        .processes
        .iter()
        .filter_map(|process| process.route.as_ref());
    for route in routes {
        let path = RoutePath::parse(&route.path).map_err(|error| error.to_string())?;
        for host in &route.hosts {
            let host = HostName::parse(host).map_err(|error| error.to_string())?;
            if !seen.insert((host.clone(), path.clone())) {
                return Err(format!("two processes route {host} with the path {path}"));
            }
        }
    }
    Ok(())
}
