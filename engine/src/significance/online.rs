//! Online FDR control: LORD++, SAFFRON, ADDIS, e-LOND.
//!
//! What: each test gets a level computed from the past alone, and is rejected if p is at most that
//! level (for e-LOND, if 1/e is). Three of the procedures are one: a wealth alpha is spent along a
//! series gamma (non-negative, not rising, sum at most 1), and each rejection starts the series anew.
//! With a clock that ticks, a factor, and ages `a(j) = 1 + ticks since rejection j`,
//!
//! `level = factor (W0 gamma(1 + ticks) + (alpha - W0) gamma(a(1)) + alpha sum_{j >= 2} gamma(a(j)))`
//!
//! - LORD++ (Ramdas, Yang, Wainwright, Jordan 2017): ticks at each test; factor 1.
//! - SAFFRON (Ramdas, Zrnic, Wainwright, Jordan 2018): ticks at tests with p > lambda; factor
//!   1 - lambda; level at most lambda.
//! - ADDIS (Tian and Ramdas 2019): ticks at tests with lambda < p <= tau; factor tau - lambda; level at
//!   most lambda.
//! - e-LOND (Xu and Ramdas 2024): `level = alpha gamma(t) (rejections so far + 1)`, for e-values.
//!
//! The fifth needs no wealth. With W the window, and over the last W - 1 tests, rejected or not,
//! - window BH: `level = max {alpha (k - 1) / W: at least k of the p-values are at most that}`,
//!   Benjamini and Hochberg's rule (1995) with a discovery fewer, as a level for the test to come.
//!
//! Why the fifth: a conformal p-value is never below 1/(n + 1), n calibration messages. The wealth of
//! the others buys about alpha (n + 1) tests at that level; with n = 5,000 and anomalies at 1 % that is
//! 250 messages and two anomalies, and once wealth is spent without a rejection no later anomaly is
//! ever called. Window BH learns from small p-values that it did not reject, and recovers. In the
//! simulation of `tests/significance.rs` (1 % anomalies, 6 standard deviations out, n = 5,000) it finds
//! 86 % of them, LORD++, SAFFRON and ADDIS at most 10 %, e-LOND none; it is the default. With n = 20,000
//! LORD++ with a flat series is as good and rests on a theorem.
//! With n = 1,000 nothing has power, nor could it: at p = 1/1001 one in eleven calls would be wrong.
//!
//! Guarantees: FDR <= alpha for LORD++, SAFFRON, ADDIS with independent p-values; for e-LOND under any
//! dependence. Window BH: the level admits a normal message with probability at most the level, and the
//! level is at most alpha times the share of recent messages that it admits, so in a steady stream the
//! expected false calls are about alpha times the expected calls; choosing the largest such level is
//! optimistic when anomalies are weak, and the discovery fewer pays for that. That is an argument and a
//! simulation, not a theorem; where a theorem is required choose another or decide by batches
//! ([`super::false_discoveries`]). Conformal p-values that share a calibration set are positively
//! dependent; for them LORD++, SAFFRON and ADDIS rest on the simulation too.
//!
//! Bounded memory: at most `max_rejections` past rejections (window BH: small p-values) are remembered,
//! the oldest forgotten first. A forgotten one only lowers later levels: conservative. With
//! [`Spending::Flat`] a rejection whose series is spent, and with window BH a p-value that leaves the
//! window, is forgotten without loss.
//!
//! Cost: one decision sums at most `max_rejections` terms. Levels are rounded down.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::calibrate::PValue;

/// A level in 1/2^60.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(u64);

const ONE_SHIFT: u32 = 60;
const ONE: u64 = 1 << ONE_SHIFT;

impl Level {
    /// From millionths, rounded down.
    pub fn from_ppm(ppm: u32) -> Self {
        Self(((u128::from(ppm.min(1_000_000)) << ONE_SHIFT) / 1_000_000) as u64)
    }

    /// In 1/2^60.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// Is p at most this level? Exact.
    pub fn admits(self, p: PValue) -> bool {
        u128::from(p.rank) << ONE_SHIFT <= u128::from(self.0) * u128::from(p.of)
    }

    fn times(self, other: Level) -> Level {
        Level(((u128::from(self.0) * u128::from(other.0)) >> ONE_SHIFT) as u64)
    }

