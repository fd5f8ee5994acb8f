//! What has to be installed on the machine, and installing it.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    error::{Context, Error, Result},
    process,
};

/// Programs and files that are needed, with the Debian package of each.
const NEEDED: [(&str, &str); 14] = [
    ("bash", "bash"),
    ("curl", "curl"),
    ("dbus-daemon", "dbus"),
    ("git", "git"),
    ("hostname", "hostname"),
    ("ip", "iproute2"),
    ("mount", "mount"),
    ("nginx", "nginx-light"),
    ("nsenter", "util-linux"),
    ("setsid", "util-linux"),
    ("sshd", "openssh-server"),
    ("unshare", "util-linux"),
    ("/lib/systemd/systemd", "systemd"),
    ("libnss_systemd.so.2", "libnss-systemd"),
];

/// What nodes with a kubelet need beyond that.
const NEEDED_BY_KUBELET: [(&str, &str); 6] = [
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("cc", "gcc"),
    ("containerd", "containerd"),
    ("iptables", "iptables"),
    ("python3", "python3"),
    ("runc", "runc"),
];

/// Held while packages are installed.
const LOCK: &str = "/run/lock/kari-testbed-install";

/// Packages that enable a service, which nobody asked for here.
const SERVICES: [(&str, &str); 3] = [
    ("containerd", "containerd.service"),
    ("nginx-light", "nginx.service"),
    ("openssh-server", "ssh.service"),
];

/// Where Debian's packages ask whether they may start their services.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Checks that everything is there; on Debian and Ubuntu installs what is not.
pub fn ensure(kubelet: bool) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Missing(
            "a testbed makes namespaces, mounts and cgroups: run it as root".to_owned(),
        ));
    }
    if missing(kubelet).is_empty() {
        return Ok(());
    }
    // One at a time: a second one finds what the first has installed.
    let lock = fs::File::create(LOCK).context(|| format!("create {LOCK}"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .context(|| format!("lock {LOCK}"))?;
    let missing = missing(kubelet);
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing
        .iter()
        .map(|(name, _)| *name)
        .collect::<Vec<_>>()
        .join(", ");
    if !is_debian() {
        return Err(Error::Missing(format!(
            "not installed: {names}; install them by your system's package manager"
        )));
    }
    let mut packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    install(&packages)?;
    let left: Vec<&str> = self::missing(kubelet)
        .iter()
        .map(|(name, _)| *name)
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    Err(Error::Missing(format!(
        "still not there after the installation of {}: {}",
        packages.join(" "),
        left.join(", ")
    )))
}

fn missing(kubelet: bool) -> Vec<(&'static str, &'static str)> {
    let more: &[_] = if kubelet { &NEEDED_BY_KUBELET } else { &[] };
    NEEDED
        .iter()
        .chain(more)
        .copied()
        .filter(|(name, _)| !is_there(name))
        .collect()
}

fn is_there(name: &str) -> bool {
    let in_any = |folders: &[String]| {
        folders
            .iter()
            .any(|folder| Path::new(folder).join(name).exists())
    };
    if name.starts_with('/') {
        Path::new(name).exists()
    } else if name.contains(".so.") {
        in_any(&[
            "/usr/lib".to_owned(),
            "/usr/lib64".to_owned(),
            format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH),
        ])
    } else {
        in_any(
            &crate::node::PATH
                .split(':')
                .map(str::to_owned)
                .collect::<Vec<_>>(),
        )
    }
}

fn is_debian() -> bool {
    fs::read_to_string("/etc/os-release").is_ok_and(|text| {
        text.lines()
            .filter(|line| line.starts_with("ID=") || line.starts_with("ID_LIKE="))
            .any(|line| line.contains("debian") || line.contains("ubuntu"))
    })
}

fn install(packages: &[&str]) -> Result<()> {
    eprintln!("installing {} …", packages.join(" "));
    // The programs are for the nodes: the machine's own services stay as they are.
    let refuses = !Path::new(POLICY).exists();
    if refuses {
        fs::write(POLICY, "#!/bin/sh\nexit 101\n").context(|| format!("write {POLICY}"))?;
        process::run(Command::new("chmod").args(["755", POLICY]))?;
    }
    let installed = apt(&["update", "--quiet"]).and_then(|()| {
        apt(&[
            &["install", "--yes", "--quiet", "--no-install-recommends"],
            packages,
        ]
        .concat())
    });
    if refuses {
        fs::remove_file(POLICY).context(|| format!("remove {POLICY}"))?;
    }
    installed?;
    for (package, service) in SERVICES {
        if packages.contains(&package) && Path::new("/run/systemd/system").exists() {
            process::run(Command::new("systemctl").args(["disable", "--quiet", service]))?;
        }
    }
    Ok(())
}

fn apt(arguments: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .context(|| "run `apt-get`".to_owned())?;
    if status.success() {
        return Ok(());
    }
    Err(Error::State(format!(
        "`apt-get {}` failed ({status}): what it said is above",
        arguments.join(" ")
    )))
}
