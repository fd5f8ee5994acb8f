//! The programs that a testbed is made of, and where they are found.
//!
//! Kubernetes and etcd are one Go program, built once from the module in
//! `control-plane/` and kept in the user's cache folder under the digest of its
//! sources. Where `$KUBEBUILDER_ASSETS` is set, the programs there serve instead.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};

const SOURCES: [(&str, &str); 3] = [
    ("main.go", include_str!("../control-plane/main.go")),
    ("go.mod", include_str!("../control-plane/go.mod")),
    ("go.sum", include_str!("../control-plane/go.sum")),
];

/// Without its version set, `kubectl version` fails and servers call themselves v0.0.0.
const LINKER_FLAGS: &str = "-s -w \
    -X k8s.io/component-base/version.gitVersion=v1.37.2 \
    -X k8s.io/component-base/version.gitMajor=1 \
    -X k8s.io/component-base/version.gitMinor=37";

/// The names that the program answers to.
const COMPONENTS: [&str; 9] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "helm",
    "coredns",
];

/// Where the components of the control plane are.
#[derive(Clone, Debug)]
pub struct ControlPlane {
    folder: PathBuf,
}

impl ControlPlane {
    /// Finds the components, and builds them where that was not done yet:
    /// minutes the first time, which is said on standard error.
    pub fn ensure() -> Result<Self> {
        if let Some(folder) = std::env::var_os("KUBEBUILDER_ASSETS").filter(|path| !path.is_empty())
        {
            let folder = PathBuf::from(folder);
            return match ["etcd", "kube-apiserver", "kubectl"]
                .iter()
                .find(|name| !folder.join(name).is_file())
            {
                None => Ok(Self { folder }),
                Some(name) => Err(Error::Missing(format!(
                    "KUBEBUILDER_ASSETS is {}, but there is no {name} in it; unset it to build the programs instead",
                    folder.display()
                ))),
            };
        }
        let folder = cache_folder()?.join(digest());
        fs::create_dir_all(&folder).context(|| format!("make the folder {}", folder.display()))?;
        let lock = File::create(folder.join("lock"))
            .context(|| format!("open {}", folder.join("lock").display()))?;
        flock(&lock, FlockOperation::LockExclusive)
            .context(|| format!("lock {}", folder.display()))?;
        if !folder.join("complete").exists() {
            build(&folder)?;
        }
        Ok(Self { folder })
    }

    /// A component's program; `None` where `$KUBEBUILDER_ASSETS` lacks it.
    pub fn component(&self, name: &str) -> Option<PathBuf> {
        let path = self.folder.join(name);
        path.exists().then_some(path)
    }

    /// A component's program that cannot be done without.
    pub fn required(&self, name: &str) -> Result<PathBuf> {
        self.component(name).ok_or_else(|| {
            Error::Missing(format!("there is no {name} in {}", self.folder.display()))
        })
    }
}

/// The `kari` program: `$KARI_BIN`, or beside or above the running program.
pub fn kari() -> Result<PathBuf> {
    find("kari", "KARI_BIN")
}

/// The program of the controller: `$KARI_CONTROLLER_BIN`, for one of another version than the rest, else [`kari`].
pub fn controller() -> Result<PathBuf> {
    named("KARI_CONTROLLER_BIN").unwrap_or_else(kari)
}

/// The program of the agents, likewise: `$KARI_AGENT_BIN`, else [`kari`].
pub fn agent() -> Result<PathBuf> {
    named("KARI_AGENT_BIN").unwrap_or_else(kari)
}

/// The `testbed` program, for the processes that a testbed needs of its own:
/// `$TESTBED_BIN`, or beside or above the running program.
pub fn testbed() -> Result<PathBuf> {
    find("testbed", "TESTBED_BIN")
}

fn find(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = named(variable) {
        return path;
    }
    let running = std::env::current_exe().context(|| "find the running program".to_owned())?;
    // Tests run from target/debug/deps, one folder below.
    running
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Error::Missing(format!(
                "there is no program `{name}` beside {}: run `cargo build --workspace` first, or set {variable}",
                running.display()
            ))
        })
}

/// The program that an environment variable names, if it is set.
fn named(variable: &str) -> Option<Result<PathBuf>> {
    let path = PathBuf::from(std::env::var_os(variable).filter(|path| !path.is_empty())?);
    Some(if path.is_file() {
        Ok(path)
    } else {
        Err(Error::Missing(format!(
            "{variable} is {}, but there is no such file",
            path.display()
        )))
    })
}

fn cache_folder() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|path| !path.is_empty());
    set("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| set("HOME").map(|home| Path::new(&home).join(".cache")))
        .map(|folder| folder.join("kari/control-plane"))
        .ok_or_else(|| {
            Error::Missing(
                "neither XDG_CACHE_HOME nor HOME is set: set one, for the programs that are built"
                    .to_owned(),
            )
        })
}

fn digest() -> String {
    let mut digest = Sha256::new();
    for (name, content) in SOURCES {
        digest.update(name);
        digest.update([0]);
        digest.update(content);
        digest.update([0]);
    }
    digest.update(LINKER_FLAGS);
    let digest = digest.finalize();
    digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn build(folder: &Path) -> Result<()> {
    eprintln!("building Kubernetes and etcd once (5 to 10 minutes without Go's build cache) …");
    let sources = folder.join("source");
    fs::create_dir_all(&sources).context(|| format!("make the folder {}", sources.display()))?;
    for (name, content) in SOURCES {
        let path = sources.join(name);
        fs::write(&path, content).context(|| format!("write {}", path.display()))?;
    }
    let program = folder.join("control-plane");
    let status = Command::new("go")
        .args(["build", "-buildvcs=false", "-trimpath", "-ldflags", LINKER_FLAGS, "-o"])
        .arg(&program)
        .arg(".")
        .current_dir(&sources)
        .env("CGO_ENABLED", "0")
        .env("GOWORK", "off")
        .stdin(Stdio::null())
        // Standard output is the caller's own; Go says what it does on the other.
        .status()
        .map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Error::Missing(
                "Go is not installed (no `go` in PATH): it builds Kubernetes for the testbed; see https://go.dev/doc/install"
                    .to_owned(),
            ),
            _ => Error::Io {
                action: "run `go build`".to_owned(),
                source,
            },
        })?;
    if !status.success() {
        return Err(Error::State(format!(
            "Kubernetes could not be built in {} ({status}): what Go said is above",
            sources.display()
        )));
    }
    for name in COMPONENTS {
        let link = folder.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink("control-plane", &link).context(|| format!("make {}", link.display()))?;
        }
    }
    File::create(folder.join("complete"))
        .map(drop)
        .context(|| format!("write {}", folder.join("complete").display()))
}
