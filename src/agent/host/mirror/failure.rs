//! What the end of a fetch means, by its unit's result and git's words. Pure.

use super::step::{EXIT_COMMIT_MISSING, EXIT_DAMAGED};
use super::{FetchFailure, SourceUrl};
use crate::agent::host::records::StepResult;
use crate::api::names::Commit;
use crate::api::reasons::Reason;

/// What follows from a failed fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Diagnosis {
    /// Somebody else's doing: tried again later.
    Failed(FetchFailure),
    /// Nothing that is known: the mirror may be damaged, and is looked through at the next try.
    Unclear(FetchFailure),
    /// The mirror is damaged, and is made anew.
    Damaged(FetchFailure),
}

/// Characters of git's words in a message.
const SHOWN_CHARACTERS: usize = 500;

/// Reads the end of a fetch that did not succeed, with or without a credential; `log` is the end of what git said, in
/// the C locale.
pub(super) fn diagnose(
    source: &SourceUrl,
    credential: bool,
    result: &StepResult,
    log: &str,
) -> Diagnosis {
    let said = last_words(log);
    let failure = |reason, message: String| FetchFailure {
        reason,
        message: format!("cannot fetch {source}: {message}"),
    };
    let unavailable =
        |message: String| Diagnosis::Failed(failure(Reason::SourceUnavailable, message));
    let StepResult {
        result,
        code,
        status,
    } = result;

    match (result.as_str(), *code, *status) {
        ("timeout", ..) => {
            return unavailable("it did not end in time, and was stopped".to_owned());
        }
        ("oom-kill", ..) | ("signal", 2, 9) => {
            return unavailable("git was killed, probably for its memory: the repository is too large for the limit".to_owned());
        }
        ("signal", _, 25) | ("core-dump", _, 25) => {
            return unavailable(
                "the repository has a pack that is larger than a file may be here".to_owned(),
            );
        }
        // Before all that a full disk looks like.
        _ if log.contains("No space left on device") || log.contains("Disk quota exceeded") => {
            return Diagnosis::Failed(failure(
                Reason::DiskPressure,
                format!("the node's disk is full: {said}"),
            ));
        }
        ("exit-code", _, EXIT_COMMIT_MISSING) => {
            let missing = log
                .lines()
                .rev()
                .find_map(|line| line.strip_prefix("kari: "))
                .unwrap_or("it has no such commit");
            return Diagnosis::Failed(failure(
                Reason::RefNotFound,
                format!("{missing}: it is in no branch and no tag any more"),
            ));
        }
        ("exit-code", _, EXIT_DAMAGED) => {
            return Diagnosis::Damaged(failure(
                Reason::SourceUnavailable,
                format!("the mirror on the node is damaged: {said}"),
            ));
        }
        ("exit-code", _, 127) => {
            return Diagnosis::Failed(failure(
                Reason::ToolMissing,
                format!("a program is missing on the node: {said}"),
            ));
        }
        _ => {}
    }
    let matches = |patterns: &[&str]| patterns.iter().any(|pattern| log.contains(pattern));
    // What the server says comes first: damage is told by words that no server's line begins with.
    if matches(&HOST_KEY) {
        let place = match credential {
            true => "known_hosts of the Secret of spec.source.git.secretRef",
            false => "the node's /etc/ssh/ssh_known_hosts",
        };
        return Diagnosis::Failed(failure(
            Reason::HostKeyMismatch,
            format!("the server's host key is not in {place}, or is another one there: {said}"),
        ));
    }
    if matches(&AUTHENTICATION) {
        return Diagnosis::Failed(failure(
            Reason::AuthenticationFailed,
            match credential {
                true => format!(
                    "the server refuses the Secret of spec.source.git.secretRef, or that may not read the repository, or there is none of this name: {said}"
                ),
                false => format!(
                    "the server wants credentials (spec.source.git.secretRef), or the repository does not exist: {said}"
                ),
            },
        ));
    }
    if let Some(fault) = log.lines().map(str::trim).rfind(|line| is_fault(line)) {
        return unavailable(format!(
            "the server sends an object that git refuses: {}",
            last_words(fault)
        ));
    }
    if matches(&NETWORK) {
        return unavailable(said);
    }
    if matches(&DAMAGE) {
        return Diagnosis::Damaged(failure(
            Reason::SourceUnavailable,
            format!("the mirror on the node is damaged: {said}"),
        ));
    }
    let said = if said.is_empty() {
        format!("git ended with {result} {status}")
    } else {
        said
    };
    Diagnosis::Unclear(failure(Reason::SourceUnavailable, said))
}

