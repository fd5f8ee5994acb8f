//! What the runtime does when the API server, or the way to it, fails: against
//! a real API server, with faults put into the client.

// A test's own functions unwrap as the tests do; clippy exempts only the tests.
#![allow(clippy::unwrap_used, clippy::panic)]

mod layer;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kari::api::deployment::Progress;
use kari::api::{Deployment, DeploymentStatus, Release};
use kari::controller::apply::{Refused, apply};
use kari::controller::observed::ObservedDeployment;
use kari::controller::plan::Plan;
use kari::controller::rollout::Step;
use kari::runtime::client::{self, ApiMetrics};
use kari::runtime::lease;
use kari::runtime::node_lease::{self, NodeLeaseMetrics};
use kari::runtime::streams::{StreamMetrics, guarded};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::DeserializeGuard;
use kube::runtime::reflector::Store;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use prometheus_client::registry::Registry;
use serde_json::json;
use testbed::Testbed;
use tokio::sync::{OnceCell, watch};
use tokio_util::sync::CancellationToken;

use layer::{Fault, Faults};

/// How long anything may take that should happen at once.
const SOON: Duration = Duration::from_secs(20);

/// A namespace of the test's own, a client with faults, and one without.
struct Ground {
    faults: Faults,
    faulty: Client,
    clean: Client,
    namespace: String,
    registry: Registry,
    streams: StreamMetrics,
}

async fn ground(test: &str) -> Ground {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut registry = Registry::default();
    let metrics = ApiMetrics::new(&mut registry);
    let streams = StreamMetrics::new(&mut registry);
    let faults = Faults::default();
    let config = cluster().await;
    let faulty = client::build_with_layer(config.clone(), &metrics, &faults).unwrap();
    let clean = client::build(config, &metrics).unwrap();
    let namespace = format!("faults-{test}");
    let object = serde_json::from_value(json!({"metadata": {"name": namespace}})).unwrap();
    Api::<Namespace>::all(clean.clone())
        .create(&PostParams::default(), &object)
        .await
        .unwrap();
    Ground {
        faults,
        faulty,
        clean,
        namespace,
        registry,
        streams,
    }
}

/// One API server for all tests of this program; it ends with the process.
async fn cluster() -> kube::Config {
    static TESTBED: OnceCell<Testbed> = OnceCell::const_new();
    let options = testbed::Options {
        kari: false,
        ..testbed::Options::default()
    };
    let testbed = TESTBED
        .get_or_init(async || Testbed::up(options).await.unwrap())
        .await;
    let kubeconfig = Kubeconfig::read_from(testbed.kubeconfig()).unwrap();
    kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .unwrap()
}

type Guard = DeserializeGuard<ConfigMap>;
type Touched = Pin<Box<dyn Stream<Item = Guard> + Send>>;

impl Ground {
    fn watch(&self) -> (Store<Guard>, Touched) {
        let api = Api::namespaced(self.faulty.clone(), &self.namespace);
        let selected = watcher::Config::default().labels("of=test");
        let (store, stream) = guarded::<ConfigMap>(api, selected, "configmap", &self.streams);
        (store, Box::pin(stream))
    }

    fn objects(&self) -> Api<ConfigMap> {
        Api::namespaced(self.clean.clone(), &self.namespace)
    }

    async fn create(&self, name: &str) {
        self.objects()
            .create(&PostParams::default(), &object(name))
            .await
            .unwrap();
    }

    async fn change(&self, name: &str) {
        let patch = Patch::Merge(json!({"data": {"key": fastrand::u64(..).to_string()}}));
        self.objects()
            .patch(name, &PatchParams::default(), &patch)
            .await
            .unwrap();
    }

    async fn delete(&self, name: &str) {
        self.objects()
            .delete(name, &DeleteParams::default())
            .await
            .unwrap();
    }

    fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.clean.clone(), &self.namespace)
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }
}

fn object(name: &str) -> ConfigMap {
    serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"of": "test"}}, "data": {"key": "value"},
    }))
    .unwrap()
}

/// The next object that the stream tells, by name.
async fn next(stream: &mut Touched) -> String {
    match tokio::time::timeout(SOON, stream.next()).await {
        Ok(Some(object)) => object.name_any(),
        Ok(None) => panic!("the stream ended"),
        Err(_) => panic!("the stream told nothing for {SOON:?}"),
    }
}

/// Reads the stream until it has told `name`.
async fn until(stream: &mut Touched, name: &str) {
    while next(stream).await != name {}
}

