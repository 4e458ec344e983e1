//! Random traffic, learned from, judged and adapted to, as one digest: the same on every machine.
//!
//! `cargo run -p driftlock-engine --example same_bytes -- SEEDS` prints a line a seed: SHA-256 over the snapshot's
//! bytes, every verdict's JSON, the drift verdicts and the adapted baselines. Each seed is run with two cuttings
//! of the texts, which must agree. `cargo xtask test` runs it here in the dev and in the release profile, and on a
//! 64-bit big-endian machine (s390x under qemu), and compares what they print; wasm32, a 32-bit machine, is held against native code by
//! `tests/tests/three_ways.rs`.

use std::sync::Arc;

use driftlock_engine::adapt::{Rolling, RollingOptions, Season, SeasonOptions, SeasonalCalibration};
use driftlock_engine::baseline::{Digest, Snapshot, TrainingOptions};
use driftlock_engine::calibrate::PValue;
use driftlock_engine::detector::{Detector, LearningPlan, Settings, UnitId};
use driftlock_engine::drift::{ConformalMartingale, DriftOptions, Drivers, Extent, Side, Statistic};
use driftlock_engine::significance::{FdrOptions, OnlineFdr, Procedure, Seed, permutation_test};

/// xorshift64*.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    fn word(&mut self) -> String {
        let rare = if self.below(20) == 0 { 4000 } else { 60 };
        let mut own = Chance(self.below(rare) * 0x9E37_79B9 + 77);
        own.next();
        (0..2 + own.below(7)).map(|_| char::from(b'a' + own.below(26) as u8)).collect()
    }

    /// Bytes of any kind: words, JSON, requests, log lines, identifiers, and some that are no text.
    fn text(&mut self) -> Vec<u8> {
        let mut out = match self.below(5) {
            0 => format!(
                "GET /{}/{}?id={}&q={} HTTP/1.1\r\nHost: {}\r\n\r\n",
                self.word(),
                self.word(),
                self.below(99),
                self.word(),
                self.word()
            ),
            1 => format!(
                r#"{{"model":"{}","n":{},"t":"2026-11-{:02}T10:00:00Z","m":[{{"role":"user","content":""#,
                self.word(),
                self.below(1 << 40),
                1 + self.below(28)
            ),
            2 => format!(
                r#"10.0.{}.7 - - [x] "POST /{}?a={} HTTP/1.1" {} {} "-" ""#,
                self.below(256),
                self.word(),
                self.word(),
                200 + self.below(3),
                self.below(9000)
            ),
            3 => format!("{}={}&{}=", self.word(), self.below(1 << 20), self.word()),
            _ => String::new(),
        }
        .into_bytes();
        for _ in 0..self.below(30) {
            match self.below(40) {
                0 => out.extend_from_slice(&self.next().to_le_bytes()),
                1 => out.extend_from_slice(
                    format!("{:08x}-1b2c-4d5e-8f90-{:012x} ", self.below(1 << 32), self.below(1 << 48))
                        .as_bytes(),
                ),
                2 => out.extend_from_slice("żółw 漢字 ".as_bytes()),
                _ => out.extend_from_slice(format!("{} ", self.word()).as_bytes()),
            }
        }
        out
    }
}

const KINDS: [&str; 3] = ["target", "user", "envelope"];

