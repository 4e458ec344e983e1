//! Code lengths against a naive model in floating point: a map of successor counts by context.
//!
//! A fixed-point cost strays from the exact one by at most one unit for each probability it adds up.

use std::collections::BTreeMap;

use driftlock_engine::coder::{Counts, MAX_COST, MAX_ORDER, UNITS_PER_BIT};

use crate::input::Input;

/// See the module.
pub fn holds(data: &[u8]) {
    let mut input = Input::new(data);
    let order = 1 + input.byte() % MAX_ORDER;
    let training: Vec<&[u8]> = (0..input.byte() % 8).map(|_| unit(&mut input)).collect();
    let test = input.rest(512);

    let mut counts = Counts::new(order, 1 << 20);
    training.iter().for_each(|unit| counts.train(unit));
    assert_eq!(counts.overflowed(), 0);
    let model = counts.freeze(1 << 24);
    let oracle = Oracle::train(usize::from(order), &training);
    for unit in training.iter().copied().chain([test]) {
        let costs = model.costs(unit);
        assert_eq!(costs.len(), unit.len());
        for (i, (&cost, (exact, terms))) in costs.iter().zip(oracle.costs(unit)).enumerate() {
            let exact = exact.min(f64::from(MAX_COST));
            let error = f64::from(cost) - exact;
            assert!(error.abs() <= terms, "byte {i} of {unit:?} costs {cost}, exactly {exact}");
        }
    }
}

fn unit<'a>(input: &mut Input<'a>) -> &'a [u8] {
    let len = usize::from(input.byte());
    input.take(len)
}

struct Oracle {
    order: usize,
    contexts: BTreeMap<Vec<u8>, BTreeMap<u8, f64>>,
}

impl Oracle {
    fn train(order: usize, units: &[&[u8]]) -> Self {
        let mut contexts: BTreeMap<Vec<u8>, BTreeMap<u8, f64>> = BTreeMap::new();
        for unit in units {
            let text = [&[0], *unit].concat();
            for i in 1..text.len() {
                for len in 0..=order.min(i) {
                    *contexts.entry(text[i - len..i].to_vec()).or_default().entry(text[i]).or_default() +=
                        1.0;
                }
            }
        }
        Self { order, contexts }
    }

    /// Cost of each byte in 1/256 bit, and how many rounded numbers the coder adds up for it.
    fn costs(&self, unit: &[u8]) -> Vec<(f64, f64)> {
        let text = [&[0], unit].concat();
        (1..text.len()).map(|i| self.cost(&text[..i], text[i])).collect()
    }

    fn cost(&self, before: &[u8], byte: u8) -> (f64, f64) {
        let units = |probability: f64| -probability.log2() * f64::from(UNITS_PER_BIT);
        let (mut cost, mut terms) = (0.0, 0.0);
        for len in (0..=self.order.min(before.len())).rev() {
            let Some(successors) = self.contexts.get(&before[before.len() - len..]) else { continue };
            let total: f64 = successors.values().sum();
            terms += 1.0;
            if let Some(count) = successors.get(&byte) {
                return (cost + units((2.0 * count - 1.0) / (2.0 * total)), terms);
            }
            cost += units(successors.len() as f64 / (2.0 * total));
        }
        (cost + units(1.0 / 256.0), terms)
    }
}
