//! A node's sign of life: the Lease that an agent renews for its node.
//!
//! It is no election: the agent writes whatever the record says. But a record
//! that changed in another way than the agent wrote it means that a second
//! agent speaks for the same node, which is logged and counted each time.
//!
//! RBAC: get, create and update of this one Lease.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::error_chain;
use super::lease::{AttemptError, bounded};

/// How often a node's lease is renewed.
pub const RENEW: Duration = Duration::from_secs(10);

/// How long a node's lease is fresh after a renewal, in seconds: four renewals.
pub const DURATION_SECONDS: i32 = 40;

/// The pause after a failed renewal, and the least time between two writes when
/// annotations change.
const RETRY: Duration = Duration::from_secs(2);

/// Annotations with this prefix are the agent's: what it does not name is
/// removed.
const OWN_PREFIX: &str = "kari.dev/";

/// What is counted of a node's lease.
#[derive(Clone, Debug)]
pub struct NodeLeaseMetrics {
    renewals: Counter,
    failures: Counter,
    foreign_changes: Counter,
    renewed: Gauge,
}

impl NodeLeaseMetrics {
    /// Creates the metrics and registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            renewals: Counter::default(),
            failures: Counter::default(),
            foreign_changes: Counter::default(),
            renewed: Gauge::default(),
        };
        registry.register(
            "kari_node_lease_renewals",
            "Renewals of the node's lease",
            metrics.renewals.clone(),
        );
        registry.register(
            "kari_node_lease_failures",
            "Renewals that failed",
            metrics.failures.clone(),
        );
        registry.register(
            "kari_node_lease_foreign_changes",
            "Changes of the node's lease by something else, such as a second agent for this node",
            metrics.foreign_changes.clone(),
        );
        registry.register(
            "kari_node_lease_renewed_timestamp_seconds",
            "When the node's lease was last renewed, in seconds since 1970",
            metrics.renewed.clone(),
        );
        metrics
    }
}

/// Keeps the lease `name` fresh until `shutdown`: created or renewed each 10 s,
/// and soon after `annotations` change. `holder` is the node's name.
///
/// Errors are logged, counted and tried again.
pub async fn heartbeat(
    client: Client,
    namespace: &str,
    name: &str,
    holder: &str,
    mut annotations: watch::Receiver<BTreeMap<String, String>>,
    metrics: NodeLeaseMetrics,
    shutdown: CancellationToken,
) {
    let mut lease = NodeLease {
        api: Api::namespaced(client, namespace),
        name: name.to_owned(),
        holder: holder.to_owned(),
        known: None,
        attempted: Vec::new(),
        metrics,
    };
    let mut told = true;
    loop {
        let wanted = annotations.borrow_and_update().clone();
        let result = tokio::select! {
            () = shutdown.cancelled() => return,
            result = lease.renew(&wanted) => result,
        };
        let pause = match result {
            Ok(()) => RENEW,
            Err(error) => {
                lease.metrics.failures.inc();
                warn!(
                    lease = name,
                    "cannot renew the node's lease: {}",
                    error_chain(&error)
                );
                RETRY
            }
        };
        let finished = Instant::now();
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep_until(finished + pause) => continue,
            changed = annotations.changed(), if told => told = changed.is_ok(),
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep_until(finished + if told { RETRY.min(pause) } else { pause }) => {}
        }
    }
}

struct NodeLease {
    api: Api<Lease>,
    name: String,
    holder: String,
    /// As our last successful write left it.
    known: Option<Lease>,
    /// The renew times of writes since then whose effect is not known.
    attempted: Vec<MicroTime>,
    metrics: NodeLeaseMetrics,
}

impl NodeLease {
    async fn renew(&mut self, annotations: &BTreeMap<String, String>) -> Result<(), AttemptError> {
        let base = match self.known.clone() {
            Some(known) => Some(known),
            None => bounded(self.api.get_opt(&self.name)).await?,
        };
        match self.write(base, annotations).await {
            Err(error) if error.is_conflict() => {}
            result => return result,
        }
        let current = bounded(self.api.get_opt(&self.name)).await?;
        if foreign(
            self.known.as_ref(),
            &self.attempted,
            current.as_ref(),
            &self.holder,
        ) {
            self.metrics.foreign_changes.inc();
            error!(
                lease = self.name,
                "something else wrote this node's lease: is there a second agent with this node's name?"
            );
        }
        self.known = None;
        self.write(current, annotations).await
    }

