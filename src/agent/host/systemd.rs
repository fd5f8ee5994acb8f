//! systemd over the node's system bus.
//!
//! - Every call has a time limit and a typed error.
//! - Signals only say *look*: the connection's watcher turns them into
//!   [`HostEvent`]s, coalesced, so that a slow reader costs nothing but delay.
//!   After a connect, a reconnect and a reload of systemd comes
//!   [`HostEvent::Everything`], as nothing is queued meanwhile. The truth is read.
//! - A lost bus is found again by itself; calls fail with
//!   [`SystemdError::Unavailable`] meanwhile.
//!
//! Deliberately absent: `ListUnitFiles*` (more than a second of PID 1 at 500
//! units), the private socket (refused from a foreign pid namespace), and unit
//! files, which [`super::store::UnitFiles`] writes.

mod properties;
mod watch;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, broadcast, mpsc, watch as latest};
use tokio::time::{Instant, timeout};
use zbus::{Connection, OwnedObjectPath, OwnedVariant};
use zbus_systemd::systemd1::ManagerProxy;

use self::properties::{Bag, properties_of, unit_state};
use self::watch::{Marked, Session, Watcher};
use super::jail::Setting;
use super::records::StepResult;

/// The longest that a call may take: PID 1 is deaf for half a second during a reload of 500 units, so
/// this is only reached when something is broken.
const CALL_LIMIT: Duration = Duration::from_secs(25);

/// The longest that a reload of systemd may take.
const RELOAD_LIMIT: Duration = Duration::from_secs(90);

/// Between two reloads of systemd: each makes PID 1 deaf for about 1 ms per unit.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

/// Events that wait for their reader; further ones are coalesced by unit.
const EVENT_QUEUE: usize = 64;

/// Ends of jobs that wait for whoever asked for the job.
const JOB_QUEUE: usize = 1024;

/// A call that did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// There is no connection to the bus, or systemd is not on it.
    #[error("systemd cannot be reached over the system bus: {0}")]
    Unavailable(String),
    /// No answer.
    #[error("systemd did not answer {call} for {unit:?} within {}s", .limit.as_secs())]
    TimedOut {
        /// The method.
        call: &'static str,
        /// The unit.
        unit: String,
        /// The limit.
        limit: Duration,
    },
    /// Somebody holds the name: for a step, most likely this agent before it was restarted.
    #[error("unit {unit} exists already")]
    UnitExists {
        /// The unit.
        unit: String,
    },
    /// It is not loaded, and there is no file for it.
    #[error("unit {unit} does not exist")]
    NoSuchUnit {
        /// The unit.
        unit: String,
    },
    /// systemd does not accept what the unit says.
    #[error("systemd refuses unit {unit}: {message}")]
    BadUnit {
        /// The unit.
        unit: String,
        /// systemd's words.
        message: String,
    },
    /// The job ended without doing what was asked.
    #[error("the {call} job of unit {unit} ended as {result:?}")]
    Job {
        /// The method.
        call: &'static str,
        /// The unit.
        unit: String,
        /// `failed`, `canceled`, `timeout`, `dependency` or `skipped`.
        result: String,
    },
    /// Any other refusal.
    #[error("systemd refused {call} for {unit:?}: {message}")]
    Refused {
        /// The method.
        call: &'static str,
        /// The unit.
        unit: String,
        /// systemd's words.
        message: String,
    },
}

/// Something may have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostEvent {
    /// This unit, whose name begins with `kari`.
    Unit(String),
    /// Anything: the connection is new, or systemd has reloaded.
    Everything,
}

/// A loaded unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedUnit {
    /// Its name.
    pub name: String,
    /// `loaded`, `not-found`, `bad-setting`, `error` or `masked`.
    pub load_state: String,
    /// Its state.
    pub active_state: ActiveState,
    /// Its state in the words of its type: `running`, `exited`, `auto-restart`, …
    pub sub_state: String,
}

