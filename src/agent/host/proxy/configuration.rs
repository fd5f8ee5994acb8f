//! What nginx is told: the files of /var/lib/kari/proxy and the unit, as text. Pure.
//!
//! ```text
//! nginx.conf          includes the others; what the unit runs
//! main.conf           all that stands outside of `http`
//! http.conf           all that every virtual host shares, and the server that refuses
//! vhosts/<app>.conf   one per Deployment; hidden (.x) while it is written, .bad when it was refused at a start
//! certificates/       certificates and keys, 0600 and root's: <app>.<digest>.{crt,key}
//! guard.sh            run before each start: brings copies of these to where nginx reads them, and sets aside
//!                     what nginx refuses, so that the rest starts
//! ```
//!
//! Invariants: no text of a user's reaches a file but host names and paths, which
//! [`super::HostName::parse`] and [`super::RoutePath::parse`] have checked. File
//! names are made of ids only. The same input gives the same text.

use std::path::Path;

use super::{CertificateId, ProxySettings, Route, RouteTarget, VirtualHost, certificate_of};
use crate::api::names::{AppName, hex_digest};

/// The unit.
pub const UNIT: &str = "kari-proxy.service";

/// Where a vhost says which release it is for, to 127.0.0.1 only.
pub const IDENTITY_PATH: &str = "/.well-known/kari";

/// A request of the agent's own with this header, set to `1`, learns who answered it.
pub const MEASURE_HEADER: &str = "Kari-Measure";

/// Who answered: `$upstream_addr;$upstream_header_time`.
pub const ANSWERED_BY_HEADER: &str = "Kari-Answered-By";

/// A status of nginx's own between the two locations of a route; no answer has it.
const CLOSING_CODE: u16 = 590;

/// Another one.
const PAUSED_CODE: u16 = 591;

/// Seconds in which a client takes nothing of an answer, or sends nothing of a request that it began, and is
/// gone. Above the limit of a drain, so that no slow client is cut because of a switch.
const STALLED_CLIENT_SECONDS: u32 = 180;

/// Answers that the process does not run.
const UNAVAILABLE: &str = "        default_type text/plain;
        add_header Retry-After 5 always;
        return 503 \"this Deployment is not running on this node at the moment\\n\";
";

/// Seconds after which a worker of before a reload closes what it still has, websockets and long
/// downloads of all Deployments alike. Far above the limit of a drain, as a change of one Deployment
/// must not cut the others' connections; not for ever, as each reload leaves a worker that costs memory.
const WORKER_SHUTDOWN_SECONDS: u32 = 900;

/// Connections of each worker, a request having two. They cost 2 MB when the worker starts.
const WORKER_CONNECTIONS: u32 = 8192;

/// Workers at most: each reload starts as many again, and one serves 10 000 requests a second.
const LARGEST_WORKER_COUNT: usize = 4;

/// What the unit needs at run time; a reboot may lose it.
pub const RUN_FOLDER: &str = "/run/kari/proxy";

/// The folder of certificates and keys below the proxy's, which no reboot loses.
pub const CERTIFICATE_FOLDER: &str = "certificates";

/// Where nginx, which is not root, reads its copies of them.
pub const CERTIFICATE_RUN_FOLDER: &str = "/run/kari/proxy/certificates";

/// The files of a certificate and of its key.
pub fn certificate_files(app: &AppName, certificate: &CertificateId) -> [String; 2] {
    ["crt", "key"].map(|kind| format!("{}{certificate}.{kind}", certificate_files_of(app)))
}

/// How the names of an app's certificates begin.
pub fn certificate_files_of(app: &AppName) -> String {
    format!("{app}.")
}

/// While this file is there, an answer is the last one of its connection. nginx closes idle connections at
/// a reload, and a request that is on its way in that moment is lost with a reset; so connections in
/// use are ended in an orderly way before.
pub const CLOSING_FILE: &str = "/run/kari/proxy/closing";

/// The files of the proxy's folder that are the same for every virtual host: name and content.
pub fn render_files(settings: &ProxySettings, folder: &Path) -> Vec<(&'static str, String)> {
    let main = render_main(settings);
    let http = render_http(settings);
    vec![
        ("main.conf", main),
        ("http.conf", http),
        (
            "nginx.conf",
            render_top(folder, RUN_FOLDER, "vhosts/*.conf"),
        ),
        ("guard.sh", render_guard(settings, folder)),
    ]
}

