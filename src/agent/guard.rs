//! What looks after the node as a whole: its proxy, its disk while builds run,
//! its trash, and what its Lease says of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch as latest;
use tracing::{info, warn};

use super::host::mirror::{MirrorError, MirrorKey, SourceUrl};
use super::host::proxy;
use super::host::records::RecordedFailure;
use super::host::store::{LOG_LIMIT_BYTES, StoreError};
use super::host::systemd::{ActiveState, UnitState};
use super::host::unit::{self, OwnUnit};
use super::node::{Node, lock, monotonic};
use super::wanted::credential_id;
use super::{held_apps, note_killed};
use crate::agent::apply::BUILD_STEP;
use crate::api::names::{AppName, ReleaseId};
use crate::api::reasons::Reason;
use crate::api::{ANNOTATION_KEY_ID, ANNOTATION_PUBLIC_KEY};
use crate::runtime::error_chain;

/// Between two looks at the disk while builds run: a build can write a gigabyte in a second.
const DISK_INTERVAL: Duration = Duration::from_secs(1);

/// Between two times that what nothing refers to is looked for because the disk is short of room.
const HASTE_INTERVAL: Duration = Duration::from_secs(60);

/// How often what nothing on the node refers to is looked for.
const COLLECT_INTERVAL: Duration = Duration::from_secs(600);

/// From a signal of the proxy's unit to a look at it.
const SETTLE_INTERVAL: Duration = Duration::from_millis(500);

/// Between two looks whether builds run.
const IDLE_INTERVAL: Duration = Duration::from_secs(3);

/// SIGKILL.
const SIGKILL: i32 = 9;

/// Keeps the proxy up, and the Lease's annotations true.
pub async fn keep_node(
    node: Arc<Node>,
    annotate: latest::Sender<BTreeMap<String, String>>,
    systemd_version: String,
    interval: Duration,
) {
    let mut was_up = true;
    loop {
        let proxy = match node.proxy.ensure().await {
            Ok(()) => {
                if !std::mem::replace(&mut was_up, true) {
                    info!("the proxy is up again");
                    node.proxy_is_back();
                }
                "ready".to_owned()
            }
            Err(error) => {
                was_up = false;
                let message = error_chain(&error);
                warn!("the proxy is not up: {message}");
                message
            }
        };
        let again = tokio::time::Instant::now() + interval;
        let mut change = std::pin::pin!(proxy_goes_or_comes(&node, was_up));
        loop {
            tell(&node, &annotate, &systemd_version, &proxy);
            tokio::select! {
                () = tokio::time::sleep_until(again) => break,
                () = &mut change => break,
                () = node.held.notified() => {}
            }
        }
    }
}

/// What the node's Lease says of it besides that the agent is there.
fn tell(
    node: &Node,
    annotate: &latest::Sender<BTreeMap<String, String>>,
    systemd_version: &str,
    proxy: &str,
) {
    let limits: Vec<String> = node
        .limits
        .by_name()
        .iter()
        .map(|(name, proven)| format!("{name}={proven}"))
        .collect();
    let key = lock(&node.keys).current().public().clone();
    let annotations = BTreeMap::from([
        (ANNOTATION_PUBLIC_KEY.to_owned(), key.to_string()),
        (ANNOTATION_KEY_ID.to_owned(), key.id().to_string()),
        (
            "kari.dev/version".to_owned(),
            env!("CARGO_PKG_VERSION").to_owned(),
        ),
        ("kari.dev/systemd".to_owned(), systemd_version.to_owned()),
        ("kari.dev/proxy".to_owned(), proxy.to_owned()),
        ("kari.dev/limits".to_owned(), limits.join(",")),
        ("kari.dev/held-apps".to_owned(), held_apps(node).join(",")),
    ]);
    annotate.send_if_modified(|told| {
        let differs = *told != annotations;
        if differs {
            *told = annotations;
        }
        differs
    });
}

/// Waits until the proxy's unit is other than it was.
async fn proxy_goes_or_comes(node: &Node, was_up: bool) {
    loop {
        node.proxy_changed.notified().await;
        // A start and a reload are several signals each.
        tokio::time::sleep(SETTLE_INTERVAL).await;
        let is_up = match node.systemd.get_unit_state(proxy::UNIT).await {
            Ok(state) => state.is_some_and(|state| {
                matches!(
                    state.active_state,
                    ActiveState::Active | ActiveState::Reloading
                )
            }),
            // The slow look finds it.
            Err(_) => was_up,
        };
        if is_up != was_up {
            return;
        }
    }
}

/// Deletes what lies in the trash, in a thread of its own.
pub async fn empty_trash(node: Arc<Node>) {
    // What an earlier agent left there comes first.
    node.trash.notify_one();
    loop {
        node.trash.notified().await;
        let store = node.store.clone();
        match tokio::task::spawn_blocking(move || store.empty_trash()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!("the trash cannot be emptied: {}", error_chain(&error)),
            Err(error) => warn!("the trash cannot be emptied: {error}"),
        }
    }
}

/// Looks for what nothing on the node refers to, beside what each app looks for itself: at the start, every now
/// and then, and at once when the disk gets short of room.
pub async fn collect_node(node: Arc<Node>) {
    loop {
        collect_users(&node).await;
        if let Err(error) = collect_mirrors(&node).await {
            warn!("mirrors cannot be collected: {error}");
        }
        match node.forget_unused_keys() {
            Ok(0) => {}
            Ok(count) => info!(count, "forgot keys that nothing is sealed to any more"),
            Err(error) => warn!("old keys cannot be forgotten: {}", error_chain(&error)),
        }
        node.trash.notify_one();
        if let Err(error) = node.store.set_ballast(&node.reserve) {
            warn!(
                "no room can be set aside for records: {}",
                error_chain(&error)
            );
        }
        let _ = tokio::time::timeout(COLLECT_INTERVAL, node.collect.notified()).await;
    }
}

