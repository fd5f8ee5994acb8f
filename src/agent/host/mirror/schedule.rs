//! What to fetch when: slots, queue, backoff and repair. Pure: time is the duration since any fixed start of
//! a monotonic clock, and chance is passed in.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::failure::{Diagnosis, diagnose};
use super::refs::Held;
use super::step::{Hold, Mode};
use super::{FetchFailure, MirrorKey, SourceUrl, Want};
use crate::agent::host::records::StepResult;
use crate::agent::host::turns::Turns;
use crate::api::names::AppName;
use crate::api::reasons::Reason;

/// The first wait after a failed fetch; it doubles with each further one.
const SHORTEST_WAIT: Duration = Duration::from_secs(5);

/// The longest wait: a git host that was down for hours is asked again within ten minutes.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// How far an app has come to its commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MirrorState {
    /// The mirror has the commit and holds it for the app.
    Ready {
        /// The bare repository, to be bound read-only.
        mirror: PathBuf,
    },
    /// The mirror has the commit, and it will not do: nothing is tried again before something else is wanted.
    Refused(FetchFailure),
    /// Waiting for a slot.
    Queued {
        /// From 1.
        position: usize,
        /// All that wait.
        of: usize,
    },
    /// Being fetched.
    Fetching,
    /// It failed, and is tried again by itself.
    Failed {
        /// Why.
        failure: FetchFailure,
        /// When; zero: any moment.
        retry_in: Duration,
    },
}

/// What is seen of a mirror on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    /// Its unit.
    pub unit: Unit,
    /// What it holds, for the apps that want something of it.
    pub held: BTreeMap<AppName, Held>,
}

/// The unit of a mirror's fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unit {
    /// There is none.
    Absent,
    /// It runs.
    Running,
    /// It has ended, with what git said last.
    Ended {
        /// How.
        result: StepResult,
        /// The end of its log.
        log: String,
    },
}

/// What is to be done after a look at a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing.
    Nothing,
    /// Stop the unit: its result was taken in, or nobody wants it any more.
    Stop,
    /// Stop the unit and throw the mirror away.
    StopAndDrop,
}

/// A fetch that is to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Start {
    /// The mirror.
    pub key: MirrorKey,
    /// Its repository.
    pub source: SourceUrl,
    /// Whether the mirror is looked through first.
    pub mode: Mode,
    /// What is wanted.
    pub holds: Vec<Hold>,
}

/// All mirrors that somebody wants something of.
#[derive(Debug)]
pub(super) struct Schedule {
    slots: usize,
    mirrors: BTreeMap<MirrorKey, Mirror>,
    queue: Turns<MirrorKey>,
}

#[derive(Debug)]
struct Mirror {
    source: SourceUrl,
    path: PathBuf,
    wants: BTreeMap<AppName, Want>,
    held: BTreeMap<AppName, Held>,
    /// What the running fetch was told; empty if this agent did not start it.
    running: Option<BTreeMap<AppName, Want>>,
    /// Failures in a row.
    failures: u32,
    failure: Option<FetchFailure>,
    not_before: Duration,
    /// Somebody suspects damage: no commit counts as there before it was looked for.
    suspected: bool,
    /// It was thrown away once and has not worked since: not again, or a repository that git cannot read
    /// would be cloned for ever.
    made_anew: bool,
}

impl Mirror {
    fn new(source: SourceUrl, path: PathBuf) -> Self {
        Self {
            source,
            path,
            wants: BTreeMap::new(),
            held: BTreeMap::new(),
            running: None,
            failures: 0,
            failure: None,
            not_before: Duration::ZERO,
            suspected: false,
            made_anew: false,
        }
    }

    /// What came of a want; nothing while it is not fetched.
    fn answer(&self, app: &AppName, want: &Want) -> Option<Result<(), FetchFailure>> {
        self.held.get(app).filter(|_| !self.suspected)?.answer(want)
    }

    fn has_credential(&self) -> bool {
        self.wants.values().any(|want| want.credential.is_some())
    }

    fn is_satisfied(&self) -> bool {
        self.wants
            .iter()
            .all(|(app, want)| self.answer(app, want).is_some())
    }

    /// `chance` is from 0 to 1: mirrors that failed together are not tried together.
    fn fail(&mut self, now: Duration, chance: f64, failure: FetchFailure) {
        let doubled = SHORTEST_WAIT.saturating_mul(2_u32.saturating_pow(self.failures.min(16)));
        let wait = doubled
            .min(LONGEST_WAIT)
            .mul_f64(0.8 + 0.2 * chance.clamp(0.0, 1.0));
        self.failures = self.failures.saturating_add(1);
        self.failure = Some(failure);
        self.not_before = now.saturating_add(wait);
    }
}

