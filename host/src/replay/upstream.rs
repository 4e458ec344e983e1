//! An HTTP upstream in this process that answers as recorded.
//!
//! A replay through a proxy needs something behind the proxy. [`Upstream::plan`] stores an answer
//! under a number; a request that carries the number in [`REPLAY_ID_HEADER`] gets that answer, byte
//! for byte, and what the upstream was sent is kept until [`Upstream::take`], so that a test can
//! also see what the proxy did to the request. The same server plays the LLM in `driftlock demo`,
//! and the misbehaving peer in the tests: slow, in tiny chunks, or dying in the middle of a body.
//!
//! Cost: one task a connection; an answer is held from `plan` to `take`, so a sequential replay
//! holds one at a time. Request bodies are read whole, up to [`BODY_MAX_BYTES`].
//!
//! It speaks HTTP/1.1 and, with prior knowledge, HTTP/2. Left out on purpose: TLS and any idea of what an LLM would say.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::TRAILER;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Sleep;

use super::wire::{BODY_MAX_BYTES, REPLAY_ID_HEADER};
use crate::capture::{HttpRequest, HttpResponse, header};

/// How an answer's body travels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// Where the body is cut.
    pub split: Split,
    /// Chunked transfer coding; with a `content-length` otherwise.
    pub chunked: bool,
    /// Pause before each piece.
    pub pause: Duration,
    /// The connection is closed after this many bytes of body.
    pub die_after_bytes: Option<usize>,
    /// Trailers, sent only with `chunked` and to a request with `te: trailers`.
    pub trailers: Vec<(String, String)>,
}

/// Where a body is cut into pieces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Split {
    /// One piece.
    #[default]
    Whole,
    /// After each blank line, which ends a server-sent event.
    Events,
    /// Every so many bytes, at least 1.
    Every(usize),
}

impl Delivery {
    /// As the recorded headers suggest: server-sent events in chunks that end with an event, all
    /// else, and an empty body, in one piece with its length.
    pub fn recorded(response: &HttpResponse) -> Self {
        let content_type = header(&response.headers, "content-type").unwrap_or_default();
        if !response.body.is_empty()
            && content_type.trim_start().to_ascii_lowercase().starts_with("text/event-stream")
        {
            Self { split: Split::Events, chunked: true, ..Self::default() }
        } else {
            Self::default()
        }
    }
}

