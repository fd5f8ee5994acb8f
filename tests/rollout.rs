//! A new commit over several nodes: one after another, and nobody notices.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use std::collections::BTreeSet;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::Mutex as Shared;

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::coordination::v1::Lease;
use kari::api::Release;
use kube::api::Api;
use kube::runtime::{WatchStreamExt as _, watcher};
use support::traffic::Traffic;
use support::{LIMIT, Lab, Space, app, folder, until};
use testbed::{Part, Signal};
use tokio::sync::Mutex;

const NODES: [&str; 3] = ["n1", "n2", "n3"];
/// Requests per second at each node.
const RATE: u32 = 200;
/// Connections at each node, kept alive.
const CONNECTIONS: u32 = 20;

/// What an observer of the API sees who knows nothing of Kari's own counting: which nodes are told to serve
/// something that they do not serve.
struct Observer {
    most: Arc<Shared<(usize, BTreeSet<String>)>>,
    order: Arc<Shared<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Observer {
    fn start(api: Api<Release>) -> Self {
        let most = Arc::new(Shared::new((0, BTreeSet::new())));
        let order = Arc::new(Shared::new(Vec::new()));
        let (seen, finished) = (most.clone(), order.clone());
        let task = tokio::spawn(async move {
            let mut changing: BTreeSet<String> = BTreeSet::new();
            let mut events = watcher(api, watcher::Config::default())
                .applied_objects()
                .boxed();
            while let Ok(Some(release)) = events.try_next().await {
                let node = release.spec.node_name.clone();
                let serving = release.status.and_then(|s| s.serving).map(|s| s.release_id);
                if serving == Some(release.spec.release_id) {
                    if changing.remove(&node) {
                        finished.lock().unwrap().push(node);
                    }
                } else {
                    changing.insert(node);
                }
                let mut seen = seen.lock().unwrap();
                if changing.len() > seen.0 {
                    *seen = (changing.len(), changing.clone());
                }
            }
        });
        Self { most, order, task }
    }

    fn end(self) -> ((usize, BTreeSet<String>), Vec<String>) {
        self.task.abort();
        (
            self.most.lock().unwrap().clone(),
            self.order.lock().unwrap().clone(),
        )
    }
}

/// The rollouts share their nodes, and one of them ends the controller.
static ALONE: Mutex<()> = Mutex::const_new(());

#[tokio::test(flavor = "multi_thread")]
async fn a_second_commit_reaches_three_nodes_one_after_another_without_a_failed_request() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(3).await, "rollout").await;
    let host = "rollout.example.com";
    let files = folder(&app::files("one"));
    let first = space.push("shop", files.path());
    space.apply(&app::manifest("shop", &first.url, host)).await;
    space.ready_at("shop", &first.commit).await;
    // A controller that leads only since the other test gives a node nothing until it saw its Lease renewed.
    space
        .deployment_until("shop", "available on all nodes", LIMIT, |d| {
            let status = d.status.as_ref();
            status
                .and_then(|s| s.nodes.as_ref())
                .is_some_and(|n| n.available == 3)
        })
        .await;

    let observer = Observer::start(space.releases());
    let traffic: Vec<_> = NODES
        .iter()
        .map(|node| {
            Traffic::start(
                Lab(space.testbed),
                space.proxy(node),
                host,
                RATE,
                CONNECTIONS,
            )
        })
        .collect();
    support::write(files.path(), &[("message", "two")]);
    let second = space.push("shop", files.path());
    space.request_look("shop").await;
    space.ready_at("shop", &second.commit).await;
    let mut total = 0;
    for (node, traffic) in NODES.iter().zip(traffic) {
        let tally = traffic.stop().await;
        assert!(
            tally.failed.is_empty(),
            "{node}: {} of {} requests failed: {:?}",
            tally.failed.len(),
            tally.good,
            tally.failed
        );
        assert!(
            tally.bodies.contains_key("one") && tally.bodies.contains_key("two"),
            "{node}: the switch was not under traffic: {:?}",
            tally.bodies
        );
        total += tally.good;
        eprintln!(
            "{node}: {} requests, {} idle connections replaced, {:?}",
            tally.good, tally.reconnected, tally.bodies
        );
        assert_eq!(space.get(node, host).await, Ok((200, "two".into())));
    }
    let ((most, nodes), order) = observer.end();
    assert_eq!(most, 1, "more than maxUnavailable at work: {nodes:?}");
    assert_eq!(order, NODES, "{total} requests");
}

