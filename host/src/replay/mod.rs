//! `driftlock replay`: a capture to deterministic verdicts, by one of three paths.
//!
//! What: every exchange of a capture goes through the inspection natively, through the filter module on
//! wasmtime, or through a real Envoy with a replaying upstream. Each gives one line of JSON: the
//! exchange's id and the verdicts of its request and response, as the filter wrote them (`lines`). The
//! digest over the lines is the same for the three paths, for every number of threads and for every seed,
//! which is what lets an auditor check one by another.
//!
//! Nothing is dropped: an exchange that cannot be sent has a line with its `failure`, a recording that
//! cannot be read one with its `error`.
//!
//! A run into a file can be killed at any moment and goes on with `--resume`: the lines written so far
//! are its journal. Beside the finished file stands a [`Manifest`], from which `driftlock verify` makes
//! the run again.
//!
//! Cost: native, the inspection; wasm, a module compilation more; Envoy, about a millisecond an exchange.
//! Memory does not depend on the capture's length. Left out on purpose: synchronising the disk, so a
//! machine that loses power may lose the end of the journal, which `--resume` then makes again.

mod cuts;
pub mod envoy;
mod lines;
pub mod manifest;
pub mod native;
mod schedule;
pub mod upstream;
pub mod verify;
pub mod wasm;
pub mod wire;

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use clap::ValueEnum;
use driftlock_engine::ENGINE_VERSION;
use driftlock_inspect::action::Rules;
use driftlock_inspect::config::{Config, ConfigError, LogPolicy, Report, StatePolicy};
use driftlock_inspect::host::Direction;
use driftlock_inspect::session::Plugin;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::cuts::Cuts;
use self::lines::{Lines, Tally, push_error, push_failure, push_found};
use self::manifest::{Manifest, Part};
use self::schedule::{Done, Judge, Schedule};
use crate::abi::{AbiError, CompileOptions, Module};
use crate::capture::{Batch, CaptureError, Fingerprint, Item, Reader, Recorded};
use crate::envoy::{Envoy, EnvoyError, EnvoyOptions, find_binary};
use crate::train::{ConfigurationError, bare_configuration, with_baseline};

pub use self::lines::Found;

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Via {
    /// The inspection, natively.
    #[default]
    Native,
    /// The filter module on wasmtime.
    Wasm,
    /// The filter module in a real Envoy.
    Envoy,
}

/// Arguments of `driftlock replay`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The capture: a file or a folder of HAR, Envoy tap, JSON Lines or access logs; plain, gzip or zstd
    pub file: PathBuf,
    /// The path through which exchanges go
    #[arg(long, value_enum, default_value = "native")]
    pub via: Via,
    /// Baselines to judge by; without them the streams learn from their first messages
    #[arg(long)]
    pub baseline: Option<PathBuf>,
    /// Plugin configuration, JSON
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Where the verdicts go, a line of JSON each; `-` is standard output
    #[arg(long, default_value = "-")]
    pub out: PathBuf,
    /// Print one digest over all verdicts; the verdicts themselves go to --out, or nowhere
    #[arg(long)]
    pub digest: bool,
    /// The filter module, for wasm and Envoy; by default the one beside this program
    #[arg(long)]
    pub filter: Option<PathBuf>,
    /// The Envoy binary; by default the one that `cargo xtask envoy` installed, else from the path
    #[arg(long)]
    pub envoy: Option<PathBuf>,
    /// Threads, native and wasm [default: one per processor]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Pace the exchanges as they were recorded, so many times as fast [default: no pause]
    #[arg(long, value_name = "FACTOR")]
    pub speed: Option<f64>,
    /// Cut bodies at places drawn from this seed, native and wasm; 0 cuts them as a proxy would
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Go on with a run into the same --out that was interrupted
    #[arg(long)]
    pub resume: bool,
    /// Where the manifest goes [default: beside --out]
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
}

