//! Where verdicts go: filter state, headers and trailers, one line of JSON, metrics of time and tokens.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;

use super::{Exchange, Plugin, filter_state};
use crate::config::{LogPolicy, StatePolicy};
use crate::content::{Label, Summary};
use crate::host::{Direction, Gauge, Histogram, Host, HostError, Level, Metric, is_tchar};
use crate::refusal::quote;
use driftlock_engine::evidence::{Outcome, Verdict};

/// What was done with a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// Stopped: by a rule, or because it could not be inspected.
    pub(super) stopped: Option<Stop>,
    /// Tokens replaced.
    pub(super) redacted: u64,
    /// What is said was not done.
    pub(super) shadow: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Block,
    Refuse,
}

impl Taken {
    /// One word or two: `block`, `refuse`, `redact;tokens=3`, with `shadow_` before what was not done.
    fn describe(self) -> Option<String> {
        let shadow = if self.shadow { "shadow_" } else { "" };
        let stop = match self.stopped {
            Some(Stop::Block) => Some(format!("{shadow}block")),
            Some(Stop::Refuse) => Some("refuse".to_owned()),
            None => None,
        };
        let redact = (self.redacted > 0).then(|| format!("{shadow}redact;tokens={}", self.redacted));
        match (stop, redact) {
            (Some(stop), Some(redact)) => Some(format!("{stop} {redact}")),
            (stop, redact) => stop.or(redact),
        }
    }
}

impl Exchange {
    pub(super) fn publish(
        &mut self,
        plugin: &mut Plugin,
        host: &mut impl Host,
        direction: Direction,
        verdict: &Verdict,
        taken: Taken,
        summary: Option<&Summary>,
    ) {
        let before = self.worst;
        self.worst = before.max(Some(verdict.outcome));
        host.judged(direction, verdict);
        let action = taken.describe();
        // What the operator excluded is no news.
        let disabled = verdict.reason.as_deref() == Some(super::DISABLED);
        let flagged = matches!(verdict.outcome, Outcome::Anomalous | Outcome::NotInspected) && !disabled;
        let logged = match plugin.report.log {
            LogPolicy::Never => false,
            LogPolicy::Flagged => flagged || action.is_some(),
            LogPolicy::Always => true,
        };
        let observed = plugin.keeper.outbox().filter(|_| !disabled);
        let key = match direction {
            Direction::Request => filter_state::REQUEST,
            Direction::Response => filter_state::RESPONSE,
        };
        let stated = plugin.report.filter_state;
        let brief = stated == StatePolicy::Brief && verdict.outcome == Outcome::Normal && action.is_none();
        let whole = stated != StatePolicy::Never && !brief;
        if brief {
            let said = brief_state(verdict);
            tell(host, |host| host.set_filter_state(key, &said));
        }
        if logged || observed.is_some() || whole {
            let json = verdict.to_json();
            if let Some(outbox) = observed {
                outbox.push(direction.as_str(), &json);
            }
            if whole {
                tell(host, |host| host.set_filter_state(key, &json));
            }
            if logged {
                let warn = verdict.outcome == Outcome::Anomalous || taken.stopped.is_some();
                let level = if warn { Level::Warn } else { Level::Info };
                host.log(level, &line(direction, action.as_deref(), summary, &json));
            }
        }
        if stated != StatePolicy::Never {
            if before != self.worst {
                let outcome = self.worst.map_or("", Outcome::as_str);
                tell(host, |host| host.set_filter_state(filter_state::OUTCOME, outcome));
            }
            if let Some(action) = &action {
                let separator = if self.actions.is_empty() { "" } else { ", " };
                self.actions += &format!("{separator}{}={action}", direction.as_str());
                let actions = &self.actions;
                tell(host, |host| host.set_filter_state(filter_state::ACTION, actions));
            }
        }
    }
}

/// The log line, JSON: what was done, what the provider said, the verdict.
fn line(direction: Direction, action: Option<&str>, summary: Option<&Summary>, verdict: &str) -> String {
    let model = summary.and_then(|summary| summary.model.as_ref());
    let reason = summary.and_then(|summary| summary.finish_reason.as_ref());
    let mut line = format!("{{\"driftlock\":\"{}\"", direction.as_str());
    for (name, value) in [
        ("action", action),
        ("model", model.map(Label::as_str)),
        ("finish_reason", reason.map(Label::as_str)),
    ] {
        if let Some(value) = value {
            line += ",\"";
            line += name;
            line += "\":";
            quote(&mut line, value);
        }
    }
    line += ",\"verdict\":";
    line += verdict;
    line.push('}');
    line
}

/// Makes a host call whose failure must not stop the exchange. Says whether it went well.
pub(super) fn tell<H: Host>(host: &mut H, call: impl FnOnce(&mut H) -> Result<(), HostError>) -> bool {
    let told = call(host).is_ok();
    if !told {
        host.count(Metric::HostCallErrors, 1);
    }
    told
}

/// When what happened, by the proxy's clock.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times {
    pub(super) request_began_ns: Option<u64>,
}

