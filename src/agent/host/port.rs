//! Ports of processes: a free one, and who listens on it.
//!
//! A port is picked below the kernel's range for outgoing connections, tried by
//! binding it, and given to the process. That it was free then proves nothing
//! later: the port of a stopped process is free for anybody. So what counts is
//! [`port_state`], asked before a switch and on every round after it: the app's
//! uid has the only socket that listens there.
//!
//! Deliberately absent: reserving a port. Nothing holds one but its listener.

mod sock_diag;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::ops::RangeInclusive;

/// Why there is no port, or no telling who listens.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Every port of the range is taken.
    #[error("no free port in {}-{}: give the agent a larger --port-range", range.start(), range.end())]
    Exhausted {
        /// The range that was searched.
        range: RangeInclusive<u16>,
    },
    /// The kernel's list of sockets cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The list.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Picks a port of `range` that is in no record (`held`) and that can be bound on every address.
/// The search starts at a random place, so that a port which somebody lost is not given out again at once.
pub fn pick(range: &RangeInclusive<u16>, held: &BTreeSet<u16>) -> Result<u16, PortError> {
    let exhausted = || PortError::Exhausted {
        range: range.clone(),
    };
    if range.is_empty() {
        return Err(exhausted());
    }
    let start = fastrand::u16(range.clone());
    (start..=*range.end())
        .chain(*range.start()..start)
        .find(|port| !held.contains(port) && is_free(*port))
        .ok_or_else(exhausted)
}

/// Whether the port can be bound on all addresses of both families; a node without IPv6 has one.
fn is_free(port: u16) -> bool {
    let everywhere = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    everywhere
        .iter()
        .all(|address| match TcpListener::bind((*address, port)) {
            Ok(_) => true,
            Err(error) => address.is_ipv6() && error.kind() != io::ErrorKind::AddrInUse,
        })
}

/// A socket that listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    /// Its address and port.
    pub address: SocketAddr,
    /// The user that made it, as the initial user namespace numbers it.
    pub uid: u32,
    /// Its inode, which /proc/<pid>/fd names.
    pub inode: u64,
}

/// Lists the sockets that listen, of both families, in this process's network namespace. One reading
/// serves all the questions of a round.
pub fn listeners() -> Result<Vec<Listener>, PortError> {
    // A kernel that cannot be asked still has its list.
    sock_diag::listeners().or_else(|_| listed_in_proc())
}

fn listed_in_proc() -> Result<Vec<Listener>, PortError> {
    let mut all = Vec::new();
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match fs::read_to_string(path) {
            Ok(text) => all.extend(parse_listeners(&text)),
            // A kernel without IPv6 has no such list.
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.ends_with('6') => {}
            Err(source) => return Err(PortError::Unreadable { path, source }),
        }
    }
    Ok(all)
}

/// Reads what proc(5) describes as /proc/net/tcp and tcp6; lines that are no listening socket are left out.
pub fn parse_listeners(text: &str) -> Vec<Listener> {
    text.lines().skip(1).filter_map(parse_listener).collect()
}

/// `sl local rem st tx:rx tr:when retrnsmt uid timeout inode …`
fn parse_listener(line: &str) -> Option<Listener> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_ascii_whitespace().take(10).collect();
    let [_, local, _, LISTEN, _, _, _, uid, _, inode] = fields[..] else {
        return None;
    };
    let (address, port) = local.split_once(':')?;
    Some(Listener {
        address: SocketAddr::new(parse_address(address)?, u16::from_str_radix(port, 16).ok()?),
        uid: uid.parse().ok()?,
        inode: inode.parse().ok()?,
    })
}

/// Groups of 32 bits, each in the machine's byte order, as the kernel prints them.
fn parse_address(hex: &str) -> Option<IpAddr> {
    let group = |at: usize| {
        let word = u32::from_str_radix(hex.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    match hex.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(group(0)?))),
        32 => {
            let mut octets = [0; 16];
            for (at, chunk) in octets.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&group(at)?);
            }
            Some(IpAddr::V6(Ipv6Addr::from(octets)))
        }
        _ => None,
    }
}

/// What a port is to the app that it was given to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortState {
    /// Nobody listens, or not yet.
    Silent,
    /// The app alone listens, and 127.0.0.1 reaches it.
    Owned,
    /// The app alone listens, but 127.0.0.1 does not reach it: ProbeFailed, with [`unreachable_message`].
    Unreachable {
        /// Where it listens.
        address: SocketAddr,
    },
    /// Somebody else listens: the app needs another port.
    Foreign {
        /// The stranger's user.
        uid: u32,
        /// Where the stranger listens.
        address: SocketAddr,
    },
}