    fn plus(self, other: Level) -> Level {
        Level(self.0.saturating_add(other.0))
    }

    fn minus(self, other: Level) -> Level {
        Level(self.0.saturating_sub(other.0))
    }
}

/// The series gamma along which wealth is spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spending {
    /// gamma(j) = 1/tests for j <= tests, then nothing. For p-values that cannot be below 1/(n + 1), with
    /// tests = alpha (n + 1): a level below 1/(n + 1) is spent for nothing.
    Flat {
        /// Over how many ticks.
        tests: u32,
    },
    /// gamma(j) = 1/j - 1/(j + 1), about j^-2.
    Steep,
    /// gamma(j) = 1/sqrt(j) - 1/sqrt(j + 1), about j^-1.5 / 2.
    Gentle,
}

impl Spending {
    /// gamma(j), j >= 1.
    fn at(self, j: u64) -> Level {
        let j = j.max(1);
        match self {
            Self::Flat { tests } if j <= u64::from(tests) => Level(ONE / u64::from(tests.max(1))),
            Self::Flat { .. } => Level(0),
            Self::Steep => Level((u128::from(ONE) / (u128::from(j) * (u128::from(j) + 1))) as u64),
            Self::Gentle => Level(inverse_root(j) - inverse_root(j.saturating_add(1)).min(inverse_root(j))),
        }
    }

    /// Is gamma 0 from `j` on?
    fn spent(self, j: u64) -> bool {
        matches!(self, Self::Flat { tests } if j > u64::from(tests))
    }
}

/// 1/sqrt(j) in 1/2^60, not rising in j, so that differences add up exactly whatever the rounding.
fn inverse_root(j: u64) -> u64 {
    // sqrt(j) in 1/2^32.
    let root = (u128::from(j) << 64).isqrt().max(1);
    ((1u128 << (ONE_SHIFT + 32)) / root) as u64
}

/// How levels come about; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Procedure {
    /// LORD++.
    LordPlusPlus,
    /// SAFFRON.
    Saffron {
        /// A p-value up to this is a candidate and costs nothing; millionths.
        lambda_ppm: u32,
    },
    /// ADDIS.
    Addis {
        /// A p-value up to this is a candidate and costs nothing; millionths.
        lambda_ppm: u32,
        /// A p-value above this is discarded and costs nothing; millionths.
        tau_ppm: u32,
    },
    /// e-LOND.
    ELond,
    /// Benjamini and Hochberg's rule over the tests just past.
    WindowBh {
        /// W: tests looked back over, and the new one.
        window: u32,
    },
}

/// What an [`OnlineFdr`] is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdrOptions {
    /// Which procedure.
    pub procedure: Procedure,
    /// FDR to hold, millionths.
    pub alpha_ppm: u32,
    /// W0, the part of alpha that is there to spend before the first rejection, millionths.
    pub initial_ppm: u32,
    /// The series gamma.
    pub spending: Spending,
    /// Most past rejections remembered, 8 bytes each; for window BH most small p-values, 16 bytes each.
    pub max_rejections: u32,
}

impl Default for FdrOptions {
    /// 5 %, window BH over 3,000 tests, 4 KiB.
    fn default() -> Self {
        Self {
            procedure: Procedure::WindowBh { window: 3000 },
            alpha_ppm: 50_000,
            initial_ppm: 50_000,
            spending: Spending::Gentle,
            max_rejections: 256,
        }
    }
}

/// Options that no procedure can run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FdrError {
    /// Alpha is 0 or at least 1, or W0 is not in (0, alpha].
    #[error(
        "FDR level {alpha_ppm} ppm with initial wealth {initial_ppm} ppm: the level must lie between 1 and \
         999999 and the initial wealth between 1 and the level"
    )]
    Wealth {
        /// FDR level.
        alpha_ppm: u32,
        /// W0.
        initial_ppm: u32,
    },
    /// Not 0 < lambda < tau <= 1.
    #[error(
        "candidates up to {lambda_ppm} ppm of p-values up to {tau_ppm} ppm: need 0 < lambda < tau <= 1000000"
    )]
    Candidates {
        /// lambda.
        lambda_ppm: u32,
        /// tau.
        tau_ppm: u32,
    },
    /// A flat series or a window over no test, or no room for a rejection.
    #[error("series and window must span at least one test, and at least one rejection be remembered")]
    Empty,
}

