//! The machine's toolchains, wherever they are installed.
//!
//! Jails hide /root and /home, where most installers put them. So each is bound
//! read-only into the nodes below [`FOLDER`], and its folder of programs goes
//! into the agent's `--tool-path`. What the system packages is there anyway.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::{node, process};

/// Where toolchains are in a node.
pub const FOLDER: &str = "/opt/toolchains";

/// Asks each toolchain where it is installed, in a word: `rustup` and `pyenv`
/// put a proxy in the search path, and only the toolchain itself works alone.
const QUESTIONS: [(&str, &str, &[&str]); 4] = [
    ("rust", "rustc", &["--print", "sysroot"]),
    ("go", "go", &["env", "GOROOT"]),
    (
        "python",
        "python3",
        &["-c", "import sys; print(sys.base_prefix)"],
    ),
    (
        "node",
        "node",
        &[
            "-p",
            "require('path').dirname(require('path').dirname(process.execPath))",
        ],
    ),
];

/// A toolchain that is installed outside the usual system folders.
#[derive(Clone, Debug)]
pub struct Toolchain {
    name: &'static str,
    /// Its folder on the machine.
    pub source: PathBuf,
}

impl Toolchain {
    /// Its folder in a node.
    pub fn target(&self) -> PathBuf {
        Path::new(FOLDER).join(self.name)
    }

    /// Its folder of shared libraries in a node, where its programs need some:
    /// a Python with a shared library knows that by the path of its installation.
    pub fn libraries(&self) -> Option<PathBuf> {
        let folder = self.source.join("lib");
        let shared = std::fs::read_dir(folder).ok()?.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libpython") && name.contains(".so")
        });
        shared.then(|| self.target().join("lib"))
    }
}

/// Finds the toolchains of this machine; one that is not installed is no error.
pub fn find() -> Vec<Toolchain> {
    let asked = QUESTIONS.map(|(name, program, arguments)| {
        std::thread::spawn(move || {
            let answer = process::run(Command::new(program).args(arguments)).ok()?;
            let source = Path::new(answer.trim()).canonicalize().ok()?;
            let system = ["/", "/usr", "/usr/local"]
                .iter()
                .any(|folder| Path::new(folder) == source);
            (!system && source.join("bin").is_dir()).then_some(Toolchain { name, source })
        })
    });
    asked
        .into_iter()
        .filter_map(|thread| thread.join().ok().flatten())
        .collect()
}

/// The agent's `--tool-path`: the toolchains first, then the system's folders.
pub fn tool_path(toolchains: &[Toolchain]) -> String {
    toolchains
        .iter()
        .map(|toolchain| toolchain.target().join("bin").display().to_string())
        .chain([node::PATH.to_owned()])
        .collect::<Vec<_>>()
        .join(":")
}
