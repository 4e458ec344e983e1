//! `driftlock replay`: a capture to deterministic verdicts, by one of three paths.
//!
//! What: every exchange of a capture goes through the inspection natively, through the filter module on
//! wasmtime, or through a real Envoy with a replaying upstream. Each gives one line of JSON: the
//! exchange's id and the verdicts of its request and response, as the filter wrote them. The digest
//! over the lines is the same for the three paths, which is what lets an auditor check one by another.
//!
//! Nothing is dropped: an exchange that cannot be sent has a line with its `failure`, a row that cannot
//! be read is counted and reported.
//!
//! Cost: native, the inspection; wasm, a module compilation more; Envoy, about a millisecond an
//! exchange. Verdicts are written as they come, but Envoy's, which come at the end.
//!
//! Left out on purpose: pacing and parallel streams; while streams learn, order matters.

pub mod envoy;
pub mod native;
pub mod upstream;
pub mod wasm;
pub mod wire;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use driftlock_inspect::config::ConfigError;
use driftlock_inspect::session::Plugin;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use crate::abi::{AbiError, Module};
use crate::capture::{self, CaptureError, Exchange};
use crate::envoy::{Envoy, EnvoyError, EnvoyOptions, find_binary};
use crate::train::{ConfigurationError, plugin_configuration};

/// What a replay found for one exchange: the verdicts' JSON, as the filter wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdicts {
    /// The request's.
    pub request: Option<String>,
    /// The response's; none for a response without a body.
    pub response: Option<String>,
    /// Why the exchange did not take place.
    pub failure: Option<String>,
}

impl Verdicts {
    fn failed(reason: &dyn std::error::Error) -> Self {
        Self { failure: Some(reason.to_string()), ..Self::default() }
    }
}

/// Which path a replay takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Via {
    /// The inspection, natively.
    Native,
    /// The filter module on wasmtime.
    Wasm,
    /// The filter module in a real Envoy.
    Envoy,
}

/// Arguments of `driftlock replay`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The capture: JSON Lines, plain or gzip.
    pub file: PathBuf,
    /// The path through which exchanges go.
    #[arg(long, value_enum, default_value = "native")]
    pub via: Via,
    /// Baselines to judge by; without them the streams learn from their first messages.
    #[arg(long)]
    pub baseline: Option<PathBuf>,
    /// Plugin configuration, JSON.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Where the verdicts go, a line of JSON each; `-` is standard output.
    #[arg(long, default_value = "-")]
    pub out: PathBuf,
    /// Print only one digest over all verdicts.
    #[arg(long)]
    pub digest: bool,
    /// The filter module, for wasm and Envoy; by default the one beside this program.
    #[arg(long)]
    pub filter: Option<PathBuf>,
    /// The Envoy binary; by default the one that `cargo xtask envoy` installed, else from the path.
    #[arg(long)]
    pub envoy: Option<PathBuf>,
}

/// Why a replay failed.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The capture.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The plugin configuration.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The plugin configuration's contents.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The filter module.
    #[error(transparent)]
    Wasm(#[from] wasm::WasmReplayError),
    /// Envoy itself.
    #[error(transparent)]
    Envoy(#[from] EnvoyError),
    /// The way through Envoy.
    #[error(transparent)]
    Through(#[from] envoy::ReplayError),
    /// A body arrived changed.
    #[error(
        "{0} of the bodies did not arrive as they were sent, the first of exchange {1}; please report this"
    )]
    BodyChanged(u64, String),
    /// The threads of the replaying client and upstream.
    #[error("cannot start the replay's threads: {0}; check the limits on threads and memory")]
    Runtime(#[source] io::Error),
    /// Writing the verdicts.
    #[error("cannot write the verdicts: {0}; check the disk and the path")]
    Write(#[source] io::Error),
}

impl From<AbiError> for ReplayError {
    fn from(error: AbiError) -> Self {
        Self::Wasm(error.into())
    }
}

/// The filter module: as given, else beside this program, else in `dist/`.
pub fn find_filter(given: Option<&Path>) -> PathBuf {
    const NAME: &str = "driftlock_filter.wasm";
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(NAME)));
    match (given, beside) {
        (Some(given), _) => given.to_owned(),
        (None, Some(beside)) if beside.exists() => beside,
        _ => Path::new("dist").join(NAME),
    }
}

