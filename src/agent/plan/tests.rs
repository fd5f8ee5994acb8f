//! Stories of one app: what is wanted, what goes wrong and where, and what must hold in the end.
//!
//! The rules of the contract on a node, and the case that shows each:
//! - commit: `a_first_release_goes_the_whole_way`, `a_second_release_takes_over_and_the_first_is_stopped`; what it
//!   needs before it is checked by the simulated host (`check_commit`)
//! - undo: `each_failure_before_the_commit_keeps_the_running_release`,
//!   `a_failed_first_release_leaves_nothing_running`, `going_back_after_a_failure_is_a_decision_and_tries_nothing`
//! - supersede: `a_newer_wish_supersedes_an_older_one_at_every_step`,
//!   `a_superseded_build_is_killed_by_the_next_step`, `the_wish_that_comes_back_at_every_step_is_served`
//! - Recreate: `a_recreate_stops_what_changes_before_it_starts_and_nothing_else`,
//!   `a_recreate_that_is_rebooted_while_it_bakes_stops_the_old_once_more`
//! - slots of the node: `without_a_slot_nothing_is_built_and_the_place_in_the_queue_is_told`
//! - surroundings: `a_missing_tool_is_waited_for_and_does_not_burn_the_attempt`,
//!   `a_proxy_that_is_down_holds_the_attempt_up_and_leaves_the_old_running`,
//!   `a_host_of_another_app_holds_the_attempt_up_until_it_is_free`
//! - a kill, a reboot, an API that is away: `an_agent_killed_at_every_step_carries_on_and_builds_once`,
//!   `a_node_rebooted_at_every_step_comes_up_serving_and_carries_on`
//! - hold: `the_absence_of_a_release_removes_nothing`, `a_spec_that_cannot_be_carried_out_holds_what_runs`
//! - removal: `a_removal_at_every_step_leaves_nothing`, `a_removal_that_was_begun_is_finished_without_the_api`,
//!   `a_release_in_deletion_with_nothing_on_the_host_is_removed_at_once`
//! - orphans and adoption: `an_app_that_is_orphaned_at_every_step_stays_as_it_was_committed`,
//!   `another_attempt_of_the_same_content_moves_nothing_but_the_names`
//! - at rest nothing is done: `at_rest_there_is_nothing_to_do`, and over generated histories
//!   `whatever_happens_it_comes_to_rest_and_harms_nothing`
//! - what is retained on the disk is `collect`'s to decide, and tested there

use std::time::Duration;

use proptest::prelude::*;

use super::simulation::{Draft, Fate, World, draft, release_id, wish};
use super::{Progress, Step};
use crate::agent::host::records::{Outcome, RecordedFailure};
use crate::agent::view::{SlotView, Wanted};
use crate::api::reasons::Reason;
use crate::api::release::{Phase, Purpose, SealedValue};

fn running(number: u8) -> World {
    let mut world = World::new();
    world.want(draft(number));
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(number)));
    world
}

fn failed_for(world: &World) -> Option<Reason> {
    match world.attempt.as_ref()?.outcome.as_ref()? {
        Outcome::Failed {
            failure: RecordedFailure { reason, .. },
            undone: true,
            ..
        } => Some(*reason),
        Outcome::Failed { .. } | Outcome::Committed { .. } | Outcome::Superseded { .. } => None,
    }
}

/// Release 2, which replaces release 1 in one way or the other.
fn second(recreate: bool) -> Draft {
    Draft {
        recreate,
        ..draft(2)
    }
}

/// Each step of a change from release 1 to release 2, both ways.
fn steps_of_a_change() -> impl Iterator<Item = (bool, usize)> {
    [false, true].into_iter().flat_map(|recreate| {
        let mut world = running(1);
        let before = world.steps_done();
        world.want(second(recreate));
        world.settle();
        (0..=world.steps_done() - before).map(move |steps| (recreate, steps))
    })
}

/// Runs a change from release 1 to 2 up to `steps` steps, one at a time.
fn in_the_middle_of_a_change((recreate, steps): (bool, usize)) -> World {
    let mut world = running(1);
    change(&mut world, second(recreate), steps);
    world
}

fn change(world: &mut World, to: Draft, steps: usize) {
    world.want(to);
    let mut left = steps;
    for _ in 0..400 {
        if left == 0 {
            return;
        }
        match world.round(1).1 {
            0 => world.pass_time(Duration::from_secs(1)),
            done => left -= done,
        }
    }
}

#[test]
fn a_first_release_goes_the_whole_way() {
    let world = running(1);
    assert_eq!(world.build_starts, 1);
}

