//! Nodes come, go, are cordoned, lose their agent and come back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use k8s_openapi::api::core::v1::Node;
use kari::api::Release;
use kari::api::names::{NodeName, release_name};
use kube::api::{Api, DeleteParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Resource as _, ResourceExt as _};
use serde_json::{Value, json};
use support::snapshot::{self, difference};
use support::{LIMIT, Space, app, folder, is, until};

async fn patch_node(space: &Space, name: &str, patch: Value) {
    let nodes: Api<Node> = Api::all(space.client.clone());
    nodes
        .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .unwrap_or_else(|e| panic!("patch {name}: {e}"));
}

/// Puts the label on a node that the test's placement asks for, or takes it off.
async fn label(space: &Space, node: &str, is_in: bool) {
    let value = if is_in { json!("in") } else { Value::Null };
    let patch = json!({"metadata": {"labels": {(space.namespace.clone()): value}}});
    patch_node(space, node, patch).await;
}

fn placed(space: &Space, mut manifest: Value) -> Value {
    manifest["spec"]["placement"]["nodeSelector"] = json!({(space.namespace.clone()): "in"});
    manifest
}

async fn release(space: &Space, name: &str, node: &str) -> Option<Release> {
    let name = release_name(name, &NodeName::new(node));
    space.releases().get_opt(&name).await.expect("the Releases")
}

async fn release_is_gone(space: &Space, name: &str, node: &str) {
    until(
        &format!("the Release of {name} on {node} is gone"),
        LIMIT,
        || async {
            match release(space, name, node).await {
                None => Ok(()),
                Some(release) => Err(support::text_of(&release)),
            }
        },
    )
    .await;
}

/// What is in the app's folder on a node, by name.
async fn files_of(space: &Space, node: &str, name: &str) -> String {
    let script = format!(
        "cd /var/lib/kari/apps/{}.{name} 2>/dev/null && find . -type f -o -name web | sort | tr '\\n' ' '",
        space.namespace
    );
    space
        .on(node, &["sh", "-c", &format!("{script} || true")])
        .await
}

/// The node is, or soon is, as it was: its agent clears away what is old when it has the time.
async fn host_is(space: &Space, node: &str, before: &[String]) {
    until(&format!("{node} is as it was"), LIMIT, || async {
        match difference(before, &snapshot::without_logs(space, node).await) {
            difference if difference.is_empty() => Ok(()),
            difference => Err(difference),
        }
    })
    .await;
}

async fn services_of(space: &Space, node: &str, name: &str) -> String {
    let pattern = format!("kari.{}.{name}.*.service", space.namespace);
    let properties = "Id,MainPID,InvocationID";
    space
        .on(node, &["systemctl", "show", "-p", properties, &pattern])
        .await
}

async fn delete(space: &Space, name: &str) {
    let deployments = space.deployments();
    let deleted = deployments.delete(name, &DeleteParams::background()).await;
    deleted.expect("deleted");
}

async fn kill_agent(space: &Space, node: &str) {
    let part = format!("agent/{node}").parse().expect("a part");
    let killed = space.testbed.kill(part, testbed::Signal::KILL).await;
    killed.unwrap_or_else(|e| panic!("{e}"));
}

async fn start_agent(space: &Space, node: &str) {
    let part = format!("agent/{node}").parse().expect("a part");
    let started = space.testbed.start(part).await;
    started.unwrap_or_else(|e| panic!("{e}"));
}

