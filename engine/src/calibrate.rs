//! Scores to conformal p-values.
//!
//! What: [`NormalRanges`] makes one statistic of a unit's five views (see [`crate::score`]): each view is
//! put on the scale of its surprise, -log2 of the share of held-out normal units that have at least as
//! much of it, and the largest is taken. [`Calibration`] ranks the largest statistic over a message's
//! units among those of held-out normal messages. With n of them, p = (1 + #{s_i >= s}) / (n + 1) (Vovk,
//! Gammerman, Shafer 2005, chapter 2): if normal messages are exchangeable with the held-out ones,
//! P(p <= alpha) <= alpha for every alpha. p is never 0 and ties count against us.
//!
//! How a surprise goes on beyond what was seen: above the 90th percentile u of held-out units the share
//! falls as exp(-(s - u) / beta), beta the mean excess there (the exponential tail of the peaks-over-
//! threshold method, Pickands 1975). It need not be right: it only brings the views to one scale.
//!
//! Why the combination stays valid: all of this is fitted to messages that are not in the calibration
//! set, so the statistic is one fixed function of a message, and one fixed function is all that the
//! argument needs. A message of many units has one p-value, not many to correct for.
//!
//! Cost: about ten divisions and binary searches a unit; a calibration of n messages takes 8n bytes.
//!
//! Not guaranteed: anything about traffic that is not exchangeable with the calibration set, such as
//! a new application behind the same route; that is drift.

use alloc::vec::Vec;

use crate::coder::log2_fixed;
use crate::score::UnitScores;

/// Fixed-point scale of a surprise: this is one bit.
pub const UNIT_SCORE: i64 = 1 << 20;

/// The statistic of a unit that the baseline has no model for: stranger than any that it has.
pub const UNSEEN_UNIT: i64 = i64::MAX / 4;

/// No view is more surprising than this.
const MAX_SURPRISE: i64 = UNSEEN_UNIT / 16;

/// One way to look at a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum View {
    /// The code length of the whole.
    Total,
    /// A soft maximum of the bytes' costs.
    Peak,
    /// Odd values in fields.
    Fields,
    /// New pairs of familiar words.
    NewPairs,
    /// New words.
    NewWords,
}

/// How many views there are.
pub const VIEWS: usize = 5;

impl View {
    /// All, in the order of their numbers.
    pub const ALL: [Self; VIEWS] = [Self::Total, Self::Peak, Self::Fields, Self::NewPairs, Self::NewWords];

    /// As in the JSON of a verdict.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Peak => "peak",
            Self::Fields => "fields",
            Self::NewPairs => "new_pairs",
            Self::NewWords => "new_words",
        }
    }

    /// Least mean excess beyond the 90th percentile, in the view's own scale. Held-out units that are all
    /// but alike would otherwise make the slightest change outweigh everything.
    fn least_scale(self) -> i64 {
        match self {
            // A quarter of a standard deviation; of a bit.
            Self::Total | Self::Peak => 64,
            Self::Fields => 26,
            // Half of a square root of a pair.
            Self::NewPairs => 128,
            // A twentieth of the words.
            Self::NewWords => 3277,
        }
    }
}

/// How far the total of normal units strays from its expectation: sqrt(a (L + 1) + b L^2 + 1/4) bits for L
/// bytes. Bytes that stray independently give the first term, units that differ as a whole the second
/// (a random-effects model).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    /// a, 1/65536 square bit.
    pub per_byte: u64,
    /// b, 1/65536 square bit.
    pub per_square: u64,
}

/// A sixteenth of a square bit for each byte: held-out units that are all but alike (an envelope of fixed
/// keys) say nothing about how far the next one may stray.
const LEAST_PER_BYTE: u64 = 65536 / 16;

