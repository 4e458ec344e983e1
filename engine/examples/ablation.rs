//! What normalisation does to accuracy and to false positives: `cargo run --release -p driftlock-engine
//! --example ablation DATA_DIRECTORY [SET...]`.
//!
//! Runs the protocol of `driftlock eval` (repeated texts dropped, 16,384 bytes a text, normals shuffled
//! by a seed, 60 % train, tune and calibrate, one content unit a text) over each set for each choice of
//! classes, three seeds each, and prints the means. The first rows switch whole choices, the later ones
//! take one class into the choice of none. `hit` counts the tokens replaced in 100 normal and 100 attack
//! texts: a class that attacks have and normals have not hides them.
//!
//! For `llm_exchanges`, which has no attacks, request and response are two sets, and what counts is the
//! spread of the false positives and the bits a message costs.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "an example says what is wrong by stopping")]

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;

use driftlock_engine::baseline::{StreamBaseline, StreamTrainer, TrainingOptions, TrainingUnit};
use driftlock_engine::normalise::{Class, ClassSet, DEFAULT_NORMALISED, Normaliser, Piece};

const MAX_TEXT_BYTES: usize = 16_384;
const MAX_TRAINING: usize = 5_000;
const MAX_TEST: usize = 3_000;
const SEEDS: u64 = 3;
const SETS: [&str; 6] = [
    "torpeda_dev",
    "api_attacks_dev",
    "http_params",
    "llm_prompts_dev",
    "llm_exchanges",
    "llm_exchanges:response",
];

struct Set {
    normals: Vec<Vec<u8>>,
    attacks: Vec<Vec<u8>>,
}

/// `name` or `name:response`.
fn read(directory: &Path, name: &str) -> Set {
    let (file, response) = name.split_once(':').map_or((name, false), |(file, _)| (file, true));
    let file = std::fs::File::open(directory.join(format!("{file}.jsonl.gz"))).unwrap();
    let mut rows = String::new();
    flate2::read::MultiGzDecoder::new(file).read_to_string(&mut rows).unwrap();
    let (mut seen, mut set) = (HashSet::new(), Set { normals: Vec::new(), attacks: Vec::new() });
    for row in rows.lines() {
        let row: serde_json::Value = serde_json::from_str(row).unwrap();
        let text = if response { &row["extra"]["response"] } else { &row["text"] };
        let mut text = text.as_str().unwrap_or_default().as_bytes().to_vec();
        if text.is_empty() || !seen.insert(text.clone()) {
            continue;
        }
        text.truncate(MAX_TEXT_BYTES);
        if row["label"] == "normal" { set.normals.push(text) } else { set.attacks.push(text) }
    }
    set
}

/// Fisher and Yates, by SplitMix64.
fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut state = seed;
    for i in (1..items.len()).rev() {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        items.swap(i, ((x ^ x >> 31) % (i as u64 + 1)) as usize);
    }
}

/// Tokens that would be replaced in the text.
fn tokens(text: &[u8], classes: ClassSet) -> usize {
    let mut tokens = 0;
    let mut emit = |piece: Piece<'_>| tokens += usize::from(piece.class.is_some());
    let mut normaliser = Normaliser::new(classes);
    normaliser.push(text, 0, &mut emit);
    normaliser.finish(&mut emit);
    tokens
}

/// AUROC, TPR at 1 % and 0.1 %, realised FPR at alpha 1 % and 0.1 %, bits a normal message costs, tokens
/// in 100 normals and in 100 attacks.
type Figures = [f64; 8];

