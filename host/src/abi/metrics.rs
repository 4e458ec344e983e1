//! Metrics that guests define, shared by every VM of a process.
//!
//! One id per (kind, name): a VM that starts later gets the id the first one got, and workers add
//! into the same counter. Recording is a read lock, an index and an atomic; nothing is allocated.
//! Metrics never expire (as in Envoy, envoy#14070), so their number is bounded here instead.
//! Semantics are Envoy's: a counter's increment must be positive, `record` on a counter adds, a
//! histogram can only be recorded. A gauge stops at zero rather than wrap.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::status::Status;

/// Most metrics that one process keeps; a definition beyond it is refused with `InternalFailure`.
pub const METRICS_MAX_COUNT: usize = 16_384;

/// Upper bounds of histogram buckets, inclusive; Envoy's defaults for whole numbers. One more
/// bucket holds what exceeds the last.
pub const HISTOGRAM_BOUNDS: [u64; 18] = [
    1, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 300_000, 600_000,
    1_800_000, 3_600_000,
];

/// What a metric measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum MetricKind {
    /// Only grows.
    Counter = 0,
    /// Goes both ways.
    Gauge = 1,
    /// A distribution.
    Histogram = 2,
}

impl MetricKind {
    pub(super) fn from_abi(value: u32) -> Result<Self, Status> {
        Ok(match value {
            0 => Self::Counter,
            1 => Self::Gauge,
            2 => Self::Histogram,
            _ => return Err(Status::BadArgument),
        })
    }
}

/// A metric's value at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetricValue {
    /// A counter's total.
    Counter(u64),
    /// A gauge's level.
    Gauge(u64),
    /// A histogram's content.
    Histogram {
        /// How many values were recorded.
        count: u64,
        /// Their sum.
        sum: u64,
        /// How many fell into each bucket of [`HISTOGRAM_BOUNDS`], and beyond the last.
        buckets: [u64; HISTOGRAM_BOUNDS.len() + 1],
    },
}

/// One metric of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricSample {
    /// The name the guest gave; a host that exports it adds its own prefix (Envoy's: `wasmcustom.`).
    pub name: String,
    /// Its value.
    pub value: MetricValue,
}

enum Cell {
    Counter(AtomicU64),
    Gauge(AtomicU64),
    Histogram { count: AtomicU64, sum: AtomicU64, buckets: [AtomicU64; HISTOGRAM_BOUNDS.len() + 1] },
}

struct Metric {
    name: String,
    cell: Cell,
}

/// All metrics of a process.
#[derive(Default)]
pub struct Metrics {
    table: RwLock<Table>,
}

#[derive(Default)]
struct Table {
    by_name: HashMap<(MetricKind, String), u32>,
    /// By kind; an id is the place here and the kind.
    cells: [Vec<Arc<Metric>>; 3],
}

