//! What a testbed offers while it is up, on one testbed for all tests here.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

use std::{fs, path::Path, process::Command};

use testbed::{Options, Part, Testbed};
use tokio::sync::OnceCell;

/// Taken down by its reaper when this program ends.
static TESTBED: OnceCell<Testbed> = OnceCell::const_new();

async fn testbed() -> &'static Testbed {
    let options = Options {
        nodes: 3,
        kari: false,
        ..Options::default()
    };
    TESTBED
        .get_or_init(async || Testbed::up(options).await.expect("a testbed"))
        .await
}

/// Writes a service that a target wants which multi-user.target wants, as an app of Kari's.
const APP: &str = r"
printf '[Service]\nExecStart=/bin/sleep infinity\n' >/etc/systemd/system/app.service
printf '[Unit]\nWants=app.service\n' >/etc/systemd/system/app.target
mkdir -p /etc/systemd/system/multi-user.target.wants
ln -sf ../app.target /etc/systemd/system/multi-user.target.wants/app.target
";

#[tokio::test]
async fn nodes_and_pods_are_ready_when_up_returns() {
    let testbed = testbed().await;
    let ready = testbed
        .kubectl([
            "wait",
            "--for=condition=Ready",
            "nodes",
            "--all",
            "--timeout=1s",
        ])
        .await
        .unwrap();
    assert_eq!(ready.lines().count(), 3, "{ready}");
    let pods = testbed
        .kubectl(["get", "pods", "--namespace=kari-system", "--no-headers"])
        .await
        .unwrap();
    assert_eq!(pods.matches("1/1").count(), 4, "{pods}");
}

#[tokio::test]
async fn status_tells_the_process_of_each_part() {
    let statuses = testbed().await.status().await.unwrap();
    for status in &statuses {
        let stays = !["node/n1", "node/n2"].contains(&status.part.as_str()); // other tests reboot these
        // A test here lets a unit fail, so a node may call itself degraded.
        assert!(
            !stays || ["running", "degraded"].contains(&status.state.as_str()),
            "{status:?}"
        );
        assert!(status.log.exists(), "{status:?}");
    }
    assert_eq!(statuses.len(), 9, "{statuses:?}");
}

#[tokio::test]
async fn a_command_runs_in_the_namespaces_of_its_node() {
    let node = testbed().await.node("n3").unwrap();
    assert_eq!(node.output(["hostname"]).await.unwrap(), "n3");
    assert_eq!(
        node.output(["cat", "/proc/1/comm"]).await.unwrap(),
        "systemd"
    );
    let addresses = node.output(["ip", "-brief", "address"]).await.unwrap();
    assert!(addresses.contains("10.77.0.103"), "{addresses}");
    let failed = node.exec(["sh", "-c", "exit 3"]).await.unwrap();
    assert_eq!(failed.status.code(), Some(3));
}

#[tokio::test]
async fn there_is_no_way_out_of_the_lab() {
    let node = testbed().await.node("n3").unwrap();
    let route = node
        .exec(["ip", "route", "get", "192.0.2.1"])
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&route.stderr).into_owned();
    assert!(said.contains("unreachable"), "{said}");
}

#[tokio::test]
async fn an_enabled_target_starts_at_boot_and_the_boot_is_another() {
    let node = testbed().await.node("n1").unwrap();
    let boot_id = || node.output(["cat", "/proc/sys/kernel/random/boot_id"]);
    let machine_id = || node.output(["cat", "/etc/machine-id"]);
    let before = (boot_id().await.unwrap(), machine_id().await.unwrap());
    node.output(["sh", "-c", APP]).await.unwrap();
    node.reboot().await.unwrap();
    let state = node
        .output(["systemctl", "is-active", "app.service"])
        .await
        .unwrap();
    assert_eq!(state, "active");
    assert_ne!(boot_id().await.unwrap(), before.0);
    assert_eq!(machine_id().await.unwrap(), before.1);
    let failed = node
        .output(["systemctl", "--failed", "--no-legend"])
        .await
        .unwrap();
    assert_eq!(failed, "");
}

#[tokio::test]
async fn files_outlive_a_power_cut() {
    let node = testbed().await.node("n2").unwrap();
    node.output([
        "sh",
        "-c",
        "echo kept >/var/lib/kari/file; echo kept >/etc/file; sync",
    ])
    .await
    .unwrap();
    node.power_off().await.unwrap();
    let refused = node.output(["true"]).await.unwrap_err().to_string();
    assert!(refused.contains("testbed start node/n2"), "{refused}");
    node.power_on().await.unwrap();
    let kept = node
        .output(["cat", "/var/lib/kari/file", "/etc/file"])
        .await
        .unwrap();
    assert_eq!(kept, "kept\nkept");
}

