//! Words: which ones training never saw, and which familiar ones stand together for the first time.
//!
//! What: a [`WordSet`] collects the words and pairs of neighbouring words of training units; frozen, it is a
//! [`Vocabulary`], a Bloom filter (Bloom 1970; blocked as by Putze, Sanders, Singler 2007). A
//! [`WordTracker`] runs over a unit's text and counts. Words are compared without regard to ASCII case.
//! Two kinds: for new words, runs of letters, digits and bytes above 127; for pairs, runs of letters,
//! apostrophes and bytes above 127, since a number beside a word says nothing. A backslash and the byte
//! behind it belong to no word. A run of 64 bytes ends there, and what goes on is another.
//!
//! Why: a text in familiar words that says something new ("ignore" and "previous" stand in many baselines,
//! but not side by side) costs a byte model few bits; a pair of familiar words never seen together is
//! what it leaves to notice.
//!
//! Cost: a table look-up and a shift a byte, two probes of one 64-bit word each a word. The filter takes
//! 12 bits for each word and pair and mistakes one in about 50 new ones for a known one.
//!
//! Left out on purpose: Unicode case and word boundaries; languages without spaces have long "words",
//! new ones mostly, in normal and anomalous messages alike.

use alloc::vec;
use alloc::vec::Vec;
use core::cell::Cell;

use crate::bitmap::{Block64, below, digits, equal, letters};
use crate::coder::{identity, scatter};

/// Bits of the filter for each word or pair.
const BITS_PER_KEY: usize = 12;
/// Slots that a look-up tries in training.
const MAX_PROBES: usize = 256;

/// Words and pairs under training, as hashes.
///
/// Holds at most `max_words` of them; beyond that new ones are not added and [`WordSet::overflowed`] says
/// how many. Below the bound the frozen vocabulary does not depend on the order of the units.
#[derive(Clone, Debug)]
pub struct WordSet {
    /// Open addressing; 0 is a free slot. The length is a power of two.
    slots: Vec<u64>,
    occupied: usize,
    max_words: usize,
    overflowed: u64,
}

impl WordSet {
    /// None yet.
    pub fn new(max_words: usize) -> Self {
        Self { slots: vec![0; 1 << 10], occupied: 0, max_words: max_words.max(512), overflowed: 0 }
    }

    /// How many words and pairs found no room.
    pub fn overflowed(&self) -> u64 {
        self.overflowed
    }

    /// Takes in the words of one whole unit.
    pub fn train(&mut self, unit: &[u8]) {
        let mut words = Words::default();
        let mut previous = 0;
        let mut add = |word: Word| match word {
            Word::Any(hash) => self.add(hash),
            Word::Both(hash) | Word::Letters(hash) => {
                self.add(hash);
                self.add(pair(previous, hash));
                previous = hash;
            }
        };
        words.push(unit, true, &mut add);
    }

    /// Adds what another one has taken in.
    pub fn merge(&mut self, other: &WordSet) {
        other.slots.iter().filter(|hash| **hash != 0).for_each(|&hash| self.add(hash));
        self.overflowed = self.overflowed.saturating_add(other.overflowed);
    }

    fn add(&mut self, hash: u64) {
        if self.occupied * 2 >= self.slots.len() && self.occupied < self.max_words {
            let doubled = vec![0; self.slots.len() * 2];
            let old = core::mem::replace(&mut self.slots, doubled);
            self.occupied = 0;
            old.into_iter().filter(|hash| *hash != 0).for_each(|hash| self.place(hash));
        }
        self.place(hash);
    }

    fn place(&mut self, hash: u64) {
        let hash = hash.max(1);
        let mask = self.slots.len() - 1;
        let found = (0..MAX_PROBES)
            .map(|i| (hash as usize).wrapping_add(i) & mask)
            .find(|&at| self.slots.get(at).is_some_and(|slot| *slot == 0 || *slot == hash));
        match found.and_then(|at| self.slots.get_mut(at)) {
            Some(slot) if *slot == hash => {}
            Some(slot) if self.occupied < self.max_words => {
                *slot = hash;
                self.occupied += 1;
            }
            _ => self.overflowed = self.overflowed.saturating_add(1),
        }
    }

