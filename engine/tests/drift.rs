//! Drift: oracles, validity as a statistic, and the bar on recorded model outputs.
//!
//! `DRIFTLOCK_DATA=DIR cargo test --release -p driftlock-engine --test drift -- --ignored --nocapture`
//! prints detection delays for `DIR/model_outputs_dev.jsonl.gz`: six models' answers to the same prompts.
//! Without that file those tests say so and pass.

use std::collections::BTreeMap;
use std::io::Read;

use driftlock_engine::coder::{ContextModel, Counts};
use driftlock_engine::drift::*;
use driftlock_engine::significance::Seed;

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

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// A message whose length has ties and a heavy tail, and whose cost hangs on its length.
    fn row(&mut self) -> Row {
        let bytes = 20 + self.below(40) * self.below(40) / 4;
        Row { bytes, cost: bytes * (500 + self.below(60)) }
    }
}

fn seed(number: u64) -> Seed {
    Seed::derive("test", number, &[7; 32])
}

// ---------------------------------------------------------------------------------------------------
// The bar.

type Outputs = BTreeMap<String, Vec<String>>;

/// Answers by model and prompt.
fn outputs() -> Option<Outputs> {
    let directory = std::env::var_os("DRIFTLOCK_DATA")?;
    let path = std::path::Path::new(&directory).join("model_outputs_dev.jsonl.gz");
    let mut text = String::new();
    flate2::read::GzDecoder::new(std::fs::File::open(path).ok()?).read_to_string(&mut text).ok()?;
    let mut outputs = Outputs::new();
    for line in text.lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let prompt = row["extra"]["prompt_index"].as_u64().unwrap() as usize;
        let answers =
            outputs.entry(row["label"].as_str().unwrap().into()).or_insert_with(|| vec![String::new(); 805]);
        answers[prompt] = row["text"].as_str().unwrap().into();
    }
    Some(outputs)
}

fn row(model: &ContextModel, text: &str) -> Row {
    let text = &text.as_bytes()[..text.len().min(16 << 10)];
    let cost = model.costs(text).into_iter().map(u64::from).sum();
    Row { bytes: text.len() as u64, cost }
}

/// Of the baseline's 402 answers so many train, the others are the reference.
const TRAIN: usize = 100;
const BASELINE: usize = 402;

/// Answers of `to` that passed until the alarm, and until the martingales' (each at alpha / 3 over the
/// three statistics).
fn delays(outputs: &Outputs, from: &str, to: &str, seed: u64, options: DriftOptions) -> [Option<usize>; 2] {
    let mut prompts: Vec<usize> = (0..805).collect();
    Chance::new(seed).shuffle(&mut prompts);
    let (baseline, stream) = prompts.split_at(BASELINE);
    let mut counts = Counts::new(1 << 18);
    baseline[..TRAIN].iter().for_each(|&i| counts.train(outputs[from][i].as_bytes()));
    let model = counts.freeze(4 << 20);
    let rows = |of: &str, prompts: &[usize]| -> Vec<Row> {
        prompts.iter().map(|&i| row(&model, &outputs[of][i])).collect()
    };
    let reference = rows(from, &baseline[TRAIN..]);
    let digest: [u8; 32] = std::array::from_fn(|i| (seed >> (8 * (i % 8))) as u8);
    let mut martingales =
        [Statistic::CostPerByte, Statistic::Length, Statistic::TotalCost].map(|statistic| {
            let scores: Vec<i64> = reference.iter().map(|row| row.value(statistic) as i64).collect();
            let options = MartingaleOptions { alpha_ppm: options.alpha_ppm / 3, ..Default::default() };
            (statistic, ConformalMartingale::new(&scores, options, &Seed::derive(from, 0, &digest)))
        });
    let mut monitor = DriftMonitor::new(from, &digest, reference, options).unwrap();
    let mut delays = [None; 2];
    for (seen, row) in (1..).zip(rows(to, stream)) {
        if delays[0].is_none() && monitor.observe(row, 0).is_some_and(|verdict| verdict.alarm) {
            delays[0] = Some(seen);
        }
        for (statistic, martingale) in &mut martingales {
            if martingale.observe(row.value(*statistic) as i64).alarm {
                delays[1].get_or_insert(seen);
            }
        }
    }
    delays
}

