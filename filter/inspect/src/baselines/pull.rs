//! Snapshots pulled from the host service, by digest.
//!
//! What: a GET of `PATH/DIGEST`, or where the configuration names no digest, of `PATH/current` at an
//! interval, with `if-none-match` so that nothing comes twice. A snapshot is taken if its bytes hash to the
//! digest they state, the configured one if there is one, and its streams fit name and alpha. Then it
//! replaces the baselines of its streams; other streams stay. Whatever fails, the old ones stay.
//!
//! Why through shared data, too: a VM of the same process that has pulled leaves the bytes there for the
//! others.
//!
//! Cost: one call an interval and VM, nearly always answered 304.
//!
//! Left out on purpose: authentication and TLS, which belong to the proxy's cluster.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use driftlock_engine::baseline::{Digest, Snapshot};
use driftlock_engine::detector::Detector;

use super::share::blob_key;
use super::{Answer, Backoff, Call, Check, SECOND_NS, Services};
use crate::host::{Level, Metric};

/// Where snapshots come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullFrom {
    /// The proxy's cluster.
    pub cluster: String,
    /// `:authority`.
    pub authority: String,
    /// Path before the digest, without a slash at its end.
    pub path: String,
    /// The one snapshot wanted, in hexadecimal; without one, the current.
    pub sha256: Option<String>,
    /// Seconds between looks for a newer one.
    pub interval_s: u32,
    /// How long a call may take.
    pub timeout_ms: u32,
    /// Longest snapshot.
    pub max_bytes: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Pull {
    from: PullFrom,
    backoff: Backoff,
    /// When to call again.
    due: Due,
    in_flight: Option<u32>,
    /// Digest of what was taken last.
    current: Option<String>,
    /// The streams that it brought.
    pub(super) streams: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    /// So long after the next tick.
    After(u64),
    At(u64),
}

impl Pull {
    pub(super) fn new(from: PullFrom) -> Self {
        Self {
            from,
            backoff: Backoff::new(),
            due: Due::After(0),
            in_flight: None,
            current: None,
            streams: Vec::new(),
        }
    }

    pub(super) fn start(&mut self, seed: Digest, ordinal: u32) {
        self.backoff.seed = seed;
        // The first VM goes ahead; the others may find what it pulled.
        let wait = if ordinal == 0 { 0 } else { SECOND_NS + self.backoff.spread(SECOND_NS) };
        self.due = Due::After(wait);
    }

