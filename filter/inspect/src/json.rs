//! Push tokenizer for JSON (RFC 8259): bytes in, structure and text out, at any chunk boundary.
//!
//! A proxy sees a body in pieces and must not collect it, so this is a state machine that holds at most one
//! key prefix, one escape and one unfinished UTF-8 sequence between two pushes. Runs of plain string bytes are
//! handed over as slices of the chunk; nothing is copied but keys and escapes.
//!
//! Cost: one pass, eight bytes a step inside strings, no allocation. Depth is bounded by `MAX_DEPTH`, keys by
//! `MAX_KEY_BYTES` (a longer key is reported as unknown, which is no error).
//!
//! Left out on purpose: numbers are checked but only unsigned integers are evaluated (token counts, indexes);
//! duplicate keys are not noticed; a lone surrogate escape is allowed by the grammar and becomes U+FFFD.

use driftlock_engine::bitmap::up_to_or;

use crate::content::ContentError;

/// Containers inside containers that are followed; the 65th is [`ContentError::TooDeep`].
pub(crate) const MAX_DEPTH: u8 = 64;
/// Decoded bytes of a key that are kept for matching.
pub(crate) const MAX_KEY_BYTES: usize = 32;

/// What opens with a bracket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Container {
    Object,
    Array,
}

/// What a number or literal is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scalar {
    Unsigned(u64),
    True,
    /// Any other: its value is not needed.
    Other,
}

/// Receives tokens. An `index` is a position in the chunk being pushed.
pub(crate) trait Handler {
    /// `{` or `[` at `index`.
    fn begin(&mut self, container: Container, index: usize);
    /// `}` or `]` at `index`.
    fn end(&mut self, container: Container, index: usize);
    /// The opening quote of a key.
    fn key_begin(&mut self, index: usize);
    /// The decoded key; `None` when it is longer than [`MAX_KEY_BYTES`].
    fn key(&mut self, key: Option<&[u8]>);
    /// The opening quote of a string value. `true` asks for its text.
    fn string_begin(&mut self, index: usize) -> bool;
    /// Plain bytes of a wanted string.
    fn text(&mut self, run: &[u8], index: usize);
    /// One escape of a wanted string: its source bytes, what they stand for, and the source's body offset.
    fn escape(&mut self, source: &[u8], decoded: &[u8], body_offset: u64);
    /// The closing quote of a string value.
    fn string_end(&mut self, index: usize);
    /// First byte of a number or literal.
    fn scalar_begin(&mut self, index: usize);
    /// One past the last byte of a number or literal, and its value.
    fn scalar_end(&mut self, index: usize, value: Scalar);
}

