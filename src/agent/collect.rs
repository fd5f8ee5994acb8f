//! What of an app's folder nothing refers to any more. Pure but for the last
//! step, which moves it to the trash.

use std::collections::BTreeSet;

use super::host::records::{AppliedRecord, AttemptRecord, EnvDigest, ReleaseRecord};
use super::host::store::{AppFolder, References, StoreError, cache_name, garbage};
use super::host::unit;
use crate::api::release::Template;

/// What is in use: by what is committed, by what is tried, and by what can be gone back to.
pub fn references(
    applied: Option<&AppliedRecord>,
    attempt: Option<&AttemptRecord>,
    releases: &[ReleaseRecord],
) -> References {
    let mut references = References::default();
    let committed = applied.and_then(|applied| applied.release.as_ref());
    if let Some(release) = committed {
        references.builds.insert(release.build_key.clone());
        references.releases.insert(release.revision.clone());
        references.logs.insert(release.release_id);
        references.caches.extend(caches(&release.template));
        references.env.extend(
            release
                .processes
                .iter()
                .map(|process| process.env_digest.clone()),
        );
    }
    let (mut keep, mut retained) = (0, BTreeSet::new());
    if let Some(attempt) = attempt {
        keep = attempt.wish.template.keep_releases;
        retained.extend(&attempt.wish.retain);
        references.logs.insert(attempt.wish.release_id);
        references.caches.extend(caches(&attempt.wish.template));
        references.env.extend(
            attempt
                .processes
                .iter()
                .map(|process| process.env_digest.clone()),
        );
        if attempt.outcome.is_none() {
            references.builds.insert(attempt.build_key.clone());
            references
                .stages
                .insert((attempt.build_key.clone(), attempt.build_try));
            let build = attempt
                .wish
                .template
                .build
                .as_ref()
                .and_then(|build| unit::build_environment(build).ok());
            references
                .env
                .extend(build.map(|content| EnvDigest::of(&content)));
        }
    }
    // `releases` has the newest first; the running one is kept besides.
    let mut others = 0;
    for release in releases {
        let is_running = committed.is_some_and(|committed| committed.revision == release.revision);
        if is_running || retained.contains(&release.revision) || others < keep {
            references.builds.insert(release.build_key.clone());
            references.releases.insert(release.revision.clone());
        }
        if !is_running {
            others += 1;
        }
    }
    references
}

/// The names of the caches that a template's build has.
fn caches(template: &Template) -> impl Iterator<Item = String> {
    let build = template.build.iter();
    build.flat_map(|build| build.cache_directories.iter().map(|path| cache_name(path)))
}

