//! Which of 64 bytes are letters, digits or a certain sign, as the bits of a number.
//!
//! What: `Block64` holds up to 64 bytes; its methods give one bit a byte, the first byte's lowest. Runs
//! are then found by counting zeros, so nothing branches on the text byte by byte.
//!
//! [`up_to_or`] and [`base64_run`] are for the filter's reader of JSON: its strings are short, or pictures.
//!
//! Why: words end where nobody can foresee it. A loop that looks for their ends mispredicts once a word,
//! which costs more than the word's hash.
//!
//! Cost: vector instructions, by the crate `wide`, where the target has them (x86-64, aarch64, wasm32 with
//! simd128): under one instruction a byte for a class of bytes. Elsewhere loops, with the same result.

use wide::u8x16;

/// Up to 64 bytes of text; the rest is zero.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block64([u8x16; 4]);

impl Block64 {
    /// The first bytes of `text`, at most 64.
    #[inline(always)]
    pub(crate) fn new(text: &[u8]) -> Self {
        if let Some(block) = text.first_chunk::<64>() {
            return Self::of(block);
        }
        let mut block = [0; 64];
        if let Some(front) = block.get_mut(..text.len()) {
            front.copy_from_slice(text);
        }
        Self::of(&block)
    }

    #[inline(always)]
    fn of(block: &[u8; 64]) -> Self {
        let mut lanes = [u8x16::ZERO; 4];
        for (lane, bytes) in lanes.iter_mut().zip(block.as_chunks::<16>().0) {
            *lane = u8x16::new(*bytes);
        }
        Self(lanes)
    }

    /// The first `len` of the bytes; the rest is zero.
    #[inline(always)]
    pub(crate) fn front(&self, len: usize) -> [u8; 64] {
        const PLACES: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        let first = u8x16::new(PLACES);
        let places = [0, 16, 32, 48].map(|from| first + u8x16::splat(from));
        let mut front = [0; 64];
        // A place below `len` is the smaller one of itself and `len - 1`.
        let last = u8x16::splat(len.saturating_sub(1).min(63) as u8);
        for ((to, lane), places) in front.as_chunks_mut::<16>().0.iter_mut().zip(self.0).zip(places) {
            *to = (lane & places.min(last).simd_eq(places)).to_array();
        }
        front
    }

    /// The places where both have the same byte.
    #[inline(always)]
    pub(crate) fn same(&self, other: &Self) -> u64 {
        let mut lanes = self.0;
        lanes.iter_mut().zip(&other.0).for_each(|(mine, theirs)| *mine = mine.simd_eq(*theirs));
        Self(lanes).bits(|same| same)
    }

    /// The bytes of which `test` holds: of sixteen bytes it makes sixteen flags, 0 or 255.
    #[inline(always)]
    pub(crate) fn bits(&self, test: impl Fn(u8x16) -> u8x16) -> u64 {
        let [a, b, c, d] = self.0.map(|lane| u64::from(test(lane).to_bitmask() & 0xffff));
        a | b << 16 | c << 32 | d << 48
    }
}

/// The ASCII letters among sixteen bytes.
#[inline(always)]
pub(crate) fn letters(bytes: u8x16) -> u8x16 {
    within((bytes | u8x16::splat(0x20)) - u8x16::splat(b'a'), 25)
}

/// The ASCII capitals among sixteen bytes.
#[inline(always)]
pub(crate) fn capitals(bytes: u8x16) -> u8x16 {
    within(bytes - u8x16::splat(b'A'), 25)
}

/// The ASCII digits among sixteen bytes.
#[inline(always)]
pub(crate) fn digits(bytes: u8x16) -> u8x16 {
    within(bytes - u8x16::splat(b'0'), 9)
}

/// The bytes that are `byte`.
#[inline(always)]
pub(crate) fn equal(bytes: u8x16, byte: u8) -> u8x16 {
    bytes.simd_eq(u8x16::splat(byte))
}

/// The bytes of at most `most`.
#[inline(always)]
fn within(bytes: u8x16, most: u8) -> u8x16 {
    bytes.min(u8x16::splat(most)).simd_eq(bytes)
}

