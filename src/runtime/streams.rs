//! Guarded watch streams: one per kind, each with its own backoff, none of
//! which can stop another or stop for good.
//!
//! What is guarded against:
//! - an object that cannot be decoded hides itself only: the stream's items are
//!   [`DeserializeGuard`]s and name it;
//! - an error sleeps its own stream only, is logged and counted, and never
//!   reaches the reader;
//! - a stream that fails for [`FAILING`] or says nothing for [`QUIET`] is
//!   dropped and begun anew behind the same store; one whose start the server
//!   answers with 410 is so at once, as kube's watcher would repeat the same
//!   expired version for ever. kube's watcher does not show its bookmarks, so
//!   a healthy quiet stream looks as a stopped one: the remedy, one list each
//!   half hour, costs nothing and also repairs whatever a watch has missed;
//! - a deletion that fell into a gap of the watch is told when the next list
//!   lacks the object;
//! - a new list wakes only what it changed, so no relist becomes a storm.
//!
//! Every item is told *after* the store shows it. The store is empty until the
//! first list is complete ([`Store::wait_until_ready`]), and it fills only
//! while the stream is polled.

use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::hash::Hash;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{self, ObjectRef, Store, store::Writer};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Error as KubeError, Resource};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tracing::{debug, info, warn};

use super::error_chain;
use super::queue::Backoff;
use super::serve::Heartbeat;

/// How long a stream may fail without a single success before it is begun anew.
pub const FAILING: Duration = Duration::from_secs(300);

/// How long a stream may say nothing before it is begun anew.
pub const QUIET: Duration = Duration::from_secs(1800);

/// A stream that did not fail for this long after a failure is well again,
/// even if it said nothing: longer than a wait and a call together.
const RECOVERED: Duration = Duration::from_secs(120);

/// Waits between failures, as client-go has them.
const BACKOFF: Backoff = Backoff {
    initial: Duration::from_millis(800),
    max: Duration::from_secs(30),
};

/// How long a watch runs before the server ends it and the watcher goes on
/// from where it was; a dead connection is noticed 5 s later. Each stream adds
/// up to a fifth, so that they do not end together.
const WATCH_SECONDS: u32 = 150;

/// Objects per page of a list: bounds the memory that a list takes besides the
/// store.
const PAGE: u32 = 250;

/// How often a stream that is polled shows that it is.
const BEAT: Duration = Duration::from_secs(10);

/// A store of the objects that `api` and `config` select, and the stream that
/// keeps it: each item is an object that was created, changed or deleted.
///
/// `name` is the stream's label in logs and metrics. `config`'s page size and
/// timeout are bounded; its selectors are kept. The stream never ends.
pub fn guarded<K>(
    api: Api<DeserializeGuard<K>>,
    config: watcher::Config,
    name: &'static str,
    metrics: &StreamMetrics,
) -> (
    Store<DeserializeGuard<K>>,
    impl Stream<Item = DeserializeGuard<K>> + Send + use<K>,
)
where
    K: Resource + DeserializeOwned + Clone + Debug + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Debug + Send + Sync,
{
    let config = bounded(config);
    let raw = move || watcher(api.clone(), config.clone()).boxed();
    let (store, writer) = reflector::store();
    let guarded = Guarded {
        name,
        metrics: metrics.clone(),
        epoch: Instant::now(),
        watchdog: Watchdog::default(),
        events: raw(),
        begin: Box::new(raw),
        writer,
        store: store.clone(),
        before: HashMap::new(),
        listed: Vec::new(),
        touched: VecDeque::new(),
    };
    let stream = futures::stream::unfold(guarded, |mut guarded| async move {
        let object = guarded.next().await;
        Some((object, guarded))
    });
    (store, stream.boxed())
}

/// The same stream, beating whenever it is polled and at least each 10 s while
/// its reader waits for it. A reader that hangs elsewhere stops the beat; an
/// API server that is away does not.
pub fn beating<S: Stream + Unpin>(stream: S, heartbeat: Heartbeat) -> impl Stream<Item = S::Item> {
    let mut interval = tokio::time::interval(BEAT);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    Beating {
        stream,
        heartbeat,
        interval,
    }
}

