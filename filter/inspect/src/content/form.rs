//! Urlencoded forms (WHATWG URL, "application/x-www-form-urlencoded"): the body as one unit, decoded.
//!
//! `%40` and `+` are given as what they stand for, so that an address is recognised and a payload looks the
//! same however it was encoded. Encoded `&`, `=`, `+` and `%` stay as they came, or the fields could not be told
//! apart any more; so does what is no escape.
//!
//! Cost: a search for `%` and one for `+`, and a copy where there is a `+`. Carried over: two bytes.

use super::{BODY, Sink};

/// Bytes of an escape that were read, across pushes.
#[derive(Debug, Default)]
pub(super) struct Form {
    escape: [u8; 2],
    escape_len: usize,
}

impl Form {
    pub(super) fn push(&mut self, chunk: &[u8], base: u64, sink: &mut impl Sink) {
        let mut index = 0;
        while let Some(rest) = chunk.get(index..).filter(|rest| !rest.is_empty()) {
            let at = base + index as u64;
            if self.escape_len > 0 {
                index += self.escape(rest, at, sink);
                continue;
            }
            let plain = memchr::memchr(b'%', rest).unwrap_or(rest.len());
            spaced(rest.get(..plain).unwrap_or_default(), at, sink);
            if plain < rest.len() {
                self.keep(b'%');
            }
            index += plain + 1;
        }
    }

    /// Reads the next byte of an escape; returns how many bytes belong to it.
    fn escape(&mut self, rest: &[u8], at: u64, sink: &mut impl Sink) -> usize {
        let Some(&byte) = rest.first() else { return 0 };
        if !byte.is_ascii_hexdigit() {
            self.give_up(at, sink);
            return 0;
        }
        if self.escape_len == 1 {
            self.keep(byte);
            return 1;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16).unwrap_or(0) as u8;
        let [_, high] = self.escape;
        let decoded = digit(high) << 4 | digit(byte);
        let start = at - 2;
        if matches!(decoded, b'&' | b'=' | b'+' | b'%') {
            self.give_up(at, sink);
            sink.text(BODY, &[byte], at);
        } else {
            self.escape_len = 0;
            sink.text(BODY, &[decoded], start);
        }
        1
    }

    fn keep(&mut self, byte: u8) {
        if let Some(place) = self.escape.get_mut(self.escape_len) {
            *place = byte;
            self.escape_len += 1;
        }
    }

    /// What was kept stands for itself; it ends before `at`.
    fn give_up(&mut self, at: u64, sink: &mut impl Sink) {
        let kept = self.escape.get(..self.escape_len).unwrap_or_default();
        if !kept.is_empty() {
            sink.text(BODY, kept, at - kept.len() as u64);
        }
        self.escape_len = 0;
    }

    pub(super) fn finish(&mut self, body_bytes: u64, sink: &mut impl Sink) {
        self.give_up(body_bytes, sink);
    }
}

/// Most bytes that are copied at once.
const COPIED: usize = 256;

/// Gives text without escapes, with spaces in place of `+`. In long pieces: each costs the sink as much as
/// some twenty bytes do.
fn spaced(text: &[u8], at: u64, sink: &mut impl Sink) {
    if memchr::memchr(b'+', text).is_none() {
        if !text.is_empty() {
            sink.text(BODY, text, at);
        }
        return;
    }
    let mut copy = [0; COPIED];
    for (piece, number) in text.chunks(COPIED).zip(0..) {
        for (copied, &byte) in copy.iter_mut().zip(piece) {
            *copied = if byte == b'+' { b' ' } else { byte };
        }
        sink.text(BODY, copy.get(..piece.len()).unwrap_or_default(), at + number * COPIED as u64);
    }
}
