//! What `git ls-remote` says, on both of its outputs. Pure.

use std::collections::BTreeMap;

use crate::api::conditions::cut;
use crate::api::names::Commit;
use crate::api::reasons::Reason;
use crate::controller::observed::LookupFailure;

/// Bytes of git's own words in a message at most.
const WORDS_LIMIT: usize = 400;

/// How git marks the commit that an annotated tag stands for.
pub const PEELED: &str = "^{}";

/// The commit of each reference. An annotated tag's is the commit that it stands for, not the tag
/// object. Lines that are not `<object>\t<reference>` are passed over.
pub fn parse(output: &str) -> BTreeMap<String, Commit> {
    let mut commits = BTreeMap::new();
    let mut peeled = BTreeMap::new();
    for line in output.lines() {
        let Some((object, reference)) = line.split_once('\t') else {
            continue;
        };
        let Ok(object) = Commit::parse(object) else {
            continue;
        };
        match reference.strip_suffix(PEELED) {
            Some(tag) => peeled.insert(tag.to_owned(), object),
            None => commits.insert(reference.to_owned(), object),
        };
    }
    commits.extend(peeled);
    commits
}

/// What a failure of git means, from its own words in English (`LC_ALL=C`); `credential` if it was given one.
pub fn classify(url: &str, stderr: &str, credential: bool) -> LookupFailure {
    let words = telling_line(stderr);
    let (reason, advice) = if says(stderr, HOST_KEY) {
        (
            Reason::HostKeyMismatch,
            match credential {
                true => {
                    "the server's host key is not in known_hosts of the Secret of spec.source.git.secretRef, or is another one there; put the new one there only if the server's operator says that it changed"
                }
                false => {
                    "the server's host key is not in the controller's /etc/ssh/ssh_known_hosts, or is another one there"
                }
            },
        )
    } else if says(stderr, AUTHENTICATION) {
        (
            Reason::AuthenticationFailed,
            match credential {
                true => {
                    "the server refuses the Secret of spec.source.git.secretRef, or that may not read the repository, or there is none of this name"
                }
                false => {
                    "the server wants credentials, or has no such repository: correct the url, or name a Secret in spec.source.git.secretRef"
                }
            },
        )
    } else if credential && says(stderr, REDIRECT) {
        (
            Reason::SourceUnavailable,
            "the server leads elsewhere, and a token is not sent on: set spec.source.git.url to where the repository is now",
        )
    } else {
        (Reason::SourceUnavailable, "it is tried again")
    };
    LookupFailure {
        reason,
        message: format!("{url}: {words}; {advice}"),
    }
}

/// Git and ssh on a host key that they do not take.
const HOST_KEY: &[&str] = &[
    "Host key verification failed",
    "REMOTE HOST IDENTIFICATION HAS CHANGED",
    "host key is known for",
];

/// Git, curl and ssh on credentials that are missing or wrong. GitHub and others answer so for a
/// repository that does not exist, too.
const AUTHENTICATION: &[&str] = &[
    "Authentication failed",
    "could not read Username",
    "could not read Password",
    "Permission denied (",
    "Too many authentication failures",
    "returned error: 401",
    "returned error: 403",
];

/// Git where it does not follow a redirect.
const REDIRECT: &[&str] = &[
    "returned error: 301",
    "returned error: 302",
    "returned error: 307",
    "returned error: 308",
];

fn says(text: &str, any: &[&str]) -> bool {
    any.iter().any(|words| text.contains(words))
}

