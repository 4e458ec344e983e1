//! What was scored before, word for word, is looked up instead of scored again.
//!
//! What: text is cut into stretches of up to 64 bytes that end with a line, a parameter, a JSON member or a
//! gap between words. What a stretch came to is kept beside what stood before it: the coder's state and
//! where the fields are. Where both come again, the sums go on and no byte is looked at but to compare it.
//!
//! Why: header lines, parameters, envelopes, system prompts and tool descriptions are most of a gateway's
//! bytes, and the same in every message. Their scores are those of the frozen model either way; whether
//! they are looked up changes the time and nothing else (tested against scoring without).
//!
//! What such stretches leave of a unit (what stands around its tokens, its end, all of a short one) is looked up too,
//! block by block, once it is normalised: an identifier's marker in its member is the same in every message.
//!
//! What is kept: only text that came at least twice, with no cost that depends on more than its own bytes and the
//! state before it; as it came only what holds no token. Where bytes cost more than the reference, what each cost is
//! looked at again: where a span of evidence begins and ends depends on what stood before. Of four stretches whose
//! hashes fall together the newest replaces the oldest; when the states are full, all of it starts anew.
//!
//! Cost: some 250 instructions a stretch that is known and follows what it followed before, 600 for one that
//! follows another, 250 for one that never came, and a detour for what stands between known ones, as blocks of
//! a few bytes are dear. So a model's texts are left alone for a megabyte once the detours cost more than the
//! look-ups saved, and its blocks for eight thousand once these did. Between requests all of it leaves a proxy's
//! caches: what is asked of every stretch takes two cache lines, and those of the stretch to come are read while the
//! one before is worked on. 3.2 MiB for whoever scores, allocated when text first comes again and touched as it fills.
//!
//! It can be switched off ([`Scratch::score_anew`](super::Scratch::score_anew)).
//!
//! Left out on purpose: keeping it in a snapshot. A snapshot holds no text; this holds traffic, in memory
//! alone and for as long as the process runs. Who measures how long a message takes can tell text that was
//! scored before from text that was not, as with every cache.

use alloc::vec;
use alloc::vec::Vec;

use crate::bitmap::{Block64, below, equal};
use crate::coder::{FieldNumber, State, WINDOW, scatter};
use crate::words::Passage;

/// Longest stretch, bytes.
pub(super) const STRETCH_BYTES: usize = WINDOW;
/// Shortest stretches, bytes: what is shorter goes on with the next. Text parts between words.
const SHORTEST_LINE: usize = 12;
const SHORTEST_MEMBER: usize = 16;
const SHORTEST_TEXT: usize = 44;

/// What leaving the plain way for a stretch costs, in bytes of text that could have been scored.
const DETOUR: i32 = 48;
/// So much more was lost than won before a model's texts are left alone, for so many bytes.
const MOST_LOSS: i32 = 1 << 12;
const LEFT_ALONE: u32 = 1 << 20;
/// What they have won already when they are looked at again. What is learned is lost until it comes a third time: text
/// that takes turns with much other text has to be learned whole before it wins.
const ADVANCE: i32 = 3 * MOST_LOSS;
/// How many models' gains are told apart.
const ACCOUNTS: usize = 16;

/// The same of blocks, in what a look costs (90 instructions): what it costs to keep one, what one that is known saves,
/// and beside that for each four bytes of it; when they are left alone, and for how many blocks.
const BLOCK_KEPT: i32 = 8;
const BLOCK_KNOWN: i32 = 3;
const MOST_BLOCKS_LOST: i32 = 1 << 8;
const BLOCKS_LEFT_ALONE: u32 = 1 << 13;

/// Places for stretches, states, and marks of what came once. Powers of two.
const STRETCHES: usize = 1 << 13;
pub(super) const STATES: usize = 1 << 12;
/// Places that a stretch and its mark may have.
const WAYS: usize = 4;
const MARKS: usize = 1 << 15;