#[tokio::test]
async fn a_node_that_leaves_the_placement_keeps_its_state_for_its_return_and_for_nobody_else() {
    let space = Space::new(support::testbed(3).await, "leave").await;
    let node = "n1";
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let mut manifest = placed(
        &space,
        app::manifest("shop", &repository.url, "leave.example.com"),
    );
    manifest["spec"]["processes"][0]["stateDirectory"] = json!(true);
    label(&space, node, true).await;
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    let state = format!("/var/lib/kari/apps/{}.shop/state/web", space.namespace);
    let write = format!("echo kept > {state}/file; chown --reference={state} {state}/file");
    space.on(node, &["sh", "-c", &write]).await;
    let owner = space.on(node, &["stat", "-c", "%u %a", &state]).await;

    // It leaves: everything goes but the state.
    label(&space, node, false).await;
    release_is_gone(&space, "shop", node).await;
    assert_eq!(
        files_of(&space, node, "shop").await.trim(),
        "./kept.json ./state/web ./state/web/file ./users.json"
    );
    assert_eq!(services_of(&space, node, "shop").await.trim(), "");

    // It comes back: the state is there, and its owner's.
    label(&space, node, true).await;
    space.ready_at("shop", &repository.commit).await;
    let kept = space.on(node, &["cat", &format!("{state}/file")]).await;
    assert_eq!(kept.trim(), "kept");
    let after = space.on(node, &["stat", "-c", "%u %a", &state]).await;
    assert_eq!(after, owner);
    let names = files_of(&space, node, "shop").await;
    assert!(!names.contains("kept.json"), "{names}");

    // It leaves again, and the Deployment goes: a new one of its name sees nothing of it.
    label(&space, node, false).await;
    release_is_gone(&space, "shop", node).await;
    delete(&space, "shop").await;
    until("the Deployment is gone", LIMIT, || async {
        match space.deployments().get_opt("shop").await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    label(&space, node, true).await;
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    let names = files_of(&space, node, "shop").await;
    assert!(
        names.contains("./state/web ") && !names.contains("/file"),
        "a stranger's state: {names}"
    );

    // Deleted with the node in its placement nothing stays.
    delete(&space, "shop").await;
    release_is_gone(&space, "shop", node).await;
    assert_eq!(files_of(&space, node, "shop").await, "");
    label(&space, node, false).await;
}

#[tokio::test]
async fn nodes_that_are_cordoned_away_or_gone_hold_nobody_up_and_get_the_newest_when_they_are_back()
{
    let space = Space::new(support::testbed(3).await, "away").await;
    let host = "away.example.com";
    let files = folder(&app::files("one"));
    let first = space.push("shop", files.path());
    for node in ["n1", "n2", "n3"] {
        label(&space, node, true).await;
    }
    let manifest = placed(&space, app::manifest("shop", &first.url, host));
    space.apply(&manifest).await;
    let mut doomed = app::manifest("doomed", &first.url, "doomed.example.com");
    doomed["spec"]["placement"]["nodeSelector"] = json!({"kubernetes.io/hostname": "n3"});
    space.apply(&doomed).await;
    space.ready_at("shop", &first.commit).await;
    space.ready_at("doomed", &first.commit).await;
    let generation = async |node: &str| {
        let release = release(&space, "shop", node).await;
        release.and_then(|r| r.metadata.generation)
    };
    let left_out = async |commit: &str, node: &str, why: &str| {
        let ready = space.ready_at("shop", commit).await;
        let conditions = ready.status.expect("a status").conditions;
        let ready = conditions.iter().find(|c| c.type_ == "Ready");
        let message = ready.map(|c| c.message.clone()).unwrap_or_default();
        assert!(message.contains(&format!("{node} ({why})")), "{message}");
    };

    // Cordoned: not written, and the others go on.
    let of_cordoned = generation("n2").await;
    patch_node(&space, "n2", json!({"spec": {"unschedulable": true}})).await;
    support::write(files.path(), &[("message", "two")]);
    let second = space.push("shop", files.path());
    space.request_look("shop").await;
    left_out(&second.commit, "n2", "NodeCordoned").await;
    assert_eq!(generation("n2").await, of_cordoned);
    assert_eq!(space.get("n2", host).await, Ok((200, "one".into())));
    assert_eq!(space.get("n3", host).await, Ok((200, "two".into())));

    // Without its agent: the same. A Release in deletion waits for it.
    let of_away = generation("n3").await;
    kill_agent(&space, "n3").await;
    delete(&space, "doomed").await;
    space
        .release_until("shop", "n3", "not reachable", LIMIT, |release| {
            let status = release.status.clone().unwrap_or_default();
            is(&status.conditions, "Reachable", "False")
        })
        .await;
    support::write(files.path(), &[("message", "three")]);
    let third = space.push("shop", files.path());
    space.request_look("shop").await;
    left_out(&third.commit, "n3", "AgentUnreachable").await;
    assert_eq!(generation("n3").await, of_away);
    assert_eq!(space.get("n3", host).await, Ok((200, "two".into())));
    let doomed = release(&space, "doomed", "n3").await.expect("it waits");
    assert!(doomed.meta().deletion_timestamp.is_some());
    assert!(
        space
            .deployments()
            .get_opt("doomed")
            .await
            .unwrap()
            .is_none()
    );

    // Both are back: the newest only, and the removal that was waited for.
    patch_node(&space, "n2", json!({"spec": {"unschedulable": null}})).await;
    support::write(files.path(), &[("message", "four")]);
    let fourth = space.push("shop", files.path());
    space.request_look("shop").await;
    left_out(&fourth.commit, "n3", "AgentUnreachable").await;
    assert_eq!(space.get("n2", host).await, Ok((200, "four".into())));
    start_agent(&space, "n3").await;
    let back = space
        .release_until("shop", "n3", "served anew", LIMIT, |release| {
            let serving = release.status.as_ref().and_then(|s| s.serving.as_ref());
            serving.is_some_and(|serving| serving.commit == fourth.commit)
        })
        .await;
    assert_eq!(back.spec.attempt, 3, "one for each commit that it was told");
    release_is_gone(&space, "doomed", "n3").await;
    assert_eq!(files_of(&space, "n3", "doomed").await, "");
    space.ready_at("shop", &fourth.commit).await;

    // Its Node object goes: so does its Release, and the app runs on. It comes back: the app is taken on.
    let running = until("the old service of n3 has drained", LIMIT, || async {
        let services = services_of(&space, "n3", "shop").await;
        let is_one = services.matches("InvocationID").count() == 1;
        if is_one { Ok(services) } else { Err(services) }
    })
    .await;
    let host_before = snapshot::without_logs(&space, "n3").await;
    let nodes: Api<Node> = Api::all(space.client.clone());
    let node = nodes.get("n3").await.expect("the node");
    let deleted = nodes.delete("n3", &DeleteParams::default()).await;
    deleted.expect("deleted");
    release_is_gone(&space, "shop", "n3").await;
    space
        .deployment_until("shop", "Ready on two nodes", LIMIT, |deployment| {
            let status = deployment.status.clone().unwrap_or_default();
            let nodes = status.nodes.unwrap_or_default();
            is(&status.conditions, "Ready", "True") && nodes.summary == "2/2"
        })
        .await;
    assert_eq!(space.get("n3", host).await, Ok((200, "four".into())));
    host_is(&space, "n3", &host_before).await;
    let again = Node {
        metadata: ObjectMeta {
            name: Some("n3".to_owned()),
            labels: Some(node.labels().clone()),
            ..ObjectMeta::default()
        },
        spec: node.spec.clone(),
        status: None,
    };
    let created = nodes.create(&PostParams::default(), &again).await;
    created.expect("created");
    space
        .deployment_until("shop", "Ready on three nodes", LIMIT, |deployment| {
            let status = deployment.status.clone().unwrap_or_default();
            let nodes = status.nodes.unwrap_or_default();
            is(&status.conditions, "Ready", "True") && nodes.summary == "3/3"
        })
        .await;
    assert_eq!(
        services_of(&space, "n3", "shop").await,
        running,
        "restarted when its node came back"
    );
    host_is(&space, "n3", &host_before).await;
}
