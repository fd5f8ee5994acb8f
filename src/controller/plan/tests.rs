//! The rules of the contract on rollouts, and the case that shows each.
//!
//! Budget
//! - number or percentage of what matches, at least 1: `a_percentage_is_of_the_nodes_that_match_and_at_least_one`,
//!   `a_second_commit_goes_on_within_the_budget`
//! - what broke counts, and goes first: `a_node_that_does_not_serve_what_it_committed_comes_first_and_counts`;
//!   but not beyond the slots: `a_broken_node_is_not_taken_while_all_slots_are_held`
//! - canaries before others, then by name: `the_canary_comes_first`
//!
//! Slots
//! - taken in the status before the Release: `a_slot_without_its_release_is_used_or_given_up`
//! - freed by the commit: `a_first_rollout_takes_one_node_after_another_and_ends_ready`; by the failure:
//!   `a_failed_node_blocks_the_revision_and_no_further_node_is_started`; not by a status that is behind:
//!   `a_failure_that_is_behind_the_spec_or_of_another_release_is_ignored`
//! - kept in mid-change until the deadline: `a_node_unreachable_in_mid_change_keeps_its_slot_until_the_deadline`,
//!   or the Node is gone: `the_release_of_a_node_that_is_gone_is_removed_and_its_slot_freed`
//! - given back after ten minutes: `surroundings_hold_a_node_up_for_ten_minutes_and_then_another_gets_its_slot`,
//!   `a_first_install_that_is_held_up_is_withdrawn`,
//!   `a_node_that_nobody_waits_for_keeps_its_slot_however_long_it_is_held_up`
//!
//! Left-out nodes
//! - cordoned: `a_cordoned_node_is_left_out_and_comes_back_by_itself`; unreachable:
//!   `an_idle_unreachable_node_is_left_out_and_not_written`; not yet heard of:
//!   `a_new_controller_gives_work_only_to_nodes_that_it_has_heard_of`,
//!   `a_new_controller_calls_nothing_ready_while_it_has_not_heard_of_a_node`; an earlier Release still there:
//!   `a_node_whose_old_release_is_still_being_removed_is_named`; one that cannot be read:
//!   `a_node_whose_release_cannot_be_read_is_named_and_the_others_go_on`
//!
//! Supersede
//! - at once in mid-change: `a_newer_revision_goes_at_once_to_every_node_in_mid_change`, cordoned too:
//!   `a_node_that_is_cordoned_in_mid_change_finishes_and_gets_what_is_newer`; back before the commit:
//!   `going_back_before_the_commit_keeps_the_release_that_is_served`
//!
//! Hold
//! - suspended: `suspend_starts_nothing_and_lets_what_runs_finish`; blocked until something new or a retry:
//!   `retry_tries_the_failed_nodes_again_once_for_each_value`; overdue:
//!   `no_progress_until_the_deadline_stalls_and_progress_clears_it`; no source:
//!   `a_source_that_cannot_be_asked_changes_no_node`; not allowed: `a_spec_that_is_not_allowed_changes_no_node`
//!
//! Removal, adoption, retained releases
//! - `a_node_that_leaves_the_placement_is_taken_off_and_may_come_back`,
//!   `what_a_delete_means_is_said_on_every_release_whatever_its_node_is_at`
//! - `a_release_that_an_earlier_deployment_left_is_taken_on`,
//!   `what_is_not_in_the_revision_changes_in_place_without_a_slot`
//! - `the_history_keeps_its_limit_and_goes_back_to_an_old_revision_by_number`
//!
//! The properties over all of them: `no_history_breaks_the_budget_and_every_history_comes_to_rest`, and with
//! the agents' side `crate::simulation`.

use proptest::prelude::*;

use super::*;
use crate::api::ReleaseSpec;
use crate::api::deployment::DeletionPolicy;
use crate::api::reasons::Reason;
use crate::api::release::OnDelete;
use crate::controller::observed::{Presence, Reach};
use crate::controller::references::digests::Digests;
use crate::controller::references::{Content, Contents, Object};
use crate::controller::testing::node;
use crate::controller::testing::{World, commit};
use crate::seal::{DigestKey, NodeKey, SecretBytes};

fn there(matches: bool, canary: bool, cordoned: bool) -> Presence {
    Presence::There {
        matches,
        canary,
        cordoned,
    }
}

#[test]
fn a_first_rollout_takes_one_node_after_another_and_ends_ready() {
    let mut world = World::new(3);
    world.reconcile();
    assert_eq!(world.told(), ["a", "-", "-"]);
    assert_eq!(world.active(), ["n1"]);
    assert_eq!(world.ready().0, "False/Progressing");
    world.agent_commits("n1");
    world.reconcile();
    assert_eq!(world.told(), ["a", "a", "-"]);
    world.roll_out();
    assert_eq!(world.served(), ["a", "a", "a"]);
    assert_eq!(world.most_at_work, 1);
    assert_eq!(world.ready().0, "True/Deployed");
    assert_eq!(world.condition("Reconciling").0, "False/Deployed");
    assert_eq!(world.stalled().0, "False/Deployed");
    let status = world.status();
    assert_eq!(status.last_good_revision, status.revision);
    assert_eq!(
        status.nodes.as_ref().map(|n| n.summary.as_str()),
        Some("3/3")
    );
    assert_eq!(status.progress, None);
}

#[test]
fn what_was_carried_out_is_left_alone() {
    let mut world = World::deployed(3);
    let before = world.fingerprint();
    let plan = world.reconcile();
    assert_eq!(plan.steps, []);
    assert_eq!(plan.revision, None);
    assert_eq!(world.fingerprint(), before);
}

#[test]
fn a_second_commit_goes_on_within_the_budget() {
    let mut world = World::deployed(5);
    world.max_unavailable(2);
    world.push('b');
    world.reconcile();
    assert_eq!(world.told(), ["b", "b", "a", "a", "a"]);
    world.agent_commits("n2");
    world.reconcile();
    assert_eq!(world.told(), ["b", "b", "b", "a", "a"]);
    world.roll_out();
    assert_eq!(world.served(), vec!["b"; 5]);
    assert_eq!(world.most_at_work, 2);
}

