//! A testbed whose nodes have a kubelet, a container runtime and kube-proxy.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

mod remains;

use remains::remains;
use testbed::{Options, Part, Testbed, process::parse_signal};

#[tokio::test]
async fn a_node_with_a_kubelet_runs_kari_as_pods_and_comes_back_after_a_power_cut() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("testbed");
    let testbed = Testbed::up(Options {
        kubelet: true,
        directory: Some(path.clone()),
        ..Options::default()
    })
    .await
    .unwrap();
    let id = testbed.description().id.clone();
    let agents = "--selector=app.kubernetes.io/component=agent";
    let agent = ["-n", "kari-system", "ds/kari-agent"];

    let logs = testbed
        .kubectl([&["logs"], &agent[..]].concat())
        .await
        .unwrap();
    assert!(logs.contains("the agent is up"), "{logs}");
    let name = "kubernetes.default.svc.cluster.local";
    let words = [&["exec"], &agent[..], &["--", "getent", "hosts", name]].concat();
    let resolved = testbed.kubectl(&words).await.unwrap();
    assert!(resolved.starts_with("10.96.0.1 "), "{resolved:?}");

    // What is killed stays away until it is started, and its log is there.
    let agent_part: Part = "agent/n1".parse().unwrap();
    for part in [Part::Controller, agent_part] {
        let kill = parse_signal("KILL").unwrap();
        testbed.kill(part, kill).await.unwrap();
    }
    let again = testbed
        .kill(agent_part, parse_signal("KILL").unwrap())
        .await;
    assert_eq!(again.unwrap_err().to_string(), "agent/n1 is not running");
    testbed.start(Part::Controller).await.unwrap();
    testbed.start(agent_part).await.unwrap();
    let logs = testbed.logs(agent_part).unwrap();
    assert_eq!(logs.matches("the agent is up").count(), 2, "{logs}");
    let logs = testbed.logs(Part::Controller).unwrap();
    assert_eq!(logs.matches("standing by").count(), 3, "{logs}");

    testbed
        .kill(Part::Dns, parse_signal("KILL").unwrap())
        .await
        .unwrap();
    testbed.start(Part::Dns).await.unwrap();
    assert_eq!(testbed.kubectl(&words).await.unwrap(), resolved);

    let node = testbed.node("n1").unwrap();
    node.power_off().await.unwrap();
    node.power_on().await.unwrap();
    // The Pod says that it is ready from before, until its kubelet is back.
    let restarted = "--for=jsonpath={.status.containerStatuses[0].restartCount}=2";
    for condition in [restarted, "--for=condition=Ready"] {
        let wait = [
            "wait",
            "pod",
            "-n",
            "kari-system",
            agents,
            condition,
            "--timeout=60s",
        ];
        testbed.kubectl(wait).await.unwrap();
    }

    drop(testbed);
    assert_eq!(remains(&id, &path), Vec::<String>::new());
}
