//! Scores to conformal p-values.
//!
//! What: [`NormalRanges`] makes one statistic of a unit's five views (see [`crate::score`]): each view is
//! put on the scale of its surprise, -log2 of the share of held-out normal units that have at least as
//! much of it, and the largest is taken, with a quarter of what the words say. [`Calibration`] ranks the
//! largest statistic over a message's units among those of held-out normal messages. With n of them,
//! p = (1 + #{s_i >= s}) / (n + 1) (Vovk, Gammerman, Shafer 2005, chapter 2): if normal messages are
//! exchangeable with the held-out ones, P(p <= alpha) <= alpha for every alpha. p is never 0 and ties count
//! against us.
//!
//! Below the 90th percentile a surprise is that of 33 quantiles, and a straight line between two: -log2 of the share of units
//! with as much as quantile i, each quantile counting for half a unit.
//!
//! How a surprise goes on beyond what was seen: above the 90th percentile u of held-out units the share
//! falls as exp(-(s - u) / beta), beta the mean excess there (the exponential tail of the peaks-over-
//! threshold method, Pickands 1975). It need not be right: it only brings the views to one scale. Of the total's
//! surprise beyond log2(n + 1) bits, what n units can tell, a quarter counts: units that differ as a whole differ by
//! more than such a tail says, and a few normal ones would outrank most of what the other views find (DECISIONS.md).
//!
//! What length has to do with it: what is ordinary in a long form is not in a short command. The total and the
//! fields are surprising by the units of about the same length too, as far as length explains them (a share
//! that is itself fitted; see `length`): s + share (s' - s), s' of the stratum. Beyond log2(n + 1) bits, where
//! the stratum's n units are too few to count, s' is at most 2 s: they may lack what the next one has. Lengths with fewer than
//! [`MIN_STRATUM_UNITS`] held-out units have the range of all, and so has everything if there are fewer than
//! twice as many units. New pairs grow with length; what a regression says of that is taken off. The peak is
//! left as it is: by length it gains nothing (DECISIONS.md).
//!
//! Why the combination stays valid: all of this is fitted to messages that are not in the calibration
//! set, so the statistic is one fixed function of a message, and one fixed function is all that the
//! argument needs. A message of many units has one p-value, not many to correct for.
//!
//! Cost: some 80 ns a unit: three logarithms, four divisions, and in seven lists of quantiles a look at twelve; a calibration of
//! n messages takes 8n bytes.
//!
//! Not guaranteed: anything about traffic that is not exchangeable with the calibration set, such as
//! a new application behind the same route; that is drift.

use alloc::vec::Vec;

use crate::coder::log2_fixed;
use crate::score::UnitScores;

mod length;

pub use length::{MAX_STRATA, MIN_STRATUM_UNITS};

/// Fixed-point scale of a surprise: this is one bit.
pub const UNIT_SCORE: i64 = 1 << 20;

/// Of the surprise of a total that is beyond what held-out units can tell, one part in so many counts.
const BEYOND_OF_TOTAL: i64 = 4;

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

    /// Those whose range depends on length.
    pub const BY_LENGTH: [Self; 2] = [Self::Total, Self::Fields];

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
            // A quarter of a standard deviation.
            Self::Total => 64,
            // A seventh more of every byte's cost; a sixth more of every field's deviation.
            Self::Peak => 192,
            Self::Fields => 110,
            // A hundredth of the words (and 300).
            Self::NewPairs => 655,
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

