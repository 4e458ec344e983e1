//! `driftlock explain`: one exchange, byte by byte, with the numbers behind its verdict.
//!
//! What: the exchange is judged again under a baseline, and every content unit's text is shown with its
//! surprising bytes highlighted, the spans that decided listed with their cost, and the p-value with the
//! calibration it comes from. Why: a verdict that cannot be looked into is not one to act on.
//!
//! Cost: one exchange. Left out on purpose: the HTML page.

use std::path::PathBuf;

use anstyle::{AnsiColor, Color, Style};
use driftlock_engine::baseline::{Snapshot, StreamBaseline};
use driftlock_engine::coder::UNITS_PER_BIT;
use driftlock_inspect::config::{Config, ConfigError};
use driftlock_inspect::content::{ApiStyle, BodyParser, Sink, Unit};
use driftlock_inspect::session::Plugin;
use serde_json::Value;

use crate::capture::{self, CaptureError, Exchange};
use crate::replay::{native, wire};
use crate::train::{ConfigurationError, plugin_configuration};

/// Arguments of `driftlock explain`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The capture that holds the exchange: JSON Lines, plain or gzip.
    pub file: PathBuf,
    /// The exchange's id in the capture; by default the first that is anomalous.
    #[arg(long)]
    pub id: Option<String>,
    /// The baseline to judge by.
    #[arg(long)]
    pub baseline: PathBuf,
    /// Plugin configuration, JSON.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Show messages that are not anomalous and units that did not decide, too.
    #[arg(long)]
    pub all: bool,
    /// Most bytes of a unit that are shown, around its spans.
    #[arg(long, default_value_t = 2000)]
    pub max_bytes: usize,
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
    /// Nothing anomalous.
    #[error("no exchange in {0} is anomalous under this baseline; name one with --id")]
    NothingAnomalous(PathBuf),
    /// It cannot be sent, so no proxy would see it.
    #[error("the exchange cannot be inspected")]
    NotSendable(#[from] wire::NotSendable),
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

/// The texts of the request's and the response's units, as the filter reads them.
pub fn unit_texts(exchange: &Exchange) -> [Vec<UnitText>; 2] {
    let request = &exchange.request;
    let mut texts = Texts::default();
    let target = Unit { role: driftlock_inspect::content::Role::Target, index: 0 };
    texts.text(target, format!("{} {}", request.method, request.target).as_bytes(), 0);
    let read = |parser: Result<BodyParser, _>, body: &[u8], texts: &mut Texts| {
        if let Ok(mut parser) = parser {
            parser.push(body, texts);
            // A body that breaks off is shown as far as it goes; the verdict names the reason.
            let _ = parser.finish(texts);
        }
    };
    let content_type = |headers: &[(String, String)]| {
        capture::header(headers, "content-type").map(|v| v.as_bytes().to_vec())
    };
    let path = request.target.as_bytes();
    let parser = BodyParser::for_request(path, content_type(&request.headers).as_deref());
    read(parser, &request.body, &mut texts);
    let mut answers = Texts::default();
    if let Some(response) = &exchange.response {
        let parser =
            BodyParser::for_response(ApiStyle::of_path(path), content_type(&response.headers).as_deref());
        read(parser, &response.body, &mut answers);
    }
    [texts.0, answers.0]
}

/// Runs `driftlock explain`.
///
/// # Errors
/// [`ExplainError`].
pub fn run(args: &Args) -> Result<(), ExplainError> {
    let configuration = plugin_configuration(args.config.as_deref(), Some(&args.baseline))?;
    let config = Config::parse(&configuration)?;
    let snapshot = config.snapshot.clone();
    let mut plugin = Plugin::new(config);
    for recorded in capture::exchanges(&args.file)? {
        let exchange = match recorded {
            Ok(recorded) => recorded.exchange,
            Err(error) => {
                tracing::warn!("{error}");
                continue;
            }
        };
        if args.id.as_ref().is_some_and(|id| *id != exchange.id) {
            continue;
        }
        let exchange = match wire::on_the_wire(exchange) {
            Err(error) if args.id.is_none() => {
                tracing::warn!("an exchange that no proxy would see: {error}");
                continue;
            }
            mapped => mapped?,
        };
        let verdicts = native::inspect(&mut plugin, &exchange);
        let parsed = [verdicts.request, verdicts.response]
            .map(|json| json.and_then(|json| serde_json::from_str::<Value>(&json).ok()));
        let anomalous = parsed.iter().flatten().any(|verdict| verdict["outcome"] == "anomalous");
        if anomalous || args.id.is_some() {
            anstream::print!("{}", render(&exchange, &parsed, &snapshot, args.all, args.max_bytes));
            return Ok(());
        }
    }
    let path = args.file.clone();
    Err(match &args.id {
        Some(id) => ExplainError::NoSuchId { path, id: id.clone() },
        None => ExplainError::NothingAnomalous(path),
    })
}

/// The explanation as text with ANSI styles.
pub fn render(
    exchange: &Exchange,
    verdicts: &[Option<Value>; 2],
    snapshot: &Snapshot,
    all: bool,
    max_bytes: usize,
) -> String {
    let mut out = String::new();
    let bold = Style::new().bold();
    let texts = unit_texts(exchange);
    let anomalous = |verdict: &Value| verdict["outcome"] == "anomalous";
    let only_anomalous = !all && verdicts.iter().flatten().any(anomalous);
    for ((direction, verdict), texts) in ["request", "response"].iter().zip(verdicts).zip(&texts) {
        let Some(verdict) = verdict else { continue };
        if only_anomalous && !anomalous(verdict) {
            continue;
        }
        let stream = verdict["stream"].as_str().unwrap_or_default();
        let outcome = verdict["outcome"].as_str().unwrap_or_default();
        out += &format!(
            "{bold}{direction}{bold:#} of exchange {}: {bold}{outcome}{bold:#}",
            exchange.id.escape_debug()
        );
        if let Some(reason) = verdict["reason"].as_str() {
            out += &format!(" ({reason})");
        }
        out += &format!("\n  stream    {stream}\n");
        let baseline = snapshot.streams().iter().find(|baseline| baseline.stream() == stream);
        let Some(baseline) = baseline else {
            out += "  no baseline for this stream\n\n";
            continue;
        };
        out += &format!("  baseline  sha256 {}, {} messages\n", baseline.digest(), baseline.messages());
        if let [Some(rank), Some(of)] = [0, 1].map(|i| verdict["p_fraction"][i].as_u64()) {
            out += &format!(
                "  p-value   {rank}/{of} = {}: {} of {} held-out normal messages are as strange or stranger; alpha {}\n",
                verdict["p_value"],
                rank - 1,
                of - 1,
                verdict["alpha"],
            );
        }
        let scores = &verdict["scores"];
        if scores.is_object() {
            out += &format!(
                "  scores    of the {} unit: {} bits/byte where {} is expected; strangest by its {}: {} bits of surprise; largest excess {} bits\n",
                verdict["unit"].as_str().unwrap_or_default(),
                scores["mean_bits"],
                scores["expected_mean_bits"],
                scores["view"].as_str().unwrap_or_default(),
                scores["statistic"],
                scores["max_excess_bits"],
            );
        }
        for text in texts {
            let decides = verdict["unit"].as_str() == Some(text.unit.role.as_str())
                && verdict["unit_index"].as_u64() == Some(u64::from(text.unit.index));
            if !decides && !all {
                continue;
            }
            let spans = if decides { spans_of(verdict) } else { Vec::new() };
            out += &render_unit(text, &spans, baseline, max_bytes);
        }
        out.push('\n');
    }
    out
}

/// Start, end, bits, expected bits.
fn spans_of(verdict: &Value) -> Vec<(usize, usize, f64, f64)> {
    let number = |span: &Value, key: &str| span[key].as_f64().unwrap_or_default();
    verdict["spans"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|span| {
            let (start, end) = (number(span, "start") as usize, number(span, "end") as usize);
            (start, end, number(span, "bits"), number(span, "expected_bits"))
        })
        .collect()
}

fn render_unit(
    unit: &UnitText,
    spans: &[(usize, usize, f64, f64)],
    baseline: &StreamBaseline,
    max_bytes: usize,
) -> String {
    let name = unit.unit.role.as_str();
    let mut out = format!("  unit {name}[{}], {} bytes\n", unit.unit.index, unit.text.len());
    for (start, end, bits, expected) in spans {
        out += &format!(
            "    bytes {start}-{end} cost {bits:.0} bits where so much normal text costs {expected:.0}: {}\n",
            excerpt(&unit.text, *start, *end),
        );
    }
    let Some(known) = baseline.unit(name) else {
        return out + "    training saw no unit of this kind\n";
    };
    let costs = known.costs(&unit.text);
    let expected = (known.ranges.expected >> 8) as u32;
    // The window of the text around the first span.
    let middle = spans.first().map_or(0, |(start, ..)| *start);
    let from = middle.saturating_sub(max_bytes / 4).min(unit.text.len());
    let to = from.saturating_add(max_bytes).min(unit.text.len());
    let mut shown = String::new();
    let mut style = Style::new();
    let text = &unit.text[from..to];
    let mut at = from;
    for chunk in text.utf8_chunks() {
        for c in chunk.valid().chars() {
            let width = c.len_utf8();
            let cost = costs[at..at + width].iter().copied().max().unwrap_or(0);
            change_style(&mut shown, &mut style, heat(cost, expected));
            if c == '\n' {
                shown += "\n    | ";
            } else if c.is_control() {
                shown += &c.escape_default().to_string();
            } else {
                shown.push(c);
            }
            at += width;
        }
        for byte in chunk.invalid() {
            change_style(&mut shown, &mut style, heat(costs[at], expected));
            shown += &format!("\\x{byte:02x}");
            at += 1;
        }
    }
    change_style(&mut shown, &mut style, Style::new());
    let dots = |cut: bool| if cut { "…" } else { "" };
    out += &format!("    | {}{shown}{}\n", dots(from > 0), dots(to < unit.text.len()));
    out
}

/// How a byte is shown by what it costs beyond expectation: over 4, 8 and 12 bits.
fn heat(cost: u32, expected: u32) -> Style {
    let excess = cost.saturating_sub(expected) / UNITS_PER_BIT;
    let colour = |c: AnsiColor| Style::new().fg_color(Some(Color::Ansi(c)));
    match excess {
        0..4 => Style::new(),
        4..8 => colour(AnsiColor::Yellow),
        8..12 => colour(AnsiColor::Red),
        _ => colour(AnsiColor::Red).bold().underline(),
    }
}

fn change_style(out: &mut String, current: &mut Style, next: Style) {
    if *current != next {
        *out += &format!("{current:#}{next}");
        *current = next;
    }
}

/// The span's text in one line of at most 120 characters, quoted.
pub fn excerpt(text: &[u8], start: usize, end: usize) -> String {
    let span = text.get(start..end.min(text.len())).unwrap_or_default();
    let text = String::from_utf8_lossy(span);
    let cut: String = text.chars().take(120).collect();
    let dots = if cut.len() < text.len() { "…" } else { "" };
    format!("{cut:?}{dots}")
}
