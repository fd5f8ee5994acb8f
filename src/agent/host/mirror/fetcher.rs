//! Looking at the mirrors, and starting, stopping and throwing away.
//!
//! One task looks after all mirrors. It never waits for a fetch: it starts the
//! unit, and is woken when the unit has changed, when a want has, or by time.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use std::collections::BTreeMap;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::credentials::{self, CREDENTIAL_PATH};
use super::refs;
use super::schedule::{Action, MirrorState, Schedule, Seen, Start, Unit};
use super::step::{Hold, KNOWN_HOSTS, KNOWN_HOSTS_PATH, Paths, SCRIPT, fetch_step};
use super::{MirrorKey, Want};
use crate::agent::host::jail::{Setting, Value};
use crate::agent::host::store::{self, Store, StoreError, write_durably};
use crate::agent::host::systemd::{Systemd, SystemdError};
use crate::agent::host::unit::{
    CHECKOUT_FILE, CHECKOUT_SCRIPT, UnitError, fetch_unit_name, step_properties,
};
use crate::api::names::AppName;
use crate::git_credential::GitCredential;

/// How long a fetch's unit may take to stop; its processes are killed after 10 s.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// SIGKILL.
const SIGKILL: i32 = 9;

/// While a fetch runs, its unit is looked at at least this often, should a signal be missed.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// Between two looks at the earliest, however often somebody asks for one.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);

/// After an error of systemd's or the disk's.
const ERROR_PAUSE: Duration = Duration::from_secs(2);

/// Bytes of git's words that are read.
const LOG_TAIL_BYTES: u64 = 16 << 10;

/// What mirrors need of the node.
#[derive(Debug, Clone)]
pub struct MirrorSettings {
    /// Fetches at a time.
    pub slots: usize,
    /// kari-git.
    pub user: String,
    /// Its uid, which is its gid too.
    pub uid: u32,
    /// `$PATH` of the node's tools.
    pub tool_path: String,
}

/// Why a mirror cannot be looked at or changed.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// systemd.
    #[error(transparent)]
    Systemd(#[from] SystemdError),
    /// The unit cannot be said.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// Something in the mirror.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The node's mirrors. Cheap to clone; an agent has one.
#[derive(Clone)]
pub struct Mirrors {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) store: Store,
    pub(super) systemd: Systemd,
    pub(super) settings: MirrorSettings,
    /// The mirror that is being brought in order, by a unit of its fetch's name; held while either is started
    /// or stopped.
    pub(super) upkeep: tokio::sync::Mutex<Option<MirrorKey>>,
    wake: Box<dyn Fn(&AppName) + Send + Sync>,
    started: Instant,
    schedule: Mutex<Schedule>,
    /// What the mirrors that somebody wants something of are read with.
    credentials: Mutex<BTreeMap<MirrorKey, Arc<GitCredential>>>,
    look: Notify,
}

impl Mirrors {
    /// `wake` is called for each app whose [`MirrorState`] has changed; it must not block. Nothing happens
    /// before [`Mirrors::run`].
    pub fn new(
        store: Store,
        systemd: Systemd,
        settings: MirrorSettings,
        wake: impl Fn(&AppName) + Send + Sync + 'static,
    ) -> Self {
        let schedule = Mutex::new(Schedule::new(settings.slots));
        Self {
            inner: Arc::new(Inner {
                store,
                systemd,
                settings,
                upkeep: tokio::sync::Mutex::new(None),
                wake: Box::new(wake),
                started: Instant::now(),
                schedule,
                credentials: Mutex::default(),
                look: Notify::new(),
            }),
        }
    }

    /// The app wants a commit; the newest want counts, and the same one again changes nothing. `credential` is the
    /// one that the want names.
    pub fn want(&self, app: &AppName, want: Want, credential: Option<Arc<GitCredential>>) {
        let key = want.key();
        let path = self.mirror(&key);
        {
            let mut schedule = self.schedule();
            schedule.want(self.now(), app, want, path);
            let mut credentials = self.credentials();
            credentials.retain(|key, _| schedule.is_wanted(key));
            if let Some(credential) = credential {
                credentials.insert(key, credential);
            }
        }
        self.inner.look.notify_one();
    }

    /// The app wants nothing: a fetch that nobody else wants is stopped. What is held stays.
    pub fn unwant(&self, app: &AppName) {
        self.schedule().unwant(app);
        self.inner.look.notify_one();
    }

    /// How far the app has come; nothing if it wants nothing.
    pub fn state(&self, app: &AppName) -> Option<MirrorState> {
        self.schedule().state(self.now(), app)
    }