#[test]
fn what_is_sealed_anew_is_kept_and_nothing_that_runs_is_touched() {
    let mut world = running(1);
    let units = world.committed().to_vec();
    let mut wish = wish(draft(1));
    let sealed = SealedValue::kept(Purpose::Env, "env", "d");
    wish.sealed = vec![sealed.clone()];
    world.want_anew(Wanted::Release(Box::new(wish)));
    let (plan, _) = world.round(usize::MAX);
    let names: Vec<_> = plan.steps.iter().map(Step::name).collect();
    assert_eq!(names, ["WriteRelease", "WriteApplied", "WriteAttempt"]);
    assert_eq!(world.settle(), Progress::Idle);
    world.check_settled();
    assert_eq!(world.committed(), units);
    let applied = world.applied.as_ref().and_then(|a| a.release.as_ref());
    assert_eq!(
        applied.map(|release| release.sealed.clone()),
        Some(vec![sealed])
    );
}

#[test]
fn a_second_release_takes_over_and_the_first_is_stopped() {
    let mut world = running(1);
    world.want(draft(2));
    assert_eq!(world.settle(), Progress::Idle);
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(2)));
}

#[test]
fn at_rest_there_is_nothing_to_do() {
    let mut world = running(1);
    let (plan, _) = world.round(usize::MAX);
    assert_eq!((plan.steps, plan.drift), (vec![], vec![]));
}

#[test]
fn a_recreate_stops_what_changes_before_it_starts_and_nothing_else() {
    let mut world = running(1);
    let worker = world.unit_of("worker");
    let web = world.unit_of("web").unwrap();
    world.want(Draft {
        number: 2,
        web: 'b',
        recreate: true,
        ..draft(1)
    });
    assert_eq!(world.settle(), Progress::Idle);
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(2)));
    assert_eq!(world.unit_of("worker"), worker);
    let story = world.log.join("\n");
    let at = |what: String| {
        story
            .rfind(&what)
            .unwrap_or_else(|| panic!("no {what}:\n{story}"))
    };
    let stopped = at(format!("StopUnits([\"{web}\"])"));
    let started = at(format!("StartUnits([\"{}", world.unit_of("web").unwrap()));
    assert!(
        at("Paused".into()) < stopped && stopped < started,
        "{story}"
    );
}

#[test]
fn a_recreate_that_is_rebooted_while_it_bakes_stops_the_old_once_more() {
    let mut world = running(1);
    world.want(second(true));
    while world.attempt.as_ref().is_none_or(|a| !a.switching) {
        if world.round(1).1 == 0 {
            world.pass_time(Duration::from_secs(1));
        }
    }
    world.reboot();
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(2)));
}

#[test]
fn a_change_of_configuration_alone_builds_nothing_and_leaves_the_unchanged_process_alone() {
    let mut world = running(1);
    let worker = world.unit_of("worker");
    world.want(Draft {
        web: 'b',
        ..Draft {
            number: 2,
            ..draft(1)
        }
    });
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(2)));
    assert_eq!(world.build_starts, 1);
    assert_eq!(world.unit_of("worker"), worker);
}

#[test]
fn another_attempt_of_the_same_content_moves_nothing_but_the_names() {
    let mut world = running(1);
    let (web, worker) = (world.unit_of("web"), world.unit_of("worker"));
    world.want(Draft {
        number: 2,
        ..draft(1)
    });
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(2)));
    assert_eq!(
        (world.unit_of("web"), world.unit_of("worker")),
        (web, worker)
    );
}

#[test]
fn an_app_without_a_route_has_no_virtual_host() {
    let mut world = World::new();
    world.want(Draft {
        routed: false,
        ..draft(1)
    });
    world.settle();
    world.check_settled();
    world.want(draft(2));
    world.settle();
    world.check_settled();
    world.want(Draft {
        routed: false,
        ..draft(3)
    });
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(3)));
}

#[test]
fn each_failure_before_the_commit_keeps_the_running_release() {
    for (fate, reason, recreate) in [
        (Fate::BuildFails, Reason::BuildFailed, false),
        (Fate::NeverReady, Reason::ProbeFailed, false),
        (Fate::CrashesBaking, Reason::CrashLooping, false),
        (Fate::BuildFails, Reason::BuildFailed, true),
        (Fate::NeverReady, Reason::ProbeFailed, true),
        (Fate::CrashesBaking, Reason::CrashLooping, true),
    ] {
        let mut world = running(1);
        let web = world.unit_of("web");
        world.fates.insert(2, fate);
        world.want(second(recreate));
        let progress = world.settle();
        assert!(
            matches!(&progress, Progress::Failed(failure) if failure.reason == reason),
            "{fate:?}: {progress:?}"
        );
        world.check_settled();
        assert_eq!(
            (world.serving(), world.unit_of("web")),
            (Some(release_id(1)), web)
        );
        assert_eq!(failed_for(&world), Some(reason));

        // It is not tried again, whatever restarts; another wish is.
        let starts = world.build_starts;
        world.restart_agent();
        world.settle();
        world.reboot();
        world.settle();
        assert_eq!(
            (world.build_starts, failed_for(&world)),
            (starts, Some(reason)),
            "{fate:?}"
        );
        world.want(draft(3));
        world.settle();
        world.check_settled();
        assert_eq!(world.serving(), Some(release_id(3)));
    }
}

