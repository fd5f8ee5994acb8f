//! The fetch as a unit: what git is told. Pure.

use std::path::PathBuf;

use super::{SourceUrl, Transport, Want};
use crate::agent::host::jail::MIRROR_PATH;
use crate::agent::host::unit::{StepLimits, StepSpec};
use crate::api::names::{AppName, Commit};
use crate::git_credential::{GitAccess, SSH};

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

/// Submodules of a commit, theirs included: Qt has 40, and each may cost a connection.
const MOST_SUBMODULES: u32 = 256;

/// How deep submodules may be within each other.
const DEEPEST_SUBMODULE: u32 = 8;

/// Seconds that the upkeep of a mirror may take: a pack of some gigabytes is written anew.
const UPKEEP_TIMEOUT_SECONDS: u32 = 1200;

/// Where the script of the upkeep is in the jail.
const UPKEEP_SCRIPT_PATH: &str = "/var/lib/kari/upkeep";

/// The host keys that the node knows. The jail hides the folder, as the node's own keys are beside it.
pub(super) const KNOWN_HOSTS: &str = "/etc/ssh/ssh_known_hosts";

/// Where they are in the jail, as [`WITHOUT_KEY`] has it.
pub(super) const KNOWN_HOSTS_PATH: &str = "/var/lib/kari/known_hosts";

/// Where the script is in the jail.
const FETCH_SCRIPT_PATH: &str = "/var/lib/kari/fetch";

/// A commit that is to be in the mirror, and what holds it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hold {
    /// The app that wants it.
    pub app: AppName,
    /// What it wants.
    pub want: Want,
}

/// The upkeep of a mirror, which reads and writes it alone.
pub(super) fn upkeep_step(paths: Paths, user: &str, tool_path: &str) -> StepSpec {
    let Paths {
        mirror,
        script,
        log,
    } = paths;
    StepSpec {
        description: "Kari: bring a mirror in order".to_owned(),
        user: user.to_owned(),
        timeout_seconds: UPKEEP_TIMEOUT_SECONDS,
        limits: FETCH_LIMITS,
        network: false,
        environment: environment(Transport::Https, tool_path, None),
        environment_file: None,
        read_only: vec![(script, UPKEEP_SCRIPT_PATH.to_owned())],
        writable: vec![(mirror, MIRROR_PATH.to_owned())],
        working_directory: "/".to_owned(),
        log,
        before: vec![],
        command: ["/bin/sh", "-eu", UPKEEP_SCRIPT_PATH, MIRROR_PATH]
            .map(str::to_owned)
            .to_vec(),
    }
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
    access: Option<&GitAccess>,
) -> StepSpec {
    let Paths {
        mirror,
        script,
        log,
    } = paths;
    // A repository is of one kind of digest; a mirror is made for that of the first commit.
    let format = if holds
        .iter()
        .any(|hold| hold.want.commit.as_str().len() == 64)
    {
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
        &MOST_SUBMODULES.to_string(),
        &DEEPEST_SUBMODULE.to_string(),
    ]
    .map(str::to_owned)
    .to_vec();
    for Hold { app, want } in holds {
        let Want {
            source: _,
            reference,
            commit,
            base,
            submodules,
            credential: _,
        } = want;
        command.extend([
            commit.to_string(),
            format!("{}/{}", app.namespace(), app.name()),
            reference.clone().unwrap_or_default(),
            base_word(base.as_ref()).to_owned(),
            submodules_word(*submodules).to_owned(),
        ]);
    }
    StepSpec {
        description: "Kari: fetch into a mirror".to_owned(),
        user: user.to_owned(),
        timeout_seconds: FETCH_TIMEOUT_SECONDS,
        limits: FETCH_LIMITS,
        network: true,
        environment: environment(source.transport, tool_path, access),
        environment_file: None,
        read_only: vec![(script, FETCH_SCRIPT_PATH.to_owned())],
        writable: vec![(mirror, MIRROR_PATH.to_owned())],
        working_directory: "/".to_owned(),
        log,
        before: vec![],
        command,
    }
}

/// The commit that another is to descend from, as the script and its findings have it.
pub(super) fn base_word(base: Option<&Commit>) -> &str {
    base.map_or("-", Commit::as_str)
}

/// Whether submodules are wanted, as the script and its findings have it.
pub(super) fn submodules_word(submodules: bool) -> &'static str {
    if submodules { "submodules" } else { "-" }
}

