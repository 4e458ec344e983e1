//! One HTTP exchange as a filter sees it: what the guest may still read and change, what is held
//! back, what goes on.
//!
//! This is Envoy's filter manager for a chain of one, without I/O and without a VM: [`Side`] is told
//! what arrived and what the guest answered, and says what to release. Kept apart from the VM so
//! that each rule can be tested on its own. Sources: Envoy `source/common/http/filter_manager.cc`
//! and `source/extensions/common/wasm/context.cc`, proxy-wasm-cpp-host `src/context.cc`.
//!
//! Cost: a body chunk is copied in once and moved out. Nothing is kept after it was released, except
//! the header maps, which the access-log callback reads at the end.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::error::AbiError;
use super::headers::HeaderMap;
use super::network::Connection;
use super::property::Lookup;
use super::status::{Direction, MapType, Status};

/// What the guest's Pause on headers does, as Envoy's `allow_on_headers_stop_iteration`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HeadersPause {
    /// Everything stops: body callbacks do not fire until the guest continues the stream. Envoy's
    /// default, and all that Istio's `WasmPlugin` offers.
    #[default]
    StopAllIterationAndWatermark,
    /// Only the headers stop: body callbacks fire, and a Continue from one releases the headers too.
    StopIteration,
}

/// What the caller may pass on now, in the order of the fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Release {
    /// The header map (read it from the plugin) goes out now.
    pub headers: bool,
    /// Body bytes that go out now.
    pub body: Vec<u8>,
    /// The trailer map goes out now.
    pub trailers: bool,
    /// Nothing follows on this side.
    pub end_of_stream: bool,
}

impl Release {
    pub(super) fn append(&mut self, mut next: Self) {
        self.headers |= next.headers;
        if self.body.is_empty() {
            self.body = next.body;
        } else {
            self.body.append(&mut next.body);
        }
        self.trailers |= next.trailers;
        self.end_of_stream |= next.end_of_stream;
    }
}

/// A response that the guest, or a limit, makes up instead of the upstream's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalReply {
    /// HTTP status code.
    pub status: u32,
    /// Why, for the access log (Envoy's response code details); without spaces.
    pub details: String,
    /// Headers that the guest added; without `:status`.
    pub headers: HeaderMap,
    /// The body.
    pub body: Vec<u8>,
    /// The gRPC status, when the guest gave one or the client speaks gRPC; the headers then say the same.
    pub grpc_status: Option<i32>,
    /// Whether the response callbacks of this stream are to run on the reply: true when no response
    /// had begun, as in Envoy. When false the reply goes straight to the client.
    pub through_response_callbacks: bool,
}

impl LocalReply {
    pub(super) fn of_limit(status: u32, details: &str, body: &str) -> Self {
        Self {
            status,
            details: details.to_owned(),
            headers: HeaderMap::new(),
            body: body.as_bytes().to_vec(),
            grpc_status: None,
            through_response_callbacks: true,
        }
    }

    /// Makes it an answer that a gRPC client understands: a response of headers alone, with the status
    /// and the text in them.
    pub(super) fn speak_grpc(&mut self) {
        let status = self.grpc_status.unwrap_or(match self.status {
            400 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 | 502..=504 => 14,
            _ => 2,
        });
        self.grpc_status = Some(status);
        self.status = 200;
        self.headers.replace(b"content-type", b"application/grpc");
        if self.headers.first(b"grpc-status").is_none() {
            self.headers.add(b"grpc-status", status.to_string().as_bytes());
        }
        let text = std::mem::take(&mut self.body);
        if !text.is_empty() {
            self.headers.replace(b"grpc-message", percent_encoded(&text).as_bytes());
        }
    }

    /// The reply's header map, `:status` first, with the content-length and content-type that Envoy
    /// gives a reply with a body.
    #[must_use]
    pub fn response_headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(self.headers.len() + 3);
        headers.add(b":status", self.status.to_string().as_bytes());
        for (name, value) in self.headers.iter() {
            headers.add(name, value);
        }
        if !self.body.is_empty() {
            headers.replace(b"content-length", self.body.len().to_string().as_bytes());
            if headers.first(b"content-type").is_none() {
                headers.add(b"content-type", b"text/plain");
            }
        }
        headers
    }
}

