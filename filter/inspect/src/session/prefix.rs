//! A request that begins as others did is read from where it differs.
//!
//! What: the first bytes of requests' bodies that came twice, each with what reading them came to: the parser and
//! the scorers, as they stood behind the last byte. A body that begins with the same bytes takes that up and is
//! read from there on.
//!
//! Why: a model's client sends the whole conversation with each turn, and an agent its tools and instructions too.
//! Read anew each time, a conversation costs the square of its turns. As every cut of a body into chunks gives the
//! same verdict, so does this, which is tested against reading without.
//!
//! How: a body is cut into blocks of [`BLOCK`] bytes, each hashed with all before it (as servers of models find
//! what they have computed of a prompt: Kwon et al. 2023, section 4.4, and vLLM's prefix caching). Marks of the hashes
//! that came tell how far a body agrees with earlier ones; where that ends its state is kept, once a message, and
//! found again by hash and by comparing every byte. A body that arrives in pieces is not read as long as it agrees
//! with one that is longer, since what it would come to is kept behind that one's last byte; and as long as its blocks
//! came before, it is read up to the last whole one, where its state may have to be kept.
//!
//! What is kept: at most [`MAX_STEMS`] beginnings and [`MAX_BYTES`] of them, the one unused for longest goes first;
//! one that a longer one of the same conversation replaces goes at once. A state is some 10 KiB, more where text waits
//! for its role. It belongs to a baseline, and is of no use to another. Beside that at most [`MAX_HOLDING`] requests
//! under way hold up to [`MAX_STEM_BYTES`] each.
//!
//! Cost: a hash of the body and a look into the marks for each block; a comparison of what is known with it, and a
//! copy of the state. Where most of what is kept goes unused, nothing is for a while.
//!
//! Left out on purpose: answers, which begin with an id of their own; bodies that are no document of a known API;
//! a beginning in another place of the body, of which `engine::score`'s memory of stretches is for. As with that,
//! who measures how long a request takes learns whether its beginning came before; `reuse_scores` switches off both.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::mem;

use driftlock_engine::detector::{Message, SavedPart};

use super::inspection::Feed;
use crate::content::{ApiStyle, BodyParser, SavedParser};

/// Bytes of a block: where a body may be taken up.
const BLOCK: usize = 512;
/// Most beginnings kept, and most bytes of their texts and states together.
const MAX_STEMS: usize = if cfg!(test) { 6 } else { 128 };
const MAX_BYTES: usize = if cfg!(test) { 80 << 10 } else { 4 << 20 };
/// Shortest beginning kept: to copy a state costs as much as to read a thousand bytes of text that came before.
const MIN_STEM_BYTES: usize = 1 << 10;
/// Longest beginning kept.
const MAX_STEM_BYTES: usize = if cfg!(test) { 8 << 10 } else { 256 << 10 };
/// Places for marks of blocks that came. A power of two.
const MARKS: usize = if cfg!(test) { 1 << 10 } else { 1 << 15 };

/// Most requests that hold on to text between two of their pieces.
const MAX_HOLDING: usize = if cfg!(test) { 2 } else { 16 };

/// So many more went unused than were used before nothing is kept, and for how many messages.
const MOST_IN_VAIN: i32 = 64;
const REST: u32 = 1 << 10;

/// A beginning that came twice, and what reading it came to.
#[derive(Debug)]
struct Stem {
    /// How the body was read at first. Of another style the same bytes say something else, and streams that have
    /// a baseline together ([`OVERFLOW_STREAM`](driftlock_engine::detector::OVERFLOW_STREAM)) differ in it.
    style: ApiStyle,
    /// Whole blocks.
    text: Vec<u8>,
    /// Of each of its blocks with all before it.
    hashes: Vec<u64>,
    parser: SavedParser,
    part: SavedPart,
}

impl Stem {
    fn bytes(&self) -> usize {
        size_of::<Self>()
            + self.text.len()
            + self.hashes.len() * size_of::<u64>()
            + self.parser.bytes()
            + self.part.bytes()
    }
}

/// A stem, and what became of it. All that most of them are asked for, so that none is touched in vain.
#[derive(Debug)]
struct Kept {
    /// Counted from 1.
    number: u32,
    /// How many blocks it has, and the hash of the last with all before it.
    blocks: usize,
    hash: u64,
    stem: Arc<Stem>,
    /// When it was used last, in messages.
    used: u64,
    /// How often it was.
    times: u32,
}

