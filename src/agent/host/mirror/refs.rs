//! What holds commits in a mirror, read and removed beneath the mirror's folder without following a symbolic
//! link: the folder is kari-git's.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags, openat2, unlinkat};
use rustix::io::Errno;

use super::step::{base_word, submodules_word};
use super::{FetchFailure, Want, finding_path, hold_reference};
use crate::api::names::{AppName, Commit};
use crate::api::reasons::Reason;

/// A reference is a commit and a newline.
const LONGEST_REFERENCE_BYTES: u64 = 128;

/// Bytes of a finding: two commits, two words, and why; what is cut off is the end of a long url.
const LONGEST_FINDING_BYTES: u64 = 2048;

/// What is there for an app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    /// The commit.
    pub commit: Commit,
    /// What was found of it.
    pub finding: Option<Finding>,
}

/// Whether a commit is as it was wanted, as the fetch found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    /// What was looked at: commit, base and submodules, as the script has them.
    asked: String,
    /// Why it will not do.
    refusal: Option<(Reason, String)>,
}

impl Finding {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.trim_end().splitn(5, ' ');
        let asked = [words.next()?, words.next()?, words.next()?].join(" ");
        let refusal = match (words.next()?, words.next()?) {
            ("granted", _) => None,
            ("rewind", _) => Some((Reason::RewindRefused, String::new())),
            ("submodules", why) => {
                let shown = |c: &char| !c.is_control();
                Some((Reason::InvalidSpec, why.chars().filter(shown).collect()))
            }
            _ => return None,
        };
        Some(Self { asked, refusal })
    }

    #[cfg(test)]
    pub(super) fn of(want: &Want, refusal: Option<(Reason, String)>) -> Self {
        Self {
            asked: asked(want),
            refusal,
        }
    }
}

fn asked(want: &Want) -> String {
    let Want {
        source: _,
        reference: _,
        commit,
        base,
        submodules,
        credential: _,
    } = want;
    format!(
        "{commit} {} {}",
        base_word(base.as_ref()),
        submodules_word(*submodules)
    )
}

impl Held {
    /// Whether this is what is wanted, and if so, why it will not do; nothing while it is not known.
    pub(super) fn answer(&self, want: &Want) -> Option<Result<(), FetchFailure>> {
        let Self { commit, finding } = self;
        if *commit != want.commit {
            return None;
        }
        if !want.submodules && want.base.as_ref().is_none_or(|base| base == commit) {
            return Some(Ok(()));
        }
        let finding = finding.as_ref()?;
        if finding.asked != asked(want) {
            return None;
        }
        let Some((reason, why)) = &finding.refusal else {
            return Some(Ok(()));
        };
        let message = match (&want.base, reason) {
            (Some(base), Reason::RewindRefused) => format!(
                "{} does not descend from {}, which runs here, and source.git.allowRewind is false: push a commit that does, or set allowRewind to true",
                commit.short(),
                base.short()
            ),
            _ => format!(
                "the submodules of {} cannot be checked out: {why}; mend it in the repository, or set source.git.submodules to false",
                commit.short()
            ),
        };
        Some(Err(FetchFailure {
            reason: *reason,
            message,
        }))
    }
}

/// What is held for an app; nothing if there is nothing.
pub(super) fn held(mirror: &Path, app: &AppName) -> io::Result<Option<Held>> {
    let commit = read(mirror, &hold_reference(app), LONGEST_REFERENCE_BYTES)?;
    let Some(commit) = commit.and_then(|text| Commit::parse(text.trim_end()).ok()) else {
        return Ok(None);
    };
    let finding = read(mirror, &finding_path(app), LONGEST_FINDING_BYTES)?;
    let finding = finding.and_then(|text| Finding::parse(&text));
    Ok(Some(Held { commit, finding }))
}

/// The text of a file beneath the mirror; what is not text is nothing.
fn read(mirror: &Path, path: &str, longest: u64) -> io::Result<Option<String>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let Some(file) = open(mirror, path, flags)? else {
        return Ok(None);
    };
    let mut text = Vec::new();
    File::from(file).take(longest).read_to_end(&mut text)?;
    Ok(String::from_utf8(text).ok())
}

