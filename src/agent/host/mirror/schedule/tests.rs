use proptest::prelude::*;

use super::*;
use crate::agent::host::mirror::refs::Finding;
use crate::api::names::Commit;

fn app(name: &str) -> AppName {
    AppName::parse(name).unwrap_or_else(|e| panic!("{e}"))
}

fn commit(digit: char) -> Commit {
    Commit::parse(&digit.to_string().repeat(40)).unwrap_or_else(|e| panic!("{e}"))
}

fn want(url: &str, digit: char) -> Want {
    let source = SourceUrl::parse(url).unwrap_or_else(|e| panic!("{e}"));
    Want {
        source,
        reference: None,
        commit: commit(digit),
        base: None,
        submodules: false,
        credential: None,
    }
}

fn key(url: &str) -> MirrorKey {
    want(url, 'a').key()
}

fn seen(unit: Unit, held: &[(&str, char)]) -> Seen {
    Seen {
        unit,
        held: held
            .iter()
            .map(|(name, digit)| {
                let held = Held {
                    commit: commit(*digit),
                    finding: None,
                };
                (app(name), held)
            })
            .collect(),
    }
}

fn ended(result: &str, status: i32, log: &str) -> Unit {
    Unit::Ended {
        result: StepResult {
            result: result.into(),
            code: 1,
            status,
        },
        log: log.into(),
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const A: &str = "https://h/a";
const B: &str = "https://h/b";
const NOW: Duration = Duration::from_secs(1000);

/// One app that wants commit `a` of A.
fn one(slots: usize) -> Schedule {
    let mut schedule = Schedule::new(slots);
    schedule.want(NOW, &app("web.shop"), want(A, 'a'), "/m/a.git".into());
    schedule
}

fn state(schedule: &Schedule, name: &str) -> Option<MirrorState> {
    schedule.state(NOW, &app(name))
}

#[test]
fn apps_that_want_of_one_mirror_share_a_fetch() {
    let mut schedule = one(4);
    schedule.want(NOW, &app("web.blog"), want(A, 'a'), "/m/a.git".into());
    schedule.want(NOW, &app("web.wiki"), want(A, 'b'), "/m/a.git".into());
    assert_eq!(
        schedule.take_in(NOW, 0.0, &key(A), seen(Unit::Absent, &[])),
        Action::Nothing
    );
    let start = schedule
        .next_start()
        .unwrap_or_else(|| panic!("nothing is started"));
    assert_eq!(start.holds.len(), 3);
    assert_eq!(start.mode, Mode::Fetch);
    assert_eq!(schedule.next_start(), None);
    assert_eq!(state(&schedule, "web.wiki"), Some(MirrorState::Fetching));

    let held = [("web.shop", 'a'), ("web.blog", 'a'), ("web.wiki", 'b')];
    let action = schedule.take_in(NOW, 0.0, &key(A), seen(ended("success", 0, ""), &held));
    assert_eq!(action, Action::Stop);
    assert_eq!(
        state(&schedule, "web.blog"),
        Some(MirrorState::Ready {
            mirror: "/m/a.git".into()
        })
    );
    assert_eq!(schedule.next_start(), None);
}

#[test]
fn a_commit_that_the_mirror_holds_needs_no_fetch() {
    let mut schedule = one(1);
    schedule.take_in(NOW, 0.0, &key(A), seen(Unit::Absent, &[("web.shop", 'a')]));
    assert!(matches!(
        state(&schedule, "web.shop"),
        Some(MirrorState::Ready { .. })
    ));
    assert_eq!(schedule.next_start(), None);
}

#[test]
fn what_was_refused_is_not_fetched_again_before_something_else_is_wanted() {
    let mut schedule = one(1);
    let bound = Want {
        base: Some(commit('b')),
        ..want(A, 'a')
    };
    let shop = app("web.shop");
    schedule.want(NOW, &shop, bound.clone(), "/m/a.git".into());
    let refusal = Some((Reason::RewindRefused, String::new()));
    let mut look = seen(Unit::Absent, &[("web.shop", 'a')]);
    let here = look.held.get_mut(&shop).unwrap_or_else(|| panic!("held"));
    // That the commit is there says nothing of its base.
    assert_eq!(here.answer(&bound), None);
    here.finding = Some(Finding::of(&bound, refusal));
    schedule.take_in(NOW, 0.0, &key(A), look.clone());
    match state(&schedule, "web.shop") {
        Some(MirrorState::Refused(failure)) => {
            assert_eq!(failure.reason, Reason::RewindRefused);
            for word in ["aaaaaaa", "bbbbbbb", "allowRewind"] {
                assert!(failure.message.contains(word), "{failure}");
            }
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(schedule.next_start(), None);
    assert_eq!(schedule.next_deadline(), None);

    // Another base is another question.
    let other = Want {
        base: Some(commit('c')),
        ..want(A, 'a')
    };
    schedule.want(NOW, &shop, other, "/m/a.git".into());
    schedule.take_in(NOW, 0.0, &key(A), look.clone());
    assert!(schedule.next_start().is_some());
    schedule.take_in(NOW, 0.0, &key(A), seen(Unit::Absent, &[]));

    // And none at all is none.
    schedule.want(NOW, &shop, want(A, 'a'), "/m/a.git".into());
    schedule.take_in(NOW, 0.0, &key(A), look);
    assert!(matches!(
        state(&schedule, "web.shop"),
        Some(MirrorState::Ready { .. })
    ));
}

#[test]
fn mirrors_wait_for_a_slot_in_the_order_of_their_asking_and_see_their_place() {
    let mut schedule = one(1);
    schedule.want(NOW, &app("web.blog"), want(B, 'b'), "/m/b.git".into());
    schedule.want(
        NOW,
        &app("web.wiki"),
        want("https://h/c", 'c'),
        "/m/c.git".into(),
    );
    // The order of the looks is none of it.
    for url in ["https://h/c", B, A] {
        schedule.take_in(NOW, 0.0, &key(url), seen(Unit::Absent, &[]));
    }
    assert_eq!(schedule.next_start().map(|start| start.key), Some(key(A)));
    assert_eq!(schedule.next_start(), None);
    assert_eq!(
        state(&schedule, "web.blog"),
        Some(MirrorState::Queued { position: 1, of: 2 })
    );
    assert_eq!(
        state(&schedule, "web.wiki"),
        Some(MirrorState::Queued { position: 2, of: 2 })
    );
    // Another namespace has its turn before the second of this one.
    let other = "https://h/other";
    schedule.want(NOW, &app("shop.web"), want(other, 'd'), "/m/o.git".into());
    assert_eq!(
        state(&schedule, "shop.web"),
        Some(MirrorState::Queued { position: 2, of: 3 })
    );
    schedule.take_in(
        NOW,
        0.0,
        &key(A),
        seen(ended("success", 0, ""), &[("web.shop", 'a')]),
    );
    assert_eq!(schedule.next_start().map(|start| start.key), Some(key(B)));
}

#[test]
fn a_failed_fetch_is_tried_again_after_5_s_to_10_min_and_a_success_forgets_the_failures() {
    let mut schedule = one(1);
    let mut now = NOW;
    let mut waits = Vec::new();
    for _ in 0..10 {
        schedule.take_in(now, 1.0, &key(A), seen(Unit::Absent, &[]));
        assert!(schedule.next_start().is_some());
        let log = "fatal: unable to access 'https://h/a/': Could not resolve host: h\n";
        schedule.take_in(now, 1.0, &key(A), seen(ended("exit-code", 128, log), &[]));
        assert_eq!(schedule.next_start(), None, "not before its time");
        let next = schedule.next_deadline().unwrap_or_default();
        waits.push((next - now).as_secs());
        now = next;
    }
    assert_eq!(waits, [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]);
    match schedule.state(now - seconds(1), &app("web.shop")) {
        Some(MirrorState::Failed { failure, retry_in }) => {
            assert_eq!(
                (failure.reason, retry_in),
                (Reason::SourceUnavailable, seconds(1))
            );
        }
        other => panic!("{other:?}"),
    }
    schedule.take_in(now, 1.0, &key(A), seen(Unit::Absent, &[]));
    assert!(schedule.next_start().is_some());
    schedule.take_in(
        now,
        1.0,
        &key(A),
        seen(ended("success", 0, ""), &[("web.shop", 'a')]),
    );
    assert_eq!(schedule.next_deadline(), None);
}

#[test]
fn another_commit_does_not_wait_for_one_that_was_missing() {
    let mut schedule = one(1);
    schedule.take_in(NOW, 1.0, &key(A), seen(Unit::Absent, &[]));
    assert!(schedule.next_start().is_some());
    schedule.take_in(
        NOW,
        1.0,
        &key(A),
        seen(
            ended("exit-code", 20, "kari: the repository has no commit aaa\n"),
            &[],
        ),
    );
    assert!(
        matches!(state(&schedule, "web.shop"), Some(MirrorState::Failed { failure, .. }) if failure.reason == Reason::RefNotFound)
    );
    schedule.want(NOW, &app("web.shop"), want(A, 'b'), "/m/a.git".into());
    schedule.take_in(NOW, 1.0, &key(A), seen(Unit::Absent, &[]));
    assert!(schedule.next_start().is_some());
}

#[test]
fn a_damaged_mirror_is_made_anew_once_and_an_unclear_failure_is_looked_into() {
    let mut schedule = one(1);
    let fail = |schedule: &mut Schedule, now, log: &str, status| {
        schedule.take_in(now, 1.0, &key(A), seen(Unit::Absent, &[]));
        let mode = schedule.next_start().map(|start| start.mode);
        (
            mode,
            schedule.take_in(
                now,
                1.0,
                &key(A),
                seen(ended("exit-code", status, log), &[]),
            ),
        )
    };
    let corrupt =
        "error: object file objects/ab/cd is empty\nfatal: loose object abcd is corrupt\n";
    assert_eq!(
        fail(&mut schedule, NOW, "something new\n", 1),
        (Some(Mode::Fetch), Action::Stop)
    );
    assert_eq!(
        fail(&mut schedule, NOW + seconds(60), corrupt, 21),
        (Some(Mode::Check), Action::StopAndDrop)
    );
    assert_eq!(
        fail(&mut schedule, NOW + seconds(60), corrupt, 128),
        (Some(Mode::Fetch), Action::Stop)
    );
    assert_eq!(
        fail(&mut schedule, NOW + seconds(600), corrupt, 128),
        (Some(Mode::Fetch), Action::Stop)
    );
}

#[test]
fn a_suspected_mirror_gives_no_commit_before_it_was_looked_through() {
    let mut schedule = one(1);
    schedule.take_in(NOW, 0.0, &key(A), seen(Unit::Absent, &[("web.shop", 'a')]));
    schedule.suspect(&app("web.shop"));
    assert!(matches!(
        state(&schedule, "web.shop"),
        Some(MirrorState::Queued { .. })
    ));
    schedule.take_in(NOW, 0.0, &key(A), seen(Unit::Absent, &[("web.shop", 'a')]));
    assert_eq!(
        schedule.next_start().map(|start| start.mode),
        Some(Mode::Check)
    );
    schedule.take_in(
        NOW,
        0.0,
        &key(A),
        seen(ended("success", 0, ""), &[("web.shop", 'a')]),
    );
    assert!(matches!(
        state(&schedule, "web.shop"),
        Some(MirrorState::Ready { .. })
    ));
}

#[test]
fn a_fetch_that_nobody_wants_is_stopped_and_one_of_before_a_restart_is_taken_up() {
    let mut schedule = one(1);
    assert_eq!(
        schedule.take_in(NOW, 0.0, &key(A), seen(Unit::Running, &[])),
        Action::Nothing
    );
    assert_eq!(state(&schedule, "web.shop"), Some(MirrorState::Fetching));
    assert_eq!(schedule.next_start(), None);
    schedule.unwant(&app("web.shop"));
    assert_eq!(
        schedule.take_in(NOW, 0.0, &key(A), seen(Unit::Running, &[])),
        Action::Stop
    );
    assert_eq!(schedule.mirrors().count(), 0);
    assert_eq!(state(&schedule, "web.shop"), None);
}

#[test]
fn an_app_that_changes_its_repository_wants_nothing_of_the_old_one() {
    let mut schedule = one(1);
    schedule.want(NOW, &app("web.shop"), want(B, 'b'), "/m/b.git".into());
    assert!(!schedule.is_wanted(&key(A)));
    assert!(schedule.is_wanted(&key(B)));
}

/// What may happen to three apps, two mirrors and their units.
#[derive(Debug, Clone)]
enum Event {
    Want(usize, usize, char),
    Unwant(usize),
    Look,
    End(usize, bool),
    Lose(usize),
    Suspect(usize),
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (0..3_usize, 0..2_usize, prop_oneof![Just('a'), Just('b')])
            .prop_map(|(a, m, c)| Event::Want(a, m, c)),
        (0..3_usize).prop_map(Event::Unwant),
        Just(Event::Look),
        (0..2_usize, any::<bool>()).prop_map(|(m, good)| Event::End(m, good)),
        (0..2_usize).prop_map(Event::Lose),
        (0..3_usize).prop_map(Event::Suspect),
        (0..700_u64).prop_map(Event::Pass),
    ]
}

const APPS: [&str; 3] = ["web.a", "web.b", "web.c"];
const URLS: [&str; 2] = [A, B];

/// A node whose units do what they were started for.
#[derive(Default)]
struct Node {
    running: BTreeMap<MirrorKey, Start>,
    ended: BTreeMap<MirrorKey, Unit>,
    held: BTreeMap<MirrorKey, BTreeMap<AppName, Held>>,
}

impl Node {
    fn look(&mut self, schedule: &mut Schedule, now: Duration) {
        let keys: Vec<_> = schedule.mirrors().map(|(key, ..)| key.clone()).collect();
        for key in keys {
            let unit = if self.running.contains_key(&key) {
                Unit::Running
            } else {
                self.ended.get(&key).cloned().unwrap_or(Unit::Absent)
            };
            let held = self.held.get(&key).cloned().unwrap_or_default();
            match schedule.take_in(now, 0.5, &key, Seen { unit, held }) {
                Action::Nothing => {}
                action @ (Action::Stop | Action::StopAndDrop) => {
                    self.running.remove(&key);
                    self.ended.remove(&key);
                    if action == Action::StopAndDrop {
                        self.held.remove(&key);
                    }
                }
            }
        }
        while let Some(start) = schedule.next_start() {
            assert!(
                !start.holds.is_empty() || start.mode == Mode::Check,
                "a fetch of nothing"
            );
            assert!(
                !self.ended.contains_key(&start.key),
                "the unit's name is taken"
            );
            assert!(
                self.running.insert(start.key.clone(), start).is_none(),
                "two fetches into one mirror"
            );
        }
        assert!(self.running.len() <= 1, "one slot");
    }

    fn end(&mut self, key: &MirrorKey, good: bool) {
        let Some(start) = self.running.remove(key) else {
            return;
        };
        if good {
            let held = self.held.entry(key.clone()).or_default();
            held.extend(start.holds.into_iter().map(|hold| {
                let here = Held {
                    commit: hold.want.commit,
                    finding: None,
                };
                (hold.app, here)
            }));
        }
        let unit = if good {
            ended("success", 0, "")
        } else {
            ended("exit-code", 128, "fatal: early EOF")
        };
        self.ended.insert(key.clone(), unit);
    }
}

proptest! {
    #[test]
    fn whatever_happens_one_fetch_a_mirror_and_in_the_end_every_app_has_its_commit(events in prop::collection::vec(event(), 0..60)) {
        let mut schedule = Schedule::new(1);
        let mut node = Node::default();
        let mut now = NOW;
        for event in events {
            match event {
                Event::Want(a, m, c) => schedule.want(now, &app(APPS[a]), want(URLS[m], c), "/m".into()),
                Event::Unwant(a) => schedule.unwant(&app(APPS[a])),
                Event::Look => node.look(&mut schedule, now),
                Event::End(m, good) => node.end(&key(URLS[m]), good),
                Event::Lose(m) => {
                    node.running.remove(&key(URLS[m]));
                }
                Event::Suspect(a) => schedule.suspect(&app(APPS[a])),
                Event::Pass(s) => now += seconds(s),
            }
        }
        for _ in 0..20 {
            now += LONGEST_WAIT;
            node.look(&mut schedule, now);
            for url in URLS {
                node.end(&key(url), true);
            }
        }
        node.look(&mut schedule, now);
        for (name, state) in schedule.states(now) {
            prop_assert!(matches!(state, MirrorState::Ready { .. }), "{name}: {state:?}");
        }
        prop_assert!(node.running.is_empty());
    }
}
