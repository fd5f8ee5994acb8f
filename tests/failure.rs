//! What fails before it is committed harms nothing: the old release goes on serving, the rollout stops, and
//! the status says what happened and what to do.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kari::api::Deployment;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use support::traffic::Traffic;
use support::{DEPLOY_LIMIT, LIMIT, Lab, Space, app, folder, is, reason};
use testbed::Repository;

/// A Deployment that serves "one" on both nodes, about to be given something that fails.
struct Victim {
    space: Space,
    host: String,
    manifest: Value,
    files: tempfile::TempDir,
    first: Repository,
}

impl Victim {
    async fn new(topic: &str) -> Self {
        let space = Space::new(support::testbed(2).await, topic).await;
        let host = format!("{topic}.example.com");
        let files = folder(&app::files("one"));
        let first = space.push("shop", files.path());
        let manifest = app::manifest("shop", &first.url, &host);
        space.apply(&manifest).await;
        space.ready_at("shop", &first.commit).await;
        Self {
            space,
            host,
            manifest,
            files,
            first,
        }
    }

    /// Pushes a commit and has it looked at.
    async fn push(&self, files: &[(&str, &str)]) -> Repository {
        support::write(self.files.path(), files);
        let repository = self.space.push("shop", self.files.path());
        self.space.request_look("shop").await;
        repository
    }

    /// Waits until the rollout has stopped for `why`, and checks that nobody was harmed.
    async fn stopped(&self, why: &str, in_message: &str) -> Deployment {
        let deployment = self
            .space
            .deployment_until("shop", &format!("Stalled for {why}"), DEPLOY_LIMIT, |d| {
                let status = d.status.clone().unwrap_or_default();
                is(&status.conditions, "Stalled", "True")
                    && reason(&status.conditions, "Stalled") == why
                    && status.active.is_empty()
            })
            .await;
        let status = deployment.status.clone().expect("a status");
        let message = status
            .conditions
            .iter()
            .find(|c| c.type_ == "Stalled")
            .expect("Stalled")
            .message
            .clone();
        assert!(
            message.contains("n1") && message.contains(in_message),
            "{why}: {message}"
        );
        assert_eq!(status.blocked_revisions.len(), 1);
        assert_eq!(status.blocked_revisions[0].reason, why);
        for node in ["n1", "n2"] {
            assert_eq!(
                self.space.get(node, &self.host).await,
                Ok((200, "one".into())),
                "{why}: {node} does not serve the old release"
            );
        }
        // The failed node stopped the rollout: the second was never told of the revision.
        let untouched = self
            .space
            .release_until("shop", "n2", "seen", LIMIT, |_| true)
            .await;
        assert_eq!(untouched.spec.commit, self.first.commit, "{why}");
        deployment
    }

    /// The app's units on the first node, steps included.
    async fn units(&self) -> String {
        let pattern = format!("kari*{}.shop*", self.space.namespace);
        self.space
            .on(
                "n1",
                &[
                    "systemctl",
                    "list-units",
                    "--all",
                    "--plain",
                    "--no-legend",
                    &pattern,
                ],
            )
            .await
    }
}

#[tokio::test]
async fn a_failed_build_keeps_the_running_release_and_shows_the_end_of_its_log() {
    let mut victim = Victim::new("build").await;
    victim.manifest = app::with_build(victim.manifest.clone(), "echo this is why >&2; exit 7");
    victim.space.apply(&victim.manifest).await;
    victim.stopped("BuildFailed", "7").await;
    let release = victim
        .space
        .release_until("shop", "n1", "seen", LIMIT, |_| true)
        .await;
    let failure = release
        .status
        .and_then(|s| s.attempt)
        .and_then(|a| a.failure)
        .expect("a failure");
    assert!(
        failure
            .log_tail
            .as_deref()
            .unwrap_or_default()
            .contains("this is why"),
        "{failure:?}"
    );
    let units = victim.units().await;
    assert_eq!(
        units.matches(".service").count(),
        1,
        "more than the old service is left: {units}"
    );
}

#[tokio::test]
async fn a_build_that_hangs_is_ended_at_its_deadline() {
    let mut victim = Victim::new("hang").await;
    victim.manifest = app::with_build(
        victim.manifest.clone(),
        "trap '' TERM; while :; do sleep 1; done",
    );
    victim.manifest["spec"]["build"]["timeoutSeconds"] = json!(10);
    victim.space.apply(&victim.manifest).await;
    victim.stopped("BuildTimedOut", "10").await;
}

#[tokio::test]
async fn a_process_that_does_not_become_healthy_never_gets_traffic_and_a_retry_tries_again() {
    let victim = Victim::new("probe").await;
    let mut manifest = victim.manifest.clone();
    manifest["spec"]["processes"][0]["readinessProbe"]["failureThreshold"] = json!(3);
    victim.space.apply(&manifest).await;
    victim.space.ready_at("shop", &victim.first.commit).await;
    victim.push(&[("unhealthy", ""), ("message", "two")]).await;
    victim.stopped("ProbeFailed", "500").await;
    let before = victim
        .space
        .release_until("shop", "n1", "seen", LIMIT, |_| true)
        .await
        .spec
        .attempt;
    victim.space.annotate("shop", "kari.dev/retry").await;
    victim
        .space
        .release_until("shop", "n1", "tried again", LIMIT, |r| {
            r.spec.attempt > before
        })
        .await;
    victim.stopped("ProbeFailed", "500").await;
    // What mends it is a new commit.
    std::fs::remove_file(victim.files.path().join("unhealthy")).expect("a file");
    let mended = victim.push(&[("message", "three")]).await;
    victim.space.ready_at("shop", &mended.commit).await;
    assert_eq!(
        victim.space.get("n2", &victim.host).await,
        Ok((200, "three".into()))
    );
}