impl Spread {
    /// Least squares of ((T - mu L) / L)^2 against a / L + b, each unit weighted by its length up to 4,000.
    /// `units` are (L, T - mu L in 1/256 bit).
    fn fit(units: &mut [(u64, i64)]) -> Self {
        // Sorted, so that the rounding of the sums does not depend on the order in which units came.
        units.sort_unstable();
        let (mut xx, mut x, mut w, mut xy, mut y) = (0f64, 0f64, 0f64, 0f64, 0f64);
        for &(length, excess) in units.iter().filter(|(length, _)| *length > 0) {
            let (length, excess) = (length as f64, excess as f64 / 256.0);
            let square = (excess / length) * (excess / length);
            let (inverse, weight) = (1.0 / length, if length < 4000.0 { length } else { 4000.0 });
            xx += weight * inverse * inverse;
            x += weight * inverse;
            w += weight;
            xy += weight * inverse * square;
            y += weight * square;
        }
        let determinant = xx * w - x * x;
        let (mut a, mut b) = if determinant > 1e-12 {
            ((xy * w - y * x) / determinant, (xx * y - x * xy) / determinant)
        } else {
            (if xx > 0.0 { xy / xx } else { 0.0 }, 0.0)
        };
        if b < 0.0 {
            (a, b) = (if xx > 0.0 { xy / xx } else { 0.0 }, 0.0);
        } else if a < 0.0 {
            (a, b) = (0.0, if w > 0.0 { y / w } else { 0.0 });
        }
        // A cast saturates.
        let per_byte = ((a * 65536.0 + 0.5) as u64).max(LEAST_PER_BYTE);
        Self { per_byte, per_square: (b * 65536.0 + 0.5) as u64 }
    }

    /// `excess` (1/256 bit) of `length` bytes in standard deviations, 1/256.
    fn standardised(self, length: u64, excess: i64) -> i64 {
        let length = u128::from(length);
        let variance = u128::from(self.per_byte) * (length + 1)
            + u128::from(self.per_square).saturating_mul(length * length)
            + 65536 / 4;
        // The square root in 1/256 bit, from as many high bits as fit a word.
        let shift = (128 - variance.leading_zeros()).saturating_sub(62).next_multiple_of(2);
        let deviation = u128::from(((variance >> shift) as u64).isqrt()) << (shift / 2);
        let deviation = deviation.max(1);
        // In a word where that is enough, which a unit of any usual length is: wide divisions take many times as long.
        match (excess.checked_mul(256), i64::try_from(deviation)) {
            (Some(excess), Ok(deviation)) => excess / deviation,
            _ => {
                let z = i128::from(excess) * 256 / (deviation as i128);
                z.clamp(i64::MIN.into(), i64::MAX.into()) as i64
            }
        }
    }
}

/// Most quantiles kept of a view.
const MAX_QUANTILES: usize = 33;

/// How much of a view held-out normal units have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Units it was fitted to.
    pub units: u32,
    /// How many of them lie beyond [`Self::threshold`].
    pub beyond: u32,
    /// Where the tail begins, in the view's scale.
    pub threshold: i64,
    /// Mean excess beyond it.
    pub scale: i64,
    /// Evenly spaced quantiles, lowest and highest included.
    pub quantiles: Vec<i64>,
    /// log2 of the units and one more, in 1/256 of a unit; in 1/4096.
    all: u32,
    /// Surprise at the threshold, in 1/4096 bit.
    base: u32,
}

impl Default for Tail {
    fn default() -> Self {
        Self::new(0, 0, 0, 0, Vec::new())
    }
}

impl Tail {
    /// Of its parts, `quantiles` in ascending order.
    pub fn new(units: u32, beyond: u32, threshold: i64, scale: i64, quantiles: Vec<i64>) -> Self {
        let all = log2_fixed((u64::from(units) + 1) * 256);
        let base = log2_fixed(u64::from(units)).saturating_sub(log2_fixed(u64::from(beyond)));
        Self { units, beyond, threshold, scale, quantiles, all, base }
    }

    /// To the values of held-out units, in any order. Of fewer than 100, the scale is not below that of
    /// `pooled`, since the few largest say little; without any, the tail is `pooled`.
    fn fit(mut values: Vec<i64>, view: View, pooled: Option<&Tail>) -> Self {
        const ENOUGH: usize = 100;
        values.sort_unstable();
        let count = values.len();
        if let (0, Some(pooled)) = (count, pooled) {
            return pooled.clone();
        }
        let beyond = (count / 10).max(5).min(count.saturating_sub(1));
        let threshold = count.checked_sub(beyond + 1).and_then(|at| values.get(at)).copied().unwrap_or(0);
        let excess: i128 =
            values.iter().rev().take(beyond).map(|&value| i128::from(value) - i128::from(threshold)).sum();
        let mean = excess.checked_div(beyond as i128).unwrap_or(0).min(i64::MAX.into()) as i64;
        let mut scale = mean.max(view.least_scale());
        if let Some(pooled) = pooled
            && count < ENOUGH
        {
            scale = scale.max(pooled.scale);
        }
        let kept = count.min(MAX_QUANTILES);
        let rank = |i: usize| i * count.saturating_sub(1) / kept.saturating_sub(1).max(1);
        let quantiles = (0..kept).filter_map(|i| values.get(rank(i)).copied()).collect();
        Self::new(count as u32, beyond as u32, threshold, scale, quantiles)
    }

