//! The proxy-wasm host against small guests written in WAT: each rule of the ABI and of Envoy that
//! the filter relies on, one guest each. The real filter runs elsewhere; here the guests do what a
//! well-behaved SDK never would.

mod guest;

mod attributes;
mod bodies;
mod callouts;
mod calls;
mod connections;
mod envoy;
mod grpc;
mod hostile;
mod limits;
mod policies;
mod replies;
mod sdk;
mod session;
mod start;
mod through;
