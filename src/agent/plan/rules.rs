//! The rules of an app on its node, each as a row of a table: what is seen, and what is done next.
//!
//! `simulation` checks the rules that hold at every step of every story of `tests`: nothing that runs is
//! touched before the commit, a wish is on the disk before its first effect, a result before its unit is let
//! go, a commit only of what runs, has the traffic and was baked.
//!
//! | rule | rows |
//! | --- | --- |
//! | fetch, disk and slot before a build | [`what_a_build_waits_for_is_told`], `tests::without_a_slot_nothing_is_built_…` |
//! | a build: measured, recorded, stopped, sealed; run again without a result | [`a_build_is_recorded_before_it_is_let_go_and_run_again_when_it_left_nothing`] |
//! | a build's failure: whose fault | [`a_build_that_fails_is_told_by_how_it_ended`] |
//! | a rewind that is not allowed | [`a_commit_that_must_descend_from_the_running_one_is_shown_to_before_anything_comes_of_it`] |
//! | surroundings | [`what_holds_an_attempt_up_is_told_with_where_it_is`], [`what_is_taken_back_waits_for_the_proxy_and_keeps_what_runs`], `tests::a_missing_tool_…`, `tests::a_proxy_that_is_down_…`, `tests::a_host_of_another_app_…` |
//! | supersede | `tests::a_newer_wish_supersedes_…`, `tests::a_superseded_build_is_killed_…`, [`a_wish_that_cannot_be_carried_out_takes_back_what_was_tried`] |
//! | undo, and its outcome on the disk | `tests::each_failure_before_the_commit_…`, `tests::going_back_after_a_failure_…` |
//! | commit: completed before anything else | [`a_target_that_names_the_attempt_is_a_commit_whatever_is_wanted`] |
//! | after the commit only a new wish changes the release | [`what_is_committed_is_put_right_and_never_changed`] |
//! | the same decision said otherwise | [`what_changes_besides_the_release_is_written_down_and_nothing_else`] |
//! | hold: no Release, no API, a spec that cannot be | `tests::the_absence_of_a_release_…`, `tests::a_spec_that_cannot_be_carried_out_…`, [`a_node_without_a_record_of_an_attempt_holds_what_it_has`], `tests::an_agent_killed_at_every_step_…` |
//! | old processes: drained, stopped, collected | [`what_is_neither_committed_nor_tried_is_drained_stopped_and_removed`] |
//! | ports | [`a_port_that_a_stranger_took_before_the_commit_is_chosen_anew`], `tests::a_port_that_a_stranger_took_…` |
//! | recreate | `tests::a_recreate_…`, [`a_recreate_finds_its_way_around_a_taken_port_and_a_proxy_that_is_away`] |
//! | removal: in order, not past a failure | [`a_removal_goes_in_order`], [`a_removal_does_not_go_past_a_step_that_failed`], `tests::a_removal_…` |
//! | orphan, adoption | `tests::an_app_that_is_orphaned_…`, `tests::another_attempt_of_the_same_content_…` |
//! | state that a removal kept | [`state_that_was_kept_goes_to_its_own_deployment_only`] |
//! | retained releases | `collect::tests` |
//! | the virtual host | [`a_route_leads_to_its_process_and_is_measured_where_its_probe_looks`] |

use std::time::Duration;

use super::simulation::{Draft, Fate, World, app, draft, release_id, wish};
use super::traffic::virtual_host;
use super::{BUILD_TRIES, Plan, Progress, Step, plan};
use crate::agent::host::proxy::{HostName, RouteTarget};
use crate::agent::host::records::{
    AttemptRecord, KeptRecord, Outcome, RECORD_VERSION, RecordedFailure, StepResult,
};
use crate::agent::view::{
    Activity, BuildView, DrainView, FileView, Health, HeldUp, Observed, ServiceView, SlotView,
    SourceView, Wanted,
};
use crate::api::names::RevisionName;
use crate::api::reasons::Reason;
use crate::api::release::Phase;

/// What is seen otherwise than the story has it.
type Change = fn(&mut Observed);

fn running(number: u8) -> World {
    let mut world = World::new();
    world.want(draft(number));
    world.settle();
    world
}

/// Release 1 runs, release 2 is wanted, and all that comes before `step` is done.
fn before(world: &mut World, to: Draft, step: fn(&Step) -> bool) -> Observed {
    world.want(to);
    for _ in 0..400 {
        let observed = world.observe();
        if plan(&observed).steps.first().is_some_and(step) {
            return observed;
        }
        if world.round(1).1 == 0 {
            world.pass_time(Duration::from_secs(1));
        }
    }
    panic!("it does not come to it:\n{}", world.log.join("\n"));
}

