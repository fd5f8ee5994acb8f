//! What the agent remembers of an app between two looks and may forget at any
//! moment: all of it is found again from the disk and the host.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::health::Tracker;
use super::host::mirror::Want;
use super::host::proxy::{OldWorkers, VirtualHost};
use super::host::records::RecordedFailure;
use super::mask::Masks;
use super::view::HeldUp;
use crate::api::ReleaseStatus;
use crate::runtime::supervise::Backoff;

/// Between two tries of what the surroundings let fail (the contract: 5 s to 10 min).
const BACKOFF: Backoff = Backoff {
    initial: Duration::from_secs(10),
    max: Duration::from_secs(600),
};

/// What is remembered of one app.
#[derive(Debug, Default)]
pub struct Memory {
    /// What is wanted, in short: another wish ends every wait.
    pub wish: String,
    /// The virtual host that was measured to be in force, since when, and when it was measured last.
    pub in_force: Option<InForce>,
    /// The proxy's workers that may hold requests of before, and until when they are waited for.
    pub drain: Option<Drain>,
    /// By unit.
    pub trackers: BTreeMap<String, Tracker>,
    /// Units that are being stopped.
    pub stopping: BTreeSet<String>,
    /// A build that the agent killed, and why.
    pub killed: Option<(String, RecordedFailure)>,
    /// What the mirror was asked for.
    pub want: Option<Want>,
    /// What holds the app up.
    pub held_up: Option<HeldUp>,
    /// Failures of the surroundings in a row.
    pub failures: u32,
    /// The status that was written last.
    pub written: Option<Written>,
    /// The status to be written, and whether it tells of an end.
    pub report: Option<(ReleaseStatus, bool)>,
    /// Why the app cannot be looked at, where only another version of the agent, or a person, can mend that.
    pub unread: Option<Unread>,
    /// When what nothing refers to was last looked for.
    pub collected: Option<Duration>,
    /// What is taken out of texts, and what it was made of.
    pub masks: Option<(Vec<String>, Arc<Masks>)>,
    /// What was drift at the last look that had any, and when that was.
    pub drift: Option<(String, Duration)>,
}

/// An app whose records cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unread {
    /// Why, and what to do.
    pub message: String,
    /// The Release that it was said on, by uid and generation.
    pub said: Option<(String, i64)>,
}

/// A status that was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// The uid of the Release that it was written to: one that is made anew under its name knows nothing of it.
    pub uid: String,
    /// What it says.
    pub status: ReleaseStatus,
    /// When.
    pub at: Duration,
}

/// A virtual host that is in force.
#[derive(Debug, Clone)]
pub struct InForce {
    /// What it says.
    pub host: VirtualHost,
    /// Since when.
    pub since: Duration,
    /// When it was measured last.
    pub measured: Duration,
}

/// A drain that goes on.
#[derive(Debug, Clone)]
pub struct Drain {
    /// Those that were there.
    pub workers: OldWorkers,
    /// When it ends at the latest.
    pub until: Duration,
}

impl Memory {
    /// Another wish is as good as a first one: nothing is waited for.
    pub fn take_in_wish(&mut self, wish: String) {
        if self.wish != wish {
            self.wish = wish;
            self.held_up = None;
            self.failures = 0;
        }
    }

    /// Something of the surroundings failed: tried again later, and later each time.
    pub fn hold_up(&mut self, failure: RecordedFailure, now: Duration, jitter: f64) {
        self.failures = self.failures.saturating_add(1);
        self.held_up = Some(HeldUp {
            failure,
            until: now + BACKOFF.delay(self.failures, jitter),
        });
    }

    /// Something that could have failed did not.
    pub fn went_well(&mut self) {
        self.failures = 0;
        self.held_up = None;
    }

    /// Requests of before a change of the virtual host may be under way in `workers`.
    pub fn begin_drain(&mut self, workers: OldWorkers, until: Duration) {
        let drain = self.drain.get_or_insert_with(|| Drain {
            workers: OldWorkers::default(),
            until,
        });
        if !workers.is_empty() {
            drain.workers.pids.extend(workers.pids);
            drain.until = until;
        }
    }
}
