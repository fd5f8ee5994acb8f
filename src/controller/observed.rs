//! What a plan is made from: plain data, parsed once, and what follows from it directly.
//!
//! Invariant: nothing here knows a client or a clock. What was measured against this process's own
//! clock (how fresh a node's Lease is, how long a failure has lasted) comes in as a value.

use std::time::Duration;

use super::references::Contents;
use crate::api::names::{Commit, NodeName, ReleaseId, RevisionName};
use crate::api::reasons::{Class, Reason};
use crate::api::release::{Failure, Phase, Template};
use crate::api::{DeploymentSpec, DeploymentStatus, ReleaseSpec, ReleaseStatus, conditions};
use crate::seal::NodePublicKey;

/// All that a decision on one Deployment depends on.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The object itself.
    pub deployment: ObservedDeployment,
    /// Every Node, and every node that only a Release of this Deployment names; by name.
    pub nodes: Vec<ObservedNode>,
    /// The Deployment's history.
    pub revisions: Vec<ObservedRevision>,
    /// What is known of the source.
    pub lookup: Lookup,
    /// What the ConfigMaps and Secrets hold that the spec refers to.
    pub contents: Contents,
    /// What an admission policy says against the spec now, if anything.
    pub denied: Option<String>,
    /// Whether the administrator allows `http://` and `git://`.
    pub insecure_source_schemes: bool,
}

/// A Deployment as it was read.
#[derive(Clone, Debug)]
pub struct ObservedDeployment {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its identity; part of every release id.
    pub uid: String,
    /// What a status that was planned from it must be written with.
    pub resource_version: String,
    /// The generation of its spec.
    pub generation: i64,
    /// What the user wants.
    pub spec: DeploymentSpec,
    /// What this controller, or the one before it, said last.
    pub status: DeploymentStatus,
    /// `kari.dev/requestedAt`.
    pub requested_at: Option<String>,
    /// `kari.dev/retry`.
    pub retry: Option<String>,
}

/// What is known of the commit that a source's reference stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The last answer.
    pub outcome: Outcome,
    /// The newest `kari.dev/requestedAt` that a look-up has answered since this process started.
    pub answered_request: Option<String>,
}

/// The answer of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is known yet.
    Pending,
    /// The reference stands for this commit.
    Found(Commit),
    /// The range stands for the tag of this full name, which is of this commit.
    FoundTag(String, Commit),
    /// The source could not be asked, or does not have the reference.
    Failed(LookupFailure),
}

/// Why a look-up gave no commit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LookupFailure {
    /// One of the reasons of a source.
    pub reason: Reason,
    /// What happened, to what, and what to do.
    pub message: String,
}

/// A node, and what of this Deployment is on it.
#[derive(Clone, Debug)]
pub struct ObservedNode {
    /// The Node object's name.
    pub name: NodeName,
    /// Whether there is a Node object, and what it says.
    pub presence: Presence,
    /// What this controller knows of its agent.
    pub reach: Reach,
    /// What values for it are sealed to, if its agent has said so.
    pub key: Option<NodePublicKey>,
    /// This Deployment's Release on it.
    pub release: Option<ObservedRelease>,
    /// The Release's name is taken by an object that cannot be read or is not this Deployment's.
    pub name_taken: bool,
    /// What has the Release's name cannot be read by this version, so nothing of it is changed.
    pub unreadable: bool,
    /// It has given its slot back for the revision that is wanted now, and is tried last.
    pub gave_back: bool,
}

/// Whether a node has a Node object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// The Node object is gone, and nothing on it will ever report again.
    Gone,
    /// There is one.
    There {
        /// Its labels satisfy the placement.
        matches: bool,
        /// It is marked to come first.
        canary: bool,
        /// It is unschedulable.
        cordoned: bool,
    },
}

/// What is known of a node's agent from its Lease, by this process's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// There is no Lease: no agent was ever here.
    NoAgent,
    /// There is a Lease, and it has not been watched for long enough to tell.
    Unknown,
    /// The Lease was seen to change lately.
    Fresh,
    /// The Lease has not changed for its whole duration.
    Stale,
}

/// A Release of this Deployment as it was read.
#[derive(Clone, Debug)]
pub struct ObservedRelease {
    /// Its name.
    pub name: String,
    /// Its identity; a write or a delete names it.
    pub uid: String,
    /// What a write that was planned from it must name.
    pub resource_version: String,
    /// The generation of its spec.
    pub generation: i64,
    /// It has a deletionTimestamp: never written to, never adopted.
    pub deleting: bool,
    /// It has no controller as owner: an earlier Deployment was deleted with `--cascade=orphan`.
    pub orphaned: bool,
    /// The value of `kari.dev/retry` that had been handled when its release id was decided.
    pub retry: Option<String>,
    /// What was decided for the node.
    pub spec: ReleaseSpec,
    /// What the node says.
    pub status: ReleaseStatus,
    /// How long the node has reported a failure of its surroundings without a break.
    pub held_up_for: Option<Duration>,
}

