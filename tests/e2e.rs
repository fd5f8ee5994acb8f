//! Kari as a cluster has it: the image, nodes with a kubelet, and the commands of docs/install.md, run as they
//! stand there, with an upgrade in the middle of a rollout, and back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use futures::future::{join_all, try_join_all};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use serde_json::json;
use support::tls::{Authority, Tls};
use support::traffic::{self, Traffic};
use support::{DEPLOY_LIMIT, LIMIT, Lab, Space, until};
use testbed::{Options, Testbed, images, process};

const NODES: [&str; 2] = ["n1", "n2"];

/// The names that the page uses where the reader has others.
const IMAGE: &str = "registry.example.com/kari";
const HOST: &str = "hello.example.com";

/// Requests a second to each node while Kari is upgraded and exchanged below a rollout.
const REQUESTS: u32 = 20;

#[tokio::test]
async fn the_installation_page_installs_upgrades_rolls_back_removes_and_brings_back_kari() {
    let options = Options {
        nodes: 2,
        kubelet: true,
        kari: false,
        ..Options::default()
    };
    let testbed = support::testbed_of(options).await;
    let authority = Authority::new();
    let page = Page::new(testbed, &authority);
    let space = Space {
        testbed,
        client: testbed.client().await.expect("a client"),
        namespace: "web".to_owned(),
    };
    let app = App::new(&space, &page).await;
    app.push("one").await;
    load_images(testbed);

    page.follow("Prepare the nodes").await;
    page.follow("Make the image").await;
    page.follow("Install").await;
    let printed = page.follow("Deploy an application").await;
    assert!(printed.contains("Welcome one from Python"), "{printed}");

    let visitor = Tls::new(Lab(testbed), &authority, HOST);
    upgrade_in_the_middle_of_a_rollout(&space, &visitor, &app, &page).await;
    let processes = processes(&space).await;
    roll_back(&space, &visitor, &page).await;
    looked_after_again(&space, 4).await;
    assert_eq!(self::processes(&space).await, processes, "restarted");

    page.follow("Uninstall, and install again: helm uninstall")
        .await;
    // helm waits for the objects that it made, not for their Pods.
    until("Kari's Pods are gone", LIMIT, || async {
        let pods = ["get", "pods", "-n", "kari-system", "-o", "name"];
        match kubectl(testbed, &pods).await.as_str() {
            "" => Ok(()),
            left => Err(left.to_owned()),
        }
    })
    .await;
    assert_eq!(self::processes(&space).await, processes, "restarted");
    for node in NODES {
        let answer = traffic::get_once(&visitor, https(&space, node), HOST, "/").await;
        assert!(
            matches!(&answer, Ok((200, body)) if body.contains("Welcome two")),
            "{answer:?}"
        );
    }

    page.follow("Uninstall, and install again: helm install")
        .await;
    looked_after_again(&space, 3).await;
    assert_eq!(self::processes(&space).await, processes, "restarted");

    page.follow("Remove everything").await;
    for node in NODES {
        nothing_is_left(&space, node).await;
    }
}

/// Where a node's proxy takes TLS.
fn https(space: &Space, node: &str) -> SocketAddr {
    (
        space.proxy(node).ip(),
        space.testbed.description().addresses.https_port,
    )
        .into()
}

/// The image under two tags, so that there is something to upgrade to. It is made twice, and is the same.
fn load_images(testbed: &Testbed) {
    let digests = ["0.1.0", "next"].map(|tag| {
        let name = format!("{IMAGE}:{tag}");
        let image = images::make_kari(testbed.directory(), &name).unwrap_or_else(|e| panic!("{e}"));
        testbed
            .load_image(&image.archive)
            .unwrap_or_else(|e| panic!("{e}"));
        image.digest
    });
    assert_eq!(digests[0], digests[1], "two builds of one image differ");
}

