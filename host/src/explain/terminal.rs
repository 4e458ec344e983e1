//! The explanation for a terminal: text with ANSI styles, control characters made visible.

use anstyle::{AnsiColor, Color, Style};
use driftlock_engine::baseline::{Snapshot, StreamBaseline};
use driftlock_engine::coder::UNITS_PER_BIT;
use serde_json::Value;

use super::{Span, UnitText, costs_of, decides, is_anomalous, likeliest, spans_of};
use crate::replay::native::Sentences;

/// How much is shown.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// Messages that are not anomalous and units that did not decide, too.
    pub all: bool,
    /// Most bytes of a unit, around its spans.
    pub max_bytes: usize,
}

/// The explanation of the exchange `id`, whose units are `texts`, as text with ANSI styles.
pub fn render(
    id: &str,
    texts: &[Vec<UnitText>; 2],
    verdicts: &[Option<Value>; 2],
    sentences: &Sentences,
    snapshot: &Snapshot,
    Shown { all, max_bytes }: Shown,
) -> String {
    let mut out = String::new();
    let bold = Style::new().bold();
    let only_anomalous = !all && verdicts.iter().flatten().any(is_anomalous);
    for (((direction, verdict), sentences), texts) in
        ["request", "response"].iter().zip(verdicts).zip(sentences).zip(texts)
    {
        let Some(verdict) = verdict else { continue };
        if only_anomalous && !is_anomalous(verdict) {
            continue;
        }
        let stream = verdict["stream"].as_str().unwrap_or_default();
        let outcome = verdict["outcome"].as_str().unwrap_or_default();
        out +=
            &format!("{bold}{direction}{bold:#} of exchange {}: {bold}{outcome}{bold:#}", id.escape_debug());
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
            let view = scores["view"].as_str().unwrap_or_default();
            out += &format!(
                "  scores    of the {} unit: {} bits/byte where {} is expected; strangest by its {view}: {} bits of surprise; statistic {}; largest excess {} bits\n",
                verdict["unit"].as_str().unwrap_or_default(),
                scores["mean_bits"],
                scores["expected_mean_bits"],
                scores["surprise_bits"][view],
                scores["statistic"],
                scores["max_excess_bits"],
            );
        }
        for sentence in sentences {
            out += &format!("  {sentence}\n");
        }
        for text in texts {
            let decides = decides(verdict, text.unit);
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

fn render_unit(unit: &UnitText, spans: &[Span], baseline: &StreamBaseline, max_bytes: usize) -> String {
    let name = unit.unit.role.as_str();
    let mut out = format!("  unit {name}[{}], {} bytes\n", unit.unit.index, unit.text.len());
    for span @ Span { start, end, bits, expected_bits } in spans {
        out += &format!(
            "    bytes {start}-{end} cost {bits:.0} bits where so much normal text costs {expected_bits:.0}: {}\n",
            excerpt(&unit.text, *start, *end),
        );
        if let Some(text) = likeliest(baseline, unit, span) {
            out += &format!("      the baseline would have gone on: {text}\n");
        }
    }
    let Some((costs, expected)) = costs_of(baseline, unit) else {
        return out + "    training saw no unit of this kind\n";
    };
    // The window of the text around the first span.
    let middle = spans.first().map_or(0, |span| span.start);
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