/// All that git takes from its surroundings; nothing of the node's own configuration.
fn environment(
    transport: Transport,
    tool_path: &str,
    access: Option<&GitAccess>,
) -> Vec<(String, String)> {
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
        (
            "GIT_SSH_COMMAND",
            access
                .and_then(|access| access.ssh.clone())
                .unwrap_or_else(|| format!("{SSH} {WITHOUT_KEY}")),
        ),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec();
    let tolerated = TOLERATED.iter().flat_map(|what| {
        ["fetch.fsck", "fsck"].map(|place| (format!("{place}.{what}"), "ignore".to_owned()))
    });
    let settings: Vec<_> = CONFIGURATION
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into_iter()
        .chain(tolerated)
        // Last, as they win, and as those before take helpers away.
        .chain(access.iter().flat_map(|access| access.settings.clone()))
        .collect();
    environment.push(("GIT_CONFIG_COUNT".to_owned(), settings.len().to_string()));
    for (at, (key, value)) in settings.into_iter().enumerate() {
        environment.push((format!("GIT_CONFIG_KEY_{at}"), key));
        environment.push((format!("GIT_CONFIG_VALUE_{at}"), value));
    }
    environment
}

/// What ssh is told where there is no credential: no key, and no host that the node's /etc/ssh/ssh_known_hosts does
/// not know.
const WITHOUT_KEY: &str = "-o UserKnownHostsFile=none -o GlobalKnownHostsFile=/var/lib/kari/known_hosts -o IdentityFile=none";

const CONFIGURATION: [(&str, &str); 16] = [
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
    // What a server sends is checked, but for what is tolerated.
    ("fetch.fsckObjects", "true"),
    ("http.followRedirects", "initial"),
    // A byte a second: a server that prepares a large pack says that it lives, and no more.
    ("http.lowSpeedLimit", "1"),
    ("http.lowSpeedTime", "60"),
    ("pack.threads", "2"),
    ("pack.windowMemory", "128m"),
];

/// What git would refuse and is harmless here: what old versions of git themselves wrote, and what .gitmodules
/// say, which is read by [`SCRIPT`] alone, and only for apps that want submodules.
const TOLERATED: [&str; 11] = [
    "zeroPaddedFilemode",
    "missingSpaceBeforeDate",
    "badTimezone",
    "gitmodulesBlob",
    "gitmodulesLarge",
    "gitmodulesMissing",
    "gitmodulesName",
    "gitmodulesPath",
    "gitmodulesSymlink",
    "gitmodulesUpdate",
    "gitmodulesUrl",
];

/// `mirror url mode format most deepest (commit app reference base submodules)…`, the last two `-` where they
/// are not asked for; no text of a user's is in the script itself.
pub(super) const SCRIPT: &str = r#"# Written by kari agent; an edit is overwritten.
# Brings commits into a mirror, and their submodules where they are asked for. Ends with 20 if a repository
# does not have one of them, with 21 if the mirror is damaged, else as git ended.
mirror=$1 url=$2 mode=$3 format=$4 most=$5 deepest=$6
shift 6
scratch=$(mktemp -d)
# What is insecure in itself may lead to what is.
case $url in http://*|git://*) insecure=yes ;; *) insecure=no ;; esac
tab=$(printf '\t')

# Whoever left them is gone: this unit's name is held by one process at a time.
find "$mirror" \( -name '*.lock' -o -name 'tmp_*' \) -type f -delete
init() { git init --quiet --bare --template= --object-format="$format"; }
if [ "$mode" = check ]; then
    init && git fsck --no-dangling --no-progress || exit 21
else
    init
fi

has() { git cat-file -e "$1^{commit}" 2>/dev/null; }
fetch() { git fetch --quiet --force --no-tags --no-auto-maintenance --no-write-fetch-head "$@"; }

# bring about url commit…: fetches commits, without their history where the server can. Ends with 10 if the
# server does not give them by their ids. `about` stands before what git says.
bring() (
    about=$1 from=$2 code=0
    shift 2
    said=$(fetch --depth=1 -- "$from" "$@" 2>&1) || code=$?
    case $said in
    *'does not support shallow'*)
        code=0
        said=$(fetch -- "$from" "$@" 2>&1) || code=$? ;;
    esac
    [ $code -ne 0 ] || exit 0
    case $said in
    *'not our ref'*|*'unadvertised object'*|*'allow request for'*) exit 10 ;;
    esac
    printf '%s\n' "$said" | while IFS= read -r line; do
        case $line in
        'fatal: '*) printf 'fatal: %s%s\n' "$about" "${line#fatal: }" ;;
        *) printf '%s\n' "$line" ;;
        esac
    done >&2
    exit $code
)

