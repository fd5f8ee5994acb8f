//! OUTLINE: systemd over the system bus.
use std::path::Path;
use std::time::Duration;
use tokio::sync::mpsc;
use zbus::OwnedVariant;
/// Properties of a transient unit, as D-Bus has them.
pub type Properties = Vec<(String, OwnedVariant)>;
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// not connected; reconnecting in the background; retry later
    #[error("…")] Unavailable(#[source] zbus::Error),
    #[error("…")] TimedOut { call: &'static str },
    #[error("…")] UnitExists { unit: String },
    #[error("…")] NoSuchUnit { unit: String },
    /// the unit file is refused (BadUnit)
    #[error("…")] BadUnit { unit: String, message: String },
    #[error("…")] Refused { call: &'static str, unit: String, message: String },
    /// the job ended otherwise: failed, timeout, canceled, dependency
    #[error("…")] Job { unit: String, result: String },
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostEvent { Unit(String), /** after (re)connect, Reload: look at all */ Everything }
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedUnit { pub name: String, pub load_state: String, pub active_state: ActiveState, pub sub_state: String }
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActiveState { Active, Reloading, Inactive, Failed, Activating, Deactivating, Other }
#[derive(Debug, Clone, PartialEq)]
pub struct UnitState {
    pub name: String, pub load_state: String, pub active_state: ActiveState, pub sub_state: String,
    pub result: String, pub exec_main_code: i32, pub exec_main_status: i32, pub main_pid: u32, pub n_restarts: u32,
    /// 32 hex digits; empty before the first start
    pub invocation_id: String,
    /// None: not counted (the controller is not there) or not running
    pub tasks_current: Option<u64>, pub memory_current: Option<u64>,
    pub need_daemon_reload: bool, pub drop_in_paths: Vec<String>, pub fragment_path: String,
    /// microseconds of CLOCK_MONOTONIC
    pub active_enter_monotonic: u64, pub inactive_enter_monotonic: u64,
    /// of each ExecStart=, in order: (CLD code, status); code 0: did not run
    pub commands: Vec<(i32, i32)>,
    pub environment: Vec<String>,
}
impl UnitState { pub fn step_result(&self) -> super::records::StepResult { todo!() } }
#[derive(Clone)]
pub struct Systemd {}
impl Systemd {
    /// None: the system bus at its usual place
    pub async fn connect(address: Option<&str>) -> Result<(Self, mpsc::Receiver<HostEvent>), SystemdError> { todo!() }
    pub async fn list_units(&self, patterns: &[&str]) -> Result<Vec<ListedUnit>, SystemdError> { todo!() }
    /// None: not loaded (GetUnit)
    pub async fn get_unit_state(&self, unit: &str) -> Result<Option<UnitState>, SystemdError> { todo!() }
    /// returns once the job is queued; the end comes as HostEvent
    pub async fn start_transient(&self, unit: &str, properties: Properties) -> Result<(), SystemdError> { todo!() }
    /// starts and does not wait
    pub async fn start_unit(&self, unit: &str) -> Result<(), SystemdError> { todo!() }
    /// stops and waits for the job; then resets a failed state; a unit that is not loaded is stopped
    pub async fn stop_unit(&self, unit: &str, limit: Duration) -> Result<(), SystemdError> { todo!() }
    pub async fn reload_unit(&self, unit: &str, limit: Duration) -> Result<(), SystemdError> { todo!() }
    pub async fn kill_unit(&self, unit: &str, signal: i32) -> Result<(), SystemdError> { todo!() }
    pub async fn reset_failed(&self, unit: &str) -> Result<(), SystemdError> { todo!() }
    /// at most one per 10 s, callers meanwhile share it
    pub async fn daemon_reload(&self) -> Result<(), SystemdError> { todo!() }
    /// (pid, command line)
    pub async fn unit_processes(&self, unit: &str) -> Result<Vec<(u32, String)>, SystemdError> { todo!() }
    pub async fn version(&self) -> Result<String, SystemdError> { todo!() }
}
