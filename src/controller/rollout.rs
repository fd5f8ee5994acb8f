//! Which node gets what, and when: slots, order, supersede, failure. Pure, total, deterministic.
//!
//! Invariants:
//! - A node is told something new only while it holds a slot; a slot is in the status that is written
//!   *before* the Release. In mid-change it keeps its slot whatever its Lease says.
//! - Slots and nodes that committed a release and do not serve it are together never more than the
//!   budget because of a decision made here. What breaks by itself may exceed it; then nothing is begun.
//! - A Release in deletion, or one that is another's, is never written to.
//!
//! Deliberately absent: time. How long something has lasted is in what was observed.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::api::ReleaseSpec;
use crate::api::names::{NodeName, ReleaseId, RevisionName};
use crate::api::release::{OnDelete, Purpose, Template};

use super::observed::{
    FailureClass, Observed, ObservedNode, ObservedRelease, Presence, Reach, RevisionData,
};
use super::sealing::{Sealing, SecretValue, Unsealed};

/// Slots at most, whatever the spec says: `status.active` names each of them.
pub const MOST_SLOTS: usize = 256;

/// How long a node may be held up by its surroundings before another node that waits gets its slot.
pub const HELD_UP_LIMIT: Duration = Duration::from_secs(600);

/// The revision that every node should serve.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its name.
    pub revision: RevisionName,
    /// Its content, and how nodes change over to it now.
    pub data: RevisionData,
    /// The secrets of its Releases.
    pub secrets: Vec<SecretValue>,
}

impl Wanted {
    /// The secrets of a Release that goes back to `template`: the values of its variables are those that the
    /// node has kept; what is not of a revision is as it is now.
    fn secrets_of(&self, template: &Template) -> Vec<SecretValue> {
        let others = self.secrets.iter().filter(|s| s.purpose != Purpose::Env);
        let env = SecretValue::env(template, None);
        env.into_iter().chain(others.cloned()).collect()
    }
}

/// What a decision is made from besides what was observed.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// All that was read.
    pub observed: &'a Observed,
    /// The revision that every node should serve, if it is known.
    pub wanted: Option<&'a Wanted>,
    /// Nothing may be begun: the revision is blocked, or the spec cannot be carried out on a node.
    pub blocked: bool,
    /// The deadline has passed, unless this decision finds progress.
    pub overdue: bool,
    /// The value of `kari.dev/retry` that counts as handled with this decision.
    pub retry: Option<&'a str>,
}

/// A decision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rollout {
    /// Nodes that hold a slot.
    pub active: BTreeSet<NodeName>,
    /// What to do to Releases, removals first.
    pub steps: Vec<Step>,
    /// Nodes that wait for a slot.
    pub waiting: BTreeSet<NodeName>,
    /// Nodes that get nothing, as no secret can be sealed for them.
    pub without_secrets: BTreeSet<NodeName>,
    /// Nodes that give their slot back with this decision.
    pub giving_back: BTreeSet<NodeName>,
    /// The deadline has passed and nothing moved.
    pub deadline_exceeded: bool,
}

/// One write to a Release.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Deletes the Release that was read.
    Delete {
        /// Its name.
        name: String,
        /// Its identity.
        uid: String,
        /// As it was read.
        resource_version: String,
    },
    /// Changes the Release that was read.
    Update {
        /// Its name.
        name: String,
        /// Its identity.
        uid: String,
        /// As it was read.
        resource_version: String,
        /// What it says from now on.
        spec: Box<ReleaseSpec>,
        /// What is sealed into it besides.
        unsealed: Vec<Unsealed>,
        /// The value of `kari.dev/retry` that it was decided under.
        retry: Option<String>,
    },
    /// Makes the first Release of a node.
    Create {
        /// Its name.
        name: String,
        /// What it says.
        spec: Box<ReleaseSpec>,
        /// What is sealed into it besides.
        unsealed: Vec<Unsealed>,
        /// The value of `kari.dev/retry` that it was decided under.
        retry: Option<String>,
    },
}

