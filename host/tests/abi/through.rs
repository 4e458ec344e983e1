//! The same guest and the same request through a real Envoy and through the gateway, over sockets: the
//! client and the upstream must see the same bytes and headers, and the guest's metrics must agree.
//!
//! What may differ is listed in [`Seen::of`], each with its reason; everything else is a mistake here.
//! Needs an Envoy: `cargo test --release -p driftlock-host --test abi -- --ignored envoy`.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use driftlock_host::envoy::{Envoy, EnvoyOptions, FailurePolicy as EnvoyPolicy, find_binary};
use driftlock_host::gateway::Gateway;

use crate::sdk;

/// Longest wait for a message that does not come.
const PATIENCE: Duration = Duration::from_secs(5);
const BUFFER_LIMIT_BYTES: u32 = 1 << 20;

/// A message as it crossed the wire, without what depends on how it was cut.
#[derive(Debug, PartialEq, Eq, Default)]
pub(crate) struct Seen {
    pub(crate) start: String,
    pub(crate) headers: Vec<String>,
    pub(crate) body: String,
    pub(crate) trailers: Vec<String>,
    pub(crate) complete: bool,
}

impl Seen {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let Some((head, rest)) = text.split_once("\r\n\r\n") else {
            return Self { start: text, ..Self::default() };
        };
        let mut lines = head.split("\r\n");
        let start = lines.next().unwrap_or_default();
        // A status's reason phrase carries no meaning (RFC 9112, 4), and Envoy knows fewer.
        let start = if start.starts_with("HTTP") { start.get(..12).unwrap_or(start) } else { start };
        let start = start.to_owned();
        let all: Vec<_> = lines.map(lower_name).collect();
        let chunked = all.iter().any(|line| line == "transfer-encoding: chunked");
        let length = all.iter().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        let (body, trailers, complete) = if chunked {
            unchunk(rest)
        } else {
            let length: usize = length.unwrap_or(0);
            (rest.to_owned(), Vec::new(), rest.len() == length)
        };
        // Envoy says over which scheme the request came; a date is the moment's; how the connection goes
        // on is each proxy's own business (RFC 9110, 7.6.1).
        let own = ["x-forwarded-proto: ", "date: ", "connection: ", "keep-alive: "];
        let mut headers: Vec<_> =
            all.into_iter().filter(|line| !own.iter().any(|name| line.starts_with(name))).collect();
        // The order among different names carries no meaning (RFC 9110, 5.3).
        headers.sort_by(|a, b| a.split(':').next().cmp(&b.split(':').next()));
        Self { start, headers, body, trailers, complete }
    }
}

fn lower_name(line: &str) -> String {
    match line.split_once(':') {
        Some((name, value)) => format!("{}:{value}", name.to_ascii_lowercase()),
        None => line.to_owned(),
    }
}

/// Body, trailers, and whether the end was there.
fn unchunk(mut rest: &str) -> (String, Vec<String>, bool) {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let Ok(size) = usize::from_str_radix(size.trim(), 16) else { break };
        if size == 0 {
            let lines = after.split("\r\n").take_while(|line| !line.is_empty());
            return (body, lines.map(lower_name).collect(), after.ends_with("\r\n"));
        }
        let Some(data) = after.get(..size) else { break };
        body += data;
        rest = after.get(size + 2..).unwrap_or_default();
    }
    (body, Vec::new(), false)
}

/// Reads one message, or what there is of it when the peer goes or stays silent.
pub(crate) fn read_message(mut stream: &TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut all = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        if all.windows(4).any(|four| four == b"\r\n\r\n") {
            let seen = Seen::of(&all);
            let switches = seen.start.contains(" 100 ");
            if seen.complete && !switches {
                return all;
            }
        }
        match stream.read(&mut buffer) {
            Ok(count) if count > 0 => all.extend_from_slice(&buffer[..count]),
            _ => return all,
        }
    }
}

/// What everybody saw of one exchange.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) client: Seen,
    /// `None` when nothing reached the upstream.
    pub(crate) upstream: Option<Seen>,
    metrics: BTreeMap<String, u64>,
}

pub(crate) struct Case {
    pub(crate) wasm: Vec<u8>,
    pub(crate) configuration: String,
    pub(crate) request: String,
    pub(crate) response: String,
    metrics: &'static [&'static str],
    /// Upstreams that the guest may call: name, address, whether it speaks HTTP/2.
    pub(crate) callees: Vec<(String, SocketAddr, bool)>,
    /// The failure policy's name here, and in Envoy.
    pub(crate) policy: (&'static str, EnvoyPolicy),
}

