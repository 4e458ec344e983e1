//! Generations of baselines, each trained or calibrated on messages that the one before let in.

use alloc::borrow::ToOwned;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::tail::with_cut_tail;
use crate::baseline::{Digest, StreamBaseline, StreamTrainer, TrainingOptions, TrainingUnit};
use crate::calibrate::{PValue, UNSEEN_UNIT, messages_for_alpha};
use crate::detector::MAX_MESSAGE_SAMPLE;
use crate::drift::{DriftError, DriftMonitor, DriftOptions, DriftVerdict, Extent, Row};

/// Most messages in the pools.
pub const MAX_POOL_MESSAGES: u32 = 1 << 20;

/// Of ten released messages so many train; the next fits ranges, the last two calibrate.
const TRAIN_OF_TEN: u64 = 7;
const TUNE_OF_TEN: u64 = 1;

/// What a renewal makes anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renew {
    /// Models, ranges and calibration. Keeps the texts of the pools' messages.
    Models,
    /// The calibration alone. Keeps two numbers a message.
    Calibration,
}

/// What a [`Rolling`] baseline is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RollingOptions {
    /// Level at which messages are flagged, millionths.
    pub alpha_ppm: u32,
    /// Messages with p at most this do not enter, millionths; at least alpha.
    pub admit_above_ppm: u32,
    /// How long a message waits, in whole messages judged after it or in time; at least the drift window.
    pub quarantine: Extent,
    /// Most messages that a generation is made of; a fifth of them calibrates.
    pub pool_messages: u32,
    /// Most bytes of their text, and as much again in quarantine.
    pub max_pool_bytes: usize,
    /// Released messages from one generation to the next.
    pub renew_every: u32,
    /// What is made anew.
    pub renew: Renew,
    /// Bounds of training.
    pub training: TrainingOptions,
    /// Messages of the first generation that are the drift monitor's reference; later ones have their
    /// calibration messages.
    pub reference_rows: u32,
    /// The drift monitor's options. Its budget is a generation's.
    pub drift: DriftOptions,
}

impl Default for RollingOptions {
    /// Alpha .2 %; the latest 5,000 messages with p above .4 %, after a wait of 400; anew every 1,000.
    fn default() -> Self {
        Self {
            alpha_ppm: 2_000,
            admit_above_ppm: 4_000,
            quarantine: Extent::Rows(400),
            pool_messages: 5_000,
            max_pool_bytes: 32 << 20,
            renew_every: 1_000,
            renew: Renew::Models,
            training: TrainingOptions::default(),
            reference_rows: 400,
            drift: DriftOptions::default(),
        }
    }
}

/// Why nothing can adapt by these options.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdaptError {
    /// An option out of its range.
    #[error(
        "{0}: admit_above_ppm lies between alpha and 500000, the quarantine is at least the drift window, \
         renew_every at least 1, slot_hours between 1 and 168, keep at least least, and least (or a fifth of \
         pool_messages, at most 1048576) enough to reach alpha: 1 / alpha messages, and 20"
    )]
    Option(&'static str),
    /// The drift monitor's.
    #[error(transparent)]
    Drift(#[from] DriftError),
}

/// Why a message will not be learned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptOut {
    /// p at most alpha.
    Flagged,
    /// p above alpha, but not above the bound.
    BelowBound,
    /// It was not whole or not well-formed.
    Defective,
    /// A drift alarm stands.
    Drifting,
    /// The quarantine is full.
    NoRoom,
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It waits; it enters unless a drift alarm comes first.
    Waiting,
    /// It does not enter.
    KeptOut(KeptOut),
}

/// A generation that took over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewed {
    /// Which one; the first was 0.
    pub generation: u32,
    /// Its digest.
    pub digest: Digest,
}

/// What one message brought about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Its p-value under the generation that judged it.
    pub p: PValue,
    /// p is at most alpha.
    pub flagged: bool,
    /// What becomes of it.
    pub fate: Fate,
    /// What the drift monitor said, if a hop ended.
    pub drift: Option<DriftVerdict>,
    /// The generation that takes over with the next message.
    pub renewed: Option<Renewed>,
}

