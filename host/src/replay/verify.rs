//! `driftlock verify`: a replay made again from its manifest.
//!
//! What: the manifest's own digest, the engine's version, and the fingerprints of capture, baseline,
//! filter and verdicts are compared; then the capture is judged again and each line is compared with the
//! recorded one. What differs is named, with the first place where it does: a block of a file, or a line
//! and a field of a verdict.
//!
//! Cost: that of the replay. With a baseline or a filter that is not the recorded one, nothing is judged:
//! the verdicts would differ for a reason that is already known.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::lines::Lines;
use super::manifest::{self, Counts, Manifest};
use super::schedule::Done;
use super::{Args as ReplayArgs, Plan, ReplayError, Via, execute, read_part};
use crate::capture::{Fingerprint, Fingerprinter};

/// Arguments of `driftlock verify`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The manifest that `driftlock replay` left
    pub manifest: PathBuf,
    /// The capture, where it is not where it was
    #[arg(long)]
    pub input: Option<PathBuf>,
    /// The baseline, where it is not where it was
    #[arg(long)]
    pub baseline: Option<PathBuf>,
    /// The filter, where it is not where it was
    #[arg(long)]
    pub filter: Option<PathBuf>,
    /// The verdicts, where they are not where they were
    #[arg(long)]
    pub verdicts: Option<PathBuf>,
    /// Another path than the recorded one: the verdicts have to be the same
    #[arg(long, value_enum)]
    pub via: Option<Via>,
    /// The Envoy binary
    #[arg(long)]
    pub envoy: Option<PathBuf>,
    /// Threads [default: one per processor]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

/// Why a replay is not verified.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The manifest.
    #[error("cannot read the manifest {path}: {reason}")]
    Manifest {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file that has to be there.
    #[error("cannot read {path}: {source}; name it with --{option}")]
    Missing {
        /// Which file.
        path: PathBuf,
        /// The option that names it.
        option: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The replay.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// It is not the same.
    #[error("not equal: {0}")]
    Differs(String),
}

/// What was compared; `differences` is empty when all is as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// One sentence for each thing that differs.
    pub differences: Vec<String>,
    /// Lines compared.
    pub lines: u64,
    /// The digest over them.
    pub digest: String,
}

/// Where a file of the manifest is: as it was given, else beside the manifest.
fn located(given: Option<&Path>, recorded: &Path, manifest: &Path) -> PathBuf {
    if let Some(given) = given {
        return given.to_owned();
    }
    if recorded.exists() {
        return recorded.to_owned();
    }
    let beside = manifest.parent().zip(recorded.file_name()).map(|(folder, name)| folder.join(name));
    beside.filter(|path| path.exists()).unwrap_or_else(|| recorded.to_owned())
}

