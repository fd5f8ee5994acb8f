//! The rules of a rollout, each as a row of a table: what was observed, and what is decided.
//!
//! | rule | rows |
//! | --- | --- |
//! | budget: its size | [`the_budget_is_a_number_or_a_percentage_of_the_nodes_that_take_part`] |
//! | budget: who counts as unavailable, and who goes first | [`what_is_unavailable_counts_and_goes_first`] |
//! | slots: taken before the Release is written, and by nobody else | [`a_node_is_told_something_new_only_in_a_slot`], and the property in `tests` |
//! | slots: when one is freed | [`a_slot_is_freed_by_what_the_node_says_of_this_attempt`], `tests::a_node_unreachable_in_mid_change_keeps_its_slot_until_the_deadline`, `tests::a_slot_without_its_release_is_used_or_given_up` |
//! | slots: given back by what surroundings hold up | `tests::surroundings_hold_a_node_up_…`, `tests::a_first_install_that_is_held_up_is_withdrawn`, [`a_slot_is_given_back_only_for_a_node_that_has_not_done_so_and_to_a_release_that_is_known`] |
//! | left-out nodes: not written, named, back by themselves | [`an_idle_node_that_is_left_out_is_not_written_and_comes_back_by_itself`], [`where_no_node_takes_part_nothing_is_ready`] |
//! | a fresh leader | [`a_fresh_leader_frees_nothing_and_starts_nothing_on_nodes_that_it_has_not_heard_of`], `tests::a_new_controller_…` |
//! | supersede: the newer revision, or the delete | [`a_node_in_mid_change_gets_the_newer_revision_or_the_delete_whatever_it_is_at`] |
//! | supersede: what has failed waits for a slot as any other | [`a_node_that_failed_gets_something_new_only_in_a_slot`] |
//! | hold after a failure, retry | `tests::a_failed_node_blocks_the_revision_…`, `tests::retry_…`, [`what_runs_beside_a_failed_node_finishes_and_no_other_is_begun`] |
//! | hold while suspended | `tests::suspend_…`, [`while_suspended_only_a_node_that_is_gone_loses_its_release`] |
//! | the deadline | `tests::no_progress_until_the_deadline_…`, `tests::time_that_is_spent_waiting_…`, [`a_deadline_that_cannot_be_read_begins_anew`] |
//! | removal | `tests::a_node_that_leaves_the_placement_…`, `tests::the_release_of_a_node_that_is_gone_…`, `tests::what_a_delete_means_…` |
//! | adoption | [`what_an_earlier_deployment_left_is_taken_on_without_a_slot_or_another_release`], `tests::going_back_before_the_commit_…` |
//! | retained releases | [`the_last_good_revision_is_retained_and_never_the_wanted_one`], `tests::the_history_keeps_its_limit_…` |
//! | identity | [`two_decisions_for_a_node_never_share_a_release_id`] |

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::api::reasons::Reason;
use crate::api::release::{OnDelete, Phase};
use crate::controller::observed::{Outcome, Presence, Reach};
use crate::controller::rollout::{HELD_UP_LIMIT, Step, budget};
use crate::controller::testing::{World, node};

/// Something that is so, or that happens.
type Change = fn(&mut World);

fn presence(world: &mut World, name: &str, matches: bool, cordoned: bool) {
    world.node(name).presence = Presence::There {
        matches,
        canary: false,
        cordoned,
    };
}

fn degrade(world: &mut World, name: &str) {
    world.release(name).status.phase = Phase::Degraded;
}

/// Revision `a` is served everywhere, and `b` is begun on `n1`.
fn changing(nodes: usize) -> World {
    let mut world = World::deployed(nodes);
    world.push('b');
    world.reconcile();
    world.agent_reads("n1");
    assert_eq!(world.active(), ["n1"]);
    world
}

