//! One app: observe, plan, apply, until nothing is left to do but wait; and the
//! report of it, which is written by itself so that an API that hangs holds no
//! app up.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::{Api, Resource};

use super::apply::{Halt, StepError, apply};
use super::collect::collect;
use super::host::proxy::DRAIN_LIMIT;
use super::host::store::StoreError;
use super::memory::{Unread, Written};
use super::node::{Node, lock, monotonic};
use super::observe::{ObserveError, observe};
use super::plan::{Plan, Progress, plan};
use super::status::{is_terminal, status};
use super::view::Observed;
use crate::api::conditions::{READY, Statement, conditions};
use crate::api::names::{AppName, release_name};
use crate::api::reasons::Reason;
use crate::api::{GROUP, Release, ReleaseStatus, VERSION};
use crate::runtime::error_chain;
use crate::runtime::supervise::{Action, ReconcileError, Retry};

/// Rounds of observing and doing in one run; a whole release takes a dozen, in several runs.
const ROUNDS: usize = 40;

/// How often an app is looked at though nothing says that it changed.
const RESYNC: Duration = Duration::from_secs(60);

/// How often what nothing refers to is looked for.
const COLLECT_INTERVAL: Duration = Duration::from_secs(600);

/// How long what was put right is told.
const DRIFT_TOLD: Duration = Duration::from_secs(60);

/// Between two writes of a status that tells of no end.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// The owner of what an agent writes, to the API server.
const FIELD_MANAGER: &str = "kari-agent";

/// The owner of the one condition that says that an app cannot be looked at.
const UNREAD_FIELD_MANAGER: &str = "kari-agent-unread";

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// It could not be looked at.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// A step was not done.
    #[error(transparent)]
    Step(#[from] StepError),
    /// Garbage.
    #[error("cannot collect what nothing refers to")]
    Collect(#[source] StoreError),
}

impl ReconcileError for AppError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Observe(_) => "Observe",
            Self::Step(error) => error.failure().reason.as_str(),
            Self::Collect(_) => "Collect",
        }
    }
    fn retry(&self) -> Retry {
        Retry::Backoff
    }
}

/// One run for one app.
pub async fn reconcile(
    node: Arc<Node>,
    reports: crate::runtime::supervise::Trigger<AppName>,
    app: AppName,
) -> Result<Action, AppError> {
    keep_traffic(&node, &app).await;
    let mut halted = None;
    for _ in 0..ROUNDS {
        let observed = match observe(&node, &app).await {
            Ok(observed) => observed,
            Err(error) => {
                // Who cannot be looked at holds no place in front of others.
                node.withdraw(&app);
                note_unread(&node, &reports, &app, &error);
                return Err(error.into());
            }
        };
        lock(&node.memory(&app)).unread = None;
        let plan = plan(&observed);
        note_drift(&node, &observed, &plan);
        // What is being put right this very moment is told when that is done, or cannot be.
        if plan.steps.is_empty() || plan.progress != Progress::Idle || halted.is_some() {
            report(&node, &reports, &observed, &plan);
        }
        if let Some(error) = halted {
            return ended_by(error, &observed, &plan);
        }
        if plan.steps.is_empty() {
            return settle(&node, &observed, &plan).await;
        }
        match apply(&node, &observed, &plan.steps).await {
            Ok(()) | Err(Halt::AttemptFailed) => {}
            Err(Halt::HeldUp(error)) => halted = Some(error),
        }
    }
    Ok(Action::After(Duration::from_millis(100)))
}

/// What is in force is published again every now and then, which measures it, and puts right what somebody
/// changed. What cannot be found so is not known to be in force any more.
async fn keep_traffic(node: &Node, app: &AppName) {
    let memory = node.memory(app);
    let now = monotonic();
    let due = lock(&memory)
        .in_force
        .as_ref()
        .filter(|in_force| now >= in_force.measured + RESYNC)
        .map(|in_force| in_force.host.clone());
    let Some(host) = due else { return };
    let published = node.proxy.publish(&host).await;
    let mut memory = lock(&memory);
    match published {
        Ok(old) => {
            if let Some(in_force) = &mut memory.in_force {
                in_force.measured = now;
            }
            if !old.is_empty() {
                memory.drift = Some((format!("the proxy did not serve {app} as configured"), now));
                memory.begin_drain(old, now + DRAIN_LIMIT);
            }
        }
        Err(error) => {
            tracing::warn!(%app, "the virtual host is not in force: {}", error_chain(&error));
            memory.in_force = None;
        }
    }
}

