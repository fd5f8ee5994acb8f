//! What the planner sees: one app on this node, as plain data.
//!
//! [`super::observe`] fills it, [`super::plan`] reads it. Nothing here does I/O,
//! and nothing here is an opinion: what follows from it is planned.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;

use super::host::proxy::{HostName, VirtualHost};
use super::host::records::{
    AppliedRecord, AttemptRecord, BuildKey, KeptRecord, RecordedFailure, StepResult, Wish,
};
use crate::api::names::{AppName, ReleaseId};

/// Everything that is known of one app at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// The app.
    pub app: AppName,
    /// Now, monotonic, since the agent started.
    pub now: Duration,
    /// Now, for people and records.
    pub wall: Timestamp,
    /// What the API wants.
    pub wanted: Wanted,
    /// What is being tried: `attempt.json`.
    pub attempt: Option<AttemptRecord>,
    /// What is committed: `applied.json`.
    pub applied: Option<AppliedRecord>,
    /// What the host shows.
    pub host: HostView,
    /// A step that failed for its surroundings, and when it is tried again.
    pub held_up: Option<HeldUp>,
}

/// What the API wants of this node.
#[derive(Debug, Clone, PartialEq)]
pub enum Wanted {
    /// The API was never listed since the agent started.
    Unknown,
    /// The list is complete and has no such Release. It holds what there is: only a Release that is
    /// seen with a deletionTimestamp removes an app.
    Absent,
    /// A Release.
    Release(Box<Wish>),
    /// A Release that cannot be carried out.
    Invalid {
        /// Its release id.
        release_id: ReleaseId,
        /// Why.
        failure: RecordedFailure,
    },
    /// A Release in deletion.
    Removal {
        /// Whether `state/` stays.
        keep_state: bool,
    },
    /// A Release in deletion whose app stays as it is.
    Orphan,
}

/// A failure of the surroundings.
#[derive(Debug, Clone, PartialEq)]
pub struct HeldUp {
    /// What failed.
    pub failure: RecordedFailure,
    /// When it is tried again, on the clock of [`Observed::now`].
    pub until: Duration,
}

/// What the host shows of an app.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostView {
    /// Its services, by unit name: all that are loaded, have a file or are recorded.
    pub services: BTreeMap<String, ServiceView>,
    /// Its build steps that are loaded, by unit name.
    pub builds: BTreeMap<String, BuildView>,
    /// Its target file.
    pub target: Option<TargetView>,
    /// Whether the target is loaded as active: it was started at a boot.
    pub target_active: bool,
    /// Whether the link that enables the target is there.
    pub enabled: bool,
    /// The sealed trees.
    pub trees: BTreeSet<BuildKey>,
    /// Whether the stage of the attempt's build try is there.
    pub stage: bool,
    /// How the mirror is with the attempt's commit; `None` when it was not asked for it.
    pub source: Option<SourceView>,
    /// Whether the app may start a build.
    pub slot: SlotView,
    /// The virtual host.
    pub virtual_host: VirtualHostView,
    /// The proxy's workers of before the last change of the virtual host.
    pub drain: DrainView,
    /// Hosts of the attempt that another app has on this node, with that app.
    pub conflicts: Vec<(HostName, AppName)>,
    /// What the disk lacks, for people; nothing when it has its reserve.
    pub disk_pressure: Option<String>,
    /// Whether the app has a folder with more in it than state that was kept.
    pub has_files: bool,
    /// The state that a removal kept.
    pub kept_state: Option<KeptRecord>,
}

/// A service.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceView {
    /// Its unit file.
    pub file: FileView,
    /// What systemd does with it.
    pub activity: Activity,
    /// Whether systemd has read another text than the file has.
    pub stale: bool,
    /// Whether it does what it should.
    pub health: Health,
}

/// A file that is written once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileView {
    /// It is not there.
    Missing,
    /// It is as it was written.
    Intact,
    /// Somebody changed it.
    Altered,
}

/// What systemd does with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// Nothing.
    Inactive,
    /// It starts, or waits to be started again.
    Activating,
    /// It runs.
    Active,
    /// It stops.
    Deactivating,
    /// It has given up.
    Failed,
}

/// Whether a service does what it should.
#[derive(Debug, Clone, PartialEq)]
pub enum Health {
    /// Not yet.
    Waiting {
        /// For what, for people.
        what: String,
        /// When to look again, on the clock of [`Observed::now`].
        until: Option<Duration>,
    },
    /// It may have traffic.
    Ready {
        /// Since when without a break.
        since: Duration,
    },
    /// Somebody else listens on its port.
    PortTaken {
        /// Who, for people.
        by: String,
    },
    /// It is at fault.
    Failed(RecordedFailure),
}

/// A build step.
#[derive(Debug, Clone, PartialEq)]
pub enum BuildView {
    /// It runs.
    Running,
    /// It has ended; the result is measured.
    Ended(StepResult),
    /// It was killed by the agent, which says why.
    Killed(RecordedFailure),
    /// It is being stopped.
    Stopping,
}

/// The target's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetView {
    /// The release that it says it is.
    pub release_id: Option<ReleaseId>,
    /// The units that it names.
    pub units: Vec<String>,
}

/// A mirror, with regard to one commit.
#[derive(Debug, Clone, PartialEq)]
pub enum SourceView {
    /// It has the commit.
    Ready,
    /// It waits for a slot.
    Queued {
        /// From 1.
        position: u32,
        /// How many wait.
        of: u32,
    },
    /// It is being fetched.
    Fetching,
    /// It failed and is tried again by itself.
    Failed(RecordedFailure),
}

/// A build slot of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SlotView {
    /// Not asked for.
    #[default]
    Unasked,
    /// The app has it.
    Granted,
    /// The app waits.
    Queued {
        /// From 1.
        position: u32,
        /// How many wait.
        of: u32,
    },
}

/// The app's virtual host.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VirtualHostView {
    /// Whether there is a file.
    pub file: bool,
    /// What was measured to be in force, and since when; `None` when it is not known.
    pub in_force: Option<(VirtualHost, Duration)>,
}

/// Whether requests of before the last change of the virtual host may still be under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DrainView {
    /// Not known: the agent was restarted since.
    #[default]
    Unknown,
    /// They may.
    Going {
        /// When that ends at the latest.
        until: Duration,
    },
    /// None is.
    Over,
}
