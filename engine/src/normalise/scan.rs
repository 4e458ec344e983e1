//! The streaming scanner: text in, in pieces; text and tokens out, in order.
//!
//! What: the automaton finds the words that may start a token, the matchers decide, and what is not yet
//! decided at the end of a piece (at most [`WINDOW`] bytes) is kept until more comes. Every split of the
//! text gives the same tokens, since a decision needs the whole window or the end of the text. A token
//! without bound is counted, not kept.
//!
//! Cost: see [`super::automaton`]; at a seam between pieces up to three windows are copied once.

use alloc::vec::Vec;
use core::cell::Cell;

use super::automaton::{self, HEX, WORD, is, run};
use super::class::{Class, ClassSet};
use super::find::{self, NARROW, Stop, Why};
use super::token::{self, Left, Tail, WINDOW};

/// What the scanner found next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// Text that is no token. It may come in any number of pieces.
    Text {
        /// The bytes.
        text: &'a [u8],
        /// Where they stand in the text.
        offset: u64,
        /// Where they stand in the message body.
        body_start: u64,
    },
    /// A token.
    Token {
        /// What it is.
        class: Class,
        /// Where it starts in the text.
        offset: u64,
        /// Its length in the text, bytes.
        len: u64,
        /// Where its first byte came from in the message body.
        body_start: u64,
        /// One past where its last byte came from in the message body.
        body_end: u64,
    },
}

/// Text, and where in the message body its parts came from. Within a part, positions advance one for one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sourced<'a> {
    text: &'a [u8],
    /// Of a longer text, of which this is a stretch from `from` on: the part that its first byte is in, and
    /// those behind.
    parts: &'a [Part],
    from: usize,
}

/// Bytes from `at` on came from `body` on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Part {
    pub(crate) at: u16,
    pub(crate) body: u64,
}

impl<'a> Sourced<'a> {
    /// The first of the parts stands at 0, the others behind it in order.
    pub(crate) fn new(text: &'a [u8], parts: &'a [Part]) -> Self {
        Self { text, parts, from: 0 }
    }

    /// The bytes.
    #[inline(always)]
    pub(crate) fn text(self) -> &'a [u8] {
        self.text
    }

    /// The bytes from `from` to `to`.
    pub(crate) fn slice(self, from: usize, to: usize) -> Self {
        let text = self.text.get(from..to).unwrap_or_default();
        let from = self.from + from;
        let behind = self.parts.partition_point(|part| usize::from(part.at) <= from);
        Self { text, parts: self.parts.get(behind.saturating_sub(1)..).unwrap_or_default(), from }
    }

    /// Where the byte at `i` came from in the body.
    pub(crate) fn body(self, i: usize) -> u64 {
        let i = self.from + i;
        let behind = self.parts.partition_point(|part| usize::from(part.at) <= i);
        let part = behind.checked_sub(1).and_then(|at| self.parts.get(at)).copied().unwrap_or_default();
        part.body + (i - usize::from(part.at)) as u64
    }

    /// Where the parts begin, in the text and in the body.
    fn origins(self) -> impl Iterator<Item = (usize, u64)> + 'a {
        let origin = move |part: &Part| match usize::from(part.at).checked_sub(self.from) {
            Some(at) => (at, part.body),
            None => (0, part.body + (self.from - usize::from(part.at)) as u64),
        };
        self.parts.iter().map(origin).take_while(move |&(at, _)| at < self.text.len())
    }
}

/// From here on in the text, positions in the body advance one for one.
#[derive(Clone, Copy, Debug)]
struct Origin {
    offset: u64,
    body: u64,
}

/// A token whose end has not come.
#[derive(Clone, Copy, Debug)]
struct Open {
    class: Class,
    offset: u64,
    len: u64,
    body_start: u64,
    body_end: u64,
    tail: Tail,
}

