//! What is done with a message: rules by stream key, sampling, shadow mode.
//!
//! What: [`Rules`] is the configuration's `actions`; [`Rules::plan`] says what the first rule that matches a
//! stream key asks for. `observe` reports and touches nothing; `tag` also tells the peers, in headers and
//! trailers; `redact` rewrites secrets and personal data in flight; `block` stops what is anomalous. A rule in
//! `shadow` mode holds nothing, changes nothing and counts what it would have done.
//!
//! **Sampling.** A rule with `percent` applies to that part of the exchanges: those whose hash, a number from
//! 0 to 9,999, is below 100 times the percentage. What is hashed is the request's `x-request-id`; the same id
//! is in or out in every worker and on every retry. An exchange without one is hashed by its stream key and the
//! body, which is known when it is judged; redaction, which must begin before, then always applies. The hash
//! is FNV-1a (64 bits) with the finaliser of SplitMix64, modulo 10,000.
//!
//! Cost: one comparison of patterns a message.
//!
//! Left out on purpose: conditions on anything but the stream key; a proxy's routes can have configurations of
//! their own.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use driftlock_engine::normalise::{Class, ClassSet};
use serde::Deserialize;

/// The rules, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules(Vec<Rule>);

/// What a rule asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Tell the peers, in headers.
    pub tag: bool,
    /// Tell the client in a trailer too, where it speaks a protocol that has them.
    pub trailers: bool,
    /// Rewrite tokens of these classes; none without redaction.
    pub redact: Option<ClassSet>,
    /// Stop what is anomalous.
    pub block: bool,
    /// Count, and do nothing.
    pub shadow: bool,
    /// Status of a blocked message whose status can still be set.
    pub status: u16,
    /// Part of the exchanges that the rule applies to, in hundredths of a percent.
    pub sample: u32,
}

/// All exchanges, in hundredths of a percent.
const ALL: u32 = 10_000;

impl Default for Plan {
    /// What happens to a stream that no rule names: its verdict is told in a header.
    fn default() -> Self {
        Self {
            tag: true,
            trailers: false,
            redact: None,
            block: false,
            shadow: false,
            status: DEFAULT_STATUS,
            sample: ALL,
        }
    }
}

/// Forbidden: clients do not retry it, as they would 409, 429 and everything from 500 on.
const DEFAULT_STATUS: u16 = 403;

#[derive(Clone, Debug, PartialEq)]
struct Rule {
    stream: String,
    plan: Plan,
}

impl Rules {
    /// What to do with messages of `stream`.
    pub fn plan(&self, stream: &str) -> Plan {
        let rule = self.0.iter().find(|rule| matches(rule.stream.as_bytes(), stream.as_bytes()));
        rule.map(|rule| rule.plan).unwrap_or_default()
    }

    /// Every stream is observed: nothing is told, changed or stopped.
    pub fn observe() -> Self {
        let plan = Plan { tag: false, ..Plan::default() };
        Self(alloc::vec![Rule { stream: "*".to_string(), plan }])
    }

    /// Whether any rule applies to a part of the exchanges only.
    pub(crate) fn sample(&self) -> bool {
        self.0.iter().any(|rule| rule.plan.sample < ALL)
    }

    /// From the configuration.
    ///
    /// # Errors
    /// Path and reason.
    pub(crate) fn parse(rules: Vec<RuleText>) -> Result<Self, (String, String)> {
        let rules = rules.into_iter().enumerate().map(|(i, rule)| {
            rule.check().map_err(|(field, reason)| (format!("actions[{i}].{field}"), reason))
        });
        rules.collect::<Result<_, _>>().map(Self)
    }
}

impl Plan {
    /// Whether the peers are told.
    pub(crate) fn tells(&self) -> bool {
        self.tag && !self.shadow
    }

    /// Whether it applies to every exchange.
    pub(crate) fn applies_to_all(&self) -> bool {
        self.sample >= ALL
    }

    /// Whether the rule applies to an exchange with this hash.
    pub(crate) fn applies(&self, hash: u64) -> bool {
        self.sample >= ALL || (hash % u64::from(ALL)) < u64::from(self.sample)
    }
}