/// Release 1 runs, and the build of release 2 does.
fn building() -> Observed {
    let mut world = running(1);
    before(&mut world, draft(2), |s| matches!(s, Step::StartBuild));
    world.round(1);
    world.observe()
}

fn attempt(observed: &mut Observed) -> &mut AttemptRecord {
    observed.attempt.as_mut().unwrap()
}

fn failure(reason: Reason) -> RecordedFailure {
    RecordedFailure {
        reason,
        message: "m".into(),
        log_tail: None,
    }
}

fn result(result: &str, code: i32, status: i32) -> StepResult {
    StepResult {
        result: result.into(),
        code,
        status,
    }
}

/// The steps by their names; what is written of an attempt says how far it is.
fn words(plan: &Plan) -> Vec<String> {
    let word = |step: &Step| match step {
        Step::WriteAttempt(record) => match &record.outcome {
            Some(Outcome::Failed { failure, .. }) => format!("failed {}", failure.reason),
            Some(Outcome::Superseded { .. }) => "superseded".into(),
            Some(Outcome::Committed { .. }) => "committed".into(),
            None if record.build_result.is_some() => "result".into(),
            None => format!("try {}", record.build_try),
        },
        Step::StopBuild { kill, .. } => if *kill { "kill" } else { "let go" }.into(),
        other => {
            let text = format!("{other:?}");
            text.split(|c: char| !c.is_alphanumeric())
                .next()
                .unwrap_or_default()
                .into()
        }
    };
    plan.steps.iter().map(word).collect()
}

#[test]
fn what_a_build_waits_for_is_told() {
    let mut world = running(1);
    let observed = before(&mut world, draft(2), |s| matches!(s, Step::WantCommit));
    let failed = || failure(Reason::SourceUnavailable);
    let rows: [(&str, Change, &[&str], Progress); 9] = [
        (
            "the disk is full before the mirror was asked",
            |o| o.host.disk_pressure = Some("m".into()),
            &[],
            Progress::HeldUp(Phase::Fetching, failure(Reason::DiskPressure)),
        ),
        (
            "the mirror was not asked",
            |_| (),
            &["WantCommit"],
            Progress::At(Phase::Fetching, "the commit is being fetched".into()),
        ),
        (
            "the mirror waits for its turn",
            |o| o.host.source = Some(SourceView::Queued { position: 3, of: 4 }),
            &[],
            Progress::Queued { position: 3, of: 4 },
        ),
        (
            "the mirror fetches",
            |o| o.host.source = Some(SourceView::Fetching),
            &[],
            Progress::At(Phase::Fetching, "0000000 is being fetched".into()),
        ),
        (
            "the mirror cannot",
            |o| {
                let failed = failure(Reason::SourceUnavailable);
                o.host.source = Some(SourceView::Failed(failed));
            },
            &[],
            Progress::HeldUp(Phase::Fetching, failed()),
        ),
        (
            "the disk is full",
            |o| {
                o.host.source = Some(SourceView::Ready);
                o.host.disk_pressure = Some("m".into());
            },
            &[],
            Progress::HeldUp(Phase::Building, failure(Reason::DiskPressure)),
        ),
        (
            "no slot was asked for",
            |o| {
                o.host.source = Some(SourceView::Ready);
                o.host.slot = SlotView::Unasked;
            },
            &[],
            Progress::At(Phase::Queued, "a build slot is asked for".into()),
        ),
        (
            "no slot is free",
            |o| {
                o.host.source = Some(SourceView::Ready);
                o.host.slot = SlotView::Queued { position: 1, of: 2 };
            },
            &[],
            Progress::Queued { position: 1, of: 2 },
        ),
        (
            "all is there",
            |o| o.host.source = Some(SourceView::Ready),
            &["StartBuild"],
            Progress::At(Phase::Building, "the build starts".into()),
        ),
    ];
    for (row, change, steps, progress) in rows {
        let mut observed = observed.clone();
        change(&mut observed);
        let plan = plan(&observed);
        assert_eq!(words(&plan), steps, "{row}");
        assert_eq!(plan.progress, progress, "{row}");
        // What no signal tells of is looked at again.
        assert_eq!(plan.wake.is_some(), row.contains("disk"), "{row}");
    }
}

