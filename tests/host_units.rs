//! The host layer on a real systemd: units, jails, users and limits as they are, not as they read.
//!
//! Each test runs twice: outside, where it copies this program into a node and starts itself there, and
//! in the node, where it is what its name says.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kari::agent::host::jail::Setting;
use kari::agent::host::records::StepResult;
use kari::agent::host::store::{AppFolder, Store, UNIT_FOLDER, UnitFiles};
use kari::agent::host::systemd::{ActiveState, HostEvent, Systemd, SystemdError, UnitState};
use kari::agent::host::users::{self, AppUsers, Users};
use kari::agent::host::{limits, seal, slices, store, unit};
use kari::api::deployment::{Build, EnvVar, Process};
use kari::api::names::{AppName, Commit, NodeName, ReleaseId};
use testbed::{Options, Testbed};
use tokio::sync::{Mutex, OnceCell, mpsc};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

const TOOL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The longest that anything here may take; far above what it does.
const LIMIT: Duration = Duration::from_secs(60);

/// Set where a test runs in the node.
const IN_NODE: &str = "KARI_TEST_IN_NODE";
/// This program in the node.
const PROGRAM: &str = "/root/host_units";

/// One node for all tests; taken down when this process ends.
static TESTBED: OnceCell<Testbed> = OnceCell::const_new();
/// One test at a time: some take the bus away, and the store has one owner.
static TURN: Mutex<()> = Mutex::const_new(());

/// Outside: runs the calling test in the node, and is true. In the node: false.
macro_rules! outside {
    () => {
        run_in_node(std::any::type_name_of_val(&|| ())).await
    };
}

async fn run_in_node(path: &str) -> bool {
    if std::env::var_os(IN_NODE).is_some() {
        return false;
    }
    let testbed = TESTBED.get_or_init(node_with_this_program).await;
    let _turn = TURN.lock().await;
    run_once(testbed, path.split("::").nth(1).unwrap(), "1").await;
    true
}

/// Runs a test in the node, which finds `phase` in [`IN_NODE`].
async fn run_once(testbed: &Testbed, test: &str, phase: &str) {
    let variable = format!("{IN_NODE}={phase}");
    let words = ["env", &variable, PROGRAM, "--exact", test, "--nocapture"];
    let output = testbed.node("n1").unwrap().exec(words).await.unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
    print!("{text}");
}

async fn node_with_this_program() -> Testbed {
    let testbed = Testbed::up(Options {
        kari: false,
        ..Options::default()
    })
    .await
    .unwrap();
    let mut copy = testbed.node("n1").unwrap().command("sh").unwrap();
    copy.args(["-c", &format!("cat >{PROGRAM} && chmod 755 {PROGRAM}")]);
    copy.stdin(fs::File::open(std::env::current_exe().unwrap()).unwrap());
    assert!(copy.status().unwrap().success());
    testbed
}

/// The node's agent, as far as the host layer goes.
struct Host {
    store: Store,
    users: Users,
    files: UnitFiles,
}

static HOST: OnceCell<Host> = OnceCell::const_new();

async fn host() -> &'static Host {
    HOST.get_or_init(|| async {
        Host {
            store: Store::open(Path::new(store::ROOT)).unwrap(),
            users: Users::new(Path::new(users::FOLDER), users::DEFAULT_RANGE),
            files: UnitFiles::new(Path::new(UNIT_FOLDER)),
        }
    })
    .await
}

async fn systemd() -> (Systemd, mpsc::Receiver<HostEvent>) {
    Systemd::connect(None).await.unwrap()
}

struct App {
    name: AppName,
    folder: AppFolder,
    users: AppUsers,
    files: &'static UnitFiles,
    systemd: Systemd,
    /// Kept, as the client's watcher lives as long as its reader.
    _events: mpsc::Receiver<HostEvent>,
}

async fn app(name: &str) -> App {
    let host = host().await;
    let (systemd, events) = systemd().await;
    let name = AppName::new("test", name).unwrap();
    let folder = host.store.app(&name);
    folder.create().unwrap();
    let users = host.users.ensure_app(&folder).unwrap();
    App {
        name,
        folder,
        users,
        files: &host.files,
        systemd,
        _events: events,
    }
}

