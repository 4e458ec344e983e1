//! See [`driftlock_fuzz::splits`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| driftlock_fuzz::splits::holds(data));
