//! Git servers of every kind, each read by the controller, which looks references up, and by a node, which
//! fetches; and repositories that change as repositories do.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use std::process::Command;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::future::join_all;
use kari::agent::host::mirror::{MirrorKey, SourceUrl};
use kari::agent::host::unit::fetch_unit_name;
use kari::api::Deployment;
use serde_json::{Value, json};
use support::{DEPLOY_LIMIT, LIMIT, Space, folder, is, reason, until};
use testbed::{Part, Repository};
use tokio::sync::OnceCell;

const NODE: &str = "n1";

/// A server that says nothing is given up by the controller after 30 s.
const SILENCE_LIMIT: Duration = Duration::from_secs(90);

async fn space(topic: &str) -> Space {
    Space::new(support::testbed(1).await, topic).await
}

/// A Deployment that serves nobody: what is tested is how its commit comes.
fn worker(name: &str, url: &str) -> Value {
    json!({
        "apiVersion": "kari.dev/v1alpha1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "placement": {"nodeSelector": {}},
            "source": {"git": {"url": url, "intervalSeconds": 3600}},
            "processes": [{"name": "worker", "command": ["sleep", "infinity"]}],
            "strategy": {"minReadySeconds": 0},
        },
    })
}

fn push(space: &Space, name: &str, text: &str) -> Repository {
    space.push(name, folder(&[("message", text)]).path())
}

