//! The secret variables of a release as one value: what the controller seals and the node opens.
//!
//! As bytes: `<process> NUL <name> NUL <value> NUL` for each, sorted; the process is empty for variables of every
//! process. No part has a NUL, so that the same variables are the same bytes and nothing needs an escape.

use std::collections::BTreeMap;

use zeroize::Zeroizing;

use super::SecretBytes;
use crate::api::release::SecretVariables;

/// Secret variables, of every process (`None`) and of single ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecretEnvironment {
    scopes: BTreeMap<Option<String>, BTreeMap<String, SecretBytes>>,
}

/// Bytes that are no environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the sealed variables are not in the form that this version knows")]
pub struct MalformedEnvironment;

impl SecretEnvironment {
    /// Adds a variable of every process, or of one.
    pub fn insert(&mut self, process: Option<&str>, name: &str, value: SecretBytes) {
        let scope = self.scopes.entry(process.map(str::to_owned)).or_default();
        scope.insert(name.to_owned(), value);
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.scopes.is_empty()
    }

    /// Bytes of all names and values.
    pub fn size(&self) -> usize {
        let variables = self.scopes.values().flatten();
        variables
            .map(|(name, value)| name.len() + value.len())
            .sum()
    }

    /// All values.
    pub fn values(&self) -> impl Iterator<Item = &SecretBytes> {
        self.scopes.values().flat_map(BTreeMap::values)
    }

    /// That of a variable of every process, or of one.
    pub fn get(&self, process: Option<&str>, name: &str) -> Option<&SecretBytes> {
        self.scopes.get(&process.map(str::to_owned))?.get(name)
    }

    /// Those of every process, or of one.
    pub fn of(&self, process: Option<&str>) -> impl Iterator<Item = (&str, &SecretBytes)> {
        let found = self
            .scopes
            .iter()
            .filter(move |(scope, _)| scope.as_deref() == process);
        found
            .flat_map(|(_, variables)| variables)
            .map(|(name, value)| (name.as_str(), value))
    }

    /// What a template says of them: names, and digests by `digest`, which is given a process and bytes.
    pub fn summary(&self, digest: impl Fn(&str, &[u8]) -> String) -> Vec<SecretVariables> {
        self.scopes
            .iter()
            .map(|(process, variables)| {
                let mut bytes = Zeroizing::new(Vec::new());
                for (name, value) in variables {
                    write(&mut bytes, &[name.as_bytes(), value.expose()]);
                }
                SecretVariables {
                    process: process.clone(),
                    names: variables.keys().cloned().collect(),
                    digest: digest(process.as_deref().unwrap_or_default(), &bytes),
                }
            })
            .collect()
    }

    /// All of it as bytes.
    pub fn to_bytes(&self) -> SecretBytes {
        let mut bytes = Vec::with_capacity(self.size() + 64 * self.scopes.len());
        for (process, variables) in &self.scopes {
            let process = process.as_deref().unwrap_or_default();
            for (name, value) in variables {
                write(
                    &mut bytes,
                    &[process.as_bytes(), name.as_bytes(), value.expose()],
                );
            }
        }
        SecretBytes::new(bytes)
    }

    /// Reads what [`SecretEnvironment::to_bytes`] wrote.
    pub fn from_bytes(bytes: &SecretBytes) -> Result<Self, MalformedEnvironment> {
        let mut environment = Self::default();
        let Some(bytes) = bytes.expose().strip_suffix(&[0]) else {
            return Ok(environment);
        };
        let mut parts = bytes.split(|byte| *byte == 0);
        while let Some(process) = parts.next() {
            let (Some(name), Some(value)) = (parts.next(), parts.next()) else {
                return Err(MalformedEnvironment);
            };
            let text = |bytes| std::str::from_utf8(bytes).map_err(|_| MalformedEnvironment);
            let process = text(process)?;
            let process = (!process.is_empty()).then_some(process);
            environment.insert(process, text(name)?, SecretBytes::new(value.to_vec()));
        }
        Ok(environment)
    }
}

fn write(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
        out.push(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> SecretBytes {
        SecretBytes::new(text.as_bytes().to_vec())
    }

    #[test]
    fn variables_read_back_and_do_not_depend_on_their_order() {
        let mut one = SecretEnvironment::default();
        one.insert(Some("web"), "B", secret(""));
        one.insert(None, "A", secret("line\nline\u{1}\"'\\ ü"));
        one.insert(None, "C", secret("3"));
        let mut other = SecretEnvironment::default();
        other.insert(None, "C", secret("3"));
        other.insert(None, "A", secret("line\nline\u{1}\"'\\ ü"));
        other.insert(Some("web"), "B", secret(""));
        assert_eq!(one.to_bytes(), other.to_bytes());
        assert_eq!(
            SecretEnvironment::from_bytes(&one.to_bytes()),
            Ok(one.clone())
        );
        let names: Vec<_> = one.of(None).map(|(name, _)| name).collect();
        assert_eq!(names, ["A", "C"]);
        assert_eq!(one.of(Some("other")).count(), 0);
        let nothing = SecretEnvironment::default();
        assert_eq!(
            SecretEnvironment::from_bytes(&nothing.to_bytes()),
            Ok(nothing)
        );
        assert!(SecretEnvironment::from_bytes(&secret("web\0A\0")).is_err());
    }

    #[test]
    fn a_summary_has_the_names_and_a_digest_for_each_place() {
        let mut environment = SecretEnvironment::default();
        environment.insert(None, "A", secret("1"));
        environment.insert(Some("web"), "B", secret("2"));
        let summary = environment.summary(|process, bytes| {
            format!(
                "{process}:{}",
                String::from_utf8_lossy(bytes).replace('\0', ",")
            )
        });
        let said: Vec<_> = summary
            .iter()
            .map(|s| (s.process.as_deref(), s.names.join(" "), s.digest.as_str()))
            .collect();
        assert_eq!(
            said,
            [
                (None, "A".to_owned(), ":A,1,"),
                (Some("web"), "B".to_owned(), "web:B,2,")
            ]
        );
    }
}
