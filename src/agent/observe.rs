//! Looks at an app: disk, systemd, proxy, mirror. I/O only; what it means is
//! planned elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;

use super::health::{self, Look, Tracker};
use super::host::mirror::MirrorState;
use super::host::port::{self, PortError};
use super::host::probe::{self, Check};
use super::host::proxy::{DRAIN_LIMIT, HostName, ProxyError};
use super::host::records::{AppliedRecord, AttemptRecord, ProcessRecord, RecordedFailure};
use super::host::store::{AppFolder, DiskReserve, StoreError};
use super::host::systemd::{ActiveState, SystemdError, UnitState};
use super::host::unit::{self, OwnUnit};
use super::memory::{Drain, Memory};
use super::node::{Node, lock, monotonic};
use super::view::{
    Activity, BuildView, DrainView, FileView, Health, HostView, Observed, ServiceView, SlotView,
    SourceView, TargetView, VirtualHostView, Wanted,
};
use crate::api::deployment::Process;
use crate::api::names::{AppName, ReleaseId};

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
    let source = source(node, app, &memory, needs_tree);
    let disk_pressure = match needs_tree {
        Some(_) => node.store.disk()?.shortage(&DiskReserve::DEFAULT),
        None => None,
    };
    let is_held_up = lock(&memory)
        .held_up
        .as_ref()
        .is_some_and(|held_up| now < held_up.until);
    let may_build = needs_tree.filter(|_| disk_pressure.is_none() && !is_held_up);
    let slot = slot(node, app, &builds, may_build, source.as_ref()).await?;
    let conflicts = match trying {
        Some(attempt) if needs_tree.is_none() && attempt.processes.is_empty() => {
            node.claim(app, &hosts_of(attempt), &node.proxy.hosts()?)
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

fn hosts_of(attempt: &AttemptRecord) -> Vec<HostName> {
    let processes = &attempt.wish.template.processes;
    let routes = processes
        .iter()
        .filter_map(|process| process.route.as_ref());
    routes
        .flat_map(|route| &route.hosts)
        .filter_map(|host| HostName::parse(host).ok())
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
) -> Option<SourceView> {
    let want = lock(memory).want.clone();
    let Some(attempt) = attempt else {
        if want.is_some() {
            lock(memory).want = None;
            node.mirrors.unwant(app);
        }
        return None;
    };
    let current = want.filter(|want| {
        want.commit == attempt.wish.commit
            && want.source.as_str() == attempt.wish.template.source.url
            && want.reference == attempt.wish.template.source.reference
    });
    current?;
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Some(match node.mirrors.state(app)? {
        MirrorState::Ready { mirror: _ } => SourceView::Ready,
        MirrorState::Queued { position, of } => SourceView::Queued {
            position: number(position),
            of: number(of),
        },
        MirrorState::Fetching => SourceView::Fetching,
        MirrorState::Failed {
            failure,
            retry_in: _,
        } => SourceView::Failed(RecordedFailure {
            reason: failure.reason,
            message: failure.message,
            log_tail: None,
        }),
    })
}

/// Asks for a slot while, and only while, the next step is the start of a build.
async fn slot(
    node: &Node,
    app: &AppName,
    builds: &BTreeMap<String, BuildView>,
    attempt: Option<&AttemptRecord>,
    source: Option<&SourceView>,
) -> Result<SlotView, ObserveError> {
    let next_is_build = attempt.is_some_and(|attempt| attempt.build_result.is_none())
        && builds.is_empty()
        && source == Some(&SourceView::Ready);
    if !next_is_build {
        // Who cannot build holds no place.
        node.withdraw(app);
        return Ok(SlotView::Unasked);
    }
    let running: BTreeSet<AppName> = node
        .systemd
        .list_units(&["kari-build.*"])
        .await?
        .into_iter()
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
    Ok(lock(&node.slots).ask(app, &running))
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
    applied: Option<&AppliedRecord>,
) -> Result<BTreeMap<String, ServiceView>, ObserveError> {
    let applied = applied.and_then(|applied| applied.release.as_ref());
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
        a.processes
            .iter()
            .map(|record| (record, &a.wish.template, false))
    });
    let committed = applied
        .iter()
        .flat_map(|a| a.processes.iter().map(|record| (record, &a.template, true)));
    let mut records: BTreeMap<&str, (&ProcessRecord, &Process, Duration, bool)> = BTreeMap::new();
    for (record, template, is_committed) in tried.chain(committed) {
        let Some(process) = template
            .processes
            .iter()
            .find(|process| process.name == record.name)
        else {
            continue;
        };
        let min_ready = Duration::from_secs(u64::from(template.min_ready_seconds));
        records
            .entry(&record.unit)
            .and_modify(|known| known.3 |= is_committed)
            .or_insert((record, process, min_ready, is_committed));
    }

    let uid = node
        .store
        .app(app)
        .read_users()?
        .map(|users| users.service_uid);
    let listeners = if records.values().any(|(record, ..)| record.port.is_some()) {
        port::listeners()?
    } else {
        vec![]
    };
    let mut services = BTreeMap::new();
    for name in names {
        let state = node.systemd.get_unit_state(&name).await?;
        let record = records.get(name.as_str());
        let file = match (node.units.read(&name)?, record) {
            (None, _) => FileView::Missing,
            (Some(text), Some((record, ..))) if text != record.text => FileView::Altered,
            (Some(_), _) => FileView::Intact,
        };
        let activity = activity(state.as_ref());
        if activity == Activity::Inactive && file == FileView::Missing {
            continue;
        }
        let stale = state.as_ref().is_some_and(|state| state.need_daemon_reload);
        let health = match (record, &state, uid) {
            (Some((record, process, min_ready, is_committed)), Some(state), Some(uid)) => {
                let look = Look {
                    process,
                    state,
                    port: record.port,
                    uid,
                    listeners: &listeners,
                    min_ready: *min_ready,
                    now: monotonic(),
                };
                judge(node, app, memory, &name, &look, *is_committed)
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

/// Judges a service, and has it probed where that is due.
fn judge(
    node: &Arc<Node>,
    app: &AppName,
    memory: &Arc<Mutex<Memory>>,
    unit: &str,
    look: &Look<'_>,
    is_committed: bool,
) -> Health {
    let mut remembered = lock(memory);
    let tracker = remembered.trackers.entry(unit.to_owned()).or_default();
    tracker.look(look.process, look.state, look.now);
    let health = health::health(look, tracker);
    probe_if_due(node, app, memory, unit, look, is_committed, tracker);
    health
}

/// A check may take long: it runs by itself, and wakes the app when it has ended.
fn probe_if_due(
    node: &Arc<Node>,
    app: &AppName,
    memory: &Arc<Mutex<Memory>>,
    unit: &str,
    look: &Look<'_>,
    is_committed: bool,
    tracker: &mut Tracker,
) {
    let (Some(probe), Some(port), Some(readiness)) =
        (&look.process.readiness_probe, look.port, &tracker.readiness)
    else {
        return;
    };
    if tracker.probing || look.state.active_state != ActiveState::Active {
        return;
    }
    let settled = is_committed && tracker.ready_since.is_some();
    let pause = if settled {
        COMMITTED_PROBE_INTERVAL
    } else {
        Duration::ZERO
    };
    if look.now < readiness.next_check() + pause {
        let due = readiness.next_check() + pause - look.now;
        node.trigger.wake_after(app.clone(), due);
        return;
    }
    tracker.probing = true;
    let host = look
        .process
        .route
        .as_ref()
        .and_then(|route| route.hosts.first())
        .map(String::as_str);
    let check = Check::new(probe, host);
    let (node, app, memory) = (Arc::clone(node), app.clone(), Arc::clone(memory));
    let (unit, invocation) = (unit.to_owned(), look.state.invocation_id.clone());
    tokio::spawn(async move {
        let begun = monotonic();
        let result = probe::check(&check, port).await;
        {
            let mut memory = lock(&memory);
            if let Some(tracker) = memory.trackers.get_mut(&unit) {
                tracker.probing = false;
                // The check of another start says nothing of this one.
                if tracker.invocation == invocation
                    && let Some(readiness) = &mut tracker.readiness
                {
                    readiness.record(begun, result);
                }
            }
        }
        node.trigger.wake(app);
    });
}
