//! What a Release's status says of what was observed and planned. Pure.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use super::host::proxy::{RouteTarget, VirtualHost};
use super::host::records::{Outcome, RecordedFailure};
use super::host::store::LOG_TAIL_BYTES;
use super::plan::{Plan, Progress, committed, committed_virtual_host};
use super::view::{Activity, Health, Observed, Wanted};
use crate::api::ReleaseStatus;
use crate::api::conditions::{DRIFTED, READY, Statement, conditions, cut};
use crate::api::names::ReleaseId;
use crate::api::reasons::Reason;
use crate::api::release::{AttemptStatus, Failure, Phase, QueuePosition, Serving, ServingProcess};

/// The status of the Release with `generation`, less the condition that is the controller's. `before` are
/// the conditions that stand there; `drift` is what was put right lately, for people.
pub fn status(
    observed: &Observed,
    plan: &Plan,
    generation: i64,
    before: &[Condition],
    drift: Option<&str>,
) -> ReleaseStatus {
    let committed = committed(observed);
    let wanted = wanted_id(observed);
    let serves_wanted =
        committed.is_some_and(|release| wanted.is_none_or(|id| id == release.release_id));
    let trouble = trouble(observed);
    let phase = phase(plan, committed.is_some(), trouble.is_some());

    let ready = match (&plan.progress, serves_wanted, &trouble) {
        (Progress::Removing | Progress::Removed, _, _) => statement(
            Some(false),
            Reason::Removing,
            "the app is being taken off the node".to_owned(),
        ),
        (_, true, None) => {
            let release =
                committed.map_or(String::new(), |release| release.commit.short().to_owned());
            statement(
                Some(true),
                Reason::Deployed,
                format!("the node serves {release}"),
            )
        }
        (_, true, Some(failure)) => statement(Some(false), failure.reason, failure.message.clone()),
        (progress, false, _) => unready(progress),
    };
    let drifted = match drift {
        Some(what) => Statement {
            kind: DRIFTED,
            status: Some(true),
            reason: Reason::Progressing,
            message: format!("put right: {what}"),
        },
        None => Statement {
            kind: DRIFTED,
            status: Some(false),
            reason: Reason::Deployed,
            message: "the host is as it was left".to_owned(),
        },
    };
    ReleaseStatus {
        observed_generation: generation,
        phase,
        conditions: conditions(&[ready, drifted], generation, before, observed.wall),
        serving: committed.map(|release| Serving {
            release_id: release.release_id,
            revision: release.revision.as_str().to_owned(),
            commit: release.commit.as_str().to_owned(),
            available_since: Some(to_the_second(release.available_since)),
            processes: release
                .processes
                .iter()
                .map(|process| ServingProcess {
                    name: process.name.clone(),
                    unit: process.unit.clone(),
                    port: process.port,
                })
                .collect(),
        }),
        attempt: attempt(observed, plan, wanted, phase),
    }
}

/// Whether the status tells of an end, which is told at once.
pub fn is_terminal(status: &ReleaseStatus) -> bool {
    matches!(
        status.phase,
        Phase::Running | Phase::Failed | Phase::Removed | Phase::Degraded
    )
}

fn wanted_id(observed: &Observed) -> Option<ReleaseId> {
    match &observed.wanted {
        Wanted::Release(wish) => Some(wish.release_id),
        Wanted::Invalid {
            release_id,
            failure: _,
        } => Some(*release_id),
        Wanted::Unknown | Wanted::Absent | Wanted::Removal { .. } | Wanted::Orphan => None,
    }
}

fn phase(plan: &Plan, is_committed: bool, is_troubled: bool) -> Phase {
    match &plan.progress {
        Progress::Idle if !is_committed => Phase::Pending,
        Progress::Idle if is_troubled => Phase::Degraded,
        Progress::Idle => Phase::Running,
        Progress::Queued { .. } => Phase::Queued,
        Progress::At(phase, _) | Progress::HeldUp(phase, _) => *phase,
        Progress::Failed(_) => Phase::Failed,
        Progress::Removing => Phase::Removing,
        Progress::Removed => Phase::Removed,
    }
}

fn statement(status: Option<bool>, reason: Reason, message: String) -> Statement {
    Statement {
        kind: READY,
        status,
        reason,
        message,
    }
}

/// The node does not serve what is wanted: because of what, or on the way where.
fn unready(progress: &Progress) -> Statement {
    match progress {
        Progress::Failed(failure) | Progress::HeldUp(_, failure) => {
            statement(Some(false), failure.reason, failure.message.clone())
        }
        Progress::Queued { position, of } => statement(
            Some(false),
            Reason::Queued,
            format!("{position} of {of} that wait for a slot of the node"),
        ),
        Progress::At(phase, what) => statement(Some(false), reason_of(*phase), what.clone()),
        Progress::Idle => statement(
            Some(false),
            Reason::Progressing,
            "nothing was done yet".to_owned(),
        ),
        Progress::Removing | Progress::Removed => statement(
            Some(false),
            Reason::Removing,
            "the app is being taken off the node".to_owned(),
        ),
    }
}

