//! Whatever is killed goes on where it was.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use serde_json::json;
use support::tls::{Authority, Tls};
use support::{DEPLOY_LIMIT, LIMIT, Space, app, folder, is, until};
use testbed::{Part, Testbed};
use tokio::sync::Mutex;

const NODE: &str = "n1";

/// The tests kill what they share: one at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

async fn kill(testbed: &Testbed, part: &str) {
    let part: Part = part.parse().expect("a part");
    testbed
        .kill(part, testbed::Signal::KILL)
        .await
        .unwrap_or_else(|e| panic!("{e}"));
}

async fn start(testbed: &Testbed, part: &str) {
    testbed
        .start(part.parse().expect("a part"))
        .await
        .unwrap_or_else(|e| panic!("{e}"));
}

#[tokio::test]
async fn an_agent_that_is_killed_in_a_build_finds_the_same_build_again() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "kill").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let build = "echo started; while [ ! -e /tmp/go ] && [ $((i=${i:-0}+1)) -lt 40 ]; do sleep 0.2; done; echo ended";
    space
        .apply(&app::with_build(
            app::manifest("shop", &repository.url, "kill.example.com"),
            build,
        ))
        .await;
    let pattern = format!("kari-build.{}.shop.*", space.namespace);
    let unit = until("the build runs", LIMIT, || async {
        let units = space
            .on(
                NODE,
                &[
                    "systemctl",
                    "list-units",
                    "--all",
                    "--plain",
                    "--no-legend",
                    &pattern,
                ],
            )
            .await;
        match units.split_whitespace().next() {
            Some(unit) => Ok(unit.to_owned()),
            None => Err(units),
        }
    })
    .await;
    let invocation = space
        .on(
            NODE,
            &["systemctl", "show", "--value", "-p", "InvocationID", &unit],
        )
        .await;
    kill(space.testbed, "agent/n1").await;
    start(space.testbed, "agent/n1").await;
    let after = space
        .on(
            NODE,
            &["systemctl", "show", "--value", "-p", "InvocationID", &unit],
        )
        .await;
    assert_eq!(invocation, after, "the build was started anew");
    space.ready_at("shop", &repository.commit).await;
    let logs = format!("cat /var/lib/kari/apps/{}.shop/logs/*", space.namespace);
    let log = space.on(NODE, &["sh", "-c", &logs]).await;
    assert_eq!(log.matches("started").count(), 1, "{log}");
    assert_eq!(log.matches("ended").count(), 1, "{log}");
}

#[tokio::test]
async fn a_probe_that_a_killed_agent_left_is_ended_by_the_next() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "stray").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let mut manifest = app::manifest("shop", &repository.url, "stray.example.com");
    manifest["spec"]["processes"][0]["readinessProbe"] = serde_json::json!({
        "exec": {"command": ["sh", "-c", "trap '' TERM; echo $$ >/tmp/probe; sleep 3000 & wait"]},
        "periodSeconds": 3000, "timeoutSeconds": 3000,
    });
    space.apply(&manifest).await;
    let unit = format!("kari-probe.{}.shop.web.*", space.namespace);
    let invocation = || async {
        space
            .on(
                NODE,
                &["systemctl", "show", "--value", "-p", "InvocationID", &unit],
            )
            .await
            .trim()
            .to_owned()
    };
    let before = until("the probe hangs", DEPLOY_LIMIT, || async {
        let found = invocation().await;
        if found.is_empty() {
            Err(found)
        } else {
            Ok(found)
        }
    })
    .await;
    kill(space.testbed, "agent/n1").await;
    assert_eq!(
        invocation().await,
        before,
        "the probe went with its agent, so this shows nothing"
    );
    start(space.testbed, "agent/n1").await;
    until(
        "the probe is another agent's, and the only one",
        LIMIT,
        || async {
            let now = invocation().await;
            let sleeping = space
                .on(NODE, &["sh", "-c", "pgrep -cf '[s]leep 3000' || true"])
                .await;
            if !now.is_empty() && now != before && sleeping.trim() == "2" {
                Ok(())
            } else {
                Err(format!("{now}, {sleeping}"))
            }
        },
    )
    .await;
    space
        .deployments()
        .delete("shop", &Default::default())
        .await
        .expect("a deletion");
    until("nothing of the app is left", LIMIT, || async {
        let pattern = format!("kari*{}.shop*", space.namespace);
        let units = space
            .on(
                NODE,
                &[
                    "systemctl",
                    "list-units",
                    "--all",
                    "--plain",
                    "--no-legend",
                    &pattern,
                ],
            )
            .await;
        if units.is_empty() { Ok(()) } else { Err(units) }
    })
    .await;
}