/// The encoding of `grpc-message`: visible ASCII but `%` and `~` stays (as in Envoy).
fn percent_encoded(text: &[u8]) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text {
        match byte {
            b'%' | 0..=0x1f | b'~'.. => out.push_str(&format!("%{byte:02X}")),
            byte => out.push(char::from(*byte)),
        }
    }
    out
}

/// Whether a content-type is gRPC's.
pub(super) fn is_grpc(content_type: &[u8]) -> bool {
    content_type.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest, [] | [b'+', ..]))
}

/// What the caller does after a callback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Pass this on. It may be empty: a chunk that the guest took away, or a message that is over.
    Forward(Release),
    /// Pass nothing on until a later step or [`Event`] says so.
    Hold,
    /// Send this to the client instead; nothing more of the request goes upstream.
    Reply(LocalReply),
    /// Reset the exchange: the guest closed it, or a reply is due but a response has begun.
    Close,
}

/// A step that no callback of its own stream returned: the guest acted from a tick, an http call's
/// answer, a queue, another stream or the other side of this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The stream it is about.
    pub stream: super::StreamId,
    /// The side it is about; a reply or a close concerns the whole exchange.
    pub direction: Direction,
    /// What to do.
    pub step: Step,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Iteration {
    #[default]
    Running,
    /// Only the current frame is stopped; later frames reach the guest.
    StopSingle,
    /// Nothing reaches the guest. `bounded` says whether the buffer limit ends the stream.
    StopAll { bounded: bool },
}

/// What a [`Side`] makes of a guest's answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Settled {
    Forward(Release),
    Hold,
    /// More is buffered than the limit allows.
    OverLimit,
}

/// What to do with a body chunk that arrived.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BodyCall {
    /// Call the guest; it sees this many bytes.
    Call(usize),
    Settled(Settled),
}

/// One direction of an exchange.
#[derive(Debug, Default)]
pub(super) struct Side {
    pub(super) headers: Option<HeaderMap>,
    /// Whether the guest may read and write the headers. Closed once they went on at once; Envoy
    /// leaves them open when they were paused and a body callback released them.
    pub(super) headers_open: bool,
    pub(super) headers_forwarded: bool,
    pub(super) trailers: Option<HeaderMap>,
    pub(super) trailers_open: bool,
    /// Trailers came from the peer, rather than being added by the guest at the end of the body.
    trailers_arrived: bool,
    trailers_forwarded: bool,
    iteration: Iteration,
    /// Bytes a paused callback left with the host.
    held: Vec<u8>,
    /// While all is stopped: a frame is held, perhaps an empty one.
    has_held: bool,
    /// The frame of the running callback, unless `buffering` (then it joined `held`).
    chunk: Vec<u8>,
    chunk_open: bool,
    /// The last body callback paused, so the guest sees all of `held`.
    buffering: bool,
    ended: bool,
    /// The exchange was replied to or reset: what arrives is dropped and the guest is left alone.
    pub(super) over: bool,
    pub(super) limit_bytes: usize,
    /// Whether the guest still sees the buffer that went over the limit. Envoy answers a request
    /// after the callback at hand, but resets a response before it.
    shows_overflow: bool,
    pub(super) overflowed: bool,
    /// Body bytes that arrived.
    pub(super) received_bytes: u64,
}

impl Side {
    pub(super) fn new(limit_bytes: usize, shows_overflow: bool) -> Self {
        Self { limit_bytes, shows_overflow, ..Self::default() }
    }

    /// Body bytes that are held back now.
    pub(super) fn held_bytes(&self) -> usize {
        self.held.len() + self.chunk.len()
    }

    fn over_limit(&self, bytes: usize) -> bool {
        self.limit_bytes != 0 && bytes > self.limit_bytes
    }

