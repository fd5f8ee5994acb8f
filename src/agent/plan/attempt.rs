//! The next step of an attempt: fetch, build, seal, start, switch, bake, commit.

use std::time::Duration;

use super::keep::{heal, stop_strays};
use super::recreate::{BeforeSwitch, before_switch, make_way, recreates};
use super::traffic::{Traffic, attempt_virtual_host, traffic};
use super::{
    BUILD_TRIES, Plan, Progress, Step, build_unit, committed, failure, phase_of, record_commit,
    taking_back, unit_names, waiting,
};
use crate::agent::host::records::{
    AttemptRecord, Outcome, ProcessRecord, RecordedFailure, StepResult,
};
use crate::agent::view::{Activity, BuildView, FileView, Health, Observed, SlotView, SourceView};
use crate::agent::wanted::rewind_base;
use crate::api::reasons::{Class, Reason};
use crate::api::release::Phase;

/// The attempt's next step, what is committed kept meanwhile.
pub(super) fn advance(observed: &Observed, attempt: &AttemptRecord) -> Plan {
    let (mut steps, drift) = heal(observed, &attempt.stopped_old);
    let mut wake = None;
    // Until the attempt takes the traffic, it is the committed release's.
    if !attempt.switching
        && let BeforeSwitch::Serve(host) = before_switch(observed, attempt)
    {
        match traffic(observed, host.as_ref()) {
            Traffic::Step(step) => steps.push(step),
            Traffic::HeldUp(held_up) => wake = Some(held_up.until),
            Traffic::InForce(_) => {
                let strays = stop_strays(observed, Some(attempt), &[]);
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
    } else if let Some(next) = prove(observed, attempt) {
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
pub(super) struct Next {
    pub(super) steps: Vec<Step>,
    pub(super) progress: Progress,
    pub(super) wake: Option<Duration>,
}

impl Next {
    pub(super) fn step(step: Step, phase: Phase, what: &str) -> Self {
        Self::steps(vec![step], phase, what)
    }
    pub(super) fn steps(steps: Vec<Step>, phase: Phase, what: &str) -> Self {
        Self {
            steps,
            progress: Progress::At(phase, what.to_owned()),
            wake: None,
        }
    }
    pub(super) fn wait(progress: Progress) -> Self {
        Self {
            steps: vec![],
            progress,
            wake: None,
        }
    }
    pub(super) fn fail(
        observed: &Observed,
        attempt: &AttemptRecord,
        failure: RecordedFailure,
    ) -> Self {
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
            progress: taking_back(observed, attempt, &failure),
            wake: None,
        }
    }
}

/// A commit that must descend from the running one is shown to before anything comes of it, be there a tree of it
/// or not.
fn prove(observed: &Observed, attempt: &AttemptRecord) -> Option<Next> {
    let is_over = !attempt.processes.is_empty();
    if is_over || rewind_base(attempt, observed.applied.as_ref()).is_none() {
        return None;
    }
    fetch(observed, attempt)
}

/// There is no sealed tree yet.
pub(super) fn build(observed: &Observed, attempt: &AttemptRecord) -> Next {
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
pub(super) fn built(observed: &Observed, attempt: &AttemptRecord, result: &StepResult) -> Next {
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
pub(super) fn rebuild(observed: &Observed, attempt: &AttemptRecord, mut steps: Vec<Step>) -> Next {
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

pub(super) fn start_build(observed: &Observed, attempt: &AttemptRecord) -> Next {
    if let Some(next) = fetch(observed, attempt) {
        return next;
    }
    let host = &observed.host;
    if let Some(message) = &host.disk_pressure {
        return pressed(observed, Phase::Building, message);
    }
    match host.slot {
        SlotView::Granted => Next::step(Step::StartBuild, Phase::Building, "the build starts"),
        SlotView::Queued { position, of } => Next::wait(Progress::Queued { position, of }),
        SlotView::Unasked => Next::wait(Progress::At(
            Phase::Queued,
            "a build slot is asked for".to_owned(),
        )),
    }
}

/// Nothing when the mirror has the commit, and it will do.
fn fetch(observed: &Observed, attempt: &AttemptRecord) -> Option<Next> {
    match (&observed.host.source, &observed.host.disk_pressure) {
        (None, Some(message)) => Some(pressed(observed, Phase::Fetching, message)),
        (None, None) => Some(Next::step(
            Step::WantCommit,
            Phase::Fetching,
            "the commit is being fetched",
        )),
        (Some(SourceView::Queued { position, of }), _) => Some(Next::wait(Progress::Queued {
            position: *position,
            of: *of,
        })),
        (Some(SourceView::Fetching), _) => Some(Next::wait(Progress::At(
            Phase::Fetching,
            format!("{} is being fetched", attempt.wish.commit.short()),
        ))),
        (Some(SourceView::Failed(failure)), _) => Some(Next::wait(Progress::HeldUp(
            Phase::Fetching,
            failure.clone(),
        ))),
        (Some(SourceView::Ready), _) => None,
    }
}

/// Neither a fetch nor a build begins on a disk that lacks its reserve.
fn pressed(observed: &Observed, phase: Phase, message: &str) -> Next {
    let failure = failure(Reason::DiskPressure, message.to_owned());
    let mut next = Next::wait(Progress::HeldUp(phase, failure));
    next.wake = Some(observed.now + PRESSURE_INTERVAL);
    next
}

/// How often a full disk is looked at again.
const PRESSURE_INTERVAL: Duration = Duration::from_secs(15);

/// There is a tree; units and ports have to be chosen.
pub(super) fn choose(observed: &Observed, attempt: &AttemptRecord) -> Next {
    if let Some((host, app)) = observed.host.conflicts.first() {
        let more = match observed.host.conflicts.len() {
            1 => String::new(),
            count => format!(" (and {} more)", count - 1),
        };
        let message = format!(
            "host {host}{more} belongs to the Deployment {}/{} on this node: take it out of one of the two; this one goes on by itself when it is free",
            app.namespace(),
            app.name()
        );
        // Who gives a host up wakes those that wait for it.
        return Next::wait(Progress::HeldUp(
            Phase::Starting,
            failure(Reason::RouteConflict, message),
        ));
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
                && !attempt.stopped_old.contains(&process.unit)
        })
        .map(|process| process.name.clone())
        .collect();
    Next::step(
        Step::ChooseProcesses { keep },
        Phase::Starting,
        "units and ports are chosen",
    )
}

/// Units are chosen: start, healthy, switch, bake, commit.
pub(super) fn run(observed: &Observed, attempt: &AttemptRecord) -> Next {
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
    if to_write.is_empty()
        && !stale
        && let Some(next) = make_way(observed, attempt)
    {
        return next;
    }
    // What must not run beside the old is written before the old stops, and started after.
    let starts_now = !recreates(attempt) || (to_write.is_empty() && !stale);
    if !to_start.is_empty() || !to_write.is_empty() || stale {
        let mut steps = vec![];
        if !to_write.is_empty() {
            steps.push(Step::WriteUnits(to_write));
        }
        if stale {
            steps.push(Step::ReloadManager);
        }
        if !to_start.is_empty() && starts_now {
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

pub(super) fn earlier(
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
pub(super) fn switch(observed: &Observed, attempt: &AttemptRecord, ready_since: Duration) -> Next {
    if !attempt.switching {
        if stop_strays(observed, Some(attempt), &[]).left {
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
