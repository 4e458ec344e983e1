//! Streamed answers: the documents of server-sent events and of AWS event-stream messages.
//!
//! The framing says where a document begins and ends; what it means is the document reader's. All that is no
//! document (event names, comments, headers) is envelope. Bedrock's invoke wraps each document as base64 in
//! another one (`{"bytes": "…"}`): it is unwrapped while it comes, and a text of it has the offset that it
//! would have if the decoded bytes stood where the base64 begins.
//!
//! Cost: the framing's search for its ends. Carried over: counts, at most `[DONE]`, three base64 digits.

use super::document::Reader;
use super::style::ApiStyle;
use super::{ContentError, Sink};
use crate::envelope::{ENVELOPE, Value};
use crate::frames::{self, FrameReader};
use crate::json::{Container, Handler, Scalar, Tokenizer};
use crate::sse::{self, EventReader};
use core::mem;

/// The data that ends a stream (OpenAI API reference, streaming).
const DONE: &[u8] = b"[DONE]";

/// What both framings have.
#[derive(Debug)]
struct Documents {
    reader: Reader,
    /// The event's data goes to the reader.
    open: bool,
    /// Start of the current text that is no document, in the held envelope.
    other_from: Option<usize>,
    error: Option<ContentError>,
}

impl Documents {
    fn new(style: ApiStyle) -> Self {
        Self { reader: Reader::by_event(style), open: false, other_from: None, error: None }
    }

    fn other(&mut self, piece: &[u8], body_offset: u64, sink: &mut impl Sink) {
        let envelope = &mut self.reader.document.envelope;
        self.other_from.get_or_insert(envelope.held());
        envelope.put(piece, body_offset, sink);
    }

    fn other_end(&mut self) {
        if let Some(start) = self.other_from.take() {
            let envelope = &mut self.reader.document.envelope;
            let end = envelope.held();
            envelope.value(Value { key: start, start, end });
        }
    }

    /// `cut_off`: by the end of the body.
    fn event_end(&mut self, body_offset: u64, cut_off: bool, sink: &mut impl Sink) {
        if mem::take(&mut self.open) {
            let result = self.reader.end_event(sink);
            if let Err(error) = result
                && self.error.is_none()
            {
                let open = error == ContentError::Truncated && !cut_off;
                self.error = Some(if open { ContentError::Malformed { offset: body_offset } } else { error });
            }
        }
        self.reader.document.envelope.end_event(sink);
    }
}

/// Documents in server-sent events.
#[derive(Debug)]
pub(super) struct Events {
    framing: EventReader,
    inner: EventDocuments,
}

#[derive(Debug)]
struct EventDocuments {
    documents: Documents,
    /// Bytes of [`DONE`] that the event's data began with, and where.
    done_len: usize,
    done_at: u64,
    at_input_end: bool,
}

impl Events {
    pub(super) fn new(style: ApiStyle) -> Self {
        let documents = Documents::new(style);
        let inner = EventDocuments { documents, done_len: 0, done_at: 0, at_input_end: false };
        Self { framing: EventReader::new(), inner }
    }

    pub(super) fn reader(&self) -> &Reader {
        &self.inner.documents.reader
    }

    pub(super) fn push(&mut self, chunk: &[u8], base: u64, sink: &mut impl Sink) {
        self.framing.push(chunk, base, &mut Lines { stream: &mut self.inner, sink });
    }

    pub(super) fn finish(&mut self, body_bytes: u64, sink: &mut impl Sink) -> Result<(), ContentError> {
        self.inner.at_input_end = true;
        self.framing.finish(body_bytes, &mut Lines { stream: &mut self.inner, sink });
        self.inner.documents.reader.end_units(sink);
        self.inner.documents.error.map_or(Ok(()), Err)
    }
}

struct Lines<'a, S: Sink> {
    stream: &'a mut EventDocuments,
    sink: &'a mut S,
}

impl<S: Sink> Lines<'_, S> {
    /// What began like [`DONE`] is a document after all.
    fn begin_document(&mut self) {
        let begun = DONE.get(..mem::take(&mut self.stream.done_len)).unwrap_or_default();
        self.stream.documents.open = true;
        self.stream.documents.reader.push(begun, self.stream.done_at, self.sink);
    }
}

