//! Many Deployments at the same moment on one node: what is bounded stays so, and nobody holds up another.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::join_all;
use kari::api::Release;
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::{Value, json};
use support::{DEPLOY_LIMIT, LIMIT, Space, app, folder, is, text_of, until};
use testbed::{Part, Repository, Signal, Testbed};

const NODE: &str = "n1";

/// Builds at once of an agent that is not told otherwise.
const BUILD_SLOTS: usize = 2;

/// How often it is measured beside what hangs, at most: with a slot taken it would take half as long again every time.
const MEASUREMENTS: usize = 3;

/// How often of these without measuring anew what it takes alone.
const IN_A_ROW: usize = 2;

/// The tests measure what the node does: one at a time.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test(flavor = "multi_thread")]
async fn thirty_deployments_and_thirty_pushes_at_once_share_the_slots_and_nothing_else() {
    const COUNT: usize = 30;
    let _alone = ALONE.lock().await;
    let space = Arc::new(Space::new(support::testbed(1).await, "many").await);
    let names: Vec<String> = (0..COUNT).map(|n| format!("app{n}")).collect();
    let build = "sleep 0.2; cp message built";
    let first = push_all(&space, &names, "first").await;
    let queue = Queue::watch(&space);

    let begun = Instant::now();
    let pushed = {
        let (space, names) = (Arc::clone(&space), names.clone());
        tokio::spawn(async move { push_all(&space, &names, "second").await })
    };
    join_all(names.iter().zip(&first).map(|(name, repository)| {
        let manifest = app::manifest(name, &repository.url, &host(&space, name));
        let space = Arc::clone(&space);
        async move { space.apply(&app::with_build(manifest, build)).await }
    }))
    .await;
    let second = pushed.await.expect("the pushes");
    join_all(names.iter().map(|name| space.request_look(name))).await;
    let commits = second.iter().map(|repository| repository.commit.as_str());
    let wanted: BTreeMap<&str, &str> = names.iter().map(String::as_str).zip(commits).collect();
    all_ready_at(&space, &wanted).await;
    println!(
        "{COUNT} Deployments and pushes: all Ready after {:?}",
        begun.elapsed()
    );

    let builds = builds_of(&space).await;
    let most = most_at_once(&builds);
    println!("{} builds, at most {most} at once", builds.len());
    assert!(builds.len() >= COUNT, "{builds:?}");
    assert_eq!(most, BUILD_SLOTS, "builds at once: {builds:?}");

    for name in &names {
        let answer = space.get(NODE, &host(&space, name)).await;
        assert_eq!(answer, Ok((200, format!("second of {name}"))), "{name}");
    }
    assert_nothing_is_shared(&space, COUNT).await;
    queue.assert_in_order(COUNT);
}

/// Commits a version of every app, all at the same time.
async fn push_all(space: &Arc<Space>, names: &[String], version: &'static str) -> Vec<Repository> {
    let pushes = names.iter().map(|name| {
        let (space, name) = (Arc::clone(space), name.clone());
        tokio::task::spawn_blocking(move || {
            let message = format!("{version} of {name}");
            space.push(&name, folder(&app::files(&message)).path())
        })
    });
    let pushed = join_all(pushes).await.into_iter();
    pushed.map(|pushed| pushed.expect("a push")).collect()
}

fn host(space: &Space, name: &str) -> String {
    format!("{name}.{}.example.com", space.namespace)
}