#[test]
fn the_budget_is_a_number_or_a_percentage_of_the_nodes_that_take_part() {
    let number = IntOrString::Int;
    let text = |text: &str| IntOrString::String(text.into());
    for (max_unavailable, nodes, slots) in [
        (number(0), 3, 1),
        (number(-3), 3, 1),
        (number(2), 3, 2),
        (number(300), 3, 256),
        (text("0%"), 3, 1),
        (text("34%"), 3, 1),
        (text("67%"), 3, 2),
        (text("100%"), 300, 256),
        (text("half"), 3, 1),
        (text("half%"), 3, 1),
    ] {
        let mut world = World::new(nodes);
        world
            .spec()
            .strategy
            .get_or_insert_default()
            .max_unavailable = max_unavailable.clone();
        assert_eq!(
            budget(&world.observed),
            slots,
            "{max_unavailable:?} of {nodes}"
        );
    }
    // A node that never had an agent is no node to take a percentage of; one that lost it is.
    let mut world = World::deployed(4);
    world
        .spec()
        .strategy
        .get_or_insert_default()
        .max_unavailable = text("50%");
    for (name, there) in [("n5", node("n5")), ("n6", node("n6"))] {
        world.observed.nodes.push(there);
        world.node(name).reach = Reach::NoAgent;
    }
    assert_eq!(budget(&world.observed), 2);
    world.node("n4").reach = Reach::NoAgent;
    assert_eq!(budget(&world.observed), 2);
    presence(&mut world, "n3", false, false);
    presence(&mut world, "n4", false, false);
    assert_eq!(budget(&world.observed), 1);
}

#[test]
fn what_is_unavailable_counts_and_goes_first() {
    let ready_false: Change = |w| {
        let condition = w.status().conditions[0].clone();
        w.release("n3").status.conditions =
            vec![k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition {
                type_: "Ready".into(),
                status: "False".into(),
                ..condition
            }];
    };
    let rows: [(&str, i32, Change, [&str; 3]); 12] = [
        ("nothing is broken", 1, |_| (), ["b", "a", "a"]),
        (
            "a node that serves badly",
            1,
            |w| degrade(w, "n3"),
            ["a", "a", "b"],
        ),
        ("one whose Ready is False", 1, ready_false, ["a", "a", "b"]),
        (
            "two, more than may be: one of them all the same",
            1,
            |w| {
                degrade(w, "n2");
                degrade(w, "n3");
            },
            ["a", "b", "a"],
        ),
        (
            "one of two that may be: it, and a well one",
            2,
            |w| degrade(w, "n3"),
            ["b", "a", "b"],
        ),
        (
            "two of two that may be: they, and no well one",
            2,
            |w| {
                degrade(w, "n2");
                degrade(w, "n3");
            },
            ["a", "b", "b"],
        ),
        (
            "broken and cordoned: does not count",
            1,
            |w| {
                degrade(w, "n3");
                presence(w, "n3", true, true);
            },
            ["b", "a", "a"],
        ),
        (
            "broken and unreachable: does not count",
            1,
            |w| {
                degrade(w, "n3");
                w.node("n3").reach = Reach::Stale;
            },
            ["b", "a", "a"],
        ),
        (
            "never installed: does not count, and waits its turn",
            1,
            |w| w.node("n3").release = None,
            ["b", "a", "-"],
        ),
        (
            "never installed before the others by name: is one slot's worth",
            1,
            |w| w.node("n1").release = None,
            ["b", "a", "a"],
        ),
        (
            "a well node is not taken beside two broken ones that need nothing",
            2,
            |w| {
                w.push('a');
                degrade(w, "n2");
                degrade(w, "n3");
                w.node("n1").release = None;
            },
            ["-", "a", "a"],
        ),
        (
            "on leaving the placement it no longer counts",
            1,
            |w| {
                degrade(w, "n3");
                presence(w, "n3", false, false);
            },
            ["b", "a", "a"],
        ),
    ];
    for (row, slots, change, told) in rows {
        let mut world = World::deployed(3);
        world.max_unavailable(slots);
        world.push('b');
        change(&mut world);
        world.reconcile();
        assert_eq!(world.told(), told, "{row}");
        assert!(
            world.active().len() <= usize::try_from(slots).unwrap(),
            "{row}"
        );
    }
}

