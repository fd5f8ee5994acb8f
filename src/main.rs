//! The `kari` program: arguments, telemetry and signals; nothing else.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use kari::arguments::{Arguments, Command};
use kari::runtime::{client, error_chain, shutdown};
use kari::{api, controller, telemetry};

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
    if let Command::Crd = arguments.command {
        return print_definitions();
    }
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
            Command::Crd => Ok(()),
            Command::Controller(arguments) => {
                let config = controller::Config {
                    client: client::infer().await?,
                    namespace: arguments.namespace,
                    listen: arguments.listen,
                    insecure_source_schemes: arguments.insecure_source_schemes,
                    source_slots: arguments.source_slots.get().into(),
                };
                Ok(controller::run(config, shutdown).await?)
            }
            Command::Agent(_) => {
                shutdown.cancel();
                Err("this build has no agent".into())
            }
        }
    })
}

fn print_definitions() -> Result<(), Failure> {
    let mut output = std::io::stdout().lock();
    for (_, definition) in api::definitions_as_yaml()? {
        writeln!(output, "---\n{}", definition.trim_end())?;
    }
    Ok(())
}
