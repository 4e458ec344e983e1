//! Guests' calls to other services, over the connections of the gateway's upstreams.
//!
//! A guest names an upstream as it names a cluster in Envoy. An http call that fails in any way is
//! answered without headers; one that takes too long with a 504, as Envoy does. gRPC runs over the
//! same upstreams, which then have to speak HTTP/2 (`http: http2`, or ALPN). Each call is a task; a
//! stream's messages wait in a queue that the ABI's limit on outstanding call-outs bounds.
//!
//! Left out on purpose: compressed gRPC messages (none is offered, so none may come).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use http_body::Frame;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle;

use super::headers;
use super::lane::LaneError;
use super::upstream::{Answered, OutBody, Upstream};
use super::wasm::{Process, map_of, pairs_of};
use crate::abi::{self, GrpcCall, GrpcEvent, GrpcStream, HttpCall, HttpCallResponse, Transport};

/// Most bytes of an answer to a guest's call, and of one gRPC message.
const ANSWER_MAX_BYTES: usize = 16 << 20;
/// Flag and length in front of each gRPC message.
const GRPC_PREFIX_BYTES: usize = 5;

/// gRPC statuses that the gateway itself reports.
mod status {
    pub(super) const DEADLINE_EXCEEDED: u32 = 4;
    pub(super) const RESOURCE_EXHAUSTED: u32 = 8;
    pub(super) const UNIMPLEMENTED: u32 = 12;
    pub(super) const INTERNAL: u32 = 13;
    pub(super) const UNAVAILABLE: u32 = 14;
    pub(super) const UNKNOWN: u32 = 2;
}

/// Where guests' calls go: the gateway's upstreams of the present configuration, by name.
#[derive(Default)]
pub(super) struct CallOuts(RwLock<HashMap<Arc<str>, Arc<Upstream>>>);

impl CallOuts {
    pub(super) fn set(&self, upstreams: &[Arc<Upstream>]) {
        let by_name = upstreams.iter().map(|it| (Arc::clone(&it.plan.name), Arc::clone(it))).collect();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = by_name;
    }

    fn upstream(&self, name: &str) -> Option<Arc<Upstream>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }
}

/// Who hears of what comes back: one VM, as long as it runs.
pub(super) trait Caller: Clone + Send + Sync + 'static {
    fn http_answer(&self, id: u32, answer: Option<HttpCallResponse>);
    fn grpc_event(&self, id: u32, event: GrpcEvent);
}

/// What a VM's gRPC calls and streams are doing, by their tokens.
#[derive(Default)]
pub(super) struct Open(Mutex<HashMap<u32, OpenCall>>);

struct OpenCall {
    task: AbortHandle,
    /// Messages to an open stream; gone once it is half-closed.
    messages: Option<UnboundedSender<Bytes>>,
}

impl Open {
    fn with<T>(&self, work: impl FnOnce(&mut HashMap<u32, OpenCall>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // The VM is gone; nobody wants the answers.
        self.with(|open| open.values().for_each(|call| call.task.abort()));
    }
}

/// Starts what one VM asks for.
pub(super) struct Carrier<'c, C> {
    pub(super) runtime: &'c Handle,
    pub(super) process: &'c Arc<Process>,
    pub(super) open: &'c Arc<Open>,
    pub(super) caller: C,
}

impl<C: Caller> Carrier<'_, C> {
    /// Runs a gRPC exchange as a task that can be cancelled by its token.
    fn start(
        &self,
        id: u32,
        messages: Option<UnboundedSender<Bytes>>,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        let open = Arc::downgrade(self.open);
        // Held until the entry is there, so that the task cannot take it out before.
        self.open.with(|calls| {
            let task = self.runtime.spawn(async move {
                work.await;
                if let Some(open) = open.upgrade() {
                    open.with(|calls| calls.remove(&id));
                }
            });
            calls.insert(id, OpenCall { task: task.abort_handle(), messages });
        });
    }
}

