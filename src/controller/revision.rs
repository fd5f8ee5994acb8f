//! The history: what makes a revision, what it is called, and which ones are kept. Pure.
//!
//! Invariant: same content, same name. Content is the commit, its submodules, the directory, the build, the variables
//! and the processes; not the url, the interval, the placement, the strategy or the retention, which
//! change a Release in place.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::api::DeploymentSpec;
use crate::api::deployment::{Build, GitReference, GitSource, Process, Strategy, Switch};
use crate::api::names::{Commit, RevisionName, hex_digest};
use crate::api::release::{Template, TemplateSource};

use super::observed::{ObservedRevision, RevisionData};
use super::references::Environment;
use super::source::range::Range;

/// Hexadecimal digits of the content in a revision's name: 40 bits, so that two contents of one
/// Deployment's few dozen revisions do not meet.
const NAME_DIGITS: usize = 10;

/// What stands for every tag where references are asked for.
const EVERY_TAG: &str = "refs/tags/*";

/// The full name of the reference that is wanted, the pattern of those that a range looks at, or nothing where
/// the spec names the commit itself.
pub fn full_reference(reference: Option<&GitReference>) -> Option<String> {
    let Some(reference) = reference else {
        return Some("refs/heads/main".to_owned());
    };
    let GitReference {
        branch,
        tag,
        semver,
        name,
        commit,
    } = reference;
    if commit.is_some() {
        return None;
    }
    branch
        .as_ref()
        .map(|branch| format!("refs/heads/{branch}"))
        .or_else(|| tag.as_ref().map(|tag| format!("refs/tags/{tag}")))
        .or_else(|| semver.as_ref().map(|_| EVERY_TAG.to_owned()))
        .or_else(|| name.clone())
        .or_else(|| Some("refs/heads/main".to_owned()))
}

/// The range of versions that is wanted.
pub fn range(reference: Option<&GitReference>) -> Option<&str> {
    reference?.semver.as_deref()
}

/// Whether what was found at `found` before is still what `reference` may stand for.
pub fn may_stand_for(reference: Option<&GitReference>, found: &str) -> bool {
    match range(reference) {
        Some(text) => Range::parse(text).is_ok_and(|range| range.version_of(found).is_some()),
        None => full_reference(reference).as_deref() == Some(found),
    }
}

/// What a node needs to know, with nothing left to look up: the commit was found at `reference`, and the
/// references of the spec hold `environment`.
pub fn render(
    spec: &DeploymentSpec,
    source: &GitSource,
    reference: Option<String>,
    environment: Environment,
) -> Template {
    let Environment {
        shared,
        build: build_env,
        mut processes,
        secret,
        sealed: _,
    } = environment;
    let strategy = spec.strategy.clone().unwrap_or_default();
    let Strategy {
        switch,
        max_unavailable: _,
        min_ready_seconds,
        progress_deadline_seconds: _,
    } = strategy;
    Template {
        source: TemplateSource {
            url: source.url.clone(),
            reference,
            directory: source.directory.clone(),
            submodules: source.submodules,
            allow_rewind: source.allow_rewind,
        },
        build: spec.build.clone().map(|build| Build {
            env: build_env,
            ..build
        }),
        env: shared,
        secret_env: secret,
        processes: spec
            .processes
            .iter()
            .map(|process| Process {
                env: processes.remove(&process.name).unwrap_or_default(),
                ..process.clone()
            })
            .collect(),
        switch: switch.unwrap_or_else(|| default_switch(&spec.processes)),
        min_ready_seconds,
        keep_releases: spec.keep_releases,
        deletion_policy: spec.deletion_policy,
    }
}

/// How a Deployment that does not say it changes over: what two processes do to one state folder at the same
/// time is known to its author alone.
fn default_switch(processes: &[Process]) -> Switch {
    match processes.iter().any(|process| process.state_directory) {
        true => Switch::Recreate,
        false => Switch::BlueGreen,
    }
}

/// The name of the revision with this content. A digest that another content of the Deployment already
/// has is passed over, in a fixed order.
pub fn name(deployment: &str, data: &RevisionData, history: &[ObservedRevision]) -> RevisionName {
    let content = content(data);
    (0_u32..)
        .map(|collisions| {
            let digest = match collisions {
                0 => hex_digest(&content),
                more => hex_digest(&[&content[..], &more.to_be_bytes()].concat()),
            };
            RevisionName::new(format!("{deployment}-{}", &digest[..NAME_DIGITS]))
        })
        .find(|name| {
            history
                .iter()
                .filter(|revision| revision.name == *name)
                .filter_map(|revision| revision.data.as_ref())
                .all(|other| same_content(other, data))
        })
        .unwrap_or_else(|| RevisionName::new(deployment))
}

