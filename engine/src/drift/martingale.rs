//! A conformal test martingale (Vovk, Gammerman, Shafer 2005, chapter 7) with bounded memory.
//!
//! What: each score gets its conformal p-value among the scores before it, from above and from below,
//! and bets are placed that it is small. If the stream is exchangeable the capital is a non-negative
//! supermartingale from 1, so it ever reaches 1/alpha with probability at most alpha (Ville 1939):
//! one error budget for a run without end.
//!
//! The bet is the Simple Jumper (Vovk, Petej, Nouretdinov, Ahlberg, Carlsson, Gammerman 2021, "Retrain
//! or not retrain", algorithm 1): capital is spread over the stakes e in {-2, -1, 0, 1, 2}; before each
//! score a hundredth of it is spread anew; a stake multiplies by `1 + e (p - 1/2)`. Negative stakes win
//! when scores rise, positive ones when they fall: two-sided.
//!
//! # Ties without randomness
//! The textbook p-value breaks ties at random; then successive p-values are independent and uniform and
//! the capital a martingale M. Here a negative stake is paid by p = (1 + #{s_i >= s}) / (n + 1) and a
//! positive one by 1 - q, q = (1 + #{s_i <= s}) / (n + 1). However the ties would have fallen, p is at
//! least the textbook one and 1 - q at most, so each payment is at most the textbook's, and the capital,
//! a sum of products of payments with constant coefficients, is at every moment at most M. What M
//! reaches with probability at most alpha this reaches no more often.
//!
//! # Bounded memory
//! Scores are ranked among at most `memory` earlier ones. Once full, a uniformly chosen one of those
//! and the new one is dropped (ChaCha, seeded). What stays is then a random sample of independent
//! scores whatever their ranks were, so the p-values stay independent and uniform. A window of the
//! latest scores would not do: what it drops tells of ranks past. This needs scores that are
//! independent given their distribution (exchangeable without end), no less than drift detection does.
//!
//! Cost: a binary search and a shift of at most `memory` scores per message, 8 bytes each.
//!
//! Left out on purpose: a reference that stays fixed. Its p-values all lean on the same sample, and the
//! capital would be no martingale.

use alloc::vec::Vec;

use crate::coder::log2_fixed;
use crate::significance::{Draws, Seed};

/// What a [`ConformalMartingale`] is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MartingaleOptions {
    /// Largest chance of a false alarm in the whole run, millionths.
    pub alpha_ppm: u32,
    /// Most scores remembered; at least 1.
    pub memory: u32,
}

impl Default for MartingaleOptions {
    /// Alpha 1 %, 2,000 scores.
    fn default() -> Self {
        Self { alpha_ppm: 10_000, memory: 2000 }
    }
}

/// How the bets stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MartingaleState {
    /// log2 of the capital, 1/4096.
    pub log2_capital: i64,
    /// log2 of the capital over its lowest so far, 1/4096: the CUSUM of the bets. As an alarm at 2^h it
    /// comes sooner after a long calm, at the price of one false alarm per 2^h messages on average at
    /// most, instead of a bound for the whole run.
    pub log2_rise: i64,
    /// Has the capital ever reached 1/alpha?
    pub alarm: bool,
    /// Which way the winning bets point: rising scores (true), falling ones (false).
    pub rising: bool,
}

/// Stakes, by rising e.
const STAKES: [i64; 5] = [-2, -1, 0, 1, 2];

/// One hundredth of the capital is spread anew before each score.
const JUMP_DIVISOR: u64 = 100;

/// Capital is kept as mantissa times a power of two; the sum of the mantissas stays in [2^48, 2^56).
const MANTISSA_BITS: u32 = 48;
const HEADROOM_BITS: u32 = 8;

/// A run of bets against the exchangeability of a stream's scores.
#[derive(Clone, Debug)]
pub struct ConformalMartingale {
    alpha_ppm: u32,
    memory: usize,
    /// Scores, smallest first.
    scores: Vec<i64>,
    draws: Draws,
    capital: [u64; STAKES.len()],
    exponent: i64,
    lowest: i64,
    alarm: bool,
}

