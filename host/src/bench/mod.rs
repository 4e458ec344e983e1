//! `driftlock bench`: how fast everything is, each beside what it is compared with, in one run.
//!
//! What: eight ratios and a few figures, printed as a table or as JSON.
//! - `score_vs_zstd3_dict`, `score_vs_zstd3_dict_llm`: MB/s of scoring as a multiple of zstd's, over short
//!   messages and over LLM bodies (`scoring`).
//! - `permutation_vs_recompression`: how many times as fast a verdict with 1,000 permutations is over frozen
//!   scores as by compressing again.
//! - `wasm_vs_native`: MB/s of LLM exchanges through the filter module in wasmtime, as a multiple of native
//!   inspection (`inspection`).
//! - `envoy_rps_vs_noop_filter`, `envoy_rps_vs_no_filter`, `gateway_rps_vs_envoy`: requests a second
//!   (`proxies`).
//! - `envoy_first_byte_vs_noop`: how many times as long a stream's first byte takes from the upstream to the
//!   client (`latency`).
//!
//! Nothing is a constant, and nothing fast and wrong passes: each piece knows its expected answer and the
//! run fails where another comes out. What cannot be measured for want of a part is null, and `missing`
//! says how to get it.
//!
//! Why ratios: a figure in MB/s is about the machine; two measured by turns in one run are about the code.
//!
//! Cost: under a minute with `--quick`, else about four. It wants two processors: one for the proxies, one for their load.
//!
//! Left out on purpose: profiles and single functions; see `benches/`.

mod cores;
mod corpus;
pub mod gateway;
mod inspection;
mod latency;
mod load;
mod proxies;
mod record;
mod rounds;
mod scoring;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use comfy_table::{Table, presets};
use driftlock_engine::ENGINE_VERSION;
use serde::Serialize;

use self::corpus::Corpora;
use crate::capture::CaptureError;
use crate::envoy::{EnvoyError, find_binary};
use crate::eval::EvalError;
use crate::replay::{ReplayError, find_filter};
use crate::train::TrainError;

