//! When the references of which Deployment are read. A plain state machine that is told the time.
//!
//! Invariants: at most one read for a Deployment at a time; an answer counts for the question that it was read for
//! and for no other; what is not wanted any more is forgotten.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use crate::api::DeploymentSpec;
use crate::runtime::supervise::Backoff;

use super::Contents;

/// Between reads that do not give all that is wanted: 5 s, doubled up to 10 minutes, never longer than the interval.
const BACKOFF: Backoff = Backoff {
    initial: Duration::from_secs(5),
    max: Duration::from_secs(600),
};

/// How much sooner or later than its interval a read comes at most.
const JITTER: f64 = 0.1;

/// What a Deployment wants read, and why: an answer to another question says nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// The Deployment's identity.
    pub uid: String,
    /// Its spec, which has the references and the interval.
    pub spec: DeploymentSpec,
    /// `kari.dev/requestedAt`.
    pub request: Option<String>,
}

impl Question {
    fn interval(&self) -> Duration {
        let git = self.spec.source.git.as_ref();
        git.map_or(BACKOFF.max, |git| {
            Duration::from_secs(u64::from(git.interval_seconds))
        })
    }
}

/// See the module's head. `Key` names a Deployment.
#[derive(Debug)]
pub struct Schedule<Key> {
    entries: HashMap<Key, Entry>,
}

impl<Key> Default for Schedule<Key> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
        }
    }
}

#[derive(Debug)]
struct Entry {
    question: Question,
    /// What was read for the question.
    contents: Option<Contents>,
    due: Duration,
    running: bool,
    /// Reads in a row that did not give all that is wanted.
    failures: u32,
}

impl<Key: Clone + Eq + Hash + Ord> Schedule<Key> {
    /// Registers what `key` wants, and returns what was read for it; and whether a read was hastened.
    pub fn want(
        &mut self,
        key: &Key,
        question: Question,
        now: Duration,
    ) -> (Option<Contents>, bool) {
        let entry = self.entries.entry(key.clone());
        let mut hastened = false;
        let mut new = |question| {
            hastened = true;
            Entry {
                question,
                contents: None,
                due: now,
                running: false,
                failures: 0,
            }
        };
        let entry = match entry {
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(new(question)),
            std::collections::hash_map::Entry::Occupied(entry) => {
                let entry = entry.into_mut();
                if entry.question != question {
                    let running = entry.running;
                    *entry = Entry {
                        running,
                        ..new(question)
                    };
                }
                entry
            }
        };
        (entry.contents.clone(), hastened)
    }

    /// `key` wants nothing any more.
    pub fn forget(&mut self, key: &Key) {
        self.entries.remove(key);
    }

    /// Begins at most `free` of the reads that are due, the longest due first.
    pub fn start(&mut self, now: Duration, free: usize) -> Vec<(Key, Question)> {
        let mut due: Vec<(Duration, Key)> = self
            .entries
            .iter()
            .filter(|(_, entry)| !entry.running && entry.due <= now)
            .map(|(key, entry)| (entry.due, key.clone()))
            .collect();
        due.sort();
        due.truncate(free);
        due.into_iter()
            .filter_map(|(_, key)| {
                let entry = self.entries.get_mut(&key)?;
                entry.running = true;
                Some((key, entry.question.clone()))
            })
            .collect()
    }

    /// Takes what was read, nothing if a read failed; `complete` if it is all that is wanted. Returns whether the
    /// Deployment has to hear of it. `jitter` is random in 0..1.
    pub fn answer(
        &mut self,
        key: &Key,
        question: Question,
        contents: Option<Contents>,
        complete: bool,
        now: Duration,
        jitter: f64,
    ) -> bool {
        let Some(entry) = self.entries.get_mut(key) else {
            return false;
        };
        entry.running = false;
        if entry.question != question {
            // It is due already.
            return false;
        }
        let interval = entry.question.interval();
        let pause = if complete {
            entry.failures = 0;
            interval.mul_f64(1.0 + JITTER * (2.0 * jitter - 1.0))
        } else {
            entry.failures += 1;
            BACKOFF.delay(entry.failures, jitter).min(interval)
        };
        entry.due = now + pause;
        let news = contents.is_some() && contents != entry.contents;
        if news {
            entry.contents = contents;
        }
        news
    }

