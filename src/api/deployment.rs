//! `Deployment`: what a user wants to run, and what the controller says of it.
//!
//! The user writes the spec, the controller the status. Doc comments of the
//! fields are what `kubectl explain kd` shows.

#![allow(
    clippy::duplicated_attributes,
    reason = "kube's printcolumn attributes name the same keys once for each column"
)]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::quantity::{Cpu, Memory};

/// A git repository that is built and run as systemd services on the nodes that match.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "kari.dev",
    version = "v1alpha1",
    kind = "Deployment",
    plural = "deployments",
    shortname = "kd",
    category = "kari",
    namespaced,
    status = "DeploymentStatus",
    doc = "A git repository that is built and run as systemd services on the nodes that match.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.nodes.summary", description = "nodes that serve the revision, of those that should"),
    printcolumn(name = "Up-to-date", type_ = "integer", json_path = ".status.nodes.updated", description = "nodes whose Release names the revision"),
    printcolumn(name = "Commit", type_ = "string", json_path = ".status.source.shortCommit"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Revision", type_ = "string", json_path = ".status.revision", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1),
    validation = kube::core::Rule::new("oldSelf.hasValue() || (self.metadata.name.size() <= 52 && !self.metadata.name.contains('.'))").message("metadata.name must be at most 52 characters without dots"),
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.build) || !has(self.build.cacheDirectories) || self.build.cacheDirectories.size() == 0 || !has(self.source.git) || !has(self.source.git.directory) || self.source.git.directory.matches('^[A-Za-z0-9._/-]+$')", "with build.cacheDirectories, source.git.directory must be of letters, digits and . _ - / alone"))]
pub struct DeploymentSpec {
    /// Which nodes run it.
    pub placement: Placement,
    /// Where the code comes from.
    pub source: Source,
    /// Variables of every process, not of the build. They win over `envFrom`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub env: Vec<EnvVar>,
    /// Objects whose every key becomes a variable of every process, not of the build. A key that a later
    /// object has too is the later one's. Keys that are no names of variables are passed over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub env_from: Vec<EnvFromSource>,
    /// How the checkout becomes what runs; without it the checkout is what runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<Build>,
    /// The services, committed together or not at all. At least one, at most 16.
    #[schemars(length(min = 1, max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    #[x_kube(validation = ("self.all(p, !has(p.route) || self.exists_one(q, has(q.route) && q.route.path == p.route.path && q.route.hosts.exists(h, h in p.route.hosts)))", "two processes route the same host with the same path"))]
    pub processes: Vec<Process>,
    /// How a new revision replaces the old one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Strategy>,
    /// Old builds that each node keeps besides the one that runs.
    #[serde(default = "default_keep_releases")]
    #[schemars(range(min = 0, max = 20))]
    pub keep_releases: u32,
    /// Revisions of the history that are kept as ControllerRevisions.
    #[serde(default = "default_revision_history_limit")]
    #[schemars(range(min = 1, max = 50))]
    pub revision_history_limit: u32,
    /// What becomes of the app on its nodes when this object is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
    /// Start nothing new and remove nothing: nodes finish what they were told and keep running.
    #[serde(default)]
    pub suspend: bool,
}

/// What becomes of an app on its nodes when its Deployment is deleted.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema)]
pub enum DeletionPolicy {
    /// It is stopped and taken away, its state too.
    #[default]
    Delete,
    /// It stays as it is and is kept running, and a Deployment of the same name takes it on without
    /// a restart.
    Orphan,
}

fn default_keep_releases() -> u32 {
    2
}
fn default_revision_history_limit() -> u32 {
    10
}

/// Which nodes run a Deployment: those whose labels satisfy both fields.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// Labels that a node must have. Required; write `{}` to mean every node.
    // Atomic, as in core/v1: merged by server-side apply, a change to `{}` becomes null.
    #[schemars(extend("maxProperties" = 32, "x-kubernetes-map-type" = "atomic"))]
    #[x_kube(validation = ("self.all(k, k.size() <= 317 && !k.contains(' '))", "nodeSelector has a key that is not a label key"))]
    pub node_selector: BTreeMap<String, LabelValue>,
    /// Further terms, all of which a node must satisfy, as in nodeAffinity.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub match_expressions: Vec<NodeSelectorTerm>,
}

/// The value of a label: at most 63 characters of letters, digits, `-`, `_` and `.`.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, JsonSchema)]
#[serde(transparent)]
pub struct LabelValue(
    #[schemars(
        length(max = 63),
        regex(pattern = r"^(([A-Za-z0-9][A-Za-z0-9_.-]*)?[A-Za-z0-9])?$")
    )]
    pub String,
);

