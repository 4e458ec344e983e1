//! The YAML file: what it can say, and what it says about a mistake.

use std::path::Path;

use driftlock_host::gateway::{Config, Gateway, GatewayError};

use crate::{Peer, echo, soon, upstream};

/// A folder with `gateway.yaml` in it.
pub(crate) fn folder(yaml: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("gateway.yaml"), yaml).expect("written");
    folder
}

pub(crate) async fn start(folder: &tempfile::TempDir) -> Gateway {
    match Gateway::start_file(&folder.path().join("gateway.yaml")).await {
        Ok(gateway) => gateway,
        Err(error) => panic!("{error}"),
    }
}

const WHOLE: &str = r#"
listeners:
  - address: 127.0.0.1:0
access_log: none
filters:
  - name: guest
    module: guest.wasm
upstreams:
  one:
    uri: http://127.0.0.1:1
routes:
  - upstream: one
"#;

/// Each mistake: what is replaced by what, where that is, which field, and a word of the message.
#[tokio::test]
async fn a_mistake_is_named_by_line_and_field() {
    for (from, to, line, field, word) in [
        ("    uri: http:", "    url: http:", 10, "upstreams.one.url", "url"),
        ("  - upstream: one", "  - upstream: two", 12, "routes[0].upstream", "there are: one"),
        ("http://127.0.0.1:1", "ftp://127.0.0.1:1", 10, "upstreams.one.uri", "http://"),
        ("http://127.0.0.1:1", "http://a.example/v1", 10, "upstreams.one.uri", "path"),
        ("address: 127.0.0.1:0", "address: 127.0.0.1", 3, "listeners[0].address", "socket address"),
        ("guest.wasm", "missing.wasm", 7, "filters[0].module", "cannot read"),
        ("access_log: none", "workers: 0", 4, "workers", "0"),
        ("access_log: none", "access_log: none\naccess_log: none", 5, "", "access_log"),
        ("  - upstream: one", "  - upstream: one\n    timeout: 30", 13, "routes[0].timeout", "30s"),
        ("  - upstream: one", "  - upstream: one\n    timeout: 0s", 13, "routes[0].timeout", "1ms"),
        (
            "  - upstream: one",
            "  - upstream: one\n    match: {path_prefix: v1}",
            13,
            "routes[0].match.path_prefix",
            "/",
        ),
        (
            "  - upstream: one",
            "  - upstream: one\n    filters: [guest, gest]",
            13,
            "routes[0].filters[1]",
            "guest",
        ),
        (
            "  - upstream: one",
            "  - upstream: one\n    rewrite_prefix: /x",
            13,
            "routes[0].rewrite_prefix",
            "path_prefix",
        ),
        ("    module:", "    failure_policy: maybe\n    module:", 7, "filters[0].failure_policy", "maybe"),
        (
            "  - address: 127.0.0.1:0",
            "  - address: 127.0.0.1:0\n    tls: {certificate: no.pem, key: no.key}",
            4,
            "listeners[0].tls",
            "no.pem",
        ),
        ("access_log: none", "limits: {header_bytes: 1KiB}", 4, "limits.header_bytes", "8KiB"),
        ("routes:\n  - upstream: one", "routes: []", 0, "routes", "at least one"),
    ] {
        assert!(WHOLE.contains(from), "{from}");
        let folder = folder(&WHOLE.replacen(from, to, 1));
        std::fs::write(folder.path().join("guest.wasm"), b"never compiled").expect("written");
        let path = folder.path().join("gateway.yaml");
        let Err(error) = Gateway::start_file(&path).await else { panic!("{to} is accepted") };
        let GatewayError::ConfigFile { line: found, field: found_field, .. } = &error else {
            panic!("{to}: {error}");
        };
        assert_eq!((*found, found_field.as_str()), (line, field), "{to}: {error}");
        let text = error.to_string();
        let place = if line == 0 { "gateway.yaml: ".to_owned() } else { format!("gateway.yaml:{line}:") };
        assert!(text.contains(&place) && text.contains(word), "{to}: {text}");
    }
}

#[test]
fn the_published_schema_is_the_programs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("gateway.schema.json");
    let schema = Config::schema();
    if std::env::var_os("DRIFTLOCK_SCHEMA").is_some_and(|what| what == "write") {
        std::fs::write(&path, &schema).expect("written");
    }
    let published = std::fs::read_to_string(&path).expect("host/gateway.schema.json");
    assert!(published == schema, "out of date: run this test once with DRIFTLOCK_SCHEMA=write");
    let schema: serde_json::Value = serde_json::from_str(&schema).expect("JSON");
    for field in ["listeners", "filters", "upstreams", "routes", "limits", "timeouts"] {
        let about = &schema["properties"][field];
        assert!(about["description"].is_string() || about["$ref"].is_string(), "{field}: {about}");
    }
    assert_eq!(schema["additionalProperties"], false);
}

