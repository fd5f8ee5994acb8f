//! What is in the API server before Kari's parts start: CRDs, the chart's RBAC
//! and admission policies, Node objects, and a Pod object for each part, to which
//! its token is bound.
//!
//! There is no kubelet: Nodes and Pods are written here and say that they run.

use std::{collections::BTreeMap, path::Path, time::Duration};

use k8s_openapi::{
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        coordination::v1::Lease,
        core::v1::{Namespace, Node, Pod, ServiceAccount},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Resource,
    api::{DynamicObject, Patch, PatchParams, PostParams},
    core::{ApiResource, GroupVersionKind},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;

use crate::{
    error::{Context, Error, Result},
    pki::{self, Credentials},
    state::{Description, Directory, NodeName, write_file},
    wait::{Seen, until},
};

/// The namespace of Kari's own parts.
pub const NAMESPACE: &str = "kari-system";

/// The kinds of the chart's objects that say who may do what.
const RULE_KINDS: [&str; 8] = [
    "ServiceAccount",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
    "ConfigMap", // what policies read
];

/// The name by which this crate owns fields.
const FIELD_MANAGER: &str = "testbed";

/// A process of the testbed is what runs; no image is ever fetched.
const IMAGE: &str = "kari.invalid/kari:testbed";

/// How long an object that was written may take to be in force: it needs about a second.
const IN_FORCE_LIMIT: Duration = Duration::from_secs(30);

/// The life of a token, in seconds: longer than any testbed is kept up.
const TOKEN_SECONDS: i64 = 24 * 60 * 60;

/// Applies the CRDs, in one YAML text, and waits until they are served.
pub async fn apply_crds(client: &Client, crds: &str) -> Result<()> {
    let names = apply(client, &documents(crds)?).await?;
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for name in names {
        until(
            &format!("the kind {name} is not established"),
            IN_FORCE_LIMIT,
            String::new,
            async || match api.get(&name).await {
                Ok(crd) if is_established(&crd) => Seen::Ready(()),
                Ok(crd) => Seen::NotYet(format!(
                    "{:?}",
                    crd.status.and_then(|status| status.conditions)
                )),
                Err(error) => Seen::NotYet(error.to_string()),
            },
        )
        .await?;
    }
    Ok(())
}

/// Makes Kari's namespace, and applies the accounts, roles and admission policies of the rendered chart.
pub async fn apply_rules(client: &Client, chart: &str) -> Result<()> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    write(
        &namespaces,
        NAMESPACE,
        json!({"metadata": {"name": NAMESPACE}}),
    )
    .await?;
    let mut rules = documents(chart)?;
    rules.retain(|object| {
        let kind = object.types.as_ref().map(|types| types.kind.as_str());
        kind.is_some_and(|kind| RULE_KINDS.contains(&kind))
    });
    apply(client, &rules).await.map(drop)
}

/// Writes a node's object and that of its agent's Pod, and a kubeconfig with a
/// token bound to that Pod, which names the files as the node sees them.
pub async fn add_node(
    client: &Client,
    directory: &Directory,
    description: &Description,
    name: NodeName,
) -> Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let node_name = name.to_string();
    let labels = BTreeMap::from([
        ("kubernetes.io/hostname", node_name.as_str()),
        ("kubernetes.io/os", "linux"),
    ]);
    write(
        &nodes,
        &node_name,
        json!({"metadata": {"name": node_name, "labels": labels}, "spec": {}}),
    )
    .await?;
    let addresses = json!([
        {"type": "InternalIP", "address": description.node_address(name)},
        {"type": "Hostname", "address": node_name},
    ]);
    let ready = json!([{"type": "Ready", "status": "True", "reason": "Testbed"}]);
    let status = json!({"addresses": addresses, "conditions": ready, "nodeInfo": node_info()});
    write_status(&nodes, &node_name, status).await?;
    let pod = format!("kari-agent-{name}");
    add_pod(client, &pod, "kari-agent", Some(name)).await?;
    let token = token(client, "kari-agent", &pod).await?;
    let folder = directory.node(name).join("credentials");
    let seen_inside = Path::new(crate::node::CREDENTIALS);
    write_credentials(directory, description, &folder, seen_inside, &token)
}

/// Writes the object of the controller's Pod and a kubeconfig with a token bound to it.
pub async fn add_controller(
    client: &Client,
    directory: &Directory,
    description: &Description,
) -> Result<()> {
    let pod = "kari-controller-0";
    add_pod(client, pod, "kari-controller", None).await?;
    let token = token(client, "kari-controller", pod).await?;
    let folder = directory.make_folder("controller")?;
    write_credentials(directory, description, &folder, &folder, &token)
}

/// Waits until the admission policy refuses what an agent may not do: it takes
/// a moment after it is written, in which agents could do too much.
pub async fn wait_admission_policy(client: &Client, node: NodeName) -> Result<()> {
    let mut lease = Lease::default();
    lease.metadata.name = Some("kari-agent-nobody".to_owned());
    let body = serde_json::to_vec(&lease).map_err(|error| unreadable("a Lease", &error))?;
    let uri = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases?dryRun=All");
    until(
        "the admission policy is not in force",
        IN_FORCE_LIMIT,
        String::new,
        async || {
            let request = http::Request::post(&uri)
                .header("Content-Type", "application/json")
                .header(
                    "Impersonate-User",
                    format!("system:serviceaccount:{NAMESPACE}:kari-agent"),
                )
                .header(
                    "Impersonate-Extra-authentication.kubernetes.io%2Fnode-name",
                    node.to_string(),
                )
                .body(body.clone());
            match request {
                Err(error) => Seen::Never(error.to_string()),
                Ok(request) => match client.request::<Lease>(request).await {
                    Ok(_) => Seen::NotYet("an agent may write any Lease".to_owned()),
                    Err(error) if error.to_string().contains("only its own Lease") => {
                        Seen::Ready(())
                    }
                    Err(error) => Seen::NotYet(error.to_string()),
                },
            }
        },
    )
    .await
}

