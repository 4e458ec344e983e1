//! Connections to one upstream: made, kept, shared, given back; and what their failures mean.
//!
//! HTTP/1.1 connections serve one exchange at a time. A [`Lease`] holds one from the request to the
//! last byte of the response, and gives it back only when both ended cleanly; a lease that is dropped
//! closes its connection, so no exchange can read another's bytes. HTTP/2 connections are shared up
//! to the number of streams that the upstream allows. A request that was not written because its
//! kept connection had just been closed goes out on another. One that was written when such a
//! connection broke without an answer is sent once more on a new one if its method is idempotent and
//! its body is at hand (RFC 9112 section 9.3.1; a proxy must not repeat others, and an LLM call is not
//! idempotent): without this, every connection that an upstream closes unasked costs a request.
//!
//! Cost: a short scan under a mutex per request. It replaces hyper-util's `Client`, which rewrites
//! every URI, cannot pass CONNECT on, and hides which connection a response came on.
//!
//! Left out on purpose: retries after an answer or a time-out, health checks, several hosts per upstream (DNS names with several
//! addresses are tried in turn).

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONNECTION, HOST};
use http::{HeaderMap, Request, Response, Uri};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsConnector, TlsStream};

use super::callout::poll_messages;
use super::config::HttpVersion;
use super::lane::{Lane, LaneError};
use super::metrics::Counter;
use super::plan::UpstreamPlan;
use super::tls;
use super::wire::Wire;

/// Streams on one HTTP/2 connection before another is made: what servers commonly allow. hyper queues
/// what a server with a lower limit does not allow yet.
const STREAMS_PER_CONNECTION: usize = 100;

/// A request body on its way to an upstream.
pub(super) enum OutBody {
    /// A client's, through the filters.
    Lane(Box<Lane>),
    /// A whole message of the gateway's own or a filter's.
    Whole(Option<Bytes>, Option<HeaderMap>),
    /// What a filter sends bit by bit.
    Messages(UnboundedReceiver<Bytes>),
}

impl OutBody {
    pub(super) fn whole(body: Bytes, trailers: Option<HeaderMap>) -> Self {
        Self::Whole(Some(body).filter(|body| !body.is_empty()), trailers)
    }

    /// The same body once more, if all of it is at hand.
    fn again(&self) -> Option<Self> {
        match self {
            Self::Lane(lane) => lane.is_end_stream().then_some(Self::Whole(None, None)),
            Self::Whole(body, trailers) => Some(Self::Whole(body.clone(), trailers.clone())),
            Self::Messages(_) => None,
        }
    }
}

/// A copy of a request that may be sent twice.
fn spare(request: &Request<OutBody>) -> Option<Request<OutBody>> {
    if !request.method().is_idempotent() {
        return None;
    }
    let mut copy = Request::new(request.body().again()?);
    copy.method_mut().clone_from(request.method());
    copy.uri_mut().clone_from(request.uri());
    copy.headers_mut().clone_from(request.headers());
    Some(copy)
}

/// Whether a connection ended without an answer, rather than with a bad one.
fn hung_up(error: &hyper::Error) -> bool {
    if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
        return true;
    }
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        if let Some(error) = source.downcast_ref::<io::Error>() {
            use io::ErrorKind::{
                BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof,
            };
            let kinds = [BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof];
            return kinds.contains(&error.kind());
        }
        cause = source.source();
    }
    false
}

