//! What to do next with one app on this node: a pure function of what is
//! observed, total and deterministic.
//!
//! fetch → checkout and build → seal → start → healthy → switch (measured) →
//! bake → commit → drain → stop the old.
//!
//! Invariants, each held by a property test:
//! - Nothing before the commit touches the running release.
//! - The commit is the rename of the target file: a target that equals the
//!   attempt completes `applied.json` before anything else is planned.
//! - A failed or superseded attempt is undone the same way, and its outcome
//!   stays recorded until the wish changes.
//! - Removals come before additions.
//! - Where everything is as it should be, there is nothing to do.
//!
//! Deliberately absent: I/O, clocks, and how a step is done (`apply`).

mod removal;
#[cfg(test)]
pub(super) mod simulation;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::time::Duration;

use super::host::proxy::{HostName, Route, RouteTarget, VirtualHost};
use super::host::records::{
    AppliedRecord, AppliedRelease, AttemptRecord, Outcome, ProcessRecord, RECORD_VERSION,
    RecordedFailure, ReleaseRecord, StepResult, Wish,
};
use super::host::unit;
use super::view::{
    Activity, BuildView, DrainView, FileView, Health, HeldUp, Observed, SlotView, SourceView,
    Wanted,
};
use crate::api::names::{AppName, ReleaseId};
use crate::api::reasons::{Class, Reason};
use crate::api::release::{Phase, Template};

/// What to do next, in this order, up to the first that fails; and where the app is.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Small idempotent steps. When they are done, observe and plan again.
    pub steps: Vec<Step>,
    /// Where the attempt is.
    pub progress: Progress,
    /// What was found other than it should be with the committed release, for people.
    pub drift: Vec<String>,
    /// When to look again if nothing happens, on the clock of [`Observed::now`].
    pub wake: Option<Duration>,
}

/// One idempotent action on the host.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Writes `attempt.json`.
    WriteAttempt(Box<AttemptRecord>),
    /// Writes `applied.json`.
    WriteApplied(Box<AppliedRecord>),
    /// Writes `releases/<revision>.json`.
    WriteRelease(Box<ReleaseRecord>),
    /// Asks the mirror of the attempt's source for its commit.
    WantCommit,
    /// Makes the stage and starts the build unit of the attempt.
    StartBuild,
    /// Stops a build unit and forgets its result.
    StopBuild {
        /// The unit.
        unit: String,
        /// Whether it still runs: it is killed, for it has nothing to save.
        kill: bool,
    },
    /// Makes the attempt's stage a tree.
    Seal,
    /// Tries the attempt's next step again only after a while.
    HoldUp(RecordedFailure),
    /// The checkout failed although the mirror has the commit: it has to be looked at.
    SuspectMirror,
    /// Chooses units and ports for the attempt and records them; writes nothing else but environment
    /// files and users. A process in `keep` keeps the applied unit if its content is the same.
    ChooseProcesses {
        /// Names of processes.
        keep: BTreeSet<String>,
    },
    /// Writes unit files.
    WriteUnits(Vec<ProcessRecord>),
    /// Makes systemd read its files again, as it has another text than a file of ours.
    ReloadManager,
    /// Starts services.
    StartUnits(Vec<String>),
    /// Stops services and removes their files when they are stopped.
    StopUnits(Vec<String>),
    /// Removes the files of services that are stopped.
    RemoveUnits(Vec<String>),
    /// Writes the virtual host, reloads the proxy and measures that it is in force.
    Publish(Box<VirtualHost>),
    /// Removes the virtual host and measures that its hosts are refused.
    RemoveVirtualHost,
    /// Finds out whether requests of before are still under way.
    BeginDrain,
    /// Replaces the target file, which is the commit, and enables it.
    WriteTarget {
        /// The release.
        release_id: ReleaseId,
        /// Its units.
        units: Vec<String>,
    },
    /// Removes the target and its link, and stops it.
    RemoveTarget,
    /// Removes what the app has on the disk but its records.
    RemoveFiles {
        /// Whether `state/` stays.
        keep_state: bool,
    },
}