impl Args {
    /// Replays `file` natively, learning on the way, and prints the lines.
    pub fn new(file: PathBuf) -> Self {
        Self {
            file,
            via: Via::Native,
            baseline: None,
            config: None,
            out: "-".into(),
            digest: false,
            filter: None,
            envoy: None,
            threads: None,
            speed: None,
            seed: 0,
            resume: false,
            manifest: None,
        }
    }

    /// Where the verdicts go.
    fn verdicts_to(&self) -> Result<Out, ReplayError> {
        if self.out == Path::new("-") {
            return Ok(if self.digest { Out::Nowhere } else { Out::Stdout });
        }
        match std::fs::metadata(&self.out) {
            Ok(there) if there.is_dir() => Err(ReplayError::Write(io::ErrorKind::IsADirectory.into())),
            Ok(there) if !there.is_file() => Ok(Out::Device),
            // Behind a link, not in its place.
            Ok(_) => Ok(Out::File(std::fs::canonicalize(&self.out).map_err(ReplayError::Write)?)),
            Err(_) => Ok(Out::File(self.out.clone())),
        }
    }
}

/// Where verdicts go.
enum Out {
    /// Only their digest is wanted.
    Nowhere,
    Stdout,
    /// A file that is there when it is whole, and can be gone on with.
    File(PathBuf),
    /// A device or a pipe: it is written into, since a file moved to its name would take its place.
    Device,
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
    /// A speed that is none.
    #[error("--speed {0} is not a positive number")]
    Speed(f64),
    /// Lines of another run.
    #[error(
        "{path} was begun with another {what}; give the same arguments, or leave --resume out to begin anew"
    )]
    OtherRun {
        /// The unfinished file.
        path: PathBuf,
        /// What is different.
        what: &'static str,
    },
    /// The lines cannot be taken up again.
    #[error("cannot take up {path} again: {reason}; leave --resume out to begin anew")]
    Resume {
        /// The unfinished file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Resuming what goes nowhere.
    #[error("--resume needs --out FILE: the lines written so far are what a run goes on from")]
    ResumeWithoutFile,
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

fn read_filter(path: &Path) -> Result<Vec<u8>, wasm::WasmReplayError> {
    std::fs::read(path).map_err(|source| wasm::WasmReplayError::Read { path: path.to_owned(), source })
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

impl From<&Manifest> for Summary {
    fn from(manifest: &Manifest) -> Self {
        let counts = &manifest.counts;
        Self {
            exchanges: counts.exchanges,
            outcomes: [counts.normal, counts.warming_up, counts.not_inspected, counts.anomalous],
            failures: counts.failed_exchanges,
            bad_rows: counts.unreadable_rows,
            digest: manifest.verdicts.sha256.clone(),
        }
    }
}

/// Everything that decides a replay's verdicts, and how it is run.
struct Plan {
    input: PathBuf,
    via: Via,
    configuration: Value,
    /// The same with the baseline in it, as the filter gets it.
    plugin_configuration: Vec<u8>,
    baseline: Option<Part>,
    filter: Option<(Part, Vec<u8>)>,
    /// The filter is the one beside this program: it is not watched for never coming back.
    own_filter: bool,
    envoy: Option<PathBuf>,
    seed: u64,
    threads: usize,
    speed: Option<f64>,
}

impl Plan {
    fn new(args: &Args) -> Result<Self, ReplayError> {
        if let Some(speed) = args.speed.filter(|speed| !(*speed > 0.0 && speed.is_finite())) {
            return Err(ReplayError::Speed(speed));
        }
        let configuration = bare_configuration(args.config.as_deref())?;
        let baseline = args.baseline.as_deref().map(read_part).transpose()?;
        Self::of_parts(args, configuration, baseline)
    }

    fn of_parts(
        args: &Args,
        configuration: Value,
        baseline: Option<(Part, Vec<u8>)>,
    ) -> Result<Self, ReplayError> {
        let bytes = baseline.as_ref().map(|(_, bytes)| bytes.as_slice());
        let plugin_configuration = with_baseline(&configuration, bytes);
        // Refused here with the reason, whichever the path.
        Config::parse(&plugin_configuration)?;
        let filter = match args.via {
            Via::Native => None,
            Via::Wasm | Via::Envoy => {
                let path = find_filter(args.filter.as_deref());
                let bytes = read_filter(&path)?;
                Some((Part { path, fingerprint: Fingerprint::of(&bytes) }, bytes))
            }
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            input: args.file.clone(),
            via: args.via,
            configuration,
            plugin_configuration,
            baseline: baseline.map(|(part, _)| part),
            filter,
            own_filter: args.filter.is_none(),
            envoy: args.envoy.clone(),
            seed: args.seed,
            threads: args.threads.unwrap_or(processors).max(1),
            speed: args.speed,
        })
    }

    fn manifest(
        &self,
        reader: &Reader,
        tally: &Tally,
        verdicts: Fingerprint,
        path: Option<&Path>,
    ) -> Manifest {
        let mut manifest = Manifest {
            driftlock_manifest: manifest::VERSION,
            driftlock_version: env!("CARGO_PKG_VERSION").to_owned(),
            engine_version: ENGINE_VERSION.to_owned(),
            via: self.via,
            input: self.input.clone(),
            input_files: reader.files().to_vec(),
            baseline: self.baseline.clone(),
            filter: self.filter.as_ref().map(|(part, _)| part.clone()),
            configuration: self.configuration.clone(),
            seed: self.seed,
            counts: tally.into(),
            verdicts_path: path.map(Path::to_owned),
            verdicts,
            manifest_sha256: String::new(),
        };
        manifest.manifest_sha256 = manifest.digest();
        manifest
    }
}

fn read_part(path: &Path) -> Result<(Part, Vec<u8>), ConfigurationError> {
    let bytes =
        std::fs::read(path).map_err(|source| ConfigurationError::Read { path: path.to_owned(), source })?;
    Ok((Part { path: path.to_owned(), fingerprint: Fingerprint::of(&bytes) }, bytes))
}

struct NativeJudge {
    plugin: Plugin,
    seed: u64,
}

impl Judge for NativeJudge {
    fn judge(
        &mut self,
        view: &wire::View<'_>,
        _unix_ns: Option<u64>,
        row: u64,
        found: &mut Found,
    ) -> Result<(), ReplayError> {
        native::judge(&mut self.plugin, view, Cuts::whole().seeded(self.seed, row), found);
        Ok(())
    }
}

struct WasmJudge {
    vm: wasm::WasmReplay,
    seed: u64,
}

impl Judge for WasmJudge {
    fn judge(
        &mut self,
        view: &wire::View<'_>,
        unix_ns: Option<u64>,
        row: u64,
        found: &mut Found,
    ) -> Result<(), ReplayError> {
        Ok(self.vm.judge(view, unix_ns, Cuts::chunks().seeded(self.seed, row), found)?)
    }
}

/// Replays a capture and writes a line for each recording to `out`.
///
/// # Errors
/// [`ReplayError`] when the replay as a whole cannot go on.
pub fn replay(args: &Args, out: impl Write + Send) -> Result<Summary, ReplayError> {
    let plan = Plan::new(args)?;
    let manifest = execute(&plan, &mut Lines::new(out), &Done::default(), None)?;
    Ok(Summary::from(&manifest))
}

/// Judges the capture; `lines` and `done` hold what an earlier run left.
fn execute<W: Write + Send>(
    plan: &Plan,
    lines: &mut Lines<W>,
    done: &Done,
    path: Option<&Path>,
) -> Result<Manifest, ReplayError> {
    let mut reader = Reader::open(&plan.input)?;
    if plan.speed.is_some() {
        reader.one_by_one();
    }
    let progress = Progress::start(&reader);
    let reader = match plan.via {
        Via::Native => {
            let mut config = Config::parse(&plan.plugin_configuration)?;
            // No peer reads headers here, and they cost a tenth of the time.
            config.actions = Rules::observe();
            config.report = Report { log: LogPolicy::Never, filter_state: StatePolicy::Never };
            let mut free_config = config.clone();
            free_config.settings.learning = None;
            let knows = !config.snapshot.streams().is_empty();
            let judge = |config: &Config| {
                Box::new(NativeJudge { plugin: Plugin::new(config.clone()), seed: plan.seed })
                    as Box<dyn Judge>
            };
            let free = || Ok(judge(&free_config));
            let ordered = || Ok(judge(&config));
            let schedule = Schedule {
                threads: if plan.speed.is_some() { 1 } else { plan.threads },
                free: knows.then_some(&free),
                ordered: &ordered,
                done,
                pace: plan.speed,
            };
            schedule::run(&schedule, reader, lines)?
        }
        Via::Wasm => {
            let bytes = plan.filter.as_ref().map(|(_, bytes)| bytes.as_slice()).unwrap_or_default();
            let options = CompileOptions { unwatched: plan.own_filter, ..CompileOptions::default() };
            let module = Module::compile_with(bytes, &options)?;
            let knows = !Config::parse(&plan.plugin_configuration)?.snapshot.streams().is_empty();
            let judge = |configuration: Vec<u8>| {
                let vm = wasm::WasmReplay::start(&module, configuration)?;
                Ok(Box::new(WasmJudge { vm, seed: plan.seed }) as Box<dyn Judge>)
            };
            let frozen = without_learning(&plan.plugin_configuration);
            let free = || judge(frozen.clone());
            let ordered = || judge(plan.plugin_configuration.clone());
            let schedule = Schedule {
                threads: if plan.speed.is_some() { 1 } else { plan.threads },
                free: knows.then_some(&free),
                ordered: &ordered,
                done,
                pace: plan.speed,
            };
            schedule::run(&schedule, reader, lines)?
        }
        Via::Envoy => through_envoy(plan, reader, lines, done)?,
    };
    lines.flush().map_err(ReplayError::Write)?;
    progress.finish();
    let fingerprint = std::mem::take(&mut lines.fingerprinter).finish();
    Ok(plan.manifest(&reader, &lines.tally, fingerprint, path))
}

/// The configuration of a VM that never learns.
fn without_learning(configuration: &[u8]) -> Vec<u8> {
    let mut value: Value = serde_json::from_slice(configuration).unwrap_or_default();
    if let Some(fields) = value.as_object_mut() {
        fields.insert("learn".to_owned(), Value::Null);
    }
    value.to_string().into_bytes()
}

/// The same plugin configuration with whole verdicts in filter state, where a replay through a proxy finds them. One
/// that is no JSON object is given back: the filter says what is wrong with it.
pub fn telling_all(configuration: Vec<u8>) -> Vec<u8> {
    let text: &[u8] = if configuration.is_empty() { b"{}" } else { &configuration };
    let mut value: Value = serde_json::from_slice(text).unwrap_or_default();
    let Some(fields) = value.as_object_mut() else { return configuration };
    let report = fields.entry("report").or_insert_with(|| serde_json::json!({}));
    let Some(report) = report.as_object_mut() else { return configuration };
    report.insert("filter_state".to_owned(), Value::from("full"));
    value.to_string().into_bytes()
}

fn through_envoy<W: Write>(
    plan: &Plan,
    mut reader: Reader,
    lines: &mut Lines<W>,
    done: &Done,
) -> Result<Reader, ReplayError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(ReplayError::Runtime)?;
    let binary = find_binary(plan.envoy.as_deref())?;
    let filter = plan.filter.as_ref().map(|(part, _)| part.path.clone()).unwrap_or_default();
    runtime.block_on(async {
        let upstream = upstream::Upstream::start().await.map_err(envoy::ReplayError::from)?;
        let mut options = EnvoyOptions::new(binary, filter, upstream.address());
        options.plugin_configuration = telling_all(plan.plugin_configuration.clone());
        let envoy = Envoy::start(&options)?;
        let mut verdicts = envoy::VerdictSource::EnvoyLog(envoy.access_log().to_owned());
        let options = envoy::ReplayOptions::default();
        let mut passage = envoy::Passage::new(envoy.listen(), &upstream, &mut verdicts, &options);
        let mut pace = plan.speed.map(schedule::Pace::new);
        let mut batch = Batch::default();
        let (mut row, mut changed) = (0, (0, String::new()));
        while reader.fill(&mut batch)? {
            // What an earlier run judged is only sent again where the filter has to learn from it.
            let rows = row..row + batch.len() as u64;
            row = rows.end;
            let wanted = |row: &u64| *row >= done.rows || done.is_ordered(*row);
            let items: Vec<(u64, Result<Recorded, String>)> = rows
                .clone()
                .filter(wanted)
                .filter_map(|row| Some((row, owned(&batch, (row - rows.start) as usize)?)))
                .collect();
            let mut exchanges = Vec::with_capacity(items.len());
            for (_, item) in &items {
                let Ok(recorded) = item else { continue };
                if let Some(pace) = &mut pace {
                    pace.wait(recorded.unix_ns);
                }
                exchanges.push(recorded.exchange.clone());
            }
            let mut replayed = passage.replay(exchanges).await?.into_iter();
            let (mut text, mut tally) = (Vec::new(), Tally::default());
            for (row, item) in items {
                let mut made = (Vec::new(), Tally::default());
                match item {
                    Err(error) => push_error(&mut made.0, &mut made.1, &error),
                    Ok(recorded) => {
                        let Some(exchange) = replayed.next() else { continue };
                        if exchange.failure.is_none() && !exchange.body_matches {
                            changed.0 += 1;
                            if changed.0 == 1 {
                                changed.1.clone_from(&exchange.id);
                            }
                        }
                        push_replayed(&mut made, &recorded, exchange);
                    }
                }
                if row >= done.rows {
                    text.extend_from_slice(&made.0);
                    tally.add(&made.1);
                }
            }
            lines.write(&text, &tally).and_then(|()| lines.flush()).map_err(ReplayError::Write)?;
        }
        envoy.stop(Duration::from_secs(10))?;
        match changed {
            (0, _) => Ok(reader),
            (count, first) => Err(ReplayError::BodyChanged(count, first)),
        }
    })
}

