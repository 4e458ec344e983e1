//! The verdict: one schema for headers, logs, files and APIs.
//!
//! What: [`Verdict`] is what the detector says of one message, with the numbers behind it. It
//! serialises by serde; numbers leave the engine's fixed point only here, each as the nearest f64 of an
//! exact decimal or binary fraction, so the JSON text is the same on every target.
//!
//! Cost: a few small allocations a message, none a byte.
//!
//! `evidence.schema.json` beside this file is its JSON Schema ([`SCHEMA`]); [`Verdict::sentences`] says the
//! same in plain words.
//!
//! Left out on purpose: the text of the message. A verdict can be stored and sent where the message
//! may not be; offsets say where to look.

mod json;

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use serde::Serialize;

use crate::calibrate::{PValue, Surprises, UNIT_SCORE, UNSEEN_UNIT, View};
use crate::score::{ExcessSpan, UnitScores};

/// JSON Schema (draft 2020-12) of a [`Verdict`].
pub const SCHEMA: &str = include_str!("evidence.schema.json");

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

impl Verdict {
    /// The verdict as compact JSON: what serde_json makes of it, sooner.
    pub fn to_json(&self) -> String {
        json::write(self)
    }

    /// Appends it to `out`.
    pub fn append_json(&self, out: &mut Vec<u8>) {
        json::append(self, out);
    }

    /// The verdict in plain sentences, for a person who has the message but not this project's words.
    ///
    /// Without the text of the message, as the verdict itself; [`crate::baseline::UnitBaseline::likeliest`]
    /// says what the baseline would have expected in a span's place.
    pub fn sentences(&self) -> Vec<String> {
        let mut out = Vec::new();
        let stream = &self.stream;
        out.push(match (self.outcome, self.p_fraction, &self.reason) {
            (Outcome::Anomalous, Some([rank, of]), _) => {
                let (stranger, calibrated) = (rank.saturating_sub(1), of.saturating_sub(1));
                format!(
                    "Anomalous: of {calibrated} held-out normal messages of {stream}, {stranger} are at least as strange (p = {rank}/{of}, at most alpha = {}).",
                    self.alpha
                )
            }
            (Outcome::Normal, Some([rank, of]), _) => {
                let (stranger, calibrated) = (rank.saturating_sub(1), of.saturating_sub(1));
                format!(
                    "Normal: of {calibrated} held-out normal messages of {stream}, {stranger} are at least as strange (p = {rank}/{of}, above alpha = {}).",
                    self.alpha
                )
            }
            (Outcome::WarmingUp, _, reason) => {
                format!("Not judged: {stream} is still learning what is normal ({}).", reason.as_deref().unwrap_or("no calibration yet"))
            }
            (outcome, _, reason) => {
                format!("{}: {stream}, {}.", outcome.as_str(), reason.as_deref().unwrap_or("no reason given"))
            }
        });
        if matches!(self.outcome, Outcome::Anomalous | Outcome::Normal)
            && let Some(reason) = &self.reason
        {
            out.push(format!("A part of it was not inspected ({reason})."));
        }
        let Some(unit) = self.unit else { return out };
        let index = self.unit_index.unwrap_or(0);
        let Some(scores) = &self.scores else {
            out.push(format!("Its unit {unit} #{index} is of a kind that the baseline has never seen."));
            return out;
        };
        if scores.statistic.is_some() {
            let bits = scores.surprise_bits.of(scores.view);
            let why = match scores.view {
                "total" => "its text as a whole costs more than normal text of its length".to_owned(),
                "peak" => "a few of its bytes are very unlike what stands there normally".to_owned(),
                "fields" => "values in it are unlike what stands in those fields normally".to_owned(),
                "new_pairs" => {
                    format!("{} pairs of familiar words in it never stood side by side", scores.new_pairs)
                }
                _ => format!("{} of its {} words are new", scores.new_words, scores.words),
            };
            out.push(format!(
                "Its strangest unit is {unit} #{index}: {why}; one normal unit in {} has as much ({bits} bits of surprise).",
                one_in(bits)
            ));
        }
        out.push(format!(
            "It costs {} bits a byte where {} are normal.",
            scores.mean_bits, scores.expected_mean_bits
        ));
        for span in &self.spans {
            out.push(format!(
                "Bytes {}-{} of the unit cost {} bits where so many bytes of normal text cost {}.",
                span.start, span.end, span.bits, span.expected_bits
            ));
        }
        out
    }
}