impl Metrics {
    /// Every metric, sorted by name and kind.
    #[must_use]
    pub fn snapshot(&self) -> Vec<MetricSample> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let mut samples: Vec<_> = table
            .cells
            .iter()
            .flatten()
            .map(|metric| MetricSample { name: metric.name.clone(), value: metric.cell.value() })
            .collect();
        samples.sort_by(|a, b| {
            let rank = |sample: &MetricSample| match sample.value {
                MetricValue::Counter(_) => 0,
                MetricValue::Gauge(_) => 1,
                MetricValue::Histogram { .. } => 2,
            };
            (&a.name, rank(a)).cmp(&(&b.name, rank(b)))
        });
        samples
    }

    /// The value of the first metric called `name`, counters before gauges before histograms.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<MetricValue> {
        self.snapshot().into_iter().find(|sample| sample.name == name).map(|sample| sample.value)
    }

    pub(super) fn define(&self, kind: MetricKind, name: &str) -> Result<u32, Status> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = table.by_name.get(&(kind, name.to_owned())) {
            return Ok(*id);
        }
        if table.by_name.len() >= METRICS_MAX_COUNT {
            return Err(Status::InternalFailure);
        }
        let cells = table.cells.get_mut(kind as usize).ok_or(Status::InternalFailure)?;
        cells.push(Arc::new(Metric { name: name.to_owned(), cell: Cell::new(kind) }));
        // As Envoy's: numbered by kind, the kind in the two lowest bits, and 0 to 3 unused, so that a
        // guest's forgotten initialisation shows as NotFound.
        let index = u32::try_from(cells.len()).map_err(|_| Status::InternalFailure)?;
        let id = index << 2 | kind as u32;
        table.by_name.insert((kind, name.to_owned()), id);
        Ok(id)
    }

    fn find(&self, id: u32) -> Result<Arc<Metric>, Status> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let index = (id >> 2).checked_sub(1).ok_or(Status::NotFound)?;
        let metric = table.cells.get(id as usize & 3).and_then(|cells| cells.get(index as usize));
        metric.cloned().ok_or(Status::NotFound)
    }

    /// Only counters and gauges can be incremented and read, whether or not the id exists.
    fn find_number(&self, id: u32) -> Result<Arc<Metric>, Status> {
        if id & 3 > MetricKind::Gauge as u32 { Err(Status::BadArgument) } else { self.find(id) }
    }

    pub(super) fn increment(&self, id: u32, offset: i64) -> Result<(), Status> {
        match &self.find_number(id)?.cell {
            Cell::Counter(total) => {
                if offset <= 0 {
                    return Err(Status::BadArgument);
                }
                total.fetch_add(offset.unsigned_abs(), Ordering::Relaxed);
            }
            Cell::Gauge(level) if offset > 0 => {
                level.fetch_add(offset.unsigned_abs(), Ordering::Relaxed);
            }
            Cell::Gauge(level) => {
                let down = offset.unsigned_abs();
                let lowered = |now: u64| Some(now.saturating_sub(down));
                // The closure never declines, so this cannot fail.
                let _ = level.fetch_update(Ordering::Relaxed, Ordering::Relaxed, lowered);
            }
            Cell::Histogram { .. } => return Err(Status::BadArgument),
        }
        Ok(())
    }

    pub(super) fn record(&self, id: u32, value: u64) -> Result<(), Status> {
        match &self.find(id)?.cell {
            Cell::Counter(total) => {
                total.fetch_add(value, Ordering::Relaxed);
            }
            Cell::Gauge(level) => level.store(value, Ordering::Relaxed),
            Cell::Histogram { count, sum, buckets } => {
                count.fetch_add(1, Ordering::Relaxed);
                sum.fetch_add(value, Ordering::Relaxed);
                let at = HISTOGRAM_BOUNDS.partition_point(|bound| *bound < value);
                if let Some(bucket) = buckets.get(at) {
                    bucket.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    pub(super) fn current(&self, id: u32) -> Result<u64, Status> {
        match &self.find_number(id)?.cell {
            Cell::Counter(value) | Cell::Gauge(value) => Ok(value.load(Ordering::Relaxed)),
            Cell::Histogram { .. } => Err(Status::BadArgument),
        }
    }
}

impl Cell {
    fn new(kind: MetricKind) -> Self {
        match kind {
            MetricKind::Counter => Self::Counter(AtomicU64::new(0)),
            MetricKind::Gauge => Self::Gauge(AtomicU64::new(0)),
            MetricKind::Histogram => Self::Histogram {
                count: AtomicU64::new(0),
                sum: AtomicU64::new(0),
                buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            },
        }
    }

    fn value(&self) -> MetricValue {
        match self {
            Self::Counter(value) => MetricValue::Counter(value.load(Ordering::Relaxed)),
            Self::Gauge(value) => MetricValue::Gauge(value.load(Ordering::Relaxed)),
            Self::Histogram { count, sum, buckets } => MetricValue::Histogram {
                count: count.load(Ordering::Relaxed),
                sum: sum.load(Ordering::Relaxed),
                buckets: std::array::from_fn(|at| {
                    buckets.get(at).map_or(0, |bucket| bucket.load(Ordering::Relaxed))
                }),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_id_per_kind() {
        let metrics = Metrics::default();
        let counter = metrics.define(MetricKind::Counter, "n").unwrap();
        assert_eq!(metrics.define(MetricKind::Counter, "n"), Ok(counter));
        assert_ne!(metrics.define(MetricKind::Gauge, "n"), Ok(counter));
    }

    #[test]
    fn kinds_keep_envoys_rules() {
        let metrics = Metrics::default();
        let counter = metrics.define(MetricKind::Counter, "c").unwrap();
        assert_eq!(metrics.increment(counter, 0), Err(Status::BadArgument));
        assert_eq!(metrics.increment(counter, i64::MIN), Err(Status::BadArgument));
        assert_eq!(metrics.increment(counter, 3), Ok(()));
        assert_eq!(metrics.record(counter, 4), Ok(()));
        assert_eq!(metrics.current(counter), Ok(7));

        let gauge = metrics.define(MetricKind::Gauge, "g").unwrap();
        assert_eq!(metrics.record(gauge, 5), Ok(()));
        assert_eq!(metrics.increment(gauge, -2), Ok(()));
        assert_eq!(metrics.current(gauge), Ok(3));
        assert_eq!(metrics.increment(gauge, -9), Ok(()));
        assert_eq!(metrics.current(gauge), Ok(0));

        let histogram = metrics.define(MetricKind::Histogram, "h").unwrap();
        assert_eq!(metrics.increment(histogram, 1), Err(Status::BadArgument));
        assert_eq!(metrics.current(histogram), Err(Status::BadArgument));
        for value in [0, 1, 2, u64::MAX - 3] {
            assert_eq!(metrics.record(histogram, value), Ok(()));
        }
        let Some(MetricValue::Histogram { count, sum, buckets }) = metrics.value("h") else {
            panic!("no histogram");
        };
        assert_eq!((count, sum), (4, u64::MAX));
        assert_eq!((buckets[0], buckets[1], buckets[18]), (2, 1, 1));

        for id in [0, 1, 2, 3, 396, 397, 398, 399, counter + 4, u32::MAX] {
            let kind = id & 3;
            let no_number = if kind > 1 { Status::BadArgument } else { Status::NotFound };
            assert_eq!(metrics.record(id, 1), Err(Status::NotFound));
            assert_eq!(metrics.increment(id, 1), Err(no_number));
            assert_eq!(metrics.current(id), Err(no_number));
        }
    }

    #[test]
    fn a_snapshot_is_sorted_by_name() {
        let metrics = Metrics::default();
        for name in ["b", "a", "c"] {
            metrics.define(MetricKind::Gauge, name).unwrap();
        }
        let names: Vec<_> = metrics.snapshot().into_iter().map(|s| s.name).collect();
        assert_eq!(names, ["a", "b", "c"]);
    }

    #[test]
    fn the_number_of_metrics_is_bounded() {
        let metrics = Metrics::default();
        for index in 0..METRICS_MAX_COUNT {
            metrics.define(MetricKind::Counter, &index.to_string()).unwrap();
        }
        assert_eq!(metrics.define(MetricKind::Counter, "x"), Err(Status::InternalFailure));
        assert!(metrics.define(MetricKind::Counter, "0").is_ok());
    }
}
