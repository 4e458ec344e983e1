//! `driftlock explain`: one exchange, byte by byte, with the numbers behind its verdict.
//!
//! What: the exchange is judged again under a baseline, and every content unit's text is shown with its
//! surprising bytes highlighted, the spans that decided listed with their cost, and the p-value with the
//! calibration it comes from: in the terminal (`terminal`), or as one HTML page that needs nothing else
//! (`page`). With a capture of normal traffic, the page has the normal text that is nearest (`nearest`).
//! Why: a verdict that cannot be looked into is not one to act on.
//!
//! Cost: one exchange; with `--reference` one pass over that capture.

mod nearest;
mod page;
mod terminal;

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;

use driftlock_engine::baseline::StreamBaseline;
use driftlock_inspect::config::{Config, ConfigError};
use driftlock_inspect::content::{ApiStyle, BodyParser, Role, Sink, Unit};
use driftlock_inspect::decode::{self, Budget, Decoder};
use driftlock_inspect::session::Plugin;
use serde_json::Value;

use crate::capture::{self, CaptureError, Exchange, Headers};
use crate::replay::{native, wire};
use crate::train::{ConfigurationError, plugin_configuration};

pub use terminal::{Shown, excerpt, render};

/// Arguments of `driftlock explain`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The capture that holds the exchange, in any format that `replay` reads
    pub file: PathBuf,
    /// The exchange's id in the capture; by default the first that is anomalous
    #[arg(long, conflicts_with = "line")]
    pub id: Option<String>,
    /// The exchange of this line of verdicts, from 1; with --verdicts, the recorded one is compared
    #[arg(long)]
    pub line: Option<u64>,
    /// The verdicts that `replay` wrote
    #[arg(long, requires = "line")]
    pub verdicts: Option<PathBuf>,
    /// The baseline to judge by
    #[arg(long)]
    pub baseline: PathBuf,
    /// Plugin configuration, JSON
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Show messages that are not anomalous and units that did not decide, too
    #[arg(long)]
    pub all: bool,
    /// Most bytes of a unit that are shown, around its spans
    #[arg(long, default_value_t = 2000)]
    pub max_bytes: usize,
    /// Write a page here instead of showing it in the terminal
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// A capture of normal traffic, to show the nearest normal text on the page
    #[arg(long, value_name = "FILE", requires = "html")]
    pub reference: Option<PathBuf>,
}

/// Why nothing could be explained.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// The capture.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The configuration's files.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The configuration's contents.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No such exchange.
    #[error("no exchange in {path} has the id {id:?}")]
    NoSuchId {
        /// Which file.
        path: PathBuf,
        /// The id asked for.
        id: String,
    },
    /// No such line.
    #[error("{path} has fewer than {line} recordings")]
    NoSuchLine {
        /// Which file.
        path: PathBuf,
        /// The line asked for.
        line: u64,
    },
    /// Nothing anomalous.
    #[error("no exchange in {0} is anomalous under this baseline; name one with --id")]
    NothingAnomalous(PathBuf),
    /// It cannot be sent, so no proxy would see it.
    #[error("the exchange cannot be inspected")]
    NotSendable(#[from] wire::NotSendable),
    /// A file beside the capture.
    #[error("cannot use {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// One content unit's whole text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitText {
    /// Kind and ordinal.
    pub unit: Unit,
    /// The decoded text.
    pub text: Vec<u8>,
}

#[derive(Default)]
struct Texts(Vec<UnitText>);

impl Sink for Texts {
    fn text(&mut self, unit: Unit, text: &[u8], _body_offset: u64) {
        match self.0.iter_mut().find(|known| known.unit == unit) {
            Some(known) => known.text.extend_from_slice(text),
            None => self.0.push(UnitText { unit, text: text.to_vec() }),
        }
    }

    fn end(&mut self, _unit: Unit) {}

    fn skipped(&mut self, _unit: Unit, _bytes: u64) {}
}

/// Memory for undoing a body's coding, and how far a body may grow.
const DECODER_BYTES: usize = 64 << 20;
const MAX_RATIO: u32 = 1_000;

