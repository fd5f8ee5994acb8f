//! Certificates with their keys, as files.
//!
//! Invariants: what is on the disk is 0600 and root's; what nginx reads is in memory and its own user's alone. A
//! name has the digest of its content and is never written again with another.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::CertificateId;
use super::configuration::{
    CERTIFICATE_FOLDER, CERTIFICATE_RUN_FOLDER, RUN_FOLDER, certificate_files, certificate_files_of,
};
use crate::agent::host::store::{self, StoreError, write_durably};
use crate::api::names::AppName;
use crate::certificate::ServerCertificate;

/// The node's certificates.
#[derive(Debug)]
pub(super) struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    /// `proxy` is the proxy's folder.
    pub fn new(proxy: &Path) -> Self {
        Self {
            folder: proxy.join(CERTIFICATE_FOLDER),
        }
    }

    /// Makes the folder.
    pub fn ensure(&self) -> Result<(), StoreError> {
        store::make_folder(&self.folder, 0o700, None)
    }

    /// Whether a certificate and its key are on the disk.
    pub fn has(&self, app: &AppName, certificate: &CertificateId) -> bool {
        let files = certificate_files(app, certificate);
        files.iter().all(|file| self.folder.join(file).is_file())
    }

    /// Writes a certificate and its key to the disk.
    pub fn keep(
        &self,
        app: &AppName,
        id: &CertificateId,
        certificate: &ServerCertificate,
    ) -> Result<(), StoreError> {
        self.ensure()?;
        let ServerCertificate { chain, key } = certificate;
        let [chain_file, key_file] = certificate_files(app, id);
        for (file, text) in [(key_file, key), (chain_file, chain)] {
            write_durably(&self.folder.join(file), text.as_bytes(), 0o600)?;
        }
        Ok(())
    }

    /// Copies what is on the disk to where nginx reads it, before a reload.
    pub fn hand_over(&self, app: &AppName, id: &CertificateId) -> Result<(), StoreError> {
        let run = Path::new(CERTIFICATE_RUN_FOLDER);
        let owner =
            std::fs::metadata(RUN_FOLDER).map_err(wrong("look at", Path::new(RUN_FOLDER)))?;
        let give = |path: &Path, mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(path, mode)
                .and_then(|()| std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid())))
                .map_err(wrong("give the proxy", path))
        };
        store::make_folder(run, 0o700, None)?;
        give(run, 0o700)?;
        for file in certificate_files(app, id) {
            let to = run.join(&file);
            let Some(content) = store::read(&self.folder.join(&file))? else {
                continue;
            };
            if store::read(&to)?.as_deref() != Some(&content[..]) {
                write_durably(&to, &content, 0o600)?;
            }
            give(&to, 0o600)?;
        }
        Ok(())
    }

    /// Removes the certificates of an app that it does not use.
    pub fn collect(
        &self,
        app: &AppName,
        used: &BTreeSet<&CertificateId>,
    ) -> Result<(), StoreError> {
        let used: BTreeSet<String> = used
            .iter()
            .flat_map(|id| certificate_files(app, id))
            .collect();
        for folder in [Path::new(CERTIFICATE_RUN_FOLDER), &self.folder] {
            for name in store::names_in(folder)? {
                if name.starts_with(&certificate_files_of(app)) && !used.contains(&name) {
                    store::remove(&folder.join(name))?;
                }
            }
        }
        Ok(())
    }

    /// The server's own certificate, as it shows it.
    pub fn leaf(
        &self,
        app: &AppName,
        id: &CertificateId,
    ) -> Result<Option<CertificateDer<'static>>, StoreError> {
        let [chain, _] = certificate_files(app, id);
        let text = store::read(&self.folder.join(chain))?.unwrap_or_default();
        Ok(CertificateDer::pem_slice_iter(&text)
            .next()
            .and_then(Result::ok))
    }
}

fn wrong(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        action,
        path,
        source,
    }
}
