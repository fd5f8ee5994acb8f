//! Takes secret values out of what processes said before anybody else gets to see it: the ends of logs and the
//! messages of probes.
//!
//! What is masked is a value as it is, and each of its lines. Deliberately absent: other spellings of a value, such as
//! its base64. A process that encodes its secrets and prints them cannot be helped.

use std::collections::BTreeSet;

use crate::api::ReleaseStatus;
use crate::seal::SecretBytes;
use crate::seal::environment::SecretEnvironment;

/// Bytes of a value below which it is not masked: what short words stand for is in texts that have nothing to do
/// with a secret, and taking them out would both make the text useless and tell the secret by where it was.
pub const SHORTEST_MASKED: usize = 6;

/// What stands where a value was.
const MASK: &str = "***";

/// The values that are taken out, the longest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Masks {
    values: Vec<SecretBytes>,
}

impl Masks {
    /// Those of secret variables.
    pub fn of<'a>(environments: impl IntoIterator<Item = &'a SecretEnvironment>) -> Self {
        let mut texts = BTreeSet::new();
        for environment in environments {
            for value in environment.values() {
                let Ok(text) = std::str::from_utf8(value.expose()) else {
                    continue;
                };
                let parts = text.lines().map(str::trim).chain([text.trim()]);
                texts.extend(
                    parts
                        .filter(|part| part.len() >= SHORTEST_MASKED)
                        .map(str::to_owned),
                );
            }
        }
        let mut texts: Vec<String> = texts.into_iter().collect();
        texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
        Self {
            values: texts
                .into_iter()
                .map(|text| SecretBytes::new(text.into_bytes()))
                .collect(),
        }
    }

    /// The text without them.
    pub fn mask(&self, text: &str) -> String {
        let mut masked = text.to_owned();
        for value in &self.values {
            if let Ok(value) = std::str::from_utf8(value.expose())
                && masked.contains(value)
            {
                masked = masked.replace(value, MASK);
            }
        }
        masked
    }

    /// A status whose texts are without them.
    pub fn mask_status(&self, mut status: ReleaseStatus) -> ReleaseStatus {
        if self.values.is_empty() {
            return status;
        }
        for condition in &mut status.conditions {
            condition.message = self.mask(&condition.message);
        }
        let attempt = status.attempt.as_mut();
        if let Some(failure) = attempt.and_then(|attempt| attempt.failure.as_mut()) {
            failure.message = self.mask(&failure.message);
            failure.log_tail = failure.log_tail.as_deref().map(|tail| self.mask(tail));
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_their_lines_are_taken_out_and_short_words_stay() {
        let mut environment = SecretEnvironment::default();
        for (name, value) in [
            ("A", "hunter2"),
            ("B", "hunter2-and-more\n"),
            ("C", "first line\nsecond line\n}\n"),
            ("D", "true"),
        ] {
            environment.insert(None, name, SecretBytes::new(value.into()));
        }
        let masks = Masks::of([&environment]);
        assert_eq!(
            masks.mask("login hunter2, hunter2-and-more: true\n> second line <\n}"),
            "login ***, ***: true\n> *** <\n}"
        );
        assert!(!format!("{masks:?}").contains("hunter2"));
        assert_eq!(Masks::default().mask("hunter2"), "hunter2");
    }
}
