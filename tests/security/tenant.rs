//! What a tenant tries with the rights of a namespace's administrator.

use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::support::{LIMIT, Space, until};
use super::{
    Answer, SYSTEM, ask, attempt, client_with, compare_or_write, lease, testbed, token, try_all,
};

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
            "a repository on the node's own disk",
            shop.clone(),
            with(
                "/spec/source/git/url",
                json!("file:///var/lib/kari/mirrors/x.git"),
            ),
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
