//! How a secret gets from the controller to one node through an API that many may read: sealed to the node's
//! public key, and compared by a keyed digest.
//!
//! HPKE (RFC 9180, base mode) with X25519, HKDF-SHA256 and ChaCha20-Poly1305. Invariants:
//! - What was sealed opens only with the node's own key and only for what it was sealed for: all of a
//!   [`Binding`] is associated data, so that nothing can be moved to another Release, node, purpose, name or
//!   revision.
//! - Sealing is randomised, so sealed values are never compared: what changed is told by their digests, which
//!   are keyed ([`DigestKey`]): whoever can read them cannot try out guesses.
//! - A [`SecretBytes`] shows itself in no log, and its memory is wiped.
//!
//! Deliberately absent: whom a value comes from. Base mode does not tell; that only the controller writes
//! Releases is the API server's to enforce.

pub mod data;
pub mod environment;

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable as _, Kem as _, OpModeR, OpModeS, Serializable as _};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::api::names::hex_digest;
use crate::api::release::{Purpose, SealedValue};

/// What HPKE derives its keys under: another version of the format opens nothing of this one.
const INFO: &[u8] = b"kari.dev/seal/v1";

/// Bytes of an X25519 key, public, private or encapsulated.
const KEY_BYTES: usize = 32;

/// Hexadecimal digits of a key's id: 64 bits, to tell a node's few keys apart.
const KEY_ID_DIGITS: usize = 16;

/// Bytes of a [`DigestKey`].
pub const DIGEST_KEY_BYTES: usize = 32;

/// Hexadecimal digits of a keyed digest: 160 bits, so that no two values ever meet.
const DIGEST_DIGITS: usize = 40;

/// Bytes that nobody is to see. Cheap to clone; wiped when the last clone goes.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretBytes(Arc<Zeroizing<Vec<u8>>>);

impl SecretBytes {
    /// Takes the bytes over.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Zeroizing::new(bytes)))
    }

    /// The bytes, for their one use.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes({} bytes)", self.len())
    }
}

/// What tells a node's keys apart: the first 16 hexadecimal digits of the public key's SHA-256.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(String);

impl KeyId {
    /// An id as it was read.
    pub fn new(id: impl Into<String>) -> Self {
        Self(id.into())
    }

    /// Its digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What values for a node are sealed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePublicKey {
    bytes: [u8; KEY_BYTES],
}

/// A key that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it is not the base64 of {KEY_BYTES} bytes")]
pub struct KeyError;

impl NodePublicKey {
    /// Reads base64, as a node's Lease has it.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let bytes = BASE64.decode(text).map_err(|_| KeyError)?;
        let bytes = bytes.try_into().map_err(|_| KeyError)?;
        let key = Self { bytes };
        // Some bytes are no key that anything could be sealed to: said here, where the key comes in.
        key.encrypt(&[], &[]).map_err(|_| KeyError)?;
        Ok(key)
    }

    /// The encapsulated key and the ciphertext.
    fn encrypt(&self, value: &[u8], associated: &[u8]) -> Result<Vec<u8>, SealError> {
        let refused = |_| SealError::Key(self.id());
        let key =
            <X25519HkdfSha256 as hpke::Kem>::PublicKey::from_bytes(&self.bytes).map_err(refused)?;
        let (encapsulated, ciphertext) = hpke::single_shot_seal::<
            ChaCha20Poly1305,
            HkdfSha256,
            X25519HkdfSha256,
        >(&OpModeS::Base, &key, INFO, value, associated)
        .map_err(refused)?;
        Ok([encapsulated.to_bytes().as_slice(), &ciphertext].concat())
    }

    /// Its id.
    pub fn id(&self) -> KeyId {
        KeyId(hex_digest(&self.bytes)[..KEY_ID_DIGITS].to_owned())
    }
}

/// As base64.
impl fmt::Display for NodePublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.bytes))
    }
}