/// Prints the row of a pair; the monitor's median delay over 20 seeds, 404 for never.
fn print_delays(outputs: &Outputs, from: &str, to: &str) -> usize {
    const NEVER: usize = 404;
    let all: Vec<_> = (0..20).map(|seed| delays(outputs, from, to, seed, DriftOptions::default())).collect();
    let [monitor, martingale] = [0, 1].map(|k| {
        let mut delays: Vec<usize> = all.iter().map(|d| d[k].unwrap_or(NEVER)).collect();
        delays.sort_unstable();
        let median = (delays[9] + delays[10]).div_ceil(2);
        let show = if median >= NEVER { "never".into() } else { median.to_string() };
        (median, show, delays.iter().filter(|&&d| d < NEVER).count())
    });
    println!("| {from} | {to} | {} | {}/20 | {} | {}/20 |", monitor.1, monitor.2, martingale.1, martingale.2);
    monitor.0
}

const HEADING: &str =
    "| from | to | monitor: median delay | detected | martingales: median delay | detected |
|---|---|---|---|---|---|";

#[test]
#[ignore = "reads recorded outputs; run with --release"]
fn the_bar_on_model_outputs() {
    let Some(outputs) = outputs() else {
        println!("set DRIFTLOCK_DATA to the directory of model_outputs_dev.jsonl.gz");
        return;
    };
    let real = || outputs.keys().filter(|name| *name != "NullModel");
    println!("{HEADING}");
    let mut missed = Vec::new();
    let mut bar = |from: &str, to: &str, most: usize| {
        if print_delays(&outputs, from, to) > most {
            missed.push(format!("{from} to {to} within {most}"));
        }
    };
    bar("gpt-3.5-turbo-0301", "gpt-3.5-turbo-0613", 200);
    bar("gpt4_0613", "gpt4_1106_preview", 200);
    bar("gpt4_0314", "gpt4_0613", 403);
    real().for_each(|from| bar(from, "NullModel", 25));
    println!("\n| model | false alarms of the monitor in 100 orders | of the martingales |\n|---|---|---|");
    for name in real() {
        let all: Vec<_> =
            (1000..1100).map(|seed| delays(&outputs, name, name, seed, DriftOptions::default())).collect();
        let [monitor, martingales] = [0, 1].map(|k| all.iter().filter(|d| d[k].is_some()).count());
        println!("| {name} | {monitor} | {martingales} |");
        if monitor > 2 {
            missed.push(format!("{monitor} false alarms on {name}"));
        }
    }
    assert!(missed.is_empty(), "{missed:?}");
}

#[test]
#[ignore = "reads recorded outputs; run with --release"]
fn every_pair_of_model_outputs() {
    let Some(outputs) = outputs() else { return };
    println!("{HEADING}");
    for from in outputs.keys().filter(|name| *name != "NullModel") {
        for to in outputs.keys().filter(|&name| name != from && name != "NullModel") {
            print_delays(&outputs, from, to);
        }
    }
}

// ---------------------------------------------------------------------------------------------------
// The joint test.

/// The six statistics by their definitions, in floating point.
fn textbook(rows: &[Row], window: &[usize]) -> Vec<f64> {
    let mut z = Vec::new();
    for statistic in [Statistic::CostPerByte, Statistic::Length, Statistic::TotalCost] {
        let value = |i: usize| rows[i].value(statistic);
        let n = rows.len() as f64;
        let rank = |i: usize| {
            let below = (0..rows.len()).filter(|&j| value(j) < value(i)).count() as f64;
            let equal = (0..rows.len()).filter(|&j| value(j) == value(i)).count() as f64;
            below + (equal - 1.0) / 2.0 - (n - 1.0) / 2.0
        };
        let ranks: Vec<f64> = (0..rows.len()).map(rank).collect();
        for column in [ranks.clone(), ranks.iter().map(|r| r * r).collect::<Vec<f64>>()] {
            let mean = column.iter().sum::<f64>() / n;
            let deviation = (column.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / n).sqrt();
            let sum = window.iter().map(|&i| column[i] - mean).sum::<f64>();
            z.push(if deviation > 0.0 { sum / deviation } else { 0.0 });
        }
    }
    z
}

