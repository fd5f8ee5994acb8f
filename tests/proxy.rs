//! The proxy on a real node: real systemd, real nginx, and requests as people send them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

#[path = "support/in_node.rs"]
mod in_node;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "support/tls.rs"]
mod tls;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "support/traffic.rs"]
mod traffic;

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use kari::agent::host::proxy::{
    CertificateId, DRAIN_LIMIT, HostName, OldWorkers, Proxy, ProxyError, ProxySettings, Route,
    RoutePath, RouteTarget, UNIT, VirtualHost,
};
use kari::agent::host::store::{Store, UNIT_FOLDER, UnitFiles};
use kari::agent::host::systemd::{HostEvent, Systemd};
use kari::api::names::{AppName, ReleaseId};
use kari::certificate::ServerCertificate;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use traffic::Traffic;

const HTTP_PORT: u16 = 8080;
const HTTPS_PORT: u16 = 8443;

/// More than all buffers between an app and a client hold.
const DOWNLOAD_BYTES: usize = 64 << 20;

/// Outside: runs the calling test in the node, and ends it.
macro_rules! in_node {
    () => {
        if in_node::outside(std::any::type_name_of_val(&|| ())).await {
            return;
        }
    };
}

// ---- The app: says its name, takes uploads, streams, echoes after an upgrade ----

fn router(name: &'static str) -> axum::Router {
    use axum::routing::{any, get, post};
    let stream = || async {
        let (sender, receiver) = futures::channel::mpsc::unbounded::<Result<Bytes, Infallible>>();
        tokio::spawn(async move {
            for event in ["data: one\n\n", "data: two\n\n"] {
                let _ = sender.unbounded_send(Ok(Bytes::from(event)));
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        });
        (
            [("content-type", "text/event-stream")],
            Body::from_stream(receiver),
        )
    };
    let uploaded = Arc::new(tokio::sync::Notify::new());
    let waiting = Arc::clone(&uploaded);
    let events = move || {
        let waiting = Arc::clone(&waiting);
        async move {
            let (sender, receiver) =
                futures::channel::mpsc::unbounded::<Result<Bytes, Infallible>>();
            tokio::spawn(async move {
                let _ = sender.unbounded_send(Ok(Bytes::from("data: begun\n\n")));
                waiting.notified().await;
                let _ = sender.unbounded_send(Ok(Bytes::from("data: uploaded\n\n")));
            });
            (
                [("content-type", "text/event-stream")],
                Body::from_stream(receiver),
            )
        }
    };
    let upload = move |mut body: Body| {
        let uploaded = Arc::clone(&uploaded);
        async move {
            let mut length = 0;
            while let Some(frame) = body.frame().await {
                length += frame.unwrap().into_data().map_or(0, |data| data.len());
            }
            uploaded.notify_one();
            length.to_string()
        }
    };
    let headers = |request: axum::extract::Request| async move {
        let mut lines: Vec<_> = request
            .headers()
            .iter()
            .map(|(k, v)| format!("{k}: {}", v.to_str().unwrap()))
            .collect();
        lines.sort();
        lines.join("\n")
    };
    let slow = move || async move {
        tokio::time::sleep(Duration::from_secs(3)).await;
        name
    };
    let download = || async { vec![b'd'; DOWNLOAD_BYTES] };
    let uri = move |uri: axum::http::Uri| async move { format!("{name} {uri}") };
    let status = |axum::extract::Path(code): axum::extract::Path<u16>| async move {
        let code = axum::http::StatusCode::from_u16(code).unwrap();
        (code, "the app's own")
    };
    // The connection ends with what serves it.
    let broken = |request: axum::extract::Request| async move {
        request.headers()["a-header-that-no-request-has"]
            .is_sensitive()
            .to_string()
    };
    let upgrade = |mut request: axum::extract::Request| async move {
        let upgraded = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgraded.await.unwrap());
            let (mut read, mut write) = tokio::io::split(&mut stream);
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
        (
            axum::http::StatusCode::SWITCHING_PROTOCOLS,
            [("connection", "upgrade"), ("upgrade", "echo")],
        )
    };
    axum::Router::new()
        .route("/", any(move || async move { name }))
        .route("/headers", get(headers))
        .route("/stream", get(stream))
        .route("/events", get(events))
        .route("/slow", get(slow))
        .route("/upgrade", get(upgrade))
        .route("/download", get(download))
        .route("/status/{code}", any(status))
        .route("/broken", get(broken))
        .fallback(uri)
        .route("/upload", post(upload))
}

