//! `driftlock train`: a capture of normal traffic to a baseline snapshot.
//!
//! What: the exchanges labelled normal go, in a seeded random order, through the same inspection and
//! the same learning phases as in the filter; each stream is split by its own number of messages. The
//! order is random because captures are not: the messages that calibrate must be like those that train.
//!
//! Why not a trainer of its own: what was trained offline and what was learned in place must be the
//! same thing.
//!
//! Cost: two passes of inspection over exchanges held in memory. Left out on purpose: captures larger
//! than memory; take a sample.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use driftlock_engine::baseline::Snapshot;
use driftlock_engine::calibrate::messages_for_alpha;
use driftlock_engine::detector::{LearningPlan, PlanError};
use driftlock_inspect::config::{Config, ConfigError, StatePolicy};
use driftlock_inspect::session::Plugin;
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use serde_json::Value;

use crate::capture::{self, CaptureError, Exchange};
use crate::replay::{native, wire};

/// Arguments of `driftlock train`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Captures of normal traffic, in any format that `replay` reads.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// Where the snapshot goes.
    #[arg(long, short, default_value = "baseline.driftlock")]
    pub out: PathBuf,
    /// Learn only from exchanges with this label, and from those that have none.
    #[arg(long, default_value = "normal")]
    pub label: String,
    /// Plugin configuration, JSON: its alpha, name and limits count.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Seed of the order.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Also write the snapshot as base64, for the plugin configuration's `baseline`.
    #[arg(long)]
    pub base64: bool,
}

/// Why a plugin configuration could not be put together.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// A file.
    #[error("cannot read {path}: {source}; check the path and its permissions")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The configuration is not a JSON object.
    #[error("{path} is not a JSON object: {reason}")]
    Json {
        /// Which file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
}

/// The plugin configuration in `config`, as a JSON object; an empty one without a file.
///
/// # Errors
/// [`ConfigurationError`] if the file cannot be read or is no JSON object.
pub fn bare_configuration(config: Option<&Path>) -> Result<Value, ConfigurationError> {
    let Some(path) = config else { return Ok(Value::Object(serde_json::Map::new())) };
    let json_error = |reason: String| ConfigurationError::Json { path: path.to_owned(), reason };
    let bytes =
        std::fs::read(path).map_err(|source| ConfigurationError::Read { path: path.to_owned(), source })?;
    if bytes.trim_ascii().is_empty() {
        return Ok(Value::Object(serde_json::Map::new()));
    }
    let value: Value = serde_json::from_slice(&bytes).map_err(|error| json_error(error.to_string()))?;
    match value.is_object() {
        true => Ok(value),
        false => Err(json_error("it is another JSON value".to_owned())),
    }
}

/// The configuration's bytes, as a filter gets them, with the snapshot as its `baseline`.
pub fn with_baseline(configuration: &Value, snapshot: Option<&[u8]>) -> Vec<u8> {
    let mut value = configuration.clone();
    if let (Some(fields), Some(snapshot)) = (value.as_object_mut(), snapshot) {
        fields.insert("baseline".to_owned(), Value::String(STANDARD.encode(snapshot)));
    }
    value.to_string().into_bytes()
}

/// The plugin configuration in `config`, with the snapshot in `baseline` as its `baseline`.
///
/// # Errors
/// [`ConfigurationError`] if a file cannot be read or is no JSON object.
pub fn plugin_configuration(
    config: Option<&Path>,
    baseline: Option<&Path>,
) -> Result<Vec<u8>, ConfigurationError> {
    let configuration = bare_configuration(config)?;
    let read = |path: &Path| {
        std::fs::read(path).map_err(|source| ConfigurationError::Read { path: path.to_owned(), source })
    };
    let snapshot = baseline.map(read).transpose()?;
    Ok(with_baseline(&configuration, snapshot.as_deref()))
}

/// Why training failed.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The capture.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The configuration's files.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The configuration's contents.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No stream had enough messages.
    #[error("no stream has enough messages to learn from; the largest, {stream}: {error}")]
    TooFew {
        /// Stream key.
        stream: String,
        /// What is missing.
        error: PlanError,
    },
    /// Nothing with the label.
    #[error("no readable exchange is labelled {0:?}; choose another with --label")]
    Nothing(String),
    /// Writing the snapshot.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What came of training, by stream.
#[derive(Debug)]
pub struct Trained {
    /// The baselines.
    pub snapshot: Snapshot,
    /// Streams that had too few messages, with how many.
    pub left_out: Vec<(String, u32, PlanError)>,
    /// Occurrences of n-grams that found no room under `limits.max_ngrams`.
    pub overflowed: u64,
}