#[test]
fn the_joint_test_estimates_what_all_choices_give() {
    for number in 0..12 {
        let mut chance = Chance::new(number);
        let (n, m) = if number % 2 == 0 { (5, 8) } else { (8, 5) };
        let mut rows: Vec<Row> = (0..n + m).map(|_| chance.row()).collect();
        rows[..n].iter_mut().for_each(|row| row.bytes += 8 * number);
        let largest =
            |window: &[usize]| textbook(&rows, window).into_iter().map(f64::abs).fold(0.0, f64::max);
        let observed: Vec<usize> = (0..n).collect();
        let observed_z = textbook(&rows, &observed);
        let choices: Vec<f64> = (0..1u32 << (n + m))
            .filter(|mask| mask.count_ones() == n as u32)
            .map(|mask| largest(&(0..n + m).filter(|i| mask >> i & 1 == 1).collect::<Vec<_>>()))
            .collect();
        // Columns are rounded to 1/4096, so what is nearly equal may count either way.
        let share = |z: f64| choices.iter().filter(|&&c| c >= z).count() as f64 / choices.len() as f64;
        let permutations = 20_000;
        let test = shift_test(&rows[n..], &rows[..n], permutations, u32::MAX, &seed(number)).unwrap();
        assert_eq!(test.p, test.shifts[0].p);
        for shift in test.shifts {
            let k = shift.statistic as usize * 2 + shift.aspect as usize;
            let p = f64::from(shift.p.rank) / f64::from(shift.p.of);
            let error = |p: f64| 5.0 * (p * (1.0 - p) / f64::from(permutations)).sqrt() + 1e-4;
            let (least, most) = (share(observed_z[k].abs() + 5e-3), share(observed_z[k].abs() - 5e-3));
            assert!(p >= least - error(least), "{number} {shift:?}: {p} {least}");
            assert!(p <= most + error(most), "{number} {shift:?}: {p} {most}");
            let moved = match observed_z[k] {
                z if z > 1e-2 => Moved::Up,
                z if z < -1e-2 => Moved::Down,
                _ => continue,
            };
            assert_eq!(shift.moved, moved, "{number} {shift:?}");
        }
        let a = |shift: &Shift| {
            let value = |i: usize| rows[i].value(shift.statistic);
            let wins = (0..n).flat_map(|i| (n..n + m).map(move |j| (i, j))).map(|(i, j)| {
                if value(i) > value(j) {
                    1.0
                } else if value(i) == value(j) {
                    0.5
                } else {
                    0.0
                }
            });
            wins.sum::<f64>() / (n * m) as f64 - 0.5
        };
        for shift in test.shifts.iter().filter(|shift| shift.aspect == Aspect::Location) {
            assert!((f64::from(shift.effect_ppm) / 1e6 - a(shift)).abs() < 2e-6, "{shift:?}");
        }
    }
}

#[test]
fn what_moved_is_named() {
    let mut chance = Chance::new(5);
    let reference: Vec<Row> = (0..200).map(|_| chance.row()).collect();
    let stream: Vec<Row> = (0..100).map(|_| chance.row()).collect();
    let first = |change: &dyn Fn(Row) -> Row| {
        let window: Vec<Row> = stream.iter().map(|&row| change(row)).collect();
        let test = shift_test(&reference, &window, 999, u32::MAX, &seed(1)).unwrap();
        let top = test.shifts[0];
        (top.statistic, top.aspect, top.moved, test.p.rank == 1)
    };
    use {Aspect::*, Statistic::*};
    let dearer = first(&|row| Row { cost: row.cost * 5 / 4, ..row });
    assert_eq!(dearer, (CostPerByte, Location, Moved::Up, true));
    let terser = first(&|row| Row { bytes: row.bytes / 3, cost: row.cost / 3 });
    assert_eq!((terser.1, terser.2, terser.3), (Location, Moved::Down, true));
    let alike = first(&|row| {
        let bytes = 105 + row.bytes % 20;
        Row { bytes, cost: bytes * (row.cost / row.bytes) }
    });
    assert_eq!((alike.1, alike.2, alike.3), (Spread, Moved::Down, true));
    assert!(!first(&|row| row).3, "nothing moved");
}

