//! The lab: a network namespace with a bridge and no way out.
//!
//! The machine's own network gets no interface of it. What has to be reached
//! from there is carried by a forwarder, a process that listens on the
//! machine's loopback and connects from within the lab.

use std::{
    collections::BTreeMap,
    fs::File,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    error::{Context, Error, Result},
    process::{self, Process},
    program,
    state::{Addresses, Description, Directory, Network, Part, read_json, write_file},
    wait::{Seen, until},
};

/// The bridge's address on its own network. Without one it takes the lowest of its ports': with a node that
/// goes or comes it would change, and the others would look for the API server where it was, for half a minute.
const GATEWAY_MAC: &str = "02:00:0a:4d:00:01";

/// The bridge's address, at which all that is not a node listens.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// How long a namespace or a forwarder may take to be there: it needs milliseconds.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How long a connection within one machine may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long the forwarder rests when no connection can be accepted for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The addresses of a new testbed. In the lab they are always the same ones.
pub fn choose_addresses(network: Network) -> Result<Addresses> {
    let at = |port| SocketAddrV4::new(GATEWAY, port);
    match network {
        Network::Lab => Ok(Addresses {
            apiserver: at(6443),
            etcd: at(2379),
            etcd_peer: at(2380),
            controller_manager: at(10257),
            git: at(8000),
            controller: at(8080),
            agent: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8081),
            http_port: 80,
            https_port: 443,
        }),
        Network::Host => {
            // All are held until all are chosen, so that they differ.
            let mut held = Vec::new();
            let mut free = || {
                let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                    .context(|| "find a free port on 127.0.0.1".to_owned())?;
                let port = listener
                    .local_addr()
                    .context(|| "find a free port on 127.0.0.1".to_owned())?
                    .port();
                held.push(listener);
                Ok::<_, Error>(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))
            };
            Ok(Addresses {
                apiserver: free()?,
                etcd: free()?,
                etcd_peer: free()?,
                controller_manager: free()?,
                git: free()?,
                controller: free()?,
                agent: free()?,
                http_port: free()?.port(),
                https_port: free()?.port(),
            })
        }
    }
}

/// Makes the lab and its forwarder; nothing where the machine's network is used.
pub async fn start(directory: &Directory, description: &Description) -> Result<()> {
    match description.network {
        Network::Host => Ok(()),
        Network::Lab => {
            start_lab(directory, description).await?;
            start_forwarder(directory, description).await
        }
    }
}

/// The lab's namespace as a path; `None` where the machine's network is used.
pub fn namespace(directory: &Directory, description: &Description) -> Result<Option<PathBuf>> {
    match description.network {
        Network::Host => Ok(None),
        Network::Lab => match directory.running(Part::Lab)? {
            Some(lab) => Ok(Some(namespace_of(lab))),
            None => Err(Error::State(
                "the lab's network is gone: `testbed down`, then `testbed up`".to_owned(),
            )),
        },
    }
}

/// A program and its arguments, to be run in the lab where there is one.
pub fn command(namespace: Option<&Path>, program: &Path) -> Command {
    match namespace {
        None => Command::new(program),
        Some(namespace) => {
            let mut command = Command::new("nsenter");
            command
                .arg(format!("--net={}", namespace.display()))
                .arg("--")
                .arg(program);
            command
        }
    }
}

/// Connects to an address as a process in the lab does.
pub async fn connect(namespace: Option<PathBuf>, address: SocketAddrV4) -> Result<TcpStream> {
    let Some(namespace) = namespace else {
        return TcpStream::connect(address)
            .await
            .context(|| format!("connect to {address}"));
    };
    // A namespace belongs to a thread, and a socket to the namespace in which
    // it was made: so a thread that does nothing else makes it.
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let connected = enter(&namespace).and_then(|()| {
            let stream = std::net::TcpStream::connect_timeout(&address.into(), CONNECT_LIMIT)
                .context(|| format!("connect to {address}"))?;
            stream
                .set_nonblocking(true)
                .context(|| format!("connect to {address}"))?;
            Ok(stream)
        });
        sender.send(connected)
    });
    let stream = receiver.await.map_err(|_dropped| {
        Error::State(format!("the thread that connects to {address} ended early"))
    })??;
    TcpStream::from_std(stream).context(|| format!("connect to {address}"))
}

/// Where an address of the lab is reached from the machine's own network.
pub fn forwarded(
    directory: &Directory,
    description: &Description,
    address: SocketAddrV4,
) -> Result<SocketAddrV4> {
    if description.network == Network::Host {
        return Ok(address);
    }
    let map: BTreeMap<SocketAddrV4, SocketAddrV4> =
        read_json(&forwards(directory))?.unwrap_or_default();
    map.get(&address).copied().ok_or_else(|| {
        Error::State(format!(
            "{address} is not forwarded to the machine's own network"
        ))
    })
}

