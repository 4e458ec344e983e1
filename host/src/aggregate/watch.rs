//! What the observations of many proxies say together, stream by stream.
//!
//! What: each observation is a verdict. Per stream and baseline, in the order of the file of observations:
//! - **which of the flagged messages to look at**: online control of the false discovery rate
//!   ([`OnlineFdr`]): of the messages called a discovery the expected share of normal ones stays below a level;
//! - **has the stream moved**: the first messages are the baseline window, and at every hop the latest ones are
//!   held against them ([`DriftMonitor`]), with the kinds of unit that a shift comes from ([`Drivers`]). Since
//!   many streams are watched, Benjamini and Hochberg's rule over their latest p-values says which of them
//!   moved so that of those named the expected share of unmoved ones stays below the level;
//! - **the season** (if slots are set): the message's rank among the same hours of the week
//!   ([`SeasonalCalibration`]), which then decides on discoveries in place of the filter's.
//!
//! Why here: one proxy sees a part of a stream, and a filter keeps no history.
//!
//! The state is a function of the lines in their order, the time of receipt among them, so it is made again from
//! the file when the service starts.
//!
//! Cost: a parse a line; a stream holds at most the reference's and the window's rows with a few units each, some
//! 100 KB. At most [`MAX_STREAMS`] pairs of stream and baseline; then the one unheard of for longest is forgotten.
//!
//! Left out on purpose: words and excerpts, since observations hold no text (`driftlock drift` has captures); and
//! blocking, which is the filter's.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;

use driftlock_engine::adapt::{AdaptError, RankedBy, Season, SeasonOptions, SeasonalCalibration};
use driftlock_engine::baseline::Digest;
use driftlock_engine::calibrate::{PValue, UNIT_SCORE};
use driftlock_engine::drift::{
    Budget, DriftError, DriftMonitor, DriftOptions, DriftVerdict, Drivers, Extent, Row, Side,
};
use driftlock_engine::significance::{
    Dependence, FdrError, FdrOptions, OnlineFdr, Procedure, false_discoveries,
};
use serde::{Deserialize, Serialize};

use crate::drift::{Moving, moving};

/// Most pairs of stream and baseline that are followed.
pub const MAX_STREAMS: usize = 256;

/// Discoveries remembered for each.
const RECENT: usize = 32;

/// Kinds of unit of a stream; further ones share a name.
const MAX_KINDS: usize = 32;
const OTHERS: &str = "others";

/// How streams are followed.
#[derive(Clone, Debug, clap::Args)]
pub struct WatchArgs {
    /// False discovery rate to hold among the messages called discoveries.
    #[arg(long, default_value_t = 0.05, value_name = "SHARE")]
    pub fdr: f64,
    /// Messages that the FDR procedure looks back over.
    #[arg(long, default_value_t = 3000, value_name = "MESSAGES")]
    pub fdr_window: u32,
    /// Chance of any false drift alarm in the life of a stream's baseline.
    #[arg(long, default_value_t = 0.01, value_name = "CHANCE")]
    pub drift_alpha: f64,
    /// Messages of the drift test's baseline window, from the first on.
    #[arg(long, default_value_t = 400, value_name = "MESSAGES")]
    pub drift_reference: u32,
    /// Messages of its observation window.
    #[arg(long, default_value_t = 400, value_name = "MESSAGES")]
    pub drift_window: u32,
    /// Messages from one look to the next.
    #[arg(long, default_value_t = 25, value_name = "MESSAGES")]
    pub drift_hop: u32,
    /// Rank messages among the same hours of the week, in slots of so many hours; 0 for not at all.
    #[arg(long, default_value_t = 0, value_name = "HOURS")]
    pub season_slot_hours: u32,
    /// Local time less UTC, for the slots.
    #[arg(long, default_value_t = 0, value_name = "MINUTES", allow_hyphen_values = true)]
    pub utc_offset_minutes: i32,
    /// Level at which messages are flagged within their slot.
    #[arg(long, default_value_t = 0.002, value_name = "ALPHA")]
    pub season_alpha: f64,
}

