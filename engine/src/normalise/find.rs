//! Finds where one of a few narrow classes of token may start, 64 bytes at a time.
//!
//! What: for [`NARROW`] classes (all of [`super::DEFAULT_NORMALISED`]) the first word of a token is told
//! by its length, its first byte and the byte behind it: eight characters and a hyphen for a UUID, ten
//! digits for an epoch, a known prefix for an identifier, signs up to an `@` for a mail address. Letters,
//! digits and signs are found as bit sets (see [`crate::bitmap`]), so only words that begin with a digit
//! or that a sign follows are looked at.
//!
//! Why: it is the way that every scored byte takes. [`super::automaton`] knows all classes and stops for
//! most words with a digit, which costs more than the coder.
//!
//! Cost: about three instructions a byte, twenty for each word that is looked at.
//!
//! Left out on purpose: other classes; what they can start with is too much for it to pay.

use core::cell::Cell;

use wide::u8x16;

use super::class::{Class, ClassSet};
use super::personal::MAX_LOCAL;
use super::scan::escape;
use super::volatile::{MAX_PREFIX, MIN_BASE64, MIN_COMPACT_TIME, Mix, PREFIX_WORDS};
use crate::bitmap::{Block64, below, digits, equal, letters};

/// What this can find.
pub(super) const NARROW: ClassSet = ClassSet::NONE
    .with(Class::Email)
    .with(Class::Traceparent)
    .with(Class::Uuid)
    .with(Class::Timestamp)
    .with(Class::HttpDate)
    .with(Class::Epoch)
    .with(Class::Id)
    .with(Class::Base64);

/// Why the search stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// A word that may start a token.
    Word,
    /// A word or an escape that more text may go on with.
    Pending,
    /// The end of the text, and nothing is open.
    End,
}

/// Where the search stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stop {
    pub(super) why: Why,
    pub(super) at: usize,
    /// An escape stands right before it.
    pub(super) behind_escape: bool,
}

/// Looks from `from` on, which is not inside a word; `behind_escape` tells what stands before it, and `blobs_wanted`
/// whether anybody wants to know of base64.
pub(super) fn next(
    text: &[u8],
    mut from: usize,
    mut behind_escape: bool,
    at_end: bool,
    blobs_wanted: bool,
) -> Stop {
    loop {
        let rest = text.get(from..).unwrap_or_default();
        let stop = |why, at, behind_escape| Stop { why, at: from + at, behind_escape };
        if rest.is_empty() {
            return stop(Why::End, 0, behind_escape);
        }
        let block = Block64::new(rest);
        let mut len = rest.len().min(64);
        let is_digit = block.bits(digits);
        let is_word = block.bits(letters) | is_digit;
        let mut words = is_word;
        let percents = block.bits(|bytes| equal(bytes, b'%'));
        let ats = block.bits(|bytes| equal(bytes, b'@'));
        let local_signs = block.bits(local_sign);
        let slashes = block.bits(|bytes| equal(bytes, b'/'));
        let mut escapes = percents | block.bits(|bytes| equal(bytes, b'\\'));
        // Bit i is set if an escape ends before byte i.
        let mut boundaries = u64::from(behind_escape);
        let mut open_escape = false;
        let mut reach = len;
        let mut last_escape_end = 0;
        while escapes != 0 {
            let at = escapes.trailing_zeros() as usize;
            let Some(taken) = escape(rest.get(at..).unwrap_or_default()).or(at_end.then_some(1)) else {
                (len, reach, open_escape) = (at, at, true);
                break;
            };
            last_escape_end = at + taken;
            let inside = below(last_escape_end) & !below(at);
            words &= !inside;
            escapes &= !inside;
            boundaries |= 1u64.checked_shl(last_escape_end as u32).unwrap_or(0);
            reach = reach.max(last_escape_end);
        }
        words &= below(len);
        let text_ends = len == rest.len() || open_escape;
        // What the block or the text cuts waits for the next block or more text: a word, or what may be a blob.
        let may_go_on = reach == len && !(text_ends && at_end);
        let ends_with = |bits: u64| len.checked_sub(1).is_some_and(|last| bits >> last & 1 == 1);
        let last_run = |bits: u64| 64 - (!bits & below(len)).leading_zeros() as usize;
        let mut cut = may_go_on && ends_with(words);
        let mut cut_at = if cut { last_run(words) } else { len };
        if cut && cut_at == 0 && !text_ends {
            // So long a word is looked at as a whole by whoever asks.
            return stop(Why::Word, 0, behind_escape);
        }
        // With dots, which no blob has: whether there is one to look for.
        let chain = is_word | local_signs | slashes;
        let cut_chain = may_go_on && ends_with(chain) && last_run(chain) < cut_at;
        let mut blobs = 0;
        if blobs_wanted && (runs_of_32(chain) != 0 || cut_chain) {
            let chain = chain & !block.bits(|bytes| equal(bytes, b'.'));
            let starts = words & !(words << 1);
            let mut ask = starts & runs_of_32(chain);
            while ask != 0 {
                let at = ask.trailing_zeros() as usize;
                blobs |= u64::from(Mix::new(&block, chain, at).may_be_random()) << at;
                // What begins further on in the same run has less of everything.
                ask &= !below(at + (!(chain >> at)).trailing_zeros() as usize);
            }
            if may_go_on && ends_with(chain) {
                let mut open = starts & !below(last_run(chain));
                if open & 1 == 1 && !text_ends {
                    // All bytes that decide are here.
                    if blobs & 1 == 1 {
                        return stop(Why::Word, 0, behind_escape);
                    }
                    open &= open - 1;
                }
                if open != 0 {
                    (cut, cut_at) = (true, cut_at.min(open.trailing_zeros() as usize));
                }
            }
        }
        let (local, local_behind) = (words | local_signs, Cell::new(None));
        if cut {
            words &= below(cut_at);
        }

        let starts = words & !(words << 1);
        let mut look = starts & (is_digit | blobs);
        let mut signed = (words << 1) & !words & (local_signs | ats | percents);
        while signed != 0 {
            let gaps = !words & (below(signed.trailing_zeros() as usize));
            look |= 1 << (64 - gaps.leading_zeros());
            signed &= signed - 1;
        }
        while look != 0 {
            let start = look.trailing_zeros() as usize;
            look &= look - 1;
            let end = start + (!(words >> start)).trailing_zeros() as usize;
            let all_digits = (!(is_digit >> start)).trailing_zeros() as usize >= end - start;
            let open = !(text_ends && at_end);
            let word = Word { start, end, all_digits, local, local_behind: &local_behind, len, open };
            if blobs >> start & 1 == 1 || word.may_start_token(rest) {
                return stop(Why::Word, start, boundaries >> start & 1 == 1);
            }
        }

        let (start, behind) = if cut {
            (cut_at, boundaries >> cut_at & 1 == 1)
        } else {
            let behind = if reach == 0 { behind_escape } else { last_escape_end == reach };
            (reach, behind)
        };
        if text_ends && (cut || open_escape) {
            return stop(Why::Pending, start, behind);
        }
        (from, behind_escape) = (from + start, behind);
    }
}

