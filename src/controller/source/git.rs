//! Asks a git server for its references: one `git ls-remote` in a closed environment.
//!
//! Invariants: no configuration but ours is read, no prompt waits for anybody, only the allowed
//! protocols are spoken, both outputs are bounded, and at the time limit, or when the look-up is
//! dropped, every process of it is killed. A credential is in files that nobody else may read and that go with
//! the look-up, and in no message.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use crate::api::reasons::Reason;
use crate::controller::observed::LookupFailure;
use crate::git_credential::{GitAccess, SSH};

use super::listing::{PEELED, classify, parse};
use super::schedule::Answer;
use super::{Repository, SourceOptions};

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

/// What of it does not hold for a repository with an authority of its own.
const MACHINE_AUTHORITIES: &str = "GIT_SSL_CAINFO";

/// What ssh is told where there is no credential: no key, and the host keys that the machine knows.
const WITHOUT_KEY: &str = "-o UserKnownHostsFile=none -o IdentityFile=none";

/// The commit of each of `references` that the repository has, and perhaps of others.
pub async fn list(
    repository: &Repository,
    references: &BTreeSet<String>,
    options: &SourceOptions,
) -> Answer {
    let unavailable = |message: String| LookupFailure {
        reason: Reason::SourceUnavailable,
        message,
    };
    let Repository { url, credential } = repository;
    let prepared = credential
        .as_ref()
        .map(|credential| {
            let folder = PrivateFolder::make(&options.credentials)?;
            let access = credential.access(&folder.0);
            folder.write(&access.files)?;
            std::io::Result::Ok((folder, access))
        })
        .transpose();
    let prepared = prepared.map_err(|error| {
        unavailable(format!(
            "cannot keep a credential in {} on the controller: {error}",
            options.credentials.display()
        ))
    })?;
    // Its files go when this is left.
    let (_files, access) = prepared.unzip();
    let mut child = Group::spawn(&mut command(url, references, options, access.as_ref()))
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
        let complaint = String::from_utf8_lossy(&complaint);
        let complaint = match credential {
            Some(credential) => credential.mask(&complaint),
            None => complaint.into_owned(),
        };
        Err(classify(url, &complaint, credential.is_some()))
    }
}

/// A folder that only this process's user may look into, gone with the value.
struct PrivateFolder(PathBuf);

impl PrivateFolder {
    fn make(within: &Path) -> std::io::Result<Self> {
        let folder = within.join(uuid::Uuid::new_v4().simple().to_string());
        std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
        Ok(Self(folder))
    }

