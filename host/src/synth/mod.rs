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
//! Beyond that default, a file of parameters (`parameters`) adds API styles, tenants, a daily rhythm,
//! gradual and abrupt drift, more families of attack and faults. `driftlock score` says how many of the
//! attacks a replay found and whether its spans are where the attacks are (`score`).
//!
//! Left out on purpose: compressed bodies, and conversations that continue from one exchange to the next.

mod anomalies;
mod apps;
pub(crate) mod calendar;
mod chat;
mod conversation;
mod dice;
mod grammar;
mod json;
mod parameters;
mod rest;
pub mod score;
mod styles;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use flate2::{Compression, write::GzEncoder};
use serde::{Deserialize, Serialize};

use crate::capture::{Exchange, HttpRequest, HttpResponse};
use dice::Dice;
use json::{COMPACT, Json};
use parameters::Extra;

pub use anomalies::{ALL_FAMILIES, FAMILIES};
pub use parameters::{Drift, DriftKind, Faults, Styles};

/// The application name of calls that are no chat completions.
pub const REST: &str = "rest";

/// Share of the normal exchanges that are ordinary HTTP calls.
const REST_PERCENT: u64 = 18;
/// Seconds between two exchanges.
const STEP_S: u64 = 7;
/// Streams of `Dice`: one range for normal exchanges, one for anomalies, one for their places.
const ANOMALY_STREAM: u64 = 1 << 40;
const PLACE_STREAM: u64 = 1 << 41;

/// What to generate. The same options give the same bytes on every platform. In a file of parameters,
/// the fields that are not given have their defaults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SynthOptions {
    /// Seed of all draws.
    pub seed: u64,
    /// Normal exchanges to leave out before the first: those that another run with the same seed makes.
    pub skip: usize,
    /// Number of normal exchanges.
    pub count: usize,
    /// Number of anomalies, at drawn places among the normals; the families in turn.
    pub anomalies: usize,
    /// Unix time of the run's exchange 0, in seconds, skipped or not. Dates in the texts follow it.
    pub start_unix_s: u64,
    /// Families of anomaly, of [`ALL_FAMILIES`].
    pub families: Vec<String>,
    /// APIs that the chats go through.
    pub styles: Styles,
    /// Customers of the gateway, told by the header `x-tenant-id`; 0 sends none.
    pub tenants: u64,
    /// More traffic by day than by night.
    pub daily_rhythm: bool,
    /// What changes while the run goes on.
    pub drift: Vec<Drift>,
    /// What goes wrong.
    pub faults: Faults,
}

impl Default for SynthOptions {
    /// 2,000 normal exchanges from 12 November 2026, no anomaly.
    fn default() -> Self {
        Self {
            seed: 1,
            skip: 0,
            count: 2_000,
            anomalies: 0,
            start_unix_s: 1_794_470_400,
            families: FAMILIES.map(str::to_owned).to_vec(),
            styles: Styles::default(),
            tenants: 0,
            daily_rhythm: false,
            drift: Vec::new(),
            faults: Faults::default(),
        }
    }
}

impl SynthOptions {
    /// Every parameter in use, to start a file from.
    pub fn example() -> Self {
        Self {
            count: 20_000,
            anomalies: 400,
            families: ALL_FAMILIES.map(str::to_owned).to_vec(),
            styles: Styles { openai_chat: 5, openai_responses: 2, anthropic_messages: 2, gemini: 1 },
            tenants: 12,
            daily_rhythm: true,
            drift: vec![
                Drift {
                    kind: DriftKind::Model,
                    application: Some("hr-policy".to_owned()),
                    at: 12_000,
                    over: 0,
                },
                Drift { kind: DriftKind::Topic, application: None, at: 16_000, over: 4_000 },
            ],
            faults: Faults { upstream_error: 1, rate_limited: 1, truncated: 1, error_page: 1, empty: 1 },
            ..Self::default()
        }
    }