# bring_all url place: fetches whatever branches and tags there are, with their history.
bring_all() {
    deep=
    [ ! -s "$mirror/shallow" ] || deep=--unshallow
    fetch $deep -- "$1" "+refs/heads/*:$2heads/*" "+refs/tags/*:$2tags/*"
}

# refuse what why: the commit will not do, and will not do later.
refuse() {
    printf '%s %s\n' "$1" "$2" >"$scratch/refused"
    exit 30
}

# descend: the commit is to descend from the base. History is fetched as far as it is needed.
descend() {
    [ "$base" != - ] && [ "$base" != "$commit" ] || return 0
    for more in 0 100 10000; do
        if [ $more -ne 0 ]; then
            [ -s "$mirror/shallow" ] || break
            fetch --deepen=$more -- "$url" "$commit"
        fi
        if git merge-base --is-ancestor "$base" "$commit" 2>/dev/null; then return 0; fi
    done
    refuse rewind -
}

# resolve url given: prints the url that a relative one stands for.
resolve() {
    parent=${1%/} given=$2 between=/
    case $given in
    ./*|../*) ;;
    *)
        printf '%s\n' "$given"
        return ;;
    esac
    while :; do
        case $given in
        ../*)
            given=${given#../}
            case $parent in
            */*) parent=${parent%/*} ;;
            *) parent=${parent%:*} between=: ;;
            esac ;;
        ./*) given=${given#./} ;;
        *) break ;;
        esac
    done
    printf '%s%s%s\n' "$parent" "$between" "$given"
}

# transport url: prints what git may speak for it; nothing if it is not the url of a repository.
transport() {
    case $1 in
    *[!!-~]*) return ;;
    https://?*/?*) speaks=https ;;
    http://?*/?*) speaks=http:https ;;
    git://?*/?*) speaks=git ;;
    ssh://?*/?*) speaks=ssh ;;
    *://*|*::*) return ;;
    ?*@?*:?*) speaks=scp ;;
    *) return ;;
    esac
    case $speaks in
    scp) authority=${1%%:*} speaks=ssh ;;
    *) authority=${1#*://} authority=${authority%%/*} ;;
    esac
    host=${authority#*@}
    user=${authority%"$host"} user=${user%@}
    case $host in
    [!A-Za-z0-9[]*|*[!]A-Za-z0-9.:[-]*) return ;;
    esac
    case $speaks:$user in
    *:) ;;
    ssh:[!A-Za-z0-9_]*|ssh:*[!A-Za-z0-9._-]*) return ;;
    ssh:*) ;;
    *) return ;;
    esac
    printf '%s\n' "$speaks"
}

