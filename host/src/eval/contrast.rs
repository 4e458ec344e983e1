//! Detection with reference attacks at hand, each family left out in turn.
//!
//! What: for every label f of the evaluated file, the reference is the attacks of the reference files with
//! other labels, less any text that is tested, and only f's attacks are tested: a family that was never
//! seen. Code lengths are by the engine's context models, one of the training normals and one of the
//! reference; words, tails and score by [`driftlock_engine::contrast`]. The tails are fitted on the tuning
//! normals, p-values are conformal over the calibration normals, so neither sees an attack.
//!
//! The figures of a file are the means over its families. So are its intervals' ends, which makes them
//! wider than an interval of the mean would be.
//!
//! Cost: one reference model a family and seed. Left out on purpose: curves; every family has thresholds
//! of its own.

use std::collections::{BTreeSet, HashSet};

use driftlock_engine::baseline::{StreamBaseline, StreamTrainer, TrainingOptions};
use driftlock_engine::contrast::{Contrast, Lexicon, Views};

use super::detector::Detector;
use super::protocol::{Sample, Split, UNIT};
use super::report::Evaluation;
use super::{EvalError, Scored};

/// The name in results.
pub(crate) const NAME: &str = "contrast";
/// Words and pairs of either side, at most.
const MAX_TERMS: usize = 1 << 22;

/// Evaluates all families of one split; none if there are no attacks.
pub(crate) fn evaluate(
    file: &str,
    split: &Split,
    references: &[Sample],
    seed: u64,
) -> Result<Option<Evaluation>, EvalError> {
    let baseline = model(&split.train);
    let mut lexicon = Lexicon::new(MAX_TERMS);
    split.train.iter().for_each(|sample| lexicon.learn(sample.text()));
    let families: BTreeSet<&str> = split.attacks.iter().map(|sample| &*sample.label).collect();
    let mut evaluations = Vec::new();
    for family in families {
        let attacks = split.attacks.iter().filter(|sample| sample.label == family).cloned().collect();
        let part = Split { attacks, ..split.clone() };
        let tested: HashSet<&[u8]> = part.attacks.iter().map(Sample::text).collect();
        let others: Vec<Sample> = references
            .iter()
            .filter(|sample| sample.label != family && !tested.contains(sample.text()))
            .cloned()
            .collect();
        if others.is_empty() {
            return Err(EvalError::NoReference { family: family.to_owned() });
        }
        let detector = Contrasted::fit(&baseline, &lexicon, &others, &part.tune);
        let mut scored = Scored::new(Box::new(detector), &part)?;
        evaluations.push(scored.evaluation(file, NAME, &part, seed)?);
    }
    Ok(Evaluation::over_families(&evaluations))
}

/// A context model of these texts; only its code lengths are used.
fn model(texts: &[Sample]) -> StreamBaseline {
    let options =
        TrainingOptions { max_ngrams: 1 << 23, max_table_bytes: 8 << 20, ..TrainingOptions::default() };
    let mut trainer = StreamTrainer::new(options);
    texts.iter().for_each(|sample| trainer.train(&sample.message));
    trainer.freeze().tune(NAME, &[])
}

struct Contrasted {
    baseline: StreamBaseline,
    reference: StreamBaseline,
    contrast: Contrast,
}

impl Contrasted {
    fn fit(baseline: &StreamBaseline, lexicon: &Lexicon, references: &[Sample], normals: &[Sample]) -> Self {
        let mut known = Lexicon::new(MAX_TERMS);
        references.iter().for_each(|sample| known.learn(sample.text()));
        let contrast = Contrast::new(lexicon, &known);
        let mut fitted = Self { baseline: baseline.clone(), reference: model(references), contrast };
        let views: Vec<Views> = normals.iter().map(|sample| fitted.views(sample)).collect();
        fitted.contrast.fit(&views);
        fitted
    }

    fn views(&self, sample: &Sample) -> Views {
        let cost = |model: &StreamBaseline| cost(model, sample);
        self.contrast.views(sample.text(), cost(&self.baseline), cost(&self.reference))
    }
}

impl Detector for Contrasted {
    fn statistic(&mut self, sample: &Sample) -> Result<i64, EvalError> {
        Ok(self.contrast.score(&self.views(sample)))
    }

    fn bits(&mut self, sample: &Sample) -> Result<f64, EvalError> {
        Ok(cost(&self.baseline, sample) as f64 / 256.0)
    }
}

/// Code length of the whole text, 1/256 bit.
fn cost(model: &StreamBaseline, sample: &Sample) -> u64 {
    let Some(unit) = model.unit(UNIT) else { return 0 };
    unit.costs(sample.text()).into_iter().map(u64::from).sum()
}
