//! Probes of processes: one check, and what checks over time mean.
//!
//! A check goes to 127.0.0.1 on a connection of its own, or is a command in the
//! process's jail ([`exec`]), and ends within its timeout. [`Checks`] is pure: time is passed in as the duration since any
//! fixed start of a monotonic clock.
//!
//! As in core/v1: a status from 200 to 399 is a success and a redirect is not
//! followed. Unlike there, a probe never goes to another host.

pub mod exec;

use std::net::Ipv4Addr;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::api::deployment::{ExecAction, HttpGet, LivenessProbe, ReadinessProbe};

/// What is asked of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// How it is asked.
    pub target: Target,
    /// After which time it has failed.
    pub timeout: Duration,
}

/// How a process is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `GET path`; succeeds on a status from 200 to 399.
    Http {
        /// The path with its query.
        path: String,
        /// All headers, `Host` among them.
        headers: Vec<(String, String)>,
    },
    /// Succeeds when a connection is accepted.
    Tcp,
}

/// Which of a process's probes it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProbeKind {
    /// Whether it may have traffic.
    Readiness,
    /// Whether it still works.
    Liveness,
}

impl ProbeKind {
    /// As it is called in the names of units.
    pub fn name(self) -> &'static str {
        match self {
            Self::Readiness => "readiness",
            Self::Liveness => "liveness",
        }
    }
}

/// What a probe of either kind asks.
#[derive(Debug, Clone, Copy)]
pub enum Action<'a> {
    /// A GET.
    Http(&'a HttpGet),
    /// A connection.
    Tcp,
    /// A command.
    Exec(&'a [String]),
}

impl<'a> Action<'a> {
    /// The schema lets exactly one be set.
    fn of(http_get: Option<&'a HttpGet>, exec: Option<&'a ExecAction>) -> Self {
        match (http_get, exec) {
            (Some(get), _) => Self::Http(get),
            (None, Some(exec)) => Self::Exec(&exec.command),
            (None, None) => Self::Tcp,
        }
    }
}

impl<'a> From<&'a ReadinessProbe> for Action<'a> {
    fn from(probe: &'a ReadinessProbe) -> Self {
        Self::of(probe.http_get.as_ref(), probe.exec.as_ref())
    }
}

impl<'a> From<&'a LivenessProbe> for Action<'a> {
    fn from(probe: &'a LivenessProbe) -> Self {
        Self::of(probe.http_get.as_ref(), probe.exec.as_ref())
    }
}

impl Check {
    /// The check of a probe that asks the port. `Host` is the first host of the route, else 127.0.0.1,
    /// unless the probe sets it; a route's `*.` becomes a label that stands for any.
    pub fn new(http_get: Option<&HttpGet>, timeout: Duration, route_host: Option<&str>) -> Self {
        let target = match http_get {
            None => Target::Tcp,
            Some(get) => {
                let mut headers: Vec<_> = get
                    .http_headers
                    .iter()
                    .map(|header| (header.name.clone(), header.value.clone()))
                    .collect();
                if !headers
                    .iter()
                    .any(|(name, _)| name.eq_ignore_ascii_case(HOST.as_str()))
                {
                    let host = route_host.unwrap_or("127.0.0.1");
                    headers.push((HOST.to_string(), host.replacen('*', ANY_LABEL, 1)));
                }
                Target::Http {
                    path: get.path.clone(),
                    headers,
                }
            }
        };
        Self { target, timeout }
    }
}

/// Stands for the `*` of a route's host in a request.
pub const ANY_LABEL: &str = "kari-probe";

/// What a check's request calls itself.
const AGENT_NAME: &str = concat!("kari-agent/", env!("CARGO_PKG_VERSION"));

/// Bytes of an answer that are read: more than a health endpoint says, little enough for a thousand probes.
const ANSWER_LIMIT_BYTES: usize = 64 << 10;

/// Characters of an answer that are shown to people.
const SHOWN_CHARACTERS: usize = 200;