/// `driftlock bench`
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Under a minute, with wider tolerance
    #[arg(long)]
    pub quick: bool,
    /// Seconds, to see that it runs; the figures say nothing
    #[arg(long, hide = true, conflicts_with = "quick")]
    pub smoke: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Folder of the evaluation data; without it the generator's messages are measured
    #[arg(long, value_name = "FOLDER", default_value = "../shared/data")]
    pub data: PathBuf,
    /// The filter; by default the one beside this program
    #[arg(long, value_name = "FILE")]
    pub filter: Option<PathBuf>,
    /// The Envoy binary; by default the one that `cargo xtask envoy` installed, else from the path
    #[arg(long, value_name = "FILE")]
    pub envoy: Option<PathBuf>,
    /// Also write the results, with machine and date, into this folder
    #[arg(long, value_name = "FOLDER")]
    pub record: Option<PathBuf>,
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// There is no Envoy, or it does not start.
    #[error(transparent)]
    Envoy(#[from] EnvoyError),
    /// No baseline could be trained.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The evaluation data.
    #[error(transparent)]
    Data(#[from] CaptureError),
    /// The evaluation data's split.
    #[error(transparent)]
    Split(#[from] EvalError),
    /// A replay.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// The gateway's process did not start.
    #[error("the gateway did not start: {0}")]
    Gateway(String),
    /// A proxy answered something else than 200 and the upstream's body.
    #[error("{proxy} does not answer as it should: {what}")]
    Answer {
        /// Which one.
        proxy: &'static str,
        /// What went wrong.
        what: String,
    },
    /// Something measured does not give the answer that it has to give.
    #[error("a wrong answer was measured: {what}; please report this")]
    Wrong {
        /// Which, and what came out.
        what: String,
    },
    /// The system refused something.
    #[error("cannot measure: {0}")]
    Io(#[from] io::Error),
}

/// One thing as a multiple of another; see the module.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Ratios {
    /// Scoring to zstd, short messages.
    pub score_vs_zstd3_dict: Option<f64>,
    /// Scoring to zstd, LLM bodies.
    pub score_vs_zstd3_dict_llm: Option<f64>,
    /// Permuting scores to recompressing.
    pub permutation_vs_recompression: Option<f64>,
    /// The filter in wasmtime to native code.
    pub wasm_vs_native: Option<f64>,
    /// Envoy with Driftlock to Envoy with a filter that only reads the bodies.
    pub envoy_rps_vs_noop_filter: Option<f64>,
    /// Envoy with Driftlock to Envoy without a filter.
    pub envoy_rps_vs_no_filter: Option<f64>,
    /// The gateway with Driftlock to Envoy with Driftlock.
    pub gateway_rps_vs_envoy: Option<f64>,
    /// A stream's first byte from the upstream to the client, through Envoy with Driftlock to Envoy with a filter
    /// that only reads and holds nothing.
    pub envoy_first_byte_vs_noop: Option<f64>,
}

/// What was measured in absolute terms, on this machine.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Figures {
    /// Messages of about 300 bytes a second of processor time, of a replay on one thread.
    pub replay_messages_per_s_1_thread: Option<f64>,
    /// How many times as fast the same replay is on two threads, by the wall; none on one processor.
    pub replay_two_threads_vs_one: Option<f64>,
    /// Scoring, short messages.
    pub score_mb_per_s: Option<f64>,
    /// Size of the filter's module.
    pub filter_wasm_bytes: Option<u64>,
    /// Linear memory of the filter after the exchanges of `wasm_vs_native`.
    pub vm_memory_bytes: Option<u64>,
    /// Scoring, LLM bodies.
    pub score_mb_per_s_llm: Option<f64>,
    /// The share of the short messages' bytes that came before and were looked up; no round knows another's.
    pub score_known_share: Option<f64>,
    /// The same of the LLM bodies.
    pub score_known_share_llm: Option<f64>,
    /// zstd over the same short messages.
    pub zstd3_dict_mb_per_s: Option<f64>,
    /// zstd over the same LLM bodies.
    pub zstd3_dict_mb_per_s_llm: Option<f64>,
    /// A verdict with 1,000 permutations.
    pub permutation_verdict_us: Option<f64>,
    /// LLM exchanges in the filter.
    pub wasm_mb_per_s: Option<f64>,
    /// Resident set of the gateway with one filter and its baseline, before the first request.
    pub gateway_idle_bytes: Option<u64>,
    /// What Driftlock adds, in Envoy, to the time of a request with 4 KiB of JSON, beside a filter that only reads.
    pub envoy_added_us_4k: Option<f64>,
    /// That request through Envoy with Driftlock.
    pub envoy_us_4k: Option<f64>,
    /// A stream's first byte from the upstream to the client, through Envoy with Driftlock.
    pub envoy_first_byte_us: Option<f64>,
    /// From sending the request, of 2 KiB, to that byte, as a multiple of the same with the filter that only reads.
    pub envoy_request_to_first_byte_vs_noop: Option<f64>,
}

/// One proxy's figures.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ProxyFigures {
    /// Which one, with which filter.
    pub proxy: &'static str,
    /// Median of the rounds.
    pub requests_per_s: f64,
    /// Processor time of its process a request, which a crowded machine disturbs least.
    pub processor_us: f64,
}

/// A part that was not there.
#[derive(Clone, Debug, Serialize)]
pub struct Missing {
    /// The keys that are null or stand for something else.
    pub keys: &'static [&'static str],
    /// Why, and what to do.
    pub reason: String,
}

/// Everything of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Of this program.
    pub driftlock_version: &'static str,
    /// Of the engine.
    pub engine_version: &'static str,
    /// Whether the run was a short one.
    pub quick: bool,
    /// Where the messages came from: `data` or `synth`.
    pub messages: &'static str,
    /// The comparisons.
    pub ratios: Ratios,
    /// The absolute figures.
    pub figures: Figures,
    /// The proxies.
    pub proxies: Vec<ProxyFigures>,
    /// What was not there.
    pub missing: Vec<Missing>,
}

