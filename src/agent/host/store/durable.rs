//! Writes that a power cut leaves whole or undone.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::RawDir;
use rustix::io::Errno;

use super::StoreError;

/// The largest file that is read whole: far above any record.
const LARGEST_READ_BYTES: u64 = 16 << 20;

/// Puts `content` at `path`: written beside it, synced, renamed over it, and the folder synced. The
/// file beside it is hidden, so that neither systemd nor nginx takes it for one of theirs.
pub fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), StoreError> {
    let beside = beside(path);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&beside)?;
        // Also if it was left over with another mode.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    })();
    written.map_err(StoreError::io("write", path))?;
    sync_parent(path)
}

/// Where [`write`] writes first.
fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or(OsStr::new("file")));
    name.push(".tmp");
    path.with_file_name(name)
}

/// The content of a file; nothing if there is none.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    let wrong = StoreError::io("read", path);
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > LARGEST_READ_BYTES => {
            Err(wrong(io::Error::from(Errno::FBIG)))
        }
        Ok(_) => match fs::read(path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(wrong(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(wrong(error)),
    }
}

/// Removes a file, durably. One that does not exist is removed.
pub fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(StoreError::io("remove", path)(error)),
    }
}

/// Makes a folder, and sets its mode and owner if it is there already; its parent must exist, but for
/// the root of a store.
pub fn make_folder(path: &Path, mode: u32, owner: Option<u32>) -> Result<(), StoreError> {
    let made = (|| {
        match fs::create_dir(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir_all(path)?,
            Err(error) => return Err(error),
        }
        // The owner first: a change of it may take bits of the mode away.
        if let Some(uid) = owner {
            std::os::unix::fs::chown(path, Some(uid), Some(uid))?;
        }
        fs::set_permissions(path, Permissions::from_mode(mode))
    })();
    made.map_err(StoreError::io("make the folder", path))?;
    sync_parent(path)
}

/// Makes a change of a folder's entries durable.
pub fn sync_folder(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(StoreError::io("sync", path))
}

/// The same for the folder that `path` is in.
pub fn sync_parent(path: &Path) -> Result<(), StoreError> {
    path.parent().map_or(Ok(()), sync_folder)
}

/// The names in a folder that are UTF-8 and not hidden, sorted; none if there is no folder.
pub fn names_in(path: &Path) -> Result<Vec<String>, StoreError> {
    let wrong = StoreError::io("list", path);
    let listed = match fs::read_dir(path) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<Vec<_>>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        Err(error) => Err(error),
    };
    let mut names: Vec<String> = listed
        .map_err(wrong)?
        .into_iter()
        .filter_map(|name| name.into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    Ok(names)
}

/// All names in an open folder but `.` and `..`, read from its beginning.
pub fn names_of(folder: &OwnedFd) -> Result<Vec<OsString>, Errno> {
    let mut names = Vec::new();
    rustix::fs::seek(folder, rustix::fs::SeekFrom::Start(0))?;
    let mut buffer = [MaybeUninit::<u8>::uninit(); 32 * 1024];
    let mut entries = RawDir::new(folder, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}