const REQUEST: &str = "POST /p?q HTTP/1.1\r\nhost: a\r\nx-gone: 1\r\nx-set: old\r\nx-set: older\r\ncontent-length: 5\r\n\r\nhello";
const RESPONSE: &str = "HTTP/1.1 200 OK\r\nserver: s\r\nx-up: 1\r\nx-up: 2\r\ncontent-length: 5\r\n\r\nworld";
const CHUNKED_REQUEST: &str = "POST /p?q HTTP/1.1\r\nhost: a\r\nte: trailers\r\ntrailer: t, x-more\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\nt: 1\r\n\r\n";
const CHUNKED_RESPONSE: &str = "HTTP/1.1 200 OK\r\nserver: s\r\ntrailer: u\r\ntransfer-encoding: chunked\r\n\r\n5\r\nworld\r\n0\r\nu: 2\r\n\r\n";

impl Case {
    pub(crate) fn new(configuration: &str) -> Self {
        let wasm = std::fs::read(sdk::build("wasm32-wasip1")).unwrap();
        Self {
            wasm,
            configuration: configuration.to_owned(),
            request: REQUEST.to_owned(),
            response: RESPONSE.to_owned(),
            metrics: &[],
            callees: Vec::new(),
            policy: ("fail_closed", EnvoyPolicy::Closed),
        }
    }

