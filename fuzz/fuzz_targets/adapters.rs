//! See [`driftlock_fuzz::adapters`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| driftlock_fuzz::adapters::holds(data));
