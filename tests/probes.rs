//! What a process is asked, what follows from its answers, and what its limits stop.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use kari::api::Release;
use serde_json::{Value, json};
use support::{DEPLOY_LIMIT, LIMIT, Space, app, folder, is, reason, until};
use testbed::Repository;

const NODE: &str = "n1";

/// Seconds for a probe whose answer is compared: beside other tests a command may take more than one to start.
const PATIENT: u32 = 10;

/// One Deployment `shop` of Python programs, on one node.
struct Shop {
    space: Space,
    host: String,
    repository: Repository,
    manifest: Value,
}

impl Shop {
    /// The app of all tests, with what is put before its server.
    async fn new(topic: &str, prelude: &str) -> Self {
        let space = Space::new(support::testbed(1).await, topic).await;
        let server = format!("{prelude}\n{}", app::SERVER);
        let files = folder(&[("server.py", &server), ("message", "one")]);
        let repository = space.push("shop", files.path());
        let host = format!("{topic}.example.com");
        let mut manifest = app::manifest("shop", &repository.url, &host);
        manifest["spec"]["processes"][0]["stateDirectory"] = json!(true);
        Self {
            space,
            host,
            repository,
            manifest,
        }
    }

    fn web(&mut self) -> &mut Value {
        &mut self.manifest["spec"]["processes"][0]
    }

    async fn apply(&self) {
        self.space.apply(&self.manifest).await;
    }

    /// Makes a file in the state folder of the process `web`.
    async fn touch(&self, name: &str) {
        let path = format!(
            "/var/lib/kari/apps/{}.shop/state/web/{name}",
            self.space.namespace
        );
        self.space.on(NODE, &["touch", &path]).await;
    }

    /// A property of the service of a process.
    async fn property(&self, process: &str, property: &str) -> String {
        let unit = format!("kari.{}.shop.{process}.*.service", self.space.namespace);
        let words = ["systemctl", "show", "--value", "-p", property, &unit];
        self.space.on(NODE, &words).await.trim().to_owned()
    }

    /// Waits until the Release's Ready has `why` and says `part`.
    async fn told(&self, why: &str, part: &str) -> Release {
        self.space
            .release_until("shop", NODE, &format!("{why}: {part}"), DEPLOY_LIMIT, |r| {
                let conditions = r.status.clone().unwrap_or_default().conditions;
                conditions
                    .iter()
                    .any(|c| c.type_ == "Ready" && c.reason == why && c.message.contains(part))
            })
            .await
    }

    /// Waits until the rollout is Stalled for `why`, and says `part`.
    async fn stalled(&self, why: &str, part: &str) {
        self.space
            .deployment_until(
                "shop",
                &format!("Stalled for {why}: {part}"),
                DEPLOY_LIMIT,
                |d| {
                    let conditions = d.status.clone().unwrap_or_default().conditions;
                    is(&conditions, "Stalled", "True")
                        && reason(&conditions, "Stalled") == why
                        && conditions
                            .iter()
                            .any(|c| c.type_ == "Stalled" && c.message.contains(part))
                },
            )
            .await;
    }

    /// Waits until no command of a probe is left of the app.
    async fn no_probe_is_left(&self) {
        let pattern = format!("kari-probe.{}.*", self.space.namespace);
        until("no probe is left", LIMIT, || async {
            let words = [
                "systemctl",
                "list-units",
                "--all",
                "--plain",
                "--no-legend",
                &pattern,
            ];
            let units = self.space.on(NODE, &words).await;
            if units.is_empty() { Ok(()) } else { Err(units) }
        })
        .await;
    }
}

#[tokio::test]
async fn a_command_that_sees_what_the_process_sees_decides_when_it_gets_traffic() {
    // Says who it is in its own /tmp once it may.
    let prelude = r#"
import os, threading, time
def wait():
    while not os.path.exists(os.environ["STATE_DIRECTORY"] + "/open"): time.sleep(0.1)
    open("/tmp/ready", "w").write("%d %s" % (os.getuid(), os.environ["PORT"]))
threading.Thread(target=wait, daemon=True).start()
"#;
    let mut shop = Shop::new("exec", prelude).await;
    let check = r#"
echo "not yet $MARK"
test "$MARK" = yes && test -e ./message && test -w "$STATE_DIRECTORY" || exit 3
test "$(cat /tmp/ready)" = "$(id -u) $PORT" && exec 3<>"/dev/tcp/127.0.0.1/$PORT""#;
    shop.web()["env"] = json!([{"name": "MARK", "value": "yes"}]);
    shop.web()["readinessProbe"] =
        json!({"exec": {"command": ["bash", "-c", check]}, "failureThreshold": 100});
    shop.apply().await;
    shop.told("Starting", "bash ended with exit 1: not yet yes")
        .await;
    let (status, _) = shop.space.get(NODE, &shop.host).await.expect("an answer");
    assert_ne!(status, 200, "it has traffic before its probe says so");
    shop.touch("open").await;
    shop.space.ready_at("shop", &shop.repository.commit).await;
    assert_eq!(
        shop.space.get(NODE, &shop.host).await,
        Ok((200, "one".into()))
    );
    shop.no_probe_is_left().await;
}