/// Where a known state stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StateId(u16);

/// What a stretch came to.
#[derive(Clone, Debug)]
pub(super) struct Sums {
    /// Code length, 1/256 bit.
    pub(super) cost: u32,
    /// Sum of (c/2)^4 over the costs c in bits.
    pub(super) peak_sum: u32,
    /// The fields that end in it, if any does.
    pub(super) ended: Option<Ended>,
    /// Cost and bytes of the field under way behind it, of those since the stretch began.
    pub(super) field_cost: u32,
    pub(super) field_bytes: u8,
}

/// Fields that end in a stretch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    /// Cost and bytes that it adds to the first of them, which may have begun before.
    pub(super) cost: u32,
    pub(super) bytes: u8,
    pub(super) field: Option<FieldNumber>,
    /// What the others add to the unit's sum.
    pub(super) others: u32,
}

/// What a stretch came to depends on beyond the state, and most do not.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Also {
    /// The plain state before it.
    pub(super) plain: Option<u32>,
    /// The path before it; and the path behind it.
    pub(super) path: Option<(u32, u32)>,
}

/// A stretch that was scored: what is asked of every one in a cache line, and its text in another. Where stretches
/// follow one another, most of the time would go into waiting for these.
#[derive(Clone, Debug)]
#[repr(C, align(128))]
pub(super) struct Known {
    pub(super) before: StateId,
    pub(super) after: StateId,
    /// The place of what followed it last. Another may have come there since.
    next: u16,
    len: u8,
    flags: u8,
    cost: u32,
    peak_sum: u32,
    field_cost: u32,
    ended_cost: u32,
    ended_others: u32,
    ended_field: u16,
    ended_bytes: u8,
    field_bytes: u8,
    pub(super) words: Passage,
    bytes: [u8; STRETCH_BYTES],
}

/// What few stretches are asked for.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(super) struct Seldom {
    /// What else it depends on.
    pub(super) also: Also,
    /// Its bytes that cost more than the reference, as bits.
    pub(super) above: u64,
    /// What its bytes cost.
    pub(super) costs: [u16; WINDOW],
}

impl Known {
    /// Nothing follows its text.
    const LAST: u8 = 1;
    /// A field ends in it.
    const ENDS: u8 = 2;
    /// It depends on more than the state.
    const ALSO: u8 = 4;
    /// Some byte costs more than the reference.
    const ABOVE: u8 = 8;
    /// Its text is normalised.
    const NORMALISED: u8 = 16;

    pub(super) fn new(
        before: StateId,
        after: StateId,
        text: Text,
        sums: Sums,
        words: Passage,
        seldom: &Seldom,
    ) -> Self {
        let Sums { cost, peak_sum, ended, field_cost, field_bytes } = sums;
        let flag = |holds: bool, flag: u8| if holds { flag } else { 0 };
        let flags = flag(text.last, Self::LAST)
            | flag(ended.is_some(), Self::ENDS)
            | flag(seldom.also.plain.is_some() || seldom.also.path.is_some(), Self::ALSO)
            | flag(seldom.above != 0, Self::ABOVE)
            | flag(text.normalised, Self::NORMALISED);
        let ended = ended.unwrap_or(Ended { cost: 0, bytes: 0, field: None, others: 0 });
        Self {
            before,
            after,
            next: 0,
            len: text.len,
            flags,
            cost,
            peak_sum,
            field_cost,
            ended_cost: ended.cost,
            ended_others: ended.others,
            ended_field: FieldNumber::pack(ended.field),
            ended_bytes: ended.bytes,
            field_bytes,
            words,
            bytes: text.bytes,
        }
    }

