//! Matchers of what names a person or an account.
//!
//! Each takes the front of a window and returns (bytes before the datum, its bytes, its tail).

use super::automaton::{ATOM, DIGIT, HEX, HOST, LOWER, UPPER, is};
use super::token::{Shape, Tail, Word};

type Found = Option<Shape>;

/// Longest local part (RFC 5321, section 4.5.3.1.1).
pub(super) const MAX_LOCAL: usize = 64;
/// Longest domain that is looked at; real ones are far shorter than the 255 allowed.
const MAX_DOMAIN: usize = 128;

/// `local@domain.tld`; the `@` may be `%40`, as in a form. Quoted local parts are left out.
pub(super) fn email(word: &Word<'_>) -> Found {
    if !matches!(word.after, b'@' | b'.' | b'_' | b'+' | b'-' | b'%') {
        return None;
    }
    // Beyond the longest there is no need to know: a chain of words asks for each of them.
    let mut local = word.run_within(0, ATOM, MAX_LOCAL + 1);
    while word.byte(local) == b'.' && is(word.byte(local + 1), ATOM) && local <= MAX_LOCAL {
        local = word.run_within(local + 1, ATOM, MAX_LOCAL + 1);
    }
    let from = match word.byte(local) {
        b'@' => local + 1,
        b'%' if word.has(local, b"%40") => local + 3,
        _ => return None,
    };
    if local > MAX_LOCAL {
        return None;
    }
    let end = word.run(from, HOST).min(from + MAX_DOMAIN);
    let (mut best, mut label, mut dots) = (None, from, 0);
    for at in from..=end {
        let byte = if at == end { 0 } else { word.byte(at) };
        let top = word.slice(label, at);
        let known = dots > 0 && (2..=24).contains(&top.len()) && top.iter().all(|&b| is(b, UPPER | LOWER));
        if known && word.ends(at) {
            best = Some(at);
        }
        if byte == b'.' {
            if top.is_empty() {
                break;
            }
            (label, dots) = (at + 1, dots + 1);
        }
    }
    best.map(|end| (0, end, Tail::None))
}

/// Length of an IBAN by country (SWIFT's registry, release 99).
const IBAN_LENGTHS: [(&[u8; 2], usize); 88] = [
    (b"AD", 24),
    (b"AE", 23),
    (b"AL", 28),
    (b"AT", 20),
    (b"AZ", 28),
    (b"BA", 20),
    (b"BE", 16),
    (b"BG", 22),
    (b"BH", 22),
    (b"BI", 27),
    (b"BR", 29),
    (b"BY", 28),
    (b"CH", 21),
    (b"CR", 22),
    (b"CY", 28),
    (b"CZ", 24),
    (b"DE", 22),
    (b"DJ", 27),
    (b"DK", 18),
    (b"DO", 28),
    (b"EE", 20),
    (b"EG", 29),
    (b"ES", 24),
    (b"FI", 18),
    (b"FK", 18),
    (b"FO", 18),
    (b"FR", 27),
    (b"GB", 22),
    (b"GE", 22),
    (b"GI", 23),
    (b"GL", 18),
    (b"GR", 27),
    (b"GT", 28),
    (b"HN", 28),
    (b"HR", 21),
    (b"HU", 28),
    (b"IE", 22),
    (b"IL", 23),
    (b"IQ", 23),
    (b"IS", 26),
    (b"IT", 27),
    (b"JO", 30),
    (b"KW", 30),
    (b"KZ", 20),
    (b"LB", 28),
    (b"LC", 32),
    (b"LI", 21),
    (b"LT", 20),
    (b"LU", 20),
    (b"LV", 21),
    (b"LY", 25),
    (b"MC", 27),
    (b"MD", 24),
    (b"ME", 22),
    (b"MK", 19),
    (b"MN", 20),
    (b"MR", 27),
    (b"MT", 31),
    (b"MU", 30),
    (b"NI", 28),
    (b"NL", 18),
    (b"NO", 15),
    (b"OM", 23),
    (b"PK", 24),
    (b"PL", 28),
    (b"PS", 29),
    (b"PT", 25),
    (b"QA", 29),
    (b"RO", 24),
    (b"RS", 22),
    (b"RU", 33),
    (b"SA", 24),
    (b"SC", 31),
    (b"SD", 18),
    (b"SE", 24),
    (b"SI", 19),
    (b"SK", 24),
    (b"SM", 27),
    (b"SO", 23),
    (b"ST", 25),
    (b"SV", 28),
    (b"TL", 23),
    (b"TN", 24),
    (b"TR", 26),
    (b"UA", 29),
    (b"VA", 22),
    (b"VG", 24),
    (b"XK", 20),
];

