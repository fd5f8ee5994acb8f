//! `Release`: one Deployment on one node.
//!
//! The controller writes the spec, the agent of `spec.nodeName` the status but
//! for the condition `Reachable`. Because a Release *is* app × node, kube's rule
//! of one reconcile per object is the lock of an app.

#![allow(
    clippy::duplicated_attributes,
    reason = "kube's printcolumn attributes name the same keys once for each column"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::deployment::{Build, DeletionPolicy, EnvVar, Process, Switch};
use super::names::{ReleaseId, hex_digest};

/// One Deployment on one node: what the controller wants there and what the node says of it.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "kari.dev",
    version = "v1alpha1",
    kind = "Release",
    plural = "releases",
    shortname = "krel",
    category = "kari",
    namespaced,
    status = "ReleaseStatus",
    selectable = ".spec.nodeName",
    doc = "One Deployment on one node. Written by Kari's controller and, its status, by the node's agent; not by people.",
    printcolumn(name = "Deployment", type_ = "string", json_path = ".spec.deployment"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Serving",
        type_ = "string",
        json_path = ".status.serving.revision"
    ),
    printcolumn(
        name = "Reachable",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Reachable\")].status"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    ),
    printcolumn(
        name = "Wanted",
        type_ = "string",
        json_path = ".spec.revision",
        priority = 1
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        priority = 1
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseSpec {
    /// The node, by the name of its Node object. Immutable.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = ("self == oldSelf", "nodeName is immutable"))]
    pub node_name: String,
    /// The Deployment, in the same namespace. Immutable.
    #[schemars(length(min = 1, max = 52))]
    #[x_kube(validation = ("self == oldSelf", "deployment is immutable"))]
    pub deployment: String,
    /// The identity of this decision: UUID v5 of (Deployment's uid, node, revision, attempt, handled `kari.dev/retry`).
    pub release_id: ReleaseId,
    /// One more whenever `releaseId` changes, so that two decisions never share an id.
    #[schemars(range(min = 0))]
    pub attempt: i64,
    /// The ControllerRevision that the node is to serve.
    #[schemars(length(min = 1, max = 253))]
    pub revision: String,
    /// The commit that it names.
    #[schemars(length(min = 40, max = 64))]
    pub commit: String,
    /// All that the node needs, with nothing left to look up.
    pub template: Template,
    /// Revisions that the node must be able to go back to without API and git server.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(max = 253)), extend("x-kubernetes-list-type" = "atomic"))]
    pub retain: Vec<String>,
    /// What is secret, sealed to the node's key. Compared by digest, never by data.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["purpose", "name"]))]
    #[x_kube(validation = ("self.map(s, has(s.data) ? s.data.size() : 0).sum() <= 1048576", "all sealed values together must have at most 1 MiB"))]
    pub sealed: Vec<SealedValue>,
    /// What the node does when this object is deleted. Written before a delete of which the node could
    /// not tell from the object what it is for; one by the garbage collector follows the Deployment.
    #[serde(default, skip_serializing_if = "OnDelete::is_default")]
    pub on_delete: OnDelete,
}

/// A secret value, sealed to one node's key for one revision of one Release (HPKE: X25519, HKDF-SHA256,
/// ChaCha20-Poly1305).
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.data) == has(self.keyId)", "data and keyId go together"))]
pub struct SealedValue {
    /// What it is for.
    pub purpose: Purpose,
    /// Which of those of its purpose.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// The key that it is sealed to: the first 16 hexadecimal digits of the SHA-256 of the node's public key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 16, max = 16), regex(pattern = r"^[0-9a-f]{16}$"))]
    pub key_id: Option<String>,
    /// A keyed digest of the value: another value has another one, and it tells nothing else.
    #[schemars(length(min = 40, max = 40), regex(pattern = r"^[0-9a-f]{40}$"))]
    pub digest: String,
    /// The encapsulated key and the ciphertext, in base64. Absent: the node uses the value of this digest
    /// that it has kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 720896))]
    pub data: Option<String>,
}

/// What a sealed value is for.
#[derive(
    Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, JsonSchema,
)]
pub enum Purpose {
    /// Variables of processes.
    Env,
    /// The credentials of a repository.
    Git,
    /// A certificate with its key.
    Tls,
}

impl Purpose {
    /// As the API spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Env => "Env",
            Self::Git => "Git",
            Self::Tls => "Tls",
        }
    }
}

impl SealedValue {
    /// A value that the node is to have kept.
    pub fn kept(purpose: Purpose, name: &str, digest: &str) -> Self {
        Self {
            purpose,
            name: name.to_owned(),
            key_id: None,
            digest: digest.to_owned(),
            data: None,
        }
    }

    /// Whether both stand for the same secret.
    pub fn is_same_value(&self, other: &Self) -> bool {
        (self.purpose, &self.name, &self.digest) == (other.purpose, &other.name, &other.digest)
    }
}

