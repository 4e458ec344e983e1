//! The coder against its definition: an oracle over the kept contexts, every split, every order of training.

use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::context::{Context, END, visit};
use super::freeze::KeptContext;
use super::*;

fn counts(units: &[Vec<u8>]) -> Counts {
    let mut counts = Counts::new(1 << 20);
    units.iter().for_each(|unit| counts.train(unit));
    counts
}

fn model(units: &[Vec<u8>]) -> ContextModel {
    counts(units).freeze(1 << 24)
}

/// Units that share structure: a small alphabet makes contexts repeat, delimiters make fields.
fn units() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let text = prop::collection::vec(prop::sample::select(b"aab=&{\":,\xff ".to_vec()), 0..40);
    let head = prop::sample::select(vec!["", "GET /a?x=", "{\"a\":\"", "k="]);
    let unit = (head, text).prop_map(|(head, text)| [head.as_bytes(), &text].concat());
    prop::collection::vec(unit, 0..12)
}

/// Repeats units, so that some contexts save enough to be kept.
fn often(units: &[Vec<u8>]) -> Vec<Vec<u8>> {
    units.iter().flat_map(|unit| core::iter::repeat_n(unit.clone(), 6)).collect()
}

/// What a byte costs by definition, over the contexts that the model kept: those of the field, then the
/// plain ones, longest first; contexts that were not kept are passed over.
struct Oracle {
    contexts: BTreeMap<Context, (u32, BTreeMap<u16, u32>)>,
}

impl Oracle {
    fn of(kept: &[KeptContext]) -> Self {
        let bits = |code: u8| cost_of(code.into());
        let row = |kept: &KeptContext| {
            let unseen = kept.context == Context::ROOT;
            let mut symbols: BTreeMap<u16, u32> =
                (0..END).filter(|_| unseen).map(|byte| (byte, bits(kept.unseen_code()))).collect();
            symbols.extend(kept.symbols().map(|(symbol, code)| (symbol, bits(code))));
            (kept.context, (bits(kept.escape_code()), symbols))
        };
        Self { contexts: kept.iter().map(row).collect() }
    }

    fn costs(&self, unit: &[u8]) -> (Vec<u16>, Option<u16>) {
        let mut costs = Vec::new();
        let mut end = None;
        visit(unit, |place| {
            let mut spent = 0;
            let own = place.field_contexts().any(|context| self.contexts.contains_key(&context));
            for context in place.field_contexts().chain(place.plain_contexts()) {
                let Some((escape, symbols)) = self.contexts.get(&context) else { continue };
                if let Some(cost) = symbols.get(&place.symbol) {
                    spent += cost;
                    let cost = spent.min(u32::from(MAX_COST)) as u16;
                    if place.symbol == END {
                        end = Some(cost)
                    } else {
                        costs.push(cost)
                    }
                    return;
                }
                spent += escape;
            }
            assert_eq!(place.symbol, END, "the root predicts every byte");
            end = own.then_some((spent + 8 * UNITS_PER_BIT).min(u32::from(MAX_COST)) as u16);
        });
        (costs, end)
    }
}

