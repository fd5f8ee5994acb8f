//! What people copy works: every example with the manifest beside it, and every
//! block of the cookbook as it stands there.
//!
//! The node is in the machine's own network, as one example fetches packages.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::tls::{Authority, Tls};
use support::{Space, is, testbed_of, traffic};
use testbed::{Network, Options, Testbed};

/// Where manifests and cookbook say that repositories are.
const GIT_SERVER: &str = "https://git.example.com/";

/// A repository as the manifests name it, and its folder of `examples/`; `.` is all of them in one.
const REPOSITORIES: [(&str, &str); 9] = [
    ("hello-c", "c"),
    ("hello-go", "go"),
    ("hello-node", "node"),
    ("hello-python", "python"),
    ("hello-rust", "rust"),
    ("reports", "worker"),
    ("notes", "stateful"),
    ("feed", "packages"),
    ("monorepo", "."),
];

/// A dozen applications at once on two busy cores, some of them compiled.
const ALL_LIMIT: Duration = Duration::from_secs(300);

async fn space(topic: &str) -> Space {
    let options = Options {
        network: Network::Host,
        ..Options::default()
    };
    Space::new(testbed_of(options).await, topic).await
}

#[tokio::test]
async fn all_examples_run_on_one_node_at_the_same_time_each_under_its_own_host_name() {
    let space = space("examples").await;
    let mut deployments = vec![];
    for folder in [
        "c", "go", "node", "packages", "python", "rust", "stateful", "worker",
    ] {
        let text = read(&format!("examples/{folder}/deployment.yaml"));
        deployments.extend(apply(&space, folder, &text).await);
    }
    assert_eq!(deployments.len(), 8, "{deployments:?}");
    all_ready(&space, &deployments).await;

    for (host, expected) in [
        ("c.example.com", "Hello from C"),
        ("go.example.com", "Hello from Go"),
        ("node.example.com", "Hello from Node"),
        ("python.example.com", "Hello from Python"),
        ("rust.example.com", "Hello from Rust"),
        ("feed.example.com", "a feed, built with packages"),
        ("reports.example.com", "Reports from the web half"),
        ("notes.example.com", ""),
    ] {
        answers(&space, host, "/", expected).await;
    }
}