#[test]
fn nodes_that_wait_because_others_are_broken_say_so() {
    let mut world = World::deployed(2);
    degrade(&mut world, "n1");
    world.node("n2").release = None;
    world.reconcile();
    assert_eq!(world.told(), ["a", "-"]);
    assert_eq!(world.ready().0, "False/WaitingForBudget");
}

#[test]
fn a_node_is_told_something_new_only_in_a_slot() {
    for slots in 1..=4 {
        let mut world = World::new(4);
        world.max_unavailable(slots);
        for digit in ['a', 'b'] {
            world.push(digit);
            loop {
                let plan = world.reconcile();
                let told: Vec<&str> = plan
                    .steps
                    .iter()
                    .filter_map(|step| match step {
                        Step::Create { spec, .. } | Step::Update { spec, .. } => {
                            Some(spec.node_name.as_str())
                        }
                        Step::Delete { .. } => None,
                    })
                    .collect();
                for node in &told {
                    assert!(
                        plan.status.active.iter().any(|active| active == node),
                        "{node} of {told:?}, slots {:?}",
                        plan.status.active
                    );
                }
                assert!(plan.status.active.len() <= usize::try_from(slots).unwrap());
                if told.is_empty() && world.active().is_empty() {
                    break;
                }
                let first = world.active()[0].to_owned();
                world.agent_commits(&first);
            }
        }
        assert_eq!(world.served(), vec!["b"; 4]);
    }
}

#[test]
fn a_slot_is_freed_by_what_the_node_says_of_this_attempt() {
    let fails: Change = |w| w.agent_fails("n1", Reason::BuildFailed);
    let rows: [(&str, Change, &[&str]); 15] = [
        (
            "it has not read the Release",
            |w| w.release("n1").status.observed_generation -= 1,
            &["n1"],
        ),
        ("it builds", |_| (), &["n1"]),
        (
            "it waits for a slot of the node",
            |w| w.release("n1").status.phase = Phase::Queued,
            &["n1"],
        ),
        (
            "it serves what is wanted",
            |w| w.agent_commits("n1"),
            &["n2"],
        ),
        (
            "it serves what is wanted, but spoke of an older generation",
            |w| {
                w.agent_commits("n1");
                w.release("n1").status.observed_generation -= 1;
            },
            &["n1"],
        ),
        ("it failed, and the revision with it", fails, &[]),
        (
            "it failed at another release",
            |w| {
                w.agent_fails("n1", Reason::BuildFailed);
                let release = w.release("n1");
                let served = release.status.serving.as_ref().map(|s| s.release_id);
                let attempt = release.status.attempt.as_mut();
                attempt.unwrap().release_id = served.unwrap();
            },
            &["n1"],
        ),
        (
            "it failed for a reason that this version does not know",
            |w| {
                w.agent_fails("n1", Reason::BuildFailed);
                let attempt = w.release("n1").status.attempt.as_mut();
                attempt.unwrap().failure.as_mut().unwrap().class = "Weather".into();
            },
            &["n1"],
        ),
        (
            "its surroundings hold it up",
            |w| w.agent_fails("n1", Reason::DiskPressure),
            &["n1"],
        ),
        (
            "its agent is not heard of",
            |w| w.node("n1").reach = Reach::Stale,
            &["n1"],
        ),
        (
            "its Lease is gone",
            |w| w.node("n1").reach = Reach::NoAgent,
            &["n1"],
        ),
        ("it is cordoned", |w| presence(w, "n1", true, true), &["n1"]),
        (
            "its Node is gone",
            |w| w.node("n1").presence = Presence::Gone,
            &["n2"],
        ),
        (
            "it leaves the placement, and has to be rid of the app first",
            |w| presence(w, "n1", false, false),
            &["n1"],
        ),
        (
            "its agent is not heard of until the deadline",
            |w| {
                w.node("n1").reach = Reach::Stale;
                w.pass(601);
            },
            &["n2"],
        ),
    ];
    for (row, change, active) in rows {
        let mut world = changing(2);
        change(&mut world);
        world.reconcile();
        assert_eq!(world.active(), active, "{row}");
    }
    // Of a first install nothing old is served.
    let mut world = World::new(2);
    world.reconcile();
    world.agent_fails("n1", Reason::StartFailed);
    world.reconcile();
    assert_eq!(world.active(), [""; 0]);
    assert_eq!(world.told(), ["a", "-"]);
}