    /// Bytes of its text.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.len.into()
    }

    #[inline(always)]
    fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Whether it depends on more than the state before it.
    #[inline(always)]
    pub(super) fn asks_more(&self) -> bool {
        self.is(Self::ALSO)
    }

    /// Whether some byte costs more than the reference.
    #[inline(always)]
    pub(super) fn is_above(&self) -> bool {
        self.is(Self::ABOVE)
    }

    /// What it came to.
    #[inline(always)]
    pub(super) fn sums(&self) -> Sums {
        Sums {
            cost: self.cost,
            peak_sum: self.peak_sum,
            ended: self.is(Self::ENDS).then_some(Ended {
                cost: self.ended_cost,
                bytes: self.ended_bytes,
                field: FieldNumber::unpack(self.ended_field),
                others: self.ended_others,
            }),
            field_cost: self.field_cost,
            field_bytes: self.field_bytes,
        }
    }

    /// Whether `text`, as it came, begins with it; `at_end` says that nothing follows that.
    #[inline(always)]
    pub(super) fn begins(&self, text: &[u8], at_end: bool) -> bool {
        let len = self.len();
        // All 64 bytes at once: comparing a few of them is a call natively and a loop in wasm.
        let same = Block64::new(text).same(&Block64::new(&self.bytes)) | !below(len) == u64::MAX;
        same && len <= text.len()
            && match self.flags & (Self::LAST | Self::NORMALISED) {
                0 => true,
                Self::LAST => at_end && text.len() == len,
                _ => false,
            }
    }

    #[inline(always)]
    fn says(&self, text: &Text) -> bool {
        // All of it at once: where two differ nobody asks.
        let differ = self.bytes.iter().zip(&text.bytes).fold(0, |differ, (a, b)| differ | a ^ b);
        differ == 0
            && self.len == text.len
            && self.is(Self::LAST) == text.last
            && self.is(Self::NORMALISED) == text.normalised
    }
}

/// What is asked first of the stretch that followed last, read while the one before is worked on: it is there when
/// it is needed. Of use until something is kept or forgotten.
#[derive(Clone, Copy, Debug)]
pub(super) struct Foretold {
    pub(super) place: usize,
    pub(super) before: StateId,
    /// The first byte of its text.
    pub(super) begins: u8,
}

/// What looking for known stretches brought for a model, in bytes, or for known blocks, in looks.
#[derive(Clone, Copy, Debug, Default)]
struct Gain {
    won: i32,
    left_alone: u32,
}

/// Where a model's units begin.
#[derive(Clone, Copy, Debug, Default)]
struct Start {
    /// Of this model, and as long as the states have their numbers.
    state: Option<(u64, u64, StateId)>,
    /// As [`Known::next`].
    next: u16,
}

/// Stretches that were scored, and the states between them.
#[derive(Clone, Debug, Default)]
pub(super) struct Memo {
    /// Upper hash bits of what came once, newest first. Four a place, as two that shared one would push each other
    /// out for ever.
    marks: Vec<[u16; WAYS]>,
    known: Vec<Known>,
    /// The rest of each.
    seldom: Vec<Seldom>,
    /// By hash: a place in `known`, and one more; 0 is free.
    places: Vec<u16>,
    states: Vec<(u64, State)>,
    /// Open addressing: a state's number + 1; 0 is free.
    index: Vec<u16>,
    gains: [Gain; ACCOUNTS],
    block_gains: [Gain; ACCOUNTS],
    starts: [Start; ACCOUNTS],
    /// Nothing is kept.
    off: bool,
    /// Bytes that were looked up.
    pub(super) known_bytes: u64,
    /// How often the states were full: a state's number holds until then.
    pub(super) epoch: u64,
    /// So many states are kept fewer, for tests of what happens when they are full.
    #[cfg(test)]
    pub(super) fewer_states: usize,
}

/// Where a text can be cut into stretches, in 64 bytes of it.
#[derive(Debug)]
pub(super) struct Cuts {
    base: usize,
    /// Last bytes of lines and parameters, of members of an object and what leads to their values, and of
    /// words.
    lines: u64,
    members: u64,
    gaps: u64,
}