proptest! {
    #[test]
    fn costs_are_the_oracles(train in units(), test in units()) {
        let (model, kept) = counts(&often(&train)).freeze_and_tell(1 << 24);
        let oracle = Oracle::of(&kept);
        for unit in test.iter().chain(&train) {
            let long = unit.repeat(5);
            for unit in [unit, &long] {
                let (costs, end) = oracle.costs(unit);
                prop_assert_eq!(model.costs(unit), costs);
                let (mut state, mut block) = (model.start(), Block::default());
                unit.chunks(BLOCK_BYTES).for_each(|text| {
                    model.cost_block(&mut state, text, &mut block);
                });
                prop_assert_eq!(model.end_cost(&state), end);
            }
        }
    }

    #[test]
    fn every_split_gives_the_same_costs_and_segments(
        train in units(),
        test in prop::collection::vec(prop::sample::select(b"aab=&{\":,\xff ".to_vec()), 0..900),
        head in prop::sample::select(vec!["", "GET /a?x=", "{\"a\":\"", "k="]),
        cuts in prop::collection::vec(0usize..900, 0..8),
    ) {
        let model = model(&often(&train));
        let test = [head.as_bytes(), &test].concat();
        let run = |cuts: &[usize]| {
            let (mut state, mut block) = (model.start(), Block::default());
            let (mut costs, mut peak, mut fields) = (Vec::new(), 0, Vec::new());
            for pair in cuts.windows(2) {
                let mut text = &test[pair[0]..pair[1]];
                while !text.is_empty() {
                    let done = model.cost_block(&mut state, text, &mut block);
                    let mut start = 0;
                    for segment in block.segments() {
                        fields.extend((start..segment.end).map(|_| (segment.field, false)));
                        fields.last_mut().unwrap().1 = segment.complete;
                        start = segment.end;
                    }
                    assert_eq!(start, done);
                    costs.extend_from_slice(block.costs());
                    peak += block.peak_sum();
                    text = &text[done..];
                }
            }
            (costs, peak, fields, state)
        };
        let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(test.len())).chain([0, test.len()]).collect();
        cuts.sort_unstable();
        let whole = run(&[0, test.len()]);
        prop_assert_eq!(&whole, &run(&cuts));
        prop_assert_eq!(whole.1, whole.0.iter().map(|&cost| peak_weight(cost)).sum::<u64>());
        let bytewise: Vec<usize> = (0..=test.len()).collect();
        prop_assert_eq!(&whole, &run(&bytewise));
    }

    /// What was looked up leads where scoring leads, however short it is.
    #[test]
    fn a_state_goes_on_as_one_that_was_there(train in units(), test in units(), at in 0usize..40) {
        let model = model(&often(&train));
        for unit in &test {
            let (front, back) = unit.split_at(at.min(unit.len()));
            let (mut state, mut block) = (model.start(), Block::default());
            model.cost_block(&mut state, front, &mut block);
            let mut behind = state.clone();
            model.cost_block(&mut behind, back, &mut block);
            state.tracker().set_path(behind.tracker().path());
            state.go_on_as(&behind, back);
            prop_assert_eq!(state, behind);
        }
    }

    #[test]
    fn freezing_depends_neither_on_order_nor_on_who_counted(units in units(), at in 0usize..12) {
        let units = often(&units);
        let whole = counts(&units);
        let mut reversed = units.clone();
        reversed.reverse();
        let (left, right) = units.split_at(at.min(units.len()));
        let mut merged = counts(right);
        merged.merge(&counts(left));
        let frozen = whole.freeze(1 << 24);
        prop_assert_eq!(&frozen, &model(&reversed));
        prop_assert_eq!(&frozen, &merged.freeze(1 << 24));
    }

    #[test]
    fn pruning_keeps_a_proper_model(train in units(), test in units(), limit in 0usize..20_000) {
        let (model, kept) = counts(&often(&train)).freeze_and_tell(limit);
        let oracle = Oracle::of(&kept);
        for unit in &test {
            prop_assert_eq!(model.costs(unit), oracle.costs(unit).0);
        }
    }

    /// Kraft's inequality: what all bytes cost in one place is the code lengths of some code, but for the
    /// rounding of costs.
    #[test]
    fn costs_are_code_lengths(train in units(), before in prop::collection::vec(prop::sample::select(b"aab=&".to_vec()), 0..6)) {
        let model = model(&often(&train));
        let sum: f64 = (0..=255u8)
            .map(|byte| {
                let costs = model.costs(&[&before[..], &[byte]].concat());
                (-f64::from(*costs.last().unwrap()) / 256.0).exp2()
            })
            .sum();
        prop_assert!(sum <= 1.06, "{sum}");
    }
}

#[test]
fn log2_is_right_to_a_thousandth() {
    for x in (1..5000u64).chain([u64::from(u32::MAX), 1 << 40, (1 << 40) + 12345, u64::MAX / 2]) {
        let exact = (x as f64).log2();
        let got = f64::from(log2_fixed(x)) / 4096.0;
        assert!((exact - got).abs() < 1e-3, "log2({x}) = {exact}, got {got}");
    }
}

#[test]
fn a_logarithm_is_that_of_repeated_squaring() {
    let plain = |x: u64| ((63 - x.leading_zeros()) << 12) + log2_by_squaring(x << x.leading_zeros() >> 32);
    let check = |x: u64| assert_eq!(log2_fixed(x), plain(x), "{x}");
    (1..300_000).for_each(check);
    // Where each unit begins, and its neighbours near and far.
    for unit in 0..4096 {
        let (mut low, mut high) = (1u64 << 31, 1u64 << 32);
        while low < high {
            let middle = low.midpoint(high);
            if log2_by_squaring(middle) < unit { low = middle + 1 } else { high = middle }
        }
        for step in (0..20).map(|bits| 1 << bits).chain([0, 3, 77, 1000]) {
            for x in [low.saturating_sub(step), low + step] {
                check(x.clamp(1 << 31, (1 << 32) - 1));
                check(x.clamp(1 << 31, (1 << 32) - 1) << 20 | 0x3_5a5a);
            }
        }
    }
    (0..200_000).for_each(|i| check((mix(i) >> (i % 60)).max(1)));
    assert_eq!(log2_fixed(0), 0);
}

