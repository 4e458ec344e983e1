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
//! what they have computed of a prompt: Kwon et al. 2023, section 4.4, and vLLM's prefix caching). Where the hashes
//! of a message's blocks were last seen tells how far it agrees with an earlier one; there its state is kept, once a
//! message, and found again by hash and by comparing every byte. A body that arrives in pieces is not read as long
//! as it agrees with one that is longer, since what it would come to is kept behind that one's last byte.
//!
//! What is kept: at most [`MAX_STEMS`] beginnings and [`MAX_BYTES`] of them, the one unused for longest goes first;
//! one that a longer one of the same conversation replaces goes at once. A state is some 10 KiB. It belongs to a
//! baseline, and is of no use to another.
//!
//! Cost: a hash of the body (a cycle for four bytes) and a look into the marks for each block; a comparison and a
//! copy of the state for one that is known. Where most of what is kept goes unused, nothing is for a while.
//!
//! Left out on purpose: answers, which begin with an id of their own; bodies that are no document of a known API;
//! a beginning in another place of the body, of which `engine::score`'s memory of stretches is for. As with that,
//! who measures how long a request takes learns whether its beginning came before; `reuse_scores` switches off both.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

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
    /// Of each whole block with all before it.
    hashes: Vec<u64>,
    /// What came behind the last whole block.
    tail: Vec<u8>,
    /// How many blocks an earlier message agrees with.
    seen: usize,
    /// Some of it was read. Nothing is before [`MIN_STEM_BYTES`] are there; what came waits.
    begun: bool,
    waiting: Vec<u8>,
    /// All that came are the first bytes of this one, so many of them; none was read.
    along: Option<(Arc<Stem>, usize)>,
    /// What was taken up or kept last.
    base: Option<Arc<Stem>>,
    /// That was kept by this message.
    own: bool,
    /// Nothing that is still to come can be kept.
    closed: bool,
}

impl Trail {
    fn new(style: ApiStyle) -> Self {
        Self {
            style,
            hashes: Vec::with_capacity(8),
            tail: Vec::new(),
            seen: 0,
            begun: false,
            waiting: Vec::new(),
            along: None,
            base: None,
            own: false,
            closed: false,
        }
    }

    fn base_bytes(&self) -> usize {
        self.base.as_ref().map_or(0, |stem| stem.text.len())
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
        let tail = if trail.closed { Vec::new() } else { trail.tail.clone() };
        self.note(trail, piece);
        let along = trail.along.take();
        if let Some((stem, matched)) = &along
            && let Some(rest) = stem.text.get(*matched..)
            && rest.len() > piece.len()
            && behind(rest, piece).is_some()
        {
            trail.along = along.map(|(stem, matched)| (stem, matched + piece.len()));
            return;
        }
        if !trail.begun && trail.hashes.len() * BLOCK < MIN_STEM_BYTES {
            trail.waiting.extend_from_slice(piece);
            return;
        }
        let first = !core::mem::replace(&mut trail.begun, true);
        let waiting = core::mem::take(&mut trail.waiting);
        let mut text = Joined { head: head(&along).unwrap_or(&waiting), piece };
        if first || along.is_some() {
            if let Some(longer) = self.longer(trail, text, feed.message) {
                trail.along = Some((longer, text.len()));
                return;
            }
            text = self.resume(trail, text, parser, feed);
        }
        // The state is kept behind the last block that came before.
        let known = trail.base.as_ref().map_or(&[][..], |stem| &stem.text);
        let (base, seen) = (known.len(), trail.seen * BLOCK);
        if !trail.closed && seen > base && seen >= MIN_STEM_BYTES && (self.rest == 0 || trail.own) {
            // What stands between the base and `text`.
            let read = if first || along.is_some() { &[][..] } else { &tail };
            let mut whole = Vec::with_capacity(seen);
            for part in [known, read, text.head, text.piece] {
                whole.extend_from_slice(part.get(..seen - whole.len()).unwrap_or(part));
            }
            text = text.give(seen - base - read.len(), parser, feed);
            self.keep(trail, whole, parser, feed.message);
        }
        text.give(text.len(), parser, feed);
        // Only behind the last whole block it is known what stands between the base and the next piece.
        trail.closed |= trail.base_bytes() < trail.hashes.len() * BLOCK;
    }

    /// The body is over: what was not read yet is.
    pub(super) fn finish(&mut self, trail: &mut Trail, parser: &mut BodyParser, feed: &mut Feed<'_>) {
        let along = trail.along.take();
        let mut text = Joined { head: &[], piece: &[] };
        if let Some(head) = head(&along) {
            text = self.resume(trail, Joined { head, ..text }, parser, feed);
        } else if !trail.begun {
            text.piece = &trail.waiting;
        }
        text.give(text.len(), parser, feed);
    }

