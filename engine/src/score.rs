//! Code lengths to nonconformity scores and spans, in constant memory.
//!
//! What: [`UnitScorer`] runs over a content unit's bytes as they arrive. With L bytes of costs c_i (bits),
//! T = sum c_i and mu the calibrated mean cost of a byte, it keeps the sums behind five views of a unit:
//! - **total**, (T - mu L) against the spread that normal units of that length have: is the unit as a
//!   whole unlike the baseline?
//! - **peak** = log2 (1 + sum (c_i / 2)^4), a soft maximum of the costs: a few odd bytes in ordinary text move it
//!   though they vanish in the total;
//! - **fields** = log2 (1 + sum max(0, z_f)^2) over the fields of the unit, z_f = (S_f - mu_f L_f) /
//!   sqrt(v_f L_f + 8) with the field's own calibrated mean and variance: odd values;
//! - **new words** and **new pairs** of familiar words (see [`crate::words`]).
//!
//! And, as evidence, the **largest excess spans**: the highest values of a CUSUM (Page 1954) over
//! `cost - mu - margin`; each is the stretch from where it left zero to its highest point. And the
//! **mean** T / L, bits per byte, for people.
//!
//! [`crate::calibrate`] makes one statistic of the views. Spans say where, not whether: on traffic with
//! random tokens the largest excess of every normal message is its token.
//!
//! Cost: the model's (see [`crate::coder`]), and about five operations a byte; less for text that came
//! before, whose sums are looked up (see [`memo`]). A [`UnitScorer`] takes under 4 KiB, whatever the unit's
//! length. Every split of the bytes into chunks gives the same result, since
//! all of it is sums and one recurrence.

use crate::bitmap::below;
use crate::coder::{
    BLOCK_BYTES, Block, ContextModel, FieldNumber, MAX_COST, State, UNITS_PER_BIT, WINDOW, identity,
    log2_fixed, peak_weight,
};
use crate::normalise::{Class, ClassSet, Normaliser, Part, Piece, Sourced};
use crate::words::{Passage, Vocabulary, WordTally, WordTracker};
use alloc::boxed::Box;
use alloc::vec::Vec;
use wide::{i16x8, i32x4};

mod memo;

use memo::{Also, Cuts, Ended, Known, Memo, Seldom, StateId, Stretch, Sums};

/// How many spans are kept as evidence.
pub const MAX_SPANS: usize = 3;

/// What a byte must cost beyond expectation, in 1/256 bit, before it adds to an excess span.
pub const EXCESS_MARGIN: u32 = 4 * UNITS_PER_BIT;

/// What a byte of a blob costs, in 1/256 bit: one of the 64 characters of base64 (RFC 4648, section 4) says no
/// more, and no context foresees it. The blob's marker is paid beside it.
pub const BLOB_BYTE_COST: u32 = 6 * UNITS_PER_BIT;

/// The length of the blob that a piece stands for, if it does for one.
fn blob(piece: &Piece<'_>) -> Option<u64> {
    (piece.class == Some(Class::Base64)).then_some(piece.source_len)
}

/// A part of a unit's text, and what it costs.
pub(crate) enum Step<'a> {
    /// Bytes from `offset` in the text on, or the marker of a token that stands there.
    Costs {
        /// In the text.
        offset: u64,
        /// They are a marker's.
        marker: bool,
        /// Their costs.
        block: &'a Block,
    },
    /// A blob: [`BLOB_BYTE_COST`] for each of its bytes, beside its marker.
    Blob {
        /// In the text.
        offset: u64,
        /// Its bytes.
        len: u64,
        /// The field that it stands in.
        field: Option<FieldNumber>,
    },
}

/// What a unit of one kind is scored under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitModel {
    /// Classes of token that markers stand for.
    pub normalised: ClassSet,
    /// Code lengths.
    pub coder: ContextModel,
    /// Words that training saw.
    pub vocabulary: Vocabulary,
    /// What bytes cost in held-out normal units.
    pub expected: Expected,
}

/// What bytes cost in held-out normal units.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    all: Moments,
    text: Moments,
    fields: Vec<Moments>,
    /// A hash of all of them.
    identity: u64,
}

/// Mean and variance of the cost of a byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moments {
    /// 1/65536 bit.
    pub mean: u32,
    /// 1/65536 square bit.
    pub variance: u32,
}

/// Sums of costs and of their squares, to take [`Moments`] of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CostSums {
    bytes: u64,
    /// 1/256 bit.
    cost: u64,
    /// 1/65536 square bit.
    squares: u64,
}

impl CostSums {
    pub(crate) fn add(&mut self, costs: &[u16]) {
        for &cost in costs {
            self.bytes += 1;
            self.cost += u64::from(cost);
            self.squares += u64::from(cost) * u64::from(cost);
        }
    }

    fn add_blob(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.cost += bytes * u64::from(BLOB_BYTE_COST);
        self.squares += bytes * u64::from(BLOB_BYTE_COST) * u64::from(BLOB_BYTE_COST);
    }

    pub(crate) fn merge(&mut self, other: CostSums) {
        self.bytes += other.bytes;
        self.cost += other.cost;
        self.squares += other.squares;
    }

    /// The moments, drawn towards `all` as if that had been seen on 20 bytes more.
    pub(crate) fn moments(self, all: Moments) -> Moments {
        const PRIOR_BYTES: u64 = 20;
        const MIN_VARIANCE: u64 = 65_536 / 20;
        let mean_of_all = u64::from(all.mean);
        // The second moment of all bytes, 1/65536 square bit.
        let square_of_all = u64::from(all.variance) + ((mean_of_all * mean_of_all) >> 16);
        let n = self.bytes + PRIOR_BYTES;
        let mean = (u128::from(self.cost) * 256 + u128::from(PRIOR_BYTES * mean_of_all)) / u128::from(n);
        let square = (u128::from(self.squares) + u128::from(PRIOR_BYTES * square_of_all)) / u128::from(n);
        let variance = (square as u64).saturating_sub((mean as u64 * mean as u64) >> 16);
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Moments { mean: small(mean as u64), variance: small(variance.max(MIN_VARIANCE)) }
    }

    /// The moments of these bytes alone; zero without bytes.
    pub(crate) fn own_moments(self) -> Moments {
        let n = u128::from(self.bytes.max(1));
        let mean = (u128::from(self.cost) * 256 / n) as u64;
        let square = (u128::from(self.squares) / n) as u64;
        let variance = square.saturating_sub((mean * mean) >> 16);
        Moments { mean: mean as u32, variance: u32::try_from(variance).unwrap_or(u32::MAX) }
    }
}

impl UnitModel {
    /// Fits [`Self::expected`] to the texts of held-out normal units.
    pub fn expect<'a>(&mut self, texts: impl Iterator<Item = &'a [u8]>) {
        let mut fields: Vec<CostSums> = alloc::vec![CostSums::default(); self.coder.fields()];
        let mut text = CostSums::default();
        for unit in texts {
            let state = self.walk(unit, &mut |step| {
                let mut sums = |field: Option<FieldNumber>, add: &dyn Fn(&mut CostSums)| {
                    add(field.and_then(|field| fields.get_mut(field.index())).unwrap_or(&mut text));
                };
                match step {
                    Step::Costs { block, .. } => {
                        let mut start = 0;
                        for segment in block.segments() {
                            let costs = block.costs().get(start..segment.end).unwrap_or_default();
                            sums(segment.field, &|sums| sums.add(costs));
                            start = segment.end;
                        }
                    }
                    Step::Blob { len, field, .. } => sums(field, &|sums| sums.add_blob(len)),
                }
            });
            if let (Some(field), Some(cost)) = (state.field(), self.coder.end_cost(&state))
                && let Some(sums) = fields.get_mut(field.index())
            {
                sums.add(&[cost]);
            }
        }
        let mut all = text;
        fields.iter().for_each(|sums| all.merge(*sums));
        let all = all.own_moments();
        let fields = fields.into_iter().map(|sums| sums.moments(all)).collect();
        self.expected = Expected::new(all, text.moments(all), fields);
    }

    /// Visits what a unit's text costs, in order; returns the state behind it.
    pub(crate) fn walk(&self, text: &[u8], each: &mut impl FnMut(Step<'_>)) -> State {
        let (mut state, mut block) = (self.coder.start(), Block::default());
        let mut emit = |piece: Piece<'_>| {
            let mut done = 0;
            while let Some(rest) = piece.text.get(done..)
                && !rest.is_empty()
            {
                let offset = piece.offset + if piece.class.is_none() { done as u64 } else { 0 };
                done += self.coder.cost_block(&mut state, rest, &mut block);
                each(Step::Costs { offset, marker: piece.class.is_some(), block: &block });
            }
            if let Some(len) = blob(&piece) {
                each(Step::Blob { offset: piece.offset, len, field: state.field() });
            }
        };
        Normaliser::new(self.normalised).finish_with(text, 0, &mut emit);
        state
    }

    /// A hash of all that decides a score.
    fn identity(&self) -> u64 {
        let parts = [self.coder.identity(), self.vocabulary.identity(), self.expected.identity];
        identity(parts.into_iter().chain([self.normalised.bits().into()]))
    }
}

