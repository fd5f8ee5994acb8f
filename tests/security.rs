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

mod support;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use http_body_util::BodyExt as _;
use hyper::Request;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use k8s_openapi::api::rbac::v1::RoleBinding;
use kari::api::Release;
use kari::api::names::{NodeName, release_name};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt as _};
use serde_json::{Value, json};
use support::{LIMIT, Space, until};
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
    let begin = format!("<!-- {name}: made by tests/security.rs -->\n");
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

fn lease(name: &str, holder: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": SYSTEM},
        "spec": {"holderIdentity": holder},
    })
}

#[tokio::test]
async fn a_thief_with_an_agents_token_has_its_node_and_nothing_else() {
    let space = Space::new(testbed().await, "thief").await;
    let thief = agent_client(space.testbed, "n1").await;
    let own = release(&space, "n1").await;
    let other = release(&space, "n2").await;
    let ns = &space.namespace;
    let releases = format!("/apis/kari.dev/v1alpha1/namespaces/{ns}/releases");
    let (own_path, other_path) = (
        format!("{releases}/{}", own.name_any()),
        format!("{releases}/{}", other.name_any()),
    );
    let deployments = format!("/apis/kari.dev/v1alpha1/namespaces/{ns}/deployments");
    let leases = format!("/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases");
    let core = format!("/api/v1/namespaces/{ns}");
    let held: Api<Lease> = Api::namespaced(thief.clone(), SYSTEM);
    let first = serde_json::from_value(lease("kari-agent-n1", "n1")).expect("a Lease");
    let held = held.create(&PostParams::default(), &first).await;
    let version = held.expect("a Lease").resource_version();
    let held_by = |node: &str| {
        let mut lease = lease("kari-agent-n1", node);
        lease["metadata"]["resourceVersion"] = json!(version);
        lease
    };
    let status = |release: &Release| {
        json!({
            "apiVersion": "kari.dev/v1alpha1", "kind": "Release",
            "metadata": {"name": release.name_any()},
            "status": {"observedGeneration": 1, "phase": "Running"},
        })
    };
    let mut smuggled = status(&own);
    smuggled["spec"] = json!({"nodeName": "n1", "deployment": "shop", "commit": "f".repeat(40)});
    smuggled["metadata"]["finalizers"] = json!([]);
    let apply = "?fieldManager=kari-agent&force=true";
    let deployment = json!({
        "apiVersion": "kari.dev/v1alpha1", "kind": "Deployment", "metadata": {"name": "mine"},
        "spec": {
            "placement": {"nodeSelector": {}},
            "source": {"git": {"url": "https://git.example.com/mine.git"}},
            "processes": [{"name": "web", "command": ["./server"]}],
        },
    });
    let event = json!({
        "apiVersion": "v1", "kind": "Event", "metadata": {"name": "lie"}, "type": "Normal", "reason": "Lie",
        "message": "all is well", "involvedObject": {"kind": "Deployment", "name": "shop", "namespace": ns},
    });
    let bind = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "thief"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": "kari-agent", "namespace": SYSTEM}],
    });
    let token =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let policy = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings/kari-agent-own-node";
    let mut attempts = vec![
        attempt(
            "report for its own node (what an agent is for)",
            format!("APPLY {own_path}/status{apply}"),
            status(&own),
            200,
            "",
        ),
        attempt(
            "report for another node",
            format!("APPLY {other_path}/status{apply}"),
            status(&other),
            403,
            "this Release belongs to node n2, not to n1",
        ),
        attempt(
            "report for another node by a merge patch",
            format!("MERGE {other_path}/status"),
            json!({"status": {"phase": "Removed"}}),
            403,
            "this Release belongs to node n2, not to n1",
        ),
        attempt(
            "replace its own status",
            format!("PUT {own_path}/status"),
            status(&own),
            403,
            "cannot update resource \"releases/status\"",
        ),
        attempt(
            "another commit for its own node, hidden in a report",
            format!("APPLY {own_path}/status{apply}"),
            smuggled,
            200,
            "",
        ),
        attempt(
            "another commit for its own node",
            format!("MERGE {own_path}"),
            json!({"spec": {"commit": "f".repeat(40)}}),
            403,
            "cannot patch resource \"releases\"",
        ),
        attempt(
            "a Release of another node made its own",
            format!("MERGE {other_path}"),
            json!({"spec": {"nodeName": "n1"}}),
            403,
            "cannot patch resource \"releases\"",
        ),
        attempt(
            "the finalizer of its own Release",
            format!("JSON {own_path}"),
            json!([{"op": "remove", "path": "/metadata/finalizers"}]),
            403,
            "cannot patch resource \"releases\"",
        ),
        attempt(
            "the finalizer of another node's Release",
            format!("JSON {other_path}"),
            json!([{"op": "remove", "path": "/metadata/finalizers"}]),
            403,
            "cannot patch resource \"releases\"",
        ),
        attempt(
            "a new Release",
            format!("POST {releases}"),
            json!({}),
            403,
            "cannot create resource \"releases\"",
        ),
        attempt(
            "delete its own Release",
            format!("DELETE {own_path}"),
            Value::Null,
            403,
            "cannot delete resource \"releases\"",
        ),
        attempt(
            "delete all Releases",
            format!("DELETE {releases}"),
            Value::Null,
            403,
            "cannot deletecollection resource \"releases\"",
        ),
        attempt(
            "read the Releases of all nodes",
            "GET /apis/kari.dev/v1alpha1/releases".to_owned(),
            Value::Null,
            200,
            "",
        ),
        attempt(
            "read a Deployment",
            format!("GET {deployments}/shop"),
            Value::Null,
            403,
            "cannot get resource \"deployments\"",
        ),
        attempt(
            "a new Deployment",
            format!("POST {deployments}"),
            deployment,
            403,
            "cannot create resource \"deployments\"",
        ),
        attempt(
            "another repository for a Deployment",
            format!("MERGE {deployments}/shop"),
            json!({"spec": {"suspend": true}}),
            403,
            "cannot patch resource \"deployments\"",
        ),
        attempt(
            "the status of a Deployment",
            format!("MERGE {deployments}/shop/status"),
            json!({"status": {}}),
            403,
            "cannot patch resource \"deployments/status\"",
        ),
        attempt(
            "read the history",
            format!("GET /apis/apps/v1/namespaces/{ns}/controllerrevisions"),
            Value::Null,
            403,
            "cannot list resource \"controllerrevisions\"",
        ),
        attempt(
            "renew its own Lease (what an agent is for)",
            format!("PUT {leases}/kari-agent-n1"),
            held_by("n1"),
            200,
            "",
        ),
        attempt(
            "its own Lease, held by another node",
            format!("PUT {leases}/kari-agent-n1"),
            held_by("n2"),
            403,
            "only its own Lease, kari-agent-n1",
        ),
        attempt(
            "delete its own Lease",
            format!("DELETE {leases}/kari-agent-n1"),
            Value::Null,
            403,
            "cannot delete resource \"leases\"",
        ),
        attempt(
            "the Lease of another node",
            format!("POST {leases}"),
            lease("kari-agent-n2", "n2"),
            403,
            "only its own Lease, kari-agent-n1",
        ),
        attempt(
            "the leader's Lease",
            format!("POST {leases}"),
            lease("kari-controller", "n1"),
            403,
            "only its own Lease, kari-agent-n1",
        ),
        attempt(
            "a Lease of any name",
            format!("POST {leases}"),
            json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"generateName": "kari-agent-"}, "spec": {"holderIdentity": "n1"}}),
            403,
            "only its own Lease, kari-agent-n1",
        ),
        attempt(
            "list the Leases",
            format!("GET {leases}"),
            Value::Null,
            403,
            "cannot list resource \"leases\"",
        ),
        attempt(
            "a Lease in another namespace",
            "POST /apis/coordination.k8s.io/v1/namespaces/kube-system/leases".to_owned(),
            json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "kari-agent-n1"}, "spec": {"holderIdentity": "n1"}}),
            403,
            "cannot create resource \"leases\"",
        ),
        attempt(
            "read a Secret",
            format!("GET {core}/secrets/shop"),
            Value::Null,
            403,
            "cannot get resource \"secrets\"",
        ),
        attempt(
            "list the Secrets of Kari's namespace",
            format!("GET /api/v1/namespaces/{SYSTEM}/secrets"),
            Value::Null,
            403,
            "cannot list resource \"secrets\"",
        ),
        attempt(
            "read a ConfigMap",
            format!("GET {core}/configmaps/shop"),
            Value::Null,
            403,
            "cannot get resource \"configmaps\"",
        ),
        attempt(
            "list the Pods",
            format!("GET {core}/pods"),
            Value::Null,
            403,
            "cannot list resource \"pods\"",
        ),
        attempt(
            "run a command in the controller's Pod",
            format!(
                "POST /api/v1/namespaces/{SYSTEM}/pods/kari-controller-0/exec?command=id&stdout=true"
            ),
            Value::Null,
            403,
            "cannot create resource \"pods/exec\"",
        ),
        attempt(
            "a Pod of its own",
            format!("POST /api/v1/namespaces/{SYSTEM}/pods"),
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "thief"}}),
            403,
            "cannot create resource \"pods\"",
        ),
        attempt(
            "read the Nodes",
            "GET /api/v1/nodes".to_owned(),
            Value::Null,
            403,
            "cannot list resource \"nodes\"",
        ),
        attempt(
            "a label of its Node, to get other apps",
            "MERGE /api/v1/nodes/n1".to_owned(),
            json!({"metadata": {"labels": {"pool": "all"}}}),
            403,
            "cannot patch resource \"nodes\"",
        ),
        attempt(
            "an Event in the name of a Deployment",
            format!("POST {core}/events"),
            event,
            403,
            "cannot create resource \"events\"",
        ),
        attempt(
            "a token of the controller",
            format!("POST /api/v1/namespaces/{SYSTEM}/serviceaccounts/kari-controller/token"),
            token.clone(),
            403,
            "cannot create resource \"serviceaccounts/token\"",
        ),
        attempt(
            "a token of an agent that names no node",
            format!("POST /api/v1/namespaces/{SYSTEM}/serviceaccounts/kari-agent/token"),
            token,
            403,
            "cannot create resource \"serviceaccounts/token\"",
        ),
        attempt(
            "more rights for itself",
            "POST /apis/rbac.authorization.k8s.io/v1/clusterrolebindings".to_owned(),
            bind,
            403,
            "cannot create resource \"clusterrolebindings\"",
        ),
        attempt(
            "the admission policy away",
            format!("DELETE {policy}"),
            Value::Null,
            403,
            "cannot delete resource \"validatingadmissionpolicybindings\"",
        ),
    ];
    let mut as_controller = attempt(
        "speak as the controller",
        format!("GET {deployments}"),
        Value::Null,
        403,
        "cannot impersonate",
    );
    as_controller.as_user = Some("system:serviceaccount:kari-system:kari-controller");
    attempts.push(as_controller);
    let table = try_all(&thief, ns, &attempts).await;

    // What was hidden in a report changed nothing.
    let after = space
        .releases()
        .get(&own.name_any())
        .await
        .expect("the Release");
    assert_eq!(after.spec.commit, own.spec.commit);
    assert_eq!(after.metadata.finalizers, own.metadata.finalizers);
    assert_eq!(after.metadata.generation, own.metadata.generation);
    compare_or_write("thief", &table);
}

