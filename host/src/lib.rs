//! The native side of Driftlock.
pub mod abi;
pub mod adapt;
pub mod aggregate;
pub mod bench;
pub mod capture;
pub mod check;
pub mod demo;
pub mod drift;
pub mod envoy;
pub mod eval;
pub mod explain;
pub mod gateway;
pub mod replay;
pub mod synth;
pub mod train;
pub mod units;
