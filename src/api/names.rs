//! What things are called: identifiers as types of their own, and the names that
//! are derived from others.
//!
//! Invariant: a name that reaches a path, a unit or a label was made or checked
//! here. A namespace and a Deployment's name have no dot, so `<namespace>.<name>`
//! is told apart from every other.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// A name that breaks the rules of its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {value:?} is not valid: {rule}")]
pub struct NameError {
    kind: &'static str,
    value: String,
    rule: &'static str,
}

/// A Deployment, by namespace and name: the identity of an app, on the API and on a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AppName {
    namespace: String,
    name: String,
}

impl AppName {
    /// Checks that both are DNS labels; the name at most 52 characters, as the schema has it.
    pub fn new(namespace: &str, name: &str) -> Result<Self, NameError> {
        if !is_dns_label(namespace, 63) {
            return Err(NameError {
                kind: "namespace",
                value: namespace.to_owned(),
                rule: "a DNS label of at most 63 characters",
            });
        }
        if !is_dns_label(name, 52) {
            return Err(NameError {
                kind: "Deployment name",
                value: name.to_owned(),
                rule: "a DNS label of at most 52 characters",
            });
        }
        Ok(Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Reads `<namespace>.<name>`, as folders and units spell it.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let (namespace, name) = text.split_once('.').ok_or_else(|| NameError {
            kind: "app",
            value: text.to_owned(),
            rule: "<namespace>.<name>",
        })?;
        Self::new(namespace, name)
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The Deployment's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// `<namespace>.<name>`: the app's folder, and the middle of its units' names.
impl fmt::Display for AppName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.namespace, self.name)
    }
}

fn is_dns_label(text: &str, limit: usize) -> bool {
    !text.is_empty()
        && text.len() <= limit
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

macro_rules! text_name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Takes a name that the API server, or this program, has checked.
            pub fn new(name: impl Into<String>) -> Self {
                Self(name.into())
            }
            /// The name itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_name!(
    /// A node, by the name of its Node object: a DNS subdomain of at most 253 characters.
    NodeName
);
text_name!(
    /// A ControllerRevision of a Deployment: `<deployment>-<10 hex of its content>`.
    RevisionName
);

/// A commit: 40 or 64 lower-case hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Commit(String);

impl Commit {
    /// Checks the digits.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let digits = matches!(text.len(), 40 | 64)
            && text
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if digits {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError {
                kind: "commit",
                value: text.to_owned(),
                rule: "40 or 64 lower-case hexadecimal digits",
            })
        }
    }
    /// All of its digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// Its first seven digits, for people.
    pub fn short(&self) -> &str {
        &self.0[..7]
    }
}

impl TryFrom<String> for Commit {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl From<Commit> for String {
    fn from(commit: Commit) -> String {
        commit.0
    }
}

impl fmt::Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The identity of one decision to run a revision on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ReleaseId(pub Uuid);

impl ReleaseId {
    /// UUID version 5 (RFC 9562) of (Deployment's uid, node, revision, attempt, handled retry): the same
    /// decision has the same id whoever takes it, and two decisions never share one. The retry is in it
    /// because attempts are counted from 1 again in a Release that is made anew: a node that still knows
    /// how the attempt before it ended would take one for the other, and not try again.
    pub fn derive(
        deployment_uid: &str,
        node: &NodeName,
        revision: &RevisionName,
        attempt: i64,
        retry: Option<&str>,
    ) -> Self {
        let name = match retry {
            None => format!("{deployment_uid}/{node}/{revision}/{attempt}"),
            Some(retry) => format!("{deployment_uid}/{node}/{revision}/{attempt}/{retry}"),
        };
        Self(Uuid::new_v5(&NAMESPACE, name.as_bytes()))
    }
}

/// The name space of release ids; any constant would do.
const NAMESPACE: Uuid = Uuid::from_u128(0x6b61_7269_2e64_6576_8000_7265_6c65_6173);

impl schemars::JsonSchema for ReleaseId {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ReleaseId".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "minLength": 36, "maxLength": 36, "pattern": "^[0-9a-f-]{36}$"})
    }
}

impl fmt::Display for ReleaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The name of a Deployment's Release on a node: `<deployment>-<10 hex of the node's name>`. Two nodes of
/// one Deployment share a name with a chance of 1 in 10¹² per pair; `spec.nodeName` is compared.
pub fn release_name(deployment: &str, node: &NodeName) -> String {
    format!(
        "{deployment}-{}",
        &hex_digest(node.as_str().as_bytes())[..10]
    )
}

/// The name of a node's Lease, or nothing if the node's name is too long to have one (above 242 characters).
pub fn node_lease_name(node: &NodeName) -> Option<String> {
    let name = format!("{NODE_LEASE_PREFIX}{node}");
    (name.len() <= 253).then_some(name)
}

/// What every node's Lease is called before the node's name.
pub const NODE_LEASE_PREFIX: &str = "kari-agent-";

/// SHA-256 in lower-case hexadecimal.
pub fn hex_digest(content: &[u8]) -> String {
    use fmt::Write as _;
    let mut hex = String::with_capacity(64);
    for byte in Sha256::digest(content) {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_app_reads_back_from_how_it_is_spelled() {
        let app = AppName::new("web", "shop").unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(app.to_string(), "web.shop");
        assert_eq!(AppName::parse("web.shop").as_ref(), Ok(&app));
        for bad in ["web", "web.", ".shop", "a.b.c", "We.b", "../x.y", "-a.b"] {
            assert!(AppName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_same_decision_has_the_same_id_and_another_has_another() {
        let id = |revision: &str, attempt, retry| {
            let (node, revision) = (NodeName::new("n1"), RevisionName::new(revision));
            ReleaseId::derive("uid", &node, &revision, attempt, retry)
        };
        assert_eq!(id("a", 1, None), id("a", 1, None));
        assert_ne!(id("a", 1, None), id("a", 2, None));
        assert_ne!(id("a", 1, None), id("b", 1, None));
        assert_ne!(id("a", 1, None), id("a", 1, Some("again")));
    }

    #[test]
    fn a_commit_is_all_of_its_digits() {
        assert!(Commit::parse(&"a".repeat(40)).is_ok());
        assert!(Commit::parse(&"A".repeat(40)).is_err());
        assert!(Commit::parse("abc").is_err());
    }
}