# submodules commit url depth place: brings what the submodules of a commit are at, and theirs.
submodules() (
    of=$1 parent_url=$2 depth=$3 place=$4
    links=$scratch/links.$depth names=$scratch/names.$depth
    git -c core.quotePath=false ls-tree -r --full-tree "$of" >"$scratch/tree"
    sed -n 's/^160000 commit //p' "$scratch/tree" >"$links"
    [ -s "$links" ] || exit 0
    [ "$depth" -le "$deepest" ] || refuse submodules "${place}: submodules are more than $deepest deep"
    case $(git ls-tree --full-tree "$of" -- .gitmodules) in
    100[67][45][45]' blob '*) ;;
    120000*) refuse submodules "$place.gitmodules is a symbolic link" ;;
    *) refuse submodules "$place.gitmodules is not there, but there are submodules" ;;
    esac
    [ "$(git cat-file -s "$of:.gitmodules")" -le 262144 ] || refuse submodules "$place.gitmodules is larger than 256 KiB"
    git config --blob "$of:.gitmodules" -z --get-regexp '^submodule\..*\.path$' | tr '\0\n' '\n\t' >"$names"
    # Not from standard input, which ssh reads.
    while IFS=$tab read -r sub path <&3; do
        printf . >>"$scratch/count"
        [ "$(wc -c <"$scratch/count")" -le "$most" ] || refuse submodules "there are more than $most submodules"
        case /$path/ in
        */../*|*/./*|*//*|*/.[Gg][Ii][Tt]/*|/-*|/\"*) refuse submodules "$place$path is no place for a submodule" ;;
        esac
        name=
        while IFS=$tab read -r key value <&4; do
            [ "$value" != "$path" ] || { name=${key#submodule.} name=${name%.path}; }
        done 4<"$names"
        [ -n "$name" ] || refuse submodules "$place$path: .gitmodules does not say where it comes from"
        given=$(git config --blob "$of:.gitmodules" --get "submodule.$name.url" || :)
        target=$(resolve "$parent_url" "$given")
        speaks=$(transport "$target")
        case $speaks:$insecure in
        :*) refuse submodules "$place$path: the url $given is none of https://host/path, ssh://[user@]host/path, user@host:path, http://host/path, git://host/path, and not relative" ;;
        http:https:no|git:no) refuse submodules "$place$path: the url $target is insecure, and the repository's own is not" ;;
        esac
        about="submodule $place$path, $target: "
        if ! has "$sub"; then
            export GIT_ALLOW_PROTOCOL="$speaks"
            code=0
            bring "$about" "$target" "$sub" || code=$?
            case $code in
            0) ;;
            10) bring_all "$target" "refs/other/$(printf '%s' "$target" | git hash-object --stdin)/" ;;
            *) exit $code ;;
            esac
            has "$sub" || {
                printf 'kari: %sthe repository has no commit %s\n' "$about" "$sub" >&2
                exit 20
            }
        fi
        git update-ref "refs/submodules/$app/$sub" "$sub"
        printf '%s\n' "refs/submodules/$app/$sub" >>"$scratch/held"
        submodules "$sub" "$target" $((depth + 1)) "$place$path/"
    done 3<"$links"
)

# missing (commit app reference base submodules)…: prints the commits that are not there
missing() {
    while [ $# -gt 0 ]; do
        has "$1" || printf '%s\n' "$1"
        shift 5
    done
}

wanted=$(missing "$@")
if [ -n "$wanted" ]; then
    code=0
    # Unquoted: commits have no spaces.
    bring '' "$url" $wanted || code=$?
    case $code in
    0) ;;
    10)
        # Not given by its id, or gone.
        bring_all "$url" refs/
        set_aside=$wanted
        for commit in $set_aside; do
            has "$commit" && continue
            # The place where it was found.
            found=$(while [ $# -gt 0 ]; do [ "$1" = "$commit" ] && printf '%s' "$3" && break; shift 5; done)
            case $found in
            refs/heads/*|refs/tags/*|'') ;;
            refs/*) fetch -- "$url" "+$found:refs/other/$commit" || : ;;
            esac
        done ;;
    *) exit $code ;;
    esac
fi

status=0
while [ $# -gt 0 ]; do
    commit=$1 app=$2 base=$4 modules=$5
    shift 5
    if ! has "$commit"; then
        printf 'kari: the repository has no commit %s\n' "$commit" >&2
        status=20
        continue
    fi
    rm -f "$scratch/count" "$scratch/refused"
    : >"$scratch/held"
    # Not in a condition, in which a failure would not end it.
    set +e
    (
        set -e
        descend
        [ "$modules" = - ] || submodules "$commit" "$url" 1 ''
    )
    code=$?
    set -e
    case $code in
    0) finding='granted -' ;;
    30) finding=$(cat "$scratch/refused") ;;
    *)
        status=$code
        continue ;;
    esac
    mkdir -p "$mirror/findings/${app%/*}"
    printf '%s %s %s %s\n' "$commit" "$base" "$modules" "$finding" >"$scratch/finding"
    # Beside its place first: it is read meanwhile.
    cp "$scratch/finding" "$mirror/findings/${app%/*}/.new"
    mv "$mirror/findings/${app%/*}/.new" "$mirror/findings/$app"
    git update-ref "refs/kari/$app" "$commit"
    # What earlier commits of the app had.
    git for-each-ref --format='%(refname)' "refs/submodules/$app/" | while IFS= read -r ref; do
        grep -qxF "$ref" "$scratch/held" || git update-ref -d "$ref"
    done
done

# Many small packs make every look-up slow.
if [ "$(find "$mirror/objects/pack" -name '*.pack' | wc -l)" -gt 50 ]; then
    git repack -d --quiet --geometric=2 || :
fi
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
            want: Want {
                source: source.clone(),
                commit: Commit::parse(&"a".repeat(40)).unwrap_or_else(|e| panic!("{e}")),
                reference: Some("refs/heads/main".into()),
                base: None,
                submodules: true,
                credential: None,
            },
        };
        fetch_step(
            &source,
            paths,
            "kari-git",
            "/usr/bin:/bin",
            mode,
            &[hold],
            None,
        )
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
                "256",
                "8",
                &commit,
                "web/shop",
                "refs/heads/main",
                "-",
                "submodules"
            ]
        );
    }

    #[test]
    fn ssh_knows_the_hosts_that_are_bound_for_it() {
        let option = format!("-o GlobalKnownHostsFile={KNOWN_HOSTS_PATH} ");
        assert!(WITHOUT_KEY.contains(&option), "{WITHOUT_KEY}");
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