fn evaluate(set: &Set, classes: ClassSet, seed: u64) -> Figures {
    let (mut normals, mut attacks) = (set.normals.clone(), set.attacks.clone());
    shuffle(&mut normals, seed);
    shuffle(&mut attacks, seed);
    attacks.truncate(MAX_TEST);
    let training = (normals.len() * 6 / 10).min(MAX_TRAINING);
    let test = &normals[training..normals.len().min(training + MAX_TEST)];
    let baseline = baseline(&normals[..training], classes);
    let statistic = |text: &Vec<u8>| baseline.statistic(&[("body", text.clone())]);
    let mut scores: Vec<i64> = test.iter().map(statistic).collect();
    let attack_scores: Vec<i64> = attacks.iter().map(statistic).collect();
    let hits = |texts: &[Vec<u8>]| {
        texts.iter().map(|text| tokens(text, classes)).sum::<usize>() as f64 * 100.0 / texts.len() as f64
    };
    let flagged = |alpha_ppm| {
        let p = |score: &&i64| baseline.calibration().p_value(**score).at_most(alpha_ppm);
        scores.iter().filter(p).count() as f64 / scores.len() as f64
    };
    let (at_1, at_01) = (flagged(10_000), flagged(1_000));
    scores.sort_unstable();
    let wins: f64 = attack_scores
        .iter()
        .map(|&attack| {
            let below = scores.partition_point(|&s| s < attack);
            (below + scores.partition_point(|&s| s <= attack)) as f64 / 2.0
        })
        .sum();
    let tpr = |share: f64| {
        let threshold = scores[scores.len() - 1 - (scores.len() as f64 * share) as usize];
        attack_scores.iter().filter(|&&s| s > threshold).count() as f64 / attacks.len() as f64
    };
    [
        wins / (attacks.len() * scores.len()) as f64,
        tpr(0.01),
        tpr(0.001),
        at_1,
        at_01,
        bits(&baseline, test),
        hits(&set.normals),
        hits(&set.attacks),
    ]
}

/// 70 % train, 10 % tune, 20 % calibrate.
fn baseline(texts: &[Vec<u8>], normalised: ClassSet) -> StreamBaseline {
    let message = |text: &Vec<u8>| -> Vec<TrainingUnit> { vec![("body", text.clone())] };
    let (train, rest) = texts.split_at(texts.len() * 7 / 10);
    let (tune, calibrate) = rest.split_at(texts.len() / 10);
    let options = TrainingOptions { max_ngrams: 1 << 23, normalised, ..TrainingOptions::default() };
    let mut trainer = StreamTrainer::new(options);
    train.iter().for_each(|text| trainer.train(&message(text)));
    let held_out: Vec<_> = tune.iter().map(message).collect();
    let mut baseline = trainer.freeze().tune("ablation", &held_out);
    let statistics = calibrate.iter().map(|text| baseline.statistic(&message(text))).collect();
    baseline.calibrate(statistics);
    baseline
}

/// What a message costs in the mean.
fn bits(baseline: &StreamBaseline, texts: &[Vec<u8>]) -> f64 {
    let Some(unit) = baseline.unit("body") else { return 0.0 };
    let cost: u64 = texts.iter().map(|text| unit.score(text).cost).sum();
    cost as f64 / 256.0 / texts.len() as f64
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap();
    let named: Vec<String> = arguments.collect();
    let mut choices = vec![
        ("none".to_owned(), ClassSet::NONE),
        ("default".to_owned(), DEFAULT_NORMALISED),
        ("default without email".to_owned(), DEFAULT_NORMALISED.without(Class::Email)),
        ("default and digits".to_owned(), DEFAULT_NORMALISED.with(Class::Digits)),
        ("default without base64".to_owned(), DEFAULT_NORMALISED.without(Class::Base64)),
        ("volatile".to_owned(), ClassSet::VOLATILE),
        ("secrets".to_owned(), ClassSet::SECRETS),
        ("personal".to_owned(), ClassSet::PERSONAL),
        ("all".to_owned(), ClassSet::ALL),
    ];
    choices.extend(Class::ALL.map(|class| (format!("+{}", class.name()), ClassSet::NONE.with(class))));
    println!(
        "set | classes | AUROC | TPR@1% | TPR@0.1% | FPR@1% | FPR@0.1% | bits/message | hit/100 normal | hit/100 attack"
    );
    for name in if named.is_empty() { SETS.map(str::to_owned).to_vec() } else { named } {
        let set = read(Path::new(&directory), &name);
        for (choice, classes) in &choices {
            let texts = || set.normals.iter().chain(&set.attacks);
            if *classes != ClassSet::NONE && !texts().any(|text| tokens(text, *classes) > 0) {
                continue;
            }
            let mut mean = [0.0; 8];
            for seed in 0..SEEDS {
                let figures = evaluate(&set, *classes, seed);
                mean.iter_mut().zip(figures).for_each(|(mean, figure)| *mean += figure / SEEDS as f64);
            }
            let figure = |value: &f64| if value.is_nan() { "-".to_owned() } else { format!("{value:.4}") };
            let accuracy: Vec<String> = mean[..5].iter().map(figure).collect();
            let [bits, normal, attack] = [mean[5], mean[6], mean[7]];
            println!("{name} | {choice} | {} | {bits:.0} | {normal:.1} | {attack:.1}", accuracy.join(" | "));
        }
    }
}