impl<C: Caller> Transport for Carrier<'_, C> {
    fn http_call(&mut self, call: HttpCall) {
        let (process, caller) = (Arc::clone(self.process), self.caller.clone());
        self.runtime.spawn(async move {
            let (id, wait) = (call.id, wait(call.timeout_ms));
            let answer = tokio::time::timeout(wait, fetch(&process.call_outs, call)).await;
            caller.http_answer(id, answer.unwrap_or_else(|_| Some(timed_out())));
        });
    }

    fn grpc_call(&mut self, call: GrpcCall) {
        let (process, caller) = (Arc::clone(self.process), self.caller.clone());
        self.start(call.id, None, async move {
            let (id, wait) = (call.id, wait(call.timeout_ms));
            let timed_out =
                || GrpcEvent::Closed { status: status::DEADLINE_EXCEEDED, message: String::new() };
            let answer = tokio::time::timeout(wait, unary(&process.call_outs, call)).await;
            caller.grpc_event(id, answer.unwrap_or_else(|_| timed_out()));
        });
    }

    fn grpc_stream(&mut self, stream: GrpcStream) {
        let (process, caller) = (Arc::clone(self.process), self.caller.clone());
        let (messages, queue) = unbounded_channel();
        self.start(stream.id, Some(messages), async move {
            let id = stream.id;
            let (status, message) = converse(&process.call_outs, stream, queue, &caller).await;
            caller.grpc_event(id, GrpcEvent::Closed { status, message });
        });
    }

    fn grpc_send(&mut self, id: u32, message: Vec<u8>, end_of_stream: bool) {
        self.open.with(|calls| {
            let Some(call) = calls.get_mut(&id) else { return };
            if let Some(messages) = &call.messages {
                // Fails when the exchange is ending, which the guest is told apart.
                let _ = messages.send(framed(&message));
            }
            if end_of_stream {
                call.messages = None;
            }
        });
    }

    fn grpc_close(&mut self, id: u32) {
        self.open.with(|calls| {
            if let Some(call) = calls.get_mut(&id) {
                call.messages = None;
            }
        });
    }

    fn grpc_cancel(&mut self, id: u32) {
        if let Some(call) = self.open.with(|calls| calls.remove(&id)) {
            call.task.abort();
        }
    }
}

fn wait(timeout_ms: u32) -> Duration {
    // 0 is as long as it takes; a day is that.
    Duration::from_millis(if timeout_ms == 0 { 86_400_000 } else { timeout_ms.into() })
}

fn timed_out() -> HttpCallResponse {
    let body = b"upstream request timeout".to_vec();
    let mut headers = abi::HeaderMap::new();
    headers.add(b":status", b"504");
    headers.add(b"content-length", body.len().to_string().as_bytes());
    headers.add(b"content-type", b"text/plain");
    HttpCallResponse { headers, body, trailers: abi::HeaderMap::new() }
}

/// Sends a guest's request; `None` when it fails in any way, which is all that a guest is told.
async fn fetch(call_outs: &CallOuts, call: HttpCall) -> Option<HttpCallResponse> {
    let upstream = call_outs.upstream(&call.upstream)?;
    let head = headers::call_head(&pairs_of(&call.headers)).ok()?;
    let trailers = headers::fields(&pairs_of(&call.trailers)).ok().filter(|map| !map.is_empty());
    let body = OutBody::whole(Bytes::from(call.body), trailers);
    let Answered { response, lease } = upstream.send(head.map(|()| body), false).await.ok()?;
    let (mut head, body) = response.into_parts();
    let collected = Limited::new(body, ANSWER_MAX_BYTES).collect().await.ok()?;
    lease.give_back();
    let trailers = collected.trailers().map(headers::trailer_pairs).unwrap_or_default();
    Some(HttpCallResponse {
        headers: map_of(headers::response_pairs(&mut head)),
        body: collected.to_bytes().to_vec(),
        trailers: map_of(trailers),
    })
}

/// Why a gRPC exchange ended before its own status said so.
type GrpcFailure = (u32, String);

fn failure(status: u32, message: impl ToString) -> GrpcFailure {
    (status, message.to_string())
}

async fn unary(call_outs: &CallOuts, call: GrpcCall) -> GrpcEvent {
    let whole = async {
        let body = OutBody::whole(framed(&call.message), None);
        let (response, _lease) =
            open(call_outs, &call.upstream, &call.service, &call.method, &call.metadata, body).await?;
        let mut answer = Messages::new(response.into_body());
        let first = answer.next().await?;
        let (status, message) = answer.end().await?;
        match first {
            Some(first) if status == 0 => Ok(first),
            None if status == 0 => Err(failure(status::INTERNAL, "the answer has no message")),
            _ => Err((status, message)),
        }
    };
    match whole.await {
        Ok(message) => GrpcEvent::Message(message),
        Err((status, message)) => GrpcEvent::Closed { status, message },
    }
}

