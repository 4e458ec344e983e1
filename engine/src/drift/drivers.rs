//! What a shift comes from: which kinds of unit, which words, which messages.
//!
//! What: [`Drivers`] keeps accounts of bytes and code length, one for each kind of unit and one for each word,
//! of the messages of two samples. The difference of the samples is then divided among the accounts *exactly*:
//! with L bytes and C bits in all, l and c of them in an account, n messages, and `d` "window less reference",
//! - length: `d(l / n)`; total: `d(c / n)`: they sum to the difference of the means;
//! - code length per byte: `d(c / L) - m d(l / L)`, m the mean of the samples' C / L. The second term sums
//!   to 0: an account that merely grows, at the ordinary price, drives nothing.
//!
//! [`contributions`] does the same for messages: [`super::shift_test`]'s statistics are sums over the window's
//! messages, so each message has its own term in the one that moved.
//!
//! Why: "code length per byte moved up by .1 bit" is no finding that a person can act on; "the word `sorry`
//! stands in 31 % of the answers where 2 % had it, and brings half of it" is.
//!
//! A word is a run of letters, digits and bytes above 127, with the separators behind it, so that every byte
//! has an account; what stands before a unit's first word is an account without a name. ASCII case counts as
//! the same. Words that find no room share one account, [`Driver::name`] `None`, and the sums stay exact.
//!
//! Cost: one map look-up a word; at most `max_words` words of at most [`MAX_WORD_BYTES`] bytes.
//!
//! Left out on purpose: p-values for words. Out of thousands of words some always differ; whether anything
//! moved is [`super::shift_test`]'s to say, and only then where.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use super::shift::{Aspect, Moved, Row, Statistic, column};

/// Bytes of a word that tell it from others.
pub const MAX_WORD_BYTES: usize = 48;

/// Which sample a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The baseline's.
    Reference,
    /// The one held against it.
    Window,
}

/// Where something stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which message of its sample, from 0.
    pub message: u32,
    /// Kind of unit.
    pub unit: String,
    /// First byte in the unit's text.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// Sums over one sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Messages that have it.
    pub messages: u32,
    /// How often.
    pub times: u64,
    /// Bytes.
    pub bytes: u64,
    /// Code length, 1/256 bit.
    pub cost: u64,
}

#[derive(Clone, Debug, Default)]
struct Account {
    sums: [Sums; 2],
    /// The message counted last, plus one; a message is counted once.
    last: [u32; 2],
    /// Its dearest occurrence on either side, and what that cost.
    dearest: [Option<(u64, Place)>; 2],
}

/// One account's part in a difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The kind of unit or the word, in lower case; none for the words that found no room.
    pub name: Option<String>,
    /// Its term, in the unit of [`Row::value`] (1/65536 bit a byte, bytes, 1/256 bit) times 65536.
    pub contribution: i64,
    /// In the reference.
    pub reference: Sums,
    /// In the window.
    pub window: Sums,
    /// Its dearest occurrence: in the window, or in the reference if it has gone.
    pub example: Option<Place>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Drivers {
    max_words: usize,
    totals: [Sums; 2],
    units: BTreeMap<String, Account>,
    words: BTreeMap<Vec<u8>, Account>,
    others: Account,
    side: Side,
}

impl Side {
    fn index(self) -> usize {
        match self {
            Self::Reference => 0,
            Self::Window => 1,
        }
    }
}

fn of<T>(pair: &mut [T; 2], side: Side) -> &mut T {
    let [reference, window] = pair;
    match side {
        Side::Reference => reference,
        Side::Window => window,
    }
}

impl Account {
    fn add(&mut self, side: Side, message: u32, bytes: u64, cost: u64, place: impl FnOnce() -> Place) {
        let last = of(&mut self.last, side);
        let first = *last != message;
        *last = message;
        let sums = of(&mut self.sums, side);
        sums.messages = sums.messages.saturating_add(u32::from(first));
        sums.times = sums.times.saturating_add(1);
        sums.bytes = sums.bytes.saturating_add(bytes);
        sums.cost = sums.cost.saturating_add(cost);
        let dearest = of(&mut self.dearest, side);
        if dearest.as_ref().is_none_or(|(most, _)| cost > *most) {
            *dearest = Some((cost, place()));
        }
    }