/// The forwarder's life: listens on free ports of the machine's loopback,
/// writes which of them leads where to `map`, and carries connections until it
/// is killed. Has to be called by a process with one thread.
pub fn forward(namespace: &Path, map: &Path, targets: &[SocketAddrV4]) -> Result<()> {
    let mut listeners = Vec::new();
    let mut ports = BTreeMap::new();
    for &target in targets {
        let bind = || {
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            listener.set_nonblocking(true)?;
            let port = listener.local_addr()?.port();
            Ok::<_, std::io::Error>((listener, port))
        };
        let (listener, port) = bind().context(|| "listen on 127.0.0.1".to_owned())?;
        ports.insert(target, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        listeners.push((listener, target));
    }
    let text = serde_json::to_vec(&ports).map_err(|error| Error::Parse {
        what: "the forwarder's addresses".to_owned(),
        reason: error.to_string(),
    })?;
    // Listeners stay in the network in which they were made; what is connected
    // from here on is in the lab.
    enter(namespace)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the forwarder".to_owned())?;
    runtime.block_on(async {
        let mut accepting = Vec::new();
        for (listener, target) in listeners {
            let listener =
                TcpListener::from_std(listener).context(|| "listen on 127.0.0.1".to_owned())?;
            accepting.push(tokio::spawn(accept(listener, target)));
        }
        write_file(map, &text)?;
        futures::future::join_all(accepting).await;
        Ok(())
    })
}

async fn accept(listener: TcpListener, target: SocketAddrV4) {
    loop {
        let Ok((mut near, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        tokio::spawn(async move {
            let connecting = TcpStream::connect(target);
            if let Ok(Ok(mut far)) = tokio::time::timeout(CONNECT_LIMIT, connecting).await {
                let _ = near.set_nodelay(true);
                let _ = far.set_nodelay(true);
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            }
        });
    }
}

fn enter(namespace: &Path) -> Result<()> {
    let file = File::open(namespace).context(|| format!("open {}", namespace.display()))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .context(|| "enter the lab's network".to_owned())
}

fn namespace_of(process: Process) -> PathBuf {
    PathBuf::from(format!("/proc/{}/ns/net", process.pid))
}

fn forwards(directory: &Directory) -> PathBuf {
    directory.join("forwards.json")
}

async fn start_lab(directory: &Directory, description: &Description) -> Result<()> {
    let mut unshare = Command::new("unshare");
    unshare.args(["--net", "sleep", "infinity"]);
    let lab = process::start(&unshare, &description.id, &directory.log(Part::Lab))?;
    directory.record_process(Part::Lab, lab)?;
    let machine =
        std::fs::read_link("/proc/self/ns/net").context(|| "read /proc/self/ns/net".to_owned())?;
    until(
        "the lab's network was not made",
        START_LIMIT,
        || directory.log_tail(Part::Lab),
        async || match std::fs::read_link(namespace_of(lab)) {
            Ok(namespace) if namespace != machine => Seen::Ready(()),
            Ok(_) => Seen::NotYet("its process is still in the machine's network".to_owned()),
            Err(error) => Seen::Never(format!("its process ended ({error})")),
        },
    )
    .await?;
    let mut script = format!(
        "ip link set lo up; ip link add br0 address {GATEWAY_MAC} type bridge; ip link set br0 up; ip addr add {GATEWAY}/24 dev br0\n"
    );
    if description.kubelet {
        script.push_str("echo 1 >/proc/sys/net/ipv4/ip_forward\n");
        for name in description.node_names() {
            let (pods, node) = (
                description.pod_network(name),
                description.node_address(name),
            );
            script.push_str(&format!("ip route add {pods} via {node}\n"));
        }
    }
    let mut command = command(Some(&namespace_of(lab)), Path::new("sh"));
    process::run(command.args(["-euc", &script])).map(drop)
}

async fn start_forwarder(directory: &Directory, description: &Description) -> Result<()> {
    let map = forwards(directory);
    let namespace = namespace(directory, description)?.unwrap_or_default();
    let mut command = Command::new(program::testbed()?);
    command
        .arg("__forward")
        .arg("--namespace")
        .arg(namespace)
        .arg("--map")
        .arg(&map)
        .arg(description.addresses.apiserver.to_string())
        .args(
            description
                .node_names()
                .into_iter()
                .map(|name| description.node_http(name).to_string()),
        );
    let forwarder = process::start(&command, &description.id, &directory.log(Part::Forwarder))?;
    directory.record_process(Part::Forwarder, forwarder)?;
    until(
        "the forwarder is not there",
        START_LIMIT,
        || directory.log_tail(Part::Forwarder),
        async || {
            if map.exists() {
                Seen::Ready(())
            } else if forwarder.is_alive() {
                Seen::NotYet("it runs, but does not listen yet".to_owned())
            } else {
                Seen::Never("it ended".to_owned())
            }
        },
    )
    .await
}
