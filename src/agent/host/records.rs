//! What the agent remembers of an app on disk, as JSON.
//!
//! - `applied.json` ([`AppliedRecord`]): what is committed; enough to heal,
//!   restart and remove the app without the API.
//! - `attempt.json` ([`AttemptRecord`]): the last known wish and how far it got,
//!   written before the attempt's first effect and kept with its outcome until
//!   the wish changes, so that a kill between a failure and its report repeats
//!   nothing.
//! - `releases/<revision>.json` ([`ReleaseRecord`]): what going back needs.
//! - `kept.json` ([`KeptRecord`]): whose state is left where the app was taken away.
//! - `users.json` ([`UsersRecord`]): the app's users, never given to another app
//!   while any of its files exist.
//!
//! Each has a `version`. Unknown fields are read over, so that an older agent
//! can read what a newer one of the same version wrote. A record that does not
//! parse is an error for people; nothing is ever deleted or started anew for it.
//!
//! This module does no I/O: [`super::store`] reads and writes.

use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::api::names::{AppName, Commit, ReleaseId, RevisionName, hex_digest};
use crate::api::reasons::Reason;
use crate::api::release::{SealedValue, Template};

/// The version that this agent writes and the only one that it reads.
pub const RECORD_VERSION: u32 = 1;

macro_rules! digests {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The digest of `content`: the first 40 hexadecimal digits of its SHA-256.
            pub fn of(content: &[u8]) -> Self {
                Self(hex_digest(content)[..DIGEST_DIGITS].to_owned())
            }
            /// Its digits.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = DigestError;
            fn try_from(text: String) -> Result<Self, DigestError> {
                let digits = text.len() == DIGEST_DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                if digits { Ok(Self(text)) } else { Err(DigestError(text)) }
            }
        }

        impl From<$name> for String {
            fn from(digest: $name) -> String {
                digest.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}

/// Hexadecimal digits of a digest in names of files and units: 160 bits, so that no two contents ever meet.
const DIGEST_DIGITS: usize = 40;

/// A text that is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not {DIGEST_DIGITS} lower-case hexadecimal digits")]
pub struct DigestError(String);

digests!(
    /// The key of a build tree: a digest of all that the tree follows from.
    BuildKey,
    /// The digest of an environment file's content.
    EnvDigest,
    /// The digest of a unit's content but for its port.
    ContentDigest,
);

/// `applied.json`: what is committed on this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AppliedRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// The Deployment.
    pub app: AppName,
    /// The Deployment's uid, where known: tells a Deployment from a later one of the same name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment_uid: Option<String>,
    /// The committed release; absent when nothing was ever committed, which happens only together
    /// with `removing`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<AppliedRelease>,
    /// The tombstone: the app is being taken away, and this record is deleted last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removing: Option<Removing>,
    /// Since when the app is left running without a Release, by `deletionPolicy: Orphan` or because its
    /// Node object went; absent again when a Release has taken it on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orphaned: Option<Timestamp>,
}

/// The committed release.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AppliedRelease {
    /// The release's identity.
    pub release_id: ReleaseId,
    /// The ControllerRevision it was made from.
    pub revision: RevisionName,
    /// The commit that runs.
    pub commit: Commit,
    /// The rendered template.
    pub template: Template,
    /// What of it is secret, sealed to a key of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sealed: Vec<SealedValue>,
    /// The build tree that the processes run in.
    pub build_key: BuildKey,
    /// The units that the target names, in the template's order.
    pub processes: Vec<ProcessRecord>,
    /// When it was committed.
    pub available_since: Timestamp,
}

/// One process of a release as a unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessRecord {
    /// The process's name.
    pub name: String,
    /// The full name of its unit, `kari.….service`.
    pub unit: String,
    /// The unit file's text, so that it can be put back whatever made it.
    pub text: String,
    /// The digest of all that the unit says but its port: equal means that the unit need not be touched.
    pub content: ContentDigest,
    /// The port it was given, if it listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Its environment file.
    pub env_digest: EnvDigest,
}

/// The tombstone of an app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Removing {
    /// When the removal began.
    pub since: Timestamp,
    /// Whether `state/` stays on the node.
    pub keep_state: bool,
}

/// `attempt.json`: the last known wish and how far it got.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// What is wanted.
    pub wish: Wish,
    /// The build tree of the wish.
    pub build_key: BuildKey,
    /// How often the build step was begun anew within this attempt, from 0. Part of the step's unit
    /// name and of its stage, so that no two tries share either.
    #[serde(default)]
    pub build_try: u32,
    /// The result of the build step, as measured; absent until it has ended. A build that was found
    /// sealed has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build_result: Option<StepResult>,
    /// The units that were chosen; empty until the first is about to be written.
    #[serde(default)]
    pub processes: Vec<ProcessRecord>,
    /// Whether the proxy may already give traffic to the new units; written before it is told so.
    #[serde(default)]
    pub switching: bool,
    /// Units of the committed release that give way to the attempt's, in a `Recreate`: written before the
    /// first is stopped. While the attempt goes on they are not started again; when it is taken back they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stopped_old: Vec<String>,
    /// How it ended; absent while it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
}