const HOST_KEY: [&str; 2] = [
    "Host key verification failed",
    "REMOTE HOST IDENTIFICATION HAS CHANGED",
];

const AUTHENTICATION: [&str; 8] = [
    "Authentication failed for",
    "could not read Username",
    "could not read Password",
    "terminal prompts disabled",
    "Permission denied (",
    "Too many authentication failures",
    "The requested URL returned error: 401",
    "The requested URL returned error: 403",
];

const NETWORK: [&str; 24] = [
    "Could not resolve host",
    "Could not resolve proxy",
    "Temporary failure in name resolution",
    "Name or service not known",
    "unable to look up",
    "Failed to connect to",
    "Couldn't connect to server",
    "Connection refused",
    "Connection reset",
    "Connection closed",
    "Connection timed out",
    "Operation timed out",
    "Operation too slow",
    "No route to host",
    "Network is unreachable",
    "unable to connect to",
    "early EOF",
    "the remote end hung up",
    "unexpected disconnect",
    "RPC failed",
    "SSL certificate problem",
    "server certificate verification failed",
    "The requested URL returned error",
    // The repository is not there: `fatal: repository '…' not found`.
    "' not found",
];

const DAMAGE: [&str; 9] = [
    "error: object file ",
    "fatal: loose object ",
    "is corrupt",
    "fatal: bad object",
    "error: bad ref",
    "fatal: bad config",
    "fatal: not a git repository",
    "error: packfile ",
    "fatal: unable to read tree",
];

/// `error: object <id>: <what>: <why>`, of what is received; damage of the mirror's own has a path there.
fn is_fault(line: &str) -> bool {
    line.strip_prefix("error: object ")
        .and_then(|rest| rest.split_once(": "))
        .is_some_and(|(id, _)| Commit::parse(id).is_ok())
}

