//! The frozen model: a back-off automaton in a double array, and how it is run.
//!
//! A state is a kept context. Its row holds a slot for each symbol that it predicts (what the symbol
//! costs, and the state behind it) and one slot to back off by (what the escape costs, and the next
//! shorter kept context). Rows lie in one array, shifted into each other's gaps (Aho, Sethi, Ullman 1986,
//! section 3.9; Aoe 1989): a slot carries its label, so a foreign slot is known for one. The state is
//! always the longest kept context that the unit's bytes end with, whichever way it was reached, so a
//! unit can be cut anywhere and its parts run side by side.

use alloc::vec;
use alloc::vec::Vec;
use core::cell::Cell;

use super::context::{FIELD_ORDER, PLAIN_ORDER};
use super::{ModelError, cost_of, identity, scatter, weighted};
use crate::field::{FieldTracker, START};

/// Bytes that are costed at once.
pub const BLOCK_BYTES: usize = 512;

/// Fewest bytes that are worth four lanes.
const LANES_FROM: usize = 48;
const LANES: usize = 4;

/// Where a field's contexts end.
pub(super) const NOWHERE: u32 = NEXT;
/// A walk down the contexts passes at most those of a field and of plain text; more are a lie.
const MAX_WALK: u32 = FIELD_ORDER + PLAIN_ORDER + 4;

const NEXT: u32 = (1 << LABEL_SHIFT) - 1;
const LABEL_SHIFT: u32 = 23;
/// In a slot in memory: above the cost's peak weight (17 bits) and the cost (14 bits) stand the next
/// state's base (23 bits) and the label (9 bits). One load tells all of a byte.
const NEXT_SHIFT: u32 = 32;
const WEIGHT_SHIFT: u32 = 14;
const COST_MASK: u64 = (1 << WEIGHT_SHIFT) - 1;
/// Most slots of a model, so that every base fits beside its label.
pub(super) const MAX_SLOTS: usize = NEXT as usize - Slot::ROW;

/// A slot under construction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    packed: u32,
    code: u8,
}

impl Default for Slot {
    fn default() -> Self {
        Self { packed: u32::MAX, code: 0 }
    }
}

impl Slot {
    /// Label of the slot to back off by.
    pub(super) const BACK_OFF: u16 = 256;
    /// Label of the end of a unit.
    pub(super) const END: u16 = 257;
    /// Slots that a row can reach.
    pub(super) const ROW: usize = 258;

    pub(super) fn new(label: u16, next: u32, code: u8) -> Self {
        Self { packed: u32::from(label) << LABEL_SHIFT | next & NEXT, code }
    }
}

/// A field with contexts of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FieldRoots {
    /// The field's hash.
    pub(super) field: u32,
    /// Where a value begins.
    pub(super) anchored: u32,
    /// Where nothing of the value helps.
    pub(super) inside: u32,
}

/// Bytes of [`FieldRoots`] in a snapshot.
const FIELD_BYTES: usize = 12;
/// Bytes of a slot in a snapshot.
const SLOT_BYTES: usize = 5;

/// A frozen model: what each byte costs, given those before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextModel {
    trained_bytes: u64,
    /// Label, next state's base, peak weight and cost.
    slots: Vec<u64>,
    /// Cost code of each slot, to write it again.
    codes: Vec<u8>,
    /// By rising hash.
    fields: Vec<FieldRoots>,
    /// Open addressing: a field's number + 1; 0 is free.
    field_index: Vec<u16>,
    /// The field of a unit's first bytes.
    start: Option<FieldNumber>,
    /// A hash of the tables.
    identity: u64,
}

/// A field with contexts of its own, by its place among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FieldNumber(u16);

impl FieldNumber {
    /// The place.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// As two bytes, or as what no field's number is.
    #[inline(always)]
    pub(crate) fn pack(field: Option<Self>) -> u16 {
        field.map_or(NO_FIELD, |field| field.0)
    }

    /// Of what [`Self::pack`] made.
    #[inline(always)]
    pub(crate) fn unpack(packed: u16) -> Option<Self> {
        (packed != NO_FIELD).then_some(Self(packed))
    }
}