/// One requirement on a node's labels, as in core/v1 NodeSelectorRequirement.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.operator in ['In','NotIn'] ? has(self.values) && self.values.size() > 0 : true", "In and NotIn need values"))]
#[x_kube(validation = ("self.operator in ['Exists','DoesNotExist'] ? !has(self.values) || self.values.size() == 0 : true", "Exists and DoesNotExist take no values"))]
#[x_kube(validation = ("self.operator in ['Gt','Lt'] ? has(self.values) && self.values.size() == 1 && self.values[0].matches('^[0-9]+$') : true", "Gt and Lt need exactly one value, a whole number"))]
pub struct NodeSelectorTerm {
    /// The label's key.
    #[schemars(length(min = 1, max = 317))]
    pub key: String,
    /// How the label's value is compared with `values`.
    pub operator: NodeSelectorOperator,
    /// What it is compared with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 63)), extend("x-kubernetes-list-type" = "atomic"))]
    pub values: Vec<String>,
}

/// How a label is compared, as in core/v1.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema)]
#[allow(
    missing_docs,
    reason = "the names are core/v1's and say what they mean"
)]
pub enum NodeSelectorOperator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    Gt,
    Lt,
}

/// Where the code comes from; a union, so that other kinds of source can follow.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.git)", "set exactly one kind of source: git"))]
pub struct Source {
    /// A git repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git: Option<GitSource>,
}

/// A git repository and what of it is wanted.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.secretRef) || !(self.url.startsWith('http://') || self.url.startsWith('git://'))", "secretRef needs an https or ssh url: others send credentials in the clear"))]
pub struct GitSource {
    /// The repository: `https://host/path`, `ssh://[user@]host[:port]/path` or `user@host:path`.
    /// `http://` and `git://` only where the administrator allows insecure schemes.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = (r"self.matches('^(https?|ssh|git)://([A-Za-z0-9_][A-Za-z0-9._-]*@)?([A-Za-z0-9][A-Za-z0-9.-]*|\\[[0-9a-fA-F:]+\\])(:[0-9]{1,5})?/[!-~]+$') || self.matches('^[A-Za-z0-9_][A-Za-z0-9_.-]*@[A-Za-z0-9][A-Za-z0-9.-]*:[!-9;-~][!-~]*$')", "must be https://host/path, ssh://[user@]host[:port]/path or user@host:path, without spaces"))]
    #[x_kube(validation = ("!self.matches('^[a-z]+://[^/@]*:[^/@]*@') && !self.matches('^https?://[^/@]+@')", "must not contain a user name or password for http(s)"))]
    pub url: String,
    /// Which commit is wanted; absent means the branch `main`.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<GitReference>,
    /// Build and run from here: relative to the root of the repository, which is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[^\x00-\x1f\x7f]+$"))]
    #[x_kube(validation = ("!self.contains('//') && !self.startsWith('/') && !self.split('/').exists(p, p == '..')", "must be a relative path without '..' parts"))]
    pub directory: Option<String>,
    /// A Secret with what the repository is read with; without it everybody may read it.
    ///
    /// For ssh: `ssh-privatekey` (without a passphrase) and `known_hosts`, which names the server's host keys and is
    /// required. For https: `username` and `password`, or `bearerToken`; and `caFile` where the server's certificate
    /// is of an authority of your own. It is for the url's host alone, and is sent to no other by a redirect or a
    /// submodule. A change of the Secret is used at the next look, and starts nothing anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,
    /// Check out the submodules of the commit too, and theirs: at most 256, 8 deep, by https or ssh, and by
    /// http or git only where `url` is of these itself. Relative urls are resolved against the parent's.
    #[serde(default)]
    pub submodules: bool,
    /// Whether a node may change to a commit that does not descend from the one that it runs, as after a
    /// force push. Where it may not, the node keeps what it runs and says `RewindRefused`. A first
    /// installation has nothing to compare with.
    #[serde(default = "default_allow_rewind")]
    pub allow_rewind: bool,
    /// Seconds between two looks at the repository, with up to 10 % of jitter.
    #[serde(default = "default_interval_seconds")]
    #[schemars(range(min = 10, max = 86400))]
    pub interval_seconds: u32,
}

/// A Secret in the Deployment's namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct SecretReference {
    /// The Secret's name.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")
    )]
    pub name: String,
}