impl<S: Sink> sse::Handler for Lines<'_, S> {
    fn data(&mut self, piece: &[u8], body_offset: u64) {
        if !self.stream.documents.open {
            let expected = DONE.get(self.stream.done_len..).unwrap_or_default();
            if self.stream.done_len == 0 {
                self.stream.done_at = body_offset;
            }
            let same = piece.iter().zip(expected).take_while(|(a, b)| a == b).count();
            if same == piece.len() {
                self.stream.done_len += same;
                return;
            }
            // All of the piece goes to the document, after what earlier pieces had in common with the marker.
            self.begin_document();
        }
        self.stream.documents.reader.push(piece, body_offset, self.sink);
    }

    fn other(&mut self, piece: &[u8], body_offset: u64) {
        self.stream.documents.other(piece, body_offset, self.sink);
    }

    fn other_end(&mut self) {
        self.stream.documents.other_end();
    }

    fn event_end(&mut self, body_offset: u64) {
        if self.stream.done_len == DONE.len() {
            self.stream.done_len = 0;
            let document = &mut self.stream.documents.reader.document;
            document.summary.terminated = true;
            document.end_open(self.sink);
            document.envelope.put(DONE, self.stream.done_at, self.sink);
        } else if self.stream.done_len > 0 {
            self.begin_document();
        }
        self.stream.documents.event_end(body_offset, self.stream.at_input_end, self.sink);
    }
}

/// Documents in AWS event-stream messages.
#[derive(Debug)]
pub(super) struct Frames {
    framing: FrameReader,
    inner: FrameDocuments,
}

#[derive(Debug)]
struct FrameDocuments {
    documents: Documents,
    /// The message's payload is a wrapper.
    wrapped: Option<Wrapper>,
    at_input_end: bool,
}

impl Frames {
    pub(super) fn new(style: ApiStyle) -> Self {
        let inner = FrameDocuments { documents: Documents::new(style), wrapped: None, at_input_end: false };
        Self { framing: FrameReader::new(), inner }
    }

    pub(super) fn reader(&self) -> &Reader {
        &self.inner.documents.reader
    }

    pub(super) fn push(&mut self, chunk: &[u8], base: u64, sink: &mut impl Sink) {
        let read = self.framing.push(chunk, base, &mut Messages { stream: &mut self.inner, sink });
        if self.framing.error().is_some() {
            // What follows is no message: seen all the same.
            let messages = &mut self.inner.documents;
            let at = base + read as u64;
            messages.reader.document.envelope.put(chunk.get(read..).unwrap_or_default(), at, sink);
        }
    }

    pub(super) fn finish(&mut self, body_bytes: u64, sink: &mut impl Sink) -> Result<(), ContentError> {
        self.inner.at_input_end = true;
        let framed = self.framing.finish(body_bytes, &mut Messages { stream: &mut self.inner, sink });
        self.inner.documents.reader.end_units(sink);
        self.inner.documents.error.map_or(framed, Err)
    }
}

struct Messages<'a, S: Sink> {
    stream: &'a mut FrameDocuments,
    sink: &'a mut S,
}

impl<S: Sink> frames::Handler for Messages<'_, S> {
    fn header_text(&mut self, piece: &[u8], body_offset: u64) {
        self.stream.documents.other(piece, body_offset, self.sink);
    }

    fn header(&mut self, name: &[u8], value: &[u8]) {
        self.stream.documents.other_end();
        match (name, value) {
            (b":event-type", b"chunk") => self.stream.wrapped = Some(Wrapper::new()),
            (b":message-type", b"exception" | b"error") => {
                self.stream.documents.reader.document.summary.provider_error = true;
            }
            _ => {}
        }
    }

    fn payload(&mut self, piece: &[u8], body_offset: u64) {
        let documents = &mut self.stream.documents;
        match &mut self.stream.wrapped {
            Some(wrapper) => wrapper.push(piece, body_offset, documents, self.sink),
            None => {
                documents.open = true;
                documents.reader.push(piece, body_offset, self.sink);
            }
        }
    }

    fn end(&mut self, body_offset: u64) {
        let documents = &mut self.stream.documents;
        documents.other_end();
        if let Some(mut wrapper) = self.stream.wrapped.take() {
            let result = wrapper.finish(documents, self.sink);
            documents.error = documents.error.or(result.err());
        }
        documents.event_end(body_offset, self.stream.at_input_end, self.sink);
    }
}

/// Reads `{"bytes": "<base64 of a document>"}`.
#[derive(Debug)]
struct Wrapper {
    tokenizer: Tokenizer,
    key: Key,
    inside: bool,
    /// Base64 digits not yet decoded: their bits, and how many.
    bits: u32,
    digits: u32,
    /// Where the next decoded byte is said to stand.
    next_at: Option<u64>,
    skipped: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Bytes,
    Padding,
    Other,
}

impl Wrapper {
    fn new() -> Self {
        Self {
            tokenizer: Tokenizer::new(false),
            key: Key::Other,
            inside: false,
            bits: 0,
            digits: 0,
            next_at: None,
            skipped: 0,
        }
    }

