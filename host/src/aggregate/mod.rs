//! `driftlock serve`: snapshots for filters, and what the observations that they send back say together.
//!
//! What: a small HTTP/1.1 service. Filters pull a snapshot by its digest or the current one (see
//! `driftlock_inspect::baselines::pull`) and post batches of verdicts, which become lines of a file and are
//! followed stream by stream: false discovery rate, drift, seasons (`watch`).
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/snapshots/current` | the newest snapshot, its digest as `etag`; 304 where `if-none-match` has it |
//! | `GET /v1/snapshots/SHA256` | that one |
//! | `POST /v1/observations` | 204 once the lines (`application/x-ndjson`) are in the file |
//! | `GET /v1/streams` | what is known of each stream, JSON ([`Report`]) |
//! | `GET /metrics` | the same in numbers, for Prometheus |
//! | `GET /healthz` | 200 |
//!
//! Cost: a snapshot is read from disk for each answer that carries it; a poll that ends in 304 costs a
//! directory listing.
//!
//! Left out on purpose: credentials and TLS (bind it where only proxies reach it), training (observations hold
//! no text; `driftlock adapt` has captures), a database: observations are one file of JSON lines.

mod observations;
mod snapshots;
mod watch;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use clap::Parser;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use observations::Observations;
pub use observations::Refused;
use snapshots::Snapshots;
pub use watch::{
    Discovery, DriftReport, MAX_STREAMS, ObservedSpan, Report, SeasonReport, StreamReport, UnitShare, Watch,
    WatchArgs, WatchError,
};

/// Longest batch of observations.
const MAX_BATCH_BYTES: usize = 8 << 20;
/// Connections served at once.
const MAX_CONNECTIONS: usize = 1024;
/// How long a client may take for its headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take for a batch.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Arguments of `driftlock serve`.
#[derive(Debug, Parser)]
pub struct Args {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:8470")]
    pub listen: SocketAddr,
    /// Folder of snapshots, as `driftlock train` writes them. The one changed last is the current one.
    #[arg(long, value_name = "DIR")]
    pub snapshots: PathBuf,
    /// File that observations are appended to, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub observations: PathBuf,
    /// How streams are followed.
    #[command(flatten)]
    pub watch: WatchArgs,
}

/// Why the service does not run.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address.
    #[error("cannot listen on {address}: {source}; choose another with --listen")]
    Listen {
        /// Which one.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file or folder.
    #[error("cannot {action} {path}: {source}; check the path and its permissions")]
    File {
        /// "read", "open", …
        action: &'static str,
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An option of following.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// No threads.
    #[error("cannot start the async runtime: {0}")]
    Runtime(std::io::Error),
}

/// A running service. Stops when dropped.
#[derive(Debug)]
pub struct Service {
    /// Where it listens.
    pub address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        // Its connections are the task's.
        self.accepting.abort();
    }
}

#[derive(Debug)]
struct Shared {
    snapshots: Snapshots,
    observations: Observations,
}

impl Service {
    /// Starts the service on the current runtime.
    ///
    /// # Errors
    /// [`ServeError`] if the address, the folder or the file cannot be used.
    pub async fn start(args: &Args) -> Result<Self, ServeError> {
        let snapshots = Snapshots::open(&args.snapshots)?;
        let observations = Observations::open(&args.observations, Watch::new(&args.watch)?)?;
        let failed = |source| ServeError::Listen { address: args.listen, source };
        let listener = TcpListener::bind(args.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared { snapshots, observations });
        Ok(Self { address, accepting: tokio::spawn(accept(listener, shared)) })
    }
}

/// Runs until it is told to stop.
///
/// # Errors
/// [`ServeError`].
pub fn run(args: &Args) -> Result<(), ServeError> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(ServeError::Runtime)?;
    runtime.block_on(async {
        let service = Service::start(args).await?;
        anstream::eprintln!("driftlock serve: http://{}", service.address);
        tokio::signal::ctrl_c().await.map_err(ServeError::Runtime)
    })
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = listener.accept().await;
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = accepted else {
            // Out of file descriptors: others have to end first.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        if connections.len() >= MAX_CONNECTIONS {
            continue;
        }
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            let service = service_fn(|request| {
                let shared = Arc::clone(&shared);
                async move { Ok::<_, Infallible>(answer(&shared, request).await) }
            });
            // A client that goes away is its own affair.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(shared: &Arc<Shared>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let reads = method == Method::GET || method == Method::HEAD;
    match (path.as_str(), path.strip_prefix("/v1/snapshots/")) {
        ("/healthz", _) if reads => text(StatusCode::OK, "ok"),
        (_, Some(wanted)) if reads => {
            let known = request.headers().get(header::IF_NONE_MATCH).cloned();
            let (shared, wanted) = (Arc::clone(shared), wanted.to_owned());
            let found = tokio::task::spawn_blocking(move || shared.snapshots.find(&wanted)).await;
            snapshot(found.ok().flatten(), known.as_ref())
        }
        ("/v1/streams", _) if reads => match serde_json::to_string_pretty(&shared.observations.report()) {
            Ok(json) => typed(StatusCode::OK, "application/json", json),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        },
        ("/metrics", _) if reads => {
            let metrics = shared.observations.report().metrics();
            typed(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics)
        }
        ("/v1/observations", _) if method == Method::POST => observe(shared, request.into_body()).await,
        ("/healthz" | "/v1/observations" | "/v1/streams" | "/metrics", _) | (_, Some(_)) => text(
            StatusCode::METHOD_NOT_ALLOWED,
            "snapshots, streams and metrics are read with GET, observations sent with POST",
        ),
        _ => text(
            StatusCode::NOT_FOUND,
            "try /v1/streams, /metrics, /v1/snapshots/current, /v1/snapshots/SHA256 or /v1/observations",
        ),
    }
}

fn snapshot(found: Option<snapshots::Found>, known: Option<&HeaderValue>) -> Response<Full<Bytes>> {
    let Some(found) = found else {
        return text(StatusCode::NOT_FOUND, "there is no such snapshot in the folder given with --snapshots");
    };
    let etag = format!("\"{}\"", found.digest);
    let same = known.and_then(|known| known.to_str().ok()).is_some_and(|known| {
        known.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag || tag.trim() == "*")
    });
    let mut response = if same {
        Response::new(Full::default())
    } else {
        match found.read() {
            Ok(bytes) => Response::new(Full::from(bytes)),
            Err(_) => {
                return text(StatusCode::SERVICE_UNAVAILABLE, "the snapshot is being replaced; ask again");
            }
        }
    };
    if same {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    } else {
        let binary = HeaderValue::from_static("application/octet-stream");
        response.headers_mut().insert(header::CONTENT_TYPE, binary);
    }
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response
}

async fn observe(shared: &Arc<Shared>, body: Incoming) -> Response<Full<Bytes>> {
    let body = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BATCH_BYTES).collect()).await;
    let batch = match body {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return text(StatusCode::PAYLOAD_TOO_LARGE, "a batch has at most 8 MiB");
        }
        _ => return text(StatusCode::BAD_REQUEST, "the batch did not come to its end"),
    };
    let shared = Arc::clone(shared);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let unix_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    match tokio::task::spawn_blocking(move || shared.observations.append(&batch, unix_ms)).await {
        Ok(Ok(_)) => {
            let mut response = Response::new(Full::default());
            *response.status_mut() = StatusCode::NO_CONTENT;
            response
        }
        Ok(Err(refused @ Refused::Line(_))) => text(StatusCode::BAD_REQUEST, &refused.to_string()),
        Ok(Err(failed @ Refused::Write(_))) => text(StatusCode::INSUFFICIENT_STORAGE, &failed.to_string()),
        Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "the batch was not written"),
    }
}

fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", format!("{text}\n"))
}

fn typed(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