/// Force pushes are followed unless the spec says otherwise.
pub(super) fn default_allow_rewind() -> bool {
    true
}

fn default_interval_seconds() -> u32 {
    60
}

/// What of a repository is wanted: exactly one of its fields.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
#[x_kube(validation = ("[has(self.branch), has(self.tag), has(self.semver), has(self.name), has(self.commit)].exists_one(x, x)", "set exactly one of branch, tag, semver, name, commit"))]
#[x_kube(validation = (r"!has(self.branch) || !(self.branch.startsWith('-') || self.branch.startsWith('/') || self.branch.endsWith('/') || self.branch.endsWith('.lock') || self.branch.contains('..') || self.branch.contains('//') || self.branch.contains('@{') || self.branch.matches('[\\x00-\\x20\\x7f~^:?*\\[\\\\]'))", "branch is not a valid git ref name"))]
#[x_kube(validation = (r"!has(self.tag) || !(self.tag.startsWith('-') || self.tag.startsWith('/') || self.tag.endsWith('/') || self.tag.endsWith('.lock') || self.tag.contains('..') || self.tag.contains('//') || self.tag.contains('@{') || self.tag.matches('[\\x00-\\x20\\x7f~^:?*\\[\\\\]'))", "tag is not a valid git ref name"))]
pub struct GitReference {
    /// The newest commit of this branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 244))]
    pub branch: Option<String>,
    /// The commit of this tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 244))]
    pub tag: Option<String>,
    /// The tag with the highest version in this range, such as `1.x`, `~1.4`, `^2.0.0` or
    /// `>=1.0.0 <3.0.0 || 4.1.0`. Tags are versions of three numbers, with or without a `v` before them.
    /// Pre-releases count only where a part of the range names one of the same three numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 256),
        regex(pattern = r"^[0-9A-Za-z.*^~<>=|, +-]+$")
    )]
    pub semver: Option<String>,
    /// The commit of this full reference, such as `refs/pull/7/head`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 6, max = 255),
        regex(pattern = r"^refs/[A-Za-z0-9][A-Za-z0-9._/+-]*$")
    )]
    pub name: Option<String>,
    /// This commit: all 40 (or 64) lower-case hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 40, max = 64),
        regex(pattern = r"^([0-9a-f]{40}|[0-9a-f]{64})$")
    )]
    pub commit: Option<String>,
}

/// A variable with a plain value, or with one from a ConfigMap or a Secret. Anybody who may view the object, or
/// the Releases that are made from it, can read it, but for the value of a Secret.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!self.name.startsWith('KARI_')", "names that start with KARI_ are Kari's own"))]
#[x_kube(validation = ("!(has(self.value) && has(self.valueFrom))", "set value or valueFrom, not both"))]
pub struct EnvVar {
    /// The variable's name: letters, digits and `_`, not starting with a digit.
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*$")
    )]
    pub name: String,
    /// Its value; empty where neither this nor `valueFrom` is set. No NUL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16384), regex(pattern = r"^[^\x00]*$"))]
    pub value: Option<String>,
    /// Where its value is read. It is read again at each look at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_from: Option<EnvVarSource>,
}

impl EnvVar {
    /// A variable with a plain value.
    pub fn plain(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            value: Some(value.into()),
            value_from: None,
        }
    }

    /// The plain value; empty by default. In what was rendered, every value is plain.
    pub fn plain_value(&self) -> &str {
        self.value.as_deref().unwrap_or_default()
    }
}

/// Where the value of a variable is read: exactly one of its fields.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.configMapKeyRef) != has(self.secretKeyRef)", "set exactly one kind of reference: configMapKeyRef or secretKeyRef"))]
pub struct EnvVarSource {
    /// A key of a ConfigMap in the Deployment's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeySelector>,
    /// A key of a Secret in the Deployment's namespace. Its value reaches the processes' environment, and is
    /// in no other object, command line, unit file or log of Kari's. Not for the build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<KeySelector>,
}

/// A key of a ConfigMap or a Secret, as in core/v1.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct KeySelector {
    /// The object's name.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")
    )]
    pub name: String,
    /// The key within its `data`.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: String,
    /// Leave the variable unset where the object or the key is not there, instead of waiting for it
    /// (ReferenceNotFound).
    #[serde(default)]
    pub optional: bool,
}

