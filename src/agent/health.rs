//! Whether a service does what it should: a pure function of what systemd says,
//! who listens on its port, and what its probe found.
//!
//! Ready is: a probe's success; without a probe, a port that the app's user
//! listens on; with neither, up for `minReadySeconds` without a restart. What was
//! ready is asked whether it is alive, and [`Tracker::restart`] says when one
//! that is not is to be restarted.

use std::collections::BTreeSet;
use std::time::Duration;

use super::host::port::{Listener, PortState, port_state, unreachable_message};
use super::host::probe::{Checks, ProbeKind, Timings, Verdict};
use super::host::records::RecordedFailure;
use super::host::systemd::{ActiveState, UnitState};
use super::plan::CRASH_LOOP_RESTARTS;
use super::view::Health;
use crate::api::deployment::{Process, ProcessType};
use crate::api::reasons::Reason;

/// How long a process without a probe may take until it listens on its port: what a readiness probe
/// with the defaults of the schema allows.
const LISTEN_LIMIT: Duration = Duration::from_secs(60);

/// How long a process may listen on another address only before that is held against it: one that
/// opens several sockets opens them one after the other.
const ADDRESS_GRACE: Duration = Duration::from_secs(5);

/// The least that a process with neither probe nor port must stay up: a program that is not found ends
/// within milliseconds, but not before systemd calls it started.
const SHORTEST_LIFE: Duration = Duration::from_secs(1);

/// After being ready for this long (and twice `minReadySeconds`), earlier restarts are forgotten: three in a
/// year are no loop.
const FORGET_RESTARTS: Duration = Duration::from_secs(60);

/// Between two looks at a port that is not listened on yet.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// What is remembered of a service from look to look.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tracker {
    /// The start that it is about.
    pub invocation: String,
    /// The readiness probe's checks of this start, if there is one.
    pub readiness: Option<Checks>,
    /// The liveness probe's checks of this start, if there is one.
    pub liveness: Option<Checks>,
    /// The checks that are under way.
    pub under_way: BTreeSet<ProbeKind>,
    /// Since when it is ready without a break.
    pub ready_since: Option<Duration>,
    /// Whether this start was ready once: from then on it is asked whether it is alive.
    pub was_ready: bool,
    /// The start that the agent ended as it was not alive, and why.
    pub ended_by_agent: Option<(String, String)>,
    /// Why the agent ended the start before this one, if it did.
    pub restarted_for: Option<String>,
    /// Restarts of what was not alive, without a long life between them, and when the last was.
    pub liveness_restarts: u32,
    /// When the last of them was.
    pub last_liveness_restart: Option<Duration>,
    /// How its main process ended last: result, code and status.
    pub last_end: Option<(String, i32, i32)>,
    /// systemd's count of restarts when it was ready first.
    pub restarts_when_ready: Option<u32>,
}

impl Tracker {
    /// Takes in a new look at the unit: another start has nothing of the last one's checks.
    pub fn look(&mut self, process: &Process, state: &UnitState, now: Duration) {
        // The next start forgets it.
        if state.exec_main_code != 0 {
            self.last_end = Some((
                state.result.clone(),
                state.exec_main_code,
                state.exec_main_status,
            ));
        }
        if self.invocation != state.invocation_id {
            self.restarted_for = self
                .ended_by_agent
                .take()
                .and_then(|(start, why)| (start == self.invocation).then_some(why));
            self.invocation = state.invocation_id.clone();
            self.readiness = process
                .readiness_probe
                .as_ref()
                .map(|probe| Checks::new(Timings::from(probe), now));
            self.liveness = process
                .liveness_probe
                .as_ref()
                .map(|probe| Checks::new(Timings::from(probe), now));
            self.ready_since = None;
            self.was_ready = false;
        }
    }

    /// Whether a service that is not alive is to be restarted.
    pub fn restart(&self, now: Duration) -> Restart {
        let ending = |(start, _): &(String, String)| *start == self.invocation;
        let Some(why) = self.not_alive() else {
            return Restart::No;
        };
        if self.ended_by_agent.as_ref().is_some_and(ending) {
            return Restart::No;
        }
        let pause = match self.liveness_restarts {
            0 => Duration::ZERO,
            restarts => FIRST_LIVENESS_PAUSE
                .saturating_mul(1 << (restarts - 1).min(16))
                .min(LONGEST_LIVENESS_PAUSE),
        };
        match self.last_liveness_restart.map(|last| last + pause) {
            Some(due) if now < due => Restart::At(due),
            Some(_) | None => Restart::Now { why },
        }
    }

