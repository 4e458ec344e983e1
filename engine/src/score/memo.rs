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
//! What is kept: only text that came at least twice, that holds no token and no cost that depends on more
//! than its own bytes and the state before it. Where bytes cost more than the reference, what each cost is
//! looked at again: where a span of evidence begins and ends depends on what stood before. Of four stretches
//! whose hashes fall together the newest replaces the oldest; when the states are full, all of it starts
//! anew.
//!
//! Cost: some 250 instructions a stretch that is known and follows what it followed before, 600 for one that
//! follows another, 250 for one that never came, and a detour for what stands between known ones, as blocks of
//! a few bytes are dear. So a model's texts are left alone for a megabyte once the detours cost more than the
//! look-ups saved. At most 3.2 MiB for whoever scores, allocated as text comes again.
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
/// How many models' gains are told apart.
const ACCOUNTS: usize = 16;

/// Places for stretches, states, and marks of what came once. Powers of two.
const STRETCHES: usize = 1 << 13;
const STATES: usize = 1 << 12;
/// Places that a stretch may have.
const WAYS: usize = 4;
const MARKS: usize = 1 << 15;

/// Where a known state stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StateId(u16);

/// What a stretch came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sums {
    /// Code length and bytes, 1/256 bit.
    pub(super) cost: u32,
    /// Sum of 2^(c/4), in 1/256.
    pub(super) peak_sum: u32,
    /// The fields that end in it, if any does.
    pub(super) ended: Option<Ended>,
    /// Cost and bytes of the field under way behind it, of those since the stretch began.
    pub(super) field_cost: u32,
    pub(super) field_bytes: u32,
    /// Its words.
    pub(super) words: Passage,
}

/// Fields that end in a stretch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    /// Cost and bytes that it adds to the first of them, which may have begun before.
    pub(super) cost: u32,
    pub(super) bytes: u32,
    pub(super) field: Option<FieldNumber>,
    /// What the others add to the unit's sum.
    pub(super) others: u64,
}

/// What a stretch came to depends on beyond the state, and most do not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Also {
    /// The plain state before it.
    pub(super) plain: Option<u32>,
    /// The path before it; and the path behind it.
    pub(super) path: Option<(u32, u32)>,
}

/// A stretch that was scored: three cache lines.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(super) struct Known {
    pub(super) text: Text,
    pub(super) before: StateId,
    pub(super) after: StateId,
    /// The place of what followed it last. Another may have come there since.
    next: u16,
    /// What else it depends on.
    pub(super) also: Also,
    pub(super) sums: Sums,
    /// Its bytes that cost more than the reference, as bits.
    pub(super) above: u64,
}

impl Known {
    pub(super) fn new(
        before: StateId,
        after: StateId,
        also: Also,
        text: Text,
        sums: Sums,
        above: u64,
    ) -> Self {
        Self { text, before, after, next: 0, also, sums, above }
    }
}

/// What looking for known stretches brought for a model, in bytes.
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
    /// Upper hash bits of what came once.
    marks: Vec<u16>,
    known: Vec<Known>,
    /// What the bytes of each cost.
    costs: Vec<[u16; WINDOW]>,
    /// By hash: a place in `known`, and one more; 0 is free.
    places: Vec<u16>,
    states: Vec<(u64, State)>,
    /// Open addressing: a state's number + 1; 0 is free.
    index: Vec<u16>,
    gains: [Gain; ACCOUNTS],
    starts: [Start; ACCOUNTS],
    /// Nothing is kept.
    off: bool,
    /// How often the states were full: a state's number holds until then.
    pub(super) epoch: u64,
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
}

/// A stretch of text that is looked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    pub(super) text: Text,
    hash: u64,
}

impl Stretch {
    /// The first `len` bytes of `text`, at least one and at most 64.
    #[inline(always)]
    pub(super) fn new(text: &[u8], len: usize, last: bool) -> Self {
        let bytes = Block64::new(text).front(len);
        let mut hash = (len as u64) << 1 | u64::from(last);
        for (eight, i) in bytes.as_chunks::<8>().0.iter().zip(1..) {
            let spread = u64::from_le_bytes(*eight).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            hash = hash.wrapping_add(spread.rotate_left(7 * i));
        }
        Self { text: Text { bytes, len: len as u8, last }, hash: scatter(hash ^ hash >> 32) }
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

    /// Whether `text` begins with it; `at_end` says that nothing follows that.
    #[inline(always)]
    pub(super) fn begins(&self, text: &[u8], at_end: bool) -> bool {
        let len = usize::from(self.len);
        // All 64 bytes at once: comparing a few of them is a call natively and a loop in wasm.
        let same = Block64::new(text).same(&Block64::new(&self.bytes)) | !below(len) == u64::MAX;
        same && len <= text.len() && (!self.last || at_end && text.len() == len)
    }
}

impl PartialEq for Text {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        // All of it at once: where two differ nobody asks.
        let differ = self.bytes.iter().zip(&other.bytes).fold(0, |differ, (a, b)| differ | a ^ b);
        differ == 0 && self.len == other.len && self.last == other.last
    }
}

impl Memo {
    /// One that keeps nothing.
    pub(super) fn off() -> Self {
        Self { off: true, ..Self::default() }
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
        gain.won =
            gain.won.saturating_add(known).saturating_sub(detours.saturating_mul(DETOUR)).min(MOST_LOSS);
        if gain.won < -MOST_LOSS {
            *gain = Gain { won: 0, left_alone: LEFT_ALONE };
        }
    }

