//! Recreate: what changes is stopped before the new is started, and started again when the attempt is
//! taken back.
//!
//! routes to 503 → drain → `stopped_old` recorded → stop → start → healthy → switch.
//!
//! Invariants:
//! - Of a process that changes, old and new never run at the same time.
//! - What is stopped is on the disk before it is stopped: an agent that comes back neither starts the old
//!   beside the new, nor forgets to start it when the attempt is taken back.
//! - A process that does not change is not touched, and its route neither.

use std::time::Duration;

use super::attempt::Next;
use super::keep::{heal, stop_builds, stop_strays};
use super::traffic::{
    Traffic, committed_virtual_host, pause, paused_attempt_virtual_host, traffic,
};
use super::{Plan, Progress, Step, committed, unit_names};
use crate::agent::host::proxy::VirtualHost;
use crate::agent::host::records::{AttemptRecord, ProcessRecord};
use crate::agent::view::{Activity, DrainView, FileView, Health, Observed};
use crate::api::deployment::Switch;
use crate::api::release::Phase;

/// How long requests that are under way may take before their process is told to stop, all others being
/// refused meanwhile; it has its own grace period after that. A websocket would keep the app away for as
/// long as a drain may take otherwise.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// Whether the attempt stops before it starts. One that has stopped something goes on so, whatever its
/// spec has become meanwhile.
pub(super) fn recreates(attempt: &AttemptRecord) -> bool {
    let by_spec = match attempt.wish.template.switch {
        Switch::Recreate => true,
        Switch::BlueGreen => false,
    };
    by_spec || !attempt.stopped_old.is_empty()
}

/// Units of the committed release that are not the attempt's.
fn replaced(observed: &Observed, attempt: &AttemptRecord) -> Vec<String> {
    let applied: &[ProcessRecord] = committed(observed).map_or(&[], |release| &release.processes);
    applied
        .iter()
        .filter(|old| attempt.processes.iter().all(|new| new.unit != old.unit))
        .map(|old| old.unit.clone())
        .collect()
}

/// What the proxy is to serve before the switch.
pub(super) enum BeforeSwitch {
    /// This.
    Serve(Option<VirtualHost>),
    /// What it does: units are chosen anew, and then it will be another.
    Leave,
}

/// What the proxy serves before the switch: what is committed, until it is time for it to give way.
pub(super) fn before_switch(observed: &Observed, attempt: &AttemptRecord) -> BeforeSwitch {
    let has_stopped = !attempt.stopped_old.is_empty();
    if attempt.processes.is_empty() && has_stopped {
        return BeforeSwitch::Leave;
    }
    let is_written = |process: &ProcessRecord| {
        let service = observed.host.services.get(&process.unit);
        service.is_some_and(|service| service.file == FileView::Intact)
    };
    let may_begin = recreates(attempt)
        && !attempt.processes.is_empty()
        && !replaced(observed, attempt).is_empty()
        && attempt.processes.iter().all(is_written)
        && !stop_strays(observed, Some(attempt), &[]).left;
    BeforeSwitch::Serve(if has_stopped || may_begin {
        paused_attempt_virtual_host(observed, attempt)
    } else {
        committed_virtual_host(observed)
    })
}

/// What has to be done before the attempt's units, whose files are written, may start; nothing when the
/// place is free.
pub(super) fn make_way(observed: &Observed, attempt: &AttemptRecord) -> Option<Next> {
    if !recreates(attempt) {
        return None;
    }
    let running = running(observed, &attempt.stopped_old);
    if attempt.switching {
        // A reboot has started the old: the new gives the traffic back, and comes once more.
        let again = AttemptRecord {
            switching: false,
            ..attempt.clone()
        };
        return (!running.is_empty()).then(|| {
            Next::step(
                Step::WriteAttempt(Box::new(again)),
                Phase::Starting,
                "the old processes were started by a reboot",
            )
        });
    }
    if stop_strays(observed, Some(attempt), &[]).left {
        return Some(wait("older processes finish their requests first", None));
    }
    let replaced = replaced(observed, attempt);
    if replaced.is_empty() && attempt.stopped_old.is_empty() {
        return None;
    }
    let paused = paused_attempt_virtual_host(observed, attempt);
    let Traffic::InForce(since) = traffic(observed, paused.as_ref()) else {
        return Some(wait("requests are to be answered with 503", None));
    };
    let recorded = |unit: &String| attempt.stopped_old.contains(unit);
    if !replaced.iter().all(recorded) {
        return Some(drain(observed, since).unwrap_or_else(|| {
            let mut stopped_old = attempt.stopped_old.clone();
            stopped_old.extend(replaced.into_iter().filter(|unit| !recorded(unit)));
            let stopping = AttemptRecord {
                stopped_old,
                ..attempt.clone()
            };
            Next::step(
                Step::WriteAttempt(Box::new(stopping)),
                Phase::Draining,
                "the old processes stop",
            )
        }));
    }
    if running.is_empty() {
        return None;
    }
    let to_stop: Vec<String> = running
        .into_iter()
        .filter(|(_, activity)| *activity != Activity::Deactivating)
        .map(|(unit, _)| unit)
        .collect();
    let mut next = wait("the old processes stop", None);
    if !to_stop.is_empty() {
        next.steps.push(Step::StopUnits(to_stop));
    }
    Some(next)
}

