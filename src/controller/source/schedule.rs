//! When which repository is looked up, and who wants to know. A plain state machine that is told the time.
//!
//! Invariants: at most one look-up of a repository with one credential at a time; what nobody wants is forgotten; a request is
//! answered only by a look-up that began after it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Duration;

use crate::api::names::Commit;
use crate::api::reasons::Reason;
use crate::controller::observed::{Lookup, LookupFailure, Outcome};
use crate::runtime::supervise::Backoff;

use super::Repository;
use super::range::{Range, tags};

/// Between two look-ups of one url at least, whoever asks: a person who annotates in a loop must not
/// hammer a server.
const LEAST_GAP: Duration = Duration::from_secs(1);

/// Between look-ups of a url that fails: 5 s, doubled up to 10 minutes.
const BACKOFF: Backoff = Backoff {
    initial: Duration::from_secs(5),
    max: Duration::from_secs(600),
};

/// How much sooner or later than its interval a look-up comes at most, so that those of one interval
/// do not stay together.
const JITTER: f64 = 0.1;

/// What a Deployment wants looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interest {
    /// The repository.
    pub repository: Repository,
    /// The full name of the reference, or the pattern of all references that a range looks at.
    pub reference: String,
    /// The range of versions whose highest tag is wanted.
    pub range: Option<String>,
    /// Between two looks.
    pub interval: Duration,
    /// The status names a commit for it already, so that the first look can wait.
    pub known: bool,
    /// A `kari.dev/requestedAt` that no status has echoed yet.
    pub request: Option<String>,
}

/// A look-up that is to be made now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// The repository.
    pub repository: Repository,
    /// All references of it that anybody wants.
    pub references: BTreeSet<String>,
}

/// What a repository answered: the commit of each reference that it has.
pub type Answer = Result<BTreeMap<String, Commit>, LookupFailure>;

/// See the module's head. `Key` names a Deployment.
#[derive(Debug)]
pub struct Schedule<Key> {
    interests: HashMap<Key, Registered>,
    repositories: HashMap<Repository, Entry>,
}

impl<Key> Default for Schedule<Key> {
    fn default() -> Self {
        Self {
            interests: HashMap::new(),
            repositories: HashMap::new(),
        }
    }
}

#[derive(Debug)]
struct Registered {
    interest: Interest,
    /// The request that the look-up which is under way will have answered.
    asking: Option<String>,
    answered: Option<String>,
}

#[derive(Debug)]
struct Entry {
    due: Duration,
    /// When the last look-up began.
    began: Option<Duration>,
    running: bool,
    /// Failures in a row.
    failures: u32,
    /// The references that the last answer is about.
    asked: BTreeSet<String>,
    /// Those that the look-up under way is about.
    asking: BTreeSet<String>,
    answer: Option<Answer>,
}

impl<Key: Clone + Eq + Hash> Schedule<Key> {
    /// Registers what `key` wants, and returns what is known of it; and whether a look-up was hastened.
    /// `jitter` is random in 0..1.
    pub fn want(
        &mut self,
        key: &Key,
        interest: Interest,
        now: Duration,
        jitter: f64,
    ) -> (Lookup, bool) {
        let before = self.interests.get(key);
        let answered = before.and_then(|b| b.answered.clone());
        let asking = before.and_then(|b| b.asking.clone());
        let changed = before.is_none_or(|b| b.interest != interest);
        let old = before
            .map(|b| b.interest.repository.clone())
            .filter(|repository| *repository != interest.repository);
        let requested = interest.request.is_some()
            && interest.request != answered
            && before.is_none_or(|b| b.interest.request != interest.request);

        let mut hastened = false;
        if changed {
            let spread = interest.interval.mul_f64(jitter.clamp(0.0, 1.0));
            let url = self
                .repositories
                .entry(interest.repository.clone())
                .or_insert_with(|| {
                    hastened = true;
                    Entry {
                        due: if interest.known { now + spread } else { now },
                        began: None,
                        running: false,
                        failures: 0,
                        asked: BTreeSet::new(),
                        asking: BTreeSet::new(),
                        answer: None,
                    }
                });
            // What one credential was told says nothing of another, which may mend what failed.
            let unknown = !interest.known || old.is_some();
            let unasked = unknown
                && !url.asked.contains(&interest.reference)
                && !url.asking.contains(&interest.reference);
            let due = if requested || unasked {
                url.began.map_or(now, |began| (began + LEAST_GAP).max(now))
            } else {
                url.due.min(now + interest.interval)
            };
            if due < url.due {
                url.due = due;
                hastened = true;
            }
            let registered = Registered {
                interest: interest.clone(),
                asking: asking.filter(|_| old.is_none()),
                answered: answered.clone(),
            };
            self.interests.insert(key.clone(), registered);
            if let Some(old) = old {
                self.forget_repository(&old);
            }
        }
        let lookup = Lookup {
            outcome: self.outcome(&interest),
            answered_request: answered,
        };
        (lookup, hastened)
    }