struct Beating<S> {
    stream: S,
    heartbeat: Heartbeat,
    interval: Interval,
}

impl<S: Stream + Unpin> Stream for Beating<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<S::Item>> {
        self.heartbeat.beat();
        // Until pending, so that the next tick wakes this task.
        while self.interval.poll_tick(context).is_ready() {}
        self.stream.poll_next_unpin(context)
    }
}

fn bounded(mut config: watcher::Config) -> watcher::Config {
    let timeout = WATCH_SECONDS + fastrand::u32(0..=WATCH_SECONDS / 5);
    config.timeout = Some(
        config
            .timeout
            .filter(|seconds| *seconds > 0)
            .map_or(timeout, |seconds| seconds.min(timeout)),
    );
    config.page_size = Some(
        config
            .page_size
            .filter(|size| *size > 0)
            .map_or(PAGE, |size| size.min(PAGE)),
    );
    config.bookmarks = true;
    config
}

/// Why a stream is begun anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rebuild {
    /// The server does not know the version any more and said so at the start
    /// of a watch.
    Expired,
    /// Nothing but failures for [`FAILING`].
    Failing,
    /// Not a word for [`QUIET`].
    Quiet,
}

impl Rebuild {
    fn label(self) -> &'static str {
        match self {
            Self::Expired => "Expired",
            Self::Failing => "Failing",
            Self::Quiet => "Quiet",
        }
    }
}

/// Decides how long a stream waits and when it is begun anew. Plain data: time
/// is passed in.
#[derive(Debug, Default)]
pub struct Watchdog {
    /// The last event, or the last time the stream was begun.
    last_event: Duration,
    failures: u32,
    failing_since: Option<Duration>,
    last_failure: Duration,
}

impl Watchdog {
    /// When the stream is begun anew if it says nothing until then.
    pub fn quiet_until(&self) -> Duration {
        self.last_event.max(self.last_failure).saturating_add(QUIET)
    }

    /// The server told something that only a working stream tells.
    pub fn progressed(&mut self, now: Duration) {
        self.last_event = now;
        self.failures = 0;
        self.failing_since = None;
    }

    /// The stream was begun anew.
    pub fn rebuilt(&mut self, now: Duration) {
        self.last_event = now;
        self.failing_since = None;
    }

    /// An error: how long to wait, and whether to begin anew after that.
    /// `expired`: a 410 at the start of a watch. `jitter` is random in 0..1.
    pub fn failed(
        &mut self,
        expired: bool,
        now: Duration,
        jitter: f64,
    ) -> (Duration, Option<Rebuild>) {
        if now.saturating_sub(self.last_failure) >= RECOVERED {
            self.failures = 0;
            self.failing_since = None;
        }
        self.last_failure = now;
        self.failures = self.failures.saturating_add(1);
        let since = *self.failing_since.get_or_insert(now);
        let rebuild = if expired {
            Some(Rebuild::Expired)
        } else if now.saturating_sub(since) >= FAILING {
            Some(Rebuild::Failing)
        } else {
            None
        };
        (BACKOFF.delay(self.failures, jitter), rebuild)
    }
}

type Events<K> = BoxStream<'static, watcher::Result<Event<DeserializeGuard<K>>>>;

struct Guarded<K>
where
    K: Resource + Clone + 'static,
    K::DynamicType: Eq + Hash + Clone,
{
    name: &'static str,
    metrics: StreamMetrics,
    epoch: Instant,
    watchdog: Watchdog,
    events: Events<K>,
    begin: Box<dyn Fn() -> Events<K> + Send>,
    writer: Writer<DeserializeGuard<K>>,
    store: Store<DeserializeGuard<K>>,
    /// During a list: what the store held before it and the list has not shown.
    before: HashMap<ObjectRef<DeserializeGuard<K>>, Arc<DeserializeGuard<K>>>,
    /// During a list: what is new or changed.
    listed: Vec<ObjectRef<DeserializeGuard<K>>>,
    /// What the reader has not been told yet.
    touched: VecDeque<Arc<DeserializeGuard<K>>>,
}