    fn write(&self, files: &[(&str, String)]) -> std::io::Result<()> {
        for (name, content) in files {
            let mut options = std::fs::OpenOptions::new();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(self.0.join(name))?;
            file.write_all(content.as_bytes())?;
        }
        Ok(())
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        // What is left goes with the process's own folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn command(
    url: &str,
    references: &BTreeSet<String>,
    options: &SourceOptions,
    access: Option<&GitAccess>,
) -> Command {
    let protocols = if options.insecure_schemes {
        "https:ssh:http:git"
    } else {
        "https:ssh"
    };
    // No helper of an administrator's git is asked; ours come after this.
    let mut settings = vec![("credential.helper".to_owned(), String::new())];
    settings.extend(access.iter().flat_map(|access| access.settings.clone()));
    let has_authorities = settings.iter().any(|(key, _)| key.ends_with(".sslCAInfo"));
    let ssh = access.and_then(|access| access.ssh.clone());
    let passed_on = PASSED_ON
        .iter()
        .filter(|name| !has_authorities || **name != MACHINE_AUTHORITIES)
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
        .env(
            "GIT_SSH_COMMAND",
            ssh.unwrap_or_else(|| format!("{SSH} {WITHOUT_KEY}")),
        )
        .env("GIT_SSH_VARIANT", "ssh")
        .current_dir(&options.home)
        .env("GIT_CEILING_DIRECTORIES", &options.home)
        .env("GIT_CONFIG_COUNT", settings.len().to_string())
        .args(["ls-remote", "--quiet", "--", url]);
    for (at, (key, value)) in settings.into_iter().enumerate() {
        command
            .env(format!("GIT_CONFIG_KEY_{at}"), key)
            .env(format!("GIT_CONFIG_VALUE_{at}"), value);
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::names::Commit;
    use std::net::TcpListener;
    use std::path::Path;

    /// How long a test waits for what another process does.
    const DEADLINE: Duration = Duration::from_secs(10);

    fn git(folder: &Path, arguments: &[&str]) -> String {
        let output = std::process::Command::new("git")
            .current_dir(folder)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .args(["-c", "user.name=t", "-c", "user.email=t@example.com"])
            .args(arguments)
            .output()
            .unwrap_or_else(|e| panic!("git {arguments:?}: {e}"));
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "git {arguments:?}: {complaint}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// `git daemon` with one repository, ended with the value.
    struct Server {
        daemon: std::process::Child,
        url: String,
        folder: tempfile::TempDir,
    }

    impl Server {
        fn start() -> Self {
            let folder = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
            git(folder.path(), &["init", "-q", "-b", "main", "shop"]);
            let repository = folder.path().join("shop");
            git(&repository, &["commit", "-q", "--allow-empty", "-m", "one"]);
            git(&repository, &["tag", "-a", "v1", "-m", "v1"]);
            git(&repository, &["commit", "-q", "--allow-empty", "-m", "two"]);
            let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
            let port = free.unwrap_or_else(|e| panic!("{e}")).port();
            // Not by way of `git`, which would leave the daemon behind when it is killed.
            let programs = git(folder.path(), &["--exec-path"]);
            let daemon = std::process::Command::new(format!("{programs}/git-daemon"))
                .args(["--export-all", "--reuseaddr", "--listen=127.0.0.1"])
                .stderr(Stdio::null())
                .arg(format!("--port={port}"))
                .arg(format!("--base-path={}", folder.path().display()))
                .spawn()
                .unwrap_or_else(|e| panic!("git daemon: {e}"));
            let began = std::time::Instant::now();
            while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
                assert!(
                    began.elapsed() < DEADLINE,
                    "git daemon does not listen on {port}"
                );
                std::thread::yield_now();
            }
            Self {
                daemon,
                url: format!("git://127.0.0.1:{port}/shop"),
                folder,
            }
        }

        fn commit(&self, name: &str) -> Commit {
            let commit = git(&self.folder.path().join("shop"), &["rev-parse", name]);
            Commit::parse(&commit).unwrap_or_else(|e| panic!("{e}"))
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        }
    }

    fn options(home: &Path, insecure_schemes: bool) -> SourceOptions {
        SourceOptions {
            slots: 1,
            insecure_schemes,
            home: home.to_owned(),
            credentials: home.to_owned(),
        }
    }

    fn public(url: &str) -> Repository {
        Repository {
            url: url.to_owned(),
            credential: None,
        }
    }

    fn references(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[tokio::test]
    async fn a_server_tells_the_commits_of_branches_and_annotated_tags() {
        let server = Server::start();
        let home = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
        let wanted = references(&["refs/heads/main", "refs/tags/v1", "refs/heads/none"]);
        let answer = list(&public(&server.url), &wanted, &options(home.path(), true)).await;
        let commits = answer.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(commits.get("refs/heads/main"), Some(&server.commit("main")));
        assert_eq!(
            commits.get("refs/tags/v1"),
            Some(&server.commit("v1^{commit}"))
        );
        assert_eq!(commits.get("refs/heads/none"), None);
        let failure = list(
            &public(&format!("{}-none", server.url)),
            &wanted,
            &options(home.path(), true),
        )
        .await;
        let failure = failure
            .err()
            .unwrap_or_else(|| panic!("there is no such repository"));
        assert_eq!(failure.reason, Reason::SourceUnavailable);
        let left = std::fs::read_dir(home.path()).map(Iterator::count);
        assert_eq!(left.ok(), Some(0), "git wrote into its home");
    }

    #[tokio::test]
    async fn a_protocol_that_is_not_allowed_is_not_spoken() {
        let server = Server::start();
        let home = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
        let wanted = references(&["refs/heads/main"]);
        for url in [
            server.url.as_str(),
            "ext::sh -c true",
            "file:///tmp",
            "/tmp",
        ] {
            let answer = list(&public(url), &wanted, &options(home.path(), false)).await;
            let failure = answer.err().unwrap_or_else(|| panic!("{url} was asked"));
            assert!(failure.message.contains("not allowed"), "{url}: {failure}");
        }
    }

    #[tokio::test]
    async fn a_look_up_that_is_dropped_leaves_no_process() {
        use tokio::io::AsyncReadExt as _;
        // A server that takes the connection and never answers.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let silent = silent.unwrap_or_else(|e| panic!("{e}"));
        let address = silent.local_addr().unwrap_or_else(|e| panic!("{e}"));
        let home = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
        let (repository, wanted) = (
            public(&format!("git://{address}/shop")),
            references(&["refs/heads/main"]),
        );
        let options = options(home.path(), true);
        let mut connection = tokio::select! {
            answer = list(&repository, &wanted, &options) => panic!("answered: {answer:?}"),
            accepted = tokio::time::timeout(DEADLINE, silent.accept()) => match accepted {
                Ok(Ok((connection, _))) => connection,
                other => panic!("git did not connect: {other:?}"),
            },
        };
        // The look-up is dropped. Its end of the connection closes when its process has gone.
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(DEADLINE, connection.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "git still holds the connection");
    }
}
