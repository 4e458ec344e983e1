//! `driftlock units`: what the parsers make of a capture, without judging anything.
//!
//! What: each message's body is read as the filter reads it; a table counts messages by API style, direction
//! and outcome, with the units and bytes of each role. With `--id`, the units' texts of one exchange. Why: to
//! see, before a baseline is trained, that nothing of the traffic passes unread, and what is read as what.
//!
//! Cost: one pass over the capture. Left out on purpose: encodings (bodies are taken as the capture holds
//! them) and verdicts, which are `replay`'s.

use std::collections::BTreeMap;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use comfy_table::{Table, presets};
use driftlock_inspect::content::{BodyParser, NotInspected, Role, Sink, Summary, Unit};

use crate::capture::{self, CaptureError, Exchange, Headers};

/// Arguments of `driftlock units`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The capture, in any format that `replay` reads.
    pub file: PathBuf,
    /// Show the units of this exchange instead of the table.
    #[arg(long)]
    pub id: Option<String>,
    /// Print every message with its units as a line of JSON instead of the table.
    #[arg(long, conflicts_with = "id")]
    pub json: bool,
    /// Most bytes of a unit that are shown with --id.
    #[arg(long, default_value_t = 400)]
    pub max_bytes: usize,
    /// Bytes a parser is given at a time.
    #[arg(long, default_value_t = 16384, value_parser = clap::value_parser!(u32).range(1..))]
    pub chunk_bytes: u32,
}

/// Why the units cannot be shown.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum UnitsError {
    /// The capture.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// No such exchange.
    #[error("no exchange in {path} has the id {id:?}")]
    NoSuchId {
        /// Which file.
        path: PathBuf,
        /// The id asked for.
        id: String,
    },
}

/// What was read of one message.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// The style's name, or `-`.
    pub style: &'static str,
    /// What the style's name is followed by in stream keys.
    pub framing: &'static str,
    /// `read`, `no body`, or why it could not be read to its end.
    pub outcome: &'static str,
    /// Each unit's text.
    pub units: BTreeMap<Unit, Vec<u8>>,
    /// What else was read.
    pub summary: Summary,
}

impl Sink for Reading {
    fn text(&mut self, unit: Unit, text: &[u8], _body_offset: u64) {
        self.units.entry(unit).or_default().extend_from_slice(text);
    }

    fn end(&mut self, _unit: Unit) {}

    fn skipped(&mut self, _unit: Unit, _bytes: u64) {}
}

/// Reads one body in pieces of `chunk_bytes`.
pub fn read(parser: Result<BodyParser, NotInspected>, body: &[u8], chunk_bytes: usize) -> Reading {
    let mut reading = Reading { style: "-", outcome: "no body", ..Reading::default() };
    match parser {
        Err(reason) => reading.outcome = reason.as_str(),
        Ok(mut parser) => {
            reading.framing = parser.framing().suffix();
            for chunk in body.chunks(chunk_bytes.max(1)) {
                parser.push(chunk, &mut reading);
            }
            let result = parser.finish(&mut reading);
            reading.summary = parser.summary();
            reading.style = parser.style().as_str();
            reading.outcome = match result {
                _ if body.is_empty() => "no body",
                Ok(_) => "read",
                Err(error) => error.as_str(),
            };
        }
    }
    reading
}

/// The request and the response of an exchange.
pub fn of_exchange(exchange: &Exchange, chunk_bytes: usize) -> (Reading, Option<Reading>) {
    let content_type =
        |headers: &Headers| capture::header(headers, "content-type").map(|value| value.as_bytes().to_vec());
    let request = &exchange.request;
    let parser =
        BodyParser::for_request(request.target.as_bytes(), content_type(&request.headers).as_deref());
    let style = parser.as_ref().ok().map(BodyParser::style).filter(|style| style.has_schema());
    let asked = read(parser, &request.body, chunk_bytes);
    // The body may have told more than the path.
    let style = style.or_else(|| {
        driftlock_inspect::content::ApiStyle::ALL
            .into_iter()
            .find(|known| known.has_schema() && known.as_str() == asked.style)
    });
    let answered = exchange.response.as_ref().map(|response| {
        let parser = BodyParser::for_response(style, content_type(&response.headers).as_deref());
        let sent = as_sent(&response.body);
        read(parser, sent.as_deref().unwrap_or(&response.body), chunk_bytes)
    });
    (asked, answered)
}

/// Recorders keep binary bodies as base64. No JSON object, event stream or HTML page is made of its letters
/// alone.
fn as_sent(body: &[u8]) -> Option<Vec<u8>> {
    let text: Vec<u8> = body.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let base64 = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=');
    (text.len() >= 16 && text.iter().all(base64)).then(|| STANDARD.decode(&text).ok()).flatten()
}

