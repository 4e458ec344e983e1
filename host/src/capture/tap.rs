//! Envoy's HTTP tap: traces to exchanges.
//!
//! What: `envoy.data.tap.v3.TraceWrapper` messages, as JSON (bodies as bytes or as strings) or as
//! protobuf, length-delimited or one a file. A buffered trace is an exchange; the segments of a streamed
//! trace are put together by their trace id, at most [`MAX_OPEN`] traces at a time.
//!
//! Bodies that the tap cut (`truncated`) are not what was sent: such a trace is an error that says which
//! limit to raise, not a verdict about half a message. Socket taps hold no HTTP and are refused.
//!
//! Cost: one parse a trace. Left out on purpose: the text form of protobuf.

use std::collections::VecDeque;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::protobuf::{Damaged, Fields, Value};
use super::record::Recorded;
use super::{CaptureError, Exchange, Headers, HttpRequest, HttpResponse, Place, time};

/// Streamed traces under way at once; the oldest ends when there are more.
pub(super) const MAX_OPEN: usize = 256;

const EXPECTED: &str =
    "a trace of Envoy's tap is an object with http_buffered_trace or http_streamed_trace_segment";

/// One message of a trace.
#[derive(Debug, Default)]
struct Message {
    seen: bool,
    headers: Headers,
    body: Vec<u8>,
    truncated: bool,
    unix_ns: Option<u64>,
}

/// A trace, whole or growing.
#[derive(Debug)]
struct Trace {
    id: Option<u64>,
    place: Place,
    request: Message,
    response: Message,
}

/// What one `TraceWrapper` holds.
enum Wrapper {
    Buffered { request: Message, response: Message },
    Segment { id: u64, part: Part },
    Socket,
}

enum Part {
    Headers(bool, Headers),
    Body(bool, Body),
    /// Trailers, or nothing that is known.
    Other,
}

#[derive(Default)]
struct Body {
    bytes: Vec<u8>,
    truncated: bool,
}

/// Puts traces together.
#[derive(Debug, Default)]
pub(super) struct Traces {
    open: VecDeque<Trace>,
    finished: u64,
}

impl Traces {
    /// Takes one `TraceWrapper` in JSON; gives the exchange that is complete now, if one is.
    pub(super) fn json(&mut self, bytes: &[u8], place: Place) -> Option<Result<Recorded, CaptureError>> {
        match serde_json::from_slice::<WrapperJson>(bytes) {
            Ok(wrapper) => match wrapper.read() {
                Ok(wrapper) => self.take(wrapper, place),
                Err(reason) => Some(Err(CaptureError::Unusable { place, reason })),
            },
            Err(source) => Some(Err(CaptureError::Row { place, source, expected: EXPECTED })),
        }
    }

    /// The same for protobuf.
    pub(super) fn protobuf(&mut self, bytes: &[u8], place: Place) -> Option<Result<Recorded, CaptureError>> {
        match wrapper(bytes) {
            Ok(Some(wrapper)) => self.take(wrapper, place),
            Ok(None) => Some(Err(CaptureError::Unusable { place, reason: EXPECTED.to_owned() })),
            Err(error) => Some(Err(CaptureError::Unusable { place, reason: error.to_string() })),
        }
    }

    fn take(&mut self, wrapper: Wrapper, place: Place) -> Option<Result<Recorded, CaptureError>> {
        let (id, part) = match wrapper {
            Wrapper::Socket => {
                let reason = "a socket tap holds bytes, not HTTP; record with Envoy's HTTP tap filter";
                return Some(Err(CaptureError::Unusable { place, reason: reason.to_owned() }));
            }
            Wrapper::Buffered { request, response } => {
                self.finished += 1;
                return Some(Trace { id: None, place, request, response }.finish(self.finished));
            }
            Wrapper::Segment { id, part } => (id, part),
        };
        let mut done = None;
        if !self.open.iter().any(|trace| trace.id == Some(id)) {
            if self.open.len() >= MAX_OPEN {
                done = self.finish();
            }
            self.open.push_back(Trace {
                id: Some(id),
                place,
                request: Message::default(),
                response: Message::default(),
            });
        }
        if let Some(trace) = self.open.iter_mut().find(|trace| trace.id == Some(id)) {
            trace.add(part);
        }
        done
    }

