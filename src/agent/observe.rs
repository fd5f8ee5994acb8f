//! Looks at an app: disk, systemd, proxy, mirror. I/O only; what it means is
//! planned elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;

use super::health::{self, Look, Restart, Tracker};
use super::host::jail::Setting;
use super::host::mirror::MirrorState;
use super::host::port::{self, PortError};
use super::host::probe::{self, Action, Check, ProbeError, ProbeKind, exec};
use super::host::proxy::{DRAIN_LIMIT, ProxyError};
use super::host::records::{
    AppliedRecord, AttemptRecord, BuildKey, ProcessRecord, RecordedFailure,
};
use super::host::store::{AppFolder, StoreError};
use super::host::systemd::{ActiveState, SystemdError, UnitState};
use super::host::unit::{self, OwnUnit, ServiceSpec};
use super::host::users;
use super::mask::Masks;
use super::memory::{Drain, Memory};
use super::node::{Node, lock, monotonic};
use super::slots::BuildSeen;
use super::view::{
    Activity, BuildView, DrainView, FileView, Health, HostView, Observed, ServiceView, SlotView,
    SourceView, TargetView, VirtualHostView, Wanted,
};
use super::wanted::{rewind_base, source_want};
use crate::api::deployment::Process;
use crate::api::names::{AppName, Commit, ReleaseId};
use crate::api::release::Template;
use crate::runtime::error_chain;

/// Between two checks of a process whose release is committed, at least.
const COMMITTED_PROBE_INTERVAL: Duration = Duration::from_secs(10);

