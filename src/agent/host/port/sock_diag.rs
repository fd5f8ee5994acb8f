//! The sockets that listen, asked of the kernel by sock_diag(7).
//!
//! /proc/net/tcp has them too, but walks the kernel's whole table of connections
//! for it, twice: 10 ms on a machine of 16 GiB where this takes 0.1 ms, at each
//! look at each app.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

use super::Listener;

/// How long the kernel may take to answer, which it does within the call.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Bytes of an answer; the kernel gives at most 32 KiB at a time.
const ANSWER_BYTES: usize = 64 << 10;

// linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h, linux/in.h and net/tcp_states.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
const IPPROTO_TCP: u8 = 6;
const TCP_LISTEN: u32 = 10;
/// Bytes of a `nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// Bytes of an `inet_diag_req_v2`.
const REQUEST_BYTES: usize = 56;

/// All of both families; an error where the kernel cannot be asked so.
pub(super) fn listeners() -> io::Result<Vec<Listener>> {
    let flags = SocketFlags::CLOEXEC;
    let protocol = Some(netlink::SOCK_DIAG);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_LIMIT))?;
    let mut all = vec![];
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        send(&socket, &request(family), SendFlags::empty())?;
        receive(&socket, &mut all)?;
    }
    Ok(all)
}

fn request(family: AddressFamily) -> Vec<u8> {
    let length = HEADER_BYTES + REQUEST_BYTES;
    let mut request = Vec::with_capacity(length);
    request.extend((length as u32).to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    // Sequence number and port: there is one question at a time.
    request.extend([0; 8]);
    request.extend([family.as_raw() as u8, IPPROTO_TCP, 0, 0]);
    request.extend((1_u32 << TCP_LISTEN).to_ne_bytes());
    // No particular socket.
    request.resize(length, 0);
    request
}

/// Takes in the answers to one question, up to the last.
fn receive(socket: &OwnedFd, all: &mut Vec<Listener>) -> io::Result<()> {
    let mut buffer = vec![0; ANSWER_BYTES];
    loop {
        let (length, _) = recv(socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some((kind, body, next)) = split_message(rest) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = number(body, 0).unwrap_or_default().cast_signed();
                    return Err(Errno::from_raw_os_error(code.saturating_neg()).into());
                }
                SOCK_DIAG_BY_FAMILY => all.extend(listener(body)),
                _ => {}
            }
            rest = next;
        }
    }
}

/// The kind and the body of the first message, and what follows it.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(number(bytes, 0)?).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body, next))
}

/// Reads an `inet_diag_msg`; nothing if it is none.
fn listener(message: &[u8]) -> Option<Listener> {
    let address = message.get(8..24)?;
    let address = match AddressFamily::from_raw(u16::from(*message.first()?)) {
        AddressFamily::INET => {
            let octets: [u8; 4] = address[..4].try_into().ok()?;
            IpAddr::V4(Ipv4Addr::from(octets))
        }
        AddressFamily::INET6 => {
            let octets: [u8; 16] = address.try_into().ok()?;
            IpAddr::V6(Ipv6Addr::from(octets))
        }
        _ => return None,
    };
    let port = u16::from_be_bytes(message.get(4..6)?.try_into().ok()?);
    Some(Listener {
        address: SocketAddr::new(address, port),
        uid: number(message, 64)?,
        inode: u64::from(number(message, 68)?),
    })
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_kernel_tells_the_same_listeners_as_its_list_in_proc() {
        let sockets: Vec<TcpListener> = ["127.0.0.1:0", "0.0.0.0:0", "[::]:0", "[::1]:0"]
            .iter()
            .filter_map(|address| TcpListener::bind(address).ok())
            .collect();
        let ours: BTreeSet<u16> = sockets
            .iter()
            .map(|socket| socket.local_addr().unwrap().port())
            .collect();
        let told = |listeners: Vec<Listener>| {
            let mut told: Vec<Listener> = listeners
                .into_iter()
                .filter(|listener| ours.contains(&listener.address.port()))
                .collect();
            told.sort_by_key(|listener| listener.address.port());
            told
        };
        let asked = told(listeners().unwrap());
        assert_eq!(asked, told(super::super::listed_in_proc().unwrap()));
        assert_eq!(asked.len(), sockets.len());
    }

    #[test]
    fn what_is_no_answer_is_left_out() {
        assert_eq!(listener(&[2; 20]), None);
        assert_eq!(split_message(&[1, 2, 3]), None);
        assert_eq!(split_message(&[200; 20]), None);
    }
}