#[tokio::test]
async fn the_gateway_is_the_same_whichever_nodes_come_and_go() {
    let node = testbed().await.node("n3").unwrap();
    let script = "exec 3<>/dev/tcp/10.77.0.1/6443 && ip neigh show 10.77.0.1";
    let neighbour = node.output(["bash", "-c", script]).await.unwrap();
    assert!(neighbour.contains("02:00:0a:4d:00:01"), "{neighbour}");
}

#[tokio::test]
async fn a_commit_and_the_next_are_cloned_from_inside_a_node() {
    let testbed = testbed().await;
    let node = testbed.node("n3").unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "one").unwrap();
    let first = testbed
        .git_repository("app", folder.path(), "first")
        .unwrap();
    fs::write(folder.path().join("file"), "two").unwrap();
    let second = testbed
        .git_repository("app", folder.path(), "second")
        .unwrap();
    assert_ne!(first.commit, second.commit);
    assert_eq!(
        testbed
            .git_repository("app", folder.path(), "same")
            .unwrap(),
        second
    );
    node.output(["git", "clone", "--quiet", &first.url, "/root/app"])
        .await
        .unwrap();
    let log = node
        .output(["git", "-C", "/root/app", "log", "--format=%H %s"])
        .await
        .unwrap();
    assert_eq!(
        log,
        format!("{} second\n{} first", second.commit, first.commit)
    );
    let script = format!(
        "git init --quiet /root/shallow && cd /root/shallow && git fetch --quiet --depth=1 {} {} && git show FETCH_HEAD:file",
        first.url, first.commit
    );
    assert_eq!(node.output(["sh", "-c", &script]).await.unwrap(), "one");
}

#[tokio::test]
async fn a_bare_repository_is_served_with_all_its_references() {
    let testbed = testbed().await;
    let folder = tempfile::tempdir().unwrap();
    let script = "git init --quiet --initial-branch=trunk work && cd work && git -c user.name=a -c user.email=a@b.c commit --quiet --allow-empty -m one && git tag v1 && cd .. && git clone --quiet --bare work bare.git";
    let made = Command::new("sh")
        .args(["-c", script])
        .current_dir(folder.path())
        .status()
        .unwrap();
    assert!(made.success());
    let repository = testbed
        .mirror("third-party", &folder.path().join("bare.git"))
        .unwrap();
    let references = testbed
        .node("n3")
        .unwrap()
        .output(["git", "ls-remote", "--symref", &repository.url])
        .await
        .unwrap();
    for expected in [
        "ref: refs/heads/trunk\tHEAD",
        "refs/tags/v1",
        &repository.commit,
    ] {
        assert!(references.contains(expected), "{references}");
    }
}

#[tokio::test]
async fn limits_of_a_unit_are_enforced() {
    let node = testbed().await.node("n3").unwrap();
    let memory = [
        "systemd-run",
        "--wait",
        "--quiet",
        "-p",
        "MemoryMax=32M",
        "-p",
        "MemorySwapMax=0",
        "sh",
        "-c",
        "head -c 100M /dev/zero | tail",
    ];
    let killed = node.exec(memory).await.unwrap();
    assert!(!killed.status.success());
    let tasks = [
        "systemd-run",
        "--wait",
        "--quiet",
        "-p",
        "TasksMax=2",
        "sh",
        "-c",
        "sleep 0 | sleep 0 | sleep 0 | sleep 0",
    ];
    let refused = node.exec(tasks).await.unwrap();
    assert!(!refused.status.success());
}

#[tokio::test]
async fn the_folder_of_kari_is_one_real_file_system() {
    let node = testbed().await.node("n3").unwrap();
    let script = "set -e; cd /var/lib/kari; mkdir -p one two; echo x >one/file; chown 50001:50001 one/file; \
        ln one/file two/link; mv one two/one; test two/one/file -ef two/link; chown -h 0:0 two/link; sync -f .; \
        printf '#!/bin/sh\necho ran\n' >run; chmod +x run; ./run; stat -f -c %T .";
    let printed = node.output(["sh", "-c", script]).await.unwrap();
    let (ran, kind) = printed.split_once('\n').unwrap();
    assert_eq!(ran, "ran");
    assert_ne!(kind, "overlayfs");
}

