//! `driftlock score`: what a replay found of the attacks that a generator injected.
//!
//! What: labelled traffic and the verdicts of its replay are read side by side, line by line. For each
//! label: how many exchanges were flagged, and in how many of those the top span of the verdict overlaps
//! the injected one. Why: a detector that flags the right message for the wrong bytes explains nothing.
//!
//! A hit is an overlap in the same content unit. A verdict of the other message, of another unit or
//! without a span is a miss. Cost: one JSON parse a line, in constant memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use comfy_table::Table;
use flate2::bufread::MultiGzDecoder;
use serde::{Deserialize, Serialize};

/// Arguments of `driftlock score`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Labelled traffic, from `driftlock synth`
    pub traffic: PathBuf,
    /// Verdicts of its replay, from `driftlock replay --out`
    pub verdicts: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Why nothing could be scored.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    /// A file.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line that is not what it should be.
    #[error("{}, line {line}: {source}", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// Which line.
        line: u64,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// The files do not belong together.
    #[error(
        "line {line}: the traffic has {traffic:?} and the verdicts {verdicts:?}; give the verdicts of this traffic's replay"
    )]
    OtherTraffic {
        /// Which line.
        line: u64,
        /// The id there.
        traffic: String,
        /// The id there.
        verdicts: String,
    },
}

#[derive(Deserialize)]
struct Row {
    id: String,
    label: String,
    extra: Extra,
}

#[derive(Deserialize)]
struct Extra {
    #[serde(default)]
    spans: Vec<Injected>,
}

#[derive(Deserialize)]
struct Injected {
    direction: String,
    unit: String,
    index: u64,
    start: u64,
    end: u64,
}

#[derive(Deserialize)]
struct Line {
    id: String,
    request: Option<Verdict>,
    response: Option<Verdict>,
}

#[derive(Deserialize)]
struct Verdict {
    outcome: String,
    unit: Option<String>,
    unit_index: Option<u64>,
    #[serde(default)]
    spans: Vec<Found>,
}

#[derive(Deserialize)]
struct Found {
    start: u64,
    end: u64,
}

/// What was found of one label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Score {
    /// Exchanges.
    pub exchanges: u64,
    /// Of those, with an anomalous message.
    pub flagged: u64,
    /// Of the flagged, those with an injected span.
    pub with_span: u64,
    /// Of those, the ones whose top span overlaps an injected one.
    pub span_hits: u64,
}

impl Line {
    /// Whether the top span of an anomalous message lies on one of the injected ones.
    fn hits(&self, injected: &[Injected]) -> bool {
        injected.iter().any(|span| {
            let verdict = if span.direction == "request" { &self.request } else { &self.response };
            verdict.as_ref().is_some_and(|verdict| {
                let same_unit =
                    verdict.unit.as_ref() == Some(&span.unit) && verdict.unit_index == Some(span.index);
                let top = verdict.spans.first();
                verdict.outcome == "anomalous"
                    && same_unit
                    && top.is_some_and(|top| top.start < span.end && span.start < top.end)
            })
        })
    }
}

fn open(path: &Path) -> Result<Box<dyn BufRead>, ScoreError> {
    let failed = |source| ScoreError::Read { path: path.to_owned(), source };
    let mut reader = BufReader::new(File::open(path).map_err(failed)?);
    let gzip = reader.fill_buf().map_err(failed)?.starts_with(&[0x1f, 0x8b]);
    let source: Box<dyn Read> = if gzip { Box::new(MultiGzDecoder::new(reader)) } else { Box::new(reader) };
    Ok(Box::new(BufReader::new(source)))
}

/// Scores by label.
///
/// # Errors
/// [`ScoreError`].
pub fn score(traffic: &Path, verdicts: &Path) -> Result<BTreeMap<String, Score>, ScoreError> {
    let mut scores: BTreeMap<String, Score> = BTreeMap::new();
    let mut found = open(verdicts)?.lines();
    for (line, row) in (1..).zip(open(traffic)?.lines()) {
        let row = row.map_err(|source| ScoreError::Read { path: traffic.to_owned(), source })?;
        let parse_error = |path: &Path| {
            let path = path.to_owned();
            move |source| ScoreError::Line { path, line, source }
        };
        let row: Row = serde_json::from_str(&row).map_err(parse_error(traffic))?;
        let other = |verdicts: &str| ScoreError::OtherTraffic {
            line,
            traffic: row.id.clone(),
            verdicts: verdicts.to_owned(),
        };
        let text = found.next().ok_or_else(|| other("nothing"))?;
        let text = text.map_err(|source| ScoreError::Read { path: verdicts.to_owned(), source })?;
        let verdict: Line = serde_json::from_str(&text).map_err(parse_error(verdicts))?;
        if verdict.id != row.id {
            return Err(other(&verdict.id));
        }
        let score = scores.entry(row.label).or_default();
        score.exchanges += 1;
        let both = [&verdict.request, &verdict.response];
        if both.into_iter().flatten().any(|verdict| verdict.outcome == "anomalous") {
            score.flagged += 1;
            if !row.extra.spans.is_empty() {
                score.with_span += 1;
                score.span_hits += u64::from(verdict.hits(&row.extra.spans));
            }
        }
    }
    Ok(scores)
}

/// Runs `driftlock score`.
///
/// # Errors
/// [`ScoreError`].
pub fn run(args: &Args) -> Result<(), ScoreError> {
    let scores = score(&args.traffic, &args.verdicts)?;
    let all = scores.values().fold(Score::default(), |sum, score| Score {
        exchanges: sum.exchanges + score.exchanges,
        flagged: sum.flagged + score.flagged,
        with_span: sum.with_span + score.with_span,
        span_hits: sum.span_hits + score.span_hits,
    });
    if args.json {
        let json =
            serde_json::json!({"labels": scores, "span_hits": all.span_hits, "with_span": all.with_span});
        anstream::println!("{json}");
        return Ok(());
    }
    let percent = |part: u64, whole: u64| match whole {
        0 => String::new(),
        _ => format!("{:.1} %", part as f64 * 100.0 / whole as f64),
    };
    let mut table = Table::new();
    table.set_header(["label", "exchanges", "flagged", "", "top span on the injected one", ""]);
    for (label, score) in &scores {
        table.add_row([
            label.clone(),
            score.exchanges.to_string(),
            score.flagged.to_string(),
            percent(score.flagged, score.exchanges),
            format!("{} of {}", score.span_hits, score.with_span),
            percent(score.span_hits, score.with_span),
        ]);
    }
    anstream::println!("{table}");
    anstream::println!(
        "top span on the injected one in {} of {} flagged attacks ({})",
        all.span_hits,
        all.with_span,
        percent(all.span_hits, all.with_span)
    );
    Ok(())
}
