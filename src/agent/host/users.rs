//! Static users by userdb drop-ins (systemd-userdbd(8), nss-systemd(8)).
//!
//! Each app has two: one for its builds, one for its services; `kari-git` owns
//! the mirrors. The agent chooses the uid, so it is known before the first start
//! and stays over reboots; names are `kari-<uid>`, as systemd takes no name with
//! a dot and none above 31 characters.
//!
//! Invariants: a uid is recorded in its app's folder before its drop-ins exist,
//! and is no other app's as long as that record is there; it is nobody's in the
//! node's own user database when it is chosen.
//!
//! Everything here blocks.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::records::{RECORD_VERSION, UsersRecord};
use super::store::{AppFolder, Store, StoreError, names_in, sync_folder, write_durably};
use crate::api::names::hex_digest;

/// Where a node's administrator puts users, and Kari its own.
pub const FOLDER: &str = "/etc/userdb";

/// Uids that may be used unless told otherwise: below those of kubelet's user namespaces (65536 and up)
/// and those of systemd's dynamic users (61184 to 65519), above those of people.
pub const DEFAULT_RANGE: RangeInclusive<u32> = 50_000..=59_999;

/// The user of the mirrors.
pub const GIT_USER: &str = "kari-git";

/// The longest that a look at the node's user database may take; it may be a directory server's.
const LOOKUP_LIMIT: Duration = Duration::from_secs(10);

/// A user that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of the user database.
    #[error("cannot change {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// `getent` could not be asked.
    #[error("cannot look up user {uid} with getent: {source}")]
    Lookup {
        /// The uid.
        uid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There are more apps than the range has room for.
    #[error("no uid of {}-{} is free: give the agent a larger --uid-range", .range.start(), .range.end())]
    Exhausted {
        /// The range.
        range: RangeInclusive<u32>,
    },
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its name, for `User=`.
    pub name: String,
    /// Its uid, which is its gid too.
    pub uid: u32,
}

/// The users of an app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppUsers {
    /// Builds run as it.
    pub build: User,
    /// Services run as it.
    pub service: User,
}

/// The node's user database, as far as it is Kari's.
#[derive(Debug)]
pub struct Users {
    userdb: PathBuf,
    range: RangeInclusive<u32>,
    /// One choice of uids at a time.
    choosing: Mutex<()>,
}

impl Users {
    /// Users in `userdb` ([`FOLDER`] but for tests), with uids of `range`.
    pub fn new(userdb: &Path, range: RangeInclusive<u32>) -> Self {
        Self {
            userdb: userdb.to_owned(),
            range,
            choosing: Mutex::new(()),
        }
    }

    /// The users of an app, whose folder exists: those that it has, else new ones.
    pub fn ensure_app(&self, folder: &AppFolder) -> Result<AppUsers, UsersError> {
        let record = match folder.read_users()? {
            Some(record) => record,
            None => self.choose(folder)?,
        };
        let app = folder.app();
        Ok(AppUsers {
            build: self.ensure(
                app_user(record.build_uid),
                &format!("Kari: builds of {app}"),
            )?,
            service: self.ensure(
                app_user(record.service_uid),
                &format!("Kari: services of {app}"),
            )?,
        })
    }

    /// Takes the users of an app out of the user database. Their uids stay the app's until its folder,
    /// or `users.json` in it, is gone.
    pub fn remove_app(&self, folder: &AppFolder) -> Result<(), UsersError> {
        if let Some(UsersRecord {
            version: _,
            build_uid,
            service_uid,
        }) = folder.read_users()?
        {
            self.remove(&app_user(build_uid))?;
            self.remove(&app_user(service_uid))?;
        }
        Ok(())
    }

