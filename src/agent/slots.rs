//! Who may build: a bounded number of builds per node, first come first served
//! within a namespace, the namespaces in turn.
//!
//! Level-triggered: each look at an app says whether a build of it is there, and
//! a slot is taken from before the build starts until its unit is seen to be
//! gone. What ran before the agent started is said first ([`Slots::resume`]).
//! Waiting holds nothing.

use std::collections::BTreeSet;

use super::host::turns::Turns;
use super::view::SlotView;
use crate::api::names::AppName;

/// The build slots of a node.
#[derive(Debug, Clone)]
pub struct Slots {
    limit: usize,
    /// Given, and their build not seen yet.
    given: BTreeSet<AppName>,
    /// A build of theirs was seen, and not yet seen to be gone.
    building: BTreeSet<AppName>,
    waiting: Turns<AppName>,
}

/// What a look at an app says of its build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BuildSeen {
    /// There is one: it runs, is being stopped, or its result is not taken in yet.
    There,
    /// There is none, and the next step is to start one.
    Wanted,
    /// There is none, and none is to be started now.
    None,
}

impl Slots {
    /// `limit` builds at once.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            given: BTreeSet::new(),
            building: BTreeSet::new(),
            waiting: Turns::default(),
        }
    }

    /// Builds that are there when the agent starts. Each app has to be looked at.
    pub fn resume(&mut self, apps: impl IntoIterator<Item = AppName>) {
        self.building.extend(apps);
    }

    /// Takes in a look at an app, and says whether it may build; with the apps that have to be looked at,
    /// as they may build now or stand elsewhere in the queue.
    pub fn look(&mut self, app: &AppName, seen: BuildSeen) -> (SlotView, Vec<AppName>) {
        match seen {
            BuildSeen::There => {
                // Before it is taken out of those to whom a slot was given: it is not free for a moment.
                self.building.insert(app.clone());
                (SlotView::Unasked, self.withdraw(app))
            }
            BuildSeen::None => {
                self.building.remove(app);
                (SlotView::Unasked, self.withdraw(app))
            }
            BuildSeen::Wanted => {
                self.building.remove(app);
                let view = self.ask(app);
                let wake = match view {
                    SlotView::Granted => self.order(),
                    SlotView::Unasked | SlotView::Queued { .. } => self.next(),
                };
                (view, wake)
            }
        }
    }

    /// Asks for a slot, or asks how far it is.
    fn ask(&mut self, app: &AppName) -> SlotView {
        if self.given.contains(app) {
            return SlotView::Granted;
        }
        self.waiting.push(app.namespace(), app.clone());
        let order = self.order();
        let position = order.iter().position(|waiting| waiting == app).unwrap_or(0);
        if position < self.free() {
            self.waiting.serve(app);
            self.given.insert(app.clone());
            return SlotView::Granted;
        }
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        SlotView::Queued {
            position: number(position + 1),
            of: number(order.len()),
        }
    }

    fn free(&self) -> usize {
        self.limit
            .saturating_sub(self.given.union(&self.building).count())
    }

    /// The app wants no slot any more, or has not used the one it was given; what a build holds stays held.
    /// The apps that have to be looked at.
    pub fn withdraw(&mut self, app: &AppName) -> Vec<AppName> {
        self.given.remove(app);
        let waited = self.waiting.remove(app);
        if waited { self.order() } else { self.next() }
    }

    /// Those who may build as soon as they are looked at.
    fn next(&self) -> Vec<AppName> {
        let mut order = self.order();
        order.truncate(self.free());
        order
    }

    /// All who wait, in the order in which they will be served.
    fn order(&self) -> Vec<AppName> {
        self.waiting.order().into_iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn app(text: &str) -> AppName {
        AppName::parse(text).unwrap()
    }

    fn order(slots: &Slots) -> Vec<String> {
        slots.order().iter().map(ToString::to_string).collect()
    }

    fn look(slots: &mut Slots, name: &str, seen: BuildSeen) -> SlotView {
        slots.look(&app(name), seen).0
    }

    fn queued(position: u32, of: u32) -> SlotView {
        SlotView::Queued { position, of }
    }

    use BuildSeen::{None as Nothing, There, Wanted};

    #[test]
    fn slots_are_given_up_to_the_limit_and_the_rest_waits_in_order() {
        let mut slots = Slots::new(2);
        for (name, seen, view) in [
            ("a.x", Wanted, SlotView::Granted),
            ("a.y", Wanted, SlotView::Granted),
            ("a.z", Wanted, queued(1, 1)),
            ("a.x", There, SlotView::Unasked),
            ("a.w", Wanted, queued(2, 2)),
            ("a.y", There, SlotView::Unasked),
            ("a.z", Wanted, queued(1, 2)),
            // One ends: who came later does not overtake.
            ("a.x", Nothing, SlotView::Unasked),
            ("a.w", Wanted, queued(2, 2)),
            ("a.z", Wanted, SlotView::Granted),
            ("a.z", Wanted, SlotView::Granted),
            ("a.w", Wanted, queued(1, 1)),
            // A build that ended and is to run again waits behind those who wait.
            ("a.y", Wanted, queued(2, 2)),
            ("a.w", Wanted, SlotView::Granted),
        ] {
            assert_eq!(
                look(&mut slots, name, seen),
                view,
                "{name} {seen:?}: {slots:?}"
            );
        }
    }

    #[test]
    fn a_slot_is_held_until_its_build_is_seen_to_be_gone() {
        let mut slots = Slots::new(1);
        assert_eq!(look(&mut slots, "a.x", Wanted), SlotView::Granted);
        look(&mut slots, "a.x", There);
        assert_eq!(look(&mut slots, "a.y", Wanted), queued(1, 1));
        // A newer wish: the old build is still being stopped.
        slots.withdraw(&app("a.x"));
        assert_eq!(look(&mut slots, "a.y", Wanted), queued(1, 1));
        look(&mut slots, "a.x", There);
        assert_eq!(look(&mut slots, "a.y", Wanted), queued(1, 1));
        let woken = slots.look(&app("a.x"), Nothing).1;
        assert_eq!(woken, [app("a.y")]);
        assert_eq!(look(&mut slots, "a.y", Wanted), SlotView::Granted);
    }

    #[test]
    fn a_namespace_with_many_builds_does_not_keep_another_waiting() {
        let mut slots = Slots::new(1);
        slots.resume([app("z.z")]);
        for name in ["a.1", "a.2", "a.3", "b.1"] {
            look(&mut slots, name, Wanted);
        }
        assert_eq!(order(&slots), ["a.1", "b.1", "a.2", "a.3"]);
        look(&mut slots, "z.z", Nothing);
        assert_eq!(look(&mut slots, "b.1", Wanted), queued(2, 4));
        assert_eq!(look(&mut slots, "a.1", Wanted), SlotView::Granted);
        assert_eq!(look(&mut slots, "a.2", Wanted), queued(2, 3));
        assert_eq!(look(&mut slots, "b.1", Wanted), queued(1, 3));
    }

    #[test]
    fn builds_that_run_since_before_the_agent_started_count() {
        let mut slots = Slots::new(1);
        slots.resume([app("z.z")]);
        assert_eq!(look(&mut slots, "a.x", Wanted), queued(1, 1));
        look(&mut slots, "z.z", Nothing);
        assert_eq!(look(&mut slots, "a.x", Wanted), SlotView::Granted);
    }

    #[test]
    fn who_withdraws_makes_room() {
        let mut slots = Slots::new(1);
        assert_eq!(look(&mut slots, "a.x", Wanted), SlotView::Granted);
        assert_eq!(look(&mut slots, "a.y", Wanted), queued(1, 1));
        assert_eq!(slots.withdraw(&app("a.x")), [app("a.y")]);
        assert_eq!(look(&mut slots, "a.y", Wanted), SlotView::Granted);
    }

    #[test]
    fn who_moves_up_is_looked_at() {
        let mut slots = Slots::new(1);
        slots.resume([app("z.z")]);
        for name in ["a.x", "a.y", "a.z"] {
            assert_eq!(slots.look(&app(name), Wanted).1, [], "{name}");
        }
        assert_eq!(slots.look(&app("z.z"), Nothing).1, [app("a.x")]);
        assert_eq!(slots.look(&app("a.x"), Wanted).1, [app("a.y"), app("a.z")]);
        assert_eq!(look(&mut slots, "a.z", Wanted), queued(2, 2));
        assert_eq!(slots.look(&app("a.y"), Nothing).1, [app("a.z")]);
        assert_eq!(look(&mut slots, "a.z", Wanted), queued(1, 1));
    }

    proptest! {
        /// However looks come: no more builds than slots, nobody granted twice over, and no slot stays empty
        /// while somebody waits and everybody is looked at.
        #[test]
        fn no_order_of_looks_gives_more_slots_than_there_are_or_leaves_one_unused(
            limit in 1_usize..4,
            looks in prop::collection::vec((0_usize..6, 0_u8..4), 1..80),
        ) {
            let names = ["a.1", "a.2", "a.3", "b.1", "b.2", "c.1"].map(app);
            let mut slots = Slots::new(limit);
            let mut builds = [false; 6];
            let mut wants = [false; 6];
            for (at, what) in looks {
                match what {
                    0 => wants[at] = true,
                    1 => wants[at] = false,
                    2 => { builds[at] = false; wants[at] = false; }
                    _ => {}
                }
                let seen = match (builds[at], wants[at]) {
                    (true, _) => There,
                    (false, true) => Wanted,
                    (false, false) => Nothing,
                };
                if slots.look(&names[at], seen).0 == SlotView::Granted {
                    builds[at] = true;
                }
                prop_assert!(builds.iter().filter(|b| **b).count() <= limit, "{slots:?}");
            }
            // Everybody is looked at twice: first what has ended, then what may begin.
            for _ in 0..2 {
                for at in 0..6 {
                    let seen = if builds[at] { There } else if wants[at] { Wanted } else { Nothing };
                    if slots.look(&names[at], seen).0 == SlotView::Granted {
                        builds[at] = true;
                    }
                }
            }
            let running = builds.iter().filter(|b| **b).count();
            let idle = (0..6).filter(|at| wants[*at] && !builds[*at]).count();
            prop_assert!(running <= limit && (running == limit || idle == 0), "{running} run, {idle} wait: {slots:?}");
        }
    }
}