impl Cuts {
    #[inline(always)]
    pub(super) fn new(text: &[u8], base: usize) -> Self {
        let block = Block64::new(text.get(base..).unwrap_or_default());
        let quotes = block.bits(|bytes| equal(bytes, b'"'));
        // An empty line belongs to the line before.
        let returns = block.bits(|bytes| equal(bytes, b'\r'));
        let lines = block.bits(|bytes| equal(bytes, b'\n') | equal(bytes, b'&')) & !(returns >> 1);
        let gaps = quotes | block.bits(|bytes| equal(bytes, b' ') | equal(bytes, b','));
        let mut members = 0;
        if quotes != 0 {
            let commas = block.bits(|bytes| equal(bytes, b','));
            let colons = block.bits(|bytes| equal(bytes, b':'));
            members = commas & (quotes >> 1 | quotes >> 2) | quotes & (colons << 1 | colons << 2);
        }
        Self { base, lines, members, gaps }
    }

    /// Length of the stretch from `at` on; nothing if its end is not in the text. `at` never falls.
    #[inline(always)]
    pub(super) fn stretch(&mut self, text: &[u8], at: usize) -> Option<usize> {
        loop {
            let into = at - self.base;
            let ends = self.lines & !below(into + SHORTEST_LINE - 1)
                | self.members & !below(into + SHORTEST_MEMBER - 1)
                | self.gaps & !below(into + SHORTEST_TEXT - 1);
            if ends != 0 {
                return Some(ends.trailing_zeros() as usize + 1 - into);
            }
            if into == 0 {
                return (text.len() - at >= STRETCH_BYTES).then_some(STRETCH_BYTES);
            }
            *self = Self::new(text, at);
        }
    }
}

/// Whether the last bytes of a text are a stretch.
pub(super) fn is_stretch(rest: &[u8]) -> bool {
    (SHORTEST_LINE..=STRETCH_BYTES).contains(&rest.len())
}

/// What a stretch of text says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text {
    /// Its bytes, and zeros: compared and hashed without a branch on the length.
    bytes: [u8; STRETCH_BYTES],
    len: u8,
    /// Nothing follows it.
    last: bool,
    /// It is as the coder gets it, with markers in the place of tokens; else as it came.
    normalised: bool,
}

/// A stretch of text that is looked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    pub(super) text: Text,
    hash: u64,
}

impl Stretch {
    /// The first `len` bytes of `text` as it came, at least one and at most 64.
    #[inline(always)]
    pub(super) fn new(text: &[u8], len: usize, last: bool) -> Self {
        Self::of(text, len, last, false)
    }

    /// Normalised text of 1 to 64 bytes.
    #[inline(always)]
    pub(super) fn normalised(text: &[u8], last: bool) -> Self {
        Self::of(text, text.len().min(STRETCH_BYTES), last, true)
    }

    #[inline(always)]
    fn of(text: &[u8], len: usize, last: bool, normalised: bool) -> Self {
        let bytes = Block64::new(text).front(len);
        let mut hash = (len as u64) << 2 | u64::from(normalised) << 1 | u64::from(last);
        for (eight, i) in bytes.as_chunks::<8>().0.iter().zip(1..) {
            let spread = u64::from_le_bytes(*eight).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            hash = hash.wrapping_add(spread.rotate_left(7 * i));
        }
        Self { text: Text { bytes, len: len as u8, last, normalised }, hash: scatter(hash ^ hash >> 32) }
    }

    /// Where its mark may be.
    #[inline(always)]
    fn marks(&self) -> usize {
        self.hash as usize & (MARKS / WAYS - 1)
    }

    #[inline(always)]
    fn mark(&self) -> u16 {
        // Never 0, and never another's complement.
        (self.hash >> 49) as u16 | 1
    }

    /// The first of the places where what it came to behind this state may be.
    #[inline(always)]
    fn place(&self, before: StateId) -> usize {
        (scatter(self.hash ^ u64::from(before.0)) >> 40) as usize & (STRETCHES - WAYS)
    }
}

