//! What a unit's length says about its views.
//!
//! What: [`runs`] cuts held-out units into strata of nearly one length; [`explained`] says how much of a
//! view's differences the strata account for; [`slope`] how a view grows with length where it does so evenly.
//!
//! Why: forms, commands and records have lengths of their own, and what is ordinary in a long form is not in a
//! short command. A single range for all lengths lets the strangest kind of text set the bounds for all. But a
//! stratum has few units to judge by, and where lengths say little (prose) it would judge by chance alone, so
//! its say is the share that it explains.
//!
//! Cost: sorting the held-out units, once, in training.
//!
//! Left out on purpose: lengths between strata or outside of them; those have the range over all lengths.

use alloc::vec::Vec;
use core::ops::Range;

/// Fewest units of a stratum. With fewer than twice as many held-out units there are no strata.
pub const MIN_STRATUM_UNITS: usize = 30;
/// Most strata of a kind of unit.
pub const MAX_STRATA: usize = 16;

/// The longest that is in one stratum with the shortest: a fourteenth longer.
pub(super) fn longest_alike(shortest: u64) -> u64 {
    shortest.saturating_add(shortest / 14)
}

fn alike(shortest: u64, longest: u64) -> bool {
    longest <= longest_alike(shortest)
}

/// Strata of rising `lengths`, as ranges of places: from the shortest on, as soon as enough units are alike.
/// Units of one length are in one stratum or in none. None at all if there would be one only.
pub(super) fn runs(lengths: &[u64]) -> Vec<Range<usize>> {
    let least = MIN_STRATUM_UNITS.max(lengths.len() / MAX_STRATA);
    let at = |place: usize| lengths.get(place).copied();
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut start = 0;
    while let (Some(shortest), Some(longest)) = (at(start), at(start + least - 1)) {
        let ties = |length: u64| lengths.partition_point(|&other| other <= length);
        if alike(shortest, longest) {
            let end = ties(longest);
            runs.push(start..end);
            start = end;
            continue;
        }
        // Too few of this length to begin with; they may still belong to the stratum before.
        let end = ties(shortest);
        match runs.last_mut() {
            Some(last) if last.end == start && at(last.start).is_some_and(|first| alike(first, shortest)) => {
                last.end = end;
            }
            _ => {}
        }
        start = end;
    }
    if let Some(last) = runs.last_mut()
        && let Some(shortest) = at(last.start)
    {
        while last.end >= start && at(last.end).is_some_and(|length| alike(shortest, length)) {
            last.end += 1;
        }
    }
    if runs.len() < 2 { Vec::new() } else { runs }
}

/// The share of the variance of ranks that lies between strata rather than within them, in 1/256; by how
/// much it would shrink if the strata's means were known (Kelley's epsilon squared, 1935, of the ranks that
/// Kruskal and Wallis, 1952, test). 0 if strata of this size would seem to explain as much by chance.
pub(super) fn explained(strata: &[Vec<i64>]) -> u16 {
    let mut sorted: Vec<i64> = strata.iter().flatten().copied().collect();
    sorted.sort_unstable();
    let (n, groups) = (sorted.len() as i128, strata.len() as i128);
    // Twice the mid-rank, less its mean.
    let rank = |value: i64| {
        let (below, upto) = (sorted.partition_point(|&v| v < value), sorted.partition_point(|&v| v <= value));
        (below + upto) as i128 - n
    };
    let (mut total, mut within) = (0i128, 0i128);
    for stratum in strata {
        let (sum, squares) = stratum.iter().fold((0i128, 0i128), |(sum, squares), &value| {
            let rank = rank(value);
            (sum + rank, squares + rank * rank)
        });
        total += squares;
        within += squares - sum * sum / (stratum.len().max(1) as i128);
    }
    let (seen, unseen) = (total * (n - groups), within * (n - 1));
    if seen <= 0 {
        return 0;
    }
    (256 * (seen - unseen) / seen).clamp(0, 256) as u16
}