async fn upgrade_in_the_middle_of_a_rollout(
    space: &Space,
    visitor: &Tls<Lab>,
    app: &App,
    page: &Page,
) {
    let traffic =
        NODES.map(|node| Traffic::start(visitor.clone(), https(space, node), HOST, REQUESTS, 2));
    let commit = app.push("two").await;
    // A build that takes long enough for the upgrade to meet it.
    let slow = json!({
        "metadata": {"annotations": {"kari.dev/requestedAt": "two"}},
        "spec": {"build": {"run": "sleep 4", "network": false}},
    });
    patch(space, &slow).await;
    space
        .deployment_until("hello", "changing a node", LIMIT, |d| {
            let status = d.status.as_ref();
            let at_new = status
                .and_then(|s| s.source.as_ref())
                .is_some_and(|s| s.commit == commit);
            at_new && status.is_some_and(|s| !s.active.is_empty())
        })
        .await;
    page.run("sed -i 's/^image:$/&\\n  tag: next/' values.yaml")
        .await;
    page.follow("Upgrade").await;
    let busy = space
        .deployments()
        .get("hello")
        .await
        .expect("the Deployment");
    let nodes = busy.status.and_then(|s| s.nodes).expect("counts");
    assert!(
        nodes.updated < 2,
        "the rollout was over before the upgrade: {nodes:?}"
    );

    space.ready_at("hello", &commit).await;
    assert_eq!(tags(space).await, BTreeSet::from(["next".to_owned()]));
    for (traffic, node) in traffic.into_iter().zip(NODES) {
        let tally = traffic.stop().await;
        assert!(tally.failed.is_empty(), "{node}: {:?}", tally.failed);
        assert_eq!(tally.bodies.len(), 2, "{node} answered {:?}", tally.bodies);
    }
}

/// Goes back to what was installed, under traffic.
async fn roll_back(space: &Space, visitor: &Tls<Lab>, page: &Page) {
    let traffic =
        NODES.map(|node| Traffic::start(visitor.clone(), https(space, node), HOST, REQUESTS, 2));
    page.follow("Roll back").await;
    assert_eq!(tags(space).await, BTreeSet::from(["0.1.0".to_owned()]));
    for (traffic, node) in traffic.into_iter().zip(NODES) {
        let tally = traffic.stop().await;
        assert!(tally.failed.is_empty(), "{node}: {:?}", tally.failed);
        assert_eq!(tally.bodies.len(), 1, "{node} answered {:?}", tally.bodies);
    }
}

/// The tags of the images of Kari's Pods, but for Pods that are ending.
async fn tags(space: &Space) -> BTreeSet<String> {
    let pods: Api<Pod> = Api::namespaced(space.client.clone(), "kari-system");
    let pods = pods.list(&Default::default()).await.expect("the Pods");
    let staying = pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none());
    let containers = staying.flat_map(|pod| pod.spec.iter().flat_map(|spec| &spec.containers));
    containers
        .map(|container| container.image.clone().expect("an image"))
        .map(|image| image.rsplit(':').next().expect("a tag").to_owned())
        .collect()
}

/// Waits until an agent of each node has taken note of a change that restarts nothing.
async fn looked_after_again(space: &Space, keep: u32) {
    patch(space, &json!({"spec": {"keepReleases": keep}})).await;
    for node in NODES {
        space
            .release_until("hello", node, "taken on", DEPLOY_LIMIT, |release| {
                let noted = release
                    .status
                    .as_ref()
                    .map(|status| status.observed_generation);
                release.spec.template.keep_releases == keep && noted == release.metadata.generation
            })
            .await;
    }
}

async fn nothing_is_left(space: &Space, node: &str) {
    // The folder of the testbed's own is not Kari's, and /var/lib/kari is a mount.
    let files = "find /etc /run /var/lib -name '*kari*' ! -path '/run/kari-testbed*' ! -path /var/lib/kari \
                 ! -path '*/containerd/*' ! -path '*/kubelet/*'; find /var/lib/kari -mindepth 1; \
                 systemctl list-units --all --plain --no-legend 'kari*'";
    let left = space.on(node, &["sh", "-c", files]).await;
    assert_eq!(left, "", "left on {node}");
}

/// The main process of the app on each node, once the one before it has drained.
async fn processes(space: &Space) -> Vec<String> {
    let show = "systemctl show --property=Id,MainPID 'kari.web.hello.web.*.service'";
    let look = async |node: &'static str| {
        until(&format!("one process runs on {node}"), LIMIT, || async {
            let found = space.on(node, &["sh", "-c", show]).await;
            match found.matches("MainPID=").count() {
                1 => Ok(found),
                _ => Err(found),
            }
        })
        .await
    };
    join_all(NODES.map(look)).await
}

async fn patch(space: &Space, change: &serde_json::Value) {
    let parameters = kube::api::PatchParams::default();
    space
        .deployments()
        .patch("hello", &parameters, &kube::api::Patch::Merge(change))
        .await
        .expect("a patch");
}

