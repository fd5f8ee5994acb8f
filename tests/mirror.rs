//! Mirrors on a real node: real systemd, real git, and servers that fail as servers do.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

#[path = "support/in_node.rs"]
mod in_node;

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kari::agent::host::mirror::{MirrorKey, MirrorSettings, MirrorState, Mirrors, SourceUrl, Want};
use kari::agent::host::store::{self, Store};
use kari::agent::host::systemd::Systemd;
use kari::agent::host::unit::{self, BuildSpec, fetch_unit_name};
use kari::agent::host::users::{self, Users};
use kari::api::names::{AppName, Commit, ReleaseId};
use kari::api::reasons::Reason;
use tokio::task::AbortHandle;

const TOOL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const GIT_PORT: u16 = 9418;

/// Outside: runs the calling test in the node, and ends it.
macro_rules! in_node {
    () => {
        if in_node::outside(std::any::type_name_of_val(&|| ())).await {
            return;
        }
    };
}

/// A node's mirrors as an agent has them; dropped as by a kill.
struct Node {
    systemd: Systemd,
    store: Store,
    users: Users,
    mirrors: Mirrors,
    woken: Arc<AtomicUsize>,
    tasks: Vec<AbortHandle>,
}

impl Node {
    async fn new(slots: usize) -> Self {
        let (systemd, mut events) = Systemd::connect(None).await.unwrap();
        let store = Store::open(Path::new(store::ROOT)).unwrap();
        let users = Users::new(Path::new(users::FOLDER), users::DEFAULT_RANGE);
        let git = users.ensure_git(&store).unwrap();
        let settings = MirrorSettings {
            slots,
            user: git.name,
            uid: git.uid,
            tool_path: TOOL_PATH.into(),
        };
        let woken = Arc::new(AtomicUsize::new(0));
        let counter = woken.clone();
        let mirrors = Mirrors::new(store.clone(), systemd.clone(), settings, move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let (runner, listener) = (mirrors.clone(), mirrors.clone());
        let tasks = vec![
            tokio::spawn(async move { runner.run().await }).abort_handle(),
            tokio::spawn(async move {
                while events.recv().await.is_some() {
                    listener.dirty();
                }
            })
            .abort_handle(),
        ];
        Self {
            systemd,
            store,
            users,
            mirrors,
            woken,
            tasks,
        }
    }

    fn want(&self, name: &str, url: &str, commit: &str) -> AppName {
        let app = AppName::parse(name).unwrap();
        self.mirrors.want(
            &app,
            Want {
                source: SourceUrl::parse(url).unwrap(),
                reference: Some("refs/heads/main".into()),
                commit: Commit::parse(commit).unwrap(),
            },
        );
        app
    }

    async fn until(&self, app: &AppName, what: &str, fits: impl Fn(&MirrorState) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(40);
        loop {
            let state = self.mirrors.state(app);
            if state.as_ref().is_some_and(&fits) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{app} is not {what}, but {state:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn until_ready(&self, app: &AppName) {
        self.until(app, "ready", |state| {
            matches!(state, MirrorState::Ready { .. })
        })
        .await;
    }

    async fn failure(&self, app: &AppName) -> (Reason, String) {
        self.until(app, "failed", |state| {
            matches!(state, MirrorState::Failed { .. })
        })
        .await;
        match self.mirrors.state(app) {
            Some(MirrorState::Failed { failure, .. }) => {
                println!("  {failure}");
                (failure.reason, failure.message)
            }
            other => panic!("{other:?}"),
        }
    }

    fn mirror(&self, url: &str) -> PathBuf {
        let key = MirrorKey::of(&SourceUrl::parse(url).unwrap());
        self.store.mirrors().join(format!("{}.git", key.as_str()))
    }

    fn unit(url: &str) -> String {
        fetch_unit_name(MirrorKey::of(&SourceUrl::parse(url).unwrap()).as_str())
    }

    /// How often the unit was started in this boot.
    fn starts(url: &str) -> usize {
        let lines = sh(&format!(
            "journalctl -u {} -o cat | grep -c '^Starting' || true",
            Self::unit(url)
        ));
        lines.trim().parse().unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn sh(script: &str) -> String {
    let output = Command::new("/bin/sh")
        .args(["-euc", script])
        .env("HOME", "/tmp")
        .env("GIT_AUTHOR_NAME", "t")
        .env("GIT_AUTHOR_EMAIL", "t@t.test")
        .env("GIT_COMMITTER_NAME", "t")
        .env("GIT_COMMITTER_EMAIL", "t@t.test")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{script}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// A repository with a first commit, and its url.
fn repository(name: &str) -> (String, String) {
    let folder = format!("/srv/git/{name}");
    sh(&format!(
        "rm -rf {folder} && mkdir -p {folder} && git init -q -b main {folder}"
    ));
    let commit = commit(name, "one");
    (format!("git://127.0.0.1/{name}"), commit)
}

/// A further commit on `main`.
fn commit(name: &str, text: &str) -> String {
    let folder = format!("/srv/git/{name}");
    sh(&format!(
        "cd {folder} && echo {text} >file && mkdir -p app && echo {text} >app/inner && git add . && git commit -qm {text} && git rev-parse HEAD"
    ))
    .trim()
    .to_owned()
}

struct Server(Child);

impl Server {
    async fn start() -> Self {
        let child = Command::new("git")
            .args([
                "-c",
                "safe.directory=*",
                "daemon",
                "--reuseaddr",
                "--base-path=/srv/git",
                "--export-all",
                "/srv/git",
            ])
            .env("HOME", "/tmp")
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self(child);
        let deadline = Instant::now() + Duration::from_secs(10);
        while tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, GIT_PORT))
            .await
            .is_err()
        {
            assert!(
                Instant::now() < deadline,
                "git daemon does not listen within 10 s"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // `git daemon` is two processes: the one that listens ends with its group.
        sh("pkill -x git-daemon || true");
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn apps_share_a_fetch_and_a_further_commit_is_fetched_into_the_same_mirror() {
    in_node!();
    let node = Node::new(2).await;
    let (url, first) = repository("shared");
    let _server = Server::start().await;
    let start = Instant::now();
    let apps: Vec<_> = (0..10)
        .map(|at| node.want(&format!("web.app{at}"), &url, &first))
        .collect();
    for app in &apps {
        node.until_ready(app).await;
    }
    println!(
        "  10 apps have their commit after {} ms",
        start.elapsed().as_millis()
    );
    assert_eq!(Node::starts(&url), 1);
    assert!(node.woken.load(Ordering::SeqCst) >= 10);

    // A restarted agent finds it there and fetches nothing.
    drop(node);
    let node = Node::new(2).await;
    let app = node.want("web.app0", &url, &first);
    node.until_ready(&app).await;
    assert_eq!(Node::starts(&url), 1);

    let second = commit("shared", "two");
    let start = Instant::now();
    let app = node.want("web.app0", &url, &second);
    node.until_ready(&app).await;
    println!(
        "  the second commit after {} ms",
        start.elapsed().as_millis()
    );
    assert_eq!(Node::starts(&url), 2);

    // What nobody holds any more goes.
    for at in 0..10 {
        assert!(node.mirror(&url).exists());
        let app = AppName::parse(&format!("web.app{at}")).unwrap();
        node.mirrors.release(&app).await.unwrap();
    }
    assert!(!node.mirror(&url).exists());
    assert!(
        node.systemd
            .get_unit_state(&Node::unit(&url))
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_checks_out_of_the_mirror_that_another_user_owns() {
    in_node!();
    let node = Node::new(2).await;
    let (url, first) = repository("build");
    let _server = Server::start().await;
    let app = node.want("web.build", &url, &first);
    node.until_ready(&app).await;

    let folder = node.store.app(&app);
    folder.create().unwrap();
    let users = node.users.ensure_app(&folder).unwrap();
    let commit = Commit::parse(&first).unwrap();
    let release = ReleaseId(uuid::Uuid::new_v4());
    let stage = folder
        .create_stage(
            &unit::build_key(&commit, None, None),
            0,
            users.build.uid,
            None,
        )
        .unwrap();
    let step = unit::build_step(&BuildSpec {
        app: &app,
        commit: &commit,
        mirror: &node.mirror(&url),
        stage: &stage,
        directory: None,
        build: None,
        caches: &[],
        env_file: None,
        user: &users.build.name,
        tool_path: TOOL_PATH,
        log: &folder.log(&release, "build"),
    })
    .unwrap();
    let name = unit::build_unit_name(&app, &release, 0);
    let settings = unit::step_properties(&step).unwrap();
    node.systemd
        .start_transient(&name, &settings)
        .await
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let result = loop {
        let state = node.systemd.get_unit_state(&name).await.unwrap().unwrap();
        if state.sub_state == "exited" || state.active_state.is_stopped() {
            break state.step_result();
        }
        assert!(Instant::now() < deadline, "{state:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let log = folder.log_tail(&release, "build").unwrap();
    assert!(result.is_success(), "{result:?} {log:?}");
    let inner = fs::read_to_string(stage.source().join("app/inner")).unwrap();
    assert_eq!(inner, "one\n");
    node.systemd
        .stop_unit(&name, Duration::from_secs(10))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_was_thrown_away_is_missing_and_a_new_one_is_fetched_at_once() {
    in_node!();
    let node = Node::new(2).await;
    let (url, _) = repository("rewritten");
    let gone = commit("rewritten", "gone");
    sh(
        "cd /srv/git/rewritten && git reset -q --hard HEAD~1 && git reflog expire --expire=now --all && git gc -q --prune=now",
    );
    let now = commit("rewritten", "instead");
    let _server = Server::start().await;
    let app = node.want("web.rewritten", &url, &gone);
    let other = node.want("web.other", &url, &now);
    let (reason, message) = node.failure(&app).await;
    assert_eq!(reason, Reason::RefNotFound);
    assert!(message.contains(&gone), "{message}");
    node.until_ready(&other).await;
    let start = Instant::now();
    let app = node.want("web.rewritten", &url, &now);
    node.until_ready(&app).await;
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "it waited for the backoff: {:?}",
        start.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_locks_and_emptied_objects_are_mended() {
    in_node!();
    let node = Node::new(2).await;
    let (url, first) = repository("damaged");
    let _server = Server::start().await;
    let app = node.want("web.damaged", &url, &first);
    node.until_ready(&app).await;
    let mirror = node.mirror(&url);

    // As a kill leaves them.
    sh(&format!(
        "cd {0} && touch HEAD.lock packed-refs.lock config.lock shallow.lock refs/kari/web/damaged.lock",
        mirror.display()
    ));
    let second = commit("damaged", "two");
    let app = node.want("web.damaged", &url, &second);
    node.until_ready(&app).await;

    // As a power cut leaves it: a fetch would still succeed, a checkout does not.
    sh(&format!(
        "cd {0} && for pack in objects/pack/*.pack; do : >$pack; done",
        mirror.display()
    ));
    node.mirrors.suspect(&app);
    node.until_ready(&app).await;
    sh(&format!(
        "GIT_CONFIG_GLOBAL=/dev/null git -c safe.directory='*' --git-dir={} fsck",
        mirror.display()
    ));

    // And where the next fetch itself stumbles.
    sh(&format!(
        "cd {} && : >HEAD && : >config && rm -r refs",
        mirror.display()
    ));
    let third = commit("damaged", "three");
    let app = node.want("web.damaged", &url, &third);
    node.until_ready(&app).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_server_trouble_has_its_reason_and_is_over_when_the_server_is_back() {
    in_node!();
    let node = Node::new(4).await;
    let (url, first) = repository("away");
    let app = node.want("web.away", &url, &first);
    assert_eq!(node.failure(&app).await.0, Reason::SourceUnavailable);

    let nothing = node.want("web.nothing", "https://no-such-host.invalid/r.git", &first);
    assert_eq!(node.failure(&nothing).await.0, Reason::SourceUnavailable);

    // Answers as servers of private repositories do.
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap();
    let port = listener.local_addr().unwrap().port();
    let answers = axum::Router::new().fallback(async |request: axum::extract::Request| {
        use axum::http::StatusCode;
        match request.uri().path().split('/').nth(1).unwrap_or_default() {
            "private" => (
                StatusCode::UNAUTHORIZED,
                [("www-authenticate", "Basic realm=\"git\"")],
            ),
            "forbidden" => (StatusCode::FORBIDDEN, [("x", "y")]),
            "broken" => (StatusCode::INTERNAL_SERVER_ERROR, [("x", "y")]),
            _ => (StatusCode::NOT_FOUND, [("x", "y")]),
        }
    });
    tokio::spawn(async move { axum::serve(listener, answers).await });
    for (path, reason) in [
        ("private", Reason::AuthenticationFailed),
        ("forbidden", Reason::AuthenticationFailed),
        ("broken", Reason::SourceUnavailable),
        ("absent", Reason::SourceUnavailable),
    ] {
        let app = node.want(
            &format!("web.{path}"),
            &format!("http://127.0.0.1:{port}/{path}/r.git"),
            &first,
        );
        assert_eq!(node.failure(&app).await.0, reason, "{path}");
    }

    let start = Instant::now();
    let _server = Server::start().await;
    node.until_ready(&app).await;
    println!(
        "  ready {} ms after the server was back",
        start.elapsed().as_millis()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_says_nothing_holds_one_slot_until_nobody_wants_it() {
    in_node!();
    let node = Node::new(1).await;
    // Accepts by the kernel, and never answers.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 9419)).unwrap();
    let (url, first) = repository("waits");
    let _server = Server::start().await;
    let silent_url = "git://127.0.0.1:9419/silent";
    let hung = node.want("web.hung", silent_url, &first);
    node.until(&hung, "being fetched", |state| {
        *state == MirrorState::Fetching
    })
    .await;
    let waits = node.want("web.waits", &url, &first);
    let place = MirrorState::Queued { position: 1, of: 1 };
    node.until(&waits, "first in the queue", |state| *state == place)
        .await;

    // A restarted agent takes the running fetch up, and it still holds the slot.
    drop(node);
    let node = Node::new(1).await;
    let hung = node.want("web.hung", silent_url, &first);
    node.until(&hung, "being fetched", |state| {
        *state == MirrorState::Fetching
    })
    .await;
    assert_eq!(Node::starts(silent_url), 1);
    let waits = node.want("web.waits", &url, &first);
    node.until(&waits, "first in the queue", |state| *state == place)
        .await;

    let start = Instant::now();
    node.mirrors.unwant(&hung);
    node.until_ready(&waits).await;
    println!(
        "  stopped, and the next one fetched, in {} ms",
        start.elapsed().as_millis()
    );
    assert_eq!(node.mirrors.state(&hung), None);
    drop(silent);
}
