//! What is computed from code lengths: ratios, distances, entropy.
//!
//! Code lengths are whole bits, from [`crate::adapters`] or, rounded, from the context coder. Each function
//! states its formula and where it comes from. C(x) is the code length of x, C(xy) of x with y after it,
//! C(x|B) of x when B is known.
//!
//! **Determinism.** f64 appears in results only, and only through conversion, `+ - * /`, which IEEE 754
//! rounds the same everywhere; the logarithm of the entropy is integer arithmetic. So native code and wasm
//! give the same bits.
//!
//! **No clamping.** A distance above 1 or below 0 says that the compressor is not a normal one for these
//! texts (Cilibrasi and Vitányi 2005, section III), most often for want of a match window; that has to be
//! seen. Where a formula divides by zero there is no value.
//!
//! Cost: a few operations; entropy one counter a byte and 256 logarithms.
//!
//! Left out on purpose: thresholds. A metric is evidence; what decides is a calibrated p-value.
//!
//! References:
//! - M. Li, P. Vitányi, *An Introduction to Kolmogorov Complexity and Its Applications*, 4th ed. 2019.
//! - M. Li, X. Chen, X. Li, B. Ma, P. Vitányi, "The similarity metric", IEEE Trans. Inf. Theory 50(12), 2004.
//! - R. Cilibrasi, P. Vitányi, "Clustering by compression", IEEE Trans. Inf. Theory 51(4), 2005.
//! - E. Keogh, S. Lonardi, C. Ratanamahatana, "Towards parameter-free data mining", KDD 2004.
//! - C. Shannon, "A mathematical theory of communication", Bell System Technical Journal 27, 1948.

/// Fractional bits of the logarithm.
pub(crate) const LOG_FRACTION_BITS: u32 = 32;

/// C(x) in bits per byte of x: `C(x) / |x|`. 8 is no compression. None for an empty text.
pub fn bits_per_byte(code_length_bits: u64, text_bytes: u64) -> Option<f64> {
    (text_bytes > 0).then(|| code_length_bits as f64 / text_bytes as f64)
}

/// Compression ratio: `8 |x| / C(x)`, above 1 when the text got shorter. None for a code length of 0.
pub fn compression_ratio(text_bytes: u64, code_length_bits: u64) -> Option<f64> {
    (code_length_bits > 0).then(|| text_bytes as f64 * 8.0 / code_length_bits as f64)
}

/// Delta bits: `C(x) - C(x|B)`, what knowing B saves: the algorithmic mutual information I(B : x), up to
/// the compressor (Li and Vitányi, section 3.9). Negative when B misleads the compressor.
pub fn delta_bits(code_length_bits: u64, conditional_bits: u64) -> i64 {
    let difference = i128::from(code_length_bits) - i128::from(conditional_bits);
    i64::try_from(difference).unwrap_or(if difference < 0 { i64::MIN } else { i64::MAX })
}

/// Conditional compression ratio: `C(x|B) / C(x)`, the share of x that B does not explain. One-sided
/// form of the distance in Li et al. 2004, definition 3: only x is asked about, however long B is. None if
/// `C(x)` is 0.
pub fn conditional_ratio(conditional_bits: u64, code_length_bits: u64) -> Option<f64> {
    (code_length_bits > 0).then(|| conditional_bits as f64 / code_length_bits as f64)
}

/// Normalised compression distance (Cilibrasi and Vitányi 2005, definition 3):
/// `(C(xy) - min(C(x), C(y))) / max(C(x), C(y))`. About 0 for equal texts, about 1 for unrelated ones.
/// A little above 1 where x and y cost more together than apart: text before noise in zstd (1.04), a short
/// text after noise in lz4, whose search passes over bytes after what it could not shorten (1,576 bits for
/// 800 and 328). None if both code lengths are 0.
pub fn ncd(first_bits: u64, second_bits: u64, joint_bits: u64) -> Option<f64> {
    let larger = first_bits.max(second_bits);
    (larger > 0).then(|| {
        let difference = i128::from(joint_bits) - i128::from(first_bits.min(second_bits));
        difference as f64 / larger as f64
    })
}