/// A second controller beside the testbed's, with the same identity; it ends with the test. Where Kari's parts are
/// Pods there is one already.
struct Standby(Option<Child>);

impl Standby {
    fn start(space: &Space) -> Self {
        if support::kari_is_in_pods() {
            return Self(None);
        }
        let kari = testbed::program::kari().unwrap_or_else(|e| panic!("{e}"));
        let mut command = space.testbed.lab_command(&kari).unwrap();
        let kubeconfig = space.testbed.directory().join("controller/kubeconfig");
        let child = command
            .args(["controller", "--namespace=kari-system"])
            .args(["--listen=127.0.0.1:0", "--insecure-source-schemes"])
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a second controller");
        Self(Some(child))
    }

    /// Tells it to end, and waits until it has.
    async fn end(&mut self, space: &Space) {
        let Some(child) = &mut self.0 else {
            let ended = space.testbed.kill(Part::Controller, Signal::TERM).await;
            return ended.unwrap();
        };
        let id = rustix::process::Pid::from_child(child);
        rustix::process::kill_process(id, Signal::TERM).unwrap();
        until("the leader has ended", LIMIT, || {
            let ended = child.try_wait();
            async move {
                match ended {
                    Ok(Some(status)) if status.success() => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            }
        })
        .await;
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Who leads, by the Lease; empty when nobody does.
async fn leader(space: &Space) -> String {
    let leases: Api<Lease> = Api::namespaced(space.client.clone(), "kari-system");
    let lease = leases.get("kari-controller").await.expect("the Lease");
    let holder = lease.spec.and_then(|spec| spec.holder_identity);
    holder.unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_goes_on_with_the_rollout_of_a_leader_that_is_killed_within_the_budget() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(3).await, "standby").await;
    let files = folder(&app::files("one"));
    let first = space.push("shop", files.path());
    let manifest = app::manifest("shop", &first.url, "standby.example.com");
    space.apply(&manifest).await;
    space.ready_at("shop", &first.commit).await;
    let before = leader(&space).await;
    let mut standby = Standby::start(&space);

    let observer = Observer::start(space.releases());
    support::write(files.path(), &[("message", "two")]);
    let second = space.push("shop", files.path());
    space.request_look("shop").await;
    space
        .release_until("shop", "n1", "told", LIMIT, |release| {
            release.spec.commit == second.commit
        })
        .await;
    assert_eq!(leader(&space).await, before, "two lead");
    space
        .testbed
        .kill(Part::Controller, Signal::KILL)
        .await
        .unwrap();
    space.ready_at("shop", &second.commit).await;
    let ((most, nodes), order) = observer.end();
    assert_eq!(most, 1, "more than maxUnavailable at work: {nodes:?}");
    assert_eq!(order, NODES);
    let taken_over = leader(&space).await;
    assert_ne!(taken_over, before);
    assert_ne!(taken_over, "");

    // One that is told to end lets go of the Lease at once, and the next need not wait for it to expire.
    standby.end(&space).await;
    assert_eq!(leader(&space).await, "", "the Lease is held by nobody");
    space.testbed.start(Part::Controller).await.unwrap();
    until("somebody leads", LIMIT, || async {
        match leader(&space).await {
            leader if leader.is_empty() => Err(leader),
            _ => Ok(()),
        }
    })
    .await;
}
