//! The `kari` program: arguments, telemetry and signals; nothing else.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use kari::agent::host::store::DiskReserve;
use kari::api::names::NodeName;
use kari::arguments::{
    AgentArguments, AgentCommand, AgentRequest, Arguments, Command, ControllerArguments,
};
use kari::runtime::{client, error_chain, shutdown};
use kari::{agent, api, controller, telemetry, uninstall};

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kari: {}", error_chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<(), Failure> {
    match &arguments.command {
        Command::Crd => return print_definitions(),
        Command::Agent(AgentCommand {
            request: Some(request),
            run: _,
        }) => return ask_agent(request),
        Command::Agent(_) | Command::Controller(_) | Command::UninstallCheck => {}
    }
    // Both parts hold secrets, which must not get into a core dump.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    // Nor of what they start: git has credentials.
    let nothing = rustix::process::Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(rustix::process::Resource::Core, nothing)?;
    let filter = std::env::var("RUST_LOG")
        .ok()
        .filter(|filter| !filter.is_empty())
        .unwrap_or(arguments.log_level);
    telemetry::init(arguments.log_format, &filter)?;
    // TLS libraries choose a provider by what happens to be compiled in and
    // panic when that is ambiguous. An error means that one is installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let shutdown = shutdown::on_signals()?;
        match arguments.command {
            Command::Crd | Command::Agent(AgentCommand { run: None, .. }) => Ok(()),
            Command::Controller(arguments) => {
                let client = client::infer().await?;
                Ok(controller::run(controller_config(arguments, client), shutdown).await?)
            }
            Command::UninstallCheck => {
                let client = kube::Client::try_from(client::infer().await?)?;
                Ok(uninstall::check(client).await?)
            }
            Command::Agent(AgentCommand {
                run: Some(arguments),
                ..
            }) => {
                let client = client::infer().await?;
                Ok(agent::run(agent_config(arguments, client), shutdown).await?)
            }
        }
    })
}

fn controller_config(arguments: ControllerArguments, client: kube::Config) -> controller::Config {
    let ControllerArguments {
        namespace,
        listen,
        insecure_source_schemes,
        source_slots,
    } = arguments;
    controller::Config {
        client,
        namespace,
        listen,
        insecure_source_schemes,
        source_slots: source_slots.get().into(),
    }
}

fn agent_config(arguments: AgentArguments, client: kube::Config) -> agent::Config {
    let AgentArguments {
        node_name,
        namespace,
        tool_path,
        http_port,
        https_port,
        listen,
        fetch_slots,
        build_slots,
        disk_reserve_mib,
        uid_range,
        port_range,
    } = arguments;
    agent::Config {
        client,
        node_name: NodeName::new(node_name),
        namespace,
        tool_path: tool_path.to_string(),
        http_port: http_port.get(),
        https_port,
        listen,
        fetch_slots: usize::from(fetch_slots.get()),
        build_slots: usize::from(build_slots.get()),
        disk_reserve: DiskReserve::of_at_most(u64::from(disk_reserve_mib) << 20),
        uid_range: uid_range.first..=uid_range.last,
        port_range: port_range.first..=port_range.last,
    }
}

fn ask_agent(request: &AgentRequest) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match request {
        AgentRequest::Remove { app } => {
            let done = runtime.block_on(agent::control::remove(&app.0))?;
            writeln!(std::io::stdout().lock(), "{done}")?;
            Ok(())
        }
        AgentRequest::RotateKey => {
            let done = runtime.block_on(agent::control::rotate_key())?;
            writeln!(std::io::stdout().lock(), "{done}")?;
            Ok(())
        }
    }
}

fn print_definitions() -> Result<(), Failure> {
    let mut output = std::io::stdout().lock();
    for (_, definition) in api::definitions_as_yaml()? {
        writeln!(output, "---\n{}", definition.trim_end())?;
    }
    Ok(())
}