#[test]
fn a_percentage_is_of_the_nodes_that_match_and_at_least_one() {
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    for (percent, nodes, slots) in [("1%", 3, 1), ("50%", 5, 2), ("100%", 3, 3), ("25%", 8, 2)] {
        let mut world = World::new(nodes);
        world
            .spec()
            .strategy
            .get_or_insert_default()
            .max_unavailable = IntOrString::String(percent.into());
        assert_eq!(
            crate::controller::rollout::budget(&world.observed),
            slots,
            "{percent} of {nodes}"
        );
    }
}

#[test]
fn the_canary_comes_first() {
    let mut world = World::new(3);
    world.node("n3").presence = there(true, true, false);
    world.reconcile();
    assert_eq!(world.told(), ["-", "-", "a"]);
}

#[test]
fn a_node_that_does_not_serve_what_it_committed_comes_first_and_counts() {
    let mut world = World::deployed(3);
    world.release("n3").status.phase = crate::api::release::Phase::Degraded;
    world.reconcile();
    assert_eq!(world.ready().0.split('/').next(), Some("False"));
    assert_eq!(
        world.condition("Reconciling").0.split('/').next(),
        Some("False")
    );
    world.push('b');
    world.reconcile();
    assert_eq!(
        world.told(),
        ["a", "a", "b"],
        "the broken node is the one to change"
    );
    world.agent_commits("n3");
    world.roll_out();
    assert_eq!(world.served(), ["b", "b", "b"]);
}

#[test]
fn a_broken_node_is_not_taken_while_all_slots_are_held() {
    let mut world = World::deployed(3);
    world.push('b');
    world.reconcile();
    assert_eq!(world.active(), ["n1"]);
    world.release("n3").status.phase = crate::api::release::Phase::Degraded;
    world.reconcile();
    assert_eq!(world.told(), ["b", "a", "a"]);
    assert_eq!(world.active(), ["n1"]);
}

#[test]
fn a_node_whose_old_release_is_still_being_removed_is_named() {
    let mut world = World::new(2);
    world.node("n1").name_taken = true;
    world.reconcile();
    assert_eq!(world.told(), ["-", "a"]);
    assert!(
        world
            .ready()
            .1
            .contains("on n1 an earlier Release has yet to go"),
        "{:?}",
        world.ready()
    );
}

#[test]
fn a_node_whose_release_cannot_be_read_is_named_and_the_others_go_on() {
    let mut world = World::new(2);
    let node = world.node("n1");
    (node.name_taken, node.unreadable) = (true, true);
    world.reconcile();
    assert_eq!(world.told(), ["-", "a"]);
    let (_, message) = world.ready();
    assert!(
        message.contains("this version of Kari cannot read the Release on n1")
            && !message.contains("an earlier Release"),
        "{message}"
    );
}

#[test]
fn a_newer_revision_goes_at_once_to_every_node_in_mid_change() {
    let mut world = World::deployed(3);
    world.push('b');
    world.reconcile();
    world.agent_reads("n1");
    let first = world.release("n1").spec.release_id;
    world.push('c');
    let plan = world.reconcile();
    assert_eq!(world.told(), ["c", "a", "a"]);
    assert_eq!(plan.steps.len(), 1);
    assert_ne!(world.release("n1").spec.release_id, first);
    assert_eq!(world.active(), ["n1"]);
    world.roll_out();
    assert_eq!(world.served(), ["c", "c", "c"]);
    assert_eq!(world.most_at_work, 1);
}

#[test]
fn going_back_before_the_commit_keeps_the_release_that_is_served() {
    let mut world = World::deployed(1);
    let served = world.release("n1").spec.release_id;
    world.push('b');
    world.reconcile();
    world.agent_reads("n1");
    world.push('a');
    world.reconcile();
    assert_eq!(world.release("n1").spec.release_id, served);
    world.roll_out();
    assert_eq!(world.ready().0, "True/Deployed");
    assert_eq!(world.release("n1").spec.attempt, 3);
}

#[test]
fn what_is_not_in_the_revision_changes_in_place_without_a_slot() {
    let mut world = World::deployed(3);
    let ids: Vec<_> = ["n1", "n2", "n3"]
        .map(|n| world.release(n).spec.release_id)
        .into();
    let source = world.spec().source.git.as_mut();
    source.unwrap_or_else(|| panic!("git")).interval_seconds = 500;
    assert_eq!(world.reconcile().steps, [], "the interval concerns no node");
    world.spec().keep_releases = 7;
    let plan = world.reconcile();
    assert_eq!(plan.steps.len(), 3);
    assert_eq!(world.active(), Vec::<&str>::new());
    for (name, id) in ["n1", "n2", "n3"].into_iter().zip(ids) {
        assert_eq!(world.release(name).spec.release_id, id);
        assert_eq!(world.release(name).spec.template.keep_releases, 7);
    }
    assert_eq!(world.ready().0, "True/Deployed", "{:?}", world.ready());
    assert_eq!(world.reconcile().steps, [], "before any agent has read it");
}

#[test]
fn a_failed_node_blocks_the_revision_and_no_further_node_is_started() {
    let mut world = World::deployed(3);
    let good = world.status().revision.clone();
    world.push('b');
    world.reconcile();
    world.agent_fails("n1", Reason::BuildFailed);
    for _ in 0..2 {
        world.reconcile();
        assert_eq!(world.told(), ["b", "a", "a"]);
        assert_eq!(world.served(), ["a", "a", "a"]);
        assert_eq!(world.active(), Vec::<&str>::new());
    }
    assert_eq!(world.stalled().0, "True/BuildFailed");
    assert_eq!(
        world.condition("Reconciling").0.split('/').next(),
        Some("False")
    );
    assert_eq!(world.ready().0, "False/BuildFailed");
    assert!(world.ready().1.contains("on n1"), "{:?}", world.ready());
    let log =
        "kubectl get krel -n web shop-676b8bb84c -o jsonpath='{.status.attempt.failure.logTail}'";
    assert!(world.ready().1.contains(log), "{:?}", world.ready());
    assert_eq!(world.status().last_good_revision, good);
    assert_eq!(world.status().blocked_revisions[0].node, "n1");
    assert_eq!(world.status().nodes.as_ref().map(|n| n.failed), Some(1));
    // Only something new goes on.
    world.push('c');
    world.roll_out();
    assert_eq!(world.served(), ["c", "c", "c"]);
    assert_eq!(world.stalled().0, "False/Deployed");
    world.push('b');
    world.reconcile();
    assert_eq!(world.told(), ["c", "c", "c"], "b is still blocked");
    assert_eq!(world.stalled().0, "True/BuildFailed");
}