/// Only checks the grammar.
impl Handler for () {
    fn begin(&mut self, _: Container, _: usize) {}
    fn end(&mut self, _: Container, _: usize) {}
    fn key_begin(&mut self, _: usize) {}
    fn key(&mut self, _: Option<&[u8]>) {}
    fn string_begin(&mut self, _: usize) -> bool {
        false
    }
    fn text(&mut self, _: &[u8], _: usize) {}
    fn escape(&mut self, _: &[u8], _: &[u8], _: u64) {}
    fn string_end(&mut self, _: usize) {}
    fn scalar_begin(&mut self, _: usize) {}
    fn scalar_end(&mut self, _: usize, _: Scalar) {}
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A value must come.
    Value,
    /// A value or `]`.
    FirstElement,
    /// A key or `}`.
    FirstKey,
    /// A key.
    NextKey,
    Colon,
    /// `,` or the end of the container.
    After,
    /// The document is complete.
    Done,
    Str,
    Escape,
    /// Hexadecimal digits seen of `\uXXXX`.
    Hex(u8),
    Number(Number),
    /// What is left of `true`, `false` or `null`.
    Literal(&'static [u8]),
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Integer,
    Dot,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

impl Number {
    fn is_complete(self) -> bool {
        matches!(self, Self::Zero | Self::Integer | Self::Fraction | Self::ExponentDigits)
    }

    fn next(self, byte: u8) -> Option<Self> {
        Some(match (self, byte) {
            (Self::Minus, b'0') => Self::Zero,
            (Self::Minus, b'1'..=b'9') | (Self::Integer, b'0'..=b'9') => Self::Integer,
            (Self::Zero | Self::Integer, b'.') => Self::Dot,
            (Self::Dot | Self::Fraction, b'0'..=b'9') => Self::Fraction,
            (Self::Zero | Self::Integer | Self::Fraction, b'e' | b'E') => Self::Exponent,
            (Self::Exponent, b'+' | b'-') => Self::ExponentSign,
            (Self::Exponent | Self::ExponentSign | Self::ExponentDigits, b'0'..=b'9') => Self::ExponentDigits,
            _ => return None,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StringUse {
    Key,
    Wanted,
    Unwanted,
}

/// The tokenizer's whole state between two pushes.
#[derive(Clone, Debug)]
pub(crate) struct Tokenizer {
    state: State,
    /// Bit d is set when the container at depth d is an object.
    objects: u64,
    depth: u8,
    /// Documents may follow one another (NDJSON).
    many: bool,
    string: StringUse,
    key: [u8; MAX_KEY_BYTES],
    /// Above [`MAX_KEY_BYTES`] once the key is too long.
    key_len: usize,
    /// Source of the escape being read, a waiting high surrogate's included.
    escape: [u8; 12],
    escape_len: usize,
    escape_at: u64,
    hex: u16,
    high: Option<u16>,
    utf8: Utf8,
    integer: Option<u64>,
    /// The literal being read is `true`.
    literal_true: bool,
    error: Option<ContentError>,
}

impl Tokenizer {
    /// For one document, or for any number of them one after the other.
    pub(crate) fn new(many: bool) -> Self {
        Self {
            state: State::Value,
            objects: 0,
            depth: 0,
            many,
            string: StringUse::Unwanted,
            key: [0; MAX_KEY_BYTES],
            key_len: 0,
            escape: [0; 12],
            escape_len: 0,
            escape_at: 0,
            hex: 0,
            high: None,
            utf8: Utf8::new(),
            integer: None,
            literal_true: false,
            error: None,
        }
    }

    pub(crate) fn error(&self) -> Option<ContentError> {
        self.error
    }

    /// Source of an escape that was begun and not handed over, with its body offset.
    pub(crate) fn pending_escape(&self) -> (&[u8], u64) {
        (self.escape.get(..self.escape_len).unwrap_or_default(), self.escape_at)
    }

    /// Reads `chunk`, whose first byte stands at `base` in the body, and returns how many bytes were read: all
    /// of them, or those before the offending byte. Once failed it reads nothing more.
    pub(crate) fn push(&mut self, chunk: &[u8], base: u64, handler: &mut impl Handler) -> usize {
        let mut index = 0;
        while let Some(&byte) = chunk.get(index) {
            match self.state {
                State::Str => {
                    index = self.in_string(chunk, index, base, handler);
                    continue;
                }
                State::Failed => return index,
                State::Escape | State::Hex(_) => self.in_escape(byte, index, base, handler),
                State::Number(Number::Integer | Number::Fraction) if byte.is_ascii_digit() => {
                    index = self.digits(chunk, index);
                    continue;
                }
                State::Number(number) => {
                    match number.next(byte) {
                        Some(next) => {
                            self.state = State::Number(next);
                            // What is left here is negative, a fraction or has an exponent.
                            self.integer = None;
                        }
                        None if number.is_complete() => {
                            handler.scalar_end(index, self.number());
                            self.state = self.after_value();
                            continue; // the byte belongs to what follows
                        }
                        None => self.fail(ContentError::Malformed { offset: base + index as u64 }),
                    }
                }
                State::Literal(rest) => match rest.split_first() {
                    Some((&expected, rest)) if expected == byte => {
                        self.state = State::Literal(rest);
                        if rest.is_empty() {
                            let value = if self.literal_true { Scalar::True } else { Scalar::Other };
                            handler.scalar_end(index + 1, value);
                            self.state = self.after_value();
                        }
                    }
                    _ => self.fail(ContentError::Malformed { offset: base + index as u64 }),
                },
                // Indentation comes in runs.
                _ if is_blank(byte) => {
                    let rest = chunk.get(index..).unwrap_or_default();
                    index += rest.iter().take_while(|&&byte| is_blank(byte)).count();
                    continue;
                }
                State::Value => self.value(byte, index, base, handler),
                State::FirstElement if byte == b']' => self.close(Container::Array, index, handler),
                State::FirstElement => self.value(byte, index, base, handler),
                State::FirstKey if byte == b'}' => self.close(Container::Object, index, handler),
                State::FirstKey | State::NextKey if byte == b'"' => {
                    self.string = StringUse::Key;
                    self.key_len = 0;
                    self.state = State::Str;
                    handler.key_begin(index);
                }
                State::Colon if byte == b':' => self.state = State::Value,
                State::After => match (byte, self.in_object()) {
                    (b',', true) => self.state = State::NextKey,
                    (b',', false) => self.state = State::Value,
                    (b'}', true) => self.close(Container::Object, index, handler),
                    (b']', false) => self.close(Container::Array, index, handler),
                    _ => self.fail(ContentError::Malformed { offset: base + index as u64 }),
                },
                State::Done if self.many => {
                    self.state = State::Value;
                    continue;
                }
                State::FirstKey | State::NextKey | State::Colon | State::Done => {
                    self.fail(ContentError::Malformed { offset: base + index as u64 });
                }
            }
            if self.state == State::Failed {
                return index;
            }
            index += 1;
        }
        index
    }

    /// Ends the input. A number at the top ends here; anything open is [`ContentError::Truncated`].
    pub(crate) fn finish(&mut self, handler: &mut impl Handler) -> Result<(), ContentError> {
        if let State::Number(number) = self.state
            && self.depth == 0
            && number.is_complete()
        {
            handler.scalar_end(0, self.number());
            self.state = State::Done;
        }
        match (self.error, self.state) {
            (Some(error), _) => Err(error),
            (None, State::Done) => Ok(()),
            (None, _) => Err(ContentError::Truncated),
        }
    }

    /// Reads the digits of an integer or a fraction; returns the index of what follows.
    fn digits(&mut self, chunk: &[u8], index: usize) -> usize {
        let rest = chunk.get(index..).unwrap_or_default();
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if let Some(value) = self.integer {
            self.integer = rest
                .iter()
                .take(count)
                .try_fold(value, |value, byte| value.checked_mul(10)?.checked_add(u64::from(byte - b'0')));
        }
        index + count
    }

    fn number(&self) -> Scalar {
        self.integer.map_or(Scalar::Other, Scalar::Unsigned)
    }

    fn fail(&mut self, error: ContentError) {
        self.state = State::Failed;
        self.error = Some(error);
    }

    fn in_object(&self) -> bool {
        self.depth > 0 && self.objects >> (self.depth - 1) & 1 == 1
    }

    fn after_value(&self) -> State {
        if self.depth == 0 { State::Done } else { State::After }
    }

    fn value(&mut self, byte: u8, index: usize, base: u64, handler: &mut impl Handler) {
        match byte {
            b'"' => {
                self.string =
                    if handler.string_begin(index) { StringUse::Wanted } else { StringUse::Unwanted };
                self.state = State::Str;
            }
            b'{' => self.open(Container::Object, index, base, handler),
            b'[' => self.open(Container::Array, index, base, handler),
            b't' => self.scalar(State::Literal(b"rue"), index, handler),
            b'f' => self.scalar(State::Literal(b"alse"), index, handler),
            b'n' => self.scalar(State::Literal(b"ull"), index, handler),
            b'-' => {
                self.integer = None;
                self.scalar(State::Number(Number::Minus), index, handler);
            }
            b'0'..=b'9' => {
                self.integer = Some(u64::from(byte - b'0'));
                let number = if byte == b'0' { Number::Zero } else { Number::Integer };
                self.scalar(State::Number(number), index, handler);
            }
            _ => self.fail(ContentError::Malformed { offset: base + index as u64 }),
        }
    }

    fn scalar(&mut self, state: State, index: usize, handler: &mut impl Handler) {
        self.literal_true = state == State::Literal(b"rue");
        self.state = state;
        handler.scalar_begin(index);
    }

    fn open(&mut self, container: Container, index: usize, base: u64, handler: &mut impl Handler) {
        if self.depth >= MAX_DEPTH {
            return self.fail(ContentError::TooDeep { offset: base + index as u64 });
        }
        let bit = 1u64 << self.depth;
        match container {
            Container::Object => self.objects |= bit,
            Container::Array => self.objects &= !bit,
        }
        self.depth += 1;
        self.state = match container {
            Container::Object => State::FirstKey,
            Container::Array => State::FirstElement,
        };
        handler.begin(container, index);
    }

    fn close(&mut self, container: Container, index: usize, handler: &mut impl Handler) {
        self.depth = self.depth.saturating_sub(1);
        self.state = self.after_value();
        handler.end(container, index);
    }

    /// Reads one run of a string and the byte that ends it; returns the index to go on from.
    #[inline]
    fn in_string(&mut self, chunk: &[u8], index: usize, base: u64, handler: &mut impl Handler) -> usize {
        let rest = chunk.get(index..).unwrap_or_default();
        let (mut len, non_ascii) = plain_run(rest);
        if len > 0 && self.high.is_some() {
            self.lone_surrogate(handler);
        }
        let mut broken = false;
        if (non_ascii || !self.utf8.is_complete())
            && let Err(bad) = self.utf8.push(rest.get(..len).unwrap_or_default())
        {
            (len, broken) = (bad, true);
        }
        let run = rest.get(..len).unwrap_or_default();
        if !run.is_empty() {
            match self.string {
                StringUse::Key => self.key_text(run),
                StringUse::Wanted => handler.text(run, index),
                StringUse::Unwanted => {}
            }
        }
        let index = index + len;
        let offset = base + index as u64;
        let Some(&byte) = chunk.get(index) else { return index };
        if broken || !self.utf8.is_complete() {
            self.fail(ContentError::InvalidUtf8 { offset });
            return index;
        }
        match byte {
            b'"' => {
                if self.high.is_some() {
                    self.lone_surrogate(handler);
                }
                if self.string == StringUse::Key {
                    handler.key(self.key.get(..self.key_len));
                    self.state = State::Colon;
                } else {
                    handler.string_end(index);
                    self.state = self.after_value();
                }
                index + 1
            }
            b'\\' => {
                // The common case, an escape of two bytes that lie in this chunk.
                if self.high.is_none()
                    && let Some(source) = chunk.get(index..index + 2)
                    && let Some(decoded) = source.get(1).and_then(|&letter| simple_escape(letter))
                {
                    self.escaped(source, &[decoded], offset, handler);
                    return index + 2;
                }
                if self.high.is_none() {
                    self.escape_at = offset;
                    self.escape_len = 0;
                }
                self.keep_escape(byte);
                self.state = State::Escape;
                index + 1
            }
            _ => {
                self.fail(ContentError::Malformed { offset });
                index
            }
        }
    }

    fn in_escape(&mut self, byte: u8, index: usize, base: u64, handler: &mut impl Handler) {
        let malformed = ContentError::Malformed { offset: base + index as u64 };
        match self.state {
            State::Hex(seen) => {
                let Some(digit) = char::from(byte).to_digit(16) else { return self.fail(malformed) };
                self.keep_escape(byte);
                self.hex = self.hex << 4 | digit as u16;
                self.state = State::Hex(seen + 1);
                if seen == 3 {
                    self.state = State::Str;
                    self.code_unit(handler);
                }
            }
            _ if byte == b'u' => {
                self.keep_escape(byte);
                self.hex = 0;
                self.state = State::Hex(0);
            }
            _ => {
                let Some(decoded) = simple_escape(byte) else { return self.fail(malformed) };
                if self.high.is_some() {
                    self.lone_surrogate(handler);
                }
                let at = self.escape_at;
                self.escaped(&[b'\\', byte], &[decoded], at, handler);
                self.escape_len = 0;
                self.state = State::Str;
            }
        }
    }

    /// A `\uXXXX` is complete: a character, half of one, or half of one whose other half is missing.
    fn code_unit(&mut self, handler: &mut impl Handler) {
        let unit = self.hex;
        if let Some(high) = self.high {
            if (0xdc00..0xe000).contains(&unit) {
                let code = 0x1_0000 + ((u32::from(high) & 0x3ff) << 10) + (u32::from(unit) & 0x3ff);
                self.high = None;
                return self.escaped_char(code, handler);
            }
            self.lone_surrogate(handler);
        }
        if (0xd800..0xdc00).contains(&unit) {
            self.high = Some(unit);
        } else {
            self.escaped_char(u32::from(unit), handler);
        }
    }

    /// Hands over the waiting high surrogate as U+FFFD and keeps what was read after it.
    fn lone_surrogate(&mut self, handler: &mut impl Handler) {
        self.high = None;
        let (source, at) = (self.escape, self.escape_at);
        let end = self.escape_len.min(6);
        self.escaped(source.get(..end).unwrap_or_default(), REPLACEMENT, at, handler);
        self.escape.copy_within(end.., 0);
        self.escape_len -= end;
        self.escape_at += end as u64;
    }

    fn escaped_char(&mut self, code: u32, handler: &mut impl Handler) {
        let mut utf8 = [0; 4];
        let decoded = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER).encode_utf8(&mut utf8);
        let (source, len, at) = (self.escape, self.escape_len, self.escape_at);
        self.escaped(source.get(..len).unwrap_or_default(), decoded.as_bytes(), at, handler);
        self.escape_len = 0;
    }

    #[inline]
    fn escaped(&mut self, source: &[u8], decoded: &[u8], at: u64, handler: &mut impl Handler) {
        match self.string {
            StringUse::Key => self.key_text(decoded),
            StringUse::Wanted => handler.escape(source, decoded, at),
            StringUse::Unwanted => {}
        }
    }

    fn keep_escape(&mut self, byte: u8) {
        if let Some(place) = self.escape.get_mut(self.escape_len) {
            *place = byte;
            self.escape_len += 1;
        }
    }

    fn key_text(&mut self, run: &[u8]) {
        let end = self.key_len.saturating_add(run.len());
        if let Some(place) = self.key.get_mut(self.key_len..end) {
            place.copy_from_slice(run);
            self.key_len = end;
        } else {
            self.key_len = MAX_KEY_BYTES + 1;
        }
    }
}

const REPLACEMENT: &[u8] = "\u{fffd}".as_bytes();

fn simple_escape(letter: u8) -> Option<u8> {
    Some(match letter {
        b'"' | b'\\' | b'/' => letter,
        b'b' => 0x08,
        b'f' => 0x0c,
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        _ => return None,
    })
}

/// Blanks between JSON's tokens (RFC 8259 section 2).
fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\n' | b'\r' | b'\t')
}

/// Length of the run at the start of `bytes` without `"`, `\` and control characters, and whether it holds a
/// byte over 127.
#[inline]
fn plain_run(bytes: &[u8]) -> (usize, bool) {
    let (blocks, tail) = bytes.as_chunks::<16>();
    let (mut seen, mut len) = (0, 0);
    for block in blocks {
        let (stop, high) = up_to_or(block, 0x1f, [b'"', b'\\']);
        if stop != 0 {
            // The bits below the first one set.
            return (len + stop.trailing_zeros() as usize, seen | high & (stop - 1) & !stop != 0);
        }
        seen |= high;
        len += 16;
    }
    for &byte in tail {
        if byte < b' ' || byte == b'"' || byte == b'\\' {
            break;
        }
        seen |= u32::from(byte & 0x80);
        len += 1;
    }
    (len, seen != 0)
}

/// Checks UTF-8 (RFC 3629) over pieces that may be cut inside a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Utf8 {
    /// Continuation bytes still to come.
    missing: u8,
    /// Bounds of the next one: the second byte of some sequences is restricted.
    low: u8,
    high: u8,
}

impl Utf8 {
    pub(crate) fn new() -> Self {
        Self { missing: 0, low: 0x80, high: 0xbf }
    }

    /// No sequence is open.
    pub(crate) fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// `Err(index)`: the byte that cannot stand there.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), usize> {
        let mut index = 0;
        while !self.is_complete() {
            let Some(&byte) = bytes.get(index) else { return Ok(()) };
            if !self.step(byte) {
                return Err(index);
            }
            index += 1;
        }
        let rest = bytes.get(index..).unwrap_or_default();
        let Err(error) = core::str::from_utf8(rest) else { return Ok(()) };
        // The fast check says where the bad sequence begins; the steps say which byte of it is wrong, so that
        // the answer is the same wherever the input is cut.
        index += error.valid_up_to();
        for &byte in bytes.get(index..).unwrap_or_default() {
            if !self.step(byte) {
                return Err(index);
            }
            index += 1;
        }
        Ok(())
    }

    fn step(&mut self, byte: u8) -> bool {
        if self.missing > 0 {
            let fits = (self.low..=self.high).contains(&byte);
            (self.low, self.high) = (0x80, 0xbf);
            self.missing = if fits { self.missing - 1 } else { 0 };
            return fits;
        }
        (self.missing, self.low, self.high) = match byte {
            0x00..=0x7f => (0, 0x80, 0xbf),
            0xc2..=0xdf => (1, 0x80, 0xbf),
            0xe0 => (2, 0xa0, 0xbf),
            0xed => (2, 0x80, 0x9f),
            0xe1..=0xef => (2, 0x80, 0xbf),
            0xf0 => (3, 0x90, 0xbf),
            0xf1..=0xf3 => (3, 0x80, 0xbf),
            0xf4 => (3, 0x80, 0x8f),
            _ => return false,
        };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    /// Strings and keys as they are told, and the text of values.
    #[derive(Default, Debug, PartialEq, Eq)]
    struct Told {
        structure: String,
        text: Vec<u8>,
        integers: Vec<Option<u64>>,
    }

    impl Handler for Told {
        fn begin(&mut self, container: Container, _: usize) {
            self.structure.push(if container == Container::Object { '{' } else { '[' });
        }
        fn end(&mut self, container: Container, _: usize) {
            self.structure.push(if container == Container::Object { '}' } else { ']' });
        }
        fn key_begin(&mut self, _: usize) {}
        fn key(&mut self, key: Option<&[u8]>) {
            self.structure.push_str(key.map_or("?", |key| core::str::from_utf8(key).unwrap()));
            self.structure.push(':');
        }
        fn string_begin(&mut self, _: usize) -> bool {
            self.structure.push('"');
            true
        }
        fn text(&mut self, run: &[u8], _: usize) {
            self.text.extend_from_slice(run);
        }
        fn escape(&mut self, _: &[u8], decoded: &[u8], _: u64) {
            self.text.extend_from_slice(decoded);
        }
        fn string_end(&mut self, _: usize) {
            self.text.push(b'|');
        }
        fn scalar_begin(&mut self, _: usize) {
            self.structure.push('0');
        }
        fn scalar_end(&mut self, _: usize, value: Scalar) {
            self.integers.push(match value {
                Scalar::Unsigned(value) => Some(value),
                Scalar::True | Scalar::Other => None,
            });
        }
    }

    fn tell(body: &[u8], step: usize) -> (Told, Result<(), ContentError>) {
        let (mut tokenizer, mut told, mut base) = (Tokenizer::new(false), Told::default(), 0);
        for chunk in body.chunks(step) {
            tokenizer.push(chunk, base, &mut told);
            base += chunk.len() as u64;
        }
        let result = tokenizer.finish(&mut told);
        (told, result)
    }

    fn error(body: &[u8]) -> ContentError {
        let errors: Vec<_> = (1..=body.len()).map(|step| tell(body, step).1.unwrap_err()).collect();
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        errors[0]
    }

    #[test]
    fn errors_carry_the_offending_byte() {
        let at = |offset| ContentError::Malformed { offset };
        assert_eq!(error(b"{\"a\":}"), at(5));
        assert_eq!(error(b"{\"a\":1,}"), at(7));
        assert_eq!(error(b"{a:1}"), at(1));
        assert_eq!(error(b"[1,2}"), at(4));
        assert_eq!(error(b"[1] x"), at(4));
        assert_eq!(error(b"[01]"), at(2));
        assert_eq!(error(b"[1.]"), at(3));
        assert_eq!(error(b"[-]"), at(2));
        assert_eq!(error(b"[1e+]"), at(4));
        assert_eq!(error(b"[nul]"), at(4));
        assert_eq!(error(b"[NaN]"), at(1));
        assert_eq!(error(b"[\"a\nb\"]"), at(3));
        assert_eq!(error(b"[\"\\x\"]"), at(3));
        assert_eq!(error(b"[\"\\u12g4\"]"), at(6));
        assert_eq!(error(b"[\"\\ud83d\n\"]"), at(8));
        assert_eq!(error("\u{feff}{}".as_bytes()), at(0));
        for body in
            [&b"{"[..], b"[1", b"\"ab", b"\"\\u12", b"tru", b"-", b"1e", b"{\"a\"", b"[\"\xe2\x82", b" "]
        {
            assert_eq!(error(body), ContentError::Truncated, "{body:?}");
        }
        let bad = |offset| ContentError::InvalidUtf8 { offset };
        assert_eq!(error(b"[\"abc\xff\"]"), bad(5));
        assert_eq!(error(b"[\"\xe2\x82\"]"), bad(4));
        assert_eq!(error(b"[\"\xc3\\n\"]"), bad(3));
        assert_eq!(error(b"[\"\xed\xa0\x80\"]"), bad(3));
        assert_eq!(error(b"{\"\xf4\x90\":1}"), bad(3));
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |depth: usize| [b"[".repeat(depth), b"]".repeat(depth)].concat();
        assert_eq!(tell(&nested(64), 7).1, Ok(()));
        assert_eq!(error(&nested(65)), ContentError::TooDeep { offset: 64 });
    }

    #[test]
    fn integers_are_evaluated_and_keys_decoded_and_bounded() {
        let body = br#"{"\u0061b":[0,18446744073709551615,18446744073709551616,-1,1.5,1e2,true],
            "abcdefghijklmnopqrstuvwxyz012345":null,"abcdefghijklmnopqrstuvwxyz0123456":"x"}"#;
        for step in 1..=body.len() {
            let (told, result) = tell(body, step);
            assert_eq!(result, Ok(()));
            assert_eq!(told.structure, "{ab:[0000000]abcdefghijklmnopqrstuvwxyz012345:0?:\"}");
            assert_eq!(told.integers, [Some(0), Some(u64::MAX), None, None, None, None, None, None]);
        }
    }

    #[test]
    fn lone_surrogates_become_replacement_characters() {
        for (source, text) in [
            ("\"\\ud83d\\ude00\"", "😀|"),
            ("\"\\ud83d\"", "\u{fffd}|"),
            ("\"\\ude00a\"", "\u{fffd}a|"),
            ("\"\\ud83dx\"", "\u{fffd}x|"),
            ("\"\\ud83d\\n\"", "\u{fffd}\n|"),
            ("\"\\ud83d\\u0041\"", "\u{fffd}A|"),
            ("\"\\ud83d\\ud83d\\ude00\"", "\u{fffd}😀|"),
            ("\"\\ud83d\\ud83d\\ud83d\"", "\u{fffd}\u{fffd}\u{fffd}|"),
        ] {
            for step in 1..=source.len() {
                let (told, result) = tell(source.as_bytes(), step);
                assert_eq!(result, Ok(()));
                assert_eq!(core::str::from_utf8(&told.text).unwrap(), text, "{source} by {step}");
            }
        }
    }

    /// Bytes that meet the grammar's corners often.
    fn scraps() -> impl Strategy<Value = Vec<u8>> {
        let scrap = prop::sample::select(alloc::vec![
            &b"{"[..],
            b"}",
            b"[",
            b"]",
            b":",
            b",",
            b"\"",
            b"\"a\"",
            b"\"\":",
            b"\\",
            b"\\n",
            b"\\u0041",
            b"\\ud83d",
            b"\\ude00",
            b"0",
            b"1",
            b"-",
            b".",
            b"e",
            b"+",
            b"5",
            b"true",
            b"null",
            b"false",
            b"nul",
            b" ",
            b"\n",
            b"\x1f",
            b"\x7f",
            b"\xc3",
            b"\xa9",
            b"\xe2\x82\xac",
            b"\xf0\x9f",
            b"\x98\x80",
            b"abcdefgh",
        ]);
        prop::collection::vec(scrap, 0..14).prop_map(|scraps| scraps.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn accepts_what_a_whole_parse_accepts(body in scraps(), step in 1usize..9) {
            let whole = tell(&body, usize::MAX);
            let naive = serde_json::from_slice::<serde::de::IgnoredAny>(&body).is_ok()
                && core::str::from_utf8(&body).is_ok();
            prop_assert_eq!(whole.1.is_ok(), naive);
            prop_assert_eq!(tell(&body, step), whole);
        }

        #[test]
        fn runs_end_where_a_byte_loop_ends(bytes in prop::collection::vec(prop_oneof![
            8 => 0x20u8..0x7f, 1 => any::<u8>(), 1 => Just(b'"'), 1 => Just(0x80)], 0..64)) {
            let len = bytes.iter().take_while(|b| **b >= 0x20 && **b != b'"' && **b != b'\\').count();
            prop_assert_eq!(plain_run(&bytes), (len, !bytes[..len].is_ascii()));
        }

        #[test]
        fn utf8_in_pieces_is_utf8(bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..8),
            ".{0,6}".prop_map(String::into_bytes)], cut in 0usize..8, damage in any::<u8>(), damaged in any::<bool>()) {
            let mut bytes = bytes;
            let cut = cut.min(bytes.len());
            if damaged && cut < bytes.len() { bytes[cut] = damage; }
            let (mut whole, mut pieces) = (Utf8::new(), Utf8::new());
            let expected = whole.push(&bytes);
            prop_assert_eq!(expected.is_ok() && whole.is_complete(), core::str::from_utf8(&bytes).is_ok());
            let got = pieces.push(&bytes[..cut]).and_then(|()| pieces.push(&bytes[cut..]).map_err(|at| at + cut));
            prop_assert_eq!(got, expected);
        }
    }
}
