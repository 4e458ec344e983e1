//! `driftlock drift`: has the traffic of one capture moved away from another's, how, and what moved it?
//!
//! What: both captures' messages are given code lengths by one frozen model; per stream the two samples are put
//! to the joint permutation test of [`driftlock_engine::drift`]: code length a byte, length and total, each up,
//! down, apart or together. Benjamini and Hochberg's rule over the streams says which of them moved. For those
//! the report names the kinds of unit, the words and the messages that the largest shift comes from, with
//! excerpts.
//!
//! The model is a snapshot (`--model`), or one trained on a random quarter of the baseline capture, whose other
//! messages are then the sample. With a snapshot its calibration says as well *which* of the two captures left
//! what the model knows: the baseline capture may be the odd one.
//!
//! Cost: one pass over each capture, its texts in memory (at most `--max-messages` a stream and side); a
//! permutation as many additions as the smaller sample has messages.
//!
//! Left out on purpose: looking again and again, which needs a budget: `driftlock serve` does that.

mod report;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use driftlock_engine::baseline::{
    Snapshot, SnapshotError, StreamBaseline, StreamTrainer, TrainingOptions, TrainingUnit,
};
use driftlock_engine::calibrate::PValue;
use driftlock_engine::coder::UNITS_PER_BIT;
use driftlock_engine::drift::{Drivers, MAX_ROWS, Row, Shift, ShiftTest, Side, leading_messages, shift_test};
use driftlock_engine::significance::{
    DEFAULT_PERMUTATIONS, Dependence, PermutationOutcome, Seed, false_discoveries, permutation_test,
};
use driftlock_inspect::config::{Config, ConfigError, StatePolicy};
use driftlock_inspect::session::Plugin;
use serde_json::Value;

use crate::capture::{self, CaptureError, Exchange};
use crate::explain::unit_texts;
use crate::replay::{native, wire};
use crate::train::{ConfigurationError, plugin_configuration, shuffle};

pub use report::{DriverReport, MessageReport, Moving, StreamReport, in_unit, moving};

/// Arguments of `driftlock drift`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Capture of the baseline window, in any format that `replay` reads
    pub baseline: PathBuf,
    /// Capture of the observation window; may be the same file with another label
    pub window: PathBuf,
    /// Only exchanges of BASELINE with this label
    #[arg(long, value_name = "LABEL")]
    pub baseline_label: Option<String>,
    /// Only exchanges of WINDOW with this label
    #[arg(long, value_name = "LABEL")]
    pub window_label: Option<String>,
    /// Snapshot whose models give the code lengths; else a quarter of BASELINE trains some
    #[arg(long, value_name = "SNAPSHOT")]
    pub model: Option<PathBuf>,
    /// Plugin configuration, JSON
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// False discovery rate over the streams; one stream alone: level of its test
    #[arg(long, default_value_t = 0.01)]
    pub alpha: f64,
    /// Permutations of each test; p cannot be below 1 / (1 + this)
    #[arg(long, default_value_t = 10 * DEFAULT_PERMUTATIONS)]
    pub permutations: u32,
    /// Seed of the quarter that trains
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Most messages of a stream and side; later ones are left out
    #[arg(long, default_value_t = 10_000)]
    pub max_messages: usize,
    /// Words and messages named for each stream that moved
    #[arg(long, default_value_t = 5)]
    pub top: usize,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Why two captures could not be compared.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DriftCommandError {
    /// A capture.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The configuration's files.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The configuration's contents.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The snapshot's file.
    #[error("cannot read {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The snapshot's contents.
    #[error("{path}: {source}")]
    Snapshot {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: SnapshotError,
    },
    /// No common stream.
    #[error(
        "no stream has messages in both captures; the baseline has {baseline}, the window {window}; check the labels and the paths"
    )]
    NothingInCommon {
        /// Streams of the baseline.
        baseline: String,
        /// Streams of the window.
        window: String,
    },
    /// Printing.
    #[error("the report cannot be written: {0}")]
    Write(#[from] serde_json::Error),
}

