//! OUTLINE: probes of processes
use std::time::Duration;
use crate::api::deployment::Probe;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check { pub target: Target, pub timeout: Duration }
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target { Http { path: String, host: String, headers: Vec<(String, String)> }, Tcp }
impl Check {
    /// Host is the first of the route's, else 127.0.0.1, unless a header says otherwise
    pub fn new(probe: &Probe, route_host: Option<&str>) -> Self { todo!() }
}
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    #[error("…")] Connect { port: u16, message: String },
    #[error("…")] TimedOut { after: Duration },
    #[error("…")] Status { path: String, status: u16, body: String },
    #[error("…")] Http { path: String, message: String },
}
/// One check of 127.0.0.1:port on a connection of its own; ends within the timeout.
pub async fn check(check: &Check, port: u16) -> Result<(), ProbeError> { todo!() }

/// When to check next and what the checks so far mean. Pure: `now` is a monotonic duration since any fixed start.
#[derive(Debug, Clone, PartialEq)]
pub struct Timings { pub initial_delay: Duration, pub period: Duration, pub success_threshold: u32, pub failure_threshold: u32 }
impl From<&Probe> for Timings { fn from(_: &Probe) -> Self { todo!() } }
#[derive(Debug, Clone, PartialEq)]
pub struct Readiness { /* private */ }
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict { Waiting, Ready, Failed(ProbeError) }
impl Readiness {
    pub fn new(timings: Timings, started: Duration) -> Self { todo!() }
    /// when the next check is due (may be past)
    pub fn next_check(&self) -> Duration { todo!() }
    pub fn record(&mut self, now: Duration, result: Result<(), ProbeError>) { todo!() }
    pub fn verdict(&self) -> Verdict { todo!() }
    pub fn last_error(&self) -> Option<&ProbeError> { todo!() }
}
