//! The `context` coder: a byte-level variable-order Markov model, frozen into one flat table.
//!
//! What: [`Counts`] collects n-gram counts message by message; [`Counts::freeze`] turns them into a
//! [`ContextModel`] whose [`ContextModel::step`] gives each byte's code length, in 1/256 bit, given
//! the bytes before it. The model is of the PPM family (Cleary and Witten 1984), with the escape
//! estimate of PPMD (Howard 1993): in a context seen n times with d distinct successors, a symbol
//! seen c times has probability (2c-1)/2n and the escape d/2n. Frozen, this is a back-off n-gram
//! model: each stored n-gram carries the cost of its last byte and the escape cost of itself as a
//! context. A byte that no context explains costs the escapes and 8 bits.
//!
//! Why: scoring needs no allocation and no recompression of the baseline, can be fed byte by byte,
//! and each byte's cost says where a message is surprising.
//!
//! Cost: training updates `order + 1` counters a byte; scoring probes the table once for a byte that
//! the longest context explains and twice more for each escape. An entry takes 8 bytes.
//!
//! Left out on purpose: exclusion (PPM's correction for symbols that a longer context already ruled
//! out) needs per-symbol state at each escape and would triple the cost; costs are therefore a
//! slight overestimate, the same for baseline and message.

use alloc::vec;
use alloc::vec::Vec;

/// Fixed-point scale of code lengths: this many units are one bit.
pub const UNITS_PER_BIT: u32 = 256;

/// No byte costs more than this (64 bits): beyond it, more escapes say nothing new.
pub const MAX_COST: u16 = 64 * UNITS_PER_BIT as u16;

/// Longest context, in bytes. Six and its predicted byte still fit a packed key.
pub const MAX_ORDER: u8 = 6;

/// Context length that did best under the evaluation protocol (see DECISIONS.md).
pub const DEFAULT_ORDER: u8 = 5;

/// A slot whose n-gram is known only as a context has no cost of its own.
const NO_COST: u16 = u16::MAX;
/// A slot whose n-gram is no context of anything.
const NO_ESCAPE: u16 = u16::MAX;
/// Slots that a look-up tries, in a frozen table and in training. Hashes can be computed by anyone, so
/// n-grams can be made to collide; beyond this many they are lost, not looked for.
const MAX_PROBES: usize = 256;
/// What a byte costs once every context has been escaped: log2(256).
const UNIFORM_COST: u32 = 8 * UNITS_PER_BIT;

/// The last `len` bytes of `history` (newest in the low byte) as one non-zero key.
#[inline(always)]
fn pack(history: u64, len: u32) -> u64 {
    let mask = (1u64 << (8 * len)) - 1;
    (history & mask) | (u64::from(len) << 56)
}

