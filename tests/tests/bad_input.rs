//! Bad input, from clients, upstreams and operators, by every path: a reason, never `normal`, and traffic
//! that flows unchanged or is refused as the operator chose.
//!
//! Each defect is put into an exchange that is normal without it, once into its request, once into its
//! response. The native inspection says what to expect; the module on wasmtime, the gateway and a real
//! Envoy have to write the same verdicts and count the same, and the two proxies have to do with the bytes
//! what the policy says.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use driftlock_host::abi::{LogLevel, LogSink, Plugin, PluginOptions};
use driftlock_host::capture::{self, HttpRequest, HttpResponse};
use driftlock_host::gateway::{FilterSource, Gateway, GatewayOptions};
use driftlock_host::replay::upstream::{Delivery, Split};
use driftlock_inspect::session;
use driftlock_tests::drive::{Native, Passage, Seen, Vm};
use driftlock_tests::proxy::{Observed, Proxy, start_envoy};
use driftlock_tests::{filter, module, traffic, trained};
use serde_json::{Value, json};

const MAX_BODY_BYTES: usize = 32 << 10;

fn configuration(policy: &str) -> Vec<u8> {
    trained(json!({"uninspectable": policy, "limits": {"max_body_bytes": MAX_BODY_BYTES}}))
}

fn verdict(json: &Option<String>) -> Value {
    serde_json::from_str(json.as_deref().expect("a verdict")).expect("JSON")
}

/// A chat completion, answered in one piece or streamed, that is normal both ways.
fn good(streamed: bool) -> Passage {
    let mut native = Native::start(&configuration("pass"));
    let mut passages = traffic(31, 60, 0).into_iter().map(|exchange| Passage::of(&exchange));
    let chosen = passages.find(|passage| {
        let kind = capture::header(&passage.response.headers, "content-type").unwrap_or_default();
        passage.request.target == "/v1/chat/completions"
            && kind.starts_with("text/event-stream") == streamed
            && passage.response.body.len() > 1000
            && native.pass(passage).outcome.as_deref() == Some("normal")
    });
    chosen.expect("normal traffic is generated")
}

/// Either message, for a defect to be put into.
struct Message<'a> {
    target: Option<&'a mut String>,
    headers: &'a mut Vec<(String, String)>,
    body: &'a mut Vec<u8>,
}

impl Message<'_> {
    fn set(&mut self, name: &str, value: &str) {
        self.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
        self.headers.push((name.to_owned(), value.to_owned()));
    }

    /// Another path than that of chat completions, which are read as JSON whatever they claim to be.
    fn elsewhere(&mut self) {
        if let Some(target) = &mut self.target {
            "/upload".clone_into(target);
        }
    }
}

