//! Whether a testbed has left anything behind.

use std::{
    fs,
    path::{Path, PathBuf},
};

use testbed::process::of_testbed;

/// What is left of a testbed on the machine.
pub fn remains(id: &str, directory: &Path) -> Vec<String> {
    let mut found: Vec<String> = of_testbed(id)
        .iter()
        .map(|process| format!("{process:?}"))
        .collect();
    let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            }
            if entry.file_name().to_string_lossy().contains(id) {
                found.push(entry.path().display().to_string());
            }
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let below = directory.display().to_string();
    found.extend(
        mounts
            .lines()
            .filter(|line| line.contains(&below))
            .map(str::to_owned),
    );
    if directory.exists() {
        found.push(below);
    }
    found
}