/// The body without its content coding; as far as it goes where it breaks off.
fn decoded(headers: &Headers, body: &[u8]) -> Vec<u8> {
    let codings = capture::header(headers, "content-encoding").map(|value| decode::codings(value.as_bytes()));
    let Some(Ok(codings)) = codings else { return body.to_vec() };
    let limits = decode::Limits { max_ratio: MAX_RATIO, budget: Budget::new(DECODER_BYTES) };
    let Ok(mut decoder) = Decoder::new(&codings, &limits) else { return body.to_vec() };
    let mut text = Vec::new();
    let mut take = |piece: &[u8]| {
        text.extend_from_slice(piece);
        ControlFlow::Continue(())
    };
    // The verdict names what is wrong with a body; here it is shown as far as it could be read.
    let _ = decoder.push(body, &mut take).and_then(|()| decoder.finish(&mut take));
    text
}

/// The texts of the request's and the response's units, as the filter reads them; of the request's headers
/// those that `selected` names (`request_headers` of the plugin configuration).
pub fn unit_texts(exchange: &Exchange, selected: &[String]) -> [Vec<UnitText>; 2] {
    let request = &exchange.request;
    let mut texts = Texts::default();
    let target = Unit { role: Role::Target, index: 0 };
    texts.text(target, format!("{} {}", request.method, request.target).as_bytes(), 0);
    for (name, index) in selected.iter().zip(0..) {
        if let Some(value) = capture::header(&request.headers, name) {
            let header = Unit { role: Role::Header, index };
            texts.text(header, format!("{name}: {value}").as_bytes(), 0);
        }
    }
    // Returns the API that the body turned out to be of.
    let read = |parser: Result<BodyParser, _>, headers: &Headers, body: &[u8], texts: &mut Texts| {
        let mut parser = parser.ok()?;
        parser.push(&decoded(headers, body), texts);
        // A body that breaks off is shown as far as it goes; the verdict names the reason.
        let _ = parser.finish(texts);
        Some(parser.style()).filter(|style| style.has_schema())
    };
    let content_type =
        |headers: &Headers| capture::header(headers, "content-type").map(|v| v.as_bytes().to_vec());
    let path = request.target.as_bytes();
    let parser = BodyParser::for_request(path, content_type(&request.headers).as_deref());
    let told = read(parser, &request.headers, &request.body, &mut texts);
    let mut answers = Texts::default();
    if let Some(response) = &exchange.response {
        let style = ApiStyle::of_path(path).or(told);
        let parser = BodyParser::for_response(style, content_type(&response.headers).as_deref());
        read(parser, &response.headers, &response.body, &mut answers);
    }
    [texts.0, answers.0]
}

/// A span of a verdict, in its unit's text.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Span {
    start: usize,
    end: usize,
    bits: f64,
    expected_bits: f64,
}

fn spans_of(verdict: &Value) -> Vec<Span> {
    let number = |span: &Value, key: &str| span[key].as_f64().unwrap_or_default();
    let spans = verdict["spans"].as_array().into_iter().flatten();
    let span = |span: &Value| Span {
        start: number(span, "start") as usize,
        end: number(span, "end") as usize,
        bits: number(span, "bits"),
        expected_bits: number(span, "expected_bits"),
    };
    spans.map(span).collect()
}

/// Whether this unit decided the verdict.
fn decides(verdict: &Value, unit: Unit) -> bool {
    verdict["unit"].as_str() == Some(unit.role.as_str())
        && verdict["unit_index"].as_u64() == Some(u64::from(unit.index))
}

fn is_anomalous(verdict: &Value) -> bool {
    verdict["outcome"] == "anomalous"
}

/// What each byte costs in 1/256 bit, and what a byte is expected to; none for a kind of unit that
/// training never saw.
fn costs_of(baseline: &StreamBaseline, unit: &UnitText) -> Option<(Vec<u32>, u32)> {
    let known = baseline.unit(unit.unit.role.as_str())?;
    Some((known.costs(&unit.text), known.ranges.expected >> 8))
}

