//! Scores of a unit: the same for every split, whichever classes of token are normalised; without
//! normalisation the sums over the costs of its bytes.

use driftlock_engine::coder::{Block, Counts};
use driftlock_engine::normalise::ClassSet;
use driftlock_engine::score::{Expected, Moments, Scratch, UnitModel, UnitScorer};
use driftlock_engine::words::WordSet;

use crate::input::{Input, classes_of};

/// See the module.
pub fn holds(data: &[u8]) {
    let mut input = Input::new(data);
    let mut moments = || Moments { mean: (input.u16() as u32) << 4, variance: (input.u16() as u32) << 8 };
    let (all, text) = (moments(), moments());
    let input_classes = input.u16() as u32;
    let cuts = input.cuts();
    let len = usize::from(input.byte());
    let (training, unit) = (input.take(len), input.rest(1 << 12));
    let (mut counts, mut words) = (Counts::new(1 << 16), WordSet::new(1 << 10));
    (0..6).for_each(|_| counts.train(training));
    words.train(training);

    let classes = match input_classes {
        0 => ClassSet::NONE,
        bits => classes_of(bits),
    };
    let coder = counts.freeze(1 << 20);
    let fields = vec![text; coder.fields()];
    let expected = Expected::new(all, text, fields);
    let model = UnitModel { normalised: classes, coder, vocabulary: words.freeze(1 << 12), expected };
    let body_offset = 1 << 40;
    let mut scratch = Scratch::default();
    let mut anew = Scratch::default();
    anew.score_anew();
    let whole = UnitScorer::whole(&model, unit, body_offset, &mut anew);
    for _ in 0..4 {
        // From the third time on what it holds is known.
        let again = UnitScorer::whole(&model, unit, body_offset, &mut scratch);
        assert_eq!(again, whole);
    }
    let mut split = UnitScorer::new(&model);
    for range in cuts.of(unit.len()) {
        let at = body_offset + range.start as u64;
        split.push(&model, &unit[range], at, &mut scratch);
    }
    assert_eq!(split.finish(&model, &mut scratch), whole);

    assert_eq!(whole.source_bytes, unit.len() as u64);
    assert!(whole.words.new_words <= whole.words.words);
    assert!(whole.spans.is_sorted_by(|a, b| a.excess >= b.excess));
    for span in whole.spans.iter().filter(|span| span.excess > 0) {
        assert!(span.start < span.end && span.end <= unit.len() as u64, "{span:?}");
        assert_eq!((span.body_start, span.body_end), (span.start + body_offset, span.end + body_offset));
        assert!(span.excess <= span.cost && span.cost <= whole.cost);
    }
    if classes == ClassSet::NONE && !unit.is_empty() {
        let costs = model.coder.costs(unit);
        let cost_of = |costs: &[u16]| costs.iter().map(|&cost| u64::from(cost)).sum::<u64>();
        let (mut state, mut block) = (model.coder.start(), Block::default());
        for byte in unit {
            model.coder.cost_block(&mut state, core::slice::from_ref(byte), &mut block);
        }
        let end = model.coder.end_cost(&state);
        assert_eq!(whole.bytes, unit.len() as u64 + u64::from(end.is_some()));
        assert_eq!(whole.cost, cost_of(&costs) + u64::from(end.unwrap_or(0)));
        for span in whole.spans.iter().filter(|span| span.excess > 0) {
            assert_eq!(span.cost, cost_of(&costs[span.start as usize..span.end as usize]));
        }
    }
}
