//! The share of normal messages that is flagged is alpha: not more, and not much less.
//!
//! With k = floor(alpha (n + 1)), a calibration of n messages and exchangeable traffic without ties, the
//! number of alarms among m held-out messages is beta-binomial (m; k, n + 1 - k): binomial, with the share
//! itself drawn by which messages happened to calibrate (Vovk 2012, "Conditional validity of inductive
//! conformal predictors", proposition 2a). The alarms of several independent splits add up; their exact
//! distribution gives the 99.9 % bounds. Ties only lower the share, and the streams judged here have few.
//!
//! Seeds are fixed, so a run cannot fail by chance, only by change.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use driftlock_host::capture::Exchange;
use driftlock_host::train::{shuffle, train};
use driftlock_inspect::config::Config;
use driftlock_tests::drive::{Native, Passage};
use driftlock_tests::traffic;
use serde_json::{Value, json};

const SPLITS: u64 = 6;
const TRAIN: usize = 1500;
const JUDGE: usize = 900;
const ALPHAS: [f64; 3] = [0.01, 0.02, 0.05];
/// Streams with hundreds of messages in every split; those of forms have too few to calibrate.
const STREAMS: [&str; 5] = [
    "default/request/openai.chat",
    "default/request/bodiless",
    "default/response/openai.chat",
    "default/response/openai.chat.sse",
    "default/response/json",
];

/// P(X = 0..=m) for the beta-binomial (m; a, b), by its recurrence.
fn beta_binomial(m: usize, a: f64, b: f64) -> Vec<f64> {
    let mut weights = vec![1.0f64];
    for j in 0..m {
        let (x, rest) = (j as f64, (m - j) as f64);
        weights.push(weights[j] * rest / (x + 1.0) * (x + a) / (rest - 1.0 + b));
    }
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

fn sum_of(a: &[f64], b: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; a.len() + b.len() - 1];
    for (i, x) in a.iter().enumerate() {
        for (j, y) in b.iter().enumerate() {
            sum[i + j] += x * y;
        }
    }
    sum
}

/// The smallest and largest count that leave at most 0.05 % on their outer side.
fn bounds(distribution: &[f64]) -> (usize, usize) {
    let outside = |weights: &mut dyn Iterator<Item = &f64>| {
        let mut sum = 0.0;
        weights
            .take_while(|weight| {
                sum += **weight;
                sum <= 0.0005
            })
            .count()
    };
    let low = outside(&mut distribution.iter());
    let high = distribution.len() - 1 - outside(&mut distribution.iter().rev());
    (low, high)
}

#[derive(Default)]
struct Tally {
    messages: usize,
    flagged: usize,
    expected: Vec<f64>,
}

/// One split: trains on some normals, judges others of the same hours.
fn judge(seed: u64, alpha: f64, tallies: &mut BTreeMap<String, Tally>) {
    let mut exchanges: Vec<Exchange> = traffic(1000 + seed, TRAIN + JUDGE, 0);
    // The texts tell the time of day, so only a random split makes the halves alike.
    shuffle(&mut exchanges, seed);
    let held_out = exchanges.split_off(TRAIN);
    // One training serves the three alphas: the smallest needs the most calibration.
    let config = Config::parse(json!({"alpha": ALPHAS[0]}).to_string().as_bytes()).unwrap();
    let snapshot = train(exchanges, config, seed).unwrap().snapshot;
    let configuration =
        json!({"alpha": alpha, "learn": null, "baseline": STANDARD.encode(snapshot.encode())});
    let mut native = Native::start(configuration.to_string().as_bytes());
    let mut messages: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for exchange in &held_out {
        let seen = native.pass(&Passage::of(exchange));
        for json in [seen.request, seen.response].into_iter().flatten() {
            let verdict: Value = serde_json::from_str(&json).unwrap();
            let (count, flagged) =
                messages.entry(verdict["stream"].as_str().unwrap().to_owned()).or_default();
            *count += 1;
            *flagged += usize::from(verdict["outcome"] == "anomalous");
        }
    }
    for stream in STREAMS {
        let baseline = snapshot.streams().iter().find(|baseline| baseline.stream() == stream).unwrap();
        let n = baseline.calibration().statistics().len();
        let k = (alpha * (n as f64 + 1.0) + 1e-9).floor();
        let (count, flagged) = messages[stream];
        let tally = tallies.entry(stream.to_owned()).or_default();
        let of_split = beta_binomial(count, k, n as f64 + 1.0 - k);
        tally.expected =
            if tally.expected.is_empty() { of_split } else { sum_of(&tally.expected, &of_split) };
        tally.messages += count;
        tally.flagged += flagged;
    }
}

#[test]
fn held_out_normals_are_flagged_at_the_rate_alpha() {
    for alpha in ALPHAS {
        let mut tallies = BTreeMap::new();
        for seed in 0..SPLITS {
            judge(seed, alpha, &mut tallies);
        }
        for (stream, tally) in &tallies {
            let (low, high) = bounds(&tally.expected);
            let Tally { messages, flagged, .. } = tally;
            println!("alpha {alpha}: {stream}: {flagged} of {messages} flagged, {low} to {high} expected");
            assert!(*flagged <= high, "{stream}: {flagged} of {messages} at alpha {alpha}; at most {high}");
            assert!(*flagged >= low, "{stream}: {flagged} of {messages} at alpha {alpha}; at least {low}");
            assert!(high < *messages / 4, "the bounds have power");
        }
    }
}

#[test]
fn the_distribution_is_the_beta_binomial() {
    // m = 2, a = 1, b = 1 is uniform on 0, 1, 2.
    assert!(beta_binomial(2, 1.0, 1.0).iter().all(|p| (p - 1.0 / 3.0).abs() < 1e-12));
    let distribution = beta_binomial(500, 5.0, 95.0);
    let mean: f64 = distribution.iter().enumerate().map(|(i, p)| i as f64 * p).sum();
    assert!((mean - 25.0).abs() < 1e-9);
    let both = sum_of(&distribution, &distribution);
    assert!((both.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    let (low, high) = bounds(&distribution);
    assert!(low > 0 && low < 10 && high > 55 && high < 90, "{low} {high}");
}