/// Why a check failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// Nobody accepts the connection.
    #[error("cannot connect to 127.0.0.1:{port}: {message}")]
    Connect {
        /// The port.
        port: u16,
        /// The system's words.
        message: String,
    },
    /// No answer in time.
    #[error("no answer from 127.0.0.1:{port} within {} s", after.as_secs_f32())]
    TimedOut {
        /// The port.
        port: u16,
        /// The probe's timeout.
        after: Duration,
    },
    /// The answer is not a success.
    #[error("GET {path} was answered with status {status}, expected 200 to 399{}{body}", if body.is_empty() { "" } else { ": " })]
    Status {
        /// What was asked.
        path: String,
        /// The answer's status.
        status: u16,
        /// How the answer begins, control characters left out.
        body: String,
    },
    /// The answer is not HTTP, or was cut off.
    #[error("GET {path} was not answered as HTTP/1.1: {message}")]
    Http {
        /// What was asked.
        path: String,
        /// What is wrong.
        message: String,
    },
    /// The command did not end in time.
    #[error("{command} did not end within {} s and was ended{}", after.as_secs(), shown(output))]
    ExecTimedOut {
        /// Its program.
        command: String,
        /// The probe's timeout.
        after: Duration,
        /// Its last words.
        output: String,
    },
    /// The command says no, or is not one.
    #[error("{command} {}{}", match status { 127 => "was not found (exit 127)".to_owned(), 126 => "cannot be executed (exit 126)".to_owned(), status => format!("ended with exit {status}") }, shown(output))]
    Exit {
        /// Its program.
        command: String,
        /// Its exit status, not 0.
        status: i32,
        /// Its last words.
        output: String,
    },
    /// The command was killed.
    #[error("{command} was ended by signal {signal}{}", shown(output))]
    Signal {
        /// Its program.
        command: String,
        /// By which.
        signal: i32,
        /// Its last words.
        output: String,
    },
    /// The command was not run, for which the process cannot be blamed: it counts as no check.
    #[error("{command} could not be run: {message}")]
    NotRun {
        /// Its program.
        command: String,
        /// Why.
        message: String,
    },
}

fn shown(output: &str) -> String {
    match output {
        "" => String::new(),
        output => format!(": {output}"),
    }
}

/// The beginning of what a program said, on one line and without what would move a terminal's cursor.
fn one_line(text: &str) -> String {
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(SHOWN_CHARACTERS)
        .collect();
    line.trim().to_owned()
}

/// Checks the process behind `port` once; ends within the check's timeout.
pub async fn check(check: &Check, port: u16) -> Result<(), ProbeError> {
    let Check {
        target,
        timeout: after,
    } = check;
    let checked = timeout(*after, async {
        match target {
            Target::Tcp => connect(port).await.map(drop),
            Target::Http { path, headers } => check_http(port, path, headers).await,
        }
    });
    checked.await.unwrap_or(Err(ProbeError::TimedOut {
        port,
        after: *after,
    }))
}

async fn check_http(port: u16, path: &str, headers: &[(String, String)]) -> Result<(), ProbeError> {
    let answer = get(port, path, headers).await?;
    let status = answer.status;
    if (200..=399).contains(&status) {
        return Ok(());
    }
    Err(ProbeError::Status {
        path: path.to_owned(),
        status,
        body: one_line(&String::from_utf8_lossy(&answer.body)),
    })
}

/// An answer to a request of the agent's own.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: hyper::HeaderMap,
    /// How its body begins; empty if it could not be read.
    pub body: Bytes,
}

