//! `driftlock gateway`: an HTTP/1.1 reverse proxy that runs a filter in front of one upstream.
//!
//! It exists so that Driftlock can stand inline without an Envoy, and so that the demo, replays and
//! tests can run the real .wasm in-process. Bodies stream both ways with back-pressure; a message is
//! collected only as far as the filter itself holds it. Per exchange it costs a few allocations per
//! header field and one mutex; per chunk one filter call and no copy of its own.
//!
//! ```text
//!   serve.rs      request -> filter -> upstream -> filter -> response
//!   lane.rs       one direction's bytes through the filter
//!   exchange.rs   what the two directions share
//!   filter.rs     the trait; wasm.rs implements it with host::abi
//! ```
//!
//! Left out on purpose, for a later issue: HTTP/2, TLS, several routes, retries.

mod access_log;
mod admin;
mod error;
mod exchange;
pub mod filter;
mod headers;
mod lane;
mod metrics;
mod options;
mod serve;
mod upstream;
mod wasm;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{Request, Uri};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

pub use access_log::{AccessLogTarget, AccessRecord};
pub use error::GatewayError;
pub use options::{Args, FailurePolicy, FilterSource, GatewayOptions};

use access_log::AccessLog;
use filter::{ConnectionInfo, FilterFactory};
use metrics::Counters;

/// A connection that takes longer will not come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ADMIN_HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// What every connection of a gateway uses.
pub(crate) struct Shared {
    filters: Option<Arc<dyn FilterFactory>>,
    client: upstream::UpstreamClient,
    upstream: Uri,
    upstream_name: String,
    failure_policy: FailurePolicy,
    upstream_timeout: Duration,
    client_timeout: Duration,
    counters: Counters,
    access_log: AccessLog,
    draining: AtomicBool,
}

/// A running gateway. Dropping it stops it at once; [`Gateway::shutdown`] lets exchanges end first.
pub struct Gateway {
    /// Where clients connect, with the port that was really taken.
    pub addr: SocketAddr,
    /// Where the admin endpoints are, if they were asked for.
    pub admin_addr: Option<SocketAddr>,
    shared: Arc<Shared>,
    drain_timeout: Duration,
    stop_traffic: watch::Sender<bool>,
    traffic: JoinHandle<JoinSet<()>>,
    stop_admin: watch::Sender<bool>,
    admin: Option<JoinHandle<JoinSet<()>>>,
}

impl Gateway {
    /// Starts listening. Has to run inside a tokio runtime with time and I/O enabled.
    ///
    /// # Errors
    /// [`GatewayError`] for an unusable option, an address in use, a filter that does not start.
    pub async fn start(options: GatewayOptions) -> Result<Self, GatewayError> {
        options.check()?;
        let filters = filters(&options).await?;
        let (listener, addr) = listen(options.listen, "traffic").await?;
        let admin = match options.admin {
            Some(address) => Some(listen(address, "admin").await?),
            None => None,
        };
        let shared = Arc::new(Shared {
            filters,
            client: upstream::client(options.upstream_timeout.min(CONNECT_TIMEOUT)),
            upstream_name: options.upstream.authority().map_or_else(String::new, ToString::to_string),
            upstream: options.upstream,
            failure_policy: options.failure_policy,
            upstream_timeout: options.upstream_timeout,
            client_timeout: options.client_timeout,
            counters: Counters::default(),
            access_log: AccessLog::open(options.access_log)?,
            draining: AtomicBool::new(false),
        });
        let (stop_traffic, traffic_stopped) = watch::channel(false);
        let (stop_admin, admin_stopped) = watch::channel(false);
        let admin_addr = admin.as_ref().map(|(_, address)| *address);
        let admin = admin.map(|(listener, _)| {
            let shared = Arc::clone(&shared);
            tokio::spawn(accept(listener, admin_stopped, move |stream, _, stop| {
                let shared = Arc::clone(&shared);
                let service = service_fn(move |request: Request<Incoming>| {
                    let response = admin::answer(&shared, &request);
                    async move { Ok::<_, Infallible>(response) }
                });
                drive(stream, service, ADMIN_HEADER_TIMEOUT, stop)
            }))
        });
        let traffic = {
            let shared = Arc::clone(&shared);
            tokio::spawn(accept(listener, traffic_stopped, move |stream, peer, stop| {
                let shared = Arc::clone(&shared);
                shared.counters.connections.increment();
                let connection = ConnectionInfo {
                    id: shared.counters.connections.value(),
                    peer,
                    local: stream.local_addr().unwrap_or(addr),
                };
                let header_timeout = shared.client_timeout;
                let service =
                    service_fn(move |request| serve::serve(Arc::clone(&shared), connection, request));
                drive(stream, service, header_timeout, stop)
            }))
        };
        Ok(Self {
            addr,
            admin_addr,
            shared,
            drain_timeout: options.drain_timeout,
            stop_traffic,
            traffic,
            stop_admin,
            admin,
        })
    }

