//! The evaluation data's rows: JSON Lines of `id`, `label`, `kind`, `text`, `extra`.
//!
//! For `http_exchange` and `http_request` the `text` is a raw HTTP/1.1 message (RFC 9112) and
//! `extra.response` the raw response; a `prompt`, `completion` or `log` row is the text itself. The
//! generator writes the same rows, with the time in `extra.unix_ns`.
//!
//! Cost: one JSON parse a row; text without escapes is not copied.

use std::borrow::Cow;
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

use super::record::{Content, Record};
use super::{CaptureError, Exchange, Place, read};

pub(super) const EXPECTED: &str = "a row is one JSON object with id, label, kind and text";

/// What a row's `text` holds.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
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

#[derive(Deserialize)]
struct RawRow<'a> {
    #[serde(borrow)]
    id: Id<'a>,
    #[serde(borrow, default = "unlabelled")]
    label: Text<'a>,
    kind: Kind,
    #[serde(borrow)]
    text: Text<'a>,
    #[serde(borrow, default)]
    extra: Extra<'a>,
}

#[derive(Default, Deserialize)]
struct Extra<'a> {
    #[serde(borrow, default)]
    response: Option<Text<'a>>,
    #[serde(default)]
    unix_ns: Option<u64>,
}

pub(super) fn unlabelled<'a>() -> Text<'a> {
    Text(Cow::Borrowed("unlabelled"))
}

/// A string, borrowed where it has no escapes. (serde's own `Cow` copies inside an `Option`.)
#[derive(Debug)]
pub(super) struct Text<'a>(pub(super) Cow<'a, str>);

struct TextVisitor {
    numbers: bool,
}

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.numbers { "a string or a number" } else { "a string" })
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.to_owned()))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
        match self.numbers {
            true => Ok(Cow::Owned(number.to_string())),
            false => Err(E::invalid_type(de::Unexpected::Unsigned(number), &self)),
        }
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
        match self.numbers {
            true => Ok(Cow::Owned(number.to_string())),
            false => Err(E::invalid_type(de::Unexpected::Signed(number), &self)),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(TextVisitor { numbers: false }).map(Self)
    }
}

/// An id: a string, or a number as text.
#[derive(Debug)]
pub(super) struct Id<'a>(pub(super) Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Id<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextVisitor { numbers: true }).map(Self)
    }
}

/// Reads one row.
pub(super) fn parse(bytes: &[u8], place: Place) -> Result<Record<'_>, CaptureError> {
    // One check of the whole costs less than one for each string; where it fails, serde_json says at which place.
    let row: Result<RawRow<'_>, _> = match str::from_utf8(bytes) {
        Ok(text) => serde_json::from_str(text),
        Err(_) => serde_json::from_slice(bytes),
    };
    let row = row.map_err(|source| CaptureError::Row { place, source, expected: EXPECTED })?;
    Ok(Record {
        place,
        id: row.id.0,
        label: row.label.0,
        unix_ns: row.extra.unix_ns,
        content: Content::Text {
            kind: row.kind,
            text: row.text.0,
            response: row.extra.response.map(|text| text.0),
        },
    })
}

/// One row, with its text as it stands, for who scores texts and not exchanges.
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

impl Row {
    /// The row as an exchange, see [`Record::messages`].
    ///
    /// # Errors
    /// [`CaptureError::Message`] where a raw exchange or its response does not parse.
    pub fn into_exchange(self) -> Result<Exchange, CaptureError> {
        let record = Record {
            place: Place::Line(self.line),
            id: Cow::Owned(self.id),
            label: Cow::Owned(self.label),
            unix_ns: None,
            content: Content::Text {
                kind: self.kind,
                text: Cow::Owned(self.text),
                response: self.response.map(Cow::Owned),
            },
        };
        Ok(record.into_recorded()?.exchange)
    }
}

/// Opens a file of rows, plain, gzip or zstd. For other formats see [`super::Reader`].
///
/// # Errors
/// [`CaptureError::File`] if the file cannot be opened or its first bytes cannot be read.
pub fn open(path: &Path) -> Result<Rows, CaptureError> {
    let source = read::decompressed(path)?;
    Ok(Rows { lines: BufReader::with_capacity(1 << 18, source), line: 0, buffer: Vec::new(), done: false })
}

/// Rows of a file, in order. Blank lines are skipped.
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
                Ok(_) => return Some(self.row()),
                Err(source) => {
                    self.done = true;
                    let place = Place::Line(self.line);
                    return Some(Err(CaptureError::Broken { place, source: source.into() }));
                }
            }
        }
        None
    }
}

impl Rows {
    fn row(&self) -> Result<Row, CaptureError> {
        let record = parse(&self.buffer, Place::Line(self.line))?;
        let Content::Text { kind, text, response } = record.content else {
            unreachable!("rows hold text");
        };
        Ok(Row {
            line: self.line,
            id: record.id.into_owned(),
            label: record.label.into_owned(),
            kind,
            text: text.into_owned(),
            response: response.map(Cow::into_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::header;
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