impl Expected {
    /// Of all bytes; of those in fields without contexts of their own, and in free text; of each field with
    /// contexts of its own.
    pub fn new(all: Moments, text: Moments, fields: Vec<Moments>) -> Self {
        let numbers = |moments: &Moments| u64::from(moments.mean) << 32 | u64::from(moments.variance);
        let identity = identity([&all, &text].into_iter().chain(&fields).map(numbers));
        Self { all, text, fields, identity }
    }

    /// Of all bytes.
    pub fn all(&self) -> Moments {
        self.all
    }

    /// Of bytes in fields without contexts of their own, and in free text.
    pub fn text(&self) -> Moments {
        self.text
    }

    /// Of each field with contexts of its own.
    pub fn fields(&self) -> &[Moments] {
        &self.fields
    }

    /// Without units to tell: every byte costs `mean` (1/65536 bit), as much as other kinds' do.
    pub(crate) fn assume(&mut self, mean: u32) {
        let moments = CostSums::default().moments(Moments { mean, variance: mean });
        *self = Self::new(moments, moments, alloc::vec![moments; self.fields.len()]);
    }

    fn of(&self, field: Option<FieldNumber>) -> Moments {
        field.map_or(self.text, |field| self.fields.get(field.index()).copied().unwrap_or(self.all))
    }
}

/// A stretch of a unit that costs more than expected. Offsets are half open, `[start, end)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExcessSpan {
    /// First byte, in the unit's text.
    pub start: u64,
    /// One past the last byte, in the unit's text.
    pub end: u64,
    /// Where the first byte came from in the message body.
    pub body_start: u64,
    /// One past where the last byte came from in the message body.
    pub body_end: u64,
    /// Code length of the span, 1/256 bit.
    pub cost: u64,
    /// Excess over expectation and margin, 1/256 bit: the CUSUM's height.
    pub excess: u64,
}

/// The sums over a unit, as they stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnitScores {
    /// Symbols scored: bytes of the normalised text, and the end of the unit if it stands in a field.
    pub bytes: u64,
    /// Bytes of the text itself.
    pub source_bytes: u64,
    /// Code length C(x|B), 1/256 bit.
    pub cost: u64,
    /// Sum of (c/2)^4 over the bytes' costs c in bits.
    pub peak_sum: u64,
    /// Sum over fields of max(0, z)^2, in 1/256.
    pub field_sum: u64,
    /// Its words.
    pub words: WordTally,
    /// Spans by falling excess; unused ones have no excess.
    pub spans: [ExcessSpan; MAX_SPANS],
}

impl UnitScores {
    /// Excess of the largest span, 1/256 bit.
    pub fn max_excess(&self) -> u64 {
        self.spans.first().map_or(0, |span| span.excess)
    }

    /// T - mu L with `expected` = mu in 1/65536 bit; the result is in 1/256 bit.
    pub fn excess(&self, expected: u32) -> i64 {
        let expected = u128::from(expected) * u128::from(self.bytes) / u128::from(UNITS_PER_BIT);
        (i128::from(self.cost) - expected as i128).clamp(i64::MIN.into(), i64::MAX.into()) as i64
    }

    /// log2 (1 + sum (c/2)^4) over the bytes' costs c in bits, in 1/256; 0 for an empty unit.
    pub fn peak(&self) -> i64 {
        self.logarithms().1
    }

    /// log2 (1 + sum max(0, z_f)^2), in 1/256.
    pub fn fields(&self) -> i64 {
        self.logarithms().2
    }

    /// log2 of the bytes in 1/4096, [`Self::peak`] and [`Self::fields`].
    pub(crate) fn logarithms(&self) -> (u32, i64, i64) {
        let [bytes, peak, fields] =
            [self.bytes, self.peak_sum.saturating_add(1), self.field_sum.saturating_add(256)].map(log2_fixed);
        // The fields' sum is in 1/256: 8 bits less.
        (bytes, i64::from(peak >> 4), i64::from(fields >> 4) - 8 * i64::from(UNITS_PER_BIT))
    }

    /// New pairs of familiar words / (words + 300), in 1/65536.
    pub fn new_pairs(&self) -> i64 {
        ((u64::from(self.words.new_pairs) << 16) / (u64::from(self.words.words) + 300)) as i64
    }

    /// New words / (words + 5), in 1/65536.
    pub fn new_words(&self) -> i64 {
        ((u64::from(self.words.new_words) << 16) / (u64::from(self.words.words) + 5)) as i64
    }
}

/// Memory to score in: what is worked on, and what was scored before. It decides how long a score takes and
/// nothing else, so it is kept by whoever scores, for any units of any baselines.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    block: Block,
    memo: Memo,
    /// Scorers of units that have ended: making one anew costs as much as scoring a short unit.
    #[expect(clippy::vec_box, reason = "they go from a message to the next as they are, without a copy")]
    spare: Vec<Box<UnitScorer>>,
}

/// More scorers than this are given back to the allocator.
const MAX_SPARE: usize = 8;

impl Scratch {
    /// A scorer with nothing scored yet.
    pub(crate) fn scorer(&mut self, model: &UnitModel) -> Box<UnitScorer> {
        match self.spare.pop() {
            Some(mut scorer) => {
                scorer.restart(model);
                scorer
            }
            None => Box::new(UnitScorer::new(model)),
        }
    }

    /// Ends a unit: the scores of what was pushed to its scorer.
    pub(crate) fn finish(&mut self, model: &UnitModel, mut scorer: Box<UnitScorer>) -> UnitScores {
        let scores = scorer.finish(model, self);
        self.keep(scorer);
        scores
    }

    fn keep(&mut self, scorer: Box<UnitScorer>) {
        if self.spare.len() < MAX_SPARE {
            self.spare.push(scorer);
        }
    }

    /// Keeps no text to look up from now on, and forgets what it kept: every text is scored anew, with the same
    /// result. For who may not keep traffic in memory, or let anyone measure whether a text came before.
    pub fn score_anew(&mut self) {
        self.memo.turn_off();
    }

    /// How many bytes were scored by looking up what they had come to before.
    pub fn known_bytes(&self) -> u64 {
        self.memo.known_bytes
    }
}

/// Running score of one content unit.
#[derive(Clone, Debug)]
pub struct UnitScorer {
    waiting: Waiting,
    running: Running,
}

/// What is scored is scored here.
#[derive(Clone, Debug)]
struct Running {
    /// Puts markers in the place of volatile tokens.
    normaliser: Normaliser,
    gathered: Gathered,
    accounts: Accounts,
    /// The model's.
    identity: u64,
}

/// Text in small pieces, as JSON's escapes and the events of a stream leave it, which is scored together.
#[derive(Clone, Debug)]
struct Waiting {
    text: [u8; WAITING_BYTES],
    len: usize,
    parts: [Part; WAITING_PARTS],
    used: usize,
}

const WAITING_BYTES: usize = 512;
const WAITING_PARTS: usize = 32;

impl Waiting {
    const EMPTY: Self =
        Self { text: [0; WAITING_BYTES], len: 0, parts: [Part { at: 0, body: 0 }; WAITING_PARTS], used: 0 };

    /// Whether there was room for it.
    fn take(&mut self, text: &[u8], body: u64) -> bool {
        let Some(room) = self.text.get_mut(self.len..self.len + text.len()) else { return false };
        let last = self.used.checked_sub(1).and_then(|last| self.parts.get(last));
        let goes_on = last.is_some_and(|last| last.body + (self.len as u64 - u64::from(last.at)) == body);
        if !goes_on && !text.is_empty() {
            let Some(part) = self.parts.get_mut(self.used) else { return false };
            *part = Part { at: self.len as u16, body };
            self.used += 1;
        }
        room.copy_from_slice(text);
        self.len += text.len();
        true
    }

    /// What waits; it waits no longer.
    fn give(&mut self) -> Sourced<'_> {
        let (len, used) = (core::mem::take(&mut self.len), core::mem::take(&mut self.used));
        let (text, parts) = (self.text.get(..len), self.parts.get(..used));
        Sourced::new(text.unwrap_or_default(), parts.unwrap_or_default())
    }
}

/// Most places that a block is put together from.
const MAX_ORIGINS: usize = 24;

/// Normalised text that waits to be a block, and where it comes from.
#[derive(Clone, Debug)]
struct Gathered {
    text: [u8; BLOCK_BYTES],
    len: usize,
    origins: [Origin; MAX_ORIGINS],
    used: usize,
}

/// Bytes from `at` on come from here.
#[derive(Clone, Copy, Debug, Default)]
struct Origin {
    at: u16,
    /// All of its bytes stand for the whole of this source; else the source goes on with them.
    token: bool,
    offset: u64,
    source_len: u32,
    body_start: u64,
    body_len: u32,
}

/// Where a byte comes from, in the unit's text and in the body; half open.
#[derive(Clone, Copy)]
struct Source {
    start: u64,
    end: u64,
    body_start: u64,
    body_end: u64,
}

impl Gathered {
    const EMPTY: Self = Self {
        text: [0; BLOCK_BYTES],
        len: 0,
        origins: [Origin { at: 0, token: false, offset: 0, source_len: 0, body_start: 0, body_len: 0 };
            MAX_ORIGINS],
        used: 0,
    };

