//! The cluster side: decides which node serves which revision, and when.
//!
//! Each reconcile is four steps: [`observe`] (caches → plain data), [`plan`] (pure; [`rollout`] decides on
//! nodes, [`revision`] finds the names, [`status`] the words, [`check`] what a schema cannot say),
//! [`apply`] (idempotent, removals first). [`source`] looks commits up beside it, [`references`] reads ConfigMaps and
//! Secrets, [`policies`] asks what is still allowed, and [`sealing`] says what of the Secrets a Release carries. A
//! second reconcile, [`release`], is keyed by Release.
//!
//! Invariants: only the leader writes; a standby keeps its caches warm and answers its endpoints. All
//! that a decision depends on is in the API, so that any leader takes the same.

pub mod apply;
pub mod check;
pub mod observe;
pub mod observed;
pub mod placement;
pub mod plan;
pub mod policies;
pub mod reach;
pub mod reconcile;
pub mod references;
pub mod release;
pub mod revision;
pub mod rollout;
pub mod sealing;
pub mod source;
pub mod status;
#[cfg(test)]
pub(crate) mod testing;
mod triggers;

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::watcher;
use kube::{Api, Client};
use prometheus_client::registry::Registry;
use rustix::fs::{Access, FlockOperation, Mode, OFlags};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::api::{Deployment, LABEL_DEPLOYMENT, Release};
use crate::runtime::client::{self, ApiMetrics, ClientError};
use crate::runtime::lease::{self, LeaseError};
use crate::runtime::serve::{Endpoints, Heartbeat, Liveness, Readiness, ServeError};
use crate::runtime::streams::{StreamMetrics, beating, guarded};
use crate::runtime::supervise::{Options, ReconcileMetrics, Supervisor};
use crate::runtime::{error_chain, shutdown};

use observe::Caches;
use policies::Policies;
use reconcile::Context;
use references::References;
use source::{SourceMetrics, SourceOptions, Sources};
use triggers::Triggers;

/// The Lease that says which replica leads.
const LEADER_LEASE: &str = "kari-controller";

/// How late a loop's sign of life may be before the process counts as dead: well above the longest pause
/// between two, so that a busy machine does not restart a controller that works.
const BEAT_LIMIT: Duration = Duration::from_secs(90);

/// Between two looks whether the custom resources are defined yet.
const DEFINITIONS_PAUSE: Duration = Duration::from_secs(2);

/// What a controller needs to know.
#[derive(Clone)]
pub struct Config {
    /// The API server.
    pub client: kube::Config,
    /// The namespace of Kari's own Leases.
    pub namespace: String,
    /// Where /healthz, /readyz and /metrics are served.
    pub listen: SocketAddr,
    /// Whether `http://` and `git://` are allowed as sources.
    pub insecure_source_schemes: bool,
    /// Look-ups of sources at once.
    pub source_slots: usize,
}

/// Why a controller ended that was not asked to.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// There is no client.
    #[error("cannot use the Kubernetes API")]
    Client(#[from] ClientError),
    /// The endpoints are not served.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A folder of git's could not be made.
    #[error("cannot use the folder {folder}; set TMPDIR to a folder that can be written to")]
    Home {
        /// The folder.
        folder: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another replica leads.
    #[error("the leader's Lease was lost; ending, so that no two controllers decide")]
    LeadershipLost,
    /// A loop that never ends has ended.
    #[error("a part of the controller ended by itself")]
    Ended,
}

/// A namespaced object, by its name: what reconciles are keyed by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Runs a controller until `shutdown`: a standby until it leads, then the leader.
///
/// # Errors
/// It cannot begin, or it has lost its lease; the process must then end.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), ControllerError> {
    let mut registry = Registry::default();
    let client = client::build(config.client.clone(), &ApiMetrics::new(&mut registry))?;
    let parts = Parts::new(&client, &config.namespace, &mut registry);
    let Parts {
        context,
        triggers,
        streams,
        deployments,
        releases,
        liveness,
        readiness,
    } = parts;
    let context = Context {
        insecure_source_schemes: config.insecure_source_schemes,
        ..context
    };
    let defined = readiness.gate("the custom resource definitions");
    let filled = readiness.gate("the first lists of all that is watched");
    let home = Home::make(&std::env::temp_dir())?;
    let credentials = Home::make(&memory_folder())?;
    if !is_plain(&credentials.folder) {
        let source = std::io::Error::other("its path has more than letters, digits and ._/-");
        let folder = credentials.folder.clone();
        return Err(ControllerError::Home { folder, source });
    }

    // The endpoints outlive the work, so that a probe sees a shutdown through.
    let served = CancellationToken::new();
    let endpoints = Endpoints {
        liveness: liveness.clone(),
        readiness,
        registry: Arc::new(registry),
    };
    let listener = tokio::spawn(endpoints.serve(config.listen, served.clone()));
    let work = async {
        let Some(()) = until(&shutdown, wait_for_definitions(&client)).await else {
            return Ok(());
        };
        defined.open();
        let mut watching = JoinSet::new();
        for stream in streams {
            watching.spawn(stream);
        }
        watching.spawn(triggers.clone().watch_time(beat(&liveness, "lease-clock")));
        if until(&shutdown, triggers.filled()).await.is_none() {
            return Ok(());
        }
        filled.open();
        info!("all that is watched is listed; standing by");
        let identity = format!("{}_{}", host_name(), uuid::Uuid::new_v4());
        let leading = lease::acquire(
            client.clone(),
            &config.namespace,
            LEADER_LEASE,
            &identity,
            shutdown.clone(),
        )
        .await;
        let leadership = match leading {
            Ok(leadership) => leadership,
            Err(LeaseError::Stopped) => return Ok(()),
        };
        let lost = leadership.lost();
        let stop = CancellationToken::new();
        let options = SourceOptions {
            slots: config.source_slots.max(1),
            insecure_schemes: config.insecure_source_schemes,
            home: home.folder.clone(),
            credentials: credentials.folder.clone(),
        };
        triggers.wake_all();
        let mut leading = JoinSet::new();
        leading.spawn(lead(
            context,
            deployments,
            releases,
            options,
            liveness,
            stop.clone(),
        ));
        leading.spawn(triggers.clone().resync(stop.clone()));
        let ended = tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            () = lost.cancelled() => Err(ControllerError::LeadershipLost),
            Some(_) = leading.join_next() => Err(ControllerError::Ended),
            Some(_) = watching.join_next() => Err(ControllerError::Ended),
        };
        stop.cancel();
        match ended {
            // Nothing may be written any more: what is running is dropped.
            Err(error) => Err(error),
            Ok(()) => {
                while leading.join_next().await.is_some() {}
                leadership.release().await;
                Ok(())
            }
        }
    };
    let outcome = tokio::select! {
        biased;
        outcome = shutdown::bounded(&shutdown, work) => outcome.unwrap_or(Ok(())),
        served = listener => match served {
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(())) | Err(_) => Err(ControllerError::Ended),
        },
    };
    served.cancel();
    outcome
}

