//! What becomes of traffic when a guest crashes, under each failure policy, in a real Envoy and in the
//! gateway. Needs an Envoy: `cargo test --release -p driftlock-host --test abi -- --ignored envoy`.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use driftlock_host::envoy::FailurePolicy;

use crate::through::{Case, Seen, read_message};

const SHORT: Duration = Duration::from_millis(50);
/// Longer than Envoy's back-off of a second with the half that it adds at random.
const LONG: Duration = Duration::from_millis(1700);

/// An upstream that always answers 200.
fn fine() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                while !read_message(&stream).is_empty() {
                    let _ = (&stream).write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
                }
            });
        }
    });
    address
}

/// Sends requests, each after a wait, and says of each its status and whether the guest saw it.
fn ask(proxy: SocketAddr, requests: &[(Duration, &str)]) -> Vec<String> {
    let ask = |(wait, path): &(Duration, &str)| {
        thread::sleep(*wait);
        let stream = TcpStream::connect(proxy).unwrap();
        write!(&stream, "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
        let seen = Seen::of(&read_message(&stream));
        let marked = seen.headers.contains(&"x-guest: here".to_owned());
        format!("{} {}", seen.start.get(9..).unwrap_or_default(), if marked { "seen" } else { "unseen" })
    };
    requests.iter().map(ask).collect()
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_reload_a_crashed_guest_alike() {
    let mut case = Case::new("crash on demand");
    case.policy = ("fail_reload", FailurePolicy::Reload);
    let upstream = fine();
    let requests = [
        (SHORT, "/"),
        // Soon after the start: the back-off counts from there.
        (SHORT, "/crash"),
        (SHORT, "/"),
        (SHORT, "/"),
        (LONG, "/"),
        // After a life that was longer than the back-off, the next request has a new VM.
        (LONG, "/crash"),
        (Duration::ZERO, "/"),
        // And one that crashes soon is waited for again.
        (SHORT, "/crash"),
        (SHORT, "/"),
        (LONG, "/"),
    ];
    let envoy = case.in_envoy(upstream, |envoy| ask(envoy.listen(), &requests));
    let gateway = case.in_the_gateway(upstream, |gateway| ask(gateway.addr, &requests));
    let (seen, refused) = ("200 seen", "503 unseen");
    let expected =
        [seen, refused, refused, refused, seen, refused, seen, refused, refused, seen].map(str::to_owned);
    assert_eq!(envoy, expected);
    assert_eq!(gateway, expected);
}

/// Envoy never starts another VM under these two; the gateway does, which is the difference that shows.
#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_and_the_gateway_close_and_open_alike_until_the_vm_is_back() {
    let upstream = fine();
    let requests = [(SHORT, "/"), (SHORT, "/crash"), (Duration::ZERO, "/"), (LONG, "/")];
    for (names, envoys, gateways) in [
        (
            ("fail_closed", FailurePolicy::Closed),
            ["200 seen", "503 unseen", "503 unseen", "503 unseen"],
            // The VM is away for some 50 ms; an exchange in that time is refused.
            ["200 seen", "503 unseen", "503 unseen", "200 seen"],
        ),
        (
            ("fail_open", FailurePolicy::Open),
            ["200 seen", "503 unseen", "200 unseen", "200 unseen"],
            // What the crashed guest held goes on without it; Envoy refuses that exchange too.
            ["200 seen", "200 unseen", "200 unseen", "200 seen"],
        ),
    ] {
        let mut case = Case::new("crash on demand");
        case.policy = names;
        assert_eq!(case.in_envoy(upstream, |envoy| ask(envoy.listen(), &requests)), envoys, "{names:?}");
        assert_eq!(
            case.in_the_gateway(upstream, |gateway| ask(gateway.addr, &requests)),
            gateways,
            "{names:?}"
        );
    }
}
