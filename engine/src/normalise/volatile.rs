//! Matchers of what differs in every message and means nothing: identifiers, times, digests, blobs.
//!
//! Each takes the front of a window and returns (bytes before the token, its bytes, its tail).

use super::automaton::{BASE64, BASE64_URL, DASH_LOW, DIGIT, HEX, LOWER, PLUS_SLASH, UPPER, WORD, is};
use super::token::{HORIZON, Shape, Tail, Word};
use crate::bitmap::{Block64, below, capitals, digits, letters};

/// Fewest hexadecimal digits of a digest.
const MIN_HEX: usize = 16;
/// Fewest digits of a number that is called long.
const MIN_DIGITS: usize = 6;
/// Fewest characters of a base64 blob.
pub(super) const MIN_BASE64: usize = 32;
/// Fewest characters behind an identifier's prefix.
const MIN_ID: usize = 12;
/// The same for one without a digit.
const MIN_LETTER_ID: usize = 16;
/// Most characters of a JWT's header that are looked through for its end.
const MAX_JWT_HEADER: usize = 180;

/// Fewest characters of a date and time without signs, and of a ULID.
pub(super) const MIN_COMPACT_TIME: usize = 15;

/// Prefixes of identifiers, by the bytes before the separator that the table holds too.
const ID_PREFIXES: [&[u8]; 32] = [
    b"chatcmpl-",
    b"cmpl-",
    b"req_",
    b"call_",
    b"resp_",
    b"msg_",
    b"run_",
    b"thread_",
    b"asst_",
    b"file-",
    b"file_",
    b"fc_",
    b"rs_",
    b"ws_",
    b"toolu_",
    b"srvtoolu_",
    b"gen-",
    b"batch_",
    b"evt_",
    b"step_",
    b"vs_",
    b"item_",
    b"sess_",
    b"event_",
    b"conv_",
    b"ftjob-",
    b"modr-",
    b"org-",
    b"proj_",
    b"tooluse_",
    b"cus_",
    b"embd-",
];

/// Longest prefix of an identifier without its separator.
pub(super) const MAX_PREFIX: usize = 8;

/// The prefixes without their separators, as numbers, first byte lowest.
#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a bad index")]
pub(super) const PREFIX_WORDS: [u64; ID_PREFIXES.len()] = {
    let mut words = [0; ID_PREFIXES.len()];
    let mut i = 0;
    while i < words.len() {
        let mut at = ID_PREFIXES[i].len() - 1;
        while at > 0 {
            at -= 1;
            words[i] = words[i] << 8 | ID_PREFIXES[i][at] as u64;
        }
        i += 1;
    }
    words
};

type Found = Option<Shape>;

/// `eyJ…`, a dot and at least eight characters; further parts follow.
pub(super) fn jwt(word: &Word<'_>) -> Found {
    if !word.has(0, b"eyJ") {
        return None;
    }
    let dot = word.group(3, BASE64_URL, 7, MAX_JWT_HEADER)?;
    let payload = word.run(dot + 1, BASE64_URL);
    (word.byte(dot) == b'.' && payload >= dot + 9).then_some((0, dot + 9, Tail::Dotted))
}

/// Version, trace, parent and flags in lower-case hex (W3C Trace Context, section 3.2).
pub(super) fn traceparent(word: &Word<'_>) -> Found {
    if word.len != 2 || word.after != b'-' || word.has(0, b"ff") {
        return None;
    }
    let len = dashed_hex(word, &[2, 32, 16, 2])?;
    word.slice(0, len).iter().all(|&b| !is(b, UPPER)).then_some((0, len, Tail::None))
}

/// 8-4-4-4-12 hexadecimal digits.
pub(super) fn uuid(word: &Word<'_>) -> Found {
    if word.len != 8 || word.after != b'-' {
        return None;
    }
    dashed_hex(word, &[8, 4, 4, 4, 12]).map(|len| (0, len, Tail::None))
}

fn dashed_hex(word: &Word<'_>, groups: &[usize]) -> Option<usize> {
    let mut end = 0;
    for (i, &len) in groups.iter().enumerate() {
        if i > 0 {
            (word.byte(end) == b'-').then_some(())?;
            end += 1;
        }
        (word.run(end, HEX).min(end + len) == end + len).then_some(())?;
        end += len;
    }
    word.ends(end).then_some(end)
}

/// Two digits at `at` as a number, if within the bounds.
fn two(word: &Word<'_>, at: usize, min: u8, max: u8) -> Option<()> {
    let (tens, ones) = (word.byte(at), word.byte(at + 1));
    (is(tens, DIGIT) && is(ones, DIGIT)).then_some(())?;
    let value = (tens - b'0') * 10 + (ones - b'0');
    (min..=max).contains(&value).then_some(())
}

fn four_digits(word: &Word<'_>, at: usize) -> bool {
    word.slice(at, at + 4).iter().filter(|&&b| is(b, DIGIT)).count() == 4
}

