//! Where programs of the node are.
//!
//! The node is asked by a unit of its own systemd: an agent in a Pod sees the
//! files of its image, not those of the node.

use std::path::{Path, PathBuf};

use super::limits;
use super::systemd::{Systemd, SystemdError};

/// How long the search may take, in seconds: it looks at a few folders.
const SEARCH_SECONDS: u32 = 10;

/// The most folders that are searched: which one has it is told by an exit status.
const MOST_FOLDERS: usize = 125;

/// Ends with the number of the first folder that has the program `$0`, from 1; with 0 if none has it.
const SEARCH: &str = r#"
number=0
for folder; do
    number=$((number + 1))
    if [ -f "$folder/$0" ] && [ -x "$folder/$0" ]; then exit $number; fi
done
exit 0
"#;

/// The path of a program in the first folder of `tool_path` (separated by colons) that has it on the node.
///
/// # Errors
/// systemd did not run the search.
pub async fn find(
    systemd: &Systemd,
    program: &str,
    tool_path: &str,
) -> Result<Option<PathBuf>, SystemdError> {
    let folders: Vec<&str> = tool_path
        .split(':')
        .filter(|folder| folder.starts_with('/'))
        .take(MOST_FOLDERS)
        .collect();
    let words = ["-c", SEARCH, program]
        .into_iter()
        .chain(folders.iter().copied())
        .map(str::to_owned)
        .collect();
    let result = limits::run(systemd, "program", "/bin/sh", words, SEARCH_SECONDS, vec![]).await?;
    let number = usize::try_from(result.status).unwrap_or(0);
    let folder = number.checked_sub(1).and_then(|index| folders.get(index));
    Ok(folder.map(|folder| Path::new(folder).join(program)))
}