/// A server on a runtime of its own: it dies with its connections.
struct App(Option<Runtime>);

impl App {
    async fn start(name: &str, port: u16) -> Self {
        let router = router(name.to_owned().leak());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port))
                .await
                .unwrap();
            axum::serve(listener, router).await.unwrap();
        });
        until("the app listens", || async {
            tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port))
                .await
                .is_ok()
        })
        .await;
        Self(Some(runtime))
    }
}

impl Drop for App {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

async fn until<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !check().await {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

// ---- The node ----

struct Node {
    systemd: Systemd,
    _events: mpsc::Receiver<HostEvent>,
    store: Store,
    units: UnitFiles,
    proxy: Proxy,
}

impl Node {
    async fn new() -> Self {
        let (systemd, events) = Systemd::connect(None).await.unwrap();
        let store = Store::open(Path::new("/var/lib/kari")).unwrap();
        let units = UnitFiles::new(Path::new(UNIT_FOLDER));
        let settings = ProxySettings::of_this_node(HTTP_PORT, HTTPS_PORT, "/usr/sbin/nginx".into());
        let proxy = Proxy::new(store.proxy(), units.clone(), systemd.clone(), settings);
        Self {
            systemd,
            _events: events,
            store,
            units,
            proxy,
        }
    }
}

fn virtual_host(
    app: &str,
    release: u128,
    hosts: &[&str],
    primary: u16,
    backup: Option<u16>,
) -> VirtualHost {
    VirtualHost {
        app: AppName::parse(app).unwrap(),
        release_id: ReleaseId(uuid::Uuid::from_u128(release)),
        routes: vec![Route {
            process: "web".into(),
            hosts: hosts
                .iter()
                .map(|host| HostName::parse(host).unwrap())
                .collect(),
            path: RoutePath::parse("/").unwrap(),
            target: RouteTarget::Port { primary, backup },
            probe_path: None,
            certificate: None,
        }],
    }
}

async fn drain(proxy: &Proxy, mut old: OldWorkers) -> Duration {
    let start = Instant::now();
    while !old.is_empty() && start.elapsed() < DRAIN_LIMIT {
        tokio::time::sleep(Duration::from_millis(50)).await;
        old = proxy.still_draining(&old).await.unwrap();
    }
    start.elapsed()
}

/// One request on a connection of its own, as bytes; gives back the whole answer.
fn ask(address: &str, host: &str, request: &str) -> String {
    let mut stream = TcpStream::connect((address, HTTP_PORT)).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    write!(
        stream,
        "{request} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_somebody_holds_is_named_with_its_holder() {
    in_node!();
    let node = &Node::new().await;
    node.systemd
        .stop_unit(UNIT, Duration::from_secs(20))
        .await
        .unwrap();
    let holder = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, HTTP_PORT)).unwrap();
    let error = node.proxy.ensure().await.unwrap_err();
    println!("  {error}");
    assert!(
        matches!(&error, ProxyError::PortHeld { port: HTTP_PORT, holder } if holder.contains(&format!("(pid {})", std::process::id()))),
        "{error}"
    );
    drop(holder);
    until(
        "the proxy comes up by itself when the port is free",
        || async { node.proxy.ensure().await.is_ok() },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_comes_up_and_refuses_hosts_that_nobody_has() {
    in_node!();
    let node = &Node::new().await;
    let start = Instant::now();
    node.proxy.ensure().await.unwrap();
    println!("  up in {} ms", start.elapsed().as_millis());
    let before = reloads();
    let start = Instant::now();
    node.proxy.ensure().await.unwrap();
    assert_eq!(reloads(), before, "a look changes nothing");
    println!("  looked at again in {} ms", start.elapsed().as_millis());
    let answer = ask("127.0.0.1", "nobody.test", "GET /");
    assert!(answer.starts_with("HTTP/1.1 421 "), "{answer}");
    assert!(node.units.is_enabled(UNIT).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_reaches_the_app_as_people_expect() {
    in_node!();
    let node = &Node::new().await;
    let _app = App::start("v1", 21001).await;
    let host = virtual_host("web.shop", 1, &["shop.test", "*.shop.test"], 21001, None);
    node.proxy.publish(&host).await.unwrap();

    for name in ["shop.test", "SHOP.test", "a.b.shop.test"] {
        assert!(
            ask("127.0.0.1", name, "GET /").ends_with("\r\n\r\nv1"),
            "{name}"
        );
    }
    // Nobody but the node itself learns what is behind.
    run("ip addr replace 10.99.0.1/32 dev lo");
    assert!(ask("10.99.0.1", "shop.test", "GET /.well-known/kari").starts_with("HTTP/1.1 404 "));
    assert!(
        ask("127.0.0.1", "shop.test", "GET /.well-known/kari")
            .contains("00000000-0000-0000-0000-000000000001")
    );
    let measured =
        "GET / HTTP/1.1\r\nKari-Measure: 1\r\nHost: shop.test\r\nConnection: close\r\n\r\nGET /x";
    assert!(!ask("10.99.0.1", "shop.test", measured).contains("Kari-Answered-By"));

    let headers = ask("10.99.0.1", "shop.test:8080", "GET /headers");
    for line in [
        "host: shop.test:8080",
        "x-forwarded-for: 10.99.0.1",
        "x-forwarded-proto: http",
        "x-forwarded-host: shop.test:8080",
        "x-real-ip: 10.99.0.1",
    ] {
        assert!(headers.contains(line), "{line} is not in {headers}");
    }

    // 200 MB, sent as fast as the app takes it.
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, HTTP_PORT)).unwrap();
    let length = 200 << 20;
    write!(stream, "POST /upload HTTP/1.1\r\nHost: shop.test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n").unwrap();
    let chunk = vec![7; 1 << 20];
    for _ in 0..200 {
        stream.write_all(&chunk).unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(&length.to_string()), "{answer}");

    // The first event arrives before the second is sent.
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, HTTP_PORT)).unwrap();
    let start = Instant::now();
    write!(stream, "GET /stream HTTP/1.1\r\nHost: shop.test\r\n\r\n").unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("data: one") {
        let mut chunk = [0; 1024];
        let length = stream.read(&mut chunk).unwrap();
        assert_ne!(length, 0);
        seen.extend_from_slice(&chunk[..length]);
    }
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );

