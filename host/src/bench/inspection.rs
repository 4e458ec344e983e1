//! Whole inspections: a replay's messages a second, and the filter in wasmtime beside native code.
//!
//! The replay reads a capture from disk, parses, judges under a frozen baseline, writes and digests a line
//! a message; on one thread, whose processor time counts, and on two beside one, where the wall's does. The filter is the real module, driven callback by callback without sockets,
//! over the same exchanges that native code inspects; both get whole LLM exchanges and write verdicts.
//!
//! Expected answers: the replay's outcomes are those of inspecting each message by itself; the filter's
//! verdicts are the native ones to the byte.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use cpu_time::ThreadTime;
use driftlock_inspect::config::Config;
use driftlock_inspect::session::Plugin;
use serde_json::{Value, json};

use super::BenchError;
use super::rounds::{Turns, by_turns, median};
use crate::abi::{CompileOptions, Module};
use crate::capture::{Exchange, Kind, Row};
use crate::eval::protocol::{Sample, Split};
use crate::replay::wasm::WasmReplay;
use crate::replay::{self, Verdicts, native, wire};
use crate::train::{TrainError, train, with_baseline};

/// Messages of one replay.
const REPLAYED: usize = 60_000;
/// Bytes of bodies in one round of the filter, at least.
const ROUND_BYTES: usize = 1 << 20;

fn wrong(what: impl Into<String>) -> BenchError {
    BenchError::Wrong { what: what.into() }
}

fn config(bytes: &[u8]) -> Result<Config, BenchError> {
    Ok(Config::parse(bytes).map_err(TrainError::from)?)
}

fn exchange(id: usize, sample: &Sample) -> Result<Exchange, BenchError> {
    let row = Row {
        line: 1,
        id: id.to_string(),
        label: "normal".to_owned(),
        kind: Kind::HttpRequest,
        text: String::from_utf8_lossy(sample.text()).into_owned(),
        response: None,
    };
    Ok(row.into_exchange()?)
}

/// How fast a replay is.
pub(super) struct Replayed {
    /// On one thread, in a second of its processor time, the system's included.
    pub(super) messages_per_s: f64,
    /// On two threads, as a multiple of one; none where there is one processor.
    pub(super) two_threads_vs_one: Option<f64>,
}

/// Measures a native replay.
pub(super) fn replayed(split: &Split, rounds: usize) -> Result<Replayed, BenchError> {
    let folder = tempfile::tempdir()?;
    let fitting = split.train.iter().chain(&split.tune).chain(&split.calibrate).enumerate();
    let exchanges: Result<Vec<Exchange>, BenchError> =
        fitting.map(|(id, sample)| exchange(id, sample)).collect();
    let snapshot = train(exchanges?, config(b"")?, 0)?.snapshot.encode();
    let configuration = with_baseline(&json!({"learn": null}), Some(&snapshot));

    let mut plugin = Plugin::new(config(&configuration)?);
    let mut outcomes = [0u64; 4];
    let times = |at: usize| (REPLAYED - at).div_ceil(split.test.len()) as u64;
    for (at, sample) in split.test.iter().enumerate().take(REPLAYED) {
        let verdicts = native::replay(&mut plugin, exchange(at, sample)?);
        for json in [verdicts.request, verdicts.response].into_iter().flatten() {
            let verdict: Value = serde_json::from_str(&json).unwrap_or_default();
            let names = ["normal", "warming_up", "not_inspected", "anomalous"];
            let at_outcome = names.iter().position(|name| verdict["outcome"] == *name);
            let count = at_outcome.and_then(|outcome| outcomes.get_mut(outcome));
            *count.ok_or_else(|| wrong("a verdict without an outcome"))? += times(at);
        }
    }

    let (capture, baseline) = (folder.path().join("capture.jsonl"), folder.path().join("baseline"));
    std::fs::write(&baseline, snapshot)?;
    let mut out = io::BufWriter::new(std::fs::File::create(&capture)?);
    for (id, sample) in split.test.iter().cycle().take(REPLAYED).enumerate() {
        let text = String::from_utf8_lossy(sample.text());
        writeln!(out, "{}", json!({"id": id, "label": "normal", "kind": "http_request", "text": text}))?;
    }
    out.flush()?;
    drop(out);
    let args = replay::Args { baseline: Some(baseline), ..replay::Args::new(capture) };
    let mut digest = None;
    let mut run = |threads: usize| -> Result<(f64, f64), BenchError> {
        let (begin, processor) = (Instant::now(), ThreadTime::try_now()?);
        let summary = replay::replay(&replay::Args { threads: Some(threads), ..args.clone() }, io::sink())?;
        let seconds = (begin.elapsed().as_secs_f64(), processor.try_elapsed()?.as_secs_f64());
        if summary.outcomes != outcomes || summary.failures + summary.bad_rows > 0 {
            return Err(wrong(format!("the replay found {summary:?} where {outcomes:?} was expected")));
        }
        if *digest.get_or_insert_with(|| summary.digest.clone()) != summary.digest {
            return Err(wrong("a replay's digest does not repeat"));
        }
        Ok(seconds)
    };
    // It warms the disk's cache.
    run(1)?;
    let two = std::thread::available_parallelism()?.get() > 1;
    let (mut rates, mut ratios) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (wall_s, processor_s) = run(1)?;
        rates.push(outcomes.iter().sum::<u64>() as f64 / processor_s);
        if two {
            ratios.push(wall_s / run(2)?.0);
        }
    }
    Ok(Replayed { messages_per_s: median(rates), two_threads_vs_one: two.then(|| median(ratios)) })
}

