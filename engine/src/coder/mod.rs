//! The `context` coder: a byte-level variable-order Markov model with field-aware contexts, frozen into a
//! back-off automaton.
//!
//! What: [`Counts`] collects, message by message, how often each symbol followed each context;
//! [`Counts::freeze`] turns that into a [`ContextModel`], which gives each byte's code length, in 1/256
//! bit, given the bytes before it. A byte is predicted by the longest known context: first those within
//! its field (see [`crate::field`]; up to 3 bytes, and how the value begins), then those of plain text (up
//! to 4 bytes). In a context seen n times, a symbol seen c times has probability (c - 1/2)/n; what that
//! leaves is the escape to the next shorter context (Ney, Essen, Kneser 1994, absolute discounting by
//! 1/2; PPMD of Howard 1993 is the same estimate). Beyond the last context a byte costs 8 bits.
//!
//! What freezing leaves out, so that tables stay in the processor's cache: fields whose own contexts cost
//! more than they save on a sample of units left out one by one (free text does); symbols that save less
//! than 8 bits over all their occurrences (Stolcke 1998, in spirit), and more until the table fits.
//!
//! Why a frozen model: scoring allocates nothing and recompresses nothing, can be fed in any chunks, and
//! each byte's cost says where a message is surprising. Why fields: an odd value in a familiar field is
//! ordinary text for a model that does not know where it stands.
//!
//! Cost: training updates up to nine counters a byte (16 bytes each); scoring a byte takes one slot of
//! five bytes if the longest context predicts it, and a walk down the contexts otherwise. Four parts of a
//! block are scored side by side, since one walk alone waits for memory most of the time.
//!
//! Left out on purpose: exclusion (PPM's correction for symbols that a longer context already ruled out)
//! and mixing of orders: both need work for every context of every byte. DECISIONS.md has the
//! comparison.

mod context;
mod counts;
mod freeze;
mod model;

pub use counts::Counts;
pub(crate) use model::WINDOW;
pub use model::{BLOCK_BYTES, Block, ContextModel, FieldNumber, Segment, State};

/// Fixed-point scale of code lengths: this many units are one bit.
pub const UNITS_PER_BIT: u32 = 256;

/// No byte costs more than this (32 bits): beyond it, more escapes say nothing new.
pub const MAX_COST: u16 = 32 * UNITS_PER_BIT as u16;

/// Slots that a look-up tries in training. Hashes can be computed by anyone, so counts can be made to
/// collide; beyond this many they are lost, not looked for.
const MAX_PROBES: usize = 256;
/// What a byte costs once every context has been escaped: log2(256).
const UNIFORM_BITS: u64 = 8;
/// [`MAX_COST`] in 1/4096 bit.
const MAX_COST_FINE: u64 = (MAX_COST as u64) << 4;

/// Mixes a number (the finaliser of splitmix64, Steele, Lea, Flood 2014).
#[inline(always)]
pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Spreads a number over all bits of another (Fibonacci hashing; Knuth, volume 3, section 6.4). Only the
/// upper half depends on every bit, so it is folded into the lower.
#[inline(always)]
pub(crate) fn scatter(x: u64) -> u64 {
    let x = x.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x ^ x >> 32
}

/// One number for many.
pub(crate) fn identity(numbers: impl Iterator<Item = u64>) -> u64 {
    numbers.fold(0, |sum: u64, number| scatter(sum.rotate_left(5) ^ number))
}

/// log2(x) in 1/4096, rounded down; integers only, so every target agrees. 0 counts as 1.
///
/// It is what [`log2_by_squaring`] gives. Nearly always a table of 128 logarithms and two terms of the series of
/// log(1 + d) tell, at a quarter of the cost; where they leave a unit's difference open, squaring decides.
#[inline]
pub(crate) fn log2_fixed(x: u64) -> u32 {
    let x = x.max(1);
    // In [1, 2), 31 fractional bits; cut, as are all the numbers here.
    let mantissa = x << x.leading_zeros() >> 32;
    let whole = (63 - x.leading_zeros()) << 12;
    let (reciprocal, log) = LOGARITHMS.get((mantissa >> 24) as usize & 127).copied().unwrap_or_default();
    // The mantissa is (1 + i/128) (1 + d): d in 39 bits, too large by less than 2^-30.
    let d = (mantissa * u64::from(reciprocal)).saturating_sub(1 << 62) >> 23;
    // d - d^2 / 2, short of log(1 + d) by less than d^3 / 3 < 2^-22.
    let series = d - ((d * d) >> 40);
    /// 1 / ln 2, 31 fractional bits.
    const PER_E: u64 = 3_098_164_009;
    let log = log + ((series * PER_E) >> 31);
    // 39 bits to 12: whether a unit more is reached is open only near one.
    let rest = log & ((1 << 27) - 1);
    if (1 << 13..(1 << 27) - (1 << 19)).contains(&rest) {
        whole + (log >> 27) as u32
    } else {
        whole + log2_by_squaring(mantissa)
    }
}

