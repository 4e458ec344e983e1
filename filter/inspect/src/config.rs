//! The plugin's configuration: one JSON document, parsed once, refused by name.
//!
//! What: [`Config::parse`] turns the bytes that Envoy, Istio or the gateway hand to the plugin into
//! settings that need no further checks. An unknown field, a value out of range or an unreadable
//! baseline is an error that names the field.
//!
//! Cost: once per VM; decoding an inline baseline is a base64 pass and a digest over its bytes.
//!
//! Left out on purpose: defaults that depend on traffic. Every default is a constant here.

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use driftlock_engine::baseline::{Snapshot, SnapshotError, TrainingOptions};
use driftlock_engine::calibrate::messages_for_alpha;
use driftlock_engine::detector::{LearningPlan, PlanError, Settings};
use serde::Deserialize;

use crate::action::{RuleText, Rules};
use crate::baselines::Supply;
use crate::baselines::outbox::PostTo;
use crate::baselines::pull::PullFrom;
use crate::exclude::{Exclusion, ExclusionError, Exclusions};
use crate::host::is_tchar;

/// The parsed, checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// First part of every stream key.
    pub name: String,
    /// What the detector is told.
    pub settings: Settings,
    /// Baselines given inline.
    pub snapshot: Snapshot,
    /// Where further baselines come from, and where observations go.
    pub supply: Supply,
    /// Most bytes of one body that are inspected; a longer one is `not_inspected` with reason `size`.
    pub max_body_bytes: u64,
    /// Most decoded bytes for each encoded one; see [`crate::decode`].
    pub max_decoded_ratio: u32,
    /// Memory that all decoders of a VM share.
    pub max_decoder_bytes: usize,
    /// Request headers that are content units, in lower case.
    pub request_headers: Vec<String>,
    /// Text that came before is looked up; else it is scored anew and not kept.
    pub reuse_scores: bool,
    /// Messages that are not inspected because the operator said so.
    pub exclusions: Exclusions,
    /// What becomes of a message that cannot be inspected.
    pub uninspectable: Uninspectable,
    /// Where verdicts go.
    pub report: Report,
    /// What is done with which stream's messages.
    pub actions: Rules,
    /// What may be held until it is judged.
    pub hold: HoldLimits,
}

/// What may be held until it is judged, where an action needs that.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct HoldLimits {
    /// Headers wait with the body, so that a refusal has a status and verdicts can be headers. Only for a proxy
    /// that gives a filter the body meanwhile: in Envoy, `allow_on_headers_stop_iteration: true`.
    pub headers: bool,
    /// A longer message is let go unjudged; keep it under the proxy's own buffer limit (1 MiB in Envoy).
    pub max_bytes: u64,
    /// Held headers whose body does not begin to come are let go after so long.
    pub deadline_ms: u32,
}

impl Default for HoldLimits {
    fn default() -> Self {
        Self { headers: false, max_bytes: 768 << 10, deadline_ms: 1000 }
    }
}

/// What becomes of a message that cannot be inspected.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Uninspectable {
    /// It passes; the verdict says `not_inspected`.
    #[default]
    Pass,
    /// Fail closed: a request is held until it is inspected and refused if it cannot be; a response is
    /// replaced by an error while its headers are open, else broken off before its end.
    Refuse,
}

/// Where verdicts go.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Report {
    /// Filter state `wasm.driftlock.*` for the access log.
    pub filter_state: StatePolicy,
    /// Which verdicts make a log line.
    pub log: LogPolicy,
}

impl Default for Report {
    fn default() -> Self {
        Self { filter_state: StatePolicy::Brief, log: LogPolicy::Flagged }
    }
}

/// How much of a verdict is filter state. What the access log writes of every message costs the proxy more than
/// most of its inspection.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum StatePolicy {
    /// There is none.
    Never,
    /// All of it, as JSON, where a message is not normal or something was done with it; else what the header
    /// says of it, with the whole digest and the engine's version.
    Brief,
    /// All of it, always.
    Full,
}

/// Which verdicts make a log line.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum LogPolicy {
    /// None.
    Never,
    /// Anomalous and not inspected.
    Flagged,
    /// All.
    Always,
}