#[test]
fn a_slot_is_given_back_only_for_a_node_that_has_not_done_so_and_to_a_release_that_is_known() {
    let rows: [(&str, Change, bool); 6] = [
        ("another waits", |_| (), true),
        (
            "a second too early",
            |w| {
                let limit = HELD_UP_LIMIT - Duration::from_secs(1);
                w.release("n1").held_up_for = Some(limit);
            },
            false,
        ),
        (
            "the one that waits has given its own back",
            |w| w.node("n2").gave_back = true,
            false,
        ),
        (
            "what it serves is not in the history any more",
            |w| {
                let served = w.revision_of('a');
                w.observed.revisions.retain(|r| r.name.as_str() != served);
            },
            false,
        ),
        ("it is cordoned", |w| presence(w, "n1", true, true), false),
        (
            "it was told to go",
            |w| w.release("n1").deleting = true,
            false,
        ),
    ];
    for (row, change, gives) in rows {
        let mut world = changing(2);
        world.agent_fails("n1", Reason::ProxyUnavailable);
        world.pass(600);
        change(&mut world);
        let plan = world.reconcile();
        assert_eq!(!plan.giving_back.is_empty(), gives, "{row}");
        assert_eq!(world.active(), ["n1"], "{row}: until it is confirmed");
    }
}

#[test]
fn an_idle_node_that_is_left_out_is_not_written_and_comes_back_by_itself() {
    let rows: [(&str, Change, &str); 5] = [
        (
            "cordoned",
            |w| presence(w, "n2", true, true),
            "n2 (NodeCordoned)",
        ),
        (
            "unreachable",
            |w| w.node("n2").reach = Reach::Stale,
            "n2 (AgentUnreachable)",
        ),
        (
            "without a Lease",
            |w| w.node("n2").reach = Reach::NoAgent,
            "n2 (AgentUnreachable)",
        ),
        (
            "not heard of yet",
            |w| w.node("n2").reach = Reach::Unknown,
            "",
        ),
        (
            "both",
            |w| {
                presence(w, "n2", true, true);
                w.node("n2").reach = Reach::Stale;
            },
            "n2 (AgentUnreachable)",
        ),
    ];
    for (row, change, named) in rows {
        let mut world = World::deployed(3);
        change(&mut world);
        let before = world.release("n2").resource_version.clone();
        // Neither for what changes in place, nor for what needs a slot.
        world.spec().keep_releases = 7;
        world.roll_out();
        assert_eq!(world.release("n2").resource_version, before, "{row}");
        world.push('b');
        world.roll_out();
        assert_eq!(world.told(), ["b", "a", "b"], "{row}");
        assert_eq!(world.release("n2").resource_version, before, "{row}");
        assert_eq!(world.active(), [""; 0], "{row}");
        if !named.is_empty() {
            assert_eq!(world.ready().0, "True/Deployed", "{row}");
            assert!(
                world.ready().1.contains(named),
                "{row}: {:?}",
                world.ready()
            );
        }
        presence(&mut world, "n2", true, false);
        world.node("n2").reach = Reach::Fresh;
        world.roll_out();
        assert_eq!(world.served(), ["b", "b", "b"], "{row}");
        assert_eq!(world.release("n2").spec.template.keep_releases, 7, "{row}");
    }
}

#[test]
fn where_no_node_takes_part_nothing_is_ready() {
    let rows: [(&str, Change, &str); 3] = [
        (
            "all are cordoned",
            |w| presence(w, "n1", true, true),
            "False/NodeCordoned",
        ),
        (
            "all are unreachable",
            |w| w.node("n1").reach = Reach::Stale,
            "False/AgentUnreachable",
        ),
        (
            "none matches",
            |w| presence(w, "n1", false, false),
            "False/NoMatchingNodes",
        ),
    ];
    for (row, change, ready) in rows {
        let mut world = World::deployed(1);
        change(&mut world);
        world.reconcile();
        assert_eq!(world.ready().0, ready, "{row}");
        let stalled = world.stalled().0.starts_with("True");
        assert_eq!(stalled, ready.ends_with("NoMatchingNodes"), "{row}");
    }
}