    /// When the next read is due that is not under way.
    pub fn next_due(&self) -> Option<Duration> {
        self.entries
            .values()
            .filter(|entry| !entry.running)
            .map(|entry| entry.due)
            .min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::references::{Content, Object};
    use crate::controller::testing::deployment_spec;

    const MIDDLE: f64 = 0.5;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn question(request: &str) -> Question {
        Question {
            uid: "u".into(),
            spec: deployment_spec(),
            request: Some(request.into()),
        }
    }

    fn absent() -> Option<Contents> {
        let shop = Object::config_map("shop");
        Some(Contents::of(shop, Content::Absent))
    }

    fn there() -> Option<Contents> {
        let shop = Object::config_map("shop");
        Some(Contents::of(shop, Content::Held([].into())))
    }

    #[test]
    fn an_answer_counts_for_the_question_that_it_was_read_for() {
        let mut schedule = Schedule::<u64>::default();
        assert_eq!(schedule.want(&1, question("a"), seconds(0)), (None, true));
        assert_eq!(schedule.want(&1, question("a"), seconds(0)), (None, false));
        assert_eq!(schedule.start(seconds(0), 8), [(1, question("a"))]);
        assert_eq!(schedule.start(seconds(0), 8), [], "one at a time");
        // It is asked something else while the read is under way.
        assert_eq!(schedule.want(&1, question("b"), seconds(1)), (None, true));
        assert_eq!(schedule.start(seconds(1), 8), [], "one at a time");
        assert!(!schedule.answer(&1, question("a"), there(), true, seconds(2), MIDDLE));
        assert_eq!(schedule.want(&1, question("b"), seconds(2)).0, None);
        assert_eq!(schedule.start(seconds(2), 8), [(1, question("b"))]);
        assert!(schedule.answer(&1, question("b"), there(), true, seconds(3), MIDDLE));
        assert_eq!(
            schedule.want(&1, question("b"), seconds(3)),
            (there(), false)
        );
        assert_eq!(
            schedule.next_due(),
            Some(seconds(63)),
            "the source's interval"
        );
        schedule.start(seconds(63), 8);
        assert!(
            !schedule.answer(&1, question("b"), there(), true, seconds(63), MIDDLE),
            "nothing is new"
        );
        schedule.forget(&1);
        assert_eq!(schedule.next_due(), None);
    }

    #[test]
    fn what_is_missing_is_read_less_and_less_often_and_a_failed_read_changes_nothing() {
        let mut schedule = Schedule::<u64>::default();
        let mut now = seconds(0);
        schedule.want(&1, question("a"), now);
        let mut waits = Vec::new();
        for _ in 0..5 {
            schedule.start(now, 8);
            schedule.answer(&1, question("a"), absent(), false, now, 1.0);
            let due = schedule.next_due().unwrap_or_default();
            waits.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(waits, [5, 10, 20, 40, 60]);
        schedule.start(now, 8);
        assert!(!schedule.answer(&1, question("a"), None, false, now, 1.0));
        assert_eq!(schedule.want(&1, question("a"), now).0, absent());
        schedule.start(now + seconds(60), 8);
        assert!(schedule.answer(&1, question("a"), there(), true, now, 1.0));
    }

    #[test]
    fn no_more_are_read_at_once_than_there_are_slots() {
        let mut schedule = Schedule::<u64>::default();
        for key in 0..9 {
            schedule.want(&key, question("a"), seconds(9 - key));
        }
        let keys = |started: Vec<(u64, Question)>| -> Vec<u64> {
            started.into_iter().map(|(k, _)| k).collect()
        };
        assert_eq!(keys(schedule.start(seconds(20), 2)), [8, 7]);
        assert_eq!(keys(schedule.start(seconds(20), 1)), [6]);
    }
}
