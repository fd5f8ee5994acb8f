//! What holds commits in a mirror, read and removed beneath the mirror's folder without following a symbolic
//! link: the folder is kari-git's.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags, openat2, unlinkat};
use rustix::io::Errno;

use super::hold_reference;
use crate::api::names::{AppName, Commit};

/// A reference is a commit and a newline.
const LONGEST_REFERENCE_BYTES: u64 = 128;

/// The commit that is held for an app; nothing if there is none.
pub(super) fn held(mirror: &Path, app: &AppName) -> io::Result<Option<Commit>> {
    let Some(file) = open(
        mirror,
        &hold_reference(app),
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK,
    )?
    else {
        return Ok(None);
    };
    let mut text = String::new();
    // What is not text is no commit.
    match File::from(file)
        .take(LONGEST_REFERENCE_BYTES)
        .read_to_string(&mut text)
    {
        Ok(_) => Ok(Commit::parse(text.trim_end()).ok()),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(error),
    }
}

/// Lets go of an app's commit; true if there was one.
pub(super) fn release(mirror: &Path, app: &AppName) -> io::Result<bool> {
    let folder = format!("refs/kari/{}", app.namespace());
    let Some(folder) = open(mirror, &folder, OFlags::RDONLY | OFlags::DIRECTORY)? else {
        return Ok(false);
    };
    match unlinkat(&folder, app.name(), AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether any app's commit is held.
pub(super) fn holds_any(mirror: &Path) -> io::Result<bool> {
    for namespace in entries(mirror, "refs/kari")? {
        if !entries(mirror, &format!("refs/kari/{namespace}"))?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn entries(mirror: &Path, folder: &str) -> io::Result<Vec<String>> {
    let Some(folder) = open(mirror, folder, OFlags::RDONLY | OFlags::DIRECTORY)? else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        match entry.file_name().to_str() {
            Ok("." | "..") | Err(_) => {}
            Ok(name) => names.push(name.to_owned()),
        }
    }
    Ok(names)
}

/// Opens beneath the mirror; nothing if it is not there, or not reached without a symbolic link.
fn open(mirror: &Path, path: &str, flags: OFlags) -> io::Result<Option<OwnedFd>> {
    let root = match File::open(mirror) {
        Ok(root) => root,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    match openat2(&root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
        Ok(file) => Ok(Some(file)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn app(name: &str) -> AppName {
        AppName::parse(name).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn a_hold_is_read_and_let_go_and_the_last_one_is_known() -> io::Result<()> {
        let mirror = tempfile::tempdir()?;
        let (shop, blog) = (app("web.shop"), app("web.blog"));
        assert_eq!(held(mirror.path(), &shop)?, None);
        assert!(!holds_any(mirror.path())?);
        fs::create_dir_all(mirror.path().join("refs/kari/web"))?;
        fs::write(
            mirror.path().join("refs/kari/web/shop"),
            format!("{}\n", "a".repeat(40)),
        )?;
        fs::write(mirror.path().join("refs/kari/web/blog"), "not a commit\n")?;
        assert_eq!(
            held(mirror.path(), &shop)?.map(|c| c.to_string()),
            Some("a".repeat(40))
        );
        assert_eq!(held(mirror.path(), &blog)?, None);
        assert!(release(mirror.path(), &shop)?);
        assert!(!release(mirror.path(), &shop)?);
        assert!(holds_any(mirror.path())?);
        assert!(release(mirror.path(), &blog)?);
        assert!(!holds_any(mirror.path())?);
        Ok(())
    }

    #[test]
    fn a_symbolic_link_in_a_mirror_leads_nowhere() -> io::Result<()> {
        let mirror = tempfile::tempdir()?;
        let outside = tempfile::tempdir()?;
        fs::write(outside.path().join("shop"), format!("{}\n", "a".repeat(40)))?;
        fs::create_dir_all(mirror.path().join("refs/kari"))?;
        symlink(outside.path(), mirror.path().join("refs/kari/web"))?;
        assert_eq!(held(mirror.path(), &app("web.shop"))?, None);
        assert!(!release(mirror.path(), &app("web.shop"))?);
        assert!(outside.path().join("shop").exists());
        Ok(())
    }
}