async fn kubectl(testbed: &Testbed, arguments: &[&str]) -> String {
    testbed
        .kubectl(arguments)
        .await
        .unwrap_or_else(|e| panic!("{e}"))
}

/// The example that the page deploys, in a repository on the first node that one key may read, by ssh.
struct App {
    testbed: &'static Testbed,
    files: tempfile::TempDir,
}

/// A git server with the account `git`, for which `deploy.key` is made.
const GIT_SERVER: &str = r#"
mkdir -p /srv/git /srv/ssh /run/sshd
cd /srv/ssh
for key in host deploy; do ssh-keygen -q -t ed25519 -N '' -f $key; done
useradd --create-home --shell "$(command -v git-shell)" git
passwd --quiet --delete git
cat >config <<END
Port 2222
HostKey /srv/ssh/host
AllowUsers git
AuthorizedKeysFile /srv/ssh/deploy.pub
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
END
systemd-run --quiet --unit=sshd "$(command -v sshd)" -D -e -f /srv/ssh/config
until (: </dev/tcp/$1/2222) 2>/dev/null; do sleep 0.05; done
"#;

/// Brings the server's copy of a repository up to date.
const PUBLISH: &str = r#"
if [ -d /srv/git/hello.git ]; then git -c 'safe.directory=*' -C /srv/git/hello.git fetch --quiet
else git clone --quiet --mirror "$1" /srv/git/hello.git; fi
chown -R git /srv/git/hello.git
"#;

impl App {
    /// Starts the server, and gives the administrator the key and the server's host key.
    async fn new(space: &Space, page: &Page) -> Self {
        let files = tempfile::tempdir().expect("a folder");
        let example = repository().join("examples/python/hello");
        let copied = std::process::Command::new("cp")
            .arg("-r")
            .arg(example)
            .arg(files.path())
            .status();
        assert!(copied.expect("cp").success());
        let ip = space.proxy(NODES[0]).ip().to_string();
        space
            .on(NODES[0], &["bash", "-euc", GIT_SERVER, "server", &ip])
            .await;
        let key = space.on(NODES[0], &["cat", "/srv/ssh/deploy"]).await;
        page.write("deploy.key", &format!("{key}\n"));
        let host = space.on(NODES[0], &["cat", "/srv/ssh/host.pub"]).await;
        page.write("known_hosts", &format!("[{ip}]:2222 {host}\n"));
        Self {
            testbed: space.testbed,
            files,
        }
    }

    /// Commits the example with another greeting, and gives the commit.
    async fn push(&self, greeting: &str) -> String {
        let file = self.files.path().join("hello/server.py");
        let text = std::fs::read_to_string(repository().join("examples/python/hello/server.py"))
            .expect("the example");
        let changed = text.replace("from Python", &format!("{greeting} from Python"));
        assert_ne!(text, changed, "the example says something else");
        std::fs::write(file, changed).expect("the example");
        let pushed = self
            .testbed
            .git_repository("hello", self.files.path(), greeting)
            .unwrap_or_else(|e| panic!("{e}"));
        let node = self.testbed.node(NODES[0]).expect("a node");
        let words = ["sh", "-euc", PUBLISH, "publish", &pushed.url];
        node.output(words).await.unwrap_or_else(|e| panic!("{e}"));
        pushed.commit
    }
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The page, and the administrator who follows it.
struct Page {
    testbed: &'static Testbed,
    blocks: Vec<Block>,
    /// Where the administrator is; the repository, as far as the page uses it.
    folder: tempfile::TempDir,
    /// What the administrator has set.
    variables: String,
}

/// A block of commands.
struct Block {
    section: String,
    place: Place,
    commands: String,
}

/// Where commands are run.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Administrator,
    EachNode,
    Nowhere,
}

impl Page {
    /// The administrator has a certificate of the authority.
    fn new(testbed: &'static Testbed, authority: &Authority) -> Self {
        let text = std::fs::read_to_string(repository().join("docs/install.md")).expect("the page");
        let blocks = blocks(&text);
        let folder = tempfile::tempdir().expect("a folder");
        std::os::unix::fs::symlink(repository().join("charts"), folder.path().join("charts"))
            .expect("a link");
        let names = blocks
            .iter()
            .find(|b| b.section == "What is yours")
            .expect("the names");
        let git = testbed.node(NODES[0]).expect("a node").ip();
        // The one name that the test has otherwise: the page's has no server.
        let url = format!("ssh://git@{git}:2222/srv/git/hello.git");
        let variables = format!(
            "{}
REPOSITORY={url}
",
            names.commands
        );
        assert!(
            variables.contains(IMAGE) && variables.contains(HOST),
            "{variables}"
        );
        let page = Self {
            testbed,
            blocks,
            folder,
            variables,
        };
        let issued = authority.issue(&[HOST]);
        page.write("hello.crt", &issued.certificate);
        page.write("hello.key", &issued.key);
        page.write("authority.pem", &authority.pem);
        page
    }

