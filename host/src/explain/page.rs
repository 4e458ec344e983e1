//! The explanation as one HTML page.
//!
//! Everything is in the file: no script, no picture, no address that a browser would fetch. All text
//! that comes from traffic is escaped; control characters are shown, not obeyed.
//!
//! Cost: about 60 bytes for each change of heat; at most [`MAX_UNIT_BYTES`] of a unit are shown.

use std::fmt::Write as _;

use driftlock_engine::baseline::{Snapshot, StreamBaseline};
use driftlock_engine::calibrate::UNIT_SCORE;
use driftlock_engine::coder::UNITS_PER_BIT;
use serde_json::Value;

use super::nearest::Nearest;
use super::{Args, Span, UnitText, costs_of, decides, is_anomalous, spans_of};
use crate::capture::Exchange;
use crate::replay::native::Sentences;

/// Bytes of a unit that are shown, around its first span.
const MAX_UNIT_BYTES: usize = 64 << 10;

const STYLE: &str = "\
:root{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}\
body{max-width:70rem;margin:2rem auto;padding:0 1rem}\
h1,h2,h3{line-height:1.2}code,pre{font:13px/1.6 ui-monospace,monospace}\
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #8884;border-radius:4px;padding:.8rem}\
table{border-collapse:collapse}td,th{padding:.15rem .9rem .15rem 0;text-align:left;vertical-align:top}\
td.n{text-align:right;font-variant-numeric:tabular-nums}\
.bad{color:#b3261e;font-weight:600}.quiet{opacity:.7}\
i{font-style:normal}.h1{background:#ffe08a66}.h2{background:#ffb84d88}.h3{background:#ff7a45aa}\
.h4{background:#e5383bcc;color:#fff}mark{background:none;color:inherit;outline:2px solid #b3261e;outline-offset:1px}\
.ctl{opacity:.55}svg{max-width:100%}\n";

/// What is explained.
pub(super) struct Subject<'a> {
    pub(super) args: &'a Args,
    pub(super) line: u64,
    pub(super) exchange: &'a Exchange,
    pub(super) verdicts: &'a [Option<Value>; 2],
    pub(super) sentences: &'a Sentences,
    pub(super) texts: &'a [Vec<UnitText>; 2],
}

/// The page.
pub(super) fn page(subject: &Subject<'_>, snapshot: &Snapshot, nearest: &[Option<Nearest>; 2]) -> String {
    let id = escape(&subject.exchange.id);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Driftlock: exchange {id}</title>\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><style>{STYLE}</style></head><body>\n\
         <h1>Exchange {id}</h1>\n<p><code>{} {}</code></p>\n",
        escape(&subject.exchange.request.method),
        escape(&subject.exchange.request.target),
    );
    for (side, name) in ["request", "response"].iter().enumerate() {
        if let Some(verdict) = &subject.verdicts[side] {
            let baseline = snapshot.streams().iter().find(|baseline| verdict["stream"] == *baseline.stream());
            let shown =
                Shown { name, verdict, sentences: &subject.sentences[side], texts: &subject.texts[side] };
            message(&mut out, &shown, baseline, nearest[side].as_ref());
        }
    }
    reproduce(&mut out, subject, snapshot);
    out.push_str("</body></html>\n");
    out
}

/// One message.
struct Shown<'a> {
    name: &'a str,
    verdict: &'a Value,
    sentences: &'a [String],
    texts: &'a [UnitText],
}