/// An object whose every key becomes a variable: exactly one kind.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.configMapRef) != has(self.secretRef)", "set exactly one kind of reference: configMapRef or secretRef"))]
pub struct EnvFromSource {
    /// A ConfigMap in the Deployment's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<EnvSource>,
    /// A Secret in the Deployment's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<EnvSource>,
    /// Put before each key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*$")
    )]
    pub prefix: Option<String>,
}

/// A ConfigMap or a Secret, as in core/v1.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct EnvSource {
    /// The object's name.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")
    )]
    pub name: String,
    /// Go without it where it is not there, instead of waiting for it (ReferenceNotFound).
    #[serde(default)]
    pub optional: bool,
}

/// How the checkout becomes what runs. It sees `build.env` alone, runs as a user of its own
/// in a jail, and what it leaves in the tree is what the processes see, read-only.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("[has(self.run), has(self.command)].exists_one(x, x)", "set exactly one of run, command"))]
pub struct Build {
    /// A script for `/bin/sh -eu`, started in `source.git.directory`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16384), regex(pattern = r"^[^\x00]*$"))]
    pub run: Option<String>,
    /// A command with its arguments, without a shell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096), regex(pattern = r"^[^\x00-\x08\x0b-\x1f\x7f]*$")), extend("x-kubernetes-list-type" = "atomic"))]
    #[x_kube(validation = ("self.size() == 0 || (self[0] != '' && !self[0].contains('='))", "the first word of a command names a program: not empty and without '='"))]
    pub command: Option<Vec<String>>,
    /// Variables of the build, and of nothing else. None from a Secret: a build runs what it fetches.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    #[x_kube(validation = ("self.all(e, !has(e.valueFrom) || !has(e.valueFrom.secretKeyRef))", "a build gets no Secrets: use a plain value or configMapKeyRef"))]
    pub env: Vec<EnvVar>,
    /// Whether the build may use the network; the fetch of the repository always does.
    #[serde(default = "default_true")]
    pub network: bool,
    /// Seconds after which the build is killed and counts as failed (BuildTimedOut).
    #[serde(default = "default_build_timeout_seconds")]
    #[schemars(range(min = 10, max = 21600))]
    pub timeout_seconds: u32,
    /// What the build may use at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<BuildResources>,
    /// Folders that are kept from build to build of this Deployment on a node, for caches of
    /// packages and compilers: relative to `source.git.directory`, none within another. Point the
    /// tool at them. The result has an empty folder there: what it needs must be copied elsewhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(min = 1, max = 256), regex(pattern = r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$")), extend("x-kubernetes-list-type" = "set"))]
    #[x_kube(validation = ("self.all(d, d.split('/').all(p, p != '.' && p != '..'))", "a cache directory must be a relative path without '.' and '..' parts"))]
    #[x_kube(validation = ("!self.exists(d, self.exists(e, e.startsWith(d + '/')))", "a cache directory must not lie within another"))]
    pub cache_directories: Vec<String>,
}

fn default_true() -> bool {
    true
}
fn default_build_timeout_seconds() -> u32 {
    900
}

/// What a build may use.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct BuildResources {
    /// The limits of all processes of the build together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<ResourceLimits>,
}

/// Limits, in the units of core/v1. For a build, absent means 2 CPUs, 2Gi and 512 tasks;
/// for a process, no limit of CPU and memory of its own and 512 tasks.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ResourceLimits {
    /// CPUs, such as `2`, `0.5` or `500m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Cpu>,
    /// Bytes of memory, such as `256Mi`; at least 4Mi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Processes and threads together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub tasks: Option<u32>,
}

