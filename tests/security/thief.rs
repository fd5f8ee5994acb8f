//! What a thief tries with the token of an agent.

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kari::api::Release;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::{Value, json};

use super::support::{LIMIT, Space, until};
use super::{
    Answer, SYSTEM, agent_client, ask, attempt, client_with, compare_or_write, lease, release,
    testbed, token, try_all,
};

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
