//! From `kubectl apply` to a served request, and what a user is told on the way.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use serde_json::json;
use support::gitops::{argo_health, said, write_chart};
use support::{DEPLOY_LIMIT, LIMIT, Space, app, folder, is, reason, until};

const NODE: &str = "n1";

async fn space(topic: &str) -> Space {
    Space::new(support::testbed(1).await, topic).await
}

#[tokio::test]
async fn an_applied_manifest_is_built_served_and_described() {
    let space = space("apply").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    space
        .apply(&app::with_build(
            app::manifest("shop", &repository.url, "apply.example.com"),
            "echo built > mark",
        ))
        .await;
    let deployment = space.ready_at("shop", &repository.commit).await;
    assert_eq!(
        space.get(NODE, "apply.example.com").await,
        Ok((200, "one".into()))
    );

    let status = deployment.status.expect("a status");
    let nodes = status.nodes.expect("counts");
    assert_eq!(
        (nodes.summary.as_str(), nodes.updated, nodes.failed),
        ("1/1", 1, 0)
    );
    assert_eq!(
        status.source.expect("a source").short_commit,
        repository.commit[..7]
    );
    assert_eq!(status.last_good_revision, status.revision);
    assert!(
        status.active.is_empty(),
        "a finished rollout holds a slot: {:?}",
        status.active
    );
    assert!(is(&status.conditions, "Stalled", "False"));

    let columns = space
        .testbed
        .kubectl(["get", "kd", "-n", &space.namespace])
        .await
        .expect("kubectl");
    for column in [
        "READY",
        "UP-TO-DATE",
        "COMMIT",
        "STATUS",
        "AGE",
        "1/1",
        "Deployed",
    ] {
        assert!(columns.contains(column), "no {column} in:\n{columns}");
    }
    let wait = [
        "wait",
        "--for=condition=Ready",
        "--timeout=30s",
        "kd/shop",
        "-n",
        &space.namespace,
    ];
    space
        .testbed
        .kubectl(wait)
        .await
        .expect("kubectl wait sees Ready");
    until("an event says Deployed", LIMIT, || async {
        let events = space
            .testbed
            .kubectl(["get", "events", "-n", &space.namespace])
            .await
            .map_err(|e| e.to_string())?;
        if events.contains("Deployed") {
            Ok(())
        } else {
            Err(events)
        }
    })
    .await;
}

#[tokio::test]
async fn a_second_commit_replaces_the_first() {
    let space = space("second").await;
    let files = folder(&app::files("one"));
    let first = space.push("shop", files.path());
    space
        .apply(&app::manifest("shop", &first.url, "second.example.com"))
        .await;
    space.ready_at("shop", &first.commit).await;
    support::write(files.path(), &[("message", "two")]);
    let second = space.push("shop", files.path());
    assert_ne!(first.commit, second.commit);
    space.request_look("shop").await;
    space.ready_at("shop", &second.commit).await;
    assert_eq!(
        space.get(NODE, "second.example.com").await,
        Ok((200, "two".into()))
    );
    let release = space.release_until("shop", NODE, "Running", LIMIT, |r| {
        let status = r.status.clone().unwrap_or_default();
        status
            .serving
            .is_some_and(|s| s.release_id == r.spec.release_id)
            && is(&status.conditions, "Ready", "True")
    });
    assert_eq!(release.await.spec.attempt, 2);
    until("only the new service of the app is left", LIMIT, || async {
        let pattern = format!("kari.{}.shop.*.service", space.namespace);
        let units = space
            .on(
                NODE,
                &[
                    "systemctl",
                    "list-units",
                    "--all",
                    "--plain",
                    "--no-legend",
                    &pattern,
                ],
            )
            .await;
        if units.lines().count() == 1 {
            Ok(())
        } else {
            Err(units)
        }
    })
    .await;
}