/// Where the attempt is.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// Nothing is tried.
    Idle,
    /// It waits for a slot of the node.
    Queued {
        /// From 1.
        position: u32,
        /// How many wait.
        of: u32,
    },
    /// It is at this step.
    At(Phase, String),
    /// It has failed and is not tried again.
    Failed(RecordedFailure),
    /// Something holds it up.
    HeldUp(Phase, RecordedFailure),
    /// The app is being taken away.
    Removing,
    /// Nothing of it is left.
    Removed,
}

/// Builds that vanished without a result before the attempt counts as failed: a reboot in each of three
/// builds is bad luck, a fourth is a build that takes the node down.
const BUILD_TRIES: u32 = 4;

/// Restarts while baking that count as a crash loop (the contract's Health).
pub const CRASH_LOOP_RESTARTS: u32 = 3;

/// What to do next.
pub fn plan(observed: &Observed) -> Plan {
    if let Some(plan) = removal::plan(observed) {
        return plan;
    }
    let Some(attempt) = &observed.attempt else {
        return match &observed.wanted {
            Wanted::Release(wish) => begin(observed, wish),
            Wanted::Invalid {
                release_id: _,
                failure,
            } => held(observed, Progress::HeldUp(Phase::Pending, failure.clone())),
            Wanted::Unknown | Wanted::Absent | Wanted::Removal { .. } => {
                held(observed, Progress::Idle)
            }
        };
    };
    if let Some(plan) = complete_commit(observed, attempt) {
        return plan;
    }

    let newer = match &observed.wanted {
        Wanted::Release(wish) if wish.release_id != attempt.wish.release_id => Newer::Wish(wish),
        Wanted::Release(wish) if **wish != attempt.wish => {
            // The same decision, with other retention or from another url.
            let refreshed = AttemptRecord {
                wish: (**wish).clone(),
                ..attempt.clone()
            };
            return just(Step::WriteAttempt(Box::new(refreshed)), Progress::Idle);
        }
        Wanted::Invalid {
            release_id,
            failure,
        } if *release_id != attempt.wish.release_id => Newer::Invalid(failure),
        Wanted::Release(_)
        | Wanted::Invalid { .. }
        | Wanted::Unknown
        | Wanted::Absent
        | Wanted::Removal { .. } => Newer::Nothing,
    };
    match (&attempt.outcome, newer) {
        (None, Newer::Nothing) => advance(observed, attempt),
        (None, Newer::Wish(_) | Newer::Invalid(_)) => {
            let outcome = Outcome::Superseded {
                at: observed.wall,
                undone: false,
            };
            end(
                attempt,
                outcome,
                Progress::At(
                    Phase::Pending,
                    "taking back what a newer wish replaces".to_owned(),
                ),
            )
        }
        (
            Some(Outcome::Failed { undone: false, .. } | Outcome::Superseded { undone: false, .. }),
            _,
        ) => undo(observed, attempt),
        (Some(_), Newer::Wish(wish)) => begin(observed, wish),
        (Some(_), Newer::Invalid(failure)) => {
            held(observed, Progress::HeldUp(Phase::Pending, failure.clone()))
        }
        (Some(Outcome::Committed { .. }), Newer::Nothing) => keep_ports(observed, attempt),
        (Some(Outcome::Failed { failure, .. }), Newer::Nothing) => {
            held(observed, Progress::Failed(failure.clone()))
        }
        (Some(Outcome::Superseded { .. }), Newer::Nothing) => match &observed.wanted {
            // The wish came back to the one that was taken back: it is tried anew.
            Wanted::Release(wish) => begin(observed, wish),
            Wanted::Invalid { .. } | Wanted::Unknown | Wanted::Absent | Wanted::Removal { .. } => {
                held(observed, Progress::Idle)
            }
        },
    }
}

