//! Logs and metrics of a process.

use std::io;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::runtime::client::ApiMetrics;
use crate::runtime::streams::StreamMetrics;
use crate::runtime::supervise::ReconcileMetrics;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line, for collectors.
    Json,
}

/// The logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error("cannot read the log filter {filter:?}; examples: info, debug, kari=debug,kube=warn")]
    Filter {
        /// As it was given.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Something else in the process has set them up already.
    #[error("cannot set up the logs")]
    Install(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// kube logs each failed attempt of a call on its own as an error; what becomes
/// of the call is told by whoever made it.
const QUIETED: &str = "kube_client::client::builder=off";

/// Writes logs to stderr. `filter`: a level or a list of directives, as in
/// `RUST_LOG`, which the caller gives precedence as it sees fit.
///
/// # Errors
/// The filter does not parse, or logs were set up before.
pub fn init(format: LogFormat, filter: &str) -> Result<(), TelemetryError> {
    let env_filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .parse(format!("{QUIETED},{filter}"))
        .map_err(|source| TelemetryError::Filter {
            filter: filter.to_owned(),
            source,
        })?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(env_filter)
        .with_writer(io::stderr);
    match format {
        LogFormat::Text => subscriber
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .try_init(),
        LogFormat::Json => subscriber.json().flatten_event(true).try_init(),
    }
    .map_err(TelemetryError::Install)
}

/// What `runtime` counts. The sides add their own to the same registry before
/// it is served.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// API calls.
    pub api: ApiMetrics,
    /// Watch streams.
    pub streams: StreamMetrics,
    /// Supervised reconciles.
    pub reconcile: Arc<ReconcileMetrics>,
}

impl Metrics {
    /// Creates the metrics and registers them.
    pub fn new(registry: &mut Registry) -> Self {
        Self {
            api: ApiMetrics::new(registry),
            streams: StreamMetrics::new(registry),
            reconcile: Arc::new(ReconcileMetrics::new(registry)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_does_not_parse_is_named() {
        let error = init(LogFormat::Text, "kari=loud").unwrap_err();
        assert!(error.to_string().contains("kari=loud"), "{error}");
    }

    #[test]
    fn every_metric_has_a_name_of_its_own_and_is_written() {
        let mut registry = Registry::default();
        let _metrics = Metrics::new(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
