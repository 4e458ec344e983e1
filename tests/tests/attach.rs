//! Every file of `envoy/`: taken by Envoy's own check and by `driftlock config check`, and then by a live Envoy
//! with requests through it.

use std::path::Path;

use driftlock_host::check::check;
use driftlock_tests::attach::{Attached, Provider, Seen, edited, file, free_ports, learns_soon, validate};
use driftlock_tests::wire::{Answer, ask};
use driftlock_tests::workspace;
use serde_json::{Value, json};

/// What Envoy is started by, with the files it names.
const FILES: [&[&str]; 5] = [
    &["envoy/minimal.yaml"],
    &["envoy/llm-gateway.yaml"],
    &["envoy/shadow.yaml"],
    &["envoy/fail-closed.yaml"],
    &[
        "envoy/xds/bootstrap.yaml",
        "envoy/xds/listener.yaml",
        "envoy/xds/clusters.yaml",
        "envoy/xds/extension.yaml",
    ],
];

/// The provider of each route of the gateway's file: route, host, a path and a body in the provider's API, and
/// the style that the filter has to find.
const PROVIDERS: [(&str, &str, &str, &str, &str); 6] = [
    (
        "openai",
        "api.openai.com",
        "/v1/chat/completions",
        r#"{"model":"m","messages":[{"role":"user","content":"Where is my order?"}]}"#,
        "openai.chat",
    ),
    (
        "anthropic",
        "api.anthropic.com",
        "/v1/messages",
        r#"{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"Where is my order?"}]}"#,
        "anthropic.messages",
    ),
    (
        "gemini",
        "generativelanguage.googleapis.com",
        "/v1beta/models/m:generateContent",
        r#"{"contents":[{"role":"user","parts":[{"text":"Where is my order?"}]}]}"#,
        "gemini",
    ),
    (
        "bedrock",
        "bedrock-runtime.us-east-1.amazonaws.com",
        "/model/m/converse",
        r#"{"messages":[{"role":"user","content":[{"text":"Where is my order?"}]}]}"#,
        "bedrock.converse",
    ),
    (
        "cohere",
        "api.cohere.com",
        "/v2/chat",
        r#"{"model":"m","messages":[{"role":"user","content":"Where is my order?"}]}"#,
        "cohere.chat",
    ),
    (
        "mistral",
        "api.mistral.ai",
        "/v1/chat/completions",
        r#"{"model":"m","messages":[{"role":"user","content":"Where is my order?"}]}"#,
        "openai.chat",
    ),
];

fn answer(_: &Seen) -> String {
    json!({"id": "1", "choices": [{"index": 0, "finish_reason": "stop",
        "message": {"role": "assistant", "content": "It comes tomorrow."}}]})
    .to_string()
}

async fn post(envoy: &Attached, path: &str, headers: &str, body: &str) -> Answer {
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}"
    );
    ask(envoy.listen, request.into_bytes(), None).await
}

fn chat(text: &str) -> String {
    json!({"model": "m", "messages": [{"role": "user", "content": text}]}).to_string()
}

const ODD: &str = "%%$#@! zzkq 0xdeadbeef ';--/* UNION SELECT vvqj xx || ~~ {{7*7}} ${jndi:ldap://x} %%$#@! zzkq 0xdeadbeef ';--/* UNION SELECT vvqj xx || ~~";

/// Starts one of the files in front of `upstream`, learning from 80 messages, and lets it learn.
async fn learned(path: &'static str, upstream: &Provider) -> Attached {
    let mut edits = free_ports();
    edits.extend(learns_soon());
    edits.push(("address: 127.0.0.1, port_value: 8000", upstream.socket_address()));
    let envoy = Attached::start(&[(path, edited(&file(path), &edits))]);
    for number in 0..82 {
        let usual = format!("Where is my order {} now?", 1000 + number % 5 * 37);
        let answer = post(&envoy, "/v1/chat/completions", "", &chat(&usual)).await;
        assert_eq!(answer.status, Some(200), "{path}: {answer:?}");
    }
    envoy
}

/// A verdict out of a line of the access log.
fn verdict(line: &Value, of: &str) -> Value {
    let text = line["driftlock"][of].as_str().unwrap_or_else(|| panic!("no {of} in {line}"));
    serde_json::from_str(text).expect("a verdict is JSON")
}

fn folder(path: &str) -> Vec<String> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(workspace().join(path)).expect("a folder") {
        let name = format!("{path}/{}", entry.expect("an entry").file_name().to_string_lossy());
        if workspace().join(&name).is_dir() {
            files.extend(folder(&name));
        } else if name.ends_with(".yaml") {
            files.push(name);
        }
    }
    files.sort();
    files
}

#[test]
fn every_file_is_valid_and_none_is_left_out() {
    let mut known: Vec<&str> = FILES.concat();
    known.sort_unstable();
    assert_eq!(folder("envoy"), known, "a file that no test starts");
    for files in FILES {
        let texts: Vec<_> = files.iter().map(|path| (*path, file(path))).collect();
        validate(&texts);
        for (path, text) in texts {
            let report = check(&text, Path::new(path));
            assert!(report.findings.is_empty(), "{path}: {:?}", report.findings);
        }
    }
}