#[tokio::test]
async fn every_block_of_the_cookbook_is_deployed_as_it_stands() {
    let space = space("cookbook").await;
    let page = read("docs/cookbook.md");
    let blocks: Vec<&str> = page
        .split("```yaml\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap_or_default())
        .collect();
    let private = Private::start(&space).await;
    let authority = Authority::new();
    let certificate = authority.issue(&["secure.example.com"]);
    let files = [
        ("deploy-key", private.key.as_str()),
        ("known_hosts", &private.known_hosts),
        ("tls.crt", &certificate.certificate),
        ("tls.key", &certificate.key),
    ];
    for command in page.split("```sh\n").skip(1) {
        let command = command.split("```").next().unwrap_or_default();
        run(&space, command, &files);
    }
    let mut deployments = vec![];
    for (number, block) in blocks.iter().enumerate() {
        let block = private.served(block);
        let found = apply(&space, &format!("block-{number}"), &block).await;
        assert!(!found.is_empty(), "a block without a Deployment:\n{block}");
        deployments.extend(found);
    }
    assert!(deployments.len() > 10, "{deployments:?}");
    all_ready(&space, &deployments).await;

    for (host, path, expected) in [
        ("website.example.com", "/", "from Node"),
        (
            "weekly.example.com",
            "/",
            "Weekly reports from the web half",
        ),
        ("notebook.example.com", "/healthz", "ok"),
        ("newsfeed.example.com", "/items/7", "item 7"),
        ("www.portal.example.com", "/", "from Python"),
    ] {
        answers(&space, host, path, expected).await;
    }
    let client = Tls::new(
        support::Lab(space.testbed),
        &authority,
        "secure.example.com",
    );
    let answer = traffic::get_once(&client, space.tls_proxy("n1"), "secure.example.com", "/");
    let (status, body) = answer.await.unwrap_or_else(|e| panic!("https: {e}"));
    assert!(
        status == 200 && body.contains("from Python"),
        "{status} {body}"
    );
}

/// A git server that lets in whoever has its key or its token.
struct Private {
    key: String,
    known_hosts: String,
    https: String,
    ssh: String,
}

/// Where manifests say that private repositories are.
const PRIVATE_SERVERS: [&str; 2] = [
    "https://private.example.com/",
    "ssh://git@private.example.com/",
];
const TOKEN: &str = "a-token";

const START_PRIVATE_SERVER: &str = r#"
mkdir -p /srv/private/git /run/sshd
cd /srv/private
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj '/CN=git' -addext 'subjectAltName=IP:127.0.0.1' -keyout key.pem -out certificate.pem 2>/dev/null
printf 'git:%s\n' "$(openssl passwd -apr1 "$5")" >users
chmod 644 users
cat >nginx.conf <<END
error_log stderr; pid /srv/private/pid; daemon off;
events {}
http {
    access_log off;
    server {
        listen 127.0.0.1:$2 ssl;
        ssl_certificate certificate.pem;
        ssl_certificate_key key.pem;
        location / { auth_basic git; auth_basic_user_file users; proxy_pass http://$1; }
    }
}
END
systemd-run --quiet --unit=tls-private nginx -p /srv/private -c nginx.conf
for key in host user; do ssh-keygen -q -t ed25519 -N '' -f $key; done
id git >/dev/null 2>&1 || useradd --create-home git
usermod --shell "$(command -v git-shell)" git
passwd --quiet --delete git
git clone --quiet --mirror "http://$1/$4" "/srv/private/git/hello-python.git"
chown -R git /srv/private/git
cat >config <<END
Port $3
ListenAddress 127.0.0.1
HostKey /srv/private/host
AllowUsers git
AuthorizedKeysFile /srv/private/user.pub
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
END
systemd-run --quiet --unit=sshd-private "$(command -v sshd)" -D -e -f /srv/private/config
for port in $2 $3; do
    until (: </dev/tcp/127.0.0.1/$port) 2>/dev/null; do sleep 0.05; done
done
"#;

impl Private {
    async fn start(space: &Space) -> Self {
        let url = push(space.testbed, &space.namespace, "hello-python", "python");
        let (_, file) = url.rsplit_once('/').expect("a file in a url");
        let git = space.testbed.description().addresses.git.to_string();
        let free = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
            listener
                .local_addr()
                .expect("its address")
                .port()
                .to_string()
        };
        let (https, ssh) = (free(), free());
        let words = ["bash", "-euc", START_PRIVATE_SERVER, "private"];
        let arguments = [git.as_str(), &https, &ssh, file, TOKEN];
        space.on("n1", &[&words[..], &arguments].concat()).await;
        let file_of = async |name: &str| {
            let path = format!("/srv/private/{name}");
            space.on("n1", &["cat", &path]).await
        };
        let authority = file_of("certificate.pem").await;
        space
            .testbed
            .trust_authority(&authority)
            .await
            .expect("an authority");
        Self {
            key: file_of("user").await,
            known_hosts: format!("[127.0.0.1]:{ssh} {}", file_of("host.pub").await),
            https: format!("https://127.0.0.1:{https}/{}-", space.namespace),
            ssh: format!("ssh://git@127.0.0.1:{ssh}/srv/private/git/"),
        }
    }

    /// The text with its private repositories where they are here.
    fn served(&self, text: &str) -> String {
        let [https, ssh] = PRIVATE_SERVERS;
        text.replace(https, &self.https).replace(ssh, &self.ssh)
    }
}

/// Runs a command of the page as a user would, in a folder with these files.
fn run(space: &Space, command: &str, files: &[(&str, &str)]) {
    let folder = support::folder(files);
    let script = format!(
        "kubectl() {{ command kubectl --namespace={} \"$@\"; }}\n{command}",
        space.namespace
    );
    let programs = space.testbed.directory().join("bin");
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("sh")
        .args(["-euc", &script])
        .current_dir(folder.path())
        .env("PATH", format!("{}:{path}", programs.display()))
        .env("KUBECONFIG", space.testbed.kubeconfig())
        .env("TOKEN", TOKEN)
        .output()
        .expect("sh");
    assert!(output.status.success(), "{command}: {output:?}");
}

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// `kubectl apply` of a text whose repositories are made and named as the testbed has them; gives the names
/// of its Deployments.
async fn apply(space: &Space, name: &str, text: &str) -> Vec<String> {
    let mut text = text.to_owned();
    for (repository, folder) in REPOSITORIES {
        let url = format!("{GIT_SERVER}{repository}.git");
        if text.contains(&url) {
            let served = push(space.testbed, &space.namespace, repository, folder);
            text = text.replace(&url, &served);
        }
    }
    assert!(!text.contains(GIT_SERVER), "an unknown repository:\n{text}");
    let folder = support::folder(&[("manifest.yaml", &text)]);
    let file = folder.path().join("manifest.yaml");
    let file = file.to_str().expect("a path in UTF-8");
    let words = [
        "apply",
        "--namespace",
        &space.namespace,
        "--output",
        "name",
        "--filename",
        file,
    ];
    let printed = space
        .testbed
        .kubectl(words)
        .await
        .unwrap_or_else(|e| panic!("{name}: {e}\n{text}"));
    printed
        .lines()
        .filter_map(|line| line.strip_prefix("deployment.kari.dev/"))
        .map(str::to_owned)
        .collect()
}

/// Serves a folder of `examples/` as a repository with a branch and releases; gives its url.
fn push(testbed: &Testbed, namespace: &str, name: &str, folder: &str) -> String {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples")
        .join(folder);
    let work = tempfile::tempdir().expect("a folder");
    let tree = match folder {
        "." => work.path().join("examples"),
        _ => work.path().to_owned(),
    };
    copy(&sources, &tree);
    let git = |words: &[&str]| {
        let output = Command::new("git")
            .args([
                "-c",
                "user.name=examples",
                "-c",
                "user.email=examples@example.com",
            ])
            .args(words)
            // The same files are the same commit, however often they are served.
            .env("GIT_AUTHOR_DATE", "2026-01-01T00:00:00Z")
            .env("GIT_COMMITTER_DATE", "2026-01-01T00:00:00Z")
            .current_dir(work.path())
            .output()
            .expect("git");
        assert!(output.status.success(), "git {words:?}: {output:?}");
    };
    git(&["init", "--quiet", "--initial-branch=main"]);
    git(&["add", "--all", "--force"]);
    git(&["commit", "--quiet", "--message=as it is in the examples"]);
    for release in ["v1.4.1", "v1.4.2", "v2.0.0-beta.1"] {
        git(&["tag", release]);
    }
    testbed
        .mirror(&format!("{namespace}-{name}"), &work.path().join(".git"))
        .unwrap_or_else(|e| panic!("{name}: {e}"))
        .url
}

fn copy(from: &PathBuf, to: &PathBuf) {
    let status = Command::new("cp").arg("-rT").arg(from).arg(to).status();
    assert!(status.expect("cp").success(), "{}", from.display());
}

async fn all_ready(space: &Space, deployments: &[String]) {
    for name in deployments {
        space
            .deployment_until(name, "Ready", ALL_LIMIT, |d| {
                d.status
                    .as_ref()
                    .is_some_and(|s| is(&s.conditions, "Ready", "True"))
            })
            .await;
    }
}

async fn answers(space: &Space, host: &str, path: &str, expected: &str) {
    let lab = support::Lab(space.testbed);
    let answer = traffic::get_once(&lab, space.proxy("n1"), host, path).await;
    let (status, body) = answer.unwrap_or_else(|e| panic!("{host}: {e}"));
    assert_eq!(status, 200, "{host}: {body}");
    assert!(body.contains(expected), "{host}{path}: {body}");
}
