//! Finds the few places in a text where a token can be.
//!
//! What: a deterministic automaton of nine states over the text's bytes, compiled into a table when the
//! program is built. It stops at *triggers*: a second digit, a letter after `name-`, an `@` after a word,
//! an escape. Ordinary words, numbers of one digit and punctuation never stop it, so the matchers, which
//! cost some tens of nanoseconds, see only a few words in a hundred.
//!
//! Why: a state is held as a shift amount and a byte's row holds all its successors (a shift-based
//! automaton, after P. Vognsen), so a step is one load and one shift, and no branch depends on the text
//! until a trigger. The triggers only have to be complete: every token that a matcher accepts has one in
//! its first word or right behind it. The oracle in `tests/normalise.rs` checks that.
//!
//! Cost: some 2 cycles a byte; a table of 2 KiB.

/// `0` to `9`.
pub(super) const DIGIT: u16 = 1;
/// `A` to `Z`.
pub(super) const UPPER: u16 = 1 << 1;
/// `a` to `z`.
pub(super) const LOWER: u16 = 1 << 2;
/// Hex digits, both cases.
pub(super) const HEX: u16 = 1 << 3;
/// `+` and `/`.
pub(super) const PLUS_SLASH: u16 = 1 << 4;
/// `-` and `_`.
pub(super) const DASH_LOW: u16 = 1 << 5;
/// `.` and `~`: with the above, RFC 6750's bearer tokens.
const DOT_TILDE: u16 = 1 << 6;
/// `-` and `.`: with letters and digits, host names.
const DASH_DOT: u16 = 1 << 7;
/// What stands between the lines of a PEM body, quoted ones included.
const PEM_SPACE: u16 = 1 << 8;
/// What the user information of a URL may hold, `@` included.
pub(super) const USER_INFO: u16 = 1 << 9;
/// `_`, `+` and `-`: with letters and digits, the atoms of a mail address that people use.
const ATOM_MARK: u16 = 1 << 10;

/// ASCII letters and digits.
pub(super) const WORD: u16 = DIGIT | UPPER | LOWER;
/// Both base64 alphabets of RFC 4648.
pub(super) const BASE64: u16 = WORD | PLUS_SLASH | DASH_LOW;
/// The URL-safe one.
pub(super) const BASE64_URL: u16 = WORD | DASH_LOW;
/// RFC 6750, section 2.1.
pub(super) const BEARER: u16 = BASE64 | DOT_TILDE;
/// A host name, dots included.
pub(super) const HOST: u16 = WORD | DASH_DOT;
/// A PEM body without its dashes.
pub(super) const PEM: u16 = WORD | PLUS_SLASH | PEM_SPACE;
/// An atom of a mail address.
pub(super) const ATOM: u16 = WORD | ATOM_MARK;

static KINDS: [u16; 256] = kinds();

#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a bad index")]
const fn kinds() -> [u16; 256] {
    let mut table = [0; 256];
    let mut b = 0;
    while b < 256 {
        let byte = b as u8;
        let mut kind = match byte {
            b'0'..=b'9' => DIGIT,
            b'A'..=b'Z' => UPPER,
            b'a'..=b'z' => LOWER,
            b'+' => PLUS_SLASH | ATOM_MARK,
            b'/' => PLUS_SLASH,
            b'-' => DASH_LOW | DASH_DOT | ATOM_MARK,
            b'_' => DASH_LOW | ATOM_MARK,
            b'.' => DOT_TILDE | DASH_DOT,
            b'~' => DOT_TILDE,
            b' ' | b'\t' | b'\r' | b'\n' | b'\\' | b'=' | b':' | b',' => PEM_SPACE,
            _ => 0,
        };
        if byte.is_ascii_hexdigit() {
            kind |= HEX;
        }
        // Brackets too are none of it, so an earlier redaction is not taken for a password.
        let delimiter =
            matches!(byte, b'"' | b'\'' | b'`' | b'<' | b'>' | b'/' | b'?' | b'#' | b'\\' | b'[' | b']');
        if byte > b' ' && byte != 0x7f && !delimiter {
            kind |= USER_INFO;
        }
        table[b] = kind;
        b += 1;
    }
    table
}

/// All kinds that `byte` is of.
#[inline(always)]
pub(super) fn kinds_of(byte: u8) -> u16 {
    KINDS.get(usize::from(byte)).copied().unwrap_or(0)
}

/// Whether `byte` is of one of the kinds.
#[inline(always)]
pub(super) fn is(byte: u8, kinds: u16) -> bool {
    kinds_of(byte) & kinds != 0
}

/// Where the run of `kinds` that starts at `from` ends.
#[inline(always)]
pub(super) fn run(text: &[u8], from: usize, kinds: u16) -> usize {
    let rest = text.get(from..).unwrap_or_default();
    from + rest.iter().position(|&byte| !is(byte, kinds)).unwrap_or(rest.len())
}

/// States, as shift amounts.
const BITS: u32 = 6;
/// Behind something that is neither letter nor digit.
const GAP: u8 = 0;
/// In a word of letters (or behind its first).
const LETTERS: u8 = BITS as u8;
/// Behind an `A` that starts a word: of `AKIA`, `ASIA`, `AIza`.
const LETTER_A: u8 = 2 * BITS as u8;
/// Behind a `B` or `b` that starts a word: of `Bearer`, `Basic`, `BEGIN`.
const LETTER_B: u8 = 3 * BITS as u8;
/// Behind a word and one of `-_+/:~%`.
const CONNECTOR: u8 = 4 * BITS as u8;
/// Behind a word and a dot.
const DOT: u8 = 5 * BITS as u8;
/// Behind one digit that starts a word.
const ONE_DIGIT: u8 = 6 * BITS as u8;
/// Behind a `+` or `(` that follows no word: of telephone numbers.
const PLUS: u8 = 7 * BITS as u8;
/// A trigger. Absorbing.
const TRIGGER: u8 = 8 * BITS as u8;