    fn text(&self) -> &[u8] {
        self.text.get(..self.len).unwrap_or_default()
    }

    /// Takes as many bytes of the piece as there is room for, from `from` on; returns how many.
    fn take(&mut self, piece: &Piece<'_>, from: usize) -> usize {
        let rest = piece.text.get(from..).unwrap_or_default();
        let room = BLOCK_BYTES - self.len;
        let token = piece.class.is_some();
        if self.used == MAX_ORIGINS || (token && rest.len() > room) {
            return 0;
        }
        let taken = rest.get(..room).unwrap_or(rest);
        if let Some(to) = self.text.get_mut(self.len..self.len + taken.len()) {
            to.copy_from_slice(taken);
        }
        let skipped = if token { 0 } else { from as u64 };
        let (offset, body_start) = (piece.offset + skipped, piece.body_start + skipped);
        let goes_on = self.used.checked_sub(1).and_then(|last| self.origins.get(last)).is_some_and(|last| {
            let len = self.len as u64 - u64::from(last.at);
            !token && !last.token && last.offset + len == offset && last.body_start + len == body_start
        });
        if !goes_on && let Some(slot) = self.origins.get_mut(self.used) {
            *slot = Origin {
                at: self.len as u16,
                token,
                offset,
                source_len: u32::try_from(piece.source_len).unwrap_or(u32::MAX),
                body_start,
                body_len: u32::try_from(piece.body_end - piece.body_start).unwrap_or(u32::MAX),
            };
            self.used += 1;
        }
        self.len += taken.len();
        taken.len()
    }

    fn source(&self, i: usize) -> Source {
        let origins = self.origins.get(..self.used).unwrap_or_default();
        let at = origins.partition_point(|origin| usize::from(origin.at) <= i).saturating_sub(1);
        let origin = origins.get(at).copied().unwrap_or_default();
        if origin.token {
            return Source {
                start: origin.offset,
                end: origin.offset + u64::from(origin.source_len),
                body_start: origin.body_start,
                body_end: origin.body_start + u64::from(origin.body_len),
            };
        }
        let into = (i - usize::from(origin.at)) as u64;
        let (start, body_start) = (origin.offset + into, origin.body_start + into);
        Source { start, end: start + 1, body_start, body_end: body_start + 1 }
    }
}

/// The sums behind the scores.
#[derive(Clone, Debug)]
struct Accounts {
    state: State,
    /// Expected cost of a byte plus the margin, 1/256 bit.
    reference: u32,
    scores: UnitScores,
    words: WordTracker,
    /// Cost and bytes of the field under way.
    field_cost: u64,
    field_bytes: u64,
    /// The excursion under way: from where the CUSUM last left zero to its highest point so far.
    current: ExcessSpan,
    /// Height of the CUSUM now, and code length since `current.start`.
    height: u64,
    running_cost: u64,
}

impl UnitScorer {
    /// Nothing scored yet.
    pub fn new(model: &UnitModel) -> Self {
        Self { waiting: Waiting::EMPTY, running: Running::new(model) }
    }

    /// The scores of a unit that is here from its beginning to its end, at less cost than piece by piece.
    pub fn whole(model: &UnitModel, text: &[u8], body_offset: u64, scratch: &mut Scratch) -> UnitScores {
        let mut scorer = scratch.scorer(model);
        let part = [Part { at: 0, body: body_offset }];
        let scores = scorer.running.end(model, Sourced::new(text, &part), scratch);
        scratch.keep(scorer);
        scores
    }

    fn restart(&mut self, model: &UnitModel) {
        (self.waiting.len, self.waiting.used) = (0, 0);
        self.running.restart(model);
    }

    /// Takes the unit's next bytes. `body_offset` is where `text` stands in the message body; a stretch
    /// without escapes advances one for one. What is short waits for more.
    pub fn push(&mut self, model: &UnitModel, text: &[u8], body_offset: u64, scratch: &mut Scratch) {
        if self.waiting.take(text, body_offset) {
            return;
        }
        self.running.push(model, self.waiting.give(), scratch);
        if !self.waiting.take(text, body_offset) {
            let part = [Part { at: 0, body: body_offset }];
            self.running.push(model, Sourced::new(text, &part), scratch);
        }
    }

    /// Ends the unit: the scores of what has been pushed. The scorer is then spent.
    pub fn finish(&mut self, model: &UnitModel, scratch: &mut Scratch) -> UnitScores {
        self.running.end(model, self.waiting.give(), scratch)
    }
}

impl Running {
    fn new(model: &UnitModel) -> Self {
        Self {
            normaliser: Normaliser::new(model.normalised),
            gathered: Gathered::EMPTY,
            accounts: Accounts::new(model),
            identity: model.identity(),
        }
    }

    fn restart(&mut self, model: &UnitModel) {
        self.normaliser.restart(model.normalised);
        (self.gathered.len, self.gathered.used) = (0, 0);
        self.accounts = Accounts::new(model);
        self.identity = model.identity();
    }

    /// Scores the unit's next bytes.
    fn push(&mut self, model: &UnitModel, text: Sourced<'_>, scratch: &mut Scratch) {
        let known = self.pass_known(model, text, false, scratch);
        self.score(model, text.slice(known, text.text().len()), &mut scratch.block);
    }

    /// Scores its last bytes.
    fn end(&mut self, model: &UnitModel, text: Sourced<'_>, scratch: &mut Scratch) -> UnitScores {
        let known = self.pass_known(model, text, true, scratch);
        self.score_last(model, text.slice(known, text.text().len()), &mut scratch.block);
        let Scratch { block, memo, .. } = scratch;
        self.flush(model, memo, block, true);
        self.accounts.end(model);
        self.accounts.scores
    }

    /// Normalises and scores.
    fn score(&mut self, model: &UnitModel, text: Sourced<'_>, block: &mut Block) {
        let Self { normaliser, gathered, accounts, .. } = self;
        normaliser.push_sourced(text, &mut |piece| accounts.gather(model, gathered, &piece, block));
    }

    /// As [`Self::score`] of what nothing follows.
    fn score_last(&mut self, model: &UnitModel, text: Sourced<'_>, block: &mut Block) {
        let Self { normaliser, gathered, accounts, .. } = self;
        normaliser.finish_with_sourced(text, &mut |piece| accounts.gather(model, gathered, &piece, block));
        normaliser.restart(model.normalised);
    }

    /// Takes stretches from the front of `text` as long as some were scored before, and what stands between
    /// those; returns how many bytes that is.
    fn pass_known(
        &mut self,
        model: &UnitModel,
        source: Sourced<'_>,
        at_end: bool,
        scratch: &mut Scratch,
    ) -> usize {
        let Scratch { block, memo, .. } = scratch;
        let text = source.text();
        if text.len() < WORTH_A_LOOK {
            return 0;
        }
        let Some(eager) = memo.prospect(self.identity, text.len()) else { return 0 };
        let (mut done, mut at, mut known_bytes, mut detours) = (0, 0, 0, 0);
        let mut cuts = Cuts::new(text, 0);
        // The state, while `accounts.state` is behind; the place of the stretch before, and what followed that.
        let (mut ahead, mut behind, mut foretold) = (None, None, None);
        let begins = self.normaliser.is_at_start();
        if begins {
            let (place, state, likely) = memo.start(self.identity);
            (ahead, behind, foretold) = (state, Some(place), likely);
        }
        // Where a stretch begins that came before and waits for another.
        let mut first = None;
        while let Some(rest) = text.get(at..) {
            // Mostly the same follows again.
            if let (Some(before), Some(likely)) = (ahead, foretold.take())
                && done == at
                && (likely.before, Some(&likely.begins)) == (before, rest.first())
                && let Some((known, seldom)) = memo.known(likely.place)
                && known.begins(rest, at_end)
                && (!known.asks_more() || self.holds(model, &seldom.also, ahead, text, at))
            {
                foretold = memo.behind(known);
                self.pass(model, known, seldom, source, at);
                (ahead, behind) = (Some(known.after), Some(likely.place));
                at += known.len();
                known_bytes += known.len();
                done = at;
                continue;
            }
            let cut = cuts.stretch(text, at);
            let last = cut.is_none();
            let Some(len) = cut.or((at_end && memo::is_stretch(rest)).then_some(rest.len())) else { break };
            let stretch = Stretch::new(rest, len, last);
            let start = at;
            at += len;
            if !memo.came_before(&stretch) {
                first = None;
                if done == 0 {
                    ahead = None;
                }
                continue;
            }
            if ahead.is_none() && done < start && !last && !eager {
                match first {
                    None => {
                        first = Some(start);
                        continue;
                    }
                    Some(of_first) if of_first < start => {
                        at = of_first;
                        cuts = Cuts::new(text, at);
                        continue;
                    }
                    Some(_) => {}
                }
            }
            first = None;

            if done < start {
                self.catch_up(memo, ahead.take(), text.get(..done).unwrap_or_default());
                self.score(model, source.slice(done, start), block);
                (done, behind) = (start, None);
                detours += 1;
            }
            if ahead.is_none() && !self.is_at_rest(model, memo, block) {
                continue;
            }
            let before = ahead.unwrap_or_else(|| {
                let id = memo.state_id(self.identity, &self.accounts.state);
                if begins && start == 0 {
                    memo.begins_in(self.identity, id);
                }
                id
            });
            let found = memo.find(before, &stretch, |also| self.holds(model, also, ahead, text, start));
            if let Some((place, known, seldom)) = found {
                foretold = memo.behind(known);
                self.pass(model, known, seldom, source, start);
                ahead = Some(known.after);
                known_bytes += len;
                if let Some(behind) = behind.replace(place) {
                    memo.follow(behind, place);
                }
            } else {
                behind = None;
                detours += 1;
                self.catch_up(memo, ahead.take(), text.get(..start).unwrap_or_default());
                ahead = self.learn(model, memo, before, &stretch, source.slice(start, at), block);
                if ahead.is_none() {
                    memo.give_up(&stretch);
                }
            }
            done = at;
        }
        self.catch_up(memo, ahead, text.get(..done).unwrap_or_default());
        memo.account(self.identity, known_bytes, detours);
        memo.known_bytes += known_bytes as u64;
        done
    }

