//! What scores are worth: area under the ROC curve, detection at a fixed share of false positives, how
//! sure either is.
//!
//! What: [`Ranked`] puts the scores of normals and attacks on one scale of ranks, since only their order
//! counts, and computes everything from two histograms over it:
//! - AUROC: the probability that an attack outranks a normal, ties counted half (Hanley and McNeil 1982).
//! - TPR at a share f of false positives: the share of attacks above the smallest threshold that at most f
//!   of the normals exceed.
//! - 95 % intervals by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13): normals and
//!   attacks are drawn again, each with replacement, 1,000 times, ChaCha-seeded. The attacks' and the
//!   normals' sampling is in them; that of the training messages is not, which is what `--seeds` is for.
//! - Length-matched figures: texts go into half-octaves of length; only those count that hold attacks and at
//!   least 20 normals, and in each the normals are weighted to be as many as the attacks. Length alone then
//!   tells nothing apart.
//!
//! Cost: a linear pass over the ranks for each resample, some 50 ms for 6,000 scores.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use serde::Serialize;

/// Resamples of the bootstrap.
const RESAMPLES: usize = 1_000;
/// Least normals of a stratum of length that counts.
const MIN_STRATUM: usize = 20;

/// An interval, both ends included.
pub(crate) type Interval = [f64; 2];

/// Detection of one group of attacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Area under the ROC curve; ties count half. None without attacks.
    pub auroc: Option<f64>,
    /// True-positive rate at 1 % false positives.
    pub tpr_at_fpr_1pct: Option<f64>,
    /// True-positive rate at 0.1 % false positives.
    pub tpr_at_fpr_01pct: Option<f64>,
    /// Attacks counted.
    pub n_attack: usize,
}

/// 95 % intervals of [`Figures`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Intervals {
    /// Of `auroc`.
    pub auroc: Option<Interval>,
    /// Of `tpr_at_fpr_1pct`.
    pub tpr_at_fpr_1pct: Option<Interval>,
    /// Of `tpr_at_fpr_01pct`.
    pub tpr_at_fpr_01pct: Option<Interval>,
}

/// Scores of normals and attacks as ranks.
#[derive(Clone, Debug)]
pub(crate) struct Ranked {
    /// Rank of each normal, in the order given.
    normals: Vec<usize>,
    attacks: Vec<usize>,
    /// Different scores.
    ranks: usize,
}

impl Ranked {
    pub(crate) fn new(normals: &[i64], attacks: &[i64]) -> Self {
        let mut scale: Vec<i64> = normals.iter().chain(attacks).copied().collect();
        scale.sort_unstable();
        scale.dedup();
        let rank = |score: &i64| scale.partition_point(|known| known < score);
        Self {
            normals: normals.iter().map(rank).collect(),
            attacks: attacks.iter().map(rank).collect(),
            ranks: scale.len(),
        }
    }

    pub(crate) fn figures(&self) -> Figures {
        self.weighted(|_| 1.0, |_| true)
    }

    /// Figures with each normal counted as `weight` says and only the attacks that `counts`; both are
    /// asked by position.
    fn weighted(&self, weight: impl Fn(usize) -> f64, counts: impl Fn(usize) -> bool) -> Figures {
        let (mut normals, mut attacks) = (vec![0.0; self.ranks], vec![0.0; self.ranks]);
        for (at, &rank) in self.normals.iter().enumerate() {
            normals[rank] += weight(at);
        }
        let mut n_attack = 0;
        for (_, &rank) in self.attacks.iter().enumerate().filter(|(at, _)| counts(*at)) {
            attacks[rank] += 1.0;
            n_attack += 1;
        }
        let Some([auroc, one, tenth]) = of_histograms(&normals, &attacks) else { return Figures::default() };
        Figures { auroc: Some(auroc), tpr_at_fpr_1pct: Some(one), tpr_at_fpr_01pct: Some(tenth), n_attack }
    }

