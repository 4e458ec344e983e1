//! `driftlock demo`: the whole path in half a minute, on traffic that the project makes itself.
//!
//! Normal exchanges of the generator train a baseline; other normal exchanges and one attack of each
//! kind then pass a real proxy that runs the real .wasm, in front of an upstream that answers as
//! generated. The verdicts are read where an operator reads them, in the access log, and printed as
//! a short report. Exit is an error when an attack goes unflagged, when more than 1 % of the normal
//! messages are flagged, or when an exchange fails, so that the demo is also a test.
//!
//! What it leaves in its folder is what the report's commands read: `traffic.jsonl` (the judged
//! exchanges), `baseline.driftlock`, `plugin.json` (the filter's configuration), `verdicts.jsonl`.
//!
//! The training exchanges are not judged and the judged ones are not trained on. Cost: about
//! a second of training and a millisecond an exchange. Left out on purpose: load, and learning inside
//! the filter, which would need more traffic than a demo has.

mod excerpt;
mod report;
mod verdict;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use driftlock_inspect::config::Config;
use http::Uri;

use crate::capture::Exchange;
use crate::envoy::{self, Envoy, EnvoyError, EnvoyOptions};
use crate::gateway::{AccessLogTarget, FilterSource, Gateway, GatewayError, GatewayOptions};
use crate::replay::envoy::{ReplayError, ReplayOptions, ReplayedExchange, VerdictSource, replay_through};
use crate::replay::upstream::{Upstream, UpstreamError};
use crate::synth::{self, LabelledExchange, SynthOptions};
use crate::train::{TrainError, train};
use report::{Judged, Setting, Totals};
use verdict::Verdict;

/// The filter's file name, beside the executable.
pub const FILTER_FILE: &str = "driftlock_filter.wasm";

/// Arguments of `driftlock demo`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Run the traffic through a real Envoy instead of `driftlock gateway`
    #[arg(long)]
    pub envoy: bool,
    /// Envoy binary; else DRIFTLOCK_ENVOY, target/envoy/bin/envoy, PATH
    #[arg(long, value_name = "FILE", requires = "envoy")]
    pub envoy_binary: Option<PathBuf>,
    /// The filter; else driftlock_filter.wasm beside this program
    #[arg(long, value_name = "FILE")]
    pub wasm: Option<PathBuf>,
    /// Folder for what the demo leaves behind
    #[arg(long, value_name = "FOLDER", default_value = "target/demo")]
    pub out: PathBuf,
    /// Seed of the traffic
    #[arg(long, default_value_t = 3)]
    pub seed: u64,
    /// Normal exchanges to train on
    #[arg(long, default_value_t = 6_000)]
    pub train: usize,
    /// Normal exchanges to judge
    #[arg(long, default_value_t = 800)]
    pub judge: usize,
}