    /// Takes in that the agent ends this start now.
    pub fn note_restart(&mut self, why: String, now: Duration) {
        self.ended_by_agent = Some((self.invocation.clone(), why));
        self.liveness_restarts = self.liveness_restarts.saturating_add(1);
        self.last_liveness_restart = Some(now);
    }

    /// Why it is not alive, as its liveness probe says.
    fn not_alive(&self) -> Option<String> {
        match self.liveness.as_ref()?.verdict() {
            Verdict::Failed(error) => Some(error.to_string()),
            Verdict::Waiting | Verdict::Ready => None,
        }
    }

    fn is_alive(&self) -> bool {
        let says_so = |checks: &Checks| *checks.verdict() == Verdict::Ready;
        self.liveness.as_ref().is_none_or(says_so)
    }
}

/// The pause after the first restart of what was not alive; each further one doubles it. core/v1's
/// CrashLoopBackOff.
const FIRST_LIVENESS_PAUSE: Duration = Duration::from_secs(10);

/// The longest such pause.
const LONGEST_LIVENESS_PAUSE: Duration = Duration::from_secs(300);

/// After a life of this length the next restart is without a pause again: twice the longest, as in core/v1.
const FORGET_LIVENESS_RESTARTS: Duration = Duration::from_secs(600);

/// Whether a service is to be restarted as it is not alive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Restart {
    /// No, or it is being restarted.
    No,
    /// Not before then.
    At(Duration),
    /// Yes.
    Now {
        /// What its probe said.
        why: String,
    },
}

/// What is looked at.
pub struct Look<'a> {
    /// Its spec.
    pub process: &'a Process,
    /// systemd's view.
    pub state: &'a UnitState,
    /// Its port.
    pub port: Option<u16>,
    /// The app's service user.
    pub uid: u32,
    /// The node's listeners.
    pub listeners: &'a [Listener],
    /// `minReadySeconds`.
    pub min_ready: Duration,
    /// Whether its release is committed: what it was before the agent was started is not known, but it
    /// was ready once.
    pub is_committed: bool,
    /// Now, CLOCK_MONOTONIC.
    pub now: Duration,
}

/// Whether the service does what it should, and what is to be remembered of that.
pub fn health(look: &Look<'_>, tracker: &mut Tracker) -> Health {
    let up = Duration::from_micros(look.state.active_enter_monotonic);
    let is_steady = look.state.active_state == ActiveState::Active
        && tracker.was_ready
        && tracker.is_alive()
        && look.now >= up + FORGET_RESTARTS.max(2 * look.min_ready);
    if is_steady || (look.is_committed && tracker.restarts_when_ready.is_none()) {
        tracker.restarts_when_ready = Some(look.state.n_restarts);
    }
    if is_steady && look.now >= up + FORGET_LIVENESS_RESTARTS {
        tracker.liveness_restarts = 0;
    }
    let health = judge(look, tracker);
    match &health {
        Health::Ready { since } => {
            tracker.ready_since = Some(*since);
            tracker.was_ready = true;
            if tracker.restarts_when_ready.is_none() {
                tracker.restarts_when_ready = Some(look.state.n_restarts);
            }
        }
        Health::Waiting { .. } | Health::PortTaken { .. } | Health::Failed(_) => {
            tracker.ready_since = None
        }
    }
    health
}