    /// The frozen vocabulary, of at most `max_bytes`.
    pub fn freeze(&self, max_bytes: usize) -> Vocabulary {
        let blocks = (self.occupied * BITS_PER_KEY).div_ceil(64).min(max_bytes / 8).max(1);
        let mut vocabulary = Vocabulary { blocks: vec![0; blocks], identity: 0 };
        for &hash in self.slots.iter().filter(|hash| **hash != 0) {
            let (at, bits) = vocabulary.place(hash);
            if let Some(block) = vocabulary.blocks.get_mut(at) {
                *block |= bits;
            }
        }
        Vocabulary::of(vocabulary.blocks)
    }
}

/// The words and pairs of a baseline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    blocks: Vec<u64>,
    /// A hash of them.
    identity: u64,
}

impl Vocabulary {
    fn of(blocks: Vec<u64>) -> Self {
        Self { identity: identity(blocks.iter().copied()), blocks }
    }

    /// A hash of all words. Not one that withstands whoever makes vocabularies alike.
    pub(crate) fn identity(&self) -> u64 {
        self.identity
    }

    /// Memory of the filter, in bytes.
    pub fn bytes(&self) -> usize {
        self.blocks.len() * 8
    }

    #[inline(always)]
    fn place(&self, hash: u64) -> (usize, u64) {
        let at = ((hash >> 32) * self.blocks.len() as u64) >> 32;
        (at as usize, 1 << (hash & 63) | 1 << (hash >> 6 & 63) | 1 << (hash >> 12 & 63))
    }

    /// Was it trained? One new hash in about 50 is taken for a trained one.
    #[inline(always)]
    fn holds(&self, hash: u64) -> bool {
        let (at, bits) = self.place(hash.max(1));
        self.blocks.get(at).is_some_and(|block| block & bits == bits)
    }

    /// Appends the filter's bytes: u32 number of blocks, u64 each, little-endian.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.blocks.len() as u32).to_le_bytes());
        self.blocks.iter().for_each(|block| out.extend_from_slice(&block.to_le_bytes()));
    }

    /// From the blocks' bytes; an odd rest is left out.
    pub(crate) fn decode(blocks: &[u8]) -> Self {
        let (blocks, _) = blocks.as_chunks::<8>();
        Self::of(blocks.iter().map(|&block| u64::from_le_bytes(block)).collect())
    }
}

/// What the words of a unit said so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WordTally {
    /// Words.
    pub words: u32,
    /// Of these, how many training never saw.
    pub new_words: u32,
    /// Neighbouring words, both familiar, that never stood together in training.
    pub new_pairs: u32,
}

/// Runs over a unit's text.
#[derive(Clone, Debug, Default)]
pub struct WordTracker {
    words: Words,
    counted: Counted,
}

impl WordTracker {
    /// Takes the next bytes; `at_end` says that they are the last.
    pub fn push(&mut self, vocabulary: &Vocabulary, text: &[u8], at_end: bool) {
        let Self { words, counted } = self;
        words.push(text, at_end, &mut |word| counted.count(vocabulary, word));
    }

    /// What was counted.
    pub fn tally(&self) -> WordTally {
        self.counted.tally
    }

    /// No word or escape is under way.
    #[inline(always)]
    pub(crate) fn is_between_words(&self) -> bool {
        !self.words.is_open()
    }

    /// As [`Self::push`] of text that came to `passage`, between words before and behind it.
    #[inline(always)]
    pub(crate) fn pass(&mut self, vocabulary: &Vocabulary, passage: &Passage) {
        let Counted { tally, previous, previous_known } = &mut self.counted;
        tally.words = tally.words.saturating_add(passage.words.into());
        tally.new_words = tally.new_words.saturating_add(passage.new_words.into());
        tally.new_pairs = tally.new_pairs.saturating_add(passage.new_pairs.into());
        if passage.is(Passage::PAIRS) {
            if passage.is(Passage::FIRST_KNOWN) & *previous_known {
                let new = passage.is_new_behind(vocabulary, *previous);
                tally.new_pairs = tally.new_pairs.saturating_add(new.into());
            }
            (*previous, *previous_known) = (passage.last, passage.is(Passage::LAST_KNOWN));
        }
    }
}

/// What the words of a text of at most 255 bytes came to that begins and ends between words.
#[derive(Clone, Debug, Default)]
pub(crate) struct Passage {
    /// The first word that makes pairs, and the last.
    first: u64,
    last: u64,
    /// The word that stood before the first when that was looked up: mostly the same stands there again.
    before: Cell<u64>,
    /// As in [`WordTally`], but for the pair of the word before and the first.
    words: u8,
    new_words: u8,
    new_pairs: u8,
    flags: Cell<u8>,
}

