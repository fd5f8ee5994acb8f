//! The chart, as helm renders it: what is there by default, what each value
//! changes and nothing beside, and what helm refuses.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it must be"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use clap::{Arg, CommandFactory as _};
use serde_json::{Value, json};
use testbed::program::ControlPlane;

/// What must be said: the chart has no image by default.
const IMAGE: &str = "example.com/kari";

/// Where the chart is installed in these tests, which is not where testbeds have it.
const NAMESPACE: &str = "elsewhere";

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("charts/kari")
}

fn helm(arguments: &[&str]) -> Output {
    static HELM: LazyLock<PathBuf> = LazyLock::new(|| {
        let plane = ControlPlane::ensure().expect("the control plane's programs");
        plane.component("helm").unwrap_or_else(|| "helm".into())
    });
    Command::new(&*HELM)
        .args(arguments)
        .output()
        .expect("helm runs")
}

/// What helm renders with the values, or what it says instead.
fn render(values: &Value) -> Result<Vec<Value>, String> {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let mut values = values.clone();
    let repository = &mut values["image"]["repository"];
    if repository.is_null() {
        *repository = json!(IMAGE);
    }
    std::fs::write(file.path(), values.to_string()).expect("the values");
    let chart = chart().display().to_string();
    let values = format!("--values={}", file.path().display());
    let namespace = format!("--namespace={NAMESPACE}");
    let output = helm(&["template", "kari", &chart, &namespace, &values]);
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let objects = format!("\n{text}")
        .split("\n---")
        .map(|document| serde_saphyr::from_str::<Value>(document).expect("YAML"))
        .filter(|object| !object.is_null())
        .collect();
    Ok(objects)
}

fn rendered(values: &Value) -> Vec<Value> {
    render(values).unwrap_or_else(|error| panic!("{values}: {error}"))
}

/// `Kind/name`, with the namespace where it is not the installation's.
fn id(object: &Value) -> String {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    let name = text("/metadata/name").expect("a name");
    let kind = text("/kind").expect("a kind");
    match text("/metadata/namespace") {
        Some(namespace) if namespace != NAMESPACE => format!("{kind}/{namespace}/{name}"),
        Some(_) | None => format!("{kind}/{name}"),
    }
}

fn find<'a>(objects: &'a [Value], wanted: &str) -> &'a Value {
    objects
        .iter()
        .find(|object| id(object) == wanted)
        .unwrap_or_else(|| panic!("there is no {wanted}"))
}

