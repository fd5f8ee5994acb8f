//! The command, as people and scripts use it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

struct Folder(tempfile::TempDir);

impl Folder {
    fn run(&self, arguments: &[&str]) -> Output {
        let (verb, rest) = arguments.split_first().unwrap();
        Command::new(env!("CARGO_BIN_EXE_testbed"))
            .arg(verb)
            .arg("--dir")
            .arg(self.0.path().join("testbed"))
            .args(rest)
            .output()
            .unwrap()
    }

    fn text(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.run(&["down"]);
    }
}

#[test]
fn a_session_from_up_to_down() {
    let folder = Folder(tempfile::tempdir().unwrap());
    let missing = folder.run(&["status"]);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("`testbed up`"));

    let printed = folder.text(&["up", "--no-kari"]);
    let kubeconfig = printed
        .strip_prefix("export KUBECONFIG=")
        .unwrap()
        .trim_end();
    assert_eq!(printed.lines().count(), 1);
    let kubectl = folder.0.path().join("testbed/bin/kubectl");
    let nodes = Command::new(kubectl)
        .args(["get", "nodes"])
        .env("KUBECONFIG", kubeconfig)
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&nodes.stdout).contains("n1"),
        "{nodes:?}"
    );

    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("file"), "one").unwrap();
    let pushed = folder.text(&[
        "git",
        "app",
        source.path().to_str().unwrap(),
        "--message",
        "first",
    ]);
    let lines: Vec<&str> = pushed.lines().collect();
    assert_eq!(lines[0], "http://10.77.0.1:8000/app.git");
    assert_eq!((lines.len(), lines[1].len()), (2, 40));

    assert_eq!(folder.text(&["exec", "n1", "--", "hostname"]), "n1\n");
    assert_eq!(
        folder
            .run(&["exec", "n1", "--", "sh", "-c", "exit 7"])
            .status
            .code(),
        Some(7)
    );

    folder.text(&["kill", "node/n1"]);
    let statuses: Vec<serde_json::Value> =
        serde_json::from_str(&folder.text(&["status", "--json"])).unwrap();
    let node = statuses
        .iter()
        .find(|status| status["part"] == "node/n1")
        .unwrap();
    assert_eq!(node["state"], "ended");
    folder.text(&["start", "node/n1"]);
    assert!(folder.text(&["status"]).contains("node/n1"));
    assert!(folder.text(&["logs", "node/n1"]).contains("systemd"));
    assert!(folder.text(&["logs", "apiserver"]).contains("v1."));

    folder.text(&["down"]);
    folder.text(&["down"]);
    assert!(!Path::new(kubeconfig).exists());
}