static ROWS: [u64; 256] = rows();

#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a bad index")]
const fn rows() -> [u64; 256] {
    let mut rows = [0u64; 256];
    let mut b = 0;
    while b < 256 {
        let mut state = GAP;
        while state <= TRIGGER {
            rows[b] |= (next(state, b as u8) as u64) << state;
            state += BITS as u8;
        }
        b += 1;
    }
    rows
}

const fn next(state: u8, byte: u8) -> u8 {
    if state == TRIGGER || byte == b'\\' {
        return TRIGGER;
    }
    let digit = byte.is_ascii_digit();
    let letter = byte.is_ascii_alphabetic();
    match state {
        GAP | PLUS => match byte {
            b'0'..=b'9' if state == PLUS => TRIGGER,
            b'0'..=b'9' => ONE_DIGIT,
            b'A' => LETTER_A,
            b'B' | b'b' => LETTER_B,
            _ if letter => LETTERS,
            b'+' | b'(' => PLUS,
            b'%' => TRIGGER,
            _ => GAP,
        },
        LETTERS | LETTER_A | LETTER_B | ONE_DIGIT => match byte {
            _ if digit => TRIGGER,
            _ if letter && state == ONE_DIGIT => TRIGGER,
            b'K' | b'S' | b'I' | b'B' | b'C' if state == LETTER_A => TRIGGER,
            b'a' | b'A' | b'e' | b'E' if state == LETTER_B => TRIGGER,
            _ if letter => LETTERS,
            b'-' | b'_' | b'+' | b'/' | b':' | b'~' | b'%' => CONNECTOR,
            b'.' => DOT,
            b'@' => TRIGGER,
            _ => GAP,
        },
        // A word and `://`, `.x`, `-x`, `--`; but an ellipsis is none.
        CONNECTOR | DOT => match byte {
            b'-' | b'_' | b'+' | b'%' | b'~' => TRIGGER,
            b'/' | b':' | b'@' | b'.' if state == CONNECTOR => TRIGGER,
            b'(' => PLUS,
            _ if letter || digit => TRIGGER,
            _ => GAP,
        },
        _ => TRIGGER,
    }
}

/// Where and why the automaton stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// At an escape: a backslash, or a `%` that follows no word.
    Escape(usize),
    /// At a trigger of the word, `+` or `(` that starts here.
    Word(usize),
    /// At the end of the text; a token may start here.
    Pending(usize),
    /// At the end of the text; nothing is open.
    End,
}

/// Runs over `text` from `from`, which follows nothing that could be part of a token.
#[inline]
pub(super) fn next_stop(text: &[u8], from: usize) -> Stop {
    let mut state = u64::from(GAP);
    let mut at = from;
    for &byte in text.get(from..).unwrap_or_default() {
        let row = ROWS.get(usize::from(byte)).copied().unwrap_or(0);
        let after = (row >> (state & 63)) & 63;
        if after == u64::from(TRIGGER) {
            let plain_gap = state == u64::from(GAP) || state == u64::from(PLUS);
            if byte == b'\\' || (byte == b'%' && plain_gap) {
                return Stop::Escape(at);
            }
            return Stop::Word(start(text, from, at, state as u8));
        }
        state = after;
        at += 1;
    }
    if state == u64::from(GAP) { Stop::End } else { Stop::Pending(start(text, from, at, state as u8)) }
}

/// The start of the word (or `+`, `(`) that led to `state` at `at`, not before `floor`.
fn start(text: &[u8], floor: usize, at: usize, state: u8) -> usize {
    let end = match state {
        CONNECTOR | DOT | PLUS => at.saturating_sub(1),
        _ => at,
    };
    if state == PLUS {
        return end.max(floor);
    }
    let before = text.get(floor..end).unwrap_or_default();
    floor + before.iter().rposition(|&byte| !is(byte, WORD)).map_or(0, |last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_text_never_stops_it() {
        let text =
            b"The order is on its way, to a user: [5 of 7] (all) \"done\"... Really? Yes; call us. {\"a\": 1}";
        assert_eq!(next_stop(text, 0), Stop::End);
    }

    #[test]
    fn triggers_name_the_start_of_the_word() {
        for (text, start) in [
            (&b"at 12"[..], 3),
            (b"mail me@x", 5),
            (b"see http://", 4),
            (b"an AKIA", 3),
            (b"call +4", 5),
            (b"a well-k", 2),
            (b"x, John.S", 3),
        ] {
            assert_eq!(next_stop(text, 0), Stop::Word(start), "{}", text.escape_ascii());
        }
        assert_eq!(next_stop(b"a \\n", 0), Stop::Escape(2));
        assert_eq!(next_stop(b"a %3D", 0), Stop::Escape(2));
        assert_eq!(next_stop(b"a word", 0), Stop::Pending(2));
        assert_eq!(next_stop(b"a word-", 0), Stop::Pending(2));
        assert_eq!(next_stop(b"a (", 0), Stop::Pending(2));
    }
}
