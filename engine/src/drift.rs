//! Drift: has the stream moved away from its baseline, message by ordinary message?
//!
//! What: two instruments over frozen per-message scores.
//! - [`DriftMonitor`] compares an observation window, at every hop, with a reference sample of the
//!   baseline's held-out messages, and says which statistic moved, which way and how far
//!   ([`DriftVerdict`]); [`Drivers`] says which kinds of unit, which words and which messages it comes from.
//! - [`ConformalMartingale`] bets against "this stream is exchangeable" and alarms when the winnings
//!   reach 1/alpha: no window, no horizon, less power against a small shift.
//!
//! Why: no single message of a model that became terser, or was swapped for its successor, need be
//! anomalous. And why two-sided, over several statistics: a drifted model's answers may be shorter,
//! longer, or as long on average but more alike.
//!
//! # The statistics
//! A message is a [`Row`]: code length per byte, length, total code length. Rows of reference and
//! window are pooled and each statistic replaced by its rank. Two linear rank statistics of the window
//! are taken for each: **location**, the sum of centred ranks (Wilcoxon 1945), and **spread**, the sum
//! of their centred squares (Mood 1954); together Lepage's idea (1971). Ranks, because lengths and
//! costs have heavy tails that drown a difference of means; spread, because a model that stops giving
//! its longest answers keeps its median (of the public pairs of model versions tried, one was found by
//! spread alone). All six are scaled to one variance; the test statistic is the largest absolute one.
//!
//! # Why p is valid
//! If window and reference are exchangeable, every choice of the window's rows among the pooled ones is
//! equally likely. Whole rows are permuted, so however the statistics hang together, p for the largest
//! of the six is exact up to the number of permutations: no Bonferroni factor. The p of one statistic
//! counts the permutations whose *largest* reaches it (Westfall and Young 1993), so all six may be
//! read at once.
//!
//! # Why the run is covered
//! Each look (hop) is a test. A [`Budget`] of L looks gives each look alpha / L; the chance of any false
//! alarm in L looks is at most alpha by the union bound, whatever the overlap of their windows. With
//! [`Budget::WholeRun`] the second L looks share alpha / 6, the l-th alpha / (l (l + 1)), which sums to
//! alpha for ever (the first L then share alpha / 2); with [`Budget::EachLap`] every L looks get alpha
//! anew, so alpha is the chance of a false alarm per L looks.
//!
//! Cost: a row takes 16 bytes, 24 in the window. A look sorts the pooled rows and then takes as many
//! row additions a permutation as the smaller sample has rows. Permutations end as soon as the look
//! cannot alarm any more, most often after a few dozen.
//!
//! Left out on purpose: clocks (time is an argument), re-learning (an alarm stays; a new baseline gets a
//! new monitor), adjustment for covariates: if the prompts drift, so do the answers.

mod drivers;
mod martingale;
mod monitor;
mod shift;

pub use drivers::{Driver, Drivers, MAX_WORD_BYTES, Place, Side, Sums, contributions, leading_messages};
pub use martingale::{ConformalMartingale, MartingaleOptions, MartingaleState};
pub use monitor::{
    Budget, DriftError, DriftMonitor, DriftOptions, DriftVerdict, Extent, MAX_ROWS, MIN_WINDOW_ROWS,
};
pub use shift::{Aspect, Moved, Row, SHIFTS, Shift, ShiftTest, Statistic, shift_test};