/// The beginnings that one VM knows.
#[derive(Debug)]
pub(super) struct Prefixes {
    kept: Vec<Kept>,
    /// Of all that is kept.
    bytes: usize,
    /// By hash.
    marks: Vec<Mark>,
    messages: u64,
    /// How many were kept so far.
    number: u32,
    in_vain: i32,
    rest: u32,
    off: bool,
    taken_up_bytes: u64,
    /// Each request that holds on to text has a clone, so that they are counted.
    holding: Hold,
}

/// A block came.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    /// The upper half of its hash.
    hash: u32,
    /// The stem that was kept last of those that have it; 0 for none.
    stem: u32,
}

/// One body on its way.
#[derive(Debug)]
pub(super) struct Trail {
    /// As the parser was made.
    style: ApiStyle,
    /// Of each whole block with all before it, up to [`MAX_STEM_BYTES`].
    hashes: Vec<u64>,
    /// What came behind the last whole block, of which the next is made.
    tail: Vec<u8>,
    /// How many blocks came before, by their marks.
    seen: usize,
    place: Place,
}

/// What was read of a body.
#[derive(Debug)]
enum Place {
    /// Nothing, as there are not [`MIN_STEM_BYTES`]; these are all.
    Waiting(Vec<u8>),
    /// Nothing: all that came are the first bytes of this stem, so many of them.
    Along(Arc<Stem>, usize, Hold),
    /// All up to the last whole block; each came before.
    Run(Run, Hold),
    /// All of it. Nothing is to be kept.
    Read,
}

/// A body whose blocks all came before.
#[derive(Debug)]
struct Run {
    /// What was taken up.
    base: Option<Arc<Stem>>,
    /// All that came behind that.
    text: Vec<u8>,
    /// How much of the text was read: whole blocks.
    read: usize,
}

/// One of the few that hold on to text between two pieces.
type Hold = Arc<()>;

impl Trail {
    fn new(style: ApiStyle) -> Self {
        let (hashes, tail) = (Vec::with_capacity(8), Vec::new());
        Self { style, hashes, tail, seen: 0, place: Place::Waiting(Vec::new()) }
    }

    /// Whether a block came that had not come before, or none is looked at any more.
    fn has_ended(&self) -> bool {
        self.seen < self.hashes.len() || self.hashes.len() * BLOCK >= MAX_STEM_BYTES
    }
}

impl Prefixes {
    pub(super) fn new(on: bool) -> Self {
        Self {
            kept: Vec::new(),
            bytes: 0,
            marks: Vec::new(),
            messages: 0,
            number: 0,
            in_vain: 0,
            rest: 0,
            off: !on,
            taken_up_bytes: 0,
            holding: Arc::new(()),
        }
    }

    /// How many bytes were not read, as they had been before.
    pub(super) fn taken_up_bytes(&self) -> u64 {
        self.taken_up_bytes
    }

    /// A body is about to come whose bytes are to be given to [`Self::read`]; nothing if this is of no use to it.
    pub(super) fn begin(&mut self, message: &mut Message, parser: &BodyParser) -> Option<Box<Trail>> {
        if self.off || !parser.may_resume() {
            return None;
        }
        self.rest = self.rest.saturating_sub(1);
        self.messages += 1;
        message.part().then(|| Box::new(Trail::new(parser.style())))
    }

    /// Reads the body's next bytes.
    pub(super) fn read(
        &mut self,
        trail: &mut Trail,
        piece: &[u8],
        parser: &mut BodyParser,
        feed: &mut Feed<'_>,
    ) {
        self.note(trail, piece);
        match mem::replace(&mut trail.place, Place::Read) {
            Place::Read => parser.push(piece, feed),
            Place::Waiting(mut waiting) if trail.hashes.len() * BLOCK < MIN_STEM_BYTES => {
                waiting.extend_from_slice(piece);
                trail.place = Place::Waiting(waiting);
            }
            Place::Waiting(waiting) => {
                self.begin_reading(trail, Joined { head: &waiting, piece }, parser, feed)
            }
            Place::Along(stem, matched, hold) => {
                let rest = stem.text.get(matched..).unwrap_or_default();
                if rest.len() > piece.len() && behind(rest, piece).is_some() {
                    trail.place = Place::Along(stem, matched + piece.len(), hold);
                } else {
                    let head = stem.text.get(..matched).unwrap_or_default();
                    self.begin_reading(trail, Joined { head, piece }, parser, feed);
                }
            }
            Place::Run(mut run, hold) => {
                let ended = trail.has_ended();
                let wanted = if ended { run.wants(trail) } else { piece.len() };
                let (ours, rest) = piece.split_at_checked(wanted).unwrap_or((piece, &[]));
                run.text.extend_from_slice(ours);
                run.read_on(trail, parser, feed);
                if ended {
                    self.end_run(trail, run, rest, parser, feed);
                } else {
                    trail.place = Place::Run(run, hold);
                }
            }
        }
    }

