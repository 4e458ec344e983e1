//! `driftlock bench` runs: what it measures agrees with what it expects, and what is not there is said.
//!
//! Without evaluation data and with the shortest of rounds, so that it takes seconds. The rates of a machine
//! under test mean nothing and are not looked at; that they were taken is. What does not depend on the
//! machine's speed is held to its bar: the gateway's idle memory.

use std::path::Path;
use std::process::Command;

use driftlock_tests::{envoy_binary, filter, program};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// The report of a run with this Envoy.
fn report(envoy: &Path) -> Value {
    let output = Command::new(program())
        .args(["bench", "--smoke", "--json", "--data", "/nonexistent", "--filter"])
        .arg(filter())
        .arg("--envoy")
        .arg(envoy)
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// Each key of an object is a number above zero, but those in `null`.
fn assert_measured(report: &Value, object: &str, null: &[&str]) {
    let fields = report[object].as_object().expect("an object");
    assert!(fields.len() >= 7, "{report}");
    for (name, value) in fields {
        match value.as_f64() {
            // The difference of two latencies of a machine under test.
            Some(_) if name == "envoy_added_us_4k" && null.is_empty() => {}
            Some(value) => assert!(value > 0.0 && !null.contains(&name.as_str()), "{name}: {value}"),
            None => assert!(null.contains(&name.as_str()), "{name} was not measured: {report}"),
        }
    }
}

fn missing(report: &Value, key: &str) -> String {
    let missing = report["missing"].as_array().expect("a list");
    let names = |it: &&Value| it["keys"].as_array().is_some_and(|keys| keys.iter().any(|name| name == key));
    let found = missing.iter().find(names).and_then(|it| it["reason"].as_str());
    found.unwrap_or_else(|| panic!("{key} is not among what is missing: {report}")).to_owned()
}

#[test]
fn everything_is_measured_and_the_gateway_is_small() {
    let report = report(&envoy_binary());
    assert_measured(&report, "ratios", &[]);
    assert_measured(&report, "figures", &[]);
    assert_eq!(report["proxies"].as_array().expect("a list").len(), 4, "{report}");
    assert!(missing(&report, "score_vs_zstd3_dict").contains("--data"), "{report}");
    let idle = report["figures"]["gateway_idle_bytes"].as_u64().expect("bytes");
    assert!(idle < 64 * MIB, "{} KiB", idle >> 10);
}

#[test]
fn without_envoy_the_rest_is_measured_and_what_to_do_is_said() {
    let report = report(Path::new("/nonexistent"));
    let ratios = [
        "envoy_rps_vs_noop_filter",
        "envoy_rps_vs_no_filter",
        "gateway_rps_vs_envoy",
        "envoy_first_byte_vs_noop",
    ];
    let figures = [
        "gateway_idle_bytes",
        "envoy_added_us_4k",
        "envoy_us_4k",
        "envoy_first_byte_us",
        "envoy_request_to_first_byte_vs_noop",
    ];
    assert_measured(&report, "ratios", &ratios);
    assert_measured(&report, "figures", &figures);
    for key in ratios.into_iter().chain(figures) {
        assert!(missing(&report, key).contains("cargo xtask envoy"), "{report}");
    }
}