/// When each build of the namespace began and ended, in microseconds, by the node's journal.
async fn builds_of(space: &Space) -> Vec<(String, u64, u64)> {
    const STARTING: &str = "7d4958e842da4a758f6c1cdc7b36dcc5";
    let journal = [
        "journalctl",
        "--output=json",
        "--output-fields=UNIT,MESSAGE_ID",
        "_PID=1",
    ];
    let prefix = format!("kari-build.{}.", space.namespace);
    let mut builds: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for line in space.on(NODE, &journal).await.lines() {
        let entry: Value = serde_json::from_str(line).expect("an entry of the journal");
        let (Some(unit), Some(message)) = (entry["UNIT"].as_str(), entry["MESSAGE_ID"].as_str())
        else {
            continue;
        };
        if !unit.starts_with(&prefix) {
            continue;
        }
        let time = entry["__MONOTONIC_TIMESTAMP"]
            .as_str()
            .expect("a time")
            .parse()
            .expect("a number");
        match (message, builds.get_mut(unit)) {
            (STARTING, None) => drop(builds.insert(unit.to_owned(), (time, u64::MAX))),
            // What comes next is its end, well or not.
            (_, Some((_, end))) if *end == u64::MAX => *end = time,
            (STARTING, Some(_)) => panic!("{unit} was started twice"),
            (_, _) => {}
        }
    }
    builds
        .into_iter()
        .map(|(unit, (start, end))| (unit, start, end))
        .collect()
}

fn most_at_once(builds: &[(String, u64, u64)]) -> usize {
    let at_start = |moment: u64| {
        let others = builds
            .iter()
            .filter(|(_, start, end)| *start <= moment && moment < *end);
        others.count()
    };
    builds
        .iter()
        .map(|(_, start, _)| at_start(*start))
        .max()
        .unwrap_or(0)
}

/// No two apps of the namespace have a unit, a port, a user or a path in common.
async fn assert_nothing_is_shared(space: &Space, count: usize) {
    let records = |file: &str| {
        let command = format!(
            "for f in /var/lib/kari/apps/{}.*/{file}; do cat $f; echo; done",
            space.namespace
        );
        async move {
            let text = space.on(NODE, &["sh", "-c", &command]).await;
            let records: Vec<Value> = serde_json::Deserializer::from_str(&text)
                .into_iter()
                .map(|r| r.expect("JSON"))
                .collect();
            records
        }
    };
    let (applied, users) = (records("applied.json").await, records("users.json").await);
    assert_eq!((applied.len(), users.len()), (count, count));
    let mut units = BTreeSet::new();
    let mut ports = BTreeSet::new();
    for process in applied
        .iter()
        .flat_map(|a| a["release"]["processes"].as_array().expect("processes"))
    {
        units.insert(process["unit"].as_str().expect("a unit").to_owned());
        ports.insert(process["port"].as_u64().expect("a port"));
    }
    let uids: BTreeSet<u64> = users
        .iter()
        .flat_map(|u| [&u["buildUid"], &u["serviceUid"]])
        .map(|uid| uid.as_u64().expect("a uid"))
        .collect();
    assert_eq!(
        (units.len(), ports.len(), uids.len()),
        (count, count, 2 * count)
    );
    let paths = format!(
        "cd /etc/systemd/system && grep --only-matching '/var/lib/kari/[^ :\"]*' kari.{}.*.service",
        space.namespace
    );
    for line in space.on(NODE, &["sh", "-c", &paths]).await.lines() {
        let (unit, path) = line.split_once(':').expect("a file and a match");
        let app = unit
            .split('.')
            .skip(1)
            .take(2)
            .collect::<Vec<_>>()
            .join(".");
        let own = format!("/var/lib/kari/apps/{app}/");
        let inside = [
            "/var/lib/kari/app",
            "/var/lib/kari/state",
            "/var/lib/kari/apps",
        ];
        assert!(
            path.starts_with(&own)
                || inside.iter().any(|place| path == *place
                    || path.starts_with(&format!("{place}/"))
                        && !path.starts_with("/var/lib/kari/apps/")),
            "{unit} names {path}"
        );
    }
}

/// The places in the queue that statuses have told, in the order in which they were told.
struct Queue(Arc<Mutex<Places>>);

/// `(position, of)` as each release was told, by its id.
type Places = BTreeMap<String, Vec<(u32, u32)>>;