impl Body for OutBody {
    type Data = Bytes;
    type Error = LaneError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, LaneError>>> {
        match self.get_mut() {
            Self::Lane(lane) => Pin::new(&mut **lane).poll_frame(cx),
            Self::Whole(body, trailers) => Poll::Ready(match body.take() {
                Some(body) => Some(Ok(Frame::data(body))),
                None => trailers.take().map(|trailers| Ok(Frame::trailers(trailers))),
            }),
            Self::Messages(queue) => poll_messages(queue, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Lane(lane) => lane.is_end_stream(),
            Self::Whole(body, trailers) => body.is_none() && trailers.is_none(),
            Self::Messages(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Lane(lane) => lane.size_hint(),
            Self::Whole(_, Some(_)) | Self::Messages(_) => SizeHint::new(),
            Self::Whole(body, None) => {
                SizeHint::with_exact(body.as_ref().map_or(0, |body| body.len() as u64))
            }
        }
    }
}

/// Why an upstream did not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    /// No connection came about.
    #[error("the upstream does not accept connections; check that it is running ({0})")]
    Unreachable(String),
    /// No connection came about in time.
    #[error("the upstream did not accept a connection within {0:?}")]
    ConnectTimeout(Duration),
    /// TLS failed.
    #[error("TLS with the upstream failed ({0})")]
    Tls(String),
    /// All connections are in use.
    #[error("all {0} connections to the upstream are in use; raise max_connections, or wait")]
    Saturated(usize),
    /// The request needs HTTP/1.1.
    #[error("the upstream speaks HTTP/2 only, which this request cannot use")]
    Http2Only,
    /// The connection broke.
    #[error("the upstream closed the connection before it answered ({0})")]
    Broken(String),
    /// The answer is no HTTP.
    #[error("the upstream's answer is no HTTP that could be passed on ({0})")]
    Malformed(String),
}

impl UpstreamError {
    /// Status for the client and a word for programs.
    pub(super) fn status(&self) -> (u16, &'static str) {
        match self {
            Self::Unreachable(_) => (502, "upstream_unreachable"),
            Self::ConnectTimeout(_) => (504, "upstream_connect_timeout"),
            Self::Tls(_) => (502, "upstream_tls_failed"),
            Self::Saturated(_) => (503, "upstream_saturated"),
            Self::Http2Only => (502, "upstream_http2_only"),
            Self::Broken(_) => (502, "upstream_failed"),
            Self::Malformed(_) => (502, "upstream_malformed"),
        }
    }
}

fn broken(error: &hyper::Error) -> UpstreamError {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        text = format!("{text}: {source}");
        cause = source.source();
    }
    if error.is_parse() { UpstreamError::Malformed(text) } else { UpstreamError::Broken(text) }
}

/// What the upstream's connections have done.
#[derive(Debug, Default)]
pub(super) struct PoolCounters {
    pub(super) requests: Counter,
    pub(super) failures: Counter,
    pub(super) repeated: Counter,
    pub(super) connections: Counter,
    pub(super) open: Counter,
}

struct Idle {
    sender: http1::SendRequest<OutBody>,
    since: Instant,
}

/// One HTTP/2 connection and the streams on it.
#[derive(Clone)]
struct Multiplexed {
    sender: http2::SendRequest<OutBody>,
    streams: Arc<AtomicUsize>,
    /// It has answered: if it breaks, it need not be the request's fault.
    answered: Arc<AtomicBool>,
}

/// One upstream and its connections.
pub(super) struct Upstream {
    pub(super) plan: UpstreamPlan,
    pub(super) counters: PoolCounters,
    connector: Option<TlsConnector>,
    /// For exchanges that HTTP/2 cannot carry.
    http1_connector: Option<TlsConnector>,
    server_name: Option<ServerName<'static>>,
    idle: Mutex<Vec<Idle>>,
    multiplexed: Mutex<Vec<Multiplexed>>,
    /// Held while an HTTP/2 connection is made, so that one is made for all who wait.
    opening: tokio::sync::Mutex<()>,
    slots: Arc<Semaphore>,
    /// 1 or 2 once a connection agreed on it; 0 before.
    agreed: AtomicU8,
}

/// A response and the hold on the connection that it comes on.
pub(super) struct Answered {
    pub(super) response: Response<Incoming>,
    pub(super) lease: Lease,
}

/// A hold on a connection while its response is read.
pub(super) enum Lease {
    /// The whole connection.
    Http1 { upstream: Arc<Upstream>, sender: http1::SendRequest<OutBody>, _slot: OwnedSemaphorePermit },
    /// One stream.
    Http2(#[allow(dead_code, reason = "counts while it lives")] StreamCount),
}

/// Counts a stream of a shared connection while it lives.
pub(super) struct StreamCount(Arc<AtomicUsize>);

impl StreamCount {
    fn new(streams: &Arc<AtomicUsize>) -> Self {
        streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(streams))
    }
}

