//! The joint permutation test of two samples of rows.
//!
//! Integers only: a pooled column is ranked, centred and scaled to a root mean square of 2^12, so that
//! no sum over any choice of rows exceeds 2^12 N in absolute value (Cauchy-Schwarz) and fits an i32.

use alloc::vec;
use alloc::vec::Vec;
use core::cmp::{Ordering, Reverse};

use super::monitor::MAX_ROWS;
use crate::calibrate::PValue;
use crate::significance::{Draws, Seed};

/// What is known of one message: 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Length, bytes.
    pub bytes: u64,
    /// Code length C(x|B) under the frozen baseline, 1/256 bit.
    pub cost: u64,
}

/// A property of a message that may drift.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistic {
    /// Code length per byte.
    CostPerByte,
    /// Length in bytes.
    Length,
    /// Total code length.
    TotalCost,
}

/// How a statistic moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aspect {
    /// Up or down as a whole.
    Location,
    /// Apart or together, about the middle.
    Spread,
}

/// Statistics times aspects.
pub const SHIFTS: usize = 6;

const STATISTICS: [Statistic; 3] = [Statistic::CostPerByte, Statistic::Length, Statistic::TotalCost];

/// Columns a permutation adds up: [`SHIFTS`] and padding to whole vector registers.
const LANES: usize = 8;

/// Root mean square of a scaled column.
const SCALE: u128 = 1 << 12;

impl Row {
    /// The statistic in a unit of its own: 1/65536 bit a byte, bytes, 1/256 bit.
    pub fn value(&self, statistic: Statistic) -> u64 {
        match statistic {
            Statistic::CostPerByte => {
                let scaled = (u128::from(self.cost) << 8).checked_div(u128::from(self.bytes)).unwrap_or(0);
                u64::try_from(scaled).unwrap_or(u64::MAX)
            }
            Statistic::Length => self.bytes,
            Statistic::TotalCost => self.cost,
        }
    }
}

/// Which way a shift went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Larger values, or wider apart, than the reference.
    Up,
    /// Smaller values, or closer together.
    Down,
    /// Not at all.
    Neither,
}

/// One statistic's one aspect, window against reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shift {
    /// What moved.
    pub statistic: Statistic,
    /// How it moved.
    pub aspect: Aspect,
    /// Which way.
    pub moved: Moved,
    /// Two-sided p-value, adjusted for looking at all six.
    pub p: PValue,
    /// Effect size: for location Vargha and Delaney's A less a half, P(window > reference) +
    /// P(equal)/2 - 1/2, between -500,000 and 500,000 millionths; for spread the difference of the
    /// mean squared ranks in standard deviations of the pooled ones, millionths.
    pub effect_ppm: i32,
    /// Median of the reference, in the unit of [`Row::value`].
    pub reference_median: u64,
    /// Median of the window.
    pub window_median: u64,
}

/// Outcome of a joint test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShiftTest {
    /// p-value of the largest of the six.
    pub p: PValue,
    /// All six, largest first; the first's p is `p`.
    pub shifts: [Shift; SHIFTS],
}

/// Tests whether `window` is exchangeable with `reference`, by up to `permutations` permutations of
/// whole rows. Ends early once `futile` permutations reached the observed statistic: then p is
/// (1 + futile) / (1 + permutations made), which is valid too (Besag and Clifford 1991).
///
/// Nothing if either sample is empty or both together have more than [`MAX_ROWS`] rows.
pub fn shift_test(
    reference: &[Row],
    window: &[Row],
    permutations: u32,
    futile: u32,
    seed: &Seed,
) -> Option<ShiftTest> {
    let count = reference.len() + window.len();
    if reference.is_empty() || window.is_empty() || count > MAX_ROWS {
        return None;
    }
    let rows: Vec<Row> = window.iter().chain(reference).copied().collect();
    let mut pool = vec![[0i32; LANES]; count];
    for (k, statistic) in STATISTICS.into_iter().enumerate() {
        for (aspect, lane) in [Aspect::Location, Aspect::Spread].into_iter().zip(2 * k..) {
            for (lanes, value) in pool.iter_mut().zip(column(&rows, statistic, aspect)) {
                if let Some(slot) = lanes.get_mut(lane) {
                    *slot = value;
                }
            }
        }
    }
    // The columns sum to about 0, so the smaller sample's sums are the larger's with the sign changed,
    // up to the rounding of the scale; choose it once, for observed and permuted alike.
    let small = window.len().min(reference.len());
    let observed_rows = if window.len() <= reference.len() {
        pool.get(..small).unwrap_or_default()
    } else {
        pool.get(count - small..).unwrap_or_default()
    };
    let sign = if window.len() <= reference.len() { 1 } else { -1 };
    let sums = observed_rows.iter().fold([0i32; LANES], added);
    let observed = sums.map(i32::unsigned_abs);
    let signed = sums.map(|sum| sum * sign);
    let largest = observed.into_iter().max().unwrap_or(0);

    let mut draws = Draws::new(seed);
    let mut reached = [0u32; LANES];
    let mut made = 0u32;
    let mut reached_by_largest = 0u32;
    while made < permutations && reached_by_largest < futile {
        let mut sums = [0i32; LANES];
        for i in 0..small {
            let j = i + draws.below((count - i) as u32) as usize;
            pool.swap(i, j);
            if let Some(row) = pool.get(i) {
                sums = added(sums, row);
            }
        }
        let permuted = sums.into_iter().map(i32::unsigned_abs).max().unwrap_or(0);
        for (reached, observed) in reached.iter_mut().zip(observed) {
            *reached += u32::from(permuted >= observed);
        }
        reached_by_largest += u32::from(permuted >= largest);
        made += 1;
    }

    let mut shifts: Vec<(u32, Shift)> = Vec::with_capacity(SHIFTS);
    for (k, ((&sum, &size), &reached)) in signed.iter().zip(&observed).zip(&reached).take(SHIFTS).enumerate()
    {
        let statistic = STATISTICS.get(k / 2).copied().unwrap_or(Statistic::Length);
        let aspect = if k % 2 == 0 { Aspect::Location } else { Aspect::Spread };
        let shift = Shift {
            statistic,
            aspect,
            moved: match sum.cmp(&0) {
                Ordering::Greater => Moved::Up,
                Ordering::Less => Moved::Down,
                Ordering::Equal => Moved::Neither,
            },
            p: PValue { rank: reached.saturating_add(1), of: made.saturating_add(1) },
            effect_ppm: match aspect {
                Aspect::Location => superiority_ppm(&rows, window.len(), statistic),
                Aspect::Spread => standardised_ppm(sum, window.len(), reference.len()),
            },
            reference_median: median(reference, statistic),
            window_median: median(window, statistic),
        };
        shifts.push((size, shift));
    }
    // Stable: of equal ones the first statistic comes first.
    shifts.sort_by_key(|&(size, _)| Reverse(size));
    let mut sorted = shifts.into_iter().map(|(_, shift)| shift);
    let first = sorted.next()?;
    let mut all = [first; SHIFTS];
    for slot in all.iter_mut().skip(1) {
        *slot = sorted.next()?;
    }
    Some(ShiftTest { p: first.p, shifts: all })
}