/// Makes the replay again.
///
/// # Errors
/// [`VerifyError`] where nothing can be compared.
pub fn verify(args: &Args) -> Result<Report, VerifyError> {
    let manifest_error = |reason: String| VerifyError::Manifest { path: args.manifest.clone(), reason };
    let text = std::fs::read(&args.manifest).map_err(|error| manifest_error(error.to_string()))?;
    let recorded: Manifest =
        serde_json::from_slice(&text).map_err(|error| manifest_error(error.to_string()))?;
    if recorded.driftlock_manifest != manifest::VERSION {
        return Err(manifest_error(format!("its version {} is not known here", recorded.driftlock_manifest)));
    }
    let mut report = Report::default();
    if recorded.manifest_sha256 != recorded.digest() {
        report.differences.push(format!(
            "the manifest was changed after it was written: its digest is {}, recorded {}",
            recorded.digest(),
            recorded.manifest_sha256
        ));
        return Ok(report);
    }
    if recorded.engine_version != driftlock_engine::ENGINE_VERSION {
        report.differences.push(format!(
            "the engine is {}, recorded {}: its verdicts may differ",
            driftlock_engine::ENGINE_VERSION,
            recorded.engine_version
        ));
    }

    let via = args.via.unwrap_or(recorded.via);
    let read = |path: PathBuf, option| {
        read_part(&path).map_err(|_| {
            let source =
                std::fs::metadata(&path).err().unwrap_or_else(|| io::Error::other("it cannot be read"));
            VerifyError::Missing { path, option, source }
        })
    };
    let mut parts_differ = false;
    let baseline = match &recorded.baseline {
        None => None,
        Some(part) => {
            let found = read(located(args.baseline.as_deref(), &part.path, &args.manifest), "baseline")?;
            if let Some(difference) = part.fingerprint.first_difference(&found.0.fingerprint) {
                parts_differ = true;
                report
                    .differences
                    .push(format!("the baseline {} differs: {difference}", found.0.path.display()));
            }
            Some(found)
        }
    };
    let mut filter = args.filter.clone();
    if let Some(part) = recorded.filter.as_ref().filter(|_| via != Via::Native) {
        let (found, _) = read(located(args.filter.as_deref(), &part.path, &args.manifest), "filter")?;
        if let Some(difference) = part.fingerprint.first_difference(&found.fingerprint) {
            parts_differ = true;
            report.differences.push(format!("the filter {} differs: {difference}", found.path.display()));
        }
        filter = Some(found.path);
    }
    let verdicts_path = match &recorded.verdicts_path {
        None => args.verdicts.clone(),
        Some(path) => Some(located(args.verdicts.as_deref(), path, &args.manifest)),
    };
    if let Some(path) = &verdicts_path {
        let missing = |source| VerifyError::Missing { path: path.clone(), option: "verdicts", source };
        let found = fingerprint_of(path).map_err(missing)?;
        if let Some(difference) = recorded.verdicts.first_difference(&found) {
            report.differences.push(format!("the verdicts {} differ: {difference}", path.display()));
        }
    }
    if parts_differ {
        return Ok(report);
    }

    let input = located(args.input.as_deref(), &recorded.input, &args.manifest);
    let replay = ReplayArgs {
        via,
        filter,
        envoy: args.envoy.clone(),
        threads: args.threads,
        seed: recorded.seed,
        ..ReplayArgs::new(input)
    };
    let plan = Plan::of_parts(&replay, recorded.configuration.clone(), baseline)?;
    let against = match &verdicts_path {
        Some(path) => {
            let missing = |source| VerifyError::Missing { path: path.clone(), option: "verdicts", source };
            Some(BufReader::with_capacity(1 << 18, File::open(path).map_err(missing)?))
        }
        None => None,
    };
    let mut compare = Compare { recorded: against, line: 0, difference: None, expected: Vec::new() };
    let again = execute(&plan, &mut Lines::new(&mut compare), &Done::default(), None)?;
    compare.end();

    for (i, file) in recorded.input_files.iter().enumerate() {
        match again.input_files.get(i) {
            None => report.differences.push(format!("the capture lacks {}", file.path.display())),
            Some(found) => {
                if let Some(difference) = file.fingerprint.first_difference(&found.fingerprint) {
                    report
                        .differences
                        .push(format!("the capture {} differs: {difference}", found.path.display()));
                }
            }
        }
    }
    for extra in again.input_files.iter().skip(recorded.input_files.len()) {
        report.differences.push(format!("the capture has a file more: {}", extra.path.display()));
    }
    if let Some(difference) = compare.difference {
        report.differences.push(difference);
    } else if let Some(difference) = recorded.verdicts.first_difference(&again.verdicts) {
        report.differences.push(format!("the verdicts made now differ: {difference}"));
    }
    if recorded.counts != again.counts {
        report.differences.push(counts_difference(&recorded.counts, &again.counts));
    }
    report.lines = compare.line;
    report.digest = again.verdicts.sha256;
    Ok(report)
}

