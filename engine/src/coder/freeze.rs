//! Counts to a frozen model: which fields pay, which contexts are worth their room, and the automaton.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use super::context::{Context, END, FIELD_ORDER, PLAIN_ORDER, Place, visit};
use super::model::{ContextModel, FieldRoots, MAX_SLOTS, NOWHERE, Slot};
use super::{MAX_COST_FINE, UNIFORM_BITS, code_of, log2_fixed, mix};

/// What a symbol's occurrences must save over backing off, bits, to be kept. Doubled until all fits.
const LEAST_SAVING_BITS: u64 = 8;
/// A symbol seen this often in a context that is kept anyway is kept too: it takes one slot and saves the
/// walk down the contexts.
const OFTEN: u32 = 4;
/// Bytes of a slot: next state, label and cost code.
const SLOT_BYTES: usize = 5;

#[derive(Clone, Copy, Debug)]
struct Pair {
    symbol: u16,
    count: u32,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    context: Context,
    /// First of its pairs, and how many.
    first: u32,
    len: u32,
    /// Occurrences of all its symbols, and how many symbols have any.
    total: u64,
    distinct: u32,
}

/// The counts by context, to look up.
struct Table {
    /// By rising context.
    nodes: Vec<Node>,
    /// By context, then symbol.
    pairs: Vec<Pair>,
    /// Open addressing: a node's number + 1 by its context's hash; 0 is free.
    index: Vec<u32>,
}

impl Table {
    fn new(counted: &mut dyn Iterator<Item = (Context, u16, u32)>) -> Self {
        let (mut nodes, mut pairs): (Vec<Node>, Vec<Pair>) = (Vec::new(), Vec::new());
        for (context, symbol, count) in counted {
            if nodes.last().is_none_or(|node| node.context != context) {
                let first = pairs.len() as u32;
                nodes.push(Node { context, first, len: 0, total: 0, distinct: 0 });
            }
            if let Some(node) = nodes.last_mut() {
                node.len += 1;
                node.total += u64::from(count);
                node.distinct += 1;
            }
            pairs.push(Pair { symbol, count });
        }
        let mut index = vec![0; (nodes.len() * 2).next_power_of_two().max(2)];
        let mask = index.len() - 1;
        for (node, number) in nodes.iter().zip(1..) {
            let mut at = mix(node.context.0) as usize & mask;
            while index.get(at).is_some_and(|&taken| taken != 0) {
                at = (at + 1) & mask;
            }
            if let Some(free) = index.get_mut(at) {
                *free = number;
            }
        }
        Self { nodes, pairs, index }
    }

    fn number(&self, context: Context) -> Option<usize> {
        let mask = self.index.len() - 1;
        let mut at = mix(context.0) as usize & mask;
        loop {
            let number = (*self.index.get(at)? as usize).checked_sub(1)?;
            if self.nodes.get(number)?.context == context {
                return Some(number);
            }
            at = (at + 1) & mask;
        }
    }

    fn pairs_of(&self, node: &Node) -> &[Pair] {
        self.pairs.get(node.first as usize..(node.first + node.len) as usize).unwrap_or_default()
    }

    /// The number of the pair.
    fn pair(&self, node: &Node, symbol: u16) -> Option<usize> {
        let at = self.pairs_of(node).binary_search_by_key(&symbol, |pair| pair.symbol).ok()?;
        Some(node.first as usize + at)
    }

    fn node(&self, context: Context) -> Option<&Node> {
        self.nodes.get(self.number(context)?)
    }

    /// What `symbol` costs in the first of `contexts` that has seen it, with the escapes on the way, in
    /// 1/4096 bit; and whether one had.
    fn cost(&self, contexts: impl Iterator<Item = Context>, symbol: u16) -> (u64, bool) {
        let mut cost = 0;
        for node in contexts.filter_map(|context| self.node(context)).filter(|node| node.total > 0) {
            let count =
                self.pair(node, symbol).and_then(|at| self.pairs.get(at)).map_or(0, |pair| pair.count);
            if count > 0 {
                return (cost + direct_cost(count, node.total), true);
            }
            cost += u64::from(log2_fixed(2 * node.total).saturating_sub(log2_fixed(node.distinct.into())));
        }
        (cost, false)
    }

