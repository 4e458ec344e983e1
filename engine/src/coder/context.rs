//! What predicts a symbol: the contexts of a place in a unit, most specific first.

use crate::field::{FREE_TEXT, FieldTracker};

/// Longest plain context, bytes.
pub(crate) const PLAIN_ORDER: u32 = 4;
/// Longest context within a field, bytes.
pub(crate) const FIELD_ORDER: u32 = 3;
/// The symbol behind a unit's last byte.
pub(crate) const END: u16 = 256;

/// A context as one number: the bytes before the symbol, newest lowest, and of what kind they are. Three
/// kinds: **plain**, the last 0 to 4 bytes of the unit wherever they stand; **in a field**, the last 0 to
/// 3 bytes of this field's value; **anchored**, the same if they are all of the value so far, so that how
/// a value begins is a context of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Context(pub(crate) u64);

const KIND_SHIFT: u32 = 62;
const IN_FIELD: u64 = 1;
const ANCHORED: u64 = 2;

fn mask(len: u32) -> u64 {
    (1 << (8 * len)) - 1
}

impl Context {
    /// The empty plain context.
    pub(crate) const ROOT: Self = Self(0);

    pub(crate) fn plain(len: u32, history: u64) -> Self {
        Self(u64::from(len) << 32 | history & mask(len))
    }

    pub(crate) fn in_field(field: u32, len: u32, history: u64) -> Self {
        Self(IN_FIELD << KIND_SHIFT | u64::from(len) << 56 | u64::from(field) << 24 | history & mask(len))
    }

    pub(crate) fn anchored(field: u32, len: u32, history: u64) -> Self {
        Self(ANCHORED << KIND_SHIFT | u64::from(len) << 56 | u64::from(field) << 24 | history & mask(len))
    }

    fn kind(self) -> u64 {
        self.0 >> KIND_SHIFT
    }

    pub(crate) fn is_plain(self) -> bool {
        self.kind() == 0
    }

    pub(crate) fn is_anchored(self) -> bool {
        self.kind() == ANCHORED
    }

    pub(crate) fn field(self) -> Option<u32> {
        (!self.is_plain()).then_some((self.0 >> 24) as u32)
    }

    pub(crate) fn len(self) -> u32 {
        let shift = if self.is_plain() { 32 } else { 56 };
        (self.0 >> shift) as u32 & 7
    }

    pub(crate) fn bytes(self) -> u64 {
        self.0 & mask(self.len())
    }

    /// Where a symbol that this context does not predict is looked for next; none behind the last of the
    /// plain or the field's contexts.
    pub(crate) fn shorter(self) -> Option<Self> {
        let (len, bytes) = (self.len(), self.bytes());
        match self.field() {
            None => Some(Self::plain(len.checked_sub(1)?, bytes)),
            Some(field) if self.is_anchored() => Some(Self::in_field(field, len, bytes)),
            Some(field) => Some(Self::in_field(field, len.checked_sub(1)?, bytes)),
        }
    }

    /// The context one byte before, and the byte that led from it to here; none for an empty one.
    pub(crate) fn prefix(self) -> Option<(Self, u16)> {
        let (len, bytes) = (self.len().checked_sub(1)?, self.bytes());
        let before = bytes >> 8;
        let prefix = match self.field() {
            None => Self::plain(len, before),
            Some(field) if self.is_anchored() => Self::anchored(field, len, before),
            Some(field) => Self::in_field(field, len, before),
        };
        Some((prefix, (bytes & 0xff) as u16))
    }

    /// The longest context that can follow once `byte` has been coded in this one.
    pub(crate) fn followed_by(self, byte: u8) -> Self {
        let (len, bytes) = (self.len() + 1, self.bytes() << 8 | u64::from(byte));
        match self.field() {
            None => Self::plain(len.min(PLAIN_ORDER), bytes),
            Some(field) if self.is_anchored() && len <= FIELD_ORDER => Self::anchored(field, len, bytes),
            Some(field) => Self::in_field(field, len.min(FIELD_ORDER), bytes),
        }
    }
}

/// A place in a unit: what is coded there, and what is known before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// A byte or [`END`].
    pub(crate) symbol: u16,
    pub(crate) field: u32,
    /// Bytes since the field began.
    run: u32,
    /// The unit's last bytes, newest lowest.
    history: u64,
    /// How many there are, at most [`PLAIN_ORDER`].
    seen: u32,
}

impl Place {
    /// The field's contexts, most specific first; none in free text.
    pub(crate) fn field_contexts(self) -> impl Iterator<Item = Context> {
        let field = (self.field != FREE_TEXT).then_some(self.field);
        let longest = self.run.min(FIELD_ORDER);
        let anchored = field.filter(|_| self.run <= FIELD_ORDER);
        anchored.map(|field| Context::anchored(field, longest, self.history)).into_iter().chain(
            field.into_iter().flat_map(move |field| {
                (0..=longest).rev().map(move |len| Context::in_field(field, len, self.history))
            }),
        )
    }

    /// The plain contexts, longest first; none for the end of the unit, which only a field predicts.
    pub(crate) fn plain_contexts(self) -> impl Iterator<Item = Context> {
        let longest = (self.symbol != END).then_some(self.seen);
        longest
            .into_iter()
            .flat_map(move |longest| (0..=longest).rev().map(move |len| Context::plain(len, self.history)))
    }
}

/// Visits every byte of a whole unit and its end.
pub(crate) fn visit(unit: &[u8], mut each: impl FnMut(Place)) {
    let mut tracker = FieldTracker::default();
    let (mut rest, mut history, mut seen) = (unit, 0u64, 0);
    while !rest.is_empty() {
        let (field, mut run) = (tracker.field(), tracker.run());
        let (stretch, behind) = rest.split_at(tracker.advance(rest).clamp(1, rest.len()));
        for &byte in stretch {
            each(Place { symbol: u16::from(byte), field, run, history, seen });
            history = history << 8 | u64::from(byte);
            seen = (seen + 1).min(PLAIN_ORDER);
            run = run.saturating_add(1);
        }
        rest = behind;
    }
    each(Place { symbol: END, field: tracker.field(), run: tracker.run(), history, seen });
}
