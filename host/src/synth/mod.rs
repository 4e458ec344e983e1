//! A deterministic generator of an LLM gateway's traffic, normal and attacked.
//!
//! The project needs traffic that it may publish, that is labelled, and that is the same on every
//! machine: for the demo, for the tests that need no third-party data, and for anybody who wants to
//! try a baseline before recording one. Five applications share one gateway (customer support with
//! tools, SQL analytics with tools, code review, HR policy questions with retrieved passages, document
//! summaries); beside their chat completions they make ordinary calls with paths, queries and forms.
//! Five kinds of anomaly are injected on request, each with the byte ranges that make it one.
//!
//! The same options give the same bytes everywhere: words come from ChaCha8, there is no clock, no
//! hash map, no float. Exchange `i` depends only on the seed, the start time and `i`, so a longer run
//! extends a shorter one. About 20 us an exchange, about 8 KB each.
//!
//! Left out on purpose: other API styles (recorded captures cover those), compressed bodies, failed
//! requests, and conversations that continue from one exchange to the next.

mod anomalies;
mod apps;
mod calendar;
mod chat;
mod conversation;
mod dice;
mod grammar;
mod json;
mod rest;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use flate2::{Compression, write::GzEncoder};

use crate::capture::{Exchange, HttpRequest, HttpResponse};
use dice::Dice;
use json::{COMPACT, Json};

pub use anomalies::FAMILIES;

/// The application name of calls that are no chat completions.
pub const REST: &str = "rest";

/// Share of the normal exchanges that are ordinary HTTP calls.
const REST_PERCENT: u64 = 18;
/// Seconds between two exchanges.
const STEP_S: u64 = 7;
/// Streams of `Dice`: one range for normal exchanges, one for anomalies, one for their places.
const ANOMALY_STREAM: u64 = 1 << 40;
const PLACE_STREAM: u64 = 1 << 41;

/// What to generate. The same options give the same bytes on every platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynthOptions {
    /// Seed of all draws.
    pub seed: u64,
    /// Normal exchanges to leave out before the first: those that another run with the same seed makes.
    pub skip: usize,
    /// Number of normal exchanges.
    pub count: usize,
    /// Number of anomalies, at drawn places among the normals; the families of [`FAMILIES`] in turn.
    pub anomalies: usize,
    /// Unix time of the run's exchange 0, in seconds, skipped or not. Dates in the texts follow it.
    pub start_unix_s: u64,
}

impl Default for SynthOptions {
    /// 2,000 normal exchanges from 12 November 2026, no anomaly.
    fn default() -> Self {
        Self { seed: 1, skip: 0, count: 2_000, anomalies: 0, start_unix_s: 1_794_470_400 }
    }
}

/// Which way a message went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the upstream.
    Request,
    /// From the upstream to the client.
    Response,
}

impl Direction {
    /// `request` or `response`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Response => "response",
        }
    }
}

/// Bytes known to be anomalous.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The message that holds them.
    pub direction: Direction,
    /// The content unit: `user`, `assistant` or `target` (method, space, path and query).
    pub unit: String,
    /// Which of the units of that name in that message, counted from 0.
    pub index: usize,
    /// First byte, in the unit's decoded text.
    pub start: usize,
    /// The byte after the last.
    pub end: usize,
}

/// An exchange whose nature is known.
#[derive(Clone, Debug)]
pub struct LabelledExchange {
    /// Request and response, complete in themselves.
    pub exchange: Exchange,
    /// `normal` or one of [`FAMILIES`].
    pub label: String,
    /// Where the anomaly is; empty for a normal exchange.
    pub spans: Vec<Span>,
    /// The application that sent it, [`REST`] for calls that are no chat.
    pub application: String,
}

/// Everything that is read once and drawn from many times.
struct Traffic {
    apps: Vec<apps::App>,
    rest: grammar::Grammar,
    attacks: grammar::Grammar,
}

/// Generates the traffic, in order of time.
pub fn generate(options: &SynthOptions) -> Vec<LabelledExchange> {
    let traffic = Traffic { apps: apps::all(), rest: apps::rest_grammar(), attacks: apps::attack_grammar() };
    let mut places = Dice::new(options.seed, PLACE_STREAM);
    let mut anomaly_before: Vec<u64> =
        (0..options.anomalies).map(|_| places.below(options.count as u64 + 1)).collect();
    anomaly_before.sort_unstable();
    let mut anomaly_before = anomaly_before.into_iter().enumerate().peekable();

    let mut out = Vec::with_capacity(options.count + options.anomalies);
    for place in 0..=options.count as u64 {
        let i = options.skip as u64 + place;
        let unix_s = options.start_unix_s + i * STEP_S;
        while let Some((n, _)) = anomaly_before.next_if(|(_, before)| *before == place) {
            out.push(anomaly(&traffic, n, unix_s, &mut Dice::new(options.seed, ANOMALY_STREAM + n as u64)));
        }
        if place < options.count as u64 {
            out.push(normal(&traffic, i, unix_s, &mut Dice::new(options.seed, i)));
        }
    }
    out
}

