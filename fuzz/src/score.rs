//! Scores of a unit: the same for every split, whichever classes of token are normalised; without
//! normalisation the sums over the costs of its bytes.

use driftlock_engine::coder::Counts;
use driftlock_engine::normalise::ClassSet;
use driftlock_engine::score::UnitScorer;

use crate::input::{Input, classes_of};

/// See the module.
pub fn holds(data: &[u8]) {
    let mut input = Input::new(data);
    let expected = (input.u16() as u64) << (input.byte() % 56);
    let input_classes = input.u16() as u32;
    let cuts = input.cuts();
    let len = usize::from(input.byte());
    let (training, unit) = (input.take(len), input.rest(1 << 12));
    let mut counts = Counts::new(5, 1 << 16);
    counts.train(training);
    let model = counts.freeze(1 << 20);

    let classes = match input_classes {
        0 => ClassSet::NONE,
        bits => classes_of(bits),
    };
    let body_offset = 1 << 40;
    let mut whole = UnitScorer::new(expected, classes);
    whole.push(&model, unit, body_offset);
    let whole = whole.finish(&model);
    let mut split = UnitScorer::new(expected, classes);
    for range in cuts.of(unit.len()) {
        let at = body_offset + range.start as u64;
        split.push(&model, &unit[range], at);
    }
    assert_eq!(split.finish(&model), whole);

    assert_eq!(whole.source_bytes, unit.len() as u64);
    assert!(whole.spans.is_sorted_by(|a, b| a.excess >= b.excess));
    for span in whole.spans.iter().filter(|span| span.excess > 0) {
        assert!(span.start < span.end && span.end <= unit.len() as u64, "{span:?}");
        assert_eq!((span.body_start, span.body_end), (span.start + body_offset, span.end + body_offset));
        assert!(span.excess <= span.cost && span.cost <= whole.cost);
    }
    if classes == ClassSet::NONE {
        let costs = model.costs(unit);
        let cost_of = |costs: &[u16]| costs.iter().map(|&cost| u64::from(cost)).sum::<u64>();
        assert_eq!((whole.bytes, whole.cost), (unit.len() as u64, cost_of(&costs)));
        for span in whole.spans.iter().filter(|span| span.excess > 0) {
            assert_eq!(span.cost, cost_of(&costs[span.start as usize..span.end as usize]));
        }
    }
}
