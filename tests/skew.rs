//! Parts of two versions side by side, as in every upgrade and after every return to the version before:
//! what a later one wrote harms nobody, is not lost, and is said where it cannot be carried out.
//!
//! The later version is made here: the definitions have what the next ones may have beside theirs, and the
//! test writes what its controller, its agent and its users would. `hack/skew.sh` runs real earlier programs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kari::api::names::{NodeName, release_name};
use kari::api::{Deployment, Release};
use kube::Resource;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use support::{DEPLOY_LIMIT, LIMIT, Space, app, folder, is, reason, until};
use testbed::{Part, Repository};
use tokio::sync::{Mutex, OnceCell};

const NODE: &str = "n1";

/// The agent is stopped while files are changed: by one test at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

/// What the next version's definitions have beside this one's: a field each in a Deployment, a Release, its
/// template and their statuses, and a value more where there is a choice.
static LATER: OnceCell<()> = OnceCell::const_new();

async fn space(topic: &str) -> Space {
    let space = Space::new(support::testbed(1).await, topic).await;
    LATER.get_or_init(|| extend_definitions(&space)).await;
    space
}

async fn extend_definitions(space: &Space) {
    let field = json!({"type": "string"});
    for (name, fields, choices) in [
        (
            "deployments.kari.dev",
            vec!["spec", "status"],
            vec!["spec/properties/strategy/properties/switch"],
        ),
        (
            "releases.kari.dev",
            vec!["spec", "spec/properties/template", "status"],
            vec!["spec/properties/onDelete", "status/properties/phase"],
        ),
    ] {
        let at = |path: &str, rest: &str| {
            format!("/spec/versions/0/schema/openAPIV3Schema/properties/{path}/{rest}")
        };
        let fields = fields
            .iter()
            .map(|path| json!({"op": "add", "path": at(path, "properties/later"), "value": field}));
        let choices = choices
            .iter()
            .map(|path| json!({"op": "add", "path": at(path, "enum/-"), "value": "Later"}));
        let patch = Value::from_iter(fields.chain(choices));
        let patch = serde_json::from_value(patch).expect("a patch");
        let definitions: Api<CustomResourceDefinition> = Api::all(space.client.clone());
        definitions
            .patch(name, &PatchParams::default(), &Patch::Json::<()>(patch))
            .await
            .unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

/// Objects as the API server has them, with what this version does not know.
fn raw<K: Resource<DynamicType = ()>>(space: &Space) -> Api<DynamicObject> {
    let resource = ApiResource::erase::<K>(&());
    Api::namespaced_with(space.client.clone(), &space.namespace, &resource)
}

fn release_of(name: &str) -> String {
    release_name(name, &NodeName::new(NODE))
}

/// Writes to an object as the later version does, until the API server serves the later definitions.
async fn write<K: Resource<DynamicType = ()>>(
    space: &Space,
    name: &str,
    part: &str,
    change: Value,
) {
    let api = raw::<K>(space);
    let params = PatchParams {
        field_validation: Some(kube::api::ValidationDirective::Strict),
        ..PatchParams::default()
    };
    let patch = Patch::Merge(json!({part: change}));
    until(&format!("{part} of {name} is written"), LIMIT, || async {
        let written = match part {
            "status" => api.patch_status(name, &params, &patch).await,
            _ => api.patch(name, &params, &patch).await,
        };
        written.map(drop).map_err(|e| e.to_string())
    })
    .await;
}

/// Adds a condition to an object's status, as a later version's controller with a field manager of its own.
async fn add_condition<K: Resource<DynamicType = ()>>(space: &Space, name: &str) {
    let resource = ApiResource::erase::<K>(&());
    let condition = json!({
        "type": "Later",
        "status": "True",
        "reason": "LaterReason",
        "message": "what the next version says",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    let body = json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "status": {"later": "kept", "conditions": [condition]},
    });
    let api = raw::<K>(space);
    let params = PatchParams::apply("later").force();
    until(&format!("{name} has the condition"), LIMIT, || async {
        let written = api.patch_status(name, &params, &Patch::Apply(&body)).await;
        written.map(drop).map_err(|e| e.to_string())
    })
    .await;
}

/// What an object has at `path`; null for nothing.
fn at(object: &DynamicObject, path: &str) -> Value {
    object.data.pointer(path).cloned().unwrap_or_default()
}

fn has_later_condition(object: &DynamicObject) -> bool {
    let conditions = at(object, "/status/conditions");
    let mut conditions = conditions.as_array().into_iter().flatten();
    conditions.any(|c| c["type"] == "Later" && c["reason"] == "LaterReason")
}

/// An app of the test's, which serves what is pushed.
struct App {
    name: &'static str,
    host: String,
    manifest: Value,
    files: tempfile::TempDir,
}

impl App {
    /// Deployed and serving "one".
    async fn deployed(space: &Space, name: &'static str) -> Self {
        let host = format!("{name}.{}.example.com", space.namespace);
        let files = folder(&app::files("one"));
        let repository = space.push(name, files.path());
        let manifest = app::manifest(name, &repository.url, &host);
        space.apply(&manifest).await;
        space.ready_at(name, &repository.commit).await;
        Self {
            name,
            host,
            manifest,
            files,
        }
    }

    async fn push(&self, space: &Space, files: &[(&str, &str)]) -> Repository {
        support::write(self.files.path(), files);
        let repository = space.push(self.name, self.files.path());
        space.request_look(self.name).await;
        repository
    }

    async fn serves(&self, space: &Space, message: &str) {
        assert_eq!(
            space.get(NODE, &self.host).await,
            Ok((200, message.to_owned())),
            "{}",
            self.name
        );
    }

    /// Pushes another message, and waits until it is served.
    async fn rolls_out(&self, space: &Space, message: &str) {
        let pushed = self.push(space, &[("message", message)]).await;
        space.ready_at(self.name, &pushed.commit).await;
        self.serves(space, message).await;
    }

    /// Changes the app's files on the node while no agent runs there: a program in Python that has each
    /// record's path as `path` and its content as `record`.
    async fn change_records(&self, space: &Space, program: &str) {
        let _alone = ALONE.lock().await;
        let agent: Part = "agent/n1".parse().expect("a part");
        let kill = space.testbed.kill(agent, testbed::Signal::KILL);
        kill.await.unwrap_or_else(|e| panic!("{e}"));
        let app = format!("{}.{}", space.namespace, self.name);
        let program = CHANGE.replace("PROGRAM", program);
        space.on(NODE, &["python3", "-c", &program, &app]).await;
        let start = space.testbed.start(agent);
        start.await.unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Runs a line for each record of an app and for those of the node, and writes them back.
const CHANGE: &str = r#"
import glob, json, os, sys

def grow(value):
    """Gives each object a field of the next version."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        grow(inner)
    if isinstance(value, dict):
        value["later"] = {"than": "this"}

app = "/var/lib/kari/apps/" + sys.argv[1]
found = glob.glob(app + "/*.json") + glob.glob(app + "/releases/*.json")
assert len(found) >= 4, found
for path in found + ["/var/lib/kari/node.key"]:
    with open(path) as file:
        record = json.load(file)
    PROGRAM
    with open(path, "w") as file:
        json.dump(record, file)
"#;

#[tokio::test]
async fn what_a_later_version_adds_to_objects_stays_and_harms_nothing() {
    let space = space("added").await;
    let shop = App::deployed(&space, "shop").await;
    let release = release_of("shop");
    write::<Deployment>(&space, "shop", "spec", json!({"later": "kept"})).await;
    add_condition::<Deployment>(&space, "shop").await;
    let spec = json!({"later": "kept", "template": {"later": "gone with the template"}});
    write::<Release>(&space, &release, "spec", spec).await;
    add_condition::<Release>(&space, &release).await;
    write::<Release>(&space, &release, "status", json!({"phase": "Later"})).await;
    let leases: Api<Lease> = Api::namespaced(space.client.clone(), "kari-system");
    let annotations = json!({"kari.dev/later": "a capability", "example.com/later": "kept"});
    let annotations = Patch::Merge(json!({"metadata": {"annotations": annotations}}));
    leases
        .patch("kari-agent-n1", &PatchParams::default(), &annotations)
        .await
        .expect("an annotated Lease");

    shop.rolls_out(&space, "two").await;

    let deployment = raw::<Deployment>(&space).get("shop").await;
    let release = raw::<Release>(&space).get(&release).await;
    for object in [deployment, release] {
        let object = object.expect("the object");
        assert_eq!(at(&object, "/spec/later"), "kept", "{object:?}");
        assert_eq!(at(&object, "/status/later"), "kept", "{object:?}");
        assert!(has_later_condition(&object), "{object:?}");
    }
    // The agent's own annotations are what this agent can do, and those of others are not its business.
    until("the Lease tells of this agent", LIMIT, || async {
        let lease = leases.get("kari-agent-n1").await.expect("the Lease");
        let annotations = lease.metadata.annotations.unwrap_or_default();
        match annotations.contains_key("kari.dev/later") {
            false if annotations["example.com/later"] == "kept" => Ok(()),
            _ => Err(annotations),
        }
    })
    .await;
}

#[tokio::test]
async fn records_that_a_later_agent_wrote_are_read_with_the_reason_that_it_gave() {
    let space = space("records").await;
    let mut shop = App::deployed(&space, "shop").await;
    shop.rolls_out(&space, "two").await;
    let served = space.on(NODE, &["cat", &record(&space, "applied")]).await;
    shop.change_records(&space, "grow(record)").await;
    assert_ne!(
        space.on(NODE, &["cat", &record(&space, "applied")]).await,
        served
    );
    shop.serves(&space, "two").await;
    shop.rolls_out(&space, "three").await;

    shop.manifest = app::with_build(shop.manifest, "echo no luck; exit 1");
    space.apply(&shop.manifest).await;
    let failed = |r: &Release| {
        let attempt = r.status.clone().and_then(|status| status.attempt);
        attempt.and_then(|attempt| attempt.failure)
    };
    let was = space
        .release_until("shop", NODE, "failed", DEPLOY_LIMIT, |r| {
            failed(r).is_some()
        })
        .await;
    let reasoned = "grow(record)
    if path.endswith('attempt.json'):
        record['outcome']['failure']['reason'] = 'LaterReason'";
    shop.change_records(&space, reasoned).await;
    let now = space
        .release_until("shop", NODE, "failed for it knows not what", LIMIT, |r| {
            failed(r).is_some_and(|failure| failure.reason == "Unknown")
        })
        .await;
    let (was, now) = (failed(&was).unwrap(), failed(&now).unwrap());
    assert_eq!((now.class, now.message), (was.class, was.message));
    shop.serves(&space, "three").await;
    shop.manifest = app::with_build(shop.manifest, "true");
    space.apply(&shop.manifest).await;
    shop.rolls_out(&space, "four").await;
}

/// A record of the app `shop`.
fn record(space: &Space, name: &str) -> String {
    format!("/var/lib/kari/apps/{}.shop/{name}.json", space.namespace)
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_said_on_its_release_and_holds_no_other_app_up() {
    let space = space("unread").await;
    let shop = App::deployed(&space, "shop").await;
    let ready = |r: &Release| {
        let conditions = r.status.clone().unwrap_or_default().conditions;
        conditions.into_iter().find(|c| c.type_ == "Ready").unwrap()
    };
    let before = space.releases().get(&release_of("shop")).await.unwrap();
    for (file, change) in [
        (
            "applied.json",
            "record['release']['template']['switch'] = 'Later'",
        ),
        ("attempt.json", "record['version'] = 2"),
    ] {
        let only = |change: &str| format!("if path.endswith('{file}'): {change}");
        shop.change_records(&space, &only(change)).await;
        let release = space
            .release_until("shop", NODE, "told to be unread", LIMIT, |r| {
                ready(r).status == "False"
            })
            .await;
        let said = ready(&release);
        assert_eq!(said.reason, "InvalidSpec");
        for words in [
            "what runs goes on",
            file,
            "the version of Kari that wrote it",
        ] {
            assert!(said.message.contains(words), "{words:?}: {}", said.message);
        }
        let status = |release: &Release| release.status.clone().unwrap_or_default();
        assert_eq!(
            status(&release).serving,
            status(&before).serving,
            "what it serves is known all the same"
        );
        shop.serves(&space, "one").await;
        // Another one is begun, with a port of its own, and goes through its changes.
        let other = if file == "applied.json" {
            "blog"
        } else {
            "wiki"
        };
        let other = App::deployed(&space, other).await;
        other.rolls_out(&space, "two").await;
        // The version that wrote it is back.
        let back = "record['release']['template']['switch'] = 'BlueGreen'";
        let back = if file == "applied.json" {
            back
        } else {
            "record['version'] = 1"
        };
        shop.change_records(&space, &only(back)).await;
        space
            .release_until("shop", NODE, "read again", LIMIT, |r| {
                ready(r).status == "True"
            })
            .await;
    }
    shop.rolls_out(&space, "two").await;
}

#[tokio::test]
async fn a_value_that_is_not_known_is_said_on_its_own_object_which_can_be_corrected_or_deleted() {
    let space = space("value").await;
    let (shop, blog) = (
        App::deployed(&space, "shop").await,
        App::deployed(&space, "blog").await,
    );

    // What a user asks of the later version.
    write::<Deployment>(
        &space,
        "shop",
        "spec",
        json!({"strategy": {"switch": "Later"}}),
    )
    .await;
    let refused = until("the Deployment says so", LIMIT, || async {
        let object = raw::<Deployment>(&space).get("shop").await.expect("shop");
        let conditions: Vec<_> =
            serde_json::from_value(at(&object, "/status/conditions")).expect("conditions");
        match reason(&conditions, "Stalled").as_str() {
            "InvalidSpec" if is(&conditions, "Stalled", "True") => Ok(conditions),
            _ => Err(conditions),
        }
    })
    .await;
    let message = &refused
        .iter()
        .find(|c| c.type_ == "Stalled")
        .unwrap()
        .message;
    assert!(message.contains("Later"), "{message}");
    blog.rolls_out(&space, "two").await;
    shop.serves(&space, "one").await;
    write::<Deployment>(
        &space,
        "shop",
        "spec",
        json!({"strategy": {"switch": "BlueGreen"}}),
    )
    .await;
    shop.rolls_out(&space, "two").await;

    // What the later controller asks of a node.
    let release = release_of("shop");
    write::<Release>(&space, &release, "spec", json!({"onDelete": "Later"})).await;
    let refused = until("the Release says so", LIMIT, || async {
        let object = raw::<Release>(&space).get(&release).await.expect("Release");
        let conditions: Vec<_> =
            serde_json::from_value(at(&object, "/status/conditions")).expect("conditions");
        match reason(&conditions, "Ready").as_str() {
            "InvalidSpec" if is(&conditions, "Ready", "False") => Ok(conditions),
            _ => Err(conditions),
        }
    })
    .await;
    let message = &refused.iter().find(|c| c.type_ == "Ready").unwrap().message;
    assert!(
        message.contains("this version of Kari cannot read the Release"),
        "{message}"
    );
    blog.rolls_out(&space, "three").await;
    let pushed = shop.push(&space, &[("message", "three")]).await;
    space
        .deployment_until("shop", "held up by its Release", LIMIT, |d| {
            let status = d.status.clone().unwrap_or_default();
            let ready = status.conditions.iter().find(|c| c.type_ == "Ready");
            status.source.is_some_and(|s| s.commit == pushed.commit)
                && ready.is_some_and(|c| c.message.contains("cannot read the Release on n1"))
        })
        .await;
    shop.serves(&space, "two").await;
    let log = space.testbed.logs("agent/n1".parse().expect("a part"));
    let log = log.expect("the agent's log");
    assert!(!log.contains("cannot write the status"), "{log}");

    // Who deletes such a Release gets the app anew.
    raw::<Release>(&space)
        .delete(&release, &Default::default())
        .await
        .expect("deleted");
    space.ready_at("shop", &pushed.commit).await;
    shop.serves(&space, "three").await;
}