/// An e-value, in 1/65536: a non-negative statistic whose mean is at most 1 if nothing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EValue(pub u64);

impl EValue {
    /// The calibrator 1 / (2 sqrt(p)), whose integral over p is 1 (Vovk and Wang 2021, kappa = 1/2),
    /// rounded down.
    pub fn from_p(p: PValue) -> Self {
        // sqrt(of/rank) in 1/65536, halved.
        Self(((u64::from(p.of) << 32) / u64::from(p.rank.max(1))).isqrt() / 2)
    }
}

/// An online procedure under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnlineFdr {
    procedure: Procedure,
    alpha: Level,
    initial: Level,
    spending: Spending,
    max_rejections: usize,
    /// How often the procedure's clock has ticked.
    ticks: u64,
    rejected: u64,
    /// The clock at the first rejection.
    first: Option<u64>,
    /// The clock at the later ones, oldest first.
    later: VecDeque<u64>,
    /// Window BH: the clock at each small p-value, oldest first, and the p-value rounded up.
    small: VecDeque<(u64, Level)>,
}

impl OnlineFdr {
    /// Before the first test.
    ///
    /// # Errors
    /// [`FdrError`] for options that make no procedure.
    pub fn new(options: FdrOptions) -> Result<Self, FdrError> {
        let FdrOptions { procedure, alpha_ppm, initial_ppm, spending, max_rejections } = options;
        if !(1..1_000_000).contains(&alpha_ppm) || !(1..=alpha_ppm).contains(&initial_ppm) {
            return Err(FdrError::Wealth { alpha_ppm, initial_ppm });
        }
        let (lambda_ppm, tau_ppm) = match procedure {
            Procedure::LordPlusPlus | Procedure::ELond | Procedure::WindowBh { .. } => (1, 1_000_000),
            Procedure::Saffron { lambda_ppm } => (lambda_ppm, 1_000_000),
            Procedure::Addis { lambda_ppm, tau_ppm } => (lambda_ppm, tau_ppm),
        };
        if lambda_ppm == 0 || lambda_ppm >= tau_ppm || tau_ppm > 1_000_000 {
            return Err(FdrError::Candidates { lambda_ppm, tau_ppm });
        }
        let no_series = spending == (Spending::Flat { tests: 0 });
        if max_rejections == 0 || no_series || procedure == (Procedure::WindowBh { window: 0 }) {
            return Err(FdrError::Empty);
        }
        Ok(Self {
            procedure,
            alpha: Level::from_ppm(alpha_ppm),
            initial: Level::from_ppm(initial_ppm),
            spending,
            max_rejections: max_rejections as usize,
            ticks: 0,
            rejected: 0,
            first: None,
            later: VecDeque::new(),
            small: VecDeque::new(),
        })
    }

    /// Tests rejected so far.
    pub fn rejected(&self) -> u64 {
        self.rejected
    }

    /// The level of the next test.
    pub fn level(&self) -> Level {
        match self.procedure {
            Procedure::LordPlusPlus => self.wealth(),
            Procedure::Saffron { lambda_ppm } => self.adaptive(lambda_ppm, 1_000_000),
            Procedure::Addis { lambda_ppm, tau_ppm } => self.adaptive(lambda_ppm, tau_ppm),
            Procedure::WindowBh { window } => self.window_level(window),
            Procedure::ELond => {
                let unit = self.alpha.times(self.spending.at(self.ticks.saturating_add(1)));
                Level(unit.0.saturating_mul(self.rejected.saturating_add(1)).min(ONE))
            }
        }
    }

    /// Decides on the next p-value; true: rejected, an anomaly. For e-LOND p becomes an e-value by
    /// [`EValue::from_p`].
    pub fn test(&mut self, p: PValue) -> bool {
        let level = self.level();
        let reject = match self.procedure {
            Procedure::ELond => return self.test_e(EValue::from_p(p)),
            _ => level.admits(p),
        };
        let admitted = |ppm: u32| Level::from_ppm(ppm).admits(p);
        let tick = match self.procedure {
            Procedure::LordPlusPlus | Procedure::ELond => true,
            Procedure::WindowBh { window } => {
                self.remember_small(p, window);
                true
            }
            Procedure::Saffron { lambda_ppm } => !admitted(lambda_ppm),
            Procedure::Addis { lambda_ppm, tau_ppm } => admitted(tau_ppm) && !admitted(lambda_ppm),
        };
        self.record(tick, reject);
        reject
    }

