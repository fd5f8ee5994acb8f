//! OUTLINE: names of units; what a service file, a target and a step say. Pure.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use crate::api::deployment::{Build, EnvVar, Process};
use crate::api::names::{AppName, Commit, NodeName, ReleaseId};
use super::quote::QuoteError;
use super::records::{BuildKey, ContentDigest, EnvDigest};
use super::systemd::Properties;

/// Which of ours a unit is, told by its name alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnUnit {
    Target(AppName),
    Service { app: AppName, process: String },
    Build { app: AppName, release_id: ReleaseId, build_try: u32 },
    /// fetch of a mirror by its key (the unit's name is `kari-fetch.<key>.service`)
    Fetch { mirror: String },
    /// kari-proxy.service, kari-apps.slice …
    Agent,
}
pub fn parse_unit_name(name: &str) -> Option<OwnUnit> { todo!() }
pub fn target_name(app: &AppName) -> String { todo!() }
/// The pattern of all units of an app for `Systemd::list_units`: services, target and build steps.
pub fn app_patterns(app: &AppName) -> Vec<String> { todo!() }
pub fn build_unit_name(app: &AppName, release_id: &ReleaseId, build_try: u32) -> String { todo!() }
pub fn fetch_unit_name(mirror_key: &str) -> String { todo!() }

/// digest of (commit, directory, build, build env, jail version); Template::build None → the checkout
pub fn build_key(commit: &Commit, directory: Option<&str>, build: Option<&Build>) -> BuildKey { todo!() }

/// Variables of a process as its environment file carries them: deployment env, process env (wins), less the names that Kari sets itself.
pub fn process_variables(env: &[EnvVar], process: &Process) -> BTreeMap<String, String> { todo!() }
/// The file's content (0600, under env/<digest>).
pub fn environment_file(variables: &BTreeMap<String, String>) -> Result<Vec<u8>, QuoteError> { todo!() }

pub struct ServiceSpec<'a> {
    pub app: &'a AppName,
    pub process: &'a Process,
    /// result of process_variables, for `$(NAME)`
    pub variables: &'a BTreeMap<String, String>,
    pub env_file: &'a Path,
    pub port: Option<u16>,
    pub commit: &'a Commit,
    pub node: &'a NodeName,
    /// sealed tree on the host
    pub tree: &'a Path,
    pub directory: Option<&'a str>,
    /// the process's state folder on the host, if stateDirectory
    pub state: Option<&'a Path>,
    pub user: &'a str,
    pub tool_path: &'a str,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceUnit { pub name: String, pub text: String, pub content: ContentDigest }
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// InvalidSpec
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Quote(#[from] QuoteError),
}
/// Same spec → same text; `content` is the digest of the text with the port left out.
pub fn render_service(spec: &ServiceSpec<'_>) -> Result<ServiceUnit, UnitError> { todo!() }
pub fn render_target(app: &AppName, units: &[String]) -> String { todo!() }
/// The units that a target's text names, in its order.
pub fn target_units(text: &str) -> Vec<String> { todo!() }

/// A step of any kind: a transient oneshot unit in the build jail.
pub struct StepSpec {
    pub description: String,
    pub user: String,
    pub timeout_seconds: u32,
    pub limits: StepLimits,
    pub network: bool,
    pub environment: Vec<(String, String)>,
    pub environment_file: Option<PathBuf>,
    /// host path → path in the jail
    pub read_only: Vec<(PathBuf, String)>,
    pub writable: Vec<(PathBuf, String)>,
    pub working_directory: String,
    pub log: PathBuf,
    /// one after the other, stopping at the first that fails
    pub commands: Vec<Vec<String>>,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits { pub cpu_millis: u64, pub memory_bytes: u64, pub tasks: u32 }
pub fn step_properties(spec: &StepSpec) -> Result<Properties, UnitError> { todo!() }

pub struct BuildSpec<'a> {
    pub app: &'a AppName,
    pub commit: &'a Commit,
    pub mirror: &'a Path,
    /// `stage/<key>.<try>`: has `source` and `tmp`
    pub stage: &'a Path,
    pub directory: Option<&'a str>,
    pub build: Option<&'a Build>,
    pub env_file: Option<&'a Path>,
    pub user: &'a str,
    pub tool_path: &'a str,
    pub log: &'a Path,
}
/// Commands: 0 checkout (git under `env -i`), 1 the directory exists, 2 the build (if there is one).
pub fn build_step(spec: &BuildSpec<'_>) -> Result<StepSpec, UnitError> { todo!() }
