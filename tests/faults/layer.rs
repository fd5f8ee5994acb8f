//! Faults between a client and a real API server, as a layer around the
//! client's own stack: answers that the server did not give, answers that are
//! lost, calls that hang, streams that break, objects that cannot be decoded.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::{Request, Response, StatusCode};
use kari::runtime::client::ApiService;
use kube::client::{Body, DynBody};
use serde_json::{Value, json};
use tower::{BoxError, Layer, Service};

type Answer = Response<Box<DynBody>>;

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The call does not reach the server; this is the answer.
    Refused(u16),
    /// The call takes effect, and then this is the answer.
    LostAnswer(u16),
    /// The call does not reach the server and is never answered.
    Hangs,
    /// The call takes effect and is never answered.
    HangsAfterEffect,
    /// The connection breaks before anything is sent.
    Drops,
    /// The call reaches the server after this time.
    Slow(Duration),
    /// A watch begins and says in its stream that its version has expired.
    ExpiredInStream,
    /// A watch begins, and its stream ends in the middle of a line.
    BreaksInStream,
    /// In every answer, the object of this name has a number where its `data`
    /// should be.
    Undecodable(&'static str),
}

/// Which calls a fault meets: kube's verb, and a part of the path.
#[derive(Clone, Debug)]
struct Rule {
    id: u64,
    verbs: &'static [&'static str],
    path: String,
    fault: Fault,
    left: Option<u32>,
    hits: u32,
}

/// The faults of a client; shared with the layer.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    rules: Arc<Mutex<Vec<Rule>>>,
}

/// A fault that was put in.
#[derive(Clone, Debug)]
pub struct Injected {
    faults: Faults,
    id: u64,
}

impl Faults {
    /// Lets `fault` meet the next `times` calls (`None`: every call) whose verb
    /// is among `verbs` and whose path contains `path`. Earlier faults go first.
    pub fn inject(
        &self,
        verbs: &'static [&'static str],
        path: &str,
        fault: Fault,
        times: Option<u32>,
    ) -> Injected {
        let mut rules = self.rules.lock().unwrap();
        let id = rules.last().map_or(0, |rule| rule.id + 1);
        rules.push(Rule {
            id,
            verbs,
            path: path.to_owned(),
            fault,
            left: times,
            hits: 0,
        });
        Injected {
            faults: self.clone(),
            id,
        }
    }

    fn meet(&self, verb: &str, path: &str) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap();
        let rule = rules.iter_mut().find(|rule| {
            rule.left != Some(0) && rule.verbs.contains(&verb) && path.contains(&rule.path)
        })?;
        rule.left = rule.left.map(|left| left - 1);
        rule.hits += 1;
        Some(rule.fault.clone())
    }
}

impl Injected {
    /// How many calls the fault has met.
    pub fn hits(&self) -> u32 {
        let rules = self.faults.rules.lock().unwrap();
        rules
            .iter()
            .find(|rule| rule.id == self.id)
            .map_or(0, |rule| rule.hits)
    }

    /// Ends the fault; its hits stay readable.
    pub fn end(&self) {
        let mut rules = self.faults.rules.lock().unwrap();
        if let Some(rule) = rules.iter_mut().find(|rule| rule.id == self.id) {
            rule.left = Some(0);
        }
    }
}

impl Layer<ApiService> for Faults {
    type Service = Faulty;

    fn layer(&self, inner: ApiService) -> Faulty {
        Faulty {
            inner,
            faults: self.clone(),
        }
    }
}

/// The layer's service.
pub struct Faulty {
    inner: ApiService,
    faults: Faults,
}