/// The folder whose files pause routes, below the proxy's: one [`pause_file`] for each.
pub const PAUSED_FOLDER: &str = "paused";

/// While this file is there, requests for a process are answered with 503. It has the port in its name, so
/// that it says nothing of the process of before, which serves until the reload that ends it.
pub fn pause_file(app: &AppName, process: &str, port: u16) -> String {
    format!("{}{process}.{port}", pause_files_of(app))
}

/// How the names of an app's pause files begin.
pub fn pause_files_of(app: &AppName) -> String {
    format!("{app}.")
}

/// The digest of the settings in force, which the server that refuses tells 127.0.0.1: an edit of
/// http.conf that nginx did not take is seen by it.
pub fn settings_digest(settings: &ProxySettings) -> String {
    let text = format!("{}{}", render_main(settings), render_http_rules(settings));
    hex_digest(text.as_bytes())[..16].to_owned()
}

/// `include`s of everything, with the temporary files below `run_folder`.
fn render_top(folder: &Path, run_folder: &str, vhosts: &str) -> String {
    let folder = folder.display();
    format!(
        "\
# Written by kari agent; an edit is overwritten.
include {folder}/main.conf;
http {{
    client_body_temp_path {run_folder}/body;
    proxy_temp_path {run_folder}/proxy;
    fastcgi_temp_path {run_folder}/fastcgi;
    uwsgi_temp_path {run_folder}/uwsgi;
    scgi_temp_path {run_folder}/scgi;
    include {folder}/http.conf;
    include {folder}/{vhosts};
}}
"
    )
}

fn render_main(settings: &ProxySettings) -> String {
    let workers = settings.processors.clamp(1, LARGEST_WORKER_COUNT);
    format!(
        "\
# Written by kari agent; an edit is overwritten.
error_log stderr warn;
worker_processes {workers};
worker_shutdown_timeout {WORKER_SHUTDOWN_SECONDS}s;
events {{
    worker_connections {WORKER_CONNECTIONS};
}}
"
    )
}

fn render_http(settings: &ProxySettings) -> String {
    let rules = render_http_rules(settings);
    let parameters = " default_server backlog=4096";
    let listen = listen(settings, settings.http_port, parameters);
    let refusing = render_tls_refusal(settings, parameters);
    let digest = settings_digest(settings);
    let identity = identity(&format!("kari-proxy {digest}"));
    format!(
        "\
# Written by kari agent; an edit is overwritten.
{rules}
# A host name that no Deployment on this node has.
server {{
{listen}    server_name _;
    default_type text/plain;
{identity}    location / {{
        return 421 \"no Deployment on this node serves this host name\\n\";
    }}
}}
{refusing}"
    )
}

/// The server for TLS to host names that have no certificate: it says nothing that could be taken for one.
fn render_tls_refusal(settings: &ProxySettings, parameters: &str) -> String {
    if settings.https_port == 0 {
        return String::new();
    }
    let listen = listen(
        settings,
        settings.https_port,
        &format!(" ssl http2{parameters}"),
    );
    format!(
        "server {{
{listen}    server_name _;
    ssl_reject_handshake on;
    default_type text/plain;
    return 421 \"no Deployment on this node serves this host name by https\\n\";
}}
"
    )
}