/// A node's private key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeKey {
    private: SecretBytes,
    public: NodePublicKey,
}

impl NodeKey {
    /// A new one, of the operating system's randomness.
    pub fn generate() -> Self {
        let (private, public) = X25519HkdfSha256::gen_keypair();
        Self::of(&private, &public)
    }

    /// Reads the private key's bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        let private =
            <X25519HkdfSha256 as hpke::Kem>::PrivateKey::from_bytes(bytes).map_err(|_| KeyError)?;
        let public = X25519HkdfSha256::sk_to_pk(&private);
        Ok(Self::of(&private, &public))
    }

    fn of(
        private: &<X25519HkdfSha256 as hpke::Kem>::PrivateKey,
        public: &<X25519HkdfSha256 as hpke::Kem>::PublicKey,
    ) -> Self {
        Self {
            private: SecretBytes::new(private.to_bytes().to_vec()),
            public: NodePublicKey {
                bytes: public.to_bytes().into(),
            },
        }
    }

    /// The private key's bytes, for the node's disk.
    pub fn private(&self) -> &SecretBytes {
        &self.private
    }

    /// What others seal to.
    pub fn public(&self) -> &NodePublicKey {
        &self.public
    }

    /// Its id.
    pub fn id(&self) -> KeyId {
        self.public.id()
    }
}

/// What a value is sealed for. All of it is associated data.
#[derive(Clone, Copy, Debug)]
pub struct Binding<'a> {
    /// The Deployment's namespace.
    pub namespace: &'a str,
    /// The Release's name.
    pub release: &'a str,
    /// The node.
    pub node: &'a str,
    /// The revision of the Release's spec: an older value put into a newer spec does not open.
    pub revision: &'a str,
}

impl Binding<'_> {
    /// Each part with its length before it, so that no two lists of parts have the same bytes.
    fn associated_data(&self, purpose: Purpose, name: &str, digest: &str) -> Vec<u8> {
        let Self {
            namespace,
            release,
            node,
            revision,
        } = *self;
        let purpose = purpose.as_str();
        let mut data = Vec::new();
        for part in [namespace, release, node, purpose, name, revision, digest] {
            // No part is near 4 GiB: names have at most 253 characters.
            let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
            data.extend(length.to_be_bytes());
            data.extend(part.as_bytes());
        }
        data
    }
}

/// Why a value was not sealed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The node's key is no point that anything can be sealed to.
    #[error("the node's public key {0} cannot be sealed to")]
    Key(KeyId),
}

/// Why a value was not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It carries no data.
    #[error("it has no data")]
    NoData,
    /// It is sealed to another key.
    #[error("it is sealed to the key {0}, which is none of this node's")]
    OtherKey(KeyId),
    /// It is damaged, or was sealed for something else.
    #[error("it is damaged, or was sealed for another Release, node, purpose or revision")]
    Refused,
}

/// Seals `value` to `key`.
///
/// # Errors
/// The key is not one: a node announced bytes that are no point of the curve.
pub fn seal(
    key: &NodePublicKey,
    binding: &Binding<'_>,
    purpose: Purpose,
    name: &str,
    digest: &str,
    value: &SecretBytes,
) -> Result<SealedValue, SealError> {
    let associated = binding.associated_data(purpose, name, digest);
    let data = key.encrypt(value.expose(), &associated)?;
    Ok(SealedValue {
        purpose,
        name: name.to_owned(),
        key_id: Some(key.id().0),
        digest: digest.to_owned(),
        data: Some(BASE64.encode(data)),
    })
}

