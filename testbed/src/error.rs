//! What can go wrong, said so that the reader knows what to do next.

use std::{io, path::PathBuf, time::Duration};

/// The result of every fallible function here.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that this crate reports.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused something.
    #[error("cannot {action}")]
    Io {
        /// What was tried, as the end of "cannot …".
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A program that was run to its end said no.
    #[error("`{command}` failed ({status}): {output}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit status.
        status: String,
        /// What it wrote to its standard error, trimmed.
        output: String,
    },
    /// Something did not become ready within its limit.
    #[error("{what} within {} s; last seen: {seen}{log}", limit.as_secs_f32())]
    NotReady {
        /// What was waited for, as a sentence with "not" in it.
        what: String,
        /// How long was waited at most.
        limit: Duration,
        /// What the last look showed.
        seen: String,
        /// The end of the log that belongs to it, with its path; or empty.
        log: String,
    },
    /// Something that was waited for will not become ready any more.
    #[error("{what}: {why}{log}")]
    Failed {
        /// What was waited for, as a sentence with "not" in it.
        what: String,
        /// What the last look showed.
        why: String,
        /// The end of the log that belongs to it, with its path; or empty.
        log: String,
    },
    /// A program that is needed is not there.
    #[error("{0}")]
    Missing(String),
    /// The request does not fit the state of this testbed.
    #[error("{0}")]
    State(String),
    /// The folder holds no testbed.
    #[error("there is no testbed in {}: `testbed up` brings one up", .0.display())]
    Absent(PathBuf),
    /// The API server refused a request.
    #[error("cannot {action}")]
    Kubernetes {
        /// What was tried, as the end of "cannot …".
        action: String,
        /// The client's error.
        #[source]
        source: Box<kube::Error>,
    },
    /// A text could not be read as what it should be.
    #[error("cannot read {what}: {reason}")]
    Parse {
        /// What the text is.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Adds to an I/O error what was tried.
pub(crate) trait Context<T> {
    /// `action` ends the sentence "cannot …".
    fn context(self, action: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io {
            action: action(),
            source,
        })
    }
}

impl<T> Context<T> for kube::Result<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Kubernetes {
            action: action(),
            source: Box::new(source),
        })
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io {
            action: action(),
            source: source.into(),
        })
    }
}