    pub(super) fn tick(
        &mut self,
        now_ns: u64,
        fingerprint: &Digest,
        check: Check<'_>,
        detector: &mut Detector,
        services: &mut impl Services,
    ) {
        self.adopt_shared(fingerprint, check, detector, services);
        if self.in_flight.is_some() || (self.from.sha256.is_some() && self.current == self.from.sha256) {
            return;
        }
        let due_ns = match self.due {
            Due::After(wait) => now_ns.saturating_add(wait),
            Due::At(due_ns) => due_ns,
        };
        self.due = Due::At(due_ns);
        if now_ns < due_ns {
            return;
        }
        let wanted = self.from.sha256.as_deref().unwrap_or("current");
        let path = format!("{}/{wanted}", self.from.path);
        let etag = self.current.as_ref().map(|digest| format!("\"{digest}\""));
        let mut headers = [
            (":method", "GET"),
            (":path", path.as_str()),
            (":authority", &self.from.authority),
            ("accept", "application/octet-stream"),
            ("if-none-match", ""),
        ];
        let headers = match (&etag, headers.split_last_mut()) {
            (Some(etag), Some((last, _))) => {
                last.1 = etag;
                &headers[..]
            }
            _ => headers.split_last().map_or(&[][..], |(_, rest)| rest),
        };
        let call = Call { cluster: &self.from.cluster, headers, body: b"", timeout_ms: self.from.timeout_ms };
        match services.call(call) {
            Ok(token) => self.in_flight = Some(token),
            Err(error) => self.failed(now_ns, &format!("{error}"), services),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the keeper's parts, lent one by one")]
    pub(super) fn answered(
        &mut self,
        token: u32,
        answer: Answer<'_>,
        now_ns: u64,
        fingerprint: &Digest,
        check: Check<'_>,
        detector: &mut Detector,
        services: &mut impl Services,
    ) {
        if self.in_flight != Some(token) {
            return;
        }
        self.in_flight = None;
        let taken = match answer.status {
            Some(200) => self.take(answer.body, check, detector),
            Some(304) => Ok(None),
            Some(status) => Err(format!("it answered {status}")),
            None => Err("it did not answer".to_string()),
        };
        match taken {
            Ok(taken) => {
                self.backoff.failures = 0;
                let interval_ns = u64::from(self.from.interval_s) * SECOND_NS;
                let spread = self.backoff.spread((interval_ns / 10).max(1));
                self.due = Due::At(now_ns.saturating_add(interval_ns).saturating_add(spread));
                let Some(digest) = taken else { return };
                services.count(Metric::BaselinesPulled, 1);
                services.log(Level::Info, &format!("driftlock: took the pulled baseline {digest}"));
                // Where it cannot be shared, the others pull it themselves.
                if services.set_shared(&blob_key(&digest), answer.body, 0).is_ok() {
                    let _ = services.set_shared(&pointer_key(fingerprint), digest.as_bytes(), 0);
                }
                self.current = Some(digest);
            }
            Err(reason) => self.failed(now_ns, &reason, services),
        }
    }

    /// Takes what another VM has pulled.
    fn adopt_shared(
        &mut self,
        fingerprint: &Digest,
        check: Check<'_>,
        detector: &mut Detector,
        services: &mut impl Services,
    ) {
        let text = |(value, _)| String::from_utf8(value).ok();
        let Some(digest) = services.shared(&pointer_key(fingerprint)).ok().flatten().and_then(text) else {
            return;
        };
        if self.current.as_ref() == Some(&digest) {
            return;
        }
        let Some((bytes, _)) = services.shared(&blob_key(&digest)).ok().flatten() else { return };
        match self.take(&bytes, check, detector) {
            Ok(Some(taken)) => {
                services.count(Metric::BaselinesAdopted, 1);
                self.current = Some(taken);
            }
            Ok(None) => {}
            Err(reason) => {
                services.count(Metric::ErrorBaseline, 1);
                services.log(Level::Error, &format!("driftlock: a shared baseline is refused: {reason}"));
                // Not again before there is another one.
                self.current = Some(digest);
            }
        }
    }

    /// The digest of the snapshot, if it is a new one; all of it is taken, or nothing.
    fn take(
        &mut self,
        bytes: &[u8],
        check: Check<'_>,
        detector: &mut Detector,
    ) -> Result<Option<String>, String> {
        if bytes.len() > self.from.max_bytes {
            return Err(format!("it has {} bytes, more than pull.max_bytes", bytes.len()));
        }
        let snapshot = Snapshot::decode(bytes).map_err(|error| error.to_string())?;
        let stated = bytes.last_chunk().map(|digest| Digest(*digest).to_string()).unwrap_or_default();
        if let Some(wanted) = &self.from.sha256
            && *wanted != stated
        {
            return Err(format!("its digest is {stated}"));
        }
        check.of(&snapshot)?;
        if self.current.as_ref() == Some(&stated) {
            return Ok(None);
        }
        self.streams = snapshot.streams().iter().map(|baseline| baseline.stream().into()).collect();
        snapshot.into_streams().into_iter().for_each(|baseline| detector.adopt(Arc::new(baseline)));
        Ok(Some(stated))
    }

    fn failed(&mut self, now_ns: u64, reason: &str, services: &mut impl Services) {
        let most_ns = u64::from(self.from.interval_s.max(1)) * SECOND_NS;
        let wait = self.backoff.after_failure(most_ns);
        self.due = Due::At(now_ns.saturating_add(wait));
        services.count(Metric::BaselinePullFailures, 1);
        let PullFrom { cluster, path, .. } = &self.from;
        let line = format!(
            "driftlock: no baseline from {path} of cluster {cluster}: {reason}; again in {} ms, what is there stays",
            wait / 1_000_000
        );
        services.log(Level::Warn, &line);
    }
}

fn pointer_key(fingerprint: &Digest) -> String {
    format!("driftlock.pulled/{fingerprint}")
}