/// Tells whether the app of `uid` has the only socket that listens on `port`. A stranger counts on
/// whatever address: beside a listener on `[::]` for IPv6 alone, anybody can bind 127.0.0.1 and get
/// the app's requests.
pub fn port_state(listeners: &[Listener], port: u16, uid: u32) -> PortState {
    let mut on_port = listeners
        .iter()
        .filter(|listener| listener.address.port() == port)
        .peekable();
    if let Some(stranger) = on_port.clone().find(|listener| listener.uid != uid) {
        return PortState::Foreign {
            uid: stranger.uid,
            address: stranger.address,
        };
    }
    match on_port.peek() {
        None => PortState::Silent,
        Some(first) => {
            let address = first.address;
            if on_port.any(|listener| is_reached_by_loopback(listener.address.ip())) {
                PortState::Owned
            } else {
                PortState::Unreachable { address }
            }
        }
    }
}

/// Whether a connection to 127.0.0.1 may arrive at a listener on `address`. `[::]` may be for IPv6 alone,
/// which the kernel's list does not tell: the probe does.
fn is_reached_by_loopback(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_unspecified() || address == Ipv4Addr::LOCALHOST,
        IpAddr::V6(address) => {
            address.is_unspecified() || address.to_ipv4_mapped() == Some(Ipv4Addr::LOCALHOST)
        }
    }
}

/// Who listens on `port`, on any address, in words for people, if it is not the user `own`. Where /proc does
/// not show the process (another PID namespace, as a Pod's), its user is named.
pub fn holder_of(port: u16, own: Option<u32>) -> Option<String> {
    let strangers: Vec<_> = listeners()
        .ok()?
        .into_iter()
        .filter(|listener| listener.address.port() == port && Some(listener.uid) != own)
        .collect();
    let uid = strangers.first()?.uid;
    let inodes = strangers.iter().map(|listener| listener.inode).collect();
    let Some(pid) = pids_with_socket(&inodes).pop_first() else {
        return Some(format!("a process of uid {uid}"));
    };
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let unit = fs::read_to_string(format!("/proc/{pid}/cgroup"))
        .ok()
        .and_then(|text| unit_of_cgroup(&text));
    let unit = unit.map(|unit| format!(" of {unit}")).unwrap_or_default();
    Some(format!("{} (pid {pid}){unit}", name.trim()))
}

/// The processes that have one of the sockets open, as far as /proc shows them.
fn pids_with_socket(inodes: &BTreeSet<u64>) -> BTreeSet<u32> {
    let wanted: BTreeSet<String> = inodes
        .iter()
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let mut files = fs::read_dir(entry.path().join("fd")).ok()?.flatten();
            let has_it = files.any(|file| {
                fs::read_link(file.path())
                    .is_ok_and(|target| target.to_str().is_some_and(|t| wanted.contains(t)))
            });
            has_it.then_some(pid)
        })
        .collect()
}

/// The unit that a process is in, by /proc/<pid>/cgroup of either version.
fn unit_of_cgroup(text: &str) -> Option<String> {
    let path = text
        .lines()
        .find_map(|line| {
            line.split_once(":name=systemd:")
                .or_else(|| line.split_once("0::"))
        })?
        .1;
    let unit = path
        .rsplit('/')
        .find(|part| part.ends_with(".service") || part.ends_with(".scope"))?;
    Some(unit.to_owned())
}

