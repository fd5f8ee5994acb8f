//! Who may build: a bounded number of builds per node, first come first served
//! within a namespace, the namespaces in turn.
//!
//! Level-triggered: what counts is the builds that are seen to run, so that an
//! agent that was restarted counts right. A slot that was given and whose build
//! is not seen yet is counted too. Waiting holds nothing.

use std::collections::{BTreeSet, VecDeque};

use super::view::SlotView;
use crate::api::names::AppName;

/// The build slots of a node.
#[derive(Debug, Clone)]
pub struct Slots {
    limit: usize,
    /// Given, and their build not seen yet.
    given: BTreeSet<AppName>,
    /// Namespaces in turn, each with those who wait.
    waiting: VecDeque<(String, VecDeque<AppName>)>,
}

impl Slots {
    /// `limit` builds at once.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            given: BTreeSet::new(),
            waiting: VecDeque::new(),
        }
    }

    /// Asks for a slot, or asks how far it is. `running` are the apps whose builds are seen.
    pub fn ask(&mut self, app: &AppName, running: &BTreeSet<AppName>) -> SlotView {
        self.given.retain(|given| !running.contains(given));
        if self.given.contains(app) {
            return SlotView::Granted;
        }
        if !self.waiting.iter().any(|(_, apps)| apps.contains(app)) {
            match self
                .waiting
                .iter_mut()
                .find(|(namespace, _)| namespace == app.namespace())
            {
                Some((_, apps)) => apps.push_back(app.clone()),
                None => self
                    .waiting
                    .push_back((app.namespace().to_owned(), VecDeque::from([app.clone()]))),
            }
        }
        let order = self.order();
        let position = order.iter().position(|waiting| waiting == app).unwrap_or(0);
        let free = self.limit.saturating_sub(self.given.len() + running.len());
        if position < free {
            self.take(app);
            self.given.insert(app.clone());
            return SlotView::Granted;
        }
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        SlotView::Queued {
            position: number(position + 1),
            of: number(order.len()),
        }
    }

    /// The app wants no slot any more, or has not used the one it was given.
    /// Whether it had one or waited.
    pub fn withdraw(&mut self, app: &AppName) -> bool {
        let mut changed = self.given.remove(app);
        for (_, apps) in &mut self.waiting {
            let before = apps.len();
            apps.retain(|waiting| waiting != app);
            changed |= apps.len() != before;
        }
        self.waiting.retain(|(_, apps)| !apps.is_empty());
        changed
    }

    /// All who wait, in the order in which they will be served.
    pub fn order(&self) -> Vec<AppName> {
        let longest = self
            .waiting
            .iter()
            .map(|(_, apps)| apps.len())
            .max()
            .unwrap_or(0);
        (0..longest)
            .flat_map(|turn| {
                self.waiting
                    .iter()
                    .filter_map(move |(_, apps)| apps.get(turn))
                    .cloned()
            })
            .collect()
    }

    /// Takes an app out of the queue; its namespace goes to the end.
    fn take(&mut self, app: &AppName) {
        if let Some(at) = self
            .waiting
            .iter()
            .position(|(namespace, _)| namespace == app.namespace())
            && let Some((namespace, mut apps)) = self.waiting.remove(at)
        {
            apps.retain(|waiting| waiting != app);
            if !apps.is_empty() {
                self.waiting.push_back((namespace, apps));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(text: &str) -> AppName {
        AppName::parse(text).unwrap()
    }

    fn running(apps: &[&str]) -> BTreeSet<AppName> {
        apps.iter().map(|text| app(text)).collect()
    }

    #[test]
    fn slots_are_given_up_to_the_limit_and_the_rest_waits_in_order() {
        let mut slots = Slots::new(2);
        assert_eq!(slots.ask(&app("a.x"), &running(&[])), SlotView::Granted);
        assert_eq!(slots.ask(&app("a.y"), &running(&[])), SlotView::Granted);
        assert_eq!(
            slots.ask(&app("a.z"), &running(&["a.x"])),
            SlotView::Queued { position: 1, of: 1 }
        );
        assert_eq!(
            slots.ask(&app("a.w"), &running(&["a.x", "a.y"])),
            SlotView::Queued { position: 2, of: 2 }
        );
        // The later one does not overtake when a slot comes free.
        assert_eq!(
            slots.ask(&app("a.w"), &running(&["a.y"])),
            SlotView::Queued { position: 2, of: 2 }
        );
        assert_eq!(
            slots.ask(&app("a.z"), &running(&["a.y"])),
            SlotView::Granted
        );
        assert_eq!(
            slots.ask(&app("a.z"), &running(&["a.y"])),
            SlotView::Granted,
            "asking again changes nothing"
        );
    }

    #[test]
    fn a_namespace_with_many_builds_does_not_keep_another_waiting() {
        let mut slots = Slots::new(1);
        let busy = running(&["c.c"]);
        for name in ["a.1", "a.2", "a.3", "b.1"] {
            slots.ask(&app(name), &busy);
        }
        let order: Vec<String> = slots.order().iter().map(ToString::to_string).collect();
        assert_eq!(order, ["a.1", "b.1", "a.2", "a.3"]);
        assert_eq!(slots.ask(&app("a.1"), &running(&[])), SlotView::Granted);
        let order: Vec<String> = slots.order().iter().map(ToString::to_string).collect();
        assert_eq!(order, ["b.1", "a.2", "a.3"]);
    }

    #[test]
    fn builds_that_run_since_before_the_agent_started_count() {
        let mut slots = Slots::new(1);
        assert_eq!(
            slots.ask(&app("a.x"), &running(&["z.z"])),
            SlotView::Queued { position: 1, of: 1 }
        );
    }

    #[test]
    fn who_withdraws_makes_room() {
        let mut slots = Slots::new(1);
        assert_eq!(slots.ask(&app("a.x"), &running(&[])), SlotView::Granted);
        assert_eq!(
            slots.ask(&app("a.y"), &running(&[])),
            SlotView::Queued { position: 1, of: 1 }
        );
        slots.withdraw(&app("a.x"));
        assert_eq!(slots.ask(&app("a.y"), &running(&[])), SlotView::Granted);
    }
}
