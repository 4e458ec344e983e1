//! What must hold of every input: one function a property, shared by cargo-fuzz and by proptest.
//!
//! Each module has one `holds(data)`, which reads its case from arbitrary bytes and panics when the property
//! is broken. `fuzz_targets/` hands it libFuzzer's bytes, `tests/` hands it proptest's, so whatever a fuzzer
//! finds is a test case and the other way round.
//!
//! | module | subject |
//! |---|---|
//! | [`snapshot`] | decoding baselines: arbitrary bytes, and damaged ones under a digest that fits |
//! | [`body`] | body parsers: every split, offsets, coverage, agreement with serde_json and a naive SSE reader |
//! | [`memory`] | what decoding and parsing may allocate; needs a process without other threads |
//! | [`config`] | plugin configurations |
//! | [`decode`] | undoing content codings: splits, bounds, agreement with other decoders |
//! | [`session`] | an exchange under any order of callbacks and any failing host calls |
//! | [`splits`] | learning and judging do not depend on how bodies were cut |
//! | [`coder`] | code lengths against a naive model |
//! | [`rewrite`] | normalising and redacting text |
//! | [`score`] | scores against sums, for every split |
//! | [`adapters`] | code lengths of the compressors within and beyond their windows; the router |
//!
//! Left out on purpose: the proxy-wasm host calls, which parse nothing.

pub mod adapters;
pub mod body;
pub mod coder;
pub mod config;
pub mod decode;
mod input;
pub mod memory;
pub mod rewrite;
pub mod score;
pub mod session;
pub mod snapshot;
pub mod splits;

/// Counts what is allocated, for [`memory`].
#[global_allocator]
static HEAP: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;
