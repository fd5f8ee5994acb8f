//! A client of TLS that knows one authority, and certificates of that.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::traffic::Connect;

/// An authority that a test made.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate, in PEM.
    pub pem: String,
    roots: Arc<RootCertStore>,
}

/// A certificate and its key in PEM, and the certificate as a server shows it.
#[derive(Clone)]
pub struct Issued {
    pub certificate: String,
    pub key: String,
    pub der: Vec<u8>,
}

impl Authority {
    pub fn new() -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Another name than that of what it issues, which OpenSSL would take for self-signed.
        let name = "an authority";
        parameters.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate = parameters.self_signed(&key).expect("a certificate");
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).expect("a root");
        Self {
            pem: certificate.pem(),
            roots: Arc::new(roots),
            issuer: Issuer::new(parameters, key),
        }
    }

    pub fn issue(&self, hosts: &[&str]) -> Issued {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let parameters = CertificateParams::new(hosts).expect("names");
        let key = KeyPair::generate().expect("a key");
        let certificate = parameters.signed_by(&key, &self.issuer);
        let certificate = certificate.expect("a certificate");
        Issued {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            der: certificate.der().to_vec(),
        }
    }
}

/// TLS for a host over another's connections. It believes the authority alone, and counts the certificates that
/// it was shown.
#[derive(Clone)]
pub struct Tls<C> {
    inner: C,
    host: String,
    config: Arc<ClientConfig>,
    shown: Arc<Mutex<BTreeMap<Vec<u8>, usize>>>,
}

impl<C> Tls<C> {
    pub fn new(inner: C, authority: &Authority, host: &str) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions of TLS")
            .with_root_certificates(Arc::clone(&authority.roots))
            .with_no_client_auth();
        // A session that is taken up again shows the certificate of its beginning.
        config.resumption = Resumption::disabled();
        Self {
            inner,
            host: host.to_owned(),
            config: Arc::new(config),
            shown: Arc::default(),
        }
    }

    /// On how many connections a certificate was shown.
    pub fn shown(&self, certificate: &Issued) -> usize {
        let shown = self.shown.lock().expect("no panic holds it");
        shown.get(&certificate.der).copied().unwrap_or_default()
    }
}

impl<C: Connect> Connect for Tls<C> {
    type Stream = TlsStream<C::Stream>;

    async fn connect(&self, to: SocketAddr) -> std::io::Result<Self::Stream> {
        let stream = self.inner.connect(to).await?;
        let name = ServerName::try_from(self.host.clone()).map_err(std::io::Error::other)?;
        let stream = TlsConnector::from(Arc::clone(&self.config))
            .connect(name, stream)
            .await?;
        let leaf = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|c| c.first());
        if let Some(leaf) = leaf {
            let mut shown = self.shown.lock().expect("no panic holds it");
            *shown.entry(leaf.to_vec()).or_default() += 1;
        }
        Ok(stream)
    }
}
