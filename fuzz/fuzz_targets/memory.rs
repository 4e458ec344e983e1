//! See [`driftlock_fuzz::memory`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| driftlock_fuzz::memory::holds(data));
