//! The jails that builds and services run in, as settings of systemd.
//!
//! One list that both share, and what each adds. A setting is written into a
//! unit file ([`Setting::line`]) or sent over D-Bus (`systemd::Systemd`), so that
//! there is one list and not two. Exposure by `systemd-analyze security` on
//! systemd 252: 1.1 for a service, 1.4 for a build; lower is tighter.
//!
//! What is *not* set, because it breaks what people run:
//! - `MemoryDenyWriteExecute`: node, java, ruby and php compile just in time.
//!   A process can ask for it (`sandbox.deny: [JIT]`).
//! - `ProcSubset=pid`: without /proc/meminfo a JVM does not see its memory limit.
//! - `SystemCallFilter=~@privileged` in builds: GNU make starts nothing then.
//!
//! Deliberately absent: any user's text. Values come from constants, from
//! validated names and from paths that passed [`super::quote::plain_path`].

use std::net::IpAddr;

use crate::api::deployment::{AddressFamily, Capability, Denial, Sandbox};

/// Part of every build key: a tree that was built in another jail is not this build's. One more
/// whenever a build could come out differently.
pub const JAIL_VERSION: u32 = 1;

/// Where the tree is in every jail: the same for build and service, so that absolute paths which a
/// build writes into its tree stay right.
pub const APP_PATH: &str = "/var/lib/kari/app";

/// Where a service finds its state folder.
pub const STATE_PATH: &str = "/var/lib/kari/state";

/// Where a step finds the mirror of its repository: a build to read, a fetch to write.
pub const MIRROR_PATH: &str = "/var/lib/kari/mirror";

/// Where a build step finds its script, root's and read-only.
pub const SCRIPT_PATH: &str = "/var/lib/kari/build";

/// One setting of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its name in a unit file; D-Bus has another for durations and CPU quotas.
    pub name: &'static str,
    /// Its value.
    pub value: Value,
}

/// The value of a setting, in the types that D-Bus has for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A boolean.
    Switch(bool),
    /// A text without special characters.
    Text(String),
    /// Texts without spaces.
    Words(Vec<String>),
    /// A whole number: bytes, tasks, weights, file descriptors.
    Number(u64),
    /// A signed number.
    Signed(i32),
    /// Whole seconds.
    Seconds(u32),
    /// Thousandths of a CPU.
    CpuMillis(u64),
    /// Permission bits that are taken away.
    Mask(u32),
    /// A set of capabilities.
    Capabilities(Vec<Capability>),
    /// `SecureBits=noroot-locked`.
    NoRootLocked,
    /// `RestrictNamespaces=yes`.
    NoNamespaces,
    /// `SystemCallErrorNumber=EPERM`.
    NotPermitted,
    /// What alone is allowed.
    Allow(Vec<String>),
    /// What is refused.
    Refuse(Vec<String>),
    /// Networks with the length of their prefix.
    Networks(Vec<(IpAddr, u8)>),
    /// A folder with mount options.
    Mount(String, String),
    /// A path of the node and where it is in the jail.
    Bind(String, String),
    /// The same, where the node has it.
    BindIfThere(String, String),
    /// Files with variables.
    EnvironmentFile(String),
    /// Variables, unquoted. Over D-Bus only.
    Environment(Vec<(String, String)>),
    /// A program and the arguments it gets, quoted by [`super::quote::exec_arguments`]. Over D-Bus only.
    Command(&'static str, Vec<String>),
}

impl Setting {
    /// The setting with its value.
    pub fn new(name: &'static str, value: Value) -> Self {
        Self { name, value }
    }

    /// `Name=value` as a unit file has it, without the newline; nothing for what is set over D-Bus only.
    pub fn line(&self) -> Option<String> {
        let value = match &self.value {
            Value::Switch(true) | Value::NoNamespaces => "yes".to_owned(),
            Value::Switch(false) => "no".to_owned(),
            Value::Text(text) => text.clone(),
            Value::Words(words) | Value::Allow(words) => words.join(" "),
            Value::Refuse(words) => format!("~{}", words.join(" ")),
            Value::Number(number) => number.to_string(),
            Value::Signed(number) => number.to_string(),
            Value::Seconds(seconds) => seconds.to_string(),
            Value::CpuMillis(millis) => format!("{}.{}%", millis / 10, millis % 10),
            Value::Mask(mask) => format!("{mask:04o}"),
            Value::Capabilities(set) => set
                .iter()
                .map(|capability| format!("{capability:?}"))
                .collect::<Vec<_>>()
                .join(" "),
            Value::NoRootLocked => "noroot-locked".to_owned(),
            Value::NotPermitted => "EPERM".to_owned(),
            Value::Networks(networks) => networks
                .iter()
                .map(|(address, length)| format!("{address}/{length}"))
                .collect::<Vec<_>>()
                .join(" "),
            Value::Mount(path, options) => format!("{path}:{options}"),
            Value::Bind(from, to) => format!("{from}:{to}"),
            Value::BindIfThere(from, to) => format!("-{from}:{to}"),
            Value::EnvironmentFile(path) => path.clone(),
            Value::Environment(_) | Value::Command(..) => return None,
        };
        Some(format!("{}={value}", self.name))
    }
}

