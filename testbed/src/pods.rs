//! Kari's parts where they are Pods: killed, started again and read as the
//! processes of a plain testbed are.
//!
//! What is killed has to stay away until it is started, and a kubelet would
//! start it again at once. So the kubelet of its node is stopped first; the
//! other containers run on without it, and when it is started it knows of no
//! crash to back off from.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Pod};
use kube::{
    Api,
    api::{ListParams, ObjectList},
};
use rustix::process::Signal;

use crate::{
    cluster::NAMESPACE,
    error::{Context, Error, Result},
    kari, node, plane,
    process::{self, Process},
    state::{Description, Directory, NodeName, Part},
    wait::{Seen, until},
};

/// How long a container may take to end by a signal that ends it: Kari's parts
/// take 25 s at most.
const END_LIMIT: Duration = Duration::from_secs(60);

/// How long controllers may take to be ready again: a kubelet needs 2 s, and
/// asks every 2 s.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// The controllers' Pods.
const CONTROLLERS: &str = "app.kubernetes.io/name=kari,app.kubernetes.io/component=controller";

/// Each running container of the Pods whose names begin with the argument: its
/// id, and its process as the node numbers it.
const RUNNING: &str = r#"
filter="labels.\"io.kubernetes.container.name\"==kari,labels.\"io.kubernetes.pod.name\"~=\"^$1\""
tasks=$(ctr --namespace=k8s.io tasks list)
for container in $(ctr --namespace=k8s.io containers list --quiet "$filter"); do
    echo "$tasks" | awk -v id="$container" '$1 == id && $3 == "RUNNING" { print id, $2 }'
done
"#;

/// Sends a signal to an agent, or to the controller that leads; by one that
/// ends processes, waits until it has ended. Its node has no kubelet then.
pub async fn kill(
    directory: &Directory,
    description: &Description,
    part: Part,
    signal: Signal,
) -> Result<()> {
    let (name, pod) = match part {
        Part::Agent(name) => (name, "kari-agent-".to_owned()),
        _ => leader(directory, description).await?,
    };
    let init = node::init(directory, name)?;
    let found = running(description, init, &pod)?;
    if found.is_empty() {
        return Err(Error::State(format!("{part} is not running")));
    }
    let ends = process::ends_by(signal);
    if ends {
        systemctl(description, init, "stop")?;
    }
    for (_, pid) in found {
        let number = signal.as_raw().to_string();
        process::run(node::enter(description, init, "kill").args(["-s", &number, &pid]))?;
    }
    if !ends {
        return Ok(());
    }
    until(
        &format!("{part} did not end"),
        END_LIMIT,
        String::new,
        async || match running(description, init, &pod) {
            Ok(left) if left.is_empty() => Seen::Ready(()),
            Ok(left) => Seen::NotYet(format!("{left:?} run on {name}")),
            Err(error) => Seen::NotYet(error.to_string()),
        },
    )
    .await
}

/// Starts an agent, or all controllers, by starting their kubelets: whatever
/// else was killed on such a node comes back with it. Without the API server a
/// kubelet starts nothing, and nothing is waited for.
pub async fn start(
    directory: &Directory,
    description: &Description,
    part: Part,
    served: bool,
) -> Result<()> {
    let since = Timestamp::now();
    let names = match part {
        Part::Agent(name) => vec![name],
        _ => description.node_names(),
    };
    for &name in &names {
        if let Some(init) = directory.running(Part::Node(name))? {
            systemctl(description, init, "start")?;
        }
    }
    match part {
        _ if !served => Ok(()),
        Part::Agent(name) => {
            let client = plane::client(directory).await?;
            kari::wait_agent(&client, directory, name, since).await
        }
        _ => wait_controllers(directory, description).await,
    }
}

