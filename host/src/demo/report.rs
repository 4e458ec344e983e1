//! The demo's report: what was flagged, where, why, and whether the bars hold.
//!
//! Plain lines with a few colours; `anstream` takes the colours away where the output is no
//! terminal. One block for each flagged attack, one line for each false alarm.

use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use anstyle::{AnsiColor, Style};

use super::excerpt::{Excerpt, unit_text};
use super::verdict::Verdict;
use crate::synth::{Direction, LabelledExchange};

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const GOOD: Style = Style::new().bold().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Green)));
const BAD: Style = Style::new().bold().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Red)));
const SURPRISE: Style = Style::new()
    .bold()
    .fg_color(Some(anstyle::Color::Ansi(AnsiColor::Black)))
    .bg_color(Some(anstyle::Color::Ansi(AnsiColor::Yellow)));

/// False alarms that are listed; the rest are counted.
const LISTED_FALSE_ALARMS: usize = 5;

/// Share of the normal messages that may be flagged: one in this many.
const FALSE_ALARM_BAR: usize = 100;

/// An exchange with what the filter said of it.
pub(super) struct Judged<'a> {
    pub(super) labelled: &'a LabelledExchange,
    pub(super) request: Option<Verdict>,
    pub(super) response: Option<Verdict>,
    /// Why there is no verdict, or why the client did not get the upstream's bytes.
    pub(super) failure: Option<String>,
}

impl Judged<'_> {
    fn verdicts(&self) -> impl Iterator<Item = (Direction, &Verdict)> {
        let request = self.request.iter().map(|v| (Direction::Request, v));
        request.chain(self.response.iter().map(|v| (Direction::Response, v)))
    }

    fn flagged(&self) -> impl Iterator<Item = (Direction, &Verdict)> {
        self.verdicts().filter(|(_, verdict)| verdict.is_anomalous())
    }

    fn is_attack(&self) -> bool {
        self.labelled.label != "normal"
    }

    /// The attacked message itself was flagged, not just the other one of the exchange.
    fn is_caught(&self) -> bool {
        self.flagged()
            .any(|(direction, _)| self.labelled.spans.iter().any(|span| span.direction == direction))
    }
}

/// How the traffic was made and judged.
pub(super) struct Setting<'a> {
    pub(super) trained: usize,
    pub(super) training_time: Duration,
    pub(super) baseline_digest: &'a str,
    pub(super) baseline_bytes: usize,
    pub(super) streams: usize,
    /// What the filter ran in, for a sentence: `driftlock gateway (wasmtime)`.
    pub(super) proxy: &'a str,
    pub(super) judging_time: Duration,
    /// The command that looks closer at the exchange of this id.
    pub(super) look_closer: &'a dyn Fn(&str) -> String,
}

/// What the run showed, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) attacks: usize,
    pub(super) attacks_flagged: usize,
    pub(super) normal_messages: usize,
    pub(super) normal_messages_flagged: usize,
    pub(super) normal_exchanges: usize,
    pub(super) normal_exchanges_flagged: usize,
    /// Normal messages that no frozen baseline judged.
    pub(super) not_judged: usize,
    pub(super) failures: usize,
}