impl Passage {
    /// Some word makes pairs.
    const PAIRS: u8 = 1;
    /// The first is familiar; the last is.
    const FIRST_KNOWN: u8 = 2;
    const LAST_KNOWN: u8 = 4;
    /// The first was looked up behind `before`; and they never stood together.
    const LOOKED_UP: u8 = 8;
    const NEW: u8 = 16;

    /// Of a whole text; nothing if it ends inside a word, unless nothing follows.
    pub(crate) fn of(vocabulary: &Vocabulary, text: &[u8], at_end: bool) -> Option<Self> {
        let (mut words, mut counted, mut first) = (Words::default(), Counted::default(), None);
        words.push(text, at_end, &mut |word| {
            counted.count(vocabulary, word);
            if first.is_none() && !matches!(word, Word::Any(_)) {
                first = Some((counted.previous, counted.previous_known));
            }
        });
        if words.is_open() {
            return None;
        }
        let small = |count: u32| u8::try_from(count).ok();
        let flag = |holds: bool, flag: u8| if holds { flag } else { 0 };
        let (first_word, first_known) = first.unwrap_or_default();
        Some(Self {
            first: first_word,
            last: counted.previous,
            before: Cell::new(0),
            words: small(counted.tally.words)?,
            new_words: small(counted.tally.new_words)?,
            new_pairs: small(counted.tally.new_pairs)?,
            flags: Cell::new(
                flag(first.is_some(), Self::PAIRS)
                    | flag(first_known, Self::FIRST_KNOWN)
                    | flag(counted.previous_known, Self::LAST_KNOWN),
            ),
        })
    }

    #[inline(always)]
    fn is(&self, flag: u8) -> bool {
        self.flags.get() & flag != 0
    }

    /// Whether the vocabulary never saw the first word behind this one.
    #[inline(always)]
    fn is_new_behind(&self, vocabulary: &Vocabulary, word: u64) -> bool {
        if !self.is(Self::LOOKED_UP) || self.before.get() != word {
            let new = !vocabulary.holds(pair(word, self.first));
            self.before.set(word);
            self.flags.set(self.flags.get() & !Self::NEW | Self::LOOKED_UP | if new { Self::NEW } else { 0 });
        }
        self.is(Self::NEW)
    }
}

/// What was counted, and what the next pair begins with.
#[derive(Clone, Debug, Default)]
struct Counted {
    tally: WordTally,
    /// The word before, and whether it is familiar.
    previous: u64,
    previous_known: bool,
}

impl Counted {
    /// Without a branch on what the vocabulary holds: half the time nobody could foresee it.
    #[inline(always)]
    fn count(&mut self, vocabulary: &Vocabulary, word: Word) {
        let (Word::Both(hash) | Word::Any(hash) | Word::Letters(hash)) = word;
        let known = vocabulary.holds(hash);
        let tally = &mut self.tally;
        if !matches!(word, Word::Letters(_)) {
            tally.words = tally.words.saturating_add(1);
            tally.new_words = tally.new_words.saturating_add(u32::from(!known));
        }
        if !matches!(word, Word::Any(_)) {
            let new = !vocabulary.holds(pair(self.previous, hash)) & known & self.previous_known;
            tally.new_pairs = tally.new_pairs.saturating_add(u32::from(new));
            (self.previous, self.previous_known) = (hash, known);
        }
    }
}

#[inline(always)]
fn pair(first: u64, second: u64) -> u64 {
    scatter(first.rotate_left(17) ^ second)
}

/// A word's hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// Of letters alone: both.
    Both(u64),
    /// Of letters and digits.
    Any(u64),
    /// Of letters and apostrophes.
    Letters(u64),
}

const LETTER: u8 = 1;
const DIGIT: u8 = 2;
const APOSTROPHE: u8 = 4;
const ESCAPE: u8 = 8;

#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a bad index")]
const CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        classes[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' | 0x80.. => LETTER,
            b'0'..=b'9' => DIGIT,
            b'\'' => APOSTROPHE,
            b'\\' => ESCAPE,
            _ => 0,
        };
        byte += 1;
    }
    classes
};

#[inline(always)]
fn class_of(byte: u8) -> u8 {
    CLASSES.get(usize::from(byte)).copied().unwrap_or(0)
}

/// A hash of bytes that come one by one: eight are packed, then mixed. No byte of a word is zero, so the
/// number of bytes is in the packed ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hasher {
    mixed: u64,
    packed: u64,
    len: u32,
}

impl Default for Hasher {
    fn default() -> Self {
        Self { mixed: Self::SEED, packed: 0, len: 0 }
    }
}

