//! The gateway over real TCP on the loopback: raw clients and raw upstreams, so that what is on the
//! wire is what is asserted. Filters are written in Rust where the seam is the subject, and are small
//! WebAssembly guests where the VM is.

mod configuration;
mod faults;
mod protocols;
mod reload;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use driftlock_host::gateway::filter::{
    ConnectionInfo, Direction, FilterError, FilterFactory, FilterState, HeaderPairs, HttpFilter, LocalReply,
    Release, RouteInfo, Step,
};
use driftlock_host::gateway::{
    AccessLogTarget, AccessRecord, FailurePolicy, FilterSource, Gateway, GatewayError, GatewayOptions,
};
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const PATIENCE: Duration = Duration::from_secs(20);

/// Fails a test that hangs.
async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(done) => done,
        Err(_) => panic!("{what} took more than {PATIENCE:?}"),
    }
}

// HTTP/1.1 by hand.

#[derive(Debug, Default, Clone, PartialEq)]
struct Message {
    start: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    trailers: Vec<(String, String)>,
}

impl Message {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn status(&self) -> u16 {
        self.start.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// One side of a connection with what was read beyond the last message.
struct Peer {
    stream: TcpStream,
    rest: Vec<u8>,
}

impl Peer {
    async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("connects");
        stream.set_nodelay(true).expect("nodelay");
        Self { stream, rest: Vec::new() }
    }

    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.expect("writes");
    }

    /// Reads more; false at the end of the stream or when it was reset.
    async fn more(&mut self) -> bool {
        let mut buffer = vec![0; 16 * 1024];
        match soon("a read", self.stream.read(&mut buffer)).await {
            Ok(0) | Err(_) => false,
            Ok(count) => {
                self.rest.extend_from_slice(&buffer[..count]);
                true
            }
        }
    }

    async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.rest.windows(2).position(|two| two == b"\r\n") {
                let line: Vec<u8> = self.rest.drain(..end + 2).collect();
                return Some(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    async fn fields(&mut self) -> Option<Vec<(String, String)>> {
        let mut fields = Vec::new();
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Some(fields);
            }
            let (name, value) = line.split_once(':').expect("a field");
            fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    async fn exactly(&mut self, count: usize) -> Option<Vec<u8>> {
        while self.rest.len() < count {
            if !self.more().await {
                return None;
            }
        }
        Some(self.rest.drain(..count).collect())
    }

    async fn head(&mut self) -> Option<Message> {
        let start = self.line().await?;
        let headers = self.fields().await?;
        Some(Message { start, headers, ..Message::default() })
    }

    /// One chunk of a chunked body; empty for the last.
    async fn chunk(&mut self) -> Option<Vec<u8>> {
        let size = usize::from_str_radix(&self.line().await?, 16).expect("a chunk size");
        if size == 0 {
            return Some(Vec::new());
        }
        let chunk = self.exactly(size).await?;
        assert_eq!(self.line().await?, "");
        Some(chunk)
    }

    /// A whole message; `None` when the peer ended the connection before the message was over.
    async fn message(&mut self) -> Option<Message> {
        let mut message = self.head().await?;
        if message.header("transfer-encoding") == Some("chunked") {
            loop {
                let chunk = self.chunk().await?;
                if chunk.is_empty() {
                    break;
                }
                message.body.extend(chunk);
            }
            message.trailers = self.fields().await?;
        } else if let Some(length) = message.header("content-length") {
            let length = length.parse().expect("a length");
            message.body = self.exactly(length).await?;
        }
        Some(message)
    }

    async fn exchange(&mut self, request: impl AsRef<[u8]>) -> Message {
        self.send(request).await;
        self.message().await.expect("a whole response")
    }

    /// Whether the other side ends or resets the connection without another byte.
    async fn ends(&mut self) -> bool {
        self.rest.is_empty() && !self.more().await
    }
}

/// Serves every connection with `serve`; counts connections.
struct Upstream {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn upstream<F, C>(serve: F) -> Upstream
where
    F: Fn(Peer) -> C + Send + 'static,
    C: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("an address");
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&connections);
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counter.fetch_add(1, Ordering::SeqCst);
            stream.set_nodelay(true).expect("nodelay");
            tokio::spawn(serve(Peer { stream, rest: Vec::new() }));
        }
    });
    Upstream { address, connections, task }
}

/// Answers each request with its own head and body, keeping the connection.
async fn echo() -> Upstream {
    upstream(|mut peer| async move {
        while let Some(request) = peer.message().await {
            let mut head = format!("HTTP/1.1 200 OK\r\nx-start: {}\r\n", request.start);
            for (name, value) in &request.headers {
                head += &format!("x-got: {name}={value}\r\n");
            }
            for (name, value) in &request.trailers {
                head += &format!("x-got-trailer: {name}={value}\r\n");
            }
            head += &format!("content-length: {}\r\n\r\n", request.body.len());
            let _ = peer.stream.write_all(&[head.as_bytes(), &request.body].concat()).await;
        }
    })
    .await
}

// A filter in Rust that does what the request's path says.

#[derive(Default)]
struct Script {
    path: String,
    held: [Release; 2],
    seen_bytes: [usize; 2],
    ends: [bool; 2],
    resumed: Arc<Mutex<(Option<Step>, Option<Waker>)>>,
}

struct Scripts {
    finished: Arc<AtomicUsize>,
}

impl FilterFactory for Scripts {
    fn open(&self, _: &ConnectionInfo, _: &RouteInfo) -> Result<Box<dyn HttpFilter>, FilterError> {
        Ok(Box::new(Counted { script: Script::default(), finished: Arc::clone(&self.finished) }))
    }
}

/// Counts how many filters were told of their end.
struct Counted {
    script: Script,
    finished: Arc<AtomicUsize>,
}

fn value<'p>(headers: &'p HeaderPairs, name: &str) -> &'p str {
    let found = headers.iter().find(|(key, _)| key == name.as_bytes());
    found.map_or("", |(_, value)| std::str::from_utf8(value).expect("text"))
}

fn reply(status: u16, body: &'static str) -> Step {
    Step::Reply(LocalReply {
        status,
        headers: vec![(b"x-by".to_vec(), b"filter".to_vec())],
        body: Bytes::from_static(body.as_bytes()),
        details: "scripted".to_owned(),
        through_filter: true,
    })
}

fn crash() -> Result<Step, FilterError> {
    Err(FilterError::Crashed("scripted".to_owned()))
}

impl Script {
    fn keep(&mut self, direction: Direction, piece: Release) {
        self.held[direction as usize].append(piece);
    }

    fn let_go(&mut self, direction: Direction) -> Release {
        std::mem::take(&mut self.held[direction as usize])
    }

