//! The proxy on a real node: real systemd, real nginx.
//!
//! Run as root. The test starts itself again inside a node of the testbed.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use kari::agent::host::proxy::{
    DRAIN_LIMIT, HostName, OldWorkers, Proxy, ProxyError, ProxySettings, Route, RouteTarget, UNIT,
    VirtualHost,
};
use kari::agent::host::store::{Store, UNIT_FOLDER, UnitFiles};
use kari::agent::host::systemd::{HostEvent, Systemd};
use kari::api::names::{AppName, ReleaseId};
use tokio::sync::mpsc;

const HTTP_PORT: u16 = 8080;

fn main() {
    match std::env::var("KARI_TEST_ROLE").as_deref() {
        Ok("app") => app(),
        Ok("node") => in_node(),
        _ => panic!("run by hand for now"),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Runtime::new().unwrap()
}

// ---- The app: says its name, takes uploads, streams, echoes after an upgrade ----

fn app() {
    let port: u16 = std::env::var("PORT").unwrap().parse().unwrap();
    let name: &'static str = std::env::var("NAME").unwrap().leak();
    runtime().block_on(async move {
        use axum::routing::{any, get, post};
        let stream = || async {
            let (sender, receiver) =
                futures::channel::mpsc::unbounded::<Result<Bytes, Infallible>>();
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
        let router = axum::Router::new()
            .route("/", any(move || async move { name }))
            .route("/headers", get(headers))
            .route("/stream", get(stream))
            .route("/slow", get(slow))
            .route("/upgrade", get(upgrade))
            .route(
                "/upload",
                post(|body: Body| async move {
                    let mut length = 0;
                    let mut body = body;
                    while let Some(frame) = body.frame().await {
                        length += frame.unwrap().into_data().map_or(0, |data| data.len());
                    }
                    length.to_string()
                }),
            );
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .await
            .unwrap();
        axum::serve(listener, router).await.unwrap();
    });
}

struct App(Child);

impl App {
    async fn start(name: &str, port: u16) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .env("KARI_TEST_ROLE", "app")
            .env("PORT", port.to_string())
            .env("NAME", name)
            .spawn()
            .unwrap();
        let app = Self(child);
        until("the app listens", || async {
            tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port))
                .await
                .is_ok()
        })
        .await;
        app
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
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
        let settings = ProxySettings::of_this_node(HTTP_PORT, "/usr/sbin:/usr/bin").unwrap();
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
            target: RouteTarget::Port { primary, backup },
            measured_path: "/".into(),
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

fn in_node() {
    runtime().block_on(async {
        let node = Node::new().await;
        let only = std::env::var("ONLY").unwrap_or_default();
        macro_rules! run {
            ($($test:ident),* $(,)?) => {$(
                if stringify!($test).contains(&only) {
                    let start = Instant::now();
                    $test(&node).await;
                    println!("ok {} ({} ms)", stringify!($test), start.elapsed().as_millis());
                }
            )*};
        }
        run!(
            a_port_that_somebody_holds_is_named_with_its_holder,
            the_proxy_comes_up_and_refuses_hosts_that_nobody_has,
            a_request_reaches_the_app_as_people_expect,
            a_switch_under_load_fails_no_request,
            a_long_request_of_before_a_switch_ends_whole,
            an_old_process_answers_when_the_new_one_is_not_there,
            many_publishes_at_once_share_a_few_reloads,
            a_refused_file_of_somebody_elses_is_named_and_harms_nothing,
            one_bad_file_does_not_keep_the_others_down_after_a_start,
            a_removed_app_is_refused,
        );
    });
}

async fn a_port_that_somebody_holds_is_named_with_its_holder(node: &Node) {
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

async fn the_proxy_comes_up_and_refuses_hosts_that_nobody_has(node: &Node) {
    let start = Instant::now();
    node.proxy.ensure().await.unwrap();
    println!("  up in {} ms", start.elapsed().as_millis());
    let start = Instant::now();
    node.proxy.ensure().await.unwrap();
    println!("  looked at again in {} ms", start.elapsed().as_millis());
    let answer = ask("127.0.0.1", "nobody.test", "GET /");
    assert!(answer.starts_with("HTTP/1.1 421 "), "{answer}");
    let state = node.systemd.get_unit_state(UNIT).await.unwrap().unwrap();
    assert_eq!(state.n_restarts, state.n_restarts.min(20));
    assert!(node.units.is_enabled(UNIT).unwrap());
}

async fn a_request_reaches_the_app_as_people_expect(node: &Node) {
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

// ---- Load ----

#[derive(Default)]
struct Counts {
    sent: AtomicUsize,
    good: AtomicUsize,
    /// Sent again as HTTP allows: the connection was an idle one, no byte of an answer had come, and the
    /// method is idempotent.
    retried: AtomicUsize,
    failed: AtomicUsize,
    by: std::sync::Mutex<BTreeMap<String, usize>>,
    errors: std::sync::Mutex<Vec<String>>,
    slowest_ms: AtomicUsize,
}

/// Keep-alive clients that together send `rate` requests a second until `stop`.
async fn load(counts: Arc<Counts>, stop: Arc<AtomicBool>, rate: u32, clients: u32, posts: bool) {
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..clients {
        let (counts, stop) = (counts.clone(), stop.clone());
        tasks.spawn(async move {
            let period = Duration::from_secs(1) * clients / rate;
            let mut connection = None;
            let mut tick = tokio::time::interval_at(
                tokio::time::Instant::now() + period * client / clients,
                period,
            );
            while !stop.load(Ordering::Relaxed) {
                tick.tick().await;
                let method = if posts { "POST" } else { "GET" };
                counts.sent.fetch_add(1, Ordering::Relaxed);
                let start = Instant::now();
                match request(&mut connection, method, &counts).await {
                    Ok((200, body)) => {
                        counts.good.fetch_add(1, Ordering::Relaxed);
                        *counts.by.lock().unwrap().entry(body).or_default() += 1;
                    }
                    Ok((status, body)) => {
                        counts.failed.fetch_add(1, Ordering::Relaxed);
                        counts
                            .errors
                            .lock()
                            .unwrap()
                            .push(format!("status {status} {body}"));
                    }
                    Err(error) => {
                        connection = None;
                        counts.failed.fetch_add(1, Ordering::Relaxed);
                        counts.errors.lock().unwrap().push(error);
                    }
                }
                counts
                    .slowest_ms
                    .fetch_max(start.elapsed().as_millis() as usize, Ordering::Relaxed);
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

type Sender = SendRequest<Full<Bytes>>;

async fn request(
    connection: &mut Option<Sender>,
    method: &str,
    counts: &Counts,
) -> Result<(u16, String), String> {
    // An idle connection that was seen to close is no failure: nothing was sent.
    let mut reused = connection.take();
    if let Some(sender) = &mut reused
        && (sender.is_closed() || sender.ready().await.is_err())
    {
        reused = None;
    }
    loop {
        let is_reused = reused.is_some();
        let mut sender = match reused.take() {
            Some(sender) => sender,
            None => connect().await?,
        };
        let request = hyper::Request::builder()
            .method(method)
            .uri("/")
            .header("host", "shop.test")
            .body(Full::new(Bytes::from(if method == "POST" {
                "body"
            } else {
                ""
            })))
            .unwrap();
        match sender.send_request(request).await {
            Ok(response) => {
                let status = response.status().as_u16();
                let body = response
                    .into_body()
                    .collect()
                    .await
                    .map_err(|e| format!("body: {e}"))?
                    .to_bytes();
                *connection = Some(sender);
                return Ok((status, String::from_utf8_lossy(&body).into_owned()));
            }
            Err(error) if is_reused && (method == "GET" || error.is_canceled()) => {
                counts.retried.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => return Err(format!("{method} reused={is_reused}: {error:?}")),
        }
    }
}

async fn connect() -> Result<Sender, String> {
    let stream = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, HTTP_PORT))
        .await
        .map_err(|e| format!("connect: {e}"))?;
    stream.set_nodelay(true).unwrap();
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn a_switch_under_load_fails_no_request(node: &Node) {
    let switches: usize = std::env::var("SWITCHES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(3);
    let mut old_port = 21001;
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

    let (gets, posts) = (Arc::new(Counts::default()), Arc::new(Counts::default()));
    let stop = Arc::new(AtomicBool::new(false));
    let loads = [
        tokio::spawn(load(gets.clone(), stop.clone(), 200, 10, false)),
        tokio::spawn(load(posts.clone(), stop.clone(), 20, 4, true)),
    ];
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut switched = Vec::new();
    let mut drained = Vec::new();
    for switch in 1..=switches {
        let port = 21001 + (switch % 2) as u16;
        let app = App::start(&format!("v{switch}"), port).await;
        let release = 100 + switch as u128;
        let start = Instant::now();
        let old = node
            .proxy
            .publish(&virtual_host(
                "web.shop",
                release,
                &["shop.test"],
                port,
                Some(old_port),
            ))
            .await
            .unwrap();
        switched.push(start.elapsed().as_millis());
        tokio::time::sleep(Duration::from_millis(300)).await;
        drained.push(drain(&node.proxy, old).await.as_millis());
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
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    for load in loads {
        load.await.unwrap();
    }
    for (name, counts) in [("GET", &gets), ("POST", &posts)] {
        let get = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        println!(
            "  {name}: sent {} good {} retried {} failed {} slowest {} ms",
            get(&counts.sent),
            get(&counts.good),
            get(&counts.retried),
            get(&counts.failed),
            get(&counts.slowest_ms)
        );
        println!("  {:?}", counts.by.lock().unwrap());
        for error in counts.errors.lock().unwrap().iter().take(5) {
            println!("  {error}");
        }
    }
    println!(
        "  {switches} switches, each measured after ms {switched:?}, drained after ms {drained:?}"
    );
    assert_eq!(gets.failed.load(Ordering::Relaxed), 0);
    assert_eq!(posts.failed.load(Ordering::Relaxed), 0);
    assert_eq!(
        gets.by.lock().unwrap().len(),
        switches + 1,
        "every release answered"
    );
}

async fn a_long_request_of_before_a_switch_ends_whole(node: &Node) {
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

async fn an_old_process_answers_when_the_new_one_is_not_there(node: &Node) {
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

async fn many_publishes_at_once_share_a_few_reloads(node: &Node) {
    let _app = App::start("many", 21003).await;
    let before = workers_started();
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
        workers_started() - before
    );
    assert!(ask("127.0.0.1", "app49.test", "GET /").ends_with("many"));
    assert_eq!(node.proxy.hosts().unwrap().len(), 51);
    assert!(workers_started() - before <= 5);
}

/// Reloads so far, by what systemd logged.
fn workers_started() -> usize {
    run(&format!(
        "journalctl -u {UNIT} -o cat | grep -c '^Reloaded' || true"
    ))
    .trim()
    .parse()
    .unwrap()
}

async fn a_refused_file_of_somebody_elses_is_named_and_harms_nothing(node: &Node) {
    let _app = App::start("new", 21004).await;
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
        ask("127.0.0.1", "app1.test", "GET /").starts_with("HTTP/1.1 502 "),
        "the configuration of before is in force"
    );
    std::fs::remove_file(&bad).unwrap();
    node.proxy
        .publish(&virtual_host("web.late", 7, &["late.test"], 21004, None))
        .await
        .unwrap();
}

async fn one_bad_file_does_not_keep_the_others_down_after_a_start(node: &Node) {
    let _app = App::start("good", 21004).await;
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
        "  52 files tried one by one, up after {} ms",
        start.elapsed().as_millis()
    );
    assert!(ask("127.0.0.1", "late.test", "GET /").ends_with("good"));
    assert!(!bad.exists() && bad.with_extension("conf.bad").exists());
    std::fs::remove_file(bad.with_extension("conf.bad")).unwrap();
}

async fn a_removed_app_is_refused(node: &Node) {
    node.proxy
        .remove(&AppName::parse("web.late").unwrap())
        .await
        .unwrap();
    assert!(ask("127.0.0.1", "late.test", "GET /").starts_with("HTTP/1.1 421 "));
    node.proxy
        .remove(&AppName::parse("web.late").unwrap())
        .await
        .unwrap();
}

fn run(script: &str) -> String {
    let output = Command::new("/bin/sh")
        .args(["-c", script])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}