impl<K> Guarded<K>
where
    K: Resource + DeserializeOwned + Clone + Debug + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Debug + Send + Sync,
{
    async fn next(&mut self) -> DeserializeGuard<K> {
        loop {
            if let Some(object) = self.touched.pop_front() {
                return Arc::unwrap_or_clone(object);
            }
            let quiet_until = self.epoch + self.watchdog.quiet_until();
            match tokio::time::timeout_at(quiet_until, self.events.next()).await {
                Ok(Some(Ok(event))) => self.take(event),
                Ok(Some(Err(error))) => self.fail(&error).await,
                Ok(None) | Err(_) => self.rebuild(Rebuild::Quiet),
            }
        }
    }

    fn take(&mut self, event: Event<DeserializeGuard<K>>) {
        let event = event.modify(|object| object.meta_mut().managed_fields = None);
        match &event {
            // Begins before the list was answered: no sign of life.
            Event::Init => {}
            Event::InitApply(_) | Event::InitDone | Event::Apply(_) | Event::Delete(_) => {
                self.watchdog.progressed(self.epoch.elapsed());
            }
        }
        match &event {
            Event::Init => {
                self.before = self
                    .store
                    .state()
                    .into_iter()
                    .map(|object| (reference(&object), object))
                    .collect();
                self.listed.clear();
            }
            Event::InitApply(object) => {
                let key = reference(object);
                let unchanged = self
                    .before
                    .remove(&key)
                    .is_some_and(|earlier| same_version(&earlier, object));
                if !unchanged {
                    self.listed.push(key);
                }
            }
            Event::InitDone | Event::Apply(_) | Event::Delete(_) => {}
        }
        self.writer.apply_watcher_event(&event);
        match event {
            Event::Init | Event::InitApply(_) => return,
            Event::InitDone => {
                let changed = self.listed.drain(..).filter_map(|key| self.store.get(&key));
                self.touched.extend(changed);
                self.touched
                    .extend(self.before.drain().map(|(_, gone)| gone));
            }
            Event::Apply(object) | Event::Delete(object) => {
                self.touched.push_back(Arc::new(object))
            }
        }
        self.metrics
            .touched
            .get_or_create(&self.labels())
            .inc_by(self.touched.len() as u64);
        self.measure();
    }

    fn measure(&self) {
        let (mut valid, mut invalid) = (0, 0);
        for object in self.store.state() {
            match &object.0 {
                Ok(_) => valid += 1,
                Err(_) => invalid += 1,
            }
        }
        self.metrics
            .objects
            .get_or_create(&self.labels())
            .set(valid);
        self.metrics
            .invalid
            .get_or_create(&self.labels())
            .set(invalid);
    }

    async fn fail(&mut self, error: &watcher::Error) {
        let (kind, expired) = match error {
            watcher::Error::InitialListFailed(_) => ("List", false),
            watcher::Error::WatchStartFailed(KubeError::Api(status)) => {
                ("WatchStart", status.code == 410)
            }
            watcher::Error::WatchStartFailed(_) => ("WatchStart", false),
            // Inside the stream, where kube's watcher lists again by itself.
            watcher::Error::WatchError(_) => ("WatchEvent", false),
            watcher::Error::WatchFailed(_) => ("Watch", false),
            watcher::Error::NoResourceVersion => ("NoResourceVersion", false),
        };
        self.metrics
            .errors
            .get_or_create(&ErrorLabels {
                stream: self.name,
                kind,
            })
            .inc();
        let (pause, rebuild) = self
            .watchdog
            .failed(expired, self.epoch.elapsed(), fastrand::f64());
        warn!(
            stream = self.name,
            kind,
            failures = self.watchdog.failures,
            retry_seconds = pause.as_secs_f64(),
            "{}",
            error_chain(error)
        );
        tokio::time::sleep(pause).await;
        if let Some(reason) = rebuild {
            self.rebuild(reason);
        }
    }

    fn rebuild(&mut self, reason: Rebuild) {
        match reason {
            Rebuild::Quiet => debug!(
                stream = self.name,
                "no event for {} s: listing anew",
                QUIET.as_secs()
            ),
            Rebuild::Expired | Rebuild::Failing => {
                info!(stream = self.name, ?reason, "beginning the watch anew")
            }
        }
        self.metrics
            .rebuilds
            .get_or_create(&RebuildLabels {
                stream: self.name,
                reason: reason.label(),
            })
            .inc();
        self.events = (self.begin)();
        self.watchdog.rebuilt(self.epoch.elapsed());
    }

    fn labels(&self) -> StreamLabels {
        StreamLabels { stream: self.name }
    }
}