/// Whether `text` matches `pattern`, in which `*` stands for any characters, none included. Linear in both but
/// for the last star, which is as good as linear on keys.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on when what follows the last star does not fit: the star, and what it covers so far.
    let mut star: Option<(usize, usize)> = None;
    loop {
        match (pattern.get(p), text.get(t)) {
            (Some(b'*'), _) => {
                star = Some((p, t));
                p += 1;
            }
            (Some(a), Some(b)) if a == b => (p, t) = (p + 1, t + 1),
            (None, None) => return true,
            (_, None) if star.is_none_or(|(_, covered)| covered >= text.len()) => return false,
            _ => {
                let Some((at, covered)) = star else { return false };
                if covered >= text.len() {
                    return false;
                }
                star = Some((at, covered + 1));
                (p, t) = (at + 1, covered + 1);
            }
        }
    }
}

/// A stable hash, fed in pieces. See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SampleHash(u64);

impl SampleHash {
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    }

    pub(crate) fn finish(self) -> u64 {
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

/// A rule as it is written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RuleText {
    /// Pattern over the stream key.
    stream: String,
    #[serde(rename = "do")]
    actions: Vec<Action>,
    /// Classes, or `secrets` and `personal`; both where absent.
    redact: Option<Vec<String>>,
    #[serde(default)]
    mode: Mode,
    percent: Option<f64>,
    status: Option<u16>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Action {
    Observe,
    Tag,
    Redact,
    Block,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Mode {
    #[default]
    Enforce,
    Shadow,
}

impl RuleText {
    fn check(self) -> Result<Rule, (&'static str, String)> {
        let has = |action| self.actions.contains(&action);
        if self.stream.is_empty() {
            return Err(("stream", "the pattern is empty; `*` matches every stream".to_string()));
        }
        if self.actions.is_empty() || has(Action::Observe) && self.actions.len() > 1 {
            let reason = "give `observe` alone, or some of `tag`, `redact`, `block`".to_string();
            return Err(("do", reason));
        }
        let redact = match (has(Action::Redact), &self.redact) {
            (true, None) => Some(ClassSet::REDACTED),
            (true, Some(names)) => Some(classes(names)?),
            (false, Some(_)) => return Err(("redact", "`do` has no `redact`".to_string())),
            (false, None) => None,
        };
        let sample = match self.percent {
            None => ALL,
            Some(percent) if (0.0..=100.0).contains(&percent) => (percent * 100.0 + 0.5) as u32,
            Some(percent) => return Err(("percent", format!("{percent} is not between 0 and 100"))),
        };
        let status = match self.status {
            Some(status) if !(400..=599).contains(&status) => {
                return Err(("status", format!("{status} is no error status (400 to 599)")));
            }
            Some(_) if !has(Action::Block) => {
                return Err(("status", "`do` has no `block`".to_string()));
            }
            status => status.unwrap_or(DEFAULT_STATUS),
        };
        let plan = Plan {
            tag: has(Action::Tag),
            trailers: has(Action::Tag),
            redact,
            block: has(Action::Block),
            shadow: self.mode == Mode::Shadow,
            status,
            sample,
        };
        Ok(Rule { stream: self.stream, plan })
    }
}

fn classes(names: &[String]) -> Result<ClassSet, (&'static str, String)> {
    names.iter().try_fold(ClassSet::NONE, |set, name| {
        let more = match name.as_str() {
            "secrets" => ClassSet::SECRETS,
            "personal" => ClassSet::PERSONAL,
            name => match Class::ALL.into_iter().find(|class| class.name() == name) {
                Some(class) => ClassSet::NONE.with(class),
                None => {
                    let known: Vec<_> = Class::ALL.iter().map(|class| class.name()).collect();
                    let known = known.join(", ");
                    return Err((
                        "redact",
                        format!("unknown class {name:?}; known are secrets, personal, {known}"),
                    ));
                }
            },
        };
        Ok(set.union(more))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rules(json: &str) -> Result<Rules, (String, String)> {
        Rules::parse(serde_json::from_str(json).unwrap())
    }

    #[test]
    fn the_first_rule_that_matches_says_what_to_do() {
        let rules = rules(
            r#"[{"stream": "llm/request/*", "do": ["redact", "block"], "redact": ["email"], "status": 451},
                {"stream": "*.sse", "do": ["block"], "mode": "shadow", "percent": 12.5},
                {"stream": "*", "do": ["observe"]}]"#,
        )
        .unwrap();
        let plan = rules.plan("llm/request/openai.chat.sse");
        assert_eq!(plan.redact, Some(ClassSet::NONE.with(Class::Email)));
        assert_eq!((plan.block, plan.tag, plan.status, plan.sample), (true, false, 451, 10_000));
        let plan = rules.plan("llm/response/openai.chat.sse");
        assert_eq!((plan.block, plan.shadow, plan.status, plan.sample), (true, true, 403, 1250));
        let plan = rules.plan("llm/response/json");
        assert_eq!(plan, Plan { tag: false, ..Plan::default() });
        assert_eq!(Rules::default().plan("x"), Plan::default());
        assert!(Plan::default().tag && rules.sample() && !Rules::default().sample());
    }

    #[test]
    fn a_rule_that_cannot_be_right_is_refused_with_its_place() {
        for (json, path, word) in [
            (r#"[{"stream": "", "do": ["tag"]}]"#, "actions[0].stream", "empty"),
            (r#"[{"stream": "*", "do": []}]"#, "actions[0].do", "observe"),
            (r#"[{"stream": "*", "do": ["observe", "block"]}]"#, "actions[0].do", "alone"),
            (
                r#"[{"stream": "*", "do": ["block"], "redact": ["email"]}]"#,
                "actions[0].redact",
                "no `redact`",
            ),
            (r#"[{"stream": "*", "do": ["redact"], "redact": ["name"]}]"#, "actions[0].redact", "iban"),
            (r#"[{"stream": "*", "do": ["tag"], "percent": 101}]"#, "actions[0].percent", "101"),
            (r#"[{"stream": "*", "do": ["block"], "status": 200}]"#, "actions[0].status", "200"),
            (r#"[{"stream": "*", "do": ["tag"], "status": 403}]"#, "actions[0].status", "no `block`"),
        ] {
            let (at, reason) = rules(json).unwrap_err();
            assert_eq!(at, path);
            assert!(reason.contains(word), "{reason}");
        }
    }

    #[test]
    fn samples_nest_and_have_the_size_asked_for() {
        let hash = |i: u32| {
            let mut hash = SampleHash::new();
            hash.add(format!("3f2a-{i}").as_bytes());
            hash.finish()
        };
        let plan = |sample| Plan { sample, ..Plan::default() };
        for sample in [0, 100, 2500, 10_000] {
            let hit = (0..20_000).filter(|&i| plan(sample).applies(hash(i))).count() as i64;
            let expected = i64::from(sample) * 2;
            assert!((hit - expected).abs() <= 350, "{sample}: {hit}");
        }
        // Who raises the percentage keeps those who were in.
        assert!((0..2000).all(|i| !plan(100).applies(hash(i)) || plan(2500).applies(hash(i))));
        // A number that is written down is one that a change would break.
        assert_eq!(hash(1) % 10_000, 591);
    }

    proptest! {
        #[test]
        fn patterns_match_as_a_naive_matcher_says(pattern in "[ab*]{0,8}", text in "[ab]{0,8}") {
            fn naive(pattern: &[u8], text: &[u8]) -> bool {
                match (pattern.split_first(), text.split_first()) {
                    (None, None) => true,
                    (Some((b'*', rest)), None) => naive(rest, text),
                    (Some((b'*', rest)), Some((_, tail))) => naive(rest, text) || naive(pattern, tail),
                    (Some((a, rest)), Some((b, tail))) => a == b && naive(rest, tail),
                    _ => false,
                }
            }
            prop_assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), naive(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
