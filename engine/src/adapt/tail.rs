//! The upper tail that admission cuts off, put back by extrapolation.

use alloc::vec::Vec;

use crate::calibrate::UNIT_SCORE;
use crate::coder::log2_fixed;

/// log2_fixed's unit.
const LOG_UNIT: i64 = 4096;

/// Least bits of statistic per halving of the share beyond: one quarter.
const LEAST_SLOPE: i64 = UNIT_SCORE / 4;

/// The statistics of a sample from which the strangest share `cut_ppm` was kept out, and in its place as
/// many values on an exponential tail.
///
/// With n values, r = ceil(n tau / (1 - tau)) are added. Of n + r, let q(x) be the value that a share x
/// reaches. From a = 1/5 (1/2 if the cut is above a tenth) and b = tau and half as much again (at least five
/// values more), both below the cut, the statistic rises by `(q(b) - q(a)) / log2(a / b)` for each halving of the share; the
/// j-th added one stands where that line has the share `tau (j - 1/2) / r`.
///
/// Where the true tail is lighter than that, values are too large and alarms too few; where it is heavier, the
/// other way round. Keep the cut near alpha, so that there is little to extrapolate.
///
/// Rising order. Nothing is added to fewer than 20 values: a tail cannot be told from them.
pub fn with_cut_tail(mut statistics: Vec<i64>, cut_ppm: u32) -> Vec<i64> {
    statistics.sort_unstable();
    let n = statistics.len() as u64;
    let cut = u64::from(cut_ppm.min(500_000));
    if n < 20 || cut == 0 {
        return statistics;
    }
    let added = (n * cut).div_ceil(1_000_000 - cut);
    let all = n + added;
    // Shares of all as counts from the top.
    let a = if cut > 100_000 { all / 2 } else { all / 5 }.max(added + 2);
    let b = (added + (added / 2).max(5)).min(a.saturating_sub(1));
    // The value that `count` of all reach: `count - added` of those there are.
    let reached_by = |count: u64| {
        let from_top = count.saturating_sub(added).clamp(1, n);
        statistics.get((n - from_top) as usize).copied().unwrap_or(0).max(0)
    };
    let log_ratio = |x: u64, y: u64| i64::from(log2_fixed(x)) - i64::from(log2_fixed(y));
    let rise = i128::from(reached_by(b) - reached_by(a)) * i128::from(LOG_UNIT);
    let slope = (rise / i128::from(log_ratio(a, b).max(1))).max(i128::from(LEAST_SLOPE));
    let from = i128::from(reached_by(a));
    for j in (1..=added).rev() {
        // log2(a / (j - 1/2)).
        let beyond = i128::from(log_ratio(2 * a, 2 * j - 1));
        let value = from + slope * beyond / i128::from(LOG_UNIT);
        statistics.push(i64::try_from(value).unwrap_or(i64::MAX));
    }
    statistics.sort_unstable();
    statistics
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bits with an exponential tail, as by quantiles: no chance.
    fn exponential(n: u64, bits_per_halving: f64) -> Vec<i64> {
        (0..n)
            .map(|i| {
                let share = (i as f64 + 0.5) / n as f64;
                (-share.log2() * bits_per_halving * UNIT_SCORE as f64) as i64
            })
            .collect()
    }

    #[test]
    fn an_exponential_tail_is_found_again() {
        for (cut, slope) in [(20_000u32, 1.0), (50_000, 1.7), (150_000, 0.6), (2_000, 1.0)] {
            let whole = exponential(5_000, slope);
            let mut kept = whole.clone();
            kept.sort_unstable();
            kept.truncate((5_000 - 5_000 * u64::from(cut) / 1_000_000) as usize);
            let restored = with_cut_tail(kept.clone(), cut);
            assert!(restored.len().abs_diff(5_000) <= 1);
            // What a share of 1/500 and 1/100 reach is known again to a tenth, which the cut sample says wrong.
            for from_top in [10, 50] {
                let mut sorted = whole.clone();
                sorted.sort_unstable();
                let (true_value, value) = (sorted[5_000 - from_top], restored[restored.len() - from_top]);
                assert!((value - true_value).abs() < true_value / 10, "{cut} {slope}: {value} {true_value}");
                assert!(cut < 20_000 || kept[kept.len() - from_top] < true_value * 9 / 10);
            }
        }
    }

    proptest! {
        #[test]
        fn what_was_there_stays(
            values in prop::collection::vec(any::<i64>(), 0..200), cut in 0u32..1_000_000,
        ) {
            let with = with_cut_tail(values.clone(), cut);
            let mut left = values.clone();
            for value in &with {
                if let Some(at) = left.iter().position(|v| v == value) {
                    left.swap_remove(at);
                }
            }
            prop_assert!(left.is_empty());
            let mut reversed = values;
            reversed.reverse();
            prop_assert_eq!(with, with_cut_tail(reversed, cut));
        }
    }
}