/// One message of a stream.
#[derive(Clone, Debug)]
struct Message {
    id: String,
    units: Vec<TrainingUnit>,
}

type Streams = BTreeMap<String, Vec<Message>>;

/// A message as the engine gets it.
#[derive(Clone, Debug)]
pub(crate) struct Inspected {
    pub(crate) stream: String,
    /// It was neither cut short nor malformed nor excluded.
    pub(crate) whole: bool,
    pub(crate) units: Vec<TrainingUnit>,
}

/// The messages of an exchange that [`wire::on_the_wire`] has mapped. `plugin` has no baselines, does not learn
/// and reports to filter state.
pub(crate) fn messages(plugin: &mut Plugin, exchange: &Exchange) -> Vec<Inspected> {
    let verdicts = native::inspect(plugin, exchange);
    let texts = unit_texts(exchange, plugin.selected_headers());
    let mut messages = Vec::new();
    for (json, texts) in [verdicts.request, verdicts.response].into_iter().zip(texts) {
        let verdict: Value = json.and_then(|json| serde_json::from_str(&json).ok()).unwrap_or_default();
        let Some(stream) = verdict["stream"].as_str() else { continue };
        // A message that is whole and well-formed lacks nothing but a baseline.
        let whole = verdict["reason"] == "no_baseline";
        let units = texts
            .into_iter()
            .filter(|unit| !unit.text.is_empty())
            .map(|unit| (unit.unit.role.as_str(), unit.text))
            .collect();
        messages.push(Inspected { stream: stream.to_owned(), whole, units });
    }
    messages
}

/// The whole, well-formed messages of a capture, by stream.
fn read(
    path: &Path,
    label: Option<&str>,
    config: &Config,
    most: usize,
) -> Result<Streams, DriftCommandError> {
    let mut plugin = Plugin::new(config.clone());
    let mut streams = Streams::new();
    for recorded in capture::exchanges(path)? {
        let exchange = match recorded {
            Ok(recorded) => recorded.exchange,
            Err(error) => {
                tracing::warn!("{}: {error}", path.display());
                continue;
            }
        };
        if label.is_some_and(|label| label != exchange.label) {
            continue;
        }
        let Ok(exchange) = wire::on_the_wire(exchange) else { continue };
        for message in messages(&mut plugin, &exchange) {
            let known = streams.entry(message.stream).or_default();
            if message.whole && !message.units.is_empty() && known.len() < most {
                known.push(Message { id: exchange.id.clone(), units: message.units });
            }
        }
    }
    streams.retain(|_, messages| !messages.is_empty());
    Ok(streams)
}

/// Models of a random quarter of the messages, which are taken out of them.
fn train(stream: &str, messages: &mut Vec<Message>, options: TrainingOptions, seed: u64) -> StreamBaseline {
    let mut order: Vec<usize> = (0..messages.len()).collect();
    shuffle(&mut order, seed);
    order.truncate(messages.len().div_ceil(4));
    order.sort_unstable();
    // Half of them each, side by side; merged they are what one trainer would have counted.
    let (first, second) = order.split_at(order.len() / 2);
    let count = |part: &[usize]| {
        let mut trainer = StreamTrainer::new(options);
        part.iter().for_each(|&at| trainer.train(&messages[at].units));
        trainer
    };
    let mut trainer = std::thread::scope(|scope| {
        let second = scope.spawn(|| count(second));
        let mut trainer = count(first);
        match second.join() {
            Ok(other) => trainer.merge(&other),
            Err(panic) => std::panic::resume_unwind(panic),
        }
        trainer
    });
    if trainer.overflowed() > 0 {
        tracing::warn!(stream, overflowed = trainer.overflowed(), "n-grams found no room in training");
    }
    let mut at = 0;
    messages.retain(|_| {
        at += 1;
        order.binary_search(&(at - 1)).is_err()
    });
    std::mem::replace(&mut trainer, StreamTrainer::new(options)).freeze().tune(stream, &[])
}