/// In 1/65536 square bit.
const QUARTER_BIT: u128 = 65536 / 4;

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

    /// Of `length` bytes, in 1/65536 square bit, if it has at most 62 bits: any usual length's.
    fn variance(self, length: u64) -> Option<u64> {
        let of_bytes = self.per_byte.checked_mul(length.checked_add(1)?)?;
        let of_square = self.per_square.checked_mul(length.checked_mul(length)?)?;
        let variance = of_bytes.checked_add(of_square)?.checked_add(QUARTER_BIT as u64)?;
        (variance >> 62 == 0).then_some(variance)
    }

    /// `excess` (1/256 bit) of `length` bytes in standard deviations, 1/256.
    fn standardised(self, length: u64, excess: i64) -> i64 {
        let deviation = match self.variance(length) {
            Some(variance) => u128::from(variance.isqrt()),
            None => {
                let length = u128::from(length);
                let variance = u128::from(self.per_byte) * (length + 1)
                    + u128::from(self.per_square).saturating_mul(length * length)
                    + QUARTER_BIT;
                // The square root in 1/256 bit, from as many high bits as fit a word.
                let shift = (128 - variance.leading_zeros()).saturating_sub(62).next_multiple_of(2);
                u128::from(((variance >> shift) as u64).isqrt()) << (shift / 2)
            }
        };
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
pub(crate) const MAX_QUANTILES: usize = 33;

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
    /// The lowest quantile, and the surprise of what is not above it.
    lowest: i64,
    least: i64,
    /// Every eighth quantile.
    eighths: [i64; MAX_QUANTILES / EIGHT],
    /// By quantile.
    steps: Vec<Step>,
}

const EIGHT: usize = 8;

impl Default for Tail {
    fn default() -> Self {
        Self::new(0, 0, 0, 0, Vec::new())
    }
}

impl Tail {
    /// Of its parts, `quantiles` in ascending order.
    pub fn new(units: u32, beyond: u32, threshold: i64, scale: i64, quantiles: Vec<i64>) -> Self {
        let all = log2_fixed((u64::from(units) + 1) * 256);
        let last = quantiles.len().saturating_sub(1).max(1) as u128;
        // -log2 of the share of units with as much as a quantile has, the units less by 1/2 of a unit as it is reached.
        let surprise = |i: usize| {
            let less = i as u128 * u128::from(units.saturating_sub(1)) * 256 / last;
            let at_least = (u128::from(units) * 256).saturating_sub(less) as u64 + 128;
            i64::from(all.saturating_sub(log2_fixed(at_least)) << FINE)
        };
        // Not below the surprise of the lowest: of no unit or one, none lies beyond.
        let beyond_share = log2_fixed(u64::from(units)).saturating_sub(log2_fixed(u64::from(beyond)));
        let base = beyond_share.max((surprise(0) >> FINE) as u32);
        let ends = quantiles.iter().skip(1).map(Some).chain([None]);
        let steps = quantiles.iter().zip(ends).enumerate().map(|(i, (&from, to))| {
            let width = to.map_or(0, |&to| to.abs_diff(from));
            let rise = (surprise(i + 1) - surprise(i)) as u64;
            Step { surprise: surprise(i), slope: (rise << SLOPE_BITS).checked_div(width).unwrap_or(0) }
        });
        let steps = steps.collect();
        let eighth = |i: usize| quantiles.get(EIGHT * i + EIGHT - 1).copied().unwrap_or(i64::MAX);
        let eighths = core::array::from_fn(eighth);
        let (lowest, least) = (quantiles.first().copied().unwrap_or(0), surprise(0));
        Self { units, beyond, threshold, scale, lowest, least, eighths, quantiles, all, base, steps }
    }

    /// To the values of held-out units, in any order. Of fewer than 100, the scale is not below that of
    /// `pooled`, since the few largest say little; without any, the tail is `pooled`.
    fn fit(values: Vec<i64>, view: View, pooled: Option<&Tail>) -> Self {
        const ENOUGH: usize = 100;
        match pooled {
            Some(pooled) if values.is_empty() => pooled.clone(),
            Some(pooled) if values.len() < ENOUGH => {
                Self::with_scale_at_least(values, view.least_scale().max(pooled.scale))
            }
            _ => Self::with_scale_at_least(values, view.least_scale()),
        }
    }