impl Default for WatchArgs {
    fn default() -> Self {
        Self {
            fdr: 0.05,
            fdr_window: 3000,
            drift_alpha: 0.01,
            drift_reference: 400,
            drift_window: 400,
            drift_hop: 25,
            season_slot_hours: 0,
            utc_offset_minutes: 0,
            season_alpha: 0.002,
        }
    }
}

/// Options that nothing can be followed by.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// `--fdr`, `--fdr-window`.
    #[error(transparent)]
    Fdr(#[from] FdrError),
    /// `--drift-…`.
    #[error(transparent)]
    Drift(#[from] DriftError),
    /// `--season-…`.
    #[error(transparent)]
    Season(#[from] AdaptError),
}

/// One line of the file.
#[derive(Deserialize)]
struct Observation<'a> {
    #[serde(default)]
    received_unix_ms: u64,
    #[serde(borrow)]
    verdict: ObservedVerdict<'a>,
}

#[derive(Deserialize)]
struct ObservedVerdict<'a> {
    #[serde(borrow)]
    stream: Cow<'a, str>,
    #[serde(borrow)]
    outcome: Cow<'a, str>,
    #[serde(borrow, default)]
    reason: Option<Cow<'a, str>>,
    #[serde(default)]
    p_fraction: Option<[u32; 2]>,
    #[serde(borrow, default)]
    baseline: Option<Cow<'a, str>>,
    #[serde(default)]
    scores: Option<ObservedScores>,
    metrics: ObservedMetrics,
    #[serde(borrow, default)]
    units: Vec<ObservedUnit<'a>>,
    #[serde(borrow, default)]
    unit: Option<Cow<'a, str>>,
    #[serde(default)]
    spans: Vec<ObservedSpan>,
}

#[derive(Deserialize)]
struct ObservedScores {
    #[serde(default)]
    statistic: Option<f64>,
}

#[derive(Deserialize)]
struct ObservedMetrics {
    bytes: u64,
    code_length_bits: f64,
}

#[derive(Deserialize)]
struct ObservedUnit<'a> {
    #[serde(borrow)]
    unit: Cow<'a, str>,
    bytes: u64,
    mean_bits: f64,
}

/// A span as the verdict has it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct ObservedSpan {
    start: u64,
    end: u64,
    bits: f64,
    expected_bits: f64,
}

/// Bits to 1/256 bit.
fn fixed(bits: f64) -> u64 {
    (bits.clamp(0.0, 1e15) * 256.0) as u64
}

/// A message's row and its kinds of unit: name, bytes, cost.
#[derive(Clone, Debug, Default)]
struct Parts {
    row: Row,
    units: Vec<(u8, u64, u64)>,
}

/// A message that the FDR procedure called a discovery.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Discovery {
    /// Which of the stream's judged messages, from 1.
    pub message: u64,
    /// When its observation came, milliseconds since 1970; 0 if unknown.
    pub received_unix_ms: u64,
    /// Its p-value, as a fraction.
    pub p_fraction: [u32; 2],
    /// The deciding unit.
    pub unit: Option<String>,
    /// Where it costs more than expected.
    pub spans: Vec<ObservedSpan>,
}

#[derive(Debug)]
struct Stream {
    /// The observation that was its latest.
    heard: u64,
    outcomes: BTreeMap<String, u64>,
    judged: u64,
    fdr: OnlineFdr,
    recent: VecDeque<Discovery>,
    kinds: Vec<String>,
    reference: Vec<Parts>,
    window: VecDeque<Parts>,
    monitor: Option<DriftMonitor>,
    look: Option<DriftVerdict>,
    /// Judged message at which drift was first found.
    alarm_at: Option<u64>,
    season: Option<SeasonalCalibration>,
    seasonal: [u64; 3],
    seasonal_flagged: u64,
}