#[test]
fn a_fresh_leader_frees_nothing_and_starts_nothing_on_nodes_that_it_has_not_heard_of() {
    let mut world = changing(3);
    for name in ["n1", "n2", "n3"] {
        world.node(name).reach = Reach::Unknown;
    }
    // Not even past the deadline: it has not been able to see any progress.
    world.pass(601);
    world.reconcile();
    assert_eq!(world.active(), ["n1"]);
    assert_eq!(world.told(), ["b", "a", "a"]);
    world.node("n2").reach = Reach::Fresh;
    world.reconcile();
    assert_eq!(world.told(), ["b", "a", "a"], "n1 may still be at it");
    world.node("n1").reach = Reach::Stale;
    world.pass(601);
    world.reconcile();
    assert_eq!(
        world.told(),
        ["b", "b", "a"],
        "n1 has been silent long enough"
    );
}

#[test]
fn a_node_in_mid_change_gets_the_newer_revision_or_the_delete_whatever_it_is_at() {
    let rows: [(&str, Change); 9] = [
        ("it has not read the Release", |w| {
            w.release("n1").status.observed_generation -= 1
        }),
        ("it builds", |_| ()),
        ("it waits for a slot of the node", |w| {
            w.release("n1").status.phase = Phase::Queued
        }),
        ("it bakes", |w| w.release("n1").status.phase = Phase::Baking),
        ("its surroundings hold it up", |w| {
            w.agent_fails("n1", Reason::SourceUnavailable)
        }),
        ("its agent is not heard of", |w| {
            w.node("n1").reach = Reach::Stale
        }),
        ("it is not known to be there", |w| {
            w.node("n1").reach = Reach::Unknown
        }),
        ("it is cordoned", |w| presence(w, "n1", true, true)),
        ("its slot was freed at the deadline", |w| {
            w.node("n1").reach = Reach::Stale;
            w.pass(601);
            w.reconcile();
            assert_eq!(w.active(), ["n2"]);
        }),
    ];
    for (row, change) in rows {
        let mut world = changing(3);
        change(&mut world);
        let superseded = world.release("n1").spec.release_id;
        let mut leaving = world.clone();

        world.push('c');
        world.reconcile();
        assert_eq!(world.told()[0], "c", "{row}");
        assert_ne!(world.release("n1").spec.release_id, superseded, "{row}");

        let canary = false;
        let cordoned = leaving.node("n1").cordoned();
        leaving.node("n1").presence = Presence::There {
            matches: false,
            canary,
            cordoned,
        };
        leaving.reconcile();
        leaving.reconcile();
        assert!(leaving.release("n1").deleting, "{row}");
        assert_eq!(
            leaving.release("n1").spec.on_delete,
            OnDelete::KeepState,
            "{row}"
        );
    }
}

#[test]
fn a_node_that_failed_gets_something_new_only_in_a_slot() {
    let mut world = World::deployed(3);
    world.max_unavailable(2);
    world.push('b');
    world.reconcile();
    assert_eq!(world.active(), ["n1", "n2"]);
    world.agent_fails("n1", Reason::ProbeFailed);
    world.agent_fails("n2", Reason::ProbeFailed);
    world.reconcile();
    assert_eq!(world.active(), [""; 0]);
    world.max_unavailable(1);
    world.push('c');
    world.reconcile();
    assert_eq!(world.told(), ["c", "b", "a"], "nothing goes on at n2");
    world.roll_out();
    assert_eq!(world.served(), ["c", "c", "c"]);
    assert_eq!(world.most_at_work, 2);
}

