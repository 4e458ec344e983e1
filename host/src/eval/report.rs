//! What an evaluation says: one JSON object, or rows of a table.
//!
//! What: [`Evaluation`] is one detector on one file. Over several seeds each figure is a mean, with the
//! worst beside it, and so is each end of an interval, which is then wider than an interval of the mean.

use std::collections::BTreeMap;

use comfy_table::{Table, presets};
use serde::Serialize;

use super::figures::{Figures, Interval, Intervals};

/// Detection of one group of attacks, with how sure it is and what length alone does not explain.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Detection {
    /// Over all texts.
    #[serde(flatten)]
    pub figures: Figures,
    /// 95 % bootstrap intervals.
    pub confidence_intervals: Intervals,
    /// Among texts of like length: half-octaves with at least 20 normals, normals weighted to the attacks'
    /// lengths.
    pub length_matched: Figures,
}

/// 95 % bootstrap intervals of the realised false-positive rates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct FalsePositiveIntervals {
    /// Of `fpr_at_alpha_1pct`.
    pub fpr_at_alpha_1pct: Option<[f64; 2]>,
    /// Of `fpr_at_alpha_01pct`.
    pub fpr_at_alpha_01pct: Option<[f64; 2]>,
}

/// The worst of several seeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Worst {
    /// Least.
    pub auroc: Option<f64>,
    /// Least.
    pub tpr_at_fpr_1pct: Option<f64>,
    /// Least.
    pub tpr_at_fpr_01pct: Option<f64>,
    /// Largest.
    pub fpr_at_alpha_1pct: f64,
    /// Largest.
    pub fpr_at_alpha_01pct: f64,
}

/// What one detector gave on one file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// The file's name.
    pub file: String,
    /// Which detector.
    pub detector: &'static str,
    /// All attacks together; for `contrast` the mean over the families left out.
    #[serde(flatten)]
    pub all: Detection,
    /// Share of test normals with p <= 1 %.
    pub fpr_at_alpha_1pct: f64,
    /// Share of test normals with p <= 0.1 %.
    pub fpr_at_alpha_01pct: f64,
    /// 95 % bootstrap intervals of these two.
    pub false_positive_intervals: FalsePositiveIntervals,
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
    /// Seeds that the figures are means over.
    pub seeds: usize,
    /// The worst of them, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worst: Option<Worst>,
    /// By label.
    pub labels: BTreeMap<String, Detection>,
}

impl Figures {
    /// The mean of each figure over those that have it.
    pub(crate) fn mean(all: &[Self]) -> Self {
        Self {
            auroc: mean(all.iter().map(|f| f.auroc)),
            tpr_at_fpr_1pct: mean(all.iter().map(|f| f.tpr_at_fpr_1pct)),
            tpr_at_fpr_01pct: mean(all.iter().map(|f| f.tpr_at_fpr_01pct)),
            n_attack: all.iter().map(|f| f.n_attack).sum::<usize>() / all.len().max(1),
        }
    }
}

impl Detection {
    fn mean(all: &[&Self]) -> Self {
        let figures =
            |of: fn(&Self) -> Figures| Figures::mean(&all.iter().map(|d| of(d)).collect::<Vec<_>>());
        let ends = |of: fn(&Intervals) -> Option<Interval>| {
            mean_ends(all.iter().map(|detection| of(&detection.confidence_intervals)))
        };
        Self {
            figures: figures(|d| d.figures),
            confidence_intervals: Intervals {
                auroc: ends(|i| i.auroc),
                tpr_at_fpr_1pct: ends(|i| i.tpr_at_fpr_1pct),
                tpr_at_fpr_01pct: ends(|i| i.tpr_at_fpr_01pct),
            },
            length_matched: figures(|d| d.length_matched),
        }
    }
}

impl Evaluation {
    /// One evaluation of several seeds; none of none.
    pub(crate) fn over_seeds(all: &[Self]) -> Option<Self> {
        let least = |of: fn(&Self) -> Option<f64>| all.iter().filter_map(of).min_by(f64::total_cmp);
        let largest = |of: fn(&Self) -> f64| all.iter().map(of).fold(0.0, f64::max);
        let worst = Worst {
            auroc: least(|e| e.all.figures.auroc),
            tpr_at_fpr_1pct: least(|e| e.all.figures.tpr_at_fpr_1pct),
            tpr_at_fpr_01pct: least(|e| e.all.figures.tpr_at_fpr_01pct),
            fpr_at_alpha_1pct: largest(|e| e.fpr_at_alpha_1pct),
            fpr_at_alpha_01pct: largest(|e| e.fpr_at_alpha_01pct),
        };
        let mean = Self::mean(all)?;
        Some(Self { seeds: all.len(), worst: (all.len() > 1).then_some(worst), ..mean })
    }

