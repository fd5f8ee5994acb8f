//! Which limits are in force on this node, by canaries.
//!
//! systemd accepts limits that it cannot enforce, and reads them back as set. So
//! at the agent's start a few units try to break theirs: a limit is proven when
//! its canary fails in the way that the limit makes it fail.
//!
//! What is not proven here: CPU quotas, for which a short canary has no evidence.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout};

use super::jail::{Setting, Value};
use super::records::StepResult;
use super::systemd::{ActiveState, Systemd, SystemdError};

/// The longest that one canary may take, start and all.
const CANARY_LIMIT: Duration = Duration::from_secs(30);

/// Seconds after which systemd kills a canary.
const CANARY_SECONDS: u32 = 20;

/// The longest that a connection to a listener of the agent's own may take to arrive.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Between two looks at a canary.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What was proven. False means that it was not, not that it is known to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// `MemoryMax=` kills.
    pub memory: bool,
    /// `TasksMax=` stops forks.
    pub tasks: bool,
    /// `SystemCallFilter=` refuses.
    pub seccomp: bool,
    /// `IPAddressDeny=` drops.
    pub ip_address_deny: bool,
    /// `User=` finds users of drop-ins; without it nothing can run.
    pub userdb: bool,
}

impl Limits {
    /// Each by the name of its setting, for the node's Lease.
    pub fn by_name(&self) -> BTreeMap<&'static str, bool> {
        let Self {
            memory,
            tasks,
            seccomp,
            ip_address_deny,
            userdb,
        } = *self;
        BTreeMap::from([
            ("MemoryMax", memory),
            ("TasksMax", tasks),
            ("SystemCallFilter", seccomp),
            ("IPAddressDeny", ip_address_deny),
            ("UserDatabase", userdb),
        ])
    }
}

/// Lets the canaries fly, all at once. `user` is a user of a drop-in. A canary that could not be
/// started at all is an error of systemd's; the caller tries again.
pub async fn prove(systemd: &Systemd, user: &str) -> Result<Limits, SystemdError> {
    let (memory, tasks, seccomp, ip_address_deny, userdb) = tokio::join!(
        // Killed itself, or a part of it.
        fails(
            systemd,
            "memory",
            MEMORY,
            |r| matches!((r.code, r.status), (2, 9) | (1, 137)) || r.result == "oom-kill",
            || vec![
                Setting::new("MemoryMax", Value::Number(16 << 20)),
                Setting::new("MemorySwapMax", Value::Number(0)),
            ]
        ),
        fails(
            systemd,
            "tasks",
            TASKS,
            |r| r.code == 1 && !matches!(r.status, 0 | 126 | 127),
            || vec![Setting::new("TasksMax", Value::Number(5))]
        ),
        fails(
            systemd,
            "seccomp",
            SECCOMP,
            |r| r.code == 1 && r.status == 1,
            || vec![
                Setting::new(
                    "SystemCallFilter",
                    Value::Refuse(vec!["mkdir".to_owned(), "mkdirat".to_owned()])
                ),
                Setting::new("SystemCallErrorNumber", Value::NotPermitted),
                Setting::new("PrivateTmp", Value::Switch(true)),
            ]
        ),
        denies_addresses(systemd),
        fails(systemd, "userdb", USERDB, StepResult::is_success, || vec![
            Setting::new("User", Value::Text(user.to_owned()))
        ]),
    );
    Ok(Limits {
        memory: memory?,
        tasks: tasks?,
        seccomp: seccomp?,
        ip_address_deny: ip_address_deny?,
        userdb: userdb?,
    })
}

/// Touches 64 MiB: tail keeps the last line, and there is but one.
const MEMORY: &str = "head -c 67108864 /dev/zero | tail -n 1 >/dev/null";
/// Has more processes than it may.
const TASKS: &str = "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1 & done; wait";
/// Makes a folder.
const SECCOMP: &str = "mkdir /tmp/kari-canary";
/// Is.
const USERDB: &str = "exit 0";