/// Capitals and digits, together or in groups of four, with the check digits of ISO 7064 mod 97-10.
pub(super) fn iban(word: &Word<'_>) -> Found {
    let country = word.slice(0, 2);
    if word.len < 4 || !is(word.byte(2), DIGIT) || !is(word.byte(3), DIGIT) {
        return None;
    }
    let &(_, wanted) = IBAN_LENGTHS.iter().find(|(code, _)| code.as_slice() == country)?;
    let spaced = word.len == 4 && word.after == b' ';
    let end = if spaced { wanted + (wanted - 1) / 4 } else { wanted };
    // The four first bytes count last, letters as two digits from A = 10.
    let (mut remainder, mut head) = (0u32, 0u32);
    for (i, &byte) in word.slice(0, end).iter().enumerate() {
        if spaced && i % 5 == 4 {
            (byte == b' ').then_some(())?;
            continue;
        }
        let sum = if i < 4 { &mut head } else { &mut remainder };
        *sum = match byte {
            b'0'..=b'9' => *sum * 10 + u32::from(byte - b'0'),
            b'A'..=b'Z' => *sum * 100 + u32::from(byte - b'A') + 10,
            _ => return None,
        };
        remainder %= 97;
    }
    let checked = (remainder * (1_000_000 % 97) + head) % 97 == 1;
    (checked && word.window.len() >= end && word.ends(end)).then_some((0, end, Tail::None))
}

/// Four numbers up to 255 with dots between them, or an IPv6 address. Not behind a dot, or a single
/// slash as in `Chrome/41.0.225.0`, and not before a further number.
pub(super) fn ip_address(word: &Word<'_>) -> Found {
    if word.len > 4 || word.left.last == b'.' || word.left.last == b':' {
        return None;
    }
    match word.after {
        b'.' if word.left.last != b'/' || word.left.before_last == b'/' => ipv4(word),
        b':' => ipv6(word),
        _ => None,
    }
}

fn ipv4(word: &Word<'_>) -> Found {
    let mut at = 0;
    for part in 0..4 {
        if part > 0 {
            (word.byte(at) == b'.').then_some(())?;
            at += 1;
        }
        let end = word.group(at, DIGIT, 1, 3)?;
        let value = word.slice(at, end).iter().fold(0u32, |sum, &b| sum * 10 + u32::from(b - b'0'));
        (value <= 255 && (end - at == 1 || word.byte(at) != b'0')).then_some(())?;
        at = end;
    }
    let goes_on = word.byte(at) == b'.' && is(word.byte(at + 1), DIGIT);
    (word.ends(at) && !goes_on).then_some((0, at, Tail::None))
}

/// Eight groups, or fewer with one `::`; a digit somewhere, and unless there are four groups the first
/// has four characters, so that `a1::b2` stays a path of names. An address ends with a group, not with
/// `::`: what follows that may be a token of its own.
fn ipv6(word: &Word<'_>) -> Found {
    let first = word.group(0, HEX, 1, 4)?;
    let (mut at, mut groups, mut gap, mut best) = (first, 1, false, None);
    loop {
        let likely = groups >= 4 || first == 4;
        let whole = if gap { groups <= 7 && likely } else { groups == 8 };
        if whole && word.ends(at) && word.slice(0, at).iter().any(|&b| is(b, DIGIT)) {
            best = Some(at);
        }
        if groups == 8 || word.byte(at) != b':' {
            break;
        }
        if word.byte(at + 1) == b':' {
            if gap {
                break;
            }
            (gap, at) = (true, at + 2);
        } else {
            at += 1;
        }
        let Some(end) = word.group(at, HEX, 1, 4) else { break };
        (at, groups) = (end, groups + 1);
    }
    best.map(|end| (0, end, Tail::None))
}