    async fn write(
        &mut self,
        base: Option<Lease>,
        annotations: &BTreeMap<String, String>,
    ) -> Result<(), AttemptError> {
        let now = MicroTime(Timestamp::now());
        let lease = renewed(base, &self.name, &self.holder, annotations, &now);
        self.attempted.push(now);
        let written = if lease.metadata.resource_version.is_some() {
            bounded(self.api.replace(&self.name, &PostParams::default(), &lease)).await
        } else {
            bounded(self.api.create(&PostParams::default(), &lease)).await
        };
        match written {
            Ok(lease) => {
                self.known = Some(lease);
                self.attempted.clear();
                self.metrics.renewals.inc();
                self.metrics.renewed.set(Timestamp::now().as_second());
                Ok(())
            }
            Err(AttemptError::Api(error)) if matches!(&*error, kube::Error::Api(status) if status.is_not_found()) =>
            {
                // Somebody deleted it: create it anew at the next turn.
                self.known = None;
                Err(AttemptError::Api(error))
            }
            Err(error) => Err(error),
        }
    }
}

/// The lease to write: ours, renewed at `now`, with exactly these annotations
/// besides those of others.
fn renewed(
    base: Option<Lease>,
    name: &str,
    holder: &str,
    annotations: &BTreeMap<String, String>,
    now: &MicroTime,
) -> Lease {
    let mut lease = base.unwrap_or_else(|| Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        },
        spec: None,
    });
    let kept = lease.metadata.annotations.get_or_insert_default();
    kept.retain(|key, _| !key.starts_with(OWN_PREFIX));
    kept.extend(annotations.clone());
    let before = lease.spec.take().unwrap_or_default();
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(holder.to_owned()),
        lease_duration_seconds: Some(DURATION_SECONDS),
        acquire_time: before.acquire_time.or_else(|| Some(now.clone())),
        renew_time: Some(now.clone()),
        lease_transitions: before.lease_transitions,
        ..LeaseSpec::default()
    });
    lease
}

/// Whether a record that is not as we left it was written by something else.
/// Our own writes whose answers were lost are no such thing, nor is whatever
/// happened before this process wrote first.
fn foreign(
    known: Option<&Lease>,
    attempted: &[MicroTime],
    current: Option<&Lease>,
    holder: &str,
) -> bool {
    let spec = |lease: &Lease| lease.spec.clone().unwrap_or_default();
    let Some(current) = current.map(spec) else {
        return false;
    };
    if current.holder_identity.as_deref() != Some(holder) {
        return true;
    }
    let Some(known) = known.map(spec) else {
        return false;
    };
    current.renew_time != known.renew_time
        && !current
            .renew_time
            .is_some_and(|time| attempted.contains(&time))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(seconds: i64) -> MicroTime {
        MicroTime(Timestamp::from_second(seconds).unwrap())
    }

    fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn lease(seconds: i64) -> Lease {
        renewed(
            None,
            "kari-agent-n1",
            "n1",
            &annotations(&[("kari.dev/version", "1")]),
            &time(seconds),
        )
    }

    #[test]
    fn a_renewal_keeps_the_acquire_time_and_the_annotations_of_others() {
        let mut base = lease(1);
        base.metadata.resource_version = Some("7".to_owned());
        let others = annotations(&[
            ("example.com/note", "x"),
            ("kari.dev/version", "1"),
            ("kari.dev/old", "y"),
        ]);
        base.metadata.annotations = Some(others);
        let next = renewed(
            Some(base),
            "kari-agent-n1",
            "n1",
            &annotations(&[("kari.dev/version", "2")]),
            &time(11),
        );
        assert_eq!(next.metadata.resource_version.as_deref(), Some("7"));
        assert_eq!(
            next.metadata.annotations,
            Some(annotations(&[
                ("example.com/note", "x"),
                ("kari.dev/version", "2")
            ]))
        );
        let spec = next.spec.unwrap();
        assert_eq!(spec.acquire_time, Some(time(1)));
        assert_eq!(spec.renew_time, Some(time(11)));
        assert_eq!(spec.lease_duration_seconds, Some(40));
    }

    #[test]
    fn only_what_something_else_wrote_is_foreign() {
        let other_holder = renewed(None, "kari-agent-n1", "n2", &BTreeMap::new(), &time(1));
        let cases = [
            ("deleted", Some(lease(1)), vec![], None, false),
            (
                "as we left it",
                Some(lease(1)),
                vec![],
                Some(lease(1)),
                false,
            ),
            (
                "our write whose answer was lost",
                Some(lease(1)),
                vec![time(11)],
                Some(lease(11)),
                false,
            ),
            (
                "before our first write",
                None,
                vec![time(11)],
                Some(lease(5)),
                false,
            ),
            (
                "a second agent of the same name",
                Some(lease(1)),
                vec![time(11)],
                Some(lease(9)),
                true,
            ),
            (
                "another node's name",
                None,
                vec![],
                Some(other_holder),
                true,
            ),
        ];
        for (case, known, attempted, current, expected) in cases {
            assert_eq!(
                foreign(known.as_ref(), &attempted, current.as_ref(), "n1"),
                expected,
                "{case}"
            );
        }
    }
}
