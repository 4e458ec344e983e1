//! The two-sample permutation test over frozen scores.
//!
//! What: are a window's scores larger or smaller, on average, than the reference's? With N scores in
//! all, n of them in the window, the statistic is `|N sum(window) - n sum(all)|`, the difference of
//! means times n (N - n): integers only. Under exchangeability every choice of n among the N is
//! equally likely, so p = (1 + #{permuted >= observed}) / (1 + permutations) (Phipson and Smyth 2010)
//! is valid and never 0; if there are at most `permutations` + 1 choices all of them are counted
//! instead and p is exact.
//!
//! Why over scores: they were computed once, under a frozen baseline, so a permutation costs additions,
//! not a recompression of both samples.
//!
//! Cost: `min(n, N - n)` draws and additions a permutation, several draws of one random word; a copy of the
//! scores, and 12 bytes a draw.
//!
//! Left out on purpose: the standard deviation. Dividing by it changes no rank of this statistic.

use alloc::vec::Vec;
use core::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest as _, Sha256};

use crate::calibrate::PValue;

/// Permutations unless told otherwise: p can reach 0.001, and its standard error at 0.01 is 0.003.
pub const DEFAULT_PERMUTATIONS: u32 = 1000;

/// What the permutations are drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed(pub [u8; 32]);

impl Seed {
    /// SHA-256 of a stream's key, a window's number and the baseline's digest: whoever holds the three
    /// draws the same permutations, and nobody chooses them.
    pub fn derive(stream: &str, window: u64, baseline: &[u8; 32]) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"driftlock permutations 1");
        hash.update((stream.len() as u64).to_le_bytes());
        hash.update(stream.as_bytes());
        hash.update(window.to_le_bytes());
        hash.update(baseline);
        Self(hash.finalize().into())
    }
}

/// Uniform draws from a seed.
#[derive(Clone, Debug)]
pub(crate) struct Draws(ChaCha8Rng);

impl Draws {
    pub(crate) fn new(seed: &Seed) -> Self {
        Self(ChaCha8Rng::from_seed(seed.0))
    }

    /// Uniform below `n`, exactly (Lemire 2019); 0 if `n` is 0.
    #[inline]
    pub(crate) fn below(&mut self, n: u32) -> u32 {
        loop {
            let wide = u64::from(self.0.next_u32()) * u64::from(n);
            let low = wide as u32;
            // The second comparison needs a division and is almost never reached.
            if low >= n || low >= n.wrapping_neg().checked_rem(n).unwrap_or(0) {
                return (wide >> 32) as u32;
            }
        }
    }
}

/// Random choices of k of n.
///
/// A partial Fisher-Yates shuffle: k draws, below n, n - 1, ... The draws come several of one 64-bit word, by
/// multiplying what is left of it with one bound after the other; all of them are exactly uniform, since
/// words that would favour some outcomes are drawn again (Brackett-Rozinsky and Lemire, "Batched Ranged
/// Random Integer Generation", 2024).
struct Choices {
    words: ChaCha8Rng,
    /// Draws of one word, and the product of their bounds.
    batches: Vec<(usize, u64)>,
    /// Bound and value of each draw.
    draws: Vec<(u64, u32)>,
}

/// A word has 2^64 values; with a product of the bounds up to this, one in 1,000 is looked at twice at most.
const PRODUCT_MAX: u64 = 1 << 54;

impl Choices {
    /// Of `k` of `n`, k <= n.
    fn new(seed: &Seed, n: u32, k: u32) -> Self {
        let draws: Vec<(u64, u32)> = (0..k).map(|i| (u64::from(n.saturating_sub(i)), 0)).collect();
        let mut batches: Vec<(usize, u64)> = Vec::new();
        for &(bound, _) in &draws {
            match batches.last_mut() {
                Some((count, product)) if product.saturating_mul(bound) <= PRODUCT_MAX => {
                    *count += 1;
                    *product *= bound;
                }
                _ => batches.push((1, bound)),
            }
        }
        Self { words: ChaCha8Rng::from_seed(seed.0), batches, draws }
    }

    fn draw(&mut self) {
        let mut left = self.draws.as_mut_slice();
        for &(count, product) in &self.batches {
            let Some((batch, rest)) = left.split_at_mut_checked(count) else { return };
            loop {
                let mut word = self.words.next_u64();
                for (bound, value) in batch.iter_mut() {
                    let wide = u128::from(word) * u128::from(*bound);
                    *value = (wide >> 64) as u32;
                    word = wide as u64;
                }
                // The second comparison needs a division and is almost never reached.
                if word >= product || word >= product.wrapping_neg().checked_rem(product).unwrap_or(0) {
                    break;
                }
            }
            left = rest;
        }
    }

    /// The sum of a choice of `pool`, which stays permuted: a uniform choice from any arrangement is uniform.
    fn sum<S: Default>(&mut self, pool: &mut [i64], add: impl Fn(S, i64) -> S) -> S {
        self.draw();
        // What is chosen goes behind what can still be chosen.
        let places = (0..pool.len()).rev();
        places.zip(&self.draws).fold(S::default(), |sum, (last, &(_, at))| {
            let at = at as usize;
            pool.swap(at, last);
            add(sum, pool.get(last).copied().unwrap_or(0))
        })
    }
}