    fn with_scale_at_least(mut values: Vec<i64>, least: i64) -> Self {
        values.sort_unstable();
        let count = values.len();
        let beyond = (count / 10).max(5).min(count.saturating_sub(1));
        let threshold = count.checked_sub(beyond + 1).and_then(|at| values.get(at)).copied().unwrap_or(0);
        let excess: i128 =
            values.iter().rev().take(beyond).map(|&value| i128::from(value) - i128::from(threshold)).sum();
        let mean = excess.checked_div(beyond as i128).unwrap_or(0).min(i64::MAX.into()) as i64;
        let kept = count.min(MAX_QUANTILES);
        let rank = |i: usize| i * count.saturating_sub(1) / kept.saturating_sub(1).max(1);
        let quantiles = (0..kept).filter_map(|i| values.get(rank(i)).copied()).collect();
        Self::new(count as u32, beyond as u32, threshold, mean.max(least), quantiles)
    }

    /// As much as can be counted: more than all of the units have.
    fn most_surprise(&self) -> i64 {
        // `all` is of 256 times as many.
        i64::from(self.all.saturating_sub(8 << 12)) << (UNIT_SCORE.trailing_zeros() - 12)
    }

    /// How many quantiles are less. Counted by eights, then in one: halving would wait for each load.
    #[inline(always)]
    fn quantiles_below(&self, value: i64) -> usize {
        let less = |quantile: &&i64| **quantile < value;
        let eights = self.eighths.iter().filter(less).count() * EIGHT;
        let eight = self.quantiles.get(eights..).unwrap_or_default();
        eights + eight.iter().take(EIGHT).filter(less).count()
    }

    /// -log2 of the share of normal units with at least this much, in 1/[`UNIT_SCORE`] bit.
    #[inline]
    fn surprise(&self, value: i64) -> i64 {
        /// log2(e) in 1/4096.
        const LOG2_E: i64 = 5909;
        if value > self.threshold {
            let (beyond, scale) = (value.checked_sub(self.threshold), self.scale.max(1));
            let excess = match beyond.and_then(|beyond| beyond.checked_mul(LOG2_E << FINE)) {
                Some(excess) => excess / scale,
                None => {
                    let beyond = i128::from(value) - i128::from(self.threshold);
                    let excess = beyond * i128::from(LOG2_E << FINE) / i128::from(scale);
                    excess.min(MAX_SURPRISE.into()) as i64
                }
            };
            return i64::from(self.base << FINE).saturating_add(excess).min(MAX_SURPRISE);
        }
        // Most units have no new words.
        if value <= self.lowest {
            return self.least;
        }
        // Between two quantiles, by interpolation.
        let Some(before) = self.quantiles_below(value).checked_sub(1) else { return self.least };
        match (self.steps.get(before), self.quantiles.get(before)) {
            (Some(step), Some(&quantile)) => {
                let (part, slope) = (value.abs_diff(quantile), step.slope);
                // In a word where it fits, as nearly always: wasm has no wider product.
                let rise = match (part | slope) >> 32 {
                    0 => (part * slope) >> SLOPE_BITS,
                    _ => ((u128::from(part) * u128::from(slope)) >> SLOPE_BITS) as u64,
                };
                // At most what it is at the next.
                step.surprise.saturating_add_unsigned(rise)
            }
            _ => 0,
        }
    }
}

/// A surprise at a quantile, and how it goes on to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    /// In 1/[`UNIT_SCORE`] bit.
    surprise: i64,
    /// Surprise a unit of the view's scale, [`SLOPE_BITS`] fractional bits.
    slope: u64,
}

/// Fractional bits of a slope.
const SLOPE_BITS: u32 = 32;

/// From 1/4096 to 1/[`UNIT_SCORE`].
const FINE: u32 = UNIT_SCORE.trailing_zeros() - 12;

/// How much of a view held-out units of about one length have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stratum {
    /// Symbols of the shortest unit that is judged by it.
    pub shortest: u64,
    /// And of the longest.
    pub longest: u64,
    /// By [`View::BY_LENGTH`].
    pub tails: [Tail; View::BY_LENGTH.len()],
}

/// The views whose range depends on length, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ByLength {
    /// What a stratum has to say against all lengths together, in 1/256, by [`View::BY_LENGTH`]: the share of
    /// the view's differences that length explains.
    pub shares: [u16; View::BY_LENGTH.len()],
    /// By rising length, apart from each other.
    pub strata: Vec<Stratum>,
}