    /// Writes a file that the administrator has.
    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.folder.path().join(name), content).expect("a file");
    }

    /// Runs the commands of a section, those that contain what stands after a colon, and gives what they print.
    async fn follow(&self, section: &str) -> String {
        let (section, part) = section.split_once(": ").unwrap_or((section, ""));
        let blocks: Vec<_> = self
            .blocks
            .iter()
            .filter(|block| block.section == section && block.commands.contains(part))
            .collect();
        assert!(
            !blocks.is_empty(),
            "the page has no commands in {section:?} {part:?}"
        );
        let begin = std::time::Instant::now();
        let mut printed = String::new();
        for block in blocks {
            match block.place {
                Place::Nowhere => {}
                Place::Administrator => {
                    printed.push_str(&self.run(&block.commands).await);
                    if block.commands.contains("cat >values.yaml") {
                        // The disk is a developer's.
                        self.run("echo 'agent: {diskReserveMib: 512}' >>values.yaml")
                            .await;
                    }
                }
                Place::EachNode => {
                    let nodes = self.testbed.nodes();
                    let done = nodes
                        .iter()
                        .map(|node| node.output(["sh", "-euxc", &block.commands]));
                    try_join_all(done).await.unwrap_or_else(|e| panic!("{e}"));
                }
            }
        }
        println!("==> {section}: {:.1} s", begin.elapsed().as_secs_f32());
        printed
    }

    async fn run(&self, commands: &str) -> String {
        let mut command = self.testbed.lab_command("bash").expect("the lab");
        let directory = self.testbed.directory();
        let path = std::env::var("PATH").expect("a PATH");
        command
            .args([
                "-euo",
                "pipefail",
                "-c",
                &format!("{}{commands}", self.variables),
            ])
            .env(
                "PATH",
                format!("{}:{path}", directory.join("bin").display()),
            )
            .env("KUBECONFIG", directory.join("pki/lab.kubeconfig"))
            .env("HOME", self.folder.path())
            .env("CURL_CA_BUNDLE", self.folder.path().join("authority.pem"))
            .current_dir(self.folder.path());
        let done = tokio::task::spawn_blocking(move || process::run(&mut command))
            .await
            .expect("no panic");
        match done {
            Ok(printed) => printed,
            Err(error) => panic!("{error}\n{}", self.what_there_is().await),
        }
    }

    /// What somebody needs to find out why a command failed.
    async fn what_there_is(&self) -> String {
        let asked: [&[&str]; 4] = [
            &["get", "pods", "-A", "-o", "wide"],
            &["logs", "-n", "kari-system", "ds/kari-agent", "--tail=20"],
            &[
                "logs",
                "-n",
                "kari-system",
                "deploy/kari-controller",
                "--tail=20",
            ],
            &["get", "kd,krel", "-A", "-o", "wide"],
        ];
        let mut text = String::new();
        for words in asked {
            let answer = self
                .testbed
                .kubectl(words)
                .await
                .unwrap_or_else(|e| e.to_string());
            text.push_str(&format!("{words:?}\n{answer}\n"));
        }
        text
    }
}

/// The blocks of commands of a page, with the section and the place of each.
fn blocks(page: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let (mut section, mut place, mut inside) = (String::new(), Place::Administrator, false);
    for line in page.lines() {
        if inside {
            inside = line != "```";
            if inside {
                let commands = &mut blocks.last_mut().expect("a block").commands;
                commands.push_str(line);
                commands.push('\n');
            } else {
                place = Place::Administrator;
            }
        } else if line == "```sh" {
            inside = true;
            blocks.push(Block {
                section: section.clone(),
                place,
                commands: String::new(),
            });
        } else if let Some(heading) = line.strip_prefix("## ") {
            section = heading.to_owned();
        } else if line == "<!-- on each node -->" {
            place = Place::EachNode;
        } else if line.starts_with("<!-- not in the test") {
            place = Place::Nowhere;
        }
    }
    blocks
}
