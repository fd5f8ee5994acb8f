//! `/healthz`, `/readyz` and `/metrics` over plain HTTP.
//!
//! `/healthz` answers for progress, not for the fact that HTTP answers: every
//! loop that must turn registers a [`Heartbeat`] with a greatest age, and a
//! late one makes it 503 with the loop's name. `/readyz` is 200 once every
//! [`Gate`] is open. All three are read-only and need no authentication.
//!
//! Bounds: one request per connection, ten seconds for all of it, 64
//! connections at once; headers as hyper limits them.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// How long a connection may take, from accept to the last byte.
const CONNECTION: Duration = Duration::from_secs(10);

/// How many connections are served at once; further ones wait in the kernel.
const CONNECTIONS: usize = 64;

/// The pause after a failed accept: file descriptors may have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// The type that Prometheus asks for and `prometheus-client` writes.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The endpoints could not be opened.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen on {address} for /healthz, /readyz and /metrics; choose another address with --listen"
)]
pub struct ServeError {
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

/// The heartbeats of a process.
#[derive(Clone, Debug, Default)]
pub struct Liveness {
    beats: Arc<Mutex<BTreeMap<&'static str, Beat>>>,
}

#[derive(Debug)]
struct Beat {
    last: Instant,
    greatest_age: Duration,
}

impl Liveness {
    /// Registers a loop that must beat at least each `greatest_age`. The first
    /// beat is now. A name that is registered again replaces the earlier one.
    pub fn register(&self, name: &'static str, greatest_age: Duration) -> Heartbeat {
        self.beats().insert(
            name,
            Beat {
                last: Instant::now(),
                greatest_age,
            },
        );
        Heartbeat {
            liveness: self.clone(),
            name,
        }
    }

    /// The loops that are late, with the seconds since their last beat.
    pub fn late(&self) -> Vec<(&'static str, u64)> {
        self.beats()
            .iter()
            .filter(|(_, beat)| beat.last.elapsed() > beat.greatest_age)
            .map(|(name, beat)| (*name, beat.last.elapsed().as_secs()))
            .collect()
    }

    fn beats(&self) -> MutexGuard<'_, BTreeMap<&'static str, Beat>> {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A loop's sign of life. Dropping it is none: a loop that ended without
/// [`Heartbeat::retire`] becomes late, as one that hangs.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    liveness: Liveness,
    name: &'static str,
}

impl Heartbeat {
    /// The loop made a turn.
    pub fn beat(&self) {
        if let Some(beat) = self.liveness.beats().get_mut(self.name) {
            beat.last = Instant::now();
        }
    }

    /// The loop ended as it should.
    pub fn retire(self) {
        self.liveness.beats().remove(self.name);
    }
}

/// What must have happened before a process is ready.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    gates: Arc<Mutex<BTreeMap<&'static str, bool>>>,
}

impl Readiness {
    /// A gate that is closed until [`Gate::open`]. The name says what is
    /// awaited, for the person who reads `/readyz`.
    pub fn gate(&self, name: &'static str) -> Gate {
        self.gates().insert(name, false);
        Gate {
            readiness: self.clone(),
            name,
        }
    }

    /// The gates that are closed.
    pub fn closed(&self) -> Vec<&'static str> {
        self.gates()
            .iter()
            .filter(|(_, open)| !**open)
            .map(|(name, _)| *name)
            .collect()
    }

    fn gates(&self) -> MutexGuard<'_, BTreeMap<&'static str, bool>> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One condition of [`Readiness`].
#[derive(Clone, Debug)]
pub struct Gate {
    readiness: Readiness,
    name: &'static str,
}

impl Gate {
    /// The condition holds.
    pub fn open(&self) {
        self.readiness.gates().insert(self.name, true);
    }

    /// The condition holds no more.
    pub fn close(&self) {
        self.readiness.gates().insert(self.name, false);
    }
}

/// What the endpoints tell of.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// `/healthz`
    pub liveness: Liveness,
    /// `/readyz`
    pub readiness: Readiness,
    /// `/metrics`
    pub registry: Arc<Registry>,
}

