//! Sealing: a stage becomes an immutable tree.
//!
//! The tree becomes root's and nobody can write it; everybody who can reach it
//! (which its parents' modes and the jails decide) can read it. What a running
//! process could have kept open does not matter, because the caller has stopped
//! the step's unit and its cgroup is empty.
//!
//! Idempotent: a seal that was cut short is begun again; only the final name
//! counts, and only a whole tree ever has it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid};
use rustix::io::Errno;

use super::records::BuildKey;
use super::store::{AppFolder, StoreError, sync_folder};
use super::tree::{Visited, WalkError, open_root, walk};

/// A tree that could not be sealed, or a folder that is not in it.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A system call failed.
    #[error("cannot seal {}: {source}", .path.display())]
    Io {
        /// Where in the tree.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is neither a stage nor a sealed tree.
    #[error("there is no build of {key} to seal")]
    NothingToSeal {
        /// The key.
        key: BuildKey,
    },
    /// `source.git.directory` is no folder of the tree.
    #[error(
        "source.git.directory {directory:?} is not a folder of the commit; links that lead out of the repository do not count"
    )]
    DirectoryNotFound {
        /// As the spec has it.
        directory: String,
    },
}

/// Makes the stage of a build its sealed tree, and gives back where that is. The step's unit must be
/// stopped. Walks trees: for a thread of its own.
pub fn seal(folder: &AppFolder, key: &BuildKey, build_try: u32) -> Result<PathBuf, SealError> {
    let stage = folder.stage(key, build_try);
    let tree = folder.build(key);
    if folder.has_build(key) {
        folder.store().trash(&stage.path)?;
        return Ok(tree);
    }
    let source = stage.source();
    // What the build left in its /tmp is nobody's business, and need not be synced.
    folder.store().trash(&stage.temporary())?;
    let root = match open_root(&source) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Err(SealError::NothingToSeal { key: key.clone() }),
        Err(errno) => return Err(wrong(&source)(errno)),
    };
    own_tree(&root, &source)?;
    // Before the rename: a power cut must not leave a name without its data.
    rustix::fs::syncfs(&root).map_err(wrong(&source))?;
    std::fs::rename(&source, &tree).map_err(|source| SealError::Io {
        path: tree.clone(),
        source,
    })?;
    sync_folder(&folder.path().join("builds"))?;
    folder.store().trash(&stage.path)?;
    Ok(tree)
}

/// Checks that `directory` is a folder of the tree, and that no link on the way leads out of it.
pub fn resolve_beneath(tree: &Path, directory: Option<&str>) -> Result<(), SealError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(tree, flags, Mode::empty()).map_err(wrong(tree))?;
    let Some(directory) = directory.filter(|directory| !directory.is_empty()) else {
        return Ok(());
    };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(&root, directory, flags, Mode::empty(), resolve) {
        Ok(_) => Ok(()),
        // Missing, not a folder, out of the tree, a loop of links, not a path at all.
        Err(
            Errno::NOENT
            | Errno::NOTDIR
            | Errno::XDEV
            | Errno::LOOP
            | Errno::INVAL
            | Errno::NAMETOOLONG
            | Errno::ACCESS,
        ) => Err(SealError::DirectoryNotFound {
            directory: directory.to_owned(),
        }),
        Err(errno) => Err(wrong(&tree.join(directory))(errno)),
    }
}

fn wrong(path: &Path) -> impl Fn(Errno) -> SealError {
    move |errno| SealError::Io {
        path: path.to_owned(),
        source: errno.into(),
    }
}

/// Gives the whole tree to root.
fn own_tree(root: &OwnedFd, path: &Path) -> Result<(), SealError> {
    let stat = rustix::fs::fstat(root).map_err(wrong(path))?;
    if !is_owned(&stat) {
        rustix::fs::fchown(root, Some(Uid::ROOT), Some(Gid::ROOT)).map_err(wrong(path))?;
    }
    rustix::fs::fchmod(root, sealed_mode(&stat)).map_err(wrong(path))?;

    walk(root, path, own_entry).map_err(|WalkError { path, errno }| wrong(&path)(errno))
}