#[test]
fn a_futile_test_ends_early_with_a_larger_p() {
    let mut chance = Chance::new(6);
    let rows: Vec<Row> = (0..60).map(|_| chance.row()).collect();
    let whole = shift_test(&rows[..30], &rows[30..], 5000, u32::MAX, &seed(0)).unwrap();
    let ended = shift_test(&rows[..30], &rows[30..], 5000, 10, &seed(0)).unwrap();
    assert_eq!((whole.p.of, ended.p.rank), (5001, 11));
    assert!(ended.p.of < 500);
    assert_eq!(shift_test(&rows, &[], 10, 10, &seed(0)), None);
    let constant = vec![Row { bytes: 9, cost: 9 }; 20];
    assert_eq!(shift_test(&constant, &constant, 99, 100, &seed(0)).unwrap().p.rank, 100);
    let huge = Row { bytes: u64::MAX, cost: u64::MAX };
    assert!(shift_test(&rows, &[huge; 5], 99, 100, &seed(0)).is_some());
}

// ---------------------------------------------------------------------------------------------------
// The monitor.

fn monitor(options: DriftOptions, number: u64) -> (DriftMonitor, Chance) {
    let mut chance = Chance::new(number);
    let reference = (0..120).map(|_| chance.row()).collect();
    (DriftMonitor::new("s", &[number as u8; 32], reference, options).unwrap(), chance)
}

/// A run on its own baseline alarms with probability at most alpha, here 20 % so that few runs tell;
/// 99.9 % binomial bound. Each look alone would alarm in far more than that.
#[test]
fn whole_runs_keep_the_budget() {
    let options = DriftOptions {
        alpha_ppm: 200_000,
        window: Extent::Rows(60),
        hop: Extent::Rows(20),
        budget: Budget::EachLap { looks: 8 },
        ..DriftOptions::default()
    };
    let runs = 400u32;
    let alarms = (0..runs).filter(|&run| {
        let (mut monitor, mut chance) = monitor(options, 100 + u64::from(run));
        (0..160).for_each(|_| _ = monitor.observe(chance.row(), 0));
        assert_eq!(monitor.looks(), 8);
        monitor.alarm().is_some()
    });
    let alarms = alarms.count() as f64;
    let bound = f64::from(runs) * 0.2;
    assert!(alarms <= bound + 3.1 * (bound * 0.8).sqrt(), "{alarms} of {runs}");
    assert!(alarms > bound / 8.0, "{alarms} of {runs}: the test has no power");
}

#[test]
fn budgets_divide_alpha() {
    let divisors = |budget| -> Vec<u128> {
        let options = DriftOptions { budget, hop: Extent::Rows(10), ..DriftOptions::default() };
        let (mut monitor, mut chance) = monitor(options, 1);
        (0..60).filter_map(|_| monitor.observe(chance.row(), 0)).map(|v| v.alpha_divisor).collect()
    };
    assert_eq!(divisors(Budget::EachLap { looks: 4 }), [4; 6]);
    assert_eq!(divisors(Budget::WholeRun { looks: 2 }), [4, 4, 12, 12, 24, 24]);
}

