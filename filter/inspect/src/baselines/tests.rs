//! Several VMs in one process, and a host service that fails in every way.

use alloc::collections::BTreeMap;
use alloc::rc::Rc;
use alloc::string::ToString;
use core::cell::RefCell;
use std::borrow::ToOwned;

use super::*;
use crate::config::Config;
use driftlock_engine::detector::UnitId;

#[derive(Debug, Default)]
struct Process {
    values: BTreeMap<String, (Vec<u8>, u32)>,
    cas: u32,
    /// Before the next writes, another VM writes this.
    overtake: Vec<(String, Vec<u8>)>,
    refuse: bool,
}

/// Headers and body of a call.
type Sent = (Vec<(String, String)>, Vec<u8>);

/// One VM's view of the process and of the network.
#[derive(Debug, Default)]
struct Fake {
    process: Rc<RefCell<Process>>,
    calls: Vec<Sent>,
    refuse_calls: bool,
    counted: BTreeMap<Metric, u64>,
    lines: Vec<String>,
}

impl Fake {
    fn of(process: &Rc<RefCell<Process>>) -> Self {
        Self { process: Rc::clone(process), ..Self::default() }
    }

    fn count_of(&self, metric: Metric) -> u64 {
        self.counted.get(&metric).copied().unwrap_or(0)
    }

    fn path(&self) -> &str {
        let (headers, _) = self.calls.last().unwrap();
        &headers.iter().find(|(name, _)| name == ":path").unwrap().1
    }
}

impl Services for Fake {
    fn shared(&self, key: &str) -> Result<Option<(Vec<u8>, u32)>, HostError> {
        let process = self.process.borrow();
        if process.refuse { Err(HostError(10)) } else { Ok(process.values.get(key).cloned()) }
    }

    fn set_shared(&mut self, key: &str, value: &[u8], cas: u32) -> Result<(), HostError> {
        let mut process = self.process.borrow_mut();
        if process.refuse {
            return Err(HostError(10));
        }
        for (key, value) in core::mem::take(&mut process.overtake) {
            process.cas += 1;
            let entry = (value, process.cas);
            process.values.insert(key, entry);
        }
        if cas != 0 && process.values.get(key).is_some_and(|(_, current)| *current != cas) {
            return Err(CAS_MISMATCH);
        }
        process.cas += 1;
        let entry = (value.to_vec(), process.cas);
        process.values.insert(key.to_owned(), entry);
        Ok(())
    }

    fn call(&mut self, call: Call<'_>) -> Result<u32, HostError> {
        let headers = call.headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        self.calls.push((headers.collect(), call.body.to_vec()));
        if self.refuse_calls { Err(HostError(2)) } else { Ok(self.calls.len() as u32) }
    }

    fn count(&mut self, metric: Metric, by: u64) {
        *self.counted.entry(metric).or_default() += by;
    }

    fn log(&mut self, _: Level, line: &str) {
        self.lines.push(line.to_owned());
    }
}

struct Vm {
    keeper: Keeper,
    detector: Detector,
    fake: Fake,
    now_ns: u64,
}

const STREAM: &str = "default/request/json";

impl Vm {
    fn start(process: &Rc<RefCell<Process>>, config: &str) -> Self {
        let config = Config::parse(config.as_bytes()).unwrap();
        let keeper = Keeper::new(&config.name, &config.settings, &config.supply);
        let detector = Detector::new(config.settings, config.snapshot);
        let mut vm = Self { keeper, detector, fake: Fake::of(process), now_ns: 5 * SECOND_NS };
        vm.keeper.start("node", &mut vm.detector, &mut vm.fake);
        vm
    }

    fn send(&mut self, text: &str) -> &'static str {
        let mut message = self.detector.begin(STREAM);
        message.text(UnitId { name: "user", index: 0 }, text.as_bytes(), 0, 1 << 14, self.detector.scratch());
        let outcome = self.detector.finish(message, None).outcome.as_str();
        let learned = self.detector.take_learned();
        if !learned.is_empty() {
            self.keeper.learned(learned, &mut self.detector, &mut self.fake);
        }
        outcome
    }

    /// Learns from texts of a kind until its stream is frozen.
    fn learn(&mut self, kind: &str) {
        for i in 0..800 {
            if self.send(&format!("{kind} number {i}")) != "warming_up" {
                return;
            }
        }
        panic!("it still learns");
    }

    fn tick(&mut self, seconds: f64) {
        self.now_ns += (seconds * 1e9) as u64;
        self.keeper.tick(self.now_ns, &mut self.detector, &mut self.fake);
    }

    fn answer(&mut self, status: Option<u16>, body: &[u8]) {
        let token = self.fake.calls.len() as u32;
        let answer = Answer { status, body };
        self.keeper.answered(token, answer, self.now_ns, &mut self.detector, &mut self.fake);
    }

    fn digest(&self) -> Option<String> {
        self.detector.digest(STREAM).map(|digest| digest.to_string())
    }
}