/// Why a configuration was refused.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, an unknown field, or a value of the wrong type.
    #[error("plugin configuration, at {path}: {reason}")]
    Field {
        /// Path to the field, e.g. `learn.messages`.
        path: String,
        /// What the parser said.
        reason: String,
    },
    /// `alpha` out of range.
    #[error("plugin configuration, at alpha: {0} is not between 0.000001 and 0.5")]
    Alpha(f64),
    /// Too few messages to learn from.
    #[error("plugin configuration, at learn.messages: {0}")]
    Plan(PlanError),
    /// `baseline` is not base64.
    #[error(
        "plugin configuration, at baseline: not base64 ({0}); use the output of `driftlock train --base64`"
    )]
    Base64(String),
    /// `baseline` is no usable snapshot.
    #[error("plugin configuration, at baseline: {0}")]
    Baseline(SnapshotError),
    /// A stream's calibration is too small for `alpha`, so it could never raise an alarm.
    #[error(
        "plugin configuration, at alpha: the baseline of stream {stream} has {calibrated} calibration messages and can reach alpha {least} at best; raise alpha or train on more"
    )]
    AlphaOutOfReach {
        /// Stream key.
        stream: String,
        /// Calibration messages.
        calibrated: usize,
        /// 1 / (n + 1).
        least: f64,
    },
    /// Neither a baseline (or one without a stream) nor learning.
    #[error(
        "plugin configuration: learn is null and there is neither a baseline with a stream nor a pull, so nothing could ever be judged; give one of them"
    )]
    Nothing,
    /// The baseline is that of another name, so it would judge nothing.
    #[error(
        "plugin configuration, at name: {name:?} is not that of the baseline, whose streams are such as {stream}; set the name it was trained with"
    )]
    OtherName {
        /// What the configuration says.
        name: String,
        /// A stream of the baseline.
        stream: String,
    },
    /// A bound that leaves no room.
    #[error("plugin configuration, at {field}: {value} is less than {least}")]
    TooSmall {
        /// Path to the field.
        field: &'static str,
        /// What it says.
        value: u64,
        /// What it may say at least.
        least: u64,
    },
    /// A field of `pull` or `observations` that makes no call.
    #[error("plugin configuration, at {field}: {value:?} is not {expected}")]
    Call {
        /// Path to the field.
        field: String,
        /// What it says.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// An exclusion that says nothing, or too much.
    #[error("plugin configuration, at exclude[{index}]: {error}")]
    Exclusion {
        /// Which one, from 0.
        index: usize,
        /// What is wrong with it.
        error: ExclusionError,
    },
    /// A stream name that could not be told from another's.
    #[error("plugin configuration, at name: {0:?} is not 1 to 64 of the characters a-z A-Z 0-9 . _ -")]
    Name(String),
}

/// A text that stays where it is, if it is written without escapes: a baseline may have megabytes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document<'a> {
    name: String,
    alpha: f64,
    /// Absent: learn if there is no baseline. Null: never.
    #[serde(deserialize_with = "present")]
    learn: Option<Option<Learn>>,
    #[serde(borrow)]
    baseline: Option<Text<'a>>,
    share: bool,
    pull: Option<PullText>,
    observations: Option<PostText>,
    request_headers: Vec<String>,
    reuse_scores: bool,
    exclude: Vec<Exclusion>,
    limits: Limits,
    uninspectable: Uninspectable,
    report: Report,
    actions: Vec<RuleText>,
    hold: HoldLimits,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Learn {
    messages: u32,
}

/// `pull`: [`PullFrom`], as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PullText {
    cluster: String,
    #[serde(default = "default_authority")]
    authority: String,
    #[serde(default = "default_snapshots")]
    path: String,
    #[serde(default)]
    sha256: Option<String>,
    #[serde(default = "default_interval_s")]
    interval_s: u32,
    #[serde(default = "default_timeout_ms")]
    timeout_ms: u32,
    #[serde(default = "default_snapshot_bytes")]
    max_bytes: usize,
}

/// `observations`: [`PostTo`], as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PostText {
    cluster: String,
    #[serde(default = "default_authority")]
    authority: String,
    #[serde(default = "default_observations")]
    path: String,
    #[serde(default = "default_timeout_ms")]
    timeout_ms: u32,
    #[serde(default = "default_batch_bytes")]
    max_batch_bytes: usize,
    #[serde(default = "default_pending_bytes")]
    max_pending_bytes: usize,
}

fn default_authority() -> String {
    "driftlock".to_string()
}

fn default_snapshots() -> String {
    "/v1/snapshots".to_string()
}

fn default_observations() -> String {
    "/v1/observations".to_string()
}

fn default_interval_s() -> u32 {
    60
}

fn default_timeout_ms() -> u32 {
    5000
}

