//! Many damaged snapshots, and many messages: nothing panics, and memory stays within what is declared.
//!
//! One test, so that no other thread allocates meanwhile. How many is set by the environment: the checks run some
//! tens of thousands, the bars of the project ask for
//! `DRIFTLOCK_MUTATIONS=10000000 DRIFTLOCK_EVENTS=1000000 cargo test --release -p driftlock-fuzz --test mutations -- --nocapture`.
#![allow(missing_docs)]

use std::sync::Arc;
use std::time::Instant;

use driftlock_engine::adapt::{Rolling, RollingOptions};
use driftlock_engine::baseline::{Snapshot, StreamTrainer, TrainingOptions};
use driftlock_engine::detector::{Detector, LearningPlan, Settings, UnitId};
use driftlock_engine::drift::{DriftOptions, Extent};
use driftlock_engine::significance::{FdrOptions, OnlineFdr};
use driftlock_fuzz::memory;

fn amount(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

/// xorshift64*.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D)
}

/// One to eight mutations each, under a digest that fits.
fn damaged_snapshots(count: u64) {
    let mut state = amount("DRIFTLOCK_SEED", 1) | 1;
    for _ in 0..count {
        // A snapshot; a valid one to begin with.
        let mut data = vec![0, 2];
        for _ in 0..1 + next(&mut state) % 8 {
            data.extend_from_slice(&next(&mut state).to_le_bytes()[3..7]);
        }
        memory::holds(&data);
    }
}

fn text(state: &mut u64) -> String {
    let order = next(state) >> 44;
    let goods = ["boat", "lamp", "chair", "kettle"][(order % 4) as usize];
    format!("where is the {goods} of order {order}, and when will it come")
}

const LIMIT_BYTES: usize = 256 << 20;

/// The detector, FDR control, and a rolling baseline with its drift monitor see `count` messages.
fn messages(count: u64) {
    let mut state = 7;
    let settings = Settings {
        alpha_ppm: 10_000,
        learning: Some(LearningPlan::new(800, 10_000).unwrap()),
        training: TrainingOptions::default(),
        max_streams: 64,
    };
    let mut detector = Detector::new(settings, Snapshot::default());
    let mut fdr = OnlineFdr::new(FdrOptions::default()).unwrap();
    let mut trainer = StreamTrainer::new(TrainingOptions::default());
    (0..400).for_each(|_| trainer.train(&[("user", text(&mut state).into_bytes())]));
    let held_out: Vec<_> = (0..100).map(|_| vec![("user", text(&mut state).into_bytes())]).collect();
    let mut baseline = trainer.freeze().tune("s", &held_out);
    let calibration = (0..300).map(|_| baseline.statistic(&[("user", text(&mut state).into_bytes())]));
    baseline.calibrate(calibration.collect());
    let options = RollingOptions {
        alpha_ppm: 10_000,
        admit_above_ppm: 20_000,
        renew_every: 5_000,
        drift: DriftOptions {
            alpha_ppm: 10,
            hop: Extent::Rows(1_000),
            max_permutations: 8_000_000,
            ..DriftOptions::default()
        },
        ..RollingOptions::default()
    };
    let mut rolling = Rolling::new(Arc::new(baseline), options).unwrap();
    let started = Instant::now();
    let mut half = 0;
    let all = memory::peak_of(|| {
        for i in 0..count {
            let text = text(&mut state);
            let mut message = detector.begin(if i % 1000 == 0 { "rare" } else { "s" });
            message.text(UnitId { name: "user", index: 0 }, text.as_bytes(), 0, 1 << 14, detector.scratch());
            let verdict = detector.finish(message, None);
            if let Some([rank, of]) = verdict.p_fraction {
                fdr.test(driftlock_engine::calibrate::PValue { rank, of });
            }
            rolling.observe(&[("user", text.into_bytes())], true, i);
            if i == count / 2 {
                half = memory::held();
            }
        }
    });
    let (held, generations) = (memory::held(), rolling.generation());
    println!(
        "{count} messages in {:.1?}: peak {:.1} MiB, held {:.1} MiB at half of them and {:.1} MiB at the end, {generations} generations",
        started.elapsed(),
        all as f64 / f64::from(1 << 20),
        half as f64 / f64::from(1 << 20),
        held as f64 / f64::from(1 << 20),
    );
    assert!(all <= LIMIT_BYTES, "{all}");
    // Once the pools are full nothing grows.
    assert!(count < 100_000 || held <= half + (4 << 20), "{half} {held}");
}

#[test]
fn memory_stays_within_what_is_declared() {
    let count = amount("DRIFTLOCK_MUTATIONS", 20_000);
    let started = Instant::now();
    damaged_snapshots(count);
    println!("{count} damaged snapshots in {:.1?}", started.elapsed());
    messages(amount("DRIFTLOCK_EVENTS", 20_000));
}
