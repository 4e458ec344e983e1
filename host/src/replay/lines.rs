//! A recording's line of verdicts: made, counted, digested.
//!
//! Every recording of a capture gives exactly one line, in order: `{"id":…,"unix_ns":…,"request":{…},
//! "response":{…}}` with the verdicts as the filter wrote them (a message without a body to judge has
//! none), the same with a `failure` where the exchange could not be sent, or `{"error":…}` where the
//! recording could not be read. So the lines are also the run's journal: their number says how far it
//! came. The digest is SHA-256 over the lines, what `sha256sum` prints for the file.
//!
//! Cost: no allocation a line once its buffers have grown.

use std::io::{self, Write};
use std::sync::LazyLock;

use driftlock_engine::evidence::{Outcome, Verdict};
use driftlock_inspect::host::Direction;
use memchr::memmem;

use super::Verdicts;
use crate::capture::Fingerprinter;

/// What one exchange's messages were found to be, in buffers that are used again.
#[derive(Debug, Default)]
pub struct Found {
    request: Message,
    response: Message,
}

/// A verdict's JSON, empty where there is none, and what a run counts of it.
#[derive(Debug, Default)]
struct Message {
    json: Vec<u8>,
    outcome: Option<Outcome>,
    /// It rests on a frozen baseline.
    frozen: bool,
}

impl Message {
    fn set(&mut self, verdict: &Verdict) {
        self.json.clear();
        verdict.append_json(&mut self.json);
        self.outcome = Some(verdict.outcome);
        self.frozen = verdict.baseline.is_some();
    }

    fn read(&mut self, json: &str) {
        self.json.clear();
        self.json.extend_from_slice(json.as_bytes());
        self.outcome = outcome_of(&self.json);
        self.frozen = FIND_BASELINE.rfind(&self.json).is_some();
    }

    fn into_json(self) -> Option<String> {
        // Of what serde_json reads.
        (!self.json.is_empty()).then(|| String::from_utf8_lossy(&self.json).into_owned())
    }
}

impl Found {
    /// Forgets the last exchange.
    pub(super) fn clear(&mut self) {
        self.request.json.clear();
        self.response.json.clear();
    }

    pub(super) fn set(&mut self, direction: Direction, verdict: &Verdict) {
        self.side(direction).set(verdict);
    }

    /// As the filter wrote it.
    pub(super) fn read(&mut self, direction: Direction, json: &str) {
        self.side(direction).read(json);
    }

    fn side(&mut self, direction: Direction) -> &mut Message {
        match direction {
            Direction::Request => &mut self.request,
            Direction::Response => &mut self.response,
        }
    }

    pub(super) fn into_verdicts(self) -> Verdicts {
        Verdicts { request: self.request.into_json(), response: self.response.into_json(), failure: None }
    }

    /// Whether every verdict rests on a frozen baseline, so that it does not depend on what came before.
    pub(super) fn order_free(&self) -> bool {
        [&self.request, &self.response].iter().all(|message| message.json.is_empty() || message.frozen)
    }
}

// None of them can be inside a string of a JSON text: a quote has a backslash before it there.
const OUTCOME: &[u8] = b"\"outcome\":\"";
const BASELINE: &[u8] = b"\"baseline\":\"";
const FAILURE: &[u8] = b"\"failure\":\"";

/// Searching for a few bytes costs less than getting ready to search.
static FIND_OUTCOME: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(OUTCOME));
static FIND_BASELINE: LazyLock<memmem::FinderRev<'static>> =
    LazyLock::new(|| memmem::FinderRev::new(BASELINE));

/// In the order of [`Tally::outcomes`].
const OUTCOMES: [Outcome; 4] =
    [Outcome::Normal, Outcome::WarmingUp, Outcome::NotInspected, Outcome::Anomalous];

/// Of a verdict's JSON.
fn outcome_of(json: &[u8]) -> Option<Outcome> {
    let word = FIND_OUTCOME.find(json).and_then(|at| json.get(at + OUTCOME.len()..))?;
    OUTCOMES.into_iter().find(|outcome| {
        word.strip_prefix(outcome.as_str().as_bytes()).is_some_and(|rest| rest.starts_with(b"\""))
    })
}

/// Counts over lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Exchanges with a line of verdicts, or with a failure.
    pub exchanges: u64,
    /// Messages by outcome: normal, warming_up, not_inspected, anomalous.
    pub outcomes: [u64; 4],
    /// Exchanges that could not take place.
    pub failures: u64,
    /// Recordings that could not be read.
    pub bad_rows: u64,
}

impl Tally {
    pub(super) fn add(&mut self, other: &Self) {
        self.exchanges += other.exchanges;
        self.failures += other.failures;
        self.bad_rows += other.bad_rows;
        self.outcomes.iter_mut().zip(other.outcomes).for_each(|(sum, more)| *sum += more);
    }

    fn count(&mut self, found: Option<Outcome>) {
        for (count, outcome) in self.outcomes.iter_mut().zip(OUTCOMES) {
            *count += u64::from(found == Some(outcome));
        }
    }