fn message(
    out: &mut String,
    &Shown { name, verdict, sentences, texts }: &Shown<'_>,
    baseline: Option<&StreamBaseline>,
    nearest: Option<&Nearest>,
) {
    let class = if is_anomalous(verdict) { "bad" } else { "" };
    let text = |key: &str| escape(verdict[key].as_str().unwrap_or_default());
    let _ = write!(out, "<h2>The {name}: <span class=\"{class}\">{}</span></h2>\n<p>", text("outcome"));
    for sentence in sentences {
        let _ = writeln!(out, "{}<br>", escape(sentence));
    }
    out.push_str("</p>\n<table>");
    let mut row = |key: &str, value: String| {
        let _ = write!(out, "<tr><th>{key}</th><td>{value}</td></tr>");
    };
    if verdict["reason"].is_string() {
        row("reason", text("reason"));
    }
    row("stream", format!("<code>{}</code>", text("stream")));
    if let [Some(rank), Some(of)] = [0, 1].map(|i| verdict["p_fraction"][i].as_u64()) {
        row(
            "p-value",
            format!(
                "{} = {rank}/{of}: {} of {} held-out normal messages are as strange or stranger; alpha {}",
                verdict["p_value"],
                rank.saturating_sub(1),
                of.saturating_sub(1),
                verdict["alpha"],
            ),
        );
    }
    for (title, object) in [("scores", &verdict["scores"]), ("metrics", &verdict["metrics"])] {
        if let Some(fields) = object.as_object() {
            let fields = fields.iter().map(|(key, value)| {
                format!(
                    "<tr><td>{}</td><td class=\"n\">{}</td></tr>",
                    escape(&key.replace('_', " ")),
                    escape(&value.to_string())
                )
            });
            row(title, format!("<table>{}</table>", fields.collect::<String>()));
        }
    }
    out.push_str("</table>\n");
    let Some(baseline) = baseline else {
        out.push_str("<p>The baseline has no such stream.</p>\n");
        return;
    };
    if let Some(statistic) = verdict["scores"]["statistic"].as_f64() {
        histogram(out, baseline.calibration().statistics(), statistic);
    }
    let mut texts: Vec<&UnitText> = texts.iter().collect();
    texts.sort_by_key(|text| !decides(verdict, text.unit));
    for text in texts {
        let spans = if decides(verdict, text.unit) { spans_of(verdict) } else { Vec::new() };
        unit(out, text, &spans, baseline);
        if decides(verdict, text.unit)
            && let Some(nearest) = nearest
        {
            let _ = write!(
                out,
                "<h3>The nearest normal text</h3>\n<p>Exchange {}; it has {:.0} % of the text's five-byte sequences.</p>\n<pre>{}</pre>\n",
                escape(&nearest.id),
                nearest.likeness * 100.0,
                shown(&String::from_utf8_lossy(nearest.text.get(..MAX_UNIT_BYTES).unwrap_or(&nearest.text))),
            );
        }
    }
}

/// The calibration messages' statistics, smallest first, with this one's place.
fn histogram(out: &mut String, sorted: &[i64], statistic: f64) {
    const BINS: usize = 60;
    const WIDTH: f64 = 720.0;
    const HEIGHT: f64 = 150.0;
    let scale = |value: i64| value as f64 / UNIT_SCORE as f64;
    let (Some(&low), Some(&high)) = (sorted.first(), sorted.last()) else { return };
    let low = scale(low).min(statistic);
    let high = scale(high).max(statistic);
    let span = (high - low).max(1e-9);
    let mut bins = [0u32; BINS];
    for &value in sorted {
        let bin = ((scale(value) - low) / span * BINS as f64) as usize;
        bins[bin.min(BINS - 1)] += 1;
    }
    let most = bins.iter().copied().max().unwrap_or(1).max(1);
    let _ = write!(
        out,
        "<h3>Where it stands among {} normal messages</h3>\n<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"calibration histogram\">",
        sorted.len(),
        HEIGHT + 34.0,
    );
    let bar = WIDTH / BINS as f64;
    for (i, count) in bins.iter().enumerate().filter(|(_, count)| **count > 0) {
        // Roots, so that single messages in the tail are seen.
        let height = (f64::from(*count) / f64::from(most)).sqrt() * HEIGHT;
        let _ = write!(
            out,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"#4477aa\"><title>{count}</title></rect>",
            i as f64 * bar,
            HEIGHT - height,
            bar - 1.0,
        );
    }
    let x = ((statistic - low) / span * WIDTH).clamp(1.0, WIDTH - 1.0);
    let anchor = if x > WIDTH / 2.0 { "end" } else { "start" };
    let _ = write!(
        out,
        "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{HEIGHT}\" stroke=\"#b3261e\" stroke-width=\"2\"/>\
         <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"{anchor}\" fill=\"#b3261e\" font-size=\"13\">this message: {statistic:.2}</text>\
         <text x=\"0\" y=\"{}\" fill=\"currentColor\" font-size=\"12\">{low:.2}</text>\
         <text x=\"{WIDTH}\" y=\"{}\" text-anchor=\"end\" fill=\"currentColor\" font-size=\"12\">{high:.2}</text></svg>\n\
         <p class=\"quiet\">Statistic: of the message's strangest unit, the bits of surprise of its strangest view and a quarter of those of its words. Bars are drawn by the root of their counts.</p>\n",
        HEIGHT + 15.0,
        HEIGHT + 30.0,
        HEIGHT + 30.0,
    );
}