/// Mixes a packed n-gram: index from the low bits, tag from the high half.
#[inline(always)]
fn mix(key: u64) -> u64 {
    let x = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

/// log2(x) in 1/4096, by repeated squaring; integers only, so every target agrees. `x` >= 1.
pub(crate) fn log2_fixed(x: u64) -> u32 {
    let x = x.max(1);
    let exponent = 63 - x.leading_zeros();
    // Mantissa in [1, 2) with 31 fractional bits.
    let mut m = if exponent >= 31 { x >> (exponent - 31) } else { x << (31 - exponent) };
    let mut fraction = 0u32;
    for _ in 0..12 {
        m = (m * m) >> 31;
        fraction <<= 1;
        if m >= 1 << 32 {
            fraction |= 1;
            m >>= 1;
        }
    }
    (exponent << 12) | fraction
}

/// -log2(numerator / denominator) in 1/256 bit, rounded, at most [`MAX_COST`].
fn cost_of_ratio(numerator: u64, denominator: u64) -> u16 {
    let difference = log2_fixed(denominator).saturating_sub(log2_fixed(numerator));
    ((difference + 8) >> 4).min(u32::from(MAX_COST)) as u16
}

/// n-gram counts under training.
///
/// Holds at most `max_ngrams` distinct n-grams; beyond that new ones are not added and
/// [`Counts::overflowed`] says how often that happened. Below the bound, the counts, and so the frozen
/// model, do not depend on the order of the messages.
#[derive(Clone, Debug)]
pub struct Counts {
    order: u8,
    /// Open addressing; key 0 is a free slot. The length is a power of two.
    slots: Vec<(u64, u32)>,
    occupied: usize,
    max_ngrams: usize,
    overflowed: u64,
    bytes: u64,
}

impl Counts {
    /// No counts yet; contexts of up to `order` bytes (at most [`MAX_ORDER`]).
    pub fn new(order: u8, max_ngrams: usize) -> Self {
        Self {
            order: order.min(MAX_ORDER),
            slots: vec![(0, 0); 1 << 10],
            occupied: 0,
            max_ngrams: max_ngrams.max(512),
            overflowed: 0,
            bytes: 0,
        }
    }

    /// How many n-gram occurrences found no room.
    pub fn overflowed(&self) -> u64 {
        self.overflowed
    }

    /// Counts every n-gram of one whole unit.
    pub fn train(&mut self, unit: &[u8]) {
        let mut state = State::default();
        for &byte in unit {
            state.push(byte);
            let longest = u32::from(self.order + 1).min(u32::from(state.available));
            for len in 1..=longest {
                self.add(pack(state.history, len), 1);
            }
        }
        self.bytes = self.bytes.saturating_add(unit.len() as u64);
    }

    fn add(&mut self, key: u64, count: u32) {
        if self.occupied * 2 >= self.slots.len() && self.occupied < self.max_ngrams {
            self.grow();
        }
        // A full counter goes on counting what it knows.
        let full = self.occupied >= self.max_ngrams;
        match self.slot(key) {
            Some(slot) if slot.0 == key => slot.1 = slot.1.saturating_add(count),
            Some(slot) if !full => {
                *slot = (key, count);
                self.occupied += 1;
            }
            _ => self.overflowed = self.overflowed.saturating_add(1),
        }
    }

    /// The n-gram's slot, or the free one where it belongs; none within reach if too many collide.
    fn slot(&mut self, key: u64) -> Option<&mut (u64, u32)> {
        let mask = self.slots.len() - 1;
        let start = mix(key) as usize;
        let at = (0..MAX_PROBES)
            .map(|i| (start + i) & mask)
            .find(|&at| self.slots.get(at).is_some_and(|slot| slot.0 == key || slot.0 == 0))?;
        self.slots.get_mut(at)
    }

    fn grow(&mut self) {
        let doubled = vec![(0, 0); self.slots.len() * 2];
        let old = core::mem::replace(&mut self.slots, doubled);
        for (key, count) in old.into_iter().filter(|slot| slot.0 != 0) {
            match self.slot(key) {
                Some(slot) => *slot = (key, count),
                None => {
                    self.occupied -= 1;
                    self.overflowed = self.overflowed.saturating_add(1);
                }
            }
        }
    }

    /// The frozen model. Its bytes depend on the counts alone: n-grams are laid out in key order.
    ///
    /// If the table would take more than `max_table_bytes`, n-grams seen less than twice, then three
    /// times and so on, are dropped (contexts of kept n-grams stay) until it fits.
    pub fn freeze(self, max_table_bytes: usize) -> ContextModel {
        let mut ngrams: Vec<(u64, u32)> = self.slots.into_iter().filter(|slot| slot.0 != 0).collect();
        // Key order: by length, then by bytes with the context's in the high digits, so that the
        // successors of one context stand together.
        ngrams.sort_unstable();
        let max_table_bytes = max_table_bytes.max(ENTRY_BYTES << 12);
        let fits = |minimum| {
            let entries = entries_of(&ngrams, minimum);
            (table_len(entries.len(), 0) * ENTRY_BYTES <= max_table_bytes).then_some(entries)
        };
        // The smallest minimum that fits: a higher one never keeps more.
        let (mut low, mut high) = (0, 1);
        let mut entries = fits(high);
        while entries.is_none() && high < u32::MAX / 2 {
            (low, high) = (high, high * 2);
            entries = fits(high);
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match fits(middle) {
                Some(kept) => (high, entries) = (middle, Some(kept)),
                None => low = middle,
            }
        }
        // Single bytes and their contexts fit the smallest table.
        let entries = entries.unwrap_or_default();
        ContextModel::build(self.order, self.bytes, &entries, &ngrams, max_table_bytes)
    }
}

/// A kept n-gram: packed key, cost of its last byte, escape cost of itself as a context.
type KeptNgram = (u64, u16, u16);

/// The n-grams worth a slot when only those seen at least `minimum` times predict (single bytes
/// always do). A context of a kept n-gram is kept too.
fn entries_of(ngrams: &[(u64, u32)], minimum: u32) -> Vec<KeptNgram> {
    // Contexts in key order, with the total and the number of their kept successors.
    let mut contexts: Vec<(u64, u64, u64)> = Vec::new();
    for &(key, count) in ngrams.iter().filter(|(key, count)| kept(*key, *count, minimum)) {
        let context = context_of(key);
        match contexts.last_mut() {
            Some(last) if last.0 == context => {
                last.1 += u64::from(count);
                last.2 += 1;
            }
            _ => contexts.push((context, u64::from(count), 1)),
        }
    }
    contexts.sort_unstable();
    let find =
        |key: u64| contexts.binary_search_by_key(&key, |c| c.0).ok().and_then(|i| contexts.get(i)).copied();
    let mut entries = Vec::with_capacity(ngrams.len());
    for &(key, count) in ngrams {
        let cost = match find(context_of(key)) {
            Some((_, total, _)) if kept(key, count, minimum) => {
                cost_of_ratio(2 * u64::from(count) - 1, 2 * total)
            }
            _ => NO_COST,
        };
        let escape = find(key).map_or(NO_ESCAPE, |(_, total, distinct)| cost_of_ratio(distinct, 2 * total));
        if cost != NO_COST || escape != NO_ESCAPE {
            entries.push((key, cost, escape));
        }
    }
    // The start of a unit is a context that no byte ends in.
    let start = pack(0, 1);
    if entries.binary_search_by_key(&start, |e| e.0).is_err()
        && let Some((_, total, distinct)) = find(start)
    {
        entries.push((start, NO_COST, cost_of_ratio(distinct, 2 * total)));
    }
    entries
}

fn kept(key: u64, count: u32, minimum: u32) -> bool {
    count >= minimum || key >> 56 == 1
}

/// The n-gram without its last byte; 0 for a single byte's empty context.
fn context_of(key: u64) -> u64 {
    let len = (key >> 56) as u32;
    if len <= 1 { 0 } else { pack((key & ((1 << 56) - 1)) >> 8, len - 1) }
}

const ENTRY_BYTES: usize = 8;

/// One slot: `tag` 0 is free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry {
    tag: u32,
    cost: u16,
    escape: u16,
}

