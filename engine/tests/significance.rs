//! Significance against textbook oracles, and as statistics over seeded simulations.
//!
//! `cargo test -p driftlock-engine --test significance -- --ignored --nocapture` prints the comparison
//! of the online procedures that the default was chosen by.

use std::cmp::Ordering;

use driftlock_engine::calibrate::{Calibration, PValue};
use driftlock_engine::significance::*;
use proptest::prelude::*;

/// xorshift64*: the tests' own source of chance.
struct Chance(u64);

impl Chance {
    fn new(seed: u64) -> Self {
        let mut chance = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        (0..16).for_each(|_| _ = chance.next());
        chance
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller), in 1/65536.
    fn normal(&mut self) -> i64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos() * 65536.0) as i64
    }
}

fn p(rank: u32, of: u32) -> PValue {
    PValue { rank, of }
}

// ---------------------------------------------------------------------------------------------------
// Online procedures: the papers' recurrences, in floating point with unbounded memory.

fn gamma(spending: Spending, j: i64) -> f64 {
    assert!(j >= 1, "gamma starts at 1");
    let j = j as f64;
    match spending {
        Spending::Flat { tests } => f64::from(u8::from(j <= f64::from(tests))) / f64::from(tests),
        Spending::Steep => 1.0 / (j * (j + 1.0)),
        Spending::Gentle => 1.0 / j.sqrt() - 1.0 / (j + 1.0).sqrt(),
    }
}

/// The levels of Algorithm 1 in each paper, from the p-values of all earlier tests. Times are 1-based.
fn textbook(options: FdrOptions, p: &[f64]) -> Vec<f64> {
    let (alpha, w0) = (f64::from(options.alpha_ppm) / 1e6, f64::from(options.initial_ppm) / 1e6);
    let gamma = |j: i64| gamma(options.spending, j);
    let mut levels: Vec<f64> = Vec::new();
    let mut tau: Vec<usize> = Vec::new(); // times of rejection
    for t in 1..=p.len() {
        let past = |from: usize, holds: &dyn Fn(f64) -> bool| {
            // #{i in from..t: holds(p_i)}, from and t exclusive.
            (from + 1..t).filter(|&i| holds(p[i - 1])).count() as i64
        };
        let weight = |j: usize| if j == 0 { alpha - w0 } else { alpha };
        let level = match options.procedure {
            Procedure::LordPlusPlus => {
                w0 * gamma(t as i64)
                    + tau.iter().enumerate().map(|(j, &at)| weight(j) * gamma((t - at) as i64)).sum::<f64>()
            }
            Procedure::Saffron { lambda_ppm } => {
                let lambda = f64::from(lambda_ppm) / 1e6;
                let candidate = |p: f64| p <= lambda;
                let sum = w0 * gamma(t as i64 - past(0, &candidate))
                    + tau
                        .iter()
                        .enumerate()
                        .map(|(j, &at)| weight(j) * gamma((t - at) as i64 - past(at, &candidate)))
                        .sum::<f64>();
                ((1.0 - lambda) * sum).min(lambda)
            }
            Procedure::Addis { lambda_ppm, tau_ppm } => {
                let (lambda, discard) = (f64::from(lambda_ppm) / 1e6, f64::from(tau_ppm) / 1e6);
                let (candidate, selected) = (|p: f64| p <= lambda, |p: f64| p <= discard);
                // The paper's gamma starts at 0; ours at 1.
                let s = past(0, &selected);
                let sum = w0 * gamma(1 + s - past(0, &candidate))
                    + tau
                        .iter()
                        .enumerate()
                        .map(|(j, &at)| {
                            let star = (1..=at).filter(|&i| selected(p[i - 1])).count() as i64;
                            weight(j) * gamma(1 + s - star - past(at, &candidate))
                        })
                        .sum::<f64>();
                ((discard - lambda) * sum).min(lambda)
            }
            // The largest alpha (k - 1) / W that at least k of the last W - 1 p-values do not exceed.
            Procedure::WindowBh { window } => {
                let past = &p[(t - 1).saturating_sub(window as usize - 1)..t - 1];
                let level = |k: usize| alpha * (k as f64 - 1.0) / f64::from(window);
                (1..=past.len())
                    .filter(|&k| past.iter().filter(|&&p| p <= level(k)).count() >= k)
                    .map(level)
                    .fold(0.0, f64::max)
            }
            Procedure::ELond => alpha * gamma(t as i64) * (tau.len() as f64 + 1.0),
        };
        let reject = match options.procedure {
            Procedure::ELond => 0.5 / p[t - 1].sqrt() >= 1.0 / level,
            _ => p[t - 1] <= level,
        };
        levels.push(level);
        if reject {
            tau.push(t);
        }
    }
    levels
}