/// What to tell people of [`PortState::Unreachable`].
pub fn unreachable_message(process: &str, address: SocketAddr) -> String {
    format!(
        "process {process} listens on {address} only, which 127.0.0.1 does not reach: make it listen on 127.0.0.1, 0.0.0.0 or [::]"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode                                                     
   0: 0100007F:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000 50001        0 123456 1 0000000000000000 100 0 0 10 0                     
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 777 1 0000000000000000 100 0 0 10 0                     
   2: 0100007F:4E20 0100007F:D431 01 00000000:00000000 00:00000000 00000000 50001        0 99 1 0000000000000000 20 4 30 10 -1                     
   3: broken
";
    const TCP6: &str = "\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000001000000:4E21 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 50001        0 5 1 0000000000000000 100 0 0 10 0
   1: 0000000000000000FFFF00000100007F:4E22 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 50001        0 6 1 0000000000000000 100 0 0 10 0
   2: 00000000000000000000000000000000:4E23 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 50001        0 7 1 0000000000000000 100 0 0 10 0
";

    fn at(address: &str, uid: u32) -> Listener {
        Listener {
            address: address.parse().unwrap_or_else(|e| panic!("{address}: {e}")),
            uid,
            inode: 1,
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn the_kernels_list_is_read_and_connections_are_left_out() {
        let read: Vec<_> = [TCP, TCP6]
            .iter()
            .flat_map(|text| parse_listeners(text))
            .collect();
        let told: Vec<_> = read
            .iter()
            .map(|l| (l.address.to_string(), l.uid, l.inode))
            .collect();
        assert_eq!(
            told,
            [
                ("127.0.0.1:20000".to_owned(), 50001, 123456),
                ("0.0.0.0:80".to_owned(), 0, 777),
                ("[::1]:20001".to_owned(), 50001, 5),
                ("[::ffff:127.0.0.1]:20002".to_owned(), 50001, 6),
                ("[::]:20003".to_owned(), 50001, 7),
            ]
        );
    }

    #[test]
    fn only_a_sole_listener_of_the_apps_own_that_127_0_0_1_reaches_is_owned() {
        let app = 50001;
        let own = |address| vec![at(address, app)];
        assert_eq!(port_state(&[], 20000, app), PortState::Silent);
        assert_eq!(
            port_state(&own("127.0.0.1:20001"), 20000, app),
            PortState::Silent
        );
        for reached in [
            "127.0.0.1:20000",
            "0.0.0.0:20000",
            "[::]:20000",
            "[::ffff:127.0.0.1]:20000",
        ] {
            assert_eq!(
                port_state(&own(reached), 20000, app),
                PortState::Owned,
                "{reached}"
            );
        }
        for missed in ["[::1]:20000", "127.0.0.2:20000", "10.0.0.1:20000"] {
            let address = own(missed)[0].address;
            assert_eq!(
                port_state(&own(missed), 20000, app),
                PortState::Unreachable { address },
                "{missed}"
            );
        }
        let both = [at("[::1]:20000", app), at("127.0.0.1:20000", app)];
        assert_eq!(port_state(&both, 20000, app), PortState::Owned);
        let thief = [at("[::]:20000", app), at("127.0.0.1:20000", 7)];
        assert_eq!(
            port_state(&thief, 20000, app),
            PortState::Foreign {
                uid: 7,
                address: thief[1].address
            }
        );
    }

    #[test]
    fn a_process_is_told_by_its_unit_on_either_version_of_cgroups() {
        for (text, unit) in [
            (
                "12:cpu:/x\n1:name=systemd:/system.slice/nginx.service\n0::/\n",
                Some("nginx.service"),
            ),
            (
                "0::/system.slice/apache2.service\n",
                Some("apache2.service"),
            ),
            (
                "0::/user.slice/user-0.slice/session-1.scope\n",
                Some("session-1.scope"),
            ),
            ("0::/\n", None),
            ("", None),
        ] {
            assert_eq!(unit_of_cgroup(text).as_deref(), unit, "{text}");
        }
    }

    #[test]
    fn the_holder_of_a_port_is_named_unless_it_is_our_own() {
        let socket = TcpListener::bind(("127.0.0.1", 0)).unwrap_or_else(|e| panic!("{e}"));
        let port = socket
            .local_addr()
            .map(|a| a.port())
            .unwrap_or_else(|e| panic!("{e}"));
        let this = std::process::id();
        let uid = std::os::unix::fs::MetadataExt::uid(
            &fs::metadata("/proc/self").unwrap_or_else(|e| panic!("{e}")),
        );
        for own in [None, Some(uid + 1)] {
            let holder = holder_of(port, own).unwrap_or_default();
            assert!(holder.contains(&format!("(pid {this})")), "{holder}");
        }
        assert_eq!(holder_of(port, Some(uid)), None);
        drop(socket);
        assert_eq!(holder_of(port, None), None);
    }

    #[test]
    fn a_port_that_is_bound_or_held_is_never_picked() {
        let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap_or_else(|e| panic!("{e}"));
        let port = taken
            .local_addr()
            .map(|a| a.port())
            .unwrap_or_else(|e| panic!("{e}"));
        assert!(matches!(
            pick(&(port..=port), &BTreeSet::new()),
            Err(PortError::Exhausted { .. })
        ));
        drop(taken);
        assert_eq!(pick(&(port..=port), &BTreeSet::new()).ok(), Some(port));
        assert!(matches!(
            pick(&(port..=port), &BTreeSet::from([port])),
            Err(PortError::Exhausted { .. })
        ));
    }

    #[test]
    fn this_machines_own_list_names_a_socket_that_listens() {
        let socket = TcpListener::bind(("127.0.0.1", 0)).unwrap_or_else(|e| panic!("{e}"));
        let address = socket.local_addr().unwrap_or_else(|e| panic!("{e}"));
        let all = listeners().unwrap_or_else(|e| panic!("{e}"));
        assert!(
            all.iter().any(|listener| listener.address == address),
            "{address} is not in {all:?}"
        );
    }
}
