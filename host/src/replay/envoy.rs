//! Replays recorded exchanges through a proxy that runs the filter, and collects the verdicts.
//!
//! The proxy is a real Envoy ([`crate::envoy`]) or the gateway of this crate; the upstream behind it
//! is a [`super::upstream::Upstream`], which answers as recorded. One exchange follows the other, since
//! a filter that is still learning depends on the order. For each the driver checks that the client
//! gets the upstream's bytes, and that the upstream gets the client's; the verdicts come from the
//! access log, matched by the replay's number, because that is where an operator finds them too.
//!
//! Nothing is dropped: an exchange that cannot be sent, or whose answer breaks off, is in the
//! result with its [`Failure`].
//!
//! Cost: one exchange in memory at a time, plus the verdicts of the part that is under way; about a millisecond an exchange on
//! loopback. Left out on purpose: concurrency (order matters) and load (see `benches/`).

use std::collections::HashMap;
use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, TE};
use http::{HeaderMap, HeaderValue, Request, Uri};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

use super::upstream::{Delivery, Upstream, UpstreamError};
use super::wire::{NotSendable, REPLAY_ID_HEADER, on_the_wire};
use crate::capture::{Exchange, HttpRequest, HttpResponse, header};
use crate::gateway::AccessRecord;

/// Where a proxy leaves the verdicts.
#[derive(Debug)]
pub enum VerdictSource {
    /// An Envoy's JSON access log, [`crate::envoy::Envoy::access_log`], read from its beginning.
    EnvoyLog(PathBuf),
    /// The access records of a gateway in this process.
    Gateway(Receiver<AccessRecord>),
}

/// How answers travel, and time limits.
#[derive(Clone, Debug)]
pub struct ReplayOptions {
    /// How every answer is delivered, in place of what [`Delivery::recorded`] says.
    pub delivery: Option<Delivery>,
    /// For one exchange, from connecting to the last byte of the answer.
    pub exchange_deadline: Duration,
    /// For the access log, after the last exchange (after each one for a gateway).
    pub log_deadline: Duration,
}

impl Default for ReplayOptions {
    fn default() -> Self {
        Self {
            delivery: None,
            exchange_deadline: Duration::from_secs(60),
            log_deadline: Duration::from_secs(10),
        }
    }
}

/// One exchange after its replay.
#[derive(Clone, Debug)]
pub struct ReplayedExchange {
    /// The exchange's identity in its capture.
    pub id: String,
    /// Status the client received; `None` when it received none.
    pub status: Option<u16>,
    /// Whether the client received the recorded body to the byte, and the upstream the client's.
    pub body_matches: bool,
    /// The answer's headers as the client received them, names in lower case.
    pub response_headers: Vec<(String, String)>,
    /// The answer's trailers, where it had any.
    pub response_trailers: Vec<(String, String)>,
    /// Filter state `driftlock.request`: the request's verdict as the filter wrote it.
    pub request_verdict_json: Option<String>,
    /// Filter state `driftlock.response`.
    pub response_verdict_json: Option<String>,
    /// Filter state `driftlock.outcome`.
    pub outcome: Option<String>,
    /// What went wrong with this exchange.
    pub failure: Option<Failure>,
}

/// Why an exchange is without a verdict, or without the recorded answer.
#[non_exhaustive]
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// It cannot be sent over HTTP/1.1.
    #[error("not sent: {0}")]
    NotSendable(#[from] NotSendable),
    /// The connection or the answer broke off.
    #[error("the exchange broke off: {0}")]
    Broken(String),
    /// No end within [`ReplayOptions::exchange_deadline`].
    #[error("no complete answer after {0:?}; the filter or the upstream holds it")]
    TimedOut(Duration),
    /// The request never came to the upstream: the proxy answered for itself.
    #[error("the proxy answered for itself with status {0}")]
    LocalReply(u16),
    /// The proxy answered but left no line in its access log.
    #[error("not in the proxy's access log after {0:?}")]
    Unlogged(Duration),
}

/// Why a whole replay stopped.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The planned answer is not one.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// The access log cannot be read.
    #[error("cannot read the access log {path}: {source}; is Envoy running?")]
    AccessLog {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line of the access log is not what `access_log_format` asks for.
    #[error("line {line} of the access log is not the JSON object Driftlock configures: {source}")]
    LogLine {
        /// 1-based line.
        line: u64,
        /// What the parser said.
        source: serde_json::Error,
    },
}

/// Sends the exchanges, one after the other, to the proxy at `gateway`, whose upstream must be
/// `upstream`, and returns one result each, in order. The exchanges go through
/// [`super::wire::on_the_wire`] first.
///
/// # Errors
/// [`ReplayError`] when the replay as a whole cannot go on; what befalls one exchange is its
/// [`Failure`].
pub async fn replay_through(
    gateway: SocketAddr,
    upstream: &Upstream,
    verdicts: &mut VerdictSource,
    exchanges: impl IntoIterator<Item = Exchange>,
    options: &ReplayOptions,
) -> Result<Vec<ReplayedExchange>, ReplayError> {
    Passage::new(gateway, upstream, verdicts, options).replay(exchanges).await
}

