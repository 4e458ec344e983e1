//! Counting: which symbol followed which context how often.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use super::context::{Context, visit};
use super::freeze::{self, KeptContext};
use super::model::ContextModel;
use super::{MAX_PROBES, mix};

/// Bytes of training units kept to decide which fields get contexts of their own.
const SAMPLE_BYTES: usize = 64 << 10;

/// A symbol in a context, and how often it was seen there; never is a free slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slot {
    context: u64,
    count: u32,
    symbol: u16,
}

/// Counts under training.
///
/// Holds at most `max_ngrams` distinct (context, symbol) pairs; beyond that new ones are not added and
/// [`Counts::overflowed`] says how often that happened. Below the bound the counts, and so the frozen
/// model, do not depend on the order of the units, nor on how they were spread over several `Counts`
/// that are [merged](Counts::merge).
#[derive(Clone, Debug)]
pub struct Counts {
    /// Open addressing; the length is a power of two.
    slots: Vec<Slot>,
    occupied: usize,
    max_ngrams: usize,
    overflowed: u64,
    bytes: u64,
    sample: Sample,
}

impl Counts {
    /// No counts yet.
    pub fn new(max_ngrams: usize) -> Self {
        Self {
            slots: vec![Slot::default(); 1 << 10],
            occupied: 0,
            max_ngrams: max_ngrams.max(512),
            overflowed: 0,
            bytes: 0,
            sample: Sample::default(),
        }
    }

    /// How many occurrences found no room.
    pub fn overflowed(&self) -> u64 {
        self.overflowed
    }

    /// Counts every symbol of one whole unit in each of its contexts.
    pub fn train(&mut self, unit: &[u8]) {
        visit(unit, |place| {
            for context in place.field_contexts().chain(place.plain_contexts()) {
                self.add(context.0, place.symbol, 1);
            }
        });
        self.bytes = self.bytes.saturating_add(unit.len() as u64);
        self.sample.add(unit);
    }

    /// Adds what another one has counted.
    pub fn merge(&mut self, other: &Counts) {
        for slot in other.slots.iter().filter(|slot| slot.count > 0) {
            self.add(slot.context, slot.symbol, slot.count);
        }
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.overflowed = self.overflowed.saturating_add(other.overflowed);
        self.sample.merge(&other.sample);
    }

    fn add(&mut self, context: u64, symbol: u16, count: u32) {
        if self.occupied * 2 >= self.slots.len() && self.occupied < self.max_ngrams {
            self.grow();
        }
        // A full counter goes on counting what it knows.
        let full = self.occupied >= self.max_ngrams;
        match self.slot(context, symbol) {
            Some(slot) if slot.count > 0 => slot.count = slot.count.saturating_add(count),
            Some(slot) if !full => {
                *slot = Slot { context, count, symbol };
                self.occupied += 1;
            }
            _ => self.overflowed = self.overflowed.saturating_add(u64::from(count)),
        }
    }

    /// The pair's slot, or the free one where it belongs; none within reach if too many collide.
    fn slot(&mut self, context: u64, symbol: u16) -> Option<&mut Slot> {
        let mask = self.slots.len() - 1;
        let start = mix(context ^ mix(u64::from(symbol))) as usize;
        let at = (0..MAX_PROBES).map(|i| (start + i) & mask).find(|&at| {
            self.slots
                .get(at)
                .is_some_and(|slot| slot.count == 0 || (slot.context, slot.symbol) == (context, symbol))
        })?;
        self.slots.get_mut(at)
    }

    fn grow(&mut self) {
        let doubled = vec![Slot::default(); self.slots.len() * 2];
        let old = core::mem::replace(&mut self.slots, doubled);
        for moved in old.into_iter().filter(|slot| slot.count > 0) {
            match self.slot(moved.context, moved.symbol) {
                Some(slot) => *slot = moved,
                None => {
                    self.occupied -= 1;
                    self.overflowed = self.overflowed.saturating_add(u64::from(moved.count));
                }
            }
        }
    }

    /// The frozen model. Its bytes depend on the counts and the sample alone.
    ///
    /// See the module for what is pruned; more of it until the tables take at most `max_table_bytes`.
    pub fn freeze(self, max_table_bytes: usize) -> ContextModel {
        self.freeze_and_tell(max_table_bytes).0
    }

    /// As [`Self::freeze`], with the contexts that were kept.
    pub(super) fn freeze_and_tell(self, max_table_bytes: usize) -> (ContextModel, Vec<KeptContext>) {
        let Self { slots, bytes, sample, .. } = self;
        let mut pairs: Vec<(Context, u16, u32)> = slots
            .into_iter()
            .filter(|slot| slot.count > 0)
            .map(|slot| (Context(slot.context), slot.symbol, slot.count))
            .collect();
        pairs.sort_unstable();
        freeze::freeze(&pairs, bytes, sample.units.values(), max_table_bytes)
    }
}

/// Units with the lowest hashes, as many as fit: the same whatever the order in which they came.
#[derive(Clone, Debug)]
struct Sample {
    units: BTreeMap<u64, Vec<u8>>,
    bytes: usize,
    /// A unit was turned away with this hash: none with a higher one is taken.
    below: u64,
}

impl Default for Sample {
    fn default() -> Self {
        Self { units: BTreeMap::new(), bytes: 0, below: u64::MAX }
    }
}

impl Sample {
    fn add(&mut self, unit: &[u8]) {
        let hash = unit.iter().fold(unit.len() as u64, |hash, &byte| mix(hash ^ u64::from(byte)));
        if hash >= self.below || self.units.contains_key(&hash) {
            return;
        }
        self.units.insert(hash, unit.to_vec());
        self.bytes += unit.len();
        while self.bytes > SAMPLE_BYTES
            && let Some((highest, unit)) = self.units.pop_last()
        {
            self.bytes -= unit.len();
            self.below = highest;
        }
    }

    fn merge(&mut self, other: &Sample) {
        self.below = self.below.min(other.below);
        let turned_away = self.units.split_off(&self.below);
        self.bytes -= turned_away.values().map(Vec::len).sum::<usize>();
        other.units.values().for_each(|unit| self.add(unit));
    }
}