    /// Decides on the next e-value at the procedure's level, rejecting if 1/e is at most the level.
    /// For e-LOND this is the procedure; 1/e is a p-value, so it is valid with the others too.
    pub fn test_e(&mut self, e: EValue) -> bool {
        if self.procedure != Procedure::ELond {
            // 1/e rounded up, as a fraction of 2^31.
            let rank = (1u64 << 47).div_ceil(e.0.max(1)).min(1 << 31) as u32;
            return self.test(PValue { rank, of: 1 << 31 });
        }
        let reject = u128::from(e.0) * u128::from(self.level().0) >= 1u128 << (ONE_SHIFT + 16);
        self.record(true, reject);
        reject
    }

    fn record(&mut self, tick: bool, reject: bool) {
        self.ticks = self.ticks.saturating_add(u64::from(tick));
        while self.later.front().is_some_and(|&at| self.spending.spent(self.age(at))) {
            self.later.pop_front();
        }
        if !reject {
            return;
        }
        self.rejected = self.rejected.saturating_add(1);
        if matches!(self.procedure, Procedure::ELond | Procedure::WindowBh { .. }) {
            return;
        }
        if self.first.is_none() {
            self.first = Some(self.ticks);
            return;
        }
        if self.later.len() >= self.max_rejections {
            self.later.pop_front();
        }
        self.later.push_back(self.ticks);
    }

    /// What gamma is asked for on behalf of a rejection made when the clock stood at `at`.
    fn age(&self, at: u64) -> u64 {
        self.ticks.saturating_sub(at).saturating_add(1)
    }

    fn wealth(&self) -> Level {
        let mut level = self.initial.times(self.spending.at(self.age(0)));
        if let Some(at) = self.first {
            level = level.plus(self.alpha.minus(self.initial).times(self.spending.at(self.age(at))));
        }
        for &at in &self.later {
            level = level.plus(self.alpha.times(self.spending.at(self.age(at))));
        }
        Level(level.0.min(ONE))
    }

    fn adaptive(&self, lambda_ppm: u32, tau_ppm: u32) -> Level {
        let lambda = Level::from_ppm(lambda_ppm);
        self.wealth().times(Level::from_ppm(tau_ppm).minus(lambda)).min(lambda)
    }

    /// Files the p-value of the test under way, the clock not yet ticked.
    fn remember_small(&mut self, p: PValue, window: u32) {
        // The next level looks at the W - 1 tests before it, this one the last of them.
        let oldest = self.ticks.saturating_add(2).saturating_sub(u64::from(window));
        while self.small.front().is_some_and(|&(at, _)| at < oldest) {
            self.small.pop_front();
        }
        // No level exceeds this many discoveries, so a larger p-value never counts.
        let most = self.discovery(window).0.saturating_mul(self.max_rejections as u64);
        let p = (u128::from(p.rank) << ONE_SHIFT).div_ceil(u128::from(p.of.max(1)));
        if window > 1 && p <= u128::from(most.min(ONE)) {
            if self.small.len() >= self.max_rejections {
                self.small.pop_front();
            }
            self.small.push_back((self.ticks, Level(p as u64)));
        }
    }

    /// alpha / W.
    fn discovery(&self, window: u32) -> Level {
        Level(self.alpha.0 / u64::from(window.max(1)))
    }

    fn window_level(&self, window: u32) -> Level {
        let discovery = self.discovery(window);
        let mut small: Vec<Level> = self.small.iter().map(|&(_, p)| p).collect();
        small.sort_unstable();
        let level = |k: u64| Level(discovery.0.saturating_mul(k.saturating_sub(1)));
        let best = (1..).zip(&small).filter(|&(k, &p)| p <= level(k)).last();
        Level(best.map_or(0, |(k, _)| level(k).0).min(ONE))
    }
}
