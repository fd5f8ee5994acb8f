//! Who may lead, as plain data.
//!
//! A Lease is a record that candidates compare-and-swap. Clocks of machines
//! differ, so no time written in the record is ever compared with a local
//! clock. Instead, as in client-go:
//! - a candidate takes a held lease only after it has seen the record unchanged
//!   for the whole lease duration, on its own monotonic clock;
//! - a holder stops believing in its lease [`Timing::renew_deadline`] after it
//!   *sent* the last renewal that succeeded;
//! - every write carries the resourceVersion that was read, so of two
//!   candidates that see the same expired record one gets a conflict.
//!
//! Since the candidate cannot have seen the last renewal before it was sent,
//! two holders never believe at the same time as long as one clock does not
//! run faster than another by more than duration : renew deadline (1.5).

use std::time::Duration;

use k8s_openapi::api::coordination::v1::LeaseSpec;

/// The rules of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How long a record must stay unchanged before another may take it.
    pub duration: Duration,
    /// How long after its last renewal a holder still believes. Less than
    /// `duration`.
    pub renew_deadline: Duration,
    /// The time between renewals, and between looks of a candidate.
    pub retry: Duration,
}

/// client-go's values.
pub const TIMING: Timing = Timing {
    duration: Duration::from_secs(15),
    renew_deadline: Duration::from_secs(10),
    retry: Duration::from_secs(2),
};

/// The longest duration that a record written by someone else is believed.
const LONGEST: Duration = Duration::from_secs(600);

/// What a candidate does about the lease that it has just read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// There is none: create it.
    Create,
    /// It is free, has expired, or is our own from a write whose answer was
    /// lost: write our name, with the resourceVersion that was read.
    Take,
    /// It is held; look again after at most this time.
    Wait(Duration),
}

/// A candidate's memory of the record.
#[derive(Clone, Debug)]
pub struct Observer {
    identity: String,
    seen: Option<(LeaseSpec, Duration)>,
}

impl Observer {
    /// A candidate that has seen nothing. `identity` is unique to the process.
    pub fn new(identity: String) -> Self {
        Self {
            identity,
            seen: None,
        }
    }

    /// Decides about the record as it was just read. `now` is monotonic.
    pub fn decide(&mut self, record: Option<&LeaseSpec>, now: Duration) -> Decision {
        let Some(record) = record else {
            self.seen = None;
            return Decision::Create;
        };
        let since = match &self.seen {
            Some((seen, since)) if seen == record => *since,
            Some(_) | None => {
                self.seen = Some((record.clone(), now));
                now
            }
        };
        let holder = record.holder_identity.as_deref().unwrap_or_default();
        if holder.is_empty() || holder == self.identity {
            return Decision::Take;
        }
        let unchanged = now.saturating_sub(since);
        let duration = duration_of(record);
        if unchanged >= duration {
            Decision::Take
        } else {
            Decision::Wait(duration - unchanged)
        }
    }
}

/// The duration that a record claims, within bounds; ours if it claims none.
fn duration_of(record: &LeaseSpec) -> Duration {
    record
        .lease_duration_seconds
        .and_then(|seconds| u64::try_from(seconds).ok())
        .filter(|seconds| *seconds > 0)
        .map_or(TIMING.duration, Duration::from_secs)
        .min(LONGEST)
}

/// A holder's belief in its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenure {
    renewed: Duration,
    renew_deadline: Duration,
}

impl Tenure {
    /// `sent`: when the write that succeeded was sent, not when it was answered.
    pub fn new(sent: Duration, timing: Timing) -> Self {
        Self {
            renewed: sent,
            renew_deadline: timing.renew_deadline,
        }
    }

    /// A later write succeeded.
    pub fn renewed(&mut self, sent: Duration) {
        self.renewed = self.renewed.max(sent);
    }

    /// When the holder must have stopped.
    pub fn ends(&self) -> Duration {
        self.renewed.saturating_add(self.renew_deadline)
    }