/// What a node does when its Release is deleted.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema)]
pub enum OnDelete {
    /// What `template.deletionPolicy` says: the Deployment is deleted.
    #[default]
    FollowPolicy,
    /// Take the app away and keep its state: the node leaves the placement, and may come back.
    KeepState,
    /// Leave the app as it is: the Node object is gone, and may come back.
    Orphan,
}

impl OnDelete {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A rendered Deployment: what a node runs, and how it changes over to it.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
pub struct Template {
    /// Where the commit is fetched from.
    pub source: TemplateSource,
    /// How the checkout becomes what runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<Build>,
    /// Variables of every process; a process's own win.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<EnvVar>,
    /// The variables whose values are secret: their names, and digests that stand for the values, which the
    /// Release has sealed. They win over plain ones of the same place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 17))]
    pub secret_env: Vec<SecretVariables>,
    /// The services.
    pub processes: Vec<Process>,
    /// How the node changes over.
    pub switch: Switch,
    /// Seconds of health under traffic before the commit.
    pub min_ready_seconds: u32,
    /// Old builds that are kept besides the one that runs.
    pub keep_releases: u32,
    /// What becomes of the app when its Deployment is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// Variables of every process or of one whose values are secret.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretVariables {
    /// The process that has them; absent for all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// Their names, sorted.
    pub names: Vec<String>,
    /// A keyed digest of names and values: equal values have equal ones.
    pub digest: String,
}

/// What the sealed value of all secret variables of a release is called.
pub const SEALED_ENV: &str = "env";

impl Template {
    /// The digest of the sealed value that holds all secret variables; nothing where there are none.
    pub fn sealed_env_digest(&self) -> Option<String> {
        if self.secret_env.is_empty() {
            return None;
        }
        let mut text = String::new();
        for SecretVariables {
            process,
            names: _,
            digest,
        } in &self.secret_env
        {
            text.push_str(process.as_deref().unwrap_or_default());
            text.push('=');
            text.push_str(digest);
            text.push('\n');
        }
        Some(hex_digest(text.as_bytes())[..SEALED_DIGEST_DIGITS].to_owned())
    }
}

/// Hexadecimal digits of the digest of a sealed value.
const SEALED_DIGEST_DIGITS: usize = 40;

/// Where a commit is fetched from and where in it the app is.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TemplateSource {
    /// The repository's url, as the Deployment has it.
    pub url: String,
    /// The full reference that the commit was found at: what a node fetches from a server that gives
    /// no commit by its id. Absent for a source that names the commit itself.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// The folder that is built and run from, relative to the root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// Whether submodules are checked out.
    #[serde(default)]
    pub submodules: bool,
    /// Whether the commit need not descend from the one that runs.
    #[serde(default = "super::deployment::default_allow_rewind")]
    pub allow_rewind: bool,
}

/// What the node's agent has seen and done.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseStatus {
    /// The generation that all of the status speaks of; a status that is behind is ignored.
    #[serde(default)]
    pub observed_generation: i64,
    /// Where the node is with it; for people.
    #[serde(default)]
    pub phase: Phase,
    /// `Ready` and `Drifted` by the agent, `Reachable` by the controller.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The release that is committed and measured: the only thing the controller believes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving: Option<Serving>,
    /// The release that is being tried, or how the last try ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<AttemptStatus>,
}

/// Where a node is with its release.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema)]
#[allow(
    missing_docs,
    reason = "each is the step of the pipeline that has its name"
)]
pub enum Phase {
    #[default]
    Pending,
    Queued,
    Fetching,
    Building,
    Starting,
    Switching,
    Baking,
    Draining,
    Running,
    Degraded,
    Failed,
    Removing,
    Removed,
    /// A phase that this version does not know; an agent of another version wrote it.
    #[serde(other)]
    Unknown,
}

/// A release that is committed and measured.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Serving {
    /// Its id.
    pub release_id: ReleaseId,
    /// Its revision.
    pub revision: String,
    /// Its commit.
    pub commit: String,
    /// Since when it has served without a break (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_since: Option<String>,
    /// Its services.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub processes: Vec<ServingProcess>,
}

/// One service of the release that is served.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServingProcess {
    /// The process's name in the Deployment.
    pub name: String,
    /// Its systemd unit on the node.
    pub unit: String,
    /// Its port on 127.0.0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// A release that is being tried, or how the last try ended.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttemptStatus {
    /// Its id.
    pub release_id: ReleaseId,
    /// The step it is at, or at which it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<Phase>,
    /// Its place among those that wait for a slot of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<QueuePosition>,
    /// Why it failed, or what holds it up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// A place in a queue of the node.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QueuePosition {
    /// From 1.
    pub position: u32,
    /// How many wait.
    pub of: u32,
}

/// Why an attempt failed or waits.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// What follows from it: `Revision`, `Environment`, `Node` or `Invalid`.
    pub class: String,
    /// One of the reasons of the class.
    pub reason: String,
    /// What happened, to what, and what to do.
    pub message: String,
    /// The last lines of the step's log; at most 4 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub log_tail: Option<String>,
}