/// Messages so far, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Went into a pool.
    pub released: u64,
    /// [`KeptOut::Flagged`].
    pub flagged: u64,
    /// [`KeptOut::BelowBound`].
    pub below_bound: u64,
    /// [`KeptOut::Defective`].
    pub defective: u64,
    /// [`KeptOut::Drifting`], and those whom a drift alarm found in quarantine.
    pub drifting: u64,
    /// [`KeptOut::NoRoom`].
    pub no_room: u64,
}

#[derive(Clone, Debug)]
struct Waiting {
    /// Whole messages judged before it.
    number: u64,
    at_ns: u64,
    bytes: usize,
    entry: Entry,
}

/// A message that was let in.
#[derive(Clone, Debug)]
struct Entry {
    /// Empty if only the calibration is renewed.
    units: Vec<TrainingUnit>,
    row: Row,
    statistic: i64,
}

#[derive(Clone, Debug, Default)]
struct Pool {
    entries: VecDeque<Entry>,
    bytes: usize,
    most: usize,
    most_bytes: usize,
}

fn bytes_of(units: &[TrainingUnit]) -> usize {
    size_of::<Waiting>() + units.iter().map(|(_, text)| text.len() + size_of::<TrainingUnit>()).sum::<usize>()
}

impl Pool {
    fn new(most: usize, most_bytes: usize) -> Self {
        Self { entries: VecDeque::new(), bytes: 0, most, most_bytes }
    }

    fn add(&mut self, entry: Entry) {
        self.bytes += bytes_of(&entry.units);
        self.entries.push_back(entry);
        while self.entries.len() > self.most || (self.bytes > self.most_bytes && self.entries.len() > 1) {
            let Some(oldest) = self.entries.pop_front() else { break };
            self.bytes = self.bytes.saturating_sub(bytes_of(&oldest.units));
        }
    }
}

/// A stream's baseline that is renewed from its own traffic; see [`crate::adapt`].
#[derive(Clone, Debug)]
pub struct Rolling {
    options: RollingOptions,
    baseline: Arc<StreamBaseline>,
    generation: u32,
    /// Whole messages judged.
    judged: u64,
    now_ns: u64,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    train: Pool,
    tune: Pool,
    calibrate: Pool,
    since_renewal: u32,
    reference: Vec<Row>,
    monitor: Option<DriftMonitor>,
    drifting: bool,
    tally: Tally,
}

impl Rolling {
    /// Begins with `baseline` as generation 0.
    ///
    /// # Errors
    /// [`AdaptError`] names the option that does not fit.
    pub fn new(baseline: Arc<StreamBaseline>, options: RollingOptions) -> Result<Self, AdaptError> {
        if options.admit_above_ppm < options.alpha_ppm || options.admit_above_ppm > 500_000 {
            return Err(AdaptError::Option("admit_above_ppm"));
        }
        let long_enough = match (options.quarantine, options.drift.window) {
            (Extent::Rows(wait), Extent::Rows(window)) => wait >= window,
            (Extent::Nanoseconds(wait), Extent::Nanoseconds(window)) => wait >= window,
            // A number of messages takes any time, and any time may hold no message.
            _ => false,
        };
        if !long_enough {
            return Err(AdaptError::Option("quarantine"));
        }
        if options.renew_every == 0 {
            return Err(AdaptError::Option("renew_every"));
        }
        let calibrate = options.pool_messages / 5;
        if calibrate < messages_for_alpha(options.alpha_ppm).max(20)
            || options.pool_messages > MAX_POOL_MESSAGES
        {
            return Err(AdaptError::Option("pool_messages"));
        }
        // The options of a monitor are known to be good before the first message.
        let rows = alloc::vec![Row::default(); options.reference_rows as usize];
        DriftMonitor::new(baseline.stream(), &baseline.digest().0, rows, options.drift)?;
        let pool = |of_ten: usize| {
            Pool::new(options.pool_messages as usize * of_ten / 10, options.max_pool_bytes / 10 * of_ten)
        };
        Ok(Self {
            options,
            baseline,
            generation: 0,
            judged: 0,
            now_ns: 0,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            train: pool(TRAIN_OF_TEN as usize),
            tune: pool(TUNE_OF_TEN as usize),
            calibrate: pool(2),
            since_renewal: 0,
            reference: Vec::new(),
            monitor: None,
            drifting: false,
            tally: Tally::default(),
        })
    }

