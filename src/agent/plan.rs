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

mod attempt;
mod keep;
mod recreate;
mod removal;
#[cfg(test)]
mod rules;
#[cfg(test)]
pub mod simulation;
#[cfg(test)]
mod tests;
mod traffic;

use std::collections::BTreeSet;
use std::time::Duration;

use self::attempt::advance;
use self::keep::{heal, held, keep_ports, stop_builds, stop_strays};
pub use self::traffic::committed_virtual_host;
use self::traffic::{Traffic, traffic};
use super::host::proxy::VirtualHost;
use super::host::records::{
    AppliedRecord, AppliedRelease, AttemptRecord, Outcome, ProcessRecord, RECORD_VERSION,
    RecordedFailure, ReleaseRecord, Wish,
};
use super::host::unit;
use super::view::{HeldUp, Observed, Wanted};
use crate::api::names::ReleaseId;
use crate::api::reasons::Reason;
use crate::api::release::Phase;

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
    /// Gives the state that a removal kept to the attempt, or moves it to the trash.
    TakeState {
        /// Whether it was this Deployment that wrote it.
        keep: bool,
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
    if let Some(plan) = take_state(observed) {
        return plan;
    }
    let Some(attempt) = &observed.attempt else {
        return match &observed.wanted {
            Wanted::Orphan => removal::leave(observed),
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
    if observed.wanted == Wanted::Orphan {
        return removal::orphan(observed, attempt);
    }

    let newer = match &observed.wanted {
        Wanted::Release(wish) if wish.release_id != attempt.wish.release_id => Newer::Wish(wish),
        Wanted::Release(wish) if **wish != attempt.wish => {
            // The same decision, with other retention, from another url or sealed to another key.
            let refreshed = AttemptRecord {
                wish: (**wish).clone(),
                ..attempt.clone()
            };
            let mut steps = keep_sealed(observed, wish);
            steps.push(Step::WriteAttempt(Box::new(refreshed)));
            return Plan {
                steps,
                progress: Progress::Idle,
                drift: vec![],
                wake: None,
            };
        }
        Wanted::Invalid {
            release_id,
            failure,
        } if *release_id != attempt.wish.release_id => Newer::Invalid(failure),
        Wanted::Release(_)
        | Wanted::Invalid { .. }
        | Wanted::Unknown
        | Wanted::Absent
        | Wanted::Removal { .. }
        | Wanted::Orphan => Newer::Nothing,
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
            Wanted::Invalid { .. }
            | Wanted::Unknown
            | Wanted::Absent
            | Wanted::Removal { .. }
            | Wanted::Orphan => held(observed, Progress::Idle),
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
        wish.template.source.submodules,
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
        stopped_old: vec![],
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

/// State that a removal kept goes to the Deployment that wrote it, and to no other of its name.
fn take_state(observed: &Observed) -> Option<Plan> {
    let kept = observed.host.kept_state.as_ref()?;
    let attempt = observed.attempt.as_ref()?;
    let keep = kept.deployment_uid == attempt.wish.deployment_uid;
    Some(just(
        Step::TakeState { keep },
        Progress::At(
            Phase::Pending,
            "the state of before is looked at".to_owned(),
        ),
    ))
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
        sealed: wish.sealed.clone(),
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
            sealed: wish.sealed.clone(),
            build_key: build_key.clone(),
            committed_at: observed.wall,
        })),
        Step::WriteApplied(Box::new(AppliedRecord {
            version: RECORD_VERSION,
            app: observed.app.clone(),
            deployment_uid: wish.deployment_uid.clone(),
            release: Some(release),
            removing: None,
            orphaned: None,
        })),
        Step::WriteAttempt(Box::new(AttemptRecord {
            stopped_old: vec![],
            outcome: Some(Outcome::Committed { at: observed.wall }),
            ..attempt.clone()
        })),
    ]
}

/// What is committed was sealed anew: what is kept of it follows, so that an old key can go.
fn keep_sealed(observed: &Observed, wish: &Wish) -> Vec<Step> {
    let Some((applied, release)) = observed
        .applied
        .as_ref()
        .and_then(|applied| Some((applied, applied.release.as_ref()?)))
        .filter(|(_, release)| {
            release.release_id == wish.release_id
                && release.revision == wish.revision
                && release.sealed != wish.sealed
        })
    else {
        return vec![];
    };
    let release = AppliedRelease {
        sealed: wish.sealed.clone(),
        ..release.clone()
    };
    vec![
        Step::WriteRelease(Box::new(ReleaseRecord {
            version: RECORD_VERSION,
            revision: release.revision.clone(),
            commit: release.commit.clone(),
            template: release.template.clone(),
            sealed: release.sealed.clone(),
            build_key: release.build_key.clone(),
            committed_at: release.available_since,
        })),
        Step::WriteApplied(Box::new(AppliedRecord {
            release: Some(release),
            ..applied.clone()
        })),
    ]
}

/// A failed or superseded attempt is taken back: its build, the traffic, its units.
fn undo(observed: &Observed, attempt: &AttemptRecord) -> Plan {
    let progress = match &attempt.outcome {
        Some(Outcome::Failed { failure, .. }) => taking_back(observed, attempt, failure),
        Some(Outcome::Superseded { .. } | Outcome::Committed { .. }) | None => Progress::At(
            Phase::Pending,
            "taking back what a newer wish replaces".to_owned(),
        ),
    };
    if !attempt.stopped_old.is_empty() {
        let (mut plan, is_done) = recreate::give_back(observed, attempt);
        if let Progress::At(_, what) = progress {
            let what = format!("the old release is started again: {what}");
            plan.progress = Progress::At(Phase::Starting, what);
        }
        if is_done {
            plan.steps.push(undone(attempt));
        }
        return plan;
    }
    // The build first: it is the loudest, and stopping it cannot harm what runs.
    let mut steps = stop_builds(observed, None);
    let (healing, drift) = heal(observed, &[]);
    steps.extend(healing);
    let mut wake = None;
    match traffic(observed, committed_virtual_host(observed).as_ref()) {
        Traffic::Step(step) => steps.push(step),
        Traffic::HeldUp(held_up) => wake = Some(held_up.until),
        Traffic::InForce(_) => {
            // What never had traffic has nothing to finish.
            let at_once = if attempt.switching {
                vec![]
            } else {
                unit_names(&attempt.processes)
            };
            let strays = stop_strays(observed, None, &at_once);
            steps.extend(
                strays
                    .steps
                    .into_iter()
                    .filter(|step| !matches!(step, Step::StopBuild { .. })),
            );
            wake = strays.wake;
            if !strays.left && observed.host.builds.is_empty() {
                steps.push(undone(attempt));
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

/// Everything that the attempt did is taken back.
fn undone(attempt: &AttemptRecord) -> Step {
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
        Outcome::Superseded { at, undone: _ } => Outcome::Superseded { at, undone: true },
        Outcome::Committed { at } => Outcome::Committed { at },
    });
    Step::WriteAttempt(Box::new(AttemptRecord {
        outcome,
        stopped_old: vec![],
        ..attempt.clone()
    }))
}

/// The failure is told as one when it is recorded and taken back: by then the node serves what it served.
fn taking_back(
    observed: &Observed,
    attempt: &AttemptRecord,
    failure: &RecordedFailure,
) -> Progress {
    Progress::At(
        phase_of(observed, attempt),
        format!("taking back what failed: {}", failure.message),
    )
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