struct Defect {
    name: &'static str,
    put: fn(Message<'_>),
    reason: &'static str,
    /// What a refused request is answered with.
    status: u16,
    /// Known before the first byte of the body.
    at_headers: bool,
    counter: &'static str,
}

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x01\0\0\0\x01\0\x08\x06\0\0\0";

fn defects() -> Vec<Defect> {
    let defect = |name, reason, status, at_headers, counter, put| Defect {
        name,
        put,
        reason,
        status,
        at_headers,
        counter,
    };
    vec![
        defect("truncated JSON", "json_truncated", 400, false, "malformed", |message| {
            message.body.truncate(message.body.len() / 2);
        }),
        defect("invalid UTF-8", "invalid_utf8", 400, false, "malformed", |message| {
            message.body.splice(..1, *b"{\"note\":\"\xff\xfe\",");
        }),
        defect("a body over the limit", "size", 413, false, "size", |message| {
            let long = format!("{{\"note\":\"{}\",", "as before, ".repeat(MAX_BODY_BYTES / 10));
            message.body.splice(..1, long.into_bytes());
        }),
        defect("binary labelled JSON", "json_malformed", 400, false, "malformed", |mut message| {
            message.elsewhere();
            message.set("content-type", "application/json");
            *message.body = b"\x01\x02\x03\x04".repeat(100);
        }),
        defect("an image labelled JSON", "json_malformed", 400, false, "malformed", |mut message| {
            message.elsewhere();
            message.set("content-type", "application/json");
            *message.body = PNG.repeat(10);
        }),
        defect("a coding that is not decoded", "encoding:compress", 415, true, "encoding", |mut message| {
            message.set("content-encoding", "compress");
        }),
        defect("plain text labelled br", "encoding_malformed", 400, false, "encoding", |mut message| {
            message.set("content-encoding", "br");
        }),
        defect("half a gzip file", "encoding_truncated", 400, false, "encoding", |mut message| {
            message.set("content-encoding", "gzip");
            let whole = gzip(message.body);
            *message.body = whole[..whole.len() / 2].to_vec();
        }),
        defect("a decompression bomb", "size", 413, false, "size", |mut message| {
            message.set("content-encoding", "gzip");
            // Blanks are valid JSON before a document.
            message.body.splice(..0, vec![b' '; 16 << 20]);
            *message.body = gzip(message.body);
        }),
        defect("an image", "content_type_binary", 415, true, "content_type", |mut message| {
            message.elsewhere();
            message.set("content-type", "image/png");
            *message.body = PNG.repeat(10);
        }),
    ]
}

fn gzip(body: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(body).unwrap();
    gzip.finish().unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Side {
    Request,
    Response,
}

/// Every defect on either side.
fn cases() -> Vec<(Defect, Side, Passage)> {
    let mut cases = Vec::new();
    for side in [Side::Request, Side::Response] {
        for defect in defects() {
            let mut passage = good(false);
            let Passage { request, response, .. } = &mut passage;
            (defect.put)(match side {
                Side::Request => {
                    let HttpRequest { target, headers, body, .. } = request;
                    Message { target: Some(target), headers, body }
                }
                Side::Response => {
                    let HttpResponse { headers, body, .. } = response;
                    Message { target: None, headers, body }
                }
            });
            cases.push((defect, side, passage));
        }
    }
    cases
}

async fn proxies(configuration: &[u8]) -> [Proxy; 2] {
    [Proxy::envoy(configuration).await, Proxy::gateway(configuration).await]
}

/// A whole, normal exchange passes and is normal: what a proxy must do after the worst.
async fn assert_flows(proxy: &Proxy) {
    for streamed in [false, true] {
        let Passage { request, response, .. } = good(streamed);
        let observed = proxy.pass(&request, &response, Delivery::recorded(&response), None).await;
        assert_unchanged(proxy.name(), &request, &response, &observed);
        assert_eq!(observed.outcome.as_deref(), Some("normal"), "{}: {observed:?}", proxy.name());
    }
}

fn assert_unchanged(what: &str, request: &HttpRequest, response: &HttpResponse, observed: &Observed) {
    let Observed { answer, received, .. } = observed;
    assert_eq!(answer.status, Some(response.status), "{what}");
    assert!(answer.complete && answer.body == response.body, "{what}: the answer was changed");
    let received = received.as_ref().unwrap_or_else(|| panic!("{what}: the upstream got no request"));
    assert!(received.body == request.body, "{what}: the request was changed");
}

/// The defective message's verdict says why, and is not `normal`.
fn assert_reason(defect: &Defect, side: Side, seen: &Seen) {
    let verdict = verdict(if side == Side::Request { &seen.request } else { &seen.response });
    assert_eq!(verdict["reason"], defect.reason, "{}: {verdict}", defect.name);
    let outcome = verdict["outcome"].as_str().unwrap();
    assert!(["not_inspected", "anomalous"].contains(&outcome), "{}: {verdict}", defect.name);
    let counter = format!("driftlock.not_inspected.{}", defect.counter);
    assert!(seen.counted.contains_key(&counter), "{}: {:?}", defect.name, seen.counted);
    let counter = format!(
        "driftlock.messages.{}.{outcome}",
        if side == Side::Request { "request" } else { "response" }
    );
    assert!(seen.counted.contains_key(&counter), "{}: {:?}", defect.name, seen.counted);
}

fn add(total: &mut BTreeMap<String, u64>, counted: &BTreeMap<String, u64>) {
    for (name, by) in counted {
        *total.entry(name.clone()).or_default() += by;
    }
}

async fn assert_counted(proxy: &Proxy, expected: &BTreeMap<String, u64>) {
    let mut counters = proxy.counters().await;
    counters.retain(|_, value| *value > 0);
    assert_eq!(&counters, expected, "{}", proxy.name());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_inspected_passes_unchanged() {
    let configuration = configuration("pass");
    let (mut native, mut vm) = (Native::start(&configuration), Vm::start(&configuration));
    let proxies = proxies(&configuration).await;
    let mut counted = BTreeMap::new();
    for (defect, side, passage) in cases() {
        let seen = native.pass(&passage);
        assert_eq!(seen, vm.pass(&passage), "{}", defect.name);
        assert_reason(&defect, side, &seen);
        assert!(seen.request_passed && seen.response_passed && seen.reply.is_none());
        add(&mut counted, &seen.counted);
        for proxy in &proxies {
            let what = format!("{}: {} in the {side:?}", proxy.name(), defect.name);
            let observed = proxy.pass(&passage.request, &passage.response, Delivery::default(), None).await;
            assert_unchanged(&what, &passage.request, &passage.response, &observed);
            assert_eq!(observed.request, seen.request, "{what}");
            assert_eq!(observed.response, seen.response, "{what}");
            assert_eq!(observed.outcome, seen.outcome, "{what}");
            let told = observed.answer.all("x-driftlock-request");
            let outcome = verdict(&seen.request)["outcome"].as_str().unwrap().to_owned();
            assert!(told.len() == 1 && told[0].starts_with(&outcome), "{what}: {told:?}");
        }
    }
    for proxy in &proxies {
        assert_counted(proxy, &counted).await;
        assert_flows(proxy).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_inspected_is_refused_where_the_operator_chose_that() {
    let configuration = configuration("refuse");
    let (mut native, mut vm) = (Native::start(&configuration), Vm::start(&configuration));
    let proxies = proxies(&configuration).await;
    let mut counted = BTreeMap::new();
    for (defect, side, passage) in cases() {
        let seen = native.pass(&passage);
        assert_eq!(seen, vm.pass(&passage), "{}", defect.name);
        assert_reason(&defect, side, &seen);
        assert_eq!(seen.request_passed, side == Side::Response);
        assert!(!seen.response_passed);
        // Past the headers a reply becomes a reset, which has no body.
        let reset = side == Side::Response && !defect.at_headers;
        assert_eq!(seen.reply.is_none(), reset, "{}", defect.name);
        add(&mut counted, &seen.counted);
        for proxy in &proxies {
            let what = format!("{}: {} in the {side:?}", proxy.name(), defect.name);
            let observed = proxy.pass(&passage.request, &passage.response, Delivery::default(), None).await;
            assert_eq!(observed.request, seen.request, "{what}");
            assert_eq!(observed.response, seen.response, "{what}");
            assert_eq!(observed.outcome, seen.outcome, "{what}");
            let answer = &observed.answer;
            assert_eq!(observed.received.is_some(), side == Side::Response, "{what}: what the upstream got");
            if reset {
                assert!(!answer.complete, "{what}: the client must see that it is not whole: {answer:?}");
                continue;
            }
            let status = if side == Side::Request { defect.status } else { 502 };
            assert_eq!((answer.status, answer.complete), (Some(status), true), "{what}: {answer:?}");
            let problem = answer.all("content-type") == ["application/problem+json"];
            assert!(problem || answer.all("content-type") == ["application/json"], "{what}");
            // Envoy answers a refused response without asking the filter again.
            let told = answer.all("x-driftlock-request").len();
            assert!(told == 1 || told == 0 && side == Side::Response, "{what}: {answer:?}");
            let body: Value = serde_json::from_slice(&answer.body).expect("the refusal is JSON");
            // The API's own error, or a problem (RFC 9457) where the path is no API's.
            let [code, kind, message] = if problem {
                ["code", "reason", "detail"].map(|key| &body[key])
            } else {
                ["code", "type", "message"].map(|key| &body["error"][key])
            };
            assert_eq!((code, kind), (&json!(defect.reason), &json!("driftlock_refused")), "{what}");
            let which = if side == Side::Request { "request" } else { "response" };
            let message = message.as_str().unwrap();
            assert!(message.contains(which) && message.contains(defect.reason), "{what}: {message}");
        }
    }
    for proxy in &proxies {
        assert_counted(proxy, &counted).await;
        assert_flows(proxy).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn json_labelled_as_text_is_read_as_what_it_is_or_as_text_but_read() {
    let configuration = configuration("pass");
    let (mut native, mut vm) = (Native::start(&configuration), Vm::start(&configuration));
    let proxies = proxies(&configuration).await;
    let labelled = native.pass(&good(false));
    let mut passage = good(false);
    let relabel = |headers: &mut Vec<(String, String)>| {
        headers.retain(|(name, _)| name != "content-type");
        headers.push(("content-type".to_owned(), "text/plain".to_owned()));
    };
    relabel(&mut passage.request.headers);
    let chat = native.pass(&passage);
    assert_eq!(chat.request, labelled.request, "servers read chat completions as JSON whatever the label");
    "/other".clone_into(&mut passage.request.target);
    relabel(&mut passage.response.headers);
    let other = native.pass(&passage);
    for (side, json) in [("request", &other.request), ("response", &other.response)] {
        let verdict = verdict(json);
        assert_eq!(verdict["stream"], format!("default/{side}/text"));
        assert_eq!(verdict["reason"], "no_baseline", "no text was learned, so none is normal");
        assert_eq!(verdict["outcome"], "not_inspected");
    }
    assert_eq!(other, vm.pass(&passage));
    for proxy in &proxies {
        let observed = proxy.pass(&passage.request, &passage.response, Delivery::default(), None).await;
        assert_unchanged(proxy.name(), &passage.request, &passage.response, &observed);
        assert_eq!((observed.request, observed.response), (other.request.clone(), other.response.clone()));
        assert_eq!(proxy.counters().await["driftlock.not_inspected.no_baseline"], 2);
    }
}

/// Fail closed means judged or refused: a stream that was never learned is no way past it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_a_baseline_is_refused_where_the_operator_chose_that() {
    let configuration = configuration("refuse");
    let (mut native, mut vm) = (Native::start(&configuration), Vm::start(&configuration));
    let mut passage = good(false);
    "/other".clone_into(&mut passage.request.target);
    let seen = native.pass(&passage);
    assert_eq!(seen, vm.pass(&passage));
    assert_eq!(verdict(&seen.request)["reason"], "no_baseline");
    let (status, _) = seen.reply.clone().expect("refused");
    for proxy in proxies(&configuration).await {
        let observed = proxy.pass(&passage.request, &passage.response, Delivery::default(), None).await;
        assert_eq!(
            (observed.answer.status, observed.answer.complete),
            (Some(status), true),
            "{}",
            proxy.name()
        );
        assert!(
            observed.received.is_none() && observed.answer.text().contains("no_baseline"),
            "{}",
            proxy.name()
        );
        assert_eq!(observed.request, seen.request);
        assert_flows(&proxy).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_dies_in_mid_answer_leaves_an_aborted_answer_and_a_verdict() {
    for policy in ["pass", "refuse"] {
        let configuration = configuration(policy);
        let (mut native, mut vm) = (Native::start(&configuration), Vm::start(&configuration));
        let proxies = proxies(&configuration).await;
        let mut counted = BTreeMap::new();
        for (streamed, chunked) in [(false, false), (false, true), (true, true)] {
            let mut passage = good(streamed);
            let sent = passage.response.body.len() / 2;
            passage.response_cut_bytes = Some(sent);
            let seen = native.pass(&passage);
            assert_eq!(seen, vm.pass(&passage));
            let expected = verdict(&seen.response);
            assert_eq!(expected["reason"], "cut_short");
            assert_ne!(expected["outcome"], "normal");
            assert_eq!(verdict(&seen.request)["outcome"], "normal", "the request was whole");
            add(&mut counted, &seen.counted);
            for proxy in &proxies {
                let what = format!("{}: {policy}, streamed {streamed}, chunked {chunked}", proxy.name());
                let delivery = Delivery {
                    split: Split::Every(300),
                    chunked,
                    die_after_bytes: Some(sent),
                    ..Delivery::default()
                };
                let observed = proxy.pass(&passage.request, &passage.response, delivery, None).await;
                assert!(!observed.answer.complete, "{what}: {:?}", observed.answer);
                assert!(passage.response.body.starts_with(&observed.answer.body), "{what}");
                assert_eq!(observed.response, seen.response, "{what}");
                assert_eq!(observed.request, seen.request, "{what}");
            }
        }
        assert_eq!(counted["driftlock.not_inspected.cut_short"], 3);
        for proxy in &proxies {
            assert_counted(proxy, &counted).await;
            assert_flows(proxy).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_in_the_middle_leaves_a_verdict() {
    for policy in ["pass", "refuse"] {
        for proxy in proxies(&configuration(policy)).await {
            let what = format!("{} with {policy}", proxy.name());
            for streamed in [false, true] {
                let Passage { request, response, .. } = good(streamed);
                let delivery = Delivery {
                    split: Split::Every(100),
                    chunked: true,
                    pause: Duration::from_millis(25),
                    ..Delivery::default()
                };
                let observed = proxy.pass(&request, &response, delivery, Some(250)).await;
                assert!(!observed.answer.complete && observed.answer.body.len() < 1000, "{what}");
                let verdict = verdict(&observed.response);
                assert_eq!(verdict["reason"], "cut_short", "{what}: {verdict}");
                assert_ne!(verdict["outcome"], "normal", "{what}: {verdict}");
                assert!(
                    observed.request.is_some_and(|json| json.contains(r#""outcome":"normal""#)),
                    "{what}"
                );
            }
            // In the middle of its own request.
            let Passage { request, response, .. } = good(false);
            let observed = proxy.abandon(&request, &response, request.body.len() / 2).await;
            let verdict = verdict(&observed.request);
            assert_eq!(verdict["reason"], "cut_short", "{what}: {verdict}");
            assert_ne!(verdict["outcome"], "normal", "{what}: {verdict}");
            assert!(observed.received.is_none(), "{what}: the upstream got a whole request");
            assert_eq!(proxy.counters().await["driftlock.not_inspected.cut_short"], 3, "{what}");
            assert_flows(&proxy).await;
        }
    }
}

/// A held request over the proxy's own buffer never reaches the filter's end of message.
#[tokio::test(flavor = "multi_thread")]
async fn a_held_request_over_the_proxys_own_limit_is_refused_and_not_normal() {
    let configuration = trained(json!({"uninspectable": "refuse"}));
    for proxy in proxies(&configuration).await {
        let Passage { mut request, response, .. } = good(false);
        let long = format!("{{\"note\":\"{}\",", "as before, ".repeat(500_000));
        request.body.splice(..1, long.into_bytes());
        let observed = proxy.pass(&request, &response, Delivery::default(), None).await;
        assert_eq!(observed.answer.status, Some(413), "{}", proxy.name());
        assert!(observed.received.is_none(), "{}", proxy.name());
        let verdict = verdict(&observed.request);
        assert_eq!(verdict["reason"], "cut_short", "{}", proxy.name());
        assert_ne!(verdict["outcome"], "normal", "{}", proxy.name());
        assert_flows(&proxy).await;
    }
}

/// By every path the operator is told which field, and nothing starts.
#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_cannot_be_right_is_refused_by_name() {
    let mut damaged = driftlock_tests::baseline().encode();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    let mut newer = driftlock_tests::baseline().encode();
    newer[8] = 200;
    let cut = driftlock_tests::baseline().encode()[..1000].to_vec();
    let with =
        |bytes: &[u8]| json!({"alpha": 0.01, "learn": null, "baseline": STANDARD.encode(bytes)}).to_string();
    let cases = [
        (r#"{"alhpa": 0.01}"#.to_owned(), ["alhpa", "unknown field"]),
        (r#"{"limits": {"max_body_byte": 5000}}"#.to_owned(), ["limits.max_body_byte", "unknown field"]),
        (r#"{"uninspectable": "block"}"#.to_owned(), ["uninspectable", "block"]),
        (r#"{"alpha": 0.01"#.to_owned(), ["plugin configuration", "EOF"]),
        (with(&damaged), ["at baseline", "damaged"]),
        (with(&newer), ["at baseline", "version"]),
        (with(&cut), ["at baseline", ""]),
    ];
    for (configuration, words) in cases {
        let assert_says = |what: &str, message: &str| {
            for word in words {
                assert!(message.contains(word), "{what}: {word:?} is not in: {message}");
            }
        };
        let native = session::Plugin::configure(configuration.as_bytes()).unwrap_err();
        assert_says("native", &native.to_string());

        let (log, lines) = LogSink::capture(LogLevel::Error);
        let options = PluginOptions {
            plugin_configuration: configuration.clone().into_bytes(),
            log,
            ..PluginOptions::default()
        };
        assert!(Plugin::start(module(), options).is_err());
        let logged: Vec<String> = lines.lock().unwrap().iter().map(|line| line.message.clone()).collect();
        assert_says("wasmtime", &logged.join("\n"));

        let uri = "http://127.0.0.1:1".parse().unwrap();
        let mut options = GatewayOptions::new(uri, FilterSource::WasmFile(filter()));
        options.plugin_configuration = configuration.clone().into_bytes();
        let error = Gateway::start(options).await.err().expect("the gateway refuses");
        assert_says("gateway", &error.to_string());

        let nowhere = "127.0.0.1:1".parse().unwrap();
        let error = start_envoy(configuration.as_bytes(), nowhere).await.expect_err("Envoy refuses");
        assert_says("envoy", &error.to_string());
    }
}
