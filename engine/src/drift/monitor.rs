//! Windows, hops and the error budget.

use alloc::borrow::ToOwned;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

use super::shift::{Row, SHIFTS, Shift, shift_test};
use crate::calibrate::PValue;
use crate::significance::Seed;

/// Most rows of reference and window together.
pub const MAX_ROWS: usize = 1 << 16;

/// Most rows of either.
const MAX_SIDE_ROWS: usize = MAX_ROWS / 2;

/// A look at fewer rows than this is put off to the next hop, at no cost to the budget.
pub const MIN_WINDOW_ROWS: usize = 8;

/// A look's permutations are planned so that an alarm allows this many to reach the observed value:
/// p at the level then has a relative standard error of a third.
const REACHED_AT_LEVEL: u128 = 10;

/// An amount of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// So many messages.
    Rows(u32),
    /// So long, by the time that [`DriftMonitor::observe`] is told.
    Nanoseconds(u64),
}

/// How alpha is divided over looks; see [`crate::drift`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// Alpha for every `looks` looks.
    EachLap {
        /// Looks that share alpha.
        looks: u32,
    },
    /// Alpha for the whole run, however long: `looks` looks share alpha/2, as many more alpha/6, then
    /// alpha/12 and so on.
    WholeRun {
        /// Looks of one lap.
        looks: u32,
    },
}

impl Budget {
    fn looks(self) -> u32 {
        match self {
            Self::EachLap { looks } | Self::WholeRun { looks } => looks,
        }
    }

    /// By what alpha is divided at the `look`-th look (from 0).
    fn divisor(self, look: u64) -> u128 {
        let looks = u128::from(self.looks().max(1));
        match self {
            Self::EachLap { .. } => looks,
            Self::WholeRun { .. } => {
                let lap = u128::from(look) / looks + 1;
                looks * lap * (lap + 1)
            }
        }
    }
}

/// What a [`DriftMonitor`] is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriftOptions {
    /// Largest chance of a false alarm, millionths; per lap or run as `budget` says.
    pub alpha_ppm: u32,
    /// How far a look looks back.
    pub window: Extent,
    /// From one look to the next.
    pub hop: Extent,
    /// Most rows of the window; of a fuller window in time the latest count.
    pub max_window_rows: u32,
    /// How alpha is divided over looks.
    pub budget: Budget,
    /// Most permutations of a look. A look whose share of alpha is below 1 / (1 + this) cannot alarm
    /// and says so ([`DriftVerdict::reachable`]).
    pub max_permutations: u32,
}

impl Default for DriftOptions {
    /// Alpha 1 % for the whole run, the last 400 messages, a look every 25.
    fn default() -> Self {
        Self {
            alpha_ppm: 10_000,
            window: Extent::Rows(400),
            hop: Extent::Rows(25),
            max_window_rows: 4096,
            budget: Budget::WholeRun { looks: 16 },
            max_permutations: 1_000_000,
        }
    }
}

/// Why no monitor can run on what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriftError {
    /// Too small or too large a reference.
    #[error(
        "{0} reference rows: give between {MIN_WINDOW_ROWS} and {MAX_SIDE_ROWS} held-out messages of the baseline"
    )]
    Reference(usize),
    /// A window, hop, lap, alpha or number of permutations of 0, or too large.
    #[error(
        "{0}: window, hop and looks must be at least 1 (the window {MIN_WINDOW_ROWS} to {MAX_SIDE_ROWS} rows), \
         alpha between 1 and 999999 ppm, and alpha's share of the first look reachable with max_permutations"
    )]
    Option(&'static str),
}

/// What one look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriftVerdict {
    /// Which look, from 0; with stream and baseline it seeds the permutations.
    pub look: u64,
    /// Messages in the window.
    pub window_rows: u32,
    /// p-value of the largest shift.
    pub p: PValue,
    /// This look's share of alpha is `alpha_ppm / (1,000,000 alpha_divisor)`.
    pub alpha_divisor: u128,
    /// p is at most this look's share of alpha.
    pub alarm: bool,
    /// Could p have been? If not, the run has outlived its budget: take a new baseline.
    pub reachable: bool,
    /// All shifts, largest first.
    pub shifts: [Shift; SHIFTS],
}

/// A reference sample and the window that is held against it.
#[derive(Clone, Debug)]
pub struct DriftMonitor {
    stream: String,
    baseline: [u8; 32],
    reference: Vec<Row>,
    options: DriftOptions,
    window: VecDeque<(u64, Row)>,
    /// Latest time told.
    now_ns: u64,
    /// When the next look is due: messages from the last look, or a time.
    rows_to_hop: u32,
    hop_at_ns: Option<u64>,
    looks: u64,
    alarm: Option<u64>,
}

