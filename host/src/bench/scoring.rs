//! The engine's speed beside zstd's.
//!
//! What: a message's whole score (normalisation, code lengths, words, spans, the statistic) against zstd
//! level 3 with a prepared dictionary of 112 KiB and a reused context, over the same messages, one thread.
//! The dictionary holds the newest training messages one after the other, which compresses these messages
//! to two thirds of what a trained dictionary (ZDICT) leaves, at two thirds of its speed.
//!
//! And a verdict by permutation over frozen scores against recompressing: what a detector pays that
//! compresses the baseline and the window again for every permutation. One compression of the two
//! together is counted; a distance takes two or three.
//!
//! Expected answers: a message scored byte by byte gives the same scores; what zstd wrote decompresses to
//! the messages; a permutation test drawn otherwise gives nearly the same p.

use std::time::Duration;

use driftlock_engine::baseline::{StreamBaseline, StreamTrainer, TrainingOptions};
use driftlock_engine::score::{Scratch, UnitScorer};
use driftlock_engine::significance::{DEFAULT_PERMUTATIONS, PermutationOutcome, Seed, permutation_test};
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use zstd::bulk::{Compressor, Decompressor};
use zstd::dict::EncoderDictionary;

use super::BenchError;
use super::rounds::{Turns, by_turns};
use crate::eval::protocol::{Sample, Split, UNIT};

const LEVEL: i32 = 3;
const DICTIONARY_BYTES: usize = 112 << 10;

/// Events of the baseline and of the window.
const EVENTS: (usize, usize) = (400, 50);
/// Permutations that are really recompressed, and tests over scores, in one round.
const RECOMPRESSED: u32 = 100;
const TESTS: u32 = 20;

/// What scoring was measured at.
pub(super) struct Scoring {
    pub(super) baseline: StreamBaseline,
    pub(super) turns: Turns,
    /// Of one round.
    pub(super) bytes: u64,
    /// Of these, how many came before in the round, word for word, and were looked up.
    known_bytes: u64,
}

impl Scoring {
    /// The share of the bytes that were looked up instead of scored again.
    pub(super) fn known_share(&self) -> f64 {
        self.known_bytes as f64 / self.bytes.max(1) as f64
    }

    pub(super) fn score_mb_per_s(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.turns.first_s()
    }

    pub(super) fn zstd_mb_per_s(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.turns.second_s()
    }
}

fn wrong(what: impl Into<String>) -> BenchError {
    BenchError::Wrong { what: what.into() }
}

fn train(split: &Split) -> StreamBaseline {
    let options = TrainingOptions { max_ngrams: 1 << 23, ..TrainingOptions::default() };
    let mut trainer = StreamTrainer::new(options);
    split.train.iter().for_each(|sample| trainer.train(&sample.message));
    let held_out: Vec<_> = split.tune.iter().map(|sample| sample.message.to_vec()).collect();
    trainer.freeze().tune("bench", &held_out)
}

/// The newest training messages that fit.
fn dictionary(train: &[Sample]) -> Vec<u8> {
    let mut room = DICTIONARY_BYTES;
    let newest = train.iter().rev().take_while(|sample| {
        let fits = sample.text().len() <= room;
        room = room.saturating_sub(sample.text().len());
        fits
    });
    let newest: Vec<&[u8]> = newest.map(Sample::text).collect();
    newest.into_iter().rev().flatten().copied().collect()
}

/// Scores the test messages, and compresses them, by turns.
pub(super) fn measure(split: &Split, budget: Duration) -> Result<Scoring, BenchError> {
    let baseline = train(split);
    let unit = baseline.unit(UNIT).ok_or_else(|| wrong("training saw no message"))?;
    let mut expected = 0i64;
    let mut scratch = Scratch::default();
    for sample in &split.test {
        let mut scorer = UnitScorer::new(&unit.model);
        for (offset, byte) in (0..).zip(sample.text()) {
            scorer.push(&unit.model, &[*byte], offset, &mut scratch);
        }
        let scores = scorer.finish(&unit.model, &mut scratch);
        if scores != unit.score(sample.text()) {
            return Err(wrong("a message's scores depend on how it is cut"));
        }
        expected = expected.wrapping_add(unit.ranges.statistic(&scores));
    }
    let dictionary = dictionary(&split.train);
    let prepared = EncoderDictionary::copy(&dictionary, LEVEL);
    let mut compressor = Compressor::with_prepared_dictionary(&prepared)?;
    let mut decompressor = Decompressor::with_dictionary(&dictionary)?;
    let mut compressed_bytes = 0;
    for sample in &split.test {
        let compressed = compressor.compress(sample.text())?;
        compressed_bytes += compressed.len();
        if decompressor.decompress(&compressed, sample.text().len())? != sample.text() {
            return Err(wrong("zstd does not give a message back"));
        }
    }
    let longest = split.test.iter().map(|sample| sample.text().len()).max().unwrap_or(0);
    let mut buffer = vec![0; zstd::zstd_safe::compress_bound(longest)];
    let mut known_bytes = 0;
    let score = || {
        // New every time: no message may be known from the round before.
        let mut scratch = Scratch::default();
        let statistics = split.test.iter().map(|sample| baseline.statistic_in(&sample.message, &mut scratch));
        let sum = statistics.fold(0i64, i64::wrapping_add);
        known_bytes = scratch.known_bytes();
        match sum == expected {
            true => Ok(()),
            false => Err(wrong("the sum of the statistics is another than byte by byte")),
        }
    };
    let compress = || {
        let mut sum = 0;
        for sample in &split.test {
            sum += compressor.compress_to_buffer(sample.text(), buffer.as_mut_slice())?;
        }
        match sum == compressed_bytes {
            true => Ok(()),
            false => Err(wrong("zstd compresses to another size")),
        }
    };
    let turns = by_turns(budget, score, compress)?;
    let bytes = split.test.iter().map(|sample| sample.text().len() as u64).sum();
    Ok(Scoring { baseline, turns, bytes, known_bytes })
}

