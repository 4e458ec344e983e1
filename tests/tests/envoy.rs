//! What is Envoy's own: how it cuts, breaks off, limits and counts, with traffic that flows whatever happens.
//!
//! Every test starts an Envoy of its own on free loopback ports (0.3 to 1 s) with an upstream in this
//! process. Without an Envoy the tests fail and name the command that installs one.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use driftlock_host::capture::{Exchange, HttpRequest, HttpResponse};
use driftlock_host::envoy::{Envoy, EnvoyError, EnvoyOptions, find_binary};
use driftlock_host::replay::envoy::{
    Failure, ReplayOptions, ReplayedExchange, VerdictSource, replay_through,
};
use driftlock_host::replay::upstream::{Delivery, Split, Upstream};
use driftlock_host::replay::wire::REPLAY_ID_HEADER;
use driftlock_host::replay::{native, telling_all, wasm::WasmReplay};
use driftlock_inspect::session::Plugin;
use driftlock_tests::{filter, module};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const REQUEST: &str =
    r#"{"model":"m","messages":[{"role":"user","content":"What is the capital of France?"}]}"#;
const RESPONSE: &str =
    r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"Paris."},"finish_reason":"stop"}]}"#;

/// An exchange with JSON both ways, on the path of chat completions.
fn chat(request: impl Into<Vec<u8>>, response: impl Into<Vec<u8>>) -> Exchange {
    let json = || vec![("content-type".to_owned(), "application/json".to_owned())];
    Exchange {
        id: "chat".to_owned(),
        label: "normal".to_owned(),
        request: HttpRequest {
            method: "POST".to_owned(),
            target: "/v1/chat/completions".to_owned(),
            headers: json(),
            body: request.into(),
        },
        response: Some(HttpResponse { status: 200, headers: json(), body: response.into() }),
    }
}

struct Proxy {
    upstream: Upstream,
    envoy: Envoy,
}

impl Proxy {
    async fn start(configuration: &Value) -> Self {
        Self::start_with(configuration, |_| {}).await
    }

    async fn start_with(configuration: &Value, change: impl FnOnce(&mut EnvoyOptions)) -> Self {
        Self::try_start(configuration, change).await.unwrap_or_else(|error| panic!("{error}"))
    }

    async fn try_start(
        configuration: &Value,
        change: impl FnOnce(&mut EnvoyOptions),
    ) -> Result<Self, EnvoyError> {
        let upstream = Upstream::start().await.unwrap();
        let mut options = EnvoyOptions::new(find_binary(None)?, filter(), upstream.address());
        options.plugin_configuration = telling_all(configuration.to_string().into_bytes());
        change(&mut options);
        let envoy = tokio::task::spawn_blocking(move || Envoy::start(&options)).await.unwrap()?;
        Ok(Self { upstream, envoy })
    }

    async fn replay(&self, exchanges: Vec<Exchange>, delivery: Option<Delivery>) -> Vec<ReplayedExchange> {
        let mut verdicts = VerdictSource::EnvoyLog(self.envoy.access_log().to_owned());
        let options = ReplayOptions { delivery, ..ReplayOptions::default() };
        replay_through(self.envoy.listen(), &self.upstream, &mut verdicts, exchanges, &options).await.unwrap()
    }

    async fn replay_one(&self, exchange: Exchange) -> ReplayedExchange {
        self.replay(vec![exchange], None).await.remove(0)
    }

    /// A plain exchange passes whole: what a test calls after it has done its worst.
    async fn assert_flows(&self) {
        let replayed = self.replay_one(chat(REQUEST, RESPONSE)).await;
        assert!(replayed.failure.is_none() && replayed.body_matches, "{replayed:?}");
    }
}

fn learning() -> Value {
    json!({"alpha": 0.01, "learn": {"messages": 400}, "report": {"log": "never"}})
}

