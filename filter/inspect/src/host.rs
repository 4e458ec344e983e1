//! What the inspection needs of the proxy: a small trait, so that the logic runs without one.
//!
//! What: [`Host`] is implemented by the filter over proxy-wasm host calls and by the replay in memory.
//! Every call that can fail returns a [`HostError`]; the session counts it and goes on.
//!
//! Left out on purpose: body bytes, which the caller hands over.

use alloc::vec::Vec;

use driftlock_engine::evidence::Verdict;

pub use crate::metrics::{GAUGE_NAMES, Gauge, HISTOGRAM_NAMES, Histogram, METRIC_NAMES, Metric};
pub use crate::refusal::Reply;

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

/// The proxy, as one exchange sees it.
pub trait Host {
    /// First value of a header of the message, `None` if it has none. Pseudo-headers count as headers.
    ///
    /// # Errors
    /// [`HostError`] if the proxy cannot tell.
    fn header(&self, direction: Direction, name: &str) -> Result<Option<Vec<u8>>, HostError>;

    /// Sets a header of the message, while its headers are open.
    ///
    /// # Errors
    /// [`HostError`] if they are not.
    fn set_header(&mut self, direction: Direction, name: &str, value: &str) -> Result<(), HostError>;

    /// Removes a header of the message, while its headers are open; one that is not there is no error.
    ///
    /// # Errors
    /// [`HostError`] if they are not.
    fn remove_header(&mut self, direction: Direction, name: &str) -> Result<(), HostError>;

    /// Sets a trailer of the response, in its last callback, where the client's protocol has trailers.
    /// One that has none is no error.
    ///
    /// # Errors
    /// [`HostError`] if the proxy refuses.
    fn set_response_trailer(&mut self, name: &str, value: &str) -> Result<(), HostError>;

    /// Puts `bytes` in the place of all that the proxy has of the message's body in this callback: the
    /// bytes just handed over and those that it holds.
    ///
    /// # Errors
    /// [`HostError`] if the proxy refuses; it then has what it had.
    fn set_body(&mut self, direction: Direction, bytes: &[u8]) -> Result<(), HostError>;

    /// Sets filter state `wasm.<key>` for the access log.
    ///
    /// # Errors
    /// [`HostError`] if the proxy has none.
    fn set_filter_state(&mut self, key: &str, value: &str) -> Result<(), HostError>;

    /// Answers in the upstream's place. Once response headers have gone, it breaks the response off.
    ///
    /// # Errors
    /// [`HostError`] if it is too late.
    fn respond(&mut self, reply: &Reply) -> Result<(), HostError>;

    /// The proxy's clock, for metrics and for nothing else: no verdict and no action may depend on it.
    /// None where there is no time, as in a replay.
    fn now_ns(&self) -> Option<u64>;

    /// Adds to a counter.
    fn count(&mut self, metric: Metric, by: u64);

    /// Adds a value to a histogram.
    fn record(&mut self, histogram: Histogram, value: u64);

    /// Sets a gauge.
    fn gauge(&mut self, gauge: Gauge, value: u64);

    /// Writes a log line.
    fn log(&mut self, level: Level, line: &str);

    /// A message was judged. For hosts that want more of the verdict than its JSON, such as its sentences.
    fn judged(&mut self, direction: Direction, verdict: &Verdict) {
        let _ = (direction, verdict);
    }
}
