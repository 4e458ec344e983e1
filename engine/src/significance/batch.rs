//! Benjamini-Hochberg and Benjamini-Yekutieli for a batch of exact p-values.
//!
//! Cost: one sort. Everything is integer arithmetic; no p-value is rounded.

use alloc::vec;
use alloc::vec::Vec;
use core::cmp::Ordering;

use crate::calibrate::PValue;

/// What is known of how a batch's p-values hang together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dependence {
    /// Independent, or positively dependent as conformal p-values that share a calibration set are
    /// (Bates, Candes, Lei, Romano, Sesia 2023): Benjamini and Hochberg 1995.
    #[default]
    Positive,
    /// Anything: Benjamini and Yekutieli 2001, which divides alpha by 1 + 1/2 + ... + 1/m.
    Arbitrary,
}

/// Which hypotheses to reject so that the expected share of true ones among them is at most
/// `alpha_ppm` millionths: with the p-values sorted, all up to the last k with
/// `p_(k) <= k alpha / (m c)`, where m is their number and c is 1 or, under
/// [`Dependence::Arbitrary`], 1 + 1/2 + ... + 1/m. In the order of `p`.
pub fn false_discoveries(p: &[PValue], alpha_ppm: u32, dependence: Dependence) -> Vec<bool> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    let at = |i: usize| p.get(i).copied().unwrap_or(PValue { rank: 1, of: 1 });
    order.sort_by(|&a, &b| compare(at(a), at(b)));
    // c in 1/2^32, rounded up, so that rounding never rejects more.
    let harmonic: u128 = match dependence {
        Dependence::Positive => 1 << 32,
        Dependence::Arbitrary => (1..=p.len() as u128).map(|i| (1u128 << 32).div_ceil(i)).sum(),
    };
    let count = p.len() as u128;
    let below = |k: u128, p: PValue| {
        // rank / of <= k alpha / (m c), all multiplied out.
        (u128::from(p.rank) * count).saturating_mul(1_000_000).saturating_mul(harmonic)
            <= (k * u128::from(alpha_ppm) * u128::from(p.of)) << 32
    };
    let rejections =
        (1..).zip(&order).filter(|&(k, &i)| below(k, at(i))).map(|(k, _)| k as usize).last().unwrap_or(0);
    let mut rejected = vec![false; p.len()];
    for &i in order.iter().take(rejections) {
        if let Some(slot) = rejected.get_mut(i) {
            *slot = true;
        }
    }
    rejected
}

fn compare(a: PValue, b: PValue) -> Ordering {
    (u64::from(a.rank) * u64::from(b.of)).cmp(&(u64::from(b.rank) * u64::from(a.of)))
}
