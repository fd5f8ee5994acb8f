//! What a testbed keeps on disk. There is no daemon: a folder holds all of it.
//!
//! ```text
//! testbed.json          what this testbed is made of; the folder is ours while it is there
//! lock                  held while it, or a part of it, is changed
//! kubeconfig            the administrator's, for the machine's own network
//! bin/                  kubectl and helm of the control plane's version
//! parts/NAME.json       the process of each part
//! logs/NAME.log
//! pki/ etcd/ git/
//! controller/           credentials of Kari's controller
//! nodes/nX/             overlay layers, /var/lib/kari and the agent's credentials of a node
//! images/               what was made to be imported into nodes with a kubelet
//! ```

use std::{
    fmt, fs,
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    error::{Context, Error, Result},
    process::{self, Process},
};

/// The most nodes of one testbed: their addresses share one /24.
pub const MAX_NODES: u8 = 99;

/// How long a verb waits for another one that changes the same testbed: longer
/// than any `up` with everything built, and than any part's end.
const LOCK_LIMIT: Duration = Duration::from_secs(120);

/// How often a held lock is tried again.
const LOCK_POLL: Duration = Duration::from_millis(50);

/// A node's name: `n` and its number, 1 to [`MAX_NODES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeName(u8);

impl NodeName {
    /// The first `count` names: n1, n2, …
    pub fn first(count: u8) -> Vec<Self> {
        (1..=count).map(Self).collect()
    }

    /// Its place in the order of nodes, from 1.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "n{}", self.0)
    }
}

impl FromStr for NodeName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        text.strip_prefix('n')
            .and_then(|number| number.parse().ok())
            .filter(|number| (1..=MAX_NODES).contains(number))
            .map(Self)
            .filter(|name| name.to_string() == text)
            .ok_or_else(|| format!("{text:?} is no node: nodes are called n1, n2, …"))
    }
}

/// Something that runs in a testbed, by the name that people give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The process that holds the lab's network namespace.
    Lab,
    /// Carries connections from the machine's loopback into the lab.
    Forwarder,
    /// The store of the control plane.
    Etcd,
    /// kube-apiserver.
    Apiserver,
    /// kube-controller-manager.
    ControllerManager,
    /// kube-scheduler, where nodes have a kubelet.
    Scheduler,
    /// The cluster's DNS, where nodes have a kubelet.
    Dns,
    /// The git server.
    Git,
    /// Kari's controller.
    Controller,
    /// PID 1 of a node.
    Node(NodeName),
    /// Kari's agent on a node.
    Agent(NodeName),
}

impl Part {
    /// The name of its files.
    fn file_name(self) -> String {
        self.to_string().replace('/', "-")
    }
}

impl fmt::Display for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lab => formatter.write_str("lab"),
            Self::Forwarder => formatter.write_str("forwarder"),
            Self::Etcd => formatter.write_str("etcd"),
            Self::Apiserver => formatter.write_str("apiserver"),
            Self::ControllerManager => formatter.write_str("controller-manager"),
            Self::Scheduler => formatter.write_str("scheduler"),
            Self::Dns => formatter.write_str("dns"),
            Self::Git => formatter.write_str("git"),
            Self::Controller => formatter.write_str("controller"),
            Self::Node(name) => write!(formatter, "node/{name}"),
            Self::Agent(name) => write!(formatter, "agent/{name}"),
        }
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match (text, text.split_once('/')) {
            ("lab", _) => Ok(Self::Lab),
            ("forwarder", _) => Ok(Self::Forwarder),
            ("etcd", _) => Ok(Self::Etcd),
            ("apiserver", _) => Ok(Self::Apiserver),
            ("controller-manager", _) => Ok(Self::ControllerManager),
            ("scheduler", _) => Ok(Self::Scheduler),
            ("dns", _) => Ok(Self::Dns),
            ("git", _) => Ok(Self::Git),
            ("controller", _) => Ok(Self::Controller),
            (_, Some(("node", name))) => name.parse().map(Self::Node),
            (_, Some(("agent", name))) => name.parse().map(Self::Agent),
            _ => Err(format!(
                "{text:?} is no part: use controller, agent/nX, node/nX, apiserver, controller-manager, etcd, git, scheduler, dns, forwarder or lab"
            )),
        }
    }
}

