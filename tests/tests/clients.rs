//! Clients that people really use, through the gateway with the real filter in it.
//!
//! `cargo xtask clients` installs them and says where; `cargo xtask test` does so by itself.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use driftlock_host::capture::HttpResponse;
use driftlock_host::gateway::{AccessRecord, Gateway};
use driftlock_host::replay::upstream::{Delivery, Split, Upstream};
use driftlock_tests::proxy::start_gateway;
use driftlock_tests::{clients_python, workspace};
use serde_json::{Value, json};

async fn script(name: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(clients_python());
    command.arg(workspace().join("tests/clients").join(name)).args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("no panic");
    let output = output.expect("Python runs");
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

async fn record(log: &std::sync::mpsc::Receiver<AccessRecord>) -> AccessRecord {
    for _ in 0..2000 {
        if let Ok(record) = log.try_recv() {
            return record;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("no access log line");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_openai_sdk_streams_through_the_filter() {
    let words = ["one", " two", " three", " four", " five", " six", " seven", " eight", " nine", " ten"];
    let event = |delta: Value, reason: Value| {
        let chunk = json!({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "test",
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]});
        format!("data: {chunk}\n\n")
    };
    let mut body: String = words.iter().map(|word| event(json!({"content": word}), Value::Null)).collect();
    body += &event(json!({}), json!("stop"));
    body += "data: [DONE]\n\n";
    let upstream = Upstream::start().await.expect("an upstream");
    let answer = HttpResponse {
        status: 200,
        headers: vec![("content-type".to_owned(), "text/event-stream".to_owned())],
        body: body.into_bytes(),
    };
    let pause = Duration::from_millis(100);
    let delivery = Delivery { split: Split::Events, chunked: true, pause, ..Delivery::default() };
    let number = upstream.plan(&answer, delivery).expect("planned").to_string();
    let configuration = br#"{"learn": {"messages": 1000}}"#;
    let (gateway, log) = start_gateway(configuration, upstream.address()).await;
    let got = script("openai_stream.py", &[&format!("http://{}", gateway.addr), &number]).await;
    let got: Value = serde_json::from_str(&got).expect("JSON");
    assert_eq!(got["text"], words.concat());
    let times: Vec<f64> =
        got["times_s"].as_array().expect("times").iter().filter_map(Value::as_f64).collect();
    assert_eq!(times.len(), words.len());
    let spread = times[times.len() - 1] - times[0];
    assert!(spread > 0.6, "the events came within {spread} s: they were held back");
    let record = record(&log).await;
    let verdict = record.filter_state.get("wasm.driftlock.response").expect("a verdict");
    let verdict: Value = serde_json::from_slice(verdict).expect("JSON");
    // The SDK hangs up at `[DONE]`, so the message may count as cut short; its bytes were read all the same.
    assert!(verdict["stream"].as_str().is_some_and(|stream| stream.contains("openai.chat")), "{verdict}");
    assert!(verdict["metrics"]["bytes"].as_u64().is_some_and(|bytes| bytes > 50), "{verdict}");
    gateway.shutdown().await;
}

/// Ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_client_talks_through_the_gateway() {
    let child = Command::new(clients_python())
        .arg(workspace().join("tests/clients/websocket.py"))
        .arg("serve")
        .stdout(Stdio::piped())
        .spawn()
        .expect("Python runs");
    let mut server = Server(child);
    let mut port = String::new();
    BufReader::new(server.0.stdout.take().expect("a pipe")).read_line(&mut port).expect("a line");
    let address = format!("127.0.0.1:{}", port.trim()).parse().expect("an address");
    let (gateway, log): (Gateway, _) = start_gateway(b"", address).await;
    let said = script("websocket.py", &["ask", &format!("ws://{}/realtime", gateway.addr)]).await;
    assert_eq!(said.trim(), "echoed");
    let record = record(&log).await;
    assert_eq!((record.upgrade, record.status), (Some("websocket"), Some(101)));
    gateway.shutdown().await;
}
