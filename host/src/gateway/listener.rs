//! Accepting clients: TCP or TLS, HTTP/1.1 or HTTP/2, each connection in a task of its own.
//!
//! TLS agrees on a protocol by ALPN; without TLS the first bytes tell (HTTP/2 with prior knowledge
//! begins with a fixed preface). A reload replaces certificates and limits for connections to come.
//! At the connection limit nothing more is accepted, so clients wait in the kernel's queue.
//!
//! Cost: a task and hyper's buffers per connection (about 10 KiB idle), one look at the first bytes.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http::{Request, Version};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::{TlsAcceptor, TlsStream};

use super::error::GatewayError;
use super::filter::ConnectionInfo;
use super::plan::{Limits, ListenerPlan};
use super::wire::{Patient, Wire};
use super::{Shared, serve, tls};

/// What an HTTP/2 client without TLS begins with (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Fields that hyper parses without an allocation; a limit of its own would cost one per message.
const HYPERS_HEADERS: usize = 100;

/// An address that clients connect to.
pub(super) struct Listener {
    /// As configured; port 0 stands for any.
    pub(super) configured: SocketAddr,
    pub(super) local: SocketAddr,
    accepting: Arc<RwLock<Accepting>>,
    stop: watch::Sender<bool>,
    task: JoinHandle<JoinSet<()>>,
}

/// What the next connection gets.
struct Accepting {
    tls: Option<TlsAcceptor>,
    slots: Arc<Semaphore>,
    connections: usize,
}

impl Accepting {
    fn new(plan: &ListenerPlan, limits: &Limits) -> Self {
        Self {
            tls: plan.tls.clone().map(TlsAcceptor::from),
            slots: Arc::new(Semaphore::new(limits.connections.min(Semaphore::MAX_PERMITS))),
            connections: limits.connections,
        }
    }
}

