//! Opens what a release carries sealed.
//!
//! Invariants: a value is opened where it is used and nowhere else; one that came without data, or sealed to a key
//! that this node has not, is taken from what the node has kept of the same digest, so that going back needs neither
//! the old Secret nor the API.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::host::keys::KeysError;
use super::host::records::{AppliedRecord, AppliedRelease, AttemptRecord, ReleaseRecord};
use super::host::store::StoreError;
use super::mask::Masks;
use super::node::{Node, lock};
use crate::api::names::{AppName, NodeName, RevisionName, release_name};
use crate::api::release::{Purpose, SEALED_ENV, SealedValue, Template};
use crate::seal::environment::{MalformedEnvironment, SecretEnvironment};
use crate::seal::{self, Binding, KeyId, OpenError, SecretBytes};

/// What a release carries sealed, and for which revision.
#[derive(Debug, Clone, Copy)]
pub struct Carried<'a> {
    /// The revision that it was sealed for.
    pub revision: &'a RevisionName,
    /// The values.
    pub sealed: &'a [SealedValue],
}

impl<'a> From<&'a AttemptRecord> for Carried<'a> {
    fn from(attempt: &'a AttemptRecord) -> Self {
        Self {
            revision: &attempt.wish.revision,
            sealed: &attempt.wish.sealed,
        }
    }
}

impl<'a> From<&'a AppliedRelease> for Carried<'a> {
    fn from(release: &'a AppliedRelease) -> Self {
        Self {
            revision: &release.revision,
            sealed: &release.sealed,
        }
    }
}

impl<'a> From<&'a ReleaseRecord> for Carried<'a> {
    fn from(release: &'a ReleaseRecord) -> Self {
        Self {
            revision: &release.revision,
            sealed: &release.sealed,
        }
    }
}

