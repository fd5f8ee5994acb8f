//! Supervised reconciling: the driver around [`queue`](super::queue).
//!
//! A [`Supervisor`] runs one asynchronous function per key. What each run is
//! given: a time limit, a span that carries the key, metrics; a panic costs
//! that run only. What the key is given: never two runs at once, one run for
//! many wakes, its own backoff. What the process is given: a limit of
//! concurrent runs, a bounded drain at shutdown, a heartbeat.
//!
//! It knows no objects and no caches: a key is all that a run gets, so a run
//! always looks at the newest state there is.

use std::collections::HashMap;
use std::fmt::Display;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::sync::Notify;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error, info_span, warn};

use super::error_chain;
use super::queue::{Outcome, Queue, Start};
use super::serve::Heartbeat;
use super::shutdown::DRAIN;

pub use super::queue::{Backoff, Retry};

/// How often the loop turns at least, for its heartbeat.
const BEAT: Duration = Duration::from_secs(10);

/// What a run that ended well asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: the next change wakes the key.
    Done,
    /// A further look after this time. From a minute on it may come up to a
    /// tenth later.
    After(Duration),
}

/// An error that says how it is to be treated.
pub trait ReconcileError: std::error::Error {
    /// A short constant word for the metrics, in `CamelCase`.
    fn reason(&self) -> &'static str;
    /// When the key is tried again if nothing wakes it.
    fn retry(&self) -> Retry;
}

/// The bounds of a supervisor.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many keys run at once.
    pub concurrency: usize,
    /// How long a run may take; then it is dropped and counts as failed.
    pub timeout: Duration,
    /// How long a failing key waits.
    pub backoff: Backoff,
    /// How long running keys may take to end at shutdown.
    pub drain: Duration,
}

impl Default for Options {
    /// 16 at once, so that a relist cannot become a storm; 60 s, twice the
    /// limit of one API call; 1 s to 5 min between failures.
    fn default() -> Self {
        Self {
            concurrency: 16,
            timeout: Duration::from_secs(60),
            backoff: Backoff {
                initial: Duration::from_secs(1),
                max: Duration::from_secs(300),
            },
            drain: DRAIN,
        }
    }
}

/// Wakes keys of a [`Supervisor`]. Cheap to clone; never blocks; what is woken
/// before the supervisor runs is kept for it.
pub struct Trigger<Key> {
    shared: Arc<Shared<Key>>,
}

impl<Key> Clone for Trigger<Key> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<Key> std::fmt::Debug for Trigger<Key> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Trigger").finish_non_exhaustive()
    }
}

impl<Key: Clone + Eq + Hash> Trigger<Key> {
    /// A run of `key` starts after this call: at once, or when the present run
    /// ends, or for a failing key a few seconds after its failure.
    pub fn wake(&self, key: Key) {
        let now = self.shared.now();
        self.shared.queue().wake(key, now);
        self.shared.changed.notify_one();
    }

    /// Brings the next run of `key` forward to `delay` from now at the latest.
    pub fn wake_after(&self, key: Key, delay: Duration) {
        let now = self.shared.now();
        self.shared
            .queue()
            .wake_by(key, now.saturating_add(delay), now);
        self.shared.changed.notify_one();
    }
}

/// What was left when [`Supervisor::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Runs that did not end in time and were dropped.
    pub abandoned: usize,
}

/// See the module's head.
pub struct Supervisor<Key> {
    name: &'static str,
    options: Options,
    shared: Arc<Shared<Key>>,
    metrics: Arc<ReconcileMetrics>,
    heartbeat: Option<Heartbeat>,
}

impl<Key> std::fmt::Debug for Supervisor<Key> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Supervisor")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

struct Shared<Key> {
    queue: Mutex<Queue<Key>>,
    changed: Notify,
    epoch: Instant,
}

impl<Key> Shared<Key> {
    /// The queue's methods do not panic half-way, so a poisoned lock still
    /// holds a whole queue.
    fn queue(&self) -> MutexGuard<'_, Queue<Key>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }
}