/// Whether two revisions are one.
pub fn same_content(one: &RevisionData, other: &RevisionData) -> bool {
    content(one) == content(other)
}

/// The content of a revision as bytes that do not depend on the order of any map.
fn content(data: &RevisionData) -> Vec<u8> {
    let RevisionData { commit, template } = data;
    let Template {
        source:
            TemplateSource {
                url: _,
                reference: _,
                directory,
                submodules,
                allow_rewind: _,
            },
        build,
        env,
        secret_env,
        processes,
        switch: _,
        min_ready_seconds: _,
        keep_releases: _,
        deletion_policy: _,
    } = template;
    let mut value = json!({
        "commit": commit,
        "directory": directory,
        "submodules": submodules,
        "build": build,
        "env": env,
        "processes": processes,
    });
    // Revisions without secrets keep the names that they had before there were any.
    if !secret_env.is_empty() {
        value["secretEnv"] = json!(secret_env);
    }
    let mut bytes = Vec::new();
    write_canonically(&value, &mut bytes);
    bytes
}

/// JSON without white space, the keys of every object in order of their bytes.
fn write_canonically(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<_> = map.keys().collect();
            keys.sort();
            out.push(b'{');
            for (index, key) in keys.into_iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                out.extend(Value::from(key.as_str()).to_string().into_bytes());
                out.push(b':');
                write_canonically(&map[key], out);
            }
            out.push(b'}');
        }
        Value::Array(items) => {
            out.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write_canonically(item, out);
            }
            out.push(b']');
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            out.extend(value.to_string().into_bytes());
        }
    }
}

/// The number for a revision that becomes the newest.
pub fn next_number(history: &[ObservedRevision]) -> i64 {
    history.iter().map(|r| r.number).max().unwrap_or(0) + 1
}

/// The old revisions that the history has no room for, oldest first. Never one of `needed`: the one
/// that is rolled out, the last good one, and what any Release names.
pub fn surplus<'a>(
    history: &'a [ObservedRevision],
    needed: &BTreeSet<String>,
    limit: u32,
) -> Vec<&'a ObservedRevision> {
    let mut old: Vec<_> = history
        .iter()
        .filter(|revision| !needed.contains(revision.name.as_str()))
        .collect();
    old.sort_by(|a, b| a.number.cmp(&b.number).then_with(|| a.name.cmp(&b.name)));
    let keep = usize::try_from(limit).unwrap_or(usize::MAX);
    let surplus = old.len().saturating_sub(keep);
    old.truncate(surplus);
    old
}

