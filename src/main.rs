//! The `kari` program: arguments, telemetry and signals; nothing else.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use kari::arguments::{Arguments, Command};
use kari::runtime::{error_chain, shutdown};
use kari::{api, telemetry};

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
    let filter = std::env::var("RUST_LOG").unwrap_or(arguments.log_level);
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
            Command::Controller(_) | Command::Agent(_) => {
                shutdown.cancel();
                Err("this build has neither controller nor agent".into())
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