/// Compiles the module in a file.
///
/// # Errors
/// [`wasm::WasmReplayError`].
pub fn compile(path: &Path) -> Result<Module, wasm::WasmReplayError> {
    let bytes = std::fs::read(path)
        .map_err(|source| wasm::WasmReplayError::Read { path: path.to_owned(), source })?;
    Ok(Module::compile(&bytes)?)
}

/// What a replay did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Exchanges with a line of verdicts.
    pub exchanges: u64,
    /// Messages by outcome: normal, warming_up, not_inspected, anomalous.
    pub outcomes: [u64; 4],
    /// Exchanges that could not take place.
    pub failures: u64,
    /// Rows that could not be read.
    pub bad_rows: u64,
    /// SHA-256 over the lines.
    pub digest: String,
}

/// Takes verdicts, writes lines, keeps the digest.
struct Lines<W> {
    out: W,
    hash: Sha256,
    summary: Summary,
}

#[derive(serde::Serialize)]
struct Line<'a> {
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<&'a str>,
}

#[derive(serde::Deserialize)]
struct OutcomeOf {
    outcome: String,
}

impl<W: Write> Lines<W> {
    fn new(out: W) -> Self {
        Self { out, hash: Sha256::new(), summary: Summary::default() }
    }

    fn write(&mut self, id: &str, verdicts: &Verdicts) -> Result<(), ReplayError> {
        let raw = |json: &Option<String>| -> Result<Option<Box<RawValue>>, serde_json::Error> {
            json.clone().map(RawValue::from_string).transpose()
        };
        let line = || -> Result<String, serde_json::Error> {
            let (request, response) = (raw(&verdicts.request)?, raw(&verdicts.response)?);
            serde_json::to_string(&Line {
                id,
                request: request.as_deref(),
                response: response.as_deref(),
                failure: verdicts.failure.as_deref(),
            })
        };
        let mut line = line().map_err(|error| ReplayError::Write(error.into()))?;
        line.push('\n');
        self.hash.update(&line);
        self.out.write_all(line.as_bytes()).map_err(ReplayError::Write)?;
        self.summary.exchanges += 1;
        self.summary.failures += u64::from(verdicts.failure.is_some());
        for json in [&verdicts.request, &verdicts.response].into_iter().flatten() {
            let outcome = serde_json::from_str(json).map_or_else(|_| String::new(), |v: OutcomeOf| v.outcome);
            let names = ["normal", "warming_up", "not_inspected", "anomalous"];
            for (count, name) in self.summary.outcomes.iter_mut().zip(names) {
                *count += u64::from(outcome == name);
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Summary, ReplayError> {
        self.out.flush().map_err(ReplayError::Write)?;
        let digest: [u8; 32] = self.hash.finalize().into();
        self.summary.digest = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(self.summary)
    }
}

/// Reads exchanges, reports rows that cannot be read and goes on.
struct Readable<'a> {
    rows: capture::Rows,
    bad_rows: &'a mut u64,
    progress: &'a ProgressBar,
}

impl Iterator for Readable<'_> {
    type Item = Exchange;

    fn next(&mut self) -> Option<Exchange> {
        loop {
            match self.rows.next()?.and_then(capture::Row::into_exchange) {
                Ok(exchange) => {
                    self.progress.inc(1);
                    return Some(exchange);
                }
                Err(error) => {
                    *self.bad_rows += 1;
                    self.progress.suspend(|| tracing::warn!("{error}"));
                }
            }
        }
    }
}

/// Replays a capture and writes a line for each exchange to `out`.
///
/// # Errors
/// [`ReplayError`] when the replay as a whole cannot go on.
pub fn replay(args: &Args, out: impl Write) -> Result<Summary, ReplayError> {
    let configuration = plugin_configuration(args.config.as_deref(), args.baseline.as_deref())?;
    // Refused here with the reason, whichever the path.
    let mut plugin = Plugin::configure(&configuration)?;
    let progress = progress_bar();
    let mut bad_rows = 0;
    let rows = Readable { rows: capture::open(&args.file)?, bad_rows: &mut bad_rows, progress: &progress };
    let mut lines = Lines::new(out);
    match args.via {
        Via::Native => {
            for exchange in rows {
                let id = exchange.id.clone();
                lines.write(&id, &native::replay(&mut plugin, exchange))?;
            }
        }
        Via::Wasm => {
            let module = compile(&find_filter(args.filter.as_deref()))?;
            let mut vm = wasm::WasmReplay::start(&module, configuration)?;
            for exchange in rows {
                let id = exchange.id.clone();
                lines.write(&id, &vm.replay(exchange)?)?;
            }
        }
        Via::Envoy => through_envoy(args, configuration, rows, &mut lines)?,
    }
    progress.finish_and_clear();
    let mut summary = lines.finish()?;
    summary.bad_rows = bad_rows;
    Ok(summary)
}

fn through_envoy(
    args: &Args,
    configuration: Vec<u8>,
    rows: Readable<'_>,
    lines: &mut Lines<impl Write>,
) -> Result<(), ReplayError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(ReplayError::Runtime)?;
    let binary = find_binary(args.envoy.as_deref())?;
    let filter = find_filter(args.filter.as_deref());
    let replayed = runtime.block_on(async {
        let upstream = upstream::Upstream::start().await.map_err(envoy::ReplayError::from)?;
        let mut options = EnvoyOptions::new(binary, filter, upstream.address());
        options.plugin_configuration = configuration;
        let envoy = Envoy::start(&options)?;
        let mut verdicts = envoy::VerdictSource::EnvoyLog(envoy.access_log().to_owned());
        let replayed = envoy::replay_through(
            envoy.listen(),
            &upstream,
            &mut verdicts,
            rows,
            &envoy::ReplayOptions::default(),
        )
        .await?;
        envoy.stop(Duration::from_secs(10))?;
        Ok::<_, ReplayError>(replayed)
    })?;
    let mut changed = (0, String::new());
    for exchange in replayed {
        if exchange.failure.is_none() && !exchange.body_matches {
            changed.0 += 1;
            if changed.0 == 1 {
                changed.1.clone_from(&exchange.id);
            }
        }
        let verdicts = Verdicts {
            request: exchange.request_verdict_json,
            response: exchange.response_verdict_json,
            failure: exchange.failure.map(|failure| match failure {
                envoy::Failure::NotSendable(reason) => reason.to_string(),
                failure => failure.to_string(),
            }),
        };
        lines.write(&exchange.id, &verdicts)?;
    }
    match changed {
        (0, _) => Ok(()),
        (count, first) => Err(ReplayError::BodyChanged(count, first)),
    }
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {pos} exchanges, {per_sec}, {elapsed}");
    let bar = ProgressBar::new_spinner();
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Runs `driftlock replay`.
///
/// # Errors
/// [`ReplayError`].
pub fn run(args: &Args) -> Result<(), ReplayError> {
    let started = Instant::now();
    let summary = if args.digest {
        replay(args, io::sink())?
    } else if args.out == Path::new("-") {
        replay(args, io::stdout().lock())?
    } else {
        let file = File::create(&args.out).map_err(ReplayError::Write)?;
        replay(args, BufWriter::new(file))?
    };
    let [normal, warming_up, not_inspected, anomalous] = summary.outcomes;
    anstream::eprintln!(
        "{} exchanges in {:.1} s: {normal} messages normal, {anomalous} anomalous, {warming_up} warming up, \
         {not_inspected} not inspected; {} exchanges failed, {} rows unreadable",
        summary.exchanges,
        started.elapsed().as_secs_f64(),
        summary.failures,
        summary.bad_rows,
    );
    if args.digest {
        anstream::println!("{}", summary.digest);
    } else {
        anstream::eprintln!("digest {}", summary.digest);
    }
    Ok(())
}