impl Text {
    /// Its bytes.
    #[inline(always)]
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len.into()).unwrap_or_default()
    }

    /// Nothing follows it.
    pub(super) fn is_last(&self) -> bool {
        self.last
    }
}

impl Memo {
    /// Forgets all, and keeps nothing from now on.
    pub(super) fn turn_off(&mut self) {
        *self = Self { off: true, known_bytes: self.known_bytes, ..Self::default() };
    }

    /// Whether texts of this model are worth a look, and if so, whether one was worth it so far; `bytes` come
    /// now.
    #[inline(always)]
    pub(super) fn prospect(&mut self, model: u64, bytes: usize) -> Option<bool> {
        let gain = self.gains.get_mut(model as usize & (ACCOUNTS - 1))?;
        let look = gain.left_alone == 0 && !self.off;
        gain.left_alone = gain.left_alone.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
        look.then_some(gain.won >= 0)
    }

    /// A look at a text of this model found so many bytes known, with so many detours.
    #[inline(always)]
    pub(super) fn account(&mut self, model: u64, known: usize, detours: i32) {
        let Some(gain) = self.gains.get_mut(model as usize & (ACCOUNTS - 1)) else { return };
        let known = i32::try_from(known).unwrap_or(MOST_LOSS);
        let most = gain.won.max(MOST_LOSS);
        gain.won = gain.won.saturating_add(known).saturating_sub(detours.saturating_mul(DETOUR)).min(most);
        if gain.won < -MOST_LOSS {
            *gain = Gain { won: ADVANCE, left_alone: LEFT_ALONE };
        }
    }

    /// Whether to look at a block of this model; if so, that is paid for.
    #[inline(always)]
    pub(super) fn looks_at_block(&mut self, model: u64) -> bool {
        let Some(gain) = self.block_gains.get_mut(model as usize & (ACCOUNTS - 1)) else { return false };
        if self.off || gain.left_alone > 0 {
            gain.left_alone = gain.left_alone.saturating_sub(1);
            return false;
        }
        gain.won -= 1;
        if gain.won < -MOST_BLOCKS_LOST {
            *gain = Gain { won: 0, left_alone: BLOCKS_LEFT_ALONE };
        }
        true
    }

    /// A block of this model was kept, or so many of its bytes were known.
    #[inline(always)]
    pub(super) fn account_block(&mut self, model: u64, known: Option<usize>) {
        let won = known.map_or(-BLOCK_KEPT, |len| BLOCK_KNOWN + len as i32 / 4);
        if let Some(gain) = self.block_gains.get_mut(model as usize & (ACCOUNTS - 1)) {
            gain.won = gain.won.saturating_add(won).min(MOST_LOSS);
        }
    }

    /// Whether the stretch came before, and nothing speaks against keeping it; from now on it came.
    #[inline(always)]
    pub(super) fn came_before(&mut self, stretch: &Stretch) -> bool {
        if self.marks.is_empty() {
            self.marks = vec![[0; WAYS]; MARKS / WAYS];
        }
        let mark = stretch.mark();
        let Some(marks) = self.marks.get_mut(stretch.marks()) else { return false };
        if marks.contains(&mark) {
            return true;
        }
        if !marks.contains(&!mark) {
            let [first, second, third, _] = *marks;
            *marks = [mark, first, second, third];
        }
        false
    }

    /// The stretch cannot be kept.
    pub(super) fn give_up(&mut self, stretch: &Stretch) {
        let (mark, marks) = (stretch.mark(), self.marks.get_mut(stretch.marks()));
        if let Some(place) = marks.and_then(|marks| marks.iter_mut().find(|place| **place == mark)) {
            *place = !mark;
        }
    }