/// Learns from `exchanges`, in an order drawn from `seed`.
///
/// # Errors
/// [`TrainError`] if no stream has enough messages for the configuration's alpha.
pub fn train(exchanges: Vec<Exchange>, mut config: Config, seed: u64) -> Result<Trained, TrainError> {
    let alpha_ppm = config.settings.alpha_ppm;
    config.settings.learning = None;
    config.settings.max_streams = usize::MAX;
    config.report.filter_state = StatePolicy::Never;
    config.snapshot = Snapshot::default();
    let mut exchanges: Vec<Exchange> =
        exchanges.into_iter().filter_map(|e| wire::on_the_wire(e).ok()).collect();
    shuffle(&mut exchanges, seed);

    let mut counter = Plugin::new(config.clone());
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for exchange in &exchanges {
        let verdicts = native::inspect(&mut counter, exchange);
        for json in [verdicts.request, verdicts.response].into_iter().flatten() {
            // A message that is whole and well-formed lacks nothing but a baseline.
            let verdict: Value = serde_json::from_str(&json).unwrap_or_default();
            if let (Some("no_baseline"), Some(stream)) =
                (verdict["reason"].as_str(), verdict["stream"].as_str())
            {
                *counts.entry(stream.to_owned()).or_default() += 1;
            }
        }
    }
    drop(counter);

    let mut learner = Plugin::new(config);
    let mut left_out = Vec::new();
    for (stream, count) in counts {
        match LearningPlan::new(count, alpha_ppm) {
            Ok(plan) => learner.detector_mut().learn_by(&stream, plan),
            Err(error) => left_out.push((stream, count, error)),
        }
    }
    for exchange in &exchanges {
        native::inspect(&mut learner, exchange);
    }
    let snapshot = learner.detector().snapshot();
    if snapshot.streams().is_empty()
        && let Some((stream, _, error)) = left_out.iter().max_by_key(|(_, count, _)| *count)
    {
        return Err(TrainError::TooFew { stream: stream.clone(), error: *error });
    }
    Ok(Trained { snapshot, left_out, overflowed: learner.detector().overflowed() })
}

/// Fisher and Yates, by a ChaCha8 stream.
pub fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for i in (1..items.len()).rev() {
        // The bias of the remainder is below 2^-40 for any list that fits memory.
        items.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
    }
}

/// The configuration that the filter will run with, less what training replaces: the baseline, and how
/// many messages to learn from.
fn training_configuration(path: Option<&Path>) -> Result<Config, TrainError> {
    let bytes = plugin_configuration(path, None)?;
    let mut value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let Some(fields) = value.as_object_mut() else { return Ok(Config::parse(&bytes)?) };
    fields.remove("baseline");
    fields.insert("learn".to_owned(), serde_json::json!({"messages": u32::MAX}));
    Ok(Config::parse(value.to_string().as_bytes())?)
}

/// Runs `driftlock train`.
///
/// # Errors
/// [`TrainError`].
pub fn run(args: &Args) -> Result<(), TrainError> {
    let config = training_configuration(args.config.as_deref())?;
    let mut exchanges = Vec::new();
    for file in &args.files {
        for recorded in capture::exchanges(file)? {
            match recorded.map(|recorded| recorded.exchange) {
                // Formats without labels are recordings of what is normal, or nobody would train on them.
                Ok(exchange) if exchange.label == args.label || exchange.label == "unlabelled" => {
                    exchanges.push(exchange);
                }
                Ok(_) => {}
                Err(error) => tracing::warn!("{}: {error}", file.display()),
            }
        }
    }
    if exchanges.is_empty() {
        return Err(TrainError::Nothing(args.label.clone()));
    }
    let alpha_ppm = config.settings.alpha_ppm;
    let trained = train(exchanges, config, args.seed)?;
    let bytes = trained.snapshot.encode();
    let write = |path: &Path, bytes: &[u8]| {
        std::fs::write(path, bytes).map_err(|source| TrainError::Write { path: path.to_owned(), source })
    };
    write(&args.out, &bytes)?;
    if args.base64 {
        write(&args.out.with_added_extension("base64"), STANDARD.encode(&bytes).as_bytes())?;
    }
    for baseline in trained.snapshot.streams() {
        let kinds: Vec<&str> = baseline.units().iter().map(|unit| unit.name.as_str()).collect();
        anstream::println!(
            "{}: {} messages trained, {} calibrated (smallest p 1/{}), units {}, digest {}",
            baseline.stream(),
            baseline.messages(),
            baseline.calibration().statistics().len(),
            baseline.calibration().statistics().len() + 1,
            kinds.join(" "),
            &baseline.digest().to_string()[..16],
        );
    }
    for (stream, count, error) in &trained.left_out {
        anstream::eprintln!(
            "{stream}: {count} messages, {} needed for alpha {} (of which {} calibrate): left out",
            error.needed,
            f64::from(alpha_ppm) / 1e6,
            messages_for_alpha(alpha_ppm),
        );
    }
    if trained.overflowed > 0 {
        anstream::eprintln!(
            "{} occurrences of n-grams found no room and were not learned; raise limits.max_ngrams in the configuration",
            trained.overflowed,
        );
    }
    anstream::println!(
        "{}: {} streams, {} bytes, sha256 {}",
        args.out.display(),
        trained.snapshot.streams().len(),
        bytes.len(),
        trained.snapshot.digest(),
    );
    Ok(())
}