/// Moves what nothing refers to into the trash, and the caches too where the disk is short of room and no
/// build uses them. How many things that were.
pub fn collect(folder: &AppFolder, drop_caches: bool) -> Result<usize, StoreError> {
    let applied = folder.read_applied()?;
    let attempt = folder.read_attempt()?;
    let mut references = references(applied.as_ref(), attempt.as_ref(), &folder.releases()?);
    if drop_caches {
        references.caches.clear();
    }
    let garbage = garbage(&folder.contents()?, &references);
    for path in &garbage {
        folder.store().trash(&folder.path().join(path))?;
    }
    Ok(garbage.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::host::records::{AppliedRelease, BuildKey, Outcome, RECORD_VERSION};
    use crate::agent::host::store::Store;
    use crate::agent::plan::simulation::{draft, wish};
    use crate::api::names::{AppName, RevisionName};
    use jiff::Timestamp;

    fn key(number: u8) -> BuildKey {
        BuildKey::of(&[number])
    }

    fn release(number: u8) -> ReleaseRecord {
        let wish = wish(draft(number));
        ReleaseRecord {
            version: RECORD_VERSION,
            revision: wish.revision,
            commit: wish.commit,
            template: wish.template,
            sealed: wish.sealed,
            build_key: key(number),
            committed_at: Timestamp::from_second(i64::from(number)).unwrap(),
        }
    }

    fn applied(number: u8) -> AppliedRecord {
        let wish = wish(draft(number));
        AppliedRecord {
            version: RECORD_VERSION,
            app: wish.app.clone(),
            deployment_uid: None,
            release: Some(AppliedRelease {
                release_id: wish.release_id,
                revision: wish.revision,
                commit: wish.commit,
                template: wish.template,
                sealed: wish.sealed,
                build_key: key(number),
                processes: vec![],
                available_since: Timestamp::UNIX_EPOCH,
            }),
            removing: None,
            orphaned: None,
        }
    }

    fn attempt(number: u8, outcome: Option<Outcome>, retain: &[u8]) -> AttemptRecord {
        let mut wish = wish(draft(number));
        wish.retain = retain
            .iter()
            .map(|n| RevisionName::new(format!("shop-{n}")))
            .collect();
        AttemptRecord {
            version: RECORD_VERSION,
            wish,
            build_key: key(number),
            build_try: 0,
            build_result: None,
            processes: vec![],
            switching: false,
            stopped_old: vec![],
            outcome,
        }
    }

    #[test]
    fn the_running_build_the_newest_others_and_the_retained_ones_are_kept() {
        let releases: Vec<_> = [9, 8, 7, 6, 5, 4].map(release).into_iter().collect();
        let committed = Outcome::Committed {
            at: Timestamp::UNIX_EPOCH,
        };
        let references = references(
            Some(&applied(9)),
            Some(&attempt(9, Some(committed), &[4])),
            &releases,
        );
        assert_eq!(
            references.builds,
            [9, 8, 7, 4].map(key).into_iter().collect()
        );
        assert!(references.stages.is_empty());
    }

    #[test]
    fn a_tree_that_two_revisions_share_is_kept_for_either() {
        let mut releases: Vec<_> = [9, 8].map(release).into_iter().collect();
        releases[1].build_key = key(9);
        let mut attempt = attempt(9, None, &[]);
        attempt.wish.template.keep_releases = 0;
        // The newer runs, then the older: what the other had goes, the tree stays.
        for running in [9, 8] {
            let mut applied = applied(running);
            if let Some(release) = &mut applied.release {
                release.build_key = key(9);
            }
            let references = references(Some(&applied), Some(&attempt), &releases);
            assert_eq!(references.builds, [key(9)].into(), "{running} runs");
            assert_eq!(references.releases.len(), 1);
        }
    }

    #[test]
    fn caches_are_kept_while_a_build_names_them_and_go_first_where_there_is_no_room() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let folder = store.app(&AppName::new("web", "shop").unwrap());
        folder.create().unwrap();
        let mut attempt = attempt(9, None, &[]);
        attempt.wish.template.build = Some(
            serde_json::from_value(
                serde_json::json!({"run": "make", "cacheDirectories": ["target"]}),
            )
            .unwrap(),
        );
        folder.write_attempt(&attempt).unwrap();
        for directory in ["target", "old"] {
            folder.open_cache(directory, 0).unwrap();
        }
        let left = || folder.contents().unwrap().caches;
        assert_eq!(collect(&folder, false).unwrap(), 1);
        assert_eq!(left(), [cache_name("target")]);
        assert_eq!(collect(&folder, true).unwrap(), 1);
        assert_eq!(left(), Vec::<String>::new());
    }

    #[test]
    fn going_back_keeps_what_was_gone_back_from() {
        let releases: Vec<_> = [9, 8, 7, 6].map(release).into_iter().collect();
        let committed = Outcome::Committed {
            at: Timestamp::UNIX_EPOCH,
        };
        let references = references(
            Some(&applied(7)),
            Some(&attempt(7, Some(committed), &[])),
            &releases,
        );
        assert_eq!(references.builds, [9, 8, 7].map(key).into_iter().collect());
    }

    #[test]
    fn an_attempt_keeps_its_stage_while_it_goes_on_and_not_after_it_failed() {
        let going = references(None, Some(&attempt(2, None, &[])), &[]);
        assert_eq!(going.stages, [(key(2), 0)].into_iter().collect());
        let failed = Outcome::Superseded {
            at: Timestamp::UNIX_EPOCH,
            undone: true,
        };
        let ended = references(None, Some(&attempt(2, Some(failed), &[])), &[]);
        assert!(ended.stages.is_empty() && ended.builds.is_empty());
    }
}
