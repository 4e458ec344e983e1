//! Judges a capture on several threads, with the lines in the capture's order.
//!
//! Each thread takes the next batch, judges it and hands its lines in; whoever hands in the batch whose
//! turn it is writes it and those behind it. Nobody waits unless far ahead.
//!
//! Why that is exact: a verdict of a frozen baseline depends on nothing that came before. A message of
//! any other stream (one that learns, or one without a baseline, which counts towards the limit on
//! streams) does; such exchanges are left for the writer, who has the one judge that sees them in the
//! capture's order. So the lines are the same for every number of threads, and a resumed run has to pass
//! only those exchanges through that judge again.
//!
//! Cost: an exchange that is left for the writer was judged twice. A run that only learns is as fast as
//! one thread.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ReplayError;
use super::lines::{Found, Lines, Tally, push_error, push_failure, push_found};
use super::wire::{self, View};
use crate::capture::{Batch, Item, Reader};

/// One way to verdicts.
pub(super) trait Judge: Send {
    /// Judges one exchange.
    fn judge(
        &mut self,
        view: &View<'_>,
        unix_ns: Option<u64>,
        row: u64,
        found: &mut Found,
    ) -> Result<(), ReplayError>;
}

/// The exchanges of an earlier run of the same replay.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// Recordings that have their line.
    pub(super) rows: u64,
    /// One bit a recording: whether the ordered judge has to see it again.
    pub(super) ordered: Vec<u64>,
}

impl Done {
    pub(super) fn push(&mut self, order_free: bool) {
        let (word, bit) = ((self.rows / 64) as usize, self.rows % 64);
        if self.ordered.len() <= word {
            self.ordered.push(0);
        }
        if let Some(word) = self.ordered.get_mut(word) {
            *word |= u64::from(!order_free) << bit;
        }
        self.rows += 1;
    }

    pub(super) fn is_ordered(&self, row: u64) -> bool {
        self.ordered.get((row / 64) as usize).is_some_and(|word| word >> (row % 64) & 1 == 1)
    }
}

/// Waits until an exchange's time has come.
#[derive(Debug)]
pub(super) struct Pace {
    speed: f64,
    origin: Option<(Instant, u64)>,
}

impl Pace {
    pub(super) fn new(speed: f64) -> Self {
        Self { speed, origin: None }
    }

    pub(super) fn wait(&mut self, unix_ns: Option<u64>) {
        let Some(unix_ns) = unix_ns else { return };
        let (start, first_ns) = *self.origin.get_or_insert((Instant::now(), unix_ns));
        let offset = Duration::from_nanos(unix_ns.saturating_sub(first_ns)).div_f64(self.speed);
        std::thread::sleep(offset.saturating_sub(start.elapsed()));
    }
}

/// What a schedule needs.
pub(super) struct Schedule<'a> {
    pub(super) threads: usize,
    /// Makes a judge that sees exchanges in no order; none where every exchange depends on order.
    pub(super) free: Option<&'a (dyn Fn() -> Result<Box<dyn Judge>, ReplayError> + Sync)>,
    /// Makes the judge that sees them in order.
    pub(super) ordered: &'a (dyn Fn() -> Result<Box<dyn Judge>, ReplayError> + Sync),
    pub(super) done: &'a Done,
    pub(super) pace: Option<f64>,
}

struct Source {
    reader: Reader,
    /// The next batch's number, and its first recording's.
    next: u64,
    row: u64,
    pace: Option<Pace>,
}

/// A judged batch.
#[derive(Default)]
struct Judged {
    batch: Batch,
    first_row: u64,
    lines: Vec<u8>,
    tally: Tally,
    /// Recordings for the ordered judge: where in `lines` their line belongs, and which they are.
    left: Vec<(usize, usize)>,
}

#[derive(Default)]
struct Order {
    /// The batch whose turn it is.
    turn: u64,
    waiting: BTreeMap<u64, Judged>,
    writing: bool,
    spare: Vec<Judged>,
}

struct Sink<'a, W> {
    lines: &'a mut Lines<W>,
    judge: Option<Box<dyn Judge>>,
    found: Found,
    flushed: Instant,
}

