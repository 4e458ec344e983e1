//! What a document keeps back of its texts, and the units it hands them to.
//!
//! Bounds: `MAX_HELD_BYTES` and `MAX_HELD_PIECES` of text whose role or choice is unknown, `MAX_OPEN_UNITS` of a
//! stream. Cost: a copy of held text; a search of the open units per piece.

use super::super::schema::Kind;
use super::super::{Role, Unit};
use alloc::vec::Vec;

/// Text held while its role or choice is unknown.
pub(crate) const MAX_HELD_BYTES: usize = 64 * 1024;
/// Pieces (runs and escapes) held meanwhile.
pub(crate) const MAX_HELD_PIECES: usize = 4096;
/// Units a stream keeps apart; what opens later joins one shared unit per role and kind (at most 18). With these,
/// the envelope and what one event has open it stays under the 80 that the detector scores apart.
pub(crate) const MAX_OPEN_UNITS: usize = 56;

/// A run or an escape of a held text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) kind: Kind,
    /// `None` until its message says.
    pub(super) role: Option<Role>,
    /// A piece of a stream's unit.
    pub(super) joined: bool,
    /// Position of the tool call within the choice.
    pub(super) call: usize,
    /// Ordinal of the string, so that two strings stay two units.
    pub(super) string: u64,
    pub(super) body_offset: u64,
    pub(super) len: usize,
    pub(super) escape: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    pub(super) bytes: Vec<u8>,
    pub(super) pieces: Vec<Piece>,
}

impl Held {
    /// Bytes of memory.
    pub(super) fn memory(&self) -> usize {
        self.bytes.capacity() + self.pieces.capacity() * size_of::<Piece>()
    }

    /// `false`: it does not fit, and nothing was kept.
    pub(super) fn push(&mut self, text: &[u8], piece: Piece) -> bool {
        let joins = self.pieces.last().is_some_and(|last| {
            last.string == piece.string
                && !last.escape
                && !piece.escape
                && last.body_offset + last.len as u64 == piece.body_offset
        });
        if self.bytes.len() + text.len() > MAX_HELD_BYTES || !joins && self.pieces.len() >= MAX_HELD_PIECES {
            return false;
        }
        match self.pieces.last_mut() {
            Some(last) if joins => last.len += text.len(),
            _ => self.pieces.push(piece),
        }
        self.bytes.extend_from_slice(text);
        true
    }

    /// Gives the pieces with their texts and forgets them; the memory is kept for the next.
    pub(super) fn drain(&mut self, mut give: impl FnMut(Piece, &[u8])) {
        let mut rest = self.bytes.as_slice();
        for piece in self.pieces.drain(..) {
            let (text, after) = rest.split_at_checked(piece.len).unwrap_or((rest, &[]));
            give(piece, text);
            rest = after;
        }
        self.bytes.clear();
    }
}

/// Ordinals handed out per role; the last one is shared by all that come after.
#[derive(Clone, Debug, Default)]
pub(super) struct Ordinals([u16; Role::COUNT]);

impl Ordinals {
    pub(super) fn next(&mut self, role: Role) -> Unit {
        let Some(next) = self.0.get_mut(role as usize) else { return Unit { role, index: u16::MAX } };
        let index = *next;
        *next = next.saturating_add(1);
        Unit { role, index }
    }
}

/// What makes a unit of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StreamKey {
    pub(super) choice: u64,
    pub(super) role: Role,
    pub(super) kind: Kind,
    /// Index of the tool call or content block.
    pub(super) part: u64,
}

/// Units of a stream, open until its end.
#[derive(Clone, Debug, Default)]
pub(super) struct OpenUnits(pub(super) Vec<(StreamKey, Unit)>);

impl OpenUnits {
    pub(super) fn unit(&mut self, key: StreamKey, ordinals: &mut Ordinals) -> Unit {
        let find =
            |units: &[(StreamKey, Unit)], key| units.iter().find(|(k, _)| *k == key).map(|&(_, unit)| unit);
        if let Some(unit) = find(&self.0, key) {
            return unit;
        }
        let key = if self.0.len() < MAX_OPEN_UNITS {
            key
        } else {
            StreamKey { choice: u64::MAX, part: u64::MAX, ..key }
        };
        find(&self.0, key).unwrap_or_else(|| {
            let unit = ordinals.next(key.role);
            self.0.push((key, unit));
            unit
        })
    }
}
