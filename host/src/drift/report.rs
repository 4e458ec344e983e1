//! What `driftlock drift` says, for people and as JSON.

use std::fmt::Write as _;

use anstyle::Style;
use driftlock_engine::drift::{Aspect, Driver, Moved, Shift, Side, Statistic};
use serde::Serialize;

use super::{Compared, Message};
use crate::explain::excerpt;

/// One statistic's one aspect, window against baseline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Moving {
    /// `bits_per_byte`, `bytes` or `bits` of a message.
    pub statistic: &'static str,
    /// `location` (all up or down) or `spread` (apart or together).
    pub aspect: &'static str,
    /// `up`, `down` or `neither`.
    pub moved: &'static str,
    /// Two-sided, adjusted for looking at all six.
    pub p_fraction: [u32; 2],
    /// Location: P(window > baseline) + P(equal)/2 - 1/2; spread: standard deviations.
    pub effect: f64,
    /// Median of the baseline, in the statistic's unit.
    pub baseline_median: f64,
    /// Median of the window.
    pub window_median: f64,
    /// The same in words.
    pub sentence: String,
}

/// A unit's or a word's part in a shift.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DriverReport {
    /// Kind of unit or word; none for the words that found no room.
    pub name: Option<String>,
    /// Its term in the difference, in the statistic's unit a message (or a byte).
    pub contribution: f64,
    /// Share of the baseline's messages that have it.
    pub baseline_share: f64,
    /// Share of the window's.
    pub window_share: f64,
    /// Bits it costs in the mean, where it occurs: in the baseline, in the window.
    pub mean_bits: [f64; 2],
    /// Its dearest occurrence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub example: Option<Example>,
}

/// Something in a message.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Example {
    /// `baseline` or `window`.
    pub capture: &'static str,
    /// The exchange.
    pub id: String,
    /// Kind of unit.
    pub unit: String,
    /// First byte in the unit's text.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// Its surroundings.
    pub excerpt: String,
}

/// A message that moved the statistic.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MessageReport {
    /// The exchange.
    pub id: String,
    /// Bytes of text.
    pub bytes: u64,
    /// Its code length a byte, bits.
    pub bits_per_byte: f64,
    /// What costs most beyond expectation in it, or its beginning.
    pub spans: Vec<Example>,
}

/// One of the two captures against the model's calibration.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Against {
    /// `baseline` or `window`.
    pub capture: &'static str,
    /// p-value of the permutation test of the means.
    pub p_fraction: [u32; 2],
    /// `stranger`, `more_ordinary` or `alike`.
    pub direction: &'static str,
}

/// One stream.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StreamReport {
    /// Stream key.
    pub stream: String,
    /// SHA-256 of the model.
    pub model: String,
    /// Messages of the baseline's sample.
    pub baseline_messages: usize,
    /// Messages of the window.
    pub window_messages: usize,
    /// p-value of the largest shift.
    pub p_fraction: [u32; 2],
    /// The rule over all streams says that it moved.
    pub moved: bool,
    /// All six, largest first.
    pub shifts: Vec<Moving>,
    /// Kinds of unit that the largest comes from.
    pub units: Vec<DriverReport>,
    /// Words.
    pub words: Vec<DriverReport>,
    /// Messages of the window.
    pub messages: Vec<MessageReport>,
    /// Which capture left what the model was calibrated on; only with a calibrated model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub against_calibration: Option<Vec<Against>>,
}

/// `value` of [`driftlock_engine::drift::Row::value`], in bits a byte, bytes or bits.
fn natural(statistic: Statistic, value: f64) -> f64 {
    let value = match statistic {
        Statistic::CostPerByte => value / 65536.0,
        Statistic::Length => value,
        Statistic::TotalCost => value / 256.0,
    };
    (value * 1e4).round() / 1e4
}

/// A driver's contribution in bits a byte, bytes or bits.
pub fn in_unit(statistic: Statistic, contribution: i64) -> f64 {
    natural(statistic, contribution as f64 / 65536.0)
}

