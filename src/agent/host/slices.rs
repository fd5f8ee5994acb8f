//! The slices that builds and services run in: where their sum is weighed, and
//! where an administrator limits it with a drop-in.

use super::store::{StoreError, UnitFiles};
use super::systemd::{Systemd, SystemdError};

/// The slices with their files. `kari.slice` is the parent that the names of the others imply.
const SLICES: [(&str, &str); 3] = [
    (
        "kari.slice",
        "# Made by Kari: all that it runs on this node. Limit it with a drop-in.\n\
         [Unit]\n\
         Description=Kari\n\
         \n\
         [Slice]\n\
         CPUAccounting=yes\n\
         MemoryAccounting=yes\n\
         TasksAccounting=yes\n",
    ),
    (
        "kari-apps.slice",
        "# Made by Kari: the services. Limit them together with a drop-in.\n\
         [Unit]\n\
         Description=Kari: services\n\
         \n\
         [Slice]\n\
         CPUAccounting=yes\n\
         MemoryAccounting=yes\n\
         TasksAccounting=yes\n",
    ),
    (
        "kari-builds.slice",
        "# Made by Kari: fetches and builds, which give way to the services.\n\
         [Unit]\n\
         Description=Kari: builds\n\
         \n\
         [Slice]\n\
         CPUAccounting=yes\n\
         MemoryAccounting=yes\n\
         TasksAccounting=yes\n\
         CPUWeight=50\n\
         IOWeight=50\n",
    ),
];

/// Slices that could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum SlicesError {
    /// A file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The reload.
    #[error(transparent)]
    Systemd(#[from] SystemdError),
}

/// Writes the slices' files where they differ. systemd reads them when the first unit needs them; if
/// it knows an older one already, it is reloaded, once.
pub async fn install(systemd: &Systemd, files: &UnitFiles) -> Result<(), SlicesError> {
    let mut reload = false;
    for (name, text) in SLICES {
        if files.read(name)?.as_deref() != Some(text) {
            files.write(name, text)?;
        }
        if let Some(state) = systemd.get_unit_state(name).await? {
            reload |= state.need_daemon_reload || state.fragment_path.is_empty();
        }
    }
    if reload {
        systemd.daemon_reload().await?;
    }
    Ok(())
}