fn default_snapshot_bytes() -> usize {
    32 << 20
}

fn default_batch_bytes() -> usize {
    256 << 10
}

fn default_pending_bytes() -> usize {
    1 << 20
}

/// Tells a null from an absent field.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Option<Learn>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// Most request headers that are units.
const MAX_HEADERS: usize = 16;

/// Checks the names of `request_headers`, and writes them as the proxy has them.
fn header_names(names: Vec<String>) -> Result<Vec<String>, ConfigError> {
    let refused = |path: String, reason: &str| ConfigError::Field { path, reason: reason.to_string() };
    if names.len() > MAX_HEADERS {
        return Err(refused(
            "request_headers".to_string(),
            "there are more than 16; name those that an attacker would use",
        ));
    }
    let mut checked = Vec::with_capacity(names.len());
    for (index, name) in names.into_iter().enumerate() {
        let path = || format!("request_headers[{index}]");
        // Pseudo-headers are the target's.
        if name.is_empty() || name.len() > 64 || !name.bytes().all(is_tchar) {
            return Err(refused(path(), "not the name of a header"));
        }
        let name = name.to_ascii_lowercase();
        if checked.contains(&name) {
            return Err(refused(path(), "named twice"));
        }
        checked.push(name);
    }
    Ok(checked)
}

/// Messages that a stream learns from where the configuration does not say.
const DEFAULT_LEARNED_MESSAGES: u32 = 1000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    max_body_bytes: u64,
    max_decoded_ratio: u32,
    max_decoder_bytes: usize,
    max_streams: usize,
    max_ngrams: usize,
    max_table_bytes: usize,
    max_learned_unit_bytes: usize,
}

impl Default for Document<'_> {
    fn default() -> Self {
        Self {
            name: "default".to_string(),
            alpha: 0.002,
            learn: None,
            baseline: None,
            share: true,
            pull: None,
            observations: None,
            request_headers: Vec::new(),
            reuse_scores: true,
            exclude: Vec::new(),
            limits: Limits::default(),
            uninspectable: Uninspectable::default(),
            report: Report::default(),
            actions: Vec::new(),
            hold: HoldLimits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        let training = TrainingOptions::default();
        Self {
            max_body_bytes: 16 << 20,
            max_decoded_ratio: 200,
            max_decoder_bytes: 16 << 20,
            max_streams: 64,
            max_ngrams: training.max_ngrams,
            max_table_bytes: training.max_table_bytes,
            max_learned_unit_bytes: training.max_unit_bytes,
        }
    }
}

impl Config {
    /// Parses and checks the plugin configuration. No bytes at all mean all defaults.
    ///
    /// # Errors
    /// [`ConfigError`], naming the field.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        let document = if bytes.trim_ascii().is_empty() {
            Document::default()
        } else if !bytes.trim_ascii().starts_with(b"{") {
            // serde would read an array as the fields in order.
            let reason = "invalid: a JSON object is expected".to_string();
            return Err(ConfigError::Field { path: "the top".to_string(), reason });
        } else {
            let mut json = serde_json::Deserializer::from_slice(bytes);
            let document = serde_path_to_error::deserialize(&mut json).map_err(|error| {
                let path = match error.path().to_string() {
                    // An empty name at the top has an empty path.
                    root if root == "." || root.is_empty() => "the top".to_string(),
                    path => path,
                };
                ConfigError::Field { path, reason: error.inner().to_string() }
            })?;
            json.end().map_err(|error| ConfigError::Field {
                path: "the end".to_string(),
                reason: error.to_string(),
            })?;
            document
        };
        document.check()
    }
}

/// Whether a snapshot's streams are those of a configuration with this name, and can reach its alpha.
///
/// # Errors
/// [`ConfigError::OtherName`] or [`ConfigError::AlphaOutOfReach`].
pub fn check_snapshot(name: &str, alpha_ppm: u32, snapshot: &Snapshot) -> Result<(), ConfigError> {
    let prefix = format!("{name}/");
    for baseline in snapshot.streams() {
        let stream = baseline.stream().to_string();
        if !stream.starts_with(&prefix) {
            return Err(ConfigError::OtherName { name: name.to_string(), stream });
        }
        let calibrated = baseline.calibration().statistics().len();
        if calibrated < messages_for_alpha(alpha_ppm) as usize {
            let least = 1.0 / (calibrated as f64 + 1.0);
            return Err(ConfigError::AlphaOutOfReach { stream, calibrated, least });
        }
    }
    Ok(())
}