/// Finds the tokens of one text.
#[derive(Clone, Debug)]
pub struct Scanner {
    classes: ClassSet,
    /// Bytes that have come and are not decided.
    kept: Vec<u8>,
    /// Offset of the first undecided byte.
    offset: u64,
    /// Bytes that have come.
    received: u64,
    /// By rising offset; the first covers the byte at `offset`.
    origins: Vec<Origin>,
    left: Left,
    /// The first undecided byte goes on a word that starts no token.
    in_word: bool,
    open: Option<Open>,
}

impl Scanner {
    /// Looks for tokens of these classes.
    pub fn new(classes: ClassSet) -> Self {
        Self {
            classes,
            kept: Vec::new(),
            offset: 0,
            received: 0,
            origins: Vec::new(),
            left: Left::NONE,
            in_word: false,
            open: None,
        }
    }

    /// Takes the text's next bytes, which stand at `body_offset` in the message body.
    pub fn push(&mut self, text: &[u8], body_offset: u64, found: &mut impl FnMut(Found<'_>)) {
        self.push_sourced(Sourced::new(text, &[Part { at: 0, body: body_offset }]), found);
    }

    /// As [`Self::push`] of each of its parts.
    pub(super) fn push_sourced(&mut self, text: Sourced<'_>, found: &mut impl FnMut(Found<'_>)) {
        self.note(text);
        let mut rest = text.text();
        // What was kept and enough of the new bytes to decide all of it.
        while !self.kept.is_empty() && !rest.is_empty() {
            let mut joined = core::mem::take(&mut self.kept);
            let old = joined.len();
            let (more, behind) = rest.split_at(rest.len().min(2 * WINDOW));
            joined.extend_from_slice(more);
            let decided = self.scan(&joined, false, found);
            if decided >= old {
                joined.clear();
                rest = rest.get(decided - old..).unwrap_or_default();
            } else {
                joined.drain(..decided);
                rest = behind;
            }
            self.kept = joined;
        }
        if !rest.is_empty() {
            let decided = self.scan(rest, false, found);
            self.kept.extend_from_slice(rest.get(decided..).unwrap_or_default());
        }
    }

    /// Nothing is undecided, and what comes next does not depend on what came before.
    pub(super) fn is_idle(&self) -> bool {
        // Of the narrow classes, these are the bytes before a token that matter.
        let alone = !matches!(self.left.last, b'-' | b'_' | b'.');
        alone
            && self.kept.is_empty()
            && self.open.is_none()
            && !self.in_word
            && NARROW.contains_all(self.classes)
    }

    /// Nothing came, and what comes depends on nothing.
    pub(super) fn is_at_start(&self) -> bool {
        self.received == 0 && self.is_idle()
    }

    /// Takes bytes that are known to hold no token and to leave nothing undecided, while idle. What comes
    /// next must say where it came from.
    pub(super) fn pass(&mut self, text: &[u8]) {
        self.origins.clear();
        self.received += text.len() as u64;
        self.offset = self.received;
        self.left = left_of(self.left, text, text.len());
    }

    /// Takes the text's last bytes and ends it: as [`Self::push`] and [`Self::finish`], but what comes in
    /// one piece is looked at once.
    pub fn finish_with(mut self, text: &[u8], body_offset: u64, found: &mut impl FnMut(Found<'_>)) {
        self.finish_with_sourced(Sourced::new(text, &[Part { at: 0, body: body_offset }]), found);
    }

    /// As [`Self::finish_with`]; what comes next is another text, after [`Self::restart`].
    pub(super) fn finish_with_sourced(&mut self, text: Sourced<'_>, found: &mut impl FnMut(Found<'_>)) {
        if !self.kept.is_empty() {
            self.push_sourced(text, found);
            return self.end(found);
        }
        self.note(text);
        self.scan(text.text(), true, found);
    }