#[tokio::test]
async fn a_token_that_names_no_node_reports_for_none_and_one_of_a_gone_pod_is_worth_nothing() {
    let space = Space::new(testbed().await, "unbound").await;
    let own = release(&space, "n1").await;
    let path = format!(
        "/apis/kari.dev/v1alpha1/namespaces/{}/releases/{}/status",
        space.namespace,
        own.name_any()
    );
    let report = attempt(
        "",
        format!("MERGE {path}"),
        json!({"status": {"observedGeneration": 1}}),
        200,
        "",
    );

    let accounts: Api<ServiceAccount> = Api::namespaced(space.client.clone(), SYSTEM);
    let request =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let token = token(&accounts, "kari-agent", request).await;
    let unbound = client_with(space.testbed, &token).await;
    let answer = ask(&unbound, &report).await;
    assert_eq!(answer.code, 403);
    assert!(
        answer
            .message
            .contains("this agent's token names no node; it must be bound to a Pod or a Node"),
        "{}",
        answer.message
    );

    // A Pod of the node that is deleted, as an administrator does with a node that was taken over.
    let pods: Api<Pod> = Api::namespaced(space.client.clone(), SYSTEM);
    let pod = json!({
        "metadata": {"name": "kari-agent-gone"},
        "spec": {"serviceAccountName": "kari-agent", "nodeName": "n1", "containers": [{"name": "kari", "image": "kari.invalid/kari"}]},
    });
    let pod = serde_json::from_value(pod).expect("a Pod");
    let pod = pods
        .create(&PostParams::default(), &pod)
        .await
        .expect("a Pod");
    let bound =
        json!({"kind": "Pod", "apiVersion": "v1", "name": pod.name_any(), "uid": pod.metadata.uid});
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"boundObjectRef": bound}});
    let token = self::token(&accounts, "kari-agent", request).await;
    let stolen = client_with(space.testbed, &token).await;
    assert_eq!(ask(&stolen, &report).await.code, 200);
    let now = DeleteParams::default().grace_period(0);
    pods.delete(&pod.name_any(), &now).await.expect("deleted");
    until("the token is refused", LIMIT, || async {
        match ask(&stolen, &report).await {
            Answer { code: 401, .. } => Ok(()),
            answer => Err(format!("{} {}", answer.code, answer.message)),
        }
    })
    .await;
}