#[tokio::test]
async fn a_host_that_a_killed_agent_had_claimed_for_an_attempt_is_nobody_elses() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "claim").await;
    let host = "claim.example.com";
    let server = app::SERVER.replace(
        "server = Server(",
        "import time\nwhile not os.path.exists(os.environ['HOME'] + '/go'): time.sleep(0.1)\nserver = Server(",
    );
    let files = folder(&[("server.py", server.as_str()), ("message", "first")]);
    let slow = space.push("slow", files.path());
    let mut first = app::manifest("first", &slow.url, host);
    first["spec"]["processes"][0]["stateDirectory"] = json!(true);
    first["spec"]["processes"][0]["readinessProbe"]["failureThreshold"] = json!(600);
    space.apply(&first).await;
    let unit = format!("kari.{}.first.web.*.service", space.namespace);
    until("the first one's process starts", DEPLOY_LIMIT, || async {
        let list = ["systemctl", "list-units", "--plain", "--no-legend", &unit];
        let units = space.on(NODE, &list).await;
        if units.is_empty() { Err(units) } else { Ok(()) }
    })
    .await;
    kill(space.testbed, "agent/n1").await;
    let files = folder(&app::files("second"));
    let quick = space.push("quick", files.path());
    space
        .apply(&app::manifest("second", &quick.url, host))
        .await;
    start(space.testbed, "agent/n1").await;
    space
        .deployment_until("second", "told who has its host", DEPLOY_LIMIT, |d| {
            let conditions = d.status.clone().unwrap_or_default().conditions;
            let stalled = conditions.iter().find(|c| c.type_ == "Stalled");
            stalled.is_some_and(|c| c.reason == "RouteConflict" && c.message.contains("/first"))
        })
        .await;
    let state = format!("/var/lib/kari/apps/{}.first/state/web/go", space.namespace);
    space.on(NODE, &["touch", &state]).await;
    space.ready_at("first", &slow.commit).await;
    assert_eq!(space.get(NODE, host).await, Ok((200, "first".into())));
}

#[tokio::test]
async fn a_node_that_reboots_without_agent_and_api_comes_up_serving() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "reboot").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let host = "reboot.example.com";
    let authority = Authority::new();
    let certificate = authority.issue(&[host]);
    let data = [
        ("tls.crt", certificate.certificate.as_str()),
        ("tls.key", &certificate.key),
    ];
    space.secret("tls", "kubernetes.io/tls", &data).await;
    let mut manifest = app::manifest("shop", &repository.url, host);
    manifest["spec"]["processes"][0]["route"]["tls"] = serde_json::json!({"secretName": "tls"});
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    kill(space.testbed, "agent/n1").await;
    // It would end by itself when it can't renew its Lease, sooner or later.
    kill(space.testbed, "controller").await;
    kill(space.testbed, "apiserver").await;
    kill(space.testbed, "node/n1").await;
    start(space.testbed, "node/n1").await;
    let client = Tls::new(support::Lab(space.testbed), &authority, host);
    let to = space.tls_proxy(NODE);
    until("the node serves", LIMIT, || async {
        match support::traffic::get_once(&client, to, host, "/").await {
            Ok((200, body)) if body == "one" => Ok(()),
            other => Err(other),
        }
    })
    .await;
    // The agent alone holds what is there.
    start(space.testbed, "agent/n1").await;
    let service = format!("kari.{}.shop.web.*.service", space.namespace);
    let pid = space
        .on(
            NODE,
            &["systemctl", "show", "--value", "-p", "MainPID", &service],
        )
        .await;
    start(space.testbed, "apiserver").await;
    start(space.testbed, "controller").await;
    let mut changed = files;
    support::write(changed.path(), &[("message", "two")]);
    let second = space.push("shop", changed.path());
    until("the API takes an annotation", DEPLOY_LIMIT, || async {
        space
            .deployments()
            .get("shop")
            .await
            .map_err(|e| e.to_string())
    })
    .await;
    let same = space
        .on(
            NODE,
            &["systemctl", "show", "--value", "-p", "MainPID", &service],
        )
        .await;
    assert_eq!(pid, same, "a process that ran was started anew");
    space.request_look("shop").await;
    space.ready_at("shop", &second.commit).await;
    changed = folder(&[]);
    drop(changed);
}