impl Schedule {
    /// At most `slots` fetches at a time, at least 1.
    pub fn new(slots: usize) -> Self {
        Self {
            slots: slots.max(1),
            mirrors: BTreeMap::new(),
            queue: Turns::default(),
        }
    }

    /// The newest want of an app counts; `path` is where the mirror is.
    pub fn want(&mut self, now: Duration, app: &AppName, want: Want, path: PathBuf) {
        let key = want.key();
        for (other, mirror) in &mut self.mirrors {
            if *other != key {
                mirror.wants.remove(app);
            }
        }
        let mirror = self
            .mirrors
            .entry(key.clone())
            .or_insert_with(|| Mirror::new(want.source.clone(), path));
        let is_new = mirror.wants.get(app).is_none_or(|old| *old != want);
        // That one commit is missing says nothing of another, nor of the same without its submodules.
        if is_new
            && mirror
                .failure
                .as_ref()
                .is_some_and(|failure| failure.reason == Reason::RefNotFound)
        {
            mirror.not_before = now;
            mirror.failure = None;
        }
        mirror.wants.insert(app.clone(), want);
        // In the order in which they came; a look takes out what is there already.
        if mirror.running.is_none() && !mirror.is_satisfied() && mirror.not_before <= now {
            self.queue.push(app.namespace(), key);
        }
    }

    /// The app wants nothing any more.
    pub fn unwant(&mut self, app: &AppName) {
        for mirror in self.mirrors.values_mut() {
            mirror.wants.remove(app);
        }
    }

    /// The mirror of the app's commit may be damaged.
    pub fn suspect(&mut self, app: &AppName) {
        for mirror in self
            .mirrors
            .values_mut()
            .filter(|mirror| mirror.wants.contains_key(app))
        {
            mirror.suspected = true;
        }
    }

    /// The mirrors, and the apps that want something of each.
    pub fn mirrors(
        &self,
    ) -> impl Iterator<Item = (&MirrorKey, &PathBuf, impl Iterator<Item = &AppName>)> {
        self.mirrors
            .iter()
            .map(|(key, mirror)| (key, &mirror.path, mirror.wants.keys()))
    }

    /// Whether somebody wants something of the mirror.
    pub fn is_wanted(&self, key: &MirrorKey) -> bool {
        self.mirrors
            .get(key)
            .is_some_and(|mirror| !mirror.wants.is_empty())
    }

    /// Whether an app wants something of the mirror.
    pub fn is_wanted_by(&self, key: &MirrorKey, app: &AppName) -> bool {
        self.mirrors
            .get(key)
            .is_some_and(|mirror| mirror.wants.contains_key(app))
    }

    /// Whether a fetch runs.
    pub fn is_running(&self) -> bool {
        self.mirrors.values().any(|mirror| mirror.running.is_some())
    }

    /// Takes in what is seen of a mirror.
    pub fn take_in(&mut self, now: Duration, chance: f64, key: &MirrorKey, seen: Seen) -> Action {
        let Some(mirror) = self.mirrors.get_mut(key) else {
            return Action::Stop;
        };
        let Seen { unit, held } = seen;
        mirror.held = held;
        let action = match unit {
            Unit::Absent => {
                // Stopped by somebody, or lost with a reboot: it is run again.
                mirror.running = None;
                Action::Nothing
            }
            Unit::Running if mirror.wants.is_empty() => {
                mirror.running = None;
                Action::Stop
            }
            Unit::Running => {
                mirror.running.get_or_insert_default();
                Action::Nothing
            }
            Unit::Ended { result, log } => {
                let told = mirror.running.take().unwrap_or_default();
                if result.is_success() {
                    mirror.take_in_success(now, chance, &told)
                } else {
                    mirror.take_in_failure(now, chance, &result, &log)
                }
            }
        };
        let is_idle = mirror.running.is_none();
        if is_idle && mirror.wants.is_empty() {
            self.mirrors.remove(key);
            self.queue.remove(key);
        } else if is_idle && !mirror.is_satisfied() && mirror.not_before <= now {
            let namespace = mirror.wants.keys().next().map(AppName::namespace);
            self.queue.push(namespace.unwrap_or_default(), key.clone());
        } else {
            self.queue.remove(key);
        }
        action
    }

