//! The command line, parsed into valid values.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};

use crate::api::names::AppName;
use crate::telemetry::LogFormat;

/// Deploys git repositories onto Linux nodes as native systemd services.
#[derive(Debug, Parser)]
#[command(name = "kari", version, propagate_version = true)]
pub struct Arguments {
    /// What to run.
    #[command(subcommand)]
    pub command: Command,

    /// How log lines are written to stderr.
    #[arg(
        long,
        global = true,
        env = "KARI_LOG_FORMAT",
        default_value = "text",
        value_enum
    )]
    pub log_format: LogFormat,

    /// Which log lines are written: error, warn, info, debug, trace, or
    /// directives such as kari=debug,kube=warn. RUST_LOG, where set, wins.
    #[arg(long, global = true, env = "KARI_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
}

/// The parts of Kari.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Decide which node runs which revision; one for each cluster, replicas elect a leader.
    Controller(ControllerArguments),
    /// Fetch, build and run what the controller decided, on this node; needs root.
    Agent(AgentCommand),
    /// Print the custom resource definitions as YAML.
    Crd,
    /// Fail while a node still removes something; the chart asks before it is uninstalled.
    UninstallCheck,
}

/// `kari controller`. The API server is found as kubectl finds it: KUBECONFIG,
/// or the pod's service account.
#[derive(Clone, Debug, Args)]
pub struct ControllerArguments {
    /// The namespace of Kari's own Leases.
    #[arg(long, env = "KARI_NAMESPACE", default_value = "kari-system")]
    pub namespace: String,

    /// Where /healthz, /readyz and /metrics are served.
    #[arg(long, env = "KARI_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,

    /// Allow sources with http:// and git:// URLs, which anyone on the way can change.
    #[arg(long, env = "KARI_INSECURE_SOURCE_SCHEMES")]
    pub insecure_source_schemes: bool,

    /// How many git servers are asked at once.
    #[arg(long, env = "KARI_SOURCE_SLOTS", default_value = "8")]
    pub source_slots: NonZeroU16,
}

/// `kari agent`, and what can be asked of an agent that runs.
#[derive(Clone, Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct AgentCommand {
    /// What is asked of the agent that runs on this node.
    #[command(subcommand)]
    pub request: Option<AgentRequest>,
    /// How to run an agent.
    #[command(flatten)]
    pub run: Option<AgentArguments>,
}

/// What can be asked of the agent that runs on this node.
#[derive(Clone, Debug, Subcommand)]
pub enum AgentRequest {
    /// Take an app that no Release holds off this node, its state too; needs root.
    Remove {
        /// The app, by the namespace and the name of its Deployment.
        #[arg(value_name = "NAMESPACE/NAME")]
        app: HeldApp,
    },
    /// Make a new key that values for this node are sealed to; needs root. Nothing is restarted, and the old
    /// key is kept for as long as anything is sealed to it.
    RotateKey,
}

/// An app, written `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldApp(pub AppName);

impl FromStr for HeldApp {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, ArgumentError> {
        let app = text
            .split_once('/')
            .and_then(|(namespace, name)| AppName::new(namespace, name).ok());
        app.map(Self)
            .ok_or_else(|| ArgumentError::NoApp(text.to_owned()))
    }
}

/// How an agent runs. The API server is found as kubectl finds it: KUBECONFIG, or
/// the pod's service account.
#[derive(Clone, Debug, Args)]
pub struct AgentArguments {
    /// The name of this node's Node object.
    #[arg(long, env = "KARI_NODE_NAME")]
    pub node_name: String,

    /// The namespace of Kari's own Leases.
    #[arg(long, env = "KARI_NAMESPACE", default_value = "kari-system")]
    pub namespace: String,

    /// The folders in which builds and processes find their tools, separated by colons.
    #[arg(
        long,
        env = "KARI_TOOL_PATH",
        default_value = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        value_name = "FOLDER:FOLDER…"
    )]
    pub tool_path: ToolPath,

    /// The port on which kari-proxy listens for requests to the apps.
    #[arg(long, env = "KARI_HTTP_PORT", default_value = "80")]
    pub http_port: NonZeroU16,

    /// The port on which kari-proxy listens for TLS, for Deployments with
    /// route.tls; 0 for none. Requests to such a host on the other port are
    /// sent there.
    #[arg(long, env = "KARI_HTTPS_PORT", default_value = "443")]
    pub https_port: u16,

    /// Where /healthz, /readyz and /metrics are served.
    #[arg(long, env = "KARI_LISTEN", default_value = "127.0.0.1:8081")]
    pub listen: SocketAddr,

    /// How many repositories are fetched at once.
    #[arg(long, env = "KARI_FETCH_SLOTS", default_value = "4")]
    pub fetch_slots: NonZeroU16,

    /// How many builds run at once.
    #[arg(long, env = "KARI_BUILD_SLOTS", default_value = "2")]
    pub build_slots: NonZeroU16,

    /// How many MiB of /var/lib/kari's disk are to stay free of what is fetched
    /// and built, at most: it is 5 % of the disk, at least 5 GiB, but no more
    /// than a tenth.
    #[arg(
        long,
        env = "KARI_DISK_RESERVE_MIB",
        default_value = "10240",
        value_name = "MIB"
    )]
    pub disk_reserve_mib: u32,

    /// The user ids that apps may be given; nothing else on the node may use them.
    #[arg(
        long,
        env = "KARI_UID_RANGE",
        default_value = "50000-59999",
        value_name = "FIRST-LAST"
    )]
    pub uid_range: UidRange,

    /// The ports that processes may be given; nothing else on the node may use them.
    #[arg(
        long,
        env = "KARI_PORT_RANGE",
        default_value = "20000-29999",
        value_name = "FIRST-LAST"
    )]
    pub port_range: PortRange,
}

