//! What a run is made of, beyond its length: the parameters that a file can hold.
//!
//! Each is off by default, and a default run is the same bytes whether the parameter exists or not: what
//! a parameter draws comes from dice of its own ([`Extra`]), one stream an exchange, so that switching
//! one on changes nothing that it does not concern.
//!
//! A file is a JSON object with the fields of [`SynthOptions`](super::SynthOptions); an unknown field is
//! refused by name. `driftlock synth --example` prints one.

use serde::{Deserialize, Serialize};

use super::dice::Dice;

/// Stream of [`Dice`] for what the parameters draw.
const EXTRA_STREAM: u64 = 1 << 42;

/// Which API a chat goes through, as weights; all zero is the first alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Styles {
    /// OpenAI chat completions.
    pub openai_chat: u64,
    /// OpenAI responses.
    pub openai_responses: u64,
    /// Anthropic messages.
    pub anthropic_messages: u64,
    /// Gemini `generateContent` and `streamGenerateContent`.
    pub gemini: u64,
}

impl Default for Styles {
    fn default() -> Self {
        Self { openai_chat: 1, openai_responses: 0, anthropic_messages: 0, gemini: 0 }
    }
}

/// One API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    OpenaiChat,
    OpenaiResponses,
    AnthropicMessages,
    Gemini,
}

impl Styles {
    pub(super) fn draw(&self, extra: &mut Extra) -> Style {
        let all = [
            (self.openai_chat, Style::OpenaiChat),
            (self.openai_responses, Style::OpenaiResponses),
            (self.anthropic_messages, Style::AnthropicMessages),
            (self.gemini, Style::Gemini),
        ];
        extra.weighted(&all).unwrap_or(Style::OpenaiChat)
    }
}

/// What changes in the traffic while it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drift {
    /// What becomes other.
    pub kind: DriftKind,
    /// The application it happens to; all of them without one.
    #[serde(default)]
    pub application: Option<String>,
    /// The first exchange it can happen to.
    pub at: u64,
    /// From 0 to all of the exchanges over so many; 0 is at once.
    #[serde(default)]
    pub over: u64,
}

/// What becomes other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DriftKind {
    /// Another model answers.
    Model,
    /// Users ask about what another application is for.
    Topic,
}

impl Drift {
    /// Whether it happens to exchange `i`. Every drift draws once, so that one more changes no other.
    fn happens(&self, i: u64, application: &str, extra: &mut Extra) -> bool {
        let draw = extra.0.below(1_000_000);
        let concerned = self.application.as_deref().is_none_or(|name| name == application);
        let share = match i.checked_sub(self.at) {
            None => 0,
            Some(since) if since >= self.over => 1_000_000,
            Some(since) => since * 1_000_000 / self.over,
        };
        concerned && draw < share
    }
}

/// The kind of drift that happens to exchange `i`, if any.
pub(super) fn drifted(drifts: &[Drift], i: u64, application: &str, extra: &mut Extra) -> Option<DriftKind> {
    let mut kind = None;
    for drift in drifts {
        if drift.happens(i, application, extra) {
            kind = Some(drift.kind);
        }
    }
    kind
}

/// What goes wrong, in percent of the exchanges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// The upstream answers 500 with an error object.
    pub upstream_error: u64,
    /// The upstream answers 429.
    pub rate_limited: u64,
    /// The body of the answer ends in the middle.
    pub truncated: u64,
    /// A proxy in between answers with a page.
    pub error_page: u64,
    /// The answer has no body.
    pub empty: u64,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    UpstreamError,
    RateLimited,
    Truncated,
    ErrorPage,
    Empty,
}

impl Fault {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::UpstreamError => "fault_upstream_error",
            Self::RateLimited => "fault_rate_limited",
            Self::Truncated => "fault_truncated",
            Self::ErrorPage => "fault_error_page",
            Self::Empty => "fault_empty",
        }
    }
}