/// Binds an address.
pub(super) async fn bind(
    address: SocketAddr,
    role: &'static str,
) -> Result<(TcpListener, SocketAddr), GatewayError> {
    let failed = |source| GatewayError::Listen { address, role, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    Ok((listener, local))
}

impl Listener {
    /// Starts to accept on a bound socket.
    pub(super) fn start(
        (socket, local): (TcpListener, SocketAddr),
        plan: &ListenerPlan,
        limits: &Limits,
        shared: &Arc<Shared>,
    ) -> Self {
        let accepting = Arc::new(RwLock::new(Accepting::new(plan, limits)));
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(accept(socket, Arc::clone(&accepting), stopped, Arc::clone(shared)));
        Self { configured: plan.address, local, accepting, stop, task }
    }

    /// For connections to come.
    pub(super) fn update(&self, plan: &ListenerPlan, limits: &Limits) {
        let mut accepting = self.accepting.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Accepting::new(plan, limits);
        if next.connections == accepting.connections {
            next.slots = Arc::clone(&accepting.slots);
        }
        *accepting = next;
    }

    /// Accepts no more and asks connections to end after what they are doing.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// After [`Listener::stop`]: waits for the connections and cuts those that take too long. Returns how
    /// many were cut.
    pub(super) async fn ended(mut self, deadline: Instant) -> usize {
        let Ok(mut connections) = (&mut self.task).await else { return 0 };
        let drained = async { while connections.join_next().await.is_some() {} };
        let _ = timeout_at(deadline, drained).await;
        let cut = connections.len();
        connections.shutdown().await;
        cut
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Accepts until told to stop; returns the connections that are still open.
async fn accept(
    socket: TcpListener,
    accepting: Arc<RwLock<Accepting>>,
    mut stop: watch::Receiver<bool>,
    shared: Arc<Shared>,
) -> JoinSet<()> {
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let slots = Arc::clone(&accepting.read().unwrap_or_else(PoisonError::into_inner).slots);
            // Never closed.
            let slot = slots.acquire_owned().await.ok();
            (slot, socket.accept().await)
        };
        tokio::select! {
            () = stopped(&mut stop) => return connections,
            (slot, accepted) = next => match accepted {
                Ok((stream, peer)) => {
                    let tls = accepting.read().unwrap_or_else(PoisonError::into_inner).tls.clone();
                    let shared = Arc::clone(&shared);
                    connections.spawn(connection(shared, stream, peer, tls, slot, stop.clone()));
                }
                Err(error) => {
                    // Out of file descriptors, or a client that was gone already: let others end.
                    tracing::warn!(target: "driftlock::gateway", %error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            // Takes ended connections out of the set.
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

/// Serves one connection to its end.
async fn connection(
    shared: Arc<Shared>,
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<TlsAcceptor>,
    _slot: Option<OwnedSemaphorePermit>,
    mut stop: watch::Receiver<bool>,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(target: "driftlock::gateway", %error, "TCP_NODELAY refused");
    }
    let Ok(local) = stream.local_addr() else { return };
    let (patience, limits) = {
        let generation = shared.generation();
        (generation.terms.client_timeout, generation.limits.clone())
    };
    shared.counters.connections.increment();
    let mut info = ConnectionInfo {
        id: shared.counters.connections.value(),
        peer,
        local,
        tls: tls.is_some(),
        mtls: false,
        protocol: "HTTP/1.1",
    };
    let opened = async {
        match tls {
            None => begins_http2(&stream, patience).await.map(|http2| (Wire::Plain(stream), http2)),
            Some(acceptor) => match timeout(patience, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let http2 = stream.get_ref().1.alpn_protocol() == Some(tls::HTTP2);
                    Some((Wire::Tls(Box::new(TlsStream::from(stream))), http2))
                }
                failed => {
                    shared.counters.tls_failures.increment();
                    let error = failed.map_or_else(
                        |_| "time-out".to_owned(),
                        |stream| match stream {
                            Ok(_) => String::new(),
                            Err(error) => error.to_string(),
                        },
                    );
                    tracing::debug!(target: "driftlock::gateway", %peer, error, "TLS handshake failed");
                    None
                }
            },
        }
    };
    let opened = tokio::select! {
        opened = opened => opened,
        () = stopped(&mut stop) => None,
    };
    let Some((wire, http2)) = opened else { return };
    if let Wire::Tls(stream) = &wire {
        info.mtls = stream.get_ref().1.peer_certificates().is_some();
    }
    let io = TokioIo::new(Patient::new(wire, patience));
    let service = service_fn({
        let shared = Arc::clone(&shared);
        move |request: Request<Incoming>| {
            let protocol = match request.version() {
                Version::HTTP_2 => "HTTP/2",
                Version::HTTP_10 => "HTTP/1.0",
                _ => "HTTP/1.1",
            };
            serve::serve(Arc::clone(&shared), ConnectionInfo { protocol, ..info }, request)
        }
    });
    let ended = if http2 {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams)
            .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
            .keep_alive_interval(patience)
            .keep_alive_timeout(patience)
            .enable_connect_protocol();
        let mut connection = pin!(builder.serve_connection(io, service));
        tokio::select! {
            ended = &mut connection => ended,
            () = stopped(&mut stop) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    } else {
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(patience).max_header_size(limits.header_bytes);
        if limits.headers != HYPERS_HEADERS {
            builder.max_headers(limits.headers);
        }
        let mut connection = pin!(builder.serve_connection(io, service).with_upgrades());
        tokio::select! {
            ended = &mut connection => ended,
            () = stopped(&mut stop) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(target: "driftlock::gateway", %error, "connection ended early");
    }
}

/// Whether a client begins with HTTP/2's preface; `None` if it sends nothing in time.
async fn begins_http2(stream: &TcpStream, patience: Duration) -> Option<bool> {
    let deadline = Instant::now() + patience;
    let mut start = [0; PREFACE.len()];
    loop {
        let count = timeout_at(deadline, stream.peek(&mut start)).await.ok()?.ok()?;
        if count == 0 {
            return None;
        }
        if !PREFACE.starts_with(&start[..count]) {
            return Some(false);
        }
        if count == PREFACE.len() {
            return Some(true);
        }
        // A part of the preface: peek would return the same at once.
        tokio::time::sleep(Duration::from_millis(1)).await;
        if Instant::now() >= deadline {
            return None;
        }
    }
}

/// Waits for the word to stop, or for whoever could give it to be gone.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}