#[tokio::test]
async fn a_controller_that_is_killed_goes_on_with_the_rollout() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "leader").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let build = "sleep 3";
    space
        .apply(&app::with_build(
            app::manifest("shop", &repository.url, "leader.example.com"),
            build,
        ))
        .await;
    space
        .release_until("shop", NODE, "told", LIMIT, |_| true)
        .await;
    kill(space.testbed, "controller").await;
    start(space.testbed, "controller").await;
    let deployment = space.ready_at("shop", &repository.commit).await;
    assert!(deployment.status.expect("a status").active.is_empty());
    let release = space
        .release_until("shop", NODE, "seen", LIMIT, |_| true)
        .await;
    assert_eq!(
        release.spec.attempt, 1,
        "the second leader decided anew what the first had decided"
    );
}

#[tokio::test]
async fn an_app_that_is_stopped_or_whose_files_are_changed_is_put_right() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "drift").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    space
        .apply(&app::manifest("shop", &repository.url, "drift.example.com"))
        .await;
    space.ready_at("shop", &repository.commit).await;
    let unit = format!("kari.{}.shop.web.*.service", space.namespace);
    let vhost = format!("/var/lib/kari/proxy/vhosts/{}.shop.conf", space.namespace);
    for (what, words) in [
        (
            "its unit is stopped",
            vec!["systemctl", "stop", unit.as_str()],
        ),
        ("its vhost is gone", vec!["rm", vhost.as_str()]),
    ] {
        space.on(NODE, &words).await;
        if what.contains("vhost") {
            space
                .on(NODE, &["systemctl", "reload", "kari-proxy.service"])
                .await;
        }
        until(
            &format!("the app serves after {what}"),
            DEPLOY_LIMIT,
            || async {
                match space.get(NODE, "drift.example.com").await {
                    Ok((200, body)) if body == "one" => Ok(()),
                    other => Err(other),
                }
            },
        )
        .await;
    }
}

#[tokio::test]
async fn going_back_and_other_variables_need_neither_a_build_nor_the_git_server() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "back").await;
    let files = folder(&app::files("none"));
    let first = space.push("shop", files.path());
    // Never the same twice: a tree that is built again is seen.
    let build = "cat /proc/sys/kernel/random/uuid > message";
    let mut manifest =
        app::with_build(app::manifest("shop", &first.url, "back.example.com"), build);
    space.apply(&manifest).await;
    space.ready_at("shop", &first.commit).await;
    let (_, built) = space
        .get(NODE, "back.example.com")
        .await
        .expect("an answer");
    support::write(files.path(), &[("other", "a change")]);
    let second = space.push("shop", files.path());
    space.request_look("shop").await;
    space.ready_at("shop", &second.commit).await;
    let (_, other) = space
        .get(NODE, "back.example.com")
        .await
        .expect("an answer");
    assert_ne!(built, other);

    kill(space.testbed, "git").await;
    manifest["spec"]["source"]["git"]["ref"] = json!({"commit": first.commit});
    space.apply(&manifest).await;
    space.ready_at("shop", &first.commit).await;
    assert_eq!(
        space.get(NODE, "back.example.com").await,
        Ok((200, built.clone())),
        "what was built before runs again"
    );
    manifest["spec"]["env"] = json!([{"name": "MESSAGE", "value": "from the environment"}]);
    space.apply(&manifest).await;
    space
        .deployment_until("shop", "Ready with the variable", DEPLOY_LIMIT, |d| {
            d.status.as_ref().is_some_and(|s| {
                is(&s.conditions, "Ready", "True")
                    && Some(s.observed_generation) == d.metadata.generation
            })
        })
        .await;
    assert_eq!(
        space.get(NODE, "back.example.com").await,
        Ok((200, "from the environment".into()))
    );
    start(space.testbed, "git").await;
    let starts = format!("--grep=^Starting kari-build.{}.shop", space.namespace);
    let builds = ["journalctl", "--output=cat", &starts, "_PID=1"];
    let builds = space.on(NODE, &builds).await;
    assert_eq!(builds.lines().count(), 2, "{builds}");
}