fn owned(batch: &Batch, index: usize) -> Option<Result<Recorded, String>> {
    Some(match batch.item(index)? {
        Item::Record(record) => record.into_recorded().map_err(|error| batch.text_of(&error)),
        Item::Recorded(recorded) => Ok(recorded.clone()),
        Item::Bad(error) => Err(error),
    })
}

fn push_replayed(made: &mut (Vec<u8>, Tally), recorded: &Recorded, exchange: envoy::ReplayedExchange) {
    let (out, tally) = made;
    match exchange.failure {
        Some(failure) => {
            let failure = match failure {
                envoy::Failure::NotSendable(reason) => reason.to_string(),
                failure => failure.to_string(),
            };
            push_failure(out, tally, &exchange.id, recorded.unix_ns, &failure);
        }
        None => {
            let mut found = Found::default();
            if let Some(json) = &exchange.request_verdict_json {
                found.read(Direction::Request, json);
            }
            if let Some(json) = &exchange.response_verdict_json {
                found.read(Direction::Response, json);
            }
            push_found(out, tally, &exchange.id, recorded.unix_ns, &found);
        }
    }
}

/// A bar over the capture's bytes, moved by a thread of its own.
struct Progress {
    bar: ProgressBar,
    thread: Option<(std::sync::mpsc::Sender<()>, std::thread::JoinHandle<()>)>,
}

