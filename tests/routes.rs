//! What clients meet: paths and hosts, what is under way in a switch, hosts that two Deployments want, and a
//! port that somebody else holds.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use std::time::{Duration, Instant};

use kari::agent::host::proxy::DRAIN_LIMIT;
use kari::api::Release;
use kari::api::release::Failure;
use kube::api::DeleteParams;
use serde_json::{Value, json};
use support::tls::{Authority, Tls};
use support::traffic::{Connect as _, Traffic};
use support::{DEPLOY_LIMIT, LIMIT, Lab, Space, app, folder, is, reason, until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Where all but one of the tests deploy.
const NODE: &str = "n1";
/// The node whose port is taken away.
const OTHER_NODE: &str = "n2";

async fn space(topic: &str) -> Space {
    Space::new(support::testbed(2).await, topic).await
}

/// The app's manifest, for one node.
fn manifest(name: &str, url: &str, host: &str) -> Value {
    let mut manifest = app::manifest(name, url, host);
    manifest["spec"]["placement"]["nodeSelector"] = json!({"kubernetes.io/hostname": NODE});
    manifest
}

/// A connection to the node's proxy on which a request was begun: its line, `Host` and `headers`, which end it.
async fn begin(space: &Space, request: &str, host: &str, headers: &str) -> TcpStream {
    let mut stream = Lab(space.testbed)
        .connect(space.proxy(NODE))
        .await
        .expect("a connection");
    let head = format!("{request} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).await.expect("a head");
    stream
}

/// Reads until what was read ends so, and fails if the connection ends before.
async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut seen = Vec::new();
    let reading = async {
        while !seen.ends_with(end.as_bytes()) {
            seen.push(stream.read_u8().await?);
        }
        Ok::<_, std::io::Error>(())
    };
    let outcome = tokio::time::timeout(LIMIT, reading).await;
    let text = String::from_utf8_lossy(&seen).into_owned();
    match outcome {
        Ok(Ok(())) => text,
        other => panic!("no {end:?}: {other:?} after {text:?}"),
    }
}

/// One whole answer, with its head.
async fn ask(space: &Space, host: &str, path: &str) -> String {
    let request = format!("GET {path}");
    let mut stream = begin(space, &request, host, "Connection: close\r\n").await;
    let mut answer = String::new();
    let read = tokio::time::timeout(LIMIT, stream.read_to_string(&mut answer)).await;
    read.expect("an answer in time").expect("an answer");
    answer
}

fn failure(release: &Release) -> Option<Failure> {
    release.status.clone()?.attempt?.failure
}

/// The files of an app of several processes: each is a server that says what is in a file of its own.
fn servers(processes: &[&str], revision: &str) -> Vec<(String, String)> {
    let files = processes.iter().flat_map(|process| {
        let server = app::SERVER.replace("\"message\"", &format!("\"{process}.message\""));
        [
            (format!("{process}.py"), server),
            (
                format!("{process}.message"),
                format!("{process} {revision}"),
            ),
        ]
    });
    files.collect()
}

fn as_text(files: &[(String, String)]) -> Vec<(&str, &str)> {
    files
        .iter()
        .map(|(name, content)| (name.as_str(), content.as_str()))
        .collect()
}

/// A process of such an app.
fn process(manifest: &Value, name: &str, route: Value) -> Value {
    let mut process = manifest["spec"]["processes"][0].clone();
    process["name"] = json!(name);
    process["command"] = json!(["python3", format!("{name}.py")]);
    process["route"] = route;
    process
}

/// Asserts what each path of each host is answered with.
async fn answers(space: &Space, expected: &[(&str, &str, u16, &str)]) {
    let lab = Lab(space.testbed);
    for (host, path, status, body) in expected {
        let answer = support::traffic::get_once(&lab, space.proxy(NODE), host, path)
            .await
            .unwrap_or_else(|e| panic!("{host}{path}: {e}"));
        assert!(
            answer.0 == *status && answer.1.starts_with(body),
            "{host}{path} is answered with {answer:?}, not with {status} {body:?}"
        );
    }
}

#[tokio::test]
async fn processes_of_one_deployment_share_a_host_by_path_and_switch_together() {
    const NAMES: [&str; 3] = ["site", "api", "next"];
    let space = space("paths").await;
    let first = servers(&NAMES, "one");
    let files = folder(&as_text(&first));
    let repository = space.push("shop", files.path());
    let mut manifest = manifest("shop", &repository.url, "paths.example.com");
    manifest["spec"]["processes"] = json!([
        process(&manifest, "site", json!({"hosts": ["paths.example.com"]})),
        process(
            &manifest,
            "api",
            json!({"hosts": ["paths.example.com", "api.example.com"], "path": "/api"})
        ),
        process(
            &manifest,
            "next",
            json!({"hosts": ["paths.example.com"], "path": "/api/next"})
        ),
    ]);
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    answers(
        &space,
        &[
            ("paths.example.com", "/", 200, "site one"),
            ("paths.example.com", "/about", 200, "site one"),
            ("paths.example.com", "/apix", 200, "site one"),
            ("paths.example.com", "/api", 200, "api one"),
            ("paths.example.com", "/api/", 200, "api one"),
            ("paths.example.com", "/api/items?page=2", 200, "api one"),
            ("paths.example.com", "/api/nextx", 200, "api one"),
            ("paths.example.com", "/api/next", 200, "next one"),
            ("paths.example.com", "/api/next/1", 200, "next one"),
            // No process of this host has `/`, and `next` is not at this host.
            ("api.example.com", "/api/next", 200, "api one"),
            ("api.example.com", "/", 404, "no process"),
            ("api.example.com", "/apix", 404, "no process"),
        ],
    )
    .await;

    support::write(files.path(), &as_text(&servers(&NAMES, "two")));
    let second = space.push("shop", files.path());
    space.request_look("shop").await;
    space.ready_at("shop", &second.commit).await;
    answers(
        &space,
        &[
            ("paths.example.com", "/", 200, "site two"),
            ("paths.example.com", "/api/items", 200, "api two"),
            ("paths.example.com", "/api/next", 200, "next two"),
            ("api.example.com", "/api", 200, "api two"),
            ("api.example.com", "/", 404, "no process"),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_process_that_crashed_is_answered_for_with_503_until_it_is_back_and_the_one_beside_it_serves()
 {
    let space = space("crashed").await;
    let host = "crashed.example.com";
    let server = app::SERVER
        .replace("import http.server", "import time, http.server")
        .replace(
            "    def do_GET(self):\n",
            "    def do_GET(self):\n        if self.path == '/api/crash':\n            os._exit(1)\n",
        )
        .replace(
            "server = Server(",
            "time.sleep(float(os.environ.get('START_SECONDS', 0)))\nserver = Server(",
        );
    let files = folder(&[("server.py", server.as_str()), ("message", "web")]);
    let repository = space.push("shop", files.path());
    let mut manifest = manifest("shop", &repository.url, host);
    let mut api = manifest["spec"]["processes"][0].clone();
    api["name"] = json!("api");
    api["env"] =
        json!([{"name": "MESSAGE", "value": "api"}, {"name": "START_SECONDS", "value": "3"}]);
    api["route"]["path"] = json!("/api");
    let processes = manifest["spec"]["processes"].as_array_mut().unwrap();
    processes.push(api);
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    let answer = ask(&space, "CRASHED.example.com", "/api").await;
    assert!(answer.ends_with("\r\n\r\napi"), "{answer}");

    ask(&space, host, "/api/crash").await;
    let away = until("the crashed process is answered for", LIMIT, || async {
        let answer = ask(&space, host, "/api").await;
        if answer.starts_with("HTTP/1.1 503 ") {
            Ok(answer)
        } else {
            Err(answer)
        }
    })
    .await;
    assert!(away.contains("\r\nRetry-After: "), "{away}");
    let beside = ask(&space, host, "/").await;
    assert!(beside.ends_with("\r\n\r\nweb"), "{beside}");
    until("it is back", LIMIT, || async {
        let answer = ask(&space, host, "/api").await;
        if answer.ends_with("\r\n\r\napi") {
            Ok(())
        } else {
            Err(answer)
        }
    })
    .await;
}

/// Takes uploads, streams events, sends what is large, and echoes after an upgrade.
fn streaming_server() -> String {
    app::SERVER
        .replace("import http.server", "import time, http.server")
        .replace(
            "    def do_GET(self):\n",
            r#"    def do_POST(self):
        left = length = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, 1 << 20)))
        body = f"{message} {length}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/events":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            while True:
                self.wfile.write(f"data: {message}\n\n".encode())
                time.sleep(0.2)
        if self.path == "/large":
            self.send_response(200)
            self.send_header("Content-Length", str(64 << 20))
            self.end_headers()
            for _ in range(64):
                self.wfile.write(b"x" * (1 << 20))
            return
        if self.path == "/echo":
            self.send_response(101)
            self.send_header("Connection", "upgrade")
            self.send_header("Upgrade", "websocket")
            self.end_headers()
            while data := self.connection.recv(1024):
                self.connection.sendall(message.encode() + b" " + data)
            self.close_connection = True
            return
"#,
        )
}

const UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\n";

/// One message over a websocket, and back.
async fn echo(socket: &mut TcpStream, text: &str) -> std::io::Result<String> {
    socket.write_all(format!("{text}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        answer.push(socket.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&answer).trim_end().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_passes_through_a_switch_until_the_drain_limit() {
    const HALF: usize = 100 << 20;
    let space = space("under-way").await;
    let host = "under-way.example.com";
    let server = streaming_server();
    let files = folder(&[("server.py", server.as_str()), ("message", "one")]);
    let first = space.push("shop", files.path());
    space.apply(&manifest("shop", &first.url, host)).await;
    space.ready_at("shop", &first.commit).await;

    let length = format!("Content-Length: {}\r\nConnection: close\r\n", 2 * HALF);
    let mut upload = begin(&space, "POST /upload", host, &length).await;
    upload.write_all(&vec![7; HALF]).await.expect("half of it");
    let mut events = begin(&space, "GET /events", host, "").await;
    read_until(&mut events, "data: one\n\n").await;
    let mut slow = begin(&space, "GET /large", host, "").await;
    read_until(&mut slow, "\r\n\r\n").await;
    let mut socket = begin(&space, "GET /echo", host, UPGRADE).await;
    read_until(&mut socket, "\r\n\r\n").await;
    assert_eq!(echo(&mut socket, "a").await.unwrap(), "one a");

    support::write(files.path(), &[("message", "two")]);
    let second = space.push("shop", files.path());
    space.request_look("shop").await;
    until("the new release answers", DEPLOY_LIMIT, || async {
        match space.get(NODE, host).await {
            Ok((200, body)) if body == "two" => Ok(()),
            other => Err(other),
        }
    })
    .await;
    let switched = Instant::now();

    upload.write_all(&vec![7; HALF]).await.expect("all of it");
    let mut answer = String::new();
    upload.read_to_string(&mut answer).await.expect("an answer");
    assert!(
        answer.ends_with(&format!("\r\n\r\none {}", 2 * HALF)),
        "{answer}"
    );
    let mut new_socket = begin(&space, "GET /echo", host, UPGRADE).await;
    read_until(&mut new_socket, "\r\n\r\n").await;
    assert_eq!(echo(&mut new_socket, "b").await.unwrap(), "two b");
    space.ready_at("shop", &second.commit).await;

    // A few bytes of each a second, until the old process has to go.
    let ended = loop {
        assert!(
            switched.elapsed() < DRAIN_LIMIT + LIMIT,
            "the old process is still there"
        );
        let mut few = [0; 8];
        let alive = async {
            let echoed = echo(&mut socket, "c").await?;
            slow.read_exact(&mut few).await?;
            events.read_exact(&mut few).await?;
            Ok::<_, std::io::Error>(echoed)
        };
        match alive.await {
            Ok(echoed) => assert_eq!(echoed, "one c"),
            Err(_) => break switched.elapsed(),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    assert!(
        ended > DRAIN_LIMIT.mul_f64(0.9),
        "cut after {ended:?}, and the limit is {DRAIN_LIMIT:?}"
    );
    assert_eq!(echo(&mut new_socket, "d").await.unwrap(), "two d");
    let pattern = format!("kari.{}.shop.web.*.service", space.namespace);
    until("the old process is gone", LIMIT, || async {
        let list = [
            "systemctl",
            "list-units",
            "--plain",
            "--no-legend",
            &pattern,
        ];
        let units = space.on(NODE, &list).await;
        if units.lines().count() == 1 {
            Ok(())
        } else {
            Err(units)
        }
    })
    .await;
}

/// Waits until a Deployment is told that another one has its host.
async fn told_of_conflict(space: &Space, name: &str, host: &str, holder: &str) {
    let what = format!("told that {holder} has its host");
    let deployment = space
        .deployment_until(name, &what, DEPLOY_LIMIT, |d| {
            let status = d.status.clone().unwrap_or_default();
            reason(&status.conditions, "Stalled") == "RouteConflict"
        })
        .await;
    let conditions = deployment.status.unwrap().conditions;
    assert!(is(&conditions, "Stalled", "True"), "{conditions:?}");
    let message = &conditions
        .iter()
        .find(|c| c.type_ == "Stalled")
        .unwrap()
        .message;
    let holder = format!("{}/{holder} on this node: take it out", space.namespace);
    assert!(
        message.contains(host) && message.contains(&holder),
        "{message}"
    );
    let release = space
        .release_until(name, NODE, &what, LIMIT, |r| failure(r).is_some())
        .await;
    assert_eq!(failure(&release).unwrap().class, "Invalid");
}

#[tokio::test]
async fn one_host_name_belongs_to_one_deployment_of_a_node_and_passes_on_when_it_is_free() {
    let space = space("host").await;
    let host = "host.example.com";
    let files = folder(&app::files("nobody"));
    let repository = space.push("shop", files.path());
    let named = |name: &str, host: &str| {
        let mut manifest = manifest(name, &repository.url, host);
        manifest["spec"]["env"] = json!([{"name": "MESSAGE", "value": name}]);
        manifest
    };
    let is_served_by = async |name: &str| answers(&space, &[(host, "/", 200, name)]).await;

    // At the same instant: one has it, the other is told.
    let both = [named("first", host), named("second", host)];
    tokio::join!(space.apply(&both[0]), space.apply(&both[1]));
    let ready = |name: &'static str| {
        let deployments = space.deployments();
        async move {
            let status = deployments
                .get(name)
                .await
                .unwrap()
                .status
                .unwrap_or_default();
            is(&status.conditions, "Ready", "True")
        }
    };
    let (winner, loser) = until("one of the two is Ready", DEPLOY_LIMIT, || async {
        match (ready("first").await, ready("second").await) {
            (true, false) => Ok(("first", "second")),
            (false, true) => Ok(("second", "first")),
            other => Err(other),
        }
    })
    .await;
    told_of_conflict(&space, loser, host, winner).await;
    is_served_by(winner).await;

    // The other is deleted.
    space
        .deployments()
        .delete(winner, &DeleteParams::default())
        .await
        .expect("a deletion");
    space.ready_at(loser, &repository.commit).await;
    is_served_by(loser).await;

    // The other takes another host.
    // Another path of it is as little to be had: who has a host has all of it.
    let mut third = named("third", host);
    third["spec"]["processes"][0]["route"]["path"] = json!("/third");
    space.apply(&third).await;
    told_of_conflict(&space, "third", host, loser).await;
    is_served_by(loser).await;
    space
        .apply(&named(loser, "elsewhere.host.example.com"))
        .await;
    space.ready_at("third", &repository.commit).await;
    answers(
        &space,
        &[
            (host, "/third", 200, "third"),
            (host, "/", 404, "no process"),
        ],
    )
    .await;
    space.ready_at(loser, &repository.commit).await;
}

#[tokio::test]
async fn the_distributions_nginx_on_the_port_is_named_and_harms_no_other_node() {
    let space = space("port").await;
    let host = "port.example.com";
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    // The agent keeps its proxy up: whoever is there first in the moment between has the port.
    let take = "for try in $(seq 100); do systemctl stop kari-proxy; systemctl start nginx && exit 0; done; exit 1";
    space.on(OTHER_NODE, &["sh", "-c", take]).await;
    let mut manifest = manifest("shop", &repository.url, host);
    manifest["spec"]["placement"]["nodeSelector"] = json!({});
    space.apply(&manifest).await;
    let release = space
        .release_until(
            "shop",
            OTHER_NODE,
            "told who has the port",
            DEPLOY_LIMIT,
            |r| failure(r).is_some_and(|f| f.reason == "ProxyUnavailable"),
        )
        .await;
    let Failure { class, message, .. } = failure(&release).unwrap();
    assert_eq!(class, "Environment");
    // A Pod sees no process of the node, but whose socket it is.
    let holder: &[_] = if support::kari_is_in_pods() {
        &["a process of uid 0"]
    } else {
        &["nginx (pid ", "of nginx.service"]
    };
    for part in ["port 80", "--http-port"].iter().chain(holder) {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    assert_eq!(space.get(NODE, host).await, Ok((200, "one".into())));
    let deployment = space.deployments().get("shop").await.expect("it");
    let conditions = deployment.status.unwrap().conditions;
    assert!(is(&conditions, "Stalled", "False"), "{conditions:?}");

    space.on(OTHER_NODE, &["systemctl", "stop", "nginx"]).await;
    space.ready_at("shop", &repository.commit).await;
    assert_eq!(space.get(OTHER_NODE, host).await, Ok((200, "one".into())));
}

/// Waits until a Deployment is Stalled for a reason that says `words`.
async fn stalled(space: &Space, name: &str, why: &str, words: &str) {
    let what = format!("Stalled: {why}, {words}");
    space
        .deployment_until(name, &what, LIMIT, |d| {
            let conditions = d.status.clone().unwrap_or_default().conditions;
            let stalled = conditions.into_iter().find(|c| c.type_ == "Stalled");
            stalled.is_some_and(|c| c.reason == why && c.message.contains(words))
        })
        .await;
}

#[tokio::test]
async fn a_host_is_served_by_https_and_a_new_certificate_costs_no_request_and_no_restart() {
    let space = space("tls").await;
    let (host, authority) = ("tls.example.com", Authority::new());
    let (first, second) = (authority.issue(&[host]), authority.issue(&[host]));
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let mut manifest = manifest("shop", &repository.url, host);
    manifest["spec"]["source"]["git"]["intervalSeconds"] = json!(10);
    manifest["spec"]["processes"][0]["route"]["tls"] = json!({"secretName": "shop-tls"});
    let secret = async |certificate: &str, key: &str, look: bool| {
        let data = [("tls.crt", certificate), ("tls.key", key)];
        space.secret("shop-tls", "kubernetes.io/tls", &data).await;
        if look {
            space.request_look("shop").await;
        }
    };
    // Nothing begins before it can be served.
    space.apply(&manifest).await;
    stalled(
        &space,
        "shop",
        "ReferenceNotFound",
        "there is no Secret shop-tls",
    )
    .await;
    secret(&first.certificate, &second.key, true).await;
    stalled(
        &space,
        "shop",
        "ReferenceNotFound",
        "is not the key of the first certificate",
    )
    .await;
    assert_eq!(
        space
            .releases()
            .list(&Default::default())
            .await
            .expect("a list")
            .items
            .len(),
        0
    );
    secret(&first.certificate, &first.key, true).await;
    let deployed = space.ready_at("shop", &repository.commit).await;
    let revision = deployed.status.and_then(|s| s.revision);

    let client = Tls::new(support::Lab(space.testbed), &authority, host);
    let to = space.tls_proxy(NODE);
    let get = async || support::traffic::get_once(&client, to, host, "/").await;
    assert_eq!(get().await, Ok((200, "one".to_owned())));
    assert_eq!(client.shown(&first), 1);
    let answer = ask(&space, host, "/x?y").await;
    assert!(answer.starts_with("HTTP/1.1 308 "), "{answer}");
    assert!(
        answer.contains("\r\nLocation: https://tls.example.com/x?y\r\n"),
        "{answer}"
    );

    let service = format!("kari.{}.shop.web.*.service", space.namespace);
    let words = ["systemctl", "show", "--value", "-p", "MainPID", &service];
    let pid = space.on(NODE, &words).await;
    let traffic = Traffic::start(client.clone(), to, host, 200, 10);
    until("requests are answered", LIMIT, || async {
        let good = traffic.tally().good;
        (good > 100).then_some(()).ok_or(good)
    })
    .await;
    let changed = std::time::Instant::now();
    // Nobody asks for a look: it comes by itself.
    secret(&second.certificate, &second.key, false).await;
    until("the new certificate is shown", LIMIT, || async {
        let shown = client.shown(&second);
        (shown >= 10).then_some(()).ok_or(shown)
    })
    .await;
    let took = changed.elapsed();
    let tally = traffic.stop().await;
    println!(
        "  a new certificate after {:.1} s (interval 10 s): {} good, {} failed",
        took.as_secs_f32(),
        tally.good,
        tally.failed.len()
    );
    assert_eq!(tally.failed, Vec::<String>::new());
    assert_eq!(space.on(NODE, &words).await, pid, "started anew");
    let release = space
        .release_until("shop", NODE, "seen", LIMIT, |_| true)
        .await;
    assert_eq!(
        (Some(release.spec.revision), release.spec.attempt),
        (revision, 1)
    );

    // A broken one is not served: the last good one is.
    secret(&first.certificate, "no key", true).await;
    stalled(
        &space,
        "shop",
        "ReferenceNotFound",
        "tls.key is not a private key",
    )
    .await;
    let shown = client.shown(&second);
    assert_eq!(get().await, Ok((200, "one".to_owned())));
    assert_eq!(client.shown(&second), shown + 1);
    let keys = "stat -c '%a %u' /var/lib/kari/proxy/certificates/*";
    let modes = space.on(NODE, &["sh", "-c", keys]).await;
    assert!(modes.lines().all(|line| line == "600 0"), "{modes}");
}
