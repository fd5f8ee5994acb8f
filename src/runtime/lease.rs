//! Leader election over a `coordination.k8s.io/v1` Lease: the driver around
//! [`election`](super::election), which holds the rules.
//!
//! A lease is advice, not a fence: a leader that was stopped by its machine
//! learns of its loss only when it runs again. So whoever acts as leader ends
//! when [`Leadership::lost`] fires, and writes what must not come from a
//! deposed leader with a resourceVersion.
//!
//! Every write is a PUT with the resourceVersion that was read (RBAC: get,
//! create, update).

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::election::{Decision, Observer, TIMING, Tenure};
use super::error_chain;

/// How long one call may take while there is nothing to lose by waiting.
const CALL: Duration = Duration::from_secs(5);

/// How many writes one renewal tries when the record has changed meanwhile.
const WRITES_PER_RENEWAL: u32 = 2;

/// What a released lease says: nobody need wait for it.
const RELEASED_SECONDS: i32 = 1;

/// No leadership came about.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The process was asked to end before it became leader.
    #[error("shut down before becoming the leader")]
    Stopped,
}

/// The fact of leading. Dropping it stops the renewals: the lease then expires
/// by itself, which is right when nothing is known of what still runs.
#[derive(Debug)]
pub struct Leadership {
    lost: CancellationToken,
    release: oneshot::Sender<()>,
    renewing: JoinHandle<()>,
}

impl Leadership {
    /// Fires when the leadership is over, for whatever reason but
    /// [`Leadership::release`]. Whoever leads must stop acting and exit.
    pub fn lost(&self) -> CancellationToken {
        self.lost.clone()
    }

    /// Gives the lease up so that another candidate leads at once. The last act
    /// of a shutdown: nothing may act as leader any more.
    pub async fn release(self) {
        // The receiver is gone if the lease was lost: nothing to release then.
        let _ = self.release.send(());
        if let Err(join) = self.renewing.await {
            error!("the lease's renewal failed: {join}");
        }
    }
}

/// Waits until this process leads. `identity` must be unique to the process,
/// not only to the machine: a restarted process is another candidate.
///
/// Errors of the API are logged and tried again for as long as it takes.
///
/// # Errors
/// `shutdown` came first.
pub async fn acquire(
    client: Client,
    namespace: &str,
    name: &str,
    identity: &str,
    shutdown: CancellationToken,
) -> Result<Leadership, LeaseError> {
    let candidate = Candidate {
        api: Api::namespaced(client, namespace),
        name: name.to_owned(),
        identity: identity.to_owned(),
        epoch: Instant::now(),
    };
    let held = tokio::select! {
        () = shutdown.cancelled() => return Err(LeaseError::Stopped),
        held = candidate.wait() => held,
    };
    info!(lease = name, identity, "this process leads");
    let (release, released) = oneshot::channel();
    let lost = CancellationToken::new();
    let renewing = tokio::spawn(candidate.renew(held, lost.clone(), released));
    Ok(Leadership {
        lost,
        release,
        renewing,
    })
}

struct Candidate {
    api: Api<Lease>,
    name: String,
    identity: String,
    epoch: Instant,
}

/// A lease that is ours as of its resourceVersion.
struct Held {
    lease: Lease,
    tenure: Tenure,
}

/// What became of a renewal.
enum Renewal {
    Renewed(Held),
    /// Not known or refused; what was held is still held until its deadline.
    Failed(Held, String),
    TakenBy(String),
}

impl Candidate {
    async fn wait(&self) -> Held {
        let mut observer = Observer::new(self.identity.clone());
        loop {
            let pause = match self.attempt(&mut observer).await {
                Ok(Some(held)) if held.tenure.holds(self.now()) => return held,
                Ok(Some(_)) => Duration::ZERO,
                Ok(None) => TIMING.retry,
                Err(error) => {
                    warn!(
                        lease = self.name,
                        "cannot stand for leader, trying again: {}",
                        error_chain(&error)
                    );
                    TIMING.retry
                }
            };
            // Candidates that started together do not stay together.
            tokio::time::sleep(pause.mul_f64(1.0 + 0.2 * fastrand::f64())).await;
        }
    }