#[tokio::test]
async fn a_change_of_the_environment_alone_does_not_build_again() {
    let space = space("env").await;
    let files = folder(&app::files("unused"));
    let repository = space.push("shop", files.path());
    let build = "cat /proc/sys/kernel/random/uuid > message";
    let mut manifest = app::with_build(
        app::manifest("shop", &repository.url, "env.example.com"),
        build,
    );
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    let (_, built) = space.get(NODE, "env.example.com").await.expect("an answer");
    manifest["spec"]["env"] = json!([{"name": "MESSAGE", "value": "from the environment"}]);
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    assert_eq!(
        space.get(NODE, "env.example.com").await,
        Ok((200, "from the environment".into()))
    );
    manifest["spec"]["env"] = json!([]);
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    assert_eq!(
        space.get(NODE, "env.example.com").await,
        Ok((200, built)),
        "the build ran again"
    );
}

#[tokio::test]
async fn a_cache_directory_is_kept_for_the_next_build_of_the_same_deployment_and_is_not_in_the_tree()
 {
    let space = space("cache").await;
    let files = folder(&[("shop/server.py", app::SERVER), ("shop/message", "")]);
    let repository = space.push("shop", files.path());
    // Counts the builds that it knows of; the second cache holds what a hostile build may put there.
    let build = "n=$(cat .cache/count || echo 0); echo $((n + 1)) | tee .cache/count > message; \
        ln -sfn /etc/hostname target/deep/link; ln .cache/count hard 2>&1 || :";
    let with_caches = |name: &str| {
        let host = format!("{name}.cache.example.com");
        let mut manifest = app::with_build(app::manifest(name, &repository.url, &host), build);
        manifest["spec"]["source"]["git"]["directory"] = json!("shop");
        manifest["spec"]["build"]["cacheDirectories"] = json!([".cache", "target/deep"]);
        manifest
    };
    space.apply(&with_caches("shop")).await;
    space.ready_at("shop", &repository.commit).await;
    assert_eq!(served(&space, "shop").await, Ok((200, "1\n".into())));

    support::write(files.path(), &[("shop/other", "a change")]);
    let second = space.push("shop", files.path());
    space.apply(&with_caches("blog")).await;
    space.request_look("shop").await;
    space.ready_at("shop", &second.commit).await;
    space.ready_at("blog", &second.commit).await;
    assert_eq!(
        served(&space, "shop").await,
        Ok((200, "2\n".into())),
        "the first build's cache was there"
    );
    assert_eq!(
        served(&space, "blog").await,
        Ok((200, "1\n".into())),
        "another Deployment's was not"
    );
    let found = format!(
        "cd /var/lib/kari/apps/{}.shop && find builds/*/shop -path '*cache*' -o -path '*target*' -o -name hard | sed 's|^[^/]*/[^/]*/||' | sort -u",
        space.namespace
    );
    let found = space.on(NODE, &["sh", "-c", &found]).await;
    assert_eq!(
        found, "shop/.cache\nshop/target\nshop/target/deep",
        "the tree"
    );

    let mut lost = with_caches("lost");
    lost["spec"]["source"]["git"]["directory"] = json!("blog");
    space.apply(&lost).await;
    space
        .deployment_until("lost", "Stalled for its directory", LIMIT, |d| {
            d.status
                .as_ref()
                .is_some_and(|s| reason(&s.conditions, "Stalled") == "DirectoryNotFound")
        })
        .await;
}

async fn served(space: &Space, name: &str) -> Result<(u16, String), String> {
    space.get(NODE, &format!("{name}.cache.example.com")).await
}

#[tokio::test]
async fn a_suspended_deployment_starts_nothing_until_it_is_resumed() {
    let space = space("suspend").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let mut manifest = app::manifest("shop", &repository.url, "suspend.example.com");
    manifest["spec"]["suspend"] = json!(true);
    space.apply(&manifest).await;
    space
        .deployment_until("shop", "Suspended", LIMIT, |d| {
            d.status
                .as_ref()
                .is_some_and(|s| reason(&s.conditions, "Ready") == "Suspended")
        })
        .await;
    let releases = space
        .releases()
        .list(&Default::default())
        .await
        .expect("a list");
    assert!(
        releases.items.is_empty(),
        "a suspended Deployment was given to a node"
    );
    manifest["spec"]["suspend"] = json!(false);
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
}