    fn resume_later(&self, step: Step) {
        let resumed = Arc::clone(&self.resumed);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            let mut resumed = resumed.lock().expect("lock");
            resumed.0 = Some(step);
            if let Some(waker) = resumed.1.take() {
                waker.wake();
            }
        });
    }

    fn step(&mut self, direction: Direction, piece: Release) -> Result<Step, FilterError> {
        let request = direction == Direction::Request;
        let (is_headers, is_body, end) = (piece.headers.is_some(), !piece.body.is_empty(), piece.end);
        self.keep(direction, piece);
        match (self.path.as_str(), request) {
            ("/reply-headers", true) if is_headers => return Ok(reply(403, "refused at the headers")),
            ("/reply-body", true) if is_body => return Ok(reply(403, "refused in the body")),
            ("/reply-response", false)
                if is_headers && value(self.headers(direction), "x-by") != "filter" =>
            {
                return Ok(reply(403, "response refused"));
            }
            ("/reply-late", false) if is_body => return Ok(reply(403, "too late")),
            ("/close", true) => return Ok(Step::Close),
            ("/hold-request-body", true) if !is_headers && !end => return Ok(Step::Hold { read_on: true }),
            ("/hold-request", true) | ("/hold-response", false) => {
                if !end {
                    return Ok(Step::Hold { read_on: true });
                }
                let length = self.held[direction as usize].body.len().to_string();
                let headers = self.held[direction as usize].headers.as_mut().expect("headers are held");
                headers.push((b"x-held-bytes".to_vec(), length.into_bytes()));
            }
            ("/pause", true) if is_headers => {
                let all = self.let_go(direction);
                self.resume_later(Step::Forward(all));
                return Ok(Step::Hold { read_on: false });
            }
            ("/reply-later", true) if end => self.resume_later(reply(409, "decided later")),
            ("/crash-request-headers", true) if is_headers => return crash(),
            ("/crash-request-body", true) if is_body => return crash(),
            ("/crash-held-request", true) => {
                return if end { crash() } else { Ok(Step::Hold { read_on: true }) };
            }
            ("/crash-response-headers", false) if is_headers => return crash(),
            ("/crash-response-body", false) if is_body => return crash(),
            ("/grow", false) if is_body => {
                self.keep(direction, Release { body: Bytes::from_static(b"!"), ..Release::default() })
            }
            ("/stuck", true) => return Ok(Step::Hold { read_on: true }),
            _ => {}
        }
        Ok(Step::Forward(self.let_go(direction)))
    }

    fn headers(&self, direction: Direction) -> &HeaderPairs {
        self.held[direction as usize].headers.as_ref().expect("headers")
    }
}

impl HttpFilter for Counted {
    fn headers(
        &mut self,
        direction: Direction,
        headers: HeaderPairs,
        end: bool,
    ) -> Result<Step, FilterError> {
        if direction == Direction::Request {
            self.script.path = value(&headers, ":path").to_owned();
        }
        self.script.ends[direction as usize] |= end;
        self.script.step(direction, Release { headers: Some(headers), end, ..Release::default() })
    }

    fn body(&mut self, direction: Direction, body: Bytes, end: bool) -> Result<Step, FilterError> {
        assert!(!self.script.ends[direction as usize], "body after the end");
        self.script.seen_bytes[direction as usize] += body.len();
        self.script.ends[direction as usize] |= end;
        self.script.step(direction, Release { body, end, ..Release::default() })
    }

    fn trailers(&mut self, direction: Direction, trailers: HeaderPairs) -> Result<Step, FilterError> {
        assert!(!self.script.ends[direction as usize], "trailers after the end");
        self.script.ends[direction as usize] = true;
        self.script.step(direction, Release { trailers: Some(trailers), end: true, ..Release::default() })
    }