/// How long each piece takes.
struct Budget {
    scoring: Duration,
    permutation: Duration,
    wasm: Duration,
    replays: usize,
    rounds: usize,
    round: Duration,
    /// Of the latencies.
    turns: usize,
}

impl Budget {
    fn of(args: &Args) -> Self {
        let ms = Duration::from_millis;
        if args.smoke {
            let least = Duration::ZERO;
            Self {
                scoring: least,
                permutation: least,
                wasm: least,
                replays: 1,
                rounds: 1,
                round: ms(150),
                turns: 1,
            }
        } else if args.quick {
            Self {
                scoring: ms(3000),
                permutation: ms(1500),
                wasm: ms(3000),
                replays: 3,
                rounds: 5,
                round: ms(700),
                turns: 15,
            }
        } else {
            Self {
                scoring: ms(15_000),
                permutation: ms(5000),
                wasm: ms(15_000),
                replays: 9,
                rounds: 11,
                round: ms(3000),
                turns: 75,
            }
        }
    }
}

/// Three decimals say all that is known.
fn rounded(value: f64) -> Option<f64> {
    value.is_finite().then(|| (value * 1000.0).round() / 1000.0)
}

/// Measures everything.
///
/// # Errors
/// [`BenchError`] where a part that is there fails or gives a wrong answer.
pub fn measure(args: &Args) -> Result<Report, BenchError> {
    let budget = Budget::of(args);
    let step = |what: &str| {
        if !args.json {
            anstream::eprintln!("measuring {what}");
        }
    };
    let corpora = Corpora::load(&args.data)?;
    let (mut ratios, mut figures) = (Ratios::default(), Figures::default());
    let mut missing = Vec::new();
    if corpora.source != "data" {
        missing.push(Missing {
            keys: &["score_vs_zstd3_dict", "score_vs_zstd3_dict_llm", "wasm_vs_native"],
            reason: format!(
                "there is no evaluation data in {}: generated messages were measured; give its folder with --data",
                args.data.display()
            ),
        });
    }

    step("scoring beside zstd");
    let short = scoring::measure(&corpora.short, budget.scoring)?;
    ratios.score_vs_zstd3_dict = rounded(short.turns.ratio());
    figures.score_mb_per_s = rounded(short.score_mb_per_s());
    figures.score_known_share = rounded(short.known_share());
    figures.zstd3_dict_mb_per_s = rounded(short.zstd_mb_per_s());
    let llm = scoring::measure(&corpora.llm, budget.scoring)?;
    ratios.score_vs_zstd3_dict_llm = rounded(llm.turns.ratio());
    figures.score_mb_per_s_llm = rounded(llm.score_mb_per_s());
    figures.score_known_share_llm = rounded(llm.known_share());
    figures.zstd3_dict_mb_per_s_llm = rounded(llm.zstd_mb_per_s());
    drop(llm);

    step("permutation tests beside recompression");
    let (ratio, verdict_us) = scoring::permutation(&short.baseline, &corpora.short, budget.permutation)?;
    ratios.permutation_vs_recompression = rounded(ratio);
    figures.permutation_verdict_us = rounded(verdict_us);

    step("replay");
    let replayed = inspection::replayed(&corpora.short, budget.replays)?;
    figures.replay_messages_per_s_1_thread = rounded(replayed.messages_per_s);
    figures.replay_two_threads_vs_one = replayed.two_threads_vs_one.and_then(rounded);
    if replayed.two_threads_vs_one.is_none() {
        missing.push(Missing {
            keys: &["replay_two_threads_vs_one"],
            reason: "there is one processor here; run it where there are two".to_owned(),
        });
    }

    let filter = find_filter(args.filter.as_deref());
    let Ok(metadata) = std::fs::metadata(&filter) else {
        let reason = format!(
            "there is no filter {}; build it with `cargo xtask build` or give --filter",
            filter.display()
        );
        let of_wasm = &["wasm_vs_native", "filter_wasm_bytes", "vm_memory_bytes"];
        missing.push(Missing { keys: of_wasm, reason: reason.clone() });
        missing.push(Missing { keys: OF_PROXIES, reason });
        return Ok(report(args, &corpora, ratios, figures, Vec::new(), missing));
    };
    figures.filter_wasm_bytes = Some(metadata.len());
    step("the filter in wasmtime");
    let in_wasm = inspection::in_wasm(&filter, &corpora.exchanges, budget.wasm)?;
    ratios.wasm_vs_native = rounded(in_wasm.turns.ratio());
    figures.wasm_mb_per_s = rounded(in_wasm.bytes as f64 / 1e6 / in_wasm.turns.first_s());
    figures.vm_memory_bytes = Some(in_wasm.memory_bytes as u64);

    step("Envoy and the gateway");
    let proxies =
        through_proxies(args, &filter, &budget, &mut ratios, &mut figures).or_else(|error| match error {
            // What is there must be right; what is not there must not cost the other figures.
            BenchError::Wrong { .. } | BenchError::Answer { .. } => Err(error),
            error => {
                missing.push(Missing { keys: OF_PROXIES, reason: error.to_string() });
                Ok(Vec::new())
            }
        })?;
    Ok(report(args, &corpora, ratios, figures, proxies, missing))
}