async fn token(accounts: &Api<ServiceAccount>, name: &str, request: Value) -> String {
    let request = serde_json::from_value(request).expect("a request");
    let answer = accounts
        .create_token_request(name, &PostParams::default(), &request)
        .await;
    answer.expect("a token").status.expect("a token").token
}

/// A token of an account that is `admin` of the test's namespace, which is the most that a tenant may be.
async fn tenant_client(space: &Space) -> Client {
    let accounts: Api<ServiceAccount> = Api::namespaced(space.client.clone(), &space.namespace);
    let account =
        serde_json::from_value(json!({"metadata": {"name": "tenant"}})).expect("an account");
    accounts
        .create(&PostParams::default(), &account)
        .await
        .expect("an account");
    let bindings: Api<RoleBinding> = Api::namespaced(space.client.clone(), &space.namespace);
    let binding = json!({
        "metadata": {"name": "tenant"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "admin"},
        "subjects": [{"kind": "ServiceAccount", "name": "tenant", "namespace": space.namespace}],
    });
    let binding = serde_json::from_value(binding).expect("a binding");
    bindings
        .create(&PostParams::default(), &binding)
        .await
        .expect("a binding");
    let request =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let token = token(&accounts, "tenant", request).await;
    client_with(space.testbed, &token).await
}

