//! Adaptation: what may enter, what it gains under gradual drift, what it resists when it is poisoned.
//!
//! `cargo test --release -p driftlock-engine --test adapt -- --nocapture` prints the figures in DECISIONS.md.

use std::sync::Arc;

use driftlock_engine::adapt::*;
use driftlock_engine::baseline::{StreamBaseline, StreamTrainer, TrainingOptions, TrainingUnit};
use driftlock_engine::calibrate::Calibration;
use driftlock_engine::drift::{Budget, DriftOptions, Extent};
use proptest::prelude::*;

/// xorshift64*: the tests' own source of chance.
struct Chance(u64);

impl Chance {
    fn new(seed: u64) -> Self {
        let mut chance = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        (0..16).for_each(|_| _ = chance.next());
        chance
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

type Message = Vec<TrainingUnit>;

/// A word for a number: the same one every time.
fn word(number: u64) -> String {
    let mut chance = Chance::new(number + 1_000);
    let mut word = String::new();
    for _ in 0..2 + chance.below(2) {
        word.push(b"bcdfghklmnprstvw"[chance.below(16) as usize] as char);
        word.push(b"aeiou"[chance.below(5) as usize] as char);
    }
    word
}

/// A request of a shop whose goods change: at `time` it sells the 400 from number `time` on.
fn ordinary(chance: &mut Chance, time: u64) -> Message {
    let good = word(time + chance.below(400));
    let target =
        format!("GET /shop/{good}?size={}&q={}", 30 + chance.below(7), word(time + chance.below(400)));
    let mut text = format!("is the {} still to be had", word(time + chance.below(400)));
    for _ in 0..chance.below(4) {
        text += &format!(" with a {} and", word(time + chance.below(400)));
    }
    vec![("target", target.into_bytes()), ("user", text.into_bytes())]
}

fn attack(chance: &mut Chance) -> Message {
    let n = chance.below(900);
    let target =
        format!("GET /shop/{}?size=1'%20UNION%20SELECT%20{n},password--&q={n}", word(chance.below(400)));
    vec![("target", target.into_bytes()), ("user", b"is the boat still to be had".to_vec())]
}

const ALPHA_PPM: u32 = 10_000;

fn baseline(chance: &mut Chance) -> Arc<StreamBaseline> {
    let mut trainer = StreamTrainer::new(TrainingOptions::default());
    (0..1_400).for_each(|_| trainer.train(&ordinary(chance, 0)));
    let held_out: Vec<Message> = (0..200).map(|_| ordinary(chance, 0)).collect();
    let mut baseline = trainer.freeze().tune("shop", &held_out);
    baseline.calibrate((0..400).map(|_| baseline.statistic(&ordinary(chance, 0))).collect());
    Arc::new(baseline)
}

fn options() -> RollingOptions {
    RollingOptions {
        alpha_ppm: ALPHA_PPM,
        admit_above_ppm: 20_000,
        pool_messages: 2_000,
        renew_every: 500,
        quarantine: Extent::Rows(200),
        drift: DriftOptions {
            window: Extent::Rows(200),
            hop: Extent::Rows(50),
            // The budget is a generation's.
            alpha_ppm: 2_000,
            budget: Budget::WholeRun { looks: 20 },
            max_permutations: 100_000,
            ..DriftOptions::default()
        },
        ..RollingOptions::default()
    }
}

fn is_flagged(baseline: &StreamBaseline, message: &Message) -> bool {
    baseline.calibration().p_value(baseline.statistic(message)).at_most(ALPHA_PPM)
}

/// Share of fresh messages of `time` that `baseline` flags.
fn flagged(baseline: &StreamBaseline, chance: &mut Chance, time: u64) -> f64 {
    (0..2_000).filter(|_| is_flagged(baseline, &ordinary(chance, time))).count() as f64 / 2_000.0
}

/// Generations on traffic that does not change keep the rate of false alarms. Of a hundred seeds one has a drift
/// alarm, as the budget allows; this is another.
#[test]
fn the_false_alarm_rate_survives_generations() {
    let mut chance = Chance::new(3);
    for renew in [Renew::Calibration, Renew::Models] {
        let mut rolling = Rolling::new(baseline(&mut chance), RollingOptions { renew, ..options() }).unwrap();
        let mut rates = Vec::new();
        for _ in 0..8_000 {
            if rolling.observe(&ordinary(&mut chance, 0), true, 0).renewed.is_some() {
                rates.push(flagged(rolling.baseline(), &mut chance, 0));
            }
        }
        println!("{renew:?}: false alarm rate by generation {rates:?}");
        assert!(rates.len() >= 8 && !rolling.is_drifting(), "{} {:?}", rates.len(), rolling.tally());
        let late = &rates[rates.len() / 2..];
        let mean = late.iter().sum::<f64>() / late.len() as f64;
        // Cut tails left as they are would be beyond 1 % + generations times 2 %.
        assert!(mean < 0.015, "{renew:?}: {mean}");
    }
}

/// Goods change slowly: what a frozen baseline flags then, and what a rolling one does.
#[test]
fn gradual_drift_is_followed() {
    let mut chance = Chance::new(2);
    let first = baseline(&mut chance);
    let mut rolling = Rolling::new(Arc::clone(&first), options()).unwrap();
    let (messages, per_message) = (12_000u64, 240);
    let mut by_quarter = [(0u32, 0u32); 4];
    for i in 0..messages {
        let message = ordinary(&mut chance, i / per_message);
        let observed = rolling.observe(&message, true, 0);
        let (frozen, followed) = &mut by_quarter[(i * 4 / messages) as usize];
        *frozen += u32::from(is_flagged(&first, &message));
        *followed += u32::from(observed.flagged);
    }
    let share = |n: u32| f64::from(n) * 4.0 / messages as f64;
    let rates: Vec<(f64, f64)> = by_quarter.iter().map(|&(a, b)| (share(a), share(b))).collect();
    println!("flagged of normal, by quarter (frozen, rolling): {rates:?}; {:?}", rolling.tally());
    println!("generations {}, drift alarm {}", rolling.generation(), rolling.is_drifting());
    let attacks = (0..500).filter(|_| is_flagged(rolling.baseline(), &attack(&mut chance))).count();
    println!("attacks flagged by the last generation: {attacks} of 500");
    assert!(rates[3].0 > 0.08, "the drift is too small to tell: {rates:?}");
    assert!(rates[3].1 < rates[3].0 / 3.0 && rates[3].1 < 0.03, "{rates:?}");
    assert!(attacks >= 495, "{attacks}");
}

/// Learns all that comes, as a rolling window without a rule would.
fn undiscerning(recent: &[Message]) -> StreamBaseline {
    let mut trainer = StreamTrainer::new(TrainingOptions::default());
    let recent = &recent[recent.len().saturating_sub(2_000)..];
    let part = |of_ten: std::ops::Range<usize>| {
        recent.iter().enumerate().filter(move |(i, _)| of_ten.contains(&(i % 10))).map(|(_, message)| message)
    };
    part(0..7).for_each(|message| trainer.train(message));
    let held_out: Vec<Message> = part(7..8).cloned().collect();
    let mut baseline = trainer.freeze().tune("shop", &held_out);
    baseline.calibrate(part(8..10).map(|message| baseline.statistic(message)).collect());
    baseline
}

/// An attacker sends 5 % of all messages, for twelve generations.
#[test]
fn flagged_attacks_never_become_normal() {
    let mut chance = Chance::new(3);
    let mut rolling = Rolling::new(baseline(&mut chance), options()).unwrap();
    let mut all = Vec::new();
    for i in 0..8_000 {
        let message = if i % 20 == 7 { attack(&mut chance) } else { ordinary(&mut chance, 0) };
        rolling.observe(&message, true, 0);
        all.push(message);
    }
    let caught = |baseline: &StreamBaseline, chance: &mut Chance| {
        (0..500).filter(|_| is_flagged(baseline, &attack(chance))).count()
    };
    let (gated, ungated) =
        (caught(rolling.baseline(), &mut chance), caught(&undiscerning(&all), &mut chance));
    println!("attacks flagged after poisoning: {gated} of 500 with the rule, {ungated} without");
    println!("{:?}, generation {}", rolling.tally(), rolling.generation());
    assert!(gated >= 495, "{gated}");
    assert!(ungated < 50, "the attack is none: {ungated}");
}

/// A burst that no single message gives away: a new text, ordinary in each word. The drift alarm finds it
/// still in quarantine.
#[test]
fn a_drift_alarm_keeps_out_what_waits() {
    let mut chance = Chance::new(4);
    let mut rolling = Rolling::new(baseline(&mut chance), options()).unwrap();
    (0..3_000).for_each(|_| _ = rolling.observe(&ordinary(&mut chance, 0), true, 0));
    assert!(!rolling.is_drifting());
    let entered = rolling.tally().released;
    // Terser than normal: cheap, and so never flagged.
    let terse = || vec![("target", b"GET /shop/".to_vec()), ("user", b"is the".to_vec())];
    let burst = (1..200).find(|_| {
        let observed = rolling.observe(&terse(), true, 0);
        assert!(!observed.flagged);
        rolling.is_drifting()
    });
    println!("drift alarm after {burst:?} messages of the burst");
    assert!(burst.is_some());
    // Those that left quarantine meanwhile had come before the burst.
    assert!(rolling.tally().released - entered <= burst.unwrap());
    let closed = rolling.tally().released;
    (0..500).for_each(|_| _ = rolling.observe(&terse(), true, 0));
    assert_eq!(rolling.tally().released, closed);
    rolling.resume();
    (0..800).for_each(|_| _ = rolling.observe(&ordinary(&mut chance, 0), true, 0));
    assert!(rolling.tally().released > closed);
}

/// The patient attacker: a payload grows a byte at a time, each message ordinary by the last generation's
/// measure. Nothing stops that for ever; the rule says how long it takes.
#[test]
fn patience_is_what_poisoning_costs() {
    let payload = b"1'%20UNION%20SELECT%20user,password--";
    let walk = |options: Option<RollingOptions>| {
        let mut chance = Chance::new(5);
        let first = baseline(&mut chance);
        let mut rolling = Rolling::new(first, options.unwrap_or(self::options())).unwrap();
        let (mut known, mut sent) = (0usize, 0u32);
        for i in 0..12_000u32 {
            // A tenth of the traffic is the attacker's.
            let message = if i % 10 == 3 {
                let mut message = ordinary(&mut chance, 0);
                // As much of the payload as passes, found by asking; the attacker is given the detector.
                let clean = String::from_utf8(message[0].1.clone()).unwrap();
                let with = |len: usize| {
                    clean.replace("size=", &format!("size={}", String::from_utf8_lossy(&payload[..len])))
                };
                let passes = |len: usize| {
                    let mut message = message.clone();
                    message[0].1 = with(len).into_bytes();
                    let p = rolling.baseline().calibration().p_value(rolling.baseline().statistic(&message));
                    !p.at_most(rolling_bound())
                };
                let len = (0..=payload.len()).rev().find(|&len| passes(len)).unwrap_or(0);
                known = known.max(len);
                message[0].1 = with(len).into_bytes();
                sent += 1;
                message
            } else {
                ordinary(&mut chance, 0)
            };
            rolling.observe(&message, true, 0);
            if known == payload.len() {
                break;
            }
        }
        (known, sent, rolling.generation(), rolling.is_drifting())
    };
    let (known, sent, generations, drifting) = walk(None);
    println!(
        "an attacker with the detector at hand and a tenth of the traffic got {known} of {} payload bytes past it with {sent} messages in {generations} generations; drift alarm {drifting}",
        payload.len()
    );
    assert!(known < payload.len() / 2 && generations >= 10, "{known} {generations}");
}

fn rolling_bound() -> u32 {
    options().admit_above_ppm
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) })]

    /// Whatever comes in whatever order: two runs agree; what was flagged or low, cut short or too late never
    /// enters; memory stays within its bounds.
    #[test]
    fn the_rule_holds(
        seed in any::<u64>(),
        kinds in prop::collection::vec(0u8..10, 200..900),
        max_pool_bytes in 4_000usize..80_000,
        models in any::<bool>(),
    ) {
        let options = RollingOptions {
            alpha_ppm: 50_000,
            admit_above_ppm: 60_000,
            pool_messages: 150,
            max_pool_bytes,
            renew_every: 60,
            renew: if models { Renew::Models } else { Renew::Calibration },
            quarantine: Extent::Rows(40),
            reference_rows: 50,
            drift: DriftOptions { window: Extent::Rows(40), hop: Extent::Rows(10), ..DriftOptions::default() },
            ..RollingOptions::default()
        };
        let small = {
            let mut chance = Chance::new(seed);
            let mut trainer = StreamTrainer::new(TrainingOptions::default());
            (0..60).for_each(|_| trainer.train(&ordinary(&mut chance, 0)));
            let held_out: Vec<Message> = (0..20).map(|_| ordinary(&mut chance, 0)).collect();
            let mut baseline = trainer.freeze().tune("shop", &held_out);
            baseline.calibrate((0..40).map(|_| baseline.statistic(&ordinary(&mut chance, 0))).collect());
            Arc::new(baseline)
        };
        let run = || {
            let mut chance = Chance::new(seed ^ 1);
            let mut rolling = Rolling::new(Arc::clone(&small), options).unwrap();
            let mut log = Vec::new();
            let mut expected = Tally::default();
            for &kind in &kinds {
                let message = if kind == 0 { attack(&mut chance) } else { ordinary(&mut chance, 0) };
                let (whole, closed) = (kind != 1, rolling.is_drifting());
                let observed = rolling.observe(&message, whole, 0);
                assert!(rolling.held_bytes() <= 2 * max_pool_bytes + 4_096, "{}", rolling.held_bytes());
                if observed.fate == Fate::Waiting {
                    assert!(whole && !closed && !observed.p.at_most(options.admit_above_ppm));
                }
                expected.defective += u64::from(!whole);
                expected.flagged += u64::from(whole && observed.flagged);
                log.push((observed.p, observed.fate, observed.renewed));
            }
            let tally = rolling.tally();
            assert_eq!((tally.defective, tally.flagged), (expected.defective, expected.flagged));
            let waited = log.iter().filter(|(_, fate, _)| *fate == Fate::Waiting).count() as u64;
            assert!(tally.released <= waited);
            (log, tally, rolling.baseline().digest())
        };
        prop_assert_eq!(run(), run());
    }
}