    /// `key` wants nothing any more.
    pub fn forget(&mut self, key: &Key) {
        if let Some(gone) = self.interests.remove(key) {
            self.forget_repository(&gone.interest.repository);
        }
    }

    fn forget_repository(&mut self, repository: &Repository) {
        let mut interests = self.interests.values();
        let wanted = interests.any(|r| r.interest.repository == *repository);
        let entry = self.repositories.get(repository);
        if !wanted && entry.is_some_and(|entry| !entry.running) {
            self.repositories.remove(repository);
        }
    }

    /// Begins at most `free` of the look-ups that are due, the longest due first.
    pub fn start(&mut self, now: Duration, free: usize) -> Vec<Due> {
        let mut due: Vec<(Duration, Repository)> = self
            .repositories
            .iter()
            .filter(|(_, entry)| !entry.running && entry.due <= now)
            .map(|(repository, entry)| (entry.due, repository.clone()))
            .collect();
        due.sort();
        due.truncate(free);
        due.into_iter()
            .map(|(_, repository)| self.begin(repository, now))
            .collect()
    }

    fn begin(&mut self, repository: Repository, now: Duration) -> Due {
        let mut references = BTreeSet::new();
        for registered in self.interests.values_mut() {
            if registered.interest.repository == repository {
                references.insert(registered.interest.reference.clone());
                registered.asking.clone_from(&registered.interest.request);
            }
        }
        if let Some(state) = self.repositories.get_mut(&repository) {
            state.running = true;
            state.began = Some(now);
            state.asking.clone_from(&references);
        }
        Due {
            repository,
            references,
        }
    }

    /// Takes the answer of a look-up that was begun, and returns who has to hear of it: those for whom
    /// it says something new, or whose request it answers.
    pub fn answer(
        &mut self,
        repository: &Repository,
        answer: Answer,
        now: Duration,
        jitter: f64,
    ) -> Vec<Key> {
        let before: Vec<(Key, Outcome)> = self
            .interests
            .iter()
            .filter(|(_, r)| r.interest.repository == *repository)
            .map(|(key, r)| (key.clone(), self.outcome(&r.interest)))
            .collect();
        let interval = before
            .iter()
            .filter_map(|(key, _)| self.interests.get(key))
            .map(|r| r.interest.interval)
            .min();
        if let Some(state) = self.repositories.get_mut(repository) {
            state.running = false;
            state.failures = if answer.is_err() {
                state.failures + 1
            } else {
                0
            };
            state.asked = std::mem::take(&mut state.asking);
            let pause = match (state.failures, interval) {
                (0, Some(interval)) => interval.mul_f64(1.0 + JITTER * (2.0 * jitter - 1.0)),
                (0, None) => BACKOFF.max,
                (failures, _) => BACKOFF.delay(failures, jitter),
            };
            state.due = now + pause;
            state.answer = Some(answer);
        }
        let mut news = Vec::new();
        let mut unanswered = false;
        for (key, earlier) in before {
            let Some(registered) = self.interests.get(&key) else {
                continue;
            };
            let outcome = self.outcome(&registered.interest);
            let asking = registered.asking.clone();
            let open =
                registered.interest.request.is_some() && registered.interest.request != asking;
            unanswered |= open || outcome == Outcome::Pending;
            if outcome != earlier || asking.is_some() {
                news.push(key.clone());
            }
            if let Some(registered) = self.interests.get_mut(&key)
                && asking.is_some()
            {
                registered.asking = None;
                registered.answered = asking;
            }
        }
        if unanswered && let Some(state) = self.repositories.get_mut(repository) {
            state.due = state.due.min(now + LEAST_GAP);
        }
        self.forget_repository(repository);
        news
    }

