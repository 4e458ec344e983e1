//! What hostile bytes may cost in memory.
//!
//! Decoding a snapshot takes a small multiple of its bytes; parsing a body takes a constant. The counter is
//! the process's, so run this where no other thread allocates: in a fuzz target, or alone in its test.

use driftlock_engine::baseline::Snapshot;
use driftlock_inspect::content::{Sink, Unit};

use crate::HEAP;
use crate::body::Read;
use crate::input::Input;
use crate::snapshot::untrusted;

/// What a body parser may hold, whatever the body.
pub const PARSER_MAX_BYTES: usize = 512 << 10;
/// What a decoded snapshot may take for each of its bytes. The worst are streams with nothing in them, which
/// take 13 bytes in the snapshot, 112 in memory, and three times that while their list grows.
pub const SNAPSHOT_FACTOR: usize = 32;
/// For error texts and the smallest allocations.
const ALLOWANCE_BYTES: usize = 8 << 10;
/// Length of a body.
const BODY_BYTES: usize = 1 << 19;

/// See the module.
pub fn holds(data: &[u8]) {
    if data.first().is_some_and(|byte| byte % 4 == 0) {
        snapshot(&data[1..]);
    } else {
        parser(data);
    }
}

/// What is allocated now, bytes.
pub fn held() -> usize {
    HEAP.current_usage()
}

/// The most that was allocated at once by `action`, beyond what was before.
pub fn peak_of<T>(action: impl FnOnce() -> T) -> usize {
    let before = HEAP.current_usage();
    HEAP.reset_peak_usage();
    drop(action());
    HEAP.peak_usage().saturating_sub(before)
}

fn snapshot(data: &[u8]) {
    let bytes = untrusted(data);
    let peak = peak_of(|| Snapshot::decode(&bytes));
    let bound = bytes.len() * SNAPSHOT_FACTOR + ALLOWANCE_BYTES;
    assert!(peak <= bound, "decoding {} bytes took {peak}", bytes.len());
}

struct Nowhere;

impl Sink for Nowhere {
    fn text(&mut self, _: Unit, _: &[u8], _: u64) {}
    fn end(&mut self, _: Unit) {}
    fn skipped(&mut self, _: Unit, _: u64) {}
}

/// A body of a beginning and then one pattern over and over.
fn parser(data: &[u8]) {
    let mut input = Input::new(data);
    let how = Read::of(&mut input);
    let cuts = input.cuts();
    let len = input.u16() % 512;
    let (beginning, pattern) = (input.take(len), input.rest(1 << 16));
    let mut body = beginning.to_vec();
    let mut rest = pattern.iter().cycle();
    body.extend(rest.by_ref().take(BODY_BYTES));
    let Ok(mut parser) = how.parser() else { return };
    let peak = peak_of(|| {
        for range in cuts.of(body.len()) {
            parser.push(&body[range], &mut Nowhere);
        }
        parser.finish(&mut Nowhere)
    });
    assert!(peak <= PARSER_MAX_BYTES, "{how:?} took {peak} bytes");
}
