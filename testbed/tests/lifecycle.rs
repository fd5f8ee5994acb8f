//! Testbeds that come and go: each test has its own.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

mod remains;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use remains::remains;
use testbed::{
    Network, Options, Part, Testbed,
    process::{of_testbed, parse_signal},
};

fn options(directory: &Path) -> Options {
    Options {
        directory: Some(directory.to_owned()),
        kari: false,
        ..Options::default()
    }
}

#[tokio::test]
async fn two_testbeds_at_once_do_not_disturb_each_other_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let (one, two) = futures::join!(Testbed::up(options(&first)), Testbed::up(options(&second)));
    let (one, two) = (one.unwrap(), two.unwrap());
    one.kubectl(["create", "namespace", "only-here"])
        .await
        .unwrap();
    let elsewhere = two
        .kubectl(["get", "namespaces", "--output=name"])
        .await
        .unwrap();
    assert!(!elsewhere.contains("only-here"), "{elsewhere}");
    let id = one.description().id.clone();
    assert!(
        !remains(&id, &first).is_empty(),
        "nothing is found of a testbed that is up"
    );
    drop(one);
    assert_eq!(remains(&id, &first), Vec::<String>::new());
    two.node("n1")
        .unwrap()
        .output(["systemctl", "is-system-running"])
        .await
        .unwrap();
    two.kubectl(["get", "nodes"]).await.unwrap();
}

#[tokio::test]
async fn the_control_plane_comes_back_with_all_it_knew() {
    let folder = tempfile::tempdir().unwrap();
    let testbed = Testbed::up(options(&folder.path().join("testbed")))
        .await
        .unwrap();
    testbed
        .kubectl(["create", "configmap", "kept"])
        .await
        .unwrap();
    let kill = parse_signal("KILL").unwrap();
    for part in [Part::Apiserver, Part::Etcd] {
        testbed.kill(part, kill).await.unwrap();
    }
    assert!(
        testbed
            .kubectl(["get", "configmap", "kept", "--request-timeout=1s"])
            .await
            .is_err()
    );
    for part in [Part::Etcd, Part::Apiserver] {
        testbed.start(part).await.unwrap();
    }
    testbed.kubectl(["get", "configmap", "kept"]).await.unwrap();
    let twice = testbed.start(Part::Etcd).await.unwrap_err();
    assert_eq!(twice.to_string(), "etcd is running already");
    let absent = testbed.start(Part::Scheduler).await.unwrap_err();
    assert_eq!(
        absent.to_string(),
        "scheduler is there only where nodes have a kubelet: `testbed up --kubelet`"
    );
}

#[tokio::test]
async fn a_second_up_is_refused_and_a_dead_testbed_gives_way() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("testbed");
    let first = Testbed::up_and_keep(options(&path)).await.unwrap();
    let id = first.description().id.clone();
    let refused = Testbed::up_and_keep(options(&path))
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(refused.contains("testbed down"), "{refused}");
    let all = of_testbed(&id);
    for process in &all {
        process.signal(parse_signal("KILL").unwrap()).unwrap();
    }
    for process in all {
        assert!(process.wait_end(std::time::Duration::from_secs(10)));
    }
    let second = Testbed::up(options(&path)).await.unwrap();
    assert_ne!(second.description().id, id);
    drop(second);
    assert_eq!(remains(&id, &path), Vec::<String>::new());
}

#[tokio::test]
async fn a_testbed_goes_down_when_the_process_that_needs_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("testbed");
    let testbed = Testbed::up_and_keep(options(&path)).await.unwrap();
    // The reaper sees no more of that process than its end of the pipe.
    let mut reaper = Command::new(env!("CARGO_BIN_EXE_testbed"))
        .args(["__reap", "--dir"])
        .arg(&path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(path.exists());
    drop(reaper.stdin.take());
    assert!(reaper.wait().unwrap().success());
    assert_eq!(
        remains(&testbed.description().id, &path),
        Vec::<String>::new()
    );
}

#[tokio::test]
async fn a_folder_with_other_files_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("letter"), "dear").unwrap();
    let refused = Testbed::up_and_keep(options(folder.path()))
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(refused.contains("holds other files"), "{refused}");
    Testbed::down(folder.path()).unwrap();
    assert_eq!(
        fs::read_to_string(folder.path().join("letter")).unwrap(),
        "dear"
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_node_of_the_host_network_shares_the_machines() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("testbed");
    let host = Options {
        network: Network::Host,
        ..options(&path)
    };
    let too_many = Testbed::up_and_keep(Options {
        nodes: 2,
        ..host.clone()
    })
    .await
    .err()
    .unwrap();
    assert!(too_many.to_string().contains("--nodes 1"), "{too_many}");
    let testbed = Testbed::up(host).await.unwrap();
    let node = testbed.node("n1").unwrap();
    let inside = node
        .output(["readlink", "/proc/self/ns/net"])
        .await
        .unwrap();
    let machine = fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(Path::new(&inside), machine);
    assert_eq!(
        node.output(["cat", "/etc/resolv.conf"]).await.unwrap(),
        fs::read_to_string("/etc/resolv.conf").unwrap().trim_end()
    );
    testbed.kubectl(["get", "nodes"]).await.unwrap();
}

#[tokio::test]
async fn a_kubelet_is_refused_on_the_machines_own_network() {
    let folder = tempfile::tempdir().unwrap();
    let on_the_machine = Options {
        network: Network::Host,
        kubelet: true,
        ..options(&folder.path().join("testbed"))
    };
    let refused = Testbed::up(on_the_machine).await.err().unwrap().to_string();
    assert_eq!(
        refused,
        "a kubelet would change the machine's own network: use --network lab"
    );
}