#[tokio::test]
async fn a_command_that_hangs_is_ended_at_its_timeout_and_nothing_of_it_is_left() {
    let mut shop = Shop::new("hang", "").await;
    let hang = "trap '' TERM; echo I hang; sleep 4321 & wait";
    shop.web()["readinessProbe"] =
        json!({"exec": {"command": ["sh", "-c", hang]}, "failureThreshold": 2});
    shop.apply().await;
    shop.stalled("ProbeFailed", "sh did not end within 1 s and was ended")
        .await;
    shop.no_probe_is_left().await;
    let left = shop
        .space
        .on(NODE, &["sh", "-c", "pgrep -af '[s]leep 4321' || true"])
        .await;
    assert_eq!(left, "", "the command's child runs on");
}

#[tokio::test]
async fn a_command_that_is_not_there_is_named_as_such() {
    let mut shop = Shop::new("none", "").await;
    shop.web()["readinessProbe"] = json!({
        "exec": {"command": ["no-such-check"]},
        "periodSeconds": PATIENT, "timeoutSeconds": PATIENT, "failureThreshold": 1,
    });
    shop.apply().await;
    shop.stalled("ProbeFailed", "no-such-check was not found (exit 127)")
        .await;
}

#[tokio::test]
async fn a_process_that_hangs_is_restarted_alone_and_serves_again() {
    // Hangs, SIGTERM included, from when a file is there.
    let prelude = r#"
import os, threading, time
hang = os.environ["STATE_DIRECTORY"] + "/hang"
if os.path.exists(hang): os.remove(hang)
import http.server
class Hanging(http.server.BaseHTTPRequestHandler):
    def handle_one_request(self):
        while os.path.exists(hang): time.sleep(0.1)
        super().handle_one_request()
http.server.BaseHTTPRequestHandler = Hanging
"#;
    let mut shop = Shop::new("alive", prelude).await;
    shop.web()["livenessProbe"] =
        json!({"httpGet": {"path": "/"}, "periodSeconds": 1, "failureThreshold": 2});
    shop.web()["terminationGracePeriodSeconds"] = json!(1);
    let worker = json!({"name": "worker", "command": ["sleep", "100000"]});
    shop.manifest["spec"]["processes"]
        .as_array_mut()
        .expect("processes")
        .push(worker);
    shop.apply().await;
    shop.space.ready_at("shop", &shop.repository.commit).await;
    let (web, worker) = (
        shop.property("web", "MainPID").await,
        shop.property("worker", "MainPID").await,
    );
    shop.touch("hang").await;
    shop.told(
        "ProbeFailed",
        "process web is not alive and is restarted, after each time later: its livenessProbe failed: no answer",
    )
    .await;
    // The agent's own word: the Deployment may still be Ready from before.
    shop.space
        .release_until("shop", NODE, "Ready again", DEPLOY_LIMIT, |r| {
            is(
                &r.status.clone().unwrap_or_default().conditions,
                "Ready",
                "True",
            )
        })
        .await;
    shop.space.ready_at("shop", &shop.repository.commit).await;
    assert_eq!(
        shop.space.get(NODE, &shop.host).await,
        Ok((200, "one".into()))
    );
    assert_ne!(shop.property("web", "MainPID").await, web);
    assert_eq!(shop.property("web", "NRestarts").await, "1");
    assert_eq!(
        shop.property("worker", "MainPID").await,
        worker,
        "the other process was restarted"
    );
}

