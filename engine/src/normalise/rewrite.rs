//! Rewriting: markers for scoring, redactions for what leaves the process, and the way back.
//!
//! Cost: that of the scanner; copied text is passed on, not copied. An [`OffsetMap`] takes 32 bytes a
//! token.

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use super::class::{Class, ClassSet};
use super::scan::{Found, Scanner, Sourced};

/// A piece of rewritten text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// What to use: a stretch of the source as it stands, or what stands for a token.
    pub text: &'a [u8],
    /// The token's class; none for a copied stretch.
    pub class: Option<Class>,
    /// Where it stood in the source text.
    pub offset: u64,
    /// How many bytes of the source text it stands for; for a copied stretch, `text.len()`.
    pub source_len: u64,
    /// Where its first byte came from in the message body.
    pub body_start: u64,
    /// One past where its last byte came from in the message body.
    pub body_end: u64,
}

/// Byte that starts a marker: SOH, which no text has.
pub const MARKER: u8 = 1;

/// Replaces volatile tokens by markers of three bytes: [`MARKER`], a letter for the class and a digit for
/// the length (its bit length), so that "a UUID stands here" is learnt once and costs little ever after.
///
/// A text that holds such bytes by itself is scored as it is: three bytes that look like a token hide
/// nothing.
#[derive(Clone, Debug)]
pub struct Normaliser {
    scanner: Scanner,
}

impl Normaliser {
    /// Replaces tokens of these classes.
    pub fn new(classes: ClassSet) -> Self {
        Self { scanner: Scanner::new(classes) }
    }

    /// Takes the text's next bytes, which stand at `body_offset` in the message body.
    pub fn push(&mut self, text: &[u8], body_offset: u64, emit: &mut impl FnMut(Piece<'_>)) {
        self.scanner.push(text, body_offset, &mut |found| mark(found, emit));
    }

    /// As [`Self::push`] of each of its parts.
    pub(crate) fn push_sourced(&mut self, text: Sourced<'_>, emit: &mut impl FnMut(Piece<'_>)) {
        self.scanner.push_sourced(text, &mut |found| mark(found, emit));
    }

    /// As [`Self::finish_with`]; what comes next is another text, after [`Self::restart`].
    pub(crate) fn finish_with_sourced(&mut self, text: Sourced<'_>, emit: &mut impl FnMut(Piece<'_>)) {
        self.scanner.finish_with_sourced(text, &mut |found| mark(found, emit));
    }

    /// As a new one for these classes, in the memory of this one.
    pub(crate) fn restart(&mut self, classes: ClassSet) {
        self.scanner.restart(classes);
    }

    /// As [`Scanner::is_at_start`].
    pub(crate) fn is_at_start(&self) -> bool {
        self.scanner.is_at_start()
    }

    /// Nothing is undecided, and what comes next does not depend on what came before.
    pub(crate) fn is_idle(&self) -> bool {
        self.scanner.is_idle()
    }

    /// Takes bytes that are known to hold no token and to leave nothing undecided, while idle. What comes
    /// next must say where it came from.
    pub(crate) fn pass(&mut self, text: &[u8]) {
        self.scanner.pass(text);
    }

    /// Takes the text's last bytes and ends it.
    pub fn finish_with(self, text: &[u8], body_offset: u64, emit: &mut impl FnMut(Piece<'_>)) {
        self.scanner.finish_with(text, body_offset, &mut |found| mark(found, emit));
    }

    /// Ends the text.
    pub fn finish(self, emit: &mut impl FnMut(Piece<'_>)) {
        self.scanner.finish(&mut |found| mark(found, emit));
    }
}

/// The length's digit goes from `0` to `?`.
const MAX_LENGTH_DIGIT: u32 = 15;

fn mark(found: Found<'_>, emit: &mut impl FnMut(Piece<'_>)) {
    rewrite(found, emit, |class, len| {
        let bits = (u64::BITS - len.leading_zeros()).min(MAX_LENGTH_DIGIT);
        [MARKER, class.letter(), b'0' + bits as u8]
    });
}