    /// -log2 of the share of normal units with at least this much, in 1/[`UNIT_SCORE`] bit.
    fn surprise(&self, value: i64) -> i64 {
        /// log2(e) in 1/4096.
        const LOG2_E: i64 = 5909;
        const FINE: u32 = UNIT_SCORE.trailing_zeros() - 12;
        let units = u64::from(self.units);
        if value > self.threshold {
            let (beyond, scale) = (value.checked_sub(self.threshold), self.scale.max(1));
            let excess = match beyond.and_then(|beyond| beyond.checked_mul(LOG2_E << FINE)) {
                Some(excess) => i128::from(excess / scale),
                None => {
                    let beyond = i128::from(value) - i128::from(self.threshold);
                    beyond * i128::from(LOG2_E << FINE) / i128::from(scale)
                }
            };
            return (i128::from(self.base << FINE) + excess).min(MAX_SURPRISE.into()) as i64;
        }
        // How many have less, in 1/256 of a unit, between two quantiles by interpolation.
        let above = self.quantiles.partition_point(|&quantile| quantile < value);
        let last = self.quantiles.len().saturating_sub(1).max(1) as u64;
        let span = units.saturating_sub(1) * 256;
        // A snapshot has at most 2^16 quantiles: the product is below 2^56.
        let rank = |i: usize| i as u64 * span / last;
        let less = match (
            above.checked_sub(1).and_then(|below| self.quantiles.get(below)),
            self.quantiles.get(above),
        ) {
            (Some(&low), Some(&high)) if high > low => {
                let (part, width) = (value.abs_diff(low), high.abs_diff(low));
                let between = rank(above) - rank(above - 1);
                let more = match between.checked_mul(part) {
                    Some(more) => more / width,
                    None => (u128::from(between) * u128::from(part) / u128::from(width)) as u64,
                };
                rank(above - 1) + more
            }
            (_, Some(_)) => rank(above),
            (_, None) => units * 256,
        };
        let at_least = (units * 256).saturating_sub(less) + 128;
        i64::from(self.all.saturating_sub(log2_fixed(at_least)) << FINE)
    }
}

/// What normal units of one kind score, fitted to held-out ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NormalRanges {
    /// Mean cost of a byte, 1/65536 bit.
    pub expected: u32,
    /// Of the total.
    pub spread: Spread,
    /// By [`View`].
    pub tails: [Tail; VIEWS],
}

/// How surprising each view of a unit is, in 1/[`UNIT_SCORE`] bit.
pub type Surprises = [i64; VIEWS];

impl NormalRanges {
    /// To the scores of held-out normal units, in any order, whose bytes cost `expected` (1/65536 bit) in
    /// the mean, with the ranges over all kinds of units for what they are too few to say.
    pub fn fit(expected: u32, units: &[UnitScores], pooled: Option<&NormalRanges>) -> Self {
        let mut lengths: Vec<(u64, i64)> =
            units.iter().map(|unit| (unit.bytes, unit.excess(expected))).collect();
        let spread = match pooled {
            Some(pooled) if units.is_empty() => pooled.spread,
            _ => Spread::fit(&mut lengths),
        };
        let mut ranges = Self { expected, spread, tails: Default::default() };
        let values: Vec<[i64; VIEWS]> = units.iter().map(|unit| ranges.values(unit)).collect();
        for (view, tail) in View::ALL.into_iter().zip(0..) {
            let of_view = values.iter().filter_map(|values| values.get(view as usize).copied()).collect();
            let pooled = pooled.and_then(|pooled| pooled.tails.get(tail));
            if let Some(slot) = ranges.tails.get_mut(tail) {
                *slot = Tail::fit(of_view, view, pooled);
            }
        }
        ranges
    }

    /// The views of a unit, each in its own scale.
    fn values(&self, scores: &UnitScores) -> [i64; VIEWS] {
        [
            self.spread.standardised(scores.bytes, scores.excess(self.expected)),
            scores.peak(),
            scores.fields(),
            scores.new_pairs(),
            scores.new_words(),
        ]
    }

    /// How surprising each view of the unit is.
    pub fn surprises(&self, scores: &UnitScores) -> Surprises {
        let mut surprises = self.values(scores);
        for (value, tail) in surprises.iter_mut().zip(&self.tails) {
            *value = tail.surprise(*value);
        }
        surprises
    }

    /// The unit's statistic, in 1/[`UNIT_SCORE`] bit: the largest surprise. Larger is stranger. The others
    /// decide between units with the same.
    pub fn statistic(&self, scores: &UnitScores) -> i64 {
        combined(&self.surprises(scores))
    }
}