/// What a build step runs in, but for its own paths, limits and commands.
pub fn build_jail() -> Vec<Setting> {
    let mut settings = shared(AllOf::default());
    settings.extend([
        Setting::new("Slice", text("kari-builds.slice")),
        Setting::new("UMask", Value::Mask(0o022)),
        Setting::new(
            "SystemCallFilter",
            Value::Allow(words(&["@system-service"])),
        ),
        // Builds give way to services.
        Setting::new("CPUWeight", Value::Number(50)),
        Setting::new("IOWeight", Value::Number(50)),
        Setting::new("OOMScoreAdjust", Value::Signed(500)),
        Setting::new("LimitFSIZE", Value::Number(LARGEST_FILE_BYTES)),
    ]);
    settings
}

/// Bytes of the largest file that a step can write, its log included: a runaway writer is stopped
/// long before it fills a disk.
pub const LARGEST_FILE_BYTES: u64 = 4 << 30;

/// What a service runs in, with the exceptions that its spec names.
pub fn service_jail(sandbox: Option<&Sandbox>) -> Vec<Setting> {
    let default = Sandbox::default();
    let Sandbox {
        writable_paths,
        address_families,
        capabilities,
        deny,
    } = sandbox.unwrap_or(&default);
    let nice = capabilities.contains(&Capability::CAP_SYS_NICE);

    let mut settings = shared(AllOf {
        capabilities: capabilities.clone(),
        families: address_families.clone(),
        realtime: nice,
    });
    settings.extend([
        Setting::new("Slice", text("kari-apps.slice")),
        Setting::new("UMask", Value::Mask(0o077)),
        Setting::new(
            "SystemCallFilter",
            Value::Allow(words(&["@system-service"])),
        ),
        // @resources holds what CAP_SYS_NICE is for.
        Setting::new(
            "SystemCallFilter",
            Value::Refuse(words(if nice {
                &["@privileged"]
            } else {
                &["@privileged", "@resources"]
            })),
        ),
    ]);
    for denial in deny {
        match denial {
            Denial::JIT => {
                settings.push(Setting::new("MemoryDenyWriteExecute", Value::Switch(true)))
            }
        }
    }
    if !writable_paths.is_empty() {
        let paths = writable_paths.iter().map(|path| path.0.clone()).collect();
        settings.push(Setting::new("ReadWritePaths", Value::Words(paths)));
    }
    settings
}

/// What differs in the shared part for the sake of a service's exceptions.
#[derive(Default)]
struct AllOf {
    /// Kept, and then without a user namespace, in which they would mean nothing.
    capabilities: Vec<Capability>,
    /// Empty: the default.
    families: Vec<AddressFamily>,
    /// Whether real-time scheduling may be asked for.
    realtime: bool,
}

fn shared(
    AllOf {
        capabilities,
        families,
        realtime,
    }: AllOf,
) -> Vec<Setting> {
    let families = if families.is_empty() {
        // AF_NETLINK: without it node, ruby and Go cannot list the addresses of the machine.
        words(&["AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"])
    } else {
        families
            .iter()
            .map(|family| format!("{family:?}"))
            .collect()
    };
    let on = |name| Setting::new(name, Value::Switch(true));
    let off = |name| Setting::new(name, Value::Switch(false));

    vec![
        Setting::new("KillMode", text("control-group")),
        // On by default, and then `yes | head -1` in a script ends in errors.
        off("IgnoreSIGPIPE"),
        Setting::new("OOMPolicy", text("kill")),
        // Privileges.
        on("NoNewPrivileges"),
        Setting::new("PrivateUsers", Value::Switch(capabilities.is_empty())),
        Setting::new(
            "CapabilityBoundingSet",
            Value::Capabilities(capabilities.clone()),
        ),
        Setting::new("AmbientCapabilities", Value::Capabilities(capabilities)),
        Setting::new("SecureBits", Value::NoRootLocked),
        on("RestrictSUIDSGID"),
        Setting::new("KeyringMode", text("private")),
        on("RemoveIPC"),
        on("LockPersonality"),
        Setting::new("RestrictRealtime", Value::Switch(!realtime)),
        Setting::new("RestrictNamespaces", Value::NoNamespaces),
        // What it sees of the node.
        Setting::new("ProtectSystem", text("strict")),
        Setting::new("ProtectHome", text("yes")),
        on("PrivateTmp"),
        on("PrivateDevices"),
        Setting::new("DevicePolicy", text("closed")),
        on("PrivateIPC"),
        on("PrivateMounts"),
        Setting::new("ProtectProc", text("invisible")),
        Setting::new("ProcSubset", text("all")),
        on("ProtectClock"),
        on("ProtectHostname"),
        on("ProtectKernelLogs"),
        on("ProtectKernelModules"),
        on("ProtectKernelTunables"),
        on("ProtectControlGroups"),
        Setting::new("InaccessiblePaths", Value::Words(words(&HIDDEN_PATHS))),
        Setting::new("TemporaryFileSystem", mount("/var/lib/kari", "ro,mode=755")),
        // /dev is the jail's own, but its shm would be the node's.
        Setting::new(
            "TemporaryFileSystem",
            mount("/dev/shm", "mode=1777,nosuid,nodev"),
        ),
        // What it may ask the kernel.
        Setting::new("RestrictAddressFamilies", Value::Allow(families)),
        Setting::new("SystemCallArchitectures", Value::Words(words(&["native"]))),
        // An error, where the default is to kill.
        Setting::new("SystemCallErrorNumber", Value::NotPermitted),
        Setting::new("IPAddressDeny", Value::Networks(CLOUD_METADATA.to_vec())),
        Setting::new("LimitCORE", Value::Number(0)),
        Setting::new("LimitNOFILE", Value::Number(65_536)),
    ]
}