async fn converse(
    call_outs: &CallOuts,
    stream: GrpcStream,
    queue: UnboundedReceiver<Bytes>,
    caller: &impl Caller,
) -> GrpcFailure {
    let id = stream.id;
    let whole = async {
        let body = OutBody::Messages(queue);
        let (response, _lease) =
            open(call_outs, &stream.upstream, &stream.service, &stream.method, &stream.metadata, body)
                .await?;
        let (head, body) = response.into_parts();
        let mut answer = Messages::new(body);
        // A trailers-only answer has its status among the headers.
        if let Some(ended) = status_in(&head.headers) {
            caller.grpc_event(id, GrpcEvent::TrailingMetadata(map_of(headers::trailer_pairs(&head.headers))));
            return Ok(ended);
        }
        let initial = map_of(headers::trailer_pairs(&head.headers));
        caller.grpc_event(id, GrpcEvent::InitialMetadata(initial));
        while let Some(message) = answer.next().await? {
            caller.grpc_event(id, GrpcEvent::Message(message));
        }
        let trailers = map_of(headers::trailer_pairs(&answer.trailers));
        caller.grpc_event(id, GrpcEvent::TrailingMetadata(trailers));
        answer.end().await
    };
    whole.await.unwrap_or_else(|failure: GrpcFailure| failure)
}

async fn open(
    call_outs: &CallOuts,
    upstream: &str,
    service: &str,
    method: &str,
    metadata: &abi::HeaderMap,
    body: OutBody,
) -> Result<(Response<Incoming>, super::upstream::Lease), GrpcFailure> {
    let unavailable = |error: &dyn std::fmt::Display| failure(status::UNAVAILABLE, error);
    let upstream =
        call_outs.upstream(upstream).ok_or_else(|| unavailable(&"there is no such upstream any more"))?;
    let path: Uri = format!("/{service}/{method}")
        .parse()
        .map_err(|_| failure(status::UNIMPLEMENTED, "the service's name is no path"))?;
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = path;
    *request.headers_mut() =
        headers::fields(&pairs_of(metadata)).map_err(|error| failure(status::INTERNAL, error))?;
    let fields = request.headers_mut();
    fields.insert(header::HOST, upstream.plan.authority.clone());
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    fields.insert(header::TE, HeaderValue::from_static("trailers"));
    let Answered { response, lease } =
        upstream.send(request, false).await.map_err(|error| unavailable(&error))?;
    if response.version() != Version::HTTP_2 {
        return Err(failure(status::UNAVAILABLE, "the upstream does not speak HTTP/2, which gRPC needs"));
    }
    if response.status() != StatusCode::OK {
        let message = format!("the upstream answered {}", response.status());
        return Err(failure(status::UNAVAILABLE, message));
    }
    Ok((response, lease))
}

/// A message with gRPC's prefix.
fn framed(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let mut frame = BytesMut::with_capacity(GRPC_PREFIX_BYTES + message.len());
    frame.extend_from_slice(&[0]);
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(message);
    frame.freeze()
}

/// The messages of a gRPC answer.
struct Messages {
    body: Incoming,
    buffer: BytesMut,
    trailers: HeaderMap,
}

impl Messages {
    fn new(body: Incoming) -> Self {
        Self { body, buffer: BytesMut::new(), trailers: HeaderMap::new() }
    }

    async fn next(&mut self) -> Result<Option<Vec<u8>>, GrpcFailure> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.buffer.extend_from_slice(&data),
                    Err(frame) => self.trailers.extend(frame.into_trailers().unwrap_or_default()),
                },
                Some(Err(error)) => return Err(failure(status::UNAVAILABLE, error)),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(failure(status::INTERNAL, "the answer ends within a message")),
            }
        }
    }

    fn take(&mut self) -> Result<Option<Vec<u8>>, GrpcFailure> {
        let Some((&[flag, ref length @ ..], _)) = self.buffer.split_first_chunk::<GRPC_PREFIX_BYTES>() else {
            return Ok(None);
        };
        if flag != 0 {
            return Err(failure(status::UNIMPLEMENTED, "the answer is compressed, which nobody asked for"));
        }
        let length = length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        if length > ANSWER_MAX_BYTES {
            return Err(failure(status::RESOURCE_EXHAUSTED, "the answer has too long a message"));
        }
        if self.buffer.len() < GRPC_PREFIX_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(GRPC_PREFIX_BYTES);
        Ok(Some(self.buffer.split_to(length).to_vec()))
    }

    /// Status and text, once no message follows.
    async fn end(&mut self) -> Result<GrpcFailure, GrpcFailure> {
        while self.next().await?.is_some() {}
        let missing = || failure(status::UNKNOWN, "the answer ends without a grpc-status");
        Ok(status_in(&self.trailers).unwrap_or_else(missing))
    }
}

fn status_in(headers: &HeaderMap) -> Option<GrpcFailure> {
    let text = |name: &'static str| headers.get(HeaderName::from_static(name))?.to_str().ok();
    let message = text("grpc-message").unwrap_or_default().to_owned();
    Some((text("grpc-status")?.parse().ok()?, message))
}

/// Polls a queue of messages as a body.
pub(super) fn poll_messages(
    queue: &mut UnboundedReceiver<Bytes>,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, LaneError>>> {
    queue.poll_recv(cx).map(|message| message.map(|message| Ok(Frame::data(message))))
}