fn render_http_rules(settings: &ProxySettings) -> String {
    // In the digest of the settings.
    let https = format!("# https on port {}", settings.https_port);
    format!(
        "\
access_log off;
server_tokens off;
default_type application/octet-stream;
# A host name has up to 253 characters.
server_names_hash_bucket_size 512;
server_names_hash_max_size 16384;
large_client_header_buffers 8 32k;

# As large as the app takes it; passed on as it comes, both ways, so that uploads fill no disk and
# streams (server-sent events) arrive at once.
client_max_body_size 0;
proxy_request_buffering off;
proxy_buffering off;
proxy_max_temp_file_size 0;
proxy_buffer_size 32k;
proxy_buffers 8 32k;

# A slow client has minutes, an app an hour: websockets and long polls are silent for long.
client_header_timeout 60s;
client_body_timeout {STALLED_CLIENT_SECONDS}s;
send_timeout {STALLED_CLIENT_SECONDS}s;
keepalive_timeout 75s;
proxy_connect_timeout 5s;
proxy_send_timeout 1h;
proxy_read_timeout 1h;

# The next server of an upstream is the one of before a switch. Only what HTTP allows is sent twice:
# a request that changes something (POST, PATCH, LOCK) is not, once a byte of it was sent.
proxy_next_upstream error timeout;
# Whether the last process that was tried took the connection: else nothing of the request has reached it.
map $upstream_connect_time $kari_unreached {{
    default '';
    '~-$' 1;
}}
# Whether it took the connection and was silent then.
map $upstream_status $kari_silent {{
    default '';
    '~504$' 1;
}}
# A failure of what is asked after one of the codes of Kari's own is looked at as well.
recursive_error_pages on;

map $http_upgrade $kari_connection {{
    default upgrade;
    '' '';
}}
# What a proxy in front says of the client's own connection is passed on.
map $http_x_forwarded_proto $kari_forwarded_proto {{
    default $scheme;
    http http;
    https https;
}}
proxy_http_version 1.1;
proxy_set_header Host $http_host;
proxy_set_header Connection $kari_connection;
proxy_set_header Upgrade $http_upgrade;
proxy_set_header X-Real-IP $remote_addr;
proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
proxy_set_header X-Forwarded-Host $http_host;
proxy_set_header X-Forwarded-Proto $kari_forwarded_proto;
proxy_set_header {MEASURE_HEADER} '';
proxy_hide_header {ANSWERED_BY_HEADER};
proxy_ignore_headers X-Accel-Redirect X-Accel-Expires;
proxy_redirect off;

# Who is asked by this node itself, and who answered.
map $remote_addr $kari_local {{
    default '';
    127.0.0.1 1;
}}
map \"$kari_local $http_kari_measure\" $kari_answered_by {{
    default '';
    '1 1' '$upstream_addr;$upstream_header_time';
}}

{https}
ssl_protocols TLSv1.2 TLSv1.3;
ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
ssl_prefer_server_ciphers off;
ssl_session_cache shared:kari:8m;
ssl_session_timeout 1h;
ssl_session_tickets off;
# Who came in the clear to a host with a certificate is sent to https, unless a proxy in front says that the
# client came by TLS, or it is this node itself that measures.
map \"$scheme:$http_x_forwarded_proto $kari_local $http_kari_measure\" $kari_to_https {{
    default '';
    '~^http:(?!https ).* 1 1$' '';
    '~^http:(?!https )' 1;
}}
"
    )
}

/// `listen` directives; IPv6 only where the node has it, as nginx does not start otherwise.
fn listen(settings: &ProxySettings, port: u16, parameters: &str) -> String {
    let mut text = format!("    listen {port}{parameters};\n");
    if settings.ipv6 {
        text.push_str(&format!("    listen [::]:{port}{parameters};\n"));
    }
    text
}

/// Says `text` to 127.0.0.1 and is not there for anybody else. Not by `allow` and `deny`, which are
/// looked at after `return`.
fn identity(text: &str) -> String {
    format!(
        "    location = {IDENTITY_PATH} {{
        default_type text/plain;
        if ($kari_local = '') {{
            return 404;
        }}
        return 200 '{text}\\n';
    }}
"
    )
}

/// The name of a Deployment's file in vhosts/.
pub fn virtual_host_file(app: &AppName) -> String {
    format!("{app}.conf")
}

/// A Deployment's file: the upstream of each route, and a server for all the hosts that have the same routes.
pub fn render_virtual_host(host: &VirtualHost, settings: &ProxySettings, folder: &Path) -> String {
    let VirtualHost {
        app,
        release_id,
        routes,
    } = host;
    let mut text = format!("# Written by kari agent for {app}; an edit is overwritten.\n");
    for Route {
        process,
        hosts: _,
        path: _,
        target,
        probe_path: _,
        certificate: _,
    } in routes
    {
        let upstream = upstream_name(app, process);
        text.push_str(&match target {
            RouteTarget::Port { primary, backup } => render_upstream(&upstream, *primary, *backup),
            // The same text as that of a port: a file more is the difference.
            RouteTarget::Paused { primary } => render_upstream(&upstream, *primary, None),
            RouteTarget::Unavailable => String::new(),
        });
    }
    let mut servers: Vec<(Vec<&str>, Vec<&Route>)> = vec![];
    for (host, routes) in host.routes_by_host() {
        match servers.iter_mut().find(|(_, known)| *known == routes) {
            Some((names, _)) => names.push(host.as_str()),
            None => servers.push((vec![host.as_str()], routes)),
        }
    }
    let identity = identity(&release_id.to_string());
    let listen = listen(settings, settings.http_port, "");
    let folder = folder.join(PAUSED_FOLDER);
    for (names, routes) in servers {
        let names = names.join(" ");
        let has_all = routes.iter().any(|route| route.path.is_all());
        let locations: String = routes
            .iter()
            .map(|route| render_locations(app, route, &folder))
            .collect();
        let others = if has_all { "" } else { NO_SUCH_PATH };
        let tls = certificate_of(&routes)
            .map(|certificate| render_tls(app, certificate, settings))
            .unwrap_or_default();
        text.push_str(&format!(
            "server {{
{listen}{tls}    server_name {names};
    add_header {ANSWERED_BY_HEADER} $kari_answered_by always;
{identity}{locations}{others}}}
"
        ));
    }
    text
}

