//! What a node has for Pods: containerd, a kubelet and kube-proxy.
//!
//! The programs but for containerd and runc, which Debian packages, are the
//! control plane's own. What they are told is in the node's folder
//! `kubelet.conf`, shown to it as [`FOLDER`]; `node.sh` does the rest.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client};
use serde_json::json;

use crate::{
    error::{Context, Error, Result},
    images::PAUSE,
    pki::{self, Credentials},
    plane,
    program::ControlPlane,
    state::{Description, Directory, NodeName, Part, write_file},
    wait::{Seen, until},
};

/// Where its configuration is in a node.
const FOLDER: &str = "/etc/kubelet";

/// Where the programs are in a node.
const PROGRAMS: &str = "/opt/kubernetes";

/// Where Debian puts the network plugins.
const NETWORK_PLUGINS: &str = "/usr/lib/cni";

/// How long a kubelet may take until its node is ready: it needs a second.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// Writes what a node's programs are told, and returns what has to be shown to
/// the node where.
pub fn create(
    directory: &Directory,
    description: &Description,
    plane: &ControlPlane,
    name: NodeName,
) -> Result<Vec<(PathBuf, PathBuf)>> {
    let node = directory.node(name);
    for folder in ["containerd", "kubelet", "kubelet.conf/cni"] {
        directory.make_folder(node.join(folder))?;
    }
    let folder = node.join("kubelet.conf");
    let write = |file: &str, text: &str| write_file(&folder.join(file), text.as_bytes());
    for (file, certificate) in [
        ("kubeconfig", name.to_string()),
        ("kube-proxy.kubeconfig", "kube-proxy".to_owned()),
    ] {
        let server = description.addresses.apiserver.to_string();
        let credentials = Credentials::Certificate(&certificate);
        write(file, &pki::kubeconfig(directory, &server, &credentials)?)?;
    }
    for (file, source) in [
        ("ca.crt", "ca.crt".to_owned()),
        ("node.crt", format!("{name}.crt")),
        ("node.key", format!("{name}.key")),
    ] {
        let source = directory.pki(&source);
        let content = fs::read(&source).context(|| format!("read {}", source.display()))?;
        write_file(&folder.join(file), &content)?;
    }
    // JSON is YAML, too.
    write("kubelet.yaml", &kubelet_configuration().to_string())?;
    write("containerd.toml", &containerd_configuration())?;
    write(
        "cni/10-pods.conflist",
        &network_configuration(&description.pod_network(name)).to_string(),
    )?;
    write_units(directory, description, name)?;
    let program = plane.required("kubelet")?;
    Ok(vec![
        (folder, FOLDER.into()),
        (program, Path::new(PROGRAMS).join("kubelet")),
        (
            plane.required("kube-proxy")?,
            Path::new(PROGRAMS).join("kube-proxy"),
        ),
    ])
}

/// Waits until Pods can be placed on a node. Ready is not enough: until its
/// taint is gone a DaemonSet wants no Pod there, and `helm --wait` is content
/// with none.
pub async fn wait_ready(client: &Client, directory: &Directory, name: NodeName) -> Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    until(
        &format!("the kubelet of {name} is not ready"),
        READY_LIMIT,
        || directory.log_tail(Part::Node(name)),
        async || match nodes.get_opt(&name.to_string()).await {
            Ok(Some(node)) => {
                let conditions = node.status.and_then(|status| status.conditions);
                let ready = conditions
                    .iter()
                    .flatten()
                    .find(|condition| condition.type_ == "Ready");
                let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
                match ready {
                    Some(ready) if ready.status == "True" && taints.is_empty() => Seen::Ready(()),
                    _ => Seen::NotYet(format!("Ready is {ready:?}, its taints are {taints:?}")),
                }
            }
            Ok(None) => Seen::NotYet("it has made no Node object yet".to_owned()),
            Err(error) => Seen::NotYet(error.to_string()),
        },
    )
    .await
}

fn kubelet_configuration() -> serde_json::Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "failCgroupV1": false,
        "cgroupDriver": "systemd",
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        // The machine may not let a process be spared by the OOM killer.
        "oomScoreAdj": 0,
        "resolvConf": "",
        "clusterDNS": [plane::DNS.ip()],
        "clusterDomain": "cluster.local",
        // The disk and the memory are a developer's, whatever else fills them.
        "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "50Mi"},
        "imageGCHighThresholdPercent": 100,
        "tlsCertFile": format!("{FOLDER}/node.crt"),
        "tlsPrivateKeyFile": format!("{FOLDER}/node.key"),
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("{FOLDER}/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
    })
}

fn containerd_configuration() -> String {
    format!(
        r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  # The machine may not let a process be spared by the OOM killer.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{NETWORK_PLUGINS}"
    conf_dir = "{FOLDER}/cni"
"#
    )
}

fn network_configuration(pods: &str) -> serde_json::Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": pods}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn write_units(directory: &Directory, description: &Description, name: NodeName) -> Result<()> {
    let address = description.node_address(name);
    let containerd = format!("/usr/bin/containerd --config={FOLDER}/containerd.toml");
    let kubelet = format!(
        "{PROGRAMS}/kubelet --config={FOLDER}/kubelet.yaml --kubeconfig={FOLDER}/kubeconfig \
         --hostname-override={name} --node-ip={address}"
    );
    // The limits of connection tracking are the machine's: 0 leaves them alone.
    let proxy = format!(
        "{PROGRAMS}/kube-proxy --kubeconfig={FOLDER}/kube-proxy.kubeconfig --hostname-override={name} \
         --proxy-mode=iptables --cluster-cidr=10.244.0.0/16 --conntrack-max-per-core=0 \
         --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0"
    );
    let folder = directory.node(name).join("kubelet.conf/units");
    let wants = folder.join("multi-user.target.wants");
    fs::create_dir_all(&wants).context(|| format!("make the folder {}", wants.display()))?;
    for (unit, settings, command) in [
        // Containers outlive the runtime.
        (
            "containerd",
            "Type=notify\nDelegate=yes\nKillMode=process",
            containerd,
        ),
        ("kubelet", "Type=exec", kubelet),
        ("kube-proxy", "Type=exec", proxy),
    ] {
        let file = format!("{unit}.service");
        let text = format!(
            "[Unit]\nAfter=containerd.service\n\n\
             [Service]\n{settings}\nExecStart={command}\nRestart=always\nRestartSec=1\n"
        );
        write_file(&folder.join(&file), text.as_bytes())?;
        let link = wants.join(&file);
        symlink(format!("../{file}"), &link).map_err(|source| Error::Io {
            action: format!("make {}", link.display()),
            source,
        })?;
    }
    Ok(())
}