/// Why an app could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// Its files.
    #[error("cannot read what is on disk of the app")]
    Store(#[from] StoreError),
    /// systemd.
    #[error("cannot ask systemd")]
    Systemd(#[from] SystemdError),
    /// The proxy's files.
    #[error("cannot read the proxy's files")]
    Proxy(#[from] ProxyError),
    /// The node's sockets.
    #[error("cannot read the node's listeners")]
    Port(#[from] PortError),
}

/// One look at an app.
pub async fn observe(node: &Arc<Node>, app: &AppName) -> Result<Observed, ObserveError> {
    let memory = node.memory(app);
    let wanted = node.wanted(app);
    lock(&memory).take_in_wish(wish_key(&wanted));
    let folder = node.store.app(app);
    let attempt = folder.read_attempt()?;
    let applied = folder.read_applied()?;
    let now = monotonic();

    let builds = builds(node, app, &memory).await?;
    let services = services(node, app, &memory, attempt.as_ref(), applied.as_ref()).await?;
    let target = unit::target_name(app);
    let target_file = node.units.read(&target)?.map(|text| target_view(&text));
    let target_active = match node.systemd.get_unit_state(&target).await? {
        Some(state) => !state.active_state.is_stopped(),
        None => false,
    };
    let trying = attempt.as_ref().filter(|attempt| attempt.outcome.is_none());
    let needs_tree = trying.filter(|attempt| !folder.has_build(&attempt.build_key));
    let needs_source = trying.filter(|attempt| {
        let is_bound = rewind_base(attempt, applied.as_ref()).is_some();
        needs_tree.is_some() || (is_bound && attempt.processes.is_empty())
    });
    let disk_pressure = match needs_tree {
        Some(_) => node.store.disk()?.shortage(&node.reserve),
        None => None,
    };
    let may_fetch = disk_pressure.is_none();
    let source = source(
        node,
        app,
        &memory,
        needs_source,
        applied.as_ref(),
        may_fetch,
    );
    let is_held_up = lock(&memory)
        .held_up
        .as_ref()
        .is_some_and(|held_up| now < held_up.until);
    let may_build = needs_tree.filter(|_| disk_pressure.is_none() && !is_held_up);
    let slot = slot(node, app, &builds, may_build, source.as_ref());
    let conflicts = match trying {
        Some(attempt) if needs_tree.is_none() && attempt.processes.is_empty() => {
            node.claim_hosts(attempt, applied.as_ref())?
        }
        Some(_) | None => vec![],
    };
    let drain = drain(node, &memory, now).await;
    let (in_force, held_up) = {
        let memory = lock(&memory);
        (
            memory.in_force.as_ref().map(|f| (f.host.clone(), f.since)),
            memory.held_up.clone(),
        )
    };
    let host = HostView {
        services,
        builds,
        target: target_file,
        target_active,
        enabled: node.units.is_enabled(&target)?,
        trees: trees(&folder, attempt.as_ref()),
        stage: attempt.as_ref().is_some_and(|attempt| {
            folder
                .stage(&attempt.build_key, attempt.build_try)
                .path
                .is_dir()
        }),
        source,
        slot,
        virtual_host: VirtualHostView {
            file: node.virtual_host_file(app).exists(),
            in_force,
        },
        drain,
        conflicts,
        disk_pressure,
        has_files: folder.holds_more_than_state()?,
        kept_state: folder.read_kept()?,
    };
    Ok(Observed {
        app: app.clone(),
        now,
        wall: Timestamp::now(),
        wanted,
        attempt,
        applied,
        host,
        held_up,
    })
}

/// The wish in short, so that another one is told from the same.
fn wish_key(wanted: &Wanted) -> String {
    match wanted {
        Wanted::Unknown | Wanted::Absent => String::new(),
        Wanted::Release(wish) => format!("{}/{}", wish.release_id, wish.generation),
        Wanted::Invalid {
            release_id,
            failure,
        } => format!("{release_id} {}", failure.message),
        Wanted::Removal { .. } => "removal".to_owned(),
        Wanted::Orphan => "orphan".to_owned(),
    }
}

fn trees(
    folder: &AppFolder,
    attempt: Option<&AttemptRecord>,
) -> BTreeSet<super::host::records::BuildKey> {
    attempt
        .iter()
        .map(|attempt| attempt.build_key.clone())
        .filter(|key| folder.has_build(key))
        .collect()
}

async fn drain(node: &Node, memory: &Mutex<Memory>, now: Duration) -> DrainView {
    let Some(drain) = lock(memory).drain.clone() else {
        return DrainView::Unknown;
    };
    if now >= drain.until || drain.workers.is_empty() {
        return DrainView::Over;
    }
    match node.proxy.still_draining(&drain.workers).await {
        Ok(left) if left.is_empty() => DrainView::Over,
        Ok(left) => {
            if let Some(drain) = &mut lock(memory).drain {
                drain.workers = left;
            }
            DrainView::Going {
                until: (now + drain_look(now, &drain)).min(drain.until),
            }
        }
        // A proxy that cannot be asked is bounded by the limit alone.
        Err(_) => DrainView::Going { until: drain.until },
    }
}

/// Between two looks at workers that finish their requests: most have within milliseconds, a websocket
/// never does.
fn drain_look(now: Duration, drain: &Drain) -> Duration {
    let begun = drain.until.saturating_sub(DRAIN_LIMIT);
    (now.saturating_sub(begun) / 2).clamp(SHORTEST_DRAIN_LOOK, LONGEST_DRAIN_LOOK)
}

/// The first look, in which a Recreate answers nobody.
const SHORTEST_DRAIN_LOOK: Duration = Duration::from_millis(50);

/// The looks after a second.
const LONGEST_DRAIN_LOOK: Duration = Duration::from_millis(500);

// ---- Builds ---------------------------------------------------------------

async fn builds(
    node: &Node,
    app: &AppName,
    memory: &Mutex<Memory>,
) -> Result<BTreeMap<String, BuildView>, ObserveError> {
    let [_, pattern] = unit::app_patterns(app);
    let mut builds = BTreeMap::new();
    for listed in node.systemd.list_units(&[&pattern]).await? {
        if !matches!(
            unit::parse_unit_name(&listed.name),
            Some(OwnUnit::Build { .. })
        ) {
            continue;
        }
        let Some(state) = node.systemd.get_unit_state(&listed.name).await? else {
            continue;
        };
        let view = match state.active_state {
            ActiveState::Activating | ActiveState::Reloading => BuildView::Running,
            // Queued, and not begun: the result is the last one's, which there is none of.
            ActiveState::Inactive if state.has_job => BuildView::Running,
            ActiveState::Active | ActiveState::Failed => {
                let killed = lock(memory)
                    .killed
                    .clone()
                    .filter(|(unit, _)| *unit == listed.name);
                match killed {
                    Some((_, failure)) => BuildView::Killed(failure),
                    None => BuildView::Ended(state.step_result()),
                }
            }
            ActiveState::Inactive => continue,
            ActiveState::Deactivating | ActiveState::Unknown => BuildView::Stopping,
        };
        builds.insert(listed.name, view);
    }
    Ok(builds)
}

fn source(
    node: &Node,
    app: &AppName,
    memory: &Mutex<Memory>,
    attempt: Option<&AttemptRecord>,
    applied: Option<&AppliedRecord>,
    may_fetch: bool,
) -> Option<SourceView> {
    let want = lock(memory).want.clone();
    let Some(attempt) = attempt else {
        if want.is_some() {
            lock(memory).want = None;
            node.mirrors.unwant(app);
        }
        return None;
    };
    if want.is_none() || want != source_want(attempt, applied) {
        return None;
    }
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Some(match node.mirrors.state(app)? {
        // It would begin by itself.
        MirrorState::Queued { .. } | MirrorState::Failed { .. } if !may_fetch => {
            lock(memory).want = None;
            node.mirrors.unwant(app);
            return None;
        }
        MirrorState::Ready { mirror: _ } => SourceView::Ready,
        MirrorState::Queued { position, of } => SourceView::Queued {
            position: number(position),
            of: number(of),
        },
        MirrorState::Fetching => SourceView::Fetching,
        MirrorState::Failed {
            failure,
            retry_in: _,
        }
        | MirrorState::Refused(failure) => SourceView::Failed(RecordedFailure {
            reason: failure.reason,
            message: failure.message,
            log_tail: None,
        }),
    })
}

/// Asks for a slot while, and only while, the next step is the start of a build; who cannot build holds no place.
fn slot(
    node: &Node,
    app: &AppName,
    builds: &BTreeMap<String, BuildView>,
    attempt: Option<&AttemptRecord>,
    source: Option<&SourceView>,
) -> SlotView {
    let next_is_build = attempt.is_some_and(|attempt| attempt.build_result.is_none())
        && source == Some(&SourceView::Ready);
    let seen = match (builds.is_empty(), next_is_build) {
        (false, _) => BuildSeen::There,
        (true, true) => BuildSeen::Wanted,
        (true, false) => BuildSeen::None,
    };
    let (view, wake) = lock(&node.slots).look(app, seen);
    for app in wake {
        node.trigger.wake(app);
    }
    view
}

// ---- Services -------------------------------------------------------------

/// The line of a target file that says which release it is.
const RELEASE_LINE: &str = "# Release: ";

/// A target's text with the release that it is.
pub fn target_text(app: &AppName, release_id: ReleaseId, units: &[String]) -> String {
    format!(
        "{}{RELEASE_LINE}{release_id}\n",
        unit::target_text(app, units)
    )
}

fn target_view(text: &str) -> TargetView {
    let release_id = text
        .lines()
        .find_map(|line| line.strip_prefix(RELEASE_LINE))
        .and_then(|id| uuid::Uuid::try_parse(id.trim()).ok())
        .map(ReleaseId);
    TargetView {
        release_id,
        units: unit::target_units(text),
    }
}

async fn services(
    node: &Arc<Node>,
    app: &AppName,
    memory: &Arc<Mutex<Memory>>,
    attempt: Option<&AttemptRecord>,
    committed_record: Option<&AppliedRecord>,
) -> Result<BTreeMap<String, ServiceView>, ObserveError> {
    let applied = committed_record.and_then(|applied| applied.release.as_ref());
    let is_own = |name: &str| matches!(unit::parse_unit_name(name), Some(OwnUnit::Service { app: of, .. }) if of == *app);
    let [pattern, _] = unit::app_patterns(app);
    let mut names: BTreeSet<String> = node
        .systemd
        .list_units(&[&pattern])
        .await?
        .into_iter()
        .map(|u| u.name)
        .collect();
    names.extend(node.units.list()?);
    names.retain(|name| is_own(name));

    // What each unit is of: the attempt's first, whose spec is the newer.
    let tried = attempt.iter().flat_map(|a| {
        a.processes.iter().map(|record| {
            let content = (&a.wish.commit, &a.build_key);
            (record, &a.wish.template, content, false)
        })
    });
    let committed = applied.iter().flat_map(|a| {
        a.processes
            .iter()
            .map(|record| (record, &a.template, (&a.commit, &a.build_key), true))
    });
    let mut records: BTreeMap<&str, Recorded<'_>> = BTreeMap::new();
    for (record, template, (commit, build_key), is_committed) in tried.chain(committed) {
        let Some(process) = template
            .processes
            .iter()
            .find(|process| process.name == record.name)
        else {
            continue;
        };
        records
            .entry(&record.unit)
            .and_modify(|known| known.is_committed |= is_committed)
            .or_insert(Recorded {
                record,
                process,
                template,
                commit,
                build_key,
                is_committed,
            });
    }

    let uid = node
        .store
        .app(app)
        .read_users()?
        .map(|users| users.service_uid);
    let listeners = if records.values().any(|known| known.record.port.is_some()) {
        port::listeners()?
    } else {
        vec![]
    };
    let masks = node.masks(app, attempt, committed_record);
    let mut services = BTreeMap::new();
    for name in names {
        let state = node.systemd.get_unit_state(&name).await?;
        let recorded = records.get(name.as_str());
        let file = match (node.units.read(&name)?, recorded) {
            (None, _) => FileView::Missing,
            (Some(text), Some(known)) if text != known.record.text => FileView::Altered,
            (Some(_), _) => FileView::Intact,
        };
        let activity = activity(state.as_ref());
        if activity == Activity::Inactive && file == FileView::Missing {
            continue;
        }
        let stale = state.as_ref().is_some_and(|state| state.need_daemon_reload);
        let health = match (recorded, &state, uid) {
            (Some(known), Some(state), Some(uid)) => {
                let look = Look {
                    process: known.process,
                    state,
                    port: known.record.port,
                    uid,
                    listeners: &listeners,
                    min_ready: Duration::from_secs(known.template.min_ready_seconds.into()),
                    is_committed: known.is_committed,
                    now: monotonic(),
                };
                judge(node, app, memory, known, &look, &masks)
            }
            _ => Health::Waiting {
                what: format!("{name} is not running"),
                until: None,
            },
        };
        services.insert(
            name,
            ServiceView {
                file,
                activity,
                stale,
                health,
            },
        );
    }
    lock(memory)
        .trackers
        .retain(|name, _| services.contains_key(name));
    Ok(services)
}

fn activity(state: Option<&UnitState>) -> Activity {
    let Some(state) = state else {
        return Activity::Inactive;
    };
    match state.active_state {
        ActiveState::Active | ActiveState::Reloading => Activity::Active,
        ActiveState::Activating => Activity::Activating,
        ActiveState::Inactive if state.has_job => Activity::Activating,
        ActiveState::Inactive => Activity::Inactive,
        ActiveState::Failed => Activity::Failed,
        ActiveState::Deactivating | ActiveState::Unknown => Activity::Deactivating,
    }
}

/// What a unit is of, as the records say.
struct Recorded<'a> {
    record: &'a ProcessRecord,
    process: &'a Process,
    template: &'a Template,
    commit: &'a Commit,
    build_key: &'a BuildKey,
    is_committed: bool,
}

/// Judges a service, has it probed where that is due, and restarted where it is not alive.
fn judge(
    node: &Arc<Node>,
    app: &AppName,
    memory: &Arc<Mutex<Memory>>,
    recorded: &Recorded<'_>,
    look: &Look<'_>,
    masks: &Masks,
) -> Health {
    let mut remembered = lock(memory);
    let tracker = remembered
        .trackers
        .entry(recorded.record.unit.clone())
        .or_default();
    tracker.look(look.process, look.state, look.now);
    let health = health::health(look, tracker);
    let probes = Probes {
        node,
        app,
        memory,
        recorded,
        look,
        masks,
    };
    for kind in [ProbeKind::Readiness, ProbeKind::Liveness] {
        probes.check_if_due(kind, tracker);
    }
    probes.restart_if_due(tracker);
    health
}

/// The probes of one service, at one look.
struct Probes<'a> {
    node: &'a Arc<Node>,
    app: &'a AppName,
    memory: &'a Arc<Mutex<Memory>>,
    recorded: &'a Recorded<'a>,
    look: &'a Look<'a>,
    /// What must not get into the agent's log.
    masks: &'a Masks,
}

impl Probes<'_> {
    /// A check may take long: it runs by itself, and wakes the app when it has ended.
    fn check_if_due(&self, kind: ProbeKind, tracker: &mut Tracker) {
        let (look, process) = (self.look, self.look.process);
        let probe = match kind {
            ProbeKind::Readiness => process.readiness_probe.as_ref().map(|probe| {
                let timeout = probe.timeout_seconds;
                (Action::from(probe), timeout, &tracker.readiness)
            }),
            // What never was ready is the readiness probe's.
            ProbeKind::Liveness if !tracker.was_ready => None,
            ProbeKind::Liveness => process.liveness_probe.as_ref().map(|probe| {
                let timeout = probe.timeout_seconds;
                (Action::from(probe), timeout, &tracker.liveness)
            }),
        };
        let Some((action, timeout, Some(checks))) = probe else {
            return;
        };
        if tracker.under_way.contains(&kind) || look.state.active_state != ActiveState::Active {
            return;
        }
        let settled = look.is_committed && tracker.ready_since.is_some();
        let pause = match kind {
            ProbeKind::Readiness if settled => COMMITTED_PROBE_INTERVAL,
            ProbeKind::Readiness | ProbeKind::Liveness => Duration::ZERO,
        };
        let due = checks.next_check() + pause;
        if look.now < due {
            self.node
                .trigger
                .wake_after(self.app.clone(), due - look.now);
            return;
        }
        let Some(prepared) = self.prepare(kind, action, timeout) else {
            return;
        };
        tracker.under_way.insert(kind);
        self.spawn(kind, prepared);
    }

    fn prepare(
        &self,
        kind: ProbeKind,
        action: Action<'_>,
        timeout_seconds: u32,
    ) -> Option<Prepared> {
        let look = self.look;
        let timeout = Duration::from_secs(timeout_seconds.into());
        let http_get = match action {
            Action::Exec(command) => {
                let program = command.first().cloned().unwrap_or_default();
                let settings = self
                    .settings(command, timeout_seconds)
                    .map_err(|error| error.to_string());
                return Some(Prepared::Exec {
                    unit: exec::unit_name(&self.recorded.record.unit, kind),
                    settings,
                    program,
                    timeout,
                });
            }
            Action::Http(get) => Some(get),
            Action::Tcp => None,
        };
        let host = look
            .process
            .route
            .as_ref()
            .and_then(|route| route.hosts.first())
            .map(String::as_str);
        Some(Prepared::Port {
            check: Check::new(http_get, timeout, host),
            port: look.port?,
        })
    }

    /// The unit of a command, beside the service as the records have it.
    fn settings(
        &self,
        command: &[String],
        timeout_seconds: u32,
    ) -> Result<Vec<Setting>, unit::UnitError> {
        let Recorded {
            record,
            process,
            template,
            commit,
            build_key,
            is_committed: _,
        } = *self.recorded;
        let folder = self.node.store.app(self.app);
        let state = process
            .state_directory
            .then(|| folder.state_folder(&process.name));
        let spec = ServiceSpec {
            app: self.app,
            process,
            variables: &BTreeMap::new(),
            env_file: &folder.env_file(&record.env_digest),
            port: record.port,
            commit,
            node: &self.node.name,
            tree: &folder.build(build_key),
            directory: template.source.directory.as_deref(),
            state: state.as_deref(),
            user: &users::user_name(self.look.uid),
            tool_path: &self.node.tool_path,
        };
        unit::probe_properties(&spec, &record.unit, command, timeout_seconds)
    }

    fn spawn(&self, kind: ProbeKind, prepared: Prepared) {
        let (node, app) = (Arc::clone(self.node), self.app.clone());
        let memory = Arc::clone(self.memory);
        let unit = self.recorded.record.unit.clone();
        let invocation = self.look.state.invocation_id.clone();
        tokio::spawn(async move {
            let (begun, result) = match prepared {
                Prepared::Port { check, port } => {
                    let begun = monotonic();
                    (begun, probe::check(&check, port).await)
                }
                Prepared::Exec {
                    unit: probe,
                    settings,
                    program,
                    timeout,
                } => {
                    let _slot = node.probe_slots.acquire().await;
                    let begun = monotonic();
                    let result = match settings {
                        Ok(settings) => {
                            exec::run(&node.systemd, &probe, &settings, &program, timeout).await
                        }
                        Err(message) => Err(ProbeError::NotRun {
                            command: program,
                            message,
                        }),
                    };
                    (begun, result)
                }
            };
            {
                let mut memory = lock(&memory);
                if let Some(tracker) = memory.trackers.get_mut(&unit) {
                    tracker.under_way.remove(&kind);
                    let checks = match kind {
                        ProbeKind::Readiness => &mut tracker.readiness,
                        ProbeKind::Liveness => &mut tracker.liveness,
                    };
                    // The check of another start says nothing of this one.
                    if tracker.invocation == invocation
                        && let Some(checks) = checks
                    {
                        checks.record(begun, result);
                    }
                }
            }
            node.trigger.wake(app);
        });
    }

    /// Ends what is not alive, so that systemd starts it again: by SIGTERM, and after the grace period by
    /// SIGKILL.
    fn restart_if_due(&self, tracker: &mut Tracker) {
        let look = self.look;
        if look.state.active_state != ActiveState::Active {
            return;
        }
        let why = match tracker.restart(look.now) {
            Restart::No => return,
            Restart::At(due) => {
                self.node
                    .trigger
                    .wake_after(self.app.clone(), due - look.now);
                return;
            }
            Restart::Now { why } => why,
        };
        let unit = self.recorded.record.unit.clone();
        tracing::warn!(app = %self.app, unit, restarts = tracker.liveness_restarts, "restarting a process that is not alive: {}", self.masks.mask(&why));
        tracker.note_restart(why, look.now);
        let grace = Duration::from_secs(look.process.termination_grace_period_seconds.into());
        let invocation = look.state.invocation_id.clone();
        let (node, app) = (Arc::clone(self.node), self.app.clone());
        let memory = Arc::clone(self.memory);
        tokio::spawn(async move {
            if let Err(error) = end_start(&node, &unit, &invocation, grace).await {
                tracing::warn!(%app, unit, "a process that is not alive cannot be ended: {}", error_chain(&error));
                // It is tried again, in its time.
                if let Some(tracker) = lock(&memory).trackers.get_mut(&unit) {
                    tracker.ended_by_agent = None;
                }
            }
            node.trigger.wake(app);
        });
    }
}

