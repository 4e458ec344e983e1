//! Captures: recorded HTTP exchanges, read row by row.
//!
//! A capture is JSON Lines, plain or gzip (found by content, not by name), in the shape of the
//! evaluation data: `id`, `label`, `kind`, `text` and `extra`. For `http_exchange` and
//! `http_request` the `text` is a raw HTTP/1.1 message (RFC 9112) and `extra.response` the raw
//! response; a `prompt`, `completion` or `log` row is the text itself and becomes the body of a
//! plain exchange, so that every kind can be replayed by every path.
//!
//! Rows are decoded one at a time, so memory is flat in the capture's length. A bad row is an error
//! with its line number and the rows after it are still read. HAR, Envoy tap and access logs are
//! left out here on purpose: each is a reader of its own that yields the same [`Row`].

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use serde::Deserialize;

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
    /// The row's identity in its capture.
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

/// One row of a capture, before it is made an exchange.
#[derive(Clone, Debug)]
pub struct Row {
    /// 1-based line in the file.
    pub line: u64,
    /// The row's `id`, as text.
    pub id: String,
    /// The row's `label`.
    pub label: String,
    /// What `text` holds.
    pub kind: Kind,
    /// The text itself.
    pub text: String,
    /// `extra.response`, where there is one.
    pub response: Option<String>,
}

/// What a row's `text` holds.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A raw request.
    HttpRequest,
    /// A raw request, with the raw response in `extra.response`.
    HttpExchange,
    /// A prompt's text.
    Prompt,
    /// A completion's text.
    Completion,
    /// A log line.
    Log,
}

/// Why a capture, or one of its rows, could not be read.
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
    /// Reading stopped inside the file.
    #[error("the capture breaks off at line {line}: {source}; the file may be cut short, copy it again")]
    Broken {
        /// 1-based line.
        line: u64,
        /// What the system or the decompressor said.
        source: io::Error,
    },
    /// A row that is not an object of the expected shape.
    #[error("line {line}: {source}; a row is one JSON object with id, label, kind and text")]
    Row {
        /// 1-based line.
        line: u64,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A raw HTTP message that does not parse.
    #[error("line {line}: the {what} is not an HTTP/1.1 message: {reason}")]
    Message {
        /// 1-based line.
        line: u64,
        /// `request` or `response`.
        what: &'static str,
        /// What is missing or wrong.
        reason: &'static str,
    },
}

#[derive(Deserialize)]
struct RawRow {
    id: serde_json::Value,
    #[serde(default = "unlabelled")]
    label: String,
    kind: Kind,
    text: String,
    #[serde(default)]
    extra: Extra,
}

#[derive(Default, Deserialize)]
struct Extra {
    #[serde(default)]
    response: Option<String>,
}

fn unlabelled() -> String {
    "unlabelled".to_owned()
}

/// Opens a capture; plain or gzip is told by the first two bytes (RFC 1952 section 2.3.1).
///
/// # Errors
/// [`CaptureError::File`] if the file cannot be opened or its first bytes cannot be read.
pub fn open(path: &Path) -> Result<Rows, CaptureError> {
    let file_error = |source| CaptureError::File { path: path.to_owned(), source };
    let mut reader = BufReader::with_capacity(1 << 18, File::open(path).map_err(file_error)?);
    let gzip = reader.fill_buf().map_err(file_error)?.starts_with(&[0x1f, 0x8b]);
    let source: Box<dyn Read + Send> =
        if gzip { Box::new(MultiGzDecoder::new(reader)) } else { Box::new(reader) };
    Ok(Rows { lines: BufReader::with_capacity(1 << 18, source), line: 0, buffer: Vec::new(), done: false })
}

/// Rows of a capture, in order. Blank lines are skipped.
pub struct Rows {
    lines: BufReader<Box<dyn Read + Send>>,
    line: u64,
    buffer: Vec<u8>,
    done: bool,
}