impl ConformalMartingale {
    /// Starts with the capital 1 and, as earlier scores, a baseline's `reference` (held-out messages);
    /// no bet is placed on those. Of more than the memory holds, a random choice stays.
    pub fn new(reference: &[i64], options: MartingaleOptions, seed: &Seed) -> Self {
        let mut martingale = Self {
            alpha_ppm: options.alpha_ppm.max(1),
            memory: options.memory.max(1) as usize,
            scores: Vec::new(),
            draws: Draws::new(seed),
            capital: [0; STAKES.len()],
            exponent: 0,
            lowest: 0,
            alarm: false,
        };
        martingale.restart();
        for &score in reference {
            martingale.remember(score);
        }
        martingale
    }

    /// Takes the bets back to 1 and keeps the scores: after an alarm that was looked into, or for CUSUM
    /// alarms after each. A run that is restarted n times has n + 1 times the chance of a false alarm.
    pub fn restart(&mut self) {
        let share = (1u64 << MANTISSA_BITS) / STAKES.len() as u64;
        self.capital = [share; STAKES.len()];
        self.exponent = -i64::from(MANTISSA_BITS);
        self.lowest = self.log2_capital();
        self.alarm = false;
        self.normalise();
    }

    /// Bets on the next score, pays out, and remembers the score.
    pub fn observe(&mut self, score: i64) -> MartingaleState {
        let smaller = self.scores.partition_point(|&s| s < score);
        let not_larger = self.scores.partition_point(|&s| s <= score);
        let of = self.scores.len() as u64 + 1;
        let p = (self.scores.len() - smaller) as u64 + 1;
        let q = not_larger as u64 + 1;

        let total: u64 = self.capital.iter().sum();
        let spread = total / (JUMP_DIVISOR * STAKES.len() as u64);
        for (capital, stake) in self.capital.iter_mut().zip(STAKES) {
            let kept = *capital - capital.div_ceil(JUMP_DIVISOR) + spread;
            // 1 + |e| (1/2 - rank/of), over 2 of. Rank <= of and |e| <= 2 keep it at or above 0.
            let rank = if stake < 0 { p } else { q };
            let bet = stake.unsigned_abs();
            let pays = (2 * of + bet * of).saturating_sub(2 * bet * rank);
            *capital = (u128::from(kept) * u128::from(pays) / u128::from(2 * of)) as u64;
        }
        self.normalise();
        let log2_capital = self.log2_capital();
        self.alarm |= self.reached();
        let log2_rise = log2_capital - self.lowest;
        self.lowest = self.lowest.min(log2_capital);
        self.remember(score);
        let [a, b, _, c, d] = self.capital;
        MartingaleState { log2_capital, log2_rise, alarm: self.alarm, rising: a + b > c + d }
    }

    /// Rounding is down throughout, so it never wins.
    fn normalise(&mut self) {
        let total: u64 = self.capital.iter().sum();
        let bits = 64 - total.leading_zeros();
        if bits > MANTISSA_BITS + HEADROOM_BITS {
            let shift = bits - MANTISSA_BITS - 1;
            self.capital.iter_mut().for_each(|c| *c >>= shift);
            self.exponent += i64::from(shift);
        } else if bits <= MANTISSA_BITS && total > 0 {
            let shift = MANTISSA_BITS + 1 - bits;
            self.capital.iter_mut().for_each(|c| *c <<= shift);
            self.exponent -= i64::from(shift);
        }
    }

    fn log2_capital(&self) -> i64 {
        i64::from(log2_fixed(self.capital.iter().sum())) + self.exponent * 4096
    }

    /// Is the capital at least 1/alpha?
    fn reached(&self) -> bool {
        let total: u64 = self.capital.iter().sum();
        let staked = u128::from(total) * u128::from(self.alpha_ppm);
        // total 2^exponent alpha >= 10^6; beyond these exponents the answer is plain.
        match u32::try_from(self.exponent) {
            Ok(up) => up >= 64 || staked << up >= 1_000_000,
            Err(_) => staked >> self.exponent.unsigned_abs().min(127) >= 1_000_000,
        }
    }

    fn remember(&mut self, score: i64) {
        let at = self.scores.partition_point(|&s| s < score);
        self.scores.insert(at, score);
        if self.scores.len() > self.memory {
            let dropped = self.draws.below(self.scores.len() as u32) as usize;
            self.scores.remove(dropped);
        }
    }
}
