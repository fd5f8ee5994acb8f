//! Keeping what is committed: put right, served, and alone.

use std::time::Duration;

use super::traffic::{Traffic, committed_virtual_host, traffic};
use super::{Plan, Progress, Step, build_unit, committed, just, unit_names};
use crate::agent::host::records::{AttemptRecord, ProcessRecord};
use crate::agent::host::unit;
use crate::agent::view::{Activity, BuildView, DrainView, FileView, Health, Observed};
use crate::api::release::Phase;

/// Nothing is tried: what is committed is kept so, and what is neither committed nor tried is stopped.
pub(super) fn held(observed: &Observed, progress: Progress) -> Plan {
    let (mut steps, drift) = heal(observed, &[]);
    let mut wake = None;
    let mut progress = progress;
    match traffic(observed, committed_virtual_host(observed).as_ref()) {
        Traffic::Step(step) => steps.push(step),
        Traffic::HeldUp(held_up) => {
            wake = Some(held_up.until);
            if progress == Progress::Idle {
                progress = Progress::HeldUp(Phase::Degraded, held_up.failure.clone());
            }
        }
        Traffic::InForce(_) => {
            let strays = stop_strays(observed, None, &[]);
            steps.extend(strays.steps);
            wake = strays.wake;
            if strays.left && progress == Progress::Idle {
                progress = Progress::At(
                    Phase::Draining,
                    "the old processes finish their requests".to_owned(),
                );
            }
        }
    }
    Plan {
        steps,
        progress,
        drift,
        wake,
    }
}

/// Committed, and nothing newer: held. A port that a stranger took is replaced by the same release on
/// another port, over the same path.
pub(super) fn keep_ports(observed: &Observed, attempt: &AttemptRecord) -> Plan {
    let is_applied =
        committed(observed).is_some_and(|release| release.release_id == attempt.wish.release_id);
    let taken = attempt.processes.iter().any(|process| {
        matches!(
            observed.host.services.get(&process.unit).map(|s| &s.health),
            Some(Health::PortTaken { .. })
        )
    });
    if is_applied && taken {
        let again = AttemptRecord {
            processes: vec![],
            switching: false,
            stopped_old: vec![],
            outcome: None,
            build_result: None,
            ..attempt.clone()
        };
        return just(
            Step::WriteAttempt(Box::new(again)),
            Progress::At(Phase::Starting, "its port is taken".to_owned()),
        );
    }
    held(observed, Progress::Idle)
}

/// Puts right what is not as `applied.json` says, but for the traffic. Units of `held_back` stay stopped.
pub(super) fn heal(observed: &Observed, held_back: &[String]) -> (Vec<Step>, Vec<String>) {
    let (mut steps, mut drift) = (vec![], vec![]);
    let Some(release) = committed(observed) else {
        return (steps, drift);
    };
    let host = &observed.host;
    let units = unit_names(&release.processes);

    let mut missing = vec![];
    let mut stopped = vec![];
    let mut stale = false;
    for process in &release.processes {
        let Some(service) = host.services.get(&process.unit) else {
            drift.push(format!("{} was gone", process.unit));
            missing.push(process.clone());
            if !held_back.contains(&process.unit) {
                stopped.push(process.unit.clone());
            }
            continue;
        };
        if service.file != FileView::Intact {
            drift.push(format!(
                "the file of {} was {}",
                process.unit,
                if service.file == FileView::Missing {
                    "missing"
                } else {
                    "changed"
                }
            ));
            missing.push(process.clone());
        }
        stale |= service.stale;
        if matches!(service.activity, Activity::Inactive | Activity::Failed)
            && !held_back.contains(&process.unit)
        {
            drift.push(format!("{} was stopped", process.unit));
            stopped.push(process.unit.clone());
        }
    }
    if !missing.is_empty() {
        steps.push(Step::WriteUnits(missing));
    }
    let is_target = host.target.as_ref().is_some_and(|target| {
        target.release_id == Some(release.release_id) && target.units == units
    });
    if !is_target || !host.enabled {
        drift.push(format!(
            "{} did not name the committed units",
            unit::target_name(&observed.app)
        ));
        steps.push(Step::WriteTarget {
            release_id: release.release_id,
            units,
        });
    }
    if stale {
        steps.push(Step::ReloadManager);
    }
    if !stopped.is_empty() {
        steps.push(Step::StartUnits(stopped));
    }
    (steps, drift)
}

/// Services and builds that are neither committed nor tried.
pub(super) struct Strays {
    pub(super) steps: Vec<Step>,
    pub(super) wake: Option<Duration>,
    pub(super) left: bool,
}

/// Stops them when the requests of before are drained; those of `at_once` have none, and do not wait.
pub(super) fn stop_strays(
    observed: &Observed,
    attempt: Option<&AttemptRecord>,
    at_once: &[String],
) -> Strays {
    let tried: &[ProcessRecord] = attempt.map_or(&[], |attempt| &attempt.processes);
    let applied: &[ProcessRecord] = committed(observed).map_or(&[], |release| &release.processes);
    let build = attempt.map(|attempt| build_unit(observed, attempt));
    let mut strays = Strays {
        steps: stop_builds(observed, build.as_deref()),
        wake: None,
        left: false,
    };

    let (mut to_stop, mut to_remove) = (vec![], vec![]);
    for (unit, service) in &observed.host.services {
        if tried
            .iter()
            .chain(applied)
            .any(|process| process.unit == *unit)
        {
            continue;
        }
        match service.activity {
            Activity::Inactive if service.file == FileView::Missing => {}
            Activity::Inactive => to_remove.push(unit.clone()),
            Activity::Deactivating => strays.left = true,
            Activity::Activating | Activity::Active | Activity::Failed => {
                to_stop.push(unit.clone())
            }
        }
    }
    strays.left |= !to_stop.is_empty() || !to_remove.is_empty();
    if !to_remove.is_empty() {
        strays.steps.push(Step::RemoveUnits(to_remove));
    }
    let (idle, to_stop): (Vec<_>, Vec<_>) =
        to_stop.into_iter().partition(|unit| at_once.contains(unit));
    if !idle.is_empty() {
        strays.steps.push(Step::StopUnits(idle));
    }
    if !to_stop.is_empty() {
        match observed.host.drain {
            DrainView::Over => strays.steps.push(Step::StopUnits(to_stop)),
            DrainView::Unknown => strays.steps.push(Step::BeginDrain),
            DrainView::Going { until } => strays.wake = Some(until),
        }
    }
    strays
}

pub(super) fn stop_builds(observed: &Observed, but: Option<&str>) -> Vec<Step> {
    let others = observed
        .host
        .builds
        .iter()
        .filter(|(unit, _)| Some(unit.as_str()) != but);
    others
        .filter_map(|(unit, build)| match build {
            BuildView::Running => Some(Step::StopBuild {
                unit: unit.clone(),
                kill: true,
            }),
            BuildView::Ended(_) | BuildView::Killed(_) => Some(Step::StopBuild {
                unit: unit.clone(),
                kill: false,
            }),
            BuildView::Stopping => None,
        })
        .collect()
}