#[test]
fn a_failed_first_release_leaves_nothing_running() {
    for fate in [Fate::BuildFails, Fate::NeverReady, Fate::CrashesBaking] {
        let mut world = World::new();
        world.fates.insert(1, fate);
        world.want(draft(1));
        assert!(matches!(world.settle(), Progress::Failed(_)));
        world.check_settled();
        assert!(world.files.is_empty() && world.serving().is_none());
    }
}

#[test]
fn going_back_after_a_failure_is_a_decision_and_tries_nothing() {
    let mut world = running(1);
    world.fates.insert(2, Fate::NeverReady);
    world.want(draft(2));
    world.settle();
    let before = world.steps_done();
    world.want(draft(1));
    assert_eq!(world.settle(), Progress::Idle);
    world.check_settled();
    assert_eq!(
        world.steps_done() - before,
        1,
        "only the wish is written down:\n{}",
        world.log.join("\n")
    );
}

#[test]
fn a_missing_tool_is_waited_for_and_does_not_burn_the_attempt() {
    let mut world = running(1);
    world.fates.insert(2, Fate::ToolMissing);
    world.want(draft(2));
    for _ in 0..40 {
        if world.round(usize::MAX).1 == 0 {
            world.pass_time(Duration::from_secs(1));
        }
    }
    assert!(world.build_starts > 2, "it is built again and again");
    assert_eq!(world.serving(), Some(release_id(1)));
    world.fates.remove(&2);
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(2)));
}

#[test]
fn a_proxy_that_is_down_holds_the_attempt_up_and_leaves_the_old_running() {
    let mut world = running(1);
    world.proxy_down = true;
    world.want(draft(2));
    for _ in 0..40 {
        if world.round(usize::MAX).1 == 0 {
            world.pass_time(Duration::from_secs(1));
        }
    }
    world.round(usize::MAX);
    let (plan, _) = world.round(0);
    assert!(
        matches!(&plan.progress, Progress::HeldUp(Phase::Switching, f) if f.reason == Reason::ProxyUnavailable),
        "{plan:?}"
    );
    assert_eq!(world.serving(), Some(release_id(1)));
    world.proxy_down = false;
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(2)));
}

#[test]
fn a_host_of_another_app_holds_the_attempt_up_until_it_is_free() {
    let mut world = running(1);
    world.conflict = true;
    world.want(draft(2));
    for _ in 0..20 {
        if world.round(usize::MAX).1 == 0 {
            world.pass_time(Duration::from_secs(1));
        }
    }
    let (plan, _) = world.round(0);
    assert!(
        matches!(&plan.progress, Progress::HeldUp(Phase::Starting, f) if f.reason == Reason::RouteConflict),
        "{plan:?}"
    );
    world.conflict = false;
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(2)));
}

#[test]
fn without_a_slot_nothing_is_built_and_the_place_in_the_queue_is_told() {
    let mut world = running(1);
    world.slot = SlotView::Queued { position: 2, of: 5 };
    world.want(draft(2));
    for _ in 0..10 {
        world.round(usize::MAX);
    }
    let (plan, done) = world.round(usize::MAX);
    assert_eq!(
        (plan.progress, done),
        (Progress::Queued { position: 2, of: 5 }, 0)
    );
    assert_eq!(world.build_starts, 1);
}

#[test]
fn a_port_that_a_stranger_took_is_replaced_by_the_same_release() {
    let mut world = running(1);
    let web = world.unit_of("web");
    let port = world.committed().iter().find_map(|p| p.port).unwrap();
    world.stolen.insert(port);
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(1)));
    assert_ne!(world.unit_of("web"), web);
    assert_eq!(world.build_starts, 1);
}

#[test]
fn what_somebody_stopped_or_deleted_is_put_right() {
    let mut world = running(1);
    world.stop_a_service();
    world.delete_a_file();
    let (plan, _) = world.round(usize::MAX);
    assert_eq!(plan.drift.len(), 1, "{:?}", plan.drift);
    world.settle();
    world.check_settled();
}