    /// The body is over: what was not read yet is.
    pub(super) fn finish(&mut self, trail: &mut Trail, parser: &mut BodyParser, feed: &mut Feed<'_>) {
        match mem::replace(&mut trail.place, Place::Read) {
            Place::Read => {}
            Place::Waiting(waiting) => parser.push(&waiting, feed),
            Place::Along(stem, matched, _) => {
                let head = stem.text.get(..matched).unwrap_or_default();
                let (_, text) = self.resume(trail, Joined { head, piece: &[] }, parser, feed);
                text.give(parser, feed);
            }
            Place::Run(run, _) => self.end_run(trail, run, &[], parser, feed),
        }
    }

    /// Nothing of `text` was read, which is all that came.
    fn begin_reading(
        &mut self,
        trail: &mut Trail,
        text: Joined<'_>,
        parser: &mut BodyParser,
        feed: &mut Feed<'_>,
    ) {
        let hold = (Arc::strong_count(&self.holding) <= MAX_HOLDING).then(|| Arc::clone(&self.holding));
        if let (Some(hold), Some(longer)) = (&hold, self.longer(trail, text, feed.message)) {
            trail.place = Place::Along(longer, text.len(), Arc::clone(hold));
            return;
        }
        let (base, text) = self.resume(trail, text, parser, feed);
        let mut run = Run { base, text: Vec::new(), read: 0 };
        match hold {
            Some(hold) if !trail.has_ended() => {
                run.text = text.copied();
                run.read_on(trail, parser, feed);
                trail.place = Place::Run(run, hold);
            }
            _ => {
                let (ours, rest) = text.split(run.wants(trail));
                run.text = ours.copied();
                run.read_on(trail, parser, feed);
                let [head, piece] = [rest.head, rest.piece];
                run.text.extend_from_slice(head);
                self.end_run(trail, run, piece, parser, feed);
            }
        }
    }

    /// Behind what was read of it something new follows, or nothing: there it is kept. The rest is read, and what
    /// follows.
    fn end_run(
        &mut self,
        trail: &Trail,
        run: Run,
        follows: &[u8],
        parser: &mut BodyParser,
        feed: &mut Feed<'_>,
    ) {
        let Run { base, mut text, read } = run;
        let known = base.as_ref().map_or(&[][..], |stem| &stem.text);
        let rest = text.split_off(read);
        if read > 0 && (MIN_STEM_BYTES..=MAX_STEM_BYTES).contains(&(known.len() + read)) && self.rest == 0 {
            let whole = if known.is_empty() { text } else { [known, &text].concat() };
            self.keep(trail, base.as_ref(), whole, parser, feed.message);
        }
        for part in [&rest, follows] {
            if !part.is_empty() {
                parser.push(part, feed);
            }
        }
    }

    /// Hashes the blocks that `piece` completes, and tells which came before; from now on they did.
    fn note(&mut self, trail: &mut Trail, piece: &[u8]) {
        if self.marks.is_empty() {
            self.marks = vec![Mark::default(); MARKS];
        }
        let Trail { hashes, tail, seen, .. } = trail;
        let room = (MAX_STEM_BYTES - hashes.len() * BLOCK).saturating_sub(tail.len());
        let mut rest = piece.get(..room).unwrap_or(piece);
        let mut note = |block: &[u8; BLOCK]| {
            let hash = hash(hashes.last().copied().unwrap_or(0), block);
            hashes.push(hash);
            let upper = (hash >> 32) as u32 | 1;
            match self.marks.get_mut(hash as usize & (MARKS - 1)) {
                Some(mark) if mark.hash == upper => *seen = hashes.len(),
                Some(mark) => *mark = Mark { hash: upper, stem: 0 },
                None => {}
            }
        };
        if !tail.is_empty() {
            let (front, behind) = rest.split_at_checked(BLOCK - tail.len()).unwrap_or((rest, &[]));
            tail.extend_from_slice(front);
            rest = behind;
            if let Some(block) = tail.first_chunk() {
                note(block);
                tail.clear();
            }
        }
        let (blocks, behind) = rest.as_chunks();
        blocks.iter().for_each(note);
        tail.extend_from_slice(behind);
    }

