//! Mirrors: one bare git repository on the node for each url that apps are built from, and for each credential
//! that it is read with.
//!
//! A fetch belongs to its mirror, not to an app: one unit, one backoff, and apps
//! that want the same commit share it. It runs as a transient unit, as the user
//! kari-git, in a jail that sees this mirror alone. An app has its commit when
//! the mirror's `refs/kari/<namespace>/<name>` names it, which the unit sets
//! last: that is read from the disk, and nothing else counts.
//!
//! A mirror has no more history than was asked for: one commit where the server can give it so. What the
//! submodules of a commit are at is brought into the mirror of the commit's own repository.
//!
//! - [`step`] is the unit: what git is told. Pure.
//! - [`failure`] is what git's words mean. Pure.
//! - [`schedule`] decides what to fetch when: slots, queue, backoff, repair. Pure.
//! - [`fetcher`] does it.
//!
//! A credential is in files in memory while a fetch runs, which its jail alone sees.
//!
//! Deliberately absent: git run by the agent. A mirror is kari-git's, and what is
//! in it must not be believed by root. Nothing in it is opened by way of a
//! symbolic link.

use crate::api::names::{AppName, Commit, hex_digest};
use crate::api::reasons::Reason;

mod credentials;
mod failure;
mod fetcher;
mod refs;
mod schedule;
mod step;
mod upkeep;

pub use fetcher::{MirrorError, MirrorSettings, Mirrors};
pub use schedule::MirrorState;

/// The url of a repository: `https://`, `ssh://`, `http://`, `git://` or `user@host:path`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceUrl {
    text: String,
    transport: Transport,
}

/// How a repository is reached. Local paths and helpers (`ext::`) are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Transport {
    Https,
    Http,
    Ssh,
    Git,
}

/// A text that is not a [`SourceUrl`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not the url of a repository: it must be https://host/path, ssh://[user@]host[:port]/path, user@host:path, http://host/path or git://host/path, without spaces and without a password"
)]
pub struct SourceUrlError {
    text: String,
}

/// Bytes of a url, as the schema has it.
const LONGEST_URL_BYTES: usize = 1024;

impl SourceUrl {
    /// Refuses all that git could take for an option, a helper or a path of the node.
    pub fn parse(text: &str) -> Result<Self, SourceUrlError> {
        let refused = || SourceUrlError {
            text: text.to_owned(),
        };
        if text.len() > LONGEST_URL_BYTES || !text.bytes().all(|b| (b'!'..=b'~').contains(&b)) {
            return Err(refused());
        }
        let (transport, authority, path) = match text.split_once("://") {
            Some((scheme, rest)) => {
                let transport = match scheme {
                    "https" => Transport::Https,
                    "http" => Transport::Http,
                    "ssh" => Transport::Ssh,
                    "git" => Transport::Git,
                    _ => return Err(refused()),
                };
                let (authority, path) = rest.split_once('/').ok_or_else(refused)?;
                (transport, authority, path)
            }
            None => {
                let (authority, path) = text.split_once(':').ok_or_else(refused)?;
                if !authority.contains('@') || authority.contains('/') || path.starts_with(':') {
                    return Err(refused());
                }
                (Transport::Ssh, authority, path)
            }
        };
        let (user, host) = match authority.split_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let is_user = |user: &str| {
            transport == Transport::Ssh
                && user.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && user
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        let is_host = host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[')
            && host
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || ".-:[]".contains(c));
        if path.is_empty() || !is_host || !user.is_none_or(is_user) {
            return Err(refused());
        }
        Ok(Self {
            text: text.to_owned(),
            transport,
        })
    }

    /// The url as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl std::fmt::Display for SourceUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// Which credential a repository is read with.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CredentialId {
    /// Whose it is: nobody reads by way of a mirror what his own credential would not let him.
    pub namespace: String,
    /// The digest under which the node was given it.
    pub digest: String,
}

/// The name of a mirror: 40 hexadecimal digits, of digests of the url and of the credential.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MirrorKey(String);

impl MirrorKey {
    /// The mirror of a repository that is read with this credential, or by everybody.
    pub fn of(source: &SourceUrl, credential: Option<&CredentialId>) -> Self {
        let url = hex_digest(format!("{source}\n").as_bytes());
        let Some(CredentialId { namespace, digest }) = credential else {
            return Self(url[..KEY_DIGITS].to_owned());
        };
        let credential = hex_digest(format!("{namespace}\n{digest}\n").as_bytes());
        let own = &credential[..KEY_DIGITS - URL_DIGITS];
        Self(format!("{}{own}", &url[..URL_DIGITS]))
    }

