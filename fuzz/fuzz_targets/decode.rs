//! See [`driftlock_fuzz::decode`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| driftlock_fuzz::decode::holds(data));
