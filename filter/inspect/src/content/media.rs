//! What a content-type says about the form of a body.
//!
//! Servers and clients mislabel bodies, so only the form is taken from it: which parser reads the bytes, or why
//! none does. Cost: a few dozen comparisons; a table, since code for each would be ten times its bytes.

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

/// How a name of the table is compared.
#[derive(Clone, Copy)]
enum By {
    Whole,
    Prefix,
    Suffix,
}

type Meaning = Result<Media, NotInspected>;

/// The first line that fits counts.
const NAMES: [(By, &[u8], Meaning); 37] = {
    use By::{Prefix, Suffix, Whole};
    const JSON: Meaning = Ok(Media::Json);
    const LINES: Meaning = Ok(Media::JsonLines);
    const TEXT: Meaning = Ok(Media::Text);
    const PROTOBUF: Meaning = Err(NotInspected::Protobuf);
    const BINARY: Meaning = Err(NotInspected::Binary);
    [
        (Whole, b"application/json", JSON),
        (Whole, b"text/event-stream", Ok(Media::EventStream)),
        (Whole, b"application/x-ndjson", LINES),
        (Whole, b"application/ndjson", LINES),
        (Whole, b"application/jsonl", LINES),
        (Whole, b"application/stream+json", LINES),
        (Whole, b"text/json", JSON),
        (Suffix, b"+json", JSON),
        (Whole, b"application/x-www-form-urlencoded", Ok(Media::Form)),
        (Prefix, b"text/", TEXT),
        (Suffix, b"+xml", TEXT),
        (Whole, b"application/xml", TEXT),
        (Whole, b"application/javascript", TEXT),
        (Whole, b"application/graphql", TEXT),
        (Whole, b"application/yaml", TEXT),
        (Whole, b"application/x-yaml", TEXT),
        (Whole, b"application/toml", TEXT),
        (Whole, b"application/sql", TEXT),
        (Whole, b"application/vnd.amazon.eventstream", Ok(Media::AmazonEventStream)),
        (Prefix, b"multipart/", Ok(Media::Multipart)),
        (Prefix, b"application/grpc", PROTOBUF),
        (Whole, b"application/protobuf", PROTOBUF),
        (Whole, b"application/x-protobuf", PROTOBUF),
        (Whole, b"application/vnd.google.protobuf", PROTOBUF),
        (Prefix, b"image/", BINARY),
        (Prefix, b"audio/", BINARY),
        (Prefix, b"video/", BINARY),
        (Prefix, b"font/", BINARY),
        (Prefix, b"model/", BINARY),
        (Whole, b"application/octet-stream", BINARY),
        (Whole, b"application/zip", BINARY),
        (Whole, b"application/gzip", BINARY),
        (Whole, b"application/pdf", BINARY),
        (Whole, b"application/wasm", BINARY),
        (Whole, b"application/cbor", BINARY),
        (Whole, b"application/msgpack", BINARY),
        (Whole, b"application/x-tar", BINARY),
    ]
};

impl Media {
    pub(super) fn of(content_type: Option<&[u8]>) -> Result<Self, NotInspected> {
        let essence = content_type.unwrap_or_default().split(|byte| *byte == b';').next();
        let essence = essence.unwrap_or_default().trim_ascii();
        let fits = |by: By, name: &[u8]| {
            let part = match by {
                By::Whole => Some(essence),
                By::Prefix => essence.get(..name.len()),
                By::Suffix => essence.len().checked_sub(name.len()).and_then(|from| essence.get(from..)),
            };
            part.is_some_and(|part| part.eq_ignore_ascii_case(name))
        };
        let known = NAMES.iter().find(|(by, name, _)| fits(*by, name));
        known.map_or(Ok(Self::Unknown), |(.., meaning)| *meaning)
    }

    /// A text, of a form's part.
    pub(super) fn is_text(self) -> bool {
        !matches!(self, Self::Multipart | Self::AmazonEventStream)
    }
}