/// The statistic of a unit with these surprises; see [`NormalRanges::statistic`].
pub(crate) fn combined(surprises: &Surprises) -> i64 {
    surprises.iter().copied().max().unwrap_or(0) + surprises.iter().sum::<i64>() / 8192
}

/// A conformal p-value as the exact fraction `rank / of`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PValue {
    /// 1 + the number of calibration messages at least as strange.
    pub rank: u32,
    /// Calibration messages + 1.
    pub of: u32,
}

impl PValue {
    /// Is p <= `alpha_ppm` millionths?
    pub fn at_most(self, alpha_ppm: u32) -> bool {
        u64::from(self.rank) * 1_000_000 <= u64::from(alpha_ppm) * u64::from(self.of)
    }

    /// The fraction in millionths, rounded up: never below p, never 0.
    pub fn ceil_ppm(self) -> u32 {
        (u64::from(self.rank) * 1_000_000).div_ceil(u64::from(self.of.max(1))) as u32
    }
}

/// Statistics of held-out normal messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calibration {
    sorted: Vec<i64>,
}

impl Calibration {
    /// From the messages' statistics, in any order.
    pub fn new(mut statistics: Vec<i64>) -> Self {
        statistics.sort_unstable();
        Self { sorted: statistics }
    }

    /// The statistics, smallest first.
    pub fn statistics(&self) -> &[i64] {
        &self.sorted
    }

    /// The p-value of a message with this statistic.
    pub fn p_value(&self, statistic: i64) -> PValue {
        let smaller = self.sorted.partition_point(|&s| s < statistic);
        let at_least = (self.sorted.len() - smaller) as u32;
        PValue { rank: at_least.saturating_add(1), of: (self.sorted.len() as u32).saturating_add(1) }
    }
}