    /// Takes the stretch at `source`'s `at` for what it came to; `accounts.state` stays behind.
    #[inline(always)]
    fn pass(&mut self, model: &UnitModel, known: &Known, seldom: &Seldom, source: Sourced<'_>, at: usize) {
        let len = known.len();
        if known.is_above() {
            self.accounts.pass_spans(seldom, len, source, at);
        }
        self.accounts.pass(model, known, seldom);
        self.accounts.scores.source_bytes += len as u64;
        self.normaliser.pass(source.text().get(at..at + len).unwrap_or_default());
    }

    /// Whether what a stretch depends on beyond the state is as it was.
    #[inline(always)]
    fn holds(
        &mut self,
        model: &UnitModel,
        also: &Also,
        ahead: Option<StateId>,
        text: &[u8],
        start: usize,
    ) -> bool {
        also.path.is_none_or(|(path, _)| path == self.accounts.state.tracker().path())
            && also.plain.is_none_or(|plain| plain == self.plain_before(model, ahead, text, start))
    }

    /// Makes the state that which `text` was found to lead to.
    fn catch_up(&mut self, memo: &Memo, ahead: Option<StateId>, text: &[u8]) {
        if let Some(state) = ahead.and_then(|id| memo.state(id)) {
            self.accounts.state.go_on_as(state, text);
        }
    }

    /// The plain state before `text[start]`.
    #[inline(never)]
    fn plain_before(&self, model: &UnitModel, ahead: Option<StateId>, text: &[u8], start: usize) -> u32 {
        match (ahead, text.get(..start).and_then(<[u8]>::last_chunk::<4>)) {
            (Some(_), Some(last)) => model.coder.plain_state(last),
            _ => model.coder.plain_before(&self.accounts.state),
        }
    }

    /// Nothing waits: what comes next depends on the coder's state and the sums alone. Scores what was
    /// gathered if that is all that waits.
    fn is_at_rest(&mut self, model: &UnitModel, memo: &mut Memo, block: &mut Block) -> bool {
        if !self.normaliser.is_idle() {
            return false;
        }
        if !self.gathered.text().is_empty() {
            self.flush(model, memo, block, false);
        }
        self.accounts.words.is_between_words()
    }

    /// Scores a stretch, and keeps what it came to if it would come to that again. At rest; the state behind
    /// it, if it is at rest there.
    fn learn(
        &mut self,
        model: &UnitModel,
        memo: &mut Memo,
        before: StateId,
        stretch: &Stretch,
        source: Sourced<'_>,
        block: &mut Block,
    ) -> Option<StateId> {
        let (text, last) = (stretch.text.bytes(), stretch.text.is_last());
        let was = self.before(model);
        if last {
            self.score_last(model, source, block);
        } else {
            self.score(model, source, block);
        }
        if !self.normaliser.is_idle() || self.gathered.text() != text {
            return None;
        }
        self.keep(model, memo, before, stretch, &was, block)
    }

    /// As [`Accounts::flush`] of what was gathered; a short block that came before is looked up.
    fn flush(&mut self, model: &UnitModel, memo: &mut Memo, block: &mut Block, at_end: bool) {
        let text = self.gathered.text();
        if (1..=memo::STRETCH_BYTES).contains(&text.len())
            && self.accounts.words.is_between_words()
            && memo.looks_at_block(self.identity)
        {
            let (stretch, text_len) = (Stretch::normalised(text, at_end), text.len());
            if memo.came_before(&stretch) {
                let before = memo.state_id(self.identity, &self.accounts.state);
                let found = memo.find(before, &stretch, |also| self.holds(model, also, None, &[], 0));
                let known = found.and_then(|(_, known, seldom)| {
                    memo.state(known.after).map(|after| (known, seldom, after))
                });
                if let Some((known, seldom, after)) = known {
                    self.pass_block(model, known, seldom, after);
                    memo.account_block(self.identity, Some(text_len));
                    memo.known_bytes += text_len as u64;
                } else {
                    memo.account_block(self.identity, None);
                    let was = self.before(model);
                    if self.keep(model, memo, before, &stretch, &was, block).is_none() {
                        memo.give_up(&stretch);
                    }
                }
            }
        }
        // What is left of it, which may be nothing.
        self.accounts.flush(model, &mut self.gathered, block, at_end);
    }

    /// Takes what was gathered for what it came to.
    fn pass_block(&mut self, model: &UnitModel, known: &Known, seldom: &Seldom, after: &State) {
        let Self { gathered, accounts, .. } = self;
        if known.is_above() {
            accounts.follow(&seldom.costs, known.len(), seldom.above, |i| gathered.source(i));
        }
        accounts.pass(model, known, seldom);
        accounts.state.go_on_as(after, gathered.text());
        (gathered.len, gathered.used) = (0, 0);
    }

    /// What the accounts are before a stretch that is to be kept.
    fn before(&mut self, model: &UnitModel) -> Before {
        let Accounts { scores, field_cost, field_bytes, state, .. } = &mut self.accounts;
        let plain = model.coder.plain_before(state);
        let path = state.tracker().path();
        state.tracker().watch_path();
        Before { scores: *scores, field: (*field_cost, *field_bytes), plain, path }
    }

    /// Scores what was gathered, which is the stretch, and keeps what it came to; the state behind it, if it is at
    /// rest there.
    fn keep(
        &mut self,
        model: &UnitModel,
        memo: &mut Memo,
        before: StateId,
        stretch: &Stretch,
        was: &Before,
        block: &mut Block,
    ) -> Option<StateId> {
        let (text, last) = (stretch.text.bytes(), stretch.text.is_last());
        self.accounts.flush(model, &mut self.gathered, block, last);
        let words = Passage::of(&model.vocabulary, text, last)?;
        let epoch = memo.epoch;
        let after = memo.state_id(self.identity, &self.accounts.state);
        let tracker = self.accounts.state.tracker();
        let (path, path_used) = (tracker.path(), tracker.path_used());
        let Accounts { scores, field_cost, field_bytes, reference, .. } = &self.accounts;
        let small = |sum: u64| u32::try_from(sum).ok();
        let ended = Accounts::ended(model, block)?;
        let (cost_before, bytes_before) = if ended.is_some() { (0, 0) } else { was.field };
        let sums = Sums {
            cost: small(scores.cost - was.scores.cost)?,
            peak_sum: small(scores.peak_sum - was.scores.peak_sum)?,
            ended,
            field_cost: small(field_cost - cost_before)?,
            field_bytes: u8::try_from(field_bytes - bytes_before).ok()?,
        };
        if memo.epoch == epoch {
            let plain = block.looked_back().then_some(was.plain);
            let also = Also { plain, path: path_used.then_some((was.path, path)) };
            let (costs, len) = block.windows().next()?;
            let seldom = Seldom { also, above: above(costs, len, *reference), costs: *costs };
            memo.keep(stretch, Known::new(before, after, stretch.text, sums, words, &seldom), seldom);
        }
        Some(after)
    }
}

/// The accounts before a stretch.
struct Before {
    scores: UnitScores,
    /// Cost and bytes of the field under way.
    field: (u64, u64),
    /// The plain state, and the path.
    plain: u32,
    path: u32,
}

/// Shorter texts are scored as they are.
const WORTH_A_LOOK: usize = 48;

impl Accounts {
    fn new(model: &UnitModel) -> Self {
        let expected = (model.expected.all.mean / UNITS_PER_BIT).min(MAX_COST.into());
        Self {
            state: model.coder.start(),
            reference: expected + EXCESS_MARGIN,
            scores: UnitScores::default(),
            words: WordTracker::default(),
            field_cost: 0,
            field_bytes: 0,
            current: ExcessSpan::default(),
            height: 0,
            running_cost: 0,
        }
    }

    fn gather(&mut self, model: &UnitModel, gathered: &mut Gathered, piece: &Piece<'_>, block: &mut Block) {
        self.scores.source_bytes += piece.source_len;
        let mut done = 0;
        while done < piece.text.len() {
            done += gathered.take(piece, done);
            if done < piece.text.len() || gathered.len == BLOCK_BYTES {
                self.flush(model, gathered, block, false);
            }
        }
        if let Some(len) = blob(piece) {
            self.flush(model, gathered, block, false);
            self.pass_blob(len, piece);
        }
    }