/// One service.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.route) || has(self.port)", "a process with a route needs port"))]
#[x_kube(validation = ("!has(self.readinessProbe) || has(self.readinessProbe.exec) || has(self.port)", "an httpGet or tcpSocket readinessProbe needs port"))]
#[x_kube(validation = ("!has(self.livenessProbe) || has(self.livenessProbe.exec) || has(self.port)", "an httpGet or tcpSocket livenessProbe needs port"))]
#[x_kube(validation = ("!has(self.port) || !has(self.env) || !self.env.exists(e, e.name == self.port.env)", "env must not set the variable that port.env names"))]
#[x_kube(validation = ("!has(self.port) || !has(self.sandbox) || !has(self.sandbox.addressFamilies) || self.sandbox.addressFamilies.size() == 0 || self.sandbox.addressFamilies.exists(f, f == 'AF_INET' || f == 'AF_INET6')", "a process with a port needs AF_INET or AF_INET6"))]
pub struct Process {
    /// The process's name within the Deployment: a DNS label of at most 32 characters.
    #[schemars(
        length(min = 1, max = 32),
        regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    )]
    pub name: String,
    /// The command with its arguments, without a shell. The program is looked for in
    /// `source.git.directory` if it has a slash, else on the node's tool path.
    /// `$(NAME)` is replaced by the value of a variable that `env` names or of `port.env`; not by one that
    /// only `envFrom` has, or that may be absent.
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096), regex(pattern = r"^[^\x00-\x08\x0b-\x1f\x7f]*$")), extend("x-kubernetes-list-type" = "atomic"))]
    #[x_kube(validation = ("self.size() == 0 || (self[0] != '' && !self[0].contains('='))", "the first word of a command names a program: not empty and without '='"))]
    pub command: Vec<String>,
    /// Variables of this process; they win over `spec.env`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub env: Vec<EnvVar>,
    /// How the process says that it is up: `Simple` by its probe, `Notify` by sd_notify READY=1, and its
    /// probe then. For READY=1 it has 90 seconds, or, with a readinessProbe, the time of its failures:
    /// `initialDelaySeconds` and `failureThreshold` times `periodSeconds`.
    #[serde(default, rename = "type")]
    #[schemars(default = "default_process_type")]
    pub process_type: ProcessType,
    /// The port it listens on; absent: it listens on nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// When the process may get traffic. Without it: when its port is listened on; without a
    /// port: when it has run for `strategy.minReadySeconds` without a restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness_probe: Option<ReadinessProbe>,
    /// Whether the process still works. It is asked from when the process was ready first; after
    /// `failureThreshold` failures in a row the process, and no other, is restarted: at once the first
    /// time, then at intervals that double from 10 s to 300 s until it was alive for 10 minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness_probe: Option<LivenessProbe>,
    /// What the process may use at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ProcessResources>,
    /// Seconds between SIGTERM and SIGKILL when it is stopped.
    #[serde(default = "default_termination_grace_period_seconds")]
    #[schemars(range(min = 0, max = 3600))]
    pub termination_grace_period_seconds: u32,
    /// Give the process a folder of its own that outlives releases: `$STATE_DIRECTORY`, also its
    /// HOME. All else but /tmp is read-only.
    #[serde(default)]
    pub state_directory: bool,
    /// Exceptions to the default jail and what to take away beyond it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<Sandbox>,
    /// Which requests the node's proxy gives to this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<Route>,
}

fn default_termination_grace_period_seconds() -> u32 {
    30
}
fn default_process_type() -> ProcessType {
    ProcessType::Simple
}

/// How a process says that it is up.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema)]
pub enum ProcessType {
    #[default]
    /// Its probe, its port or its staying alive says so.
    Simple,
    /// It says so itself, by sd_notify(3).
    Notify,
}

/// The port of a process. Kari picks a free one and says which.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// The variable that tells the process its port. It must listen there on 127.0.0.1 or on all addresses.
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*$")
    )]
    #[x_kube(validation = ("!self.startsWith('KARI_')", "names that start with KARI_ are Kari's own"))]
    pub env: String,
}

/// Whether a process may get traffic, with core/v1's meaning of the timings.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("[has(self.httpGet), has(self.tcpSocket), has(self.exec)].exists_one(x, x)", "set exactly one of httpGet, tcpSocket, exec"))]
#[x_kube(validation = ("!has(self.timeoutSeconds) || !has(self.periodSeconds) || self.timeoutSeconds <= self.periodSeconds", "timeoutSeconds must not exceed periodSeconds"))]
pub struct ReadinessProbe {
    /// Succeeds on a status from 200 to 399.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_get: Option<HttpGet>,
    /// Succeeds when a connection is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_socket: Option<TcpSocket>,
    /// Succeeds when a command ends with exit 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<ExecAction>,
    /// Seconds to wait before the first check.
    #[serde(default)]
    #[schemars(range(min = 0, max = 3600))]
    pub initial_delay_seconds: u32,
    /// Seconds between two checks.
    #[serde(default = "default_one")]
    #[schemars(range(min = 1, max = 3600))]
    pub period_seconds: u32,
    /// Seconds after which a check has failed.
    #[serde(default = "default_one")]
    #[schemars(range(min = 1, max = 3600))]
    pub timeout_seconds: u32,
    /// Successes in a row that make it ready.
    #[serde(default = "default_one")]
    #[schemars(range(min = 1, max = 100))]
    pub success_threshold: u32,
    /// Failures in a row that make the start count as failed (ProbeFailed).
    #[serde(default = "default_failure_threshold")]
    #[schemars(range(min = 1, max = 3600))]
    pub failure_threshold: u32,
}