/// A shift in words.
pub fn moving(shift: &Shift) -> Moving {
    let (name, what, unit) = match shift.statistic {
        Statistic::CostPerByte => ("bits_per_byte", "code length a byte", "bits a byte"),
        Statistic::Length => ("bytes", "length", "bytes"),
        Statistic::TotalCost => ("bits", "code length", "bits"),
    };
    let effect = f64::from(shift.effect_ppm) / 1e6;
    let [was, is] =
        [shift.reference_median, shift.window_median].map(|median| natural(shift.statistic, median as f64));
    let moved = match shift.moved {
        Moved::Up => "up",
        Moved::Down => "down",
        Moved::Neither => "neither",
    };
    let sentence = match (shift.aspect, shift.moved) {
        (_, Moved::Neither) => format!("{what} has not moved"),
        (Aspect::Location, _) => format!(
            "{what} went {moved}: in {:.0} of 100 pairs the window's message has more (median {is} {unit}, was {was})",
            (effect + 0.5) * 100.0
        ),
        (Aspect::Spread, Moved::Up) => {
            format!("{what} went apart: more messages far from the middle ({effect:+.2} standard deviations)")
        }
        (Aspect::Spread, _) => format!(
            "{what} drew together: fewer messages far from the middle ({effect:+.2} standard deviations)"
        ),
    };
    Moving {
        statistic: name,
        aspect: if shift.aspect == Aspect::Location { "location" } else { "spread" },
        moved,
        p_fraction: [shift.p.rank, shift.p.of],
        effect,
        baseline_median: was,
        window_median: is,
        sentence,
    }
}

/// Bytes shown on either side of a word.
const AROUND: usize = 40;

fn around(capture: &'static str, message: &Message, unit: &str, start: usize, end: usize) -> Option<Example> {
    let (_, text) = message.units.iter().find(|(name, text)| *name == unit && end <= text.len())?;
    let from = start.saturating_sub(AROUND);
    Some(Example {
        capture,
        id: message.id.clone(),
        unit: unit.to_owned(),
        start: start as u64,
        end: end as u64,
        excerpt: excerpt(text, from, end.saturating_add(AROUND).min(text.len())),
    })
}

fn share(part: u32, of: usize) -> f64 {
    (f64::from(part) / of.max(1) as f64 * 1e4).round() / 1e4
}

impl Compared {
    fn driver(&self, statistic: Statistic, driver: Driver) -> DriverReport {
        let mean = |sums: driftlock_engine::drift::Sums| {
            (sums.cost as f64 / 256.0 / sums.times.max(1) as f64 * 100.0).round() / 100.0
        };
        let [reference, window] = &self.samples;
        let (side, capture) =
            if driver.window.times > 0 { (window, "window") } else { (reference, "baseline") };
        let example = driver.example.as_ref().and_then(|place| {
            let message = side.get(place.message as usize)?;
            around(capture, message, &place.unit, place.start as usize, place.end as usize)
        });
        DriverReport {
            name: driver.name,
            contribution: in_unit(statistic, driver.contribution),
            baseline_share: share(driver.reference.messages, reference.len()),
            window_share: share(driver.window.messages, window.len()),
            mean_bits: [mean(driver.reference), mean(driver.window)],
            example,
        }
    }