#[tokio::test]
async fn a_reference_that_is_not_there_is_stalled_and_goes_on_by_itself_when_it_is() {
    let space = space("ref").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let mut manifest = app::manifest("shop", &repository.url, "ref.example.com");
    manifest["spec"]["source"]["git"]["ref"] = json!({"tag": "v1"});
    space.apply(&manifest).await;
    let stalled = space
        .deployment_until("shop", "Stalled", LIMIT, |d| {
            d.status
                .as_ref()
                .is_some_and(|s| is(&s.conditions, "Stalled", "True"))
        })
        .await;
    let conditions = stalled.status.expect("a status").conditions;
    assert_eq!(reason(&conditions, "Stalled"), "RefNotFound");
    let message = &conditions
        .iter()
        .find(|c| c.type_ == "Stalled")
        .expect("Stalled")
        .message;
    assert!(
        message.contains("v1"),
        "the message does not name the tag: {message}"
    );
    manifest["spec"]["source"]["git"]["ref"] = json!({"commit": repository.commit});
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
}

#[tokio::test]
async fn a_source_that_is_away_later_changes_no_node() {
    let space = space("away").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    space
        .apply(&app::manifest("shop", &repository.url, "away.example.com"))
        .await;
    space.ready_at("shop", &repository.commit).await;
    let before = space
        .releases()
        .list(&Default::default())
        .await
        .expect("a list")
        .items;
    // A branch of the same repository that is not there: the look-up answers, and finds nothing.
    let mut manifest = app::manifest("shop", &repository.url, "away.example.com");
    manifest["spec"]["source"]["git"]["ref"] = json!({"branch": "gone"});
    space.apply(&manifest).await;
    space
        .deployment_until("shop", "RefNotFound", LIMIT, |d| {
            d.status
                .as_ref()
                .is_some_and(|s| reason(&s.conditions, "Stalled") == "RefNotFound")
        })
        .await;
    let after = space
        .releases()
        .list(&Default::default())
        .await
        .expect("a list")
        .items;
    assert_eq!(before[0].spec, after[0].spec);
    assert_eq!(
        space.get(NODE, "away.example.com").await,
        Ok((200, "one".into()))
    );
}

#[tokio::test]
async fn a_placement_that_matches_no_node_says_so_and_leaving_it_takes_the_app_away() {
    let space = space("place").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let mut manifest = app::manifest("shop", &repository.url, "place.example.com");
    space.apply(&manifest).await;
    space.ready_at("shop", &repository.commit).await;
    manifest["spec"]["placement"]["nodeSelector"] = json!({"kari.dev/pool": "elsewhere"});
    space.apply(&manifest).await;
    space
        .deployment_until("shop", "NoMatchingNodes", DEPLOY_LIMIT, |d| {
            d.status
                .as_ref()
                .is_some_and(|s| reason(&s.conditions, "Ready") == "NoMatchingNodes")
        })
        .await;
    until("the node serves the host no more", LIMIT, || async {
        match space.get(NODE, "place.example.com").await {
            Ok((404 | 421, _)) => Ok(()),
            other => Err(other),
        }
    })
    .await;
}

