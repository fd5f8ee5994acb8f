//! The control plane: etcd, kube-apiserver and kube-controller-manager, and
//! where nodes have a kubelet kube-scheduler and CoreDNS. Each is its own
//! process that can be killed and started again alone.

use std::{
    net::SocketAddrV4,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    error::{Context, Error, Result},
    network,
    pki::{self, Credentials},
    process::{self, Process},
    program::ControlPlane,
    state::{Description, Directory, Network, Part, write_file},
    wait::{Seen, until},
};

/// How long the API server may take, on a busy machine too: it needs 3 s.
const APISERVER_LIMIT: Duration = Duration::from_secs(60);

/// How long CoreDNS may take: it waits 5 s for the API server's first lists.
const DNS_LIMIT: Duration = Duration::from_secs(30);

/// How long an answer of CoreDNS may take, before it is asked again.
const DNS_ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// How much garbage Go's programs gather before they collect it, in hundredths of what they need: four times the
/// default spares a tenth of all the processor time of a test, for memory.
const GARBAGE_PERCENT: &str = "400";

/// Where kube-scheduler answers health requests.
pub const SCHEDULER: SocketAddrV4 = SocketAddrV4::new(network::GATEWAY, 10259);

/// Where the cluster's DNS answers, to Pods too: it is no Service.
pub const DNS: SocketAddrV4 = SocketAddrV4::new(network::GATEWAY, 53);

/// Writes the administrator's kubeconfigs: for the machine, and for the lab.
pub fn write_kubeconfigs(directory: &Directory, description: &Description) -> Result<()> {
    let address = description.addresses.apiserver;
    let near = network::forwarded(directory, description, address)?;
    for (path, server) in [
        (directory.kubeconfig(), near),
        (directory.pki("lab.kubeconfig"), address),
    ] {
        let text = pki::kubeconfig(
            directory,
            &server.to_string(),
            &Credentials::Certificate("admin"),
        )?;
        write_file(&path, text.as_bytes())?;
    }
    Ok(())
}

/// A client with the administrator's credentials, of the calling task's runtime.
pub async fn client(directory: &Directory) -> Result<Client> {
    let path = directory.kubeconfig();
    let parse = |reason: String| Error::Parse {
        what: path.display().to_string(),
        reason,
    };
    let kubeconfig = Kubeconfig::read_from(&path).map_err(|error| parse(error.to_string()))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(|error| parse(error.to_string()))?;
    Client::try_from(config).context(|| "make a client of the API server".to_owned())
}

/// Starts etcd. It keeps its data in the testbed's folder.
pub fn start_etcd(
    directory: &Directory,
    description: &Description,
    plane: &ControlPlane,
) -> Result<()> {
    let client = format!("http://{}", description.addresses.etcd);
    let peer = format!("http://{}", description.addresses.etcd_peer);
    let arguments = [
        format!("--data-dir={}", directory.join("etcd").display()),
        // A testbed survives the end of etcd, not that of the machine.
        "--unsafe-no-fsync".to_owned(),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        "--log-level=warn".to_owned(),
    ];
    start(
        directory,
        description,
        Part::Etcd,
        &plane.required("etcd")?,
        &arguments,
    )
    .map(drop)
}

/// Starts kube-apiserver.
pub fn start_apiserver(
    directory: &Directory,
    description: &Description,
    plane: &ControlPlane,
) -> Result<()> {
    let address = description.addresses.apiserver;
    let file = |name: &str| directory.pki(name).display().to_string();
    let mut arguments = vec![
        format!("--etcd-servers=http://{}", description.addresses.etcd),
        format!("--bind-address={}", address.ip()),
        format!("--advertise-address={}", address.ip()),
        format!("--secure-port={}", address.port()),
        format!("--tls-cert-file={}", file("apiserver.crt")),
        format!("--tls-private-key-file={}", file("apiserver.key")),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--service-account-key-file={}", file("tokens.pub")),
        format!("--service-account-signing-key-file={}", file("tokens.key")),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--allow-privileged".to_owned(),
    ];
    match description.network {
        Network::Lab => {}
        // Endpoints may not name a loopback address, and nobody asks for them here.
        Network::Host => arguments.push("--endpoint-reconciler-type=none".to_owned()),
    }
    if description.kubelet {
        arguments.extend([
            // For logs, exec and what else goes through the API server to a node.
            format!(
                "--kubelet-client-certificate={}",
                file("kubelet-client.crt")
            ),
            format!("--kubelet-client-key={}", file("kubelet-client.key")),
            format!("--kubelet-certificate-authority={}", file("ca.crt")),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
        ]);
    }
    let program = plane.required("kube-apiserver")?;
    start(
        directory,
        description,
        Part::Apiserver,
        &program,
        &arguments,
    )
    .map(drop)
}

/// Waits until the API server says that it is ready.
pub async fn wait_apiserver(directory: &Directory) -> Result<()> {
    let client = client(directory).await?;
    let server = directory.process(Part::Apiserver)?;
    until(
        "the API server is not ready",
        APISERVER_LIMIT,
        || directory.log_tail(Part::Apiserver),
        async || {
            if !server.is_some_and(Process::is_alive) {
                return Seen::Never("its process ended".to_owned());
            }
            let request = http::Request::get("/readyz").body(Vec::new());
            match request {
                Ok(request) => match client.request_text(request).await {
                    Ok(_) => Seen::Ready(()),
                    Err(error) => Seen::NotYet(error.to_string()),
                },
                Err(error) => Seen::Never(error.to_string()),
            }
        },
    )
    .await
}

