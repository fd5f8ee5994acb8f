//! Files of the agent: the layout of `/var/lib/kari`, and the unit files.
//!
//! ```text
//! mirrors/<key>.git      bare mirrors, user kari-git
//! apps/<ns>.<name>/      everything of an app, root's alone: [`AppFolder`]
//! proxy/                 configuration of the proxy
//! trash/                 renamed here first, deleted later
//! ballast                room for records on a disk that is full
//! ```
//!
//! Invariants: a file is written beside its place, synced, renamed, and its
//! folder synced, so it is whole or absent; what is deleted is renamed into
//! `trash/` first, so that half a tree never stands under a valid name; one agent
//! at a time holds the root's lock.
//!
//! Everything here blocks. What walks trees ([`Store::empty_trash`], and
//! [`super::seal`]) belongs on a thread of its own.

mod app;
mod cache;
mod durable;
mod unit_files;

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use uuid::Uuid;

pub use app::{AppFolder, Contents, LOG_LIMIT_BYTES, LOG_TAIL_BYTES, References, Stage, garbage};
pub use cache::{CACHE_LIMIT_BYTES, CACHE_LIMIT_ENTRIES, Cache, cache_name};
pub(super) use durable::{
    make_folder, names_in, names_of, read, remove, sync_folder, write as write_durably,
};
pub use unit_files::{FOLDER as UNIT_FOLDER, UnitFiles};

use super::records::RecordError;
use crate::api::names::AppName;

/// Where the store is on every node; a mount of its own is recommended.
pub const ROOT: &str = "/var/lib/kari";

/// Something that the disk refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A record that cannot be read; nothing is done about it but to say so.
    #[error("cannot read {}: {source}", .path.display())]
    Record {
        /// The record's file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: RecordError,
    },
    /// Another agent runs on this node.
    #[error("{} is locked by another agent on this node: stop that one first", .path.display())]
    Locked {
        /// The store's root.
        path: PathBuf,
    },
    /// A name that must not become a part of a path.
    #[error("{name:?} cannot be the name of a file")]
    Name {
        /// The name.
        name: String,
    },
}

impl StoreError {
    /// Whether there is no room on the disk.
    fn is_full(&self) -> bool {
        match self {
            Self::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ),
            Self::Record { .. } | Self::Locked { .. } | Self::Name { .. } => false,
        }
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// The agent's folder on the node; clones are the same store.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    /// Held for as long as any clone lives.
    _lock: Arc<OwnedFd>,
}