/// What is measured through proxies.
const OF_PROXIES: &[&str] = &[
    "envoy_rps_vs_noop_filter",
    "envoy_rps_vs_no_filter",
    "gateway_rps_vs_envoy",
    "gateway_idle_bytes",
    "envoy_first_byte_vs_noop",
    "envoy_added_us_4k",
    "envoy_us_4k",
    "envoy_first_byte_us",
    "envoy_request_to_first_byte_vs_noop",
];

fn through_proxies(
    args: &Args,
    filter: &Path,
    budget: &Budget,
    ratios: &mut Ratios,
    figures: &mut Figures,
) -> Result<Vec<ProxyFigures>, BenchError> {
    let binary = find_binary(args.envoy.as_deref())?;
    let filter = std::path::absolute(filter)?;
    let measured = proxies::measure(binary, &filter, budget.rounds, budget.round, budget.turns)?;
    for ratio in [
        (&mut ratios.envoy_rps_vs_no_filter, measured.vs_no_filter),
        (&mut ratios.envoy_rps_vs_noop_filter, measured.vs_noop_filter),
        (&mut ratios.gateway_rps_vs_envoy, measured.gateway_vs_envoy),
        (&mut ratios.envoy_first_byte_vs_noop, measured.first_byte.ratio),
        (&mut figures.envoy_added_us_4k, measured.request.added_us),
        (&mut figures.envoy_us_4k, measured.request.driftlock_us),
        (&mut figures.envoy_first_byte_us, measured.first_byte.driftlock_us),
        (&mut figures.envoy_request_to_first_byte_vs_noop, measured.to_first_byte.ratio),
    ] {
        *ratio.0 = rounded(ratio.1);
    }
    figures.gateway_idle_bytes = Some(measured.gateway_idle_bytes);
    Ok(measured.proxies)
}

fn report(
    args: &Args,
    corpora: &Corpora,
    ratios: Ratios,
    figures: Figures,
    proxies: Vec<ProxyFigures>,
    missing: Vec<Missing>,
) -> Report {
    Report {
        driftlock_version: env!("CARGO_PKG_VERSION"),
        engine_version: ENGINE_VERSION,
        quick: args.quick,
        messages: corpora.source,
        ratios,
        figures,
        proxies,
        missing,
    }
}

