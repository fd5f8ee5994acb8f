//! What kube-rs does not give and both sides need once: supervised
//! reconciling, guarded watch streams, safe leases, a bounded API client,
//! bounded shutdown, and health that is tied to progress.
//!
//! Nothing here knows what Kari deploys. Whatever decides (when a key runs
//! next, who holds a lease, when a stream is rebuilt) is a plain state machine
//! that is told the time: [`queue`], [`election`], [`streams::Watchdog`]. The
//! drivers around them are thin.

pub mod client;
pub mod election;
pub mod lease;
pub mod node_lease;
pub mod queue;
pub mod serve;
pub mod shutdown;
pub mod streams;
pub mod supervise;

/// An error and everything that caused it, in one line.
///
/// A source whose text its parent already repeats (kube's errors do) is left
/// out.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
