//! What is deleted leaves nothing behind.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use kube::api::{DeleteParams, PropagationPolicy};
use serde_json::json;
use support::{LIMIT, Space, app, folder, until};

const NODE: &str = "n1";

/// All of a node that an app might leave something in, a line for each thing; logs and the journal left out,
/// and the folders that the node only shares with the machine.
const SNAPSHOT: &str = r#"
find /etc /var /opt /srv /run /tmp /dev \( -path /run/systemd/journal -o -path /var/log -o -path /run/log -o -path /var/lib/apt -o -path /var/cache -o -path "/var/tmp/kari-testbed-*" -o -path /var/lib/kari-testbed \) -prune -o -printf '%p %y %m %U:%G %l\n' 2>/dev/null | grep -v '/var/lib/kari/proxy/.*\.log'
systemctl list-units --all --plain --no-legend | awk '{print $1, $2, $3, $4}'
getent passwd; getent group
ss -Hlntux | awk '{print $1, $5}'
awk '{print $5, $9}' /proc/self/mountinfo
find /sys/fs/cgroup -type d
"#;

async fn snapshot(space: &Space) -> Vec<String> {
    let text = space.on(NODE, &["sh", "-c", SNAPSHOT]).await;
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines.dedup();
    lines
}

fn difference(before: &[String], after: &[String]) -> String {
    let gone = before
        .iter()
        .filter(|line| after.binary_search(line).is_err())
        .map(|line| format!("- {line}\n"));
    let new = after
        .iter()
        .filter(|line| before.binary_search(line).is_err())
        .map(|line| format!("+ {line}\n"));
    gone.chain(new).collect()
}

#[tokio::test]
async fn a_deleted_deployment_leaves_the_host_as_it_was() {
    let space = Space::new(support::testbed(1).await, "removal").await;
    // The agent's own first fetch and user make what it keeps: nothing.
    let before = snapshot(&space).await;
    for policy in [PropagationPolicy::Background, PropagationPolicy::Foreground] {
        let files = folder(&app::files("one"));
        let repository = space.push("shop", files.path());
        let mut manifest = app::with_build(
            app::manifest("shop", &repository.url, "removal.example.com"),
            "mkdir -p made; echo x > made/file; mkfifo pipe",
        );
        manifest["spec"]["processes"][0]["stateDirectory"] = json!(true);
        let worker = json!({"name": "worker", "command": ["sleep", "1000"]});
        manifest["spec"]["processes"]
            .as_array_mut()
            .expect("processes")
            .push(worker);
        space.apply(&manifest).await;
        space.ready_at("shop", &repository.commit).await;
        assert_ne!(
            difference(&before, &snapshot(&space).await),
            "",
            "the snapshot does not see an app"
        );
        let parameters = DeleteParams {
            propagation_policy: Some(policy.clone()),
            ..DeleteParams::default()
        };
        space
            .deployments()
            .delete("shop", &parameters)
            .await
            .expect("deleted");
        until(
            &format!("{policy:?}: the Deployment and its Releases are gone"),
            LIMIT,
            || async {
                let deployments = space
                    .deployments()
                    .list(&Default::default())
                    .await
                    .map_err(|e| e.to_string())?
                    .items
                    .len();
                let releases = space
                    .releases()
                    .list(&Default::default())
                    .await
                    .map_err(|e| e.to_string())?
                    .items;
                if deployments == 0 && releases.is_empty() {
                    Ok(())
                } else {
                    Err(support::text_of(&releases))
                }
            },
        )
        .await;
        until(
            &format!("{policy:?}: the host is as it was"),
            LIMIT,
            || async {
                let difference = difference(&before, &snapshot(&space).await);
                if difference.is_empty() {
                    Ok(())
                } else {
                    Err(difference)
                }
            },
        )
        .await;
    }
}
