//! The verdict as the demo reads it back from the access log.
//!
//! The demo reads what an operator reads: the JSON that the filter left in the filter state. Only
//! the fields that the report shows are named here; the schema is `driftlock_engine::evidence`.

use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Verdict {
    pub(super) stream: String,
    pub(super) outcome: String,
    pub(super) reason: Option<String>,
    pub(super) unit: Option<String>,
    pub(super) unit_index: Option<u16>,
    pub(super) p_value: Option<f64>,
    /// `[rank, of]`: rank - 1 of of - 1 held-out normal messages were at least as strange.
    pub(super) p_fraction: Option<[u32; 2]>,
    pub(super) alpha: f64,
    pub(super) scores: Option<Scores>,
    pub(super) spans: Vec<Span>,
    pub(super) units: Vec<Unit>,
    pub(super) baseline: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Unit {
    pub(super) unit: String,
    pub(super) index: u16,
    pub(super) mean_bits: f64,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Scores {
    pub(super) mean_bits: f64,
    pub(super) expected_mean_bits: f64,
}

/// Offsets in the unit's text, half open.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) bits: f64,
    pub(super) expected_bits: f64,
}

impl Verdict {
    pub(super) fn is_anomalous(&self) -> bool {
        self.outcome == "anomalous"
    }

    /// The first digits of the baseline's digest, enough to tell baselines apart by eye.
    pub(super) fn short_baseline(&self) -> &str {
        let digest = self.baseline.as_deref().unwrap_or("none");
        digest.get(..12).unwrap_or(digest)
    }
}