fn at_least(field: &'static str, value: u64, least: u64) -> Result<(), ConfigError> {
    if value < least { Err(ConfigError::TooSmall { field, value, least }) } else { Ok(()) }
}

/// Checks a text that a call is made of.
fn check_call(
    field: &'static str,
    value: &str,
    expected: &'static str,
    good: impl Fn(&str) -> bool,
) -> Result<(), ConfigError> {
    let visible = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic());
    if visible && good(value) {
        return Ok(());
    }
    Err(ConfigError::Call { field: field.to_string(), value: value.to_string(), expected })
}

const CLUSTER: &str = "the name of a cluster";
const AUTHORITY: &str = "the name of a host";
const PATH: &str = "a path that begins with /";

impl PullText {
    fn check(self) -> Result<PullFrom, ConfigError> {
        let Self { cluster, authority, path, sha256, interval_s, timeout_ms, max_bytes } = self;
        check_call("pull.cluster", &cluster, CLUSTER, |_| true)?;
        check_call("pull.authority", &authority, AUTHORITY, |_| true)?;
        check_call("pull.path", &path, PATH, |path| path.starts_with('/'))?;
        at_least("pull.timeout_ms", u64::from(timeout_ms), 1)?;
        at_least("pull.interval_s", u64::from(interval_s), 1)?;
        at_least("pull.max_bytes", max_bytes as u64, 64 << 10)?;
        let sha256 = sha256.map(|digest| digest.to_ascii_lowercase());
        if let Some(digest) = &sha256 {
            let hex =
                |digest: &str| digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
            check_call("pull.sha256", digest, "64 hexadecimal digits", hex)?;
        }
        let path = path.trim_end_matches('/').to_string();
        Ok(PullFrom { cluster, authority, path, sha256, interval_s, timeout_ms, max_bytes })
    }
}

impl PostText {
    fn check(self) -> Result<PostTo, ConfigError> {
        let Self { cluster, authority, path, timeout_ms, max_batch_bytes, max_pending_bytes } = self;
        check_call("observations.cluster", &cluster, CLUSTER, |_| true)?;
        check_call("observations.authority", &authority, AUTHORITY, |_| true)?;
        check_call("observations.path", &path, PATH, |path| path.starts_with('/'))?;
        at_least("observations.timeout_ms", u64::from(timeout_ms), 1)?;
        at_least("observations.max_batch_bytes", max_batch_bytes as u64, 4 << 10)?;
        at_least("observations.max_pending_bytes", max_pending_bytes as u64, max_batch_bytes as u64)?;
        Ok(PostTo { cluster, authority, path, timeout_ms, max_batch_bytes, max_pending_bytes })
    }
}

