//! Text from grammars: rules with alternatives, slots, and values that stay the same in a conversation.
//!
//! A few kilobytes of grammar give millions of different messages of one distribution, which is
//! what a generator of normal traffic needs and what a list of recorded messages cannot give. The
//! format is ours because the texts are long and hold code, JSON and SQL:
//!
//! ```text
//! %% a comment
//! == rule            starts a rule; every line below is one alternative
//! 3* alternative     three times as likely as an alternative without a weight
//! == product |       a record: alternatives have fields, `name|price|detail`
//! ```
//! In an alternative: `${rule}` expands a rule anew; `@{rule}` expands it once per turn and keeps
//! it; a field of a record is `${rule.2}` or `@{rule.2}` (field 0 without a number); `^` before the
//! name capitalises; `${?rule}` expands in half of the cases; `${rule*3-5}` repeats three to five
//! times; `${#2-9}` is a number in that range; `${*hex:8}` is eight random characters of `hex`,
//! `dig`, `up`, `b62` or `b64`. Escapes: `\n`, `\s` (a space at the end of a line), `\e` (nothing).
//! `recent` and `soon` are dates around the exchange's own time. An expansion that comes out empty
//! takes one space before it away.
//!
//! Grammars are compiled into the program, so a broken one is a defect: the tests expand every rule,
//! and expansion panics with the rule's name. Expansion is linear in the text that it makes.

use std::collections::BTreeMap;

use super::calendar;
use super::dice::{BASE62, BASE64, Dice};

/// Deeper nesting than any grammar here needs; a rule that contains itself stops here.
const MAX_DEPTH: u32 = 24;

struct Rule {
    is_record: bool,
    total_weight: u64,
    alternatives: Vec<(u64, &'static str)>,
}

/// A parsed set of rules.
pub(super) struct Grammar {
    rules: BTreeMap<&'static str, Rule>,
}

impl Grammar {
    /// Reads the sources in order; a later rule replaces an earlier one of the same name.
    pub(super) fn parse(sources: &[&'static str]) -> Self {
        let mut rules: BTreeMap<&'static str, Rule> = BTreeMap::new();
        for source in sources {
            let mut current = None;
            for line in source.lines().filter(|l| !l.is_empty() && !l.starts_with("%%")) {
                if let Some(header) = line.strip_prefix("== ") {
                    let name = header.trim_end_matches(" |");
                    let rule = Rule {
                        is_record: name.len() != header.len(),
                        total_weight: 0,
                        alternatives: Vec::new(),
                    };
                    rules.insert(name, rule);
                    current = Some(name);
                } else if let Some(rule) = current.and_then(|name| rules.get_mut(name)) {
                    let (weight, text) = split_weight(line);
                    rule.total_weight += weight;
                    rule.alternatives.push((weight, text));
                }
            }
        }
        Self { rules }
    }

    pub(super) fn has(&self, rule: &str) -> bool {
        self.rules.contains_key(rule)
    }

    fn rule(&self, name: &str) -> &Rule {
        self.rules.get(name).unwrap_or_else(|| panic!("grammar has no rule `{name}`"))
    }
}

fn split_weight(line: &'static str) -> (u64, &'static str) {
    line.split_once("* ")
        .and_then(|(digits, rest)| digits.parse().ok().map(|weight| (weight, rest)))
        .unwrap_or((1, line))
}

/// One conversation's values.
pub(super) struct Scene<'g> {
    grammar: &'g Grammar,
    unix_s: u64,
    values: Vec<(String, String)>,
}

impl<'g> Scene<'g> {
    pub(super) fn new(grammar: &'g Grammar, unix_s: u64) -> Self {
        Self { grammar, unix_s, values: Vec::new() }
    }

    /// Forgets the last turn's values, except those that the grammar's rule `keep` names.
    pub(super) fn next_turn(&mut self) {
        let grammar = self.grammar;
        self.values.retain(|(name, _)| {
            grammar.has("keep") && grammar.rule("keep").alternatives.iter().any(|(_, kept)| kept == name)
        });
    }

    /// The text of a rule.
    pub(super) fn expand(&mut self, rule: &str, dice: &mut Dice) -> String {
        self.expand_rule(rule, dice, 0)
    }

    fn expand_rule(&mut self, name: &str, dice: &mut Dice, depth: u32) -> String {
        assert!(depth < MAX_DEPTH, "grammar rule `{name}` contains itself");
        match name {
            "recent" => return calendar::day_record(calendar::days_before(self.unix_s, dice.between(1, 60))),
            "soon" => return calendar::day_record(calendar::days_after(self.unix_s, dice.between(1, 21))),
            _ => {}
        }
        let rule = self.grammar.rule(name);
        let mut at = dice.below(rule.total_weight);
        for (weight, text) in &rule.alternatives {
            if at < *weight {
                return self.fill(text, dice, depth);
            }
            at -= weight;
        }
        panic!("grammar rule `{name}` has no alternatives")
    }

    /// Replaces the slots and escapes of one alternative.
    fn fill(&mut self, template: &str, dice: &mut Dice, depth: u32) -> String {
        let mut out = String::with_capacity(template.len() * 2);
        let mut rest = template;
        while let Some(at) = rest.find(['$', '@', '\\']) {
            out.push_str(&rest[..at]);
            let found = &rest[at..];
            let slot = found.get(1..).and_then(|s| s.strip_prefix('{')).and_then(|s| s.split_once('}'));
            if let Some(tail) = found.strip_prefix("\\n") {
                out.push('\n');
                rest = tail;
            } else if let Some(tail) = found.strip_prefix("\\s") {
                out.push(' ');
                rest = tail;
            } else if let Some(tail) = found.strip_prefix("\\e") {
                rest = tail;
            } else if let (false, Some((inside, tail))) = (found.starts_with('\\'), slot) {
                let value = self.slot(inside, found.starts_with('@'), dice, depth + 1);
                if value.is_empty() && out.ends_with(' ') {
                    out.pop();
                }
                out.push_str(&value);
                rest = tail;
            } else {
                out.push_str(&found[..1]);
                rest = &found[1..];
            }
        }
        out.push_str(rest);
        out
    }

