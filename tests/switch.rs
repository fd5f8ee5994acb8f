//! From one release to the next on one node: both ways of switching under load, several processes, and a
//! newer wish in the middle of an older one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use std::collections::BTreeMap;
use std::time::Instant;

use kari::api::release::Phase;
use kube::api::DeleteParams;
use serde_json::{Value, json};
use support::traffic::Traffic;
use support::{DEPLOY_LIMIT, LIMIT, Lab, Space, app, folder, reason, until};

const NODE: &str = "n1";
/// Requests per second.
const RATE: u32 = 200;
/// Connections, kept alive.
const CONNECTIONS: u32 = 20;

/// Seconds that the app of the load test takes to stop, and to listen after its start.
const SLOW_SECONDS: (u32, u32) = (2, 4);

/// Runs a server and notes in its state folder when it was told to stop, ended, began, and listens.
fn slow_server() -> String {
    let (stop, start) = SLOW_SECONDS;
    let note = r#"
import os, time
def note(what):
    with open(os.path.join(os.environ["STATE_DIRECTORY"], "times"), "a") as file:
        print(what, time.monotonic(), file=file, flush=True)
note("began")
"#;
    let (head, tail) = app::SERVER
        .split_once("signal.signal")
        .expect("the server handles SIGTERM");
    let head = head.replace(
        "server = Server(",
        &format!("time.sleep({start})\nserver = Server("),
    );
    let tail = tail.split_once('\n').expect("lines").1;
    format!(
        "{note}{head}
def stop(*_):
    note('told')
    threading.Thread(target=lambda: (time.sleep({stop}), server.shutdown())).start()
signal.signal(signal.SIGTERM, stop)
note('listens')
{tail}
note('ended')
"
    )
}