struct Shared<'a, W> {
    schedule: &'a Schedule<'a>,
    source: Mutex<Source>,
    order: Mutex<Order>,
    room: Condvar,
    sink: Mutex<Sink<'a, W>>,
    stop: AtomicBool,
    error: Mutex<Option<ReplayError>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lines reach the system at the latest after this, so that a killed run has little to do again.
const FLUSH_AFTER: Duration = Duration::from_millis(500);

/// Judges everything that `reader` holds.
///
/// # Errors
/// The first error that ends the replay; what was written is the beginning of what would have been.
pub(super) fn run<W: Write + Send>(
    schedule: &Schedule<'_>,
    reader: Reader,
    lines: &mut Lines<W>,
) -> Result<Reader, ReplayError> {
    let pace = schedule.pace.map(Pace::new);
    let shared = Shared {
        schedule,
        source: Mutex::new(Source { reader, next: 0, row: 0, pace }),
        order: Mutex::default(),
        room: Condvar::new(),
        sink: Mutex::new(Sink { lines, judge: None, found: Found::default(), flushed: Instant::now() }),
        stop: AtomicBool::new(false),
        error: Mutex::new(None),
    };
    std::thread::scope(|scope| {
        for _ in 1..schedule.threads {
            scope.spawn(|| shared.work());
        }
        shared.work();
    });
    match lock(&shared.error).take() {
        Some(error) => Err(error),
        None => Ok(shared.source.into_inner().unwrap_or_else(PoisonError::into_inner).reader),
    }
}

impl<W: Write + Send> Shared<'_, W> {
    fn work(&self) {
        if let Err(error) = self.batches() {
            lock(&self.error).get_or_insert(error);
            self.stop.store(true, Ordering::Release);
            self.room.notify_all();
        }
    }

    fn batches(&self) -> Result<(), ReplayError> {
        let mut judge = self.schedule.free.map(|make| make()).transpose()?;
        let mut found = Found::default();
        loop {
            let mut judged = lock(&self.order).spare.pop().unwrap_or_default();
            let (number, mut pace) = {
                let mut source = lock(&self.source);
                if self.stop.load(Ordering::Acquire) || !source.reader.fill(&mut judged.batch)? {
                    return Ok(());
                }
                judged.first_row = source.row;
                source.row += judged.batch.len() as u64;
                source.next += 1;
                (source.next - 1, source.pace.take())
            };
            self.judge(judge.as_deref_mut(), &mut judged, &mut found, pace.as_mut())?;
            if pace.is_some() {
                lock(&self.source).pace = pace;
            }
            self.hand_in(number, judged)?;
        }
    }

    fn judge(
        &self,
        mut judge: Option<&mut (dyn Judge + '_)>,
        judged: &mut Judged,
        found: &mut Found,
        mut pace: Option<&mut Pace>,
    ) -> Result<(), ReplayError> {
        judged.lines.clear();
        judged.left.clear();
        judged.tally = Tally::default();
        for index in 0..judged.batch.len() {
            let row = judged.first_row + index as u64;
            if row < self.schedule.done.rows {
                if self.schedule.done.is_ordered(row) {
                    judged.left.push((judged.lines.len(), index));
                }
                continue;
            }
            let Some(judge) = judge.as_deref_mut().filter(|_| pace.is_none()) else {
                // Paced runs are in order, too: one exchange at a time.
                if let Some(pace) = &mut pace {
                    pace.wait(unix_ns_of(&judged.batch, index));
                }
                judged.left.push((judged.lines.len(), index));
                continue;
            };
            let Judged { batch, lines, tally, .. } = judged;
            let free = item(batch, index, row, judge, found, lines, tally, true)?;
            if !free {
                judged.left.push((judged.lines.len(), index));
            }
        }
        Ok(())
    }

    /// Writes the batch if it is its turn, and those behind it.
    fn hand_in(&self, number: u64, judged: Judged) -> Result<(), ReplayError> {
        let mut order = lock(&self.order);
        order.waiting.insert(number, judged);
        // Far ahead of the one whose turn it is: wait, or memory would grow with the capture.
        while order.waiting.len() > 4 * self.schedule.threads
            && (order.writing || !order.waiting.contains_key(&order.turn))
        {
            if self.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            order = self.room.wait(order).unwrap_or_else(PoisonError::into_inner);
        }
        if order.writing {
            return Ok(());
        }
        order.writing = true;
        loop {
            let turn = order.turn;
            let Some(mut judged) = order.waiting.remove(&turn) else {
                order.writing = false;
                self.room.notify_all();
                return Ok(());
            };
            drop(order);
            self.write(&mut judged)?;
            order = lock(&self.order);
            order.turn += 1;
            order.spare.push(judged);
            self.room.notify_all();
        }
    }

    fn write(&self, judged: &mut Judged) -> Result<(), ReplayError> {
        let mut sink = lock(&self.sink);
        let Sink { lines, judge, found, flushed } = &mut *sink;
        let mut from = 0;
        let mut ordered = (Vec::new(), Tally::default());
        for &(at, index) in &judged.left {
            lines.write(&judged.lines[from..at], &Tally::default()).map_err(ReplayError::Write)?;
            from = at;
            let row = judged.first_row + index as u64;
            let judge = match judge {
                Some(judge) => judge,
                None => judge.insert((self.schedule.ordered)()?),
            };
            ordered.0.clear();
            item(&judged.batch, index, row, judge.as_mut(), found, &mut ordered.0, &mut ordered.1, false)?;
            if row < self.schedule.done.rows {
                ordered.1 = Tally::default();
                continue;
            }
            lines.write(&ordered.0, &std::mem::take(&mut ordered.1)).map_err(ReplayError::Write)?;
        }
        lines.write(&judged.lines[from..], &judged.tally).map_err(ReplayError::Write)?;
        if flushed.elapsed() > FLUSH_AFTER {
            lines.flush().map_err(ReplayError::Write)?;
            *flushed = Instant::now();
        }
        Ok(())
    }
}