    /// Refuses what cannot be generated.
    fn check(&self, applications: &[apps::App]) -> Result<(), SynthError> {
        let refuse = |field: &'static str, value: &str, known: String| {
            Err(SynthError::Parameter { field, value: value.to_owned(), known })
        };
        for family in &self.families {
            if !ALL_FAMILIES.contains(&family.as_str()) {
                return refuse("families", family, ALL_FAMILIES.join(", "));
            }
        }
        if self.families.is_empty() && self.anomalies > 0 {
            return refuse("families", "[]", ALL_FAMILIES.join(", "));
        }
        for name in self.drift.iter().filter_map(|drift| drift.application.as_deref()) {
            if applications.iter().all(|app| app.name != name) {
                let known: Vec<&str> = applications.iter().map(|app| app.name).collect();
                return refuse("drift.application", name, known.join(", "));
            }
        }
        Ok(())
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
    /// When it began, Unix time in seconds.
    pub unix_s: u64,
    /// The customer, where there are several.
    pub tenant: Option<u64>,
}

/// Everything that is read once and drawn from many times.
struct Traffic {
    apps: Vec<apps::App>,
    rest: grammar::Grammar,
    attacks: grammar::Grammar,
}

/// Generates the traffic, in order of time.
///
/// # Panics
/// Where the options name what is not there; [`generator`] says so as an error.
pub fn generate(options: &SynthOptions) -> Vec<LabelledExchange> {
    generator(options).unwrap_or_else(|error| panic!("{error}")).collect()
}

/// Generates the traffic exchange by exchange, in order of time.
///
/// # Errors
/// [`SynthError::Parameter`] for a family or an application that is not there.
pub fn generator(options: &SynthOptions) -> Result<Generator, SynthError> {
    let traffic = Traffic { apps: apps::all(), rest: apps::rest_grammar(), attacks: apps::attack_grammar() };
    options.check(&traffic.apps)?;
    let mut places = Dice::new(options.seed, PLACE_STREAM);
    let mut anomaly_before: Vec<u64> =
        (0..options.anomalies).map(|_| places.below(options.count as u64 + 1)).collect();
    anomaly_before.sort_unstable();
    Ok(Generator { traffic, options: options.clone(), anomaly_before, anomalies: 0, place: 0 })
}

/// See [`generator`].
pub struct Generator {
    traffic: Traffic,
    options: SynthOptions,
    anomaly_before: Vec<u64>,
    anomalies: usize,
    place: u64,
}

impl Iterator for Generator {
    type Item = LabelledExchange;

    fn next(&mut self) -> Option<LabelledExchange> {
        let seed = self.options.seed;
        let i = self.options.skip as u64 + self.place;
        let unix_s = self.options.start_unix_s + self.offset_s(i);
        if self.anomaly_before.get(self.anomalies).is_some_and(|before| *before == self.place) {
            let n = self.anomalies;
            self.anomalies += 1;
            let mut dice = Dice::new(seed, ANOMALY_STREAM + n as u64);
            return Some(self.anomaly(
                n,
                unix_s,
                &mut dice,
                &mut Extra::new(seed, ANOMALY_STREAM + n as u64),
            ));
        }
        if self.place >= self.options.count as u64 {
            return None;
        }
        self.place += 1;
        Some(self.normal(i, unix_s, &mut Dice::new(seed, i), &mut Extra::new(seed, i)))
    }
}

impl Generator {
    fn offset_s(&self, i: u64) -> u64 {
        match self.options.daily_rhythm {
            true => parameters::rhythm_s(i, 86_400 / STEP_S),
            false => i * STEP_S,
        }
    }