/// What the slow server noted last of each kind, in seconds.
async fn times(space: &Space) -> BTreeMap<String, f64> {
    let script = format!(
        "cat /var/lib/kari/apps/{}.shop/state/web/times",
        space.namespace
    );
    let text = space.on(NODE, &["sh", "-c", &script]).await;
    let entry = |line: &str| {
        let (what, when) = line.split_once(' ')?;
        Some((what.to_owned(), when.parse().ok()?))
    };
    text.lines().filter_map(entry).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn blue_green_fails_no_request_and_recreate_only_while_the_app_stops_and_starts() {
    let space = Space::new(support::testbed(1).await, "load").await;
    let host = "load.example.com";
    let server = slow_server();
    let files = folder(&[("server.py", server.as_str()), ("message", "one")]);
    let first = space.push("shop", files.path());
    let mut manifest = app::manifest("shop", &first.url, host);
    let web = &mut manifest["spec"]["processes"][0];
    web["stateDirectory"] = json!(true);
    web["terminationGracePeriodSeconds"] = json!(20);
    // Who listens is ready: no period of a probe is in what is measured.
    web.as_object_mut().unwrap().remove("readinessProbe");
    let worker =
        json!({"name": "worker", "command": ["python3", "-c", "import time; time.sleep(9999)"]});
    let processes = manifest["spec"]["processes"].as_array_mut().unwrap();
    processes.push(worker);
    manifest["spec"]["strategy"]["switch"] = json!("BlueGreen");
    space.apply(&manifest).await;
    space.ready_at("shop", &first.commit).await;

    let traffic = || {
        Traffic::start(
            Lab(space.testbed),
            space.proxy(NODE),
            host,
            RATE,
            CONNECTIONS,
        )
    };
    let change = async |message: &str| {
        support::write(files.path(), &[("message", message)]);
        let commit = space.push("shop", files.path()).commit;
        let running = traffic();
        space.request_look("shop").await;
        space.ready_at("shop", &commit).await;
        running.stop().await
    };
    let tally = change("two").await;
    eprintln!(
        "BlueGreen: {} good, {} failed",
        tally.good,
        tally.failed.len()
    );
    assert!(tally.failed.is_empty(), "{:?}", tally.failed);
    assert!(tally.bodies.contains_key("one") && tally.bodies.contains_key("two"));

    // Absent means Recreate, as there is a state folder.
    manifest["spec"]["strategy"]
        .as_object_mut()
        .unwrap()
        .remove("switch");
    space.apply(&manifest).await;
    space
        .release_until("shop", NODE, "to be recreated", LIMIT, |r| {
            r.spec.template.switch == kari::api::deployment::Switch::Recreate
        })
        .await;
    // What else the machine does comes and goes: where it was more in one change, there is another.
    let mut ratios = Vec::new();
    for message in ["three", "four", "five"] {
        let tally = change(message).await;
        assert!(tally.bodies.contains_key(message), "{:?}", tally.bodies);
        let others: Vec<_> = tally
            .failed
            .iter()
            .filter(|how| !(how.starts_with("503") && how.contains("Retry-After")))
            .collect();
        assert!(others.is_empty(), "{others:?}");
        let (from, to) = tally.failed_between.expect("it was away for a while");
        let away = (to - from).as_secs_f64();
        let times = times(&space).await;
        let needs = times["ended"] - times["told"] + times["listens"] - times["began"];
        assert!(times["ended"] < times["began"], "both ran: {times:?}");
        eprintln!(
            "Recreate: {} good, {} answered 503, away {away:.2} s, of which the app needs {needs:.2} s: {:.2} times",
            tally.good,
            tally.failed.len(),
            away / needs
        );
        if away < 1.2 * needs {
            return;
        }
        ratios.push(away / needs);
    }
    panic!("away for {ratios:?} times of what the app needs");
}

/// The main process of each of an app's services, by process.
async fn pids(space: &Space, name: &str) -> BTreeMap<String, String> {
    let script = format!(
        "for unit in $(systemctl list-units --plain --no-legend 'kari.{}.{name}.*.service' | cut -d' ' -f1); do
             echo $unit $(systemctl show --value -p MainPID $unit)
         done",
        space.namespace
    );
    let text = space.on(NODE, &["sh", "-c", &script]).await;
    let entry = |line: &str| {
        let (unit, pid) = line.split_once(' ')?;
        Some((unit.split('.').nth(3)?.to_owned(), pid.to_owned()))
    };
    text.lines().filter_map(entry).collect()
}

#[tokio::test]
async fn processes_are_committed_together_and_one_that_does_not_change_is_left_alone() {
    let space = Space::new(support::testbed(1).await, "many").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let manifest = app::manifest("shop", &repository.url, "many.example.com");
    let worker = |name: &str, seconds: &str| json!({"name": name, "command": ["sleep", seconds]});
    let with = |workers: Vec<Value>, switch: &str| {
        let mut manifest = manifest.clone();
        manifest["spec"]["strategy"]["switch"] = json!(switch);
        let processes = manifest["spec"]["processes"].as_array_mut().unwrap();
        processes.extend(workers);
        manifest
    };
    let deploy = async |manifest: &Value| {
        let generation = space.apply(manifest).await.metadata.generation;
        space
            .deployment_until("shop", "Ready as it is now", DEPLOY_LIMIT, |d| {
                let status = d.status.clone().unwrap_or_default();
                Some(status.observed_generation) == generation
                    && support::is(&status.conditions, "Ready", "True")
                    && support::is(&status.conditions, "Reconciling", "False")
            })
            .await;
        until("the old processes are gone", LIMIT, || async {
            let pids = pids(&space, "shop").await;
            let wanted = manifest["spec"]["processes"].as_array().unwrap().len();
            let script = format!(
                "ls /etc/systemd/system | grep -c '^kari.{}.shop.*service'",
                space.namespace
            );
            let files = space.on(NODE, &["sh", "-c", &script]).await;
            if pids.len() == wanted && files.trim() == wanted.to_string() {
                Ok(pids)
            } else {
                Err((pids, files))
            }
        })
        .await
    };
    for switch in ["BlueGreen", "Recreate"] {
        let before = deploy(&with(vec![worker("a", "1000")], switch)).await;
        let changed = deploy(&with(vec![worker("a", "1001")], switch)).await;
        assert_eq!(
            changed["web"], before["web"],
            "{switch}: the web process was touched"
        );
        assert_ne!(changed["a"], before["a"], "{switch}");
        let added = deploy(&with(
            vec![worker("a", "1001"), worker("b", "1000")],
            switch,
        ))
        .await;
        assert_eq!(
            (&added["web"], &added["a"]),
            (&changed["web"], &changed["a"]),
            "{switch}"
        );
        let removed = deploy(&with(vec![worker("a", "1001")], switch)).await;
        assert_eq!(removed, changed, "{switch}");

        // One crashes, the other would be fine: none of them is committed.
        let mut crashing = with(
            vec![json!({"name": "a", "command": ["sh", "-c", "exit 3"]})],
            switch,
        );
        crashing["spec"]["processes"][0]["env"] = json!([{"name": "MESSAGE", "value": "two"}]);
        space.apply(&crashing).await;
        let stopped = space
            .deployment_until("shop", "Stalled", DEPLOY_LIMIT, |d| {
                let status = d.status.clone().unwrap_or_default();
                support::is(&status.conditions, "Stalled", "True") && status.active.is_empty()
            })
            .await;
        let conditions = stopped.status.unwrap().conditions;
        assert_eq!(reason(&conditions, "Stalled"), "StartFailed", "{switch}");
        let served = space.get(NODE, "many.example.com").await;
        assert_eq!(served, Ok((200, "one".into())), "{switch}");
        let old_ones_only = |after: &BTreeMap<String, String>| match switch {
            "BlueGreen" => *after == removed,
            _ => after.keys().eq(["a", "web"]) && !after.values().any(|pid| pid == "0"),
        };
        let after = until("only the old processes run", LIMIT, || async {
            let after = pids(&space, "shop").await;
            if old_ones_only(&after) {
                Ok(after)
            } else {
                Err(after)
            }
        })
        .await;
        let mended = deploy(&with(vec![worker("a", "1001")], switch)).await;
        assert_eq!(mended, after, "{switch}: nothing had to be touched");
    }
}

/// An older wish that hangs in one step of its way.
struct Row {
    name: &'static str,
    switch: &'static str,
    /// What the hanging commit has.
    hangs: &'static [(&'static str, &'static str)],
    /// And the next one, which does not.
    mended: &'static [(&'static str, &'static str)],
    min_ready: u32,
    phase: Phase,
}

const ROWS: [Row; 5] = [
    Row {
        name: "building",
        switch: "BlueGreen",
        hangs: &[("build.sh", "sleep 600")],
        mended: &[("build.sh", "true")],
        min_ready: 1,
        phase: Phase::Building,
    },
    Row {
        name: "starting",
        switch: "BlueGreen",
        hangs: &[("server.py", "import time; time.sleep(600)")],
        mended: &[("server.py", app::SERVER)],
        min_ready: 1,
        phase: Phase::Starting,
    },
    Row {
        name: "baking",
        switch: "BlueGreen",
        hangs: &[("other", "hangs")],
        mended: &[("other", "mended")],
        min_ready: 600,
        phase: Phase::Baking,
    },
    Row {
        name: "recreating",
        switch: "Recreate",
        hangs: &[("server.py", "import time; time.sleep(600)")],
        mended: &[("server.py", app::SERVER)],
        min_ready: 1,
        phase: Phase::Starting,
    },
    Row {
        name: "rebaking",
        switch: "Recreate",
        hangs: &[("other", "hangs")],
        mended: &[("other", "mended")],
        min_ready: 600,
        phase: Phase::Baking,
    },
];

/// The app's units that run.
async fn running(space: &Space, name: &str) -> Vec<String> {
    let app = format!("{}.{name}", space.namespace);
    let script = format!(
        "systemctl list-units --state=active,activating --plain --no-legend 'kari.{app}.*.service' 'kari-build.{app}.*' | cut -d' ' -f1"
    );
    let text = space.on(NODE, &["sh", "-c", &script]).await;
    text.lines().map(str::to_owned).collect()
}

/// The app's units, and its stages.
async fn left(space: &Space, name: &str) -> Vec<String> {
    let app = format!("{}.{name}", space.namespace);
    let script = format!(
        "systemctl list-units --all --plain --no-legend 'kari.{app}.*.service' 'kari-build.{app}.*' | cut -d' ' -f1
         ls /etc/systemd/system | grep '^kari.{app}.*service' || true
         ls -d /var/lib/kari/apps/{app}/stage/* 2>/dev/null || true"
    );
    let text = space.on(NODE, &["sh", "-c", &script]).await;
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines.dedup();
    lines
}

impl Row {
    fn manifest(&self, url: &str, min_ready: u32) -> Value {
        let mut manifest = app::manifest(self.name, url, &format!("{}.example.com", self.name));
        manifest["spec"]["processes"][0]["readinessProbe"]["failureThreshold"] = json!(600);
        manifest["spec"]["strategy"] = json!({"switch": self.switch, "minReadySeconds": min_ready});
        app::with_build(manifest, "sh ./build.sh")
    }

    async fn run(&self, space: &Space) {
        let host = format!("{}.example.com", self.name);
        let files = folder(&app::files("one"));
        support::write(files.path(), &[("build.sh", "true")]);
        let first = space.push(self.name, files.path());
        space.apply(&self.manifest(&first.url, 1)).await;
        space.ready_at(self.name, &first.commit).await;
        let hang = async |message: &str| {
            until(
                &format!("{}: the release alone is left", self.name),
                LIMIT,
                || async {
                    let left = left(space, self.name).await;
                    if left.len() == 1 { Ok(()) } else { Err(left) }
                },
            )
            .await;
            let before = running(space, self.name).await;
            space
                .apply(&self.manifest(&first.url, self.min_ready))
                .await;
            support::write(files.path(), self.hangs);
            support::write(files.path(), &[("message", message)]);
            let commit = space.push(self.name, files.path()).commit;
            space.request_look(self.name).await;
            space
                .release_until(
                    self.name,
                    NODE,
                    "in the step it hangs in",
                    DEPLOY_LIMIT,
                    |r| {
                        let step = r.status.as_ref().and_then(|s| s.attempt.as_ref()?.step);
                        r.spec.commit == commit && step == Some(self.phase)
                    },
                )
                .await;
            support::write(files.path(), self.mended);
            until(
                &format!("{}: what hangs runs", self.name),
                LIMIT,
                || async {
                    let units = running(space, self.name).await;
                    let new: Vec<_> = units
                        .into_iter()
                        .filter(|unit| !before.contains(unit))
                        .collect();
                    if new.is_empty() {
                        Err("nothing new runs")
                    } else {
                        Ok(new)
                    }
                },
            )
            .await
        };
        let gone = async |hanging: &[String], what: &str| {
            let since = Instant::now();
            until(
                &format!("{}: {what}: {hanging:?} is gone", self.name),
                LIMIT,
                || async {
                    let left = left(space, self.name).await;
                    let still: Vec<_> = left
                        .into_iter()
                        .filter(|unit| hanging.contains(unit))
                        .collect();
                    if still.is_empty() { Ok(()) } else { Err(still) }
                },
            )
            .await;
            eprintln!(
                "{}: {what}: gone after {:.1} s",
                self.name,
                since.elapsed().as_secs_f64()
            );
        };

        // A newer commit.
        let traffic = Traffic::start(Lab(space.testbed), space.proxy(NODE), &host, 20, 2);
        let hanging = hang("two").await;
        support::write(files.path(), &[("message", "three")]);
        let newer = space.push(self.name, files.path());
        space.request_look(self.name).await;
        space
            .release_until(self.name, NODE, "told", LIMIT, |r| {
                r.spec.commit == newer.commit
            })
            .await;
        gone(&hanging, "a newer commit").await;
        space.apply(&self.manifest(&first.url, 1)).await;
        space.ready_at(self.name, &newer.commit).await;
        let tally = traffic.stop().await;
        let bad: Vec<_> = tally
            .failed
            .iter()
            .filter(|how| self.switch == "BlueGreen" || !how.starts_with("503"))
            .collect();
        assert!(bad.is_empty(), "{}: {bad:?}", self.name);

        // Deleted and applied again.
        let hanging = hang("four").await;
        let parameters = DeleteParams::foreground();
        space
            .deployments()
            .delete(self.name, &parameters)
            .await
            .expect("deleted");
        gone(&hanging, "deleted").await;
        until(&format!("{} is gone", self.name), LIMIT, || async {
            match space.deployments().get_opt(self.name).await {
                Ok(None) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        support::write(files.path(), &[("message", "five")]);
        let last = space.push(self.name, files.path());
        space.apply(&self.manifest(&first.url, 1)).await;
        space.ready_at(self.name, &last.commit).await;
        assert_eq!(
            space.get(NODE, &host).await,
            Ok((200, "five".into())),
            "{}",
            self.name
        );
        until(
            &format!("{}: one unit is left", self.name),
            LIMIT,
            || async {
                let left = left(space, self.name).await;
                if left.len() == 1 { Ok(()) } else { Err(left) }
            },
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_wish_ends_the_older_one_in_whichever_step_it_hangs() {
    let space = Space::new(support::testbed(1).await, "newer").await;
    let rows = ROWS.iter().map(|row| row.run(&space));
    futures::future::join_all(rows).await;
}