#[test]
fn what_a_later_agent_says_follows_from_its_class_and_an_unknown_class_blocks_nothing() {
    let fails = |class: &str| {
        let mut world = World::deployed(2);
        world.push('b');
        world.reconcile();
        world.agent_fails("n1", Reason::BuildFailed);
        let attempt = world.release("n1").status.attempt.as_mut();
        let failure = attempt.and_then(|attempt| attempt.failure.as_mut());
        let failure = failure.expect("a failure");
        (failure.class, failure.reason) = (class.to_owned(), "LaterReason".to_owned());
        world.reconcile();
        world
    };
    let revision = fails("Revision");
    assert_eq!(revision.stalled().0, "True/Unknown");
    let said = revision.stalled().1;
    assert!(
        said.contains("failed on n1 (LaterReason): it broke"),
        "{said}"
    );
    assert_eq!(revision.status().blocked_revisions.len(), 1);
    let later = fails("LaterClass");
    assert_eq!(later.stalled().0.split('/').next(), Some("False"));
    assert_eq!(later.status().blocked_revisions, []);
    assert!(
        later.ready().1.contains("n1: LaterReason: it broke"),
        "{later:?}",
        later = later.ready()
    );
}

#[test]
fn a_failure_that_is_behind_the_spec_or_of_another_release_is_ignored() {
    let mut world = World::deployed(2);
    world.push('b');
    world.reconcile();
    world.agent_fails("n1", Reason::BuildFailed);
    world.release("n1").status.observed_generation -= 1;
    world.reconcile();
    assert_eq!(world.status().blocked_revisions, []);
    assert_eq!(world.active(), ["n1"]);
}

#[test]
fn retry_tries_the_failed_nodes_again_once_for_each_value() {
    let mut world = World::deployed(2);
    world.push('b');
    world.reconcile();
    world.agent_fails("n1", Reason::StartFailed);
    world.reconcile();
    let failed = world.release("n1").spec.release_id;
    world.observed.deployment.retry = Some("1".into());
    world.reconcile();
    assert_ne!(world.release("n1").spec.release_id, failed);
    assert_eq!(world.active(), ["n1"]);
    assert_eq!(world.status().blocked_revisions, []);
    // It fails again: the same value does nothing more.
    world.agent_fails("n1", Reason::StartFailed);
    let failed = world.release("n1").spec.release_id;
    for _ in 0..3 {
        world.reconcile();
    }
    assert_eq!(world.release("n1").spec.release_id, failed);
    assert_eq!(world.stalled().0, "True/StartFailed");
    world.observed.deployment.retry = Some("2".into());
    world.roll_out();
    assert_eq!(world.served(), ["b", "b"]);
    assert_eq!(world.ready().0, "True/Deployed");
    // Taken away, the annotation says nothing.
    world.observed.deployment.retry = None;
    assert_eq!(world.reconcile().steps, []);
    let handled = world
        .status()
        .last_handled
        .as_ref()
        .and_then(|h| h.retry.as_deref());
    assert_eq!(handled, Some("2"));
}

#[test]
fn a_retry_survives_a_write_of_the_release_that_was_refused() {
    let mut world = World::deployed(2);
    world.push('b');
    world.reconcile();
    world.agent_fails("n1", Reason::StartFailed);
    world.reconcile();
    world.observed.deployment.retry = Some("1".into());
    // The status is written, the Release is not: a conflict, or a crash between the two.
    let refused = plan(&world.observed, world.now);
    world.observed.deployment.status = refused.status.clone();
    assert_eq!(world.active(), ["n1"]);
    world.reconcile();
    assert_eq!(world.status().blocked_revisions, []);
    assert_eq!(world.release("n1").spec.attempt, 3);
    world.roll_out();
    assert_eq!(world.served(), ["b", "b"]);
}

#[test]
fn the_object_at_fault_on_a_node_stalls_and_blocks_no_revision() {
    let mut world = World::new(2);
    world.reconcile();
    world.agent_fails("n1", Reason::RouteConflict);
    world.reconcile();
    assert_eq!(world.told(), ["a", "-"]);
    assert_eq!(world.stalled().0, "True/RouteConflict");
    assert_eq!(world.status().blocked_revisions, []);
    assert_eq!(world.active(), Vec::<&str>::new());
    // It is tried again when the object changes, also by what is not in the revision.
    world.spec().keep_releases = 7;
    world.reconcile();
    assert_eq!(world.release("n1").spec.template.keep_releases, 7);
    assert_eq!(world.release("n1").spec.attempt, 2);
    assert_eq!(
        (world.told(), world.active()),
        (vec!["a".into(), "-".into()], vec!["n1"])
    );
    world.roll_out();
    assert_eq!(world.served(), ["a", "a"]);
}

#[test]
fn surroundings_hold_a_node_up_for_ten_minutes_and_then_another_gets_its_slot() {
    let mut world = World::deployed(2);
    world.push('b');
    world.reconcile();
    let served = world
        .release("n1")
        .status
        .serving
        .clone()
        .map(|s| s.release_id);
    world.agent_fails("n1", Reason::DiskPressure);
    world.pass(599);
    world.reconcile();
    assert_eq!(world.told(), ["b", "a"]);
    assert_eq!(world.ready().0, "False/DiskPressure");
    assert_eq!(world.stalled().0.split('/').next(), Some("False"));
    assert_eq!(world.status().blocked_revisions, []);
    world.pass(1);
    world.reconcile();
    assert_eq!(
        world.told(),
        ["a", "a"],
        "the release that is served is written back"
    );
    assert_eq!(Some(world.release("n1").spec.release_id), served);
    assert_eq!(world.active(), ["n1"], "until the node has confirmed it");
    world.reconcile();
    assert_eq!(world.told(), ["a", "a"]);
    world.agent_reads("n1");
    world.reconcile();
    assert_eq!(world.told(), ["a", "b"]);
    world.agent_commits("n2");
    world.reconcile();
    assert_eq!(world.told(), ["b", "b"], "tried last");
    assert_eq!(world.most_at_work, 1);
}

#[test]
fn a_first_install_that_is_held_up_is_withdrawn() {
    let mut world = World::new(2);
    world.reconcile();
    world.agent_fails("n1", Reason::ToolMissing);
    world.pass(600);
    world.reconcile();
    assert_eq!(
        world.release("n1").spec.on_delete,
        OnDelete::KeepState,
        "state of an earlier stay is not lost"
    );
    assert!(!world.release("n1").deleting);
    world.reconcile();
    assert!(world.release("n1").deleting);
    world.reconcile();
    assert_eq!(world.active(), ["n1"], "until it is gone");
    world.agent_reads("n1");
    world.reconcile();
    assert_eq!(world.told(), ["-", "a"]);
}