/// Why an upstream did not start, or will not answer as asked.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No free loopback port.
    #[error("the replaying upstream cannot listen on 127.0.0.1: {0}; check the limit of open files")]
    Listen(#[from] io::Error),
    /// An answer that is no HTTP message; `wire::on_the_wire` finds this earlier.
    #[error("the recorded response cannot be sent: {0}")]
    Response(#[from] http::Error),
}

/// The running upstream. Its tasks end when it is dropped.
#[derive(Debug)]
pub struct Upstream {
    address: SocketAddr,
    next: AtomicU64,
    plans: Plans,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Plan {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    delivery: Delivery,
    received: Option<HttpRequest>,
}

type Plans = Arc<Mutex<HashMap<u64, Plan>>>;

fn lock(plans: &Plans) -> MutexGuard<'_, HashMap<u64, Plan>> {
    // Nothing panics while the lock is held, so the map is whole even if poisoned.
    plans.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Upstream {
    /// Listens on a free loopback port. Needs a Tokio runtime.
    ///
    /// # Errors
    /// [`UpstreamError::Listen`].
    pub async fn start() -> Result<Self, UpstreamError> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let plans = Plans::default();
        let accepting = tokio::spawn(accept(listener, plans.clone()));
        Ok(Self { address, next: AtomicU64::new(1), plans, accepting })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stores an answer; the number is the value of [`REPLAY_ID_HEADER`] that asks for it. Numbers
    /// start at 1 and are never used twice.
    ///
    /// # Errors
    /// [`UpstreamError::Response`] for a status or a header that HTTP does not allow.
    pub fn plan(&self, response: &HttpResponse, delivery: Delivery) -> Result<u64, UpstreamError> {
        let mut headers = HeaderMap::new();
        for (name, value) in &response.headers {
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(http::Error::from)?;
            headers.append(name, HeaderValue::from_bytes(value.as_bytes()).map_err(http::Error::from)?);
        }
        for (name, _) in &delivery.trailers {
            // hyper sends only those that are announced.
            headers.append(TRAILER, HeaderValue::from_str(name).map_err(http::Error::from)?);
        }
        let status = StatusCode::from_u16(response.status).map_err(http::Error::from)?;
        let body = Bytes::copy_from_slice(&response.body);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.plans).insert(number, Plan { status, headers, body, delivery, received: None });
        Ok(number)
    }

    /// Forgets the answer and hands out the last request that asked for it, as it arrived; `None`
    /// if none did.
    pub fn take(&self, number: u64) -> Option<HttpRequest> {
        lock(&self.plans).remove(&number).and_then(|plan| plan.received)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, plans: Plans) {
    // Dropped with this task, and every connection with it.
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, or a peer that left at once: the listener itself stays good.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        // Without it small chunks would wait for each other; failing to set it harms nothing.
        let _ = stream.set_nodelay(true);
        let plans = plans.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| answer(request, plans.clone()));
            // An error here is a peer that left or a death that was planned.
            let mut server = auto::Builder::new(TokioExecutor::new());
            server.http1().max_headers(1024);
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(request: Request<Incoming>, plans: Plans) -> Result<Response<PlannedBody>, Infallible> {
    let (head, body) = request.into_parts();
    let number =
        head.headers.get(REPLAY_ID_HEADER).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let Some(number) = number else {
        return Ok(refuse("the request has no x-driftlock-replay-id header"));
    };
    let Ok(body) = Limited::new(body, BODY_MAX_BYTES).collect().await else {
        return Ok(refuse("the request's body broke off or is too large"));
    };
    let received = HttpRequest {
        method: head.method.to_string(),
        target: head.uri.path_and_query().map_or_else(|| head.uri.to_string(), ToString::to_string),
        headers: head
            .headers
            .iter()
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect(),
        body: body.to_bytes().into(),
    };
    let mut plans = lock(&plans);
    let Some(plan) = plans.get_mut(&number) else {
        return Ok(refuse("no answer is planned for this x-driftlock-replay-id"));
    };
    plan.received = Some(received);
    let mut response = Response::new(PlannedBody::new(plan.body.clone(), &plan.delivery));
    *response.status_mut() = plan.status;
    *response.headers_mut() = plan.headers.clone();
    Ok(response)
}

fn refuse(why: &'static str) -> Response<PlannedBody> {
    let mut response =
        Response::new(PlannedBody::new(Bytes::from_static(why.as_bytes()), &Delivery::default()));
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

/// A body that is delivered as planned.
#[derive(Debug)]
struct PlannedBody {
    pieces: VecDeque<Bytes>,
    /// `Some` when the length is announced.
    length: Option<u64>,
    pause: Duration,
    sleeping: Option<Pin<Box<Sleep>>>,
    dies: bool,
    trailers: Option<HeaderMap>,
}

impl PlannedBody {
    fn new(body: Bytes, delivery: &Delivery) -> Self {
        let length = (!delivery.chunked).then_some(body.len() as u64);
        let cut = delivery.die_after_bytes.filter(|&after| after < body.len());
        let kept = body.slice(..cut.unwrap_or(body.len()));
        let mut trailers = HeaderMap::new();
        for (name, value) in &delivery.trailers {
            if let (Ok(name), Ok(value)) =
                (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value))
            {
                trailers.append(name, value);
            }
        }
        Self {
            pieces: pieces(kept, delivery.split),
            length,
            pause: delivery.pause,
            sleeping: None,
            dies: cut.is_some(),
            trailers: (!trailers.is_empty()).then_some(trailers),
        }
    }
}

fn pieces(body: Bytes, split: Split) -> VecDeque<Bytes> {
    let mut ends = Vec::new();
    match split {
        Split::Whole => {}
        Split::Events => {
            let mut start = 0;
            while let Some(end) = event_end(&body[start..]) {
                start += end;
                ends.push(start);
            }
        }
        Split::Every(bytes) => {
            ends.extend((1..).map(|n| n * bytes.max(1)).take_while(|&end| end < body.len()))
        }
    }
    ends.push(body.len());
    let mut start = 0;
    let cut = |end| {
        let piece = body.slice(start..end);
        start = end;
        piece
    };
    ends.into_iter().map(cut).filter(|piece| !piece.is_empty()).collect()
}

/// Length of the first event, its blank line included; events end in LF LF or CR LF CR LF.
fn event_end(bytes: &[u8]) -> Option<usize> {
    let find = |needle: &[u8]| {
        bytes.windows(needle.len()).position(|window| window == needle).map(|at| at + needle.len())
    };
    match (find(b"\n\n"), find(b"\r\n\r\n")) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

impl Body for PlannedBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        if this.pieces.is_empty() && !this.dies {
            return Poll::Ready(this.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        // A death is put off like a piece, and by a moment at least: hyper drops what it has not
        // yet written when a body fails, and the peer is to see the bytes before it.
        let pause =
            if this.pieces.is_empty() { this.pause.max(Duration::from_millis(5)) } else { this.pause };
        if !pause.is_zero() {
            let sleep = this.sleeping.get_or_insert_with(|| Box::pin(tokio::time::sleep(pause)));
            ready!(sleep.as_mut().poll(cx));
            this.sleeping = None;
        }
        match this.pieces.pop_front() {
            Some(piece) => Poll::Ready(Some(Ok(Frame::data(piece)))),
            None => {
                this.dies = false;
                Poll::Ready(Some(Err(io::Error::other("planned death"))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty() && !self.dies && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        // Announced once, before the first piece, which is when hyper asks.
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    fn response(content_type: &str, body: &str) -> HttpResponse {
        HttpResponse {
            status: 200,
            headers: vec![("content-type".to_owned(), content_type.to_owned())],
            body: body.as_bytes().to_vec(),
        }
    }

    async fn ask(upstream: &Upstream, number: &str) -> String {
        let mut stream = TcpStream::connect(upstream.address()).await.unwrap();
        let request = format!(
            "POST /p?q HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: 2\r\n{REPLAY_ID_HEADER}: {number}\r\n\r\nhi"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn json_comes_with_its_length_and_the_request_is_kept() {
        let upstream = Upstream::start().await.unwrap();
        let response = response("application/json", "{\"a\":1}");
        let number = upstream.plan(&response, Delivery::recorded(&response)).unwrap();
        let answer = ask(&upstream, &number.to_string()).await;
        assert!(
            answer.contains("content-length: 7\r\n") && answer.ends_with("\r\n\r\n{\"a\":1}"),
            "{answer}"
        );
        let received = upstream.take(number).unwrap();
        assert_eq!((received.method.as_str(), received.target.as_str()), ("POST", "/p?q"));
        assert_eq!(received.body, b"hi");
        assert!(ask(&upstream, &number.to_string()).await.contains("404"), "an answer is given until taken");
        assert!(ask(&upstream, "x").await.contains("404"));
    }

    #[tokio::test]
    async fn events_come_one_chunk_each() {
        let upstream = Upstream::start().await.unwrap();
        let response = response("text/event-stream; charset=utf-8", "data: 1\n\ndata: 2\r\n\r\ndata: 3");
        let number = upstream.plan(&response, Delivery::recorded(&response)).unwrap();
        let answer = ask(&upstream, &number.to_string()).await;
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        assert_eq!(body, "9\r\ndata: 1\n\n\r\nB\r\ndata: 2\r\n\r\n\r\n7\r\ndata: 3\r\n0\r\n\r\n");
    }

    #[tokio::test]
    async fn a_planned_death_sends_what_comes_before_it_and_no_end() {
        let upstream = Upstream::start().await.unwrap();
        for chunked in [true, false] {
            let delivery =
                Delivery { split: Split::Every(3), chunked, die_after_bytes: Some(5), ..Delivery::default() };
            let number = upstream.plan(&response("text/plain", "abcdefgh"), delivery).unwrap();
            let answer = ask(&upstream, &number.to_string()).await;
            assert!(answer.contains("abc") && answer.contains("de"), "{answer}");
            assert!(!answer.contains("f") || !answer.contains("defgh"), "{answer}");
            assert!(!answer.ends_with("0\r\n\r\n"), "{answer}");
        }
    }

    #[test]
    fn every_split_gives_the_same_bytes() {
        let body = Bytes::from_static(b"data: a\n\n\n\ndata: b\r\n\r\n");
        for split in [Split::Whole, Split::Events, Split::Every(0), Split::Every(4), Split::Every(99)] {
            let joined: Vec<u8> = pieces(body.clone(), split).iter().flatten().copied().collect();
            assert_eq!(joined, body, "{split:?}");
        }
        assert!(pieces(Bytes::new(), Split::Events).is_empty());
    }
}
