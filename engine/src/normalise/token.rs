//! From the start of a word to a token: which matcher to ask, and what a match says.
//!
//! A matcher looks at most [`WINDOW`] bytes ahead and two bytes back, so what it says depends on nothing
//! else and the text can come in pieces. It accepts the longest prefix of its class that is not followed
//! by a letter or digit. A run without bound (a key, a blob) is judged by its first [`HORIZON`] bytes;
//! the rest of it is then consumed byte by byte.

use core::cell::Cell;

use super::automaton::{BASE64_URL, DASH_LOW, DIGIT, LOWER, PEM, PLUS_SLASH, UPPER, WORD, is, kinds_of, run};
use super::class::{Class, ClassSet};
use super::{personal, secrets, volatile};
use crate::bitmap::{Block64, digits, equal, letters};

/// How far ahead of its first byte a token is decided.
pub(super) const WINDOW: usize = 256;

/// How much of a run without bound is looked at before it is taken whole.
pub(super) const HORIZON: usize = 64;

/// The text before a token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    /// The byte before; 0 at the start of the text.
    pub(super) last: u8,
    /// The byte before that.
    pub(super) before_last: u8,
}

impl Left {
    /// Nothing, or nothing that matters.
    pub(super) const NONE: Self = Self { last: 0, before_last: 0 };
}

/// How a token goes on after the bytes that decided it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tail {
    /// Not at all.
    None,
    /// With bytes of these kinds.
    Run(u16),
    /// With bytes of these kinds, then at most two `=`.
    Padded(u16),
    /// With this many more `=` at most.
    Padding(u8),
    /// With base64url, and dots between it.
    Dotted,
    /// With the lines of a PEM body; so many dashes have come in a row.
    PemBody(u8),
    /// With the label of the line that ends it.
    PemLabel,
    /// With that line's dashes.
    PemDashes,
}

impl Tail {
    /// Takes what belongs to the token from the front of `text`: how many bytes, and whether the token is
    /// known to end there. It is not if `text` is used up, or may be continued by what follows it.
    pub(super) fn consume(&mut self, text: &[u8], at_end: bool) -> (usize, bool) {
        let mut taken = 0;
        loop {
            match *self {
                Self::None | Self::Padding(0) => return (taken, true),
                Self::Run(kinds) => {
                    taken = run(text, taken, kinds);
                    return (taken, taken < text.len());
                }
                Self::Padded(kinds) => {
                    taken = run(text, blob_blocks(text), kinds);
                    if taken == text.len() {
                        return (taken, false);
                    }
                    *self = Self::Padding(2);
                }
                Self::Padding(left) => match text.get(taken) {
                    Some(b'=') => {
                        *self = Self::Padding(left - 1);
                        taken += 1;
                    }
                    other => return (taken, other.is_some()),
                },
                Self::Dotted => {
                    taken = run(text, taken, BASE64_URL);
                    match (text.get(taken), text.get(taken + 1)) {
                        (Some(b'.'), Some(&next)) if is(next, BASE64_URL) => taken += 1,
                        (Some(b'.'), None) if !at_end => return (taken, false),
                        (other, _) => return (taken, other.is_some()),
                    }
                }
                Self::PemBody(dashes) => match text.get(taken) {
                    Some(b'-') => {
                        *self = if dashes == 4 { Self::PemLabel } else { Self::PemBody(dashes + 1) };
                        taken += 1;
                    }
                    Some(&byte) if is(byte, PEM) => {
                        *self = Self::PemBody(0);
                        taken += 1;
                    }
                    other => return (taken, other.is_some()),
                },
                Self::PemLabel => match text.get(taken) {
                    Some(b'-') => *self = Self::PemDashes,
                    Some(&byte) if byte == b' ' || is(byte, UPPER | DIGIT) => taken += 1,
                    other => return (taken, other.is_some()),
                },
                Self::PemDashes => match text.get(taken) {
                    Some(b'-') => taken += 1,
                    other => return (taken, other.is_some()),
                },
            }
        }
    }
}

/// Bytes of the whole blocks of 64 at the front of `text` that hold base64 and nothing else.
fn blob_blocks(text: &[u8]) -> usize {
    let of_blob = |bytes| {
        let signs = equal(bytes, b'+') | equal(bytes, b'/') | equal(bytes, b'-') | equal(bytes, b'_');
        letters(bytes) | digits(bytes) | signs
    };
    let blocks = text.as_chunks::<64>().0.iter();
    64 * blocks.take_while(|block| Block64::new(*block).bits(of_blob) == u64::MAX).count()
}

