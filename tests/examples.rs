//! The examples are what they say: all of them run side by side on one node, each under its own host name.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use std::path::Path;

use serde_json::Value;
use support::{DEPLOY_LIMIT, Space, is};

const NODE: &str = "n1";

/// The example's language, and what its page says in its first words.
const EXAMPLES: [(&str, &str); 3] = [
    ("go", "Hello from Go"),
    ("node", "Hello from Node"),
    ("python", "Hello from Python"),
];

#[tokio::test]
async fn all_examples_run_on_one_node_at_the_same_time_each_under_its_own_host_name() {
    let space = Space::new(support::testbed(1).await, "examples").await;
    for (language, _) in EXAMPLES {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("examples")
            .join(language);
        let repository = space.push(language, &folder);
        let text = std::fs::read_to_string(folder.join("deployment.yaml")).expect("a manifest");
        let mut manifest: Value = serde_saphyr::from_str(&text).expect("YAML");
        manifest["spec"]["source"]["git"]["url"] = repository.url.into();
        space.apply(&manifest).await;
    }
    for (language, _) in EXAMPLES {
        let name = format!("hello-{language}");
        space
            .deployment_until(&name, "Ready", DEPLOY_LIMIT, |d| {
                d.status
                    .as_ref()
                    .is_some_and(|s| is(&s.conditions, "Ready", "True"))
            })
            .await;
    }
    for (language, greeting) in EXAMPLES {
        let answer = space.get(NODE, &format!("{language}.example.com")).await;
        let (status, body) = answer.unwrap_or_else(|e| panic!("{language}: {e}"));
        assert_eq!(status, 200, "{language}: {body}");
        assert!(body.contains(greeting), "{language}: {body}");
    }
}