/// Where 32 set bits in a row begin, as many as a blob has at least.
fn runs_of_32(bits: u64) -> u64 {
    const { assert!(MIN_BASE64 == 32) };
    [1, 2, 4, 8, 16].into_iter().fold(bits, |runs, by| runs & runs >> by)
}

/// A whole word in a block.
struct Word<'a> {
    start: usize,
    end: usize,
    all_digits: bool,
    /// What a mail address may have before its `@`.
    local: u64,
    /// How many of that follow behind the block, once somebody asked.
    local_behind: &'a Cell<Option<u32>>,
    /// Of the block.
    len: usize,
    /// More text may come behind the block.
    open: bool,
}

impl Word<'_> {
    #[inline(always)]
    fn may_start_token(&self, text: &[u8]) -> bool {
        let len = self.end - self.start;
        let byte = |at: usize| text.get(at).copied().unwrap_or(0);
        let (first, after) = (byte(self.start), byte(self.end));
        // A byte further on that has to be this one.
        let may_be = |at: usize, wanted: u8| text.get(at).map_or(self.open, |&byte| byte == wanted);
        if first.is_ascii_digit() {
            let epoch = self.all_digits && matches!(len, 10 | 13);
            let date = match len {
                2 => matches!(after, b' ' | b'-') && may_be(self.end + 4, after),
                4 => after == b'-' && may_be(self.end + 3, b'-'),
                _ => len >= MIN_COMPACT_TIME,
            };
            if epoch || date {
                return true;
            }
        }
        match after {
            b'-' if len == 2 && may_be(self.end + 33, b'-') => return true,
            b'-' if len == 8 && may_be(self.end + 5, b'-') => return true,
            b'-' | b'_' => {
                if first.is_ascii_lowercase() && len <= MAX_PREFIX && is_prefix(text, self.start, len) {
                    return true;
                }
            }
            b'@' | b'.' | b'+' | b'%' => {}
            _ => return false,
        }
        let local_end = self.local_end(text);
        let short = local_end - self.start <= MAX_LOCAL;
        match text.get(local_end) {
            None => self.open,
            Some(b'@') => short,
            Some(b'%') => {
                short && text.get(local_end + 1..local_end + 3).map_or(self.open, |hex| hex == b"40")
            }
            Some(_) => false,
        }
    }

    /// Where what may be the front of a mail address ends. One that began in this block and goes on beyond
    /// the next is too long, wherever it ends.
    fn local_end(&self, text: &[u8]) -> usize {
        let end =
            self.end + (!(self.local.checked_shr(self.end as u32).unwrap_or(0))).trailing_zeros() as usize;
        match text.get(64..) {
            Some(behind) if end == 64 && self.len == 64 => {
                let run = self.local_behind.get().unwrap_or_else(|| {
                    let block = Block64::new(behind);
                    (!block.bits(|bytes| letters(bytes) | digits(bytes) | local_sign(bytes))).trailing_zeros()
                });
                self.local_behind.set(Some(run));
                end + run as usize
            }
            _ => end,
        }
    }
}

/// What else than letters and digits a mail address may have before its `@`.
#[inline(always)]
fn local_sign(bytes: u8x16) -> u8x16 {
    equal(bytes, b'.') | equal(bytes, b'+') | equal(bytes, b'-') | equal(bytes, b'_')
}

/// Whether the word is a known prefix of identifiers. A sign stands behind it.
#[inline(always)]
fn is_prefix(text: &[u8], start: usize, len: usize) -> bool {
    let mut bytes = [0; 8];
    let word = text.get(start..start + len).unwrap_or_default();
    for (byte, &of_word) in bytes.iter_mut().zip(word) {
        *byte = of_word;
    }
    PREFIX_WORDS.contains(&u64::from_le_bytes(bytes))
}