    fn normal(&self, i: u64, unix_s: u64, dice: &mut Dice, extra: &mut Extra) -> LabelledExchange {
        let unix_s = unix_s + dice.below(STEP_S);
        let id = format!("n{i:06}");
        if dice.percent(REST_PERCENT) {
            let (request, response) = rest::call(&self.traffic.rest, unix_s, dice);
            let labelled = label(id, "normal", REST, unix_s, (request, response), vec![]);
            return self.finish(labelled, extra);
        }
        let app = apps::pick(&self.traffic.apps, dice);
        let drift = parameters::drifted(&self.options.drift, i, app.name, extra);
        let mut backend = chat::Backend::Own;
        let mut swapped = None;
        let (mut talks, mut name): (&apps::App, _) = (app, "normal");
        match drift {
            Some(DriftKind::Model) => {
                let (model, text) = anomalies::other_model(&self.traffic, unix_s, &mut extra.0);
                backend = chat::Backend::Swapped { model };
                swapped = Some(text);
                name = "drift_model";
            }
            Some(DriftKind::Topic) => {
                let others: Vec<&apps::App> =
                    self.traffic.apps.iter().filter(|other| other.name != app.name).collect();
                talks = extra.0.pick::<&apps::App>(&others);
                name = "drift_topic";
            }
            None => {}
        }
        let twist = swapped.as_deref().map_or(conversation::Twist::None, conversation::Twist::ModelSays);
        let conversation = conversation::draw(talks, unix_s, twist, dice);
        let streamed = dice.percent(app.stream_percent);
        let completion = chat::Completion {
            app,
            unix_s,
            messages: &conversation.messages,
            reply: &conversation.reply,
            cut_off: false,
            streamed,
            backend,
        };
        let style = self.options.styles.draw(extra);
        let messages = anomalies::through(style, &completion, dice);
        self.finish(label(id, name, app.name, unix_s, messages, vec![]), extra)
    }

    fn anomaly(&self, n: usize, unix_s: u64, dice: &mut Dice, extra: &mut Extra) -> LabelledExchange {
        let family = &self.options.families[n % self.options.families.len()];
        let style = self.options.styles.draw(extra);
        let unix_s = unix_s + dice.below(STEP_S);
        let drawn = anomalies::draw(&self.traffic, family, style, unix_s, dice);
        let messages = (drawn.request, drawn.response);
        let labelled = label(format!("a{n:06}"), family, drawn.application, unix_s, messages, drawn.spans);
        self.with_tenant(labelled, extra)
    }

    /// Adds the tenant and what goes wrong.
    fn finish(&self, labelled: LabelledExchange, extra: &mut Extra) -> LabelledExchange {
        let mut labelled = self.with_tenant(labelled, extra);
        let fault = self.options.faults.draw(extra);
        if let (Some(fault), Some(response)) = (fault, &mut labelled.exchange.response) {
            rest::fail(fault, response, extra);
            labelled.label = fault.label().to_owned();
            labelled.exchange.label.clone_from(&labelled.label);
        }
        labelled
    }

    fn with_tenant(&self, mut labelled: LabelledExchange, extra: &mut Extra) -> LabelledExchange {
        if self.options.tenants > 0 {
            let tenant = extra.tenant(self.options.tenants);
            let headers = &mut labelled.exchange.request.headers;
            headers.push(("x-tenant-id".to_owned(), format!("tenant-{tenant:03}")));
            labelled.tenant = Some(tenant);
        }
        labelled
    }
}

fn label(
    id: String,
    label: &str,
    application: &str,
    unix_s: u64,
    (request, response): (HttpRequest, HttpResponse),
    spans: Vec<Span>,
) -> LabelledExchange {
    LabelledExchange {
        exchange: Exchange { id, label: label.to_owned(), request, response: Some(response) },
        label: label.to_owned(),
        spans,
        application: application.to_owned(),
        unix_s,
        tenant: None,
    }
}

/// Writes exchanges as JSON Lines of kind `http_exchange`: `text` is the raw request,
/// `extra.response` the raw response (RFC 9112 messages with their bodies' transfer coding removed),
/// beside `extra.application`, `extra.unix_ns`, `extra.spans` and `extra.tenant`.
///
/// # Errors
/// Those of `out`.
pub fn write_jsonl(out: &mut impl Write, exchanges: &[LabelledExchange]) -> io::Result<()> {
    exchanges.iter().try_for_each(|exchange| write_row(out, exchange))
}