fn counts_difference(recorded: &Counts, found: &Counts) -> String {
    let [recorded, found] = [recorded, found].map(|counts| serde_json::to_value(counts).unwrap_or_default());
    let fields = recorded.as_object().into_iter().flatten();
    let differing: Vec<String> = fields
        .filter(|(name, value)| found[name.as_str()] != **value)
        .map(|(name, value)| format!("{name} {}, recorded {value}", found[name.as_str()]))
        .collect();
    format!("the counts differ: {}", differing.join("; "))
}

fn fingerprint_of(path: &Path) -> io::Result<Fingerprint> {
    let mut file = File::open(path)?;
    let mut fingerprinter = Fingerprinter::default();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(fingerprinter.finish()),
            length => fingerprinter.update(&buffer[..length]),
        }
    }
}

/// Compares the lines made now with the recorded ones.
struct Compare {
    recorded: Option<BufReader<File>>,
    line: u64,
    difference: Option<String>,
    expected: Vec<u8>,
}

impl Write for Compare {
    /// Gets whole lines.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for line in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.line += 1;
            let Some(recorded) = self.recorded.as_mut().filter(|_| self.difference.is_none()) else {
                continue;
            };
            self.expected.clear();
            recorded.read_until(b'\n', &mut self.expected)?;
            if self.expected != line {
                self.difference = Some(line_difference(self.line, &self.expected, line));
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Compare {
    /// Whether there are recorded lines that were not made now.
    fn end(&mut self) {
        let Some(recorded) = self.recorded.as_mut().filter(|_| self.difference.is_none()) else { return };
        let mut rest = Vec::new();
        if recorded.read_until(b'\n', &mut rest).is_ok_and(|length| length > 0) {
            self.difference =
                Some(format!("there are only {} verdict lines now, the recorded file has more", self.line));
        }
    }
}

/// The first difference of two lines, in words.
fn line_difference(line: u64, recorded: &[u8], found: &[u8]) -> String {
    if recorded.is_empty() {
        return format!("verdict line {line} is not in the recorded file");
    }
    let at = recorded.iter().zip(found).position(|(a, b)| a != b).unwrap_or(recorded.len().min(found.len()));
    let parsed = [recorded, found].map(|line| serde_json::from_slice::<Value>(line).ok());
    let id = parsed[1].as_ref().and_then(|value| value["id"].as_str()).unwrap_or_default();
    let place = match &parsed {
        [Some(a), Some(b)] => match field_difference(a, b, String::new()) {
            Some((path, a, b)) => format!("{path} is {b} now, recorded {a}"),
            None => "the same values are written otherwise".to_owned(),
        },
        [None, _] => "the recorded line is not JSON".to_owned(),
        _ => "the line made now is not JSON".to_owned(),
    };
    format!("verdict line {line} (exchange {id:?}) differs from byte {at} on: {place}")
}

/// Path and values of the first field that differs.
fn field_difference(a: &Value, b: &Value, path: String) -> Option<(String, String, String)> {
    let short = |value: &Value| value.to_string().chars().take(80).collect::<String>();
    match (a, b) {
        (Value::Object(a_fields), Value::Object(b_fields)) => {
            let keys = a_fields.keys().chain(b_fields.keys().filter(|key| !a_fields.contains_key(*key)));
            keys.into_iter().find_map(|key| field_difference(&a[key], &b[key], format!("{path}/{key}")))
        }
        (Value::Array(a_items), Value::Array(b_items)) if a_items.len() == b_items.len() => a_items
            .iter()
            .zip(b_items)
            .enumerate()
            .find_map(|(i, (a, b))| field_difference(a, b, format!("{path}/{i}"))),
        _ => (a != b).then(|| (path, short(a), short(b))),
    }
}

/// Runs `driftlock verify`.
///
/// # Errors
/// [`VerifyError`]; where something differs, too.
pub fn run(args: &Args) -> Result<(), VerifyError> {
    let report = verify(args)?;
    if report.differences.is_empty() {
        anstream::println!("equal: {} verdict lines, digest {}", report.lines, report.digest);
        return Ok(());
    }
    Err(VerifyError::Differs(report.differences.join("\n  ")))
}
