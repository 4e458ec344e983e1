//! The manifest: what a replay was made of and what came of it, so that anybody can make it again.
//!
//! What: a JSON file beside the verdicts with the fingerprints of capture, baseline and filter, the
//! engine's version, the configuration, the seed, the counts and the digest of the verdicts. It ends in a
//! digest over itself. Why fingerprints and not only digests: see [`Fingerprint`].
//!
//! Paths are kept as they were given; a reader who has the files elsewhere finds them by name beside the
//! manifest, or names them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Via;
use super::lines::Tally;
use crate::capture::{Fingerprint, InputFile};

/// The format's version.
pub const VERSION: u32 = 1;

/// A file that went into a replay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The path as it was given.
    pub path: PathBuf,
    /// Its identity.
    #[serde(flatten)]
    pub fingerprint: Fingerprint,
}

/// The counts; `rows` is the sum of exchanges and unreadable rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Recordings in the capture.
    pub rows: u64,
    /// Exchanges, failed ones included.
    pub exchanges: u64,
    /// Exchanges that could not take place.
    pub failed_exchanges: u64,
    /// Recordings that could not be read.
    pub unreadable_rows: u64,
    /// Messages like the baseline.
    pub normal: u64,
    /// Messages of streams that learn.
    pub warming_up: u64,
    /// Messages that could not be inspected.
    pub not_inspected: u64,
    /// Messages unlike the baseline.
    pub anomalous: u64,
}

impl From<&Tally> for Counts {
    fn from(tally: &Tally) -> Self {
        let [normal, warming_up, not_inspected, anomalous] = tally.outcomes;
        Self {
            rows: tally.exchanges + tally.bad_rows,
            exchanges: tally.exchanges,
            failed_exchanges: tally.failures,
            unreadable_rows: tally.bad_rows,
            normal,
            warming_up,
            not_inspected,
            anomalous,
        }
    }
}

/// What a replay was made of, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`VERSION`].
    pub driftlock_manifest: u32,
    /// The program's version.
    pub driftlock_version: String,
    /// The engine's version: another one may judge otherwise.
    pub engine_version: String,
    /// The path taken.
    pub via: Via,
    /// The capture, as it was named.
    pub input: PathBuf,
    /// Its files.
    pub input_files: Vec<InputFile>,
    /// The baseline, if one was given.
    pub baseline: Option<Part>,
    /// The filter module, unless the path was native.
    pub filter: Option<Part>,
    /// The plugin configuration, without the baseline.
    pub configuration: Value,
    /// Seed of the places where bodies were cut.
    pub seed: u64,
    /// The counts.
    pub counts: Counts,
    /// The file of verdicts, if one was written, and the fingerprint of the lines.
    pub verdicts_path: Option<PathBuf>,
    /// Of the lines, written or not.
    pub verdicts: Fingerprint,
    /// SHA-256 over this document in compact form without this field.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub manifest_sha256: String,
}

impl Manifest {
    /// The document, with its own digest.
    pub fn to_json(&self) -> String {
        let sealed = Self { manifest_sha256: self.digest(), ..self.clone() };
        serde_json::to_string_pretty(&sealed).unwrap_or_default() + "\n"
    }

    /// The digest over the rest.
    pub fn digest(&self) -> String {
        let bare = Self { manifest_sha256: String::new(), ..self.clone() };
        Fingerprint::of(serde_json::to_string(&bare).unwrap_or_default().as_bytes()).sha256
    }
}

/// `verdicts.jsonl` to `verdicts.jsonl.manifest.json`.
pub fn path_beside(verdicts: &Path) -> PathBuf {
    verdicts.with_added_extension("manifest.json")
}