#[test]
fn a_build_is_recorded_before_it_is_let_go_and_run_again_when_it_left_nothing() {
    fn build(observed: &mut Observed, view: BuildView) {
        *observed.host.builds.values_mut().next().unwrap() = view;
    }
    fn gone(observed: &mut Observed, stage: bool, measured: Option<StepResult>) {
        observed.host.builds.clear();
        observed.host.stage = stage;
        attempt(observed).build_result = measured;
    }
    let rows: [(&str, Change, &[&str]); 13] = [
        ("it runs", |_| (), &[]),
        (
            "it is being stopped",
            |o| build(o, BuildView::Stopping),
            &[],
        ),
        (
            "it has ended",
            |o| build(o, BuildView::Ended(result("success", 1, 0))),
            &["result", "let go"],
        ),
        (
            "it has ended, and the agent was killed after it had written that down",
            |o| {
                build(o, BuildView::Ended(result("success", 1, 0)));
                attempt(o).build_result = Some(result("success", 1, 0));
            },
            &["let go"],
        ),
        (
            "the agent killed it for its surroundings",
            |o| build(o, BuildView::Killed(failure(Reason::DiskPressure))),
            &["let go", "HoldUp", "try 1"],
        ),
        (
            "the agent killed it for what it did",
            |o| build(o, BuildView::Killed(failure(Reason::ExceededMemory))),
            &["failed ExceededMemory"],
        ),
        (
            "a reboot took it before it had begun",
            |o| gone(o, false, None),
            &["StartBuild"],
        ),
        (
            "a reboot took it in the middle",
            |o| gone(o, true, None),
            &["try 1"],
        ),
        (
            "it has ended well",
            |o| gone(o, true, Some(result("success", 1, 0))),
            &["Seal"],
        ),
        (
            "it has ended well, and somebody took its stage away",
            |o| gone(o, false, Some(result("success", 1, 0))),
            &["try 1"],
        ),
        (
            "it has ended badly",
            |o| gone(o, true, Some(result("exit-code", 1, 2))),
            &["failed BuildFailed"],
        ),
        (
            "its checkout failed, though the mirror has the commit",
            |o| gone(o, true, Some(result("exit-code", 0, 0))),
            &["SuspectMirror", "HoldUp", "try 1"],
        ),
        (
            "it was taken by a reboot each time",
            |o| {
                gone(o, true, None);
                attempt(o).build_try = BUILD_TRIES - 1;
            },
            &["failed BuildFailed"],
        ),
    ];
    for (row, change, steps) in rows {
        let mut observed = building();
        change(&mut observed);
        assert_eq!(words(&plan(&observed)), steps, "{row}");
    }
    // A surrounding that fails again and again uses up no tries.
    let mut observed = building();
    let tries = attempt(&mut observed);
    tries.build_try = BUILD_TRIES + 5;
    let tries = tries.clone();
    let unit = super::build_unit(&observed, &tries);
    let killed = BuildView::Killed(failure(Reason::DiskPressure));
    observed.host.builds = [(unit, killed)].into();
    assert_eq!(words(&plan(&observed)), ["let go", "HoldUp", "try 10"]);
}

#[test]
fn a_build_that_fails_is_told_by_how_it_ended() {
    let in_root = building().attempt.unwrap();
    let mut in_folder = in_root.clone();
    in_folder.wish.template.source.directory = Some("services/shop".into());
    for (how, attempt, reason, says) in [
        (
            result("timeout", 1, 0),
            &in_root,
            Reason::BuildTimedOut,
            "build.timeoutSeconds",
        ),
        (
            result("timeout", 2, 15),
            &in_root,
            Reason::BuildTimedOut,
            "build.timeoutSeconds",
        ),
        (
            result("oom-kill", 2, 9),
            &in_root,
            Reason::ExceededMemory,
            "limits.memory",
        ),
        (
            result("signal", 2, 9),
            &in_root,
            Reason::ExceededMemory,
            "limits.memory",
        ),
        (
            result("signal", 2, 11),
            &in_root,
            Reason::BuildFailed,
            "signal 11",
        ),
        (
            result("core-dump", 3, 6),
            &in_root,
            Reason::BuildFailed,
            "signal 6",
        ),
        (
            result("resources", 0, 0),
            &in_root,
            Reason::BuildFailed,
            "(resources)",
        ),
        (
            result("exit-code", 0, 0),
            &in_root,
            Reason::SourceUnavailable,
            "fetched anew",
        ),
        (
            result("exit-code", 1, 127),
            &in_root,
            Reason::ToolMissing,
            "exit 127",
        ),
        (
            result("exit-code", 1, 125),
            &in_folder,
            Reason::DirectoryNotFound,
            "services/shop",
        ),
        (
            result("exit-code", 1, 125),
            &in_root,
            Reason::BuildFailed,
            "exit 125",
        ),
        (
            result("exit-code", 1, 2),
            &in_folder,
            Reason::BuildFailed,
            "exit 2",
        ),
    ] {
        let failure = super::attempt::build_failure(attempt, &how);
        assert_eq!(failure.reason, reason, "{how:?}");
        assert!(
            failure.message.contains(says),
            "{how:?}: {}",
            failure.message
        );
    }
}