impl DriftMonitor {
    /// For the stream `stream`, whose baseline has the digest `baseline`. `reference` are held-out
    /// messages of the baseline: exchangeable with the stream's, and not those that trained the model.
    ///
    /// # Errors
    /// [`DriftError`] says which option is out of range.
    pub fn new(
        stream: &str,
        baseline: &[u8; 32],
        reference: Vec<Row>,
        options: DriftOptions,
    ) -> Result<Self, DriftError> {
        if !(MIN_WINDOW_ROWS..=MAX_SIDE_ROWS).contains(&reference.len()) {
            return Err(DriftError::Reference(reference.len()));
        }
        let rows = MIN_WINDOW_ROWS as u32..=MAX_SIDE_ROWS as u32;
        let window_fits = match options.window {
            Extent::Rows(n) => rows.contains(&n) && n <= options.max_window_rows,
            Extent::Nanoseconds(ns) => ns > 0,
        };
        if !window_fits || !rows.contains(&options.max_window_rows) {
            return Err(DriftError::Option("window"));
        }
        if matches!(options.hop, Extent::Rows(0) | Extent::Nanoseconds(0)) {
            return Err(DriftError::Option("hop"));
        }
        if options.budget.looks() == 0 {
            return Err(DriftError::Option("budget"));
        }
        if !(1..1_000_000).contains(&options.alpha_ppm) {
            return Err(DriftError::Option("alpha"));
        }
        let monitor = Self {
            stream: stream.to_owned(),
            baseline: *baseline,
            reference,
            options,
            window: VecDeque::new(),
            now_ns: 0,
            rows_to_hop: match options.hop {
                Extent::Rows(n) => n,
                Extent::Nanoseconds(_) => 0,
            },
            hop_at_ns: None,
            looks: 0,
            alarm: None,
        };
        if monitor.reached_allowed(options.max_permutations) == 0 {
            return Err(DriftError::Option("max_permutations"));
        }
        Ok(monitor)
    }

    /// The look that first alarmed.
    pub fn alarm(&self) -> Option<u64> {
        self.alarm
    }

    /// Looks so far.
    pub fn looks(&self) -> u64 {
        self.looks
    }

    /// Takes the next message in, at the time `at_ns` (any origin; earlier than the last counts as the
    /// last; ignored if window and hop are in rows). Gives a verdict if a hop ends with it.
    pub fn observe(&mut self, row: Row, at_ns: u64) -> Option<DriftVerdict> {
        self.now_ns = self.now_ns.max(at_ns);
        self.window.push_back((self.now_ns, row));
        let most = match self.options.window {
            Extent::Rows(n) => n.min(self.options.max_window_rows),
            Extent::Nanoseconds(length) => {
                while self.window.front().is_some_and(|&(at, _)| self.now_ns.saturating_sub(at) >= length) {
                    self.window.pop_front();
                }
                self.options.max_window_rows
            }
        };
        while self.window.len() > most as usize {
            self.window.pop_front();
        }
        if self.hop_ends() && self.window.len() >= MIN_WINDOW_ROWS { self.look() } else { None }
    }

    fn hop_ends(&mut self) -> bool {
        match self.options.hop {
            Extent::Rows(n) => {
                self.rows_to_hop = self.rows_to_hop.saturating_sub(1);
                let ends = self.rows_to_hop == 0;
                if ends {
                    self.rows_to_hop = n;
                }
                ends
            }
            Extent::Nanoseconds(hop) => {
                let due = *self.hop_at_ns.get_or_insert(self.now_ns.saturating_add(hop));
                let ends = self.now_ns >= due;
                if ends {
                    // Hops stay on their grid, whatever gaps the traffic has.
                    let missed = (self.now_ns - due) / hop;
                    self.hop_at_ns = Some(due.saturating_add(hop.saturating_mul(missed.saturating_add(1))));
                }
                ends
            }
        }
    }

    /// How many of `permutations` may reach the observed value with p still at most this look's share.
    fn reached_allowed(&self, permutations: u32) -> u32 {
        let divisor = self.options.budget.divisor(self.looks).saturating_mul(1_000_000);
        let allowed = u128::from(self.options.alpha_ppm) * (u128::from(permutations) + 1) / divisor.max(1);
        u32::try_from(allowed).unwrap_or(u32::MAX)
    }

    fn look(&mut self) -> Option<DriftVerdict> {
        let look = self.looks;
        let alpha_divisor = self.options.budget.divisor(look);
        let alpha = u128::from(self.options.alpha_ppm);
        let planned = alpha_divisor.saturating_mul(1_000_000 * REACHED_AT_LEVEL) / alpha.max(1);
        let permutations = u32::try_from(planned).unwrap_or(u32::MAX).min(self.options.max_permutations);
        let allowed = self.reached_allowed(permutations);
        let window: Vec<Row> = self.window.iter().map(|&(_, row)| row).collect();
        let seed = Seed::derive(&self.stream, look, &self.baseline);
        // One more than allowed would end it; with none allowed one still gives a p to read.
        let test = shift_test(&self.reference, &window, permutations, allowed.max(1), &seed)?;
        let share = u128::from(test.p.rank).saturating_mul(alpha_divisor.saturating_mul(1_000_000));
        let alarm = share <= alpha * u128::from(test.p.of);
        self.looks = look.saturating_add(1);
        if alarm {
            self.alarm.get_or_insert(look);
        }
        Some(DriftVerdict {
            look,
            window_rows: window.len() as u32,
            p: test.p,
            alpha_divisor,
            alarm,
            reachable: allowed > 0,
            shifts: test.shifts,
        })
    }
}