/// A replay that is made part by part, so that its verdicts can be written as it goes.
pub struct Passage<'a> {
    driver: Driver<'a>,
    verdicts: &'a mut VerdictSource,
    log: EnvoyLog,
}

impl<'a> Passage<'a> {
    /// Through the proxy at `gateway`; see [`replay_through`].
    pub fn new(
        gateway: SocketAddr,
        upstream: &'a Upstream,
        verdicts: &'a mut VerdictSource,
        options: &'a ReplayOptions,
    ) -> Self {
        let client = Client::builder(TokioExecutor::new()).http1_max_headers(1024).build_http();
        Self { driver: Driver { client, gateway, upstream, options }, verdicts, log: EnvoyLog::default() }
    }

    /// Sends the next exchanges and waits for their verdicts.
    ///
    /// # Errors
    /// As [`replay_through`].
    pub async fn replay(
        &mut self,
        exchanges: impl IntoIterator<Item = Exchange>,
    ) -> Result<Vec<ReplayedExchange>, ReplayError> {
        let Driver { upstream, options, .. } = self.driver;
        let mut replayed = Vec::new();
        // Number of the plan to its place in `replayed`, for the exchanges that were sent.
        let mut sent: HashMap<u64, usize> = HashMap::new();
        for exchange in exchanges {
            let id = exchange.id.clone();
            let wire = match on_the_wire(exchange) {
                Ok(wire) => wire,
                Err(reason) => {
                    replayed.push(ReplayedExchange { failure: Some(reason.into()), ..unsent(id) });
                    continue;
                }
            };
            // `on_the_wire` refuses an exchange without a response.
            let response =
                wire.response.unwrap_or(HttpResponse { status: 204, headers: Vec::new(), body: Vec::new() });
            let delivery = options.delivery.clone().unwrap_or_else(|| Delivery::recorded(&response));
            let number = upstream.plan(&response, delivery)?;
            let mut outcome = self.driver.send(id, number, &wire.request, &response).await;
            if let VerdictSource::Gateway(records) = self.verdicts {
                match next_record(records, options.log_deadline).await {
                    Some(record) => outcome.take_verdicts(|name| gateway_state(&record, name)),
                    None => outcome.note_unlogged(options.log_deadline),
                }
            }
            sent.insert(number, replayed.len());
            replayed.push(outcome);
        }
        if let VerdictSource::EnvoyLog(path) = self.verdicts {
            self.log.read(path, &sent, &mut replayed, options.log_deadline).await?;
        }
        Ok(replayed)
    }
}

fn unsent(id: String) -> ReplayedExchange {
    ReplayedExchange {
        id,
        status: None,
        body_matches: false,
        response_headers: Vec::new(),
        response_trailers: Vec::new(),
        request_verdict_json: None,
        response_verdict_json: None,
        outcome: None,
        failure: None,
    }
}

impl ReplayedExchange {
    fn take_verdicts(&mut self, state: impl Fn(&str) -> Option<String>) {
        self.request_verdict_json = state("request");
        self.response_verdict_json = state("response");
        self.outcome = state("outcome");
    }

    /// An earlier failure explains more, so it stays.
    fn note_unlogged(&mut self, waited: Duration) {
        self.failure.get_or_insert(Failure::Unlogged(waited));
    }
}

struct Driver<'a> {
    client: Client<HttpConnector, Full<Bytes>>,
    gateway: SocketAddr,
    upstream: &'a Upstream,
    options: &'a ReplayOptions,
}

impl Driver<'_> {
    async fn send(
        &self,
        id: String,
        number: u64,
        request: &HttpRequest,
        expected: &HttpResponse,
    ) -> ReplayedExchange {
        let mut outcome = unsent(id);
        let deadline = self.options.exchange_deadline;
        let result = timeout(deadline, self.exchange(number, request, expected, &mut outcome)).await;
        // Taken whatever happened, so that the plan is forgotten.
        let received = self.upstream.take(number);
        outcome.failure = match (result, &received, outcome.status) {
            (Err(_), ..) => Some(Failure::TimedOut(deadline)),
            (Ok(Err(reason)), ..) => Some(Failure::Broken(reason)),
            (Ok(Ok(())), None, Some(status)) => Some(Failure::LocalReply(status)),
            (Ok(Ok(())), ..) => None,
        };
        outcome.body_matches &= received.is_some_and(|received| received.body == request.body);
        outcome
    }

    /// Sends one request and compares the answer's body as it arrives, without keeping it.
    async fn exchange(
        &self,
        number: u64,
        request: &HttpRequest,
        expected: &HttpResponse,
        outcome: &mut ReplayedExchange,
    ) -> Result<(), String> {
        let request = client_request(self.gateway, number, request).map_err(|error| chain(&error))?;
        let answer = self.client.request(request).await.map_err(|error| chain(&error))?;
        outcome.status = Some(answer.status().as_u16());
        outcome.response_headers = pairs(answer.headers());
        let mut body = answer.into_body();
        let mut rest = expected.body.as_slice();
        let mut same = true;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| chain(&error))?;
            if let Some(data) = frame.data_ref() {
                match rest.strip_prefix(data.as_ref()) {
                    Some(after) => rest = after,
                    None => same = false,
                }
            }
            if let Some(trailers) = frame.trailers_ref() {
                outcome.response_trailers = pairs(trailers);
            }
        }
        outcome.body_matches = same && rest.is_empty();
        Ok(())
    }
}