/// Lets go of an app's commit; true if there was one.
pub(super) fn release(mirror: &Path, app: &AppName) -> io::Result<bool> {
    unlink(mirror, &finding_path(app))?;
    unlink(mirror, &hold_reference(app))
}

fn unlink(mirror: &Path, path: &str) -> io::Result<bool> {
    let Some((folder, name)) = path.rsplit_once('/') else {
        return Ok(false);
    };
    let Some(folder) = open(mirror, folder, OFlags::RDONLY | OFlags::DIRECTORY)? else {
        return Ok(false);
    };
    match unlinkat(&folder, name, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The apps whose commits are held.
pub(super) fn holders(mirror: &Path) -> io::Result<Vec<AppName>> {
    let mut holders = Vec::new();
    for namespace in entries(mirror, "refs/kari")? {
        let names = entries(mirror, &format!("refs/kari/{namespace}"))?;
        holders.extend(
            names
                .iter()
                .filter_map(|name| AppName::new(&namespace, name).ok()),
        );
    }
    Ok(holders)
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
    fn a_finding_answers_what_was_asked_and_is_read_whatever_it_says() -> io::Result<()> {
        let mirror = tempfile::tempdir()?;
        let shop = app("web.shop");
        let commit = Commit::parse(&"a".repeat(40)).unwrap_or_else(|e| panic!("{e}"));
        let want = Want {
            source: crate::agent::host::mirror::SourceUrl::parse("https://h/r")
                .unwrap_or_else(|e| panic!("{e}")),
            reference: None,
            commit: commit.clone(),
            base: None,
            submodules: true,
            credential: None,
        };
        for folder in ["refs/kari/web", "findings/web"] {
            fs::create_dir_all(mirror.path().join(folder))?;
        }
        fs::write(
            mirror.path().join("refs/kari/web/shop"),
            format!("{commit}\n"),
        )?;
        for (finding, expected) in [
            (format!("{commit} - submodules granted -\n"), Some(None)),
            (
                format!("{commit} - submodules submodules lib: no\u{1b} url\n"),
                Some(Some("lib: no url")),
            ),
            (format!("{commit} - - granted -\n"), None),
            (format!("{} - submodules granted -\n", "b".repeat(40)), None),
            (format!("{commit} - submodules perhaps -\n"), None),
            (format!("{commit}"), None),
            (String::new(), None),
            ("\n\n     ".to_owned(), None),
        ] {
            fs::write(mirror.path().join("findings/web/shop"), &finding)?;
            let here = held(mirror.path(), &shop)?.unwrap_or_else(|| panic!("held"));
            match (here.answer(&want), expected) {
                (None, None) | (Some(Ok(())), Some(None)) => {}
                (Some(Err(failure)), Some(Some(why))) => {
                    assert_eq!(failure.reason, Reason::InvalidSpec);
                    assert!(failure.message.contains(why), "{failure}");
                }
                other => panic!("{finding:?}: {other:?}"),
            }
        }
        assert!(release(mirror.path(), &shop)?);
        assert!(!mirror.path().join("findings/web/shop").exists());
        Ok(())
    }

    #[test]
    fn a_hold_is_read_and_let_go_and_the_last_one_is_known() -> io::Result<()> {
        let mirror = tempfile::tempdir()?;
        let (shop, blog) = (app("web.shop"), app("web.blog"));
        assert_eq!(held(mirror.path(), &shop)?, None);
        assert_eq!(holders(mirror.path())?, []);
        fs::create_dir_all(mirror.path().join("refs/kari/web"))?;
        fs::write(
            mirror.path().join("refs/kari/web/shop"),
            format!("{}\n", "a".repeat(40)),
        )?;
        fs::write(mirror.path().join("refs/kari/web/blog"), "not a commit\n")?;
        assert_eq!(
            held(mirror.path(), &shop)?.map(|held| held.commit.to_string()),
            Some("a".repeat(40))
        );
        assert_eq!(held(mirror.path(), &blog)?, None);
        assert!(release(mirror.path(), &shop)?);
        assert!(!release(mirror.path(), &shop)?);
        assert_eq!(holders(mirror.path())?, std::slice::from_ref(&blog));
        assert!(release(mirror.path(), &blog)?);
        assert_eq!(holders(mirror.path())?, []);
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
