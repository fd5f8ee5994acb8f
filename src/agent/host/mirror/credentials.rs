//! The files of credentials: there while a fetch runs, in memory, for its jail alone.
//!
//! ```text
//! /run/kari/git/           root 0700
//!     <mirror>/            kari-git 0700, bound into the fetch's jail, which sees no other
//! ```

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::MirrorKey;
use crate::agent::host::store::{self, StoreError};
use crate::git_credential::GitAccess;

/// What a reboot may lose: whoever fetches is given it anew.
const FOLDER: &str = "/run/kari/git";

/// Where a fetch finds the files of its credential.
pub(super) const CREDENTIAL_PATH: &str = "/var/lib/kari/credential";

/// The folder of a mirror's credential.
pub(super) fn folder(key: &MirrorKey) -> PathBuf {
    Path::new(FOLDER).join(key.as_str())
}

/// Writes the files of a credential for the user of fetches.
pub(super) fn write(key: &MirrorKey, access: &GitAccess, uid: u32) -> Result<(), StoreError> {
    let folder = folder(key);
    remove(key)?;
    store::make_folder(Path::new("/run/kari"), 0o755, None)?;
    store::make_folder(Path::new(FOLDER), 0o700, None)?;
    store::make_folder(&folder, 0o700, Some(uid))?;
    for (name, content) in &access.files {
        let path = folder.join(name);
        // Nobody but root can look into the folder above.
        std::fs::write(&path, content)
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)))
            .and_then(|()| std::os::unix::fs::chown(&path, Some(uid), Some(uid)))
            .map_err(wrong("write", &path))?;
    }
    Ok(())
}

/// Removes the files of a mirror's credential.
pub(super) fn remove(key: &MirrorKey) -> Result<(), StoreError> {
    let folder = folder(key);
    match std::fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(wrong("remove", &folder)(error))
        }
        _ => Ok(()),
    }
}

/// The mirrors with files of a credential.
pub(super) fn keys() -> Result<Vec<MirrorKey>, StoreError> {
    let names = store::names_in(Path::new(FOLDER))?;
    Ok(names.into_iter().map(MirrorKey).collect())
}

fn wrong(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        action,
        path,
        source,
    }
}
