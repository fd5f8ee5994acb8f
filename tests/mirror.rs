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

use kari::agent::host::mirror::{
    CredentialId, MirrorKey, MirrorSettings, MirrorState, Mirrors, SourceUrl, Want,
};
use kari::agent::host::store::{self, Store};
use kari::agent::host::systemd::Systemd;
use kari::agent::host::unit::{self, BuildSpec, fetch_unit_name};
use kari::agent::host::users::{self, Users};
use kari::api::names::{AppName, Commit, ReleaseId};
use kari::api::reasons::Reason;
use kari::git_credential::GitCredential;
use kari::seal::SecretBytes;
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
        self.want_more(name, url, commit, None, false)
    }

    fn want_more(
        &self,
        name: &str,
        url: &str,
        commit: &str,
        base: Option<&str>,
        submodules: bool,
    ) -> AppName {
        let app = AppName::parse(name).unwrap();
        let want = Want {
            base: base.map(|base| Commit::parse(base).unwrap()),
            submodules,
            ..plain_want(url, commit)
        };
        self.mirrors.want(&app, want, None);
        app
    }

    /// With an ssh key and the host keys that go with it, which the node was given under `digest`.
    fn want_privately(
        &self,
        name: &str,
        (url, commit): (&str, &str),
        (digest, key, hosts): (&str, &str, &str),
    ) -> AppName {
        let app = AppName::parse(name).unwrap();
        let data = [("ssh-privatekey", key), ("known_hosts", hosts)]
            .map(|(key, value)| (key.to_owned(), SecretBytes::new(value.into())));
        let credential = GitCredential::parse(url, &data.into()).unwrap();
        let want = Want {
            credential: Some(CredentialId {
                namespace: app.namespace().to_owned(),
                digest: digest.to_owned(),
            }),
            ..plain_want(url, commit)
        };
        self.mirrors.want(&app, want, Some(Arc::new(credential)));
        app
    }

    fn ready_mirror(&self, app: &AppName) -> PathBuf {
        match self.mirrors.state(app) {
            Some(MirrorState::Ready { mirror }) => mirror,
            other => panic!("{other:?}"),
        }
    }

    async fn refusal(&self, app: &AppName) -> (Reason, String) {
        self.until(app, "refused", |state| {
            matches!(state, MirrorState::Refused(_))
        })
        .await;
        match self.mirrors.state(app) {
            Some(MirrorState::Refused(failure)) => {
                println!("  {failure}");
                (failure.reason, failure.message)
            }
            other => panic!("{other:?}"),
        }
    }

    /// Checks a commit out as a build does, and gives the folder.
    async fn check_out(&self, app: &AppName, url: &str, commit: &str, submodules: bool) -> PathBuf {
        let folder = self.store.app(app);
        folder.create().unwrap();
        let users = self.users.ensure_app(&folder).unwrap();
        let commit = Commit::parse(commit).unwrap();
        let release = ReleaseId(uuid::Uuid::new_v4());
        let key = unit::build_key(&commit, submodules, None, None);
        let stage = folder.create_stage(&key, 0, users.build.uid, None).unwrap();
        let step = unit::build_step(&BuildSpec {
            app,
            commit: &commit,
            mirror: &self.mirror(url),
            stage: &stage,
            submodules,
            directory: None,
            build: None,
            caches: &[],
            env_file: None,
            user: &users.build.name,
            tool_path: TOOL_PATH,
            log: &folder.log(&release, "build"),
        })
        .unwrap();
        let name = unit::build_unit_name(app, &release, 0);
        let settings = unit::step_properties(&step).unwrap();
        self.systemd
            .start_transient(&name, &settings)
            .await
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let result = loop {
            let state = self.systemd.get_unit_state(&name).await.unwrap().unwrap();
            if state.sub_state == "exited" || state.active_state.is_stopped() {
                break state.step_result();
            }
            assert!(Instant::now() < deadline, "{state:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let log = folder.log_tail(&release, "build").unwrap();
        assert!(result.is_success(), "{result:?} {log:?}");
        self.systemd
            .stop_unit(&name, Duration::from_secs(10))
            .await
            .unwrap();
        stage.source()
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
        let key = MirrorKey::of(&SourceUrl::parse(url).unwrap(), None);
        self.store.mirrors().join(format!("{}.git", key.as_str()))
    }

    fn unit(url: &str) -> String {
        fetch_unit_name(MirrorKey::of(&SourceUrl::parse(url).unwrap(), None).as_str())
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

fn plain_want(url: &str, commit: &str) -> Want {
    Want {
        source: SourceUrl::parse(url).unwrap(),
        reference: Some("refs/heads/main".into()),
        commit: Commit::parse(commit).unwrap(),
        base: None,
        submodules: false,
        credential: None,
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
        "cd {folder} && echo {text} >file && mkdir -p app && echo {text} >app/inner && git add . && git commit -qm '{text}' && git rev-parse HEAD"
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

// On one thread, so that nothing is fetched between the first want and the last.
#[tokio::test]
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
async fn many_packs_become_one_and_what_is_held_for_nobody_goes() {
    in_node!();
    let node = Node::new(2).await;
    // What other tests have left.
    node.mirrors.collect(&[].into()).await.unwrap();
    let (url, first) = repository("upkeep");
    let (moved, other) = repository("moved");
    let _server = Server::start().await;
    let packs = || {
        let mirror = node.mirror(&url);
        let count = sh(&format!(
            "ls {}/objects/pack/*.pack | wc -l",
            mirror.display()
        ));
        count.trim().parse::<usize>().unwrap()
    };
    let app = node.want("web.upkeep", &url, &first);
    node.until_ready(&app).await;
    let mut last = first;
    for round in 0..11 {
        last = commit("upkeep", &format!("round {round}"));
        node.want("web.upkeep", &url, &last);
        node.until_ready(&app).await;
    }
    let before = packs();
    assert!(before >= 10, "{before} packs");
    node.mirrors.tidy().await.unwrap();
    assert_eq!(packs(), 1);
    assert!(
        node.systemd
            .get_unit_state(&Node::unit(&url))
            .await
            .unwrap()
            .is_none()
    );
    let tree = node.check_out(&app, &url, &last, false).await;
    assert_eq!(fs::read_to_string(tree.join("file")).unwrap(), "round 10\n");
    let started = Node::starts(&url);
    node.mirrors.tidy().await.unwrap();
    assert_eq!(
        Node::starts(&url),
        started,
        "what is in order is left alone"
    );

    // The app comes from elsewhere now. Nothing that somebody wants goes, whatever the records say.
    node.want("web.upkeep", &moved, &other);
    node.until_ready(&app).await;
    let source = |url: &str| MirrorKey::of(&SourceUrl::parse(url).unwrap(), None);
    let uses = [(app.clone(), source(&url))].into();
    assert_eq!(node.mirrors.collect(&uses).await.unwrap(), 0);
    assert!(node.mirror(&url).exists() && node.mirror(&moved).exists());
    let uses = [(app.clone(), source(&moved))].into();
    assert!(node.mirrors.collect(&uses).await.unwrap() >= 1);
    assert!(!node.mirror(&url).exists() && node.mirror(&moved).exists());
    node.mirrors.unwant(&app);
    assert_eq!(node.mirrors.collect(&[].into()).await.unwrap(), 1);
    assert!(!node.mirror(&moved).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_checks_out_of_the_mirror_that_another_user_owns() {
    in_node!();
    let node = Node::new(2).await;
    let (url, first) = repository("build");
    let _server = Server::start().await;
    let app = node.want("web.build", &url, &first);
    node.until_ready(&app).await;

    let tree = node.check_out(&app, &url, &first, false).await;
    let inner = fs::read_to_string(tree.join("app/inner")).unwrap();
    assert_eq!(inner, "one\n");
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

/// A commit on `main` with `.gitmodules` and links to commits, each `COMMIT PATH`.
fn commit_links(name: &str, modules: &str, links: &[String]) -> String {
    let folder = format!("/srv/git/{name}");
    fs::write(format!("{folder}/.gitmodules"), modules).unwrap();
    let links: String = links
        .iter()
        .map(|link| {
            let link = link.replacen(' ', ",", 1);
            format!("git update-index --add --cacheinfo '160000,{link}';")
        })
        .collect();
    sh(&format!(
        "cd {folder} && git add .gitmodules && {links} git commit -qm links && git rev-parse HEAD"
    ))
    .trim()
    .to_owned()
}

fn module(path: &str, url: &str) -> String {
    format!("[submodule \"{path}\"]\n\tpath = {path}\n\turl = {url}\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn submodules_and_theirs_come_into_the_mirror_and_are_checked_out() {
    in_node!();
    let node = Node::new(2).await;
    let (_, _) = repository("grain");
    let grain = commit("grain", "salt");
    commit("grain", "sugar");
    let (_, _) = repository("flour");
    let flour = commit_links(
        "flour",
        &module("in/grain", "../grain"),
        &[format!("{grain} in/grain")],
    );
    let (url, plain) = repository("bread");
    let bread = commit_links(
        "bread",
        &(module("flour", "git://127.0.0.1/flour") + &module("more grain", "./../grain/")),
        &[format!("{flour} flour"), format!("{grain} more grain")],
    );
    let _server = Server::start().await;

    // Nobody who does not ask for them gets them.
    let without = node.want("web.without", &url, &bread);
    node.until_ready(&without).await;
    let tree = node.check_out(&without, &url, &bread, false).await;
    assert!(!tree.join("flour/file").exists());

    let app = node.want_more("web.bread", &url, &bread, None, true);
    node.until_ready(&app).await;
    let tree = node.check_out(&app, &url, &bread, true).await;
    let read = |path: &str| fs::read_to_string(tree.join(path)).unwrap_or_else(|e| e.to_string());
    assert_eq!(
        [
            "file",
            "flour/file",
            "flour/in/grain/file",
            "more grain/app/inner"
        ]
        .map(read),
        ["one\n", "one\n", "salt\n", "salt\n"]
    );
    // They are there as long as the commit is.
    let mirror = node.mirror(&url);
    let git = |words: &str| {
        sh(&format!(
            "GIT_CONFIG_GLOBAL=/dev/null git -c safe.directory='*' --git-dir={} {words}",
            mirror.display()
        ))
    };
    git("repack -a -d --quiet");
    git("prune --expire=now");
    let tree = node.check_out(&app, &url, &bread, true).await;
    assert!(tree.join("flour/in/grain/file").exists());
    // One unit for it all, and none while nothing is missing.
    assert_eq!(Node::starts(&url), 2);
    let app = node.want_more("web.bread", &url, &plain, None, true);
    node.until_ready(&app).await;
    let left = git("for-each-ref refs/submodules/web/bread/");
    assert_eq!(left, "", "held for a commit that is not wanted any more");

    // A commit that a submodule's repository does not have is said to be missing there.
    let absent = commit_links(
        "bread",
        &module("flour", "../flour"),
        &["0".repeat(39) + "1 flour"],
    );
    let app = node.want_more("web.bread", &url, &absent, None, true);
    let (reason, message) = node.failure(&app).await;
    assert_eq!(reason, Reason::RefNotFound);
    assert!(
        message.contains("flour, git://127.0.0.1/flour"),
        "{message}"
    );
    // It harms nobody else, and is over as soon as something else is wanted.
    let other = node.want_more("web.other", &url, &bread, None, true);
    let app = node.want_more("web.bread", &url, &bread, None, true);
    node.until_ready(&app).await;
    node.until_ready(&other).await;

    for app in [&app, &other, &without] {
        node.mirrors.release(app).await.unwrap();
    }
    assert!(!node.mirror(&url).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn submodules_that_lead_astray_are_refused_with_their_place_and_nothing_is_run() {
    in_node!();
    let node = Node::new(2).await;
    let (_, good) = repository("good");
    let (url, _) = repository("astray");
    let _server = Server::start().await;
    let canary = "/srv/git/canary";
    let link = |path: &str| format!("{good} {path}");
    let lib = |url: &str| commit_links("astray", &module("lib", url), &[link("lib")]);
    let clear = || {
        sh("cd /srv/git/astray && git rm -q --cached -r . && git add file && rm -f .gitmodules");
    };
    let tree_with = |name: &str| {
        sh(&format!(
            "cd /srv/git/astray && blob=$(printf '[submodule \"x\"]\\npath = {name}\\nurl = ../good\\n' | git hash-object -w --stdin) \
             && tree=$(printf '100644 blob %s\\t.gitmodules\\n160000 commit {good}\\t{name}\\n' $blob | git mktree --missing) \
             && commit=$(git commit-tree -m odd $tree) && git update-ref refs/heads/odd $commit && echo $commit"
        ))
        .trim()
        .to_owned()
    };
    // What no tree may have git itself refuses, whoever wants it, and it is said which.
    for name in ["..", ".git", ".GIT"] {
        let app = node.want_more("web.astray", &url, &tree_with(name), None, true);
        let (reason, message) = node.failure(&app).await;
        assert_eq!(reason, Reason::SourceUnavailable, "{name}");
        assert!(message.contains("hasDot"), "{name}: {message}");
    }
    let mut cases = vec![("-dash", "no place", tree_with("-dash"))];
    cases.push((
        "a path that leads out",
        "not say where",
        commit_links("astray", &module("../lib", "../good"), &[link("lib")]),
    ));
    for (url, words) in [
        ("file:///srv/git/good", "none of https"),
        ("/srv/git/good", "none of https"),
        ("ext::touch /srv/git/canary", "none of https"),
        ("--upload-pack=touch /srv/git/canary", "none of https"),
        ("-u/srv/git/canary", "none of https"),
        (
            "ssh://-oProxyCommand=touch$IFS/srv/git/canary/x",
            "none of https",
        ),
        ("https://user:secret@h/x", "none of https"),
        ("good", "none of https"),
        ("../../../../..", "none of https"),
        ("", "none of https"),
    ] {
        clear();
        cases.push((url, words, lib(url)));
    }
    clear();
    cases.push((
        "nothing",
        "not say where",
        commit_links("astray", "", &[link("lib")]),
    ));
    clear();
    cases.push((
        "no text",
        "not say where",
        commit_links("astray", "[submodule", &[link("lib")]),
    ));
    clear();
    cases.push((
        "a link",
        "symbolic link",
        sh(&format!(
            "cd /srv/git/astray && blob=$(printf file | git hash-object -w --stdin) \
             && tree=$(printf '120000 blob %s\\t.gitmodules\\n160000 commit {good}\\tlib\\n' $blob | git mktree --missing) \
             && commit=$(git commit-tree -m link $tree) && git update-ref refs/heads/link $commit && echo $commit"
        ))
        .trim()
        .to_owned(),
    ));
    clear();
    let many: Vec<_> = (0..257).map(|at| link(&format!("lib{at}"))).collect();
    let modules: String = (0..257)
        .map(|at| module(&format!("lib{at}"), "../good"))
        .collect();
    cases.push((
        "many",
        "more than 256",
        commit_links("astray", &modules, &many),
    ));
    clear();
    let mut deepest = good.clone();
    for depth in 0..9 {
        let name = format!("deep{depth}");
        repository(&name);
        let inner = if depth == 0 {
            "good".to_owned()
        } else {
            format!("deep{}", depth - 1)
        };
        deepest = commit_links(
            &name,
            &module("l", &format!("../{inner}")),
            &[format!("{deepest} l")],
        );
    }
    cases.push((
        "deep",
        "8 deep",
        commit_links(
            "astray",
            &module("l", "../deep8"),
            &[format!("{deepest} l")],
        ),
    ));
    for (case, words, commit) in &cases {
        let app = node.want_more("web.astray", &url, commit, None, true);
        let (reason, message) = node.refusal(&app).await;
        assert_eq!(reason, Reason::InvalidSpec, "{case}");
        assert!(message.contains(words), "{case}: {message}");
        assert!(message.contains("source.git.submodules"), "{message}");
        // Without them, the commit is like any other.
        let app = node.want("web.astray", &url, commit);
        node.until_ready(&app).await;
    }
    assert!(!Path::new(canary).exists());
    println!("  {} cases", cases.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn history_is_fetched_only_as_far_as_it_is_asked_for() {
    in_node!();
    let node = Node::new(2).await;
    let (url, first) = repository("long");
    // A file that later commits do not have any more.
    sh(
        "cd /srv/git/long && head -c 4000000 /dev/urandom >large && git add large && git commit -qm large && git rm -q large && git commit -qm small",
    );
    sh("cd /srv/git/long && for at in $(seq 150); do git commit -q --allow-empty -m $at; done");
    let tip = commit("long", "two");
    let _server = Server::start().await;
    let app = node.want("web.long", &url, &tip);
    node.until_ready(&app).await;
    let mirror = node.mirror(&url);
    let kib = || -> u64 {
        let text = sh(&format!("du -sk {} | cut -f1", mirror.display()));
        text.trim().parse().unwrap()
    };
    let commits = |of: &str| {
        sh(&format!(
            "GIT_CONFIG_GLOBAL=/dev/null git -c safe.directory='*' --git-dir={} rev-list --count {of}",
            mirror.display()
        ))
    };
    println!("  one commit of 154: {} KiB", kib());
    assert_eq!(commits(&tip).trim(), "1");
    assert!(kib() < 1000, "{} KiB", kib());

    // The next commit comes alone too, and descends from what is there.
    let next = commit("long", "three");
    let app = node.want_more("web.long", &url, &next, Some(&tip), false);
    node.until_ready(&app).await;
    assert!(kib() < 1000, "{} KiB", kib());

    // From the first commit, which is 150 commits further than what is there.
    let far = node.want_more("web.far", &url, &next, Some(&first), false);
    node.until_ready(&far).await;

    // What was pushed by force descends from its parent alone.
    sh("cd /srv/git/long && git reset -q --hard HEAD~1");
    let forced = commit("long", "instead");
    let app = node.want_more("web.long", &url, &forced, Some(&next), false);
    let (reason, message) = node.refusal(&app).await;
    assert_eq!(reason, Reason::RewindRefused);
    assert!(
        message.contains(&next[..7]) && message.contains("allowRewind"),
        "{message}"
    );
    let starts = Node::starts(&url);
    // Others of the mirror go on; the refused one is not tried again meanwhile.
    let other = node.want_more("web.other", &url, &forced, Some(&tip), false);
    node.until_ready(&other).await;
    assert_eq!(Node::starts(&url), starts + 1);
    // A restarted agent finds the refusal there.
    drop(node);
    let node = Node::new(2).await;
    let app = node.want_more("web.long", &url, &forced, Some(&next), false);
    assert_eq!(node.refusal(&app).await.0, Reason::RewindRefused);
    assert_eq!(Node::starts(&url), starts + 1);
    let app = node.want("web.long", &url, &forced);
    node.until_ready(&app).await;
    assert_eq!(Node::starts(&url), starts + 1);
    // A base that no repository has is none that anything descends from.
    let nowhere = "1".repeat(40);
    let app = node.want_more("web.long", &url, &forced, Some(&nowhere), false);
    assert_eq!(node.refusal(&app).await.0, Reason::RewindRefused);
}

/// sshd with a user whose key is /srv/ssh/good; /srv/ssh/known is what is to be known of it.
const START_SSHD: &str = r#"
systemctl stop --quiet sshd-private 2>/dev/null || :
userdel --remove private 2>/dev/null || :
rm -rf /srv/ssh
mkdir -p /srv/ssh /run/sshd
cd /srv/ssh
for key in host good wrong; do ssh-keygen -q -t ed25519 -N '' -f $key; done
useradd --create-home --shell "$(command -v git-shell)" private
passwd --quiet --delete private
cp good.pub authorized
cat >config <<END
Port 2222
HostKey /srv/ssh/host
AllowUsers private
AuthorizedKeysFile /srv/ssh/authorized
PasswordAuthentication no
UsePAM no
PidFile none
StrictModes no
END
systemd-run --quiet --unit=sshd-private "$(command -v sshd)" -D -e -f /srv/ssh/config
until ssh-keyscan -p 2222 127.0.0.1 >known 2>/dev/null && [ -s known ]; do sleep 0.05; done
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_private_repository_is_fetched_with_its_key_by_nobody_else_and_a_new_key_keeps_the_mirror()
 {
    in_node!();
    let node = Node::new(2).await;
    sh(START_SSHD);
    let read = |name: &str| fs::read_to_string(format!("/srv/ssh/{name}")).unwrap();
    let (good, wrong, known) = (read("good"), read("wrong"), read("known"));
    let (_, first) = repository("private");
    sh("chown -R private /srv/git/private && git config --system --add safe.directory '*'");
    let url = "ssh://private@127.0.0.1:2222/srv/git/private";

    let unknown = node.want_privately(
        "web.unknown",
        (url, &first),
        ("0", &good, &known.replace("2222", "2223")),
    );
    let (reason, message) = node.failure(&unknown).await;
    assert_eq!(reason, Reason::HostKeyMismatch);
    assert!(message.contains("known_hosts of the Secret"), "{message}");
    let refused = node.want_privately("web.refused", (url, &first), ("1", &wrong, &known));
    let (reason, message) = node.failure(&refused).await;
    assert_eq!(reason, Reason::AuthenticationFailed);
    assert!(!message.contains(&wrong[110..160]), "{message}");

    let app = node.want_privately("web.private", (url, &first), ("2", &good, &known));
    node.until_ready(&app).await;
    let mirror = node.ready_mirror(&app);
    // What was needed for it is gone, and stood in no argument, variable or log.
    until_gone("/run/kari/git").await;
    let log = sh("cat /var/lib/kari/mirrors/*.log; journalctl -o cat -u 'kari-fetch*'");
    assert!(!log.contains(&good[110..160]), "{log}");

    // Another key, the same repository: gone on with, not cloned anew.
    fs::write(mirror.join("mark"), "").unwrap();
    sh("cp /srv/ssh/wrong.pub /srv/ssh/authorized");
    let second = commit("private", "two");
    sh("chown -R private /srv/git/private");
    node.want_privately("web.private", (url, &second), ("3", &wrong, &known));
    node.until_ready(&app).await;
    let renewed = node.ready_mirror(&app);
    assert_ne!(renewed, mirror);
    assert!(renewed.join("mark").exists() && !mirror.exists());

    // Who has no key of his own gets nothing of it, not even with a digest of the same letters.
    let stranger = node.want_privately("other.private", (url, &second), ("3", &good, &known));
    assert_eq!(
        node.failure(&stranger).await.0,
        Reason::AuthenticationFailed
    );
    let public = node.want("other.public", url, &second);
    let (reason, _) = node.failure(&public).await;
    assert_eq!(reason, Reason::HostKeyMismatch);
    assert!(!node.mirror(url).join("mark").exists());
}

/// Says the key that it was asked with, from the second time on that it is asked, and goes on until it is told that
/// this is enough.
const ECHO: &str = r#"#!/bin/sh
if [ -e /srv/ssh/asked ]; then
    cat /srv/ssh/good >&2
    until [ -e /srv/ssh/enough ]; do sleep 0.05; done
    exit 1
fi
touch /srv/ssh/asked
echo 'upload-pack: not our ref' >&2
exit 1
"#;

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_says_of_a_key_is_on_no_disk_when_its_fetch_is_over() {
    in_node!();
    let node = Node::new(2).await;
    sh(&format!(
        "{START_SSHD}\ncat >/srv/ssh/echo <<'END'\n{ECHO}\nEND"
    ));
    sh(
        "cd /srv/ssh && chmod 755 echo && echo \"command=\\\"/srv/ssh/echo\\\" $(cat good.pub)\" >authorized && usermod --shell /bin/sh private && chmod 644 good && chmod 777 .",
    );
    let read = |name: &str| fs::read_to_string(format!("/srv/ssh/{name}")).unwrap();
    let (good, known) = (read("good"), read("known"));
    let (_, wanted) = repository("echo");
    let url = "ssh://private@127.0.0.1:2222/srv/git/echo";
    let secret = good.lines().nth(1).unwrap().to_owned();
    let on_disk = || {
        let found = sh(&format!(
            "grep -rlF -e {secret} /var/lib/kari /run/kari || true"
        ));
        found.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let until_found = async |what: &str, fits: &dyn Fn(&[String]) -> bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let found = on_disk();
            if fits(&found) {
                return;
            }
            assert!(Instant::now() < deadline, "{what}: {found:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let is_said = |found: &[String]| found.iter().any(|file| file.ends_with(".log"));
    let is_gone = |found: &[String]| found.is_empty();
    let want = |node: &Node| {
        sh("rm -f /srv/ssh/asked /srv/ssh/enough");
        node.want_privately("web.echo", (url, &wanted), ("0", &good, &known))
    };

    // Nobody wants it any more while it goes on.
    let app = want(&node);
    until_found("it is said", &is_said).await;
    node.mirrors.unwant(&app);
    until_found("stopped", &is_gone).await;

    // It ends while there is no agent.
    want(&node);
    until_found("it is said", &is_said).await;
    drop(node);
    sh(
        "touch /srv/ssh/enough; until [ -z \"$(systemctl list-units --plain --no-legend --state=activating 'kari-fetch*')\" ]; do sleep 0.05; done",
    );
    assert!(is_said(&on_disk()));
    let node = Node::new(2).await;
    until_found("ended without an agent", &is_gone).await;

    // A reboot ends it.
    want(&node);
    until_found("it is said", &is_said).await;
    drop(node);
    sh(
        "systemctl kill --signal=KILL 'kari-fetch*'; systemctl stop 'kari-fetch*'; systemctl reset-failed; rm -r /run/kari/git",
    );
    assert!(is_said(&on_disk()));
    let node = Node::new(2).await;
    until_found("ended by a reboot", &is_gone).await;

    // It ends, and its app hears why.
    let app = want(&node);
    until_found("it is said", &is_said).await;
    sh("touch /srv/ssh/enough");
    let (_, message) = node.failure(&app).await;
    assert!(!message.contains(&secret), "{message}");
    until_found("ended", &|found| !is_said(found)).await;
}

/// Waits until a folder is empty.
async fn until_gone(folder: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        assert!(Instant::now() < deadline, "{folder} is not empty");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
