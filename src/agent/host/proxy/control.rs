//! Writing and measuring.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::time::{Instant, sleep, timeout_at};

use super::answer::{came_from, names};
use super::certificates::Certificates;
use super::configuration::{
    self, IDENTITY_PATH, MEASURE_HEADER, PAUSED_FOLDER, RUN_FOLDER, UNIT, pause_file,
    pause_files_of, render_unit, render_virtual_host, settings_digest, virtual_host_file,
};
use super::reload::{OldWorkers, Reloads, Worker};
use super::{
    CertificateId, HostName, ProxySettings, RouteTarget, VirtualHost, certificate_of,
    measured_path, tls,
};
use crate::agent::host::port::holder_of;
use crate::agent::host::probe::{self, ANY_LABEL, Answer};
use crate::agent::host::store::{self, StoreError, UnitFiles, write_durably};
use crate::agent::host::systemd::{ActiveState, Systemd, SystemdError};
use crate::api::names::AppName;
use crate::api::reasons::Reason;
use crate::certificate::ServerCertificate;

/// How long a drain may take: requests of before a switch have ended by then, or are cut when the old
/// process stops. Websockets always last until then.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// How long the measured answer of an app may take: it was ready just now.
const MEASURE_LIMIT: Duration = Duration::from_secs(10);

/// Requests at once of one measurement: there may be 256 paths of hosts, and an app that takes a while for each.
const MEASURED_AT_ONCE: usize = 8;

/// From the start of the unit to its being up: nginx itself waits 2.5 s for a port, the guard tries
/// each file if one of them is bad.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Between two looks at what is expected within a tenth of a second.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Reloads that somebody else's bad file may spoil before it is given up: its writer takes it back.
const RELOAD_TRIES: u32 = 3;