    /// The oldest trace that is still open; none when there is none.
    pub(super) fn finish(&mut self) -> Option<Result<Recorded, CaptureError>> {
        let trace = self.open.pop_front()?;
        self.finished += 1;
        Some(trace.finish(self.finished))
    }
}

impl Trace {
    fn add(&mut self, part: Part) {
        match part {
            Part::Headers(response, headers) => {
                let message = if response { &mut self.response } else { &mut self.request };
                message.seen = true;
                message.headers = headers;
            }
            Part::Body(response, body) => {
                let message = if response { &mut self.response } else { &mut self.request };
                message.body.extend_from_slice(&body.bytes);
                message.truncated |= body.truncated;
            }
            Part::Other => {}
        }
    }

    fn finish(self, number: u64) -> Result<Recorded, CaptureError> {
        let place = self.place;
        let unusable = |reason: String| CaptureError::Unusable { place, reason };
        for (message, name, limit) in [
            (&self.request, "request", "max_buffered_rx_bytes"),
            (&self.response, "response", "max_buffered_tx_bytes"),
        ] {
            if message.truncated {
                return Err(unusable(format!(
                    "the tap cut the {name}'s body after {} bytes; raise {limit} in its output_config, or set \
                     streaming",
                    message.body.len()
                )));
            }
        }
        if !self.request.seen {
            return Err(unusable("the trace has no request headers".to_owned()));
        }
        let pseudo = |message: &Message, name: &str| super::header(&message.headers, name).map(str::to_owned);
        let method = pseudo(&self.request, ":method").unwrap_or_default();
        let target = pseudo(&self.request, ":path").unwrap_or_default();
        let response = match pseudo(&self.response, ":status") {
            None => None,
            Some(status) => {
                let status = status
                    .parse()
                    .map_err(|_| unusable(format!("the response's status {status:?} is none of HTTP's")))?;
                Some(HttpResponse {
                    status,
                    headers: fields(self.response.headers),
                    body: self.response.body,
                })
            }
        };
        let exchange = Exchange {
            id: number.to_string(),
            label: "unlabelled".to_owned(),
            request: HttpRequest {
                method,
                target,
                headers: fields(self.request.headers),
                body: self.request.body,
            },
            response: Some(response.unwrap_or(HttpResponse {
                status: 204,
                headers: Vec::new(),
                body: Vec::new(),
            })),
        };
        Ok(Recorded { place, unix_ns: self.request.unix_ns, exchange })
    }
}

fn fields(headers: Headers) -> Headers {
    let headers = headers.into_iter().filter_map(|(name, value)| match name.strip_prefix(':') {
        None => Some((name, value)),
        Some("authority") => Some(("host".to_owned(), value)),
        Some(_) => None,
    });
    headers.collect()
}

// ---- JSON. Envoy writes the proto's field names; camel case is protobuf's own habit.

