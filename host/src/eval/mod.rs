//! `driftlock eval`: how well anomalies are told from normal messages, by a fixed protocol.
//!
//! What: `protocol.rs` says which texts train and which are tested, `detector.rs` what is compared,
//! `contrast.rs` what reference attacks add, `figures.rs` what is computed, `report.rs` and `plot.rs` how it is shown. One configuration for every
//! file; every detector is fitted and calibrated on the same texts.
//!
//! Reported for each detector and file: AUROC, the true-positive rate at 1 % and 0.1 % false positives, the
//! realised false-positive rate at alpha 1 % and 0.1 %, bits per byte and speed; the same by label, among
//! texts of like length, and with bootstrap intervals.
//!
//! A whole text is one content unit here: the protocol measures the detector, not the parsers.
//!
//! Cost: some seconds a file and detector. Left out on purpose: choosing anything by looking at the
//! attacks.

mod contrast;
mod detector;
mod figures;
mod plot;
pub(crate) mod protocol;
mod report;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use driftlock_engine::adapters::router::{ContentKind, Route, RouteError, Router};
use driftlock_engine::adapters::{Adapter, AdapterError};

pub use self::detector::DetectorName;
use self::detector::{Calibrated, Detector};
pub use self::figures::{Figures, Intervals};
use self::figures::{Ranked, share_interval};
use self::protocol::{Sample, Set, Split};
pub use self::report::{Detection, Evaluation, FalsePositiveIntervals, Worst};
use crate::capture::CaptureError;

/// Arguments of `driftlock eval`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Labelled captures: JSON Lines, plain or gzip.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// What to compare, side by side.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "context")]
    pub detector: Vec<DetectorName>,
    /// Print one JSON object for each file and detector instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Seed of the shuffle.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How many shuffles, from --seed on: means, and the worst of them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub seeds: u64,
    /// Write ROC and precision-recall curves of the first seed into this directory, as SVG.
    #[arg(long)]
    pub plots: Option<PathBuf>,
    /// Labelled captures with known attacks: adds the detector `contrast`, for which the family under test
    /// is left out of them. Can be the evaluated file itself; can be repeated.
    #[arg(long)]
    pub reference: Vec<PathBuf>,
    /// Before the default routes of `ncd`: KIND:MAX_BYTES:ADAPTER, such as text:32000:deflate. Can be
    /// repeated; the first that fits counts.
    #[arg(long, value_parser = parse_route)]
    pub route: Vec<Route>,
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
    /// Nothing to contrast with.
    #[error("the reference files have no attack of a family other than {family:?}; add a file that has")]
    NoReference {
        /// The family left out.
        family: String,
    },
    /// A compressor.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The table of adapters.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// Writing the result.
    #[error("cannot write the result: {0}")]
    Write(#[from] io::Error),
}

/// `KIND:MAX_BYTES:ADAPTER`.
fn parse_route(text: &str) -> Result<Route, String> {
    let fields: Vec<&str> = text.split(':').collect();
    let [kind, max_bytes, adapter] = fields[..] else {
        return Err("a route is KIND:MAX_BYTES:ADAPTER".to_owned());
    };
    let kinds = ContentKind::ALL.map(ContentKind::name).join(", ");
    let adapters = Adapter::ALL.map(Adapter::name).join(", ");
    Ok(Route {
        kind: ContentKind::from_name(kind).ok_or(format!("{kind:?} is not one of {kinds}"))?,
        max_bytes: max_bytes.parse().map_err(|error| format!("{max_bytes:?}: {error}"))?,
        adapter: Adapter::from_name(adapter).ok_or(format!("{adapter:?} is not one of {adapters}"))?,
    })
}

/// One detector's scores on one split.
struct Scored {
    detector: Calibrated,
    normals: Vec<i64>,
    attacks: Vec<i64>,
    seconds: f64,
}

impl Scored {
    fn new(detector: Box<dyn Detector>, split: &Split) -> Result<Self, EvalError> {
        let mut detector = Calibrated::new(detector, &split.calibrate)?;
        let mut score = |samples: &[Sample]| -> Result<Vec<i64>, EvalError> {
            samples.iter().map(|sample| detector.detector.statistic(sample)).collect()
        };
        let started = Instant::now();
        let (normals, attacks) = (score(&split.test)?, score(&split.attacks)?);
        let seconds = started.elapsed().as_secs_f64();
        Ok(Self { detector, normals, attacks, seconds })
    }