/// Absolute folders, in the order in which a program is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolPath(Vec<PathBuf>);

impl ToolPath {
    /// The folders; at least one.
    pub fn folders(&self) -> &[PathBuf] {
        &self.0
    }
}

/// As `PATH` has it.
impl std::fmt::Display for ToolPath {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, folder) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { ":" };
            write!(formatter, "{separator}{}", folder.display())?;
        }
        Ok(())
    }
}

/// Why an argument is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// A folder that depends on where the agent was started.
    #[error(
        "{0:?} is not an absolute folder; give absolute folders separated by colons, such as /usr/local/bin:/usr/bin"
    )]
    RelativeFolder(String),
    /// Not the name of an app.
    #[error("{0:?} names no app; give its namespace and name joined by a slash, such as web/shop")]
    NoApp(String),
    /// Not two numbers.
    #[error("give the first and the last number joined by a hyphen, such as {0}")]
    NoRange(&'static str),
    /// Numbers that make no usable range.
    #[error("the range must go upwards and lie within {lowest}-{highest}")]
    BadRange {
        /// The lowest number allowed.
        lowest: u32,
        /// The highest number allowed.
        highest: u32,
    },
}

impl FromStr for ToolPath {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, ArgumentError> {
        let folder = |part: &str| {
            // A unit file's and a shell's special characters have no place in it.
            let plain = part
                .chars()
                .all(|letter| !letter.is_control() && !letter.is_whitespace());
            if part.starts_with('/') && plain {
                Ok(PathBuf::from(part))
            } else {
                Err(ArgumentError::RelativeFolder(part.to_owned()))
            }
        };
        Ok(Self(text.split(':').map(folder).collect::<Result<_, _>>()?))
    }
}

/// User ids from first to last, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UidRange {
    /// The lowest.
    pub first: u32,
    /// The highest.
    pub last: u32,
}

impl FromStr for UidRange {
    type Err = ArgumentError;

    /// 1000 and more, so that no system user's id is given away; below 65534,
    /// which is nobody.
    fn from_str(text: &str) -> Result<Self, ArgumentError> {
        let (first, last) = range(text, "50000-59999", 1000, 65533)?;
        Ok(Self { first, last })
    }
}

/// TCP ports from first to last, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl FromStr for PortRange {
    type Err = ArgumentError;

    /// 1024 and more: apps bind no privileged port.
    fn from_str(text: &str) -> Result<Self, ArgumentError> {
        let bad = ArgumentError::BadRange {
            lowest: 1024,
            highest: u32::from(u16::MAX),
        };
        let (first, last) = range(text, "20000-29999", 1024, u32::from(u16::MAX))?;
        match (u16::try_from(first), u16::try_from(last)) {
            (Ok(first), Ok(last)) => Ok(Self { first, last }),
            _ => Err(bad),
        }
    }
}

fn range(
    text: &str,
    example: &'static str,
    lowest: u32,
    highest: u32,
) -> Result<(u32, u32), ArgumentError> {
    let (first, last) = text
        .split_once('-')
        .ok_or(ArgumentError::NoRange(example))?;
    let number = |part: &str| {
        part.trim()
            .parse::<u32>()
            .map_err(|_| ArgumentError::NoRange(example))
    };
    let (first, last) = (number(first)?, number(last)?);
    if first > last || first < lowest || last > highest {
        return Err(ArgumentError::BadRange { lowest, highest });
    }
    Ok((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn an_agent_needs_a_name_and_has_defaults_for_the_rest() {
        assert!(Arguments::try_parse_from(["kari", "agent"]).is_err());
        let arguments = Arguments::try_parse_from(["kari", "agent", "--node-name", "n1"]).unwrap();
        let Command::Agent(AgentCommand {
            request: None,
            run: Some(agent),
        }) = arguments.command
        else {
            panic!("not the agent")
        };
        assert_eq!(agent.node_name, "n1");
        assert_eq!(
            agent.tool_path.to_string(),
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        );
        assert_eq!(
            agent.uid_range,
            UidRange {
                first: 50000,
                last: 59999
            }
        );
        assert_eq!(
            agent.port_range,
            PortRange {
                first: 20000,
                last: 29999
            }
        );
    }

    #[test]
    fn a_request_to_an_agent_needs_no_name_of_its_node() {
        let arguments = Arguments::try_parse_from(["kari", "agent", "remove", "web/shop"]).unwrap();
        let Command::Agent(AgentCommand {
            request: Some(AgentRequest::Remove { app }),
            run: None,
        }) = arguments.command
        else {
            panic!("not a request: {:?}", arguments.command)
        };
        assert_eq!(app.0.to_string(), "web.shop");
        for bad in ["shop", "web.shop", "web/", "/shop", "web/Shop", "a/b/c"] {
            assert!(bad.parse::<HeldApp>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ranges_that_cannot_be_used_are_refused() {
        for text in [
            "",
            "5",
            "a-b",
            "9-1",
            "59999-50000",
            "0-70000",
            "50000-",
            "-1",
        ] {
            assert!(text.parse::<UidRange>().is_err(), "{text:?}");
            assert!(text.parse::<PortRange>().is_err(), "{text:?}");
        }
        assert!("80-90".parse::<PortRange>().is_err(), "privileged ports");
        assert!("1024-65535".parse::<PortRange>().is_ok());
    }

    #[test]
    fn a_tool_path_is_absolute() {
        for text in ["", "bin", "/usr/bin:", ":/usr/bin", "/usr/bin:.", "/a b"] {
            assert!(text.parse::<ToolPath>().is_err(), "{text:?}");
        }
        assert_eq!("/a:/b".parse::<ToolPath>().unwrap().folders().len(), 2);
    }
}