fn procedures() -> [Procedure; 5] {
    [
        Procedure::LordPlusPlus,
        Procedure::Saffron { lambda_ppm: 500_000 },
        Procedure::Addis { lambda_ppm: 250_000, tau_ppm: 500_000 },
        Procedure::ELond,
        Procedure::WindowBh { window: 90 },
    ]
}

#[test]
fn levels_are_the_papers() {
    for procedure in procedures() {
        for spending in [Spending::Flat { tests: 60 }, Spending::Steep, Spending::Gentle] {
            let mut chance = Chance::new(7);
            let options = FdrOptions {
                procedure,
                alpha_ppm: 100_000,
                initial_ppm: 40_000,
                spending,
                max_rejections: 1000,
            };
            // A third of the p-values are tiny, so that rejections abound. An odd denominator: no ties
            // with lambda or tau.
            let ps: Vec<PValue> = (0..400)
                .map(|_| {
                    let of = (1 << 29) + 1;
                    let below = if chance.next().is_multiple_of(3) { 40 } else { of };
                    p(1 + (chance.next() >> 32) as u32 % below, of)
                })
                .collect();
            let floats: Vec<f64> = ps.iter().map(|p| f64::from(p.rank) / f64::from(p.of)).collect();
            let expected = textbook(options, &floats);
            let mut fdr = OnlineFdr::new(options).unwrap();
            for (t, (&p, expected)) in ps.iter().zip(&expected).enumerate() {
                let level = fdr.level().raw() as f64 / (1u64 << 60) as f64;
                assert!(
                    (level - expected).abs() < 1e-9,
                    "{procedure:?} {spending:?} at {t}: {level} {expected}"
                );
                fdr.test(p);
            }
            assert!(fdr.rejected() > 10, "{procedure:?} {spending:?} rejected {}", fdr.rejected());
        }
    }
}

#[test]
fn forgetting_rejections_only_lowers_levels() {
    for procedure in procedures() {
        let options = |max_rejections| FdrOptions {
            procedure,
            alpha_ppm: 50_000,
            initial_ppm: 25_000,
            spending: Spending::Gentle,
            max_rejections,
        };
        let mut all = OnlineFdr::new(options(10_000)).unwrap();
        let mut few = OnlineFdr::new(options(4)).unwrap();
        let mut lower = 0;
        for t in 0..2000u32 {
            assert!(few.level() <= all.level(), "{procedure:?} at {t}");
            lower += u32::from(few.level() < all.level());
            // Rejected by both or by neither, so that they stay comparable.
            let p = if t % 5 == 0 { p(1, u32::MAX) } else { p(9, 10) };
            assert_eq!(few.test(p), all.test(p));
        }
        assert_eq!(lower > 0, procedure != Procedure::ELond, "{procedure:?}: the bound was never reached");
    }
}

#[test]
fn levels_are_the_same_on_every_target() {
    let options = FdrOptions {
        procedure: Procedure::Saffron { lambda_ppm: 300_000 },
        alpha_ppm: 50_000,
        initial_ppm: 20_000,
        spending: Spending::Gentle,
        max_rejections: 64,
    };
    let mut fdr = OnlineFdr::new(options).unwrap();
    for t in 0..1000u32 {
        fdr.test(p(1 + t * 7919 % 1000 * u32::from(t % 10 != 0), 1001));
    }
    assert_eq!((fdr.rejected(), fdr.level().raw()), (1, 1_271_387_480_477));
}

#[test]
fn impossible_options_are_refused() {
    let good = FdrOptions {
        procedure: Procedure::LordPlusPlus,
        alpha_ppm: 50_000,
        initial_ppm: 25_000,
        spending: Spending::Steep,
        max_rejections: 9,
    };
    assert!(OnlineFdr::new(good).is_ok());
    let wealth = |alpha_ppm, initial_ppm| OnlineFdr::new(FdrOptions { alpha_ppm, initial_ppm, ..good });
    for (alpha, initial) in [(0, 0), (50_000, 0), (50_000, 50_001), (1_000_000, 1)] {
        assert_eq!(wealth(alpha, initial), Err(FdrError::Wealth { alpha_ppm: alpha, initial_ppm: initial }));
    }
    let candidates = Procedure::Addis { lambda_ppm: 500_000, tau_ppm: 500_000 };
    assert!(matches!(
        OnlineFdr::new(FdrOptions { procedure: candidates, ..good }),
        Err(FdrError::Candidates { .. })
    ));
    let window = Procedure::WindowBh { window: 0 };
    assert_eq!(OnlineFdr::new(FdrOptions { procedure: window, ..good }), Err(FdrError::Empty));
    let flat = Spending::Flat { tests: 0 };
    assert_eq!(OnlineFdr::new(FdrOptions { spending: flat, ..good }), Err(FdrError::Empty));
}