fn own_entry(folder: &OwnedFd, name: &OsStr) -> Result<Visited, Errno> {
    let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    match kind {
        // Nothing that runs can use them, and to open one can block for ever.
        FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => {
            rustix::fs::unlinkat(folder, name, AtFlags::empty())?;
            return Ok(Visited::Other);
        }
        FileType::RegularFile | FileType::Directory | FileType::Symlink => {}
    }
    if !is_owned(&stat) {
        rustix::fs::chownat(
            folder,
            name,
            Some(Uid::ROOT),
            Some(Gid::ROOT),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
    }
    if kind == FileType::Symlink {
        return Ok(Visited::Other);
    }
    let mode = sealed_mode(&stat);
    // A change of the owner may have taken bits away, so what it was does not tell what it is.
    if !is_owned(&stat) || Mode::from_raw_mode(stat.st_mode) != mode {
        rustix::fs::chmodat(folder, name, mode, AtFlags::empty())?;
    }
    Ok(if kind == FileType::Directory {
        Visited::Folder
    } else {
        Visited::Other
    })
}

fn is_owned(stat: &Stat) -> bool {
    stat.st_uid == 0 && stat.st_gid == 0
}

/// `a+rX,go-w`, and no set-id bits: what is executable for one is for all.
fn sealed_mode(stat: &Stat) -> Mode {
    let bits = stat.st_mode & 0o777;
    let folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    let executable = if folder || bits & 0o111 != 0 {
        0o111
    } else {
        0
    };
    Mode::from_raw_mode((bits | 0o444 | executable) & !0o022)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    use super::*;
    use crate::agent::host::store::{Stage, Store};
    use crate::api::names::AppName;

    struct Fixture {
        _root: tempfile::TempDir,
        folder: AppFolder,
        key: BuildKey,
        stage: Stage,
    }

    /// The user of the tests' builds.
    const BUILDER: u32 = 50_999;

    fn fixture() -> Fixture {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let folder = store.app(&AppName::new("web", "shop").unwrap());
        folder.create().unwrap();
        let key = BuildKey::of(b"build");
        let stage = folder.create_stage(&key, 0, BUILDER, None).unwrap();
        Fixture {
            _root: root,
            folder,
            key,
            stage,
        }
    }

    fn put(path: &Path, mode: u32) {
        fs::write(path, "x").unwrap();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        chown(path, Some(BUILDER), Some(BUILDER)).unwrap();
    }

    fn owner_and_mode(path: &Path) -> (u32, u32) {
        let metadata = fs::symlink_metadata(path).unwrap();
        (metadata.uid(), metadata.mode() & 0o7777)
    }

    #[test]
    fn a_sealed_tree_is_roots_readable_and_closed_to_writers() {
        let Fixture {
            _root,
            folder,
            key,
            stage,
        } = fixture();
        let source = stage.source();
        put(&source.join("secret"), 0o600);
        put(&source.join("open"), 0o666);
        put(&source.join("tool"), 0o700);
        fs::create_dir(source.join("closed")).unwrap();
        put(&source.join("closed/inner\nname"), 0o4755);
        fs::hard_link(source.join("open"), source.join("closed/hard")).unwrap();
        fs::set_permissions(source.join("closed"), Permissions::from_mode(0o0)).unwrap();
        symlink("/etc/hostname", source.join("link")).unwrap();
        let fifo = source.join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(source.join("socket")).unwrap();
        let outside = owner_and_mode(Path::new("/etc/hostname"));

        let tree = seal(&folder, &key, 0).unwrap();

        assert_eq!(tree, folder.build(&key));
        for (name, mode) in [
            ("secret", 0o644),
            ("open", 0o644),
            ("tool", 0o755),
            ("closed", 0o555),
            ("closed/inner\nname", 0o755),
            ("closed/hard", 0o644),
        ] {
            assert_eq!(owner_and_mode(&tree.join(name)), (0, mode), "{name}");
        }
        assert_eq!(owner_and_mode(&tree), (0, 0o755));
        assert_eq!(owner_and_mode(&tree.join("link")).0, 0);
        assert_eq!(
            owner_and_mode(Path::new("/etc/hostname")),
            outside,
            "a link is not followed"
        );
        assert!(!tree.join("fifo").exists() && !tree.join("socket").exists());
        assert!(!stage.path.exists());
    }

    #[test]
    fn a_seal_that_was_cut_short_is_finished_and_a_finished_one_stays() {
        let Fixture {
            _root,
            folder,
            key,
            stage,
        } = fixture();
        put(&stage.source().join("a"), 0o600);
        // As after a kill in the middle: some of it is root's already, the temporary folder is gone.
        chown(stage.source(), Some(0), Some(0)).unwrap();
        fs::remove_dir_all(stage.temporary()).unwrap();
        let tree = seal(&folder, &key, 0).unwrap();
        assert_eq!(owner_and_mode(&tree.join("a")), (0, 0o644));

        // The agent does not know that it had sealed, and asks again.
        assert_eq!(seal(&folder, &key, 0).unwrap(), tree);
        // Another try of the same build has come too late.
        let late = folder.create_stage(&key, 1, BUILDER, None).unwrap();
        put(&late.source().join("b"), 0o600);
        assert_eq!(seal(&folder, &key, 1).unwrap(), tree);
        assert!(!tree.join("b").exists() && !late.path.exists());
    }

    #[test]
    fn without_a_stage_there_is_nothing_to_seal() {
        let Fixture {
            _root,
            folder,
            stage: _,
            key: _,
        } = fixture();
        let key = BuildKey::of(b"another");
        assert!(matches!(
            seal(&folder, &key, 0),
            Err(SealError::NothingToSeal { .. })
        ));
    }

    #[test]
    fn a_tree_that_is_deeper_than_a_path_is_long_is_sealed() {
        let Fixture {
            _root,
            folder,
            key,
            stage,
        } = fixture();
        let mut at = rustix::fs::open(
            stage.source(),
            OFlags::RDONLY | OFlags::DIRECTORY,
            Mode::empty(),
        )
        .unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "deep", Mode::RUSR | Mode::WUSR | Mode::XUSR).unwrap();
            at = rustix::fs::openat(
                &at,
                "deep",
                OFlags::RDONLY | OFlags::DIRECTORY,
                Mode::empty(),
            )
            .unwrap();
        }
        seal(&folder, &key, 0).unwrap();
        assert_eq!(
            rustix::fs::fstat(&at).unwrap().st_mode & 0o777,
            0o755,
            "the deepest folder is sealed"
        );
        folder.store().trash(&folder.build(&key)).unwrap();
        folder.store().empty_trash().unwrap();
    }

    #[test]
    fn a_directory_is_found_only_beneath_the_tree() {
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("tree");
        fs::create_dir_all(tree.join("services/shop")).unwrap();
        fs::write(tree.join("file"), "").unwrap();
        symlink("services", tree.join("inside")).unwrap();
        symlink("../..", tree.join("out")).unwrap();
        symlink("/etc", tree.join("etc")).unwrap();
        symlink("loop", tree.join("loop")).unwrap();
        for directory in [
            None,
            Some("."),
            Some("services/shop"),
            Some("inside/shop"),
            Some("services/../services"),
        ] {
            resolve_beneath(&tree, directory)
                .unwrap_or_else(|error| panic!("{directory:?}: {error}"));
        }
        for directory in [
            "missing", "file", "out", "etc", "loop", "..", "/etc", "a\0b",
        ] {
            let refused = resolve_beneath(&tree, Some(directory));
            assert!(
                matches!(refused, Err(SealError::DirectoryNotFound { .. })),
                "{directory}: {refused:?}"
            );
        }
    }
}
