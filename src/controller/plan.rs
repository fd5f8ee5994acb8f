//! From what was observed to what is done: one pure, total, deterministic function.
//!
//! Invariants: the plan of the same observation is the same plan; a plan that has been carried out and
//! observed plans nothing. `rollout` decides on nodes, `status` finds the words, `revision` the names;
//! this puts them together.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::api::DeploymentStatus;
use crate::api::conditions::{conditions, cut};
use crate::api::deployment::{
    BlockedRevision, GitSource, LastHandled, NodeCounts, Progress, ResolvedSource,
};
use crate::api::names::{Commit, NodeName, RevisionName};

use super::check::{check, check_policies};
use super::observed::{
    FailureClass, Observed, ObservedNode, ObservedRevision, Outcome, RevisionData,
};
use super::rollout::{HELD_UP_LIMIT, Input, Rollout, Step, Wanted, all_held_up, decide};
use super::sealing::SecretValue;
use super::status::{Facts, count, statements};
use super::{references, revision};

/// Blocked revisions that the status names at most; the newest.
const BLOCKED_REVISIONS_KEPT: usize = 5;

/// Bytes of a blocked revision's message at most: five of them stand in one status.
const BLOCKED_MESSAGE_LIMIT: usize = 1024;

/// What is done, in the order of the fields.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Makes the ControllerRevision of the wanted content, or makes it the newest again.
    pub revision: Option<RevisionStep>,
    /// The status; written, if it differs, before any Release.
    pub status: DeploymentStatus,
    /// Writes to Releases, removals first.
    pub steps: Vec<Step>,
    /// Nodes that give their slot back.
    pub giving_back: BTreeSet<NodeName>,
    /// Revisions that the history has no room for.
    pub surplus: Vec<ObservedRevision>,
    /// When time alone changes the plan.
    pub look_again: Option<Duration>,
}

/// What is done to the history before anything names the revision.
#[derive(Clone, Debug, PartialEq)]
pub enum RevisionStep {
    /// Makes a ControllerRevision.
    Create {
        /// Its name.
        name: RevisionName,
        /// Its number.
        number: i64,
        /// What it holds.
        data: Box<RevisionData>,
    },
    /// Makes an old one the newest.
    Renumber {
        /// Its name.
        name: RevisionName,
        /// Its identity.
        uid: String,
        /// As it was read.
        resource_version: String,
        /// Its number from now on.
        number: i64,
    },
}