/// Costs that are looked at together.
pub(crate) const WINDOW: usize = 64;

/// Where a running unit stands between two bytes; about 160 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    tracker: FieldTracker,
    /// Base of the automaton's state.
    at: u32,
    /// The field that the next byte stands in, if it has contexts of its own.
    field: Option<FieldNumber>,
    /// The last bytes, newest last.
    history: [u8; PLAIN_ORDER as usize],
    /// How many of them there are.
    seen: usize,
}

/// A stretch of a block that stands in one field, or in fields without contexts of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// One past its last byte in the block.
    pub end: usize,
    /// Its field.
    pub field: Option<FieldNumber>,
    /// The field ends with it.
    pub complete: bool,
}

/// What the bytes of a block cost.
#[derive(Clone, Debug)]
pub struct Block {
    costs: [u16; BLOCK_BYTES],
    len: usize,
    lanes: Lanes,
    segment_ends: [u16; BLOCK_BYTES],
    segment_fields: [u16; BLOCK_BYTES],
    segments: usize,
    last_complete: bool,
    /// What its bytes cost depends on those before it, beyond the state.
    looked_back: bool,
    /// Sum of (c/2)^4 over the costs c in bits.
    peak_sum: u64,
}

/// The block's parts, at fixed places beside each other, so that one index leads to a byte of each.
#[derive(Clone, Debug)]
struct Lanes {
    text: [[u8; LANE_BYTES]; LANES],
    /// The state in which a field begins at a byte, or [`ON`] if the state goes on.
    entries: [[u32; LANE_BYTES]; LANES],
    /// The lower half of each byte's slot, or what a walk came to in its form: cost and peak weight.
    raw: [[u32; LANE_BYTES]; LANES],
}

/// The last lane also has what four do not divide.
const LANE_BYTES: usize = BLOCK_BYTES / LANES + LANES - 1;

/// No field begins.
const ON: u32 = u32::MAX;
const NO_FIELD: u16 = u16::MAX;

impl Default for Block {
    fn default() -> Self {
        Self {
            costs: [0; BLOCK_BYTES],
            len: 0,
            lanes: Lanes {
                text: [[0; LANE_BYTES]; LANES],
                entries: [[ON; LANE_BYTES]; LANES],
                raw: [[0; LANE_BYTES]; LANES],
            },
            segment_ends: [0; BLOCK_BYTES],
            segment_fields: [0; BLOCK_BYTES],
            segments: 0,
            last_complete: false,
            looked_back: false,
            peak_sum: 0,
        }
    }
}

impl Block {
    /// Cost of each byte, 1/256 bit.
    pub fn costs(&self) -> &[u16] {
        self.costs.get(..self.len).unwrap_or_default()
    }

    /// The costs by 64, and how many of those are of its bytes; what follows them is of no meaning.
    #[inline(always)]
    pub(crate) fn windows(&self) -> impl Iterator<Item = (&[u16; WINDOW], usize)> {
        let left = (0..self.len).step_by(WINDOW).map(|from| (self.len - from).min(WINDOW));
        self.costs.as_chunks().0.iter().zip(left)
    }

    /// Whether what its bytes cost depends on the bytes before it by more than the state there.
    pub(crate) fn looked_back(&self) -> bool {
        self.looked_back
    }

    /// Sum of (c/2)^4 over the bytes' costs c in bits.
    pub fn peak_sum(&self) -> u64 {
        self.peak_sum
    }

    /// The stretches of one field each, in order.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let last = self.segments.wrapping_sub(1);
        self.segment_ends.iter().zip(&self.segment_fields).take(self.segments).enumerate().map(
            move |(i, (&end, &field))| Segment {
                end: end.into(),
                field: FieldNumber::unpack(field),
                complete: i != last || self.last_complete,
            },
        )
    }

    fn push_segment(&mut self, end: usize, field: Option<FieldNumber>) {
        if let (Some(ends), Some(fields)) =
            (self.segment_ends.get_mut(self.segments), self.segment_fields.get_mut(self.segments))
        {
            *ends = end as u16;
            *fields = FieldNumber::pack(field);
            self.segments += 1;
        }
    }
}