/// What the baseline would have written in the place of a span that is this long, at most 60 bytes.
fn likeliest(baseline: &StreamBaseline, unit: &UnitText, span: &Span) -> Option<String> {
    let known = baseline.unit(unit.unit.role.as_str())?;
    let length = span.end.saturating_sub(span.start).min(60);
    let text = known.likeliest(&unit.text, span.start, length);
    Some(excerpt(&text, 0, text.len()))
}

/// Runs `driftlock explain`.
///
/// # Errors
/// [`ExplainError`].
pub fn run(args: &Args) -> Result<(), ExplainError> {
    let configuration = plugin_configuration(args.config.as_deref(), Some(&args.baseline))?;
    let config = Config::parse(&configuration)?;
    let (snapshot, selected) = (config.snapshot.clone(), config.request_headers.clone());
    let mut plugin = Plugin::new(config);
    let asked = args.id.is_some() || args.line.is_some();
    for (line, recorded) in (1..).zip(capture::exchanges(&args.file)?) {
        if args.line.is_some_and(|wanted| wanted != line) {
            continue;
        }
        let exchange = match recorded {
            Ok(recorded) => recorded.exchange,
            Err(error) if args.line.is_some() => return Err(error.into()),
            Err(error) => {
                tracing::warn!("{error}");
                continue;
            }
        };
        if args.id.as_ref().is_some_and(|id| *id != exchange.id) {
            continue;
        }
        let exchange = match wire::on_the_wire(exchange) {
            Err(error) if !asked => {
                tracing::warn!("an exchange that no proxy would see: {error}");
                continue;
            }
            mapped => mapped?,
        };
        let (found, sentences) = native::explain(&mut plugin, &exchange);
        let verdicts = [found.request, found.response]
            .map(|json| json.and_then(|json| serde_json::from_str::<Value>(&json).ok()));
        if !asked && !verdicts.iter().flatten().any(is_anomalous) {
            continue;
        }
        compare_with_recorded(args, line, &verdicts)?;
        let texts = unit_texts(&exchange, &selected);
        let Some(path) = &args.html else {
            let shown = Shown { all: args.all, max_bytes: args.max_bytes };
            anstream::print!("{}", render(&exchange.id, &texts, &verdicts, &sentences, &snapshot, shown));
            return Ok(());
        };
        let nearest = match &args.reference {
            Some(reference) => nearest::nearest(reference, &exchange, &selected, &verdicts, &texts)?,
            None => [None, None],
        };
        let subject = page::Subject {
            args,
            line,
            exchange: &exchange,
            verdicts: &verdicts,
            sentences: &sentences,
            texts: &texts,
        };
        let page = page::page(&subject, &snapshot, &nearest);
        std::fs::write(path, page).map_err(|source| ExplainError::File { path: path.clone(), source })?;
        anstream::println!("{}", path.display());
        return Ok(());
    }
    let path = args.file.clone();
    Err(match (&args.id, args.line) {
        (Some(id), _) => ExplainError::NoSuchId { path, id: id.clone() },
        (None, Some(line)) => ExplainError::NoSuchLine { path, line },
        (None, None) => ExplainError::NothingAnomalous(path),
    })
}

/// Says so where the recorded verdict is not the one made now.
fn compare_with_recorded(args: &Args, line: u64, verdicts: &[Option<Value>; 2]) -> Result<(), ExplainError> {
    let Some(path) = &args.verdicts else { return Ok(()) };
    let failed = |source| ExplainError::File { path: path.clone(), source };
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let text = text.lines().nth(line.saturating_sub(1) as usize).unwrap_or_default();
    let recorded: Value = serde_json::from_str(text).map_err(|error| failed(error.into()))?;
    for (name, verdict) in ["request", "response"].iter().zip(verdicts) {
        let now = verdict.as_ref().unwrap_or(&Value::Null);
        if recorded[*name] != *now {
            anstream::eprintln!(
                "the recorded verdict of the {name} is another: {} then, {} now; was it made with this baseline and configuration?",
                recorded[*name]["outcome"],
                now["outcome"],
            );
        }
    }
    Ok(())
}
