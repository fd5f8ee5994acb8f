//! What a Deployment's status says: counts and the three conditions, as kstatus reads them. Pure.
//!
//! Invariants: all three conditions always; `Reconciling` only while a rollout goes on, never for a look
//! at the source; `Stalled` whenever nothing more happens without a person; never both.

use std::fmt::Write as _;

use crate::api::conditions::{READY, RECONCILING, STALLED, Statement};
use crate::api::deployment::{BlockedRevision, NodeCounts};
use crate::api::names::NodeName;
use crate::api::reasons::Reason;
use crate::api::release::Failure;

use super::check::Refusal;
use super::observed::{LookupFailure, Observed, ObservedNode, Outcome, Reach};
use super::rollout::{Rollout, Wanted, budget};

/// Nodes that a message names at most.
const NODES_NAMED: usize = 8;

/// Lines of a log in a message: an error and what leads to it. The Release has 4 KiB.
const LOG_LINES: usize = 4;
/// Bytes of a log in a message: with the rest of the message it fits the 1024 characters of an event.
const LOG_BYTES: usize = 400;

/// What the words are found from.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// All that was read.
    pub observed: &'a Observed,
    /// The spec cannot be carried out.
    pub refusal: Option<&'a Refusal>,
    /// What the spec refers to is not there.
    pub unresolved: Option<&'a LookupFailure>,
    /// The revision that every node should serve, if it is known.
    pub wanted: Option<&'a Wanted>,
    /// The counts that stand beside the conditions.
    pub counts: &'a NodeCounts,
    /// What was decided.
    pub rollout: &'a Rollout,
    /// The wanted revision is blocked.
    pub blocked: Option<&'a BlockedRevision>,
    /// A node on which the object is at fault.
    pub invalid: Option<(&'a ObservedNode, &'a Failure)>,
}

/// Counts the nodes against `revision`.
pub fn count(observed: &Observed, revision: Option<&str>) -> NodeCounts {
    let mut counts = NodeCounts::default();
    for node in &observed.nodes {
        if left_out(node) == Some(Reason::AgentUnreachable) {
            counts.unreachable += 1;
        }
        if !node.takes_part() {
            continue;
        }
        counts.desired += 1;
        let Some((release, revision)) = node.release.as_ref().zip(revision) else {
            continue;
        };
        if release.deleting || release.spec.revision != revision {
            continue;
        }
        counts.updated += 1;
        if release.committed() && !release.degraded() {
            counts.available += 1;
        } else if release.failed().is_some() {
            counts.failed += 1;
        }
    }
    counts.summary = format!("{}/{}", counts.available, counts.desired);
    counts
}

/// Why a node that matches does not take part; nothing for one that never had an agent, or of which a
/// new controller has not heard yet.
fn left_out(node: &ObservedNode) -> Option<Reason> {
    if !node.matches() {
        return None;
    }
    let no_agent = node.reach == Reach::NoAgent && node.release.is_none();
    if no_agent || not_heard_of(node) {
        None
    } else if !node.reachable() {
        Some(Reason::AgentUnreachable)
    } else if node.cordoned() {
        Some(Reason::NodeCordoned)
    } else {
        None
    }
}

fn not_heard_of(node: &ObservedNode) -> bool {
    node.matches() && node.reach == Reach::Unknown && node.release.is_none()
}

impl Facts<'_> {
    /// Every node that takes part serves the wanted revision, and there is at least one.
    pub fn all_serve(&self) -> bool {
        self.wanted.is_some()
            && self.counts.desired > 0
            && self.counts.available == self.counts.desired
    }

    /// A new controller has yet to hear of nodes that are to serve it, too. It does not unsay what the one
    /// before it said of this very spec and revision.
    fn waits_for_word(&self) -> bool {
        let deployment = &self.observed.deployment;
        let said_ready = deployment.status.conditions.iter().any(|c| {
            c.type_ == READY
                && c.status == "True"
                && c.observed_generation == Some(deployment.generation)
        });
        let same = self.wanted.map(|wanted| wanted.revision.as_str())
            == deployment.status.revision.as_deref();
        let mut nodes = self.observed.nodes.iter();
        !(said_ready && same) && nodes.any(|node| not_heard_of(node) && !node.cordoned())
    }

    /// Nodes have yet to commit the wanted revision, and are being brought to it.
    pub fn rolling(&self) -> bool {
        let Some(wanted) = self.wanted else {
            return false;
        };
        !self.observed.deployment.spec.suspend
            && self.participants().any(|node| {
                !node.release.as_ref().is_some_and(|release| {
                    !release.deleting
                        && release.committed()
                        && release.spec.revision == wanted.revision.as_str()
                })
            })
    }

    fn participants(&self) -> impl Iterator<Item = &ObservedNode> {
        self.observed.nodes.iter().filter(|n| n.takes_part())
    }
}