    /// A blob of so many bytes, behind its marker.
    fn pass_blob(&mut self, len: u64, piece: &Piece<'_>) {
        let cost = len * u64::from(BLOB_BYTE_COST);
        self.scores.bytes += len;
        self.scores.cost += cost;
        self.field_bytes += len;
        self.field_cost += cost;
        // Each of its bytes moves the CUSUM by as much, up or down.
        if self.height == 0 {
            self.running_cost = 0;
            (self.current.start, self.current.body_start) = (piece.offset, piece.body_start);
        }
        self.running_cost += cost;
        self.height = (self.height + cost).saturating_sub(len * u64::from(self.reference));
        if self.height > self.current.excess {
            (self.current.excess, self.current.cost) = (self.height, self.running_cost);
            (self.current.end, self.current.body_end) = (piece.offset + piece.source_len, piece.body_end);
        }
        if self.height == 0 {
            self.keep_current();
        }
    }

    /// Scores what was gathered; `at_end` says that nothing follows.
    fn flush(&mut self, model: &UnitModel, gathered: &mut Gathered, block: &mut Block, at_end: bool) {
        let text = gathered.text();
        self.words.push(&model.vocabulary, text, at_end);
        if text.is_empty() {
            return;
        }
        model.coder.cost_block(&mut self.state, text, block);
        self.scores.peak_sum += block.peak_sum();
        self.scores.bytes += text.len() as u64;
        let mut start = 0;
        for segment in block.segments() {
            let costs = block.costs().get(start..segment.end).unwrap_or_default();
            let cost = sum(costs);
            self.scores.cost += u64::from(cost);
            self.field_cost += u64::from(cost);
            self.field_bytes += costs.len() as u64;
            if segment.complete {
                self.end_field(model, segment.field);
            }
            start = segment.end;
        }
        for ((costs, len), at) in block.windows().zip((0..).step_by(WINDOW)) {
            self.follow(costs, len, above(costs, len, self.reference), |i| gathered.source(at + i));
        }
        (gathered.len, gathered.used) = (0, 0);
    }

    #[inline(always)]
    fn end_field(&mut self, model: &UnitModel, field: Option<FieldNumber>) {
        let moments = model.expected.of(field);
        let expected = self.field_bytes * u64::from(moments.mean) / u64::from(UNITS_PER_BIT);
        // 1/256 bit; its square is in 1/65536 as the variance is.
        let excess = self.field_cost.saturating_sub(expected);
        if excess > 0 {
            let variance =
                u64::from(moments.variance).saturating_mul(self.field_bytes).saturating_add(8 << 16);
            let squared = if excess < 1 << 28 {
                excess * excess * 256 / variance
            } else {
                (u128::from(excess) * u128::from(excess) * 256 / u128::from(variance)).min(1 << 48) as u64
            };
            self.scores.field_sum = self.scores.field_sum.saturating_add(squared.min(1 << 48));
        }
        (self.field_cost, self.field_bytes) = (0, 0);
    }

    /// The fields that end in a block of one stretch, if any does; nothing if they came to more than is kept.
    fn ended(model: &UnitModel, block: &Block) -> Option<Option<Ended>> {
        let mut segments = block.segments();
        let (mut cost, mut start) = (0, 0);
        let first = segments.by_ref().find(|segment| {
            cost += sum(block.costs().get(start..segment.end).unwrap_or_default());
            start = segment.end;
            segment.complete
        });
        let Some(first) = first else { return Some(None) };
        let bytes = u8::try_from(first.end).ok()?;
        let mut others = Self::new(model);
        for segment in segments {
            let costs = block.costs().get(start..segment.end).unwrap_or_default();
            others.field_cost += u64::from(sum(costs));
            others.field_bytes += costs.len() as u64;
            if segment.complete {
                others.end_field(model, segment.field);
            }
            start = segment.end;
        }
        let others = u32::try_from(others.scores.field_sum).ok()?;
        Some(Some(Ended { cost, bytes, field: first.field, others }))
    }

    fn end(&mut self, model: &UnitModel) {
        if self.scores.bytes == 0 {
            return;
        }
        if let Some(cost) = model.coder.end_cost(&self.state) {
            self.scores.cost += u64::from(cost);
            self.scores.peak_sum += peak_weight(cost);
            self.scores.bytes += 1;
            self.field_cost += u64::from(cost);
            self.field_bytes += 1;
        }
        self.end_field(model, self.state.field());
        self.scores.words = self.words.tally();
        self.keep_current();
    }

    /// As [`Self::flush`] of a stretch that came to this in this state, but for the state.
    #[inline(always)]
    fn pass(&mut self, model: &UnitModel, known: &Known, seldom: &Seldom) {
        let Sums { cost, peak_sum, ended, field_cost, field_bytes } = known.sums();
        let (cost, bytes) = (u64::from(cost), known.len() as u64);
        self.scores.bytes += bytes;
        self.scores.cost += cost;
        self.scores.peak_sum += u64::from(peak_sum);
        if let Some(Ended { cost, bytes, field, others }) = ended {
            self.field_cost += u64::from(cost);
            self.field_bytes += u64::from(bytes);
            self.end_field(model, field);
            self.scores.field_sum = self.scores.field_sum.saturating_add(others.into());
        }
        self.field_cost += u64::from(field_cost);
        self.field_bytes += u64::from(field_bytes);
        if known.asks_more()
            && let Some((_, path)) = seldom.also.path
        {
            self.state.tracker().set_path(path);
        }
        self.words.pass(&model.vocabulary, &known.words);
        if self.height > 0 && !known.is_above() {
            // No byte costs more than the reference: the CUSUM only falls.
            self.height = (self.height + cost).saturating_sub(bytes * u64::from(self.reference));
            self.running_cost += cost;
            if self.height == 0 {
                self.keep_current();
            }
        }
    }

    /// Follows the CUSUM over the costs of the known stretch of `len` bytes at `source`'s `at`, which comes next.
    #[inline(never)]
    fn pass_spans(&mut self, seldom: &Seldom, len: usize, source: Sourced<'_>, at: usize) {
        let begins = self.scores.source_bytes;
        self.follow(&seldom.costs, len, seldom.above, |i| {
            let (start, body_start) = (begins + i as u64, source.body(at + i));
            Source { start, end: start + 1, body_start, body_end: body_start + 1 }
        });
    }

    /// Follows the CUSUM over the first `len` costs, of bytes that come from there; those above the reference
    /// are set in `above`. Between them it only falls, and along them it only rises: it is looked at where one
    /// turns to the other.
    #[inline(always)]
    fn follow(
        &mut self,
        costs: &[u16; WINDOW],
        len: usize,
        mut above: u64,
        source: impl Fn(usize) -> Source,
    ) {
        if above == 0 && self.height == 0 {
            return;
        }
        let mut sums = Sums64 { before: [0; WINDOW / 4 + 1], fours: [0; WINDOW / 4] };
        sums.fill(costs, len);
        let reference = self.reference;
        let mut least = self.least();
        let mut excursion =
            Excursion { height: self.height, highest: self.current.excess, start: EARLIER, end: EARLIER };
        let (mut at, mut cost_at) = (0, 0);
        loop {
            let start = (above.trailing_zeros() as usize).min(len);
            let cost_at_start = sums.of(start);
            let fall = u64::from(reference * (start - at) as u32 - (cost_at_start - cost_at));
            let ends = fall >= excursion.height;
            if ends && excursion.highest > least {
                self.note(&excursion, &sums, &source);
                self.keep_current();
                least = self.least();
            }
            if ends {
                excursion = Excursion { height: 0, highest: 0, start, end: start };
            } else {
                excursion.height -= fall;
            }
            if above == 0 {
                break;
            }
            at = start + (!(above >> start)).trailing_zeros() as usize;
            above &= !below(at);
            cost_at = sums.of(at);
            excursion.height += u64::from(cost_at - cost_at_start - reference * (at - start) as u32);
            if excursion.height > excursion.highest {
                (excursion.highest, excursion.end) = (excursion.height, at);
            }
        }
        self.height = excursion.height;
        if excursion.height == 0 {
            self.current = ExcessSpan::default();
            return;
        }
        self.note(&excursion, &sums, &source);
        let cost = u64::from(sums.of(len));
        self.running_cost = match excursion.start {
            EARLIER => self.running_cost + cost,
            start => cost - u64::from(sums.of(start)),
        };
    }

    /// An excursion with less is not kept.
    #[inline(always)]
    fn least(&self) -> u64 {
        self.scores.spans.last().map_or(0, |span| span.excess)
    }

    /// Writes down where the excursion began and was highest.
    #[inline(never)]
    fn note(&mut self, excursion: &Excursion, sums: &Sums64, source: &impl Fn(usize) -> Source) {
        let &Excursion { highest, start, end, .. } = excursion;
        if start != EARLIER {
            let source = source(start);
            (self.current.start, self.current.body_start) = (source.start, source.body_start);
        }
        if end != EARLIER {
            let source = source(end - 1);
            (self.current.end, self.current.body_end) = (source.end, source.body_end);
            let cost = u64::from(sums.of(end));
            self.current.excess = highest;
            self.current.cost = match start {
                EARLIER => self.running_cost + cost,
                _ => cost - u64::from(sums.of(start)),
            };
        }
    }

