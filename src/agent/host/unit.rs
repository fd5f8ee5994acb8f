//! Units: what they are called and what they say. Pure.
//!
//! - A **service** is a file whose name carries the digest of its content, so it
//!   is never edited, needs no daemon-reload, and cannot be mistaken for another.
//! - The **target** of an app names exactly the committed services; its rename
//!   is the commit.
//! - A **step** (build, fetch) is a transient oneshot unit with a deterministic
//!   name, so that an agent that was restarted finds it and carries on.
//!
//! Deliberately absent: I/O, and any text of a user's that did not pass
//! [`super::quote`].

mod build;
mod service;
mod step;

use uuid::Uuid;

use super::jail::APP_PATH;
use super::quote::QuoteError;
use crate::api::names::{AppName, ReleaseId};
use crate::api::quantity::QuantityError;

pub use build::{
    BuildSpec, CHECKOUT_FILE, CHECKOUT_SCRIPT, DEFAULT_BUILD_LIMITS, EXIT_NO_DIRECTORY,
    build_environment, build_key, build_script, build_step, cache_place, directory_check,
};
pub use service::{ProcessVariables, ServiceSpec, ServiceUnit, probe_properties, service_unit};
pub use step::{StepLimits, StepSpec, step_properties};

/// A unit that cannot be made from the spec: it has to be changed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Text that cannot reach a program.
    #[error("{place}: {source}")]
    Quote {
        /// Where in the spec.
        place: String,
        /// What is wrong with it.
        #[source]
        source: QuoteError,
    },
    /// `$(NAME)` of a variable that the process does not have.
    #[error(
        "process {process}: $({name}) in its command is not a variable of this process; write $$({name}) if the text itself is meant"
    )]
    UnknownVariable {
        /// The process.
        process: String,
        /// The name.
        name: String,
    },
    /// The template names a secret variable, and what is sealed with it has none of the name.
    #[error("process {process}: the sealed variables lack {name}, which the template names")]
    SecretMissing {
        /// The process.
        process: String,
        /// The name.
        name: String,
    },
    /// A limit that cannot be read.
    #[error("{place}: {source}")]
    Quantity {
        /// Where in the spec.
        place: String,
        /// What is wrong with it.
        #[source]
        source: QuantityError,
    },
    /// A port for a process that listens on nothing, or none for one that does.
    #[error("process {process}: it has {}, and the unit was given {}", if *.wants { "a port" } else { "no port" }, if *.wants { "none" } else { "one" })]
    Port {
        /// The process.
        process: String,
        /// Whether its spec has a port.
        wants: bool,
    },
}

/// Which of Kari's a unit is, told by its name alone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum OwnUnit {
    /// The target of an app.
    Target(AppName),
    /// A service of an app.
    Service {
        /// The app.
        app: AppName,
        /// The process's name.
        process: String,
    },
    /// A build of an app.
    Build {
        /// The app.
        app: AppName,
        /// The release that it is for.
        release_id: ReleaseId,
        /// Which try within the attempt, from 0.
        build_try: u32,
    },
    /// A fetch into a mirror.
    Fetch {
        /// The mirror's key.
        mirror: String,
    },
    /// The agent's own: its proxy, its slices, its canaries, its probes.
    Agent,
}

/// Matches the names of all units of Kari's, and of few others.
pub const ALL_UNITS: &str = "kari*";

/// Reads a unit's name; nothing for a name that is not Kari's.
pub fn parse_unit_name(name: &str) -> Option<OwnUnit> {
    if name == "kari.slice" {
        return Some(OwnUnit::Agent);
    }
    if let Some(rest) = name.strip_prefix("kari.") {
        if let Some(app) = rest.strip_suffix(".target") {
            return AppName::parse(app).ok().map(OwnUnit::Target);
        }
        let mut parts = rest.strip_suffix(".service")?.splitn(4, '.');
        let app = AppName::new(parts.next()?, parts.next()?).ok()?;
        let process = parts.next()?.to_owned();
        let is_digest = |text: &str| {
            text.len() == UNIT_DIGEST_DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit())
        };
        return parts
            .next()
            .is_some_and(is_digest)
            .then_some(OwnUnit::Service { app, process });
    }
    if let Some(rest) = name.strip_prefix(BUILD_PREFIX) {
        let mut parts = rest.strip_suffix(".service")?.splitn(4, '.');
        let app = AppName::new(parts.next()?, parts.next()?).ok()?;
        let release_id = ReleaseId(Uuid::try_parse(parts.next()?).ok()?);
        let build_try = parts.next()?.parse().ok()?;
        return Some(OwnUnit::Build {
            app,
            release_id,
            build_try,
        });
    }
    if let Some(rest) = name.strip_prefix(FETCH_PREFIX) {
        return Some(OwnUnit::Fetch {
            mirror: rest.strip_suffix(".service")?.to_owned(),
        });
    }
    name.starts_with("kari-").then_some(OwnUnit::Agent)
}