/// The state of the whole, before it is spelled as three conditions.
struct Verdict {
    ready: bool,
    reconciling: bool,
    stalled: bool,
    reason: Reason,
    message: String,
}

/// The three conditions.
pub fn statements(facts: &Facts<'_>) -> Vec<Statement> {
    let Verdict {
        ready,
        reconciling,
        stalled,
        reason,
        message,
    } = verdict(facts);
    let mut stalled = stalled.then(|| (reason, message.clone()));
    // What only a person can mend is Stalled also while all that was found before is served.
    if stalled.is_none()
        && let Some(failure) = lookup_failure(facts)
        && failure.reason.needs_a_person()
    {
        stalled = Some((failure.reason, failure.message.clone()));
    }
    let says = |kind, status: bool, (reason, message): (Reason, String)| Statement {
        kind,
        status: Some(status),
        reason,
        message,
    };
    let reconciling = reconciling && stalled.is_none();
    let silent = (reason, String::new());
    vec![
        says(READY, ready, (reason, message.clone())),
        says(
            RECONCILING,
            reconciling,
            if reconciling {
                (reason, message)
            } else {
                silent.clone()
            },
        ),
        says(STALLED, stalled.is_some(), stalled.unwrap_or(silent)),
    ]
}

fn lookup_failure<'a>(facts: &Facts<'a>) -> Option<&'a LookupFailure> {
    if facts.refusal.is_some() {
        return None;
    }
    let source = match &facts.observed.lookup.outcome {
        Outcome::Failed(failure) => Some(failure),
        Outcome::Pending | Outcome::Found(_) | Outcome::FoundTag(..) => None,
    };
    facts.unresolved.or(source)
}

fn verdict(facts: &Facts<'_>) -> Verdict {
    let stalled = |reason, message| Verdict {
        ready: false,
        reconciling: false,
        stalled: true,
        reason,
        message,
    };
    if let Some(refusal) = facts.refusal {
        return stalled(refusal.reason, refusal.message.clone());
    }
    if facts.counts.desired == 0 {
        return without_nodes(facts);
    }
    let Some(wanted) = facts.wanted else {
        return without_commit(facts);
    };
    let served = served(facts, wanted);
    if facts.observed.deployment.spec.suspend {
        return Verdict {
            ready: facts.all_serve(),
            reconciling: false,
            stalled: false,
            reason: Reason::Suspended,
            message: format!(
                "{served}; spec.suspend is set, so nothing new is started, and nothing is removed from nodes that match no more"
            ),
        };
    }
    if facts.all_serve() && facts.waits_for_word() {
        return Verdict {
            ready: false,
            reconciling: true,
            stalled: false,
            reason: Reason::Progressing,
            message: format!("{served}; {}", unheard_text(facts)),
        };
    }
    if facts.all_serve() {
        let later = lookup_failure(facts)
            .map(|failure| match facts.unresolved {
                Some(_) => format!("; nothing newer is rolled out: {failure}"),
                None => format!("; newer commits are not seen: {failure}"),
            })
            .unwrap_or_default();
        return Verdict {
            ready: true,
            reconciling: false,
            stalled: false,
            reason: Reason::Deployed,
            message: format!("{served}{later}"),
        };
    }
    if let Some(BlockedRevision {
        revision,
        commit: _,
        node,
        reason,
        message,
    }) = facts.blocked
    {
        return stalled(
            reason.parse().unwrap_or(Reason::Unknown),
            format!(
                "{revision} failed on {node} ({reason}): {}{}. No further node is started, and nodes keep what they serve; push a fix, change the spec, or set the annotation kari.dev/retry to a new value",
                message.trim_end_matches('.'),
                end_of_its_log(facts, node)
            ),
        );
    }
    if let Some((node, failure)) = facts.invalid {
        return stalled(
            failure.reason.parse().unwrap_or(Reason::InvalidSpec),
            format!("{}: {}", node.name, failure.message),
        );
    }
    if facts.rollout.deadline_exceeded {
        return stalled(
            Reason::ProgressDeadlineExceeded,
            format!(
                "{served}; no progress for spec.strategy.progressDeadlineSeconds, so no further node is started{}",
                changing(facts)
            ),
        );
    }
    if facts.rolling() {
        return rolling(facts, &served);
    }
    degraded(facts, &served)
}