#[test]
fn a_target_that_names_the_attempt_is_a_commit_whatever_is_wanted() {
    let mut world = running(1);
    before(&mut world, draft(2), |s| {
        matches!(s, Step::WriteTarget { .. })
    });
    world.round(1);
    world.restart_agent();
    assert_eq!(world.serving(), Some(release_id(1)), "the record is behind");
    let invalid = Wanted::Invalid {
        release_id: release_id(3),
        failure: failure(Reason::InvalidSpec),
    };
    for wanted in [
        Wanted::Unknown,
        Wanted::Absent,
        Wanted::Release(Box::new(wish(draft(2)))),
        Wanted::Release(Box::new(wish(draft(3)))),
        invalid,
        Wanted::Orphan,
    ] {
        let observed = Observed {
            wanted: wanted.clone(),
            ..world.observe()
        };
        let plan = plan(&observed);
        let steps = ["WriteRelease", "WriteApplied", "committed"];
        assert_eq!(words(&plan), steps, "{wanted:?}");
    }
    // A target that names anything else is no commit.
    for change in [
        (|o| o.host.target.as_mut().unwrap().units.clear()) as Change,
        |o| o.host.target.as_mut().unwrap().release_id = None,
        |o| o.host.target = None,
    ] {
        let mut observed = world.observe();
        change(&mut observed);
        let steps = words(&plan(&observed));
        assert!(!steps.contains(&"WriteApplied".to_owned()), "{steps:?}");
    }
}

#[test]
fn what_is_committed_is_put_right_and_never_changed() {
    fn web(observed: &mut Observed) -> &mut ServiceView {
        let services = observed.host.services.iter_mut();
        let mut web =
            services.filter(|(unit, _)| unit.contains(".web-") || unit.contains("shop.web"));
        web.next().unwrap().1
    }
    let rows: [(&str, Change, &[&str], usize); 16] = [
        ("all is well", |_| (), &[], 0),
        (
            "its file is gone",
            |o| web(o).file = FileView::Missing,
            &["WriteUnits"],
            1,
        ),
        (
            "its file was changed",
            |o| web(o).file = FileView::Altered,
            &["WriteUnits"],
            1,
        ),
        (
            "systemd has read another text",
            |o| web(o).stale = true,
            &["ReloadManager"],
            0,
        ),
        (
            "it was stopped",
            |o| web(o).activity = Activity::Inactive,
            &["StartUnits"],
            1,
        ),
        (
            "it has given up",
            |o| web(o).activity = Activity::Failed,
            &["StartUnits"],
            1,
        ),
        (
            "it is being stopped",
            |o| web(o).activity = Activity::Deactivating,
            &[],
            0,
        ),
        (
            "it starts again",
            |o| web(o).activity = Activity::Activating,
            &[],
            0,
        ),
        (
            "it is at fault",
            |o| web(o).health = Health::Failed(failure(Reason::CrashLooping)),
            &[],
            0,
        ),
        (
            "systemd knows nothing of it",
            |o| drop(o.host.services.pop_first()),
            &["WriteUnits", "StartUnits"],
            1,
        ),
        (
            "the target is gone",
            |o| o.host.target = None,
            &["WriteTarget"],
            1,
        ),
        (
            "the target names another release",
            |o| o.host.target.as_mut().unwrap().release_id = Some(release_id(9)),
            &["WriteTarget"],
            1,
        ),
        (
            "the target is not enabled",
            |o| o.host.enabled = false,
            &["WriteTarget"],
            1,
        ),
        (
            "the traffic is not known to be its own",
            |o| o.host.virtual_host.in_force = None,
            &["Publish"],
            0,
        ),
        (
            "the proxy is away",
            |o| {
                o.host.virtual_host.in_force = None;
                o.held_up = Some(HeldUp {
                    failure: failure(Reason::ProxyUnavailable),
                    until: o.now + Duration::from_secs(5),
                });
            },
            &[],
            0,
        ),
        (
            "the host is another app's, says a conflict that comes too late",
            |o| o.host.conflicts = vec![(HostName::parse("shop.test").unwrap(), app())],
            &[],
            0,
        ),
    ];
    let world = running(1);
    for (row, change, steps, drift) in rows {
        let mut observed = world.observe();
        change(&mut observed);
        let plan = plan(&observed);
        assert_eq!(words(&plan), steps, "{row}");
        assert_eq!(plan.drift.len(), drift, "{row}: {:?}", plan.drift);
        let away = row == "the proxy is away";
        assert_eq!(plan.wake.is_some(), away, "{row}");
        let is_held_up = matches!(plan.progress, Progress::HeldUp(Phase::Degraded, _));
        assert_eq!(is_held_up, away, "{row}: {:?}", plan.progress);
    }
}

