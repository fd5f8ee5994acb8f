//! The work queue behind a [`Supervisor`](super::supervise::Supervisor), as
//! plain data: which key runs next, and when.
//!
//! Invariants:
//! - a key runs at most once at a time, and at most `concurrency` keys run;
//! - after every [`Queue::wake`] a run of that key starts, however many wakes
//!   come while it waits (one run answers all of them) or while it runs (one
//!   further run answers all of them);
//! - keys that are ready run in the order in which they became ready;
//! - a failing key waits longer each time, up to a limit. A wake brings its
//!   next run forward, but to no earlier than [`WOKEN_MINIMUM`] after the
//!   failure, and only a success makes the waits short again. So the events
//!   that a failing run causes by its own writes cannot turn into a loop;
//! - a key that neither waits nor runs takes no memory.
//!
//! Time is passed in, as the time since any fixed moment. Jitter is passed in
//! as well. Nothing here runs anything: that is `supervise`.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;
use std::time::Duration;

/// The least time between a failed run and the run that a wake brings: short
/// for a person who has just corrected the object, long enough that a run
/// which wakes itself and fails costs nothing.
pub const WOKEN_MINIMUM: Duration = Duration::from_secs(5);

/// Waits of this length and more are periodic looks, not deadlines, and are
/// spread so that keys which started together do not stay together.
const SPREAD_FROM: Duration = Duration::from_secs(60);

/// How much later at most a periodic look may come: a tenth.
const SPREAD: f64 = 0.1;

/// How long a failing key waits: `initial` after the first failure, twice as
/// long after each further one, never longer than `max`. The wait is shortened
/// by up to half at random, so that keys that failed together spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The wait after the first failure.
    pub initial: Duration,
    /// The longest wait.
    pub max: Duration,
}

impl Backoff {
    /// The wait after `failures` failures in a row, counted from 1. `jitter`
    /// is random in 0..1.
    pub fn delay(&self, failures: u32, jitter: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let full = self.initial.saturating_mul(1 << doublings).min(self.max);
        full.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0))
    }
}

/// When a key that failed is tried again without a wake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// After a wait that grows with each failure in a row.
    Backoff,
    /// After this time.
    After(Duration),
    /// Not before a wake: trying again changes nothing.
    Never,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Well, and nothing is left to do before the next wake.
    Done,
    /// Well, and the key is to be looked at again after this time.
    After(Duration),
    /// Badly.
    Failed(Retry),
}

/// A key that [`Queue::start`] says is to run now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start<Key> {
    /// What is to run.
    pub key: Key,
    /// How long it was ready and waited for its turn.
    pub waited: Duration,
    /// How many runs in a row failed before this one.
    pub failures: u32,
}

#[derive(Debug)]
struct Entry {
    phase: Phase,
    /// Failures in a row.
    failures: u32,
    /// No run starts earlier, whatever wakes the key.
    not_before: Duration,
}

#[derive(Debug)]
enum Phase {
    /// In `line`.
    Ready { since: Duration },
    /// In `timers`, under this due time and sequence number.
    Waiting { due: Duration, sequence: u64 },
    /// Running; `again`: woken meanwhile; `by`: asked to run by this time.
    Running { again: bool, by: Option<Duration> },
}

/// See the module's head.
#[derive(Debug)]
pub struct Queue<Key> {
    concurrency: usize,
    backoff: Backoff,
    entries: HashMap<Key, Entry>,
    /// Keys that are ready, first come, first served.
    line: VecDeque<Key>,
    /// Keys that wait for a time; the sequence number keeps equal times apart.
    timers: BTreeMap<(Duration, u64), Key>,
    sequence: u64,
    running: usize,
}

impl<Key: Clone + Eq + Hash> Queue<Key> {
    /// An empty queue. A `concurrency` of 0 is taken as 1.
    pub fn new(concurrency: usize, backoff: Backoff) -> Self {
        Self {
            concurrency: concurrency.max(1),
            backoff,
            entries: HashMap::new(),
            line: VecDeque::new(),
            timers: BTreeMap::new(),
            sequence: 0,
            running: 0,
        }
    }

    /// Something about `key` changed: a run of it must start from now on.
    pub fn wake(&mut self, key: Key, now: Duration) {
        self.wake_by(key, now, now);
    }

