//! Waiting for a condition with a deadline, and saying what was seen when it passed.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How often a condition is looked at: it is cheap, and people wait for it.
const POLL: Duration = Duration::from_millis(20);

/// What a look at a condition shows.
pub enum Seen<T> {
    /// It holds, with what was found.
    Ready(T),
    /// It does not hold yet, and this was seen instead.
    NotYet(String),
    /// It will not come to hold any more, and this is why.
    Never(String),
}

/// Looks until the condition holds; the error says `what` (a sentence with
/// "not" in it), what was last seen, and what `log` returns.
pub async fn until<T>(
    what: &str,
    limit: Duration,
    log: impl Fn() -> String,
    mut look: impl AsyncFnMut() -> Seen<T>,
) -> Result<T> {
    let start = Instant::now();
    let mut last = "nothing yet".to_owned();
    loop {
        let left = limit.saturating_sub(start.elapsed());
        let seen = tokio::time::timeout(left, look()).await;
        let over = match seen {
            Ok(Seen::Ready(value)) => return Ok(value),
            Ok(Seen::NotYet(seen)) => {
                last = seen;
                start.elapsed() >= limit
            }
            Ok(Seen::Never(why)) => {
                return Err(Error::Failed {
                    what: what.to_owned(),
                    why,
                    log: log(),
                });
            }
            Err(_elapsed) => true,
        };
        if over {
            return Err(Error::NotReady {
                what: what.to_owned(),
                limit,
                seen: last,
                log: log(),
            });
        }
        tokio::time::sleep(POLL).await;
    }
}
