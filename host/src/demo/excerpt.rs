//! The surprising part of a message, cut out of its surroundings for a terminal.
//!
//! A verdict holds offsets, not text. [`unit_text`] reads the unit again from the recorded message
//! with the filter's own parser, so the offsets fit by construction; [`Excerpt`] cuts a few lines
//! around the costliest span. Control characters are made visible, since the text may be hostile to
//! the terminal that shows it. Cost: one parse of the message, only for what is reported.

use crate::capture::Exchange;
use crate::explain::unit_texts;
use crate::synth::Direction;

/// Characters shown before and after the surprising part, and of that part itself.
const AROUND_CHARS: usize = 60;
const INSIDE_CHARS: usize = 220;

/// A stretch of text and what stands around it; each part is one line, escaped for a terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Excerpt {
    pub(super) before: String,
    pub(super) inside: String,
    pub(super) after: String,
}

impl Excerpt {
    /// Cuts bytes `start..end` of `text`. Offsets that fall into a character take it whole; offsets
    /// beyond the text are its end.
    pub(super) fn cut(text: &[u8], start: usize, end: usize) -> Self {
        let end = end.min(text.len());
        let start = start.min(end);
        let before = String::from_utf8_lossy(&text[..start]);
        let inside = String::from_utf8_lossy(&text[start..end]);
        let after = String::from_utf8_lossy(&text[end..]);
        let skip = before.chars().count().saturating_sub(AROUND_CHARS);
        let mut lead: String = before.chars().skip(skip).collect();
        if skip > 0 {
            lead.insert(0, '…');
        }
        let shown = shorten(&inside, INSIDE_CHARS);
        // What follows a part that is not shown to its end would read as its continuation.
        let after = if shown.len() < inside.len() { String::new() } else { shorten(&after, AROUND_CHARS) };
        Self { before: visible(&lead), inside: visible(&shown), after: visible(&after) }
    }
}

fn shorten(text: &str, chars: usize) -> String {
    let mut short: String = text.chars().take(chars).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Line breaks as `⏎`, tabs as spaces, any other control character as `�`: no escape sequence gets
/// through to the terminal.
fn visible(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' => '⏎',
            '\t' => ' ',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// The text of one content unit; `None` if the message has no such unit.
pub(super) fn unit_text(
    exchange: &Exchange,
    direction: Direction,
    role: &str,
    index: u16,
) -> Option<Vec<u8>> {
    let [request, response] = unit_texts(exchange, &[]);
    let texts = match direction {
        Direction::Request => request,
        Direction::Response => response,
    };
    let wanted = texts.into_iter().find(|text| text.unit.role.as_str() == role && text.unit.index == index);
    wanted.map(|text| text.text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::{SynthOptions, generate};

    #[test]
    fn a_cut_keeps_the_inside_and_shortens_the_rest() {
        let long = Excerpt::cut("x".repeat(500).as_bytes(), 0, 400);
        assert_eq!((long.inside, long.after), (format!("{}…", "x".repeat(INSIDE_CHARS)), String::new()));
        let text = format!("{}<b>evil\x1b[31m\n</b>{}", "a".repeat(100), "z".repeat(100));
        let excerpt = Excerpt::cut(text.as_bytes(), 100, text.len() - 100);
        assert_eq!(excerpt.inside, "<b>evil\u{fffd}[31m⏎</b>");
        assert_eq!(excerpt.before, format!("…{}", "a".repeat(AROUND_CHARS)));
        assert_eq!(excerpt.after, format!("{}…", "z".repeat(AROUND_CHARS)));
    }

    #[test]
    fn offsets_beyond_the_text_are_its_end() {
        let excerpt = Excerpt::cut("é".as_bytes(), 1, 99);
        assert_eq!((excerpt.after.as_str(), excerpt.inside.chars().count()), ("", 1));
        assert_eq!(Excerpt::cut(b"ab", 7, 9).before, "ab");
    }

    #[test]
    fn the_generators_spans_lie_in_the_parsers_units() {
        let run = generate(&SynthOptions { count: 0, anomalies: 60, ..SynthOptions::default() });
        for labelled in run {
            for span in &labelled.spans {
                let unit = unit_text(&labelled.exchange, span.direction, &span.unit, span.index as u16)
                    .expect("the unit exists");
                // All of a swapped model's envelope is injected: its span ends with the body, the envelope before.
                let whole = span.unit == "envelope" && span.start == 0 && span.end >= unit.len();
                let end = if whole { unit.len() } else { span.end };
                let inside = String::from_utf8(unit[span.start..end].to_vec()).expect("whole characters");
                match labelled.label.as_str() {
                    "sql_injection" => assert!(!inside.starts_with("GET") && inside.len() < 200, "{inside}"),
                    "model_swap" => assert!(whole || span.end == unit.len(), "{span:?} of {}", unit.len()),
                    "repetition" if span.unit == "envelope" => assert_eq!(inside, "length"),
                    "repetition" => assert_eq!(span.end, unit.len()),
                    _ => assert!(inside.len() > 100, "{inside}"),
                }
            }
        }
    }
}