    /// Whether the holder may still act.
    pub fn holds(&self, now: Duration) -> bool {
        now < self.ends()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn held_by(holder: &str, transitions: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn a_missing_lease_is_created_and_a_free_or_own_one_taken() {
        let mut observer = Observer::new("me".to_owned());
        assert_eq!(observer.decide(None, seconds(0)), Decision::Create);
        assert_eq!(
            observer.decide(Some(&LeaseSpec::default()), seconds(0)),
            Decision::Take
        );
        assert_eq!(
            observer.decide(Some(&held_by("", 1)), seconds(0)),
            Decision::Take
        );
        assert_eq!(
            observer.decide(Some(&held_by("me", 1)), seconds(0)),
            Decision::Take
        );
    }

    #[test]
    fn a_held_lease_is_taken_only_after_it_was_seen_unchanged_for_its_duration() {
        let mut observer = Observer::new("me".to_owned());
        assert_eq!(
            observer.decide(Some(&held_by("other", 1)), seconds(100)),
            Decision::Wait(seconds(15))
        );
        assert_eq!(
            observer.decide(Some(&held_by("other", 1)), seconds(114)),
            Decision::Wait(seconds(1))
        );
        assert_eq!(
            observer.decide(Some(&held_by("other", 2)), seconds(114)),
            Decision::Wait(seconds(15))
        );
        assert_eq!(
            observer.decide(Some(&held_by("other", 2)), seconds(129)),
            Decision::Take
        );
    }

    #[test]
    fn a_record_that_claims_nonsense_is_believed_within_bounds() {
        for (claimed, expected) in [
            (None, 15),
            (Some(0), 15),
            (Some(-3), 15),
            (Some(40), 40),
            (Some(i32::MAX), 600),
        ] {
            let record = LeaseSpec {
                lease_duration_seconds: claimed,
                ..held_by("other", 1)
            };
            let mut observer = Observer::new("me".to_owned());
            assert_eq!(
                observer.decide(Some(&record), seconds(0)),
                Decision::Wait(seconds(expected)),
                "{claimed:?}"
            );
        }
    }

    #[test]
    fn a_holder_believes_until_the_deadline_after_it_sent_its_last_renewal() {
        let mut tenure = Tenure::new(seconds(100), TIMING);
        assert!(tenure.holds(seconds(109)));
        assert!(!tenure.holds(seconds(110)));
        tenure.renewed(seconds(108));
        tenure.renewed(seconds(104));
        assert_eq!(tenure.ends(), seconds(118));
    }

    /// A write on its way to the server.
    struct Write {
        record: LeaseSpec,
        /// The version that must still be there; `None`: there must be none.
        version: Option<u64>,
        arrives: u64,
    }

    /// A server that compares and swaps; writes arrive late or after their
    /// sender gave up on them.
    #[derive(Default)]
    struct Server {
        lease: Option<(u64, LeaseSpec)>,
        writes: Vec<Write>,
        versions: u64,
        /// The spec of every write that took effect: each is written once.
        applied: Vec<LeaseSpec>,
    }

    impl Server {
        fn advance(&mut self, real: u64) {
            self.writes.sort_by_key(|write| write.arrives);
            while self
                .writes
                .first()
                .is_some_and(|write| write.arrives <= real)
            {
                let write = self.writes.remove(0);
                if self.lease.as_ref().map(|(version, _)| *version) == write.version {
                    self.versions += 1;
                    self.applied.push(write.record.clone());
                    self.lease = Some((self.versions, write.record));
                }
            }
        }

        fn version(&self) -> Option<u64> {
            self.lease.as_ref().map(|(version, _)| *version)
        }
    }

    /// What a candidate awaits.
    struct Awaited {
        record: LeaseSpec,
        sent: u64,
        answered: Option<u64>,
    }

    /// One candidate with a clock of its own, driven as `lease` drives it.
    struct Candidate {
        name: &'static str,
        /// Parts of 1000 of real time.
        rate: u64,
        offset: u64,
        observer: Observer,
        tenure: Option<Tenure>,
        awaited: Option<Awaited>,
        next: u64,
        writes: i32,
        networks: std::vec::IntoIter<Network>,
    }

    impl Candidate {
        fn clock(&self, real: u64) -> Duration {
            Duration::from_millis(self.offset + real * self.rate / 1000)
        }

        fn leads(&self, real: u64) -> bool {
            self.tenure
                .is_some_and(|tenure| tenure.holds(self.clock(real)))
        }

        fn turn(&mut self, server: &mut Server, real: u64) {
            let now = self.clock(real);
            if self.tenure.is_some_and(|tenure| !tenure.holds(now)) {
                // Lost for good in the program; here it stands again.
                self.tenure = None;
            }
            if let Some(awaited) = &self.awaited {
                let answered = awaited.answered.is_some_and(|answered| real >= answered);
                if !answered && real < awaited.sent + CALL_MILLISECONDS {
                    return;
                }
                if answered && server.applied.contains(&awaited.record) {
                    let sent = self.clock(awaited.sent);
                    match &mut self.tenure {
                        Some(tenure) => tenure.renewed(sent),
                        None => self.tenure = Some(Tenure::new(sent, TIMING)),
                    }
                }
                self.awaited = None;
            }
            if real < self.next {
                return;
            }
            let record = server.lease.as_ref().map(|(_, record)| record);
            let ours =
                record.is_some_and(|record| record.holder_identity.as_deref() == Some(self.name));
            let write = match self.tenure {
                Some(_) if ours => true,
                Some(_) => {
                    self.tenure = None;
                    false
                }
                None => match self.observer.decide(record, now) {
                    Decision::Create | Decision::Take => true,
                    Decision::Wait(_) => false,
                },
            };
            // Once the script is over the network is good.
            let network = self.networks.next().unwrap_or(Network {
                there: 1,
                back: 1,
                lost: false,
                away: 0,
            });
            self.next = real + 2000 + network.away;
            if write {
                self.writes += 1;
                let record = held_by(self.name, self.writes);
                let arrives = real + network.there;
                server.writes.push(Write {
                    record: record.clone(),
                    version: server.version(),
                    arrives,
                });
                let answered = (!network.lost).then_some(arrives + network.back);
                self.awaited = Some(Awaited {
                    record,
                    sent: real,
                    answered,
                });
            }
        }
    }

    /// After this a candidate gives up on a call, which may take effect later.
    const CALL_MILLISECONDS: u64 = 5000;

    #[derive(Clone, Debug)]
    struct Network {
        /// Milliseconds to the server and back, and whether the answer is lost.
        there: u64,
        back: u64,
        lost: bool,
        /// How long the process is stopped after it acted, in milliseconds.
        away: u64,
    }

    fn networks() -> impl Strategy<Value = Vec<Network>> {
        let latency = prop_oneof![8 => 1u64..200, 1 => 1u64..20_000];
        let away = prop_oneof![8 => Just(0u64), 1 => 0u64..30_000];
        let network = (
            latency.clone(),
            latency,
            proptest::bool::weighted(0.15),
            away,
        )
            .prop_map(|(there, back, lost, away)| Network {
                there,
                back,
                lost,
                away,
            });
        proptest::collection::vec(network, 10..40)
    }

    proptest! {
        #[test]
        fn two_candidates_with_different_clocks_never_lead_at_the_same_time(
            rates in (850u64..1150, 850u64..1150),
            offset in 0u64..1_000_000,
            networks in (networks(), networks()),
        ) {
            let candidate = |name: &'static str, rate, offset, networks: Vec<Network>| Candidate {
                name, rate, offset,
                observer: Observer::new(name.to_owned()),
                tenure: None, awaited: None, next: 0, writes: 0,
                networks: networks.into_iter(),
            };
            let mut first = candidate("a", rates.0, 0, networks.0);
            let mut second = candidate("b", rates.1, offset, networks.1);
            let mut server = Server::default();
            // Two scripts of 40 turns of at most 37 s, then some good weather.
            let end = 40 * 37_000 + 120_000;
            for real in (0..end).step_by(50) {
                server.advance(real);
                first.turn(&mut server, real);
                second.turn(&mut server, real);
                prop_assert!(!(first.leads(real) && second.leads(real)), "two leaders at {} ms", real);
            }
            prop_assert!(first.leads(end) || second.leads(end), "nobody leads in good weather");
        }
    }
}