fn judge(look: &Look<'_>, tracker: &Tracker) -> Health {
    let Look {
        process,
        state,
        port,
        uid,
        listeners,
        min_ready,
        is_committed,
        now,
    } = *look;
    if let Some(port) = port
        && let PortState::Foreign { uid, address } = port_state(listeners, port, uid)
    {
        return Health::PortTaken {
            by: format!("a process of uid {uid} listens on {address}"),
        };
    }
    match tracker.restarts_when_ready {
        // It never was ready: one end is enough.
        None if ended(state) => return Health::Failed(start_failure(process, tracker, state)),
        Some(before) if state.n_restarts.saturating_sub(before) >= CRASH_LOOP_RESTARTS => {
            let last = match &tracker.restarted_for {
                Some(why) => format!("its livenessProbe failed: {why}"),
                None if is_out_of_memory(process, tracker.last_end.as_ref()) => {
                    return Health::Failed(out_of_memory(process));
                }
                None => format!("it {}", end_of(tracker.last_end.as_ref())),
            };
            return Health::Failed(failure(
                Reason::CrashLooping,
                format!(
                    "process {} was restarted {} times since it was ready; last {last}",
                    process.name,
                    state.n_restarts - before,
                ),
            ));
        }
        Some(_) | None => {}
    }
    let ended_for = tracker
        .ended_by_agent
        .as_ref()
        .filter(|(start, _)| *start == state.invocation_id)
        .map(|(_, why)| why.clone());
    if let Some(why) = tracker.not_alive().or(ended_for) {
        let message = format!(
            "process {} is not alive and is restarted, after each time later: its livenessProbe failed: {why}",
            process.name
        );
        return match is_committed {
            true => Health::Failed(failure(Reason::ProbeFailed, message)),
            // Its restarts are counted, as any that it causes before its release is committed.
            false => waiting(message, None),
        };
    }
    match state.active_state {
        ActiveState::Active | ActiveState::Reloading => {}
        ActiveState::Activating
            if process.process_type == ProcessType::Notify && state.main_pid != 0 =>
        {
            return waiting(
                format!("process {} has not said READY=1 yet", process.name),
                None,
            );
        }
        ActiveState::Activating => {
            return waiting(format!("process {} is being started", process.name), None);
        }
        ActiveState::Inactive
        | ActiveState::Failed
        | ActiveState::Deactivating
        | ActiveState::Unknown => {
            return waiting(format!("process {} is not running", process.name), None);
        }
    }
    let active_since = Duration::from_micros(state.active_enter_monotonic);
    match (port, &tracker.readiness) {
        (Some(port), readiness) => match port_state(listeners, port, uid) {
            PortState::Unreachable { address } if now >= active_since + ADDRESS_GRACE => {
                Health::Failed(failure(
                    Reason::ProbeFailed,
                    unreachable_message(&process.name, address),
                ))
            }
            PortState::Unreachable { .. } => waiting(
                format!("process {} does not listen on 127.0.0.1 yet", process.name),
                Some(active_since + ADDRESS_GRACE),
            ),
            PortState::Owned => match readiness {
                Some(readiness) => probed(process, readiness, tracker, now),
                None => Health::Ready {
                    since: tracker.ready_since.unwrap_or(now),
                },
            },
            PortState::Silent | PortState::Foreign { .. } => match readiness {
                Some(readiness) if matches!(readiness.verdict(), Verdict::Failed(_)) => {
                    probed(process, readiness, tracker, now)
                }
                // A command can find good what listens on nothing.
                None if now >= active_since + LISTEN_LIMIT => {
                    Health::Failed(failure(Reason::ProbeFailed, not_listening(process, port)))
                }
                Some(readiness)
                    if !tracker.was_ready
                        && *readiness.verdict() == Verdict::Ready
                        && now >= active_since + LISTEN_LIMIT =>
                {
                    Health::Failed(failure(Reason::ProbeFailed, not_listening(process, port)))
                }
                Some(_) | None => waiting(
                    format!(
                        "process {} does not listen on port {port} yet",
                        process.name
                    ),
                    Some(now + LOOK_INTERVAL),
                ),
            },
        },
        (None, Some(readiness)) => probed(process, readiness, tracker, now),
        (None, None) => {
            let up = active_since + min_ready.max(SHORTEST_LIFE);
            if now >= up {
                Health::Ready {
                    since: active_since,
                }
            } else {
                waiting(
                    format!(
                        "process {} is to stay up for {} s",
                        process.name,
                        min_ready.as_secs()
                    ),
                    Some(up),
                )
            }
        }
    }
}