    /// Counts a line that was written before; says whether its verdicts are free of what came before.
    pub(super) fn count_line(&mut self, line: &[u8]) -> bool {
        if line.starts_with(b"{\"error\":") {
            self.bad_rows += 1;
            return true;
        }
        self.exchanges += 1;
        let outcomes: Vec<usize> = memmem::find_iter(line, OUTCOME).collect();
        outcomes.iter().for_each(|&at| self.count(outcome_of(&line[at..])));
        self.failures += u64::from(memmem::find(line, FAILURE).is_some());
        memmem::find_iter(line, BASELINE).count() == outcomes.len()
    }
}

fn push_string(line: &mut Vec<u8>, text: &str) {
    if text.bytes().all(|b| b >= b' ' && b != b'"' && b != b'\\') {
        line.push(b'"');
        line.extend_from_slice(text.as_bytes());
        line.push(b'"');
    } else {
        line.extend_from_slice(serde_json::Value::from(text).to_string().as_bytes());
    }
}

fn push_head(line: &mut Vec<u8>, id: &str, unix_ns: Option<u64>) {
    line.extend_from_slice(b"{\"id\":");
    push_string(line, id);
    if let Some(unix_ns) = unix_ns {
        line.extend_from_slice(format!(",\"unix_ns\":{unix_ns}").as_bytes());
    }
}

/// Appends an exchange's line.
pub(super) fn push_found(
    out: &mut Vec<u8>,
    tally: &mut Tally,
    id: &str,
    unix_ns: Option<u64>,
    found: &Found,
) {
    tally.exchanges += 1;
    push_head(out, id, unix_ns);
    for (name, message) in [(&b",\"request\":"[..], &found.request), (b",\"response\":", &found.response)] {
        if !message.json.is_empty() {
            tally.count(message.outcome);
            out.extend_from_slice(name);
            out.extend_from_slice(&message.json);
        }
    }
    out.extend_from_slice(b"}\n");
}

/// Appends the line of an exchange that could not take place.
pub(super) fn push_failure(
    out: &mut Vec<u8>,
    tally: &mut Tally,
    id: &str,
    unix_ns: Option<u64>,
    failure: &str,
) {
    tally.exchanges += 1;
    tally.failures += 1;
    push_head(out, id, unix_ns);
    out.extend_from_slice(b",\"failure\":");
    push_string(out, failure);
    out.extend_from_slice(b"}\n");
}

/// Appends the line of a recording that could not be read.
pub(super) fn push_error(out: &mut Vec<u8>, tally: &mut Tally, error: &str) {
    tally.bad_rows += 1;
    out.extend_from_slice(b"{\"error\":");
    push_string(out, error);
    out.extend_from_slice(b"}\n");
}

/// Where lines go, and what they add up to.
pub(super) struct Lines<W> {
    out: W,
    pub(super) fingerprinter: Fingerprinter,
    pub(super) tally: Tally,
}

impl<W: Write> Lines<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, fingerprinter: Fingerprinter::default(), tally: Tally::default() }
    }

    /// Whole lines, already counted in `tally`.
    pub(super) fn write(&mut self, lines: &[u8], tally: &Tally) -> io::Result<()> {
        self.tally.add(tally);
        self.fingerprinter.update(lines);
        self.out.write_all(lines)
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_line_is_counted_as_when_it_was_made() {
        let frozen =
            r#"{"stream":"a\"outcome\":\"x","outcome":"anomalous","baseline":"ab","engine_version":"1"}"#;
        let learning = r#"{"stream":"s","outcome":"warming_up","reason":"learning 1/9"}"#;
        let mut lines = Vec::new();
        let mut made = Tally::default();
        let cases = [(frozen, frozen), (frozen, learning), (learning, ""), (frozen, "")];
        let free = cases.map(|(request, response)| {
            let mut found = Found::default();
            found.read(Direction::Request, request);
            found.read(Direction::Response, response);
            push_found(&mut lines, &mut made, "a\"b\n", Some(5), &found);
            found.order_free()
        });
        assert_eq!(free, [true, false, false, true]);
        push_failure(&mut lines, &mut made, "7", None, "the method \"X\" is not one");
        push_error(&mut lines, &mut made, "line 9: \"outcome\":\"normal\" \u{1}");
        let mut counted = Tally::default();
        let again: Vec<bool> =
            lines.split_inclusive(|&b| b == b'\n').map(|line| counted.count_line(line)).collect();
        assert_eq!(again, [true, false, false, true, true, true]);
        assert_eq!(counted, made);
        assert_eq!((made.exchanges, made.outcomes, made.failures, made.bad_rows), (5, [0, 2, 0, 4], 1, 1));
        for line in lines.split_inclusive(|&b| b == b'\n') {
            let value: serde_json::Value = serde_json::from_slice(line).unwrap();
            assert!(value["id"] == "a\"b\n" || value["id"] == "7" || value["error"].is_string(), "{value}");
        }
    }
}
