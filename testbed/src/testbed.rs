//! A testbed as callers use it, from up to down.

use std::{
    ffi::OsStr,
    fs, io,
    net::SocketAddrV4,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use jiff::Timestamp;
use kube::Client;
use rustix::process::Signal;
use serde::Serialize;
use tokio::net::TcpStream;

use crate::{
    error::{Context, Error, Result},
    git::{self, Repository},
    images, kari, lifecycle, network, node,
    node_handle::NodeHandle,
    plane, pods, process,
    program::{self, ControlPlane},
    state::{Description, Directory, Network, NodeName, Part},
    toolchains,
};

/// How long a part may take to end by a signal that ends it: the API server
/// waits a minute for its watches.
const END_LIMIT: Duration = Duration::from_secs(90);

/// What a testbed is to be made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its folder: new, empty, or left by a testbed that no longer runs. `None`
    /// for a new one below /var/tmp.
    pub directory: Option<PathBuf>,
    /// How many nodes, 1 to 99; one with [`Network::Host`].
    pub nodes: u8,
    /// How its parts are connected.
    pub network: Network,
    /// Whether nodes get a kubelet, a container runtime and kube-proxy. Kari is
    /// installed by its chart then, and its agents are Pods.
    pub kubelet: bool,
    /// Whether Kari's controller and agents are started.
    pub kari: bool,
    /// Further arguments of `kari controller`.
    pub controller_arguments: Vec<String>,
    /// Further arguments of each `kari agent`.
    pub agent_arguments: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            directory: None,
            nodes: 1,
            network: Network::Lab,
            kubelet: false,
            kari: true,
            controller_arguments: Vec::new(),
            agent_arguments: Vec::new(),
        }
    }
}

/// A testbed. One that [`Testbed::up`] made is taken down when it is dropped,
/// and also when its process ends in any other way.
///
/// It holds nothing of an async runtime, so the tests of one program can share
/// one in a `static` `tokio::sync::OnceCell`.
pub struct Testbed {
    pub(crate) directory: Directory,
    pub(crate) description: Description,
    /// The process that takes it down when this one ends; its standard input
    /// is open as long as this handle exists.
    reaper: Option<Child>,
}

/// A part, as `testbed status` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The part's name.
    pub part: String,
    /// `running`, `stopped` (by a signal), `ended`; a node says what systemd says.
    pub state: String,
    /// Its process in the machine's PID namespace, unless it has ended.
    pub pid: Option<i32>,
    /// Where it listens, as the other parts see it.
    pub address: Option<String>,
    /// Where that is reached from the machine's own network.
    pub forwarded: Option<String>,
    /// Its log file.
    pub log: PathBuf,
}

impl Testbed {
    /// Brings a testbed up and returns when all of it is ready.
    ///
    /// # Errors
    /// Says what did not become ready, with the end of its log; nothing is left
    /// behind then.
    pub async fn up(options: Options) -> Result<Self> {
        let directory = match &options.directory {
            Some(path) => Directory::new(path)?,
            None => Directory::temporary(&lifecycle::new_id()?)?,
        };
        // The reaper first: what follows may be killed half-way.
        let reaper = start_reaper(&directory)?;
        let description = lifecycle::bring_up(&directory, options).await?;
        Ok(Self {
            directory,
            description,
            reaper: Some(reaper),
        })
    }

    /// As [`Testbed::up`], but it stays up until [`Testbed::down`].
    pub async fn up_and_keep(options: Options) -> Result<Self> {
        let path = options
            .directory
            .clone()
            .unwrap_or_else(Directory::default_path);
        let directory = Directory::new(&path)?;
        let description = lifecycle::bring_up(&directory, options).await?;
        Ok(Self {
            directory,
            description,
            reaper: None,
        })
    }

    /// A testbed that is up, in its folder. Dropping this changes nothing.
    pub fn attach(directory: &Path) -> Result<Self> {
        let directory = Directory::new(directory)?;
        let description = directory
            .description()?
            .ok_or_else(|| Error::Absent(directory.path().to_owned()))?;
        Ok(Self {
            directory,
            description,
            reaper: None,
        })
    }

    /// Takes down whatever there is in a folder: every process, cgroup, mount
    /// and file. Where there is no testbed it does nothing.
    pub fn down(directory: &Path) -> Result<()> {
        lifecycle::take_down(&Directory::new(directory)?)
    }

