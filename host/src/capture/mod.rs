//! Captures: recorded HTTP exchanges, read one by one.
//!
//! What: [`Reader`] takes a file or a folder of files, finds each one's [`Format`] by its content, cuts
//! out one recording after the other and makes an [`Exchange`] of it. Plain, gzip and zstd alike.
//!
//! | format | a recording is | read by |
//! |---|---|---|
//! | the evaluation data's JSON Lines | a line with `id`, `label`, `kind`, `text`, `extra` | `rows` |
//! | Driftlock's own capture, JSON Lines | a line, see `capture.schema.json` | `own` |
//! | HAR 1.2 | an entry of `log.entries` | `har` |
//! | Envoy tap: JSON, length-delimited or plain protobuf | a buffered trace, or all segments of a streamed one | `tap` |
//! | access logs of Envoy, nginx, Apache; JSON logs | a line, as text | `access_log` |
//!
//! Why one room: whatever an operator brings has to end in the same exchange, or a verdict would depend
//! on the tool that recorded it.
//!
//! A recording that cannot be read is an error that names its line; those after it are still read. Every
//! recording comes out as an exchange or as an error, so the counts add up.
//!
//! Cost: one recording in memory at a time (a batch of them when several threads read), so memory is flat
//! in the capture's length. Left out on purpose: guessing at formats that say nothing of themselves.

mod access_log;
mod fingerprint;
mod har;
mod http1;
mod json_cut;
mod own;
mod protobuf;
mod read;
mod record;
mod recorder;
mod rows;
mod tap;
mod time;
mod write;

use std::io;
use std::path::PathBuf;

pub use fingerprint::{Fingerprint, Fingerprinter};
pub(crate) use http1::is_bare;
pub use http1::{Fields, RequestRef, ResponseRef};
pub use json_cut::CutError;
pub use read::{Batch, Exchanges, Format, InputFile, Item, Reader, exchanges};
pub use record::{Content, Record, Recorded};
pub use recorder::{Args, Counts, RecordError, Recorder, RecorderOptions, run};
pub use rows::{Kind, Row, Rows, open};
pub use write::{Packing, Redaction, SCHEMA, Writer, WriterOptions, write_recorded};

/// Header fields in order, names as captured.
pub type Headers = Vec<(String, String)>;

/// An HTTP request as captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRequest {
    /// Method token, e.g. `POST`.
    pub method: String,
    /// Request target as sent: path and query (RFC 9112 section 3.2.1).
    pub target: String,
    /// Header fields in order, names as captured.
    pub headers: Headers,
    /// Body with any transfer coding removed.
    pub body: Vec<u8>,
}

/// An HTTP response as captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpResponse {
    /// Status code, e.g. 200.
    pub status: u16,
    /// Header fields in order, names as captured.
    pub headers: Headers,
    /// Body with any transfer coding removed.
    pub body: Vec<u8>,
}

/// A request with the answer it got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// The recording's identity in its capture.
    pub id: String,
    /// `normal`, an attack family, a model's name, or `unlabelled`.
    pub label: String,
    /// What the client sent.
    pub request: HttpRequest,
    /// What the upstream answered, where it was recorded.
    pub response: Option<HttpResponse>,
}

/// First value of the header `name`, compared without case (RFC 9110 section 5.1).
pub fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
}

/// Where in its file a recording stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Begins on this line, from 1.
    Line(u64),
    /// The message of this number, from 1: binary files have no lines.
    Message(u64),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Message(number) => write!(f, "message {number}"),
        }
    }
}

/// Why a capture, or one of its recordings, could not be read.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The file itself.
    #[error("cannot read the capture {path}: {source}; check the path and its permissions")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Nothing says what the file is.
    #[error(
        "{path} is no capture that Driftlock reads: its beginning is neither HAR, nor an Envoy tap (JSON or \
         protobuf), nor JSON Lines of exchanges, nor an access log{hint}"
    )]
    UnknownFormat {
        /// Which file.
        path: PathBuf,
        /// What it looks like, if anything.
        hint: &'static str,
    },
    /// Reading stopped inside the file.
    #[error("the capture breaks off at {place}: {source}; the file may be cut short, copy it again")]
    Broken {
        /// Where.
        place: Place,
        /// What the system, the decompressor or the JSON text said.
        source: CutError,
    },
    /// A recording that is not of the expected shape.
    #[error("{place}: {source}; {expected}")]
    Row {
        /// Where.
        place: Place,
        /// What the parser said.
        source: serde_json::Error,
        /// What the format asks for.
        expected: &'static str,
    },
    /// A raw HTTP message that does not parse.
    #[error("{place}: the {what} is not an HTTP/1.1 message: {reason}")]
    Message {
        /// Where.
        place: Place,
        /// `request` or `response`.
        what: &'static str,
        /// What is missing or wrong.
        reason: &'static str,
    },
    /// A recording that says too little, or no HTTP at all.
    #[error("{place}: {reason}")]
    Unusable {
        /// Where.
        place: Place,
        /// What is missing, and what to do.
        reason: String,
    },
    /// One of several files.
    #[error("{name}: {source}")]
    InFile {
        /// The file's name.
        name: String,
        /// What is wrong there.
        source: Box<CaptureError>,
    },
}