impl Progress {
    fn start(reader: &Reader) -> Self {
        let bar = ProgressBar::new(reader.total_bytes());
        let style = ProgressStyle::with_template("{wide_bar} {percent} %, {bytes}/{total_bytes}, {eta} left");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        if bar.is_hidden() {
            return Self { bar, thread: None };
        }
        let (stop, stopped) = std::sync::mpsc::channel();
        let (read, moved) = (reader.bytes_read(), bar.clone());
        let thread = std::thread::spawn(move || {
            while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) =
                stopped.recv_timeout(Duration::from_millis(200))
            {
                moved.set_position(read.load(std::sync::atomic::Ordering::Relaxed));
            }
        });
        Self { bar, thread: Some((stop, thread)) }
    }

    fn finish(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            if thread.join().is_err() {
                tracing::debug!("the progress bar's thread panicked");
            }
        }
        self.bar.finish_and_clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

/// What an unfinished run was begun with, beside its lines.
#[derive(PartialEq, Serialize, Deserialize)]
struct Begun {
    engine_version: String,
    via: Via,
    /// Path, size and time of change in ns of each file.
    input: Vec<(PathBuf, u64, u64)>,
    baseline: Option<String>,
    filter: Option<String>,
    configuration: Value,
    seed: u64,
}

