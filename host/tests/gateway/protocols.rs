//! HTTP/2 on both sides, TLS, and connections that leave HTTP.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use driftlock_host::gateway::Gateway;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

use crate::configuration::{folder, start};
use crate::{Peer, Upstream, echo, soon, upstream};

type Sender<B> = http2::SendRequest<B>;

async fn http2_over<B>(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Sender<B>
where
    B: hyper::body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    tokio::spawn(connection);
    sender
}

fn post2(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(format!("http://test.example{path}")).body(Full::new(body.into())).expect("a request")
}

async fn text(response: Response<Incoming>) -> String {
    let body = soon("a body", response.into_body().collect()).await.expect("a whole body").to_bytes();
    String::from_utf8_lossy(&body).into_owned()
}

async fn plain_gateway(upstream: &Upstream, route: &str) -> (tempfile::TempDir, Gateway) {
    let folder = folder(&format!(
        "listeners: [{{address: \"127.0.0.1:0\"}}]\naccess_log: access.jsonl\ntimeouts: {{drain: 1s}}\nupstreams: {{one: {{uri: \"http://{}\"}}}}\nroutes: [{{upstream: one{route}}}]\n",
        upstream.address
    ));
    let gateway = start(&folder).await;
    (folder, gateway)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_clients_with_prior_knowledge_share_a_connection() {
    let upstream = echo().await;
    let (folder, gateway) = plain_gateway(&upstream, "").await;
    let sender = http2_over(TcpStream::connect(gateway.addr).await.expect("connects")).await;
    let mut requests = tokio::task::JoinSet::new();
    for index in 0..50 {
        let mut sender = sender.clone();
        requests.spawn(async move {
            let body = format!("{index}").repeat(5000);
            let mut request = post2("/v1", body.clone());
            request.headers_mut().append("cookie", "a=1".parse().expect("a value"));
            request.headers_mut().append("cookie", "b=2".parse().expect("a value"));
            let response = soon("an answer", sender.send_request(request)).await.expect("answered");
            assert_eq!(response.status(), StatusCode::OK);
            let got: Vec<_> = response.headers().get_all("x-got").iter().map(Clone::clone).collect();
            assert!(got.iter().any(|field| field == "cookie=a=1; b=2"), "{got:?}");
            assert!(got.iter().any(|field| field == "host=test.example"), "{got:?}");
            assert_eq!(text(response).await, body);
        });
    }
    while let Some(done) = requests.join_next().await {
        done.expect("a request failed");
    }
    drop(sender);
    gateway.shutdown().await;
    let log = std::fs::read_to_string(folder.path().join("access.jsonl")).expect("a log");
    assert_eq!(log.lines().filter(|line| line.contains("\"protocol\":\"HTTP/2\"")).count(), 50);
}

/// An HTTP/2 server without TLS: echoes bodies, says what it was asked in trailers.
async fn http2_upstream() -> (std::net::SocketAddr, Arc<std::sync::atomic::AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("bound");
    let connections = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let service = service_fn(|request: Request<Incoming>| async move {
                let authority = request.uri().authority().map(ToString::to_string).unwrap_or_default();
                assert!(
                    request.headers().get("host").is_none() && request.headers().get("connection").is_none()
                );
                let body = request.into_body().collect().await?.to_bytes();
                let mut trailers = HeaderMap::new();
                trailers.insert("x-authority", authority.parse().expect("a value"));
                let frames = [Ok::<_, hyper::Error>(Frame::data(body)), Ok(Frame::trailers(trailers))];
                Ok::<_, hyper::Error>(Response::new(StreamBody::new(Frames(frames.into_iter().collect()))))
            });
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service);
            tokio::spawn(connection);
        }
    });
    (address, connections)
}

/// A stream of what is there already.
struct Frames(std::collections::VecDeque<Result<Frame<Bytes>, hyper::Error>>);