impl Hasher {
    const SEED: u64 = 0x6472_6966_746C_6F63;
    /// Folds the case of ASCII letters; digits and apostrophes have the bit already.
    const FOLD: u64 = 0x2020_2020_2020_2020;

    #[inline(always)]
    fn push(&mut self, byte: u8) {
        self.packed |= u64::from(byte | 0x20) << (8 * (self.len & 7));
        self.len += 1;
        if self.len & 7 == 0 {
            self.mixed = scatter(self.mixed ^ self.packed);
            self.packed = 0;
        }
    }

    /// The hash of `text[from..from + len]`, as if its bytes had been pushed; there is at least one.
    #[inline(always)]
    fn of(text: &[u8], from: usize, len: usize) -> u64 {
        if len <= 8
            && let Some(chunk) = text.get(from..).and_then(<[u8]>::first_chunk::<8>)
        {
            let unused_bits = (64 - 8 * len as u32) & 63;
            let packed = (u64::from_le_bytes(*chunk) | Self::FOLD) << unused_bits >> unused_bits;
            return scatter(Self::SEED ^ packed);
        }
        Self::of_any(text.get(from..from + len).unwrap_or_default())
    }

    #[inline(never)]
    fn of_any(word: &[u8]) -> u64 {
        let (chunks, rest) = word.as_chunks::<8>();
        let mut hasher = Self::default();
        for chunk in chunks {
            hasher.mixed = scatter(hasher.mixed ^ (u64::from_le_bytes(*chunk) | Self::FOLD));
        }
        rest.iter().for_each(|&byte| hasher.push(byte));
        hasher.hash()
    }

    #[inline(always)]
    fn hash(&self) -> u64 {
        if self.packed == 0 { self.mixed } else { scatter(self.mixed ^ self.packed) }
    }

    /// The hash, if there was a byte; starts anew.
    #[inline(always)]
    fn take(&mut self) -> Option<u64> {
        let hash = self.hash();
        (core::mem::take(self).len > 0).then_some(hash)
    }
}

/// Runs of letters, digits and apostrophes among 64 bytes, as bits.
struct Runs {
    all: u64,
    digits: u64,
    apostrophes: u64,
}

impl Runs {
    /// Their words. The bytes stand at `base` of `text`; all runs have ended.
    #[inline(always)]
    fn emit(&self, text: &[u8], base: usize, emit: &mut impl FnMut(Word)) {
        let other = self.digits | self.apostrophes;
        let mut runs = self.all;
        while runs != 0 {
            let (start, len) = first_run(runs);
            let run = below(len) << start;
            runs &= !run;
            if other & run == 0 {
                emit(Word::Both(Hasher::of(text, base + start, len)));
            } else {
                let of_run = Self { all: run, ..*self };
                of_run.emit_mixed(text, base, emit);
            }
        }
    }

    /// The words of one run that has not letters alone.
    #[inline(never)]
    fn emit_mixed(&self, text: &[u8], base: usize, emit: &mut impl FnMut(Word)) {
        let mut any = self.all & !self.apostrophes;
        while any != 0 {
            let (start, len) = first_run(any);
            any &= !(below(len) << start);
            emit(Word::Any(Hasher::of(text, base + start, len)));
        }
        let mut letters = self.all & !self.digits;
        while letters != 0 {
            let (start, len) = first_run(letters);
            letters &= !(below(len) << start);
            emit(Word::Letters(Hasher::of(text, base + start, len)));
        }
    }
}

/// Where the lowest set bits start, and how many they are; there is one.
#[inline(always)]
fn first_run(bits: u64) -> (usize, usize) {
    let start = bits.trailing_zeros();
    (start as usize, (!(bits >> (start & 63))).trailing_zeros() as usize)
}

/// How many bits below bit `len` are set without a gap.
#[inline(always)]
fn trailing_run(bits: u64, len: usize) -> usize {
    let unused_bits = 64 - len as u32;
    (!bits.checked_shl(unused_bits).unwrap_or(0)).leading_zeros() as usize
}

/// Bytes of the longest run. What has no end (base64, a key) then costs no more than words do.
const MAX_RUN_BYTES: u32 = 64;

/// Cuts text into words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Words {
    /// Bytes of the run under way.
    run: u32,
    any: Hasher,
    /// Differs from `any` once the run held a digit or an apostrophe.
    letters: Hasher,
    mixed: bool,
    escaped: bool,
}