    fn exchange(&self, to: SocketAddr, upstream: &TcpListener) -> (Seen, Option<Seen>) {
        let (tell, told) = mpsc::channel();
        let listener = upstream.try_clone().unwrap();
        let response = self.response.clone();
        let upstream_thread = thread::spawn(move || {
            listener.set_nonblocking(true).unwrap();
            loop {
                if let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(false).unwrap();
                    let request = read_message(&stream);
                    let _ = tell.send(Seen::of(&request));
                    let _ = (&stream).write_all(response.as_bytes());
                    // Until the peer has read it and gone, or the test is over.
                    let _ = stream.set_read_timeout(Some(Duration::from_millis(300)));
                    let _ = (&stream).read(&mut [0]);
                    return;
                }
                // The other end of the channel goes when the client has its answer.
                if tell.send(Seen::default()).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
        let stream = TcpStream::connect(to).unwrap();
        (&stream).write_all(self.request.as_bytes()).unwrap();
        let client = Seen::of(&read_message(&stream));
        let _ = stream.shutdown(Shutdown::Both);
        thread::sleep(Duration::from_millis(50));
        let reached = told.try_iter().find(|seen| *seen != Seen::default());
        drop(told);
        upstream_thread.join().unwrap();
        (client, reached)
    }

    /// Does `work` while an Envoy runs the guest in front of `upstream`.
    pub(crate) fn in_envoy<T>(&self, upstream: SocketAddr, work: impl FnOnce(&Envoy) -> T) -> T {
        let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/envoy/bin/envoy");
        let explicit = std::env::var_os("DRIFTLOCK_ENVOY").is_none().then_some(installed);
        let binary = find_binary(explicit.as_deref()).unwrap_or_else(|error| panic!("{error}"));
        let folder = tempfile::tempdir().unwrap();
        let wasm = folder.path().join("guest.wasm");
        std::fs::write(&wasm, &self.wasm).unwrap();
        let mut options = EnvoyOptions::new(binary, wasm, upstream);
        options.plugin_configuration = self.configuration.clone().into_bytes();
        options.buffer_limit_bytes = Some(BUFFER_LIMIT_BYTES);
        options.trailers = true;
        options.failure_policy = self.policy.1;
        options.callout_clusters = self.callees.clone();
        let envoy = Envoy::start(&options).unwrap_or_else(|error| panic!("{error}"));
        let result = work(&envoy);
        envoy.stop(Duration::from_secs(5)).unwrap();
        result
    }

    /// Does `work` while a gateway runs the guest in front of `upstream`.
    pub(crate) fn in_the_gateway<T>(&self, upstream: SocketAddr, work: impl FnOnce(&Gateway) -> T) -> T {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        write("guest.wasm", &self.wasm);
        write("plugin", self.configuration.as_bytes());
        let mut upstreams = serde_json::json!({"upstream": {"uri": format!("http://{upstream}")}});
        for (name, address, http2) in &self.callees {
            let http = if *http2 { "http2" } else { "http1" };
            upstreams[name] = serde_json::json!({"uri": format!("http://{address}"), "http": http});
        }
        let yaml = serde_json::json!({
            "listeners": [{"address": "127.0.0.1:0"}],
            "admin": "127.0.0.1:0",
            "access_log": "none",
            "workers": 1,
            "filters": [{"name": "driftlock", "module": "guest.wasm", "vm_id": "driftlock", "configuration_file": "plugin",
                "max_buffer": format!("{BUFFER_LIMIT_BYTES}B"), "failure_policy": self.policy.0}],
            "upstreams": upstreams,
            "routes": [{"name": "all", "upstream": "upstream"}],
        });
        let file = write("gateway.yaml", yaml.to_string().as_bytes());
        let gateway = runtime.block_on(Gateway::start_file(&file)).unwrap_or_else(|error| panic!("{error}"));
        let result = work(&gateway);
        runtime.block_on(gateway.shutdown());
        result
    }

    pub(crate) fn through_envoy(&self) -> Outcome {
        let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
        self.in_envoy(upstream.local_addr().unwrap(), |envoy| {
            let (client, reached) = self.exchange(envoy.listen(), &upstream);
            let stats: BTreeMap<_, _> = envoy.stats().unwrap().into_iter().collect();
            let metrics = self.metrics.iter().map(|name| {
                ((*name).to_owned(), stats.get(&format!("wasmcustom.{name}")).copied().unwrap_or(u64::MAX))
            });
            Outcome { client, upstream: reached, metrics: metrics.collect() }
        })
    }

    pub(crate) fn through_the_gateway(&self) -> Outcome {
        let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
        self.in_the_gateway(upstream.local_addr().unwrap(), |gateway| {
            let (client, reached) = self.exchange(gateway.addr, &upstream);
            let page = TcpStream::connect(gateway.admin_addr.unwrap()).unwrap();
            (&page).write_all(b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
            let page = Seen::of(&read_message(&page)).body;
            let value = |name: &str| {
                let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
                line.trim().parse().ok()
            };
            let metrics =
                self.metrics.iter().map(|name| ((*name).to_owned(), value(name).unwrap_or(u64::MAX)));
            Outcome { client, upstream: reached, metrics: metrics.collect() }
        })
    }

    #[track_caller]
    pub(crate) fn same(&self) -> Outcome {
        let envoy = self.through_envoy();
        let gateway = self.through_the_gateway();
        assert!(
            envoy == gateway,
            "manner {:?}:\nin Envoy:        {envoy:#?}\nin the gateway: {gateway:#?}",
            self.configuration
        );
        envoy
    }
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_change_headers_alike() {
    let outcome = Case::new("headers").same();
    assert!(outcome.upstream.unwrap().headers.contains(&"x-set: new".to_owned()));
    Case::new("all headers").same();
    Case::new("").same();
    let outcome = Case::new("twice").same();
    let upstream = outcome.upstream.unwrap().headers;
    assert!(upstream.contains(&"user-agent: 1,2".to_owned()), "{upstream:?}");
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_replace_bodies_alike() {
    for form in ["replace", "prepend", "append", "empty", "grow", "upper"] {
        let mut case = Case::new(&format!("body {form}"));
        // The SDK guest leaves the request's content-length alone, so the request is chunked.
        case.request = CHUNKED_REQUEST.replace("trailer: t, x-more\r\n", "").replace("\r\nt: 1", "");
        case.same();
        // In the trailers' callbacks.
        case.request = CHUNKED_REQUEST.to_owned();
        case.response = CHUNKED_RESPONSE.to_owned();
        case.same();
    }
}

/// A guest that pauses a callback and acts from a tick, on the stream it names then.
fn ticking(place: &str, act: &str) -> Vec<u8> {
    let parameters = if place.ends_with("trailers") { "i32 i32" } else { "i32 i32 i32" };
    wat::parse_str(crate::guest::wat(&format!(
        r#"
      (data (i32.const 100) "from a tick")
      (global $held (mut i32) (i32.const 0))
      (global $ticks (mut i32) (i32.const 0))
      (func (export "proxy_on_vm_start") (param i32 i32) (result i32)
        (drop (call $set_tick_period_milliseconds (i32.const 30))) (i32.const 1))
      (func (export "proxy_on_tick") (param i32)
        (global.set $ticks (i32.add (global.get $ticks) (i32.const 1)))
        (if (i32.and (i32.ne (global.get $held) (i32.const 0)) (i32.gt_u (global.get $ticks) (i32.const 3))) (then
          (drop (call $set_effective_context (global.get $held)))
          (global.set $held (i32.const 0))
          {act})))
      (func (export "proxy_on_{place}") (param {parameters}) (result i32)
        (global.set $held (local.get 0))
        (global.set $ticks (i32.const 0))
        (i32.const 1))"#
    )))
    .unwrap()
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_act_alike_from_ticks() {
    let resume = |response: u8| format!("(drop (call $continue_stream (i32.const {response})))");
    let reset = |response: u8| format!("(drop (call $close_stream (i32.const {response})))");
    let reply = "(drop (call $send_local_response (i32.const 418) (i32.const 0) (i32.const 0)
        (i32.const 100) (i32.const 11) (i32.const 0) (i32.const 0) (i32.const -1)))";
    for (place, response) in [
        ("request_headers", 0),
        ("request_body", 0),
        ("request_trailers", 0),
        ("response_headers", 1),
        ("response_body", 1),
        ("response_trailers", 1),
    ] {
        for act in [resume(response), reset(response), reply.to_owned()] {
            let mut case = Case::new("");
            case.wasm = ticking(place, &act);
            // Trailers would release a body that waits.
            if !place.ends_with("body") {
                case.request = CHUNKED_REQUEST.to_owned();
                case.response = CHUNKED_RESPONSE.to_owned();
            }
            let (mut envoy, mut gateway) = (case.through_envoy(), case.through_the_gateway());
            let goes_on = act.contains("continue");
            if !goes_on {
                // How much had left on either side when it was broken off is a race in either proxy.
                for outcome in [&mut envoy, &mut gateway] {
                    outcome.upstream = None;
                    if !outcome.client.complete {
                        outcome.client = Seen::default();
                    }
                }
            }
            assert_eq!(envoy, gateway, "{place}: {act}");
            let begun = ["response_body", "response_trailers"].contains(&place);
            let replied = envoy.client.body == "from a tick";
            assert_eq!(replied, act == reply && !begun, "{place}: {act}: {envoy:?}");
            assert_eq!(envoy.client.body == "world", goes_on, "{place}: {act}: {envoy:?}");
        }
    }
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_reply_alike_from_every_callback() {
    for callback in [
        "request headers",
        "request body",
        "request trailers",
        "response headers",
        "response body",
        "response trailers",
    ] {
        let mut case = Case::new(&format!("reply {callback}"));
        if callback.ends_with("trailers") {
            case.request = CHUNKED_REQUEST.to_owned();
            case.response = CHUNKED_RESPONSE.to_owned();
        }
        let (mut envoy, mut gateway) = (case.through_envoy(), case.through_the_gateway());
        if ["request body", "request trailers"].contains(&callback) {
            // How much of the request has left when the reply stops it is a race in either.
            (envoy.upstream, gateway.upstream) = (None, None);
        }
        if callback == "response body" {
            // Broken off in both; whether the headers before it still leave the gateway is a race.
            for client in [&mut envoy.client, &mut gateway.client] {
                assert!(!client.complete);
                *client = Seen::default();
            }
        }
        assert_eq!(envoy, gateway, "{callback}");
        let begun = ["response body", "response trailers"].contains(&callback);
        assert_eq!(envoy.client.body == "tea\n", !begun, "{callback}: {envoy:?}");
    }
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_pass_trailers_alike() {
    let mut case = Case::new("");
    case.request = CHUNKED_REQUEST.to_owned();
    case.response = CHUNKED_RESPONSE.to_owned();
    let outcome = case.same();
    assert_eq!(outcome.upstream.unwrap().trailers.len(), 2);
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_reset_and_crash_alike() {
    Case::new("reset").same();
    let case = Case::new("panic");
    let (envoy, gateway) = (case.through_envoy(), case.through_the_gateway());
    // The gateway says in the body what happened, which Envoy only logs.
    assert_eq!(envoy.client.start, "HTTP/1.1 503");
    assert_eq!((gateway.client.start, gateway.upstream), (envoy.client.start, envoy.upstream));
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_count_alike() {
    let mut case = Case::new("metrics");
    case.metrics = &["c", "g"];
    let outcome = case.same();
    assert_eq!(outcome.metrics["c"], 6);
}