/// Slots for `entries`: at a load of at most 1/2 where that takes no more than `max_table_bytes`, else
/// of at most 4/5.
fn table_len(entries: usize, max_table_bytes: usize) -> usize {
    let roomy = (entries * 2).next_power_of_two();
    let tight = (entries + entries / 4 + 1).next_power_of_two();
    if roomy * ENTRY_BYTES <= max_table_bytes { roomy.max(16) } else { tight.max(16) }
}

/// Where a running score stands between two bytes: the bytes that still matter, and how many of them
/// the model knows as a context. 16 bytes; start every unit with the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Newest byte lowest.
    history: u64,
    /// Bytes of `history` that exist, saturating; a unit starts with one virtual zero byte, so that
    /// how a unit begins is part of the model.
    available: u8,
    /// Longest suffix of the history that can be a known context.
    known: u8,
}

impl Default for State {
    fn default() -> Self {
        Self { history: 0, available: 1, known: 1 }
    }
}

impl State {
    #[inline(always)]
    fn push(&mut self, byte: u8) {
        self.history = (self.history << 8) | u64::from(byte);
        self.available = (self.available + 1).min(MAX_ORDER + 2);
    }
}

/// A frozen model: costs by n-gram, in one flat open-addressing table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextModel {
    order: u8,
    trained_bytes: u64,
    /// Escape from the empty context, for a byte that training never saw.
    escape_all: u16,
    table: Vec<Entry>,
}

/// Why the bytes of a model were refused.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The order is out of range.
    #[error("context order {0} is not between 1 and {MAX_ORDER}; the snapshot was made by another version")]
    Order(u8),
    /// The escape of the empty context costs more than any byte may.
    #[error("escape cost {0} is more than {MAX_COST}; it was written by a faulty program")]
    Escape(u16),
    /// The table's length is not a power of two or disagrees with the bytes.
    #[error("the n-gram table has an impossible length; the snapshot is damaged, fetch it again")]
    TableLength,
}

