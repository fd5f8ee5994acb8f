//! OUTLINE: kari-proxy.service
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;
use crate::api::names::{AppName, ReleaseId};
use super::store::{Store, StoreError, UnitFiles};
use super::systemd::{Systemd, SystemdError};

/// A checked host name: lower-case DNS name, optional leading `*.`, at most 253 characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(String);
impl HostName { pub fn parse(text: &str) -> Result<Self, HostNameError> { todo!() } pub fn as_str(&self) -> &str { &self.0 } }
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)] #[error("…")] pub struct HostNameError { pub value: String }

/// What the proxy serves for a Deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualHost { pub app: AppName, pub release_id: ReleaseId, pub routes: Vec<Route> }
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route { pub process: String, pub hosts: Vec<HostName>, pub target: RouteTarget }
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteTarget {
    /// `backup` takes what the primary refuses: the old port while a switch is not yet drained
    Port { primary: u16, backup: Option<u16> },
    /// 503
    Unavailable,
}
/// Pure.
pub fn render_virtual_host(host: &VirtualHost) -> String { todo!() }
/// Hosts of `wanted` that another app of `others` has, with that app. Pure. (RouteConflict)
pub fn conflicts(app: &AppName, wanted: &[HostName], others: &BTreeMap<AppName, Vec<HostName>>) -> Vec<(HostName, AppName)> { todo!() }

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxySettings { pub http_port: u16, pub nginx: PathBuf }
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// ProxyUnavailable
    #[error("…")] PortHeld { port: u16, holder: String },
    #[error("…")] NotRunning { message: String },
    #[error("…")] Refused { message: String },
    /// reloaded, but a new connection is not answered as the file says
    #[error("…")] NotInForce { host: String, message: String },
    #[error("…")] Store(#[from] StoreError),
    #[error("…")] Systemd(#[from] SystemdError),
}
impl ProxyError { pub fn reason(&self) -> crate::api::reasons::Reason { todo!() } }

/// Workers that may still hold requests of before a switch. Serialisable, so that a drain goes on after a restart.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct OldWorkers { pub pids: BTreeSet<u32> }

/// Cheap to clone; one per agent.
#[derive(Clone)] pub struct Proxy {}
impl Proxy {
    pub fn new(store: Store, units: UnitFiles, systemd: Systemd, settings: ProxySettings) -> Self { todo!() }
    /// configuration, unit file, enabled, running, port ours. At start and on the timer; idempotent.
    pub async fn ensure(&self) -> Result<(), ProxyError> { todo!() }
    /// Writes the file if it differs, reloads (one reload for all that ask meanwhile) if it differs or is not in force,
    /// and measures on new connections. Ends within PUBLISH_LIMIT. What it returns is what has to drain.
    pub async fn publish(&self, host: &VirtualHost) -> Result<OldWorkers, ProxyError> { todo!() }
    /// Measures only: is this vhost in force? (keep rounds, after a restart)
    pub async fn measure(&self, host: &VirtualHost) -> Result<(), ProxyError> { todo!() }
    /// Removes the file, reloads, measures that its hosts are refused. A missing file is done.
    pub async fn remove(&self, app: &AppName) -> Result<OldWorkers, ProxyError> { todo!() }
    /// Those of `old` that still run; empty: drained. The caller has the limit (DRAIN_LIMIT).
    pub async fn still_draining(&self, old: &OldWorkers) -> Result<OldWorkers, ProxyError> { todo!() }
    /// Every worker that runs now: what to wait for when an agent that restarted does not know
    pub async fn workers(&self) -> Result<OldWorkers, ProxyError> { todo!() }
    /// hosts of all vhost files on the node, for `conflicts`
    pub fn hosts(&self) -> Result<BTreeMap<AppName, Vec<HostName>>, ProxyError> { todo!() }
}
/// How long a drain may take at most.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(60);
