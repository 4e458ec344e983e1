//! Seeded draws for the traffic generator.
//!
//! ChaCha8 (RFC 8439's block function with eight rounds) keyed by the run's seed, one stream per
//! exchange, so that exchange `i` does not depend on how many others a run makes. Only 64-bit words
//! are drawn and only integers are computed from them: no float, no `usize` and no platform
//! difference. A draw costs a few nanoseconds. Modulo bias is below 2^-32 for every range used
//! here; this is no source of secrets.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

/// Bytes after the seed in the key: the generator's name, so that no other user of ChaCha with the
/// same seed draws the same words.
const DOMAIN: &[u8; 24] = b"driftlock synth traffic\0";

pub(super) struct Dice(ChaCha8Rng);

impl Dice {
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..].copy_from_slice(DOMAIN);
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(stream);
        Self(rng)
    }

    /// Uniform in `0..n`; 0 where `n` is 0.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.0.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// Uniform in `low..=high`.
    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    pub(super) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub(super) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    /// `n` characters of `alphabet`.
    pub(super) fn chars(&mut self, alphabet: &[u8], n: u64) -> String {
        (0..n).map(|_| char::from(*self.pick(alphabet))).collect()
    }

    pub(super) fn hex(&mut self, n: u64) -> String {
        self.chars(b"0123456789abcdef", n)
    }

    /// Letters and digits, as in the ids of the OpenAI API.
    pub(super) fn base62(&mut self, n: u64) -> String {
        self.chars(BASE62, n)
    }

    /// A random UUID in its usual form (RFC 9562 section 5.4).
    pub(super) fn uuid(&mut self) -> String {
        let variant = self.chars(b"89ab", 1);
        format!("{}-{}-4{}-{variant}{}-{}", self.hex(8), self.hex(4), self.hex(3), self.hex(3), self.hex(12))
    }
}

pub(super) const BASE62: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
pub(super) const BASE64: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