    /// The next fetch, if a slot is free. It counts as running from here on.
    pub fn next_start(&mut self) -> Option<Start> {
        let running = self
            .mirrors
            .values()
            .filter(|mirror| mirror.running.is_some())
            .count();
        if running >= self.slots {
            return None;
        }
        let key = self.queue.order().first().map(|&key| key.clone())?;
        self.queue.serve(&key);
        let mirror = self.mirrors.get_mut(&key)?;
        let holds: Vec<Hold> = mirror
            .wants
            .iter()
            .filter(|(app, want)| mirror.answer(app, want).is_none())
            .map(|(app, want)| Hold {
                app: app.clone(),
                want: want.clone(),
            })
            .collect();
        mirror.running = Some(
            holds
                .iter()
                .map(|hold| (hold.app.clone(), hold.want.clone()))
                .collect(),
        );
        let mode = if mirror.suspected {
            Mode::Check
        } else {
            Mode::Fetch
        };
        Some(Start {
            key,
            source: mirror.source.clone(),
            mode,
            holds,
        })
    }

    /// The fetch could not be started.
    pub fn start_failed(&mut self, now: Duration, chance: f64, key: &MirrorKey, message: String) {
        if let Some(mirror) = self.mirrors.get_mut(key) {
            mirror.running = None;
            mirror.fail(
                now,
                chance,
                FetchFailure {
                    reason: Reason::SourceUnavailable,
                    message,
                },
            );
        }
    }

    /// When something is to be done that nobody will say.
    pub fn next_deadline(&self) -> Option<Duration> {
        let waiting = self
            .mirrors
            .values()
            .filter(|mirror| mirror.running.is_none() && !mirror.is_satisfied());
        waiting.map(|mirror| mirror.not_before).min()
    }

    /// Where every app is.
    pub fn states(&self, now: Duration) -> BTreeMap<AppName, MirrorState> {
        let apps = self.mirrors.values().flat_map(|mirror| mirror.wants.keys());
        apps.filter_map(|app| Some((app.clone(), self.state(now, app)?)))
            .collect()
    }

    /// Where an app is; nothing if it wants nothing.
    pub fn state(&self, now: Duration, app: &AppName) -> Option<MirrorState> {
        let (key, mirror) = self
            .mirrors
            .iter()
            .find(|(_, mirror)| mirror.wants.contains_key(app))?;
        let want = mirror.wants.get(app)?;
        let state = if let Some(answer) = mirror.answer(app, want) {
            match answer {
                Ok(()) => MirrorState::Ready {
                    mirror: mirror.path.clone(),
                },
                Err(failure) => MirrorState::Refused(failure),
            }
        } else if mirror.running.is_some() {
            MirrorState::Fetching
        } else if let Some(failure) = mirror.failure.clone().filter(|_| now < mirror.not_before) {
            MirrorState::Failed {
                failure,
                retry_in: mirror.not_before.saturating_sub(now),
            }
        } else {
            let order = self.queue.order();
            let queued = order.iter().position(|queued| *queued == key);
            let of = order.len() + usize::from(queued.is_none());
            MirrorState::Queued {
                position: queued.map_or(of, |at| at + 1),
                of,
            }
        };
        Some(state)
    }
}

impl Mirror {
    fn take_in_success(
        &mut self,
        now: Duration,
        chance: f64,
        told: &BTreeMap<AppName, Want>,
    ) -> Action {
        self.suspected = false;
        let lost = told.iter().find(|(app, want)| {
            self.wants.get(*app) == Some(*want) && self.answer(app, want).is_none()
        });
        if let Some((_, Want { commit, .. })) = lost {
            // Or it would be fetched again and again without a pause.
            let message = format!(
                "the fetch of {} ended well, but the mirror does not hold {commit}",
                self.source
            );
            self.suspected = true;
            self.fail(
                now,
                chance,
                FetchFailure {
                    reason: Reason::SourceUnavailable,
                    message,
                },
            );
        } else {
            self.failures = 0;
            self.failure = None;
            self.not_before = Duration::ZERO;
            self.made_anew = false;
        }
        Action::Stop
    }

    fn take_in_failure(
        &mut self,
        now: Duration,
        chance: f64,
        result: &StepResult,
        log: &str,
    ) -> Action {
        match diagnose(&self.source, self.has_credential(), result, log) {
            Diagnosis::Failed(failure) => {
                self.fail(now, chance, failure);
                Action::Stop
            }
            Diagnosis::Unclear(failure) => {
                self.suspected = true;
                self.fail(now, chance, failure);
                Action::Stop
            }
            Diagnosis::Damaged(failure) if self.made_anew => {
                self.fail(now, chance, failure);
                Action::Stop
            }
            Diagnosis::Damaged(failure) => {
                self.failure = Some(failure);
                self.not_before = now;
                self.held.clear();
                self.suspected = false;
                self.made_anew = true;
                Action::StopAndDrop
            }
        }
    }
}

#[cfg(test)]
mod tests;
