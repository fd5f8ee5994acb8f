//! A testbed as a whole: up, down, and what can be done with it in between.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use kube::Client;
use rustix::process::Signal;
use serde::Serialize;
use tokio::net::TcpStream;

use crate::{
    cluster,
    error::{Context, Error, Result},
    git::{self, Repository},
    kari, network, node, pki, plane, prerequisites, process,
    program::{self, ControlPlane},
    state::{Description, Directory, MAX_NODES, Network, NodeName, Part},
    toolchains,
};

/// How long processes may take to be gone after SIGKILL.
const DOWN_LIMIT: Duration = Duration::from_secs(20);

/// How long a part may take to end by a signal that ends it: the API server
/// waits a minute for its watches.
const END_LIMIT: Duration = Duration::from_secs(90);

/// How long a command in a node may take.
const EXEC_LIMIT: Duration = Duration::from_secs(300);

/// What a testbed is to be made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its folder: new, empty, or left by a testbed that no longer runs. `None`
    /// for a new one in the system's folder for temporary files.
    pub directory: Option<PathBuf>,
    /// How many nodes, 1 to 99; one with [`Network::Host`].
    pub nodes: u8,
    /// How its parts are connected.
    pub network: Network,
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
    directory: Directory,
    description: Description,
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
            None => {
                Directory::new(&std::env::temp_dir().join(format!("kari-testbed-{}", new_id()?)))?
            }
        };
        // The reaper first: what follows may be killed half-way.
        let reaper = start_reaper(&directory)?;
        let mut testbed = Self::bring_up(directory, options).await?;
        testbed.reaper = Some(reaper);
        Ok(testbed)
    }

    /// As [`Testbed::up`], but it stays up until [`Testbed::down`].
    pub async fn up_and_keep(options: Options) -> Result<Self> {
        let path = options
            .directory
            .clone()
            .unwrap_or_else(Directory::default_path);
        Self::bring_up(Directory::new(&path)?, options).await
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
        let directory = Directory::new(directory)?;
        let Some(description) = directory.description()? else {
            return Ok(());
        };
        let _lock = directory.lock(true)?;
        take_down(&directory, &description)
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

    /// Serves a copy of an existing bare repository.
    pub fn mirror(&self, name: &str, bare: &Path) -> Result<Repository> {
        let name = name.parse().map_err(Error::State)?;
        git::mirror(&self.directory, &self.description, &name, bare)
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
    /// ended. A node ends by SIGKILL alone: its power is cut.
    pub async fn kill(&self, part: Part, signal: Signal) -> Result<()> {
        self.has(part)?;
        let _lock = self.directory.lock(false)?;
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
            Part::Git => git::start(directory, description).await,
            Part::Controller => {
                kari::start_controller(directory, description)?;
                if served {
                    kari::wait_controller(directory, description).await?;
                }
                Ok(())
            }
            Part::Node(name) => node::boot(directory, description, name).await,
            Part::Agent(name) => {
                let since = Timestamp::now();
                kari::start_agent(directory, description, &toolchains::find(), name)?;
                if served {
                    kari::wait_agent(&self.client().await?, directory, name, since).await?;
                }
                Ok(())
            }
        }
    }

    /// What a part has logged so far; of a node that runs, its journal.
    pub fn logs(&self, part: Part) -> Result<String> {
        self.has(part)?;
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
        let names = self.description.node_names();
        parts.extend(names.iter().copied().map(Part::Node));
        if self.description.kari {
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
            Part::Git => Some(addresses.git),
            Part::Controller => Some(addresses.controller),
            Part::Node(name) => Some(self.description.node_http(name)),
            Part::Agent(_) => Some(addresses.agent),
        }
    }

    fn has(&self, part: Part) -> Result<()> {
        match part {
            Part::Node(name) | Part::Agent(name) => {
                self.description.node(&name.to_string()).map(drop)
            }
            Part::Lab
            | Part::Forwarder
            | Part::Etcd
            | Part::Apiserver
            | Part::ControllerManager
            | Part::Git
            | Part::Controller => Ok(()),
        }
    }

    async fn bring_up(directory: Directory, options: Options) -> Result<Self> {
        check_options(&options)?;
        prerequisites::ensure()?;
        let plane = ControlPlane::ensure()?;
        let _lock = claim(&directory)?;
        let mut description = Description {
            id: new_id()?,
            network: options.network,
            nodes: options.nodes,
            kari: options.kari,
            controller_arguments: options.controller_arguments,
            agent_arguments: options.agent_arguments,
            addresses: network::choose_addresses(options.network)?,
            complete: false,
        };
        directory.write_description(&description)?;
        let started = start_parts(&directory, &description, &plane).await;
        if let Err(error) = started {
            return Err(match take_down(&directory, &description) {
                Ok(()) => error,
                Err(second) => Error::State(format!(
                    "{error}; and then could not be taken down: {second}"
                )),
            });
        }
        description.complete = true;
        directory.write_description(&description)?;
        Ok(Self {
            directory,
            description,
            reaper: None,
        })
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

/// A node of a testbed.
#[derive(Clone, Copy)]
pub struct NodeHandle<'a> {
    testbed: &'a Testbed,
    name: NodeName,
}

impl NodeHandle<'_> {
    /// Its name.
    pub fn name(&self) -> NodeName {
        self.name
    }

    /// Its address as the other parts see it.
    pub fn ip(&self) -> Ipv4Addr {
        self.testbed.description.node_address(self.name)
    }

    /// Where its proxy is reached from the machine's own network.
    pub fn forwarded_http(&self) -> Result<SocketAddrV4> {
        let testbed = self.testbed;
        let address = testbed.description.node_http(self.name);
        network::forwarded(&testbed.directory, &testbed.description, address)
    }

    /// A program in all of its namespaces, not started yet.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let init = node::init(&self.testbed.directory, self.name)?;
        Ok(node::enter(&self.testbed.description, init, program))
    }

    /// Runs a command in all of its namespaces to the end, for at most 300 s.
    ///
    /// # Errors
    /// When it cannot be run; its own failure is in the output's status.
    pub async fn exec<S: AsRef<OsStr>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> Result<Output> {
        let mut words = words.into_iter();
        let program = words
            .next()
            .ok_or_else(|| Error::State("no command was given".to_owned()))?;
        let mut command = self.command(program)?;
        command.args(words).stdin(Stdio::null());
        let running = tokio::process::Command::from(command)
            .kill_on_drop(true)
            .output();
        match tokio::time::timeout(EXEC_LIMIT, running).await {
            Ok(output) => output.context(|| format!("run a command in {}", self.name)),
            Err(_elapsed) => Err(Error::NotReady {
                what: format!("the command in {} did not end", self.name),
                limit: EXEC_LIMIT,
                seen: "it still ran".to_owned(),
                log: String::new(),
            }),
        }
    }

    /// Runs a command as [`NodeHandle::exec`] does, and returns what it printed.
    ///
    /// # Errors
    /// When it exits with another status than 0, with what it said.
    pub async fn output<S: AsRef<OsStr>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> Result<String> {
        let words: Vec<_> = words
            .into_iter()
            .map(|word| word.as_ref().to_owned())
            .collect();
        let output = self.exec(&words).await?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout)
                .trim_end()
                .to_owned());
        }
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        Err(Error::Command {
            command: words.join(" "),
            status: output.status.to_string(),
            output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// The address of its system bus, as any process of the machine sees it.
    pub fn bus_address(&self) -> Result<String> {
        Ok(node::bus_address(node::init(
            &self.testbed.directory,
            self.name,
        )?))
    }

    /// Cuts its power: every process is killed, nothing more is written.
    pub async fn power_off(&self) -> Result<()> {
        self.testbed.kill(Part::Node(self.name), Signal::KILL).await
    }

    /// Boots it, without its agent.
    pub async fn power_on(&self) -> Result<()> {
        self.testbed.start(Part::Node(self.name)).await
    }

    /// Shuts it down in order and boots it again, without its agent.
    pub async fn reboot(&self) -> Result<()> {
        node::shut_down(
            &self.testbed.directory,
            &self.testbed.description,
            self.name,
        )
        .await?;
        self.power_on().await
    }
}

async fn start_parts(
    directory: &Directory,
    description: &Description,
    plane: &ControlPlane,
) -> Result<()> {
    for folder in ["parts", "logs", "bin", "git", "nodes"] {
        directory.make_folder(folder)?;
    }
    for name in ["kubectl", "helm"] {
        if let Some(program) = plane.component(name) {
            let link = directory.join("bin").join(name);
            symlink(program, &link).context(|| format!("make {}", link.display()))?;
        }
    }
    // What asks the machine first, beside what starts.
    let kari_program = program::kari()?;
    let crds = tokio::task::spawn_blocking(kari::crds);
    let toolchains = tokio::task::spawn_blocking(toolchains::find);
    network::start(directory, description).await?;
    pki::create(directory, description)?;
    plane::write_kubeconfigs(directory, description)?;
    plane::start_etcd(directory, description, plane)?;
    plane::start_apiserver(directory, description, plane)?;
    let joined = |error: tokio::task::JoinError| Error::State(error.to_string());
    let toolchains = toolchains.await.map_err(joined)?;
    for name in description.node_names() {
        node::create(directory, name, Some(&kari_program), &toolchains)?;
    }
    let crds = crds.await.map_err(joined)??;
    let names = description.node_names();
    let boots = futures::future::try_join_all(
        names
            .iter()
            .map(|&name| node::boot(directory, description, name)),
    );
    let cluster = async {
        plane::wait_apiserver(directory).await?;
        let client = plane::client(directory).await?;
        cluster::apply_crds(&client, &crds).await?;
        plane::start_controller_manager(directory, description, plane)?;
        cluster::apply_rules(&client).await?;
        for &name in &names {
            cluster::add_node(&client, directory, description, name).await?;
        }
        cluster::add_controller(&client, directory, description).await?;
        cluster::wait_admission_policy(&client, names[0]).await?;
        cluster::wait_controller_manager(&client, || directory.log_tail(Part::ControllerManager))
            .await
    };
    futures::future::try_join3(git::start(directory, description), boots, cluster).await?;
    if description.kari {
        kari::start_all(directory, description, &toolchains).await?;
    }
    Ok(())
}

/// Ends every process, removes the cgroups and then the folder.
fn take_down(directory: &Directory, description: &Description) -> Result<()> {
    let start = Instant::now();
    // One that is ending has lost its environment already, and is waited for all the same.
    let mut left = directory.recorded_processes()?;
    loop {
        left.extend(process::of_testbed(&description.id));
        left.retain(|process| process.is_alive());
        if left.is_empty() {
            break;
        }
        if start.elapsed() > DOWN_LIMIT {
            return Err(Error::NotReady {
                what: "the testbed's processes did not end".to_owned(),
                limit: DOWN_LIMIT,
                seen: format!("{left:?}"),
                log: String::new(),
            });
        }
        for process in &left {
            process.signal(Signal::KILL)?;
        }
        for process in &left {
            process.wait_end(Duration::from_millis(100));
        }
    }
    for name in description.node_names() {
        node::remove_cgroups(&directory.node(name))?;
    }
    remove_folder(directory)
}

/// The file that makes the folder ours goes last, so that a removal which was
/// cut short can be taken up again.
fn remove_folder(directory: &Directory) -> Result<()> {
    let action = || format!("remove {}", directory.path().display());
    for entry in fs::read_dir(directory.path()).context(action)? {
        let entry = entry.context(action)?;
        if entry.file_name() == "testbed.json" {
            continue;
        }
        let removed = if entry.file_type().context(action)?.is_dir() {
            fs::remove_dir_all(entry.path())
        } else {
            fs::remove_file(entry.path())
        };
        removed.context(|| format!("remove {}", entry.path().display()))?;
    }
    fs::remove_dir_all(directory.path()).context(action)
}

/// Makes the folder and locks it. What a testbed has left there that is not up
/// any more, or never was, is taken down first.
fn claim(directory: &Directory) -> Result<File> {
    let path = directory.path();
    if let Some(left) = directory.description()? {
        let _lock = directory.lock(true)?;
        if left.complete && is_up(directory, &left)? {
            return Err(Error::State(format!(
                "a testbed is up in {0} already: `testbed down --dir {0}` first",
                path.display()
            )));
        }
        take_down(directory, &left)?;
    }
    directory.make_folder("")?;
    node::check_file_system(path)?;
    let mut entries = fs::read_dir(path).context(|| format!("read {}", path.display()))?;
    if entries.any(|entry| entry.is_ok_and(|entry| entry.file_name() != "lock")) {
        return Err(Error::State(format!(
            "{} holds other files: name a folder that is new or empty",
            path.display()
        )));
    }
    directory.lock(true)
}

fn is_up(directory: &Directory, description: &Description) -> Result<bool> {
    let recorded = |part| directory.running(part).map(|process| process.is_some());
    let mut parts = vec![Part::Etcd, Part::Apiserver];
    parts.extend(description.node_names().into_iter().map(Part::Node));
    for part in parts {
        if recorded(part)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn check_options(options: &Options) -> Result<()> {
    if options.nodes == 0 || options.nodes > MAX_NODES {
        return Err(Error::State(format!(
            "{} nodes were asked for: a testbed has 1 to {MAX_NODES}",
            options.nodes
        )));
    }
    if options.network == Network::Host && options.nodes > 1 {
        return Err(Error::State(
            "the machine's own network has room for one node: use --nodes 1, or --network lab"
                .to_owned(),
        ));
    }
    Ok(())
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

fn new_id() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")
        .context(|| "read /proc/sys/kernel/random/uuid".to_owned())?;
    Ok(uuid.chars().take(8).collect())
}