impl futures_core::Stream for Frames {
    type Item = Result<Frame<Bytes>, hyper::Error>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Ready(self.0.pop_front())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_upstreams_share_a_connection_and_pass_trailers() {
    let (address, connections) = http2_upstream().await;
    let folder = folder(&format!(
        "listeners: [{{address: \"127.0.0.1:0\"}}]\naccess_log: none\nupstreams: {{two: {{uri: \"http://{address}\", http: http2}}}}\nroutes: [{{upstream: two}}]\n"
    ));
    let gateway = start(&folder).await;
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..20 {
        requests.spawn(async move {
            let mut client = Peer::connect(gateway.addr).await;
            let request = "POST / HTTP/1.1\r\nhost: test.example\r\nte: trailers\r\nconnection: te\r\ncontent-length: 5\r\n\r\nhello";
            soon("an answer", client.exchange(request)).await
        });
    }
    while let Some(answer) = requests.join_next().await {
        let answer = answer.expect("no panic");
        assert_eq!(answer.text(), "hello");
        // Over HTTP/1.1 a response's trailers pass only when it announces them; HTTP/2 needs no announcement.
        assert_eq!(answer.status(), 200);
    }
    assert_eq!(connections.load(std::sync::atomic::Ordering::SeqCst), 1, "one connection for all");
    let mut sender = http2_over(TcpStream::connect(gateway.addr).await.expect("connects")).await;
    let response = soon("an answer", sender.send_request(post2("/", "x"))).await.expect("answered");
    let collected = response.into_body().collect().await.expect("a body");
    assert_eq!(collected.trailers().expect("trailers")["x-authority"], "test.example");
}

fn certificate(folder: &Path, name: &str) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])
        .expect("a certificate");
    std::fs::write(folder.join(format!("{name}.pem")), made.cert.pem()).expect("written");
    std::fs::write(folder.join(format!("{name}.key")), made.signing_key.serialize_pem()).expect("written");
}

fn tls_client(ca: &Path, protocol: &[u8]) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).expect("a certificate")).expect("an authority");
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    TlsConnector::from(Arc::new(config))
}