fn normal(traffic: &Traffic, i: u64, unix_s: u64, dice: &mut Dice) -> LabelledExchange {
    let unix_s = unix_s + dice.below(STEP_S);
    let (application, request, response) = if dice.percent(REST_PERCENT) {
        let (request, response) = rest::call(&traffic.rest, unix_s, dice);
        (REST, request, response)
    } else {
        let app = apps::pick(&traffic.apps, dice);
        let conversation = conversation::draw(app, unix_s, conversation::Twist::None, dice);
        let streamed = dice.percent(app.stream_percent);
        let completion = chat::Completion {
            app,
            unix_s,
            messages: &conversation.messages,
            reply: &conversation.reply,
            cut_off: false,
            streamed,
            backend: chat::Backend::Own,
        };
        let request = chat::request(app, &conversation.messages, streamed);
        (app.name, request, chat::response(&completion, dice))
    };
    label(format!("n{i:06}"), "normal", application, request, response, vec![])
}

fn anomaly(traffic: &Traffic, n: usize, unix_s: u64, dice: &mut Dice) -> LabelledExchange {
    let family = n % FAMILIES.len();
    let drawn = anomalies::draw(traffic, family, unix_s + dice.below(STEP_S), dice);
    label(format!("a{n:06}"), FAMILIES[family], drawn.application, drawn.request, drawn.response, drawn.spans)
}

fn label(
    id: String,
    label: &str,
    application: &str,
    request: HttpRequest,
    response: HttpResponse,
    spans: Vec<Span>,
) -> LabelledExchange {
    LabelledExchange {
        exchange: Exchange { id, label: label.to_owned(), request, response: Some(response) },
        label: label.to_owned(),
        spans,
        application: application.to_owned(),
    }
}

/// Writes exchanges as JSON Lines of kind `http_exchange`: `text` is the raw request,
/// `extra.response` the raw response (RFC 9112 messages with their bodies' transfer coding removed),
/// beside `extra.application` and `extra.spans`.
///
/// # Errors
/// Those of `out`.
pub fn write_jsonl(out: &mut impl Write, exchanges: &[LabelledExchange]) -> io::Result<()> {
    for exchange in exchanges {
        writeln!(out, "{}", row(exchange).write(COMPACT))?;
    }
    Ok(())
}

fn row(labelled: &LabelledExchange) -> Json {
    let exchange = &labelled.exchange;
    let spans = labelled.spans.iter().map(|span| {
        Json::Object(vec![
            ("direction", Json::text(span.direction.name())),
            ("unit", Json::text(&span.unit)),
            ("index", Json::int(span.index as u64)),
            ("start", Json::int(span.start as u64)),
            ("end", Json::int(span.end as u64)),
        ])
    });
    let mut extra =
        vec![("application", Json::text(&labelled.application)), ("spans", Json::List(spans.collect()))];
    if let Some(response) = &exchange.response {
        let start = format!("HTTP/1.1 {} OK", response.status);
        extra.push(("response", Json::text(raw_message(&start, &response.headers, &response.body))));
    }
    let request = &exchange.request;
    let start = format!("{} {} HTTP/1.1", request.method, request.target);
    Json::Object(vec![
        ("id", Json::text(&exchange.id)),
        ("label", Json::text(&labelled.label)),
        ("kind", Json::text("http_exchange")),
        ("text", Json::text(raw_message(&start, &request.headers, &request.body))),
        ("extra", Json::Object(extra)),
    ])
}

/// A raw HTTP/1.1 message. Bodies are UTF-8 here by construction.
fn raw_message(start_line: &str, headers: &[(String, String)], body: &[u8]) -> String {
    let mut raw = format!("{start_line}\r\n");
    for (name, value) in headers {
        raw.push_str(&format!("{name}: {value}\r\n"));
    }
    raw.push_str("\r\n");
    raw.push_str(&String::from_utf8_lossy(body));
    raw
}

/// Arguments of `driftlock synth`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Normal exchanges to leave out before the first; continues an earlier run with the same seed
    #[arg(long, default_value_t = 0)]
    pub skip: usize,
    /// Normal exchanges to generate
    #[arg(long, default_value_t = 2_000)]
    pub count: usize,
    /// Anomalies to add: jailbreak, exfiltration, repetition, model_swap, sql_injection in turn
    #[arg(long, default_value_t = 0)]
    pub anomalies: usize,
    /// Seed of all draws
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Unix time of the first exchange, in seconds
    #[arg(long, value_name = "UNIX_S", default_value_t = SynthOptions::default().start_unix_s)]
    pub start: u64,
    /// File to write, gzip if it ends in .gz; `-` is the standard output
    #[arg(long, default_value = "-")]
    pub out: PathBuf,
}

/// Why the traffic could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}; choose another file with --out", path.display())]
pub struct SynthError {
    path: PathBuf,
    source: io::Error,
}

/// Runs `driftlock synth`.
///
/// # Errors
/// When the file cannot be created or written.
pub fn run(args: &Args) -> Result<(), SynthError> {
    let exchanges = generate(&SynthOptions {
        seed: args.seed,
        skip: args.skip,
        count: args.count,
        anomalies: args.anomalies,
        start_unix_s: args.start,
    });
    save(args, &exchanges).map_err(|source| SynthError { path: args.out.clone(), source })
}

fn save(args: &Args, exchanges: &[LabelledExchange]) -> io::Result<()> {
    if args.out.as_os_str() == "-" {
        let mut out = BufWriter::new(io::stdout().lock());
        write_jsonl(&mut out, exchanges)?;
        return out.flush();
    }
    let file = BufWriter::new(File::create(&args.out)?);
    if args.out.extension().is_some_and(|e| e == "gz") {
        let mut out = GzEncoder::new(file, Compression::default());
        write_jsonl(&mut out, exchanges)?;
        out.finish()?.flush()
    } else {
        let mut out = file;
        write_jsonl(&mut out, exchanges)?;
        out.flush()
    }
}

#[cfg(test)]
mod tests;
