//! `driftlock eval`: how well anomalies are told from normal messages, by a fixed protocol.
//!
//! What: repeated texts are dropped, each text cut to 16,384 bytes, the normals shuffled by a seed; the
//! first 60 % (at most 5,000) train, tune and calibrate, of the rest at most 3,000 are test normals, and
//! at most 3,000 attacks are tested. One configuration for every file. Reported: AUROC, the true-positive
//! rate at 1 % and 0.1 % false positives (the threshold is the smallest that at most that share of test
//! normals exceeds), the realised false-positive rate at alpha 1 % and 0.1 %, and speed; the same by
//! label.
//!
//! A whole text is one content unit here: the protocol measures the detector, not the parsers.
//!
//! Cost: some seconds a file. Left out on purpose: choosing anything by looking at the attacks.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use comfy_table::{Table, presets};
use driftlock_engine::baseline::{StreamBaseline, StreamTrainer, TrainingOptions, TrainingUnit};
use serde::Serialize;

use crate::capture::{self, CaptureError};
use crate::train::shuffle;

/// Bytes of a text that count.
const MAX_TEXT_BYTES: usize = 16_384;
const MAX_TRAINING: usize = 5_000;
const MAX_TEST: usize = 3_000;

/// Arguments of `driftlock eval`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Labelled captures: JSON Lines, plain or gzip.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// Print one JSON object a file instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Seed of the shuffle.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Why a file could not be evaluated.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The capture.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Too few normals to split.
    #[error(
        "{path} has {normals} different normal texts; at least 50 are needed to train, calibrate and test"
    )]
    TooFew {
        /// Which file.
        path: PathBuf,
        /// How many there are.
        normals: usize,
    },
    /// Writing the result.
    #[error("cannot write the result: {0}")]
    Write(#[from] io::Error),
}

/// Detection of one kind of attack.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Detection {
    /// Area under the ROC curve; ties count half. None without attacks.
    pub auroc: Option<f64>,
    /// True-positive rate at 1 % false positives.
    pub tpr_at_fpr_1pct: Option<f64>,
    /// True-positive rate at 0.1 % false positives.
    pub tpr_at_fpr_01pct: Option<f64>,
    /// Attacks tested.
    pub n_attack: usize,
}

/// What one file gave.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// The file's name.
    pub file: String,
    /// Which detector.
    pub detector: &'static str,
    /// All attacks together.
    #[serde(flatten)]
    pub all: Detection,
    /// Share of test normals with p <= 1 %.
    pub fpr_at_alpha_1pct: f64,
    /// Share of test normals with p <= 0.1 %.
    pub fpr_at_alpha_01pct: f64,
    /// Mean code length of the test normals.
    pub bits_per_byte: f64,
    /// Scoring time.
    pub us_per_message: f64,
    /// Scoring speed.
    pub mb_per_s: f64,
    /// Normals that trained, tuned and calibrated.
    pub n_train: usize,
    /// Test normals.
    pub n_normal: usize,
    /// By label.
    pub labels: BTreeMap<String, Detection>,
}