fn probed(process: &Process, readiness: &Checks, tracker: &Tracker, now: Duration) -> Health {
    match readiness.verdict() {
        Verdict::Ready => Health::Ready {
            since: tracker.ready_since.unwrap_or(now),
        },
        Verdict::Failed(error) => Health::Failed(failure(
            Reason::ProbeFailed,
            format!(
                "process {} is not ready: its readinessProbe failed: {error}",
                process.name
            ),
        )),
        Verdict::Waiting => {
            let what = match readiness.last_error() {
                Some(error) => format!(
                    "process {} is not ready yet: its readinessProbe failed: {error}",
                    process.name
                ),
                None => format!("process {} is being probed", process.name),
            };
            waiting(what, Some(readiness.next_check()))
        }
    }
}

fn not_listening(process: &Process, port: u16) -> String {
    let variable = process.port.as_ref().map_or("", |port| &port.env);
    format!(
        "process {} does not listen on port {port} within {} s: it must listen on 127.0.0.1 at the port that ${variable} names",
        process.name,
        LISTEN_LIMIT.as_secs()
    )
}

/// Whether it has ended at least once since it was started.
fn ended(state: &UnitState) -> bool {
    state.n_restarts > 0
        || state.active_state == ActiveState::Failed
        || state.sub_state == "auto-restart"
}

fn start_failure(process: &Process, tracker: &Tracker, state: &UnitState) -> RecordedFailure {
    let program = process.command.first().map_or("", String::as_str);
    let name = &process.name;
    let end = tracker.last_end.as_ref();
    if is_out_of_memory(process, end) {
        return out_of_memory(process);
    }
    let message = match end {
        Some((_, 1, 127)) => format!("process {name}: command not found: {program}"),
        Some((_, 1, 126)) => format!("process {name}: {program} cannot be executed"),
        Some((result, _, _)) if result == "timeout" => {
            format!(
                "process {name} did not say READY=1 in time: call sd_notify, or use type Simple"
            )
        }
        _ if state.result == "timeout" => {
            format!(
                "process {name} did not say READY=1 in time: call sd_notify, or use type Simple"
            )
        }
        Some((result, _, _)) if result == "protocol" => format!(
            "process {name} {} and never said READY=1: call sd_notify, or use type Simple",
            end_of(end)
        ),
        end => format!("process {name} {} before it was ready", end_of(end)),
    };
    failure(Reason::StartFailed, message)
}

fn end_of(end: Option<&(String, i32, i32)>) -> String {
    match end {
        Some((_, 1, status)) => format!("ended with exit {status}"),
        Some((_, _, signal)) => format!("was ended by signal {signal}"),
        None => "ended".to_owned(),
    }
}

/// Killed for its memory: systemd says so on cgroup v2; on v1 a SIGKILL is all there is, which a process
/// with a limit most likely got for that.
fn is_out_of_memory(process: &Process, end: Option<&(String, i32, i32)>) -> bool {
    let has_limit = process
        .resources
        .as_ref()
        .and_then(|resources| resources.limits.as_ref())
        .is_some_and(|limits| limits.memory.is_some());
    match end {
        Some((result, _, _)) if result == "oom-kill" => true,
        Some((_, 2 | 3, 9)) => has_limit,
        Some(_) | None => false,
    }
}

fn out_of_memory(process: &Process) -> RecordedFailure {
    failure(
        Reason::ExceededMemory,
        format!(
            "process {} was killed, most likely for its memory: raise its resources.limits.memory",
            process.name
        ),
    )
}

fn waiting(what: String, until: Option<Duration>) -> Health {
    Health::Waiting { what, until }
}