    /// Takes users out of the user database that no app has on record, as where its folder was deleted by
    /// hand. How many that were.
    pub fn remove_strays(&self, store: &Store) -> Result<usize, UsersError> {
        let _choosing = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = BTreeSet::new();
        // A record that cannot be read may be of anybody: then nobody is taken out.
        for app in store.apps()? {
            if let Some(record) = store.app(&app).read_users()? {
                known.extend([record.build_uid, record.service_uid]);
            }
        }
        let mut removed = 0;
        for name in names_in(&self.userdb)? {
            let uid = name
                .strip_prefix("kari-")
                .and_then(|name| name.strip_suffix(".user"))
                .and_then(|uid| uid.parse().ok());
            if let Some(uid) = uid.filter(|uid| !known.contains(uid)) {
                self.remove(&app_user(uid))?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// The user of the mirrors.
    pub fn ensure_git(&self, store: &Store) -> Result<User, UsersError> {
        let _choosing = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let uid = match self.recorded_git_uid() {
            Some(uid) => uid,
            None => self.free_uid(GIT_USER, &self.taken(store)?)?,
        };
        self.ensure(
            User {
                name: GIT_USER.to_owned(),
                uid,
            },
            "Kari: mirrors of repositories",
        )
    }

    /// Chooses and records the uids of an app.
    fn choose(&self, folder: &AppFolder) -> Result<UsersRecord, UsersError> {
        let _choosing = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self.taken(folder.store())?;
        let app = folder.app();
        let build_uid = self.free_uid(&format!("build {app}"), &taken)?;
        taken.insert(build_uid);
        let service_uid = self.free_uid(&format!("service {app}"), &taken)?;
        let record = UsersRecord {
            version: RECORD_VERSION,
            build_uid,
            service_uid,
        };
        folder.write_users(&record)?;
        Ok(record)
    }

    /// Every uid of any app and of the mirrors. A record that cannot be read holds nobody else up: its
    /// app's drop-ins, which are looked at too, still say which uids are taken.
    fn taken(&self, store: &Store) -> Result<BTreeSet<u32>, UsersError> {
        let mut taken: BTreeSet<u32> = self.recorded_git_uid().into_iter().collect();
        for app in store.apps()? {
            match store.app(&app).read_users() {
                Ok(Some(UsersRecord {
                    version: _,
                    build_uid,
                    service_uid,
                })) => {
                    taken.extend([build_uid, service_uid]);
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%app, %error, "the users of an app are not known"),
            }
        }
        Ok(taken)
    }

    /// The first free uid from a place in the range that follows from `purpose`: an app that comes back
    /// most likely has the uids it had, and those of one that left are not soon another's.
    fn free_uid(&self, purpose: &str, taken: &BTreeSet<u32>) -> Result<u32, UsersError> {
        let (first, last) = (*self.range.start(), *self.range.end());
        let exhausted = || UsersError::Exhausted {
            range: self.range.clone(),
        };
        let room = last.checked_sub(first).ok_or_else(exhausted)? + 1;
        let digest = hex_digest(purpose.as_bytes());
        let start = u32::from_str_radix(&digest[..7], 16).unwrap_or_default() % room;
        for offset in (0..room).map(|step| (start + step) % room) {
            let uid = first + offset;
            if !taken.contains(&uid) && !self.has_drop_in(uid) && !is_known(uid)? {
                return Ok(uid);
            }
        }
        Err(exhausted())
    }

    fn has_drop_in(&self, uid: u32) -> bool {
        fs::symlink_metadata(self.userdb.join(format!("{uid}.user"))).is_ok()
    }

    /// The uid of the mirrors' user, which its own drop-in records.
    fn recorded_git_uid(&self) -> Option<u32> {
        let text = fs::read(self.userdb.join(format!("{GIT_USER}.user"))).ok()?;
        serde_json::from_slice::<UserDropIn>(&text)
            .ok()
            .map(|user| user.uid)
    }

    /// Writes the drop-ins of a user where they are not as they should be.
    fn ensure(&self, user: User, real_name: &str) -> Result<User, UsersError> {
        if !self.userdb.is_dir() {
            fs::create_dir_all(&self.userdb).map_err(wrong(&self.userdb))?;
        }
        let User { name, uid } = &user;
        let (name, uid) = (name.clone(), *uid);
        let group = GroupDropIn {
            group_name: name.clone(),
            gid: uid,
            disposition: "system".to_owned(),
        };
        let record = UserDropIn {
            user_name: name.clone(),
            real_name: real_name.to_owned(),
            uid,
            gid: uid,
            disposition: "system".to_owned(),
            home_directory: "/".to_owned(),
            shell: "/usr/sbin/nologin".to_owned(),
            locked: true,
        };
        self.put(&name, uid, "group", &group)?;
        self.put(&name, uid, "user", &record)?;
        Ok(user)
    }

    /// `<name>.<kind>`, and `<uid>.<kind>` as a link to it.
    fn put(
        &self,
        name: &str,
        uid: u32,
        kind: &str,
        drop_in: &impl Serialize,
    ) -> Result<(), UsersError> {
        let path = self.userdb.join(format!("{name}.{kind}"));
        let mut text = serde_json::to_vec(drop_in).map_err(|error| wrong(&path)(error.into()))?;
        text.push(b'\n');
        if fs::read(&path).ok().as_ref() != Some(&text) {
            write_durably(&path, &text, 0o644)?;
        }
        let link = self.userdb.join(format!("{uid}.{kind}"));
        let to = PathBuf::from(format!("{name}.{kind}"));
        if fs::read_link(&link).ok().as_ref() != Some(&to) {
            remove_file(&link)?;
            symlink(&to, &link).map_err(wrong(&link))?;
            sync_folder(&self.userdb)?;
        }
        Ok(())
    }

    fn remove(&self, User { name, uid }: &User) -> Result<(), UsersError> {
        for kind in ["user", "group"] {
            remove_file(&self.userdb.join(format!("{uid}.{kind}")))?;
            remove_file(&self.userdb.join(format!("{name}.{kind}")))?;
        }
        if self.userdb.is_dir() {
            sync_folder(&self.userdb)?;
        }
        Ok(())
    }
}

/// A drop-in of a user: https://systemd.io/USER_RECORD.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct UserDropIn {
    user_name: String,
    real_name: String,
    uid: u32,
    gid: u32,
    disposition: String,
    home_directory: String,
    shell: String,
    locked: bool,
}

/// A drop-in of a group: https://systemd.io/GROUP_RECORD.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct GroupDropIn {
    group_name: String,
    gid: u32,
    disposition: String,
}

/// The name of the user with a uid of the range.
pub fn user_name(uid: u32) -> String {
    format!("kari-{uid}")
}

fn app_user(uid: u32) -> User {
    User {
        name: user_name(uid),
        uid,
    }
}

fn wrong(path: &Path) -> impl FnOnce(io::Error) -> UsersError {
    move |source| UsersError::Io {
        path: path.to_owned(),
        source,
    }
}

fn remove_file(path: &Path) -> Result<(), UsersError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(wrong(path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whether the node knows a user or a group of the number.
fn is_known(uid: u32) -> Result<bool, UsersError> {
    for database in ["passwd", "group"] {
        if getent(database, uid).map_err(|source| UsersError::Lookup { uid, source })? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn getent(database: &str, number: u32) -> io::Result<bool> {
    /// getent(1): the key was not found.
    const NOT_FOUND: i32 = 2;
    /// Between two looks at whether it has ended.
    const LOOK_INTERVAL: Duration = Duration::from_millis(2);
    let mut child = Command::new("getent")
        .args([database, &number.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + LOOKUP_LIMIT;
    loop {
        match child.try_wait()?.map(|status| status.code()) {
            Some(Some(0)) => return Ok(true),
            Some(Some(NOT_FOUND)) => return Ok(false),
            Some(code) => {
                return Err(io::Error::other(format!(
                    "getent {database} ended with {code:?}"
                )));
            }
            None if Instant::now() >= deadline => {
                child.kill()?;
                child.wait()?;
                return Err(io::ErrorKind::TimedOut.into());
            }
            None => std::thread::sleep(LOOK_INTERVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::names::AppName;

    struct Fixture {
        root: tempfile::TempDir,
        store: Store,
    }

    fn fixture() -> Fixture {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&root.path().join("kari")).unwrap();
        Fixture { root, store }
    }

    impl Fixture {
        fn users(&self, range: RangeInclusive<u32>) -> Users {
            Users::new(&self.root.path().join("userdb"), range)
        }
        fn folder(&self, name: &str) -> AppFolder {
            let folder = self.store.app(&AppName::new("web", name).unwrap());
            folder.create().unwrap();
            folder
        }
        fn drop_ins(&self) -> Vec<String> {
            let entries = fs::read_dir(self.root.path().join("userdb"));
            let mut names: Vec<_> = entries
                .map(|entries| {
                    entries
                        .map(|e| e.unwrap().file_name().into_string().unwrap())
                        .collect()
                })
                .unwrap_or_default();
            names.sort();
            names
        }
    }

    #[test]
    fn an_app_keeps_its_users_and_leaves_no_drop_in_behind() {
        let fixture = fixture();
        let users = fixture.users(DEFAULT_RANGE);
        let folder = fixture.folder("shop");
        let first = users.ensure_app(&folder).unwrap();
        assert_ne!(first.build.uid, first.service.uid);
        assert_eq!(first.build.name, format!("kari-{}", first.build.uid));
        assert_eq!(fixture.drop_ins().len(), 8);

        // Also by an agent that starts anew, and where an administrator broke a drop-in.
        let path = fixture
            .root
            .path()
            .join("userdb")
            .join(format!("{}.user", first.service.name));
        fs::write(&path, "{}").unwrap();
        assert_eq!(fixture.users(1..=2).ensure_app(&folder).unwrap(), first);
        assert!(
            fs::read_to_string(&path)
                .unwrap()
                .contains(&format!("\"uid\":{}", first.service.uid))
        );

        users.remove_app(&folder).unwrap();
        users.remove_app(&folder).unwrap();
        assert_eq!(fixture.drop_ins(), Vec::<String>::new());
        assert_eq!(
            users.ensure_app(&folder).unwrap(),
            first,
            "the uids stay the app's while its folder is there"
        );
    }

    #[test]
    fn users_of_no_app_are_taken_out_unless_a_record_cannot_be_read() {
        let fixture = fixture();
        let users = fixture.users(DEFAULT_RANGE);
        let git = users.ensure_git(&fixture.store).unwrap();
        users.ensure_app(&fixture.folder("shop")).unwrap();
        users.ensure_app(&fixture.folder("lost")).unwrap();
        let own = fixture.root.path().join("userdb/anna.user");
        fs::write(&own, "{}").unwrap();
        assert_eq!(users.remove_strays(&fixture.store).unwrap(), 0);

        // Deleted by hand.
        fs::remove_dir_all(fixture.folder("lost").path()).unwrap();
        fs::write(fixture.folder("broken").path().join("users.json"), "{").unwrap();
        assert!(users.remove_strays(&fixture.store).is_err());
        fs::remove_dir_all(fixture.folder("broken").path()).unwrap();
        assert_eq!(users.remove_strays(&fixture.store).unwrap(), 2);
        // Of the shop, of the mirrors, and the administrator's.
        assert_eq!(fixture.drop_ins().len(), 8 + 4 + 1);
        assert!(own.exists());
        assert_eq!(users.ensure_git(&fixture.store).unwrap(), git);
    }

    #[test]
    fn no_two_owners_share_a_uid_and_a_full_range_says_so() {
        let fixture = fixture();
        let users = fixture.users(54_000..=54_004);
        let git = users.ensure_git(&fixture.store).unwrap();
        assert_eq!(users.ensure_git(&fixture.store).unwrap(), git);
        let mut uids = BTreeSet::from([git.uid]);
        for name in ["a", "b"] {
            let AppUsers { build, service } = users.ensure_app(&fixture.folder(name)).unwrap();
            assert!(
                uids.insert(build.uid) && uids.insert(service.uid),
                "{uids:?}"
            );
        }
        assert!(uids.iter().all(|uid| (54_000..=54_004).contains(uid)));
        let error = users.ensure_app(&fixture.folder("c")).unwrap_err();
        assert!(matches!(&error, UsersError::Exhausted { .. }), "{error}");

        // Without drop-ins a uid is still its app's, as files of it may be anywhere.
        users.remove_app(&fixture.folder("a")).unwrap();
        assert!(users.ensure_app(&fixture.folder("c")).is_err());
        fixture.folder("a").remove().unwrap();
        users.ensure_app(&fixture.folder("c")).unwrap();
    }

    #[test]
    fn a_uid_that_the_node_knows_is_not_taken() {
        let fixture = fixture();
        assert!(is_known(0).unwrap());
        let error = fixture
            .users(0..=0)
            .ensure_app(&fixture.folder("shop"))
            .unwrap_err();
        assert!(matches!(error, UsersError::Exhausted { .. }), "{error}");
    }

    #[test]
    fn an_app_whose_record_is_broken_holds_no_other_up_and_keeps_its_uids() {
        let fixture = fixture();
        let users = fixture.users(54_000..=54_003);
        let broken = users.ensure_app(&fixture.folder("broken")).unwrap();
        fs::write(fixture.folder("broken").path().join("users.json"), "{").unwrap();
        assert!(users.ensure_app(&fixture.folder("broken")).is_err());
        let other = users.ensure_app(&fixture.folder("other")).unwrap();
        let uids = BTreeSet::from([
            broken.build.uid,
            broken.service.uid,
            other.build.uid,
            other.service.uid,
        ]);
        assert_eq!(uids.len(), 4, "{uids:?}");
    }

    #[test]
    fn an_app_that_comes_back_gets_the_uids_it_had() {
        let fixture = fixture();
        let users = fixture.users(DEFAULT_RANGE);
        let first = users.ensure_app(&fixture.folder("shop")).unwrap();
        users.remove_app(&fixture.folder("shop")).unwrap();
        fixture.folder("shop").remove().unwrap();
        users.ensure_app(&fixture.folder("other")).unwrap();
        assert_eq!(users.ensure_app(&fixture.folder("shop")).unwrap(), first);
    }
}