#[test]
fn windows_and_hops_are_as_told() {
    let by_rows = DriftOptions { window: Extent::Rows(30), hop: Extent::Rows(10), ..DriftOptions::default() };
    let (mut by_rows, mut chance) = monitor(by_rows, 2);
    let looks: Vec<(u32, u32)> = (1..=55)
        .filter_map(|i| by_rows.observe(chance.row(), 0).map(|verdict| (i, verdict.window_rows)))
        .collect();
    assert_eq!(looks, [(10, 10), (20, 20), (30, 30), (40, 30), (50, 30)]);

    let by_time = DriftOptions {
        window: Extent::Nanoseconds(1000),
        hop: Extent::Nanoseconds(400),
        max_window_rows: 60,
        ..DriftOptions::default()
    };
    // A message every 50 ns from 1000; a gap from 2000 to 5000; then every 10 ns.
    let times = (0..=20).map(|i| 1000 + 50 * i).chain((0..100).map(|i| 5000 + 10 * i));
    let (mut by_time, _) = monitor(by_time, 3);
    let looks: Vec<(u64, u32)> = times
        .filter_map(|at| by_time.observe(chance.row(), at).map(|verdict| (at, verdict.window_rows)))
        .collect();
    // After the gap the first message ends a hop but is alone in the window; the grid goes on.
    assert_eq!(looks, [(1400, 9), (1800, 17), (5400, 41), (5800, 60)]);

    // The window is half open: a message exactly its length ago has left.
    let second = Extent::Nanoseconds(1000);
    let (mut tumbling, _) =
        monitor(DriftOptions { window: second, hop: second, ..DriftOptions::default() }, 3);
    let looks = (0..=20).filter_map(|i| tumbling.observe(chance.row(), 100 * i).map(|v| (i, v.window_rows)));
    assert_eq!(looks.collect::<Vec<_>>(), [(10, 10), (20, 10)]);
}

#[test]
fn a_run_beyond_its_budget_says_so() {
    let options = DriftOptions {
        hop: Extent::Rows(8),
        budget: Budget::WholeRun { looks: 1 },
        max_permutations: 1000,
        ..DriftOptions::default()
    };
    let (mut monitor, mut chance) = monitor(options, 4);
    let strange = |mut row: Row| {
        row.cost *= 9;
        row
    };
    // 1/1001 is at most 0.01/2, 0.01/6 but not 0.01/12.
    let verdicts: Vec<_> = (0..24).filter_map(|_| monitor.observe(strange(chance.row()), 0)).collect();
    let said: Vec<_> = verdicts.iter().map(|v| (v.alarm, v.reachable)).collect();
    assert_eq!(said, [(true, true), (true, true), (false, false)]);
    assert_eq!(monitor.alarm(), Some(0));
}

#[test]
fn impossible_monitors_are_refused() {
    let good = DriftOptions::default();
    let make =
        |rows, options| DriftMonitor::new("s", &[0; 32], vec![Row::default(); rows], options).map(|_| ());
    assert_eq!(make(8, good), Ok(()));
    assert_eq!(make(7, good), Err(DriftError::Reference(7)));
    assert_eq!(make(MAX_ROWS, good), Err(DriftError::Reference(MAX_ROWS)));
    let bad = [
        ("window", DriftOptions { window: Extent::Rows(7), ..good }),
        ("window", DriftOptions { window: Extent::Rows(401), max_window_rows: 400, ..good }),
        ("window", DriftOptions { window: Extent::Nanoseconds(0), ..good }),
        ("hop", DriftOptions { hop: Extent::Rows(0), ..good }),
        ("budget", DriftOptions { budget: Budget::EachLap { looks: 0 }, ..good }),
        ("alpha", DriftOptions { alpha_ppm: 0, ..good }),
        ("max_permutations", DriftOptions { max_permutations: 1000, ..good }),
    ];
    for (name, options) in bad {
        assert_eq!(make(8, options), Err(DriftError::Option(name)));
    }
}

#[test]
fn verdicts_are_the_same_on_every_target() {
    let (mut monitor, mut chance) = monitor(DriftOptions::default(), 9);
    let verdicts: Vec<_> = (0..50).filter_map(|_| monitor.observe(chance.row(), 0)).collect();
    let top = verdicts[1].shifts[0];
    let found = (verdicts[1].p.rank, verdicts[1].p.of, top.statistic, top.aspect, top.effect_ppm);
    assert_eq!(found, (11, 15, Statistic::TotalCost, Aspect::Spread, -173_347));
}

// ---------------------------------------------------------------------------------------------------
// The martingale.