/// Why the proxy does not serve what it should: reason ProxyUnavailable.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProxyError {
    /// Somebody else listens on the port.
    #[error(
        "port {port} is held by {holder}: stop it, or give the agent another --http-port or --https-port"
    )]
    PortHeld {
        /// The port for HTTP, or that for HTTP over TLS.
        port: u16,
        /// Who it is, as well as can be told.
        holder: String,
    },
    /// The unit does not come up.
    #[error("{UNIT} is not running ({state}): see `journalctl -u {UNIT}` on the node")]
    NotRunning {
        /// What systemd says of it.
        state: String,
    },
    /// nginx does not take the configuration, and goes on with the one it has.
    #[error("nginx refuses the configuration: {message}")]
    Refused {
        /// nginx's words.
        message: String,
    },
    /// A new connection is not answered as the files say.
    #[error("the proxy does not yet serve {host} as configured: {message}")]
    NotInForce {
        /// The host that was asked for.
        host: String,
        /// What came instead.
        message: String,
    },
    /// A host is to be served over https, and the node does not do that.
    #[error("{host} has a certificate, and this node serves nothing by https: {why}")]
    NoTls {
        /// The host.
        host: String,
        /// Why, and what to do.
        why: String,
    },
    /// A certificate is not on the disk.
    #[error("the certificate of {host} is not on this node yet")]
    NoCertificate {
        /// The host.
        host: String,
    },
    /// A file cannot be written or read.
    #[error(transparent)]
    Store(#[from] Arc<StoreError>),
    /// systemd does not do as it is told.
    #[error(transparent)]
    Systemd(#[from] Arc<SystemdError>),
}

impl ProxyError {
    /// The condition's reason.
    pub fn reason(&self) -> Reason {
        Reason::ProxyUnavailable
    }
}

macro_rules! shared_errors {
    ($($error:ident => $variant:ident),*) => {$(
        impl From<$error> for ProxyError {
            fn from(error: $error) -> Self {
                Self::$variant(Arc::new(error))
            }
        }
    )*};
}
shared_errors!(StoreError => Store, SystemdError => Systemd);

/// The node's proxy. Cheap to clone; an agent has one.
#[derive(Clone)]
pub struct Proxy {
    inner: Arc<Inner>,
}

struct Inner {
    folder: PathBuf,
    units: UnitFiles,
    systemd: Systemd,
    settings: ProxySettings,
    reloads: Reloads,
    certificates: Certificates,
    /// Who held the port for TLS when that was last looked at: then nothing listens there, as nginx would take no
    /// configuration at all.
    tls_holder: Mutex<Option<String>>,
}

impl Proxy {
    /// `folder` is /var/lib/kari/proxy. Nothing is done yet.
    pub fn new(
        folder: PathBuf,
        units: UnitFiles,
        systemd: Systemd,
        settings: ProxySettings,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                certificates: Certificates::new(&folder),
                tls_holder: Mutex::default(),
                folder,
                units,
                reloads: Reloads::new(systemd.clone()),
                systemd,
                settings,
            }),
        }
    }

    /// Brings the proxy up: files, unit, enabled, running, answering on its port. To be called at the
    /// agent's start and every now and then; does nothing where all is well.
    pub async fn ensure(&self) -> Result<(), ProxyError> {
        let Inner {
            folder,
            units,
            systemd,
            ..
        } = &*self.inner;
        self.look_at_tls_port();
        let settings = &self.settings();
        store::make_folder(&self.vhosts(), 0o755, None)?;
        store::make_folder(&self.paused(), 0o755, None)?;
        self.inner.certificates.ensure()?;
        for (name, text) in configuration::render_files(settings, folder) {
            replace(&folder.join(name), text.as_bytes())?;
        }
        let unit = render_unit(settings, folder);
        if units.read(UNIT)?.as_deref() != Some(unit.as_str()) {
            units.write(UNIT, &unit)?;
        }
        if !units.is_enabled(UNIT)? {
            units.enable(UNIT)?;
        }
        let loaded = systemd.get_unit_state(UNIT).await?;
        if loaded
            .as_ref()
            .is_some_and(|state| state.need_daemon_reload)
        {
            // Only an upgrade of the agent brings this about.
            systemd.daemon_reload().await?;
        }
        if loaded.is_none_or(|state| state.active_state != ActiveState::Active) {
            self.start().await?;
        }
        self.inner.reloads.clear_leftovers();
        if self.measure_settings().await.is_err() {
            self.inner.reloads.reload().await?;
        }
        match self.measure_settings().await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.blame_holder_of_port().await.unwrap_or(error)),
        }
    }

    /// The settings, without TLS while somebody else holds its port.
    fn settings(&self) -> ProxySettings {
        let mut settings = self.inner.settings.clone();
        if self.tls_holder().is_some() {
            settings.https_port = 0;
        }
        settings
    }

    fn tls_holder(&self) -> MutexGuard<'_, Option<String>> {
        let holder = self.inner.tls_holder.lock();
        holder.unwrap_or_else(PoisonError::into_inner)
    }

    /// Another's port must not take what is served without TLS down.
    fn look_at_tls_port(&self) {
        let port = self.inner.settings.https_port;
        let holder = Some(port).filter(|port| *port != 0);
        *self.tls_holder() = holder.and_then(|port| holder_of(port, own_user()));
    }

    async fn start(&self) -> Result<(), ProxyError> {
        // nginx would try for 2.5 s and then be started anew: say at once what is in the way.
        if let Some(error) = self.blame_holder_of_port().await {
            // It comes up by itself when the port is free.
            self.inner.systemd.start_unit(UNIT).await?;
            return Err(error);
        }
        self.inner.systemd.start_unit(UNIT).await?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let state = self.inner.systemd.get_unit_state(UNIT).await?;
            match state {
                Some(state) if state.active_state == ActiveState::Active => return Ok(()),
                Some(state)
                    if Instant::now() > deadline || state.active_state == ActiveState::Failed =>
                {
                    let state = format!("{}, result {}", state.sub_state, state.result);
                    return Err(self
                        .blame_holder_of_port()
                        .await
                        .unwrap_or(ProxyError::NotRunning { state }));
                }
                None if Instant::now() > deadline => {
                    return Err(ProxyError::NotRunning {
                        state: "not loaded".to_owned(),
                    });
                }
                Some(_) | None => sleep(LOOK_INTERVAL).await,
            }
        }
    }

    /// The error that names who holds the port, if that is somebody else.
    async fn blame_holder_of_port(&self) -> Option<ProxyError> {
        let settings = self.settings();
        let ports = [settings.http_port, settings.https_port];
        let find = move || {
            let own = own_user();
            let mut ports = ports.into_iter().filter(|port| *port != 0);
            ports.find_map(|port| Some((port, holder_of(port, own)?)))
        };
        let found = tokio::task::spawn_blocking(find).await;
        // Best effort: not to know who it is must not hide the first error.
        let (port, holder) = found.unwrap_or_default()?;
        Some(ProxyError::PortHeld { port, holder })
    }

    /// Whether a certificate of an app and its key are on the disk.
    pub fn has_certificate(&self, app: &AppName, id: &CertificateId) -> bool {
        self.inner.certificates.has(app, id)
    }

    /// Keeps a certificate of an app on the disk, to be served by [`Proxy::publish`]. It goes when a later call
    /// of that does not need it.
    pub fn keep_certificate(
        &self,
        app: &AppName,
        id: &CertificateId,
        certificate: &ServerCertificate,
    ) -> Result<(), ProxyError> {
        Ok(self.inner.certificates.keep(app, id, certificate)?)
    }

    /// Brings the host's certificates to where nginx reads them.
    fn hand_over_certificates(&self, host: &VirtualHost) -> Result<(), ProxyError> {
        for (name, routes) in host.routes_by_host() {
            let Some(id) = certificate_of(&routes) else {
                continue;
            };
            let host_name = || name.to_string();
            if self.settings().https_port == 0 {
                let why = match &*self.tls_holder() {
                    Some(holder) => format!(
                        "port {} is held by {holder}: stop it, or give the agent another --https-port",
                        self.inner.settings.https_port
                    ),
                    None => "its agent was started with --https-port=0: give it a port, or leave out route.tls".to_owned(),
                };
                return Err(ProxyError::NoTls {
                    host: host_name(),
                    why,
                });
            }
            if !self.inner.certificates.has(&host.app, id) {
                return Err(ProxyError::NoCertificate { host: host_name() });
            }
            self.inner.certificates.hand_over(&host.app, id)?;
        }
        Ok(())
    }

    /// Serves `host`: writes its file if it differs, reloads if it differs or is not in force, and measures
    /// on new connections. Bounded by the limits of reloading and measuring, 35 s together.
    /// What it returns has to drain before the old process may stop: nothing, if all was so already.
    pub async fn publish(&self, host: &VirtualHost) -> Result<OldWorkers, ProxyError> {
        let path = self.vhosts().join(virtual_host_file(&host.app));
        let text = render_virtual_host(host, &self.settings(), &self.inner.folder);
        let before = store::read(&path)?;
        let paused = self.pause(host)?;
        if before.as_deref() == Some(text.as_bytes()) {
            self.end_pauses(&host.app, &paused)?;
            if self.measure(host).await.is_ok() {
                return Ok(OldWorkers::default());
            }
        }
        if self.inner.reloads.workers().await?.is_empty() {
            self.ensure().await?;
        }
        self.hand_over_certificates(host)?;
        replace(&path, text.as_bytes())?;
        let old = match self.reload_for(&path).await {
            Ok(old) => old,
            Err(error) => {
                if matches!(error, ProxyError::Refused { .. }) {
                    // Nobody else's reload may fail for it.
                    match &before {
                        Some(text) => replace(&path, text)?,
                        None => store::remove(&path)?,
                    }
                }
                return Err(error);
            }
        };
        self.end_pauses(&host.app, &paused)?;
        self.measure(host).await?;
        let used = host.certificates();
        self.inner.certificates.collect(&host.app, &used)?;
        Ok(old)
    }

    /// Writes the files that pause the host's routes which are to be. What is in force meanwhile has other ports.
    fn pause(&self, host: &VirtualHost) -> Result<BTreeSet<String>, ProxyError> {
        let mut paused = BTreeSet::new();
        for route in &host.routes {
            match route.target {
                RouteTarget::Paused { primary } => {
                    paused.insert(pause_file(&host.app, &route.process, primary));
                }
                RouteTarget::Port { .. } | RouteTarget::Unavailable => {}
            }
        }
        for file in &paused {
            replace(&self.paused().join(file), b"")?;
        }
        Ok(paused)
    }

    /// Removes an app's other pause files, once what is in force has no use for them.
    fn end_pauses(&self, app: &AppName, but: &BTreeSet<String>) -> Result<(), ProxyError> {
        for name in store::names_in(&self.paused())? {
            if name.starts_with(&pause_files_of(app)) && !but.contains(&name) {
                store::remove(&self.paused().join(name))?;
            }
        }
        Ok(())
    }

    /// Whether `host` is in force: each of its host names is answered by the release, and each path of each by
    /// the process that it names. Each request is on a connection of its own.
    pub async fn measure(&self, host: &VirtualHost) -> Result<(), ProxyError> {
        let release = host.release_id.to_string();
        let deadline = Instant::now() + MEASURE_LIMIT;
        let mut questions = vec![];
        for (host, routes) in host.routes_by_host() {
            questions.push((host, IDENTITY_PATH, None));
            for route in &routes {
                questions.push((host, measured_path(route, &routes), Some(route.target)));
            }
        }
        let ask = |(host, path, target): (&HostName, &str, Option<RouteTarget>)| {
            let (host, path) = (host.to_string(), path.to_owned());
            let release = &release;
            async move {
                let answer = self.ask(&host, &path, deadline).await?;
                match target {
                    None => names(&answer, release),
                    Some(target) => came_from(&answer, target),
                }
                .map_err(|message| not_in_force(&host, format!("GET {path}: {message}")))
            }
        };
        stream::iter(questions.into_iter().map(ask))
            .buffered(MEASURED_AT_ONCE)
            .try_collect::<()>()
            .await?;
        self.measure_certificates(host, deadline).await
    }

    /// Whether each host with a certificate shows it.
    async fn measure_certificates(
        &self,
        host: &VirtualHost,
        deadline: Instant,
    ) -> Result<(), ProxyError> {
        for (name, routes) in host.routes_by_host() {
            let Some(id) = certificate_of(&routes) else {
                continue;
            };
            let leaf = self.inner.certificates.leaf(&host.app, id)?;
            let asked = name.as_str().replacen('*', ANY_LABEL, 1);
            let shown = tls::shown(self.inner.settings.https_port, &asked);
            let why = match timeout_at(deadline, shown).await {
                Ok(Ok(shown)) if Some(&shown) == leaf.as_ref() => continue,
                Ok(Ok(_)) => "https shows another certificate".to_owned(),
                Ok(Err(why)) => format!("https: {why}"),
                Err(_) => format!("https: no answer within {} s", MEASURE_LIMIT.as_secs()),
            };
            return Err(not_in_force(name.as_str(), why));
        }
        Ok(())
    }

    /// Serves nothing for `app` any more: removes its file, reloads, and measures that its hosts are
    /// refused. What it returns has to drain. An app without a file is done.
    pub async fn remove(&self, app: &AppName) -> Result<OldWorkers, ProxyError> {
        let path = self.vhosts().join(virtual_host_file(app));
        let refused = path.with_extension("conf.bad");
        store::remove(&refused)?;
        let Some(text) = store::read(&path)? else {
            self.inner.certificates.collect(app, &BTreeSet::new())?;
            return Ok(OldWorkers::default());
        };
        let hosts = hosts_of(&String::from_utf8_lossy(&text));
        store::remove(&path)?;
        self.end_pauses(app, &BTreeSet::new())?;
        let old = match self.reload_for(&path).await {
            Ok(old) => old,
            Err(error) => {
                // Back in its place, as it is still served: the next call has something to do.
                replace(&path, &text)?;
                return Err(error);
            }
        };
        let deadline = Instant::now() + MEASURE_LIMIT;
        for host in hosts {
            let answer = self.ask(host.as_str(), IDENTITY_PATH, deadline).await?;
            // Another Deployment's `*.` may stand for it: then that one's release is named.
            if !self.is_another_apps(&host)? {
                names(&answer, &self.own_name())
                    .map_err(|message| not_in_force(host.as_str(), message))?;
            }
        }
        self.inner.certificates.collect(app, &BTreeSet::new())?;
        Ok(old)
    }

    fn is_another_apps(&self, host: &HostName) -> Result<bool, ProxyError> {
        let served = self.hosts()?;
        Ok(served.values().flatten().any(|other| {
            other
                .as_str()
                .strip_prefix('*')
                .is_some_and(|suffix| host.as_str().ends_with(suffix))
        }))
    }

    /// Those of `old` that still run. The caller has the limit, [`DRAIN_LIMIT`].
    pub async fn still_draining(&self, old: &OldWorkers) -> Result<OldWorkers, ProxyError> {
        if old.is_empty() {
            return Ok(OldWorkers::default());
        }
        let workers = self.inner.reloads.workers().await?;
        let pids = old
            .pids
            .iter()
            .copied()
            .filter(|pid| workers.contains_key(pid))
            .collect();
        Ok(OldWorkers { pids })
    }

    /// All workers that no longer accept connections: what an agent that restarted in a drain waits for.
    pub async fn retiring_workers(&self) -> Result<OldWorkers, ProxyError> {
        let workers = self.inner.reloads.workers().await?;
        Ok(OldWorkers {
            pids: workers
                .into_iter()
                .filter(|(_, w)| *w == Worker::Retiring)
                .map(|(pid, _)| pid)
                .collect(),
        })
    }

    /// The host names of every vhost on the node, for [`super::route_conflicts`].
    pub fn hosts(&self) -> Result<BTreeMap<AppName, Vec<HostName>>, ProxyError> {
        let mut hosts = BTreeMap::new();
        for name in store::names_in(&self.vhosts())? {
            let Some(app) = name
                .strip_suffix(".conf")
                .and_then(|app| AppName::parse(app).ok())
            else {
                continue;
            };
            // Gone meanwhile: it serves nothing.
            if let Some(text) = store::read(&self.vhosts().join(&name))? {
                hosts.insert(app, hosts_of(&String::from_utf8_lossy(&text)));
            }
        }
        Ok(hosts)
    }

    fn vhosts(&self) -> PathBuf {
        self.inner.folder.join("vhosts")
    }

    fn paused(&self) -> PathBuf {
        self.inner.folder.join(PAUSED_FOLDER)
    }

    /// What the server that refuses calls itself.
    fn own_name(&self) -> String {
        format!("kari-proxy {}", settings_digest(&self.settings()))
    }

    async fn measure_settings(&self) -> Result<(), ProxyError> {
        // No host name that a Deployment can have.
        let answer = self
            .ask("_", IDENTITY_PATH, Instant::now() + MEASURE_LIMIT)
            .await?;
        names(&answer, &self.own_name()).map_err(|message| not_in_force("_", message))
    }

    async fn ask(&self, host: &str, path: &str, deadline: Instant) -> Result<Answer, ProxyError> {
        let headers = [
            ("Host".to_owned(), host.replacen('*', ANY_LABEL, 1)),
            (MEASURE_HEADER.to_owned(), "1".to_owned()),
        ];
        match timeout_at(
            deadline,
            probe::get(self.inner.settings.http_port, path, &headers),
        )
        .await
        {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(not_in_force(host, error.to_string())),
            Err(_) => Err(not_in_force(
                host,
                format!("GET {path}: no answer within {} s", MEASURE_LIMIT.as_secs()),
            )),
        }
    }

    /// Reloads for the sake of the file at `path`. Another one's bad file may be in the way; its writer takes it
    /// back.
    async fn reload_for(&self, path: &Path) -> Result<OldWorkers, ProxyError> {
        let mut tries = 1;
        loop {
            match self.inner.reloads.reload().await {
                Err(ProxyError::Refused { message })
                    if tries < RELOAD_TRIES && !message.contains(&*path.to_string_lossy()) =>
                {
                    tries += 1;
                }
                outcome => return outcome,
            }
        }
    }
}

/// The proxy's own user, which owns its folder; none before its first start. Its processes would not do: a
/// Pod sees none, and nginx has some while it tries for a port that another holds.
fn own_user() -> Option<u32> {
    let folder = std::fs::metadata(RUN_FOLDER).ok()?;
    Some(folder.uid())
}

/// Writes a file that nginx reads, if it differs. What is written first is hidden, so that no `*.conf` means it.
fn replace(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    if store::read(path)?.as_deref() == Some(content) {
        return Ok(());
    }
    write_durably(path, content, 0o644)
}

fn not_in_force(host: &str, message: String) -> ProxyError {
    ProxyError::NotInForce {
        host: host.to_owned(),
        message,
    }
}

/// The host names that a file of [`render_virtual_host`] has.
pub(super) fn hosts_of(text: &str) -> Vec<HostName> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("server_name ")?.strip_suffix(';'))
        .flat_map(str::split_ascii_whitespace)
        .filter_map(|host| HostName::parse(host).ok())
        .collect()
}