impl App {
    /// A tree with the files, as if sealed.
    fn tree(&self, files: &[(&str, &str)]) -> PathBuf {
        let tree = self.folder.path().join("builds/tree");
        for (name, text) in files {
            let path = tree.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::create_dir_all(&tree).unwrap();
        tree
    }

    /// Writes and starts a service of the app.
    async fn serve(
        &self,
        tree: &Path,
        directory: Option<&str>,
        env: &[EnvVar],
        process: serde_json::Value,
    ) -> String {
        let process: Process = serde_json::from_value(process).unwrap();
        let state = process.state_directory.then(|| {
            self.folder
                .create_state(&process.name, self.users.service.uid)
                .unwrap()
        });
        let variables = unit::ProcessVariables::of(env, &[], &process);
        let (_, env_file) = self
            .folder
            .write_env(&variables.content(&process, &Default::default()).unwrap())
            .unwrap();
        let service = unit::service_unit(&unit::ServiceSpec {
            app: &self.name,
            process: &process,
            variables: &variables.plain,
            env_file: &env_file,
            port: None,
            commit: &Commit::parse(&"0".repeat(40)).unwrap(),
            node: &NodeName::new("n1"),
            tree,
            directory,
            state: state.as_deref(),
            user: &self.users.service.name,
            tool_path: TOOL_PATH,
        })
        .unwrap();
        self.files.write(&service.name, &service.text).unwrap();
        self.systemd.start_unit(&service.name).await.unwrap();
        service.name
    }

    /// The app's mirror with one commit of the files.
    fn mirror(&self, files: &[(&str, &str)]) -> (PathBuf, Commit) {
        let work = self.folder.path().join("work");
        let mirror = self
            .folder
            .store()
            .mirrors()
            .join(format!("{}.git", self.name));
        for (name, text) in files {
            fs::create_dir_all(work.join(name).parent().unwrap()).unwrap();
            fs::write(work.join(name), text).unwrap();
        }
        let git = |arguments: &[&str]| {
            let output = Command::new("git")
                .args(arguments)
                .current_dir(&work)
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "git {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        git(&["init", "-q", "-b", "main"]);
        git(&["add", "-A"]);
        git(&[
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@example.com",
            "commit",
            "--allow-empty",
            "-qm",
            "first",
        ]);
        git(&["clone", "-q", "--bare", ".", mirror.to_str().unwrap()]);
        // As a fetch makes it: another user's than the build's.
        Command::new("chown")
            .args(["-R", "nobody"])
            .arg(&mirror)
            .status()
            .unwrap();
        (mirror, Commit::parse(&git(&["rev-parse", "HEAD"])).unwrap())
    }

    /// Starts a build step of the app, and gives back its unit's name.
    async fn build(
        &self,
        files: &[(&str, &str)],
        directory: Option<&str>,
        build: serde_json::Value,
    ) -> Step {
        let build: Build = serde_json::from_value(build).unwrap();
        let (mirror, commit) = self.mirror(files);
        let release_id = ReleaseId(Uuid::new_v4());
        let key = unit::build_key(&commit, false, directory, Some(&build));
        let script = unit::build_script(&build).unwrap();
        let stage = self
            .folder
            .create_stage(&key, 0, self.users.build.uid, Some(&script))
            .unwrap();
        let (_, env_file) = self
            .folder
            .write_env(&unit::build_environment(&build).unwrap())
            .unwrap();
        let step = unit::build_step(&unit::BuildSpec {
            app: &self.name,
            commit: &commit,
            mirror: &mirror,
            stage: &stage,
            submodules: false,
            directory,
            build: Some(&build),
            caches: &[],
            env_file: Some(&env_file),
            user: &self.users.build.name,
            tool_path: TOOL_PATH,
            log: &self.folder.log(&release_id, "build"),
        })
        .unwrap();
        let name = unit::build_unit_name(&self.name, &release_id, 0);
        let settings = unit::step_properties(&step).unwrap();
        self.systemd
            .start_transient(&name, &settings)
            .await
            .unwrap();
        Step {
            unit: name,
            release_id,
            key,
            settings,
        }
    }

    fn forget_mirror(&self) {
        fs::remove_dir_all(
            self.folder
                .store()
                .mirrors()
                .join(format!("{}.git", self.name)),
        )
        .unwrap();
    }

    async fn built(&self, step: &Step) -> StepResult {
        let state = self
            .wait(&step.unit, |state| {
                !state.has_job && state.active_state != ActiveState::Activating
            })
            .await;
        state.step_result()
    }

    fn log(&self, step: &Step) -> String {
        self.folder
            .log_tail(&step.release_id, "build")
            .unwrap()
            .unwrap_or_default()
    }

    async fn wait(&self, unit: &str, good: impl Fn(&UnitState) -> bool) -> UnitState {
        let deadline = Instant::now() + LIMIT;
        loop {
            let state = self.systemd.get_unit_state(unit).await.unwrap();
            match state {
                Some(state) if good(&state) => return state,
                state if Instant::now() >= deadline => panic!("{unit} is {state:?}"),
                _ => sleep(Duration::from_millis(10)).await,
            }
        }
    }
}

struct Step {
    unit: String,
    release_id: ReleaseId,
    key: kari::agent::host::records::BuildKey,
    settings: Vec<Setting>,
}

async fn file(path: &Path) -> Vec<u8> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match fs::read(path) {
            Ok(content) => return content,
            Err(error) if Instant::now() >= deadline => panic!("{}: {error}", path.display()),
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

fn strings(content: &[u8]) -> Vec<String> {
    let text = String::from_utf8(content.to_vec()).unwrap();
    text.split_terminator('\0').map(str::to_owned).collect()
}

/// Writes its words and its environment where the test can read them, then stays.
const TELL: &str = r#"printf '%s\0' "$@" >$STATE_DIRECTORY/words.tmp; pwd >$STATE_DIRECTORY/pwd; env -0 >$STATE_DIRECTORY/env.tmp
mv $STATE_DIRECTORY/env.tmp $STATE_DIRECTORY/env; mv $STATE_DIRECTORY/words.tmp $STATE_DIRECTORY/words; exec sleep 1000"#;

#[tokio::test]
async fn every_text_of_a_user_reaches_its_program_unchanged() {
    if outside!() {
        return;
    }
    let app = app("quote").await;
    let nasty = [
        "",
        " ",
        "a b",
        "\t",
        "%n",
        "%%",
        "100%",
        "$HOME",
        "${HOME}",
        "$$",
        "\\",
        "\\\\",
        "\"",
        "'",
        "`id`",
        ";",
        "; reboot",
        "a;b",
        "-x",
        "@x",
        "+x",
        "!x",
        "|x",
        ":x",
        "#x",
        "\\x41",
        "\\n",
        "ä€😀",
        "line\nbreak",
        "\nExecStopPost=+/bin/touch /hacked\n",
        "]",
        "[Service]",
        "*",
        "?",
        "~",
        "{a,b}",
        "\r",
        "\u{1}\u{7f}",
        "trailing\\",
        "%i%h%u",
        "=",
        "a=b",
        "\u{feff}bom",
        "<>&",
    ];
    let env: Vec<EnvVar> = nasty
        .iter()
        .enumerate()
        .map(|(index, value)| EnvVar::plain(format!("NASTY_{index}"), *value))
        .chain([EnvVar::plain("LONG", "x\"\\$\n".repeat(20_000))])
        .collect();
    // What core/v1 would expand is written as it says.
    let escaped = nasty.iter().map(|word| word.replace('$', "$$"));
    let mut command: Vec<String> = ["/bin/sh", "-c", &TELL.replace('$', "$$"), "sh"]
        .map(str::to_owned)
        .to_vec();
    command.extend(escaped);
    let directory = "odd \"dir\" %n $x 'ä'; ";
    let tree = app.tree(&[(&format!("{directory}/file"), "")]);

    let process = serde_json::json!({"name": "web", "command": command, "stateDirectory": true});
    let name = app.serve(&tree, Some(directory), &env, process).await;

    let state = app.folder.path().join("state/web");
    assert_eq!(strings(&file(&state.join("words")).await), nasty);
    let seen: BTreeMap<String, String> = strings(&file(&state.join("env")).await)
        .into_iter()
        .map(|line| {
            line.split_once('=')
                .map(|(n, v)| (n.to_owned(), v.to_owned()))
                .unwrap()
        })
        .collect();
    for variable in &env {
        let name = &variable.name;
        assert_eq!(seen.get(name), variable.value.as_ref(), "{name}");
    }
    assert_eq!(seen["HOME"], "/var/lib/kari/state");
    assert_eq!(seen["KARI_NODE"], "n1");
    assert_eq!(
        String::from_utf8(file(&state.join("pwd")).await).unwrap(),
        format!("/var/lib/kari/app/{directory}\n")
    );
    assert!(!Path::new("/hacked").exists());
    let running = app
        .wait(&name, |state| state.active_state == ActiveState::Active)
        .await;
    assert_eq!(running.load_state, "loaded");
    app.systemd.stop_unit(&name, LIMIT).await.unwrap();
}

#[tokio::test]
async fn a_build_becomes_a_sealed_tree_that_a_service_runs_in() {
    if outside!() {
        return;
    }
    let app = app("pipeline").await;
    let step = app
        .build(
            &[("sub/serve.sh", "#!/bin/sh\nexec sleep 1000\n"), ("sub/Makefile", "all:\n\tcp serve.sh serve && chmod 700 serve\n")],
            Some("sub"),
            serde_json::json!({"run": "make\necho $WHO in $PWD as $(id -un) at $HOME; yes | head -1\nmkfifo pipe\n(sleep 1000 &)\n", "env": [{"name": "WHO", "value": "me $$ 100%"}]}),
        )
        .await;
    // Whoever reloads systemd in the middle does no harm.
    app.systemd.daemon_reload().await.unwrap();
    let result = app.built(&step).await;
    assert!(result.is_success(), "{result:?}: {}", app.log(&step));
    let log = app.log(&step);
    assert!(
        log.contains(&format!(
            "me $$ 100% in /var/lib/kari/app/sub as {} at /tmp/home\ny\n",
            app.users.build.name
        )),
        "{log}"
    );

    // A process that the build left behind holds the tree open until the unit is stopped.
    assert_eq!(
        app.systemd
            .get_unit_state(&step.unit)
            .await
            .unwrap()
            .unwrap()
            .tasks_current,
        Some(1)
    );
    app.systemd.stop_unit(&step.unit, LIMIT).await.unwrap();
    let left = app.systemd.get_unit_state(&step.unit).await.unwrap();
    assert_eq!(left, None, "a transient unit that is stopped is gone");
    let tree = seal::seal(&app.folder, &step.key, 0).unwrap();
    seal::resolve_beneath(&tree, Some("sub")).unwrap();
    assert!(tree.join("sub/serve").exists() && !tree.join("sub/pipe").exists());

    let process = serde_json::json!({"name": "web", "command": ["./serve"]});
    let name = app.serve(&tree, Some("sub"), &[], process).await;
    let running = app
        .wait(&name, |state| state.active_state == ActiveState::Active)
        .await;
    assert!(
        !running.need_daemon_reload && running.main_pid > 0,
        "{running:?}"
    );
    app.systemd.stop_unit(&name, LIMIT).await.unwrap();
}

#[tokio::test]
async fn each_way_in_which_a_build_ends_is_told_from_the_others() {
    if outside!() {
        return;
    }
    let app = app("ends").await;
    let files = [("file", "")];
    let run = |script: &str| serde_json::json!({"run": script, "timeoutSeconds": 60, "resources": {"limits": {"memory": "64Mi", "tasks": 64}}});

    let step = app.build(&files, None, run("echo no; exit 3")).await;
    let result = app.built(&step).await;
    assert_eq!(
        (result.result.as_str(), result.code, result.status),
        ("exit-code", 1, 3),
        "{}",
        app.log(&step)
    );
    assert!(result.main_ran());
    assert_eq!(app.log(&step), "no\n");
    // The name is held until it is released.
    let again = app
        .systemd
        .start_transient(&step.unit, &step.settings)
        .await;
    assert!(
        matches!(again, Err(SystemdError::UnitExists { .. })),
        "{again:?}"
    );
    app.systemd.stop_unit(&step.unit, LIMIT).await.unwrap();
    app.systemd
        .start_transient(&step.unit, &step.settings)
        .await
        .unwrap();
    app.built(&step).await;
    app.systemd.stop_unit(&step.unit, LIMIT).await.unwrap();
    app.forget_mirror();

    let step = app.build(&files, Some("missing"), run("true")).await;
    let result = app.built(&step).await;
    assert_eq!(
        (result.code, result.status),
        (1, unit::EXIT_NO_DIRECTORY),
        "{}",
        app.log(&step)
    );
    app.systemd.stop_unit(&step.unit, LIMIT).await.unwrap();

    // A commit that the mirror does not have: the checkout fails, and the build never runs.
    let mirror = app
        .folder
        .store()
        .mirrors()
        .join(format!("{}.git", app.name));
    fs::remove_dir_all(mirror.join("objects")).unwrap();
    fs::create_dir(mirror.join("objects")).unwrap();
    app.folder
        .create_stage(&step.key, 0, app.users.build.uid, Some("echo built\n"))
        .unwrap();
    app.systemd
        .start_transient(&step.unit, &step.settings)
        .await
        .unwrap();
    let result = app.built(&step).await;
    assert!(!result.main_ran() && !result.is_success(), "{result:?}");
    assert!(!app.log(&step).contains("built"), "{}", app.log(&step));
    app.systemd.stop_unit(&step.unit, LIMIT).await.unwrap();
    fs::remove_dir_all(mirror).unwrap();

    let step = app
        .build(
            &files,
            None,
            run("trap 'exit 0' TERM; kill -TERM $$; sleep 1000"),
        )
        .await;
    assert!(
        app.built(&step).await.is_success(),
        "a build may catch a signal of its own"
    );
    app.systemd.stop_unit(&step.unit, LIMIT).await.unwrap();
    app.forget_mirror();

    let step = app
        .build(&files, None, run("head -c 134217728 /dev/zero | tail -n 1"))
        .await;
    let result = app.built(&step).await;
    // A part of it is killed, or all of it where systemd is told of it.
    assert!(
        result.result == "oom-kill" || matches!(result.status, 9 | 137),
        "{result:?}"
    );
    app.systemd.stop_unit(&step.unit, LIMIT).await.unwrap();
    app.forget_mirror();

    let step = app.build(&files, None, run("sleep 1000")).await;
    app.wait(&step.unit, |state| state.main_pid > 0).await;
    app.systemd.kill_unit(&step.unit, 15).await.unwrap();
    let result = app.built(&step).await;
    assert_eq!(
        (result.result.as_str(), result.code, result.status),
        ("signal", 2, 15)
    );
    app.systemd.stop_unit(&step.unit, LIMIT).await.unwrap();
    app.forget_mirror();

    let step = app
        .build(
            &files,
            None,
            serde_json::json!({"run": "sleep 1000", "timeoutSeconds": 1}),
        )
        .await;
    let result = app.built(&step).await;
    assert_eq!(result.result, "timeout");
    app.systemd.stop_unit(&step.unit, LIMIT).await.unwrap();
}

#[tokio::test]
async fn a_unit_that_systemd_refuses_is_told_from_one_that_is_not_there() {
    if outside!() {
        return;
    }
    let app = app("refused").await;
    let missing = app
        .systemd
        .start_unit("kari.test.refused.web.0000000000000000.service")
        .await;
    assert!(
        matches!(missing, Err(SystemdError::NoSuchUnit { .. })),
        "{missing:?}"
    );
    let name = "kari.test.refused.web.0000000000000001.service";
    app.files.write(name, "[Service]\nType=nonsense\n").unwrap();
    let refused = app.systemd.start_unit(name).await;
    assert!(
        matches!(refused, Err(SystemdError::BadUnit { .. })),
        "{refused:?}"
    );
    app.files.remove(name).unwrap();
    app.systemd
        .stop_unit("kari.test.refused.nothing.0000000000000000.service", LIMIT)
        .await
        .unwrap();
    assert_eq!(
        app.systemd
            .unit_processes("kari.test.refused.nothing.0.service")
            .await
            .unwrap(),
        vec![]
    );
    let bad = [Setting::new(
        "Nonsense",
        kari::agent::host::jail::Value::Switch(true),
    )];
    let refused = app
        .systemd
        .start_transient("kari-canary-nonsense.service", &bad)
        .await;
    assert!(
        matches!(
            refused,
            Err(SystemdError::BadUnit { .. } | SystemdError::Refused { .. })
        ),
        "{refused:?}"
    );
}

#[tokio::test]
async fn the_exposure_of_the_jails_is_what_the_readme_says() {
    if outside!() {
        return;
    }
    let app = app("exposure").await;
    let exposure = |unit: &str| {
        let output = Command::new("systemd-analyze")
            .args(["security", "--no-pager", unit])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let last = text
            .lines()
            .find(|line| line.contains("Overall exposure level"))
            .unwrap_or_else(|| panic!("{text}"))
            .to_owned();
        let number = last
            .split(": ")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next())
            .unwrap()
            .parse::<f32>()
            .unwrap();
        (number, text)
    };
    let tree = app.tree(&[]);
    let process = serde_json::json!({"name": "web", "command": ["sleep", "1000"]});
    let name = app.serve(&tree, None, &[], process).await;
    let (service, text) = exposure(&name);
    assert!(service <= 1.2, "{text}");
    app.systemd.stop_unit(&name, LIMIT).await.unwrap();

    let step = app
        .build(
            &[("file", "")],
            None,
            serde_json::json!({"run": "sleep 1000"}),
        )
        .await;
    let (build, text) = exposure(&step.unit);
    assert!(build <= 1.5, "{text}");
    println!("exposure: service {service}, build {build}");
    app.systemd.stop_unit(&step.unit, LIMIT).await.unwrap();
}

/// What an app tries against its neighbour, each line a number and whether it succeeded.
const PRY: &str = r#"
try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "$name"; fi; }
try tree ls $NEIGHBOUR_TREE
try apps ls /var/lib/kari/apps
try state cat $NEIGHBOUR_STATE/secret
try env-file cat $NEIGHBOUR_ENV
try environ cat /proc/$NEIGHBOUR_PID/environ
try root ls /proc/$NEIGHBOUR_PID/root/
try status cat /proc/$NEIGHBOUR_PID/status
try signal kill -0 $NEIGHBOUR_PID
try shm ls /dev/shm/neighbour
try tmp ls /tmp/neighbour
try bus ls /run/dbus
try units ls /run/systemd/transient
try write-tree touch /var/lib/kari/app/x
try write-etc touch /etc/x
try own-shm touch /dev/shm/x
try own-tmp touch /tmp/x
try own-state touch $STATE_DIRECTORY/x
try own-tree cat /var/lib/kari/app/file
"#;

#[tokio::test]
async fn an_app_sees_nothing_of_its_neighbour() {
    if outside!() {
        return;
    }
    let neighbour = app("neighbour").await;
    let tree = neighbour.tree(&[("file", "secret")]);
    let secret = EnvVar::plain("SECRET", "1");
    let process = serde_json::json!({"name": "web", "stateDirectory": true, "command":
        ["/bin/sh", "-c", "echo s >/dev/shm/neighbour; echo s >/tmp/neighbour; echo s >$$STATE_DIRECTORY/secret; exec sleep 1000"]});
    let name = neighbour
        .serve(&tree, None, std::slice::from_ref(&secret), process)
        .await;
    file(&neighbour.folder.path().join("state/web/secret")).await;
    let pid = neighbour
        .wait(&name, |state| state.main_pid > 0)
        .await
        .main_pid;
    assert!(
        !Path::new("/dev/shm/neighbour").exists(),
        "the node's own shm is not the jail's"
    );

    let app = app("pry").await;
    let own = app.tree(&[("file", "mine")]);
    let env_file = fs::read_dir(neighbour.folder.path().join("env"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let variable = |name: &str, value: String| EnvVar::plain(name, value);
    let env = [
        variable("NEIGHBOUR_TREE", tree.display().to_string()),
        variable(
            "NEIGHBOUR_STATE",
            neighbour
                .folder
                .path()
                .join("state/web")
                .display()
                .to_string(),
        ),
        variable("NEIGHBOUR_ENV", env_file.display().to_string()),
        variable("NEIGHBOUR_PID", pid.to_string()),
    ];
    let script = format!(
        "{{ {PRY} }} >$STATE_DIRECTORY/tmp; mv $STATE_DIRECTORY/tmp $STATE_DIRECTORY/found; exec sleep 1000"
    );
    let process = serde_json::json!({"name": "web", "stateDirectory": true, "command": ["/bin/sh", "-c", script.replace('$', "$$")]});
    let prying = app.serve(&own, None, &env, process).await;
    let found = String::from_utf8(file(&app.folder.path().join("state/web/found")).await).unwrap();
    assert_eq!(
        found.lines().collect::<Vec<_>>(),
        ["own-shm", "own-tmp", "own-state", "own-tree"]
    );
    app.systemd.stop_unit(&prying, LIMIT).await.unwrap();
    neighbour.systemd.stop_unit(&name, LIMIT).await.unwrap();
}

#[tokio::test]
async fn a_restart_of_the_bus_is_survived_and_everything_is_looked_at_anew() {
    if outside!() {
        return;
    }
    let (systemd, mut events) = systemd().await;
    assert_eq!(events.recv().await, Some(HostEvent::Everything));
    let bus = systemd
        .get_unit_state("dbus.service")
        .await
        .unwrap()
        .unwrap();
    assert!(
        Command::new("kill")
            .args(["-9", &bus.main_pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
    let again = tokio::time::timeout(LIMIT, async {
        loop {
            match events.recv().await {
                Some(HostEvent::Everything) => break,
                Some(HostEvent::Unit(_)) => {}
                None => panic!("the watcher ended"),
            }
        }
    });
    again.await.unwrap();
    let deadline = Instant::now() + LIMIT;
    while let Err(error) = systemd.version().await {
        assert!(matches!(error, SystemdError::Unavailable(_)), "{error}");
        assert!(Instant::now() < deadline, "{error}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_event_names_the_unit_that_changed() {
    if outside!() {
        return;
    }
    let app = app("events").await;
    let (_second, mut events) = systemd().await;
    let tree = app.tree(&[]);
    let process = serde_json::json!({"name": "web", "command": ["sleep", "1000"]});
    let name = app.serve(&tree, None, &[], process).await;
    let wanted = HostEvent::Unit(name.clone());
    let seen = tokio::time::timeout(LIMIT, async {
        while events.recv().await.as_ref() != Some(&wanted) {}
    });
    seen.await.unwrap();
    let listed = app
        .systemd
        .list_units(&unit::app_patterns(&app.name).each_ref().map(String::as_str))
        .await
        .unwrap();
    assert_eq!(
        listed.iter().map(|unit| &unit.name).collect::<Vec<_>>(),
        [&name]
    );
    app.systemd.stop_unit(&name, LIMIT).await.unwrap();
}

#[tokio::test]
async fn limits_are_proven_by_what_they_stop() {
    if outside!() {
        return;
    }
    let host = host().await;
    let git = host.users.ensure_git(&host.store).unwrap();
    let (systemd, _events) = systemd().await;
    let before = Instant::now();
    let limits = limits::prove(&systemd, &git.name).await.unwrap();
    println!("{limits:?} in {:?}", before.elapsed());
    assert!(
        limits.seccomp && limits.userdb && limits.ip_address_deny,
        "{limits:?}"
    );
    // Whatever the machine's control groups can do, the canaries agree with what is counted.
    let unknown = limits::prove(&systemd, "kari-nobody-has-this")
        .await
        .unwrap();
    assert!(!unknown.userdb, "a user that does not exist");
    assert_eq!(
        (unknown.memory, unknown.tasks),
        (limits.memory, limits.tasks)
    );
    assert_eq!(
        systemd.list_units(&["kari-canary-*"]).await.unwrap(),
        vec![]
    );
}

#[tokio::test]
async fn slices_are_installed_once() {
    if outside!() {
        return;
    }
    let app = app("slices").await;
    slices::install(&app.systemd, app.files).await.unwrap();
    let tree = app.tree(&[]);
    let name = app
        .serve(
            &tree,
            None,
            &[],
            serde_json::json!({"name": "web", "command": ["sleep", "1000"]}),
        )
        .await;
    slices::install(&app.systemd, app.files).await.unwrap();
    let slice = app
        .systemd
        .get_unit_state("kari-apps.slice")
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (slice.fragment_path.as_str(), slice.need_daemon_reload),
        ("/etc/systemd/system/kari-apps.slice", false)
    );
    app.systemd.stop_unit(&name, LIMIT).await.unwrap();
}

/// Each line is what a service could do that the default jail does not let it.
const EXCEED: &str = r#"
try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "$name"; fi; }
try low-port perl -MIO::Socket::INET -e 'IO::Socket::INET->new(LocalAddr => "127.0.0.1:81", Listen => 1) or exit 1'
try other-path touch /srv/kari-test/x
try packet perl -MSocket -e 'socket(S, 17, SOCK_RAW, 0) or exit 1'
try inet6 perl -MSocket -e 'socket(S, AF_INET6, SOCK_STREAM, 0) or exit 1'
try nice perl -e 'setpriority(0, 0, -5) or exit 1'
try unix perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0) or exit 1'
try inet perl -MSocket -e 'socket(S, AF_INET, SOCK_STREAM, 0) or exit 1'
try netlink perl -MSocket -e 'socket(S, 16, SOCK_RAW, 0) or exit 1'
try admin perl -MSocket -e 'socket(S, AF_INET, SOCK_DGRAM, 0) and setsockopt(S, SOL_SOCKET, 33, 1 << 20) or exit 1'
try lock perl -e '$memory = "x" x (64 << 20); exit(syscall($ENV{MLOCK}, $memory, 64 << 20) == -1)'
try writable-code perl -e 'exit(syscall($ENV{MMAP}, 0, 4096, 7, 34, -1, 0) == -1)'
"#;

#[tokio::test]
async fn each_exception_of_a_sandbox_gives_or_takes_what_it_names() {
    if outside!() {
        return;
    }
    let app = app("sandbox").await;
    let tree = app.tree(&[]);
    fs::create_dir_all("/srv/kari-test").unwrap();
    fs::set_permissions("/srv/kari-test", fs::Permissions::from_mode(0o777)).unwrap();
    // mmap(2) and mlock(2) on x86-64, and on the architectures with the common numbers.
    let (mmap, mlock) = if cfg!(target_arch = "x86_64") {
        ("9", "149")
    } else {
        ("222", "228")
    };
    let env = [EnvVar::plain("MMAP", mmap), EnvVar::plain("MLOCK", mlock)];
    let script = format!(
        "{{ {EXCEED} }} >$STATE_DIRECTORY/tmp; mv $STATE_DIRECTORY/tmp $STATE_DIRECTORY/found; exec sleep 1000"
    );
    for (name, sandbox, able) in [
        (
            "default",
            serde_json::json!({}),
            &["inet6", "unix", "inet", "netlink", "writable-code"][..],
        ),
        (
            "port",
            serde_json::json!({"capabilities": ["CAP_NET_BIND_SERVICE"]}),
            &[
                "low-port",
                "inet6",
                "unix",
                "inet",
                "netlink",
                "writable-code",
            ],
        ),
        (
            "path",
            serde_json::json!({"writablePaths": ["/srv/kari-test"]}),
            &[
                "other-path",
                "inet6",
                "unix",
                "inet",
                "netlink",
                "writable-code",
            ],
        ),
        (
            "packet",
            serde_json::json!({"capabilities": ["CAP_NET_RAW"], "addressFamilies": ["AF_INET", "AF_PACKET"]}),
            &["packet", "inet", "writable-code"],
        ),
        (
            "families",
            serde_json::json!({"addressFamilies": ["AF_INET"]}),
            &["inet", "writable-code"],
        ),
        (
            "inet6",
            serde_json::json!({"addressFamilies": ["AF_INET6"]}),
            &["inet6", "writable-code"],
        ),
        (
            "unix",
            serde_json::json!({"addressFamilies": ["AF_UNIX"]}),
            &["unix", "writable-code"],
        ),
        (
            "netlink",
            serde_json::json!({"addressFamilies": ["AF_NETLINK"]}),
            &["netlink", "writable-code"],
        ),
        (
            "admin",
            serde_json::json!({"capabilities": ["CAP_NET_ADMIN"]}),
            &["inet6", "unix", "inet", "netlink", "admin", "writable-code"],
        ),
        (
            "lock",
            serde_json::json!({"capabilities": ["CAP_IPC_LOCK"]}),
            &["inet6", "unix", "inet", "netlink", "lock", "writable-code"],
        ),
        (
            "nice",
            serde_json::json!({"capabilities": ["CAP_SYS_NICE"]}),
            &["inet6", "nice", "unix", "inet", "netlink", "writable-code"],
        ),
        (
            "jit",
            serde_json::json!({"deny": ["JIT"]}),
            &["inet6", "unix", "inet", "netlink"],
        ),
    ] {
        let process = serde_json::json!({"name": name, "stateDirectory": true, "sandbox": sandbox,
            "command": ["/bin/sh", "-c", script.replace('$', "$$")]});
        let unit = app.serve(&tree, None, &env, process).await;
        let found = file(&app.folder.path().join("state").join(name).join("found")).await;
        assert_eq!(
            String::from_utf8(found)
                .unwrap()
                .lines()
                .collect::<Vec<_>>(),
            able,
            "{name}"
        );
        app.systemd.stop_unit(&unit, LIMIT).await.unwrap();
    }
}

#[tokio::test]
async fn a_target_starts_the_services_that_it_names_without_a_reload() {
    if outside!() {
        return;
    }
    let app = app("target").await;
    let tree = app.tree(&[]);
    let process = |name: &str| serde_json::json!({"name": name, "command": ["sleep", "1000"]});
    let mut units = vec![];
    for name in ["web", "worker"] {
        let unit = app.serve(&tree, None, &[], process(name)).await;
        app.systemd.stop_unit(&unit, LIMIT).await.unwrap();
        units.push(unit);
    }
    let target = unit::target_name(&app.name);
    app.files
        .write(&target, &unit::target_text(&app.name, &units))
        .unwrap();
    app.files.enable(&target).unwrap();
    app.systemd.start_unit(&target).await.unwrap();
    for unit in &units {
        app.wait(unit, |state| state.active_state == ActiveState::Active)
            .await;
    }
    let enabled = Command::new("systemctl")
        .args(["is-enabled", &target])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&enabled.stdout), "enabled\n");
    for unit in units.iter().chain([&target]) {
        app.systemd.stop_unit(unit, LIMIT).await.unwrap();
    }
}

#[tokio::test]
async fn a_crash_loop_is_counted_and_its_program_that_is_missing_is_told() {
    if outside!() {
        return;
    }
    let app = app("crash").await;
    let tree = app.tree(&[]);
    let crash = app
        .serve(
            &tree,
            None,
            &[],
            serde_json::json!({"name": "web", "command": ["sh", "-c", "exit 7"]}),
        )
        .await;
    let missing = app
        .serve(
            &tree,
            None,
            &[],
            serde_json::json!({"name": "gone", "command": ["no-such-program"]}),
        )
        .await;
    let state = app
        .wait(&crash, |state| {
            state.n_restarts >= 2 && state.exec_main_code == 1
        })
        .await;
    assert_eq!(state.exec_main_status, 7);
    let state = app.wait(&missing, |state| state.exec_main_code == 1).await;
    assert_eq!(state.exec_main_status, 127);
    for unit in [crash, missing] {
        app.systemd.stop_unit(&unit, LIMIT).await.unwrap();
        let left = app.systemd.get_unit_state(&unit).await.unwrap();
        assert!(
            left.as_ref()
                .is_none_or(|state| state.active_state == ActiveState::Inactive),
            "{left:?}"
        );
    }
}

#[tokio::test]
async fn a_service_of_type_notify_is_active_when_it_says_so() {
    if outside!() {
        return;
    }
    let app = app("notify").await;
    let tree = app.tree(&[]);
    // Waits for a file, says READY=1, stays.
    let script = r#"
        wait_for(0.05) until -e "$ENV{STATE_DIRECTORY}/go";
        socket(S, AF_UNIX, SOCK_DGRAM, 0) and defined send(S, "READY=1", 0, sockaddr_un($ENV{NOTIFY_SOCKET} =~ s/^@/\0/r)) or die $!;
        wait_for(1000);
        sub wait_for { select(undef, undef, undef, $_[0]) }
    "#;
    let process = serde_json::json!({"name": "web", "type": "Notify", "stateDirectory": true,
        "command": ["perl", "-MSocket", "-e", script.replace('$', "$$")]});
    let name = app.serve(&tree, None, &[], process).await;
    let state = app.wait(&name, |state| state.main_pid > 0).await;
    assert_eq!(state.active_state, ActiveState::Activating);
    fs::write(app.folder.path().join("state/web/go"), "").unwrap();
    app.wait(&name, |state| state.active_state == ActiveState::Active)
        .await;
    app.systemd.stop_unit(&name, LIMIT).await.unwrap();
}

#[tokio::test]
async fn a_reboot_without_an_agent_comes_up_serving() {
    const TEST: &str = "a_reboot_without_an_agent_comes_up_serving";
    let target = "kari.test.reboot.target";
    match std::env::var(IN_NODE).as_deref() {
        Ok("before") => {
            let app = app("reboot").await;
            let tree = app.tree(&[("serve", "#!/bin/sh\nexec sleep 1000\n")]);
            let process = |name: &str| serde_json::json!({"name": name, "command": ["./serve"], "stateDirectory": true});
            let committed = app.serve(&tree, None, &[], process("web")).await;
            // Runs, and was never committed.
            app.serve(&tree, None, &[], process("attempt")).await;
            app.files
                .write(target, &unit::target_text(&app.name, &[committed]))
                .unwrap();
            app.files.enable(target).unwrap();
        }
        Ok("after") => {
            let (systemd, _events) = systemd().await;
            let app = App {
                systemd,
                ..app("reboot").await
            };
            let text = app.files.read(target).unwrap().unwrap();
            let committed = &unit::target_units(&text)[0];
            let state = app
                .wait(committed, |state| state.active_state == ActiveState::Active)
                .await;
            assert!(state.main_pid > 0 && !state.need_daemon_reload, "{state:?}");
            let patterns = unit::app_patterns(&app.name);
            let running = app
                .systemd
                .list_units(&patterns.each_ref().map(String::as_str))
                .await
                .unwrap();
            let names: Vec<_> = running.iter().map(|unit| unit.name.as_str()).collect();
            assert_eq!(
                names.len(),
                2,
                "the target and what it names, and nothing else: {names:?}"
            );
            app.files.disable(target).unwrap();
            app.systemd.stop_unit(committed, LIMIT).await.unwrap();
        }
        Ok(phase) => panic!("{phase:?} is no phase of this test"),
        Err(_) => {
            let testbed = TESTBED.get_or_init(node_with_this_program).await;
            let _turn = TURN.lock().await;
            run_once(testbed, TEST, "before").await;
            testbed.node("n1").unwrap().reboot().await.unwrap();
            run_once(testbed, TEST, "after").await;
        }
    }
}