fn rewrite<M: AsRef<[u8]>>(
    found: Found<'_>,
    emit: &mut impl FnMut(Piece<'_>),
    marker: impl FnOnce(Class, u64) -> M,
) {
    match found {
        Found::Text { text, offset, body_start } => {
            let source_len = text.len() as u64;
            emit(Piece {
                text,
                class: None,
                offset,
                source_len,
                body_start,
                body_end: body_start + source_len,
            });
        }
        Found::Token { class, offset, len, body_start, body_end } => {
            let marker = marker(class, len);
            let text = marker.as_ref();
            emit(Piece { text, class: Some(class), offset, source_len: len, body_start, body_end });
        }
    }
}

/// Replaces secrets and personal data by `[REDACTED:class]`. With [`ClassSet::REDACTED`], redacting
/// twice is redacting once.
#[derive(Clone, Debug)]
pub struct Redactor {
    scanner: Scanner,
}

impl Redactor {
    /// Replaces tokens of these classes; [`ClassSet::REDACTED`] is the set to start from.
    pub fn new(classes: ClassSet) -> Self {
        Self { scanner: Scanner::new(classes) }
    }

    /// Takes the text's next bytes, which stand at `body_offset` in the message body.
    pub fn push(&mut self, text: &[u8], body_offset: u64, emit: &mut impl FnMut(Piece<'_>)) {
        self.scanner.push(text, body_offset, &mut |found| rewrite(found, emit, |class, _| class.redaction()));
    }

    /// Ends the text.
    pub fn finish(self, emit: &mut impl FnMut(Piece<'_>)) {
        self.scanner.finish(&mut |found| rewrite(found, emit, |class, _| class.redaction()));
    }
}

/// Text without secrets, and the way back to where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redacted {
    /// The text.
    pub text: String,
    /// Its offsets in the source.
    pub offsets: OffsetMap,
}

/// Redacts a whole text.
pub fn redact(text: &str, classes: ClassSet) -> Redacted {
    let (mut out, mut offsets) = (Vec::with_capacity(text.len()), OffsetMap::default());
    let mut emit = |piece: Piece<'_>| {
        offsets.add(&piece);
        out.extend_from_slice(piece.text);
    };
    let mut redactor = Redactor::new(classes);
    redactor.push(text.as_bytes(), 0, &mut emit);
    redactor.finish(&mut emit);
    Redacted { text: into_string(out), offsets }
}

/// Tokens start and end beside ASCII bytes, so what is left is UTF-8 as the source was.
fn into_string(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// Redacts the content of a JSON string literal, given as it stands between its quotes (RFC 8259,
/// section 7), and returns it as such: tokens are found in the decoded text, what is no token keeps its
/// bytes and its escapes, and what replaces one needs none.
///
/// Bytes that are no valid content come back as they are; they make no other part of the result invalid.
pub fn redact_json_string(content: &str, classes: ClassSet) -> String {
    let source = content.as_bytes();
    let mut out = Vec::with_capacity(source.len());
    // Where copying goes on; unknown behind a token until the next text comes.
    let mut copy_from = Some(0);
    let mut emit = |piece: Piece<'_>| {
        let start = piece.body_start as usize;
        if piece.class.is_some() {
            if let Some(from) = copy_from.take() {
                out.extend_from_slice(source.get(from..start).unwrap_or_default());
            }
            out.extend_from_slice(piece.text);
        } else if copy_from.is_none() {
            copy_from = Some(start);
        }
    };
    let mut redactor = Redactor::new(classes);
    let mut at = 0;
    while at < source.len() {
        let rest = source.get(at..).unwrap_or_default();
        let plain = rest.iter().position(|&b| b == b'\\').unwrap_or(rest.len());
        if plain > 0 {
            redactor.push(rest.get(..plain).unwrap_or_default(), at as u64, &mut emit);
            at += plain;
            continue;
        }
        let (decoded, len) = decode_escape(rest);
        let mut buffer = [0; 4];
        redactor.push(decoded.encode_utf8(&mut buffer).as_bytes(), at as u64, &mut emit);
        at += len;
    }
    redactor.finish(&mut emit);
    if let Some(from) = copy_from {
        out.extend_from_slice(source.get(from..).unwrap_or_default());
    }
    into_string(out)
}

/// The character that the escape at the front of `text` stands for, and its length. What is no escape
/// is a backslash.
fn decode_escape(text: &[u8]) -> (char, usize) {
    let unit = |at: usize| {
        let digits = text.get(at..)?.strip_prefix(b"\\u")?.get(..4)?;
        digits.iter().try_fold(0, |sum, &b| Some(sum << 4 | char::from(b).to_digit(16)?))
    };
    match text.get(1) {
        Some(b'n') => ('\n', 2),
        Some(b'r') => ('\r', 2),
        Some(b't') => ('\t', 2),
        Some(b'b') => ('\u{8}', 2),
        Some(b'f') => ('\u{c}', 2),
        Some(&b @ (b'"' | b'/' | b'\\')) => (char::from(b), 2),
        Some(b'u') => match (unit(0), unit(6)) {
            (Some(high @ 0xd800..0xdc00), Some(low @ 0xdc00..0xe000)) => {
                let code = 0x10000 + ((high - 0xd800) << 10 | (low - 0xdc00));
                (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 12)
            }
            (Some(code), _) => (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 6),
            (None, _) => ('\\', 1),
        },
        _ => ('\\', 1),
    }
}

/// Where the tokens were: from offsets in rewritten text back to the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OffsetMap {
    /// By rising position.
    tokens: Vec<Replaced>,
    written: u64,
}

/// What stands for a token, `at..at + len`, and where it was, `source..source + source_len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Replaced {
    at: u64,
    len: u64,
    source: u64,
    source_len: u64,
}

impl OffsetMap {
    /// Notes the next piece of the rewritten text.
    pub fn add(&mut self, piece: &Piece<'_>) {
        let len = piece.text.len() as u64;
        if piece.class.is_some() {
            let Piece { offset: source, source_len, .. } = *piece;
            self.tokens.push(Replaced { at: self.written, len, source, source_len });
        }
        self.written += len;
    }

    /// Tokens replaced.
    pub fn replaced(&self) -> usize {
        self.tokens.len()
    }

    /// What `range` of the rewritten text stands for in the source: a token it touches, as a whole.
    pub fn source(&self, range: Range<u64>) -> Range<u64> {
        self.start(range.start)..self.end(range.end)
    }

    fn start(&self, at: u64) -> u64 {
        let behind = self.tokens.partition_point(|token| token.at <= at);
        match behind.checked_sub(1).and_then(|last| self.tokens.get(last)) {
            Some(token) if at < token.at + token.len => token.source,
            Some(token) => token.source + token.source_len + (at - token.at - token.len),
            None => at,
        }
    }

    fn end(&self, at: u64) -> u64 {
        let behind = self.tokens.partition_point(|token| token.at < at);
        match behind.checked_sub(1).and_then(|last| self.tokens.get(last)) {
            Some(token) => token.source + token.source_len + at.saturating_sub(token.at + token.len),
            None => at,
        }
    }
}