/// All streams.
#[derive(Debug)]
pub struct Watch {
    fdr: FdrOptions,
    drift: DriftOptions,
    reference_rows: usize,
    season: Option<SeasonOptions>,
    streams: BTreeMap<(String, String), Stream>,
    observations: u64,
    unreadable: u64,
    forgotten: u64,
}

fn ppm(share: f64) -> u32 {
    (share.clamp(0.0, 1.0) * 1e6).round() as u32
}

impl Watch {
    /// Nothing observed yet.
    ///
    /// # Errors
    /// [`WatchError`] says which option does not fit.
    pub fn new(args: &WatchArgs) -> Result<Self, WatchError> {
        let level = ppm(args.fdr);
        let fdr = FdrOptions {
            procedure: Procedure::WindowBh { window: args.fdr_window },
            alpha_ppm: level,
            initial_ppm: level,
            ..FdrOptions::default()
        };
        OnlineFdr::new(fdr)?;
        let drift = DriftOptions {
            alpha_ppm: ppm(args.drift_alpha),
            window: Extent::Rows(args.drift_window),
            hop: Extent::Rows(args.drift_hop),
            budget: Budget::WholeRun { looks: 16 },
            ..DriftOptions::default()
        };
        let reference_rows = args.drift_reference as usize;
        DriftMonitor::new("", &[0; 32], vec![Row::default(); reference_rows], drift)?;
        let season = (args.season_slot_hours > 0).then(|| {
            let alpha_ppm = ppm(args.season_alpha);
            let least = driftlock_engine::calibrate::messages_for_alpha(alpha_ppm).max(20);
            SeasonOptions {
                season: Season {
                    slot_hours: args.season_slot_hours,
                    utc_offset_minutes: args.utc_offset_minutes,
                },
                alpha_ppm,
                admit_above_ppm: alpha_ppm.saturating_mul(2),
                keep: least.saturating_mul(2),
                least,
            }
        });
        season.map(SeasonalCalibration::new).transpose()?;
        Ok(Self {
            fdr,
            drift,
            reference_rows,
            season,
            streams: BTreeMap::new(),
            observations: 0,
            unreadable: 0,
            forgotten: 0,
        })
    }

    /// Takes one line of the file.
    pub fn observe(&mut self, line: &[u8]) {
        let Ok(observation) = serde_json::from_slice::<Observation<'_>>(line) else {
            self.unreadable += 1;
            return;
        };
        self.observations += 1;
        let Observation { received_unix_ms, verdict } = observation;
        let key = (verdict.stream.to_string(), verdict.baseline.as_deref().unwrap_or_default().to_owned());
        if !self.streams.contains_key(&key) {
            self.make_room();
            let Ok(fdr) = OnlineFdr::new(self.fdr) else { return };
            let season = self.season.and_then(|options| SeasonalCalibration::new(options).ok());
            self.streams.insert(
                key.clone(),
                Stream {
                    heard: 0,
                    outcomes: BTreeMap::new(),
                    judged: 0,
                    fdr,
                    recent: VecDeque::new(),
                    kinds: vec![OTHERS.to_owned()],
                    reference: Vec::new(),
                    window: VecDeque::new(),
                    monitor: None,
                    look: None,
                    alarm_at: None,
                    season,
                    seasonal: [0; 3],
                    seasonal_flagged: 0,
                },
            );
        }
        let Some(stream) = self.streams.get_mut(&key) else { return };
        stream.heard = self.observations;
        *stream.outcomes.entry(verdict.outcome.to_string()).or_default() += 1;
        let Some([rank, of]) = verdict.p_fraction else { return };
        stream.judged += 1;
        let season_alpha = self.season.map_or(0, |options| options.alpha_ppm);
        stream.decide(&key.0, PValue { rank, of }, received_unix_ms, season_alpha, &verdict);
        // A part of a message says nothing about messages.
        if verdict.reason.is_none() {
            let parts = stream.parts(&verdict);
            stream.watch(&key, parts, received_unix_ms, self.drift, self.reference_rows);
        }
    }

    fn make_room(&mut self) {
        if self.streams.len() < MAX_STREAMS {
            return;
        }
        let oldest = self.streams.iter().min_by_key(|(_, stream)| stream.heard).map(|(key, _)| key.clone());
        if let Some(key) = oldest {
            self.streams.remove(&key);
            self.forgotten += 1;
        }
    }

    /// What is known now.
    pub fn report(&self) -> Report {
        let looks: Vec<(&(String, String), PValue)> =
            self.streams.iter().filter_map(|(key, stream)| Some((key, stream.look?.p))).collect();
        let p: Vec<PValue> = looks.iter().map(|(_, p)| *p).collect();
        let moved = false_discoveries(&p, self.fdr.alpha_ppm, Dependence::Positive);
        let named: Vec<&(String, String)> =
            looks.iter().zip(moved).filter(|(_, moved)| *moved).map(|((key, _), _)| *key).collect();
        let streams = self.streams.iter();
        Report {
            observations: self.observations,
            unreadable: self.unreadable,
            forgotten_streams: self.forgotten,
            fdr: f64::from(self.fdr.alpha_ppm) / 1e6,
            streams: streams
                .map(|(key, stream)| stream.report(key, self.reference_rows, named.contains(&key)))
                .collect(),
        }
    }
}

