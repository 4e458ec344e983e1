//! What the inspection needs of the proxy: a small trait, so that the logic runs without one.
//!
//! What: [`Host`] is implemented by the filter over proxy-wasm host calls and by the replay in memory.
//! Every call that can fail returns a [`HostError`]; the session counts it and goes on.
//!
//! Left out on purpose: body bytes, which the caller hands over, and time, which nothing here needs.

use alloc::vec::Vec;

use driftlock_engine::evidence::Verdict;

/// Which message of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client.
    Request,
    /// From the upstream.
    Response,
}

impl Direction {
    /// The name in stream keys, logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Response => "response",
        }
    }
}

/// A host call was refused, with proxy-wasm's status where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the proxy refused the call with status {0}")]
pub struct HostError(pub u32);

/// Severity of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// For the record.
    Info,
    /// A person should look.
    Warn,
    /// The filter cannot do its work.
    Error,
}

/// The counters. Fixed: metrics in Envoy never expire, so no name comes from traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
#[allow(missing_docs, reason = "each is what its name in METRIC_NAMES says")]
pub enum Metric {
    RequestNormal,
    RequestWarmingUp,
    RequestNotInspected,
    RequestAnomalous,
    ResponseNormal,
    ResponseWarmingUp,
    ResponseNotInspected,
    ResponseAnomalous,
    NotInspectedEncoding,
    NotInspectedContentType,
    NotInspectedSize,
    NotInspectedMalformed,
    NotInspectedCutShort,
    NotInspectedDisabled,
    NotInspectedWebsocket,
    NotInspectedNoBaseline,
    Refused,
    BytesInspected,
    BytesSkipped,
    BaselinesShared,
    BaselinesAdopted,
    BaselinesPulled,
    BaselinePullFailures,
    ObservationsSent,
    ObservationsDropped,
    ErrorBaseline,
    HostCallErrors,
}

/// Names of the counters, by [`Metric`].
pub const METRIC_NAMES: [&str; 27] = [
    "driftlock.messages.request.normal",
    "driftlock.messages.request.warming_up",
    "driftlock.messages.request.not_inspected",
    "driftlock.messages.request.anomalous",
    "driftlock.messages.response.normal",
    "driftlock.messages.response.warming_up",
    "driftlock.messages.response.not_inspected",
    "driftlock.messages.response.anomalous",
    "driftlock.not_inspected.encoding",
    "driftlock.not_inspected.content_type",
    "driftlock.not_inspected.size",
    "driftlock.not_inspected.malformed",
    "driftlock.not_inspected.cut_short",
    "driftlock.not_inspected.disabled",
    "driftlock.not_inspected.websocket",
    "driftlock.not_inspected.no_baseline",
    "driftlock.refused",
    "driftlock.bytes.inspected",
    "driftlock.bytes.skipped",
    "driftlock.baselines.shared",
    "driftlock.baselines.adopted",
    "driftlock.baselines.pulled",
    "driftlock.baselines.pull_failures",
    "driftlock.observations.sent",
    "driftlock.observations.dropped",
    "driftlock.errors.baseline",
    "driftlock.errors.host_call",
];

impl Metric {
    /// The counter's name.
    pub fn name(self) -> &'static str {
        METRIC_NAMES.get(self as usize).copied().unwrap_or("driftlock.errors.host_call")
    }
}

/// The proxy, as one exchange sees it.
pub trait Host {
    /// First value of a header of the message, `None` if it has none. Pseudo-headers count as headers.
    ///
    /// # Errors
    /// [`HostError`] if the proxy cannot tell.
    fn header(&self, direction: Direction, name: &str) -> Result<Option<Vec<u8>>, HostError>;

    /// Sets a header of the response, while its headers are open.
    ///
    /// # Errors
    /// [`HostError`] if they are not.
    fn set_response_header(&mut self, name: &str, value: &str) -> Result<(), HostError>;

    /// Removes a header of the response, while its headers are open; one that is not there is no error.
    ///
    /// # Errors
    /// [`HostError`] if they are not.
    fn remove_response_header(&mut self, name: &str) -> Result<(), HostError>;

    /// Sets filter state `wasm.<key>` for the access log.
    ///
    /// # Errors
    /// [`HostError`] if the proxy has none.
    fn set_filter_state(&mut self, key: &str, value: &str) -> Result<(), HostError>;

    /// Answers in the upstream's place; the body is JSON.
    ///
    /// # Errors
    /// [`HostError`] if it is too late.
    fn respond(&mut self, status: u16, body: &str) -> Result<(), HostError>;

    /// Adds to a counter.
    fn count(&mut self, metric: Metric, by: u64);

    /// Writes a log line.
    fn log(&mut self, level: Level, line: &str);

    /// A message was judged. For hosts that want more of the verdict than its JSON, such as its sentences.
    fn judged(&mut self, direction: Direction, verdict: &Verdict) {
        let _ = (direction, verdict);
    }
}
