//! The node side: everything that happens on one node.
//!
//! In reading order: [`view`] is what is seen of an app, `plan` what follows from
//! it (pure), `observe`, `apply` and `status` the way there and back, `reconcile`
//! one run for one app. [`host`] is the thin, typed layer over systemd, the disk
//! and the proxy; it knows nothing of Kubernetes.
//!
//! Invariants: one writer per app (the supervisor runs no key twice at once); a
//! run never waits for a fetch, a build, a probe or a stop, only for signals of
//! them; without the API everything goes on but the reports.

mod apply;
mod claims;
mod collect;
pub mod control;
mod guard;
mod health;
pub mod host;
mod mask;
mod memory;
mod node;
mod observe;
mod plan;
mod reconcile;
mod secrets;
mod slots;
mod status;
mod view;
mod wanted;
mod watch;

/// What the simulation of both sides takes from this one.
#[cfg(test)]
pub(crate) mod testing {
    pub use super::plan::plan;
    pub use super::plan::simulation::{Fate, World};
    pub use super::status::status;
    pub use super::view::Wanted;
    pub use super::wanted::wanted;
}

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kube::Api;
use kube::core::DeserializeGuard;
use kube::runtime::watcher;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch as latest};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::host::keys::{KeysError, NodeKeys};
use self::host::limits::{self, Limits};
use self::host::mirror::{MirrorSettings, Mirrors};
use self::host::probe;
use self::host::programs;
use self::host::proxy::{Proxy, ProxySettings};
use self::host::slices::{self, SlicesError};
use self::host::store::{DiskReserve, Store, StoreError, UNIT_FOLDER, UnitFiles};
use self::host::systemd::{ActiveState, HostEvent, Systemd, SystemdError};
use self::host::unit::{self, OwnUnit};
use self::host::users::{self, Users, UsersError};
use self::node::{Node, lock};
use crate::api::Release;
use crate::api::names::{AppName, NodeName, node_lease_name};
use crate::runtime::client::{self, ApiMetrics, ClientError};
use crate::runtime::node_lease::{NodeLeaseMetrics, heartbeat};
use crate::runtime::serve::{Endpoints, Liveness, Readiness, ServeError};
use crate::runtime::streams::{StreamMetrics, beating, guarded};
use crate::runtime::supervise::{Backoff, Options, ReconcileMetrics, Supervisor, Trigger};
use crate::runtime::{error_chain, shutdown as ending};

/// Where everything of the agent's is on a node.
const STORE: &str = "/var/lib/kari";

/// Apps that are looked at at once: looking waits for systemd and the disk more than it computes.
const CONCURRENCY: usize = 8;

/// The longest run of one app: sealing a tree of a million files and a reload of the proxy are parts of it.
const RUN_LIMIT: Duration = Duration::from_secs(600);

/// The longest silence of a loop that is alive.
const BEAT_LIMIT: Duration = Duration::from_secs(60);

/// How often the proxy and the disk are looked at though nothing says that they changed.
const KEEP_INTERVAL: Duration = Duration::from_secs(60);

/// Tries of the canaries that prove limits, should systemd be busy.
const PROOF_TRIES: u32 = 3;

/// What an agent needs to know.
#[derive(Clone)]
pub struct Config {
    /// How the API is reached.
    pub client: kube::Config,
    /// The name of the node's Node object.
    pub node_name: NodeName,
    /// The namespace of the node's Lease.
    pub namespace: String,
    /// The folders of the node's tools, as `PATH` has them.
    pub tool_path: String,
    /// The proxy's port.
    pub http_port: u16,
    /// The proxy's port for TLS; 0 for none.
    pub https_port: u16,
    /// Where health, readiness and metrics are told.
    pub listen: SocketAddr,
    /// Fetches at once.
    pub fetch_slots: usize,
    /// Builds at once.
    pub build_slots: usize,
    /// What fetches and builds leave free on the disk.
    pub disk_reserve: DiskReserve,
    /// Uids that apps may have.
    pub uid_range: RangeInclusive<u32>,
    /// Ports that processes may have.
    pub port_range: RangeInclusive<u16>,
}

