//! Baselines from untrusted bytes.
//!
//! Decoding never panics. What it accepts encodes to the same bytes, has the digest it was stored under, and
//! scores any text in bounded time with finite results. Mutations get a digest that fits, since otherwise
//! the digest alone would refuse them all.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use driftlock_engine::baseline::{Snapshot, StreamBaseline, StreamTrainer, TrainingOptions};
use driftlock_engine::coder::MAX_COST;
use driftlock_engine::detector::{Detector, Settings, UnitId};
use driftlock_engine::evidence::Outcome;
use sha2::{Digest as _, Sha256};

use crate::input::Input;

const KINDS: [&str; 3] = ["target", "tool_call", "user"];
const DIGEST_BYTES: usize = 32;
/// Far above the milliseconds it takes, far below a hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// See the module.
pub fn holds(data: &[u8]) {
    let bytes = untrusted(data);
    match Snapshot::decode(&bytes) {
        Ok(snapshot) => accepted(&snapshot, &bytes, data),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The bytes that `data` describes: as they are, under a fitting digest, or a valid snapshot with mutations.
pub(crate) fn untrusted(data: &[u8]) -> Vec<u8> {
    let mut input = Input::new(data);
    let mut content = match input.byte() % 4 {
        0 => return input.rest(1 << 20).to_vec(),
        1 => [&content()[..10], input.rest(1 << 20)].concat(),
        _ => content().to_vec(),
    };
    while !input.is_empty() {
        let (kind, at, byte) = (input.byte(), input.u16() % (content.len() + 1), input.byte());
        match kind % 8 {
            0 => content.truncate(at),
            1 => content.insert(at, byte),
            2 if at < content.len() => drop(content.remove(at)),
            3 => content[at..].iter_mut().take(8).for_each(|slot| *slot = byte),
            _ => content.iter_mut().skip(at).take(1).for_each(|slot| *slot = byte),
        }
    }
    let digest = Sha256::digest(&content);
    content.extend_from_slice(&digest);
    content
}

fn message(i: u32) -> Vec<(&'static str, Vec<u8>)> {
    let texts = [format!("GET /{}", i % 3), format!("{{{}", i % 2), format!("a{}b", i % 5)];
    KINDS.into_iter().zip(texts.map(String::into_bytes)).collect()
}

fn trained(stream: &str) -> StreamBaseline {
    let mut trainer = StreamTrainer::new(TrainingOptions::default());
    (0..10).for_each(|i| trainer.train(&message(i)));
    let mut baseline = trainer.freeze().tune(stream, &[message(11), message(12)]);
    baseline.calibrate((13..20).map(|i| baseline.statistic(&message(i))).collect());
    baseline
}

/// A small valid snapshot of two streams, without its digest.
fn content() -> &'static [u8] {
    static CONTENT: OnceLock<Vec<u8>> = OnceLock::new();
    CONTENT.get_or_init(|| {
        let mut bytes = Snapshot::new([trained("a"), trained("b")]).encode();
        assert!(bytes.len() < 1 << 15, "mutations reach every byte");
        bytes.truncate(bytes.len() - DIGEST_BYTES);
        bytes
    })
}

fn accepted(snapshot: &Snapshot, bytes: &[u8], text: &[u8]) {
    assert!(snapshot.encode() == bytes, "what is accepted does not encode to the same bytes");
    assert_eq!(&snapshot.digest().0[..], &bytes[bytes.len() - DIGEST_BYTES..]);
    assert_eq!(Snapshot::decode(bytes).as_ref(), Ok(snapshot));

    let started = Instant::now();
    let text = &text[..text.len().min(256)];
    for baseline in snapshot.streams().iter().take(4) {
        for unit in baseline.units().iter().take(8) {
            assert!(unit.model.coder.costs(text).iter().all(|&cost| cost <= MAX_COST));
            let scores = unit.score(text);
            assert_eq!(scores.source_bytes, text.len() as u64);
            assert!(
                scores.spans.iter().all(|span| span.start <= span.end && span.end <= scores.source_bytes)
            );
            let bytes: u64 = unit.costs(text).iter().map(|&cost| u64::from(cost)).sum();
            // The end of the text may have a cost too.
            assert!((bytes..=bytes + u64::from(MAX_COST)).contains(&scores.cost));
            assert!(unit.ranges.statistic(&scores) <= baseline.statistic(&[("unseen", vec![b'x'])]));
        }
    }
    judged(snapshot, text);
    assert!(started.elapsed() < PATIENCE, "scoring hangs");
}

fn judged(snapshot: &Snapshot, text: &[u8]) {
    let settings = Settings {
        alpha_ppm: 50_000,
        learning: None,
        training: TrainingOptions::default(),
        max_streams: usize::MAX,
    };
    let mut detector = Detector::new(settings, snapshot.clone());
    for baseline in snapshot.streams().iter().take(4) {
        let mut message = detector.begin(baseline.stream());
        for name in KINDS {
            message.text(UnitId { name, index: 0 }, text, 0, usize::MAX, detector.scratch());
        }
        let verdict = detector.finish(message, None);
        let calibrated = !baseline.calibration().statistics().is_empty();
        assert_eq!(matches!(verdict.outcome, Outcome::Normal | Outcome::Anomalous), calibrated);
        if let Some(p) = verdict.p_value {
            assert!(p > 0.0 && p <= 1.0, "p = {p}");
        }
        let json = serde_json::to_value(&verdict).expect("a verdict serialises");
        if let Some(scores) = json["scores"].as_object() {
            // serde_json writes what is not finite as null.
            let mut numbers =
                scores.iter().filter(|(name, _)| !["view", "surprise_bits"].contains(&name.as_str()));
            assert!(numbers.all(|(name, score)| score.is_number() || name == "statistic"), "{json}");
            assert!(
                scores["surprise_bits"]
                    .as_object()
                    .is_some_and(|views| views.values().all(|v| v.is_number()))
            );
        }
    }
}
