//! See [`driftlock_fuzz::coder`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| driftlock_fuzz::coder::holds(data));
