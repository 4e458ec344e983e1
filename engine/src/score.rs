//! Code lengths to nonconformity scores and spans, byte by byte, in constant memory.
//!
//! What: [`UnitScorer`] runs over a content unit's bytes as they arrive. With L bytes of costs c_i
//! (bits), T = sum c_i and mu the calibrated mean cost of a byte, a unit's scores are
//! - **mean** = T / L, bits per byte: for people;
//! - **standardised** = (T - mu L) / sqrt(L): is the unit as a whole unlike the baseline, whatever its
//!   length? The total of L bytes of ordinary text strays from mu L by about sqrt(L);
//! - **peak** = log2 sum 2^(c_i / 4): a soft maximum of the costs; a few odd bytes in ordinary text
//!   move it though they vanish in the mean;
//! - **largest excess span**: the highest values of a CUSUM (Page 1954) over `cost - mu - margin`.
//!   The stretch from where it left zero to its highest point is the evidence.
//!
//! The decision rests on standardised and peak together (see [`crate::calibrate`]): of some 3,300
//! combinations of cheap statistics tried under the evaluation protocol this was the best with one
//! configuration for all sets; DECISIONS.md has the figures. Spans say where, not whether: on traffic
//! with random tokens the largest excess of every normal message is its token.
//!
//! Cost: one table look-up of the model and about ten integer operations a byte; a [`UnitScorer`] is
//! under 512 bytes, whatever the unit's length. Every split of the bytes into chunks gives the same
//! result, since all of it is sums and one recurrence.
//!
//! Left out on purpose: turning scores into p-values (see [`crate::calibrate`]).

use crate::coder::{ContextModel, MAX_COST, State, UNITS_PER_BIT, log2_fixed};
use crate::normalise::{ClassSet, Normaliser, Piece};

/// How many spans are kept as evidence.
pub const MAX_SPANS: usize = 3;

/// What a byte must cost beyond expectation, in 1/256 bit, before it adds to an excess span.
pub const EXCESS_MARGIN: u32 = 4 * UNITS_PER_BIT;

/// 2^(i/32) in 1/65536.
const POWERS: [u32; 32] = [
    65536, 66971, 68438, 69936, 71468, 73032, 74632, 76266, 77936, 79642, 81386, 83169, 84990, 86851, 88752,
    90696, 92682, 94711, 96785, 98905, 101070, 103283, 105545, 107856, 110218, 112631, 115098, 117618,
    120194, 122825, 125515, 128263,
];

/// 2^(c/4) in 1/256, by cost c in 1/8 bit.
#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a bad index")]
const PEAK_WEIGHTS: [u32; PEAK_STEPS] = {
    let mut weights = [0; PEAK_STEPS];
    let mut k = 0;
    while k < PEAK_STEPS {
        // c/4 bits = k/32; 65536 down to 256 is the shift by 8.
        weights[k] = ((POWERS[k % 32] as u64) << (k / 32) >> 8) as u32;
        k += 1;
    }
    weights
};
const PEAK_STEPS: usize = (MAX_COST as usize >> PEAK_SHIFT) + 1;
/// From 1/256 bit to 1/8 bit.
const PEAK_SHIFT: u32 = 5;

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

/// Running score of one content unit.
#[derive(Clone, Debug)]
pub struct UnitScorer {
    /// Puts markers in the place of volatile tokens.
    normaliser: Normaliser,
    accounts: Accounts,
}

/// The sums behind the scores.
#[derive(Clone, Debug)]
struct Accounts {
    state: State,
    /// Expected cost of a byte plus the margin, 1/256 bit.
    reference: u32,
    bytes: u64,
    source_bytes: u64,
    cost: u64,
    /// The excursion under way: from where the CUSUM last left zero to its highest point so far.
    current: ExcessSpan,
    /// Height of the CUSUM now, and code length since `current.start`.
    height: u64,
    running_cost: u64,
    spans: [ExcessSpan; MAX_SPANS],
    /// Sum of [`PEAK_WEIGHTS`].
    peak_sum: u64,
}

/// The finished scores of a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnitScores {
    /// Bytes scored: those of the normalised text.
    pub bytes: u64,
    /// Bytes of the text itself.
    pub source_bytes: u64,
    /// Code length C(x|B), 1/256 bit.
    pub cost: u64,
    /// Sum of 2^(c/4) over the bytes' costs c, in 1/256.
    pub peak_sum: u64,
    /// Spans by falling excess; unused ones have no excess.
    pub spans: [ExcessSpan; MAX_SPANS],
}

impl UnitScores {
    /// Excess of the largest span, 1/256 bit.
    pub fn max_excess(&self) -> u64 {
        self.spans.first().map_or(0, |span| span.excess)
    }