/// The last lines of the log of what failed on a node, and how to see more of it, while it is there.
fn end_of_its_log(facts: &Facts<'_>, node: &str) -> String {
    let release = facts
        .observed
        .nodes
        .iter()
        .find(|n| n.name.as_str() == node)
        .and_then(|n| n.release.as_ref());
    let logged = release.and_then(|release| {
        let (failure, _) = release.failed()?;
        Some((release, last_lines(failure.log_tail.as_deref()?)))
    });
    match logged {
        Some((release, lines)) => format!(
            "; its log ends: {lines} (more: kubectl get krel -n {} {} -o jsonpath='{{.status.attempt.failure.logTail}}')",
            facts.observed.deployment.namespace, release.name
        ),
        None => String::new(),
    }
}

/// The last [`LOG_LINES`] lines of a text that say something, in one line.
fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    let shown = lines[lines.len().saturating_sub(LOG_LINES)..].join(" | ");
    let cut = shown.len().saturating_sub(LOG_BYTES);
    match (cut..shown.len()).find(|at| shown.is_char_boundary(*at)) {
        Some(at) if cut > 0 => format!("…{}", &shown[at..]),
        Some(_) | None => shown,
    }
}

fn unheard_text(facts: &Facts<'_>) -> String {
    let nodes = &facts.observed.nodes;
    let unheard = nodes.iter().filter(|n| not_heard_of(n)).count();
    let matching = nodes.iter().filter(|n| n.matches()).count();
    format!("waiting to hear from the agents of {unheard} of {matching} nodes")
}

fn without_nodes(facts: &Facts<'_>) -> Verdict {
    let nodes = &facts.observed.nodes;
    if nodes.iter().any(not_heard_of) {
        return Verdict {
            ready: false,
            reconciling: true,
            stalled: false,
            reason: Reason::Progressing,
            message: unheard_text(facts),
        };
    }
    if let Some(reason) = nodes.iter().find_map(left_out) {
        return Verdict {
            ready: false,
            reconciling: false,
            stalled: false,
            reason,
            message: format!("no node that matches can take part{}", left_out_text(facts)),
        };
    }
    let matching = nodes.iter().filter(|n| n.matches()).count();
    Verdict {
        ready: false,
        reconciling: false,
        stalled: true,
        reason: Reason::NoMatchingNodes,
        message: if matching == 0 {
            "no node has the labels of spec.placement; change it or label a node".to_owned()
        } else {
            format!("none of the {matching} nodes that match spec.placement runs a Kari agent")
        },
    }
}

fn without_commit(facts: &Facts<'_>) -> Verdict {
    let (reason, message) = match lookup_failure(facts) {
        Some(failure) => (failure.reason, failure.message.clone()),
        None => (
            Reason::Resolving,
            "the source is being looked up".to_owned(),
        ),
    };
    Verdict {
        ready: false,
        reconciling: !reason.needs_a_person(),
        stalled: reason.needs_a_person(),
        reason,
        message,
    }
}

/// A rollout goes on. It is called by what holds it up, if all that goes on is held up by something.
fn rolling(facts: &Facts<'_>, served: &str) -> Verdict {
    let active: Vec<_> = facts
        .observed
        .nodes
        .iter()
        .filter(|n| facts.rollout.active.contains(&n.name))
        .collect();
    let held_up = active
        .iter()
        .all(|n| n.release.as_ref().is_some_and(|r| r.held_up()));
    // A node that still has its old spec says nothing of the wanted revision.
    let wanted = facts.wanted.map(|wanted| wanted.revision.as_str());
    let failure = active.iter().find_map(|node| {
        let release = node.release.as_ref();
        let release = release.filter(|release| Some(release.spec.revision.as_str()) == wanted)?;
        let (failure, _) = release.failure()?;
        Some((node, failure))
    });
    let (reason, more) = match failure {
        Some((node, failure)) => (
            if held_up {
                failure.reason.parse().unwrap_or(Reason::Progressing)
            } else {
                Reason::Progressing
            },
            format!("; {}: {}: {}", node.name, failure.reason, failure.message),
        ),
        None if active.is_empty() && !facts.rollout.waiting.is_empty() => (
            Reason::WaitingForBudget,
            format!(
                "; {} nodes wait, as spec.strategy.maxUnavailable ({} in effect) are unavailable",
                facts.rollout.waiting.len(),
                budget(facts.observed)
            ),
        ),
        None if held_up && !active.is_empty() => (Reason::Queued, String::new()),
        None => (Reason::Progressing, String::new()),
    };
    Verdict {
        ready: false,
        reconciling: true,
        stalled: false,
        reason,
        message: format!(
            "{served}{}{}{}{more}",
            changing(facts),
            in_the_way(facts),
            without_secrets(facts)
        ),
    }
}