impl Iterator for Rows {
    type Item = Result<Row, CaptureError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.done {
            self.buffer.clear();
            self.line += 1;
            match self.lines.read_until(b'\n', &mut self.buffer) {
                Ok(0) => self.done = true,
                Ok(_) if self.buffer.trim_ascii().is_empty() => {}
                Ok(_) => return Some(parse_row(&self.buffer, self.line)),
                Err(source) => {
                    self.done = true;
                    return Some(Err(CaptureError::Broken { line: self.line, source }));
                }
            }
        }
        None
    }
}

fn parse_row(bytes: &[u8], line: u64) -> Result<Row, CaptureError> {
    let raw: RawRow = serde_json::from_slice(bytes).map_err(|source| CaptureError::Row { line, source })?;
    let id = match raw.id {
        serde_json::Value::String(id) => id,
        other => other.to_string(),
    };
    Ok(Row { line, id, label: raw.label, kind: raw.kind, text: raw.text, response: raw.extra.response })
}

impl Row {
    /// The row as an exchange.
    ///
    /// A prompt becomes the text body of a POST, a completion or a log line that of the answer. An
    /// `http_request` whose text is not a request (a bare parameter value) becomes a text body too.
    ///
    /// # Errors
    /// [`CaptureError::Message`] where a raw exchange or its response does not parse.
    pub fn into_exchange(self) -> Result<Exchange, CaptureError> {
        let text =
            |body: String| (vec![("content-type".to_owned(), "text/plain".to_owned())], body.into_bytes());
        let empty = |status| HttpResponse { status, headers: Vec::new(), body: Vec::new() };
        let post = |target: &str, text: (Vec<(String, String)>, Vec<u8>)| HttpRequest {
            method: "POST".to_owned(),
            target: target.to_owned(),
            headers: text.0,
            body: text.1,
        };
        let message = |what| move |reason| CaptureError::Message { line: self.line, what, reason };
        let (request, response) = match self.kind {
            Kind::Prompt => (post("/prompt", text(self.text)), empty(204)),
            Kind::Completion | Kind::Log => {
                let (headers, body) = text(self.text);
                (post("/completion", (Vec::new(), Vec::new())), HttpResponse { status: 200, headers, body })
            }
            Kind::HttpRequest => match parse_request(&self.text) {
                Ok(request) => (request, empty(204)),
                Err(_) => (post("/value", text(self.text)), empty(204)),
            },
            Kind::HttpExchange => {
                let request = parse_request(&self.text).map_err(message("request"))?;
                let response = match self.response {
                    Some(raw) => parse_response(&raw).map_err(message("response"))?,
                    None => empty(204),
                };
                (request, response)
            }
        };
        Ok(Exchange { id: self.id, label: self.label, request, response: Some(response) })
    }
}

fn parse_request(raw: &str) -> Result<HttpRequest, &'static str> {
    let (start, headers, body) = split_message(raw)?;
    let (method, rest) = start.split_once(' ').ok_or("the request line has no target")?;
    // A target with raw spaces (an attack, often) ends at the last space before the version.
    let (target, version) = rest.rsplit_once(' ').ok_or("the request line has no version")?;
    if !version.starts_with("HTTP/") {
        return Err("the request line does not end in a version");
    }
    if method.is_empty() || !method.bytes().all(|b| b.is_ascii_alphabetic() || b == b'-' || b == b'_') {
        return Err("the method is not a token");
    }
    Ok(HttpRequest {
        method: method.to_owned(),
        target: target.to_owned(),
        headers,
        body: body.as_bytes().to_vec(),
    })
}

fn parse_response(raw: &str) -> Result<HttpResponse, &'static str> {
    let (start, headers, body) = split_message(raw)?;
    let mut parts = start.splitn(3, ' ');
    if !parts.next().unwrap_or_default().starts_with("HTTP/") {
        return Err("the status line does not start with a version");
    }
    let status: u16 =
        parts.next().and_then(|s| s.parse().ok()).ok_or("the status line has no three-digit status")?;
    if !(100..=599).contains(&status) {
        return Err("the status is not between 100 and 599");
    }
    Ok(HttpResponse { status, headers, body: body.as_bytes().to_vec() })
}