#[test]
fn helm_lint_has_nothing_to_say_against_it() {
    let chart = chart().display().to_string();
    let output = helm(&["lint", "--strict", &chart, "--set=image.repository=x"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("[WARNING]"), "{said}");
}

#[test]
fn its_version_and_the_images_are_the_programs() {
    let text = include_str!("../charts/kari/Chart.yaml");
    let meta: Value = serde_saphyr::from_str(text).expect("YAML");
    assert_eq!(meta["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(meta["appVersion"], env!("CARGO_PKG_VERSION"));
    let label = concat!(
        "LABEL org.opencontainers.image.version=",
        env!("CARGO_PKG_VERSION")
    );
    let image = include_str!("../Dockerfile");
    assert!(image.lines().any(|line| line == label), "{image}");
}

#[test]
fn by_default_it_has_these_objects() {
    let objects = rendered(&json!({}));
    let mut ids: Vec<String> = objects.iter().map(id).collect();
    ids.sort();
    let expected = "\
ClusterRole/kari-agent
ClusterRole/kari-controller
ClusterRole/kari-edit
ClusterRole/kari-view
ClusterRoleBinding/kari-agent
ClusterRoleBinding/kari-controller
ConfigMap/kari-tenants
CustomResourceDefinition/deployments.kari.dev
CustomResourceDefinition/releases.kari.dev
DaemonSet/kari-agent
Deployment/kari-controller
Job/kari-uninstall-check
NetworkPolicy/kari-controller
PodDisruptionBudget/kari-controller
PriorityClass/kari-agent
PriorityClass/kari-controller
Role/kari-agent
Role/kari-controller
RoleBinding/kari-agent
RoleBinding/kari-controller
Service/kari-controller-metrics
ServiceAccount/kari-agent
ServiceAccount/kari-controller
ValidatingAdmissionPolicy/kari-agent-own-node
ValidatingAdmissionPolicy/kari-sandbox
ValidatingAdmissionPolicy/kari-tenants
ValidatingAdmissionPolicyBinding/kari-agent-own-node
ValidatingAdmissionPolicyBinding/kari-sandbox
ValidatingAdmissionPolicyBinding/kari-tenants
ValidatingAdmissionPolicyBinding/kari-tenants-again";
    assert_eq!(ids.join("\n"), expected);
}

#[test]
fn the_definitions_come_with_it_and_stay_when_it_goes() {
    let objects = rendered(&json!({}));
    for definition in kari::api::definitions().expect("definitions") {
        let wanted = serde_json::to_value(&definition).expect("JSON");
        let found = find(&objects, &id(&wanted));
        assert_eq!(found["spec"], wanted["spec"]);
        let policy = &found["metadata"]["annotations"]["helm.sh/resource-policy"];
        assert_eq!(policy, "keep");
    }
}

/// The rules of a role: a line each.
fn rules(role: &Value) -> BTreeSet<String> {
    let words = |list: &Value| -> String {
        let words = list.as_array().into_iter().flatten();
        let words: Vec<&str> = words.filter_map(Value::as_str).collect();
        words.join(",")
    };
    let rules = role["rules"].as_array().expect("rules");
    rules
        .iter()
        .map(|rule| {
            format!(
                "{} {}: {}",
                words(&rule["apiGroups"]),
                words(&rule["resources"]),
                words(&rule["verbs"])
            )
        })
        .collect()
}

#[test]
fn an_agent_may_write_statuses_of_releases_and_its_lease_and_read_releases() {
    let objects = rendered(&json!({}));
    let cluster = rules(find(&objects, "ClusterRole/kari-agent"));
    let expected = [
        "kari.dev releases/status: patch",
        "kari.dev releases: get,list,watch",
    ];
    assert_eq!(cluster, expected.map(str::to_owned).into());
    let own = rules(find(&objects, "Role/kari-agent"));
    let expected = ["coordination.k8s.io leases: get,create,update"];
    assert_eq!(own, expected.map(str::to_owned).into());
}

#[test]
fn nothing_has_a_wildcard_and_nobody_lists_secrets() {
    for object in rendered(&json!({"controller": {"secretNamespaces": ["web"]}})) {
        if !["Role", "ClusterRole"].contains(&object["kind"].as_str().unwrap_or_default()) {
            continue;
        }
        for rule in rules(&object) {
            assert!(!rule.contains('*'), "{}: {rule}", id(&object));
            let secrets = rule.contains("secrets") && rule.starts_with(' ');
            let reads_all = rule.contains("list") || rule.contains("watch");
            assert!(!(secrets && reads_all), "{}: {rule}", id(&object));
        }
    }
}

#[test]
fn every_pod_is_as_tight_as_its_work_allows() {
    let objects = rendered(&json!({}));
    for wanted in [
        "Deployment/kari-controller",
        "DaemonSet/kari-agent",
        "Job/kari-uninstall-check",
    ] {
        let pod = &find(&objects, wanted)["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let security = &container["securityContext"];
        assert_eq!(security["readOnlyRootFilesystem"], true, "{wanted}");
        assert_eq!(security["allowPrivilegeEscalation"], false, "{wanted}");
        assert_eq!(security["capabilities"]["drop"], json!(["ALL"]), "{wanted}");
        assert!(
            container["resources"]["limits"]["memory"].is_string(),
            "{wanted}"
        );
        let is_agent = wanted == "DaemonSet/kari-agent";
        let seccomp = if is_agent {
            security
        } else {
            &pod["securityContext"]
        };
        assert_eq!(
            seccomp["seccompProfile"]["type"], "RuntimeDefault",
            "{wanted}"
        );
        for flag in ["hostPID", "hostIPC", "shareProcessNamespace"] {
            assert_ne!(pod[flag], true, "{wanted}");
        }
        assert_ne!(security["privileged"], true, "{wanted}");
        if !is_agent {
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{wanted}");
            assert_ne!(pod["hostNetwork"], true, "{wanted}");
        }
        if !wanted.starts_with("Job/") {
            for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
                assert!(container[probe].is_object(), "{wanted} has no {probe}");
            }
        }
    }
    let agent = &find(&objects, "DaemonSet/kari-agent")["spec"]["template"]["spec"];
    let added = &agent["containers"][0]["securityContext"]["capabilities"]["add"];
    assert_eq!(added, &json!(["CHOWN", "DAC_OVERRIDE", "FOWNER"]));
}

#[test]
fn each_host_path_and_each_capability_has_its_reason_beside_it() {
    let text = include_str!("../charts/kari/templates/agent.yaml");
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut paths = 0;
    for (at, line) in lines.iter().enumerate() {
        if line.starts_with("hostPath:") {
            paths += 1;
            assert!(lines[at - 2].starts_with('#'), "no reason above {line}");
        }
    }
    assert_eq!(paths, 10);
    let after = lines.iter().skip_while(|line| **line != "add:").skip(1);
    let capabilities: Vec<_> = after.take_while(|line| line.starts_with("- ")).collect();
    assert_eq!(capabilities.len(), 3);
    for line in capabilities {
        assert!(line.contains(" # "), "no reason beside {line}");
    }
}

#[test]
fn every_flag_of_the_programs_is_set_by_a_value() {
    let all = kari::arguments::Arguments::command();
    for (part, text) in [
        (
            "controller",
            include_str!("../charts/kari/templates/controller.yaml"),
        ),
        ("agent", include_str!("../charts/kari/templates/agent.yaml")),
    ] {
        let command = all.find_subcommand(part).expect("a part");
        let flags: Vec<_> = command.get_arguments().filter_map(Arg::get_long).collect();
        assert!(flags.len() >= 4, "{part}: {flags:?}");
        for flag in flags {
            // What is for all parts is set by a variable.
            let in_general = all.get_arguments().any(|arg| arg.get_long() == Some(flag));
            let there = text.contains(&format!("- --{flag}"));
            assert!(
                there || in_general,
                "the chart never gives --{flag} to the {part}"
            );
        }
    }
}

#[test]
fn an_image_must_be_named() {
    let chart = chart().display().to_string();
    let output = helm(&["template", "kari", &chart]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        said.contains("set image.repository to where your cluster pulls"),
        "{said}"
    );
}

#[test]
fn values_that_mean_nothing_are_refused() {
    let table = [
        (
            json!({"controler": {"replicas": 3}}),
            "additional properties 'controler' not allowed",
        ),
        (
            json!({"agent": {"httpport": 80}}),
            "additional properties 'httpport' not allowed",
        ),
        (
            json!({"controller": {"replicas": 0}}),
            "/controller/replicas",
        ),
        (
            json!({"image": {"pullPolicy": "never"}}),
            "must be one of 'Always', 'IfNotPresent', 'Never'",
        ),
        (json!({"image": {"digest": "abc"}}), "/image/digest"),
        (
            json!({"tenancy": {"defaultSandbox": "open"}}),
            "must be one of 'restricted', 'baseline', 'privileged'",
        ),
        (
            json!({"agent": {"maxUnavailable": "0%"}}),
            "/agent/maxUnavailable",
        ),
        (json!({"agent": {"toolPath": "bin"}}), "/agent/toolPath"),
        (
            json!({"controller": {"secretNamespaces": ["Web"]}}),
            "/controller/secretNamespaces/0",
        ),
    ];
    for (values, wanted) in table {
        let said = render(&values).expect_err("refused");
        assert!(said.contains(wanted), "{values}: {said}");
    }
}

/// The leaves of an object, by their paths; lists of named things by their names,
/// other lists by their entries.
fn leaves(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                leaves(value, &format!("{path}.{name}"), found);
            }
        }
        Value::Array(entries) if !entries.is_empty() => {
            for entry in entries {
                match entry.get("name").and_then(Value::as_str) {
                    Some(name) => leaves(entry, &format!("{path}[{name}]"), found),
                    None => {
                        found.insert(format!("{path}[] {entry}"));
                    }
                }
            }
        }
        leaf => {
            found.insert(format!("{path} {leaf}"));
        }
    }
}

