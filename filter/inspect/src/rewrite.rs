//! A body rewritten in flight: secrets taken out, and streams cut only between their parts.
//!
//! What: a [`Rewriter`] takes a body in pieces and gives back what may go on, with each token of the chosen
//! classes replaced by `[REDACTED:class]`. JSON stays JSON: tokens are found in the decoded strings and
//! replaced in their source, a number that is a token becomes a string. In a stream (server-sent events,
//! NDJSON) the pieces of one text are read as one, so a key that comes in five deltas is found: the first
//! delta gets the marker, the others lose their share. Without classes it only keeps a stream's parts whole,
//! so that a stream that is blocked ends between two of them.
//!
//! Why a walk of its own, beside the parsers that feed the detector: those may hold text back (until its role
//! is known), and what is to be changed must be known before it passes. This one needs no schema.
//!
//! Bounds: what is held is the text that could still be a token (a word, at most 256 bytes, or a token's own
//! length) and what follows it, in a stream from the beginning of its event; [`MAX_HELD_BYTES`] in all. Beyond
//! that the open texts are taken for complete. [`MAX_TEXTS`] texts of a stream are followed at a time.
//! Cost: one tokenizer pass and one scan, only where a rule asks for it. The last word of each event waits for
//! the next event.
//!
//! Left out on purpose: object keys, AWS event streams (their frames are kept whole, their contents not
//! changed), and JSON inside strings, where a number is replaced without becoming a string. Two texts of a
//! stream are told apart by their path and by an `index` that comes before the text.

use alloc::collections::VecDeque;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::mem;

use driftlock_engine::normalise::{ClassSet, Piece, Redactor, redact};

use crate::json::{Container, Handler, Scalar, Tokenizer};
use crate::sse::{self, EventReader};

/// Most bytes held back.
pub(crate) const MAX_HELD_BYTES: usize = 64 << 10;
/// Most texts of a stream that are followed at a time.
pub(crate) const MAX_TEXTS: usize = 16;
/// Fewer digits than this are no token of any class.
const LEAST_NUMBER: u64 = 100_000;

/// How a body is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// One JSON document, or JSON or text by the first byte.
    Document,
    /// A JSON array whose elements are the parts of one answer (Gemini without `alt=sse`).
    Array,
    /// A JSON document a line.
    Lines,
    /// Server-sent events.
    Events,
    /// `application/vnd.amazon.eventstream`.
    AmazonEvents,
    /// Text.
    Text,
}

impl Format {
    /// Whether classes are looked for in it; else its parts are kept whole and that is all.
    pub(crate) fn is_redacted(self) -> bool {
        self != Self::AmazonEvents
    }

    /// Whether it is a stream whose parts are kept whole.
    pub(crate) fn is_stream(self) -> bool {
        matches!(self, Self::Lines | Self::Events | Self::AmazonEvents)
    }
}

/// Rewrites one body.
#[derive(Debug)]
pub(crate) struct Rewriter {
    format: Format,
    reader: Reader,
    walk: Walk,
    /// Bytes not given out, the first of which stands at `start` in the body.
    held: Vec<u8>,
    start: u64,
    read: u64,
    /// End of the last part that is complete and decided.
    whole: u64,
    torn: bool,
}

#[derive(Debug)]
enum Reader {
    /// Nothing but blanks so far.
    Blank,
    Json(Tokenizer),
    Events(EventReader, Event),
    /// Bytes of the frame's length, and how many bytes of the frame are still to come.
    Frames {
        length: [u8; 4],
        seen: usize,
        left: u64,
    },
    Text,
}

/// What an event's data is.
#[derive(Debug)]
enum Event {
    Blank,
    Json(Tokenizer),
    Text,
}

/// Replace these bytes of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edit {
    start: u64,
    end: u64,
    text: &'static str,
    /// In quotes, since it stands where a number stood.
    quoted: bool,
}

/// Where undecided text came from.
#[derive(Clone, Copy, Debug)]
struct Segment {
    text_len: u64,
    body: u64,
    source: Source,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// As long in the body.
    Plain,
    /// An escape of so many bytes.
    Escape(u64),
    /// A line end between two lines of data: stays.
    Framing,
}

/// A text that is being read.
#[derive(Debug)]
struct Text {
    /// Where it stands in a document; texts of a stream go on in the next part.
    path: u64,
    redactor: Redactor,
    segments: VecDeque<Segment>,
    /// Parts of the stream that came without a piece of it.
    idle: u32,
}