/// A check that is about to be made.
enum Prepared {
    /// It asks a port.
    Port {
        /// What it asks.
        check: Check,
        /// The port.
        port: u16,
    },
    /// It is a command.
    Exec {
        /// Its unit.
        unit: String,
        /// What the unit is, or why it cannot be made.
        settings: Result<Vec<Setting>, String>,
        /// The command's program.
        program: String,
        /// Its deadline.
        timeout: Duration,
    },
}

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// Between two looks whether a start has ended.
const END_LOOK: Duration = Duration::from_millis(500);

/// How long a process may take to go that was killed.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Ends the processes of one start of a unit; another start is left alone.
async fn end_start(
    node: &Node,
    unit: &str,
    invocation: &str,
    grace: Duration,
) -> Result<(), SystemdError> {
    for (signal, limit) in [(SIGTERM, grace), (SIGKILL, KILL_LIMIT)] {
        if limit.is_zero() {
            continue;
        }
        node.systemd.kill_unit(unit, signal).await?;
        let deadline = monotonic() + limit;
        while monotonic() < deadline {
            let state = node.systemd.get_unit_state(unit).await?;
            let runs = state.is_some_and(|state| {
                state.invocation_id == invocation && state.active_state == ActiveState::Active
            });
            if !runs {
                return Ok(());
            }
            tokio::time::sleep(END_LOOK.min(limit)).await;
        }
    }
    Ok(())
}