/// What a server has besides where its hosts have a certificate: the port, the files, and that requests in the
/// clear are sent there. 308, so that a POST stays one.
fn render_tls(app: &AppName, certificate: &CertificateId, settings: &ProxySettings) -> String {
    let port = settings.https_port;
    let listen = listen(settings, port, " ssl http2");
    let [chain, key] = certificate_files(app, certificate);
    let place = match port {
        443 => String::new(),
        other => format!(":{other}"),
    };
    format!(
        "{listen}    ssl_certificate {CERTIFICATE_RUN_FOLDER}/{chain};
    ssl_certificate_key {CERTIFICATE_RUN_FOLDER}/{key};
    if ($kari_to_https) {{
        return 308 https://$host{place}$request_uri;
    }}
"
    )
}

/// Answers where no route has the path.
const NO_SUCH_PATH: &str = "    location / {
        default_type text/plain;
        return 404 \"no process of this Deployment serves this path\\n\";
    }
";

fn upstream_name(app: &AppName, process: &str) -> String {
    format!("kari.{app}.{process}")
}

/// The locations of a route: its path itself and what is below it. nginx takes the longest that fits.
fn render_locations(app: &AppName, route: &Route, pause_folder: &Path) -> String {
    let Route {
        process,
        hosts: _,
        path,
        target,
        probe_path: _,
        certificate: _,
    } = route;
    let upstream = upstream_name(app, process);
    let (rules, named) = match target {
        RouteTarget::Port { primary, backup: _ } | RouteTarget::Paused { primary } => {
            let pause_file = pause_folder.join(pause_file(app, process, *primary));
            render_pass(process, &upstream, &pause_file)
        }
        RouteTarget::Unavailable => (UNAVAILABLE.to_owned(), String::new()),
    };
    let path = path.as_str();
    let matchers = match path {
        "/" => vec!["/".to_owned()],
        _ => vec![format!("= {path}"), format!("{path}/")],
    };
    let locations: String = matchers
        .iter()
        .map(|matcher| format!("    location {matcher} {{\n{rules}    }}\n"))
        .collect();
    locations + &named
}

/// Passes requests on while no file says otherwise: what the route's locations say, and the locations that
/// they name.
fn render_pass(process: &str, upstream: &str, pause_file: &Path) -> (String, String) {
    let pause_file = pause_file.display();
    let rules = format!(
        "        if (-f {pause_file}) {{
            return {PAUSED_CODE};
        }}
        if (-f {CLOSING_FILE}) {{
            return {CLOSING_CODE};
        }}
        error_page {PAUSED_CODE} = @paused.{process};
        error_page {CLOSING_CODE} = @closing.{process};
        error_page 502 504 = @failed.{process};
        proxy_pass http://{upstream};
"
    );
    // Of nginx's own failures only: the app's answers with these statuses are not looked at.
    let named = format!(
        "    location @closing.{process} {{
        keepalive_timeout 0;
        error_page 502 504 = @failed.{process};
        proxy_pass http://{upstream};
    }}
    location @paused.{process} {{
        keepalive_timeout 0;
{UNAVAILABLE}    }}
    location @failed.{process} {{
        default_type text/plain;
        add_header {ANSWERED_BY_HEADER} $kari_answered_by always;
        if ($kari_unreached) {{
            add_header {ANSWERED_BY_HEADER} $kari_answered_by always;
            add_header Retry-After 5 always;
            return 503 \"process {process} is not running on this node at the moment\\n\";
        }}
        if ($kari_silent) {{
            return 504 \"process {process} gave no answer to this request in time\\n\";
        }}
        return 502 \"process {process} broke off in the middle of this request\\n\";
    }}