    /// Brings the next run of `key` forward to `due` at the latest. For a key
    /// that is running, the run after this one.
    pub fn wake_by(&mut self, key: Key, due: Duration, now: Duration) {
        let Some(entry) = self.entries.get_mut(&key) else {
            self.enter(key, 0, Duration::ZERO, due, now);
            return;
        };
        match &mut entry.phase {
            Phase::Ready { .. } => {}
            Phase::Running { again, by } => {
                if due <= now {
                    *again = true;
                } else {
                    *by = Some(by.map_or(due, |earlier| earlier.min(due)));
                }
            }
            Phase::Waiting {
                due: planned,
                sequence,
            } => {
                let wanted = due.max(entry.not_before);
                if wanted < *planned {
                    self.timers.remove(&(*planned, *sequence));
                    let (failures, not_before) = (entry.failures, entry.not_before);
                    self.enter(key, failures, not_before, wanted, now);
                }
            }
        }
    }

    /// The next key that is to run now, if one is ready and the limit allows
    /// it. The caller runs it and calls [`Queue::finish`].
    pub fn start(&mut self, now: Duration) -> Option<Start<Key>> {
        self.promote(now);
        if self.running >= self.concurrency {
            return None;
        }
        let key = self.line.pop_front()?;
        let entry = self.entries.get_mut(&key)?;
        let waited = match entry.phase {
            Phase::Ready { since } => now.saturating_sub(since),
            Phase::Waiting { .. } | Phase::Running { .. } => Duration::ZERO,
        };
        entry.phase = Phase::Running {
            again: false,
            by: None,
        };
        self.running += 1;
        Some(Start {
            failures: entry.failures,
            key,
            waited,
        })
    }

    /// A run ended. Returns the time of the next run, if one is planned.
    /// `jitter` is random in 0..1. A key that is not running is left alone.
    pub fn finish(
        &mut self,
        key: &Key,
        outcome: Outcome,
        now: Duration,
        jitter: f64,
    ) -> Option<Duration> {
        let entry = self.entries.get(key)?;
        let Phase::Running { again, by } = entry.phase else {
            return None;
        };
        let failures_before = entry.failures;
        self.entries.remove(key);
        self.running -= 1;

        let (failures, not_before, planned) = match outcome {
            Outcome::Done => (0, Duration::ZERO, None),
            Outcome::After(delay) => (
                0,
                Duration::ZERO,
                Some(now.saturating_add(spread(delay, jitter))),
            ),
            Outcome::Failed(retry) => {
                let failures = failures_before.saturating_add(1);
                let delay = match retry {
                    Retry::Backoff => Some(self.backoff.delay(failures, jitter)),
                    Retry::After(delay) => Some(delay),
                    Retry::Never => None,
                };
                let floor = delay.map_or(WOKEN_MINIMUM, |delay| delay.min(WOKEN_MINIMUM));
                (
                    failures,
                    now.saturating_add(floor),
                    delay.map(|delay| now.saturating_add(delay)),
                )
            }
        };
        let asked = if again { Some(now) } else { by };
        let next = match (planned, asked.map(|time| time.max(not_before))) {
            (Some(planned), Some(asked)) => Some(planned.min(asked)),
            (planned, asked) => planned.or(asked),
        }?
        .max(now);
        self.enter(key.clone(), failures, not_before, next, now);
        Some(next)
    }

    /// When [`Queue::start`] has something to do that time alone brings.
    pub fn next_due(&self) -> Option<Duration> {
        self.timers.first_key_value().map(|((due, _), _)| *due)
    }

    /// How many keys are ready and wait for their turn.
    pub fn ready(&self) -> usize {
        self.line.len()
    }

    /// How many keys are running.
    pub fn running(&self) -> usize {
        self.running
    }

    /// How many keys are known: ready, waiting and running.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no key is known.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Puts a key that is neither in `line` nor in `timers` where it belongs.
    fn enter(
        &mut self,
        key: Key,
        failures: u32,
        not_before: Duration,
        due: Duration,
        now: Duration,
    ) {
        let phase = if due <= now {
            self.line.push_back(key.clone());
            Phase::Ready { since: now }
        } else {
            self.sequence += 1;
            self.timers.insert((due, self.sequence), key.clone());
            Phase::Waiting {
                due,
                sequence: self.sequence,
            }
        };
        self.entries.insert(
            key,
            Entry {
                phase,
                failures,
                not_before,
            },
        );
    }

