//! What wakes apps: their Releases, systemd, the folder of unit files. A signal
//! only says that something may have changed; the truth is read.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::{Stream, StreamExt};
use kube::core::DeserializeGuard;
use notify::{EventKind, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tracing::warn;

use super::host::proxy;
use super::host::systemd::HostEvent;
use super::host::unit::{self, OwnUnit};
use super::node::Node;
use super::wanted::app_of;
use crate::api::Release;
use crate::api::names::AppName;

/// Between two tries to watch a folder.
const RETRY: Duration = Duration::from_secs(10);

/// File events that wait; more are as good as one.
const FILE_EVENTS: usize = 256;

/// Wakes the app of each Release that changes; all of them when the first list is complete.
pub async fn releases(node: Arc<Node>, stream: impl Stream<Item = DeserializeGuard<Release>>) {
    let listed = async {
        if node.releases.wait_until_ready().await.is_ok() {
            node.listed.store(true, Ordering::Relaxed);
            node.held.notify_one();
            node.wake_all();
        }
    };
    let changes = async {
        let mut stream = std::pin::pin!(stream);
        while let Some(release) = stream.next().await {
            if let Some(app) = app_of(&release, &node.name) {
                node.trigger.wake(app);
                node.held.notify_one();
            }
        }
    };
    tokio::join!(listed, changes);
}

/// Wakes the app of each unit that changes.
pub async fn systemd(node: Arc<Node>, mut events: mpsc::Receiver<HostEvent>) {
    while let Some(event) = events.recv().await {
        match event {
            HostEvent::Unit(name) if name == proxy::UNIT => node.proxy_changed.notify_one(),
            HostEvent::Unit(name) => wake_unit(&node, &name),
            HostEvent::Everything => {
                node.mirrors.dirty();
                wake_apps_of_units(&node);
                node.wake_all();
            }
        }
    }
}

/// Wakes the app of each unit file that somebody touches.
pub async fn files(node: Arc<Node>, folder: &Path) {
    loop {
        let (sender, mut receiver) = mpsc::channel(FILE_EVENTS);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else { return };
            if matches!(event.kind, EventKind::Access(_)) {
                return;
            }
            for path in event.paths {
                if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
                    // A full queue holds enough to look at; the slow look finds the rest.
                    let _ = sender.try_send(name.to_owned());
                }
            }
        });
        let watched = watcher.and_then(|mut watcher| {
            watcher.watch(folder, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watched {
            Ok(_watcher) => {
                while let Some(name) = receiver.recv().await {
                    wake_unit(&node, &name);
                }
            }
            Err(error) => warn!("{} cannot be watched: {error}", folder.display()),
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn wake_unit(node: &Node, name: &str) {
    match unit::parse_unit_name(name) {
        Some(OwnUnit::Target(app) | OwnUnit::Service { app, .. } | OwnUnit::Build { app, .. }) => {
            node.trigger.wake(app)
        }
        Some(OwnUnit::Fetch { .. }) => node.mirrors.dirty(),
        Some(OwnUnit::Agent) | None => {}
    }
}

/// Units of apps that nothing else knows of are looked at as well.
fn wake_apps_of_units(node: &Node) {
    for name in node.units.list().unwrap_or_default() {
        let app: Option<AppName> = match unit::parse_unit_name(&name) {
            Some(OwnUnit::Target(app) | OwnUnit::Service { app, .. }) => Some(app),
            Some(OwnUnit::Build { .. } | OwnUnit::Fetch { .. } | OwnUnit::Agent) | None => None,
        };
        if let Some(app) = app {
            node.trigger.wake(app);
        }
    }
}
