//! Scores to conformal p-values.
//!
//! What: [`NormalRanges`] puts a unit's two deciding scores on one scale and adds them up; [`Calibration`]
//! ranks the largest such sum of a message among held-out normal messages. With n of them, p = (1 + #{s_i >= s}) / (n + 1)
//! (Vovk, Gammerman, Shafer 2005, chapter 2): if normal messages are exchangeable with the held-out
//! ones, P(p <= alpha) <= alpha for every alpha. p is never 0 and ties count against us.
//!
//! Why the combination stays valid: the ranges is fixed from messages that are not in the
//! calibration set, so the combined statistic is one fixed function of a message, and one fixed
//! function is all that the argument needs. The statistic of a message is the largest over its units,
//! so a message of many units has one p-value, not many to correct for.
//!
//! Cost: two binary searches a message; a calibration of n messages takes 8n bytes.
//!
//! Not guaranteed: anything about traffic that is not exchangeable with the calibration set, such as
//! a new application behind the same route; that is drift.

use alloc::vec::Vec;

use crate::score::UnitScores;

/// One score's normal range among held-out units: `(value - median) / spread` is 1 at the 90th
/// percentile. The 99th of a few hundred units is noise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// Median of the held-out scores, 1/256 bit.
    pub median: i64,
    /// 90th percentile less the median, 1/256 bit, at least [`MIN_SPREAD`].
    pub spread: i64,
}

/// Least spread, 1/256 bit: half a bit. Kinds of unit that are all but constant would otherwise outweigh
/// every other kind of their messages by the slightest change.
pub const MIN_SPREAD: i64 = 128;

/// Fixed-point scale of a normalised score: this is 1.
pub const UNIT_SCORE: i64 = 1 << 12;

/// The statistic of a unit that the baseline has no model for: stranger than any that it has.
pub const UNSEEN_UNIT: i64 = i64::MAX / 4;

impl Range {
    /// From held-out values in any order. With fewer than 100 the spread is not below that of
    /// `pooled`, since the 90th percentile of a handful says little; with none, the range is `pooled`.
    fn fit(mut values: Vec<i64>, pooled: Option<Range>) -> Self {
        const ENOUGH: usize = 100;
        values.sort_unstable();
        let median = quantile(&values, 50);
        let spread = quantile(&values, 90).saturating_sub(median).max(MIN_SPREAD);
        match pooled {
            Some(pooled) if values.is_empty() => pooled,
            Some(pooled) if values.len() < ENOUGH => Self { median, spread: spread.max(pooled.spread) },
            _ => Self { median, spread },
        }
    }

    /// The value on the common scale: 0 at the median, [`UNIT_SCORE`] at the 90th percentile.
    fn normalised(self, value: i64) -> i64 {
        let scaled = (i128::from(value) - i128::from(self.median)) * i128::from(UNIT_SCORE)
            / i128::from(self.spread.max(1));
        scaled.clamp(i128::from(-UNSEEN_UNIT / 2), i128::from(UNSEEN_UNIT / 2 - 1)) as i64
    }
}

/// The value below which `percent` % of `sorted` lie (nearest rank); 0 if there is none.
fn quantile(sorted: &[i64], percent: usize) -> i64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(rank).copied().unwrap_or(0)
}

/// What normal units of one kind score, fitted on held-out ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NormalRanges {
    /// Mean cost of a byte, 1/65536 bit.
    pub expected: u64,
    /// Of the standardised total.
    pub standardised: Range,
    /// Of the peak.
    pub peak: Range,
}

impl NormalRanges {
    /// From the scores of held-out normal units, in any order, and the ranges over all kinds of units.
    pub fn fit(units: &[UnitScores], pooled: Option<&NormalRanges>) -> Self {
        let (cost, bytes) = units.iter().fold((0u128, 0u128), |(cost, bytes), unit| {
            (cost + u128::from(unit.cost), bytes + u128::from(unit.bytes))
        });
        let expected = match (cost << 8).checked_div(bytes) {
            Some(mean) => mean as u64,
            None => pooled.map_or(0, |p| p.expected),
        };
        let standardised = units.iter().map(|unit| unit.standardised(expected)).collect();
        let peak = units.iter().map(UnitScores::peak).collect();
        Self {
            expected,
            standardised: Range::fit(standardised, pooled.map(|p| p.standardised)),
            peak: Range::fit(peak, pooled.map(|p| p.peak)),
        }
    }

    /// The unit's statistic, in 1/[`UNIT_SCORE`]: how far its standardised total and its peak lie above
    /// normal, added. Larger is stranger.
    pub fn statistic(&self, scores: &UnitScores) -> i64 {
        self.standardised.normalised(scores.standardised(self.expected)) + self.peak.normalised(scores.peak())
    }
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
        fn normalised_scores_grow_with_the_scores(a in any::<i64>(), b in any::<i64>(), spread in 0i64..1 << 40) {
            let range = Range { median: 1 << 20, spread };
            prop_assert!(a > b || range.normalised(a) <= range.normalised(b));
            prop_assert!(range.normalised(a).saturating_mul(2) < UNSEEN_UNIT);
        }
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
        let pooled = Range::fit((0..2000).step_by(10).collect(), None);
        assert_eq!(pooled, Range { median: 990, spread: 800 });
        assert_eq!(Range::fit(vec![5, 5], Some(pooled)), Range { median: 5, spread: 800 });
        assert_eq!(Range::fit(vec![7; 500], Some(pooled)), Range { median: 7, spread: MIN_SPREAD });
        assert_eq!(Range::fit(vec![], Some(pooled)), pooled);
    }
}
