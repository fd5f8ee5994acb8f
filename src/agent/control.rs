//! What root may ask of a running agent on its own node: to take away an app that no Release holds, or to make a new
//! key.
//!
//! A line each way over a socket that only root can reach. The agent alone knows whether a Release holds the
//! app, and is the only writer of its files, so the command asks it and does nothing itself.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tracing::{info, warn};

use super::node::{Node, lock};
use crate::api::names::AppName;
use crate::runtime::error_chain;

/// Its folder; what a reboot may lose.
const FOLDER: &str = "/run/kari";

/// Where the agent listens.
const SOCKET: &str = "/run/kari/agent.sock";

/// Bytes of a request or an answer at most: a name of an app, or a sentence.
const LINE_LIMIT: u64 = 4096;

/// How long one who connects may take to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// How long a removal is waited for: a service that takes the longest grace period, and more.
const REMOVAL_LIMIT: Duration = Duration::from_secs(3600 + 120);

/// Between two looks whether an app is gone.
const LOOK: Duration = Duration::from_millis(200);

/// Between two tries to listen.
const RETRY: Duration = Duration::from_secs(10);

/// What an answer begins with when the request was carried out.
const DONE: &str = "done: ";

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// No agent listens.
    #[error(
        "no agent answers at {SOCKET}: run this as root on the node, while its agent runs; the agent alone writes what is on the node"
    )]
    NoAgent(#[source] io::Error),
    /// The agent ended, or does not answer.
    #[error("the agent gave no answer; run it again, it goes on where it was")]
    NoAnswer(#[source] io::Error),
    /// The agent says why not.
    #[error("{0}")]
    Refused(String),
}

/// Has the agent of this node take `app` away, its state too, and returns what it says when that is done.
///
/// # Errors
/// No agent runs here, or it refuses: a Release holds the app, or it cannot tell yet.
pub async fn remove(app: &AppName) -> Result<String, RequestError> {
    ask(&format!("remove {app}")).await
}

/// Has the agent of this node make a new key, and returns what it says when it announces it. The old one is kept for
/// as long as anything is sealed to it.
///
/// # Errors
/// No agent runs here, or it cannot write the key.
pub async fn rotate_key() -> Result<String, RequestError> {
    ask(ROTATE_KEY).await
}

/// A line to the agent, and its answer.
async fn ask(request: &str) -> Result<String, RequestError> {
    let mut stream = UnixStream::connect(SOCKET)
        .await
        .map_err(RequestError::NoAgent)?;
    let answer = async {
        stream.write_all(format!("{request}\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.take(LINE_LIMIT).read_to_string(&mut answer).await?;
        Ok(answer)
    };
    let answer = answer.await.map_err(RequestError::NoAnswer)?;
    match answer.trim_end().strip_prefix(DONE) {
        Some(done) => Ok(done.to_owned()),
        None if answer.is_empty() => {
            Err(RequestError::NoAnswer(io::ErrorKind::UnexpectedEof.into()))
        }
        None => Err(RequestError::Refused(answer.trim_end().to_owned())),
    }
}

/// Answers requests for as long as the agent runs.
pub async fn listen(node: Arc<Node>) {
    loop {
        match bind() {
            Ok(listener) => {
                while let Ok((stream, _)) = listener.accept().await {
                    let node = Arc::clone(&node);
                    tokio::spawn(async move {
                        if let Err(error) = answer(&node, stream).await {
                            warn!("a request was not answered: {error}");
                        }
                    });
                }
            }
            Err(error) => warn!("cannot listen at {SOCKET}: {error}"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn bind() -> io::Result<UnixListener> {
    std::fs::create_dir_all(FOLDER)?;
    // Left by an agent of before: this one holds the lock of the node.
    match std::fs::remove_file(SOCKET) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(SOCKET)?;
    std::fs::set_permissions(Path::new(SOCKET), std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn answer(node: &Node, mut stream: UnixStream) -> io::Result<()> {
    let mut line = String::new();
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader.take(LINE_LIMIT));
    tokio::time::timeout(REQUEST_LIMIT, reader.read_line(&mut line)).await??;
    let request = line.trim_end();
    let app = request
        .strip_prefix("remove ")
        .and_then(|app| AppName::parse(app).ok());
    let answer = match app {
        Some(app) => take_away(node, &app).await,
        None if request == ROTATE_KEY => new_key(node),
        None => {
            "this agent does not know the request; use the kari program of its version".to_owned()
        }
    };
    writer.write_all(format!("{answer}\n").as_bytes()).await
}

/// The request for a new key.
const ROTATE_KEY: &str = "rotate-key";

fn new_key(node: &Node) -> String {
    let rotated = {
        let mut keys = lock(&node.keys);
        keys.rotate().map(|()| keys.current().id())
    };
    match rotated {
        Ok(id) => {
            info!(key = %id, "made a new key, as asked for on the node");
            // The Lease tells of it.
            node.held.notify_one();
            format!(
                "{DONE}the node's key is {id} now; its values are sealed anew by the controller, and the old key goes when nothing needs it"
            )
        }
        Err(error) => format!("no new key: {}", error_chain(&error)),
    }
}

async fn take_away(node: &Node, app: &AppName) -> String {
    let name = format!("{}/{}", app.namespace(), app.name());
    if !node.listed.load(Ordering::Relaxed) {
        return format!(
            "whether a Release holds {name} is not known, as the API server has not answered yet; nothing was done"
        );
    }
    if node.release(app).is_some() {
        return format!(
            "a Release holds {name}: delete the Deployment, or take this node out of its placement; nothing was done"
        );
    }
    let folder = node.store.app(app);
    if !folder.path().exists() {
        return format!("there is nothing of {name} on this node");
    }
    info!(%app, "it is taken away, as asked for on the node");
    lock(&node.unwanted).insert(app.clone());
    let deadline = tokio::time::Instant::now() + REMOVAL_LIMIT;
    let outcome = loop {
        node.trigger.wake(app.clone());
        tokio::time::sleep(LOOK).await;
        if !folder.path().exists() {
            break format!("{DONE}{name} is gone from this node");
        }
        if tokio::time::Instant::now() > deadline {
            break format!("{name} is not gone yet; the agent's log says why, and it goes on");
        }
    };
    lock(&node.unwanted).remove(app);
    outcome
}