#[tokio::test]
async fn helm_waits_until_a_deployment_is_ready_or_stalled_and_argo_cd_says_the_same() {
    let space = space("helm").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let mut manifest = app::manifest("shop", &repository.url, "helm.example.com");
    let chart = folder(&[]);
    let path = chart.path().display().to_string();
    write_chart(chart.path(), &manifest);
    let install = ["install", "shop", &path, "--wait", "--timeout=110s"];
    let installed = space.run("helm", &install).await;
    assert!(installed.status.success(), "{}", said(&installed));
    // It has returned: so it is served.
    assert_eq!(
        space.get(NODE, "helm.example.com").await,
        Ok((200, "one".into()))
    );
    let deployment = space
        .deployments()
        .get("shop")
        .await
        .expect("the Deployment");
    assert_eq!(argo_health(&deployment), "Healthy");

    // Who applies it again changes nothing, and says so before.
    let file = chart
        .path()
        .join("templates/shop.yaml")
        .display()
        .to_string();
    let by = ["--server-side", "--field-manager=gitops", "-f", &file];
    let applied = space
        .run(
            "kubectl",
            &[&["apply", "--force-conflicts"][..], &by].concat(),
        )
        .await;
    assert!(applied.status.success(), "{}", said(&applied));
    let differs = space.run("kubectl", &[&["diff"][..], &by].concat()).await;
    assert!(differs.status.success(), "{}", said(&differs));

    // A second manager adds a field, and cannot take one.
    let other = |spec: serde_json::Value| {
        let manifest = json!({"apiVersion": "kari.dev/v1alpha1", "kind": "Deployment", "metadata": {"name": "shop"}, "spec": spec});
        support::write(chart.path(), &[("other.json", &manifest.to_string())]);
        chart.path().join("other.json").display().to_string()
    };
    let by_other = ["apply", "--server-side", "--field-manager=other", "-f"];
    let file = other(json!({"revisionHistoryLimit": 3}));
    let added = space
        .run("kubectl", &[&by_other[..], &[&file]].concat())
        .await;
    assert!(added.status.success(), "{}", said(&added));
    let file = other(json!({"strategy": {"minReadySeconds": 2}}));
    let taken = space
        .run("kubectl", &[&by_other[..], &[&file]].concat())
        .await;
    assert!(
        said(&taken).contains("conflicts with \"gitops\""),
        "{}",
        said(&taken)
    );

    // What only a person can mend ends the wait long before its time.
    manifest["spec"]["source"]["git"]["ref"] = json!({"tag": "none"});
    write_chart(chart.path(), &manifest);
    let upgrade = [
        "upgrade",
        "shop",
        &path,
        "--wait",
        "--timeout=300s",
        "--force-conflicts",
    ];
    let begin = std::time::Instant::now();
    let upgraded = space.run("helm", &upgrade).await;
    assert!(!upgraded.status.success(), "{}", said(&upgraded));
    assert!(begin.elapsed() < LIMIT, "{}", said(&upgraded));
    assert!(
        said(&upgraded).contains("has no refs/tags/none; push it"),
        "{}",
        said(&upgraded)
    );
    let deployment = space
        .deployments()
        .get("shop")
        .await
        .expect("the Deployment");
    assert_eq!(argo_health(&deployment), "Degraded");

    let suspended = json!({"spec": {"suspend": true, "source": {"git": {"ref": {"tag": null, "branch": "main"}}}}});
    let patch = kube::api::Patch::Merge(suspended);
    let patched = space
        .deployments()
        .patch("shop", &Default::default(), &patch)
        .await;
    patched.expect("patched");
    let deployment = space
        .deployment_until("shop", "not Stalled", LIMIT, |d| {
            let status = d.status.clone().unwrap_or_default();
            Some(status.observed_generation) == d.metadata.generation
                && is(&status.conditions, "Stalled", "False")
        })
        .await;
    assert_eq!(argo_health(&deployment), "Suspended");
}

#[tokio::test]
async fn what_an_apply_set_no_longer_has_is_pruned() {
    let space = space("prune").await;
    let files = folder(&app::files("one"));
    let repository = space.push("shop", files.path());
    let set = folder(&[]);
    for name in ["stays", "goes"] {
        let host = format!("{name}.prune.example.com");
        let mut manifest = app::manifest(name, &repository.url, &host);
        manifest["spec"]["suspend"] = json!(true);
        let file = format!("{name}.json");
        support::write(set.path(), &[(&file, &manifest.to_string())]);
    }
    let path = set.path().display().to_string();
    let apply = ["apply", "--prune", "--applyset=configmaps/set", "-f", &path];
    let applied = space.run("kubectl", &apply).await;
    assert!(applied.status.success(), "{}", said(&applied));
    std::fs::remove_file(set.path().join("goes.json")).expect("removed");
    let applied = space.run("kubectl", &apply).await;
    assert!(applied.status.success(), "{}", said(&applied));
    let left = space
        .deployments()
        .list(&Default::default())
        .await
        .expect("a list");
    let left: Vec<_> = left
        .items
        .into_iter()
        .filter_map(|d| d.metadata.name)
        .collect();
    assert_eq!(left, ["stays"]);
}
