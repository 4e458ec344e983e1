//! See [`driftlock_fuzz::config`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| driftlock_fuzz::config::holds(data));