/// What the API wants, compared with the attempt.
enum Newer<'a> {
    Nothing,
    Wish(&'a Wish),
    Invalid(&'a RecordedFailure),
}

/// Writes down a wish, before its first effect. The release that is committed is not tried again.
fn begin(observed: &Observed, wish: &Wish) -> Plan {
    let build_key = unit::build_key(
        &wish.commit,
        wish.template.source.directory.as_deref(),
        wish.template.build.as_ref(),
    );
    let mut attempt = AttemptRecord {
        version: RECORD_VERSION,
        wish: wish.clone(),
        build_key,
        build_try: 0,
        build_result: None,
        processes: vec![],
        switching: false,
        outcome: None,
    };
    if let Some(applied) =
        committed(observed).filter(|applied| applied.release_id == wish.release_id)
    {
        attempt.build_key = applied.build_key.clone();
        attempt.processes = applied.processes.clone();
        attempt.outcome = Some(Outcome::Committed {
            at: applied.available_since,
        });
    }
    just(
        Step::WriteAttempt(Box::new(attempt)),
        Progress::At(Phase::Pending, "the wish is written down".to_owned()),
    )
}

/// The target names the attempt's units: it is committed, whatever the records say so far.
fn complete_commit(observed: &Observed, attempt: &AttemptRecord) -> Option<Plan> {
    let target = observed.host.target.as_ref()?;
    let is_attempt = attempt.outcome.is_none()
        && !attempt.processes.is_empty()
        && target.release_id == Some(attempt.wish.release_id)
        && target.units == unit_names(&attempt.processes);
    is_attempt.then(|| Plan {
        steps: record_commit(observed, attempt),
        progress: Progress::At(Phase::Draining, "committed".to_owned()),
        drift: vec![],
        wake: None,
    })
}

fn record_commit(observed: &Observed, attempt: &AttemptRecord) -> Vec<Step> {
    let AttemptRecord {
        wish,
        build_key,
        processes,
        ..
    } = attempt;
    let release = AppliedRelease {
        release_id: wish.release_id,
        revision: wish.revision.clone(),
        commit: wish.commit.clone(),
        template: wish.template.clone(),
        build_key: build_key.clone(),
        processes: processes.clone(),
        available_since: observed.wall,
    };
    vec![
        Step::WriteRelease(Box::new(ReleaseRecord {
            version: RECORD_VERSION,
            revision: wish.revision.clone(),
            commit: wish.commit.clone(),
            template: wish.template.clone(),
            build_key: build_key.clone(),
            committed_at: observed.wall,
        })),
        Step::WriteApplied(Box::new(AppliedRecord {
            version: RECORD_VERSION,
            app: observed.app.clone(),
            deployment_uid: wish.deployment_uid.clone(),
            release: Some(release),
            removing: None,
        })),
        Step::WriteAttempt(Box::new(AttemptRecord {
            outcome: Some(Outcome::Committed { at: observed.wall }),
            ..attempt.clone()
        })),
    ]
}

// ---- Keeping what is committed --------------------------------------------

/// Nothing is tried: what is committed is kept so, and what is neither committed nor tried is stopped.
fn held(observed: &Observed, progress: Progress) -> Plan {
    let (mut steps, drift) = heal(observed);
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
            let strays = stop_strays(observed, None);
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
fn keep_ports(observed: &Observed, attempt: &AttemptRecord) -> Plan {
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

/// Puts right what is not as `applied.json` says, but for the traffic.
fn heal(observed: &Observed) -> (Vec<Step>, Vec<String>) {
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
            stopped.push(process.unit.clone());
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
        if matches!(service.activity, Activity::Inactive | Activity::Failed) {
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
struct Strays {
    steps: Vec<Step>,
    wake: Option<Duration>,
    left: bool,
}

fn stop_strays(observed: &Observed, attempt: Option<&AttemptRecord>) -> Strays {
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
    if !to_stop.is_empty() {
        match observed.host.drain {
            DrainView::Over => strays.steps.push(Step::StopUnits(to_stop)),
            DrainView::Unknown => strays.steps.push(Step::BeginDrain),
            DrainView::Going { until } => strays.wake = Some(until),
        }
    }
    strays
}

fn stop_builds(observed: &Observed, but: Option<&str>) -> Vec<Step> {
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

// ---- Traffic --------------------------------------------------------------

enum Traffic<'a> {
    InForce(Duration),
    Step(Step),
    HeldUp(&'a HeldUp),
}

/// Whether the proxy does what `wanted` says, measured; else what to do.
fn traffic<'a>(observed: &'a Observed, wanted: Option<&VirtualHost>) -> Traffic<'a> {
    let view = &observed.host.virtual_host;
    let step = match (wanted, &view.in_force) {
        (Some(wanted), Some((in_force, since))) if wanted == in_force => {
            return Traffic::InForce(*since);
        }
        (Some(wanted), _) => Step::Publish(Box::new(wanted.clone())),
        (None, None) if !view.file => return Traffic::InForce(Duration::ZERO),
        (None, _) => Step::RemoveVirtualHost,
    };
    match waiting(observed) {
        Some(held_up) => Traffic::HeldUp(held_up),
        None => Traffic::Step(step),
    }
}

/// The virtual host of what is committed.
pub fn committed_virtual_host(observed: &Observed) -> Option<VirtualHost> {
    let release = committed(observed)?;
    virtual_host(
        &observed.app,
        release.release_id,
        &release.template,
        &release.processes,
        &[],
    )
}

/// The virtual host of an attempt that takes the traffic: what the old served is its backup.
fn attempt_virtual_host(observed: &Observed, attempt: &AttemptRecord) -> Option<VirtualHost> {
    let old: &[ProcessRecord] = committed(observed).map_or(&[], |release| &release.processes);
    virtual_host(
        &observed.app,
        attempt.wish.release_id,
        &attempt.wish.template,
        &attempt.processes,
        old,
    )
}

/// What the proxy serves for `processes`; nothing if none has a route. Host names that are not valid
/// were refused where the Release was read.
pub fn virtual_host(
    app: &AppName,
    release_id: ReleaseId,
    template: &Template,
    processes: &[ProcessRecord],
    old: &[ProcessRecord],
) -> Option<VirtualHost> {
    let port_of = |records: &[ProcessRecord], name: &str| {
        records.iter().find(|p| p.name == name).and_then(|p| p.port)
    };
    let routes: Vec<Route> = template
        .processes
        .iter()
        .filter_map(|process| {
            let route = process.route.as_ref()?;
            let target = match port_of(processes, &process.name) {
                Some(primary) => RouteTarget::Port {
                    primary,
                    backup: port_of(old, &process.name).filter(|backup| *backup != primary),
                },
                None => RouteTarget::Unavailable,
            };
            let hosts = route
                .hosts
                .iter()
                .filter_map(|host| HostName::parse(host).ok())
                .collect();
            let measured_path = match process
                .readiness_probe
                .as_ref()
                .and_then(|probe| probe.http_get.as_ref())
            {
                Some(get) => get.path.clone(),
                None => "/".to_owned(),
            };
            Some(Route {
                process: process.name.clone(),
                hosts,
                target,
                measured_path,
            })
        })
        .collect();
    (!routes.is_empty()).then(|| VirtualHost {
        app: app.clone(),
        release_id,
        routes,
    })
}

// ---- The attempt ----------------------------------------------------------

/// The attempt's next step, what is committed kept meanwhile.
fn advance(observed: &Observed, attempt: &AttemptRecord) -> Plan {
    let (mut steps, drift) = heal(observed);
    let mut wake = None;
    if !attempt.switching {
        // Until the attempt takes the traffic, it is the committed release's.
        match traffic(observed, committed_virtual_host(observed).as_ref()) {
            Traffic::Step(step) => steps.push(step),
            Traffic::HeldUp(held_up) => wake = Some(held_up.until),
            Traffic::InForce(_) => {
                let strays = stop_strays(observed, Some(attempt));
                steps.extend(strays.steps);
                wake = strays.wake;
            }
        }
    }
    let next = if let Some(held_up) = waiting(observed) {
        let mut next = Next::wait(Progress::HeldUp(
            phase_of(observed, attempt),
            held_up.failure.clone(),
        ));
        next.wake = Some(held_up.until);
        next
    } else if !observed.host.trees.contains(&attempt.build_key) {
        build(observed, attempt)
    } else if attempt.processes.is_empty() {
        choose(observed, attempt)
    } else {
        run(observed, attempt)
    };
    steps.extend(next.steps);
    let wake = [wake, next.wake].into_iter().flatten().min();
    Plan {
        steps,
        progress: next.progress,
        drift,
        wake,
    }
}

/// What the attempt needs next.
struct Next {
    steps: Vec<Step>,
    progress: Progress,
    wake: Option<Duration>,
}

impl Next {
    fn step(step: Step, phase: Phase, what: &str) -> Self {
        Self::steps(vec![step], phase, what)
    }
    fn steps(steps: Vec<Step>, phase: Phase, what: &str) -> Self {
        Self {
            steps,
            progress: Progress::At(phase, what.to_owned()),
            wake: None,
        }
    }
    fn wait(progress: Progress) -> Self {
        Self {
            steps: vec![],
            progress,
            wake: None,
        }
    }
    fn fail(observed: &Observed, attempt: &AttemptRecord, failure: RecordedFailure) -> Self {
        let outcome = Outcome::Failed {
            at: observed.wall,
            failure: failure.clone(),
            undone: false,
        };
        let ended = AttemptRecord {
            outcome: Some(outcome),
            ..attempt.clone()
        };
        Self {
            steps: vec![Step::WriteAttempt(Box::new(ended))],
            progress: Progress::Failed(failure),
            wake: None,
        }
    }
}

/// There is no sealed tree yet.
fn build(observed: &Observed, attempt: &AttemptRecord) -> Next {
    let name = build_unit(observed, attempt);
    match (observed.host.builds.get(&name), &attempt.build_result) {
        (Some(BuildView::Running), _) => {
            Next::wait(Progress::At(Phase::Building, "the build runs".to_owned()))
        }
        (Some(BuildView::Stopping), _) => {
            Next::wait(Progress::At(Phase::Building, "the build ends".to_owned()))
        }
        (Some(BuildView::Killed(failure)), None)
            if failure.reason.class() == Class::Environment =>
        {
            rebuild(
                observed,
                attempt,
                vec![
                    Step::StopBuild {
                        unit: name,
                        kill: false,
                    },
                    Step::HoldUp(failure.clone()),
                ],
            )
        }
        (Some(BuildView::Killed(failure)), None) => Next::fail(observed, attempt, failure.clone()),
        (Some(BuildView::Ended(result)), None) => {
            // Measured and on disk before the unit, which holds the result, is let go.
            let measured = AttemptRecord {
                build_result: Some(result.clone()),
                ..attempt.clone()
            };
            Next::steps(
                vec![
                    Step::WriteAttempt(Box::new(measured)),
                    Step::StopBuild {
                        unit: name,
                        kill: false,
                    },
                ],
                Phase::Building,
                "the build has ended",
            )
        }
        (Some(BuildView::Ended(_) | BuildView::Killed(_)), Some(_)) => Next::step(
            Step::StopBuild {
                unit: name,
                kill: false,
            },
            Phase::Building,
            "the build has ended",
        ),
        (None, Some(result)) => built(observed, attempt, result),
        (None, None) if observed.host.stage => rebuild(observed, attempt, vec![]),
        (None, None) => start_build(observed, attempt),
    }
}

/// The build has ended, its unit is gone and its result is on disk.
fn built(observed: &Observed, attempt: &AttemptRecord, result: &StepResult) -> Next {
    if result.is_success() {
        return if observed.host.stage {
            Next::step(Step::Seal, Phase::Building, "the tree is being sealed")
        } else {
            // Somebody took the stage away.
            rebuild(observed, attempt, vec![])
        };
    }
    match build_failure(attempt, result) {
        failure if failure.reason.class() == Class::Environment => {
            let mut steps = vec![];
            if failure.reason == Reason::SourceUnavailable {
                steps.push(Step::SuspectMirror);
            }
            steps.push(Step::HoldUp(failure));
            rebuild(observed, attempt, steps)
        }
        failure => Next::fail(observed, attempt, failure),
    }
}

/// The build begins anew, under a name and in a stage of its own.
fn rebuild(observed: &Observed, attempt: &AttemptRecord, mut steps: Vec<Step>) -> Next {
    let held_up = steps.iter().any(|step| matches!(step, Step::HoldUp(_)));
    if attempt.build_try + 1 >= BUILD_TRIES && !held_up {
        let message = format!(
            "the build of {} ended {} times without a result: its unit was gone, as after a reboot",
            attempt.wish.commit.short(),
            attempt.build_try + 1
        );
        return Next::fail(observed, attempt, failure(Reason::BuildFailed, message));
    }
    let again = AttemptRecord {
        build_try: attempt.build_try + 1,
        build_result: None,
        ..attempt.clone()
    };
    steps.push(Step::WriteAttempt(Box::new(again)));
    Next::steps(steps, Phase::Building, "the build begins anew")
}

fn start_build(observed: &Observed, attempt: &AttemptRecord) -> Next {
    let host = &observed.host;
    match &host.source {
        None => Next::step(
            Step::WantCommit,
            Phase::Fetching,
            "the commit is being fetched",
        ),
        Some(SourceView::Queued { position, of }) => Next::wait(Progress::Queued {
            position: *position,
            of: *of,
        }),
        Some(SourceView::Fetching) => Next::wait(Progress::At(
            Phase::Fetching,
            format!("{} is being fetched", attempt.wish.commit.short()),
        )),
        Some(SourceView::Failed(failure)) => {
            Next::wait(Progress::HeldUp(Phase::Fetching, failure.clone()))
        }
        Some(SourceView::Ready) => {
            if let Some(message) = &host.disk_pressure {
                let mut next = Next::wait(Progress::HeldUp(
                    Phase::Building,
                    failure(Reason::DiskPressure, message.clone()),
                ));
                next.wake = Some(observed.now + PRESSURE_INTERVAL);
                return next;
            }
            match host.slot {
                SlotView::Granted => {
                    Next::step(Step::StartBuild, Phase::Building, "the build starts")
                }
                SlotView::Queued { position, of } => Next::wait(Progress::Queued { position, of }),
                SlotView::Unasked => Next::wait(Progress::At(
                    Phase::Queued,
                    "a build slot is asked for".to_owned(),
                )),
            }
        }
    }
}

/// How often a full disk is looked at again.
const PRESSURE_INTERVAL: Duration = Duration::from_secs(15);

/// There is a tree; units and ports have to be chosen.
fn choose(observed: &Observed, attempt: &AttemptRecord) -> Next {
    if let Some((host, app)) = observed.host.conflicts.first() {
        let message = format!(
            "host {host} is served by {}/{} on this node: take it out of one of the two Deployments",
            app.namespace(),
            app.name()
        );
        let mut next = Next::wait(Progress::HeldUp(
            Phase::Starting,
            failure(Reason::RouteConflict, message),
        ));
        next.wake = Some(observed.now + PRESSURE_INTERVAL);
        return next;
    }
    let applied: &[ProcessRecord] = committed(observed).map_or(&[], |release| &release.processes);
    let keep = applied
        .iter()
        .filter(|process| {
            let health = observed
                .host
                .services
                .get(&process.unit)
                .map(|service| &service.health);
            !matches!(health, Some(Health::PortTaken { .. }))
        })
        .map(|process| process.name.clone())
        .collect();
    let _ = attempt;
    Next::step(
        Step::ChooseProcesses { keep },
        Phase::Starting,
        "units and ports are chosen",
    )
}

/// Units are chosen: start, healthy, switch, bake, commit.
fn run(observed: &Observed, attempt: &AttemptRecord) -> Next {
    let host = &observed.host;
    let applied: &[ProcessRecord] = committed(observed).map_or(&[], |release| &release.processes);
    let (mut to_write, mut to_start) = (vec![], vec![]);
    let mut stale = false;
    let mut waits: Option<(String, Option<Duration>)> = None;
    let mut ready_since = Duration::ZERO;
    for process in &attempt.processes {
        let kept = applied.iter().any(|old| old.unit == process.unit);
        let service = host.services.get(&process.unit);
        let file = service.map_or(FileView::Missing, |service| service.file);
        let activity = service.map_or(Activity::Inactive, |service| service.activity);
        if !kept {
            // The committed ones are healed, not written, by the attempt.
            if file != FileView::Intact {
                to_write.push(process.clone());
            }
            stale |= service.is_some_and(|service| service.stale);
        }
        match service.map(|service| &service.health) {
            Some(Health::Failed(failure)) if !kept || attempt.switching => {
                return Next::fail(observed, attempt, failure.clone());
            }
            Some(Health::PortTaken { by: _ }) => {
                // Other ports, and so other units; those of before are strays then.
                let again = AttemptRecord {
                    processes: vec![],
                    switching: false,
                    ..attempt.clone()
                };
                return Next::step(
                    Step::WriteAttempt(Box::new(again)),
                    Phase::Starting,
                    "its port is taken",
                );
            }
            Some(Health::Ready { since }) => ready_since = ready_since.max(*since),
            Some(Health::Waiting { what, until }) => {
                waits = earlier(waits, (format!("{}: {what}", process.name), *until))
            }
            Some(Health::Failed(_)) | None => {
                waits = earlier(waits, (format!("{} starts", process.name), None))
            }
        }
        if !kept && matches!(activity, Activity::Inactive | Activity::Failed) {
            to_start.push(process.unit.clone());
        }
    }
    if !to_start.is_empty() || !to_write.is_empty() || stale {
        let mut steps = vec![];
        if !to_write.is_empty() {
            steps.push(Step::WriteUnits(to_write));
        }
        if stale {
            steps.push(Step::ReloadManager);
        }
        if !to_start.is_empty() {
            steps.push(Step::StartUnits(to_start));
        }
        return Next::steps(steps, Phase::Starting, "the processes start");
    }
    if let Some((what, wake)) = waits {
        let phase = if attempt.switching {
            Phase::Baking
        } else {
            Phase::Starting
        };
        return Next {
            steps: vec![],
            progress: Progress::At(phase, what),
            wake,
        };
    }
    switch(observed, attempt, ready_since)
}

fn earlier(
    waits: Option<(String, Option<Duration>)>,
    more: (String, Option<Duration>),
) -> Option<(String, Option<Duration>)> {
    let wake = [waits.as_ref().and_then(|w| w.1), more.1]
        .into_iter()
        .flatten()
        .min();
    Some((waits.map_or(more.0, |w| w.0), wake))
}

/// All processes are healthy.
fn switch(observed: &Observed, attempt: &AttemptRecord, ready_since: Duration) -> Next {
    if !attempt.switching {
        if stop_strays(observed, Some(attempt)).left {
            return Next::wait(Progress::At(
                Phase::Starting,
                "older processes finish their requests first".to_owned(),
            ));
        }
        let switching = AttemptRecord {
            switching: true,
            ..attempt.clone()
        };
        return Next::step(
            Step::WriteAttempt(Box::new(switching)),
            Phase::Switching,
            "the traffic is being moved",
        );
    }
    let since = match traffic(observed, attempt_virtual_host(observed, attempt).as_ref()) {
        Traffic::InForce(since) => since,
        Traffic::Step(step) => {
            return Next::step(step, Phase::Switching, "the traffic is being moved");
        }
        Traffic::HeldUp(held_up) => {
            let mut next = Next::wait(Progress::HeldUp(Phase::Switching, held_up.failure.clone()));
            next.wake = Some(held_up.until);
            return next;
        }
    };
    let baked = since.max(ready_since)
        + Duration::from_secs(u64::from(attempt.wish.template.min_ready_seconds));
    if observed.now < baked {
        let mut next = Next::wait(Progress::At(
            Phase::Baking,
            format!(
                "healthy under traffic, to stay so for {} s",
                attempt.wish.template.min_ready_seconds
            ),
        ));
        next.wake = Some(baked);
        return next;
    }
    let mut steps = vec![Step::WriteTarget {
        release_id: attempt.wish.release_id,
        units: unit_names(&attempt.processes),
    }];
    steps.extend(record_commit(observed, attempt));
    Next::steps(steps, Phase::Baking, "it is being committed")
}

/// A failed or superseded attempt is taken back: its build, the traffic, its units.
fn undo(observed: &Observed, attempt: &AttemptRecord) -> Plan {
    let progress = match &attempt.outcome {
        Some(Outcome::Failed { failure, .. }) => Progress::Failed(failure.clone()),
        Some(Outcome::Superseded { .. } | Outcome::Committed { .. }) | None => Progress::At(
            Phase::Pending,
            "taking back what a newer wish replaces".to_owned(),
        ),
    };
    // The build first: it is the loudest, and stopping it cannot harm what runs.
    let mut steps = stop_builds(observed, None);
    let (healing, drift) = heal(observed);
    steps.extend(healing);
    let mut wake = None;
    match traffic(observed, committed_virtual_host(observed).as_ref()) {
        Traffic::Step(step) => steps.push(step),
        Traffic::HeldUp(held_up) => wake = Some(held_up.until),
        Traffic::InForce(_) => {
            let strays = stop_strays(observed, None);
            steps.extend(
                strays
                    .steps
                    .into_iter()
                    .filter(|step| !matches!(step, Step::StopBuild { .. })),
            );
            wake = strays.wake;
            if !strays.left && observed.host.builds.is_empty() {
                let outcome = attempt.outcome.clone().map(|outcome| match outcome {
                    Outcome::Failed {
                        at,
                        failure,
                        undone: _,
                    } => Outcome::Failed {
                        at,
                        failure,
                        undone: true,
                    },
                    Outcome::Superseded { at, undone: _ } => {
                        Outcome::Superseded { at, undone: true }
                    }
                    Outcome::Committed { at } => Outcome::Committed { at },
                });
                steps.push(Step::WriteAttempt(Box::new(AttemptRecord {
                    outcome,
                    ..attempt.clone()
                })));
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

fn end(attempt: &AttemptRecord, outcome: Outcome, progress: Progress) -> Plan {
    just(
        Step::WriteAttempt(Box::new(AttemptRecord {
            outcome: Some(outcome),
            ..attempt.clone()
        })),
        progress,
    )
}

// ---- Small things ---------------------------------------------------------

fn just(step: Step, progress: Progress) -> Plan {
    Plan {
        steps: vec![step],
        progress,
        drift: vec![],
        wake: None,
    }
}

/// The committed release.
pub fn committed(observed: &Observed) -> Option<&AppliedRelease> {
    observed
        .applied
        .as_ref()
        .and_then(|applied| applied.release.as_ref())
}

fn waiting(observed: &Observed) -> Option<&HeldUp> {
    observed
        .held_up
        .as_ref()
        .filter(|held_up| observed.now < held_up.until)
}

fn build_unit(observed: &Observed, attempt: &AttemptRecord) -> String {
    unit::build_unit_name(&observed.app, &attempt.wish.release_id, attempt.build_try)
}

fn unit_names(processes: &[ProcessRecord]) -> Vec<String> {
    processes
        .iter()
        .map(|process| process.unit.clone())
        .collect()
}

fn phase_of(observed: &Observed, attempt: &AttemptRecord) -> Phase {
    if attempt.switching {
        Phase::Switching
    } else if observed.host.trees.contains(&attempt.build_key) {
        Phase::Starting
    } else {
        Phase::Building
    }
}

fn failure(reason: Reason, message: String) -> RecordedFailure {
    RecordedFailure {
        reason,
        message,
        log_tail: None,
    }
}

/// What a build's result means. The log's tail is added where it is read.
pub fn build_failure(attempt: &AttemptRecord, result: &StepResult) -> RecordedFailure {
    let StepResult {
        result,
        code,
        status,
    } = result;
    let commit = attempt.wish.commit.short();
    let directory = attempt.wish.template.source.directory.as_deref();
    let timeout = attempt
        .wish
        .template
        .build
        .as_ref()
        .map_or(0, |build| build.timeout_seconds);
    let (reason, message) = match (result.as_str(), *code, *status) {
        ("timeout", _, _) => (
            Reason::BuildTimedOut,
            format!(
                "the build of {commit} did not end within {timeout} s: make it faster, or raise build.timeoutSeconds"
            ),
        ),
        ("oom-kill", _, _) | ("signal", _, 9) => (
            Reason::ExceededMemory,
            format!(
                "the build of {commit} was killed, most likely for its memory: raise build.resources.limits.memory"
            ),
        ),
        ("resources", _, _) => (
            Reason::BuildFailed,
            format!("the build of {commit} could not be started by systemd (resources)"),
        ),
        // The main process never ran: the checkout before it failed.
        (_, 0, _) => (
            Reason::SourceUnavailable,
            format!("{commit} could not be checked out of the mirror; it is fetched anew"),
        ),
        (_, 1, 125) if directory.is_some() => (
            Reason::DirectoryNotFound,
            format!(
                "{commit} has no folder {:?}: correct source.git.directory",
                directory.unwrap_or_default()
            ),
        ),
        (_, 1, 127) => (
            Reason::ToolMissing,
            format!(
                "the build of {commit} calls a program that is not there (exit 127; the log names it)"
            ),
        ),
        (_, 1, status) => (
            Reason::BuildFailed,
            format!("the build of {commit} ended with exit {status}"),
        ),
        (_, _, signal) => (
            Reason::BuildFailed,
            format!("the build of {commit} was ended by signal {signal}"),
        ),
    };
    failure(reason, message)
}
