//! A JSON writer that imitates other people's clients.
//!
//! The same document leaves a Python, a Node and a Go client as different bytes: spaces after
//! separators, `\u00e9` against `é`, `\u003c` against `<`. `serde_json` writes one form and may
//! reorder keys, so the generator writes its own and tests it against `serde_json` as the reader
//! (RFC 8259). Keys keep the order in which they are given. Numbers are text, so no float is ever
//! formatted.

use std::fmt::Write as _;

/// A JSON value; object keys keep their order.
#[derive(Clone, Debug)]
pub(super) enum Json {
    Null,
    Bool(bool),
    /// A number as it is to be written.
    Number(String),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(&'static str, Json)>),
}

impl Json {
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    pub(super) fn int(n: u64) -> Self {
        Self::Number(n.to_string())
    }

    pub(super) fn write(&self, style: Style) -> String {
        let mut out = String::new();
        self.write_at(style, 0, &mut out);
        out
    }

    fn write_at(&self, style: Style, depth: usize, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(true) => out.push_str("true"),
            Self::Bool(false) => out.push_str("false"),
            Self::Number(n) => out.push_str(n),
            Self::Text(text) => write_text(text, style.escape, out),
            Self::List(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    style.before_item(i, depth + 1, out);
                    item.write_at(style, depth + 1, out);
                }
                style.before_close(items.is_empty(), depth, out);
                out.push(']');
            }
            Self::Object(fields) => {
                out.push('{');
                for (i, (key, value)) in fields.iter().enumerate() {
                    style.before_item(i, depth + 1, out);
                    write_text(key, style.escape, out);
                    out.push(':');
                    if style.layout != Layout::Compact {
                        out.push(' ');
                    }
                    value.write_at(style, depth + 1, out);
                }
                style.before_close(fields.is_empty(), depth, out);
                out.push('}');
            }
        }
    }
}

/// How a client lays a document out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) layout: Layout,
    pub(super) escape: Escape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// No white space (JavaScript, Go, newer httpx).
    Compact,
    /// `", "` and `": "` (Python's `json.dumps`).
    Spaced,
    /// One field a line, two spaces deep (OpenAI's own responses).
    Indented,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Escape {
    /// Only what RFC 8259 section 7 demands.
    Minimal,
    /// Everything outside ASCII as `\uXXXX` (Python's default).
    Ascii,
    /// Also `<`, `>` and `&` (Go's `encoding/json`).
    Html,
}

pub(super) const COMPACT: Style = Style { layout: Layout::Compact, escape: Escape::Minimal };
pub(super) const INDENTED: Style = Style { layout: Layout::Indented, escape: Escape::Minimal };

impl Style {
    fn before_item(self, index: usize, depth: usize, out: &mut String) {
        if index > 0 {
            out.push(',');
        }
        match self.layout {
            Layout::Compact => {}
            Layout::Spaced if index > 0 => out.push(' '),
            Layout::Spaced => {}
            Layout::Indented => new_line(depth, out),
        }
    }

    fn before_close(self, empty: bool, depth: usize, out: &mut String) {
        if self.layout == Layout::Indented && !empty {
            new_line(depth, out);
        }
    }
}

fn new_line(depth: usize, out: &mut String) {
    out.push('\n');
    for _ in 0..depth {
        out.push_str("  ");
    }
}

fn write_text(text: &str, escape: Escape, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if u32::from(c) < 0x20 => write_unit(u32::from(c) as u16, out),
            '<' | '>' | '&' if escape == Escape::Html => write_unit(u32::from(c) as u16, out),
            c if !c.is_ascii() && escape == Escape::Ascii => {
                let mut units = [0u16; 2];
                for unit in c.encode_utf16(&mut units) {
                    write_unit(*unit, out);
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

fn write_unit(unit: u16, out: &mut String) {
    // Writing to a String cannot fail.
    let _ = write!(out, "\\u{unit:04x}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_style_reads_back_as_the_same_document() {
        let document = Json::Object(vec![
            ("z", Json::text("a \"quoted\" <b> & \\ line\nnext\ttab \u{1} é 🚀")),
            ("a", Json::List(vec![Json::int(7), Json::Null, Json::Bool(true), Json::Number("0.2".into())])),
            ("empty", Json::List(vec![])),
            ("none", Json::Object(vec![])),
        ]);
        let expected = serde_json::json!({
            "z": "a \"quoted\" <b> & \\ line\nnext\ttab \u{1} é 🚀", "a": [7, null, true, 0.2], "empty": [], "none": {}
        });
        let mut forms = Vec::new();
        for layout in [Layout::Compact, Layout::Spaced, Layout::Indented] {
            for escape in [Escape::Minimal, Escape::Ascii, Escape::Html] {
                let text = document.write(Style { layout, escape });
                let read: serde_json::Value = serde_json::from_str(&text).unwrap();
                assert_eq!(read, expected, "{layout:?} {escape:?}");
                assert!(text.find("\"z\"") < text.find("\"a\""), "keys keep their order");
                forms.push(text);
            }
        }
        forms.sort();
        forms.dedup();
        assert_eq!(forms.len(), 9, "the styles differ");
    }
}
