//! Learning and judging do not depend on how bodies were cut: two plugins are given the same messages in
//! different chunks and must reach the same verdicts and the same baselines, byte for byte.

use driftlock_inspect::host::{Direction, Gauge, Histogram, Host, HostError, Level, Metric, Reply};
use driftlock_inspect::session::{Exchange, Plugin};

use crate::input::{Cuts, Input};

/// The fewest messages a plan for alpha 0.5 takes, and some to judge.
const LEARNED: usize = 16;
const JUDGED: usize = 3;
/// Enough for a message to pass what is kept of one while a stream learns (64 KiB).
const MAX_BODY_BYTES: usize = 80 << 10;

/// See the module.
pub fn holds(data: &[u8]) {
    let mut input = Input::new(data);
    let (direction, content_type) = match input.byte() % 4 {
        0 => (Direction::Response, "application/json"),
        1 => (Direction::Response, "text/event-stream"),
        _ => (Direction::Request, "application/json"),
    };
    let (one, other) = (input.cuts(), input.cuts());
    let (repeats, len) = (input.u16(), input.u16() % 512);
    let head = input.take(len);
    let len = input.u16() % 512;
    let piece = input.take(len);
    let len = usize::from(input.byte());
    let tail = input.take(len);
    let repeats = repeats.min(MAX_BODY_BYTES / piece.len().max(1));
    let body = [head, &piece.repeat(repeats), tail].concat();
    let (one, other) =
        (learned(direction, content_type, &body, one), learned(direction, content_type, &body, other));
    for (a, b) in one.iter().zip(&other) {
        assert_eq!(a, b, "the split decides");
    }
    assert_eq!(one.len(), other.len());
}

/// Verdicts, then digests.
fn learned(direction: Direction, content_type: &str, body: &[u8], cuts: Cuts<'_>) -> Vec<String> {
    let config =
        format!(r#"{{"alpha": 0.5, "learn": {{"messages": {LEARNED}}}, "report": {{"log": "always"}}}}"#);
    let mut plugin = Plugin::configure(config.as_bytes()).expect("a valid configuration");
    let mut journal = Journal { content_type: content_type.into(), lines: Vec::new() };
    for i in 0..LEARNED + JUDGED {
        let mut exchange = Exchange::default();
        // A body of its own for each message; blanks keep it what it is.
        let body = [body, &b" ".repeat(i % 3)[..]].concat();
        exchange.request_headers(&mut plugin, &mut journal, direction == Direction::Response);
        if direction == Direction::Response {
            exchange.response_headers(&mut plugin, &mut journal, false);
        }
        for range in cuts.of(body.len()) {
            match direction {
                Direction::Request => {
                    exchange.request_body(&mut plugin, &mut journal, Ok(&body[range]), false)
                }
                Direction::Response => {
                    exchange.response_body(&mut plugin, &mut journal, Ok(&body[range]), false)
                }
            };
        }
        match direction {
            Direction::Request => exchange.request_trailers(&mut plugin, &mut journal),
            Direction::Response => exchange.response_trailers(&mut plugin, &mut journal),
        };
        exchange.done(&mut plugin, &mut journal);
    }
    let snapshot = plugin.detector().snapshot();
    let digests = snapshot.streams().iter().map(|baseline| baseline.digest().to_string());
    journal.lines.into_iter().chain(digests).collect()
}

/// A proxy that only keeps the log.
struct Journal {
    content_type: Vec<u8>,
    lines: Vec<String>,
}

impl Host for Journal {
    fn header(&self, _: Direction, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        Ok(match name {
            ":method" => Some(b"POST".to_vec()),
            ":path" => Some(b"/v1/chat/completions".to_vec()),
            "content-type" => Some(self.content_type.clone()),
            _ => None,
        })
    }

    fn set_header(&mut self, _: Direction, _: &str, _: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn remove_header(&mut self, _: Direction, _: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn set_response_trailer(&mut self, _: &str, _: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn set_body(&mut self, _: Direction, _: &[u8]) -> Result<(), HostError> {
        Ok(())
    }

    fn set_filter_state(&mut self, _: &str, _: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn respond(&mut self, _: &Reply) -> Result<(), HostError> {
        Ok(())
    }

    fn now_ns(&self) -> Option<u64> {
        None
    }

    fn record(&mut self, _: Histogram, _: u64) {}

    fn gauge(&mut self, _: Gauge, _: u64) {}

    fn count(&mut self, _: Metric, _: u64) {}

    fn log(&mut self, _: Level, line: &str) {
        self.lines.push(line.to_owned());
    }
}
