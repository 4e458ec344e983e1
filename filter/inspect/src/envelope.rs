//! The envelope of a message: everything of a body that is not a scored text, in order, as one unit.
//!
//! Keys, punctuation, model names, parameters and tool definitions must not pass unseen, or a payload would
//! hide there. In a stream the same skeleton comes back with each event (500 copies of 250 bytes), and scoring
//! all of it would cost more than scoring the answer. So, per event of a stream: the envelope is compared with
//! the last event of the same shape (the same bytes outside numbers, literals and strings, blanks aside). A new shape is
//! given whole; of a known one only the values that differ from last time are given, each as `"key":value` and
//! the byte after it.
//!
//! Bounds: `MAX_SHAPES` shapes are remembered, the least recently used is forgotten (its next event is given
//! whole again). An event whose envelope passes `MAX_EVENT_BYTES` or `MAX_VALUES` is given whole and not
//! remembered. The comparison is exact but for blanks, so no collision can hide anything. Cost: one copy and one comparison
//! of the envelope's bytes.

use crate::content::{Role, Sink, Unit};
use alloc::vec::Vec;
use core::mem;

/// The one envelope unit of a message.
pub(crate) const ENVELOPE: Unit = Unit { role: Role::Envelope, index: 0 };
/// Shapes of events remembered per stream.
pub(crate) const MAX_SHAPES: usize = 8;
/// Bytes of one event's envelope that are held back for the comparison.
pub(crate) const MAX_EVENT_BYTES: usize = 8 * 1024;
/// Values of one event that are compared; also the bound on the pieces its envelope may consist of.
pub(crate) const MAX_VALUES: usize = 512;

/// Where a value stands in an event's held bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Value {
    /// Its key's opening quote, or its own first byte if it has no key.
    pub(crate) key: usize,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

#[derive(Clone, Debug, Default)]
struct Event {
    bytes: Vec<u8>,
    values: Vec<Value>,
    /// Runs of `bytes` that are contiguous in the body: first position and its body offset.
    sources: Vec<(usize, u64)>,
}

impl Event {
    fn clear(&mut self) {
        self.bytes.clear();
        self.values.clear();
        self.sources.clear();
    }

    fn slice(&self, start: usize, end: usize) -> &[u8] {
        self.bytes.get(start..end).unwrap_or_default()
    }

    /// Both have the same bytes outside their values, blanks aside.
    fn has_shape_of(&self, other: &Self) -> bool {
        let (mut mine, mut theirs) = (0, 0);
        self.values.len() == other.values.len()
            && self.values.iter().zip(&other.values).all(|(a, b)| {
                let same = same_but_for_blanks(self.slice(mine, a.start), other.slice(theirs, b.start));
                (mine, theirs) = (a.end, b.end);
                same
            })
            && same_but_for_blanks(self.slice(mine, self.bytes.len()), other.slice(theirs, other.bytes.len()))
    }

    fn give(&self, start: usize, end: usize, sink: &mut impl Sink) {
        let mut run = self.sources.partition_point(|&(position, _)| position <= start).saturating_sub(1);
        let mut from = start;
        while from < end {
            let Some(&(position, body_offset)) = self.sources.get(run) else { return };
            let next = self.sources.get(run + 1).map_or(end, |&(next, _)| next.min(end));
            sink.text(ENVELOPE, self.slice(from, next), body_offset + (from - position) as u64);
            (from, run) = (next, run + 1);
        }
    }
}

/// Anthropic pads its events with blanks of random number.
fn same_but_for_blanks(a: &[u8], b: &[u8]) -> bool {
    let blank = |byte: &&u8| matches!(byte, b' ' | b'\t');
    a == b || a.iter().filter(|byte| !blank(byte)).eq(b.iter().filter(|byte| !blank(byte)))
}

/// Collects the envelope of one message and gives it to the sink.
#[derive(Clone, Debug, Default)]
pub(crate) struct Envelope {
    /// Events are compared; otherwise bytes go straight to the sink.
    by_event: bool,
    event: Event,
    /// The event is too large to hold: what comes goes straight to the sink.
    oversized: bool,
    /// Least recently used first.
    shapes: Vec<Event>,
    given: bool,
}

impl Envelope {
    /// For one document whose envelope is given as it comes.
    pub(crate) fn whole() -> Self {
        Self::default()
    }

    /// For a stream of events.
    pub(crate) fn by_event() -> Self {
        Self { by_event: true, ..Self::default() }
    }

    /// The next bytes of the envelope, contiguous in the body from `body_offset`.
    pub(crate) fn put(&mut self, bytes: &[u8], body_offset: u64, sink: &mut impl Sink) {
        if bytes.is_empty() {
            return;
        }
        if self.by_event && !self.oversized {
            let event = &mut self.event;
            let position = event.bytes.len();
            let contiguous = event
                .sources
                .last()
                .is_some_and(|&(start, at)| at + (position - start) as u64 == body_offset);
            let fits = position + bytes.len() <= MAX_EVENT_BYTES
                && (contiguous || event.sources.len() < MAX_VALUES)
                && event.values.len() <= MAX_VALUES;
            if fits {
                if !contiguous {
                    event.sources.push((position, body_offset));
                }
                event.bytes.extend_from_slice(bytes);
                return;
            }
            event.give(0, position, sink);
            event.clear();
            self.oversized = true;
        }
        self.given = true;
        sink.text(ENVELOPE, bytes, body_offset);
    }

    /// Bytes held of the current event: the position of what is put next.
    pub(crate) fn held(&self) -> usize {
        self.event.bytes.len()
    }

    /// Marks a value of the current event.
    pub(crate) fn value(&mut self, value: Value) {
        if self.by_event && !self.oversized && self.event.values.len() <= MAX_VALUES {
            self.event.values.push(value);
        }
    }

    /// The event is complete: gives what is new of it.
    pub(crate) fn end_event(&mut self, sink: &mut impl Sink) {
        if mem::take(&mut self.oversized) || self.event.bytes.is_empty() {
            self.event.clear();
            return;
        }
        let event = &self.event;
        let known = self.shapes.iter().rposition(|shape| event.has_shape_of(shape));
        let mut spare = match known {
            Some(place) => {
                let last = self.shapes.remove(place);
                for (value, before) in event.values.iter().zip(&last.values) {
                    if event.slice(value.start, value.end) != last.slice(before.start, before.end) {
                        event.give(value.key, (value.end + 1).min(event.bytes.len()), sink);
                        self.given = true;
                    }
                }
                last
            }
            None => {
                event.give(0, event.bytes.len(), sink);
                self.given = true;
                if self.shapes.len() < MAX_SHAPES { Event::default() } else { self.shapes.remove(0) }
            }
        };
        spare.clear();
        self.shapes.push(mem::replace(&mut self.event, spare));
    }

    /// Ends the unit, if it has any byte.
    pub(crate) fn finish(&mut self, sink: &mut impl Sink) {
        self.end_event(sink);
        if mem::take(&mut self.given) {
            sink.end(ENVELOPE);
        }
    }
}