/// Outcome of a two-sample test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PermutationOutcome {
    /// Two-sided p-value.
    pub p: PValue,
    /// Were all choices counted?
    pub exact: bool,
    /// The window's mean against the reference's: greater, less or equal.
    pub direction: Ordering,
}

/// Compares the scores of `window` with those of `reference`; nothing if either is empty or the two
/// together have more than 2^32 - 1.
pub fn permutation_test(
    reference: &[i64],
    window: &[i64],
    permutations: u32,
    seed: &Seed,
) -> Option<PermutationOutcome> {
    if reference.is_empty() || window.is_empty() {
        return None;
    }
    // Summing the smaller sample gives the same statistic up to its sign.
    let window_first = window.len() <= reference.len();
    let (small, large) = if window_first { (window, reference) } else { (reference, window) };
    let mut pool: Vec<i64> = Vec::with_capacity(small.len() + large.len());
    pool.extend_from_slice(small);
    pool.extend_from_slice(large);
    let all = u32::try_from(pool.len()).ok()?;
    let chosen = small.len();
    let sum = |scores: &[i64]| scores.iter().map(|&s| i128::from(s)).sum::<i128>();
    let total = sum(&pool) * chosen as i128;
    let statistic = |sum: i128| sum * i128::from(all) - total;
    let observed = statistic(sum(small));
    let direction = if window_first { observed.cmp(&0) } else { 0.cmp(&observed) };
    let at_least = |sum: i128| statistic(sum).unsigned_abs() >= observed.unsigned_abs();

    if let Some(choices) = choices_up_to(all, chosen as u32, permutations.saturating_add(1)) {
        let mut rank = 0u32;
        for_each_choice(&pool, chosen, 0, &mut |sum| rank += u32::from(at_least(sum)));
        return Some(PermutationOutcome { p: PValue { rank, of: choices }, exact: true, direction });
    }
    let mut choices = Choices::new(seed, all, chosen as u32);
    let largest = pool.iter().map(|score| score.unsigned_abs()).max().unwrap_or(0);
    let fits = largest.checked_mul(chosen as u64).is_some_and(|sum| i64::try_from(sum).is_ok());
    let mut rank = 1u32;
    for _ in 0..permutations {
        // No partial sum is above `chosen` times the largest.
        let chosen_sum = match fits {
            true => i128::from(choices.sum(&mut pool, |sum: i64, score| sum + score)),
            false => choices.sum(&mut pool, |sum: i128, score| sum + i128::from(score)),
        };
        rank = rank.saturating_add(u32::from(at_least(chosen_sum)));
    }
    let p = PValue { rank, of: permutations.saturating_add(1) };
    Some(PermutationOutcome { p, exact: false, direction })
}

/// The number of ways to choose `k` of `n`, if at most `most`.
fn choices_up_to(n: u32, k: u32, most: u32) -> Option<u32> {
    let mut choices = 1u64;
    for i in 1..=u64::from(k.min(n - k.min(n))) {
        // Exact at each step: the product of i consecutive integers is a multiple of i!.
        choices = choices * (u64::from(n) - i + 1) / i;
        if choices > u64::from(most) {
            return None;
        }
    }
    Some(choices as u32)
}

/// Calls `visit` with the sum of each choice of `k` of `pool`. Recurses at most `k` deep, and `k` is
/// small: with k <= n/2 there are at least 2^k choices.
fn for_each_choice(pool: &[i64], k: usize, sum: i128, visit: &mut impl FnMut(i128)) {
    if k == 0 {
        return visit(sum);
    }
    let mut rest = pool;
    while rest.len() >= k {
        let Some((&head, tail)) = rest.split_first() else { return };
        for_each_choice(tail, k - 1, sum + i128::from(head), visit);
        rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Every choice is as likely as every other, with bounds that fill a word and with ones that do not.
    #[test]
    fn choices_are_uniform() {
        for (n, k, choices) in [(9u32, 2u32, 36u32), (9, 4, 126), (12, 3, 220)] {
            let mut draws = Choices::new(&Seed([n as u8; 32]), n, k);
            let mut pool: Vec<i64> = (0..n).map(|i| 1 << i).collect();
            let mut seen = BTreeMap::new();
            let rounds = choices * 400;
            for _ in 0..rounds {
                *seen.entry(draws.sum(&mut pool, |sum: i64, score| sum + score)).or_insert(0u32) += 1;
            }
            assert_eq!(seen.len(), choices as usize);
            // Pearson's statistic has mean d and variance 2 d.
            let freedom = f64::from(choices - 1);
            let statistic: f64 = seen.values().map(|&count| (f64::from(count) - 400.0).powi(2) / 400.0).sum();
            assert!((statistic - freedom).abs() < 4.5 * (2.0 * freedom).sqrt(), "{statistic} of {freedom}");
        }
    }

    #[test]
    fn a_word_never_gives_more_draws_than_it_can() {
        for (n, k) in [(450, 50), (5, 2), (u32::MAX, 7), (1 << 27, 9), (3, 3)] {
            let choices = Choices::new(&Seed([1; 32]), n, k);
            let counted: usize = choices.batches.iter().map(|(count, _)| count).sum();
            assert_eq!(counted, k as usize);
            let mut bounds = choices.draws.iter().map(|(bound, _)| *bound);
            for (count, product) in choices.batches {
                assert_eq!(bounds.by_ref().take(count).product::<u64>(), product);
                assert!(product <= PRODUCT_MAX);
            }
        }
    }
}
