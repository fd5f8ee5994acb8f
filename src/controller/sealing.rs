//! Which secrets a Release carries, and how: what stands there already, what is sealed anew, what the node has kept.
//!
//! Invariants: a value is sealed again only for another value, another revision or another key of the node, told by
//! digests, so that a Release is not written for nothing; secrets leave a plan only as [`Unsealed`], and the process
//! only sealed.
//!
//! Pure but for [`sealed`], which takes randomness.

use crate::api::ReleaseSpec;
use crate::api::release::{Purpose, SEALED_ENV, SealedValue, Template};
use crate::seal::{Binding, NodePublicKey, SealError, SecretBytes, seal};

use super::observed::ObservedRelease;

/// A secret that the Releases of a Deployment carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretValue {
    /// What it is for.
    pub purpose: Purpose,
    /// Which of those of its purpose.
    pub name: String,
    /// The keyed digest that stands for it; nothing where it is not known either: what a Release carries of this
    /// purpose and name stays.
    pub digest: Option<String>,
    /// The value; nothing where it is not known any more and nodes use what they have kept.
    pub value: Option<SecretBytes>,
}

impl SecretValue {
    /// The secret variables of a template, with their values if these are known.
    pub fn env(template: &Template, value: Option<SecretBytes>) -> Option<Self> {
        Some(Self {
            purpose: Purpose::Env,
            name: SEALED_ENV.to_owned(),
            digest: Some(template.sealed_env_digest()?),
            value,
        })
    }

    fn stands_for(&self, sealed: &SealedValue) -> bool {
        let is_value = self.digest.as_ref().is_none_or(|d| *d == sealed.digest);
        is_value && (self.purpose, &self.name) == (sealed.purpose, &sealed.name)
    }
}

/// A secret that is sealed when its Release is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsealed {
    /// The node's key.
    pub key: NodePublicKey,
    /// What it is for.
    pub purpose: Purpose,
    /// Which of those of its purpose.
    pub name: String,
    /// The keyed digest that stands for it.
    pub digest: String,
    /// The value.
    pub value: SecretBytes,
}

/// What a Release of one revision carries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sealing {
    /// What stands there already, or has no data as the node has kept it.
    pub sealed: Vec<SealedValue>,
    /// What is to be sealed besides.
    pub unsealed: Vec<Unsealed>,
    /// Something is neither known nor carried.
    pub lacks: bool,
}

impl Sealing {
    /// For a node with this `key`, whose Release, if it has one, is `before`.
    pub fn plan(
        secrets: &[SecretValue],
        key: Option<&NodePublicKey>,
        before: Option<&ReleaseSpec>,
        revision: &str,
    ) -> Self {
        let before = before.filter(|before| before.revision == revision);
        let stands = before.map_or(&[][..], |before| &before.sealed);
        let mut sealing = Self::default();
        for secret in secrets {
            let stands = stands.iter().find(|s| secret.stands_for(s));
            let fits = stands.filter(|sealed| {
                let is_for_key =
                    |key: &NodePublicKey| sealed.key_id.as_deref() == Some(key.id().as_str());
                secret.value.is_none() || key.is_none_or(is_for_key)
            });
            match (fits, &secret.digest, &secret.value, key) {
                (Some(sealed), _, _, _) => sealing.sealed.push(sealed.clone()),
                (None, None, _, _) => sealing.lacks = true,
                (None, Some(digest), Some(value), Some(key)) => sealing.unsealed.push(Unsealed {
                    key: key.clone(),
                    purpose: secret.purpose,
                    name: secret.name.clone(),
                    digest: digest.clone(),
                    value: value.clone(),
                }),
                (None, Some(digest), _, _) => {
                    sealing
                        .sealed
                        .push(SealedValue::kept(secret.purpose, &secret.name, digest))
                }
            }
        }
        sealing
    }

    /// Whether the Release says all of it already.
    pub fn stands_in(&self, release: &ReleaseSpec) -> bool {
        self.unsealed.is_empty()
            && self.sealed.len() == release.sealed.len()
            && self.sealed.iter().all(|s| release.sealed.contains(s))
    }

    /// Whether the node has or gets every value: what it has kept it has of a revision that it serves or is to
    /// retain.
    pub fn is_complete(&self, release: Option<&ObservedRelease>, revision: &str) -> bool {
        let keeps = release.is_some_and(|release| {
            let serving = release.status.serving.as_ref();
            serving.is_some_and(|serving| serving.revision == revision)
                || release.spec.retain.iter().any(|r| r == revision)
        });
        keeps || (!self.lacks && self.sealed.iter().all(|sealed| sealed.data.is_some()))
    }
}

/// The spec as it is written: with everything sealed, in a fixed order.
///
/// # Errors
/// A node's key is none.
pub fn sealed(
    namespace: &str,
    release: &str,
    spec: &ReleaseSpec,
    unsealed: &[Unsealed],
) -> Result<ReleaseSpec, SealError> {
    let mut spec = spec.clone();
    for Unsealed {
        key,
        purpose,
        name,
        digest,
        value,
    } in unsealed
    {
        let binding = Binding {
            namespace,
            release,
            node: &spec.node_name,
            revision: &spec.revision,
        };
        let sealed = seal(key, &binding, *purpose, name, digest, value)?;
        spec.sealed.push(sealed);
    }
    spec.sealed
        .sort_by(|a, b| (a.purpose, &a.name).cmp(&(b.purpose, &b.name)));
    Ok(spec)
}
