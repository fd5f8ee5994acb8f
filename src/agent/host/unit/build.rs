//! Builds: their key, their script, their environment, and the step that runs them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use super::{DEFAULT_TASKS, StepLimits, StepSpec, UnitError, in_app};
use crate::agent::host::jail::{APP_PATH, JAIL_VERSION, MIRROR_PATH, SCRIPT_PATH};
use crate::agent::host::quote::{self, QuoteError};
use crate::agent::host::records::BuildKey;
use crate::agent::host::store::Stage;
use crate::api::deployment::{Build, ResourceLimits};
use crate::api::names::{AppName, Commit};

/// The key of the tree that a build results in: a digest of all that the tree follows from. The limits
/// and the deadline of a build are not part of it.
pub fn build_key(
    commit: &Commit,
    submodules: bool,
    directory: Option<&str>,
    build: Option<&Build>,
) -> BuildKey {
    let build = build.map(
        |Build {
             run,
             command,
             env,
             network,
             cache_directories,
             timeout_seconds: _,
             resources: _,
         }| {
            let caches: BTreeSet<_> = cache_directories.iter().collect();
            let env: BTreeMap<_, _> = env
                .iter()
                .map(|variable| (&variable.name, variable.plain_value()))
                .collect();
            serde_json::json!({"run": run, "command": command, "env": env, "network": network, "cacheDirectories": caches})
        },
    );
    let content = serde_json::json!({
        "commit": commit.as_str(),
        "submodules": submodules,
        // Without a build the whole checkout is what runs, from whatever directory.
        "directory": if build.is_some() { directory } else { None },
        "build": build,
        "jail": JAIL_VERSION,
    });
    BuildKey::of(content.to_string().as_bytes())
}

/// The script that a build step runs, as a file: a build's words reach systemd as its name alone.
pub fn build_script(build: &Build) -> Result<String, UnitError> {
    let place = |source| UnitError::Quote {
        place: "build".to_owned(),
        source,
    };
    match (&build.run, &build.command) {
        (Some(script), _) if script.contains('\0') => Err(place(QuoteError::Nul {
            what: "run".to_owned(),
        })),
        (Some(script), _) => Ok(format!("{}\n", script.trim_end_matches('\n'))),
        (None, Some(words)) => {
            quote::check_program(words).map_err(place)?;
            Ok(format!(
                "exec /usr/bin/env -- {}\n",
                quote::shell_words(words).map_err(place)?
            ))
        }
        (None, None) => Err(place(QuoteError::NoProgram)),
    }
}

/// A line before the script of a build with caches, whose places exist in the tree before the checkout: what
/// tells that the commit has no such directory. No line of its own, so that the script's keep their numbers.
pub fn directory_check(
    commit: &Commit,
    directory: Option<&str>,
    tool_path: &str,
) -> Result<String, UnitError> {
    let Some(directory) = plain_parts(directory.unwrap_or_default()) else {
        return Ok(String::new());
    };
    let words = [
        "-i",
        &format!("PATH={tool_path}"),
        "git",
        &format!("--git-dir={MIRROR_PATH}"),
        "cat-file",
        "-e",
        &format!("{commit}:{}", directory.display()),
    ]
    .map(str::to_owned);
    let words = quote::shell_words(&words).map_err(|source| UnitError::Quote {
        place: "source.git.directory".to_owned(),
        source,
    })?;
    Ok(format!(
        "/usr/bin/env {words} || exit {EXIT_NO_DIRECTORY}; "
    ))
}

/// Where a cache directory is in the tree: relative to its root, and normal.
pub fn cache_place(directory: Option<&str>, cache: &str) -> PathBuf {
    let mut place = directory.and_then(plain_parts).unwrap_or_default();
    place.extend(plain_parts(cache));
    place
}

/// A relative path without `.`; nothing if nothing is left.
fn plain_parts(path: &str) -> Option<PathBuf> {
    let parts = Path::new(path).components();
    let plain: PathBuf = parts
        .filter(|part| !matches!(part, Component::CurDir))
        .collect();
    (!plain.as_os_str().is_empty()).then_some(plain)
}

/// The environment file of a build.
pub fn build_environment(build: &Build) -> Result<Vec<u8>, UnitError> {
    quote::environment_file(
        build
            .env
            .iter()
            .map(|variable| (variable.name.as_str(), variable.plain_value())),
    )
    .map_err(|source| UnitError::Quote {
        place: "build.env".to_owned(),
        source,
    })
}

