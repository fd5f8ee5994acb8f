//! Keyed digests of secrets, and the key that the cluster has for them.
//!
//! The key is a Secret of Kari's own namespace, made by the first controller that needs it and never changed:
//! another key would give every revision with a secret another name, and start its processes anew.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::OnceCell;
use tracing::{info, warn};

use crate::runtime::error_chain;
use crate::seal::DigestKey;

/// The Secret that holds the key.
pub const DIGEST_KEY_SECRET: &str = "kari-digest-key";

/// The key within it.
const DATA_KEY: &str = "key";

/// Gives the digests of one Deployment's secrets: the same value elsewhere has another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    key: DigestKey,
    namespace: String,
    deployment: String,
}

impl Digests {
    /// Those of a Deployment.
    pub fn new(key: DigestKey, namespace: &str, deployment: &str) -> Self {
        Self {
            key,
            namespace: namespace.to_owned(),
            deployment: deployment.to_owned(),
        }
    }

    /// The digest of `value`, which is used for `purpose`: the same for every Deployment of the namespace.
    pub fn digest_in_namespace(&self, purpose: &str, value: &[u8]) -> String {
        self.key.digest(&[&*self.namespace, "", purpose], value)
    }

    /// The digest of `value`, which is used at `place`: 40 hexadecimal digits.
    pub fn digest(&self, place: &[&str], value: &[u8]) -> String {
        let context = [&[&*self.namespace, &*self.deployment], place].concat();
        self.key.digest(&context, value)
    }
}

/// Where the key is had from.
pub struct DigestKeys {
    api: Api<Secret>,
    key: OnceCell<DigestKey>,
}

/// The API server did not say.
#[derive(Debug, thiserror::Error)]
#[error("the Secret {DIGEST_KEY_SECRET} was not read or made")]
pub struct KeyUnavailable(#[source] Box<kube::Error>);

impl DigestKeys {
    /// In `namespace`.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            key: OnceCell::new(),
        }
    }

    /// The key; nothing where the controller may not read or make it, or where the Secret holds no key.
    ///
    /// # Errors
    /// The API server does not answer.
    pub async fn get(&self) -> Result<Option<DigestKey>, KeyUnavailable> {
        let had = self.key.get_or_try_init(|| self.read_or_make()).await;
        match had {
            Ok(key) => Ok(Some(key.clone())),
            Err(Refused::NotAKey) => {
                warn!(
                    "the Secret {DIGEST_KEY_SECRET} holds no key of 32 bytes under {DATA_KEY:?}: delete it, and another is made"
                );
                Ok(None)
            }
            Err(Refused::Api(error)) => match &*error {
                kube::Error::Api(status) if status.code == 403 => {
                    warn!(
                        "the Secret {DIGEST_KEY_SECRET} may not be read or made: {}",
                        error_chain(&*error)
                    );
                    Ok(None)
                }
                _ => Err(KeyUnavailable(error)),
            },
        }
    }

    async fn read_or_make(&self) -> Result<DigestKey, Refused> {
        let api = |error| Refused::Api(Box::new(error));
        if let Some(found) = self.api.get_opt(DIGEST_KEY_SECRET).await.map_err(api)? {
            return key_of(&found);
        }
        let key = DigestKey::generate();
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(DIGEST_KEY_SECRET.to_owned()),
                ..ObjectMeta::default()
            },
            data: Some(BTreeMap::from([(
                DATA_KEY.to_owned(),
                ByteString(key.bytes().expose().to_vec()),
            )])),
            immutable: Some(true),
            ..Secret::default()
        };
        match self.api.create(&PostParams::default(), &secret).await {
            Ok(_) => {
                info!("made the Secret {DIGEST_KEY_SECRET}");
                Ok(key)
            }
            // Another controller was faster.
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                key_of(&self.api.get(DIGEST_KEY_SECRET).await.map_err(api)?)
            }
            Err(error) => Err(api(error)),
        }
    }
}

enum Refused {
    Api(Box<kube::Error>),
    NotAKey,
}

fn key_of(secret: &Secret) -> Result<DigestKey, Refused> {
    let bytes = secret.data.as_ref().and_then(|data| data.get(DATA_KEY));
    bytes
        .and_then(|bytes| DigestKey::from_bytes(bytes.0.clone()))
        .ok_or(Refused::NotAKey)
}
