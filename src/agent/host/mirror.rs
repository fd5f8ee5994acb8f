//! OUTLINE: git mirrors
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use crate::api::names::{AppName, Commit};
use crate::api::reasons::Reason;
use super::store::Store;
use super::systemd::Systemd;

/// digest of (url, credentials): 40 hex digits
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MirrorKey(String);
impl MirrorKey { pub fn of(source: &SourceUrl) -> Self { todo!() } pub fn as_str(&self) -> &str { &self.0 } }
/// https, ssh, scp-like, http, git; nothing else
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceUrl {}
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)] #[error("…")] pub struct SourceUrlError { pub value: String }
impl SourceUrl { pub fn parse(text: &str) -> Result<Self, SourceUrlError> { todo!() } }

/// What an app wants: idempotent, the newest per app counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want { pub source: SourceUrl, pub reference: Option<String>, pub commit: Commit }
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MirrorState {
    /// the mirror has the commit, held by refs/kari/<ns>/<name>
    Ready { mirror: PathBuf },
    Queued { position: usize, of: usize },
    Fetching,
    /// tried again by itself after the time
    Failed { failure: FetchFailure, retry_in: Duration },
}
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)] #[error("{message}")]
pub struct FetchFailure { pub reason: Reason, pub message: String }
#[derive(Clone)] pub struct MirrorSettings { pub slots: usize, pub user: String, pub uid: u32 }

/// Cheap to clone; one per agent.
#[derive(Clone)] pub struct Mirrors {}
impl Mirrors {
    /// `wake` is called (never blocking) for each app whose state changed. The future is the actor: spawn it.
    pub fn new(store: Store, systemd: Systemd, settings: MirrorSettings, wake: Arc<dyn Fn(&AppName) + Send + Sync>) -> (Self, impl Future<Output = ()> + Send) { (todo!(), async {}) }
    pub fn want(&self, app: &AppName, want: Want) { todo!() }
    pub fn unwant(&self, app: &AppName) { todo!() }
    /// None: not wanted
    pub fn state(&self, app: &AppName) -> Option<MirrorState> { todo!() }
    /// a systemd event of unit kari-fetch.<key>.service
    pub fn dirty(&self, key: &str) { todo!() }
    /// a checkout of the app's commit failed though the mirror had it: check it (git fsck), and fetch it anew if it is damaged
    pub fn suspect(&self, app: &AppName) { todo!() }
    /// the app is gone: its ref goes; the mirror too if nobody has one in it
    pub async fn release(&self, app: &AppName) -> Result<(), super::store::StoreError> { todo!() }
}
/// argv of the checkout, run as the build user with the mirror bound read-only; first word `/usr/bin/env`
pub fn checkout_command(git: &str, mirror: &str, tree: &str, index: &str, commit: &Commit) -> Vec<String> { todo!() }