/// A token at the front of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Match {
    pub(super) class: Class,
    /// Bytes before the token that told it is one (`Bearer `) and stay.
    pub(super) lead: usize,
    /// Bytes of the token that are sure.
    pub(super) len: usize,
    pub(super) tail: Tail,
}

/// The front of a window: its first word and what is known of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Word<'a> {
    /// From the word's first byte, at most [`WINDOW`] bytes.
    pub(super) window: &'a [u8],
    pub(super) left: Left,
    /// Bytes up to the first that is neither letter nor digit.
    pub(super) len: usize,
    /// The byte after them; 0 at the end of the text.
    pub(super) after: u8,
    /// The word's first byte.
    pub(super) first: u8,
    /// Set when what is said depends on the window's end, which more text may move.
    pub(super) looked_behind: &'a Cell<bool>,
}

impl Word<'_> {
    /// The byte at `at`; 0 behind the end, which ends a word as the end does.
    pub(super) fn byte(&self, at: usize) -> u8 {
        self.window.get(at).copied().unwrap_or_else(|| self.behind())
    }

    /// Whether a token may end before `at`.
    pub(super) fn ends(&self, at: usize) -> bool {
        !is(self.byte(at), WORD)
    }

    /// Where the run of `kinds` from `from` ends.
    pub(super) fn run(&self, from: usize, kinds: u16) -> usize {
        self.run_within(from, kinds, WINDOW)
    }

    /// As [`Self::run`], but for at most `most` bytes.
    pub(super) fn run_within(&self, from: usize, kinds: u16, most: usize) -> usize {
        let reach = self.window.get(..from + most).unwrap_or(self.window);
        let end = run(reach, from, kinds);
        if end >= self.window.len() {
            self.behind();
        }
        end
    }

    /// What stands behind the window: nothing that is known.
    #[cold]
    fn behind(&self) -> u8 {
        self.looked_behind.set(true);
        0
    }

    /// Where the run of `kinds` from `from` ends if it has `min` to `max` bytes.
    pub(super) fn group(&self, from: usize, kinds: u16, min: usize, max: usize) -> Option<usize> {
        let end = self.run(from, kinds);
        (min..=max).contains(&(end - from)).then_some(end)
    }

    /// The bytes from `from` to `to`, or to the end of the window.
    pub(super) fn slice(&self, from: usize, to: usize) -> &[u8] {
        if to > self.window.len() {
            self.behind();
        }
        self.window.get(from..to.min(self.window.len())).unwrap_or_default()
    }

    /// Whether the window has `text` at `at`.
    pub(super) fn has(&self, at: usize, text: &[u8]) -> bool {
        if at + text.len() > self.window.len() {
            self.behind();
        }
        self.window.get(at..).is_some_and(|rest| rest.starts_with(text))
    }
}

/// Classes of which a token may start with a word, by its first byte, its length and the byte after it.
fn candidates(word: &Word<'_>) -> ClassSet {
    const NONE: ClassSet = ClassSet::NONE;
    let (len, after) = (word.len, word.after);
    let mut set = match after {
        b'@' | b'+' | b'%' => NONE.with(Class::Email),
        b'.' | b'_' | b'-' => NONE.with(Class::Email).with(Class::Id),
        _ => NONE,
    };
    if after == b'-' {
        set = set.with(Class::Traceparent).with(Class::Uuid);
    }
    if len <= 4 && matches!(after, b'.' | b':') {
        set = set.with(Class::IpAddress);
    }
    if len >= 16 || is(after, PLUS_SLASH | DASH_LOW) {
        set = set.with(Class::Hex).with(Class::Base64).with(Class::Id);
    }
    if is(word.first, UPPER | LOWER) {
        if word.first == b'e' {
            set = set.with(Class::Jwt);
        }
        if word.first == b'A' || len <= 6 && matches!(after, b'.' | b'_' | b'-') {
            set = set.with(Class::ApiKey);
        }
        if len >= 4 && is(word.byte(2), DIGIT) {
            set = set.with(Class::Iban);
        }
        if after == b':' {
            set = set.with(Class::Password);
        }
        if matches!(len, 5 | 6) && after == b' ' {
            set = set.with(Class::PrivateKey).with(Class::Password).with(Class::Bearer);
        }
        return set;
    }
    if len == 0 {
        return NONE.with(Class::Phone);
    }
    if len >= 6 {
        set = set.with(Class::Digits).with(Class::Epoch).with(Class::Card).with(Class::Timestamp);
    }
    if matches!(after, b' ' | b'-' | b'.') {
        set = set.with(Class::Card).with(Class::HttpDate).with(Class::Phone).with(Class::Timestamp);
    }
    set
}