/// How the parts reach each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// A namespace with a bridge and no way out; each node has an address.
    #[default]
    Lab,
    /// The machine's own network, with one node in it.
    Host,
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "lab" => Ok(Self::Lab),
            "host" => Ok(Self::Host),
            _ => Err(format!("{text:?} is no network: use lab or host")),
        }
    }
}

/// The addresses of a testbed, as its parts see them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Addresses {
    /// The API server's.
    pub apiserver: SocketAddrV4,
    /// etcd's for its clients.
    pub etcd: SocketAddrV4,
    /// etcd's for its peers, of which there are none.
    pub etcd_peer: SocketAddrV4,
    /// The controller manager's health endpoint.
    pub controller_manager: SocketAddrV4,
    /// The git server's.
    pub git: SocketAddrV4,
    /// The health and metrics endpoints of Kari's controller.
    pub controller: SocketAddrV4,
    /// The health and metrics endpoints of each agent, on its own node.
    pub agent: SocketAddrV4,
    /// The port of each node's proxy.
    pub http_port: u16,
    /// The port of each node's proxy for TLS.
    pub https_port: u16,
}

/// What a testbed is made of; `testbed.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    /// Tells this testbed from others on the machine: eight hexadecimal digits.
    pub id: String,
    /// How its parts are connected.
    pub network: Network,
    /// How many nodes it has.
    pub nodes: u8,
    /// Whether its nodes have a kubelet, which runs Kari's parts as Pods.
    pub kubelet: bool,
    /// Whether Kari's controller and agents belong to it.
    pub kari: bool,
    /// Further arguments of `kari controller`.
    pub controller_arguments: Vec<String>,
    /// Further arguments of each `kari agent`.
    pub agent_arguments: Vec<String>,
    /// Where its parts listen.
    pub addresses: Addresses,
    /// Whether it has once been up as a whole.
    pub complete: bool,
}

impl Description {
    /// Whether Kari's parts are processes that the testbed starts, not Pods.
    pub fn has_own_kari(&self) -> bool {
        self.kari && !self.kubelet
    }

    /// The names of its nodes.
    pub fn node_names(&self) -> Vec<NodeName> {
        NodeName::first(self.nodes)
    }

    /// A node's name, if this testbed has it.
    pub fn node(&self, text: &str) -> Result<NodeName> {
        let name: NodeName = text.parse().map_err(Error::State)?;
        if name.number() <= self.nodes {
            return Ok(name);
        }
        Err(Error::State(format!(
            "there is no node {name}: this testbed has n1 to n{}",
            self.nodes
        )))
    }

    /// A node's address as the other parts see it.
    pub fn node_address(&self, name: NodeName) -> Ipv4Addr {
        match self.network {
            Network::Lab => Ipv4Addr::new(10, 77, 0, 100 + name.number()),
            Network::Host => Ipv4Addr::LOCALHOST,
        }
    }

    /// The addresses of the Pods of a node with a kubelet, as `10.244.1.0/24`.
    pub fn pod_network(&self, name: NodeName) -> String {
        format!("10.244.{}.0/24", name.number())
    }

    /// Where a node's proxy listens, as the other parts see it.
    pub fn node_http(&self, name: NodeName) -> SocketAddrV4 {
        SocketAddrV4::new(self.node_address(name), self.addresses.http_port)
    }
}