impl Queue {
    fn watch(space: &Space) -> Self {
        let told: Arc<Mutex<Places>> = Arc::default();
        let (releases, writes) = (space.releases(), Arc::clone(&told));
        tokio::spawn(async move {
            let stream = watcher(releases, watcher::Config::default()).applied_objects();
            let mut stream = std::pin::pin!(stream.filter_map(|release| async { release.ok() }));
            while let Some(Release { status, .. }) = stream.next().await {
                let Some(attempt) = status.and_then(|status| status.attempt) else {
                    continue;
                };
                if let Some(queue) = attempt.queue {
                    let mut told = writes.lock().expect("the places");
                    let places = told.entry(attempt.release_id.to_string()).or_default();
                    places.push((queue.position, queue.of));
                }
            }
        });
        Self(told)
    }

    /// Most have waited; everybody has moved up only, but from the queue of the fetches to that of the builds.
    fn assert_in_order(&self, count: usize) {
        let told = self.0.lock().expect("the places");
        assert!(told.len() >= count / 2, "few have waited: {told:?}");
        for (release, places) in told.iter() {
            let fell_back = places
                .windows(2)
                .filter(|pair| pair[1].0 > pair[0].0)
                .count();
            assert!(fell_back <= 1, "{release}: {places:?}");
            assert!(
                places
                    .iter()
                    .all(|(position, of)| (1..=*of).contains(position)),
                "{places:?}"
            );
        }
        let highest = told.values().flatten().map(|(position, _)| *position).max();
        assert!(
            highest.is_some_and(|highest| highest as usize > count / 2),
            "{told:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hangs_for_ever_holds_its_own_slot_and_nothing_else() {
    let _alone = ALONE.lock().await;
    let testbed = support::testbed(1).await;
    let names: Vec<String> = (0..20).map(|n| format!("app{n}")).collect();
    let mut measured = Vec::new();
    while measured.len() < MEASUREMENTS {
        let space = Space::new(testbed, "alone").await;
        let alone = time_of(&space, &names).await;
        delete_all(&space).await;

        // One slot more of each kind, and a build and a fetch that hold it for ever.
        restart_agent(testbed, &["--build-slots=3", "--fetch-slots=5"]).await;
        let hanging = Arc::new(Space::new(testbed, "hang").await);
        let hung = hang(&hanging).await;
        let mut within = false;
        // What else the machine does comes and goes.
        for _ in 0..IN_A_ROW.min(MEASUREMENTS - measured.len()) {
            let space = Space::new(testbed, "beside").await;
            let beside = time_of(&space, &names).await;
            println!(
                "20 Deployments alone: {alone:?}; beside a hung fetch, build and probe: {beside:?}"
            );
            for (name, step) in hung {
                hanging
                    .release_until(name, NODE, step, Duration::ZERO, |r| is_at(r, step))
                    .await;
            }
            delete_all(&space).await;
            measured.push((alone, beside));
            within = beside <= alone.mul_f64(1.1);
            if within {
                break;
            }
        }
        delete_all(&hanging).await;
        space.on(NODE, &["systemctl", "stop", "silent"]).await;
        restart_agent(testbed, &[]).await;
        if within {
            return;
        }
    }
    panic!("20 Deployments, alone and beside what hangs, took {measured:?}");
}

/// Starts the agent anew with these arguments.
async fn restart_agent(testbed: &Testbed, arguments: &[&str]) {
    let agent = Part::Agent(NODE.parse().expect("a node"));
    let killed = testbed.kill(agent, Signal::KILL).await;
    killed.expect("the agent ends");
    let node = NODE.parse().expect("a node");
    let started = testbed.start_agent_with(node, arguments).await;
    started.expect("the agent starts");
}

fn is_at(release: &Release, step: &str) -> bool {
    let attempt = release.status.as_ref().and_then(|s| s.attempt.as_ref());
    let at = attempt.and_then(|attempt| attempt.step);
    at.is_some_and(|at| format!("{at:?}") == step)
}

/// A fetch, a build and a probe that hang, once each of them does.
async fn hang(space: &Arc<Space>) -> [(&'static str, &'static str); 3] {
    // It takes connections and says nothing.
    let silent =
        "import socket, time; s = socket.create_server(('127.0.0.1', 9418)); time.sleep(1000)";
    space
        .on(
            NODE,
            &["systemd-run", "--unit=silent", "python3", "-c", silent],
        )
        .await;
    let repository = space.push("build", folder(&app::files("hangs")).path());
    let mut fetch = app::manifest(
        "fetch",
        "git://127.0.0.1:9418/shop.git",
        &host(space, "fetch"),
    );
    fetch["spec"]["source"]["git"]["ref"] = json!({"commit": repository.commit});
    let build = app::manifest("build", &repository.url, &host(space, "build"));
    let mut build = app::with_build(build, "sleep infinity");
    build["spec"]["build"]["timeoutSeconds"] = json!(600);
    let mut probe = app::manifest("probe", &repository.url, &host(space, "probe"));
    // It listens and never answers.
    let deaf = "import os, socket, time; s = socket.create_server(('127.0.0.1', int(os.environ['PORT']))); time.sleep(1000)";
    probe["spec"]["processes"][0]["command"] = json!(["python3", "-c", deaf]);
    probe["spec"]["processes"][0]["readinessProbe"] =
        json!({"httpGet": {"path": "/"}, "timeoutSeconds": 600, "periodSeconds": 600});
    for manifest in [&fetch, &build, &probe] {
        space.apply(manifest).await;
    }
    let hung = [
        ("fetch", "Fetching"),
        ("build", "Building"),
        ("probe", "Starting"),
    ];
    for (name, step) in hung {
        space
            .release_until(name, NODE, step, LIMIT, |r| is_at(r, step))
            .await;
    }
    hung
}

/// How long new Deployments with builds take until the last is Ready.
async fn time_of(space: &Space, names: &[String]) -> Duration {
    let repository = space.push("shop", folder(&app::files("one")).path());
    let begun = Instant::now();
    join_all(names.iter().map(|name| {
        let manifest = app::manifest(name, &repository.url, &host(space, name));
        async move { space.apply(&app::with_build(manifest, "sleep 0.4")).await }
    }))
    .await;
    let wanted = names
        .iter()
        .map(|name| (name.as_str(), repository.commit.as_str()));
    all_ready_at(space, &wanted.collect()).await;
    begun.elapsed()
}

/// Waits until every Deployment is Ready at its commit, by one list at a time: a look at each would be most of
/// what the machine has to do.
async fn all_ready_at(space: &Space, wanted: &BTreeMap<&str, &str>) {
    let api = space.deployments();
    until("all are Ready", DEPLOY_LIMIT, || async {
        let list = api.list(&Default::default()).await;
        let list = list.map_err(|error| vec![error.to_string()])?;
        let waiting = list.iter().filter(|deployment| {
            let name = deployment.metadata.name.as_deref().unwrap_or_default();
            let Some(status) = &deployment.status else {
                return true;
            };
            let commit = status.source.as_ref().map(|source| source.commit.as_str());
            commit != wanted.get(name).copied()
                || !is(&status.conditions, "Ready", "True")
                || !is(&status.conditions, "Reconciling", "False")
                || Some(status.observed_generation) != deployment.metadata.generation
        });
        let waiting: Vec<String> = waiting.map(|d| text_of(&d.status)).collect();
        if waiting.is_empty() && list.items.len() == wanted.len() {
            Ok(())
        } else {
            Err(waiting)
        }
    })
    .await;
}

/// Deletes the Deployments of a namespace, and waits until the node has none of it.
async fn delete_all(space: &Space) {
    let deleted = space
        .deployments()
        .delete_collection(&Default::default(), &Default::default())
        .await;
    deleted.expect("a deletion");
    until("all are gone", DEPLOY_LIMIT, || async {
        match space.releases().list(&Default::default()).await {
            Ok(list) if list.items.is_empty() => Ok(()),
            Ok(list) => Err(format!("{} are left", list.items.len())),
            Err(error) => Err(error.to_string()),
        }
    })
    .await;
}