#[test]
fn a_p_value_becomes_an_e_value_whose_mean_is_at_most_one() {
    for n in [1u32, 7, 200, 5000] {
        let sum: u64 = (1..=n + 1).map(|rank| EValue::from_p(p(rank, n + 1)).0).sum();
        assert!(sum <= u64::from(n + 1) << 16, "n {n}");
        assert!(sum > u64::from(n + 1) << 15, "n {n}: the bets are not wasted");
    }
    assert_eq!(EValue::from_p(p(1, 400)), EValue(10 << 16));
}

// ---------------------------------------------------------------------------------------------------
// The choice among them, by simulation.

struct Simulated {
    fdr: f64,
    standard_error: f64,
    power: f64,
}

/// `simulations` streams of 10,000 messages, 1 % of them anomalous and then shifted by `shift` standard
/// deviations; p-values from one calibration set of n a stream.
fn simulate(
    simulations: u64,
    n: usize,
    shift: i64,
    decide: &mut dyn FnMut(&[PValue]) -> Vec<bool>,
) -> Simulated {
    let (mut fdps, mut found, mut anomalies) = (Vec::new(), 0u32, 0u32);
    for seed in 0..simulations {
        let mut chance = Chance::new(1 + seed);
        let calibration = Calibration::new((0..n).map(|_| chance.normal()).collect());
        let anomalous: Vec<bool> = (0..10_000).map(|_| chance.next().is_multiple_of(100)).collect();
        let ps: Vec<PValue> = anomalous
            .iter()
            .map(|&odd| calibration.p_value(chance.normal() + i64::from(odd) * shift * 65536))
            .collect();
        let decisions = decide(&ps);
        let (mut wrong, mut right) = (0u32, 0u32);
        for (&odd, &called) in anomalous.iter().zip(&decisions) {
            wrong += u32::from(called && !odd);
            right += u32::from(called && odd);
            anomalies += u32::from(odd);
        }
        found += right;
        fdps.push(f64::from(wrong) / f64::from((wrong + right).max(1)));
    }
    let count = fdps.len() as f64;
    let fdr = fdps.iter().sum::<f64>() / count;
    let variance = fdps.iter().map(|f| (f - fdr).powi(2)).sum::<f64>() / (count - 1.0);
    Simulated {
        fdr,
        standard_error: (variance / count).sqrt(),
        power: f64::from(found) / f64::from(anomalies),
    }
}

fn online(options: FdrOptions) -> impl FnMut(&[PValue]) -> Vec<bool> {
    move |ps| {
        let mut fdr = OnlineFdr::new(options).unwrap();
        ps.iter().map(|&p| fdr.test(p)).collect()
    }
}

#[test]
#[ignore = "prints the comparison; a minute"]
fn comparison_of_online_procedures() {
    let options = |procedure, spending, initial_ppm| FdrOptions {
        procedure,
        spending,
        initial_ppm,
        alpha_ppm: 50_000,
        max_rejections: 256,
    };
    println!("| calibration n | shift | procedure | FDR (s.e.) | power |\n|---|---|---|---|---|");
    for n in [200usize, 1000, 2000, 5000, 20_000] {
        // Each tick buys a level of just 1/(n + 1); SAFFRON and ADDIS get less of theirs.
        let flat = |share: u32| Spending::Flat { tests: ((n as u32 + 1) * share / 1000).max(1) };
        let saffron = |lambda_ppm| Procedure::Saffron { lambda_ppm };
        let addis = |lambda_ppm, tau_ppm| Procedure::Addis { lambda_ppm, tau_ppm };
        let rows: Vec<(String, FdrOptions)> = [
            ("LORD++, steep", options(Procedure::LordPlusPlus, Spending::Steep, 25_000)),
            ("LORD++, gentle", options(Procedure::LordPlusPlus, Spending::Gentle, 25_000)),
            ("LORD++, flat", options(Procedure::LordPlusPlus, flat(50), 50_000)),
            ("SAFFRON .5, gentle", options(saffron(500_000), Spending::Gentle, 25_000)),
            ("SAFFRON .05, flat", options(saffron(50_000), flat(47), 50_000)),
            ("ADDIS .25 to .5, gentle", options(addis(250_000, 500_000), Spending::Gentle, 25_000)),
            ("ADDIS .05 to .95, flat", options(addis(50_000, 950_000), flat(45), 50_000)),
            ("e-LOND, gentle", options(Procedure::ELond, Spending::Gentle, 50_000)),
            ("e-LOND, flat", options(Procedure::ELond, Spending::Flat { tests: 10_000 }, 50_000)),
            ("window BH, 1,000", options(Procedure::WindowBh { window: 1000 }, Spending::Gentle, 50_000)),
            ("window BH, 3,000", FdrOptions::default()),
        ]
        .map(|(name, options)| (name.to_string(), options))
        .into();
        for shift in [3, 4, 6] {
            let print = |name: &str, s: Simulated| {
                println!(
                    "| {n} | {shift} | {name} | {:.4} ({:.4}) | {:.3} |",
                    s.fdr, s.standard_error, s.power
                );
            };
            for (name, options) in &rows {
                print(name, simulate(200, n, shift, &mut online(*options)));
            }
            for block in [1000, 10_000] {
                let mut blocks = |ps: &[PValue]| -> Vec<bool> {
                    ps.chunks(block)
                        .flat_map(|ps| false_discoveries(ps, 50_000, Dependence::Positive))
                        .collect()
                };
                print(&format!("BH on blocks of {block}"), simulate(200, n, shift, &mut blocks));
            }
        }
    }
}