impl Endpoints {
    /// Serves on `address` until `shutdown`.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn serve(
        self,
        address: SocketAddr,
        shutdown: CancellationToken,
    ) -> Result<(), ServeError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| ServeError { address, source })?;
        self.serve_on(listener, shutdown).await;
        Ok(())
    }

    /// As [`Endpoints::serve`], on a socket that listens already.
    pub async fn serve_on(self, listener: TcpListener, shutdown: CancellationToken) {
        if let Ok(address) = listener.local_addr() {
            info!("serving /healthz, /readyz and /metrics on http://{address}");
        }
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let accepted = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (slot, listener.accept().await)
            };
            let (slot, stream) = tokio::select! {
                () = shutdown.cancelled() => return,
                (slot, accepted) = accepted => match accepted {
                    Ok((stream, _)) => (slot, stream),
                    Err(error) => {
                        warn!("cannot accept a connection: {error}");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
            };
            let endpoints = self.clone();
            tokio::spawn(async move {
                let _slot = slot;
                if tokio::time::timeout(CONNECTION, endpoints.connection(stream))
                    .await
                    .is_err()
                {
                    debug!(
                        "a connection took longer than {} s and was closed",
                        CONNECTION.as_secs()
                    );
                }
            });
        }
    }

    async fn connection(self, stream: TcpStream) {
        let service = service_fn(|request: Request<Incoming>| {
            let response = self.respond(request.method(), request.uri().path());
            async move { Ok::<_, Infallible>(response) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(error) = served {
            debug!("a connection failed: {error}");
        }
    }

    fn respond(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        let mut response = match path {
            "/healthz" => self.health(),
            "/readyz" => self.readiness(),
            "/metrics" => self.metrics(),
            _ => plain(
                StatusCode::NOT_FOUND,
                "not found; there are /healthz, /readyz and /metrics\n".to_owned(),
            ),
        };
        if method != Method::GET && method != Method::HEAD {
            response = plain(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET and HEAD\n".to_owned(),
            );
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        response
    }

    fn health(&self) -> Response<Full<Bytes>> {
        let late = self.liveness.late();
        if late.is_empty() {
            return plain(StatusCode::OK, "ok\n".to_owned());
        }
        let lines: String = late
            .iter()
            .map(|(name, age)| format!("{name} made no progress for {age} s\n"))
            .collect();
        plain(StatusCode::SERVICE_UNAVAILABLE, lines)
    }

    fn readiness(&self) -> Response<Full<Bytes>> {
        let closed = self.readiness.closed();
        if closed.is_empty() {
            return plain(StatusCode::OK, "ok\n".to_owned());
        }
        let lines: String = closed
            .iter()
            .map(|name| format!("waiting for {name}\n"))
            .collect();
        plain(StatusCode::SERVICE_UNAVAILABLE, lines)
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => {
                let mut response = plain(StatusCode::OK, text);
                response
                    .headers_mut()
                    .insert(CONTENT_TYPE, HeaderValue::from_static(OPEN_METRICS));
                response
            }
            Err(error) => plain(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("cannot write the metrics: {error}\n"),
            ),
        }
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn endpoints() -> Endpoints {
        let mut registry = Registry::default();
        let counter: Counter = Counter::default();
        registry.register("kari_example", "An example", counter);
        Endpoints {
            liveness: Liveness::default(),
            readiness: Readiness::default(),
            registry: Arc::new(registry),
        }
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_endpoints_answer_over_a_real_socket_until_shutdown() {
        let endpoints = endpoints();
        let gate = endpoints.readiness.gate("the first list of Releases");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(endpoints.clone().serve_on(listener, shutdown.clone()));

        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let waiting = get(address, "/readyz").await;
        assert!(waiting.starts_with("HTTP/1.1 503"), "{waiting}");
        assert!(
            waiting.ends_with("waiting for the first list of Releases\n"),
            "{waiting}"
        );
        gate.open();
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        let metrics = get(address, "/metrics").await;
        assert!(metrics.contains(OPEN_METRICS), "{metrics}");
        assert!(metrics.ends_with("# EOF\n"), "{metrics}");
        assert!(get(address, "/nothing").await.starts_with("HTTP/1.1 404"));

        shutdown.cancel();
        serving.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_loop_is_named_and_one_that_beats_again_is_forgiven() {
        let endpoints = endpoints();
        let slow = endpoints
            .liveness
            .register("reconcile", Duration::from_secs(60));
        let other = endpoints
            .liveness
            .register("watch", Duration::from_secs(600));
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(endpoints.health().status(), StatusCode::OK);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(endpoints.liveness.late(), vec![("reconcile", 61)]);
        assert_eq!(endpoints.health().status(), StatusCode::SERVICE_UNAVAILABLE);
        slow.beat();
        assert_eq!(endpoints.liveness.late(), vec![]);
        drop(other);
        tokio::time::advance(Duration::from_secs(601)).await;
        assert_eq!(
            endpoints.liveness.late(),
            vec![("reconcile", 601), ("watch", 662)]
        );
        slow.retire();
        assert_eq!(
            endpoints.liveness.late().len(),
            1,
            "a loop that retired is late"
        );
    }

    #[test]
    fn only_reading_is_allowed() {
        let response = endpoints().respond(&Method::POST, "/metrics");
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}