fn default_one() -> u32 {
    1
}
fn default_failure_threshold() -> u32 {
    60
}

/// Whether a process still works, with core/v1's timings and defaults.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("[has(self.httpGet), has(self.tcpSocket), has(self.exec)].exists_one(x, x)", "set exactly one of httpGet, tcpSocket, exec"))]
#[x_kube(validation = ("!has(self.timeoutSeconds) || !has(self.periodSeconds) || self.timeoutSeconds <= self.periodSeconds", "timeoutSeconds must not exceed periodSeconds"))]
pub struct LivenessProbe {
    /// Succeeds on a status from 200 to 399.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_get: Option<HttpGet>,
    /// Succeeds when a connection is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_socket: Option<TcpSocket>,
    /// Succeeds when a command ends with exit 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<ExecAction>,
    /// Seconds after a start before the first check.
    #[serde(default)]
    #[schemars(range(min = 0, max = 3600))]
    pub initial_delay_seconds: u32,
    /// Seconds between two checks.
    #[serde(default = "default_liveness_period_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pub period_seconds: u32,
    /// Seconds after which a check has failed.
    #[serde(default = "default_one")]
    #[schemars(range(min = 1, max = 3600))]
    pub timeout_seconds: u32,
    /// Successes in a row that make it alive: one, as in core/v1.
    #[serde(default = "default_one")]
    #[schemars(range(min = 1, max = 1))]
    pub success_threshold: u32,
    /// Failures in a row after which the process is restarted.
    #[serde(default = "default_liveness_failure_threshold")]
    #[schemars(range(min = 1, max = 3600))]
    pub failure_threshold: u32,
}

fn default_liveness_period_seconds() -> u32 {
    10
}
fn default_liveness_failure_threshold() -> u32 {
    3
}

/// A command that is run beside the process: as its user, in its jail, with its environment, files,
/// /tmp and network, and with limits as its own.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ExecAction {
    /// The command with its arguments, without a shell and as it stands, as in core/v1: a variable
    /// such as the port is for `[sh, -c, 'curl -f localhost:$PORT']`. The program is looked for as
    /// that of the process is.
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096), regex(pattern = r"^[^\x00-\x08\x0b-\x1f\x7f]*$")), extend("x-kubernetes-list-type" = "atomic"))]
    #[x_kube(validation = ("self.size() == 0 || (self[0] != '' && !self[0].contains('='))", "the first word of a command names a program: not empty and without '='"))]
    pub command: Vec<String>,
}

/// A GET to the process.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct HttpGet {
    /// The path with its query.
    #[serde(default = "default_path")]
    #[schemars(length(min = 1, max = 1024), regex(pattern = r"^/[!-~]*$"))]
    pub path: String,
    /// Further headers. `Host` is the first host of the route, else 127.0.0.1, unless set here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub http_headers: Vec<HttpHeader>,
}

fn default_path() -> String {
    "/".to_owned()
}

/// A header of a probe's request.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct HttpHeader {
    /// The header's name.
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
    )]
    pub name: String,
    /// Its value.
    #[schemars(length(max = 1024), regex(pattern = r"^[\t -~]*$"))]
    pub value: String,
}

/// A TCP connection to the process's port.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct TcpSocket {}

/// What a process may use.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ProcessResources {
    /// The limits of the process and all its children together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<ResourceLimits>,
}

/// Exceptions to the default jail, each named, and what to take away beyond it.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.capabilities) || !('CAP_NET_RAW' in self.capabilities) || (has(self.addressFamilies) && self.addressFamilies.exists(f, f in ['AF_PACKET','AF_INET','AF_INET6']))", "CAP_NET_RAW needs addressFamilies with AF_PACKET, AF_INET or AF_INET6"))]
pub struct Sandbox {
    /// Folders of the node that the process may write to; they must exist.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "set"))]
    pub writable_paths: Vec<WritablePath>,
    /// The only address families that its sockets may have; empty: the default, which is
    /// AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "set"))]
    pub address_families: Vec<AddressFamily>,
    /// Capabilities that the process keeps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "set"))]
    pub capabilities: Vec<Capability>,
    /// What to take away beyond the default jail.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4), extend("x-kubernetes-list-type" = "set"))]
    pub deny: Vec<Denial>,
}

