//! Kari's own parts: the controller in the lab, an agent in each node.
//!
//! Each runs with the credentials of its own ServiceAccount, never with the
//! administrator's.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::ConfigMap};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    cluster::NAMESPACE,
    error::{Context, Error, Result},
    images, network, node, plane,
    process::{self, Process},
    program::{self, ControlPlane},
    state::{Description, Directory, NodeName, Part, write_file},
    toolchains::{Toolchain, tool_path},
    wait::{Seen, until},
};

/// How long a part may take to be ready: the agent's canary needs a few seconds
/// on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// What agents here leave free of the machine's disk at most, in MiB: it is a
/// developer's, and apps of tests are small.
const DISK_RESERVE_MIB: u32 = 512;

/// How long an installation by the chart may take: it needs 10 s.
const INSTALL_LIMIT: Duration = Duration::from_secs(120);

/// Arguments of agents for which the chart has a value.
const VALUES: [(&str, &str); 2] = [
    ("--build-slots=", "buildSlots"),
    ("--fetch-slots=", "fetchSlots"),
];

/// How long `nsenter` may take to have its child.
const FORK_LIMIT: Duration = Duration::from_secs(5);

/// The most that is read of an answer to a health request, in bytes.
const ANSWER_LIMIT: u64 = 64 * 1024;

/// The chart's folder, beside this crate's.
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/kari");

/// The text that `kari crd` prints.
pub fn crds() -> Result<String> {
    process::run(Command::new(program::kari()?).arg("crd"))
}

/// The chart with which Kari is installed, rendered: its rules are in force in every testbed.
pub fn chart(plane: &ControlPlane) -> Result<String> {
    let helm = plane
        .component("helm")
        .unwrap_or_else(|| PathBuf::from("helm"));
    let image = "--set=image.repository=kari.invalid/kari";
    process::run(
        Command::new(helm)
            .args(["template", "kari", CHART, "--no-hooks", image])
            .arg(format!("--namespace={NAMESPACE}")),
    )
}

/// Installs Kari by its chart, as an administrator does, with the image in every
/// node's runtime already, and waits until all of it is ready.
pub async fn install(
    directory: &Directory,
    description: &Description,
    plane: &ControlPlane,
    toolchains: &[Toolchain],
) -> Result<()> {
    let work = {
        let (directory, description) = (directory.clone(), description.clone());
        move || {
            let image = images::make_kari(directory.path(), images::KARI)?;
            images::import(&directory, &description, &image.archive)
        }
    };
    blocking(work).await?;
    apply_chart(directory, description, plane, toolchains).await
}

/// Installs the chart with the values that the description asks for, or brings
/// it to them, and waits until all of it is ready.
pub async fn apply_chart(
    directory: &Directory,
    description: &Description,
    plane: &ControlPlane,
    toolchains: &[Toolchain],
) -> Result<()> {
    let (repository, tag) = images::KARI.split_once(':').unwrap_or_default();
    let mut values = json!({
        "image": {"repository": repository, "tag": tag},
        "controller": {
            "insecureSourceSchemes": true, // the git server here speaks plain http
            "extraArguments": description.controller_arguments,
        },
        "agent": {
            "httpPort": description.addresses.http_port,
            "httpsPort": description.addresses.https_port,
            "toolPath": tool_path(toolchains),
            "diskReserveMib": DISK_RESERVE_MIB,
        },
    });
    // The program takes no argument twice, and the chart gives these already.
    let mut extra = Vec::new();
    for argument in &description.agent_arguments {
        let slots = VALUES.iter().find_map(|(begin, value)| {
            let number: u32 = argument.strip_prefix(begin)?.parse().ok()?;
            Some((value, number))
        });
        match slots {
            Some((value, number)) => values["agent"][value] = json!(number),
            None => extra.push(argument),
        }
    }
    values["agent"]["extraArguments"] = json!(extra);
    add_trust(directory, &mut values).await?;
    let file = directory.join("values.json");
    write_file(&file, values.to_string().as_bytes())?;
    let mut command = Command::new(plane.required("helm")?);
    command
        .args(["upgrade", "kari", CHART, "--install", "--create-namespace"])
        .arg("--wait")
        .arg(format!("--namespace={NAMESPACE}"))
        .arg(format!("--timeout={}s", INSTALL_LIMIT.as_secs()))
        .arg("--values")
        .arg(&file)
        .env("KUBECONFIG", directory.kubeconfig());
    blocking(move || process::run(&mut command).map(drop)).await
}

