//! Taking an app off the node: tombstone → target → virtual host (measured gone)
//! → units and steps → files → users → mirror → the records last.

use super::keep::stop_builds;
use super::{Plan, Progress, Step};
use crate::agent::host::records::{AppliedRecord, RECORD_VERSION, Removing};
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
        (Wanted::Unknown | Wanted::Absent | Wanted::Release(_) | Wanted::Invalid { .. }, None) => {
            return None;
        }
    };
    if is_gone(observed) {
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
            deployment_uid: observed
                .applied
                .as_ref()
                .and_then(|applied| applied.deployment_uid.clone()),
            release: observed
                .applied
                .as_ref()
                .and_then(|applied| applied.release.clone()),
            removing: Some(Removing {
                since: observed.wall,
                keep_state,
            }),
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

fn is_gone(observed: &Observed) -> bool {
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