#[test]
fn what_runs_beside_a_failed_node_finishes_and_no_other_is_begun() {
    let mut world = World::deployed(3);
    world.max_unavailable(2);
    world.push('b');
    world.reconcile();
    world.agent_reads("n2");
    world.agent_fails("n1", Reason::CrashLooping);
    world.reconcile();
    assert_eq!(world.told(), ["b", "b", "a"]);
    assert_eq!(world.active(), ["n2"]);
    world.agent_commits("n2");
    world.reconcile();
    assert_eq!(world.served(), ["a", "b", "a"]);
    assert_eq!(world.told(), ["b", "b", "a"]);
    assert_eq!(world.stalled().0, "True/CrashLooping");
}

#[test]
fn what_the_object_is_at_fault_for_is_tried_again_when_the_object_changes() {
    let mut world = World::deployed(2);
    world.push('b');
    world.reconcile();
    world.agent_fails("n1", Reason::RouteConflict);
    for _ in 0..2 {
        world.reconcile();
        assert_eq!(world.told(), ["b", "a"]);
        assert_eq!(world.stalled().0, "True/RouteConflict");
    }
    world.spec().processes[0].route = None;
    world.roll_out();
    assert_eq!(world.served(), ["b", "b"]);
    assert_eq!(world.ready().0, "True/Deployed");
}

#[test]
fn while_suspended_only_a_node_that_is_gone_loses_its_release() {
    let rows: [(&str, Change, bool); 3] = [
        ("it matches", |_| (), false),
        (
            "it matches no more",
            |w| presence(w, "n2", false, false),
            false,
        ),
        (
            "it is gone",
            |w| w.node("n2").presence = Presence::Gone,
            true,
        ),
    ];
    for (row, change, deleted) in rows {
        let mut world = World::deployed(2);
        world.spec().suspend = true;
        change(&mut world);
        world.push('b');
        world.reconcile();
        world.reconcile();
        assert_eq!(world.release("n2").deleting, deleted, "{row}");
        assert_eq!(world.told(), ["a", "a"], "{row}");
        world.spec().suspend = false;
        world.reconcile();
        world.reconcile();
        let leaves = row != "it matches";
        assert_eq!(world.release("n2").deleting, leaves, "{row}, resumed");
    }
}

#[test]
fn a_deadline_that_cannot_be_read_begins_anew() {
    let mut world = changing(2);
    let progress = world.observed.deployment.status.progress.as_mut();
    progress.unwrap().deadline = Some("tomorrow".into());
    world.pass(6000);
    world.reconcile();
    assert_eq!(world.stalled().0, "False/Progressing");
    world.pass(601);
    world.reconcile();
    assert_eq!(world.stalled().0, "True/ProgressDeadlineExceeded");
}

#[test]
fn what_an_earlier_deployment_left_is_taken_on_without_a_slot_or_another_release() {
    let rows: [(&str, Change, bool); 5] = [
        ("it serves what is wanted", |_| (), true),
        (
            "what is not in the revision has changed",
            |w| w.spec().keep_releases = 7,
            true,
        ),
        ("it is broken", |w| degrade(w, "n2"), true),
        (
            "its node is cordoned",
            |w| presence(w, "n2", true, true),
            false,
        ),
        (
            "its node is unreachable",
            |w| w.node("n2").reach = Reach::Stale,
            false,
        ),
    ];
    for (row, change, taken_on) in rows {
        let mut world = World::deployed(3);
        world.release("n2").orphaned = true;
        let id = world.release("n2").spec.release_id;
        change(&mut world);
        world.reconcile();
        assert_eq!(!world.release("n2").orphaned, taken_on, "{row}");
        assert_eq!(world.release("n2").spec.release_id, id, "{row}");
        assert_eq!(world.active(), [""; 0], "{row}");
        // Where it could not be written to, it is taken on when it can be.
        presence(&mut world, "n2", true, false);
        world.node("n2").reach = Reach::Fresh;
        world.roll_out();
        assert!(!world.release("n2").orphaned, "{row}");
        assert_eq!(world.release("n2").spec.release_id, id, "{row}");
    }
    // What the new Deployment wants otherwise takes a slot, as any change.
    let mut world = World::deployed(2);
    world.release("n2").orphaned = true;
    world.push('b');
    world.reconcile();
    assert_eq!(world.told(), ["b", "a"]);
    assert_eq!(world.active(), ["n1"]);
    assert!(!world.release("n2").orphaned);
}