/// A step failed for its surroundings. What holds the attempt up has a wait of its own, which another wish
/// ends; anything else is the supervisor's to space.
fn ended_by(error: StepError, observed: &Observed, plan: &Plan) -> Result<Action, AppError> {
    match (plan.wake, plan.steps.is_empty()) {
        (Some(wake), true) => {
            tracing::warn!(app = %observed.app, "held up: {}", error_chain(&error));
            Ok(Action::After(wake.saturating_sub(monotonic()).min(RESYNC)))
        }
        _ => Err(error.into()),
    }
}

/// Nothing is to be done now: tidy up, and wait.
async fn settle(node: &Arc<Node>, observed: &Observed, plan: &Plan) -> Result<Action, AppError> {
    let app = &observed.app;
    let is_known = observed.host.has_files || node.release(app).is_some();
    if !is_known {
        node.forget(app);
        return Ok(Action::Done);
    }
    let memory = node.memory(app);
    let is_quiet =
        matches!(plan.progress, Progress::Idle | Progress::Failed(_)) && observed.host.has_files;
    // Without room an attempt may never end by itself.
    let is_pressed = node.is_short_of_room() && observed.host.has_files;
    let due = lock(&memory)
        .collected
        .is_none_or(|last| observed.now >= last + COLLECT_INTERVAL);
    if (is_quiet || is_pressed) && due {
        lock(&memory).collected = Some(observed.now);
        let folder = node.store.app(app);
        let drop_caches = is_pressed && observed.host.builds.is_empty();
        let collected = tokio::task::spawn_blocking(move || collect(&folder, drop_caches)).await;
        match collected {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => {
                tracing::info!(%app, count, "moved what nothing refers to into the trash");
                node.trash.notify_one();
            }
            Ok(Err(error)) => return Err(AppError::Collect(error)),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    } else if !is_quiet && !is_pressed {
        // What the attempt leaves behind is looked for when it has ended.
        lock(&memory).collected = None;
    }
    let wake = plan
        .wake
        .map_or(RESYNC, |wake| wake.saturating_sub(monotonic()).min(RESYNC));
    Ok(Action::After(wake))
}

fn note_drift(node: &Node, observed: &Observed, plan: &Plan) {
    let memory = node.memory(&observed.app);
    let mut memory = lock(&memory);
    if !plan.drift.is_empty() {
        tracing::warn!(app = %observed.app, "the host is not as it was left: {}", plan.drift.join(", "));
        memory.drift = Some((plan.drift.join(", "), observed.now));
    }
    memory.drift = memory
        .drift
        .take()
        .filter(|(_, since)| observed.now < *since + DRIFT_TOLD);
}

/// Has it said on the Release that the app's records cannot be read: until somebody mends that, nothing
/// else is said there. What may pass by itself is told by the log and the metrics alone.
fn note_unread(
    node: &Node,
    reports: &crate::runtime::supervise::Trigger<AppName>,
    app: &AppName,
    error: &ObserveError,
) {
    let ObserveError::Store(error @ StoreError::Record { .. }) = error else {
        return;
    };
    let message = format!(
        "what runs goes on, and nothing of it is changed, healed or removed until its record can be read, by the version of Kari that wrote it or when the file is mended: {error}"
    );
    let memory = node.memory(app);
    let mut memory = lock(&memory);
    if memory
        .unread
        .as_ref()
        .is_none_or(|unread| unread.message != message)
    {
        let said = None;
        memory.unread = Some(Unread { message, said });
    }
    // What was told before is told anew when the app can be read again.
    memory.report = None;
    memory.written = None;
    reports.wake(app.clone());
}

/// Has the status written, if there is a Release to write it to.
fn report(
    node: &Node,
    reports: &crate::runtime::supervise::Trigger<AppName>,
    observed: &Observed,
    plan: &Plan,
) {
    let Some(release) = node.release(&observed.app) else {
        return;
    };
    let generation = release.meta().generation.unwrap_or_default();
    let masks = node.masks(
        &observed.app,
        observed.attempt.as_ref(),
        observed.applied.as_ref(),
    );
    let memory = node.memory(&observed.app);
    let mut memory = lock(&memory);
    let stands = release
        .0
        .as_ref()
        .ok()
        .and_then(|release| release.status.as_ref());
    let uid = release.meta().uid.clone().unwrap_or_default();
    let before = match &memory.written {
        Some(written) if written.uid == uid => written.status.conditions.clone(),
        Some(_) | None => stands
            .map(|status| status.conditions.clone())
            .unwrap_or_default(),
    };
    let drift = memory.drift.as_ref().map(|(what, _)| what.as_str());
    let told = masks.mask_status(status(observed, plan, generation, &before, drift));
    let terminal = is_terminal(&told);
    if memory
        .report
        .as_ref()
        .is_none_or(|(report, _)| *report != told)
    {
        memory.report = Some((told, terminal));
    }
    reports.wake(observed.app.clone());
}

/// Why a status was not written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the status of the Release")]
pub struct ReportError(#[source] Box<kube::Error>);

impl ReconcileError for ReportError {
    fn reason(&self) -> &'static str {
        "StatusNotWritten"
    }
    fn retry(&self) -> Retry {
        Retry::Backoff
    }
}

/// Writes an app's status, if it differs from what stands there: at most once a second, but for an end.
pub async fn write_report(node: Arc<Node>, app: AppName) -> Result<Action, ReportError> {
    let memory = node.memory(&app);
    let Some(release) = node.release(&app) else {
        return Ok(Action::Done);
    };
    let unread = lock(&memory).unread.clone();
    if let Some(unread) = unread {
        return say_unread(&node, &app, &release, unread).await;
    }
    let (told, written, terminal) = {
        let memory = lock(&memory);
        let Some((told, terminal)) = memory.report.clone() else {
            return Ok(Action::Done);
        };
        (told, memory.written.clone(), terminal)
    };
    let uid = release.meta().uid.clone().unwrap_or_default();
    let written = written.filter(|written| written.uid == uid);
    let stands = release
        .0
        .as_ref()
        .ok()
        .and_then(|release| release.status.clone())
        .map(own_part);
    let last = written
        .as_ref()
        .map(|written| &written.status)
        .or(stands.as_ref());
    if last == Some(&told) {
        return Ok(Action::Done);
    }
    let now = monotonic();
    if let Some(Written { at, .. }) = written
        && !terminal
        && now < at + WRITE_INTERVAL
    {
        return Ok(Action::After(at + WRITE_INTERVAL - now));
    }
    let name = release_name(app.name(), &node.name);
    let body = serde_json::json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "Release",
        // Told of this Release, and not of one that was made anew under its name meanwhile.
        "metadata": {"name": name, "uid": uid},
        "status": told,
    });
    let api = writable(&node, &app);
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    match api
        .patch_status(&name, &parameters, &Patch::Apply(&body))
        .await
    {
        Ok(_) => {
            lock(&memory).written = Some(Written {
                uid,
                status: told,
                at: monotonic(),
            });
            // What was told meanwhile comes next.
            Ok(Action::After(WRITE_INTERVAL))
        }
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(Action::Done),
        Err(error) => Err(ReportError(Box::new(error))),
    }
}