    /// Says what was still undecided: the text has ended.
    pub fn finish(mut self, found: &mut impl FnMut(Found<'_>)) {
        self.end(found);
    }

    fn end(&mut self, found: &mut impl FnMut(Found<'_>)) {
        let kept = core::mem::take(&mut self.kept);
        self.scan(&kept, true, found);
    }

    /// As a new one for these classes, in the memory of this one.
    pub(super) fn restart(&mut self, classes: ClassSet) {
        let (mut kept, mut origins) = (core::mem::take(&mut self.kept), core::mem::take(&mut self.origins));
        kept.clear();
        origins.clear();
        *self = Self { kept, origins, ..Self::new(classes) };
    }

    /// Text comes.
    fn note(&mut self, text: Sourced<'_>) {
        for (at, body) in text.origins() {
            let offset = self.received + at as u64;
            let expected = self.origins.last().map(|last| last.body + (offset - last.offset));
            if expected == Some(body) {
                continue;
            }
            if self.offset == offset {
                // Nothing is undecided, so no earlier origin is needed.
                self.origins.clear();
            }
            self.origins.push(Origin { offset, body });
        }
        self.received += text.text().len() as u64;
    }

    /// Where the byte at `offset` came from.
    fn body(&self, offset: u64) -> u64 {
        let behind = self.origins.partition_point(|origin| origin.offset <= offset);
        let origin = behind.checked_sub(1).and_then(|at| self.origins.get(at));
        origin.map_or(offset, |origin| origin.body + (offset - origin.offset))
    }

    /// Decides as much of `text`, the undecided bytes, as can be; returns how much that is.
    fn scan(&mut self, text: &[u8], at_end: bool, found: &mut impl FnMut(Found<'_>)) -> usize {
        let before = self.left;
        let mut told = 0;
        let mut at = 0;
        // What stands behind an escape or a token stands behind no letter, though either may end with one:
        // so a redacted text, which has a bracket there, holds no token that its source did not.
        let mut boundary = None;
        let left_at = |boundary: Option<usize>, at: usize| {
            if boundary == Some(at) { Left::NONE } else { left_of(before, text, at) }
        };
        let decided = loop {
            if let Some(mut open) = self.open.take() {
                let (taken, ended) = open.tail.consume(text.get(at..).unwrap_or_default(), at_end);
                at += taken;
                told = at;
                open.len += taken as u64;
                if taken > 0 {
                    open.body_end = self.body(self.offset + at as u64 - 1) + 1;
                }
                if !ended && !at_end {
                    self.open = Some(open);
                    break at;
                }
                let Open { class, offset, len, body_start, body_end, .. } = open;
                found(Found::Token { class, offset, len, body_start, body_end });
                boundary = Some(at);
                // Only a run longer than the horizon ends inside a word.
                self.in_word =
                    at.checked_sub(1).and_then(|last| text.get(last)).is_some_and(|&b| is(b, WORD))
                        || at == 0 && is(before.last, WORD);
            }
            if self.in_word {
                at = run(text, at, WORD);
                if at == text.len() {
                    break at;
                }
                self.in_word = false;
            }
            let stop = self.next(text, at, boundary == Some(at), at_end);
            let start = stop.at;
            if stop.behind_escape {
                boundary = Some(start);
            }
            match stop.why {
                Why::End => break text.len(),
                Why::Pending if at_end || text.len() - start >= WINDOW => {
                    // So many letters, or such an end: no token starts like that.
                    let word_end = run(text, start, WORD);
                    self.in_word = word_end == text.len();
                    break if at_end { text.len() } else { word_end };
                }
                Why::Pending => break start,
                Why::Word => {}
            }
            let window = text.get(start..).unwrap_or_default();
            let window = window.get(..WINDOW).unwrap_or(window);
            let left = left_at(boundary, start);
            let looked_behind = Cell::new(false);
            let token = token::at(self.classes, left, window, &looked_behind);
            if looked_behind.get() && window.len() < WINDOW && !at_end {
                break start;
            }
            if let Some(found_here) = token {
                let from = start + found_here.lead;
                at = from + found_here.len;
                self.tell(text, told, from, found);
                let offset = self.offset + from as u64;
                self.open = Some(Open {
                    class: found_here.class,
                    offset,
                    len: found_here.len as u64,
                    body_start: self.body(offset),
                    body_end: self.body(self.offset + at as u64 - 1) + 1,
                    tail: found_here.tail,
                });
                told = at;
            } else {
                at = run(text, start, WORD).max(start + 1);
                self.in_word = at == text.len() && is(text.last().copied().unwrap_or(0), WORD);
            }
        };
        self.tell(text, told, decided, found);
        self.left = left_at(boundary, decided);
        self.offset += decided as u64;
        let covering = self.origins.iter().rposition(|origin| origin.offset <= self.offset);
        self.origins.drain(..covering.unwrap_or(0));
        decided
    }

    /// Where the next token may start, from `at` on.
    fn next(&self, text: &[u8], mut at: usize, mut behind_escape: bool, at_end: bool) -> Stop {
        if NARROW.contains_all(self.classes) {
            return find::next(text, at, behind_escape, at_end, self.classes.contains(Class::Base64));
        }
        loop {
            let (why, start) = match automaton::next_stop(text, at) {
                automaton::Stop::End => (Why::End, text.len()),
                automaton::Stop::Pending(start) => (Why::Pending, start),
                automaton::Stop::Word(start) => (Why::Word, start),
                automaton::Stop::Escape(start) => match escape(text.get(start..).unwrap_or_default()) {
                    None if !at_end => (Why::Pending, start),
                    len => {
                        at = (start + len.unwrap_or(1)).min(text.len());
                        behind_escape = true;
                        continue;
                    }
                },
            };
            if why == Why::Word
                && let Some(len) = token::skip(self.classes, text.get(start..).unwrap_or_default())
            {
                (at, behind_escape) = (start + len, false);
                continue;
            }
            return Stop { why, at: start, behind_escape: behind_escape && start == at };
        }
    }

    /// Emits `text[from..to]`, split where its origin jumps.
    fn tell(&self, text: &[u8], from: usize, to: usize, found: &mut impl FnMut(Found<'_>)) {
        let (mut from, to) = (self.offset + from as u64, self.offset + to as u64);
        let mut behind = self.origins.partition_point(|origin| origin.offset <= from);
        while from < to {
            let until = self.origins.get(behind).map_or(to, |next| next.offset.min(to));
            let piece = text.get((from - self.offset) as usize..(until - self.offset) as usize);
            let origin = behind.checked_sub(1).and_then(|at| self.origins.get(at));
            let body_start = origin.map_or(from, |origin| origin.body + (from - origin.offset));
            found(Found::Text { text: piece.unwrap_or_default(), offset: from, body_start });
            (from, behind) = (until, behind + 1);
        }
    }
}

/// The two bytes before `text[at]`, `before` being those before `text`.
fn left_of(before: Left, text: &[u8], at: usize) -> Left {
    let byte = |back: usize| at.checked_sub(back).and_then(|at| text.get(at)).copied();
    match (byte(1), byte(2)) {
        (None, _) => before,
        (Some(last), None) => Left { last, before_last: before.last },
        (Some(last), Some(before_last)) => Left { last, before_last },
    }
}

/// Length of the escape at the front of `text`: `\n`, `\u0026`, `%3D`; 1 if it is none, nothing if more
/// of the text has to be seen. Text inside a tool call's arguments or a query is escaped once more.
pub(super) fn escape(text: &[u8]) -> Option<usize> {
    let hex = |from: usize, count: usize| {
        text.get(from..from + count).map(|digits| digits.iter().all(|&b| is(b, HEX)))
    };
    Some(match text {
        [b'%', ..] => {
            if hex(1, 2)? {
                3
            } else {
                1
            }
        }
        [_, b'u', ..] => {
            if hex(2, 4)? {
                6
            } else {
                1
            }
        }
        [_, b'b' | b'f' | b'n' | b'r' | b't' | b'"' | b'/' | b'\\', ..] => 2,
        [_, _, ..] => 1,
        _ => return None,
    })
}