/// What a model that knows nothing spends on a byte.
const UNKNOWN_COST: u32 = 8 * UNITS_PER_BIT;

fn costs(baseline: &StreamBaseline, (name, text): &TrainingUnit) -> Vec<u32> {
    match baseline.unit(name) {
        Some(unit) => unit.costs(text),
        None => vec![UNKNOWN_COST; text.len()],
    }
}

/// Accounts of all messages, and their rows.
fn rows(baseline: &StreamBaseline, messages: &[Message], side: Side, drivers: &mut Drivers) -> Vec<Row> {
    let row = |message: &Message| {
        drivers.begin(side);
        let mut row = Row::default();
        for unit in &message.units {
            let costs = costs(baseline, unit);
            drivers.unit(unit.0, &unit.1, &costs);
            row.bytes += unit.1.len() as u64;
            row.cost += costs.into_iter().map(u64::from).sum::<u64>();
        }
        row
    };
    messages.iter().map(row).collect()
}

/// Words kept apart.
const MAX_WORDS: usize = 1 << 18;

/// What came of one stream.
struct Compared {
    stream: String,
    baseline: StreamBaseline,
    samples: [Vec<Message>; 2],
    rows: [Vec<Row>; 2],
    drivers: Drivers,
    test: ShiftTest,
    /// Baseline and window against the model's calibration, if it has one.
    against: Option<[PermutationOutcome; 2]>,
}

/// Runs `driftlock drift`.
///
/// # Errors
/// [`DriftCommandError`].
pub fn run(args: &Args) -> Result<(), DriftCommandError> {
    let streams = compare(args)?;
    if args.json {
        anstream::println!("{}", serde_json::to_string_pretty(&streams)?);
    } else {
        anstream::print!("{}", report::text(&streams, args.alpha));
    }
    Ok(())
}

/// The report on each stream that both captures have.
///
/// # Errors
/// [`DriftCommandError`].
pub fn compare(args: &Args) -> Result<Vec<StreamReport>, DriftCommandError> {
    let configuration = plugin_configuration(args.config.as_deref(), None)?;
    let mut config = Config::parse(&configuration)?;
    config.settings.learning = None;
    config.settings.max_streams = usize::MAX;
    config.report.filter_state = StatePolicy::Never;
    config.snapshot = Snapshot::default();
    let snapshot = args.model.as_deref().map(open).transpose()?;
    let most = args.max_messages.min(MAX_ROWS / 2);
    // The quarter that trains comes on top.
    let most_baseline = if snapshot.is_some() { most } else { most.div_ceil(3) * 4 };
    let mut baseline = read(&args.baseline, args.baseline_label.as_deref(), &config, most_baseline)?;
    let mut window = read(&args.window, args.window_label.as_deref(), &config, most)?;

    let names = |streams: &Streams| streams.keys().cloned().collect::<Vec<_>>().join(" ");
    let (in_baseline, in_window) = (names(&baseline), names(&window));
    let mut compared = Vec::new();
    for (stream, mut reference) in std::mem::take(&mut baseline) {
        let Some(observed) = window.remove(&stream) else { continue };
        let model = match &snapshot {
            None if reference.len() < 4 => continue,
            None => train(&stream, &mut reference, config.settings.training, args.seed),
            Some(snapshot) => match snapshot.streams().iter().find(|known| known.stream() == stream) {
                Some(model) => model.clone(),
                None => {
                    tracing::warn!(stream, "the snapshot has no such stream; left out");
                    continue;
                }
            },
        };
        compared.extend(one(stream, model, reference, observed, args.permutations));
    }
    if compared.is_empty() {
        return Err(DriftCommandError::NothingInCommon { baseline: in_baseline, window: in_window });
    }
    let p: Vec<PValue> = compared.iter().map(|stream| stream.test.p).collect();
    let alpha_ppm = (args.alpha.clamp(0.0, 1.0) * 1e6).round() as u32;
    let moved = false_discoveries(&p, alpha_ppm, Dependence::Positive);
    Ok(compared.iter().zip(moved).map(|(stream, moved)| stream.report(moved, args.top)).collect())
}