/// Why the demo stopped, or did not hold what it promises.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    /// No filter to run.
    #[error("there is no filter at {}; build it with `cargo xtask build`, or name it with --wasm", path.display())]
    NoFilter {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A file of the demo's folder.
    #[error("cannot write {}: {source}; choose another folder with --out", path.display())]
    Output {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Training gave no usable baseline.
    #[error("training on the generated traffic failed: {0}")]
    Train(#[from] TrainError),
    /// The gateway did not start.
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    /// The Envoy did not start.
    #[error(transparent)]
    Envoy(#[from] EnvoyError),
    /// The answering upstream did not start.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// The replay as a whole stopped.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// A verdict is not what the report reads.
    #[error(
        "the verdict of exchange {id} is not the JSON this version writes ({source}); is the filter of the same version?"
    )]
    Verdict {
        /// Which exchange.
        id: String,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// The runtime or the terminal.
    #[error("the demo cannot run here: {0}")]
    Io(#[from] io::Error),
    /// The report is written; a bar does not hold.
    #[error(
        "a bar was missed: {flagged} of {attacks} anomalies and {normals_flagged} of {normals} normal messages flagged, {failures} exchanges failed"
    )]
    Bar {
        /// Attacks flagged.
        flagged: usize,
        /// Attacks sent.
        attacks: usize,
        /// Normal messages flagged.
        normals_flagged: usize,
        /// Normal messages sent.
        normals: usize,
        /// Exchanges without a verdict or with changed bytes.
        failures: usize,
    },
}

/// Runs `driftlock demo`; fails if it does not hold what it promises.
pub fn run(args: Args) -> ExitCode {
    match demonstrate(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            anstream::eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The demo, with its report on the standard output.
///
/// # Errors
/// [`DemoError`]; [`DemoError::Bar`] after the report when it does not hold what it promises.
pub fn demonstrate(args: &Args) -> Result<(), DemoError> {
    let began = Instant::now();
    let wasm = filter_path(args)?;
    let folder = Folder::create(&args.out)?;

    let options = SynthOptions { seed: args.seed, count: args.train, ..SynthOptions::default() };
    let training = synth::generate(&options);
    let judged_traffic = synth::generate(&SynthOptions {
        skip: args.train,
        count: args.judge,
        anomalies: synth::FAMILIES.len(),
        ..options
    });
    folder.write("traffic.jsonl", |out| synth::write_jsonl(out, &judged_traffic))?;

    let training_began = Instant::now();
    let training_exchanges = training.into_iter().map(|labelled| labelled.exchange).collect();
    let snapshot =
        train(training_exchanges, Config::parse(b"").map_err(TrainError::from)?, args.seed)?.snapshot;
    let training_time = training_began.elapsed();
    let baseline = snapshot.encode();
    folder.write("baseline.driftlock", |out| out.write_all(&baseline))?;
    let configuration = plugin_configuration(&baseline);
    folder.write("plugin.json", |out| out.write_all(configuration.as_bytes()))?;

    let judging_began = Instant::now();
    let exchanges: Vec<Exchange> = judged_traffic.iter().map(|labelled| labelled.exchange.clone()).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let replayed = runtime.block_on(async {
        if args.envoy {
            through_envoy(args, wasm, configuration.into_bytes(), exchanges).await
        } else {
            through_gateway(wasm, configuration.into_bytes(), exchanges).await
        }
    })?;
    let judging_time = judging_began.elapsed();
    folder.write("verdicts.jsonl", |out| write_verdicts(out, &replayed))?;

    let judged = judged_traffic.iter().zip(replayed).map(judge).collect::<Result<Vec<_>, _>>()?;
    let totals = Totals::of(&judged);
    let setting = Setting {
        trained: args.train,
        training_time,
        baseline_digest: &snapshot.digest().to_string(),
        baseline_bytes: baseline.len(),
        streams: snapshot.streams().len(),
        proxy: if args.envoy { "Envoy (V8)" } else { "driftlock gateway (wasmtime)" },
        judging_time,
        look_closer: &|id| folder.look_closer(id),
    };
    let mut out = anstream::stdout().lock();
    report::write(&mut out, &setting, &judged, &totals)?;
    writeln!(
        out,
        "\n  {:.1} s in all; the exchanges, the baseline and the verdicts are in {}",
        began.elapsed().as_secs_f64(),
        args.out.display()
    )?;
    out.flush()?;
    if totals.bars_hold() {
        Ok(())
    } else {
        Err(DemoError::Bar {
            flagged: totals.attacks_flagged,
            attacks: totals.attacks,
            normals_flagged: totals.normal_messages_flagged,
            normals: totals.normal_messages,
            failures: totals.failures,
        })
    }
}

fn filter_path(args: &Args) -> Result<PathBuf, DemoError> {
    let path = match &args.wasm {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name(FILTER_FILE),
    };
    if path.is_file() { Ok(path) } else { Err(DemoError::NoFilter { path }) }
}

/// The filter's configuration: the baseline inline, and no log lines, since the report shows what they
/// would say. Streams without a baseline go on learning, as they would in production.
fn plugin_configuration(baseline: &[u8]) -> String {
    format!(
        "{{\"report\": {{\"log\": \"never\", \"filter_state\": \"full\"}}, \"baseline\": \"{}\"}}\n",
        STANDARD.encode(baseline)
    )
}

async fn through_gateway(
    wasm: PathBuf,
    plugin_configuration: Vec<u8>,
    exchanges: Vec<Exchange>,
) -> Result<Vec<ReplayedExchange>, DemoError> {
    let upstream = Upstream::start().await?;
    let (records, received) = channel();
    let address: Uri = format!("http://{}", upstream.address()).parse().map_err(io::Error::other)?;
    let gateway = Gateway::start(GatewayOptions {
        listen: ([127, 0, 0, 1], 0).into(),
        plugin_configuration,
        workers: 1,
        access_log: AccessLogTarget::Channel(records),
        ..GatewayOptions::new(address, FilterSource::WasmFile(wasm))
    })
    .await?;
    let mut verdicts = VerdictSource::Gateway(received);
    let replayed =
        replay_through(gateway.addr, &upstream, &mut verdicts, exchanges, &ReplayOptions::default()).await;
    gateway.shutdown().await;
    Ok(replayed?)
}

async fn through_envoy(
    args: &Args,
    wasm: PathBuf,
    plugin_configuration: Vec<u8>,
    exchanges: Vec<Exchange>,
) -> Result<Vec<ReplayedExchange>, DemoError> {
    let upstream = Upstream::start().await?;
    let binary = envoy::find_binary(args.envoy_binary.as_deref())?;
    let options =
        EnvoyOptions { plugin_configuration, ..EnvoyOptions::new(binary, wasm, upstream.address()) };
    // Starting an Envoy waits without yielding.
    let envoy =
        tokio::task::spawn_blocking(move || Envoy::start(&options)).await.map_err(io::Error::other)??;
    let mut verdicts = VerdictSource::EnvoyLog(envoy.access_log().to_owned());
    Ok(replay_through(envoy.listen(), &upstream, &mut verdicts, exchanges, &ReplayOptions::default()).await?)
}

fn judge<'a>(
    (labelled, replayed): (&'a LabelledExchange, ReplayedExchange),
) -> Result<Judged<'a>, DemoError> {
    let read = |json: Option<String>| {
        json.map(|json| serde_json::from_str::<Verdict>(&json))
            .transpose()
            .map_err(|source| DemoError::Verdict { id: labelled.exchange.id.clone(), source })
    };
    let (request, response) = (read(replayed.request_verdict_json)?, read(replayed.response_verdict_json)?);
    let failure = match replayed.failure {
        Some(failure) => Some(failure.to_string()),
        None if !replayed.body_matches => {
            Some("the bytes that arrived are not the bytes that were sent".to_owned())
        }
        None if request.is_none() || response.is_none() => Some("the filter left no verdict".to_owned()),
        None => None,
    };
    Ok(Judged { labelled, request, response, failure })
}

/// One line a message: the exchange, the direction and the verdict as the filter wrote it.
fn write_verdicts(out: &mut dyn Write, replayed: &[ReplayedExchange]) -> io::Result<()> {
    for one in replayed {
        let verdicts = [("request", &one.request_verdict_json), ("response", &one.response_verdict_json)];
        for (direction, verdict) in verdicts {
            if let Some(verdict) = verdict {
                let id = serde_json::Value::from(one.id.as_str());
                writeln!(out, "{{\"id\":{id},\"direction\":\"{direction}\",\"verdict\":{verdict}}}")?;
            }
        }
    }
    Ok(())
}

/// The folder that the demo leaves behind.
struct Folder<'a> {
    path: &'a Path,
}

impl<'a> Folder<'a> {
    fn create(path: &'a Path) -> Result<Self, DemoError> {
        fs::create_dir_all(path).map_err(|source| DemoError::Output { path: path.to_owned(), source })?;
        Ok(Self { path })
    }

    fn write(
        &self,
        name: &str,
        content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> Result<(), DemoError> {
        let path = self.path.join(name);
        let written = File::create(&path).and_then(|file| {
            let mut out = BufWriter::new(file);
            content(&mut out)?;
            out.flush()
        });
        written.map_err(|source| DemoError::Output { path, source })
    }

    /// The command that shows an exchange byte by byte.
    fn look_closer(&self, id: &str) -> String {
        format!(
            "{} explain {} --id {id} --baseline {}",
            program(),
            self.path.join("traffic.jsonl").display(),
            self.path.join("baseline.driftlock").display()
        )
    }
}

/// This program as it can be typed here: relative where it lies below the current folder.
fn program() -> String {
    let Ok(program) = std::env::current_exe() else { return "driftlock".to_owned() };
    let here = std::env::current_dir().unwrap_or_default();
    program.strip_prefix(&here).unwrap_or(&program).display().to_string()
}
