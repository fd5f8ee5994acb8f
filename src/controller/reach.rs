//! How fresh the nodes' Leases are, by this process's own clock. A plain state machine that is told the
//! time.
//!
//! Invariant: no two clocks are compared. A Lease is fresh when *this* process saw its renewTime change
//! lately; one that it has not watched for as long as a Lease lasts says nothing yet.

use std::collections::HashMap;
use std::time::Duration;

use crate::api::names::NodeName;
use crate::runtime::node_lease::DURATION_SECONDS;
use crate::seal::{KeyId, NodePublicKey};

use super::observed::Reach;

/// After how long without a change a Lease is stale.
pub const STALE_AFTER: Duration = Duration::from_secs(DURATION_SECONDS.unsigned_abs() as u64);

/// The Leases of all nodes.
#[derive(Debug, Default)]
pub struct Leases {
    entries: HashMap<NodeName, Entry>,
    /// What [`Leases::changes`] has told.
    told: HashMap<NodeName, Told>,
}

/// What anything may depend on.
type Told = (Reach, Option<KeyId>);

#[derive(Debug)]
struct Entry {
    /// Opaque: only compared with itself.
    renewal: String,
    key: Option<NodePublicKey>,
    first_seen: Duration,
    last_changed: Option<Duration>,
}

impl Leases {
    /// The Lease of `node` was there when the watch began.
    pub fn found(
        &mut self,
        node: NodeName,
        renewal: String,
        key: Option<NodePublicKey>,
        now: Duration,
    ) {
        self.entries.entry(node).or_insert(Entry {
            renewal,
            key,
            first_seen: now,
            last_changed: None,
        });
    }

    /// The Lease of `node` was made or changed.
    pub fn changed(
        &mut self,
        node: NodeName,
        renewal: String,
        key: Option<NodePublicKey>,
        now: Duration,
    ) {
        match self.entries.get_mut(&node) {
            Some(entry) => {
                entry.key = key;
                if entry.renewal != renewal {
                    entry.renewal = renewal;
                    entry.last_changed = Some(now);
                }
            }
            None => {
                let entry = Entry {
                    renewal,
                    key,
                    first_seen: now,
                    last_changed: Some(now),
                };
                self.entries.insert(node, entry);
            }
        }
    }

    /// The Lease of `node` is gone.
    pub fn removed(&mut self, node: &NodeName) {
        self.entries.remove(node);
    }

    /// What is known of the agent of `node`.
    pub fn reach(&self, node: &NodeName, now: Duration) -> Reach {
        let Some(entry) = self.entries.get(node) else {
            return Reach::NoAgent;
        };
        let age = |since: Duration| now.saturating_sub(since);
        match entry.last_changed {
            Some(changed) if age(changed) < STALE_AFTER => Reach::Fresh,
            None if age(entry.first_seen) < STALE_AFTER => Reach::Unknown,
            Some(_) | None => Reach::Stale,
        }
    }

    /// What values for `node` are sealed to, if its agent has said so.
    pub fn key(&self, node: &NodeName) -> Option<&NodePublicKey> {
        self.entries.get(node)?.key.as_ref()
    }

    /// The nodes of which something else is known than when this was last called.
    pub fn changes(&mut self, now: Duration) -> Vec<NodeName> {
        let mut changed = Vec::new();
        for (node, entry) in &self.entries {
            let known = (
                self.reach(node, now),
                entry.key.as_ref().map(NodePublicKey::id),
            );
            if self.told.get(node) != Some(&known) {
                changed.push((node.clone(), Some(known)));
            }
        }
        for node in self.told.keys().filter(|n| !self.entries.contains_key(n)) {
            changed.push((node.clone(), None));
        }
        changed
            .into_iter()
            .map(|(node, known)| {
                match known {
                    Some(known) => self.told.insert(node.clone(), known),
                    None => self.told.remove(&node),
                };
                node
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::NodeKey;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_lease_is_fresh_for_as_long_as_it_is_seen_to_change() {
        let node = NodeName::new("n1");
        let mut leases = Leases::default();
        assert_eq!(leases.reach(&node, at(0)), Reach::NoAgent);
        leases.found(node.clone(), "1".into(), None, at(0));
        assert_eq!(leases.reach(&node, at(39)), Reach::Unknown);
        leases.changed(node.clone(), "1".into(), None, at(5));
        assert_eq!(
            leases.reach(&node, at(39)),
            Reach::Unknown,
            "told again is not changed"
        );
        assert_eq!(leases.reach(&node, at(40)), Reach::Stale);
        leases.changed(node.clone(), "2".into(), None, at(50));
        assert_eq!(leases.reach(&node, at(89)), Reach::Fresh);
        assert_eq!(leases.reach(&node, at(90)), Reach::Stale);
        leases.removed(&node);
        assert_eq!(leases.reach(&node, at(90)), Reach::NoAgent);
        leases.changed(node.clone(), "1".into(), None, at(91));
        assert_eq!(
            leases.reach(&node, at(91)),
            Reach::Fresh,
            "a new one is a change"
        );
    }

    #[test]
    fn a_change_is_told_once_and_a_renewal_is_none() {
        let node = NodeName::new("n1");
        let mut leases = Leases::default();
        leases.changed(node.clone(), "1".into(), None, at(0));
        assert_eq!(leases.changes(at(0)), std::slice::from_ref(&node));
        assert_eq!(leases.changes(at(1)), []);
        leases.changed(node.clone(), "2".into(), None, at(10));
        assert_eq!(leases.changes(at(10)), []);
        let key = || Some(NodeKey::generate().public().clone());
        leases.changed(node.clone(), "2".into(), key(), at(10));
        assert_eq!(
            leases.changes(at(10)),
            std::slice::from_ref(&node),
            "its first key"
        );
        leases.changed(node.clone(), "2".into(), key(), at(10));
        assert_eq!(
            leases.changes(at(10)),
            std::slice::from_ref(&node),
            "another key"
        );
        assert_eq!(leases.changes(at(10)), []);
        assert_eq!(leases.changes(at(50)), std::slice::from_ref(&node));
        leases.removed(&node);
        assert_eq!(leases.changes(at(51)), std::slice::from_ref(&node));
        assert_eq!(leases.changes(at(52)), []);
    }
}