    /// Body and trailers come after headers and before the end.
    pub(super) fn check_open(&self, part: &'static str) -> Result<(), AbiError> {
        let rule = if self.over {
            return Ok(());
        } else if self.headers.is_none() {
            "the headers come first"
        } else if self.ended {
            "nothing comes after end_of_stream"
        } else {
            return Ok(());
        };
        Err(AbiError::OutOfOrder { part, rule })
    }

    pub(super) fn begin_headers(&mut self, map: HeaderMap, end_of_stream: bool) {
        self.headers = Some(map);
        self.headers_open = true;
        self.ended = end_of_stream;
    }

    pub(super) fn settle_headers(&mut self, action: u32, pause: HeadersPause) -> Settled {
        self.iteration = match (action, pause) {
            // 2 is ContinueAndEndStream, which Envoy takes for Continue.
            (0 | 2, _) => {
                self.headers_open = false;
                return Settled::Forward(self.release(Vec::new()));
            }
            (1, HeadersPause::StopIteration) => Iteration::StopSingle,
            (3, _) => Iteration::StopAll { bounded: true },
            _ => Iteration::StopAll { bounded: false },
        };
        Settled::Hold
    }

    pub(super) fn begin_body(&mut self, data: &[u8], end_of_stream: bool) -> BodyCall {
        self.received_bytes = self.received_bytes.saturating_add(data.len() as u64);
        self.ended |= end_of_stream;
        if let Iteration::StopAll { bounded } = self.iteration {
            self.has_held = true;
            self.held.extend_from_slice(data);
            return BodyCall::Settled(if bounded && self.over_limit(self.held.len()) {
                Settled::OverLimit
            } else {
                Settled::Hold
            });
        }
        self.chunk_open = true;
        if self.buffering {
            self.held.extend_from_slice(data);
            if self.over_limit(self.held.len()) {
                if !self.shows_overflow {
                    return BodyCall::Settled(Settled::OverLimit);
                }
                self.overflowed = true;
            }
            BodyCall::Call(self.held.len())
        } else {
            self.chunk.clear();
            self.chunk.extend_from_slice(data);
            BodyCall::Call(self.chunk.len())
        }
    }

    pub(super) fn settle_body(&mut self, action: u32) -> Settled {
        if self.overflowed {
            return Settled::OverLimit;
        }
        let chunk = std::mem::take(&mut self.chunk);
        self.buffering = false;
        match action {
            0 => {
                self.chunk_open = false;
                let mut body = std::mem::take(&mut self.held);
                if body.is_empty() {
                    body = chunk;
                } else {
                    body.extend_from_slice(&chunk);
                }
                Settled::Forward(self.release(body))
            }
            // StopIterationAndBuffer (what SDKs call Pause) and StopIterationAndWatermark.
            1 | 2 => {
                self.iteration = Iteration::StopSingle;
                self.buffering = action == 1;
                if self.held.is_empty() {
                    self.held = chunk;
                } else {
                    self.held.extend_from_slice(&chunk);
                }
                if self.buffering && self.over_limit(self.held.len()) {
                    Settled::OverLimit
                } else {
                    Settled::Hold
                }
            }
            // StopIterationNoBuffer: this frame is dropped, earlier ones stay held.
            _ => {
                self.iteration = Iteration::StopSingle;
                Settled::Hold
            }
        }
    }

    /// Returns how many trailers the guest is to be told of, or `None` when it must not be called.
    pub(super) fn begin_trailers(&mut self, map: HeaderMap) -> Option<usize> {
        let count = map.len();
        self.trailers = Some(map);
        self.trailers_arrived = true;
        self.ended = true;
        if matches!(self.iteration, Iteration::StopAll { .. }) {
            return None;
        }
        self.trailers_open = true;
        Some(count)
    }

    pub(super) fn settle_trailers(&mut self, action: u32) -> Settled {
        if action != 0 {
            self.iteration = Iteration::StopSingle;
            return Settled::Hold;
        }
        self.trailers_open = false;
        Settled::Forward(self.release_all())
    }