/// The filter in wasmtime beside native inspection.
pub(super) struct InWasm {
    pub(super) turns: Turns,
    /// Of one round.
    pub(super) bytes: usize,
    /// The VM's linear memory after it.
    pub(super) memory_bytes: usize,
}

/// Inspects LLM exchanges natively and in the filter, by turns.
pub(super) fn in_wasm(filter: &Path, exchanges: &[Exchange], budget: Duration) -> Result<InWasm, BenchError> {
    // The recorded exchanges are of many streams, so few of each calibrate.
    let snapshot = train(exchanges.to_vec(), config(br#"{"alpha": 0.02}"#)?, 0)?.snapshot.encode();
    let quiet = json!({"alpha": 0.02, "learn": null, "report": {"log": "never"}});
    let configuration = with_baseline(&quiet, Some(&snapshot));
    let mut plugin = Plugin::new(config(&configuration)?);
    // As a replay compiles it, and as V8 does: without checks for guests that never return.
    let options = CompileOptions { unwatched: true, ..CompileOptions::default() };
    let module =
        Module::compile_with(&std::fs::read(filter)?, &options).map_err(replay::ReplayError::from)?;
    let mut vm = WasmReplay::start(&module, configuration).map_err(replay::ReplayError::from)?;

    // Those that are judged, since scoring is what is compared; a round has the next of them, as what came a moment ago
    // is looked up, and the two differ in what that costs.
    let mut rounds: Vec<Vec<(Exchange, Verdicts)>> = Vec::new();
    let (mut bytes, mut of_last) = (0, ROUND_BYTES);
    for exchange in exchanges {
        let Ok(exchange) = wire::on_the_wire(exchange.clone()) else { continue };
        let verdicts = native::inspect(&mut plugin, &exchange);
        let both = [verdicts.request.as_deref(), verdicts.response.as_deref()];
        if both.iter().all(|json| json.is_some_and(|json| json.contains("\"baseline\":"))) {
            if of_last >= ROUND_BYTES {
                rounds.push(Vec::new());
                of_last = 0;
            }
            let body = exchange.response.as_ref().map_or(0, |response| response.body.len());
            of_last += exchange.request.body.len() + body;
            bytes += exchange.request.body.len() + body;
            if let Some(round) = rounds.last_mut() {
                round.push((exchange, verdicts));
            }
        }
    }
    if rounds.is_empty() {
        return Err(wrong("no exchange is judged under the baseline"));
    }
    let bytes = bytes / rounds.len();
    let (mut round_in_vm, mut round_natively) = (rounds.iter().cycle(), rounds.iter().cycle());
    let in_vm = || {
        for (exchange, expected) in round_in_vm.next().into_iter().flatten() {
            if vm.inspect(exchange).map_err(replay::ReplayError::from)? != *expected {
                return Err(wrong(format!(
                    "the filter's verdict of exchange {} is not the native one",
                    exchange.id
                )));
            }
        }
        Ok(())
    };
    let natively = || {
        for (exchange, expected) in round_natively.next().into_iter().flatten() {
            if native::inspect(&mut plugin, exchange) != *expected {
                return Err(wrong(format!("the verdict of exchange {} does not repeat", exchange.id)));
            }
        }
        Ok(())
    };
    let turns = by_turns(budget, in_vm, natively)?;
    Ok(InWasm { turns, bytes, memory_bytes: vm.memory_bytes() })
}