    /// Takes every symbol of `unit` out of the counts, or puts it back.
    fn count(&mut self, unit: &[u8], out: bool) {
        visit(unit, |place| {
            for context in place.field_contexts().chain(place.plain_contexts()) {
                let Some(number) = self.number(context) else { continue };
                let Some(node) = self.nodes.get(number).copied() else { continue };
                let Some(at) = self.pair(&node, place.symbol) else { continue };
                if let (Some(node), Some(pair)) = (self.nodes.get_mut(number), self.pairs.get_mut(at)) {
                    if out {
                        pair.count -= 1;
                        node.total -= 1;
                        node.distinct -= u32::from(pair.count == 0);
                    } else {
                        node.distinct += u32::from(pair.count == 0);
                        pair.count += 1;
                        node.total += 1;
                    }
                }
            }
        });
    }

    /// The fields whose own contexts make the sample's units cheaper, each under the counts of all units
    /// but itself, in rising order. A field of free text is not among them: its plain contexts are longer,
    /// and have seen more.
    fn fields_that_pay<'a>(&mut self, sample: impl Iterator<Item = &'a Vec<u8>>) -> Vec<u32> {
        // By field: bits/4096 without and with its own contexts.
        let mut spent: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        let none = UNIFORM_BITS << 12;
        for unit in sample {
            self.count(unit, true);
            visit(unit, |place: Place| {
                if place.field == crate::field::FREE_TEXT || place.symbol == END {
                    return;
                }
                let (plain, found) = self.cost(place.plain_contexts(), place.symbol);
                let plain = if found { plain } else { plain + none };
                let (own, found) = self.cost(place.field_contexts(), place.symbol);
                let own = if found { own } else { own + plain };
                let (without, with) = spent.entry(place.field).or_default();
                *without += plain.min(MAX_COST_FINE);
                *with += own.min(MAX_COST_FINE);
            });
            self.count(unit, false);
        }
        spent.into_iter().filter(|(_, (without, with))| with < without).map(|(field, _)| field).collect()
    }

    /// By pair: what its occurrences save over backing off from their context, in 1/4096 bit.
    fn savings(&self) -> Vec<u64> {
        let mut savings = Vec::with_capacity(self.pairs.len());
        for node in &self.nodes {
            for pair in self.pairs_of(node) {
                let shorter = core::iter::successors(node.context.shorter(), |context| context.shorter());
                let (mut without, found) = self.cost(shorter, pair.symbol);
                if !found {
                    without += UNIFORM_BITS << 12;
                }
                let saved = without.saturating_sub(direct_cost(pair.count, node.total));
                savings.push(saved.saturating_mul(pair.count.into()));
            }
        }
        savings
    }

    /// By pair: is it kept if it must save `least`, in 1/4096 bit?
    ///
    /// A context all of whose symbols go is gone. The pair that leads to a kept context stays, so that the
    /// automaton's state is always the longest kept context, whichever way it came there.
    fn kept(&self, savings: &[u64], least: u64) -> Vec<bool> {
        let mut kept: Vec<bool> = vec![false; self.pairs.len()];
        let of_length = |len| self.nodes.iter().filter(move |node| node.context.len() == len);
        for node in (0..=PLAIN_ORDER.max(FIELD_ORDER)).rev().flat_map(of_length) {
            let range = node.first as usize..(node.first + node.len) as usize;
            let (Some(kept_here), Some(saved)) = (kept.get_mut(range.clone()), savings.get(range)) else {
                continue;
            };
            // A field with fewer bytes than the bits to be saved is not worth contexts of its own.
            let rare = node.context.field().is_some_and(|field| {
                let bytes = self.node(Context::in_field(field, 0, 0)).map_or(0, |all| all.total);
                bytes << 12 < least
            });
            if rare {
                continue;
            }
            let mut any = false;
            for (kept, &saved) in kept_here.iter_mut().zip(saved) {
                *kept |= node.context.len() == 0 || saved >= least;
                any |= *kept;
            }
            if !any {
                continue;
            }
            for (kept, pair) in kept_here.iter_mut().zip(self.pairs_of(node)) {
                *kept |= pair.count >= OFTEN;
            }
            if let Some((prefix, symbol)) = node.context.prefix()
                && let Some(prefix) = self.node(prefix)
                && let Some(at) = self.pair(prefix, symbol)
                && let Some(kept) = kept.get_mut(at)
            {
                *kept = true;
            }
        }
        kept
    }
}

/// -log2 (count - 1/2) / total, in 1/4096 bit.
fn direct_cost(count: u32, total: u64) -> u64 {
    log2_fixed(2 * total).saturating_sub(log2_fixed(2 * u64::from(count) - 1)).into()
}