/// The bar: realised FDR at most 5 % over 200 streams of 10,000 messages with 1 % anomalies.
#[test]
fn the_default_holds_its_level() {
    for (n, shift, power) in [(200, 6, 0.0), (1000, 6, 0.0), (5000, 4, 0.4), (5000, 6, 0.8)] {
        let simulated = simulate(200, n, shift, &mut online(FdrOptions::default()));
        assert!(simulated.fdr <= 0.05, "n {n}, shift {shift}: FDR {}", simulated.fdr);
        assert!(simulated.power >= power, "n {n}, shift {shift}: power {}", simulated.power);
    }
}

// ---------------------------------------------------------------------------------------------------
// Batches.

fn p_values() -> impl Strategy<Value = Vec<PValue>> {
    prop::collection::vec((1u32..30, 30u32..400).prop_map(|(rank, of)| p(rank, of)), 0..30)
}

proptest! {
    /// Rejected exactly if, for some k, p is among k p-values that are at most k alpha / (m c).
    #[test]
    fn batches_are_the_definition(ps in p_values(), alpha_ppm in 1000u32..500_000) {
        let m = ps.len();
        for dependence in [Dependence::Positive, Dependence::Arbitrary] {
            let c = match dependence {
                Dependence::Positive => 1.0,
                Dependence::Arbitrary => (1..=m).map(|i| 1.0 / i as f64).sum(),
            };
            let value = |p: PValue| f64::from(p.rank) / f64::from(p.of);
            let threshold = |k: usize| k as f64 * f64::from(alpha_ppm) / 1e6 / (m as f64 * c);
            let largest = (1..=m)
                .filter(|&k| ps.iter().filter(|&&p| value(p) <= threshold(k) * (1.0 + 1e-12)).count() >= k)
                .map(threshold)
                .fold(-1.0, f64::max);
            let expected: Vec<bool> = ps.iter().map(|&p| value(p) <= largest * (1.0 + 1e-12)).collect();
            prop_assert_eq!(false_discoveries(&ps, alpha_ppm, dependence), expected);
        }
    }
}

#[test]
fn equality_counts_as_rejected() {
    let ps = [p(1, 40), p(1, 20), p(3, 4)];
    assert_eq!(false_discoveries(&ps, 75_000, Dependence::Positive), [true, true, false]);
    assert_eq!(false_discoveries(&ps, 74_999, Dependence::Positive), [false; 3]);
    assert_eq!(false_discoveries(&ps, 75_000, Dependence::Arbitrary), [false; 3]);
}

// ---------------------------------------------------------------------------------------------------
// Permutations.

/// p by all subsets, as a bit mask.
fn brute_force(reference: &[i64], window: &[i64]) -> PValue {
    let pool: Vec<i64> = window.iter().chain(reference).copied().collect();
    let (all, n) = (pool.len() as i64, window.len() as i64);
    let total: i64 = pool.iter().sum();
    let statistic = |mask: u32| {
        let sum: i64 = (0..pool.len()).filter(|i| mask >> i & 1 == 1).map(|i| pool[i]).sum();
        (all * sum - n * total).abs()
    };
    let observed = statistic((1 << n) - 1);
    let choices: Vec<i64> = (0..1u32 << all).filter(|m| m.count_ones() == n as u32).map(statistic).collect();
    p(choices.iter().filter(|&&s| s >= observed).count() as u32, choices.len() as u32)
}

