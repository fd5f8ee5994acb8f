//! What the API server refuses and what it takes: the schema, asked of a real one.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

mod support;

use kari::api::Deployment;
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};
use support::gitops::{argo_health, said, write_chart};

/// A namespace in which the schema alone decides, not the policy on sandboxes.
async fn privileged_space() -> support::Space {
    let label = [("kari.dev/sandbox", "privileged")];
    support::Space::labelled(support::control_plane().await, "schema", &label).await
}

/// A manifest that uses every field, to be broken in one place at a time.
fn good() -> Value {
    json!({
        "apiVersion": "kari.dev/v1alpha1",
        "kind": "Deployment",
        "metadata": {"name": "shop"},
        "spec": {
            "placement": {
                "nodeSelector": {"kari.dev/pool": "web"},
                "matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}],
            },
            "source": {"git": {
                "url": "https://git.example.com/shop.git",
                "ref": {"branch": "main"},
                "directory": "services/shop",
                "secretRef": {"name": "shop-git"},
                "submodules": true,
                "allowRewind": false,
                "intervalSeconds": 60,
            }},
            "env": [{"name": "LOG", "value": "info"}, {"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": "shop", "key": "level", "optional": true}}}],
            "envFrom": [{"configMapRef": {"name": "shop", "optional": true}, "prefix": "SHOP_"}],
            "build": {
                "run": "npm ci\nnpm run build",
                "env": [{"name": "npm_config_cache", "value": ".cache/npm"}],
                "network": true,
                "timeoutSeconds": 900,
                "resources": {"limits": {"cpu": "2", "memory": "2Gi", "tasks": 512}},
                "cacheDirectories": [".cache/npm", "target"],
            },
            "processes": [{
                "name": "web",
                "command": ["node", "dist/server.js"],
                "env": [{"name": "MODE", "value": "web"}],
                "type": "Simple",
                "port": {"env": "PORT"},
                "readinessProbe": {"httpGet": {"path": "/healthz"}, "periodSeconds": 2, "timeoutSeconds": 1},
                "livenessProbe": {"exec": {"command": ["sh", "-c", "curl -f localhost:$PORT"]}, "initialDelaySeconds": 5, "successThreshold": 1},
                "resources": {"limits": {"cpu": "500m", "memory": "256Mi", "tasks": 128}},
                "terminationGracePeriodSeconds": 30,
                "stateDirectory": true,
                "sandbox": {"writablePaths": ["/srv/shop"], "addressFamilies": ["AF_INET"], "capabilities": ["CAP_NET_BIND_SERVICE"], "deny": ["JIT"]},
                "route": {"hosts": ["shop.example.com"], "path": "/shop", "tls": {"secretName": "shop-tls"}},
            }],
            "strategy": {"switch": "BlueGreen", "maxUnavailable": 1, "minReadySeconds": 10, "progressDeadlineSeconds": 1800},
            "deletionPolicy": "Orphan",
            "keepReleases": 2,
            "revisionHistoryLimit": 10,
            "suspend": false,
        },
    })
}

/// The good manifest with the value at a JSON pointer replaced, added or, by null, taken away.
fn with(pointer: &str, value: Value) -> Value {
    let mut manifest = good();
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer has a slash");
    let parent = manifest
        .pointer_mut(parent)
        .unwrap_or_else(|| panic!("{pointer}: no such place"));
    match parent {
        Value::Object(map) if value.is_null() => {
            map.remove(key);
        }
        Value::Object(map) => {
            map.insert(key.to_owned(), value);
        }
        Value::Array(items) => {
            let index: usize = key.parse().expect("an index");
            if index == items.len() {
                items.push(value)
            } else {
                items[index] = value
            }
        }
        _ => panic!("{pointer}: not a place for a value"),
    }
    manifest
}

const PROCESS: &str = "/spec/processes/0";
const GIT: &str = "/spec/source/git";

