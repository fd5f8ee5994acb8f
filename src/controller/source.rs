//! Which commit a source's reference stands for: looked up once for all nodes and all Deployments that
//! use the url with the same credential, outside reconciling.
//!
//! Invariants: one look-up per url and credential at a time, a bounded number in all, each bounded in time and size; an
//! answer wakes the Deployments whose answer changed, and nothing else does. [`schedule`] decides when,
//! [`git`] asks, [`listing`] reads the answer.
//!
//! Deliberately absent: what follows from an answer. A source that cannot be asked changes no node;
//! that is the plan's business.

pub mod git;
pub mod listing;
pub mod range;
pub mod schedule;

use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::git_credential::GitCredential;
use crate::runtime::serve::Heartbeat;
use crate::runtime::supervise::Trigger;

use super::Key;
use super::observed::{Lookup, LookupFailure};
use schedule::{Due, Interest, Schedule};

/// How often the loop turns at least, for its heartbeat.
const BEAT: Duration = Duration::from_secs(10);

/// A repository, and with what it is read: another credential may be told something else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    /// Where it is.
    pub url: String,
    /// Nothing: everybody may read it.
    pub credential: Option<Arc<GitCredential>>,
}

impl Repository {
    fn order(&self) -> (&str, Option<&str>) {
        let digest = self.credential.as_ref().map(|c| c.digest());
        (&self.url, digest)
    }
}

impl Hash for Repository {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.order().hash(state);
    }
}

impl PartialOrd for Repository {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Repository {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.order().cmp(&other.order())
    }
}

/// The sources that Deployments want. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sources {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    schedule: Mutex<Schedule<Key>>,
    changed: Notify,
    epoch: Instant,
    wake: Trigger<Key>,
    metrics: SourceMetrics,
}

/// What the look-ups need to know.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// Look-ups at once.
    pub slots: usize,
    /// Whether `http://` and `git://` are asked.
    pub insecure_schemes: bool,
    /// An empty folder that is git's home.
    pub home: PathBuf,
    /// A folder of this process's own for the files of credentials, in memory where the machine has such.
    pub credentials: PathBuf,
}

impl Sources {
    /// None yet. `wake` is told of Deployments whose answer has changed.
    pub fn new(wake: Trigger<Key>, metrics: SourceMetrics) -> Self {
        Self {
            shared: Arc::new(Shared {
                schedule: Mutex::new(Schedule::default()),
                changed: Notify::new(),
                epoch: Instant::now(),
                wake,
                metrics,
            }),
        }
    }

    /// Says what a Deployment wants, and returns what is known of it. Never waits.
    pub fn want(&self, key: &Key, interest: Interest) -> Lookup {
        let now = self.shared.epoch.elapsed();
        let (lookup, hastened) = self
            .shared
            .schedule()
            .want(key, interest, now, fastrand::f64());
        if hastened {
            self.shared.changed.notify_one();
        }
        lookup
    }

    /// The Deployment is gone, or wants nothing looked up.
    pub fn forget(&self, key: &Key) {
        self.shared.schedule().forget(key);
    }

    /// Looks up what is due until `shutdown`.
    pub async fn run(
        &self,
        options: SourceOptions,
        heartbeat: Heartbeat,
        shutdown: CancellationToken,
    ) {
        let mut running = JoinSet::new();
        loop {
            heartbeat.beat();
            let now = self.shared.epoch.elapsed();
            let free = options.slots.saturating_sub(running.len());
            let due = self.shared.schedule().start(now, free);
            for due in due {
                running.spawn(self.clone().look(due, options.clone()));
            }
            let next = self.shared.schedule().next_due();
            let sleep = if running.len() < options.slots {
                next.map_or(BEAT, |next| next.saturating_sub(now).min(BEAT))
            } else {
                BEAT
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(_) = running.join_next() => {}
                () = self.shared.changed.notified() => {}
                () = tokio::time::sleep(sleep) => {}
            }
        }
        // Dropping a look-up kills its processes.
        running.shutdown().await;
        heartbeat.retire();
    }

    async fn look(self, due: Due, options: SourceOptions) {
        let start = Instant::now();
        let url = &due.repository.url;
        let answer = git::list(&due.repository, &due.references, &options).await;
        let result = match &answer {
            Ok(_) => "Found",
            Err(LookupFailure { reason, message }) => {
                info!(url, %reason, "{message}");
                reason.as_str()
            }
        };
        self.shared.metrics.count(result, start.elapsed());
        let now = self.shared.epoch.elapsed();
        let changed = self
            .shared
            .schedule()
            .answer(&due.repository, answer, now, fastrand::f64());
        debug!(url, result, changed = changed.len(), "looked up");
        for key in changed {
            self.shared.wake.wake(key);
        }
        self.shared.changed.notify_one();
    }
}

impl Shared {
    fn schedule(&self) -> MutexGuard<'_, Schedule<Key>> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts of look-ups.
#[derive(Clone, Debug)]
pub struct SourceMetrics {
    lookups: Family<LookupLabels, Counter>,
    seconds: Histogram,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LookupLabels {
    result: &'static str,
}

impl SourceMetrics {
    /// Creates the metrics and registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            lookups: Family::default(),
            seconds: Histogram::new([0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]),
        };
        registry.register(
            "kari_source_lookups",
            "Look-ups of git repositories, by result",
            metrics.lookups.clone(),
        );
        registry.register(
            "kari_source_lookup_seconds",
            "How long look-ups of git repositories took",
            metrics.seconds.clone(),
        );
        metrics
    }

    fn count(&self, result: &'static str, took: Duration) {
        self.lookups.get_or_create(&LookupLabels { result }).inc();
        self.seconds.observe(took.as_secs_f64());
    }
}