fn reason_of(phase: Phase) -> Reason {
    match phase {
        Phase::Queued => Reason::Queued,
        Phase::Fetching => Reason::Fetching,
        Phase::Building => Reason::Building,
        Phase::Starting => Reason::Starting,
        Phase::Switching => Reason::Switching,
        Phase::Baking => Reason::Baking,
        Phase::Draining => Reason::Draining,
        Phase::Removing | Phase::Removed => Reason::Removing,
        Phase::Pending | Phase::Running | Phase::Degraded | Phase::Failed | Phase::Unknown => {
            Reason::Progressing
        }
    }
}

/// What is wrong with the committed release, if something is.
fn trouble(observed: &Observed) -> Option<RecordedFailure> {
    let release = committed(observed)?;
    let trouble = |reason, message| {
        Some(RecordedFailure {
            reason,
            message,
            log_tail: None,
        })
    };
    for process in &release.processes {
        let Some(service) = observed.host.services.get(&process.unit) else {
            return trouble(
                Reason::StartFailed,
                format!("process {} is gone", process.name),
            );
        };
        match (&service.health, service.activity) {
            (Health::Ready { .. }, _) => {}
            (Health::Failed(failure), _) => return Some(failure.clone()),
            (Health::PortTaken { by }, _) => {
                return trouble(
                    Reason::ProbeFailed,
                    format!("the port of process {} is taken: {by}", process.name),
                );
            }
            (Health::Waiting { what, until: _ }, Activity::Active | Activity::Activating) => {
                return trouble(Reason::Starting, what.clone());
            }
            (
                Health::Waiting { what, until: _ },
                Activity::Inactive | Activity::Deactivating | Activity::Failed,
            ) => {
                return trouble(Reason::StartFailed, what.clone());
            }
        }
    }
    let is_switching = observed
        .attempt
        .as_ref()
        .is_some_and(|attempt| attempt.outcome.is_none() && attempt.switching);
    let in_force = observed
        .host
        .virtual_host
        .in_force
        .as_ref()
        .map(|(host, _)| without_backup(host));
    if !is_switching && in_force != committed_virtual_host(observed) {
        if let Some(held_up) = &observed.held_up {
            return Some(held_up.failure.clone());
        }
        return trouble(
            Reason::ProxyUnavailable,
            "the proxy was not yet seen to serve the release".to_owned(),
        );
    }
    None
}

/// Until the old processes are drained the old port backs the new one up, which serves all the same.
fn without_backup(host: &VirtualHost) -> VirtualHost {
    let mut host = host.clone();
    for route in &mut host.routes {
        if let RouteTarget::Port { backup, .. } = &mut route.target {
            *backup = None;
        }
    }
    host
}

fn attempt(
    observed: &Observed,
    plan: &Plan,
    wanted: Option<ReleaseId>,
    phase: Phase,
) -> Option<AttemptStatus> {
    let tried = observed.attempt.as_ref();
    if matches!(plan.progress, Progress::Removing | Progress::Removed) {
        return None;
    }
    let is_committed =
        tried.is_some_and(|attempt| matches!(attempt.outcome, Some(Outcome::Committed { .. })));
    let release_id = wanted.or_else(|| tried.map(|attempt| attempt.wish.release_id))?;
    let is_about_it = tried.is_some_and(|attempt| attempt.wish.release_id == release_id);
    if is_committed && is_about_it {
        return None;
    }
    let (step, queue, failure) = match &plan.progress {
        Progress::Queued { position, of } => (
            phase,
            Some(QueuePosition {
                position: *position,
                of: *of,
            }),
            None,
        ),
        Progress::At(step, _) => (*step, None, None),
        // A superseded attempt's failure is not the wanted one's.
        Progress::Failed(failure) if is_about_it => (phase, None, Some(failure)),
        Progress::HeldUp(step, failure) => (*step, None, Some(failure)),
        Progress::Failed(_) | Progress::Idle | Progress::Removing | Progress::Removed => {
            (Phase::Pending, None, None)
        }
    };
    Some(AttemptStatus {
        release_id,
        step: Some(step),
        queue,
        failure: failure.map(told),
    })
}

fn told(failure: &RecordedFailure) -> Failure {
    let RecordedFailure {
        reason,
        message,
        log_tail,
    } = failure;
    Failure {
        class: reason.class().to_string(),
        reason: reason.as_str().to_owned(),
        message: cut(message, crate::api::conditions::MESSAGE_LIMIT).to_owned(),
        log_tail: log_tail
            .as_deref()
            .map(|tail| cut(tail, LOG_TAIL_BYTES).to_owned()),
    }
}

fn to_the_second(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second())
        .unwrap_or(time)
        .to_string()
}
