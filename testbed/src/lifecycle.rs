//! How a testbed comes up as a whole, and how it goes down without a rest.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    time::{Duration, Instant},
};

use kube::Client;
use rustix::process::Signal;

use crate::{
    cluster,
    error::{Context, Error, Result},
    git, images, kari, kubelet, network, node, pki, plane, prerequisites, process,
    program::{self, ControlPlane},
    state::{Description, Directory, MAX_NODES, Network, Part},
    testbed::Options,
    toolchains::{self, Toolchain},
};

/// How long processes may take to be gone after SIGKILL.
const DOWN_LIMIT: Duration = Duration::from_secs(20);

/// Brings a testbed up in a folder and returns what it is made of, when all of
/// it is ready; after a failure nothing is left.
pub async fn bring_up(directory: &Directory, options: Options) -> Result<Description> {
    check_options(&options)?;
    prerequisites::ensure(options.kubelet)?;
    let plane = ControlPlane::ensure()?;
    let _lock = claim(directory)?;
    let mut description = Description {
        id: new_id()?,
        network: options.network,
        nodes: options.nodes,
        kubelet: options.kubelet,
        kari: options.kari,
        controller_arguments: options.controller_arguments,
        agent_arguments: options.agent_arguments,
        addresses: network::choose_addresses(options.network)?,
        complete: false,
    };
    directory.write_description(&description)?;
    let started = start_parts(directory, &description, &plane).await;
    if let Err(error) = started {
        return Err(match end(directory, &description) {
            Ok(()) => error,
            Err(second) => Error::State(format!(
                "{error}; and then could not be taken down: {second}"
            )),
        });
    }
    description.complete = true;
    directory.write_description(&description)?;
    Ok(description)
}

/// Takes down whatever there is in a folder: every process, cgroup, mount and
/// file. Where there is no testbed it does nothing.
pub fn take_down(directory: &Directory) -> Result<()> {
    if directory.description()?.is_none() {
        return Ok(());
    }
    let _lock = directory.lock(true)?;
    // Another one may have been faster.
    match directory.description()? {
        Some(description) => end(directory, &description),
        None => Ok(()),
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
    let toolchains = tokio::task::spawn_blocking(toolchains::find);
    network::start(directory, description).await?;
    pki::create(directory, description)?;
    plane::write_kubeconfigs(directory, description)?;
    plane::start_etcd(directory, description, plane)?;
    plane::start_apiserver(directory, description, plane)?;
    let toolchains = toolchains.await.map_err(joined)?;
    if description.kubelet {
        return start_with_kubelets(directory, description, plane, &toolchains).await;
    }
    let crds = tokio::task::spawn_blocking(kari::crds);
    let chart = tokio::task::spawn_blocking({
        let plane = plane.clone();
        move || kari::chart(&plane)
    });
    let kari_program = program::agent()?;
    for name in description.node_names() {
        let binds = vec![(kari_program.clone(), node::KARI_PROGRAM.into())];
        node::create(directory, name, &toolchains, binds)?;
    }
    let names = description.node_names();
    let boots = boot_all(directory, description);
    let cluster = async {
        plane::wait_apiserver(directory).await?;
        let client = plane::client(directory).await?;
        cluster::apply_crds(&client, &crds.await.map_err(joined)??).await?;
        plane::start_controller_manager(directory, description, plane)?;
        let chart = chart.await.map_err(joined)??;
        cluster::apply_rules(&client, &chart).await?;
        for &name in &names {
            cluster::add_node(&client, directory, description, name).await?;
        }
        cluster::add_controller(&client, directory, description).await?;
        cluster::wait_admission_policy(&client, names[0]).await?;
        wait_controller_manager(directory, &client).await
    };
    futures::future::try_join3(git::start(directory, description), boots, cluster).await?;
    if description.kari {
        kari::start_all(directory, description, &toolchains).await?;
    }
    Ok(())
}

/// What comes after the API server where nodes have a kubelet: all else is told
/// the cluster as an administrator would do it, by helm and kubectl.
async fn start_with_kubelets(
    directory: &Directory,
    description: &Description,
    plane: &ControlPlane,
    toolchains: &[Toolchain],
) -> Result<()> {
    let images = {
        let directory = directory.clone();
        tokio::task::spawn_blocking(move || images::make_pause(&directory))
    };
    for name in description.node_names() {
        let binds = kubelet::create(directory, description, plane, name)?;
        node::create(directory, name, toolchains, binds)?;
    }
    git::start(directory, description).await?;
    plane::wait_apiserver(directory).await?;
    let client = plane::client(directory).await?;
    plane::start_controller_manager(directory, description, plane)?;
    plane::start_scheduler(directory, description, plane)?;
    plane::start_dns(directory, description, plane)?;
    // Not before: a kubelet that finds no API server takes its time to try again.
    boot_all(directory, description).await?;
    let pause = images.await.map_err(joined)??;
    images::import(directory, description, &pause)?;
    for name in description.node_names() {
        kubelet::wait_ready(&client, directory, name).await?;
    }
    plane::wait_dns(directory, description).await?;
    wait_controller_manager(directory, &client).await?;
    if description.kari {
        kari::install(directory, description, plane, toolchains).await?;
    }
    Ok(())
}

async fn boot_all(directory: &Directory, description: &Description) -> Result<()> {
    let names = description.node_names();
    let boots = names
        .iter()
        .map(|&name| node::boot(directory, description, name));
    futures::future::try_join_all(boots).await.map(drop)
}

async fn wait_controller_manager(directory: &Directory, client: &Client) -> Result<()> {
    cluster::wait_controller_manager(client, || directory.log_tail(Part::ControllerManager)).await
}

fn joined(error: tokio::task::JoinError) -> Error {
    Error::State(error.to_string())
}

/// Ends every process, removes the cgroups and then the folder.
fn end(directory: &Directory, description: &Description) -> Result<()> {
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
        end(directory, &left)?;
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
    if options.network == Network::Host && options.kubelet {
        return Err(Error::State(
            "a kubelet would change the machine's own network: use --network lab".to_owned(),
        ));
    }
    Ok(())
}

/// An id of a new testbed: eight hexadecimal digits.
pub fn new_id() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")
        .context(|| "read /proc/sys/kernel/random/uuid".to_owned())?;
    Ok(uuid.chars().take(8).collect())
}