    /// Files the finished excursion among the largest; an earlier one wins a tie.
    fn keep_current(&mut self) {
        let mut span = core::mem::take(&mut self.current);
        for slot in &mut self.scores.spans {
            if span.excess > slot.excess {
                core::mem::swap(slot, &mut span);
            }
        }
    }
}

/// An excursion of the CUSUM above zero, in a window.
struct Excursion {
    height: u64,
    highest: u64,
    /// Its first byte, and the one behind that where it was highest; or [`EARLIER`].
    start: usize,
    end: usize,
}

/// Before the window.
const EARLIER: usize = usize::MAX;

/// Sums of a window's costs, by fours: of all before them; and of those before each of them, in 16 bits.
struct Sums64 {
    before: [u32; WINDOW / 4 + 1],
    fours: [u64; WINDOW / 4],
}

impl Sums64 {
    #[inline(always)]
    fn fill(&mut self, costs: &[u16; WINDOW], len: usize) {
        let (mut sum, fours) = (0, costs.as_chunks().0);
        for ((&[a, b, c, d], four), before) in
            fours.iter().zip(&mut self.fours).zip(self.before.iter_mut().skip(1)).take(len.div_ceil(4))
        {
            // Costs have 14 bits.
            let packed = u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48;
            let running = packed.wrapping_mul(0x0001_0001_0001_0001);
            *four = running << 16;
            sum += (running >> 48) as u32;
            *before = sum;
        }
    }

    /// Of the first `n`.
    #[inline(always)]
    fn of(&self, n: usize) -> u32 {
        let before = self.before.get(n / 4).copied().unwrap_or_default();
        let four = self.fours.get(n / 4).copied().unwrap_or_default();
        before + (four >> (16 * (n % 4)) & 0xffff) as u32
    }
}

/// Which of the first `len` costs are above the reference, as bits.
#[inline(always)]
fn above(costs: &[u16; WINDOW], len: usize, reference: u32) -> u64 {
    let reference = i16x8::splat(i16::try_from(reference).unwrap_or(i16::MAX));
    let mut bits = 0;
    for (eight, i) in costs.as_chunks::<8>().0.iter().take(len.div_ceil(8)).zip(0u32..) {
        // Costs have 14 bits.
        let above = i16x8::new(eight.map(|cost| cost as i16)).simd_gt(reference);
        bits |= u64::from(above.to_bitmask() & 0xff) << (8 * i);
    }
    bits & below(len)
}