    /// Stops accepting, lets exchanges end for up to the drain time-out, cuts the rest and writes
    /// out the access log. Returns how many connections had to be cut.
    pub async fn shutdown(mut self) -> usize {
        self.shared.draining.store(true, Ordering::Release);
        self.stop_traffic.send_replace(true);
        let mut cut = 0;
        if let Ok(mut connections) = (&mut self.traffic).await {
            let drained = async { while connections.join_next().await.is_some() {} };
            let _ = tokio::time::timeout(self.drain_timeout, drained).await;
            cut = connections.len();
            connections.shutdown().await;
        }
        // The admin endpoints outlive the drain, so that it can be watched.
        self.stop_admin.send_replace(true);
        if let Some(admin) = &mut self.admin
            && let Ok(mut connections) = admin.await
        {
            connections.shutdown().await;
        }
        let shared = Arc::clone(&self.shared);
        // Joining the writer blocks for as long as its file does.
        if let Err(error) = tokio::task::spawn_blocking(move || shared.access_log.close()).await {
            tracing::error!(target: "driftlock::gateway", %error, "the access log was not closed");
        }
        cut
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.traffic.abort();
        if let Some(admin) = &self.admin {
            admin.abort();
        }
    }
}

async fn filters(options: &GatewayOptions) -> Result<Option<Arc<dyn FilterFactory>>, GatewayError> {
    let bytes =
        match &options.filter {
            FilterSource::None => return Ok(None),
            FilterSource::Native(factory) => return Ok(Some(Arc::clone(factory))),
            FilterSource::WasmFile(path) => tokio::fs::read(path).await.map_err(|source| {
                GatewayError::File { action: "read the filter", path: path.clone(), source }
            })?,
            FilterSource::WasmBytes(bytes) => bytes.clone(),
        };
    Ok(Some(Arc::new(wasm::WasmFilters::start(bytes, options).await?)))
}

async fn listen(address: SocketAddr, role: &'static str) -> Result<(TcpListener, SocketAddr), GatewayError> {
    let failed = |source| GatewayError::Listen { address, role, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    Ok((listener, local))
}

/// Accepts until told to stop; returns the connections that are still open.
async fn accept<F, C>(listener: TcpListener, mut stop: watch::Receiver<bool>, connection: F) -> JoinSet<()>
where
    F: Fn(TcpStream, SocketAddr, watch::Receiver<bool>) -> C,
    C: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stopped(&mut stop) => return connections,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    if let Err(error) = stream.set_nodelay(true) {
                        tracing::debug!(target: "driftlock::gateway", %error, "TCP_NODELAY refused");
                    }
                    connections.spawn(connection(stream, peer, stop.clone()));
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

/// Serves one connection; once told to stop, ends it after the exchange it is in.
async fn drive<S, B>(stream: TcpStream, service: S, header_timeout: Duration, mut stop: watch::Receiver<bool>)
where
    S: hyper::service::HttpService<Incoming, ResBody = B>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(target: "driftlock::gateway", %error, "connection ended early");
    }
}

/// Waits for the word to stop, or for whoever could give it to be gone.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Runs `driftlock gateway` until SIGTERM or SIGINT.
///
/// # Errors
/// [`GatewayError`] as [`Gateway::start`], and when the runtime cannot be set up.
pub fn run(args: Args) -> Result<(), GatewayError> {
    let options = GatewayOptions::try_from(args)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(GatewayError::Runtime)?;
    runtime.block_on(async {
        let upstream = options.upstream.clone();
        let drain_timeout = options.drain_timeout;
        let signal = stop_signal()?;
        let gateway = Gateway::start(options).await?;
        anstream::eprintln!("driftlock gateway: http://{} -> {upstream}", gateway.addr);
        if let Some(admin) = gateway.admin_addr {
            anstream::eprintln!("driftlock gateway: metrics at http://{admin}/metrics");
        }
        signal.await;
        anstream::eprintln!("driftlock gateway: stopping, exchanges have {drain_timeout:?} to end");
        let cut = gateway.shutdown().await;
        if cut > 0 {
            anstream::eprintln!("driftlock gateway: cut {cut} connections that had not ended");
        }
        Ok(())
    })
}

#[cfg(unix)]
fn stop_signal() -> Result<impl Future<Output = ()>, GatewayError> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(GatewayError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(GatewayError::Runtime)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn stop_signal() -> Result<impl Future<Output = ()>, GatewayError> {
    Ok(async {
        if let Err(error) = tokio::signal::ctrl_c().await {
            tracing::error!(target: "driftlock::gateway", %error, "cannot wait for Ctrl-C");
        }
    })
}