    /// The number of a state of a model, but for its path and last bytes.
    pub(super) fn state_id(&mut self, model: u64, state: &State) -> StateId {
        #[cfg(test)]
        let full = STATES - self.fewer_states;
        #[cfg(not(test))]
        let full = STATES;
        if self.states.len() >= full {
            self.states.clear();
            self.index.clear();
            self.known.clear();
            self.seldom.clear();
            self.places.clear();
            self.epoch += 1;
        }
        if self.index.is_empty() {
            self.index = vec![0; 2 * STATES];
            self.states.reserve_exact(STATES);
        }
        let mask = self.index.len() - 1;
        let mut at = state.hash(model) as usize & mask;
        // At most half of the places are taken.
        while let Some(slot) = self.index.get_mut(at) {
            let Some(number) = slot.checked_sub(1) else {
                *slot = self.states.len() as u16 + 1;
                break;
            };
            if let Some((of, known)) = self.states.get(usize::from(number))
                && *of == model
                && known.is_like(state)
            {
                return StateId(number);
            }
            at = (at + 1) & mask;
        }
        self.states.push((model, state.clone()));
        StateId(self.states.len() as u16 - 1)
    }

    /// The state with this number.
    pub(super) fn state(&self, id: StateId) -> Option<&State> {
        self.states.get(usize::from(id.0)).map(|(_, state)| state)
    }

    /// The place of what this stretch came to in this state; `holds` tells whether what else that depends on
    /// is so.
    #[inline(always)]
    pub(super) fn find(
        &self,
        before: StateId,
        stretch: &Stretch,
        mut holds: impl FnMut(&Also) -> bool,
    ) -> Option<(usize, &Known, &Seldom)> {
        let first = stretch.place(before);
        self.places.get(first..first + WAYS)?.iter().find_map(|&place| {
            let place = usize::from(place).checked_sub(1)?;
            let (known, seldom) = self.known(place)?;
            let found = known.before == before
                && known.says(&stretch.text)
                && (!known.asks_more() || holds(&seldom.also));
            found.then_some((place, known, seldom))
        })
    }

    /// What stands in this place.
    #[inline(always)]
    pub(super) fn known(&self, place: usize) -> Option<(&Known, &Seldom)> {
        Some((self.known.get(place)?, self.seldom.get(place)?))
    }

    /// What followed last behind this.
    #[inline(always)]
    pub(super) fn behind(&self, known: &Known) -> Option<Foretold> {
        self.foretold(known.next)
    }

    #[inline(always)]
    fn foretold(&self, place: u16) -> Option<Foretold> {
        let known = self.known.get(usize::from(place))?;
        Some(Foretold { place: place.into(), before: known.before, begins: *known.bytes.first()? })
    }

    /// Behind the stretch of this place another follows.
    pub(super) fn follow(&mut self, place: usize, next: usize) {
        if let Some(known) = self.known.get_mut(place) {
            known.next = next as u16;
        } else if let Some(start) = self.starts.get_mut(place.wrapping_sub(STRETCHES)) {
            start.next = next as u16;
        }
    }

    /// Where a unit of this model begins: a place that stretches follow; the state there if it was
    /// [told](Self::begins_in); what followed last.
    #[inline(always)]
    pub(super) fn start(&self, model: u64) -> (usize, Option<StateId>, Option<Foretold>) {
        let account = model as usize & (ACCOUNTS - 1);
        let start = self.starts.get(account).copied().unwrap_or_default();
        let of_now = start.state.filter(|&(of, epoch, _)| of == model && epoch == self.epoch);
        (STRETCHES + account, of_now.map(|(_, _, state)| state), self.foretold(start.next))
    }

    /// Units of this model begin in this state.
    pub(super) fn begins_in(&mut self, model: u64, state: StateId) {
        if let Some(start) = self.starts.get_mut(model as usize & (ACCOUNTS - 1)) {
            start.state = Some((model, self.epoch, state));
        }
    }