#[test]
fn what_is_neither_committed_nor_tried_is_drained_stopped_and_removed() {
    fn stray(observed: &mut Observed, activity: Activity, file: FileView, drain: DrainView) {
        let service = ServiceView {
            file,
            activity,
            stale: false,
            health: Health::Ready {
                since: Duration::ZERO,
            },
        };
        let unit = "kari.web.shop.web.old.service".to_owned();
        observed.host.services.insert(unit, service);
        observed.host.drain = drain;
    }
    const LATER: Duration = Duration::from_secs(1_000_000);
    use FileView::{Intact, Missing};
    let rows: [(&str, Change, &[&str], bool); 9] = [
        (
            "nobody knows whether it has requests",
            |o| stray(o, Activity::Active, Intact, DrainView::Unknown),
            &["BeginDrain"],
            true,
        ),
        (
            "it may have requests",
            |o| {
                stray(
                    o,
                    Activity::Active,
                    Intact,
                    DrainView::Going { until: LATER },
                )
            },
            &[],
            true,
        ),
        (
            "it has none",
            |o| stray(o, Activity::Active, Intact, DrainView::Over),
            &["StopUnits"],
            true,
        ),
        (
            "it has given up",
            |o| stray(o, Activity::Failed, Intact, DrainView::Over),
            &["StopUnits"],
            true,
        ),
        (
            "it is being stopped",
            |o| stray(o, Activity::Deactivating, Intact, DrainView::Over),
            &[],
            true,
        ),
        (
            "it is stopped",
            |o| stray(o, Activity::Inactive, Intact, DrainView::Over),
            &["RemoveUnits"],
            true,
        ),
        (
            "nothing of it is left",
            |o| stray(o, Activity::Inactive, Missing, DrainView::Over),
            &[],
            false,
        ),
        (
            "a build that nobody wants runs",
            |o| drop(o.host.builds.insert("b".into(), BuildView::Running)),
            &["kill"],
            false,
        ),
        (
            "a build that nobody wants ends",
            |o| drop(o.host.builds.insert("b".into(), BuildView::Stopping)),
            &[],
            false,
        ),
    ];
    let world = running(1);
    for (row, change, steps, left) in rows {
        let mut observed = world.observe();
        change(&mut observed);
        let plan = plan(&observed);
        assert_eq!(words(&plan), steps, "{row}");
        let drains = matches!(plan.progress, Progress::At(Phase::Draining, _));
        assert_eq!(drains, left, "{row}: {:?}", plan.progress);
    }
}

#[test]
fn what_changes_besides_the_release_is_written_down_and_nothing_else() {
    for fate in [Fate::Good, Fate::BuildFails] {
        let mut world = running(1);
        world.fates.insert(2, fate);
        world.want(draft(2));
        let progress = world.settle();
        let (serving, builds) = (world.serving(), world.build_starts);
        let outcome = world.attempt.as_ref().unwrap().outcome.clone();

        let mut again = wish(draft(2));
        again.generation = 2;
        again.retain = vec![RevisionName::new("shop-1")];
        again.template.keep_releases = 9;
        again.template.source.url = "https://git.test/moved.git".into();
        world.wanted = Wanted::Release(Box::new(again.clone()));
        let before = world.steps_done();
        assert_eq!(world.settle(), progress, "{fate:?}");
        assert_eq!(world.steps_done() - before, 1, "{}", world.log.join("\n"));
        let attempt = world.attempt.as_ref().unwrap();
        assert_eq!((&attempt.wish, &attempt.outcome), (&again, &outcome));
        assert_eq!((world.serving(), world.build_starts), (serving, builds));
    }
}