    /// Where a message costs most beyond expectation; where that says nothing, its beginning.
    fn message(&self, at: usize, dearer: bool) -> Option<MessageReport> {
        let message = self.samples[1].get(at)?;
        let row = self.rows[1].get(at)?;
        let mut spans: Vec<(u64, Example)> = Vec::new();
        for (name, text) in message.units.iter().filter(|_| dearer) {
            let Some(unit) = self.baseline.unit(name) else { continue };
            let scores = unit.score(text);
            for span in scores.spans.iter().filter(|span| span.end > span.start) {
                let (start, end) = (span.start as usize, (span.end as usize).min(text.len()));
                let shown = Example {
                    capture: "window",
                    id: message.id.clone(),
                    unit: (*name).to_owned(),
                    start: span.start,
                    end: span.end,
                    excerpt: excerpt(text, start, end),
                };
                spans.push((span.excess, shown));
            }
        }
        spans.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| (&a.1.unit, a.1.start).cmp(&(&b.1.unit, b.1.start))));
        spans.truncate(2);
        let mut spans: Vec<Example> = spans.into_iter().map(|(_, span)| span).collect();
        if spans.is_empty()
            && let Some((name, text)) = message.units.iter().max_by_key(|(_, text)| text.len())
        {
            spans.extend(around("window", message, name, 0, text.len().min(2 * AROUND)));
        }
        Some(MessageReport {
            id: message.id.clone(),
            bytes: row.bytes,
            bits_per_byte: natural(Statistic::CostPerByte, row.value(Statistic::CostPerByte) as f64),
            spans,
        })
    }

    pub(super) fn report(&self, moved: bool, top: usize) -> StreamReport {
        let [largest, ..] = &self.test.shifts;
        let (statistic, towards) = (largest.statistic, largest.moved);
        // Words move means; a spread is moved by the messages far out.
        let words_say = moved && largest.aspect == Aspect::Location;
        let named = |drivers: Vec<Driver>| drivers.into_iter().map(|d| self.driver(statistic, d)).collect();
        let dearer = statistic != Statistic::Length && towards == Moved::Up;
        let leading = if moved { self.leading(largest, top) } else { Vec::new() };
        let against = |outcomes: &[driftlock_engine::significance::PermutationOutcome; 2]| {
            let names = ["baseline", "window"];
            let one =
                |(capture, outcome): (&'static str, &driftlock_engine::significance::PermutationOutcome)| {
                    let direction = match outcome.direction {
                        std::cmp::Ordering::Greater => "stranger",
                        std::cmp::Ordering::Less => "more_ordinary",
                        std::cmp::Ordering::Equal => "alike",
                    };
                    Against { capture, p_fraction: [outcome.p.rank, outcome.p.of], direction }
                };
            names.into_iter().zip(outcomes).map(one).collect()
        };
        StreamReport {
            stream: self.stream.clone(),
            model: self.baseline.digest().to_string(),
            baseline_messages: self.drivers.total(Side::Reference).messages as usize,
            window_messages: self.drivers.total(Side::Window).messages as usize,
            p_fraction: [self.test.p.rank, self.test.p.of],
            moved,
            shifts: self.test.shifts.iter().map(moving).collect(),
            units: if words_say { named(self.drivers.units(statistic, towards, top)) } else { Vec::new() },
            words: if words_say { named(self.drivers.words(statistic, towards, top)) } else { Vec::new() },
            messages: leading.into_iter().filter_map(|at| self.message(at, dearer)).collect(),
            against_calibration: self.against.as_ref().map(against),
        }
    }
}

/// The report for a terminal.
pub(super) fn text(streams: &[StreamReport], alpha: f64) -> String {
    let bold = Style::new().bold();
    let mut out = String::new();
    for stream in streams {
        let [rank, of] = stream.p_fraction;
        let verdict = if stream.moved { "moved" } else { "no drift found" };
        let _ = writeln!(
            out,
            "{bold}{}: {verdict}{bold:#} (p = {rank}/{of}; {} messages against {} of the baseline; false discovery rate {alpha} over {} streams)",
            stream.stream,
            stream.window_messages,
            stream.baseline_messages,
            streams.len(),
        );
        let significant =
            |shift: &&Moving| f64::from(shift.p_fraction[0]) <= alpha * f64::from(shift.p_fraction[1]);
        if stream.moved {
            let mut shown = stream.shifts.iter().filter(significant).peekable();
            let first = shown.peek().is_none().then(|| stream.shifts.first()).flatten();
            for shift in shown.chain(first) {
                let _ = writeln!(
                    out,
                    "  {} (p = {}/{})",
                    shift.sentence, shift.p_fraction[0], shift.p_fraction[1]
                );
            }
        }
        if let Some(against) = &stream.against_calibration {
            for one in against {
                let [rank, of] = one.p_fraction;
                let _ = writeln!(
                    out,
                    "  against the model's calibration the {} is {} (p = {rank}/{of})",
                    one.capture,
                    one.direction.replace('_', " "),
                );
            }
        }
        for (what, drivers) in [("unit", &stream.units), ("word", &stream.words)] {
            for driver in drivers {
                let name = driver.name.as_deref().unwrap_or("(words beyond the limit)");
                let _ = writeln!(
                    out,
                    "  {what} {name:?}: {:+} of it; in {:.1} % of messages, was {:.1} %; {} bits each, was {}",
                    driver.contribution,
                    driver.window_share * 100.0,
                    driver.baseline_share * 100.0,
                    driver.mean_bits[1],
                    driver.mean_bits[0],
                );
                if let Some(example) = driver.example.as_ref().filter(|_| what == "word") {
                    let _ = writeln!(
                        out,
                        "      {} {} {} {}-{}: {}",
                        example.capture,
                        example.id,
                        example.unit,
                        example.start,
                        example.end,
                        example.excerpt
                    );
                }
            }
        }
        for message in &stream.messages {
            let _ = writeln!(
                out,
                "  message {}: {} bytes at {} bits a byte",
                message.id.escape_debug(),
                message.bytes,
                message.bits_per_byte
            );
            for span in &message.spans {
                let _ = writeln!(out, "      {} {}-{}: {}", span.unit, span.start, span.end, span.excerpt);
            }
        }
    }
    out
}