/// Runs a script with the settings, and says whether it ended as it should.
async fn fails(
    systemd: &Systemd,
    name: &str,
    script: &str,
    as_it_should: impl FnOnce(&StepResult) -> bool,
    settings: impl FnOnce() -> Vec<Setting>,
) -> Result<bool, SystemdError> {
    let words = ["-c", script].map(str::to_owned).to_vec();
    let result = run(systemd, name, "/bin/sh", words, CANARY_SECONDS, settings()).await?;
    let proven = as_it_should(&result);
    tracing::debug!(name, ?result, proven, "canary");
    Ok(proven)
}

/// Whether a program with `IPAddressDeny=` cannot reach a listener of this agent's that the same program
/// reaches without it.
async fn denies_addresses(systemd: &Systemd) -> Result<bool, SystemdError> {
    let reached = |name: &'static str, settings: Vec<Setting>| async move {
        let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await else {
            return Ok(None);
        };
        let Ok(address) = listener.local_addr() else {
            return Ok(None);
        };
        let words = ["git", "ls-remote", &format!("http://{address}/")]
            .map(str::to_owned)
            .to_vec();
        // It is killed after a while: nobody answers it.
        let seconds = u32::try_from(CONNECT_LIMIT.as_secs()).unwrap_or(1);
        let connected = async {
            let accepted = timeout(CONNECT_LIMIT, listener.accept()).await;
            // Closing the connection ends the program.
            drop(listener);
            matches!(accepted, Ok(Ok(_)))
        };
        let (result, connected) = tokio::join!(
            run(systemd, name, "/usr/bin/env", words, seconds, settings),
            connected
        );
        result.map(|_| Some(connected))
    };
    let deny = Setting::new(
        "IPAddressDeny",
        Value::Networks(vec![(Ipv4Addr::LOCALHOST.into(), 8)]),
    );
    let (without, with) = tokio::join!(
        reached("address-control", vec![]),
        reached("address", vec![deny])
    );
    let (without, with) = (without?, with?);
    tracing::debug!(?without, ?with, "canary of IPAddressDeny");
    Ok(without == Some(true) && with == Some(false))
}

/// Runs a program as a transient unit and waits for its end.
pub(super) async fn run(
    systemd: &Systemd,
    name: &str,
    program: &'static str,
    arguments: Vec<String>,
    seconds: u32,
    further: Vec<Setting>,
) -> Result<StepResult, SystemdError> {
    let unit = format!("kari-canary-{name}.service");
    let mut settings = vec![
        Setting::new(
            "Description",
            Value::Text(format!("Kari: what this node has ({name})")),
        ),
        Setting::new("Type", Value::Text("oneshot".to_owned())),
        Setting::new("RemainAfterExit", Value::Switch(true)),
        Setting::new("TimeoutStartSec", Value::Seconds(seconds)),
        Setting::new("TimeoutStopSec", Value::Seconds(1)),
        Setting::new("StandardOutput", Value::Text("null".to_owned())),
        Setting::new("StandardError", Value::Text("null".to_owned())),
        Setting::new("LimitCORE", Value::Number(0)),
    ];
    settings.extend(further);
    settings.push(Setting::new(
        "ExecStart",
        Value::Command(program, arguments),
    ));

    // One of an agent that was killed may still be there.
    systemd.stop_unit(&unit, CANARY_LIMIT).await?;
    systemd.start_transient(&unit, &settings).await?;
    let ended = wait(systemd, &unit).await;
    systemd.stop_unit(&unit, CANARY_LIMIT).await?;
    ended
}

async fn wait(systemd: &Systemd, unit: &str) -> Result<StepResult, SystemdError> {
    let deadline = Instant::now() + CANARY_LIMIT;
    loop {
        match systemd.get_unit_state(unit).await? {
            Some(state) if state.has_job || state.active_state == ActiveState::Activating => {}
            Some(state) => return Ok(state.step_result()),
            None => {
                return Err(SystemdError::NoSuchUnit {
                    unit: unit.to_owned(),
                });
            }
        }
        if Instant::now() >= deadline {
            return Err(SystemdError::TimedOut {
                call: "StartTransientUnit",
                unit: unit.to_owned(),
                limit: CANARY_LIMIT,
            });
        }
        sleep(LOOK_INTERVAL).await;
    }
}
