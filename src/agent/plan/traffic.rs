//! What the proxy is to serve, and whether it was seen to.

use std::time::Duration;

use super::{Step, committed, waiting};
use crate::agent::host::proxy::{
    CertificateId, HostName, Route, RoutePath, RouteTarget, VirtualHost,
};
use crate::agent::host::records::{AttemptRecord, ProcessRecord};
use crate::agent::view::{HeldUp, Observed};
use crate::api::deployment::RouteTls;
use crate::api::names::{AppName, ReleaseId};
use crate::api::release::{Purpose, SealedValue, Template};

pub(super) enum Traffic<'a> {
    InForce(Duration),
    Step(Step),
    HeldUp(&'a HeldUp),
}

/// Whether the proxy does what `wanted` says, measured; else what to do.
pub(super) fn traffic<'a>(observed: &'a Observed, wanted: Option<&VirtualHost>) -> Traffic<'a> {
    let view = &observed.host.virtual_host;
    let step = match (wanted, &view.in_force) {
        (Some(wanted), Some((in_force, since))) if wanted == in_force => {
            return Traffic::InForce(*since);
        }
        (Some(wanted), _) => Step::Publish(Box::new(wanted.clone())),
        (None, None) if !view.file => return Traffic::InForce(Duration::ZERO),
        (None, _) => Step::RemoveVirtualHost,
    };
    match waiting(observed) {
        Some(held_up) => Traffic::HeldUp(held_up),
        None => Traffic::Step(step),
    }
}

/// The virtual host of what is committed.
pub fn committed_virtual_host(observed: &Observed) -> Option<VirtualHost> {
    let release = committed(observed)?;
    virtual_host(
        &observed.app,
        release.release_id,
        (&release.template, &release.sealed),
        &release.processes,
        &[],
    )
}

/// The virtual host of an attempt that takes the traffic: what the old served is its backup.
pub(super) fn attempt_virtual_host(
    observed: &Observed,
    attempt: &AttemptRecord,
) -> Option<VirtualHost> {
    let old: &[ProcessRecord] = match committed(observed) {
        // What is stopped answers nothing, and its port may be anybody's.
        Some(release) if attempt.stopped_old.is_empty() => &release.processes,
        Some(_) | None => &[],
    };
    virtual_host(
        &observed.app,
        attempt.wish.release_id,
        (&attempt.wish.template, &attempt.wish.sealed),
        &attempt.processes,
        old,
    )
}

/// The same before the attempt takes the traffic, when the old has given way to it: of what changes, each
/// request is answered with 503.
pub(super) fn paused_attempt_virtual_host(
    observed: &Observed,
    attempt: &AttemptRecord,
) -> Option<VirtualHost> {
    let applied: &[ProcessRecord] = committed(observed).map_or(&[], |release| &release.processes);
    let changing: Vec<&str> = attempt
        .processes
        .iter()
        .filter(|new| applied.iter().all(|old| old.unit != new.unit))
        .map(|new| new.name.as_str())
        .collect();
    let host = virtual_host(
        &observed.app,
        attempt.wish.release_id,
        (&attempt.wish.template, &attempt.wish.sealed),
        &attempt.processes,
        &[],
    );
    host.map(|host| pause(host, &changing))
}

/// Requests for `processes` are answered with 503.
pub(super) fn pause(mut host: VirtualHost, processes: &[&str]) -> VirtualHost {
    for route in &mut host.routes {
        if processes.contains(&route.process.as_str()) {
            route.target = match route.target {
                RouteTarget::Port { primary, backup: _ } | RouteTarget::Paused { primary } => {
                    RouteTarget::Paused { primary }
                }
                RouteTarget::Unavailable => RouteTarget::Unavailable,
            };
        }
    }
    host
}

/// The certificate that a route is served with. One that the release does not carry is not replaced by none: what is
/// to be served by https is not served in the clear.
fn certificate_id(tls: &RouteTls, sealed: &[SealedValue]) -> CertificateId {
    let mut sealed = sealed.iter();
    sealed
        .find(|s| s.purpose == Purpose::Tls && s.name == tls.secret_name)
        .and_then(|sealed| CertificateId::parse(&sealed.digest).ok())
        .unwrap_or_else(CertificateId::unknown)
}

/// What the proxy serves for `processes`; nothing if none has a route. Host names and paths that are not
/// valid were refused where the Release was read.
pub fn virtual_host(
    app: &AppName,
    release_id: ReleaseId,
    (template, sealed): (&Template, &[SealedValue]),
    processes: &[ProcessRecord],
    old: &[ProcessRecord],
) -> Option<VirtualHost> {
    let port_of = |records: &[ProcessRecord], name: &str| {
        records.iter().find(|p| p.name == name).and_then(|p| p.port)
    };
    let routes: Vec<Route> = template
        .processes
        .iter()
        .filter_map(|process| {
            let route = process.route.as_ref()?;
            let target = match port_of(processes, &process.name) {
                Some(primary) => RouteTarget::Port {
                    primary,
                    backup: port_of(old, &process.name).filter(|backup| *backup != primary),
                },
                None => RouteTarget::Unavailable,
            };
            let hosts = route
                .hosts
                .iter()
                .filter_map(|host| HostName::parse(host).ok())
                .collect();
            let probe_path = process
                .readiness_probe
                .as_ref()
                .and_then(|probe| probe.http_get.as_ref())
                .map(|get| get.path.clone());
            Some(Route {
                process: process.name.clone(),
                hosts,
                path: RoutePath::parse(&route.path).ok()?,
                target,
                probe_path,
                certificate: route.tls.as_ref().map(|tls| certificate_id(tls, sealed)),
            })
        })
        .collect();
    (!routes.is_empty()).then(|| VirtualHost {
        app: app.clone(),
        release_id,
        routes,
    })
}