/// One line of the table.
#[derive(Debug, Default)]
struct Count {
    messages: u64,
    terminated: u64,
    with_tokens: u64,
    skipped_bytes: u64,
    media: u64,
    roles: BTreeMap<Role, (u64, u64)>,
}

/// Runs `driftlock units`.
///
/// # Errors
/// [`UnitsError`].
pub fn run(args: &Args) -> Result<(), UnitsError> {
    let mut counts: BTreeMap<(&'static str, &'static str, &'static str, &'static str), Count> =
        BTreeMap::new();
    let mut found = false;
    for recorded in capture::exchanges(&args.file)? {
        let exchange = recorded?.exchange;
        if args.id.as_ref().is_some_and(|id| *id != exchange.id) {
            continue;
        }
        found = true;
        let (request, response) = of_exchange(&exchange, args.chunk_bytes as usize);
        for (direction, reading) in [("request", Some(request)), ("response", response)] {
            let Some(reading) = reading else { continue };
            if args.json {
                anstream::println!("{}", json(&exchange.id, direction, &reading));
                continue;
            }
            if args.id.is_some() {
                show(&exchange, direction, &reading, args.max_bytes);
                continue;
            }
            let key = (reading.style, direction, reading.framing, reading.outcome);
            let count = counts.entry(key).or_default();
            count.messages += 1;
            count.terminated += u64::from(reading.summary.terminated);
            count.with_tokens += u64::from(reading.summary.usage != Default::default());
            count.skipped_bytes += reading.summary.skipped_bytes;
            count.media += u64::from(reading.summary.media);
            for (unit, text) in &reading.units {
                let (units, bytes) = count.roles.entry(unit.role).or_default();
                *units += 1;
                *bytes += text.len() as u64;
            }
        }
    }
    match &args.id {
        Some(id) if !found => {
            return Err(UnitsError::NoSuchId { path: args.file.clone(), id: id.clone() });
        }
        Some(_) => {}
        None if args.json => {}
        None => anstream::println!("{}", table(&counts)),
    }
    Ok(())
}

fn table(counts: &BTreeMap<(&str, &str, &str, &str), Count>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "style",
        "direction",
        "framing",
        "outcome",
        "messages",
        "ended",
        "tokens",
        "media",
        "skipped",
        "units/bytes by role",
    ]);
    for ((style, direction, framing, outcome), count) in counts {
        let roles: Vec<String> = count
            .roles
            .iter()
            .map(|(role, (units, bytes))| format!("{} {units}/{bytes}", role.as_str()))
            .collect();
        table.add_row([
            (*style).to_owned(),
            (*direction).to_owned(),
            (*framing).to_owned(),
            (*outcome).to_owned(),
            count.messages.to_string(),
            count.terminated.to_string(),
            count.with_tokens.to_string(),
            count.media.to_string(),
            count.skipped_bytes.to_string(),
            roles.join(", "),
        ]);
    }
    table
}

fn json(id: &str, direction: &str, reading: &Reading) -> serde_json::Value {
    let summary = &reading.summary;
    let units: Vec<serde_json::Value> = reading
        .units
        .iter()
        .map(|(unit, text)| {
            let text = String::from_utf8_lossy(text);
            serde_json::json!({"role": unit.role.as_str(), "index": unit.index, "text": text})
        })
        .collect();
    serde_json::json!({
        "id": id,
        "direction": direction,
        "style": reading.style,
        "framing": reading.framing,
        "outcome": reading.outcome,
        "body_bytes": summary.body_bytes,
        "skipped_bytes": summary.skipped_bytes,
        "media": summary.media,
        "events": summary.events,
        "terminated": summary.terminated,
        "provider_error": summary.provider_error,
        "model": summary.model.as_ref().map(driftlock_inspect::content::Label::as_str),
        "finish_reason": summary.finish_reason.as_ref().map(driftlock_inspect::content::Label::as_str),
        "tokens": {
            "input": summary.usage.input_tokens,
            "output": summary.usage.output_tokens,
            "total": summary.usage.total_tokens,
            "cached": summary.usage.cached_tokens,
            "reasoning": summary.usage.reasoning_tokens,
        },
        "units": units,
    })
}

fn show(exchange: &Exchange, direction: &str, reading: &Reading, max_bytes: usize) {
    let Reading { style, framing, outcome, summary, .. } = reading;
    anstream::println!("{} {direction} {style}{framing}: {outcome}", exchange.request.target);
    anstream::println!("  {summary:?}");
    for (unit, text) in &reading.units {
        let shown = text.get(..max_bytes).unwrap_or(text);
        let more = if shown.len() < text.len() { "…" } else { "" };
        let name = unit.role.as_str();
        anstream::println!("  {name} {} ({} bytes): {}{more}", unit.index, text.len(), shown.escape_ascii());
    }
}