impl Drop for StreamCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Lease {
    /// The response ended where it should: the connection can serve another exchange.
    pub(super) fn give_back(self) {
        if let Self::Http1 { upstream, sender, _slot } = self
            && !sender.is_closed()
        {
            lock(&upstream.idle).push(Idle { sender, since: Instant::now() });
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Opened {
    Http1(http1::SendRequest<OutBody>),
    Http2(Multiplexed),
}

impl Upstream {
    /// No connection is made yet. Inside a tokio runtime.
    pub(super) fn new(plan: UpstreamPlan) -> Arc<Self> {
        let connector = plan.tls.clone().map(TlsConnector::from);
        let http1_connector = plan.tls.as_deref().map(|config| {
            let mut config: ClientConfig = config.clone();
            config.alpn_protocols = vec![tls::HTTP1.to_vec()];
            TlsConnector::from(Arc::new(config))
        });
        let upstream = Arc::new(Self {
            connector,
            http1_connector,
            server_name: ServerName::try_from(plan.host.clone()).ok(),
            counters: PoolCounters::default(),
            idle: Mutex::default(),
            multiplexed: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
            slots: Arc::new(Semaphore::new(plan.max_connections.min(Semaphore::MAX_PERMITS))),
            agreed: AtomicU8::new(match (plan.http, plan.tls.is_some()) {
                (HttpVersion::Http2, _) => 2,
                (HttpVersion::Auto, true) => 0,
                _ => 1,
            }),
            plan,
        });
        tokio::spawn(reap(Arc::downgrade(&upstream), upstream.plan.idle_timeout));
        upstream
    }

    /// Sends a request in origin form with a Host field; returns with the response's headers.
    /// `http1_only`: the exchange may leave HTTP (an upgrade).
    pub(super) async fn send(
        self: &Arc<Self>,
        request: Request<OutBody>,
        http1_only: bool,
    ) -> Result<Answered, UpstreamError> {
        self.counters.requests.increment();
        let answered = self.try_send(request, http1_only).await;
        if answered.is_err() {
            self.counters.failures.increment();
        }
        answered
    }

    async fn try_send(
        self: &Arc<Self>,
        mut request: Request<OutBody>,
        http1_only: bool,
    ) -> Result<Answered, UpstreamError> {
        if http1_only && self.plan.http == HttpVersion::Http2 {
            return Err(UpstreamError::Http2Only);
        }
        if !http1_only && self.agreed.load(Ordering::Relaxed) != 1 {
            match self.shared_connection().await? {
                Opened::Http2(shared) => return self.send_http2(shared, request).await,
                Opened::Http1(sender) => {
                    let slot = self.slot().await?;
                    return match self.send_http1(sender, slot, request).await {
                        Ok(answered) => Ok(answered),
                        Err((error, _)) => Err(broken(&error)),
                    };
                }
            }
        }
        let mut slot = self.slot().await?;
        while let Some(sender) = self.idle_connection() {
            let copy = spare(&request);
            match self.send_http1(sender, slot, request).await {
                Ok(answered) => return Ok(answered),
                // The upstream closed a kept connection before anything was written to it.
                Err((_, Some(back))) => (request, slot) = *back,
                Err((error, None)) => {
                    let Some(copy) = copy.filter(|_| hung_up(&error)) else { return Err(broken(&error)) };
                    self.counters.repeated.increment();
                    (request, slot) = (copy, self.slot().await?);
                    // Others of that age may be as dead: on a new one, which has no second chance.
                    break;
                }
            }
        }
        let Opened::Http1(sender) = self.open(true).await? else {
            return Err(UpstreamError::Http2Only);
        };
        self.send_http1(sender, slot, request).await.map_err(|(error, _)| broken(&error))
    }

    async fn slot(&self) -> Result<OwnedSemaphorePermit, UpstreamError> {
        let slots = Arc::clone(&self.slots);
        if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
            return Ok(slot);
        }
        match tokio::time::timeout(self.plan.connect_timeout, slots.acquire_owned()).await {
            Ok(Ok(slot)) => Ok(slot),
            _ => Err(UpstreamError::Saturated(self.plan.max_connections)),
        }
    }

    fn idle_connection(&self) -> Option<http1::SendRequest<OutBody>> {
        let mut idle = lock(&self.idle);
        // The last one used first: the others may come to be unused for long enough to be closed.
        let mut at = idle.len();
        while at > 0 {
            at -= 1;
            if idle[at].sender.is_closed() {
                idle.remove(at);
            } else if idle[at].sender.is_ready() {
                return Some(idle.remove(at).sender);
            }
        }
        None
    }

    #[allow(clippy::type_complexity, reason = "the request comes back with its slot, or not at all")]
    async fn send_http1(
        self: &Arc<Self>,
        mut sender: http1::SendRequest<OutBody>,
        slot: OwnedSemaphorePermit,
        request: Request<OutBody>,
    ) -> Result<Answered, (hyper::Error, Option<Box<(Request<OutBody>, OwnedSemaphorePermit)>>)> {
        match sender.try_send_request(request).await {
            Ok(response) => {
                let lease = Lease::Http1 { upstream: Arc::clone(self), sender, _slot: slot };
                Ok(Answered { response, lease })
            }
            Err(mut error) => {
                let back = error.take_message().map(|request| Box::new((request, slot)));
                Err((error.into_error(), back))
            }
        }
    }

    /// A connection that may be shared; or a fresh one of HTTP/1.1, when that is what was agreed on.
    async fn shared_connection(self: &Arc<Self>) -> Result<Opened, UpstreamError> {
        if let Some(shared) = self.open_stream() {
            return Ok(Opened::Http2(shared));
        }
        let _one_at_a_time = self.opening.lock().await;
        if let Some(shared) = self.open_stream() {
            return Ok(Opened::Http2(shared));
        }
        self.open(false).await
    }

    fn open_stream(&self) -> Option<Multiplexed> {
        let mut multiplexed = lock(&self.multiplexed);
        multiplexed.retain(|connection| !connection.sender.is_closed());
        let full = multiplexed.len() >= self.plan.max_connections;
        let room =
            |connection: &&Multiplexed| connection.streams.load(Ordering::Relaxed) < STREAMS_PER_CONNECTION;
        let mut found = multiplexed.iter().find(room);
        if found.is_none() && full {
            // hyper queues what the upstream does not allow yet.
            found = multiplexed.iter().min_by_key(|connection| connection.streams.load(Ordering::Relaxed));
        }
        found.cloned()
    }

    async fn send_http2(
        self: &Arc<Self>,
        mut shared: Multiplexed,
        mut request: Request<OutBody>,
    ) -> Result<Answered, UpstreamError> {
        into_http2(&mut request, self.plan.tls.is_some());
        for last in [false, true] {
            let count = StreamCount::new(&shared.streams);
            let used = !last && shared.answered.load(Ordering::Relaxed);
            let copy = if used { spare(&request) } else { None };
            match shared.sender.try_send_request(request).await {
                Ok(response) => {
                    shared.answered.store(true, Ordering::Relaxed);
                    return Ok(Answered { response, lease: Lease::Http2(count) });
                }
                Err(mut error) => match (error.take_message(), copy) {
                    // Ended by the upstream (GOAWAY) before the request was written.
                    (Some(back), _) if !last => request = back,
                    (None, Some(copy)) if hung_up(error.error()) => {
                        self.counters.repeated.increment();
                        request = copy;
                    }
                    _ => return Err(broken(error.error())),
                },
            }
            let Opened::Http2(another) = self.shared_connection().await? else {
                return Err(UpstreamError::Broken("it no longer speaks HTTP/2".to_owned()));
            };
            shared = another;
        }
        Err(UpstreamError::Broken("its connections end at once".to_owned()))
    }

    /// Opens TCP (and TLS) for bytes that are not HTTP.
    pub(super) async fn open_tunnel(&self) -> Result<Wire, UpstreamError> {
        self.counters.connections.increment();
        Ok(self.dial(None).await?.0)
    }

    async fn open(self: &Arc<Self>, http1_only: bool) -> Result<Opened, UpstreamError> {
        let connector = if http1_only { self.http1_connector.as_ref() } else { self.connector.as_ref() };
        let (wire, agreed_http2) = self.dial(connector).await?;
        self.counters.connections.increment();
        let http2 = !http1_only && (agreed_http2 || self.plan.http == HttpVersion::Http2);
        if !http1_only {
            self.agreed.store(if http2 { 2 } else { 1 }, Ordering::Relaxed);
        }
        let open = OpenCount::new(self);
        if http2 {
            let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .handshake(TokioIo::new(wire))
                .await
                .map_err(|error| broken(&error))?;
            tokio::spawn(async move {
                let _open = open;
                if let Err(error) = connection.await {
                    tracing::debug!(target: "driftlock::gateway", %error, "upstream connection ended");
                }
            });
            let shared = Multiplexed { sender, streams: Arc::default(), answered: Arc::default() };
            lock(&self.multiplexed).push(shared.clone());
            return Ok(Opened::Http2(shared));
        }
        let (mut sender, connection) =
            http1::Builder::new().handshake(TokioIo::new(wire)).await.map_err(|error| broken(&error))?;
        tokio::spawn(async move {
            let _open = open;
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(target: "driftlock::gateway", %error, "upstream connection ended");
            }
        });
        sender.ready().await.map_err(|error| broken(&error))?;
        Ok(Opened::Http1(sender))
    }

    /// TCP, with TLS when there is a connector; and whether HTTP/2 was agreed on.
    async fn dial(&self, connector: Option<&TlsConnector>) -> Result<(Wire, bool), UpstreamError> {
        let patience = self.plan.connect_timeout;
        let dialled = tokio::time::timeout(patience, async {
            let tcp = connect(&self.plan.host, self.plan.port)
                .await
                .map_err(|error| UpstreamError::Unreachable(error.to_string()))?;
            let Some(connector) = connector else { return Ok((Wire::Plain(tcp), false)) };
            let name = self.server_name.clone();
            let name = name.ok_or_else(|| UpstreamError::Tls("its host is no name for TLS".to_owned()))?;
            let stream =
                connector.connect(name, tcp).await.map_err(|error| UpstreamError::Tls(error.to_string()))?;
            let http2 = stream.get_ref().1.alpn_protocol() == Some(tls::HTTP2);
            Ok((Wire::Tls(Box::new(TlsStream::from(stream))), http2))
        });
        dialled.await.unwrap_or(Err(UpstreamError::ConnectTimeout(patience)))
    }
}

/// Counts a connection while its task lives.
struct OpenCount(Weak<Upstream>);

impl OpenCount {
    fn new(upstream: &Arc<Upstream>) -> Self {
        upstream.counters.open.increment();
        Self(Arc::downgrade(upstream))
    }
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        if let Some(upstream) = self.0.upgrade() {
            upstream.counters.open.decrement();
        }
    }
}

/// Tries the host's addresses in turn.
async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in tokio::net::lookup_host((host, port)).await? {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = io::Error::new(error.kind(), format!("{address}: {error}")),
        }
    }
    Err(last)
}

/// From the form of HTTP/1.1 to that of HTTP/2: the authority in the URI, nothing of the connection.
fn into_http2(request: &mut Request<OutBody>, https: bool) {
    let host = request.headers_mut().remove(HOST);
    request.headers_mut().remove(CONNECTION);
    let Some(authority) = host.and_then(|host| host.to_str().ok()?.parse().ok()) else { return };
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(if https { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP });
    parts.authority = Some(authority);
    parts.path_and_query.get_or_insert(http::uri::PathAndQuery::from_static("/"));
    // All three parts are there, which is what makes a URI whole.
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
}

/// Closes connections that nothing has used for a while, for as long as the upstream exists.
async fn reap(upstream: Weak<Upstream>, idle_timeout: Duration) {
    let period = (idle_timeout / 2).max(Duration::from_millis(100));
    loop {
        tokio::time::sleep(period).await;
        let Some(upstream) = upstream.upgrade() else { return };
        lock(&upstream.idle).retain(|idle| !idle.sender.is_closed() && idle.since.elapsed() < idle_timeout);
    }
}