    /// Its digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether both are mirrors of one repository.
    fn is_of_the_same_url(&self, other: &Self) -> bool {
        self.0.get(..URL_DIGITS) == other.0.get(..URL_DIGITS)
    }
}

/// Hexadecimal digits of a mirror's name.
const KEY_DIGITS: usize = 40;

/// Those of them that say of which url it is: 96 bits, so that no two urls ever meet.
const URL_DIGITS: usize = 24;

/// What an app wants of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// The repository.
    pub source: SourceUrl,
    /// The full reference that the commit was found at, for servers that give no commit by its id.
    pub reference: Option<String>,
    /// The commit.
    pub commit: Commit,
    /// The commit that it must descend from; nothing if any will do.
    pub base: Option<Commit>,
    /// Whether what its submodules are at is wanted too.
    pub submodules: bool,
    /// What it is read with; nothing if everybody may read it.
    pub credential: Option<CredentialId>,
}

impl Want {
    /// The mirror that it is wanted of.
    pub fn key(&self) -> MirrorKey {
        MirrorKey::of(&self.source, self.credential.as_ref())
    }
}

/// Why an app does not have its commit. A reason of class Environment: it is tried again; of class Invalid: it
/// is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct FetchFailure {
    /// SourceUnavailable, AuthenticationFailed, HostKeyMismatch, RefNotFound, DiskPressure or ToolMissing;
    /// RewindRefused or, for submodules that will not do, InvalidSpec.
    pub reason: Reason,
    /// What happened, to what.
    pub message: String,
}

/// Where the commit of an app is held: the app's own reference in the mirror.
fn hold_reference(app: &AppName) -> String {
    // Two parts, as `<namespace>.<name>` may end in `.lock`, which git refuses.
    format!("refs/kari/{}/{}", app.namespace(), app.name())
}

/// Where it is said whether that commit is as the app wants it.
fn finding_path(app: &AppName) -> String {
    format!("findings/{}/{}", app.namespace(), app.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_one_of_five_forms_and_never_an_option_a_helper_or_a_path() {
        for good in [
            "https://git.example.com/shop.git",
            "https://git.example.com:8443/a/b",
            "http://10.0.0.1:3000/shop.git",
            "http://[::1]:3000/shop.git",
            "git://git.example.com/shop.git",
            "ssh://git@git.example.com:22/shop.git",
            "ssh://git.example.com/~me/shop.git",
            "git@github.com:kari/shop.git",
        ] {
            assert_eq!(
                SourceUrl::parse(good).as_ref().map(SourceUrl::as_str),
                Ok(good)
            );
        }
        for bad in [
            "",
            "/srv/git/shop.git",
            "./shop",
            "file:///srv/shop.git",
            "ext::sh -c id",
            "ext::id",
            "fd::3",
            "a::b@c:d",
            "--upload-pack=id",
            "-u@h:p",
            "ssh://-oProxyCommand=id/x",
            "ssh://a@-oProxyCommand=id/x",
            "git@-oProxyCommand=id:x",
            "https://user:secret@host/x",
            "https://user@host/x",
            "ssh://user:secret@host/x",
            "https://host",
            "https:///x",
            "git@host:",
            "https://host/a b",
            "https://host/a\nb",
            "HTTPS://host/a",
            "shop:x",
            "host/x@y:z",
        ] {
            assert!(SourceUrl::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn two_urls_two_credentials_and_two_tenants_never_share_a_mirror() {
        let key = |url, credential: Option<(&str, &str)>| {
            let credential = credential.map(|(namespace, digest)| CredentialId {
                namespace: namespace.to_owned(),
                digest: digest.to_owned(),
            });
            let source = SourceUrl::parse(url).unwrap_or_else(|e| panic!("{e}"));
            MirrorKey::of(&source, credential.as_ref())
        };
        let keys = [
            key("https://h/a", None),
            key("https://h/b", None),
            key("https://h/a", Some(("web", "1"))),
            key("https://h/a", Some(("web", "2"))),
            key("https://h/a", Some(("other", "1"))),
            key("https://h/b", Some(("web", "1"))),
        ];
        for (at, one) in keys.iter().enumerate() {
            assert_eq!(one.as_str().len(), 40);
            for (other_at, other) in keys.iter().enumerate() {
                assert_eq!(one == other, at == other_at);
                let same_url = [0, 2, 3, 4].contains(&at) == [0, 2, 3, 4].contains(&other_at);
                assert_eq!(one.is_of_the_same_url(other), same_url);
            }
        }
        assert_eq!(key("https://h/a", None), keys[0]);
    }
}
