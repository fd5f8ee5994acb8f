//! OUTLINE: static users by userdb drop-ins
use std::path::PathBuf;
use super::records::UsersRecord;
use super::store::{AppFolder, Store};
#[derive(Debug, thiserror::Error)] pub enum UsersError { #[error("…")] Io(#[from] std::io::Error) }
#[derive(Debug, Clone, PartialEq, Eq)] pub struct User { pub name: String, pub uid: u32 }
#[derive(Debug, Clone, PartialEq, Eq)] pub struct AppUsers { pub build: User, pub service: User }
pub struct Users {}
impl Users {
    pub fn new(userdb: PathBuf, range: std::ops::RangeInclusive<u32>) -> Self { todo!() }
    /// idempotent; blocking
    pub fn ensure_app(&self, store: &Store, app: &AppFolder) -> Result<AppUsers, UsersError> { todo!() }
    /// kari-git
    pub fn ensure_git(&self, store: &Store) -> Result<User, UsersError> { todo!() }
    /// last but the json; blocking
    pub fn remove_app(&self, app: &AppFolder) -> Result<(), UsersError> { todo!() }
    pub fn remove_git(&self, store: &Store) -> Result<(), UsersError> { todo!() }
}