impl State {
    /// Whether the other differs in nothing but the path and the last bytes' values.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        (self.at, self.field, self.seen) == (other.at, other.field, other.seen)
            && self.tracker.is_like(&other.tracker)
    }

    /// A hash of what [`Self::is_like`] compares.
    pub(crate) fn hash(&self, seed: u64) -> u64 {
        let field = FieldNumber::pack(self.field);
        let place = u64::from(self.at) << 32 | u64::from(field) << 8 | self.seen as u64;
        scatter(self.tracker.hash(scatter(seed ^ place)))
    }

    /// Where in the fields the next byte stands.
    pub(crate) fn tracker(&mut self) -> &mut FieldTracker {
        &mut self.tracker
    }

    /// The state that is like `known`, behind `text`; of this one the path is kept, and of the last bytes those that
    /// `text` is too short for.
    pub(crate) fn go_on_as(&mut self, known: &Self, text: &[u8]) {
        let (path, mut history) = (self.tracker.path(), self.history);
        match text.last_chunk() {
            Some(last) => history = *last,
            None => {
                history.rotate_left(text.len());
                history.iter_mut().rev().zip(text.iter().rev()).for_each(|(to, &byte)| *to = byte);
            }
        }
        self.clone_from(known);
        self.tracker.set_path(path);
        self.history = history;
    }

    /// The field that the next byte stands in, if the model has contexts of its own for it.
    pub fn field(&self) -> Option<FieldNumber> {
        self.field
    }
}

impl ContextModel {
    pub(super) fn new(trained_bytes: u64, slots: Vec<Slot>, mut fields: Vec<FieldRoots>) -> Self {
        fields.truncate(usize::from(NO_FIELD) - 1);
        let codes = slots.iter().map(|slot| slot.code).collect();
        Self::assemble(trained_bytes, slots.into_iter().map(|slot| slot.packed), codes, fields)
    }

    fn assemble(
        trained_bytes: u64,
        packed: impl Iterator<Item = u32>,
        codes: Vec<u8>,
        fields: Vec<FieldRoots>,
    ) -> Self {
        let unpack =
            |(packed, &code): (u32, &u8)| u64::from(packed) << NEXT_SHIFT | weighted(cost_of(code.into()));
        let slots = packed.zip(&codes).map(unpack).collect();
        let field_index = index_of(&fields);
        let mut model = Self { trained_bytes, slots, codes, fields, field_index, start: None, identity: 0 };
        model.start = model.field(START);
        let of_fields = model.fields.iter().flat_map(|roots| [roots.field, roots.anchored, roots.inside]);
        model.identity = identity(model.slots.iter().copied().chain(of_fields.map(u64::from)));
        model
    }

    /// Bytes of the tables in a snapshot; in memory about 1.8 times as much.
    pub fn table_bytes(&self) -> usize {
        self.slots.len() * SLOT_BYTES + self.fields.len() * FIELD_BYTES + self.field_index.len() * 2
    }

    /// A hash of all that decides what bytes cost. Not one that withstands whoever makes models alike.
    pub(crate) fn identity(&self) -> u64 {
        self.identity
    }

    /// Bytes that were trained on.
    pub fn trained_bytes(&self) -> u64 {
        self.trained_bytes
    }

    /// How many fields have contexts of their own.
    pub fn fields(&self) -> usize {
        self.fields.len()
    }

    /// Before a unit's first byte.
    pub fn start(&self) -> State {
        let at = self.roots(self.start).map_or(0, |roots| roots.anchored);
        State {
            tracker: FieldTracker::default(),
            at,
            field: self.start,
            history: [0; PLAIN_ORDER as usize],
            seen: 0,
        }
    }

    #[inline(always)]
    fn field(&self, hash: u32) -> Option<FieldNumber> {
        let mask = self.field_index.len().wrapping_sub(1);
        let mut at = hash as usize & mask;
        for _ in 0..self.field_index.len() {
            let number = self.field_index.get(at)?.checked_sub(1)?;
            if self.fields.get(usize::from(number))?.field == hash {
                return Some(FieldNumber(number));
            }
            at = (at + 1) & mask;
        }
        None
    }

    #[inline(always)]
    fn roots(&self, field: Option<FieldNumber>) -> Option<&FieldRoots> {
        self.fields.get(field?.index())
    }