    /// The commit could not be checked out although the mirror holds it: it is looked through, and made
    /// anew if it is damaged.
    pub fn suspect(&self, app: &AppName) {
        self.schedule().suspect(app);
        self.inner.look.notify_one();
    }

    /// A unit of a fetch has changed, or may have.
    pub fn dirty(&self) {
        self.inner.look.notify_one();
    }

    /// The app is gone from the node: what was held for it is let go, and a mirror that holds nothing
    /// for anybody goes to the trash. Idempotent.
    pub async fn release(&self, app: &AppName) -> Result<(), MirrorError> {
        self.unwant(app);
        for key in self.keys()? {
            let mirror = self.mirror(&key);
            refs::release(&mirror, app).map_err(at("let go of a reference in", &mirror))?;
            self.drop_unheld(&key).await?;
        }
        Ok(())
    }

    /// All mirrors that are there.
    pub(super) fn keys(&self) -> Result<Vec<MirrorKey>, MirrorError> {
        let names = store::names_in(&self.inner.store.mirrors())?;
        let keys = names.iter().filter_map(|name| name.strip_suffix(".git"));
        Ok(keys.map(|key| MirrorKey(key.to_owned())).collect())
    }

    /// Moves a mirror that holds nothing for anybody to the trash; true if it did.
    pub(super) async fn drop_unheld(&self, key: &MirrorKey) -> Result<bool, MirrorError> {
        let mirror = self.mirror(key);
        let holders = refs::holders(&mirror).map_err(at("list the references of", &mirror))?;
        if !holders.is_empty() || self.schedule().is_wanted(key) {
            return Ok(false);
        }
        self.stop(key).await?;
        self.drop_mirror(key)?;
        Ok(true)
    }

    /// Looks after the mirrors until it is dropped.
    pub async fn run(&self) {
        if let Err(error) = self.install_scripts() {
            // Each fetch tries again.
            warn!(%error, "the scripts of the fetches cannot be written");
        }
        if let Err(error) = self.remove_logs_without_unit().await {
            warn!(%error, "the logs of fetches that were cut off cannot be removed from /var/lib/kari/mirrors");
        }
        let mut known = BTreeMap::new();
        loop {
            let pause = match self.round().await {
                Ok(()) => SHORTEST_PAUSE,
                Err(error) => {
                    warn!(%error, "mirrors cannot be looked after");
                    ERROR_PAUSE
                }
            };
            known = self.wake_changed(known);
            tokio::time::sleep(pause).await;
            let next = self.next_look();
            match next {
                // Over time is all that may happen here: the round looks at everything.
                Some(after) => drop(timeout(after, self.inner.look.notified()).await),
                None => self.inner.look.notified().await,
            }
        }
    }

    async fn round(&self) -> Result<(), MirrorError> {
        let mirrors: Vec<(MirrorKey, PathBuf, Vec<AppName>)> = self
            .schedule()
            .mirrors()
            .map(|(key, path, apps)| (key.clone(), path.clone(), apps.cloned().collect()))
            .collect();
        let mut failed = self.remove_unwanted_credentials().await.err();
        for (key, path, apps) in mirrors {
            // One that cannot be looked at holds no other up.
            let seen = match self.look_at(&key, &path, &apps).await {
                Ok(seen) => seen,
                Err(error) => {
                    failed = Some(error);
                    continue;
                }
            };
            let action = self
                .schedule()
                .take_in(self.now(), fastrand::f64(), &key, seen);
            match action {
                Action::Nothing => {}
                Action::Stop => self.stop(&key).await?,
                Action::StopAndDrop => {
                    warn!(mirror = key.as_str(), "a damaged mirror is made anew");
                    self.stop(&key).await?;
                    self.drop_mirror(&key)?;
                    self.inner.look.notify_one();
                }
            }
        }
        loop {
            let start = self.schedule().next_start();
            let Some(start) = start else {
                return failed.map_or(Ok(()), Err);
            };
            if let Err(error) = self.start(&start).await {
                let message = format!("cannot start the fetch of {}: {error}", start.source);
                self.schedule()
                    .start_failed(self.now(), fastrand::f64(), &start.key, message);
            }
        }
    }