fn unix_ns_of(batch: &Batch, index: usize) -> Option<u64> {
    match batch.item(index)? {
        Item::Record(record) => record.unix_ns,
        Item::Recorded(recorded) => recorded.unix_ns,
        Item::Bad(_) => None,
    }
}

/// Judges one recording and appends its line. With `only_free`, a recording whose verdicts depend on
/// what came before gets no line, and the answer is false.
#[expect(clippy::too_many_arguments, reason = "one call for the batch's thread, one for the writer's")]
fn item(
    batch: &Batch,
    index: usize,
    row: u64,
    judge: &mut dyn Judge,
    found: &mut Found,
    out: &mut Vec<u8>,
    tally: &mut Tally,
    only_free: bool,
) -> Result<bool, ReplayError> {
    let Some(item) = batch.item(index) else { return Ok(true) };
    let mut judge = |id: &str, unix_ns, view: Result<View<'_>, wire::NotSendable>| {
        match view {
            Ok(view) => {
                found.clear();
                judge.judge(&view, unix_ns, row, found)?;
                if only_free && !found.order_free() {
                    return Ok(false);
                }
                push_found(out, tally, id, unix_ns, found);
            }
            Err(reason) => push_failure(out, tally, id, unix_ns, &reason.to_string()),
        }
        Ok::<_, ReplayError>(true)
    };
    match item {
        Item::Record(record) => match record.messages() {
            Ok((request, response)) => judge(&record.id, record.unix_ns, wire::view(request, response)),
            Err(error) => {
                push_error(out, tally, &batch.text_of(&error));
                Ok(true)
            }
        },
        Item::Recorded(recorded) => {
            let exchange = &recorded.exchange;
            let (request, response) = exchange.messages();
            let view = response.ok_or(wire::NotSendable::NoResponse);
            judge(&exchange.id, recorded.unix_ns, view.and_then(|response| wire::view(request, response)))
        }
        Item::Bad(error) => {
            push_error(out, tally, &error);
            Ok(true)
        }
    }
}