/// See [`super::Counts::freeze`]. `counted` is sorted. Also returned: the kept contexts.
pub(super) fn freeze<'a>(
    counted: &[(Context, u16, u32)],
    trained_bytes: u64,
    sample: impl Iterator<Item = &'a Vec<u8>>,
    max_table_bytes: usize,
) -> (ContextModel, Vec<KeptContext>) {
    let paying = Table::new(&mut counted.iter().copied()).fields_that_pay(sample);
    let pays = |context: &Context| context.field().is_none_or(|field| paying.binary_search(&field).is_ok());
    let table = Table::new(&mut counted.iter().copied().filter(|(context, _, _)| pays(context)));
    let savings = table.savings();
    let mut least_bits = LEAST_SAVING_BITS;
    loop {
        let kept = table.kept(&savings, least_bits << 12);
        // Each pair takes a slot and each state one more; gaps come on top.
        let slots = kept.iter().filter(|kept| **kept).count() + table.nodes.len() / 8;
        let last = least_bits >= 1 << 40;
        if (slots <= MAX_SLOTS && slots * SLOT_BYTES <= max_table_bytes) || last {
            let mut automaton = Automaton::new(&table, &kept);
            let model = automaton.build(trained_bytes);
            if model.table_bytes() <= max_table_bytes || last {
                return (model, automaton.states);
            }
        }
        least_bits *= 2;
    }
}

/// A context that the model keeps: a state of the automaton.
pub(super) struct KeptContext {
    pub(super) context: Context,
    total: u64,
    /// Kept symbols with their counts.
    pairs: Vec<Pair>,
    base: u32,
    /// Its node in the table; the root may have none.
    node: Option<usize>,
}

impl KeptContext {
    /// Cost codes of the kept symbols.
    pub(super) fn symbols(&self) -> impl Iterator<Item = (u16, u8)> {
        self.pairs.iter().map(|pair| (pair.symbol, code_of(direct_cost(pair.count, self.total))))
    }

    /// What the kept symbols leave of the probability, in 1/4096 bit.
    fn escape(&self) -> u64 {
        let kept: u64 = self.pairs.iter().map(|pair| 2 * u64::from(pair.count) - 1).sum();
        let rest = (2 * self.total).saturating_sub(kept);
        log2_fixed((2 * self.total).max(1)).saturating_sub(log2_fixed(rest.max(1))).into()
    }

    /// Cost code of backing off.
    pub(super) fn escape_code(&self) -> u8 {
        code_of(self.escape())
    }

    /// Cost code of a byte that no context has seen; of the root.
    pub(super) fn unseen_code(&self) -> u8 {
        code_of(self.escape() + (UNIFORM_BITS << 12))
    }
}

/// Root first, then busy contexts first: what is used together shall stand together.
fn kept_contexts(table: &Table, kept: &[bool]) -> Vec<KeptContext> {
    let mut states: Vec<KeptContext> = Vec::new();
    for (node, number) in table.nodes.iter().zip(0..) {
        let range = node.first as usize..(node.first + node.len) as usize;
        let kept = kept.get(range).unwrap_or_default().iter();
        let pairs: Vec<Pair> =
            kept.zip(table.pairs_of(node)).filter(|(kept, _)| **kept).map(|(_, pair)| *pair).collect();
        if !pairs.is_empty() {
            let (context, total) = (node.context, node.total);
            states.push(KeptContext { context, total, pairs, base: 0, node: Some(number) });
        }
    }
    if states.first().is_none_or(|first| first.context != Context::ROOT) {
        let pairs = Vec::new();
        states.push(KeptContext { context: Context::ROOT, total: 0, pairs, base: 0, node: None });
    }
    states.sort_unstable_by(|a, b| {
        let is_root = |state: &KeptContext| state.context == Context::ROOT;
        is_root(b).cmp(&is_root(a)).then(b.total.cmp(&a.total)).then(a.context.cmp(&b.context))
    });
    states
}

struct Automaton<'a> {
    table: &'a Table,
    states: Vec<KeptContext>,
    /// By node: the base of its state, or [`NOWHERE`].
    bases: Vec<u32>,
}

impl<'a> Automaton<'a> {
    fn new(table: &'a Table, kept: &[bool]) -> Self {
        Self { table, states: kept_contexts(table, kept), bases: vec![NOWHERE; table.nodes.len()] }
    }

    fn build(&mut self, trained_bytes: u64) -> ContextModel {
        let mut slots = self.place();
        self.fill(&mut slots);
        ContextModel::new(trained_bytes, slots, self.fields())
    }