/// What is broken, how, and what the message must say.
fn bad() -> Vec<(&'static str, Value, &'static str)> {
    let process = |field: &str, value: Value| with(&format!("{PROCESS}/{field}"), value);
    let git = |field: &str, value: Value| with(&format!("{GIT}/{field}"), value);
    let mut second = good().pointer(PROCESS).cloned().expect("a process");
    second["name"] = json!("worker");
    let route_path = |path: &str| process("route", json!({"hosts": ["a.test"], "path": path}));
    let sandbox = |value: Value| with(&format!("{PROCESS}/sandbox"), value);
    let caches = |value: Value| with("/spec/build/cacheDirectories", value);
    vec![
        (
            "a name with a dot",
            with("/metadata/name", json!("shop.web")),
            "at most 52 characters without dots",
        ),
        (
            "a name of 53 characters",
            with("/metadata/name", json!("a".repeat(53))),
            "at most 52 characters without dots",
        ),
        (
            "no placement",
            with("/spec/placement", Value::Null),
            "spec.placement: Required value",
        ),
        (
            "no node selector",
            with("/spec/placement/nodeSelector", Value::Null),
            "spec.placement.nodeSelector: Required value",
        ),
        (
            "a label key with a space",
            with("/spec/placement/nodeSelector", json!({"a b": "c"})),
            "a key that is not a label key",
        ),
        (
            "a label value with a slash",
            with("/spec/placement/nodeSelector", json!({"a": "b/c"})),
            "nodeSelector.a",
        ),
        (
            "In without values",
            with("/spec/placement/matchExpressions/0/values", Value::Null),
            "In and NotIn need values",
        ),
        (
            "Exists with values",
            with(
                "/spec/placement/matchExpressions/0/operator",
                json!("Exists"),
            ),
            "Exists and DoesNotExist take no values",
        ),
        (
            "Gt with a word",
            with("/spec/placement/matchExpressions/0/operator", json!("Gt")),
            "Gt and Lt need exactly one value",
        ),
        (
            "an unknown operator",
            with("/spec/placement/matchExpressions/0/operator", json!("Like")),
            "Unsupported value: \"Like\"",
        ),
        (
            "no source",
            with("/spec/source", Value::Null),
            "spec.source: Required value",
        ),
        (
            "an empty source",
            with("/spec/source", json!({})),
            "set exactly one kind of source: git",
        ),
        (
            "a url without a path",
            git("url", json!("https://git.example.com")),
            "must be https://host/path, ssh://",
        ),
        (
            "a url with a space",
            git("url", json!("https://git.example.com/a b")),
            "must be https://host/path, ssh://",
        ),
        (
            "an ext url",
            git("url", json!("ext::sh -c id")),
            "must be https://host/path, ssh://",
        ),
        (
            "a file url",
            git("url", json!("file:///srv/git/shop.git")),
            "must be https://host/path, ssh://",
        ),
        (
            "a url whose host is an option",
            git("url", json!("ssh://-oProxyCommand=id/x")),
            "must be https://host/path, ssh://",
        ),
        (
            "a url with a password",
            git("url", json!("https://me:secret@git.example.com/shop.git")),
            "must not contain a user name or password",
        ),
        (
            "a url with a user for https",
            git("url", json!("https://me@git.example.com/shop.git")),
            "must not contain a user name or password",
        ),
        (
            "a url that is too long",
            git("url", json!(format!("https://h/{}", "a".repeat(1024)))),
            "Too long",
        ),
        (
            "two kinds of reference",
            git("ref", json!({"branch": "main", "tag": "v1"})),
            "set exactly one of branch, tag, semver, name, commit",
        ),
        (
            "no kind of reference",
            git("ref", json!({})),
            "set exactly one of branch, tag, semver, name, commit",
        ),
        (
            "a branch that is an option",
            git("ref", json!({"branch": "--upload-pack=id"})),
            "branch is not a valid git ref name",
        ),
        (
            "a branch with two dots",
            git("ref", json!({"branch": "a..b"})),
            "branch is not a valid git ref name",
        ),
        (
            "a branch with a space",
            git("ref", json!({"branch": "a b"})),
            "branch is not a valid git ref name",
        ),
        (
            "a tag with a caret",
            git("ref", json!({"tag": "v1^"})),
            "tag is not a valid git ref name",
        ),
        (
            "a short commit",
            git("ref", json!({"commit": "4b825dc"})),
            "ref.commit",
        ),
        (
            "a commit in capitals",
            git("ref", json!({"commit": "A".repeat(40)})),
            "ref.commit",
        ),
        (
            "a reference name outside refs/",
            git("ref", json!({"name": "heads/main"})),
            "ref.name",
        ),
        (
            "a directory that leaves the tree",
            git("directory", json!("a/../../etc")),
            "must be a relative path without '..' parts",
        ),
        (
            "an absolute directory",
            git("directory", json!("/etc")),
            "must be a relative path without '..' parts",
        ),
        (
            "a directory with a newline",
            git("directory", json!("a\nExecStart=/bin/sh")),
            "git.directory",
        ),
        (
            "an interval of a second",
            git("intervalSeconds", json!(1)),
            "greater than or equal to 10",
        ),
        (
            "a variable that starts with a digit",
            with("/spec/env/0/name", json!("1LOG")),
            "spec.env[0].name",
        ),
        (
            "a variable of Kari's own",
            with("/spec/env/0/name", json!("KARI_NODE")),
            "names that start with KARI_ are Kari's own",
        ),
        (
            "a variable named twice",
            with("/spec/env/2", json!({"name": "LOG", "value": "b"})),
            "Duplicate value",
        ),
        (
            "a value with NUL",
            with("/spec/env/0/value", json!("a\u{0}b")),
            "spec.env[0].value",
        ),
        (
            "a value that is too long",
            with("/spec/env/0/value", json!("a".repeat(16385))),
            "Too long",
        ),
        (
            "a variable with a value and a reference",
            with("/spec/env/1/value", json!("x")),
            "set value or valueFrom, not both",
        ),
        (
            "a variable from nothing",
            with("/spec/env/1/valueFrom", json!({})),
            "set exactly one kind of reference: configMapKeyRef",
        ),
        (
            "a key with a slash",
            with("/spec/env/1/valueFrom/configMapKeyRef/key", json!("a/b")),
            "configMapKeyRef.key",
        ),
        (
            "a ConfigMap in capitals",
            with("/spec/envFrom/0/configMapRef/name", json!("Shop")),
            "configMapRef.name",
        ),
        (
            "variables from nothing",
            with("/spec/envFrom/0", json!({})),
            "set exactly one kind of reference: configMapRef",
        ),
        (
            "a range with a newline",
            git("ref", json!({"semver": "1.x\n"})),
            "ref.semver",
        ),
        (
            "a range and a tag",
            git("ref", json!({"semver": "1.x", "tag": "v1"})),
            "set exactly one of branch, tag, semver, name, commit",
        ),
        (
            "a build with run and command",
            with("/spec/build/command", json!(["make"])),
            "set exactly one of run, command",
        ),
        (
            "a build with neither",
            with("/spec/build/run", Value::Null),
            "set exactly one of run, command",
        ),
        (
            "a cache directory that leaves the directory",
            caches(json!(["../npm"])),
            "without '.' and '..' parts",
        ),
        (
            "an absolute cache directory",
            caches(json!(["/root/.cache"])),
            "spec.build.cacheDirectories[0]",
        ),
        (
            "a cache directory with a colon, which a mount could misread",
            caches(json!(["a:b"])),
            "spec.build.cacheDirectories[0]",
        ),
        (
            "the directory itself as a cache directory",
            caches(json!(["."])),
            "without '.' and '..' parts",
        ),
        (
            "a cache directory within another",
            caches(json!(["target", "target/debug"])),
            "must not lie within another",
        ),
        (
            "a cache directory twice",
            caches(json!(["target", "target"])),
            "Duplicate value",
        ),
        (
            "nine cache directories",
            caches((0..9).map(|n| json!(format!("c{n}"))).collect()),
            "at most 8 items",
        ),
        (
            "cache directories in a directory that a mount could misread",
            git("directory", json!("services/my shop")),
            "with build.cacheDirectories, source.git.directory",
        ),
        (
            "a build timeout of a second",
            with("/spec/build/timeoutSeconds", json!(1)),
            "greater than or equal to 10",
        ),
        (
            "a quantity of CPU that is none",
            with("/spec/build/resources/limits/cpu", json!("two")),
            "limits.cpu",
        ),
        (
            "a quantity of memory that is none",
            with("/spec/build/resources/limits/memory", json!("2Zi")),
            "limits.memory",
        ),
        (
            "no tasks at all",
            with("/spec/build/resources/limits/tasks", json!(0)),
            "greater than or equal to 1",
        ),
        (
            "no processes",
            with("/spec/processes", json!([])),
            "should have at least 1 items",
        ),
        (
            "two processes of one name",
            with(
                "/spec/processes/1",
                good().pointer(PROCESS).cloned().expect("a process"),
            ),
            "Duplicate value",
        ),
        (
            "two processes with one host and one path",
            with("/spec/processes/1", second),
            "two processes route the same host with the same path",
        ),
        (
            "a process name in capitals",
            process("name", json!("Web")),
            "processes[0].name",
        ),
        (
            "a process name of 33 characters",
            process("name", json!("a".repeat(33))),
            "Too long",
        ),
        (
            "no command",
            process("command", json!([])),
            "should have at least 1 items",
        ),
        (
            "a command that starts with a variable",
            process("command", json!(["A=b", "c"])),
            "the first word of a command names a program",
        ),
        (
            "a command with a control character",
            process("command", json!(["sh", "\u{1b}[2J"])),
            "command[1]",
        ),
        (
            "an unknown type",
            process("type", json!("Forking")),
            "Unsupported value: \"Forking\"",
        ),
        (
            "a route without port",
            process("port", Value::Null),
            "a process with a route needs port",
        ),
        (
            "a port variable that env sets",
            process("env", json!([{"name": "PORT", "value": "1"}])),
            "env must not set the variable that port.env names",
        ),
        (
            "a port variable of Kari's own",
            process("port", json!({"env": "KARI_PORT"})),
            "names that start with KARI_ are Kari's own",
        ),
        (
            "a probe of two kinds",
            process("readinessProbe", json!({"httpGet": {}, "tcpSocket": {}})),
            "set exactly one of httpGet, tcpSocket, exec",
        ),
        (
            "a probe of no kind",
            process("readinessProbe", json!({})),
            "set exactly one of httpGet, tcpSocket, exec",
        ),
        (
            "a probe by a command without a program",
            process("readinessProbe", json!({"exec": {"command": ["A=1"]}})),
            "the first word of a command names a program",
        ),
        (
            "a worker without a port that is asked for one",
            with(
                PROCESS,
                json!({"name": "worker", "command": ["./worker"], "livenessProbe": {"tcpSocket": {}}}),
            ),
            "an httpGet or tcpSocket livenessProbe needs port",
        ),
        (
            "a liveness probe of no kind",
            process("livenessProbe", json!({"periodSeconds": 5})),
            "set exactly one of httpGet, tcpSocket, exec",
        ),
        (
            "a liveness probe that wants two successes",
            process(
                "livenessProbe",
                json!({"tcpSocket": {}, "successThreshold": 2}),
            ),
            "less than or equal to 1",
        ),
        (
            "a probe that outlasts its period",
            process(
                "readinessProbe",
                json!({"tcpSocket": {}, "timeoutSeconds": 5}),
            ),
            "timeoutSeconds must not exceed periodSeconds",
        ),
        (
            "a probe path without a slash",
            process("readinessProbe", json!({"httpGet": {"path": "healthz"}})),
            "httpGet.path",
        ),
        (
            "a probe header with a newline",
            process(
                "readinessProbe",
                json!({"httpGet": {"httpHeaders": [{"name": "A", "value": "b\r\nC: d"}]}}),
            ),
            "httpHeaders[0].value",
        ),
        (
            "a grace period of two hours",
            process("terminationGracePeriodSeconds", json!(7200)),
            "less than or equal to 3600",
        ),
        (
            "a writable /etc",
            sandbox(json!({"writablePaths": ["/etc"]})),
            "is a path that no service may write",
        ),
        (
            "a writable path of Kari's own",
            sandbox(json!({"writablePaths": ["/var/lib/kari/apps"]})),
            "is a path that no service may write",
        ),
        (
            "a writable path with dots",
            sandbox(json!({"writablePaths": ["/srv/../etc"]})),
            "must be an absolute path without '.' and '..' parts",
        ),
        (
            "a capability that none may have",
            sandbox(json!({"capabilities": ["CAP_SYS_ADMIN"]})),
            "Unsupported value: \"CAP_SYS_ADMIN\"",
        ),
        (
            "a port without internet sockets",
            sandbox(json!({"addressFamilies": ["AF_UNIX"]})),
            "a process with a port needs AF_INET or AF_INET6",
        ),
        (
            "raw sockets without a family",
            sandbox(json!({"capabilities": ["CAP_NET_RAW"]})),
            "CAP_NET_RAW needs addressFamilies",
        ),
        (
            "a host that is a rule of nginx",
            process("route", json!({"hosts": ["a.test; return 200 x"]})),
            "route.hosts[0]",
        ),
        (
            "a host in capitals",
            process("route", json!({"hosts": ["Shop.example.com"]})),
            "route.hosts[0]",
        ),
        (
            "a route with TLS of no Secret",
            process("route", json!({"hosts": ["a.test"], "tls": {}})),
            "route.tls.secretName: Required value",
        ),
        (
            "a route with TLS of a Secret that has no name",
            process(
                "route",
                json!({"hosts": ["a.test"], "tls": {"secretName": "Shop TLS"}}),
            ),
            "route.tls.secretName in body should match",
        ),
        (
            "a credential without a name",
            git("secretRef", json!({})),
            "git.secretRef.name: Required value",
        ),
        (
            "a credential that would go in the clear",
            {
                let mut manifest = git("secretRef", json!({"name": "shop-git"}));
                manifest["spec"]["source"]["git"]["url"] = json!("http://git.example.com/shop.git");
                manifest
            },
            "secretRef needs an https or ssh url",
        ),
        (
            "a route without hosts",
            process("route", json!({"hosts": []})),
            "should have at least 1 items",
        ),
        (
            "a path that is relative",
            route_path("shop"),
            "route.path in body should match",
        ),
        (
            "a path that is a rule of nginx",
            route_path("/a { return 200 x; }"),
            "route.path in body should match",
        ),
        (
            "a path with an escape",
            route_path("/a%2fb"),
            "route.path in body should match",
        ),
        (
            "a path that goes up",
            route_path("/a/../b"),
            "must not have '.' or '..' parts",
        ),
        (
            "a path with an empty part",
            route_path("/a//b"),
            "must not end with '/' or have '//'",
        ),
        (
            "a path with a slash at the end",
            route_path("/a/"),
            "must not end with '/' or have '//'",
        ),
        (
            "a path of Kari's own",
            route_path("/.well-known/kari"),
            "/.well-known/kari is Kari's own",
        ),
        (
            "a path of 257 characters",
            route_path(&format!("/{}", "a".repeat(256))),
            "Too long",
        ),
        (
            "a way to switch that there is not",
            with("/spec/strategy/switch", json!("Canary")),
            "Unsupported value: \"Canary\"",
        ),
        (
            "no node at a time",
            with("/spec/strategy/maxUnavailable", json!(0)),
            "greater than or equal to 1",
        ),
        (
            "no percent of the nodes",
            with("/spec/strategy/maxUnavailable", json!("0%")),
            "maxUnavailable",
        ),
        (
            "a number of nodes in quotes",
            with("/spec/strategy/maxUnavailable", json!("25")),
            "maxUnavailable",
        ),
        (
            "a deadline before the end of the bake",
            with("/spec/strategy/progressDeadlineSeconds", json!(10)),
            "progressDeadlineSeconds must be greater than minReadySeconds",
        ),
        (
            "21 old builds",
            with("/spec/keepReleases", json!(21)),
            "less than or equal to 20",
        ),
        (
            "a deletion policy of another kind's",
            with("/spec/deletionPolicy", json!("Retain")),
            "supported values: \"Delete\", \"Orphan\"",
        ),
        (
            "no history",
            with("/spec/revisionHistoryLimit", json!(0)),
            "greater than or equal to 1",
        ),
        (
            "a field that is not in the schema",
            with("/spec/source/git/depth", json!(1)),
            "unknown field \"spec.source.git.depth\"",
        ),
    ]
}