impl Faults {
    pub(super) fn draw(&self, extra: &mut Extra) -> Option<Fault> {
        let mut at = extra.0.below(100);
        for (percent, fault) in [
            (self.upstream_error, Fault::UpstreamError),
            (self.rate_limited, Fault::RateLimited),
            (self.truncated, Fault::Truncated),
            (self.error_page, Fault::ErrorPage),
            (self.empty, Fault::Empty),
        ] {
            if at < percent {
                return Some(fault);
            }
            at -= percent;
        }
        None
    }
}

/// Share of a day's traffic by hour, from midnight UTC.
const HOURS: [u64; 24] = [3, 2, 2, 1, 1, 2, 4, 9, 16, 22, 24, 23, 18, 21, 23, 22, 20, 16, 12, 9, 8, 7, 5, 4];
const DAY_S: u64 = 86_400;

/// Seconds after the run's first midnight at which exchange `i` begins, when a day has `per_day`.
pub(super) fn rhythm_s(i: u64, per_day: u64) -> u64 {
    let all: u64 = HOURS.iter().sum();
    let (day, rest) = (i / per_day, i % per_day);
    // In parts of the day's weight, a second's fraction each.
    let mut at = rest * all * 3_600 / per_day;
    for (hour, weight) in (0..).zip(HOURS) {
        if at < weight * 3_600 {
            return day * DAY_S + hour * 3_600 + at / weight;
        }
        at -= weight * 3_600;
    }
    (day + 1) * DAY_S
}

/// The dice that parameters draw from.
pub(super) struct Extra(pub(super) Dice);

impl Extra {
    /// `place`: the exchange's own stream.
    pub(super) fn new(seed: u64, place: u64) -> Self {
        Self(Dice::new(seed, EXTRA_STREAM + place))
    }

    fn weighted<T: Copy>(&mut self, items: &[(u64, T)]) -> Option<T> {
        let mut at = self.0.below(items.iter().map(|(weight, _)| weight).sum());
        for (weight, item) in items {
            if at < *weight {
                return Some(*item);
            }
            at -= weight;
        }
        None
    }

    /// One of `tenants`, the first the busiest: the k-th has 1/k of its traffic.
    pub(super) fn tenant(&mut self, tenants: u64) -> u64 {
        let weights: Vec<(u64, u64)> = (0..tenants).map(|k| (1_000_000 / (k + 1), k)).collect();
        self.weighted(&weights).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_has_its_rhythm_and_time_never_runs_back() {
        let per_day = 5_000;
        let times: Vec<u64> = (0..3 * per_day).map(|i| rhythm_s(i, per_day)).collect();
        assert!(times.windows(2).all(|pair| pair[0] <= pair[1]));
        assert!(times.iter().all(|time| *time < 3 * DAY_S));
        let in_hour =
            |day: u64, hour: u64| times.iter().filter(|time| **time / 3_600 == day * 24 + hour).count();
        assert_eq!(in_hour(0, 10), in_hour(2, 10));
        assert!(in_hour(1, 10) > 15 * in_hour(1, 3), "{} {}", in_hour(1, 10), in_hour(1, 3));
    }

    #[test]
    fn drift_comes_at_once_or_bit_by_bit() {
        let drift =
            |over| Drift { kind: DriftKind::Model, application: Some("hr".to_owned()), at: 100, over };
        let share = |drift: &Drift, range: std::ops::Range<u64>, app| {
            let n = range.end - range.start;
            let happened = range.filter(|i| drift.happens(*i, app, &mut Extra::new(1, *i))).count() as u64;
            happened * 100 / n
        };
        assert_eq!(share(&drift(0), 0..100, "hr"), 0);
        assert_eq!(share(&drift(0), 100..200, "hr"), 100);
        assert_eq!(share(&drift(0), 100..200, "shop"), 0);
        let gradual = drift(2_000);
        assert!((8..18).contains(&share(&gradual, 100..600, "hr")));
        assert!((80..95).contains(&share(&gradual, 1_600..2_100, "hr")));
    }
}