impl Store {
    /// Takes the lock and makes what is missing of the layout.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        durable::make_folder(root, 0o755, None)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(root, flags, Mode::empty())
            .map_err(|e| StoreError::io("open", root)(e.into()))?;
        rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).map_err(|errno| {
            match errno {
                Errno::WOULDBLOCK => StoreError::Locked {
                    path: root.to_owned(),
                },
                errno => StoreError::io("lock", root)(errno.into()),
            }
        })?;
        let store = Self {
            root: root.to_owned(),
            _lock: Arc::new(folder),
        };
        for (name, mode) in [
            ("mirrors", 0o700),
            ("apps", 0o700),
            ("proxy", 0o755),
            ("trash", 0o700),
        ] {
            durable::make_folder(&root.join(name), mode, None)?;
        }
        Ok(store)
    }

    /// The folder that all of this is in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of an app, which need not exist.
    pub fn app(&self, app: &AppName) -> AppFolder {
        AppFolder::new(
            self.clone(),
            app.clone(),
            self.root.join("apps").join(app.to_string()),
        )
    }

    /// Every app that has a folder.
    pub fn apps(&self) -> Result<Vec<AppName>, StoreError> {
        let mut apps: Vec<_> = durable::names_in(&self.root.join("apps"))?
            .iter()
            .filter_map(|name| AppName::parse(name).ok())
            .collect();
        apps.sort();
        Ok(apps)
    }

    /// The folder of the bare mirrors.
    pub fn mirrors(&self) -> PathBuf {
        self.root.join("mirrors")
    }

    /// The folder of the proxy's configuration.
    pub fn proxy(&self) -> PathBuf {
        self.root.join("proxy")
    }

    /// Takes a file or a tree out of its place, durably; it is deleted by [`Store::empty_trash`]. What
    /// does not exist is done.
    pub fn trash(&self, path: &Path) -> Result<(), StoreError> {
        let trash = self.root.join("trash");
        match std::fs::rename(path, trash.join(Uuid::new_v4().to_string())) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(StoreError::io("move to the trash", path)(error)),
        }
        durable::sync_parent(path)
    }

    /// Deletes what is in the trash. Walks trees: for a thread of its own.
    ///
    /// Depth costs neither stack nor file descriptors: a folder that is not empty is moved up into the
    /// trash itself before its parent is removed.
    pub fn empty_trash(&self) -> Result<(), StoreError> {
        let path = self.root.join("trash");
        let wrong = |errno: Errno| StoreError::io("empty", &path)(errno.into());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let trash = rustix::fs::open(&path, flags, Mode::empty()).map_err(wrong)?;
        loop {
            let names = durable::names_of(&trash).map_err(wrong)?;
            let tried = names.len();
            let failures: Vec<Errno> = names
                .iter()
                .filter_map(|name| self.delete_flat(&trash, name).err())
                .collect();
            match failures.first() {
                None if tried == 0 => return Ok(()),
                // What cannot be deleted holds nothing else up.
                Some(errno) if failures.len() == tried => return Err(wrong(*errno)),
                None | Some(_) => {}
            }
        }
    }

    /// Deletes one entry of the trash; its folders become entries of the trash.
    fn delete_flat(&self, trash: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
        match rustix::fs::unlinkat(trash, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(errno) => return Err(errno),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(trash, name, flags, Mode::empty())?;
        // Names are read anew after each round, as a folder may change under a reader that deletes.
        loop {
            let names = durable::names_of(&folder)?;
            if names.is_empty() {
                break;
            }
            for inner in names {
                match rustix::fs::unlinkat(&folder, &inner, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => continue,
                    Err(Errno::ISDIR | Errno::PERM) => {}
                    Err(errno) => return Err(errno),
                }
                match rustix::fs::unlinkat(&folder, &inner, AtFlags::REMOVEDIR) {
                    Ok(()) => {}
                    Err(Errno::NOTEMPTY | Errno::EXIST) => {
                        rustix::fs::renameat(&folder, &inner, trash, Uuid::new_v4().to_string())?;
                    }
                    Err(errno) => return Err(errno),
                }
            }
        }
        rustix::fs::unlinkat(trash, name, AtFlags::REMOVEDIR)
    }

    /// How full the file system of the store is.
    pub fn disk(&self) -> Result<DiskSpace, StoreError> {
        let stat = rustix::fs::statvfs(&self.root)
            .map_err(|e| StoreError::io("measure", &self.root)(e.into()))?;
        Ok(DiskSpace {
            bytes: stat.f_blocks * stat.f_frsize,
            bytes_free: stat.f_bavail * stat.f_frsize,
            inodes: stat.f_files,
            inodes_free: stat.f_favail,
        })
    }
}

/// Bytes that are set aside for records: on a disk that is full a release can still be finished, taken back
/// and removed, which takes some tens of KiB for an app.
const BALLAST_BYTES: usize = 1 << 20;

impl Store {
    /// Sets room for records aside, once there is enough of it.
    pub fn set_ballast(&self) -> Result<(), StoreError> {
        let path = self.ballast();
        let is_there = std::fs::metadata(&path).is_ok_and(|m| m.len() == BALLAST_BYTES as u64);
        if is_there || self.disk()?.shortage(&DiskReserve::DEFAULT).is_some() {
            return Ok(());
        }
        // Nothing that a file system could store in less room.
        let content: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
            .take(BALLAST_BYTES)
            .collect();
        durable::write(&path, &content, 0o600)
    }

    /// Makes that room.
    fn drop_ballast(&self) -> Result<(), StoreError> {
        durable::remove(&self.ballast())
    }

    fn ballast(&self) -> PathBuf {
        self.root.join("ballast")
    }
}

/// Space on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSpace {
    /// All of it.
    pub bytes: u64,
    /// What is left for users without privileges.
    pub bytes_free: u64,
    /// All of them; 0 where a file system does not count them.
    pub inodes: u64,
    /// What is left of them.
    pub inodes_free: u64,
}

/// What builds leave free on the disk. No build starts below it; below half of it the youngest is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskReserve {
    /// Of the bytes, in percent…
    pub bytes_percent: u64,
    /// …but no more than this many bytes: what a build can write between two looks does not grow with the disk.
    pub bytes_at_most: u64,
    /// At least this many bytes…
    pub bytes_at_least: u64,
    /// …but never more than this many percent, so that a small disk is usable.
    pub bytes_at_least_percent: u64,
    /// Of the inodes, in percent.
    pub inodes_percent: u64,
}

impl DiskReserve {
    /// A build can write a gigabyte between two looks at the disk, hence gigabytes.
    pub const DEFAULT: Self = Self {
        bytes_percent: 5,
        bytes_at_most: 10 << 30,
        bytes_at_least: 5 << 30,
        bytes_at_least_percent: 10,
        inodes_percent: 5,
    };
}