impl Words {
    /// Takes the next bytes; `at_end` says that they are the last.
    #[inline(always)]
    fn push(&mut self, text: &[u8], at_end: bool, emit: &mut impl FnMut(Word)) {
        let mut at = 0;
        while at < text.len() {
            if self.is_open() {
                at += self.go_on(text.get(at..).unwrap_or_default(), emit);
            } else {
                at = self.whole(text, at, at_end, emit);
            }
        }
        if at_end {
            self.end(emit);
        }
    }

    fn is_open(&self) -> bool {
        self.escaped || self.run > 0
    }

    /// The run or escape under way, byte by byte; how many bytes it took.
    #[inline(never)]
    fn go_on(&mut self, text: &[u8], emit: &mut impl FnMut(Word)) -> usize {
        for (taken, &byte) in text.iter().enumerate() {
            if !self.is_open() {
                return taken;
            }
            self.byte(byte, emit);
        }
        text.len()
    }

    /// From `base` on, with nothing under way, the words that end in the text. What is under way at its
    /// end is left open. Returns where it came to.
    #[inline(always)]
    fn whole(&mut self, text: &[u8], mut base: usize, at_end: bool, emit: &mut impl FnMut(Word)) -> usize {
        while let Some(rest) = text.get(base..)
            && !rest.is_empty()
        {
            let block = Block64::new(rest);
            // The top bit of a flag is what counts, and bytes above 127 have it.
            let letters = block.bits(|bytes| letters(bytes) | bytes);
            let mut runs = Runs {
                all: letters,
                digits: block.bits(digits),
                apostrophes: block.bits(|bytes| equal(bytes, b'\'')),
            };
            runs.all |= runs.digits | runs.apostrophes;
            let mut escapes = block.bits(|bytes| equal(bytes, b'\\'));
            let mut len = rest.len().min(64);
            while escapes != 0 {
                let escape = escapes & escapes.wrapping_neg();
                if escape == 1 << (len - 1) {
                    // What it escapes is not in the block.
                    len -= 1;
                    break;
                }
                escapes &= !(escape * 3);
                runs.all &= !(escape << 1);
            }
            // A run at the end may go on, unless it is as long as can be.
            let open = trailing_run(runs.all, len);
            let ended = open == MAX_RUN_BYTES as usize || at_end && len == rest.len();
            let taken = if ended { len } else { len - open };
            if taken == 0 {
                let under_way = rest.get(..len.max(1)).unwrap_or_default();
                under_way.iter().for_each(|&byte| self.byte(byte, emit));
                return base + under_way.len();
            }
            runs.all &= below(taken);
            runs.emit(text, base, emit);
            base += taken;
        }
        base
    }

    /// The next byte, whatever is under way.
    #[inline(never)]
    fn byte(&mut self, byte: u8, emit: &mut impl FnMut(Word)) {
        if self.escaped {
            self.escaped = false;
            return;
        }
        let class = class_of(byte);
        if !matches!(class, LETTER | DIGIT | APOSTROPHE) {
            self.end(emit);
            self.escaped = class == ESCAPE;
            return;
        }
        if !self.mixed && class != LETTER {
            (self.mixed, self.letters) = (true, self.any);
        }
        self.run += 1;
        match class {
            DIGIT => self.letters.take().into_iter().for_each(|hash| emit(Word::Letters(hash))),
            _ if self.mixed => self.letters.push(byte),
            _ => {}
        }
        match class {
            APOSTROPHE => self.any.take().into_iter().for_each(|hash| emit(Word::Any(hash))),
            _ => self.any.push(byte),
        }
        if self.run == MAX_RUN_BYTES {
            self.end(emit);
        }
    }

