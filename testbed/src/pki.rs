//! Certificates, keys and kubeconfigs of the control plane.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::{
    error::{Context, Error, Result},
    state::{Description, Directory, write_file},
};

/// The first address of the Service range, the API server's own Service.
const SERVICE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

/// Makes the authority and everything that it signs, in the folder `pki`.
pub fn create(directory: &Directory, description: &Description) -> Result<()> {
    directory.make_folder("pki")?;
    let authority = Authority::create().map_err(certificate_error)?;
    write_file(&directory.pki("ca.crt"), authority.pem.as_bytes())?;
    let tokens = KeyPair::generate().map_err(certificate_error)?;
    write_file(
        &directory.pki("tokens.key"),
        tokens.serialize_pem().as_bytes(),
    )?;
    write_file(
        &directory.pki("tokens.pub"),
        tokens.public_key_pem().as_bytes(),
    )?;
    let addresses = [
        *description.addresses.apiserver.ip(),
        Ipv4Addr::LOCALHOST,
        SERVICE_ADDRESS,
    ];
    authority.issue(directory, "apiserver", "kube-apiserver", None, &addresses)?;
    authority.issue(directory, "admin", "admin", Some("system:masters"), &[])?;
    if description.kubelet {
        issue_for_kubelets(&authority, directory, description)?;
    }
    Ok(())
}

/// What the API server shows to kubelets, kube-proxies to it, and each kubelet
/// to both.
fn issue_for_kubelets(
    authority: &Authority,
    directory: &Directory,
    description: &Description,
) -> Result<()> {
    let masters = Some("system:masters");
    authority.issue(
        directory,
        "kubelet-client",
        "apiserver-kubelet-client",
        masters,
        &[],
    )?;
    authority.issue(directory, "kube-proxy", "system:kube-proxy", None, &[])?;
    for name in description.node_names() {
        let user = format!("system:node:{name}");
        let addresses = [description.node_address(name)];
        let group = Some("system:nodes");
        authority.issue(directory, &name.to_string(), &user, group, &addresses)?;
    }
    Ok(())
}

/// The name of the one context of each kubeconfig.
pub const CONTEXT: &str = "testbed";

/// How a kubeconfig's user proves who it is.
pub enum Credentials<'a> {
    /// By a certificate of the folder `pki`, without `.crt`: `admin` is the administrator's.
    Certificate(&'a str),
    /// By a token in a file, which is read anew while it is used.
    TokenFile(&'a Path),
}

/// A kubeconfig that needs no other file than a token's.
pub fn kubeconfig(
    directory: &Directory,
    server: &str,
    credentials: &Credentials<'_>,
) -> Result<String> {
    let read = |file: &str| {
        let path = directory.pki(file);
        fs::read(&path)
            .map(|content| base64(&content))
            .context(|| format!("read {}", path.display()))
    };
    let user = match credentials {
        Credentials::Certificate(name) => format!(
            "client-certificate-data: {}\n    client-key-data: {}",
            read(&format!("{name}.crt"))?,
            read(&format!("{name}.key"))?
        ),
        Credentials::TokenFile(path) => format!("tokenFile: {}", path.display()),
    };
    Ok(format!(
        "apiVersion: v1
kind: Config
current-context: {CONTEXT}
contexts:
- name: {CONTEXT}
  context: {{cluster: testbed, user: testbed}}
clusters:
- name: testbed
  cluster:
    server: https://{server}
    certificate-authority-data: {}
users:
- name: testbed
  user:
    {user}
",
        read("ca.crt")?
    ))
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn create() -> std::result::Result<Self, rcgen::Error> {
        let mut parameters = CertificateParams::default();
        parameters
            .distinguished_name
            .push(DnType::CommonName, "kari-testbed");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = KeyPair::generate()?;
        let pem = parameters.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(parameters, key),
            pem,
        })
    }

    fn issue(
        &self,
        directory: &Directory,
        file: &str,
        user: &str,
        group: Option<&str>,
        addresses: &[Ipv4Addr],
    ) -> Result<()> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            parameters
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        parameters.subject_alt_names = addresses
            .iter()
            .map(|&address| SanType::IpAddress(IpAddr::V4(address)))
            .collect();
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().map_err(certificate_error)?;
        let certificate = parameters
            .signed_by(&key, &self.issuer)
            .map_err(certificate_error)?;
        write_file(
            &directory.pki(&format!("{file}.crt")),
            certificate.pem().as_bytes(),
        )?;
        write_file(
            &directory.pki(&format!("{file}.key")),
            key.serialize_pem().as_bytes(),
        )
    }
}

fn certificate_error(error: rcgen::Error) -> Error {
    Error::State(format!(
        "cannot make the control plane's certificates: {error}"
    ))
}

/// Standard base64 (RFC 4648), as kubeconfigs hold certificates.
fn base64(content: &[u8]) -> String {
    serde_json::to_value(k8s_openapi::ByteString(content.to_vec()))
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}