impl Stream {
    fn decide(
        &mut self,
        name: &str,
        own: PValue,
        received_unix_ms: u64,
        season_alpha: u32,
        verdict: &ObservedVerdict<'_>,
    ) {
        let mut p = own;
        if let Some(season) = &mut self.season
            && verdict.reason.is_none()
            && let Some(bits) = verdict.scores.as_ref().and_then(|scores| scores.statistic)
        {
            // Verdicts are rounded to a thousandth of a bit; all of these are, so ranks are as if none were.
            let statistic = (bits.clamp(0.0, 1e6) * UNIT_SCORE as f64) as i64;
            let (ranked, by) = season.observe(statistic, received_unix_ms.saturating_mul(1_000_000), own);
            p = ranked;
            let [by_slot, by_pool, by_baseline] = &mut self.seasonal;
            *match by {
                RankedBy::Slot(_) => by_slot,
                RankedBy::Pool => by_pool,
                RankedBy::Baseline => by_baseline,
            } += 1;
            self.seasonal_flagged += u64::from(by != RankedBy::Baseline && p.at_most(season_alpha));
        }
        if self.fdr.test(p) {
            tracing::warn!(
                stream = name,
                message = self.judged,
                p = format!("{}/{}", p.rank, p.of),
                unit = verdict.unit.as_deref(),
                "discovery: a message is anomalous at the false discovery rate"
            );
            if self.recent.len() >= RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back(Discovery {
                message: self.judged,
                received_unix_ms,
                p_fraction: [p.rank, p.of],
                unit: verdict.unit.as_deref().map(ToOwned::to_owned),
                spans: verdict.spans.clone(),
            });
        }
    }

    fn parts(&mut self, verdict: &ObservedVerdict<'_>) -> Parts {
        let row = Row { bytes: verdict.metrics.bytes, cost: fixed(verdict.metrics.code_length_bits) };
        let mut rest = row;
        let mut units = Vec::with_capacity(verdict.units.len() + 1);
        for unit in &verdict.units {
            let cost = fixed(unit.mean_bits * unit.bytes as f64).min(rest.cost);
            let bytes = unit.bytes.min(rest.bytes);
            rest = Row { bytes: rest.bytes - bytes, cost: rest.cost - cost };
            units.push((self.kind(&unit.unit), bytes, cost));
        }
        // A verdict lists its strangest units.
        if rest.bytes > 0 {
            units.push((self.kind(OTHERS), rest.bytes, rest.cost));
        }
        Parts { row, units }
    }

