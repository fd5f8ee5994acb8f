//! Whatever is killed goes on where it was.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use support::{DEPLOY_LIMIT, LIMIT, Space, app, folder, until};
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
async fn a_node_that_reboots_without_agent_and_api_comes_up_serving() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "reboot").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    space
        .apply(&app::manifest(
            "shop",
            &repository.url,
            "reboot.example.com",
        ))
        .await;
    space.ready_at("shop", &repository.commit).await;
    kill(space.testbed, "agent/n1").await;
    kill(space.testbed, "apiserver").await;
    kill(space.testbed, "node/n1").await;
    start(space.testbed, "node/n1").await;
    until("the node serves", LIMIT, || async {
        match space.get(NODE, "reboot.example.com").await {
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