/// Plans what to do for one Deployment that is not being deleted.
pub fn plan(observed: &Observed, now: Timestamp) -> Plan {
    let deployment = &observed.deployment;
    let before = &deployment.status;
    let checked = check(&deployment.spec, observed.insecure_source_schemes).and_then(|source| {
        check_policies(observed.denied.as_deref())?;
        Ok(source)
    });
    let source = checked.as_ref().ok().copied();
    let credentials = references::credentials(&deployment.spec, &observed.contents);
    let environment = references::resolve(&deployment.spec, &observed.contents);
    let unresolved = environment.as_ref().err().or(credentials.as_ref().err());
    let environment = match unresolved {
        Some(failure) => Err(failure.clone()),
        None => environment,
    };
    let credentials = references::known_credentials(&deployment.spec, &observed.contents);
    let data = source.and_then(|source| match &environment {
        Ok(environment) => {
            let (commit, reference) = wanted_commit(observed, source)?;
            let environment = environment.clone();
            let template = revision::render(&deployment.spec, source, reference, environment);
            Some(RevisionData { commit, template })
        }
        Err(_) => held(observed, source),
    });
    let sealed = environment.as_ref().ok().and_then(|e| e.sealed.clone());
    let wanted = data.map(|data| Wanted {
        revision: revision::name(&deployment.name, &data, &observed.revisions),
        secrets: SecretValue::env(&data.template, sealed)
            .into_iter()
            .chain(credentials)
            .collect(),
        data,
    });

    let retried = deployment.retry.is_some() && deployment.retry != handled_retry(before);
    let retry = deployment.retry.clone().or_else(|| handled_retry(before));
    let mut blocked = if retried {
        Vec::new()
    } else {
        before.blocked_revisions.clone()
    };
    if let Some(wanted) = &wanted {
        block_what_failed(observed, wanted, retry.as_deref(), &mut blocked);
    }
    let block = wanted
        .as_ref()
        .and_then(|w| blocked.iter().find(|b| b.revision == w.revision.as_str()));
    let invalid = wanted
        .as_ref()
        .and_then(|w| refused_by_a_node(observed, w, retry.as_deref()));

    let same_rollout =
        before.revision.as_deref() == wanted.as_ref().map(|w| w.revision.as_str()) && !retried;
    let rollout = decide(&Input {
        observed,
        wanted: wanted.as_ref(),
        blocked: block.is_some() || invalid.is_some(),
        overdue: same_rollout && overdue(before.progress.as_ref(), now),
        retry: retry.as_deref(),
    });

    let revision = wanted
        .as_ref()
        .map(|w| w.revision.to_string())
        .or_else(|| before.revision.clone());
    let counts = count(observed, revision.as_deref());
    let facts = Facts {
        observed,
        refusal: checked.as_ref().err(),
        unresolved: environment.as_ref().err(),
        wanted: wanted.as_ref(),
        counts: &counts,
        rollout: &rollout,
        blocked: block,
        invalid,
    };
    let progress = (facts.rolling() && block.is_none() && invalid.is_none())
        .then(|| progress(observed, &rollout, &counts, same_rollout, now));
    let last_good_revision = match &wanted {
        Some(wanted) if facts.all_serve() => Some(wanted.revision.to_string()),
        Some(_) | None => before.last_good_revision.clone(),
    };
    let conditions = conditions(
        &statements(&facts),
        deployment.generation,
        &before.conditions,
        now,
    );
    let look_again = look_again(observed, progress.as_ref(), now);
    let status = DeploymentStatus {
        observed_generation: deployment.generation,
        conditions,
        source: resolved(source, wanted.as_ref()).or_else(|| before.source.clone()),
        revision,
        last_good_revision,
        blocked_revisions: blocked,
        nodes: Some(counts),
        active: rollout.active.iter().map(NodeName::to_string).collect(),
        progress,
        last_handled: last_handled(observed, retry),
    };
    Plan {
        revision: wanted
            .as_ref()
            .and_then(|w| revision_step(w, &observed.revisions)),
        surplus: surplus(observed, wanted.as_ref(), &status),
        status,
        steps: rollout.steps,
        giving_back: rollout.giving_back,
        look_again,
    }
}

/// The commit that is wanted, and the reference that it was found at: the one that the spec names, the last answer
/// of the source, or what the same url and reference stood for before: a source that cannot be asked changes nothing.
fn wanted_commit(observed: &Observed, source: &GitSource) -> Option<(Commit, Option<String>)> {
    if let Some(commit) = revision::named_commit(source) {
        return Some((commit, None));
    }
    let reference = source.reference.as_ref();
    match &observed.lookup.outcome {
        Outcome::Found(commit) => Some((commit.clone(), revision::full_reference(reference))),
        Outcome::FoundTag(tag, commit) => Some((commit.clone(), Some(tag.clone()))),
        Outcome::Pending | Outcome::Failed(_) => {
            let before = observed.deployment.status.source.as_ref()?;
            let same =
                before.url == source.url && revision::may_stand_for(reference, &before.reference);
            let commit = Commit::parse(&before.commit).ok().filter(|_| same)?;
            Some((commit, Some(before.reference.clone())))
        }
    }
}

/// The revision that stands, if the spec could be it but for what its references hold: one that cannot be resolved
/// changes nothing.
fn held(observed: &Observed, source: &GitSource) -> Option<RevisionData> {
    let deployment = &observed.deployment;
    let revision = deployment.status.revision.as_deref()?;
    let found = observed
        .revisions
        .iter()
        .find(|r| r.name.as_str() == revision)?;
    let held = found.data.as_ref()?;
    let environment = references::held(&deployment.spec, &held.template)?;
    let reference = held.template.source.reference.clone();
    let data = RevisionData {
        commit: held.commit.clone(),
        template: revision::render(&deployment.spec, source, reference, environment),
    };
    let same = held.template.source.url == source.url && revision::same_content(&data, held);
    same.then_some(data)
}

