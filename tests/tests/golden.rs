//! Verdicts as they were: a committed file of verdicts that today's code must reproduce byte for byte.
//!
//! Every other comparison here is between today's paths, which a change moves together. This one says when
//! the answers themselves changed. `DRIFTLOCK_GOLDEN=write` writes the file anew; the difference belongs in
//! the commit that caused it.

use std::path::PathBuf;

use driftlock_host::capture::Exchange;
use driftlock_tests::drive::{Native, Passage, Vm};
use driftlock_tests::{baseline, traffic, trained};
use serde_json::value::RawValue;
use serde_json::{json, to_string};

const WRITE: &str = "DRIFTLOCK_GOLDEN";
const MAX_BYTES: usize = 60 << 10;

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/verdicts.jsonl")
}

/// Three of each kind of attack and a few normals, from a time after the baseline's.
fn exchanges() -> Vec<Exchange> {
    let all = traffic(77, 60, 15);
    let (normal, odd): (Vec<_>, Vec<_>) = all.into_iter().partition(|exchange| exchange.label == "normal");
    odd.into_iter().take(10).chain(normal.into_iter().take(10)).collect()
}

/// The file's lines: the baseline's digest, then id and verdicts of each exchange.
fn lines(mut pass: impl FnMut(&Passage) -> driftlock_tests::drive::Seen) -> Vec<String> {
    let raw = |json: Option<String>| json.map(|json| RawValue::from_string(json).expect("verdicts are JSON"));
    let mut lines = vec![json!({"baseline_sha256": baseline().digest().to_string()}).to_string()];
    for exchange in exchanges() {
        let seen = pass(&Passage::of(&exchange));
        let verdicts = (&exchange.id, &exchange.label, raw(seen.request), raw(seen.response));
        lines.push(to_string(&verdicts).expect("serialises"));
    }
    lines
}

#[test]
fn verdicts_are_those_of_the_committed_file() {
    let configuration = trained(json!({}));
    let (mut native, mut vm) = (Native::start(&configuration), Vm::start(&configuration));
    let natively = lines(|passage| native.pass(passage));
    let on_wasmtime = lines(|passage| vm.pass(passage));
    assert_eq!(natively, on_wasmtime);
    let text = natively.join("\n") + "\n";
    assert!(text.len() < MAX_BYTES, "{} bytes are too many to commit; take fewer exchanges", text.len());
    if std::env::var(WRITE).is_ok_and(|value| value == "write") {
        std::fs::create_dir_all(path().parent().expect("a folder")).expect("the folder can be made");
        std::fs::write(path(), &text).expect("the file can be written");
    }
    let golden = std::fs::read_to_string(path()).unwrap_or_default();
    let change = format!(
        "verdicts changed. If that was meant, run `{WRITE}=write cargo test --release -p driftlock-tests --test golden`, \
         look at the difference of {}, and commit it with the change",
        path().display()
    );
    assert_eq!(golden.lines().count(), natively.len(), "{change}");
    for (golden, now) in golden.lines().zip(&natively) {
        assert_eq!(golden, now, "{change}");
    }
    assert_eq!(golden, text, "{change}");
}