/// The drain of what is to be stopped, as long as it goes on.
fn drain(observed: &Observed, since: Duration) -> Option<Next> {
    let limit = since + DRAIN_LIMIT;
    if observed.now >= limit {
        return None;
    }
    let what = "the old processes finish their requests";
    match observed.host.drain {
        DrainView::Over => None,
        DrainView::Unknown => Some(Next::step(Step::BeginDrain, Phase::Draining, what)),
        DrainView::Going { until } => Some(wait(what, Some(until.min(limit)))),
    }
}

fn wait(what: &str, wake: Option<Duration>) -> Next {
    let mut next = Next::wait(Progress::At(Phase::Draining, what.to_owned()));
    next.wake = wake;
    next
}

/// Those of `units` that are not stopped.
fn running(observed: &Observed, units: &[String]) -> Vec<(String, Activity)> {
    let activity = |unit: &String| {
        let service = observed.host.services.get(unit)?;
        Some((unit.clone(), service.activity))
    };
    units
        .iter()
        .filter_map(activity)
        .filter(|(_, activity)| match activity {
            Activity::Inactive | Activity::Failed => false,
            Activity::Activating | Activity::Active | Activity::Deactivating => true,
        })
        .collect()
}

/// A failed or superseded attempt that has stopped something is taken back: the new is stopped, then the
/// old started, and when that is healthy it gets the traffic. Whether that is done.
pub(super) fn give_back(observed: &Observed, attempt: &AttemptRecord) -> (Plan, bool) {
    let release = committed_virtual_host(observed);
    let given_way: Vec<&str> = committed(observed)
        .iter()
        .flat_map(|release| &release.processes)
        .filter(|process| attempt.stopped_old.contains(&process.unit))
        .map(|process| process.name.as_str())
        .collect();
    let paused = release.clone().map(|host| pause(host, &given_way));
    let tried = unit_names(&attempt.processes);
    let left = stop_strays(observed, None, &[]).left;
    let healthy = attempt.stopped_old.iter().all(|unit| {
        let service = observed.host.services.get(unit);
        // One that does not come up again serves as it can: there is nothing else to serve.
        service.is_some_and(|service| match &service.health {
            Health::Ready { .. } | Health::Failed(_) | Health::PortTaken { .. } => true,
            Health::Waiting { .. } => false,
        })
    });
    let is_back = !left && healthy;

    let mut steps = stop_builds(observed, None);
    let mut wakes = vec![];
    let wanted = if is_back { &release } else { &paused };
    let (mut change, mut in_force, mut no_proxy) = (None, None, false);
    match traffic(observed, wanted.as_ref()) {
        Traffic::Step(step) => change = Some(step),
        Traffic::InForce(since) => in_force = Some(since),
        Traffic::HeldUp(held_up) => {
            wakes.push(held_up.until);
            no_proxy = true;
        }
    }
    if let Some(since) = in_force {
        let is_over = !attempt.switching || observed.now >= since + DRAIN_LIMIT;
        let at_once: &[String] = if is_over { &tried } else { &[] };
        let strays = stop_strays(observed, None, at_once);
        steps.extend(
            strays
                .steps
                .into_iter()
                .filter(|step| !matches!(step, Step::StopBuild { .. })),
        );
        wakes.extend(strays.wake);
        wakes.extend((left && !is_over).then_some(since + DRAIN_LIMIT));
    } else if !attempt.switching || no_proxy {
        // What never had traffic has nothing to finish, and where there is no proxy there is none.
        steps.extend(stop_tried(observed, &tried));
    }
    // A stray that is stopped is in nobody's way, whether or not its file could be removed yet.
    let applied = committed(observed).map_or(vec![], |release| unit_names(&release.processes));
    let in_the_way = observed.host.services.iter().any(|(unit, service)| {
        !applied.contains(unit)
            && !matches!(service.activity, Activity::Inactive | Activity::Failed)
    });
    let held_back: &[String] = if in_the_way {
        &attempt.stopped_old
    } else {
        &[]
    };
    let (healing, drift) = heal(observed, held_back);
    steps.extend(healing);
    steps.extend(change);
    let is_done = is_back && in_force.is_some() && observed.host.builds.is_empty();
    (
        Plan {
            steps,
            progress: Progress::Idle,
            drift,
            wake: wakes.into_iter().min(),
        },
        is_done,
    )
}

/// Stops those of an attempt's units that run and are not committed.
fn stop_tried(observed: &Observed, tried: &[String]) -> Option<Step> {
    let applied = committed(observed).map_or(vec![], |release| unit_names(&release.processes));
    let to_stop: Vec<String> = running(observed, tried)
        .into_iter()
        .filter(|(unit, activity)| *activity != Activity::Deactivating && !applied.contains(unit))
        .map(|(unit, _)| unit)
        .collect();
    (!to_stop.is_empty()).then_some(Step::StopUnits(to_stop))
}