impl Begun {
    fn new(plan: &Plan) -> Result<Self, ReplayError> {
        let mut input = Vec::new();
        for path in Reader::open(&plan.input)?.paths() {
            let metadata = std::fs::metadata(&path)
                .map_err(|source| CaptureError::File { path: path.clone(), source })?;
            let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            input.push((path, metadata.len(), changed.map_or(0, |time| time.as_nanos() as u64)));
        }
        let digest = |part: &Part| part.fingerprint.sha256.clone();
        Ok(Self {
            engine_version: ENGINE_VERSION.to_owned(),
            via: plan.via,
            input,
            baseline: plan.baseline.as_ref().map(digest),
            filter: plan.filter.as_ref().map(|(part, _)| digest(part)),
            configuration: plan.configuration.clone(),
            seed: plan.seed,
        })
    }

    fn difference(&self, other: &Self) -> Option<&'static str> {
        [
            (self.engine_version != other.engine_version, "engine"),
            (self.via != other.via, "path (--via)"),
            (self.input != other.input, "capture"),
            (self.baseline != other.baseline, "baseline"),
            (self.filter != other.filter, "filter"),
            (self.configuration != other.configuration, "configuration"),
            (self.seed != other.seed, "seed"),
        ]
        .into_iter()
        .find_map(|(differs, what)| differs.then_some(what))
    }
}