#[tokio::test]
async fn a_full_disk_is_foreseen_and_what_runs_goes_on_and_can_be_changed() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "disk").await;
    with_small_disk(&space).await;
    let files = folder(&app::files("runs"));
    let repository = space.push("runs", files.path());
    let build = "head -c 10M /dev/urandom > cache/large";
    let manifest = app::manifest("runs", &repository.url, "runs.example.com");
    let mut manifest = app::with_build(manifest, build);
    manifest["spec"]["build"]["cacheDirectories"] = json!(["cache"]);
    space.apply(&manifest).await;
    space.ready_at("runs", &repository.commit).await;

    // What nothing refers to goes at once, and caches with it.
    fill(&space, 3 << 20).await;
    until("the cache is given up", LIMIT, || async {
        let free = free_bytes(&space).await;
        if free > 10 << 20 { Ok(()) } else { Err(free) }
    })
    .await;

    fill(&space, 3 << 20).await;
    let waiting = space.push("waits", folder(&app::files("waits")).path());
    space
        .apply(&app::manifest("waits", &waiting.url, "waits.example.com"))
        .await;
    let told = space
        .release_until("waits", NODE, "held up for the disk", LIMIT, |r| {
            let attempt = r.status.as_ref().and_then(|s| s.attempt.as_ref());
            attempt
                .and_then(|a| a.failure.as_ref())
                .is_some_and(|f| f.reason == "DiskPressure")
        })
        .await;
    let attempt = told.status.and_then(|s| s.attempt).expect("an attempt");
    let message = attempt.failure.expect("a failure").message;
    assert!(
        message.contains("MiB are free on the disk of /var/lib/kari, and 5 MiB are to stay free"),
        "{message}"
    );
    let mirrors = space
        .on(
            NODE,
            &["sh", "-c", "ls -d /var/lib/kari/mirrors/*.git | wc -l"],
        )
        .await;
    assert_eq!(mirrors, "1", "a fetch has begun");

    // Not a byte is left: there is room for records all the same.
    fill(&space, 0).await;
    manifest["spec"]["env"] = json!([{"name": "MESSAGE", "value": "changed"}]);
    space.apply(&manifest).await;
    until("the change is served", DEPLOY_LIMIT, || async {
        match space.get(NODE, "runs.example.com").await {
            Ok((200, body)) if body == "changed" => Ok(()),
            other => Err(other),
        }
    })
    .await;
    space.ready_at("runs", &repository.commit).await;

    space
        .on(NODE, &["sh", "-c", "rm /var/lib/kari/fill*"])
        .await;
    space.ready_at("waits", &waiting.commit).await;
    until("room for records is set aside again", LIMIT, || async {
        let found = space.on(NODE, &["ls", "/var/lib/kari"]).await;
        if found.contains("ballast") {
            Ok(())
        } else {
            Err(found)
        }
    })
    .await;
    delete_everything(&space).await;
    with_own_disk(&space).await;
}

/// Gives the agent a file system of 48 MiB, on which nothing is yet.
async fn with_small_disk(space: &Space) {
    delete_everything(space).await;
    kill(space.testbed, "agent/n1").await;
    let script =
        "systemctl stop kari-proxy && mount -t tmpfs -o size=48M,mode=755 tmpfs /var/lib/kari";
    space.on(NODE, &["sh", "-c", script]).await;
    start(space.testbed, "agent/n1").await;
}

async fn with_own_disk(space: &Space) {
    kill(space.testbed, "agent/n1").await;
    let script = "systemctl stop kari-proxy && umount -l /var/lib/kari";
    space.on(NODE, &["sh", "-c", script]).await;
    start(space.testbed, "agent/n1").await;
}

/// No Deployment of any test is left on the node.
async fn delete_everything(space: &Space) {
    space
        .testbed
        .kubectl(["delete", "kd", "--all", "--all-namespaces"])
        .await
        .expect("kubectl");
    until("nothing is deployed", DEPLOY_LIMIT, || async {
        let releases = space
            .testbed
            .kubectl(["get", "krel", "--all-namespaces", "--no-headers"]);
        match releases.await {
            Ok(text) if text.trim().is_empty() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

async fn free_bytes(space: &Space) -> u64 {
    let df = space
        .on(NODE, &["df", "--output=avail", "-B1", "/var/lib/kari"])
        .await;
    df.lines()
        .last()
        .and_then(|line| line.trim().parse().ok())
        .expect("bytes")
}

/// Fills the agent's disk but for so many bytes.
async fn fill(space: &Space, leave: u64) {
    let bytes = free_bytes(space).await.saturating_sub(leave).to_string();
    let file = format!("/var/lib/kari/fill-{leave}-{bytes}");
    space.on(NODE, &["fallocate", "-l", &bytes, &file]).await;
}