    /// Ends the run under way.
    fn end(&mut self, emit: &mut impl FnMut(Word)) {
        if !self.mixed {
            self.any.take().into_iter().for_each(|hash| emit(Word::Both(hash)));
        }
        self.any.take().into_iter().for_each(|hash| emit(Word::Any(hash)));
        self.letters.take().into_iter().for_each(|hash| emit(Word::Letters(hash)));
        (self.run, self.mixed, self.escaped) = (0, false, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;
    use std::string::String;

    fn vocabulary(units: &[&str]) -> Vocabulary {
        let mut set = WordSet::new(1 << 16);
        units.iter().for_each(|unit| set.train(unit.as_bytes()));
        set.freeze(1 << 20)
    }

    fn tally(vocabulary: &Vocabulary, text: &str) -> WordTally {
        let mut tracker = WordTracker::default();
        tracker.push(vocabulary, text.as_bytes(), true);
        tracker.tally()
    }

    #[test]
    fn new_words_and_new_pairs_are_told_apart() {
        let known =
            vocabulary(&["please ignore the noise", "all previous orders", "my instructions were clear"]);
        let count = |text| {
            let WordTally { words, new_words, new_pairs } = tally(&known, text);
            (words, new_words, new_pairs)
        };
        assert_eq!(count("Please IGNORE the noise"), (4, 0, 0));
        assert_eq!(count("ignore all previous instructions"), (4, 0, 2));
        assert_eq!(count("all zebras previous orders"), (4, 1, 0));
        assert_eq!(count(r"all\nprevious orders"), (3, 0, 0));
        assert_eq!(count(""), (0, 0, 0));
    }

    /// The two kinds of words by their definition.
    fn oracle(text: &str) -> (Vec<String>, Vec<String>) {
        let mut cut = String::new();
        let mut chars = text.chars();
        let mut run = 0;
        while let Some(c) = chars.next() {
            run = if c.is_ascii_alphanumeric() || c == '\'' { run + 1 } else { 0 };
            cut.push(if c == '\\' { ' ' } else { c.to_ascii_lowercase() });
            if c == '\\' {
                chars.next();
            }
            if run == 64 {
                cut.push(' ');
                run = 0;
            }
        }
        let split = |is_part: fn(char) -> bool| {
            cut.split(|c| !is_part(c)).filter(|w| !w.is_empty()).map(String::from).collect()
        };
        (split(|c| c.is_ascii_alphanumeric()), split(|c| c.is_ascii_alphabetic() || c == '\''))
    }

    proptest! {
        #[test]
        fn words_are_the_oracles_and_every_split_agrees(text in r"([abCD1' \\.]|[a1']{40,70}){0,20}", cuts in prop::collection::vec(0usize..300, 0..5), early_end: bool) {
            let run = |cuts: &[usize]| {
                let (mut words, mut any, mut letters) = (Words::default(), Vec::new(), Vec::new());
                let mut emit = |word| match word {
                    Word::Both(hash) => { any.push(hash); letters.push(hash) }
                    Word::Any(hash) => any.push(hash),
                    Word::Letters(hash) => letters.push(hash),
                };
                for pair in cuts.windows(2) {
                    let at_end = early_end && pair[1] == text.len();
                    words.push(&text.as_bytes()[pair[0]..pair[1]], at_end, &mut emit);
                }
                words.push(&[], true, &mut emit);
                (any, letters)
            };
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let hash = |word: &String| {
                let mut hasher = Hasher::default();
                word.bytes().for_each(|byte| hasher.push(byte));
                hasher.take().unwrap()
            };
            let (any, letters) = oracle(&text);
            let expected = (any.iter().map(hash).collect(), letters.iter().map(hash).collect());
            prop_assert_eq!(run(&cuts), expected);
        }
    }

    #[test]
    fn the_filter_holds_what_was_trained_and_little_else() {
        let words: Vec<String> = (0..20_000).map(|i| std::format!("w{i}x")).collect();
        let mut set = WordSet::new(1 << 20);
        words.iter().for_each(|word| set.train(word.as_bytes()));
        let vocabulary = set.freeze(1 << 20);
        for word in &words {
            assert_eq!(tally(&vocabulary, word).new_words, 0, "{word}");
        }
        let fresh: u32 = (0..20_000).map(|i| tally(&vocabulary, &std::format!("v{i}y")).new_words).sum();
        assert!(fresh > 19_400, "{fresh} of 20000 new words noticed");
        assert!(set.freeze(4096).bytes() <= 4096);
    }

    #[test]
    fn hashes_differ() {
        let words: HashSet<u64> = (0..100_000u32)
            .map(|i| {
                let mut hasher = Hasher::default();
                std::format!("{i:x}").repeat(1 + i as usize % 4).bytes().for_each(|byte| hasher.push(byte));
                hasher.take().unwrap()
            })
            .collect();
        assert!(words.len() > 99_000, "{}", words.len());
    }

    #[test]
    fn order_and_merging_do_not_matter() {
        let (a, b) = ("one two three", "three four one");
        let mut merged = WordSet::new(1 << 10);
        merged.train(b.as_bytes());
        let mut other = WordSet::new(1 << 10);
        other.train(a.as_bytes());
        merged.merge(&other);
        assert_eq!(merged.freeze(1 << 20), vocabulary(&[a, b]));
    }
}