/// What the traffic of `seed` comes to, with its texts cut by `cuts`.
fn run(seed: u64, mut cuts: Chance) -> Digest {
    let mut chance = Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut record: Vec<u8> = Vec::new();
    let settings = Settings {
        alpha_ppm: 50_000,
        learning: Some(LearningPlan::new(150, 50_000).expect("enough to learn from")),
        training: TrainingOptions::default(),
        max_streams: 3,
    };
    let mut detector = Detector::new(settings, Snapshot::default());
    let mut fdrs: Vec<OnlineFdr> = [
        Procedure::LordPlusPlus,
        Procedure::Saffron { lambda_ppm: 500_000 },
        Procedure::ELond,
        Procedure::WindowBh { window: 100 },
    ]
    .into_iter()
    .filter_map(|procedure| OnlineFdr::new(FdrOptions { procedure, ..FdrOptions::default() }).ok())
    .collect();
    let mut drivers = Drivers::new(200);
    let mut kept = Vec::new();
    for i in 0..500u64 {
        let mut units: Vec<(&'static str, Vec<u8>)> = Vec::new();
        for kind in KINDS {
            if chance.below(4) > 0 {
                units.push((kind, chance.text()));
            }
        }
        let mut message = detector.begin(["a", "b", "c", "d"][(chance.below(40) / 13) as usize]);
        for (at, (name, text)) in units.iter().enumerate() {
            let id = UnitId { name, index: at as u16 };
            let mut rest = &text[..];
            let mut offset = 0;
            while !rest.is_empty() {
                let (piece, behind) = rest.split_at((1 + cuts.below(90) as usize).min(rest.len()));
                message.text(id, piece, offset, 1 << 14, detector.scratch());
                (rest, offset) = (behind, offset + piece.len() as u64);
            }
        }
        let defect = (chance.below(30) == 0).then(|| "cut_short".to_owned());
        let verdict = detector.finish(message, defect);
        record.extend_from_slice(serde_json::to_string(&verdict).expect("a verdict serialises").as_bytes());
        if let Some([rank, of]) = verdict.p_fraction {
            record.extend(fdrs.iter_mut().map(|fdr| u8::from(fdr.test(PValue { rank, of }))));
        }
        drivers.begin(if i < 250 { Side::Reference } else { Side::Window });
        units.iter().for_each(|(name, text)| drivers.unit(name, text, &vec![300; text.len()]));
        kept.push(units);
    }
    record.extend_from_slice(
        format!("{:?}", drivers.words(Statistic::CostPerByte, driftlock_engine::drift::Moved::Up, 50))
            .as_bytes(),
    );
    let snapshot = detector.snapshot();
    let bytes = snapshot.encode();
    assert_eq!(Snapshot::decode(&bytes).as_ref(), Ok(&snapshot));
    record.extend_from_slice(&bytes);
    for baseline in snapshot.into_streams() {
        let options = RollingOptions {
            alpha_ppm: 50_000,
            admit_above_ppm: 60_000,
            pool_messages: 120,
            renew_every: 60,
            quarantine: Extent::Rows(30),
            reference_rows: 40,
            drift: DriftOptions {
                window: Extent::Rows(30),
                hop: Extent::Rows(10),
                max_permutations: 20_000,
                ..DriftOptions::default()
            },
            ..RollingOptions::default()
        };
        let season = SeasonOptions {
            season: Season { slot_hours: 12, utc_offset_minutes: 60 },
            alpha_ppm: 50_000,
            admit_above_ppm: 60_000,
            keep: 40,
            least: 20,
        };
        let mut season = SeasonalCalibration::new(season).expect("the options fit");
        let statistics: Vec<i64> = kept.iter().map(|units| baseline.statistic(units)).collect();
        let mut martingale =
            ConformalMartingale::new(&statistics, Default::default(), &Seed(baseline.digest().0));
        let permuted =
            permutation_test(&statistics[..200], &statistics[200..], 200, &Seed(baseline.digest().0));
        record.extend_from_slice(format!("{permuted:?}").as_bytes());
        let mut rolling = Rolling::new(Arc::new(baseline), options).expect("the options fit");
        for (units, i) in kept.iter().zip(0u64..) {
            let observed = rolling.observe(units, true, i);
            let statistic = rolling.baseline().statistic(units);
            let ranked = season.observe(statistic, i * 3_600_000_000_000, observed.p);
            let capital = martingale.observe(statistic);
            record.extend_from_slice(format!("{observed:?}{ranked:?}{capital:?}").as_bytes());
        }
        record.extend_from_slice(format!("{:?}", rolling.tally()).as_bytes());
        record.extend_from_slice(&rolling.baseline().digest().0);
    }
    Digest::of(&record)
}

fn main() {
    let seeds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(20);
    for seed in 1..=seeds {
        let digest = run(seed, Chance(seed));
        assert_eq!(digest, run(seed, Chance(seed ^ 0xABCD_EF01)), "seed {seed}: the cutting mattered");
        println!("{seed} {digest}");
    }
}
