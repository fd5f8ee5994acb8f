//! Asks a git server for its references: one `git ls-remote` in a closed environment.
//!
//! Invariants: no configuration but ours is read, no prompt waits for anybody, only the allowed
//! protocols are spoken, both outputs are bounded, and at the time limit, or when the look-up is
//! dropped, every process of it is killed.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use crate::api::reasons::Reason;
use crate::controller::observed::LookupFailure;

use super::SourceOptions;
use super::listing::{PEELED, classify, parse};
use super::schedule::Answer;

/// How long a look-up may take: a server that has not answered by then is looked at again later.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// Bytes of a listing at most: about 200 000 references.
const LISTING_LIMIT: u64 = 16 * 1024 * 1024;

/// Bytes of git's complaints that are kept.
const COMPLAINT_LIMIT: u64 = 16 * 1024;

/// References that are asked for by name; more than these and all of the repository are listed, as a
/// command line has its own limit.
const NAMED_REFERENCES: usize = 200;

/// What of the controller's own environment git sees: where programs are, which proxy the administrator
/// has set, and which certificates are trusted.
const PASSED_ON: &[&str] = &[
    "PATH",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTPS_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
];

/// The ssh that git starts: asks nobody, has no key, takes no host key that the machine does not know.
const SSH: &str = "ssh -F none -o BatchMode=yes -o StrictHostKeyChecking=yes -o UserKnownHostsFile=none -o IdentitiesOnly=yes -o IdentityFile=none -o ConnectTimeout=15";

/// The commit of each of `references` that the repository at `url` has, and perhaps of others.
pub async fn list(url: &str, references: &BTreeSet<String>, options: &SourceOptions) -> Answer {
    let unavailable = |message: String| LookupFailure {
        reason: Reason::SourceUnavailable,
        message,
    };
    let mut child = Group::spawn(&mut command(url, references, options))
        .map_err(|error| unavailable(format!("cannot run git on the controller: {error}")))?;
    let ended = tokio::time::timeout(TIME_LIMIT, child.finish()).await;
    let Ok(ended) = ended else {
        return Err(unavailable(format!(
            "{url}: no answer within {} s; it is tried again",
            TIME_LIMIT.as_secs()
        )));
    };
    let Ended {
        listing,
        complaint,
        success,
    } = ended.map_err(|error| unavailable(format!("{url}: git could not be read: {error}")))?;
    let Some(success) = success else {
        return Err(unavailable(format!(
            "{url}: lists more than {} MiB of references",
            LISTING_LIMIT / (1024 * 1024)
        )));
    };
    if success {
        Ok(parse(&String::from_utf8_lossy(&listing)))
    } else {
        Err(classify(url, &String::from_utf8_lossy(&complaint)))
    }
}

fn command(url: &str, references: &BTreeSet<String>, options: &SourceOptions) -> Command {
    let protocols = if options.insecure_schemes {
        "https:ssh:http:git"
    } else {
        "https:ssh"
    };
    let passed_on = PASSED_ON
        .iter()
        .filter_map(|name| Some((*name, std::env::var_os(name)?)));
    let mut command = Command::new("git");
    command
        .env_clear()
        .envs(passed_on.collect::<Vec<(&str, OsString)>>())
        .env("LC_ALL", "C")
        .env("HOME", &options.home)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_ALLOW_PROTOCOL", protocols)
        .env("GIT_SSH_COMMAND", SSH)
        .env("GIT_SSH_VARIANT", "ssh")
        .current_dir(&options.home)
        .env("GIT_CEILING_DIRECTORIES", &options.home)
        .args([
            "-c",
            "credential.helper=",
            "ls-remote",
            "--quiet",
            "--",
            url,
        ]);
    if references.len() <= NAMED_REFERENCES {
        for reference in references {
            command.arg(reference).arg(format!("{reference}{PEELED}"));
        }
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    command
}

/// A child and all that it starts: killed together unless it has ended.
struct Group {
    child: Child,
    group: Option<Pid>,
}

struct Ended {
    listing: Vec<u8>,
    complaint: Vec<u8>,
    /// Nothing if the listing was longer than its limit, and git was not waited for.
    success: Option<bool>,
}

impl Group {
    fn spawn(command: &mut Command) -> std::io::Result<Self> {
        let child = command.spawn()?;
        let group = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        Ok(Self { child, group })
    }

    async fn finish(&mut self) -> std::io::Result<Ended> {
        let (stdout, stderr) = (self.child.stdout.take(), self.child.stderr.take());
        let listing = async {
            let mut listing = Vec::new();
            if let Some(stdout) = stdout {
                let mut limited = stdout.take(LISTING_LIMIT + 1);
                limited.read_to_end(&mut listing).await?;
            }
            std::io::Result::Ok(listing)
        };
        let (listing, complaint) = tokio::try_join!(listing, first_bytes(stderr))?;
        if listing.len() as u64 > LISTING_LIMIT {
            return Ok(Ended {
                listing,
                complaint,
                success: None,
            });
        }
        let status = self.child.wait().await?;
        self.group = None;
        Ok(Ended {
            listing,
            complaint,
            success: Some(status.success()),
        })
    }
}

/// The first bytes of what is read to its end, so that nobody waits for a full pipe.
async fn first_bytes(stream: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut first = Vec::new();
    if let Some(mut stream) = stream {
        (&mut stream)
            .take(COMPLAINT_LIMIT)
            .read_to_end(&mut first)
            .await?;
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    }
    Ok(first)
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.group {
            // It may have ended in this moment.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}