/// Starts kube-controller-manager, where there is one. Its garbage collector
/// learns the kinds of objects when it starts, so CRDs that are known come before it.
pub fn start_controller_manager(
    directory: &Directory,
    description: &Description,
    plane: &ControlPlane,
) -> Result<()> {
    let Some(program) = plane.component("kube-controller-manager") else {
        return Ok(());
    };
    let mut arguments = manager_arguments(directory, description.addresses.controller_manager);
    arguments.extend([
        format!("--root-ca-file={}", directory.pki("ca.crt").display()),
        format!(
            "--service-account-private-key-file={}",
            directory.pki("tokens.key").display()
        ),
    ]);
    if !description.kubelet {
        // Nobody renews the Nodes' Leases: they would be found dead and tainted.
        arguments.push("--controllers=*,-node-lifecycle-controller".to_owned());
    }
    start(
        directory,
        description,
        Part::ControllerManager,
        &program,
        &arguments,
    )
    .map(drop)
}

/// Starts kube-scheduler, without which not even a DaemonSet has Pods.
pub fn start_scheduler(
    directory: &Directory,
    description: &Description,
    plane: &ControlPlane,
) -> Result<()> {
    start(
        directory,
        description,
        Part::Scheduler,
        &plane.required("kube-scheduler")?,
        &manager_arguments(directory, SCHEDULER),
    )
    .map(drop)
}

/// Starts CoreDNS.
pub fn start_dns(
    directory: &Directory,
    description: &Description,
    plane: &ControlPlane,
) -> Result<()> {
    let corefile = format!(
        ".:{} {{
    bind {}
    errors
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {} {}
    }}
}}
",
        DNS.port(),
        DNS.ip(),
        directory.pki("lab.kubeconfig").display(),
        pki::CONTEXT,
    );
    let path = directory.join("Corefile");
    write_file(&path, corefile.as_bytes())?;
    start(
        directory,
        description,
        Part::Dns,
        &plane.required("coredns")?,
        &[path.display().to_string()],
    )
    .map(drop)
}

/// Waits until the cluster's DNS takes questions.
pub async fn wait_dns(directory: &Directory, description: &Description) -> Result<()> {
    let namespace = network::namespace(directory, description)?;
    let process = directory.process(Part::Dns)?;
    until(
        "the cluster's DNS does not answer",
        DNS_LIMIT,
        || directory.log_tail(Part::Dns),
        async || {
            if !process.is_some_and(Process::is_alive) {
                return Seen::Never("its process ended".to_owned());
            }
            match ask_dns(namespace.clone()).await {
                Ok(answer) if is_found(&answer) => Seen::Ready(()),
                Ok(_) => Seen::NotYet("it does not know the API server's Service yet".to_owned()),
                Err(error) => Seen::NotYet(error.to_string()),
            }
        },
    )
    .await
}

/// The question for the address of the Service `kubernetes`, as DNS over TCP has it (RFC 1035, 4.1 and 4.2.2):
/// CoreDNS takes connections before it knows the cluster.
const QUESTION: &[u8] = b"\x00\x36\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\
    \x0akubernetes\x07default\x03svc\x07cluster\x05local\x00\x00\x01\x00\x01";

/// The header of an answer, and its length before it.
type DnsAnswer = [u8; 14];

async fn ask_dns(namespace: Option<PathBuf>) -> Result<DnsAnswer> {
    let exchange = async {
        let mut stream = network::connect(namespace, DNS).await?;
        let action = || format!("ask {DNS}");
        stream.write_all(QUESTION).await.context(action)?;
        let mut answer = DnsAnswer::default();
        stream.read_exact(&mut answer).await.context(action)?;
        Ok(answer)
    };
    match tokio::time::timeout(DNS_ANSWER_LIMIT, exchange).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::State(format!("{DNS} does not answer"))),
    }
}

/// Whether it has no error, and a record.
fn is_found(answer: &DnsAnswer) -> bool {
    answer[5] & 0x0f == 0 && answer[8..10] != [0, 0]
}

/// What kube-controller-manager and kube-scheduler are told alike.
fn manager_arguments(directory: &Directory, address: SocketAddrV4) -> Vec<String> {
    let kubeconfig = directory.pki("lab.kubeconfig").display().to_string();
    vec![
        format!("--kubeconfig={kubeconfig}"),
        format!("--authentication-kubeconfig={kubeconfig}"),
        format!("--authorization-kubeconfig={kubeconfig}"),
        format!("--bind-address={}", address.ip()),
        format!("--secure-port={}", address.port()),
        "--leader-elect=false".to_owned(),
        "--kube-api-qps=500".to_owned(),
        "--kube-api-burst=1000".to_owned(),
    ]
}

fn start(
    directory: &Directory,
    description: &Description,
    part: Part,
    program: &Path,
    arguments: &[String],
) -> Result<Process> {
    let namespace = network::namespace(directory, description)?;
    let mut command: Command = network::command(namespace.as_deref(), program);
    command.args(arguments).env("GOGC", GARBAGE_PERCENT);
    let process = process::start(&command, &description.id, &directory.log(part))?;
    directory.record_process(part, process)?;
    Ok(process)
}