fn unit(out: &mut String, unit: &UnitText, spans: &[Span], baseline: &StreamBaseline) {
    let _ = writeln!(
        out,
        "<h3>Unit {}[{}], {} bytes</h3>",
        unit.unit.role.as_str(),
        unit.unit.index,
        unit.text.len()
    );
    if !spans.is_empty() {
        out.push_str("<table><tr><th>bytes</th><th>bits</th><th>so much normal text</th></tr>");
        for span in spans {
            let _ = write!(
                out,
                "<tr><td>{} to {}</td><td class=\"n\">{:.1}</td><td class=\"n\">{:.1}</td></tr>",
                span.start, span.end, span.bits, span.expected_bits
            );
        }
        out.push_str("</table>\n");
    }
    let Some((costs, expected)) = costs_of(baseline, unit) else {
        out.push_str("<p>Training saw no unit of this kind.</p>\n");
        let text = unit.text.get(..MAX_UNIT_BYTES).unwrap_or(&unit.text);
        let _ = writeln!(out, "<pre>{}</pre>", shown(&String::from_utf8_lossy(text)));
        return;
    };
    let from = match unit.text.len() <= MAX_UNIT_BYTES {
        true => 0,
        false => spans.first().map_or(0, |span| span.start.saturating_sub(MAX_UNIT_BYTES / 4)),
    };
    let to = from.saturating_add(MAX_UNIT_BYTES).min(unit.text.len());
    if to - from < unit.text.len() {
        let _ = writeln!(out, "<p class=\"quiet\">Bytes {from} to {to} are shown.</p>");
    }
    out.push_str("<pre>");
    heat_map(out, &unit.text[from..to], &costs[from..to], expected, |at| {
        spans.iter().any(|span| (span.start..span.end).contains(&(from + at)))
    });
    out.push_str("</pre>\n");
}

/// Runs of characters of one heat, each with what it costs.
fn heat_map(out: &mut String, text: &[u8], costs: &[u32], expected: u32, marked: impl Fn(usize) -> bool) {
    let mut run = Run::default();
    let mut at = 0;
    for chunk in text.utf8_chunks() {
        for c in chunk.valid().chars() {
            let width = c.len_utf8();
            let cost: u32 = costs[at..at + width].iter().sum();
            let dearest = costs[at..at + width].iter().copied().max().unwrap_or(0);
            run.push(
                out,
                heat(dearest, expected),
                marked(at),
                cost,
                width,
                &shown(c.encode_utf8(&mut [0; 4])),
            );
            at += width;
        }
        for byte in chunk.invalid() {
            let shown = format!("<i class=\"ctl\">\\x{byte:02x}</i>");
            run.push(out, heat(costs[at], expected), marked(at), costs[at], 1, &shown);
            at += 1;
        }
    }
    run.flush(out);
}

#[derive(Default)]
struct Run {
    heat: u32,
    marked: bool,
    cost: u64,
    bytes: usize,
    html: String,
}

impl Run {
    fn push(&mut self, out: &mut String, heat: u32, marked: bool, cost: u32, bytes: usize, html: &str) {
        if (self.heat, self.marked) != (heat, marked) {
            self.flush(out);
            (self.heat, self.marked) = (heat, marked);
        }
        self.cost += u64::from(cost);
        self.bytes += bytes;
        self.html.push_str(html);
    }