#[test]
fn a_newer_wish_supersedes_an_older_one_at_every_step() {
    for steps in steps_of_a_change() {
        let mut world = in_the_middle_of_a_change(steps);
        world.want(draft(3));
        world.settle();
        world.check_settled();
        assert_eq!(
            world.serving(),
            Some(release_id(3)),
            "after {steps:?} steps"
        );
    }
}

#[test]
fn a_superseded_build_is_killed_by_the_next_step() {
    let mut world = running(1);
    world.want(draft(2));
    while world.build_starts < 2 {
        world.round(usize::MAX);
    }
    world.want(draft(3));
    let (_, _) = world.round(usize::MAX);
    let (plan, _) = world.round(usize::MAX);
    assert!(
        matches!(plan.steps.first(), Some(Step::StopBuild { kill: true, .. })),
        "{:?}",
        plan.steps
    );
}

#[test]
fn the_wish_that_comes_back_at_every_step_is_served() {
    for steps in steps_of_a_change() {
        let mut world = in_the_middle_of_a_change(steps);
        world.want(draft(1));
        world.settle();
        world.check_settled();
        assert_eq!(
            world.serving(),
            Some(release_id(1)),
            "after {steps:?} steps"
        );
    }
}

#[test]
fn an_agent_killed_at_every_step_carries_on_and_builds_once() {
    for api in [true, false] {
        for steps in steps_of_a_change() {
            let mut world = in_the_middle_of_a_change(steps);
            world.restart_agent();
            let known = steps.1 > 0;
            if !api {
                world.wanted = Wanted::Unknown;
            }
            world.settle();
            world.check_settled();
            if known || api {
                assert_eq!(
                    world.serving(),
                    Some(release_id(2)),
                    "after {steps:?} steps, api {api}"
                );
                assert_eq!(
                    world.build_starts,
                    2,
                    "after {steps:?} steps, api {api}\n{}",
                    world.log.join("\n")
                );
            }
        }
    }
}

#[test]
fn a_node_rebooted_at_every_step_comes_up_serving_and_carries_on() {
    for steps in steps_of_a_change() {
        let mut world = in_the_middle_of_a_change(steps);
        world.reboot();
        world.settle();
        world.check_settled();
        assert_eq!(
            world.serving(),
            Some(release_id(2)),
            "after {steps:?} steps"
        );
    }
}

#[test]
fn a_removal_at_every_step_leaves_nothing() {
    for restart in [false, true] {
        for steps in steps_of_a_change() {
            let mut world = in_the_middle_of_a_change(steps);
            world.remove();
            if restart {
                world.round(2);
                world.restart_agent();
            }
            assert_eq!(world.settle(), Progress::Removed, "after {steps:?} steps");
            world.check_empty();
        }
    }
}

#[test]
fn a_removal_that_was_begun_is_finished_without_the_api() {
    let mut world = running(1);
    world.remove();
    world.round(3);
    world.restart_agent();
    world.wanted = Wanted::Unknown;
    world.settle();
    world.check_empty();
    world.want(draft(2));
    world.settle();
    world.check_settled();
}

#[test]
fn a_release_in_deletion_with_nothing_on_the_host_is_removed_at_once() {
    let mut world = World::new();
    world.remove();
    let (plan, done) = world.round(usize::MAX);
    assert_eq!((plan.progress, done), (Progress::Removed, 0));
}

#[test]
fn the_absence_of_a_release_removes_nothing() {
    let mut world = running(1);
    world.wanted = Wanted::Absent;
    world.restart_agent();
    world.settle();
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(1)));
}

#[test]
fn an_app_that_is_orphaned_at_every_step_stays_as_it_was_committed() {
    for restart in [false, true] {
        for steps in steps_of_a_change() {
            let mut world = in_the_middle_of_a_change(steps);
            world.wanted = Wanted::Orphan;
            if restart {
                world.round(1);
                world.restart_agent();
            }
            assert_eq!(world.settle(), Progress::Removed, "after {steps:?} steps");
            world.check_settled();
            assert!(world.serving().is_some(), "after {steps:?} steps");
            let marked = |world: &World| world.applied.as_ref().unwrap().orphaned.is_some();
            assert!(marked(&world));
            world.wanted = Wanted::Absent;
            world.settle();
            world.check_settled();
            // Another Deployment of the name takes it on.
            world.want(draft(3));
            assert_eq!(world.settle(), Progress::Idle);
            assert_eq!(world.serving(), Some(release_id(3)));
            assert!(!marked(&world));
        }
    }
}