    /// A stem that begins with all of `text` and is longer.
    fn longer(&self, trail: &Trail, text: Joined<'_>, message: &Message) -> Option<Arc<Stem>> {
        let hash = *trail.hashes.last()?;
        let mark = self.marks.get(hash as usize & (MARKS - 1))?;
        let stem = &self.kept.iter().find(|kept| kept.number == mark.stem && mark.stem > 0)?.stem;
        let begins = stem.text.len() > text.len() && stem.is_of(trail, message) && text.begins(&stem.text);
        begins.then(|| Arc::clone(stem))
    }

    /// Takes up the longest stem that `text` begins with; returns it, and what is left to be read.
    fn resume<'a>(
        &mut self,
        trail: &mut Trail,
        text: Joined<'a>,
        parser: &mut BodyParser,
        feed: &mut Feed<'_>,
    ) -> (Option<Arc<Stem>>, Joined<'a>) {
        let mut most = usize::MAX;
        // What was kept had come before; to look through all of it costs as much as to read some blocks.
        while trail.seen * BLOCK >= MIN_STEM_BYTES {
            let may_begin = |kept: &&mut Kept| {
                kept.blocks < most
                    && trail.hashes.get(kept.blocks.wrapping_sub(1)) == Some(&kept.hash)
                    && kept.stem.is_of(trail, feed.message)
            };
            let longest = self.kept.iter_mut().filter(may_begin).max_by_key(|kept| kept.blocks);
            let Some(found) = longest else { break };
            most = found.blocks;
            if !text.is_begun_by(&found.stem.text) || !feed.message.resume(&found.stem.part) {
                continue;
            }
            parser.resume(&found.stem.parser);
            (found.used, found.times) = (self.messages, found.times.saturating_add(1));
            if found.times == 1 {
                self.in_vain = (self.in_vain - 2).max(-MOST_IN_VAIN);
            }
            trail.seen = trail.seen.max(found.blocks);
            let read = found.stem.text.len();
            self.taken_up_bytes += read as u64;
            return (Some(Arc::clone(&found.stem)), text.split(read).1);
        }
        (None, text)
    }

    /// Keeps where a message stands behind `text`, which begins with `base`.
    fn keep(
        &mut self,
        trail: &Trail,
        base: Option<&Arc<Stem>>,
        text: Vec<u8>,
        parser: &BodyParser,
        message: &Message,
    ) {
        let (Some(parser), Some(part)) = (parser.save(), message.save()) else { return };
        let blocks = text.len() / BLOCK;
        let Some(hashes) = trail.hashes.get(..blocks) else { return };
        let stem = Stem { style: trail.style, text, hashes: hashes.to_vec(), parser, part };
        // The conversation goes on: what was known of it is of use to no other, unless it was to some already.
        let replaced = base.and_then(|base| self.kept.iter().position(|kept| Arc::ptr_eq(&kept.stem, base)));
        if let Some(place) =
            replaced.filter(|place| self.kept.get(*place).is_some_and(|kept| kept.times == 1))
        {
            self.forget(place);
        }
        self.bytes += stem.bytes();
        while self.kept.len() >= MAX_STEMS || self.bytes > MAX_BYTES {
            let oldest = (0..).zip(&self.kept).min_by_key(|(_, kept)| kept.used).map(|(place, _)| place);
            let Some(oldest) = oldest else { break };
            if self.kept.get(oldest).is_some_and(|kept| kept.times == 0) {
                self.in_vain += 1;
            }
            self.forget(oldest);
        }
        if self.in_vain > MOST_IN_VAIN {
            (self.in_vain, self.rest) = (0, REST);
        }
        self.number = self.number.checked_add(1).unwrap_or(1);
        for hash in &stem.hashes {
            if let Some(mark) = self.marks.get_mut(*hash as usize & (MARKS - 1)) {
                *mark = Mark { hash: (hash >> 32) as u32 | 1, stem: self.number };
            }
        }
        let (number, stem) = (self.number, Arc::new(stem));
        let hash = stem.hashes.last().copied().unwrap_or(0);
        self.kept.push(Kept { number, blocks, hash, stem, used: self.messages, times: 0 });
    }

    fn forget(&mut self, place: usize) {
        if place < self.kept.len() {
            let gone = self.kept.swap_remove(place);
            self.bytes = self.bytes.saturating_sub(gone.stem.bytes());
        }
    }
}