#[tokio::test]
async fn a_user_of_userdb_has_a_name_and_runs_a_unit() {
    let node = testbed().await.node("n3").unwrap();
    let script = r#"
mkdir -p /etc/userdb
echo '{"userName":"kari-50001","uid":50001,"gid":50001,"disposition":"system"}' >/etc/userdb/kari-50001.user
echo '{"groupName":"kari-50001","gid":50001,"disposition":"system"}' >/etc/userdb/kari-50001.group
ln -sf kari-50001.user /etc/userdb/50001.user
ln -sf kari-50001.group /etc/userdb/50001.group
getent passwd 50001 | cut -d: -f1
systemd-run --wait --quiet --pipe -p User=kari-50001 id -un"#;
    assert_eq!(
        node.output(["sh", "-c", script]).await.unwrap(),
        "kari-50001\nkari-50001"
    );
}

#[tokio::test]
async fn toolchains_work_where_home_folders_are_hidden() {
    let node = testbed().await.node("n3").unwrap();
    let found = testbed::toolchains::find();
    assert!(
        !found.is_empty(),
        "this machine built these tests, so it has Rust somewhere"
    );
    let path = testbed::toolchains::tool_path(&found);
    let mut seen = 0;
    for (toolchain, program, argument) in [
        ("rust", "cargo", "--version"),
        ("go", "go", "version"),
        ("python", "python3", "-m pip --version"),
        ("node", "npm", "--version"),
    ] {
        let target = Path::new(testbed::toolchains::FOLDER).join(toolchain);
        if !found.iter().any(|toolchain| toolchain.target() == target) {
            continue;
        }
        seen += 1;
        let script = format!("export PATH={path}; {program} {argument} >&2; command -v {program}");
        let found = node
            .output([
                "systemd-run",
                "--wait",
                "--quiet",
                "--pipe",
                "-p",
                "DynamicUser=yes",
                "-p",
                "ProtectHome=tmpfs",
                "-p",
                "ProtectSystem=strict",
                "sh",
                "-c",
                &script,
            ])
            .await
            .unwrap();
        assert!(Path::new(&found).starts_with(target), "{found}");
    }
    assert_eq!(seen, found.len());
}

#[tokio::test]
async fn an_agent_may_write_its_own_lease_and_no_other() {
    let testbed = testbed().await;
    let node = testbed.node("n3").unwrap();
    let kubectl = fs::canonicalize(testbed.directory().join("bin/kubectl")).unwrap();
    let create = |name: &str, holder: &str| {
        let lease = format!(
            "apiVersion: coordination.k8s.io/v1\nkind: Lease\nmetadata: {{name: {name}, namespace: kari-system}}\nspec: {{holderIdentity: {holder}}}\n"
        );
        // The program itself, by the name of the link to it: that one is hidden by the node's /tmp.
        let script = format!(
            "printf '{}' | exec -a kubectl {} create --kubeconfig=/run/kari-testbed/kubeconfig --filename=- 2>&1",
            lease.replace('\n', "\\n"),
            kubectl.display()
        );
        let node = &node;
        async move { node.exec(["bash", "-c", &script]).await.unwrap() }
    };
    let other = create("kari-agent-n1", "n1").await;
    let said = String::from_utf8_lossy(&other.stdout).into_owned();
    assert!(
        said.contains("an agent may write only its own Lease, kari-agent-n3"),
        "{said}"
    );
    let own = create("kari-agent-n3", "n3").await;
    assert!(
        own.status.success(),
        "{}",
        String::from_utf8_lossy(&own.stdout)
    );
}

#[tokio::test]
async fn a_port_of_a_node_is_reached_from_the_machine_and_from_the_lab() {
    let testbed = testbed().await;
    let node = testbed.node("n3").unwrap();
    let site = "mkdir -p /srv/site && echo hello >/srv/site/index.html && cd /srv/site && \
        systemd-run --quiet --working-directory=/srv/site /usr/bin/python3 -m http.server 80 && \
        until curl --silent --fail --output /dev/null http://127.0.0.1/; do :; done";
    node.output(["sh", "-c", site]).await.unwrap();
    let fetch = |mut curl: Command, address: String| {
        let output = curl
            .args([
                "--silent",
                "--show-error",
                "--max-time",
                "10",
                &format!("http://{address}/"),
            ])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let near = node.forwarded_http().unwrap().to_string();
    assert_eq!(fetch(Command::new("curl"), near), "hello\n");
    assert_eq!(
        fetch(testbed.lab_command("curl").unwrap(), node.ip().to_string()),
        "hello\n"
    );
    let address = testbed.description().node_http(node.name());
    assert!(testbed.lab_connect(address).await.is_ok());
}

#[tokio::test]
async fn a_part_that_does_not_exist_is_named_in_the_error() {
    let testbed = testbed().await;
    let error = testbed
        .logs(Part::Agent("n9".parse().unwrap()))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no node n9: this testbed has n1 to n3"
    );
}
