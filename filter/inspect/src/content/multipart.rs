//! Multipart bodies (RFC 2046 section 5.1, RFC 7578): form fields, text files, and what is only counted.
//!
//! A part is a field if it has no file name, else a file. Fields and files of a text or JSON type are units of
//! their own; of all others the first `SAMPLE_BYTES` are envelope and the rest is counted, as with media inside
//! JSON. The parts' headers are envelope; delimiters are counted, since they hold nothing but the boundary that
//! the content-type names. A part inside a part is not looked into: its bytes are those of its file.
//!
//! Cost: one search for carriage returns. Carried over: a position in the delimiter, one header line (cut after
//! `MAX_LINE_BYTES`).

use super::media::Media;
use super::{ContentError, Role, Sink, Unit};
use crate::envelope::ENVELOPE;
use alloc::vec::Vec;

/// What is kept of a header's line to look at it.
const MAX_LINE_BYTES: usize = 512;
/// Bytes of a part that is not text which are given.
const SAMPLE_BYTES: u64 = 48;
/// Longest boundary (RFC 2046 section 5.1.1 says 70).
const MAX_BOUNDARY_BYTES: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first delimiter.
    Preamble,
    /// After a delimiter: `--` and the end, or a line end and headers.
    Delimited {
        dashes: u8,
    },
    Headers,
    Body,
    Epilogue,
}

/// Where the current part's bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Unit(Unit),
    /// Counted, after so many bytes that were given.
    Counted {
        given: u64,
    },
}

/// Reads one multipart body.
#[derive(Debug)]
pub(super) struct Multipart {
    /// `\r\n--` and the boundary.
    delimiter: Vec<u8>,
    /// How many of its bytes were just read, and how many of these were given already (the line end of the
    /// headers) or never stood there (at the very beginning).
    matched: usize,
    borrowed: usize,
    state: State,
    part: Part,
    line: Vec<u8>,
    line_empty: bool,
    has_file_name: bool,
    text: bool,
    given: bool,
    enveloped: bool,
    fields: u16,
    files: u16,
    pub(super) skipped_bytes: u64,
    pub(super) media: u32,
}

impl Multipart {
    /// From a content-type with a usable boundary.
    pub(super) fn new(content_type: &[u8]) -> Option<Self> {
        let boundary = parameter(content_type, b"boundary")?;
        if boundary.is_empty() || boundary.len() > MAX_BOUNDARY_BYTES || boundary.contains(&b'\r') {
            return None;
        }
        Some(Self {
            delimiter: [b"\r\n--", boundary].concat(),
            // The first delimiter may stand at the very beginning.
            matched: 2,
            borrowed: 2,
            state: State::Preamble,
            part: Part::Counted { given: 0 },
            line: Vec::new(),
            line_empty: true,
            has_file_name: false,
            text: false,
            given: false,
            enveloped: false,
            fields: 0,
            files: 0,
            skipped_bytes: 0,
            media: 0,
        })
    }

    pub(super) fn push(&mut self, chunk: &[u8], base: u64, sink: &mut impl Sink) {
        let mut index = 0;
        while let Some(rest) = chunk.get(index..).filter(|rest| !rest.is_empty()) {
            let at = base + index as u64;
            index += match self.state {
                State::Preamble | State::Body => self.until_delimiter(rest, at, sink),
                State::Delimited { dashes } => self.delimited(dashes, rest, at, sink),
                State::Headers => self.headers(rest, at, sink),
                State::Epilogue => {
                    self.envelope(rest, at, sink);
                    rest.len()
                }
            };
        }
    }

    /// Ends the body.
    pub(super) fn finish(&mut self, body_bytes: u64, sink: &mut impl Sink) -> Result<(), ContentError> {
        if matches!(self.state, State::Preamble | State::Body) {
            self.mismatch(body_bytes, sink);
            self.end_part(sink);
        }
        if self.enveloped {
            sink.end(ENVELOPE);
        }
        let closed = matches!(self.state, State::Epilogue | State::Delimited { dashes: 2 });
        if closed { Ok(()) } else { Err(ContentError::Truncated) }
    }

    fn envelope(&mut self, bytes: &[u8], at: u64, sink: &mut impl Sink) {
        if !bytes.is_empty() {
            self.enveloped = true;
            sink.text(ENVELOPE, bytes, at);
        }
    }

    fn skip(&mut self, bytes: u64, sink: &mut impl Sink) {
        self.skipped_bytes += bytes;
        sink.skipped(ENVELOPE, bytes);
    }

    /// Reads some of a part (or of what stands before the first); returns how many bytes.
    fn until_delimiter(&mut self, rest: &[u8], at: u64, sink: &mut impl Sink) -> usize {
        if self.matched == 0 {
            let plain = memchr::memchr(b'\r', rest).unwrap_or(rest.len());
            self.give(rest.get(..plain).unwrap_or_default(), at, sink);
            self.matched = usize::from(plain < rest.len());
            self.borrowed = 0;
            return plain + self.matched;
        }
        let expected = self.delimiter.get(self.matched..).unwrap_or_default();
        let same = expected.iter().zip(rest).take_while(|(a, b)| a == b).count();
        self.matched += same;
        if self.matched == self.delimiter.len() {
            let read = self.matched - self.borrowed;
            self.matched = 0;
            self.end_part(sink);
            self.skip(read as u64, sink);
            self.state = State::Delimited { dashes: 0 };
        } else if same < rest.len() {
            self.mismatch(at + same as u64, sink);
        }
        same
    }

