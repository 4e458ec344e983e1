//! Arbitrary bytes as a stream of choices. It never runs dry: past the end all choices are 0.

use std::ops::Range;

use driftlock_engine::normalise::{Class, ClassSet};

pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub(crate) fn u16(&mut self) -> usize {
        usize::from(self.byte()) << 8 | usize::from(self.byte())
    }

    /// At most `len` bytes.
    pub(crate) fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that is left, but at most `max` bytes.
    pub(crate) fn rest(&mut self, max: usize) -> &'a [u8] {
        self.take(max)
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.byte()) % of.len()]
    }

    /// A way to cut a body into chunks: up to 15 lengths, used over and over.
    pub(crate) fn cuts(&mut self) -> Cuts<'a> {
        let count = usize::from(self.byte()) % 16;
        Cuts(self.take(count))
    }
}

/// Lengths of chunks, 1 to 256 each; none means one chunk.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cuts<'a>(&'a [u8]);

impl Cuts<'_> {
    pub(crate) fn of(self, len: usize) -> impl Iterator<Item = Range<usize>> {
        let mut lengths = self.0.iter().map(|&len| usize::from(len) + 1).cycle();
        let mut at = 0;
        std::iter::from_fn(move || {
            (at < len).then(|| {
                let start = at;
                at = lengths.next().map_or(len, |length| len.min(at + length));
                start..at
            })
        })
    }
}

/// The classes of token whose bits are set.
pub(crate) fn classes_of(bits: u32) -> ClassSet {
    let chosen = Class::ALL.into_iter().filter(|class| bits >> *class as u32 & 1 == 1);
    chosen.fold(ClassSet::NONE, ClassSet::with)
}