#[test]
fn a_node_that_nobody_waits_for_keeps_its_slot_however_long_it_is_held_up() {
    let mut world = World::new(1);
    world.reconcile();
    world.agent_fails("n1", Reason::SourceUnavailable);
    world.pass(6000);
    assert_eq!(world.reconcile().steps, []);
    assert_eq!(world.ready().0, "False/SourceUnavailable");
}

#[test]
fn suspend_starts_nothing_and_lets_what_runs_finish() {
    let mut world = World::deployed(3);
    world.push('b');
    world.reconcile();
    world.spec().suspend = true;
    world.push('c');
    world.agent_commits("n1");
    world.reconcile();
    assert_eq!(world.told(), ["b", "a", "a"]);
    assert_eq!(world.ready().0, "False/Suspended");
    assert_eq!(
        world.condition("Reconciling").0.split('/').next(),
        Some("False")
    );
    world.spec().suspend = false;
    world.roll_out();
    assert_eq!(world.served(), ["c", "c", "c"]);
}

#[test]
fn a_node_that_leaves_the_placement_is_taken_off_and_may_come_back() {
    let mut world = World::deployed(2);
    world.node("n2").presence = there(false, false, false);
    world.reconcile();
    assert_eq!(world.release("n2").spec.on_delete, OnDelete::KeepState);
    assert!(
        !world.release("n2").deleting,
        "what the delete is for stands before it"
    );
    world.reconcile();
    assert!(world.release("n2").deleting);
    assert_eq!(world.ready().0, "True/Deployed");
    world.node("n2").presence = there(true, false, false);
    world.reconcile();
    assert!(
        world.release("n2").deleting,
        "a Release in deletion is not adopted"
    );
    world.agent_reads("n2");
    world.reconcile();
    assert_eq!(world.told(), ["a", "a"]);
    assert_eq!(world.release("n2").spec.on_delete, OnDelete::FollowPolicy);
}

#[test]
fn a_node_that_comes_back_before_its_release_is_deleted_forgets_why_it_was_to_be() {
    let mut world = World::deployed(2);
    world.node("n2").presence = there(false, false, false);
    world.reconcile();
    world.node("n2").presence = there(true, false, false);
    world.reconcile();
    let release = world.release("n2");
    assert!(!release.deleting);
    assert_eq!(release.spec.on_delete, OnDelete::FollowPolicy);
    assert_eq!(world.active(), [""; 0], "no slot is needed for it");
}

#[test]
fn what_a_delete_means_is_said_on_every_release_whatever_its_node_is_at() {
    let mut world = World::deployed(4);
    world.node("n1").presence = there(true, false, true);
    world.node("n2").reach = Reach::Stale;
    world.push('b');
    world.reconcile();
    world.agent_fails("n3", Reason::BuildFailed);
    world.reconcile();
    world.spec().suspend = true;
    world.spec().deletion_policy = DeletionPolicy::Orphan;
    world.reconcile();
    for node in ["n1", "n2", "n3", "n4"] {
        let spec = &world.release(node).spec;
        assert_eq!(
            spec.template.deletion_policy,
            DeletionPolicy::Orphan,
            "{node}"
        );
    }
    assert_eq!(world.told(), ["a", "a", "b", "a"], "and nothing else");
}

#[test]
fn the_release_of_a_node_that_is_gone_is_removed_and_its_slot_freed() {
    let mut world = World::deployed(2);
    world.push('b');
    world.reconcile();
    world.node("n1").presence = Presence::Gone;
    world.node("n1").reach = Reach::Stale;
    world.reconcile();
    assert_eq!(world.release("n1").spec.on_delete, OnDelete::Orphan);
    world.reconcile();
    assert!(world.release("n1").deleting);
    assert_eq!(world.active(), ["n2"]);
    assert_eq!(world.told(), ["b", "b"]);
}

#[test]
fn a_cordoned_node_is_left_out_and_comes_back_by_itself() {
    let mut world = World::deployed(3);
    world.node("n1").presence = there(true, false, true);
    world.push('b');
    world.roll_out();
    assert_eq!(world.served(), ["a", "b", "b"]);
    assert_eq!(world.ready().0, "True/Deployed");
    assert!(
        world.ready().1.contains("left out: n1 (NodeCordoned)"),
        "{:?}",
        world.ready()
    );
    world.node("n1").presence = there(true, false, false);
    world.roll_out();
    assert_eq!(world.served(), ["b", "b", "b"]);
}

#[test]
fn a_node_that_is_cordoned_in_mid_change_finishes_and_gets_what_is_newer() {
    let mut world = World::deployed(2);
    world.push('b');
    world.reconcile();
    world.node("n1").presence = there(true, false, true);
    world.push('c');
    world.reconcile();
    assert_eq!(world.told(), ["c", "a"]);
    assert_eq!(world.active(), ["n1"]);
}

#[test]
fn an_idle_unreachable_node_is_left_out_and_not_written() {
    let mut world = World::deployed(3);
    world.node("n2").reach = Reach::Stale;
    world.push('b');
    world.roll_out();
    assert_eq!(world.served(), ["b", "a", "b"]);
    assert_eq!(world.told(), ["b", "a", "b"]);
    assert_eq!(world.ready().0, "True/Deployed");
    assert!(
        world.ready().1.contains("n2 (AgentUnreachable)"),
        "{:?}",
        world.ready()
    );
    assert_eq!(
        world.status().nodes.as_ref().map(|n| n.unreachable),
        Some(1)
    );
}

#[test]
fn a_node_unreachable_in_mid_change_keeps_its_slot_until_the_deadline() {
    let mut world = World::deployed(3);
    world.push('b');
    world.reconcile();
    world.node("n1").reach = Reach::Stale;
    world.pass(500);
    world.reconcile();
    assert_eq!(world.active(), ["n1"]);
    assert_eq!(world.told(), ["b", "a", "a"]);
    world.pass(101);
    world.reconcile();
    assert_eq!(world.active(), ["n2"], "the rollout goes on without it");
    assert_eq!(world.stalled().0.split('/').next(), Some("False"));
    world.push('c');
    world.reconcile();
    assert_eq!(
        world.told(),
        ["c", "c", "a"],
        "what is newer goes to it all the same"
    );
}

