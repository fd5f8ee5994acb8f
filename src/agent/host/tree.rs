//! Walking a tree that a build has made: whatever is in it, its links lead nowhere.
//!
//! Without recursion and with few file descriptors, so that depth costs neither
//! stack nor descriptors; without following a symbolic link; however long a path
//! is. Nothing else may change the tree meanwhile but what is harmless to meet.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::store::names_of;

/// What is to be done after a look at an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Visited {
    /// A folder, to be looked into.
    Folder,
    /// Anything else.
    Other,
    /// Enough was seen.
    Enough,
}

/// Where a walk failed.
#[derive(Debug)]
pub(super) struct WalkError {
    /// The entry.
    pub path: PathBuf,
    /// Why.
    pub errno: Errno,
}

/// Opens the root of a tree, which must be a folder itself.
pub(super) fn open_root(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, FLAGS, Mode::empty())
}

/// Shows every entry of the tree at `path` but its root to `visit`, by the open folder that it is in and
/// its name there.
pub(super) fn walk(
    root: &OwnedFd,
    path: &Path,
    mut visit: impl FnMut(&OwnedFd, &OsStr) -> Result<Visited, Errno>,
) -> Result<(), WalkError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        |errno| WalkError { path, errno }
    };
    // Folders that are still to be walked are kept as paths.
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let here = path.join(&relative);
        let folder = open_beneath(root, &relative).map_err(at(&here))?;
        for name in names_of(&folder).map_err(at(&here))? {
            match visit(&folder, &name).map_err(at(&here.join(&name)))? {
                Visited::Folder => pending.push(relative.join(&name)),
                Visited::Other => {}
                Visited::Enough => return Ok(()),
            }
        }
    }
    Ok(())
}

const FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Opens a folder of the tree, however long its path is: in pieces that the kernel takes.
fn open_beneath(root: &OwnedFd, relative: &Path) -> Result<OwnedFd, Errno> {
    /// Bytes of a piece; below `PATH_MAX` (4096) by the longest name.
    const PIECE_BYTES: usize = 3800;
    let open = |at: &OwnedFd, piece: &Path| {
        rustix::fs::openat2(
            at,
            piece,
            FLAGS,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        )
    };
    let mut at = open(root, Path::new("."))?;
    let mut piece = PathBuf::new();
    for part in relative.components() {
        piece.push(part);
        if piece.as_os_str().len() > PIECE_BYTES {
            at = open(&at, &piece)?;
            piece.clear();
        }
    }
    if piece.as_os_str().is_empty() {
        Ok(at)
    } else {
        open(&at, &piece)
    }
}