    /// Moves the keys whose time has come into the line, the longest due first.
    fn promote(&mut self, now: Duration) {
        while let Some(first) = self.timers.first_entry() {
            if first.key().0 > now {
                return;
            }
            let ((due, _), key) = first.remove_entry();
            if let Some(entry) = self.entries.get_mut(&key) {
                entry.phase = Phase::Ready { since: due };
                self.line.push_back(key);
            }
        }
    }
}

/// Deadlines are kept as they are; periodic looks come up to a tenth later.
fn spread(delay: Duration, jitter: f64) -> Duration {
    if delay < SPREAD_FROM {
        return delay;
    }
    delay.saturating_add(delay.mul_f64(SPREAD * jitter.clamp(0.0, 1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const BACKOFF: Backoff = Backoff {
        initial: Duration::from_secs(1),
        max: Duration::from_secs(300),
    };
    /// The largest jitter: waits are exactly what the table says.
    const FULL: f64 = 1.0;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn started(queue: &mut Queue<char>, now: Duration) -> Option<char> {
        queue.start(now).map(|start| start.key)
    }

    #[test]
    fn many_wakes_of_a_waiting_key_are_one_run() {
        let mut queue = Queue::new(4, BACKOFF);
        for _ in 0..3 {
            queue.wake('a', seconds(0));
        }
        assert_eq!(started(&mut queue, seconds(0)), Some('a'));
        assert_eq!(started(&mut queue, seconds(0)), None);
        queue.finish(&'a', Outcome::Done, seconds(1), FULL);
        assert!(
            queue.is_empty(),
            "a key with nothing to do takes memory: {queue:?}"
        );
    }

    #[test]
    fn a_key_that_is_woken_all_the_time_is_not_put_off() {
        let mut queue = Queue::new(1, BACKOFF);
        let (mut runs, mut longest) = (0, Duration::ZERO);
        // A wake each 200 ms for 5 min: a wait that each of them began anew would never end.
        for turn in 0..1500 {
            let now = Duration::from_millis(200 * turn);
            queue.wake('a', now);
            if let Some(start) = queue.start(now) {
                longest = longest.max(start.waited);
                queue.finish(&start.key, Outcome::After(seconds(30)), now, FULL);
                runs += 1;
            }
        }
        assert_eq!((runs, longest), (1500, Duration::ZERO));
    }

    #[test]
    fn many_wakes_of_a_running_key_are_one_further_run() {
        let mut queue = Queue::new(4, BACKOFF);
        queue.wake('a', seconds(0));
        assert_eq!(started(&mut queue, seconds(0)), Some('a'));
        queue.wake('a', seconds(1));
        queue.wake('a', seconds(1));
        assert_eq!(
            started(&mut queue, seconds(1)),
            None,
            "two runs of one key at once"
        );
        queue.finish(&'a', Outcome::Done, seconds(2), FULL);
        assert_eq!(started(&mut queue, seconds(2)), Some('a'));
        queue.finish(&'a', Outcome::Done, seconds(3), FULL);
        assert_eq!(started(&mut queue, seconds(99)), None);
    }

    #[test]
    fn a_busy_key_goes_to_the_end_of_the_line() {
        let mut queue = Queue::new(1, BACKOFF);
        for key in ['a', 'b', 'c'] {
            queue.wake(key, seconds(0));
        }
        let mut order = String::new();
        for now in 0..6 {
            let key = started(&mut queue, seconds(now)).unwrap();
            order.push(key);
            queue.wake(key, seconds(now));
            queue.finish(&key, Outcome::Done, seconds(now), FULL);
        }
        assert_eq!(order, "abcabc");
    }

    #[test]
    fn no_more_run_at_once_than_the_limit_says() {
        let mut queue = Queue::new(2, BACKOFF);
        for key in ['a', 'b', 'c'] {
            queue.wake(key, seconds(0));
        }
        assert_eq!(started(&mut queue, seconds(0)), Some('a'));
        assert_eq!(started(&mut queue, seconds(0)), Some('b'));
        assert_eq!(started(&mut queue, seconds(0)), None);
        queue.finish(&'b', Outcome::Done, seconds(1), FULL);
        assert_eq!(started(&mut queue, seconds(1)), Some('c'));
    }

    #[test]
    fn failures_wait_twice_as_long_each_time_up_to_the_limit_and_a_success_resets_them() {
        let mut queue = Queue::new(1, BACKOFF);
        let mut now = seconds(0);
        queue.wake('a', now);
        for expected in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            assert_eq!(started(&mut queue, now), Some('a'));
            let next = queue
                .finish(&'a', Outcome::Failed(Retry::Backoff), now, FULL)
                .unwrap();
            assert_eq!(next - now, seconds(expected));
            assert_eq!(started(&mut queue, next - Duration::from_millis(1)), None);
            now = next;
        }
        assert_eq!(started(&mut queue, now), Some('a'));
        queue.finish(&'a', Outcome::After(seconds(10)), now, FULL);
        assert_eq!(started(&mut queue, now + seconds(10)), Some('a'));
        let next = queue
            .finish(&'a', Outcome::Failed(Retry::Backoff), now, FULL)
            .unwrap();
        assert_eq!(
            next - now,
            seconds(1),
            "a success does not reset the backoff"
        );
    }

    #[test]
    fn a_wake_shortens_a_backoff_but_neither_below_the_minimum_nor_for_good() {
        let mut queue = Queue::new(1, BACKOFF);
        let mut now = seconds(0);
        queue.wake('a', now);
        for _ in 0..8 {
            started(&mut queue, now).unwrap();
            now = queue
                .finish(&'a', Outcome::Failed(Retry::Backoff), now, FULL)
                .unwrap();
        }
        started(&mut queue, now).unwrap();
        // The run's own write wakes it while it runs, and once more after it failed.
        queue.wake('a', now);
        let next = queue
            .finish(&'a', Outcome::Failed(Retry::Backoff), now, FULL)
            .unwrap();
        queue.wake('a', now);
        assert_eq!(next - now, WOKEN_MINIMUM);
        assert_eq!(started(&mut queue, next - Duration::from_millis(1)), None);
        assert_eq!(started(&mut queue, next), Some('a'));
        let after = queue
            .finish(&'a', Outcome::Failed(Retry::Backoff), next, FULL)
            .unwrap();
        assert_eq!(
            after - next,
            seconds(300),
            "a wake made the backoff short again"
        );
    }

    #[test]
    fn a_failure_that_asks_for_no_retry_waits_for_a_wake() {
        let mut queue = Queue::new(1, BACKOFF);
        queue.wake('a', seconds(0));
        started(&mut queue, seconds(0)).unwrap();
        assert_eq!(
            queue.finish(&'a', Outcome::Failed(Retry::Never), seconds(0), FULL),
            None
        );
        assert!(queue.is_empty());
        queue.wake('a', seconds(7));
        assert_eq!(started(&mut queue, seconds(7)), Some('a'));
    }

    #[test]
    fn a_failure_that_names_its_time_is_tried_again_then() {
        let mut queue = Queue::new(1, BACKOFF);
        queue.wake('a', seconds(0));
        started(&mut queue, seconds(0)).unwrap();
        let next = queue.finish(
            &'a',
            Outcome::Failed(Retry::After(seconds(2))),
            seconds(0),
            FULL,
        );
        assert_eq!(next, Some(seconds(2)));
    }

    #[test]
    fn a_wake_overtakes_a_planned_look_and_a_later_one_does_not_delay_it() {
        let mut queue = Queue::new(1, BACKOFF);
        queue.wake_by('a', seconds(30), seconds(0));
        queue.wake_by('a', seconds(40), seconds(0));
        assert_eq!(queue.next_due(), Some(seconds(30)));
        queue.wake_by('a', seconds(20), seconds(0));
        assert_eq!(queue.next_due(), Some(seconds(20)));
        queue.wake('a', seconds(1));
        assert_eq!(started(&mut queue, seconds(1)), Some('a'));
        assert_eq!(queue.next_due(), None);
    }

    #[test]
    fn a_delayed_wake_of_a_running_key_counts_for_the_run_after_it() {
        let mut queue = Queue::new(1, BACKOFF);
        queue.wake('a', seconds(0));
        started(&mut queue, seconds(0)).unwrap();
        queue.wake_by('a', seconds(9), seconds(0));
        queue.wake_by('a', seconds(5), seconds(0));
        assert_eq!(
            queue.finish(&'a', Outcome::After(seconds(50)), seconds(1), FULL),
            Some(seconds(5))
        );
    }

    #[test]
    fn deadlines_are_kept_and_periodic_looks_are_spread() {
        assert_eq!(spread(seconds(59), FULL), seconds(59));
        assert_eq!(spread(seconds(600), 0.0), seconds(600));
        assert_eq!(spread(seconds(600), FULL), seconds(660));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Wake(u8),
        WakeAfter(u8, u64),
        Pass(u64),
        Start,
        Finish(u8, Outcome),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let key = 0u8..5;
        let outcome = prop_oneof![
            Just(Outcome::Done),
            (0u64..100_000).prop_map(|delay| Outcome::After(Duration::from_millis(delay))),
            Just(Outcome::Failed(Retry::Backoff)),
            (0u64..20_000)
                .prop_map(|delay| Outcome::Failed(Retry::After(Duration::from_millis(delay)))),
            Just(Outcome::Failed(Retry::Never)),
        ];
        proptest::collection::vec(
            prop_oneof![
                3 => key.clone().prop_map(Step::Wake),
                1 => (key.clone(), 0u64..20_000).prop_map(|(key, delay)| Step::WakeAfter(key, delay)),
                1 => (0u64..20_000).prop_map(Step::Pass),
                3 => Just(Step::Start),
                3 => (key, outcome).prop_map(|(key, outcome)| Step::Finish(key, outcome)),
            ],
            0..200,
        )
    }

    proptest! {
        #[test]
        fn whatever_happens_no_key_runs_twice_at_once_and_no_wake_is_lost(
            steps in steps(), concurrency in 1usize..4, jitter in 0.0f64..1.0,
        ) {
            let mut queue = Queue::new(concurrency, BACKOFF);
            let mut now = Duration::ZERO;
            let mut running: HashSet<u8> = HashSet::new();
            // Keys that were woken and have not been started since.
            let mut owed: HashSet<u8> = HashSet::new();
            for step in steps {
                match step {
                    Step::Wake(key) => { queue.wake(key, now); owed.insert(key); }
                    Step::WakeAfter(key, delay) => queue.wake_by(key, now + Duration::from_millis(delay), now),
                    Step::Pass(time) => now += Duration::from_millis(time),
                    Step::Start => if let Some(start) = queue.start(now) {
                        prop_assert!(running.insert(start.key), "{} runs twice at once", start.key);
                        prop_assert!(running.len() <= concurrency);
                        owed.remove(&start.key);
                    },
                    Step::Finish(key, outcome) => {
                        let planned = queue.finish(&key, outcome, now, jitter);
                        if running.remove(&key) {
                            if let Some(planned) = planned { prop_assert!(planned >= now); }
                        } else {
                            prop_assert_eq!(planned, None);
                        }
                    }
                }
                prop_assert_eq!(queue.running(), running.len());
            }
            // Let everything end well: each owed key starts, and soon.
            for key in running.drain() {
                queue.finish(&key, Outcome::Done, now, jitter);
            }
            now += WOKEN_MINIMUM;
            let mut runs = 0;
            while let Some(start) = queue.start(now) {
                owed.remove(&start.key);
                queue.finish(&start.key, Outcome::Done, now, jitter);
                runs += 1;
                prop_assert!(runs <= 5, "keys that are done run again");
            }
            prop_assert!(owed.is_empty(), "wakes lost: {:?}", owed);
        }

        #[test]
        fn a_ready_key_is_overtaken_by_none_that_became_ready_later(keys in proptest::collection::vec(0u8..20, 0..60)) {
            let mut queue = Queue::new(1, BACKOFF);
            let mut expected: Vec<u8> = Vec::new();
            for key in keys {
                queue.wake(key, Duration::ZERO);
                if !expected.contains(&key) { expected.push(key); }
            }
            let mut order = Vec::new();
            while let Some(start) = queue.start(Duration::ZERO) {
                order.push(start.key);
                queue.finish(&start.key, Outcome::Done, Duration::ZERO, FULL);
            }
            prop_assert_eq!(order, expected);
        }

        #[test]
        fn a_backoff_stays_between_half_and_whole_of_its_step(failures in 1u32..10_000, jitter in 0.0f64..1.0) {
            let delay = BACKOFF.delay(failures, jitter);
            prop_assert!(delay >= BACKOFF.initial / 2 && delay <= BACKOFF.max);
        }
    }
}
