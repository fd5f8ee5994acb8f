//! Who may do what: tables of what a thief and a tenant try with a real token,
//! and of what the API server answers. docs/security.md has both, compared here.
//!
//! The testbed runs no agent and no controller: nothing stands in the way but
//! RBAC, the admission policies and the schema.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod tenant;
mod thief;

#[path = "../support/mod.rs"]
mod support;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use http_body_util::BodyExt as _;
use hyper::Request;
use k8s_openapi::api::core::v1::ServiceAccount;
use kari::api::Release;
use kari::api::names::{NodeName, release_name};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt as _};
use serde_json::{Value, json};
use support::Space;
use testbed::{Options, Testbed};

/// Kari's own namespace in a testbed.
const SYSTEM: &str = "kari-system";

async fn testbed() -> &'static Testbed {
    support::testbed_of(Options {
        nodes: 2,
        kari: false,
        ..Options::default()
    })
    .await
}

/// A client with a token and nothing else.
async fn client_with(testbed: &Testbed, token: &str) -> Client {
    let mut kubeconfig = Kubeconfig::read_from(testbed.kubeconfig()).expect("a kubeconfig");
    for user in &mut kubeconfig.auth_infos {
        let token = serde_json::from_value(json!({"token": token}));
        user.auth_info = Some(token.expect("a user"));
    }
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
    Client::try_from(config.expect("a configuration")).expect("a client")
}

/// The token that the testbed gave to the agent of a node.
async fn agent_client(testbed: &Testbed, node: &str) -> Client {
    let path = format!("nodes/{node}/credentials/token");
    let token = std::fs::read_to_string(testbed.directory().join(path)).expect("a token");
    client_with(testbed, token.trim()).await
}

/// What the API server answers to one request.
struct Answer {
    code: u16,
    /// Why not; empty on success.
    message: String,
}

async fn ask(client: &Client, attempt: &Attempt) -> Answer {
    let (method, path) = attempt
        .request
        .split_once(' ')
        .expect("a method and a path");
    let (method, kind) = match method {
        "APPLY" => ("PATCH", "application/apply-patch+yaml"),
        "MERGE" => ("PATCH", "application/merge-patch+json"),
        "JSON" => ("PATCH", "application/json-patch+json"),
        other => (other, "application/json"),
    };
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("Content-Type", kind);
    if let Some(user) = attempt.as_user {
        request = request.header("Impersonate-User", user);
    }
    let body = match &attempt.body {
        Value::Null => Vec::new(),
        body => body.to_string().into_bytes(),
    };
    let request = request.body(Body::from(body)).expect("a request");
    let response = client.send(request).await.expect("an answer");
    let code = response.status().as_u16();
    let body = response
        .into_body()
        .collect()
        .await
        .expect("a body")
        .to_bytes();
    let message = if code < 300 {
        String::new()
    } else {
        let status: Value = serde_json::from_slice(&body).unwrap_or_default();
        status["message"].as_str().unwrap_or_default().to_owned()
    };
    Answer { code, message }
}

/// One line of a table.
struct Attempt {
    /// For people.
    what: &'static str,
    /// `METHOD path`; APPLY, MERGE and JSON are kinds of PATCH.
    request: String,
    body: Value,
    as_user: Option<&'static str>,
    /// The status that must come back, and a part of the message.
    code: u16,
    says: &'static str,
}

fn attempt(
    what: &'static str,
    request: String,
    body: Value,
    code: u16,
    says: &'static str,
) -> Attempt {
    Attempt {
        what,
        request,
        body,
        as_user: None,
        code,
        says,
    }
}