    fn kind(&mut self, name: &str) -> u8 {
        let at = match self.kinds.iter().position(|known| known == name) {
            Some(at) => at,
            None if self.kinds.len() >= MAX_KINDS => 0,
            None => {
                self.kinds.push(name.to_owned());
                self.kinds.len() - 1
            }
        };
        at as u8
    }

    fn watch(
        &mut self,
        (name, baseline): &(String, String),
        parts: Parts,
        received_unix_ms: u64,
        options: DriftOptions,
        reference_rows: usize,
    ) {
        let Some(monitor) = &mut self.monitor else {
            self.reference.push(parts);
            if self.reference.len() >= reference_rows {
                let rows = self.reference.iter().map(|parts| parts.row).collect();
                let seed = Digest::of(baseline.as_bytes()).0;
                self.monitor = DriftMonitor::new(name, &seed, rows, options).ok();
            }
            return;
        };
        let row = parts.row;
        self.window.push_back(parts);
        if let Extent::Rows(most) = options.window
            && self.window.len() > most as usize
        {
            self.window.pop_front();
        }
        let Some(look) = monitor.observe(row, received_unix_ms.saturating_mul(1_000_000)) else { return };
        self.look = Some(look);
        if look.alarm && self.alarm_at.is_none() {
            self.alarm_at = Some(self.judged);
            let [largest, ..] = look.shifts;
            tracing::warn!(
                stream = name,
                message = self.judged,
                p = format!("{}/{}", look.p.rank, look.p.of),
                moved = moving(&largest).sentence,
                units = self.units(&look).iter().map(|unit| unit.unit.as_str()).collect::<Vec<_>>().join(" "),
                "drift: the stream has moved away from its baseline window"
            );
        }
    }

    /// The kinds of unit that the largest shift comes from.
    fn units(&self, look: &DriftVerdict) -> Vec<UnitShare> {
        let mut drivers = Drivers::new(0);
        let samples = [(Side::Reference, self.reference.iter().collect::<Vec<_>>())]
            .into_iter()
            .chain([(Side::Window, self.window.iter().collect())]);
        for (side, sample) in samples {
            for parts in sample {
                drivers.begin(side);
                for &(kind, bytes, cost) in &parts.units {
                    let kind = self.kinds.get(usize::from(kind)).map_or(OTHERS, String::as_str);
                    drivers.sums(kind, bytes, cost);
                }
            }
        }
        let [largest, ..] = look.shifts;
        let units = drivers.units(largest.statistic, largest.moved, 4);
        let share = |driver: driftlock_engine::drift::Driver| UnitShare {
            unit: driver.name.unwrap_or_default(),
            contribution: crate::drift::in_unit(largest.statistic, driver.contribution),
        };
        units.into_iter().map(share).collect()
    }

    fn report(
        &self,
        (stream, baseline): &(String, String),
        reference_rows: usize,
        among_streams: bool,
    ) -> StreamReport {
        let state = match (&self.monitor, self.alarm_at) {
            (_, Some(_)) => "alarm",
            (Some(_), None) if self.look.is_some_and(|look| !look.reachable) => "out_of_budget",
            (Some(_), None) => "watching",
            (None, _) => "collecting",
        };
        StreamReport {
            stream: stream.clone(),
            baseline: baseline.clone(),
            outcomes: self.outcomes.clone(),
            judged: self.judged,
            discoveries: self.fdr.rejected(),
            recent_discoveries: self.recent.iter().cloned().collect(),
            drift: DriftReport {
                state,
                reference_messages: self.reference.len() as u64,
                reference_needed: reference_rows as u64,
                window_messages: self.window.len() as u64,
                look: self.look.map(|look| look.look),
                p_fraction: self.look.map(|look| [look.p.rank, look.p.of]),
                alarm_at_message: self.alarm_at,
                moved_among_streams: among_streams,
                shifts: self.look.map_or_else(Vec::new, |look| look.shifts.iter().map(moving).collect()),
                units: self.look.map_or_else(Vec::new, |look| self.units(&look)),
            },
            season: self.season.as_ref().map(|_| {
                let [by_slot, by_pool, by_baseline] = self.seasonal;
                SeasonReport { by_slot, by_pool, by_baseline, flagged: self.seasonal_flagged }
            }),
        }
    }
}

