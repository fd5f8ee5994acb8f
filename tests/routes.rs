//! Which requests reach which process: by host name and by path, within one Deployment and between two.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use kube::api::DeleteParams;
use serde_json::{Value, json};
use support::{DEPLOY_LIMIT, LIMIT, Lab, Space, app, folder, until};

const NODE: &str = "n1";

async fn space(topic: &str) -> Space {
    Space::new(support::testbed(1).await, topic).await
}

/// The files of an app of several processes: each is a server that says what is in a file of its own.
fn servers(processes: &[&str], revision: &str) -> Vec<(String, String)> {
    let files = processes.iter().flat_map(|process| {
        let server = app::SERVER.replace("\"message\"", &format!("\"{process}.message\""));
        [
            (format!("{process}.py"), server),
            (
                format!("{process}.message"),
                format!("{process} {revision}"),
            ),
        ]
    });
    files.collect()
}

fn as_text(files: &[(String, String)]) -> Vec<(&str, &str)> {
    files
        .iter()
        .map(|(name, content)| (name.as_str(), content.as_str()))
        .collect()
}

/// A process of such an app.
fn process(manifest: &Value, name: &str, route: Value) -> Value {
    let mut process = manifest["spec"]["processes"][0].clone();
    process["name"] = json!(name);
    process["command"] = json!(["python3", format!("{name}.py")]);
    process["route"] = route;
    process
}

/// Asserts what each path of each host is answered with.
async fn answers(space: &Space, expected: &[(&str, &str, u16, &str)]) {
    let lab = Lab(space.testbed);
    for (host, path, status, body) in expected {
        let answer = support::traffic::get_once(&lab, space.proxy(NODE), host, path)
            .await
            .unwrap_or_else(|e| panic!("{host}{path}: {e}"));
        assert!(
            answer.0 == *status && answer.1.starts_with(body),
            "{host}{path} is answered with {answer:?}, not with {status} {body:?}"
        );
    }
}

#[tokio::test]
async fn processes_of_one_deployment_share_a_host_by_path_and_switch_together() {
    const NAMES: [&str; 3] = ["site", "api", "next"];
    let space = space("paths").await;
    let first = servers(&NAMES, "one");
    let files = folder(&as_text(&first));
    let repository = space.push("shop", files.path());
    let mut manifest = app::manifest("shop", &repository.url, "paths.example.com");
    manifest["spec"]["processes"] = json!([
        process(&manifest, "site", json!({"hosts": ["paths.example.com"]})),
        process(
            &manifest,
            "api",
            json!({"hosts": ["paths.example.com", "api.example.com"], "path": "/api"})
        ),
        process(
            &manifest,
            "next",
            json!({"hosts": ["paths.example.com"], "path": "/api/next"})
        ),
    ]);
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    answers(
        &space,
        &[
            ("paths.example.com", "/", 200, "site one"),
            ("paths.example.com", "/about", 200, "site one"),
            ("paths.example.com", "/apix", 200, "site one"),
            ("paths.example.com", "/api", 200, "api one"),
            ("paths.example.com", "/api/", 200, "api one"),
            ("paths.example.com", "/api/items?page=2", 200, "api one"),
            ("paths.example.com", "/api/nextx", 200, "api one"),
            ("paths.example.com", "/api/next", 200, "next one"),
            ("paths.example.com", "/api/next/1", 200, "next one"),
            // No process of this host has `/`, and `next` is not at this host.
            ("api.example.com", "/api/next", 200, "api one"),
            ("api.example.com", "/", 404, "no process"),
            ("api.example.com", "/apix", 404, "no process"),
        ],
    )
    .await;

    support::write(files.path(), &as_text(&servers(&NAMES, "two")));
    let second = space.push("shop", files.path());
    space.request_look("shop").await;
    space.ready_at("shop", &second.commit).await;
    answers(
        &space,
        &[
            ("paths.example.com", "/", 200, "site two"),
            ("paths.example.com", "/api/items", 200, "api two"),
            ("paths.example.com", "/api/next", 200, "next two"),
            ("api.example.com", "/api", 200, "api two"),
            ("api.example.com", "/", 404, "no process"),
        ],
    )
    .await;
}

#[tokio::test]
async fn one_host_name_belongs_to_one_deployment_of_a_node_until_it_is_given_up() {
    let space = space("host").await;
    let files = folder(&app::files("first"));
    let repository = space.push("shop", files.path());
    space
        .apply(&app::manifest("first", &repository.url, "host.example.com"))
        .await;
    space.ready_at("first", &repository.commit).await;
    // Another path of it is as little to be had: who has a host has all of it.
    let mut manifest = app::manifest("second", &repository.url, "host.example.com");
    manifest["spec"]["env"] = json!([{"name": "MESSAGE", "value": "second"}]);
    manifest["spec"]["processes"][0]["route"]["path"] = json!("/second");
    space.apply(&manifest).await;
    let told = space
        .release_until("second", NODE, "told of the conflict", LIMIT, |r| {
            r.status
                .as_ref()
                .and_then(|s| s.attempt.as_ref())
                .and_then(|a| a.failure.as_ref())
                .is_some_and(|f| f.reason == "RouteConflict")
        })
        .await;
    let message = told
        .status
        .and_then(|s| s.attempt)
        .and_then(|a| a.failure)
        .expect("a failure")
        .message;
    let holder = format!("{}/first", space.namespace);
    assert!(
        message.contains("host.example.com") && message.contains(&holder),
        "{message}"
    );
    answers(&space, &[("host.example.com", "/second", 200, "first")]).await;

    space
        .deployments()
        .delete("first", &DeleteParams::default())
        .await
        .expect("a deletion");
    space.ready_at("second", &repository.commit).await;
    answers(
        &space,
        &[
            ("host.example.com", "/second", 200, "second"),
            ("host.example.com", "/", 404, "no process"),
        ],
    )
    .await;
    until("the first one is gone", DEPLOY_LIMIT, || async {
        match space.deployments().get_opt("first").await {
            Ok(None) => Ok(()),
            other => Err(support::text_of(&other.ok().flatten())),
        }
    })
    .await;
}
