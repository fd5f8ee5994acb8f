//! What every behaviour test needs: one testbed per test binary, a namespace of
//! its own for each test, an app to deploy, and waiting with a deadline that
//! says what was seen.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "each test binary uses a part of this, and a test ends where something is not as it must be"
)]

pub mod app;
pub mod gitops;
pub mod snapshot;
pub mod tls;
pub mod traffic;

use std::fmt::Debug;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kari::api::names::{NodeName, release_name};
use kari::api::{Deployment, Release};
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::Value;
use testbed::{Options, Repository, Testbed};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;

/// How long a deployment may take, build included; it takes seconds on an idle machine.
pub const DEPLOY_LIMIT: Duration = Duration::from_secs(120);
/// How long anything may take that needs no build.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at a thing that is waited for: most are commands on a node.
const LOOK: Duration = Duration::from_millis(200);

/// Lines of the controller's log that a test which failed shows.
const LOG_LINES: usize = 20;

static TESTBED: OnceCell<Testbed> = OnceCell::const_new();

/// The binary's testbed with `nodes` nodes and all of Kari; every call of one binary asks for as many.
pub async fn testbed(nodes: u8) -> &'static Testbed {
    testbed_of(Options {
        nodes,
        ..Options::default()
    })
    .await
}

/// The binary's testbed with a control plane and its definitions, without Kari.
pub async fn control_plane() -> &'static Testbed {
    testbed_of(Options {
        kari: false,
        ..Options::default()
    })
    .await
}

/// Where this variable is set, nodes have a kubelet and Kari's parts are Pods.
const KUBELET: &str = "KARI_TESTBED_KUBELET";

/// Whether Kari's parts are Pods, with a view of their own of the node's processes.
pub fn kari_is_in_pods() -> bool {
    std::env::var_os(KUBELET).is_some()
}

/// The binary's testbed as `options` say; every call of one binary asks for the same.
pub async fn testbed_of(mut options: Options) -> &'static Testbed {
    options.kubelet |= options.kari && kari_is_in_pods();
    TESTBED
        .get_or_init(|| async { Testbed::up(options).await.unwrap_or_else(|e| panic!("{e}")) })
        .await
}

/// A namespace of the test's own, and what it is asked through.
pub struct Space {
    /// The binary's testbed.
    pub testbed: &'static Testbed,
    /// The administrator's client.
    pub client: Client,
    /// The namespace's name.
    pub namespace: String,
}

impl Space {
    /// A new namespace; its name has `topic` in it, so that a failing test's objects are found.
    pub async fn new(testbed: &'static Testbed, topic: &str) -> Self {
        Self::labelled(testbed, topic, &[]).await
    }