/// Opens a value with whichever of `keys` it is sealed to.
///
/// # Errors
/// It has no data, is sealed to another key, or was sealed for something else than `binding` says.
pub fn open(
    keys: &[NodeKey],
    binding: &Binding<'_>,
    sealed: &SealedValue,
) -> Result<SecretBytes, OpenError> {
    let SealedValue {
        purpose,
        name,
        key_id,
        digest,
        data,
    } = sealed;
    let (Some(key_id), Some(data)) = (key_id, data) else {
        return Err(OpenError::NoData);
    };
    let key = keys
        .iter()
        .find(|key| key.id().as_str() == key_id)
        .ok_or_else(|| OpenError::OtherKey(KeyId::new(key_id)))?;
    let data = BASE64.decode(data).map_err(|_| OpenError::Refused)?;
    let (encapsulated, ciphertext) = data.split_at_checked(KEY_BYTES).ok_or(OpenError::Refused)?;
    let refused = |_| OpenError::Refused;
    let private = <X25519HkdfSha256 as hpke::Kem>::PrivateKey::from_bytes(key.private.expose())
        .map_err(refused)?;
    let encapsulated =
        <X25519HkdfSha256 as hpke::Kem>::EncappedKey::from_bytes(encapsulated).map_err(refused)?;
    let associated = binding.associated_data(*purpose, name, digest);
    hpke::single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
        &OpModeR::Base,
        &private,
        &encapsulated,
        INFO,
        ciphertext,
        &associated,
    )
    .map(SecretBytes::new)
    .map_err(refused)
}

/// The cluster's key of digests: those who read a digest without it learn only whether two are equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DigestKey(SecretBytes);

impl DigestKey {
    /// A new one, of the operating system's randomness.
    pub fn generate() -> Self {
        // A private key of the KEM is as many bytes of the same source.
        Self(NodeKey::generate().private)
    }

    /// Reads the key's bytes; nothing if they are not [`DIGEST_KEY_BYTES`].
    pub fn from_bytes(bytes: Vec<u8>) -> Option<Self> {
        (bytes.len() == DIGEST_KEY_BYTES).then(|| Self(SecretBytes::new(bytes)))
    }

    /// Its bytes, to be kept.
    pub fn bytes(&self) -> &SecretBytes {
        &self.0
    }