impl Document<'_> {
    fn check(self) -> Result<Config, ConfigError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if self.name.is_empty() || self.name.len() > 64 || !self.name.bytes().all(plain) {
            return Err(ConfigError::Name(self.name));
        }
        if !(0.000_001..=0.5).contains(&self.alpha) {
            return Err(ConfigError::Alpha(self.alpha));
        }
        // To the nearest millionth.
        let alpha_ppm = (self.alpha * 1e6 + 0.5) as u32;
        let limits = &self.limits;
        for (field, value, least) in [
            ("limits.max_body_bytes", limits.max_body_bytes, 1024),
            ("limits.max_decoded_ratio", u64::from(limits.max_decoded_ratio), 1),
            ("limits.max_decoder_bytes", limits.max_decoder_bytes as u64, 64 << 10),
            ("limits.max_streams", limits.max_streams as u64, 1),
            ("limits.max_ngrams", limits.max_ngrams as u64, 1024),
            ("limits.max_table_bytes", limits.max_table_bytes as u64, 32 << 10),
            ("limits.max_learned_unit_bytes", limits.max_learned_unit_bytes as u64, 64),
            ("hold.max_bytes", self.hold.max_bytes, 1024),
            ("hold.deadline_ms", u64::from(self.hold.deadline_ms), 10),
        ] {
            at_least(field, value, least)?;
        }
        // What an operator trained is not taught anything new by the traffic.
        let given = self.baseline.is_some() || self.pull.is_some();
        let default = || (!given).then_some(Learn { messages: DEFAULT_LEARNED_MESSAGES });
        let learning = match &self.learn.unwrap_or_else(default) {
            Some(learn) => Some(LearningPlan::new(learn.messages, alpha_ppm).map_err(ConfigError::Plan)?),
            None => None,
        };
        let snapshot = match &self.baseline {
            Some(Text(text)) => {
                let bytes: Vec<u8> =
                    STANDARD.decode(text.trim()).map_err(|error| ConfigError::Base64(error.to_string()))?;
                Snapshot::decode(&bytes).map_err(ConfigError::Baseline)?
            }
            None => Snapshot::default(),
        };
        if learning.is_none() && snapshot.streams().is_empty() && self.pull.is_none() {
            return Err(ConfigError::Nothing);
        }
        check_snapshot(&self.name, alpha_ppm, &snapshot)?;
        let supply = Supply {
            share: self.share,
            pull: self.pull.map(PullText::check).transpose()?,
            observations: self.observations.map(PostText::check).transpose()?,
        };
        let actions =
            Rules::parse(self.actions).map_err(|(path, reason)| ConfigError::Field { path, reason })?;
        let request_headers = header_names(self.request_headers)?;
        let exclusions = Exclusions::new(self.exclude)
            .map_err(|(index, error)| ConfigError::Exclusion { index, error })?;
        Ok(Config {
            name: self.name,
            settings: Settings {
                alpha_ppm,
                learning,
                training: TrainingOptions {
                    max_ngrams: limits.max_ngrams,
                    max_table_bytes: limits.max_table_bytes,
                    max_unit_bytes: limits.max_learned_unit_bytes,
                    ..TrainingOptions::default()
                },
                max_streams: limits.max_streams,
            },
            snapshot,
            supply,
            max_body_bytes: limits.max_body_bytes,
            max_decoded_ratio: limits.max_decoded_ratio,
            max_decoder_bytes: limits.max_decoder_bytes,
            request_headers,
            reuse_scores: self.reuse_scores,
            exclusions,
            uninspectable: self.uninspectable,
            report: self.report,
            actions,
            hold: self.hold,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(json: &str) -> String {
        Config::parse(json.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn nothing_means_the_defaults() {
        let config = Config::parse(b" \n").unwrap();
        assert_eq!(config, Config::parse(b"{}").unwrap());
        assert_eq!((config.settings.alpha_ppm, config.name.as_str()), (2000, "default"));
        assert_eq!(config.settings.learning.unwrap().messages(), 1000);
    }

    #[test]
    fn every_knob_reaches_the_settings() {
        let config = Config::parse(
            br#"{"name": "edge", "alpha": 0.01, "learn": {"messages": 400}, "uninspectable": "refuse",
                 "reuse_scores": false,
                 "exclude": [{"path": "/healthz"}], "share": false,
                 "pull": {"cluster": "c", "authority": "a", "path": "/s/", "sha256": null, "interval_s": 2,
                          "timeout_ms": 3, "max_bytes": 65536},
                 "observations": {"cluster": "d", "authority": "b", "path": "/o", "timeout_ms": 4,
                                  "max_batch_bytes": 4096, "max_pending_bytes": 8192},
                 "limits": {"max_decoded_ratio": 10, "max_decoder_bytes": 65536, "max_body_bytes": 2048, "max_streams": 2, "max_ngrams": 4096, "max_table_bytes": 65536,
                            "max_learned_unit_bytes": 100},
                 "report": {"filter_state": "never", "log": "always"},
                 "actions": [{"stream": "*", "do": ["observe"]}],
                 "hold": {"headers": true, "max_bytes": 4096, "deadline_ms": 50}}"#,
        )
        .unwrap();
        assert_eq!((config.name.as_str(), config.settings.alpha_ppm), ("edge", 10_000));
        assert_eq!(config.settings.learning.unwrap().messages(), 400);
        assert_eq!((config.max_body_bytes, config.settings.max_streams), (2048, 2));
        assert_eq!((config.max_decoded_ratio, config.max_decoder_bytes), (10, 65536));
        assert_ne!(config.exclusions, Exclusions::default());
        let pull = PullFrom {
            cluster: "c".to_string(),
            authority: "a".to_string(),
            path: "/s".to_string(),
            sha256: None,
            interval_s: 2,
            timeout_ms: 3,
            max_bytes: 65536,
        };
        let post = PostTo {
            cluster: "d".to_string(),
            authority: "b".to_string(),
            path: "/o".to_string(),
            timeout_ms: 4,
            max_batch_bytes: 4096,
            max_pending_bytes: 8192,
        };
        assert_eq!(config.supply, Supply { share: false, pull: Some(pull), observations: Some(post) });
        let training = config.settings.training;
        assert_eq!(
            (training.max_ngrams, training.max_table_bytes, training.max_unit_bytes),
            (4096, 65536, 100)
        );
        assert_eq!((config.uninspectable, config.reuse_scores), (Uninspectable::Refuse, false));
        let report = Report { filter_state: StatePolicy::Never, log: LogPolicy::Always };
        assert_eq!(config.report, report);
        assert!(!config.actions.plan("edge/request/json").tag);
        assert_eq!(config.hold, HoldLimits { headers: true, max_bytes: 4096, deadline_ms: 50 });
    }

    #[test]
    fn errors_name_the_field_and_the_reason() {
        for (json, parts) in [
            (r#"{"alhpa": 1}"#, ["alhpa", "unknown field `alhpa`"]),
            (r#"{"learn": {"messages": 400, "mesages": 1}}"#, ["learn.mesages", "unknown field"]),
            (r#"{"learn": {"messages": "many"}}"#, ["learn.messages", "invalid type"]),
            (r#"{"learn": {"messages": 20}}"#, ["learn.messages", "at least 749"]),
            (r#"{"alpha": 0.7}"#, ["alpha", "0.7"]),
            (r#"{"baseline": "%%%"}"#, ["baseline", "not base64"]),
            (r#"{"baseline": "aGVsbG8="}"#, ["baseline", "not a Driftlock baseline"]),
            (r#"{"learn": null}"#, ["nothing could ever be judged", "baseline"]),
            (r#"{"limits": {"max_body_bytes": 5}}"#, ["limits.max_body_bytes", "1024"]),
            (r#"{"limits": {"max_decoder_bytes": 5}}"#, ["limits.max_decoder_bytes", "65536"]),
            (r#"{"name": "a/b"}"#, ["name", "a/b"]),
            (r#"{"pull": {}}"#, ["pull", "missing field `cluster`"]),
            (r#"{"pull": {"cluster": "c d"}}"#, ["pull.cluster", "c d"]),
            (r#"{"pull": {"cluster": "c", "path": "v1"}}"#, ["pull.path", "v1"]),
            (r#"{"pull": {"cluster": "c", "sha256": "12"}}"#, ["pull.sha256", "64 hexadecimal"]),
            (r#"{"pull": {"cluster": "c", "interval_s": 0}}"#, ["pull.interval_s", "less than 1"]),
            (r#"{"observations": {"cluster": "c", "timeout_ms": 0}}"#, ["observations.timeout_ms", "1"]),
            (
                r#"{"observations": {"cluster": "c", "max_pending_bytes": 5000}}"#,
                ["observations.max_pending_bytes", "262144"],
            ),
            (r#"{"exclude": [{"path": "/a"}, {}]}"#, ["exclude[1]", "names nothing"]),
            (r#"{"exclude": [{"paht": "/a"}]}"#, ["exclude[0].paht", "unknown field"]),
            (r#"{"alpha": 0.01"#, ["EOF", "line 1"]),
            (r#"{"actions": [{"stream": "*", "do": ["block"], "status": 1}]}"#, ["actions[0].status", "400"]),
            (r#"{"actions": [{"stream": "*", "do": ["hide"]}]}"#, ["actions[0].do[0]", "`block`"]),
            (r#"{"request_headers": ["user-agent", ":path"]}"#, ["request_headers[1]", "not the name"]),
            (r#"{"request_headers": ["user-agent", "User-Agent"]}"#, ["request_headers[1]", "twice"]),
            (r#"{"hold": {"max_bytes": 5}}"#, ["hold.max_bytes", "1024"]),
            (r#"[]"#, ["at the top", "invalid"]),
            (r#"{} {}"#, ["the end", "trailing"]),
            (r#"{"": 1}"#, ["at the top", "unknown field ``"]),
        ] {
            let message = message(json);
            for part in parts {
                assert!(message.contains(part), "{json}: {message}");
            }
        }
    }

    #[test]
    fn a_damaged_baseline_is_refused() {
        let mut bytes = Snapshot::default().encode();
        let text = |bytes: &[u8]| format!(r#"{{"baseline": "{}"}}"#, STANDARD.encode(bytes));
        assert!(message(&text(&bytes)).contains("nothing could ever be judged"));
        let learning = text(&bytes).replacen('{', r#"{"learn": {"messages": 1000}, "#, 1);
        assert_eq!(Config::parse(learning.as_bytes()).err(), None);
        bytes[12] ^= 1;
        assert!(message(&text(&bytes)).contains("damaged"));
    }
}