/// The lines that an interrupted run left, without a last one that is half written.
fn take_up(path: &Path, lines: &mut Lines<BufWriter<File>>, file: &mut File) -> Result<Done, ReplayError> {
    let resume = |error: io::Error| ReplayError::Resume { path: path.to_owned(), reason: error.to_string() };
    let mut reader = BufReader::with_capacity(1 << 18, file.try_clone().map_err(resume)?);
    let (mut done, mut whole, mut line) = (Done::default(), 0, Vec::new());
    loop {
        line.clear();
        reader.read_until(b'\n', &mut line).map_err(resume)?;
        if !line.ends_with(b"\n") {
            break;
        }
        whole += line.len() as u64;
        done.push(lines.tally.count_line(&line));
        lines.fingerprinter.update(&line);
    }
    file.set_len(whole).and_then(|()| file.seek(SeekFrom::Start(whole))).map_err(resume)?;
    Ok(done)
}

/// Replays into a file: unfinished lines stand in `OUT.partial`, with what the run was begun with beside
/// them; the manifest comes before the name `OUT` does.
fn replay_into(args: &Args, out: &Path, manifest_path: &Path) -> Result<Manifest, ReplayError> {
    let plan = Plan::new(args)?;
    let partial = out.with_added_extension("partial");
    let journal = out.with_added_extension("partial.json");
    let begun = Begun::new(&plan)?;
    let resume_error = |reason: String| ReplayError::Resume { path: partial.clone(), reason };
    let there = args.resume && journal.exists();
    if there {
        let text = std::fs::read(&journal).map_err(|error| resume_error(error.to_string()))?;
        let earlier: Begun =
            serde_json::from_slice(&text).map_err(|error| resume_error(error.to_string()))?;
        if let Some(what) = earlier.difference(&begun) {
            return Err(ReplayError::OtherRun { path: partial, what });
        }
        if !partial.exists() && out.exists() {
            // It ended between its last two steps.
            let text = std::fs::read(manifest_path).map_err(|error| resume_error(error.to_string()))?;
            let manifest = serde_json::from_slice(&text).map_err(|error| resume_error(error.to_string()))?;
            std::fs::remove_file(&journal).map_err(ReplayError::Write)?;
            return Ok(manifest);
        }
    } else if args.resume && out.exists() && manifest_path.exists() {
        let text = std::fs::read(manifest_path).map_err(|error| resume_error(error.to_string()))?;
        return serde_json::from_slice(&text).map_err(|error| resume_error(error.to_string()));
    } else {
        // Lines of an earlier run must not be taken for this one's, so they go before the journal comes.
        File::create(&partial).map_err(ReplayError::Write)?;
        write_whole(&journal, serde_json::to_string(&begun).unwrap_or_default().as_bytes())?;
    }
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&partial)
        .map_err(ReplayError::Write)?;
    let out_file = file.try_clone().map_err(ReplayError::Write)?;
    let mut lines = Lines::new(BufWriter::with_capacity(1 << 18, out_file));
    let done = take_up(&partial, &mut lines, &mut file)?;
    let manifest = execute(&plan, &mut lines, &done, Some(out))?;
    write_whole(manifest_path, manifest.to_json().as_bytes())?;
    std::fs::rename(&partial, out).map_err(ReplayError::Write)?;
    std::fs::remove_file(&journal).map_err(ReplayError::Write)?;
    Ok(manifest)
}

