//! Ranges of versions, and the tag that one stands for. Pure.
//!
//! The notation is the common ground of npm, Masterminds and Flux: comparators with a space or a comma between
//! them hold together, `||` parts alternatives, and a bare version means itself: `1.2.3` that one, `1.2` and
//! `1.2.x` each of 1.2. Deliberately absent: hyphen ranges and `!=`, which are refused.

use std::collections::BTreeMap;

use semver::{Version, VersionReq};

use crate::api::names::Commit;

/// What git calls every tag.
const TAGS: &str = "refs/tags/";

/// A range that can be asked whether it has a version.
#[derive(Debug)]
pub struct Range(Vec<VersionReq>);

/// A range that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{part:?} is not a range of versions, such as 1.x, ^1.4, or >=1.0.0 <3.0.0: {reason}")]
pub struct BadRange {
    part: String,
    reason: String,
}

impl Range {
    /// Reads a range.
    ///
    /// # Errors
    /// A part of it is no comparator of a version.
    pub fn parse(text: &str) -> Result<Self, BadRange> {
        text.split("||")
            .map(alternative)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The version that a tag's full name stands for, if it is in the range.
    pub fn version_of(&self, reference: &str) -> Option<Version> {
        let version = version_of(reference)?;
        self.0
            .iter()
            .any(|part| part.matches(&version))
            .then_some(version)
    }

    /// The tag with the highest version in the range. Of two tags of one version, the one without `v`.
    pub fn highest<'a>(
        &self,
        commits: &'a BTreeMap<String, Commit>,
    ) -> Option<(&'a str, &'a Commit)> {
        commits
            .iter()
            .filter_map(|(reference, commit)| {
                Some((self.version_of(reference)?, reference, commit))
            })
            .max_by(|a, b| a.0.cmp(&b.0).then_with(|| b.1.cmp(a.1)))
            .map(|(_, reference, commit)| (reference.as_str(), commit))
    }
}

/// How many of the references are tags.
pub fn tags(commits: &BTreeMap<String, Commit>) -> usize {
    commits
        .keys()
        .filter(|reference| reference.starts_with(TAGS))
        .count()
}

fn version_of(reference: &str) -> Option<Version> {
    let tag = reference.strip_prefix(TAGS)?;
    Version::parse(tag.strip_prefix('v').unwrap_or(tag)).ok()
}

fn alternative(text: &str) -> Result<VersionReq, BadRange> {
    let bad = |reason: String| BadRange {
        part: text.trim().to_owned(),
        reason,
    };
    let mut comparators: Vec<String> = Vec::new();
    let mut operator = String::new();
    for word in text.split([' ', ',']).filter(|word| !word.is_empty()) {
        let digits = word.trim_start_matches(['<', '>', '=', '^', '~']);
        operator.push_str(&word[..word.len() - digits.len()]);
        if digits.is_empty() {
            continue;
        }
        comparators.push(comparator(&std::mem::take(&mut operator), digits));
    }
    if !operator.is_empty() || comparators.is_empty() {
        return Err(bad("a version is missing".to_owned()));
    }
    VersionReq::parse(&comparators.join(", ")).map_err(|error| bad(error.to_string()))
}

/// A comparator as the semver crate spells it: there, a bare version would mean `^`.
fn comparator(operator: &str, version: &str) -> String {
    let version = version.strip_prefix('v').unwrap_or(version);
    let wild = |part: &str| matches!(part, "x" | "X" | "*");
    let numbers: Vec<&str> = version.split('.').collect();
    let Some(at) = numbers.iter().position(|part| wild(part)) else {
        let operator = if operator.is_empty() { "=" } else { operator };
        return format!("{operator}{version}");
    };
    match (operator, at) {
        (_, 0) => "*".to_owned(),
        ("", at) => format!("={}", numbers[..at].join(".")),
        (operator, at) => format!("{operator}{}", numbers[..at].join(".")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::testing::commit;

    fn highest(range: &str, tags: &[&str]) -> Option<String> {
        let range = Range::parse(range).unwrap_or_else(|e| panic!("{e}"));
        let commits = tags
            .iter()
            .map(|tag| (format!("{TAGS}{tag}"), commit('a')))
            .chain([("refs/heads/9.9.9".to_owned(), commit('b'))])
            .collect();
        let (reference, _) = range.highest(&commits)?;
        reference.strip_prefix(TAGS).map(str::to_owned)
    }

    #[test]
    fn a_range_stands_for_its_highest_tag() {
        let tags = [
            "v0.9.0",
            "v1.2.3",
            "1.10.0",
            "v1.9.0",
            "v2.0.0-rc.1",
            "v2.0.0-rc.2",
            "v2.1.0",
            "3.0.0",
            "latest",
            "v4",
            "v1.2",
            "release-5.0.0",
        ];
        for (range, expected) in [
            ("1.x", Some("1.10.0")),
            ("1.*", Some("1.10.0")),
            ("1", Some("1.10.0")),
            ("^1.2.3", Some("1.10.0")),
            ("~1.9", Some("v1.9.0")),
            ("1.2", Some("v1.2.3")),
            ("1.2.x", Some("v1.2.3")),
            ("1.2.3", Some("v1.2.3")),
            ("v1.2.3", Some("v1.2.3")),
            ("=1.2.3", Some("v1.2.3")),
            (">=1.0.0 <3.0.0", Some("v2.1.0")),
            (">= 1.0.0, < 2", Some("1.10.0")),
            ("0.9.0 || 1.9.0", Some("v1.9.0")),
            ("<2.1.0", Some("1.10.0")),
            (">=2.0.0-0 <2.1.0", Some("v2.0.0-rc.2")),
            ("*", Some("3.0.0")),
            ("1.2.4", None),
            (">3", None),
        ] {
            assert_eq!(highest(range, &tags).as_deref(), expected, "{range}");
        }
        assert_eq!(highest("1", &["1.0.0", "v1.0.0"]).as_deref(), Some("1.0.0"));
        assert_eq!(
            highest("1", &["v1.0.0", "v1.0.0-rc.1"]).as_deref(),
            Some("v1.0.0")
        );
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in [
            "",
            "||",
            "1.0.0 ||",
            ">=",
            "latest",
            "1.0 - 2.0",
            "1.2.3.4",
            "01.2.3",
            "><1",
        ] {
            assert!(Range::parse(text).is_err(), "{text} was taken");
        }
    }
}