/// Shows the controllers what they were given to trust, where they were. Pods
/// never see another content of a file that is mounted alone, so each has a
/// ConfigMap of its own: the files only grow.
async fn add_trust(directory: &Directory, values: &mut serde_json::Value) -> Result<()> {
    let folder = directory.join("controller");
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap_or_default();
    let (certificates, keys) = (read("certificates"), read("ssh/ssh_known_hosts"));
    if certificates.is_empty() {
        return Ok(());
    }
    let name = format!("kari-trust-{}-{}", certificates.len(), keys.len());
    let map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"certificates": certificates, "keys": keys},
    });
    let maps: Api<ConfigMap> = Api::namespaced(plane::client(directory).await?, NAMESPACE);
    let parameters = PatchParams::apply("testbed").force();
    maps.patch(&name, &parameters, &Patch::Apply(&map))
        .await
        .context(|| format!("write the ConfigMap {name}"))?;
    let mount =
        |file: &str, path: &str| json!({"name": "trust", "subPath": file, "mountPath": path});
    values["controller"]["extraVolumes"] = json!([{"name": "trust", "configMap": {"name": name}}]);
    values["controller"]["extraVolumeMounts"] = json!([
        mount("certificates", node::CERTIFICATES),
        mount("keys", node::HOST_KEYS),
    ]);
    Ok(())
}

async fn blocking(work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::State(error.to_string()))?
}

/// Gives a program files of its own in place of what the machine trusts: `folder program arguments…`.
const OWN_TRUST: &str = r#"
folder=$1
shift
mount --bind "$folder/ssh" /etc/ssh
mount --bind "$folder/certificates" /etc/ssl/certs/ca-certificates.crt
exec "$@"
"#;

/// Where the controller's own certificates and host keys are: nothing of the machine's is changed.
pub fn controller_trust(directory: &Directory) -> Result<(PathBuf, PathBuf)> {
    let folder = directory.make_folder("controller")?;
    let certificates = folder.join("certificates");
    if !certificates.exists() {
        let machine =
            std::fs::read(node::CERTIFICATES).context(|| format!("read {}", node::CERTIFICATES))?;
        write_file(&certificates, &machine)?;
    }
    let keys = directory.make_folder("controller/ssh")?;
    Ok((certificates, keys.join("ssh_known_hosts")))
}

/// Starts the controller.
pub fn start_controller(directory: &Directory, description: &Description) -> Result<()> {
    controller_trust(directory)?;
    let namespace = network::namespace(directory, description)?;
    let mut command = network::command(namespace.as_deref(), Path::new("unshare"));
    command
        .args(["--mount", "--", "sh", "-euc", OWN_TRUST, "controller"])
        .arg(directory.join("controller"))
        .arg(program::controller()?)
        .arg("controller")
        .arg(format!("--namespace={NAMESPACE}"))
        .arg(format!("--listen={}", description.addresses.controller))
        .arg("--insecure-source-schemes") // the git server here speaks plain http
        .args(&description.controller_arguments)
        .env("KUBECONFIG", directory.join("controller/kubeconfig"));
    pass_logging(&mut command);
    let log = directory.log(Part::Controller);
    let process = process::start(&command, &description.id, &log)?;
    directory.record_process(Part::Controller, process)
}

