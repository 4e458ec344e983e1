//! Adaptation: baselines that follow traffic whose normal changes, without learning what is not normal.
//!
//! What: three ways to follow, each a deterministic function of the messages in their order, and of the times
//! that it is told.
//! - [`Rolling`] with [`Renew::Models`]: every so many messages a new baseline is trained on the latest that
//!   were let in.
//! - [`Rolling`] with [`Renew::Calibration`]: the models stay, their calibration is renewed: no text is kept.
//! - [`SeasonalCalibration`]: a calibration for each slot of the week, and the pooled one where a slot is thin.
//!
//! # What may enter
//! A message is *kept out* unless all of this holds:
//! 1. it is whole, well-formed, and was judged by a frozen baseline;
//! 2. its p-value is above a bound that is at least alpha: what was flagged never enters;
//! 3. it has waited in quarantine, with no drift alarm meanwhile. The wait is at least as long as the drift
//!    monitor's window, so an alarm finds what raised it still waiting; it empties the quarantine and closes
//!    admission until a person says [`Rolling::resume`].
//!
//! So a change has to be slow enough for no drift test to see it within a generation, or be approved. What a
//! patient attacker can still do is drift along with it: every message ordinary by the last generation's
//! measure. That takes as many generations as the way is long (`tests/adapt.rs` measures it); there is no rule
//! that learns new behaviour and excludes this.
//!
//! # The cut tail
//! Keeping out p <= tau cuts the upper tail off what calibrates next, and ranks in a cut sample are too small:
//! after g generations the rate of false alarms would be about alpha + g tau. No rule that never learns from
//! what it flagged can measure what it did not let in, so an assumption has to stand in: [`with_cut_tail`]
//! puts the missing share tau back, exponential in the statistic, with the rate that two quantiles below the
//! cut give. (The statistic is a surprise in bits, made to be exponential; see [`crate::calibrate`].) How many
//! are put back depends on the count of those let in alone, so nobody's flagged messages move the threshold.
//! Conformal validity then holds up to that assumption; without adaptation it holds without.
//!
//! Cost: scoring as [`crate::score`]; memory is bounded by the options, about `max_pool_bytes` twice.
//!
//! Left out on purpose: reading clocks, and choosing who may say `resume`.

mod rolling;
mod seasonal;
mod tail;

pub use rolling::{
    AdaptError, Fate, KeptOut, MAX_POOL_MESSAGES, Observed, Renew, Renewed, Rolling, RollingOptions, Tally,
};
pub use seasonal::{RankedBy, Season, SeasonOptions, SeasonalCalibration};
pub use tail::with_cut_tail;