/// A folder of the node that a service may write to: absolute, normal, none that the system lives in.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, JsonSchema)]
#[serde(transparent)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "self.matches('^/[^/]') && !self.split('/').exists(p, p == '..' || p == '.') && !self.endsWith('/') && !self.contains('//')", "message": "must be an absolute path without '.' and '..' parts"},
    {"rule": "!['/etc','/usr','/boot','/proc','/sys','/dev','/run','/var','/var/lib','/root','/home','/bin','/sbin','/lib','/lib64','/tmp','/var/tmp'].exists(d, self == d) && !['/etc/','/bin/','/sbin/','/lib/','/lib64/','/var/lib/kari','/run/kari','/run/dbus','/run/systemd','/proc/','/sys/','/dev/','/boot/','/usr/','/root/'].exists(d, self.startsWith(d))", "message": "is a path that no service may write"}
]))]
pub struct WritablePath(
    #[schemars(length(min = 2, max = 1024), regex(pattern = r"^/[A-Za-z0-9._/-]+$"))] pub String,
);

/// Address families that a service may be limited to or given.
#[derive(
    Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, JsonSchema,
)]
#[allow(
    non_camel_case_types,
    missing_docs,
    reason = "the kernel's names, address_families(7)"
)]
pub enum AddressFamily {
    AF_UNIX,
    AF_INET,
    AF_INET6,
    AF_NETLINK,
    AF_PACKET,
}

/// Capabilities that a service may be given.
#[derive(
    Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, JsonSchema,
)]
#[allow(
    non_camel_case_types,
    missing_docs,
    reason = "the kernel's names, capabilities(7)"
)]
pub enum Capability {
    CAP_NET_BIND_SERVICE,
    CAP_NET_RAW,
    CAP_NET_ADMIN,
    CAP_SYS_NICE,
    CAP_IPC_LOCK,
}

/// What may be taken away beyond the default jail.
#[derive(
    Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, JsonSchema,
)]
pub enum Denial {
    /// Memory that is writable and executable: stops just-in-time compilers, and much shell code.
    JIT,
}

/// Which requests the node's proxy gives to a process.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// Host names, lower case; a leading `*.` stands for any one or more labels, and a name without it goes
    /// first. Requests are compared without regard to case. A name belongs to one Deployment per node: a
    /// second one waits (RouteConflict) and gets it when it is free.
    #[schemars(length(min = 1, max = 16), inner(length(min = 1, max = 253), regex(pattern = r"^(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")), extend("x-kubernetes-list-type" = "set"))]
    pub hosts: Vec<String>,
    /// How the paths of the requests begin, by whole segments: `/api` is for `/api` and `/api/x`, not for
    /// `/apix`. Of several that fit the longest wins; the path is passed on unchanged. Processes may share a
    /// host with different paths; where none fits, the answer is 404.
    #[serde(default = "default_path")]
    #[schemars(
        length(min = 1, max = 256),
        regex(pattern = r"^/[A-Za-z0-9._~@:+/-]*$")
    )]
    #[x_kube(validation = ("self == '/' || (!self.endsWith('/') && !self.contains('//'))", "must not end with '/' or have '//': /api is for /api, /api/ and all below"))]
    #[x_kube(validation = ("!self.split('/').exists(p, p == '.' || p == '..')", "must not have '.' or '..' parts"))]
    #[x_kube(validation = ("self != '/.well-known/kari' && !self.startsWith('/.well-known/kari/')", "/.well-known/kari is Kari's own"))]
    pub path: String,
    /// Serve the hosts by https too, and send requests in the clear there (308), but for those which a proxy in
    /// front says came by https (`X-Forwarded-Proto`). Routes of one host have the same, or all but one none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<RouteTls>,
}

/// What a route's hosts are served with by https.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RouteTls {
    /// A Secret of type `kubernetes.io/tls` in the Deployment's namespace: `tls.crt`, the server's certificate
    /// first, and `tls.key`. A change of it is served without a new revision, a restart or a lost request.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")
    )]
    pub secret_name: String,
}