impl Totals {
    pub(super) fn of(judged: &[Judged<'_>]) -> Self {
        let mut totals = Self::default();
        for one in judged {
            let flagged = one.flagged().count();
            totals.failures += usize::from(one.failure.is_some());
            if one.is_attack() {
                totals.attacks += 1;
                totals.attacks_flagged += usize::from(one.is_caught());
            } else {
                totals.normal_exchanges += 1;
                totals.normal_exchanges_flagged += usize::from(flagged > 0);
                totals.normal_messages += one.verdicts().count();
                totals.normal_messages_flagged += flagged;
                totals.not_judged += one.verdicts().filter(|(_, v)| v.p_value.is_none()).count();
            }
        }
        totals
    }

    pub(super) fn attacks_bar_holds(&self) -> bool {
        self.attacks > 0 && self.attacks_flagged == self.attacks
    }

    pub(super) fn normals_bar_holds(&self) -> bool {
        self.normal_messages > 0 && self.normal_messages_flagged * FALSE_ALARM_BAR <= self.normal_messages
    }

    pub(super) fn bars_hold(&self) -> bool {
        self.attacks_bar_holds() && self.normals_bar_holds() && self.failures == 0
    }
}

/// Writes the whole report.
pub(super) fn write(
    out: &mut impl Write,
    setting: &Setting<'_>,
    judged: &[Judged<'_>],
    totals: &Totals,
) -> io::Result<()> {
    head(out, setting, judged.len())?;
    for (i, one) in judged.iter().filter(|one| one.is_attack()).enumerate() {
        attack(out, setting, i + 1, one)?;
    }
    false_alarms(out, setting, judged, totals)?;
    for one in judged.iter().filter(|one| one.failure.is_some()).take(LISTED_FALSE_ALARMS) {
        let failure = one.failure.as_deref().unwrap_or_default();
        writeln!(out, "  {BAD}failed{BAD:#}  {}: {failure}", one.labelled.exchange.id)?;
    }
    summary(out, totals)
}

fn head(out: &mut impl Write, setting: &Setting<'_>, replayed: usize) -> io::Result<()> {
    writeln!(
        out,
        "\n{BOLD}driftlock demo{BOLD:#}: the traffic of an LLM gateway, through the real filter\n"
    )?;
    writeln!(
        out,
        "  trained   {} normal exchanges, {} streams, {} KiB, in {}",
        setting.trained,
        setting.streams,
        setting.baseline_bytes / 1024,
        Seconds(setting.training_time)
    )?;
    writeln!(out, "  baseline  sha256:{}", setting.baseline_digest)?;
    writeln!(
        out,
        "  judged    {replayed} other exchanges through {} in {}\n",
        setting.proxy,
        Seconds(setting.judging_time)
    )
}

fn attack(out: &mut impl Write, setting: &Setting<'_>, number: usize, one: &Judged<'_>) -> io::Result<()> {
    let labelled = one.labelled;
    let title = labelled.label.replace('_', " ");
    if !one.is_caught() {
        writeln!(
            out,
            "{BAD}{number}. {title}: not flagged{BAD:#}  ({}, {})",
            labelled.application, labelled.exchange.id
        )?;
        for (direction, verdict) in one.verdicts() {
            let p = verdict.p_value.map_or("none".to_owned(), |p| p.to_string());
            let reason = verdict.reason.as_deref().unwrap_or("");
            writeln!(out, "   {}: {} {reason}, p {p}", direction.name(), verdict.outcome)?;
        }
        return writeln!(out);
    }
    for (direction, verdict) in one.flagged() {
        writeln!(
            out,
            "{BOLD}{number}. {title}{BOLD:#}  {}, {}, {}  {DIM}{}{DIM:#}",
            labelled.application,
            direction.name(),
            unit_name(verdict),
            labelled.exchange.id
        )?;
        where_and_why(out, labelled, direction, verdict)?;
        also_strange(out, labelled, direction, verdict)?;
        if let (Some(p), Some([rank, of])) = (verdict.p_value, verdict.p_fraction) {
            writeln!(
                out,
                "   p      {p} ({} of {} calibration messages are as strange), alpha {}",
                rank.saturating_sub(1),
                of.saturating_sub(1),
                verdict.alpha
            )?;
        }
        writeln!(out, "   base   {} of stream {}", verdict.short_baseline(), verdict.stream)?;
        writeln!(out, "   look   {}\n", (setting.look_closer)(&labelled.exchange.id))?;
    }
    Ok(())
}

fn where_and_why(
    out: &mut impl Write,
    labelled: &LabelledExchange,
    direction: Direction,
    verdict: &Verdict,
) -> io::Result<()> {
    let text = verdict
        .unit
        .as_deref()
        .and_then(|unit| unit_text(&labelled.exchange, direction, unit, verdict.unit_index.unwrap_or(0)));
    if let (Some(span), Some(text)) = (verdict.spans.first(), text) {
        let Excerpt { before, inside, after } = Excerpt::cut(&text, span.start, span.end);
        writeln!(out, "   where  {DIM}{before}{DIM:#}{SURPRISE}{inside}{SURPRISE:#}{DIM}{after}{DIM:#}")?;
        writeln!(
            out,
            "   why    bytes {} to {} cost {:.0} bits, normal text of that length {:.0}",
            span.start, span.end, span.bits, span.expected_bits
        )?;
    } else if let Some(scores) = &verdict.scores {
        writeln!(
            out,
            "   why    {:.2} bits per byte over the whole unit, normal is {:.2}",
            scores.mean_bits, scores.expected_mean_bits
        )?;
    }
    Ok(())
}

/// The unit that the attack is known to sit in, where another one decided.
fn also_strange(
    out: &mut impl Write,
    labelled: &LabelledExchange,
    direction: Direction,
    verdict: &Verdict,
) -> io::Result<()> {
    let known = labelled.spans.iter().filter(|span| span.direction == direction);
    for span in known.filter(|span| verdict.unit.as_deref() != Some(&span.unit)) {
        let unit = verdict.units.iter().find(|u| u.unit == span.unit && usize::from(u.index) == span.index);
        if let Some(unit) = unit {
            writeln!(out, "   also   {} costs {:.2} bits per byte", span.unit, unit.mean_bits)?;
        }
    }
    Ok(())
}

fn unit_name(verdict: &Verdict) -> String {
    let unit = verdict.unit.as_deref().unwrap_or("message").replace('_', " ");
    match verdict.unit_index {
        Some(index) if index > 0 => format!("{unit} {}", index + 1),
        _ => unit,
    }
}

fn false_alarms(
    out: &mut impl Write,
    setting: &Setting<'_>,
    judged: &[Judged<'_>],
    totals: &Totals,
) -> io::Result<()> {
    if totals.normal_messages_flagged == 0 {
        return Ok(());
    }
    writeln!(out, "{BOLD}False alarms{BOLD:#}")?;
    let alarms = judged
        .iter()
        .filter(|one| !one.is_attack())
        .flat_map(|one| one.flagged().map(move |(direction, verdict)| (one, direction, verdict)));
    for (one, direction, verdict) in alarms.take(LISTED_FALSE_ALARMS) {
        writeln!(
            out,
            "   {}, {}, {}: p {}  {DIM}{}{DIM:#}",
            one.labelled.application,
            direction.name(),
            unit_name(verdict),
            verdict.p_value.unwrap_or_default(),
            (setting.look_closer)(&one.labelled.exchange.id)
        )?;
    }
    let rest = totals.normal_messages_flagged.saturating_sub(LISTED_FALSE_ALARMS);
    if rest > 0 {
        writeln!(out, "   and {rest} more")?;
    }
    writeln!(out)
}

fn summary(out: &mut impl Write, totals: &Totals) -> io::Result<()> {
    line(
        out,
        totals.attacks_bar_holds(),
        format_args!("{} of {} anomalies flagged (bar: all)", totals.attacks_flagged, totals.attacks),
    )?;
    line(
        out,
        totals.normals_bar_holds(),
        format_args!(
            "{} of {} normal messages flagged, {} (bar: at most 1 %); {} of {} exchanges",
            totals.normal_messages_flagged,
            totals.normal_messages,
            Percent(totals.normal_messages_flagged, totals.normal_messages),
            totals.normal_exchanges_flagged,
            totals.normal_exchanges
        ),
    )?;
    if totals.not_judged > 0 {
        writeln!(
            out,
            "  {DIM}note{DIM:#}  {} normal messages belong to streams that are too rare to have a baseline yet",
            totals.not_judged
        )?;
    }
    line(
        out,
        totals.failures == 0,
        format_args!("{} exchanges failed; every other client got the upstream's bytes", totals.failures),
    )
}

fn line(out: &mut impl Write, holds: bool, text: fmt::Arguments<'_>) -> io::Result<()> {
    let (style, word) = if holds { (GOOD, "ok") } else { (BAD, "MISSED") };
    writeln!(out, "  {style}{word:6}{style:#} {text}")
}

struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} s", self.0.as_secs_f64())
    }
}