fn resolved(source: Option<&GitSource>, wanted: Option<&Wanted>) -> Option<ResolvedSource> {
    let (source, wanted) = (source?, wanted?);
    let RevisionData { commit, template } = &wanted.data;
    Some(ResolvedSource {
        url: source.url.clone(),
        reference: template
            .source
            .reference
            .clone()
            .unwrap_or_else(|| commit.to_string()),
        commit: commit.to_string(),
        short_commit: commit.short().to_owned(),
    })
}

/// Blocks the wanted revision when a node says that it is at fault. A failure from before the last retry
/// says nothing: the node has not had its next attempt yet.
fn block_what_failed(
    observed: &Observed,
    wanted: &Wanted,
    retry: Option<&str>,
    blocked: &mut Vec<BlockedRevision>,
) {
    if blocked
        .iter()
        .any(|b| b.revision == wanted.revision.as_str())
    {
        return;
    }
    let failed =
        failures(observed, wanted, retry).find(|(_, _, class)| *class == FailureClass::Revision);
    if let Some((node, failure, _)) = failed {
        blocked.insert(
            0,
            BlockedRevision {
                revision: wanted.revision.to_string(),
                commit: wanted.data.commit.to_string(),
                node: node.name.to_string(),
                reason: failure.reason.clone(),
                message: cut(&failure.message, BLOCKED_MESSAGE_LIMIT).to_owned(),
            },
        );
        blocked.truncate(BLOCKED_REVISIONS_KEPT);
    }
}

/// A node on which the object, not the revision, is at fault, as it stands now.
fn refused_by_a_node<'a>(
    observed: &'a Observed,
    wanted: &Wanted,
    retry: Option<&str>,
) -> Option<(&'a ObservedNode, &'a crate::api::release::Failure)> {
    failures(observed, wanted, retry)
        .find(|(node, _, class)| {
            let release = node.release.as_ref();
            let is_as_told = release.is_some_and(|r| r.spec.template == wanted.data.template);
            *class == FailureClass::Invalid && is_as_told
        })
        .map(|(node, failure, _)| (node, failure))
}

fn failures<'a>(
    observed: &'a Observed,
    wanted: &Wanted,
    retry: Option<&str>,
) -> impl Iterator<
    Item = (
        &'a ObservedNode,
        &'a crate::api::release::Failure,
        FailureClass,
    ),
> {
    observed
        .nodes
        .iter()
        .filter(|node| node.matches())
        .filter_map(move |node| {
            let release = node.release.as_ref().filter(|release| {
                !release.deleting
                    && release.spec.revision == wanted.revision.as_str()
                    && release.retry.as_deref() == retry
            })?;
            release
                .failed()
                .map(|(failure, class)| (node, failure, class))
        })
}

fn handled_retry(status: &DeploymentStatus) -> Option<String> {
    status.last_handled.as_ref().and_then(|h| h.retry.clone())
}

fn last_handled(observed: &Observed, retry: Option<String>) -> Option<LastHandled> {
    let before = observed
        .deployment
        .status
        .last_handled
        .clone()
        .unwrap_or_default();
    let requested = &observed.deployment.requested_at;
    let answered = requested.is_some() && observed.lookup.answered_request == *requested;
    let handled = LastHandled {
        requested_at: if answered {
            requested.clone()
        } else {
            before.requested_at
        },
        retry,
    };
    (handled != LastHandled::default()).then_some(handled)
}

fn overdue(progress: Option<&Progress>, now: Timestamp) -> bool {
    let Some(Progress {
        deadline: Some(deadline),
        paused_at: None,
    }) = progress
    else {
        return false;
    };
    parse(deadline).is_some_and(|deadline| deadline <= now)
}