/// What an agent or the controllers have logged, in the order of time; nodes
/// keep it for the containers that run and the one before each.
pub fn logs(directory: &Directory, description: &Description, part: Part) -> Result<String> {
    let (names, pod) = match part {
        Part::Agent(name) => (vec![name], "kari-agent-"),
        _ => (description.node_names(), "kari-controller-"),
    };
    let mut lines = Vec::new();
    for name in names {
        // A node that is off has its files, too.
        let folder = directory.node(name).join("upper/var/log/pods");
        for pods in entries(&folder)? {
            let of_part = pods.file_name().is_some_and(|file| {
                file.to_string_lossy()
                    .starts_with(&format!("{NAMESPACE}_{pod}"))
            });
            if !of_part {
                continue;
            }
            for file in entries(&pods.join("kari"))? {
                let text = fs::read(&file).context(|| format!("read {}", file.display()))?;
                let text = String::from_utf8_lossy(&text);
                lines.extend(text.lines().map(str::to_owned));
            }
        }
    }
    // Each begins with its time, the stream, and whether it is whole.
    lines.sort();
    let mut text = String::new();
    for line in &lines {
        let mut fields = line.splitn(4, ' ').skip(2);
        let is_whole = fields.next() == Some("F");
        text.push_str(fields.next().unwrap_or_default());
        if is_whole {
            text.push('\n');
        }
    }
    Ok(text)
}

/// The node and the Pod of the controller that leads.
async fn leader(directory: &Directory, description: &Description) -> Result<(NodeName, String)> {
    let client = plane::client(directory).await?;
    let leases: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let lease = leases
        .get("kari-controller")
        .await
        .context(|| "read the controllers' Lease".to_owned())?;
    let holder = lease.spec.and_then(|spec| spec.holder_identity);
    let holder = holder.unwrap_or_default();
    // A Pod's host name is its own.
    let (pod, _) = holder
        .split_once('_')
        .ok_or_else(|| Error::State("no controller leads".to_owned()))?;
    let pods: Api<Pod> = Api::namespaced(client, NAMESPACE);
    let found = pods
        .get(pod)
        .await
        .context(|| format!("read the Pod {pod}"))?;
    let node = found.spec.and_then(|spec| spec.node_name);
    Ok((description.node(&node.unwrap_or_default())?, pod.to_owned()))
}

/// Waits until each controller's container runs, and its Pod says of this very
/// one that it is ready: until its kubelet is back it says so of the one before.
async fn wait_controllers(directory: &Directory, description: &Description) -> Result<()> {
    let client = plane::client(directory).await?;
    let pods: Api<Pod> = Api::namespaced(client, NAMESPACE);
    let parameters = ListParams::default().labels(CONTROLLERS);
    let look = async || {
        let mut ids = BTreeSet::new();
        for name in description.node_names() {
            if let Some(init) = directory.running(Part::Node(name))? {
                let found = running(description, init, "kari-controller-")?;
                ids.extend(
                    found
                        .into_iter()
                        .map(|(id, _)| format!("containerd://{id}")),
                );
            }
        }
        let found = pods.list(&parameters).await;
        let found = found.context(|| "list the controllers".to_owned())?;
        Ok::<_, Error>(ready(&found) == ids && ids.len() == found.items.len())
    };
    until(
        "the controllers are not ready",
        READY_LIMIT,
        || logs(directory, description, Part::Controller).unwrap_or_default(),
        async || match look().await {
            Ok(true) => Seen::Ready(()),
            Ok(false) => Seen::NotYet("not all are".to_owned()),
            Err(error) => Seen::NotYet(error.to_string()),
        },
    )
    .await
}

/// The containers that their Pods call ready.
fn ready(pods: &ObjectList<Pod>) -> BTreeSet<String> {
    let statuses = pods.iter().filter_map(|pod| pod.status.as_ref());
    statuses
        .flat_map(|status| status.container_statuses.iter().flatten())
        .filter(|container| container.ready)
        .filter_map(|container| container.container_id.clone())
        .collect()
}

fn running(description: &Description, init: Process, pod: &str) -> Result<Vec<(String, String)>> {
    let mut command = node::enter(description, init, "bash");
    let text = process::run(command.args(["-euo", "pipefail", "-c", RUNNING, "running", pod]))?;
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    Ok(pairs
        .map(|(id, pid)| (id.to_owned(), pid.to_owned()))
        .collect())
}

fn systemctl(description: &Description, init: Process, verb: &str) -> Result<()> {
    let mut command = node::enter(description, init, "systemctl");
    process::run(command.args([verb, "kubelet.service"])).map(drop)
}

/// What is in a folder; nothing where there is none.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let action = || format!("read {}", folder.display());
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        found => found
            .context(action)?
            .map(|entry| Ok(entry.context(action)?.path()))
            .collect(),
    }
}
