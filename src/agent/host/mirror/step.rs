//! The fetch as a unit: what git is told. Pure.

use std::path::PathBuf;

use super::{SourceUrl, Transport, hold_reference};
use crate::agent::host::jail::MIRROR_PATH;
use crate::agent::host::unit::{StepLimits, StepSpec};
use crate::api::names::{AppName, Commit};

/// The end of the script when a commit is in none of the repository's branches and tags.
pub const EXIT_COMMIT_MISSING: i32 = 20;

/// The end of the script when the mirror itself is damaged.
pub const EXIT_DAMAGED: i32 = 21;

/// Seconds that a fetch may take: the first of a repository of some gigabytes over a slow line; below
/// the default of `progressDeadlineSeconds`.
const FETCH_TIMEOUT_SECONDS: u32 = 1200;

/// git reads packs by mapping them; 1 GiB is enough to index a repository of several.
const FETCH_LIMITS: StepLimits = StepLimits {
    cpu_millis: 2000,
    memory_bytes: 1 << 30,
    tasks: 64,
};

/// Where the script is in the jail.
const FETCH_SCRIPT_PATH: &str = "/var/lib/kari/fetch";

/// A commit that is to be in the mirror, and what holds it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hold {
    /// The app that wants it.
    pub app: AppName,
    /// The commit.
    pub commit: Commit,
    /// Where the server has it.
    pub reference: Option<String>,
}

/// Whether the mirror is looked through first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Fetch what is missing.
    Fetch,
    /// Look for damage (git fsck) before.
    Check,
}

/// The host paths of a mirror's fetch.
#[derive(Debug, Clone)]
pub(super) struct Paths {
    /// The mirror, kari-git's.
    pub mirror: PathBuf,
    /// [`SCRIPT`] as a file, root's.
    pub script: PathBuf,
    /// Where git's words go; its folder is root's alone.
    pub log: PathBuf,
}

/// The fetch of `holds` into a mirror.
pub(super) fn fetch_step(
    source: &SourceUrl,
    paths: Paths,
    user: &str,
    tool_path: &str,
    mode: Mode,
    holds: &[Hold],
) -> StepSpec {
    let Paths {
        mirror,
        script,
        log,
    } = paths;
    // A repository is of one kind of digest; a mirror is made for that of the first commit.
    let format = if holds.iter().any(|hold| hold.commit.as_str().len() == 64) {
        "sha256"
    } else {
        "sha1"
    };
    let mode = match mode {
        Mode::Fetch => "fetch",
        Mode::Check => "check",
    };
    let mut command: Vec<String> = [
        "/bin/sh",
        "-eu",
        FETCH_SCRIPT_PATH,
        MIRROR_PATH,
        source.as_str(),
        mode,
        format,
    ]
    .map(str::to_owned)
    .to_vec();
    for Hold {
        app,
        commit,
        reference,
    } in holds
    {
        command.extend([
            commit.to_string(),
            hold_reference(app),
            reference.clone().unwrap_or_default(),
        ]);
    }
    StepSpec {
        description: "Kari: fetch into a mirror".to_owned(),
        user: user.to_owned(),
        timeout_seconds: FETCH_TIMEOUT_SECONDS,
        limits: FETCH_LIMITS,
        network: true,
        environment: environment(source.transport, tool_path),
        environment_file: None,
        read_only: vec![(script, FETCH_SCRIPT_PATH.to_owned())],
        writable: vec![(mirror, MIRROR_PATH.to_owned())],
        working_directory: "/".to_owned(),
        log,
        before: vec![],
        command,
    }
}