/// A colon at `at`, plain or as in a query: where it ends.
fn colon(word: &Word<'_>, at: usize) -> Option<usize> {
    if word.byte(at) == b':' {
        return Some(at + 1);
    }
    (word.has(at, b"%3A") || word.has(at, b"%3a")).then_some(at + 3)
}

/// `2026-11-23`, `2026-11-23T01:27:22.5Z`, `2026-11-23 01:27+0100`, `20261123T012722Z`. Not behind a
/// hyphen or underscore: there a date is part of a name, as of a model's.
pub(super) fn timestamp(word: &Word<'_>) -> Found {
    if matches!(word.left.last, b'-' | b'_') || !matches!(word.first, b'1' | b'2') {
        return None;
    }
    let mut best = None;
    let mut accept = |end: usize| {
        if word.ends(end) {
            best = Some(end);
        }
    };
    if word.len == 4 && word.after == b'-' && four_digits(word, 0) {
        two(word, 5, 1, 12)?;
        (word.byte(7) == b'-').then_some(())?;
        two(word, 8, 1, 31)?;
        accept(10);
        if matches!(word.byte(10), b'T' | b't' | b' ') {
            extended_time(word, 11, &mut accept);
        }
    } else if word.len >= MIN_COMPACT_TIME && word.byte(8) == b'T' && four_digits(word, 0) {
        two(word, 4, 1, 12)?;
        two(word, 6, 1, 31)?;
        two(word, 9, 0, 24)?;
        two(word, 11, 0, 59)?;
        two(word, 13, 0, 60)?;
        fraction_and_zone(word, 15, &mut accept);
    }
    best.map(|end| (0, end, Tail::None))
}

fn extended_time(word: &Word<'_>, at: usize, accept: &mut impl FnMut(usize)) -> Option<()> {
    two(word, at, 0, 24)?;
    let minutes = colon(word, at + 2)?;
    two(word, minutes, 0, 59)?;
    zone(word, minutes + 2, accept);
    let seconds = colon(word, minutes + 2)?;
    two(word, seconds, 0, 60)?;
    fraction_and_zone(word, seconds + 2, accept);
    Some(())
}

fn fraction_and_zone(word: &Word<'_>, at: usize, accept: &mut impl FnMut(usize)) {
    zone(word, at, accept);
    if matches!(word.byte(at), b'.' | b',')
        && let Some(end) = word.group(at + 1, DIGIT, 1, 9)
    {
        zone(word, end, accept);
    }
}

/// Accepts the end at `at`, and with `Z`, `+01`, `+0100` or `+01:00` behind it.
fn zone(word: &Word<'_>, at: usize, accept: &mut impl FnMut(usize)) {
    accept(at);
    match word.byte(at) {
        b'Z' | b'z' => accept(at + 1),
        b'+' | b'-' if two(word, at + 1, 0, 14).is_some() => {
            accept(at + 3);
            for minutes in [Some(at + 3), colon(word, at + 3)].into_iter().flatten() {
                if two(word, minutes, 0, 59).is_some() {
                    accept(minutes + 2);
                }
            }
        }
        _ => {}
    }
}