/// A gateway with TLS in front of the echo, and one without in front of that.
async fn two_gateways(upstream: &Upstream) -> (tempfile::TempDir, Gateway, Gateway) {
    let back = folder(&format!(
        "listeners: [{{address: \"127.0.0.1:0\", tls: {{certificate: a.pem, key: a.key}}}}]\naccess_log: back.jsonl\ntimeouts: {{drain: 1s}}\nupstreams: {{one: {{uri: \"http://{}\"}}}}\nroutes: [{{upstream: one}}]\n",
        upstream.address
    ));
    certificate(back.path(), "a");
    let back_gateway = start(&back).await;
    let front = format!(
        "listeners: [{{address: \"127.0.0.1:0\"}}]\naccess_log: none\ntimeouts: {{drain: 1s}}\nupstreams: {{\n  tls: {{uri: \"https://localhost:{port}\", ca: a.pem}},\n  old: {{uri: \"https://localhost:{port}\", ca: a.pem, http: http1}},\n  stranger: {{uri: \"https://localhost:{port}\", ca: b.pem}}}}\nroutes:\n- {{match: {{path_prefix: /old}}, upstream: old}}\n- {{match: {{path_prefix: /stranger}}, upstream: stranger}}\n- {{upstream: tls}}\n",
        port = back_gateway.addr.port()
    );
    certificate(back.path(), "b");
    std::fs::write(back.path().join("front.yaml"), front).expect("written");
    let front_gateway =
        Gateway::start_file(&back.path().join("front.yaml")).await.unwrap_or_else(|error| panic!("{error}"));
    (back, back_gateway, front_gateway)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_agrees_on_a_protocol_on_both_sides() {
    let upstream = echo().await;
    let (folder, back, front) = two_gateways(&upstream).await;
    // Clients of the TLS listener: HTTP/2 and HTTP/1.1 by ALPN.
    let name = ServerName::try_from("localhost").expect("a name");
    let tcp = TcpStream::connect(back.addr).await.expect("connects");
    let stream =
        tls_client(&folder.path().join("a.pem"), b"h2").connect(name.clone(), tcp).await.expect("TLS");
    let mut sender = http2_over(stream).await;
    let response = soon("an answer", sender.send_request(post2("/", "two"))).await.expect("answered");
    assert_eq!(text(response).await, "two");
    let tcp = TcpStream::connect(back.addr).await.expect("connects");
    let mut stream =
        tls_client(&folder.path().join("a.pem"), b"http/1.1").connect(name, tcp).await.expect("TLS");
    let request = "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 3\r\n\r\none";
    stream.write_all(request.as_bytes()).await.expect("writes");
    let mut answer = String::new();
    soon("an answer", stream.read_to_string(&mut answer)).await.expect("reads");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("one"), "{answer}");
    // The front gateway to the back one: HTTP/2 by ALPN, HTTP/1.1 when told so, nobody it does not know.
    let mut client = Peer::connect(front.addr).await;
    let answer = soon("over HTTP/2", client.exchange(crate::post("/new", "hello"))).await;
    assert_eq!(answer.text(), "hello");
    let host = format!("host=localhost:{}", back.addr.port());
    assert!(answer.headers.iter().any(|(_, value)| *value == host), "{:?}", answer.headers);
    assert_eq!(soon("over HTTP/1.1", client.exchange(crate::post("/old", "hello"))).await.text(), "hello");
    let refused = soon("a stranger", client.exchange(crate::post("/stranger", "hello"))).await;
    assert_eq!(refused.status(), 502);
    assert!(refused.text().contains("upstream_tls_failed"), "{}", refused.text());
    drop((client, sender));
    front.shutdown().await;
    back.shutdown().await;
    let log = std::fs::read_to_string(folder.path().join("back.jsonl")).expect("a log");
    let protocols: Vec<(String, String)> = log
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            (line["path"].to_string(), line["protocol"].to_string())
        })
        .collect();
    let expected = [("/", "HTTP/2"), ("/", "HTTP/1.1"), ("/new", "HTTP/2"), ("/old", "HTTP/1.1")]
        .map(|(path, protocol)| (format!("\"{path}\""), format!("\"{protocol}\"")));
    assert_eq!(protocols, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_without_the_demanded_certificate_are_refused() {
    let upstream = echo().await;
    let folder = folder(&format!(
        "listeners: [{{address: \"127.0.0.1:0\", tls: {{certificate: a.pem, key: a.key, client_ca: b.pem}}}}]\naccess_log: none\nupstreams: {{one: {{uri: \"http://{}\"}}}}\nroutes: [{{upstream: one}}]\n",
        upstream.address
    ));
    certificate(folder.path(), "a");
    certificate(folder.path(), "b");
    let gateway = start(&folder).await;
    let tcp = TcpStream::connect(gateway.addr).await.expect("connects");
    let name = ServerName::try_from("localhost").expect("a name");
    let connected = tls_client(&folder.path().join("a.pem"), b"http/1.1").connect(name, tcp).await;
    // TLS 1.3 tells a client only when it reads.
    if let Ok(mut stream) = connected {
        let _ = stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let mut answer = Vec::new();
        assert!(soon("an alert", stream.read_to_end(&mut answer)).await.is_err(), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_speaks_both_versions_with_and_without_tls() {
    let upstream = echo().await;
    let (folder, back, front) = two_gateways(&upstream).await;
    let ca = folder.path().join("a.pem");
    let (plain, tls) =
        (format!("http://{}/", front.addr), format!("https://localhost:{}/", back.addr.port()));
    for (arguments, url, version) in [
        (&["--http2-prior-knowledge"][..], &plain, "2"),
        (&["--http1.1"], &plain, "1.1"),
        (&["--http2"], &tls, "2"),
        (&["--http1.1"], &tls, "1.1"),
        // Asks for an upgrade to h2c, which a server may ignore, as browsers' servers do.
        (&["--http2"], &plain, "1.1"),
    ] {
        let mut curl = Command::new("curl");
        curl.args([
            "-sS",
            "--max-time",
            "20",
            "-w",
            " %{http_version} %{http_code}",
            "-d",
            "hello",
            "--cacert",
        ])
        .arg(&ca)
        .args(arguments)
        .arg(url);
        let output = tokio::task::spawn_blocking(move || curl.output()).await.expect("no panic");
        let output = output.expect("curl runs: install Debian's package curl");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(
            text,
            format!("hello {version} 200"),
            "{arguments:?} {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    drop((back, front));
}

/// Answers an upgrade with what was asked, then sends every byte back.
async fn websocket_upstream() -> Upstream {
    upstream(|mut peer| async move {
        let Some(request) = peer.head().await else { return };
        if request.header("upgrade") != Some("websocket") {
            let _ = peer.stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nplain").await;
            return;
        }
        let key = request.header("sec-websocket-key").unwrap_or_default();
        assert!(key == "key" || (key.len() == 24 && key.ends_with("==")), "{key}");
        assert_eq!(request.start, "GET /ws HTTP/1.1");
        peer.send("HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: it\r\n\r\nfirst").await;
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = peer.stream.read(&mut buffer).await {
            peer.send(&buffer[..count]).await;
        }
    })
    .await
}

const UPGRADE: &str = "GET /ws HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: key\r\n\r\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_pass_and_are_named_in_the_log() {
    let upstream = websocket_upstream().await;
    let (folder, gateway) = plain_gateway(&upstream, "").await;
    let mut client = Peer::connect(gateway.addr).await;
    client.send(UPGRADE).await;
    let answer = soon("an upgrade", client.head()).await.expect("an answer");
    assert_eq!((answer.status(), answer.header("upgrade")), (101, Some("websocket")));
    assert_eq!(answer.header("sec-websocket-accept"), Some("it"));
    assert_eq!(client.exactly(5).await.as_deref(), Some(&b"first"[..]));
    for size in [1, 1000, 100_000] {
        let bytes = vec![b'x'; size];
        client.send(&bytes).await;
        assert_eq!(soon("an echo", client.exactly(size)).await, Some(bytes));
    }
    drop(client);
    // One that is still open when the gateway ends is cut after the drain.
    let mut open = Peer::connect(gateway.addr).await;
    open.send(UPGRADE).await;
    soon("an upgrade", open.head()).await.expect("an answer");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(gateway.shutdown().await, 1);
    let log = std::fs::read_to_string(folder.path().join("access.jsonl")).expect("a log");
    let line: serde_json::Value = serde_json::from_str(log.lines().next().expect("a line")).expect("JSON");
    assert_eq!((&line["upgrade"], &line["status"]), (&"websocket".into(), &101.into()));
    assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&101_001.into(), &101_006.into()));
    assert!(log.lines().nth(1).is_some_and(|line| line.contains("draining")), "{log}");
}

/// A websocket's handshake on an HTTP/2 stream (RFC 8441).
async fn upgrade_over_http2(sender: &mut Sender<Full<Bytes>>) -> Response<Incoming> {
    let mut request =
        Request::connect("http://test.example/ws").body(Full::<Bytes>::default()).expect("a request");
    request.headers_mut().insert("sec-websocket-version", "13".parse().expect("a value"));
    request.extensions_mut().insert(hyper::ext::Protocol::from_static("websocket"));
    soon("an answer", sender.send_request(request)).await.expect("answered")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_pass_over_http2_too() {
    let upstream = websocket_upstream().await;
    let (folder, gateway) = plain_gateway(&upstream, "").await;
    let mut sender = http2_over(TcpStream::connect(gateway.addr).await.expect("connects")).await;
    // The settings that allow it come with the first answer at the latest.
    assert_eq!(text(sender.send_request(post2("/", "")).await.expect("answered")).await, "plain");
    let mut streams = Vec::new();
    for size in [1, 1000, 100_000] {
        let mut response = upgrade_over_http2(&mut sender).await;
        assert_eq!(response.status(), StatusCode::OK);
        for name in ["upgrade", "connection", "sec-websocket-accept"] {
            assert!(!response.headers().contains_key(name), "{name}: {response:?}");
        }
        let upgraded = soon("a stream", hyper::upgrade::on(&mut response)).await.expect("leaves HTTP");
        let mut stream = TokioIo::new(upgraded);
        let mut first = [0; 5];
        soon("the first bytes", stream.read_exact(&mut first)).await.expect("reads");
        assert_eq!(&first, b"first");
        let bytes = vec![b'x'; size];
        let (mut reader, mut writer) = tokio::io::split(stream);
        let mut back = vec![0; size];
        let (sent, read) =
            soon("an echo", async { tokio::join!(writer.write_all(&bytes), reader.read_exact(&mut back)) })
                .await;
        sent.and(read.map(drop)).expect("both ways");
        assert_eq!(back, bytes);
        streams.push((reader, writer));
    }
    drop((streams, sender));
    gateway.shutdown().await;
    let log = std::fs::read_to_string(folder.path().join("access.jsonl")).expect("a log");
    assert_eq!(log.lines().filter(|line| line.contains("\"upgrade\":\"websocket\"")).count(), 3, "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_can_keep_websockets_out() {
    let upstream = websocket_upstream().await;
    let (_folder, gateway) = plain_gateway(&upstream, ", websocket: false").await;
    let mut client = Peer::connect(gateway.addr).await;
    let answer = soon("no upgrade", client.exchange(UPGRADE)).await;
    assert_eq!((answer.status(), answer.text().as_str()), (200, "plain"));
    let mut sender = http2_over(TcpStream::connect(gateway.addr).await.expect("connects")).await;
    assert_eq!(text(sender.send_request(post2("/", "")).await.expect("answered")).await, "plain");
    assert_eq!(upgrade_over_http2(&mut sender).await.status(), StatusCode::NOT_IMPLEMENTED);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connect_opens_a_tunnel_to_the_routes_upstream_only_where_allowed() {
    let upstream = upstream(|mut peer| async move {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = peer.stream.read(&mut buffer).await {
            let _ = peer.stream.write_all(&buffer[..count].to_ascii_uppercase()).await;
        }
    })
    .await;
    let ask = "CONNECT elsewhere.example:443 HTTP/1.1\r\nhost: elsewhere.example:443\r\n\r\n";
    let (_folder, closed) = plain_gateway(&upstream, "").await;
    let mut client = Peer::connect(closed.addr).await;
    client.send(ask).await;
    assert_eq!(soon("a refusal", client.head()).await.expect("an answer").status(), 405);

    let (folder, gateway) = plain_gateway(&upstream, ", connect: tunnel").await;
    let mut client = Peer::connect(gateway.addr).await;
    client.send(ask).await;
    assert_eq!(soon("a tunnel", client.head()).await.expect("an answer").status(), 200);
    client.send("not http").await;
    assert_eq!(soon("an echo", client.exactly(8)).await.as_deref(), Some(&b"NOT HTTP"[..]));

    // The same on an HTTP/2 stream.
    let mut sender = http2_over(TcpStream::connect(gateway.addr).await.expect("connects")).await;
    let request =
        Request::connect("elsewhere.example:443").body(Full::<Bytes>::default()).expect("a request");
    let mut response = soon("a tunnel", sender.send_request(request)).await.expect("answered");
    assert_eq!(response.status(), StatusCode::OK);
    let upgraded = soon("a stream", hyper::upgrade::on(&mut response)).await.expect("leaves HTTP");
    let mut stream = TokioIo::new(upgraded);
    stream.write_all(b"over http2").await.expect("writes");
    let mut echo = [0; 10];
    soon("an echo", stream.read_exact(&mut echo)).await.expect("reads");
    assert_eq!(&echo, b"OVER HTTP2");
    drop((client, stream, sender));
    gateway.shutdown().await;
    let log = std::fs::read_to_string(folder.path().join("access.jsonl")).expect("a log");
    assert_eq!(log.lines().filter(|line| line.contains("\"upgrade\":\"connect\"")).count(), 2, "{log}");
}
