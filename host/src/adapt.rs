//! `driftlock adapt`: a snapshot that follows recent traffic, by the rule of [`driftlock_engine::adapt`].
//!
//! What: the messages of captures, in their order, are judged by the snapshot's baselines; what each generation
//! finds normal waits in quarantine, enters, and makes the next one. The newest generations are written as a
//! snapshot, ready for the folder of `driftlock serve`. What was flagged, fell below the bound, came while a
//! drift alarm stood, or was not whole is counted and not learned.
//!
//! A stream whose drift alarm was raised keeps the generation that raised it, and the command says so: look at
//! `driftlock drift`, and train anew or run again with a capture that begins after the change.
//!
//! Cost: scoring every message once, training once a generation; memory as [`RollingOptions`] bounds it, for
//! each stream. Left out on purpose: streams that the snapshot does not have; `driftlock train` makes those.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use driftlock_engine::adapt::{AdaptError, Renew, Rolling, RollingOptions};
use driftlock_engine::baseline::{Snapshot, SnapshotError};
use driftlock_engine::drift::{DriftOptions, Extent};
use driftlock_inspect::config::{Config, ConfigError, StatePolicy};
use driftlock_inspect::session::Plugin;

use crate::capture::{self, CaptureError};
use crate::drift::messages;
use crate::replay::wire;
use crate::train::{ConfigurationError, plugin_configuration};

/// What is made anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Models, ranges and calibration.
    #[default]
    Models,
    /// The calibration alone, without retraining.
    Calibration,
}

/// Arguments of `driftlock adapt`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Captures of recent traffic, earliest first, in any format that `replay` reads
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// The snapshot to begin with
    #[arg(long)]
    pub baseline: PathBuf,
    /// Where the adapted snapshot goes
    #[arg(long, short)]
    pub out: PathBuf,
    /// Plugin configuration, JSON: its alpha, name and limits count
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// What each generation makes anew
    #[arg(long, value_enum, default_value_t)]
    pub renew: What,
    /// Messages with p at most this do not enter; by default twice alpha
    #[arg(long, value_name = "P")]
    pub admit_above: Option<f64>,
    /// Messages that wait, and that the drift test looks back over
    #[arg(long, default_value_t = 400, value_name = "MESSAGES")]
    pub quarantine: u32,
    /// Most messages that a generation is made of; a fifth of them calibrates
    #[arg(long, default_value_t = 5_000, value_name = "MESSAGES")]
    pub pool: u32,
    /// Messages from one generation to the next
    #[arg(long, default_value_t = 1_000, value_name = "MESSAGES")]
    pub every: u32,
    /// Chance of a false drift alarm in a generation
    #[arg(long, default_value_t = 0.001, value_name = "CHANCE")]
    pub drift_alpha: f64,
}

/// Why nothing was adapted.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum AdaptCommandError {
    /// A capture.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The configuration's files.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The configuration's contents.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The options.
    #[error(transparent)]
    Options(#[from] AdaptError),
    /// A file.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// "read" or "write".
        action: &'static str,
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
    /// Nothing in the captures belongs to the snapshot.
    #[error(
        "no message in the captures belongs to a stream of the snapshot; check the paths and the configuration's name"
    )]
    Nothing,
}

/// Runs `driftlock adapt`.
///
/// # Errors
/// [`AdaptCommandError`].
pub fn run(args: &Args) -> Result<(), AdaptCommandError> {
    let bytes = std::fs::read(&args.baseline).map_err(|source| AdaptCommandError::File {
        action: "read",
        path: args.baseline.clone(),
        source,
    })?;
    let snapshot = Snapshot::decode(&bytes)
        .map_err(|source| AdaptCommandError::Snapshot { path: args.baseline.clone(), source })?;
    let mut config = Config::parse(&plugin_configuration(args.config.as_deref(), None)?)?;
    config.settings.learning = None;
    config.settings.max_streams = usize::MAX;
    config.report.filter_state = StatePolicy::Never;
    config.snapshot = Snapshot::default();
    let alpha_ppm = config.settings.alpha_ppm;
    let ppm = |share: f64| (share.clamp(0.0, 1.0) * 1e6).round() as u32;
    let options = RollingOptions {
        alpha_ppm,
        admit_above_ppm: args.admit_above.map_or(alpha_ppm.saturating_mul(2), ppm),
        quarantine: Extent::Rows(args.quarantine),
        pool_messages: args.pool,
        renew_every: args.every,
        renew: match args.renew {
            What::Models => Renew::Models,
            What::Calibration => Renew::Calibration,
        },
        training: config.settings.training,
        drift: DriftOptions {
            alpha_ppm: ppm(args.drift_alpha),
            window: Extent::Rows(args.quarantine),
            ..DriftOptions::default()
        },
        ..RollingOptions::default()
    };
    let mut streams = BTreeMap::new();
    for baseline in snapshot.into_streams() {
        streams.insert(baseline.stream().to_owned(), Rolling::new(Arc::new(baseline), options)?);
    }
    if follow(args, &config, &mut streams)? == 0 {
        return Err(AdaptCommandError::Nothing);
    }
    for (name, rolling) in &streams {
        let tally = rolling.tally();
        anstream::println!(
            "{name}: generation {}, {} messages let in; kept out: {} flagged, {} below the bound, {} while drifting, {} not whole, {} without room{}",
            rolling.generation(),
            tally.released,
            tally.flagged,
            tally.below_bound,
            tally.drifting,
            tally.defective,
            tally.no_room,
            if rolling.is_drifting() { "; a drift alarm stands: see `driftlock drift`" } else { "" },
        );
    }
    let adapted = Snapshot::new(streams.into_values().map(|rolling| rolling.baseline().as_ref().clone()));
    std::fs::write(&args.out, adapted.encode()).map_err(|source| AdaptCommandError::File {
        action: "write",
        path: args.out.clone(),
        source,
    })?;
    anstream::println!(
        "{}: {} streams, sha256 {}",
        args.out.display(),
        adapted.streams().len(),
        adapted.digest()
    );
    Ok(())
}

/// Shows each stream its messages; says how many there were.
fn follow(
    args: &Args,
    config: &Config,
    streams: &mut BTreeMap<String, Rolling>,
) -> Result<u64, AdaptCommandError> {
    let mut plugin = Plugin::new(config.clone());
    let mut followed = 0;
    for file in &args.files {
        for recorded in capture::exchanges(file)? {
            let recorded = match recorded {
                Ok(recorded) => recorded,
                Err(error) => {
                    tracing::warn!("{}: {error}", file.display());
                    continue;
                }
            };
            let Ok(exchange) = wire::on_the_wire(recorded.exchange) else { continue };
            for message in messages(&mut plugin, &exchange) {
                let Some(rolling) = streams.get_mut(&message.stream) else { continue };
                followed += 1;
                let observed =
                    rolling.observe(&message.units, message.whole, recorded.unix_ns.unwrap_or_default());
                if let Some(renewed) = observed.renewed {
                    tracing::info!(stream = message.stream, generation = renewed.generation, "renewed");
                }
                if observed.drift.is_some_and(|look| look.alarm) {
                    tracing::warn!(
                        stream = message.stream,
                        id = exchange.id,
                        "drift alarm: what waited in quarantine was dropped, and nothing enters any more"
                    );
                }
            }
        }
    }
    Ok(followed)
}