#[test]
fn no_progress_until_the_deadline_stalls_and_progress_clears_it() {
    let mut world = World::deployed(3);
    world.push('b');
    world.reconcile();
    world.agent_reads("n1");
    world.pass(599);
    let plan = world.reconcile();
    assert_eq!(plan.look_again, Some(Duration::from_secs(2)));
    assert_eq!(world.stalled().0.split('/').next(), Some("False"));
    world.pass(2);
    for _ in 0..2 {
        world.reconcile();
        assert_eq!(world.stalled().0, "True/ProgressDeadlineExceeded");
        assert_eq!(world.told(), ["b", "a", "a"]);
        assert_eq!(world.active(), ["n1"], "what runs may finish");
    }
    world.agent_commits("n1");
    world.reconcile();
    assert_eq!(world.stalled().0.split('/').next(), Some("False"));
    assert_eq!(world.told(), ["b", "b", "a"]);
}

#[test]
fn time_that_is_spent_waiting_does_not_count_against_the_deadline() {
    let mut world = World::deployed(2);
    world.push('b');
    world.reconcile();
    world.agent_reads("n1");
    world.pass(100);
    world.release("n1").status.phase = crate::api::release::Phase::Queued;
    world.reconcile();
    world.pass(5000);
    world.reconcile();
    assert_eq!(world.ready().0, "False/Queued");
    assert_eq!(world.stalled().0.split('/').next(), Some("False"));
    world.release("n1").status.phase = crate::api::release::Phase::Building;
    world.reconcile();
    world.pass(499);
    world.reconcile();
    assert_eq!(world.stalled().0.split('/').next(), Some("False"));
    world.pass(2);
    world.reconcile();
    assert_eq!(world.stalled().0, "True/ProgressDeadlineExceeded");
}

#[test]
fn a_source_that_cannot_be_asked_changes_no_node() {
    for reason in [Reason::SourceUnavailable, Reason::RefNotFound] {
        let mut world = World::deployed(2);
        world.lose_source(reason);
        assert_eq!(world.reconcile().steps, []);
        assert_eq!(world.ready().0, "True/Deployed");
        assert_eq!(
            world
                .status()
                .source
                .as_ref()
                .map(|s| s.short_commit.as_str()),
            Some("aaaaaaa")
        );
        let stalled = if reason.needs_a_person() {
            "True/RefNotFound"
        } else {
            "False/Deployed"
        };
        assert_eq!(world.stalled().0, stalled);
    }
    let mut world = World::new(2);
    world.lose_source(Reason::SourceUnavailable);
    assert_eq!(world.reconcile().steps, []);
    assert_eq!(world.ready().0, "False/SourceUnavailable");
    assert_eq!(world.condition("Reconciling").0, "True/SourceUnavailable");
}

#[test]
fn an_answer_for_another_reference_is_not_taken_for_this_one() {
    let mut world = World::deployed(1);
    world.observed.lookup.outcome = Outcome::Pending;
    let source = world.spec().source.git.as_mut();
    source.unwrap_or_else(|| panic!("git")).url = "https://git.example.com/other.git".into();
    assert_eq!(world.reconcile().steps, []);
    assert_eq!(world.ready().0, "False/Resolving");
    assert_eq!(world.served(), ["a"]);
}

#[test]
fn a_new_controller_gives_work_only_to_nodes_that_it_has_heard_of() {
    let mut world = World::new(2);
    world.node("n1").reach = Reach::Unknown;
    world.node("n2").reach = Reach::Unknown;
    world.reconcile();
    assert_eq!(world.told(), ["-", "-"]);
    assert_eq!(world.ready().0, "False/Progressing");
    world.node("n2").reach = Reach::Fresh;
    world.reconcile();
    assert_eq!(world.told(), ["-", "a"]);
}

#[test]
fn a_new_controller_calls_nothing_ready_while_it_has_not_heard_of_a_node() {
    let mut world = World::new(2);
    world.node("n2").reach = Reach::Unknown;
    world.roll_out();
    assert_eq!(world.served(), ["a", "-"]);
    let (ready, message) = world.ready();
    assert_eq!(ready, "False/Progressing");
    assert!(
        message.contains("waiting to hear from the agents of 1 of 2 nodes"),
        "{message}"
    );
    world.node("n2").reach = Reach::Stale;
    world.reconcile();
    assert_eq!(world.ready().0, "True/Deployed");
    // It restarts: what was said stays.
    world.node("n2").reach = Reach::Unknown;
    world.reconcile();
    assert_eq!(world.ready().0, "True/Deployed");
}

#[test]
fn a_new_controller_says_of_a_deployment_what_the_one_before_it_said() {
    let mut world = World::deployed(2);
    let before = world.status().clone();
    world.node("n1").reach = Reach::Unknown;
    world.node("n2").reach = Reach::Unknown;
    assert_eq!(world.reconcile().steps, []);
    assert_eq!(*world.status(), before);
}

#[test]
fn no_node_is_stalled_with_what_to_change() {
    let mut world = World::new(1);
    world.node("n1").presence = there(false, false, false);
    world.reconcile();
    assert_eq!(world.stalled().0, "True/NoMatchingNodes");
    assert!(
        world.ready().1.contains("label a node"),
        "{:?}",
        world.ready()
    );
    world.node("n1").presence = there(true, false, false);
    world.node("n1").reach = Reach::NoAgent;
    world.reconcile();
    assert_eq!(world.stalled().0, "True/NoMatchingNodes");
    assert!(world.ready().1.contains("agent"), "{:?}", world.ready());
}

#[test]
fn a_spec_that_is_not_allowed_changes_no_node() {
    let mut world = World::deployed(1);
    let source = world.spec().source.git.as_mut();
    source.unwrap_or_else(|| panic!("git")).url = "http://git.example.com/shop.git".into();
    assert_eq!(world.reconcile().steps, []);
    assert_eq!(world.stalled().0, "True/PolicyDenied");
    assert_eq!(world.served(), ["a"]);
}