/// Of sixteen bytes as bits: those up to `most` or one of `signs`, and those over 127.
#[inline(always)]
pub fn up_to_or(bytes: &[u8; 16], most: u8, signs: [u8; 2]) -> (u32, u32) {
    let bytes = u8x16::new(*bytes);
    let [first, second] = signs.map(|sign| equal(bytes, sign));
    let found = within(bytes, most) | first | second;
    (found.to_bitmask() & 0xffff, bytes.to_bitmask() & 0xffff)
}

/// How many of the first bytes are characters of base64, of either alphabet (RFC 4648, sections 4 and 5), or its
/// padding.
pub fn base64_run(text: &[u8]) -> usize {
    let is_base64 = |byte: &u8| byte.is_ascii_alphanumeric() || BASE64_SIGNS.contains(byte);
    let (sixteens, rest) = text.as_chunks();
    for (bytes, at) in sixteens.iter().zip((0..).step_by(16)) {
        let bytes = u8x16::new(*bytes);
        let signs = BASE64_SIGNS.map(|sign| equal(bytes, sign));
        let found = signs.into_iter().fold(letters(bytes) | digits(bytes), |found, sign| found | sign);
        let others = !found.to_bitmask() & 0xffff;
        if others != 0 {
            return at + others.trailing_zeros() as usize;
        }
    }
    text.len() - rest.len() + rest.iter().take_while(|byte| is_base64(byte)).count()
}

const BASE64_SIGNS: [u8; 5] = *b"+/=-_";

/// The bits below the first `n`, all of them for 64 and more.
#[inline(always)]
pub(crate) fn below(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bits_are_those_of_the_bytes(text in prop::collection::vec(any::<u8>(), 0..80)) {
            let block = Block64::new(&text);
            let expected = |test: fn(u8) -> bool| {
                (0..64).filter(|&i| text.get(i).is_some_and(|&b| test(b))).fold(0, |bits: u64, i| bits | 1 << i)
            };
            prop_assert_eq!(block.bits(letters), expected(|b| b.is_ascii_alphabetic()));
            prop_assert_eq!(block.bits(digits), expected(|b| b.is_ascii_digit()));
            prop_assert_eq!(block.bits(capitals), expected(|b| b.is_ascii_uppercase()));
            let behind = Block64::new(text.get(1..).unwrap_or_default());
            let byte = |i: usize| text.get(i).copied().unwrap_or(0);
            let same = (0..64).filter(|&i| byte(i) == byte(i + 1)).fold(0, |bits: u64, i| bits | 1 << i);
            prop_assert_eq!(block.same(&behind), same);
            prop_assert_eq!(block.bits(|bytes| bytes), expected(|b| b >= 0x80));
            prop_assert_eq!(block.bits(|bytes| equal(bytes, b'%')), expected(|b| b == b'%'));
            for len in 1..=text.len().min(64) {
                let mut front = [0; 64];
                front[..len].copy_from_slice(&text[..len]);
                prop_assert_eq!(block.front(len), front);
            }
        }
    }

    proptest! {
        #[test]
        fn signs_are_found(bytes: [u8; 16], most in 0u8..=255, signs: [u8; 2]) {
            let bits = |test: &dyn Fn(u8) -> bool| (0..16).filter(|&i| test(bytes[i])).fold(0, |bits, i| bits | 1 << i);
            let found = bits(&|byte| byte <= most || signs.contains(&byte));
            prop_assert_eq!(up_to_or(&bytes, most, signs), (found, bits(&|byte| byte > 127)));
        }
    }

    proptest! {
        #[test]
        fn a_run_of_base64_ends_at_the_first_other_byte(len in 0usize..100, end: u8, text: [u8; 100]) {
            const SIGNS: &[u8; 67] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_";
            let mut text = text.map(|byte| SIGNS[usize::from(byte) % SIGNS.len()]);
            text[len] = end;
            let expected = if SIGNS.contains(&end) { 100 } else { len };
            prop_assert_eq!(base64_run(&text), expected);
            prop_assert_eq!(base64_run(&text[..len]), len);
        }
    }

    #[test]
    fn bits_below() {
        assert_eq!((below(0), below(3), below(64), below(70)), (0, 7, u64::MAX, u64::MAX));
    }
}
