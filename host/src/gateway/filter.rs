//! The seam between the HTTP server and whatever inspects its traffic.
//!
//! The gateway knows only these two traits: a [`FilterFactory`] opens one [`HttpFilter`] per
//! exchange, and the filter answers every piece of the exchange with a [`Step`]. It exists so that
//! the server can be tested against a filter written in Rust, and so that the WebAssembly host
//! stays free of HTTP servers (`gateway::wasm` joins the two).
//!
//! Every call is synchronous and short (microseconds): a filter that has to wait answers
//! [`Step::Hold`] and wakes the gateway through [`HttpFilter::poll_resumed`].
//!
//! Several filters of one exchange are joined in `chain`, which none of them sees.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;

/// Header fields in the order of the message, pseudo-headers (`:method`, `:path`, `:authority`,
/// `:scheme`, `:status`) first, names in lower case, values as the bytes on the wire.
pub type HeaderPairs = Vec<(Vec<u8>, Vec<u8>)>;

/// What the filter left for the access log: property path to value.
pub type FilterState = BTreeMap<String, Vec<u8>>;

/// Which way a piece of the exchange travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the upstream.
    Request,
    /// From the upstream (or from the gateway itself) to the client.
    Response,
}

/// The two ends of the client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// Number of the connection since the gateway started, from 1.
    pub id: u64,
    /// The client's address.
    pub peer: SocketAddr,
    /// The address the client connected to.
    pub local: SocketAddr,
    /// Whether the client speaks TLS.
    pub tls: bool,
    /// Whether the client showed a certificate, which one of the listener's authorities vouches for.
    pub mtls: bool,
    /// `HTTP/1.1`, `HTTP/2` or `HTTP/1.0`, of this request.
    pub protocol: &'static str,
}

/// Where an exchange goes, as the configuration names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteInfo {
    /// The route's name.
    pub name: Arc<str>,
    /// The upstream's name.
    pub upstream: Arc<str>,
}

/// What is to happen after the filter has seen a piece of the exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Send this on. It may be only a part of what the filter was given, or nothing.
    Forward(Release),
    /// The filter keeps everything it was given since its last `Forward` of this direction.
    Hold {
        /// Whether the filter wants to see more of the body meanwhile. If not, the gateway stops
        /// reading, and the sender feels it.
        read_on: bool,
    },
    /// Answer the client with this instead. When the response is already under way, the exchange
    /// is aborted, since its status can no longer change.
    Reply(LocalReply),
    /// Abort the exchange without an answer.
    Close,
}

/// What a filter lets go, in the order headers, body, trailers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Release {
    /// The headers: present exactly once per direction, in its first release.
    pub headers: Option<HeaderPairs>,
    /// Body bytes; may be empty.
    pub body: Bytes,
    /// The trailers, if the message has them.
    pub trailers: Option<HeaderPairs>,
    /// Nothing follows in this direction.
    pub end: bool,
}

impl Release {
    /// Adds what comes after this.
    pub fn append(&mut self, next: Self) {
        if self.headers.is_none() {
            self.headers = next.headers;
        }
        if self.body.is_empty() {
            self.body = next.body;
        } else if !next.body.is_empty() {
            self.body = [std::mem::take(&mut self.body), next.body].concat().into();
        }
        if self.trailers.is_none() {
            self.trailers = next.trailers;
        }
        self.end |= next.end;
    }
}

/// A response made by the filter or by the gateway itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalReply {
    /// HTTP status code.
    pub status: u16,
    /// Header fields, without `:status`. The gateway adds `content-length`.
    pub headers: HeaderPairs,
    /// The whole body.
    pub body: Bytes,
    /// Why, for the access log, as one word.
    pub details: String,
    /// Whether the filter's response callbacks see this reply on its way to the client.
    pub through_filter: bool,
}

/// Why a filter could not do its work.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    /// The filter crashed during this call, or during another exchange's call on the same VM.
    #[error("the filter crashed: {0}. Its VM is rebuilt; report the message to the filter's author")]
    Crashed(String),
    /// No VM is ready to take an exchange.
    #[error("no filter VM is ready: {0}. Check the plugin configuration and the filter's log")]
    Unavailable(String),
}

/// One exchange's view of the filter.
///
/// The gateway calls `headers` once per direction, then `body` for every chunk, then `trailers` if
/// the message has them. `end` is true on the last of these calls; a message whose end is found out
/// only after its last byte gets a last `body` call with no bytes.
pub trait HttpFilter: Send {
    /// The headers of one direction. `end`: the message has no body.
    ///
    /// # Errors
    /// [`FilterError`] when the filter is broken; the gateway then applies its failure policy and
    /// calls only `take_held` and `finish` from there on.
    fn headers(&mut self, direction: Direction, headers: HeaderPairs, end: bool)
    -> Result<Step, FilterError>;

    /// The next bytes of one direction's body.
    ///
    /// # Errors
    /// As [`HttpFilter::headers`].
    fn body(&mut self, direction: Direction, chunk: Bytes, end: bool) -> Result<Step, FilterError>;

    /// The trailers of one direction, which end its message.
    ///
    /// # Errors
    /// As [`HttpFilter::headers`].
    fn trailers(&mut self, direction: Direction, trailers: HeaderPairs) -> Result<Step, FilterError>;

    /// Ready when the filter has something for this direction that no call of this direction
    /// brought about (a timer, another exchange, the other direction), or when it crashed meanwhile.
    /// Registers the waker otherwise. Asked often, so it has to be cheap. Never answers `Hold`.
    fn poll_resumed(&mut self, direction: Direction, cx: &mut Context<'_>)
    -> Poll<Result<Step, FilterError>>;

    /// As `poll_resumed`, for whoever waits for the upstream's answer: ready only with `Reply`,
    /// `Close` or an error, which concern the whole exchange.
    fn poll_interrupted(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step, FilterError>>;

    /// After an error: what this direction had been given and had not let go, as it came in.
    fn take_held(&mut self, direction: Direction) -> Release;

    /// The exchange is over, however it went. Works after an error too.
    fn finish(self: Box<Self>) -> FilterState;
}

/// Opens a filter for each exchange.
pub trait FilterFactory: Send + Sync {
    /// A filter for a new exchange.
    ///
    /// # Errors
    /// [`FilterError::Unavailable`] when there is none to be had now.
    fn open(
        &self,
        connection: &ConnectionInfo,
        route: &RouteInfo,
    ) -> Result<Box<dyn HttpFilter>, FilterError>;

    /// After a refusal to open: waits for a VM that is being started, if one is, and not for long.
    fn soon(&self) -> Option<Pin<Box<dyn Future<Output = ()> + Send + '_>>> {
        None
    }

    /// Whether an exchange that arrives now would be inspected.
    fn ready(&self) -> bool {
        true
    }

    /// How many VMs, or whatever takes exchanges, are ready.
    fn vms_ready(&self) -> u64 {
        u64::from(self.ready())
    }
}
