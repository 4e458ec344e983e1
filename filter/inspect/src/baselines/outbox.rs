//! Observations on their way to the host service.
//!
//! What: a verdict is a line of JSON; lines are kept in a bounded buffer and posted in batches, one at a
//! time. What finds no room, or was not taken in time, is dropped and counted: the proxy's traffic never
//! waits for its reports.
//!
//! Why verdicts only: they hold numbers, offsets and stream keys, and no text of the message.
//!
//! Cost: a copy of the line; memory is the configured bound.
//!
//! Left out on purpose: text for training, even redacted. `driftlock train` takes captures.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use driftlock_engine::baseline::Digest;

use super::{Answer, Backoff, Call, SECOND_NS, Services};
use crate::host::{Level, Metric};

/// Longest wait after failures.
const MAX_WAIT_NS: u64 = 60 * SECOND_NS;

/// Where observations go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostTo {
    /// The proxy's cluster.
    pub cluster: String,
    /// `:authority`.
    pub authority: String,
    /// Path.
    pub path: String,
    /// How long a call may take.
    pub timeout_ms: u32,
    /// Longest batch.
    pub max_batch_bytes: usize,
    /// Most bytes waiting.
    pub max_pending_bytes: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Outbox {
    to: PostTo,
    backoff: Backoff,
    pending: Vec<u8>,
    /// The batch under way: its call and its length.
    in_flight: Option<(u32, usize)>,
    not_before_ns: u64,
    /// Since the last tick.
    dropped: u64,
}

impl Outbox {
    pub(super) fn new(to: PostTo) -> Self {
        Self {
            to,
            backoff: Backoff::new(),
            pending: Vec::new(),
            in_flight: None,
            not_before_ns: 0,
            dropped: 0,
        }
    }

    pub(super) fn start(&mut self, seed: Digest) {
        self.backoff.seed = seed;
    }

    /// Adds an observation, a JSON object without a line end. `kind` is a plain word.
    pub fn push(&mut self, kind: &str, json: &str) {
        let line = kind.len() + json.len() + 32;
        if line > self.to.max_batch_bytes || self.pending.len() + line > self.to.max_pending_bytes {
            self.dropped += 1;
            return;
        }
        let parts = ["{\"message\":\"", kind, "\",\"verdict\":", json, "}\n"];
        parts.iter().for_each(|part| self.pending.extend_from_slice(part.as_bytes()));
    }

    /// Bytes waiting.
    pub fn pending_bytes(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn tick(&mut self, now_ns: u64, services: &mut impl Services) {
        let dropped = core::mem::take(&mut self.dropped);
        if dropped > 0 {
            services.count(Metric::ObservationsDropped, dropped);
        }
        if self.in_flight.is_some() || self.pending.is_empty() || now_ns < self.not_before_ns {
            return;
        }
        let most = self.pending.get(..self.to.max_batch_bytes).unwrap_or(&self.pending);
        let length = most.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let headers = [
            (":method", "POST"),
            (":path", self.to.path.as_str()),
            (":authority", self.to.authority.as_str()),
            ("content-type", "application/x-ndjson"),
        ];
        let body = self.pending.get(..length).unwrap_or_default();
        let call =
            Call { cluster: &self.to.cluster, headers: &headers, body, timeout_ms: self.to.timeout_ms };
        match services.call(call) {
            Ok(token) => self.in_flight = Some((token, length)),
            Err(error) => self.failed(now_ns, &format!("{error}"), services),
        }
    }

    pub(super) fn answered(
        &mut self,
        token: u32,
        answer: Answer<'_>,
        now_ns: u64,
        services: &mut impl Services,
    ) {
        let Some((_, length)) = self.in_flight.take_if(|(own, _)| *own == token) else { return };
        match answer.status {
            Some(200..=299) => {
                self.backoff.failures = 0;
                services.count(Metric::ObservationsSent, self.lines(length));
                self.remove(length);
            }
            // It will not like them better later.
            Some(400 | 413 | 415 | 422) => {
                services.count(Metric::ObservationsDropped, self.lines(length));
                self.remove(length);
                self.failed(now_ns, "it refused the batch, which is dropped", services);
            }
            Some(status) => self.failed(now_ns, &format!("it answered {status}"), services),
            None => self.failed(now_ns, "it did not answer", services),
        }
    }

    fn lines(&self, length: usize) -> u64 {
        self.pending.iter().take(length).filter(|&&byte| byte == b'\n').count() as u64
    }

    fn remove(&mut self, length: usize) {
        self.pending.drain(..length.min(self.pending.len()));
    }

    fn failed(&mut self, now_ns: u64, reason: &str, services: &mut impl Services) {
        let wait = self.backoff.after_failure(MAX_WAIT_NS);
        self.not_before_ns = now_ns.saturating_add(wait);
        let PostTo { cluster, path, .. } = &self.to;
        let line = format!(
            "driftlock: observations cannot be posted to {path} of cluster {cluster}: {reason}; again in {} ms",
            wait / 1_000_000
        );
        services.log(Level::Warn, &line);
    }
}
