//! The published protocol: which texts train, which are tested.
//!
//! What: repeated texts are dropped, each text cut to 16,384 bytes, normals and attacks shuffled by a seed;
//! the first 60 % of the normals (at most 5,000) are for fitting, of the rest at most 3,000 are test
//! normals, and at most 3,000 attacks are tested. The fitting part is cut again: 70 % train, 10 % tune, 20 %
//! calibrate.
//!
//! A set without normals, such as answers labelled by model, takes its first label for normal.
//!
//! Cost: the texts of one file in memory.

use std::collections::HashSet;
use std::path::Path;

use driftlock_engine::adapters::router::ContentKind;
use driftlock_engine::baseline::TrainingUnit;

use super::EvalError;
use crate::capture::{self, Kind};
use crate::train::shuffle;

/// Bytes of a text that count.
pub(crate) const MAX_TEXT_BYTES: usize = 16_384;
const MAX_FITTING: usize = 5_000;
const MAX_TEST: usize = 3_000;
/// Fewer normals cannot be split five ways.
const MIN_NORMALS: usize = 50;

/// One text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) label: String,
    pub(crate) kind: ContentKind,
    /// The text as a message of one content unit.
    pub(crate) message: [TrainingUnit; 1],
}

/// The name of that unit.
pub(crate) const UNIT: &str = "body";

impl Sample {
    pub(crate) fn new(label: String, kind: ContentKind, text: Vec<u8>) -> Self {
        Self { label, kind, message: [(UNIT, text)] }
    }

    pub(crate) fn text(&self) -> &[u8] {
        let [(_, text)] = &self.message;
        text
    }
}

/// A file's different texts, before the shuffle.
#[derive(Clone, Debug)]
pub(crate) struct Set {
    pub(crate) normals: Vec<Sample>,
    pub(crate) attacks: Vec<Sample>,
}

/// One seed's partition of a set.
#[derive(Clone, Debug)]
pub(crate) struct Split {
    pub(crate) train: Vec<Sample>,
    pub(crate) tune: Vec<Sample>,
    pub(crate) calibrate: Vec<Sample>,
    pub(crate) test: Vec<Sample>,
    pub(crate) attacks: Vec<Sample>,
}

impl Set {
    /// All rows of a file.
    pub(crate) fn read(path: &Path) -> Result<Self, EvalError> {
        let mut seen = HashSet::new();
        let (mut normals, mut attacks) = (Vec::new(), Vec::new());
        for row in capture::open(path)? {
            let row = row?;
            let mut text = row.text.into_bytes();
            if text.is_empty() || !seen.insert(text.clone()) {
                continue;
            }
            text.truncate(MAX_TEXT_BYTES);
            let kind = match row.kind {
                Kind::HttpRequest | Kind::HttpExchange => ContentKind::Http,
                Kind::Prompt | Kind::Completion => ContentKind::Text,
                Kind::Log => ContentKind::Log,
            };
            let normal = matches!(row.label.as_str(), "normal" | "unlabelled");
            let sample = Sample::new(row.label, kind, text);
            if normal { normals.push(sample) } else { attacks.push(sample) }
        }
        if normals.is_empty() {
            let first = attacks.first().map(|sample| sample.label.clone()).unwrap_or_default();
            (normals, attacks) = attacks.into_iter().partition(|sample| sample.label == first);
        }
        Ok(Self { normals, attacks })
    }

    /// The partition by `seed`.
    pub(crate) fn split(&self, path: &Path, seed: u64) -> Result<Split, EvalError> {
        if self.normals.len() < MIN_NORMALS {
            return Err(EvalError::TooFew { path: path.to_owned(), normals: self.normals.len() });
        }
        let (mut normals, mut attacks) = (self.normals.clone(), self.attacks.clone());
        shuffle(&mut normals, seed);
        shuffle(&mut attacks, seed);
        attacks.truncate(MAX_TEST);
        let fitting = (normals.len() * 6 / 10).min(MAX_FITTING);
        let mut test = normals.split_off(fitting);
        test.truncate(MAX_TEST);
        let mut tune = normals.split_off(fitting * 7 / 10);
        let calibrate = tune.split_off(fitting / 10);
        Ok(Split { train: normals, tune, calibrate, test, attacks })
    }
}

impl Split {
    /// Normals that were fitted on in any way.
    pub(crate) fn fitting(&self) -> usize {
        self.train.len() + self.tune.len() + self.calibrate.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(normals: usize, attacks: usize) -> Set {
        let sample = |label: &str, i: usize| {
            Sample::new(label.to_owned(), ContentKind::Text, format!("{label} {i}").into_bytes())
        };
        Set {
            normals: (0..normals).map(|i| sample("normal", i)).collect(),
            attacks: (0..attacks).map(|i| sample("attack", i)).collect(),
        }
    }

    #[test]
    fn parts_are_disjoint_and_as_large_as_the_protocol_says() {
        for (n, a) in [(50, 0), (999, 10), (12_000, 4_000)] {
            let set = set(n, a);
            let split = set.split(Path::new("x"), 3).unwrap();
            let fitting = (n * 6 / 10).min(5_000);
            assert_eq!(split.fitting(), fitting);
            assert_eq!((split.train.len(), split.tune.len()), (fitting * 7 / 10, fitting / 10));
            assert_eq!((split.test.len(), split.attacks.len()), ((n - fitting).min(3_000), a.min(3_000)));
            let parts = [&split.train, &split.tune, &split.calibrate, &split.test];
            let texts: HashSet<&[u8]> = parts.iter().flat_map(|part| part.iter()).map(Sample::text).collect();
            assert_eq!(texts.len(), split.fitting() + split.test.len());
            assert_ne!(set.split(Path::new("x"), 4).unwrap().train, split.train);
            assert_eq!(set.split(Path::new("x"), 3).unwrap().train, split.train);
        }
        assert!(set(49, 0).split(Path::new("x"), 0).is_err());
    }
}