#[test]
fn the_last_good_revision_is_retained_and_never_the_wanted_one() {
    let mut world = World::new(2);
    world.reconcile();
    assert_eq!(
        world.release("n1").spec.retain,
        [""; 0],
        "nothing was good yet"
    );
    world.roll_out();
    let good = world.revision_of('a');

    world.push('b');
    world.reconcile();
    assert_eq!(world.release("n1").spec.retain, [good.as_str()]);
    world.agent_fails("n1", Reason::BuildFailed);
    world.reconcile();
    world.push('c');
    world.reconcile();
    assert_eq!(
        world.release("n1").spec.retain,
        [good.as_str()],
        "b was not good"
    );
    // It stays in the history, however short that is.
    world.spec().revision_history_limit = 1;
    world.reconcile();
    assert!(
        world
            .observed
            .revisions
            .iter()
            .any(|r| r.name.as_str() == good)
    );

    world.push('a');
    world.reconcile();
    assert_eq!(world.release("n1").spec.revision, good);
    assert_eq!(world.release("n1").spec.retain, [""; 0]);
}

#[test]
fn two_decisions_for_a_node_never_share_a_release_id() {
    let mut world = World::deployed(1);
    let mut seen = BTreeMap::new();
    let mut note = |world: &mut World| {
        let serving = world.release("n1").status.serving.clone();
        let spec = &world.release("n1").spec;
        let decision = (spec.revision.clone(), spec.attempt);
        let taken = seen
            .entry(spec.release_id)
            .or_insert(decision.clone())
            .clone();
        // The one that is served is gone back to, which is no other decision.
        let served = serving.is_some_and(|s| s.release_id == spec.release_id);
        assert!(taken == decision || served, "{taken:?} and {decision:?}");
    };
    note(&mut world);
    for digit in ['b', 'c', 'b', 'a', 'c', 'b'] {
        world.push(digit);
        world.reconcile();
        world.agent_reads("n1");
        note(&mut world);
    }
    for retry in ["1", "2", "3"] {
        world.agent_fails("n1", Reason::BuildFailed);
        world.reconcile();
        world.observed.deployment.retry = Some(retry.into());
        world.reconcile();
        note(&mut world);
    }
    assert_eq!(world.release("n1").spec.attempt, 10);
    // One that is made anew counts from 1 again, as the first did.
    let first = world.release("n1").spec.clone();
    world.node("n1").release = None;
    world.reconcile();
    note(&mut world);
    let again = &world.release("n1").spec;
    assert_eq!((&again.revision, again.attempt), (&first.revision, 1));
    assert_eq!(seen.len(), 10, "ten decisions and one going back: {seen:?}");
}

#[test]
fn a_look_up_that_is_pending_or_failed_decides_as_the_last_answer_did() {
    let mut world = changing(2);
    for outcome in [Outcome::Pending, world.observed.lookup.outcome.clone()] {
        world.observed.lookup.outcome = outcome;
        assert_eq!(world.reconcile().steps, []);
        assert_eq!(world.active(), ["n1"]);
    }
    world.lose_source(Reason::RefNotFound);
    world.agent_commits("n1");
    world.reconcile();
    assert_eq!(
        world.told(),
        ["b", "b"],
        "the rollout goes on with the commit that is known"
    );
}

#[test]
fn a_commit_that_the_spec_names_needs_no_look_up() {
    let mut world = World::deployed(1);
    world.lose_source(Reason::SourceUnavailable);
    let reference = serde_json::json!({"commit": "c".repeat(40)});
    let source = world.spec().source.git.as_mut().unwrap();
    source.reference = serde_json::from_value(reference).unwrap();
    world.roll_out();
    assert_eq!(world.served(), ["c"]);
    let source = world.status().source.clone().unwrap();
    assert_eq!(source.short_commit, "ccccccc");
}