impl ContextModel {
    fn build(
        order: u8,
        trained_bytes: u64,
        entries: &[KeptNgram],
        ngrams: &[(u64, u32)],
        max_table_bytes: usize,
    ) -> Self {
        let (total, distinct) = ngrams
            .iter()
            .filter(|(key, _)| key >> 56 == 1)
            .fold((0u64, 0u64), |(total, distinct), (_, count)| (total + u64::from(*count), distinct + 1));
        let escape_all = cost_of_ratio(distinct.max(1), (2 * total).max(1));
        let table = place(entries, table_len(entries.len(), max_table_bytes));
        Self { order, trained_bytes, escape_all, table }
    }

    /// Memory of the table, in bytes.
    pub fn table_bytes(&self) -> usize {
        self.table.len() * ENTRY_BYTES
    }

    #[inline(always)]
    fn find(&self, key: u64) -> Option<Entry> {
        let hash = mix(key);
        let tag = (hash >> 32) as u32 | 1;
        let mask = self.table.len().wrapping_sub(1);
        let start = hash as usize;
        for i in 0..MAX_PROBES {
            let entry = *self.table.get(start.wrapping_add(i) & mask)?;
            if entry.tag == tag {
                return Some(entry);
            }
            if entry.tag == 0 {
                return None;
            }
        }
        None
    }

    /// Code length of `byte` after what `state` has seen, in 1/256 bit, at most [`MAX_COST`];
    /// `state` moves on by the byte.
    #[inline(always)]
    pub fn step(&self, state: &mut State, byte: u8) -> u16 {
        let before = state.history;
        state.push(byte);
        let mut context = u32::from(state.known.min(self.order));
        let mut bits = 0u32;
        loop {
            if let Some(entry) = self.find(pack(state.history, context + 1))
                && entry.cost != NO_COST
            {
                // n-grams are suffix-closed: a longer context than this one is not known.
                state.known = (context + 1) as u8;
                return (bits + u32::from(entry.cost)).min(u32::from(MAX_COST)) as u16;
            }
            if context == 0 {
                // The start of a unit is the one context that need not have been an n-gram.
                state.known = 1;
                bits += u32::from(self.escape_all) + UNIFORM_COST;
                return bits.min(u32::from(MAX_COST)) as u16;
            }
            if let Some(entry) = self.find(pack(before, context))
                && entry.escape != NO_ESCAPE
            {
                bits += u32::from(entry.escape);
            }
            context -= 1;
        }
    }

    /// Code lengths of a whole unit, byte by byte, in 1/256 bit: `out[i]` is what `unit[i]` cost.
    pub fn costs(&self, unit: &[u8]) -> Vec<u16> {
        let mut state = State::default();
        unit.iter().map(|&byte| self.step(&mut state, byte)).collect()
    }

    /// Appends the model's bytes: order, trained bytes, escape, table length, slots; little-endian.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.push(self.order);
        out.extend_from_slice(&self.trained_bytes.to_le_bytes());
        out.extend_from_slice(&self.escape_all.to_le_bytes());
        out.extend_from_slice(&(self.table.len() as u32).to_le_bytes());
        for entry in &self.table {
            out.extend_from_slice(&entry.tag.to_le_bytes());
            out.extend_from_slice(&entry.cost.to_le_bytes());
            out.extend_from_slice(&entry.escape.to_le_bytes());
        }
    }

    /// Reads what [`Self::encode`] wrote. `slots` are the bytes of the table.
    pub(crate) fn decode(
        order: u8,
        trained_bytes: u64,
        escape_all: u16,
        slots: &[u8],
    ) -> Result<Self, ModelError> {
        if order == 0 || order > MAX_ORDER {
            return Err(ModelError::Order(order));
        }
        let (slots, rest) = slots.as_chunks::<ENTRY_BYTES>();
        if !rest.is_empty() || !slots.len().is_power_of_two() {
            return Err(ModelError::TableLength);
        }
        let table: Vec<Entry> = slots
            .iter()
            .map(|&[a, b, c, d, e, f, g, h]| Entry {
                tag: u32::from_le_bytes([a, b, c, d]),
                cost: u16::from_le_bytes([e, f]),
                escape: u16::from_le_bytes([g, h]),
            })
            .collect();
        if escape_all > MAX_COST {
            return Err(ModelError::Escape(escape_all));
        }
        Ok(Self { order, trained_bytes, escape_all, table })
    }
}