/// 2^bits, as people say it.
fn one_in(bits: f64) -> String {
    match bits {
        bits if bits >= 40.0 => "more than 10^12".to_owned(),
        // A cast of a bounded positive number; the power by shifts, so that every target agrees.
        bits => format!("{}", 1u64 << (bits.max(0.0) as u32)),
    }
}

/// How many units a verdict lists.
pub const MAX_UNITS: usize = 8;

/// Scores of a unit; see [`crate::score`] for the formulas.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// The largest surprise among the views and a quarter of what new pairs and new words have, bits, with an
    /// eight-thousandth of all. Absent for a kind of unit that the baseline has never seen.
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
    /// The code length of the whole; beyond what n held-out units can tell, log2(n + 1), a quarter counts.
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

impl SurpriseBits {
    /// Of the view with this name, see [`View::as_str`].
    fn of(&self, view: &str) -> f64 {
        match view {
            "total" => self.total,
            "peak" => self.peak,
            "fields" => self.fields,
            "new_pairs" => self.new_pairs,
            _ => self.new_words,
        }
    }
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
    // A word goes into a float by one instruction, two by many; the nearest float is the same.
    i64::try_from(value).map_or(value as f64, |value| value as f64) / 1000.0
}

/// 1/256 bit to bits, rounded down to a thousandth.
fn bits(fixed: i128) -> f64 {
    thousandths(fixed * 1000 / 256)
}

/// `numerator / denominator` in thousandths, 0 for a zero denominator.
fn ratio(numerator: u128, denominator: u128) -> f64 {
    let thousands = numerator * 1000;
    thousandths(match (u64::try_from(thousands), u64::try_from(denominator)) {
        (Ok(thousands), Ok(denominator)) => thousands.checked_div(denominator).unwrap_or(0).into(),
        _ => thousands.checked_div(denominator).unwrap_or(0) as i128,
    })
}

/// A statistic in units of the common scale; none for an unseen unit.
pub(crate) fn statistic(value: i64) -> Option<f64> {
    (value != UNSEEN_UNIT).then(|| thousandths(i128::from(value) * 1000 / i128::from(UNIT_SCORE)))
}

pub(crate) fn mean_bits(scores: &UnitScores) -> f64 {
    ratio(u128::from(scores.cost), u128::from(scores.bytes) * 256)
}

