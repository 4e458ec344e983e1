//! What the generated traffic promises: the same bytes, valid documents, spans that point at the
//! attack, and variety.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::*;

fn small() -> SynthOptions {
    SynthOptions { seed: 7, count: 300, anomalies: 100, ..SynthOptions::default() }
}

fn sha256_hex(exchanges: &[LabelledExchange]) -> String {
    let mut bytes = Vec::new();
    write_jsonl(&mut bytes, exchanges).unwrap();
    Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(bytes)))
}

fn content_type(headers: &[(String, String)]) -> &str {
    crate::capture::header(headers, "content-type").unwrap_or("")
}

fn is_chat(exchange: &Exchange) -> bool {
    exchange.request.target == "/v1/chat/completions"
}

fn is_streamed(exchange: &Exchange) -> bool {
    content_type(&exchange.response.as_ref().unwrap().headers).starts_with("text/event-stream")
}

/// The data of every event, checked against the event-stream form that is used here.
fn events(body: &[u8]) -> Vec<String> {
    let text = std::str::from_utf8(body).unwrap();
    let text = text.strip_suffix("\n\n").expect("the last event is closed");
    text.split("\n\n").map(|event| event.strip_prefix("data: ").expect("a data line").to_owned()).collect()
}

/// The assistant's text of an answer, whole or streamed.
fn answer_text(exchange: &Exchange) -> String {
    let response = exchange.response.as_ref().unwrap();
    if !is_streamed(exchange) {
        return json(&response.body)["choices"][0]["message"]["content"].as_str().unwrap_or("").to_owned();
    }
    let data = events(&response.body);
    data.iter()
        .filter(|d| *d != "[DONE]")
        .filter_map(|d| json(d.as_bytes())["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect()
}

fn user_texts(exchange: &Exchange) -> Vec<String> {
    let body = json(&exchange.request.body);
    let messages = body["messages"].as_array().unwrap().iter();
    messages.filter(|m| m["role"] == "user").map(|m| m["content"].as_str().unwrap().to_owned()).collect()
}

/// What a span points at.
fn pointed_at(labelled: &LabelledExchange, span: &Span) -> (String, String) {
    let unit = match (span.direction, span.unit.as_str()) {
        (Direction::Request, "user") => user_texts(&labelled.exchange)[span.index].clone(),
        (Direction::Request, "target") => {
            format!("{} {}", labelled.exchange.request.method, labelled.exchange.request.target)
        }
        (Direction::Response, "assistant") => answer_text(&labelled.exchange),
        other => panic!("unexpected unit {other:?}"),
    };
    let outside = format!("{}{}", &unit[..span.start], &unit[span.end..]);
    (unit[span.start..span.end].to_owned(), outside)
}

#[test]
fn same_options_give_the_same_bytes_on_every_platform() {
    let run = generate(&small());
    assert_eq!(sha256_hex(&run), sha256_hex(&generate(&small())));
    assert_eq!(
        sha256_hex(&run),
        "68c8c360f95cd38683d11bf0405343b4dfb27d597d9e96a2f45986201dc948fd",
        "the generator's output changed: if that was meant, update this digest"
    );
    assert_ne!(sha256_hex(&run), sha256_hex(&generate(&SynthOptions { seed: 8, ..small() })));
}

#[test]
fn a_longer_run_extends_a_shorter_one() {
    let short = generate(&SynthOptions { count: 40, anomalies: 0, ..small() });
    let long = generate(&SynthOptions { count: 90, anomalies: 0, ..small() });
    assert_eq!(sha256_hex(&short), sha256_hex(&long[..40]));
    let rest = generate(&SynthOptions { skip: 40, count: 50, anomalies: 0, ..small() });
    assert_eq!(sha256_hex(&rest), sha256_hex(&long[40..]));
}

#[test]
fn every_body_and_every_event_is_valid() {
    for labelled in generate(&small()) {
        let Exchange { request, response, .. } = &labelled.exchange;
        let response = response.as_ref().unwrap();
        match content_type(&request.headers) {
            "" => assert!(request.body.is_empty()),
            "application/x-www-form-urlencoded" => {
                assert!(
                    request.body.iter().all(|b| b.is_ascii_graphic()),
                    "{:?}",
                    String::from_utf8_lossy(&request.body)
                );
            }
            kind if kind.starts_with("application/json") => {
                json(&request.body);
            }
            kind => panic!("unexpected content type {kind}"),
        }
        assert!(request.target.bytes().all(|b| b.is_ascii_graphic()), "{}", request.target);
        if is_streamed(&labelled.exchange) {
            let data = events(&response.body);
            assert_eq!(data.last().unwrap(), "[DONE]");
            let chunks: Vec<Value> = data[..data.len() - 1].iter().map(|d| json(d.as_bytes())).collect();
            assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
            assert!(
                chunks.iter().all(|c| c["id"] == chunks[0]["id"] && c["object"] == "chat.completion.chunk")
            );
            let finished = chunks.iter().filter(|c| c["choices"][0]["finish_reason"].is_string()).count();
            assert_eq!(finished, 1);
        } else {
            json(&response.body);
        }
    }
}

#[test]
fn tool_calls_are_answered_and_their_arguments_are_json() {
    let mut calls = 0;
    for labelled in generate(&small()).iter().filter(|l| is_chat(&l.exchange)) {
        let body = json(&labelled.exchange.request.body);
        let messages = body["messages"].as_array().unwrap();
        assert_eq!(messages[0]["role"], "system");
        for (i, message) in messages.iter().enumerate() {
            if let Some(call) = message["tool_calls"].get(0) {
                calls += 1;
                json(call["function"]["arguments"].as_str().unwrap().as_bytes());
                assert_eq!(messages[i + 1]["role"], "tool");
                assert_eq!(messages[i + 1]["tool_call_id"], call["id"]);
                json(messages[i + 1]["content"].as_str().unwrap().as_bytes());
            }
        }
    }
    assert!(calls > 40, "{calls} tool calls in 300 exchanges");
}

#[test]
fn spans_point_at_the_attack_and_at_nothing_else() {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for labelled in generate(&small()) {
        if labelled.label == "normal" {
            assert!(labelled.spans.is_empty());
            continue;
        }
        *seen.entry(labelled.label.clone()).or_default() += 1;
        assert_eq!(labelled.exchange.label, labelled.label);
        // A swapped model has a swapped envelope, too, and an answer that was cut off a stop reason.
        let two = matches!(labelled.label.as_str(), "model_swap" | "repetition");
        assert_eq!(labelled.spans.len(), 1 + usize::from(two));
        let (inside, outside) = pointed_at(&labelled, &labelled.spans[0]);
        match labelled.label.as_str() {
            "jailbreak" => {
                assert!(
                    inside.len() > 200 && inside.ends_with('.') && inside.starts_with(char::is_uppercase),
                    "{inside}"
                );
                assert!(outside.is_empty() || outside.ends_with("\n\n"), "{outside}");
                assert_eq!(labelled.spans[0].index + 1, user_texts(&labelled.exchange).len());
            }
            "exfiltration" => {
                assert!(inside.len() > 120, "{inside}");
                assert!(outside.ends_with("\n\n") && outside.len() < 80, "{outside}");
            }
            "repetition" => {
                let period =
                    (1..=200).find(|p| inside.bytes().zip(inside.bytes().skip(*p)).all(|(a, b)| a == b));
                assert!(period.is_some() && inside.len() > 600, "{inside}");
                assert!(outside.len() <= 90, "{outside}");
                let [_, envelope] = crate::explain::unit_texts(&labelled.exchange, &[])
                    .map(|units| units.into_iter().find(|unit| unit.unit.role.as_str() == "envelope"));
                let Span { start, end, .. } = labelled.spans[1];
                assert_eq!(envelope.unwrap().text[start..end], *b"length");
            }
            "model_swap" => {
                assert_eq!(outside, "");
                let response = &labelled.exchange.response.as_ref().unwrap().body;
                assert!(String::from_utf8_lossy(response).contains("\"id\":\"gen-"));
            }
            "sql_injection" => {
                let inside =
                    percent_encoding::percent_decode_str(&inside).decode_utf8().unwrap().to_uppercase();
                let tell = ["SELECT", " OR ", "DROP", "EXEC"];
                assert!(tell.iter().any(|t| inside.contains(t)), "{inside}");
                assert!(
                    outside.starts_with("GET /api/") && !outside.contains('\'') && !outside.contains('%'),
                    "{outside}"
                );
            }
            other => panic!("unknown family {other}"),
        }
    }
    assert_eq!(seen.len(), FAMILIES.len());
    assert!(seen.values().all(|n| *n == 20), "{seen:?}");
}

#[test]
fn anomalies_have_variants() {
    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for labelled in generate(&SynthOptions { count: 0, anomalies: 200, ..small() }) {
        let (inside, _) = pointed_at(&labelled, &labelled.spans[0]);
        texts.entry(labelled.label).or_default().insert(inside);
    }
    for (family, variants) in texts {
        assert!(variants.len() >= 20, "{family}: {} different in 40", variants.len());
    }
}

#[test]
fn shares_are_those_of_a_gateway() {
    let run = generate(&SynthOptions { count: 2_000, anomalies: 0, ..small() });
    let chats: Vec<_> = run.iter().filter(|l| is_chat(&l.exchange)).collect();
    let streamed = chats.iter().filter(|l| is_streamed(&l.exchange)).count() * 100 / chats.len();
    assert!((35..=45).contains(&streamed), "{streamed} % streamed");
    assert!((1_550..=1_730).contains(&chats.len()), "{} chats of 2000", chats.len());
    let applications: BTreeSet<&str> = chats.iter().map(|l| l.application.as_str()).collect();
    assert_eq!(applications.len(), 5);
    for application in applications {
        let prompts: BTreeSet<String> = chats
            .iter()
            .filter(|l| l.application == application)
            .map(|l| json(&l.exchange.request.body)["messages"][0]["content"].to_string())
            .collect();
        assert_eq!(prompts.len(), 1, "{application} has one system prompt");
    }
}

#[test]
fn user_messages_differ() {
    let run = generate(&SynthOptions { count: 3_000, anomalies: 0, ..small() });
    let messages: Vec<String> = run
        .iter()
        .filter(|l| is_chat(&l.exchange))
        .flat_map(|l| user_texts(&l.exchange))
        .take(2_000)
        .collect();
    assert_eq!(messages.len(), 2_000);
    let distinct: BTreeSet<&String> = messages.iter().collect();
    assert!(distinct.len() >= 1_900, "{} of 2000 distinct", distinct.len());
}

#[test]
fn no_slot_or_escape_is_left_in_the_text() {
    for labelled in generate(&SynthOptions { count: 1_500, anomalies: 100, ..small() }) {
        let mut bytes = Vec::new();
        write_jsonl(&mut bytes, std::slice::from_ref(&labelled)).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        for left in ["${", "@{", "⟦", "⟧", "\\\\e"] {
            assert!(!text.contains(left), "{left} in {text}");
        }
        if is_chat(&labelled.exchange) {
            let spoken = user_texts(&labelled.exchange).join("\n");
            assert!(
                !spoken.contains("  ") || labelled.application == "code-review",
                "double space: {spoken}"
            );
            assert!(!spoken.contains(" ."), "space before a full stop: {spoken}");
        }
    }
}

#[test]
fn rows_read_back_as_the_same_exchanges() {
    let run = generate(&SynthOptions { count: 60, anomalies: 10, ..small() });
    let dir = tempfile::tempdir().unwrap();
    for name in ["run.jsonl", "run.jsonl.gz"] {
        let path = dir.path().join(name);
        let args = Args {
            count: Some(60),
            anomalies: Some(10),
            seed: Some(7),
            out: Some(path.clone()),
            ..Args::default()
        };
        super::run(&args).unwrap();
        let read: Vec<_> = crate::capture::exchanges(&path).unwrap().map(Result::unwrap).collect();
        assert_eq!(read.len(), run.len());
        for (read, made) in read.iter().zip(&run) {
            assert_eq!(read.exchange, made.exchange);
            assert_eq!(read.unix_ns, Some(made.unix_s * 1_000_000_000));
        }
    }
}

#[test]
fn a_file_that_cannot_be_created_is_named() {
    let args = Args { count: Some(1), out: Some("/nonexistent-folder/x.jsonl".into()), ..Args::default() };
    let message = super::run(&args).unwrap_err().to_string();
    assert!(message.contains("/nonexistent-folder/x.jsonl") && message.contains("--out"), "{message}");
}

/// Exchanges with every parameter in use.
fn everything() -> Vec<LabelledExchange> {
    let mut options = SynthOptions { count: 1_500, anomalies: 120, ..SynthOptions::example() };
    options.drift[0].at = 400;
    (options.drift[1].at, options.drift[1].over) = (800, 700);
    generate(&options)
}

#[test]
fn parameters_change_only_what_they_concern() {
    let plain = generate(&SynthOptions { count: 200, ..small() });
    let tenants = generate(&SynthOptions { count: 200, tenants: 5, ..small() });
    let mut seen = BTreeSet::new();
    for (plain, with) in plain.iter().zip(tenants) {
        let mut with = with;
        let (name, _) = with.exchange.request.headers.pop().unwrap();
        assert_eq!(name, "x-tenant-id");
        seen.insert(with.tenant.unwrap());
        assert_eq!(with.exchange, plain.exchange);
    }
    assert_eq!(seen.len(), 5);
}

#[test]
fn every_style_drift_fault_and_family_is_there_and_reads_as_its_api() {
    let run = everything();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut paths: BTreeMap<String, usize> = BTreeMap::new();
    for labelled in &run {
        *counts.entry(labelled.label.clone()).or_default() += 1;
        let Exchange { request, response, .. } = &labelled.exchange;
        let response = response.as_ref().unwrap();
        let path = request.target.split(['?', ':']).next().unwrap().to_owned();
        if path.starts_with("/v1") && content_type(&request.headers).starts_with("application/json") {
            json(&request.body);
            *paths.entry(path).or_default() += 1;
        }
        if labelled.label.starts_with("fault_") {
            continue;
        }
        match content_type(&response.headers) {
            kind if kind.starts_with("text/event-stream") => {
                let text = String::from_utf8(response.body.clone()).unwrap();
                for data in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
                    assert!(data == "[DONE]" || serde_json::from_str::<Value>(data).is_ok(), "{data}");
                }
            }
            _ => {
                json(&response.body);
            }
        }
    }
    for family in ALL_FAMILIES {
        assert_eq!(counts[family], 15, "{family}");
    }
    for label in
        ["drift_model", "drift_topic", "fault_upstream_error", "fault_rate_limited", "fault_truncated"]
    {
        assert!(counts[label] > 3, "{label}: {counts:?}");
    }
    assert!(["/v1/chat/completions", "/v1/responses", "/v1/messages"].iter().all(|path| paths[*path] > 100));
    assert!(paths.keys().any(|path| path.starts_with("/v1beta/models/")), "{paths:?}");
    assert!(run.windows(2).all(|pair| pair[0].unix_s <= pair[1].unix_s + STEP_S));
}

#[test]
fn injected_orders_are_where_their_span_says_in_every_style() {
    let mut seen = 0;
    for labelled in everything().iter().filter(|l| l.label == "indirect_injection") {
        let span = &labelled.spans[0];
        let units = crate::explain::unit_texts(&labelled.exchange, &[]);
        let unit = units[0]
            .iter()
            .find(|unit| unit.unit.role.as_str() == span.unit && usize::from(unit.unit.index) == span.index);
        let unit = unit.unwrap_or_else(|| panic!("no {span:?} in {}", labelled.exchange.request.target));
        let inside = String::from_utf8_lossy(&unit.text[span.start..span.end.min(unit.text.len())]);
        let orders = ["collector@", "Call every tool", "password reset", "refund for account"];
        assert!(orders.iter().any(|order| inside.contains(order)), "{inside}");
        seen += 1;
    }
    assert_eq!(seen, 15);
}

#[test]
fn what_a_stream_says_again_is_injected_as_often() {
    let (mut repeated, mut reasons) = (0, BTreeSet::new());
    for labelled in everything() {
        if !matches!(labelled.label.as_str(), "exfiltration" | "repetition") {
            continue;
        }
        let [_, units] = crate::explain::unit_texts(&labelled.exchange, &[]);
        let inside = |span: &Span| {
            let of = |unit: &&crate::explain::UnitText| {
                unit.unit.role.as_str() == span.unit && usize::from(unit.unit.index) == span.index
            };
            let unit = units.iter().find(of).unwrap_or_else(|| panic!("no {span:?}"));
            String::from_utf8(unit.text[span.start..span.end].to_vec()).unwrap()
        };
        let answers = units.iter().filter(|unit| unit.unit.role.as_str() == "assistant").count();
        let (said, other): (Vec<&Span>, Vec<&Span>) =
            labelled.spans.iter().partition(|span| span.unit == "assistant");
        assert_eq!(said.len() % answers, 0, "{answers} {said:?}");
        for (span, first) in said.iter().zip(said.iter().take(said.len() / answers).cycle()) {
            assert_eq!(inside(span), inside(first));
        }
        repeated += usize::from(answers > 1);
        reasons.extend(other.into_iter().map(inside));
    }
    assert!(repeated > 1, "no answer is said again");
    let all =
        ["MAX_TOKENS", "incomplete", "length", "max_output_tokens", "max_tokens", "response.incomplete"];
    assert_eq!(reasons, all.map(str::to_owned).into());
}

#[test]
fn parameters_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("parameters.json");
    for (text, named) in [
        (r#"{"sede": 1}"#, "sede"),
        (r#"{"styles": {"cobol": 1}}"#, "cobol"),
        (r#"{"families": ["flood"], "anomalies": 1}"#, "flood"),
        (r#"{"drift": [{"kind": "model", "application": "nobody", "at": 1}]}"#, "nobody"),
    ] {
        std::fs::write(&path, text).unwrap();
        let args =
            Args { parameters: Some(path.clone()), out: Some(dir.path().join("x")), ..Args::default() };
        let error = super::run(&args).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let example = serde_json::to_string(&SynthOptions::example()).unwrap();
    assert_eq!(serde_json::from_str::<SynthOptions>(&example).unwrap(), SynthOptions::example());
}

#[test]
fn a_score_counts_hits_by_overlap_in_the_same_unit() {
    let dir = tempfile::tempdir().unwrap();
    let (traffic, verdicts) = (dir.path().join("t.jsonl"), dir.path().join("v.jsonl"));
    let row = |id: &str| {
        format!(
            r#"{{"id":"{id}","label":"attack","kind":"http_exchange","text":"","extra":{{"spans":[{{"direction":"request","unit":"user","index":1,"start":10,"end":20}}]}}}}"#
        )
    };
    let verdict = |id: &str, outcome: &str, unit: &str, index: u64, start: u64, end: u64| {
        format!(
            r#"{{"id":"{id}","request":{{"outcome":"{outcome}","unit":"{unit}","unit_index":{index},"spans":[{{"start":{start},"end":{end}}}]}}}}"#
        )
    };
    let cases = [
        verdict("1", "anomalous", "user", 1, 19, 30),
        verdict("2", "anomalous", "user", 1, 20, 30),
        verdict("3", "anomalous", "user", 0, 12, 15),
        verdict("4", "anomalous", "system", 1, 12, 15),
        verdict("5", "normal", "user", 1, 12, 15),
        r#"{"id":"6","response":{"outcome":"anomalous","unit":"user","unit_index":1,"spans":[]}}"#.to_owned(),
    ];
    let rows: Vec<String> = (1..=6).map(|id| row(&id.to_string())).collect();
    std::fs::write(&traffic, rows.join("\n")).unwrap();
    std::fs::write(&verdicts, cases.join("\n")).unwrap();
    let scores = score::score(&traffic, &verdicts).unwrap();
    assert_eq!(scores["attack"], score::Score { exchanges: 6, flagged: 5, with_span: 5, span_hits: 1 });
    std::fs::write(&verdicts, cases[1..].join("\n")).unwrap();
    assert!(score::score(&traffic, &verdicts).unwrap_err().to_string().contains("line 1"));
}