fn open(path: &Path) -> Result<Snapshot, DriftCommandError> {
    let path = path.to_owned();
    let bytes =
        std::fs::read(&path).map_err(|source| DriftCommandError::File { path: path.clone(), source })?;
    Snapshot::decode(&bytes).map_err(|source| DriftCommandError::Snapshot { path, source })
}

fn one(
    stream: String,
    baseline: StreamBaseline,
    reference: Vec<Message>,
    observed: Vec<Message>,
    permutations: u32,
) -> Option<Compared> {
    let mut drivers = Drivers::new(MAX_WORDS);
    let of_reference = rows(&baseline, &reference, Side::Reference, &mut drivers);
    let of_window = rows(&baseline, &observed, Side::Window, &mut drivers);
    let seed = Seed::derive(&stream, 0, &baseline.digest().0);
    let test = shift_test(&of_reference, &of_window, permutations, u32::MAX, &seed)?;
    let calibration = baseline.calibration().statistics();
    let against = |messages: &[Message], number| {
        let statistics: Vec<i64> = messages.iter().map(|m| baseline.statistic(&m.units)).collect();
        let seed = Seed::derive(&stream, number, &baseline.digest().0);
        permutation_test(calibration, &statistics, permutations, &seed)
    };
    let against = against(&reference, 1).zip(against(&observed, 2)).map(|(a, b)| [a, b]);
    Some(Compared {
        stream,
        baseline,
        samples: [reference, observed],
        rows: [of_reference, of_window],
        drivers,
        test,
        against,
    })
}

impl Compared {
    /// The window's messages that the largest shift comes from.
    fn leading(&self, shift: &Shift, most: usize) -> Vec<usize> {
        let [reference, window] = &self.rows;
        leading_messages(reference, window, (shift.statistic, shift.aspect, shift.moved), most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use serde_json::json;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    /// Answers of two models in one capture; the new one is sorry at times, if `sorry`.
    fn capture(folder: &Path, sorry: bool) -> PathBuf {
        let mut lines = String::new();
        for i in 0..400u64 {
            let number = i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 44;
            let goods = ["boat", "lamp", "chair", "table", "kettle"][(number % 5) as usize];
            let mut text = format!(
                "The {goods} of order {number} is on its way and will arrive in {} days.",
                number % 9
            );
            let label = if i % 2 == 0 { "old" } else { "new" };
            if sorry && label == "new" && i % 3 == 0 {
                text += " Unfortunately I cannot say more.";
            }
            lines += &json!({"id": i, "label": label, "kind": "completion", "text": text, "extra": {}})
                .to_string();
            lines.push('\n');
        }
        let path = folder.join(if sorry { "sorry.jsonl" } else { "plain.jsonl" });
        std::fs::write(&path, lines).unwrap();
        path
    }

    fn answers(reports: &[StreamReport]) -> &StreamReport {
        reports.iter().find(|stream| stream.stream.contains("/response/")).unwrap()
    }

    fn compared(capture: &Path, more: &[&str]) -> Vec<StreamReport> {
        let path = capture.to_str().unwrap();
        let given = ["drift", path, path, "--baseline-label", "old", "--window-label", "new"];
        compare(&Command::parse_from(given.iter().chain(more)).args).unwrap()
    }

    #[test]
    fn what_moved_is_found_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = capture(folder.path(), true);
        let reports = compared(&path, &[]);
        // A completion's capture has a request without a body for each.
        let stream = answers(&reports);
        assert!(!reports[0].moved && reports[0].stream.contains("/request/"));
        assert!(stream.moved, "{stream:?}");
        assert_eq!((stream.baseline_messages, stream.window_messages), (150, 200));
        assert_eq!(stream.shifts[0].moved, "up");
        let words: Vec<&str> = stream.words.iter().filter_map(|word| word.name.as_deref()).collect();
        assert!(words.contains(&"unfortunately"), "{words:?}");
        let word = stream.words.iter().find(|word| word.name.as_deref() == Some("unfortunately")).unwrap();
        assert_eq!(word.baseline_share, 0.0);
        assert!(word.example.as_ref().unwrap().excerpt.contains("Unfortunately I cannot"), "{word:?}");
        assert!(!stream.messages.is_empty());
        let text = report::text(&reports, 0.01);
        assert!(text.contains("moved") && text.contains("unfortunately"), "{text}");
        assert_eq!(reports, compared(&path, &[]), "the same each time");
    }

    #[test]
    fn what_did_not_move_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let reports = compared(&capture(folder.path(), false), &["--permutations", "999"]);
        assert!(!answers(&reports).moved && answers(&reports).words.is_empty(), "{reports:?}");
        let other = folder.path().join("other.jsonl");
        std::fs::write(&other, "{\"id\":1,\"label\":\"n\",\"kind\":\"prompt\",\"text\":\"hello\"}\n")
            .unwrap();
        let path = capture(folder.path(), false);
        let args = Command::parse_from(["drift", path.to_str().unwrap(), other.to_str().unwrap()]).args;
        assert!(matches!(compare(&args), Err(DriftCommandError::NothingInCommon { .. })));
    }