    /// The digest of `value` in a `context`, which is where it is used: equal values in two places have
    /// digests that do not show it. Lower-case hexadecimal.
    pub fn digest(&self, context: &[&str], value: &[u8]) -> String {
        // HMAC takes a key of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(self.0.expose()) else {
            return String::new();
        };
        for part in context {
            let length = u64::try_from(part.len()).unwrap_or(u64::MAX);
            mac.update(&length.to_be_bytes());
            mac.update(part.as_bytes());
        }
        mac.update(value);
        let mut hex = String::with_capacity(DIGEST_DIGITS);
        for byte in &mac.finalize().into_bytes()[..DIGEST_DIGITS / 2] {
            use fmt::Write as _;
            // Writing to a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
        }
        hex
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BINDING: Binding<'static> = Binding {
        namespace: "web",
        release: "shop-0123456789",
        node: "n1",
        revision: "shop-a",
    };

    fn sealed(key: &NodeKey) -> SealedValue {
        let value = SecretBytes::new(b"hunter2".to_vec());
        seal(key.public(), &BINDING, Purpose::Env, "env", "d1", &value)
            .unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn what_was_sealed_opens_with_the_key_that_it_was_sealed_to() {
        let (old, new, other) = (
            NodeKey::generate(),
            NodeKey::generate(),
            NodeKey::generate(),
        );
        let sealed = sealed(&old);
        let keys = [new, old];
        let opened = open(&keys, &BINDING, &sealed).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(opened.expose(), b"hunter2");
        assert_eq!(
            open(&[other], &BINDING, &sealed),
            Err(OpenError::OtherKey(keys[1].id()))
        );
        let emptied = SealedValue {
            data: None,
            ..sealed
        };
        assert_eq!(open(&keys, &BINDING, &emptied), Err(OpenError::NoData));
    }

    #[test]
    fn what_was_sealed_for_one_thing_opens_for_no_other() {
        let keys = [NodeKey::generate()];
        let sealed = sealed(&keys[0]);
        type Change<'a> = &'a dyn Fn(&mut Binding<'static>, &mut SealedValue);
        let changes: [(&str, Change<'_>); 9] = [
            ("namespace", &|b, _| b.namespace = "other"),
            ("release", &|b, _| b.release = "shop-9876543210"),
            ("node", &|b, _| b.node = "n2"),
            ("revision", &|b, _| b.revision = "shop-b"),
            ("two parts that join to the same text", &|b, _| {
                (b.namespace, b.release) = ("we", "bshop-0123456789");
            }),
            ("purpose", &|_, s| s.purpose = Purpose::Git),
            ("name", &|_, s| s.name = "other".into()),
            ("digest", &|_, s| s.digest = "d2".into()),
            ("a byte of it", &|_, s| {
                let data = s.data.as_deref().unwrap_or_default();
                let mut bytes = BASE64.decode(data).unwrap_or_default();
                if let Some(last) = bytes.last_mut() {
                    *last ^= 1;
                }
                s.data = Some(BASE64.encode(bytes));
            }),
        ];
        for (case, change) in changes {
            let (mut binding, mut moved) = (BINDING, sealed.clone());
            change(&mut binding, &mut moved);
            assert_eq!(
                open(&keys, &binding, &moved),
                Err(OpenError::Refused),
                "{case}"
            );
        }
        for data in ["", "AAAA", "no base64"] {
            let cut = SealedValue {
                data: Some(data.into()),
                ..sealed.clone()
            };
            assert_eq!(
                open(&keys, &BINDING, &cut),
                Err(OpenError::Refused),
                "{data}"
            );
        }
        assert!(open(&keys, &BINDING, &sealed).is_ok(), "unchanged it opens");
    }

    #[test]
    fn the_same_value_is_sealed_otherwise_each_time() {
        let key = NodeKey::generate();
        assert_ne!(sealed(&key).data, sealed(&key).data);
    }

    #[test]
    fn a_key_reads_back_and_what_is_none_is_refused() {
        let key = NodeKey::generate();
        assert_eq!(
            NodePublicKey::parse(&key.public().to_string()),
            Ok(key.public().clone())
        );
        assert_eq!(NodeKey::from_bytes(key.private().expose()), Ok(key.clone()));
        // 32 zeros are the identity: everybody would know what is shared with it.
        let nothing = BASE64.encode([0; KEY_BYTES]);
        for bad in ["", "AAAA", "?", &"A".repeat(1000), &nothing] {
            assert!(NodePublicKey::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_digest_tells_values_places_and_keys_apart() {
        let key = DigestKey::generate();
        let digest = |context: &[&str], value: &[u8]| key.digest(context, value);
        assert_eq!(digest(&["a"], b"x").len(), DIGEST_DIGITS);
        assert_eq!(digest(&["a"], b"x"), digest(&["a"], b"x"));
        assert_ne!(digest(&["a"], b"x"), digest(&["a"], b"y"));
        assert_ne!(digest(&["a"], b"x"), digest(&["b"], b"x"));
        assert_ne!(digest(&["a", "b"], b"x"), digest(&["ab"], b"x"));
        let other = DigestKey::generate().digest(&["a"], b"x");
        assert_ne!(digest(&["a"], b"x"), other);
        let again = DigestKey::from_bytes(key.bytes().expose().to_vec());
        assert_eq!(again, Some(key));
        assert_eq!(DigestKey::from_bytes(vec![0; 8]), None);
    }

    #[test]
    fn a_secret_shows_only_its_size() {
        let shown = format!("{:?}", SecretBytes::new(b"hunter2".to_vec()));
        assert_eq!(shown, "SecretBytes(7 bytes)");
        let key = NodeKey::generate();
        let shown = format!("{key:?}");
        assert!(shown.contains("SecretBytes(32 bytes)"), "{shown}");
    }
}