    fn push(&mut self, piece: &[u8], base: u64, documents: &mut Documents, sink: &mut impl Sink) {
        let mut tokenizer = mem::replace(&mut self.tokenizer, Tokenizer::new(false));
        let from = (!self.inside).then_some(0);
        let mut pass = Unwrap { wrapper: self, documents, sink, chunk: piece, base, from };
        let read = tokenizer.push(piece, base, &mut pass);
        pass.give(read);
        if tokenizer.error().is_some() {
            let rest = piece.get(read..).unwrap_or_default();
            documents.reader.document.envelope.put(rest, base + read as u64, sink);
        }
        self.tokenizer = tokenizer;
    }

    fn finish(&mut self, documents: &mut Documents, sink: &mut impl Sink) -> Result<(), ContentError> {
        if self.skipped > 0 {
            documents.reader.document.summary.skipped_bytes += self.skipped;
            sink.skipped(ENVELOPE, self.skipped);
        }
        self.tokenizer.finish(&mut ())
    }

    /// Decodes a run of base64 (RFC 4648 section 4) into the reader; other bytes are left out, as lenient
    /// decoders do.
    fn decode(&mut self, run: &[u8], body_offset: u64, documents: &mut Documents, sink: &mut impl Sink) {
        let mut decoded = [0u8; 48];
        for block in run.chunks(64) {
            let mut len = 0;
            for &byte in block {
                let Some(digit) = digit(byte) else { continue };
                self.bits = self.bits << 6 | digit;
                self.digits += 1;
                let whole = self.digits % 4;
                let shift = match whole {
                    2 => 4,
                    3 => 2,
                    0 => 0,
                    _ => continue,
                };
                if let Some(place) = decoded.get_mut(len) {
                    *place = (self.bits >> shift) as u8;
                    len += 1;
                }
            }
            let at = *self.next_at.get_or_insert(body_offset);
            if len > 0 {
                documents.open = true;
                documents.reader.push(decoded.get(..len).unwrap_or_default(), at, sink);
                self.next_at = Some(at + len as u64);
            }
        }
    }
}

fn digit(byte: u8) -> Option<u32> {
    Some(u32::from(match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' | b'-' => 62,
        b'/' | b'_' => 63,
        _ => return None,
    }))
}

/// One push: the wrapper with the piece it is reading.
struct Unwrap<'a, S: Sink> {
    wrapper: &'a mut Wrapper,
    documents: &'a mut Documents,
    sink: &'a mut S,
    chunk: &'a [u8],
    base: u64,
    /// First byte that the envelope has not got; `None` inside a string that is cut out.
    from: Option<usize>,
}

impl<S: Sink> Unwrap<'_, S> {
    fn give(&mut self, index: usize) {
        if let Some(from) = self.from {
            let bytes = self.chunk.get(from..index).unwrap_or_default();
            let envelope = &mut self.documents.reader.document.envelope;
            envelope.put(bytes, self.base + from as u64, self.sink);
            self.from = Some(index);
        }
    }
}

impl<S: Sink> Handler for Unwrap<'_, S> {
    fn begin(&mut self, _: Container, _: usize) {
        self.wrapper.key = Key::Other;
    }
    fn end(&mut self, _: Container, _: usize) {}
    fn key_begin(&mut self, _: usize) {}

    fn key(&mut self, key: Option<&[u8]>) {
        self.wrapper.key = match key {
            Some(b"bytes") => Key::Bytes,
            Some(b"p") => Key::Padding,
            _ => Key::Other,
        };
    }

    fn string_begin(&mut self, index: usize) -> bool {
        let cut = self.wrapper.key != Key::Other;
        if cut {
            self.give(index + 1);
            self.from = None;
        }
        self.wrapper.inside = cut;
        cut
    }

    fn text(&mut self, run: &[u8], index: usize) {
        let at = self.base + index as u64;
        match self.wrapper.key {
            Key::Bytes => self.wrapper.decode(run, at, self.documents, self.sink),
            // Padding is letters and digits; anything else is worth a look.
            Key::Padding | Key::Other => {
                let padding = run.iter().take_while(|byte| byte.is_ascii_alphanumeric()).count();
                self.wrapper.skipped += padding as u64;
                let rest = run.get(padding..).unwrap_or_default();
                self.documents.reader.document.envelope.put(rest, at + padding as u64, self.sink);
            }
        }
    }

    fn escape(&mut self, source: &[u8], decoded: &[u8], body_offset: u64) {
        match self.wrapper.key {
            Key::Bytes => self.wrapper.decode(decoded, body_offset, self.documents, self.sink),
            Key::Padding | Key::Other => {
                self.documents.reader.document.envelope.put(source, body_offset, self.sink);
            }
        }
    }

    fn string_end(&mut self, index: usize) {
        self.wrapper.inside = false;
        self.from = self.from.or(Some(index));
    }

    fn scalar_begin(&mut self, _: usize) {}
    fn scalar_end(&mut self, _: usize, _: Scalar) {}
}