/// A verdict by permutation: how many times as fast as recompressing, and its time in us.
pub(super) fn permutation(
    baseline: &StreamBaseline,
    split: &Split,
    budget: Duration,
) -> Result<(f64, f64), BenchError> {
    let (reference, window) = EVENTS;
    let events: Vec<&Sample> = split.calibrate.iter().chain(&split.test).take(reference + window).collect();
    if events.len() < reference + window {
        return Err(wrong(format!("{} messages are too few for a permutation test", events.len())));
    }
    let scores: Vec<i64> = events.iter().map(|sample| baseline.statistic(&sample.message)).collect();
    let (of_reference, of_window) = scores.split_at(reference);
    let seed = Seed::derive(baseline.stream(), 1, &baseline.digest().0);
    let test = || permutation_test(of_reference, of_window, DEFAULT_PERMUTATIONS, &seed);
    let expected = test().ok_or_else(|| wrong("no permutation test"))?;
    check_p(&scores, reference, &expected)?;
    let over_scores = || {
        // Looked at each time, so that none is left out.
        match (0..TESTS).all(|_| test() == Some(expected)) {
            true => Ok(()),
            false => Err(wrong("a permutation test does not repeat")),
        }
    };
    let mut order = events;
    let mut draws = ChaCha8Rng::seed_from_u64(7);
    let mut compressor = Compressor::new(LEVEL)?;
    let together: usize = order.iter().map(|sample| sample.text().len()).sum();
    let mut text = Vec::with_capacity(together);
    let mut buffer = vec![0; zstd::zstd_safe::compress_bound(together)];
    let recompressing = || {
        for _ in 0..RECOMPRESSED {
            // The last places are the window.
            for i in (reference..order.len()).rev() {
                order.swap(i, draws.next_u32() as usize % (i + 1));
            }
            text.clear();
            order.iter().for_each(|sample| text.extend_from_slice(sample.text()));
            if compressor.compress_to_buffer(&text, buffer.as_mut_slice())? == 0 {
                return Err(wrong("zstd compresses to nothing"));
            }
        }
        Ok(())
    };
    let turns = by_turns(budget, over_scores, recompressing)?;
    let scale = f64::from(DEFAULT_PERMUTATIONS) / f64::from(RECOMPRESSED) * f64::from(TESTS);
    Ok((turns.ratio() * scale, turns.first_s() / f64::from(TESTS) * 1e6))
}

/// The same test the plain way: shuffle everything, compare the window's sum with what is expected of it.
fn check_p(scores: &[i64], reference: usize, outcome: &PermutationOutcome) -> Result<(), BenchError> {
    const SHUFFLES: u32 = 10_000;
    let window = scores.len() - reference;
    let total: f64 = scores.iter().map(|&score| score as f64).sum();
    let mean = total * window as f64 / scores.len() as f64;
    let distance = |shuffled: &[i64]| {
        (shuffled[reference..].iter().map(|&score| score as f64).sum::<f64>() - mean).abs()
    };
    let observed = distance(scores);
    let mut shuffled = scores.to_vec();
    let mut draws = ChaCha8Rng::seed_from_u64(11);
    let mut rank = 1u32;
    for _ in 0..SHUFFLES {
        for i in (1..shuffled.len()).rev() {
            shuffled.swap(i, draws.next_u32() as usize % (i + 1));
        }
        rank += u32::from(distance(&shuffled) >= observed);
    }
    let plain = f64::from(rank) / f64::from(SHUFFLES + 1);
    let p = f64::from(outcome.p.rank) / f64::from(outcome.p.of);
    // Five standard errors of 1,000 permutations, and one rank.
    let tolerance = 5.0 * (plain * (1.0 - plain) / f64::from(DEFAULT_PERMUTATIONS)).sqrt() + 0.002;
    match (p - plain).abs() <= tolerance {
        true => Ok(()),
        false => Err(wrong(format!("the permutation test's p is {p}, drawn otherwise {plain}"))),
    }
}
