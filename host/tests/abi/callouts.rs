//! A guest's own calls over real sockets, through a real Envoy and through the gateway: the guest tells
//! its client what it saw, and both tell the same.
//! Needs an Envoy: `cargo test --release -p driftlock-host --test abi -- --ignored envoy`.

use std::convert::Infallible;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::through::{Case, Seen, read_message};

/// Answers every request with the same bytes and tells what it was sent; an empty answer never comes,
/// and one of nothing but `hang up` is the end of the connection.
fn http1(answer: &'static str) -> (SocketAddr, mpsc::Receiver<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let tell = tell.clone();
            thread::spawn(move || {
                let request = read_message(&stream);
                if !request.is_empty() {
                    let _ = tell.send(Seen::of(&request));
                }
                if answer != "hang up" {
                    let _ = stream.write_all(answer.as_bytes());
                    let cut = answer.contains("content-length: 9");
                    let patience = Duration::from_millis(if cut { 50 } else { 1000 });
                    let _ = stream.set_read_timeout(Some(patience));
                    let _ = stream.read(&mut [0]);
                }
            });
        }
    });
    (address, told)
}

/// A port that nobody listens on.
fn closed() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Asks the proxy about each callee in turn, and says what the guest told.
fn ask(proxy: SocketAddr, callees: &[(String, SocketAddr, bool)]) -> Vec<String> {
    let ask = |name: &String| {
        let stream = TcpStream::connect(proxy).unwrap();
        write!(&stream, "GET / HTTP/1.1\r\nhost: a\r\nx-to: {name}\r\n\r\n").unwrap();
        Seen::of(&read_message(&stream)).body
    };
    callees.iter().map(|(name, ..)| ask(name)).collect()
}

/// What guests told in Envoy and in the gateway, callee by callee.
fn in_both(manner: &str, callees: Vec<(String, SocketAddr, bool)>) -> Vec<(String, String, String)> {
    let mut case = Case::new(manner);
    case.callees = callees;
    // Nothing goes on to it.
    let upstream = closed();
    let envoy = case.in_envoy(upstream, |envoy| ask(envoy.listen(), &case.callees));
    let gateway = case.in_the_gateway(upstream, |gateway| ask(gateway.addr, &case.callees));
    let names = case.callees.iter().map(|(name, ..)| name.clone());
    names.zip(envoy.into_iter().zip(gateway)).map(|(name, (envoy, gateway))| (name, envoy, gateway)).collect()
}

const WHOLE: &str = "HTTP/1.1 200 OK\r\nx-t: seen\r\ntrailer: t\r\ntransfer-encoding: chunked\r\n\r\n3\r\nyes\r\n0\r\nt: 1\r\n\r\n";
const CUT: &str = "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nyes";

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_carry_http_calls_alike() {
    let made_up = |status, reason| {
        let text = "upstream connect error or disconnect/reset before headers. reset reason";
        format!("{status}  \"{text}: {reason}\" None")
    };
    let cases = [
        ("whole", WHOLE, r#"200 seen "yes" Some("1")"#.to_owned()),
        ("empty", "HTTP/1.1 204 No Content\r\nx-t: none\r\n\r\n", r#"204 none "" None"#.to_owned()),
        ("cut", CUT, "failed 0 0".to_owned()),
        ("silent", "", r#"504  "upstream request timeout" None"#.to_owned()),
        ("hanging-up", "hang up", made_up(503, "connection termination")),
        ("nonsense", "HTTP/9 what\r\n\r\n", made_up(502, "protocol error")),
    ];
    let mut sent = Vec::new();
    let mut callees = Vec::new();
    for (name, answer, _) in &cases {
        let (address, requests) = http1(answer);
        callees.push(((*name).to_owned(), address, false));
        sent.push(requests);
    }
    callees.push(("closed".to_owned(), closed(), false));
    let told = in_both("tell http", callees);
    let closed = made_up(503, "remote connection failure");
    let expected = cases.iter().map(|(.., told)| told).chain([&closed]);
    for ((name, envoy, gateway), expected) in told.iter().zip(expected) {
        assert_eq!((envoy, gateway), (expected, expected), "{name}");
    }
    for requests in sent {
        let requests: Vec<Seen> = requests.try_iter().collect();
        assert_eq!(requests.len(), 2, "each proxy calls once: {requests:?}");
        for request in requests {
            assert_eq!((request.start.as_str(), request.body.as_str()), ("POST /check?a HTTP/1.1", "who"));
            assert!(request.headers.contains(&"host: auth".to_owned()), "{request:?}");
        }
    }
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_carry_a_ticks_call_alike() {
    for (answer, expected) in [(WHOLE, r#"200 seen "yes" Some("1")"#), (CUT, "failed 0 0")] {
        let (address, requests) = http1(answer);
        let mut case = Case::new("tell tick");
        case.callees = vec![("auth".to_owned(), address, false)];
        let fetch = |proxy| {
            // By then the tick has come and its call is over.
            thread::sleep(Duration::from_millis(500));
            ask(proxy, &case.callees)
        };
        let upstream = closed();
        assert_eq!(case.in_envoy(upstream, |envoy| fetch(envoy.listen())), [expected]);
        assert_eq!(case.in_the_gateway(upstream, |gateway| fetch(gateway.addr)), [expected]);
        for request in requests.try_iter() {
            assert_eq!(request.start, "PUT /tick HTTP/1.1");
        }
    }
}

/// Envoy 1.40 appends its own response code details to the text of a gRPC status, which is the server's.
fn without_details(told: &str) -> String {
    match told.split_once("Some(\"") {
        Some((before, text)) => {
            let text = text.trim_end_matches("\"))").replace("via_upstream", "");
            let text = text.split('{').next().unwrap_or_default();
            if text.is_empty() { format!("{before}None)") } else { format!("{before}Some(\"{text}\"))") }
        }
        None => told.to_owned(),
    }
}

type Answer = fn(&str) -> Response<Full<Bytes>>;

/// A gRPC server that gives `answer` for a path, with `trailers`, if any; with neither it never answers.
fn grpc(answer: Answer, trailers: &'static [(&'static str, &'static str)]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                let service = service_fn(move |request: Request<Incoming>| async move {
                    let (head, body) = request.into_parts();
                    let sent = body.collect().await.unwrap().to_bytes();
                    assert_eq!(head.headers["content-type"], "application/grpc");
                    if head.uri.path().ends_with("Check") {
                        assert_eq!(
                            (&sent[..], &head.headers["x-m"]),
                            (&b"\0\0\0\0\x03who"[..], &HeaderValue::from_static("1"))
                        );
                    } else {
                        assert_eq!(&sent[..], b"\0\0\0\0\x03one\0\0\0\0\x03two");
                    }
                    let response = answer(head.uri.path());
                    if response.headers().contains_key("x-hang") {
                        tokio::time::sleep(Duration::from_secs(3)).await;
                    }
                    let trailers: HeaderMap = trailers
                        .iter()
                        .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
                        .collect();
                    Ok::<_, Infallible>(response.map(|body| match trailers.is_empty() {
                        true => body.boxed(),
                        false => body.with_trailers(async { Some(Ok(trailers)) }).boxed(),
                    }))
                });
                let connection = http2::Builder::new(TokioExecutor::new());
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
            }
        });
    });
    address
}