/// The commit that a spec names itself.
pub fn named_commit(source: &GitSource) -> Option<Commit> {
    let commit = source.reference.as_ref()?.commit.as_deref()?;
    Commit::parse(commit).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::references::{Contents, resolve};
    use crate::controller::testing::{commit, deployment_spec};

    fn data(change: impl FnOnce(&mut RevisionData)) -> RevisionData {
        let spec = deployment_spec();
        let source = spec
            .source
            .git
            .clone()
            .unwrap_or_else(|| panic!("a git source"));
        let mut data = RevisionData {
            commit: commit('a'),
            template: render(
                &spec,
                &source,
                full_reference(source.reference.as_ref()),
                resolve(&spec, &Contents::new()).unwrap_or_else(|e| panic!("{e}")),
            ),
        };
        change(&mut data);
        data
    }

    #[test]
    fn a_revision_is_named_by_what_runs_and_not_by_how_it_is_rolled_out() {
        let plain = name("shop", &data(|_| ()), &[]);
        assert!(plain.as_str().starts_with("shop-"), "{plain}");
        assert_eq!(plain.as_str().len(), "shop-".len() + 10);
        type Change = fn(&mut RevisionData);
        let same: [(&str, Change); 6] = [
            ("url", |d| {
                d.template.source.url = "https://b.example/x".into()
            }),
            ("reference", |d| d.template.source.reference = None),
            ("allowRewind", |d| d.template.source.allow_rewind = false),
            ("minReadySeconds", |d| d.template.min_ready_seconds = 77),
            ("keepReleases", |d| d.template.keep_releases = 9),
            ("nothing", |_| ()),
        ];
        for (case, change) in same {
            assert_eq!(name("shop", &data(change), &[]), plain, "{case}");
        }
        let other: [(&str, Change); 6] = [
            ("commit", |d| d.commit = commit('b')),
            ("directory", |d| {
                d.template.source.directory = Some("x".into())
            }),
            ("submodules", |d| d.template.source.submodules = true),
            ("env", |d| d.template.env.clear()),
            ("build", |d| d.template.build = None),
            ("processes", |d| {
                d.template.processes[0].command.push("-v".into())
            }),
        ];
        for (case, change) in other {
            assert_ne!(name("shop", &data(change), &[]), plain, "{case}");
        }
    }

    #[test]
    fn a_name_that_another_content_has_is_passed_over() {
        let (mine, theirs) = (data(|_| ()), data(|d| d.commit = commit('b')));
        let taken = name("shop", &mine, &[]);
        let holder = |data| ObservedRevision {
            name: taken.clone(),
            uid: "u".into(),
            resource_version: "1".into(),
            number: 1,
            data: Some(data),
        };
        assert_eq!(name("shop", &mine, &[holder(mine.clone())]), taken);
        let second = name("shop", &mine, &[holder(theirs)]);
        assert_ne!(second, taken);
    }

    #[test]
    fn the_history_is_trimmed_of_the_oldest_that_nothing_needs() {
        let history: Vec<_> = (1..=5)
            .map(|number| ObservedRevision {
                name: RevisionName::new(format!("shop-{number}")),
                uid: "u".into(),
                resource_version: "1".into(),
                number,
                data: None,
            })
            .collect();
        let needed: BTreeSet<String> = ["shop-1".to_owned(), "shop-5".to_owned()].into();
        let gone = |limit| -> Vec<&str> {
            surplus(&history, &needed, limit)
                .into_iter()
                .map(|r| r.name.as_str())
                .collect()
        };
        assert_eq!(gone(1), ["shop-2", "shop-3"]);
        assert_eq!(gone(3), Vec::<&str>::new());
        assert_eq!(gone(0), ["shop-2", "shop-3", "shop-4"]);
    }

    #[test]
    fn a_reference_is_known_by_its_full_name() {
        let reference = |json| serde_json::from_value::<GitReference>(json).ok();
        for (case, given, expected) in [
            ("absent", None, Some("refs/heads/main")),
            (
                "branch",
                reference(json!({"branch": "a/b"})),
                Some("refs/heads/a/b"),
            ),
            ("tag", reference(json!({"tag": "v1"})), Some("refs/tags/v1")),
            (
                "name",
                reference(json!({"name": "refs/pull/7/head"})),
                Some("refs/pull/7/head"),
            ),
            ("commit", reference(json!({"commit": "a".repeat(40)})), None),
            (
                "semver",
                reference(json!({"semver": "1.x"})),
                Some("refs/tags/*"),
            ),
        ] {
            assert_eq!(
                full_reference(given.as_ref()).as_deref(),
                expected,
                "{case}"
            );
        }
    }

    #[test]
    fn what_was_found_stays_valid_for_the_reference_that_it_was_found_by() {
        let reference = |json| serde_json::from_value::<GitReference>(json).ok();
        for (given, found, expected) in [
            (None, "refs/heads/main", true),
            (None, "refs/heads/other", false),
            (reference(json!({"tag": "v1"})), "refs/tags/v1", true),
            (
                reference(json!({"semver": "1.x"})),
                "refs/tags/v1.4.0",
                true,
            ),
            (
                reference(json!({"semver": "2.x"})),
                "refs/tags/v1.4.0",
                false,
            ),
            (
                reference(json!({"semver": "1.x"})),
                "refs/heads/main",
                false,
            ),
            (
                reference(json!({"commit": "a".repeat(40)})),
                "refs/heads/main",
                false,
            ),
        ] {
            assert_eq!(
                may_stand_for(given.as_ref(), found),
                expected,
                "{given:?} {found}"
            );
        }
    }

    #[test]
    fn the_bytes_of_a_content_do_not_depend_on_the_order_of_keys() {
        let mut out = Vec::new();
        write_canonically(
            &json!({"b": [1, {"z": "\"", "a": null}], "a": true}),
            &mut out,
        );
        assert_eq!(
            String::from_utf8_lossy(&out),
            r#"{"a":true,"b":[1,{"a":null,"z":"\""}]}"#
        );
    }

    #[test]
    fn what_has_state_is_recreated_unless_its_spec_says_otherwise() {
        let switch = |state: bool, said: Option<Switch>| {
            let mut spec = deployment_spec();
            spec.processes[0].state_directory = state;
            spec.strategy = Some(Strategy {
                switch: said,
                ..Strategy::default()
            });
            let source = spec.source.git.clone().unwrap_or_else(|| panic!("git"));
            let environment = resolve(&spec, &Contents::new()).unwrap_or_else(|e| panic!("{e}"));
            render(&spec, &source, None, environment).switch
        };
        assert_eq!(switch(false, None), Switch::BlueGreen);
        assert_eq!(switch(true, None), Switch::Recreate);
        assert_eq!(switch(true, Some(Switch::BlueGreen)), Switch::BlueGreen);
        assert_eq!(switch(false, Some(Switch::Recreate)), Switch::Recreate);
    }
}