/// The last line that says what went wrong, shortened; control characters, which a server may send, left out.
fn last_words(log: &str) -> String {
    let telling = |line: &str| {
        ["fatal:", "error:", "remote:", "kari:", "ssh:", "git:"]
            .iter()
            .any(|prefix| line.starts_with(prefix))
            || line.contains(": Permission denied")
            || line.contains("verification failed")
            || line.contains("not found")
    };
    // What git adds to ssh's own words says less than they do.
    let generic = |line: &str| line.starts_with("fatal: Could not read from remote repository");
    let lines: Vec<&str> = log
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let at = lines
        .iter()
        .rposition(|line| !generic(line) && telling(line))
        .unwrap_or(lines.len().saturating_sub(1));
    let mut text = lines.get(at).copied().unwrap_or_default().to_owned();
    // `fatal: unable to connect to host:` goes on in the next line.
    if let Some(next) = lines.get(at + 1).filter(|_| text.ends_with(':')) {
        text = format!("{text} {next}");
    }
    text.chars()
        .filter(|c| !c.is_control())
        .take(SHOWN_CHARACTERS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnosis(result: &str, code: i32, status: i32, log: &str) -> Diagnosis {
        let source = SourceUrl::parse("https://h/r.git").unwrap_or_else(|e| panic!("{e}"));
        diagnose(
            &source,
            false,
            &StepResult {
                result: result.into(),
                code,
                status,
            },
            log,
        )
    }

    fn exit(status: i32, log: &str) -> Diagnosis {
        diagnosis("exit-code", 1, status, log)
    }

    #[test]
    fn gits_words_have_the_reason_that_they_mean() {
        let table = [
            (
                128,
                "error: object 1eab91caca6a1cbc96eef3593b2c0806de60f630: hasDotdot: contains '..'\nfatal: fsck error in packed object\nfatal: fetch-pack: invalid index-pack output\n",
                Reason::SourceUnavailable,
            ),
            (
                128,
                "fatal: unable to access 'https://h/r.git/': Could not resolve host: h\n",
                Reason::SourceUnavailable,
            ),
            (
                128,
                "fatal: unable to access 'http://h/': Failed to connect to h port 80 after 0 ms: Couldn't connect to server",
                Reason::SourceUnavailable,
            ),
            (
                128,
                "fatal: repository 'http://h/r.git/' not found\n",
                Reason::SourceUnavailable,
            ),
            (
                128,
                "remote: kari: x\nfatal: could not read Username for 'https://h': terminal prompts disabled\n",
                Reason::AuthenticationFailed,
            ),
            (
                128,
                "fatal: Authentication failed for 'https://h/r.git/'\n",
                Reason::AuthenticationFailed,
            ),
            (
                128,
                "git@h: Permission denied (publickey).\nfatal: Could not read from remote repository.\n\nPlease make sure…",
                Reason::AuthenticationFailed,
            ),
            (
                128,
                "No ED25519 host key is known for h and you have requested strict checking.\nHost key verification failed.\nfatal: Could not read from remote repository.",
                Reason::HostKeyMismatch,
            ),
            (
                20,
                "kari: the repository has no commit aaaa\n",
                Reason::RefNotFound,
            ),
            (
                127,
                "/var/lib/kari/fetch: 7: git: not found\n",
                Reason::ToolMissing,
            ),
        ];
        for (status, log, reason) in table {
            match exit(status, log) {
                Diagnosis::Failed(failure) => assert_eq!(failure.reason, reason, "{log}"),
                other => panic!("{log}: {other:?}"),
            }
        }
        assert!(matches!(
            diagnosis("timeout", 2, 15, ""),
            Diagnosis::Failed(_)
        ));
        assert!(matches!(
            diagnosis("oom-kill", 2, 9, ""),
            Diagnosis::Failed(_)
        ));
    }

    #[test]
    fn a_full_disk_is_no_damage() {
        for status in [1, 21, 128] {
            let log = "fatal: write error: No space left on device\n";
            match exit(status, log) {
                Diagnosis::Failed(failure) => assert_eq!(failure.reason, Reason::DiskPressure),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn damage_is_told_from_what_is_only_unclear() {
        for log in [
            "error: object file objects/ab/cd is empty\nfatal: loose object abcd (stored in objects/ab/cd) is corrupt\n",
            "fatal: bad object refs/kari/web/shop\n",
        ] {
            assert!(matches!(exit(128, log), Diagnosis::Damaged(_)), "{log}");
        }
        assert!(matches!(
            exit(21, "missing blob 1234\n"),
            Diagnosis::Damaged(_)
        ));
        assert!(matches!(exit(1, "something new\n"), Diagnosis::Unclear(_)));
        assert!(matches!(exit(1, ""), Diagnosis::Unclear(_)));
    }

    #[test]
    fn a_message_is_the_line_that_tells_most_without_control_characters() {
        let log = "warning: x\ngit@h: Permission denied (publickey).\r\nfatal: Could not read from remote repository.\n\nPlease make sure you have the correct access rights\nand the repository exists.\n";
        assert_eq!(last_words(log), "git@h: Permission denied (publickey).");
        assert_eq!(last_words("remote: \x1b[31mred\n"), "remote: [31mred");
        assert_eq!(
            last_words(
                "fatal: unable to connect to h:\nh[0: 10.0.0.1]: errno=Connection refused\n\n"
            ),
            "fatal: unable to connect to h: h[0: 10.0.0.1]: errno=Connection refused"
        );
        assert_eq!(last_words(""), "");
    }
}