/// Conditional NCD, the normalised information distance with code lengths for Kolmogorov complexity (Li et
/// al. 2004, definition 3): `max(C(x|y), C(y|x)) / max(C(x), C(y))`. Unlike [`ncd`] it needs no
/// compressor that is symmetric in the order of the texts. None if both code lengths are 0.
pub fn conditional_ncd(
    first_bits: u64,
    second_bits: u64,
    first_given_second_bits: u64,
    second_given_first_bits: u64,
) -> Option<f64> {
    let larger = first_bits.max(second_bits);
    (larger > 0).then(|| first_given_second_bits.max(second_given_first_bits) as f64 / larger as f64)
}

/// Compression-based dissimilarity (Keogh et al. 2004): `C(xy) / (C(x) + C(y))`, 1/2 for equal texts and 1
/// for unrelated ones. None if both code lengths are 0.
pub fn compression_dissimilarity(first_bits: u64, second_bits: u64, joint_bits: u64) -> Option<f64> {
    let sum = first_bits as f64 + second_bits as f64;
    (sum > 0.0).then(|| joint_bits as f64 / sum)
}

/// How often each byte occurs; fed chunk by chunk, the same for every split. 2 KiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByteCounts {
    counts: [u64; 256],
}

impl Default for ByteCounts {
    fn default() -> Self {
        Self { counts: [0; 256] }
    }
}

impl ByteCounts {
    /// Counts a chunk.
    pub fn push(&mut self, chunk: &[u8]) {
        for &byte in chunk {
            if let Some(count) = self.counts.get_mut(usize::from(byte)) {
                *count = count.saturating_add(1);
            }
        }
    }

    /// Bytes counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().fold(0u64, |sum, count| sum.saturating_add(*count))
    }

    /// Order-0 entropy, bits per byte (Shannon 1948, section 6): `-sum p log2 p` with `p = c / n`, as
    /// `log2 n - (sum c log2 c) / n`. Exact to 2^-31. None without bytes.
    pub fn entropy_bits_per_byte(&self) -> Option<f64> {
        let total = self.total();
        if total == 0 {
            return None;
        }
        let weighted = self
            .counts
            .iter()
            .filter(|count| **count > 1)
            .fold(0u128, |sum, count| sum + u128::from(*count) * u128::from(log2(*count)));
        let scaled = u128::from(total) * u128::from(log2(total));
        // Rounding of the logarithms may leave a trace below zero where the entropy is 0.
        let fixed = scaled.saturating_sub(weighted) / u128::from(total);
        Some(fixed as f64 / (1u64 << LOG_FRACTION_BITS) as f64)
    }
}

/// Order-0 entropy of a whole text, bits per byte. See [`ByteCounts::entropy_bits_per_byte`].
pub fn entropy_bits_per_byte(text: &[u8]) -> Option<f64> {
    let mut counts = ByteCounts::default();
    counts.push(text);
    counts.entropy_bits_per_byte()
}

