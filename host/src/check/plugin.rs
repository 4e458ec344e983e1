//! One plugin configuration, as the filter itself reads it, with the line of what it refuses.
//!
//! The parser is the filter's own ([`Config::parse`]), so that this says nothing that the filter would not.
//! It names a field; the tree of `node.rs` says where that field stands. A configuration inside a string
//! (Envoy's `StringValue`) is a document of its own: its lines are counted from the string's.

use driftlock_inspect::config::Config;

use super::node::{Node, Place, Value};
use super::{Report, join};

/// Checks a configuration written as part of the document. Returns it where it is usable.
pub(super) fn check_node(node: &Node, path: &str, report: &mut Report) -> Option<serde_json::Value> {
    let json = node.to_json();
    parse(json.to_string().as_bytes(), path, report, |field| node.place_of(field)).then_some(json)
}

/// Checks a configuration written as JSON in a string. `text` is the whole file.
pub(super) fn check_string(
    node: &Node,
    value: &str,
    path: &str,
    text: &str,
    report: &mut Report,
) -> Option<serde_json::Value> {
    // A literal block (`|`) keeps its lines, and its place is that of its first character; in every other
    // style only the string's place is sure.
    let above = usize::try_from(node.place.line.saturating_sub(2)).ok().and_then(|at| text.lines().nth(at));
    let block = above.is_some_and(|line| line.trim_end().trim_end_matches(['-', '+']).ends_with('|'));
    let inner = Node::documents(value).ok().and_then(|mut documents| documents.pop()).filter(|_| block);
    let place = |field: &str| match &inner {
        Some(inner) => {
            let Place { line, column } = inner.place_of(field);
            Place { line: node.place.line + line - 1, column: node.place.column + column - 1 }
        }
        None => node.place,
    };
    parse(value.as_bytes(), path, report, place)
        .then(|| serde_json::from_str(value).unwrap_or(serde_json::Value::Null))
}

/// Checks a configuration that is bytes.
pub(super) fn check_bytes(node: &Node, bytes: &[u8], path: &str, report: &mut Report) {
    parse(bytes, path, report, |_| node.place);
}

/// What is looked at has to be an object: the filter is given it as such.
pub(super) fn is_object(node: &Node) -> bool {
    matches!(node.value, Value::Map(_))
}

fn parse(bytes: &[u8], path: &str, report: &mut Report, place: impl Fn(&str) -> Place) -> bool {
    match Config::parse(bytes) {
        Ok(config) => {
            let under = if path.is_empty() { String::new() } else { format!(", at {path}") };
            report.checked.push(format!("plugin configuration {:?}{under}", config.name));
            true
        }
        Err(error) => {
            // "plugin configuration, at FIELD: REASON", or without a field.
            let text = error.to_string();
            let text = text.strip_prefix("plugin configuration").unwrap_or(&text);
            let (field, reason) = match text.strip_prefix(", at ").and_then(|rest| rest.split_once(": ")) {
                Some((field, reason)) => (field, reason),
                None => ("", text.trim_start_matches([':', ' '])),
            };
            // serde's own place is one in the JSON that was made for it.
            let reason = reason.rfind(" at line ").map_or(reason, |at| &reason[..at]);
            let named = if matches!(field, "the top" | "the end") { "" } else { field };
            report.error(place(named), join_field(path, named), reason);
            false
        }
    }
}

/// The configuration's own fields are set apart from the document's.
fn join_field(path: &str, field: &str) -> String {
    match (path, field) {
        ("", field) => field.to_owned(),
        (path, "") => path.to_owned(),
        (path, field) => join(path, field),
    }
}