/// The slots that a Deployment has: `maxUnavailable` nodes or percent of those that match, rounded down,
/// at least 1 and at most [`MOST_SLOTS`].
pub fn budget(observed: &Observed) -> usize {
    let strategy = observed
        .deployment
        .spec
        .strategy
        .clone()
        .unwrap_or_default();
    let matching = observed
        .nodes
        .iter()
        .filter(|n| n.matches() && (n.reach != Reach::NoAgent || n.release.is_some()))
        .count();
    let slots = match &strategy.max_unavailable {
        IntOrString::Int(number) => usize::try_from(*number).unwrap_or(1),
        IntOrString::String(percent) => percent
            .strip_suffix('%')
            .and_then(|digits| digits.parse::<usize>().ok())
            .map_or(1, |percent| matching.saturating_mul(percent) / 100),
    };
    slots.clamp(1, MOST_SLOTS)
}

/// Decides what every node gets now.
pub fn decide(input: &Input<'_>) -> Rollout {
    let Input {
        observed,
        wanted,
        blocked,
        overdue,
        retry,
    } = *input;
    let suspended = observed.deployment.spec.suspend;
    let before: BTreeSet<NodeName> = observed
        .deployment
        .status
        .active
        .iter()
        .map(NodeName::new)
        .collect();
    let kept: BTreeSet<NodeName> = observed
        .nodes
        .iter()
        .filter(|node| keeps_slot(node, before.contains(&node.name), overdue))
        .map(|node| node.name.clone())
        .collect();
    // A slot that came free is progress: the clock starts anew, and the rollout goes on.
    let deadline_exceeded = overdue && kept == before && !all_held_up(observed, &kept);
    let mut rollout = Rollout {
        active: kept,
        deadline_exceeded,
        ..Rollout::default()
    };

    remove_what_left(observed, suspended, &mut rollout);
    if let Some(wanted) = wanted.filter(|_| !suspended) {
        let assign = Assign {
            observed,
            wanted,
            retry,
        };
        if !blocked {
            supersede(&assign, &mut rollout);
            begin(&assign, &before, &mut rollout);
            give_back(&assign, &mut rollout);
        }
        update_in_place(&assign, &mut rollout);
    }
    update_policy(observed, &mut rollout);
    rollout
}

/// Whether the node holds a slot before anything new is begun.
fn keeps_slot(node: &ObservedNode, held: bool, overdue: bool) -> bool {
    let Some(release) = &node.release else {
        return false;
    };
    if node.presence == Presence::Gone {
        return false;
    }
    if release.deleting || !node.matches() {
        return held;
    }
    if release.settled() || (release.committed() && !held) {
        return false;
    }
    match node.reach {
        // What it does there is not known; it has its slot until it is heard of again or for as long as a
        // rollout may stand still.
        Reach::Stale | Reach::NoAgent => held && !overdue,
        Reach::Fresh | Reach::Unknown => true,
    }
}

/// All that goes on waits for something that is not the Deployment's fault: the clock stands still.
pub fn all_held_up(observed: &Observed, active: &BTreeSet<NodeName>) -> bool {
    !active.is_empty()
        && observed
            .nodes
            .iter()
            .filter(|node| active.contains(&node.name))
            .all(|node| node.release.as_ref().is_some_and(|r| r.held_up()))
}

/// Takes the Deployment off every node that is gone or that the placement no longer wants. What the delete
/// is for is written before it: a node cannot tell it from that of the whole Deployment.
fn remove_what_left(observed: &Observed, suspended: bool, rollout: &mut Rollout) {
    let deletion_policy = observed.deployment.spec.deletion_policy;
    for node in &observed.nodes {
        let on_delete = match node.presence {
            Presence::Gone => OnDelete::Orphan,
            Presence::There { matches: true, .. } => continue,
            Presence::There { .. } if suspended => continue,
            Presence::There { .. } => OnDelete::KeepState,
        };
        let Some(release) = node.release.as_ref().filter(|r| !r.deleting) else {
            continue;
        };
        if release.spec.on_delete == on_delete {
            rollout.steps.push(delete(release));
        } else {
            let mut spec = release.spec.clone();
            spec.on_delete = on_delete;
            spec.template.deletion_policy = deletion_policy;
            rollout.steps.push(update_kept(release, spec));
        }
    }
}