#[test]
fn a_spec_that_a_policy_refuses_now_changes_no_node_until_it_is_allowed_again() {
    let mut world = World::deployed(2);
    world.push('b');
    world.reconcile();
    world.agent_commits("n1");
    world.observed.denied = Some("the namespace web may not deploy".into());
    assert_eq!(world.reconcile().steps, [], "no further node is begun");
    let (stalled, message) = world.stalled();
    assert_eq!(stalled, "True/PolicyDenied");
    assert_eq!(message, "the namespace web may not deploy");
    assert_eq!(world.ready().0, "False/PolicyDenied");
    assert_eq!(world.served(), ["b", "a"]);
    world.observed.denied = None;
    world.roll_out();
    assert_eq!(world.stalled().0, "False/Deployed");
    assert_eq!(world.served(), ["b", "b"]);
}

#[test]
fn a_release_that_an_earlier_deployment_left_is_taken_on() {
    let mut world = World::deployed(2);
    world.release("n2").orphaned = true;
    let id = world.release("n2").spec.release_id;
    assert_eq!(world.reconcile().steps.len(), 1);
    assert!(!world.release("n2").orphaned);
    assert_eq!(world.release("n2").spec.release_id, id);
    assert_eq!(world.reconcile().steps, []);
}

#[test]
fn a_slot_without_its_release_is_used_or_given_up() {
    let mut world = World::new(2);
    // The status was written, the Release was not.
    world.observed.deployment.status.active = vec!["n2".into()];
    world.reconcile();
    assert_eq!(
        world.told(),
        ["-", "a"],
        "the node that has the slot goes first"
    );
    let mut world = World::new(1);
    world.observed.deployment.status.active = vec!["n1".into(), "stranger".into()];
    world.spec().suspend = true;
    world.reconcile();
    assert_eq!(world.active(), Vec::<&str>::new());
}

#[test]
fn the_history_keeps_its_limit_and_goes_back_to_an_old_revision_by_number() {
    let mut world = World::deployed(1);
    world.spec().revision_history_limit = 2;
    for digit in ['b', 'c', 'd', 'e'] {
        world.push(digit);
        world.roll_out();
    }
    let digits: Vec<_> = world
        .observed
        .revisions
        .iter()
        .filter_map(|r| r.data.as_ref().map(|d| d.commit.short()[..1].to_owned()))
        .collect();
    // The release that runs retains the one before it, which does not count against the limit.
    assert_eq!(digits, ["b", "c", "d", "e"]);
    world.push('c');
    world.roll_out();
    let c = world.revision_of('c');
    let newest = world.observed.revisions.iter().max_by_key(|r| r.number);
    assert_eq!(newest.map(|r| r.name.to_string()), Some(c));
}

#[test]
fn the_annotation_that_asks_for_a_look_is_echoed_when_it_was_answered() {
    let handled = |w: &World| {
        w.status()
            .last_handled
            .as_ref()
            .and_then(|h| h.requested_at.clone())
    };
    let mut world = World::deployed(1);
    world.observed.deployment.requested_at = Some("now".into());
    world.reconcile();
    assert_eq!(handled(&world), None);
    world.observed.lookup.answered_request = Some("now".into());
    world.reconcile();
    assert_eq!(handled(&world), Some("now".into()));
    world.observed.lookup.answered_request = None;
    world.reconcile();
    assert_eq!(handled(&world), Some("now".into()));
}

/// One thing that happens to the world.
#[derive(Clone, Debug)]
enum Happening {
    Push(u8),
    Budget(i32),
    Suspend(bool),
    Retry(u8),
    Keep(u32),
    Pass(i64),
    Reads(usize),
    Commits(usize),
    Fails(usize, usize),
    Degrades(usize),
    Reach(usize, Reach),
    Presence(usize, Presence),
    StatusOnly,
    Reconcile,
}

const FAILURES: [Reason; 4] = [
    Reason::BuildFailed,
    Reason::DiskPressure,
    Reason::RouteConflict,
    Reason::ProbeFailed,
];

fn happening(nodes: usize) -> impl Strategy<Value = Happening> {
    let n = 0..nodes;
    prop_oneof![
        2 => (0_u8..4).prop_map(Happening::Push),
        1 => (1..4).prop_map(Happening::Budget),
        1 => any::<bool>().prop_map(Happening::Suspend),
        1 => (0_u8..3).prop_map(Happening::Retry),
        1 => (0_u32..3).prop_map(Happening::Keep),
        2 => (1_i64..900).prop_map(Happening::Pass),
        4 => n.clone().prop_map(Happening::Reads),
        6 => n.clone().prop_map(Happening::Commits),
        2 => (n.clone(), 0..FAILURES.len()).prop_map(|(n, f)| Happening::Fails(n, f)),
        1 => n.clone().prop_map(Happening::Degrades),
        1 => (n.clone(), prop_oneof![Just(Reach::Fresh), Just(Reach::Stale), Just(Reach::Unknown)])
            .prop_map(|(n, r)| Happening::Reach(n, r)),
        1 => (n, any::<[bool; 4]>()).prop_map(|(n, [gone, matches, canary, cordoned])| {
            Happening::Presence(n, if gone && !matches { Presence::Gone } else { there(matches || canary, canary, cordoned && !matches) })
        }),
        1 => Just(Happening::StatusOnly),
        8 => Just(Happening::Reconcile),
    ]
}

fn apply(world: &mut World, happening: &Happening) {
    let name = |n: &usize| format!("n{}", n + 1);
    match happening {
        Happening::Push(n) => world.push((b'a' + n) as char),
        Happening::Budget(n) => world.max_unavailable(*n),
        Happening::Suspend(s) => world.spec().suspend = *s,
        Happening::Retry(n) => world.observed.deployment.retry = Some(n.to_string()),
        Happening::Keep(n) => world.spec().keep_releases = *n,
        Happening::Pass(s) => world.pass(*s),
        Happening::Reads(n) => world.agent_reads(&name(n)),
        Happening::Commits(n) => world.agent_commits(&name(n)),
        Happening::Fails(n, f) => world.agent_fails(&name(n), FAILURES[*f]),
        Happening::Degrades(n) => {
            if let Some(r) = world
                .node(&name(n))
                .release
                .as_mut()
                .filter(|r| r.committed())
            {
                r.status.phase = crate::api::release::Phase::Degraded;
            }
        }
        Happening::Reach(n, r) => world.node(&name(n)).reach = *r,
        Happening::Presence(n, p) => {
            let node = world.node(&name(n));
            node.presence = *p;
            if *p == Presence::Gone {
                node.reach = Reach::NoAgent;
            } else if node.reach == Reach::NoAgent {
                node.reach = Reach::Fresh;
            }
        }
        Happening::StatusOnly => {
            // The status was written, and the process died before it wrote a Release.
            let planned = plan(&world.observed, world.now);
            if planned.revision.is_none() {
                world.observed.deployment.status = planned.status;
            }
        }
        Happening::Reconcile => {
            let before = unavailable(world);
            let planned = world.reconcile();
            let begun = planned
                .steps
                .iter()
                .any(|s| matches!(s, Step::Create { .. }));
            let (after, slots) = (
                unavailable(world),
                crate::controller::rollout::budget(&world.observed),
            );
            assert!(
                after <= slots || after <= before,
                "{after} unavailable of {slots} allowed, {before} before; begun: {begun}; {:?}",
                world.status()
            );
        }
    }
}