fn names(store: &Store<Guard>) -> Vec<String> {
    let mut names: Vec<_> = store
        .state()
        .iter()
        .map(|object| object.name_any())
        .collect();
    names.sort();
    names
}

async fn eventually<T, F: Future<Output = Result<T, String>>>(mut look: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        match look().await {
            Ok(value) => return value,
            Err(seen) if Instant::now() > deadline => panic!("after {SOON:?}: {seen}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_cannot_be_decoded_hides_only_itself() {
    let ground = ground("undecodable").await;
    ground.create("bad").await;
    ground.create("good").await;
    ground.faults.inject(
        &["list", "watch"],
        "/configmaps",
        Fault::Undecodable("bad"),
        None,
    );
    let (store, mut stream) = ground.watch();
    let mut listed = [next(&mut stream).await, next(&mut stream).await];
    listed.sort();
    assert_eq!(listed, ["bad", "good"]);
    let bad = store.find(|object| object.name_any() == "bad").unwrap();
    assert!(
        bad.0.as_ref().unwrap_err().error.contains("42"),
        "{:?}",
        bad.0
    );

    ground.change("bad").await;
    assert_eq!(next(&mut stream).await, "bad");
    ground.change("good").await;
    assert_eq!(next(&mut stream).await, "good");
    assert!(
        store
            .find(|object| object.name_any() == "good")
            .unwrap()
            .0
            .is_ok()
    );
    let text = ground.metrics();
    assert!(
        text.contains(r#"kari_watch_invalid_objects{stream="configmap"} 1"#),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_whose_start_is_answered_with_410_is_begun_anew_and_tells_what_it_missed() {
    let ground = ground("gone").await;
    for name in ["kept", "doomed"] {
        ground.create(name).await;
    }
    // The stream's watch breaks at once, and its next starts are refused until
    // the objects have changed.
    let breaks = ground
        .faults
        .inject(&["watch"], "/configmaps", Fault::BreaksInStream, Some(1));
    let refused = ground
        .faults
        .inject(&["watch"], "/configmaps", Fault::Refused(500), None);
    let (store, stream) = ground.watch();
    let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
    let reading = tokio::spawn(stream.for_each(move |object| {
        let _ = sender.send(object.name_any());
        std::future::ready(())
    }));
    for _ in 0..2 {
        told.recv().await.unwrap();
    }
    eventually(|| async {
        if refused.hits() > 0 {
            Ok(())
        } else {
            Err(format!(
                "broken {}, refused {}",
                breaks.hits(),
                refused.hits()
            ))
        }
    })
    .await;
    ground.delete("doomed").await;
    ground.create("new").await;
    let expired = ground
        .faults
        .inject(&["watch"], "/configmaps", Fault::Refused(410), Some(1));
    refused.end();

    let mut missed = Vec::new();
    for _ in 0..2 {
        missed.push(
            tokio::time::timeout(SOON, told.recv())
                .await
                .expect("nothing was told")
                .unwrap(),
        );
    }
    missed.sort();
    assert_eq!(
        missed,
        ["doomed", "new"],
        "what had not changed was told, or something was missed"
    );
    assert_eq!(names(&store), ["kept", "new"]);
    assert_eq!(expired.hits(), 1);
    ground.change("kept").await;
    assert_eq!(
        tokio::time::timeout(SOON, told.recv())
            .await
            .expect("the new watch is dead")
            .unwrap(),
        "kept"
    );
    reading.abort();
    let text = ground.metrics();
    assert!(
        text.contains(r#"kari_watch_rebuilds_total{stream="configmap",reason="Expired"} 1"#),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_in_which_a_watch_breaks_is_survived() {
    let ground = ground("breaks").await;
    ground.create("first").await;
    let (_store, mut stream) = ground.watch();
    assert_eq!(next(&mut stream).await, "first");
    for fault in [
        Fault::ExpiredInStream,
        Fault::BreaksInStream,
        Fault::Refused(410),
        Fault::Refused(503),
        Fault::Drops,
        Fault::Slow(Duration::from_secs(1)),
    ] {
        let verbs = ["watch"].as_slice();
        let injected = ground
            .faults
            .inject(&["watch"], "/configmaps", fault.clone(), Some(1));
        // A stream of its own for each fault: it meets it when its watch begins.
        let (_store, mut fresh) = ground.watch();
        assert_eq!(next(&mut fresh).await, "first", "{fault:?} on {verbs:?}");
        let changing = async {
            eventually(|| async {
                if injected.hits() > 0 {
                    Ok(())
                } else {
                    Err(format!("{fault:?} met nothing"))
                }
            })
            .await;
            ground.change("first").await;
        };
        tokio::join!(changing, until(&mut fresh, "first"));
        assert_eq!(injected.hits(), 1, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_fails_does_not_delay_another() {
    let ground = ground("apart").await;
    ground
        .faults
        .inject(&["list", "watch"], "/leases", Fault::Refused(403), None);
    let leases = Api::namespaced(ground.faulty.clone(), &ground.namespace);
    let (_none, failing) =
        guarded::<Lease>(leases, watcher::Config::default(), "lease", &ground.streams);
    let (_store, mut stream) = ground.watch();
    let failing = tokio::spawn(failing.for_each(|_| std::future::ready(())));
    eventually(|| async {
        let text = ground.metrics();
        if text.contains(r#"kari_watch_errors_total{stream="lease",kind="List"}"#) {
            Ok(())
        } else {
            Err(text)
        }
    })
    .await;
    for turn in 0..5 {
        let name = format!("object-{turn}");
        let start = Instant::now();
        let (told, ()) = tokio::join!(next(&mut stream), ground.create(&name));
        assert_eq!(told, name);
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "told after {:?}",
            start.elapsed()
        );
    }
    failing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_answer_was_lost_is_not_made_twice_and_is_told() {
    let ground = ground("lost").await;
    let api = Api::<ConfigMap>::namespaced(ground.faulty.clone(), &ground.namespace);
    for code in [429, 503, 504] {
        let name = format!("object-{code}");
        ground
            .faults
            .inject(&["create"], "/configmaps", Fault::LostAnswer(code), Some(1));
        let error = api
            .create(&PostParams::default(), &object(&name))
            .await
            .unwrap_err();
        assert!(
            matches!(&error, kube::Error::Api(status) if status.is_already_exists()),
            "{code}: {error}"
        );

        let current = api.get(&name).await.unwrap();
        ground.faults.inject(
            &["replace"],
            "/configmaps",
            Fault::LostAnswer(code),
            Some(1),
        );
        let error = api
            .replace(&name, &PostParams::default(), &with_label(current))
            .await
            .unwrap_err();
        assert!(
            matches!(&error, kube::Error::Api(status) if status.is_conflict()),
            "{code}: {error}"
        );
        assert_eq!(
            api.get(&name)
                .await
                .unwrap()
                .labels()
                .get("touched")
                .map(String::as_str),
            Some("yes")
        );
    }
}

fn with_label(mut object: ConfigMap) -> ConfigMap {
    object
        .labels_mut()
        .insert("touched".to_owned(), "yes".to_owned());
    object
}

#[tokio::test(flavor = "multi_thread")]
async fn a_released_lease_is_taken_at_once_and_a_silent_holders_only_after_its_duration() {
    let ground = ground("lease").await;
    let stop = CancellationToken::new();
    let stand = |identity: &'static str| {
        lease::acquire(
            ground.faulty.clone(),
            &ground.namespace,
            "leader",
            identity,
            stop.clone(),
        )
    };
    let first = stand("first").await.unwrap();
    let second = stand("second");
    tokio::pin!(second);
    assert!(
        tokio::time::timeout(Duration::from_secs(5), &mut second)
            .await
            .is_err(),
        "a held lease was taken"
    );
    first.release().await;
    let start = Instant::now();
    let second = tokio::time::timeout(SOON, second)
        .await
        .expect("a released lease was not taken")
        .unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );

    // The second falls silent: its renewals reach nobody, though it runs.
    let lost = second.lost();
    let silent = ground
        .faults
        .inject(&["replace", "get"], "/leases/leader", Fault::Hangs, None);
    let start = Instant::now();
    let clean = ground.clean.clone();
    let third = lease::acquire(clean, &ground.namespace, "leader", "third", stop.clone());
    let gone = async {
        lost.cancelled().await;
        start.elapsed()
    };
    let taken = async {
        let third = third.await.unwrap();
        (third, start.elapsed())
    };
    let (gone, (third, taken)) = tokio::time::timeout(SOON, futures::future::join(gone, taken))
        .await
        .expect("a silent holder was not replaced");
    assert!(
        gone < taken,
        "two leaders: the old one until {gone:?}, the new one from {taken:?}"
    );
    assert!(
        gone <= Duration::from_secs(11),
        "a holder that cannot renew believed for {gone:?}"
    );
    assert!(
        taken >= Duration::from_secs(12),
        "the lease was taken after {taken:?}"
    );
    assert!(silent.hits() > 0);
    let record = ground.leases().get("leader").await.unwrap().spec.unwrap();
    assert_eq!(record.holder_identity.as_deref(), Some("third"));
    assert_eq!(record.lease_transitions, Some(3));
    third.release().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_whose_answer_was_lost_does_not_end_a_leadership() {
    let ground = ground("renewal").await;
    let stop = CancellationToken::new();
    let leads = lease::acquire(
        ground.faulty.clone(),
        &ground.namespace,
        "leader",
        "only",
        stop,
    )
    .await
    .unwrap();
    let lost = leads.lost();
    for fault in [
        Fault::LostAnswer(503),
        Fault::HangsAfterEffect,
        Fault::Drops,
        Fault::Refused(409),
    ] {
        let injected = ground
            .faults
            .inject(&["replace"], "/leases/leader", fault.clone(), Some(1));
        eventually(|| async {
            if injected.hits() > 0 {
                Ok(())
            } else {
                Err(format!("{fault:?} met nothing"))
            }
        })
        .await;
        let before = ground
            .leases()
            .get("leader")
            .await
            .unwrap()
            .spec
            .unwrap()
            .renew_time;
        eventually(|| async {
            let now = ground
                .leases()
                .get("leader")
                .await
                .unwrap()
                .spec
                .unwrap()
                .renew_time;
            if now > before {
                Ok(())
            } else {
                Err(format!("after {fault:?}: {before:?} is not renewed"))
            }
        })
        .await;
        assert!(!lost.is_cancelled(), "{fault:?} ended the leadership");
    }
    // Somebody else takes it, against all rules.
    let thief = Patch::Merge(json!({"spec": {"holderIdentity": "thief"}}));
    ground
        .leases()
        .patch("leader", &PatchParams::default(), &thief)
        .await
        .unwrap();
    tokio::time::timeout(SOON, lost.cancelled())
        .await
        .expect("a deposed leader goes on");
    leads.release().await;
    let record = ground.leases().get("leader").await.unwrap().spec.unwrap();
    assert_eq!(
        record.holder_identity.as_deref(),
        Some("thief"),
        "a deposed leader wrote the lease"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_lease_carries_its_annotations_and_tells_of_a_second_writer() {
    let mut ground = ground("node").await;
    let metrics = NodeLeaseMetrics::new(&mut ground.registry);
    let (annotations, received) = watch::channel(BTreeMap::from([(
        "kari.dev/version".to_owned(),
        "1".to_owned(),
    )]));
    let stop = CancellationToken::new();
    let (client, namespace, shutdown) = (
        ground.faulty.clone(),
        ground.namespace.clone(),
        stop.clone(),
    );
    let beating = tokio::spawn(async move {
        node_lease::heartbeat(
            client,
            &namespace,
            "kari-agent-n1",
            "n1",
            received,
            metrics,
            shutdown,
        )
        .await;
    });
    let shows = |version: &'static str| {
        let leases = ground.leases();
        eventually(move || {
            let leases = leases.clone();
            async move {
                let Some(lease) = leases.get_opt("kari-agent-n1").await.unwrap() else {
                    return Err("there is no lease".to_owned());
                };
                if lease
                    .annotations()
                    .get("kari.dev/version")
                    .map(String::as_str)
                    == Some(version)
                {
                    Ok(lease)
                } else {
                    Err(format!("{:?}", lease.metadata))
                }
            }
        })
    };
    let lease = shows("1").await;
    let record = lease.spec.unwrap();
    assert_eq!(
        (
            record.holder_identity.as_deref(),
            record.lease_duration_seconds
        ),
        (Some("n1"), Some(40))
    );

    // A renewal whose answer was lost is the agent's own.
    ground.faults.inject(
        &["replace"],
        "/leases/kari-agent-n1",
        Fault::LostAnswer(503),
        Some(1),
    );
    annotations.send_modify(|all| drop(all.insert("kari.dev/version".to_owned(), "2".to_owned())));
    shows("2").await;
    let foreign = "kari_node_lease_foreign_changes_total ";
    assert!(
        ground.metrics().contains(&format!("{foreign}0")),
        "{}",
        ground.metrics()
    );

    let twin = Patch::Merge(json!({"spec": {"renewTime": "2020-01-01T00:00:00.000000Z"}}));
    ground
        .leases()
        .patch("kari-agent-n1", &PatchParams::default(), &twin)
        .await
        .unwrap();
    annotations.send_modify(|all| drop(all.insert("kari.dev/version".to_owned(), "3".to_owned())));
    shows("3").await;
    assert!(
        ground.metrics().contains(&format!("{foreign}1")),
        "{}",
        ground.metrics()
    );

    // A deleted lease comes back.
    ground
        .leases()
        .delete("kari-agent-n1", &DeleteParams::default())
        .await
        .unwrap();
    annotations.send_modify(|all| drop(all.insert("kari.dev/version".to_owned(), "4".to_owned())));
    shows("4").await;
    stop.cancel();
    tokio::time::timeout(SOON, beating)
        .await
        .expect("the heartbeat ignores the shutdown")
        .unwrap();
}

/// Defines the kinds, and makes a Deployment in the test's namespace; as the controller reads it.
async fn deployment(ground: &Ground) -> ObservedDeployment {
    static DEFINED: OnceCell<()> = OnceCell::const_new();
    let define = async || {
        let api = Api::all(ground.clean.clone());
        for definition in kari::api::definitions::definitions().unwrap() {
            let name = definition.name_any();
            let parameters = PatchParams::apply("test").force();
            api.patch(&name, &parameters, &Patch::Apply(&definition))
                .await
                .unwrap();
            let established = kube::runtime::conditions::is_crd_established();
            let waiting = kube::runtime::wait::await_condition(api.clone(), &name, established);
            tokio::time::timeout(SOON, waiting)
                .await
                .unwrap_or_else(|_| panic!("{name} is not established after {SOON:?}"))
                .unwrap();
        }
    };
    DEFINED.get_or_init(define).await;
    let object: Deployment = serde_json::from_value(json!({
        "apiVersion": "kari.dev/v1alpha1", "kind": "Deployment", "metadata": {"name": "shop"},
        "spec": {
            "placement": {"nodeSelector": {}},
            "source": {"git": {"url": "https://git.example.com/shop.git"}},
            "processes": [{"name": "web", "command": ["./web"]}],
        },
    }))
    .unwrap();
    let created = deployments(ground)
        .create(&PostParams::default(), &object)
        .await
        .unwrap();
    observed(&created)
}

fn deployments(ground: &Ground) -> Api<Deployment> {
    Api::namespaced(ground.clean.clone(), &ground.namespace)
}

fn observed(object: &Deployment) -> ObservedDeployment {
    ObservedDeployment {
        namespace: object.namespace().unwrap(),
        name: object.name_any(),
        uid: object.uid().unwrap(),
        resource_version: object.resource_version().unwrap(),
        generation: object.metadata.generation.unwrap(),
        spec: object.spec.clone(),
        status: object.status.clone().unwrap_or_default(),
        requested_at: None,
        retry: None,
    }
}

fn decision(status: DeploymentStatus, steps: Vec<Step>) -> Plan {
    Plan {
        revision: None,
        status,
        steps,
        giving_back: std::collections::BTreeSet::new(),
        surplus: Vec::new(),
        look_again: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_status_leaves_out_is_gone_and_the_same_status_is_not_written_again() {
    let ground = ground("status").await;
    let before = deployment(&ground).await;
    let condition = |message: &str| {
        json!({
            "type": "Ready", "status": "False", "reason": "Progressing", "message": message,
            "lastTransitionTime": "2020-01-01T00:00:00Z", "observedGeneration": 1,
        })
    };
    let status =
        |value: serde_json::Value| -> DeploymentStatus { serde_json::from_value(value).unwrap() };
    let full = DeploymentStatus {
        progress: Some(Progress {
            deadline: Some("2020-01-01T00:00:00Z".to_owned()),
            paused_at: Some("2020-01-01T00:00:00Z".to_owned()),
        }),
        ..status(json!({
            "observedGeneration": 1, "conditions": [condition("n1: it builds")],
            "revision": "shop-1", "lastGoodRevision": "shop-1", "active": ["n1"],
            "blockedRevisions": [{"revision": "shop-1", "commit": "a", "node": "n1", "reason": "ProbeFailed", "message": "m"}],
            "lastHandled": {"retry": "1"},
        }))
    };
    let bare = status(json!({"observedGeneration": 1, "conditions": [condition("")]}));
    let mut read = before;
    for said in [&full, &bare, &full, &bare] {
        let written = apply(&ground.clean, &read, &decision(said.clone(), vec![]))
            .await
            .unwrap();
        assert!(written.status);
        let stands = deployments(&ground).get("shop").await.unwrap();
        assert_eq!(stands.status.as_ref(), Some(said));
        read = observed(&stands);

        let again = apply(&ground.clean, &read, &decision(said.clone(), vec![]))
            .await
            .unwrap();
        assert!(!again.status);
        let stands = deployments(&ground).get("shop").await.unwrap();
        assert_eq!(
            stands.resource_version(),
            Some(read.resource_version.clone())
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_on_what_has_changed_meanwhile_is_dropped() {
    let ground = ground("stale").await;
    let before = deployment(&ground).await;
    let releases = Api::<Release>::namespaced(ground.clean.clone(), &ground.namespace);
    let spec = |attempt: i64| {
        let spec = serde_json::from_value(json!({
            "nodeName": "n1", "deployment": "shop", "attempt": attempt,
            "releaseId": format!("00000000-0000-5000-8000-{attempt:012}"),
            "revision": "shop-1", "commit": "a".repeat(40),
            "template": {
                "source": {"url": "https://git.example.com/shop.git"},
                "processes": [{"name": "web", "command": ["./web"]}],
                "switch": "BlueGreen", "minReadySeconds": 5, "keepReleases": 2,
            },
        }));
        Box::new(spec.unwrap())
    };
    let name = "shop-n1".to_owned();
    let create = |attempt| Step::Create {
        unsealed: vec![],
        name: name.clone(),
        spec: spec(attempt),
        retry: None,
    };
    let stands = async || {
        let release = releases.get(&name).await.unwrap();
        let attempt = release.spec.attempt;
        (
            attempt,
            release.uid().unwrap(),
            release.resource_version().unwrap(),
        )
    };
    let decide = async |read: &ObservedDeployment, step: Step| {
        let plan = decision(read.status.clone(), vec![step]);
        apply(&ground.clean, read, &plan).await.unwrap().dropped
    };

    // Two that both see no Release: one of them makes it.
    let first = decision(before.status.clone(), vec![create(1)]);
    let second = decision(before.status.clone(), vec![create(2)]);
    let (first, second) = tokio::join!(
        apply(&ground.clean, &before, &first),
        apply(&ground.clean, &before, &second),
    );
    let dropped = [first.unwrap().dropped, second.unwrap().dropped];
    assert!(dropped[0] != dropped[1], "{dropped:?}");
    let (attempt, uid, version) = stands().await;
    assert_eq!(attempt, if dropped[0] { 2 } else { 1 });

    // What was read is what is changed, and once.
    let update = |uid: &str, attempt| Step::Update {
        unsealed: vec![],
        name: name.clone(),
        uid: uid.to_owned(),
        resource_version: version.clone(),
        spec: spec(attempt),
        retry: None,
    };
    assert!(!decide(&before, update(&uid, 3)).await);
    assert!(
        decide(&before, update(&uid, 4)).await,
        "an older version was written over"
    );
    let (attempt, _, newer) = stands().await;
    assert_eq!(attempt, 3);

    // Nor is another of its name changed, or deleted.
    let other = "00000000-0000-4000-8000-000000000000";
    let update_other = Step::Update {
        unsealed: vec![],
        name: name.clone(),
        uid: other.to_owned(),
        resource_version: newer.clone(),
        spec: spec(5),
        retry: None,
    };
    assert!(decide(&before, update_other).await);
    for (uid, version) in [(other, &newer), (uid.as_str(), &version)] {
        let delete = Step::Delete {
            name: name.clone(),
            uid: uid.to_owned(),
            resource_version: version.clone(),
        };
        assert!(decide(&before, delete).await, "{uid} at {version}");
    }
    let (attempt, same, _) = stands().await;
    assert_eq!((attempt, same), (3, uid.clone()));

    // A status that was planned from an older version takes its Releases with it.
    let status = DeploymentStatus {
        active: vec!["n1".to_owned()],
        ..before.status.clone()
    };
    let slot = decision(status.clone(), vec![]);
    assert!(apply(&ground.clean, &before, &slot).await.unwrap().status);
    let update = Step::Update {
        unsealed: vec![],
        name: name.clone(),
        uid,
        resource_version: newer,
        spec: spec(6),
        retry: None,
    };
    let other = DeploymentStatus {
        active: vec!["n2".to_owned()],
        ..before.status.clone()
    };
    let late = apply(&ground.clean, &before, &decision(other, vec![update])).await;
    assert!(matches!(late, Err(Refused::Changed)), "{late:?}");
    assert_eq!(stands().await.0, 3);
}