    /// Costs of the next bytes of a unit, at most [`BLOCK_BYTES`] of `text`; returns how many those are.
    #[inline]
    pub fn cost_block(&self, state: &mut State, text: &[u8], block: &mut Block) -> usize {
        let text = text.get(..BLOCK_BYTES).unwrap_or(text);
        let len = text.len();
        // Four lanes, of which the last has the rest; or that one alone.
        let quarter = if len >= LANES_FROM { len / LANES } else { 0 };
        let looked_back = Cell::new(false);
        let (history, seen) = (state.history, state.seen);
        let run = Run { model: self, text, history, seen, quarter, looked_back: &looked_back };

        let run_before = state.tracker.run();
        block.lanes.load(text, quarter);
        let behind = run.follow(state, text, block);
        let mut ats = [state.at; LANES];
        if quarter > 0 {
            for (lane, at) in (1..).zip(ats.iter_mut().skip(1)) {
                *at = run.state_at(quarter * lane, block, run_before);
            }
        }
        let at = if block.segments <= 1
            && block.segment_ends.first().is_some_and(|&end| usize::from(end) == len)
        {
            run.lanes::<false>(ats, len, &mut block.lanes)
        } else {
            let at = run.lanes::<true>(ats, len, &mut block.lanes);
            for &end in block.segment_ends.iter().take(block.segments) {
                block.lanes.enter(end.into(), quarter, ON);
            }
            at
        };
        block.len = len;
        block.looked_back = looked_back.get();
        block.peak_sum = block.lanes.unload(quarter, &mut block.costs, len);
        state.at = if behind == ON { at } else { behind };
        state.history = run.history_at(len);
        state.seen = (state.seen + len).min(PLAIN_ORDER as usize);
        len
    }

    /// What it costs that the unit ends here: in a field with contexts of its own, what its end costs;
    /// else nothing. In 1/256 bit.
    pub fn end_cost(&self, state: &State) -> Option<u16> {
        state.field?;
        let mut at = state.at;
        let mut spent = 0u32;
        for _ in 0..MAX_WALK {
            if let Some(end) = self.slot(at, Slot::END) {
                return Some(Entry(weighted(spent + end.cost())).cost() as u16);
            }
            let back_off = self.slot(at, Slot::BACK_OFF)?;
            spent += back_off.cost();
            if back_off.next() == NOWHERE {
                return Some(Entry(weighted(spent + 8 * super::UNITS_PER_BIT)).cost() as u16);
            }
            at = back_off.next();
        }
        None
    }

    /// The byte that would cost least next; the lowest of several.
    pub fn cheapest(&self, state: &State) -> u8 {
        let mut block = Block::default();
        let mut cost = |byte: &u8| {
            let mut state = state.clone();
            self.cost_block(&mut state, &[*byte], &mut block);
            block.costs().first().copied()
        };
        (0..=u8::MAX).min_by_key(|byte| cost(byte)).unwrap_or(0)
    }

    /// The slot with this label in the row of `at`.
    #[inline(always)]
    fn slot(&self, at: u32, label: u16) -> Option<Entry> {
        let slot = *self.slots.get(at as usize + usize::from(label))?;
        (slot >> (NEXT_SHIFT + LABEL_SHIFT) == u64::from(label)).then_some(Entry(slot))
    }

    /// The state of plain text before the next byte.
    pub(crate) fn plain_before(&self, state: &State) -> u32 {
        self.plain_state(state.history.get(PLAIN_ORDER as usize - state.seen..).unwrap_or_default())
    }

    /// The state behind `bytes` of plain text.
    pub(crate) fn plain_state(&self, bytes: &[u8]) -> u32 {
        let mut at = 0;
        for &byte in bytes {
            at = self.walk(at, byte).1;
        }
        at
    }

    /// The state behind `bytes` of a field's value, from `at`.
    fn field_state(&self, mut at: u32, bytes: &[u8]) -> u32 {
        for &byte in bytes {
            at = match self.walk(at, byte) {
                (Found::Symbol(_), next) => next,
                (Found::Nothing(_), last) => last,
            };
        }
        at
    }