impl Run {
    /// How many bytes of what came before are not in its text yet.
    fn wants(&self, trail: &Trail) -> usize {
        let known = self.base.as_ref().map_or(0, |stem| stem.text.len()) + self.text.len();
        (trail.seen * BLOCK).saturating_sub(known)
    }

    /// Reads what came before.
    fn read_on(&mut self, trail: &Trail, parser: &mut BodyParser, feed: &mut Feed<'_>) {
        let known = self.base.as_ref().map_or(0, |stem| stem.text.len());
        let to = (trail.seen * BLOCK).saturating_sub(known);
        if let Some(text) = self.text.get(self.read..to)
            && !text.is_empty()
        {
            parser.push(text, feed);
            self.read = to;
        }
    }
}

impl Stem {
    /// Whether it says anything of this message.
    fn is_of(&self, trail: &Trail, message: &Message) -> bool {
        self.style == trail.style && self.part.is_of(message)
    }
}

/// Two texts one after the other.
#[derive(Clone, Copy)]
struct Joined<'a> {
    head: &'a [u8],
    piece: &'a [u8],
}

impl<'a> Joined<'a> {
    fn len(self) -> usize {
        self.head.len() + self.piece.len()
    }

    /// Whether `text` begins with all of this.
    fn begins(self, text: &[u8]) -> bool {
        behind(text, self.head).is_some_and(|rest| behind(rest, self.piece).is_some())
    }

    /// Whether this begins with all of `text`.
    fn is_begun_by(self, text: &[u8]) -> bool {
        match behind(text, self.head) {
            Some(rest) => behind(self.piece, rest).is_some(),
            None => behind(self.head, text).is_some(),
        }
    }

    fn copied(self) -> Vec<u8> {
        [self.head, self.piece].concat()
    }

    /// The first bytes, and the others.
    fn split(self, bytes: usize) -> (Self, Self) {
        let of_head = bytes.min(self.head.len());
        let (head, other_head) = self.head.split_at_checked(of_head).unwrap_or((self.head, &[]));
        let (piece, other) = self.piece.split_at_checked(bytes - of_head).unwrap_or((self.piece, &[]));
        (Self { head, piece }, Self { head: other_head, piece: other })
    }

    /// Has all of it read.
    fn give(self, parser: &mut BodyParser, feed: &mut Feed<'_>) {
        for part in [self.head, self.piece] {
            if !part.is_empty() {
                parser.push(part, feed);
            }
        }
    }
}

/// What follows `front` in a text that begins with it. 64 bytes at a time: where the target has no `memcmp` of its own,
/// as wasm, the language's comparison goes byte by byte.
fn behind<'a>(text: &'a [u8], front: &[u8]) -> Option<&'a [u8]> {
    let (begin, rest) = text.split_at_checked(front.len())?;
    let ((ours, last), (theirs, their_last)) = (begin.as_chunks::<64>(), front.as_chunks::<64>());
    let differ = |(ours, theirs): (&[u8; 64], &[u8; 64])| {
        ours.iter().zip(theirs).fold(0, |differ, (a, b)| differ | a ^ b) != 0
    };
    (!ours.iter().zip(theirs).any(differ) && last == their_last).then_some(rest)
}

/// Multipliers of the four sums of a block's hash.
const ODD: [u64; 4] =
    [0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB, 0xD6E8_FEB8_6659_FD93];