    fn outcome(&self, interest: &Interest) -> Outcome {
        let Some(entry) = self.repositories.get(&interest.repository) else {
            return Outcome::Pending;
        };
        match &entry.answer {
            None => Outcome::Pending,
            Some(Err(failure)) => Outcome::Failed(failure.clone()),
            Some(Ok(_)) if !entry.asked.contains(&interest.reference) => Outcome::Pending,
            Some(Ok(commits)) if interest.range.is_some() => highest(interest, commits),
            Some(Ok(commits)) => match commits.get(&interest.reference) {
                Some(commit) => Outcome::Found(commit.clone()),
                None => Outcome::Failed(LookupFailure {
                    reason: Reason::RefNotFound,
                    message: format!(
                        "{} has no {}; push it, or change spec.source.git.ref",
                        interest.repository.url, interest.reference
                    ),
                }),
            },
        }
    }

    /// When the next look-up is due that is not under way.
    pub fn next_due(&self) -> Option<Duration> {
        self.repositories
            .values()
            .filter(|entry| !entry.running)
            .map(|entry| entry.due)
            .min()
    }
}

/// The highest tag in the range that is wanted. A range that cannot be read is refused before it gets here.
fn highest(interest: &Interest, commits: &BTreeMap<String, Commit>) -> Outcome {
    let text = interest.range.as_deref().unwrap_or_default();
    let range = Range::parse(text);
    let found = range.as_ref().ok().and_then(|range| range.highest(commits));
    match found {
        Some((reference, commit)) => Outcome::FoundTag(reference.to_owned(), commit.clone()),
        None => Outcome::Failed(LookupFailure {
            reason: Reason::RefNotFound,
            message: format!(
                "{}: none of its {} tags is a version in the range {text:?}; push one, or change spec.source.git.ref.semver",
                interest.repository.url,
                tags(commits)
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::controller::testing::commit;
    use crate::git_credential::GitCredential;
    use crate::seal::SecretBytes;

    const MIDDLE: f64 = 0.5;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn repository(url: &str) -> Repository {
        Repository {
            url: url.to_owned(),
            credential: None,
        }
    }

    fn with_password(url: &str, password: &str) -> Repository {
        let data = [("username", "u"), ("password", password)]
            .map(|(key, value)| (key.to_owned(), SecretBytes::new(value.into())));
        let credential = GitCredential::parse(url, &data.into()).unwrap_or_else(|e| panic!("{e}"));
        Repository {
            url: url.to_owned(),
            credential: Some(Arc::new(credential)),
        }
    }

    fn interest(reference: &str) -> Interest {
        Interest {
            repository: repository("u"),
            reference: reference.into(),
            range: None,
            interval: seconds(60),
            known: false,
            request: None,
        }
    }

    fn requesting(request: &str) -> Interest {
        Interest {
            request: Some(request.into()),
            ..interest("r")
        }
    }

    fn found(digit: char) -> Answer {
        Ok([("r".to_owned(), commit(digit))].into())
    }

    fn failed() -> Answer {
        Err(LookupFailure {
            reason: Reason::SourceUnavailable,
            message: "no".into(),
        })
    }

    #[test]
    fn one_look_up_answers_all_references_of_a_url() {
        let mut schedule = Schedule::<u64>::default();
        schedule.want(&1, interest("r"), seconds(0), MIDDLE);
        schedule.want(&2, interest("s"), seconds(0), MIDDLE);
        let due = schedule.start(seconds(0), 8);
        assert_eq!(due.len(), 1);
        assert_eq!(due[0].references, ["r".to_owned(), "s".to_owned()].into());
        assert_eq!(schedule.start(seconds(0), 8), [], "one at a time");
        let mut news = schedule.answer(&repository("u"), found('a'), seconds(1), MIDDLE);
        news.sort_unstable();
        assert_eq!(news, [1, 2]);
        let outcome =
            |s: &mut Schedule<_>, key, r| s.want(&key, interest(r), seconds(1), MIDDLE).0.outcome;
        assert_eq!(outcome(&mut schedule, 1, "r"), Outcome::Found(commit('a')));
        let Outcome::Failed(failure) = outcome(&mut schedule, 2, "s") else {
            panic!("the reference is not there");
        };
        assert_eq!(failure.reason, Reason::RefNotFound);
        assert_eq!(schedule.next_due(), Some(seconds(61)));
        schedule.start(seconds(61), 8);
        let news = schedule.answer(&repository("u"), found('a'), seconds(62), MIDDLE);
        assert!(news.is_empty(), "nothing is new");
        schedule.start(seconds(200), 8);
        assert_eq!(
            schedule.answer(&repository("u"), found('b'), seconds(201), MIDDLE),
            [1]
        );
    }

    #[test]
    fn a_source_that_fails_is_asked_less_and_less_often() {
        let mut schedule = Schedule::<u64>::default();
        let mut now = seconds(0);
        schedule.want(&1, interest("r"), now, MIDDLE);
        let mut waits = Vec::new();
        for _ in 0..9 {
            schedule.start(now, 8);
            schedule.answer(&repository("u"), failed(), now, 1.0);
            let due = schedule.next_due().unwrap_or_default();
            waits.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(waits, [5, 10, 20, 40, 80, 160, 320, 600, 600]);
        schedule.start(now, 8);
        schedule.answer(&repository("u"), found('a'), now, MIDDLE);
        assert_eq!(schedule.next_due(), Some(now + seconds(60)));
    }

    #[test]
    fn what_is_known_is_looked_at_spread_over_its_interval_and_what_is_not_at_once() {
        let known = |key: u64, jitter| {
            let mut schedule = Schedule::<u64>::default();
            let interest = Interest {
                known: true,
                ..interest("r")
            };
            schedule.want(&key, interest, seconds(0), jitter);
            schedule.next_due()
        };
        assert_eq!(known(1, 0.25), Some(seconds(15)));
        assert_eq!(known(2, 0.75), Some(seconds(45)));
        let mut schedule = Schedule::<u64>::default();
        let known = Interest {
            known: true,
            ..interest("r")
        };
        schedule.want(&1, known, seconds(0), 0.75);
        let (_, hastened) = schedule.want(&2, interest("s"), seconds(3), MIDDLE);
        assert!(hastened);
        assert_eq!(schedule.next_due(), Some(seconds(3)));
    }

    #[test]
    fn another_reference_is_looked_up_at_once() {
        let mut schedule = Schedule::<u64>::default();
        let known = Interest {
            known: true,
            ..interest("r")
        };
        schedule.want(&1, known, seconds(0), 0.9);
        assert_eq!(schedule.next_due(), Some(seconds(54)));
        schedule.want(&1, interest("s"), seconds(3), MIDDLE);
        assert_eq!(schedule.next_due(), Some(seconds(3)));
        schedule.start(seconds(3), 8);
        schedule.answer(&repository("u"), found('a'), seconds(4), MIDDLE);
        schedule.want(&1, interest("r"), seconds(9), MIDDLE);
        assert_eq!(schedule.next_due(), Some(seconds(9)));
    }

    #[test]
    fn a_request_is_answered_by_a_look_up_that_began_after_it_and_once() {
        let mut schedule = Schedule::<u64>::default();
        schedule.want(&1, interest("r"), seconds(0), MIDDLE);
        schedule.start(seconds(0), 8);
        // It comes while a look-up is under way.
        let (lookup, _) = schedule.want(&1, requesting("x"), seconds(1), MIDDLE);
        assert_eq!(lookup.answered_request, None);
        schedule.answer(&repository("u"), found('a'), seconds(2), MIDDLE);
        let (lookup, _) = schedule.want(&1, requesting("x"), seconds(2), MIDDLE);
        assert_eq!(lookup.answered_request, None, "it began before the request");
        assert_eq!(schedule.start(seconds(3), 8).len(), 1);
        assert_eq!(
            schedule.answer(&repository("u"), found('a'), seconds(4), MIDDLE),
            [1]
        );
        let (lookup, hastened) = schedule.want(&1, requesting("x"), seconds(4), MIDDLE);
        assert_eq!(lookup.answered_request, Some("x".into()));
        assert!(!hastened);
        assert_eq!(
            schedule.start(seconds(30), 8),
            [],
            "the same value asks for nothing"
        );
        // The status has echoed it.
        let (lookup, _) = schedule.want(&1, interest("r"), seconds(30), MIDDLE);
        assert_eq!(lookup.answered_request, Some("x".into()));
        schedule.want(&1, requesting("y"), seconds(31), MIDDLE);
        assert_eq!(schedule.start(seconds(31), 8).len(), 1);
    }

    #[test]
    fn a_server_is_not_hammered_by_requests() {
        let mut schedule = Schedule::<u64>::default();
        schedule.want(&1, requesting("1"), seconds(0), MIDDLE);
        schedule.start(seconds(0), 8);
        schedule.answer(&repository("u"), found('a'), seconds(0), MIDDLE);
        schedule.want(&1, requesting("2"), Duration::from_millis(10), MIDDLE);
        assert_eq!(schedule.next_due(), Some(LEAST_GAP));
    }

    #[test]
    fn slots_are_given_to_what_is_due_the_longest() {
        let mut schedule = Schedule::<u64>::default();
        for n in 0..4_u64 {
            let interest = Interest {
                repository: repository(&format!("u{n}")),
                ..interest("r")
            };
            schedule.want(&n, interest, seconds(4 - n), MIDDLE);
        }
        let urls =
            |due: Vec<Due>| -> Vec<String> { due.into_iter().map(|d| d.repository.url).collect() };
        assert_eq!(urls(schedule.start(seconds(9), 2)), ["u3", "u2"]);
        assert_eq!(urls(schedule.start(seconds(9), 1)), ["u1"]);
    }

    #[test]
    fn what_nobody_wants_is_forgotten() {
        let mut schedule = Schedule::<u64>::default();
        schedule.want(&1, interest("r"), seconds(0), MIDDLE);
        schedule.want(&2, interest("r"), seconds(0), MIDDLE);
        schedule.forget(&1);
        assert!(schedule.next_due().is_some());
        schedule.start(seconds(0), 8);
        schedule.forget(&2);
        assert_eq!(
            schedule.answer(&repository("u"), found('a'), seconds(1), MIDDLE),
            Vec::<u64>::new()
        );
        assert!(schedule.repositories.is_empty());
        let moved = Interest {
            repository: repository("v"),
            ..interest("r")
        };
        schedule.want(&1, interest("r"), seconds(2), MIDDLE);
        schedule.want(&1, moved, seconds(2), MIDDLE);
        assert_eq!(
            schedule.repositories.keys().collect::<Vec<_>>(),
            [&repository("v")]
        );
    }

    #[test]
    fn a_push_to_a_repository_of_many_deployments_is_one_look_up() {
        let mut schedule = Schedule::<u64>::default();
        for key in 0..50 {
            schedule.want(&key, interest("r"), seconds(0), MIDDLE);
        }
        assert_eq!(schedule.start(seconds(0), 8).len(), 1);
        assert_eq!(
            schedule
                .answer(&repository("u"), found('a'), seconds(1), MIDDLE)
                .len(),
            50
        );
        assert_eq!(schedule.start(seconds(2), 8), []);
        // All of them ask at once, each with a request of its own, while one of these look-ups is under way.
        for key in 0..50 {
            schedule.want(&key, requesting(&format!("{key}")), seconds(3), MIDDLE);
        }
        assert_eq!(schedule.start(seconds(3), 8).len(), 1);
        assert_eq!(
            schedule
                .answer(&repository("u"), found('b'), seconds(4), MIDDLE)
                .len(),
            50
        );
        for key in 0..50 {
            let (lookup, hastened) = schedule.want(&key, interest("r"), seconds(5), MIDDLE);
            assert_eq!(lookup.outcome, Outcome::Found(commit('b')));
            assert!(!hastened);
        }
        assert_eq!(schedule.start(seconds(6), 8), [], "nobody asks again");
    }

    #[test]
    fn a_range_finds_its_highest_tag_and_a_newer_one_at_the_next_look() {
        let mut schedule = Schedule::<u64>::default();
        let wanted = || Interest {
            range: Some("1.x".into()),
            ..interest("refs/tags/*")
        };
        let tagged = |tags: &[(&str, char)]| -> Answer {
            let commits = tags
                .iter()
                .map(|(tag, c)| (format!("refs/tags/{tag}"), commit(*c)));
            Ok(commits.collect())
        };
        let mut look = |now: u64, answer| {
            schedule.want(&1, wanted(), seconds(now), MIDDLE);
            assert_eq!(schedule.start(seconds(now), 8).len(), 1);
            let news = schedule.answer(&repository("u"), answer, seconds(now), MIDDLE);
            let (lookup, _) = schedule.want(&1, wanted(), seconds(now), MIDDLE);
            (news, lookup.outcome)
        };
        let tag = |tag: &str, c| Outcome::FoundTag(format!("refs/tags/{tag}"), commit(c));
        let (news, outcome) = look(0, tagged(&[("v1.9.0", 'a'), ("v2.0.0", 'b')]));
        assert_eq!((news, outcome), (vec![1], tag("v1.9.0", 'a')));
        let (news, _) = look(100, tagged(&[("v1.9.0", 'a'), ("v2.1.0", 'b')]));
        assert!(news.is_empty(), "another tag is no news");
        let (news, outcome) = look(200, tagged(&[("v1.9.0", 'a'), ("v1.10.0", 'c')]));
        assert_eq!((news, outcome), (vec![1], tag("v1.10.0", 'c')));
        let (_, outcome) = look(300, tagged(&[("v2.0.0", 'b'), ("v3.0.0", 'b')]));
        let Outcome::Failed(failure) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(failure.reason, Reason::RefNotFound);
        assert!(
            failure.message.contains("\"1.x\"") && failure.message.contains("2 tags"),
            "{failure}"
        );
    }

    #[test]
    fn one_credential_is_never_answered_by_what_another_was_told() {
        let mut schedule = Schedule::<u64>::default();
        let wants = |password: &str, known| Interest {
            repository: with_password("https://h/r", password),
            known,
            ..interest("r")
        };
        schedule.want(&1, wants("good", false), seconds(0), MIDDLE);
        schedule.want(&2, wants("good", false), seconds(0), MIDDLE);
        schedule.want(&3, wants("bad", false), seconds(0), MIDDLE);
        assert_eq!(
            schedule.start(seconds(0), 8).len(),
            2,
            "one for each credential"
        );
        let good = with_password("https://h/r", "good");
        assert_eq!(
            schedule.answer(&good, found('a'), seconds(1), MIDDLE).len(),
            2
        );
        let outcome =
            |s: &mut Schedule<u64>, key, wanted| s.want(&key, wanted, seconds(1), MIDDLE).0.outcome;
        assert_eq!(
            outcome(&mut schedule, 3, wants("bad", false)),
            Outcome::Pending
        );
        // Rotated: asked at once with the new one, although a commit is known.
        schedule.want(&1, wants("new", true), seconds(5), MIDDLE);
        let due = schedule.start(seconds(5), 8);
        assert_eq!(due.len(), 1);
        assert_eq!(due[0].repository, with_password("https://h/r", "new"));
        assert_eq!(
            outcome(&mut schedule, 2, wants("good", true)),
            Outcome::Found(commit('a'))
        );
    }
}