/// `GET /v1/streams`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Observations read.
    pub observations: u64,
    /// Lines that are none.
    pub unreadable: u64,
    /// Streams that were forgotten for want of room.
    pub forgotten_streams: u64,
    /// Level of the false discovery rate, over messages and over streams.
    pub fdr: f64,
    /// By stream and baseline.
    pub streams: Vec<StreamReport>,
}

/// One stream under one baseline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StreamReport {
    /// Stream key.
    pub stream: String,
    /// SHA-256 of the baseline; empty for messages judged by none.
    pub baseline: String,
    /// Messages by outcome.
    pub outcomes: BTreeMap<String, u64>,
    /// Messages with a p-value.
    pub judged: u64,
    /// Of these, discoveries.
    pub discoveries: u64,
    /// The latest, oldest first.
    pub recent_discoveries: Vec<Discovery>,
    /// Has it moved?
    pub drift: DriftReport,
    /// How the season ranked, if it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub season: Option<SeasonReport>,
}

/// The drift test of a stream.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DriftReport {
    /// `collecting` the baseline window, `watching`, `alarm` (from the first alarm on), `out_of_budget`.
    pub state: &'static str,
    /// Messages of the baseline window so far.
    pub reference_messages: u64,
    /// Of so many.
    pub reference_needed: u64,
    /// Messages of the observation window.
    pub window_messages: u64,
    /// The latest look, from 0.
    pub look: Option<u64>,
    /// Its p-value, of the largest of all shifts.
    pub p_fraction: Option<[u32; 2]>,
    /// The judged message at which the first alarm came, from 1.
    pub alarm_at_message: Option<u64>,
    /// Benjamini and Hochberg over all streams' latest looks name this one.
    pub moved_among_streams: bool,
    /// What moved, largest first.
    pub shifts: Vec<Moving>,
    /// The kinds of unit that the first of them comes from.
    pub units: Vec<UnitShare>,
}

/// A kind of unit's part in a shift.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UnitShare {
    /// Kind.
    pub unit: String,
    /// Its term in the shift: bits a byte, bytes a message or bits a message.
    pub contribution: f64,
}

/// Messages by what ranked them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SeasonReport {
    /// The same hours of the week.
    pub by_slot: u64,
    /// All recent messages.
    pub by_pool: u64,
    /// The baseline's calibration.
    pub by_baseline: u64,
    /// Flagged among the former two.
    pub flagged: u64,
}

