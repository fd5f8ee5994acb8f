//! The command `testbed`: arguments, signals and what people read; nothing else.

use std::{
    io::Write,
    net::SocketAddrV4,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};
use rustix::process::Signal;
use testbed::{
    Error, Network, Options, Part, Result, Status, Testbed, git, network, node, prerequisites,
    process::parse_signal, program, state::Directory,
};
use tokio::signal::unix::{SignalKind, signal};

/// A real Kubernetes control plane, real systemd nodes and a git server on this
/// machine, with Kari on them.
#[derive(Parser)]
#[command(name = "testbed", version)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring all up; prints `export KUBECONFIG=…` when it is ready
    Up {
        #[command(flatten)]
        folder: Folder,
        /// How many nodes: n1, n2, …
        #[arg(long, default_value_t = 1)]
        nodes: u8,
        /// lab: a network of their own with no way out; host: this machine's, with one node, for builds that fetch packages
        #[arg(long, default_value = "lab")]
        network: Network,
        /// Nodes with a kubelet, containerd and kube-proxy, in a cluster with DNS; Kari is installed there by its chart
        #[arg(long)]
        kubelet: bool,
        /// Stop before Kari's controller and agents
        #[arg(long)]
        no_kari: bool,
        /// A further argument of `kari controller` (can be repeated)
        #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
        controller_argument: Vec<String>,
        /// A further argument of each `kari agent` (can be repeated)
        #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
        agent_argument: Vec<String>,
    },
    /// Install what a testbed needs of this machine, or say what is missing; `up` does it, too
    Prerequisites {
        /// And what nodes with a kubelet need
        #[arg(long)]
        kubelet: bool,
    },
    /// Show each part: process, address, state, log file
    Status {
        #[command(flatten)]
        folder: Folder,
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Commit a folder's files to `main` of a repository, made if new; prints its URL and the commit, a line each
    Git {
        #[command(flatten)]
        folder: Folder,
        /// The repository's name, as in its URL
        name: String,
        /// The folder to commit
        #[arg(
            value_name = "FOLDER",
            required_unless_present = "mirror",
            conflicts_with = "mirror"
        )]
        source: Option<PathBuf>,
        /// The commit's message
        #[arg(long, default_value = "change", conflicts_with = "mirror")]
        message: String,
        /// Serve a copy of this existing bare repository instead
        #[arg(long, value_name = "BARE_REPOSITORY")]
        mirror: Option<PathBuf>,
    },
    /// Run a command in a node
    Exec {
        #[command(flatten)]
        folder: Folder,
        /// The node: n1, n2, …
        node: String,
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "COMMAND")]
        words: Vec<String>,
    },
    /// Send a signal to a part, and wait until it has ended by it
    Kill {
        #[command(flatten)]
        folder: Folder,
        /// controller, agent/nX, node/nX, apiserver, controller-manager, etcd, git; with --kubelet scheduler, dns
        part: Part,
        /// HUP, INT, QUIT, KILL, USR1, USR2, TERM, CONT or STOP [default: TERM for the controller and agents, KILL for all else]
        #[arg(long, value_parser = parse_signal)]
        signal: Option<Signal>,
    },
    /// Start a part that was killed; a node boots without its agent
    Start {
        #[command(flatten)]
        folder: Folder,
        /// controller, agent/nX, node/nX, apiserver, controller-manager, etcd, git; with --kubelet scheduler, dns
        part: Part,
    },
    /// Import an image archive into every node with a kubelet
    LoadImage {
        #[command(flatten)]
        folder: Folder,
        /// The archive, of OCI or of Docker
        #[arg(value_name = "ARCHIVE")]
        archive: PathBuf,
    },
    /// Print what a part has logged; of a node that runs, its journal
    Logs {
        #[command(flatten)]
        folder: Folder,
        /// The part
        part: Part,
    },
    /// Print where a program of the control plane is, built where that was not done yet: helm, kubectl, …
    Program {
        /// Its name
        name: String,
    },
    /// Take all down: no process, cgroup, mount or file is left
    Down {
        #[command(flatten)]
        folder: Folder,
    },
    /// A testbed's forwarder
    #[command(name = "__forward", hide = true)]
    Forward {
        #[arg(long)]
        namespace: PathBuf,
        #[arg(long)]
        map: PathBuf,
        targets: Vec<SocketAddrV4>,
    },
    /// A testbed's git server
    #[command(name = "__serve-git", hide = true)]
    ServeGit {
        #[arg(long)]
        root: PathBuf,
        #[arg(long)]
        listen: SocketAddrV4,
    },
    /// Takes a testbed down at the end of standard input
    #[command(name = "__reap", hide = true)]
    Reap {
        #[command(flatten)]
        folder: Folder,
    },
}

#[derive(Args)]
struct Folder {
    /// The testbed's folder, on a disk [default: /var/lib/kari-testbed]
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

impl Folder {
    fn path(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(Directory::default_path)
    }