/// Runs git in a repository of the testbed's server.
fn git(space: &Space, name: &str, arguments: &[&str]) -> String {
    let repository = space
        .testbed
        .directory()
        .join(format!("git/{}-{name}.git", space.namespace));
    let output = Command::new("git")
        .env("GIT_DIR", repository)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .args(["-c", "user.name=t", "-c", "user.email=t@example.com"])
        .args(arguments)
        .output()
        .expect("git");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "git {arguments:?}: {complaint}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Waits until a condition's reason is `why`, and gives its message.
async fn says(space: &Space, name: &str, kind: &str, why: &str, limit: Duration) -> String {
    let deployment = space
        .deployment_until(name, &format!("{kind}: {why}"), limit, |d| {
            let status = d.status.as_ref();
            status.is_some_and(|s| reason(&s.conditions, kind) == why)
        })
        .await;
    message(&deployment, kind)
}

fn message(deployment: &Deployment, kind: &str) -> String {
    let status = deployment.status.as_ref().expect("a status");
    let condition = status.conditions.iter().find(|c| c.type_ == kind);
    condition.expect("a condition").message.clone()
}

/// The commit that the node serves.
async fn served(space: &Space, name: &str) -> Option<String> {
    let release = space
        .release_until(name, NODE, "seen", LIMIT, |_| true)
        .await;
    release.status?.serving.map(|serving| serving.commit)
}

/// Servers in the node, beside the testbed's own: nginx with TLS before that one, `git daemon` and sshd, for
/// repositories below /srv/git.
struct Servers {
    /// The authority of the TLS server's certificate.
    authority: String,
    /// sshd's line of `ssh_known_hosts`.
    host_key: String,
    /// The node's address.
    ip: String,
}

static SERVERS: OnceCell<Servers> = OnceCell::const_new();

/// Servers in the node that want credentials: sshd on another port, and nginx with TLS of an authority that no
/// machine knows. /srv/private has the keys.
struct PrivateServers {
    /// The node's address.
    ip: String,
    /// Another address of it, where whoever asks is noted with what he sends.
    elsewhere: String,
    authority: String,
    known_hosts: String,
    /// Keys for ssh: the first is let in.
    keys: [String; 2],
}

static PRIVATE_SERVERS: OnceCell<PrivateServers> = OnceCell::const_new();

const PASSWORD: &str = "hunter2-planted-password";
const TOKEN: &str = "planted-token-4711";

const START_PRIVATE_SERVERS: &str = r#"
mkdir -p /srv/git /srv/private /run/sshd
cd /srv/private
ip=$1 git=$2 elsewhere=10.77.0.250
ip addr add $elsewhere/32 dev lo
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj '/CN=an authority' -keyout ca.key -out ca.pem 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj '/CN=git' -keyout key.pem -out request.pem 2>/dev/null
printf 'subjectAltName=IP:%s,IP:%s\n' "$ip" $elsewhere >extensions
openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out certificate.pem 2>/dev/null
printf 'user:%s\n' "$(openssl passwd -apr1 "$3")" >users
chmod 644 users
cat >nginx.conf <<END
error_log stderr; pid /srv/private/pid; daemon off;
events {}
http {
    map "\$remote_addr \$http_authorization" \$echo { default ''; "~^$ip Basic" 1; }
    log_format sent '\$server_addr \$http_authorization';
    ssl_certificate certificate.pem;
    ssl_certificate_key key.pem;
    server {
        listen $ip:8444 ssl;
        access_log off;
        location /open/ { proxy_pass http://$git/; }
        location /basic/ { auth_basic git; auth_basic_user_file users; proxy_pass http://$git/; }
        location /bearer/ {
            if (\$http_authorization != "Bearer $4") { return 401; }
            proxy_pass http://$git/;
        }
        location /away/ { return 302 https://$elsewhere:8444\$request_uri; }
        # To the node it says what it was sent.
        location /echo/ {
            default_type text/plain;
            if (\$echo) { return 403 "refused: \$http_authorization\\n"; }
            auth_basic git; auth_basic_user_file users; proxy_pass http://$git/;
        }
    }
    server {
        listen $elsewhere:8444 ssl;
        access_log /srv/private/sent sent;
        location / { auth_basic git; auth_basic_user_file users; proxy_pass http://$git/; }
    }
}
END
systemd-run --quiet --unit=tls-private nginx -p /srv/private -c nginx.conf

for key in host good other; do ssh-keygen -q -t ed25519 -N '' -f $key; done
useradd --create-home --shell "$(command -v git-shell)" private
passwd --quiet --delete private
cp good.pub authorized
cat >config <<END
Port 2222
HostKey /srv/private/host
AllowUsers private
AuthorizedKeysFile /srv/private/authorized
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
END
systemd-run --quiet --unit=sshd-private "$(command -v sshd)" -D -e -f /srv/private/config
for port in 8444 2222; do
    until (: </dev/tcp/$ip/$port) 2>/dev/null; do sleep 0.05; done
done
"#;

async fn private_servers(space: &Space) -> &'static PrivateServers {
    PRIVATE_SERVERS
        .get_or_init(|| async {
            let ip = space.testbed.node(NODE).expect("a node").ip().to_string();
            let git = space.testbed.description().addresses.git.to_string();
            let words = ["bash", "-euc", START_PRIVATE_SERVERS, "servers"];
            let arguments = [ip.as_str(), &git, PASSWORD, TOKEN];
            space.on(NODE, &[&words[..], &arguments].concat()).await;
            let file = async |name: &str| {
                let path = format!("/srv/private/{name}");
                space.on(NODE, &["cat", &path]).await
            };
            let host = file("host.pub").await;
            let host: Vec<&str> = host.split(' ').take(2).collect();
            PrivateServers {
                known_hosts: format!("[{ip}]:2222 {}", host.join(" ")),
                elsewhere: "10.77.0.250".to_owned(),
                authority: file("ca.pem").await,
                keys: [file("good").await, file("other").await],
                ip,
            }
        })
        .await
}

fn with_secret(name: &str, url: &str) -> Value {
    let mut manifest = worker(name, url);
    manifest["spec"]["source"]["git"]["secretRef"] = json!({"name": name});
    manifest
}

#[tokio::test]
async fn a_private_repository_is_read_by_ssh_and_each_thing_that_is_wrong_is_told() {
    let space = space("ssh").await;
    let PrivateServers {
        ip,
        known_hosts,
        keys: [good, other],
        ..
    } = private_servers(&space).await;
    let first = push(&space, "shop", "one");
    let name = publish_as(&space, "private", &first).await;
    let url = format!("ssh://private@{ip}:2222/srv/git/{name}");
    let kind = "kubernetes.io/ssh-auth";
    let secret = async |key: &str, hosts: &str| {
        let data = [("ssh-privatekey", key), ("known_hosts", hosts)];
        space.secret("shop", kind, &data).await;
        space.request_look("shop").await;
    };

    space.apply(&with_secret("shop", &url)).await;
    let says = async |why: &str| says(&space, "shop", "Stalled", why, LIMIT).await;
    let message = says("ReferenceNotFound").await;
    assert!(message.contains("there is no Secret shop"), "{message}");
    space
        .secret("shop", kind, &[("ssh-privatekey", good)])
        .await;
    space.request_look("shop").await;
    until("the missing key is named", LIMIT, || async {
        let message = says("ReferenceNotFound").await;
        message
            .contains("no key known_hosts")
            .then_some(())
            .ok_or(message)
    })
    .await;
    secret(other, known_hosts).await;
    let message = says("AuthenticationFailed").await;
    assert!(message.contains("secretRef"), "{message}");
    let another = known_hosts.replace("AAAAI", "AAAAJ").replace("IN", "IM");
    secret(good, &another).await;
    let message = says("HostKeyMismatch").await;
    assert!(message.contains("known_hosts of the Secret"), "{message}");
    secret(good, known_hosts).await;
    let deployed = space.ready_at("shop", &first.commit).await;
    let revision = deployed.status.and_then(|s| s.revision);

    // The server takes another key now. Nothing is started anew for that.
    let authorize = "cp /srv/private/other.pub /srv/private/authorized";
    space.on(NODE, &["sh", "-c", authorize]).await;
    secret(other, known_hosts).await;
    let sealed = |release: &kari::api::Release| release.spec.sealed.clone();
    let rotated = space
        .release_until("shop", NODE, "sealed anew", LIMIT, |r| {
            r.metadata.generation > Some(1) && !sealed(r).is_empty()
        })
        .await;
    assert_eq!(Some(rotated.spec.revision), revision);
    let second = push(&space, "shop", "two");
    publish_as(&space, "private", &second).await;
    space.request_look("shop").await;
    space.ready_at("shop", &second.commit).await;

    // Without its Secret it goes on as it is.
    let secrets: kube::Api<k8s_openapi::api::core::v1::Secret> =
        kube::Api::namespaced(space.client.clone(), &space.namespace);
    secrets
        .delete("shop", &Default::default())
        .await
        .expect("deleted");
    space.request_look("shop").await;
    says("ReferenceNotFound").await;
    assert_eq!(served(&space, "shop").await.as_ref(), Some(&second.commit));
    planted_nowhere(&space, &good[110..160]).await;
    planted_nowhere(&space, &other[110..160]).await;
}

#[tokio::test]
async fn a_private_repository_is_read_by_https_and_a_credential_goes_to_no_other_host() {
    let space = space("https").await;
    let PrivateServers {
        ip,
        elsewhere,
        authority,
        ..
    } = private_servers(&space).await;
    let first = push(&space, "shop", "one");
    let file = first.url.rsplit('/').next().expect("a name").to_owned();
    let basic = [
        ("username", "user"),
        ("password", PASSWORD),
        ("caFile", authority),
    ];
    let bearer = [("bearerToken", TOKEN), ("caFile", authority.as_str())];
    let wrong = [
        ("username", "user"),
        ("password", "wrong"),
        ("caFile", authority),
    ];
    let unknown = [("username", "user"), ("password", PASSWORD)];
    let authority_alone = [("caFile", authority.as_str())];
    let cases = [
        ("basic", "basic", &basic[..]),
        ("bearer", "bearer", &bearer),
        ("authority", "open", &authority_alone),
        ("wrong", "basic", &wrong),
        ("unknown", "basic", &unknown),
        ("away", "away", &basic),
        ("token-away", "away", &bearer),
        ("echo", "echo", &basic),
    ];
    for (name, place, data) in cases {
        space.secret(name, "Opaque", data).await;
        let url = format!("https://{ip}:8444/{place}/{file}");
        space.apply(&with_secret(name, &url)).await;
    }
    for name in ["basic", "bearer", "authority"] {
        space.ready_at(name, &first.commit).await;
    }
    for (name, kind, why, with) in [
        ("wrong", "Stalled", "AuthenticationFailed", "secretRef"),
        ("unknown", "Ready", "SourceUnavailable", "certificate"),
        (
            "away",
            "Stalled",
            "AuthenticationFailed",
            elsewhere.as_str(),
        ),
        (
            "token-away",
            "Ready",
            "SourceUnavailable",
            "leads elsewhere",
        ),
    ] {
        let message = says(&space, name, kind, why, LIMIT).await;
        assert!(message.contains(with), "{name}: {message}");
    }
    let failure = |r: &kari::api::Release| {
        let attempt = r.status.as_ref().and_then(|s| s.attempt.as_ref());
        let failure = attempt.and_then(|attempt| attempt.failure.as_ref());
        failure.map(|f| (f.reason.clone(), f.message.clone()))
    };
    let release = space
        .release_until("echo", NODE, "refused", DEPLOY_LIMIT, |r| {
            failure(r).is_some()
        })
        .await;
    let (why, message) = failure(&release).expect("a failure");
    assert_eq!(why, "AuthenticationFailed", "{message}");
    // Each fetch begins a log of its own, and this one is tried again and again.
    let script = "grep -rh 'refused: Basic' /var/lib/kari/mirrors/*.log || true";
    until("the log of the fetch is masked", LIMIT, || async {
        let log = space.on(NODE, &["sh", "-c", script]).await;
        match log.trim() {
            "remote: refused: Basic ***" => Ok(()),
            other => Err(other.to_owned()),
        }
    })
    .await;
    // Where it was led to it was asked for a credential, and none was sent.
    let sent = space.on(NODE, &["cat", "/srv/private/sent"]).await;
    assert!(sent.contains(elsewhere.as_str()), "{sent}");
    assert!(sent.lines().all(|line| line.ends_with(" -")), "{sent}");

    // A submodule elsewhere gets none either, and is not fetched.
    let library = push(&space, "lib", "from the library");
    let file_of_library = library.url.rsplit('/').next().expect("a name");
    let at = format!("https://{elsewhere}:8444/{file_of_library}");
    link(&space, "shop", &at, &library.commit);
    let url = format!("https://{ip}:8444/basic/{file}");
    let mut manifest = with_secret("basic", &url);
    manifest["spec"]["source"]["git"]["submodules"] = json!(true);
    space.apply(&manifest).await;
    space.request_look("basic").await;
    let release = space
        .release_until("basic", NODE, "refused", DEPLOY_LIMIT, |r| {
            failure(r).is_some()
        })
        .await;
    let (why, message) = failure(&release).expect("a failure");
    assert!(message.contains(elsewhere.as_str()), "{why}: {message}");
    let sent = space.on(NODE, &["cat", "/srv/private/sent"]).await;
    assert!(sent.lines().all(|line| line.ends_with(" -")), "{sent}");

    // As a header has it: a server may say what it was sent.
    let header = BASE64.encode(format!("user:{PASSWORD}"));
    for secret in [PASSWORD, TOKEN, &header] {
        planted_nowhere(&space, secret).await;
    }
}

/// Asserts that a secret is in no log of Kari's, no object that others may read, and no file of the node but those
/// that the test itself made.
async fn planted_nowhere(space: &Space, secret: &str) {
    let testbed = space.testbed;
    let node = testbed.node(NODE).expect("a node").name();
    for part in [Part::Controller, Part::Agent(node)] {
        let log = testbed.logs(part).expect("a log");
        assert!(!log.contains(secret), "in the log of {part:?}");
    }
    let kinds = "deployments.kari.dev,releases.kari.dev,controllerrevisions,events";
    let objects = testbed.kubectl(["get", kinds, "-A", "-o", "yaml"]).await;
    let objects = objects.expect("objects");
    assert!(objects.contains("kind: Release"), "{objects}");
    assert!(!objects.contains(secret), "in an object");
    let search = r#"
{ grep -rlF --exclude-dir=git -e "$1" /var/lib/kari /run/kari /run/systemd /etc/systemd /etc/userdb /var/log || :
journalctl --no-pager -o cat | grep -F -e "$1" || :
cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\0' '\n' | grep -vxF -e "$1" | grep -F -e "$1" || :
} 2>/dev/null"#;
    let found = space
        .on(NODE, &["sh", "-c", search, "search", secret])
        .await;
    assert_eq!(found.trim(), "", "on the node");
}

const START_SERVERS: &str = r#"
mkdir -p /srv/git /srv/tls /srv/ssh /run/sshd
cd /srv/tls
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj '/CN=an authority' -keyout ca.key -out ca.pem 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj '/CN=git' -keyout key.pem -out request.pem 2>/dev/null
printf 'subjectAltName=IP:%s\n' "$1" >extensions
openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out certificate.pem 2>/dev/null
cat >nginx.conf <<END
error_log stderr; pid /srv/tls/pid; daemon off;
events {}
http {
    access_log off;
    server {
        listen 8443 ssl;
        ssl_certificate certificate.pem;
        ssl_certificate_key key.pem;
        location / { proxy_pass http://$2; }
        location /slow/ { limit_rate 100k; proxy_pass http://$2/; }
    }
}
END
systemd-run --quiet --unit=tls nginx -p /srv/tls -c nginx.conf
systemd-run --quiet --unit=git-daemon git -c 'safe.directory=*' daemon --reuseaddr --base-path=/srv/git --export-all /srv/git

useradd --create-home --shell "$(command -v git-shell)" public
passwd --quiet --delete public
ssh-keygen -q -t ed25519 -N '' -f /srv/ssh/key
cat >/srv/ssh/config <<END
HostKey /srv/ssh/key
AllowUsers public
PermitEmptyPasswords yes
PasswordAuthentication yes
UsePAM no
PidFile none
END
systemd-run --quiet --unit=sshd "$(command -v sshd)" -D -e -f /srv/ssh/config

# It takes connections and says nothing.
systemd-run --quiet --unit=silent python3 -c 'import socket, time; s = socket.create_server(("0.0.0.0", 9999)); time.sleep(1000)'
for port in 8443 9418 22 9999; do
    until (: </dev/tcp/127.0.0.1/$port) 2>/dev/null; do sleep 0.05; done
done
cat /srv/tls/ca.pem
printf '%s %s\n' "$1" "$(cut -d' ' -f1,2 /srv/ssh/key.pub)"
"#;

async fn servers(space: &Space) -> &'static Servers {
    SERVERS
        .get_or_init(|| async {
            let ip = space.testbed.node(NODE).expect("a node").ip().to_string();
            let git = space.testbed.description().addresses.git.to_string();
            let script = ["bash", "-euc", START_SERVERS, "servers", &ip, &git];
            let text = space.on(NODE, &script).await;
            let (authority, host_key) = text.trim().rsplit_once('\n').expect("two things");
            Servers {
                authority: authority.to_owned(),
                host_key: host_key.to_owned(),
                ip,
            }
        })
        .await
}

/// Copies a repository to where `git daemon` and sshd have theirs, as the property of a user.
async fn publish_as(space: &Space, user: &str, repository: &Repository) -> String {
    let script = r#"
name=${1##*/}
if [ -d "/srv/git/$name" ]; then git -c 'safe.directory=*' -C "/srv/git/$name" fetch --quiet
else git clone --quiet --mirror "$1" "/srv/git/$name"; fi
chown -R "$2" "/srv/git/$name"
echo "$name""#;
    let words = ["sh", "-euc", script, "publish", &repository.url, user];
    space.on(NODE, &words).await
}

async fn publish(space: &Space, repository: &Repository) -> String {
    publish_as(space, "public", repository).await
}

#[tokio::test]
async fn every_kind_of_server_is_read_by_the_controller_and_by_the_node() {
    let space = space("kinds").await;
    let servers = servers(&space).await;
    let ip = &servers.ip;
    let files = folder(&[("message", "one")]);
    // Some seconds of the slow server.
    let noise: Vec<u8> = std::iter::repeat_with(uuid::Uuid::new_v4)
        .flat_map(uuid::Uuid::into_bytes)
        .take(300_000)
        .collect();
    std::fs::write(files.path().join("noise"), &noise).expect("a file");
    let first = space.push("shop", files.path());
    let name = publish(&space, &first).await;
    let urls = [
        ("https", format!("https://{ip}:8443/{name}")),
        ("slow", format!("https://{ip}:8443/slow/{name}")),
        ("git", format!("git://{ip}/{name}")),
        ("ssh", format!("ssh://public@{ip}/srv/git/{name}")),
        ("scp", format!("public@{ip}:/srv/git/{name}")),
    ];
    for (kind, url) in &urls {
        space.apply(&worker(kind, url)).await;
    }
    // Whom nobody vouches for is not believed, and what to do is said.
    let unknown = says(&space, "ssh", "Stalled", "HostKeyMismatch", LIMIT).await;
    assert!(unknown.contains("/etc/ssh/ssh_known_hosts"), "{unknown}");
    let unknown = says(&space, "https", "Ready", "SourceUnavailable", LIMIT).await;
    assert!(unknown.contains("certificate"), "{unknown}");
    space.ready_at("git", &first.commit).await;

    let testbed = space.testbed;
    testbed
        .trust_authority(&servers.authority)
        .await
        .expect("an authority");
    testbed
        .trust_host_key(&servers.host_key)
        .await
        .expect("a host key");
    join_all(urls.iter().map(|(kind, _)| space.request_look(kind))).await;
    for (kind, _) in &urls {
        space.ready_at(kind, &first.commit).await;
    }
    // And what is pushed later.
    support::write(files.path(), &[("message", "two")]);
    let second = space.push("shop", files.path());
    publish(&space, &second).await;
    join_all(urls.iter().map(|(kind, _)| space.request_look(kind))).await;
    for (kind, _) in &urls {
        space.ready_at(kind, &second.commit).await;
    }

    // What is secure does not lead to what is not.
    let library = push(&space, "lib", "from the library");
    link(&space, "shop", &library.url, &library.commit);
    let mut manifest = worker("secure", &urls[0].1);
    manifest["spec"]["source"]["git"]["submodules"] = json!(true);
    space.apply(&manifest).await;
    space.request_look("secure").await;
    let message = says(&space, "secure", "Stalled", "InvalidSpec", LIMIT).await;
    assert!(
        message.contains("insecure") && message.contains(&library.url),
        "{message}"
    );
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up_and_holds_up_nobody() {
    let space = space("silent").await;
    let ip = &servers(&space).await.ip;
    for (name, url) in [
        ("git", format!("git://{ip}:9999/r.git")),
        ("http", format!("http://{ip}:9999/r.git")),
        ("ssh", format!("ssh://public@{ip}:9999/r.git")),
    ] {
        space.apply(&worker(name, &url)).await;
    }
    let repository = push(&space, "shop", "one");
    space.apply(&worker("shop", &repository.url)).await;
    space.ready_at("shop", &repository.commit).await;
    for name in ["git", "http", "ssh"] {
        let message = says(&space, name, "Ready", "SourceUnavailable", SILENCE_LIMIT).await;
        println!("  {message}");
    }
}

#[tokio::test]
async fn a_branch_that_goes_away_changes_no_node_and_its_return_is_followed() {
    let space = space("branch").await;
    let first = push(&space, "shop", "one");
    space.apply(&worker("shop", &first.url)).await;
    space.ready_at("shop", &first.commit).await;

    // Renamed: to the Deployment it is gone.
    git(&space, "shop", &["branch", "-m", "main", "trunk"]);
    space.request_look("shop").await;
    let message = says(&space, "shop", "Stalled", "RefNotFound", LIMIT).await;
    assert!(message.contains("refs/heads/main"), "{message}");
    assert_eq!(served(&space, "shop").await.as_ref(), Some(&first.commit));

    // A later branch of this name, with another history.
    let tree = git(&space, "shop", &["rev-parse", "trunk^{tree}"]);
    let other = git(&space, "shop", &["commit-tree", "-m", "other", &tree]);
    git(&space, "shop", &["update-ref", "refs/heads/main", &other]);
    space.request_look("shop").await;
    space.ready_at("shop", &other).await;
    // Pushed by force, back to what was.
    git(
        &space,
        "shop",
        &["update-ref", "refs/heads/main", &first.commit],
    );
    space.request_look("shop").await;
    space.ready_at("shop", &first.commit).await;
}

#[tokio::test]
async fn a_rewind_is_refused_where_the_spec_says_so_and_the_running_release_stays() {
    let space = space("rewind").await;
    let first = push(&space, "shop", "one");
    let mut manifest = worker("shop", &first.url);
    manifest["spec"]["source"]["git"]["allowRewind"] = json!(false);
    space.apply(&manifest).await;
    space.ready_at("shop", &first.commit).await;
    let second = push(&space, "shop", "two");
    space.request_look("shop").await;
    space.ready_at("shop", &second.commit).await;

    // Back to a commit whose tree the node still has.
    git(
        &space,
        "shop",
        &["update-ref", "refs/heads/main", &first.commit],
    );
    space.request_look("shop").await;
    let message = says(&space, "shop", "Stalled", "RewindRefused", LIMIT).await;
    assert!(
        message.contains(&first.commit[..7]) && message.contains("allowRewind"),
        "{message}"
    );
    let failure = space
        .release_until("shop", NODE, "refused", LIMIT, |r| {
            let attempt = r.status.as_ref().and_then(|s| s.attempt.as_ref());
            attempt.is_some_and(|attempt| attempt.failure.is_some())
        })
        .await;
    let failure = failure
        .status
        .and_then(|s| s.attempt)
        .and_then(|a| a.failure);
    let failure = failure.expect("a failure");
    assert_eq!(failure.class, "Invalid");
    assert_eq!(served(&space, "shop").await.as_ref(), Some(&second.commit));

    // A commit that descends heals it by itself.
    let tree = git(&space, "shop", &["rev-parse", "HEAD^{tree}"]);
    let parent = ["commit-tree", "-p", &second.commit, "-m", "three", &tree];
    let third = git(&space, "shop", &parent);
    git(&space, "shop", &["update-ref", "refs/heads/main", &third]);
    space.request_look("shop").await;
    space.ready_at("shop", &third).await;
    // And so does a spec that allows it, in place.
    git(
        &space,
        "shop",
        &["update-ref", "refs/heads/main", &first.commit],
    );
    space.request_look("shop").await;
    says(&space, "shop", "Stalled", "RewindRefused", LIMIT).await;
    manifest["spec"]["source"]["git"]["allowRewind"] = json!(true);
    space.apply(&manifest).await;
    space.ready_at("shop", &first.commit).await;
}

/// A commit on `main` with a submodule at `lib`.
fn link(space: &Space, name: &str, url: &str, commit: &str) -> String {
    let files = folder(&[(
        "modules",
        &format!("[submodule \"lib\"]\n\tpath = lib\n\turl = {url}\n"),
    )]);
    let modules = files.path().join("modules");
    let blob = git(
        space,
        name,
        &["hash-object", "-w", &modules.to_string_lossy()],
    );
    let index = files.path().join("index");
    let repository = space
        .testbed
        .directory()
        .join(format!("git/{}-{name}.git", space.namespace));
    let run = |arguments: &[&str]| {
        let output = Command::new("git")
            .env("GIT_DIR", &repository)
            .env("GIT_INDEX_FILE", &index)
            .args(arguments)
            .output()
            .expect("git");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    run(&["read-tree", "main"]);
    for entry in [
        format!("100644,{blob},.gitmodules"),
        format!("160000,{commit},lib"),
    ] {
        run(&["update-index", "--add", "--cacheinfo", &entry]);
    }
    let tree = run(&["write-tree"]);
    let parent = git(space, name, &["rev-parse", "main"]);
    let made = git(
        space,
        name,
        &["commit-tree", "-p", &parent, "-m", "link", &tree],
    );
    git(space, name, &["update-ref", "refs/heads/main", &made]);
    made
}

#[tokio::test]
async fn submodules_are_built_with_and_what_they_may_not_be_stalls_the_deployment() {
    let space = space("modules").await;
    let lib = push(&space, "lib", "from the library");
    let shop = push(&space, "shop", "one");
    let relative = format!("../{}-lib.git", space.namespace);
    let linked = link(&space, "shop", &relative, &lib.commit);
    let mut manifest = worker("shop", &shop.url);
    manifest["spec"]["source"]["git"]["submodules"] = json!(true);
    // The build has no network, and what it is for.
    manifest["spec"]["build"] = json!({"run": "grep library lib/message", "network": false});
    space.apply(&manifest).await;
    space.ready_at("shop", &linked).await;

    let astray = link(&space, "shop", "file:///etc", &lib.commit);
    space.request_look("shop").await;
    let message = says(&space, "shop", "Stalled", "InvalidSpec", LIMIT).await;
    assert!(
        message.contains("lib") && message.contains("file:///etc"),
        "{message}"
    );
    assert_eq!(served(&space, "shop").await.as_ref(), Some(&linked));
    // Without them it is a commit like any other, and a revision of its own.
    manifest["spec"]["source"]["git"]["submodules"] = json!(false);
    manifest["spec"]["build"] = json!({"run": "! test -e lib/message", "network": false});
    space.apply(&manifest).await;
    space.ready_at("shop", &astray).await;
}

/// Requests that begin a conversation with the testbed's server about a repository.
fn conversations(space: &Space, repository: &Repository) -> usize {
    let name = repository.url.rsplit('/').next().expect("a name");
    let asked = format!("GET /{name}/info/refs");
    let log = space.testbed.logs(Part::Git).expect("the server's log");
    log.lines().filter(|line| line.starts_with(&asked)).count()
}

#[tokio::test]
async fn a_push_that_fifty_deployments_wait_for_is_looked_up_once_and_fetched_once() {
    const COUNT: usize = 50;
    let space = space("fifty").await;
    let first = push(&space, "shop", "one");
    let names: Vec<String> = (0..COUNT).map(|n| format!("app{n}")).collect();
    let manifests: Vec<_> = names.iter().map(|name| worker(name, &first.url)).collect();
    join_all(manifests.iter().map(|manifest| space.apply(manifest))).await;
    all_at(&space, COUNT, &first.commit).await;
    let key = MirrorKey::of(&SourceUrl::parse(&first.url).expect("a url"), None);
    let unit = fetch_unit_name(key.as_str());
    let fetches = || async {
        let words = ["journalctl", "--output=cat", "--unit", &unit];
        let journal = space.on(NODE, &words).await;
        journal
            .lines()
            .filter(|l| l.starts_with("Starting"))
            .count()
    };
    let (asked, fetched) = (conversations(&space, &first), fetches().await);

    let begun = std::time::Instant::now();
    let second = push(&space, "shop", "two");
    space.request_look("app7").await;
    all_at(&space, COUNT, &second.commit).await;
    println!(
        "  {COUNT} are at the second commit after {:?}",
        begun.elapsed()
    );
    // Units beyond the first find the commit there, and only hold it for apps that came later.
    println!("  {} units of the mirror", fetches().await - fetched);
    // The controller's look-up and the node's fetch.
    assert_eq!(
        conversations(&space, &first) - asked,
        2,
        "conversations for one push"
    );
}

/// Waits until every Deployment of the namespace is Ready at a commit.
async fn all_at(space: &Space, count: usize, commit: &str) {
    let limit = DEPLOY_LIMIT + DEPLOY_LIMIT;
    until(&format!("{count} are at {commit}"), limit, || async {
        let list = space.deployments().list(&Default::default()).await;
        let there = list.map_err(|e| e.to_string())?.items;
        let there = there.iter().filter(|d| {
            let status = d.status.clone().unwrap_or_default();
            status.source.is_some_and(|s| s.commit == commit)
                && is(&status.conditions, "Ready", "True")
                && is(&status.conditions, "Reconciling", "False")
        });
        match there.count() {
            all if all == count => Ok(()),
            some => Err(format!("{some} are")),
        }
    })
    .await;
}
