//! Clients, upstreams and filters that misbehave, while others are served.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use driftlock_host::gateway::{FilterSource, Gateway};
use tokio::io::AsyncWriteExt as _;

use crate::configuration::{folder, start};
use crate::{GUEST, Peer, echo, get, options, post, soon, upstream, wasm};

/// A thousand clients that send a byte now and then hold up nobody and are let go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_slow_clients_do_not_slow_the_others() {
    const SLOW: usize = 1000;
    let upstream = echo().await;
    let mut options = options(upstream.address, FilterSource::None);
    options.filter = wasm(GUEST);
    options.client_timeout = Duration::from_secs(3);
    let gateway = Gateway::start(options).await.expect("starts");
    let address = gateway.addr;
    let ended = Arc::new(AtomicUsize::new(0));
    let mut slow = tokio::task::JoinSet::new();
    for index in 0..SLOW {
        let ended = Arc::clone(&ended);
        slow.spawn(async move {
            let mut client = Peer::connect(address).await;
            // Half of them dribble headers, the others a body; none ever finishes.
            if index % 2 == 0 {
                client.send("GET / HTTP/1.1\r\nx-slow: ").await;
            } else {
                client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n").await;
            }
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_millis(500)).await;
                if client.stream.write_all(b"x").await.is_err() {
                    break;
                }
            }
            // Silence from here on: a 408 or the end of the connection has to come.
            while client.more().await {}
            ended.fetch_add(1, Ordering::Relaxed);
        });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut worst = Duration::ZERO;
    let mut client = Peer::connect(address).await;
    for _ in 0..200 {
        let begun = Instant::now();
        let answer = soon("an answer", client.exchange(post("/", "hello"))).await;
        assert_eq!((answer.status(), answer.header("x-seen")), (200, Some("x-seen")));
        worst = worst.max(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(worst < Duration::from_secs(2), "a request took {worst:?}");
    soon("the slow ones are let go", async { while slow.join_next().await.is_some() {} }).await;
    assert_eq!(ended.load(Ordering::Relaxed), SLOW);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_cut() {
    let upstream = upstream(|mut peer| async move {
        peer.head().await;
        let _ = peer.stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n").await;
        let chunk = vec![b'x'; 64 << 10];
        while peer.stream.write_all(&chunk).await.is_ok() {}
    })
    .await;
    let folder = folder(&format!(
        "listeners: [{{address: \"127.0.0.1:0\"}}]\naccess_log: access.jsonl\ntimeouts: {{client: 300ms, drain: 3s}}\nupstreams: {{one: {{uri: \"http://{}\"}}}}\nroutes: [{{upstream: one}}]\n",
        upstream.address
    ));
    let gateway = start(&folder).await;
    let mut client = Peer::connect(gateway.addr).await;
    client.send(get("/")).await;
    // The client is there, and does nothing.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(gateway.shutdown().await, 0, "its connection was still open");
    let log = std::fs::read_to_string(folder.path().join("access.jsonl")).expect("a log");
    assert!(log.contains("client_closed"), "{log}");
}

/// Connections that an upstream resets while they are unused cost no request, and those that it resets
/// in use are told apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upstream_resets_cost_only_what_was_under_way() {
    let upstream = upstream(|mut peer| async move {
        let mut served = 0;
        while let Some(request) = peer.message().await {
            if request.start.contains("/reset") {
                // Linger zero: the peer gets a reset instead of an end.
                let _ = peer.stream.set_zero_linger();
                return;
            }
            let _ = peer.stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            served += 1;
            if served == 3 {
                let _ = peer.stream.set_zero_linger();
                return;
            }
        }
    })
    .await;
    let gateway = Gateway::start(options(upstream.address, FilterSource::None)).await.expect("starts");
    let address = gateway.addr;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..8 {
        clients.spawn(async move {
            let mut client = Peer::connect(address).await;
            let (mut good, mut reset) = (0, 0);
            for index in 0..100 {
                let path = if index % 10 == 9 { "/reset" } else { "/" };
                let answer = soon("an answer", client.exchange(get(path))).await;
                match (path, answer.status()) {
                    ("/", 200) => good += 1,
                    ("/reset", 502) => reset += 1,
                    (_, status) => panic!("{path} {status} {}", answer.text()),
                }
                // The upstream's reset is on its way.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            (good, reset)
        });
    }
    while let Some(counts) = clients.join_next().await {
        assert_eq!(counts.expect("no panic"), (90, 10));
    }
}

/// What was sent on a kept connection that broke goes out once more only if it may be repeated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_idempotent_requests_are_sent_twice() {
    let arrived = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&arrived);
    // Answers each connection's first request, and hangs up over its second once it has read it.
    let upstream = upstream(move |mut peer| {
        let seen = Arc::clone(&seen);
        async move {
            for number in 0..2 {
                let Some(request) = peer.message().await else { return };
                seen.lock().expect("a list").push(request.start.clone());
                if number == 0 {
                    let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                    let _ = peer.stream.write_all(ok).await;
                }
            }
        }
    })
    .await;
    for (method, body, status) in
        [("GET", "", 200), ("DELETE", "", 200), ("PUT", "x", 502), ("POST", "", 502), ("POST", "x", 502)]
    {
        arrived.lock().expect("a list").clear();
        let gateway = Gateway::start(options(upstream.address, FilterSource::None)).await.expect("starts");
        let mut client = Peer::connect(gateway.addr).await;
        let request =
            format!("{method} / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        assert_eq!(soon("an answer", client.exchange(&request)).await.status(), 200);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let answer = soon("an answer", client.exchange(&request)).await;
        assert_eq!(answer.status(), status, "{method} {body:?}: {}", answer.text());
        let count = arrived.lock().expect("a list").len();
        assert_eq!(count, if status == 200 { 3 } else { 2 }, "{method} {body:?}");
    }
}

/// A request that crashes its VM leaves alone those on the other, whichever they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trapped_vm_leaves_other_requests_alone() {
    let upstream = echo().await;
    let mut options = options(upstream.address, FilterSource::None);
    options.filter = wasm(GUEST);
    options.workers = 4;
    let gateway = Gateway::start(options).await.expect("starts");
    let mut held = Vec::new();
    // Four exchanges, one on each VM, each with half its body sent.
    for _ in 0..4 {
        let mut client = Peer::connect(gateway.addr).await;
        client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhello").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        held.push(client);
    }
    let mut poison = Peer::connect(gateway.addr).await;
    assert_eq!(soon("a refusal", poison.exchange(post("/", "thirteen char"))).await.status(), 503);
    let mut lost = 0;
    for mut client in held {
        if client.stream.write_all(b"world").await.is_err() {
            lost += 1;
            continue;
        }
        match soon("the rest", client.message()).await {
            Some(answer) if answer.status() == 200 => assert_eq!(answer.text(), "helloworld"),
            _ => lost += 1,
        }
    }
    assert_eq!(lost, 1, "one VM of four was lost, and one exchange with it");
}