fn write_row(out: &mut impl Write, exchange: &LabelledExchange) -> io::Result<()> {
    writeln!(out, "{}", row(exchange).write(COMPACT))
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
    let mut extra = vec![
        ("application", Json::text(&labelled.application)),
        ("unix_ns", Json::int(labelled.unix_s * 1_000_000_000)),
        ("spans", Json::List(spans.collect())),
    ];
    if let Some(tenant) = labelled.tenant {
        extra.push(("tenant", Json::int(tenant)));
    }
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
pub(crate) fn raw_message(start_line: &str, headers: &[(String, String)], body: &[u8]) -> String {
    let mut raw = format!("{start_line}\r\n");
    for (name, value) in headers {
        raw.push_str(&format!("{name}: {value}\r\n"));
    }
    raw.push_str("\r\n");
    raw.push_str(&String::from_utf8_lossy(body));
    raw
}

/// Arguments of `driftlock synth`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Args {
    /// File of parameters, JSON; the options below take precedence over it
    #[arg(long, value_name = "FILE")]
    pub parameters: Option<PathBuf>,
    /// Print a file of parameters with everything in use, and end
    #[arg(long)]
    pub example: bool,
    /// Normal exchanges to leave out before the first; continues an earlier run with the same seed
    #[arg(long)]
    pub skip: Option<usize>,
    /// Normal exchanges to generate [default: 2000]
    #[arg(long)]
    pub count: Option<usize>,
    /// Anomalies to add: jailbreak, exfiltration, repetition, model_swap, sql_injection in turn [default: 0]
    #[arg(long)]
    pub anomalies: Option<usize>,
    /// Seed of all draws [default: 1]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Unix time of the first exchange, in seconds
    #[arg(long, value_name = "UNIX_S")]
    pub start: Option<u64>,
    /// File to write, gzip if it ends in .gz; standard output without it
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// Why there is no traffic.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// It could not be written.
    #[error("cannot write {}: {source}; choose another file with --out", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file of parameters.
    #[error("cannot use the parameters in {}: {reason}; `driftlock synth --example` prints a file of them", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A parameter that names what is not there.
    #[error("{field}: there is no {value:?}; known are {known}")]
    Parameter {
        /// Which field.
        field: &'static str,
        /// What it names.
        value: String,
        /// What it could.
        known: String,
    },
}

impl Args {
    /// The file's parameters, with those of the command line.
    fn options(&self) -> Result<SynthOptions, SynthError> {
        let mut options = match &self.parameters {
            None => SynthOptions::default(),
            Some(path) => {
                let refuse = |reason: String| SynthError::File { path: path.clone(), reason };
                let bytes = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
                serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?
            }
        };
        options.skip = self.skip.unwrap_or(options.skip);
        options.count = self.count.unwrap_or(options.count);
        options.anomalies = self.anomalies.unwrap_or(options.anomalies);
        options.seed = self.seed.unwrap_or(options.seed);
        options.start_unix_s = self.start.unwrap_or(options.start_unix_s);
        Ok(options)
    }
}

/// Runs `driftlock synth`.
///
/// # Errors
/// [`SynthError`].
pub fn run(args: &Args) -> Result<(), SynthError> {
    if args.example {
        let text = serde_json::to_string_pretty(&SynthOptions::example()).unwrap_or_default();
        anstream::println!("{text}");
        return Ok(());
    }
    let traffic = generator(&args.options()?)?;
    let path = args.out.clone().unwrap_or_else(|| PathBuf::from("the standard output"));
    save(args.out.as_deref(), traffic).map_err(|source| SynthError::Write { path, source })
}

fn save(path: Option<&Path>, mut traffic: Generator) -> io::Result<()> {
    let Some(path) = path.filter(|path| *path != Path::new("-")) else {
        let mut out = BufWriter::new(io::stdout().lock());
        traffic.try_for_each(|exchange| write_row(&mut out, &exchange))?;
        return out.flush();
    };
    let mut out = BufWriter::with_capacity(1 << 18, File::create(path)?);
    if path.extension().is_some_and(|e| e == "gz") {
        let mut gzip = GzEncoder::new(out, Compression::default());
        traffic.try_for_each(|exchange| write_row(&mut gzip, &exchange))?;
        gzip.finish()?.flush()
    } else {
        traffic.try_for_each(|exchange| write_row(&mut out, &exchange))?;
        out.flush()
    }
}

#[cfg(test)]
mod tests;
