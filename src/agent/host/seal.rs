//! OUTLINE: a stage becomes an immutable tree. Blocking.
use std::path::{Path, PathBuf};
use super::records::BuildKey;
use super::store::{AppFolder, Store};
#[derive(Debug, thiserror::Error)] pub enum SealError { #[error("…")] Io { action: &'static str, path: PathBuf, source: std::io::Error },
 #[error("{directory} …")] DirectoryNotFound { directory: String } }
/// the step's unit is stopped and its cgroup empty (the caller's duty); idempotent
pub fn seal(store: &Store, app: &AppFolder, key: &BuildKey, build_try: u32) -> Result<PathBuf, SealError> { todo!() }
/// the folder in the tree, never outside of it
pub fn resolve_beneath(tree: &Path, directory: &str) -> Result<(), SealError> { todo!() }