/// The whole of a share.
pub(crate) const WHOLE_SHARE: u16 = 256;

impl ByLength {
    /// To the (symbols, values) of held-out units, in any order.
    fn fit(mut units: Vec<(u64, [i64; VIEWS])>, tails: &[Tail; VIEWS]) -> Self {
        units.sort_unstable();
        let lengths: Vec<u64> = units.iter().map(|(length, _)| *length).collect();
        let runs = length::runs(&lengths);
        let mut fitted = Self::default();
        for (i, run) in runs.iter().enumerate() {
            let at = |place: usize| lengths.get(place).copied();
            let shortest = at(run.start).unwrap_or(0);
            let next = runs.get(i + 1).and_then(|next| at(next.start)).unwrap_or(u64::MAX);
            let longest = length::longest_alike(shortest).min(next.saturating_sub(1));
            fitted.strata.push(Stratum { shortest, longest, tails: Default::default() });
        }
        for (k, view) in View::BY_LENGTH.into_iter().enumerate() {
            let of_view = |(_, values): &(u64, [i64; VIEWS])| values.get(view as usize).copied();
            let values: Vec<Vec<i64>> = runs
                .iter()
                .map(|run| units.get(run.clone()).unwrap_or_default().iter().filter_map(of_view).collect())
                .collect();
            if let Some(share) = fitted.shares.get_mut(k) {
                *share = length::explained(&values);
            }
            // Units of one length may be all but alike by chance.
            let least = tails.get(view as usize).map_or(0, |tail| tail.scale / 3).max(view.least_scale());
            for (stratum, values) in fitted.strata.iter_mut().zip(values) {
                if let Some(tail) = stratum.tails.get_mut(k) {
                    *tail = Tail::with_scale_at_least(values, least);
                }
            }
        }
        fitted
    }

    /// The stratum of a length, if it has one.
    fn stratum(&self, length: u64) -> Option<&Stratum> {
        let at = self.strata.partition_point(|stratum| stratum.longest < length);
        self.strata.get(at).filter(|stratum| stratum.shortest <= length)
    }
}

/// What normal units of one kind score, fitted to held-out ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NormalRanges {
    /// Mean cost of a byte, 1/65536 bit.
    pub expected: u32,
    /// Of the total.
    pub spread: Spread,
    /// How much more new pairs a unit of twice the length has, in the scale of [`UnitScores::new_pairs`].
    pub pairs_growth: i64,
    /// By [`View`].
    pub tails: [Tail; VIEWS],
    /// For units of nearly one length.
    pub by_length: ByLength,
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
        let pairs_growth = match pooled {
            Some(pooled) if units.is_empty() => pooled.pairs_growth,
            _ => length::slope(
                &units.iter().map(|unit| (log2_fixed(unit.bytes), unit.new_pairs())).collect::<Vec<_>>(),
            ),
        };
        let mut ranges = Self { expected, spread, pairs_growth, ..Self::default() };
        let values: Vec<(u64, [i64; VIEWS])> =
            units.iter().map(|unit| (unit.bytes, ranges.values(unit))).collect();
        for (view, tail) in View::ALL.into_iter().zip(0..) {
            let of_view =
                values.iter().filter_map(|(_, values)| values.get(view as usize).copied()).collect();
            let pooled = pooled.and_then(|pooled| pooled.tails.get(tail));
            if let Some(slot) = ranges.tails.get_mut(tail) {
                *slot = Tail::fit(of_view, view, pooled);
            }
        }
        ranges.by_length = ByLength::fit(values, &ranges.tails);
        ranges
    }

    /// The views of a unit, each in its own scale.
    fn values(&self, scores: &UnitScores) -> [i64; VIEWS] {
        let (log2_of_bytes, peak, fields) = scores.logarithms();
        let grown = (i128::from(self.pairs_growth) * i128::from(log2_of_bytes)) >> 12;
        let grown = grown.clamp(i64::MIN.into(), i64::MAX.into()) as i64;
        [
            self.spread.standardised(scores.bytes, scores.excess(self.expected)),
            peak,
            fields,
            scores.new_pairs().saturating_sub(grown),
            scores.new_words(),
        ]
    }

    /// How surprising each view of the unit is.
    pub fn surprises(&self, scores: &UnitScores) -> Surprises {
        let values = self.values(scores);
        let mut surprises = values;
        for (surprise, tail) in surprises.iter_mut().zip(&self.tails) {
            *surprise = tail.surprise(*surprise);
        }
        let of_length = self.by_length.stratum(scores.bytes).map(|stratum| &stratum.tails);
        for (view, (tail, share)) in
            View::BY_LENGTH.into_iter().zip(of_length.into_iter().flatten().zip(self.by_length.shares))
        {
            if let (Some(surprise), Some(&value)) =
                (surprises.get_mut(view as usize), values.get(view as usize))
            {
                let own = tail.surprise(value).min(tail.most_surprise().max(2 * *surprise));
                let more = i128::from(own - *surprise) * i128::from(share);
                *surprise += (more >> WHOLE_SHARE.trailing_zeros()) as i64;
            }
        }
        let ([total, ..], [tail_of_total, ..]) = (&mut surprises, &self.tails);
        let more = (*total - tail_of_total.most_surprise()).max(0);
        *total -= more - more / BEYOND_OF_TOTAL;
        surprises
    }

    /// The unit's statistic, in 1/[`UNIT_SCORE`] bit: the largest surprise and a quarter of what its words say.
    /// Larger is stranger. The other views decide between units with the same.
    pub fn statistic(&self, scores: &UnitScores) -> i64 {
        combined(&self.surprises(scores))
    }
}