/// A ControllerRevision of this Deployment as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct ObservedRevision {
    /// Its name.
    pub name: RevisionName,
    /// Its identity.
    pub uid: String,
    /// What a write must name.
    pub resource_version: String,
    /// Its number: the greater, the newer.
    pub number: i64,
    /// What it holds, if this version can read it.
    pub data: Option<RevisionData>,
}

/// What a ControllerRevision holds: all that is needed to roll it out again.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RevisionData {
    /// The commit.
    pub commit: Commit,
    /// The rendered template, as it was when the revision was made.
    pub template: Template,
}

impl ObservedNode {
    /// The node exists and the placement wants the Deployment on it.
    pub fn matches(&self) -> bool {
        matches!(self.presence, Presence::There { matches: true, .. })
    }

    /// The node is unschedulable.
    pub fn cordoned(&self) -> bool {
        matches!(self.presence, Presence::There { cordoned: true, .. })
    }

    /// The node comes first.
    pub fn canary(&self) -> bool {
        matches!(self.presence, Presence::There { canary: true, .. })
    }

    /// The node may be told something new.
    pub fn takes_work(&self) -> bool {
        self.matches() && !self.cordoned() && self.reach == Reach::Fresh && !self.name_taken
    }

    /// Whether the agent counts as reachable. A controller that has not watched for long enough goes by
    /// what the one before it wrote on the Release, so that a restart changes no status.
    pub fn reachable(&self) -> bool {
        match self.reach {
            Reach::Fresh => true,
            Reach::Stale | Reach::NoAgent => false,
            Reach::Unknown => self.release.as_ref().is_some_and(|release| {
                !release
                    .status
                    .conditions
                    .iter()
                    .any(|c| c.type_ == conditions::REACHABLE && c.status == "False")
            }),
        }
    }

    /// Whether the node counts among those that should serve: it matches, is not cordoned and its agent
    /// is there.
    pub fn takes_part(&self) -> bool {
        self.matches() && !self.cordoned() && self.reachable()
    }
}

impl ObservedRelease {
    /// The status speaks of the spec that stands there.
    pub fn current(&self) -> bool {
        self.status.observed_generation == self.generation
    }

    /// The node has committed the release that the spec wants.
    pub fn committed(&self) -> bool {
        self.serves(self.spec.release_id)
    }

    fn serves(&self, id: ReleaseId) -> bool {
        self.status
            .serving
            .as_ref()
            .is_some_and(|serving| serving.release_id == id)
    }

    /// The node has committed a release and does not serve it.
    pub fn degraded(&self) -> bool {
        self.status.serving.is_some()
            && (self.status.phase == Phase::Degraded
                || self.committed() && self.ready() == Some(false))
    }

    /// What the agent's `Ready` says, if it says it.
    fn ready(&self) -> Option<bool> {
        self.ready_condition()
            .and_then(|c| match c.status.as_str() {
                "True" => Some(true),
                "False" => Some(false),
                _ => None,
            })
    }

    /// The agent's `Ready`.
    pub fn ready_condition(
        &self,
    ) -> Option<&k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition> {
        self.status
            .conditions
            .iter()
            .find(|c| c.type_ == conditions::READY)
    }

    /// The node serves `revision`, committed and well.
    pub fn serves_well(&self, revision: &RevisionName) -> bool {
        !self.deleting
            && !self.degraded()
            && self.committed()
            && self.spec.revision == revision.as_str()
    }

    /// What the node says against the release that the spec wants. Nothing from a status that is behind.
    pub fn failure(&self) -> Option<(&Failure, FailureClass)> {
        if !self.current() || self.committed() {
            return None;
        }
        let attempt = self.status.attempt.as_ref()?;
        if attempt.release_id != self.spec.release_id {
            return None;
        }
        let failure = attempt.failure.as_ref()?;
        Some((failure, FailureClass::of(failure)))
    }

    /// The attempt is over and will not be tried again by itself.
    pub fn failed(&self) -> Option<(&Failure, FailureClass)> {
        self.failure().filter(|(_, class)| match class {
            FailureClass::Revision | FailureClass::Invalid => true,
            FailureClass::Passing => false,
        })
    }

    /// The node waits for something that is not the Deployment's fault: a slot of the node, or its
    /// surroundings. Such time does not count against the deadline.
    pub fn held_up(&self) -> bool {
        (self.current() && self.status.phase == Phase::Queued)
            || self
                .failure()
                .is_some_and(|(_, class)| class == FailureClass::Passing)
    }

    /// Nothing is going on at the node, as far as it has reported on the spec that stands there.
    pub fn settled(&self) -> bool {
        self.current() && (self.committed() || self.failed().is_some())
    }
}

/// What a node's failure means for a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureClass {
    /// The revision is at fault.
    Revision,
    /// The object is at fault.
    Invalid,
    /// The node tries again by itself. Also what a class means that this version does not know: it must
    /// not block a revision.
    Passing,
}

impl FailureClass {
    fn of(failure: &Failure) -> Self {
        let named = [Class::Revision, Class::Invalid]
            .into_iter()
            .find(|class| class.to_string() == failure.class);
        match named {
            Some(Class::Revision) => Self::Revision,
            Some(Class::Invalid) => Self::Invalid,
            Some(Class::Environment | Class::Node | Class::Progress) | None => Self::Passing,
        }
    }
}
