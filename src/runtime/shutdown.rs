//! The end of the process: signals become one token, and whatever still runs
//! has a bounded time to end.

use std::future::Future;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How long running work may take to end after the first signal. Together with
/// [`BOUND`] it stays below the 30 s that Kubernetes and systemd setups
/// commonly grant before they kill.
pub const DRAIN: Duration = Duration::from_secs(15);

/// How long the whole process may take to end after the first signal.
pub const BOUND: Duration = Duration::from_secs(25);

/// The exit status after a second signal, as a shell shows SIGINT.
const ABORTED: i32 = 130;

/// A token that SIGTERM or SIGINT cancels. A second signal ends the process at
/// once: whoever sends it has waited long enough, and every step of Kari
/// survives a kill.
///
/// # Errors
/// The operating system refused to install the handlers.
pub fn on_signals() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let shutdown = token.clone();
    tokio::spawn(async move {
        let name = next(&mut terminate, &mut interrupt).await;
        info!("{name}: shutting down; a second signal ends the process at once");
        shutdown.cancel();
        let name = next(&mut terminate, &mut interrupt).await;
        warn!("{name} again: ending at once");
        std::process::exit(ABORTED);
    });
    Ok(token)
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

/// Runs `work` to its end, but after `shutdown` for no longer than [`BOUND`].
/// `None`: it was dropped.
pub async fn bounded<Work: Future>(
    shutdown: &CancellationToken,
    work: Work,
) -> Option<Work::Output> {
    let bound = async {
        shutdown.cancelled().await;
        tokio::time::sleep(BOUND).await;
    };
    tokio::select! {
        biased;
        output = work => Some(output),
        () = bound => {
            warn!("did not end within {} s of the signal and is dropped", BOUND.as_secs());
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn work_that_ignores_the_shutdown_is_dropped_at_the_bound() {
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        let start = Instant::now();
        assert_eq!(bounded(&shutdown, std::future::pending::<()>()).await, None);
        assert_eq!(start.elapsed(), BOUND);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_shutdown_work_takes_the_time_it_takes() {
        let shutdown = CancellationToken::new();
        let work = async {
            tokio::time::sleep(Duration::from_secs(86_400)).await;
            7
        };
        assert_eq!(bounded(&shutdown, work).await, Some(7));
    }

    #[test]
    fn the_drain_ends_before_the_process_does() {
        assert!(DRAIN < BOUND && BOUND < Duration::from_secs(30));
    }
}
