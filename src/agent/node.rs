//! What all apps of a node share: its store, its systemd, its proxy, its mirrors
//! and its slots.

use std::collections::{BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kube::core::DeserializeGuard;
use kube::runtime::reflector::{ObjectRef, Store as Reflected};
use tokio::sync::{Notify, Semaphore};

use super::claims::Claims;
use super::host::keys::NodeKeys;
use super::host::limits::Limits;
use super::host::mirror::Mirrors;
use super::host::probe::exec::EXEC_SLOTS;
use super::host::proxy::{HostName, Proxy, ProxyError};
use super::host::records::{AppliedRecord, AttemptRecord, Outcome};
use super::host::store::{DiskReserve, Store, UnitFiles};
use super::host::systemd::Systemd;
use super::host::users::Users;
use super::memory::Memory;
use super::slots::Slots;
use super::view::Wanted;
use super::wanted::wanted;
use crate::api::Release;
use crate::api::names::{AppName, NodeName, release_name};
use crate::api::reasons::Reason;
use crate::runtime::supervise::Trigger;

/// What all apps of a node share.
pub struct Node {
    /// The node's name.
    pub name: NodeName,
    /// `$PATH` of builds and processes.
    pub tool_path: String,
    /// Ports that processes may be given.
    pub ports: RangeInclusive<u16>,
    /// The disk.
    pub store: Store,
    /// /etc/systemd/system.
    pub units: UnitFiles,
    /// The node's user database.
    pub users: Users,
    /// What opens what is sealed for the node.
    pub keys: Mutex<NodeKeys>,
    /// systemd.
    pub systemd: Systemd,
    /// The proxy.
    pub proxy: Proxy,
    /// The mirrors.
    pub mirrors: Mirrors,
    /// Which limits were proven.
    pub limits: Limits,
    /// Wakes apps.
    pub trigger: Trigger<AppName>,
    /// The Releases of this node.
    pub releases: Reflected<DeserializeGuard<Release>>,
    /// Whether the first list of them is complete.
    pub listed: AtomicBool,
    /// The client, for statuses.
    pub client: kube::Client,
    /// The build slots.
    pub slots: Mutex<Slots>,
    /// What fetches and builds leave free on the disk.
    pub reserve: DiskReserve,
    /// Commands of probes that may run.
    pub probe_slots: Semaphore,
    /// One choice of ports at a time.
    pub choosing: tokio::sync::Mutex<()>,
    /// Something may have happened to the proxy.
    pub proxy_changed: Notify,
    claims: Mutex<Claims>,
    /// Something lies in the trash.
    pub trash: Notify,
    /// What nothing on the node refers to is to be looked for now.
    pub collect: Notify,
    /// Whether the disk lacks its reserve.
    pub short_of_room: AtomicBool,
    /// The Releases have changed, and with them perhaps which apps are held without one.
    pub held: Notify,
    /// Apps that root on the node wants away, and that no Release held when that was asked.
    pub unwanted: Mutex<BTreeSet<AppName>>,
    memories: Mutex<HashMap<AppName, Arc<Mutex<Memory>>>>,
}

impl Node {
    /// A node, with nothing remembered.
    #[allow(
        clippy::too_many_arguments,
        reason = "made in one place, of parts that are made there"
    )]
    pub fn new(
        (name, tool_path, ports): (NodeName, String, RangeInclusive<u16>),
        (store, units, users, keys): (Store, UnitFiles, Users, NodeKeys),
        (systemd, proxy, mirrors): (Systemd, Proxy, Mirrors),
        limits: Limits,
        trigger: Trigger<AppName>,
        (client, releases): (kube::Client, Reflected<DeserializeGuard<Release>>),
        (build_slots, reserve): (usize, DiskReserve),
    ) -> Self {
        Self {
            name,
            tool_path,
            ports,
            store,
            units,
            users,
            keys: Mutex::new(keys),
            systemd,
            proxy,
            mirrors,
            limits,
            trigger,
            releases,
            listed: AtomicBool::new(false),
            client,
            slots: Mutex::new(Slots::new(build_slots)),
            reserve,
            probe_slots: Semaphore::new(EXEC_SLOTS),
            choosing: tokio::sync::Mutex::new(()),
            proxy_changed: Notify::new(),
            claims: Mutex::new(Claims::default()),
            trash: Notify::new(),
            collect: Notify::new(),
            short_of_room: AtomicBool::new(false),
            held: Notify::new(),
            unwanted: Mutex::default(),
            memories: Mutex::new(HashMap::new()),
        }
    }

    /// What is remembered of an app.
    pub fn memory(&self, app: &AppName) -> Arc<Mutex<Memory>> {
        Arc::clone(lock(&self.memories).entry(app.clone()).or_default())
    }

    /// Forgets an app that is gone.
    pub fn forget(&self, app: &AppName) {
        lock(&self.memories).remove(app);
        self.release_hosts(app);
        lock(&self.claims).withdraw(app);
        self.withdraw(app);
    }

    /// The Release of an app, if the API has one.
    pub fn release(&self, app: &AppName) -> Option<Arc<DeserializeGuard<Release>>> {
        let name = release_name(app.name(), &self.name);
        let release = self
            .releases
            .get(&ObjectRef::new(&name).within(app.namespace()))?;
        let is_ours = release
            .0
            .as_ref()
            .map_or(true, |release| release.spec.node_name == self.name.as_str());
        is_ours.then_some(release)
    }

    /// What the API wants of an app.
    pub fn wanted(&self, app: &AppName) -> Wanted {
        match self.release(app) {
            Some(release) => wanted(&release),
            None if lock(&self.unwanted).contains(app) => Wanted::Removal { keep_state: false },
            None if self.listed.load(Ordering::Relaxed) => Wanted::Absent,
            None => Wanted::Unknown,
        }
    }

    /// Every app that the API, the disk or the agent knows of.
    pub fn apps(&self) -> BTreeSet<AppName> {
        let mut apps: BTreeSet<AppName> = lock(&self.memories).keys().cloned().collect();
        apps.extend(self.store.apps().unwrap_or_default());
        apps.extend(
            self.releases
                .state()
                .iter()
                .filter_map(|release| super::wanted::app_of(release, &self.name)),
        );
        apps
    }

    /// Wakes every app.
    pub fn wake_all(&self) {
        for app in self.apps() {
            self.trigger.wake(app);
        }
    }

    /// Whether the disk lacked its reserve when it was last looked at.
    pub fn is_short_of_room(&self) -> bool {
        self.short_of_room.load(Ordering::Relaxed)
    }

    /// Has every app look for what nothing refers to, whenever it last did.
    pub fn hasten_collection(&self) {
        for app in self.apps() {
            lock(&self.memory(&app)).collected = None;
            self.trigger.wake(app);
        }
    }

    /// The app wants no build slot any more.
    pub fn withdraw(&self, app: &AppName) {
        let wake = lock(&self.slots).withdraw(app);
        for app in wake {
            self.trigger.wake(app);
        }
    }

    /// Claims the hosts of an attempt, and those of what it may have to go back to; those that another app
    /// has are given back with it, and then nothing is claimed.
    pub fn claim_hosts(
        &self,
        attempt: &AttemptRecord,
        applied: Option<&AppliedRecord>,
    ) -> Result<Vec<(HostName, AppName)>, ProxyError> {
        let mut claims = lock(&self.claims);
        // With the lock held: who gives a host up does so before, or sees that it is waited for.
        let served = self.proxy.hosts()?;
        Ok(claims.claim(&attempt.wish.app, hosts_of(attempt, applied), &served))
    }

    /// The app has no hosts but those it serves: wakes those who waited for others.
    pub fn release_hosts(&self, app: &AppName) {
        let waiting = lock(&self.claims).release(app);
        for app in waiting {
            self.trigger.wake(app);
        }
    }

    /// Claims what attempts under way had claimed before the agent's start. To be called before any app is
    /// looked at.
    pub fn restore_claims(&self) {
        for app in self.store.apps().unwrap_or_default() {
            let folder = self.store.app(&app);
            // What cannot be read is told by the app's own run, which does not get further either.
            if let (Ok(Some(attempt)), Ok(applied)) = (folder.read_attempt(), folder.read_applied())
                && !attempt.processes.is_empty()
                && !is_over(&attempt)
            {
                lock(&self.claims).restore(&app, hosts_of(&attempt, applied.as_ref()));
            }
        }
    }

    /// The proxy is up again: who waited for it does not wait any longer.
    pub fn proxy_is_back(&self) {
        let memories: Vec<_> = lock(&self.memories)
            .iter()
            .map(|(app, memory)| (app.clone(), Arc::clone(memory)))
            .collect();
        for (app, memory) in memories {
            let mut memory = lock(&memory);
            if memory
                .held_up
                .as_ref()
                .is_some_and(|held_up| held_up.failure.reason == Reason::ProxyUnavailable)
            {
                memory.went_well();
                self.trigger.wake(app);
            }
        }
    }

    /// The file of an app's virtual host.
    pub fn virtual_host_file(&self, app: &AppName) -> PathBuf {
        self.store
            .proxy()
            .join("vhosts")
            .join(format!("{app}.conf"))
    }
}

/// Whether nothing of an attempt is left to be done or taken back.
pub fn is_over(attempt: &AttemptRecord) -> bool {
    match attempt.outcome {
        None => false,
        Some(Outcome::Committed { .. }) => true,
        Some(Outcome::Failed { undone, .. } | Outcome::Superseded { undone, .. }) => undone,
    }
}

/// The hosts of an attempt and of what is committed.
fn hosts_of(attempt: &AttemptRecord, applied: Option<&AppliedRecord>) -> Vec<HostName> {
    let committed = applied.and_then(|applied| applied.release.as_ref());
    let templates = [&attempt.wish.template]
        .into_iter()
        .chain(committed.map(|release| &release.template));
    templates
        .flat_map(|template| &template.processes)
        .filter_map(|process| process.route.as_ref())
        .flat_map(|route| &route.hosts)
        .filter_map(|host| HostName::parse(host).ok())
        .collect()
}

/// A lock whose holder panicked still holds whole data: nothing here is changed half-way.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// CLOCK_MONOTONIC, which systemd's times are in too.
pub fn monotonic() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
