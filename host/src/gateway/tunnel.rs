//! Connections that leave HTTP: websockets and CONNECT.
//!
//! The request's and the response's headers go through the filters as in any exchange; the bytes
//! after them do not, since they are no HTTP message. So the access log and the metrics name every
//! tunnel (`upgrade`), and a filter sees a request without a body end: Driftlock reports it as not
//! inspected. A route can refuse both.
//!
//! A websocket of an HTTP/2 client (RFC 8441) looks to filters, routes and upstreams like one of
//! HTTP/1.1, as in Envoy. Left out on purpose: websockets to upstreams that speak HTTP/2 only.
//!
//! Bytes are copied both ways with back-pressure until both sides have ended, one breaks, or nothing
//! has moved for `tunnel_idle`. Costs two 8 KiB buffers per tunnel.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{HeaderValue, Method, Request, header};
use hyper::ext::Protocol;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::exchange::{Exchange, Guard};

/// What a client wants to leave HTTP for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Leaving {
    /// `Upgrade: websocket` (RFC 6455).
    Websocket,
    /// The same by an extended CONNECT of HTTP/2 (RFC 8441).
    WebsocketStream,
    /// CONNECT (RFC 9110 section 9.3.6).
    Connect,
}

impl Leaving {
    /// What a request asks for, if for one of these.
    pub(super) fn asked<B>(request: &Request<B>) -> Option<Self> {
        let (method, headers) = (request.method(), request.headers());
        if *method == Method::CONNECT {
            return Some(match request.extensions().get::<Protocol>() {
                Some(protocol) if protocol.as_str().eq_ignore_ascii_case("websocket") => {
                    Self::WebsocketStream
                }
                _ => Self::Connect,
            });
        }
        let lists = |name, token: &str| {
            let values = headers.get_all(name).iter().filter_map(|value: &HeaderValue| value.to_str().ok());
            values.flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(token))
        };
        let websocket = *method == Method::GET
            && headers.contains_key(header::UPGRADE)
            && lists(header::UPGRADE, "websocket")
            && lists(header::CONNECTION, "upgrade");
        websocket.then_some(Self::Websocket)
    }

    pub(super) fn is_websocket(&self) -> bool {
        *self != Self::Connect
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Websocket | Self::WebsocketStream => "websocket",
            Self::Connect => "connect",
        }
    }
}

/// The upstream's end of a tunnel.
pub(super) enum FarEnd<S> {
    /// Open already.
    Open(S),
    /// Once its connection has left HTTP.
    Upgrade(OnUpgrade),
}

/// Passes bytes until the tunnel ends; then the exchange is over.
pub(super) async fn run<S>(exchange: Arc<Exchange>, mut guard: Guard, near: OnUpgrade, far: FarEnd<S>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut cut = exchange.shared.cut.subscribe();
    let idle = exchange.terms.tunnel_idle_timeout;
    let moved = Moved::default();
    let ended = {
        let copied = async {
            let near = TokioIo::new(near.await.map_err(|_| "client_closed")?);
            match far {
                FarEnd::Open(far) => copy(near, far, &moved).await,
                FarEnd::Upgrade(far) => {
                    let far = TokioIo::new(far.await.map_err(|_| "upstream_aborted")?);
                    copy(near, far, &moved).await
                }
            }
        };
        tokio::select! {
            ended = copied => ended,
            () = moved.stalls(idle) => Err("tunnel_idle"),
            _ = cut.wait_for(|cut| *cut) => Err("draining"),
        }
    };
    exchange.edit_record(|record| {
        record.bytes_in += moved.from_client.load(Ordering::Relaxed);
        record.bytes_out += moved.to_client.load(Ordering::Relaxed);
    });
    if let Err(reason) = ended {
        exchange.abort(reason);
    }
    guard.complete();
}

#[derive(Default)]
struct Moved {
    from_client: AtomicU64,
    to_client: AtomicU64,
}

impl Moved {
    /// Returns once nothing has moved for `idle`.
    async fn stalls(&self, idle: Duration) {
        let total =
            || self.from_client.load(Ordering::Relaxed).wrapping_add(self.to_client.load(Ordering::Relaxed));
        let mut seen = total();
        let mut since = Instant::now();
        while since.elapsed() < idle {
            tokio::time::sleep((idle / 8).max(Duration::from_millis(1))).await;
            if total() != seen {
                (seen, since) = (total(), Instant::now());
            }
        }
    }
}

async fn copy<A, B>(near: A, far: B, moved: &Moved) -> Result<(), &'static str>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (near_read, near_write) = tokio::io::split(near);
    let (far_read, far_write) = tokio::io::split(far);
    let up = pump(near_read, far_write, &moved.from_client);
    let down = pump(far_read, near_write, &moved.to_client);
    // The first to break ends both; one that ends well leaves the other its time.
    tokio::try_join!(async { up.await.map_err(|_| "client_closed") }, async {
        down.await.map_err(|_| "upstream_aborted")
    })?;
    Ok(())
}

/// One way, until its reader ends; the writer is then told so.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    moved: &AtomicU64,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 8 << 10];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
        moved.fetch_add(count as u64, Ordering::Relaxed);
    }
}