    /// (T - mu L) / sqrt(L) with `expected` = mu in 1/65536 bit; the result is in 1/256 bit.
    pub fn standardised(&self, expected: u64) -> i64 {
        let excess =
            i128::from(self.cost) * i128::from(UNITS_PER_BIT) - i128::from(expected) * i128::from(self.bytes);
        let root = (u128::from(self.bytes) << 16).isqrt().max(1) as i128;
        (excess / root).clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
    }

    /// log2 sum 2^(c/4), in 1/256 bit; 0 for an empty unit.
    pub fn peak(&self) -> i64 {
        // The sum is in 1/256: 8 bits less.
        i64::from(log2_fixed(self.peak_sum) >> 4).saturating_sub(8 * i64::from(UNITS_PER_BIT)).max(0)
    }
}

impl UnitScorer {
    /// `expected`: the calibrated mean cost of a byte, 1/65536 bit. `normalised`: the classes of token
    /// that markers stand for; those that the model was trained with.
    pub fn new(expected: u64, normalised: ClassSet) -> Self {
        let reference = (expected / u64::from(UNITS_PER_BIT)).min(u64::from(MAX_COST)) as u32 + EXCESS_MARGIN;
        Self {
            normaliser: Normaliser::new(normalised),
            accounts: Accounts {
                state: State::default(),
                reference,
                bytes: 0,
                source_bytes: 0,
                cost: 0,
                current: ExcessSpan::default(),
                height: 0,
                running_cost: 0,
                spans: [ExcessSpan::default(); MAX_SPANS],
                peak_sum: 0,
            },
        }
    }

    /// Scores the unit's next bytes. `body_offset` is where `text` stands in the message body; a
    /// stretch without escapes advances one for one.
    pub fn push(&mut self, model: &ContextModel, text: &[u8], body_offset: u64) {
        let accounts = &mut self.accounts;
        self.normaliser.push(text, body_offset, &mut |piece| accounts.piece(model, piece));
    }

    /// The scores of what has been pushed.
    pub fn finish(self, model: &ContextModel) -> UnitScores {
        let mut accounts = self.accounts;
        self.normaliser.finish(&mut |piece| accounts.piece(model, piece));
        accounts.keep_current();
        UnitScores {
            bytes: accounts.bytes,
            source_bytes: accounts.source_bytes,
            cost: accounts.cost,
            peak_sum: accounts.peak_sum,
            spans: accounts.spans,
        }
    }
}

/// Where one scored byte comes from, in the unit's text and in the body; half open.
#[derive(Clone, Copy)]
struct Source {
    start: u64,
    end: u64,
    body_start: u64,
    body_end: u64,
}

impl Accounts {
    #[inline]
    fn piece(&mut self, model: &ContextModel, piece: Piece<'_>) {
        let mut state = self.state;
        if piece.class.is_none() {
            for (&byte, i) in piece.text.iter().zip(0u64..) {
                let cost = model.step(&mut state, byte);
                let (start, body_start) = (piece.offset + i, piece.body_start + i);
                self.account(cost, Source { start, end: start + 1, body_start, body_end: body_start + 1 });
            }
        } else {
            // Each byte of a marker stands for the whole token.
            let source = Source {
                start: piece.offset,
                end: piece.offset + piece.source_len,
                body_start: piece.body_start,
                body_end: piece.body_end,
            };
            for &byte in piece.text {
                let cost = model.step(&mut state, byte);
                self.account(cost, source);
            }
        }
        self.source_bytes += piece.source_len;
        self.state = state;
    }

    #[inline(always)]
    fn account(&mut self, cost: u16, source: Source) {
        let wide = u64::from(cost);
        self.cost += wide;
        if self.height == 0 {
            if u32::from(cost) > self.reference {
                self.keep_current();
                let (start, body_start) = (source.start, source.body_start);
                self.current = ExcessSpan { start, body_start, ..ExcessSpan::default() };
                self.running_cost = 0;
                self.rise(wide, source);
            }
        } else {
            self.rise(wide, source);
        }
        let weight = PEAK_WEIGHTS.get(usize::from(cost) >> PEAK_SHIFT).copied().unwrap_or(u32::MAX);
        self.peak_sum += u64::from(weight);
        self.bytes += 1;
    }

    #[inline(always)]
    fn rise(&mut self, cost: u64, source: Source) {
        self.running_cost += cost;
        self.height = (self.height + cost).saturating_sub(u64::from(self.reference));
        if self.height > self.current.excess {
            self.current.excess = self.height;
            self.current.cost = self.running_cost;
            self.current.end = source.end;
            self.current.body_end = source.body_end;
        }
    }

    /// Files the finished excursion among the largest; an earlier one wins a tie.
    fn keep_current(&mut self) {
        insert_span(&mut self.spans, self.current);
        self.current = ExcessSpan::default();
    }
}

