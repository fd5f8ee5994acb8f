//! What is deleted leaves nothing behind.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, DeleteParams, PropagationPolicy};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;
use support::snapshot::{self, difference};
use support::{LIMIT, Space, app, folder, until};
use tokio::sync::Mutex;

const NODE: &str = "n1";

/// A snapshot is of the whole node: one test at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

async fn snapshot(space: &Space) -> Vec<String> {
    snapshot::of(space, NODE).await
}

#[tokio::test]
async fn a_deleted_deployment_leaves_the_host_as_it_was() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "removal").await;
    let before = snapshot::at_rest(&space, NODE).await;
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

/// The main process and the invocation of each service of the app, which tell a restart.
async fn processes(space: &Space) -> String {
    let pattern = format!("kari.{}.shop.*.service", space.namespace);
    let properties = "Id,MainPID,InvocationID,NRestarts";
    let shown = space
        .on(NODE, &["systemctl", "show", "-p", properties, &pattern])
        .await;
    assert!(shown.contains("MainPID"), "no service: {shown:?}");
    shown
}

async fn delete(space: &Space, policy: PropagationPolicy) {
    let parameters = DeleteParams {
        propagation_policy: Some(policy),
        ..DeleteParams::default()
    };
    space
        .deployments()
        .delete("shop", &parameters)
        .await
        .expect("deleted");
    until("the Deployment is gone", LIMIT, || async {
        match space.deployments().get_opt("shop").await {
            Ok(None) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

async fn no_release_is_left(space: &Space) {
    until("no Release is left", LIMIT, || async {
        let releases = space.releases().list(&Default::default()).await;
        match releases {
            Ok(list) if list.items.is_empty() => Ok(()),
            Ok(list) => Err(support::text_of(&list.items)),
            Err(error) => Err(error.to_string()),
        }
    })
    .await;
}

async fn held_apps_are(space: &Space, expected: &str) {
    let leases: Api<Lease> = Api::namespaced(space.client.clone(), "kari-system");
    until("the Lease counts what is held", LIMIT, || async {
        let lease = leases
            .get("kari-agent-n1")
            .await
            .map_err(|e| e.to_string())?;
        let held = lease.annotations().get("kari.dev/held-apps").cloned();
        match held.unwrap_or_default() {
            held if held == expected => Ok(()),
            held => Err(held),
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_orphaned_runs_on_and_is_taken_on_again_without_a_restart() {
    let _alone = ALONE.lock().await;
    let space = Space::new(support::testbed(1).await, "orphan").await;
    let host = "orphan.example.com";
    let app = format!("{}.shop", space.namespace);
    let before = snapshot::at_rest(&space, NODE).await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let mut manifest = app::manifest("shop", &repository.url, host);
    manifest["spec"]["processes"][0]["stateDirectory"] = json!(true);
    manifest["spec"]["deletionPolicy"] = json!("Orphan");
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    let state = format!("/var/lib/kari/apps/{app}/state/web/file");
    space.on(NODE, &["touch", &state]).await;
    let deployed = snapshot::without_logs(&space, NODE).await;
    let running = processes(&space).await;
    let release = space
        .release_until("shop", NODE, "there", LIMIT, |_| true)
        .await;

    // kubectl delete --cascade=orphan: the Release stays, and belongs to nobody.
    delete(&space, PropagationPolicy::Orphan).await;
    space
        .release_until("shop", NODE, "without an owner", LIMIT, |release| {
            release.owner_references().is_empty() && release.meta().deletion_timestamp.is_none()
        })
        .await;
    assert_eq!(
        difference(&deployed, &snapshot::without_logs(&space, NODE).await),
        ""
    );
    let adopter = space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    let adopted = space
        .release_until("shop", NODE, "the new Deployment's", LIMIT, |release| {
            let owners = release.owner_references();
            owners
                .iter()
                .any(|o| Some(&o.uid) == adopter.metadata.uid.as_ref())
        })
        .await;
    assert_eq!(adopted.spec.release_id, release.spec.release_id);
    assert_eq!(processes(&space).await, running, "restarted by an adoption");

    // deletionPolicy: Orphan: the objects go, the app stays and is held.
    for again in 0..2 {
        delete(&space, PropagationPolicy::Background).await;
        no_release_is_left(&space).await;
        assert_eq!(
            difference(&deployed, &snapshot::without_logs(&space, NODE).await),
            ""
        );
        assert_eq!(processes(&space).await, running, "restarted when left");
        assert_eq!(space.get(NODE, host).await, Ok((200, "one".into())));
        held_apps_are(&space, &app).await;
        let target = format!("/etc/systemd/system/kari.{app}.target");
        space.on(NODE, &["rm", &target]).await;
        until("the target is put back", LIMIT, || async {
            let difference = difference(&deployed, &snapshot::without_logs(&space, NODE).await);
            if difference.is_empty() {
                Ok(())
            } else {
                Err(difference)
            }
        })
        .await;
        if again == 1 {
            break;
        }
        space.apply(&manifest).await;
        space.ready_at("shop", &repository.commit).await;
        assert_eq!(processes(&space).await, running, "restarted by an adoption");
        assert_eq!(
            difference(&deployed, &snapshot::without_logs(&space, NODE).await),
            ""
        );
        held_apps_are(&space, "").await;
        let name = format!("{}/shop", space.namespace);
        let refused = space
            .agent(NODE, &["remove", &name])
            .await
            .expect_err("an app with a Release was removed");
        assert!(refused.to_string().contains("a Release holds"), "{refused}");
        assert_eq!(processes(&space).await, running);
    }

    // Only root on the node takes it away now.
    let name = format!("{}/shop", space.namespace);
    let removed = space.agent(NODE, &["remove", &name]).await;
    let answer = removed.unwrap_or_else(|e| panic!("{e}"));
    assert!(answer.contains("is gone from this node"), "{answer}");
    until("the host is as it was", LIMIT, || async {
        let difference = difference(&before, &snapshot(&space).await);
        if difference.is_empty() {
            Ok(())
        } else {
            Err(difference)
        }
    })
    .await;
    held_apps_are(&space, "").await;
}