    /// Percentile intervals of the three figures.
    pub(crate) fn intervals(&self, seed: u64) -> Intervals {
        if self.attacks.is_empty() || self.normals.is_empty() {
            return Intervals::default();
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut drawn: [Vec<f64>; 3] = Default::default();
        let (mut normals, mut attacks) = (vec![0.0; self.ranks], vec![0.0; self.ranks]);
        for _ in 0..RESAMPLES {
            draw(&mut rng, &self.normals, &mut normals);
            draw(&mut rng, &self.attacks, &mut attacks);
            if let Some(figures) = of_histograms(&normals, &attacks) {
                drawn.iter_mut().zip(figures).for_each(|(all, figure)| all.push(figure));
            }
        }
        let [auroc, one, tenth] = drawn.map(middle);
        Intervals { auroc, tpr_at_fpr_1pct: one, tpr_at_fpr_01pct: tenth }
    }

    /// Figures among texts of like length; `normal_bytes` and `attack_bytes` in the scores' order.
    pub(crate) fn length_matched(&self, normal_bytes: &[usize], attack_bytes: &[usize]) -> Figures {
        let of = |lengths: &[usize]| -> Vec<usize> { lengths.iter().map(|bytes| stratum(*bytes)).collect() };
        let (normal_strata, attack_strata) = (of(normal_bytes), of(attack_bytes));
        let size = |strata: &[usize], of: usize| strata.iter().filter(|stratum| **stratum == of).count();
        let weights: Vec<f64> = (0..128)
            .map(|stratum| match size(&normal_strata, stratum) {
                normals if normals >= MIN_STRATUM => size(&attack_strata, stratum) as f64 / normals as f64,
                _ => 0.0,
            })
            .collect();
        self.weighted(|at| weights[normal_strata[at]], |at| weights[attack_strata[at]] > 0.0)
    }

    /// Points of the ROC curve from (0, 0) to (1, 1), and of the precision-recall curve, thresholds
    /// falling: (false-positive rate, true-positive rate, precision).
    pub(crate) fn curve(&self) -> Vec<[f64; 3]> {
        let (mut normals, mut attacks) = (vec![0usize; self.ranks], vec![0usize; self.ranks]);
        self.normals.iter().for_each(|rank| normals[*rank] += 1);
        self.attacks.iter().for_each(|rank| attacks[*rank] += 1);
        let (mut false_positives, mut true_positives) = (0, 0);
        let mut points = vec![[0.0, 0.0, 1.0]];
        for (normals, attacks) in normals.iter().zip(&attacks).rev() {
            false_positives += normals;
            true_positives += attacks;
            points.push([
                false_positives as f64 / self.normals.len().max(1) as f64,
                true_positives as f64 / self.attacks.len().max(1) as f64,
                true_positives as f64 / (true_positives + false_positives).max(1) as f64,
            ]);
        }
        points
    }
}

/// Percentile interval of a share among `of`, of which `hits` have it.
pub(crate) fn share_interval(hits: usize, of: usize, seed: u64) -> Option<Interval> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let resample = |_| {
        let drawn = (0..of).filter(|_| below(&mut rng, of) < hits).count();
        drawn as f64 / of as f64
    };
    middle((0..RESAMPLES).map(resample).collect())
}

/// Half-octave of a length.
fn stratum(bytes: usize) -> usize {
    (bytes.max(1) as u128 * bytes.max(1) as u128).ilog2() as usize
}

/// AUROC, TPR at 1 % and at 0.1 %, of weights by rising rank. None if either side weighs nothing.
fn of_histograms(normals: &[f64], attacks: &[f64]) -> Option<[f64; 3]> {
    let (all_normals, all_attacks) = (normals.iter().sum::<f64>(), attacks.iter().sum::<f64>());
    if all_normals <= 0.0 || all_attacks <= 0.0 {
        return None;
    }
    let (mut below, mut wins) = (0.0, 0.0);
    for (normals, attacks) in normals.iter().zip(attacks) {
        wins += attacks * (below + normals / 2.0);
        below += normals;
    }
    let tpr = |share: f64| {
        // Sums of weights that are whole numbers only by meaning.
        let allowed = all_normals * share * (1.0 + 1e-9);
        let (mut above, mut detected) = (0.0, 0.0);
        for (normals, attacks) in normals.iter().zip(attacks).rev() {
            // The threshold is this rank if more than `allowed` would exceed the next lower one.
            above += normals;
            if above > allowed {
                break;
            }
            detected += attacks;
        }
        detected / all_attacks
    };
    Some([wins / (all_attacks * all_normals), tpr(0.01), tpr(0.001)])
}

fn draw(rng: &mut ChaCha8Rng, from: &[usize], histogram: &mut [f64]) {
    histogram.fill(0.0);
    for _ in 0..from.len() {
        histogram[from[below(rng, from.len())]] += 1.0;
    }
}

/// Below `n`, without a bias that could show.
fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((u64::from(rng.next_u32()) * n as u64) >> 32) as usize
}

