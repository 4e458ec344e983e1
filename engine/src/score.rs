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
    state: State,
    /// Expected cost of a byte plus the margin, 1/256 bit.
    reference: u32,
    bytes: u64,
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
    /// Bytes scored.
    pub bytes: u64,
    /// Code length C(x|B), 1/256 bit.
    pub cost: u64,
    /// Sum of 2^(c/4) over the bytes' costs c, in 1/256.
    pub peak_sum: u64,
    /// Spans by falling excess; unused ones have no excess.
    pub spans: [ExcessSpan; MAX_SPANS],
}

impl UnitScores {
    /// Mean code length of a byte, in 1/65536 bit; 0 for an empty unit.
    pub fn mean_cost(&self) -> u64 {
        (self.cost * u64::from(UNITS_PER_BIT)).checked_div(self.bytes).unwrap_or(0)
    }

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
    /// `expected`: the calibrated mean cost of a byte, 1/65536 bit.
    pub fn new(expected: u64) -> Self {
        Self {
            state: State::default(),
            reference: (expected / u64::from(UNITS_PER_BIT)).min(u64::from(MAX_COST)) as u32 + EXCESS_MARGIN,
            bytes: 0,
            cost: 0,
            current: ExcessSpan::default(),
            height: 0,
            running_cost: 0,
            spans: [ExcessSpan::default(); MAX_SPANS],
            peak_sum: 0,
        }
    }

    /// Scores the unit's next bytes. `body_offset` is where `text` stands in the message body; a
    /// stretch without escapes advances one for one.
    pub fn push(&mut self, model: &ContextModel, text: &[u8], body_offset: u64) {
        let mut state = self.state;
        for (i, &byte) in text.iter().enumerate() {
            let cost = model.step(&mut state, byte);
            self.account(cost, body_offset + i as u64);
        }
        self.state = state;
    }

    /// Bytes scored so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    #[inline(always)]
    fn account(&mut self, cost: u16, body_offset: u64) {
        let wide = u64::from(cost);
        self.cost += wide;
        if self.height == 0 {
            if cost as u32 > self.reference {
                self.keep_current();
                self.current =
                    ExcessSpan { start: self.bytes, body_start: body_offset, ..Default::default() };
                self.running_cost = 0;
                self.rise(wide, body_offset);
            }
        } else {
            self.rise(wide, body_offset);
        }
        let weight = PEAK_WEIGHTS.get(usize::from(cost) >> PEAK_SHIFT).copied().unwrap_or(u32::MAX);
        self.peak_sum += u64::from(weight);
        self.bytes += 1;
    }

    #[inline(always)]
    fn rise(&mut self, cost: u64, body_offset: u64) {
        self.running_cost += cost;
        self.height = (self.height + cost).saturating_sub(u64::from(self.reference));
        if self.height > self.current.excess {
            self.current.excess = self.height;
            self.current.cost = self.running_cost;
            self.current.end = self.bytes + 1;
            self.current.body_end = body_offset + 1;
        }
    }

    /// Files the finished excursion among the largest; an earlier one wins a tie.
    fn keep_current(&mut self) {
        insert_span(&mut self.spans, self.current);
        self.current = ExcessSpan::default();
    }

    /// The scores of what has been pushed.
    pub fn finish(mut self) -> UnitScores {
        self.keep_current();
        UnitScores { bytes: self.bytes, cost: self.cost, peak_sum: self.peak_sum, spans: self.spans }
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
            let mut whole = UnitScorer::new(300 << 8);
            whole.push(&model, &unit, 1000);
            let whole = whole.finish();

            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(unit.len())).chain([0, unit.len()]).collect();
            cuts.sort_unstable();
            let mut split = UnitScorer::new(300 << 8);
            for pair in cuts.windows(2) {
                split.push(&model, &unit[pair[0]..pair[1]], 1000 + pair[0] as u64);
            }
            prop_assert_eq!(whole, split.finish());

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
    fn the_largest_span_is_where_the_odd_text_is() {
        let model = model();
        let text = b"order 12 of customer 7 ';DROP TABLE-- is on its way";
        let mut scorer = UnitScorer::new(300 << 8);
        scorer.push(&model, text, 0);
        let span = scorer.finish().spans[0];
        let found = &text[span.start as usize..span.end as usize];
        assert!(found.windows(10).any(|w| w == b"DROP TABLE"), "{:?}", core::str::from_utf8(found));
    }

    #[test]
    fn a_running_score_is_small() {
        assert!(core::mem::size_of::<UnitScorer>() <= 512);
    }
}
