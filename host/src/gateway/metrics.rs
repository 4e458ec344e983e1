//! The gateway's own counters in the Prometheus text format.
//!
//! A fixed, small set without per-path or per-client labels, so that the number of series never
//! depends on traffic. Costs one relaxed atomic addition per event.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use super::access_log::AccessRecord;

/// A number that other threads may read at any time.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn increment(&self) {
        self.add(1);
    }

    pub(super) fn decrement(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub(super) fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the duration histogram, in milliseconds: from a cache's answer to an LLM's.
const BOUNDS_MS: [u64; 15] =
    [1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 10_000, 30_000, 100_000, 300_000];

const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// Everything the gateway counts.
#[derive(Debug, Default)]
pub(super) struct Counters {
    responses: [Counter; CLASSES.len()],
    unanswered: Counter,
    aborted: Counter,
    request_bytes: Counter,
    response_bytes: Counter,
    duration_us: Counter,
    durations: [Counter; BOUNDS_MS.len()],
    ended: Counter,
    pub(super) in_flight: Counter,
    pub(super) connections: Counter,
    pub(super) upstream_failures: Counter,
    pub(super) filter_failures: Counter,
    pub(super) tunnels: Counter,
    pub(super) tls_failures: Counter,
    pub(super) reloads: Counter,
    pub(super) reload_failures: Counter,
}

impl Counters {
    pub(super) fn finished(&self, record: &AccessRecord) {
        let class =
            record.status.and_then(|status| self.responses.get(usize::from(status / 100).wrapping_sub(1)));
        class.unwrap_or(&self.unanswered).increment();
        if record.outcome != "complete" {
            self.aborted.increment();
        }
        self.request_bytes.add(record.bytes_in);
        self.response_bytes.add(record.bytes_out);
        let duration_us = u64::try_from(record.duration.as_micros()).unwrap_or(u64::MAX);
        self.duration_us.add(duration_us);
        if let Some(at) = BOUNDS_MS.iter().position(|bound| duration_us <= bound * 1000) {
            self.durations[at].increment();
        }
        self.ended.increment();
    }

    pub(super) fn write(&self, access_log_dropped: u64, out: &mut String) {
        let name = "driftlock_gateway_requests_total";
        header(out, name, "counter", "Exchanges that ended, by the class of the status sent to the client.");
        for (class, counter) in CLASSES.iter().zip(&self.responses) {
            let _ = writeln!(out, "{name}{{code=\"{class}\"}} {}", counter.value());
        }
        let _ = writeln!(out, "{name}{{code=\"none\"}} {}", self.unanswered.value());
        let name = "driftlock_gateway_duration_seconds";
        header(out, name, "histogram", "From a request's headers to the last byte of its response.");
        let mut total = 0;
        for (bound_ms, counter) in BOUNDS_MS.iter().zip(&self.durations) {
            total += counter.value();
            let _ = writeln!(out, "{name}_bucket{{le=\"{}\"}} {total}", *bound_ms as f64 / 1000.0);
        }
        let ended = self.ended.value();
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {ended}");
        let _ = writeln!(out, "{name}_sum {}", self.duration_us.value() as f64 / 1e6);
        let _ = writeln!(out, "{name}_count {ended}");
        let plain = [
            (
                "aborted_total",
                "counter",
                "Exchanges cut short by a client, the upstream, the filter or a time-out.",
                self.aborted.value(),
            ),
            (
                "request_bytes_total",
                "counter",
                "Request body bytes received from clients.",
                self.request_bytes.value(),
            ),
            (
                "response_bytes_total",
                "counter",
                "Response body bytes handed to clients.",
                self.response_bytes.value(),
            ),
            ("in_flight_requests", "gauge", "Exchanges that have not ended.", self.in_flight.value()),
            ("connections_total", "counter", "Client connections accepted.", self.connections.value()),
            (
                "upstream_failures_total",
                "counter",
                "Requests the upstream did not answer.",
                self.upstream_failures.value(),
            ),
            (
                "filter_failures_total",
                "counter",
                "Exchanges in which the filter crashed or was not to be had.",
                self.filter_failures.value(),
            ),
            (
                "tunnels_total",
                "counter",
                "Websockets and CONNECT tunnels, whose bytes pass no filter.",
                self.tunnels.value(),
            ),
            (
                "tls_failures_total",
                "counter",
                "Client connections whose TLS handshake failed.",
                self.tls_failures.value(),
            ),
            ("reloads_total", "counter", "Configurations loaded after the first.", self.reloads.value()),
            (
                "reload_failures_total",
                "counter",
                "Configurations refused after the first; the one before stays.",
                self.reload_failures.value(),
            ),
            ("access_log_dropped_total", "counter", "Access log lines lost.", access_log_dropped),
        ];
        for (suffix, kind, help, value) in plain {
            let name = format!("driftlock_gateway_{suffix}");
            header(out, &name, kind, help);
            let _ = writeln!(out, "{name} {value}");
        }
    }
}

/// Appends a metric's HELP and TYPE lines.
pub(super) fn header(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Appends one value; `name` may carry labels.
pub(super) fn sample(out: &mut String, name: &str, value: u64) {
    let _ = writeln!(out, "{name} {value}");
}

/// A label's value, escaped.
pub(super) fn label(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// A name Prometheus accepts (`[a-zA-Z_:][a-zA-Z0-9_:]*`): every other character becomes `_`.
pub(super) fn sanitised_name(name: &str) -> String {
    let mut clean: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '_' || c == ':' { c } else { '_' })
        .collect();
    if clean.is_empty() || clean.starts_with(|c: char| c.is_ascii_digit()) {
        clean.insert(0, '_');
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_valid() {
        assert_eq!(sanitised_name("driftlock.verdict-total"), "driftlock_verdict_total");
        assert_eq!(sanitised_name("9lives"), "_9lives");
        assert_eq!(sanitised_name("\u{fc}"), "_");
        assert_eq!(sanitised_name(""), "_");
    }

    #[test]
    fn odd_statuses_are_counted_once() {
        let counters = Counters::default();
        let client = std::net::SocketAddr::from(([127, 0, 0, 1], 9));
        let mut record = AccessRecord::begin("GET".to_owned(), "/".to_owned(), client);
        for status in [Some(200), Some(99), Some(999), None] {
            record.status = status;
            counters.finished(&record);
        }
        assert_eq!(counters.responses[1].value(), 1);
        assert_eq!(counters.unanswered.value(), 3);
    }

    #[test]
    fn the_duration_histogram_adds_up() {
        let counters = Counters::default();
        let client = std::net::SocketAddr::from(([127, 0, 0, 1], 9));
        let mut record = AccessRecord::begin("GET".to_owned(), "/".to_owned(), client);
        for duration_us in [1, 1000, 1001, 90_000, 999_000_000] {
            record.duration = std::time::Duration::from_micros(duration_us);
            counters.finished(&record);
        }
        let mut out = String::new();
        counters.write(0, &mut out);
        for line in [
            "bucket{le=\"0.001\"} 2",
            "bucket{le=\"0.002\"} 3",
            "bucket{le=\"300\"} 4",
            "bucket{le=\"+Inf\"} 5",
            "count 5",
        ] {
            assert!(out.contains(&format!("duration_seconds_{line}\n")), "{line}: {out}");
        }
    }
}