"
    );
    (rules, named)
}

/// Idle connections to an app are kept for less time than any app server keeps them: one that the app
/// closes in the moment it is used costs a POST its answer.
fn render_upstream(name: &str, primary: u16, backup: Option<u16>) -> String {
    // max_fails=0: the primary is asked each time, so that the answer tells whether it is up.
    let backup = backup
        .filter(|backup| *backup != primary)
        .map(|port| format!("    server 127.0.0.1:{port} max_fails=0 backup;\n"))
        .unwrap_or_default();
    format!(
        "upstream {name} {{
    server 127.0.0.1:{primary} max_fails=0;
{backup}    keepalive 32;
    keepalive_timeout 1s;
    keepalive_requests 10000;
}}
"
    )
}

/// Copies the certificates, and tries all files before a start. If nginx refuses them, tries each alone and sets aside (.bad) those
/// that are refused: one bad file must not keep all Deployments down after a boot.
fn render_guard(settings: &ProxySettings, folder: &Path) -> String {
    let all = render_top(folder, "$run", "vhosts/*.conf");
    let one = render_top(folder, "$run", "$1");
    let folder = folder.display();
    let nginx = settings.nginx.display();
    format!(
        "\
# Written by kari agent; an edit is overwritten.
# Run as root before each start of {UNIT}.
set -u
run={RUN_FOLDER}/guard
mkdir -p $run
trap 'rm -rf $run' EXIT
if [ -d {folder}/{CERTIFICATE_FOLDER} ]; then
    rm -rf {CERTIFICATE_RUN_FOLDER}
    cp -r {folder}/{CERTIFICATE_FOLDER} {CERTIFICATE_RUN_FOLDER}
    chown -R \"$(stat -c %u:%g {RUN_FOLDER}/.)\" {CERTIFICATE_RUN_FOLDER}
fi
try() {{ {nginx} -t -q -c $run/nginx.conf -g \"pid $run/pid;\"; }}

cat >$run/nginx.conf <<END
{all}END
if try; then exit 0; fi

set_one() {{ cat >$run/nginx.conf <<END
{one}END
}}
cd {folder}
for file in vhosts/*.conf; do
    set_one \"$file\"
    if ! try; then
        echo \"$file is refused and set aside as $file.bad\" >&2
        mv -f \"$file\" \"$file.bad\"
    fi
done
"
    )
}

/// The unit file.
pub fn render_unit(settings: &ProxySettings, folder: &Path) -> String {
    let folder = folder.display();
    let nginx = settings.nginx.display();
    let command =
        format!("{nginx} -c {folder}/nginx.conf -e stderr -g \"pid {RUN_FOLDER}/nginx.pid;\"");
    format!(
        "\
# Written by kari agent; an edit is overwritten.
[Unit]
Description=Kari's proxy: nginx in front of the node's Deployments
After=network.target
StartLimitIntervalSec=0

[Service]
Type=forking
PIDFile={RUN_FOLDER}/nginx.pid
RuntimeDirectory=kari/proxy
DynamicUser=yes
# As root, to set files aside. No text of a user's is in this unit.
ExecStartPre=+/bin/sh {folder}/guard.sh
ExecStart={command}
# What it says is for the agent.
ExecReload=/bin/sh -c 'exec {command} -s reload >{RUN_FOLDER}/reload.log 2>&1'
KillMode=mixed
KillSignal=SIGQUIT
TimeoutStartSec=60
TimeoutStopSec=15
Restart=always
RestartSec=2
LimitNOFILE=65536
LimitCORE=0
TasksMax=1024
OOMScoreAdjust=-500
UMask=0077

AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
SecureBits=noroot-locked
NoNewPrivileges=yes
RestrictSUIDSGID=yes
KeyringMode=private
RemoveIPC=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictNamespaces=yes
MemoryDenyWriteExecute=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
PrivateIPC=yes
PrivateMounts=yes
ProtectProc=invisible
ProcSubset=pid
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
InaccessiblePaths=-/run/dbus -/etc/kubernetes -/var/lib/kubelet -/run/containerd -/run/docker.sock -/etc/ssh

[Install]
WantedBy=multi-user.target
"
    )
}