/// Looks at the front of a window before the whole of it is there: how many bytes can be skipped because
/// no token of `classes` starts in them. Nothing if that takes the matchers, or more of the text.
///
/// A chain is a run of words with signs of base64 and dots between them. Without `@` behind it, a space,
/// a colon or a bracket, one of five bytes is too short for any token, and one of 14 for any without a digit.
pub(super) fn skip(classes: ClassSet, text: &[u8]) -> Option<usize> {
    const SHORT: usize = 6;
    const SHORT_WITHOUT_DIGIT: usize = 15;
    let (mut kinds, mut chain, mut word_end) = (0u16, 0, None);
    for &byte in text.iter().take(SHORT_WITHOUT_DIGIT) {
        let kind = kinds_of(byte);
        if kind & WORD == 0 && word_end.is_none() {
            word_end = Some(chain);
        }
        if kind & (WORD | PLUS_SLASH | DASH_LOW) == 0 && byte != b'.' {
            break;
        }
        kinds |= kind;
        chain += 1;
    }
    let first_is_word = word_end != Some(0);
    let after = text.get(chain).copied()?;
    let most = if kinds & DIGIT == 0 { SHORT_WITHOUT_DIGIT } else { SHORT };
    if first_is_word && chain < most && !matches!(after, b'@' | b'%' | b':' | b' ' | b'(') {
        return Some(chain);
    }
    let len = word_end.filter(|&end| end > 0)?;
    let word = Word {
        window: text,
        left: Left::NONE,
        len,
        after: *text.get(len)?,
        first: *text.first()?,
        looked_behind: &Cell::new(false),
    };
    if candidates(&word).intersects(classes) { None } else { Some(len) }
}

/// The token of highest precedence among `classes` at the start of `window`. `looked_behind` is set if
/// more text could change that.
pub(super) fn at(classes: ClassSet, left: Left, window: &[u8], looked_behind: &Cell<bool>) -> Option<Match> {
    let len = run(window, 0, WORD);
    let word = Word {
        window,
        left,
        len,
        after: window.get(len).copied().unwrap_or(0),
        first: window.first().copied()?,
        looked_behind,
    };
    if len == window.len() {
        word.behind();
    }
    // Bit by bit from the lowest, which is the highest precedence.
    let mut candidates = candidates(&word).intersection(classes).bits();
    while candidates != 0 {
        let &(class, matcher) = MATCHERS.get(candidates.trailing_zeros() as usize)?;
        if let Some((lead, len, tail)) = matcher(&word) {
            return Some(Match { class, lead, len, tail });
        }
        candidates &= candidates - 1;
    }
    None
}

/// Bytes before the token, its bytes, its tail.
pub(super) type Shape = (usize, usize, Tail);

type Matcher = fn(&Word<'_>) -> Option<Shape>;

/// By precedence, which is the order of [`Class::ALL`].
const MATCHERS: [(Class, Matcher); 19] = [
    (Class::PrivateKey, secrets::private_key),
    (Class::Password, secrets::password),
    (Class::Bearer, secrets::bearer),
    (Class::ApiKey, secrets::api_key),
    (Class::Jwt, volatile::jwt),
    (Class::Email, personal::email),
    (Class::Traceparent, volatile::traceparent),
    (Class::Uuid, volatile::uuid),
    (Class::Timestamp, volatile::timestamp),
    (Class::HttpDate, volatile::http_date),
    (Class::Iban, personal::iban),
    (Class::IpAddress, personal::ip_address),
    (Class::Card, personal::card),
    (Class::Phone, personal::phone),
    (Class::Epoch, volatile::epoch),
    (Class::Id, volatile::id),
    (Class::Hex, volatile::hex),
    (Class::Digits, volatile::decimal),
    (Class::Base64, volatile::base64),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matchers_stand_where_their_bits_say() {
        assert_eq!(MATCHERS.map(|(class, _)| class), Class::ALL);
        for (i, class) in Class::ALL.into_iter().enumerate() {
            assert_eq!(ClassSet::NONE.with(class).bits(), 1 << i);
        }
    }
}