/// Runs `driftlock bench`.
///
/// # Errors
/// As [`measure`].
pub fn run(args: &Args) -> Result<(), BenchError> {
    let machine = args.record.is_some().then(record::Machine::now);
    let report = measure(args)?;
    if args.json {
        anstream::println!("{}", serde_json::to_string_pretty(&report).map_err(io::Error::from)?);
    } else {
        print(&report);
    }
    if let (Some(folder), Some(machine)) = (&args.record, machine) {
        let path = record::write(folder, &machine, &report)?;
        anstream::eprintln!("recorded in {}", path.display());
    }
    Ok(())
}

fn print(report: &Report) {
    let Report { ratios, figures, .. } = report;
    let number = |value: Option<f64>, decimals: usize| match value {
        Some(value) => format!("{value:.decimals$}"),
        None => "not measured".to_owned(),
    };
    let mib = |bytes: Option<u64>| number(bytes.map(|bytes| bytes as f64 / 1_048_576.0), 2) + " MiB";
    let rows = [
        ("scoring to zstd -3 with dictionary, about 300 bytes", number(ratios.score_vs_zstd3_dict, 2)),
        ("scoring to zstd -3 with dictionary, LLM bodies", number(ratios.score_vs_zstd3_dict_llm, 2)),
        ("1,000 permutations to recompressing", number(ratios.permutation_vs_recompression, 0)),
        ("filter in wasmtime to native inspection", number(ratios.wasm_vs_native, 2)),
        ("Envoy: Driftlock to a filter that only reads", number(ratios.envoy_rps_vs_noop_filter, 2)),
        ("Envoy: Driftlock to no filter", number(ratios.envoy_rps_vs_no_filter, 2)),
        ("gateway to Envoy, both with Driftlock", number(ratios.gateway_rps_vs_envoy, 2)),
        (
            "first byte of a stream: Driftlock to a filter that only reads",
            number(ratios.envoy_first_byte_vs_noop, 2),
        ),
        ("replay, messages/s on one thread", number(figures.replay_messages_per_s_1_thread, 0)),
        ("replay, two threads to one", number(figures.replay_two_threads_vs_one, 2)),
        ("scoring, MB/s of short messages", number(figures.score_mb_per_s, 1)),
        ("scoring, MB/s of LLM bodies", number(figures.score_mb_per_s_llm, 1)),
        ("scoring, share of short messages looked up", number(figures.score_known_share, 2)),
        ("scoring, share of LLM bodies looked up", number(figures.score_known_share_llm, 2)),
        ("zstd, MB/s of short messages", number(figures.zstd3_dict_mb_per_s, 1)),
        ("zstd, MB/s of LLM bodies", number(figures.zstd3_dict_mb_per_s_llm, 1)),
        ("a verdict with 1,000 permutations, us", number(figures.permutation_verdict_us, 0)),
        ("filter in wasmtime, MB/s", number(figures.wasm_mb_per_s, 1)),
        ("filter's module", mib(figures.filter_wasm_bytes)),
        ("a VM's memory after the load", mib(figures.vm_memory_bytes)),
        ("gateway's memory, idle", mib(figures.gateway_idle_bytes)),
        ("Envoy, us that Driftlock adds to a request of 4 KiB", number(figures.envoy_added_us_4k, 0)),
        ("Envoy with Driftlock, us of that request", number(figures.envoy_us_4k, 0)),
        ("Envoy with Driftlock, us of a stream's first byte", number(figures.envoy_first_byte_us, 0)),
        (
            "from request to that byte: Driftlock to a filter that only reads",
            number(figures.envoy_request_to_first_byte_vs_noop, 2),
        ),
    ];
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in rows {
        table.add_row([name.to_owned(), value]);
    }
    for proxy in &report.proxies {
        let value = format!(
            "{:.0} requests/s, {:.1} us of processor time each",
            proxy.requests_per_s, proxy.processor_us
        );
        table.add_row([proxy.proxy.to_owned(), value]);
    }
    anstream::println!("{table}");
    for missing in &report.missing {
        anstream::println!("missing ({}): {}", missing.keys.join(", "), missing.reason);
    }
}