/// The textbook's capital: p-values by random ties among the same remembered scores, in floating point.
/// Without ties and with room to remember, the two differ by the half step of the conservative ranks.
#[test]
fn capital_is_never_above_the_textbooks() {
    for number in 0..20 {
        let mut chance = Chance::new(number);
        let scores: Vec<i64> =
            (0..400).map(|i| chance.below(30) as i64 + if number % 2 == 1 { i / 20 } else { 0 }).collect();
        let mut martingale =
            ConformalMartingale::new(&scores[..50], MartingaleOptions::default(), &seed(number));
        let mut capital = [0.2f64; 5];
        for t in 50..scores.len() {
            let (past, score) = (&scores[..t], scores[t]);
            let larger = past.iter().filter(|&&s| s > score).count() as f64;
            let equal = past.iter().filter(|&&s| s == score).count() as f64 + 1.0;
            let theta = chance.below(1 << 30) as f64 / (1u64 << 30) as f64;
            let p = (larger + theta * equal) / (t as f64 + 1.0);
            let total: f64 = capital.iter().sum();
            for (capital, e) in capital.iter_mut().zip([-2.0, -1.0, 0.0, 1.0, 2.0]) {
                *capital = (*capital * 0.99 + total / 500.0) * (1.0 + e * (p - 0.5));
            }
            let textbook = capital.iter().sum::<f64>().log2();
            let state = martingale.observe(score);
            let ours = state.log2_capital as f64 / 4096.0;
            assert!(ours <= textbook + 1e-3, "{number} at {t}: {ours} {textbook}");
            if t + 1 == scores.len() && number % 2 == 1 {
                assert!(state.alarm && state.rising && ours > 20.0, "{number}: {ours}");
            }
        }
    }
}

/// Ville: of exchangeable runs at most alpha ever alarm; 99.9 % binomial bound. With a memory far
/// shorter than the run, and ties.
#[test]
fn exchangeable_runs_seldom_alarm() {
    let options = MartingaleOptions { alpha_ppm: 100_000, memory: 40 };
    let runs = 600u32;
    let alarms = (0..runs).filter(|&run| {
        let mut chance = Chance::new(5000 + u64::from(run));
        let mut martingale = ConformalMartingale::new(&[], options, &seed(u64::from(run)));
        (0..1500).fold(false, |_, _| martingale.observe((chance.below(60) * chance.below(60)) as i64).alarm)
    });
    let bound = f64::from(runs) * 0.1;
    let alarms = alarms.count() as f64;
    assert!(alarms <= bound + 3.1 * (bound * 0.9).sqrt(), "{alarms} of {runs}");
    assert!(alarms > 0.0, "the test has no power");
}

#[test]
fn shifts_either_way_alarm_and_a_restart_forgets() {
    for (shift, rising) in [(12i64, true), (-12, false)] {
        let mut chance = Chance::new(11);
        let mut score = |shift: i64| chance.below(40) as i64 + shift;
        let reference: Vec<i64> = (0..300).map(|_| score(0)).collect();
        let mut martingale = ConformalMartingale::new(&reference, MartingaleOptions::default(), &seed(1));
        assert!(!(0..100).fold(false, |_, _| martingale.observe(score(0)).alarm));
        // 1/alpha is 100: 6.64 bits.
        let mut highest = i64::MIN;
        let last = (0..150).fold(None, |_, _| {
            let state = martingale.observe(score(shift));
            highest = highest.max(state.log2_capital);
            assert_eq!(state.alarm, highest >= 27_213, "{state:?}");
            Some(state)
        });
        let last = last.unwrap();
        assert!(last.alarm && last.rising == rising && last.log2_rise >= last.log2_capital, "{last:?}");
        martingale.restart();
        assert!(!martingale.observe(score(0)).alarm);
    }
}

#[test]
fn capital_is_the_same_on_every_target() {
    let mut chance = Chance::new(12);
    let options = MartingaleOptions { alpha_ppm: 10_000, memory: 100 };
    let mut martingale = ConformalMartingale::new(&[], options, &seed(2));
    let state =
        (0..5000).fold(None, |_, i| Some(martingale.observe(chance.below(100) as i64 + i / 100))).unwrap();
    assert_eq!((state.log2_capital, state.log2_rise, state.alarm), (-219_626, -47, false));
}