impl Service<Request<Body>> for Faulty {
    type Response = Answer;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let verb = request
            .extensions()
            .get::<&'static str>()
            .copied()
            .unwrap_or_default();
        match self.faults.meet(verb, request.uri().path()) {
            None => Box::pin(self.inner.call(request)),
            Some(Fault::Refused(code)) => Box::pin(async move { Ok(status(code)) }),
            Some(Fault::LostAnswer(code)) => {
                let call = self.inner.call(request);
                Box::pin(async move {
                    read_whole(call.await?).await?;
                    Ok(status(code))
                })
            }
            Some(Fault::Hangs) => Box::pin(std::future::pending()),
            Some(Fault::HangsAfterEffect) => {
                let call = self.inner.call(request);
                Box::pin(async move {
                    read_whole(call.await?).await?;
                    std::future::pending().await
                })
            }
            Some(Fault::Drops) => {
                Box::pin(async { Err("the connection was reset by a fault".into()) })
            }
            Some(Fault::Slow(delay)) => {
                let call = self.inner.call(request);
                Box::pin(async move {
                    tokio::time::sleep(delay).await;
                    call.await
                })
            }
            Some(Fault::ExpiredInStream) => Box::pin(async {
                let line =
                    json!({"type": "ERROR", "object": status_object(410)}).to_string() + "\n";
                Ok(Response::new(whole(line)))
            }),
            Some(Fault::BreaksInStream) => Box::pin(async {
                Ok(Response::new(whole(
                    r#"{"type":"ADDED","object":{"#.to_owned(),
                )))
            }),
            Some(Fault::Undecodable(name)) => {
                let call = self.inner.call(request);
                let streams = verb == "watch";
                Box::pin(async move {
                    let answer = call.await?;
                    if streams {
                        Ok(damage_lines(answer, name))
                    } else {
                        damage_whole(answer, name).await
                    }
                })
            }
        }
    }
}

fn status_object(code: u16) -> Value {
    let reason = StatusCode::from_u16(code)
        .ok()
        .and_then(|code| code.canonical_reason())
        .unwrap_or("Unknown");
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "reason": if code == 410 { "Expired" } else { reason }, "message": format!("a fault: {reason}"), "code": code,
    })
}

fn status(code: u16) -> Answer {
    let mut answer = Response::new(whole(status_object(code).to_string()));
    *answer.status_mut() = StatusCode::from_u16(code).unwrap();
    answer
}

fn whole(text: String) -> Box<DynBody> {
    Box::new(Full::new(Bytes::from(text)).map_err(BoxError::from))
}

async fn read_whole(answer: Answer) -> Result<Bytes, BoxError> {
    Ok(answer.into_body().collect().await?.to_bytes())
}

async fn damage_whole(answer: Answer, name: &str) -> Result<Answer, BoxError> {
    let (parts, body) = answer.into_parts();
    let bytes = read_whole(Response::new(body)).await?;
    let mut value: Value = serde_json::from_slice(&bytes)?;
    match value.get_mut("items").and_then(Value::as_array_mut) {
        Some(items) => items.iter_mut().for_each(|item| damage(item, name)),
        None => damage(&mut value, name),
    }
    Ok(Response::from_parts(parts, whole(value.to_string())))
}

fn damage_lines(answer: Answer, name: &'static str) -> Answer {
    let (parts, body) = answer.into_parts();
    let bytes = body.into_data_stream().map_err(std::io::Error::other);
    let reader = tokio_util::io::StreamReader::new(bytes);
    let lines = tokio_util::codec::FramedRead::new(reader, tokio_util::codec::LinesCodec::new());
    let frames = lines.map(move |line| {
        let mut event: Value = serde_json::from_str(&line?)?;
        if let Some(object) = event.get_mut("object") {
            damage(object, name);
        }
        Ok::<_, BoxError>(Frame::data(Bytes::from(event.to_string() + "\n")))
    });
    Response::from_parts(parts, Box::new(StreamBody::new(frames)) as Box<DynBody>)
}

fn damage(object: &mut Value, name: &str) {
    if object.pointer("/metadata/name").and_then(Value::as_str) == Some(name) {
        object["data"] = json!(42);
    }
}