/// `ActiveState` of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActiveState {
    /// Started.
    Active,
    /// Started, and reading its configuration again.
    Reloading,
    /// Stopped.
    Inactive,
    /// Stopped by a failure.
    Failed,
    /// Being started; a oneshot is while it runs, a service between two restarts.
    Activating,
    /// Being stopped.
    Deactivating,
    /// One that this version does not know.
    Unknown,
}

impl ActiveState {
    fn parse(text: &str) -> Self {
        match text {
            "active" => Self::Active,
            "reloading" => Self::Reloading,
            "inactive" => Self::Inactive,
            "failed" => Self::Failed,
            "activating" => Self::Activating,
            "deactivating" => Self::Deactivating,
            _ => Self::Unknown,
        }
    }

    /// Whether nothing of it runs and nothing will start it again by itself.
    pub fn is_stopped(self) -> bool {
        matches!(self, Self::Inactive | Self::Failed)
    }
}

/// What systemd says of a loaded unit. Fields of services are empty or 0 for units of other types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitState {
    /// Its name.
    pub name: String,
    /// As in [`ListedUnit`].
    pub load_state: String,
    /// Its state.
    pub active_state: ActiveState,
    /// As in [`ListedUnit`].
    pub sub_state: String,
    /// Whether a job of it is queued or running.
    pub has_job: bool,
    /// `success`, or how it failed.
    pub result: String,
    /// How the main process ended: 0 it never did, 1 exited, 2 killed, 3 dumped core.
    pub exec_main_code: i32,
    /// Its exit status or signal.
    pub exec_main_status: i32,
    /// The main process, or 0.
    pub main_pid: u32,
    /// Restarts by systemd since the last start by hand.
    pub n_restarts: u32,
    /// Of the current or the last start, 32 hexadecimal digits; empty before the first.
    pub invocation_id: String,
    /// Processes and threads; nothing where they are not counted or none runs.
    pub tasks_current: Option<u64>,
    /// Bytes; nothing where it is not counted or none runs.
    pub memory_current: Option<u64>,
    /// Whether its files have changed since they were read.
    pub need_daemon_reload: bool,
    /// Drop-ins that changed it.
    pub drop_in_paths: Vec<String>,
    /// Its file.
    pub fragment_path: String,
    /// When it last became active, in microseconds of CLOCK_MONOTONIC; 0: never.
    pub active_enter_monotonic: u64,
    /// When it last became inactive, likewise.
    pub inactive_enter_monotonic: u64,
}

impl UnitState {
    /// How its main process ended, for the record of a step.
    pub fn step_result(&self) -> StepResult {
        StepResult {
            result: self.result.clone(),
            code: self.exec_main_code,
            status: self.exec_main_status,
        }
    }
}

/// A client of the node's systemd; clones share the connection.
#[derive(Clone)]
pub struct Systemd {
    shared: Arc<Shared>,
}

struct Shared {
    manager: latest::Receiver<Option<Manager>>,
    jobs: broadcast::Sender<JobEnd>,
    last_reload: Mutex<Option<Instant>>,
}

/// A connection of the moment.
#[derive(Clone)]
struct Manager {
    connection: Connection,
    proxy: ManagerProxy<'static>,
}

#[derive(Clone)]
struct JobEnd {
    job: OwnedObjectPath,
    result: String,
}

impl Systemd {
    /// Connects to the bus at `address`, or to the system bus at its usual place, and subscribes. The
    /// watcher ends when the receiver is dropped.
    pub async fn connect(
        address: Option<&str>,
    ) -> Result<(Self, mpsc::Receiver<HostEvent>), SystemdError> {
        let address = address.map(str::to_owned);
        let first = bounded(
            "Subscribe",
            "",
            CALL_LIMIT,
            Session::open(address.as_deref()),
        )
        .await?;
        let (manager_sender, manager) = latest::channel(Some(first.manager.clone()));
        let (events, receiver) = mpsc::channel(EVENT_QUEUE);
        let (jobs, _) = broadcast::channel(JOB_QUEUE);
        let watcher = Watcher {
            address,
            manager: manager_sender,
            jobs: jobs.clone(),
            events,
            marked: Marked::default(),
        };
        tokio::spawn(watcher.run(first));
        Ok((
            Self {
                shared: Arc::new(Shared {
                    manager,
                    jobs,
                    last_reload: Mutex::new(None),
                }),
            },
            receiver,
        ))
    }