    /// As [`Space::new`], with labels of the namespace, as an administrator sets them.
    pub async fn labelled(testbed: &'static Testbed, topic: &str, labels: &[(&str, &str)]) -> Self {
        let client = testbed.client().await.expect("a client of the API server");
        let name = format!(
            "{topic}-{}",
            &uuid::Uuid::new_v4().simple().to_string()[..6]
        );
        let namespace = Namespace {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(
                    labels
                        .iter()
                        .map(|&(key, value)| (key.to_owned(), value.to_owned()))
                        .collect(),
                ),
                ..ObjectMeta::default()
            },
            ..Namespace::default()
        };
        let namespaces: Api<Namespace> = Api::all(client.clone());
        namespaces
            .create(&PostParams::default(), &namespace)
            .await
            .expect("a namespace");
        Self {
            testbed,
            client,
            namespace: name,
        }
    }

    /// The namespace's Deployments.
    pub fn deployments(&self) -> Api<Deployment> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The namespace's Releases.
    pub fn releases(&self) -> Api<Release> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Commits the folder's files to `main` of a repository of this namespace.
    pub fn push(&self, name: &str, folder: &Path) -> Repository {
        let name = format!("{}-{name}", self.namespace);
        self.testbed
            .git_repository(&name, folder, "a change")
            .unwrap_or_else(|e| panic!("{e}"))
    }

    /// Tags the head of `main` of a repository of this namespace.
    pub fn tag(&self, name: &str, tag: &str) {
        let name = format!("{}-{name}", self.namespace);
        self.testbed
            .git_tag(&name, tag)
            .unwrap_or_else(|e| panic!("{e}"));
    }

    /// Applies a manifest as a user of kubectl does.
    pub async fn apply(&self, manifest: &Value) -> Deployment {
        let name = manifest["metadata"]["name"].as_str().expect("a name");
        let parameters = PatchParams::apply("test").force();
        self.deployments()
            .patch(name, &parameters, &Patch::Apply(manifest))
            .await
            .unwrap_or_else(|e| panic!("apply {name}: {e}"))
    }

    /// Makes a Secret, or gives it other data.
    pub async fn secret(&self, name: &str, kind: &str, data: &[(&str, &str)]) {
        let data: serde_json::Map<String, Value> = data
            .iter()
            .map(|(key, value)| ((*key).to_owned(), Value::from(*value)))
            .collect();
        let secret = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name},
            "type": kind,
            "stringData": data,
        });
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let parameters = PatchParams::apply("test").force();
        secrets
            .patch(name, &parameters, &Patch::Apply(&secret))
            .await
            .unwrap_or_else(|e| panic!("apply the Secret {name}: {e}"));
    }

    /// Asks the controller to look at the source now.
    pub async fn request_look(&self, name: &str) {
        self.annotate(name, "kari.dev/requestedAt").await;
    }

    /// Sets an annotation to a value that it never had.
    pub async fn annotate(&self, name: &str, annotation: &str) {
        let value = uuid::Uuid::new_v4().to_string();
        let patch = serde_json::json!({"metadata": {"annotations": {annotation: value}}});
        self.deployments()
            .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .unwrap_or_else(|e| panic!("annotate {name}: {e}"));
    }

    /// Waits until the Deployment is Ready at `commit`.
    pub async fn ready_at(&self, name: &str, commit: &str) -> Deployment {
        self.deployment_until(name, &format!("Ready at {commit}"), DEPLOY_LIMIT, |d| {
            let status = d.status.clone().unwrap_or_default();
            let served = status.source.is_some_and(|s| s.commit == commit);
            served
                && is(&status.conditions, "Ready", "True")
                && is(&status.conditions, "Reconciling", "False")
                && Some(status.observed_generation) == d.metadata.generation
        })
        .await
    }

    /// Waits until the Deployment is as `wanted` says.
    pub async fn deployment_until(
        &self,
        name: &str,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Deployment) -> bool,
    ) -> Deployment {
        let api = self.deployments();
        match seen(&api, name, limit, wanted).await {
            Ok(deployment) => deployment,
            Err(last) => panic!(
                "not within {limit:?}: {name} is {what}; seen last:\n{}\n{}\n{}",
                last.map(|d| text_of(&d.status)).unwrap_or_default(),
                api_releases(&self.releases()).await,
                self.controller_log(),
            ),
        }
    }

    /// What the controller said of this namespace last.
    fn controller_log(&self) -> String {
        let log = self
            .testbed
            .logs(testbed::Part::Controller)
            .unwrap_or_else(|e| e.to_string());
        let log: Vec<_> = log
            .lines()
            .filter(|line| line.contains(&self.namespace))
            .collect();
        log[log.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// Waits until the Release of a Deployment on a node is as `wanted` says.
    pub async fn release_until(
        &self,
        name: &str,
        node: &str,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Release) -> bool,
    ) -> Release {
        let release = release_name(name, &NodeName::new(node));
        match seen(&self.releases(), &release, limit, wanted).await {
            Ok(release) => release,
            Err(last) => panic!(
                "not within {limit:?}: {release} is {what}; seen last:\n{}",
                last.map(|r| text_of(&r.status)).unwrap_or_default()
            ),
        }
    }

    /// GETs `/` of a host from a node's proxy, as a client on the network does.
    pub async fn get(&self, node: &str, host: &str) -> Result<(u16, String), String> {
        let lab = Lab(self.testbed);
        traffic::get_once(&lab, self.proxy(node), host, "/").await
    }

    /// What `kari agent` with these words prints where a node's agent runs.
    pub async fn agent(&self, node: &str, words: &[&str]) -> Result<String, testbed::Error> {
        if !kari_is_in_pods() {
            let node = self.testbed.node(node)?;
            let words = [&["/opt/kari/kari", "agent"], words].concat();
            return node.output(words).await;
        }
        let on_node = format!("--field-selector=spec.nodeName={node}");
        let agents = "--selector=app.kubernetes.io/component=agent";
        let system = "--namespace=kari-system";
        let get = ["get", "pods", system, agents, &on_node, "--output=name"];
        let pod = self.testbed.kubectl(get).await?;
        let exec = ["exec", system, &pod, "--", "kari", "agent"];
        self.testbed.kubectl([&exec[..], words].concat()).await
    }

    /// The address of a node's proxy.
    pub fn proxy(&self, node: &str) -> SocketAddr {
        let node = self.testbed.node(node).unwrap_or_else(|e| panic!("{e}"));
        self.testbed.description().node_http(node.name()).into()
    }

    /// The address of a node's proxy for TLS.
    pub fn tls_proxy(&self, node: &str) -> SocketAddr {
        let port = self.testbed.description().addresses.https_port;
        SocketAddr::new(self.proxy(node).ip(), port)
    }

    /// What a command prints in a node; the test fails if it does.
    pub async fn on(&self, node: &str, words: &[&str]) -> String {
        let node = self.testbed.node(node).unwrap_or_else(|e| panic!("{e}"));
        node.output(words)
            .await
            .unwrap_or_else(|e| panic!("{words:?}: {e}"))
    }
}