/// By i: the reciprocal of 1 + i/128 in 31 bits, rounded up, and its logarithm in 39.
static LOGARITHMS: [(u32, u64); 128] = logarithms();

#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a bad index")]
const fn logarithms() -> [(u32, u64); 128] {
    let mut table = [(0, 0); 128];
    let mut i = 0;
    while i < 128 {
        let reciprocal = (1u64 << 38).div_ceil(128 + i as u64) as u32;
        // By squaring, in 62 bits.
        let mut mantissa = (128 + i as u128) << 55;
        let (mut log, mut bits) = (0, 0);
        while bits < 39 {
            mantissa = (mantissa * mantissa) >> 62;
            let bit = (mantissa >> 63) as u64;
            log = log << 1 | bit;
            mantissa >>= bit;
            bits += 1;
        }
        table[i] = (reciprocal, log);
        i += 1;
    }
    table
}

/// The logarithm of a number in [1, 2), in 31 fractional bits, by repeated squaring.
#[cold]
#[inline(never)]
fn log2_by_squaring(mut mantissa: u64) -> u32 {
    let mut log = 0;
    if mantissa == 1 << 31 {
        return log;
    }
    for _ in 0..12 {
        let square = (mantissa * mantissa) >> 31;
        let bit = square >> 32;
        log = log << 1 | bit as u32;
        mantissa = square >> bit;
    }
    log
}

/// Costs that a slot can have: exact to 1/64 bit below 2 bits, coarser above, up to 20 bits.
const CODES: usize = 256;

/// The code nearest to a cost in 1/4096 bit.
fn code_of(cost: u64) -> u8 {
    let cost = (cost.min(MAX_COST_FINE) as u32 + 8) >> 4;
    let code = match cost {
        0..512 => (cost + 4) / 8,
        512..1024 => 64 + (cost - 512 + 8) / 16,
        _ => 96 + (cost - 1024 + 13) / 26,
    };
    code.min(CODES as u32 - 1) as u8
}

/// The cost that a code stands for, 1/256 bit.
const fn cost_of(code: u32) -> u32 {
    match code {
        0..64 => code * 8,
        64..96 => 512 + (code - 64) * 16,
        _ => 1024 + (code - 96) * 26,
    }
}

/// (c/2)^4, rounded, by cost c in 1/8 bit: what a byte adds to a peak (see [`crate::score`]).
#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a bad index")]
const PEAK_WEIGHTS: [u32; PEAK_STEPS] = {
    let mut weights = [0; PEAK_STEPS];
    let mut k = 0;
    while k < PEAK_STEPS {
        // c/2 bits = k/16.
        weights[k] = (((k as u64).pow(4) + (1 << 15)) >> 16) as u32;
        k += 1;
    }
    weights
};
const PEAK_STEPS: usize = (MAX_COST as usize >> PEAK_SHIFT) + 1;
/// From 1/256 bit to 1/8 bit.
const PEAK_SHIFT: u32 = 5;

/// The peak weight of a cost of c bits, (c/2)^4; at most 2^16.
pub(crate) fn peak_weight(cost: u16) -> u64 {
    let cost = cost.min(MAX_COST);
    PEAK_WEIGHTS.get(usize::from(cost >> PEAK_SHIFT)).copied().unwrap_or(0).into()
}

/// A cost, at most [`MAX_COST`] (14 bits), and above it its peak weight.
#[inline(always)]
fn weighted(cost: u32) -> u64 {
    let cost = cost.min(MAX_COST.into()) as u16;
    u64::from(cost) | peak_weight(cost) << 14
}

/// Why the bytes of a model were refused.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The tables' lengths disagree, or no automaton has them.
    #[error("the model's tables have impossible lengths; the snapshot is damaged, fetch it again")]
    TableLength,
    /// The fields are not in order.
    #[error("the model's fields are out of order; the snapshot is damaged, fetch it again")]
    Fields,
}

#[cfg(test)]
mod tests;
