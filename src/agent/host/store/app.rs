//! The folder of an app.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::{Store, StoreError, durable};
use crate::agent::host::records::{
    self, AppliedRecord, AttemptRecord, BuildKey, EnvDigest, KeptRecord, Record, ReleaseRecord,
    UsersRecord,
};
use crate::api::names::{AppName, ReleaseId, RevisionName};

/// Bytes of a log above which its step is killed: a flood can fill a disk in seconds.
pub const LOG_LIMIT_BYTES: u64 = 64 << 20;

/// Bytes of the end of a log that status carries at most.
pub const LOG_TAIL_BYTES: usize = 4096;

/// The folder of an app: `apps/<namespace>.<name>/`, root's alone. It need not exist; what is read from
/// one that does not is absent, and [`AppFolder::create`] makes it.
#[derive(Debug, Clone)]
pub struct AppFolder {
    store: Store,
    app: AppName,
    path: PathBuf,
}

/// A build's place while it runs: `stage/<key>.<try>/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Root's own; what the build sees is below.
    pub path: PathBuf,
}

impl Stage {
    /// The tree, owned by the build user: the checkout, and what the build makes of it.
    pub fn source(&self) -> PathBuf {
        self.path.join("source")
    }
    /// The build's /tmp and home.
    pub fn temporary(&self) -> PathBuf {
        self.path.join("tmp")
    }
    /// The build's script, root's.
    pub fn script(&self) -> PathBuf {
        self.path.join("build")
    }

    /// Makes a folder of the tree for the user `uid`, its parents too. Only in a stage that is new: of what
    /// a build has made, a link could lead anywhere. `relative` has no `..`.
    pub fn create_folder(&self, relative: &Path, uid: u32) -> Result<(), StoreError> {
        let mut path = self.source();
        for part in relative.components() {
            path.push(part);
            durable::make_folder(&path, 0o755, Some(uid))?;
        }
        Ok(())
    }
}

impl AppFolder {
    pub(super) fn new(store: Store, app: AppName, path: PathBuf) -> Self {
        Self { store, app, path }
    }

