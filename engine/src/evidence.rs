//! The verdict: one schema for headers, logs, files and APIs.
//!
//! What: [`Verdict`] is what the detector says of one message, with the numbers behind it. It
//! serialises by serde; numbers leave the engine's fixed point only here, each as the nearest f64 of an
//! exact decimal or binary fraction, so the JSON text is the same on every target.
//!
//! Cost: a few small allocations a message, none a byte.
//!
//! Left out on purpose: the text of the message. A verdict can be stored and sent where the message
//! may not be; offsets say where to look.

use alloc::string::String;
use alloc::vec::Vec;

use serde::Serialize;

use crate::calibrate::{NormalRanges, PValue, UNIT_SCORE, UNSEEN_UNIT, View};
use crate::score::{ExcessSpan, UnitScores};

/// What came of inspecting a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Like the baseline: p > alpha.
    Normal,
    /// The stream is still learning what is normal.
    WarmingUp,
    /// Some or all of the message could not be inspected, and what could gave no alarm.
    NotInspected,
    /// Unlike the baseline: p <= alpha.
    Anomalous,
}

impl Outcome {
    /// As in the JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::WarmingUp => "warming_up",
            Self::NotInspected => "not_inspected",
            Self::Anomalous => "anomalous",
        }
    }
}

/// What the detector says of one message.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// Stream key.
    pub stream: String,
    /// The content unit that decided: the strangest one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<&'static str>,
    /// Which of the units of that kind, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit_index: Option<u16>,
    /// The outcome.
    pub outcome: Outcome,
    /// Why a message was not (wholly) inspected or what else bears on the outcome.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Conformal p-value, rounded up to a millionth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p_value: Option<f64>,
    /// The p-value as the exact fraction [rank, of]: rank - 1 of (of - 1) held-out normal messages were
    /// at least as strange.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p_fraction: Option<[u32; 2]>,
    /// Messages with p at most this are anomalous.
    pub alpha: f64,
    /// The deciding unit's scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<Scores>,
    /// Sums over the message.
    pub metrics: Metrics,
    /// Where the deciding unit costs more than expected, largest excess first.
    pub spans: Vec<Span>,
    /// The message's units, strangest first, at most [`MAX_UNITS`].
    pub units: Vec<UnitSummary>,
    /// SHA-256 of the stream's baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<String>,
    /// Version of the engine.
    pub engine_version: &'static str,
}

/// How many units a verdict lists.
pub const MAX_UNITS: usize = 8;

/// Scores of a unit; see [`crate::score`] for the formulas.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// The largest surprise among the views, bits, with a ten-thousandth of the others. Absent for a kind
    /// of unit that the baseline has never seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub statistic: Option<f64>,
    /// The view with the largest surprise.
    pub view: &'static str,
    /// By view, -log2 of the share of normal units with at least as much, bits.
    pub surprise_bits: SurpriseBits,
    /// Bits per scored byte; a volatile token counts as the three bytes of its marker.
    pub mean_bits: f64,
    /// Bits per scored byte expected.
    pub expected_mean_bits: f64,
    /// Words.
    pub words: u32,
    /// Of these, how many the baseline does not know.
    pub new_words: u32,
    /// Neighbouring familiar words that the baseline never saw side by side.
    pub new_pairs: u32,
    /// Excess of the largest span over expectation and margin, bits.
    pub max_excess_bits: f64,
}

/// A surprise for each view, bits; see [`crate::calibrate::View`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SurpriseBits {
    /// The code length of the whole.
    pub total: f64,
    /// A soft maximum of the bytes' costs.
    pub peak: f64,
    /// Odd values in fields.
    pub fields: f64,
    /// New pairs of familiar words.
    pub new_pairs: f64,
    /// New words.
    pub new_words: f64,
}

/// Sums over a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Metrics {
    /// Bytes scored.
    pub bytes: u64,
    /// C(x|B), bits.
    pub code_length_bits: f64,
    /// C(x|B) per byte.
    pub bits_per_byte: f64,
    /// 8 L / C(x|B).
    pub compression_ratio: f64,
    /// Bytes counted but not scored, such as images.
    pub skipped_bytes: u64,
    /// Content units.
    pub units: u32,
}