    /// Keeps what the stretch came to; of those whose hashes fall together the oldest is forgotten.
    pub(super) fn keep(&mut self, stretch: &Stretch, known: Known, seldom: Seldom) {
        if self.places.is_empty() {
            self.places = vec![0; STRETCHES];
            // All at once: what grows bit by bit leaves holes behind, and a wasm memory never shrinks. Nothing of it
            // is touched before it is needed.
            self.known.reserve_exact(STRETCHES);
            self.seldom.reserve_exact(STRETCHES);
        }
        let first = stretch.place(known.before);
        let Some(ways) = self.places.get_mut(first..first + WAYS) else { return };
        let oldest = ways.last().copied().unwrap_or(0);
        let old = usize::from(oldest).wrapping_sub(1);
        let place = match (self.known.get_mut(old), self.seldom.get_mut(old)) {
            (Some(slot), Some(old_seldom)) => {
                (*slot, *old_seldom) = (known, seldom);
                oldest
            }
            _ => {
                self.known.push(known);
                self.seldom.push(seldom);
                self.known.len() as u16
            }
        };
        ways.rotate_right(1);
        if let Some(newest) = ways.first_mut() {
            *newest = place;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Sums = Sums { cost: 0, peak_sum: 0, ended: None, field_cost: 0, field_bytes: 0 };

    /// Where their hashes fall together nothing but the comparison tells them apart.
    #[test]
    fn text_as_it_came_is_not_taken_for_normalised_text_nor_an_end_for_a_middle() {
        let before = StateId(0);
        for (is, other) in [((false, false), (false, true)), ((false, false), (true, false))] {
            let stretch = |i: u32, (normalised, last): (bool, bool)| {
                let text = alloc::format!("parameter={i:08}&");
                Stretch::of(text.as_bytes(), text.len(), last, normalised)
            };
            let together = (0..).find(|&i| stretch(i, is).place(before) == stretch(i, other).place(before));
            let (is, other) = together.map(|i| (stretch(i, is), stretch(i, other))).unwrap();
            for (kept, asked) in [(is, other), (other, is)] {
                let mut memo = Memo::default();
                let seldom = Seldom { also: Also::default(), above: 0, costs: [0; WINDOW] };
                memo.keep(
                    &kept,
                    Known::new(before, before, kept.text, NOTHING, Passage::default(), &seldom),
                    seldom,
                );
                assert_eq!(memo.find(before, &kept, |_| true).map(|(place, ..)| place), Some(0));
                assert!(memo.find(before, &asked, |_| true).is_none());
                let (known, _) = memo.known(0).unwrap();
                let (as_it_came, last) = (!kept.text.normalised, kept.text.last);
                assert_eq!(known.begins(kept.text.bytes(), true), as_it_came);
                assert_eq!(known.begins(kept.text.bytes(), false), as_it_came && !last);
            }
        }
    }

    #[test]
    fn a_stretch_gives_way_to_the_fourth_behind_it() {
        let mut memo = Memo::default();
        let before = StateId(0);
        let stretch = |i: u32| Stretch::new(alloc::format!("parameter={i:08}&").as_bytes(), 19, false);
        let place = |i: &u32| stretch(*i).place(before);
        let together: Vec<u32> = (0..).filter(|i| place(i) == place(&0)).take(3 * WAYS).collect();
        for (kept, &i) in together.iter().enumerate() {
            let seldom = Seldom { also: Also::default(), above: 0, costs: [i as u16; WINDOW] };
            memo.keep(
                &stretch(i),
                Known::new(before, before, stretch(i).text, NOTHING, Passage::default(), &seldom),
                seldom,
            );
            for (at, &i) in together.iter().enumerate() {
                let found = memo.find(before, &stretch(i), |_| true).map(|(_, _, seldom)| seldom.costs[0]);
                let stays = at <= kept && kept < at + WAYS;
                assert_eq!(found, stays.then_some(i as u16), "{at} behind {kept}");
            }
        }
    }
}