/// A label's value in the text format of Prometheus.
fn label(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

impl Report {
    /// As Prometheus' text format, version 0.0.4.
    pub fn metrics(&self) -> String {
        let mut out = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, f64)>| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(out, "{name}{labels} {value}");
            }
        };
        let one = |value: u64| vec![(String::new(), value as f64)];
        family("driftlock_observations_total", "counter", "Observations read.", one(self.observations));
        family(
            "driftlock_observations_unreadable_total",
            "counter",
            "Lines that are none.",
            one(self.unreadable),
        );
        family(
            "driftlock_streams_forgotten_total",
            "counter",
            "Streams forgotten for want of room.",
            one(self.forgotten_streams),
        );
        let labels = |stream: &StreamReport| {
            let baseline = stream.baseline.get(..16).unwrap_or(&stream.baseline);
            format!("stream=\"{}\",baseline=\"{}\"", label(&stream.stream), label(baseline))
        };
        let by_stream = |value: &dyn Fn(&StreamReport) -> Option<f64>| -> Vec<(String, f64)> {
            let streams = self.streams.iter();
            streams.filter_map(|stream| Some((format!("{{{}}}", labels(stream)), value(stream)?))).collect()
        };
        let outcomes = self.streams.iter().flat_map(|stream| {
            stream.outcomes.iter().map(move |(outcome, &count)| {
                (format!("{{{},outcome=\"{}\"}}", labels(stream), label(outcome)), count as f64)
            })
        });
        family("driftlock_messages_total", "counter", "Messages by outcome.", outcomes.collect());
        family(
            "driftlock_discoveries_total",
            "counter",
            "Messages called anomalous at the false discovery rate.",
            by_stream(&|stream| Some(stream.discoveries as f64)),
        );
        family(
            "driftlock_drift_alarm",
            "gauge",
            "1 from the first drift alarm on.",
            by_stream(&|stream| Some(f64::from(u8::from(stream.drift.alarm_at_message.is_some())))),
        );
        family(
            "driftlock_drift_moved_among_streams",
            "gauge",
            "1 if the latest looks of all streams, held to the false discovery rate, name this one.",
            by_stream(&|stream| Some(f64::from(u8::from(stream.drift.moved_among_streams)))),
        );
        family(
            "driftlock_drift_p_value",
            "gauge",
            "p-value of the latest look at a stream.",
            by_stream(&|stream| {
                stream.drift.p_fraction.map(|[rank, of]| f64::from(rank) / f64::from(of.max(1)))
            }),
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn args() -> WatchArgs {
        WatchArgs { drift_reference: 100, drift_window: 100, ..WatchArgs::default() }
    }

    /// A verdict as a filter posts it. `strange` of 2,000 calibration messages.
    fn line(stream: &str, rank: u32, bytes: u64, bits: f64, received_unix_ms: u64) -> Vec<u8> {
        let half = bytes / 2;
        json!({"received_unix_ms": received_unix_ms, "message": "request", "verdict": {
            "stream": stream, "outcome": if rank <= 4 { "anomalous" } else { "normal" },
            "p_fraction": [rank, 2001], "baseline": "00ff", "alpha": 0.002, "unit": "user",
            "scores": {"statistic": 11.0 - f64::from(rank).log2(), "view": "total"},
            "metrics": {"bytes": bytes, "code_length_bits": bits},
            "spans": [{"start": 3, "end": 9, "body_start": 3, "body_end": 9, "bits": 80.0, "expected_bits": 12.0}],
            "units": [{"unit": "user", "index": 0, "bytes": half, "mean_bits": (bits - 2.0 * half as f64) / half as f64},
                      {"unit": "envelope", "index": 0, "bytes": half, "mean_bits": 2.0}]}})
        .to_string()
        .into_bytes()
    }

    /// Ranks that look drawn, no two runs different.
    fn spread(i: u64) -> u32 {
        (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u32 % 1990 + 10
    }

    #[test]
    fn drift_is_found_in_the_stream_that_moved_and_its_unit_named() {
        let mut watch = Watch::new(&args()).unwrap();
        for i in 0..400u64 {
            let bytes = 100 + u64::from(spread(i)) % 50 * 2;
            let dearer = if i >= 200 { 0.4 * bytes as f64 } else { 0.0 };
            watch.observe(&line("still", spread(i), bytes, 2.5 * bytes as f64, 0));
            watch.observe(&line(
                "moving",
                spread(i),
                bytes,
                2.5 * bytes as f64 + dearer + (spread(i) % 17) as f64,
                0,
            ));
        }
        watch.observe(b"{\"a\":1}");
        let report = watch.report();
        assert_eq!((report.observations, report.unreadable), (800, 1));
        let [moving, still] = &report.streams[..] else { panic!("{report:?}") };
        assert_eq!((still.drift.state, still.drift.moved_among_streams), ("watching", false), "{still:?}");
        assert_eq!((moving.drift.state, moving.drift.moved_among_streams), ("alarm", true), "{moving:?}");
        assert!((225..300).contains(&moving.drift.alarm_at_message.unwrap()), "{moving:?}");
        let first = &moving.drift.shifts[0];
        assert_eq!((first.statistic, first.aspect, first.moved), ("bits_per_byte", "location", "up"));
        assert_eq!(moving.drift.units[0].unit, "user");
        assert!((moving.drift.units[0].contribution - 0.4).abs() < 0.1, "{moving:?}");
        let metrics = report.metrics();
        for sample in [
            "driftlock_drift_alarm{stream=\"moving\",baseline=\"00ff\"} 1\n",
            "driftlock_drift_alarm{stream=\"still\",baseline=\"00ff\"} 0\n",
            "driftlock_messages_total{stream=\"still\",baseline=\"00ff\",outcome=\"normal\"} 400\n",
        ] {
            assert!(metrics.contains(sample), "{metrics}");
        }
    }

    #[test]
    fn discoveries_are_few_among_normals_and_found_among_attacks() {
        let mut watch = Watch::new(&args()).unwrap();
        for i in 0..6_000u64 {
            let rank = if i % 50 == 49 { 1 } else { spread(i) };
            watch.observe(&line("s", rank, 100, 200.0, i));
        }
        let report = watch.report();
        let stream = &report.streams[0];
        // With p no smaller than 1/2001 a level needs 31 such in its window first.
        assert!((80..=120).contains(&stream.discoveries), "{}", stream.discoveries);
        assert_eq!(stream.recent_discoveries.len(), RECENT);
        let last = stream.recent_discoveries.last().unwrap();
        assert_eq!((last.message, last.received_unix_ms, last.p_fraction), (6_000, 5_999, [1, 2001]));
        assert_eq!((last.unit.as_deref(), last.spans[0].start), (Some("user"), 3));
        assert_eq!(stream.outcomes["anomalous"], 120);
    }

    /// What is known is a function of the lines: read again from the file it is the same.
    #[test]
    fn a_file_read_again_gives_the_same_report() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seen.jsonl");
        let args = WatchArgs { season_slot_hours: 24, season_alpha: 0.02, ..args() };
        let open =
            || super::super::observations::Observations::open(&path, Watch::new(&args).unwrap()).unwrap();
        let observations = open();
        for i in 0..700u64 {
            let mut body = line("s", spread(i), 100 + i % 7, 250.0, 0);
            body.extend_from_slice(b"\n{}\n");
            let body = String::from_utf8(body).unwrap().replace("\"received_unix_ms\":0,", "");
            observations.append(body.as_bytes(), i * 3_600_000).unwrap();
        }
        let report = observations.report();
        let season = report.streams[0].season.unwrap();
        assert!(season.by_slot > 100 && season.by_pool > 100 && season.by_baseline > 50, "{season:?}");
        assert_eq!(open().report(), report);
        assert_eq!(report.unreadable, 700);
    }

    #[test]
    fn streams_are_bounded_and_options_checked() {
        let mut watch = Watch::new(&args()).unwrap();
        for i in 0..MAX_STREAMS + 10 {
            watch.observe(&line(&format!("s{i}"), 100, 100, 200.0, 0));
        }
        let report = watch.report();
        assert_eq!((report.streams.len(), report.forgotten_streams), (MAX_STREAMS, 10));
        assert!(!report.streams.iter().any(|stream| stream.stream == "s0"));
        assert!(matches!(Watch::new(&WatchArgs { fdr: 0.0, ..args() }), Err(WatchError::Fdr(_))));
        assert!(matches!(Watch::new(&WatchArgs { drift_window: 3, ..args() }), Err(WatchError::Drift(_))));
        assert!(matches!(
            Watch::new(&WatchArgs { season_slot_hours: 200, ..args() }),
            Err(WatchError::Season(_))
        ));
    }
}