/// Start line, header fields and body of a raw message. Recordings hold bodies with the transfer
/// coding already removed, so `content-length` and `transfer-encoding` say nothing here.
fn split_message(raw: &str) -> Result<(&str, Headers, &str), &'static str> {
    let (head, body) = match raw.split_once("\r\n\r\n") {
        Some(parts) => parts,
        None => (raw.strip_suffix("\r\n").unwrap_or(raw), ""),
    };
    let mut lines = head.split("\r\n");
    let start = lines.next().unwrap_or_default();
    let mut headers = Vec::new();
    for line in lines {
        let (name, value) = line.split_once(':').ok_or("a header line has no colon")?;
        headers.push((name.trim().to_owned(), value.trim().to_owned()));
    }
    Ok((start, headers, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const EXCHANGE: &str = r#"{"id": 7, "label": "normal", "kind": "http_exchange", "text": "POST /v1/x?a=b c HTTP/1.1\r\nHost: h\r\nX-A: 1:2\r\n\r\n{\"a\": 1}", "extra": {"response": "HTTP/1.1 200 \r\nContent-Type: application/json\r\n\r\n{}\r\n\r\nmore"}}"#;

    fn rows_of(bytes: &[u8]) -> Vec<Result<Row, CaptureError>> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        open(file.path()).unwrap().collect()
    }

    #[test]
    fn an_exchange_keeps_target_headers_and_both_bodies() {
        let rows = rows_of(EXCHANGE.as_bytes());
        let exchange = rows.into_iter().next().unwrap().unwrap().into_exchange().unwrap();
        assert_eq!(exchange.id, "7");
        assert_eq!(exchange.request.target, "/v1/x?a=b c");
        assert_eq!(header(&exchange.request.headers, "x-a"), Some("1:2"));
        assert_eq!(exchange.request.body, b"{\"a\": 1}");
        let response = exchange.response.unwrap();
        assert_eq!((response.status, response.body.as_slice()), (200, b"{}\r\n\r\nmore".as_slice()));
    }

    #[test]
    fn a_bad_row_is_reported_by_line_and_the_rest_goes_on() {
        let text = format!("{EXCHANGE}\n\n{{\"id\": 1}}\n{EXCHANGE}\n");
        let rows = rows_of(text.as_bytes());
        assert_eq!(rows.len(), 3);
        let message = rows[1].as_ref().unwrap_err().to_string();
        assert!(message.starts_with("line 3: missing field `kind`"), "{message}");
        assert!(rows[2].is_ok());
    }

    #[test]
    fn gzip_is_told_by_content_and_a_cut_file_is_an_error() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(format!("{EXCHANGE}\n").repeat(50).as_bytes()).unwrap();
        let whole = encoder.finish().unwrap();
        assert_eq!(rows_of(&whole).iter().filter(|r| r.is_ok()).count(), 50);
        let cut = rows_of(&whole[..whole.len() / 2]);
        assert!(matches!(cut.last().unwrap(), Err(CaptureError::Broken { .. } | CaptureError::Row { .. })));
    }

    #[test]
    fn texts_that_are_no_request_become_bodies() {
        let rows = rows_of(
            b"{\"id\": 1, \"kind\": \"http_request\", \"text\": \"' or 1=1 --\"}\n{\"id\": 2, \"kind\": \"log\", \"text\": \"a b\"}",
        );
        let exchanges: Vec<_> = rows.into_iter().map(|r| r.unwrap().into_exchange().unwrap()).collect();
        assert_eq!(exchanges[0].request.body, b"' or 1=1 --");
        assert_eq!(exchanges[1].response.as_ref().unwrap().body, b"a b");
        assert_eq!(exchanges[1].label, "unlabelled");
    }

    #[test]
    fn a_broken_exchange_names_the_part() {
        let rows =
            rows_of(br#"{"id": 1, "kind": "http_exchange", "text": "GET / HTTP/1.1\r\nnocolon\r\n\r\n"}"#);
        let error = rows.into_iter().next().unwrap().unwrap().into_exchange().unwrap_err().to_string();
        assert_eq!(error, "line 1: the request is not an HTTP/1.1 message: a header line has no colon");
    }
}