/// The target of an app, its only enabled unit.
pub fn target_name(app: &AppName) -> String {
    format!("kari.{app}.target")
}

/// Patterns that match the loaded units of an app: services, target and builds.
pub fn app_patterns(app: &AppName) -> [String; 2] {
    [format!("kari.{app}.*"), format!("{BUILD_PREFIX}{app}.*")]
}

/// Matches the loaded units of all builds.
pub const BUILD_PATTERN: &str = "kari-build.*";

/// Matches the loaded units of all fetches.
pub const FETCH_PATTERN: &str = "kari-fetch.*";

/// The build step of a release. Another try has another name, so that a result is never taken for
/// another try's.
pub fn build_unit_name(app: &AppName, release_id: &ReleaseId, build_try: u32) -> String {
    format!("{BUILD_PREFIX}{app}.{release_id}.{build_try}.service")
}

/// The fetch into a mirror: one name, so one fetch at a time.
pub fn fetch_unit_name(mirror_key: &str) -> String {
    format!("{FETCH_PREFIX}{mirror_key}.service")
}

const BUILD_PREFIX: &str = "kari-build.";
const FETCH_PREFIX: &str = "kari-fetch.";

/// Hexadecimal digits of a content's digest in a service's name: 64 bits among the few units of one
/// process, and the whole name stays far below systemd's 255 characters.
const UNIT_DIGEST_DIGITS: usize = 16;

/// The target of an app: it wants exactly `units`.
pub fn target_text(app: &AppName, units: &[String]) -> String {
    let mut text = format!(
        "# Made by Kari: names the committed services of {app}. Its rename is the commit.\n\
         [Unit]\n\
         Description=Kari: {app}\n"
    );
    for unit in units {
        text.push_str(&format!("Wants={unit}\n"));
    }
    text.push_str("\n[Install]\nWantedBy=multi-user.target\n");
    text
}

/// The units that a target's text wants, in its order.
pub fn target_units(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.strip_prefix("Wants="))
        .map(str::to_owned)
        .collect()
}

/// Processes and threads of a build or a service unless its spec says otherwise.
const DEFAULT_TASKS: u32 = 512;

/// The program of every command: it finds the real one on `$PATH`, or by its path from the folder that
/// it goes to first, in the jail.
const ENV_PROGRAM: &str = "/usr/bin/env";

/// The folder of the app that a command starts in, as the jail has it.
fn in_app(directory: Option<&str>) -> String {
    match directory {
        None | Some("" | ".") => APP_PATH.to_owned(),
        Some(directory) => format!("{APP_PATH}/{directory}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app() -> AppName {
        AppName::new("web", "shop").unwrap()
    }

    #[test]
    fn a_name_tells_what_a_unit_is() {
        let release_id = ReleaseId(Uuid::from_u128(7));
        let web = "kari.web.shop.web.0123456789abcdef.service".to_owned();
        for (name, unit) in [
            (target_name(&app()), Some(OwnUnit::Target(app()))),
            (
                web,
                Some(OwnUnit::Service {
                    app: app(),
                    process: "web".to_owned(),
                }),
            ),
            (
                build_unit_name(&app(), &release_id, 3),
                Some(OwnUnit::Build {
                    app: app(),
                    release_id,
                    build_try: 3,
                }),
            ),
            (
                fetch_unit_name("abc"),
                Some(OwnUnit::Fetch {
                    mirror: "abc".to_owned(),
                }),
            ),
            ("kari-proxy.service".to_owned(), Some(OwnUnit::Agent)),
            ("kari.slice".to_owned(), Some(OwnUnit::Agent)),
            ("kari.web.target".to_owned(), None),
            ("kari.web.shop.web.nodigest.service".to_owned(), None),
            ("kari.web.shop.web.0123456789abcdef.timer".to_owned(), None),
            ("karina.service".to_owned(), None),
            ("sshd.service".to_owned(), None),
        ] {
            assert_eq!(parse_unit_name(&name), unit, "{name}");
        }
        let longest = AppName::new(&"n".repeat(63), &"d".repeat(52)).unwrap();
        let name = format!(
            "kari.{longest}.{}.{}.service",
            "p".repeat(32),
            "0".repeat(UNIT_DIGEST_DIGITS)
        );
        assert!(name.len() < 256 && build_unit_name(&longest, &release_id, u32::MAX).len() < 256);
    }

    #[test]
    fn a_target_reads_back() {
        let units = [
            "kari.web.shop.web.0.service".to_owned(),
            "kari.web.shop.worker.1.service".to_owned(),
        ];
        let text = target_text(&app(), &units);
        assert_eq!(target_units(&text), units);
        assert!(text.contains("WantedBy=multi-user.target"));
        assert_eq!(
            target_units(&target_text(&app(), &[])),
            Vec::<String>::new()
        );
    }
}