    /// What was taken for the delimiter is not; it ends before `at`.
    fn mismatch(&mut self, at: u64, sink: &mut impl Sink) {
        let matched = core::mem::take(&mut self.matched);
        let delimiter = core::mem::take(&mut self.delimiter);
        let bytes = delimiter.get(self.borrowed..matched).unwrap_or_default();
        self.give(bytes, at - bytes.len() as u64, sink);
        self.delimiter = delimiter;
    }

    /// The next bytes of the part.
    fn give(&mut self, bytes: &[u8], at: u64, sink: &mut impl Sink) {
        if bytes.is_empty() {
            return;
        }
        if self.state == State::Preamble {
            return self.envelope(bytes, at, sink);
        }
        match self.part {
            Part::Unit(unit) => {
                self.given = true;
                sink.text(unit, bytes, at);
            }
            Part::Counted { given } => {
                let room = usize::try_from(SAMPLE_BYTES - given).unwrap_or(0);
                let (sample, rest) = bytes.split_at_checked(room).unwrap_or((bytes, &[]));
                self.part = Part::Counted { given: given + sample.len() as u64 };
                self.envelope(sample, at, sink);
                if !rest.is_empty() {
                    self.skip(rest.len() as u64, sink);
                    self.given = true;
                }
            }
        }
    }

    fn end_part(&mut self, sink: &mut impl Sink) {
        if core::mem::take(&mut self.given) {
            match self.part {
                Part::Unit(unit) => sink.end(unit),
                Part::Counted { .. } => self.media += 1,
            }
        }
    }

    /// The bytes after a delimiter: blanks, `--`, or a line end.
    fn delimited(&mut self, dashes: u8, rest: &[u8], at: u64, sink: &mut impl Sink) -> usize {
        let Some(&byte) = rest.first() else { return 0 };
        match (byte, dashes) {
            (b'-', 0 | 1) => self.state = State::Delimited { dashes: dashes + 1 },
            (b'\n', 0) => {
                self.state = State::Headers;
                (self.has_file_name, self.text, self.line_empty) = (false, true, true);
                self.line.clear();
            }
            (_, 2) => {
                self.state = State::Epilogue;
                return 0;
            }
            (b'\r' | b' ' | b'\t', 0) => {}
            // No delimiter's end: what follows is read as headers, so it is seen.
            _ => {
                self.state = State::Headers;
                (self.has_file_name, self.text, self.line_empty) = (false, true, true);
                self.line.clear();
                return 0;
            }
        }
        self.envelope(&[byte], at, sink);
        1
    }

    fn headers(&mut self, rest: &[u8], at: u64, sink: &mut impl Sink) -> usize {
        let end = memchr::memchr(b'\n', rest);
        let read = end.map_or(rest.len(), |end| end + 1);
        let piece = rest.get(..read).unwrap_or_default();
        self.envelope(piece, at, sink);
        let room = MAX_LINE_BYTES.saturating_sub(self.line.len()).min(piece.len());
        self.line.extend_from_slice(piece.get(..room).unwrap_or_default());
        self.line_empty &= piece.iter().all(|byte| matches!(byte, b'\r' | b'\n'));
        if end.is_some() {
            if self.line_empty {
                self.begin_part();
            } else {
                self.header();
            }
            self.line.clear();
            self.line_empty = true;
        }
        read
    }

    /// One header line is complete.
    fn header(&mut self) {
        let line = self.line.trim_ascii();
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { return };
        let (name, value) = line.split_at_checked(colon).unwrap_or_default();
        let value = value.get(1..).unwrap_or_default().trim_ascii();
        if name.eq_ignore_ascii_case(b"content-disposition") {
            self.has_file_name =
                parameter(value, b"filename").is_some() || parameter(value, b"filename*").is_some();
        } else if name.eq_ignore_ascii_case(b"content-type") {
            self.text = Media::of(Some(value)).is_ok_and(Media::is_text);
        }
    }

    fn begin_part(&mut self) {
        let next = |count: &mut u16| {
            let index = *count;
            *count = count.saturating_add(1);
            index
        };
        self.part = match (self.text, self.has_file_name) {
            (true, true) => Part::Unit(Unit { role: Role::File, index: next(&mut self.files) }),
            (true, false) => Part::Unit(Unit { role: Role::Field, index: next(&mut self.fields) }),
            (false, _) => Part::Counted { given: 0 },
        };
        self.state = State::Body;
        // A part may be empty: then its delimiter's line end is the one that ended its headers.
        (self.matched, self.borrowed) = (2, 2);
        self.given = false;
    }
}

/// The value of a header's parameter (RFC 9110 section 5.6.6), without its quotes.
fn parameter<'a>(value: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    value.split(|byte| *byte == b';').skip(1).find_map(|parameter| {
        let parameter = parameter.trim_ascii();
        let equals = parameter.iter().position(|byte| *byte == b'=')?;
        let (key, rest) = parameter.split_at_checked(equals)?;
        let rest = rest.get(1..)?.trim_ascii();
        let plain = rest.strip_prefix(b"\"").map(|rest| rest.strip_suffix(b"\"").unwrap_or(rest));
        key.trim_ascii().eq_ignore_ascii_case(name).then(|| plain.unwrap_or(rest))
    })
}