/// Both supervisors and all that is asked beside them, until `stop`.
async fn lead(
    context: Context,
    deployments: Supervisor<Key>,
    releases: Supervisor<Key>,
    options: SourceOptions,
    liveness: Liveness,
    stop: CancellationToken,
) {
    let (sources, references) = (context.sources.clone(), context.references.clone());
    let (policies, present) = (context.policies.clone(), context.caches.deployments.clone());
    let (of_deployments, of_releases) = (context.clone(), context);
    tokio::join!(
        deployments
            .with_heartbeat(beat(&liveness, "deployments"))
            .run(stop.clone(), move |key| of_deployments
                .clone()
                .reconcile_deployment(key)),
        releases
            .with_heartbeat(beat(&liveness, "releases"))
            .run(stop.clone(), move |key| of_releases
                .clone()
                .reconcile_release(key)),
        sources.run(options, beat(&liveness, "sources"), stop.clone()),
        references.run(beat(&liveness, "references"), stop.clone()),
        policies.run(&present, beat(&liveness, "policies"), stop.clone()),
    );
}

fn beat(liveness: &Liveness, name: &'static str) -> Heartbeat {
    liveness.register(name, BEAT_LIMIT)
}

/// What `future` gives, unless `shutdown` comes first.
async fn until<T>(shutdown: &CancellationToken, future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        () = shutdown.cancelled() => None,
        output = future => Some(output),
    }
}

type Watching = futures::future::BoxFuture<'static, ()>;

/// All that is made before anything runs.
struct Parts {
    context: Context,
    triggers: Triggers,
    streams: Vec<Watching>,
    deployments: Supervisor<Key>,
    releases: Supervisor<Key>,
    liveness: Liveness,
    readiness: Readiness,
}