async fn collect_users(node: &Arc<Node>) {
    let of = Arc::clone(node);
    match tokio::task::spawn_blocking(move || of.users.remove_strays(&of.store)).await {
        Ok(Ok(0)) => {}
        Ok(Ok(count)) => info!(count, "took users of no app out of the user database"),
        Ok(Err(error)) => warn!("users cannot be collected: {}", error_chain(&error)),
        Err(error) => warn!("users cannot be collected: {error}"),
    }
}

async fn collect_mirrors(node: &Node) -> Result<(), CollectError> {
    let mut uses = BTreeSet::new();
    for app in node.store.apps()? {
        let folder = node.store.app(&app);
        let applied = folder.read_applied()?.and_then(|applied| applied.release);
        let applied = applied.map(|release| (release.template.source.url, release.sealed));
        let tried = folder.read_attempt()?.map(|attempt| attempt.wish);
        let tried = tried.map(|wish| (wish.template.source.url, wish.sealed));
        uses.extend(
            applied
                .into_iter()
                .chain(tried)
                .filter_map(|(url, sealed)| {
                    let source = SourceUrl::parse(&url).ok()?;
                    let credential = credential_id(&app, &sealed);
                    let key = MirrorKey::of(&source, credential.as_ref());
                    Some((app.clone(), key))
                }),
        );
    }
    let dropped = node.mirrors.collect(&uses).await?;
    if dropped > 0 {
        info!(
            count = dropped,
            "moved mirrors that nobody uses into the trash"
        );
    }
    Ok(node.mirrors.tidy().await?)
}

/// Why what nothing refers to was not looked for: nothing is thrown away on half of a picture.
#[derive(Debug, thiserror::Error)]
enum CollectError {
    /// What apps have on record.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The mirrors.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
}

/// Looks after the room on the disk. Where it lacks its reserve, what nothing refers to is looked for at once;
/// below half of it the youngest build is killed, or else all fetches. A build whose log floods is killed too.
pub async fn watch_disk(node: Arc<Node>) {
    let mut hastened = None;
    loop {
        let builds = running_builds(&node).await;
        for (app, release_id, state) in &builds {
            let bytes = node.store.app(app).log_bytes(release_id, BUILD_STEP);
            if bytes > LOG_LIMIT_BYTES {
                let message = format!(
                    "the build wrote more than {} MiB of log: make it quieter",
                    LOG_LIMIT_BYTES >> 20
                );
                kill(&node, app, &state.name, Reason::BuildFailed, message).await;
            }
        }
        let disk = node.store.disk().ok();
        let shortage = disk.and_then(|disk| disk.shortage(&node.reserve));
        node.short_of_room
            .store(shortage.is_some(), Ordering::Relaxed);
        match &shortage {
            Some(message) if hastened.is_none_or(|last| monotonic() >= last + HASTE_INTERVAL) => {
                warn!("{message}; what nothing refers to is looked for");
                hastened = Some(monotonic());
                node.hasten_collection();
                node.collect.notify_one();
            }
            Some(_) => {}
            None => {
                if hastened.take().is_some() {
                    info!("there is room on the disk again");
                    node.collect.notify_one();
                    node.wake_all();
                }
            }
        }
        if let Some(message) = disk.and_then(|disk| disk.severe_shortage(&node.reserve)) {
            stop_writers(&node, &builds, &message).await;
        }
        tokio::time::sleep(if builds.is_empty() {
            IDLE_INTERVAL
        } else {
            DISK_INTERVAL
        })
        .await;
    }
}

async fn stop_writers(node: &Node, builds: &[(AppName, ReleaseId, UnitState)], message: &str) {
    if let Some((app, _, state)) = builds.last() {
        let message = format!("{message}; the build was stopped");
        kill(node, app, &state.name, Reason::DiskPressure, message).await;
        return;
    }
    let fetches = node.systemd.list_units(&[unit::FETCH_PATTERN]).await;
    for fetch in fetches.unwrap_or_default() {
        if fetch.active_state == ActiveState::Activating {
            info!(unit = fetch.name, "killing a fetch: {message}");
            // One that has ended meanwhile is as good as killed.
            let _ = node.systemd.kill_unit(&fetch.name, SIGKILL).await;
        }
    }
}

/// The builds that run, the youngest last, as far as process ids tell.
async fn running_builds(node: &Node) -> Vec<(AppName, ReleaseId, UnitState)> {
    let mut builds = vec![];
    for listed in node
        .systemd
        .list_units(&[unit::BUILD_PATTERN])
        .await
        .unwrap_or_default()
    {
        if listed.active_state != ActiveState::Activating {
            continue;
        }
        if let Some(OwnUnit::Build {
            app, release_id, ..
        }) = unit::parse_unit_name(&listed.name)
            && let Ok(Some(state)) = node.systemd.get_unit_state(&listed.name).await
        {
            builds.push((app, release_id, state));
        }
    }
    builds.sort_by_key(|(_, _, state)| state.main_pid);
    builds
}

async fn kill(node: &Node, app: &AppName, unit: &str, reason: Reason, message: String) {
    info!(%app, unit, "killing a build: {message}");
    note_killed(
        node,
        app,
        unit,
        RecordedFailure {
            reason,
            message,
            log_tail: None,
        },
    );
    if let Err(error) = node.systemd.kill_unit(unit, SIGKILL).await {
        warn!(%app, unit, "cannot kill it: {}", error_chain(&error));
    }
}