    fn detection(&self, split: &Split, attacks: &[(&Sample, i64)], seed: u64) -> Detection {
        let statistics: Vec<i64> = attacks.iter().map(|(_, statistic)| *statistic).collect();
        let ranked = Ranked::new(&self.normals, &statistics);
        let bytes: Vec<usize> = split.test.iter().map(|sample| sample.text().len()).collect();
        let attack_bytes: Vec<usize> = attacks.iter().map(|(sample, _)| sample.text().len()).collect();
        Detection {
            figures: ranked.figures(),
            confidence_intervals: ranked.intervals(seed),
            length_matched: ranked.length_matched(&bytes, &attack_bytes),
        }
    }

    fn evaluation(
        &mut self,
        file: &str,
        detector: &'static str,
        split: &Split,
        seed: u64,
    ) -> Result<Evaluation, EvalError> {
        let attacks: Vec<(&Sample, i64)> = split.attacks.iter().zip(self.attacks.iter().copied()).collect();
        let mut by_label: BTreeMap<&str, Vec<(&Sample, i64)>> = BTreeMap::new();
        for attack in &attacks {
            by_label.entry(&attack.0.label).or_default().push(*attack);
        }
        let all = self.detection(split, &attacks, seed);
        let labels = by_label
            .into_iter()
            .map(|(label, attacks)| (label.to_owned(), self.detection(split, &attacks, seed)))
            .collect();
        let flagged = |alpha_ppm| self.normals.iter().filter(|s| self.detector.flags(**s, alpha_ppm)).count();
        let (one, tenth, of) = (flagged(10_000), flagged(1_000), split.test.len());
        let scored_bytes: usize =
            split.test.iter().chain(&split.attacks).map(|sample| sample.text().len()).sum();
        let scored = split.test.len() + split.attacks.len();
        let (mut bits, mut bytes) = (0.0, 0);
        for sample in &split.test {
            bits += self.detector.detector.bits(sample)?;
            bytes += sample.text().len();
        }
        Ok(Evaluation {
            file: file.to_owned(),
            detector,
            all,
            fpr_at_alpha_1pct: one as f64 / of as f64,
            fpr_at_alpha_01pct: tenth as f64 / of as f64,
            false_positive_intervals: FalsePositiveIntervals {
                fpr_at_alpha_1pct: share_interval(one, of, seed),
                fpr_at_alpha_01pct: share_interval(tenth, of, seed),
            },
            bits_per_byte: bits / bytes.max(1) as f64,
            us_per_message: self.seconds * 1e6 / scored as f64,
            mb_per_s: scored_bytes as f64 / self.seconds / 1e6,
            n_train: split.fitting(),
            n_normal: of,
            seeds: 1,
            worst: None,
            labels,
        })
    }
}

/// Evaluates the detectors on one file: for each its figures.
///
/// # Errors
/// [`EvalError`].
pub fn evaluate(path: &Path, args: &Args) -> Result<Vec<Evaluation>, EvalError> {
    let file = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let router = Router::with(&args.route)?;
    let set = Set::read(path)?;
    let mut references = Vec::new();
    for path in &args.reference {
        references.extend(Set::read(path)?.attacks);
    }
    // By detector, its seeds.
    let mut evaluations: Vec<Vec<Evaluation>> = Vec::new();
    let mut curves = Vec::new();
    for seed in args.seed..args.seed.saturating_add(args.seeds) {
        let split = set.split(path, seed)?;
        let mut of_seed = Vec::new();
        let repeated = |at: usize| args.detector[..at].contains(&args.detector[at]);
        for detector in (0..args.detector.len()).filter(|at| !repeated(*at)).map(|at| args.detector[at]) {
            let name = detector.name();
            let mut scored = Scored::new(detector.fit(&split, &router)?, &split)?;
            if args.plots.is_some() && seed == args.seed {
                curves.push((name, Ranked::new(&scored.normals, &scored.attacks)));
            }
            of_seed.push(scored.evaluation(&file, name, &split, seed)?);
        }
        if !references.is_empty() {
            of_seed.extend(contrast::evaluate(&file, &split, &references, seed)?);
        }
        for evaluation in of_seed {
            match evaluations.iter_mut().find(|all| all[0].detector == evaluation.detector) {
                Some(all) => all.push(evaluation),
                None => evaluations.push(vec![evaluation]),
            }
        }
    }
    if let Some(directory) = args.plots.as_ref().filter(|_| !set.attacks.is_empty()) {
        let stem = file.split('.').next().unwrap_or(&file);
        plot::draw(directory, stem, &curves)?;
    }
    Ok(evaluations.iter().filter_map(|all| Evaluation::over_seeds(all)).collect())
}