/// How much y grows with each doubling of x, in y's own fixed point: least squares with a ridge of ten square doublings, so that few units or units of one length say nothing; never below 0.
/// `points` are (log2 in 1/4096, y).
pub(super) fn slope(points: &[(u32, i64)]) -> i64 {
    const RIDGE: i128 = 10 << 24;
    // Sums of integers: the order of the units does not matter.
    let n = points.len() as i128;
    let (mut x, mut y, mut xx, mut xy) = (0i128, 0i128, 0i128, 0i128);
    for &(log, value) in points {
        let (log, value) = (i128::from(log), i128::from(value));
        x += log;
        y += value;
        xx += log * log;
        xy += log * value;
    }
    if n == 0 {
        return 0;
    }
    let (covariance, variance) = (xy - x * y / n, xx - x * x / n);
    // log2 is in 1/4096, its square in 1/2^24.
    (4096 * covariance / (variance + RIDGE)).clamp(0, i64::MAX.into()) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    #[test]
    fn strata_begin_where_enough_units_are_alike() {
        let many = |length: u64, n: usize| vec![length; n];
        let of = |parts: &[Vec<u64>]| runs(&parts.concat());
        assert_eq!(of(&[many(10, 30), many(20, 30)]), [0..30, 30..60]);
        assert_eq!(of(&[many(10, 30), many(20, 29)]), [], "one is none");
        assert_eq!(of(&[many(10, 30), many(15, 5), many(20, 30)]), [0..30, 35..65]);
        assert_eq!(of(&[many(100, 30), many(107, 5), many(200, 30)]), [0..35, 35..65], "joined");
        assert_eq!(of(&[many(100, 30), many(108, 5), many(200, 30)]), [0..30, 35..65], "too long to be");
        assert_eq!(of(&[many(10, 30), many(20, 30), many(21, 3), many(22, 3)]), [0..30, 30..63]);
        assert_eq!(of(&[many(10, 1600), many(20, 99), many(30, 200)]), [0..1600, 1699..1899], "at most 16");
        assert_eq!(runs(&[]), []);
    }

    #[test]
    fn a_share_is_nothing_by_chance_and_all_when_strata_lie_apart() {
        let strata = |apart: i64| -> Vec<Vec<i64>> {
            (0..3).map(|s| (0..40).map(|i| s * apart + i * 17 % 40).collect()).collect()
        };
        assert_eq!(explained(&strata(0)), 0);
        assert!((220..256).contains(&explained(&strata(40))), "{}", explained(&strata(40)));
        assert_eq!(explained(&[vec![1; 30], vec![2; 30]]), 256);
        assert_eq!(explained(&[vec![7; 30], vec![7; 30]]), 0);
        assert_eq!(explained(&[]), 0);
    }

    #[test]
    fn a_slope_is_found_where_units_say_enough() {
        let points = |n: u32, slope: i64| -> Vec<(u32, i64)> {
            (0..n).map(|i| (i * 40_960 / n, i64::from(i * 40_960 / n) * slope / 4096)).collect()
        };
        assert!((990..=1000).contains(&slope(&points(1000, 1000))), "{}", slope(&points(1000, 1000)));
        assert!((400..700).contains(&slope(&points(2, 1000))), "the ridge: {}", slope(&points(2, 1000)));
        assert_eq!((slope(&points(1000, -1000)), slope(&[(4096, 5); 90]), slope(&[])), (0, 0, 0));
    }

    proptest! {
        #[test]
        fn strata_are_alike_large_enough_and_apart(mut lengths in prop::collection::vec(1u64..80, 0..600)) {
            lengths.sort_unstable();
            let runs = runs(&lengths);
            prop_assert!(runs.len() != 1 && runs.len() <= MAX_STRATA);
            for run in &runs {
                prop_assert!(run.len() >= MIN_STRATUM_UNITS);
                prop_assert!(alike(lengths[run.start], lengths[run.end - 1]));
                prop_assert!(run.start == 0 || lengths[run.start - 1] < lengths[run.start]);
                prop_assert!(lengths.get(run.end).is_none_or(|next| *next > lengths[run.end - 1]));
            }
            prop_assert!(runs.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }

        /// Against the definitions in floating point.
        #[test]
        fn shares_and_slopes_are_the_formulas(
            strata in prop::collection::vec(prop::collection::vec(-20i64..20, 5..40), 2..6),
            points in prop::collection::vec((0u32..80_000, -100_000i64..100_000), 1..100),
        ) {
            let all: Vec<i64> = strata.concat();
            let rank = |v: i64| {
                let below = all.iter().filter(|&&u| u < v).count() as f64;
                below + (all.iter().filter(|&&u| u == v).count() as f64 + 1.0) / 2.0
            };
            let (n, groups) = (all.len() as f64, strata.len() as f64);
            let squares = |values: &[i64]| -> f64 {
                let mean = values.iter().map(|&v| rank(v)).sum::<f64>() / values.len() as f64;
                values.iter().map(|&v| (rank(v) - mean).powi(2)).sum()
            };
            let (total, within) = (squares(&all), strata.iter().map(|s| squares(s)).sum::<f64>());
            let share = (1.0 - within / (n - groups) / (total / (n - 1.0))).max(0.0);
            prop_assert!(total == 0.0 || (f64::from(explained(&strata)) / 256.0 - share).abs() < 0.01);

            let n = points.len() as f64;
            let xy: Vec<(f64, f64)> = points.iter().map(|&(x, y)| (f64::from(x) / 4096.0, y as f64)).collect();
            let (x, y) = (xy.iter().map(|p| p.0).sum::<f64>() / n, xy.iter().map(|p| p.1).sum::<f64>() / n);
            let covariance: f64 = xy.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
            let variance: f64 = xy.iter().map(|p| (p.0 - x).powi(2)).sum();
            let exact = (covariance / (variance + 10.0)).max(0.0);
            prop_assert!((slope(&points) as f64 - exact).abs() < 2.0 + exact / 100.0, "{} {exact}", slope(&points));
        }
    }
}