    async fn look_at(
        &self,
        key: &MirrorKey,
        path: &Path,
        apps: &[AppName],
    ) -> Result<Seen, MirrorError> {
        let upkeep = self.inner.upkeep.lock().await;
        let state = match &*upkeep {
            // Its unit is none of the fetch's, which may begin.
            Some(upkept) if upkept == key => None,
            Some(_) | None => {
                let unit = fetch_unit_name(key.as_str());
                self.inner.systemd.get_unit_state(&unit).await?
            }
        };
        drop(upkeep);
        let unit = match state {
            None => Unit::Absent,
            Some(state) if state.active_state.is_stopped() || state.sub_state == "exited" => {
                Unit::Ended {
                    result: state.step_result(),
                    log: self.masked_log(key)?,
                }
            }
            Some(_) => Unit::Running,
        };
        // After the unit: what it set last is seen when it has ended.
        let mut held = BTreeMap::new();
        for app in apps {
            if let Some(here) = refs::held(path, app).map_err(at("read a reference of", path))? {
                held.insert(app.clone(), here);
            }
        }
        Ok(Seen { unit, held })
    }

    async fn start(&self, start: &Start) -> Result<(), MirrorError> {
        let Start {
            key,
            source,
            mode,
            holds,
        } = start;
        let Inner {
            systemd, settings, ..
        } = &*self.inner;
        let mirror = self.mirror(key);
        let credential = self.credentials().get(key).map(Arc::clone);
        if credential.is_some() {
            self.take_over(key, holds).await?;
        }
        store::make_folder(&mirror, 0o755, Some(settings.uid))?;
        let script = self.install_scripts()?;
        let log = self.log(key);
        store::remove(&log)?;
        let paths = Paths {
            mirror,
            script,
            log,
        };
        let access = credential.map(|credential| credential.access(Path::new(CREDENTIAL_PATH)));
        let mut step = fetch_step(
            source,
            paths,
            &settings.user,
            &settings.tool_path,
            *mode,
            holds,
            access.as_ref(),
        );
        info!(mirror = key.as_str(), url = %source, commits = holds.len(), "fetching");
        let mut upkeep = self.inner.upkeep.lock().await;
        if upkeep.as_ref() == Some(key) {
            self.stop(key).await?;
            *upkeep = None;
        }
        if let Some(access) = &access {
            credentials::write(key, access, settings.uid)?;
            step.read_only
                .push((credentials::folder(key), CREDENTIAL_PATH.to_owned()));
        }
        let mut properties = step_properties(&step)?;
        // Without it no host is known. Whether it is there is for the node's systemd to see: an agent that is a
        // Pod has an /etc of its own.
        properties.push(Setting::new(
            "BindReadOnlyPaths",
            Value::BindIfThere(KNOWN_HOSTS.to_owned(), KNOWN_HOSTS_PATH.to_owned()),
        ));
        match systemd
            .start_transient(&fetch_unit_name(key.as_str()), &properties)
            .await
        {
            // Looked at in the next round.
            Ok(()) | Err(SystemdError::UnitExists { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Goes on with the mirror of the same repository that was filled with an earlier credential, if it holds
    /// commits for nobody but those who want this one: what is in it they have had. Not so for a repository that
    /// everybody may read now: others would see what was private.
    async fn take_over(&self, key: &MirrorKey, holds: &[Hold]) -> Result<(), MirrorError> {
        let mirror = self.mirror(key);
        if mirror.exists() {
            return Ok(());
        }
        for other in self.keys()? {
            if !other.is_of_the_same_url(key) || self.schedule().is_wanted(&other) {
                continue;
            }
            let earlier = self.mirror(&other);
            let holders =
                refs::holders(&earlier).map_err(at("list the references of", &earlier))?;
            let are_these = |app: &AppName| holds.iter().any(|hold| hold.app == *app);
            if holders.is_empty() || !holders.iter().all(are_these) {
                continue;
            }
            {
                let mut upkeep = self.inner.upkeep.lock().await;
                self.stop(&other).await?;
                upkeep.take_if(|upkept| *upkept == other);
            }
            info!(
                mirror = key.as_str(),
                of = other.as_str(),
                "another credential, the same mirror"
            );
            store::remove(&self.log(&other))?;
            fs::rename(&earlier, &mirror).map_err(at("rename", &earlier))?;
            return Ok(());
        }
        Ok(())
    }

    /// What git said, without what is secret of the credential, on the disk too: a server can say what it was sent.
    fn masked_log(&self, key: &MirrorKey) -> Result<String, StoreError> {
        let path = self.log(key);
        let log = log_tail(&path);
        let Some(credential) = self.credentials().get(key).map(Arc::clone) else {
            return Ok(log);
        };
        let masked = credential.mask(&log);
        // Always: what stands before the end that was read goes.
        write_durably(&path, masked.as_bytes(), 0o600)?;
        credentials::remove(key)?;
        Ok(masked)
    }

    /// Removes the files of the credential of a fetch that is over. Where they are still there, nobody has read
    /// and masked what was said to it: its log goes with them.
    fn remove_credential(&self, key: &MirrorKey) -> Result<(), StoreError> {
        if credentials::folder(key).exists() {
            store::remove(&self.log(key))?;
        }
        credentials::remove(key)
    }

    /// Removes the logs of fetches that a reboot ended: nobody can tell whether they are masked.
    async fn remove_logs_without_unit(&self) -> Result<(), MirrorError> {
        for key in self.keys()? {
            let unit = fetch_unit_name(key.as_str());
            if self.inner.systemd.get_unit_state(&unit).await?.is_none() {
                store::remove(&self.log(&key))?;
            }
        }
        Ok(())
    }

    /// Removes files of credentials whose fetch is over and that nobody wants: an agent before this one began it.
    async fn remove_unwanted_credentials(&self) -> Result<(), MirrorError> {
        for key in credentials::keys()? {
            if self.schedule().is_wanted(&key) {
                continue;
            }
            let unit = fetch_unit_name(key.as_str());
            let state = self.inner.systemd.get_unit_state(&unit).await?;
            if state.is_none_or(|s| s.active_state.is_stopped() || s.sub_state == "exited") {
                self.remove_credential(&key)?;
            }
        }
        Ok(())
    }

    fn credentials(&self) -> MutexGuard<'_, BTreeMap<MirrorKey, Arc<GitCredential>>> {
        self.inner
            .credentials
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The script of the fetches, and that of the checkouts, which needs what fetches brought. Written at the
    /// agent's start already, so that an app which comes and goes leaves nothing behind.
    fn install_scripts(&self) -> Result<PathBuf, StoreError> {
        let folder = self.inner.store.mirrors();
        let fetch = folder.join("fetch.sh");
        for (path, text) in [
            (&fetch, SCRIPT),
            (&folder.join(CHECKOUT_FILE), CHECKOUT_SCRIPT),
        ] {
            if store::read(path)?.as_deref() != Some(text.as_bytes()) {
                write_durably(path, text.as_bytes(), 0o644)?;
            }
        }
        Ok(fetch)
    }

    /// Stops the unit of a mirror. Killed, as it has nothing to save and all mirrors wait for this.
    pub(super) async fn stop(&self, key: &MirrorKey) -> Result<(), MirrorError> {
        let unit = fetch_unit_name(key.as_str());
        let _ = self.inner.systemd.kill_unit(&unit, SIGKILL).await;
        self.inner.systemd.stop_unit(&unit, STOP_LIMIT).await?;
        Ok(self.remove_credential(key)?)
    }

    fn drop_mirror(&self, key: &MirrorKey) -> Result<(), MirrorError> {
        self.inner.store.trash(&self.mirror(key))?;
        store::remove(&self.log(key))?;
        Ok(())
    }

    pub(super) fn mirror(&self, key: &MirrorKey) -> PathBuf {
        self.inner
            .store
            .mirrors()
            .join(format!("{}.git", key.as_str()))
    }

    /// In a folder that is root's alone.
    pub(super) fn log(&self, key: &MirrorKey) -> PathBuf {
        self.inner
            .store
            .mirrors()
            .join(format!("{}.log", key.as_str()))
    }

    /// Wakes the apps whose state is another than before, the time of the next try apart.
    fn wake_changed(
        &self,
        known: BTreeMap<AppName, MirrorState>,
    ) -> BTreeMap<AppName, MirrorState> {
        let mut states = self.schedule().states(self.now());
        for state in states.values_mut() {
            if let MirrorState::Failed {
                failure: _,
                retry_in,
            } = state
            {
                *retry_in = Duration::ZERO;
            }
        }
        for (app, state) in &states {
            if known.get(app) != Some(state) {
                (self.inner.wake)(app);
            }
        }
        states
    }

    fn next_look(&self) -> Option<Duration> {
        let schedule = self.schedule();
        let deadline = schedule
            .next_deadline()
            .map(|deadline| deadline.saturating_sub(self.now()));
        let look = schedule.is_running().then_some(LOOK_INTERVAL);
        deadline.into_iter().chain(look).min()
    }

    fn now(&self) -> Duration {
        self.inner.started.elapsed()
    }

    pub(super) fn schedule(&self) -> MutexGuard<'_, Schedule> {
        // No code that holds it panics; if one did, the schedule is looked at anew in each round.
        self.inner
            .schedule
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MirrorError {
    let path = path.to_owned();
    move |source| MirrorError::Io {
        action,
        path,
        source,
    }
}

/// The end of a log; empty if there is none.
fn log_tail(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut tail = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(tail)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}
