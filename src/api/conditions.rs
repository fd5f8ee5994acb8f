//! Conditions as kstatus reads them: `Ready`, `Reconciling`, `Stalled` on a
//! Deployment, `Ready`, `Drifted`, `Reachable` on a Release.
//!
//! Invariant: `lastTransitionTime` moves only with `status`, so that a status
//! that says the same is the same and is not written again.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use super::reasons::Reason;

/// A condition's type: on a Deployment, whether every node that should serve the revision does; on
/// a Release, whether the node serves `spec.releaseId`.
pub const READY: &str = "Ready";
/// Something is going on (kstatus: InProgress).
pub const RECONCILING: &str = "Reconciling";
/// Nothing more will happen without a person (kstatus: Failed).
pub const STALLED: &str = "Stalled";
/// The host was not as it should be and is being put right.
pub const DRIFTED: &str = "Drifted";
/// The node's agent renews its Lease; written by the controller.
pub const REACHABLE: &str = "Reachable";

/// What a condition says, before it is compared with what stands there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// The condition's type.
    pub kind: &'static str,
    /// True, False or, as `None`, Unknown.
    pub status: Option<bool>,
    /// Why.
    pub reason: Reason,
    /// The same for people; at most 32 KiB by the API's rule, cut at [`MESSAGE_LIMIT`].
    pub message: String,
}

/// Bytes of a condition's message at most: a status is read on a terminal.
pub const MESSAGE_LIMIT: usize = 2048;

/// The conditions for `statements`, in their order, keeping the transition time of what has the same status.
pub fn conditions(
    statements: &[Statement],
    observed_generation: i64,
    before: &[Condition],
    now: Timestamp,
) -> Vec<Condition> {
    statements
        .iter()
        .map(|statement| {
            let Statement {
                kind,
                status,
                reason,
                message,
            } = statement;
            let status = match status {
                Some(true) => "True",
                Some(false) => "False",
                None => "Unknown",
            };
            let since = before
                .iter()
                .find(|c| c.type_ == *kind && c.status == status)
                .map(|c| c.last_transition_time.clone());
            Condition {
                type_: (*kind).to_owned(),
                status: status.to_owned(),
                reason: reason.as_str().to_owned(),
                message: cut(message, MESSAGE_LIMIT).to_owned(),
                observed_generation: Some(observed_generation),
                last_transition_time: since.unwrap_or(Time(now)),
            }
        })
        .collect()
}

/// The first `limit` bytes of `text`, cut at a character.
pub fn cut(text: &str, limit: usize) -> &str {
    if text.len() <= limit {
        return text;
    }
    let mut end = limit;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(status: bool) -> Statement {
        Statement {
            kind: READY,
            status: Some(status),
            reason: Reason::Deployed,
            message: "m".into(),
        }
    }

    #[test]
    fn the_transition_time_moves_only_with_the_status() {
        let (early, late) = (
            Timestamp::from_second(1).unwrap_or_default(),
            Timestamp::from_second(9).unwrap_or_default(),
        );
        let first = conditions(&[ready(true)], 1, &[], early);
        let same = conditions(&[ready(true)], 2, &first, late);
        assert_eq!(same[0].last_transition_time, Time(early));
        assert_eq!(same[0].observed_generation, Some(2));
        assert_eq!(
            conditions(&[ready(false)], 2, &same, late)[0].last_transition_time,
            Time(late)
        );
    }

    #[test]
    fn a_message_is_cut_at_a_character() {
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("aé", 3), "aé");
    }
}