    /// The generation that judges now.
    pub fn baseline(&self) -> &Arc<StreamBaseline> {
        &self.baseline
    }

    /// Which one it is; the first is 0.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// What became of the messages so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Does a drift alarm keep everything out?
    pub fn is_drifting(&self) -> bool {
        self.drifting
    }

    /// Bytes of text held.
    pub fn held_bytes(&self) -> usize {
        self.waiting_bytes + self.train.bytes + self.tune.bytes + self.calibrate.bytes
    }

    /// A person looked into the drift and calls what comes now normal: admission opens again, and the next
    /// messages are the drift monitor's new reference. What the alarm kept out stays out.
    pub fn resume(&mut self) {
        self.drifting = false;
        self.monitor = None;
        self.reference.clear();
    }

    /// Judges one message and does what follows from it. `whole` is false for one that was cut short or
    /// malformed. `at_ns` is a time of any origin; earlier than the last counts as the last.
    pub fn observe(&mut self, units: &[TrainingUnit], whole: bool, at_ns: u64) -> Observed {
        self.now_ns = self.now_ns.max(at_ns);
        let (row, statistic) = score(&self.baseline, units);
        let p = self.baseline.calibration().p_value(statistic);
        let flagged = p.at_most(self.options.alpha_ppm);
        let mut observed =
            Observed { p, flagged, fate: Fate::KeptOut(KeptOut::Defective), drift: None, renewed: None };
        if !whole {
            self.tally.defective += 1;
            return observed;
        }
        observed.drift = self.watch(row);
        observed.fate = if flagged {
            self.tally.flagged += 1;
            Fate::KeptOut(KeptOut::Flagged)
        } else if p.at_most(self.options.admit_above_ppm) {
            self.tally.below_bound += 1;
            Fate::KeptOut(KeptOut::BelowBound)
        } else if self.drifting {
            self.tally.drifting += 1;
            Fate::KeptOut(KeptOut::Drifting)
        } else {
            self.wait(units, row, statistic)
        };
        self.judged += 1;
        if !self.drifting && self.monitor.is_some() {
            self.release();
            if self.since_renewal >= self.options.renew_every {
                observed.renewed = self.renew();
            }
        }
        observed
    }

    /// Shows the row to the drift monitor; an alarm empties the quarantine.
    fn watch(&mut self, row: Row) -> Option<DriftVerdict> {
        if self.drifting {
            return None;
        }
        let Some(monitor) = &mut self.monitor else {
            self.reference.push(row);
            if self.reference.len() >= self.options.reference_rows as usize {
                let reference = core::mem::take(&mut self.reference);
                self.monitor = self.start_monitor(reference);
            }
            return None;
        };
        let verdict = monitor.observe(row, self.now_ns)?;
        if verdict.alarm {
            self.drifting = true;
            self.tally.drifting += self.waiting.len() as u64;
            self.waiting.clear();
            self.waiting_bytes = 0;
        }
        Some(verdict)
    }

    fn start_monitor(&self, reference: Vec<Row>) -> Option<DriftMonitor> {
        DriftMonitor::new(self.baseline.stream(), &self.baseline.digest().0, reference, self.options.drift)
            .ok()
    }

    fn wait(&mut self, units: &[TrainingUnit], row: Row, statistic: i64) -> Fate {
        let units = match self.options.renew {
            Renew::Calibration => Vec::new(),
            Renew::Models => sample(units, self.options.training.max_unit_bytes),
        };
        let bytes = bytes_of(&units);
        if self.waiting_bytes + bytes > self.options.max_pool_bytes {
            self.tally.no_room += 1;
            return Fate::KeptOut(KeptOut::NoRoom);
        }
        self.waiting_bytes += bytes;
        let entry = Entry { units, row, statistic };
        self.waiting.push_back(Waiting { number: self.judged, at_ns: self.now_ns, bytes, entry });
        Fate::Waiting
    }