#[test]
fn a_wish_that_cannot_be_carried_out_takes_back_what_was_tried() {
    for recreate in [false, true] {
        let second = Draft {
            recreate,
            ..draft(2)
        };
        for steps in 0..200 {
            let mut world = running(1);
            world.want(second);
            let mut left = steps;
            while left > 0 && world.serving() == Some(release_id(1)) {
                assert!(
                    world.now < Duration::from_secs(200),
                    "{}",
                    world.log.join("\n")
                );
                match world.round(1).1 {
                    0 => world.pass_time(Duration::from_secs(1)),
                    _ => left -= 1,
                }
            }
            if world.serving() == Some(release_id(2)) {
                assert!(steps > 10, "{}", world.log.join("\n"));
                break;
            }
            // What has its target is committed, though its record is behind.
            let target = world.target.as_ref().and_then(|target| target.release_id);
            let failure = failure(Reason::InvalidSpec);
            world.wanted = Wanted::Invalid {
                release_id: release_id(3),
                failure: failure.clone(),
            };
            let held = Progress::HeldUp(Phase::Pending, failure);
            assert_eq!(world.settle(), held, "after {steps} steps");
            world.check_settled();
            assert_eq!(world.serving(), target, "after {steps} steps");
            // The wish that was taken back for it is tried anew when it comes back.
            world.want(second);
            assert_eq!(world.settle(), Progress::Idle, "after {steps} steps");
            world.check_settled();
            assert_eq!(world.serving(), Some(release_id(2)), "after {steps} steps");
        }
    }
}

#[test]
fn a_node_without_a_record_of_an_attempt_holds_what_it_has() {
    let world = running(1);
    let invalid = || Wanted::Invalid {
        release_id: release_id(2),
        failure: failure(Reason::InvalidSpec),
    };
    let held = || Progress::HeldUp(Phase::Pending, failure(Reason::InvalidSpec));
    let rows: [(Wanted, &[&str], Progress); 4] = [
        (Wanted::Unknown, &[], Progress::Idle),
        (Wanted::Absent, &[], Progress::Idle),
        (invalid(), &[], held()),
        (Wanted::Orphan, &["WriteApplied"], Progress::Removing),
    ];
    for (wanted, steps, progress) in rows {
        let observed = Observed {
            wanted: wanted.clone(),
            attempt: None,
            ..world.observe()
        };
        let plan = plan(&observed);
        assert_eq!(words(&plan), steps, "{wanted:?}");
        assert_eq!(plan.progress, progress, "{wanted:?}");
    }
    // What is served is written down as committed, and not tried.
    let observed = Observed {
        attempt: None,
        ..world.observe()
    };
    assert_eq!(words(&plan(&observed)), ["committed"]);
}

#[test]
fn what_holds_an_attempt_up_is_told_with_where_it_is() {
    fn hold_up(observed: &mut Observed) {
        observed.held_up = Some(HeldUp {
            failure: failure(Reason::ProxyUnavailable),
            until: observed.now + Duration::from_secs(5),
        });
    }
    let at = |step: fn(&Step) -> bool| before(&mut running(1), draft(2), step);
    let rows = [
        ("it builds", building(), Phase::Building),
        (
            "it starts",
            at(|s| matches!(s, Step::StartUnits(_) | Step::WriteUnits(_))),
            Phase::Starting,
        ),
        (
            "it takes the traffic",
            at(|s| matches!(s, Step::Publish(_))),
            Phase::Switching,
        ),
    ];
    for (row, mut observed, phase) in rows {
        hold_up(&mut observed);
        let until = observed.now + Duration::from_secs(5);
        // The committed release's traffic waits with it, and is no step either.
        if phase != Phase::Switching {
            observed.host.virtual_host.in_force = None;
        }
        let held = plan(&observed);
        assert_eq!(words(&held), [""; 0], "{row}");
        let failure = failure(Reason::ProxyUnavailable);
        assert_eq!(held.progress, Progress::HeldUp(phase, failure), "{row}");
        assert_eq!(held.wake, Some(until), "{row}");
        // And afterwards it goes on.
        observed.now = until;
        let on = plan(&observed);
        assert!(
            !matches!(on.progress, Progress::HeldUp(..)),
            "{row}: {on:?}"
        );
    }
}

#[test]
fn what_is_taken_back_waits_for_the_proxy_and_keeps_what_runs() {
    let mut world = running(1);
    world.fates.insert(2, Fate::CrashesBaking);
    before(&mut world, draft(2), |s| matches!(s, Step::Publish(_)));
    world.round(1);
    world.proxy_down = true;
    for _ in 0..60 {
        if world.round(usize::MAX).1 == 0 {
            world.pass_time(Duration::from_secs(1));
        }
    }
    // Both run: requests may go to either as long as the proxy cannot be told.
    let running = |world: &World| {
        let services = world.observe().host.services;
        let active = services.values().filter(|s| s.activity == Activity::Active);
        active.count()
    };
    assert_eq!(running(&world), 4, "{}", world.log.join("\n"));
    assert_eq!(world.serving(), Some(release_id(1)));
    world.proxy_down = false;
    assert!(matches!(world.settle(), Progress::Failed(_)));
    world.check_settled();
    assert_eq!(running(&world), 2);
}