    /// With a calibrated model it says which of the two left it, and `driftlock adapt` follows the one that did
    /// not.
    #[test]
    fn a_calibrated_model_tells_which_capture_is_odd() {
        let folder = tempfile::tempdir().unwrap();
        let path = capture(folder.path(), true);
        let snapshot = folder.path().join("old.driftlock");
        let config = folder.path().join("config.json");
        std::fs::write(&config, "{\"alpha\": 0.05}").unwrap();
        let parsed = Config::parse(&plugin_configuration(Some(&config), None).unwrap()).unwrap();
        let exchanges =
            capture::exchanges(&path).unwrap().filter_map(|recorded| Some(recorded.ok()?.exchange));
        let old = exchanges.filter(|exchange| exchange.label == "old").collect();
        let trained = crate::train::train(old, parsed, 1).unwrap();
        std::fs::write(&snapshot, trained.snapshot.encode()).unwrap();

        let model = ["--model", snapshot.to_str().unwrap(), "--config", config.to_str().unwrap()];
        let reports = compared(&path, &model);
        let stream = answers(&reports);
        let against = stream.against_calibration.as_ref().unwrap();
        assert_eq!((against[1].capture, against[1].direction), ("window", "stranger"));
        assert!(stream.moved && against[1].p_fraction[0] * 10 < against[1].p_fraction[1], "{against:?}");

        let out = folder.path().join("new.driftlock");
        let adapt = |files: &Path, more: &[&str]| {
            #[derive(clap::Parser)]
            struct Command {
                #[command(flatten)]
                args: crate::adapt::Args,
            }
            let given =
                ["adapt", files.to_str().unwrap(), "--baseline", model[1], "--out", out.to_str().unwrap()];
            let bounds = ["--config", model[3], "--quarantine", "20", "--pool", "200", "--every", "40"];
            let given = given.iter().chain(&bounds).chain(more);
            crate::adapt::run(&Command::parse_from(given).args).unwrap();
            Snapshot::decode(&std::fs::read(&out).unwrap()).unwrap()
        };
        for renew in ["models", "calibration"] {
            // The drift test's reference takes the first 400 messages.
            let many = folder.path().join("many.jsonl");
            std::fs::write(&many, std::fs::read_to_string(capture(folder.path(), false)).unwrap().repeat(3))
                .unwrap();
            let adapted = adapt(&many, &["--renew", renew]);
            let [was, is] = [&trained.snapshot, &adapted].map(|snapshot| {
                let mut streams = snapshot.streams().iter();
                streams.find(|stream| stream.stream().contains("/response/")).unwrap()
            });
            assert_ne!(was.digest(), is.digest());
            assert_eq!(was.units() == is.units(), renew == "calibration");
        }
    }
}