/// `06 Nov 1994 08:49:37 GMT`, and with hyphens as in cookies.
pub(super) fn http_date(word: &Word<'_>) -> Found {
    const MONTHS: [&[u8]; 12] =
        [b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec"];
    if word.len != 2 || !matches!(word.after, b' ' | b'-') || word.byte(6) != word.after {
        return None;
    }
    two(word, 0, 1, 31)?;
    (MONTHS.contains(&word.slice(3, 6)) && four_digits(word, 7) && word.byte(11) == b' ').then_some(())?;
    two(word, 12, 0, 23)?;
    two(word, 15, 0, 59)?;
    two(word, 18, 0, 60)?;
    (word.byte(14) == b':' && word.byte(17) == b':').then_some(())?;
    let zone = match word.byte(20) {
        b' ' if word.has(21, b"GMT") || word.has(21, b"UTC") => Some(24),
        b' ' if matches!(word.byte(21), b'+' | b'-') && four_digits(word, 22) => Some(26),
        _ => None,
    };
    let end = zone.filter(|&end| word.ends(end)).or_else(|| word.ends(20).then_some(20))?;
    Some((0, end, Tail::None))
}

/// Ten digits from 1000000000 to 2199999999, a fraction allowed, or thirteen from 1000000000000.
pub(super) fn epoch(word: &Word<'_>) -> Found {
    if word.left.last == b'.' || word.run(0, DIGIT) != word.len {
        return None;
    }
    let recent = word.first == b'1' || word.has(0, b"20") || word.has(0, b"21");
    match word.len {
        10 if recent => {
            let fraction = if word.after == b'.' { word.group(11, DIGIT, 1, 9) } else { None };
            Some((0, fraction.filter(|&end| word.ends(end)).unwrap_or(10), Tail::None))
        }
        13 if word.first == b'1' => Some((0, 13, Tail::None)),
        _ => None,
    }
}

/// A known prefix and at least twelve letters and digits with a digit among them, or a ULID.
pub(super) fn id(word: &Word<'_>) -> Found {
    if word.len == 26 && matches!(word.first, b'0'..=b'7') {
        let body = word.slice(0, 26);
        let crockford = |b: &u8| is(*b, DIGIT | UPPER) && !matches!(b, b'I' | b'L' | b'O' | b'U');
        let ulid = body.iter().all(crockford) && body.iter().any(|&b| is(b, UPPER));
        return ulid.then_some((0, 26, Tail::None));
    }
    if !matches!(word.after, b'-' | b'_') {
        return None;
    }
    let known = |prefix: &&&[u8]| prefix.first() == Some(&word.first) && word.has(0, prefix);
    let prefix = ID_PREFIXES.iter().find(known)?;
    let end = word.run(prefix.len(), WORD).min(prefix.len() + HORIZON);
    let body = word.slice(prefix.len(), end);
    let random = body.len() >= MIN_ID && (body.iter().any(|&b| is(b, DIGIT)) || mixed_case(body));
    random.then_some((0, end, Tail::Run(WORD)))
}

/// Letters of both cases as chance mixes them: one base-62 identifier of 24 characters in 60 has no digit.
/// Names in camel case have fewer capitals, names in capitals no small letters.
fn mixed_case(body: &[u8]) -> bool {
    let count = |class| body.iter().filter(|&&b| is(b, class)).count();
    body.len() >= MIN_LETTER_ID && count(UPPER) * 4 >= body.len() && count(LOWER) * 4 >= body.len()
}

/// At least 16 hexadecimal digits, of both kinds unless `0x` stands before them.
pub(super) fn hex(word: &Word<'_>) -> Found {
    let prefix = if word.first == b'0' && matches!(word.byte(1), b'x' | b'X') { 2 } else { 0 };
    if word.len < prefix + MIN_HEX {
        return None;
    }
    let end = word.run(prefix, HEX).min(prefix + HORIZON);
    let body = word.slice(prefix, end);
    let mixed = body.iter().any(|&b| is(b, DIGIT)) && body.iter().any(|&b| !is(b, DIGIT));
    bounded_run(word, prefix, end, MIN_HEX, HEX).filter(|_| prefix > 0 || mixed)
}

/// At least six decimal digits.
pub(super) fn decimal(word: &Word<'_>) -> Found {
    let end = word.run(0, DIGIT).min(HORIZON);
    bounded_run(word, 0, end, MIN_DIGITS, DIGIT)
}

/// A run that must be the rest of its word, unless it is longer than what is looked at.
fn bounded_run(word: &Word<'_>, from: usize, end: usize, min: usize, kinds: u16) -> Found {
    if end - from == HORIZON {
        return Some((0, end, Tail::Run(kinds)));
    }
    (end - from >= min && word.ends(end)).then_some((0, end, Tail::None))
}

/// At least 32 characters of either alphabet that change between capitals, small letters, digits and
/// signs as often as random ones do (0.65 a character), and not as seldom as names and paths (0.3).
/// Repeats of one character, the zeros of a binary header, do not count.
pub(super) fn base64(word: &Word<'_>) -> Found {
    if word.len < MIN_BASE64 && !is(word.after, PLUS_SLASH | DASH_LOW) {
        return None;
    }
    let end = word.run(0, BASE64).min(HORIZON);
    if end < MIN_BASE64 {
        return None;
    }
    let body = word.slice(0, end);
    let (block, behind) = (Block64::new(body), Block64::new(body.get(1..).unwrap_or_default()));
    let mix = Mix::new(&block, below(end), 0);
    let pairs = (!block.same(&behind) & below(end - 1)).count_ones();
    let random = mix.may_be_random() && mix.changes() * 10 >= pairs * 4;
    random.then_some((0, end, Tail::Padded(BASE64)))
}

/// The kinds of the characters in a run, as bits.
pub(super) struct Mix {
    run: u64,
    digits: u64,
    capitals: u64,
    small: u64,
}

impl Mix {
    /// Of the run of set bits of `chain` that begins `at`.
    pub(super) fn new(block: &Block64, chain: u64, at: usize) -> Self {
        let len = (!(chain >> at)).trailing_zeros() as usize;
        let run = below(len) << at;
        let of = |bits: u64| bits & run;
        let capitals = block.bits(capitals);
        let small = block.bits(letters) & !capitals;
        Self { run, digits: of(block.bits(digits)), capitals: of(capitals), small: of(small) }
    }

    /// How often the next character is of another kind; signs are one kind.
    fn changes(&self) -> u32 {
        let edges = |bits: u64| bits ^ bits >> 1;
        let edges = edges(self.digits) | edges(self.capitals) | edges(self.small);
        (edges & self.run & self.run >> 1).count_ones()
    }

    /// Whether there are enough of each, and enough changes in all; more characters only add to them.
    pub(super) fn may_be_random(&self) -> bool {
        let mixed =
            self.digits.count_ones() >= 2 && self.capitals.count_ones() >= 3 && self.small.count_ones() >= 3;
        mixed && self.changes() >= 12
    }
}
