//! What HTTP has beside a request and its answer, through a real Envoy: messages without a body, 100-continue,
//! upgrades, the proxy's own answers, retries.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use driftlock_host::capture::{HttpRequest, HttpResponse};
use driftlock_host::envoy::{Envoy, EnvoyOptions};
use driftlock_host::replay::upstream::Delivery;
use driftlock_tests::proxy::Proxy;
use driftlock_tests::wire::ask;
use driftlock_tests::{envoy_binary, filter};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const ASKED: &str = r#"{"messages": [{"role": "user", "content": "Where is my order?"}]}"#;

/// Rules under which nothing is held, bodies are held, and headers too.
fn modes() -> [Value; 3] {
    let with = |actions: Value, held: bool| json!({"alpha": 0.01, "learn": {"messages": 400}, "actions": actions, "hold": {"headers": held}});
    let block = json!([{"stream": "*", "do": ["tag", "redact", "block"]}]);
    [with(json!([{"stream": "*", "do": ["tag"]}]), false), with(block.clone(), false), with(block, true)]
}

fn options(configuration: &Value, upstream: SocketAddr) -> EnvoyOptions {
    let mut options = EnvoyOptions::new(envoy_binary(), filter(), upstream);
    options.allow_on_headers_stop_iteration = configuration["hold"]["headers"] == true;
    options.plugin_configuration = configuration.to_string().into_bytes();
    options
}

async fn start(options: EnvoyOptions) -> Envoy {
    tokio::task::spawn_blocking(move || Envoy::start(&options)).await.unwrap().expect("Envoy starts")
}

/// The access log's only line.
async fn logged(envoy: &Envoy) -> Value {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(15) {
        let log = std::fs::read_to_string(envoy.access_log()).unwrap_or_default();
        if let Some(line) = log.lines().next() {
            return serde_json::from_str(line).expect("JSON");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("nothing is logged");
}

fn verdict(entry: &Value, side: &str) -> Value {
    let text = entry["driftlock"][side].as_str().unwrap_or_else(|| panic!("no {side}: {entry}"));
    serde_json::from_str(text).expect("JSON")
}

/// Reads up to the end of a head.
async fn head(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if tokio::time::timeout(Duration::from_secs(20), stream.read(&mut byte))
            .await
            .expect("a head")
            .unwrap_or(0)
            == 0
        {
            break;
        }
        bytes.push(byte[0]);
    }
    String::from_utf8_lossy(&bytes).to_ascii_lowercase()
}

/// Reads up to the end of `body`, which comes whole, in a chunk or by its length.
async fn arrives(stream: &mut TcpStream, body: &[u8]) {
    let mut bytes = Vec::new();
    while !bytes.windows(body.len()).any(|window| window == body) {
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read_buf(&mut bytes)).await;
        assert!(read.expect("a body").unwrap() > 0, "{}", String::from_utf8_lossy(&bytes));
    }
}