/// Of a block with all before it, whose hash is `before`. Whoever makes hashes fall together gains nothing by it:
/// what they lead to is compared.
fn hash(before: u64, block: &[u8; BLOCK]) -> u64 {
    // Four sums side by side, as each multiplication waits for the one before.
    let mut sums = ODD.map(|odd| odd ^ before);
    for words in block.as_chunks::<32>().0 {
        for ((sum, word), odd) in sums.iter_mut().zip(words.as_chunks().0).zip(ODD) {
            *sum = (*sum ^ u64::from_le_bytes(*word)).wrapping_mul(odd).rotate_left(29);
        }
    }
    sums.into_iter().zip(ODD).fold(before, |hash, (sum, odd)| {
        let hash = (hash.rotate_left(23) ^ sum).wrapping_mul(odd);
        hash ^ hash >> 32
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Direction;
    use driftlock_engine::baseline::Snapshot;
    use driftlock_engine::detector::{Detector, LearningPlan, Settings, UnitId};
    use driftlock_engine::evidence::Verdict;
    use proptest::prelude::*;
    use std::format;
    use std::string::String;
    use std::sync::OnceLock;

    const PATHS: [&[u8]; 3] = [b"/v1/chat/completions", b"/graphql", b"/llm"];

    /// What is a text for one API is envelope for the other.
    fn body(messages: &[String], end: &str) -> Vec<u8> {
        let all = messages.join(",");
        format!("{{\"model\":\"m\",\"query\":\"order\",\"messages\":[{all}]{end}}}").into_bytes()
    }

    fn message(text: &str) -> String {
        format!("{{\"role\":\"user\",\"content\":\"{text}\"}}")
    }

    /// All that is asked is of one stream, as if it had overflowed.
    struct Reading {
        detector: Detector,
        prefixes: Prefixes,
    }

    impl Reading {
        fn new(on: bool) -> Self {
            let settings = Settings {
                alpha_ppm: 50_000,
                learning: LearningPlan::new(100, 50_000).ok(),
                training: Default::default(),
                max_streams: 1,
            };
            static LEARNED: OnceLock<Snapshot> = OnceLock::new();
            let of =
                |snapshot| Self { detector: Detector::new(settings, snapshot), prefixes: Prefixes::new(on) };
            let learned = LEARNED.get_or_init(|| {
                let mut reading = of(Snapshot::default());
                for i in 0..100 {
                    let texts: Vec<String> =
                        (0..3).map(|k| message(&format!("Where is order {}? ", i * k))).collect();
                    reading.ask(PATHS[i % 2], &body(&texts, ""), &[]);
                }
                assert_eq!(reading.detector.frozen(), 1);
                reading.detector.snapshot()
            });
            of(learned.clone())
        }

        fn ask(&mut self, path: &[u8], body: &[u8], cuts: &[usize]) -> Verdict {
            let Self { detector, prefixes } = self;
            let mut message = detector.begin(Direction::Request.as_str());
            message.whole(UnitId { name: "target", index: 0 }, path, 0, 1 << 16, detector.scratch());
            let mut parser = BodyParser::for_request(path, Some(b"application/json")).unwrap();
            let mut trail = prefixes.begin(&mut message, &parser);
            let mut feed = Feed::new(&mut message, 1 << 16, detector.scratch());
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (body.len() + 1)).collect();
            cuts.extend([0, body.len()]);
            cuts.sort_unstable();
            for pair in cuts.windows(2) {
                let piece = &body[pair[0]..pair[1]];
                match &mut trail {
                    Some(trail) => {
                        prefixes.read(trail, piece, &mut parser, &mut feed);
                        if let Place::Run(run, _) = &trail.place {
                            assert!(run.text.len() <= MAX_STEM_BYTES);
                        }
                    }
                    None => parser.push(piece, &mut feed),
                }
            }
            if let Some(trail) = &mut trail {
                prefixes.finish(trail, &mut parser, &mut feed);
            }
            let defect = parser.finish(&mut feed).err().map(|error| error.as_str().into());
            assert!(prefixes.kept.len() <= MAX_STEMS && prefixes.bytes <= MAX_BYTES);
            let bytes: usize = prefixes.kept.iter().map(|kept| kept.stem.bytes()).sum();
            assert_eq!(bytes, prefixes.bytes);
            detector.finish(message, defect)
        }
    }

    #[derive(Clone, Debug)]
    struct Asked {
        path: usize,
        /// The conversation, how many of its messages, how many bytes of the last differ, and the end.
        of: usize,
        turns: usize,
        new: usize,
        end: usize,
        cuts: Vec<usize>,
    }

    fn asked() -> impl Strategy<Value = Asked> {
        let cuts = prop_oneof![
            Just(Vec::new()),
            prop::collection::vec(0usize..20_000, 1..6),
            (60usize..1500).prop_map(|step| (0..20_000).step_by(step).collect()),
        ];
        (0usize..3, 0usize..4, 0usize..14, 0usize..3, 0usize..3, cuts)
            .prop_map(|(path, of, turns, new, end, cuts)| Asked { path, of, turns, new, end, cuts })
    }

    impl Asked {
        fn body(&self) -> Vec<u8> {
            const IMAGE: &str =
                "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAIAAAACACAYAAADDPmHLAAAABmJLR0QA";
            let mut texts: Vec<String> = (0..self.turns)
                .map(|i| match (self.of * 7 + i) % 5 {
                    0 => format!(
                        "{{\"role\":\"user\",\"content\":[{{\"type\":\"image_url\",\"image_url\":{{\"url\":\"{IMAGE}{}\"}}}}]}}",
                        "AAAA".repeat(60 + i)
                    ),
                    1 => format!("{{\"content\":\"{}\",\"role\":\"tool\"}}", "late ".repeat(40 + self.of * i)),
                    _ => message(&format!("Where is order {}?\\n", self.of).repeat(10 + i * 5)),
                })
                .collect();
            texts.push(message(&"zq".repeat(self.new * 300)));
            body(&texts, ["", ",\"temperature\":1", ",}"][self.end])
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(600) })]

        /// With so little room that most of what is kept is forgotten, and marks are taken for others'.
        #[test]
        fn what_is_forgotten_and_taken_up_changes_nothing(all in prop::collection::vec(asked(), 1..60)) {
            let (mut reused, mut anew) = (Reading::new(true), Reading::new(false));
            for asked in all {
                let (path, body) = (PATHS[asked.path], asked.body());
                prop_assert_eq!(reused.ask(path, &body, &asked.cuts), anew.ask(path, &body, &[]));
            }
            prop_assert_eq!(anew.prefixes.taken_up_bytes(), 0);
        }
    }

    /// Another text with the same hash: a lane's word is made up for by the next.
    fn with_the_same_hash(text: &[u8]) -> Vec<u8> {
        let (first, rest) = text.split_first_chunk::<BLOCK>().unwrap();
        let plain = |byte: &u8| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\');
        for i in 0u32.. {
            let mut other = *first;
            // What changes most stands first: a product's lower bits depend on those alone.
            other[256..264].copy_from_slice(format!("{:08x}", i.swap_bytes()).as_bytes());
            // 32 bytes on the lane goes on: the difference behind the first word is taken out of the second.
            let step = |sum: u64, word: &[u8]| {
                (sum ^ u64::from_le_bytes(*word.first_chunk().unwrap())).wrapping_mul(ODD[0]).rotate_left(29)
            };
            let before = (0..256).step_by(32).fold(ODD[0], |sum, at| step(sum, &first[at..]));
            let differs = step(before, &first[256..]) ^ step(before, &other[256..]);
            let word = u64::from_le_bytes(*first[288..].first_chunk().unwrap()) ^ differs;
            other[288..296].copy_from_slice(&word.to_le_bytes());
            if other[288..296].iter().all(plain) {
                assert_eq!(hash(0, &other), hash(0, first));
                return [&other[..], rest].concat();
            }
        }
        unreachable!()
    }

    #[test]
    fn texts_whose_hashes_fall_together_are_told_apart() {
        let (mut reused, mut anew) = (Reading::new(true), Reading::new(false));
        let known = body(&[message(&"Where is order 7 now? ".repeat(60))], "");
        let other = with_the_same_hash(&known);
        for text in [&known, &known, &known, &other, &known, &other] {
            assert_eq!(reused.ask(PATHS[0], text, &[]), anew.ask(PATHS[0], text, &[]));
        }
        assert!(reused.prefixes.taken_up_bytes() > 0);
        assert_ne!(anew.ask(PATHS[0], &known, &[]).scores, anew.ask(PATHS[0], &other, &[]).scores);
        // The same where a longer text is followed.
        for text in [&known, &other] {
            assert_eq!(reused.ask(PATHS[0], text, &[BLOCK, 600]), anew.ask(PATHS[0], text, &[]));
        }
    }

    #[test]
    fn of_a_conversation_its_last_turn_is_kept_and_where_others_part_from_it() {
        let mut reading = Reading::new(true);
        let turns: Vec<String> =
            (0..8).map(|i| message(&format!("Where is order {i}? ").repeat(40))).collect();
        let pieces: Vec<usize> = (0..20_000).step_by(600).collect();
        for i in 1..turns.len() {
            let number = reading.prefixes.number;
            reading.ask(PATHS[0], &body(&turns[..i], ""), if i < 5 { &[] } else { &pieces });
            assert!(reading.prefixes.kept.len() <= 1);
            assert_eq!(reading.prefixes.number - number, u32::from(i > 2), "once a message");
        }
        // The last two come in one piece, as if they had never come; others begin in the same way; one goes on.
        reading.prefixes.kept.clear();
        reading.prefixes.bytes = 0;
        reading.ask(PATHS[0], &body(&turns[..7], ""), &pieces);
        assert_eq!(reading.prefixes.kept.len(), 1);
        let other = |text: &str, more: usize| {
            let own = (0..=more).map(|i| message(&text.repeat(200 + i)));
            body(&turns[..3].iter().cloned().chain(own).collect::<Vec<_>>(), "")
        };
        for (text, more) in [("one", 0), ("two", 0), ("two", 1)] {
            reading.ask(PATHS[0], &other(text, more), &[]);
        }
        reading.ask(PATHS[0], &body(&turns, ""), &[]);
        let mut kept: Vec<usize> = reading.prefixes.kept.iter().map(|kept| kept.blocks * BLOCK).collect();
        kept.sort_unstable();
        let blocks = |text: &[u8]| text.len() / BLOCK * BLOCK;
        let seventh = blocks(&body(&turns[..7], ""));
        assert_eq!(kept, [blocks(&body(&turns[..3], "")), blocks(&other("two", 0)), seventh]);
    }

    /// More requests at once than may hold on to text.
    #[test]
    fn requests_under_way_at_once_are_read_each_for_itself() {
        let (mut reused, mut anew) = (Reading::new(true), Reading::new(false));
        let turns: Vec<String> =
            (0..8).map(|i| message(&format!("Where is order {i}? ").repeat(40))).collect();
        for known in [5, 6, 6] {
            reused.ask(PATHS[0], &body(&turns[..known], ""), &[]);
        }
        let bodies: Vec<Vec<u8>> =
            (4..8).flat_map(|i| [body(&turns[..i], ""), body(&turns[..i], ",}")]).collect();
        let Reading { detector, prefixes } = &mut reused;
        let mut under_way: Vec<_> = bodies
            .iter()
            .map(|body| {
                let mut message = detector.begin(Direction::Request.as_str());
                message.whole(UnitId { name: "target", index: 0 }, PATHS[0], 0, 1 << 16, detector.scratch());
                let parser = BodyParser::for_request(PATHS[0], None).unwrap();
                let trail = prefixes.begin(&mut message, &parser).unwrap();
                (body.chunks(700), message, parser, trail)
            })
            .collect();
        let mut most = 0;
        for _ in 0..20 {
            for (pieces, message, parser, trail) in &mut under_way {
                let mut feed = Feed::new(message, 1 << 16, detector.scratch());
                if let Some(piece) = pieces.next() {
                    prefixes.read(trail, piece, parser, &mut feed);
                }
                most = most.max(Arc::strong_count(&prefixes.holding) - 1);
            }
        }
        assert_eq!(most, MAX_HOLDING);
        for ((_, mut message, mut parser, mut trail), body) in under_way.into_iter().zip(&bodies) {
            let mut feed = Feed::new(&mut message, 1 << 16, detector.scratch());
            prefixes.finish(&mut trail, &mut parser, &mut feed);
            let defect = parser.finish(&mut feed).err().map(|error| error.as_str().into());
            assert_eq!(detector.finish(message, defect), anew.ask(PATHS[0], body, &[]));
        }
        assert_eq!(Arc::strong_count(&prefixes.holding), 1);
    }

    #[test]
    fn a_long_body_is_kept_up_to_a_bound() {
        let (mut reused, mut anew) = (Reading::new(true), Reading::new(false));
        let long = body(&[message(&"Where is order 7 now? ".repeat(2000))], "");
        for piece in [long.len(), 5000, 700, long.len()] {
            let cuts: Vec<usize> = (0..long.len()).step_by(piece).collect();
            assert_eq!(reused.ask(PATHS[0], &long, &cuts), anew.ask(PATHS[0], &long, &[]));
        }
        let kept: Vec<usize> = reused.prefixes.kept.iter().map(|kept| kept.blocks * BLOCK).collect();
        assert_eq!(kept, [MAX_STEM_BYTES]);
        assert_eq!(reused.prefixes.taken_up_bytes(), 2 * MAX_STEM_BYTES as u64);
    }

    #[test]
    fn nothing_is_kept_for_a_while_where_what_is_kept_goes_unused() {
        let mut reading = Reading::new(true);
        let asked = |reading: &mut Reading, i: usize| {
            let text = body(&[message(&format!("Where is order {i} now? ").repeat(80))], "");
            reading.ask(PATHS[0], &text, &[]);
            reading.ask(PATHS[0], &text, &[]);
            reading.prefixes.number
        };
        let first = MOST_IN_VAIN as usize + MAX_STEMS + 1;
        let most = (0..400).map(|i| asked(&mut reading, i)).max();
        assert_eq!(most, Some(first as u32));
        // What it has is taken up meanwhile, and it looks again.
        let taken_up = reading.prefixes.taken_up_bytes();
        asked(&mut reading, first - 1);
        assert!(reading.prefixes.taken_up_bytes() > taken_up);
        assert!((400..900).any(|i| asked(&mut reading, i) > first as u32));
    }
}