/// What a build step is made of.
#[derive(Debug, Clone, Copy)]
pub struct BuildSpec<'a> {
    /// The app.
    pub app: &'a AppName,
    /// What is checked out.
    pub commit: &'a Commit,
    /// The bare mirror on the node that has it.
    pub mirror: &'a Path,
    /// The stage, made by [`AppFolder::create_stage`](crate::agent::host::store::AppFolder::create_stage).
    pub stage: &'a Stage,
    /// Whether its submodules are checked out too.
    pub submodules: bool,
    /// The folder of the repository that the build starts in.
    pub directory: Option<&'a str>,
    /// The build; without it the checkout is all.
    pub build: Option<&'a Build>,
    /// The folders of the node that are the build's caches, and where [`cache_place`] has each.
    pub caches: &'a [(PathBuf, PathBuf)],
    /// The file of [`build_environment`].
    pub env_file: Option<&'a Path>,
    /// The app's build user.
    pub user: &'a str,
    /// `$PATH` of the node's tools.
    pub tool_path: &'a str,
    /// Where its output goes.
    pub log: &'a Path,
}

/// `mirror tree commit git…`: checks a commit out by the words after it, then what its submodules are at, and
/// theirs, which the fetch has brought into the same mirror and whose places it has looked at. A file beside the
/// mirror, as a reload of systemd does not leave the words of a command that runs as they were.
pub const CHECKOUT_SCRIPT: &str = r#"# Written by kari agent; an edit is overwritten.
mirror=$1 tree=$2 commit=$3
shift 3
"$@"
tab=$(printf '\t')
rm -f "$GIT_INDEX_FILE"
submodules() (
    git --git-dir="$mirror" -c core.quotePath=false ls-tree -r --full-tree "$1" >/tmp/kari-links
    sed -n 's/^160000 commit //p' /tmp/kari-links >"/tmp/kari-links.$3"
    while IFS=$tab read -r submodule path <&3; do
        mkdir -p "$tree/$2$path"
        git -c core.hooksPath=/dev/null --git-dir="$mirror" --work-tree="$tree/$2$path" read-tree --reset -u "$submodule"
        rm -f "$GIT_INDEX_FILE"
        submodules "$submodule" "$2$path/" $(($3 + 1))
    done 3<"/tmp/kari-links.$3"
)
submodules "$commit" '' 0
rm -f /tmp/kari-links*
"#;

/// The name of [`CHECKOUT_SCRIPT`] in the folder of the mirrors.
pub const CHECKOUT_FILE: &str = "checkout.sh";

/// Where it is in the jail.
const CHECKOUT_PATH: &str = "/var/lib/kari/checkout";

/// Seconds in which a checkout without a build must be done.
const CHECKOUT_TIMEOUT_SECONDS: u32 = 900;

/// A build step: git checks the commit out, then the script runs. The checkout is `ExecStartPre=`, so
/// a step whose main process never ran (`ExecMainCode` 0) failed in the checkout, and a reload of
/// systemd in the middle cannot make it skip the build.
pub fn build_step(spec: &BuildSpec<'_>) -> Result<StepSpec, UnitError> {
    let BuildSpec {
        app,
        commit,
        mirror,
        stage,
        submodules,
        directory,
        build,
        caches,
        env_file,
        user,
        tool_path,
        log,
    } = *spec;
    // Nothing of the build's environment reaches git, and nothing of the node's configuration.
    let environment = [
        "-i",
        &format!("PATH={tool_path}"),
        "HOME=/tmp/home",
        "LANG=C.UTF-8",
        "GIT_CONFIG_NOSYSTEM=1",
        "GIT_CONFIG_GLOBAL=/dev/null",
        "GIT_INDEX_FILE=/tmp/kari-index",
        "GIT_TERMINAL_PROMPT=0",
    ]
    .map(str::to_owned);
    let git = [
        "git",
        "-c",
        "core.hooksPath=/dev/null",
        "-c",
        "advice.detachedHead=false",
        &format!("--git-dir={MIRROR_PATH}"),
        &format!("--work-tree={APP_PATH}"),
        "checkout",
        "-f",
        commit.as_str(),
        "--",
        ".",
    ]
    .map(str::to_owned);
    let mut checkout = environment.to_vec();
    if submodules {
        let script = ["/bin/sh", "-eu", CHECKOUT_PATH];
        checkout.extend(script.map(str::to_owned));
        checkout.extend([MIRROR_PATH, APP_PATH, commit.as_str()].map(str::to_owned));
    }
    checkout.extend(git);

    let mut writable = vec![
        (stage.source(), APP_PATH.to_owned()),
        (stage.temporary(), "/tmp".to_owned()),
        (stage.temporary(), "/var/tmp".to_owned()),
    ];
    for (cache, place) in caches {
        let place = Path::new(APP_PATH).join(place);
        let place = quote::plain_path(&place).map_err(|source| UnitError::Quote {
            place: "build.cacheDirectories".to_owned(),
            source,
        })?;
        writable.push((cache.clone(), place.to_owned()));
    }
    writable.sort_by(|a, b| a.1.cmp(&b.1));
    let mut step = StepSpec {
        description: format!("Kari: build of {app} at {}", commit.short()),
        user: user.to_owned(),
        timeout_seconds: CHECKOUT_TIMEOUT_SECONDS,
        limits: DEFAULT_BUILD_LIMITS,
        network: true,
        environment: vec![
            ("PATH".to_owned(), tool_path.to_owned()),
            ("HOME".to_owned(), "/tmp/home".to_owned()),
            ("TMPDIR".to_owned(), "/tmp".to_owned()),
            ("XDG_CACHE_HOME".to_owned(), "/tmp/cache".to_owned()),
            ("LANG".to_owned(), "C.UTF-8".to_owned()),
            ("CI".to_owned(), "true".to_owned()),
        ],
        environment_file: None,
        read_only: vec![(mirror.to_owned(), MIRROR_PATH.to_owned())],
        writable,
        working_directory: APP_PATH.to_owned(),
        log: log.to_owned(),
        before: vec![],
        command: checkout.clone(),
    };
    if submodules {
        let script = mirror.with_file_name(CHECKOUT_FILE);
        step.read_only.push((script, CHECKOUT_PATH.to_owned()));
    }
    if let Some(build) = build {
        step.timeout_seconds = build.timeout_seconds;
        step.limits = build_limits(build)?;
        step.network = build.network;
        step.environment_file = env_file.map(Path::to_owned);
        step.read_only
            .push((stage.script(), SCRIPT_PATH.to_owned()));
        step.before = vec![checkout];
        step.command = [
            &format!("--chdir={}", in_app(directory)),
            "/bin/sh",
            "-eu",
            SCRIPT_PATH,
        ]
        .map(str::to_owned)
        .to_vec();
    }
    Ok(step)
}