fn failure(reason: Reason, message: String) -> RecordedFailure {
    RecordedFailure {
        reason,
        message,
        log_tail: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(extra: serde_json::Value) -> Process {
        let mut spec = serde_json::json!({"name": "web", "command": ["serve"]});
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        serde_json::from_value(spec).unwrap()
    }

    fn running() -> UnitState {
        UnitState {
            name: "u.service".into(),
            load_state: "loaded".into(),
            active_state: ActiveState::Active,
            sub_state: "running".into(),
            has_job: false,
            result: "success".into(),
            exec_main_code: 0,
            exec_main_status: 0,
            main_pid: 7,
            n_restarts: 0,
            invocation_id: "a".into(),
            tasks_current: None,
            memory_current: None,
            need_daemon_reload: false,
            drop_in_paths: vec![],
            fragment_path: String::new(),
            active_enter_monotonic: 10_000_000,
            inactive_enter_monotonic: 0,
        }
    }

    fn listener(address: &str, uid: u32) -> Listener {
        Listener {
            address: address.parse().unwrap(),
            uid,
            inode: 1,
        }
    }

    struct Case<'a> {
        process: &'a Process,
        state: UnitState,
        listeners: Vec<Listener>,
        is_committed: bool,
        now: u64,
    }

    fn judged(case: &Case<'_>, tracker: &mut Tracker) -> Health {
        let look = Look {
            process: case.process,
            state: &case.state,
            port: case.process.port.as_ref().map(|_| 20001),
            uid: 50001,
            listeners: &case.listeners,
            min_ready: Duration::from_secs(5),
            is_committed: case.is_committed,
            now: Duration::from_secs(case.now),
        };
        tracker.look(case.process, &case.state, look.now);
        health(&look, tracker)
    }

    fn reason(health: &Health) -> Option<(Reason, &str)> {
        match health {
            Health::Failed(failure) => Some((failure.reason, &failure.message)),
            Health::Waiting { .. } | Health::Ready { .. } | Health::PortTaken { .. } => None,
        }
    }

    #[test]
    fn a_process_with_neither_probe_nor_port_is_ready_when_it_stayed_up() {
        let process = process(serde_json::json!({}));
        let mut case = Case {
            process: &process,
            state: running(),
            listeners: vec![],
            is_committed: false,
            now: 12,
        };
        let mut tracker = Tracker::default();
        assert!(
            matches!(judged(&case, &mut tracker), Health::Waiting { until: Some(u), .. } if u == Duration::from_secs(15))
        );
        case.now = 15;
        assert_eq!(
            judged(&case, &mut tracker),
            Health::Ready {
                since: Duration::from_secs(10)
            }
        );
    }

    #[test]
    fn a_port_is_ready_when_the_app_alone_listens_on_it() {
        let process = process(serde_json::json!({"port": {"env": "PORT"}}));
        let mut case = Case {
            process: &process,
            state: running(),
            listeners: vec![],
            is_committed: false,
            now: 12,
        };
        let mut tracker = Tracker::default();
        assert!(matches!(
            judged(&case, &mut tracker),
            Health::Waiting { .. }
        ));
        case.listeners = vec![listener("127.0.0.1:20001", 50001)];
        assert_eq!(
            judged(&case, &mut tracker),
            Health::Ready {
                since: Duration::from_secs(12)
            }
        );
        case.now = 20;
        assert_eq!(
            judged(&case, &mut tracker),
            Health::Ready {
                since: Duration::from_secs(12)
            }
        );
        case.listeners.push(listener("0.0.0.0:20001", 0));
        assert!(matches!(
            judged(&case, &mut tracker),
            Health::PortTaken { .. }
        ));
        case.listeners = vec![listener("[::1]:20001", 50001)];
        let health = judged(&case, &mut tracker);
        assert!(
            matches!(reason(&health), Some((Reason::ProbeFailed, m)) if m.contains("[::1]:20001")),
            "{health:?}"
        );
        case.listeners.clear();
        case.now = 71;
        let health = judged(&case, &mut tracker);
        assert!(
            matches!(reason(&health), Some((Reason::ProbeFailed, m)) if m.contains("$PORT")),
            "{health:?}"
        );
    }

    #[test]
    fn how_a_process_ended_before_it_was_ready_is_told() {
        let process = process(serde_json::json!({"port": {"env": "PORT"}}));
        for (result, code, status, expected, part) in [
            (
                "exit-code",
                1,
                127,
                Reason::StartFailed,
                "command not found: serve",
            ),
            (
                "exit-code",
                1,
                126,
                Reason::StartFailed,
                "cannot be executed",
            ),
            (
                "exit-code",
                1,
                3,
                Reason::StartFailed,
                "ended with exit 3 before it was ready",
            ),
            ("signal", 2, 11, Reason::StartFailed, "signal 11"),
            ("oom-kill", 2, 9, Reason::ExceededMemory, "memory"),
            ("timeout", 2, 15, Reason::StartFailed, "READY=1"),
            ("protocol", 1, 0, Reason::StartFailed, "READY=1"),
        ] {
            let state = UnitState {
                active_state: ActiveState::Activating,
                sub_state: "auto-restart".into(),
                result: result.into(),
                exec_main_code: code,
                exec_main_status: status,
                ..running()
            };
            let case = Case {
                process: &process,
                state,
                listeners: vec![],
                is_committed: false,
                now: 12,
            };
            let health = judged(&case, &mut Tracker::default());
            assert!(
                matches!(reason(&health), Some((r, m)) if r == expected && m.contains(part)),
                "{health:?}"
            );
        }
    }

    #[test]
    fn a_process_with_a_memory_limit_that_was_killed_exceeded_it() {
        let limited = process(serde_json::json!({"resources": {"limits": {"memory": "64Mi"}}}));
        let free = process(serde_json::json!({}));
        for (process, expected) in [
            (&limited, Reason::ExceededMemory),
            (&free, Reason::StartFailed),
        ] {
            let state = UnitState {
                active_state: ActiveState::Activating,
                sub_state: "auto-restart".into(),
                result: "signal".into(),
                exec_main_code: 2,
                exec_main_status: 9,
                ..running()
            };
            let case = Case {
                process,
                state,
                listeners: vec![],
                is_committed: false,
                now: 12,
            };
            let health = judged(&case, &mut Tracker::default());
            assert!(
                matches!(reason(&health), Some((r, _)) if r == expected),
                "{health:?}"
            );
        }
    }

    #[test]
    fn a_restart_after_it_was_ready_begins_anew_and_the_third_is_a_crash_loop() {
        let process = process(serde_json::json!({"port": {"env": "PORT"}}));
        let listeners = vec![listener("0.0.0.0:20001", 50001)];
        let mut case = Case {
            process: &process,
            state: running(),
            listeners,
            is_committed: false,
            now: 12,
        };
        let mut tracker = Tracker::default();
        judged(&case, &mut tracker);
        for restarts in 1..=2 {
            case.state = UnitState {
                n_restarts: restarts,
                invocation_id: format!("b{restarts}"),
                ..running()
            };
            case.now += 10;
            assert_eq!(
                judged(&case, &mut tracker),
                Health::Ready {
                    since: Duration::from_secs(case.now)
                }
            );
        }
        case.state = UnitState {
            n_restarts: 3,
            invocation_id: "b3".into(),
            ..running()
        };
        let health = judged(&case, &mut tracker);
        assert!(
            matches!(reason(&health), Some((Reason::CrashLooping, _))),
            "{health:?}"
        );
    }

    #[test]
    fn what_crashed_before_the_agent_was_started_is_not_held_against_a_committed_process() {
        let process = process(serde_json::json!({"port": {"env": "PORT"}}));
        let mut case = Case {
            process: &process,
            state: UnitState {
                n_restarts: 2,
                ..running()
            },
            listeners: vec![listener("127.0.0.1:20001", 50001)],
            is_committed: true,
            now: 12,
        };
        assert!(matches!(
            judged(&case, &mut Tracker::default()),
            Health::Ready { .. }
        ));
        case.is_committed = false;
        assert!(matches!(
            judged(&case, &mut Tracker::default()),
            Health::Failed(_)
        ));
    }

    #[test]
    fn a_crash_loop_is_forgotten_when_the_process_stays_up() {
        let process = process(serde_json::json!({"port": {"env": "PORT"}}));
        let mut case = Case {
            process: &process,
            state: running(),
            listeners: vec![listener("127.0.0.1:20001", 50001)],
            is_committed: true,
            now: 12,
        };
        let mut tracker = Tracker::default();
        judged(&case, &mut tracker);
        case.state.n_restarts = 3;
        assert_eq!(
            reason(&judged(&case, &mut tracker)).map(|r| r.0),
            Some(Reason::CrashLooping)
        );
        case.now = 10 + FORGET_RESTARTS.as_secs();
        assert!(matches!(judged(&case, &mut tracker), Health::Ready { .. }));
    }

    /// A probed process, and what its liveness probe finds each second.
    fn not_alive_from(start: u64, tracker: &mut Tracker) {
        let liveness = tracker.liveness.as_mut().unwrap();
        for second in start..start + 3 {
            let error = crate::agent::host::probe::ProbeError::Connect {
                port: 20001,
                message: "nobody".into(),
            };
            liveness.record(Duration::from_secs(second), Err(error));
        }
    }

    #[test]
    fn what_is_not_alive_is_restarted_later_each_time_up_to_five_minutes() {
        let process = process(
            serde_json::json!({"port": {"env": "PORT"}, "livenessProbe": {"tcpSocket": {}, "periodSeconds": 1}}),
        );
        let mut case = Case {
            process: &process,
            state: running(),
            listeners: vec![listener("127.0.0.1:20001", 50001)],
            is_committed: true,
            now: 100,
        };
        let mut tracker = Tracker::default();
        let mut pauses = vec![];
        for restarts in 0..8u32 {
            case.state.n_restarts = restarts;
            case.state.invocation_id = format!("start {restarts}");
            judged(&case, &mut tracker);
            assert_eq!(tracker.restart(Duration::from_secs(case.now)), Restart::No);
            not_alive_from(case.now, &mut tracker);
            let last = case.now;
            case.now += 3;
            let health = judged(&case, &mut tracker);
            assert!(
                matches!(reason(&health), Some((_, m)) if m.contains("livenessProbe failed")),
                "{health:?}"
            );
            if let Restart::At(due) = tracker.restart(Duration::from_secs(case.now)) {
                case.now = due.as_secs();
            }
            let now = Duration::from_secs(case.now);
            let Restart::Now { why } = tracker.restart(now) else {
                panic!("no restart at {now:?}");
            };
            pauses.push(case.now - last);
            tracker.note_restart(why, now);
            assert_eq!(tracker.restart(now), Restart::No, "it is being restarted");
        }
        assert_eq!(pauses, [3, 10, 20, 40, 80, 160, 300, 300]);
        case.state.n_restarts = 8;
        case.state.invocation_id = "start 8".into();
        let health = judged(&case, &mut tracker);
        assert!(
            matches!(reason(&health), Some((Reason::CrashLooping, m)) if m.contains("livenessProbe failed: cannot connect")),
            "{health:?}"
        );
    }

    #[test]
    fn what_is_not_alive_while_it_bakes_fails_by_its_third_restart() {
        let process = process(
            serde_json::json!({"port": {"env": "PORT"}, "livenessProbe": {"tcpSocket": {}, "periodSeconds": 1}}),
        );
        let mut case = Case {
            process: &process,
            state: running(),
            listeners: vec![listener("127.0.0.1:20001", 50001)],
            is_committed: false,
            now: 100,
        };
        let mut tracker = Tracker::default();
        judged(&case, &mut tracker);
        not_alive_from(100, &mut tracker);
        assert!(matches!(
            judged(&case, &mut tracker),
            Health::Waiting { .. }
        ));
        tracker.note_restart("nobody".into(), Duration::from_secs(103));
        case.state.n_restarts = 3;
        case.state.invocation_id = "another".into();
        let health = judged(&case, &mut tracker);
        assert_eq!(reason(&health).map(|r| r.0), Some(Reason::CrashLooping));
    }

    #[test]
    fn a_command_makes_a_process_without_a_port_ready() {
        let process = process(
            serde_json::json!({"readinessProbe": {"exec": {"command": ["check"]}, "failureThreshold": 1}}),
        );
        let case = Case {
            process: &process,
            state: running(),
            listeners: vec![],
            is_committed: false,
            now: 100,
        };
        let mut tracker = Tracker::default();
        assert!(matches!(
            judged(&case, &mut tracker),
            Health::Waiting { .. }
        ));
        let now = Duration::from_secs(100);
        let not_run = crate::agent::host::probe::ProbeError::NotRun {
            command: "check".into(),
            message: "systemd is away".into(),
        };
        let readiness = tracker.readiness.as_mut().unwrap();
        readiness.record(now, Err(not_run));
        assert!(
            matches!(judged(&case, &mut tracker), Health::Waiting { .. }),
            "the process is blamed for what the node could not do"
        );
        tracker.readiness.as_mut().unwrap().record(now, Ok(()));
        assert_eq!(judged(&case, &mut tracker), Health::Ready { since: now });
    }
}