    let mut socket = upgraded("shop.test");
    socket.write_all(b"ping").unwrap();
    let mut echo = [0; 4];
    socket.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"ping");
}

fn upgraded(host: &str) -> TcpStream {
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, HTTP_PORT)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    write!(
        socket,
        "GET /upgrade HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
    )
    .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    socket
}

#[derive(Clone)]
struct Direct;

impl traffic::Connect for Direct {
    type Stream = tokio::net::TcpStream;

    async fn connect(&self, to: SocketAddr) -> std::io::Result<Self::Stream> {
        let stream = tokio::net::TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

fn with_certificate(mut host: VirtualHost, id: &CertificateId) -> VirtualHost {
    for route in &mut host.routes {
        route.certificate = Some(id.clone());
    }
    host
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_served_and_changed_under_load_without_a_failed_request() {
    in_node!();
    let node = &Node::new().await;
    let _app = App::start("v1", 21500).await;
    let authority = tls::Authority::new();
    let names = ["tls.test", "*.tls.test"];
    let (first, second) = (authority.issue(&names), authority.issue(&names));
    let app = AppName::parse("web.tls").unwrap();
    let keep = |digit: &str, issued: &tls::Issued| {
        let id = CertificateId::parse(&digit.repeat(40)).unwrap();
        let certificate = ServerCertificate {
            chain: issued.certificate.clone(),
            key: issued.key.clone(),
        };
        node.proxy
            .keep_certificate(&app, &id, &certificate)
            .unwrap();
        id
    };
    let host = virtual_host("web.tls", 1, &names, 21500, None);
    let missing = CertificateId::parse(&"0".repeat(40)).unwrap();
    let error = node
        .proxy
        .publish(&with_certificate(host.clone(), &missing))
        .await
        .unwrap_err();
    assert!(matches!(error, ProxyError::NoCertificate { .. }), "{error}");
    let id = keep("a", &first);
    node.proxy
        .publish(&with_certificate(host.clone(), &id))
        .await
        .unwrap();

    // In the clear to https, but not twice; and nobody else's name is answered for.
    for method in ["GET", "POST"] {
        let answer = ask("127.0.0.1", "tls.test", &format!("{method} /x?y=z"));
        assert!(answer.starts_with("HTTP/1.1 308 "), "{answer}");
        assert!(
            answer.contains("\r\nLocation: https://tls.test:8443/x?y=z\r\n"),
            "{answer}"
        );
    }
    let ended_in_front = "GET / HTTP/1.1\r\nX-Forwarded-Proto: https\r\nHost: tls.test\r\nConnection: close\r\n\r\nGET /x";
    let answer = ask("127.0.0.1", "tls.test", ended_in_front);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let to: SocketAddr = (Ipv4Addr::LOCALHOST, HTTPS_PORT).into();
    let stranger = tls::Tls::new(Direct, &authority, "other.test");
    let answer = traffic::get_once(&stranger, to, "tls.test", "/").await;
    assert!(answer.is_err(), "{answer:?}");
    let below = tls::Tls::new(Direct, &authority, "a.tls.test");
    let (status, headers) = traffic::get_once(&below, to, "a.tls.test", "/headers")
        .await
        .unwrap();
    assert_eq!(status, 200);
    assert!(headers.contains("x-forwarded-proto: https"), "{headers}");

    let client = tls::Tls::new(Direct, &authority, "tls.test");
    let traffic = Traffic::start(client.clone(), to, "tls.test", 200, 10);
    until("requests are answered", || async {
        traffic.tally().good > 100
    })
    .await;
    let id = keep("b", &second);
    let start = Instant::now();
    let old = node
        .proxy
        .publish(&with_certificate(host.clone(), &id))
        .await
        .unwrap();
    let took = start.elapsed();
    drain(&node.proxy, old).await;
    until("the new one is shown", || async {
        client.shown(&second) >= 10
    })
    .await;
    let seen = traffic.stop().await;
    println!(
        "  changed in {} ms: {} good, {} failed, {} on a new connection",
        took.as_millis(),
        seen.good,
        seen.failed.len(),
        seen.reconnected
    );
    assert_eq!(seen.failed, Vec::<String>::new());
    let files = run("cd /var/lib/kari/proxy/certificates && stat -c '%a %u %n' * | sort");
    let name = |kind| format!("600 0 web.tls.{}.{kind}", "b".repeat(40));
    assert_eq!(files.trim(), format!("{}\n{}", name("crt"), name("key")));

    // As after a boot: what is in memory is gone, and no agent brings it back.
    run(&format!(
        "systemctl stop {UNIT} && rm -rf /run/kari/proxy /run/private/kari && systemctl start {UNIT}"
    ));
    assert_eq!(
        traffic::get_once(&client, to, "tls.test", "/")
            .await
            .unwrap(),
        (200, "v1".to_owned())
    );
    let shown = run("stat -L -c '%a %U' /run/kari/proxy/certificates/*.key");
    assert_eq!(shown.trim(), "600 kari-proxy");

    // Without it the host is served in the clear, as before; and nothing is left of it.
    node.proxy.publish(&host).await.unwrap();
    assert!(ask("127.0.0.1", "tls.test", "GET /").ends_with("\r\n\r\nv1"));
    assert!(
        traffic::get_once(&client, to, "tls.test", "/")
            .await
            .is_err()
    );
    let left =
        "ls -A /var/lib/kari/proxy/certificates /run/kari/proxy/certificates | grep web.tls || :";
    assert_eq!(run(left), "");
    node.proxy.remove(&app).await.unwrap();

    // Somebody else has the port for TLS: what needs it is told who, and the rest is served.
    node.systemd
        .stop_unit(UNIT, Duration::from_secs(20))
        .await
        .unwrap();
    let holder = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, HTTPS_PORT)).unwrap();
    node.proxy.ensure().await.unwrap();
    node.proxy.publish(&host).await.unwrap();
    assert!(ask("127.0.0.1", "tls.test", "GET /").ends_with("\r\n\r\nv1"));
    let id = keep("c", &first);
    let by_tls = with_certificate(host.clone(), &id);
    let error = node.proxy.publish(&by_tls).await.unwrap_err();
    let pid = format!("(pid {})", std::process::id());
    assert!(
        matches!(&error, ProxyError::NoTls { why, .. } if why.contains(&pid)),
        "{error}"
    );
    drop(holder);
    node.proxy.ensure().await.unwrap();
    node.proxy.publish(&by_tls).await.unwrap();
    let answer = traffic::get_once(&client, to, "tls.test", "/").await;
    assert_eq!(answer.unwrap().0, 200);
    node.proxy.remove(&app).await.unwrap();
}

/// `SWITCHES=100` for a longer proof.
#[tokio::test(flavor = "multi_thread")]
async fn a_switch_under_load_fails_no_request() {
    in_node!();
    let node = &Node::new().await;
    let switches: usize = std::env::var("SWITCHES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(3);
    let mut old_port = 21100;
    let mut old_app = Some(App::start("v0", old_port).await);
    node.proxy
        .publish(&virtual_host(
            "web.shop",
            100,
            &["shop.test"],
            old_port,
            None,
        ))
        .await
        .unwrap();

    let traffic = Traffic::start(
        Direct,
        (Ipv4Addr::LOCALHOST, HTTP_PORT).into(),
        "shop.test",
        200,
        10,
    );
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut switched = Vec::new();
    for switch in 1..=switches {
        let port = 21100 + switch as u16;
        let app = App::start(&format!("v{switch}"), port).await;
        let release = 100 + switch as u128;
        let start = Instant::now();
        let switching = virtual_host("web.shop", release, &["shop.test"], port, Some(old_port));
        let old = node.proxy.publish(&switching).await.unwrap();
        switched.push(start.elapsed().as_millis());
        drain(&node.proxy, old).await;
        // The backup goes before its port does.
        let old = node
            .proxy
            .publish(&virtual_host(
                "web.shop",
                release,
                &["shop.test"],
                port,
                None,
            ))
            .await
            .unwrap();
        drain(&node.proxy, old).await;
        old_app.take();
        old_app = Some(app);
        old_port = port;
    }
    let seen = traffic.stop().await;
    println!(
        "  {switches} switches, each in force after {switched:?} ms: {} good, {} failed, {} on a new connection",
        seen.good,
        seen.failed.len(),
        seen.reconnected
    );
    assert_eq!(seen.failed, Vec::<String>::new());
    assert_eq!(
        seen.bodies.len(),
        switches + 1,
        "every release answered: {:?}",
        seen.bodies
    );
    drop(old_app);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_request_of_before_a_switch_ends_whole() {
    in_node!();
    let node = &Node::new().await;
    let old = App::start("old", 21001).await;
    let new = App::start("new", 21002).await;
    node.proxy
        .publish(&virtual_host("web.shop", 1, &["shop.test"], 21001, None))
        .await
        .unwrap();
    let socket = upgraded("shop.test");
    let slow = std::thread::spawn(|| ask("127.0.0.1", "shop.test", "GET /slow"));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let workers = node
        .proxy
        .publish(&virtual_host(
            "web.shop",
            2,
            &["shop.test"],
            21002,
            Some(21001),
        ))
        .await
        .unwrap();
    assert!(ask("127.0.0.1", "shop.test", "GET /").ends_with("new"));
    // The websocket holds a worker.
    assert!(
        !node
            .proxy
            .still_draining(&workers)
            .await
            .unwrap()
            .is_empty()
    );
    let answer = tokio::task::spawn_blocking(|| slow.join().unwrap())
        .await
        .unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("old"),
        "{answer}"
    );
    drop(socket);
    let took = drain(&node.proxy, workers).await;
    assert!(took < Duration::from_secs(5), "{took:?}");
    drop((old, new));
}

fn route(process: &str, hosts: &[&str], path: &str, port: u16) -> Route {
    let mut host = virtual_host("web.shop", 1, hosts, port, None);
    let route = host.routes.remove(0);
    Route {
        process: process.into(),
        path: RoutePath::parse(path).unwrap(),
        ..route
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_reaches_the_process_that_has_the_longest_beginning_of_it() {
    in_node!();
    let node = &Node::new().await;
    let _apps = [
        App::start("web", 21201).await,
        App::start("api", 21202).await,
        App::start("v2", 21203).await,
    ];
    let mut host = virtual_host("web.paths", 20, &["paths.test"], 21201, None);
    host.routes = vec![
        route("web", &["paths.test"], "/", 21201),
        route("api", &["paths.test", "api.paths.test"], "/api", 21202),
        route("v2", &["api.paths.test", "paths.test"], "/api/v2", 21203),
    ];
    node.proxy.publish(&host).await.unwrap();
    for (name, path, answer) in [
        ("paths.test", "/", "web"),
        ("paths.test", "/apix", "web /apix"),
        ("paths.test", "/api", "api /api"),
        ("paths.test", "/api/", "api /api/"),
        ("PATHS.test", "/api/x?y=/z", "api /api/x?y=/z"),
        // Compared as it is meant, passed on as it was sent.
        ("paths.test", "/a%70i//x%20y", "api /a%70i//x%20y"),
        ("paths.test", "/api/x/../../b", "web /api/x/../../b"),
        ("paths.test", "/api/v2", "v2 /api/v2"),
        ("paths.test", "/api/v2/x", "v2 /api/v2/x"),
        ("paths.test", "/api/v21", "api /api/v21"),
        ("api.paths.test", "/api/x", "api /api/x"),
        ("api.paths.test", "/api/v2/x", "v2 /api/v2/x"),
    ] {
        let got = ask("127.0.0.1", name, &format!("GET {path}"));
        assert!(
            got.ends_with(&format!("\r\n\r\n{answer}")),
            "{name}{path}: {got}"
        );
    }
    for path in ["/", "/apix"] {
        let got = ask("127.0.0.1", "api.paths.test", &format!("GET {path}"));
        assert!(got.starts_with("HTTP/1.1 404 "), "{path}: {got}");
    }

    // What is measured is each path of each host: one that is another's is found.
    let mut wrong = host.clone();
    wrong.routes[2].target = RouteTarget::Port {
        primary: 21204,
        backup: None,
    };
    let error = node.proxy.measure(&wrong).await.unwrap_err().to_string();
    assert!(
        error.contains("GET /api/v2: port 21203 answered it, not port 21204"),
        "{error}"
    );
    let mut probed = host.clone();
    probed.routes[1].probe_path = Some("/api/v2/healthz".into());
    node.proxy.measure(&probed).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_not_there_is_answered_for_with_when_to_come_again() {
    in_node!();
    let node = &Node::new().await;
    let app = App::start("dead", 21211).await;
    let host = virtual_host("web.dead", 21, &["dead.test"], 21211, None);
    node.proxy.publish(&host).await.unwrap();
    // What the app says itself is passed on as it is, and what it breaks off is no invitation to send it again.
    for code in [502, 503, 504] {
        let answer = ask("127.0.0.1", "dead.test", &format!("GET /status/{code}"));
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
        assert!(answer.ends_with("\r\n\r\nthe app's own"), "{answer}");
    }
    let answer = ask("127.0.0.1", "dead.test", "GET /broken");
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    assert!(!answer.contains("Retry-After"), "{answer}");

    drop(app);
    until("the app is gone", || async {
        tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, 21211))
            .await
            .is_err()
    })
    .await;
    for request in ["GET /", "DELETE /x"] {
        let answer = ask("127.0.0.1", "dead.test", request);
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(answer.contains("\r\nRetry-After: "), "{answer}");
    }
    let answer = ask(
        "127.0.0.1",
        "dead.test",
        "GET / HTTP/1.1\r\nHost: dead.test\r\n\r\nGET /",
    );
    assert_eq!(
        answer.matches("HTTP/1.1 503 ").count(),
        2,
        "the connection is kept: {answer}"
    );
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, HTTP_PORT)).unwrap();
    write!(stream, "POST /upload HTTP/1.1\r\nHost: dead.test\r\nConnection: close\r\nContent-Length: 9\r\n\r\nfour").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    let error = node.proxy.measure(&host).await.unwrap_err().to_string();
    assert!(
        error.contains("port 21211 did not answer it: the proxy says status 503"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_streams_and_slow_clients_of_before_a_switch_end_whole() {
    in_node!();
    let node = &Node::new().await;
    let old = App::start("old", 21221).await;
    let new = App::start("new", 21222).await;
    let publish = |release, primary, backup| {
        virtual_host("web.long", release, &["long.test"], primary, backup)
    };
    node.proxy.publish(&publish(22, 21221, None)).await.unwrap();

    let open = |request: &str| {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, HTTP_PORT)).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        write!(
            stream,
            "{request} HTTP/1.1\r\nHost: long.test\r\nConnection: close\r\n"
        )
        .unwrap();
        stream
    };
    const HALF: usize = 100 << 20;
    let mut upload = open("POST /upload");
    write!(upload, "Content-Length: {}\r\n\r\n", 2 * HALF).unwrap();
    upload.write_all(&vec![7; HALF]).unwrap();
    let mut events = open("GET /events");
    write!(events, "\r\n").unwrap();
    let mut seen = String::new();
    while !seen.contains("data: begun") {
        let mut chunk = [0; 1024];
        let length = events.read(&mut chunk).unwrap();
        assert_ne!(length, 0, "{seen}");
        seen += &String::from_utf8_lossy(&chunk[..length]);
    }
    let mut slow = open("GET /download");
    write!(slow, "\r\n").unwrap();
    let mut downloaded = vec![0; 100];
    slow.read_exact(&mut downloaded).unwrap();

    let workers = node
        .proxy
        .publish(&publish(23, 21222, Some(21221)))
        .await
        .unwrap();
    assert!(ask("127.0.0.1", "long.test", "GET /").ends_with("new"));

    upload.write_all(&vec![7; HALF]).unwrap();
    let mut answer = String::new();
    upload.read_to_string(&mut answer).unwrap();
    assert!(
        answer.ends_with(&format!("\r\n\r\n{}", 2 * HALF)),
        "{answer}"
    );
    events.read_to_string(&mut seen).unwrap();
    assert!(seen.contains("data: uploaded"), "{seen}");
    for _ in 0..20 {
        let mut byte = [0];
        slow.read_exact(&mut byte).unwrap();
        downloaded.push(byte[0]);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    slow.read_to_end(&mut downloaded).unwrap();
    let body = downloaded
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .unwrap()
        + 4;
    assert_eq!(downloaded.len() - body, DOWNLOAD_BYTES);
    assert!(drain(&node.proxy, workers).await < Duration::from_secs(5));
    drop((old, new));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_process_answers_when_the_new_one_is_not_there() {
    in_node!();
    let node = &Node::new().await;
    let _old = App::start("old", 21001).await;
    let new = App::start("new", 21002).await;
    let switching = virtual_host("web.shop", 3, &["shop.test"], 21002, Some(21001));
    node.proxy.publish(&switching).await.unwrap();
    drop(new);
    assert!(ask("127.0.0.1", "shop.test", "GET /").ends_with("old"));
    let error = node.proxy.measure(&switching).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("port 21001 answered it, not port 21002"),
        "{error}"
    );
    let mut stopped = switching;
    stopped.routes[0].target = RouteTarget::Unavailable;
    node.proxy.publish(&stopped).await.unwrap();
    assert!(ask("127.0.0.1", "shop.test", "GET /").starts_with("HTTP/1.1 503 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_publishes_at_once_share_a_few_reloads() {
    in_node!();
    let node = &Node::new().await;
    let _app = App::start("many", 21003).await;
    let before = reloads();
    let start = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for at in 0..50 {
        let proxy = node.proxy.clone();
        tasks.spawn(async move {
            proxy
                .publish(&virtual_host(
                    &format!("many.app{at}"),
                    1000 + at,
                    &[&format!("app{at}.test")],
                    21003,
                    None,
                ))
                .await
                .unwrap();
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    println!(
        "  50 apps published in {} ms, {} reloads",
        start.elapsed().as_millis(),
        reloads() - before
    );
    assert!(ask("127.0.0.1", "app49.test", "GET /").ends_with("many"));
    let hosts = node.proxy.hosts().unwrap();
    assert!(
        (0..50).all(|at| hosts.contains_key(&AppName::parse(&format!("many.app{at}")).unwrap())),
        "{hosts:?}"
    );
    assert!(reloads() - before <= 5);
}

/// Reloads so far, by what systemd logged.
fn reloads() -> usize {
    run(&format!(
        "journalctl -u {UNIT} -o cat | grep -c '^Reloaded' || true"
    ))
    .trim()
    .parse()
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_file_of_somebody_elses_is_named_and_harms_nothing() {
    in_node!();
    let node = &Node::new().await;
    let _app = App::start("new", 21004).await;
    node.proxy
        .publish(&virtual_host("web.stays", 6, &["stays.test"], 21004, None))
        .await
        .unwrap();
    let bad = node.store.proxy().join("vhosts/somebody.else.conf");
    std::fs::write(
        &bad,
        "server { listen 8080; server_name a.test; nonsense; }\n",
    )
    .unwrap();
    let error = node
        .proxy
        .publish(&virtual_host("web.late", 7, &["late.test"], 21004, None))
        .await
        .unwrap_err();
    println!("  {error}");
    assert!(
        matches!(&error, ProxyError::Refused { message } if message.contains("somebody.else.conf")),
        "{error}"
    );
    assert!(
        ask("127.0.0.1", "stays.test", "GET /").ends_with("new"),
        "the configuration of before is in force"
    );
    assert!(
        !node
            .proxy
            .hosts()
            .unwrap()
            .contains_key(&AppName::parse("web.late").unwrap()),
        "its own file is taken back"
    );
    std::fs::remove_file(&bad).unwrap();
    node.proxy
        .publish(&virtual_host("web.late", 7, &["late.test"], 21004, None))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_file_does_not_keep_the_others_down_after_a_start() {
    in_node!();
    let node = &Node::new().await;
    let _app = App::start("good", 21004).await;
    node.proxy
        .publish(&virtual_host("web.good", 8, &["good.test"], 21004, None))
        .await
        .unwrap();
    let bad = node.store.proxy().join("vhosts/bad.app.conf");
    std::fs::write(
        &bad,
        "server { listen 8080; server_name a.test; nonsense; }\n",
    )
    .unwrap();
    node.systemd
        .stop_unit(UNIT, Duration::from_secs(20))
        .await
        .unwrap();
    let start = Instant::now();
    node.proxy.ensure().await.unwrap();
    println!(
        "  files tried one by one, up after {} ms",
        start.elapsed().as_millis()
    );
    assert!(ask("127.0.0.1", "good.test", "GET /").ends_with("good"));
    assert!(!bad.exists() && bad.with_extension("conf.bad").exists());
    std::fs::remove_file(bad.with_extension("conf.bad")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_app_is_refused() {
    in_node!();
    let node = &Node::new().await;
    let app = App::start("gone", 21004).await;
    node.proxy
        .publish(&virtual_host("web.gone", 9, &["gone.test"], 21004, None))
        .await
        .unwrap();
    assert!(ask("127.0.0.1", "gone.test", "GET /").ends_with("gone"));
    node.proxy
        .remove(&AppName::parse("web.gone").unwrap())
        .await
        .unwrap();
    assert!(ask("127.0.0.1", "gone.test", "GET /").starts_with("HTTP/1.1 421 "));
    node.proxy
        .remove(&AppName::parse("web.gone").unwrap())
        .await
        .unwrap();
    drop(app);
}

fn run(script: &str) -> String {
    let output = Command::new("/bin/sh")
        .args(["-c", script])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}