fn post(path: &str, fields: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{fields}\r\n{body}",
        body.len()
    )
    .into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_without_a_body_pass_and_their_requests_are_judged() {
    for configuration in modes() {
        let holds = configuration["hold"]["headers"] == true;
        let bytes = configuration.to_string().into_bytes();
        let set = |options: &mut EnvoyOptions| options.allow_on_headers_stop_iteration = holds;
        // HTTP/2, where the length of a HEAD's answer does not have to be guessed at.
        let proxy = Proxy { http2: true, ..Proxy::envoy_with(&bytes, set).await };
        for (method, status) in [("HEAD", 200), ("GET", 204), ("GET", 304), ("POST", 200), ("DELETE", 200)] {
            let request = HttpRequest {
                method: method.to_owned(),
                target: "/v1/models".to_owned(),
                headers: Vec::new(),
                body: Vec::new(),
            };
            let body = if method == "HEAD" { b"{\"n\": 1}".to_vec() } else { Vec::new() };
            let headers = vec![("content-type".to_owned(), "application/json".to_owned())];
            let response = HttpResponse { status, headers, body };
            let observed = proxy.pass(&request, &response, Delivery::default(), None).await;
            let what = format!("{method} {status}, {configuration}");
            let answer = &observed.answer;
            assert_eq!(
                (answer.status, answer.complete, answer.body.len()),
                (Some(status), true, 0),
                "{what}"
            );
            assert!(observed.received.is_some_and(|received| received.body.is_empty()), "{what}");
            assert_eq!(answer.all("x-driftlock-request").len(), 1, "{what}: {answer:?}");
            assert!(observed.request.is_some_and(|verdict| verdict.contains("warming_up")), "{what}");
            assert!(observed.response.is_none(), "{what}: a verdict on nothing: {:?}", observed.response);
        }
        let counters = proxy.counters().await;
        assert_eq!(counters["driftlock.errors.host_call"], 0, "{counters:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_waits_for_100_continue_gets_it_and_its_answer() {
    for configuration in modes() {
        let upstream = driftlock_host::replay::upstream::Upstream::start().await.unwrap();
        let envoy = start(options(&configuration, upstream.address())).await;
        let answer = HttpResponse {
            status: 200,
            headers: vec![("content-type".to_owned(), "application/json".to_owned())],
            body: b"{\"n\": 1}".to_vec(),
        };
        let number = upstream.plan(&answer, Delivery::default()).unwrap();
        let fields = format!("expect: 100-continue\r\nx-driftlock-replay-id: {number}\r\n");
        let bytes = post("/v1/chat/completions", &fields, ASKED);
        let (begin, body) = bytes.split_at(bytes.len() - ASKED.len());
        let mut client = TcpStream::connect(envoy.listen()).await.unwrap();
        client.write_all(begin).await.unwrap();
        // The body is sent only now.
        assert!(head(&mut client).await.starts_with("http/1.1 100"), "{configuration}");
        client.write_all(body).await.unwrap();
        let said = head(&mut client).await;
        assert!(said.starts_with("http/1.1 200"), "{configuration}: {said}");
        arrives(&mut client, &answer.body).await;
        assert_eq!(upstream.take(number).unwrap().body, ASKED.as_bytes());
        assert_eq!(verdict(&logged(&envoy).await, "request")["outcome"], "warming_up");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_opens_under_every_rule_and_is_said_not_to_be_inspected() {
    for configuration in modes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let upstream = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(head(&mut stream).await.contains("upgrade: websocket"));
            let switch =
                "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
            stream.write_all(switch.as_bytes()).await.unwrap();
            let mut said = [0; 4];
            stream.read_exact(&mut said).await.unwrap();
            stream.write_all(&said).await.unwrap();
            said
        });
        let mut options = options(&configuration, address);
        options.websockets = true;
        let envoy = start(options).await;
        let mut client = TcpStream::connect(envoy.listen()).await.unwrap();
        let open = "GET /socket HTTP/1.1\r\nhost: h\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        client.write_all(open.as_bytes()).await.unwrap();
        let switched = head(&mut client).await;
        assert!(switched.starts_with("http/1.1 101"), "{configuration}: {switched}");
        client.write_all(b"\x81\x02hi").await.unwrap();
        let mut echoed = [0; 4];
        client.read_exact(&mut echoed).await.unwrap();
        assert_eq!(&echoed, b"\x81\x02hi", "{configuration}");
        assert_eq!(&upstream.await.unwrap(), b"\x81\x02hi");
        drop(client);
        let entry = logged(&envoy).await;
        for side in ["request", "response"] {
            assert_eq!(verdict(&entry, side)["reason"], "websocket", "{configuration}: {entry}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxys_own_answer_leaves_the_request_judged() {
    for configuration in modes() {
        // Nobody listens there.
        let nowhere = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let envoy = start(options(&configuration, nowhere)).await;
        let answer = ask(envoy.listen(), post("/v1/chat/completions", "", ASKED), None).await;
        assert_eq!((answer.status, answer.complete), (Some(503), true), "{configuration}: {answer:?}");
        assert!(answer.text().contains("upstream connect error"), "{configuration}: {answer:?}");
        assert_eq!(answer.all("x-driftlock-request").len(), 1, "{configuration}: {answer:?}");
        let entry = logged(&envoy).await;
        assert_eq!(verdict(&entry, "request")["outcome"], "warming_up", "{configuration}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_sent_again_is_judged_once_and_sent_whole() {
    for configuration in modes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let upstream = tokio::spawn(async move {
            let mut attempts = 0;
            for attempt in 0..3 {
                let (mut stream, _) = listener.accept().await.unwrap();
                head(&mut stream).await;
                arrives(&mut stream, ASKED.as_bytes()).await;
                attempts += 1;
                let reply = match attempt {
                    // Reset, then an error.
                    0 => continue,
                    1 => {
                        "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                    }
                    _ => {
                        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
                    }
                };
                stream.write_all(reply.as_bytes()).await.unwrap();
            }
            attempts
        });
        let mut options = options(&configuration, address);
        options.retries = 3;
        let envoy = start(options).await;
        let answer = ask(envoy.listen(), post("/v1/chat/completions", "", ASKED), None).await;
        assert_eq!((answer.status, answer.text()), (Some(200), "{}".to_owned()), "{configuration}");
        assert_eq!(upstream.await.unwrap(), 3, "{configuration}");
        logged(&envoy).await;
        let stats = tokio::task::block_in_place(|| envoy.stats()).unwrap();
        let messages = |side: &str| -> u64 {
            let prefix = format!("wasmcustom.driftlock.messages.{side}.");
            stats.iter().filter(|(name, _)| name.starts_with(&prefix)).map(|(_, value)| value).sum()
        };
        assert_eq!((messages("request"), messages("response")), (1, 1), "{configuration}");
    }
}
