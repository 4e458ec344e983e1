//! See [`driftlock_fuzz::body`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| driftlock_fuzz::body::holds(data));