/// log2(x) in 2^-32, rounded down, by repeated squaring of the mantissa (Knuth, TAOCP 1, section 1.2.2,
/// exercise 25, in base 2). `x` of 0 counts as 1.
pub(crate) fn log2(x: u64) -> u64 {
    let x = x.max(1);
    let exponent = 63 - x.leading_zeros();
    // Mantissa in [1, 2) with 63 fractional bits.
    let mut mantissa = u128::from(x) << (63 - exponent);
    let mut fraction = 0u64;
    for _ in 0..LOG_FRACTION_BITS {
        mantissa = (mantissa * mantissa) >> 63;
        fraction <<= 1;
        if mantissa >> 64 != 0 {
            fraction |= 1;
            mantissa >>= 1;
        }
    }
    (u64::from(exponent) << LOG_FRACTION_BITS) | fraction
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn the_formulas_by_hand() {
        assert_eq!(bits_per_byte(12, 4), Some(3.0));
        assert_eq!(compression_ratio(100, 200), Some(4.0));
        assert_eq!((delta_bits(300, 100), delta_bits(100, 300)), (200, -200));
        assert_eq!((delta_bits(u64::MAX, 0), delta_bits(0, u64::MAX)), (i64::MAX, i64::MIN));
        assert_eq!(conditional_ratio(25, 100), Some(0.25));
        assert_eq!(ncd(100, 200, 220), Some(0.6));
        assert_eq!(ncd(200, 100, 220), Some(0.6));
        // Neither end is clamped.
        assert_eq!(ncd(100, 200, 340), Some(1.2));
        assert_eq!(ncd(100, 200, 60), Some(-0.2));
        assert_eq!(conditional_ncd(100, 200, 30, 150), Some(0.75));
        assert_eq!(compression_dissimilarity(100, 100, 150), Some(0.75));
    }

    #[test]
    fn nothing_is_divided_by_zero() {
        assert_eq!(bits_per_byte(8, 0), None);
        assert_eq!(compression_ratio(1, 0), None);
        assert_eq!(conditional_ratio(1, 0), None);
        assert_eq!(ncd(0, 0, 0), None);
        assert_eq!(conditional_ncd(0, 0, 0, 0), None);
        assert_eq!(compression_dissimilarity(0, 0, 0), None);
        assert_eq!(entropy_bits_per_byte(b""), None);
    }

    #[test]
    fn entropy_of_known_distributions() {
        assert_eq!(entropy_bits_per_byte(b"aaaaaaa"), Some(0.0));
        assert_eq!(entropy_bits_per_byte(b"abababab"), Some(1.0));
        assert_eq!(entropy_bits_per_byte(&(0..=255).collect::<Vec<u8>>()), Some(8.0));
        assert_eq!(entropy_bits_per_byte(b"aabc"), Some(1.5));
        let full = ByteCounts { counts: [u64::MAX; 256] };
        assert!(full.entropy_bits_per_byte().is_some(), "saturated counts overflow nothing");
    }

    proptest! {
        #[test]
        fn logarithm_is_the_float_one(x in 1u64..) {
            let difference = log2(x) as f64 / (1u64 << 32) as f64 - (x as f64).log2();
            prop_assert!(difference.abs() < 1e-9, "{x}: {difference}");
        }

        #[test]
        fn entropy_is_the_naive_sum_for_every_split(text in prop::collection::vec(0u8..12, 1..400), at in 0usize..400) {
            let naive: f64 = (0u8..12)
                .map(|byte| text.iter().filter(|&&b| b == byte).count() as f64 / text.len() as f64)
                .filter(|p| *p > 0.0)
                .map(|p| -p * p.log2())
                .sum();
            let at = at.min(text.len());
            let mut counts = ByteCounts::default();
            counts.push(&text[..at]);
            counts.push(&text[at..]);
            let entropy = counts.entropy_bits_per_byte().unwrap();
            prop_assert_eq!(Some(entropy), entropy_bits_per_byte(&text));
            prop_assert!((entropy - naive).abs() < 1e-8, "{} {}", entropy, naive);
        }

        #[test]
        fn distances_are_symmetric_and_exact(x in 0u64..1 << 40, y in 0u64..1 << 40, xy in 0u64..1 << 41) {
            prop_assert_eq!(ncd(x, y, xy), ncd(y, x, xy));
            prop_assert_eq!(conditional_ncd(x, y, 5, 7), conditional_ncd(y, x, 7, 5));
            if x.max(y) > 0 {
                let naive = (xy as f64 - x.min(y) as f64) / x.max(y) as f64;
                prop_assert_eq!(ncd(x, y, xy), Some(naive));
            }
        }
    }
}
