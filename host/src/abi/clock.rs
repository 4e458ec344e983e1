//! Time and randomness as the guest sees them: real, or chosen by the caller so that a replay gives
//! the same answer every time.

use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng as _, SeedableRng as _};

/// Where the guest's time comes from.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum Clock {
    /// The machine's clocks.
    #[default]
    Real,
    /// A number the caller sets; realtime and monotonic clocks both read it.
    Virtual(VirtualClock),
}

/// A settable time, shared by clones, in nanoseconds since the Unix epoch.
#[derive(Debug, Clone, Default)]
pub struct VirtualClock {
    now_ns: Arc<AtomicU64>,
}

impl VirtualClock {
    /// A clock that stands at `now_ns`.
    #[must_use]
    pub fn at_ns(now_ns: u64) -> Self {
        Self { now_ns: Arc::new(AtomicU64::new(now_ns)) }
    }

    /// Moves every clone to `now_ns`.
    pub fn set_ns(&self, now_ns: u64) {
        self.now_ns.store(now_ns, Ordering::Release);
    }

    /// Where it stands.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.now_ns.load(Ordering::Acquire)
    }
}

impl Clock {
    /// A virtual clock that stands at `now_ns`; keep a [`VirtualClock`] instead to move it.
    #[must_use]
    pub fn fixed_ns(now_ns: u64) -> Self {
        Self::Virtual(VirtualClock::at_ns(now_ns))
    }

    /// Nanoseconds since the Unix epoch.
    pub(super) fn realtime_ns(&self) -> u64 {
        match self {
            Self::Real => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)),
            Self::Virtual(clock) => clock.now_ns(),
        }
    }

    /// Nanoseconds since `origin`, never going back.
    pub(super) fn monotonic_ns(&self, origin: Instant) -> u64 {
        match self {
            Self::Real => u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX),
            Self::Virtual(clock) => clock.now_ns(),
        }
    }
}

/// Where the guest's random bytes come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Randomness {
    /// ChaCha20 seeded by the operating system.
    #[default]
    System,
    /// ChaCha20 seeded by the caller: two VMs with one seed draw the same bytes.
    Seeded(u64),
}

impl Randomness {
    pub(super) fn generator(self) -> Generator {
        Generator(match self {
            Self::Seeded(seed) => ChaCha20Rng::seed_from_u64(seed),
            Self::System => ChaCha20Rng::from_seed(system_seed()),
        })
    }
}

/// Draws the guest's random bytes.
pub(super) struct Generator(ChaCha20Rng);

impl Generator {
    pub(super) fn fill(&mut self, out: &mut [u8]) {
        self.0.fill_bytes(out);
    }
}

fn system_seed() -> [u8; 32] {
    use std::hash::{BuildHasher as _, RandomState};
    let mut seed = [0; 32];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut seed));
    if read.is_err() {
        // No such device: the keys of std's hash maps come from the operating system too.
        for (index, chunk) in seed.chunks_mut(8).enumerate() {
            let word = RandomState::new().hash_one(index).to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
    seed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_draws_the_same_bytes_and_two_draw_others() {
        let draw = |randomness: Randomness| {
            let mut bytes = [0; 16];
            randomness.generator().fill(&mut bytes);
            bytes
        };
        assert_eq!(draw(Randomness::Seeded(7)), draw(Randomness::Seeded(7)));
        assert_ne!(draw(Randomness::Seeded(7)), draw(Randomness::Seeded(8)));
        assert_ne!(draw(Randomness::System), draw(Randomness::System));
    }

    #[test]
    fn clones_of_a_virtual_clock_move_together() {
        let clock = VirtualClock::at_ns(5);
        let seen = Clock::Virtual(clock.clone());
        assert_eq!(seen.realtime_ns(), 5);
        clock.set_ns(9);
        assert_eq!(seen.realtime_ns(), 9);
        assert_eq!(seen.monotonic_ns(Instant::now()), 9);
    }
}