/// Watches an object until it is as `wanted` says, and gives what it is when the time is over if it never was.
async fn seen<K>(
    api: &Api<K>,
    name: &str,
    limit: Duration,
    wanted: impl Fn(&K) -> bool,
) -> Result<K, Option<K>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    // Its errors are over when the API server answers again.
    let mut stream = pin!(watch_object(api.clone(), name).default_backoff());
    let watched = tokio::time::timeout(limit, async {
        loop {
            if let Some(Ok(Some(object))) = stream.next().await
                && wanted(&object)
            {
                return object;
            }
        }
    });
    match watched.await {
        Ok(object) => Ok(object),
        Err(_) => match api.get(name).await {
            Ok(object) if wanted(&object) => Ok(object),
            last => Err(last.ok()),
        },
    }
}

async fn api_releases(api: &Api<Release>) -> String {
    match api.list(&Default::default()).await {
        Err(error) => error.to_string(),
        Ok(list) => list
            .iter()
            .map(|r| {
                format!(
                    "{}: {}\n",
                    r.metadata.name.clone().unwrap_or_default(),
                    text_of(&r.status)
                )
            })
            .collect(),
    }
}

/// JSON, for people who read why a test failed.
pub fn text_of(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

/// Whether a condition has a status.
pub fn is(conditions: &[Condition], kind: &str, status: &str) -> bool {
    conditions
        .iter()
        .any(|c| c.type_ == kind && c.status == status)
}

/// The reason of a condition; empty if there is none.
pub fn reason(conditions: &[Condition], kind: &str) -> String {
    conditions
        .iter()
        .find(|c| c.type_ == kind)
        .map(|c| c.reason.clone())
        .unwrap_or_default()
}

/// Looks again and again until `look` is content, and fails with what it saw last when the time is over.
pub async fn until<T, F: Future<Output = Result<T, impl Debug>>>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> F,
) -> T {
    let deadline = tokio::time::Instant::now() + limit;
    let mut ticks = tokio::time::interval(LOOK);
    loop {
        ticks.tick().await;
        match look().await {
            Ok(value) => return value,
            Err(seen) if tokio::time::Instant::now() > deadline => panic!(
                "not within {limit:?}: {what}; seen last:\n{}",
                format!("{seen:?}")
                    .replace("\\n", "\n")
                    .replace("\\\"", "\"")
            ),
            Err(_) => {}
        }
    }
}

/// Connections from within the testbed's network.
#[derive(Clone)]
pub struct Lab(pub &'static Testbed);

impl traffic::Connect for Lab {
    type Stream = TcpStream;

    async fn connect(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        let SocketAddr::V4(to) = to else {
            return Err(std::io::Error::other("the lab has no IPv6"));
        };
        let stream = self.0.lab_connect(to).await;
        let stream = stream.map_err(std::io::Error::other)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// A folder of the test's own, gone with it.
pub fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    write(folder.path(), files);
    folder
}

/// Writes files into a folder.
pub fn write(folder: &Path, files: &[(&str, &str)]) {
    for (name, content) in files {
        let path: PathBuf = folder.join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(&path, content).expect("a file");
    }
}