#[test]
fn a_commit_that_must_descend_from_the_running_one_is_shown_to_before_anything_comes_of_it() {
    let mut bound = wish(draft(2));
    bound.template.source.allow_rewind = false;
    let mut world = running(1);
    world.wanted = Wanted::Release(Box::new(bound));
    world.round(1);
    let rows: [(&str, Option<SourceView>, &[&str]); 4] = [
        ("it was not looked for", None, &["WantCommit"]),
        ("it is looked for", Some(SourceView::Fetching), &[]),
        (
            "it does not descend",
            Some(SourceView::Failed(failure(Reason::RewindRefused))),
            &[],
        ),
        ("it descends", Some(SourceView::Ready), &["ChooseProcesses"]),
    ];
    for (row, source, steps) in rows {
        // Even where there is a tree of it, from a time when it was allowed.
        let mut observed = world.observe();
        let key = attempt(&mut observed).build_key.clone();
        observed.host.trees.insert(key);
        observed.host.source = source;
        assert_eq!(words(&plan(&observed)), steps, "{row}");
        // Without the rule, or where it is the running one, the tree will do.
        let mut free = observed.clone();
        attempt(&mut free).wish.template.source.allow_rewind = true;
        free.wanted = Wanted::Unknown;
        assert_eq!(words(&plan(&free)), ["ChooseProcesses"], "{row}");
    }
}

#[test]
fn a_port_that_a_stranger_took_before_the_commit_is_chosen_anew() {
    let mut world = running(1);
    before(&mut world, draft(2), |s| matches!(s, Step::StartUnits(_)));
    let tried = |world: &World| {
        let processes = &world.attempt.as_ref().unwrap().processes;
        processes.iter().find_map(|process| process.port)
    };
    let taken = tried(&world).unwrap();
    world.stolen.insert(taken);
    let mut observed = world.observe();
    let unit = attempt(&mut observed).processes[0].unit.clone();
    observed.host.services.get_mut(&unit).unwrap().health = Health::PortTaken { by: "x".into() };
    let chosen = match &plan(&observed).steps[..] {
        [Step::WriteAttempt(record)] => record.clone(),
        other => panic!("{other:?}"),
    };
    assert!(chosen.processes.is_empty() && !chosen.switching);
    assert_eq!(chosen.outcome, None);
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(2)));
    let port = world.committed().iter().find_map(|process| process.port);
    assert_ne!(port, Some(taken));
    assert_eq!(world.build_starts, 2, "nothing is built again for it");
}

#[test]
fn a_unit_that_systemd_has_read_otherwise_is_read_again_before_it_starts() {
    let mut world = running(1);
    let mut observed = before(&mut world, draft(2), |s| matches!(s, Step::WriteUnits(_)));
    let units = attempt(&mut observed).processes.clone();
    for process in &units {
        let service = observed.host.services.entry(process.unit.clone());
        let service = service.or_insert(ServiceView {
            file: FileView::Missing,
            activity: Activity::Inactive,
            stale: false,
            health: Health::Waiting {
                what: "it starts".into(),
                until: None,
            },
        });
        service.stale = true;
    }
    assert_eq!(
        words(&plan(&observed)),
        ["WriteUnits", "ReloadManager", "StartUnits"]
    );
}

#[test]
fn a_recreate_finds_its_way_around_a_taken_port_and_a_proxy_that_is_away() {
    let second = Draft {
        recreate: true,
        ..draft(2)
    };
    // A stranger takes the port when the old has stopped already.
    let mut world = running(1);
    world.want(second);
    let has_stopped = |world: &World| {
        let attempt = world.attempt.as_ref();
        attempt.is_some_and(|attempt| !attempt.stopped_old.is_empty())
    };
    while !has_stopped(&world) {
        if world.round(1).1 == 0 {
            world.pass_time(Duration::from_secs(1));
        }
    }
    let processes = world.attempt.as_ref().unwrap().processes.clone();
    world.stolen.extend(processes.iter().filter_map(|p| p.port));
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(2)));

    // The proxy goes away, and the new does not become healthy.
    let mut world = running(1);
    world.fates.insert(2, Fate::NeverReady);
    world.want(second);
    while !has_stopped(&world) {
        if world.round(1).1 == 0 {
            world.pass_time(Duration::from_secs(1));
        }
    }
    world.proxy_down = true;
    for _ in 0..60 {
        if world.round(usize::MAX).1 == 0 {
            world.pass_time(Duration::from_secs(1));
        }
    }
    let undone = |world: &World| match &world.attempt.as_ref().unwrap().outcome {
        Some(Outcome::Failed { undone, .. }) => Some(*undone),
        _ => None,
    };
    assert_eq!(undone(&world), Some(false), "it has no traffic yet");
    let old = world.unit_of("web").unwrap();
    let runs = world.observe().host.services[&old].activity == Activity::Active;
    assert!(runs, "what was stopped does not wait for the proxy");
    world.proxy_down = false;
    assert!(matches!(world.settle(), Progress::Failed(_)));
    world.check_settled();
    assert_eq!(undone(&world), Some(true));
    assert_eq!(world.serving(), Some(release_id(1)));
}