#[tokio::test]
async fn a_liveness_probe_that_always_fails_restarts_ever_later_and_the_deployment_says_so() {
    let mut shop = Shop::new("dead", "").await;
    shop.web()["livenessProbe"] = json!({
        "exec": {"command": ["sh", "-c", "echo cannot tell; exit 4"]},
        "initialDelaySeconds": 6,
        "periodSeconds": PATIENT, "timeoutSeconds": PATIENT, "failureThreshold": 1,
    });
    shop.apply().await;
    shop.space.ready_at("shop", &shop.repository.commit).await;
    let deployment = shop
        .space
        .deployment_until("shop", "not Ready for its crash loop", DEPLOY_LIMIT, |d| {
            let conditions = d.status.clone().unwrap_or_default().conditions;
            conditions
                .iter()
                .any(|c| c.type_ == "Ready" && c.message.contains("restarted 3 times"))
        })
        .await;
    let conditions = deployment.status.expect("a status").conditions;
    let ready = conditions
        .iter()
        .find(|c| c.type_ == "Ready")
        .expect("Ready");
    assert!(
        ready.status == "False"
            && ready
                .message
                .contains("its livenessProbe failed: sh ended with exit 4: cannot tell"),
        "{ready:?}"
    );
    assert!(
        shop.told("CrashLooping", "restarted 3 times")
            .await
            .status
            .is_some(),
        "the node says why"
    );
    let log = shop
        .space
        .testbed
        .logs("agent/n1".parse().expect("a part"))
        .expect("the agent's log");
    let restarts: Vec<jiff::Timestamp> = log
        .lines()
        .filter(|line| line.contains("that is not alive") && line.contains(&shop.space.namespace))
        .filter_map(|line| line.split(['"', ' ']).find_map(|word| word.parse().ok()))
        .collect();
    assert_eq!(restarts.len(), 3, "each restart has its line in the log");
    // Without a pause each would come as soon after the last as the probe fails.
    let pauses = [1, 2].map(|at| restarts[at].duration_since(restarts[at - 1]).as_secs());
    assert!(pauses[0] >= 10 && pauses[1] >= 20, "{pauses:?}");
}

#[tokio::test]
async fn what_is_not_alive_before_it_is_committed_never_is() {
    let mut shop = Shop::new("bake", "").await;
    shop.web()["livenessProbe"] = json!({
        "exec": {"command": ["false"]},
        "periodSeconds": PATIENT, "timeoutSeconds": PATIENT, "failureThreshold": 1,
    });
    shop.apply().await;
    shop.stalled(
        "CrashLooping",
        "its livenessProbe failed: false ended with exit 1",
    )
    .await;
}

/// Says READY=1, when told to.
const NOTIFY: &str = r#"
import os, socket, time
while not os.path.exists(os.environ["STATE_DIRECTORY"] + "/go"): time.sleep(0.1)
address = os.environ["NOTIFY_SOCKET"]
address = "\0" + address[1:] if address[0] == "@" else address
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", address)
"#;

#[tokio::test]
async fn a_process_of_type_notify_gets_traffic_when_it_says_that_it_is_ready() {
    let mut shop = Shop::new("notify", NOTIFY).await;
    shop.web()["type"] = json!("Notify");
    shop.web()["readinessProbe"]["failureThreshold"] = json!(100);
    shop.apply().await;
    shop.told("Starting", "process web has not said READY=1 yet")
        .await;
    shop.touch("go").await;
    shop.space.ready_at("shop", &shop.repository.commit).await;
    assert_eq!(
        shop.space.get(NODE, &shop.host).await,
        Ok((200, "one".into()))
    );
}

#[tokio::test]
async fn a_process_of_type_notify_that_never_says_so_is_a_failed_start() {
    let mut shop = Shop::new("silent", NOTIFY).await;
    shop.web()["type"] = json!("Notify");
    shop.web()["readinessProbe"]["failureThreshold"] = json!(3);
    shop.apply().await;
    shop.stalled("StartFailed", "did not say READY=1 in time: call sd_notify")
        .await;
}

#[tokio::test]
async fn a_process_that_takes_more_memory_than_its_limit_is_told_so() {
    let mut shop = Shop::new(
        "memory",
        "kept = bytearray(os.urandom(1)) * (200 << 20) if (os := __import__('os')) else 0",
    )
    .await;
    shop.web()["resources"] = json!({"limits": {"memory": "64Mi"}});
    shop.apply().await;
    shop.stalled("ExceededMemory", "raise its resources.limits.memory")
        .await;
}

#[tokio::test]
async fn a_process_cannot_start_more_tasks_than_its_limit() {
    let prelude = r#"
import subprocess, sys
try:
    children = [subprocess.Popen(["sleep", "1000"]) for _ in range(40)]
except OSError as error:
    sys.exit("no more tasks: %s" % error)
"#;
    let mut shop = Shop::new("tasks", prelude).await;
    shop.web()["resources"] = json!({"limits": {"tasks": 20}});
    shop.apply().await;
    shop.stalled("StartFailed", "exit 1").await;
    shop.web()["resources"] = json!({"limits": {"tasks": 60}});
    shop.apply().await;
    shop.space.ready_at("shop", &shop.repository.commit).await;
}