/// Manifests that are taken, each with what is particular about it.
fn accepted() -> Vec<(&'static str, Value)> {
    let git = |field: &str, value: Value| with(&format!("{GIT}/{field}"), value);
    vec![
        ("every field", good()),
        (
            "every node",
            with("/spec/placement", json!({"nodeSelector": {}})),
        ),
        (
            "an scp-like url",
            git("url", json!("git@git.example.com:shop.git")),
        ),
        (
            "an ssh url with a port",
            git("url", json!("ssh://git@git.example.com:2222/shop.git")),
        ),
        ("a tag", git("ref", json!({"tag": "v1.2.3"}))),
        (
            "a commit",
            git(
                "ref",
                json!({"commit": "4b825dc642cb6eb9a060e54bf8d69288fbee4904"}),
            ),
        ),
        (
            "a full reference",
            git("ref", json!({"name": "refs/pull/7/head"})),
        ),
        ("no build, no strategy, no reference", {
            let mut manifest = git("ref", Value::Null);
            let spec = manifest["spec"].as_object_mut().expect("a spec");
            spec.remove("build");
            spec.remove("strategy");
            manifest
        }),
        (
            "a worker without port",
            with(PROCESS, json!({"name": "worker", "command": ["./worker"]})),
        ),
        (
            "a worker that is probed by a command",
            with(
                PROCESS,
                json!({"name": "worker", "command": ["./worker"], "readinessProbe": {"exec": {"command": ["./check"]}}}),
            ),
        ),
        (
            "numbers for quantities",
            with(
                "/spec/build/resources/limits",
                json!({"cpu": 2, "memory": 268435456}),
            ),
        ),
        (
            "a quarter of the nodes",
            with("/spec/strategy/maxUnavailable", json!("25%")),
        ),
        (
            "a wildcard host",
            with(
                &format!("{PROCESS}/route"),
                json!({"hosts": ["*.example.com"]}),
            ),
        ),
        (
            "a range of versions",
            with(
                &format!("{GIT}/ref"),
                json!({"semver": ">=1.0.0, <3.0.0 || ^4.1"}),
            ),
        ),
        (
            "a variable with a name alone",
            with("/spec/env/0", json!({"name": "LOG"})),
        ),
        (
            "a path of everything",
            with(
                &format!("{PROCESS}/route"),
                json!({"hosts": ["a.test"], "path": "/"}),
            ),
        ),
        ("two processes that share a host", {
            let mut second = good().pointer(PROCESS).cloned().expect("a process");
            second["name"] = json!("api");
            second["route"]["path"] = json!("/shop/api");
            with("/spec/processes/1", second)
        }),
        ("16 processes that share 16 hosts", {
            let hosts: Vec<_> = (0..16)
                .map(|n| format!("{}{n:02}", "a".repeat(61)))
                .collect();
            let mut manifest = good();
            let process = |n: usize| {
                let mut process = good().pointer(PROCESS).cloned().expect("a process");
                process["name"] = json!(format!("p{n}"));
                process["route"] =
                    json!({"hosts": hosts, "path": format!("/{}{n:02}", "a".repeat(253))});
                process
            };
            manifest["spec"]["processes"] = (0..16).map(process).collect();
            manifest
        }),
        (
            "an environment value of several lines",
            with("/spec/env/0/value", json!("a\n$b\t\"c\" %d")),
        ),
    ]
}