    /// Hashes the blocks that `piece` completes, and tells which came before; from now on they did.
    fn note(&mut self, trail: &mut Trail, piece: &[u8]) {
        if trail.hashes.len() * BLOCK >= MAX_STEM_BYTES {
            trail.closed = true;
            return;
        }
        if self.marks.is_empty() {
            self.marks = vec![Mark::default(); MARKS];
        }
        let Trail { hashes, tail, seen, .. } = trail;
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
        let mut rest = piece;
        if !tail.is_empty() {
            let (front, behind) = piece.split_at_checked(BLOCK - tail.len()).unwrap_or((piece, &[]));
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

    /// Takes up the longest stem that `text` begins with; returns what is left to be read.
    fn resume<'a>(
        &mut self,
        trail: &mut Trail,
        text: Joined<'a>,
        parser: &mut BodyParser,
        feed: &mut Feed<'_>,
    ) -> Joined<'a> {
        // What was kept had come before; to look through all of it costs as much as to read some blocks.
        if trail.seen * BLOCK < MIN_STEM_BYTES {
            return text;
        }
        let begins = |kept: &Kept| {
            trail.hashes.get(kept.blocks.wrapping_sub(1)) == Some(&kept.hash)
                && kept.stem.text.len() <= text.len()
                && kept.stem.is_of(trail, feed.message)
                && text.is_begun_by(&kept.stem.text)
        };
        let fitting = self.kept.iter_mut().filter(|kept| begins(kept));
        let Some(found) = fitting.max_by_key(|kept| kept.blocks) else { return text };
        if !feed.message.resume(&found.stem.part) {
            return text;
        }
        parser.resume(&found.stem.parser);
        (found.used, found.times) = (self.messages, found.times.saturating_add(1));
        if found.times == 1 {
            self.in_vain = (self.in_vain - 2).max(-MOST_IN_VAIN);
        }
        trail.seen = trail.seen.max(found.stem.hashes.len());
        let read = found.stem.text.len();
        self.taken_up_bytes += read as u64;
        trail.base = Some(Arc::clone(&found.stem));
        text.behind(read)
    }

    /// Keeps where a message stands behind `text`.
    fn keep(&mut self, trail: &mut Trail, text: Vec<u8>, parser: &BodyParser, message: &Message) {
        let (Some(parser), Some(part)) = (parser.save(), message.save()) else { return };
        let blocks = text.len() / BLOCK;
        let (Some(hashes), true) = (trail.hashes.get(..blocks), text.len() <= MAX_STEM_BYTES) else { return };
        let stem = Stem { style: trail.style, text, hashes: hashes.to_vec(), parser, part };
        // The conversation goes on: what was known of it is of use to no other, unless it was to some already.
        if let Some(base) = &trail.base
            && let Some(place) = self.kept.iter().position(|kept| Arc::ptr_eq(&kept.stem, base))
            && (trail.own || self.kept.get(place).is_some_and(|kept| kept.times == 1))
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
        trail.base = Some(Arc::clone(&stem));
        let hash = stem.hashes.last().copied().unwrap_or(0);
        self.kept.push(Kept { number, blocks, hash, stem, used: self.messages, times: 0 });
        trail.own = true;
    }

    fn forget(&mut self, place: usize) {
        if place < self.kept.len() {
            let gone = self.kept.swap_remove(place);
            self.bytes = self.bytes.saturating_sub(gone.stem.bytes());
        }
    }
}

/// What came of a body that was not read.
fn head(along: &Option<(Arc<Stem>, usize)>) -> Option<&[u8]> {
    along.as_ref().and_then(|(stem, matched)| stem.text.get(..*matched))
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

    /// Without the first bytes.
    fn behind(self, bytes: usize) -> Self {
        let Self { head, piece } = self;
        let of_head = bytes.min(head.len());
        Self {
            head: head.get(of_head..).unwrap_or_default(),
            piece: piece.get(bytes - of_head..).unwrap_or_default(),
        }
    }

    /// Has the first bytes read; returns the others.
    fn give(self, bytes: usize, parser: &mut BodyParser, feed: &mut Feed<'_>) -> Self {
        let bytes = bytes.min(self.len());
        let of_head = bytes.min(self.head.len());
        for part in [self.head.get(..of_head), self.piece.get(..bytes - of_head)].into_iter().flatten() {
            if !part.is_empty() {
                parser.push(part, feed);
            }
        }
        self.behind(bytes)
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
                    Some(trail) => prefixes.read(trail, piece, &mut parser, &mut feed),
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
            reading.ask(PATHS[0], &body(&turns[..i], ""), if i < 5 { &[] } else { &pieces });
            assert!(reading.prefixes.kept.len() <= 1);
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