/// All that git takes from its surroundings; nothing of the node's own configuration.
fn environment(transport: Transport, tool_path: &str) -> Vec<(String, String)> {
    let allowed = match transport {
        Transport::Https => "https",
        // Many servers lead from http to https.
        Transport::Http => "http:https",
        Transport::Ssh => "ssh",
        Transport::Git => "git",
    };
    let mut environment = [
        ("PATH", tool_path.to_owned()),
        ("HOME", "/tmp".to_owned()),
        // The words of git are read.
        ("LC_ALL", "C".to_owned()),
        ("GIT_DIR", MIRROR_PATH.to_owned()),
        ("GIT_CONFIG_NOSYSTEM", "1".to_owned()),
        ("GIT_CONFIG_GLOBAL", "/dev/null".to_owned()),
        ("GIT_ALLOW_PROTOCOL", allowed.to_owned()),
        ("GIT_TERMINAL_PROMPT", "0".to_owned()),
        ("GIT_SSH_COMMAND", SSH.to_owned()),
        ("GIT_CONFIG_COUNT", CONFIGURATION.len().to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec();
    for (at, (key, value)) in CONFIGURATION.iter().enumerate() {
        environment.push((format!("GIT_CONFIG_KEY_{at}"), (*key).to_owned()));
        environment.push((format!("GIT_CONFIG_VALUE_{at}"), (*value).to_owned()));
    }
    environment
}

/// No question, no host that is not known, no connection that hangs for more than a minute.
const SSH: &str = "ssh -F /dev/null -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4";

const CONFIGURATION: [(&str, &str); 19] = [
    ("core.hooksPath", "/dev/null"),
    ("core.fsmonitor", "false"),
    ("core.askPass", ""),
    ("credential.helper", ""),
    // A power cut must not leave an empty object behind, which fails every later fetch.
    ("core.fsync", "all"),
    // A build reads the mirror meanwhile; packs are brought together by the script alone.
    ("gc.auto", "0"),
    ("maintenance.auto", "false"),
    // Always a pack, which comes into place whole; loose objects of a fetch that was killed would be there in part.
    ("fetch.unpackLimit", "1"),
    ("fetch.recurseSubmodules", "false"),
    ("fetch.writeCommitGraph", "false"),
    // What a server sends is checked, but for what old versions of git themselves wrote.
    ("fetch.fsckObjects", "true"),
    ("fetch.fsck.zeroPaddedFilemode", "ignore"),
    ("fetch.fsck.missingSpaceBeforeDate", "ignore"),
    ("fetch.fsck.badTimezone", "ignore"),
    ("http.followRedirects", "initial"),
    // A byte a second: a server that prepares a large pack says that it lives, and no more.
    ("http.lowSpeedLimit", "1"),
    ("http.lowSpeedTime", "60"),
    ("pack.threads", "2"),
    ("pack.windowMemory", "128m"),
];

/// `mirror url mode format (commit hold reference)…`; no text of a user's is in the script itself.
pub(super) const SCRIPT: &str = r#"# Written by kari agent; an edit is overwritten.
# Brings commits into a mirror. Ends with 20 if the repository does not have one of them,
# with 21 if the mirror is damaged, else as git ended.
mirror=$1 url=$2 mode=$3 format=$4
shift 4

# Whoever left them is gone: this unit's name is held by one process at a time.
find "$mirror" -name '*.lock' -type f -delete
init() { git init --quiet --bare --template= --object-format="$format"; }
if [ "$mode" = check ]; then
    init && git fsck --no-dangling --no-progress || exit 21
else
    init
fi

has() { git cat-file -e "$1^{commit}" 2>/dev/null; }
fetch() { git fetch --quiet --force --no-tags --no-auto-maintenance --no-write-fetch-head -- "$url" "$@"; }

# missing (commit hold reference)…: prints the commits that are not there
missing() {
    while [ $# -gt 0 ]; do
        has "$1" || printf '%s\n' "$1"
        shift 3
    done
}

wanted=$(missing "$@")
if [ -n "$wanted" ]; then
    # Unquoted: commits have no spaces.
    status=0
    said=$(fetch $wanted 2>&1) || status=$?
    if [ $status -ne 0 ]; then
        case $said in
        *'not our ref'*|*'unadvertised object'*|*'allow request for'*)
            # Not given by its id, or gone: whatever branches and tags there are.
            fetch '+refs/heads/*:refs/heads/*' '+refs/tags/*:refs/tags/*'
            set_aside=$wanted
            for commit in $set_aside; do
                has "$commit" && continue
                # The place where it was found.
                found=$(while [ $# -gt 0 ]; do [ "$1" = "$commit" ] && printf '%s' "$3" && break; shift 3; done)
                case $found in
                refs/heads/*|refs/tags/*|'') ;;
                refs/*) fetch "+$found:refs/other/$commit" || : ;;
                esac
            done ;;
        *)
            printf '%s\n' "$said" >&2
            exit $status ;;
        esac
    fi
    # Many small packs make every look-up slow.
    if [ "$(find "$mirror/objects/pack" -name '*.pack' | wc -l)" -gt 50 ]; then
        git repack -d --quiet --geometric=2 || :
    fi
fi

status=0
while [ $# -gt 0 ]; do
    if has "$1"; then
        git update-ref "$2" "$1"
    else
        printf 'kari: the repository has no commit %s\n' "$1" >&2
        status=20
    fi
    shift 3
done
exit $status
"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn step(url: &str, mode: Mode) -> StepSpec {
        let source = SourceUrl::parse(url).unwrap_or_else(|e| panic!("{e}"));
        let paths = Paths {
            mirror: "/m.git".into(),
            script: "/fetch".into(),
            log: "/m.log".into(),
        };
        let hold = Hold {
            app: AppName::parse("web.shop").unwrap_or_else(|e| panic!("{e}")),
            commit: Commit::parse(&"a".repeat(40)).unwrap_or_else(|e| panic!("{e}")),
            reference: Some("refs/heads/main".into()),
        };
        fetch_step(&source, paths, "kari-git", "/usr/bin:/bin", mode, &[hold])
    }

    #[test]
    fn only_the_transport_of_the_url_is_allowed() {
        for (url, allowed) in [
            ("https://h/r", "https"),
            ("http://h/r", "http:https"),
            ("ssh://g@h/r", "ssh"),
            ("g@h:r", "ssh"),
            ("git://h/r", "git"),
        ] {
            let step = step(url, Mode::Fetch);
            assert!(
                step.environment
                    .contains(&("GIT_ALLOW_PROTOCOL".into(), allowed.into())),
                "{url}"
            );
        }
    }

    #[test]
    fn the_script_gets_everything_as_arguments() {
        let words = step("https://h/r", Mode::Check).command;
        let commit = "a".repeat(40);
        assert_eq!(
            words,
            [
                "/bin/sh",
                "-eu",
                FETCH_SCRIPT_PATH,
                MIRROR_PATH,
                "https://h/r",
                "check",
                "sha1",
                &commit,
                "refs/kari/web/shop",
                "refs/heads/main"
            ]
        );
    }

    #[test]
    fn every_setting_of_git_has_its_number() {
        let environment = step("https://h/r", Mode::Fetch).environment;
        let count = environment
            .iter()
            .filter(|(name, _)| name.starts_with("GIT_CONFIG_KEY_"))
            .count();
        assert!(environment.contains(&("GIT_CONFIG_COUNT".into(), count.to_string())));
    }
}