    /// The guest continued this side. `None` when it was not stopped.
    pub(super) fn resume(&mut self) -> Option<Resume> {
        match std::mem::take(&mut self.iteration) {
            Iteration::Running => None,
            Iteration::StopSingle => Some(Resume::Forward(self.release_all())),
            Iteration::StopAll { .. } => {
                let has_body = std::mem::take(&mut self.has_held);
                let trailers = self.trailers_arrived.then(|| {
                    self.trailers_open = true;
                    self.trailers.as_ref().map_or(0, HeaderMap::len)
                });
                let body = has_body.then(|| {
                    self.chunk = std::mem::take(&mut self.held);
                    self.chunk_open = true;
                    (self.chunk.len(), self.ended && trailers.is_none())
                });
                let headers = Release {
                    headers: !std::mem::replace(&mut self.headers_forwarded, true),
                    end_of_stream: self.ended && body.is_none() && trailers.is_none(),
                    ..Release::default()
                };
                Some(Resume::Replay { headers, body, trailers })
            }
        }
    }

    /// Everything this side still holds, for a caller that goes on without the guest.
    pub(super) fn salvage(&mut self) -> Release {
        // Only a callback that never returned leaves a chunk behind.
        self.held.append(&mut self.chunk);
        self.chunk_open = false;
        self.buffering = false;
        self.over = true;
        if self.headers.is_none() {
            return Release::default();
        }
        self.release_all()
    }

    pub(super) fn end_early(&mut self) {
        self.over = true;
        self.held = Vec::new();
        self.chunk = Vec::new();
        self.chunk_open = false;
        self.buffering = false;
    }

    /// `continue_stream` takes the request's pointers away at once, whichever side it names.
    pub(super) fn close_maps(&mut self) {
        self.headers_open = false;
        self.trailers_open = false;
        self.chunk_open = false;
    }

    /// Releases `body` after a frame went on; peers' trailers wait for their own callback.
    fn release(&mut self, body: Vec<u8>) -> Release {
        self.iteration = Iteration::Running;
        self.has_held = false;
        let trailers = self.trailers.is_some()
            && !self.trailers_arrived
            && !std::mem::replace(&mut self.trailers_forwarded, true);
        Release {
            headers: !std::mem::replace(&mut self.headers_forwarded, true),
            body,
            trailers,
            end_of_stream: self.ended && !self.trailers_arrived,
        }
    }

    fn release_all(&mut self) -> Release {
        self.iteration = Iteration::Running;
        self.has_held = false;
        Release {
            headers: !std::mem::replace(&mut self.headers_forwarded, true),
            body: std::mem::take(&mut self.held),
            trailers: self.trailers.is_some() && !std::mem::replace(&mut self.trailers_forwarded, true),
            end_of_stream: self.ended,
        }
    }

    /// The body bytes that the guest sees now, if any are there to see.
    pub(super) fn visible_body(&self) -> Option<&[u8]> {
        if self.buffering { Some(&self.held) } else { self.chunk_open.then_some(self.chunk.as_slice()) }
    }

    /// `proxy_set_buffer_bytes` on the visible body.
    pub(super) fn replace_body(
        &mut self,
        start: usize,
        length: usize,
        data: &[u8],
        max_bytes: usize,
    ) -> Result<(), Status> {
        let body = if self.buffering {
            &mut self.held
        } else if self.chunk_open {
            &mut self.chunk
        } else {
            return Err(Status::BadArgument);
        };
        replace(body, (start, length), data, max_bytes)
    }

    /// The trailers, created when the guest first writes to them in the last body callback.
    fn writable_trailers(&mut self) -> Option<&mut HeaderMap> {
        if self.trailers.is_none() && self.chunk_open && self.ended {
            self.trailers = Some(HeaderMap::new());
            self.trailers_open = true;
        }
        self.trailers.as_mut().filter(|_| self.trailers_open)
    }
}

