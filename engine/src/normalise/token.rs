//! From the start of a word to a token: which matcher to ask, and what a match says.
//!
//! A matcher looks at most [`WINDOW`] bytes ahead and two bytes back, so what it says depends on nothing
//! else and the text can come in pieces. It accepts the longest prefix of its class that is not followed
//! by a letter or digit. A run without bound (a key, a blob) is judged by its first [`HORIZON`] bytes;
//! the rest of it is then consumed byte by byte.

use super::automaton::{BASE64_URL, DIGIT, LOWER, PEM, UPPER, WORD, is, run};
use super::class::{Class, ClassSet};
use super::{personal, secrets, volatile};

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
                    taken = run(text, taken, kinds);
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
}

impl Word<'_> {
    /// The byte at `at`; 0 behind the end, which ends a word as the end does.
    pub(super) fn byte(&self, at: usize) -> u8 {
        self.window.get(at).copied().unwrap_or(0)
    }

    /// Whether a token may end before `at`.
    pub(super) fn ends(&self, at: usize) -> bool {
        !is(self.byte(at), WORD)
    }

    /// Where the run of `kinds` from `from` ends.
    pub(super) fn run(&self, from: usize, kinds: u16) -> usize {
        run(self.window, from, kinds)
    }

    /// Where the run of `kinds` from `from` ends if it has `min` to `max` bytes.
    pub(super) fn group(&self, from: usize, kinds: u16, min: usize, max: usize) -> Option<usize> {
        let end = self.run(from, kinds);
        (min..=max).contains(&(end - from)).then_some(end)
    }

    /// The bytes from `from` to `to`, or to the end of the window.
    pub(super) fn slice(&self, from: usize, to: usize) -> &[u8] {
        self.window.get(from..to.min(self.window.len())).unwrap_or_default()
    }

    /// Whether the window has `text` at `at`.
    pub(super) fn has(&self, at: usize, text: &[u8]) -> bool {
        self.window.get(at..).is_some_and(|rest| rest.starts_with(text))
    }
}

/// The token of highest precedence among `classes` at the start of `window`.
pub(super) fn at(classes: ClassSet, left: Left, window: &[u8]) -> Option<Match> {
    let len = run(window, 0, WORD);
    let word = Word {
        window,
        left,
        len,
        after: window.get(len).copied().unwrap_or(0),
        first: window.first().copied()?,
    };
    let ask = |class: Class, matcher: fn(&Word<'_>) -> Option<(usize, usize, Tail)>| {
        if !classes.contains(class) {
            return None;
        }
        matcher(&word).map(|(lead, len, tail)| Match { class, lead, len, tail })
    };
    if len == 0 {
        return ask(Class::Phone, personal::phone);
    }
    // By precedence; each group holds what can start with such a byte.
    let letter = is(word.first, UPPER | LOWER);
    let keys = if letter {
        ask(Class::PrivateKey, secrets::private_key)
            .or_else(|| ask(Class::Password, secrets::password))
            .or_else(|| ask(Class::Bearer, secrets::bearer))
            .or_else(|| ask(Class::ApiKey, secrets::api_key))
            .or_else(|| ask(Class::Jwt, volatile::jwt))
    } else {
        None
    };
    keys.or_else(|| ask(Class::Email, personal::email))
        .or_else(|| ask(Class::Traceparent, volatile::traceparent))
        .or_else(|| ask(Class::Uuid, volatile::uuid))
        .or_else(|| if letter { ask(Class::Iban, personal::iban) } else { dates(&ask) })
        .or_else(|| ask(Class::IpAddress, personal::ip_address))
        .or_else(|| if letter { None } else { numbers(&ask) })
        .or_else(|| ask(Class::Id, volatile::id))
        .or_else(|| ask(Class::Hex, volatile::hex))
        .or_else(|| if letter { None } else { ask(Class::Digits, volatile::digits) })
        .or_else(|| ask(Class::Base64, volatile::base64))
}

type Matcher = fn(&Word<'_>) -> Option<(usize, usize, Tail)>;

fn dates(ask: &impl Fn(Class, Matcher) -> Option<Match>) -> Option<Match> {
    ask(Class::Timestamp, volatile::timestamp).or_else(|| ask(Class::HttpDate, volatile::http_date))
}

fn numbers(ask: &impl Fn(Class, Matcher) -> Option<Match>) -> Option<Match> {
    ask(Class::Card, personal::card)
        .or_else(|| ask(Class::Phone, personal::phone))
        .or_else(|| ask(Class::Epoch, volatile::epoch))
}