#[test]
fn nothing_is_left_of_an_app_that_is_orphaned_before_its_first_commit() {
    let mut world = World::new();
    world.want(draft(1));
    world.round(3);
    world.wanted = Wanted::Orphan;
    assert_eq!(world.settle(), Progress::Removed);
    world.check_empty();
}

#[test]
fn a_spec_that_cannot_be_carried_out_holds_what_runs() {
    let mut world = running(1);
    let failure = RecordedFailure {
        reason: Reason::InvalidSpec,
        message: "m".into(),
        log_tail: None,
    };
    world.wanted = Wanted::Invalid {
        release_id: release_id(2),
        failure: failure.clone(),
    };
    assert_eq!(world.settle(), Progress::HeldUp(Phase::Pending, failure));
    world.check_settled();
    assert_eq!(world.serving(), Some(release_id(1)));
}

/// Something that happens.
#[derive(Debug, Clone)]
enum Event {
    Want(Draft),
    Fate(u8, Fate),
    Remove,
    Orphan,
    Absent,
    Unknown,
    RestartAgent,
    Reboot,
    Steps(usize),
    Time(u64),
    StopAService,
    DeleteAFile,
    StealAPort,
}

fn event() -> impl Strategy<Value = Event> {
    let wish = (
        1u8..4,
        1u8..4,
        prop::sample::select(vec!['a', 'b']),
        prop::sample::select(vec!['a', 'b']),
        any::<bool>(),
        any::<bool>(),
    );
    prop_oneof![
        // A release id always names the same content.
        4 => wish.prop_map(|(commit, number, web, worker, routed, recreate)| {
            let number = commit * 64 + number * 16 + u8::from(recreate) * 8
                + u8::from(web == 'b') * 4 + u8::from(worker == 'b') * 2 + u8::from(routed);
            Event::Want(Draft { number, commit, web, worker, routed, recreate })
        }),
        2 => (any::<u8>(), prop::sample::select(vec![Fate::Good, Fate::BuildFails, Fate::NeverReady, Fate::CrashesBaking]))
            .prop_map(|(number, fate)| Event::Fate(number, fate)),
        1 => Just(Event::Remove),
        1 => Just(Event::Orphan),
        1 => Just(Event::Absent),
        1 => Just(Event::Unknown),
        2 => Just(Event::RestartAgent),
        1 => Just(Event::Reboot),
        12 => (1usize..4).prop_map(Event::Steps),
        6 => (1u64..4).prop_map(Event::Time),
        1 => Just(Event::StopAService),
        1 => Just(Event::DeleteAFile),
        1 => Just(Event::StealAPort),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever happens in whatever order: no step does harm (the simulated host checks each), it comes
    /// to rest, at rest exactly the committed release runs, and a removal leaves nothing.
    #[test]
    fn whatever_happens_it_comes_to_rest_and_harms_nothing(events in prop::collection::vec(event(), 1..60)) {
        let mut world = World::new();
        for event in events {
            match event {
                Event::Want(draft) => world.want(draft),
                Event::Fate(number, fate) => { world.fates.insert(number, fate); }
                Event::Remove => world.remove(),
                Event::Orphan => world.wanted = Wanted::Orphan,
                Event::Absent => world.wanted = Wanted::Absent,
                Event::Unknown => world.wanted = Wanted::Unknown,
                Event::RestartAgent => world.restart_agent(),
                Event::Reboot => world.reboot(),
                Event::Steps(count) => { world.round(count); }
                Event::Time(seconds) => world.pass_time(Duration::from_secs(seconds)),
                Event::StopAService => world.stop_a_service(),
                Event::DeleteAFile => world.delete_a_file(),
                Event::StealAPort => {
                    if let Some(port) = world.committed().iter().find_map(|p| p.port) { world.stolen.insert(port); }
                }
            }
        }
        let wanted = world.wanted.clone();
        let progress = world.settle();
        world.check_settled();
        match wanted {
            Wanted::Release(wish) => match progress {
                Progress::Idle => prop_assert_eq!(world.serving(), Some(wish.release_id)),
                Progress::Failed(_) => prop_assert!(failed_for(&world).is_some()),
                other => prop_assert!(false, "{:?}\n{}", other, world.log.join("\n")),
            },
            Wanted::Removal { .. } => world.check_empty(),
            Wanted::Orphan => prop_assert_eq!(progress, Progress::Removed),
            Wanted::Unknown | Wanted::Absent | Wanted::Invalid { .. } => {}
        }
        world.remove();
        prop_assert_eq!(world.settle(), Progress::Removed);
        world.check_empty();
    }
}