    fn slot(&mut self, inside: &str, sticky: bool, dice: &mut Dice, depth: u32) -> String {
        if let Some(range) = inside.strip_prefix('#') {
            let (low, high) = parse_range(range);
            return dice.between(low, high).to_string();
        }
        if let Some(random) = inside.strip_prefix('*') {
            return random_chars(random, dice);
        }
        if let Some(name) = inside.strip_prefix('?') {
            return if dice.percent(50) { self.slot(name, sticky, dice, depth) } else { String::new() };
        }
        if let Some(name) = inside.strip_prefix('^') {
            let value = self.slot(name, sticky, dice, depth);
            let mut chars = value.chars();
            return chars.next().map(|c| c.to_uppercase().chain(chars).collect()).unwrap_or_default();
        }
        if let Some((name, range)) = inside.split_once('*') {
            let (low, high) = parse_range(range);
            let times = dice.between(low, high);
            return (0..times).map(|_| self.slot(name, sticky, dice, depth)).collect();
        }
        let (name, field) = match inside.split_once('.') {
            Some((name, digits)) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                (name, digits.parse().unwrap_or(0))
            }
            _ => (inside, 0),
        };
        let value = if sticky {
            match self.values.iter().find(|(known, _)| known == name) {
                Some((_, value)) => value.clone(),
                None => {
                    let value = self.expand_rule(name, dice, depth);
                    self.values.push((name.to_owned(), value.clone()));
                    value
                }
            }
        } else {
            self.expand_rule(name, dice, depth)
        };
        if matches!(name, "recent" | "soon") || self.grammar.rule(name).is_record {
            value.split('|').nth(field).unwrap_or_default().to_owned()
        } else {
            value
        }
    }
}

/// `3-5`, or `3` for exactly three.
fn parse_range(range: &str) -> (u64, u64) {
    let (low, high) = range.split_once('-').unwrap_or((range, range));
    match (low.parse(), high.parse()) {
        (Ok(low), Ok(high)) if low <= high => (low, high),
        _ => panic!("grammar range `{range}` is not `low-high`"),
    }
}

fn random_chars(spec: &str, dice: &mut Dice) -> String {
    let (kind, n) = spec.split_once(':').unwrap_or((spec, "1"));
    let n = n.parse().unwrap_or(1);
    match kind {
        "hex" => dice.hex(n),
        "dig" => dice.chars(b"0123456789", n),
        "up" => dice.chars(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", n),
        "b62" => dice.chars(BASE62, n),
        "b64" => dice.chars(BASE64, n),
        _ => panic!("grammar has no characters `{kind}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::apps;
    use super::*;

    const TOY: &str = "%% toy\n== keep\nthing\n== say\n@{thing} costs @{thing.1}, ${thing}${?none}\\n${#3-3}${dot*2} $5 a@b\n\
                       == none\n\\e\n== dot\n.\n== thing |\nkettle|10\ncup|2\n== pair\n@{^other} and @{other}\n== other\n3* x\ny\n";

    #[test]
    fn slots_keep_their_value_within_a_turn_and_kept_ones_beyond() {
        let grammar = Grammar::parse(&[TOY]);
        let mut dice = Dice::new(1, 0);
        for stream in 0..50 {
            let mut scene = Scene::new(&grammar, 1_700_000_000 + stream);
            let first = scene.expand("say", &mut dice);
            let (thing, price) = first.split_once(" costs ").unwrap();
            assert!(price.starts_with(if thing == "kettle" { "10, " } else { "2, " }), "{first}");
            assert!(first.ends_with("\n3.. $5 a@b"), "{first}");
            let pair = scene.expand("pair", &mut dice);
            assert!(pair == "X and x" || pair == "Y and y", "{pair}");
            scene.next_turn();
            assert_eq!(scene.values.len(), 1, "only `thing` is kept");
            assert!(scene.expand("say", &mut dice).starts_with(thing));
        }
    }

    #[test]
    fn every_alternative_of_every_grammar_expands() {
        let mut grammars: Vec<Grammar> = apps::all().into_iter().map(|app| app.grammar).collect();
        grammars.extend([apps::rest_grammar(), apps::attack_grammar()]);
        for grammar in &grammars {
            for (name, rule) in grammar.rules.iter().filter(|(name, _)| **name != "keep") {
                assert!(!rule.alternatives.is_empty(), "rule `{name}` is empty");
                for (i, (_, text)) in rule.alternatives.iter().enumerate() {
                    let mut scene = Scene::new(grammar, 1_794_470_400);
                    let filled = scene.fill(text, &mut Dice::new(3, i as u64), 0);
                    assert!(!filled.contains("${") && !filled.contains("@{"), "`{name}`: {filled}");
                }
            }
            if grammar.has("keep") {
                assert!(grammar.rule("keep").alternatives.iter().all(|(_, kept)| grammar.has(kept)));
            }
        }
    }

    #[test]
    fn weights_count() {
        let grammar = Grammar::parse(&[TOY]);
        let mut dice = Dice::new(2, 0);
        let mut scene = Scene::new(&grammar, 0);
        let xs = (0..4_000).filter(|_| scene.expand("other", &mut dice) == "x").count();
        assert!((2_800..3_200).contains(&xs), "{xs} of 4000, expected about 3000");
    }
}