/// Writes a file that is there whole or not at all; what is no file is written into.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), ReplayError> {
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        return std::fs::write(path, bytes).map_err(ReplayError::Write);
    }
    let half = path.with_added_extension("new");
    std::fs::write(&half, bytes).and_then(|()| std::fs::rename(&half, path)).map_err(ReplayError::Write)
}

/// Runs `driftlock replay`.
///
/// # Errors
/// [`ReplayError`].
pub fn run(args: &Args) -> Result<(), ReplayError> {
    let started = Instant::now();
    let manifest = match args.verdicts_to()? {
        Out::File(out) => {
            let manifest_path = args.manifest.clone().unwrap_or_else(|| manifest::path_beside(&args.out));
            replay_into(args, &out, &manifest_path)?
        }
        _ if args.resume => return Err(ReplayError::ResumeWithoutFile),
        out => {
            let plan = Plan::new(args)?;
            let write: Box<dyn Write + Send> = match out {
                Out::Nowhere => Box::new(io::sink()),
                Out::Stdout => Box::new(io::stdout()),
                Out::Device | Out::File(_) => {
                    Box::new(File::options().write(true).open(&args.out).map_err(ReplayError::Write)?)
                }
            };
            let manifest = execute(&plan, &mut Lines::new(BufWriter::new(write)), &Done::default(), None)?;
            if let Some(path) = &args.manifest {
                write_whole(path, manifest.to_json().as_bytes())?;
            }
            manifest
        }
    };
    let counts = &manifest.counts;
    anstream::eprintln!(
        "{} rows in {:.1} s: {} messages normal, {} anomalous, {} warming up, {} not inspected; {} exchanges \
         failed, {} rows unreadable",
        counts.rows,
        started.elapsed().as_secs_f64(),
        counts.normal,
        counts.anomalous,
        counts.warming_up,
        counts.not_inspected,
        counts.failed_exchanges,
        counts.unreadable_rows,
    );
    if args.digest {
        anstream::println!("{}", manifest.verdicts.sha256);
    } else {
        anstream::eprintln!("digest {}", manifest.verdicts.sha256);
    }
    Ok(())
}
