//! Driftlock's engine: bytes to code lengths under a frozen baseline, scores, valid p-values, evidence.
//!
//! The engine is given the content units of a message (a prompt, a completion, a path and query) and
//! says how unlike the baseline's normal traffic the message is, and where. It is `no_std` + `alloc`,
//! reads no clock and does no I/O; everything that decides is integer arithmetic, so the same bytes
//! under the same baseline give the same verdict on every target.
//!
//! The way through, each module on top of the one before:
//! [`coder`] (bytes to code lengths) → [`score`] (code lengths to nonconformity scores and spans) →
//! [`calibrate`] (scores to conformal p-values) → [`baseline`] (train, freeze, encode, digest) →
//! [`detector`] (learn / score state machine per stream) → [`evidence`] (the verdict).
//!
//! Over many messages: [`significance`] (which share of the alarms is false), [`drift`] (has the stream moved),
//! [`adapt`] (baselines that follow it).
//!
//! Beside it [`adapters`] (classical compressors as code lengths) and [`metrics`] (what is computed from
//! code lengths), for distances, evaluation and cross-checks.
//!
//! Left out on purpose: HTTP, JSON parsing, time, threads, logging. Those belong to the callers.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod adapt;
pub mod adapters;
pub mod baseline;
pub mod bitmap;
pub mod calibrate;
pub mod coder;
pub mod contrast;
pub mod detector;
pub mod drift;
pub mod evidence;
pub mod field;
pub mod metrics;
pub mod normalise;
pub mod score;
pub mod significance;
pub mod words;

/// The version every verdict carries; a change that can change a verdict raises it.
pub const ENGINE_VERSION: &str = env!("CARGO_PKG_VERSION");