    fn driver(&self, name: Option<String>, statistic: Statistic, totals: &[Sums; 2]) -> Driver {
        let [reference, window] = self.sums;
        let [in_reference, in_window] = self.dearest.clone();
        Driver {
            name,
            contribution: contribution(statistic, &self.sums, totals),
            reference,
            window,
            example: in_window.or(in_reference).map(|(_, place)| place),
        }
    }
}

/// One unit: 2^16 of [`Row::value`]'s. Rounded towards 0.
fn contribution(statistic: Statistic, sums: &[Sums; 2], totals: &[Sums; 2]) -> i64 {
    let [reference, window] = sums;
    let [all_reference, all_window] = totals;
    // d(a / b), where an empty sample has nothing, times 2^shift.
    let difference = |a: fn(&Sums) -> u64, b: fn(&Sums) -> u64, shift: u32| -> i128 {
        let share = |sums: &Sums, all: &Sums| {
            (i128::from(a(sums)) << shift).checked_div(i128::from(b(all))).unwrap_or(0)
        };
        share(window, all_window) - share(reference, all_reference)
    };
    let messages: fn(&Sums) -> u64 = |sums| u64::from(sums.messages);
    let term = match statistic {
        Statistic::Length => difference(|sums| sums.bytes, messages, 16),
        Statistic::TotalCost => difference(|sums| sums.cost, messages, 16),
        Statistic::CostPerByte => {
            // 1/256 bit a byte to 1/65536 bit a byte is a shift of 8.
            let rate =
                |all: &Sums| (i128::from(all.cost) << 24).checked_div(i128::from(all.bytes)).unwrap_or(0);
            let mean_rate = (rate(all_reference) + rate(all_window)) / 2;
            let grown = difference(|sums| sums.bytes, |all| all.bytes, 32);
            difference(|sums| sums.cost, |all| all.bytes, 24) - ((mean_rate * grown) >> 32)
        }
    };
    i64::try_from(term).unwrap_or(if term < 0 { i64::MIN } else { i64::MAX })
}

fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte >= 0x80
}

/// Largest first in the direction that the statistic moved; of equal ones the first by name.
fn ranked(mut drivers: Vec<Driver>, moved: Moved, most: usize) -> Vec<Driver> {
    let towards = |driver: &Driver| match moved {
        Moved::Up => driver.contribution,
        Moved::Down => driver.contribution.saturating_neg(),
        Moved::Neither => driver.contribution.saturating_abs(),
    };
    drivers.retain(|driver| towards(driver) > 0);
    drivers.sort_by(|a, b| towards(b).cmp(&towards(a)).then_with(|| a.name.cmp(&b.name)));
    drivers.truncate(most);
    drivers
}

impl Drivers {
    /// Empty; keeps at most `max_words` words apart.
    pub fn new(max_words: usize) -> Self {
        Self {
            max_words,
            totals: Default::default(),
            units: BTreeMap::new(),
            words: BTreeMap::new(),
            others: Account::default(),
            side: Side::Reference,
        }
    }

    /// Begins a message.
    pub fn begin(&mut self, side: Side) {
        self.side = side;
        let totals = of(&mut self.totals, side);
        totals.messages = totals.messages.saturating_add(1);
        totals.times = totals.times.saturating_add(1);
    }

    /// One unit of the message begun last, and what each of its bytes costs
    /// ([`crate::baseline::UnitBaseline::costs`]). Without costs only the length counts.
    pub fn unit(&mut self, kind: &str, text: &[u8], costs: &[u32]) {
        let side = self.side;
        let message = of(&mut self.totals, side).messages;
        let cost_of = |start: usize, end: usize| -> u64 {
            costs.get(start..end.min(costs.len())).unwrap_or_default().iter().map(|&c| u64::from(c)).sum()
        };
        let place = |start: usize, end: usize| Place {
            message: message.saturating_sub(1),
            unit: kind.to_owned(),
            start: start as u64,
            end: end as u64,
        };
        self.sums(kind, text.len() as u64, cost_of(0, text.len()));
        let mut start = 0;
        while let Some(rest) = text.get(start..)
            && !rest.is_empty()
        {
            let word = rest.iter().position(|&byte| !in_word(byte)).unwrap_or(rest.len());
            let behind = rest.iter().skip(word).position(|&byte| in_word(byte));
            let end = start + behind.map_or(rest.len(), |separators| word + separators);
            let name = rest.get(..word.min(MAX_WORD_BYTES)).unwrap_or_default().to_ascii_lowercase();
            let full = self.words.len() >= self.max_words;
            let account = match self.words.get_mut(&name) {
                Some(account) => account,
                None if full => &mut self.others,
                None => self.words.entry(name).or_default(),
            };
            account
                .add(side, message, (end - start) as u64, cost_of(start, end), || place(start, start + word));
            start = end;
        }
    }