    /// Its folder.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What it is made of.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The administrator's kubeconfig, for the machine's own network.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.kubeconfig()
    }

    /// A client with the administrator's credentials. Each belongs to the async
    /// runtime in which it was made.
    pub async fn client(&self) -> Result<Client> {
        plane::client(&self.directory).await
    }

    /// Runs `kubectl` with the administrator's kubeconfig and returns what it printed.
    ///
    /// # Errors
    /// When it exits with another status than 0, with what it said.
    pub async fn kubectl<S: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<String> {
        let mut command = Command::new(self.directory.join("bin/kubectl"));
        command.args(arguments).env("KUBECONFIG", self.kubeconfig());
        tokio::task::spawn_blocking(move || process::run(&mut command))
            .await
            .map_err(|error| Error::State(error.to_string()))?
    }

    /// A node by its name.
    pub fn node(&self, name: &str) -> Result<NodeHandle<'_>> {
        Ok(NodeHandle {
            testbed: self,
            name: self.description.node(name)?,
        })
    }

    /// All nodes, in order.
    pub fn nodes(&self) -> Vec<NodeHandle<'_>> {
        let names = self.description.node_names();
        names
            .into_iter()
            .map(|name| NodeHandle {
                testbed: self,
                name,
            })
            .collect()
    }

    /// Commits a folder's files to `main` of a repository, made if new.
    pub fn git_repository(&self, name: &str, folder: &Path, message: &str) -> Result<Repository> {
        let name = name.parse().map_err(Error::State)?;
        git::commit(&self.directory, &self.description, &name, folder, message)
    }

    /// Tags the head of `main` of a repository.
    pub fn git_tag(&self, name: &str, tag: &str) -> Result<()> {
        let name = name.parse().map_err(Error::State)?;
        git::tag(&self.directory, &name, tag)
    }

    /// Serves a copy of an existing bare repository.
    pub fn mirror(&self, name: &str, bare: &Path) -> Result<Repository> {
        let name = name.parse().map_err(Error::State)?;
        git::mirror(&self.directory, &self.description, &name, bare)
    }

    /// Makes the controller and every node trust a certificate authority, in PEM.
    pub async fn trust_authority(&self, certificate: &str) -> Result<()> {
        let (certificates, _) = kari::controller_trust(&self.directory)?;
        self.trust(&certificates, node::CERTIFICATES, certificate)
            .await
    }

    /// Makes the controller and every node know a host key: a line of `ssh_known_hosts`.
    pub async fn trust_host_key(&self, line: &str) -> Result<()> {
        let (_, keys) = kari::controller_trust(&self.directory)?;
        self.trust(&keys, node::HOST_KEYS, line).await
    }

    async fn trust(&self, of_controller: &Path, in_node: &str, text: &str) -> Result<()> {
        // In place: the controller has this very file.
        let text = format!("{}\n", text.trim_end());
        let append = || -> std::io::Result<()> {
            let mut file = std::fs::OpenOptions::new()
                .append(true)
                .create(true)
                .open(of_controller)?;
            std::io::Write::write_all(&mut file, text.as_bytes())
        };
        append().context(|| format!("write {}", of_controller.display()))?;
        for node in self.nodes() {
            // For all to read, as on any machine.
            let script = r#"printf %s "$1" >>"$2" && chmod a+r "$2""#;
            node.output(["sh", "-euc", script, "trust", &text, in_node])
                .await?;
        }
        if self.description.kubelet && self.description.kari {
            return self.apply_chart(&self.description).await;
        }
        Ok(())
    }

    async fn apply_chart(&self, description: &Description) -> Result<()> {
        let (plane, toolchains) = (ControlPlane::ensure()?, toolchains::find());
        kari::apply_chart(&self.directory, description, &plane, &toolchains).await
    }

    /// Imports an image archive, of OCI or of Docker, into every node with a kubelet.
    pub fn load_image(&self, archive: &Path) -> Result<()> {
        if !self.description.kubelet {
            return Err(Error::State(
                "nodes here have no container runtime: `testbed up --kubelet`".to_owned(),
            ));
        }
        images::import(&self.directory, &self.description, archive)
    }

    /// Connects to an address as a process in the lab does.
    pub async fn lab_connect(&self, address: SocketAddrV4) -> Result<TcpStream> {
        let namespace = network::namespace(&self.directory, &self.description)?;
        network::connect(namespace, address).await
    }

    /// A program that runs in the lab's network, for instance `curl`; nodes are
    /// reached from there at their addresses.
    pub fn lab_command(&self, program: impl AsRef<Path>) -> Result<Command> {
        let namespace = network::namespace(&self.directory, &self.description)?;
        Ok(network::command(namespace.as_deref(), program.as_ref()))
    }

    /// Sends a signal to a part; by one that ends processes, waits until it has
    /// ended. A node ends by SIGKILL alone: its power is cut. Where Kari's parts
    /// are Pods, the controller is the one that leads, and the kubelet beside
    /// what has ended is stopped: it stays away until it is started.
    pub async fn kill(&self, part: Part, signal: Signal) -> Result<()> {
        self.has(part)?;
        let _lock = self.directory.lock(false)?;
        if self.is_pod(part) {
            return pods::kill(&self.directory, &self.description, part, signal).await;
        }
        let Some(process) = self.directory.running(part)? else {
            return Err(Error::State(format!("{part} is not running")));
        };
        if let (Part::Node(name), Signal::KILL) = (part, signal) {
            return node::power_off(&self.directory, name);
        }
        process.signal(signal)?;
        if !process::ends_by(signal) {
            return Ok(());
        }
        let ended = tokio::task::spawn_blocking(move || process.wait_end(END_LIMIT));
        if ended
            .await
            .map_err(|error| Error::State(error.to_string()))?
        {
            return Ok(());
        }
        Err(Error::NotReady {
            what: format!("{part} did not end"),
            limit: END_LIMIT,
            seen: format!("process {} still runs", process.pid),
            log: self.directory.log_tail(part),
        })
    }

    /// Starts a part that is not running, and waits until it is ready; what
    /// needs the API server for that is not waited for while that is away. A
    /// node boots without its agent.
    pub async fn start(&self, part: Part) -> Result<()> {
        self.has(part)?;
        let _lock = self.directory.lock(false)?;
        if self.is_pod(part) {
            let served = self.directory.running(Part::Apiserver)?.is_some();
            return pods::start(&self.directory, &self.description, part, served).await;
        }
        if self.directory.running(part)?.is_some() {
            return Err(Error::State(format!("{part} is running already")));
        }
        let (directory, description) = (&self.directory, &self.description);
        let served = directory.running(Part::Apiserver)?.is_some();
        match part {
            Part::Lab | Part::Forwarder => Err(Error::State(format!(
                "{part} cannot be started alone: `testbed down`, then `testbed up`"
            ))),
            Part::Etcd => {
                plane::start_etcd(directory, description, &ControlPlane::ensure()?)?;
                if served {
                    plane::wait_apiserver(directory).await?;
                }
                Ok(())
            }
            Part::Apiserver => {
                plane::start_apiserver(directory, description, &ControlPlane::ensure()?)?;
                plane::wait_apiserver(directory).await
            }
            Part::ControllerManager => {
                plane::start_controller_manager(directory, description, &ControlPlane::ensure()?)
            }
            Part::Scheduler => {
                plane::start_scheduler(directory, description, &ControlPlane::ensure()?)
            }
            Part::Dns => {
                plane::start_dns(directory, description, &ControlPlane::ensure()?)?;
                plane::wait_dns(directory, description).await
            }
            Part::Git => git::start(directory, description).await,
            Part::Controller => {
                kari::start_controller(directory, description)?;
                if served {
                    kari::wait_controller(directory, description).await?;
                }
                Ok(())
            }
            Part::Node(name) => node::boot(directory, description, name).await,
            Part::Agent(name) => self.run_agent(description, name, served).await,
        }
    }

    /// Starts the agent of a node, which must not run, with these arguments in the place of
    /// [`Options::agent_arguments`], for this one time; where agents are Pods, all of them and for good.
    pub async fn start_agent_with(&self, name: NodeName, arguments: &[&str]) -> Result<()> {
        let part = Part::Agent(name);
        self.has(part)?;
        let _lock = self.directory.lock(false)?;
        let description = Description {
            agent_arguments: arguments.iter().map(|&word| word.to_owned()).collect(),
            ..self.description.clone()
        };
        let served = self.directory.running(Part::Apiserver)?.is_some();
        if self.is_pod(part) {
            pods::start(&self.directory, &description, part, served).await?;
            return self.apply_chart(&description).await;
        }
        if self.directory.running(part)?.is_some() {
            return Err(Error::State(format!("{part} is running already")));
        }
        self.run_agent(&description, name, served).await
    }

    async fn run_agent(
        &self,
        description: &Description,
        name: NodeName,
        served: bool,
    ) -> Result<()> {
        let (directory, since) = (&self.directory, Timestamp::now());
        kari::start_agent(directory, description, &toolchains::find(), name)?;
        if served {
            kari::wait_agent(&self.client().await?, directory, name, since).await?;
        }
        Ok(())
    }

    /// What a part has logged so far; of a node that runs, its journal.
    pub fn logs(&self, part: Part) -> Result<String> {
        self.has(part)?;
        if self.is_pod(part) {
            return pods::logs(&self.directory, &self.description, part);
        }
        if let Part::Node(name) = part
            && let Some(init) = self.directory.running(part)?
        {
            let mut command = node::enter(&self.description, init, "journalctl");
            command.args(["--no-pager", "--boot"]);
            return process::run(&mut command).map_err(|error| match error {
                Error::Command { .. } => {
                    Error::State(format!("the journal of {name} cannot be read: {error}"))
                }
                other => other,
            });
        }
        let path = self.directory.log(part);
        match fs::read(&path) {
            Ok(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error).context(|| format!("read {}", path.display())),
        }
    }

    /// Every part, with what there is to know about it.
    pub async fn status(&self) -> Result<Vec<Status>> {
        let mut statuses = Vec::new();
        for part in self.parts() {
            let process = self.directory.running(part)?;
            let state = match (part, process) {
                (_, None) => "ended".to_owned(),
                (Part::Node(_), Some(init)) => {
                    node::system_state(init).await.unwrap_or_else(|error| {
                        format!("running, but its bus does not answer: {error}")
                    })
                }
                (_, Some(process)) if process.is_stopped() => "stopped".to_owned(),
                (_, Some(_)) => "running".to_owned(),
            };
            let address = self.address(part);
            let forwarded = address.and_then(|address| {
                network::forwarded(&self.directory, &self.description, address).ok()
            });
            statuses.push(Status {
                part: part.to_string(),
                state,
                pid: process.map(|process| process.pid),
                address: address.map(|address| address.to_string()),
                forwarded: forwarded.map(|address| address.to_string()),
                log: self.directory.log(part),
            });
        }
        Ok(statuses)
    }

    fn parts(&self) -> Vec<Part> {
        let mut parts = match self.description.network {
            Network::Lab => vec![Part::Lab, Part::Forwarder],
            Network::Host => Vec::new(),
        };
        parts.extend([
            Part::Etcd,
            Part::Apiserver,
            Part::ControllerManager,
            Part::Git,
        ]);
        if self.description.kubelet {
            parts.extend([Part::Scheduler, Part::Dns]);
        }
        let names = self.description.node_names();
        parts.extend(names.iter().copied().map(Part::Node));
        if self.description.has_own_kari() {
            parts.push(Part::Controller);
            parts.extend(names.into_iter().map(Part::Agent));
        }
        parts
    }

    fn address(&self, part: Part) -> Option<SocketAddrV4> {
        let addresses = &self.description.addresses;
        match part {
            Part::Lab | Part::Forwarder => None,
            Part::Etcd => Some(addresses.etcd),
            Part::Apiserver => Some(addresses.apiserver),
            Part::ControllerManager => Some(addresses.controller_manager),
            Part::Scheduler => Some(plane::SCHEDULER),
            Part::Dns => Some(plane::DNS),
            Part::Git => Some(addresses.git),
            Part::Controller => Some(addresses.controller),
            Part::Node(name) => Some(self.description.node_http(name)),
            Part::Agent(_) => Some(addresses.agent),
        }
    }

    /// Whether a part is one of Kari's, which run as Pods here.
    fn is_pod(&self, part: Part) -> bool {
        self.description.kubelet && matches!(part, Part::Controller | Part::Agent(_))
    }

    fn has(&self, part: Part) -> Result<()> {
        let here = match part {
            Part::Node(name) | Part::Agent(name) => {
                return self.description.node(&name.to_string()).map(drop);
            }
            Part::Scheduler | Part::Dns => self.description.kubelet,
            Part::Lab
            | Part::Forwarder
            | Part::Etcd
            | Part::Apiserver
            | Part::ControllerManager
            | Part::Controller
            | Part::Git => true,
        };
        if here {
            return Ok(());
        }
        Err(Error::State(format!(
            "{part} is there only where nodes have a kubelet: `testbed up --kubelet`"
        )))
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        let Some(mut reaper) = self.reaper.take() else {
            return;
        };
        if let Err(error) = Self::down(self.directory.path()) {
            eprintln!("testbed: {error}");
        }
        drop(reaper.stdin.take());
        let _ = reaper.wait();
    }
}

fn start_reaper(directory: &Directory) -> Result<Child> {
    Command::new("setsid")
        .arg(program::testbed()?)
        .arg("__reap")
        .arg("--dir")
        .arg(directory.path())
        .stdin(Stdio::piped())
        .spawn()
        .context(|| "start the process that takes the testbed down".to_owned())
}