/// Says on every Release what its delete means, whatever the node is at and whether or not it may be told
/// something new: the Deployment may be deleted the next moment, and what a node removes is gone. A node
/// has nothing to do for it.
fn update_policy(observed: &Observed, rollout: &mut Rollout) {
    let deletion_policy = observed.deployment.spec.deletion_policy;
    for node in observed.nodes.iter().filter(|node| node.matches()) {
        let Some(release) = node.release.as_ref().filter(|r| !r.deleting) else {
            continue;
        };
        let says = (
            release.spec.on_delete,
            release.spec.template.deletion_policy,
        );
        let touched = rollout.steps.iter().any(|step| step.name() == release.name);
        if !touched && says != (OnDelete::FollowPolicy, deletion_policy) {
            let mut spec = release.spec.clone();
            spec.on_delete = OnDelete::FollowPolicy;
            spec.template.deletion_policy = deletion_policy;
            rollout.steps.push(update_kept(release, spec));
        }
    }
}

/// What the functions below hand to a node.
struct Assign<'a> {
    observed: &'a Observed,
    wanted: &'a Wanted,
    retry: Option<&'a str>,
}

impl Assign<'_> {
    fn has_wanted(&self, release: &ObservedRelease) -> bool {
        release.spec.revision == self.wanted.revision.as_str()
    }

    /// The failure is one that a person has asked to try again since.
    fn retry_due(&self, release: &ObservedRelease) -> bool {
        release.failed().is_some() && release.retry.as_deref() != self.retry
    }

    /// The object was at fault, and has changed since: also by what is not in the revision.
    fn mended(&self, release: &ObservedRelease) -> bool {
        matches!(release.failed(), Some((_, FailureClass::Invalid)))
            && release.spec.template != self.wanted.data.template
    }

    /// What the node's Release carries sealed when it serves the wanted revision.
    fn sealing(&self, node: &ObservedNode) -> Sealing {
        let Wanted {
            revision, secrets, ..
        } = self.wanted;
        let before = node.release.as_ref().map(|release| &release.spec);
        Sealing::plan(secrets, node.key.as_ref(), before, revision.as_str())
    }

    /// The node can be given all that is secret.
    fn can_seal(&self, node: &ObservedNode) -> bool {
        let revision = self.wanted.revision.as_str();
        self.sealing(node)
            .is_complete(node.release.as_ref(), revision)
    }

    fn needs_work(&self, node: &ObservedNode) -> bool {
        match &node.release {
            None => true,
            Some(release) => {
                !release.deleting
                    && (!self.has_wanted(release)
                        || self.retry_due(release)
                        || self.mended(release))
            }
        }
    }

    /// The write that has the node serve the wanted revision.
    fn step(&self, node: &ObservedNode) -> Step {
        let deployment = &self.observed.deployment;
        let Wanted { revision, data, .. } = self.wanted;
        let Sealing {
            sealed,
            unsealed,
            lacks: _,
        } = self.sealing(node);
        let attempt = node.release.as_ref().map_or(1, |r| r.spec.attempt + 1);
        // A node that serves the revision already keeps its release, and has nothing to do.
        let served = node
            .release
            .as_ref()
            .filter(|release| !release.degraded())
            .and_then(|release| release.status.serving.as_ref())
            .filter(|serving| serving.revision == revision.as_str())
            .map(|serving| serving.release_id);
        let release_id = served.unwrap_or_else(|| {
            ReleaseId::derive(&deployment.uid, &node.name, revision, attempt, self.retry)
        });
        let retain = deployment
            .status
            .last_good_revision
            .iter()
            .filter(|good| *good != revision.as_str())
            .cloned()
            .collect();
        let spec = Box::new(ReleaseSpec {
            node_name: node.name.to_string(),
            deployment: deployment.name.clone(),
            release_id,
            attempt,
            revision: revision.to_string(),
            commit: data.commit.to_string(),
            template: data.template.clone(),
            retain,
            sealed,
            on_delete: OnDelete::FollowPolicy,
        });
        let retry = self.retry.map(str::to_owned);
        match &node.release {
            Some(release) => update(release, spec, unsealed, retry),
            None => Step::Create {
                name: crate::api::names::release_name(&deployment.name, &node.name),
                spec,
                unsealed,
                retry,
            },
        }
    }
}

