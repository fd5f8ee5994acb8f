//! A new commit over several nodes: one after another, and nobody notices.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use futures::{StreamExt as _, TryStreamExt as _};
use kari::api::Release;
use kube::api::Api;
use kube::runtime::{WatchStreamExt as _, watcher};
use support::traffic::Traffic;
use support::{Lab, Space, app, folder};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
/// Requests per second at each node.
const RATE: u32 = 200;
/// Connections at each node, kept alive.
const CONNECTIONS: u32 = 20;

/// What an observer of the API sees who knows nothing of Kari's own counting: which nodes are told to serve
/// something that they do not serve.
struct Observer {
    most: Arc<Mutex<(usize, BTreeSet<String>)>>,
    order: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Observer {
    fn start(api: Api<Release>) -> Self {
        let most = Arc::new(Mutex::new((0, BTreeSet::new())));
        let order = Arc::new(Mutex::new(Vec::new()));
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

#[tokio::test(flavor = "multi_thread")]
async fn a_second_commit_reaches_three_nodes_one_after_another_without_a_failed_request() {
    let space = Space::new(support::testbed(3).await, "rollout").await;
    let host = "rollout.example.com";
    let files = folder(&app::files("one"));
    let first = space.push("shop", files.path());
    space.apply(&app::manifest("shop", &first.url, host)).await;
    space.ready_at("shop", &first.commit).await;

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
