//! Alerts and dashboard: the rules' own tests by promtool, a runbook for every alert, and every metric that is named
//! in either, with its labels, in a live scrape of Envoy.

use std::collections::BTreeSet;
use std::process::Command;

use driftlock_tests::attach::{Attached, Provider, edited, file, free_ports};
use driftlock_tests::wire::ask;
use driftlock_tests::workspace;
use serde_json::Value;

fn promtool(arguments: &[&str]) {
    let output = Command::new("promtool")
        .args(arguments)
        .current_dir(workspace().join("observability"))
        .output()
        .expect("promtool, from Debian's prometheus, runs: `cargo xtask manifests` installs it");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{}{}", said[0], said[1]);
}

fn alerts() -> Vec<String> {
    let rules = file("observability/rules.yaml");
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    names.map(str::to_owned).collect()
}

#[test]
fn each_alert_fires_and_stays_quiet_as_its_cases_say() {
    promtool(&["check", "rules", "rules.yaml"]);
    promtool(&["test", "rules", "rules.test.yaml"]);
    let cases = file("observability/rules.test.yaml");
    for alert in alerts() {
        for case in ["fires", "is quiet"] {
            assert!(
                cases.contains(&format!("- name: {alert} {case}\n")),
                "{alert} has no case in which it {case}"
            );
        }
    }
}

#[test]
fn each_alert_has_its_page_in_the_runbook() {
    let rules = file("observability/rules.yaml");
    let runbook = file("observability/runbook.md");
    let pages: Vec<&str> = runbook.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    assert_eq!(pages, alerts());
    for page in pages {
        let link = format!("runbook_url: observability/runbook.md#{}", page.to_lowercase());
        assert!(rules.contains(&link), "{link}");
    }
}

/// Words of an expression that are metrics: all that begin with these.
fn metrics(expression: &str) -> Vec<String> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    words
        .filter(|word| word.starts_with("driftlock_") || word.starts_with("envoy_"))
        .map(str::to_owned)
        .collect()
}

/// Labels by which expressions select or sum, apart from those that Prometheus adds.
const LABELS: [&str; 5] = ["direction", "outcome", "reason", "kind", "token_type"];

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_that_is_named_is_in_a_live_scrape() {
    let upstream = Provider::plain(|_| "{}".to_owned());
    let mut edits = free_ports();
    edits.push(("address: 127.0.0.1, port_value: 8000", upstream.socket_address()));
    let envoy = Attached::start(&[("envoy/shadow.yaml", edited(&file("envoy/shadow.yaml"), &edits))]);
    let request = b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n".to_vec();
    assert_eq!(ask(envoy.listen, request, None).await.status, Some(200));
    let scrape = envoy.ask_admin("/stats/prometheus");
    let samples: Vec<&str> = scrape.lines().filter(|line| !line.starts_with('#')).collect();
    let known: BTreeSet<&str> = samples.iter().filter_map(|line| line.split(['{', ' ']).next()).collect();

    let dashboard: Value = serde_json::from_str(&file("observability/dashboard.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut expressions: Vec<(String, String)> = Vec::new();
    for panel in panels {
        for target in panel["targets"].as_array().expect("targets") {
            let of = |name: &str| target[name].as_str().expect("text").to_owned();
            expressions.push((panel["title"].to_string(), of("expr") + " " + &of("legendFormat")));
        }
    }
    for line in file("observability/rules.yaml").lines() {
        if let Some(expression) = line.trim().strip_prefix("expr: ") {
            expressions.push((line.to_owned(), expression.to_owned()));
        }
    }
    assert!(expressions.len() > 35, "{}", expressions.len());
    for (place, expression) in &expressions {
        let named = metrics(expression);
        for metric in &named {
            assert!(known.contains(metric.as_str()), "{place}: no {metric} in\n{scrape}");
        }
        for label in LABELS.iter().filter(|label| {
            let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
            words.into_iter().any(|word| word == **label)
        }) {
            let wanted = format!("{label}=\"");
            let has = |metric: &String| {
                samples.iter().any(|line| line.starts_with(&format!("{metric}{{")) && line.contains(&wanted))
            };
            let recorded = expression.contains("driftlock:");
            assert!(
                recorded || named.iter().any(has),
                "{place}: no metric of it has the label {label}\n{scrape}"
            );
        }
    }
}