    fn attach(&self) -> Result<Testbed> {
        Testbed::attach(&self.path())
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            let mut text = format!("testbed: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(next) = cause {
                text.push_str(&format!(": {next}"));
                cause = next.source();
            }
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Up {
            folder,
            nodes,
            network,
            kubelet,
            no_kari,
            controller_argument,
            agent_argument,
        } => {
            let options = Options {
                directory: Some(folder.path()),
                nodes,
                network,
                kubelet,
                kari: !no_kari,
                controller_arguments: controller_argument,
                agent_arguments: agent_argument,
            };
            return block_on(up(&folder.path(), options));
        }
        Verb::Prerequisites { kubelet } => prerequisites::ensure(kubelet)?,
        Verb::Status { folder, json } => {
            let testbed = folder.attach()?;
            let statuses = block_on(testbed.status())?;
            print_status(&statuses, json)?;
        }
        Verb::Git {
            folder,
            name,
            source,
            message,
            mirror,
        } => {
            let testbed = folder.attach()?;
            let repository = match (source, mirror) {
                (Some(source), _) => testbed.git_repository(&name, &source, &message)?,
                (None, Some(bare)) => testbed.mirror(&name, &bare)?,
                (None, None) => return Err(Error::State("name a folder or --mirror".to_owned())),
            };
            print(&format!("{}\n{}\n", repository.url, repository.commit))?;
        }
        Verb::Exec {
            folder,
            node,
            words,
        } => {
            let testbed = folder.attach()?;
            let name = testbed.description().node(&node)?;
            let init = node::init(&Directory::new(testbed.directory())?, name)?;
            return Err(node::become_command(testbed.description(), init, &words));
        }
        Verb::Kill {
            folder,
            part,
            signal,
        } => {
            let ends = match part {
                Part::Controller | Part::Agent(_) => Signal::TERM,
                Part::Lab
                | Part::Forwarder
                | Part::Etcd
                | Part::Apiserver
                | Part::ControllerManager
                | Part::Scheduler
                | Part::Dns
                | Part::Git
                | Part::Node(_) => Signal::KILL,
            };
            block_on(folder.attach()?.kill(part, signal.unwrap_or(ends)))?;
        }
        Verb::Start { folder, part } => block_on(folder.attach()?.start(part))?,
        Verb::LoadImage { folder, archive } => folder.attach()?.load_image(&archive)?,
        Verb::Logs { folder, part } => print(&folder.attach()?.logs(part)?)?,
        Verb::Program { name } => {
            let path = program::ControlPlane::ensure()?.required(&name)?;
            print(&format!("{}\n", path.display()))?;
        }
        Verb::Down { folder } => Testbed::down(&folder.path())?,
        Verb::Forward {
            namespace,
            map,
            targets,
        } => network::forward(&namespace, &map, &targets)?,
        Verb::ServeGit { root, listen } => block_on(git::serve(root, listen))?,
        Verb::Reap { folder } => {
            // Whatever is read, and however reading ends, the other side is gone.
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            Testbed::down(&folder.path())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn up(folder: &Path, options: Options) -> Result<ExitCode> {
    let failed = |source| Error::Io {
        action: "listen for signals".to_owned(),
        source,
    };
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let testbed = tokio::select! {
        testbed = Testbed::up_and_keep(options) => testbed?,
        _ = async { tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} } } => {
            eprintln!("interrupted: taking down what is up …");
            Testbed::down(folder)?;
            return Ok(ExitCode::from(130));
        }
    };
    eprintln!(
        "ready; kubectl and helm are in {}",
        testbed.directory().join("bin").display()
    );
    print(&format!(
        "export KUBECONFIG={}\n",
        testbed.kubeconfig().display()
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn print_status(statuses: &[Status], json: bool) -> Result<()> {
    if json {
        let text = serde_json::to_string_pretty(statuses).map_err(|error| Error::Parse {
            what: "the status".to_owned(),
            reason: error.to_string(),
        })?;
        return print(&format!("{text}\n"));
    }
    let dash = || "-".to_owned();
    let mut rows = vec![["PART", "STATE", "PID", "ADDRESS", "FROM HERE", "LOG"].map(str::to_owned)];
    rows.extend(statuses.iter().map(|status| {
        [
            status.part.clone(),
            status.state.clone(),
            status.pid.map_or_else(dash, |pid| pid.to_string()),
            status.address.clone().unwrap_or_else(dash),
            status.forwarded.clone().unwrap_or_else(dash),
            status.log.display().to_string(),
        ]
    }));
    let widths: Vec<usize> = (0..6)
        .map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    print(&text)
}

/// Prints; a reader that has gone (`| head`) is no error.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::Io {
            action: "write to standard output".to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Io {
            action: "start".to_owned(),
            source,
        })?
        .block_on(work)
}