/// What the values change: `+` what is new, `-` what is gone; whole objects by their names.
fn changes(before: &BTreeMap<String, Value>, after: &BTreeMap<String, Value>) -> Vec<String> {
    let mut lines = Vec::new();
    let all: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for name in all {
        match (before.get(name), after.get(name)) {
            (Some(_), None) => lines.push(format!("- {name}")),
            (None, Some(_)) => lines.push(format!("+ {name}")),
            (Some(old), Some(new)) => {
                let (mut before, mut after) = (BTreeSet::new(), BTreeSet::new());
                leaves(old, name, &mut before);
                leaves(new, name, &mut after);
                lines.extend(before.difference(&after).map(|leaf| format!("- {leaf}")));
                lines.extend(after.difference(&before).map(|leaf| format!("+ {leaf}")));
            }
            (None, None) => {}
        }
    }
    lines
}

fn by_id(values: &Value) -> BTreeMap<String, Value> {
    let objects = rendered(values);
    objects.into_iter().map(|o| (id(&o), o)).collect()
}

/// A value, another content of it than the default, and all that it changes. `…` stands for any text.
struct Row(&'static str, Value, &'static [&'static str]);

fn table() -> Vec<Row> {
    let volume = json!([{"name": "trust", "configMap": {"name": "trust"}}]);
    let mount = json!([{"name": "trust", "mountPath": "/etc/ssh"}]);
    vec![
        Row(
            "image.repository",
            json!("registry.example.org/kari"),
            &["…3", "+ … \"registry.example.org/kari:0.1.0\""],
        ),
        Row(
            "image.tag",
            json!("v9"),
            &["…3", "+ … \"example.com/kari:v9\""],
        ),
        Row(
            "image.digest",
            json!(format!("sha256:{}", "a".repeat(64))),
            &[
                "…3",
                "+ … \"example.com/kari@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"",
            ],
        ),
        Row(
            "image.pullPolicy",
            json!("Never"),
            &["…3", "+ ….imagePullPolicy \"Never\""],
        ),
        Row(
            "imagePullSecrets",
            json!([{"name": "pull"}]),
            &["…3", "+ ….imagePullSecrets[pull].name \"pull\""],
        ),
        Row(
            "log.format",
            json!("text"),
            &["…2", "+ ….env[KARI_LOG_FORMAT].value \"text\""],
        ),
        Row(
            "log.level",
            json!("kari=debug,kube=warn"),
            &[
                "…2",
                "+ ….env[KARI_LOG_LEVEL].value \"kari=debug,kube=warn\"",
            ],
        ),
        Row(
            "crds.install",
            json!(false),
            &[
                "- CustomResourceDefinition/deployments.kari.dev",
                "- CustomResourceDefinition/releases.kari.dev",
            ],
        ),
        Row(
            "priorityClasses.create",
            json!(false),
            &[
                "- DaemonSet/kari-agent.spec.template.spec.priorityClassName \"kari-agent\"",
                "- Deployment/kari-controller.spec.template.spec.priorityClassName \"kari-controller\"",
                "- PriorityClass/kari-agent",
                "- PriorityClass/kari-controller",
            ],
        ),
        Row(
            "controller.replicas",
            json!(3),
            &[
                "- Deployment/kari-controller.spec.replicas 2",
                "+ Deployment/kari-controller.spec.replicas 3",
            ],
        ),
        Row(
            "controller.secretNamespaces",
            json!(["web", "shop"]),
            &[
                "- ClusterRole/kari-controller.rules[] {\"apiGroups\":[\"\"],\"resources\":[\"secrets\",\"configmaps\"],\"verbs\":[\"get\"]}",
                "+ Role/shop/kari-controller-references",
                "+ Role/web/kari-controller-references",
                "+ RoleBinding/shop/kari-controller-references",
                "+ RoleBinding/web/kari-controller-references",
            ],
        ),
        Row(
            "controller.insecureSourceSchemes",
            json!(true),
            &["+ Deployment/kari-controller….args[] \"--insecure-source-schemes\""],
        ),
        Row(
            "controller.sourceSlots",
            json!(3),
            &[
                "- ….args[] \"--source-slots=8\"",
                "+ Deployment/kari-controller….args[] \"--source-slots=3\"",
            ],
        ),
        Row(
            "controller.resources",
            json!({"requests": {"cpu": "1"}}),
            &[
                "- Deployment/kari-controller….resources.requests.cpu \"50m\"",
                "+ Deployment/kari-controller….resources.requests.cpu \"1\"",
            ],
        ),
        Row(
            "controller.nodeSelector",
            json!({"pool": "infra"}),
            &[
                "+ Deployment/kari-controller.spec.template.spec.nodeSelector.pool \"infra\"",
                "+ Job/kari-uninstall-check.spec.template.spec.nodeSelector.pool \"infra\"",
            ],
        ),
        Row(
            "controller.tolerations",
            json!([{"operator": "Exists"}]),
            &[
                "+ Deployment/kari-controller….tolerations[] {\"operator\":\"Exists\"}",
                "+ Job/kari-uninstall-check….tolerations[] {\"operator\":\"Exists\"}",
            ],
        ),
        Row(
            "controller.priorityClassName",
            json!("high"),
            &[
                "- ….priorityClassName \"kari-controller\"",
                "+ Deployment/kari-controller….priorityClassName \"high\"",
            ],
        ),
        Row(
            "controller.extraArguments",
            json!(["--log-level=debug"]),
            &["+ Deployment/kari-controller….args[] \"--log-level=debug\""],
        ),
        Row(
            "controller.extraEnv",
            json!([{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]),
            &[
                "+ Deployment/kari-controller….env[HTTPS_PROXY].name …",
                "+ Deployment/kari-controller….env[HTTPS_PROXY].value \"http://proxy:3128\"",
            ],
        ),
        Row(
            "controller.extraVolumes",
            volume.clone(),
            &[
                "+ Deployment/kari-controller….volumes[trust].configMap.name \"trust\"",
                "+ Deployment/kari-controller….volumes[trust].name \"trust\"",
            ],
        ),
        Row(
            "controller.extraVolumeMounts",
            mount.clone(),
            &[
                "+ Deployment/kari-controller….volumeMounts[trust].mountPath \"/etc/ssh\"",
                "+ ….volumeMounts[trust].name \"trust\"",
            ],
        ),
        Row(
            "agent.nodeSelector",
            json!({"kari": "yes"}),
            &["+ DaemonSet/kari-agent.spec.template.spec.nodeSelector.kari \"yes\""],
        ),
        Row(
            "agent.tolerations",
            json!([]),
            &["- DaemonSet/kari-agent.spec.template.spec.tolerations[] {\"operator\":\"Exists\"}"],
        ),
        Row(
            "agent.resources",
            json!({"limits": {"memory": "1Gi"}}),
            &[
                "- DaemonSet/kari-agent….resources.limits.memory \"512Mi\"",
                "+ DaemonSet/kari-agent….resources.limits.memory \"1Gi\"",
            ],
        ),
        Row(
            "agent.maxUnavailable",
            json!(3),
            &[
                "- DaemonSet/kari-agent.spec.updateStrategy.rollingUpdate.maxUnavailable \"10%\"",
                "+ DaemonSet/kari-agent.spec.updateStrategy.rollingUpdate.maxUnavailable 3",
            ],
        ),
        Row(
            "agent.httpPort",
            json!(8000),
            &[
                "- ….args[] \"--http-port=80\"",
                "+ DaemonSet/kari-agent….args[] \"--http-port=8000\"",
            ],
        ),
        Row(
            "agent.httpsPort",
            json!(0),
            &[
                "- ….args[] \"--https-port=443\"",
                "+ DaemonSet/kari-agent….args[] \"--https-port=0\"",
            ],
        ),
        Row(
            "agent.healthPort",
            json!(9000),
            &[
                "- ….args[] \"--listen=127.0.0.1:8081\"",
                "- ….ports[http].containerPort 8081",
                "+ DaemonSet/kari-agent….args[] \"--listen=127.0.0.1:9000\"",
                "+ ….ports[http].containerPort 9000",
            ],
        ),
        Row(
            "agent.toolPath",
            json!("/opt/bin:/usr/bin"),
            &["+ DaemonSet/kari-agent….args[] \"--tool-path=/opt/bin:/usr/bin\""],
        ),
        Row(
            "agent.fetchSlots",
            json!(1),
            &[
                "- ….args[] \"--fetch-slots=4\"",
                "+ DaemonSet/kari-agent….args[] \"--fetch-slots=1\"",
            ],
        ),
        Row(
            "agent.buildSlots",
            json!(1),
            &[
                "- ….args[] \"--build-slots=2\"",
                "+ DaemonSet/kari-agent….args[] \"--build-slots=1\"",
            ],
        ),
        Row(
            "agent.diskReserveMib",
            json!(4_000_000),
            &[
                "- ….args[] \"--disk-reserve-mib=10240\"",
                "+ DaemonSet/kari-agent….args[] \"--disk-reserve-mib=4000000\"",
            ],
        ),
        Row(
            "agent.uidRange",
            json!("40000-49999"),
            &[
                "- ….args[] \"--uid-range=50000-59999\"",
                "+ DaemonSet/kari-agent….args[] \"--uid-range=40000-49999\"",
            ],
        ),
        Row(
            "agent.portRange",
            json!("30000-31000"),
            &[
                "- ….args[] \"--port-range=20000-29999\"",
                "+ DaemonSet/kari-agent….args[] \"--port-range=30000-31000\"",
            ],
        ),
        Row(
            "agent.appArmorProfile",
            json!({"type": "RuntimeDefault"}),
            &[
                "- ….appArmorProfile.type \"Unconfined\"",
                "+ DaemonSet/kari-agent….appArmorProfile.type \"RuntimeDefault\"",
            ],
        ),
        Row(
            "agent.seLinuxOptions",
            json!({"type": "spc_t"}),
            &["+ DaemonSet/kari-agent….seLinuxOptions.type \"spc_t\""],
        ),
        Row(
            "agent.priorityClassName",
            json!("system-node-critical"),
            &[
                "- ….priorityClassName \"kari-agent\"",
                "+ DaemonSet/kari-agent….priorityClassName \"system-node-critical\"",
            ],
        ),
        Row(
            "agent.extraArguments",
            json!(["--log-level=debug"]),
            &["+ DaemonSet/kari-agent….args[] \"--log-level=debug\""],
        ),
        Row(
            "agent.extraEnv",
            json!([{"name": "TZ", "value": "UTC"}]),
            &[
                "+ DaemonSet/kari-agent….env[TZ].name \"TZ\"",
                "+ DaemonSet/kari-agent….env[TZ].value \"UTC\"",
            ],
        ),
        Row(
            "agent.extraVolumes",
            volume,
            &[
                "+ DaemonSet/kari-agent….volumes[trust].configMap.name \"trust\"",
                "+ ….volumes[trust].name \"trust\"",
            ],
        ),
        Row(
            "agent.extraVolumeMounts",
            mount,
            &[
                "+ DaemonSet/kari-agent….volumeMounts[trust].mountPath \"/etc/ssh\"",
                "+ ….volumeMounts[trust].name \"trust\"",
            ],
        ),
        Row(
            "podDisruptionBudget.enabled",
            json!(false),
            &["- PodDisruptionBudget/kari-controller"],
        ),
        Row(
            "networkPolicy.enabled",
            json!(false),
            &["- NetworkPolicy/kari-controller"],
        ),
        Row(
            "networkPolicy.metricsFrom",
            json!([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]),
            &[
                "- NetworkPolicy/kari-controller.spec.ingress[] {…}",
                "+ NetworkPolicy/kari-controller.spec.ingress[] {\"from\":[{\"namespaceSelector\":{\"matchLabels\":{\"kubernetes.io/metadata.name\":\"monitoring\"}}}],…}",
            ],
        ),
        Row(
            "metrics.agentsOnNodeAddress",
            json!(true),
            &[
                "- ….args[] \"--listen=127.0.0.1:8081\"",
                "+ DaemonSet/kari-agent….args[] \"--listen=0.0.0.0:8081\"",
            ],
        ),
        Row(
            "metrics.podMonitor.enabled",
            json!(true),
            &["+ PodMonitor/kari-controller"],
        ),
        Row(
            "metrics.prometheusRule.enabled",
            json!(true),
            &["+ PrometheusRule/kari"],
        ),
        Row(
            "metrics.dashboard.enabled",
            json!(true),
            &["+ ConfigMap/kari-dashboard"],
        ),
        Row(
            "tenancy.defaultSandbox",
            json!("restricted"),
            &[
                "- ValidatingAdmissionPolicy/kari-sandbox.spec.variables[level].expression …orValue('baseline')\"",
                "+ ValidatingAdmissionPolicy/kari-sandbox.spec.variables[level].expression …orValue('restricted')\"",
            ],
        ),
        Row(
            "tenancy.required",
            json!(true),
            &[
                "- ValidatingAdmissionPolicy/kari-tenants.spec.variables[open].expression \"variables.data.size() == 0\"",
                "+ ValidatingAdmissionPolicy/kari-tenants.spec.variables[open].expression \"false\"",
                "- ….spec.paramRef.parameterNotFoundAction \"Allow\"",
                "+ ValidatingAdmissionPolicyBinding/kari-tenants.spec.paramRef.parameterNotFoundAction \"Deny\"",
            ],
        ),
        Row(
            "uninstallCheck.enabled",
            json!(false),
            &["- Job/kari-uninstall-check"],
        ),
        Row(
            "metrics.podMonitor.interval",
            json!("1m"),
            &[
                "- PodMonitor/kari-controller.spec.podMetricsEndpoints[] …\"interval\":\"30s\"…",
                "+ PodMonitor/kari-controller.spec.podMetricsEndpoints[] …\"interval\":\"1m\"…",
            ],
        ),
        Row(
            "metrics.podMonitor.labels",
            json!({"release": "prometheus"}),
            &["+ PodMonitor/kari-controller.metadata.labels.release \"prometheus\""],
        ),
        Row(
            "metrics.prometheusRule.labels",
            json!({"release": "prometheus"}),
            &["+ PrometheusRule/kari.metadata.labels.release \"prometheus\""],
        ),
        Row(
            "metrics.dashboard.labels",
            json!({"grafana": "yes"}),
            &["+ ConfigMap/kari-dashboard.metadata.labels.grafana \"yes\""],
        ),
    ]
}

/// What is off by default, and must be on for a value to show.
fn base(path: &str) -> Value {
    let part = ["podMonitor", "prometheusRule", "dashboard"]
        .into_iter()
        .find(|part| path.starts_with(&format!("metrics.{part}.")) && !path.ends_with(".enabled"));
    part.map_or(
        json!({}),
        |part| json!({"metrics": {part: {"enabled": true}}}),
    )
}

fn merge(into: &mut Value, values: Value) {
    match (into, values) {
        (Value::Object(into), Value::Object(values)) => {
            for (key, value) in values {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, value) => *into = value,
    }
}

/// The values at a path: `a.b` with `1` is `{"a": {"b": 1}}`.
fn nested(path: &str, value: Value) -> Value {
    path.rsplit('.')
        .fold(value, |inner, key| json!({key: inner}))
}

/// Whether a line is as the pattern says, in which `…` stands for any text.
fn fits(line: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('…');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = line.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[test]
fn each_value_changes_what_it_says_and_nothing_else() {
    let default = by_id(&json!({}));
    for Row(path, value, expected) in table() {
        let mut values = base(path);
        let before = if values == json!({}) {
            &default
        } else {
            &by_id(&values)
        };
        merge(&mut values, nested(path, value));
        let lines = changes(before, &by_id(&values));
        let context = || format!("{values} changes:\n{}", lines.join("\n"));
        if let [count, pattern] = expected
            && let Some(count) = count.strip_prefix('…')
        {
            // So many objects, each in this one way.
            let count: usize = count.parse().expect("a number");
            let new: Vec<_> = lines.iter().filter(|line| line.starts_with('+')).collect();
            assert_eq!(new.len(), count, "{}", context());
            assert!(new.iter().all(|line| fits(line, pattern)), "{}", context());
            continue;
        }
        assert_eq!(lines.len(), expected.len(), "{}", context());
        for pattern in expected {
            let fitting = lines.iter().any(|line| fits(line, pattern));
            assert!(fitting, "{pattern:?} is not there: {}", context());
        }
    }
}

#[test]
fn no_value_is_left_out_of_the_table() {
    let page = include_str!("../charts/kari/README.md");
    let documented: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let tried: BTreeSet<&str> = table().iter().map(|row| row.0).collect();
    assert_eq!(tried, documented);
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() {
    let sources = [
        include_str!("../src/controller/references.rs"),
        include_str!("../src/controller/source.rs"),
        include_str!("../src/runtime/client.rs"),
        include_str!("../src/runtime/node_lease.rs"),
        include_str!("../src/runtime/streams.rs"),
        include_str!("../src/runtime/supervise.rs"),
    ]
    .concat();
    let asked = [
        include_str!("../charts/kari/files/alerts.yaml"),
        include_str!("../charts/kari/files/dashboard.json"),
    ]
    .concat();
    let letters = |c: char| c.is_ascii_lowercase() || c == '_';
    let words = asked.split(|c| !letters(c));
    let names: BTreeSet<&str> = words.filter(|word| word.starts_with("kari_")).collect();
    assert!(names.len() > 5, "{names:?}");
    for name in names {
        let plain = ["_total", "_bucket"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .unwrap_or(name);
        assert!(
            sources.contains(&format!("\"{plain}\"")),
            "there is no metric {name}"
        );
    }
    let dashboard: Value =
        serde_json::from_str(include_str!("../charts/kari/files/dashboard.json")).expect("JSON");
    assert!(
        dashboard["panels"]
            .as_array()
            .is_some_and(|panels| !panels.is_empty())
    );
}