/// Asks 127.0.0.1 on a connection of its own. No time limit: that is the caller's.
pub(super) async fn get(
    port: u16,
    path: &str,
    headers: &[(String, String)],
) -> Result<Answer, ProbeError> {
    let not_http = |message: String| ProbeError::Http {
        path: path.to_owned(),
        message,
    };
    let mut request = Request::get(path)
        .header(USER_AGENT, AGENT_NAME)
        .header(CONNECTION, "close");
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|error| not_http(error.to_string()))?;

    let stream = connect(port).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| not_http(error.to_string()))?;
    // Ends with the connection, and at the latest with this call.
    let _driver = AbortOnDrop(tokio::spawn(async { drop(connection.await) }).abort_handle());
    let response: Response<Incoming> = sender
        .send_request(request)
        .await
        .map_err(|error| not_http(error.to_string()))?;
    let (head, body) = response.into_parts();
    let body = Limited::new(body, ANSWER_LIMIT_BYTES)
        .collect()
        .await
        .map(|body| body.to_bytes())
        .unwrap_or_default();
    Ok(Answer {
        status: head.status.as_u16(),
        headers: head.headers,
        body,
    })
}

async fn connect(port: u16) -> Result<TcpStream, ProbeError> {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .await
        .map_err(|error| ProbeError::Connect {
            port,
            message: error.to_string(),
        })
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// When checks are made and how many of them decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// From the start to the first check.
    pub initial_delay: Duration,
    /// From the begin of a check to that of the next.
    pub period: Duration,
    /// Successes in a row that make it ready; at least 1.
    pub success_threshold: u32,
    /// Failures in a row that make it failed; at least 1.
    pub failure_threshold: u32,
}

impl From<&LivenessProbe> for Timings {
    fn from(probe: &LivenessProbe) -> Self {
        Self {
            initial_delay: Duration::from_secs(probe.initial_delay_seconds.into()),
            period: Duration::from_secs(probe.period_seconds.into()),
            success_threshold: 1,
            failure_threshold: probe.failure_threshold.max(1),
        }
    }
}

impl From<&ReadinessProbe> for Timings {
    fn from(probe: &ReadinessProbe) -> Self {
        Self {
            initial_delay: Duration::from_secs(probe.initial_delay_seconds.into()),
            period: Duration::from_secs(probe.period_seconds.into()),
            success_threshold: probe.success_threshold.max(1),
            failure_threshold: probe.failure_threshold.max(1),
        }
    }
}

/// What the checks so far mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is decided yet.
    Waiting,
    /// Ready; stays so until `failure_threshold` checks in a row have failed.
    Ready,
    /// Failed, with the last check's error; stays so until `success_threshold` checks in a row have succeeded.
    Failed(ProbeError),
}

/// The checks of one process over time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checks {
    timings: Timings,
    next_check: Duration,
    verdict: Verdict,
    successes: u32,
    failures: u32,
    last_error: Option<ProbeError>,
}

impl Checks {
    /// No check was made yet; `started` is when the process was started.
    pub fn new(timings: Timings, started: Duration) -> Self {
        Self {
            timings,
            next_check: started.saturating_add(timings.initial_delay),
            verdict: Verdict::Waiting,
            successes: 0,
            failures: 0,
            last_error: None,
        }
    }

    /// When the next check is due. A check that ran late is not made up for.
    pub fn next_check(&self) -> Duration {
        self.next_check
    }

    /// Takes in a check that was begun at `begun`.
    pub fn record(&mut self, begun: Duration, result: Result<(), ProbeError>) {
        self.next_check = begun.saturating_add(self.timings.period);
        match result {
            Ok(()) => {
                self.failures = 0;
                self.last_error = None;
                self.successes = self.successes.saturating_add(1);
                if self.successes >= self.timings.success_threshold {
                    self.verdict = Verdict::Ready;
                }
            }
            // Nothing was asked, so nothing is in a row or broken.
            Err(error @ ProbeError::NotRun { .. }) => self.last_error = Some(error),
            Err(error) => {
                self.successes = 0;
                self.failures = self.failures.saturating_add(1);
                if self.failures >= self.timings.failure_threshold {
                    self.verdict = Verdict::Failed(error.clone());
                }
                self.last_error = Some(error);
            }
        }
    }

    /// What the checks so far mean.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// Why the last check failed, if it did: what to show while waiting.
    pub fn last_error(&self) -> Option<&ProbeError> {
        self.last_error.as_ref()
    }
}

#[cfg(test)]
mod tests;