/// Nodes on which what was there before has to be taken away first.
fn in_the_way(facts: &Facts<'_>) -> String {
    let (mut going, mut unreadable) = (Vec::new(), Vec::new());
    for node in facts.participants() {
        if node.unreadable {
            unreadable.push(node.name.to_string());
        } else if node.name_taken || node.release.as_ref().is_some_and(|r| r.deleting) {
            going.push(node.name.to_string());
        }
    }
    let mut text = String::new();
    if !going.is_empty() {
        text += &format!("; on {} an earlier Release has yet to go", listed(&going));
    }
    if !unreadable.is_empty() {
        text += &format!(
            "; this version of Kari cannot read the Release on {}, and changes nothing there: upgrade Kari again, or delete that Release, which takes the app off the node, keeps its state and installs it anew",
            listed(&unreadable)
        );
    }
    text
}

/// Nodes that cannot be given what is secret.
fn without_secrets(facts: &Facts<'_>) -> String {
    let nodes = facts.rollout.without_secrets.iter();
    let names: Vec<_> = nodes.map(NodeName::to_string).collect();
    if names.is_empty() {
        String::new()
    } else {
        format!(
            "; {} cannot be given the values of Secrets: its agent has announced no key, or the values are not known any more",
            listed(&names)
        )
    }
}

/// All nodes have committed the revision, and some do not serve it.
fn degraded(facts: &Facts<'_>, served: &str) -> Verdict {
    let broken = facts.participants().find_map(|node| {
        let release = node.release.as_ref().filter(|r| r.degraded())?;
        Some((node, release.ready_condition()?))
    });
    let (reason, message) = match broken {
        Some((node, condition)) => (
            condition.reason.parse().unwrap_or(Reason::Unknown),
            format!("{served}; {}: {}", node.name, condition.message),
        ),
        None => (Reason::Progressing, served.to_owned()),
    };
    Verdict {
        ready: false,
        reconciling: false,
        stalled: false,
        reason,
        message,
    }
}

fn served(facts: &Facts<'_>, wanted: &Wanted) -> String {
    let earlier = facts
        .participants()
        .filter_map(|node| node.release.as_ref().filter(|release| !release.degraded()))
        .filter_map(|release| release.status.serving.as_ref())
        .filter(|serving| serving.revision != wanted.revision.as_str())
        .count();
    let earlier = match earlier {
        0 => String::new(),
        _ => format!(", {earlier} an earlier revision"),
    };
    format!(
        "{} of {} nodes serve {} (commit {}){earlier}{}",
        facts.counts.available,
        facts.counts.desired,
        wanted.revision,
        wanted.data.commit.short(),
        left_out_text(facts)
    )
}

fn changing(facts: &Facts<'_>) -> String {
    let names: Vec<_> = facts
        .rollout
        .active
        .iter()
        .map(NodeName::to_string)
        .collect();
    if names.is_empty() {
        String::new()
    } else {
        format!("; changing: {}", listed(&names))
    }
}

fn left_out_text(facts: &Facts<'_>) -> String {
    let names: Vec<_> = facts
        .observed
        .nodes
        .iter()
        .filter_map(|node| left_out(node).map(|reason| format!("{} ({reason})", node.name)))
        .collect();
    if names.is_empty() {
        String::new()
    } else {
        format!("; left out: {}", listed(&names))
    }
}

/// Names for a message, with a count of those that do not fit.
fn listed(names: &[String]) -> String {
    let mut text = names[..names.len().min(NODES_NAMED)].join(", ");
    if names.len() > NODES_NAMED {
        // Writing to a String cannot fail.
        let _ = write!(text, " and {} more", names.len() - NODES_NAMED);
    }
    text
}
