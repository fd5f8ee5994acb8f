//! What Deployments refer to: ConfigMaps and ranges of versions.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use support::{DEPLOY_LIMIT, LIMIT, Space, app, folder, is, reason, until};

const NODE: &str = "n1";

async fn space(topic: &str) -> Space {
    Space::new(support::testbed(1).await, topic).await
}

async fn config_map(space: &Space, name: &str, data: Value) {
    let api: Api<ConfigMap> = Api::namespaced(space.client.clone(), &space.namespace);
    let manifest =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data});
    api.patch(
        name,
        &PatchParams::apply("test").force(),
        &Patch::Apply(&manifest),
    )
    .await
    .unwrap_or_else(|e| panic!("ConfigMap {name}: {e}"));
}

fn reference(variable: &str, key: &str) -> Value {
    json!({"name": variable, "valueFrom": {"configMapKeyRef": {"name": "shop", "key": key}}})
}

async fn answers(space: &Space, host: &str, expected: &str) {
    until(&format!("{host} says {expected}"), DEPLOY_LIMIT, || async {
        match space.get(NODE, host).await {
            Ok((200, body)) if body == expected => Ok(()),
            other => Err(other),
        }
    })
    .await;
}

/// Answers what it was built from and which variables it has.
const SERVE: &str = r#"
export MESSAGE="$(cat built) $A $B $C $D"
exec python3 server.py
"#;

#[tokio::test]
async fn a_changed_config_map_restarts_and_builds_again_only_if_the_build_sees_it() {
    let space = space("configmap").await;
    let files = folder(&app::files("unused"));
    support::write(files.path(), &[("serve.sh", SERVE)]);
    let repository = space.push("shop", files.path());
    let data = |d: &str, seen: &str| json!({"A": "map", "B": "map", "C": "map", "d": d, "seen": seen, "no.name": "x"});
    config_map(&space, "shop", data("one", "1")).await;
    let host = "configmap.example.com";
    let mut manifest = app::with_build(
        app::manifest("shop", &repository.url, host),
        "echo \"$SEEN-$(cat /proc/sys/kernel/random/uuid)\" > built",
    );
    manifest["spec"]["build"]["env"] = json!([reference("SEEN", "seen")]);
    manifest["spec"]["envFrom"] = json!([{"configMapRef": {"name": "shop"}}]);
    manifest["spec"]["env"] =
        json!([{"name": "B", "value": "env"}, {"name": "C", "value": "env"}, reference("D", "d")]);
    manifest["spec"]["processes"][0]["env"] = json!([{"name": "C", "value": "process"}]);
    manifest["spec"]["processes"][0]["command"] = json!(["sh", "serve.sh"]);
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    let (_, body) = space.get(NODE, host).await.expect("an answer");
    let (built, rest) = body.split_once(' ').expect("words");
    assert!(
        built.starts_with("1-"),
        "the build does not see its reference: {body}"
    );
    assert_eq!(
        rest, "map env process one",
        "the last of envFrom, env and process env wins"
    );

    config_map(&space, "shop", data("two", "1")).await;
    space.request_look("shop").await;
    answers(&space, host, &format!("{built} map env process two")).await;
    space.ready_at("shop", &repository.commit).await;

    config_map(&space, "shop", data("two", "2")).await;
    space.request_look("shop").await;
    until(
        "the build that sees the key runs again",
        DEPLOY_LIMIT,
        || async {
            match space.get(NODE, host).await {
                Ok((200, body)) if body.starts_with("2-") => Ok(()),
                other => Err(other),
            }
        },
    )
    .await;
}

#[tokio::test]
async fn a_missing_key_keeps_what_serves_and_is_healed_when_it_appears() {
    let space = space("missing").await;
    let files = folder(&app::files("unused"));
    let repository = space.push("shop", files.path());
    let host = "missing.example.com";
    let mut manifest = app::manifest("shop", &repository.url, host);
    manifest["spec"]["env"] = json!([{"name": "MESSAGE", "value": "plain"}]);
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    config_map(&space, "shop", json!({"other": "x"})).await;
    manifest["spec"]["processes"][0]["env"] = json!([reference("MESSAGE", "message")]);
    space.apply(&manifest).await;
    let stalled = space
        .deployment_until("shop", "ReferenceNotFound", LIMIT, |d| {
            let status = d.status.clone().unwrap_or_default();
            reason(&status.conditions, "Stalled") == "ReferenceNotFound"
                && is(&status.conditions, "Ready", "False")
        })
        .await;
    let conditions = stalled.status.expect("a status").conditions;
    let message = &conditions
        .iter()
        .find(|c| c.type_ == "Ready")
        .expect("Ready")
        .message;
    assert!(
        message.contains("env[MESSAGE]: the ConfigMap shop has no key message"),
        "{message}"
    );
    assert_eq!(space.get(NODE, host).await, Ok((200, "plain".into())));
    // Nobody asks for a look.
    config_map(&space, "shop", json!({"message": "healed <&>"})).await;
    answers(&space, host, "healed <&>").await;
    space.ready_at("shop", &repository.commit).await;
}

#[tokio::test]
async fn a_range_of_versions_follows_its_highest_tag() {
    let space = space("semver").await;
    let files = folder(&app::files("one"));
    let first = space.push("shop", files.path());
    space.tag("shop", "v1.9.0");
    support::write(files.path(), &[("message", "two")]);
    space.push("shop", files.path());
    space.tag("shop", "v2.0.0");
    let mut manifest = app::manifest("shop", &first.url, "semver.example.com");
    manifest["spec"]["source"]["git"]["ref"] = json!({"semver": "1.x"});
    space.apply(&manifest).await;
    let deployment = space.ready_at("shop", &first.commit).await;
    let source = deployment.status.and_then(|s| s.source).expect("a source");
    assert_eq!(source.reference, "refs/tags/v1.9.0");
    support::write(files.path(), &[("message", "three")]);
    let third = space.push("shop", files.path());
    space.tag("shop", "1.10.0");
    space.request_look("shop").await;
    space.ready_at("shop", &third.commit).await;
    assert_eq!(
        space.get(NODE, "semver.example.com").await,
        Ok((200, "three".into()))
    );
    manifest["spec"]["source"]["git"]["ref"] = json!({"semver": "^7"});
    space.apply(&manifest).await;
    let stalled = space
        .deployment_until("shop", "RefNotFound", LIMIT, |d| {
            let status = d.status.clone().unwrap_or_default();
            reason(&status.conditions, "Stalled") == "RefNotFound"
        })
        .await;
    let conditions = stalled.status.expect("a status").conditions;
    let message = &conditions
        .iter()
        .find(|c| c.type_ == "Stalled")
        .expect("Stalled")
        .message;
    assert!(
        message.contains("none of its 3 tags") && message.contains("\"^7\""),
        "{message}"
    );
    assert_eq!(
        space.get(NODE, "semver.example.com").await,
        Ok((200, "three".into()))
    );
}
