//! The detectors that are compared: each fits on the same normals and is calibrated on the same held-out
//! ones.
//!
//! What:
//! - `context`: the engine as the filter runs it, a whole text as one content unit: trained, tuned and
//!   calibrated by the engine's own functions.
//! - `zstd`, `lz4`, `deflate`, `openzl`: C(x|B)/C(x), where B is training messages one after the other, as
//!   many as the match window has room for beside the longest text, and at most 112 KiB.
//! - `ncd`: the distance to the nearest of 32 training messages, by the adapter that the router names for
//!   the two together. (The distance to one long B would measure lengths: C(B) dwarfs C(x).)
//!
//! Higher is stranger. The p-value is conformal over the calibration texts for all of them, so their
//! false-positive rates at alpha mean the same.
//!
//! Cost: two compressions a text, for `ncd` 32 and one. Left out on purpose: anything tuned to a set.

use driftlock_engine::adapters::router::{ContentKind, Router};
use driftlock_engine::adapters::{Adapter, Compressor, Conditional};
use driftlock_engine::baseline::{StreamBaseline, StreamTrainer, TrainingOptions};
use driftlock_engine::calibrate::Calibration;
use driftlock_engine::metrics;

use super::EvalError;
use super::protocol::{MAX_TEXT_BYTES, Sample, Split, UNIT};

/// What is known to a compressor of normal messages, at most.
const MAX_KNOWN_BYTES: usize = 112 << 10;
/// Training messages that a text's distance is taken to.
const NEIGHBOURS: usize = 32;
/// Ratios and distances as integers: this many to one.
const RATIO_SCALE: f64 = (1u64 << 32) as f64;

/// Which detector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DetectorName {
    /// The engine's context model.
    Context,
    /// C(x|B)/C(x) by zstd.
    Zstd,
    /// C(x|B)/C(x) by lz4.
    Lz4,
    /// C(x|B)/C(x) by deflate.
    Deflate,
    /// C(x|B)/C(x) by OpenZL.
    Openzl,
    /// Normalised compression distance to the nearest training message.
    Ncd,
}

impl DetectorName {
    /// The name in results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Deflate => "deflate",
            Self::Openzl => "openzl",
            Self::Ncd => "ncd",
        }
    }

    /// Trains on the split's normals, without calibration.
    pub(crate) fn fit(self, split: &Split, router: &Router) -> Result<Box<dyn Detector>, EvalError> {
        let compressor = |adapter| -> Result<Box<dyn Detector>, EvalError> {
            Ok(Box::new(Ratio::fit(adapter, &split.train)?))
        };
        match self {
            Self::Context => Ok(Box::new(Context::fit(split))),
            Self::Zstd => compressor(Adapter::Zstd),
            Self::Lz4 => compressor(Adapter::Lz4),
            Self::Deflate => compressor(Adapter::Deflate),
            Self::Openzl => compressor(Adapter::OpenZl),
            Self::Ncd => Ok(Box::new(Nearest::fit(&split.train, router)?)),
        }
    }
}

/// A detector without its calibration.
pub(crate) trait Detector {
    /// How strange a text is.
    fn statistic(&mut self, sample: &Sample) -> Result<i64, EvalError>;

    /// The shortest description that the detector has of a text, bits.
    fn bits(&mut self, sample: &Sample) -> Result<f64, EvalError>;
}

/// A detector with conformal p-values.
pub(crate) struct Calibrated {
    pub(crate) detector: Box<dyn Detector>,
    calibration: Calibration,
}

impl Calibrated {
    pub(crate) fn new(mut detector: Box<dyn Detector>, normals: &[Sample]) -> Result<Self, EvalError> {
        let statistics: Result<Vec<i64>, EvalError> =
            normals.iter().map(|sample| detector.statistic(sample)).collect();
        Ok(Self { detector, calibration: Calibration::new(statistics?) })
    }

    /// Whether p is at most `alpha_ppm` millionths.
    pub(crate) fn flags(&self, statistic: i64, alpha_ppm: u32) -> bool {
        self.calibration.p_value(statistic).at_most(alpha_ppm)
    }
}

struct Context(StreamBaseline);

impl Context {
    fn fit(split: &Split) -> Self {
        let options = TrainingOptions { max_ngrams: 1 << 23, ..TrainingOptions::default() };
        let mut trainer = StreamTrainer::new(options);
        split.train.iter().for_each(|sample| trainer.train(&sample.message));
        let held_out: Vec<_> = split.tune.iter().map(|sample| sample.message.to_vec()).collect();
        Self(trainer.freeze().tune("eval", &held_out))
    }
}

impl Detector for Context {
    fn statistic(&mut self, sample: &Sample) -> Result<i64, EvalError> {
        Ok(self.0.statistic(&sample.message))
    }