    /// The loaded units whose names match any of the patterns.
    pub async fn list_units(&self, patterns: &[&str]) -> Result<Vec<ListedUnit>, SystemdError> {
        let patterns: Vec<String> = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        let manager = self.manager()?;
        let call = manager.proxy.list_units_by_patterns(vec![], patterns);
        let units = bounded("ListUnitsByPatterns", "", CALL_LIMIT, call).await?;
        Ok(units
            .into_iter()
            .map(
                |(name, _, load_state, active_state, sub_state, ..)| ListedUnit {
                    name,
                    load_state,
                    active_state: ActiveState::parse(&active_state),
                    sub_state,
                },
            )
            .collect())
    }

    /// What systemd says of a unit; nothing if it is not loaded. (A name that is not loaded has the
    /// properties of a success, so it is asked for first.)
    pub async fn get_unit_state(&self, unit: &str) -> Result<Option<UnitState>, SystemdError> {
        let manager = self.manager()?;
        let path = match bounded(
            "GetUnit",
            unit,
            CALL_LIMIT,
            manager.proxy.get_unit(unit.to_owned()),
        )
        .await
        {
            Ok(path) => path,
            Err(SystemdError::NoSuchUnit { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let general = manager
            .properties(unit, &path, "org.freedesktop.systemd1.Unit")
            .await?;
        let service = if unit.ends_with(".service") {
            manager
                .properties(unit, &path, "org.freedesktop.systemd1.Service")
                .await?
        } else {
            Bag::default()
        };
        let state = unit_state(unit, &general, &service);
        let gone = state.load_state == "not-found" && state.active_state == ActiveState::Inactive;
        Ok((!gone).then_some(state))
    }

    /// Makes a transient unit and starts it; returns when the job is queued, and its end comes as a
    /// [`HostEvent::Unit`].
    pub async fn start_transient(
        &self,
        unit: &str,
        settings: &[Setting],
    ) -> Result<(), SystemdError> {
        self.queue_transient(unit, settings).await.map(drop)
    }

    /// Makes a transient oneshot unit, waits until it has ended, and says how; nothing if it is not
    /// loaded any more.
    pub async fn run_transient(
        &self,
        unit: &str,
        settings: &[Setting],
        limit: Duration,
    ) -> Result<Option<UnitState>, SystemdError> {
        let mut jobs = self.shared.jobs.subscribe();
        let job = self.queue_transient(unit, settings).await?;
        match self
            .wait_for_job("StartTransientUnit", unit, &job, &mut jobs, limit)
            .await
        {
            // How it failed, the unit says.
            Ok(()) | Err(SystemdError::Job { .. }) => self.get_unit_state(unit).await,
            Err(error) => Err(error),
        }
    }

    async fn queue_transient(
        &self,
        unit: &str,
        settings: &[Setting],
    ) -> Result<OwnedObjectPath, SystemdError> {
        let properties = properties_of(settings).map_err(|error| SystemdError::Refused {
            call: "StartTransientUnit",
            unit: unit.to_owned(),
            message: error.to_string(),
        })?;
        let manager = self.manager()?;
        let call = manager.proxy.start_transient_unit(
            unit.to_owned(),
            "fail".to_owned(),
            properties,
            vec![],
        );
        bounded("StartTransientUnit", unit, CALL_LIMIT, call).await
    }

    /// Starts a unit; returns when the job is queued.
    pub async fn start_unit(&self, unit: &str) -> Result<(), SystemdError> {
        let manager = self.manager()?;
        bounded(
            "StartUnit",
            unit,
            CALL_LIMIT,
            manager
                .proxy
                .start_unit(unit.to_owned(), "replace".to_owned()),
        )
        .await?;
        Ok(())
    }

    /// Stops a unit, waits until it is stopped, and makes systemd forget a failure of it, which frees
    /// its name. A unit that is not loaded is stopped.
    pub async fn stop_unit(&self, unit: &str, limit: Duration) -> Result<(), SystemdError> {
        let manager = self.manager()?;
        let mut jobs = self.shared.jobs.subscribe();
        let stop = manager
            .proxy
            .stop_unit(unit.to_owned(), "replace".to_owned());
        let job = match bounded("StopUnit", unit, CALL_LIMIT, stop).await {
            Ok(job) => job,
            Err(SystemdError::NoSuchUnit { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        self.wait_for_job("StopUnit", unit, &job, &mut jobs, limit)
            .await?;
        match self.reset_failed(unit).await {
            Ok(()) | Err(SystemdError::NoSuchUnit { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes a unit read its configuration again, and waits until it has.
    pub async fn reload_unit(&self, unit: &str, limit: Duration) -> Result<(), SystemdError> {
        let manager = self.manager()?;
        let mut jobs = self.shared.jobs.subscribe();
        let reload = manager
            .proxy
            .reload_unit(unit.to_owned(), "replace".to_owned());
        let job = bounded("ReloadUnit", unit, CALL_LIMIT, reload).await?;
        self.wait_for_job("ReloadUnit", unit, &job, &mut jobs, limit)
            .await
    }

    /// Sends a signal to every process of a unit.
    pub async fn kill_unit(&self, unit: &str, signal: i32) -> Result<(), SystemdError> {
        let manager = self.manager()?;
        bounded(
            "KillUnit",
            unit,
            CALL_LIMIT,
            manager
                .proxy
                .kill_unit(unit.to_owned(), "all".to_owned(), signal),
        )
        .await
    }

    /// Makes systemd forget that a unit failed.
    pub async fn reset_failed(&self, unit: &str) -> Result<(), SystemdError> {
        let manager = self.manager()?;
        bounded(
            "ResetFailedUnit",
            unit,
            CALL_LIMIT,
            manager.proxy.reset_failed_unit(unit.to_owned()),
        )
        .await
    }

    /// Makes systemd read all unit files again: only to heal, never in the normal path. At most one in
    /// 10 s; callers that come meanwhile share the next.
    pub async fn daemon_reload(&self) -> Result<(), SystemdError> {
        let asked = Instant::now();
        let mut last = self.shared.last_reload.lock().await;
        if let Some(last) = *last {
            if last >= asked {
                return Ok(());
            }
            tokio::time::sleep_until(last + RELOAD_INTERVAL).await;
        }
        let started = Instant::now();
        let manager = self.manager()?;
        bounded("Reload", "", RELOAD_LIMIT, manager.proxy.reload()).await?;
        *last = Some(started);
        Ok(())
    }

    /// The processes of a unit, each with its command line.
    pub async fn unit_processes(&self, unit: &str) -> Result<Vec<(u32, String)>, SystemdError> {
        let manager = self.manager()?;
        match bounded(
            "GetUnitProcesses",
            unit,
            CALL_LIMIT,
            manager.proxy.get_unit_processes(unit.to_owned()),
        )
        .await
        {
            Ok(processes) => Ok(processes
                .into_iter()
                .map(|(_, pid, command)| (pid, command))
                .collect()),
            Err(SystemdError::NoSuchUnit { .. }) => Ok(vec![]),
            Err(error) => Err(error),
        }
    }

    /// systemd's version, as it says it.
    pub async fn version(&self) -> Result<String, SystemdError> {
        let manager = self.manager()?;
        bounded("Version", "", CALL_LIMIT, manager.proxy.version()).await
    }

    fn manager(&self) -> Result<Manager, SystemdError> {
        let manager = self.shared.manager.borrow().clone();
        manager.ok_or_else(|| {
            SystemdError::Unavailable("the connection is lost and being made again".to_owned())
        })
    }

    /// Waits for the end of a job by its path (by its unit would mix up two jobs). If its signal was
    /// lost with the connection, the unit is looked at.
    async fn wait_for_job(
        &self,
        call: &'static str,
        unit: &str,
        job: &OwnedObjectPath,
        jobs: &mut broadcast::Receiver<JobEnd>,
        limit: Duration,
    ) -> Result<(), SystemdError> {
        /// Between two looks at the unit while its job's signal does not come.
        const LOOK_INTERVAL: Duration = Duration::from_secs(2);
        let deadline = Instant::now() + limit;
        loop {
            match timeout(LOOK_INTERVAL.min(deadline - Instant::now()), jobs.recv()).await {
                Ok(Ok(end)) if end.job == *job => {
                    return match end.result.as_str() {
                        "done" => Ok(()),
                        result => Err(SystemdError::Job {
                            call,
                            unit: unit.to_owned(),
                            result: result.to_owned(),
                        }),
                    };
                }
                Ok(Ok(_)) => continue,
                // Lagged or timed out: the signal may never come.
                Ok(Err(_)) | Err(_) => {}
            }
            match self.get_unit_state(unit).await {
                Ok(None) => return Ok(()),
                Ok(Some(state))
                    if !state.has_job
                        && (call != "StopUnit" || state.active_state.is_stopped()) =>
                {
                    return Ok(());
                }
                Ok(Some(_)) | Err(_) => {}
            }
            if Instant::now() >= deadline {
                return Err(SystemdError::TimedOut {
                    call,
                    unit: unit.to_owned(),
                    limit,
                });
            }
        }
    }
}

impl Manager {
    async fn properties(
        &self,
        unit: &str,
        path: &OwnedObjectPath,
        interface: &str,
    ) -> Result<Bag, SystemdError> {
        let call = async {
            let reply = self
                .connection
                .call_method(
                    Some("org.freedesktop.systemd1"),
                    path.as_str(),
                    Some("org.freedesktop.DBus.Properties"),
                    "GetAll",
                    &(interface,),
                )
                .await?;
            reply.body().deserialize::<HashMap<String, OwnedVariant>>()
        };
        Ok(Bag(bounded("GetAll", unit, CALL_LIMIT, call).await?))
    }
}

/// A call with its limit, and its errors sorted.
async fn bounded<T>(
    call: &'static str,
    unit: &str,
    limit: Duration,
    work: impl Future<Output = zbus::Result<T>>,
) -> Result<T, SystemdError> {
    match timeout(limit, work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(sorted(call, unit, error)),
        Err(_) => Err(SystemdError::TimedOut {
            call,
            unit: unit.to_owned(),
            limit,
        }),
    }
}

fn sorted(call: &'static str, unit: &str, error: zbus::Error) -> SystemdError {
    let unit = unit.to_owned();
    match &error {
        zbus::Error::MethodError(name, message, _) => {
            let message = message.clone().unwrap_or_else(|| name.to_string());
            match name.as_str() {
                "org.freedesktop.systemd1.UnitExists" => SystemdError::UnitExists { unit },
                "org.freedesktop.systemd1.NoSuchUnit" => SystemdError::NoSuchUnit { unit },
                "org.freedesktop.systemd1.BadUnitSetting"
                | "org.freedesktop.systemd1.LoadFailed"
                | "org.freedesktop.systemd1.UnitMasked" => SystemdError::BadUnit { unit, message },
                _ => SystemdError::Refused {
                    call,
                    unit,
                    message,
                },
            }
        }
        zbus::Error::FDO(fdo) => match fdo.as_ref() {
            zbus::fdo::Error::InvalidArgs(message)
            | zbus::fdo::Error::PropertyReadOnly(message) => SystemdError::BadUnit {
                unit,
                message: message.clone(),
            },
            zbus::fdo::Error::ServiceUnknown(_)
            | zbus::fdo::Error::NameHasNoOwner(_)
            | zbus::fdo::Error::NoReply(_)
            | zbus::fdo::Error::Disconnected(_)
            | zbus::fdo::Error::NoServer(_)
            | zbus::fdo::Error::IOError(_) => SystemdError::Unavailable(error.to_string()),
            other => SystemdError::Refused {
                call,
                unit,
                message: other.to_string(),
            },
        },
        zbus::Error::InputOutput(_) | zbus::Error::Handshake(_) | zbus::Error::Address(_) => {
            SystemdError::Unavailable(error.to_string())
        }
        other => SystemdError::Refused {
            call,
            unit,
            message: other.to_string(),
        },
    }
}