/// Places of the node that tell secrets or give power, hidden where they exist (`-`). Without
/// /run/dbus any app could read every unit's properties.
const HIDDEN_PATHS: [&str; 9] = [
    "-/run/dbus",
    "-/run/kari",
    "-/run/systemd/transient",
    "-/etc/nginx",
    "-/etc/kubernetes",
    "-/var/lib/kubelet",
    "-/run/containerd",
    "-/run/docker.sock",
    "-/etc/ssh",
];

/// The metadata services of clouds, which hand out the machine's credentials; exactly these addresses,
/// as resolvers of nodes live in the same networks.
const CLOUD_METADATA: [(IpAddr, u8); 2] = [
    (IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 169, 254)), 32),
    (
        IpAddr::V6(std::net::Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
        128,
    ),
];

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn mount(path: &str, options: &str) -> Value {
    Value::Mount(path.to_owned(), options.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::deployment::WritablePath;

    fn lines(settings: &[Setting]) -> Vec<String> {
        settings.iter().filter_map(Setting::line).collect()
    }

    #[test]
    fn each_exception_of_a_sandbox_changes_what_it_names_and_nothing_else() {
        let default = lines(&service_jail(None));
        let changed = |sandbox: Sandbox| {
            let now = lines(&service_jail(Some(&sandbox)));
            let gone: Vec<_> = default
                .iter()
                .filter(|line| !now.contains(line))
                .cloned()
                .collect();
            let new: Vec<_> = now
                .iter()
                .filter(|line| !default.contains(line))
                .cloned()
                .collect();
            (gone, new)
        };

        assert_eq!(changed(Sandbox::default()), (vec![], vec![]));
        assert_eq!(
            changed(Sandbox {
                writable_paths: vec![WritablePath("/srv/a".into()), WritablePath("/srv/b".into())],
                ..Sandbox::default()
            }),
            (vec![], vec!["ReadWritePaths=/srv/a /srv/b".into()])
        );
        assert_eq!(
            changed(Sandbox {
                address_families: vec![AddressFamily::AF_INET],
                ..Sandbox::default()
            }),
            (
                vec!["RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK".into()],
                vec!["RestrictAddressFamilies=AF_INET".into()]
            )
        );
        assert_eq!(
            changed(Sandbox {
                capabilities: vec![Capability::CAP_NET_BIND_SERVICE],
                ..Sandbox::default()
            }),
            (
                vec![
                    "PrivateUsers=yes".into(),
                    "CapabilityBoundingSet=".into(),
                    "AmbientCapabilities=".into()
                ],
                vec![
                    "PrivateUsers=no".into(),
                    "CapabilityBoundingSet=CAP_NET_BIND_SERVICE".into(),
                    "AmbientCapabilities=CAP_NET_BIND_SERVICE".into()
                ]
            )
        );
        let (_, nice) = changed(Sandbox {
            capabilities: vec![Capability::CAP_SYS_NICE],
            ..Sandbox::default()
        });
        assert!(
            nice.contains(&"RestrictRealtime=no".to_owned())
                && nice.contains(&"SystemCallFilter=~@privileged".to_owned()),
            "{nice:?}"
        );
        assert_eq!(
            changed(Sandbox {
                deny: vec![Denial::JIT],
                ..Sandbox::default()
            }),
            (vec![], vec!["MemoryDenyWriteExecute=yes".into()])
        );
    }

    #[test]
    fn a_build_may_do_what_make_needs_and_gives_way_to_services() {
        let build = lines(&build_jail());
        assert!(!build.iter().any(|line| line.contains("@privileged")));
        assert!(build.contains(&"Slice=kari-builds.slice".to_owned()));
        assert!(build.contains(&"CPUWeight=50".to_owned()));
        assert!(
            build.contains(&"CapabilityBoundingSet=".to_owned()),
            "an empty set is written, not left out"
        );
    }
}