    fn flush(&mut self, out: &mut String) {
        if self.html.is_empty() {
            return;
        }
        let (open, close) = if self.marked { ("<mark>", "</mark>") } else { ("", "") };
        let bits = self.cost as f64 / f64::from(UNITS_PER_BIT);
        out.push_str(open);
        if self.heat > 0 || self.marked {
            let _ = write!(
                out,
                "<i class=\"h{}\" title=\"{bits:.1} bits, {:.1} a byte\">{}</i>",
                self.heat,
                bits / self.bytes as f64,
                self.html
            );
        } else {
            out.push_str(&self.html);
        }
        out.push_str(close);
        (self.cost, self.bytes) = (0, 0);
        self.html.clear();
    }
}

/// 0 to 4: over 2, 4, 8 and 12 bits beyond expectation.
fn heat(cost: u32, expected: u32) -> u32 {
    match cost.saturating_sub(expected) / UNITS_PER_BIT {
        0..2 => 0,
        2..4 => 1,
        4..8 => 2,
        8..12 => 3,
        _ => 4,
    }
}

fn reproduce(out: &mut String, subject: &Subject<'_>, snapshot: &Snapshot) {
    let quote = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
    let args = subject.args;
    let mut command = format!(
        "driftlock explain {} --line {} --baseline {}",
        quote(&args.file.to_string_lossy()),
        subject.line,
        quote(&args.baseline.to_string_lossy()),
    );
    if let Some(config) = &args.config {
        command += &format!(" --config {}", quote(&config.to_string_lossy()));
    }
    if let Some(reference) = &args.reference {
        command += &format!(" --reference {}", quote(&reference.to_string_lossy()));
    }
    if let Some(html) = &args.html {
        command += &format!(" --html {}", quote(&html.to_string_lossy()));
    }
    let _ = write!(
        out,
        "<h2>How to make this page again</h2>\n<pre>{}</pre>\n<p>Baseline sha256 <code>{}</code>, engine {}, \
         driftlock {}. The same files give the same numbers on every machine.</p>\n",
        escape(&command),
        snapshot.digest(),
        driftlock_engine::ENGINE_VERSION,
        env!("CARGO_PKG_VERSION"),
    );
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Escaped, with control characters and what would turn the line's direction made visible.
fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200b}'..='\u{200f}' | '\u{feff}' => {
                let _ = write!(out, "<i class=\"ctl\">\\u{{{:x}}}</i>", u32::from(c));
            }
            c if c.is_control() => {
                let _ = write!(out, "<i class=\"ctl\">{}</i>", c.escape_default());
            }
            c => out.push_str(&escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_stays_text() {
        let hostile = "<script>alert('1')</script>&\u{202e}\x1b[2J\"";
        let html = shown(hostile);
        assert!(!html.contains("<script") && !html.contains('\x1b') && !html.contains('\u{202e}'), "{html}");
        assert_eq!(escape("<a b='c'>&\""), "&lt;a b=&#39;c&#39;&gt;&amp;&quot;");
    }

    #[test]
    fn runs_say_what_they_cost_and_spans_are_marked() {
        let mut out = String::new();
        let text = "ab<é\n".as_bytes();
        let costs = [10, 10, 13 * UNITS_PER_BIT, 3 * UNITS_PER_BIT, UNITS_PER_BIT, 0];
        heat_map(&mut out, text, &costs, 10, |at| (2..5).contains(&at));
        assert_eq!(
            out,
            "ab<mark><i class=\"h4\" title=\"13.0 bits, 13.0 a byte\">&lt;</i></mark>\
             <mark><i class=\"h1\" title=\"4.0 bits, 2.0 a byte\">é</i></mark>\n"
        );
        let mut out = String::new();
        heat_map(&mut out, &[b'a', 0xff], &[0, 9 * UNITS_PER_BIT], 0, |_| false);
        assert_eq!(out, "a<i class=\"h3\" title=\"9.0 bits, 9.0 a byte\"><i class=\"ctl\">\\xff</i></i>");
    }
}
