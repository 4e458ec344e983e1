//! Driftlock's own capture format: JSON Lines, one exchange a line, after a line that says what it is.
//!
//! `capture.schema.json` is the schema (`driftlock capture --schema` prints it). Bodies are text where
//! they are UTF-8 and base64 where not, so that a capture can be read and searched with ordinary tools
//! and nothing is lost. Times are nanoseconds since the Unix epoch.
//!
//! Cost: one JSON parse a line.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::record::{Content, Record};
use super::rows::{Id, Text};
use super::{CaptureError, Headers, HttpRequest, HttpResponse, Place};

const EXPECTED: &str = "a line of a capture is one JSON object with id, request and response; `driftlock \
                        capture --schema` prints the schema";

/// The first line's key; its value is the format's version.
pub(super) const MAGIC: &str = "driftlock_capture";

/// The version this program writes and reads.
pub(super) const VERSION: u32 = 1;

/// One exchange, as written.
#[derive(Serialize)]
pub(super) struct LineOut<'a> {
    pub(super) id: &'a str,
    pub(super) label: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) unix_ns: Option<u64>,
    pub(super) request: RequestLine,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) response: Option<ResponseLine>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    #[serde(borrow)]
    id: Id<'a>,
    #[serde(borrow, default = "super::rows::unlabelled")]
    label: Text<'a>,
    #[serde(default)]
    unix_ns: Option<u64>,
    request: RequestLine,
    #[serde(default)]
    response: Option<ResponseLine>,
}

/// The request, as written and read.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RequestLine {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) headers: Headers,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) body: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) body_base64: Option<String>,
    /// Why there is no body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) body_left_out: Option<String>,
}

/// The response, as written and read.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ResponseLine {
    pub(super) status: u16,
    pub(super) headers: Headers,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) body: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) body_base64: Option<String>,
    /// Why there is no body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) body_left_out: Option<String>,
}

/// The body as it goes into a line: text, or base64, or neither where there is none.
pub(super) fn body_fields(body: Vec<u8>) -> (Option<String>, Option<String>) {
    match String::from_utf8(body) {
        Ok(text) => ((!text.is_empty()).then_some(text), None),
        Err(error) => (None, Some(STANDARD.encode(error.into_bytes()))),
    }
}

fn body(
    place: Place,
    text: Option<String>,
    base64: Option<String>,
    left_out: Option<String>,
) -> Result<Vec<u8>, CaptureError> {
    let unusable = |reason| CaptureError::Unusable { place, reason };
    if let Some(reason) = left_out {
        return Err(unusable(format!("a body was left out when this was recorded: {reason}")));
    }
    match (text, base64) {
        (Some(_), Some(_)) => Err(unusable("body and body_base64 are both there; leave one out".to_owned())),
        (text, None) => Ok(text.map(String::into_bytes).unwrap_or_default()),
        (None, Some(base64)) => STANDARD
            .decode(base64)
            .map_err(|error| unusable(format!("body_base64 is not base64 (RFC 4648 section 4): {error}"))),
    }
}

/// The version in a line that says what the file is; none for other lines.
pub(super) fn parse_first(bytes: &[u8]) -> Option<u32> {
    #[derive(Deserialize)]
    struct First {
        driftlock_capture: u32,
    }
    // Cheap for the other lines: the key comes first in what this program writes, and anywhere near the
    // beginning in what others may.
    memchr::memmem::find(bytes.get(..64).unwrap_or(bytes), MAGIC.as_bytes())?;
    serde_json::from_slice::<First>(bytes).ok().map(|first| first.driftlock_capture)
}

/// Reads one line.
pub(super) fn parse(bytes: &[u8], place: Place) -> Result<Record<'_>, CaptureError> {
    let line: Line<'_> = match serde_json::from_slice(bytes) {
        Ok(line) => line,
        Err(source) => {
            return Err(match parse_first(bytes) {
                Some(version) => CaptureError::Unusable {
                    place,
                    reason: format!(
                        "the capture is of version {version}, this program reads {VERSION}; use a newer driftlock"
                    ),
                },
                None => CaptureError::Row { place, source, expected: EXPECTED },
            });
        }
    };
    let request = HttpRequest {
        method: line.request.method,
        target: line.request.target,
        headers: line.request.headers,
        body: body(place, line.request.body, line.request.body_base64, line.request.body_left_out)?,
    };
    let response = match line.response {
        None => None,
        Some(response) => Some(HttpResponse {
            status: response.status,
            headers: response.headers,
            body: body(place, response.body, response.body_base64, response.body_left_out)?,
        }),
    };
    let id: Cow<'_, str> = line.id.0;
    Ok(Record {
        place,
        id,
        label: line.label.0,
        unix_ns: line.unix_ns,
        content: Content::Messages { request, response },
    })
}