    /// One evaluation of several families of attacks, each with its own detector; none of none.
    pub(crate) fn over_families(all: &[Self]) -> Option<Self> {
        let mut mean = Self::mean(all)?;
        mean.all.figures.n_attack = all.iter().map(|e| e.all.figures.n_attack).sum();
        mean.all.length_matched.n_attack = all.iter().map(|e| e.all.length_matched.n_attack).sum();
        Some(mean)
    }

    fn mean(all: &[Self]) -> Option<Self> {
        let average = |of: fn(&Self) -> f64| all.iter().map(of).sum::<f64>() / all.len() as f64;
        let ends = |of: fn(&FalsePositiveIntervals) -> Option<Interval>| {
            mean_ends(all.iter().map(|evaluation| of(&evaluation.false_positive_intervals)))
        };
        let mut labels: BTreeMap<String, Vec<&Detection>> = BTreeMap::new();
        for (label, detection) in all.iter().flat_map(|evaluation| &evaluation.labels) {
            labels.entry(label.clone()).or_default().push(detection);
        }
        let first = all.first()?;
        Some(Self {
            file: first.file.clone(),
            detector: first.detector,
            all: Detection::mean(&all.iter().map(|e| &e.all).collect::<Vec<_>>()),
            fpr_at_alpha_1pct: average(|e| e.fpr_at_alpha_1pct),
            fpr_at_alpha_01pct: average(|e| e.fpr_at_alpha_01pct),
            false_positive_intervals: FalsePositiveIntervals {
                fpr_at_alpha_1pct: ends(|i| i.fpr_at_alpha_1pct),
                fpr_at_alpha_01pct: ends(|i| i.fpr_at_alpha_01pct),
            },
            bits_per_byte: average(|e| e.bits_per_byte),
            us_per_message: average(|e| e.us_per_message),
            mb_per_s: average(|e| e.mb_per_s),
            n_train: first.n_train,
            n_normal: first.n_normal,
            seeds: 1,
            worst: None,
            labels: labels.iter().map(|(label, all)| (label.clone(), Detection::mean(all))).collect(),
        })
    }
}

fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let values: Vec<f64> = values.flatten().collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn mean_ends(intervals: impl Iterator<Item = Option<Interval>>) -> Option<Interval> {
    let intervals: Vec<Option<Interval>> = intervals.collect();
    let end = |at: usize| mean(intervals.iter().map(|interval| interval.map(|ends| ends[at])));
    Some([end(0)?, end(1)?])
}

/// The readable form: a row for each detector and file, with intervals in brackets, then its labels.
pub(crate) fn table(evaluations: &[Evaluation]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "file",
        "detector",
        "label",
        "attacks",
        "AUROC",
        "TPR@1%",
        "TPR@0.1%",
        "same length",
        "FPR@1%",
        "FPR@0.1%",
        "bits/B",
        "us/msg",
        "MB/s",
    ]);
    let figure = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    let with_interval = |value: Option<f64>, interval: Option<[f64; 2]>| match interval {
        Some([low, high]) => format!("{} [{low:.3} {high:.3}]", figure(value)),
        None => figure(value),
    };
    let detection = |label: &str, d: &Detection| {
        let (f, i) = (&d.figures, &d.confidence_intervals);
        vec![
            label.to_owned(),
            f.n_attack.to_string(),
            with_interval(f.auroc, i.auroc),
            with_interval(f.tpr_at_fpr_1pct, i.tpr_at_fpr_1pct),
            with_interval(f.tpr_at_fpr_01pct, i.tpr_at_fpr_01pct),
            match d.length_matched.auroc {
                Some(auroc) => {
                    format!("{auroc:.3}/{:.3}", d.length_matched.tpr_at_fpr_1pct.unwrap_or_default())
                }
                None => "-".to_owned(),
            },
        ]
    };
    for evaluation in evaluations {
        let mut row = vec![evaluation.file.clone(), evaluation.detector.to_owned()];
        row.extend(detection("all", &evaluation.all));
        row.extend([
            format!("{:.4}", evaluation.fpr_at_alpha_1pct),
            format!("{:.4}", evaluation.fpr_at_alpha_01pct),
            format!("{:.3}", evaluation.bits_per_byte),
            format!("{:.1}", evaluation.us_per_message),
            format!("{:.0}", evaluation.mb_per_s),
        ]);
        table.add_row(row);
        if let Some(worst) = evaluation.worst {
            table.add_row([
                String::new(),
                String::new(),
                format!("worst of {} seeds", evaluation.seeds),
                String::new(),
                figure(worst.auroc),
                figure(worst.tpr_at_fpr_1pct),
                figure(worst.tpr_at_fpr_01pct),
                String::new(),
                format!("{:.4}", worst.fpr_at_alpha_1pct),
                format!("{:.4}", worst.fpr_at_alpha_01pct),
            ]);
        }
        for (label, d) in evaluation.labels.iter().filter(|_| evaluation.labels.len() > 1) {
            let mut row = vec![String::new(), String::new()];
            row.extend(detection(label, d));
            table.add_row(row);
        }
    }
    table
}