#[derive(Debug)]
struct Walk {
    classes: Option<ClassSet>,
    parts: Parts,
    /// Where the piece stands that the tokenizer reads.
    base: u64,
    stack: Vec<u64>,
    slot: u64,
    /// What the key of the next value means.
    key: Key,
    texts: Vec<Text>,
    current: Option<usize>,
    scalar_at: Option<u64>,
    edits: Vec<Edit>,
    tokens: u64,
    /// Ends of complete parts.
    boundaries: VecDeque<u64>,
}

/// What the parts of a stream are; texts go on from one to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parts {
    None,
    Documents,
    Elements,
    Events,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Other,
    /// Its text goes on in the next part of a stream.
    Delta,
    /// Tells texts apart.
    Index,
}

/// Keys under which streams send texts in pieces, over all APIs.
fn key_of(name: &[u8]) -> Key {
    match name {
        b"index" | b"output_index" | b"content_index" => Key::Index,
        b"content" | b"text" | b"delta" | b"arguments" | b"partial_json" | b"thinking" | b"reasoning"
        | b"reasoning_content" | b"refusal" | b"response" | b"transcript" | b"input" | b"output"
        | b"summary" | b"outputText" | b"generation" | b"completion" | b"value" => Key::Delta,
        _ => Key::Other,
    }
}