/// Waits until the controller says that it is ready.
pub async fn wait_controller(directory: &Directory, description: &Description) -> Result<()> {
    let namespace = network::namespace(directory, description)?;
    let address = description.addresses.controller;
    let process = directory.process(Part::Controller)?;
    until(
        "the controller is not ready",
        READY_LIMIT,
        || directory.log_tail(Part::Controller),
        async || {
            let answer = async {
                let mut stream = network::connect(namespace.clone(), address).await?;
                let request =
                    format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
                let action = || format!("ask {address}/readyz");
                stream.write_all(request.as_bytes()).await.context(action)?;
                let mut text = Vec::new();
                stream
                    .take(ANSWER_LIMIT)
                    .read_to_end(&mut text)
                    .await
                    .context(action)?;
                Ok::<_, Error>(String::from_utf8_lossy(&text).into_owned())
            };
            if !process.is_some_and(Process::is_alive) {
                return Seen::Never("its process ended".to_owned());
            }
            match answer.await {
                Ok(text) if text.starts_with("HTTP/1.1 200") => Seen::Ready(()),
                Ok(text) => Seen::NotYet(format!("/readyz answers {text:?}")),
                Err(error) => Seen::NotYet(error.to_string()),
            }
        },
    )
    .await
}

/// Starts the agent of a node, as a plain process in all of the node's namespaces.
pub fn start_agent(
    directory: &Directory,
    description: &Description,
    toolchains: &[Toolchain],
    name: NodeName,
) -> Result<()> {
    let init = node::init(directory, name)?;
    let mut command = node::enter(description, init, node::KARI_PROGRAM);
    command
        .arg("agent")
        .arg(format!("--node-name={name}"))
        .arg(format!("--namespace={NAMESPACE}"))
        .arg(format!("--tool-path={}", tool_path(toolchains)))
        .arg(format!("--http-port={}", description.addresses.http_port))
        .arg(format!("--https-port={}", description.addresses.https_port))
        .arg(format!("--listen={}", description.addresses.agent))
        .arg(format!("--disk-reserve-mib={DISK_RESERVE_MIB}"))
        .args(&description.agent_arguments)
        .env("KUBECONFIG", format!("{}/kubeconfig", node::CREDENTIALS));
    pass_logging(&mut command);
    let part = Part::Agent(name);
    let entered = process::start(&command, &description.id, &directory.log(part))?;
    // `nsenter` waits for the agent in a child: that one is the part.
    let start = Instant::now();
    let agent = loop {
        if let Some(agent) = entered.child() {
            break agent;
        }
        if !entered.is_alive() || start.elapsed() > FORK_LIMIT {
            return Err(Error::State(format!(
                "the agent of {name} did not start{}",
                directory.log_tail(part)
            )));
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    directory.record_process(part, agent)
}

/// Waits until the agent of a node has renewed its Lease after `since`. A
/// process that is a part of the testbed has to be alive meanwhile.
pub async fn wait_agent(
    client: &Client,
    directory: &Directory,
    name: NodeName,
    since: Timestamp,
) -> Result<()> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let agent = directory.process(Part::Agent(name))?;
    let lease = format!("kari-agent-{name}");
    until(
        &format!("the agent of {name} is not ready"),
        READY_LIMIT,
        || directory.log_tail(Part::Agent(name)),
        async || {
            if agent.is_some_and(|agent| !agent.is_alive()) {
                return Seen::Never("its process ended".to_owned());
            }
            match leases.get_opt(&lease).await {
                Ok(Some(found)) => {
                    let renewed = found
                        .spec
                        .and_then(|spec| spec.renew_time)
                        .map(|time| time.0);
                    match renewed {
                        Some(time) if time >= since => Seen::Ready(()),
                        Some(time) => Seen::NotYet(format!("its Lease was last renewed at {time}")),
                        None => Seen::NotYet("its Lease was never renewed".to_owned()),
                    }
                }
                Ok(None) => Seen::NotYet(format!("there is no Lease {lease} yet")),
                Err(error) => Seen::NotYet(error.to_string()),
            }
        },
    )
    .await
}

/// Starts the controller and every agent, and waits until all are ready.
pub async fn start_all(
    directory: &Directory,
    description: &Description,
    toolchains: &[Toolchain],
) -> Result<()> {
    let client = plane::client(directory).await?;
    let since = Timestamp::now();
    start_controller(directory, description)?;
    for name in description.node_names() {
        start_agent(directory, description, toolchains, name)?;
    }
    wait_controller(directory, description).await?;
    for name in description.node_names() {
        wait_agent(&client, directory, name, since).await?;
    }
    Ok(())
}

/// Hands on how much the caller wants to have logged.
fn pass_logging(command: &mut Command) {
    for name in ["RUST_LOG", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
}