/// What an administrator says about tenants; the test that sets it is the only one of this binary that deploys.
async fn tenants(space: &Space, data: Value) {
    let maps: Api<ConfigMap> = Api::namespaced(space.client.clone(), SYSTEM);
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kari-tenants"}, "data": data});
    let parameters = PatchParams::apply("test").force();
    maps.patch("kari-tenants", &parameters, &Patch::Apply(&map))
        .await
        .expect("the ConfigMap");
}

/// A manifest that the tenant may apply.
fn allowed(name: &str) -> Value {
    json!({
        "apiVersion": "kari.dev/v1alpha1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "placement": {"nodeSelector": {"kari.dev/pool": "web"}},
            "source": {"git": {"url": "https://git.example.com/shop.git"}},
            "processes": [{"name": "web", "command": ["./server"], "port": {"env": "PORT"}, "route": {"hosts": ["shop.example.com", "a.web.example.com"]}}],
        },
    })
}

/// The manifest with another value at a place.
fn with(pointer: &str, value: Value) -> Value {
    let mut manifest = allowed("shop");
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    manifest.pointer_mut(parent).expect("a parent")[key] = value;
    manifest
}

#[tokio::test]
async fn a_tenant_has_its_namespace_with_the_nodes_hosts_and_exceptions_that_it_was_given() {
    let space = Space::new(testbed().await, "tenant").await;
    let tenant = tenant_client(&space).await;
    let ns = space.namespace.as_str();
    tenants(
        &space,
        json!({
            (format!("{ns}.nodes")): "kari.dev/pool=web",
            (format!("{ns}.hosts")): "shop.example.com\n*.web.example.com",
        }),
    )
    .await;
    let of = |namespace: &str, kinds: &str| {
        format!("/apis/kari.dev/v1alpha1/namespaces/{namespace}/{kinds}")
    };
    let deployments = of(ns, "deployments");
    let shop = format!("APPLY {deployments}/shop?fieldManager=tenant");
    // The policies take a moment after the start; the objects that they ask for, too.
    let first = attempt(
        "",
        format!("POST {}?dryRun=All", of("default", "deployments")),
        allowed("shop"),
        403,
        "",
    );
    until("the policies are in force", LIMIT, || async {
        match ask(&space.client, &first).await {
            Answer { code: 403, message } if message.contains("may not deploy") => Ok(()),
            answer => Err(format!("{} {}", answer.code, answer.message)),
        }
    })
    .await;
    until("the tenant may deploy", LIMIT, || async {
        let dry = attempt(
            "",
            format!("POST {deployments}?dryRun=All"),
            allowed("shop"),
            201,
            "",
        );
        match ask(&tenant, &dry).await {
            Answer { code: 201, .. } => Ok(()),
            answer => Err(format!("{} {}", answer.code, answer.message)),
        }
    })
    .await;

    let process = |key: &str| format!("/spec/processes/0/{key}");
    let sandbox = |value: Value| with(&process("sandbox"), value);
    let hosts = |value: Value| with(&process("route"), json!({"hosts": value}));
    let attempts = [
        attempt(
            "deploy as it was allowed to",
            shop.clone(),
            allowed("shop"),
            201,
            "",
        ),
        attempt(
            "deploy in another namespace",
            format!("POST {}", of("default", "deployments")),
            allowed("shop"),
            403,
            "cannot create resource \"deployments\"",
        ),
        attempt(
            "read another namespace's Deployments",
            format!("GET {}", of("default", "deployments")),
            Value::Null,
            403,
            "cannot list resource \"deployments\"",
        ),
        attempt(
            "read its own Releases",
            format!("GET {}", of(ns, "releases")),
            Value::Null,
            200,
            "",
        ),
        attempt(
            "a Release past the controller",
            format!("POST {}", of(ns, "releases")),
            json!({}),
            403,
            "cannot create resource \"releases\"",
        ),
        attempt(
            "a report in an agent's name",
            format!("MERGE {}/x/status", of(ns, "releases")),
            json!({}),
            403,
            "cannot patch resource \"releases/status\"",
        ),
        attempt(
            "the status of its Deployment",
            format!("MERGE {deployments}/shop/status"),
            json!({}),
            403,
            "cannot patch resource \"deployments/status\"",
        ),
        attempt(
            "another history",
            format!("MERGE /apis/apps/v1/namespaces/{ns}/controllerrevisions/x"),
            json!({}),
            403,
            "cannot patch resource \"controllerrevisions\"",
        ),
        attempt(
            "a host name of another tenant",
            shop.clone(),
            hosts(json!(["bank.example.com"])),
            403,
            "may not route bank.example.com: its host names are shop.example.com *.web.example.com",
        ),
        attempt(
            "every host name",
            shop.clone(),
            hosts(json!(["*.example.com"])),
            403,
            "may not route *.example.com",
        ),
        attempt(
            "a host name that only ends like its own",
            shop.clone(),
            hosts(json!(["evilweb.example.com"])),
            403,
            "may not route evilweb.example.com",
        ),
        attempt(
            "every node",
            shop.clone(),
            with("/spec/placement", json!({"nodeSelector": {}})),
            403,
            "spec.placement.nodeSelector must have kari.dev/pool=web",
        ),
        attempt(
            "another tenant's nodes",
            shop.clone(),
            with(
                "/spec/placement",
                json!({"nodeSelector": {"kari.dev/pool": "bank"}}),
            ),
            403,
            "spec.placement.nodeSelector must have kari.dev/pool=web",
        ),
        attempt(
            "a label on a Node, to make it its own",
            "MERGE /api/v1/nodes/n1".to_owned(),
            json!({"metadata": {"labels": {"kari.dev/pool": "web"}}}),
            403,
            "cannot patch resource \"nodes\"",
        ),
        attempt(
            "another sandbox level for its namespace",
            format!("MERGE /api/v1/namespaces/{ns}"),
            json!({"metadata": {"labels": {"kari.dev/sandbox": "privileged"}}}),
            403,
            "cannot patch resource \"namespaces\"",
        ),
        attempt(
            "other limits for itself",
            format!("MERGE /api/v1/namespaces/{SYSTEM}/configmaps/kari-tenants"),
            json!({"data": {}}),
            403,
            "cannot patch resource \"configmaps\"",
        ),
        attempt(
            "a folder of the node to write to",
            shop.clone(),
            sandbox(json!({"writablePaths": ["/srv/shared"]})),
            403,
            "process web asks for sandbox.writablePaths /srv/shared, which a namespace at the sandbox level baseline may not",
        ),
        attempt(
            "a folder of the system to write to",
            shop.clone(),
            sandbox(json!({"writablePaths": ["/etc"]})),
            422,
            "is a path that no service may write",
        ),
        attempt(
            "the network's settings",
            shop.clone(),
            sandbox(json!({"capabilities": ["CAP_NET_ADMIN"]})),
            403,
            "process web asks for sandbox.capabilities CAP_NET_ADMIN",
        ),
        attempt(
            "raw packets",
            shop.clone(),
            sandbox(json!({"addressFamilies": ["AF_INET", "AF_PACKET"]})),
            403,
            "process web asks for sandbox.addressFamilies AF_INET, AF_PACKET",
        ),
        attempt(
            "every capability",
            shop.clone(),
            sandbox(json!({"capabilities": ["CAP_SYS_ADMIN"]})),
            422,
            "Unsupported value: \"CAP_SYS_ADMIN\"",
        ),
        attempt(
            "a source outside the repository",
            shop.clone(),
            with("/spec/source/git/directory", json!("../../etc")),
            422,
            "must be a relative path without '..' parts",
        ),
        attempt(
            "a cache outside the build",
            shop.clone(),
            with(
                "/spec/build",
                json!({"run": "make", "cacheDirectories": ["../x"]}),
            ),
            422,
            "must be a relative path without '.' and '..' parts",
        ),
        attempt(
            "a unit of the system by its process's name",
            shop.clone(),
            with(&process("name"), json!("x.service")),
            422,
            "should match",
        ),
        attempt(
            "a unit of the system by its own name",
            format!("POST {deployments}"),
            allowed("ssh.service"),
            422,
            "must be at most 52 characters without dots",
        ),
        attempt(
            "a user of its choice",
            shop.clone(),
            with(&process("user"), json!("root")),
            500,
            "field not declared in schema",
        ),
        attempt(
            "a port of its choice",
            shop.clone(),
            with(&process("port"), json!({"env": "PORT", "number": 22})),
            500,
            "field not declared in schema",
        ),
        attempt(
            "a variable of Kari's own",
            shop.clone(),
            with("/spec/env", json!([{"name": "KARI_NODE", "value": "n9"}])),
            422,
            "names that start with KARI_ are Kari's own",
        ),
        attempt(
            "a program for git to run",
            shop.clone(),
            with("/spec/source/git/url", json!("ext::sh -c id")),
            422,
            "must be https://host/path",
        ),
        attempt(
            "an option for ssh",
            shop.clone(),
            with("/spec/source/git/url", json!("ssh://-oProxyCommand=id/x")),
            422,
            "must be https://host/path",
        ),
        attempt(
            "a token of an agent",
            format!("POST /api/v1/namespaces/{SYSTEM}/serviceaccounts/kari-agent/token"),
            json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}),
            403,
            "cannot create resource \"serviceaccounts/token\"",
        ),
        attempt(
            "the Lease of a node",
            format!("POST /apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases"),
            lease("kari-agent-n1", "n1"),
            403,
            "cannot create resource \"leases\"",
        ),
    ];
    let table = try_all(&tenant, ns, &attempts).await;
    compare_or_write("tenant", &table);

    // What was there before a limit came can still be annotated and deleted, but not changed.
    tenants(
        &space,
        json!({(format!("{ns}.nodes")): "kari.dev/pool=other"}),
    )
    .await;
    let change = attempt(
        "",
        format!("MERGE {deployments}/shop?dryRun=All"),
        json!({"spec": {"suspend": true}}),
        403,
        "",
    );
    until("the limit is in force", LIMIT, || async {
        match ask(&tenant, &change).await {
            Answer { code: 403, message } if message.contains("must have kari.dev/pool=other") => {
                Ok(())
            }
            answer => Err(format!("{} {}", answer.code, answer.message)),
        }
    })
    .await;
    let annotate = json!({"metadata": {"annotations": {"kari.dev/retry": "1"}}});
    let annotated = ask(
        &tenant,
        &attempt("", format!("MERGE {deployments}/shop"), annotate, 200, ""),
    )
    .await;
    assert_eq!(annotated.code, 200, "{}", annotated.message);
    let deleted = ask(
        &tenant,
        &attempt(
            "",
            format!("DELETE {deployments}/shop"),
            Value::Null,
            200,
            "",
        ),
    )
    .await;
    assert_eq!(deleted.code, 200, "{}", deleted.message);
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