#[inline(always)]
fn added(mut sums: [i32; LANES], row: &[i32; LANES]) -> [i32; LANES] {
    for (sum, lane) in sums.iter_mut().zip(row) {
        *sum = sum.wrapping_add(*lane);
    }
    sums
}

/// What each row adds to a linear rank statistic: centred ranks or their centred squares, scaled.
pub(super) fn column(rows: &[Row], statistic: Statistic, aspect: Aspect) -> Vec<i32> {
    let ranks = centred_ranks(rows, statistic);
    match aspect {
        Aspect::Location => scaled(&ranks).collect(),
        Aspect::Spread => scaled(&centred_squares(&ranks)).collect(),
    }
}

/// Twice the mid-rank less its mean: integers that sum to 0, between -(N - 1) and N - 1.
fn centred_ranks(rows: &[Row], statistic: Statistic) -> Vec<i64> {
    let mut order: Vec<(u64, u32)> = (0u32..).zip(rows).map(|(i, row)| (row.value(statistic), i)).collect();
    order.sort_unstable();
    let mut ranks = vec![0i64; rows.len()];
    let mut start = 0usize;
    for tied in order.chunk_by(|a, b| a.0 == b.0) {
        // Twice the mean of ranks start..start + len is 2 start + len - 1.
        let rank = (2 * start + tied.len() - 1) as i64 - (rows.len() as i64 - 1);
        for &(_, i) in tied {
            if let Some(slot) = ranks.get_mut(i as usize) {
                *slot = rank;
            }
        }
        start += tied.len();
    }
    ranks
}

/// N r^2 less the sum of all r^2: integers that sum to 0. N <= 2^16 keeps them in 48 bits.
fn centred_squares(ranks: &[i64]) -> Vec<i64> {
    let sum: i64 = ranks.iter().map(|r| r * r).sum();
    ranks.iter().map(|r| r * r * ranks.len() as i64 - sum).collect()
}

/// The column at a root mean square of [`SCALE`]; all 0 if it is constant.
fn scaled(column: &[i64]) -> impl Iterator<Item = i32> {
    let squares: u128 = column.iter().map(|&c| u128::from(c.unsigned_abs()).pow(2)).sum();
    // Root mean square of the column, with as many fractional bits as there is room for.
    let fraction = (squares.leading_zeros() / 2).min(16);
    let mean = (squares << (2 * fraction)) / (column.len() as u128).max(1);
    let root = mean.isqrt().max(1) as i128;
    column.iter().map(move |&c| (((i128::from(c) * SCALE as i128) << fraction) / root) as i32)
}

/// (A - 1/2) in millionths, from the window's mid-ranks: the first `window` rows.
fn superiority_ppm(rows: &[Row], window: usize, statistic: Statistic) -> i32 {
    // sum of centred double ranks over the window = 2 U - n m, so (A - 1/2) = sum / (2 n m).
    let sum: i64 = centred_ranks(rows, statistic).iter().take(window).sum();
    let pairs = (window * (rows.len() - window)) as i64;
    (i128::from(sum) * 1_000_000).checked_div(i128::from(2 * pairs)).unwrap_or(0) as i32
}

/// Difference of the samples' means of a scaled column, in its standard deviations, millionths.
fn standardised_ppm(window_sum: i32, window: usize, reference: usize) -> i32 {
    let (n, m, sum) = (window as i128, reference as i128, i128::from(window_sum));
    (sum * (n + m) * 1_000_000 / (n * m * SCALE as i128)).clamp(-(1 << 31), (1 << 31) - 1) as i32
}

fn median(rows: &[Row], statistic: Statistic) -> u64 {
    let mut values: Vec<u64> = rows.iter().map(|row| row.value(statistic)).collect();
    let middle = (values.len().max(1) - 1) / 2;
    if values.is_empty() { 0 } else { *values.select_nth_unstable(middle).1 }
}
