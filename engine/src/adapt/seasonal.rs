//! A calibration for each slot of the week.
//!
//! What: traffic of a Monday morning is ranked among Monday mornings. A slot that has fewer than the least
//! count is ranked among all recent messages, and while those are few too, as the baseline's own calibration did.
//! What ranked decides what enters as well: p above the bound, into the slot and into the pool.
//!
//! Memory: at most slots + 1 rings of `keep` statistics and their sorted copies, 16 bytes each.

use alloc::vec;
use alloc::vec::Vec;

use super::rolling::AdaptError;
use super::tail::with_cut_tail;
use crate::calibrate::{Calibration, PValue, messages_for_alpha};

/// How the week is cut, in local time without daylight saving: an hour's shift twice a year is drift.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Season {
    /// Hours of a slot: 1 gives the 168 hours of the week, 24 its days.
    pub slot_hours: u32,
    /// Local time less UTC, minutes.
    pub utc_offset_minutes: i32,
}

const NS_PER_MINUTE: u64 = 60_000_000_000;
const MINUTES_PER_WEEK: i128 = 7 * 24 * 60;

impl Season {
    /// Slots of a week.
    pub fn slots(self) -> u32 {
        168u32.div_ceil(self.slot_hours.clamp(1, 168))
    }

    /// The slot of a time in nanoseconds since 1970-01-01 UTC, from Monday 00:00 local time on.
    pub fn slot(self, unix_ns: u64) -> u32 {
        // 1970-01-01 was a Thursday.
        let minutes = i128::from(unix_ns / NS_PER_MINUTE) + i128::from(self.utc_offset_minutes) + 3 * 24 * 60;
        let hour = minutes.rem_euclid(MINUTES_PER_WEEK) / 60;
        hour as u32 / self.slot_hours.clamp(1, 168)
    }
}

/// What a [`SeasonalCalibration`] is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeasonOptions {
    /// The slots.
    pub season: Season,
    /// Level at which messages are flagged, millionths.
    pub alpha_ppm: u32,
    /// Messages with p at most this do not enter, millionths; at least alpha.
    pub admit_above_ppm: u32,
    /// Statistics kept for a slot, and for the pool.
    pub keep: u32,
    /// Fewest with which a slot ranks by itself.
    pub least: u32,
}

/// The latest statistics of a slot.
#[derive(Clone, Debug, Default)]
struct Recent {
    ring: Vec<i64>,
    next: usize,
    /// Of the ring as it was when it last ranked, and how many have come since.
    calibration: Calibration,
    since: u32,
}

/// A ring is sorted anew after so many.
const RANK_AGAIN_AFTER: u32 = 16;

impl Recent {
    fn enter(&mut self, statistic: i64, options: &SeasonOptions) {
        if self.ring.len() < options.keep as usize {
            self.ring.push(statistic);
        } else if let Some(slot) = self.ring.get_mut(self.next) {
            *slot = statistic;
            self.next = (self.next + 1) % (options.keep as usize).max(1);
        }
        self.since += 1;
        if self.since >= RANK_AGAIN_AFTER || self.ring.len() == options.least as usize {
            self.since = 0;
            self.calibration = Calibration::new(with_cut_tail(self.ring.clone(), options.admit_above_ppm));
        }
    }

    fn calibrates(&self, options: &SeasonOptions) -> bool {
        self.ring.len() >= options.least as usize
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct SeasonalCalibration {
    options: SeasonOptions,
    pooled: Recent,
    slots: Vec<Recent>,
}

/// Which calibration ranked a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RankedBy {
    /// This slot's.
    Slot(u32),
    /// That of the latest messages of any slot.
    Pool,
    /// The baseline's own.
    Baseline,
}

impl SeasonalCalibration {
    /// Nothing has come in yet.
    ///
    /// # Errors
    /// [`AdaptError`] names the option that does not fit.
    pub fn new(options: SeasonOptions) -> Result<Self, AdaptError> {
        if !(1..=168).contains(&options.season.slot_hours) {
            return Err(AdaptError::Option("slot_hours"));
        }
        if options.admit_above_ppm < options.alpha_ppm || options.admit_above_ppm > 500_000 {
            return Err(AdaptError::Option("admit_above_ppm"));
        }
        if options.least < messages_for_alpha(options.alpha_ppm).max(20) || options.keep < options.least {
            return Err(AdaptError::Option("least"));
        }
        let slots = vec![Recent::default(); options.season.slots() as usize];
        Ok(Self { options, pooled: Recent::default(), slots })
    }

    /// Ranks a whole message's statistic at a time, then lets it in if it may enter. `baseline_p` is its
    /// p-value by the baseline's own calibration.
    pub fn observe(&mut self, statistic: i64, unix_ns: u64, baseline_p: PValue) -> (PValue, RankedBy) {
        let slot = self.options.season.slot(unix_ns);
        let (p, by) = self.rank(statistic, slot, baseline_p);
        if !p.at_most(self.options.admit_above_ppm) {
            self.pooled.enter(statistic, &self.options);
            if let Some(recent) = self.slots.get_mut(slot as usize) {
                recent.enter(statistic, &self.options);
            }
        }
        (p, by)
    }

    fn rank(&self, statistic: i64, slot: u32, baseline_p: PValue) -> (PValue, RankedBy) {
        let of_slot = self.slots.get(slot as usize).filter(|recent| recent.calibrates(&self.options));
        match of_slot {
            Some(recent) => (recent.calibration.p_value(statistic), RankedBy::Slot(slot)),
            None if self.pooled.calibrates(&self.options) => {
                (self.pooled.calibration.p_value(statistic), RankedBy::Pool)
            }
            None => (baseline_p, RankedBy::Baseline),
        }
    }

    /// Statistics let in: of the slot, and of all slots together.
    pub fn entered(&self, slot: u32) -> (usize, usize) {
        (self.slots.get(slot as usize).map_or(0, |recent| recent.ring.len()), self.pooled.ring.len())
    }
}