    /// Gives every state a base, so that no two slots fall together and no two states have one base; the
    /// number of slots is that of the last one used, and a row behind it.
    fn place(&mut self) -> Vec<Slot> {
        let mut used: Vec<bool> = Vec::new();
        let mut is_base: Vec<bool> = Vec::new();
        let mut labels: Vec<usize> = Vec::new();
        let mut first_free = 0;
        let mut end = 0;
        for state in &mut self.states {
            labels.clear();
            if state.context == Context::ROOT {
                labels.extend(0..usize::from(END));
            } else {
                labels.extend(state.pairs.iter().map(|pair| usize::from(label(pair.symbol))));
            }
            labels.push(usize::from(Slot::BACK_OFF));
            let lowest = labels.iter().copied().min().unwrap_or(0);
            while used.get(first_free).copied().unwrap_or(false) {
                first_free += 1;
            }
            let mut base = first_free.saturating_sub(lowest);
            // A search that goes on for long is not worth its time: leave the gaps behind.
            let mut tries = 0;
            loop {
                if used.len() < base + Slot::ROW {
                    used.resize(base + Slot::ROW + 1024, false);
                    is_base.resize(used.len(), false);
                }
                let free = |at: usize| !used.get(at).copied().unwrap_or(false);
                let taken = is_base.get(base).copied().unwrap_or(false);
                if !taken && labels.iter().all(|&label| free(base + label)) {
                    break;
                }
                base += 1;
                tries += 1;
                if tries % 4096 == 0 {
                    first_free = base.saturating_sub(2048).max(first_free);
                }
            }
            if let Some(taken) = is_base.get_mut(base) {
                *taken = true;
            }
            for &label in &labels {
                if let Some(taken) = used.get_mut(base + label) {
                    *taken = true;
                }
            }
            end = end.max(base + Slot::ROW);
            state.base = base as u32;
            if let Some(of_node) = state.node.and_then(|node| self.bases.get_mut(node)) {
                *of_node = state.base;
            }
        }
        vec![Slot::default(); end]
    }

    fn base(&self, context: Context) -> Option<u32> {
        if context == Context::ROOT {
            return self.states.first().map(|root| root.base);
        }
        let base = self.table.number(context).and_then(|node| self.bases.get(node));
        base.copied().filter(|&base| base != NOWHERE)
    }

    /// The longest kept context that `context` ends with. Of a field without any, [`NOWHERE`].
    fn longest(&self, context: Context) -> u32 {
        core::iter::successors(Some(context), |context| context.shorter())
            .find_map(|context| self.base(context))
            .unwrap_or(NOWHERE)
    }

    fn fill(&self, slots: &mut [Slot]) {
        for state in &self.states {
            let mut set = |label: u16, next: u32, code: u8| {
                if let Some(slot) = slots.get_mut(state.base as usize + usize::from(label)) {
                    *slot = Slot::new(label, next, code);
                }
            };
            let behind = |byte| self.longest(state.context.followed_by(byte));
            if state.context == Context::ROOT {
                // Every byte has a cost here, so a walk down the contexts ends.
                (0..=u8::MAX).for_each(|byte| set(byte.into(), behind(byte), state.unseen_code()));
            }
            for (symbol, code) in state.symbols() {
                let next = u8::try_from(symbol).map_or(NOWHERE, behind);
                set(label(symbol), next, code);
            }
            let back_off = state.context.shorter().map_or(NOWHERE, |context| self.longest(context));
            set(Slot::BACK_OFF, back_off, state.escape_code());
        }
    }

    /// Fields with contexts of their own, by rising hash.
    fn fields(&self) -> Vec<FieldRoots> {
        // As i64, which is sorted elsewhere too: the code of a sort takes 5 KiB of the filter.
        let of_states = self.states.iter().filter_map(|state| state.context.field());
        let mut fields: Vec<i64> = of_states.map(i64::from).collect();
        fields.sort_unstable();
        fields.dedup();
        let roots =
            fields.into_iter().filter_map(|field| u32::try_from(field).ok()).map(|field| FieldRoots {
                field,
                anchored: self.longest(Context::anchored(field, 0, 0)),
                inside: self.longest(Context::in_field(field, 0, 0)),
            });
        roots.filter(|roots| roots.anchored != NOWHERE).collect()
    }
}

/// The symbol's label in a row: bytes as they are, the end of a unit behind the back-off slot.
fn label(symbol: u16) -> u16 {
    if symbol == END { Slot::END } else { symbol }
}
