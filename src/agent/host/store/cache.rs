//! What a build keeps for the next one: `cache/<digest of its path>/`, the build user's.
//!
//! A cache is expendable: nothing refers to what is in it, one that has grown too
//! large is begun anew, and one that no build names any more is garbage. Only a
//! build of the same app sees it, and the agent never follows a link in it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Uid};

use super::{AppFolder, StoreError, durable};
use crate::agent::host::tree::{Visited, WalkError, open_root, walk};
use crate::api::names::hex_digest;

/// Bytes on the disk above which a cache is begun anew: more than the caches of large projects hold, and
/// less than fills a node's disk with a dozen apps.
pub const CACHE_LIMIT_BYTES: u64 = 5 << 30;

/// Files and folders above which a cache is begun anew: it is walked before each build, which a million
/// lets take seconds.
pub const CACHE_LIMIT_ENTRIES: u64 = 1_000_000;

/// Digits of the digest that names a cache's folder.
const CACHE_NAME_DIGITS: usize = 16;

/// Bytes of a block in `st_blocks`, whatever the file system's own are.
const BLOCK_BYTES: u64 = 512;

/// A cache, ready for a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    /// Where it is on the node.
    pub path: PathBuf,
    /// Why it was begun anew, for people; nothing when what the last build left is there.
    pub emptied: Option<String>,
}

/// The name of a cache's folder; `directory` is as the spec has it.
pub fn cache_name(directory: &str) -> String {
    let mut name = hex_digest(directory.as_bytes());
    name.truncate(CACHE_NAME_DIGITS);
    name
}

impl AppFolder {
    /// Makes a cache ready for a build of the user `uid`: there, owned by it, and not too large. No build
    /// of the app may run. Walks a tree: for a thread of its own.
    pub fn open_cache(&self, directory: &str, uid: u32) -> Result<Cache, StoreError> {
        self.open_bounded_cache(directory, uid, CACHE_LIMIT_BYTES, CACHE_LIMIT_ENTRIES)
    }

    fn open_bounded_cache(
        &self,
        directory: &str,
        uid: u32,
        limit_bytes: u64,
        limit_entries: u64,
    ) -> Result<Cache, StoreError> {
        let caches = self.path().join("cache");
        durable::make_folder(&caches, 0o700, None)?;
        let path = caches.join(cache_name(directory));
        let excess = match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => {
                let size = take_over(&path, uid, limit_bytes, limit_entries)?;
                size.excess(limit_bytes, limit_entries)
            }
            Ok(_) => Some("it was no folder".to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(StoreError::io("look at", &path)(error)),
        };
        if excess.is_some() {
            self.store().trash(&path)?;
        }
        durable::make_folder(&path, 0o700, Some(uid))?;
        Ok(Cache {
            path,
            emptied: excess,
        })
    }
}

/// What a cache holds, as far as it was walked.
#[derive(Debug, Default, Clone, Copy)]
struct Size {
    bytes: u64,
    entries: u64,
}

impl Size {
    fn excess(self, limit_bytes: u64, limit_entries: u64) -> Option<String> {
        if self.bytes > limit_bytes {
            Some(format!("it held more than {} MiB", limit_bytes >> 20))
        } else if self.entries > limit_entries {
            Some(format!("it held more than {limit_entries} files"))
        } else {
            None
        }
    }
}

/// Gives what is in a cache to the user `uid`, and measures it, up to the first limit.
fn take_over(
    path: &Path,
    uid: u32,
    limit_bytes: u64,
    limit_entries: u64,
) -> Result<Size, StoreError> {
    let root = open_root(path).map_err(|errno| StoreError::io("open", path)(errno.into()))?;
    let mut size = Size::default();
    walk(&root, path, |folder, name| {
        let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if stat.st_uid != uid {
            let (owner, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(folder, name, Some(owner), Some(group), flags)?;
        }
        size.entries += 1;
        size.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * BLOCK_BYTES;
        Ok(if size.excess(limit_bytes, limit_entries).is_some() {
            Visited::Enough
        } else if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            Visited::Folder
        } else {
            Visited::Other
        })
    })
    .map_err(|WalkError { path, errno }| StoreError::io("look at", &path)(errno.into()))?;
    Ok(size)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;
    use crate::agent::host::store::Store;
    use crate::api::names::AppName;

    fn folder() -> (tempfile::TempDir, AppFolder) {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let folder = store.app(&AppName::new("web", "shop").unwrap());
        folder.create().unwrap();
        (root, folder)
    }

    #[test]
    fn a_cache_keeps_what_is_in_it_and_goes_over_to_another_build_user() {
        let (root, folder) = folder();
        let outside = root.path().join("outside");
        fs::write(&outside, "kept").unwrap();
        let cache = folder.open_cache(".cache/npm", 50_001).unwrap();
        assert_eq!(cache.emptied, None);
        fs::create_dir(cache.path.join("inner")).unwrap();
        fs::write(cache.path.join("inner/file"), "x").unwrap();
        symlink(&outside, cache.path.join("link")).unwrap();
        fs::set_permissions(cache.path.join("inner"), fs::Permissions::from_mode(0o0)).unwrap();

        let again = folder.open_cache(".cache/npm", 50_002).unwrap();
        assert_eq!(again, cache);
        for entry in ["", "inner", "inner/file", "link"] {
            let metadata = fs::symlink_metadata(cache.path.join(entry)).unwrap();
            assert_eq!(
                (metadata.uid(), metadata.gid()),
                (50_002, 50_002),
                "{entry}"
            );
        }
        assert_eq!(
            fs::metadata(&outside).unwrap().uid(),
            0,
            "a link is not followed"
        );
        let other = folder.open_cache(".cache/go", 50_002).unwrap();
        assert_ne!(other.path, cache.path);
    }

    #[test]
    fn a_cache_that_has_grown_too_large_is_begun_anew_and_says_why() {
        let (_root, folder) = folder();
        let cache = folder.open_cache("target", 0).unwrap();
        fs::write(cache.path.join("large"), vec![1; 1 << 20]).unwrap();
        let open = |bytes, entries| {
            folder
                .open_bounded_cache("target", 0, bytes, entries)
                .unwrap()
        };
        assert_eq!(open(2 << 20, 10).emptied, None);
        assert!(cache.path.join("large").exists());
        let why = open(1 << 19, 10).emptied.unwrap();
        assert!(why.contains("MiB"), "{why}");
        assert!(cache.path.is_dir() && !cache.path.join("large").exists());
        for file in ["a", "b", "c"] {
            fs::write(cache.path.join(file), "").unwrap();
        }
        let why = open(1 << 19, 2).emptied.unwrap();
        assert!(why.contains("more than 2 files"), "{why}");
    }

    #[test]
    fn what_stands_in_the_place_of_a_cache_is_put_away() {
        let (root, folder) = folder();
        let outside = root.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let path = folder.open_cache("target", 0).unwrap().path;
        fs::remove_dir(&path).unwrap();
        symlink(&outside, &path).unwrap();
        let cache = folder.open_cache("target", 50_001).unwrap();
        assert!(cache.emptied.is_some());
        assert!(fs::symlink_metadata(&cache.path).unwrap().is_dir());
        assert_eq!(fs::metadata(&outside).unwrap().uid(), 0);
    }
}
