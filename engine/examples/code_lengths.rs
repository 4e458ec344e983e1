//! Code lengths and metrics of generated texts, for comparing targets.
//!
//! Built as a wasm module (`cargo build --package driftlock-engine --example code_lengths --features zstd
//! --target wasm32-unknown-unknown`) it exports `count` and `value`; `tests/tests/code_lengths.rs` includes
//! this file and holds the two builds against each other. Cost: a second in a debug build.

use driftlock_engine::adapters::Adapter;
use driftlock_engine::contrast::{Contrast, Lexicon};
use driftlock_engine::metrics;

const ADAPTERS: [Adapter; 3] = [Adapter::Zstd, Adapter::Lz4, Adapter::Deflate];
/// Lengths about the sizes at which codecs change their parameters.
const LENGTHS: [usize; 10] = [0, 1, 13, 60, 300, 1_500, 5_000, 14_000, 33_000, 150_000];

/// Text that repeats itself more or less, and noise.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::new();
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        match x % 8 {
            0 => out.extend_from_slice(&x.to_le_bytes()),
            1..=3 => out.extend_from_slice(b"{\"role\":\"user\",\"content\":\""),
            4 => out.extend_from_slice(format!("order {} of customer {}", x >> 50, x % 97).as_bytes()),
            _ => out.extend_from_slice(b"where is my order? "),
        }
    }
    out.truncate(len);
    out
}

/// Everything as integers; results in f64 by their bits, a refusal as `u64::MAX`.
pub fn values() -> Vec<u64> {
    let mut values = Vec::new();
    let bits = |value: Option<f64>| value.map_or(u64::MAX, f64::to_bits);
    for (i, &len) in LENGTHS.iter().enumerate() {
        let (x, y) = (text(2 * i as u64, len), text(2 * i as u64 + 1, 12_000));
        values.push(bits(metrics::entropy_bits_per_byte(&x)));
        for adapter in ADAPTERS {
            let Ok(mut compressor) = adapter.compressor() else {
                values.push(u64::MAX);
                continue;
            };
            let lengths = [
                compressor.code_length_bits(&x),
                compressor.code_length_bits(&y),
                compressor.joint_bits(&x, &y),
                compressor.conditional_bits(&x, &y),
                compressor.conditional_bits(&y, &x),
            ]
            .map(|length| length.unwrap_or(u64::MAX));
            values.extend(lengths);
            let [cx, cy, cxy, x_given_y, y_given_x] = lengths;
            values.push(bits(metrics::ncd(cx, cy, cxy)));
            values.push(bits(metrics::conditional_ncd(cx, cy, x_given_y, y_given_x)));
            values.push(bits(metrics::compression_ratio(len as u64, cx)));
        }
    }
    let (mut baseline, mut reference) = (Lexicon::new(1 << 16), Lexicon::new(1 << 16));
    (0..40).for_each(|i| baseline.learn(&text(i, 300)));
    (40..60).for_each(|i| reference.learn(&text(i, 500)));
    let mut contrast = Contrast::new(&baseline, &reference);
    let views: Vec<_> = (60..100).map(|i| contrast.views(&text(i, 200), (900 + i) << 8, 1000 << 8)).collect();
    contrast.fit(&views);
    values.extend(views.iter().map(|views| contrast.score(views) as u64));
    values
}

/// How many values there are.
#[unsafe(no_mangle)]
pub extern "C" fn count() -> u32 {
    values().len() as u32
}

/// One of them.
#[unsafe(no_mangle)]
pub extern "C" fn value(at: u32) -> u64 {
    thread_local! {
        static VALUES: Vec<u64> = values();
    }
    VALUES.with(|values| values.get(at as usize).copied().unwrap_or_default())
}