/// Metrics of an answer: tokens as the provider counted them, and how fast they came.
pub(super) fn record_answer(
    host: &mut impl Host,
    summary: &Summary,
    times: Times,
    first_token_ns: Option<u64>,
    streamed: bool,
) {
    if let Some(tokens) = summary.usage.input_tokens {
        host.record(Histogram::InputTokens, tokens);
    }
    if let Some(tokens) = summary.usage.output_tokens {
        host.record(Histogram::OutputTokens, tokens);
    }
    // An answer in one piece says nothing about when its words were made.
    let (Some(first), true) = (first_token_ns, streamed) else { return };
    if let Some(began) = times.request_began_ns {
        host.record(Histogram::TimeToFirstToken, first.saturating_sub(began) / 1_000_000);
    }
    let later = summary.usage.output_tokens.unwrap_or(0).saturating_sub(1);
    let took_ns = host.now_ns().map_or(0, |now| now.saturating_sub(first));
    if let Some(each_ns) = took_ns.checked_div(later).filter(|each| *each > 0) {
        host.record(Histogram::TimePerOutputToken, each_ns / 1000);
        host.record(Histogram::TokensPerSecond, 1_000_000_000 / each_ns);
    }
}

/// Gauges are written once a second at most.
const GAUGE_PERIOD_NS: u64 = 1_000_000_000;

/// What the gauges were last set to.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    written_ns: u64,
    frozen: usize,
    frozen_since_ns: u64,
}

impl Gauges {
    pub(super) fn write(
        &mut self,
        detector: &driftlock_engine::detector::Detector,
        host: &mut impl Host,
        now: u64,
    ) {
        if self.written_ns != 0 && now.saturating_sub(self.written_ns) < GAUGE_PERIOD_NS {
            return;
        }
        self.written_ns = now;
        let frozen = detector.frozen();
        if frozen != self.frozen {
            self.frozen = frozen;
            self.frozen_since_ns = now;
        }
        host.gauge(Gauge::Streams, detector.streams() as u64);
        if frozen > 0 {
            host.gauge(Gauge::BaselineAge, now.saturating_sub(self.frozen_since_ns) / 1_000_000_000);
        }
    }
}

/// Digits of a baseline's digest in a header: enough to find it among many.
const HEADER_DIGITS: usize = 16;

/// The verdict as a structured field item (RFC 9651 section 3.3): a token with parameters. p is `rank / of`; as a
/// decimal of such a field it would have three digits. Without quotes, but for what is no token: a proxy that logs
/// JSON writes what needs no escaping sooner.
pub(super) fn structured_field(verdict: &Verdict) -> String {
    // What it takes with a name of usual length, put together without the formatter: it is made of every message.
    let mut value = String::with_capacity(160);
    write_item(&mut value, verdict, HEADER_DIGITS);
    value
}

/// What filter state says of a message that needs no more: the same with the whole digest, and the engine's version.
fn brief_state(verdict: &Verdict) -> String {
    let mut value = String::with_capacity(224);
    write_item(&mut value, verdict, usize::MAX);
    value += ";engine=v";
    value += verdict.engine_version;
    value
}

fn write_item(value: &mut String, verdict: &Verdict, digits: usize) {
    *value += verdict.outcome.as_str();
    if let Some([rank, of]) = verdict.p_fraction {
        *value += ";rank=";
        push_number(value, rank);
        *value += ";of=";
        push_number(value, of);
    }
    if let Some(unit) = verdict.unit {
        *value += ";unit=";
        *value += unit;
    }
    if let Some(reason) = &verdict.reason {
        *value += ";reason=";
        push_bare(value, reason);
    }
    *value += ";stream=";
    push_bare(value, &verdict.stream);
    if let Some(baseline) = &verdict.baseline {
        *value += ";baseline=sha256:";
        *value += baseline.get(..digits).unwrap_or(baseline);
    }
}

/// As a token if it is one (RFC 9651 section 3.3.4), else as a string (3.3.3).
fn push_bare(value: &mut String, text: &str) {
    let in_token = |byte: u8| is_tchar(byte) || matches!(byte, b':' | b'/');
    if text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '*')
        && text.bytes().all(in_token)
    {
        *value += text;
        return;
    }
    value.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => value.extend(['\\', character]),
            ' '..='~' => value.push(character),
            // A string of such a field has ASCII alone.
            _ => value.push('?'),
        }
    }
    value.push('"');
}

fn push_number(text: &mut String, number: u32) {
    if number >= 10 {
        push_number(text, number / 10);
    }
    text.push(char::from(b'0' + (number % 10) as u8));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_token_is_a_string() {
        let bare = |text: &str| {
            let mut value = String::new();
            push_bare(&mut value, text);
            value
        };
        for token in ["size", "default/request/openai.chat", "encoding:x-snappy", "*"] {
            assert_eq!(bare(token), token);
        }
        assert_eq!(bare("7up/request/json"), "\"7up/request/json\"");
        assert_eq!(bare("learning 3/100"), "\"learning 3/100\"");
        assert_eq!(bare("encoding:a\"b\\c\u{e9}"), "\"encoding:a\\\"b\\\\c?\"");
        assert_eq!(bare(""), "\"\"");
    }
}
