//! Reloading: one for all that ask meanwhile, without a reset, and known to be in force.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::ProxyError;
use super::configuration::{CLOSING_FILE, RUN_FOLDER, UNIT};
use crate::agent::host::store::{self, StoreError, write_durably};
use crate::agent::host::systemd::{Systemd, SystemdError};

/// From the call of a reload to its end: PID 1 may be deaf for half a second, nginx reads 500 files in 0.1 s.
const RELOAD_LIMIT: Duration = Duration::from_secs(15);

/// How long connections in use are ended in an orderly way before a reload closes the idle ones: one that
/// had no request for as long hardly has one in the very moment.
const CLOSING_TIME: Duration = Duration::from_secs(1);

/// From nginx being told to reload to its new workers alone accepting connections; 0.1 s as a rule.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// Between two looks at the workers.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Workers of nginx that may still hold requests which began before a reload.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldWorkers {
    /// Their process ids, as PID 1 numbers them.
    pub pids: BTreeSet<u32>,
}

impl OldWorkers {
    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.pids.is_empty()
    }
}

/// The reloads of the proxy.
pub(super) struct Reloads {
    systemd: Systemd,
    /// Reloads that were asked for.
    asked: AtomicU64,
    /// One reload at a time; it serves all that asked before it began.
    last: Mutex<LastReload>,
}

/// The last reload, and how many of those that asked it has served.
struct LastReload {
    served: u64,
    outcome: Result<OldWorkers, ProxyError>,
}

impl Reloads {
    pub fn new(systemd: Systemd) -> Self {
        let last = LastReload {
            served: 0,
            outcome: Ok(OldWorkers::default()),
        };
        Self {
            systemd,
            asked: AtomicU64::new(0),
            last: Mutex::new(last),
        }
    }

    /// Has nginx read its files, and waits until only workers that have read them accept connections. One
    /// reload serves all callers that wait when it begins. Returns the workers of before it.
    pub async fn reload(&self) -> Result<OldWorkers, ProxyError> {
        let ticket = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut last = self.last.lock().await;
        if last.served < ticket {
            *last = self.reload_now().await;
        }
        last.outcome.clone()
    }

    async fn reload_now(&self) -> LastReload {
        let closing = Closing::begin();
        sleep(CLOSING_TIME).await;
        // Who asks from here on may have written a file after nginx has read it.
        let served = self.asked.load(Ordering::SeqCst);
        let outcome = match closing {
            Ok(_ended_when_settled) => self.reload_and_settle().await,
            Err(error) => Err(error.into()),
        };
        LastReload { served, outcome }
    }

    async fn reload_and_settle(&self) -> Result<OldWorkers, ProxyError> {
        let before = self.workers().await?;
        let reloaded = self.systemd.reload_unit(UNIT, RELOAD_LIMIT).await;
        let log = Path::new(RUN_FOLDER).join("reload.log");
        let said = store::read(&log).ok().flatten().unwrap_or_default();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        // An old one must not be taken for the next one's.
        store::remove(&log)?;
        match reloaded {
            Ok(()) => {}
            // Without a word of nginx's it was not nginx that refused.
            Err(SystemdError::Job { .. } | SystemdError::Refused { .. }) if !said.is_empty() => {
                return Err(ProxyError::Refused { message: said });
            }
            Err(error) => return Err(error.into()),
        }
        let deadline = Instant::now() + SETTLE_LIMIT;
        loop {
            let now = self.workers().await?;
            if has_settled(&before, &now) {
                return Ok(OldWorkers {
                    pids: before
                        .into_keys()
                        .filter(|pid| now.contains_key(pid))
                        .collect(),
                });
            }
            if Instant::now() > deadline {
                let message = format!(
                    "nginx took the reload but kept its configuration for {} s: see `journalctl -u {UNIT}` on the node",
                    SETTLE_LIMIT.as_secs()
                );
                return Err(ProxyError::Refused { message });
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// The workers that run.
    pub async fn workers(&self) -> Result<BTreeMap<u32, Worker>, ProxyError> {
        let processes = self.processes().await?;
        Ok(processes
            .into_iter()
            .filter_map(|(pid, title)| Some((pid, worker(&title)?)))
            .collect())
    }

    /// The processes of the proxy, with their titles.
    pub async fn processes(&self) -> Result<Vec<(u32, String)>, ProxyError> {
        match self.systemd.unit_processes(UNIT).await {
            Ok(processes) => Ok(processes),
            Err(SystemdError::NoSuchUnit { .. }) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes what an agent that was killed in a reload has left.
    pub fn clear_leftovers(&self) {
        if let Ok(_no_reload) = self.last.try_lock() {
            Closing::end();
        }
    }
}

/// Connections are ended in an orderly way for as long as this lives.
struct Closing;

impl Closing {
    fn begin() -> Result<Self, StoreError> {
        write_durably(Path::new(CLOSING_FILE), b"", 0o644)?;
        Ok(Self)
    }

    fn end() {
        // Left behind, it costs every request a connection until the next reload.
        if let Err(error) = store::remove(Path::new(CLOSING_FILE)) {
            warn!(%error, "the proxy's connections are not kept alive");
        }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        Self::end();
    }
}

/// What a worker of nginx does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Worker {
    /// It accepts connections.
    Serving,
    /// It ends what it has.
    Retiring,
}

/// What a process does, by the title that nginx gives it, which systemd quotes; nothing if it is no worker.
pub(super) fn worker(title: &str) -> Option<Worker> {
    let title = title
        .trim_matches('"')
        .strip_prefix("nginx: worker process")?;
    Some(if title.contains("is shutting down") {
        Worker::Retiring
    } else {
        Worker::Serving
    })
}

/// Whether a reload is in force for every new connection: no worker of before it accepts any, and a new one does.
pub(super) fn has_settled(before: &BTreeMap<u32, Worker>, now: &BTreeMap<u32, Worker>) -> bool {
    let mut serving = now
        .iter()
        .filter(|(_, worker)| **worker == Worker::Serving)
        .map(|(pid, _)| pid)
        .peekable();
    serving.peek().is_some() && serving.all(|pid| !before.contains_key(pid))
}
