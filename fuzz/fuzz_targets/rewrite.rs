//! See [`driftlock_fuzz::rewrite`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| driftlock_fuzz::rewrite::holds(data));