/// The sum of a few costs.
#[inline(always)]
fn sum(costs: &[u16]) -> u32 {
    let (eights, rest) = costs.as_chunks::<8>();
    let mut sums = i32x4::ZERO;
    for eight in eights {
        // Costs have 14 bits.
        sums += i16x8::new(eight.map(|cost| cost as i16)).dot(i16x8::splat(1));
    }
    let mut sum = sums.reduce_add() as u32;
    for &cost in rest {
        sum += u32::from(cost);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coder::Counts;
    use crate::normalise::DEFAULT_NORMALISED;
    use crate::words::WordSet;
    use proptest::prelude::*;
    use std::string::String;
    use std::vec::Vec;

    fn model(normalised: ClassSet) -> UnitModel {
        let (mut counts, mut words) = (Counts::new(1 << 16), WordSet::new(1 << 12));
        let unit = |i: u32| {
            let text = std::format!("order {} of customer {} is on its way", i * 37 % 100, i);
            if i.is_multiple_of(3) { std::format!("GET /orders?id={i}&note={text}") } else { text }
        };
        for i in 0..120 {
            counts.train(unit(i).as_bytes());
            words.train(unit(i).as_bytes());
        }
        let (coder, vocabulary) = (counts.freeze(1 << 20), words.freeze(1 << 16));
        let mut model = UnitModel { normalised, coder, vocabulary, expected: Expected::default() };
        let held_out: Vec<Vec<u8>> = (120..160).map(|i| unit(i).into_bytes()).collect();
        model.expect(held_out.iter().map(|unit| &unit[..]));
        model
    }

    /// Scored anew.
    fn score(model: &UnitModel, text: &[u8], cuts: &[usize], body: u64) -> UnitScores {
        let mut scratch = Scratch::default();
        scratch.score_anew();
        score_in(model, text, cuts, body, &mut scratch)
    }

    fn score_in(
        model: &UnitModel,
        text: &[u8],
        cuts: &[usize],
        body: u64,
        scratch: &mut Scratch,
    ) -> UnitScores {
        let mut cuts: Vec<usize> = cuts.iter().map(|&c| c.min(text.len())).chain([0, text.len()]).collect();
        cuts.sort_unstable();
        let mut scorer = UnitScorer::new(model);
        for pair in cuts.windows(2) {
            scorer.push(model, &text[pair[0]..pair[1]], body + pair[0] as u64, scratch);
        }
        scorer.finish(model, scratch)
    }

    /// All maximal excursions of the CUSUM by the textbook recurrence, largest first.
    fn oracle(costs: &[u16], reference: i64) -> Vec<(u64, u64, u64, u64)> {
        let mut all = Vec::new();
        let (mut height, mut start, mut cost, mut best) = (0i64, 0u64, 0u64, (0i64, 0u64, 0u64));
        for (i, &c) in costs.iter().enumerate() {
            if height == 0 {
                if best.0 > 0 {
                    all.push((best.0 as u64, start, best.1, best.2));
                }
                (start, cost, best) = (i as u64, 0, (0, 0, 0));
            }
            height = (height + i64::from(c) - reference).max(0);
            cost += u64::from(c);
            if height > best.0 {
                best = (height, i as u64 + 1, cost);
            }
        }
        if best.0 > 0 {
            all.push((best.0 as u64, start, best.1, best.2));
        }
        all.sort_by_key(|s| core::cmp::Reverse(s.0));
        all
    }

    proptest! {
        #[test]
        fn scores_are_the_oracles_and_every_split_agrees(
            head in prop::sample::select(std::vec!["", "GET /orders?id=", "note="]),
            unit in prop::collection::vec(prop::sample::select(b"order 0123456789 of <'=&>".to_vec()), 0..700),
            cuts in prop::collection::vec(0usize..700, 0..8),
        ) {
            let model = model(ClassSet::NONE);
            let unit = [head.as_bytes(), &unit].concat();
            let whole = score(&model, &unit, &[], 1000);
            prop_assert_eq!(whole, score(&model, &unit, &cuts, 1000));
            let bytewise: Vec<usize> = (0..unit.len()).collect();
            prop_assert_eq!(whole, score(&model, &unit, &bytewise, 1000));
            if unit.is_empty() {
                prop_assert_eq!(whole, UnitScores::default());
                return Ok(());
            }

            let costs = model.coder.costs(&unit);
            let (mut state, mut block) = (model.coder.start(), Block::default());
            // By field: its number, cost and bytes.
            let mut fields: Vec<(Option<FieldNumber>, f64, f64)> = Vec::new();
            let mut goes_on = false;
            for chunk in unit.chunks(BLOCK_BYTES) {
                model.coder.cost_block(&mut state, chunk, &mut block);
                let mut start = 0;
                for segment in block.segments() {
                    let cost: f64 = block.costs()[start..segment.end].iter().map(|&c| f64::from(c) / 256.0).sum();
                    let bytes = (segment.end - start) as f64;
                    match fields.last_mut() {
                        Some(field) if goes_on => { field.1 += cost; field.2 += bytes; }
                        _ => fields.push((segment.field, cost, bytes)),
                    }
                    (start, goes_on) = (segment.end, !segment.complete);
                }
            }
            let end = model.coder.end_cost(&state);
            if let Some(end) = end {
                if !goes_on { fields.push((state.field(), 0.0, 0.0)); }
                let last = fields.last_mut().unwrap();
                last.1 += f64::from(end) / 256.0;
                last.2 += 1.0;
            }
            let costs_with_end: Vec<u16> = costs.iter().copied().chain(end).collect();
            let length = costs_with_end.len() as f64;
            prop_assert_eq!(whole.bytes as f64, length);
            prop_assert_eq!(whole.cost, costs_with_end.iter().map(|&c| u64::from(c)).sum::<u64>());
            // Costs are taken in steps of 1/8 bit, weights in whole numbers.
            let weights = costs_with_end.iter().map(|&c| (f64::from(c / 32) / 16.0).powi(4).round());
            let peak = (1.0 + weights.sum::<f64>()).log2();
            let error = peak - whole.peak() as f64 / 256.0;
            prop_assert!(error.abs() < 0.01, "peak {} against {}", whole.peak(), peak);
            let total: f64 = costs_with_end.iter().map(|&c| f64::from(c) / 256.0).sum();
            let excess = total - 300.0 / 256.0 * length;
            prop_assert!((excess - whole.excess(300 << 8) as f64 / 256.0).abs() < 0.01);
            let squares: f64 = fields.iter().map(|&(field, cost, bytes)| {
                let moments = model.expected.of(field);
                let mean = f64::from(moments.mean) / 65536.0;
                let variance = f64::from(moments.variance) / 65536.0;
                ((cost - mean * bytes) / (variance * bytes + 8.0).sqrt()).max(0.0).powi(2)
            }).sum();
            let field_view = (1.0 + squares).log2();
            prop_assert!((field_view - whole.fields() as f64 / 256.0).abs() < 0.05, "{field_view} {}", whole.fields());

            let reference = i64::from(model.expected.all.mean >> 8) + i64::from(EXCESS_MARGIN);
            let spans = oracle(&costs, reference);
            for (i, span) in whole.spans.iter().enumerate() {
                let expected = spans.get(i).copied().unwrap_or_default();
                prop_assert_eq!((span.excess, span.start, span.end, span.cost), expected);
                if span.excess > 0 {
                    prop_assert_eq!((span.body_start, span.body_end), (span.start + 1000, span.end + 1000));
                }
            }
        }
    }

    const PARTS: [&str; 26] = [
        "GET /orders?id=",
        "POST /orders/new HTTP/1.1\r\n",
        "Host: localhost:8080\r\n",
        "\r\n",
        "&note=",
        "order 7 of customer 7 is on its way",
        "name=x&",
        "{\"role\": \"system\", \"content\": \"",
        "\"},",
        "{\"a\":{\"b\":[\"c\",\"d\"",
        "You are a helpful assistant, and you never lie to customers. ",
        "\n",
        "\\",
        "it's ",
        "2026-11-23T10:00:00Z",
        "6f1c9f0e-5b1a-4c58-9f6e-2f1f0b8a7c11",
        "user@example.org ",
        "12-",
        "Content-Length: 159\r\nContent-Type: application/json; charset=utf-8\r\n",
        "%3D",
        "é",
        "日本語日本語日本語日本語日本語日本語日本語日本語日本語日本語",
        "''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''''",
        BLOB,
        "{\"type\":\"image/png;base64\",\"data\":\"iVBORw0KGgoAAAANSUhEUgAAAIAAAACACAYAAADDPmHLAAAABmJLR0QA==\"}",
        "127.0.0.1 - - [23/Nov/2026:10:00:00 +0000] \"GET / HTTP/1.1\" 200 12\n",
    ];

    /// A form that is sent somewhere: which of `PATHS`, and which values of which of `KEYS`.
    fn form(path: usize, id: usize, values: &[(usize, usize)]) -> String {
        const PATHS: [&str; 3] = ["/shop/buy", "/shop/sell", "/members"];
        const KEYS: [&str; 4] = ["delivery_city", "currency", "x", "comment"];
        const VALUES: [&str; 5] = ["amsterdam", "rotterdam", "7", "!", "as+soon+as+you+can"];
        let path = PATHS[path % PATHS.len()];
        let head = std::format!("POST {path}?session={id} HTTP/1.1\r\nHost: localhost:8080\r\n");
        let head = head + "Accept-Language: en\r\nContent-Type: application/x-www-form-urlencoded\r\n";
        let pair = |&(key, value): &(usize, usize)| {
            std::format!("{}={}", KEYS[key % KEYS.len()], VALUES[value % VALUES.len()])
        };
        head + "\r\n" + &values.iter().map(pair).collect::<Vec<_>>().join("&")
    }

    /// Text of parts that come again and again, and some that do not.
    fn repetitive() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            12 => (0..PARTS.len()).prop_map(|i| PARTS[i].as_bytes().to_vec()),
            1 => prop::collection::vec(any::<u8>(), 0..8),
        ];
        let values = prop::collection::vec((0usize..4, 0usize..5), 0..9);
        prop_oneof![
            prop::collection::vec(part, 0..16).prop_map(|parts| parts.concat()),
            (0usize..3, 0usize..30, values)
                .prop_map(|(path, id, values)| form(path, id, &values).into_bytes()),
        ]
    }

    /// A model for which the parts are ordinary; its bytes cost so many bits.
    fn model_of_parts(normalised: ClassSet, mean: u32) -> UnitModel {
        let (mut counts, mut words) = (Counts::new(1 << 18), WordSet::new(1 << 12));
        for i in 0..900 {
            let unit: String = if i % 3 == 0 {
                (0..8).map(|k| PARTS[(i * 7 + k * (i % 5 + 1)) % PARTS.len()]).collect()
            } else {
                // What is sent depends on where to.
                form(i, i % 30, &[(0, i % 2), (1, i + 1), (3, i * i), (2, if i % 3 == 1 { 2 } else { 3 })])
            };
            let unit = crate::baseline::normalise(unit.as_bytes(), normalised);
            counts.train(&unit);
            words.train(&unit);
        }
        let (coder, vocabulary) = (counts.freeze(1 << 20), words.freeze(1 << 16));
        let all = Moments { mean: mean << 16, variance: 4 << 16 };
        // Ordinary bytes, but odd fields.
        let field = Moments { mean: 1 << 15, variance: 4 << 16 };
        let expected = Expected::new(all, field, std::vec![field; coder.fields()]);
        UnitModel { normalised, coder, vocabulary, expected }
    }

    /// To the first many bytes are dear, to the last none.
    fn models() -> &'static [UnitModel; 3] {
        static MODELS: std::sync::OnceLock<[UnitModel; 3]> = std::sync::OnceLock::new();
        let of = |(normalised, mean)| model_of_parts(normalised, mean);
        MODELS.get_or_init(|| [(DEFAULT_NORMALISED, 2), (ClassSet::NONE, 9), (ClassSet::NONE, 28)].map(of))
    }

    /// That a stretch was known depends on much, and little of it decides often.
    fn many() -> ProptestConfig {
        ProptestConfig::with_cases(ProptestConfig::default().cases.max(8000))
    }

    /// Mostly none; else so many that only 3 or 20 are left, and all is forgotten again and again.
    fn fewer_states() -> impl Strategy<Value = usize> {
        prop_oneof![4 => Just(0), 1 => Just(memo::STATES - 20), 1 => Just(memo::STATES - 3)]
    }

    proptest! {
        #![proptest_config(many())]
        #[test]
        fn what_was_scored_before_changes_no_score(
            texts in prop::collection::vec((repetitive(), prop::collection::vec(0usize..400, 0..3)), 1..8),
            order in prop::collection::vec((0usize..8, 0usize..3), 1..40),
            fewer_states in fewer_states(),
        ) {
            let models = models();
            let mut scratch = Scratch::default();
            scratch.memo.fewer_states = fewer_states;
            for (i, other) in order {
                let (text, cuts) = &texts[i % texts.len()];
                let model = &models[other];
                let scores = score_in(model, text, cuts, 1000, &mut scratch);
                prop_assert_eq!(scores, score(model, text, &[], 1000));
            }
        }
    }

    proptest! {
        #![proptest_config(many())]
        #[test]
        fn what_waits_for_more_is_scored_as_what_does_not(
            texts in prop::collection::vec((repetitive(), prop::collection::vec((0usize..400, 0u64..3), 0..90)), 1..6),
            order in prop::collection::vec(0usize..6, 1..20),
            fewer_states in fewer_states(),
        ) {
            let models = models();
            let (mut scratch, mut other_scratch) = (Scratch::default(), Scratch::default());
            scratch.memo.fewer_states = fewer_states;
            for i in order {
                let (text, cuts) = &texts[i % texts.len()];
                let mut cuts: Vec<(usize, u64)> = cuts.iter().map(|&(at, gap)| (at % (text.len() + 1), gap)).collect();
                cuts.sort_unstable();
                cuts.push((text.len(), 0));
                for model in models {
                    let (mut scorer, mut running) = (UnitScorer::new(model), Running::new(model));
                    let (mut from, mut body) = (0, 100);
                    for &(to, gap) in &cuts {
                        let piece = &text[from..to];
                        scorer.push(model, piece, body, &mut scratch);
                        let part = [Part { at: 0, body }];
                        running.push(model, Sourced::new(piece, &part), &mut other_scratch);
                        (from, body) = (to, body + piece.len() as u64 + gap);
                    }
                    let separate = running.end(model, Sourced::new(b"", &[]), &mut other_scratch);
                    prop_assert_eq!(scorer.finish(model, &mut scratch), separate);
                }
            }
        }
    }

    #[test]
    fn the_same_parameters_behind_others_and_under_other_models() {
        let known = model_of_parts(ClassSet::NONE, 9);
        let wordless = WordSet::new(1 << 12).freeze(1 << 10);
        let moments = Moments { mean: 8 << 16, variance: 1 << 16 };
        let expected = Expected::new(moments, moments, std::vec![moments; known.coder.fields()]);
        let models = [
            UnitModel { vocabulary: wordless, ..known.clone() },
            UnitModel { expected, ..known.clone() },
            known,
        ];
        let mut scratch = Scratch::default();
        for round in 0..4 {
            for (path, key, before) in (0..60).map(|i| (i % 3, i / 3 % 4, i / 12)) {
                let text = form(path, 1, &[(3, before), (key, 0), (1, 1), (0, 4)]);
                for model in &models {
                    let scores = score_in(model, text.as_bytes(), &[], 0, &mut scratch);
                    assert_eq!(scores, score(model, text.as_bytes(), &[], 0), "round {round}: {text}");
                }
            }
        }
    }

    /// A parameter too short to be a stretch, whose value depends on where it is sent: known as a block.
    #[test]
    fn a_short_last_parameter_sent_elsewhere() {
        let model = model_of_parts(ClassSet::NONE, 9);
        let cost = |path, value| score(&model, form(path, 1, &[(0, 0), (2, value)]).as_bytes(), &[], 0).cost;
        assert!(cost(1, 2) < cost(1, 3) && cost(2, 3) < cost(2, 2), "its value depends on the path");
        let mut scratch = Scratch::default();
        for (path, value) in (0..8).flat_map(|_| (1..3).flat_map(|path| [(path, 2), (path, 3)])) {
            let text = form(path, 1, &[(0, 0), (2, value)]);
            let scores = score_in(&model, text.as_bytes(), &[], 0, &mut scratch);
            assert_eq!(scores, score(&model, text.as_bytes(), &[], 0), "{text}");
        }
        // All of it, to the last byte.
        let (known, text) = (scratch.known_bytes(), form(2, 1, &[(0, 0), (2, 3)]));
        score_in(&model, text.as_bytes(), &[], 0, &mut scratch);
        assert_eq!(scratch.known_bytes() - known, text.len() as u64);
    }

    #[test]
    fn what_followed_before_is_not_taken_for_what_follows_now() {
        let models = [28, 9].map(|mean| model_of_parts(ClassSet::NONE, mean));
        let mut scratch = Scratch::default();
        let tails =
            ["", "ada&x=7", "&currency=amsterdam", "+please", "&currency=7&comment=as+soon+as+you+can"];
        for round in 0..12 {
            // One after the other, then each several times over.
            for i in (0..30).map(|i| if round % 2 == 0 { i } else { i / 3 * 7 }) {
                let (path, tail, model) = (i % 3, tails[i / 3 % tails.len()], &models[usize::from(i > 20)]);
                let text = form(path, 1, &[(0, 0), (1, 1), (3, 4)]) + tail;
                let part = [Part { at: 0, body: 0 }];
                let mut running = Running::new(model);
                let (front, back) = text.split_at(text.len() - tail.len());
                running.push(model, Sourced::new(front.as_bytes(), &part), &mut scratch);
                let scores = running.end(model, Sourced::new(back.as_bytes(), &part), &mut scratch);
                let spans = scores.spans;
                assert_eq!(UnitScores { spans, ..score(model, text.as_bytes(), &[], 0) }, scores, "{text}");
                for cuts in [&[][..], &[text.len() - tail.len()]] {
                    let scores = score_in(model, text.as_bytes(), cuts, 0, &mut scratch);
                    assert_eq!(scores, score(model, text.as_bytes(), &[], 0), "round {round}: {text}");
                }
            }
        }
    }

    #[test]
    fn text_that_comes_again_is_looked_up() {
        let model = model_of_parts(DEFAULT_NORMALISED, 2);
        let mut scratch = Scratch::default();
        let mut len = 0;
        for i in 0..20 {
            let text = form(0, i, &[(0, 0), (1, 1), (2, 2), (3, 4)]);
            len += text.len() as u64;
            score_in(&model, text.as_bytes(), &[], 0, &mut scratch);
        }
        let known = scratch.known_bytes();
        assert!(known * 2 > len, "{known} of {len}");
        let text = form(0, 19, &[(0, 0), (1, 1), (2, 2), (3, 4)]);
        let scores = score_in(&model, text.as_bytes(), &[], 0, &mut scratch);
        assert!(scratch.known_bytes() > known);
        // Switched off: what was kept is gone, and nothing is kept again.
        scratch.score_anew();
        let known = scratch.known_bytes();
        for _ in 0..4 {
            assert_eq!(score_in(&model, text.as_bytes(), &[], 0, &mut scratch), scores);
        }
        assert_eq!(scratch.known_bytes(), known);
    }

    #[test]
    fn a_token_is_scored_as_a_marker_and_every_split_agrees() {
        let text =
            "order 6f1c9f0e-5b1a-4c58-9f6e-2f1f0b8a7c11 of <script> 2026-11-23T10:00:00Z customer".as_bytes();
        let (with, without) = (model(ClassSet::VOLATILE), model(ClassSet::NONE));
        let whole = score(&with, text, &[], 50);
        assert_eq!(whole.source_bytes, text.len() as u64);
        assert_eq!(whole.bytes, text.len() as u64 - (36 - 3) - (20 - 3));
        assert!(whole.cost * 2 < score(&without, text, &[], 50).cost);
        for cut in 1..text.len() {
            assert_eq!(score(&with, text, &[cut], 50), whole, "cut at {cut}");
        }
        // Offsets are those of the text, not of the markers.
        let script = 46..54usize;
        assert_eq!(&text[script.clone()], b"<script>");
        let near = whole.spans.iter().find(|s| s.start <= script.start as u64 && s.end >= script.end as u64);
        assert!(near.is_some_and(|span| span.body_start == span.start + 50), "{:?}", whole.spans);
    }

    const BLOB: &str = "CpEDARFNMg9f55m3HJzuM30qcMb2V9VcMUqD7t0PEm2m5p8ofBgKU9UmaXUWjiTBEEbVNtS5dmGOpcgnLOKj2t06X3K/1GfSAHb5K3hRaj5iM";

    #[test]
    fn a_blob_costs_its_bytes_and_every_split_agrees() {
        let model = model(ClassSet::VOLATILE);
        let familiar = Moments { mean: 6 << 16, variance: 1 << 16 };
        let expected = Expected::new(familiar, familiar, std::vec![familiar; model.coder.fields()]);
        let used_to = UnitModel { expected, ..model.clone() };
        let short = &BLOB[50..90];
        let two = std::format!("order {BLOB} of customer 7 {short} is ';DROP TABLE-- on its way");
        for (text, blobs) in [(two, 2), (std::format!("order 7 {BLOB} of customer 7 is on its way"), 1)] {
            let whole = score(&model, text.as_bytes(), &[], 50);
            assert_eq!(whole.source_bytes, text.len() as u64);
            assert_eq!(whole.bytes, text.len() as u64 + blobs * 3, "their markers are paid beside them");
            let mut costs: Vec<u16> = Vec::new();
            model.walk(text.as_bytes(), &mut |step| match step {
                Step::Costs { block, .. } => costs.extend(block.costs()),
                Step::Blob { len, .. } => costs.extend((0..len).map(|_| BLOB_BYTE_COST as u16)),
            });
            assert_eq!(costs.iter().map(|&cost| u64::from(cost)).sum::<u64>(), whole.cost);
            for cut in 1..text.len() {
                assert_eq!(score(&model, text.as_bytes(), &[cut], 50), whole, "cut at {cut}");
            }
            // To the one a blob is excess, to the other not.
            for model in [&model, &used_to] {
                let reference = model.expected.all.mean / UNITS_PER_BIT + EXCESS_MARGIN;
                let spans = score(model, text.as_bytes(), &[], 50).spans;
                for (span, (excess, _, _, cost)) in spans.iter().zip(oracle(&costs, reference.into())) {
                    assert_eq!((span.excess, span.cost), (excess, cost));
                    assert_eq!((span.body_start, span.body_end), (span.start + 50, span.end + 50));
                }
            }
        }
        // Where its marker is familiar an excursion begins with it.
        let (mut counts, words) = (Counts::new(1 << 16), WordSet::new(1 << 12).freeze(1 << 10));
        let text = std::format!("order {BLOB} is on its way");
        (0..40).for_each(|_| counts.train(&crate::baseline::normalise(text.as_bytes(), ClassSet::VOLATILE)));
        let (normalised, coder) = (ClassSet::VOLATILE, counts.freeze(1 << 20));
        let cheap = Moments { mean: 1 << 16, variance: 1 << 16 };
        let expected = Expected::new(cheap, cheap, std::vec![cheap; coder.fields()]);
        let used_to_its_place = UnitModel { normalised, coder, vocabulary: words, expected };
        let span = score(&used_to_its_place, text.as_bytes(), &[], 50).spans[0];
        assert_eq!((span.start, span.end), (6, 6 + BLOB.len() as u64));
        assert_eq!((span.body_start, span.body_end), (56, 56 + BLOB.len() as u64));
        // Its bytes are its field's.
        let in_field = std::format!("GET /orders?id={BLOB}");
        let odd = |model| score(model, in_field.as_bytes(), &[], 0).fields();
        assert!(odd(&model) > odd(&used_to) + 3 * 256, "{} {}", odd(&model), odd(&used_to));
    }

    #[test]
    fn the_largest_span_is_where_the_odd_text_is() {
        let text = b"order 12 of customer 7 ';DROP TABLE-- is on its way";
        let span = score(&model(ClassSet::NONE), text, &[], 0).spans[0];
        let found = &text[span.start as usize..span.end as usize];
        assert!(found.windows(10).any(|w| w == b"DROP TABLE"), "{:?}", core::str::from_utf8(found));
    }

    #[test]
    fn words_are_counted() {
        let model = model(ClassSet::NONE);
        let words = score(&model, b"customer order of zebras", &[], 0).words;
        assert_eq!((words.words, words.new_words), (4, 1));
        assert_eq!(words.new_pairs, 1, "customer order");
    }

    #[test]
    fn a_running_score_is_small() {
        assert!(size_of::<UnitScorer>() <= 4 << 10, "{}", size_of::<UnitScorer>());
    }
}