#[test]
fn options_that_do_not_fit_are_refused_by_name() {
    let baseline = baseline(&mut Chance::new(6));
    let refused = |options| match Rolling::new(Arc::clone(&baseline), options) {
        Err(AdaptError::Option(name)) => name,
        other => panic!("{other:?}"),
    };
    let good = options();
    assert_eq!(refused(RollingOptions { admit_above_ppm: ALPHA_PPM - 1, ..good }), "admit_above_ppm");
    assert_eq!(refused(RollingOptions { quarantine: Extent::Rows(199), ..good }), "quarantine");
    assert_eq!(refused(RollingOptions { quarantine: Extent::Nanoseconds(1), ..good }), "quarantine");
    assert_eq!(refused(RollingOptions { renew_every: 0, ..good }), "renew_every");
    assert_eq!(refused(RollingOptions { pool_messages: 400, ..good }), "pool_messages");
    let few = RollingOptions { reference_rows: 2, ..good };
    assert!(matches!(Rolling::new(Arc::clone(&baseline), few), Err(AdaptError::Drift(_))));
}

// ---------------------------------------------------------------------------------------------------
// Seasons.

const HOUR_NS: u64 = 3_600_000_000_000;

fn seasonal() -> SeasonalCalibration {
    let options = SeasonOptions {
        season: Season { slot_hours: 24, utc_offset_minutes: 0 },
        alpha_ppm: ALPHA_PPM,
        admit_above_ppm: 20_000,
        keep: 600,
        least: 150,
    };
    SeasonalCalibration::new(options).unwrap()
}