fn reference<K>(object: &DeserializeGuard<K>) -> ObjectRef<DeserializeGuard<K>>
where
    K: Resource + Clone + 'static,
    K::DynamicType: Default + Clone,
{
    ObjectRef::from_obj(object)
}

fn same_version<K: Resource>(earlier: &DeserializeGuard<K>, later: &DeserializeGuard<K>) -> bool {
    let (earlier, later) = (earlier.meta(), later.meta());
    earlier.uid == later.uid
        && earlier.resource_version.is_some()
        && earlier.resource_version == later.resource_version
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StreamLabels {
    stream: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ErrorLabels {
    stream: &'static str,
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RebuildLabels {
    stream: &'static str,
    reason: &'static str,
}

/// What all streams of a process count, told apart by their names.
#[derive(Clone, Debug)]
pub struct StreamMetrics {
    touched: Family<StreamLabels, Counter>,
    objects: Family<StreamLabels, Gauge>,
    invalid: Family<StreamLabels, Gauge>,
    errors: Family<ErrorLabels, Counter>,
    rebuilds: Family<RebuildLabels, Counter>,
}

impl StreamMetrics {
    /// Creates the metrics and registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            touched: Family::default(),
            objects: Family::default(),
            invalid: Family::default(),
            errors: Family::default(),
            rebuilds: Family::default(),
        };
        registry.register(
            "kari_watch_objects_touched",
            "Objects created, changed or deleted",
            metrics.touched.clone(),
        );
        registry.register(
            "kari_watch_objects",
            "Objects that are known",
            metrics.objects.clone(),
        );
        registry.register(
            "kari_watch_invalid_objects",
            "Objects that are known and cannot be decoded",
            metrics.invalid.clone(),
        );
        registry.register(
            "kari_watch_errors",
            "Failed lists and watches",
            metrics.errors.clone(),
        );
        registry.register(
            "kari_watch_rebuilds",
            "Streams that were begun anew, by reason",
            metrics.rebuilds.clone(),
        );
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    const FULL: f64 = 1.0;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn an_expired_start_is_begun_anew_at_once() {
        let mut watchdog = Watchdog::default();
        assert_eq!(
            watchdog.failed(true, seconds(10), FULL),
            (Duration::from_millis(800), Some(Rebuild::Expired))
        );
    }

    #[test]
    fn failures_without_a_success_wait_longer_and_lead_to_a_new_beginning() {
        let mut watchdog = Watchdog::default();
        let mut now = seconds(1000);
        let mut waits = Vec::new();
        let rebuilt_after = loop {
            let (pause, rebuild) = watchdog.failed(false, now, FULL);
            waits.push(pause.as_millis());
            if rebuild.is_some() {
                assert_eq!(rebuild, Some(Rebuild::Failing));
                break now - seconds(1000);
            }
            now += pause;
        };
        assert_eq!(waits[..7], [800, 1600, 3200, 6400, 12800, 25600, 30000]);
        assert!(
            rebuilt_after >= FAILING && rebuilt_after < FAILING + BACKOFF.max,
            "{rebuilt_after:?}"
        );
        // The new beginning fails as well: the waits stay long, another follows.
        watchdog.rebuilt(now);
        assert_eq!(watchdog.failed(false, now, FULL), (BACKOFF.max, None));
    }

    #[test]
    fn an_event_or_a_long_time_without_failure_is_recovery() {
        let mut watchdog = Watchdog::default();
        for second in 0..5 {
            watchdog.failed(false, seconds(second), FULL);
        }
        watchdog.progressed(seconds(5));
        assert_eq!(watchdog.failed(false, seconds(6), FULL).0, BACKOFF.initial);
        watchdog.failed(false, seconds(7), FULL);
        assert_eq!(
            watchdog.failed(false, seconds(7) + RECOVERED, FULL),
            (BACKOFF.initial, None)
        );
    }

    #[test]
    fn an_error_each_time_a_quiet_watch_ends_is_not_failing() {
        let mut watchdog = Watchdog::default();
        for turn in 0..100 {
            let (_, rebuild) = watchdog.failed(false, seconds(turn * 150), FULL);
            assert_eq!(rebuild, None);
        }
    }

    #[test]
    fn the_bounds_of_a_watch_hold_whatever_is_asked_for() {
        for asked in [
            watcher::Config::default(),
            watcher::Config {
                timeout: Some(0),
                page_size: None,
                ..watcher::Config::default()
            },
            watcher::Config {
                timeout: Some(9000),
                page_size: Some(9000),
                bookmarks: false,
                ..watcher::Config::default()
            },
        ] {
            let config = bounded(asked);
            let timeout = config.timeout.unwrap();
            assert!(
                (WATCH_SECONDS..=WATCH_SECONDS * 6 / 5).contains(&timeout),
                "{timeout}"
            );
            assert_eq!(config.page_size, Some(PAGE));
            assert!(config.bookmarks);
        }
        assert_eq!(
            bounded(watcher::Config::default().timeout(30)).timeout,
            Some(30)
        );
    }

    type Object = DeserializeGuard<ConfigMap>;

    fn object(name: &str, version: &str) -> Object {
        serde_json::from_value(json!({
            "metadata": {
                "name": name, "namespace": "default", "uid": format!("uid-{name}"), "resourceVersion": version,
                "managedFields": [{"manager": "kubectl"}],
            },
        }))
        .unwrap()
    }

    fn expired() -> watcher::Error {
        let status = kube::core::Status {
            code: 410,
            ..kube::core::Status::default()
        };
        watcher::Error::WatchStartFailed(KubeError::Api(status.boxed()))
    }

    /// A guarded stream over scripted events: one script for each beginning,
    /// silence after it.
    fn scripted(
        scripts: Vec<Vec<watcher::Result<Event<Object>>>>,
    ) -> (Store<Object>, BoxStream<'static, String>, Registry) {
        let mut registry = Registry::default();
        let metrics = StreamMetrics::new(&mut registry);
        let scripts = std::sync::Mutex::new(VecDeque::from(scripts));
        let raw = move || {
            let script = scripts.lock().unwrap().pop_front().unwrap_or_default();
            futures::stream::iter(script)
                .chain(futures::stream::pending())
                .boxed()
        };
        let (store, writer) = reflector::store();
        let guarded = Guarded {
            name: "test",
            metrics,
            epoch: Instant::now(),
            watchdog: Watchdog::default(),
            events: raw(),
            begin: Box::new(raw),
            writer,
            store: store.clone(),
            before: HashMap::new(),
            listed: Vec::new(),
            touched: VecDeque::new(),
        };
        let stream = futures::stream::unfold(guarded, |mut guarded| async move {
            let object = guarded.next().await;
            assert_eq!(
                object.meta().managed_fields,
                None,
                "managedFields were kept"
            );
            let meta = object.meta();
            let told = format!(
                "{}@{}",
                meta.name.clone().unwrap(),
                meta.resource_version.clone().unwrap()
            );
            Some((told, guarded))
        });
        (store, stream.boxed(), registry)
    }

    async fn told(stream: &mut BoxStream<'static, String>, within: Duration) -> Vec<String> {
        let mut all = Vec::new();
        let deadline = Instant::now() + within;
        while let Ok(Some(item)) = tokio::time::timeout_at(deadline, stream.next()).await {
            all.push(item);
        }
        all.sort();
        all
    }

    fn names(store: &Store<Object>) -> Vec<String> {
        let mut names: Vec<_> = store
            .state()
            .iter()
            .map(|object| object.meta().name.clone().unwrap())
            .collect();
        names.sort();
        names
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_begun_anew_keeps_the_store_and_tells_only_what_changed_in_the_gap() {
        let (store, mut stream, registry) = scripted(vec![
            vec![
                Ok(Event::Init),
                Ok(Event::InitApply(object("a", "1"))),
                Ok(Event::InitApply(object("b", "2"))),
                Ok(Event::InitApply(object("c", "3"))),
                Ok(Event::InitDone),
                Err(expired()),
            ],
            vec![
                Ok(Event::Init),
                Ok(Event::InitApply(object("a", "1"))),
                Ok(Event::InitApply(object("b", "9"))),
                Ok(Event::InitApply(object("d", "8"))),
                Ok(Event::InitDone),
                Ok(Event::Apply(object("a", "10"))),
                Ok(Event::Delete(object("d", "11"))),
            ],
        ]);
        let first = stream.next().await.unwrap();
        assert_eq!(first, "a@1");
        assert_eq!(
            names(&store),
            ["a", "b", "c"],
            "an object was told before the store showed it"
        );
        let rest = told(&mut stream, seconds(60)).await;
        // a is unchanged by the list and changes later; c vanished in the gap.
        assert_eq!(rest, ["a@10", "b@2", "b@9", "c@3", "c@3", "d@11", "d@8"]);
        assert_eq!(names(&store), ["a", "b"]);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(
            text.contains(r#"kari_watch_rebuilds_total{stream="test",reason="Expired"} 1"#),
            "{text}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_beginning_that_breaks_within_its_list_leaves_the_store_as_it_was() {
        let (store, mut stream, _registry) = scripted(vec![
            vec![
                Ok(Event::Init),
                Ok(Event::InitApply(object("a", "1"))),
                Ok(Event::InitDone),
                Err(expired()),
            ],
            vec![
                Ok(Event::Init),
                Ok(Event::InitApply(object("b", "2"))),
                Err(expired()),
            ],
            vec![
                Ok(Event::Init),
                Ok(Event::InitApply(object("c", "3"))),
                Ok(Event::InitDone),
            ],
        ]);
        assert_eq!(stream.next().await.unwrap(), "a@1");
        assert_eq!(told(&mut stream, seconds(60)).await, ["a@1", "c@3"]);
        assert_eq!(names(&store), ["c"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_says_nothing_is_begun_anew() {
        let (_store, mut stream, _registry) = scripted(vec![
            vec![Ok(Event::Init), Ok(Event::InitDone)],
            vec![
                Ok(Event::Init),
                Ok(Event::InitApply(object("a", "1"))),
                Ok(Event::InitDone),
            ],
        ]);
        let start = Instant::now();
        assert_eq!(stream.next().await.unwrap(), "a@1");
        assert_eq!(start.elapsed(), QUIET);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_waits_beats_and_one_that_hangs_elsewhere_does_not() {
        let liveness = super::super::serve::Liveness::default();
        let heartbeat = liveness.register("watch", seconds(30));
        let mut stream = Box::pin(beating(futures::stream::pending::<()>(), heartbeat));
        assert!(
            tokio::time::timeout(seconds(600), stream.next())
                .await
                .is_err()
        );
        assert_eq!(liveness.late(), vec![]);
        tokio::time::sleep(seconds(60)).await;
        assert_eq!(liveness.late().len(), 1);
    }
}