/// The deadline's clock: anew with every progress, standing still while all that goes on is held up by
/// something that is not the Deployment's fault.
fn progress(
    observed: &Observed,
    rollout: &Rollout,
    counts: &NodeCounts,
    same_rollout: bool,
    now: Timestamp,
) -> Progress {
    let status = &observed.deployment.status;
    let strategy = observed
        .deployment
        .spec
        .strategy
        .clone()
        .unwrap_or_default();
    let available_before = status.nodes.as_ref().map_or(0, |n| n.available);
    let moved = !same_rollout
        || counts.available > available_before
        || !rollout
            .active
            .iter()
            .map(NodeName::as_str)
            .eq(status.active.iter().map(String::as_str));
    let paused = all_held_up(observed, &rollout.active);

    let before = status.progress.clone().unwrap_or_default();
    let deadline = before.deadline.as_deref().and_then(parse);
    let paused_at = before.paused_at.as_deref().and_then(parse);
    let anew = now + SignedDuration::from_secs(i64::from(strategy.progress_deadline_seconds));
    let (deadline, paused_at) = match deadline.filter(|_| !moved) {
        None => (anew, paused.then_some(now)),
        Some(deadline) => match (paused_at, paused) {
            (Some(since), true) => (deadline, Some(since)),
            (None, true) => (deadline, Some(now)),
            (Some(since), false) => (deadline + now.duration_since(since), None),
            (None, false) => (deadline, None),
        },
    };
    Progress {
        deadline: Some(write(deadline)),
        paused_at: paused_at.map(write),
    }
}

fn parse(time: &str) -> Option<Timestamp> {
    time.parse().ok()
}

/// RFC 3339 in whole seconds.
fn write(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second())
        .unwrap_or(time)
        .to_string()
}

fn look_again(
    observed: &Observed,
    progress: Option<&Progress>,
    now: Timestamp,
) -> Option<Duration> {
    let deadline = progress
        .filter(|p| p.paused_at.is_none())
        .and_then(|p| p.deadline.as_deref())
        .and_then(parse)
        .map(|deadline| deadline.duration_since(now))
        .and_then(|left| Duration::try_from(left).ok());
    let held_up = observed
        .nodes
        .iter()
        .filter_map(|node| node.release.as_ref()?.held_up_for)
        .filter_map(|held| HELD_UP_LIMIT.checked_sub(held));
    deadline
        .into_iter()
        .chain(held_up)
        .min()
        .map(|left| left + LOOK_AGAIN_MARGIN)
}

/// Added to a timer, so that what it waits for has happened when it fires: times are whole seconds.
const LOOK_AGAIN_MARGIN: Duration = Duration::from_secs(1);

fn revision_step(wanted: &Wanted, history: &[ObservedRevision]) -> Option<RevisionStep> {
    let newest = history.iter().map(|r| r.number).max();
    match history.iter().find(|r| r.name == wanted.revision) {
        None => Some(RevisionStep::Create {
            name: wanted.revision.clone(),
            number: revision::next_number(history),
            data: Box::new(wanted.data.clone()),
        }),
        Some(found) if Some(found.number) < newest => Some(RevisionStep::Renumber {
            name: found.name.clone(),
            uid: found.uid.clone(),
            resource_version: found.resource_version.clone(),
            number: revision::next_number(history),
        }),
        Some(_) => None,
    }
}

fn surplus(
    observed: &Observed,
    wanted: Option<&Wanted>,
    status: &DeploymentStatus,
) -> Vec<ObservedRevision> {
    if wanted.is_none() {
        return Vec::new();
    }
    let mut needed: BTreeSet<String> = [&status.revision, &status.last_good_revision]
        .into_iter()
        .flatten()
        .cloned()
        .collect();
    for release in observed.nodes.iter().filter_map(|n| n.release.as_ref()) {
        needed.insert(release.spec.revision.clone());
        needed.extend(release.spec.retain.iter().cloned());
        needed.extend(release.status.serving.iter().map(|s| s.revision.clone()));
    }
    revision::surplus(
        &observed.revisions,
        &needed,
        observed.deployment.spec.revision_history_limit,
    )
    .into_iter()
    .cloned()
    .collect()
}

#[cfg(test)]
mod rules;
#[cfg(test)]
mod tests;