    /// Whose it is.
    pub fn app(&self) -> &AppName {
        &self.app
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The store it is in.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Makes it with its inner folders.
    pub fn create(&self) -> Result<(), StoreError> {
        durable::make_folder(&self.path, 0o700, None)?;
        for name in [
            "releases", "builds", "stage", "cache", "state", "env", "logs",
        ] {
            durable::make_folder(&self.path.join(name), 0o700, None)?;
        }
        Ok(())
    }

    /// Takes it away whole: the last act of a removal that keeps no state.
    pub fn remove(&self) -> Result<(), StoreError> {
        self.store.trash(&self.path)
    }

    /// Takes away all but `state/` and `users.json`, which keeps the state's owner from being given to
    /// another app: the last act of a removal that keeps state.
    pub fn remove_all_but_state(&self) -> Result<(), StoreError> {
        // applied.json carries the tombstone, so it goes last.
        for name in [
            "attempt.json",
            "releases",
            "builds",
            "stage",
            "cache",
            "env",
            "logs",
            "applied.json",
        ] {
            self.store.trash(&self.path.join(name))?;
        }
        Ok(())
    }

    /// Whether any process has state.
    pub fn has_state(&self) -> Result<bool, StoreError> {
        Ok(!durable::names_in(&self.path.join("state"))?.is_empty())
    }

    /// Takes the state of all processes away.
    pub fn remove_state(&self) -> Result<(), StoreError> {
        self.store.trash(&self.path.join("state"))
    }

    /// Whether there is more than what [`AppFolder::remove_all_but_state`] leaves beside `kept.json`.
    pub fn holds_more_than_state(&self) -> Result<bool, StoreError> {
        if !self.path.exists() {
            return Ok(false);
        }
        let names = durable::names_in(&self.path)?;
        let is_kept = names.iter().any(|name| name == "kept.json");
        let of_state =
            |name: &String| matches!(name.as_str(), "state" | "users.json" | "kept.json");
        Ok(!is_kept || !names.iter().all(of_state))
    }

    // ---- Records ----

    /// Writes a record; on a disk that is full, into the room that is set aside for them.
    fn write_record<R: Record>(&self, path: &Path, record: &R) -> Result<(), StoreError> {
        let text = records::render(record).map_err(|source| StoreError::Record {
            path: path.to_owned(),
            source,
        })?;
        match durable::write(path, &text, 0o600) {
            Err(error) if error.is_full() => {
                tracing::warn!(
                    "the disk is full: records are written into the room that is set aside for them"
                );
                self.store.drop_ballast()?;
                durable::write(path, &text, 0o600)
            }
            written => written,
        }
    }

    /// `kept.json`.
    pub fn read_kept(&self) -> Result<Option<KeptRecord>, StoreError> {
        read_record(&self.path.join("kept.json"))
    }
    /// `kept.json`.
    pub fn write_kept(&self, record: &KeptRecord) -> Result<(), StoreError> {
        self.write_record(&self.path.join("kept.json"), record)
    }
    /// `kept.json`.
    pub fn remove_kept(&self) -> Result<(), StoreError> {
        durable::remove(&self.path.join("kept.json"))
    }

    /// `applied.json`.
    pub fn read_applied(&self) -> Result<Option<AppliedRecord>, StoreError> {
        read_record(&self.path.join("applied.json"))
    }
    /// `applied.json`.
    pub fn write_applied(&self, record: &AppliedRecord) -> Result<(), StoreError> {
        self.write_record(&self.path.join("applied.json"), record)
    }
    /// `attempt.json`.
    pub fn read_attempt(&self) -> Result<Option<AttemptRecord>, StoreError> {
        read_record(&self.path.join("attempt.json"))
    }
    /// `attempt.json`.
    pub fn write_attempt(&self, record: &AttemptRecord) -> Result<(), StoreError> {
        self.write_record(&self.path.join("attempt.json"), record)
    }
    /// `attempt.json`.
    pub fn remove_attempt(&self) -> Result<(), StoreError> {
        durable::remove(&self.path.join("attempt.json"))
    }
    /// `users.json`.
    pub fn read_users(&self) -> Result<Option<UsersRecord>, StoreError> {
        read_record(&self.path.join("users.json"))
    }
    /// `users.json`.
    pub fn write_users(&self, record: &UsersRecord) -> Result<(), StoreError> {
        self.write_record(&self.path.join("users.json"), record)
    }
    /// `releases/<revision>.json`.
    pub fn read_release(
        &self,
        revision: &RevisionName,
    ) -> Result<Option<ReleaseRecord>, StoreError> {
        read_record(&self.release(revision)?)
    }
    /// `releases/<revision>.json`.
    pub fn write_release(&self, record: &ReleaseRecord) -> Result<(), StoreError> {
        self.write_record(&self.release(&record.revision)?, record)
    }
    /// All of `releases/`, the newest first. One that cannot be read is an error: what it refers to must
    /// not be collected.
    pub fn releases(&self) -> Result<Vec<ReleaseRecord>, StoreError> {
        let mut releases = Vec::new();
        for revision in self.revisions()? {
            releases.extend(self.read_release(&revision)?);
        }
        releases.sort_by_key(|release: &ReleaseRecord| std::cmp::Reverse(release.committed_at));
        Ok(releases)
    }

    fn release(&self, revision: &RevisionName) -> Result<PathBuf, StoreError> {
        let name = file_name(revision.as_str())?;
        Ok(self.path.join("releases").join(format!("{name}.json")))
    }

    fn revisions(&self) -> Result<Vec<RevisionName>, StoreError> {
        let names = durable::names_in(&self.path.join("releases"))?;
        Ok(names
            .iter()
            .filter_map(|name| name.strip_suffix(".json"))
            .map(RevisionName::new)
            .collect())
    }

    // ---- Builds ----

    /// Where the sealed tree of a key is, or would be.
    pub fn build(&self, key: &BuildKey) -> PathBuf {
        self.path.join("builds").join(key.as_str())
    }

    /// Whether it is there. Only whole trees ever are.
    pub fn has_build(&self, key: &BuildKey) -> bool {
        self.build(key).is_dir()
    }

    /// The stage of a build, which need not exist.
    pub fn stage(&self, key: &BuildKey, build_try: u32) -> Stage {
        Stage {
            path: self.path.join("stage").join(format!("{key}.{build_try}")),
        }
    }

    /// Makes the stage of a build anew, for the user `uid`; what stood there goes to the trash, so its
    /// unit must be stopped.
    pub fn create_stage(
        &self,
        key: &BuildKey,
        build_try: u32,
        uid: u32,
        script: Option<&str>,
    ) -> Result<Stage, StoreError> {
        let stage = self.stage(key, build_try);
        self.store.trash(&stage.path)?;
        durable::make_folder(&stage.path, 0o700, None)?;
        durable::make_folder(&stage.source(), 0o755, Some(uid))?;
        durable::make_folder(&stage.temporary(), 0o700, Some(uid))?;
        durable::make_folder(&stage.temporary().join("home"), 0o700, Some(uid))?;
        if let Some(script) = script {
            durable::write(&stage.script(), script.as_bytes(), 0o644)?;
        }
        Ok(stage)
    }

    // ---- Logs ----

    /// The log of a step. It is opened by root before the jail, so its folder is root's alone.
    pub fn log(&self, release_id: &ReleaseId, step: &str) -> PathBuf {
        self.path.join("logs").join(format!("{release_id}.{step}"))
    }

    /// Adds a line of the agent's own to a log.
    pub fn append_log(
        &self,
        release_id: &ReleaseId,
        step: &str,
        line: &str,
    ) -> Result<(), StoreError> {
        let path = self.log(release_id, step);
        let mut options = fs::OpenOptions::new();
        options.append(true).create(true).mode(0o600);
        options
            .open(&path)
            .and_then(|mut log| log.write_all(format!("kari: {line}\n").as_bytes()))
            .map_err(StoreError::io("write", &path))
    }

    /// Bytes of a log so far; 0 if there is none.
    pub fn log_bytes(&self, release_id: &ReleaseId, step: &str) -> u64 {
        fs::metadata(self.log(release_id, step)).map_or(0, |metadata| metadata.len())
    }

    /// The last lines of a log, at most [`LOG_TAIL_BYTES`], as text without control characters; nothing
    /// if there is no log or nothing in it.
    pub fn log_tail(
        &self,
        release_id: &ReleaseId,
        step: &str,
    ) -> Result<Option<String>, StoreError> {
        let path = self.log(release_id, step);
        let read = || -> io::Result<(Vec<u8>, bool)> {
            let mut file = fs::File::open(&path)?;
            let length = file.metadata()?.len();
            let start = length.saturating_sub(LOG_TAIL_BYTES as u64);
            file.seek(io::SeekFrom::Start(start))?;
            let mut content = Vec::with_capacity(LOG_TAIL_BYTES);
            file.take(LOG_TAIL_BYTES as u64).read_to_end(&mut content)?;
            Ok((content, start > 0))
        };
        match read() {
            Ok((content, cut)) => Ok(tail_of(&content, cut)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("read", &path)(error)),
        }
    }

    // ---- Environment and state ----

    /// Where the environment file of a digest is, or would be.
    pub fn env_file(&self, digest: &EnvDigest) -> PathBuf {
        self.path.join("env").join(digest.as_str())
    }

    /// Writes an environment file; one of the same content stays as it is.
    pub fn write_env(&self, content: &[u8]) -> Result<(EnvDigest, PathBuf), StoreError> {
        let digest = EnvDigest::of(content);
        let path = self.write_env_as(&digest, content)?;
        Ok((digest, path))
    }

    /// Writes the environment file of a digest that stands for its content; one of the same content stays as
    /// it is.
    pub fn write_env_as(&self, digest: &EnvDigest, content: &[u8]) -> Result<PathBuf, StoreError> {
        let path = self.env_file(digest);
        let stands = durable::read(&path)?.map(Zeroizing::new);
        if stands.as_deref().map(Vec::as_slice) != Some(content) {
            durable::write(&path, content, 0o600)?;
        }
        Ok(path)
    }

    /// Where the state folder of a process is, or would be.
    pub fn state_folder(&self, process: &str) -> PathBuf {
        self.path.join("state").join(process)
    }

    /// Makes the state folder of a process for the user `uid`, and leaves one that is there as it is.
    pub fn create_state(&self, process: &str, uid: u32) -> Result<PathBuf, StoreError> {
        let path = self.state_folder(file_name(process)?);
        if !path.is_dir() {
            durable::make_folder(&path, 0o700, Some(uid))?;
        }
        Ok(path)
    }

    // ---- Garbage ----

    /// What is there, by name.
    pub fn contents(&self) -> Result<Contents, StoreError> {
        let names = |folder: &str| durable::names_in(&self.path.join(folder));
        Ok(Contents {
            builds: names("builds")?,
            stages: names("stage")?,
            caches: names("cache")?,
            releases: self.revisions()?,
            logs: names("logs")?,
            env: names("env")?,
        })
    }
}

/// What is in an app's folder, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Keys, and whatever else lies there.
    pub builds: Vec<String>,
    /// `<key>.<try>`.
    pub stages: Vec<String>,
    /// Names by [`cache_name`](super::cache_name).
    pub caches: Vec<String>,
    /// Revisions.
    pub releases: Vec<RevisionName>,
    /// `<releaseId>.<step>`.
    pub logs: Vec<String>,
    /// Digests.
    pub env: Vec<String>,
}

