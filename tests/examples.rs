//! What people copy works: every example with the manifest beside it, and every
//! block of the cookbook as it stands there.
//!
//! The node is in the machine's own network, as one example fetches packages.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::{Space, is, testbed_of, traffic};
use testbed::{Network, Options, Testbed};

/// Where manifests and cookbook say that repositories are.
const GIT_SERVER: &str = "https://git.example.com/";

/// A repository as the manifests name it, and its folder of `examples/`; `.` is all of them in one.
const REPOSITORIES: [(&str, &str); 9] = [
    ("hello-c", "c"),
    ("hello-go", "go"),
    ("hello-node", "node"),
    ("hello-python", "python"),
    ("hello-rust", "rust"),
    ("reports", "worker"),
    ("notes", "stateful"),
    ("feed", "packages"),
    ("monorepo", "."),
];

/// A dozen applications at once on two busy cores, some of them compiled.
const ALL_LIMIT: Duration = Duration::from_secs(300);

async fn space(topic: &str) -> Space {
    let options = Options {
        network: Network::Host,
        ..Options::default()
    };
    Space::new(testbed_of(options).await, topic).await
}

#[tokio::test]
async fn all_examples_run_on_one_node_at_the_same_time_each_under_its_own_host_name() {
    let space = space("examples").await;
    let mut deployments = vec![];
    for folder in [
        "c", "go", "node", "packages", "python", "rust", "stateful", "worker",
    ] {
        let text = read(&format!("examples/{folder}/deployment.yaml"));
        deployments.extend(apply(&space, folder, &text).await);
    }
    assert_eq!(deployments.len(), 8, "{deployments:?}");
    all_ready(&space, &deployments).await;

    for (host, expected) in [
        ("c.example.com", "Hello from C"),
        ("go.example.com", "Hello from Go"),
        ("node.example.com", "Hello from Node"),
        ("python.example.com", "Hello from Python"),
        ("rust.example.com", "Hello from Rust"),
        ("feed.example.com", "a feed, built with packages"),
        ("reports.example.com", "Reports from the web half"),
        ("notes.example.com", ""),
    ] {
        answers(&space, host, "/", expected).await;
    }
}

#[tokio::test]
async fn every_block_of_the_cookbook_is_deployed_as_it_stands() {
    let space = space("cookbook").await;
    let page = read("docs/cookbook.md");
    let blocks: Vec<&str> = page
        .split("```yaml\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap_or_default())
        .collect();
    let mut deployments = vec![];
    for (number, block) in blocks.iter().enumerate() {
        let found = apply(&space, &format!("block-{number}"), block).await;
        assert!(!found.is_empty(), "a block without a Deployment:\n{block}");
        deployments.extend(found);
    }
    assert!(deployments.len() > 10, "{deployments:?}");
    all_ready(&space, &deployments).await;

    for (host, path, expected) in [
        ("website.example.com", "/", "from Node"),
        (
            "weekly.example.com",
            "/",
            "Weekly reports from the web half",
        ),
        ("notebook.example.com", "/healthz", "ok"),
        ("newsfeed.example.com", "/items/7", "item 7"),
        ("www.portal.example.com", "/", "from Python"),
    ] {
        answers(&space, host, path, expected).await;
    }
}

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// `kubectl apply` of a text whose repositories are made and named as the testbed has them; gives the names
/// of its Deployments.
async fn apply(space: &Space, name: &str, text: &str) -> Vec<String> {
    let mut text = text.to_owned();
    for (repository, folder) in REPOSITORIES {
        let url = format!("{GIT_SERVER}{repository}.git");
        if text.contains(&url) {
            let served = push(space.testbed, &space.namespace, repository, folder);
            text = text.replace(&url, &served);
        }
    }
    assert!(!text.contains(GIT_SERVER), "an unknown repository:\n{text}");
    let folder = support::folder(&[("manifest.yaml", &text)]);
    let file = folder.path().join("manifest.yaml");
    let file = file.to_str().expect("a path in UTF-8");
    let words = [
        "apply",
        "--namespace",
        &space.namespace,
        "--output",
        "name",
        "--filename",
        file,
    ];
    let printed = space
        .testbed
        .kubectl(words)
        .await
        .unwrap_or_else(|e| panic!("{name}: {e}\n{text}"));
    printed
        .lines()
        .filter_map(|line| line.strip_prefix("deployment.kari.dev/"))
        .map(str::to_owned)
        .collect()
}

/// Serves a folder of `examples/` as a repository with a branch and releases; gives its url.
fn push(testbed: &Testbed, namespace: &str, name: &str, folder: &str) -> String {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples")
        .join(folder);
    let work = tempfile::tempdir().expect("a folder");
    let tree = match folder {
        "." => work.path().join("examples"),
        _ => work.path().to_owned(),
    };
    copy(&sources, &tree);
    let git = |words: &[&str]| {
        let output = Command::new("git")
            .args([
                "-c",
                "user.name=examples",
                "-c",
                "user.email=examples@example.com",
            ])
            .args(words)
            .current_dir(work.path())
            .output()
            .expect("git");
        assert!(output.status.success(), "git {words:?}: {output:?}");
    };
    git(&["init", "--quiet", "--initial-branch=main"]);
    git(&["add", "--all", "--force"]);
    git(&["commit", "--quiet", "--message=as it is in the examples"]);
    for release in ["v1.4.1", "v1.4.2", "v2.0.0-beta.1"] {
        git(&["tag", release]);
    }
    testbed
        .mirror(&format!("{namespace}-{name}"), &work.path().join(".git"))
        .unwrap_or_else(|e| panic!("{name}: {e}"))
        .url
}

fn copy(from: &PathBuf, to: &PathBuf) {
    let status = Command::new("cp").arg("-rT").arg(from).arg(to).status();
    assert!(status.expect("cp").success(), "{}", from.display());
}

async fn all_ready(space: &Space, deployments: &[String]) {
    for name in deployments {
        space
            .deployment_until(name, "Ready", ALL_LIMIT, |d| {
                d.status
                    .as_ref()
                    .is_some_and(|s| is(&s.conditions, "Ready", "True"))
            })
            .await;
    }
}

async fn answers(space: &Space, host: &str, path: &str, expected: &str) {
    let lab = support::Lab(space.testbed);
    let answer = traffic::get_once(&lab, space.proxy("n1"), host, path).await;
    let (status, body) = answer.unwrap_or_else(|e| panic!("{host}: {e}"));
    assert_eq!(status, 200, "{host}: {body}");
    assert!(body.contains(expected), "{host}{path}: {body}");
}
