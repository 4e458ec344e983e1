//! What a guest can read of an exchange by name, in a real Envoy and in the gateway.
//! Needs an Envoy: `cargo test --release -p driftlock-host --test abi -- --ignored envoy`.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use crate::through::{Case, Seen, read_message};

/// Values of the moment, of which only the length is compared.
const OF_THE_MOMENT: [&str; 8] = [
    "request.time",
    "request.duration",
    "source.address",
    "source.port",
    "destination.address",
    "destination.port",
    "upstream.local_address",
    "connection.id",
];

/// What differs on purpose.
const DIFFERENT: [(&str, &str); 13] = [
    ("listener_direction", "Envoy's listener has none unless it is given one; the gateway's is inbound"),
    ("xds.listener_direction", "the same"),
    ("request", "Envoy says that it cannot write it down; here it is not found"),
    ("filter_state", "the same"),
    ("request.headers", "in no order in Envoy, which adds x-forwarded-proto"),
    ("request.total_size", "the same"),
    ("response.headers", "in no order in Envoy, which adds date"),
    ("response.total_size", "the same"),
    ("response.backend_latency", "not measured"),
    ("upstream.address", "filters are not told of the upstream's connection, nor of the next three"),
    ("upstream.local_address", ""),
    ("upstream.port", ""),
    ("upstream.request_attempt_count", ""),
];

fn upstream() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                while !read_message(&stream).is_empty() {
                    let head = "HTTP/1.1 200 OK\r\nx-u: u\r\ngrpc-status: 5\r\ncontent-length: 2\r\n\r\nok";
                    let _ = (&stream).write_all(head.as_bytes());
                }
            });
        }
    });
    address
}

/// By phase and name: what the guest read.
fn told(proxy: SocketAddr) -> BTreeMap<String, String> {
    let ask = |request: &str| {
        let stream = TcpStream::connect(proxy).unwrap();
        (&stream).write_all(request.as_bytes()).unwrap();
        Seen::of(&read_message(&stream)).body
    };
    let head = "host: a.example:80\r\nx-a: 1\r\nx-a: 2\r\nuser-agent: me\r\nreferer: there\r\nx-request-id: id\r\ncontent-length: 5";
    ask(&format!("POST /p/q?r=s&t HTTP/1.1\r\n{head}\r\n\r\nhello"));
    thread::sleep(Duration::from_millis(200));
    let told = ask("GET /told HTTP/1.1\r\nhost: a\r\n\r\n");
    told.lines()
        .map(|line| {
            let mut parts = line.splitn(4, ' ');
            let mut next = || parts.next().unwrap_or_default();
            let (phase, name, length, value) = (next(), next(), next(), next());
            let value = if OF_THE_MOMENT.contains(&name) { "" } else { value };
            // An address has a port, of one length or another.
            let length = if name.ends_with("address") && length != "-" { "some" } else { length };
            (format!("{phase} {name}"), format!("{length} {value}"))
        })
        .collect()
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_show_the_same_attributes() {
    let case = Case::new("attributes");
    let upstream = upstream();
    let envoy = case.in_envoy(upstream, |envoy| told(envoy.listen()));
    let gateway = case.in_the_gateway(upstream, |gateway| told(gateway.addr));
    assert_eq!(envoy.len(), gateway.len());
    let mut different = String::new();
    for (name, theirs) in &envoy {
        let ours = &gateway[name];
        let known = DIFFERENT.iter().any(|(known, _)| name.split(' ').nth(1) == Some(*known));
        if theirs != ours && !known {
            different += &format!("{name}:\n  {theirs}\n  {ours}\n");
        }
    }
    assert!(different.is_empty(), "Envoy, then the gateway:\n{different}");
}
