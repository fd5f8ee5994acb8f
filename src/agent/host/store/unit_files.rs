//! Unit files and the link that enables a target.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::{StoreError, durable};

/// Where an administrator's units are, and Kari's.
pub const FOLDER: &str = "/etc/systemd/system";

/// The folder of the unit files.
#[derive(Debug, Clone)]
pub struct UnitFiles {
    folder: PathBuf,
}

impl UnitFiles {
    /// Those in `folder`: [`FOLDER`] but for tests.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    /// The path of a unit's file.
    pub fn path(&self, unit: &str) -> Result<PathBuf, StoreError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        if unit.starts_with("kari") && unit.bytes().all(plain) {
            Ok(self.folder.join(unit))
        } else {
            Err(StoreError::Name {
                name: unit.to_owned(),
            })
        }
    }

    /// What a unit's file says; nothing if there is none.
    pub fn read(&self, unit: &str) -> Result<Option<String>, StoreError> {
        let text = durable::read(&self.path(unit)?)?;
        Ok(text.map(|text| String::from_utf8_lossy(&text).into_owned()))
    }

    /// Writes a unit's file, durable before it returns. For a target this is the commit.
    pub fn write(&self, unit: &str, text: &str) -> Result<(), StoreError> {
        durable::write(&self.path(unit)?, text.as_bytes(), 0o644)
    }

    /// Removes a unit's file.
    pub fn remove(&self, unit: &str) -> Result<(), StoreError> {
        durable::remove(&self.path(unit)?)
    }

    /// Makes the link by which the unit starts at boot.
    pub fn enable(&self, unit: &str) -> Result<(), StoreError> {
        if self.is_enabled(unit)? {
            return Ok(());
        }
        let link = self.link(unit)?;
        let parent = self.folder.join(WANTS);
        if !parent.is_dir() {
            durable::make_folder(&parent, 0o755, None)?;
        }
        durable::remove(&link)?;
        symlink(Path::new("..").join(unit), &link).map_err(StoreError::io("link", &link))?;
        durable::sync_parent(&link)
    }

    /// Removes that link, and the folder of links with it if it is empty.
    pub fn disable(&self, unit: &str) -> Result<(), StoreError> {
        let link = self.link(unit)?;
        durable::remove(&link)?;
        let parent = self.folder.join(WANTS);
        match std::fs::remove_dir(&parent) {
            Ok(()) => durable::sync_parent(&parent),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(StoreError::io("remove", &parent)(error)),
        }
    }

    /// Whether the link is there and right.
    pub fn is_enabled(&self, unit: &str) -> Result<bool, StoreError> {
        Ok(std::fs::read_link(self.link(unit)?).is_ok_and(|to| to == Path::new("..").join(unit)))
    }

    /// The names of all files and enabling links of Kari's, sorted.
    pub fn list(&self) -> Result<Vec<String>, StoreError> {
        let mut names = durable::names_in(&self.folder)?;
        names.extend(durable::names_in(&self.folder.join(WANTS))?);
        names.retain(|name| name.starts_with("kari"));
        names.sort();
        names.dedup();
        Ok(names)
    }

    fn link(&self, unit: &str) -> Result<PathBuf, StoreError> {
        self.path(unit)?;
        Ok(self.folder.join(WANTS).join(unit))
    }
}

/// What a boot starts.
const WANTS: &str = "multi-user.target.wants";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_written_enabled_and_taken_away_without_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let files = UnitFiles::new(folder.path());
        let unit = "kari.web.shop.target";
        assert!(!files.is_enabled(unit).unwrap());
        files.write(unit, "[Unit]\n").unwrap();
        files.enable(unit).unwrap();
        files.enable(unit).unwrap();
        assert!(files.is_enabled(unit).unwrap());
        assert_eq!(
            std::fs::read_to_string(folder.path().join(WANTS).join(unit)).unwrap(),
            "[Unit]\n"
        );
        assert_eq!(files.read(unit).unwrap().as_deref(), Some("[Unit]\n"));
        std::fs::write(folder.path().join("other.service"), "").unwrap();
        assert_eq!(files.list().unwrap(), [unit]);
        files.disable(unit).unwrap();
        files.remove(unit).unwrap();
        files.remove(unit).unwrap();
        assert_eq!(files.list().unwrap(), Vec::<String>::new());
        assert_eq!(durable::names_in(folder.path()).unwrap(), ["other.service"]);
    }

    #[test]
    fn a_name_that_is_not_karis_is_refused() {
        let files = UnitFiles::new(Path::new("/nowhere"));
        for name in [
            "sshd.service",
            "kari/../x",
            "kari x.service",
            "kari%n.service",
            "",
        ] {
            assert!(
                matches!(files.write(name, ""), Err(StoreError::Name { .. })),
                "{name}"
            );
        }
    }
}
