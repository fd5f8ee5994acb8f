//! OUTLINE: ports of processes: a free one, and who listens on it.
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

#[derive(Debug, thiserror::Error)]
pub enum PortError {
    #[error("…")]
    Exhausted { range: RangeInclusive<u16> },
    #[error("…")]
    Io { path: &'static str, source: std::io::Error },
}
/// A free port of the range: bind-tested and in none of `held`. Starts at a random place.
pub fn pick(range: &RangeInclusive<u16>, held: &BTreeSet<u16>) -> Result<u16, PortError> { todo!() }

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener { pub address: SocketAddr, pub uid: u32, pub inode: u64 }
/// Sockets in state LISTEN of /proc/net/tcp and tcp6. Pure.
pub fn parse_listeners(text: &str) -> Vec<Listener> { todo!() }
/// Reads both; one read serves all ports of a round.
pub fn listeners() -> Result<Vec<Listener>, PortError> { todo!() }
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortState {
    /// nobody listens (yet)
    Silent,
    /// exactly one listener, the app's, and 127.0.0.1 reaches it
    Owned,
    /// ProbeFailed with this message: the process listens on [::1] (or another address) only
    Unreachable { address: SocketAddr },
    /// another user listens there: take another port
    Foreign { uid: u32, address: SocketAddr },
}
pub fn port_state(listeners: &[Listener], port: u16, uid: u32) -> PortState { todo!() }