#[tokio::test]
async fn a_process_that_ends_at_once_is_a_failed_start() {
    let victim = Victim::new("start").await;
    victim
        .push(&[("server.py", "import sys; sys.exit('no such setting')")])
        .await;
    victim.stopped("StartFailed", "exit 1").await;
}

#[tokio::test]
async fn a_command_that_is_not_there_is_named() {
    let victim = Victim::new("command").await;
    let mut manifest = victim.manifest.clone();
    manifest["spec"]["processes"][0]["command"] = json!(["no-such-program"]);
    victim.space.apply(&manifest).await;
    victim.stopped("StartFailed", "no-such-program").await;
}

#[tokio::test]
async fn a_directory_that_the_commit_does_not_have_is_named() {
    let victim = Victim::new("folder").await;
    let mut manifest = victim.manifest.clone();
    manifest["spec"]["source"]["git"]["directory"] = json!("services/none");
    victim.space.apply(&manifest).await;
    victim.stopped("DirectoryNotFound", "services/none").await;
}

/// What an administrator says of the namespace: its sandbox level and its host names. Others may do what they could.
async fn administrator_says(space: &Space, level: &str, hosts: &str) {
    let labels = json!({"metadata": {"labels": {"kari.dev/sandbox": level}}});
    let namespaces: Api<Namespace> = Api::all(space.client.clone());
    namespaces
        .patch(
            &space.namespace,
            &PatchParams::default(),
            &Patch::Merge(&labels),
        )
        .await
        .expect("a label");
    let key = |what: &str| format!("{}.{what}", space.namespace);
    let tenants = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kari-tenants"},
        "data": {"_others.nodes": "*", "_others.hosts": "*", key("nodes"): "*", key("hosts"): hosts},
    });
    let maps: Api<ConfigMap> = Api::namespaced(space.client.clone(), "kari-system");
    let parameters = PatchParams::apply("administrator").force();
    maps.patch("kari-tenants", &parameters, &Patch::Apply(&tenants))
        .await
        .expect("the ConfigMap");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_administrator_forbids_afterwards_goes_on_serving_and_gets_nothing_new() {
    let mut victim = Victim::new("forbidden").await;
    let sandbox = json!({"capabilities": ["CAP_NET_BIND_SERVICE"]});
    victim.manifest["spec"]["processes"][0]["sandbox"] = sandbox;
    victim.space.apply(&victim.manifest).await;
    let (space, host) = (&victim.space, &victim.host);
    space.ready_at("shop", &victim.first.commit).await;
    let traffic = Traffic::start(Lab(space.testbed), space.proxy("n1"), host, 20, 2);
    let denied = async |why: &str| {
        space
            .deployment_until("shop", &format!("denied: {why}"), DEPLOY_LIMIT, |d| {
                let conditions = d.status.clone().unwrap_or_default().conditions;
                let stalled = conditions.iter().find(|c| c.type_ == "Stalled");
                reason(&conditions, "Stalled") == "PolicyDenied"
                    && reason(&conditions, "Ready") == "PolicyDenied"
                    && stalled.is_some_and(|c| c.message.contains(why))
            })
            .await
    };

    // Nobody asks for a look, and nobody writes the spec.
    administrator_says(space, "restricted", "forbidden.example.com").await;
    denied("kari.dev/sandbox").await;
    administrator_says(space, "baseline", "other.example.com").await;
    denied("may not route forbidden.example.com").await;
    // It can be annotated all the same, and what is new is seen and not rolled out.
    let second = victim.push(&[("message", "two")]).await;
    let wanted = space.deployments().get("shop").await.expect("it").metadata;
    let asked = wanted.annotations.unwrap_or_default()["kari.dev/requestedAt"].clone();
    let looked = space
        .deployment_until("shop", "looked at", LIMIT, |d| {
            let handled = d.status.clone().unwrap_or_default().last_handled;
            handled.and_then(|handled| handled.requested_at).as_ref() == Some(&asked)
        })
        .await;
    let status = looked.status.expect("a status");
    assert_eq!(reason(&status.conditions, "Stalled"), "PolicyDenied");
    assert_eq!(status.source.expect("a source").commit, victim.first.commit);
    for node in ["n1", "n2"] {
        assert_eq!(
            space.get(node, host).await,
            Ok((200, "one".into())),
            "{node}"
        );
    }

    administrator_says(space, "baseline", "forbidden.example.com").await;
    space.ready_at("shop", &second.commit).await;
    let tally = traffic.stop().await;
    assert_eq!(tally.failed, Vec::<String>::new());
    assert!(tally.good > 0 && tally.bodies.len() == 2, "{tally:?}");
}