/// How a new revision replaces the old one, on a node and over the nodes.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.progressDeadlineSeconds) || !has(self.minReadySeconds) || self.progressDeadlineSeconds > self.minReadySeconds", "progressDeadlineSeconds must be greater than minReadySeconds"))]
pub struct Strategy {
    /// `BlueGreen`: start the new, wait until it is healthy, switch the traffic, bake, commit, drain, stop
    /// the old. Old and new run side by side for a while, workers too, and share their state. `Recreate`:
    /// what changes is stopped first, and its routes answer 503 with `Retry-After` until the new is healthy;
    /// should it fail, the old is started again. Absent means `Recreate` if any process has a
    /// `stateDirectory`, else `BlueGreen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch: Option<Switch>,
    /// Nodes that may be unavailable or changing at once: a number, or a percentage of the nodes that
    /// match, rounded down, at least 1, at most 256 in effect.
    #[serde(default = "default_max_unavailable")]
    #[schemars(schema_with = "max_unavailable_schema")]
    pub max_unavailable: IntOrString,
    /// Seconds that a new release must stay healthy under traffic before it is committed.
    #[serde(default = "default_min_ready_seconds")]
    #[schemars(range(min = 0, max = 3600))]
    pub min_ready_seconds: u32,
    /// Seconds without progress after which the rollout is Stalled and starts on no further node.
    #[serde(default = "default_progress_deadline_seconds")]
    #[schemars(range(min = 1, max = 604800))]
    pub progress_deadline_seconds: u32,
}

impl Default for Strategy {
    fn default() -> Self {
        Self {
            switch: None,
            max_unavailable: default_max_unavailable(),
            min_ready_seconds: default_min_ready_seconds(),
            progress_deadline_seconds: default_progress_deadline_seconds(),
        }
    }
}

fn default_max_unavailable() -> IntOrString {
    IntOrString::Int(1)
}
fn default_min_ready_seconds() -> u32 {
    5
}
fn default_progress_deadline_seconds() -> u32 {
    1800
}
fn max_unavailable_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "x-kubernetes-int-or-string": true,
        "pattern": "^([1-9][0-9]?|100)%$",
        "minimum": 1,
        "maximum": 10000,
    })
}

/// How a node changes from one release to the next.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema)]
pub enum Switch {
    /// Old and new run side by side until the new one is committed.
    BlueGreen,
    /// The old processes are stopped before the new ones start: the two never run at the same time.
    Recreate,
}

/// What the controller has seen and decided.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("default" = {"observedGeneration": -1}))]
pub struct DeploymentStatus {
    /// The generation that all of the status speaks of; -1 before the controller has seen the object.
    #[serde(default)]
    pub observed_generation: i64,
    /// `Ready`, `Reconciling` and `Stalled`, with the meaning of kstatus; always all three.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The commit that the source resolved to; valid for this url and reference also while a look-up fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<ResolvedSource>,
    /// The name of the ControllerRevision that is being rolled out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The last revision that every node served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_good_revision: Option<String>,
    /// Revisions that failed and are not tried again by themselves; the newest five.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 5), extend("x-kubernetes-list-type" = "atomic"))]
    pub blocked_revisions: Vec<BlockedRevision>,
    /// Counts of nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<NodeCounts>,
    /// Nodes that hold a slot of the budget.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 253)), extend("x-kubernetes-list-type" = "atomic"))]
    pub active: Vec<String>,
    /// The rollout's deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// The annotations' values that were acted on; an equal value does nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handled: Option<LastHandled>,
}

/// What a source resolved to.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ResolvedSource {
    /// The url that was asked.
    pub url: String,
    /// The full name of the reference that was looked up, of the tag that a range found, or the commit itself.
    #[serde(rename = "ref")]
    pub reference: String,
    /// The commit, all of its digits.
    pub commit: String,
    /// Its first seven digits.
    pub short_commit: String,
}

/// A revision that failed.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct BlockedRevision {
    /// The ControllerRevision's name.
    pub revision: String,
    /// Its commit.
    pub commit: String,
    /// The first node it failed on.
    pub node: String,
    /// Why, a reason of class Revision.
    pub reason: String,
    /// What happened there.
    pub message: String,
}

/// Counts of a Deployment's nodes.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct NodeCounts {
    /// `available/desired`, for people.
    pub summary: String,
    /// Nodes that match the placement and take part.
    pub desired: u32,
    /// Of them, those whose Release names the current revision.
    pub updated: u32,
    /// Of them, those that serve the current revision.
    pub available: u32,
    /// Of them, those on which the current revision failed.
    pub failed: u32,
    /// Nodes that match and whose agent is not reachable.
    pub unreachable: u32,
}

/// How long a rollout may go on without progress.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// When the rollout is Stalled unless something happens before (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    /// Since when the deadline stands still (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_at: Option<String>,
}

/// Values of annotations that were acted on.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct LastHandled {
    /// Of `kari.dev/requestedAt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_at: Option<String>,
    /// Of `kari.dev/retry`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<String>,
}