fn api(client: kube::Client, namespace: &str) -> Api<DynamicObject> {
    let kind = ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("kari.dev", "v1alpha1", "Deployment"),
        "deployments",
    );
    Api::namespaced_with(client, namespace, &kind)
}

#[tokio::test]
async fn bad_manifests_are_refused_with_a_message_that_says_what_to_change() {
    let testbed = support::control_plane().await;
    let api = api(testbed.client().await.expect("a client"), "default");
    let cases = bad();
    assert!(cases.len() >= 50);
    let mut wrong = Vec::new();
    for (what, manifest, expected) in cases {
        let object: DynamicObject = serde_json::from_value(manifest).expect("an object");
        let parameters = PostParams {
            dry_run: true,
            field_manager: None,
        };
        // Strict, as kubectl asks for it: an unknown field is an error.
        match strict_create(&api, &parameters, &object).await {
            Ok(()) => wrong.push(format!("{what}: taken")),
            Err(message) if message.contains(expected) => {}
            Err(message) => wrong.push(format!("{what}: refused, but with: {message}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn good_manifests_are_taken_and_read_back() {
    let space = privileged_space().await;
    let api = api(space.client.clone(), &space.namespace);
    for (number, (what, mut manifest)) in accepted().into_iter().enumerate() {
        manifest["metadata"]["name"] = json!(format!("good-{number}"));
        let object: DynamicObject = serde_json::from_value(manifest).expect("an object");
        if let Err(error) = strict_create(&api, &PostParams::default(), &object).await {
            panic!("{what}: {error}");
        }
        let typed: Api<Deployment> = space.deployments();
        let stored = typed
            .get(&format!("good-{number}"))
            .await
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(
            stored.status.map(|s| s.observed_generation),
            Some(-1),
            "{what}: kstatus must not call an unseen object Current"
        );
    }
}

#[tokio::test]
async fn a_reference_changes_its_kind_by_server_side_apply_and_by_merge() {
    let space = privileged_space().await;
    let api = api(space.client.clone(), &space.namespace);
    let parameters = PatchParams::apply("test").force();
    let kinds = [
        json!({"branch": "main"}),
        json!({"tag": "v1"}),
        json!({"commit": "a".repeat(40)}),
        Value::Null,
        json!({"name": "refs/heads/x"}),
    ];
    for reference in &kinds {
        let manifest = with(&format!("{GIT}/ref"), reference.clone());
        api.patch("shop", &parameters, &Patch::Apply(&manifest))
            .await
            .unwrap_or_else(|e| panic!("apply {reference}: {e}"));
    }
    // What client-side apply sends: a merge patch that clears what the last manifest had.
    for (patch, what) in [
        (json!({"name": null, "tag": "v2"}), "name to tag"),
        (json!({"tag": null, "branch": "dev"}), "tag to branch"),
    ] {
        let patch = json!({"spec": {"source": {"git": {"ref": patch}}}});
        api.patch("shop", &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    for build in [json!({"command": ["make"]}), json!({"run": "make"})] {
        let manifest = with("/spec/build", build.clone());
        api.patch("shop", &parameters, &Patch::Apply(&manifest))
            .await
            .unwrap_or_else(|e| panic!("apply {build}: {e}"));
    }
}

async fn strict_create(
    api: &Api<DynamicObject>,
    parameters: &PostParams,
    object: &DynamicObject,
) -> Result<(), String> {
    let request = kube::core::Request::new(api.resource_url());
    let body = serde_json::to_vec(object).map_err(|e| e.to_string())?;
    let mut request = request
        .create(parameters, body)
        .map_err(|e| e.to_string())?;
    let uri = request.uri().to_string();
    let separator = if uri.contains('?') { '&' } else { '?' };
    *request.uri_mut() = format!("{uri}{separator}fieldValidation=Strict")
        .parse()
        .expect("a URI with one more parameter");
    api.clone()
        .into_client()
        .request::<Value>(request)
        .await
        .map(drop)
        .map_err(|e| e.to_string())
}

#[tokio::test]
async fn a_label_of_the_namespace_says_which_exceptions_to_the_jail_are_taken() {
    let testbed = support::control_plane().await;
    let none = json!({"deny": ["JIT"], "addressFamilies": ["AF_UNIX", "AF_INET"]});
    let bind = json!({"capabilities": ["CAP_NET_BIND_SERVICE"]});
    let wide = json!({"capabilities": ["CAP_NET_ADMIN"], "writablePaths": ["/srv/shop"]});
    // The label, and which of the three are taken.
    let table = [
        (None, [true, true, false]),
        (Some("restricted"), [true, false, false]),
        (Some("baseline"), [true, true, false]),
        (Some("privileged"), [true, true, true]),
        (Some("privilegd"), [false, false, false]),
    ];
    for (level, taken) in table {
        let labels: Vec<_> = level
            .map(|level| ("kari.dev/sandbox", level))
            .into_iter()
            .collect();
        let space = support::Space::labelled(testbed, "level", &labels).await;
        for (sandbox, taken) in [&none, &bind, &wide].into_iter().zip(taken) {
            let mut manifest = good();
            manifest["spec"]["processes"][0]["sandbox"] = sandbox.clone();
            let parameters = PatchParams::apply("test").dry_run();
            let patch = Patch::Apply(&manifest);
            let api = api(space.client.clone(), &space.namespace);
            let answer = api.patch("shop", &parameters, &patch).await;
            match answer {
                Ok(_) => assert!(taken, "{level:?} takes {sandbox}"),
                Err(error) => {
                    let message = error.to_string();
                    assert!(!taken, "{level:?} {sandbox}: {message}");
                    let wanted = match level {
                        Some("privilegd") => {
                            "an administrator sets it to restricted, baseline or privileged"
                        }
                        Some("restricted") if sandbox == &bind => "to baseline",
                        Some(_) | None => "to privileged",
                    };
                    assert!(message.contains(wanted), "{level:?} {sandbox}: {message}");
                }
            }
        }
    }
}

#[tokio::test]
async fn what_no_controller_has_seen_is_in_progress_for_helm_and_argo_cd() {
    let space = privileged_space().await;
    let chart = support::folder(&[]);
    write_chart(chart.path(), &good());
    let path = chart.path().display().to_string();
    let install = ["install", "shop", &path, "--wait", "--timeout=2s"];
    let installed = space.run("helm", &install).await;
    let said = said(&installed);
    assert!(!installed.status.success(), "{said}");
    assert!(
        said.contains("InProgress") && said.contains("not ready"),
        "{said}"
    );
    let deployment = space
        .deployments()
        .get("shop")
        .await
        .expect("the Deployment");
    assert_eq!(argo_health(&deployment), "Progressing");
}
