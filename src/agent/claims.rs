//! Which app of the node has which host names: what is served, and what is about
//! to be or may be gone back to.
//!
//! A host belongs to one app. One that wants another's waits, and is named when
//! that one gives hosts up. Pure; the caller holds the lock from reading what is
//! served to the claim, so of two that come at the same instant one is first.

use std::collections::{BTreeMap, BTreeSet};

use super::host::proxy::{HostName, route_conflicts};
use crate::api::names::AppName;

/// The claims of a node's apps.
#[derive(Debug, Default)]
pub struct Claims {
    /// From the choice of an attempt's units to its end, the hosts of it and of what is committed: it may go
    /// either way.
    held: BTreeMap<AppName, Vec<HostName>>,
    /// Who waits for hosts of whom.
    waiting: BTreeMap<AppName, BTreeSet<AppName>>,
}

impl Claims {
    /// Claims `hosts` for an app. If others serve or hold some of them, nothing is claimed and those are
    /// given back.
    pub fn claim(
        &mut self,
        app: &AppName,
        hosts: Vec<HostName>,
        served: &BTreeMap<AppName, Vec<HostName>>,
    ) -> Vec<(HostName, AppName)> {
        let conflicts: BTreeSet<(HostName, AppName)> = route_conflicts(app, &hosts, served)
            .into_iter()
            .chain(route_conflicts(app, &hosts, &self.held))
            .map(|(host, other)| (host.clone(), other.clone()))
            .collect();
        if conflicts.is_empty() {
            self.waiting.remove(app);
            self.held.insert(app.clone(), hosts);
        } else {
            let others = conflicts.iter().map(|(_, other)| other.clone()).collect();
            self.waiting.insert(app.clone(), others);
        }
        conflicts.into_iter().collect()
    }

    /// Claims what an attempt from before the agent's start had claimed.
    pub fn restore(&mut self, app: &AppName, hosts: Vec<HostName>) {
        self.held.insert(app.clone(), hosts);
    }

    /// The app has no more than it serves. Who waited for it is given back, and may look again.
    #[must_use]
    pub fn release(&mut self, app: &AppName) -> Vec<AppName> {
        self.held.remove(app);
        self.waiting
            .iter()
            .filter(|(_, others)| others.contains(app))
            .map(|(waiting, _)| waiting.clone())
            .collect()
    }

    /// The app wants nothing any more.
    pub fn withdraw(&mut self, app: &AppName) {
        self.waiting.remove(app);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(name: &str) -> AppName {
        AppName::parse(name).unwrap_or_else(|e| panic!("{e}"))
    }

    fn hosts(names: &[&str]) -> Vec<HostName> {
        let parse = |name: &&str| HostName::parse(name).unwrap_or_else(|e| panic!("{e}"));
        names.iter().map(parse).collect()
    }

    fn names(conflicts: &[(HostName, AppName)]) -> Vec<String> {
        let text = |(host, app): &(HostName, AppName)| format!("{host} of {app}");
        conflicts.iter().map(text).collect()
    }

    #[test]
    fn the_first_to_claim_has_the_host_and_who_waits_for_it_is_named_when_it_is_free() {
        let mut claims = Claims::default();
        let served = BTreeMap::new();
        assert!(
            claims
                .claim(&app("n.a"), hosts(&["x", "y"]), &served)
                .is_empty()
        );
        let refused = claims.claim(&app("n.b"), hosts(&["z", "y"]), &served);
        assert_eq!(names(&refused), ["y of n.a"]);
        // What was refused claims nothing.
        assert!(claims.claim(&app("n.c"), hosts(&["z"]), &served).is_empty());
        assert_eq!(claims.release(&app("n.c")), []);
        assert_eq!(claims.release(&app("n.a")), [app("n.b")]);
        assert!(
            claims
                .claim(&app("n.b"), hosts(&["z", "y"]), &served)
                .is_empty()
        );
        // It waits for nobody any more.
        assert_eq!(claims.release(&app("n.a")), []);
    }

    #[test]
    fn what_is_served_is_not_given_away_and_an_apps_own_is_no_conflict() {
        let mut claims = Claims::default();
        let served = BTreeMap::from([(app("n.a"), hosts(&["x"]))]);
        assert!(
            claims
                .claim(&app("n.a"), hosts(&["x", "y"]), &served)
                .is_empty()
        );
        assert!(
            claims
                .claim(&app("n.a"), hosts(&["x", "y"]), &served)
                .is_empty()
        );
        let refused = claims.claim(&app("n.b"), hosts(&["x"]), &served);
        // Served and claimed is one reason, told once.
        assert_eq!(names(&refused), ["x of n.a"]);
        claims.withdraw(&app("n.b"));
        assert_eq!(claims.release(&app("n.a")), []);
    }

    #[test]
    fn a_restored_claim_goes_before_one_that_was_not_made() {
        let mut claims = Claims::default();
        claims.restore(&app("n.a"), hosts(&["x"]));
        let refused = claims.claim(&app("n.b"), hosts(&["x"]), &BTreeMap::new());
        assert_eq!(names(&refused), ["x of n.a"]);
    }
}