#[test]
fn a_removal_goes_in_order() {
    let mut world = running(1);
    let before = world.steps_done();
    world.remove();
    world.settle();
    let story = world.log[before..].join("\n");
    let mut from = 0;
    for step in [
        "WriteApplied",
        "RemoveTarget",
        "RemoveVirtualHost",
        "StopUnits",
        "RemoveUnits",
        "RemoveFiles",
    ] {
        match story[from..].find(step) {
            Some(at) => from += at,
            None => panic!("no {step} after the one before it:\n{story}"),
        }
    }
    assert!(!story[from + 1..].contains(" Stop"), "{story}");
    world.check_empty();
}

#[test]
fn a_removal_does_not_go_past_a_step_that_failed() {
    let mut world = running(1);
    world.remove();
    let mut observed = world.observe();
    let until = observed.now + Duration::from_secs(5);
    observed.held_up = Some(HeldUp {
        failure: failure(Reason::ProxyUnavailable),
        until,
    });
    // That it is to go is written down all the same.
    let held = plan(&observed);
    assert_eq!(words(&held), ["WriteApplied"]);
    assert_eq!(held.wake, Some(until));
    world.round(1);
    let tombstone = Observed {
        held_up: observed.held_up.clone(),
        ..world.observe()
    };
    assert_eq!(words(&plan(&tombstone)), [""; 0]);
    let after = Observed {
        now: until,
        ..tombstone
    };
    assert_eq!(words(&plan(&after))[0], "RemoveTarget");
    // Something that a boot started is stopped though its file is gone.
    let started = Observed {
        host: crate::agent::view::HostView {
            target: None,
            enabled: false,
            target_active: true,
            ..after.host.clone()
        },
        ..after
    };
    assert_eq!(words(&plan(&started))[0], "RemoveTarget");
}

#[test]
fn state_that_was_kept_goes_to_its_own_deployment_only() {
    let mut world = World::new();
    world.want(draft(1));
    world.round(1);
    for (uid, kept_uid, keep) in [
        (Some("one"), Some("one"), true),
        (Some("two"), Some("one"), false),
        (None, None, true),
        (Some("one"), None, false),
    ] {
        let mut observed = world.observe();
        attempt(&mut observed).wish.deployment_uid = uid.map(str::to_owned);
        observed.host.kept_state = Some(KeptRecord {
            version: RECORD_VERSION,
            deployment_uid: kept_uid.map(str::to_owned),
            since: observed.wall,
        });
        assert_eq!(
            plan(&observed).steps,
            [Step::TakeState { keep }],
            "{uid:?} finds what {kept_uid:?} left"
        );
    }
}

#[test]
fn a_route_leads_to_its_process_and_is_measured_where_its_probe_looks() {
    let mut wish = wish(draft(1));
    let routes = |wish: &crate::agent::host::records::Wish, world: &World| {
        let processes = world.committed();
        let host = virtual_host(
            &app(),
            wish.release_id,
            (&wish.template, &wish.sealed),
            processes,
            &[],
        );
        host.map(|host| host.routes)
    };
    let world = running(1);
    let port = world.committed().iter().find_map(|p| p.port).unwrap();
    let found = routes(&wish, &world).unwrap();
    assert_eq!(found[0].probe_path, None);
    assert!(
        matches!(found[0].target, RouteTarget::Port { primary, backup: None } if primary == port)
    );

    wish.template.processes[0].readiness_probe =
        serde_json::from_value(serde_json::json!({"httpGet": {"path": "/healthz"}})).unwrap();
    let probed = routes(&wish, &world).unwrap()[0].probe_path.clone();
    assert_eq!(probed.as_deref(), Some("/healthz"));
    // A process that has no port has nothing to lead to.
    assert!(matches!(
        routes(&wish, &World::new()).unwrap()[0].target,
        RouteTarget::Unavailable
    ));
    wish.template.processes[0].route = None;
    assert_eq!(routes(&wish, &world), None);
}
