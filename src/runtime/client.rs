//! The API client: every call bounded, few retries, everything counted.
//!
//! kube's own retries hide an outage for minutes inside one call and its calls
//! have no read timeout, so a server that stops answering would hold a
//! reconcile for ever. Here, from the outside in:
//! 1. a deadline of [`CALL`] over the whole call, retries and body included;
//!    for a watch or a log stream, over the time until its headers arrive: the
//!    stream itself is bounded by the watcher's own timeouts;
//! 2. retries of 429, 503 and 504, at most [`RETRIES`];
//! 3. counting and timing of each attempt by verb and code;
//! 4. whatever [`build_with_layer`] adds: tests put faults there;
//! 5. kube's own stack.
//!
//! A retried write may find that its first attempt took effect: a create then
//! answers AlreadyExists, a write with a resourceVersion Conflict. Callers
//! compare and observe again; they have to in any case.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use hyper::{Request, Response};
use kube::client::retry::{InvalidBackoff, RetryPolicy};
use kube::client::{Body, ClientBuilder, DynBody};
use kube::{Client, Config};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::time::{Instant, Sleep};
use tower::buffer::BufferLayer;
use tower::retry::RetryLayer;
use tower::util::BoxService;
use tower::{BoxError, Layer, Service, layer::layer_fn};

/// How long one call may take, retries included. Half of a reconcile's limit,
/// so that a hung call becomes an error that names it.
pub const CALL: Duration = Duration::from_secs(30);

/// The first and the longest wait between tries, and how many there are: 0.1 s
/// to 5 s, at most about 2 s in all unless the server asks for more. What is
/// still wrong then is the business of the key's backoff, where it is seen.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(5);
const RETRIES: u32 = 4;

/// Calls that wait for the client's turn; kube's own bound.
const BUFFERED: usize = 1024;

/// The verbs whose answers are streams without an end.
const STREAMS: [&str; 3] = ["watch", "watch_metadata", "log_stream"];

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no usable configuration.
    #[error(
        "cannot find out how to reach the Kubernetes API: set KUBECONFIG to a readable kubeconfig, or run in a pod with a service account"
    )]
    Infer(#[source] Box<kube::config::InferConfigError>),
    /// The configuration names certificates or credentials that cannot be used.
    #[error("cannot use the Kubernetes configuration")]
    Build(#[source] Box<kube::Error>),
    /// The constants above contradict each other.
    #[error("the bounds of the client's retries contradict each other")]
    Retry(#[source] InvalidBackoff),
}

/// The call did not end in time.
#[derive(Debug, thiserror::Error)]
#[error("{verb}: no complete answer from the API server within {} s", CALL.as_secs())]
pub struct DeadlineExceeded {
    verb: &'static str,
}

/// The service that layers wrap: any request of kube's to a response with any
/// body.
pub type ApiService = BoxService<Request<Body>, Response<Box<DynBody>>, BoxError>;

/// The configuration as kubectl would find it (`KUBECONFIG`, `~/.kube/config`),
/// or the pod's own.
///
/// # Errors
/// Neither is there, or it cannot be read.
pub async fn infer() -> Result<Config, ClientError> {
    Config::infer()
        .await
        .map_err(|error| ClientError::Infer(Box::new(error)))
}

/// The client that the whole process shares.
///
/// # Errors
/// The configuration's certificates or credentials cannot be used.
pub fn build(config: Config, metrics: &ApiMetrics) -> Result<Client, ClientError> {
    build_with_layer(config, metrics, &layer_fn(|service: ApiService| service))
}

/// As [`build`], with `layer` around kube's own stack: what it answers is
/// counted, retried and bounded as if the server had answered.
///
/// # Errors
/// As [`build`].
pub fn build_with_layer<L, S>(
    mut config: Config,
    metrics: &ApiMetrics,
    layer: &L,
) -> Result<Client, ClientError>
where
    L: Layer<ApiService, Service = S>,
    S: Service<Request<Body>, Response = Response<Box<DynBody>>, Error = BoxError> + Send + 'static,
    S::Future: Send + 'static,
{
    config.default_retry = false;
    let retry =
        RetryPolicy::new(RETRY_FIRST, RETRY_LONGEST, RETRIES, true).map_err(ClientError::Retry)?;
    let (counting, deadlines) = (metrics.clone(), metrics.clone());
    let client = ClientBuilder::try_from(config)
        .map_err(|error| ClientError::Build(Box::new(error)))?
        .with_layer(layer)
        .with_layer(&layer_fn(move |inner| Counted {
            inner,
            metrics: counting.clone(),
        }))
        .with_layer(&BufferLayer::new(BUFFERED))
        .with_layer(&RetryLayer::new(retry))
        .with_layer(&layer_fn(move |inner| Bounded {
            inner,
            metrics: deadlines.clone(),
        }))
        .build();
    Ok(client)
}

/// kube marks every call with its verb.
fn verb(request: &Request<Body>) -> &'static str {
    request
        .extensions()
        .get::<&'static str>()
        .copied()
        .unwrap_or("other")
}

/// Counts and times each attempt.
#[derive(Debug)]
struct Counted<S> {
    inner: S,
    metrics: ApiMetrics,
}

impl<S, B> Service<Request<Body>> for Counted<S>
where
    S: Service<Request<Body>, Response = Response<B>, Error = BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let verb = verb(&request);
        let metrics = self.metrics.clone();
        let started = Instant::now();
        self.inner
            .call(request)
            .inspect(move |result| {
                let code = result.as_ref().map_or(Code::Transport, |response| {
                    Code::Status(response.status().as_u16())
                });
                metrics.count(verb, code);
                metrics
                    .duration
                    .get_or_create(&VerbLabels { verb })
                    .observe(started.elapsed().as_secs_f64());
            })
            .boxed()
    }
}