/// Makes every attempt and returns the table for the page, in which the test's
/// namespace is called `web`.
async fn try_all(client: &Client, namespace: &str, attempts: &[Attempt]) -> String {
    let mut table = String::from("| tried | came back |\n| --- | --- |\n");
    let mut wrong = String::new();
    for attempt in attempts {
        let Answer { code, message } = ask(client, attempt).await;
        if code != attempt.code
            || !message.contains(attempt.says)
            || (code >= 300) == attempt.says.is_empty()
        {
            let _ = writeln!(
                wrong,
                "{}: {}: {code} {message:?} instead of {} {:?}",
                attempt.what, attempt.request, attempt.code, attempt.says
            );
        }
        let answer = match brief(&message.replace(namespace, "web")) {
            message if message.is_empty() => code.to_string(),
            message => format!("{code} {message}"),
        };
        let _ = writeln!(table, "| {} | {answer} |", attempt.what);
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    table
}

/// A message for a cell of the page: without who asked, and who refused in one word.
fn brief(message: &str) -> String {
    let message = message
        .split_once(" is forbidden: ")
        .map_or(message, |(_, rest)| rest);
    let message = match message.split_once("\" cannot ") {
        Some((user, rest)) if user.starts_with("User ") => format!("cannot {rest}"),
        Some(_) | None => message.to_owned(),
    };
    let message = match message.split_once(" denied request: ") {
        Some((policy, rest)) => {
            let policy = policy.split('\'').nth(1).unwrap_or_default();
            format!("{policy}: {rest}")
        }
        None => message,
    };
    let message = message.replace('|', "\\|").replace('*', "\\*");
    message.replace('<', "&lt;").replace('\n', " ")
}

/// Compares what stands between two marks of docs/security.md, or writes it.
fn compare_or_write(name: &str, table: &str) {
    /// Tests of one program write one after the other.
    static WRITING: Mutex<()> = Mutex::new(());
    let _writing = WRITING.lock().expect("no writer failed");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/security.md");
    let page = std::fs::read_to_string(&path).expect("the page");
    let begin = format!("<!-- {name}: made by tests/security -->\n");
    let end = format!("<!-- end of {name} -->\n");
    let (before, rest) = page.split_once(&begin).expect("the table's begin");
    let (present, after) = rest.split_once(&end).expect("the table's end");
    if std::env::var_os("KARI_WRITE_GENERATED").is_some() {
        let page = format!("{before}{begin}{table}{end}{after}");
        std::fs::write(&path, page).expect("written");
        return;
    }
    let present: Vec<&str> = present.lines().collect();
    let table: Vec<&str> = table.lines().collect();
    for at in 0..present.len().max(table.len()) {
        assert_eq!(
            present.get(at),
            table.get(at),
            "docs/security.md has another table: KARI_WRITE_GENERATED=1 cargo test --test security writes it"
        );
    }
}

/// A Release as the controller would write it.
async fn release(space: &Space, node: &str) -> Release {
    let name = release_name("shop", &NodeName::new(node));
    let body = json!({
        "apiVersion": "kari.dev/v1alpha1",
        "kind": "Release",
        "metadata": {"name": name, "finalizers": ["kari.dev/agent"]},
        "spec": {
            "nodeName": node,
            "deployment": "shop",
            "releaseId": uuid::Uuid::new_v4().to_string(),
            "attempt": 1,
            "revision": "shop-0123456789",
            "commit": "0123456789012345678901234567890123456789",
            "template": {
                "source": {"url": "https://git.example.com/shop.git"},
                "processes": [{"name": "web", "command": ["./server"]}],
                "switch": "BlueGreen",
                "minReadySeconds": 1,
                "keepReleases": 2,
            },
        },
    });
    let release = serde_json::from_value(body).expect("a Release");
    let created = space
        .releases()
        .create(&PostParams::default(), &release)
        .await;
    created.unwrap_or_else(|e| panic!("{e}"))
}

async fn token(accounts: &Api<ServiceAccount>, name: &str, request: Value) -> String {
    let request = serde_json::from_value(request).expect("a request");
    let answer = accounts
        .create_token_request(name, &PostParams::default(), &request)
        .await;
    answer.expect("a token").status.expect("a token").token
}

fn lease(name: &str, holder: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": SYSTEM},
        "spec": {"holderIdentity": holder},
    })
}

#[tokio::test]
async fn an_uninstallation_waits_for_removals_that_have_begun_and_for_nothing_else() {
    let space = Space::new(testbed().await, "uninstall").await;
    let check = || {
        let output = Command::new(testbed::program::kari().expect("the program"))
            .arg("uninstall-check")
            .env("KUBECONFIG", space.testbed.kubeconfig())
            .output()
            .expect("it runs");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    // Releases of the other tests, too: nobody removes them.
    let release = release(&space, "n1").await;
    let (passes, said) = check();
    assert!(passes, "{said}");

    let releases = space.releases();
    let name = release.name_any();
    releases
        .delete(&name, &DeleteParams::default())
        .await
        .expect("deleted");
    let (passes, said) = check();
    assert!(!passes);
    assert!(
        said.contains("1 apps are being removed from their nodes"),
        "{said}"
    );
    assert!(
        said.contains(&format!("{}/shop from n1", space.namespace)),
        "{said}"
    );

    // As the controller does when the node has reported it gone.
    let finalizers = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    releases
        .patch(&name, &PatchParams::default(), &finalizers)
        .await
        .expect("let go");
    let (passes, said) = check();
    assert!(passes, "{said}");
}
