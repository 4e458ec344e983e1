//! What the filter counts: a fixed list, since metrics in Envoy never expire.
//!
//! What: the names and kinds of all metrics. No name and no label comes from traffic, so their number is a
//! constant. A proxy that knows no labels gets them as the name's last parts; `envoy/README.md` has the
//! `stats_tags` that turn these parts into Prometheus labels. Where OpenTelemetry's semantic conventions for
//! generative AI name a metric (`gen_ai.client.token.usage`, `gen_ai.server.time_to_first_token`,
//! `gen_ai.server.time_per_output_token`), that is its name here, with the unit behind it.
//!
//! Cost: one host call each time one moves.
//!
//! Left out on purpose: a metric by stream, model or route, whose number traffic decides; the log line and
//! filter state carry those.

/// The counters.
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
    BlockedRequest,
    BlockedResponse,
    RedactedRequest,
    RedactedResponse,
    RedactedTokens,
    ShadowBlockedRequest,
    ShadowBlockedResponse,
    ShadowRedactedRequest,
    ShadowRedactedResponse,
    BytesInspected,
    BytesSkipped,
    BaselinesShared,
    BaselinesAdopted,
    BaselinesPulled,
    BaselinePullFailures,
    ObservationsSent,
    ObservationsDropped,
    ErrorTooLate,
    ErrorNotRedacted,
    ErrorHoldLimit,
    ErrorHoldDeadline,
    ErrorBaseline,
    HostCallErrors,
}

/// Names of the counters, by [`Metric`].
pub const METRIC_NAMES: [&str; 40] = [
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
    "driftlock.blocked.request",
    "driftlock.blocked.response",
    "driftlock.redacted.request",
    "driftlock.redacted.response",
    "driftlock.redacted_tokens",
    "driftlock.shadow_blocked.request",
    "driftlock.shadow_blocked.response",
    "driftlock.shadow_redacted.request",
    "driftlock.shadow_redacted.response",
    "driftlock.bytes.inspected",
    "driftlock.bytes.skipped",
    "driftlock.baselines.shared",
    "driftlock.baselines.adopted",
    "driftlock.baselines.pulled",
    "driftlock.baselines.pull_failures",
    "driftlock.observations.sent",
    "driftlock.observations.dropped",
    // An action that came too late to be taken: what it was for had passed.
    "driftlock.errors.too_late",
    // Redaction was asked for and this body has no text that could be rewritten.
    "driftlock.errors.not_redacted",
    // A message to be held until judged was longer than `hold.max_bytes`.
    "driftlock.errors.hold_limit",
    // Held headers were let go by the watchdog.
    "driftlock.errors.hold_deadline",
    "driftlock.errors.baseline",
    "driftlock.errors.host_call",
];

impl Metric {
    /// The counter's name.
    pub fn name(self) -> &'static str {
        METRIC_NAMES.get(self as usize).copied().unwrap_or("driftlock.errors.host_call")
    }
}

/// The histograms. Values are whole numbers, in the unit that the name ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
#[allow(missing_docs, reason = "each is what its name in HISTOGRAM_NAMES says")]
pub enum Histogram {
    RequestPValue,
    ResponsePValue,
    RequestScoringTime,
    ResponseScoringTime,
    InputTokens,
    OutputTokens,
    TimeToFirstToken,
    TimePerOutputToken,
    TokensPerSecond,
}

/// Names of the histograms, by [`Histogram`].
pub const HISTOGRAM_NAMES: [&str; 9] = [
    "driftlock.p_value_ppm.request",
    "driftlock.p_value_ppm.response",
    "driftlock.scoring_time_us.request",
    "driftlock.scoring_time_us.response",
    "driftlock.gen_ai.client.token.usage.input",
    "driftlock.gen_ai.client.token.usage.output",
    "driftlock.gen_ai.server.time_to_first_token_ms",
    "driftlock.gen_ai.server.time_per_output_token_us",
    "driftlock.tokens_per_second",
];

/// The gauges. Workers share each name: the last to write is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
#[allow(missing_docs, reason = "each is what its name in GAUGE_NAMES says")]
pub enum Gauge {
    Streams,
    BaselineAge,
}

/// Names of the gauges, by [`Gauge`].
pub const GAUGE_NAMES: [&str; 2] = ["driftlock.streams", "driftlock.baseline_age_s"];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_metric_has_a_name_of_its_own() {
        let names: BTreeSet<_> = METRIC_NAMES.iter().chain(&HISTOGRAM_NAMES).chain(&GAUGE_NAMES).collect();
        assert_eq!(names.len(), METRIC_NAMES.len() + HISTOGRAM_NAMES.len() + GAUGE_NAMES.len());
        assert_eq!(Metric::HostCallErrors as usize, METRIC_NAMES.len() - 1);
        assert_eq!(Histogram::TokensPerSecond as usize, HISTOGRAM_NAMES.len() - 1);
        assert_eq!(Gauge::BaselineAge as usize, GAUGE_NAMES.len() - 1);
        assert_eq!(Metric::HostCallErrors.name(), "driftlock.errors.host_call");
        assert_eq!(Metric::NotInspectedWebsocket.name(), "driftlock.not_inspected.websocket");
        assert_eq!(Metric::ErrorTooLate.name(), "driftlock.errors.too_late");
    }
}