#[derive(Deserialize)]
struct WrapperJson {
    #[serde(default, alias = "httpBufferedTrace")]
    http_buffered_trace: Option<BufferedJson>,
    #[serde(default, alias = "httpStreamedTraceSegment")]
    http_streamed_trace_segment: Option<SegmentJson>,
    #[serde(default, alias = "socketBufferedTrace", alias = "socketStreamedTraceSegment")]
    socket_buffered_trace: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    socket_streamed_trace_segment: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct BufferedJson {
    #[serde(default)]
    request: MessageJson,
    #[serde(default)]
    response: MessageJson,
}

#[derive(Default, Deserialize)]
struct MessageJson {
    #[serde(default)]
    headers: Vec<HeaderJson>,
    #[serde(default)]
    body: Option<BodyJson>,
    #[serde(default, alias = "headersReceivedTime")]
    headers_received_time: Option<String>,
}

#[derive(Deserialize)]
struct HeaderJson {
    key: String,
    #[serde(default)]
    value: String,
    #[serde(default, alias = "rawValue")]
    raw_value: Option<String>,
}

#[derive(Deserialize)]
struct BodyJson {
    #[serde(default, alias = "asBytes")]
    as_bytes: Option<String>,
    #[serde(default, alias = "asString")]
    as_string: Option<String>,
    #[serde(default)]
    truncated: bool,
}

#[derive(Deserialize)]
struct HeadersJson {
    #[serde(default)]
    headers: Vec<HeaderJson>,
}

#[derive(Deserialize)]
struct SegmentJson {
    /// Protobuf's JSON writes 64-bit numbers as strings.
    #[serde(default, alias = "traceId")]
    trace_id: serde_json::Value,
    #[serde(default, alias = "requestHeaders")]
    request_headers: Option<HeadersJson>,
    #[serde(default, alias = "requestBodyChunk")]
    request_body_chunk: Option<BodyJson>,
    #[serde(default, alias = "responseHeaders")]
    response_headers: Option<HeadersJson>,
    #[serde(default, alias = "responseBodyChunk")]
    response_body_chunk: Option<BodyJson>,
}

impl BodyJson {
    fn read(self) -> Result<Body, String> {
        let bytes = match (self.as_bytes, self.as_string) {
            (Some(base64), _) => STANDARD
                .decode(base64)
                .map_err(|error| format!("the body's as_bytes is not base64: {error}"))?,
            (None, text) => text.unwrap_or_default().into_bytes(),
        };
        Ok(Body { bytes, truncated: self.truncated })
    }
}

fn headers_json(headers: Vec<HeaderJson>) -> Headers {
    let value = |header: HeaderJson| {
        let raw = header.raw_value.and_then(|raw| STANDARD.decode(raw).ok());
        let value = match raw {
            Some(raw) if header.value.is_empty() => String::from_utf8_lossy(&raw).into_owned(),
            _ => header.value,
        };
        (header.key, value)
    };
    headers.into_iter().map(value).collect()
}

impl MessageJson {
    fn read(self) -> Result<Message, String> {
        let body = self.body.map(BodyJson::read).transpose()?.unwrap_or_default();
        Ok(Message {
            seen: !self.headers.is_empty(),
            headers: headers_json(self.headers),
            body: body.bytes,
            truncated: body.truncated,
            unix_ns: self.headers_received_time.as_deref().and_then(time::rfc3339),
        })
    }
}

impl WrapperJson {
    fn read(self) -> Result<Wrapper, String> {
        if let Some(trace) = self.http_buffered_trace {
            return Ok(Wrapper::Buffered {
                request: trace.request.read()?,
                response: trace.response.read()?,
            });
        }
        if self.socket_buffered_trace.is_some() || self.socket_streamed_trace_segment.is_some() {
            return Ok(Wrapper::Socket);
        }
        let segment = self.http_streamed_trace_segment.ok_or(EXPECTED)?;
        let id = match &segment.trace_id {
            serde_json::Value::String(text) => text.parse().unwrap_or_default(),
            other => other.as_u64().unwrap_or_default(),
        };
        let part = if let Some(headers) = segment.request_headers {
            Part::Headers(false, headers_json(headers.headers))
        } else if let Some(body) = segment.request_body_chunk {
            Part::Body(false, body.read()?)
        } else if let Some(headers) = segment.response_headers {
            Part::Headers(true, headers_json(headers.headers))
        } else if let Some(body) = segment.response_body_chunk {
            Part::Body(true, body.read()?)
        } else {
            Part::Other
        };
        Ok(Wrapper::Segment { id, part })
    }
}

// ---- protobuf: field numbers of envoy/data/tap/v3/{wrapper,http,common}.proto and
// envoy/config/core/v3/base.proto.

fn wrapper(bytes: &[u8]) -> Result<Option<Wrapper>, Damaged> {
    for field in Fields(bytes) {
        match field? {
            (1, Value::Bytes(trace)) => {
                let (mut request, mut response) = (Message::default(), Message::default());
                for field in Fields(trace) {
                    match field? {
                        (1, Value::Bytes(message)) => request = buffered(message)?,
                        (2, Value::Bytes(message)) => response = buffered(message)?,
                        _ => {}
                    }
                }
                return Ok(Some(Wrapper::Buffered { request, response }));
            }
            (2, Value::Bytes(segment)) => {
                let (mut id, mut part) = (0, Part::Other);
                for field in Fields(segment) {
                    match field? {
                        (1, Value::Number(number)) => id = number,
                        (2, Value::Bytes(map)) => part = Part::Headers(false, header_list(map)?),
                        (3, Value::Bytes(chunk)) => part = Part::Body(false, body(chunk)?),
                        (5, Value::Bytes(map)) => part = Part::Headers(true, header_list(map)?),
                        (6, Value::Bytes(chunk)) => part = Part::Body(true, body(chunk)?),
                        _ => {}
                    }
                }
                return Ok(Some(Wrapper::Segment { id, part }));
            }
            (3 | 4, _) => return Ok(Some(Wrapper::Socket)),
            _ => {}
        }
    }
    Ok(None)
}

/// `HttpBufferedTrace.Message`.
fn buffered(bytes: &[u8]) -> Result<Message, Damaged> {
    let mut message = Message { seen: true, ..Message::default() };
    for field in Fields(bytes) {
        match field? {
            (1, Value::Bytes(pair)) => message.headers.push(header(pair)?),
            (2, Value::Bytes(part)) => {
                let body = body(part)?;
                (message.body, message.truncated) = (body.bytes, body.truncated);
            }
            (4, Value::Bytes(stamp)) => message.unix_ns = timestamp(stamp)?,
            _ => {}
        }
    }
    Ok(message)
}

/// `google.protobuf.Timestamp`.
fn timestamp(bytes: &[u8]) -> Result<Option<u64>, Damaged> {
    let (mut seconds, mut nanos) = (0u64, 0u64);
    for field in Fields(bytes) {
        match field? {
            (1, Value::Number(number)) => seconds = number,
            (2, Value::Number(number)) => nanos = number,
            _ => {}
        }
    }
    Ok(seconds.checked_mul(1_000_000_000).and_then(|ns| ns.checked_add(nanos)))
}

/// `HeaderMap`.
fn header_list(bytes: &[u8]) -> Result<Headers, Damaged> {
    let mut headers = Headers::new();
    for field in Fields(bytes) {
        if let (1, Value::Bytes(pair)) = field? {
            headers.push(header(pair)?);
        }
    }
    Ok(headers)
}

/// `HeaderValue`: key, value, raw_value.
fn header(bytes: &[u8]) -> Result<(String, String), Damaged> {
    let (mut name, mut value) = (String::new(), String::new());
    for field in Fields(bytes) {
        match field? {
            (1, Value::Bytes(bytes)) => name = String::from_utf8_lossy(bytes).into_owned(),
            (2 | 3, Value::Bytes(bytes)) if value.is_empty() => {
                value = String::from_utf8_lossy(bytes).into_owned();
            }
            _ => {}
        }
    }
    Ok((name, value))
}

/// `Body`.
fn body(bytes: &[u8]) -> Result<Body, Damaged> {
    let mut body = Body::default();
    for field in Fields(bytes) {
        match field? {
            (1 | 2, Value::Bytes(bytes)) => body.bytes = bytes.to_owned(),
            (3, Value::Number(flag)) => body.truncated = flag != 0,
            _ => {}
        }
    }
    Ok(body)
}
