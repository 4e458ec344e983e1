//! See [`driftlock_fuzz::session`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| driftlock_fuzz::session::holds(data));