/// Why an agent ended.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The disk, or another agent on this node.
    #[error("cannot use {STORE}")]
    Store(#[from] StoreError),
    /// The node's key.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// systemd.
    #[error("cannot talk to systemd over the system bus")]
    Systemd(#[from] SystemdError),
    /// The slices.
    #[error("cannot install the slices")]
    Slices(#[from] SlicesError),
    /// Users.
    #[error("cannot make the user of the mirrors")]
    Users(#[from] UsersError),
    /// The client.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The endpoints.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The name.
    #[error("node name {0:?} is too long: the name of its Lease must fit 253 characters")]
    NodeName(String),
}

/// Runs the agent of a node until `shutdown`. What it started goes on without it.
///
/// # Errors
/// What it cannot begin without: its disk (another agent may hold it), systemd, its port for health. An
/// API that is away is none: the apps on the disk are kept without it.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), AgentError> {
    let lease = node_lease_name(&config.node_name)
        .ok_or_else(|| AgentError::NodeName(config.node_name.to_string()))?;
    let mut registry = Registry::default();
    let metrics = Arc::new(ReconcileMetrics::new(&mut registry));
    let stream_metrics = StreamMetrics::new(&mut registry);
    let lease_metrics = NodeLeaseMetrics::new(&mut registry);
    let client = client::build(config.client.clone(), &ApiMetrics::new(&mut registry))?;

    let liveness = Liveness::default();
    let readiness = Readiness::default();
    let host_ready = readiness.gate("host");
    let endpoints = Endpoints {
        liveness: liveness.clone(),
        readiness,
        registry: Arc::new(registry),
    };
    let serving = tokio::spawn(endpoints.serve(config.listen, shutdown.clone()));

    let (apps, trigger) = Supervisor::new("apps", app_options(), Arc::clone(&metrics));
    let (statuses, reports) = Supervisor::new("statuses", Options::default(), metrics);
    let selector = format!("spec.nodeName={}", config.node_name);
    let api: Api<DeserializeGuard<Release>> = Api::all(client.clone());
    let (releases, stream) = guarded(
        api,
        watcher::Config::default().fields(&selector),
        "releases",
        &stream_metrics,
    );

    let (host, events) = prepare_host(&config, trigger.clone()).await?;
    let systemd_version = host.systemd.version().await?;
    let node = Arc::new(Node::new(
        (
            config.node_name.clone(),
            config.tool_path.clone(),
            config.port_range.clone(),
        ),
        (host.store, host.units, host.users, host.keys),
        (host.systemd, host.proxy, host.mirrors),
        host.limits,
        trigger,
        (client.clone(), releases),
        (config.build_slots, config.disk_reserve),
    ));
    resume_builds(&node).await?;
    node.restore_claims();
    let (annotate, annotations) = latest::channel(BTreeMap::new());
    host_ready.open();
    info!(node = %config.node_name, systemd = systemd_version, limits = ?node.limits.by_name(), "the agent is up");

    let mirrors = node.mirrors.clone();
    let apps_heartbeat = liveness.register("apps", BEAT_LIMIT);
    let stream = beating(stream, liveness.register("releases", BEAT_LIMIT));
    let background = async {
        tokio::join!(
            heartbeat(
                client,
                &config.namespace,
                &lease,
                config.node_name.as_str(),
                annotations,
                lease_metrics,
                shutdown.clone(),
            ),
            watch::releases(Arc::clone(&node), stream),
            watch::systemd(Arc::clone(&node), events),
            watch::files(Arc::clone(&node), Path::new(UNIT_FOLDER)),
            mirrors.run(),
            guard::keep_node(Arc::clone(&node), annotate, systemd_version, KEEP_INTERVAL),
            guard::watch_disk(Arc::clone(&node)),
            guard::collect_node(Arc::clone(&node)),
            guard::empty_trash(Arc::clone(&node)),
            control::listen(Arc::clone(&node)),
        )
    };
    node.wake_all();
    let reconciling = {
        let (for_apps, for_statuses) = (Arc::clone(&node), Arc::clone(&node));
        let apps = apps
            .with_heartbeat(apps_heartbeat)
            .run(shutdown.clone(), move |app: AppName| {
                reconcile::reconcile(Arc::clone(&for_apps), reports.clone(), app)
            });
        let statuses = statuses.run(shutdown.clone(), move |app: AppName| {
            reconcile::write_report(Arc::clone(&for_statuses), app)
        });
        async { tokio::join!(apps, statuses) }
    };
    let ended = ending::bounded(&shutdown, async {
        tokio::select! {
            // The loops of the background end with the process; the runs end by themselves.
            _ = background => std::future::pending::<()>().await,
            _ = reconciling => {}
        }
    });
    tokio::select! {
        _ = ended => {}
        served = serving => match served {
            Ok(Err(error)) => return Err(error.into()),
            Ok(Ok(())) => {}
            Err(error) => warn!("the endpoints ended: {error}"),
        },
    }
    info!("the agent ends; what it runs goes on");
    Ok(())
}

fn app_options() -> Options {
    Options {
        concurrency: CONCURRENCY,
        timeout: RUN_LIMIT,
        backoff: Backoff {
            initial: Duration::from_secs(1),
            max: Duration::from_secs(60),
        },
        ..Options::default()
    }
}

/// The parts of the node that are ready for use.
struct Host {
    store: Store,
    units: UnitFiles,
    users: Users,
    keys: NodeKeys,
    systemd: Systemd,
    proxy: Proxy,
    mirrors: Mirrors,
    limits: Limits,
}

async fn prepare_host(
    config: &Config,
    trigger: Trigger<AppName>,
) -> Result<(Host, mpsc::Receiver<HostEvent>), AgentError> {
    // Holds the disk: no other agent's probes run.
    let store = Store::open(Path::new(STORE))?;
    let keys = NodeKeys::open(&store)?;
    let units = UnitFiles::new(Path::new(UNIT_FOLDER));
    let (systemd, events) = Systemd::connect(None).await?;
    probe::exec::sweep(&systemd).await?;
    slices::install(&systemd, &units).await?;
    // Now, so that they do not come and go with the first and the last app.
    for slice in ["kari-apps.slice", "kari-builds.slice"] {
        systemd.start_unit(slice).await?;
    }
    let users = Users::new(Path::new(users::FOLDER), config.uid_range.clone());
    let git = users.ensure_git(&store)?;
    let limits = prove_limits(&systemd, &git.name).await?;
    let nginx = programs::find(&systemd, "nginx", &config.tool_path).await?;
    let nginx = nginx.unwrap_or_else(|| {
        warn!(
            "nginx is not on this node, so nothing can be routed; searched: {}",
            config.tool_path
        );
        PathBuf::from("/usr/sbin/nginx")
    });
    let settings = ProxySettings::of_this_node(config.http_port, config.https_port, nginx);
    let proxy = Proxy::new(store.proxy(), units.clone(), systemd.clone(), settings);
    if let Err(error) = proxy.ensure().await {
        warn!("the proxy is not up: {}", error_chain(&error));
    }
    let settings = MirrorSettings {
        slots: config.fetch_slots,
        user: git.name,
        uid: git.uid,
        tool_path: config.tool_path.clone(),
    };
    let mirrors = Mirrors::new(store.clone(), systemd.clone(), settings, move |app| {
        trigger.wake(app.clone())
    });
    Ok((
        Host {
            store,
            units,
            users,
            keys,
            systemd,
            proxy,
            mirrors,
            limits,
        },
        events,
    ))
}

/// Builds that went on without an agent hold their slots until their apps were looked at.
async fn resume_builds(node: &Node) -> Result<(), SystemdError> {
    let listed = node.systemd.list_units(&[unit::BUILD_PATTERN]).await?;
    let apps: Vec<AppName> = listed
        .iter()
        .filter(|listed| listed.active_state != ActiveState::Inactive)
        .filter_map(|listed| match unit::parse_unit_name(&listed.name) {
            Some(OwnUnit::Build { app, .. }) => Some(app),
            Some(
                OwnUnit::Target(_)
                | OwnUnit::Service { .. }
                | OwnUnit::Fetch { .. }
                | OwnUnit::Agent,
            )
            | None => None,
        })
        .collect();
    lock(&node.slots).resume(apps.iter().cloned());
    for app in apps {
        node.trigger.wake(app);
    }
    Ok(())
}

async fn prove_limits(systemd: &Systemd, user: &str) -> Result<Limits, SystemdError> {
    let mut tries = 1;
    loop {
        match limits::prove(systemd, user).await {
            Err(error) if tries < PROOF_TRIES => {
                warn!("limits could not be proven yet: {}", error_chain(&error));
                tries += 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            proven => return proven,
        }
    }
}

/// Apps that are kept without a Release, for the node's Lease.
fn held_apps(node: &Node) -> Vec<String> {
    if !node.listed.load(std::sync::atomic::Ordering::Relaxed) {
        return vec![];
    }
    let apps = node.store.apps().unwrap_or_default();
    apps.into_iter()
        .filter(|app| node.release(app).is_none())
        .map(|app| app.to_string())
        .collect()
}

/// Whether a build of an app is killed, and why, for the next look at it.
fn note_killed(node: &Node, app: &AppName, unit: &str, failure: host::records::RecordedFailure) {
    let memory = node.memory(app);
    lock(&memory).killed = Some((unit.to_owned(), failure));
}
