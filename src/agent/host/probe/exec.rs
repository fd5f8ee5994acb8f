//! Probes that are commands: each run is a transient oneshot unit in the jail of
//! the process it is about, which is ended at its deadline by systemd, whatever
//! becomes of the agent.
//!
//! The name is the service's with the probe's kind: one run at a time, and what
//! an agent that was killed left behind is found by it. Whoever starts a unit
//! takes it away again; it goes with its service too (`PartOf=`).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::{StreamExt, stream};
use tokio::process::Command;
use tokio::time::timeout;

use super::{ProbeError, ProbeKind, one_line};
use crate::agent::host::jail::Setting;
use crate::agent::host::systemd::{Systemd, SystemdError};
use crate::runtime::error_chain;

/// Commands of probes that run at once on a node: a hundred apps' probes take turns, and a few that
/// hang until their timeout hold no other up.
pub const EXEC_SLOTS: usize = 64;

/// How long a run may take beyond its timeout, start and end included, on a busy node.
const GRACE: Duration = Duration::from_secs(20);

/// How long a unit may take to be taken away: it is killed, which is a matter of milliseconds.
const END_LIMIT: Duration = Duration::from_secs(20);

/// How long the journal may take to show what a command said.
const JOURNAL_LIMIT: Duration = Duration::from_secs(3);

/// Units that are taken away at once when the agent starts.
const SWEEP_AT_ONCE: usize = 16;

/// SIGKILL: a probe has nothing to save.
const SIGKILL: i32 = 9;

const PREFIX: &str = "kari-probe.";

/// The unit of a probe of a service.
pub fn unit_name(service: &str, kind: ProbeKind) -> String {
    let stem = service.strip_suffix(".service").unwrap_or(service);
    let stem = stem.strip_prefix("kari.").unwrap_or(stem);
    format!("{PREFIX}{stem}.{}.service", kind.name())
}

/// Runs a command as `unit` with `settings`, which bound it by `limit`, and takes the unit away.
pub async fn run(
    systemd: &Systemd,
    unit: &str,
    settings: &[Setting],
    program: &str,
    limit: Duration,
) -> Result<(), ProbeError> {
    let ran = run_unit(systemd, unit, settings, program, limit).await;
    if let Err(error) = end(systemd, unit).await {
        tracing::warn!(unit, "a probe is left: {}", error_chain(&error));
    }
    ran
}

async fn run_unit(
    systemd: &Systemd,
    unit: &str,
    settings: &[Setting],
    program: &str,
    limit: Duration,
) -> Result<(), ProbeError> {
    let command = program.to_owned();
    let not_run = |message: String| ProbeError::NotRun {
        command: program.to_owned(),
        message,
    };
    let mut begin = SystemTime::now();
    let mut ended = systemd.run_transient(unit, settings, limit + GRACE).await;
    if matches!(ended, Err(SystemdError::UnitExists { .. })) {
        end(systemd, unit)
            .await
            .map_err(|error| not_run(error_chain(&error)))?;
        begin = SystemTime::now();
        ended = systemd.run_transient(unit, settings, limit + GRACE).await;
    }
    let state = match ended {
        Ok(Some(state)) => state,
        // Stopped with its service.
        Ok(None) => return Err(not_run("it was stopped".to_owned())),
        Err(error) => return Err(not_run(error_chain(&error))),
    };
    match (
        state.result.as_str(),
        state.exec_main_code,
        state.exec_main_status,
    ) {
        ("success", 1, 0) => Ok(()),
        ("timeout", _, _) => Err(ProbeError::ExecTimedOut {
            command,
            after: limit,
            output: last_words(unit, begin).await,
        }),
        // systemd's own, before the command: a user or a namespace that cannot be made.
        (_, 1, status) if status >= 200 => Err(not_run(format!(
            "systemd could not prepare it (exit {status})"
        ))),
        (_, 1, status) => Err(ProbeError::Exit {
            command,
            status,
            output: last_words(unit, begin).await,
        }),
        (_, 2 | 3, signal) => Err(ProbeError::Signal {
            command,
            signal,
            output: last_words(unit, begin).await,
        }),
        (result, _, _) => Err(not_run(format!("it ended as {result:?}"))),
    }
}

/// Kills what is left of a run, and frees the name.
async fn end(systemd: &Systemd, unit: &str) -> Result<(), SystemdError> {
    // It mostly has ended, and then there is nobody to kill.
    let _ = systemd.kill_unit(unit, SIGKILL).await;
    systemd.stop_unit(unit, END_LIMIT).await
}

/// Takes away the runs that an agent which was killed has left.
pub async fn sweep(systemd: &Systemd) -> Result<(), SystemdError> {
    let pattern = format!("{PREFIX}*");
    let left = systemd.list_units(&[&pattern]).await?;
    stream::iter(left)
        .for_each_concurrent(SWEEP_AT_ONCE, |listed| async move {
            if let Err(error) = end(systemd, &listed.name).await {
                tracing::warn!(
                    unit = listed.name,
                    "a probe is left: {}",
                    error_chain(&error)
                );
            }
        })
        .await;
    Ok(())
}

/// What the run of a unit that began then said last, for people; empty if it said nothing or the journal does
/// not tell. Not by the run's invocation: the journal reads that of the process, and one that ends at once has
/// often gone by then.
async fn last_words(unit: &str, begin: SystemTime) -> String {
    let begin = begin.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut command = Command::new("journalctl");
    command
        .args(["--no-pager", "--quiet", "--output=cat", "--lines=3"])
        // systemd's own lines about the unit have another field.
        .arg(format!("_SYSTEMD_UNIT={unit}"))
        .arg(format!(
            "--since=@{}.{:06}",
            begin.as_secs(),
            begin.subsec_micros()
        ))
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true);
    match timeout(JOURNAL_LIMIT, command.output()).await {
        Ok(Ok(output)) => one_line(&String::from_utf8_lossy(&output.stdout)),
        Ok(Err(_)) | Err(_) => String::new(),
    }
}