/// The statistic of a unit with these surprises; see [`NormalRanges::statistic`].
pub(crate) fn combined(surprises: &Surprises) -> i64 {
    let [_, _, _, new_pairs, new_words] = surprises;
    let largest = surprises.iter().copied().max().unwrap_or(0);
    largest + (new_pairs + new_words) / 4 + surprises.iter().sum::<i64>() / 8192
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

        #[test]
        fn the_tail_of_one_unit_or_none_grows_too(
            unit in prop::option::of(-1000i64..1000), b in -1100i64..1100, c in -1100i64..1100,
        ) {
            let tail = Tail::fit(unit.into_iter().collect(), View::Peak, None);
            prop_assert!(tail.surprise(b.min(c)) <= tail.surprise(b.max(c)));
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
                let exact = (n / k as f64).log2() + (value - threshold) as f64 / scale.floor().max(View::Peak.least_scale() as f64) * core::f64::consts::LOG2_E;
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

        /// Against the definition, quantile by quantile, in whole numbers.
        #[test]
        fn a_surprise_is_that_of_the_quantiles_and_a_line_between(
            values in prop::collection::vec(-300i64..300, 1..300), far in any::<bool>(), value in -320i64..320,
        ) {
            // Far apart, a product takes more than a word.
            let scale = if far { 1 << 30 } else { 1 };
            let values: Vec<i64> = values.into_iter().map(|value| value * scale).collect();
            let (tail, value) = (Tail::fit(values, View::Peak, None), value * scale);
            let quantiles = &tail.quantiles;
            let last = quantiles.len().saturating_sub(1).max(1) as u64;
            let units = u64::from(tail.units);
            let at = |i: usize| {
                let less = i as u64 * (units - 1) * 256 / last;
                i64::from((log2_fixed((units + 1) * 256)).saturating_sub(log2_fixed(units * 256 - less + 128)) << 8)
            };
            prop_assume!(value <= tail.threshold);
            let got = tail.surprise(value);
            match quantiles.iter().position(|&quantile| quantile >= value) {
                None => prop_assert!(false, "the threshold is a quantile at most"),
                Some(0) => prop_assert_eq!(got, at(0)),
                Some(i) => {
                    let (low, high) = (quantiles[i - 1], quantiles[i]);
                    let part = (value - low) as f64 / (high - low) as f64;
                    let line = at(i - 1) as f64 + part * (at(i) - at(i - 1)) as f64;
                    // A slope is cut behind 32 bits.
                    let cut = (high - low) as f64 / 2f64.powi(32);
                    prop_assert!((got as f64 - line).abs() <= 2.0 + cut, "{got} {line}");
                    prop_assert!((at(i - 1)..=at(i)).contains(&got));
                }
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

    /// Whole units stray further than a tail fitted to a few says.
    #[test]
    fn a_total_counts_a_quarter_beyond_what_held_out_units_can_tell() {
        let unit = |cost: u64| UnitScores { bytes: 100, cost, peak_sum: 40, ..UnitScores::default() };
        let long = |i: u64| UnitScores { bytes: 300, ..unit(150_000 + i) };
        let units: Vec<UnitScores> =
            (0..255).map(|i| if i % 2 == 0 { unit(50_000 + i) } else { long(i) }).collect();
        let ranges = NormalRanges::fit(500 << 8, &units, None);
        assert!(ranges.by_length.stratum(100).is_some());
        let total = |cost: u64| ranges.surprises(&unit(cost))[View::Total as usize];
        // As steep as before up to the eight bits that 255 units tell.
        let last = (50_000..1 << 20).take_while(|&cost| total(cost) <= 8 * UNIT_SCORE).last().unwrap();
        let (before, behind) = (total(last) - total(last - 64), total(last + 65) - total(last + 1));
        assert!((behind * BEYOND_OF_TOTAL).abs_diff(before) < UNIT_SCORE as u64 / 16, "{before} {behind}");
        // No other view bends there.
        let dear = UnitScores { peak_sum: 1 << 30, ..unit(50_000) };
        let [_, peak, ..] = ranges.surprises(&dear);
        assert!(peak > 20 * UNIT_SCORE, "{peak}");
    }

    proptest! {
        #[test]
        fn the_statistic_is_the_definition(surprises in prop::array::uniform5(0i64..1 << 40)) {
            let [.., pairs, words] = surprises;
            let largest = surprises.iter().max().unwrap();
            let exact = *largest as f64 + (pairs + words) as f64 / 4.0 + surprises.iter().sum::<i64>() as f64 / 8192.0;
            prop_assert!((combined(&surprises) as f64 - exact).abs() <= 2.0);
        }

        #[test]
        fn more_of_any_view_is_never_less_strange(
            surprises in prop::array::uniform5(0i64..MAX_SURPRISE), view in 0..VIEWS, more in 0i64..1 << 40,
        ) {
            let mut other = surprises;
            other[view] = (other[view] + more).min(MAX_SURPRISE);
            prop_assert!(combined(&other) >= combined(&surprises));
            prop_assert!(combined(&other) < UNSEEN_UNIT);
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
        let pooled = Tail::fit((0..20_000).step_by(100).collect(), View::Peak, None);
        assert_eq!((pooled.beyond, pooled.threshold, pooled.scale), (20, 17_900, 1_050));
        let few = Tail::fit(vec![5, 5], View::Peak, Some(&pooled));
        assert_eq!((few.units, few.threshold, few.scale), (2, 5, 1_050));
        assert_eq!(Tail::fit(vec![7; 500], View::Peak, Some(&pooled)).scale, View::Peak.least_scale());
        assert_eq!(Tail::fit(vec![], View::Peak, Some(&pooled)), pooled);
    }

    /// xorshift64.
    fn numbers() -> impl FnMut(u64) -> u64 {
        let mut x = 88_172_645_463_325_252u64;
        move |below| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 20) % below
        }
    }

    /// Units of two lengths: long ones with much in their fields, short ones with little; five more of a hundred
    /// doubles it.
    fn unit(long: bool, strangeness: u64) -> UnitScores {
        let field_sum = ((5 + strangeness % 5) << (strangeness / 5)) * 256 / 5;
        let (bytes, field_sum) = if long { (300, field_sum << 21) } else { (40, field_sum) };
        UnitScores { bytes, field_sum, ..UnitScores::default() }
    }

    #[test]
    fn a_unit_is_compared_with_those_of_its_length() {
        let mut next = numbers();
        let mut units: Vec<UnitScores> = (0..200).map(|i| unit(i % 2 == 0, next(100))).collect();
        let ranges = NormalRanges::fit(0, &units, None);
        let strata = &ranges.by_length.strata;
        assert_eq!(
            strata.iter().map(|s| (s.shortest, s.longest)).collect::<Vec<_>>(),
            [(40, 42), (300, 321)]
        );
        assert!(ranges.by_length.shares[1] > 180, "{:?}", ranges.by_length.shares);
        let fields = |scores: &UnitScores| ranges.surprises(scores)[View::Fields as usize];
        let odd = UnitScores { field_sum: unit(true, 0).field_sum, ..unit(false, 0) };
        let same_of_another_length = UnitScores { bytes: 170, ..odd };
        assert!(fields(&unit(true, 0)) < 2 * UNIT_SCORE);
        assert!(fields(&odd) > 4 * UNIT_SCORE, "{}", fields(&odd));
        assert!(fields(&same_of_another_length) < 2 * UNIT_SCORE, "between strata, all lengths count");
        units.reverse();
        assert_eq!(ranges, NormalRanges::fit(0, &units, None), "the order of units does not matter");
    }

    #[test]
    fn few_held_out_units_have_one_range_for_all_lengths() {
        let mut next = numbers();
        for count in [0, 1, 2, 2 * MIN_STRATUM_UNITS - 1] {
            let units: Vec<UnitScores> = (0..count).map(|i| unit(i % 2 == 0, next(100))).collect();
            let ranges = NormalRanges::fit(0, &units, None);
            assert_eq!(ranges.by_length, ByLength::default(), "{count} units");
            assert!((0..UNSEEN_UNIT).contains(&ranges.statistic(&UnitScores::default())), "{count} units");
        }
    }

    /// The whole way: ranges of some messages, ranks among others. At alpha 5 % the share of false alarms
    /// stays within the 99.9 % bound, and half of them are short: one range for all would have none of those.
    #[test]
    fn strata_keep_false_positives_at_alpha_and_spread_them_over_lengths() {
        let mut next = numbers();
        let (mut short, mut long) = (0u32, 0u32);
        let (trials, each) = (40u32, 50u32);
        for _ in 0..trials {
            let mut draw =
                |n: usize| -> Vec<UnitScores> { (0..n).map(|_| unit(next(2) == 0, next(100))).collect() };
            let ranges = NormalRanges::fit(0, &draw(150), None);
            let calibration = Calibration::new(draw(199).iter().map(|unit| ranges.statistic(unit)).collect());
            for unit in draw(each as usize) {
                let flagged = calibration.p_value(ranges.statistic(&unit)).at_most(50_000);
                *(if unit.bytes > 100 { &mut long } else { &mut short }) += u32::from(flagged);
            }
        }
        let n = f64::from(trials * each);
        // Messages of one trial share a calibration, so the bound is wider than the binomial one.
        let bound = n * 0.05 + 3.3 * (n * 0.05 * 0.95 * (1.0 + f64::from(each) / 200.0)).sqrt();
        assert!(f64::from(short + long) <= bound, "{short} + {long} of {n}");
        assert!(short * 4 > long && long * 4 > short, "{short} short, {long} long");
    }

    proptest! {
        #[test]
        fn a_view_of_more_is_at_least_as_surprising_at_each_length(
            units in prop::collection::vec((1u64..60, 0u64..500), 0..200), bytes in 1u64..70, a in 0u64..2000, b in 0u64..2000,
        ) {
            let of = |(bytes, field_sum)| UnitScores { bytes, field_sum, ..UnitScores::default() };
            let ranges = NormalRanges::fit(0, &units.into_iter().map(of).collect::<Vec<_>>(), None);
            let fields = |sum| ranges.surprises(&of((bytes, sum)))[View::Fields as usize];
            prop_assert!(fields(a.min(b)) <= fields(a.max(b)));
            prop_assert!((0..=MAX_SURPRISE).contains(&fields(a)));
        }
    }
}