    fn poll_resumed(
        &mut self,
        direction: Direction,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Step, FilterError>> {
        if direction == Direction::Request && self.script.path == "/pause" {
            return self.poll_script(cx);
        }
        Poll::Pending
    }

    fn poll_interrupted(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step, FilterError>> {
        if self.script.path == "/reply-later" {
            return self.poll_script(cx);
        }
        Poll::Pending
    }

    fn take_held(&mut self, direction: Direction) -> Release {
        self.script.let_go(direction)
    }

    fn finish(self: Box<Self>) -> FilterState {
        self.finished.fetch_add(1, Ordering::SeqCst);
        let [request, response] = self.script.seen_bytes;
        let [request_end, response_end] = self.script.ends;
        let verdict = format!(
            r#"{{"request_bytes":{request},"response_bytes":{response},"request_end":{request_end},"response_end":{response_end}}}"#
        );
        BTreeMap::from([("wasm.driftlock.test".to_owned(), verdict.into_bytes())])
    }
}

impl Counted {
    fn poll_script(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step, FilterError>> {
        let mut resumed = self.script.resumed.lock().expect("lock");
        match resumed.0.take() {
            Some(step) => Poll::Ready(Ok(step)),
            None => {
                resumed.1 = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

// A gateway with its log.

struct Running {
    gateway: Gateway,
    log: Receiver<AccessRecord>,
    finished: Arc<AtomicUsize>,
}

fn options(upstream: SocketAddr, filter: FilterSource) -> GatewayOptions {
    let mut options = GatewayOptions::new(format!("http://{upstream}").parse().expect("a URI"), filter);
    options.workers = 2;
    options.drain_timeout = Duration::from_secs(5);
    options
}

async fn start_with(mut options: GatewayOptions) -> Running {
    let (sender, log) = channel();
    options.access_log = AccessLogTarget::Channel(sender);
    let finished = Arc::new(AtomicUsize::new(0));
    if let FilterSource::None = options.filter {
        options.filter = FilterSource::Native(Arc::new(Scripts { finished: Arc::clone(&finished) }));
    }
    Running { gateway: Gateway::start(options).await.expect("starts"), log, finished }
}

async fn start(upstream: &Upstream) -> Running {
    start_with(options(upstream.address, FilterSource::None)).await
}

impl Running {
    async fn client(&self) -> Peer {
        Peer::connect(self.gateway.addr).await
    }

    /// The next line of the access log.
    async fn record(&self) -> AccessRecord {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(record) = self.log.try_recv() {
                return record;
            }
            assert!(Instant::now() < deadline, "no access log line");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: test.example\r\n\r\n")
}

fn post(path: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: test.example\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn random_bytes(random: &mut ChaCha8Rng, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    random.fill_bytes(&mut bytes);
    bytes
}

/// Cuts `bytes` at random and gives each piece its chunk framing.
fn random_chunks(random: &mut ChaCha8Rng, bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut chunks = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let size = 1 + random.next_u32() as usize % rest.len().min(7000);
        let (chunk, more) = rest.split_at(size);
        chunks.push([format!("{size:x}\r\n").as_bytes(), chunk, b"\r\n"].concat());
        rest = more;
    }
    chunks
}

const MULTI: tokio::runtime::RuntimeFlavor = tokio::runtime::RuntimeFlavor::MultiThread;

fn assert_runtime() {
    assert_eq!(tokio::runtime::Handle::current().runtime_flavor(), MULTI);
}

// Bodies and headers.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_are_byte_identical_both_ways_for_any_chunking() {
    assert_runtime();
    let upstream = upstream(|mut peer| async move {
        while let Some(request) = peer.message().await {
            let mut random = ChaCha8Rng::seed_from_u64(request.body.len() as u64);
            peer.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
            for chunk in random_chunks(&mut random, &request.body) {
                peer.send(chunk).await;
            }
            peer.send("0\r\n\r\n").await;
        }
    })
    .await;
    let running = start(&upstream).await;
    let mut random = ChaCha8Rng::seed_from_u64(7);
    for path in ["/", "/hold-request-body", "/hold-request", "/hold-response"] {
        let mut client = running.client().await;
        for size in [1, 2, 100, 4096, 70_000, 1_000_000] {
            let body = random_bytes(&mut random, size);
            client
                .send(format!("POST {path} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"))
                .await;
            for chunk in random_chunks(&mut random, &body) {
                client.send(chunk).await;
            }
            client.send("0\r\n\r\n").await;
            let response = client.message().await.expect("a response");
            assert!(response.body == body, "{path} {size}: {} bytes came back", response.body.len());
            let record = running.record().await;
            assert_eq!((record.bytes_in, record.bytes_out), (size as u64, size as u64), "{path}");
            assert_eq!(record.outcome, "complete");
            let seen = format!(
                r#""request_bytes":{size},"response_bytes":{size},"request_end":true,"response_end":true"#
            );
            assert!(record.to_json().contains(&seen), "{path}: {}", record.to_json());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_body_does_not_wait_for_its_end_in_the_gateway() {
    // 64 MiB through a filter that holds nothing, against an upstream that answers each 1 MiB.
    const MIB: usize = 1 << 20;
    let upstream = upstream(|mut peer| async move {
        let Some(_) = peer.head().await else { return };
        peer.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        for _ in 0..64 {
            let Some(part) = peer.exactly(MIB).await else { return };
            assert!(part.iter().all(|byte| *byte == b'x'));
            peer.send("2\r\nok\r\n").await;
        }
        peer.send("0\r\n\r\n").await;
    })
    .await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    client.send(format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", 64 * MIB)).await;
    let part = vec![b'x'; MIB];
    client.send(&part).await;
    let head = client.head().await.expect("the response begins during the request");
    assert_eq!(head.status(), 200);
    assert_eq!(client.chunk().await.expect("a chunk"), b"ok");
    for _ in 1..64 {
        client.send(&part).await;
        assert_eq!(client.chunk().await.expect("a chunk"), b"ok");
    }
    assert_eq!(client.chunk().await.expect("the end"), b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_stops_the_upstream() {
    let written = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&written);
    let upstream = upstream(move |mut peer| {
        let counter = Arc::clone(&counter);
        async move {
            let Some(_) = peer.head().await else { return };
            peer.send("HTTP/1.1 200 OK\r\n\r\n").await;
            let part = vec![b'y'; 64 << 10];
            while peer.stream.write_all(&part).await.is_ok() {
                counter.fetch_add(part.len(), Ordering::SeqCst);
            }
        }
    })
    .await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    client.send(get("/")).await;
    assert_eq!(client.head().await.expect("a head").status(), 200);
    let mut last = 0;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = written.load(Ordering::SeqCst);
        if now == last && now > 0 {
            break;
        }
        last = now;
    }
    // Socket buffers of two connections and one chunk; without back-pressure this grows for ever.
    assert!(last < 64 << 20, "{last} bytes were taken from the upstream for a client that reads nothing");
    assert_eq!(written.load(Ordering::SeqCst), last, "the upstream is still being read");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_pass_in_order_and_hop_by_hop_ones_do_not() {
    let upstream = upstream(|mut peer| async move {
        while let Some(request) = peer.message().await {
            let got: Vec<String> = request.headers.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let body = format!("{}|{}", request.start, got.join("|"));
            peer.send(format!(
                "HTTP/1.1 200 OK\r\nzulu: 1\r\nset-cookie: a=1\r\nset-cookie: b=2\r\nkeep-alive: timeout=5\r\n\
                 connection: x-hop\r\nx-hop: 1\r\nalpha: \u{e9}\r\nx-request-id: abc\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            ))
            .await;
        }
    })
    .await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    let response = client
        .exchange(
            "PUT /a?b=%20c HTTP/1.1\r\nHost: shop.example\r\nX-Z: 1\r\nX-A: 2\r\nX-Z: 3\r\nConnection: close, X-Gone\r\n\
             X-Gone: 1\r\nUpgrade: h2c\r\nProxy-Connection: keep-alive\r\nx-request-id: me\r\nContent-Length: 2\r\n\r\nhi",
        )
        .await;
    assert_eq!(
        response.text(),
        "PUT /a?b=%20c HTTP/1.1|host=shop.example|x-z=1|x-z=3|x-a=2|x-request-id=me|content-length=2"
    );
    let names: Vec<&str> = response.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[..5], ["zulu", "set-cookie", "set-cookie", "alpha", "x-request-id"], "{names:?}");
    assert!(!names.contains(&"x-hop") && !names.contains(&"keep-alive"), "{names:?}");
    assert_eq!(response.header("alpha"), Some("\u{e9}"));
    assert!(!names.iter().any(|name| name.starts_with("x-envoy") || *name == "server"), "{names:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn framing_is_kept() {
    let upstream = echo().await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    let response = client.exchange(get("/none")).await;
    let got: Vec<&str> = response
        .headers
        .iter()
        .filter(|(name, _)| name == "x-got")
        .map(|(_, value)| value.as_str())
        .collect();
    assert_eq!(got, ["host=test.example"], "a GET without a body gets no framing");
    let response = client.exchange(post("/empty", "")).await;
    assert!(response.headers.contains(&("x-got".to_owned(), "content-length=0".to_owned())), "{response:?}");
    let response = client
        .exchange("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n")
        .await;
    assert!(
        response.headers.contains(&("x-got".to_owned(), "transfer-encoding=chunked".to_owned())),
        "{response:?}"
    );
    assert_eq!(response.body, b"ab");
    // Both framings at once is how requests are smuggled; the length must not go on.
    let response = client
        .exchange("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n")
        .await;
    if response.status() == 200 {
        assert!(
            !response.headers.contains(&("x-got".to_owned(), "content-length=3".to_owned())),
            "{response:?}"
        );
    } else {
        assert_eq!(response.status(), 400);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn head_204_and_304_have_no_body_and_keep_the_connection() {
    let upstream = upstream(|mut peer| async move {
        while let Some(request) = peer.message().await {
            let status = match request.start.split(' ').nth(1) {
                Some("/204") => "204 No Content\r\n\r\n",
                Some("/304") => "304 Not Modified\r\netag: \"x\"\r\ncontent-length: 99\r\n\r\n",
                Some("/head-chunked") => "200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
                _ => "200 OK\r\ncontent-length: 12345\r\n\r\n",
            };
            peer.send(format!("HTTP/1.1 {status}")).await;
        }
    })
    .await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    client.send("HEAD /head HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let head = client.head().await.expect("a head");
    assert_eq!((head.status(), head.header("content-length")), (200, Some("12345")));
    client.send("HEAD /head-chunked HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let head = client.head().await.expect("a head");
    assert_eq!((head.status(), head.header("content-length")), (200, None), "{head:?}");
    client.send(get("/204")).await;
    let head = client.head().await.expect("a head");
    assert_eq!(
        (head.status(), head.header("content-length"), head.header("transfer-encoding")),
        (204, None, None)
    );
    client.send(get("/304")).await;
    let head = client.head().await.expect("a head");
    assert_eq!((head.status(), head.header("etag")), (304, Some("\"x\"")));
    client.send("HEAD /head HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(client.head().await.expect("the connection is in step").status(), 200);
    assert_eq!(upstream.connections.load(Ordering::SeqCst), 1);
    for _ in 0..5 {
        assert_eq!(running.record().await.outcome, "complete");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trailers_pass_both_ways() {
    let upstream = upstream(|mut peer| async move {
        while let Some(request) = peer.message().await {
            let got = request.trailers.iter().map(|(name, value)| format!("{name}={value}")).collect::<String>();
            peer.send(format!(
                "HTTP/1.1 200 OK\r\ntrailer: x-sum\r\nx-te: {}\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{got}\r\n0\r\nx-sum: 42\r\n\r\n",
                request.header("te").unwrap_or("none"),
                got.len()
            ))
            .await;
        }
    })
    .await;
    let running = start(&upstream).await;
    for path in ["/", "/hold-response", "/hold-request"] {
        let mut client = running.client().await;
        let response = client
            .exchange(format!(
                "POST {path} HTTP/1.1\r\nhost: a\r\nte: trailers\r\ntrailer: x-check\r\ntransfer-encoding: chunked\r\n\r\n\
                 3\r\nabc\r\n0\r\nx-check: 7\r\n\r\n"
            ))
            .await;
        assert_eq!(response.text(), "x-check=7", "{path}");
        assert_eq!(response.header("x-te"), Some("trailers"), "{path}");
        assert_eq!(response.trailers, [("x-sum".to_owned(), "42".to_owned())], "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_sent_events_arrive_one_by_one() {
    let (go, wait) = tokio::sync::mpsc::channel::<()>(1);
    let wait = Arc::new(tokio::sync::Mutex::new(wait));
    let upstream = upstream(move |mut peer| {
        let wait = Arc::clone(&wait);
        async move {
            let Some(_) = peer.message().await else { return };
            peer.send(
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
            )
            .await;
            peer.send("d\r\ndata: first\n\n\r\n").await;
            // The second event is sent only after the client has seen the first.
            wait.lock().await.recv().await;
            peer.send("e\r\ndata: second\n\n\r\n0\r\n\r\n").await;
        }
    })
    .await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    client.send(post("/stream", "{}")).await;
    assert_eq!(client.head().await.expect("a head").header("content-type"), Some("text/event-stream"));
    assert_eq!(client.chunk().await.expect("the first event"), b"data: first\n\n");
    go.send(()).await.expect("the upstream waits");
    assert_eq!(client.chunk().await.expect("the second event"), b"data: second\n\n");
    assert_eq!(client.chunk().await.expect("the end"), b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interim_responses_are_tolerated_and_expect_is_answered() {
    let upstream = upstream(|mut peer| async move {
        while let Some(request) = peer.message().await {
            peer.send("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n").await;
            let expect = request.header("expect").unwrap_or("none");
            peer.send(format!("HTTP/1.1 200 OK\r\nx-expect: {expect}\r\ncontent-length: 2\r\n\r\nok")).await;
        }
    })
    .await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n").await;
    assert_eq!(client.head().await.expect("an interim response").status(), 100);
    client.send("abc").await;
    let response = client.message().await.expect("a response");
    assert_eq!((response.status(), response.text().as_str()), (200, "ok"));
    assert_eq!(response.header("x-expect"), Some("none"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_reused_on_both_sides() {
    let upstream = echo().await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    for number in 0..20 {
        let body = format!("message {number}");
        assert_eq!(client.exchange(post("/", &body)).await.text(), body);
    }
    assert_eq!(upstream.connections.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_requests_get_clear_answers() {
    let upstream = echo().await;
    let running = start(&upstream).await;
    for (request, status, word) in [
        ("GET / HTTP/1.1\r\n\r\n", 400, "Host"),
        ("CONNECT a.example:443 HTTP/1.1\r\nhost: a.example\r\n\r\n", 405, "tunnel"),
    ] {
        let response = running.client().await.exchange(request).await;
        assert_eq!(response.status(), status, "{request}");
        assert!(response.text().contains(word), "{request}: {}", response.text());
    }
    let response =
        running.client().await.exchange("GET http://real.example/p HTTP/1.1\r\nhost: liar\r\n\r\n").await;
    assert_eq!(response.header("x-start"), Some("GET /p HTTP/1.1"));
    assert_eq!(response.header("x-got"), Some("host=real.example"));
    let response = running.client().await.exchange("OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(response.header("x-start"), Some("OPTIONS * HTTP/1.1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_requests_at_once() {
    let upstream = echo().await;
    let running = start(&upstream).await;
    let address = running.gateway.addr;
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..200_u32 {
        clients.spawn(async move {
            let mut client = Peer::connect(address).await;
            let body = format!("{number} ").repeat(1000);
            for path in ["/", "/hold-request", "/hold-response"] {
                assert_eq!(client.exchange(post(path, &body)).await.text(), body);
            }
        });
    }
    while let Some(client) = soon("200 clients", clients.join_next()).await {
        client.expect("a client");
    }
    for _ in 0..600 {
        assert_eq!(running.record().await.outcome, "complete");
    }
    assert_eq!(running.finished.load(Ordering::SeqCst), 600);
}

// Failures around the gateway.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_refuses_is_a_502_with_a_reason() {
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("binds").local_addr().expect("an address");
    let running = start_with(options(closed, FilterSource::None)).await;
    let mut client = running.client().await;
    for _ in 0..2 {
        let response = client.exchange(post("/", "hello")).await;
        assert_eq!(response.status(), 502);
        assert_eq!(response.header("content-type"), Some("application/json"));
        let body: serde_json::Value = serde_json::from_slice(&response.body).expect("JSON");
        assert_eq!(body["error"]["code"], "upstream_unreachable");
        assert!(
            body["error"]["message"].as_str().is_some_and(|text| text.contains("check that it is running")),
            "{body}"
        );
        let record = running.record().await;
        assert_eq!(
            (record.status, record.from_upstream, record.details.as_str()),
            (Some(502), false, "upstream_unreachable")
        );
        // The filter sees the gateway's reply as a response.
        assert!(record.to_json().contains(r#""response_end":true"#), "{}", record.to_json());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_does_not_answer_is_a_504() {
    let upstream = upstream(|mut peer| async move {
        let _ = peer.message().await;
        std::future::pending::<()>().await;
    })
    .await;
    let mut options = options(upstream.address, FilterSource::None);
    options.upstream_timeout = Duration::from_millis(300);
    let running = start_with(options).await;
    let begun = Instant::now();
    let response = running.client().await.exchange(post("/", "hello")).await;
    assert_eq!(response.status(), 504);
    assert!(response.text().contains("upstream_timeout"), "{}", response.text());
    assert!(begun.elapsed() >= Duration::from_millis(290), "{:?}", begun.elapsed());
    // A client that is still sending is not the upstream's fault.
    let mut client = running.client().await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n").await;
    for byte in ["a", "b", "c", "d"] {
        tokio::time::sleep(Duration::from_millis(450)).await;
        assert!(client.rest.is_empty());
        client.send(byte).await;
    }
    let sent = Instant::now();
    assert_eq!(client.message().await.expect("a response").status(), 504);
    assert!(sent.elapsed() >= Duration::from_millis(290), "{:?}", sent.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_stalls_in_its_body_is_a_408() {
    let upstream = echo().await;
    let mut options = options(upstream.address, FilterSource::None);
    options.client_timeout = Duration::from_millis(200);
    let running = start_with(options).await;
    let mut client = running.client().await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nab").await;
    assert_eq!(client.message().await.expect("a response").status(), 408);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_dies_is_never_a_clean_end() {
    let upstream = upstream(|mut peer| async move {
        let Some(request) = peer.message().await else { return };
        let head = match request.start.split(' ').nth(1) {
            Some("/length") => "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this",
            Some("/nothing") => "",
            _ => "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nonly this\r\n",
        };
        peer.send(head).await;
    })
    .await;
    let running = start(&upstream).await;
    for path in ["/length", "/chunked"] {
        let mut client = running.client().await;
        client.send(get(path)).await;
        assert_eq!(client.message().await, None, "{path}: a cut response looks whole");
        let record = running.record().await;
        assert_eq!(
            (record.outcome, record.status, record.bytes_out),
            ("upstream_aborted", Some(200), 9),
            "{path}"
        );
        assert!(record.to_json().contains(r#""response_bytes":9,"request_end":true,"response_end":false"#));
    }
    // Nothing had gone out yet, so the client can be told.
    for path in ["/nothing", "/hold-response"] {
        let response = running.client().await.exchange(get(path)).await;
        assert_eq!(response.status(), 502, "{path}");
        running.record().await;
    }
    assert_eq!(running.finished.load(Ordering::SeqCst), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_stalls_in_its_body_is_cut() {
    let upstream = upstream(|mut peer| async move {
        let Some(_) = peer.message().await else { return };
        peer.send("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this").await;
        std::future::pending::<()>().await;
    })
    .await;
    let mut options = options(upstream.address, FilterSource::None);
    options.upstream_timeout = Duration::from_millis(200);
    let running = start_with(options).await;
    let mut client = running.client().await;
    client.send(get("/")).await;
    assert_eq!(client.message().await, None);
    assert_eq!(running.record().await.outcome, "upstream_stalled");
    let response = running.client().await.exchange(get("/hold-response")).await;
    assert_eq!(response.status(), 504);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_cancels_the_upstream_and_ends_the_filter() {
    let (sender, mut cancelled) = tokio::sync::mpsc::channel(4);
    let upstream = upstream(move |mut peer| {
        let sender = sender.clone();
        async move {
            let Some(request) = peer.head().await else { return };
            if request.start.contains("/streaming") {
                peer.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n").await;
            }
            while peer.more().await {}
            let _ = sender.send(request.start).await;
        }
    })
    .await;
    let running = start(&upstream).await;
    // While waiting for the answer, during the answer, and in the middle of the request.
    for (request, answered) in [
        (get("/waiting"), false),
        (get("/streaming"), true),
        ("POST /sending HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabc".to_owned(), false),
    ] {
        let mut client = running.client().await;
        client.send(&request).await;
        if answered {
            assert_eq!(client.head().await.expect("a head").status(), 200);
            assert_eq!(client.chunk().await.expect("a chunk"), b"hi");
        } else {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        drop(client);
        let start = soon("the cancellation", cancelled.recv()).await.expect("cancelled");
        assert!(request.starts_with(&start), "{start}");
        assert_eq!(running.record().await.outcome, "client_closed", "{start}");
    }
    assert_eq!(running.finished.load(Ordering::SeqCst), 3);
}

// What a filter may do.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_answers_in_the_upstreams_place() {
    let upstream = echo().await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    for (path, text) in [
        ("/reply-headers", "refused at the headers"),
        ("/reply-body", "refused in the body"),
        ("/reply-response", "response refused"),
    ] {
        let response = client.exchange(post(path, "hello")).await;
        assert_eq!((response.status(), response.text().as_str()), (403, text), "{path}");
        assert_eq!(response.header("x-by"), Some("filter"));
        let record = running.record().await;
        assert_eq!(
            (record.status, record.from_upstream, record.details.as_str()),
            (Some(403), false, "scripted"),
            "{path}"
        );
        if path == "/reply-headers" {
            assert_eq!(upstream.connections.load(Ordering::SeqCst), 0, "the request went on");
        }
    }
    let response = client.exchange(get("/reply-later")).await;
    assert_eq!(response.status(), 200, "an exchange that is over is not answered again");
    // Once the response is under way its status stands, so the exchange is cut.
    let mut client = running.client().await;
    client.send(post("/reply-late", "hello")).await;
    assert_eq!(client.message().await, None);
    let mut client = running.client().await;
    client.send(get("/close")).await;
    assert!(client.ends().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_decides_while_the_upstream_is_silent() {
    let upstream = upstream(|mut peer| async move { while peer.more().await {} }).await;
    let running = start(&upstream).await;
    let response = running.client().await.exchange(post("/reply-later", "hello")).await;
    assert_eq!((response.status(), response.text().as_str()), (409, "decided later"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_message_goes_on_when_it_is_let_go() {
    let upstream = echo().await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    let response = client.exchange(post("/hold-request", "hello")).await;
    assert!(response.headers.contains(&("x-got".to_owned(), "x-held-bytes=5".to_owned())), "{response:?}");
    assert_eq!(response.text(), "hello");
    let response = client.exchange(post("/hold-response", "hello")).await;
    assert_eq!((response.header("x-held-bytes"), response.text().as_str()), (Some("5"), "hello"));
    let begun = Instant::now();
    assert_eq!(client.exchange(post("/pause", "hello")).await.text(), "hello");
    assert!(begun.elapsed() >= Duration::from_millis(90));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_that_never_lets_go_does_not_hold_for_ever() {
    let upstream = echo().await;
    let mut options = options(upstream.address, FilterSource::None);
    options.upstream_timeout = Duration::from_millis(200);
    options.client_timeout = Duration::from_millis(200);
    let running = start_with(options).await;
    let response = running.client().await.exchange(post("/stuck", "hello")).await;
    assert_eq!(response.status(), 504);
    assert!(response.text().contains("filter_held_too_long"), "{}", response.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_longer_than_its_declared_length_is_cut_not_truncated() {
    let upstream = echo().await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    client.send(post("/grow", "hello")).await;
    let message = client.message().await;
    assert!(message.is_none(), "{message:?}");
    assert_eq!(running.record().await.outcome, "body_exceeds_content_length");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_follows_the_failure_policy() {
    let upstream = echo().await;
    let closed = start(&upstream).await;
    for path in
        ["/crash-request-headers", "/crash-request-body", "/crash-held-request", "/crash-response-headers"]
    {
        let response = closed.client().await.exchange(post(path, "hello")).await;
        assert_eq!(response.status(), 503, "{path}");
        assert!(response.text().contains("filter_failed"), "{path}");
        assert!(closed.record().await.filter_failed);
    }
    let mut client = closed.client().await;
    client.send(post("/crash-response-body", "hello")).await;
    assert_eq!(client.message().await, None, "the response had begun");
    assert_eq!(closed.record().await.outcome, "filter_failed");

    let mut open = options(upstream.address, FilterSource::None);
    open.failure_policy = FailurePolicy::FailOpen;
    let open = start_with(open).await;
    for path in [
        "/crash-request-headers",
        "/crash-request-body",
        "/crash-held-request",
        "/crash-response-headers",
        "/crash-response-body",
    ] {
        let response = open.client().await.exchange(post(path, "hello")).await;
        assert_eq!((response.status(), response.text().as_str()), (200, "hello"), "{path}");
        assert_eq!(response.header("x-start"), Some(format!("POST {path} HTTP/1.1").as_str()));
        let record = open.record().await;
        assert!(record.filter_failed && record.outcome == "complete", "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_answer_reaches_a_client_that_is_still_sending() {
    let upstream = upstream(|mut peer| async move {
        let Some(_) = peer.head().await else { return };
        peer.send("HTTP/1.1 413 Content Too Large\r\ncontent-length: 3\r\n\r\nbig").await;
        // Neither reads the body nor closes.
        std::future::pending::<()>().await;
    })
    .await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000000\r\n\r\nsome").await;
    let response = client.message().await.expect("a response");
    assert_eq!((response.status(), response.text().as_str()), (413, "big"));
    assert_eq!(running.record().await.outcome, "complete");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_closes_after_each_answer_is_no_failure() {
    let upstream = upstream(|mut peer| async move {
        let Some(request) = peer.message().await else { return };
        peer.send(format!(
            "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            request.body.len()
        ))
        .await;
        peer.send(request.body).await;
    })
    .await;
    let running = start(&upstream).await;
    let mut client = running.client().await;
    for number in 0..20 {
        let body = format!("message {number}");
        assert_eq!(client.exchange(post("/", &body)).await.text(), body);
    }
    assert_eq!(upstream.connections.load(Ordering::SeqCst), 20);
}

// Life of a gateway.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_lets_exchanges_end_and_refuses_new_ones() {
    let upstream = upstream(|mut peer| async move {
        let Some(_) = peer.message().await else { return };
        peer.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n").await;
        tokio::time::sleep(Duration::from_millis(400)).await;
        peer.send("4\r\nlast\r\n0\r\n\r\n").await;
    })
    .await;
    let running = start(&upstream).await;
    let address = running.gateway.addr;
    let mut idle = running.client().await;
    idle.send("").await;
    let mut client = running.client().await;
    client.send(get("/")).await;
    assert_eq!(client.head().await.expect("a head").status(), 200);
    let shutdown = tokio::spawn(running.gateway.shutdown());
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(TcpStream::connect(address).await.is_err(), "still listening");
    assert_eq!(client.chunk().await.expect("a chunk"), b"first");
    assert_eq!(client.chunk().await.expect("a chunk"), b"last");
    assert_eq!(client.chunk().await.expect("the end"), b"");
    assert!(idle.ends().await);
    assert_eq!(soon("the shutdown", shutdown).await.expect("ends"), 0);
    assert_eq!(running.log.try_recv().expect("logged").outcome, "complete");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_cuts_what_outlasts_the_drain() {
    let upstream = upstream(|mut peer| async move { while peer.more().await {} }).await;
    let mut options = options(upstream.address, FilterSource::None);
    options.drain_timeout = Duration::from_millis(200);
    let running = start_with(options).await;
    let mut client = running.client().await;
    client.send(get("/")).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(soon("the shutdown", running.gateway.shutdown()).await, 1);
    assert!(client.ends().await);
    assert_eq!(running.log.try_recv().expect("logged").outcome, "client_closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starting_fails_with_what_to_do() {
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = taken.local_addr().expect("an address");
    let fails = async |change: &dyn Fn(&mut GatewayOptions)| {
        let mut options = options(address, FilterSource::None);
        change(&mut options);
        match Gateway::start(options).await {
            Ok(_) => panic!("started"),
            Err(error) => error,
        }
    };
    let error = fails(&|options| options.listen = address).await;
    assert!(matches!(error, GatewayError::Listen { .. }) && error.to_string().contains("port 0"), "{error}");
    let error =
        fails(&|options| options.filter = FilterSource::WasmFile("/no/such/filter.wasm".into())).await;
    assert!(
        matches!(error, GatewayError::File { .. }) && error.to_string().contains("/no/such/filter.wasm"),
        "{error}"
    );
    let error = fails(&|options| options.filter = FilterSource::WasmBytes(b"not wasm".to_vec())).await;
    assert!(matches!(error, GatewayError::Filter { .. }), "{error}");
    let error = fails(&|options| options.workers = 0).await;
    assert!(error.to_string().contains("workers"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_access_log_file_has_a_line_per_exchange() {
    let upstream = echo().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("access.log");
    let mut options = options(upstream.address, FilterSource::None);
    options.filter = FilterSource::Native(Arc::new(Scripts { finished: Arc::default() }));
    options.access_log = AccessLogTarget::File(path.clone());
    let gateway = Gateway::start(options).await.expect("starts");
    let mut client = Peer::connect(gateway.addr).await;
    for _ in 0..3 {
        client.exchange(post("/v1/chat", "hello")).await;
    }
    gateway.shutdown().await;
    let text = std::fs::read_to_string(path).expect("written");
    assert_eq!(text.lines().count(), 3);
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(line["method"], "POST");
        assert_eq!(line["path"], "/v1/chat");
        assert_eq!(line["status"], 200);
        assert_eq!(line["bytes_in"], 5);
        assert_eq!(line["upstream"], upstream.address.to_string());
        assert_eq!(line["filter_state"]["wasm.driftlock.test"]["request_bytes"], 5);
        assert!(line["duration_us"].as_u64().is_some_and(|us| us > 0));
    }
}

// WebAssembly guests.

/// Continues everything; traps on a request body of 13 bytes; counts requests; leaves filter state.
const GUEST: &str = r#"(module
  (import "env" "proxy_define_metric" (func $define (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
  (import "env" "proxy_set_property" (func $set_property (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_add_header_map_value" (func $add_header (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 0) "test.requests-total")
  (data (i32.const 32) "driftlock.verdict")
  (data (i32.const 64) "{\"p_value\":0.50}")
  (data (i32.const 96) "x-seen")
  (global $heap (mut i32) (i32.const 65536))
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "proxy_on_memory_allocate") (param i32) (result i32)
    (global.get $heap)
    (global.set $heap (i32.add (global.get $heap) (local.get 0))))
  (func (export "proxy_on_context_create") (param i32 i32))
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (drop (call $define (i32.const 0) (i32.const 0) (i32.const 19) (i32.const 128)))
    (i32.const 1))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (drop (call $increment (i32.load (i32.const 128)) (i64.const 1)))
    (drop (call $set_property (i32.const 32) (i32.const 17) (i32.const 64) (i32.const 16)))
    (i32.const 0))
  (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
    (if (i32.eq (local.get 1) (i32.const 13)) (then unreachable))
    (i32.const 0))
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
    (drop (call $add_header (i32.const 2) (i32.const 96) (i32.const 6) (i32.const 96) (i32.const 6)))
    (i32.const 0))
  (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32) (i32.const 0))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.const 1))
  (func (export "proxy_on_log") (param i32))
  (func (export "proxy_on_delete") (param i32)))"#;

/// Pauses every request at its headers and lets it go at the next tick.
const PAUSING_GUEST: &str = r#"(module
  (import "env" "proxy_set_tick_period_milliseconds" (func $tick (param i32) (result i32)))
  (import "env" "proxy_continue_stream" (func $continue (param i32) (result i32)))
  (import "env" "proxy_set_effective_context" (func $effective (param i32) (result i32)))
  (memory (export "memory") 2)
  (global $held (mut i32) (i32.const 0))
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 65536))
  (func (export "proxy_on_context_create") (param i32 i32))
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32)
    (drop (call $tick (i32.const 50)))
    (i32.const 1))
  (func (export "proxy_on_tick") (param i32)
    (if (global.get $held) (then
      (drop (call $effective (global.get $held)))
      (drop (call $continue (i32.const 0)))
      (global.set $held (i32.const 0)))))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (global.set $held (local.get 0))
    (i32.const 1))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.const 1)))"#;

/// Buffers the whole request body, as an SDK's Action::Pause does.
const BUFFERING_GUEST: &str = r#"(module
  (memory (export "memory") 2)
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 65536))
  (func (export "proxy_on_context_create") (param i32 i32))
  (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (i32.eqz (local.get 2)))
  (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32) (i32.eqz (local.get 2)))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.const 1)))"#;

fn wasm(text: &str) -> FilterSource {
    FilterSource::WasmBytes(wat::parse_str(text).expect("valid text"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_sees_traffic_and_reports() {
    let upstream = echo().await;
    let mut options = options(upstream.address, wasm(GUEST));
    options.admin = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    let running = start_with(options).await;
    let mut client = running.client().await;
    for number in 0..10 {
        let body = "x".repeat(number * 1000 + 1);
        let response = client.exchange(post("/", &body)).await;
        assert!(response.text() == body);
        assert_eq!(response.header("x-seen"), Some("x-seen"));
        let record = running.record().await;
        assert!(
            record.to_json().contains(r#""filter_state":{"wasm.driftlock.verdict":{"p_value":0.50}}"#),
            "{}",
            record.to_json()
        );
    }
    let mut admin = Peer::connect(running.gateway.admin_addr.expect("admin")).await;
    let metrics = admin.exchange(get("/metrics")).await.text();
    assert!(metrics.contains("\n# TYPE test_requests_total counter\ntest_requests_total 10\n"), "{metrics}");
    assert!(metrics.contains("driftlock_gateway_requests_total{code=\"2xx\"} 10\n"), "{metrics}");
    assert!(metrics.contains("driftlock_gateway_filter_vms_ready{filter=\"driftlock\"} 2\n"), "{metrics}");
    assert_eq!(admin.exchange(get("/healthz")).await.text(), "ok\n");
    assert_eq!(admin.exchange(get("/readyz")).await.text(), "ready\n");
    assert_eq!(admin.exchange(get("/other")).await.status(), 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trap_costs_its_own_exchange_and_the_vm_comes_back() {
    let upstream = echo().await;
    for policy in [FailurePolicy::FailClosed, FailurePolicy::FailOpen, FailurePolicy::FailReload] {
        let mut options = options(upstream.address, wasm(GUEST));
        options.failure_policy = policy;
        options.reload_backoff = Duration::from_millis(100);
        options.workers = 1;
        let running = start_with(options).await;
        for _ in 0..3 {
            let response = running.client().await.exchange(post("/", "thirteen byte")).await;
            let record = running.record().await;
            assert!(record.filter_failed);
            match policy {
                FailurePolicy::FailClosed | FailurePolicy::FailReload => assert_eq!(response.status(), 503),
                FailurePolicy::FailOpen => {
                    assert_eq!((response.status(), response.text().as_str()), (200, "thirteen byte"));
                    assert_eq!(response.header("x-seen"), None, "the filter was not left out");
                }
            }
            let deadline = Instant::now() + PATIENCE;
            loop {
                let response = running.client().await.exchange(post("/", "harmless")).await;
                let record = running.record().await;
                if !record.filter_failed {
                    assert_eq!(
                        (response.text().as_str(), response.header("x-seen")),
                        ("harmless", Some("x-seen"))
                    );
                    break;
                }
                assert!(Instant::now() < deadline, "the VM did not come back");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// Buffers request bodies; traps on one of 26 bytes, at its end, and on a first chunk of 13.
const HOLDING_GUEST: &str = r#"(module
  (memory (export "memory") 2)
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 65536))
  (func (export "proxy_on_context_create") (param i32 i32))
  (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
    (if (i32.and (local.get 2) (i32.eq (local.get 1) (i32.const 26))) (then unreachable))
    (if (i32.eq (local.get 1) (i32.const 13)) (then unreachable))
    (i32.eqz (local.get 2)))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.const 1)))"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_crashed_guest_held_is_not_lost_when_failing_open() {
    let upstream = echo().await;
    let mut options = options(upstream.address, wasm(HOLDING_GUEST));
    options.failure_policy = FailurePolicy::FailOpen;
    options.workers = 1;
    let running = start_with(options).await;
    // The guest traps at the end of its own message.
    let mut client = running.client().await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 26\r\n\r\nabcdefghij").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    client.send("klmnopqrstuvwxyz").await;
    assert_eq!(client.message().await.expect("a response").text(), "abcdefghijklmnopqrstuvwxyz");
    assert!(running.record().await.filter_failed);
    soon("the next VM", async {
        while {
            running.client().await.exchange(post("/", "harmless")).await;
            running.record().await.filter_failed
        } {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // Another exchange's trap loses the VM while this one is held in the middle of its body.
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 20\r\n\r\nabcdefghij").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(running.client().await.exchange(post("/", "thirteen byte")).await.text(), "thirteen byte");
    client.send("klmnopqrst").await;
    assert_eq!(client.message().await.expect("a response").text(), "abcdefghijklmnopqrst");
    for _ in 0..2 {
        assert!(running.record().await.filter_failed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exchanges_on_a_crashed_vm_are_refused_at_once_when_failing_closed() {
    let upstream = echo().await;
    let mut options = options(upstream.address, wasm(HOLDING_GUEST));
    options.workers = 1;
    let running = start_with(options).await;
    let mut client = running.client().await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 20\r\n\r\nabcdefghij").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(running.client().await.exchange(post("/", "thirteen byte")).await.status(), 503);
    // Without having sent the rest, and without waiting for anyone's time-out.
    let begun = Instant::now();
    let response = client.message().await.expect("a response");
    assert!(begun.elapsed() < PATIENCE / 4, "{:?}", begun.elapsed());
    assert_eq!(response.status(), 503);
    assert!(response.text().contains("filter_failed"), "{}", response.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_vms_serve_while_one_is_down() {
    let upstream = echo().await;
    let running = start_with(options(upstream.address, wasm(GUEST))).await;
    assert_eq!(running.client().await.exchange(post("/", "thirteen byte")).await.status(), 503);
    for _ in 0..20 {
        assert_eq!(running.client().await.exchange(post("/", "harmless")).await.status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tick_lets_a_paused_request_go() {
    let upstream = echo().await;
    let mut options = options(upstream.address, wasm(PAUSING_GUEST));
    options.workers = 1;
    let running = start_with(options).await;
    let mut client = running.client().await;
    for body in ["", "hello", &"x".repeat(300_000)] {
        assert!(client.exchange(post("/", body)).await.text() == body);
        assert_eq!(running.record().await.outcome, "complete");
    }
}

/// Puts an item into queue `q` of the VM called `receiver` for each request.
const SENDING_GUEST: &str = r#"(module
  (import "env" "proxy_resolve_shared_queue" (func $resolve (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_enqueue_shared_queue" (func $enqueue (param i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 0) "receiver")
  (data (i32.const 16) "q")
  (func (export "proxy_abi_version_0_2_0"))
  (func (export "malloc") (param i32) (result i32) (i32.const 65536))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (if (call $resolve (i32.const 0) (i32.const 8) (i32.const 16) (i32.const 1) (i32.const 32)) (then unreachable))
    (if (call $enqueue (i32.load (i32.const 32)) (i32.const 0) (i32.const 5)) (then unreachable))
    (i32.const 0)))"#;

/// Counts the bytes of what comes through queue `q`; checks what it was told of itself.
const RECEIVING_GUEST: &str = r#"(module
  (import "env" "proxy_register_shared_queue" (func $register (param i32 i32 i32) (result i32)))
  (import "env" "proxy_dequeue_shared_queue" (func $dequeue (param i32 i32 i32) (result i32)))
  (import "env" "proxy_define_metric" (func $define (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ (param i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 16) "q")
  (data (i32.const 64) "received_bytes")
  (func (export "proxy_abi_version_0_2_0"))
  (func (export "malloc") (param i32) (result i32) (i32.const 65536))
  (func (export "_start")
    (drop (call $environ (i32.const 48) (i32.const 52)))
    ;; MODE=fast and its zero byte.
    (if (i32.ne (i32.load (i32.const 52)) (i32.const 10)) (then unreachable)))
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.eq (local.get 1) (i32.const 10)))
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (drop (call $register (i32.const 16) (i32.const 1) (i32.const 32)))
    (drop (call $define (i32.const 0) (i32.const 64) (i32.const 14) (i32.const 96)))
    (i32.eq (local.get 1) (i32.const 10)))
  (func (export "proxy_on_queue_ready") (param i32 i32)
    (if (call $dequeue (local.get 1) (i32.const 40) (i32.const 44)) (then unreachable))
    (drop (call $increment (i32.load (i32.const 96)) (i64.extend_i32_u (i32.load (i32.const 44)))))))"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_reach_each_other_by_queues_and_are_told_of_themselves() {
    let upstream = echo().await;
    let folder = configuration::folder(&format!(
        r#"
listeners: [{{address: "127.0.0.1:0"}}]
admin: "127.0.0.1:0"
access_log: none
filters:
  - {{name: in, module: in.wasm, vm_id: receiver, vms: 1, vm_configuration: {{a: true}},
      configuration: "plain text", environment: {{MODE: fast}}}}
  - {{name: out, module: out.wasm}}
upstreams: {{one: {{uri: "http://{}"}}}}
routes: [{{upstream: one}}]
"#,
        upstream.address
    ));
    for (name, text) in [("in.wasm", RECEIVING_GUEST), ("out.wasm", SENDING_GUEST)] {
        std::fs::write(folder.path().join(name), wat::parse_str(text).expect("valid text")).expect("written");
    }
    let gateway = configuration::start(&folder).await;
    let mut client = Peer::connect(gateway.addr).await;
    for _ in 0..5 {
        assert_eq!(client.exchange(get("/")).await.status(), 200);
    }
    let mut admin = Peer::connect(gateway.admin_addr.expect("admin")).await;
    soon("all items", async {
        while !admin.exchange(get("/metrics")).await.text().contains("\nreceived_bytes 25\n") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compiled_modules_are_kept_for_the_next_start() {
    let upstream = echo().await;
    let folder = tempfile::tempdir().expect("a folder");
    let cache = folder.path().join("cache");
    let entries = || -> Vec<_> {
        let entries = std::fs::read_dir(&cache).expect("the cache");
        entries.map(|entry| entry.expect("an entry").path()).collect()
    };
    let start = async || {
        let mut options = options(upstream.address, wasm(GUEST));
        options.module_cache = Some(cache.clone());
        let gateway = Gateway::start(options).await.expect("starts");
        let answer = Peer::connect(gateway.addr).await.exchange(post("/", "hello")).await;
        assert_eq!(answer.header("x-seen"), Some("x-seen"));
    };
    start().await;
    let first = entries();
    assert_eq!(first.len(), 1, "{first:?}");
    let written = |path: &std::path::Path| {
        (std::fs::read(path).expect("reads"), path.metadata().expect("there").modified().expect("a time"))
    };
    let whole = written(&first[0]);
    start().await;
    assert_eq!((entries(), written(&first[0]).1), (first.clone(), whole.1), "it was compiled again");
    // One that rots is not run: it is compiled again and replaced.
    let mut rotten = whole.0.clone();
    let middle = rotten.len() / 2;
    rotten[middle] ^= 1;
    std::fs::write(&first[0], &rotten).expect("written");
    start().await;
    assert_ne!(written(&first[0]).0, rotten);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_buffering_guest_is_bounded() {
    let upstream = echo().await;
    let mut options = options(upstream.address, wasm(BUFFERING_GUEST));
    options.max_buffer_bytes = 100_000;
    let running = start_with(options).await;
    let body = "x".repeat(100_000);
    assert!(running.client().await.exchange(post("/", &body)).await.text() == body);
    let response = running.client().await.exchange(post("/", &(body + "y"))).await;
    assert_eq!(response.status(), 413);
    running.record().await;
    let record = running.record().await;
    assert_eq!((record.details.as_str(), record.from_upstream), ("request_payload_too_large", false));
}
