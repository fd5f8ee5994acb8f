//! Small files that are written beside their place, synced and renamed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct FileError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError { action, path, source }
}

/// Makes the folder and its parents.
pub fn create_folder(path: &Path) -> Result<(), FileError> {
    fs::create_dir_all(path).map_err(at("create", path))
}

/// What is in the file; nothing if there is none.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("read", path)(error)),
    }
}

/// Replaces the file, mode 0644, by one rename, durably; true if it was another before. The file that is
/// written first is hidden (`.name.tmp`), so that no `*.conf` means it.
pub fn replace_if_different(path: &Path, content: &[u8]) -> Result<bool, FileError> {
    if read(path)?.as_deref() == Some(content) {
        return Ok(false);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp"));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(&temporary)
        .map_err(at("create", &temporary))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(at("write", &temporary))?;
    fs::rename(&temporary, path).map_err(at("rename to", path))?;
    sync_parent(path)?;
    Ok(true)
}

/// Removes the file, durably; true if there was one.
pub fn remove(path: &Path) -> Result<bool, FileError> {
    match fs::remove_file(path) {
        Ok(()) => {
            sync_parent(path)?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(at("remove", path)(error)),
    }
}

/// The names in a folder that are text, sorted; none if there is no folder.
pub fn names(folder: &Path) -> Result<Vec<String>, FileError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at("list", folder)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(at("list", folder))?;
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn sync_parent(path: &Path) -> Result<(), FileError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent).and_then(|folder| folder.sync_all()).map_err(at("sync", parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_only_when_it_differs_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
        let path = folder.path().join("a.conf");
        let done = |result: Result<bool, FileError>| result.unwrap_or_else(|e| panic!("{e}"));
        assert!(done(replace_if_different(&path, b"one")));
        assert!(!done(replace_if_different(&path, b"one")));
        assert!(done(replace_if_different(&path, b"two")));
        assert_eq!(read(&path).ok().flatten().as_deref(), Some(b"two".as_slice()));
        assert_eq!(names(folder.path()).ok(), Some(vec!["a.conf".to_owned()]));
        assert!(done(remove(&path)));
        assert!(!done(remove(&path)));
        assert_eq!(read(&path).ok().flatten(), None);
    }
}
