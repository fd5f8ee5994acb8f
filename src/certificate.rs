//! A certificate with its key, as a Secret of type `kubernetes.io/tls` holds them.
//!
//! Invariants: what is [`ServerCertificate`] can be served: the key is the certificate's. `Debug` shows no key.
//!
//! Deliberately absent: whether it is for a host name, and whether it has expired. Whoever serves a wrong one
//! is told so by each browser, and keeping the old one instead would hide it.

use std::fmt;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::seal::SecretBytes;
use crate::seal::data::SecretData;

/// Key of the certificate and those that vouch for it, in a Secret.
const CERTIFICATE: &str = "tls.crt";

/// Key of the private key.
const PRIVATE_KEY: &str = "tls.key";

/// Every key that is looked at.
pub const KEYS: [&str; 2] = [CERTIFICATE, PRIVATE_KEY];

/// Bytes of both together: a chain of four with large keys is 20 KiB.
const SIZE_LIMIT: usize = 128 * 1024;

/// A certificate, those that vouch for it, and its key, in PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerCertificate {
    /// The certificate first.
    pub chain: String,
    /// Its private key.
    pub key: String,
}

impl fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerCertificate(***)")
    }
}

/// Why a Secret cannot be served; names keys, never values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// A key is not there.
    #[error(
        "it has no key {0}: a Secret of type kubernetes.io/tls has {CERTIFICATE} and {PRIVATE_KEY}"
    )]
    Missing(&'static str),
    /// It is too large.
    #[error("{CERTIFICATE} and {PRIVATE_KEY} are larger than 128 KiB together")]
    TooLarge,
    /// No certificate can be read there.
    #[error("its key {CERTIFICATE} is not certificates in PEM (-----BEGIN CERTIFICATE-----)")]
    Certificate,
    /// No private key can be read there.
    #[error(
        "its key {PRIVATE_KEY} is not a private key in PEM without a passphrase (-----BEGIN PRIVATE KEY-----), of a kind that is served: RSA, ECDSA on P-256 or P-384, Ed25519"
    )]
    PrivateKey,
    /// The two do not belong together.
    #[error(
        "its {PRIVATE_KEY} is not the key of the first certificate in {CERTIFICATE}: put the server's own certificate first, and its own key"
    )]
    Mismatch,
}

impl ServerCertificate {
    /// Reads the data of a Secret.
    ///
    /// # Errors
    /// Which key is missing or cannot be served, and why.
    pub fn parse(data: &SecretData) -> Result<Self, CertificateError> {
        let value = |key| {
            let found = data.get(key).map(SecretBytes::expose);
            found.ok_or(CertificateError::Missing(key))
        };
        let (chain, key) = (value(CERTIFICATE)?, value(PRIVATE_KEY)?);
        if chain.len() + key.len() > SIZE_LIMIT {
            return Err(CertificateError::TooLarge);
        }
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<_, _>>()
            .map_err(|_| CertificateError::Certificate)?;
        if certificates.is_empty() {
            return Err(CertificateError::Certificate);
        }
        let private =
            PrivateKeyDer::from_pem_slice(key).map_err(|_| CertificateError::PrivateKey)?;
        let private =
            ring::sign::any_supported_type(&private).map_err(|_| CertificateError::PrivateKey)?;
        match CertifiedKey::new(certificates, private).keys_match() {
            Ok(()) => {}
            Err(rustls::Error::InconsistentKeys(_)) => return Err(CertificateError::Mismatch),
            Err(_) => return Err(CertificateError::Certificate),
        }
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        Ok(Self {
            chain: text(chain).ok_or(CertificateError::Certificate)?,
            key: text(key).ok_or(CertificateError::PrivateKey)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::KeyPair;

    fn data(pairs: &[(&str, &str)]) -> SecretData {
        let bytes = |text: &str| SecretBytes::new(text.as_bytes().to_vec());
        let pairs = pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), bytes(value)));
        pairs.collect()
    }

    fn made(algorithm: &'static rcgen::SignatureAlgorithm) -> (String, String) {
        let key = KeyPair::generate_for(algorithm).unwrap_or_else(|e| panic!("{e}"));
        let parameters = rcgen::CertificateParams::new(vec!["a.test".to_owned()]);
        let certificate = parameters.and_then(|parameters| parameters.self_signed(&key));
        let certificate = certificate.unwrap_or_else(|e| panic!("{e}"));
        (certificate.pem(), key.serialize_pem())
    }

    #[test]
    fn a_certificate_and_its_key_are_taken_and_what_cannot_be_served_is_told_by_keys_alone() {
        let (certificate, key) = made(&rcgen::PKCS_ECDSA_P256_SHA256);
        let (other, other_key) = made(&rcgen::PKCS_ED25519);
        let chain = format!("{certificate}{other}");
        for (certificate, key) in [(&certificate, &key), (&other, &other_key), (&chain, &key)] {
            let parsed =
                ServerCertificate::parse(&data(&[("tls.crt", certificate), ("tls.key", key)]));
            let parsed = parsed.unwrap_or_else(|e| panic!("{e}"));
            assert_eq!((&parsed.chain, &parsed.key), (certificate, key));
        }
        let turned = format!("{other}{certificate}");
        let long = "x".repeat(SIZE_LIMIT);
        for (case, pairs, says) in [
            ("nothing", &[][..], "no key tls.crt"),
            (
                "no key",
                &[("tls.crt", certificate.as_str())],
                "no key tls.key",
            ),
            (
                "no certificate",
                &[("tls.crt", "hush"), ("tls.key", &key)],
                "tls.crt is not certificates",
            ),
            (
                "no private key",
                &[("tls.crt", &certificate), ("tls.key", "hush")],
                "tls.key is not a private key",
            ),
            (
                "the key of another",
                &[("tls.crt", &certificate), ("tls.key", &other_key)],
                "is not the key of the first",
            ),
            (
                "another first",
                &[("tls.crt", &turned), ("tls.key", &key)],
                "is not the key of the first",
            ),
            (
                "large",
                &[("tls.crt", &certificate), ("tls.key", &long)],
                "128 KiB",
            ),
        ] {
            let error = ServerCertificate::parse(&data(pairs)).err();
            let error = error.unwrap_or_else(|| panic!("{case}: taken")).to_string();
            assert!(error.contains(says), "{case}: {error}");
            assert!(!error.contains("hush"), "{case}: {error}");
        }
        let parsed =
            ServerCertificate::parse(&data(&[("tls.crt", &certificate), ("tls.key", &key)]));
        assert_eq!(format!("{parsed:?}"), "Ok(ServerCertificate(***))");
    }
}
