//! kari-proxy.service: the node's nginx, run with a configuration of our own.
//!
//! Each Deployment has one file, written beside its place, synced and renamed.
//! That a file is there proves nothing, and neither does a reload that ended
//! well: what counts is measured by a request on a new connection.
//!
//! Certificates lie beside the files, 0600 and root's; nginx, which is not root, reads copies in memory that
//! are made at each start and before each reload.
//!
//! - [`configuration`] is what nginx is told, as text. Pure.
//! - [`certificates`] are the files with keys.
//! - [`answer`] is what an answer proves. Pure.
//! - [`control`] writes and measures, by way of [`reload`].
//!
//! User text reaches nginx through [`HostName::parse`] and [`RoutePath::parse`] alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use crate::api::names::{AppName, ReleaseId};

mod answer;
mod certificates;
mod configuration;
mod control;
mod reload;
mod tls;

pub use configuration::{IDENTITY_PATH, UNIT, render_virtual_host};
pub use control::{DRAIN_LIMIT, Proxy, ProxyError};
pub use reload::OldWorkers;

/// A host name that requests come for: a lower-case DNS name of at most 253 characters, with an optional
/// leading `*.` for any one or more labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(String);

/// A text that is not a [`HostName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is not a host name: it must be a lower-case DNS name of at most 253 characters, with an optional leading \"*.\""
)]
pub struct HostNameError {
    value: String,
}

/// What a host name is at most, RFC 1035.
const LONGEST_HOST_CHARACTERS: usize = 253;

/// What a label of it is at most, RFC 1035.
const LONGEST_LABEL_CHARACTERS: usize = 63;

impl HostName {
    /// Refuses everything that nginx could take for more than a name: there, a name may be a regular
    /// expression, have variables, or end the directive.
    pub fn parse(text: &str) -> Result<Self, HostNameError> {
        let name = text.strip_prefix("*.").unwrap_or(text);
        let is_label = |label: &str| {
            (1..=LONGEST_LABEL_CHARACTERS).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if text.len() <= LONGEST_HOST_CHARACTERS && name.split('.').all(is_label) {
            Ok(Self(text.to_owned()))
        } else {
            Err(HostNameError {
                value: text.to_owned(),
            })
        }
    }

    /// The name, with its `*.` if it has one.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for HostName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The beginning of the paths of a route's requests, by whole segments: `/api` is for `/api` and `/api/x`, and
/// not for `/apix`. `/` is for all.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoutePath(String);

/// A text that is not a [`RoutePath`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is not a path of a route: it must start with \"/\", end without one, have at most {LONGEST_PATH_CHARACTERS} letters, digits and ._~@:+-, no empty, \".\" or \"..\" segment, and not be {IDENTITY_PATH} or below it"
)]
pub struct RoutePathError {
    value: String,
}

/// What a route's path is at most, the schema's bound.
const LONGEST_PATH_CHARACTERS: usize = 256;

impl RoutePath {
    /// Refuses everything that nginx could take for more than a path, and what no request can have: nginx
    /// compares with the path after it was decoded, and dots and double slashes were resolved.
    pub fn parse(text: &str) -> Result<Self, RoutePathError> {
        let is_segment = |segment: &str| {
            !matches!(segment, "" | "." | "..")
                && segment
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._~@:+-".contains(&b))
        };
        let is_path = text
            .strip_prefix('/')
            .is_some_and(|segments| segments.is_empty() || segments.split('/').all(is_segment));
        let path = Self(text.to_owned());
        let is_own = Self(IDENTITY_PATH.to_owned()).matches(text);
        if is_path && !is_own && text.len() <= LONGEST_PATH_CHARACTERS {
            Ok(path)
        } else {
            Err(RoutePathError { value: path.0 })
        }
    }

    /// The path.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether requests for `path`, which is normal and without a query, are the route's.
    fn matches(&self, path: &str) -> bool {
        self.is_all()
            || path
                .strip_prefix(&self.0)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// Whether it is `/`.
    fn is_all(&self) -> bool {
        self.0 == "/"
    }
}

impl std::fmt::Display for RoutePath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What names a certificate and its key among those of an app: the digest under which the node was given them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CertificateId(String);

/// A text that is not a [`CertificateId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not the digest of a certificate: it must be 16 to 64 lower-case hexadecimal digits"
)]
pub struct CertificateIdError(String);

impl CertificateId {
    /// Refuses what is not digits: it is a part of names of files.
    pub fn parse(text: &str) -> Result<Self, CertificateIdError> {
        let is_digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if (16..=64).contains(&text.len()) && text.bytes().all(is_digit) {
            Ok(Self(text.to_owned()))
        } else {
            Err(CertificateIdError(text.to_owned()))
        }
    }

    /// That of a certificate which the node was not given: nothing is served with it.
    pub fn unknown() -> Self {
        Self("0".repeat(40))
    }

