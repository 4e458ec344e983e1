//! What a content-type says about the form of a body.
//!
//! Servers and clients mislabel bodies, so only the form is taken from it: which parser reads the bytes, or why
//! none does. Cost: some comparisons.

use super::NotInspected;

/// The content-type's essence, without parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Media {
    Json,
    JsonLines,
    EventStream,
    Form,
    Text,
    Multipart,
    AmazonEventStream,
    Unknown,
}

impl Media {
    pub(super) fn of(content_type: Option<&[u8]>) -> Result<Self, NotInspected> {
        let essence = content_type.unwrap_or_default().split(|byte| *byte == b';').next();
        let essence = essence.unwrap_or_default().trim_ascii();
        let is = |name: &[u8]| essence.eq_ignore_ascii_case(name);
        let starts =
            |prefix: &[u8]| essence.get(..prefix.len()).is_some_and(|s| s.eq_ignore_ascii_case(prefix));
        let ends = |suffix: &[u8]| {
            let from = essence.len().checked_sub(suffix.len());
            from.and_then(|from| essence.get(from..)).is_some_and(|s| s.eq_ignore_ascii_case(suffix))
        };
        let any = |names: &[&[u8]]| names.iter().any(|name| is(name));
        Ok(
            if any(&[
                b"application/x-ndjson",
                b"application/ndjson",
                b"application/jsonl",
                b"application/stream+json",
            ]) {
                Self::JsonLines
            } else if is(b"application/json") || is(b"text/json") || ends(b"+json") {
                Self::Json
            } else if is(b"text/event-stream") {
                Self::EventStream
            } else if is(b"application/x-www-form-urlencoded") {
                Self::Form
            } else if starts(b"text/")
                || ends(b"+xml")
                || any(&[b"application/xml", b"application/javascript", b"application/graphql"])
                || any(&[b"application/yaml", b"application/x-yaml", b"application/toml", b"application/sql"])
            {
                Self::Text
            } else if is(b"application/vnd.amazon.eventstream") {
                Self::AmazonEventStream
            } else if starts(b"multipart/") {
                Self::Multipart
            } else if starts(b"application/grpc")
                || any(&[
                    b"application/protobuf",
                    b"application/x-protobuf",
                    b"application/vnd.google.protobuf",
                ])
            {
                return Err(NotInspected::Protobuf);
            } else if [&b"image/"[..], b"audio/", b"video/", b"font/", b"model/"].iter().any(|p| starts(p))
                || any(&[
                    b"application/octet-stream",
                    b"application/zip",
                    b"application/gzip",
                    b"application/pdf",
                ])
                || any(&[
                    b"application/wasm",
                    b"application/cbor",
                    b"application/msgpack",
                    b"application/x-tar",
                ])
            {
                return Err(NotInspected::Binary);
            } else {
                Self::Unknown
            },
        )
    }

    /// A text, of a form's part.
    pub(super) fn is_text(self) -> bool {
        !matches!(self, Self::Multipart | Self::AmazonEventStream)
    }
}