impl Scores {
    /// `expected`: mean cost of a byte, 1/65536 bit.
    pub(crate) fn new(value: i64, surprises: &Surprises, unit: &UnitScores, expected: u32) -> Self {
        let surprises = *surprises;
        let largest = View::ALL.into_iter().zip(surprises).rev().max_by_key(|(_, surprise)| *surprise);
        let [total, peak, fields, new_pairs, new_words] =
            surprises.map(|surprise| thousandths(i128::from(surprise) * 1000 / i128::from(UNIT_SCORE)));
        Self {
            statistic: statistic(value),
            view: largest.map_or("", |(view, _)| view.as_str()),
            surprise_bits: SurpriseBits { total, peak, fields, new_pairs, new_words },
            mean_bits: mean_bits(unit),
            expected_mean_bits: ratio(u128::from(expected), 1 << 16),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baseline::{Snapshot, TrainingOptions};
    use crate::detector::{Detector, LearningPlan, Settings, UnitId};
    use serde_json::Value;
    use std::collections::BTreeSet;

    /// One verdict of each outcome, and one of an unseen kind of unit.
    fn verdicts() -> Vec<Verdict> {
        let settings = Settings {
            alpha_ppm: 50_000,
            learning: Some(LearningPlan::new(120, 50_000).unwrap()),
            training: TrainingOptions::default(),
            max_streams: 2,
        };
        let mut detector = Detector::new(settings, Snapshot::default());
        let mut send = |name, text: &str, defect: Option<&str>| {
            let mut message = detector.begin("app/request");
            message.text(UnitId { name, index: 0 }, text.as_bytes(), 7, 1 << 14, detector.scratch());
            detector.finish(message, defect.map(ToOwned::to_owned))
        };
        let first = send("user", "where is order 1", None);
        for i in 1..120u32 {
            send("user", &format!("where is order {}", i.wrapping_mul(2_654_435_761) >> 22), None);
        }
        let mut all = std::vec![first, send("user", "where is order 77", None)];
        all.push(send("user", "where is <script>alert(1)</script>", None));
        all.push(send("user", "where is order 5", Some("cut_short")));
        all.push(send("tool", "rm -rf", None));
        all
    }

    /// Does `value` have the keys and types that `schema` gives?
    fn conforms(value: &Value, schema: &Value, path: &str) {
        let types: Vec<&str> = match &schema["type"] {
            Value::String(one) => std::vec![one.as_str()],
            Value::Array(some) => some.iter().filter_map(Value::as_str).collect(),
            _ => panic!("{path}: the schema has no type"),
        };
        let is = |kind: &str| match kind {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "integer" => value.is_u64(),
            "number" => value.is_number(),
            other => panic!("{path}: no such type: {other}"),
        };
        assert!(types.iter().any(|kind| is(kind)), "{path}: {value} is no {types:?}");
        if let Some(allowed) = schema["enum"].as_array() {
            assert!(allowed.contains(value), "{path}: {value}");
        }
        if let Some(object) = value.as_object() {
            assert_eq!(schema["additionalProperties"], Value::Bool(false), "{path}");
            for required in schema["required"].as_array().unwrap() {
                assert!(object.contains_key(required.as_str().unwrap()), "{path}: no {required}");
            }
            for (key, value) in object {
                assert!(!schema["properties"][key].is_null(), "{path}: {key} is not in the schema");
                conforms(value, &schema["properties"][key], &format!("{path}.{key}"));
            }
        }
        for value in value.as_array().into_iter().flatten() {
            conforms(value, &schema["items"], &format!("{path}[]"));
        }
    }

    #[test]
    fn verdicts_conform_to_the_schema_and_use_all_of_it() {
        let schema: Value = serde_json::from_str(SCHEMA).unwrap();
        let mut seen = BTreeSet::new();
        for verdict in verdicts() {
            let json = serde_json::to_value(&verdict).unwrap();
            conforms(&json, &schema, "verdict");
            seen.extend(json.as_object().unwrap().keys().cloned());
        }
        let known: BTreeSet<String> = schema["properties"].as_object().unwrap().keys().cloned().collect();
        assert_eq!(seen, known, "the schema names what no verdict has");
    }

    #[test]
    fn sentences_say_what_the_verdict_says() {
        let said: Vec<String> = verdicts().iter().map(|verdict| verdict.sentences().join(" ")).collect();
        let [warming, normal, anomalous, cut, unseen] = &said[..] else { panic!("{said:?}") };
        assert!(warming.contains("still learning") && warming.contains("learning 1/120"), "{warming}");
        assert!(normal.starts_with("Normal: of ") && normal.contains("app/request"), "{normal}");
        assert!(
            anomalous.starts_with("Anomalous: of ") && anomalous.contains("0 are at least as strange"),
            "{anomalous}"
        );
        assert!(anomalous.contains("cost ") && anomalous.contains("user #0"), "{anomalous}");
        assert!(cut.contains("cut_short"), "{cut}");
        assert!(unseen.contains("tool #0 is of a kind that the baseline has never seen"), "{unseen}");
        // The view's own surprise, not the statistic, which has the words' too.
        let mut views = 0;
        for (verdict, said) in verdicts().iter().zip(&said) {
            let scores = serde_json::to_value(verdict.scores).unwrap();
            if let (Some(view), Some(_)) = (scores["view"].as_str(), verdict.scores.and_then(|s| s.statistic))
            {
                assert!(
                    said.contains(&format!("({} bits of surprise)", scores["surprise_bits"][view])),
                    "{said}"
                );
                views += 1;
            }
        }
        assert_eq!(views, 3);
    }
}