fn hash(seed: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(seed ^ 0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// Of texts that no document has: an event's data that is no JSON, a line that is not data, a text body.
const PLAIN_PATH: u64 = u64::MAX;
/// Of strings that are complete when they end.
const STRING_PATH: u64 = u64::MAX - 1;

impl Rewriter {
    /// With classes, redacts; without, only keeps the parts of a stream whole.
    pub(crate) fn new(format: Format, classes: Option<ClassSet>) -> Self {
        let reader = match format {
            Format::Document | Format::Array => Reader::Blank,
            Format::Lines => Reader::Json(Tokenizer::new(true)),
            Format::Events => Reader::Events(EventReader::new(), Event::Blank),
            Format::AmazonEvents => Reader::Frames { length: [0; 4], seen: 0, left: 0 },
            Format::Text => Reader::Text,
        };
        let walk = Walk {
            classes: classes.filter(|_| format.is_redacted()),
            parts: match format {
                Format::Lines => Parts::Documents,
                Format::Events => Parts::Events,
                Format::Array => Parts::Elements,
                Format::Document | Format::AmazonEvents | Format::Text => Parts::None,
            },
            base: 0,
            stack: Vec::new(),
            slot: 0,
            key: Key::Other,
            texts: Vec::new(),
            current: None,
            scalar_at: None,
            edits: Vec::new(),
            tokens: 0,
            boundaries: VecDeque::new(),
        };
        Self { format, reader, walk, held: Vec::new(), start: 0, read: 0, whole: 0, torn: false }
    }

    /// Tokens replaced so far.
    pub(crate) fn tokens(&self) -> u64 {
        self.walk.tokens
    }

    #[cfg(test)]
    fn held_bytes(&self) -> usize {
        self.held.len()
    }

    /// A part of the stream has gone on without its end, for it was too long to be held.
    pub(crate) fn torn(&self) -> bool {
        self.torn
    }

    /// Takes the next bytes and appends to `out` what may go on.
    pub(crate) fn push(&mut self, chunk: &[u8], out: &mut Vec<u8>) {
        self.held.extend_from_slice(chunk);
        self.feed(chunk);
        self.read += chunk.len() as u64;
        if self.walk.texts.len() > MAX_TEXTS {
            self.walk.finish_texts();
        }
        let mut safe = self.safe();
        if (self.read - safe) as usize > MAX_HELD_BYTES {
            self.walk.finish_texts();
            safe = self.safe();
            if (self.read - safe) as usize > MAX_HELD_BYTES {
                safe = self.floor();
                self.torn = self.format.is_stream();
            }
        } else if safe > self.start {
            self.torn = false;
        }
        self.release(safe, out);
    }

    /// The body is complete: appends the rest.
    pub(crate) fn finish(&mut self, out: &mut Vec<u8>) {
        let end = self.read;
        self.walk.base = end;
        match &mut self.reader {
            Reader::Json(tokenizer) => {
                // What the grammar says of the end is the parser's to tell.
                let _ = tokenizer.finish(&mut self.walk);
            }
            Reader::Events(reader, event) => {
                reader.finish(end, &mut Lines { walk: &mut self.walk, event });
            }
            _ => {}
        }
        self.walk.finish_texts();
        self.release(end, out);
    }

    fn feed(&mut self, chunk: &[u8]) {
        let mut chunk = chunk;
        let mut base = self.read;
        if let Reader::Blank = self.reader {
            let blank = chunk.iter().take_while(|b| b.is_ascii_whitespace()).count();
            chunk = chunk.get(blank..).unwrap_or_default();
            base += blank as u64;
            match chunk.first() {
                None => return,
                Some(b'{' | b'[' | b'"') => self.reader = Reader::Json(Tokenizer::new(true)),
                Some(_) => self.reader = Reader::Text,
            }
        }
        match &mut self.reader {
            Reader::Json(tokenizer) => {
                let read = self.walk.tokenize(tokenizer, chunk, base);
                if read < chunk.len() {
                    // Not JSON from here on: nothing can be kept valid, but nothing may slip by either.
                    self.walk.broken();
                    self.reader = Reader::Text;
                    self.walk.plain(chunk.get(read..).unwrap_or_default(), base + read as u64, false);
                }
            }
            Reader::Events(reader, event) => {
                reader.push(chunk, base, &mut Lines { walk: &mut self.walk, event });
            }
            Reader::Frames { length, seen, left } => {
                for (i, &byte) in chunk.iter().enumerate() {
                    if let Some(place) = length.get_mut(*seen) {
                        *place = byte;
                        *seen += 1;
                        *left = u64::from(u32::from_be_bytes(*length)).saturating_sub(4);
                    } else {
                        *left = left.saturating_sub(1);
                    }
                    if *seen == 4 && *left == 0 {
                        *seen = 0;
                        self.walk.boundaries.push_back(base + i as u64 + 1);
                    }
                }
            }
            Reader::Text => self.walk.plain(chunk, base, false),
            Reader::Blank => {}
        }
    }

    /// Up to where nothing can change any more.
    fn floor(&self) -> u64 {
        let texts = self.walk.texts.iter().filter_map(|text| text.segments.front()).map(|front| front.body);
        let tokenizer = match &self.reader {
            Reader::Json(tokenizer) | Reader::Events(_, Event::Json(tokenizer)) => Some(tokenizer),
            _ => None,
        };
        let escape = tokenizer.map(Tokenizer::pending_escape).filter(|(bytes, _)| !bytes.is_empty());
        texts.chain(self.walk.scalar_at).chain(escape.map(|(_, at)| at)).fold(self.read, u64::min)
    }

    /// Up to where bytes may go on.
    fn safe(&mut self) -> u64 {
        let floor = self.floor();
        let whole_parts = self.format.is_stream() && !matches!(self.reader, Reader::Text);
        if !whole_parts {
            return floor;
        }
        while let Some(&boundary) = self.walk.boundaries.front().filter(|&&boundary| boundary <= floor) {
            self.whole = boundary;
            self.walk.boundaries.pop_front();
        }
        let mut safe = self.start.max(self.whole);
        // Line ends behind a part belong to it.
        if self.format != Format::AmazonEvents {
            let behind = self.held.get((safe - self.start) as usize..).unwrap_or_default();
            let ends = behind.iter().take_while(|b| matches!(b, b'\n' | b'\r')).count() as u64;
            safe = (safe + ends).min(floor).max(safe);
        }
        safe
    }

    fn release(&mut self, to: u64, out: &mut Vec<u8>) {
        let slice = |held: &[u8], from: u64, to: u64, start: u64, out: &mut Vec<u8>| {
            let range = (from - start) as usize..(to.max(from) - start) as usize;
            out.extend_from_slice(held.get(range).unwrap_or_default());
        };
        let mut at = self.start;
        let edits = self.walk.edits.iter().take_while(|edit| edit.start < to).count();
        for edit in self.walk.edits.drain(..edits) {
            // One that begins in what has gone on is applied to the rest.
            slice(&self.held, at, edit.start.max(at), self.start, out);
            if edit.quoted {
                out.push(b'"');
            }
            out.extend_from_slice(edit.text.as_bytes());
            if edit.quoted {
                out.push(b'"');
            }
            at = at.max(edit.end);
        }
        slice(&self.held, at, to, self.start, out);
        let end = at.max(to);
        self.held.drain(..((end - self.start) as usize).min(self.held.len()));
        self.start = end;
    }
}

impl Walk {
    fn tokenize(&mut self, tokenizer: &mut Tokenizer, piece: &[u8], base: u64) -> usize {
        self.base = base;
        tokenizer.push(piece, base, self)
    }

    /// Text without a grammar. `framing`: it stays, whatever it is part of.
    fn plain(&mut self, piece: &[u8], at: u64, framing: bool) {
        if piece.is_empty() || self.classes.is_none() {
            return;
        }
        let text = self.open(PLAIN_PATH);
        self.add(text, piece, at, if framing { Source::Framing } else { Source::Plain });
    }

    fn end_text(&mut self, path: u64) {
        if let Some(at) = self.texts.iter().position(|text| text.path == path) {
            self.finish_text(at);
        }
    }

    /// The document is no JSON from here on.
    fn broken(&mut self) {
        self.current = None;
        self.scalar_at = None;
        self.stack.clear();
        self.finish_texts();
    }

    fn open(&mut self, path: u64) -> usize {
        if let Some(at) = self.texts.iter().position(|text| text.path == path) {
            return at;
        }
        let redactor = Redactor::new(self.classes.unwrap_or(ClassSet::NONE));
        self.texts.push(Text { path, redactor, segments: VecDeque::new(), idle: 0 });
        self.texts.len() - 1
    }

    fn add(&mut self, at: usize, piece: &[u8], body: u64, source: Source) {
        let Some(text) = self.texts.get_mut(at) else { return };
        text.idle = 0;
        let text_len = piece.len() as u64;
        match text.segments.back_mut() {
            Some(last)
                if source == Source::Plain
                    && last.source == Source::Plain
                    && last.body + last.text_len == body =>
            {
                last.text_len += text_len;
            }
            _ => text.segments.push_back(Segment { text_len, body, source }),
        }
        let Text { redactor, segments, .. } = text;
        let (edits, tokens) = (&mut self.edits, &mut self.tokens);
        redactor.push(piece, body, &mut |piece| decide(piece, segments, edits, tokens));
    }

    fn finish_text(&mut self, at: usize) {
        if at >= self.texts.len() {
            return;
        }
        let Text { redactor, mut segments, .. } = self.texts.swap_remove(at);
        let (edits, tokens) = (&mut self.edits, &mut self.tokens);
        redactor.finish(&mut |piece| decide(piece, &mut segments, edits, tokens));
        // Places have moved.
        self.current = None;
    }

    fn finish_texts(&mut self) {
        // The string being read goes on as a new text.
        let reading = self.current.and_then(|at| self.texts.get(at)).map(|text| text.path);
        while !self.texts.is_empty() {
            self.finish_text(self.texts.len() - 1);
        }
        self.current = reading.map(|path| self.open(path));
    }

    /// A part of a stream is complete.
    fn end_part(&mut self) {
        // Texts that alternate miss each other's parts; one alone misses none until it is complete.
        let patience = 4 * (self.texts.len() as u32).saturating_sub(1);
        let mut at = 0;
        while let Some(text) = self.texts.get_mut(at) {
            text.idle += 1;
            if text.idle > patience + 1 {
                self.finish_text(at);
            } else {
                at += 1;
            }
        }
    }

    /// A document of several is complete, `index` bytes into the piece.
    fn boundary(&mut self, index: usize) {
        self.end_part();
        self.boundaries.push_back(self.base + index as u64);
    }

    /// A string, number or literal is complete, and with it the document, where it is no more than that.
    fn end_scalar(&mut self, index: usize) {
        if self.parts == Parts::Documents && self.stack.is_empty() {
            self.boundary(index);
        }
    }

    fn parent(&self) -> u64 {
        self.stack.last().copied().unwrap_or_default()
    }
}

/// Text is decided: what is a token is replaced.
fn decide(piece: Piece<'_>, segments: &mut VecDeque<Segment>, edits: &mut Vec<Edit>, tokens: &mut u64) {
    let marker = piece.class.map(|class| class.redaction());
    *tokens += u64::from(marker.is_some());
    let mut left = piece.source_len;
    let mut edit: Option<Edit> = None;
    let mut first = true;
    while let Some(front) = segments.front_mut().filter(|_| left > 0) {
        let taken = left.min(front.text_len);
        let range = match front.source {
            Source::Plain => Some((front.body, front.body + taken)),
            Source::Escape(len) if taken == front.text_len => Some((front.body, front.body + len)),
            Source::Escape(_) | Source::Framing => None,
        };
        if front.source == Source::Plain {
            front.body += taken;
        }
        front.text_len -= taken;
        left -= taken;
        if front.text_len == 0 {
            segments.pop_front();
        }
        let (Some(marker), Some((start, end))) = (marker, range) else { continue };
        match &mut edit {
            Some(edit) if edit.end == start => edit.end = end,
            _ => {
                let text = if mem::take(&mut first) { marker } else { "" };
                put(edits, edit.replace(Edit { start, end, text, quoted: false }));
            }
        }
    }
    put(edits, edit);
}

/// Keeps edits in their order.
fn put(edits: &mut Vec<Edit>, edit: Option<Edit>) {
    if let Some(edit) = edit {
        let at = edits.partition_point(|known| known.start < edit.start);
        edits.insert(at, edit);
    }
}

impl Handler for Walk {
    fn begin(&mut self, container: Container, _: usize) {
        if container == Container::Array {
            self.slot = hash(self.slot, b"[]");
        }
        self.stack.push(self.slot);
    }

    fn end(&mut self, _: Container, index: usize) {
        self.stack.pop();
        (self.slot, self.key) = (self.parent(), Key::Other);
        match (self.parts, self.stack.len()) {
            (Parts::Documents, 0) => self.boundary(index + 1),
            (Parts::Elements, 1) => self.end_part(),
            _ => {}
        }
    }

    fn key_begin(&mut self, _: usize) {}

    fn key(&mut self, key: Option<&[u8]>) {
        self.slot = hash(self.parent(), key.unwrap_or(b"\0long"));
        self.key = key.map_or(Key::Other, key_of);
    }

    fn string_begin(&mut self, _: usize) -> bool {
        if self.classes.is_none() {
            return false;
        }
        let goes_on = self.parts != Parts::None && self.key == Key::Delta;
        let path = if goes_on { self.slot } else { STRING_PATH };
        if let Some(at) = self.texts.iter().position(|text| text.path == path && text.idle == 0) {
            // Two strings of one part are two texts.
            self.finish_text(at);
        }
        self.current = Some(self.open(path));
        true
    }

    fn text(&mut self, run: &[u8], index: usize) {
        if let Some(text) = self.current {
            self.add(text, run, self.base + index as u64, Source::Plain);
        }
    }

    fn escape(&mut self, source: &[u8], decoded: &[u8], body_offset: u64) {
        if let Some(text) = self.current {
            self.add(text, decoded, body_offset, Source::Escape(source.len() as u64));
        }
    }

    fn string_end(&mut self, index: usize) {
        self.current = None;
        self.end_text(STRING_PATH);
        self.end_scalar(index + 1);
    }

    fn scalar_begin(&mut self, index: usize) {
        self.scalar_at = Some(self.base + index as u64);
    }

    fn scalar_end(&mut self, index: usize, scalar: Scalar) {
        let start = self.scalar_at.take();
        self.end_scalar(index);
        let (Some(start), Scalar::Unsigned(value)) = (start, scalar) else { return };
        if self.key == Key::Index
            && let Some(place) = self.stack.last_mut()
        {
            *place = hash(*place, &value.to_le_bytes());
        }
        let Some(classes) = self.classes.filter(|_| value >= LEAST_NUMBER) else { return };
        let redacted = redact(&value.to_string(), classes);
        let class = driftlock_engine::normalise::Class::ALL
            .into_iter()
            .find(|class| class.redaction() == redacted.text);
        if let Some(class) = class {
            let end = self.base + index as u64;
            self.tokens += 1;
            put(&mut self.edits, Some(Edit { start, end, text: class.redaction(), quoted: true }));
        }
    }
}

/// The lines of server-sent events.
struct Lines<'a> {
    walk: &'a mut Walk,
    event: &'a mut Event,
}

impl sse::Handler for Lines<'_> {
    fn data(&mut self, piece: &[u8], body_offset: u64) {
        let (mut piece, mut at) = (piece, body_offset);
        if let Event::Blank = self.event {
            let blank = piece.iter().take_while(|b| b.is_ascii_whitespace()).count();
            piece = piece.get(blank..).unwrap_or_default();
            at += blank as u64;
            *self.event = match piece.first() {
                None => return,
                Some(b'{' | b'[' | b'"') => Event::Json(Tokenizer::new(false)),
                Some(_) => {
                    // A stream's last word, or one of plain text.
                    self.walk.finish_texts();
                    Event::Text
                }
            };
        }
        if let Event::Json(tokenizer) = self.event {
            let read = self.walk.tokenize(tokenizer, piece, at);
            if read == piece.len() {
                return;
            }
            self.walk.broken();
            *self.event = Event::Text;
            piece = piece.get(read..).unwrap_or_default();
            at += read as u64;
        }
        // Data never holds a line end of its own.
        self.walk.plain(piece, at, piece == b"\n");
    }

    fn other(&mut self, piece: &[u8], body_offset: u64) {
        self.walk.plain(piece, body_offset, false);
    }

    fn other_end(&mut self) {
        self.walk.end_text(PLAIN_PATH);
    }

    fn event_end(&mut self, body_offset: u64) {
        let walk = &mut *self.walk;
        walk.end_text(PLAIN_PATH);
        walk.end_text(STRING_PATH);
        (walk.current, walk.scalar_at, walk.slot, walk.key) = (None, None, 0, Key::Other);
        walk.stack.clear();
        if !matches!(mem::replace(self.event, Event::Blank), Event::Blank) {
            walk.end_part();
        }
        walk.boundaries.push_back(body_offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::format;

    const KEY: &str = "sk-proj-abcDEF0123456789abcDEF0123456789";

    /// The output for pieces of these sizes, over and over, and the number of tokens.
    fn rewritten(format: Format, body: &[u8], sizes: &[usize]) -> (Vec<u8>, u64) {
        let mut rewriter = Rewriter::new(format, Some(ClassSet::REDACTED));
        let (mut out, mut at, mut turn) = (Vec::new(), 0, 0);
        while at < body.len() {
            let size = sizes[turn % sizes.len()].clamp(1, body.len() - at);
            rewriter.push(&body[at..at + size], &mut out);
            assert!(rewriter.held_bytes() <= MAX_HELD_BYTES + size);
            (at, turn) = (at + size, turn + 1);
        }
        rewriter.finish(&mut out);
        (out, rewriter.tokens())
    }

    fn whole(format: Format, body: &str) -> String {
        String::from_utf8(rewritten(format, body.as_bytes(), &[usize::MAX]).0).unwrap()
    }

    #[test]
    fn a_secret_in_a_string_is_replaced_and_nothing_else_changes() {
        let body = format!(
            "{{ \"a\" : \"x\\u0041 {KEY} y\\n\",\"mail\":\"joe\\u0040example.com\",\"n\":[1,\"{KEY}\"], \"e\": -1.5e3 }}"
        );
        assert_eq!(
            whole(Format::Document, &body),
            "{ \"a\" : \"x\\u0041 [REDACTED:api_key] y\\n\",\"mail\":\"[REDACTED:email]\",\"n\":[1,\"[REDACTED:api_key]\"], \"e\": -1.5e3 }"
        );
    }

    #[test]
    fn a_card_that_is_a_number_becomes_a_string() {
        let body = r#"{"card":4111111111111111,"n":4111111111111112,"x":[4111111111111111]}"#;
        assert_eq!(
            whole(Format::Document, body),
            r#"{"card":"[REDACTED:card]","n":4111111111111112,"x":["[REDACTED:card]"]}"#
        );
    }

    fn event(text: &str) -> String {
        let delta = json!({"id": "c-1", "choices": [{"index": 0, "delta": {"content": text}}]});
        format!("data: {delta}\n\n")
    }

    #[test]
    fn a_secret_in_several_deltas_is_found_and_every_event_stays_json() {
        let deltas = ["Use ", "sk-", "proj-abcDEF01", "23456789abcDEF", "0123456789", " for", " it."];
        let body: String = deltas.iter().map(|text| event(text)).collect::<String>() + "data: [DONE]\n\n";
        let out = whole(Format::Events, &body);
        let texts: Vec<String> = out
            .lines()
            .filter_map(|line| line.strip_prefix("data: {").map(|rest| format!("{{{rest}")))
            .map(|data| serde_json::from_str::<Value>(&data).unwrap())
            .map(|value| value["choices"][0]["delta"]["content"].as_str().unwrap().into())
            .collect();
        assert_eq!(texts, ["Use ", "[REDACTED:api_key]", "", "", "", " for", " it."]);
        assert!(out.ends_with("data: [DONE]\n\n"));
    }

    #[test]
    fn lines_and_arrays_are_streams_too() {
        let lines: String = ["sk-proj-abcDEF01", "23456789abcDEF0123456789", " end"]
            .iter()
            .map(|text| json!({"model": "m", "message": {"content": text}, "done": false}).to_string() + "\n")
            .collect();
        let out = whole(Format::Lines, &lines);
        assert!(!out.contains("23456789abc") && out.contains("[REDACTED:api_key]"), "{out}");
        assert!(out.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
        let array = format!("[{}]", lines.trim_end().replace('\n', ",\r\n"));
        let out = whole(Format::Array, &array);
        assert!(!out.contains("23456789abc"), "{out}");
        assert_eq!(serde_json::from_str::<Value>(&out).unwrap().as_array().unwrap().len(), 3);
    }

    #[test]
    fn parts_go_on_whole_and_without_waiting_where_no_word_is_open() {
        let mut rewriter = Rewriter::new(Format::Events, None);
        let mut out = Vec::new();
        rewriter.push(b"data: {\"a\":", &mut out);
        assert!(out.is_empty(), "an event that is not complete waits");
        rewriter.push(b"1}\n", &mut out);
        rewriter.push(b"\r\n", &mut out);
        assert_eq!(out, b"data: {\"a\":1}\n\r\n");
        // With redaction, a text's last word waits for the next event, and no longer.
        let mut rewriter = Rewriter::new(Format::Events, Some(ClassSet::REDACTED));
        let mut out = Vec::new();
        for text in ["Good", " morning", " to you"] {
            let before = out.len();
            rewriter.push(event(text).as_bytes(), &mut out);
            assert_eq!(out.len() > before, text != "Good");
        }
        rewriter.push(
            b"data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
            &mut out,
        );
        assert_eq!(rewriter.held_bytes(), 0, "a part without text ends the text");
    }

    #[test]
    fn texts_that_alternate_are_kept_apart() {
        let choice = |index: u8, text: &str| {
            format!("data: {{\"choices\":[{{\"index\":{index},\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
        };
        let body = choice(0, "sk-proj-abcDEF01")
            + &choice(1, "hello ")
            + &choice(0, "23456789abcDEF")
            + &choice(1, "you ")
            + &choice(0, "0123456789 ok")
            + &choice(1, "there");
        let out = whole(Format::Events, &body);
        assert!(!out.contains("abcDEF") && out.contains("hello") && out.contains(" ok"), "{out}");
    }

    #[test]
    fn what_is_no_json_is_searched_as_text() {
        for body in [format!("{{\"a\": {KEY} }}"), format!("plain {KEY}"), format!("{{\"a\":1}} x {KEY}")] {
            let out = whole(Format::Document, &body);
            assert!(!out.contains(KEY) && out.contains("[REDACTED:api_key]"), "{out}");
        }
        let out = whole(
            Format::Events,
            &format!(": {KEY}\nevent: e\ndata: {KEY}\ndata: -----BEGIN PRIVATE KEY-----\ndata: MIIE\n\n"),
        );
        assert!(
            !out.contains(KEY)
                && out.starts_with(": [REDACTED:api_key]\nevent: e\ndata: [REDACTED:api_key]\ndata: "),
            "{out}"
        );
    }

    #[test]
    fn an_endless_word_and_an_endless_part_are_bounded() {
        let body =
            format!("{{\"a\":\"{}\"}}", "-----BEGIN PRIVATE KEY-----".to_string() + &"a".repeat(300_000));
        let (out, tokens) = rewritten(Format::Document, body.as_bytes(), &[1000]);
        assert!(serde_json::from_slice::<Value>(&out).is_ok() && tokens > 0);
        let (out, _) = rewritten(Format::Events, format!("data: {body}\n\n").as_bytes(), &[4096]);
        assert!(out.ends_with(b"\"}\n\n"));
        let mut rewriter = Rewriter::new(Format::Events, None);
        let mut out = Vec::new();
        rewriter.push(b"data: ", &mut out);
        (0..100).for_each(|_| rewriter.push(&[b'x'; 1000], &mut out));
        assert!(rewriter.torn());
        rewriter.push(b"\n\ndata: y\n\n", &mut out);
        assert!(!rewriter.torn());
    }

    #[test]
    fn frames_of_an_amazon_stream_go_on_whole() {
        let frame = |payload: &[u8]| {
            let mut bytes = (payload.len() as u32 + 4).to_be_bytes().to_vec();
            bytes.extend_from_slice(payload);
            bytes
        };
        let body = [frame(b"0123456789"), frame(KEY.as_bytes())].concat();
        let mut rewriter = Rewriter::new(Format::AmazonEvents, Some(ClassSet::REDACTED));
        let mut out = Vec::new();
        for (i, byte) in body.iter().enumerate() {
            rewriter.push(&[*byte], &mut out);
            assert_eq!(
                out.len(),
                if i < 13 {
                    0
                } else if i + 1 < body.len() {
                    14
                } else {
                    body.len()
                }
            );
        }
        assert_eq!(out, body);
    }

    /// JSON of strings and numbers among which are tokens.
    fn document() -> impl Strategy<Value = Value> {
        let word = prop_oneof![
            Just(String::from(KEY)),
            Just(String::from("joe@example.com")),
            Just(String::from("4111 1111 1111 1111")),
            Just(String::from("\u{e9}\"\\/\n")),
            "[a-z@. -]{0,12}",
        ];
        let text = proptest::collection::vec(word, 0..5).prop_map(|words| format!(" {}", words.join(" ")));
        let leaf = prop_oneof![
            text.prop_map(Value::from),
            Just(Value::from(4_111_111_111_111_111_u64)),
            any::<i32>().prop_map(Value::from),
            Just(Value::Null),
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("content|text|index|id|n", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn every_split_gives_the_same_json_without_secrets(
            parts in proptest::collection::vec(document().prop_filter("text, to SSE", |part| !part.is_number()), 1..4),
            sizes in proptest::collection::vec(1usize..40, 1..6),
        ) {
            let lines: String = parts.iter().map(|part| format!("{part}\n")).collect();
            let events: String = parts.iter().map(|part| format!("event: x\ndata: {part}\n\n")).collect();
            let document = parts[0].to_string();
            for (format, body) in [(Format::Document, &document), (Format::Lines, &lines), (Format::Events, &events)] {
                let one = rewritten(format, body.as_bytes(), &[usize::MAX]);
                prop_assert_eq!(&rewritten(format, body.as_bytes(), &sizes), &one);
                let out = String::from_utf8(one.0).unwrap();
                prop_assert!(!out.contains(KEY) && !out.contains("4111 1111"), "{}", out);
                for line in out.lines().map(|line| line.strip_prefix("data: ").unwrap_or(line)) {
                    let json = !line.is_empty() && line != "event: x";
                    prop_assert!(!json || serde_json::from_str::<Value>(line).is_ok(), "{}", line);
                }
                if one.1 == 0 {
                    prop_assert_eq!(&out, body);
                }
            }
        }

        /// Strings that are not deltas: the engine's redaction of whole strings is the oracle.
        #[test]
        fn a_document_is_redacted_as_its_strings_are(text in "[a-c@. 0-9é\"\\\\-]{0,30}", n in 0usize..3) {
            let full = [text.as_str(), KEY, "joe@example.com"][n].to_string() + " " + &text;
            let quoted = Value::from(full).to_string();
            let expected = driftlock_engine::normalise::redact_json_string(&quoted[1..quoted.len() - 1], ClassSet::REDACTED);
            prop_assert_eq!(whole(Format::Document, &format!("[{quoted}]")), format!("[\"{expected}\"]"));
        }

        #[test]
        fn any_bytes_in_any_split_lose_nothing_but_tokens(
            body in proptest::collection::vec(prop_oneof![any::<u8>(), proptest::sample::select(b"{}[]\":,\\ \n\r0a".to_vec())], 0..200),
            sizes in proptest::collection::vec(1usize..20, 1..4),
        ) {
            for format in [Format::Document, Format::Array, Format::Lines, Format::Events, Format::AmazonEvents, Format::Text] {
                let one = rewritten(format, &body, &[usize::MAX]);
                prop_assert_eq!(&rewritten(format, &body, &sizes), &one);
                if one.1 == 0 {
                    prop_assert_eq!(&one.0, &body);
                }
            }
        }
    }
}