#[test]
fn what_config_check_finds_in_these_files_when_they_are_broken() {
    let broken = file("envoy/shadow.yaml").replace("\"mode\"", "\"mood\"");
    let finding = check(&broken, Path::new("f")).findings.remove(0).to_string();
    let line = broken.lines().position(|line| line.contains("mood")).unwrap() + 1;
    assert!(finding.starts_with(&format!("{line}:")) && finding.contains("actions[0].mood"), "{finding}");
    let broken =
        file("envoy/fail-closed.yaml").replace("allow_on_headers_stop_iteration: true", "root_id: d");
    let finding = check(&broken, Path::new("f")).findings.remove(0).to_string();
    assert!(finding.contains("allow_on_headers_stop_iteration"), "{finding}");
}

#[test]
fn the_examples_files_are_usable_and_broken_ones_refused_at_their_line() {
    let path = "examples/llm-gateway/envoy.yaml";
    validate(&[(path, file(path))]);
    for path in [path, "examples/llm-gateway/gateway.yaml", "examples/llm-gateway/plugin.json"] {
        let report = check(&file(path), &workspace().join(path));
        assert!(report.findings.is_empty() && !report.checked.is_empty(), "{path}: {report:?}");
    }
    for (old, new, place, says) in [
        ("alpha: 0.002", "alpha: 2", "filters[0].configuration.alpha", "not between"),
        ("upstream: openai", "upstream: nobody", "routes[0].upstream", "nobody"),
        ("timeout: 300s", "timeout: 300", "upstreams.local.timeout", "300"),
    ] {
        let broken = file("examples/llm-gateway/gateway.yaml").replace(old, new);
        // Beside the original, whose relative paths it has.
        let folder = workspace().join("examples/llm-gateway");
        let copy = tempfile::Builder::new().suffix(".yaml").tempfile_in(folder).unwrap();
        std::fs::write(copy.path(), &broken).unwrap();
        let finding = check(&broken, copy.path()).findings.remove(0).to_string();
        let line = broken.lines().position(|line| line.contains(new)).unwrap() + 1;
        assert!(finding.starts_with(&format!("{line}:")), "{finding}");
        assert!(finding.contains(place) && finding.contains(says), "{finding}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_minimal_file_logs_verdicts() {
    let upstream = Provider::plain(answer);
    let envoy = learned("envoy/minimal.yaml", &upstream).await;
    let flagged = post(&envoy, "/v1/chat/completions", "", &chat(ODD)).await;
    assert_eq!(flagged.status, Some(200), "it reports and touches nothing");
    assert!(flagged.all("x-driftlock-request")[0].contains("anomalous"), "{flagged:?}");
    let line = envoy.logged(|line| line["driftlock"]["outcome"] == "anomalous");
    assert_eq!(verdict(&line, "request")["outcome"], "anomalous", "{line}");
    let metrics = envoy.ask_admin("/stats/prometheus");
    assert!(metrics.contains("driftlock_messages_request_anomalous{} 1"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gateway_file_takes_each_provider_to_its_host_over_tls() {
    let scratch = tempfile::tempdir().unwrap();
    let authority = scratch.path().join("authority.pem");
    let hosts = PROVIDERS.map(|(_, host, ..)| host);
    let upstream = Provider::tls(&hosts, &authority, answer);
    let addresses = hosts.map(|host| format!("address: {host}, port_value: 443"));
    let mut edits = free_ports();
    edits.push(("/etc/ssl/certs/ca-certificates.crt", authority.display().to_string()));
    edits.extend(addresses.iter().map(|address| (address.as_str(), upstream.socket_address())));
    let path = "envoy/llm-gateway.yaml";
    let envoy = Attached::start(&[(path, edited(&file(path), &edits))]);

    for (number, (route, host, path, body, style)) in PROVIDERS.into_iter().enumerate() {
        let id = format!("x-request-id: request-{number}\r\n");
        let through = post(&envoy, &format!("/{route}{path}"), &id, body).await;
        assert_eq!(through.status, Some(200), "{route}: {through:?}");
        let seen = upstream.seen().pop().expect("the provider was asked");
        assert_eq!((seen.path.as_str(), seen.body.as_str()), (path, body), "{route}");
        assert_eq!(seen.server_name.as_deref(), Some(host), "{route}");
        assert_eq!(seen.headers["host"], host, "{route}");
        let line = envoy.logged(|line| line["route"] == route);
        assert_eq!(verdict(&line, "request")["stream"], format!("llm/request/{style}"), "{route}");
    }

    let health = ask(envoy.listen, b"GET /healthz HTTP/1.1\r\nhost: h\r\n\r\n".to_vec(), None).await;
    assert_eq!((health.status, health.text().as_str()), (Some(200), "ok\n"));
    let line = envoy.logged(|line| line["route"] == "health");
    assert_eq!(line["driftlock"]["outcome"], Value::Null, "the filter is off on that route");
    let models = "GET /openai/v1/models HTTP/1.1\r\nhost: h\r\n\r\n";
    assert_eq!(ask(envoy.listen, models.into(), None).await.status, Some(200));
    let line = envoy.logged(|line| line["path"] == "/openai/v1/models");
    assert_eq!(verdict(&line, "response")["reason"], "disabled", "{line}");

    let metrics = envoy.ask_admin("/stats/prometheus");
    let sample = r#"driftlock_messages{direction="request",outcome="warming_up"} 6"#;
    assert!(metrics.contains(sample), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_with_another_certificate_is_not_spoken_to() {
    let scratch = tempfile::tempdir().unwrap();
    let authority = scratch.path().join("authority.pem");
    let upstream = Provider::tls(&["another.test"], &authority, answer);
    let mut edits = free_ports();
    edits.push(("/etc/ssl/certs/ca-certificates.crt", authority.display().to_string()));
    edits.push(("address: api.openai.com, port_value: 443", upstream.socket_address()));
    let path = "envoy/llm-gateway.yaml";
    let envoy = Attached::start(&[(path, edited(&file(path), &edits))]);
    let refused = post(&envoy, "/openai/v1/chat/completions", "", &chat("Where is my order?")).await;
    assert_eq!(refused.status, Some(503), "{refused:?}");
    assert!(upstream.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shadow_file_counts_and_touches_nothing() {
    let upstream = Provider::plain(answer);
    let envoy = learned("envoy/shadow.yaml", &upstream).await;
    let odd = chat(&format!("{ODD} joe@example.com"));
    let passed = post(&envoy, "/v1/chat/completions", "", &odd).await;
    assert_eq!(passed.status, Some(200), "{passed:?}");
    assert_eq!(upstream.seen().pop().unwrap().body, odd, "nothing is redacted");
    assert!(passed.all("x-driftlock-request").is_empty(), "nothing is told");
    let line = envoy.logged(|line| line["driftlock"]["outcome"] == "anomalous");
    let action = line["driftlock"]["action"].as_str().expect("an action");
    assert!(action.contains("request=shadow_"), "{line}");
    let metrics = envoy.ask_admin("/stats/prometheus");
    for counted in ["driftlock_shadow_blocked", "driftlock_shadow_redacted"] {
        let sample = format!("{counted}{{direction=\"request\"}} 1");
        assert!(metrics.contains(&sample), "{sample}\n{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fail_closed_file_refuses_what_it_cannot_vouch_for() {
    let upstream = Provider::plain(answer);
    let envoy = learned("envoy/fail-closed.yaml", &upstream).await;
    let before = upstream.seen().len();
    let blocked = post(&envoy, "/v1/chat/completions", "", &chat(ODD)).await;
    assert_eq!(blocked.status, Some(403), "{blocked:?}");
    assert!(blocked.text().contains("Driftlock"), "in the API's own words: {}", blocked.text());
    let unreadable = post(&envoy, "/v1/chat/completions", "content-encoding: snappy\r\n", "??").await;
    assert!(unreadable.status.is_some_and(|status| (400..600).contains(&status)), "{unreadable:?}");
    assert_eq!(upstream.seen().len(), before, "neither reached the upstream");
    let usual = post(&envoy, "/v1/chat/completions", "", &chat("Where is my order 1037 now?")).await;
    assert_eq!(usual.status, Some(200), "{usual:?}");
    let metrics = envoy.ask_admin("/stats/prometheus");
    assert!(metrics.contains(r#"driftlock_blocked{direction="request"} 1"#), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_xds_files_join_to_a_running_envoy() {
    let upstream = Provider::plain(answer);
    let service = Provider::plain(|_| "{}".to_owned());
    let edits = |path: &str| -> Vec<(&'static str, String)> {
        match path.rsplit('/').next().unwrap() {
            "bootstrap.yaml" => vec![("port_value: 9901", "port_value: 0".to_owned())],
            "listener.yaml" => vec![("port_value: 10000", "port_value: 0".to_owned())],
            "clusters.yaml" => vec![
                ("address: 127.0.0.1, port_value: 8000", upstream.socket_address()),
                ("address: 127.0.0.1, port_value: 8470", service.socket_address()),
            ],
            _ => Vec::new(),
        }
    };
    let files: Vec<_> = FILES[4].iter().map(|path| (*path, edited(&file(path), &edits(path)))).collect();
    let envoy = Attached::start(&files);
    let through = post(&envoy, "/v1/chat/completions", "", &chat("Where is my order?")).await;
    assert_eq!(through.status, Some(200), "{through:?}");
    let line = envoy.logged(|line| line["driftlock"]["request"].is_string());
    assert_eq!(verdict(&line, "request")["stream"], "llm/request/openai.chat");
    let asked = || service.seen().iter().any(|seen| seen.path.starts_with("/v1/snapshots"));
    for _ in 0..100 {
        if asked() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(asked(), "the filter did not ask for a baseline: {:?}", service.seen());
}