    /// Walks down the contexts from `at` until one predicts `byte`.
    #[inline(always)]
    fn walk(&self, mut at: u32, byte: u8) -> (Found, u32) {
        let mut spent = 0;
        for _ in 0..MAX_WALK {
            if let Some(symbol) = self.slot(at, byte.into()) {
                return (Found::Symbol(spent + symbol.cost()), symbol.next());
            }
            let Some(back_off) = self.slot(at, Slot::BACK_OFF) else { break };
            spent += back_off.cost();
            if back_off.next() == NOWHERE {
                return (Found::Nothing(spent), at);
            }
            at = back_off.next();
        }
        (Found::Nothing(u32::from(super::MAX_COST)), 0)
    }

    /// Code lengths of a whole unit, byte by byte, in 1/256 bit: `out[i]` is what `unit[i]` cost.
    pub fn costs(&self, unit: &[u8]) -> Vec<u16> {
        let (mut state, mut block) = (self.start(), Block::default());
        let mut costs = Vec::with_capacity(unit.len());
        for text in unit.chunks(BLOCK_BYTES) {
            self.cost_block(&mut state, text, &mut block);
            costs.extend_from_slice(block.costs());
        }
        costs
    }

    /// Appends the model's bytes; little-endian: u64 trained bytes, u32 number of slots, u32 each, a byte
    /// each; u16 number of fields, three u32 each.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.trained_bytes.to_le_bytes());
        out.extend_from_slice(&(self.slots.len() as u32).to_le_bytes());
        for slot in &self.slots {
            out.extend_from_slice(&((slot >> NEXT_SHIFT) as u32).to_le_bytes());
        }
        out.extend_from_slice(&self.codes);
        out.extend_from_slice(&(self.fields.len() as u16).to_le_bytes());
        for roots in &self.fields {
            for value in [roots.field, roots.anchored, roots.inside] {
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// From the parts that [`Self::encode`] wrote: `slots` 4 bytes each, `codes` one each, `fields` 12.
    pub(crate) fn decode(
        trained_bytes: u64,
        slots: &[u8],
        codes: &[u8],
        fields: &[u8],
    ) -> Result<Self, ModelError> {
        let (slots, rest) = slots.as_chunks::<4>();
        let (fields, odd) = fields.as_chunks::<FIELD_BYTES>();
        if !rest.is_empty()
            || !odd.is_empty()
            || slots.len() != codes.len()
            || !(Slot::ROW..=MAX_SLOTS + Slot::ROW).contains(&slots.len())
        {
            return Err(ModelError::TableLength);
        }
        let fields: Vec<FieldRoots> = fields
            .iter()
            .map(|&[a, b, c, d, e, f, g, h, i, j, k, l]| FieldRoots {
                field: u32::from_le_bytes([a, b, c, d]),
                anchored: u32::from_le_bytes([e, f, g, h]),
                inside: u32::from_le_bytes([i, j, k, l]),
            })
            .collect();
        if !fields.is_sorted_by(|a, b| a.field < b.field) || fields.len() >= usize::from(NO_FIELD) {
            return Err(ModelError::Fields);
        }
        let packed = slots.iter().map(|&slot| u32::from_le_bytes(slot));
        Ok(Self::assemble(trained_bytes, packed, codes.to_vec(), fields))
    }
}

/// A slot, or what a walk came to in the form of one.
#[derive(Clone, Copy)]
struct Entry(u64);

impl Entry {
    #[inline(always)]
    fn cost(self) -> u32 {
        (self.0 & COST_MASK) as u32
    }

    #[inline(always)]
    fn next(self) -> u32 {
        (self.0 >> NEXT_SHIFT) as u32 & NEXT
    }
}

enum Found {
    /// What the symbol and the escapes before it cost.
    Symbol(u32),
    /// What the escapes cost; no context had the symbol.
    Nothing(u32),
}

fn index_of(fields: &[FieldRoots]) -> Vec<u16> {
    let mut index = vec![0; (fields.len() * 3).next_power_of_two().max(2)];
    let mask = index.len() - 1;
    for (roots, number) in fields.iter().zip(1..) {
        let mut at = roots.field as usize & mask;
        while index.get(at).is_some_and(|&taken| taken != 0) {
            at = (at + 1) & mask;
        }
        if let Some(free) = index.get_mut(at) {
            *free = number;
        }
    }
    index
}

impl Lanes {
    /// Where the text is parted: three times a quarter, and the rest.
    #[inline(always)]
    fn load(&mut self, text: &[u8], quarter: usize) {
        let mut rest = text;
        for (lane, i) in self.text.iter_mut().zip(1..) {
            let (part, behind) = rest.split_at_checked(quarter).unwrap_or_default();
            let (part, behind) = if i == LANES { (rest, behind) } else { (part, behind) };
            if let Some(lane) = lane.get_mut(..part.len()) {
                lane.copy_from_slice(part);
            }
            rest = behind;
        }
    }

    /// A field begins at byte `i` of the block.
    #[inline(always)]
    fn enter(&mut self, i: usize, quarter: usize, state: u32) {
        // A quarter of nothing: all of it is the last lane's.
        let lane = i.checked_div(quarter).map_or(LANES - 1, |lane| lane.min(LANES - 1));
        let entries = self.entries.get_mut(lane);
        if let Some(entry) = entries.and_then(|entries| entries.get_mut(i - lane * quarter)) {
            *entry = state;
        }
    }

    /// Writes the costs in order, forgets the entries, and returns the sum of the peak weights.
    #[inline(always)]
    fn unload(&mut self, quarter: usize, costs: &mut [u16; BLOCK_BYTES], len: usize) -> u64 {
        let mut sum = 0u32;
        let mut rest = costs.get_mut(..len).unwrap_or_default();
        for (raw, i) in self.raw.iter().zip(1..) {
            let here = if i == LANES { rest.len() } else { quarter };
            let Some((part, behind)) = rest.split_at_mut_checked(here) else { break };
            for (cost, &raw) in part.iter_mut().zip(raw) {
                *cost = (raw & COST_MASK as u32) as u16;
                // At most BLOCK_BYTES times 2^17.
                sum += raw >> WEIGHT_SHIFT;
            }
            rest = behind;
        }
        sum.into()
    }
}

/// One block's bytes, and what came before it.
struct Run<'a> {
    model: &'a ContextModel,
    text: &'a [u8],
    /// The bytes before the block, newest last.
    history: [u8; PLAIN_ORDER as usize],
    /// How many of them are the unit's.
    seen: usize,
    /// Bytes of a lane but the last.
    quarter: usize,
    /// Set when a cost depends on `history`.
    looked_back: &'a Cell<bool>,
}

impl Run<'_> {
    /// The last bytes before byte `i` of the block, newest last.
    #[inline(always)]
    fn history_at(&self, i: usize) -> [u8; PLAIN_ORDER as usize] {
        const ORDER: usize = PLAIN_ORDER as usize;
        if let Some(last) = self.text.get(..i).and_then(<[u8]>::last_chunk) {
            return *last;
        }
        let mut both = [0; 2 * ORDER];
        let (old, new) = both.split_at_mut(ORDER);
        old.copy_from_slice(&self.history);
        for (to, &byte) in new.iter_mut().zip(self.text) {
            *to = byte;
        }
        both.get(i..i + ORDER).and_then(<[u8]>::first_chunk).copied().unwrap_or_default()
    }