/// The table with `entries` placed in order, shortest first. One that finds no slot within
/// [`MAX_PROBES`] is left out: by chance that does not happen, and n-grams made to collide are not worth
/// a larger table.
fn place(entries: &[KeptNgram], len: usize) -> Vec<Entry> {
    let mut table = vec![Entry::default(); len];
    for &(key, cost, escape) in entries {
        let hash = mix(key);
        for i in 0..MAX_PROBES.min(len) {
            if let Some(slot) = table.get_mut((hash as usize).wrapping_add(i) & (len - 1))
                && slot.tag == 0
            {
                *slot = Entry { tag: (hash >> 32) as u32 | 1, cost, escape };
                break;
            }
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// The definition, word for word: maps of successor counts by context, looked up from the longest.
    struct Oracle {
        order: usize,
        contexts: BTreeMap<Vec<u8>, BTreeMap<u8, u64>>,
    }

    impl Oracle {
        fn train(order: usize, units: &[Vec<u8>]) -> Self {
            let mut contexts: BTreeMap<Vec<u8>, BTreeMap<u8, u64>> = BTreeMap::new();
            for unit in units {
                let text: Vec<u8> = core::iter::once(0).chain(unit.iter().copied()).collect();
                for i in 1..text.len() {
                    for o in 0..=order.min(i) {
                        *contexts.entry(text[i - o..i].to_vec()).or_default().entry(text[i]).or_default() +=
                            1;
                    }
                }
            }
            Self { order, contexts }
        }

        fn costs(&self, unit: &[u8]) -> Vec<u16> {
            let text: Vec<u8> = core::iter::once(0).chain(unit.iter().copied()).collect();
            (1..text.len())
                .map(|i| {
                    let mut bits = 0u32;
                    for o in (0..=self.order.min(i)).rev() {
                        let Some(successors) = self.contexts.get(&text[i - o..i]) else { continue };
                        let total: u64 = successors.values().sum();
                        if let Some(&count) = successors.get(&text[i]) {
                            bits += u32::from(cost_of_ratio(2 * count - 1, 2 * total));
                            return bits.min(u32::from(MAX_COST)) as u16;
                        }
                        bits += u32::from(cost_of_ratio(successors.len() as u64, 2 * total));
                    }
                    if !self.contexts.contains_key(&Vec::new()) {
                        bits += u32::from(cost_of_ratio(1, 1));
                    }
                    (bits + UNIFORM_COST).min(u32::from(MAX_COST)) as u16
                })
                .collect()
        }
    }

    fn model(order: u8, units: &[Vec<u8>]) -> ContextModel {
        let mut counts = Counts::new(order, 1 << 20);
        units.iter().for_each(|unit| counts.train(unit));
        counts.freeze(1 << 24)
    }

    fn units() -> impl Strategy<Value = Vec<Vec<u8>>> {
        // A small alphabet makes contexts repeat; zero is in it because units start with one.
        prop::collection::vec(
            prop::collection::vec(prop::sample::select(b"\0abc{\xff".to_vec()), 0..60),
            0..12,
        )
    }

    proptest! {
        #[test]
        fn costs_are_the_oracles(train in units(), test in units(), order in 1u8..=MAX_ORDER) {
            let model = model(order, &train);
            let oracle = Oracle::train(order as usize, &train);
            for unit in &test {
                prop_assert_eq!(model.costs(unit), oracle.costs(unit));
            }
        }

        #[test]
        fn freezing_does_not_depend_on_the_order_of_messages(mut train in units()) {
            let forward = model(5, &train);
            train.reverse();
            prop_assert_eq!(forward, model(5, &train));
        }

        #[test]
        fn pruning_keeps_a_proper_model(train in units(), test in units()) {
            // The smallest table allowed: pruned or not, every byte has a finite cost.
            let mut counts = Counts::new(5, 1 << 20);
            train.iter().for_each(|unit| counts.train(unit));
            let model = counts.freeze(0);
            for unit in &test {
                prop_assert!(model.costs(unit).iter().all(|&c| c <= MAX_COST));
            }
        }
    }

    #[test]
    fn log2_is_right_to_a_thousandth() {
        for x in (1..5000u64).chain([u64::from(u32::MAX), 1 << 40, (1 << 40) + 12345, u64::MAX / 2]) {
            let exact = (x as f64).log2();
            let got = f64::from(log2_fixed(x)) / 4096.0;
            assert!((exact - got).abs() < 1e-3, "log2({x}) = {exact}, got {got}");
        }
    }

    #[test]
    fn familiar_text_is_cheap_and_strange_text_is_not() {
        let model = model(5, &[b"GET /api/orders?page=1".to_vec(), b"GET /api/orders?page=2".to_vec()]);
        let total = |text: &[u8]| model.costs(text).iter().map(|&c| u32::from(c)).sum::<u32>() / 256;
        let familiar = total(b"GET /api/orders?page=2");
        assert!(familiar * 5 < total(b"GET /api/orders?page=1' OR 1=1--"), "{familiar}");
    }

    #[test]
    fn a_full_counter_says_so_and_still_trains() {
        let mut counts = Counts::new(5, 600);
        let noise: Vec<u8> = (0..4000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        counts.train(&noise);
        assert!(counts.overflowed() > 0);
        assert!(counts.freeze(1 << 20).costs(&noise).iter().all(|&c| c <= MAX_COST));
    }

    #[test]
    fn a_look_up_ends_in_a_full_table() {
        let full = ContextModel::decode(5, 0, 0, &[1u8; ENTRY_BYTES * 16]).unwrap();
        assert!(full.costs(b"any text").iter().all(|&c| c <= MAX_COST));
    }

    /// `mix` backwards: the n-gram bytes whose hash has these low bits, if there are such.
    fn colliding(low_bits: u64, wanted: usize) -> Vec<u64> {
        fn inverse(odd: u64) -> u64 {
            (0..6).fold(odd, |x, _| x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x))))
        }
        let (a, b) = (inverse(0x9E37_79B9_7F4A_7C15), inverse(0xBF58_476D_1CE4_E5B9));
        (0u64..)
            .map(|high| {
                let x = ((high << 34) | low_bits).wrapping_mul(b);
                let x = x ^ (x >> 29) ^ (x >> 58);
                x.wrapping_mul(a)
            })
            .filter(|key| key >> 56 == 6 && mix(*key) & 0x3_ffff_ffff == low_bits && (key >> 48) & 0xff == 0)
            .take(wanted)
            .collect()
    }

    #[test]
    fn ngrams_made_to_collide_take_neither_memory_nor_time() {
        let keys = colliding(12345, 70);
        let mut counts = Counts::new(5, 1 << 18);
        for key in &keys {
            counts.train(&key.to_be_bytes()[2..]);
        }
        for key in 0..5000u64 {
            counts.add(keys[0].wrapping_add(key << 34) & !(0xff << 48), 1);
        }
        let model = counts.freeze(4 << 20);
        assert!(model.table_bytes() <= 1 << 20, "{} bytes", model.table_bytes());
    }

    #[test]
    fn a_table_stays_within_its_bytes_whatever_was_counted() {
        let noise: Vec<u8> = (0..60_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
        for limit in [64 << 10, 256 << 10, 1 << 20] {
            let mut counts = Counts::new(5, 1 << 20);
            counts.train(&noise);
            counts.train(&noise[..30_000]);
            let model = counts.freeze(limit);
            assert!(model.table_bytes() <= limit, "{} of {limit}", model.table_bytes());
            assert!(model.costs(&noise[..5000]).iter().all(|&c| c <= MAX_COST));
        }
    }

    #[test]
    fn what_is_no_table_is_refused() {
        assert_eq!(ContextModel::decode(5, 0, 0, &[0; 24]), Err(ModelError::TableLength));
        assert_eq!(ContextModel::decode(9, 0, 0, &[0; 128]), Err(ModelError::Order(9)));
        let escape = MAX_COST + 1;
        assert_eq!(ContextModel::decode(5, 0, escape, &[0; 128]), Err(ModelError::Escape(escape)));
    }
}