    /// Whether the stretch came before, and nothing speaks against keeping it; from now on it came.
    #[inline(always)]
    pub(super) fn came_before(&mut self, stretch: &Stretch) -> bool {
        if self.marks.is_empty() {
            self.marks = vec![0; MARKS];
        }
        let mark = stretch.mark();
        match self.marks.get_mut(stretch.hash as usize & (MARKS - 1)) {
            Some(known) if *known == mark => true,
            Some(known) if *known == !mark => false,
            Some(known) => {
                *known = mark;
                false
            }
            None => false,
        }
    }

    /// The stretch cannot be kept.
    pub(super) fn give_up(&mut self, stretch: &Stretch) {
        if let Some(mark) = self.marks.get_mut(stretch.hash as usize & (MARKS - 1)) {
            *mark = !stretch.mark();
        }
    }

    /// The number of a state of a model, but for its path and last bytes.
    pub(super) fn state_id(&mut self, model: u64, state: &State) -> StateId {
        if self.states.len() >= STATES {
            self.states.clear();
            self.index.clear();
            self.known.clear();
            self.costs.clear();
            self.places.clear();
            self.epoch += 1;
        }
        if self.index.is_empty() {
            self.index = vec![0; 2 * STATES];
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
    ) -> Option<(usize, &Known)> {
        let first = stretch.place(before);
        self.places.get(first..first + WAYS)?.iter().find_map(|&place| {
            let place = usize::from(place).checked_sub(1)?;
            let known = self.known.get(place)?;
            let found = known.before == before && known.text == stretch.text && holds(&known.also);
            found.then_some((place, known))
        })
    }

    /// What the bytes of the stretch in this place cost.
    #[inline(always)]
    pub(super) fn costs(&self, place: usize) -> &[u16; WINDOW] {
        self.costs.get(place).unwrap_or(&[0; WINDOW])
    }

    /// What followed last behind the stretch of this place.
    #[inline(always)]
    pub(super) fn next(&self, place: usize) -> Option<(usize, &Known)> {
        let next = match self.known.get(place) {
            Some(known) => known.next,
            None => self.starts.get(place.wrapping_sub(STRETCHES))?.next,
        };
        Some((next.into(), self.known.get(usize::from(next))?))
    }

    /// Behind the stretch of this place another follows.
    pub(super) fn follow(&mut self, place: usize, next: usize) {
        if let Some(known) = self.known.get_mut(place) {
            known.next = next as u16;
        } else if let Some(start) = self.starts.get_mut(place.wrapping_sub(STRETCHES)) {
            start.next = next as u16;
        }
    }

    /// Where a unit of this model begins: a place that stretches follow, and the state there if it was
    /// [told](Self::begins_in).
    #[inline(always)]
    pub(super) fn start(&self, model: u64) -> (usize, Option<StateId>) {
        let account = model as usize & (ACCOUNTS - 1);
        let told = self.starts.get(account).and_then(|start| start.state);
        let of_now = told.filter(|&(of, epoch, _)| of == model && epoch == self.epoch);
        (STRETCHES + account, of_now.map(|(_, _, state)| state))
    }

    /// Units of this model begin in this state.
    pub(super) fn begins_in(&mut self, model: u64, state: StateId) {
        if let Some(start) = self.starts.get_mut(model as usize & (ACCOUNTS - 1)) {
            start.state = Some((model, self.epoch, state));
        }
    }

    /// Keeps what the stretch came to, and what its bytes cost; of those whose hashes fall together the oldest
    /// is forgotten.
    pub(super) fn keep(&mut self, stretch: &Stretch, known: Known, costs: &[u16; WINDOW]) {
        if self.places.is_empty() {
            self.places = vec![0; STRETCHES];
        }
        let first = stretch.place(known.before);
        let Some(ways) = self.places.get_mut(first..first + WAYS) else { return };
        let oldest = ways.last().copied().unwrap_or(0);
        let old = usize::from(oldest).wrapping_sub(1);
        let place = match (self.known.get_mut(old), self.costs.get_mut(old)) {
            (Some(slot), Some(old_costs)) => {
                (*slot, *old_costs) = (known, *costs);
                oldest
            }
            _ => {
                self.known.push(known);
                self.costs.push(*costs);
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

    #[test]
    fn a_stretch_gives_way_to_the_fourth_behind_it() {
        let mut memo = Memo::default();
        let before = StateId(0);
        let stretch = |i: u32| Stretch::new(alloc::format!("parameter={i:08}&").as_bytes(), 19, false);
        let place = |i: &u32| stretch(*i).place(before);
        let together: Vec<u32> = (0..).filter(|i| place(i) == place(&0)).take(3 * WAYS).collect();
        let sums = Sums {
            cost: 0,
            peak_sum: 0,
            ended: None,
            field_cost: 0,
            field_bytes: 0,
            words: Passage::default(),
        };
        let also = Also { plain: None, path: None };
        for (kept, &i) in together.iter().enumerate() {
            let known = Known::new(before, before, also, stretch(i).text, sums, 0);
            memo.keep(&stretch(i), known, &[i as u16; WINDOW]);
            for (at, &i) in together.iter().enumerate() {
                let found = memo.find(before, &stretch(i), |_| true).map(|(place, _)| memo.costs(place)[0]);
                let stays = at <= kept && kept < at + WAYS;
                assert_eq!(found, stays.then_some(i as u16), "{at} behind {kept}");
            }
        }
    }
}