/// A newer revision goes at once to every node in mid-change, whatever step it is in.
fn supersede(assign: &Assign<'_>, rollout: &mut Rollout) {
    for node in assign.observed.nodes.iter().filter(|n| n.matches()) {
        let Some(release) = &node.release else {
            continue;
        };
        let mid_change = !release.deleting && !release.committed() && release.failed().is_none();
        if mid_change && !assign.has_wanted(release) {
            rollout.steps.push(assign.step(node));
        }
    }
}

/// Gives free slots to the nodes that wait, in their order.
fn begin(assign: &Assign<'_>, before: &BTreeSet<NodeName>, rollout: &mut Rollout) {
    let observed = assign.observed;
    let slots = budget(observed);
    let mut unavailable: BTreeSet<&NodeName> = observed
        .nodes
        .iter()
        .filter(|n| n.takes_part() && !rollout.active.contains(&n.name))
        .filter(|n| {
            n.release
                .as_ref()
                .is_some_and(|r| !r.deleting && r.degraded())
        })
        .map(|n| &n.name)
        .collect();
    let mut candidates: Vec<&ObservedNode> = observed
        .nodes
        .iter()
        .filter(|n| n.takes_work() && !rollout.active.contains(&n.name) && assign.needs_work(n))
        .collect();
    candidates.sort_by_key(|n| {
        (
            n.gave_back,
            !before.contains(&n.name),
            !unavailable.contains(&n.name),
            !n.canary(),
            &n.name,
        )
    });
    for node in candidates {
        if !assign.can_seal(node) {
            rollout.without_secrets.insert(node.name.clone());
            continue;
        }
        let used = rollout.active.len();
        let is_unavailable = unavailable.contains(&node.name);
        let fits = used < slots && (is_unavailable || used + unavailable.len() < slots);
        if fits && !rollout.deadline_exceeded {
            unavailable.remove(&node.name);
            rollout.active.insert(node.name.clone());
            rollout.steps.push(assign.step(node));
        } else {
            rollout.waiting.insert(node.name.clone());
        }
    }
}

/// Has a node that its surroundings hold up go back to what it serves, where another waits for the slot.
/// The slot comes free when the node has confirmed it.
fn give_back(assign: &Assign<'_>, rollout: &mut Rollout) {
    withdraw(assign, rollout);
    let another_waits = assign
        .observed
        .nodes
        .iter()
        .any(|n| !n.gave_back && rollout.waiting.contains(&n.name));
    if !another_waits {
        return;
    }
    for node in assign.observed.nodes.iter().filter(|n| n.takes_part()) {
        let Some(release) = node.release.as_ref().filter(|release| {
            !release.deleting
                && !rollout.steps.iter().any(|s| s.name() == release.name)
                && assign.has_wanted(release)
                && release
                    .failure()
                    .is_some_and(|(_, class)| class == FailureClass::Passing)
                && release
                    .held_up_for
                    .is_some_and(|held| held >= HELD_UP_LIMIT)
        }) else {
            continue;
        };
        let step = match &release.status.serving {
            // State of an earlier stay on the node is not lost with what never served.
            None => {
                let mut spec = release.spec.clone();
                spec.on_delete = OnDelete::KeepState;
                Some(update_kept(release, spec))
            }
            Some(serving) => assign
                .observed
                .revisions
                .iter()
                .find(|revision| revision.name.as_str() == serving.revision)
                .and_then(|revision| revision.data.as_ref())
                .map(|data| {
                    let mut template = data.template.clone();
                    template.deletion_policy = release.spec.template.deletion_policy;
                    let secrets = assign.wanted.secrets_of(&template);
                    let (key, revision) = (node.key.as_ref(), &serving.revision);
                    let Sealing {
                        sealed,
                        unsealed,
                        lacks: _,
                    } = Sealing::plan(&secrets, key, None, revision);
                    let spec = Box::new(ReleaseSpec {
                        release_id: serving.release_id,
                        attempt: release.spec.attempt + 1,
                        revision: serving.revision.clone(),
                        commit: serving.commit.clone(),
                        template,
                        sealed,
                        ..release.spec.clone()
                    });
                    update(release, spec, unsealed, release.retry.clone())
                }),
        };
        if let Some(step) = step {
            rollout.giving_back.insert(node.name.clone());
            rollout.steps.push(step);
        }
    }
}

