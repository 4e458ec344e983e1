//! A guest that does whatever the bytes say, driven by a proxy that does too.
//! `cargo +nightly fuzz run hostile -- -max_len=2048` from `host/`.
#![no_main]

#[path = "../../tests/abi/guest.rs"]
#[allow(dead_code)]
mod guest;
#[path = "../../tests/abi/session.rs"]
mod session;

libfuzzer_sys::fuzz_target!(|data: &[u8]| drop(session::holds(data)));