/// The middle 95 %.
fn middle(mut values: Vec<f64>) -> Option<Interval> {
    values.sort_unstable_by(f64::total_cmp);
    let at =
        |share: f64| values.get((share * values.len().saturating_sub(1) as f64).round() as usize).copied();
    Some([at(0.025)?, at(0.975)?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definitions, pair by pair and threshold by threshold.
    fn naive(normals: &[i64], attacks: &[i64]) -> [f64; 3] {
        let half_wins: usize = attacks
            .iter()
            .flat_map(|a| normals.iter().map(move |n| 2 * usize::from(a > n) + usize::from(a == n)))
            .sum();
        let tpr = |share: f64| {
            let mut thresholds: Vec<i64> = normals.iter().chain(attacks).copied().collect();
            thresholds.push(i64::MIN);
            thresholds.sort_unstable();
            let exceeding = |t: i64| normals.iter().filter(|n| **n > t).count() as f64;
            let threshold =
                thresholds.into_iter().find(|t| exceeding(*t) <= normals.len() as f64 * share).unwrap();
            attacks.iter().filter(|a| **a > threshold).count() as f64 / attacks.len() as f64
        };
        [half_wins as f64 / (2 * attacks.len() * normals.len()) as f64, tpr(0.01), tpr(0.001)]
    }

    #[test]
    fn figures_by_hand() {
        let normals: Vec<i64> = (0..1000).collect();
        let figures = Ranked::new(&normals, &[2000, 995, 500, -1]).figures();
        // 995 beats 995 normals and ties with one.
        assert_eq!(figures.auroc, Some((1000.0 + 995.5 + 500.5) / 4000.0));
        // Ten of 1000 may exceed the threshold 989, one may exceed 998.
        assert_eq!((figures.tpr_at_fpr_1pct, figures.tpr_at_fpr_01pct), (Some(0.5), Some(0.25)));
        assert_eq!(figures.n_attack, 4);
        assert_eq!(Ranked::new(&normals, &[]).figures(), Figures::default());
        assert_eq!(Ranked::new(&normals, &[]).intervals(0), Intervals::default());
    }

    #[test]
    fn length_that_tells_all_tells_nothing_once_matched() {
        // Scores are lengths: normals are short, attacks long, with some of either at 1,000 bytes.
        let normals: Vec<i64> = (0..300).map(|i| if i < 240 { 100 } else { 1000 }).collect();
        let attacks: Vec<i64> = (0..100).map(|i| if i < 70 { 5000 } else { 1000 }).collect();
        let bytes = |scores: &[i64]| -> Vec<usize> { scores.iter().map(|s| *s as usize).collect() };
        let ranked = Ranked::new(&normals, &attacks);
        assert!(ranked.figures().auroc.unwrap() > 0.9);
        let matched = ranked.length_matched(&bytes(&normals), &bytes(&attacks));
        assert!((matched.auroc.unwrap() - 0.5).abs() < 1e-9 && matched.n_attack == 30);
        // No stratum in common.
        assert_eq!(ranked.length_matched(&bytes(&normals), &[70_000; 100]), Figures::default());
        // What tells within a length still does.
        let scores: Vec<i64> = (0..100).map(|i| 10_000 + i).collect();
        let matched = Ranked::new(&normals, &scores).length_matched(&bytes(&normals), &[1000; 100]);
        assert!(matched.auroc.unwrap() > 1.0 - 1e-9 && matched.n_attack == 100);
    }

    #[test]
    fn intervals_hold_the_truth_as_often_as_they_say() {
        // Attacks are normals shifted by a quarter of their range: the AUROC is 23/32.
        let truth = 1.0 - 0.75 * 0.75 / 2.0;
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut covered = 0;
        for trial in 0..60 {
            let mut some = |shift: i64| -> Vec<i64> {
                (0..120).map(|_| below(&mut rng, 1_000_000) as i64 + shift).collect()
            };
            let (normals, attacks) = (some(0), some(250_000));
            let [low, high] = Ranked::new(&normals, &attacks).intervals(trial).auroc.unwrap();
            assert!(low < high);
            covered += usize::from((low..=high).contains(&truth));
        }
        // 57 expected; 50 is four standard deviations away.
        assert!((50..=60).contains(&covered), "{covered} of 60");
        let [low, high] = share_interval(10, 1000, 1).unwrap();
        assert!((0.003..0.007).contains(&low) && (0.013..0.018).contains(&high), "{low} {high}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

        #[test]
        fn figures_are_the_definitions(
            normals in prop::collection::vec(0i64..40, 1..250),
            attacks in prop::collection::vec(0i64..60, 1..60),
        ) {
            let [auroc, one, tenth] = naive(&normals, &attacks);
            let figures = Ranked::new(&normals, &attacks).figures();
            prop_assert!((figures.auroc.unwrap() - auroc).abs() < 1e-12);
            prop_assert_eq!((figures.tpr_at_fpr_1pct, figures.tpr_at_fpr_01pct), (Some(one), Some(tenth)));
        }

        #[test]
        fn the_area_under_the_curve_is_the_auroc(
            normals in prop::collection::vec(0i64..40, 1..250),
            attacks in prop::collection::vec(0i64..60, 1..60),
        ) {
            let ranked = Ranked::new(&normals, &attacks);
            let curve = ranked.curve();
            let area: f64 = curve.windows(2).map(|w| (w[1][0] - w[0][0]) * (w[0][1] + w[1][1]) / 2.0).sum();
            prop_assert!((ranked.figures().auroc.unwrap() - area).abs() < 1e-9);
            prop_assert_eq!(curve.last().map(|p| (p[0], p[1])), Some((1.0, 1.0)));
        }

        #[test]
        fn half_octaves(bytes in 1usize..1 << 24) {
            let exact = 2.0 * (bytes as f64).log2();
            prop_assert!((stratum(bytes) as f64) <= exact + 1e-9 && exact < stratum(bytes) as f64 + 1.0 + 1e-9);
        }
    }
}
