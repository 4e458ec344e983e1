//! Guests' calls to other services, over the connections of the gateway's upstreams.
//!
//! A guest names an upstream as it names a cluster in Envoy, and is told of failures as there: an http
//! call that gets no response headers is answered with a 503 that says why, one that takes too long with
//! a 504, and one whose response breaks off without headers. gRPC runs over the same upstreams, which
//! then have to speak HTTP/2 (`http: http2`, or ALPN). Each call is a task; a stream's messages wait in
//! a queue that the ABI's limit on outstanding call-outs bounds.
//!
//! Left out on purpose: compressed gRPC messages (none is offered, so none may come).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle;

use super::headers;
use super::lane::LaneError;
use super::upstream::{Answered, Lease, OutBody, Upstream, UpstreamError};
use super::wasm::{Process, map_of, pairs_of};
use crate::abi::{self, GrpcCall, GrpcEvent, GrpcStream, HttpCall, HttpCallResponse, Transport};

/// Most bytes of an answer to a guest's call, and of one gRPC message.
const ANSWER_MAX_BYTES: usize = 16 << 20;
/// Flag and length in front of each gRPC message.
const GRPC_PREFIX_BYTES: usize = 5;

/// gRPC statuses that the gateway itself reports.
mod status {
    pub(super) const RESOURCE_EXHAUSTED: u32 = 8;
    pub(super) const UNIMPLEMENTED: u32 = 12;
    pub(super) const INTERNAL: u32 = 13;
    pub(super) const UNAVAILABLE: u32 = 14;
    pub(super) const UNKNOWN: u32 = 2;