impl Parts {
    fn new(client: &Client, namespace: &str, registry: &mut Registry) -> Self {
        let stream_metrics = StreamMetrics::new(registry);
        let metrics = Arc::new(ReconcileMetrics::new(registry));
        let (deployments, wake_deployment) =
            Supervisor::new("deployment", Options::default(), metrics.clone());
        let (releases, wake_release) = Supervisor::new("release", Options::default(), metrics);
        let liveness = Liveness::default();

        let everything = watcher::Config::default;
        let (deployment_cache, deployment_stream) = guarded::<Deployment>(
            Api::all(client.clone()),
            everything(),
            "deployments",
            &stream_metrics,
        );
        let (release_cache, release_stream) = guarded::<Release>(
            Api::all(client.clone()),
            everything(),
            "releases",
            &stream_metrics,
        );
        let (revision_cache, revision_stream) = guarded::<ControllerRevision>(
            Api::all(client.clone()),
            everything().labels(LABEL_DEPLOYMENT),
            "controllerrevisions",
            &stream_metrics,
        );
        let (node_cache, node_stream) = guarded::<Node>(
            Api::all(client.clone()),
            everything(),
            "nodes",
            &stream_metrics,
        );
        let (lease_cache, lease_stream) = guarded::<Lease>(
            Api::namespaced(client.clone(), namespace),
            everything(),
            "leases",
            &stream_metrics,
        );
        let caches = Caches::new(deployment_cache, release_cache, revision_cache, node_cache);
        let triggers = Triggers {
            caches: caches.clone(),
            leases: lease_cache,
            leases_listed: CancellationToken::new(),
            deployment: wake_deployment.clone(),
            release: wake_release,
        };
        let pulse = |name| beat(&liveness, name);
        let streams: Vec<Watching> = vec![
            Box::pin(
                triggers
                    .clone()
                    .watch_deployments(beating(deployment_stream, pulse("watch-deployments"))),
            ),
            Box::pin(
                triggers
                    .clone()
                    .watch_releases(beating(release_stream, pulse("watch-releases"))),
            ),
            Box::pin(
                triggers
                    .clone()
                    .watch_revisions(beating(revision_stream, pulse("watch-controllerrevisions"))),
            ),
            Box::pin(
                triggers
                    .clone()
                    .watch_nodes(beating(node_stream, pulse("watch-nodes"))),
            ),
            Box::pin(
                triggers
                    .clone()
                    .watch_leases(beating(lease_stream, pulse("watch-leases"))),
            ),
        ];
        let reporter = Reporter {
            controller: "kari-controller".to_owned(),
            instance: Some(host_name()),
        };
        let context = Context {
            client: client.clone(),
            sources: Sources::new(wake_deployment.clone(), SourceMetrics::new(registry)),
            policies: Policies::new(client.clone(), wake_deployment.clone()),
            references: References::new(client.clone(), namespace, wake_deployment, registry),
            caches,
            memory: Arc::default(),
            recorder: Recorder::new(client.clone(), reporter),
            insecure_source_schemes: false,
        };
        Self {
            context,
            triggers,
            streams,
            deployments,
            releases,
            liveness,
            readiness: Readiness::default(),
        }
    }
}

/// Waits until the API server serves Kari's kinds.
async fn wait_for_definitions(client: &Client) {
    let one = ListParams::default().limit(1);
    loop {
        let deployments = Api::<Deployment>::all(client.clone());
        let releases = Api::<Release>::all(client.clone());
        let listed = async {
            deployments.list_metadata(&one).await?;
            releases.list_metadata(&one).await
        };
        match listed.await {
            Ok(_) => return,
            Err(kube::Error::Api(status)) if status.code == 404 => warn!(
                "the custom resources of Kari are not defined yet: kari crd | kubectl apply --server-side -f -"
            ),
            Err(error) => warn!("cannot list Kari's objects: {}", error_chain(&error)),
        }
        tokio::time::sleep(DEFINITIONS_PAUSE).await;
    }
}

/// The machine's name, for people who read the lease; uniqueness does not rest on it.
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_else(|_| "unknown".to_owned())
}

/// What the name of an empty folder of a controller begins with.
const HOME_PREFIX: &str = "kari-controller-";

/// Where the kernel keeps files in memory on most machines, and in most containers.
const MEMORY: &str = "/dev/shm";

/// Where the files of credentials go: memory, if it can be written to, else the folder for temporary files.
fn memory_folder() -> PathBuf {
    let memory = PathBuf::from(MEMORY);
    match rustix::fs::access(&memory, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => memory,
        Err(_) => std::env::temp_dir(),
    }
}

/// Whether git and ssh take the path of a file for nothing else.
fn is_plain(path: &Path) -> bool {
    path.to_str().is_some_and(|path| {
        path.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b))
    })
}

/// A folder of this process's own, which goes with it. One whose process was killed goes with the next
/// controller: nobody holds its lock.
struct Home {
    folder: PathBuf,
    _lock: OwnedFd,
}

impl Home {
    fn make(within: &Path) -> Result<Self, ControllerError> {
        use std::os::unix::fs::DirBuilderExt as _;
        remove_abandoned(within);
        let folder = within.join(format!("{HOME_PREFIX}{}", uuid::Uuid::new_v4()));
        let made = std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .and_then(|()| locked(&folder));
        match made {
            Ok(lock) => Ok(Self {
                folder,
                _lock: lock,
            }),
            Err(source) => Err(ControllerError::Home { folder, source }),
        }
    }
}

/// Removes the folders that controllers left here which were killed, but for other users'.
fn remove_abandoned(temporary: &Path) {
    for entry in std::fs::read_dir(temporary).into_iter().flatten().flatten() {
        let is_home = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(HOME_PREFIX));
        if is_home && locked(&entry.path()).is_ok() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// The folder, locked for as long as this process has it open.
fn locked(folder: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty())?;
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
    Ok(folder)
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_a_controller_that_was_killed_goes_and_that_of_one_that_runs_stays() {
        let temporary = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let folder = temporary.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            folder
        };
        let (abandoned, held) = (make("kari-controller-a"), make("kari-controller-b"));
        let other = make("other");
        std::fs::write(abandoned.join("file"), "").unwrap();
        let _lock = locked(&held).unwrap();
        remove_abandoned(temporary.path());
        assert!(!abandoned.exists());
        assert!(held.exists() && other.exists());
    }
}