/// The line that says the most: git's last `fatal:`, but for the general one that follows ssh's own
/// words; else the last that is not empty.
fn telling_line(stderr: &str) -> String {
    let lines: Vec<&str> = stderr
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let general = "fatal: Could not read from remote repository.";
    let line = lines
        .iter()
        .find(|l| l.starts_with("fatal:") && **l != general)
        .or_else(|| lines.iter().take_while(|l| **l != general).last())
        .or_else(|| lines.last())
        .copied()
        .unwrap_or("git gave no reason");
    let line = line.strip_prefix("fatal: ").unwrap_or(line);
    let printable: String = line
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    cut(&printable, WORDS_LIMIT).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::testing::commit;

    #[test]
    fn a_listing_is_read_with_its_peeled_tags() {
        let (a, b, c) = ("a".repeat(40), "b".repeat(40), "c".repeat(40));
        let output = format!(
            "{a}\trefs/heads/main\n{b}\trefs/tags/v1\n{c}\trefs/tags/v1^{{}}\n{b}\trefs/tags/plain\nwarning: odd\n{a} refs/heads/spaces\nxyz\trefs/heads/short\n"
        );
        let commits = parse(&output);
        assert_eq!(commits.get("refs/heads/main"), Some(&commit('a')));
        assert_eq!(
            commits.get("refs/tags/v1"),
            Some(&commit('c')),
            "the commit, not the tag object"
        );
        assert_eq!(commits.get("refs/tags/plain"), Some(&commit('b')));
        assert_eq!(commits.len(), 3, "{commits:?}");
        assert_eq!(parse(""), BTreeMap::new());
        // The order of the lines does not matter.
        let turned: Vec<_> = output.lines().rev().collect();
        assert_eq!(parse(&turned.join("\n")), commits);
    }

    #[test]
    fn a_failure_of_git_is_told_by_its_words() {
        for (case, stderr, reason, words) in [
            (
                "no such host",
                "fatal: unable to access 'https://x/': Could not resolve host: x\n",
                Reason::SourceUnavailable,
                "Could not resolve host",
            ),
            (
                "refused",
                "fatal: unable to access 'https://x/': Failed to connect to x port 443 after 0 ms: Connection refused",
                Reason::SourceUnavailable,
                "Connection refused",
            ),
            (
                "not found",
                "remote: Not Found\nfatal: repository 'https://x/y/' not found\n",
                Reason::SourceUnavailable,
                "not found",
            ),
            (
                "prompt",
                "fatal: could not read Username for 'https://x': terminal prompts disabled\n",
                Reason::AuthenticationFailed,
                "Username",
            ),
            (
                "refused credentials",
                "remote: HTTP Basic: Access denied\nfatal: Authentication failed for 'https://x/'\n",
                Reason::AuthenticationFailed,
                "Authentication failed",
            ),
            (
                "forbidden",
                "fatal: unable to access 'https://x/': The requested URL returned error: 403\n",
                Reason::AuthenticationFailed,
                "403",
            ),
            (
                "no ssh key",
                "git@x: Permission denied (publickey).\r\nfatal: Could not read from remote repository.\n\nPlease make sure you have the correct access rights\nand the repository exists.\n",
                Reason::AuthenticationFailed,
                "Permission denied",
            ),
            (
                "unknown host key",
                "No ED25519 host key is known for x and you have requested strict checking.\r\nHost key verification failed.\r\nfatal: Could not read from remote repository.\n",
                Reason::HostKeyMismatch,
                "Host key verification failed",
            ),
            (
                "server error",
                "fatal: unable to access 'https://x/': The requested URL returned error: 500",
                Reason::SourceUnavailable,
                "500",
            ),
            (
                "certificate",
                "fatal: unable to access 'https://x/': server certificate verification failed. CAfile: none CRLfile: none",
                Reason::SourceUnavailable,
                "certificate",
            ),
            (
                "protocol",
                "fatal: transport 'http' not allowed",
                Reason::SourceUnavailable,
                "not allowed",
            ),
            ("nothing", "", Reason::SourceUnavailable, "no reason"),
        ] {
            let failure = classify("https://x/y", stderr, false);
            assert_eq!(failure.reason, reason, "{case}");
            assert!(failure.message.contains(words), "{case}: {failure}");
            assert!(
                failure.message.starts_with("https://x/y: "),
                "{case}: {failure}"
            );
            assert!(
                !failure.message.contains(|c: char| c.is_control()),
                "{case}: {failure:?}"
            );
        }
    }
}