/// Everything that is in use: by what is applied, by what is tried, by what is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// Trees.
    pub builds: BTreeSet<BuildKey>,
    /// Stages whose build runs or is to be sealed.
    pub stages: BTreeSet<(BuildKey, u32)>,
    /// Caches that a build names, by [`cache_name`](super::cache_name).
    pub caches: BTreeSet<String>,
    /// Revisions that can be gone back to.
    pub releases: BTreeSet<RevisionName>,
    /// Releases whose logs are kept.
    pub logs: BTreeSet<ReleaseId>,
    /// Environment files.
    pub env: BTreeSet<EnvDigest>,
}

/// What nothing refers to, as paths relative to the app's folder: what is there, less what is in use.
pub fn garbage(contents: &Contents, references: &References) -> Vec<PathBuf> {
    let Contents {
        builds,
        stages,
        caches,
        releases,
        logs,
        env,
    } = contents;
    let within = |folder: &str, name: &str| Path::new(folder).join(name);
    let mut garbage = Vec::new();
    garbage.extend(
        stages
            .iter()
            .filter(|name| {
                !references
                    .stages
                    .iter()
                    .any(|(key, build_try)| **name == format!("{key}.{build_try}"))
            })
            .map(|name| within("stage", name)),
    );
    garbage.extend(
        caches
            .iter()
            .filter(|name| !references.caches.contains(*name))
            .map(|name| within("cache", name)),
    );
    garbage.extend(
        builds
            .iter()
            .filter(|name| !references.builds.iter().any(|key| key.as_str() == *name))
            .map(|name| within("builds", name)),
    );
    garbage.extend(
        releases
            .iter()
            .filter(|revision| !references.releases.contains(revision))
            .map(|revision| within("releases", &format!("{revision}.json"))),
    );
    garbage.extend(
        logs.iter()
            .filter(|name| {
                let of = |id: &ReleaseId| {
                    name.strip_prefix(&id.to_string())
                        .is_some_and(|rest| rest.starts_with('.'))
                };
                !references.logs.iter().any(of)
            })
            .map(|name| within("logs", name)),
    );
    garbage.extend(
        env.iter()
            .filter(|name| !references.env.iter().any(|digest| digest.as_str() == *name))
            .map(|name| within("env", name)),
    );
    garbage
}

