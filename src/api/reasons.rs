//! Why something is as it is: one table of reasons and what follows from each.
//!
//! A reason is a condition's reason, an event's reason and a metric's label
//! alike. Its class decides what happens next, in the controller and in the
//! agent; nothing else does.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What follows from a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Class {
    /// The revision is at fault: undone before commit, not tried again by itself, blocks the revision.
    Revision,
    /// The surroundings are at fault: tried again with backoff, never blocks a revision.
    Environment,
    /// The node is at fault: left out, and back by itself.
    Node,
    /// The object is at fault: no retry until the object, the nodes or the source change.
    Invalid,
    /// Nothing is at fault: this is where things are.
    Progress,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident => $class:ident,)*) => {
        /// A reason, as conditions, events and metrics spell it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
            /// What another version of Kari gave as the reason, and this one does not know. Read, and never
            /// given by this version for anything of its own.
            #[serde(other)]
            Unknown,
        }

        impl Reason {
            /// Every reason that this version gives, in the order of the table.
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)*];

            /// The reason's name.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Reason::$name => stringify!($name),)*
                    Reason::Unknown => "Unknown",
                }
            }

            /// What follows from it. From one that is not known: what does least, which is not to try again.
            pub const fn class(self) -> Class {
                match self {
                    $(Reason::$name => Class::$class,)*
                    Reason::Unknown => Class::Revision,
                }
            }
        }
    };
}

reasons! {
    /// The build ended with an error.
    BuildFailed => Revision,
    /// The build did not end within `build.timeoutSeconds`.
    BuildTimedOut => Revision,
    /// A process ended before it was ready, or its program was not found.
    StartFailed => Revision,
    /// A process did not become ready, or stopped being so while baking.
    ProbeFailed => Revision,
    /// A process was restarted three times while baking.
    CrashLooping => Revision,
    /// A process or a build was killed for its memory.
    ExceededMemory => Revision,
    /// systemd refuses the unit.
    BadUnit => Revision,
    /// `source.git.directory` is not a folder of the commit.
    DirectoryNotFound => Revision,

    /// The repository could not be reached or read.
    SourceUnavailable => Environment,
    /// The repository wants other credentials.
    AuthenticationFailed => Environment,
    /// The server's host key is not the known one.
    HostKeyMismatch => Environment,
    /// The reference is not in the repository.
    RefNotFound => Environment,
    /// A ConfigMap, a Secret, or a key of it, that the spec names is not there.
    ReferenceNotFound => Environment,
    /// The environment of a Deployment is larger than it may be.
    ReferenceTooLarge => Environment,
    /// A secret is sealed to a key that the node has not, or has not been sealed: the controller does it anew.
    SealedForOtherKey => Environment,
    /// The disk has no reserve left.
    DiskPressure => Environment,
    /// The proxy is not running, or somebody else holds its port.
    ProxyUnavailable => Environment,
    /// A program that is needed is not on the node's tool path.
    ToolMissing => Environment,
    /// The node's systemd accepts a limit that it cannot enforce.
    LimitsUnenforced => Environment,

    /// The node's agent has not renewed its Lease.
    AgentUnreachable => Node,
    /// The node's agent renews its Lease.
    AgentReachable => Node,
    /// The Node is unschedulable.
    NodeCordoned => Node,
    /// The Node object is gone.
    NodeGone => Node,

    /// The spec cannot be carried out.
    InvalidSpec => Invalid,
    /// Another Deployment serves the host name on this node.
    RouteConflict => Invalid,
    /// The administrator does not allow it.
    PolicyDenied => Invalid,
    /// The commit does not descend from the one that runs, and `source.git.allowRewind` is false.
    RewindRefused => Invalid,
    /// No node matches the placement.
    NoMatchingNodes => Invalid,

    /// The reference is being looked up.
    Resolving => Progress,
    /// Waiting for a slot on the node.
    Queued => Progress,
    /// The commit is being fetched.
    Fetching => Progress,
    /// The build is running.
    Building => Progress,
    /// The processes are starting.
    Starting => Progress,
    /// The traffic is being moved over.
    Switching => Progress,
    /// Healthy under traffic, not yet for long enough.
    Baking => Progress,
    /// The old processes are being stopped.
    Draining => Progress,
    /// All slots of maxUnavailable are taken.
    WaitingForBudget => Progress,
    /// `suspend` is set.
    Suspended => Progress,
    /// The rollout is going on.
    Progressing => Progress,
    /// Every node that should serve the revision does.
    Deployed => Progress,
    /// The app is being taken off the node.
    Removing => Progress,
    /// The rollout made no progress for `strategy.progressDeadlineSeconds`.
    ProgressDeadlineExceeded => Progress,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Reason {
    type Err = UnknownReason;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .iter()
            .copied()
            .find(|r| r.as_str() == text)
            .ok_or_else(|| UnknownReason(text.to_owned()))
    }
}

/// A reason that this version does not know.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a reason that this version knows")]
pub struct UnknownReason(pub String);

impl Reason {
    /// Whether only a person can mend it although it is tried again: such a condition is Stalled, or
    /// `helm --wait` hangs on a typo.
    pub const fn needs_a_person(self) -> bool {
        matches!(
            self,
            Reason::RefNotFound
                | Reason::AuthenticationFailed
                | Reason::HostKeyMismatch
                | Reason::ReferenceNotFound
                | Reason::ReferenceTooLarge
        )
    }
}
