//! Mixed exchanges of which most go wrong, while configurations are swapped: no lost byte, no stuck request.
//!
//! `DRIFTLOCK_FAULTS` says how many exchanges (600 where it is not set; 10,000 take some minutes). What each
//! client and the upstream may see is asserted exchange by exchange; at the end Envoy has no request left, and
//! there are as many verdicts as requests.

use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use driftlock_host::capture::{HttpRequest, HttpResponse};
use driftlock_host::envoy::{Envoy, EnvoyOptions};
use driftlock_host::replay::upstream::{Delivery, Split, Upstream};
use driftlock_host::replay::wire::REPLAY_ID_HEADER;
use driftlock_tests::proxy::encoded;
use driftlock_tests::wire::{Answer, abandon, ask, ask_http2};
use driftlock_tests::{envoy_binary, filter};
use serde_json::{Value, json};

const CLIENTS: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Nothing,
    OneByteChunks,
    MalformedEvents,
    UpstreamDies,
    ClientLeaves,
    RequestBreaksOff,
    BombAnswered,
    BombAsked,
    BrokenGzip,
    NoContent,
    Head,
}

const FAULTS: [Fault; 11] = [
    Fault::Nothing,
    Fault::OneByteChunks,
    Fault::MalformedEvents,
    Fault::UpstreamDies,
    Fault::ClientLeaves,
    Fault::RequestBreaksOff,
    Fault::BombAnswered,
    Fault::BombAsked,
    Fault::BrokenGzip,
    Fault::NoContent,
    Fault::Head,
];

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

/// 20 KB that unpack to 20 MB.
fn bomb() -> Vec<u8> {
    static BOMB: OnceLock<Vec<u8>> = OnceLock::new();
    BOMB.get_or_init(|| gzip(&vec![b' '; 20 << 20])).clone()
}

struct Case {
    fault: Fault,
    http2: bool,
    request: HttpRequest,
    response: HttpResponse,
    delivery: Delivery,
    leave_after_bytes: Option<usize>,
}