/// Says on the Release why the app is left alone. Of the status only the one condition is written, by a
/// field manager of its own, so that all else stays as it was said when the app could be read.
async fn say_unread(
    node: &Node,
    app: &AppName,
    release: &DeserializeGuard<Release>,
    unread: Unread,
) -> Result<Action, ReportError> {
    let uid = release.meta().uid.clone().unwrap_or_default();
    let generation = release.meta().generation.unwrap_or_default();
    let said = Some((uid.clone(), generation));
    if unread.said == said {
        return Ok(Action::Done);
    }
    let statement = Statement {
        kind: READY,
        status: Some(false),
        reason: Reason::InvalidSpec,
        message: unread.message.clone(),
    };
    let status = release.0.as_ref().ok().and_then(|r| r.status.as_ref());
    let before = status.map(|status| status.conditions.clone());
    let conditions = conditions(
        &[statement],
        generation,
        &before.unwrap_or_default(),
        Timestamp::now(),
    );
    let name = release_name(app.name(), &node.name);
    let body = serde_json::json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "Release",
        "metadata": {"name": name, "uid": uid},
        "status": {"conditions": conditions},
    });
    let parameters = PatchParams::apply(UNREAD_FIELD_MANAGER).force();
    match writable(node, app)
        .patch_status(&name, &parameters, &Patch::Apply(&body))
        .await
    {
        Ok(_) => {
            let memory = node.memory(app);
            if let Some(now) = &mut lock(&memory).unread
                && now.message == unread.message
            {
                now.said = said;
            }
            Ok(Action::Done)
        }
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(Action::Done),
        Err(error) => Err(ReportError(Box::new(error))),
    }
}

/// Where statuses are written. The answer is the whole object, which this version may not be able to read.
fn writable(node: &Node, app: &AppName) -> Api<DeserializeGuard<Release>> {
    Api::namespaced(node.client.clone(), app.namespace())
}

/// What of a status is the agent's.
fn own_part(status: ReleaseStatus) -> ReleaseStatus {
    let conditions = status
        .conditions
        .into_iter()
        .filter(|c| c.type_ != crate::api::conditions::REACHABLE)
        .collect();
    ReleaseStatus {
        conditions,
        ..status
    }
}
