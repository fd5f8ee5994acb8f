//! What mirrors hold for nobody: commits of apps that come from elsewhere now,
//! whole mirrors, and packs of what nothing refers to any more.
//!
//! A mirror is brought in order by a unit of the same name as its fetch, so that
//! the two never run at once. A fetch goes first: it stops the other.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{info, warn};

use super::fetcher::{MirrorError, Mirrors, at};
use super::step::{Paths, upkeep_step};
use super::{MirrorKey, refs};
use crate::agent::host::store::{self, write_durably};
use crate::agent::host::systemd::SystemdError;
use crate::agent::host::unit::{fetch_unit_name, step_properties};
use crate::api::names::AppName;

/// Packs from which on a mirror is brought in order: each fetch leaves one.
const PACKS: usize = 10;

/// Between two looks at whether a mirror is in order: it takes seconds, or minutes for a huge one.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

const SCRIPT: &str = r#"# Written by kari agent; an edit is overwritten.
# Puts what is referred to into one pack, and lets go of the rest.
cd "$1"
find . \( -name '*.lock' -o -name 'tmp_*' \) -type f -delete
git for-each-ref --format='%(refname)' refs/submodules/ | while IFS= read -r ref; do
    app=${ref#refs/submodules/}
    # Of an app that is gone.
    [ -e "refs/kari/${app%/*}" ] || git update-ref -d "$ref"
done
git repack -a -d --quiet
git prune --expire=now
"#;

impl Mirrors {
    /// Lets go of what is held for apps that are not in `uses` with that mirror, and of mirrors that hold
    /// nothing. How many mirrors that were.
    pub async fn collect(
        &self,
        uses: &BTreeSet<(AppName, MirrorKey)>,
    ) -> Result<usize, MirrorError> {
        let mut dropped = 0;
        for key in self.keys()? {
            let mirror = self.mirror(&key);
            let holders = refs::holders(&mirror).map_err(at("list the references of", &mirror))?;
            for app in holders {
                if !uses.contains(&(app.clone(), key.clone()))
                    && !self.schedule().is_wanted_by(&key, &app)
                {
                    refs::release(&mirror, &app)
                        .map_err(at("let go of a reference in", &mirror))?;
                }
            }
            dropped += usize::from(self.drop_unheld(&key).await?);
        }
        Ok(dropped)
    }

    /// Brings each mirror that has many packs in order, one after the other. One that fails is said and passed
    /// over.
    pub async fn tidy(&self) -> Result<(), MirrorError> {
        for key in self.keys()? {
            if packs(&self.mirror(&key)) < PACKS {
                continue;
            }
            if let Err(error) = self.tidy_mirror(&key).await {
                warn!(mirror = key.as_str(), %error, "a mirror cannot be brought in order");
            }
        }
        Ok(())
    }

    async fn tidy_mirror(&self, key: &MirrorKey) -> Result<(), MirrorError> {
        let script = self.inner.store.mirrors().join("upkeep.sh");
        if store::read(&script)?.as_deref() != Some(SCRIPT.as_bytes()) {
            write_durably(&script, SCRIPT.as_bytes(), 0o644)?;
        }
        let paths = Paths {
            mirror: self.mirror(key),
            script,
            log: self.log(key),
        };
        let settings = &self.inner.settings;
        let step = upkeep_step(paths, &settings.user, &settings.tool_path);
        let unit = fetch_unit_name(key.as_str());
        {
            let mut upkeep = self.inner.upkeep.lock().await;
            match self
                .inner
                .systemd
                .start_transient(&unit, &step_properties(&step)?)
                .await
            {
                Ok(()) => *upkeep = Some(key.clone()),
                // Its fetch runs: another time.
                Err(SystemdError::UnitExists { .. }) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        loop {
            sleep(LOOK_INTERVAL).await;
            let mut upkeep = self.inner.upkeep.lock().await;
            if upkeep.as_ref() != Some(key) {
                info!(
                    mirror = key.as_str(),
                    "a fetch goes before the mirror's upkeep"
                );
                return Ok(());
            }
            let state = self.inner.systemd.get_unit_state(&unit).await?;
            let runs = state.is_some_and(|state| {
                !state.active_state.is_stopped() && state.sub_state != "exited"
            });
            if !runs {
                self.stop(key).await?;
                *upkeep = None;
                info!(
                    mirror = key.as_str(),
                    packs = packs(&self.mirror(key)),
                    "brought a mirror in order"
                );
                return Ok(());
            }
        }
    }
}

/// The packs of a mirror, which is kari-git's: they are counted, not read.
fn packs(mirror: &Path) -> usize {
    let names = store::names_in(&mirror.join("objects/pack")).unwrap_or_default();
    names.iter().filter(|name| name.ends_with(".pack")).count()
}
