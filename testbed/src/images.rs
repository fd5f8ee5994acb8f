//! Images for nodes with a kubelet, from files of this machine: there is no registry.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    error::{Context, Error, Result},
    node, process, program,
    state::{Description, Directory, write_file},
};

/// The image of what holds a Pod's namespaces.
pub const PAUSE: &str = "kari.invalid/pause:testbed";

/// Kari's own.
pub const KARI: &str = "kari.invalid/kari:testbed";

/// It does nothing but end when it is asked to.
const PAUSE_SOURCE: &str = "#include <signal.h>
#include <unistd.h>
static void end(int signal) { _exit(0); }
int main(void) {
    signal(SIGTERM, end);
    signal(SIGINT, end);
    for (;;) pause();
}
";

/// The project's scripts that make images.
const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../hack");

/// Makes the image [`PAUSE`] and returns its archive.
pub fn make_pause(directory: &Directory) -> Result<PathBuf> {
    let root = directory.make_folder("images/pause")?;
    let source = directory.join("images/pause.c");
    write_file(&source, PAUSE_SOURCE.as_bytes())?;
    process::run(
        Command::new("cc")
            .args(["-static", "-Os", "-s", "-o"])
            .arg(root.join("pause"))
            .arg(&source),
    )?;
    let archive = directory.join("images/pause.tar");
    process::run(
        Command::new(Path::new(SCRIPTS).join("image-archive.py"))
            .args(["--name", PAUSE, "--entrypoint", "/pause"])
            .arg(&root)
            .arg(&archive),
    )?;
    Ok(archive)
}

/// An image that was made.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its archive, which `ctr images import` takes.
    pub archive: PathBuf,
    /// The digest of its manifest, `sha256:…`, in which its name has no part.
    pub digest: String,
}

/// Makes Kari's image of the program that was built, in the testbed's folder.
pub fn make_kari(testbed: &Path, name: &str) -> Result<Image> {
    let directory = Directory::new(testbed)?;
    directory.make_folder("images")?;
    let archive = directory.join("images/kari.tar");
    let script = Path::new(SCRIPTS).join("image.sh");
    let printed = process::run(
        Command::new(script)
            .arg(&archive)
            .arg(name)
            .arg(program::kari()?),
    )?;
    let digest = printed.split(' ').find(|word| word.starts_with("sha256:"));
    let digest = digest.ok_or_else(|| Error::State(format!("image.sh printed {printed:?}")))?;
    Ok(Image {
        digest: digest.to_owned(),
        archive,
    })
}

/// Imports an archive into the container runtime of every node.
pub fn import(directory: &Directory, description: &Description, archive: &Path) -> Result<()> {
    let mut running = Vec::new();
    for name in description.node_names() {
        let file = fs::File::open(archive).context(|| format!("open {}", archive.display()))?;
        let mut command = node::enter(description, node::init(directory, name)?, "ctr");
        let child = command
            .args(["--namespace=k8s.io", "images", "import", "-"])
            .stdin(file)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context(|| format!("run `ctr images import` in {name}"))?;
        running.push((name, child));
    }
    for (name, child) in running {
        let output = child
            .wait_with_output()
            .context(|| format!("run `ctr images import` in {name}"))?;
        if !output.status.success() {
            return Err(Error::Command {
                command: format!("ctr images import of {} in {name}", archive.display()),
                status: output.status.to_string(),
                output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
    }
    Ok(())
}