    /// Its digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for CertificateId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the proxy serves for a Deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualHost {
    /// The Deployment.
    pub app: AppName,
    /// The release that answers, or that would if it ran.
    pub release_id: ReleaseId,
    /// One for each process with a route.
    pub routes: Vec<Route>,
}

impl VirtualHost {
    /// The host names, each once, with the routes that each has: one or more, each with a path of its own.
    fn routes_by_host(&self) -> Vec<(&HostName, Vec<&Route>)> {
        let mut by_host: Vec<(&HostName, Vec<&Route>)> = vec![];
        for route in &self.routes {
            for host in &route.hosts {
                match by_host.iter_mut().find(|(known, _)| *known == host) {
                    Some((_, routes)) => routes.push(route),
                    None => by_host.push((host, vec![route])),
                }
            }
        }
        by_host
    }

    /// The certificates that its hosts are served with.
    pub fn certificates(&self) -> BTreeSet<&CertificateId> {
        let routes = self.routes.iter();
        routes
            .filter_map(|route| route.certificate.as_ref())
            .collect()
    }
}

/// The certificate of a host with these routes: that of any of them. The API takes no two for one host.
fn certificate_of<'a>(routes: &[&'a Route]) -> Option<&'a CertificateId> {
    routes.iter().find_map(|route| route.certificate.as_ref())
}

/// The requests for some host names whose path begins alike. Of several routes with one host, the longest path
/// that fits has a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The process, a DNS label.
    pub process: String,
    /// The host names; at least one.
    pub hosts: Vec<HostName>,
    /// The paths.
    pub path: RoutePath,
    /// Who gets the requests.
    pub target: RouteTarget,
    /// What the process is known to answer: the path of its readiness probe, with its query.
    pub probe_path: Option<String>,
    /// What the hosts are served with over https; without it they are served over http alone.
    pub certificate: Option<CertificateId>,
}

/// What the agent asks for when it measures that `route` answers, `routes` being all of its host: the path of the
/// readiness probe if a request for it comes to the route, else the route's own.
fn measured_path<'a>(route: &'a Route, routes: &[&Route]) -> &'a str {
    // What nginx would make another path of is not looked into.
    let is_plain = |path: &str| !["%", "//", "/.", "#"].iter().any(|odd| path.contains(odd));
    let comes_here = |asked: &str| {
        let path = asked.split('?').next().unwrap_or_default();
        is_plain(path)
            && path != IDENTITY_PATH
            && route.path.matches(path)
            && !routes.iter().any(|other| {
                other.path.matches(path) && other.path.as_str().len() > route.path.as_str().len()
            })
    };
    route
        .probe_path
        .as_deref()
        .filter(|path| comes_here(path))
        .unwrap_or(route.path.as_str())
}

/// Who gets the requests of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteTarget {
    /// A process of the node.
    Port {
        /// Its port on 127.0.0.1.
        primary: u16,
        /// The port of before a switch, which takes what the primary refuses until the switch is
        /// drained: should the node reboot before the commit, the old process starts and answers.
        backup: Option<u16>,
    },
    /// Nobody yet: 503 with Retry-After, until this process has taken the place of another that must not
    /// run beside it. To go on from here to its `Port` takes no reload: nothing is lost on the way.
    Paused {
        /// Its port on 127.0.0.1.
        primary: u16,
    },
    /// Nobody: 503. A stopped process's port may be anybody's.
    Unavailable,
}

/// The hosts of `wanted` that another Deployment than `app` has, and which: RouteConflict, and the other
/// keeps them. nginx itself would only warn, and give the host to the first file by name.
pub fn route_conflicts<'a>(
    app: &AppName,
    wanted: &'a [HostName],
    served: &'a BTreeMap<AppName, Vec<HostName>>,
) -> Vec<(&'a HostName, &'a AppName)> {
    let others = served.iter().filter(|(other, _)| *other != app);
    others
        .flat_map(|(other, hosts)| {
            wanted
                .iter()
                .filter(|host| hosts.contains(host))
                .map(move |host| (host, other))
        })
        .collect()
}

/// What the node's proxy is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxySettings {
    /// The port for HTTP, on all addresses.
    pub http_port: u16,
    /// The port for HTTP over TLS, on all addresses; 0 for none, and then no host has a certificate.
    pub https_port: u16,
    /// nginx, as an absolute path.
    pub nginx: PathBuf,
    /// Whether the node has IPv6.
    pub ipv6: bool,
    /// Processors that the proxy may use; it uses a few at most.
    pub processors: usize,
}

impl ProxySettings {
    /// The settings of this node.
    pub fn of_this_node(http_port: u16, https_port: u16, nginx: PathBuf) -> Self {
        // The list of addresses: there only with IPv6, and empty where it is switched off.
        let ipv6 = std::fs::read("/proc/net/if_inet6").is_ok_and(|addresses| !addresses.is_empty());
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            http_port,
            https_port,
            nginx,
            ipv6,
            processors,
        }
    }
}

#[cfg(test)]
mod tests;