/// Evaluates one file.
///
/// # Errors
/// [`EvalError`].
pub fn evaluate(path: &Path, seed: u64) -> Result<Evaluation, EvalError> {
    let mut seen = HashSet::new();
    let (mut normals, mut attacks) = (Vec::new(), Vec::new());
    for row in capture::open(path)? {
        let row = row?;
        let mut text = row.text.into_bytes();
        if text.is_empty() || !seen.insert(text.clone()) {
            continue;
        }
        text.truncate(MAX_TEXT_BYTES);
        match row.label.as_str() {
            "normal" | "unlabelled" => normals.push(text),
            _ => attacks.push((row.label, text)),
        }
    }
    if normals.is_empty() {
        // Sets labelled by source, such as model outputs: the first label is the normal one.
        let first = attacks.first().map(|(label, _)| label.clone()).unwrap_or_default();
        let (base, rest): (Vec<_>, Vec<_>) = attacks.into_iter().partition(|(label, _)| *label == first);
        normals = base.into_iter().map(|(_, text)| text).collect();
        attacks = rest;
    }
    if normals.len() < 50 {
        return Err(EvalError::TooFew { path: path.to_owned(), normals: normals.len() });
    }
    shuffle(&mut normals, seed);
    shuffle(&mut attacks, seed);
    attacks.truncate(MAX_TEST);
    let training = (normals.len() * 6 / 10).min(MAX_TRAINING);
    let test = &normals[training..normals.len().min(training + MAX_TEST)];
    let baseline = baseline(&normals[..training]);

    let unit = |text: &[u8]| vec![("body", text.to_vec())];
    let test_units: Vec<_> = test.iter().map(|text| unit(text)).collect();
    let attack_units: Vec<_> = attacks.iter().map(|(_, text)| unit(text)).collect();
    let started = Instant::now();
    let normal_statistics: Vec<i64> = test_units.iter().map(|units| baseline.statistic(units)).collect();
    let attack_statistics: Vec<i64> = attack_units.iter().map(|units| baseline.statistic(units)).collect();
    let seconds = started.elapsed().as_secs_f64();
    let bytes: usize =
        test.iter().map(Vec::len).sum::<usize>() + attacks.iter().map(|(_, t)| t.len()).sum::<usize>();

    let share = |alpha_ppm| {
        let flagged =
            normal_statistics.iter().filter(|&&s| baseline.calibration().p_value(s).at_most(alpha_ppm));
        flagged.count() as f64 / test.len() as f64
    };
    let mut by_label: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for ((label, _), statistic) in attacks.iter().zip(&attack_statistics) {
        by_label.entry(label.clone()).or_default().push(*statistic);
    }
    Ok(Evaluation {
        file: path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        detector: "context",
        all: detection(&normal_statistics, &attack_statistics),
        fpr_at_alpha_1pct: share(10_000),
        fpr_at_alpha_01pct: share(1_000),
        bits_per_byte: bits_per_byte(&baseline, test),
        us_per_message: seconds * 1e6 / (test.len() + attacks.len()) as f64,
        mb_per_s: bytes as f64 / seconds / 1e6,
        n_train: training,
        n_normal: test.len(),
        labels: by_label.iter().map(|(label, s)| (label.clone(), detection(&normal_statistics, s))).collect(),
    })
}

/// 70 % train, 10 % tune, 20 % calibrate.
fn baseline(texts: &[Vec<u8>]) -> StreamBaseline {
    let message = |text: &Vec<u8>| -> Vec<TrainingUnit> { vec![("body", text.clone())] };
    let (train, rest) = texts.split_at(texts.len() * 7 / 10);
    let (tune, calibrate) = rest.split_at(texts.len() / 10);
    let options = TrainingOptions { max_ngrams: 1 << 23, ..TrainingOptions::default() };
    let mut trainer = StreamTrainer::new(options);
    train.iter().for_each(|text| trainer.train(&message(text)));
    let held_out: Vec<_> = tune.iter().map(message).collect();
    let mut baseline = trainer.freeze().tune("eval", &held_out);
    let statistics = calibrate.iter().map(|text| baseline.statistic(&message(text))).collect();
    baseline.calibrate(statistics);
    baseline
}

fn bits_per_byte(baseline: &StreamBaseline, texts: &[Vec<u8>]) -> f64 {
    let Some(unit) = baseline.unit("body") else { return 0.0 };
    let (mut cost, mut bytes) = (0u64, 0u64);
    for text in texts {
        let mut scorer = unit.scorer();
        scorer.push(&unit.model, text, 0);
        let scores = scorer.finish(&unit.model);
        cost += scores.cost;
        bytes += scores.source_bytes;
    }
    cost as f64 / 256.0 / bytes.max(1) as f64
}