    /// One unit of the message begun last, of which only the sums are known: no words.
    pub fn sums(&mut self, kind: &str, bytes: u64, cost: u64) {
        let side = self.side;
        let totals = of(&mut self.totals, side);
        totals.bytes = totals.bytes.saturating_add(bytes);
        totals.cost = totals.cost.saturating_add(cost);
        let message = totals.messages;
        if !self.units.contains_key(kind) {
            self.units.insert(kind.to_owned(), Account::default());
        }
        if let Some(account) = self.units.get_mut(kind) {
            account.add(side, message, bytes, cost, || Place {
                message: message.saturating_sub(1),
                unit: kind.to_owned(),
                start: 0,
                end: bytes,
            });
        }
    }

    /// Sums over a sample.
    pub fn total(&self, side: Side) -> Sums {
        self.totals.get(side.index()).copied().unwrap_or_default()
    }

    /// The kinds of unit that moved `statistic` the way it `moved`, largest first.
    pub fn units(&self, statistic: Statistic, moved: Moved, most: usize) -> Vec<Driver> {
        let all = self.units.iter();
        let all = all.map(|(name, account)| account.driver(Some(name.clone()), statistic, &self.totals));
        ranked(all.collect(), moved, most)
    }

    /// The words that did.
    pub fn words(&self, statistic: Statistic, moved: Moved, most: usize) -> Vec<Driver> {
        let named = self.words.iter().map(|(word, account)| {
            account.driver(Some(String::from_utf8_lossy(word).into_owned()), statistic, &self.totals)
        });
        let others = core::iter::once(&self.others).filter(|account| account.sums != [Sums::default(); 2]);
        let all = named.chain(others.map(|account| account.driver(None, statistic, &self.totals)));
        ranked(all.collect(), moved, most)
    }
}

/// Each window message's term in the statistic of [`super::shift_test`] for `statistic` and `aspect`, in
/// 1/4096 standard deviations of the pooled column, in the window's order: they sum to the statistic.
pub fn contributions(reference: &[Row], window: &[Row], statistic: Statistic, aspect: Aspect) -> Vec<i32> {
    let rows: Vec<Row> = window.iter().chain(reference).copied().collect();
    let mut terms = column(&rows, statistic, aspect);
    terms.truncate(window.len());
    terms
}