fn read_record<R: Record>(path: &Path) -> Result<Option<R>, StoreError> {
    match durable::read(path)? {
        None => Ok(None),
        Some(text) => records::parse(&text)
            .map(Some)
            .map_err(|source| StoreError::Record {
                path: path.to_owned(),
                source,
            }),
    }
}

/// A name as a part of a path: not hidden, no separator.
fn file_name(name: &str) -> Result<&str, StoreError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    if !name.is_empty() && name.len() <= 250 && !name.starts_with('.') && name.bytes().all(plain) {
        Ok(name)
    } else {
        Err(StoreError::Name {
            name: name.to_owned(),
        })
    }
}

/// The end of a log as text; the first line goes if it is not whole.
fn tail_of(content: &[u8], cut: bool) -> Option<String> {
    let text = String::from_utf8_lossy(content);
    let whole = match text.split_once('\n') {
        Some((_, rest)) if cut && !rest.is_empty() => rest,
        Some(_) | None => &text,
    };
    let mut tail: String = whole
        .chars()
        .filter(|c| !c.is_control() || matches!(c, '\n' | '\t'))
        .collect();
    // Bytes that are not UTF-8 have grown.
    while tail.len() > LOG_TAIL_BYTES {
        tail.remove(0);
    }
    (!tail.trim().is_empty()).then_some(tail)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use uuid::Uuid;

    use super::*;

    fn folder() -> (tempfile::TempDir, AppFolder) {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let folder = store.app(&AppName::new("web", "shop").unwrap());
        folder.create().unwrap();
        (root, folder)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn an_app_that_has_no_folder_has_nothing() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let folder = store.app(&AppName::new("web", "shop").unwrap());
        assert!(folder.read_applied().unwrap().is_none());
        assert!(folder.releases().unwrap().is_empty());
        assert_eq!(folder.contents().unwrap(), Contents::default());
        assert_eq!(store.apps().unwrap(), vec![]);
        folder.create().unwrap();
        assert_eq!(
            store.apps().unwrap(),
            vec![AppName::new("web", "shop").unwrap()]
        );
        folder.remove().unwrap();
        assert_eq!(store.apps().unwrap(), vec![]);
    }

    #[test]
    fn a_record_that_does_not_parse_says_so_and_stays() {
        let (_root, folder) = folder();
        let path = folder.path().join("users.json");
        for (text, says) in [
            ("{", "EOF"),
            ("{\"version\": 2}", "version 2"),
            ("", "EOF"),
            ("{\"version\": 1}", "buildUid"),
        ] {
            fs::write(&path, text).unwrap();
            let error = folder.read_users().unwrap_err();
            assert!(
                error.to_string().contains(says) && error.to_string().contains("users.json"),
                "{error}"
            );
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        let users = UsersRecord {
            version: records::RECORD_VERSION,
            build_uid: 50001,
            service_uid: 50002,
        };
        folder.write_users(&users).unwrap();
        assert_eq!(folder.read_users().unwrap(), Some(users));
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_revision_cannot_leave_its_folder() {
        let (_root, folder) = folder();
        for name in ["../x", "a/b", ".hidden", ""] {
            assert!(
                matches!(
                    folder.read_release(&RevisionName::new(name)),
                    Err(StoreError::Name { .. })
                ),
                "{name}"
            );
        }
    }

    #[test]
    fn a_stage_is_made_anew_and_is_the_builds_but_for_the_script() {
        let (_root, folder) = folder();
        let key = BuildKey::of(b"x");
        let stage = folder.create_stage(&key, 0, 0, Some("make\n")).unwrap();
        fs::write(stage.source().join("old"), "").unwrap();
        let stage = folder.create_stage(&key, 0, 0, Some("make\n")).unwrap();
        assert!(!stage.source().join("old").exists());
        assert_eq!(
            (
                mode(&stage.path),
                mode(&stage.source()),
                mode(&stage.temporary())
            ),
            (0o700, 0o755, 0o700)
        );
        assert_eq!(fs::metadata(stage.script()).unwrap().uid(), 0);
        assert_eq!(fs::read_to_string(stage.script()).unwrap(), "make\n");
    }

    #[test]
    fn an_environment_file_is_named_by_its_content_and_roots_alone() {
        let (_root, folder) = folder();
        let (digest, path) = folder.write_env(b"A=\"1\"\n").unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        assert_eq!(
            folder.write_env(b"A=\"1\"\n").unwrap(),
            (digest.clone(), path.clone())
        );
        assert_eq!(
            fs::metadata(&path).unwrap().ino(),
            inode,
            "it is not written again"
        );
        assert_eq!(mode(&path), 0o600);
        assert_ne!(folder.write_env(b"A=\"2\"\n").unwrap().0, digest);
    }

    #[test]
    fn the_tail_of_a_log_is_whole_lines_of_clean_text() {
        let (_root, folder) = folder();
        let id = ReleaseId(Uuid::from_u128(1));
        assert_eq!(folder.log_tail(&id, "build").unwrap(), None);
        fs::write(folder.log(&id, "build"), " \n").unwrap();
        assert_eq!(folder.log_tail(&id, "build").unwrap(), None);
        fs::write(folder.log(&id, "build"), b"one\n\x1b[31mtwo\xff\n").unwrap();
        assert_eq!(
            folder.log_tail(&id, "build").unwrap().as_deref(),
            Some("one\n[31mtwo\u{fffd}\n")
        );
        let long: String = (0..2000).map(|n| format!("line {n}\n")).collect();
        fs::write(folder.log(&id, "build"), &long).unwrap();
        let tail = folder.log_tail(&id, "build").unwrap().unwrap();
        assert!(
            tail.starts_with("line ")
                && tail.ends_with("line 1999\n")
                && tail.len() <= LOG_TAIL_BYTES
        );
        fs::write(folder.log(&id, "build"), vec![0xff; 10_000]).unwrap();
        assert!(folder.log_tail(&id, "build").unwrap().unwrap().len() <= LOG_TAIL_BYTES);
        assert_eq!(folder.log_bytes(&id, "build"), 10_000);
    }

    #[test]
    fn garbage_is_what_nothing_refers_to() {
        let (one, two) = (BuildKey::of(b"1"), BuildKey::of(b"2"));
        let (kept, lost) = (ReleaseId(Uuid::from_u128(1)), ReleaseId(Uuid::from_u128(2)));
        let (env, old_env) = (EnvDigest::of(b"1"), EnvDigest::of(b"2"));
        let contents = Contents {
            builds: vec![one.to_string(), two.to_string(), "odd".to_owned()],
            stages: vec![format!("{one}.0"), format!("{one}.1"), format!("{two}.1")],
            caches: vec!["named".to_owned(), "unnamed".to_owned()],
            releases: vec![RevisionName::new("shop-1"), RevisionName::new("shop-2")],
            logs: vec![format!("{kept}.build"), format!("{lost}.build")],
            env: vec![env.to_string(), old_env.to_string()],
        };
        let references = References {
            builds: [one.clone()].into(),
            stages: [(one.clone(), 1)].into(),
            caches: ["named".to_owned()].into(),
            releases: [RevisionName::new("shop-2")].into(),
            logs: [kept].into(),
            env: [env].into(),
        };
        let expected: Vec<PathBuf> = [
            format!("stage/{one}.0"),
            format!("stage/{two}.1"),
            "cache/unnamed".to_owned(),
            format!("builds/{two}"),
            "builds/odd".to_owned(),
            "releases/shop-1.json".to_owned(),
            format!("logs/{lost}.build"),
            format!("env/{old_env}"),
        ]
        .map(PathBuf::from)
        .to_vec();
        assert_eq!(garbage(&contents, &references), expected);
        assert_eq!(
            garbage(&Contents::default(), &references),
            Vec::<PathBuf>::new()
        );
    }

    #[test]
    fn state_outlives_a_removal_that_keeps_it() {
        let (_root, folder) = folder();
        let state = folder.create_state("web", 0).unwrap();
        fs::write(state.join("db"), "rows").unwrap();
        folder
            .write_users(&UsersRecord {
                version: records::RECORD_VERSION,
                build_uid: 1,
                service_uid: 2,
            })
            .unwrap();
        folder.remove_all_but_state().unwrap();
        assert_eq!(
            durable::names_in(folder.path()).unwrap(),
            ["state", "users.json"]
        );
        folder.create().unwrap();
        assert_eq!(
            fs::read_to_string(folder.create_state("web", 0).unwrap().join("db")).unwrap(),
            "rows"
        );
    }
}