fn detection(normals: &[i64], attacks: &[i64]) -> Detection {
    if attacks.is_empty() {
        return Detection::default();
    }
    let mut sorted = normals.to_vec();
    sorted.sort_unstable();
    let wins: f64 = attacks
        .iter()
        .map(|&attack| {
            let below = sorted.partition_point(|&s| s < attack);
            let ties = sorted.partition_point(|&s| s <= attack) - below;
            below as f64 + ties as f64 / 2.0
        })
        .sum();
    let tpr = |share: f64| {
        // The smallest threshold that at most this share of the normals exceeds.
        let exceed = (normals.len() as f64 * share) as usize;
        let threshold = sorted[sorted.len() - 1 - exceed.min(sorted.len() - 1)];
        attacks.iter().filter(|&&s| s > threshold).count() as f64 / attacks.len() as f64
    };
    Detection {
        auroc: Some(wins / (attacks.len() as f64 * normals.len() as f64)),
        tpr_at_fpr_1pct: Some(tpr(0.01)),
        tpr_at_fpr_01pct: Some(tpr(0.001)),
        n_attack: attacks.len(),
    }
}

/// Runs `driftlock eval`.
///
/// # Errors
/// [`EvalError`].
pub fn run(args: &Args) -> Result<(), EvalError> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "file", "label", "attacks", "AUROC", "TPR@1%", "TPR@0.1%", "FPR@1%", "FPR@0.1%", "bits/B", "us/msg",
        "MB/s",
    ]);
    let figure = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    for path in &args.files {
        let evaluation = evaluate(path, args.seed)?;
        if args.json {
            let json = serde_json::to_string(&evaluation).map_err(io::Error::from)?;
            anstream::println!("{json}");
            continue;
        }
        let detection = |name: &str, d: &Detection| {
            vec![
                name.to_owned(),
                d.n_attack.to_string(),
                figure(d.auroc),
                figure(d.tpr_at_fpr_1pct),
                figure(d.tpr_at_fpr_01pct),
            ]
        };
        let mut row = vec![evaluation.file.clone()];
        row.extend(detection("all", &evaluation.all));
        row.extend([
            format!("{:.4}", evaluation.fpr_at_alpha_1pct),
            format!("{:.4}", evaluation.fpr_at_alpha_01pct),
            format!("{:.3}", evaluation.bits_per_byte),
            format!("{:.1}", evaluation.us_per_message),
            format!("{:.0}", evaluation.mb_per_s),
        ]);
        table.add_row(row);
        for (label, d) in evaluation.labels.iter().filter(|_| evaluation.labels.len() > 1) {
            let mut row = vec![String::new()];
            row.extend(detection(label, d));
            table.add_row(row);
        }
    }
    if !args.json {
        anstream::println!("{table}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn detection_is_the_definition() {
        let normals: Vec<i64> = (0..1000).collect();
        let d = detection(&normals, &[2000, 995, 500, -1]);
        // 995 beats 995 normals and ties with one.
        assert_eq!(d.auroc, Some((1000.0 + 995.5 + 500.5) / 4000.0));
        // Ten of 1000 may exceed the threshold 989, one may exceed 998.
        assert_eq!((d.tpr_at_fpr_1pct, d.tpr_at_fpr_01pct), (Some(0.5), Some(0.25)));
        assert_eq!(detection(&normals, &[]), Detection::default());
    }

    #[test]
    fn a_small_set_is_evaluated_end_to_end() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for i in 0..600u32 {
            let row = serde_json::json!({"id": i, "label": "normal", "kind": "http_request",
                "text": format!("GET /orders/{}?page={}", i.wrapping_mul(2_654_435_761) >> 22, i % 7)});
            writeln!(file, "{row}").unwrap();
        }
        for i in 0..40 {
            let row = serde_json::json!({"id": i, "label": "sqli", "kind": "http_request",
                "text": format!("GET /orders/{i}?page=1' UNION SELECT password FROM users--")});
            writeln!(file, "{row}").unwrap();
        }
        let evaluation = evaluate(file.path(), 1).unwrap();
        assert_eq!(evaluation.all.auroc, Some(1.0));
        assert_eq!((evaluation.all.n_attack, evaluation.labels["sqli"].n_attack), (40, 40));
        assert!(evaluation.fpr_at_alpha_1pct <= 0.05 && evaluation.n_normal > 100);
        let json = serde_json::to_value(&evaluation).unwrap();
        for key in ["file", "detector", "auroc", "tpr_at_fpr_1pct", "tpr_at_fpr_01pct", "mb_per_s", "labels"]
        {
            assert!(!json[key].is_null(), "{key}");
        }
    }
}