/// The window's messages with the largest terms in a shift, in the direction that it moved, as places in the
/// window, largest first; of equal ones the earlier.
pub fn leading_messages(
    reference: &[Row],
    window: &[Row],
    (statistic, aspect, moved): (Statistic, Aspect, Moved),
    most: usize,
) -> Vec<usize> {
    let towards = |term: i32| match moved {
        Moved::Up => i64::from(term),
        Moved::Down => -i64::from(term),
        Moved::Neither => i64::from(term).abs(),
    };
    let terms = contributions(reference, window, statistic, aspect);
    let mut order: Vec<(i64, usize)> = terms
        .into_iter()
        .zip(0..)
        .map(|(term, at)| (towards(term), at))
        .filter(|(term, _)| *term > 0)
        .collect();
    order.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    order.truncate(most);
    order.into_iter().map(|(_, at)| at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::format;
    use std::vec;

    const STATISTICS: [Statistic; 3] = [Statistic::CostPerByte, Statistic::Length, Statistic::TotalCost];

    proptest! {
        /// Whatever the accounts, they sum to the difference of the samples.
        #[test]
        fn contributions_sum_to_the_difference(
            messages in prop::collection::vec((any::<bool>(), "[abA é.]{0,12}", 0u32..9000), 0..12),
            max_words in 0usize..4,
        ) {
            let mut drivers = Drivers::new(max_words);
            let mut sums = [(0u64, 0u64, 0u64); 2];
            for (window, text, cost) in &messages {
                let side = if *window { Side::Window } else { Side::Reference };
                let costs = vec![*cost; text.len()];
                drivers.begin(side);
                // Two units, cut anywhere.
                let cut = text.len() / 2;
                drivers.unit("a", &text.as_bytes()[..cut], &costs[..cut]);
                drivers.unit("b", &text.as_bytes()[cut..], &costs[cut..]);
                let of_side = &mut sums[usize::from(*window)];
                of_side.0 += 1;
                of_side.1 += text.len() as u64;
                of_side.2 += u64::from(*cost) * text.len() as u64;
            }
            for statistic in STATISTICS {
                let value = |(n, bytes, cost): (u64, u64, u64)| {
                    let of = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 / b as f64 };
                    match statistic {
                        Statistic::CostPerByte => of(cost, bytes) * 256.0,
                        Statistic::Length => of(bytes, n),
                        Statistic::TotalCost => of(cost, n),
                    }
                };
                let [reference, window] = sums;
                // With an empty side nothing is known of prices there.
                if statistic == Statistic::CostPerByte && (reference.1 == 0 || window.1 == 0) {
                    continue;
                }
                let difference = value(window) - value(reference);
                for all in [drivers.units(statistic, Moved::Up, 99), drivers.words(statistic, Moved::Up, 99)]
                    .into_iter()
                    .zip([drivers.units(statistic, Moved::Down, 99), drivers.words(statistic, Moved::Down, 99)])
                    .map(|(up, down)| up.into_iter().chain(down).collect::<Vec<Driver>>())
                {
                    let sum: f64 = all.iter().map(|driver| driver.contribution as f64 / 65536.0).sum();
                    prop_assert!((sum - difference).abs() < 0.01, "{statistic:?}: {sum} {difference}");
                }
            }
        }

        #[test]
        fn messages_sum_to_the_statistic(
            reference in prop::collection::vec((1u64..50, 1u64..9000), 1..30),
            window in prop::collection::vec((1u64..50, 1u64..9000), 1..30),
        ) {
            let rows = |pairs: &[(u64, u64)]| -> Vec<Row> {
                pairs.iter().map(|&(bytes, cost)| Row { bytes, cost }).collect()
            };
            let (reference, window) = (rows(&reference), rows(&window));
            let seed = crate::significance::Seed([3; 32]);
            let test = super::super::shift_test(&reference, &window, 9, u32::MAX, &seed).unwrap();
            for shift in test.shifts {
                let terms = contributions(&reference, &window, shift.statistic, shift.aspect);
                let sum: i64 = terms.iter().map(|&term| i64::from(term)).sum();
                // The scale is rounded, so a sum of nearly 0 may have either sign.
                match shift.moved {
                    Moved::Up => prop_assert!(sum > -64),
                    Moved::Down => prop_assert!(sum < 64),
                    Moved::Neither => prop_assert!(sum.abs() < 64),
                }
                let leading = leading_messages(&reference, &window, (shift.statistic, shift.aspect, shift.moved), 3);
                let sign = if shift.moved == Moved::Down { -1 } else { 1 };
                if shift.moved != Moved::Neither {
                    let best = terms.iter().map(|&term| term * sign).max().unwrap();
                    prop_assert_eq!(leading.first().map(|&at| terms[at] * sign), (best > 0).then_some(best));
                }
            }
        }
    }

    #[test]
    fn the_word_that_came_is_named_with_its_place() {
        let mut drivers = Drivers::new(100);
        for i in 0..20u32 {
            let ordinary = format!("the order {i} is on its way");
            drivers.begin(Side::Reference);
            drivers.unit("assistant", ordinary.as_bytes(), &vec![256; ordinary.len()]);
            let text = if i % 2 == 0 { format!("{ordinary}, Sorry!") } else { ordinary };
            let costs: Vec<u32> = (0..text.len()).map(|at| if at > 20 { 1024 } else { 256 }).collect();
            drivers.begin(Side::Window);
            drivers.unit("assistant", text.as_bytes(), if i % 2 == 0 { &costs } else { &[] });
        }
        let words = drivers.words(Statistic::TotalCost, Moved::Up, 2);
        assert_eq!(words[0].name.as_deref(), Some("sorry"));
        assert_eq!((words[0].reference.messages, words[0].window.messages), (0, 10));
        // Six bytes at four bits, in half of the messages.
        assert_eq!(words[0].contribution, (6 * 1024 / 2) << 16);
        let place = words[0].example.as_ref().unwrap();
        assert_eq!((place.message, place.unit.as_str(), place.end - place.start), (0, "assistant", 5));
        assert_eq!(drivers.units(Statistic::Length, Moved::Up, 9)[0].name.as_deref(), Some("assistant"));
        assert!(drivers.units(Statistic::Length, Moved::Down, 9).is_empty());
    }
}
