//! Verdicts to JSON text, the bytes that serde_json would write.
//!
//! What: a verdict's fields one after the other. Why: every message gives a verdict, and on short ones
//! writing it by serde_json cost half as much as scoring them; here names of fields are constants, and
//! nearly all decimals are whole thousandths or millionths, so that neither a table of escapes nor a search
//! for the shortest digits is needed. A property test holds it to what serde_json makes of the same verdict.
//!
//! Cost: about half a nanosecond a byte. Left out on purpose: every other type; those are serde_json's.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::{Metrics, Scores, Span, UnitSummary, Verdict};

/// What a verdict takes, nearly always.
const USUAL_BYTES: usize = 1024;

/// Appends the JSON text of a verdict.
pub(super) fn append(verdict: &Verdict, out: &mut Vec<u8>) {
    out.reserve(USUAL_BYTES);
    Text(out).verdict(verdict);
}

/// The JSON text of a verdict.
pub(super) fn write(verdict: &Verdict) -> String {
    let mut out = Vec::new();
    append(verdict, &mut out);
    // All that is written is ASCII or was a str.
    String::from_utf8(out).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

struct Text<'a>(&'a mut Vec<u8>);

impl Text<'_> {
    fn verdict(&mut self, verdict: &Verdict) {
        let Verdict { stream, unit, unit_index, outcome, reason, p_value, p_fraction, alpha, .. } = verdict;
        let Verdict { scores, metrics, spans, units, baseline, engine_version, .. } = verdict;
        self.raw(b"{\"stream\":");
        self.string(stream);
        if let Some(unit) = unit {
            self.raw(b",\"unit\":");
            self.string(unit);
        }
        if let Some(index) = unit_index {
            self.raw(b",\"unit_index\":");
            self.whole((*index).into());
        }
        self.raw(b",\"outcome\":");
        self.string(outcome.as_str());
        if let Some(reason) = reason {
            self.raw(b",\"reason\":");
            self.string(reason);
        }
        if let Some(p) = p_value {
            self.raw(b",\"p_value\":");
            self.number(*p);
        }
        if let Some([rank, of]) = p_fraction {
            self.raw(b",\"p_fraction\":[");
            self.whole((*rank).into());
            self.raw(b",");
            self.whole((*of).into());
            self.raw(b"]");
        }
        self.raw(b",\"alpha\":");
        self.number(*alpha);
        if let Some(scores) = scores {
            self.scores(scores);
        }
        self.metrics(metrics);
        self.raw(b",\"spans\":");
        self.list(spans, Self::span);
        self.raw(b",\"units\":");
        self.list(units, Self::unit);
        if let Some(baseline) = baseline {
            self.raw(b",\"baseline\":");
            self.string(baseline);
        }
        self.raw(b",\"engine_version\":");
        self.string(engine_version);
        self.raw(b"}");
    }

    fn scores(&mut self, scores: &Scores) {
        self.raw(b",\"scores\":{");
        if let Some(statistic) = scores.statistic {
            self.raw(b"\"statistic\":");
            self.number(statistic);
            self.raw(b",");
        }
        self.raw(b"\"view\":");
        self.string(scores.view);
        let surprise = &scores.surprise_bits;
        self.raw(b",\"surprise_bits\":{\"total\":");
        self.number(surprise.total);
        self.raw(b",\"peak\":");
        self.number(surprise.peak);
        self.raw(b",\"fields\":");
        self.number(surprise.fields);
        self.raw(b",\"new_pairs\":");
        self.number(surprise.new_pairs);
        self.raw(b",\"new_words\":");
        self.number(surprise.new_words);
        self.raw(b"},\"mean_bits\":");
        self.number(scores.mean_bits);
        self.raw(b",\"expected_mean_bits\":");
        self.number(scores.expected_mean_bits);
        self.raw(b",\"words\":");
        self.whole(scores.words.into());
        self.raw(b",\"new_words\":");
        self.whole(scores.new_words.into());
        self.raw(b",\"new_pairs\":");
        self.whole(scores.new_pairs.into());
        self.raw(b",\"max_excess_bits\":");
        self.number(scores.max_excess_bits);
        self.raw(b"}");
    }

    fn metrics(&mut self, metrics: &Metrics) {
        self.raw(b",\"metrics\":{\"bytes\":");
        self.whole(metrics.bytes);
        self.raw(b",\"code_length_bits\":");
        self.number(metrics.code_length_bits);
        self.raw(b",\"bits_per_byte\":");
        self.number(metrics.bits_per_byte);
        self.raw(b",\"compression_ratio\":");
        self.number(metrics.compression_ratio);
        self.raw(b",\"skipped_bytes\":");
        self.whole(metrics.skipped_bytes);
        self.raw(b",\"units\":");
        self.whole(metrics.units.into());
        self.raw(b"}");
    }

    fn span(&mut self, span: &Span) {
        self.raw(b"{\"start\":");
        self.whole(span.start);
        self.raw(b",\"end\":");
        self.whole(span.end);
        self.raw(b",\"body_start\":");
        self.whole(span.body_start);
        self.raw(b",\"body_end\":");
        self.whole(span.body_end);
        self.raw(b",\"bits\":");
        self.number(span.bits);
        self.raw(b",\"expected_bits\":");
        self.number(span.expected_bits);
        self.raw(b"}");
    }

    fn unit(&mut self, unit: &UnitSummary) {
        self.raw(b"{\"unit\":");
        self.string(unit.unit);
        self.raw(b",\"index\":");
        self.whole(unit.index.into());
        self.raw(b",\"bytes\":");
        self.whole(unit.bytes);
        self.raw(b",\"mean_bits\":");
        self.number(unit.mean_bits);
        if let Some(statistic) = unit.statistic {
            self.raw(b",\"statistic\":");
            self.number(statistic);
        }
        self.raw(b"}");
    }

    fn list<T>(&mut self, items: &[T], mut write: impl FnMut(&mut Self, &T)) {
        self.raw(b"[");
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                self.raw(b",");
            }
            write(self, item);
        }
        self.raw(b"]");
    }

    /// Inlined, a constant's bytes are written by a few moves.
    #[inline(always)]
    fn raw(&mut self, text: &[u8]) {
        self.0.extend_from_slice(text);
    }

    fn number(&mut self, value: f64) {
        if !value.is_finite() {
            self.raw(b"null");
        } else if !self.decimal(value) {
            // Of these two, only the second writes exponents, and below 1e-4 already.
            let plain = (1e-5..1e-4).contains(&value.abs());
            let text = if plain { format!("{value}") } else { format!("{value:?}") };
            match text.split_once('e') {
                Some((digits, exponent)) if !exponent.starts_with('-') => {
                    self.raw(digits.as_bytes());
                    self.raw(b"e+");
                    self.raw(exponent.as_bytes());
                }
                _ => self.raw(text.as_bytes()),
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.0.push(b'"');
        // All of it, without stopping early: many bytes at once.
        let plain = |plain, byte| plain & (byte >= b' ') & (byte != b'"') & (byte != b'\\');
        if text.bytes().fold(true, plain) {
            self.raw(text.as_bytes());
        } else {
            text.bytes().for_each(|byte| self.escaped(byte));
        }
        self.0.push(b'"');
    }

    fn escaped(&mut self, byte: u8) {
        let short = match byte {
            b'"' | b'\\' => byte,
            0x08 => b'b',
            0x09 => b't',
            0x0a => b'n',
            0x0c => b'f',
            0x0d => b'r',
            0..0x20 => {
                let digit = |nibble: u8| if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
                return self.raw(&[b'\\', b'u', b'0', b'0', digit(byte >> 4), digit(byte & 15)]);
            }
            _ => return self.0.push(byte),
        };
        self.raw(&[b'\\', short]);
    }

    fn whole(&mut self, mut number: u64) {
        let digit = |one: u64| b'0' + (number / one % 10) as u8;
        match number {
            0..10 => return self.0.push(digit(1)),
            10..100 => return self.raw(&[digit(10), digit(1)]),
            100..1000 => return self.raw(&[digit(100), digit(10), digit(1)]),
            _ => {}
        }
        let mut digits = [0; 20];
        let mut len = 0;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
            len += 1;
            if number == 0 {
                break;
            }
        }
        self.raw(digits.get(digits.len() - len..).unwrap_or_default());
    }

    /// The shortest decimal that reads as this f64. One of at most fifteen digits is the only one so short,
    /// so where `number` is the f64 nearest to n/1000, that is what is written.
    fn decimal(&mut self, number: f64) -> bool {
        if number == 0.0 && number.is_sign_positive() {
            self.raw(b"0.0");
            return true;
        }
        // Smaller ones have an exponent, larger ones more digits.
        if !(1e-5..1e8).contains(&number) {
            return false;
        }
        // Signed, as that is what processors convert.
        let thousandths = (number * 1e3 + 0.5) as i64;
        if thousandths as f64 / 1e3 == number {
            self.whole(thousandths as u64 / 1000);
            let place = |one: u32| (thousandths as u64 % 1000) as u32 / one % 10;
            self.places([place(100), place(10), place(1)]);
            return true;
        }
        let millionths = (number * 1e6 + 0.5) as i64;
        if millionths as f64 / 1e6 == number {
            self.whole(millionths as u64 / 1_000_000);
            let place = |one: u32| (millionths as u64 % 1_000_000) as u32 / one % 10;
            self.places([place(100_000), place(10_000), place(1000), place(100), place(10), place(1)]);
            return true;
        }
        false
    }

    /// The digits behind the point, without zeros at the end but the first.
    fn places<const N: usize>(&mut self, digits: [u32; N]) {
        let dropped = digits.iter().skip(1).rev().take_while(|&&digit| digit == 0).count();
        self.0.push(b'.');
        // All of them and then fewer: a few moves.
        self.raw(&digits.map(|digit| b'0' + digit as u8));
        self.0.truncate(self.0.len() - dropped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::{Outcome, SurpriseBits};
    use proptest::prelude::*;

    /// Between these, a number can lie in the middle of two decimals of equal length, the shortest that read as
    /// it; core takes the upper, serde_json the even one. No verdict has so many bits.
    fn untied(number: &f64) -> bool {
        !(1e12..1e25).contains(&number.abs())
    }

    fn number() -> impl Strategy<Value = f64> {
        prop_oneof![
            any::<f64>().prop_filter("a tie", untied),
            any::<u64>().prop_map(f64::from_bits).prop_filter("a tie", untied),
            (0u64..1 << 49).prop_map(|n| n as f64 / 1000.0),
            (0u64..1 << 22).prop_map(|n| n as f64 / 1000.0),
            (0u64..1 << 22).prop_map(|n| n as f64 / 1e6),
            // Neighbours of decimals.
            (0u64..1 << 22, -2i64..3).prop_map(|(n, off)| {
                f64::from_bits((n as f64 / 1000.0).to_bits().saturating_add_signed(off) & !(1 << 63))
            }),
            (0u32..4000, -9i32..18).prop_map(|(n, exponent)| f64::from(n) * 10f64.powi(exponent)),
            Just(-0.0),
        ]
    }

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![".{0,12}", "[\\x00-\\x7f]{0,12}"]
    }

    fn name() -> impl Strategy<Value = &'static str> {
        prop::sample::select(&["user", "tool_call", "a\"b", "", "new_pairs"][..])
    }

    prop_compose! {
        fn scores()(
            statistic in prop::option::of(number()), view in name(), bits in prop::array::uniform8(number()),
            (words, new_words, new_pairs) in any::<(u32, u32, u32)>(),
        ) -> Scores {
            let [total, peak, fields, pairs, new, mean_bits, expected_mean_bits, max_excess_bits] = bits;
            let surprise_bits = SurpriseBits { total, peak, fields, new_pairs: pairs, new_words: new };
            Scores {
                statistic, view, surprise_bits, mean_bits, expected_mean_bits, words, new_words, new_pairs,
                max_excess_bits,
            }
        }
    }

    prop_compose! {
        fn metrics()(
            (bytes, skipped_bytes, units) in any::<(u64, u64, u32)>(),
            (code_length_bits, bits_per_byte, compression_ratio) in (number(), number(), number()),
        ) -> Metrics {
            Metrics { bytes, code_length_bits, bits_per_byte, compression_ratio, skipped_bytes, units }
        }
    }

    prop_compose! {
        fn span()(
            (start, end, body_start, body_end) in any::<(u64, u64, u64, u64)>(),
            (bits, expected_bits) in (number(), number()),
        ) -> Span { Span { start, end, body_start, body_end, bits, expected_bits } }
    }

    prop_compose! {
        fn unit()(
            unit in name(), (index, bytes) in any::<(u16, u64)>(), mean_bits in number(),
            statistic in prop::option::of(number()),
        ) -> UnitSummary { UnitSummary { unit, index, bytes, mean_bits, statistic } }
    }

    prop_compose! {
        fn verdict()(
            (stream, reason, baseline) in (text(), prop::option::of(text()), prop::option::of(text())),
            (unit_name, unit_index) in (prop::option::of(name()), any::<Option<u16>>()),
            outcome in prop::sample::select(
                &[Outcome::Normal, Outcome::WarmingUp, Outcome::NotInspected, Outcome::Anomalous][..]
            ),
            (p_value, p_fraction, alpha) in (prop::option::of(number()), any::<Option<[u32; 2]>>(), number()),
            (scores, metrics) in (prop::option::of(scores()), metrics()),
            (spans, units) in (prop::collection::vec(span(), 0..4), prop::collection::vec(unit(), 0..4)),
        ) -> Verdict {
            Verdict {
                stream, unit: unit_name, unit_index, outcome, reason, p_value, p_fraction, alpha, scores, metrics,
                spans, units, baseline, engine_version: crate::ENGINE_VERSION,
            }
        }
    }

    proptest! {
        #[test]
        fn the_text_is_serde_jsons(verdict in verdict()) {
            prop_assert_eq!(write(&verdict), serde_json::to_string(&verdict).unwrap());
        }
    }
}
