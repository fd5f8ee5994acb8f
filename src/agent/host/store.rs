//! OUTLINE: files under /var/lib/kari. All blocking: call in spawn_blocking where it walks trees.
use std::path::{Path, PathBuf};
use crate::api::names::{AppName, ReleaseId, RevisionName};
use super::records::*;
#[derive(Debug, thiserror::Error)] pub enum StoreError {
    #[error("…")] Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("…")] Record { path: PathBuf, source: RecordError },
    #[error("…")] Busy { path: PathBuf },
}
/// Cheap to clone.
#[derive(Clone)] pub struct Store {}
impl Store {
    /// makes the layout, takes the lock, empties nothing
    pub fn open(root: &Path) -> Result<Self, StoreError> { todo!() }
    pub fn app(&self, app: &AppName) -> AppFolder { todo!() }
    /// every folder under apps/ that is an app
    pub fn apps(&self) -> Result<Vec<AppName>, StoreError> { todo!() }
    pub fn mirror(&self, key: &str) -> PathBuf { todo!() }
    pub fn mirrors(&self) -> Result<Vec<String>, StoreError> { todo!() }
    pub fn proxy(&self) -> PathBuf { todo!() }
    /// renamed away and durable at once; a missing path is done; deleted later by `empty_trash`
    pub fn trash(&self, path: &Path) -> Result<(), StoreError> { todo!() }
    /// deletes everything in trash/: run it in a slot of its own (spawn_blocking)
    pub fn empty_trash(&self) -> Result<(), StoreError> { todo!() }
    pub fn disk(&self) -> Result<DiskSpace, StoreError> { todo!() }
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)] pub struct DiskSpace { pub bytes: u64, pub bytes_free: u64, pub inodes: u64, pub inodes_free: u64 }
#[derive(Debug, Clone, Copy, PartialEq, Eq)] pub struct DiskReserve { pub bytes: u64, pub percent: u8, pub inodes_percent: u8 }
impl DiskSpace { /// what to tell people when it does not hold
    pub fn below(&self, reserve: &DiskReserve) -> Option<String> { todo!() } }
#[derive(Clone)] pub struct AppFolder {}
impl AppFolder {
    pub fn name(&self) -> &AppName { todo!() }
    pub fn path(&self) -> &Path { todo!() }
    pub fn create(&self) -> Result<(), StoreError> { todo!() }
    pub fn read_applied(&self) -> Result<Option<AppliedRecord>, StoreError> { todo!() }
    pub fn write_applied(&self, record: &AppliedRecord) -> Result<(), StoreError> { todo!() }
    pub fn remove_applied(&self) -> Result<(), StoreError> { todo!() }
    pub fn read_attempt(&self) -> Result<Option<AttemptRecord>, StoreError> { todo!() }
    pub fn write_attempt(&self, record: &AttemptRecord) -> Result<(), StoreError> { todo!() }
    pub fn remove_attempt(&self) -> Result<(), StoreError> { todo!() }
    pub fn read_release(&self, revision: &RevisionName) -> Result<Option<ReleaseRecord>, StoreError> { todo!() }
    pub fn write_release(&self, record: &ReleaseRecord) -> Result<(), StoreError> { todo!() }
    pub fn releases(&self) -> Result<Vec<ReleaseRecord>, StoreError> { todo!() }
    pub fn build(&self, key: &BuildKey) -> PathBuf { todo!() }
    pub fn has_build(&self, key: &BuildKey) -> Result<bool, StoreError> { todo!() }
    pub fn stage(&self, key: &BuildKey, build_try: u32) -> PathBuf { todo!() }
    /// new `source` and `tmp/home` owned by the build user; an old one of the name is trashed first
    pub fn create_stage(&self, key: &BuildKey, build_try: u32, uid: u32) -> Result<PathBuf, StoreError> { todo!() }
    pub fn log(&self, release_id: &ReleaseId, step: &str) -> PathBuf { todo!() }
    /// at most 4 KiB, valid UTF-8, whole lines
    pub fn log_tail(&self, release_id: &ReleaseId, step: &str) -> Result<Option<String>, StoreError> { todo!() }
    pub fn env_file(&self, digest: &EnvDigest) -> PathBuf { todo!() }
    /// written once, never replaced
    pub fn write_env(&self, content: &[u8]) -> Result<(EnvDigest, PathBuf), StoreError> { todo!() }
    pub fn state(&self, process: &str) -> PathBuf { todo!() }
    pub fn create_state(&self, process: &str, uid: u32) -> Result<PathBuf, StoreError> { todo!() }
    pub fn contents(&self) -> Result<Contents, StoreError> { todo!() }
}
/// What is in an app's folder, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents { pub builds: Vec<BuildKey>, pub stages: Vec<String>, pub logs: Vec<String>, pub env: Vec<EnvDigest>, pub releases: Vec<RevisionName> }
/// Everything that is in use.
#[derive(Debug, Clone, Default)] pub struct References { pub builds: Vec<BuildKey>, pub stages: Vec<String>, pub releases: Vec<RevisionName>, pub release_ids: Vec<ReleaseId>, pub env: Vec<EnvDigest> }
/// Paths relative to the app's folder that nothing refers to.
pub fn garbage(contents: &Contents, references: &References) -> Vec<PathBuf> { todo!() }
/// unit files and the enabling link, written atomically under /etc/systemd/system
#[derive(Clone)] pub struct UnitFiles {}
impl UnitFiles {
    pub fn new(folder: &Path) -> Self { todo!() }
    pub fn read(&self, name: &str) -> Result<Option<String>, StoreError> { todo!() }
    /// durable before it returns
    pub fn write(&self, name: &str, text: &str) -> Result<(), StoreError> { todo!() }
    pub fn remove(&self, name: &str) -> Result<(), StoreError> { todo!() }
    /// the link in multi-user.target.wants
    pub fn enable(&self, name: &str) -> Result<(), StoreError> { todo!() }
    pub fn disable(&self, name: &str) -> Result<(), StoreError> { todo!() }
    pub fn is_enabled(&self, name: &str) -> Result<bool, StoreError> { todo!() }
    /// names of our unit files: `kari*`
    pub fn list(&self) -> Result<Vec<String>, StoreError> { todo!() }
}