/// What the Release's spec asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Wish {
    /// The Deployment.
    pub app: AppName,
    /// The Deployment's uid, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment_uid: Option<String>,
    /// The release's identity: another one is another attempt.
    pub release_id: ReleaseId,
    /// The controller's number of the attempt.
    pub attempt: i64,
    /// The Release's generation that said so.
    pub generation: i64,
    /// The ControllerRevision it is made from.
    pub revision: RevisionName,
    /// The commit that is wanted.
    pub commit: Commit,
    /// The rendered template.
    pub template: Template,
    /// Revisions that this node must be able to go back to.
    #[serde(default)]
    pub retain: Vec<RevisionName>,
    /// What of it is secret, sealed to a key of the node; without data where the node has kept it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sealed: Vec<SealedValue>,
}

/// How a step ended, in systemd's words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StepResult {
    /// `Result`: `success`, `exit-code`, `signal`, `timeout`, `oom-kill`, `resources`, …
    pub result: String,
    /// `ExecMainCode`: 0 never ran, 1 exited, 2 killed, 3 dumped core (`CLD_…`).
    pub code: i32,
    /// `ExecMainStatus`: the exit status or the signal.
    pub status: i32,
}

impl StepResult {
    /// Whether the main command ran at all; if not, an earlier one failed (for a build: the checkout).
    pub fn main_ran(&self) -> bool {
        self.code != 0
    }

    /// Whether the step did what it should: the three values that only a good end has together.
    pub fn is_success(&self) -> bool {
        self.result == "success" && self.code == 1 && self.status == 0
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "kind")]
pub enum Outcome {
    /// It is what `applied.json` says.
    Committed {
        /// When.
        at: Timestamp,
    },
    /// It failed and is not tried again before the wish changes.
    Failed {
        /// When.
        at: Timestamp,
        /// Why.
        failure: RecordedFailure,
        /// Whether everything it did is undone (its units gone, the traffic measured back).
        undone: bool,
    },
    /// A newer wish, or a removal, took its place before it was committed.
    Superseded {
        /// When.
        at: Timestamp,
        /// As for `Failed`.
        undone: bool,
    },
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecordedFailure {
    /// The reason, of the one table of reasons; its class follows from it.
    pub reason: Reason,
    /// What happened, to what, and what to do.
    pub message: String,
    /// The end of the step's log, if a step failed; at most 4 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_tail: Option<String>,
}

/// `releases/<revision>.json`: what going back to a revision needs without the API and without git.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// The ControllerRevision.
    pub revision: RevisionName,
    /// Its commit.
    pub commit: Commit,
    /// The rendered template.
    pub template: Template,
    /// What of it is secret, sealed to a key of the node and opened when it is used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sealed: Vec<SealedValue>,
    /// Its build tree.
    pub build_key: BuildKey,
    /// When it was last committed here: the newest are kept.
    pub committed_at: Timestamp,
}

/// `kept.json`: the state that was left when the app was taken off a node that may come back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeptRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// The Deployment that wrote the state, where known; another one does not get to see it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment_uid: Option<String>,
    /// Since when nothing uses it.
    pub since: Timestamp,
}

/// `users.json`: the users of an app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UsersRecord {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// The user that builds run as.
    pub build_uid: u32,
    /// The user that services run as.
    pub service_uid: u32,
}

/// A record that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It is not JSON of the expected shape.
    #[error("it is not a record of this agent's: {0}")]
    Malformed(#[source] serde_json::Error),
    /// Another version of Kari wrote it.
    #[error(
        "it has version {found}, and this agent reads version {RECORD_VERSION}: run the agent that wrote it, or remove the app with it first"
    )]
    Version {
        /// The version it has.
        found: u32,
    },
}

/// A record with its version.
pub trait Record: Serialize + DeserializeOwned {
    /// The version it carries.
    fn version(&self) -> u32;
}

macro_rules! records {
    ($($name:ident),*) => {$(
        impl Record for $name {
            fn version(&self) -> u32 {
                self.version
            }
        }
    )*};
}
records!(
    AppliedRecord,
    AttemptRecord,
    ReleaseRecord,
    KeptRecord,
    UsersRecord
);

/// Reads a record, its version first: a record of another version says so rather than naming a field.
pub fn parse<R: Record>(text: &[u8]) -> Result<R, RecordError> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let Version { version } = serde_json::from_slice(text).map_err(RecordError::Malformed)?;
    if version != RECORD_VERSION {
        return Err(RecordError::Version { found: version });
    }
    serde_json::from_slice(text).map_err(RecordError::Malformed)
}

