//! A steady stream of requests, and what became of each.
//!
//! Failed is a status other than 2xx, or a connection that breaks after bytes of the request were sent. A
//! keep-alive connection that the server closed while it was idle is replaced, as HTTP allows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// What became of the requests.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Requests that were answered by a 2xx.
    pub good: usize,
    /// Requests that failed, each with how.
    pub failed: Vec<String>,
    /// When the first and the last of them failed.
    pub failed_between: Option<(Instant, Instant)>,
    /// Idle connections that the server closed and that were replaced.
    pub reconnected: usize,
    /// Bodies, and how often each was seen.
    pub bodies: BTreeMap<String, usize>,
}

/// A stream of requests that goes on until it is stopped.
pub struct Traffic {
    stop: CancellationToken,
    tasks: JoinSet<()>,
    tally: Arc<Mutex<Tally>>,
}

/// Opens a connection to a node; a test's network may be one that only a thread of its own reaches.
pub trait Connect: Clone + Send + Sync + 'static {
    /// What it opens.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Opens it.
    fn connect(&self, to: SocketAddr)
    -> impl Future<Output = std::io::Result<Self::Stream>> + Send;
}

impl Traffic {
    /// Sends `per_second` GETs of `/` for `host` to `to`, over `connections` connections that are kept alive.
    pub fn start(
        connect: impl Connect,
        to: SocketAddr,
        host: &str,
        per_second: u32,
        connections: u32,
    ) -> Self {
        let stop = CancellationToken::new();
        let tally = Arc::new(Mutex::new(Tally::default()));
        let mut tasks = JoinSet::new();
        let period = Duration::from_secs(1) * connections / per_second;
        for number in 0..connections {
            let (connect, stop, tally, host) = (
                connect.clone(),
                stop.clone(),
                tally.clone(),
                host.to_owned(),
            );
            tasks.spawn(async move {
                let first = tokio::time::Instant::now() + period * number / connections;
                let mut ticks = tokio::time::interval_at(first, period);
                let mut connection = None;
                while stop.run_until_cancelled(ticks.tick()).await.is_some() {
                    let outcome = request(&connect, to, &host, &mut connection).await;
                    let mut tally = tally.lock().expect("no panic holds the tally");
                    match outcome {
                        Ok(Answer { body, reconnected }) => {
                            tally.good += 1;
                            tally.reconnected += usize::from(reconnected);
                            *tally.bodies.entry(body).or_default() += 1;
                        }
                        Err(how) => {
                            connection = None;
                            tally.failed.push(how);
                            let now = Instant::now();
                            let first = tally.failed_between.map_or(now, |(first, _)| first);
                            tally.failed_between = Some((first, now));
                        }
                    }
                }
            });
        }
        Self { stop, tasks, tally }
    }

    /// What has become of the requests so far.
    pub fn tally(&self) -> Tally {
        self.tally.lock().expect("no panic holds the tally").clone()
    }

    /// Ends the stream, with its last answers.
    pub async fn stop(mut self) -> Tally {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.tally()
    }
}

/// One GET on a connection of its own: the status and the body.
pub async fn get_once(
    connect: &impl Connect,
    to: SocketAddr,
    host: &str,
    path: &str,
) -> Result<(u16, String), String> {
    let mut sender = open(connect, to)
        .await
        .map_err(|e| format!("no connection: {e}"))?;
    let request = hyper::Request::get(path)
        .header("host", host)
        .body(Empty::new())
        .map_err(|e| e.to_string())?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        Ok::<_, hyper::Error>((status, String::from_utf8_lossy(&body).into_owned()))
    };
    match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
        Ok(answer) => answer.map_err(|e| format!("{e:?}")),
        Err(_) => Err(format!("no answer within {ANSWER_TIMEOUT:?}")),
    }
}

struct Answer {
    body: String,
    reconnected: bool,
}

/// Longer than any answer of a healthy node takes, so that a request that hangs is one that failed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

async fn request(
    connect: &impl Connect,
    to: SocketAddr,
    host: &str,
    connection: &mut Option<SendRequest<Empty<Bytes>>>,
) -> Result<Answer, String> {
    let started = Instant::now();
    let mut reconnected = false;
    // Ready is what says that the last answer was read to its end and the connection is still there.
    if let Some(kept) = connection
        && kept.ready().await.is_err()
    {
        *connection = None;
        reconnected = true;
    }
    let is_new = connection.is_none();
    let sender = match connection {
        Some(sender) => sender,
        None => connection.insert(
            open(connect, to)
                .await
                .map_err(|e| format!("no connection: {e}"))?,
        ),
    };
    let get = hyper::Request::get("/")
        .header("host", host)
        .body(Empty::new())
        .map_err(|e| e.to_string())?;
    let answer = async {
        let response = sender.send_request(get).await?;
        let status = response.status();
        let retry = response.headers().get("retry-after").cloned();
        let body = response.into_body().collect().await?.to_bytes();
        Ok::<_, hyper::Error>((status, retry, body))
    };
    match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
        Ok(Ok((status, _, body))) if status.is_success() => Ok(Answer {
            body: String::from_utf8_lossy(&body).into_owned(),
            reconnected,
        }),
        Ok(Ok((status, retry, body))) => Err(format!(
            "{status}{} after {:?}: {}",
            retry.map_or(String::new(), |after| format!(" Retry-After {after:?}")),
            started.elapsed(),
            String::from_utf8_lossy(&body)
        )),
        // The server closed it in the moment it was taken: not a byte of the request was sent.
        Ok(Err(error)) if error.is_canceled() && !is_new => {
            *connection = None;
            let answer = Box::pin(request(connect, to, host, connection)).await?;
            Ok(Answer {
                reconnected: true,
                ..answer
            })
        }
        Ok(Err(error)) => Err(format!("broke after {:?}: {error:?}", started.elapsed())),
        Err(_) => Err(format!("no answer within {ANSWER_TIMEOUT:?}")),
    }
}

async fn open(
    connect: &impl Connect,
    to: SocketAddr,
) -> std::io::Result<SendRequest<Empty<Bytes>>> {
    let stream = connect.connect(to).await?;
    let (sender, connection) = handshake(TokioIo::new(stream))
        .await
        .map_err(std::io::Error::other)?;
    tokio::spawn(connection);
    Ok(sender)
}
