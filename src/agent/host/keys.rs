//! The node's keys: what the controller seals to, and what opens it.
//!
//! `node.key` in the store, root's alone. Invariants: a key is on the disk before anybody hears of it; an old one is
//! kept for as long as anything that is kept names it; a file that cannot be read is an error for people and is never
//! replaced.

use std::collections::BTreeSet;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use super::store::{self, Store, StoreError};
use crate::seal::{KeyId, NodeKey};

/// The file, in the store's root.
const FILE: &str = "node.key";

/// The version of the file.
const VERSION: u32 = 1;

/// Keys that are kept at most, however fast they are changed: each is tried by its id alone, so that many cost
/// nothing but room.
const MOST_KEYS: usize = 64;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file is not one of the agent's.
    #[error(
        "{} is not a key file of this version: put back the one that was there, or move it away, upon which a new key is made and what the node has kept sealed to the old one is lost", .path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// There is no room for another.
    #[error(
        "{MOST_KEYS} keys are in use already: the controller has yet to seal anew what they were for; try again when it has"
    )]
    TooMany,
}

/// The node's keys, the newest first.
#[derive(Debug, Clone)]
pub struct NodeKeys {
    store: Store,
    current: NodeKey,
    older: Vec<NodeKey>,
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    /// Private keys in base64, the newest first.
    keys: Vec<String>,
}

impl Drop for File {
    fn drop(&mut self) {
        self.keys.zeroize();
    }
}

impl NodeKeys {
    /// Reads the keys, or makes the first.
    pub fn open(store: &Store) -> Result<Self, KeysError> {
        let path = store.root().join(FILE);
        let Some(text) = store::read(&path)?.map(Zeroizing::new) else {
            let keys = Self {
                store: store.clone(),
                current: NodeKey::generate(),
                older: vec![],
            };
            keys.write()?;
            return Ok(keys);
        };
        let malformed = || KeysError::Malformed { path: path.clone() };
        let file: File = serde_json::from_slice(&text).map_err(|_| malformed())?;
        let mut keys = vec![];
        for key in &file.keys {
            let bytes = BASE64.decode(key).map(Zeroizing::new);
            let key = bytes
                .ok()
                .and_then(|bytes| NodeKey::from_bytes(&bytes).ok());
            keys.push(key.ok_or_else(malformed)?);
        }
        if file.version != VERSION || keys.is_empty() {
            return Err(malformed());
        }
        Ok(Self {
            store: store.clone(),
            current: keys.remove(0),
            older: keys,
        })
    }

    /// The one that others are to seal to.
    pub fn current(&self) -> &NodeKey {
        &self.current
    }

    /// Whether there are others than the current one.
    pub fn has_older(&self) -> bool {
        !self.older.is_empty()
    }

    /// All that are kept.
    pub fn all(&self) -> Vec<NodeKey> {
        let all = [&self.current].into_iter().chain(&self.older);
        all.cloned().collect()
    }

    /// Makes a new key the current one, and keeps the old.
    ///
    /// # Errors
    /// The disk, which then has the keys of before; or old keys that are all in use.
    pub fn rotate(&mut self) -> Result<(), KeysError> {
        if self.older.len() + 1 >= MOST_KEYS {
            return Err(KeysError::TooMany);
        }
        let mut keys = self.clone();
        keys.older.insert(0, keys.current);
        keys.current = NodeKey::generate();
        keys.write()?;
        *self = keys;
        Ok(())
    }

    /// Forgets old keys that are not among `used`, and says how many.
    pub fn forget_unused(&mut self, used: &BTreeSet<KeyId>) -> Result<usize, KeysError> {
        let mut keys = self.clone();
        keys.older.retain(|key| used.contains(&key.id()));
        let forgotten = self.older.len() - keys.older.len();
        if forgotten > 0 {
            keys.write()?;
            *self = keys;
        }
        Ok(forgotten)
    }

    fn write(&self) -> Result<(), KeysError> {
        let file = File {
            version: VERSION,
            keys: self
                .all()
                .iter()
                .map(|key| BASE64.encode(key.private().expose()))
                .collect(),
        };
        let path = self.store.root().join(FILE);
        let text =
            serde_json::to_vec(&file).map_err(|_| KeysError::Malformed { path: path.clone() })?;
        store::write_durably(&path, &Zeroizing::new(text), 0o600)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        (root, store)
    }

    #[test]
    fn a_key_is_made_once_and_is_roots_alone() {
        let (root, store) = store();
        let made = NodeKeys::open(&store).unwrap();
        let read = NodeKeys::open(&store).unwrap();
        assert_eq!(read.current(), made.current());
        let mode = std::fs::metadata(root.path().join(FILE)).unwrap();
        assert_eq!(mode.permissions().mode() & 0o7777, 0o600);
    }

    #[test]
    fn an_old_key_is_kept_for_as_long_as_it_is_used() {
        let (_root, store) = store();
        let mut keys = NodeKeys::open(&store).unwrap();
        let first = keys.current().id();
        keys.rotate().unwrap();
        let second = keys.current().id();
        keys.rotate().unwrap();
        let ids = |keys: &NodeKeys| -> Vec<KeyId> { keys.all().iter().map(NodeKey::id).collect() };
        let third = keys.current().id();
        assert_eq!(ids(&keys), [third.clone(), second, first.clone()]);
        assert_eq!(ids(&NodeKeys::open(&store).unwrap()), ids(&keys));
        assert_eq!(keys.forget_unused(&[first.clone()].into()).unwrap(), 1);
        assert_eq!(ids(&keys), [third.clone(), first]);
        assert_eq!(ids(&NodeKeys::open(&store).unwrap()), ids(&keys));
        assert_eq!(keys.forget_unused(&BTreeSet::new()).unwrap(), 1);
        assert_eq!(ids(&keys), [third], "the current one stays");
    }

    #[test]
    fn a_file_that_is_no_key_is_told_and_stays() {
        let (root, store) = store();
        let path = root.path().join(FILE);
        for text in [
            "",
            "{}",
            "{\"version\":1,\"keys\":[]}",
            "{\"version\":1,\"keys\":[\"AAAA\"]}",
            "{\"version\":2,\"keys\":[]}",
        ] {
            std::fs::write(&path, text).unwrap();
            let error = NodeKeys::open(&store).unwrap_err();
            assert!(error.to_string().contains("node.key"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }
}