/// Writes a record as people can read it, ending in a newline.
pub fn render<R: Record>(record: &R) -> Result<Vec<u8>, RecordError> {
    let mut text = serde_json::to_vec_pretty(record).map_err(RecordError::Malformed)?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt() -> serde_json::Value {
        serde_json::json!({
            "version": 1,
            "wish": {
                "app": {"namespace": "web", "name": "shop"},
                "releaseId": "5f0c8a4e-5d6e-5f00-8000-000000000000",
                "attempt": 3,
                "generation": 4,
                "revision": "shop-6f9c2b41ab",
                "commit": "4b825dc04b825dc04b825dc04b825dc04b825dc0",
                "template": {
                    "source": {"url": "https://git.example.com/shop.git"},
                    "processes": [{"name": "web", "command": ["./serve"]}],
                    "switch": "BlueGreen",
                    "minReadySeconds": 5,
                    "keepReleases": 2,
                },
            },
            "buildKey": "0123456789012345678901234567890123456789",
        })
    }

    fn text(value: &serde_json::Value) -> Vec<u8> {
        serde_json::to_vec(value).unwrap()
    }

    #[test]
    fn a_record_reads_back_and_what_a_newer_agent_added_is_read_over() {
        let mut json = attempt();
        let record: AttemptRecord = parse(&text(&json)).unwrap();
        assert_eq!(
            parse::<AttemptRecord>(&render(&record).unwrap()).unwrap(),
            record
        );
        json["soon"] = serde_json::json!({"a": 1});
        json["wish"]["soon"] = serde_json::json!(1);
        assert_eq!(parse::<AttemptRecord>(&text(&json)).unwrap(), record);
    }

    #[test]
    fn each_outcome_reads_back() {
        let at = Timestamp::UNIX_EPOCH;
        let failure = RecordedFailure {
            reason: Reason::BuildFailed,
            message: "the build ended with exit status 2".to_owned(),
            log_tail: Some("make: ***\n".to_owned()),
        };
        let mut record: AttemptRecord = parse(&text(&attempt())).unwrap();
        for outcome in [
            Outcome::Committed { at },
            Outcome::Failed {
                at,
                failure,
                undone: false,
            },
            Outcome::Superseded { at, undone: true },
        ] {
            record.outcome = Some(outcome);
            assert_eq!(
                parse::<AttemptRecord>(&render(&record).unwrap()).unwrap(),
                record
            );
        }
    }

    #[test]
    fn a_failure_for_a_reason_of_a_later_version_is_read_and_is_not_tried_again() {
        let mut json = attempt();
        json["outcome"] = serde_json::json!({
            "kind": "failed",
            "at": Timestamp::UNIX_EPOCH,
            "failure": {"reason": "Later", "message": "what happened", "later": 1},
            "undone": true,
        });
        let record: AttemptRecord = parse(&text(&json)).unwrap();
        let Some(Outcome::Failed { failure, .. }) = record.outcome else {
            panic!("{:?}", record.outcome);
        };
        assert_eq!(failure.reason, Reason::Unknown);
        assert_eq!(failure.reason.class(), crate::api::reasons::Class::Revision);
        assert_eq!(failure.message, "what happened");
    }

    #[test]
    fn a_record_that_is_not_this_agents_is_an_error_that_says_why() {
        let mut other_version = attempt();
        other_version["version"] = serde_json::json!(2);
        other_version.as_object_mut().unwrap().remove("wish");
        assert!(matches!(
            parse::<AttemptRecord>(&text(&other_version)),
            Err(RecordError::Version { found: 2 })
        ));
        for (path, value) in [
            ("/buildKey", serde_json::json!("../../etc")),
            ("/wish/commit", serde_json::json!("main")),
            ("/wish/releaseId", serde_json::json!("5")),
            ("/wish/template", serde_json::json!(null)),
        ] {
            let mut json = attempt();
            *json.pointer_mut(path).unwrap() = value;
            assert!(
                matches!(
                    parse::<AttemptRecord>(&text(&json)),
                    Err(RecordError::Malformed(_))
                ),
                "{path}"
            );
        }
    }

    #[test]
    fn only_a_good_end_is_a_success() {
        let result = |result: &str, code, status| StepResult {
            result: result.to_owned(),
            code,
            status,
        };
        for (result, success, main_ran) in [
            (result("success", 1, 0), true, true),
            // Nothing ran, as systemd also says of a unit that does not exist.
            (result("success", 0, 0), false, false),
            (result("exit-code", 1, 2), false, true),
            (result("exit-code", 0, 0), false, false),
            (result("signal", 2, 15), false, true),
            // Trapped the signal of its deadline and ended well.
            (result("timeout", 1, 0), false, true),
        ] {
            assert_eq!(
                (result.is_success(), result.main_ran()),
                (success, main_ran),
                "{result:?}"
            );
        }
    }
}