    /// The state behind as many of the last bytes before byte `i` as a plain context can have.
    #[cold]
    #[inline(never)]
    fn plain_at(&self, i: usize) -> u32 {
        if i < PLAIN_ORDER as usize {
            self.looked_back.set(true);
        }
        let seen = (self.seen + i).min(PLAIN_ORDER as usize);
        let history = self.history_at(i);
        self.model.plain_state(history.get(PLAIN_ORDER as usize - seen..).unwrap_or_default())
    }

    /// Cuts the block into its fields, and returns the state in which one begins behind it.
    #[inline(always)]
    fn follow(&self, state: &mut State, text: &[u8], block: &mut Block) -> u32 {
        (block.segments, block.last_complete) = (0, false);
        let mut behind = ON;
        let mut done = 0;
        while let Some(rest) = text.get(done..)
            && !rest.is_empty()
        {
            done += state.tracker.advance(rest).clamp(1, rest.len());
            if state.tracker.run() > 0 {
                continue;
            }
            let next = self.model.field(state.tracker.field());
            let entry = match self.model.roots(next) {
                Some(roots) => roots.anchored,
                None if state.field.is_none() => continue,
                None => self.plain_at(done),
            };
            block.push_segment(done, state.field);
            state.field = next;
            if done < text.len() {
                block.lanes.enter(done, self.quarter, entry);
            } else {
                block.last_complete = true;
                behind = entry;
            }
        }
        if !text.is_empty() && !block.last_complete {
            block.push_segment(text.len(), state.field);
        }
        behind
    }