/// How one run ended, before the queue hears of it.
struct Ended {
    outcome: Outcome,
    /// The label of the failure, if it failed.
    reason: Option<&'static str>,
    message: String,
}

impl<Key> Supervisor<Key>
where
    Key: Clone + Eq + Hash + Display + Send + Sync + 'static,
{
    /// A supervisor and the handle that wakes its keys. `name` is its label in
    /// logs and metrics.
    pub fn new(
        name: &'static str,
        options: Options,
        metrics: Arc<ReconcileMetrics>,
    ) -> (Self, Trigger<Key>) {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue::new(options.concurrency, options.backoff)),
            changed: Notify::new(),
            epoch: Instant::now(),
        });
        let trigger = Trigger {
            shared: Arc::clone(&shared),
        };
        (
            Self {
                name,
                options,
                shared,
                metrics,
                heartbeat: None,
            },
            trigger,
        )
    }

    /// Beats at every turn of the loop, at least each 10 s.
    #[must_use]
    pub fn with_heartbeat(mut self, heartbeat: Heartbeat) -> Self {
        self.heartbeat = Some(heartbeat);
        self
    }

    /// Runs keys until `shutdown`, then lets what is running end within
    /// `options.drain` and starts nothing more.
    pub async fn run<Reconcile, Run, Error>(
        self,
        shutdown: CancellationToken,
        reconcile: Reconcile,
    ) -> Drained
    where
        Reconcile: Fn(Key) -> Run + Send + Sync + 'static,
        Run: Future<Output = Result<Action, Error>> + Send + 'static,
        Error: ReconcileError + Send + 'static,
    {
        let reconcile = Arc::new(reconcile);
        let mut runs = Runs {
            tasks: JoinSet::new(),
            keys: HashMap::new(),
        };
        loop {
            let (starts, due) = self.due();
            for start in starts {
                self.spawn(&mut runs, start, Arc::clone(&reconcile));
            }
            if let Some(heartbeat) = &self.heartbeat {
                heartbeat.beat();
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(joined) = runs.tasks.join_next_with_id() => self.ended(&mut runs, joined),
                () = self.shared.changed.notified() => {}
                () = tokio::time::sleep_until(due) => {}
            }
        }
        let drained = self.drain(runs).await;
        if let Some(heartbeat) = self.heartbeat {
            heartbeat.retire();
        }
        drained
    }

    /// What is to start now, and when to look again.
    fn due(&self) -> (Vec<Start<Key>>, Instant) {
        let now = self.shared.now();
        let mut queue = self.shared.queue();
        let starts: Vec<_> = std::iter::from_fn(|| queue.start(now)).collect();
        let labels = SupervisorLabels {
            supervisor: self.name,
        };
        self.metrics
            .ready
            .get_or_create(&labels)
            .set(count(queue.ready()));
        self.metrics
            .running
            .get_or_create(&labels)
            .set(count(queue.running()));
        self.metrics
            .known
            .get_or_create(&labels)
            .set(count(queue.len()));
        let beat = now + BEAT;
        // A queue that is at its limit is woken by the end of a run, not by time.
        let due = queue
            .next_due()
            .filter(|due| *due > now)
            .map_or(beat, |due| due.min(beat));
        (starts, self.shared.epoch + due)
    }

    fn spawn<Reconcile, Run, Error>(
        &self,
        runs: &mut Runs<Key>,
        start: Start<Key>,
        reconcile: Arc<Reconcile>,
    ) where
        Reconcile: Fn(Key) -> Run + Send + Sync + 'static,
        Run: Future<Output = Result<Action, Error>> + Send + 'static,
        Error: ReconcileError + Send + 'static,
    {
        let Start {
            key,
            waited,
            failures,
        } = start;
        let labels = SupervisorLabels {
            supervisor: self.name,
        };
        self.metrics
            .waited
            .get_or_create(&labels)
            .observe(waited.as_secs_f64());
        let duration = self.metrics.duration.get_or_create_owned(&labels);
        let span = info_span!("reconcile", supervisor = self.name, key = %key, failures);
        let limit = self.options.timeout;
        let argument = key.clone();
        let run = async move {
            let started = Instant::now();
            let result = tokio::time::timeout(limit, reconcile(argument)).await;
            duration.observe(started.elapsed().as_secs_f64());
            match result {
                Ok(Ok(Action::Done)) => Ended {
                    outcome: Outcome::Done,
                    reason: None,
                    message: String::new(),
                },
                Ok(Ok(Action::After(delay))) => Ended {
                    outcome: Outcome::After(delay),
                    reason: None,
                    message: String::new(),
                },
                Ok(Err(error)) => Ended {
                    outcome: Outcome::Failed(error.retry()),
                    reason: Some(error.reason()),
                    message: error_chain(&error),
                },
                Err(_) => Ended {
                    outcome: Outcome::Failed(Retry::Backoff),
                    reason: Some("Timeout"),
                    message: format!("did not end within {} s", limit.as_secs()),
                },
            }
        };
        let handle = runs.tasks.spawn(run.instrument(span));
        runs.keys.insert(handle.id(), key);
    }

    fn ended(&self, runs: &mut Runs<Key>, joined: Result<(Id, Ended), JoinError>) {
        let (id, ended) = match joined {
            Ok(ended) => ended,
            Err(join) => {
                let id = join.id();
                let ended = Ended {
                    outcome: Outcome::Failed(Retry::Backoff),
                    reason: Some("Panic"),
                    message: panic_message(join),
                };
                (id, ended)
            }
        };
        let Some(key) = runs.keys.remove(&id) else {
            error!(supervisor = self.name, "a run ended that was never started");
            return;
        };
        let now = self.shared.now();
        let next = self
            .shared
            .queue()
            .finish(&key, ended.outcome, now, fastrand::f64());
        let retry_seconds = next.map(|next| next.saturating_sub(now).as_secs_f64());
        let result = match ended.reason {
            None => "success",
            Some(reason) => {
                let labels = ErrorLabels {
                    supervisor: self.name,
                    reason,
                };
                self.metrics.errors.get_or_create(&labels).inc();
                match reason {
                    "Panic" => {
                        error!(supervisor = self.name, %key, reason, retry_seconds, "reconcile panicked: {}", ended.message);
                    }
                    _ => {
                        warn!(supervisor = self.name, %key, reason, retry_seconds, "reconcile failed: {}", ended.message);
                    }
                }
                "failure"
            }
        };
        debug!(supervisor = self.name, %key, result, retry_seconds, "reconciled");
        self.metrics
            .runs
            .get_or_create(&RunLabels {
                supervisor: self.name,
                result,
            })
            .inc();
    }

    async fn drain(&self, mut runs: Runs<Key>) -> Drained {
        let deadline = Instant::now() + self.options.drain;
        while !runs.tasks.is_empty() {
            if let Some(heartbeat) = &self.heartbeat {
                heartbeat.beat();
            }
            match tokio::time::timeout_at(deadline, runs.tasks.join_next_with_id()).await {
                Ok(Some(joined)) => self.ended(&mut runs, joined),
                Ok(None) => break,
                Err(_) => {
                    let abandoned = runs.tasks.len();
                    let keys: Vec<_> = runs.keys.values().map(ToString::to_string).collect();
                    warn!(
                        supervisor = self.name,
                        ?keys,
                        "runs did not end in time and are dropped"
                    );
                    runs.tasks.shutdown().await;
                    return Drained { abandoned };
                }
            }
        }
        Drained { abandoned: 0 }
    }
}