    /// What an answer that is not gRPC's means (the mapping of gRPC over HTTP/2).
    pub(super) fn of_http(status: u16) -> u32 {
        match status {
            400 => INTERNAL,
            401 => 16,
            403 => 7,
            404 => UNIMPLEMENTED,
            429 | 502..=504 => UNAVAILABLE,
            _ => UNKNOWN,
        }
    }
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
            // Envoy makes a 504 up, which is UNAVAILABLE.
            let timed_out =
                || GrpcEvent::Closed { status: status::UNAVAILABLE, message: TIMED_OUT.to_owned() };
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

const TIMED_OUT: &str = "upstream request timeout";

/// A response in the upstream's place, in Envoy's words.
fn made_up(status: &str, body: &str) -> HttpCallResponse {
    let mut headers = abi::HeaderMap::new();
    headers.add(b":status", status.as_bytes());
    headers.add(b"content-length", body.len().to_string().as_bytes());
    headers.add(b"content-type", b"text/plain");
    HttpCallResponse { headers, body: body.into(), trailers: abi::HeaderMap::new() }
}

fn timed_out() -> HttpCallResponse {
    made_up("504", TIMED_OUT)
}

/// Envoy's answer for a request that got none; filters in the field look for these words.
fn not_answered(error: &UpstreamError) -> HttpCallResponse {
    let reason = match error {
        UpstreamError::Unreachable(_) | UpstreamError::Tls(_) => "remote connection failure",
        UpstreamError::ConnectTimeout(_) => "connection timeout",
        UpstreamError::Saturated(_) => "overflow",
        UpstreamError::Http2Only | UpstreamError::Malformed(_) => "protocol error",
        UpstreamError::Broken(_) => "connection termination",
    };
    let status = if reason == "protocol error" { "502" } else { "503" };
    let text = "upstream connect error or disconnect/reset before headers. reset reason";
    made_up(status, &format!("{text}: {reason}"))
}

/// Sends a guest's request; `None` when its response breaks off, or when it cannot be sent as it is.
async fn fetch(call_outs: &CallOuts, call: HttpCall) -> Option<HttpCallResponse> {
    let upstream = call_outs.upstream(&call.upstream)?;
    let head = headers::call_head(&pairs_of(&call.headers)).ok()?;
    let trailers = headers::fields(&pairs_of(&call.trailers)).ok().filter(|map| !map.is_empty());
    let body = OutBody::whole(Bytes::from(call.body), trailers);
    let Answered { response, lease } = match upstream.send(head.map(|()| body), false).await {
        Ok(answered) => answered,
        Err(error) => return Some(not_answered(&error)),
    };
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

/// How a gRPC exchange ended: its status, and what was said about it.
type GrpcEnd = (u32, String);

/// What came of opening a gRPC exchange.
struct Opened {
    initial: abi::HeaderMap,
    /// What follows; or the end, with the trailers that came with it.
    rest: Result<(Messages, Lease), (GrpcEnd, abi::HeaderMap)>,
}

impl Opened {
    /// A failure that the proxy makes up.
    fn failed(status: u32, initial: abi::HeaderMap, message: String) -> Self {
        Self { initial, rest: Err(((status, message), abi::HeaderMap::new())) }
    }

    fn not_answered(error: &UpstreamError) -> Self {
        let HttpCallResponse { headers, body, .. } = not_answered(error);
        Self::failed(status::UNAVAILABLE, headers, String::from_utf8_lossy(&body).into_owned())
    }

    fn of(response: Response<Incoming>, lease: Lease) -> Self {
        let http2 = response.version() == Version::HTTP_2;
        let (mut head, body) = response.into_parts();
        let fields = head.headers.clone();
        let initial = map_of(headers::response_pairs(&mut head));
        if !http2 {
            let message = "the upstream does not speak HTTP/2, which gRPC needs".to_owned();
            return Self::failed(status::UNAVAILABLE, initial, message);
        }
        // An answer of headers alone has its status and its trailers among them.
        let alone = if body.is_end_stream() { status_in(&fields) } else { None };
        match alone {
            Some(end) => Self { initial: abi::HeaderMap::new(), rest: Err((end, initial)) },
            None if head.status != StatusCode::OK => {
                Self::failed(status::of_http(head.status.as_u16()), initial, String::new())
            }
            None => Self { initial, rest: Ok((Messages::new(body), lease)) },
        }
    }
}

async fn unary(call_outs: &CallOuts, call: GrpcCall) -> GrpcEvent {
    let body = OutBody::whole(framed(&call.message), None);
    let opened = open(call_outs, &call.upstream, &call.service, &call.method, &call.metadata, body).await;
    let (mut answer, _lease) = match opened.rest {
        Ok(answer) => answer,
        Err(((status, message), _)) => return GrpcEvent::Closed { status, message },
    };
    let mut last = None;
    let end = loop {
        match answer.next().await {
            Ok(Some(message)) => last = Some(message),
            Ok(None) => break answer.end(),
            Err(end) => break end,
        }
    };
    match (end, last) {
        ((0, _), Some(message)) => GrpcEvent::Message(message),
        ((0, _), None) => GrpcEvent::Closed { status: status::INTERNAL, message: String::new() },
        ((status, message), _) => GrpcEvent::Closed { status, message },
    }
}

/// Tells of a stream's initial metadata, messages and trailing metadata, all of which there always are.
async fn converse(
    call_outs: &CallOuts,
    stream: GrpcStream,
    queue: UnboundedReceiver<Bytes>,
    caller: &impl Caller,
) -> GrpcEnd {
    let id = stream.id;
    let body = OutBody::Messages(queue);
    let Opened { initial, rest } =
        open(call_outs, &stream.upstream, &stream.service, &stream.method, &stream.metadata, body).await;
    caller.grpc_event(id, GrpcEvent::InitialMetadata(initial));
    let (end, trailers) = match rest {
        Err(ended) => ended,
        Ok((mut answer, _lease)) => {
            let end = loop {
                match answer.next().await {
                    Ok(Some(message)) => caller.grpc_event(id, GrpcEvent::Message(message)),
                    Ok(None) => break answer.end(),
                    Err(end) => break end,
                }
            };
            (end, map_of(headers::trailer_pairs(&answer.trailers)))
        }
    };
    caller.grpc_event(id, GrpcEvent::TrailingMetadata(trailers));
    end
}

async fn open(
    call_outs: &CallOuts,
    upstream: &str,
    service: &str,
    method: &str,
    metadata: &abi::HeaderMap,
    body: OutBody,
) -> Opened {
    let wrong = |message: String| Opened::failed(status::INTERNAL, abi::HeaderMap::new(), message);
    // A reload took it away since the guest asked.
    let Some(upstream) = call_outs.upstream(upstream) else {
        return Opened::failed(
            status::UNAVAILABLE,
            abi::HeaderMap::new(),
            "there is no such upstream any more".to_owned(),
        );
    };
    let Ok(path) = format!("/{service}/{method}").parse::<Uri>() else {
        return wrong("the service's name is no path".to_owned());
    };
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = path;
    *request.headers_mut() = match headers::fields(&pairs_of(metadata)) {
        Ok(fields) => fields,
        Err(error) => return wrong(error.to_string()),
    };
    let fields = request.headers_mut();
    fields.insert(header::HOST, upstream.plan.authority.clone());
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    fields.insert(header::TE, HeaderValue::from_static("trailers"));
    match upstream.send(request, false).await {
        Ok(Answered { response, lease }) => Opened::of(response, lease),
        Err(error) => Opened::not_answered(&error),
    }
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

    /// `None` at the end; what is left of a message that was cut short counts for nothing, as in Envoy.
    async fn next(&mut self) -> Result<Option<Vec<u8>>, GrpcEnd> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.buffer.extend_from_slice(&data),
                    Err(frame) => self.trailers.extend(frame.into_trailers().unwrap_or_default()),
                },
                Some(Err(_)) => return Err((status::INTERNAL, String::new())),
                None => return Ok(None),
            }
        }
    }

    fn take(&mut self) -> Result<Option<Vec<u8>>, GrpcEnd> {
        let Some((&[flag, ref length @ ..], _)) = self.buffer.split_first_chunk::<GRPC_PREFIX_BYTES>() else {
            return Ok(None);
        };
        if flag != 0 {
            return Err((status::INTERNAL, "it is compressed, which nobody asked for".to_owned()));
        }
        let length = length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        if length > ANSWER_MAX_BYTES {
            return Err((status::RESOURCE_EXHAUSTED, "the answer has too long a message".to_owned()));
        }
        if self.buffer.len() < GRPC_PREFIX_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(GRPC_PREFIX_BYTES);
        Ok(Some(self.buffer.split_to(length).to_vec()))
    }

    /// Status and text, once no message follows.
    fn end(&self) -> GrpcEnd {
        status_in(&self.trailers).unwrap_or((status::UNKNOWN, String::new()))
    }
}

fn status_in(headers: &HeaderMap) -> Option<GrpcEnd> {
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