    /// The lanes side by side, from these states; returns the state behind the last.
    #[inline(always)]
    fn lanes<const FIELDS: bool>(&self, ats: [u32; LANES], len: usize, lanes: &mut Lanes) -> u32 {
        let [mut a, mut b, mut c, mut d] = ats;
        let Lanes { text: [text_a, text_b, text_c, text_d], entries, raw } = lanes;
        let [entries_a, entries_b, entries_c, entries_d] = entries;
        let [raw_a, raw_b, raw_c, raw_d] = raw;
        let quarter = self.quarter.min(LANE_BYTES);
        for i in 0..quarter {
            self.step::<FIELDS>(0, i, &mut a, text_a, entries_a, raw_a);
            self.step::<FIELDS>(1, i, &mut b, text_b, entries_b, raw_b);
            self.step::<FIELDS>(2, i, &mut c, text_c, entries_c, raw_c);
            self.step::<FIELDS>(3, i, &mut d, text_d, entries_d, raw_d);
        }
        for i in quarter..(len - 3 * quarter).min(LANE_BYTES) {
            self.step::<FIELDS>(3, i, &mut d, text_d, entries_d, raw_d);
        }
        d
    }

    /// Costs byte `i` of a lane: writes the lower half of its slot.
    #[inline(always)]
    fn step<const FIELDS: bool>(
        &self,
        lane: usize,
        i: usize,
        at: &mut u32,
        text: &[u8; LANE_BYTES],
        entries: &[u32; LANE_BYTES],
        raw: &mut [u32; LANE_BYTES],
    ) {
        let (Some(&byte), Some(&entry), Some(raw)) = (text.get(i), entries.get(i), raw.get_mut(i)) else {
            return;
        };
        if FIELDS {
            // No branch: where a field begins is hard to foresee.
            *at = if entry == ON { *at } else { entry };
        }
        let slot = match self.model.slot(*at, byte.into()) {
            Some(slot) => slot,
            None => self.miss(lane * self.quarter + i, *at, byte),
        };
        *at = slot.next();
        *raw = slot.0 as u32;
    }

    /// As the end of [`Self::step`], for a byte that the longest context does not predict.
    #[inline(never)]
    fn miss(&self, i: usize, at: u32, byte: u8) -> Entry {
        let (cost, next) = match self.model.walk(at, byte) {
            (Found::Symbol(cost), next) => (cost, next),
            (Found::Nothing(escapes), last) => {
                let plain = match self.model.walk(self.plain_at(i), byte).0 {
                    Found::Symbol(cost) | Found::Nothing(cost) => cost,
                };
                (escapes + plain, last)
            }
        };
        Entry(u64::from(next) << NEXT_SHIFT | weighted(cost))
    }

    /// The state before byte `i` of the block, unless a field begins there.
    fn state_at(&self, i: usize, block: &Block, run_before: u32) -> u32 {
        let mut start = 0;
        for (segment, number) in block.segments().zip(0u32..) {
            if i < segment.end {
                let Some(roots) = self.model.roots(segment.field) else { break };
                let run = i - start + if number == 0 { run_before as usize } else { 0 };
                let longest = FIELD_ORDER as usize;
                let from = if run <= longest { roots.anchored } else { roots.inside };
                let (run, history) = (run.min(longest), self.history_at(i));
                let last = history.get(history.len() - run..).unwrap_or_default();
                return self.model.field_state(from, last);
            }
            start = segment.end;
        }
        self.plain_at(i)
    }
}