/// Waits until the controller manager works, which shows in the account that it
/// makes in every namespace.
pub async fn wait_controller_manager(client: &Client, log: impl Fn() -> String) -> Result<()> {
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    until(
        "the controller manager does not work",
        IN_FORCE_LIMIT,
        log,
        async || match api.get("default").await {
            Ok(_) => Seen::Ready(()),
            Err(error) => Seen::NotYet(error.to_string()),
        },
    )
    .await
}

/// The objects of a YAML text.
fn documents(yaml: &str) -> Result<Vec<DynamicObject>> {
    yaml.split("\n---")
        .filter_map(|document| {
            serde_saphyr::from_str::<Option<DynamicObject>>(document).transpose()
        })
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| unreadable("a manifest", &error))
}

/// Applies objects and returns their names.
async fn apply(client: &Client, objects: &[DynamicObject]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for object in objects {
        let types = object.types.clone().unwrap_or_default();
        let kind =
            GroupVersionKind::try_from(types).map_err(|error| unreadable("a manifest", &error))?;
        let resource = ApiResource::from_gvk(&kind);
        let name = object.metadata.name.clone().unwrap_or_default();
        let api: Api<DynamicObject> = match &object.metadata.namespace {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
            None => Api::all_with(client.clone(), &resource),
        };
        api.patch(
            &name,
            &PatchParams::apply(FIELD_MANAGER).force(),
            &Patch::Apply(object),
        )
        .await
        .context(|| format!("apply the {} {name}", kind.kind))?;
        names.push(name);
    }
    Ok(names)
}

async fn add_pod(client: &Client, name: &str, account: &str, node: Option<NodeName>) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let pod = json!({
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": account}},
        "spec": {
            "serviceAccountName": account,
            "automountServiceAccountToken": false,
            "nodeName": node.map(|node| node.to_string()),
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "kari", "image": IMAGE}],
        },
    });
    write(&pods, name, pod).await?;
    let ready = json!([{"type": "Ready", "status": "True"}]);
    let container = json!([{
        "name": "kari", "image": IMAGE, "imageID": "", "ready": true, "restartCount": 0,
        "state": {"running": {}},
    }]);
    let status = json!({"phase": "Running", "conditions": ready, "containerStatuses": container});
    write_status(&pods, name, status).await
}

/// What `kubectl get nodes -o wide` shows of this machine.
fn node_info() -> serde_json::Value {
    let uname = rustix::system::uname();
    let system = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = system
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .unwrap_or("Linux")
        .trim_matches('"');
    json!({
        "architecture": uname.machine().to_string_lossy(),
        "operatingSystem": "linux",
        "osImage": name,
        "kernelVersion": uname.release().to_string_lossy(),
        "machineID": "", "systemUUID": "", "bootID": "",
        "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "",
    })
}

async fn token(client: &Client, account: &str, pod: &str) -> Result<String> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let uid = pods
        .get(pod)
        .await
        .context(|| format!("read the Pod {pod}"))?
        .metadata
        .uid;
    let request = TokenRequest {
        spec: TokenRequestSpec {
            audiences: Vec::new(),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: Some(pod.to_owned()),
                uid,
            }),
            expiration_seconds: Some(TOKEN_SECONDS),
        },
        ..TokenRequest::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
    let action = || format!("make a token of {account} for the Pod {pod}");
    let answer = accounts
        .create_token_request(account, &PostParams::default(), &request)
        .await
        .context(action)?;
    answer
        .status
        .map(|status| status.token)
        .ok_or_else(|| Error::State(format!("cannot {}: the API server gave none", action())))
}

fn write_credentials(
    directory: &Directory,
    description: &Description,
    folder: &Path,
    seen_as: &Path,
    token: &str,
) -> Result<()> {
    write_file(&folder.join("token"), token.as_bytes())?;
    let kubeconfig = pki::kubeconfig(
        directory,
        &description.addresses.apiserver.to_string(),
        &Credentials::TokenFile(&seen_as.join("token")),
    )?;
    write_file(&folder.join("kubeconfig"), kubeconfig.as_bytes())
}

async fn write<K>(api: &Api<K>, name: &str, mut object: serde_json::Value) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
{
    object["apiVersion"] = json!(K::api_version(&()));
    object["kind"] = json!(K::kind(&()));
    api.patch(
        name,
        &PatchParams::apply(FIELD_MANAGER).force(),
        &Patch::Apply(&object),
    )
    .await
    .map(drop)
    .context(|| format!("write the {} {name}", K::kind(&())))
}

async fn write_status<K>(api: &Api<K>, name: &str, status: serde_json::Value) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    api.patch_status(
        name,
        &PatchParams::default(),
        &Patch::Merge(json!({"status": status})),
    )
    .await
    .map(drop)
    .context(|| format!("write the status of the {} {name}", K::kind(&())))
}

fn is_established(crd: &CustomResourceDefinition) -> bool {
    crd.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Established" && condition.status == "True")
}

fn unreadable(what: &str, error: &dyn std::error::Error) -> Error {
    Error::Parse {
        what: what.to_owned(),
        reason: error.to_string(),
    }
}