struct Runs<Key> {
    tasks: JoinSet<Ended>,
    keys: HashMap<Id, Key>,
}

fn panic_message(join: JoinError) -> String {
    match join.try_into_panic() {
        Ok(payload) => match payload.downcast_ref::<&'static str>() {
            Some(text) => (*text).to_owned(),
            None => payload
                .downcast_ref::<String>()
                .cloned()
                .unwrap_or_else(|| "no message".to_owned()),
        },
        Err(join) => join.to_string(),
    }
}

/// A gauge's value; no queue holds more than its type can count.
fn count(length: usize) -> i64 {
    i64::try_from(length).unwrap_or(i64::MAX)
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SupervisorLabels {
    supervisor: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RunLabels {
    supervisor: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ErrorLabels {
    supervisor: &'static str,
    reason: &'static str,
}

/// What all supervisors of a process count, told apart by their names.
#[derive(Clone, Debug)]
pub struct ReconcileMetrics {
    runs: Family<RunLabels, Counter>,
    errors: Family<ErrorLabels, Counter>,
    duration: Family<SupervisorLabels, Histogram, fn() -> Histogram>,
    waited: Family<SupervisorLabels, Histogram, fn() -> Histogram>,
    ready: Family<SupervisorLabels, Gauge>,
    running: Family<SupervisorLabels, Gauge>,
    known: Family<SupervisorLabels, Gauge>,
}

impl ReconcileMetrics {
    /// Creates the metrics and registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            runs: Family::default(),
            errors: Family::default(),
            duration: Family::new_with_constructor(duration_histogram),
            waited: Family::new_with_constructor(duration_histogram),
            ready: Family::default(),
            running: Family::default(),
            known: Family::default(),
        };
        registry.register(
            "kari_reconciles",
            "Runs that ended, by result",
            metrics.runs.clone(),
        );
        registry.register(
            "kari_reconcile_errors",
            "Runs that failed, by reason",
            metrics.errors.clone(),
        );
        registry.register(
            "kari_reconcile_duration_seconds",
            "How long runs took",
            metrics.duration.clone(),
        );
        registry.register(
            "kari_reconcile_wait_seconds",
            "How long keys that were ready waited for their turn",
            metrics.waited.clone(),
        );
        registry.register(
            "kari_reconcile_ready",
            "Keys that are ready and wait for their turn",
            metrics.ready.clone(),
        );
        registry.register(
            "kari_reconcile_running",
            "Keys that are running",
            metrics.running.clone(),
        );
        registry.register(
            "kari_reconcile_keys",
            "Keys that are ready, waiting or running",
            metrics.known.clone(),
        );
        metrics
    }
}

/// From a look at a cache (1 ms) to the time limit of a run (60 s).
fn duration_histogram() -> Histogram {
    Histogram::new([0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::{Semaphore, mpsc};

    #[derive(Debug, thiserror::Error)]
    #[error("no luck")]
    struct NoLuck(Retry);

    impl ReconcileError for NoLuck {
        fn reason(&self) -> &'static str {
            "NoLuck"
        }
        fn retry(&self) -> Retry {
            self.0
        }
    }

    fn supervisor(options: Options) -> (Supervisor<&'static str>, Trigger<&'static str>, Registry) {
        let mut registry = Registry::default();
        let metrics = Arc::new(ReconcileMetrics::new(&mut registry));
        let (supervisor, trigger) = Supervisor::new("test", options, metrics);
        (supervisor, trigger, registry)
    }

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_woken_before_the_start_runs_and_a_planned_look_comes_in_time() {
        let (supervisor, trigger, _registry) = supervisor(Options::default());
        let (sender, mut runs) = mpsc::unbounded_channel();
        trigger.wake("a");
        let start = Instant::now();
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(supervisor.run(shutdown.clone(), move |key| {
            let sender = sender.clone();
            async move {
                sender.send((key, start.elapsed().as_secs())).unwrap();
                Ok::<_, NoLuck>(Action::After(Duration::from_secs(30)))
            }
        }));
        assert_eq!(runs.recv().await, Some(("a", 0)));
        assert_eq!(runs.recv().await, Some(("a", 30)));
        trigger.wake_after("b", Duration::from_secs(7));
        assert_eq!(runs.recv().await, Some(("b", 37)));
        shutdown.cancel();
        assert_eq!(running.await.unwrap(), Drained { abandoned: 0 });
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_and_a_hang_cost_their_own_key_only() {
        let (supervisor, trigger, registry) = supervisor(Options {
            concurrency: 2,
            ..Options::default()
        });
        let (sender, mut runs) = mpsc::unbounded_channel();
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(supervisor.run(shutdown.clone(), move |key| {
            let sender = sender.clone();
            async move {
                match key {
                    "panics" => panic!("this panic is part of the test"),
                    "hangs" => std::future::pending().await,
                    _ => sender.send(key).unwrap(),
                }
                Ok::<_, NoLuck>(Action::After(Duration::from_secs(50)))
            }
        }));
        for key in ["hangs", "panics", "works"] {
            trigger.wake(key);
        }
        for _ in 0..5 {
            assert_eq!(runs.recv().await, Some("works"));
        }
        shutdown.cancel();
        running.await.unwrap();
        let text = text(&registry);
        for expected in [
            r#"kari_reconcile_errors_total{supervisor="test",reason="Panic"}"#,
            r#"kari_reconcile_errors_total{supervisor="test",reason="Timeout"}"#,
            r#"kari_reconciles_total{supervisor="test",result="success"} 5"#,
        ] {
            assert!(text.contains(expected), "no {expected} in {text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_key_that_wakes_itself_is_held_back() {
        let (supervisor, trigger, _registry) = supervisor(Options::default());
        let runs = Arc::new(AtomicUsize::new(0));
        let (counter, waker) = (Arc::clone(&runs), trigger.clone());
        let shutdown = CancellationToken::new();
        trigger.wake("a");
        let running = tokio::spawn(supervisor.run(shutdown.clone(), move |key| {
            counter.fetch_add(1, Ordering::SeqCst);
            waker.wake(key);
            async { Err::<Action, _>(NoLuck(Retry::Backoff)) }
        }));
        tokio::time::sleep(Duration::from_secs(600)).await;
        shutdown.cancel();
        running.await.unwrap();
        let runs = runs.load(Ordering::SeqCst);
        assert!((50..=130).contains(&runs), "{runs} runs in 600 s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_wake_during_a_run_brings_exactly_one_further_run() {
        let (supervisor, trigger, _registry) = supervisor(Options::default());
        let permits = Arc::new(Semaphore::new(0));
        let (sender, mut started) = mpsc::unbounded_channel();
        let shutdown = CancellationToken::new();
        let gate = Arc::clone(&permits);
        let running = tokio::spawn(supervisor.run(shutdown.clone(), move |key| {
            let (gate, sender) = (Arc::clone(&gate), sender.clone());
            async move {
                sender.send(key).unwrap();
                gate.acquire().await.unwrap().forget();
                Ok::<_, NoLuck>(Action::Done)
            }
        }));
        trigger.wake("a");
        started.recv().await.unwrap();
        for _ in 0..5 {
            trigger.wake("a");
        }
        permits.add_permits(9);
        started.recv().await.unwrap();
        tokio::time::sleep(Duration::from_secs(900)).await;
        assert!(started.try_recv().is_err(), "more than one further run");
        shutdown.cancel();
        running.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn shutdown_lets_runs_end_but_not_for_ever() {
        for (takes, abandoned) in [(5, 0), (3600, 1)] {
            let options = Options {
                timeout: Duration::from_secs(7200),
                ..Options::default()
            };
            let (supervisor, trigger, _registry) = supervisor(options);
            let (sender, mut started) = mpsc::unbounded_channel();
            let shutdown = CancellationToken::new();
            trigger.wake("a");
            let running = tokio::spawn(supervisor.run(shutdown.clone(), move |key| {
                let sender = sender.clone();
                async move {
                    sender.send(key).unwrap();
                    tokio::time::sleep(Duration::from_secs(takes)).await;
                    Ok::<_, NoLuck>(Action::Done)
                }
            }));
            started.recv().await.unwrap();
            let start = Instant::now();
            shutdown.cancel();
            trigger.wake("b");
            assert_eq!(running.await.unwrap(), Drained { abandoned });
            assert!(
                start.elapsed() <= DRAIN + Duration::from_secs(1),
                "{:?}",
                start.elapsed()
            );
            assert!(started.try_recv().is_err(), "a run started after shutdown");
        }
    }
}