/// The folder of a testbed.
#[derive(Clone, Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// The folder that is meant where none is named. It is on a disk, for apps
    /// are built there: /run and often /tmp are in memory.
    pub fn default_path() -> PathBuf {
        PathBuf::from("/var/lib/kari-testbed")
    }

    /// The folder of the testbed with this id, for one that ends with its process.
    pub fn temporary(id: &str) -> Result<Self> {
        Self::new(&Path::new("/var/tmp").join(format!("kari-testbed-{id}")))
    }

    /// This path, made absolute; nothing is made or read.
    pub fn new(path: &Path) -> Result<Self> {
        std::path::absolute(path)
            .map(Self)
            .context(|| format!("find {}", path.display()))
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path inside.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.0.join(path)
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.join("kubeconfig")
    }

    /// A file of the control plane's keys and certificates.
    pub fn pki(&self, file: &str) -> PathBuf {
        self.join("pki").join(file)
    }

    /// The folder of a node.
    pub fn node(&self, name: NodeName) -> PathBuf {
        self.join("nodes").join(name.to_string())
    }

    /// The log file of a part.
    pub fn log(&self, part: Part) -> PathBuf {
        self.join("logs").join(format!("{}.log", part.file_name()))
    }

    /// Makes a folder inside that only root can enter.
    pub fn make_folder(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        let folder = self.join(path);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .context(|| format!("make the folder {}", folder.display()))?;
        Ok(folder)
    }

    /// Takes the lock of a testbed: alone to bring it up or down, with others
    /// to change one of its parts.
    pub fn lock(&self, alone: bool) -> Result<File> {
        let path = self.join("lock");
        let file = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .context(|| format!("open {}", path.display()))?;
        let operation = if alone {
            FlockOperation::NonBlockingLockExclusive
        } else {
            FlockOperation::NonBlockingLockShared
        };
        let start = Instant::now();
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < LOCK_LIMIT => {
                    std::thread::sleep(LOCK_POLL);
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(Error::State(format!(
                        "another command has been changing the testbed in {} for {} s; end it first",
                        self.0.display(),
                        LOCK_LIMIT.as_secs()
                    )));
                }
                Err(error) => return Err(error).context(|| format!("lock {}", path.display())),
            }
        }
    }

    /// Reads what the testbed is made of; `None` where there is none.
    pub fn description(&self) -> Result<Option<Description>> {
        read_json(&self.join("testbed.json"))
    }

    /// Writes what the testbed is made of.
    pub fn write_description(&self, description: &Description) -> Result<()> {
        write_json(&self.join("testbed.json"), description)
    }

    /// The process of a part as last recorded, running or not.
    pub fn process(&self, part: Part) -> Result<Option<Process>> {
        read_json(&self.record(part))
    }

    /// The process of a part, if it runs.
    pub fn running(&self, part: Part) -> Result<Option<Process>> {
        Ok(self.process(part)?.filter(|process| process.is_alive()))
    }

    /// The processes of all parts as last recorded, running or not.
    pub fn recorded_processes(&self) -> Result<Vec<Process>> {
        let folder = self.join("parts");
        let mut processes = Vec::new();
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            processes.extend(read_json::<Process>(&entry.path())?);
        }
        Ok(processes)
    }

    /// Records the process of a part.
    pub fn record_process(&self, part: Part, process: Process) -> Result<()> {
        write_json(&self.record(part), &process)
    }

    /// The end of a part's log for a message, with its path; empty where there is none.
    pub fn log_tail(&self, part: Part) -> String {
        process::log_tail(&self.log(part))
    }

    fn record(&self, part: Part) -> PathBuf {
        self.join("parts")
            .join(format!("{}.json", part.file_name()))
    }
}

/// Writes a file that only root can read, whole or not at all.
pub fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    let staged = path.with_added_extension("new");
    let write = || {
        let mut file = fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&staged)?;
        io::Write::write_all(&mut file, content)?;
        fs::rename(&staged, path)
    };
    write().context(|| format!("write {}", path.display()))
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| Error::Parse {
        what: path.display().to_string(),
        reason: error.to_string(),
    })?;
    write_file(path, &text)
}

/// Reads a JSON file; `None` where there is none.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context(|| format!("read {}", path.display())),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| Error::Parse {
            what: path.display().to_string(),
            reason: error.to_string(),
        })
}
