//! Settings and states in the names and types that D-Bus has for them.

use std::collections::HashMap;
use std::net::IpAddr;

use zbus::{OwnedObjectPath, OwnedVariant, Variant};

use super::{ActiveState, UnitState};
use crate::agent::host::jail::{Setting, Value};
use crate::api::deployment::Capability;

/// Properties of a unit; one that is missing or of another type reads as empty.
#[derive(Default)]
pub(super) struct Bag(pub HashMap<String, OwnedVariant>);

impl Bag {
    fn text(&self, name: &str) -> String {
        match self.0.get(name).map(|value| &**value) {
            Some(Variant::Str(text)) => text.to_string(),
            _ => String::new(),
        }
    }
    fn signed(&self, name: &str) -> i32 {
        match self.0.get(name).map(|value| &**value) {
            Some(Variant::I32(number)) => *number,
            _ => 0,
        }
    }
    fn small(&self, name: &str) -> u32 {
        match self.0.get(name).map(|value| &**value) {
            Some(Variant::U32(number)) => *number,
            _ => 0,
        }
    }
    fn large(&self, name: &str) -> u64 {
        match self.0.get(name).map(|value| &**value) {
            Some(Variant::U64(number)) => *number,
            _ => 0,
        }
    }
    /// A counter, for which systemd says 2⁶⁴-1 where nothing is counted.
    fn counter(&self, name: &str) -> Option<u64> {
        match self.0.get(name).map(|value| &**value) {
            Some(Variant::U64(u64::MAX)) | None => None,
            Some(Variant::U64(number)) => Some(*number),
            Some(_) => None,
        }
    }
    fn switch(&self, name: &str) -> bool {
        matches!(
            self.0.get(name).map(|value| &**value),
            Some(Variant::Bool(true))
        )
    }
    fn texts(&self, name: &str) -> Vec<String> {
        self.0
            .get(name)
            .and_then(|value| Vec::<String>::try_from(value.clone()).ok())
            .unwrap_or_default()
    }
    fn hex(&self, name: &str) -> String {
        let bytes = self
            .0
            .get(name)
            .and_then(|value| Vec::<u8>::try_from(value.clone()).ok())
            .unwrap_or_default();
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
    /// Whether `Job` names one: its number is 0 where there is none.
    fn has_job(&self) -> bool {
        let job = self
            .0
            .get("Job")
            .and_then(|value| <(u32, OwnedObjectPath)>::try_from(value.clone()).ok());
        job.is_some_and(|(number, _)| number != 0)
    }
}

pub(super) fn unit_state(name: &str, general: &Bag, service: &Bag) -> UnitState {
    UnitState {
        name: name.to_owned(),
        load_state: general.text("LoadState"),
        active_state: ActiveState::parse(&general.text("ActiveState")),
        sub_state: general.text("SubState"),
        has_job: general.has_job(),
        result: service.text("Result"),
        exec_main_code: service.signed("ExecMainCode"),
        exec_main_status: service.signed("ExecMainStatus"),
        main_pid: service.small("MainPID"),
        n_restarts: service.small("NRestarts"),
        invocation_id: general.hex("InvocationID"),
        tasks_current: service.counter("TasksCurrent"),
        memory_current: service.counter("MemoryCurrent"),
        need_daemon_reload: general.switch("NeedDaemonReload"),
        drop_in_paths: general.texts("DropInPaths"),
        fragment_path: general.text("FragmentPath"),
        active_enter_monotonic: general.large("ActiveEnterTimestampMonotonic"),
        inactive_enter_monotonic: general.large("InactiveEnterTimestampMonotonic"),
    }
}

/// Settings in the names and types that D-Bus has for them.
pub(super) fn properties_of(settings: &[Setting]) -> zbus::Result<Vec<(String, OwnedVariant)>> {
    settings
        .iter()
        .map(|Setting { name, value }| {
            let (name, value) = property_of(name, value);
            Ok((name, value.try_into_owned()?))
        })
        .collect()
}

/// Microseconds of a second.
const MICROS: u64 = 1_000_000;

fn property_of(name: &str, value: &Value) -> (String, Variant<'static>) {
    let named = |value| (name.to_owned(), value);
    match value {
        Value::Switch(on) => named(Variant::from(*on)),
        Value::Text(text) => named(Variant::from(text.clone())),
        Value::Words(words) => named(Variant::from(words.clone())),
        Value::Number(number) => named(Variant::from(*number)),
        Value::Signed(number) => named(Variant::from(*number)),
        Value::Seconds(seconds) => {
            let stem = name.strip_suffix("Sec").unwrap_or(name);
            (
                format!("{stem}USec"),
                Variant::from(u64::from(*seconds) * MICROS),
            )
        }
        Value::CpuMillis(millis) => (
            format!("{name}PerSecUSec"),
            Variant::from(millis * (MICROS / 1000)),
        ),
        Value::Mask(mask) => named(Variant::from(*mask)),
        Value::Capabilities(set) => {
            let bits = set.iter().fold(0u64, |bits, capability| {
                bits | 1 << capability_number(*capability)
            });
            named(Variant::from(bits))
        }
        // Bit 1: SECBIT_NOROOT_LOCKED, capabilities(7).
        Value::NoRootLocked => named(Variant::from(2i32)),
        // The set of namespaces that are left.
        Value::NoNamespaces => named(Variant::from(0u64)),
        // EPERM, errno(3).
        Value::NotPermitted => named(Variant::from(1i32)),
        Value::Allow(words) => named(Variant::from((true, words.clone()))),
        Value::Refuse(words) => named(Variant::from((false, words.clone()))),
        Value::Networks(networks) => {
            let networks: Vec<(i32, Vec<u8>, u32)> = networks
                .iter()
                .map(|(address, length)| match address {
                    // AF_INET and AF_INET6, address_families(7).
                    IpAddr::V4(address) => (2, address.octets().to_vec(), u32::from(*length)),
                    IpAddr::V6(address) => (10, address.octets().to_vec(), u32::from(*length)),
                })
                .collect();
            named(Variant::from(networks))
        }
        Value::Mount(path, options) => named(Variant::from(vec![(path.clone(), options.clone())])),
        Value::Bind(from, to) => named(bind(from, to, false)),
        Value::BindIfThere(from, to) => named(bind(from, to, true)),
        Value::EnvironmentFile(path) => {
            let missing_is_fine = false;
            (
                "EnvironmentFiles".to_owned(),
                Variant::from(vec![(path.clone(), missing_is_fine)]),
            )
        }
        Value::Environment(variables) => {
            let assignments: Vec<String> = variables
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            named(Variant::from(assignments))
        }
        Value::Command(program, arguments) => {
            let mut words = vec![(*program).to_owned()];
            words.extend(arguments.iter().cloned());
            let failure_is_fine = false;
            named(Variant::from(vec![(
                (*program).to_owned(),
                words,
                failure_is_fine,
            )]))
        }
    }
}

/// The number of a capability, capabilities(7).
fn capability_number(capability: Capability) -> u32 {
    match capability {
        Capability::CAP_NET_BIND_SERVICE => 10,
        Capability::CAP_NET_ADMIN => 12,
        Capability::CAP_NET_RAW => 13,
        Capability::CAP_IPC_LOCK => 14,
        Capability::CAP_SYS_NICE => 23,
    }
}

fn bind(from: &str, to: &str, missing_is_fine: bool) -> Variant<'static> {
    /// `MS_REC`, mount(2): what is mounted below comes along, as a unit file has it by default.
    const RECURSIVE: u64 = 16384;
    let (from, to) = (from.to_owned(), to.to_owned());
    Variant::from(vec![(from, to, missing_is_fine, RECURSIVE)])
}