    /// One look and, if the rules allow it, one write.
    async fn attempt(&self, observer: &mut Observer) -> Result<Option<Held>, AttemptError> {
        let current = bounded(self.api.get_opt(&self.name)).await?;
        let record = current
            .as_ref()
            .map(|lease| lease.spec.clone().unwrap_or_default());
        let decision = observer.decide(record.as_ref(), self.now());
        let sent = self.now();
        let written = match (decision, current) {
            (Decision::Wait(left), _) => {
                let holder = record
                    .and_then(|record| record.holder_identity)
                    .unwrap_or_default();
                debug!(
                    lease = self.name,
                    holder,
                    seconds = left.as_secs_f64(),
                    "another process leads"
                );
                return Ok(None);
            }
            (Decision::Create, _) | (Decision::Take, None) => {
                let lease = self.claim(Lease {
                    metadata: ObjectMeta {
                        name: Some(self.name.clone()),
                        ..ObjectMeta::default()
                    },
                    spec: None,
                });
                bounded(self.api.create(&PostParams::default(), &lease)).await
            }
            (Decision::Take, Some(current)) => {
                let lease = self.claim(current);
                bounded(self.api.replace(&self.name, &PostParams::default(), &lease)).await
            }
        };
        match written {
            Ok(lease) => Ok(Some(Held {
                lease,
                tenure: Tenure::new(sent, TIMING),
            })),
            Err(error) if error.is_conflict() => {
                debug!(lease = self.name, "another candidate was faster");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Renews until the lease is released, lost, or its owner is gone.
    async fn renew(
        self,
        mut held: Held,
        lost: CancellationToken,
        mut released: oneshot::Receiver<()>,
    ) {
        let lost = lost.drop_guard();
        let mut next = self.now() + TIMING.retry;
        loop {
            let wake = self.epoch + next.min(held.tenure.ends());
            tokio::select! {
                biased;
                release = &mut released => {
                    if release.is_ok() {
                        lost.disarm();
                        self.release(held.lease).await;
                    }
                    return;
                }
                () = tokio::time::sleep_until(wake) => {}
            }
            let ends = held.tenure.ends();
            let sent = self.now();
            let renewal = tokio::time::timeout_at(self.epoch + ends, self.renew_once(held)).await;
            held = match renewal {
                Ok(Renewal::Renewed(held)) => held,
                Ok(Renewal::Failed(held, message)) => {
                    warn!(lease = self.name, "cannot renew the lease: {message}");
                    held
                }
                Ok(Renewal::TakenBy(holder)) => {
                    error!(
                        lease = self.name,
                        holder, "the lease was taken: this process leads no more"
                    );
                    return;
                }
                Err(_) => {
                    error!(
                        lease = self.name,
                        "the lease could not be renewed for {} s: this process leads no more",
                        TIMING.renew_deadline.as_secs()
                    );
                    return;
                }
            };
            // From when it was sent: what hung has waited long enough.
            next = sent + TIMING.retry;
        }
    }

    async fn renew_once(&self, held: Held) -> Renewal {
        let Held {
            mut lease,
            mut tenure,
        } = held;
        for _ in 0..WRITES_PER_RENEWAL {
            let sent = self.now();
            let claimed = self.claim(lease.clone());
            let parameters = PostParams::default();
            let write = self.api.replace(&self.name, &parameters, &claimed);
            match bounded(write).await {
                Ok(lease) => {
                    tenure.renewed(sent);
                    return Renewal::Renewed(Held { lease, tenure });
                }
                Err(error) if error.is_conflict() => {}
                Err(error) => return Renewal::Failed(Held { lease, tenure }, error_chain(&error)),
            }
            // Either somebody took it, or a renewal of ours whose answer was
            // lost took effect, and the next write starts from there.
            match bounded(self.api.get_opt(&self.name)).await {
                Ok(Some(current)) if holder(&current) == self.identity => lease = current,
                Ok(current) => {
                    let holder = current.as_ref().map(holder).unwrap_or_default();
                    return Renewal::TakenBy(holder.to_owned());
                }
                Err(error) => return Renewal::Failed(Held { lease, tenure }, error_chain(&error)),
            }
        }
        let message = "its record changes each time, though it stays ours".to_owned();
        Renewal::Failed(Held { lease, tenure }, message)
    }

    async fn release(&self, mut lease: Lease) {
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(RELEASED_SECONDS);
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        match bounded(self.api.replace(&self.name, &PostParams::default(), &lease)).await {
            Ok(_) => info!(lease = self.name, "released the lease"),
            Err(error) => warn!(
                lease = self.name,
                "cannot release the lease, it will expire: {}",
                error_chain(&error)
            ),
        }
    }

    /// The lease as we want it: ours, renewed now.
    fn claim(&self, mut lease: Lease) -> Lease {
        let now = Some(MicroTime(Timestamp::now()));
        let before = lease.spec.take().unwrap_or_default();
        let kept = before.holder_identity.as_deref() == Some(&self.identity);
        let transitions = before.lease_transitions.unwrap_or(0);
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(TIMING.duration.as_secs()).ok(),
            acquire_time: if kept {
                before.acquire_time
            } else {
                now.clone()
            },
            renew_time: now,
            lease_transitions: Some(if kept {
                transitions
            } else {
                transitions.saturating_add(1)
            }),
            ..LeaseSpec::default()
        });
        lease
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }
}

fn holder(lease: &Lease) -> &str {
    lease
        .spec
        .as_ref()
        .and_then(|spec| spec.holder_identity.as_deref())
        .unwrap_or_default()
}

/// A call that failed or took too long.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum AttemptError {
    #[error("the API server refused or could not be reached")]
    Api(#[source] Arc<kube::Error>),
    #[error("no answer from the API server within {} s", CALL.as_secs())]
    Timeout,
}

impl AttemptError {
    /// Somebody else wrote first, or created what was to be created.
    pub(super) fn is_conflict(&self) -> bool {
        match self {
            Self::Api(error) => {
                matches!(&**error, kube::Error::Api(status) if status.is_conflict() || status.is_already_exists())
            }
            Self::Timeout => false,
        }
    }
}

/// Waits for a call for [`CALL`] at most.
pub(super) async fn bounded<T>(
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, AttemptError> {
    match tokio::time::timeout(CALL, call).await {
        Ok(result) => result.map_err(|error| AttemptError::Api(Arc::new(error))),
        Err(_) => Err(AttemptError::Timeout),
    }
}