/// A stretch that costs more than expected. Offsets are half open, `[start, end)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Span {
    /// First byte, in the unit's text.
    pub start: u64,
    /// One past the last byte, in the unit's text.
    pub end: u64,
    /// Where the span begins in the message body.
    pub body_start: u64,
    /// Where it ends in the message body.
    pub body_end: u64,
    /// What it costs under the baseline, bits.
    pub bits: f64,
    /// What so many bytes of normal text cost, bits.
    pub expected_bits: f64,
}

/// One unit of a message, in brief.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct UnitSummary {
    /// Kind.
    pub unit: &'static str,
    /// Which of its kind, from 0.
    pub index: u16,
    /// Bytes scored.
    pub bytes: u64,
    /// Bits per byte.
    pub mean_bits: f64,
    /// As [`Scores::statistic`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub statistic: Option<f64>,
}

/// Thousandths to a number: the nearest f64 of that decimal fraction.
fn thousandths(value: i128) -> f64 {
    value as f64 / 1000.0
}

/// 1/256 bit to bits, rounded down to a thousandth.
fn bits(fixed: i128) -> f64 {
    thousandths(fixed * 1000 / 256)
}

/// `numerator / denominator` in thousandths, 0 for a zero denominator.
fn ratio(numerator: u128, denominator: u128) -> f64 {
    thousandths((numerator * 1000).checked_div(denominator).unwrap_or(0) as i128)
}

/// A statistic in units of the common scale; none for an unseen unit.
pub(crate) fn statistic(value: i64) -> Option<f64> {
    (value != UNSEEN_UNIT).then(|| thousandths(i128::from(value) * 1000 / i128::from(UNIT_SCORE)))
}

pub(crate) fn mean_bits(scores: &UnitScores) -> f64 {
    ratio(u128::from(scores.cost), u128::from(scores.bytes) * 256)
}

impl Scores {
    pub(crate) fn new(value: i64, unit: &UnitScores, ranges: &NormalRanges) -> Self {
        let surprises = ranges.surprises(unit);
        let largest = View::ALL.into_iter().zip(surprises).rev().max_by_key(|(_, surprise)| *surprise);
        let [total, peak, fields, new_pairs, new_words] =
            surprises.map(|surprise| thousandths(i128::from(surprise) * 1000 / i128::from(UNIT_SCORE)));
        Self {
            statistic: statistic(value),
            view: largest.map_or("", |(view, _)| view.as_str()),
            surprise_bits: SurpriseBits { total, peak, fields, new_pairs, new_words },
            mean_bits: mean_bits(unit),
            expected_mean_bits: ratio(u128::from(ranges.expected), 1 << 16),
            words: unit.words.words,
            new_words: unit.words.new_words,
            new_pairs: unit.words.new_pairs,
            max_excess_bits: bits(i128::from(unit.max_excess())),
        }
    }
}

impl Metrics {
    pub(crate) fn new(bytes: u64, cost: u64, skipped_bytes: u64, units: u32) -> Self {
        Self {
            bytes,
            code_length_bits: bits(i128::from(cost)),
            bits_per_byte: ratio(u128::from(cost), u128::from(bytes) * 256),
            compression_ratio: ratio(u128::from(bytes) * 8 * 256, u128::from(cost)),
            skipped_bytes,
            units,
        }
    }
}

impl Span {
    pub(crate) fn new(span: &ExcessSpan, expected: u32) -> Self {
        let length = u128::from(span.end - span.start);
        Self {
            start: span.start,
            end: span.end,
            body_start: span.body_start,
            body_end: span.body_end,
            bits: bits(i128::from(span.cost)),
            expected_bits: ratio(length * u128::from(expected), 1 << 16),
        }
    }
}

pub(crate) fn p_value(p: PValue) -> f64 {
    f64::from(p.ceil_ppm()) / 1e6
}

pub(crate) fn alpha(ppm: u32) -> f64 {
    f64::from(ppm) / 1e6
}