/// The example that operators start from, with another guest and on free ports.
#[tokio::test]
async fn the_example_starts() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/llm-gateway/gateway.yaml");
    let text = std::fs::read_to_string(example).expect("the example");
    let module = "module: ../../dist/driftlock_filter.wasm";
    assert!(text.contains(module) && text.contains("127.0.0.1:8080") && text.contains("127.0.0.1:9901"));
    let text = text
        .replace(module, "module: guest.wasm")
        .replace("127.0.0.1:8080", "127.0.0.1:0")
        .replace("127.0.0.1:9901", "127.0.0.1:0")
        .replace("access_log: stdout", "access_log: none");
    let folder = folder(&text);
    std::fs::write(folder.path().join("guest.wasm"), wat::parse_str(crate::GUEST).expect("valid text"))
        .expect("written");
    assert!(start(&folder).await.admin_addr.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_choose_by_host_path_method_and_header() {
    let name = async |name: &'static str| {
        upstream(move |mut peer| async move {
            while let Some(request) = peer.message().await {
                let host = request.header("host").unwrap_or_default().to_owned();
                let path = request.start.split(' ').nth(1).unwrap_or_default().to_owned();
                let body = format!("{name} {host} {path}");
                peer.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())).await;
            }
        })
        .await
    };
    let (one, two) = (name("one").await, name("two").await);
    let folder = folder(&format!(
        r#"
listeners: [{{address: 127.0.0.1:0}}, {{address: 127.0.0.1:0}}]
access_log: access.jsonl
upstreams:
  one: {{uri: "http://{}"}}
  two: {{uri: "http://{}"}}
routes:
  - name: hosts
    match: {{hosts: [api.example.com, "*.two.example"]}}
    upstream: two
  - name: tenant
    match: {{headers: {{x-tenant: acme}}, methods: [POST]}}
    upstream: two
    host: upstream
  - name: prefix
    match: {{path_prefix: /openai}}
    upstream: two
    rewrite_prefix: /
  - name: one
    match: {{path_prefix: /v1}}
    upstream: one
"#,
        one.address, two.address
    ));
    let gateway = start(&folder).await;
    let two_host = two.address.to_string();
    let second = gateway.addresses()[1];
    let mut client = Peer::connect(second).await;
    for (method, host, path, header, expected) in [
        ("GET", "API.example.com:80", "/any", "", "two API.example.com:80 /any"),
        ("GET", "a.two.example", "/v1", "", "two a.two.example /v1"),
        ("POST", "x", "/v1", "x-tenant: acme\r\n", &format!("two {two_host} /v1")),
        ("GET", "x", "/v1/chat", "x-tenant: acme\r\n", "one x /v1/chat"),
        ("GET", "x", "/openai/v1/chat?q=1", "", "two x /v1/chat?q=1"),
        ("GET", "x", "/v1?q=1", "", "one x /v1?q=1"),
    ] {
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\n{header}content-length: 0\r\n\r\n");
        let answer = soon("a routed answer", client.exchange(request)).await;
        assert_eq!(answer.text(), expected, "{method} {host} {path}");
    }
    let answer = client.exchange("GET /v10 HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert_eq!(answer.status(), 404);
    assert!(answer.text().contains("no_route"), "{}", answer.text());
    gateway.shutdown().await;
    let log = std::fs::read_to_string(folder.path().join("access.jsonl")).expect("a log");
    let routes: Vec<String> = log
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            line["route"].as_str().expect("a string").to_owned()
        })
        .collect();
    assert_eq!(routes, ["hosts", "hosts", "tenant", "one", "prefix", "one", ""]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_refuse_what_is_too_long() {
    let upstream = echo().await;
    let folder = folder(&format!(
        r#"
listeners: [{{address: 127.0.0.1:0}}]
access_log: none
limits: {{header_bytes: 8KiB, headers: 20, request_body: 1000, response_body: 500}}
upstreams:
  one: {{uri: "http://{}"}}
routes:
  - match: {{path_prefix: /small}}
    upstream: one
    request_body: 10
  - upstream: one
"#,
        upstream.address
    ));
    let gateway = start(&folder).await;
    let status = async |request: String| {
        let mut client = Peer::connect(gateway.addr).await;
        client.send(request).await;
        soon("an answer", client.message()).await.map_or(0, |answer| answer.status())
    };
    let post = |path: &str, length: usize| {
        format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n{}", "x".repeat(length))
    };
    let chunked = |length: usize| {
        let body = "x".repeat(length);
        format!(
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n"
        )
    };
    assert_eq!(status(post("/", 400)).await, 200);
    assert_eq!(status(post("/", 1001)).await, 413);
    assert_eq!(status(chunked(1001)).await, 413);
    assert_eq!(status(post("/small", 11)).await, 413);
    assert_eq!(status(post("/small", 10)).await, 200);
    let long = "x".repeat(9 << 10);
    assert_eq!(status(format!("GET / HTTP/1.1\r\nhost: a\r\nx-long: {long}\r\n\r\n")).await, 431);
    let many: String = (0..30).map(|index| format!("x-{index}: 1\r\n")).collect();
    assert_eq!(status(format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n")).await, 431);
    // The echo of 600 bytes is over the response's limit, which shows once its headers are out.
    let mut client = Peer::connect(gateway.addr).await;
    client.send(post("/", 600)).await;
    assert_eq!(soon("a cut answer", client.message()).await, None);
}