/// 13 to 19 digits from 2 to 6 first, together or in groups with one kind of separator, whose last digit
/// is right (ISO/IEC 7812-1, annex B). Not behind a dot, where digits are a fraction.
pub(super) fn card(word: &Word<'_>) -> Found {
    if !matches!(word.first, b'2'..=b'6') || word.left.last == b'.' || word.run(0, DIGIT) != word.len {
        return None;
    }
    if (13..=19).contains(&word.len) {
        return luhn(word.slice(0, word.len)).then_some((0, word.len, Tail::None));
    }
    if !(3..=6).contains(&word.len) || !matches!(word.after, b' ' | b'-') {
        return None;
    }
    let (mut at, mut count, mut best) = (word.len, word.len, None);
    while word.byte(at) == word.after
        && let Some(end) = word.group(at + 1, DIGIT, 3, 6)
    {
        count += end - at - 1;
        at = end;
        if count > 19 {
            break;
        }
        if count >= 13 && word.ends(at) && luhn(word.slice(0, at)) {
            best = Some(at);
        }
    }
    best.map(|end| (0, end, Tail::None))
}

/// The check of Luhn (US 2,950,048) over the digits of `text`.
fn luhn(text: &[u8]) -> bool {
    let digits = text.iter().rev().filter(|&&b| is(b, DIGIT)).map(|&b| u32::from(b - b'0'));
    let sum: u32 =
        digits.zip([1, 2].into_iter().cycle()).map(|(d, weight)| d * weight / 10 + d * weight % 10).sum();
    sum.is_multiple_of(10)
}

/// `+` and 8 to 15 digits (E.164) with spaces, dots, hyphens and brackets; `(555) 123-4567`;
/// `555-123-4567` and `1-555-123-4567` with hyphens or dots.
pub(super) fn phone(word: &Word<'_>) -> Found {
    match word.first {
        _ if is(word.left.last, DIGIT | UPPER | LOWER) => None,
        b'+' => international(word),
        b'(' => {
            let close = word.group(1, DIGIT, 3, 3)?;
            (word.byte(close) == b')').then_some(())?;
            let from = close + 1 + usize::from(is_separator(word.byte(close + 1)));
            let middle = word.group(from, DIGIT, 3, 3)?;
            let end = word.group(middle + 1, DIGIT, 4, 4)?;
            (is_separator(word.byte(middle)) && word.ends(end)).then_some((0, end, Tail::None))
        }
        _ => {
            let separator = word.after;
            let plain = matches!(separator, b'-' | b'.') && !matches!(word.left.last, b'-' | b'.' | b'_');
            plain.then_some(())?;
            let from = if word.len == 1 && word.first == b'1' { 2 } else { 0 };
            let area = word.group(from, DIGIT, 3, 3)?;
            let middle = word.group(area + 1, DIGIT, 3, 3)?;
            let end = word.group(middle + 1, DIGIT, 4, 4)?;
            let separated = word.byte(area) == separator && word.byte(middle) == separator;
            (separated && word.ends(end)).then_some((0, end, Tail::None))
        }
    }
}

fn is_separator(byte: u8) -> bool {
    matches!(byte, b' ' | b'.' | b'-')
}

fn international(word: &Word<'_>) -> Found {
    if !matches!(word.byte(1), b'1'..=b'9') {
        return None;
    }
    let mut at = word.group(1, DIGIT, 1, 15)?;
    let (mut count, mut best) = (at - 1, None);
    while count <= 15 {
        if count >= 8 && word.ends(at) {
            best = Some(at);
        }
        let after = at + usize::from(is_separator(word.byte(at)));
        let (from, area) = match word.byte(after) {
            b'(' => {
                let Some(close) = word.group(after + 1, DIGIT, 1, 4) else { break };
                if word.byte(close) != b')' {
                    break;
                }
                (close + 1 + usize::from(is_separator(word.byte(close + 1))), close - after - 1)
            }
            _ if after > at => (after, 0),
            _ => break,
        };
        let Some(end) = word.group(from, DIGIT, 2, 8) else { break };
        count += area + end - from;
        at = end;
    }
    best.map(|end| (0, end, Tail::None))
}
