//! See [`driftlock_fuzz::score`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| driftlock_fuzz::score::holds(data));