fn insert_span(spans: &mut [ExcessSpan; MAX_SPANS], mut span: ExcessSpan) {
    for slot in spans {
        if span.excess > slot.excess {
            core::mem::swap(slot, &mut span);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coder::Counts;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn model() -> ContextModel {
        let mut counts = Counts::new(5, 1 << 16);
        for i in 0..40u32 {
            counts.train(std::format!("order {} of customer {} is on its way", i * 37 % 100, i).as_bytes());
        }
        counts.freeze(1 << 20)
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
            unit in prop::collection::vec(prop::sample::select(b"order 0123456789 of <'=>".to_vec()), 0..300),
            cuts in prop::collection::vec(0usize..300, 0..8),
        ) {
            let model = model();
            let mut whole = UnitScorer::new(300 << 8, ClassSet::NONE);
            whole.push(&model, &unit, 1000);
            let whole = whole.finish(&model);

            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(unit.len())).chain([0, unit.len()]).collect();
            cuts.sort_unstable();
            let mut split = UnitScorer::new(300 << 8, ClassSet::NONE);
            for pair in cuts.windows(2) {
                split.push(&model, &unit[pair[0]..pair[1]], 1000 + pair[0] as u64);
            }
            prop_assert_eq!(whole, split.finish(&model));

            let costs = model.costs(&unit);
            prop_assert_eq!(whole.cost, costs.iter().map(|&c| u64::from(c)).sum::<u64>());
            let peak: f64 = costs.iter().map(|&c| (f64::from(c) / 1024.0).exp2()).sum();
            if !unit.is_empty() {
                // Costs are taken in steps of 1/8 bit, so the peak is up to 1/32 low.
                let error = peak.log2() - whole.peak() as f64 / 256.0;
                prop_assert!((-0.01..0.05).contains(&error), "peak {} against {}", whole.peak(), peak.log2());
                let total: f64 = costs.iter().map(|&c| f64::from(c) / 256.0).sum();
                let length = costs.len() as f64;
                let standardised = (total - 300.0 / 256.0 * length) / length.sqrt();
                let error = standardised - whole.standardised(300 << 8) as f64 / 256.0;
                prop_assert!(error.abs() < 0.02 + standardised.abs() / 500.0, "standardised {standardised}");
            }
            let spans = oracle(&costs, 300 + i64::from(EXCESS_MARGIN));
            for (i, span) in whole.spans.iter().enumerate() {
                let expected = spans.get(i).copied().unwrap_or_default();
                prop_assert_eq!((span.excess, span.start, span.end, span.cost), expected);
                if span.excess > 0 {
                    prop_assert_eq!((span.body_start, span.body_end), (span.start + 1000, span.end + 1000));
                }
            }
        }
    }

    #[test]
    fn a_token_is_scored_as_a_marker_and_every_split_agrees() {
        let model = model();
        let text =
            "order 6f1c9f0e-5b1a-4c58-9f6e-2f1f0b8a7c11 of <script> 2026-11-23T10:00:00Z customer".as_bytes();
        let run = |cut: usize, classes| {
            let mut scorer = UnitScorer::new(300 << 8, classes);
            scorer.push(&model, &text[..cut], 50);
            scorer.push(&model, &text[cut..], 50 + cut as u64);
            scorer.finish(&model)
        };
        let whole = run(0, ClassSet::VOLATILE);
        assert_eq!(whole.source_bytes, text.len() as u64);
        assert_eq!(whole.bytes, text.len() as u64 - (36 - 3) - (20 - 3));
        assert!(whole.cost * 2 < run(0, ClassSet::NONE).cost);
        for cut in 1..text.len() {
            assert_eq!(run(cut, ClassSet::VOLATILE), whole, "cut at {cut}");
        }
        // Offsets are those of the text, not of the markers.
        let script = 46..54usize;
        assert_eq!(&text[script.clone()], b"<script>");
        let near = whole.spans.iter().find(|s| s.start <= script.start as u64 && s.end >= script.end as u64);
        assert!(near.is_some_and(|span| span.body_start == span.start + 50), "{:?}", whole.spans);
    }

    #[test]
    fn the_largest_span_is_where_the_odd_text_is() {
        let model = model();
        let text = b"order 12 of customer 7 ';DROP TABLE-- is on its way";
        let mut scorer = UnitScorer::new(300 << 8, ClassSet::NONE);
        scorer.push(&model, text, 0);
        let span = scorer.finish(&model).spans[0];
        let found = &text[span.start as usize..span.end as usize];
        assert!(found.windows(10).any(|w| w == b"DROP TABLE"), "{:?}", core::str::from_utf8(found));
    }

    #[test]
    fn a_running_score_is_small() {
        assert!(core::mem::size_of::<UnitScorer>() <= 768, "{}", core::mem::size_of::<UnitScorer>());
    }
}