struct Percent(usize, usize);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} %", self.0 as f64 * 100.0 / self.1.max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::{SynthOptions, generate};

    fn verdict(outcome: &str) -> Verdict {
        let json = format!(
            r#"{{"stream":"s","unit":"target","unit_index":0,"outcome":"{outcome}","p_value":0.002,"p_fraction":[1,500],
                "alpha":0.002,"scores":null,"spans":[{{"start":4,"end":8,"bits":40.5,"expected_bits":3.0}}],
                "units":[],"baseline":"0123456789abcdef","engine_version":"0"}}"#
        );
        serde_json::from_str(&json).expect("a verdict")
    }

    fn judged<'a>(labelled: &'a LabelledExchange, request: &str, response: &str) -> Judged<'a> {
        Judged { labelled, request: Some(verdict(request)), response: Some(verdict(response)), failure: None }
    }

    fn traffic() -> Vec<LabelledExchange> {
        generate(&SynthOptions { count: 200, anomalies: 5, ..SynthOptions::default() })
    }

    #[test]
    fn an_attack_counts_only_where_it_is() {
        let traffic = traffic();
        let injection = traffic.iter().find(|l| l.label == "sql_injection").expect("one of each");
        assert_eq!(Totals::of(&[judged(injection, "anomalous", "normal")]).attacks_flagged, 1);
        assert_eq!(Totals::of(&[judged(injection, "normal", "anomalous")]).attacks_flagged, 0);
    }

    #[test]
    fn the_bar_for_normals_is_one_percent_of_messages() {
        let traffic = traffic();
        let normals: Vec<_> = traffic.iter().filter(|l| l.label == "normal").collect();
        let totals_with = |flagged: usize| {
            let judged: Vec<_> = normals
                .iter()
                .enumerate()
                .map(|(i, l)| judged(l, if i < flagged { "anomalous" } else { "normal" }, "normal"))
                .collect();
            Totals::of(&judged)
        };
        assert!(totals_with(4).normals_bar_holds(), "4 of 400");
        assert!(!totals_with(5).normals_bar_holds(), "5 of 400");
        assert!(!totals_with(0).bars_hold(), "no attack was sent");
    }

    #[test]
    fn a_failed_exchange_breaks_the_bars() {
        let traffic = traffic();
        let mut all: Vec<_> = traffic
            .iter()
            .map(|l| {
                if l.label == "normal" {
                    judged(l, "normal", "normal")
                } else {
                    judged(l, "anomalous", "anomalous")
                }
            })
            .collect();
        assert!(Totals::of(&all).bars_hold());
        all[0].failure = Some("broke off".to_owned());
        assert!(!Totals::of(&all).bars_hold());
    }

    #[test]
    fn the_report_says_what_where_why_and_how_to_look_closer() {
        let traffic = traffic();
        let all: Vec<_> = traffic
            .iter()
            .map(|l| judged(l, if l.label == "sql_injection" { "anomalous" } else { "normal" }, "normal"))
            .collect();
        let setting = Setting {
            trained: 1,
            training_time: Duration::ZERO,
            baseline_digest: "feed",
            baseline_bytes: 4096,
            streams: 2,
            proxy: "a proxy",
            judging_time: Duration::ZERO,
            look_closer: &|id| format!("driftlock explain --id {id}"),
        };
        let mut out = anstream::StripStream::new(Vec::new());
        write(&mut out, &setting, &all, &Totals::of(&all)).expect("a Vec takes it all");
        let text = String::from_utf8(out.into_inner()).expect("UTF-8");
        for part in [
            "sha256:feed",
            "5. sql injection  rest, request, target  a000004",
            "cost 40 bits, normal text of that length 3",
            "0.002 (0 of 499 calibration messages are as strange), alpha 0.002",
            "driftlock explain --id a000004",
            "1. jailbreak: not flagged",
            "MISSED 1 of 5 anomalies",
            "ok     0 of 400 normal messages flagged, 0.00 %",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert!(!text.contains('\x1b'));
    }
}