#[test]
fn codes_stand_for_the_nearest_cost() {
    for cost in 0..20 * 256u32 {
        let code = u32::from(code_of(u64::from(cost) << 4));
        let error = cost_of(code).abs_diff(cost);
        for other in 0..CODES as u32 {
            assert!(error <= cost_of(other).abs_diff(cost), "{cost} has code {code}, {other} is nearer");
        }
    }
    assert_eq!(code_of(u64::MAX), 255);
}

#[test]
fn familiar_text_is_cheap_and_strange_text_is_not() {
    let units: Vec<Vec<u8>> =
        (0..20).map(|i| std::format!("GET /api/orders?page={}", i % 3).into_bytes()).collect();
    let model = model(&units);
    let total = |text: &[u8]| model.costs(text).iter().map(|&c| u32::from(c)).sum::<u32>() / 256;
    let familiar = total(b"GET /api/orders?page=2");
    assert!(familiar * 5 < total(b"GET /api/orders?page=1' OR 1=1--"), "{familiar}");
}

#[test]
fn an_odd_value_in_a_familiar_field_costs_bits() {
    let row = |i: u32| std::format!("GET /shop?town=Berlin&zip={:05}", 10_000 + i * 37).into_bytes();
    let units: Vec<Vec<u8>> = (0..200).map(row).collect();
    let model = model(&units);
    let total = |text: &[u8]| model.costs(text).iter().map(|&c| u32::from(c)).sum::<u32>() / 256;
    let (ordinary, swapped) =
        (total(b"GET /shop?town=Berlin&zip=10999"), total(b"GET /shop?town=10999&zip=Berlin"));
    assert!(ordinary * 3 < swapped, "{ordinary} {swapped}");
    assert!(model.fields() > 0);
}

#[test]
fn a_full_counter_says_so_and_still_trains() {
    let mut counts = Counts::new(600);
    let noise: Vec<u8> = (0..4000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    counts.train(&noise);
    assert!(counts.overflowed() > 0);
    assert!(counts.freeze(1 << 20).costs(&noise).iter().all(|&c| c <= MAX_COST));
}

#[test]
fn a_walk_ends_in_a_table_that_lies() {
    // Every slot leads to state 0 by every label there is room for.
    for label in 0..512u32 {
        let slots: Vec<u8> = (0..600).flat_map(|_| (label << 23).to_le_bytes()).collect();
        let fields: Vec<u8> = [1u32, 0, 0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let lying = ContextModel::decode(0, &slots, &[255; 600], &fields).unwrap();
        assert!(lying.costs(&b"a=b&any text".repeat(20)).iter().all(|&c| c <= MAX_COST));
        lying.end_cost(&lying.start());
    }
}

#[test]
fn a_table_stays_within_its_bytes_whatever_was_counted() {
    let noise: Vec<u8> = (0..60_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
    let pairs: Vec<u8> = (0..4000).flat_map(|i| std::format!("key{i}=v{i}&").into_bytes()).collect();
    for limit in [16 << 10, 64 << 10, 256 << 10, 1 << 20] {
        let mut counts = Counts::new(1 << 20);
        counts.train(&noise);
        counts.train(&noise[..30_000]);
        (0..4).for_each(|_| counts.train(&pairs));
        let model = counts.freeze(limit);
        assert!(model.table_bytes() <= limit, "{} of {limit}", model.table_bytes());
        assert!(model.costs(&noise[..5000]).iter().all(|&c| c <= MAX_COST));
    }
}

#[test]
fn what_is_no_table_is_refused() {
    let decode = |slots: usize, codes: usize, fields: &[u8]| {
        ContextModel::decode(0, &vec![0; slots * 4], &vec![0; codes], fields).map(|_| ())
    };
    assert_eq!(decode(300, 300, &[]), Ok(()));
    assert_eq!(decode(300, 299, &[]), Err(ModelError::TableLength));
    assert_eq!(decode(2, 2, &[]), Err(ModelError::TableLength));
    assert_eq!(decode(300, 300, &[0; 13]), Err(ModelError::TableLength));
    assert_eq!(decode(300, 300, &[0; 24]), Err(ModelError::Fields));
}