/// `proxy_set_buffer_bytes`, as Envoy does it: at start 0, `length` bytes go and `data` comes first; from
/// the end on, `data` is appended; in between is `BadArgument`.
pub(super) fn replace(
    bytes: &mut Vec<u8>,
    (start, length): (usize, usize),
    data: &[u8],
    max_bytes: usize,
) -> Result<(), Status> {
    if bytes.len().saturating_add(data.len()) > max_bytes {
        return Err(Status::InternalFailure);
    }
    if start == 0 {
        let drained = length.min(bytes.len());
        bytes.splice(..drained, data.iter().copied());
        Ok(())
    } else if start >= bytes.len() {
        bytes.extend_from_slice(data);
        Ok(())
    } else {
        Err(Status::BadArgument)
    }
}

/// How a stopped side goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Resume {
    Forward(Release),
    /// Everything was stopped: the headers go on, then the guest is shown what had gathered.
    Replay {
        headers: Release,
        /// Size and end_of_stream of the one body callback that covers all gathered bytes.
        body: Option<(usize, bool)>,
        /// Number of trailers.
        trailers: Option<usize>,
    },
}

/// One exchange.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) request: Side,
    pub(super) response: Side,
    /// Set when this is a TCP connection, which has no HTTP sides.
    pub(super) connection: Option<Connection>,
    pub(super) properties: BTreeMap<Vec<u8>, Vec<u8>>,
    /// When it began, by the guest's clock.
    pub(super) begun_ns: u64,
    /// Answers for what `properties` does not have.
    pub(super) lookup: Option<Lookup>,
    pub(super) filter_state: BTreeMap<String, Vec<u8>>,
    pub(super) filter_state_bytes: usize,
    /// The status of a local reply, known before its headers are.
    pub(super) reply_status: Option<u32>,
    /// Envoy's response code details.
    pub(super) code_details: Option<Cow<'static, str>>,
    /// The access-log callback is running: the maps are readable once more.
    pub(super) log_phase: bool,
}

impl Stream {
    pub(super) fn new(request_limit_bytes: usize, response_limit_bytes: usize) -> Self {
        Self {
            request: Side::new(request_limit_bytes, true),
            response: Side::new(response_limit_bytes, false),
            connection: None,
            properties: BTreeMap::new(),
            begun_ns: 0,
            lookup: None,
            filter_state: BTreeMap::new(),
            filter_state_bytes: 0,
            reply_status: None,
            code_details: None,
            log_phase: false,
        }
    }

    pub(super) fn side(&self, direction: Direction) -> &Side {
        match direction {
            Direction::Request => &self.request,
            Direction::Response => &self.response,
        }
    }

    pub(super) fn side_mut(&mut self, direction: Direction) -> &mut Side {
        match direction {
            Direction::Request => &mut self.request,
            Direction::Response => &mut self.response,
        }
    }

    /// The map as the guest may read it now.
    pub(super) fn readable_map(&self, kind: MapType) -> Option<&HeaderMap> {
        let open = |map: &'_ Option<HeaderMap>, open: bool| map.is_some() && open;
        match kind {
            MapType::RequestHeaders
                if self.log_phase || open(&self.request.headers, self.request.headers_open) =>
            {
                self.request.headers.as_ref()
            }
            MapType::ResponseHeaders
                if self.log_phase || open(&self.response.headers, self.response.headers_open) =>
            {
                self.response.headers.as_ref()
            }
            // Envoy hides the request trailers from the access log.
            MapType::RequestTrailers
                if !self.log_phase && open(&self.request.trailers, self.request.trailers_open) =>
            {
                self.request.trailers.as_ref()
            }
            MapType::ResponseTrailers
                if self.log_phase || open(&self.response.trailers, self.response.trailers_open) =>
            {
                self.response.trailers.as_ref()
            }
            _ => None,
        }
    }

    /// The map as the guest may write it now.
    pub(super) fn writable_map(&mut self, kind: MapType) -> Option<&mut HeaderMap> {
        match kind {
            MapType::RequestHeaders => {
                let open = self.request.headers_open;
                self.request.headers.as_mut().filter(|_| open)
            }
            MapType::ResponseHeaders => {
                let open = self.response.headers_open;
                self.response.headers.as_mut().filter(|_| open)
            }
            MapType::RequestTrailers => self.request.writable_trailers(),
            MapType::ResponseTrailers => self.response.writable_trailers(),
            _ => None,
        }
    }
}