/// Deletes the first Release of a node that gives its slot back, when it says that the state stays.
fn withdraw(assign: &Assign<'_>, rollout: &mut Rollout) {
    for node in assign.observed.nodes.iter().filter(|n| n.takes_part()) {
        let release = node.release.as_ref().filter(|release| {
            node.gave_back
                && !release.deleting
                && assign.has_wanted(release)
                && release.spec.on_delete == OnDelete::KeepState
                && release.status.serving.is_none()
        });
        if let Some(release) = release {
            rollout.steps.insert(0, delete(release));
        }
    }
}

/// Tells nodes that have the revision already what changed besides it, and seals anew what was sealed to an
/// earlier key: same release id, no slot. And takes on what an earlier Deployment of the name left behind.
fn update_in_place(assign: &Assign<'_>, rollout: &mut Rollout) {
    for node in &assign.observed.nodes {
        let Some(release) = node.release.as_ref().filter(|r| !r.deleting) else {
            continue;
        };
        let idle = !rollout.active.contains(&node.name);
        let writable = node.takes_work() || (!idle && node.matches());
        let touched = rollout.steps.iter().any(|step| step.name() == release.name);
        if !writable || touched {
            continue;
        }
        let sealing = assign.sealing(node);
        let behind = assign.has_wanted(release)
            && release.failed().is_none()
            && (release.spec.template != assign.wanted.data.template
                || !sealing.stands_in(&release.spec));
        if behind || release.orphaned {
            let mut spec = release.spec.clone();
            let mut unsealed = Vec::new();
            spec.on_delete = OnDelete::FollowPolicy;
            if behind {
                spec.template = assign.wanted.data.template.clone();
                spec.sealed = sealing.sealed;
                unsealed = sealing.unsealed;
            }
            let step = update(release, Box::new(spec), unsealed, release.retry.clone());
            rollout.steps.push(step);
        }
    }
}

impl Step {
    /// The Release that it writes.
    pub fn name(&self) -> &str {
        match self {
            Step::Delete { name, .. } | Step::Update { name, .. } | Step::Create { name, .. } => {
                name
            }
        }
    }
}

fn delete(release: &ObservedRelease) -> Step {
    Step::Delete {
        name: release.name.clone(),
        uid: release.uid.clone(),
        resource_version: release.resource_version.clone(),
    }
}

/// A change of a Release that leaves what is sealed in it as it is.
fn update_kept(release: &ObservedRelease, spec: ReleaseSpec) -> Step {
    update(release, Box::new(spec), Vec::new(), release.retry.clone())
}

fn update(
    release: &ObservedRelease,
    spec: Box<ReleaseSpec>,
    unsealed: Vec<Unsealed>,
    retry: Option<String>,
) -> Step {
    Step::Update {
        name: release.name.clone(),
        uid: release.uid.clone(),
        resource_version: release.resource_version.clone(),
        spec,
        unsealed,
        retry,
    }
}