const LEARNING: &str = r#"{"alpha": 0.05, "learn": {"messages": 60}}"#;

/// A snapshot for [`STREAM`], and its digest.
fn snapshot(kind: &str) -> (Vec<u8>, String) {
    let mut vm = Vm::start(&Rc::default(), LEARNING);
    vm.learn(kind);
    let bytes = vm.detector.snapshot().encode();
    let digest = vm.detector.snapshot().digest().to_string();
    (bytes, digest)
}

#[test]
fn the_first_to_finish_decides_for_all() {
    let process = Rc::default();
    let [mut first, mut second, mut idle] = [0; 3].map(|_| Vm::start(&process, LEARNING));
    for i in 0..59 {
        assert_eq!(second.send(&format!("banana {i}")), "warming_up");
    }
    first.learn("apple");
    assert_eq!(first.fake.count_of(Metric::BaselinesShared), 1);
    // It has learned other texts, and judges by the first one's from its first verdict on.
    assert_eq!(second.send("banana 60"), "warming_up");
    assert_eq!(second.digest(), first.digest());
    assert_eq!(second.fake.count_of(Metric::BaselinesAdopted), 1);
    assert_eq!(idle.digest(), None);
    idle.tick(1.0);
    assert_eq!(idle.digest(), first.digest());
    idle.tick(1.0);
    assert_eq!(idle.fake.count_of(Metric::BaselinesAdopted), 1, "once");
    // A VM that starts after a crash, or for a new configuration that learns alike.
    let late = Vm::start(&process, LEARNING);
    assert_eq!(late.digest(), first.digest());
    for other in [
        r#"{"alpha": 0.05, "learn": {"messages": 61}}"#,
        r#"{"name": "x", "alpha": 0.05, "learn": {"messages": 60}}"#,
    ] {
        assert_eq!(Vm::start(&process, other).digest(), None);
    }
    let mut alone = Vm::start(&process, r#"{"alpha": 0.05, "learn": {"messages": 60}, "share": false}"#);
    alone.learn("pear");
    assert_ne!(alone.digest(), first.digest());
}

#[test]
fn a_vm_that_is_overtaken_while_it_publishes_adopts_the_winner() {
    let process: Rc<RefCell<Process>> = Rc::default();
    let mut winner = Vm::start(&process, LEARNING);
    let before = process.borrow().values.clone();
    winner.learn("apple");
    let after: Vec<(String, Vec<u8>)> =
        process.borrow().values.iter().map(|(key, (value, _))| (key.clone(), value.clone())).collect();
    process.borrow_mut().values = before;
    let mut loser = Vm::start(&process, LEARNING);
    for i in 0..59 {
        loser.send(&format!("banana {i}"));
    }
    // The winner's values appear after the loser has looked.
    process.borrow_mut().overtake = after;
    loser.send("banana 60");
    assert_eq!(loser.digest(), winner.digest());
    let written: usize = process.borrow().values.values().map(|(value, _)| value.len()).sum();
    assert!(written < 2 * winner.detector.snapshot().encode().len(), "the loser's own is not kept");
}

#[test]
fn shared_data_that_lies_or_fails_changes_nothing() {
    let process: Rc<RefCell<Process>> = Rc::default();
    let mut first = Vm::start(&process, LEARNING);
    first.learn("apple");
    let blob =
        process.borrow().values.keys().find(|key| key.starts_with("driftlock.baseline/")).unwrap().clone();
    let good = process.borrow().values[&blob].clone();
    for bad in [&b""[..], b"x", &good.0[..good.0.len() - 1], &snapshot("pear").0] {
        process.borrow_mut().values.insert(blob.clone(), (bad.to_vec(), 1));
        let vm = Vm::start(&process, LEARNING);
        assert_eq!(vm.digest(), None);
        assert_eq!(vm.fake.count_of(Metric::ErrorBaseline), 1);
    }
    process.borrow_mut().refuse = true;
    let mut vm = Vm::start(&process, LEARNING);
    vm.learn("apple");
    assert!(vm.digest().is_some(), "it judges by its own");
    assert!(vm.fake.count_of(Metric::ErrorBaseline) > 0);
}

fn pulling(fields: &str) -> String {
    format!(r#"{{"alpha": 0.05, "learn": null, "pull": {{"cluster": "c", "interval_s": 30{fields}}}}}"#)
}

#[test]
fn a_pulled_snapshot_is_taken_whole_and_the_old_one_stays_on_failure() {
    let ((first, first_digest), (second, second_digest)) = (snapshot("apple"), snapshot("banana"));
    let mut vm = Vm::start(&Rc::default(), &pulling(""));
    assert_eq!(vm.send("apple number 7"), "not_inspected");
    vm.tick(0.0);
    assert_eq!(vm.fake.path(), "/v1/snapshots/current");
    vm.tick(1.0);
    assert_eq!(vm.fake.calls.len(), 1, "one at a time");
    vm.answer(Some(200), &first);
    assert_eq!(vm.send("apple number 7"), "normal");
    let digest = vm.digest();
    let damaged = {
        let mut damaged = second.clone();
        damaged[300] ^= 1;
        damaged
    };
    let other_name = {
        let mut vm =
            Vm::start(&Rc::default(), r#"{"name": "other", "alpha": 0.05, "learn": {"messages": 60}}"#);
        vm.learn("apple");
        vm.detector.snapshot().encode()
    };
    let mut failures = 0;
    for (status, body) in [
        (Some(200), &damaged[..]),
        (Some(200), b""),
        (Some(500), b"no"),
        (None, b""),
        (Some(404), &second),
        (Some(200), &other_name),
    ] {
        vm.tick(40.0);
        vm.answer(status, body);
        failures += 1;
        assert_eq!(vm.digest(), digest, "{status:?}");
        assert_eq!(
            vm.fake.count_of(Metric::BaselinePullFailures),
            if body == other_name { failures - 1 } else { failures },
            "{status:?}"
        );
    }
    vm.tick(40.0);
    assert_eq!(vm.fake.calls.last().unwrap().0.last().unwrap().1, format!("\"{first_digest}\""));
    vm.answer(Some(304), b"");
    assert_eq!(vm.digest(), digest);
    vm.tick(40.0);
    vm.answer(Some(200), &second);
    assert_ne!(vm.digest(), digest);
    assert_eq!(vm.send("banana number 7"), "normal");
    assert_eq!(vm.fake.count_of(Metric::BaselinesPulled), 2);
    assert!(vm.fake.lines.last().unwrap().contains(&second_digest));
}

#[test]
fn a_named_digest_is_pulled_once_and_nothing_else_is_taken() {
    let ((wanted, digest), (other, _)) = (snapshot("apple"), snapshot("banana"));
    let mut vm = Vm::start(&Rc::default(), &pulling(&format!(r#", "sha256": "{}""#, digest.to_uppercase())));
    vm.tick(0.0);
    assert_eq!(vm.fake.path(), format!("/v1/snapshots/{digest}"));
    vm.answer(Some(200), &other);
    assert_eq!((vm.digest(), vm.fake.count_of(Metric::BaselinePullFailures)), (None, 1));
    vm.tick(2.0);
    vm.answer(Some(200), &wanted);
    assert!(vm.digest().is_some());
    for _ in 0..100 {
        vm.tick(30.0);
    }
    assert_eq!(vm.fake.calls.len(), 2);
}

#[test]
fn failures_wait_longer_each_time_and_vms_apart() {
    let process = Rc::default();
    let mut waits = Vec::new();
    for _ in 0..3 {
        let mut vm = Vm::start(&process, &pulling(""));
        vm.fake.refuse_calls = true;
        let mut at = Vec::new();
        for tenth in 0..1200 {
            let calls = vm.fake.calls.len();
            vm.tick(0.1);
            if vm.fake.calls.len() > calls {
                at.push(f64::from(tenth) / 10.0);
            }
        }
        let gaps: Vec<f64> = at.windows(2).map(|pair| pair[1] - pair[0]).collect();
        for (i, gap) in gaps.iter().enumerate() {
            let whole = f64::from(1u32 << i).min(30.0);
            assert!((whole / 2.0..=whole + 0.2).contains(gap), "{i}: {gap}");
        }
        waits.push(at);
    }
    assert!(waits[0] != waits[1] && waits[1] != waits[2], "{waits:?}");
    // The same node and number: the same times.
    let mut again = Vm::start(&Rc::default(), &pulling(""));
    again.fake.refuse_calls = true;
    again.tick(0.1);
    assert_eq!(again.fake.calls.len(), 1);
}

#[test]
fn what_one_vm_pulled_the_others_find() {
    let process = Rc::default();
    let (bytes, _) = snapshot("apple");
    let [mut first, mut second] = [0; 2].map(|_| Vm::start(&process, &pulling("")));
    first.tick(0.0);
    second.tick(0.0);
    assert!(second.fake.calls.is_empty(), "the first goes ahead");
    first.answer(Some(200), &bytes);
    second.tick(0.5);
    assert_eq!(second.digest(), first.digest());
    assert!(second.fake.calls.is_empty());
}

#[test]
fn a_pulled_baseline_outweighs_a_learned_one() {
    let process = Rc::default();
    let config = r#"{"alpha": 0.05, "learn": {"messages": 60}, "pull": {"cluster": "c"}}"#;
    let [mut learner, mut puller] = [0; 2].map(|_| Vm::start(&process, config));
    puller.tick(5.0);
    puller.tick(5.0);
    puller.answer(Some(200), &snapshot("banana").0);
    let pulled = puller.digest();
    assert!(pulled.is_some());
    learner.learn("apple");
    assert_ne!(learner.digest(), pulled);
    puller.tick(1.0);
    assert_eq!(puller.digest(), pulled);
    learner.tick(1.0);
    assert_eq!(learner.digest(), pulled);
}

fn posting() -> Vm {
    let config = r#"{"observations": {"cluster": "c", "max_batch_bytes": 4096, "max_pending_bytes": 10000}}"#;
    Vm::start(&Rc::default(), config)
}

#[test]
fn observations_are_batched_bounded_and_counted() {
    let mut vm = posting();
    vm.tick(1.0);
    assert!(vm.fake.calls.is_empty());
    let observation = format!(r#"{{"n":"{}"}}"#, "x".repeat(970));
    for _ in 0..20 {
        vm.keeper.outbox().unwrap().push("request", &observation);
    }
    assert!(vm.keeper.outbox().unwrap().pending_bytes() <= 10_000);
    vm.tick(1.0);
    let dropped = vm.fake.count_of(Metric::ObservationsDropped);
    assert!((10..=11).contains(&dropped), "{dropped}");
    let mut sent = 0;
    loop {
        let (headers, body) = vm.fake.calls.last().unwrap();
        assert!(headers.contains(&("content-type".to_owned(), "application/x-ndjson".to_owned())));
        assert!(body.len() <= 4096 && body.ends_with(b"}\n"));
        sent += body.split_inclusive(|&byte| byte == b'\n').count() as u64;
        let calls = vm.fake.calls.len();
        vm.tick(1.0);
        assert_eq!(vm.fake.calls.len(), calls, "one batch at a time");
        vm.answer(Some(204), b"");
        vm.tick(1.0);
        if vm.fake.calls.len() == calls {
            break;
        }
    }
    assert_eq!((sent + dropped, vm.fake.count_of(Metric::ObservationsSent)), (20, sent));
    assert_eq!(vm.keeper.outbox().unwrap().pending_bytes(), 0);
    // Longer than a batch.
    vm.keeper.outbox().unwrap().push("request", &"x".repeat(5000));
    vm.tick(1.0);
    assert_eq!(vm.fake.count_of(Metric::ObservationsDropped), dropped + 1);
}

#[test]
fn a_service_that_fails_gets_the_same_batch_again_and_one_that_refuses_does_not() {
    let mut vm = posting();
    vm.keeper.outbox().unwrap().push("request", "{}");
    for status in [None, Some(500), Some(429)] {
        vm.tick(60.0);
        vm.answer(status, b"");
        vm.tick(0.1);
        assert_eq!(vm.fake.calls.len(), 1, "it waits");
        assert_eq!(vm.fake.calls.pop().unwrap().1, b"{\"message\":\"request\",\"verdict\":{}}\n");
    }
    vm.tick(60.0);
    vm.answer(Some(400), b"");
    vm.tick(60.0);
    assert_eq!(vm.fake.calls.len(), 1);
    assert_eq!(vm.fake.count_of(Metric::ObservationsDropped), 1);
    assert_eq!(vm.fake.lines.len(), 4);
}