    /// Moves what has waited long enough into the pools, in the order it came.
    fn release(&mut self) {
        loop {
            let due = self.waiting.front().is_some_and(|first| match self.options.quarantine {
                Extent::Rows(rows) => self.judged.saturating_sub(first.number) > u64::from(rows),
                Extent::Nanoseconds(ns) => self.now_ns.saturating_sub(first.at_ns) >= ns,
            });
            let Some(Waiting { bytes, entry, .. }) = self.waiting.pop_front_if(|_| due) else { return };
            self.waiting_bytes = self.waiting_bytes.saturating_sub(bytes);
            let pool = match self.tally.released % 10 {
                at if at < TRAIN_OF_TEN => &mut self.train,
                at if at < TRAIN_OF_TEN + TUNE_OF_TEN => &mut self.tune,
                _ => &mut self.calibrate,
            };
            // Without training every message calibrates.
            let pool = if self.options.renew == Renew::Calibration { &mut self.calibrate } else { pool };
            pool.add(entry);
            self.tally.released += 1;
            self.since_renewal = self.since_renewal.saturating_add(1);
        }
    }

    /// Makes the next generation if the pools can calibrate one.
    fn renew(&mut self) -> Option<Renewed> {
        let needed = messages_for_alpha(self.options.alpha_ppm).max(20) as usize;
        if self.calibrate.entries.len() < needed {
            return None;
        }
        let next = match self.options.renew {
            Renew::Calibration => {
                let mut next = StreamBaseline::clone(&self.baseline);
                let statistics = self.calibrate.entries.iter().map(|entry| entry.statistic).collect();
                next.calibrate(with_cut_tail(statistics, self.options.admit_above_ppm));
                next
            }
            Renew::Models => self.trained(),
        };
        self.since_renewal = 0;
        self.generation = self.generation.saturating_add(1);
        let renewed = Renewed { generation: self.generation, digest: next.digest() };
        self.baseline = Arc::new(next);
        let rows: Vec<Row> = self.calibrate.entries.iter().map(|entry| entry.row).collect();
        let latest = rows.len().saturating_sub(MAX_REFERENCE_ROWS);
        self.monitor = self.start_monitor(rows.get(latest..).unwrap_or_default().to_owned());
        Some(renewed)
    }

    fn trained(&mut self) -> StreamBaseline {
        let mut trainer = StreamTrainer::new(self.options.training);
        self.train.entries.iter().for_each(|entry| trainer.train(&entry.units));
        let held_out: Vec<Vec<TrainingUnit>> =
            self.tune.entries.iter().map(|entry| entry.units.clone()).collect();
        let mut next = trainer.freeze().tune(self.baseline.stream(), &held_out);
        for entry in &mut self.calibrate.entries {
            (entry.row, entry.statistic) = score(&next, &entry.units);
        }
        let statistics = self.calibrate.entries.iter().map(|entry| entry.statistic).collect();
        next.calibrate(with_cut_tail(statistics, self.options.admit_above_ppm));
        next
    }
}

/// Rows of a monitor's reference.
const MAX_REFERENCE_ROWS: usize = 4096;

/// What is learned from of a message, bounded as in [`crate::detector`].
fn sample(units: &[TrainingUnit], max_unit_bytes: usize) -> Vec<TrainingUnit> {
    let mut room = MAX_MESSAGE_SAMPLE;
    let mut sample = Vec::with_capacity(units.len());
    for (name, text) in units {
        let kept = text.get(..room.min(max_unit_bytes)).unwrap_or(text);
        room -= kept.len();
        sample.push((*name, kept.to_owned()));
    }
    sample
}

/// A message's row and statistic, as the detector computes them.
fn score(baseline: &StreamBaseline, units: &[TrainingUnit]) -> (Row, i64) {
    let (mut row, mut statistic) = (Row::default(), i64::MIN);
    for (name, text) in units.iter().filter(|(_, text)| !text.is_empty()) {
        row.bytes += text.len() as u64;
        let of_unit = match baseline.unit(name) {
            None => UNSEEN_UNIT,
            Some(unit) => {
                let scores = unit.score(text);
                row.cost += scores.cost;
                unit.ranges.statistic(&scores)
            }
        };
        statistic = statistic.max(of_unit);
    }
    (row, statistic)
}