/// Bounds a call, its body included.
#[derive(Debug)]
struct Bounded<S> {
    inner: S,
    metrics: ApiMetrics,
}

impl<S, B> Service<Request<Body>> for Bounded<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<BoundedBody>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<BoundedBody>, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let verb = verb(&request);
        let metrics = self.metrics.clone();
        let deadline = Instant::now() + CALL;
        let answer = self.inner.call(request);
        Box::pin(async move {
            let Ok(result) = tokio::time::timeout_at(deadline, answer).await else {
                metrics.count(verb, Code::Deadline);
                return Err(DeadlineExceeded { verb }.into());
            };
            let response = result.map_err(Into::into)?;
            let endless = response.status().is_success() && STREAMS.contains(&verb);
            Ok(response.map(|body| BoundedBody {
                body: Box::pin(http_body_util::BodyExt::map_err(body, Into::into)),
                deadline: (!endless).then(|| Box::pin(tokio::time::sleep_until(deadline))),
                verb,
                metrics,
            }))
        })
    }
}

/// A body that fails at its deadline.
struct BoundedBody {
    body: Pin<Box<dyn HttpBody<Data = Bytes, Error = BoxError> + Send>>,
    deadline: Option<Pin<Box<Sleep>>>,
    verb: &'static str,
    metrics: ApiMetrics,
}

impl HttpBody for BoundedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let ready = self.body.as_mut().poll_frame(context);
        if ready.is_ready() {
            return ready;
        }
        let Some(deadline) = &mut self.deadline else {
            return Poll::Pending;
        };
        match deadline.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                self.metrics.count(self.verb, Code::Deadline);
                Poll::Ready(Some(Err(DeadlineExceeded { verb: self.verb }.into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// How an attempt ended.
#[derive(Clone, Copy)]
enum Code {
    Status(u16),
    Transport,
    Deadline,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VerbLabels {
    verb: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CallLabels {
    verb: &'static str,
    code: String,
}

/// What is counted of API calls.
#[derive(Clone, Debug)]
pub struct ApiMetrics {
    requests: Family<CallLabels, Counter>,
    duration: Family<VerbLabels, Histogram, fn() -> Histogram>,
}

impl ApiMetrics {
    /// Creates the metrics and registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            // From a quick read to the deadline of a call.
            duration: Family::new_with_constructor(|| {
                Histogram::new([0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0])
            }),
        };
        registry.register(
            "kari_api_requests",
            "Attempts of API calls, by verb and HTTP status, or transport (no answer) or deadline (given up)",
            metrics.requests.clone(),
        );
        registry.register(
            "kari_api_request_duration_seconds",
            "How long the API server took to answer with headers",
            metrics.duration.clone(),
        );
        metrics
    }

    fn count(&self, verb: &'static str, code: Code) {
        let code = match code {
            Code::Status(status) => status.to_string(),
            Code::Transport => "transport".to_owned(),
            Code::Deadline => "deadline".to_owned(),
        };
        self.requests
            .get_or_create(&CallLabels { verb, code })
            .inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Node;
    use kube::Api;
    use kube::api::WatchParams;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A TCP peer that accepts, reads, says `answer` and then nothing more: the
    /// failure that a read timeout is for.
    async fn silent_after(answer: &'static str) -> Config {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut buffer = [0; 4096];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(answer.as_bytes()).await;
                open.push(stream);
            }
        });
        Config::new(format!("http://{address}").parse().unwrap())
    }

    fn metrics() -> (ApiMetrics, Registry) {
        let mut registry = Registry::default();
        (ApiMetrics::new(&mut registry), registry)
    }

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_stops_answering_fails_the_call_at_its_deadline() {
        for (answer, position) in [
            ("", "before the headers"),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{",
                "within the body",
            ),
        ] {
            let (metrics, registry) = metrics();
            let client = build(silent_after(answer).await, &metrics).unwrap();
            let start = Instant::now();
            let error = Api::<Node>::all(client).get("n1").await.unwrap_err();
            assert_eq!(
                start.elapsed().as_secs(),
                CALL.as_secs(),
                "{position}: {error}"
            );
            assert!(
                text(&registry).contains(r#"verb="get",code="deadline""#),
                "{position}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_must_begin_in_time_and_may_then_be_quiet() {
        let (metrics, _registry) = metrics();
        let client = build(silent_after("").await, &metrics).unwrap();
        let nodes = Api::<Node>::all(client);
        assert!(
            nodes.watch(&WatchParams::default(), "1").await.is_err(),
            "a watch without headers was awaited for ever"
        );

        let client = build(
            silent_after("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n").await,
            &metrics,
        )
        .unwrap();
        let watch = Api::<Node>::all(client)
            .watch(&WatchParams::default(), "1")
            .await
            .unwrap();
        let mut watch = Box::pin(watch);
        let first = tokio::time::timeout(CALL * 5, futures::StreamExt::next(&mut watch)).await;
        assert!(first.is_err(), "a quiet watch was ended: {first:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_retried_a_few_times_and_then_told() {
        let answer =
            "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let (metrics, registry) = metrics();
        let client = build(silent_after(answer).await, &metrics).unwrap();
        let start = Instant::now();
        Api::<Node>::all(client).get("n1").await.unwrap_err();
        assert!(start.elapsed() < CALL, "{:?}", start.elapsed());
        let text = text(&registry);
        assert!(
            text.contains(r#"kari_api_requests_total{verb="get",code="503"} 5"#),
            "{text}"
        );
    }
}