impl DiskSpace {
    /// What to tell people when less than `reserve` is free; nothing when all is well.
    pub fn shortage(&self, reserve: &DiskReserve) -> Option<String> {
        self.shortage_below(reserve, 1)
    }

    /// The same for half of `reserve`: the point where running builds are killed.
    pub fn severe_shortage(&self, reserve: &DiskReserve) -> Option<String> {
        self.shortage_below(reserve, 2)
    }

    fn shortage_below(&self, reserve: &DiskReserve, divisor: u64) -> Option<String> {
        const MIB: u64 = 1 << 20;
        let percent_of = |percent: u64, all: u64| all / 100 * percent;
        let share = percent_of(reserve.bytes_percent, self.bytes).min(reserve.bytes_at_most);
        let least = reserve
            .bytes_at_least
            .min(percent_of(reserve.bytes_at_least_percent, self.bytes));
        let bytes = share.max(least) / divisor;
        let inodes = percent_of(reserve.inodes_percent, self.inodes) / divisor;
        if self.bytes_free < bytes {
            Some(format!(
                "{} MiB are free on the disk of {ROOT}, and {} MiB are to stay free of what is fetched and built: make room there",
                self.bytes_free / MIB,
                bytes.div_ceil(MIB)
            ))
        } else if self.inodes_free < inodes {
            Some(format!(
                "{} inodes are free on the disk of {ROOT}, and {inodes} are to stay free of what is fetched and built: make room there",
                self.inodes_free
            ))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("kari")).unwrap();
        (folder, store)
    }

    #[test]
    fn a_second_agent_on_the_node_is_refused_until_the_first_is_gone() {
        let (folder, store) = store();
        let root = folder.path().join("kari");
        assert!(matches!(Store::open(&root), Err(StoreError::Locked { .. })));
        drop(store);
        Store::open(&root).unwrap();
        assert_eq!(
            fs::metadata(root.join("apps"))
                .unwrap()
                .permissions()
                .mode()
                & 0o7777,
            0o700
        );
    }

    #[test]
    fn the_trash_deletes_deep_odd_and_unreadable_trees_and_nothing_outside() {
        let (folder, store) = store();
        let outside = folder.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "kept").unwrap();

        let tree = store.root().join("tree");
        fs::create_dir(&tree).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        fs::create_dir(tree.join("closed")).unwrap();
        fs::write(tree.join("closed/a\nb"), "").unwrap();
        fs::set_permissions(tree.join("closed"), fs::Permissions::from_mode(0o0)).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            tree.join("fifo"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        // Deeper than a path can be long, and than file descriptors last.
        let mut at =
            rustix::fs::open(&tree, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU).unwrap();
            at = rustix::fs::openat(
                &at,
                "deep",
                OFlags::RDONLY | OFlags::DIRECTORY,
                Mode::empty(),
            )
            .unwrap();
        }
        drop(at);

        store.trash(&tree).unwrap();
        assert!(!tree.exists());
        store.trash(&tree).unwrap();
        store.empty_trash().unwrap();
        assert_eq!(fs::read_dir(store.root().join("trash")).unwrap().count(), 0);
        assert_eq!(fs::read_to_string(outside.join("kept")).unwrap(), "kept");
        assert_eq!(fs::metadata(&outside).unwrap().nlink(), 2);
    }

    #[test]
    fn the_reserve_fits_the_disk() {
        const GIB: u64 = 1 << 30;
        let space = |gib, gib_free| DiskSpace {
            bytes: gib * GIB,
            bytes_free: gib_free * GIB,
            inodes: 1000,
            inodes_free: 500,
        };
        for (space, short, severe) in [
            (space(1000, 11), false, false), // 5 % are 50 GiB, but 10 GiB are enough
            (space(1000, 9), true, false),
            (space(1000, 4), true, true),
            (space(160, 9), false, false), // 5 % are 8 GiB
            (space(160, 7), true, false),
            (space(60, 6), false, false), // at least 5 GiB
            (space(60, 4), true, false),
            (space(10, 2), false, false), // but at most a tenth
            (space(10, 0), true, true),
            (
                DiskSpace {
                    inodes_free: 40,
                    ..space(10, 2)
                },
                true,
                false,
            ),
            (
                DiskSpace {
                    inodes: 0,
                    inodes_free: 0,
                    ..space(10, 2)
                },
                false,
                false,
            ),
        ] {
            assert_eq!(
                space.shortage(&DiskReserve::DEFAULT).is_some(),
                short,
                "{space:?}"
            );
            assert_eq!(
                space.severe_shortage(&DiskReserve::DEFAULT).is_some(),
                severe,
                "{space:?}"
            );
        }
    }
}