/// Why a secret is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The release does not carry it.
    #[error("the Release carries no sealed value {name:?} for {}", .purpose.as_str())]
    Absent {
        /// What it is for.
        purpose: Purpose,
        /// Which.
        name: String,
    },
    /// It does not open.
    #[error(
        "the sealed value {name:?} for {} cannot be opened: {source}; the controller seals it anew when it has seen this node's key",
        .purpose.as_str()
    )]
    Sealed {
        /// What it is for.
        purpose: Purpose,
        /// Which.
        name: String,
        /// Why not.
        #[source]
        source: OpenError,
    },
    /// It opens, and is not what it should be.
    #[error(transparent)]
    Malformed(#[from] MalformedEnvironment),
    /// What the node has kept cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Node {
    /// Opens the value of `purpose` and `name` that a release of `app` carries, or that the node has kept in its
    /// stead.
    ///
    /// # Errors
    /// The release carries none, or it cannot be opened and none of the same digest is kept.
    pub fn open_secret(
        &self,
        app: &AppName,
        carried: Carried<'_>,
        purpose: Purpose,
        name: &str,
    ) -> Result<SecretBytes, SecretError> {
        let found = carried
            .sealed
            .iter()
            .find(|sealed| sealed.purpose == purpose && sealed.name == name);
        let Some(wanted) = found else {
            return Err(SecretError::Absent {
                purpose,
                name: name.to_owned(),
            });
        };
        let keys = lock(&self.keys).all();
        let open = |revision: &RevisionName, sealed: &SealedValue| {
            let release = release_name(app.name(), &self.name);
            seal::open(&keys, &binding(app, &release, &self.name, revision), sealed)
        };
        let error = match open(carried.revision, wanted) {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let folder = self.store.app(app);
        let applied = folder.read_applied()?.and_then(|applied| applied.release);
        let releases = folder.releases()?;
        let kept = applied.iter().map(Carried::from);
        let kept = kept.chain(releases.iter().map(Carried::from));
        for Carried { revision, sealed } in kept {
            let same = sealed.iter().find(|sealed| sealed.is_same_value(wanted));
            if let Some(Ok(value)) = same.map(|sealed| open(revision, sealed)) {
                return Ok(value);
            }
        }
        Err(SecretError::Sealed {
            purpose,
            name: name.to_owned(),
            source: error,
        })
    }

    /// Opens the secret variables of a release.
    ///
    /// # Errors
    /// As [`Node::open_secret`].
    pub fn open_environment(
        &self,
        app: &AppName,
        template: &Template,
        carried: Carried<'_>,
    ) -> Result<SecretEnvironment, SecretError> {
        if template.secret_env.is_empty() {
            return Ok(SecretEnvironment::default());
        }
        let value = self.open_secret(app, carried, Purpose::Env, SEALED_ENV)?;
        Ok(SecretEnvironment::from_bytes(&value)?)
    }

    /// What is taken out of texts about an app: the secrets of what is tried and of what is committed. Those that
    /// do not open no process has.
    pub fn masks(
        &self,
        app: &AppName,
        attempt: Option<&AttemptRecord>,
        applied: Option<&AppliedRecord>,
    ) -> Arc<Masks> {
        let committed = applied.and_then(|applied| applied.release.as_ref());
        let tried = attempt.map(|a| (&a.wish.template, Carried::from(a)));
        let committed = committed.map(|release| (&release.template, Carried::from(release)));
        let all: Vec<_> = tried.into_iter().chain(committed).collect();
        let digests: Vec<_> = all
            .iter()
            .filter_map(|(template, _)| template.sealed_env_digest())
            .collect();
        if digests.is_empty() {
            return Arc::default();
        }
        let memory = self.memory(app);
        if let Some((of, masks)) = &lock(&memory).masks
            && *of == digests
        {
            return Arc::clone(masks);
        }
        let opened: Vec<_> = all
            .into_iter()
            .map(|(template, carried)| self.open_environment(app, template, carried))
            .collect();
        let masks = Arc::new(Masks::of(opened.iter().flatten()));
        // What does not open now may do so later.
        if opened.iter().all(Result::is_ok) {
            lock(&memory).masks = Some((digests, Arc::clone(&masks)));
        }
        masks
    }

    /// What a release carries as it can be kept with it: what came without data, or is sealed to a key that this
    /// node has not, is sealed by the node itself if it has kept the value. What it has not stays as it is.
    pub fn keepable(&self, app: &AppName, carried: Carried<'_>) -> Vec<SealedValue> {
        let keys = lock(&self.keys).all();
        let current = lock(&self.keys).current().public().clone();
        let release = release_name(app.name(), &self.name);
        let binding = binding(app, &release, &self.name, carried.revision);
        let keep = |sealed: &SealedValue| {
            if seal::open(&keys, &binding, sealed).is_ok() {
                return sealed.clone();
            }
            let (purpose, name) = (sealed.purpose, sealed.name.as_str());
            let kept = self.open_secret(app, carried, purpose, name).ok();
            kept.and_then(|value| {
                seal::seal(&current, &binding, purpose, name, &sealed.digest, &value).ok()
            })
            .unwrap_or_else(|| sealed.clone())
        };
        carried.sealed.iter().map(keep).collect()
    }

    /// Forgets old keys that nothing names: no Release of this node, and nothing that it has kept.
    ///
    /// # Errors
    /// What is kept cannot all be read; then none is forgotten.
    pub fn forget_unused_keys(&self) -> Result<usize, KeysError> {
        if !lock(&self.keys).has_older() || !self.listed.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let mut used = BTreeSet::new();
        let mut note = |sealed: &[SealedValue]| {
            used.extend(
                sealed
                    .iter()
                    .filter_map(|s| s.key_id.as_deref())
                    .map(KeyId::new),
            );
        };
        for app in self.store.apps()? {
            let folder = self.store.app(&app);
            if let Some(release) = folder.read_applied()?.and_then(|applied| applied.release) {
                note(&release.sealed);
            }
            if let Some(attempt) = folder.read_attempt()? {
                note(&attempt.wish.sealed);
            }
            for release in folder.releases()? {
                note(&release.sealed);
            }
        }
        for release in self.releases.state() {
            match &release.0 {
                Ok(release) => note(&release.spec.sealed),
                // What it carries is not known.
                Err(_) => return Ok(0),
            }
        }
        lock(&self.keys).forget_unused(&used)
    }
}

fn binding<'a>(
    app: &'a AppName,
    release: &'a str,
    node: &'a NodeName,
    revision: &'a RevisionName,
) -> Binding<'a> {
    Binding {
        namespace: app.namespace(),
        release,
        node: node.as_str(),
        revision: revision.as_str(),
    }
}
