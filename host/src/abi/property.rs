//! Properties: what a guest can ask about its exchange, and the filter state it leaves behind.
//!
//! Values are bytes in Envoy's encoding: integers and times 8 bytes little-endian, booleans one
//! byte, text as it is. What follows from the messages (`request.path`, `response.headers.x`, ...)
//! is derived from the header maps as Envoy does, so it is only there while Envoy has it; all else
//! is what the caller put in. Source: Envoy "Attributes" and `filters/common/expr/context.cc`.

use std::sync::Arc;

use super::headers::HeaderMap;
use super::status::MapType;
use super::stream::Stream;

/// A property's value before it is put into bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PropertyValue {
    /// Text or bytes, as they are.
    Bytes(Vec<u8>),
    /// A signed integer (ports, codes, sizes).
    Int(i64),
    /// An unsigned integer (connection ids).
    Uint(u64),
    /// A boolean.
    Bool(bool),
    /// A moment, in nanoseconds since the Unix epoch.
    TimestampNs(i64),
    /// A span of time, in nanoseconds.
    DurationNs(i64),
}

impl PropertyValue {
    pub(super) fn into_bytes(self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Int(value) | Self::TimestampNs(value) | Self::DurationNs(value) => {
                value.to_le_bytes().to_vec()
            }
            Self::Uint(value) => value.to_le_bytes().to_vec(),
            Self::Bool(value) => vec![u8::from(value)],
        }
    }
}

/// Answers for properties by their NUL-separated paths, when the guest asks.
type Answer = dyn Fn(&[u8]) -> Option<PropertyValue> + Send + Sync;

/// See [`Plugin::properties_from`](super::Plugin::properties_from).
#[derive(Clone)]
pub(super) struct Lookup(pub(super) Arc<Answer>);

impl std::fmt::Debug for Lookup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lookup")
    }
}

impl From<&str> for PropertyValue {
    fn from(text: &str) -> Self {
        Self::Bytes(text.as_bytes().to_vec())
    }
}

impl From<i64> for PropertyValue {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<bool> for PropertyValue {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

/// The ABI's form of a path: its parts with a NUL between them.
pub(super) fn path_bytes(path: &[&str]) -> Vec<u8> {
    path.join("\0").into_bytes()
}

/// What an exchange says about itself under `path` (without the caller's properties).
pub(super) fn derived(stream: &Stream, path: &[u8]) -> Option<Vec<u8>> {
    let (top, rest) = split(path);
    match top {
        b"request" => request(stream, rest?),
        b"response" => response(stream, rest?),
        b"filter_state" => {
            let name = std::str::from_utf8(rest?).ok()?;
            stream.filter_state.get(name).cloned()
        }
        _ if rest.is_none() => {
            let name = std::str::from_utf8(top).ok()?;
            stream.filter_state.get(&format!("wasm.{name}")).cloned()
        }
        _ => None,
    }
}

fn split(path: &[u8]) -> (&[u8], Option<&[u8]>) {
    match memchr::memchr(0, path) {
        Some(at) => (&path[..at], path.get(at + 1..).filter(|rest| !rest.is_empty())),
        None => (path, None),
    }
}

/// A whole map: each name once, its values joined. One that is not there is an empty one.
fn all(map: Option<&HeaderMap>) -> Vec<u8> {
    let mut once = HeaderMap::new();
    for (name, _) in map.into_iter().flat_map(HeaderMap::iter) {
        if once.first(name).is_none()
            && let Some(value) = map.and_then(|map| map.joined(name))
        {
            once.add(name, &value);
        }
    }
    let mut out = Vec::new();
    once.encode(&mut out);
    if out.is_empty() { vec![0; 4] } else { out }
}

fn int(value: usize) -> Vec<u8> {
    i64::try_from(value).unwrap_or(i64::MAX).to_le_bytes().to_vec()
}

fn request(stream: &Stream, path: &[u8]) -> Option<Vec<u8>> {
    let (name, rest) = split(path);
    let headers = stream.readable_map(MapType::RequestHeaders);
    let received = usize::try_from(stream.request.received_bytes).unwrap_or(usize::MAX);
    let value = |header: &[u8]| headers?.first(header).map(<[u8]>::to_vec);
    match (name, rest) {
        (b"headers", Some(header)) => headers?.joined(header),
        (b"headers", None) => Some(all(headers)),
        (_, Some(_)) => None,
        (b"path", None) => value(b":path"),
        (b"url_path", None) => {
            let mut path = value(b":path")?;
            path.truncate(memchr::memchr(b'?', &path).unwrap_or(path.len()));
            Some(path)
        }
        (b"query", None) => {
            let path = value(b":path")?;
            let Some(at) = memchr::memchr(b'?', &path) else {
                return Some(Vec::new());
            };
            let query = path.get(at + 1..)?;
            Some(query.split(|b| *b == b'#').next()?.to_vec())
        }
        (b"host", None) => value(b":authority"),
        (b"scheme", None) => value(b":scheme"),
        (b"method", None) => value(b":method"),
        (b"referer", None) => value(b"referer"),
        (b"id", None) => value(b"x-request-id"),
        (b"useragent", None) => value(b"user-agent"),
        (b"headers_bytes", None) => Some(int(headers.map_or(0, HeaderMap::byte_size))),
        (b"size", None) => match headers.and_then(|map| map.first(b"content-length")) {
            Some(length) => std::str::from_utf8(length).ok()?.parse().ok().map(int),
            None => Some(int(received)),
        },
        (b"total_size", None) => Some(int(received.saturating_add(headers.map_or(0, HeaderMap::byte_size)))),
        _ => None,
    }
}

fn response(stream: &Stream, path: &[u8]) -> Option<Vec<u8>> {
    let (name, rest) = split(path);
    let headers = stream.readable_map(MapType::ResponseHeaders);
    let trailers = stream.readable_map(MapType::ResponseTrailers);
    let received = usize::try_from(stream.response.received_bytes).unwrap_or(usize::MAX);
    match (name, rest) {
        (b"headers", Some(header)) => headers?.joined(header),
        (b"trailers", Some(header)) => trailers?.joined(header),
        (b"headers", None) => Some(all(headers)),
        (b"trailers", None) => Some(all(trailers)),
        (_, Some(_)) => None,
        (b"code", None) => {
            let status = stream.response.headers.as_ref().and_then(|headers| headers.first(b":status"));
            match status {
                Some(status) => std::str::from_utf8(status).ok()?.parse().ok().map(int),
                None => stream.reply_status.map(|status| int(status as usize)),
            }
        }
        (b"headers_bytes", None) => Some(int(headers.map_or(0, HeaderMap::byte_size))),
        (b"code_details", None) => stream.code_details.as_ref().map(|details| details.as_bytes().to_vec()),
        (b"flags", None) => Some(int(0)),
        (b"size", None) => Some(int(received)),
        (b"total_size", None) => {
            let size = |map: Option<&HeaderMap>| map.map_or(0, HeaderMap::byte_size);
            Some(int(received.saturating_add(size(headers)).saturating_add(size(trailers))))
        }
        (b"grpc_status", None) => {
            let status = |map: Option<&HeaderMap>| map?.first(b"grpc-status").map(<[u8]>::to_vec);
            let status = status(trailers).or_else(|| status(headers))?;
            std::str::from_utf8(&status).ok()?.parse().ok().map(int)
        }
        _ => None,
    }
}