fn with_body(
    status: u16,
    body: &'static [u8],
    headers: &[(&'static str, &'static str)],
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(body)));
    *response.status_mut() = status.try_into().unwrap();
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    for (name, value) in headers {
        response.headers_mut().insert(*name, HeaderValue::from_static(value));
    }
    response
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_carry_grpc_calls_alike() {
    const FINE: &[(&str, &str)] = &[("grpc-status", "0")];
    const DENIED: &[(&str, &str)] = &[("grpc-status", "7"), ("grpc-message", "not you")];
    let yes: Answer = |_| with_body(200, b"\0\0\0\0\x03yes", &[("x-s", "9")]);
    let two: Answer = |_| with_body(200, b"\0\0\0\0\x01a\0\0\0\0\0", &[]);
    let nothing: Answer = |_| with_body(200, b"", &[]);
    let headers_alone: Answer = |_| with_body(200, b"", &[("grpc-status", "5"), ("grpc-message", "none")]);
    let unavailable: Answer = |_| with_body(503, b"", &[]);
    let lost: Answer = |_| with_body(404, b"", &[]);
    let cut: Answer = |_| with_body(200, b"\0\0\0\0\x09yes", &[]);
    let silent: Answer = |_| with_body(200, b"", &[("x-hang", "1")]);
    let callees = || {
        let callees = [
            ("yes", grpc(yes, FINE)),
            ("denied-after-a-message", grpc(yes, DENIED)),
            ("denied", grpc(nothing, DENIED)),
            ("two-messages", grpc(two, FINE)),
            ("nothing", grpc(nothing, FINE)),
            ("headers-alone", grpc(headers_alone, &[])),
            ("unavailable", grpc(unavailable, &[])),
            ("lost", grpc(lost, &[])),
            ("cut", grpc(cut, FINE)),
            ("no-trailers", grpc(yes, &[])),
            ("closed", closed()),
            ("silent", grpc(silent, FINE)),
        ];
        callees.map(|(name, address)| (name.to_owned(), address, true)).to_vec()
    };
    let mut different = String::new();
    for (manner, yes) in [
        ("tell grpc", r#"0 "yes" (0, None)"#),
        ("tell grpc stream", r#"initial "yes" trailing closed 0 (0, None)"#),
    ] {
        let mut callees = callees();
        if manner == "tell grpc stream" {
            callees.pop(); // a stream has no time-out
        }
        for (name, envoy, gateway) in in_both(manner, callees) {
            let envoy = without_details(&envoy);
            if envoy != gateway || envoy.is_empty() {
                different += &format!("{name}, {manner}:\n  {envoy}\n  {gateway}\n");
            }
            assert!(name != "yes" || gateway == yes, "{gateway}");
        }
    }
    assert!(different.is_empty(), "Envoy, then the gateway:\n{different}");
}