#[test]
fn slots_of_the_week() {
    let hours = Season { slot_hours: 1, utc_offset_minutes: 0 };
    assert_eq!((hours.slots(), hours.slot(0)), (168, 72), "1970-01-01 was a Thursday");
    // 2026-11-23 06:50 UTC is a Monday.
    let monday = 1_795_416_600 * 1_000_000_000;
    assert_eq!(hours.slot(monday), 6);
    assert_eq!(Season { slot_hours: 1, utc_offset_minutes: -7 * 60 }.slot(monday), 167, "Sunday in America");
    assert_eq!(Season { slot_hours: 24, utc_offset_minutes: 0 }.slot(monday), 0);
    assert_eq!(Season { slot_hours: 5, utc_offset_minutes: 0 }.slots(), 34);
}

/// Sundays are stranger. Ranked among all messages they are flagged more often than alpha; among Sundays not,
/// and what is odd for the other days is found again there.
#[test]
fn a_thick_slot_ranks_by_itself_and_a_thin_one_by_the_pool() {
    let mut chance = Chance::new(8);
    let mut seasonal = seasonal();
    let bits = |i: i32| -(f64::from(i) / 200.0).log2();
    let own = Calibration::new((1..=200).map(|i| (bits(i) * f64::from(1 << 20)) as i64).collect());
    let statistic = |chance: &mut Chance, day: u64| {
        let bits = (chance.below(1 << 20) + 1) as f64 / f64::from(1 << 20);
        ((-bits.log2() + if day == 6 { 1.0 } else { 0.0 }) * f64::from(1 << 20)) as i64
    };
    let mut ranked = Vec::new();
    // Mondays are day 0: 1970-01-05.
    let (mut late, mut flagged) = ([0u32; 2], [0u32; 2]);
    for week in 0..12u64 {
        for day in 0..7 {
            for _ in 0..120 {
                let at = (4 + week * 7 + day) * 24 * HOUR_NS;
                let statistic = statistic(&mut chance, day);
                let (p, by) = seasonal.observe(statistic, at, own.p_value(statistic));
                ranked.push(by);
                if week >= 6 {
                    let sunday = usize::from(day == 6);
                    late[sunday] += 1;
                    flagged[sunday] += u32::from(p.at_most(ALPHA_PPM));
                }
            }
        }
    }
    let rate = |i: usize| f64::from(flagged[i]) / f64::from(late[i]);
    println!("flagged on weekdays {}, on Sundays {}", rate(0), rate(1));
    assert_eq!((ranked[0], ranked[200]), (RankedBy::Baseline, RankedBy::Pool));
    assert_eq!(*ranked.last().unwrap(), RankedBy::Slot(6));
    assert!(rate(0) < 0.02 && rate(1) < 0.04, "{} {}", rate(0), rate(1));
    let odd = (7.5 * f64::from(1 << 20)) as i64;
    let weekday = seasonal.clone().observe(odd, 4 * 24 * HOUR_NS, own.p_value(odd)).0;
    let sunday = seasonal.observe(odd, 10 * 24 * HOUR_NS, own.p_value(odd)).0;
    assert!(weekday.at_most(ALPHA_PPM) && weekday.ceil_ppm() < sunday.ceil_ppm(), "{weekday:?} {sunday:?}");
}