fn fields(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn case(number: usize) -> Case {
    let fault = FAULTS[number % FAULTS.len()];
    let odd = number / FAULTS.len();
    let http2 = fault == Fault::Head || odd % 2 == 1 && fault != Fault::RequestBreaksOff;
    let text = format!("Where is order {number}? It left the harbour on day {}. ", number % 31);
    let asked = json!({"model": "m", "messages": [{"role": "user", "content": text.repeat(1 + odd % 9)}]});
    let said = json!({"choices": [{"message": {"role": "assistant", "content": text.repeat(1 + odd % 7)}}]});
    let part = json!({"choices": [{"index": 0, "delta": {"content": text}}]});
    let stream = format!("data: {part}\n\ndata: {part}\n\ndata: [DONE]\n\n");
    let mut request = HttpRequest {
        method: "POST".to_owned(),
        target: "/v1/chat/completions".to_owned(),
        headers: fields(&[("content-type", "application/json")]),
        body: asked.to_string().into_bytes(),
    };
    let json_type = [("content-type", "application/json")];
    let event_type = [("content-type", "text/event-stream")];
    let answer = |headers: &[(&str, &str)], body: Vec<u8>| HttpResponse {
        status: 200,
        headers: fields(headers),
        body,
    };
    let mut response = answer(&json_type, said.to_string().into_bytes());
    let mut delivery = Delivery { chunked: odd % 3 == 1, split: Split::Every(97), ..Delivery::default() };
    let mut leave_after_bytes = None;
    let encoded_type = [("content-type", "application/json"), ("content-encoding", "gzip")];
    match fault {
        Fault::Nothing | Fault::RequestBreaksOff => {}
        Fault::OneByteChunks => {
            response = answer(&event_type, stream.into_bytes());
            delivery = Delivery { chunked: true, split: Split::Every(1), ..delivery };
        }
        Fault::MalformedEvents => {
            let broken = format!(
                "data: {{\"choi\n\ndata\r\r\n: {stream}event\ndata: [DONE\n\ndata: {{{{\n\n\u{feff}data:{part}"
            );
            response = answer(&event_type, broken.into_bytes());
            delivery.chunked = true;
        }
        Fault::UpstreamDies => {
            if odd.is_multiple_of(2) {
                response = answer(&event_type, stream.into_bytes());
            }
            delivery.die_after_bytes = Some(1 + number % (response.body.len() - 1));
        }
        Fault::ClientLeaves => {
            response = answer(&event_type, stream.repeat(40).into_bytes());
            delivery = Delivery { chunked: true, pause: Duration::from_millis(1), ..delivery };
            leave_after_bytes = Some(1 + number % 300);
        }
        Fault::BombAnswered => response = answer(&encoded_type, bomb()),
        Fault::BombAsked => {
            request.headers = fields(&encoded_type);
            request.body = bomb();
        }
        Fault::BrokenGzip => {
            let mut body = gzip(&response.body);
            body.truncate(body.len() - 1 - number % (body.len() / 2));
            response = answer(&encoded_type, body);
        }
        Fault::NoContent => {
            response = HttpResponse { status: [204, 304][odd % 2], headers: Vec::new(), body: Vec::new() };
            delivery = Delivery::default();
        }
        Fault::Head => {
            request = HttpRequest { method: "HEAD".to_owned(), body: Vec::new(), ..request };
            delivery = Delivery::default();
        }
    }
    Case { fault, http2, request, response, delivery, leave_after_bytes }
}

/// What went wrong, if anything.
async fn pass(envoy: std::net::SocketAddr, upstream: &Upstream, case: Case) -> Result<(), String> {
    let Case { fault, http2, request, response, delivery, leave_after_bytes } = case;
    let number = upstream.plan(&response, delivery).expect("an answer that can be sent");
    let answer = if fault == Fault::RequestBreaksOff {
        let mut bytes = encoded(&request, number);
        bytes.truncate(bytes.len() - 1 - request.body.len() / 2);
        abandon(envoy, &bytes).await;
        Answer::default()
    } else if http2 {
        let id = number.to_string();
        ask_http2(envoy, &request, &[(REPLAY_ID_HEADER, &id)], leave_after_bytes).await
    } else {
        ask(envoy, encoded(&request, number), leave_after_bytes).await
    };
    let received = upstream.take(number);
    let asked = received.as_ref().is_some_and(|received| received.body == request.body);
    let status = answer.status == Some(response.status);
    let whole = answer.complete && answer.body == response.body;
    let part = response.body.starts_with(&answer.body);
    let right = match fault {
        Fault::RequestBreaksOff => received.is_none(),
        Fault::UpstreamDies => asked && status && part && !answer.complete,
        Fault::ClientLeaves => asked && status && part,
        Fault::Head => asked && status && answer.complete && answer.body.is_empty(),
        _ => asked && status && whole,
    };
    if right {
        return Ok(());
    }
    let got = String::from_utf8_lossy(&answer.body[..answer.body.len().min(300)]).into_owned();
    Err(format!(
        "{fault:?}, HTTP/2 {http2}: asked {asked}, status {:?}, complete {}, {} of {} bytes: {got}",
        answer.status,
        answer.complete,
        answer.body.len(),
        response.body.len()
    ))
}

fn stat(envoy: &Envoy, name: &str) -> u64 {
    let stats = tokio::task::block_in_place(|| envoy.stats()).expect("stats");
    stats.iter().filter(|(known, _)| known.starts_with(name)).map(|(_, value)| value).sum()
}

fn configurations() -> Vec<Value> {
    let with =
        |alpha: f64, actions: Value| json!({"alpha": alpha, "learn": {"messages": 400}, "actions": actions});
    vec![
        with(0.01, json!([{"stream": "*", "do": ["tag"]}])),
        with(0.02, json!([{"stream": "*", "do": ["observe"]}])),
        with(0.02, json!([{"stream": "*", "do": ["tag", "redact", "block"], "mode": "shadow"}])),
        // Refused: the one before stays.
        json!({"alpha": 2}),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn mixed_faults_lose_no_byte_and_leave_no_request() {
    let count = std::env::var("DRIFTLOCK_FAULTS").map_or(600, |count| count.parse().expect("a number"));
    let upstream = Arc::new(Upstream::start().await.expect("an upstream"));
    let mut options = EnvoyOptions::new(envoy_binary(), filter(), upstream.address());
    options.plugin_configuration = configurations()[0].to_string().into_bytes();
    options.reconfigurable = true;
    options.concurrency = 2;
    let mut envoy =
        tokio::task::spawn_blocking(move || Envoy::start(&options)).await.unwrap().expect("Envoy starts");
    let (listen, next) = (envoy.listen(), Arc::new(AtomicUsize::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        let (upstream, next) = (upstream.clone(), next.clone());
        clients.spawn(async move {
            let mut failures = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return failures;
                }
                failures.extend(pass(listen, &upstream, case(number)).await.err().map(|why| (number, why)));
            }
        });
    }
    let (mut swapped, mut refused) = (0, 0);
    for (i, configuration) in configurations().iter().cycle().skip(1).enumerate() {
        while next.load(Ordering::Relaxed) < count.min((i + 1) * count / 8) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if next.load(Ordering::Relaxed) >= count {
            break;
        }
        let bytes = configuration.to_string().into_bytes();
        match tokio::task::block_in_place(|| envoy.reconfigure(bytes)) {
            Ok(()) => swapped += 1,
            Err(_) => refused += 1,
        }
    }
    let mut failures = Vec::new();
    while let Some(failed) = clients.join_next().await {
        failures.extend(failed.expect("no panic"));
    }
    assert!(failures.is_empty(), "{} of {count} failed: {failures:#?}", failures.len());
    assert!(swapped >= 3 && refused >= 1, "{swapped} swapped, {refused} refused");

    // What broke off is noticed a moment later.
    for _ in 0..200 {
        if stat(&envoy, "http.driftlock.downstream_rq_active") == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(stat(&envoy, "http.driftlock.downstream_rq_active"), 0, "a request is stuck");
    let requests = stat(&envoy, "http.driftlock.downstream_rq_total");
    assert_eq!(stat(&envoy, "wasmcustom.driftlock.messages.request."), requests);
    assert_eq!(requests, count as u64);
    assert!(stat(&envoy, "wasmcustom.driftlock.not_inspected.cut_short") > 0);
    assert_eq!(stat(&envoy, "wasmcustom.driftlock.errors."), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_64_mib_passes_both_ways() {
    // With its envelope just below 64 MiB, which is what the upstream takes.
    const BYTES: usize = (64 << 20) - 100;
    let upstream = Upstream::start().await.expect("an upstream");
    let mut options = EnvoyOptions::new(envoy_binary(), filter(), upstream.address());
    options.plugin_configuration = configurations()[0].to_string().into_bytes();
    let envoy =
        tokio::task::spawn_blocking(move || Envoy::start(&options)).await.unwrap().expect("Envoy starts");
    let mut body = br#"{"messages":[{"role":"user","content":""#.to_vec();
    body.extend("A long story about nothing. ".bytes().cycle().take(BYTES));
    body.extend_from_slice(br#""}]}"#);
    let request = HttpRequest {
        method: "POST".to_owned(),
        target: "/v1/chat/completions".to_owned(),
        headers: fields(&[("content-type", "application/json")]),
        body: body.clone(),
    };
    let response =
        HttpResponse { status: 200, headers: fields(&[("content-type", "application/json")]), body };
    let number = upstream.plan(&response, Delivery { split: Split::Every(60_000), ..Delivery::default() });
    let number = number.expect("an answer that can be sent");
    let id = number.to_string();
    let answer = ask_http2(envoy.listen(), &request, &[(REPLAY_ID_HEADER, &id)], None).await;
    assert_eq!(answer.status, Some(200));
    assert!(answer.complete && answer.body == response.body, "{} bytes came", answer.body.len());
    assert!(upstream.take(number).is_some_and(|received| received.body == request.body));
    // More than is inspected: said so.
    assert_eq!(stat(&envoy, "wasmcustom.driftlock.not_inspected.size"), 2);
}