/// Nodes that hold a slot, or are reachable and do not serve what they committed.
fn unavailable(world: &World) -> usize {
    let nodes = world.observed.nodes.iter();
    nodes
        .filter(|n| {
            let works = n.release.as_ref().is_some_and(|r| {
                !r.deleting
                    && !r.committed()
                    && r.failed().is_none()
                    && n.matches()
                    && n.reach != Reach::Stale
            });
            let broken = n.takes_part()
                && n.release
                    .as_ref()
                    .is_some_and(|r| !r.deleting && r.degraded());
            works || broken || (n.release.is_some() && world.active().contains(&n.name.as_str()))
        })
        .count()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn no_history_breaks_the_budget_and_every_history_comes_to_rest(
        happenings in prop::collection::vec(happening(4), 0..60),
    ) {
        let mut world = World::new(4);
        for happening in &happenings {
            apply(&mut world, happening);
        }
        // A plan that was carried out leaves nothing to do.
        for _ in 0..3 {
            world.reconcile();
        }
        let before = world.fingerprint();
        let again = world.reconcile();
        prop_assert_eq!(again.steps, vec![]);
        prop_assert_eq!(world.fingerprint(), before);
        // With everything well again, every node that should serves what is wanted.
        for n in 0..4 {
            apply(&mut world, &Happening::Presence(n, there(true, false, false)));
            world.node(&format!("n{}", n + 1)).reach = Reach::Fresh;
        }
        world.spec().suspend = false;
        world.observed.deployment.retry = Some("at last".into());
        world.roll_out();
        let wanted = match &world.observed.lookup.outcome {
            Outcome::Found(commit) => commit.short()[..1].to_owned(),
            other => panic!("{other:?}"),
        };
        prop_assert_eq!(world.served(), vec![wanted; 4]);
        prop_assert_eq!(world.ready().0, "True/Deployed");
        prop_assert_eq!(world.active(), Vec::<&str>::new());
    }
}

/// A Deployment that takes `LEVEL` from the ConfigMap `shop`, deployed with it.
fn referring() -> World {
    let mut world = World::new(2);
    world.spec().env.push(
        serde_json::from_value(serde_json::json!({"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": "shop", "key": "level"}}}))
            .unwrap_or_else(|e| panic!("{e}")),
    );
    set_level(&mut world, "low");
    world.roll_out();
    assert_eq!(world.served(), ["a", "a"]);
    world
}

fn set_level(world: &mut World, level: &str) {
    let data = [("level".to_owned(), SecretBytes::new(level.into()))].into();
    world.observed.contents = Contents::of(Object::config_map("shop"), Content::Held(data));
}

fn level_of(world: &mut World, node: &str) -> Option<String> {
    let template = &world.release(node).spec.template;
    let variable = template.env.iter().find(|v| v.name == "LEVEL")?;
    variable.value.clone()
}

#[test]
fn what_a_reference_holds_is_part_of_the_revision_and_rolls_out_like_a_commit() {
    let mut world = referring();
    let first = world.status().revision.clone();
    set_level(&mut world, "high");
    world.roll_out();
    assert_ne!(world.status().revision, first);
    assert_eq!(level_of(&mut world, "n2").as_deref(), Some("high"));
    assert_eq!(world.observed.revisions.len(), 2);
    set_level(&mut world, "low");
    world.roll_out();
    assert_eq!(world.status().revision, first, "same content, same name");
}

#[test]
fn a_reference_that_is_lost_keeps_what_runs_and_heals_by_itself() {
    let mut world = referring();
    let first = world.status().revision.clone();
    world.observed.contents = Contents::of(Object::config_map("shop"), Content::Absent);
    world.push('b');
    world.roll_out();
    assert_eq!(world.served(), ["a", "a"]);
    assert_eq!(world.status().revision, first);
    assert_eq!(world.stalled().0, "True/ReferenceNotFound");
    let (ready, message) = world.ready();
    assert_eq!(ready, "True/Deployed");
    assert!(
        message.contains("nothing newer is rolled out") && message.contains("no ConfigMap shop"),
        "{message}"
    );
    assert_eq!(world.condition("Reconciling").0, "False/Deployed");
    set_level(&mut world, "low");
    world.roll_out();
    assert_eq!(world.served(), ["b", "b"]);
    assert_eq!(world.stalled().0, "False/Deployed");
}

#[test]
fn a_spec_with_a_reference_that_is_not_there_changes_no_node_and_is_not_ready() {
    let mut world = referring();
    let told = world.told();
    let other = serde_json::json!({"name": "OTHER", "valueFrom": {"configMapKeyRef": {"name": "shop", "key": "other"}}});
    world
        .spec()
        .env
        .push(serde_json::from_value(other).unwrap_or_else(|e| panic!("{e}")));
    world.push('b');
    world.roll_out();
    assert_eq!(world.told(), told);
    assert_eq!(world.ready().0, "False/ReferenceNotFound");
    assert_eq!(world.stalled().0, "True/ReferenceNotFound");
}

