//! Many p-values, and p-values for whole windows.
//!
//! What: [`OnlineFdr`] decides on a stream of p-values one by one so that of the messages called
//! anomalous the expected share of normal ones stays below a level (false discovery rate, FDR).
//! [`false_discoveries`] does the same for a batch, such as one p-value for each stream.
//! [`permutation_test`] compares two samples of frozen scores.
//!
//! Why: alpha bounds the share of *normal* messages that are flagged. With 10,000 messages an hour and
//! alpha 1 % that is 100 alarms an hour whether or not anything is wrong; an operator wants to know
//! which share of the *alarms* is wrong.
//!
//! Cost: an online decision takes one table-free sum over at most `max_rejections` past rejections; a
//! batch one sort; a permutation as many additions as the smaller sample has scores.
//!
//! Left out on purpose: p-values themselves (see [`crate::calibrate`]), and memory decay (weighting old
//! rejections down), whose guarantee is for a decayed FDR that nobody asks for.

mod batch;
mod online;
mod permutation;

pub use batch::{Dependence, false_discoveries};
pub use online::{EValue, FdrError, FdrOptions, Level, OnlineFdr, Procedure, Spending};
pub(crate) use permutation::Draws;
pub use permutation::{DEFAULT_PERMUTATIONS, PermutationOutcome, Seed, permutation_test};