    fn bits(&mut self, sample: &Sample) -> Result<f64, EvalError> {
        let Some(unit) = self.0.unit(UNIT) else { return Ok(0.0) };
        Ok(unit.costs(sample.text()).into_iter().map(f64::from).sum::<f64>() / 256.0)
    }
}

/// C(x|B)/C(x).
struct Ratio {
    alone: Box<dyn Compressor>,
    known: Box<dyn Conditional>,
}

impl Ratio {
    fn fit(adapter: Adapter, train: &[Sample]) -> Result<Self, EvalError> {
        let window = usize::try_from(adapter.match_window_bytes()).unwrap_or(usize::MAX);
        let room = window.saturating_sub(MAX_TEXT_BYTES).min(MAX_KNOWN_BYTES);
        let mut known: Vec<u8> = Vec::new();
        for sample in train {
            let taken = sample.text().len().min(room - known.len());
            known.extend_from_slice(&sample.text()[..taken]);
        }
        let mut alone = adapter.compressor()?;
        let known = alone.given(&known)?;
        Ok(Self { alone, known })
    }
}

impl Detector for Ratio {
    fn statistic(&mut self, sample: &Sample) -> Result<i64, EvalError> {
        let alone = self.alone.code_length_bits(sample.text())?;
        let known = self.known.code_length_bits(sample.text())?;
        Ok(scaled(metrics::conditional_ratio(known, alone)))
    }

    fn bits(&mut self, sample: &Sample) -> Result<f64, EvalError> {
        Ok(self.known.code_length_bits(sample.text())? as f64)
    }
}

/// NCD to the nearest training message.
struct Nearest {
    router: Router,
    /// One of each kind that the router has named so far.
    compressors: Vec<Box<dyn Compressor>>,
    neighbours: Vec<Neighbour>,
}

struct Neighbour {
    text: Vec<u8>,
    /// Its code length by each adapter that was asked.
    alone_bits: Vec<(Adapter, u64)>,
}

impl Nearest {
    fn fit(train: &[Sample], router: &Router) -> Result<Self, EvalError> {
        let neighbour = |sample: &Sample| Neighbour { text: sample.text().to_vec(), alone_bits: Vec::new() };
        Ok(Self {
            router: router.clone(),
            compressors: Vec::new(),
            neighbours: train.iter().take(NEIGHBOURS).map(neighbour).collect(),
        })
    }

    fn compressor(&mut self, adapter: Adapter) -> Result<&mut dyn Compressor, EvalError> {
        let known = self.compressors.iter().position(|compressor| compressor.adapter() == adapter);
        let at = match known {
            Some(at) => at,
            None => {
                self.compressors.push(adapter.compressor()?);
                self.compressors.len() - 1
            }
        };
        Ok(self.compressors[at].as_mut())
    }

    fn route(&self, kind: ContentKind, bytes: usize) -> Result<Adapter, EvalError> {
        Ok(self.router.route(kind, bytes as u64)?)
    }
}

impl Detector for Nearest {
    fn statistic(&mut self, sample: &Sample) -> Result<i64, EvalError> {
        let mut nearest: Option<f64> = None;
        let mut alone: Vec<(Adapter, u64)> = Vec::new();
        for at in 0..self.neighbours.len() {
            let neighbour_bytes = self.neighbours[at].text.len();
            let adapter = self.route(sample.kind, sample.text().len() + neighbour_bytes)?;
            let text_bits = match alone.iter().find(|(known, _)| *known == adapter) {
                Some((_, bits)) => *bits,
                None => {
                    let bits = self.compressor(adapter)?.code_length_bits(sample.text())?;
                    alone.push((adapter, bits));
                    bits
                }
            };
            let text = std::mem::take(&mut self.neighbours[at].text);
            let known = self.neighbours[at].alone_bits.iter().find(|(known, _)| *known == adapter);
            let neighbour_bits = match known.copied() {
                Some((_, bits)) => bits,
                None => {
                    let bits = self.compressor(adapter)?.code_length_bits(&text)?;
                    self.neighbours[at].alone_bits.push((adapter, bits));
                    bits
                }
            };
            let joint_bits = self.compressor(adapter)?.joint_bits(&text, sample.text())?;
            self.neighbours[at].text = text;
            if let Some(distance) = metrics::ncd(neighbour_bits, text_bits, joint_bits) {
                nearest = Some(nearest.map_or(distance, |nearest: f64| nearest.min(distance)));
            }
        }
        Ok(scaled(nearest))
    }

    fn bits(&mut self, sample: &Sample) -> Result<f64, EvalError> {
        let adapter = self.route(sample.kind, sample.text().len())?;
        Ok(self.compressor(adapter)?.code_length_bits(sample.text())? as f64)
    }
}

/// A ratio as a statistic. What has none is as strange as can be.
fn scaled(ratio: Option<f64>) -> i64 {
    ratio.map_or(i64::MAX, |ratio| (ratio * RATIO_SCALE) as i64)
}