proptest! {
    #[test]
    fn few_choices_are_all_counted(
        reference in prop::collection::vec(-20i64..20, 1..8),
        window in prop::collection::vec(-20i64..20, 1..6),
    ) {
        let outcome = permutation_test(&reference, &window, 2000, &Seed([0; 32])).unwrap();
        prop_assert!(outcome.exact);
        prop_assert_eq!(outcome.p, brute_force(&reference, &window));
        let means = (window.iter().sum::<i64>() * reference.len() as i64)
            .cmp(&(reference.iter().sum::<i64>() * window.len() as i64));
        prop_assert_eq!(outcome.direction, means);
    }

    /// Sampled p-values estimate the exact one: within five standard errors.
    #[test]
    fn sampled_p_is_near_the_exact(seed in any::<[u8; 32]>(), shift in 0i64..12, swap in any::<bool>()) {
        let mut reference: Vec<i64> = (0..9).map(|i| i * i % 17).collect();
        let mut window: Vec<i64> = (0..5).map(|i| i * 7 % 11 + shift).collect();
        if swap {
            std::mem::swap(&mut reference, &mut window);
        }
        // 2,002 choices: more than 1,000.
        let outcome = permutation_test(&reference, &window, 1000, &Seed(seed)).unwrap();
        prop_assert!(!outcome.exact);
        let exact = brute_force(&reference, &window);
        let exact = f64::from(exact.rank) / f64::from(exact.of);
        let error = (f64::from(outcome.p.rank) / 1001.0 - exact).abs();
        prop_assert!(error < 5.0 * (exact * (1.0 - exact) / 1000.0).sqrt() + 0.002, "{} {}", error, exact);
    }
}

/// Under exchangeability P(p <= alpha) <= alpha, with heavy ties; 99.9 % binomial bound.
#[test]
fn permutation_p_is_valid() {
    let mut chance = Chance::new(3);
    let trials = 2000u64;
    let mut flagged = [0u32; 3];
    let alphas = [10_000u32, 50_000, 200_000];
    for trial in 0..trials {
        let mut sample = |n: usize| -> Vec<i64> { (0..n).map(|_| (chance.normal() >> 15).pow(2)).collect() };
        let (reference, window) = (sample(40), sample(15));
        let seed = Seed::derive("s", trial, &[1; 32]);
        let outcome = permutation_test(&reference, &window, 199, &seed).unwrap();
        for (flagged, alpha) in flagged.iter_mut().zip(alphas) {
            *flagged += u32::from(outcome.p.at_most(alpha));
        }
    }
    for (flagged, alpha) in flagged.into_iter().zip(alphas) {
        let (a, trials) = (f64::from(alpha) / 1e6, trials as f64);
        let spread = 3.3 * (trials * a * (1.0 - a)).sqrt();
        assert!((f64::from(flagged) - trials * a).abs() <= spread, "{flagged} at {a}");
    }
}

#[test]
fn permutations_are_the_same_on_every_target() {
    let reference: Vec<i64> = (0..400).map(|i| i * 7919 % 1009).collect();
    let window: Vec<i64> = (0..50).map(|i| i * 104_729 % 1201).collect();
    let seed = Seed::derive("chat/request", 3, &[9; 32]);
    let outcome = permutation_test(&reference, &window, DEFAULT_PERMUTATIONS, &seed).unwrap();
    assert_eq!((outcome.p, outcome.direction), (p(691, 1001), Ordering::Greater));
    assert_ne!(seed, Seed::derive("chat/request", 4, &[9; 32]));
    assert_ne!(Seed::derive("a", 0, &[0; 32]), Seed::derive("b", 0, &[0; 32]));
}

#[test]
fn extreme_scores_neither_overflow_nor_count_as_equal() {
    let seed = Seed([5; 32]);
    let outcome = permutation_test(&[i64::MIN; 6], &[i64::MAX; 3], 1000, &seed).unwrap();
    assert_eq!((outcome.p, outcome.exact), (p(1, 84), true));
    // Drawn, with sums beyond 64 bits.
    let outcome = permutation_test(&[i64::MIN; 60], &[i64::MAX; 30], 1000, &seed).unwrap();
    assert_eq!((outcome.p, outcome.exact), (p(1, 1001), false));
    assert_eq!(permutation_test(&[], &[1], 1000, &seed), None);
    assert_eq!(permutation_test(&[1; 300], &[1; 300], 50, &seed).unwrap().p, p(51, 51));
}