fn verdict(json: &Option<String>) -> Value {
    serde_json::from_str(json.as_deref().expect("a verdict")).expect("the verdict is JSON")
}

/// `outcome` and `reason` of both verdicts.
fn outcomes(replayed: &ReplayedExchange) -> [(String, String); 2] {
    [&replayed.request_verdict_json, &replayed.response_verdict_json].map(|json| {
        let verdict = verdict(json);
        let text = |key: &str| verdict[key].as_str().unwrap_or_default().to_owned();
        (text("outcome"), text("reason"))
    })
}

/// Replays by all three paths and returns Envoy's verdicts after they have been found equal.
async fn by_all_paths(configuration: &Value, exchanges: &[Exchange]) -> Vec<ReplayedExchange> {
    let bytes = configuration.to_string().into_bytes();
    let mut plugin = Plugin::configure(&bytes).unwrap();
    let mut vm = WasmReplay::start(module(), bytes).unwrap();
    let proxy = Proxy::start(configuration).await;
    let through_envoy = proxy.replay(exchanges.to_vec(), None).await;
    assert_eq!(through_envoy.len(), exchanges.len(), "no exchange is dropped");
    for (exchange, envoy) in exchanges.iter().zip(&through_envoy) {
        let native = native::replay(&mut plugin, exchange.clone());
        let wasm = vm.replay(exchange.clone()).unwrap();
        assert_eq!(native, wasm, "native and wasmtime differ on {}", exchange.id);
        assert_eq!(native.request, envoy.request_verdict_json, "request of {} in Envoy", exchange.id);
        assert_eq!(native.response, envoy.response_verdict_json, "response of {} in Envoy", exchange.id);
        assert_eq!(native.failure.is_some(), envoy.failure.is_some(), "{envoy:?}");
        assert!(envoy.failure.is_some() || envoy.body_matches, "bytes changed: {envoy:?}");
    }
    through_envoy
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_inspected_passes_unchanged_and_says_why_by_every_path() {
    let typed = |content_type: &str, body: &[u8]| {
        let mut exchange = chat(body, body);
        exchange.request.target = "/upload".to_owned();
        exchange.request.headers[0].1 = content_type.to_owned();
        exchange.response.as_mut().unwrap().headers[0].1 = content_type.to_owned();
        exchange
    };
    let encoded = {
        let mut exchange = chat(REQUEST, RESPONSE);
        exchange.request.headers.push(("content-encoding".to_owned(), "br".to_owned()));
        exchange.response.as_mut().unwrap().headers.push(("content-encoding".to_owned(), "br".to_owned()));
        exchange
    };
    let long = format!(r#"{{"messages":[{{"role":"user","content":"{}"}}]}}"#, "long ".repeat(1000));
    let cases = [
        (chat(&REQUEST[..30], &RESPONSE[..30]), "json_truncated"),
        (chat("{\"a\" 1}", "{\"a\" 1}"), "json_malformed"),
        (chat(*b"{\"a\":\"\xff\xfe\"}", *b"{\"a\":\"\xff\xfe\"}"), "invalid_utf8"),
        (chat(long.as_str(), long.as_str()), "size"),
        (typed("image/png", b"\x89PNG\r\n\x1a\n\0\0"), "content_type_binary"),
        (encoded, "encoding_malformed"),
    ];
    let mut configuration = learning();
    configuration["limits"] = json!({"max_body_bytes": 2048});
    let exchanges: Vec<_> = cases.iter().map(|(exchange, _)| exchange.clone()).collect();
    let replayed = by_all_paths(&configuration, &exchanges).await;
    for ((_, reason), replayed) in cases.iter().zip(&replayed) {
        assert_eq!(replayed.status, Some(200));
        let expected = ("not_inspected".to_owned(), (*reason).to_owned());
        assert_eq!(outcomes(replayed), [expected.clone(), expected], "{reason}");
        assert_eq!(replayed.outcome.as_deref(), Some("not_inspected"));
        let header = replayed.response_headers.iter().find(|(name, _)| name == "x-driftlock-request");
        let (_, value) = header.expect("the request's verdict is in a response header");
        assert!(value.starts_with("not_inspected") && value.contains(reason), "{value}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cut_of_a_streamed_answer_gives_the_same_verdict() {
    let event = |text: &str| {
        format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
    };
    let stream =
        ["The cap", "ital of \u{e9}\u{1f600}", " is Paris."].map(event).concat() + "data: [DONE]\n\n";
    let mut exchange = chat(REQUEST, stream);
    exchange.response.as_mut().unwrap().headers[0].1 = "text/event-stream".to_owned();
    let chunked = |split| Delivery { split, chunked: true, ..Delivery::default() };
    let deliveries = [
        Delivery::default(),
        chunked(Split::Whole),
        chunked(Split::Events),
        chunked(Split::Every(1)),
        Delivery { pause: Duration::from_millis(1), ..chunked(Split::Every(7)) },
        Delivery { trailers: vec![("x-end".to_owned(), "1".to_owned())], ..chunked(Split::Every(50)) },
    ];
    // The first message of a stream each time, so that nothing learned makes a difference.
    let mut verdicts = Vec::new();
    for delivery in deliveries {
        let proxy = Proxy::start_with(&learning(), |options| options.trailers = true).await;
        let replayed = proxy.replay(vec![exchange.clone()], Some(delivery.clone())).await.remove(0);
        assert!(replayed.failure.is_none() && replayed.body_matches, "{delivery:?}: {replayed:?}");
        assert_eq!(replayed.response_trailers, delivery.trailers, "{delivery:?}");
        let verdict = replayed.response_verdict_json;
        assert!(verdict.is_some(), "no verdict with {delivery:?}");
        verdicts.push(verdict);
    }
    assert!(verdicts.windows(2).all(|pair| pair[0] == pair[1]), "{verdicts:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_dies_in_mid_answer_is_a_verdict_and_the_next_exchange_flows() {
    let proxy = Proxy::start(&learning()).await;
    for chunked in [true, false] {
        let delivery =
            Delivery { chunked, die_after_bytes: Some(40), split: Split::Every(20), ..Delivery::default() };
        let replayed = proxy.replay(vec![chat(REQUEST, RESPONSE)], Some(delivery)).await.remove(0);
        assert!(matches!(replayed.failure, Some(Failure::Broken(_))), "{replayed:?}");
        assert!(!replayed.body_matches);
        let [request, response] = outcomes(&replayed);
        assert_eq!(request.0, "warming_up", "the request was whole");
        assert_eq!(response, ("not_inspected".to_owned(), "cut_short".to_owned()));
        proxy.assert_flows().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_in_mid_answer_leaves_a_verdict() {
    let proxy = Proxy::start(&learning()).await;
    let delivery = Delivery {
        chunked: true,
        split: Split::Every(10),
        pause: Duration::from_millis(100),
        ..Delivery::default()
    };
    let number = proxy.upstream.plan(chat("", RESPONSE).response.as_ref().unwrap(), delivery).unwrap();
    let mut client = TcpStream::connect(proxy.envoy.listen()).await.unwrap();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\n{REPLAY_ID_HEADER}: {number}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{REQUEST}",
        REQUEST.len()
    );
    client.write_all(request.as_bytes()).await.unwrap();
    let mut first = [0; 64];
    assert!(client.read(&mut first).await.unwrap() > 0, "the answer has begun");
    drop(client);

    let entry = logged(&proxy, number).await;
    let response: Value = serde_json::from_str(entry["driftlock"]["response"].as_str().unwrap()).unwrap();
    assert_eq!((&response["outcome"], &response["reason"]), (&json!("not_inspected"), &json!("cut_short")));
    proxy.assert_flows().await;
}

/// The access log's line of an exchange that the replay driver did not send.
async fn logged(proxy: &Proxy, number: u64) -> Value {
    let (started, wanted) = (Instant::now(), number.to_string());
    while started.elapsed() < Duration::from_secs(10) {
        let log = std::fs::read_to_string(proxy.envoy.access_log()).unwrap_or_default();
        let entries = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if let Some(entry) = entries.into_iter().find(|entry| entry["replay_id"] == wanted) {
            return entry;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("exchange {number} is not in the access log");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_configuration_names_what_is_wrong() {
    let mut snapshot = driftlock_tests::baseline().encode();
    let middle = snapshot.len() / 2;
    snapshot[middle] ^= 1;
    let cases = [
        (json!({"alhpa": 0.01}), "alhpa"),
        (json!({"baseline": STANDARD.encode(&snapshot), "learn": null}), "at baseline"),
    ];
    for (configuration, named) in cases {
        let error = Proxy::try_start(&configuration, |_| {}).await.err().expect("refused");
        let EnvoyError::Exited { log, .. } = &error else { panic!("{error}") };
        assert!(log.contains("configuration refused") && log.contains(named), "{named}: {log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_who_chose_to_refuse_gets_refusals_and_the_rest_flows() {
    let mut configuration = learning();
    configuration["uninspectable"] = json!("refuse");
    let proxy = Proxy::start(&configuration).await;
    proxy.assert_flows().await;

    let request = proxy.replay_one(chat(&REQUEST[..30], RESPONSE)).await;
    assert!(matches!(request.failure, Some(Failure::LocalReply(400))), "{request:?}");
    let verdict = verdict(&request.request_verdict_json);
    assert_eq!(
        (&verdict["outcome"], &verdict["reason"]),
        (&json!("not_inspected"), &json!("json_truncated"))
    );

    // The response's headers have gone when its end turns out to be missing: it is broken off.
    let chunked = Delivery { chunked: true, ..Delivery::default() };
    let response = proxy.replay(vec![chat(REQUEST, &RESPONSE[..30])], Some(chunked)).await.remove(0);
    assert!(matches!(response.failure, Some(Failure::Broken(_))), "{response:?}");
    assert!(!response.body_matches, "the client must see that it is not whole: {response:?}");
    assert_eq!(outcomes(&response)[1], ("not_inspected".to_owned(), "json_truncated".to_owned()));
    proxy.assert_flows().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_far_over_the_buffer_limit_streams_through() {
    let proxy = Proxy::start_with(&learning(), |options| options.buffer_limit_bytes = Some(16 << 10)).await;
    let text = "lorem ipsum dolor ".repeat(100_000);
    let exchange = chat(
        json!({"messages": [{"role": "user", "content": text}]}).to_string(),
        json!({"choices": [{"message": {"role": "assistant", "content": text}}]}).to_string(),
    );
    let replayed = proxy.replay_one(exchange).await;
    assert!(replayed.failure.is_none() && replayed.body_matches, "{:?}", replayed.failure);
    assert_eq!(outcomes(&replayed).map(|(outcome, _)| outcome), ["warming_up", "warming_up"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_counted_in_envoys_statistics() {
    let proxy = Proxy::start(&learning()).await;
    proxy.replay(vec![chat(REQUEST, RESPONSE), chat(&REQUEST[..30], RESPONSE)], None).await;
    let stats = proxy.envoy.stats().unwrap();
    let value = |name: &str| stats.iter().find(|(n, _)| n == name).map(|(_, value)| *value);
    assert_eq!(value("wasmcustom.driftlock.messages.request.warming_up"), Some(1));
    assert_eq!(value("wasmcustom.driftlock.messages.request.not_inspected"), Some(1));
    assert_eq!(value("wasmcustom.driftlock.messages.response.warming_up"), Some(2));
    assert_eq!(value("wasmcustom.driftlock.errors.host_call"), Some(0));
}