/// Runs `driftlock eval`.
///
/// # Errors
/// [`EvalError`].
pub fn run(args: &Args) -> Result<(), EvalError> {
    let mut all = Vec::new();
    for path in &args.files {
        let evaluations = evaluate(path, args)?;
        if args.json {
            for evaluation in &evaluations {
                anstream::println!("{}", serde_json::to_string(evaluation).map_err(io::Error::from)?);
            }
        }
        all.extend(evaluations);
    }
    if !args.json {
        anstream::println!("{}", report::table(&all));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::io::Write;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn args(more: &[&str]) -> Args {
        Cli::try_parse_from([&["eval", "file"], more].concat()).unwrap().args
    }

    /// Short requests; attacks of two families, one of them as long as the normals.
    fn labelled() -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut row = |i: u32, label: &str, text: String| {
            let row = serde_json::json!({"id": i, "label": label, "kind": "http_request", "text": text});
            writeln!(file, "{row}").unwrap();
        };
        let id = |i: u32| i.wrapping_mul(2_654_435_761) >> 16;
        for i in 0..900 {
            row(i, "normal", format!("GET /orders/{}?page={}&customer={}", id(i), i % 7, id(i * 3)));
        }
        for i in 0..40 {
            row(i, "sqli", format!("GET /orders/{i}?page=1' UNION SELECT password, salt FROM users--"));
            row(i, "xss", format!("GET /orders/{i}?page=<svg onload=0>"));
        }
        file
    }

    const EVERY: &str = if cfg!(feature = "openzl") {
        "context,zstd,lz4,deflate,openzl,ncd"
    } else {
        "context,zstd,lz4,deflate,ncd"
    };

    #[test]
    fn every_detector_is_evaluated_end_to_end() {
        let (file, plots) = (labelled(), tempfile::tempdir().unwrap());
        let directory = plots.path().to_str().unwrap();
        let args = args(&["--detector", EVERY, "--seed", "1", "--plots", directory]);
        let evaluations = evaluate(file.path(), &args).unwrap();
        let names: Vec<&str> = evaluations.iter().map(|evaluation| evaluation.detector).collect();
        assert_eq!(names.join(","), EVERY);
        for evaluation in &evaluations {
            let json = serde_json::to_value(evaluation).unwrap();
            for key in [
                "file",
                "detector",
                "auroc",
                "tpr_at_fpr_1pct",
                "tpr_at_fpr_01pct",
                "fpr_at_alpha_1pct",
                "fpr_at_alpha_01pct",
                "bits_per_byte",
                "us_per_message",
                "mb_per_s",
                "n_train",
                "n_normal",
                "n_attack",
                "confidence_intervals",
                "length_matched",
                "labels",
            ] {
                assert!(!json[key].is_null(), "{}: {key}", evaluation.detector);
            }
            assert_eq!(
                (evaluation.n_train, evaluation.n_normal, evaluation.all.figures.n_attack),
                (540, 360, 80)
            );
            let sqli = &evaluation.labels["sqli"];
            assert!(sqli.figures.auroc.unwrap() > 0.95, "{}: {sqli:?}", evaluation.detector);
            assert_eq!(sqli.figures.n_attack, 40);
            let [low, high] = evaluation.all.confidence_intervals.auroc.unwrap();
            assert!((low..=high).contains(&evaluation.all.figures.auroc.unwrap()));
            assert!(evaluation.fpr_at_alpha_1pct <= 0.06, "{}", evaluation.detector);
            assert!(
                evaluation.bits_per_byte > 0.1 && evaluation.bits_per_byte < 12.0,
                "{}",
                evaluation.detector
            );
        }
        assert_eq!(evaluations[0].all.figures.auroc, Some(1.0));
        let drawn = std::fs::read_dir(plots.path()).unwrap().count();
        assert_eq!(drawn, 2);
        let table = report::table(&evaluations).to_string();
        assert!(names.iter().all(|name| table.contains(name)) && table.contains("sqli"));
    }

    #[test]
    fn a_seed_gives_one_result_and_several_their_mean() {
        let file = labelled();
        let same = |evaluation: &Evaluation| {
            let mut json = serde_json::to_value(evaluation).unwrap();
            let fields = json.as_object_mut().unwrap();
            fields.remove("us_per_message");
            fields.remove("mb_per_s");
            json
        };
        let once = |seed: &str| evaluate(file.path(), &args(&["--detector", "lz4", "--seed", seed])).unwrap();
        assert_eq!(same(&once("5")[0]), same(&once("5")[0]));
        assert_ne!(same(&once("5")[0]), same(&once("6")[0]));
        let both =
            evaluate(file.path(), &args(&["--detector", "lz4,lz4", "--seed", "5", "--seeds", "2"])).unwrap();
        assert_eq!((both.len(), both[0].seeds), (1, 2));
        let [five, six] = [&once("5")[0], &once("6")[0]].map(|e| e.all.figures.auroc.unwrap());
        assert!((both[0].all.figures.auroc.unwrap() - (five + six) / 2.0).abs() < 1e-12);
        assert_eq!(both[0].worst.unwrap().auroc, Some(five.min(six)));
    }

    /// Two families of injection and one of scripts; what the first two share helps to find either.
    #[test]
    fn contrast_leaves_the_tested_family_out() {
        let mut file = labelled();
        for i in 0..40 {
            let text = format!("GET /orders/{i}?page=2; DELETE FROM users WHERE password LIKE 1--");
            let row = serde_json::json!({"id": i, "label": "delete", "kind": "http_request", "text": text});
            writeln!(file, "{row}").unwrap();
        }
        let path = file.path().to_str().unwrap();
        let with = evaluate(file.path(), &args(&["--detector", "deflate", "--reference", path])).unwrap();
        let [_, contrast] = &with[..] else { panic!("two detectors") };
        assert_eq!((contrast.detector, contrast.all.figures.n_attack), ("contrast", 120));
        let aurocs: Vec<f64> = contrast.labels.values().map(|d| d.figures.auroc.unwrap()).collect();
        assert_eq!(aurocs.len(), 3);
        let mean = aurocs.iter().sum::<f64>() / 3.0;
        assert!((contrast.all.figures.auroc.unwrap() - mean).abs() < 1e-12 && mean > 0.95, "{aurocs:?}");
        assert!(contrast.fpr_at_alpha_1pct <= 0.06);
        // One family alone leaves nothing to refer to.
        let mut alone = tempfile::NamedTempFile::new().unwrap();
        let row = serde_json::json!({"id": 1, "label": "sqli", "kind": "http_request", "text": "x' OR 1=1"});
        writeln!(alone, "{row}").unwrap();
        let row = serde_json::json!({"id": 1, "label": "normal", "kind": "http_request", "text": "x"});
        writeln!(alone, "{row}").unwrap();
        let alone = alone.path().to_str().unwrap();
        let refused = evaluate(file.path(), &args(&["--reference", alone]));
        assert!(matches!(refused, Err(EvalError::NoReference { family }) if family == "sqli"));
    }

    #[test]
    fn normals_alone_give_false_positives_and_no_detection() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for i in 0..200 {
            let text = format!("connection {} from host {} closed", i * 7919, i % 13);
            let row = serde_json::json!({"id": i, "label": "unlabelled", "kind": "log", "text": text});
            writeln!(file, "{row}").unwrap();
        }
        let args = args(&["--detector", "deflate", "--plots", "unused"]);
        let [evaluation] = &evaluate(file.path(), &args).unwrap()[..] else { panic!("one detector") };
        assert_eq!((evaluation.all.figures, evaluation.n_normal), (Figures::default(), 80));
        assert!(!Path::new("unused").exists());
    }

    #[test]
    fn routes_are_read_and_refused_by_name() {
        let route = Route { kind: ContentKind::Text, max_bytes: 900, adapter: Adapter::Lz4 };
        assert_eq!(args(&["--route", "text:900:lz4"]).route, [route]);
        for wrong in ["text:900", "prose:900:lz4", "text:many:lz4", "text:900:gzip"] {
            assert!(Cli::try_parse_from(["eval", "file", "--route", wrong]).is_err(), "{wrong}");
        }
        let beyond = evaluate(labelled().path(), &args(&["--route", "text:70000:lz4"]));
        assert!(matches!(beyond, Err(EvalError::Route(RouteError::BeyondWindow { .. }))));
    }

    /// The override decides which compressor `ncd` asks.
    #[test]
    fn a_route_changes_the_distances() {
        let file = labelled();
        let bits = |more: &[&str]| {
            let args = args(&[&["--detector", "ncd"], more].concat());
            evaluate(file.path(), &args).unwrap()[0].bits_per_byte
        };
        assert_ne!(bits(&[]), bits(&["--route", "http:60000:zstd"]));
        assert_eq!(bits(&[]), bits(&["--route", "log:60000:zstd"]));
    }
}