fn pairs(headers: &HeaderMap) -> Vec<(String, String)> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
}

fn client_request(
    gateway: SocketAddr,
    number: u64,
    request: &HttpRequest,
) -> Result<Request<Full<Bytes>>, http::Error> {
    let uri = Uri::builder()
        .scheme("http")
        .authority(gateway.to_string())
        .path_and_query(request.target.as_str())
        .build()?;
    let mut builder = Request::builder().method(request.method.as_str()).uri(uri);
    for (name, value) in &request.headers {
        builder = builder.header(name.as_str(), HeaderValue::from_bytes(value.as_bytes())?);
    }
    // Without it the client would write the gateway's own address.
    if header(&request.headers, "host").is_none() {
        builder = builder.header(HOST, "replay.invalid");
    }
    // A server may send trailers only to a client that says it takes them (RFC 9110 section 6.5.1).
    builder.header(TE, "trailers").header(REPLAY_ID_HEADER, number).body(Full::from(request.body.clone()))
}

/// An error with its causes; hyper's own `Display` is only the first of them.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

async fn next_record(records: &Receiver<AccessRecord>, deadline: Duration) -> Option<AccessRecord> {
    let started = Instant::now();
    loop {
        match records.try_recv() {
            Ok(record) => return Some(record),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) if started.elapsed() > deadline => return None,
            Err(TryRecvError::Empty) => sleep(Duration::from_millis(1)).await,
        }
    }
}

fn gateway_state(record: &AccessRecord, name: &str) -> Option<String> {
    let value = record.filter_state.get(&format!("wasm.driftlock.{name}"))?;
    Some(String::from_utf8_lossy(value).into_owned())
}

/// How far Envoy's access log has been read.
#[derive(Default)]
struct EnvoyLog {
    file: Option<File>,
    unread: Vec<u8>,
    line: u64,
    /// A request that Envoy does not even parse is answered with 400 and logged without its headers.
    lines_without_number: usize,
}

impl EnvoyLog {
    /// Reads on until every exchange that was sent has its line. Lines without a number stand for
    /// exchanges that failed already.
    async fn read(
        &mut self,
        path: &Path,
        sent: &HashMap<u64, usize>,
        replayed: &mut [ReplayedExchange],
        deadline: Duration,
    ) -> Result<(), ReplayError> {
        let log_error = |source| ReplayError::AccessLog { path: path.to_owned(), source };
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(File::open(path).map_err(log_error)?),
        };
        let mut missing = sent.clone();
        let started = Instant::now();
        while !missing.is_empty() {
            file.read_to_end(&mut self.unread).map_err(log_error)?;
            let mut start = 0;
            // The last line may be half written.
            while let Some(length) = self.unread[start..].iter().position(|&byte| byte == b'\n') {
                self.line += 1;
                let entry: Value = serde_json::from_slice(&self.unread[start..start + length])
                    .map_err(|source| ReplayError::LogLine { line: self.line, source })?;
                start += length + 1;
                let number = entry.get("replay_id").and_then(|id| id.as_str()?.parse::<u64>().ok());
                self.lines_without_number += usize::from(number.is_none());
                if let Some(place) = number.and_then(|number| missing.remove(&number)) {
                    replayed[place].take_verdicts(|name| envoy_state(&entry, name));
                }
            }
            self.unread.drain(..start);
            let explained = missing.len() <= self.lines_without_number
                && missing.values().all(|&place| replayed[place].failure.is_some());
            if explained {
                self.lines_without_number -= missing.len();
                break;
            }
            if started.elapsed() > deadline {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
        for &place in missing.values() {
            replayed[place].note_unlogged(deadline);
        }
        Ok(())
    }
}

/// A filter-state value, which `%FILTER_STATE(…:PLAIN)%` prints as one JSON string.
fn envoy_state(entry: &Value, name: &str) -> Option<String> {
    entry.get("driftlock")?.get(name)?.as_str().map(str::to_owned)
}
