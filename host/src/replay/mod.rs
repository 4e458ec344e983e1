//! replay
pub mod envoy;
pub mod upstream;
pub mod wire;
