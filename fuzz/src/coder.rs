//! Code lengths: what holds of every model, whatever was trained and however it was pruned.
//!
//! The engine's own tests compare costs with a naive model; here training and units are hostile.

use driftlock_engine::coder::{BLOCK_BYTES, Block, ContextModel, Counts, MAX_COST, State};

use crate::input::Input;

/// See the module.
pub fn holds(data: &[u8]) {
    let mut input = Input::new(data);
    let max_ngrams = usize::from(input.u16() as u16) * 4;
    let max_table_bytes = usize::from(input.u16() as u16) * 16;
    let cuts = input.cuts();
    let training: Vec<&[u8]> = (0..input.byte() % 12).map(|_| unit(&mut input)).collect();
    let test = input.rest(2048);

    let counted = |units: &mut dyn Iterator<Item = &&[u8]>| {
        let mut counts = Counts::new(max_ngrams);
        units.for_each(|unit| (0..5).for_each(|_| counts.train(unit)));
        counts
    };
    let counts = counted(&mut training.iter());
    let complete = counts.overflowed() == 0;
    let model = counts.freeze(max_table_bytes);
    if complete {
        assert_eq!(model, counted(&mut training.iter().rev()).freeze(max_table_bytes), "order matters");
        let (left, right) = training.split_at(training.len() / 2);
        let mut merged = counted(&mut left.iter());
        merged.merge(&counted(&mut right.iter()));
        assert_eq!(model, merged.freeze(max_table_bytes), "merging matters");
    }
    // The smallest table holds the 256 bytes and the fields' first contexts.
    assert!(model.table_bytes() <= max_table_bytes.max(8 << 10), "{} bytes", model.table_bytes());

    for unit in training.iter().copied().chain([test]) {
        let costs = model.costs(unit);
        assert_eq!(costs.len(), unit.len());
        assert!(costs.iter().all(|&cost| cost <= MAX_COST));
        let whole = run(&model, unit, &mut core::iter::once(0..unit.len()));
        assert_eq!(whole.0, costs);
        assert_eq!(whole, run(&model, unit, &mut cuts.of(unit.len())), "the split matters");
        assert!(model.end_cost(&whole.2).is_none_or(|cost| cost <= MAX_COST));
    }
}

fn run(
    model: &ContextModel,
    unit: &[u8],
    ranges: &mut dyn Iterator<Item = core::ops::Range<usize>>,
) -> (Vec<u16>, u64, State) {
    let (mut state, mut block) = (model.start(), Block::default());
    let (mut costs, mut peak_sum) = (Vec::new(), 0);
    for range in ranges {
        for text in unit[range].chunks(BLOCK_BYTES) {
            assert_eq!(model.cost_block(&mut state, text, &mut block), text.len());
            assert_eq!(block.segments().last().map(|segment| segment.end), Some(text.len()));
            costs.extend_from_slice(block.costs());
            peak_sum += block.peak_sum();
        }
    }
    (costs, peak_sum, state)
}

fn unit<'a>(input: &mut Input<'a>) -> &'a [u8] {
    let len = usize::from(input.byte());
    input.take(len)
}