#[test]
fn the_tag_that_a_range_found_is_named_and_stays_valid_while_the_source_is_away() {
    let mut world = World::new(1);
    let range = serde_json::json!({"semver": "1.x"});
    let source = world
        .spec()
        .source
        .git
        .as_mut()
        .unwrap_or_else(|| panic!("git"));
    source.reference = serde_json::from_value(range).ok();
    world.observed.lookup.outcome = Outcome::FoundTag("refs/tags/v1.2.0".into(), commit('c'));
    world.roll_out();
    assert_eq!(world.served(), ["c"]);
    let found = |world: &World| world.status().source.clone().unwrap_or_default().reference;
    assert_eq!(found(&world), "refs/tags/v1.2.0");
    let reference = world.release("n1").spec.template.source.reference.clone();
    assert_eq!(
        reference.as_deref(),
        Some("refs/tags/v1.2.0"),
        "a node fetches by it"
    );
    world.lose_source(Reason::SourceUnavailable);
    world.roll_out();
    assert_eq!(
        (world.served(), found(&world)),
        (vec!["c".to_owned()], "refs/tags/v1.2.0".to_owned())
    );
    assert_eq!(world.ready().0, "True/Deployed");
    let source = world
        .spec()
        .source
        .git
        .as_mut()
        .unwrap_or_else(|| panic!("git"));
    source.reference = serde_json::from_value(serde_json::json!({"semver": "2.x"})).ok();
    world.roll_out();
    assert_eq!(
        world.ready().0,
        "False/SourceUnavailable",
        "it is in another range"
    );
    assert_eq!(world.served(), ["c"]);
}

// ---- Secrets ----

/// Two nodes with keys, and a variable that is a Secret's.
fn secretive() -> World {
    let mut world = World::new(2);
    for node in &mut world.observed.nodes {
        node.key = Some(NodeKey::generate().public().clone());
    }
    world.spec().env.push(
        serde_json::from_value(serde_json::json!({"name": "DB", "valueFrom": {"secretKeyRef": {"name": "shop", "key": "url"}}}))
            .unwrap_or_else(|e| panic!("{e}")),
    );
    set_secret(&mut world, Some("value-1"));
    world.roll_out();
    assert_eq!(world.served(), ["a", "a"]);
    world
}

fn set_secret(world: &mut World, value: Option<&str>) {
    let content = match value {
        Some(value) => {
            let data = [("url".to_owned(), SecretBytes::new(value.into()))];
            Content::Held(data.into())
        }
        None => Content::Absent,
    };
    let mut contents = Contents::of(Object::secret("shop"), content);
    let key = DigestKey::from_bytes(vec![7; 32]).unwrap_or_else(|| panic!("32 bytes"));
    contents.digests = Some(Digests::new(key, "web", "shop"));
    world.observed.contents = contents;
}

fn key_of(world: &mut World, node: &str) -> Option<String> {
    let sealed = &world.release(node).spec.sealed;
    sealed.first().and_then(|sealed| sealed.key_id.clone())
}

#[test]
fn a_secret_is_sealed_for_each_node_and_in_no_plan_s_text() {
    let mut world = secretive();
    for node in ["n1", "n2"] {
        let key = world.node(node).key.clone().map(|key| key.id().to_string());
        assert_eq!(key_of(&mut world, node), key, "{node}");
        let spec = &world.release(node).spec;
        assert_eq!(spec.sealed.len(), 1);
        assert_eq!(
            Some(&spec.sealed[0].digest),
            spec.template.sealed_env_digest().as_ref()
        );
        let text = serde_json::to_string(&spec).unwrap_or_default();
        assert!(!text.contains("value-1"), "{text}");
    }
    let before = world.observed.clone();
    let plan = world.reconcile();
    assert!(
        plan.steps.is_empty(),
        "what stands is not sealed again: {plan:?}"
    );
    world.observed = before;
    set_secret(&mut world, Some("value-2"));
    let plan = world.reconcile();
    assert!(
        !format!("{plan:?}").contains("value-2"),
        "a plan may be logged"
    );
}

#[test]
fn another_value_of_a_secret_rolls_out_like_a_commit_and_the_same_one_is_the_same_revision() {
    let mut world = secretive();
    let first = world.status().revision.clone();
    set_secret(&mut world, Some("value-2"));
    world.roll_out();
    assert_ne!(world.status().revision, first);
    assert_eq!(world.most_at_work, 1, "within the budget");
    set_secret(&mut world, Some("value-1"));
    world.roll_out();
    assert_eq!(world.status().revision, first);
}

#[test]
fn another_key_of_a_node_has_its_release_sealed_anew_and_nothing_else() {
    let mut world = secretive();
    let before = world.release("n1").spec.clone();
    let key = NodeKey::generate().public().clone();
    world.node("n1").key = Some(key.clone());
    let plan = world.reconcile();
    assert_eq!(plan.steps.len(), 1, "{plan:?}");
    let after = world.release("n1").spec.clone();
    assert_eq!(key_of(&mut world, "n1"), Some(key.id().to_string()));
    let sealed = after.sealed.clone();
    assert_eq!(
        ReleaseSpec { sealed, ..before },
        after,
        "same release, no slot"
    );
    assert!(world.active().is_empty());
    assert!(world.reconcile().steps.is_empty());
}

#[test]
fn a_secret_that_is_deleted_keeps_what_runs_and_a_node_that_never_had_it_waits() {
    let mut world = secretive();
    let first = world.status().revision.clone();
    set_secret(&mut world, None);
    let mut new = node("n3");
    new.key = Some(NodeKey::generate().public().clone());
    world.observed.nodes.push(new);
    // Nor does another key of a node take away what it has.
    let before = key_of(&mut world, "n1");
    world.node("n1").key = Some(NodeKey::generate().public().clone());
    world.roll_out();
    assert_eq!(world.status().revision, first);
    assert_eq!(world.served(), ["a", "a", "-"]);
    assert_eq!(key_of(&mut world, "n1"), before);
    let (stalled, message) = world.stalled();
    assert_eq!(stalled, "True/ReferenceNotFound");
    assert!(message.contains("there is no Secret shop"), "{message}");
    let (_, message) = world.ready();
    assert!(
        message.contains("n3 cannot be given the values of Secrets"),
        "{message}"
    );
    set_secret(&mut world, Some("value-1"));
    world.roll_out();
    assert_eq!(world.served(), ["a", "a", "a"]);
}

#[test]
fn a_node_whose_agent_has_announced_no_key_gets_nothing_that_needs_one() {
    let mut world = secretive();
    world.node("n2").key = None;
    set_secret(&mut world, Some("value-2"));
    let first = world.status().revision.clone();
    world.roll_out();
    assert_ne!(world.status().revision, first);
    let told = |world: &mut World, node: &str| Some(world.release(node).spec.revision.clone());
    assert_eq!(told(&mut world, "n2"), first);
    let second = world.status().revision.clone();
    assert_eq!(told(&mut world, "n1"), second);
    let (_, message) = world.ready();
    assert!(
        message.contains("n2 cannot be given the values of Secrets"),
        "{message}"
    );
}
