//! Taking an app off the node: tombstone → target → virtual host (measured gone)
//! → units and steps → files → users → mirror → the records last. And leaving one
//! as it is when its Release goes: what was being tried is undone, the rest is
//! marked and held.

use super::keep::{held, stop_builds};
use super::{Plan, Progress, Step, committed, complete_commit, end, just, undo};
use crate::agent::host::records::{
    AppliedRecord, AttemptRecord, Outcome, RECORD_VERSION, Removing,
};
use crate::agent::view::{Activity, FileView, HeldUp, Observed, Wanted};

/// The plan of an app that is to go or is going; nothing for others.
pub(super) fn plan(observed: &Observed) -> Option<Plan> {
    let tombstone = observed
        .applied
        .as_ref()
        .and_then(|applied| applied.removing.as_ref());
    let keep_state = match (&observed.wanted, tombstone) {
        // Once begun it is finished, whatever is wanted meanwhile.
        (_, Some(removing)) => removing.keep_state,
        (Wanted::Removal { keep_state }, None) => *keep_state,
        // Where nothing was committed there is nothing to leave running.
        (Wanted::Orphan, None) if !has_committed(observed) => true,
        (Wanted::Orphan, None) => return None,
        (Wanted::Unknown | Wanted::Absent | Wanted::Release(_) | Wanted::Invalid { .. }, None) => {
            return None;
        }
    };
    if is_gone(observed, keep_state) {
        return Some(Plan {
            steps: vec![],
            progress: Progress::Removed,
            drift: vec![],
            wake: None,
        });
    }
    let mut plan = Plan {
        steps: vec![],
        progress: Progress::Removing,
        drift: vec![],
        wake: None,
    };
    if tombstone.is_none() {
        plan.steps.push(Step::WriteApplied(Box::new(AppliedRecord {
            version: RECORD_VERSION,
            app: observed.app.clone(),
            deployment_uid: deployment_uid(observed),
            release: observed
                .applied
                .as_ref()
                .and_then(|applied| applied.release.clone()),
            removing: Some(Removing {
                since: observed.wall,
                keep_state,
            }),
            orphaned: None,
        })));
    }
    // A failed step is not gone past, and not repeated without end.
    if let Some(HeldUp { failure: _, until }) = &observed.held_up
        && observed.now < *until
    {
        plan.wake = Some(*until);
        return Some(plan);
    }
    let (steps, left) = parts(observed);
    plan.steps.extend(steps);
    if !left {
        plan.steps.push(Step::RemoveFiles { keep_state });
    }
    Some(plan)
}

fn is_gone(observed: &Observed, keep_state: bool) -> bool {
    let host = &observed.host;
    observed.applied.is_none()
        && observed.attempt.is_none()
        && host.services.is_empty()
        && host.builds.is_empty()
        && host.target.is_none()
        && !host.target_active
        && !host.enabled
        && !host.virtual_host.file
        && host.virtual_host.in_force.is_none()
        && !host.has_files
        && (keep_state || host.kept_state.is_none())
}

/// Whose the state is that may stay: the last that was heard of, or else whose release is committed.
fn deployment_uid(observed: &Observed) -> Option<String> {
    let attempt = observed.attempt.as_ref();
    attempt
        .and_then(|attempt| attempt.wish.deployment_uid.clone())
        .or_else(|| observed.applied.as_ref()?.deployment_uid.clone())
}

fn has_committed(observed: &Observed) -> bool {
    let completes = |attempt| complete_commit(observed, attempt).is_some();
    committed(observed).is_some() || observed.attempt.as_ref().is_some_and(completes)
}

/// What is committed is left as it is and held from then on; what was being tried is taken back first.
pub(super) fn orphan(observed: &Observed, attempt: &AttemptRecord) -> Plan {
    match &attempt.outcome {
        None => end(
            attempt,
            Outcome::Superseded {
                at: observed.wall,
                undone: false,
            },
            Progress::Removing,
        ),
        Some(Outcome::Failed { undone: false, .. } | Outcome::Superseded { undone: false, .. }) => {
            undo(observed, attempt)
        }
        Some(Outcome::Failed { .. } | Outcome::Superseded { .. } | Outcome::Committed { .. }) => {
            leave(observed)
        }
    }
}

/// Marks the app as left without a Release, and keeps it.
pub(super) fn leave(observed: &Observed) -> Plan {
    match &observed.applied {
        Some(applied) if applied.orphaned.is_none() => just(
            Step::WriteApplied(Box::new(AppliedRecord {
                orphaned: Some(observed.wall),
                ..applied.clone()
            })),
            Progress::Removing,
        ),
        Some(_) | None => held(observed, Progress::Removed),
    }
}

/// Everything before the files, and whether some of it is left to wait for.
fn parts(observed: &Observed) -> (Vec<Step>, bool) {
    let host = &observed.host;
    let mut steps = vec![];
    if host.target.is_some() || host.enabled || host.target_active {
        steps.push(Step::RemoveTarget);
    }
    if host.virtual_host.file || host.virtual_host.in_force.is_some() {
        steps.push(Step::RemoveVirtualHost);
    }
    steps.extend(stop_builds(observed, None));
    let mut left = !host.builds.is_empty();
    let (mut to_stop, mut to_remove) = (vec![], vec![]);
    for (unit, service) in &host.services {
        match service.activity {
            Activity::Inactive if service.file == FileView::Missing => {}
            Activity::Inactive => to_remove.push(unit.clone()),
            Activity::Deactivating => left = true,
            Activity::Activating | Activity::Active | Activity::Failed => {
                left = true;
                to_stop.push(unit.clone());
            }
        }
    }
    if !to_stop.is_empty() {
        steps.push(Step::StopUnits(to_stop));
    }
    if !to_remove.is_empty() {
        steps.push(Step::RemoveUnits(to_remove));
    }
    (steps, left)
}