/// Fewest calibration messages with which p can reach `alpha_ppm` at all: n + 1 >= 1 / alpha.
pub fn messages_for_alpha(alpha_ppm: u32) -> u32 {
    1_000_000u32.div_ceil(alpha_ppm.max(1)).saturating_sub(1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    proptest! {
        #[test]
        fn p_is_the_definition(calibration in prop::collection::vec(-50i64..50, 0..80), s in -60i64..60) {
            let at_least = calibration.iter().filter(|&&c| c >= s).count() as u32;
            let p = Calibration::new(calibration.clone()).p_value(s);
            prop_assert_eq!((p.rank, p.of), (1 + at_least, 1 + calibration.len() as u32));
            prop_assert!(p.ceil_ppm() > 0);
            prop_assert!(p.at_most(p.ceil_ppm()));
        }

        #[test]
        fn a_surprise_grows_with_the_value_and_is_bounded(
            values in prop::collection::vec(-1000i64..1000, 0..300),
            a in any::<i64>(), b in -1100i64..1100, c in -1100i64..1100,
        ) {
            let tail = Tail::fit(values, View::Peak, None);
            prop_assert!(b > c || tail.surprise(b) <= tail.surprise(c));
            prop_assert!(b > a || tail.surprise(b) <= tail.surprise(a));
            prop_assert!((0..=MAX_SURPRISE).contains(&tail.surprise(a)));
        }

        /// Against the definition in floating point.
        #[test]
        fn a_surprise_is_the_share_of_units_with_as_much(
            values in prop::collection::vec(-1000i64..1000, 20..300), value in -1100i64..3000,
        ) {
            let tail = Tail::fit(values.clone(), View::Peak, None);
            let bits = tail.surprise(value) as f64 / UNIT_SCORE as f64;
            let n = values.len() as f64;
            let mut sorted = values.clone();
            sorted.sort_unstable();
            let k = (values.len() / 10).max(5);
            let threshold = sorted[values.len() - k - 1];
            if value > threshold {
                let beyond = &sorted[values.len() - k..];
                let scale = beyond.iter().map(|v| (v - threshold) as f64).sum::<f64>() / k as f64;
                let exact = (n / k as f64).log2() + (value - threshold) as f64 / scale.floor().max(64.0) * core::f64::consts::LOG2_E;
                prop_assert!((bits - exact).abs() < 0.01 + exact / 1000.0, "{bits} {exact}");
            } else {
                let share = |rank: f64| -((n - rank + 0.5) / (n + 1.0)).log2();
                let less = values.iter().filter(|&&v| v < value).count() as f64;
                // Quantiles are a 32nd of the units apart, or each unit is one.
                let blur = if n > 33.0 { n / 32.0 + 1.0 } else { 1.0 };
                prop_assert!(bits >= share((less - blur).max(0.0)) - 0.01, "{bits} {}", share(less));
                prop_assert!(bits <= share((less + blur).min(n)) + 0.01, "{bits} {}", share(less));
            }
        }

        #[test]
        fn the_total_is_the_definition(
            cost in 0u64..1 << 30, bytes in 1u64..1 << 20, expected in 0u32..8 << 16, a in 0u64..1 << 30, b in 0u64..1 << 24,
        ) {
            let spread = Spread { per_byte: a, per_square: b };
            let scores = UnitScores { cost, bytes, ..UnitScores::default() };
            let (l, mu) = (bytes as f64, f64::from(expected) / 65536.0);
            let variance = a as f64 / 65536.0 * (l + 1.0) + b as f64 / 65536.0 * l * l + 0.25;
            let exact = (cost as f64 / 256.0 - mu * l) / variance.sqrt();
            let got = spread.standardised(bytes, scores.excess(expected)) as f64 / 256.0;
            prop_assert!((got - exact).abs() < 0.02 + exact.abs() / 100.0, "{got} {exact}");
        }
    }

    #[test]
    fn the_spread_of_units_is_found_again() {
        // Excesses of +-sqrt(a L + b L^2), without chance.
        let units = |a: f64, b: f64| -> Vec<(u64, i64)> {
            (1..400u64)
                .map(|i| {
                    let l = (i * 7) as f64;
                    let size = ((a * l + b * l * l).sqrt() * 256.0) as i64;
                    (i * 7, if i % 2 == 0 { size } else { -size })
                })
                .collect()
        };
        for (a, b) in [(4.0, 0.0), (4.0, 0.01), (0.0625, 0.5)] {
            let found = Spread::fit(&mut units(a, b));
            let (fa, fb) = (found.per_byte as f64 / 65536.0, found.per_square as f64 / 65536.0);
            assert!((fa - a).abs() < 0.1 && (fb - b).abs() < 0.001, "{a} {b}: {fa} {fb}");
        }
        assert_eq!(Spread::fit(&mut []), Spread { per_byte: LEAST_PER_BYTE, per_square: 0 });
    }

    /// Validity as a statistic: over exchangeable messages, the share with p <= alpha stays within the
    /// 99.9 % binomial bound, at each alpha, with heavy ties.
    #[test]
    fn false_positives_are_at_most_alpha() {
        let mut x = 88_172_645_463_325_252u64;
        let mut next = move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            // Few distinct values, so that ties are common.
            ((x >> 20) % 64).pow(2) as i64 / 16
        };
        let (trials, n) = (4000u32, 199);
        let mut flagged = [0u32; 3];
        let alphas = [10_000u32, 50_000, 200_000];
        for _ in 0..trials {
            let calibration = Calibration::new((0..n).map(|_| next()).collect());
            let p = calibration.p_value(next());
            for (flagged, alpha) in flagged.iter_mut().zip(alphas) {
                *flagged += u32::from(p.at_most(alpha));
            }
        }
        for (flagged, alpha) in flagged.into_iter().zip(alphas) {
            let a = f64::from(alpha) / 1e6;
            let bound = f64::from(trials) * a + 3.3 * (f64::from(trials) * a * (1.0 - a)).sqrt();
            assert!(f64::from(flagged) <= bound, "{flagged} of {trials} at alpha {a}");
            assert!(flagged > 0, "the test has no power at alpha {a}");
        }
    }

    #[test]
    fn the_calibration_needed_for_alpha_just_reaches_it() {
        for alpha in [1u32, 999, 1000, 5000, 10_000, 333_333, 1_000_000] {
            let n = messages_for_alpha(alpha) as usize;
            assert!(Calibration::new(vec![0; n]).p_value(1).at_most(alpha), "alpha {alpha}");
            assert!(n == 1 || !Calibration::new(vec![0; n - 1]).p_value(1).at_most(alpha), "alpha {alpha}");
        }
    }

    #[test]
    fn few_units_do_not_make_a_narrow_range() {
        let pooled = Tail::fit((0..2000).step_by(10).collect(), View::Peak, None);
        assert_eq!((pooled.beyond, pooled.threshold, pooled.scale), (20, 1790, 105));
        let few = Tail::fit(vec![5, 5], View::Peak, Some(&pooled));
        assert_eq!((few.units, few.threshold, few.scale), (2, 5, 105));
        assert_eq!(Tail::fit(vec![7; 500], View::Peak, Some(&pooled)).scale, View::Peak.least_scale());
        assert_eq!(Tail::fit(vec![], View::Peak, Some(&pooled)), pooled);
    }
}
