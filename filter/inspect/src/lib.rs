//! Driftlock's inspection: HTTP messages to content units, units to verdicts, verdicts to the proxy.
//!
//! Everything the filter decides is here, behind the small [`host::Host`] trait, so that the same code
//! runs in Envoy, in the gateway and in a native replay. `no_std` + `alloc`, no panics; a clock for metrics only.
//!
//! [`config`] says what to do, [`session`] follows one exchange, [`content`] turns bodies into units
//! (by way of `json`, `sse`, `frames` and `envelope`), the engine judges them.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod action;
pub mod baselines;
pub mod config;
pub mod content;
pub mod decode;
mod envelope;
pub mod exclude;
mod frames;
pub mod host;
mod json;
mod metrics;
mod refusal;
mod rewrite;
pub mod session;
mod sse;