/// The exit status of `env --chdir` for a folder that is not there; a program may end with it too, so
/// the stage is looked at before it is said.
pub const EXIT_NO_DIRECTORY: i32 = 125;

/// What a build may use unless its spec says otherwise.
pub const DEFAULT_BUILD_LIMITS: StepLimits = StepLimits {
    cpu_millis: 2000,
    memory_bytes: 2 << 30,
    tasks: DEFAULT_TASKS,
};

fn build_limits(build: &Build) -> Result<StepLimits, UnitError> {
    let limits = build
        .resources
        .as_ref()
        .and_then(|resources| resources.limits.as_ref());
    let Some(ResourceLimits { cpu, memory, tasks }) = limits else {
        return Ok(DEFAULT_BUILD_LIMITS);
    };
    let wrong = |source| UnitError::Quantity {
        place: "build.resources.limits".to_owned(),
        source,
    };
    let StepLimits {
        cpu_millis,
        memory_bytes,
        tasks: default_tasks,
    } = DEFAULT_BUILD_LIMITS;
    Ok(StepLimits {
        cpu_millis: cpu
            .as_ref()
            .map_or(Ok(cpu_millis), |cpu| cpu.millis())
            .map_err(wrong)?,
        memory_bytes: memory
            .as_ref()
            .map_or(Ok(memory_bytes), |memory| memory.bytes())
            .map_err(wrong)?,
        tasks: tasks.unwrap_or(default_tasks),
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

    use super::*;
    use crate::agent::host::jail::{Setting, Value};
    use crate::agent::host::unit::step_properties;
    use crate::api::deployment::BuildResources;
    use crate::api::quantity::{Cpu, Memory};

    fn app() -> AppName {
        AppName::new("web", "shop").unwrap()
    }

    fn commit() -> Commit {
        Commit::parse(&"4b825dc0".repeat(5)).unwrap()
    }

    fn build(json: serde_json::Value) -> Build {
        serde_json::from_value(json).unwrap()
    }

    fn step(build: Option<&Build>) -> StepSpec {
        build_step(&BuildSpec {
            app: &app(),
            commit: &commit(),
            mirror: Path::new("/var/lib/kari/mirrors/m.git"),
            stage: &Stage {
                path: "/var/lib/kari/apps/web.shop/stage/k.0".into(),
            },
            submodules: false,
            directory: Some("services/shop"),
            build,
            caches: &[(
                "/var/lib/kari/apps/web.shop/cache/0".into(),
                cache_place(Some("./services/shop"), ".cache/npm"),
            )],
            env_file: Some(Path::new("/var/lib/kari/apps/web.shop/env/b")),
            user: "kari-50000",
            tool_path: "/usr/bin:/bin",
            log: Path::new("/var/lib/kari/apps/web.shop/logs/r.build"),
        })
        .unwrap()
    }

    #[test]
    fn a_build_is_checked_out_before_it_runs_and_its_words_do_not_reach_systemd() {
        let of_build = build(
            serde_json::json!({"run": "make; echo $$ %n\n", "network": false, "timeoutSeconds": 60}),
        );
        let spec = step(Some(&of_build));
        assert!(spec.before[0].contains(&"checkout".to_owned()) && spec.before[0][0] == "-i");
        assert_eq!(
            spec.command,
            [
                "--chdir=/var/lib/kari/app/services/shop",
                "/bin/sh",
                "-eu",
                "/var/lib/kari/build"
            ]
        );
        assert_eq!((spec.network, spec.timeout_seconds), (false, 60));
        // In the order in which they are mounted: within the tree, so after it.
        assert_eq!(
            spec.writable[1..3],
            [
                (
                    PathBuf::from("/var/lib/kari/apps/web.shop/stage/k.0/source"),
                    APP_PATH.to_owned()
                ),
                (
                    PathBuf::from("/var/lib/kari/apps/web.shop/cache/0"),
                    format!("{APP_PATH}/services/shop/.cache/npm")
                ),
            ]
        );
        assert_eq!(build_script(&of_build).unwrap(), "make; echo $$ %n\n");
        let settings = step_properties(&spec).unwrap();
        assert!(settings.contains(&Setting::new("PrivateNetwork", Value::Switch(true))));
        assert!(!format!("{settings:?}").contains("echo"));

        let words = build(serde_json::json!({"command": ["npm", "run", "it's"]}));
        assert_eq!(
            build_script(&words).unwrap(),
            r"exec /usr/bin/env -- 'npm' 'run' 'it'\''s'".to_owned() + "\n"
        );

        let checkout = step(None);
        assert!(checkout.before.is_empty() && checkout.command.contains(&"checkout".to_owned()));
    }

    #[test]
    fn a_build_key_follows_from_what_the_tree_follows_from_and_from_nothing_else() {
        let json = |extra: serde_json::Value| {
            let mut json = serde_json::json!({"run": "make", "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]});
            json.as_object_mut()
                .unwrap()
                .extend(extra.as_object().unwrap().clone());
            build(json)
        };
        let base = json(serde_json::json!({}));
        let key = |build: &Build| build_key(&commit(), false, Some("d"), Some(build));
        for same in [
            serde_json::json!({"timeoutSeconds": 60}),
            serde_json::json!({"resources": {"limits": {"tasks": 7}}}),
            serde_json::json!({"env": [{"name": "B", "value": "2"}, {"name": "A", "value": "1"}]}),
        ] {
            assert_eq!(key(&json(same.clone())), key(&base), "{same}");
        }
        for other in [
            serde_json::json!({"run": "make all"}),
            serde_json::json!({"env": []}),
            serde_json::json!({"network": false}),
            serde_json::json!({"cacheDirectories": [".cache"]}),
        ] {
            assert_ne!(key(&json(other.clone())), key(&base), "{other}");
        }
        assert_ne!(
            build_key(&commit(), false, Some("e"), Some(&base)),
            key(&base)
        );
        assert_ne!(build_key(&commit(), false, Some("d"), None), key(&base));
        assert_eq!(
            build_key(&commit(), false, Some("d"), None),
            build_key(&commit(), false, None, None),
            "a checkout is the whole tree"
        );
        assert_ne!(
            build_key(&commit(), true, None, None),
            build_key(&commit(), false, None, None)
        );
        let other = Commit::parse(&"0".repeat(40)).unwrap();
        assert_ne!(build_key(&other, false, Some("d"), Some(&base)), key(&base));
    }

    #[test]
    fn a_directory_that_is_the_root_is_not_looked_for_in_the_commit() {
        for root in [None, Some("."), Some("./")] {
            assert_eq!(directory_check(&commit(), root, "/bin").unwrap(), "");
        }
        let check = directory_check(&commit(), Some("./it's/here"), "/usr/bin:/bin").unwrap();
        let object = format!("'{}:it'\\''s/here'", commit());
        assert!(
            check.contains(&object) && check.ends_with(" || exit 125; ") && !check.contains('\n'),
            "{check}"
        );
        assert_eq!(cache_place(None, "a/b"), PathBuf::from("a/b"));
        assert_eq!(cache_place(Some("."), "a"), PathBuf::from("a"));
    }

    #[test]
    fn the_limits_of_a_build_are_those_of_its_spec_and_else_the_default() {
        let mut of_build = build(serde_json::json!({"run": "make"}));
        assert_eq!(step(Some(&of_build)).limits, DEFAULT_BUILD_LIMITS);
        of_build.resources = Some(BuildResources {
            limits: Some(ResourceLimits {
                cpu: Some(Cpu(IntOrString::String("1500m".to_owned()))),
                memory: Some(Memory(IntOrString::String("256Mi".to_owned()))),
                tasks: Some(9),
            }),
        });
        let limits = StepLimits {
            cpu_millis: 1500,
            memory_bytes: 256 << 20,
            tasks: 9,
        };
        assert_eq!(step(Some(&of_build)).limits, limits);
    }
}
