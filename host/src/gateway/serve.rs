//! From a client's request to the response it gets.
//!
//! The order is: request headers through the filter, request body streamed through it to the
//! upstream, response headers through it, response body streamed through it to the client. Replies
//! that the gateway or the filter makes up go through the filter's response callbacks too, as in
//! Envoy, so that the filter sees every status a client sees.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::access_log::AccessRecord;
use super::exchange::{Exchange, Guard, Signal};
use super::filter::{ConnectionInfo, Direction, FilterError, HeaderPairs, LocalReply};
use super::lane::{Lane, LaneError, Source};
use super::{FailurePolicy, Shared, headers, upstream};

/// A reply of the gateway's own: status, code for programs, sentence for people.
struct Refusal(u16, &'static str, String);

impl Refusal {
    fn reply(self) -> LocalReply {
        let Self(status, code, message) = self;
        // The shape the OpenAI and Anthropic SDKs show to their users.
        let body =
            serde_json::json!({"error": {"type": "driftlock_gateway", "code": code, "message": message}});
        LocalReply {
            status,
            headers: vec![(b"content-type".to_vec(), b"application/json".to_vec())],
            body: Bytes::from(format!("{body}\n")),
            details: code.to_owned(),
            through_filter: true,
        }
    }
}

/// Why the upstream's response is not what the client gets.
enum Detour {
    Reply(LocalReply),
    /// Cut the connection without an answer.
    Cut(&'static str),
}

impl From<Refusal> for Detour {
    fn from(refusal: Refusal) -> Self {
        Self::Reply(refusal.reply())
    }
}

impl Detour {
    fn from_signal(signal: Signal, shared: &Shared) -> Self {
        match signal {
            Signal::Reply(reply) => Self::Reply(reply),
            Signal::Close => Self::Cut("filter_close"),
            Signal::ClientGone => Self::Cut("client_closed"),
            Signal::FilterFailed => filter_failed("the filter crashed").into(),
            Signal::ClientStalled => Refusal(
                408,
                "client_stalled",
                format!("the request body did not continue within {:?}", shared.client_timeout),
            )
            .into(),
            Signal::HeldTooLong => Refusal(
                504,
                "filter_held_too_long",
                format!("the filter held the message for more than {:?}", shared.upstream_timeout),
            )
            .into(),
            Signal::UpstreamStalled => upstream_timeout(shared).into(),
            Signal::UpstreamGone => Refusal(
                502,
                "upstream_aborted",
                "the upstream's connection broke in the middle of its response".to_owned(),
            )
            .into(),
        }
    }

    /// For a lane that stopped before its headers were out.
    fn from_lane(error: LaneError, exchange: &Exchange) -> Self {
        match exchange.take_signal() {
            Some(signal) => Self::from_signal(signal, &exchange.shared),
            None => Self::Cut(error.0),
        }
    }
}

fn filter_failed(what: &str) -> Refusal {
    Refusal(
        503,
        "filter_failed",
        format!("{what}, and the gateway is set to refuse traffic it cannot inspect"),
    )
}

fn upstream_timeout(shared: &Shared) -> Refusal {
    Refusal(
        504,
        "upstream_timeout",
        format!("the upstream did not answer within {:?}", shared.upstream_timeout),
    )
}

/// Cuts the client's connection: hyper closes it when a service fails.
#[derive(Debug, thiserror::Error)]
#[error("exchange cut: {0}")]
pub(super) struct Cut(&'static str);

/// Serves one request.
pub(super) async fn serve(
    shared: Arc<Shared>,
    connection: ConnectionInfo,
    request: Request<Incoming>,
) -> Result<Response<Lane>, Cut> {
    let (mut head, body) = request.into_parts();
    let path = head.uri.path_and_query().map_or_else(|| head.uri.to_string(), ToString::to_string);
    let record =
        AccessRecord::begin(head.method.to_string(), path, shared.upstream_name.clone(), connection.peer);
    let method = head.method.clone();
    let exchange = Exchange::new(Arc::clone(&shared), record);
    let guard = Guard::new(Arc::clone(&exchange));
    let result = match request_pairs(&mut head) {
        Ok(pairs) => forward(&exchange, &connection, pairs, body).await,
        Err(refusal) => Err(refusal.into()),
    };
    let (pairs, lane) = match result {
        Ok(response) => response,
        Err(Detour::Cut(reason)) => {
            exchange.abort(reason);
            return Err(Cut(reason));
        }
        Err(Detour::Reply(reply)) => local_response(&exchange, reply, &method).await?,
    };
    respond(&exchange, guard, pairs, lane, &method)
}

fn request_pairs(head: &mut http::request::Parts) -> Result<HeaderPairs, Refusal> {
    if head.method == Method::CONNECT {
        return Err(Refusal(
            405,
            "method_not_supported",
            "this gateway is a reverse proxy and does not tunnel".to_owned(),
        ));
    }
    headers::request_pairs(head).ok_or_else(|| {
        Refusal(400, "host_missing", "the request has no Host header (RFC 9112 section 3.2)".to_owned())
    })
}

/// Opens the filter, takes the request to the upstream and its response through the filter's
/// response headers.
async fn forward(
    exchange: &Arc<Exchange>,
    connection: &ConnectionInfo,
    pairs: HeaderPairs,
    body: Incoming,
) -> Result<(HeaderPairs, Lane), Detour> {
    let shared = &exchange.shared;
    if let Some(filters) = &shared.filters {
        match filters.open(connection) {
            Ok(filter) => exchange.set_filter(filter),
            Err(error) => filter_missing(exchange, &error)?,
        }
    }
    let mut lane = Lane::start(Arc::clone(exchange), Direction::Request, pairs, Source::Peer(body))
        .map_err(|error| Detour::from_lane(error, exchange))?;
    let pairs =
        poll_fn(|cx| lane.poll_headers(cx)).await.map_err(|error| Detour::from_lane(error, exchange))?;
    let head = headers::request_head(&pairs, &shared.upstream)
        .map_err(|error| Refusal(500, "filter_broke_request", error.to_string()))?;
    lane.set_declared_length(headers::content_length(head.headers()));
    exchange.note_request_progress(false, true);
    let response = answer(exchange, head.map(|()| lane)).await?;
    exchange.edit_record(|record| record.from_upstream = true);
    let (mut head, body) = response.into_parts();
    let pairs = headers::response_pairs(&mut head);
    let mut lane = Lane::start(Arc::clone(exchange), Direction::Response, pairs, Source::Peer(body))
        .map_err(|error| Detour::from_lane(error, exchange))?;
    let pairs =
        poll_fn(|cx| lane.poll_headers(cx)).await.map_err(|error| Detour::from_lane(error, exchange))?;
    Ok((pairs, lane))
}

fn filter_missing(exchange: &Exchange, error: &FilterError) -> Result<(), Detour> {
    exchange.shared.counters.filter_failures.increment();
    exchange.edit_record(|record| record.filter_failed = true);
    tracing::warn!(target: "driftlock::gateway", %error, policy = ?exchange.shared.failure_policy, "exchange without a filter");
    match exchange.shared.failure_policy {
        FailurePolicy::FailOpen => Ok(()),
        FailurePolicy::FailClosed => Err(filter_failed("no filter is ready").into()),
    }
}

/// Waits for the upstream's response, unless something else decides the exchange first.
async fn answer(exchange: &Arc<Exchange>, request: Request<Lane>) -> Result<Response<Incoming>, Detour> {
    let shared = &exchange.shared;
    let response = shared.client.request(request);
    tokio::pin!(response);
    let mut deadline = Instant::now() + shared.upstream_timeout;
    loop {
        tokio::select! {
            // The filter's decision and the failed request it causes come together.
            biased;
            () = poll_fn(|cx| exchange.poll_interrupted(cx)) => {}
            () = exchange.signalled.notified() => {
                if let Some(signal) = exchange.take_signal() {
                    return Err(Detour::from_signal(signal, shared));
                }
            }
            result = &mut response => return result.map_err(|error| {
                if let Some(signal) = exchange.take_signal() {
                    return Detour::from_signal(signal, shared);
                }
                shared.counters.upstream_failures.increment();
                let (status, code, message) = upstream::explain(&error);
                tracing::warn!(target: "driftlock::gateway", code, message, upstream = shared.upstream_name, "upstream failed");
                Refusal(status, code, message).into()
            }),
            () = tokio::time::sleep_until(deadline) => {
                let progress = exchange.request_progress();
                let since = if progress.awaits_client { Duration::ZERO } else { progress.at.elapsed() };
                if since >= shared.upstream_timeout {
                    shared.counters.upstream_failures.increment();
                    return Err(upstream_timeout(shared).into());
                }
                deadline = Instant::now() + (shared.upstream_timeout - since);
            }
        }
    }
}

/// Takes a made-up reply through the filter's response callbacks.
async fn local_response(
    exchange: &Arc<Exchange>,
    reply: LocalReply,
    method: &Method,
) -> Result<(HeaderPairs, Lane), Cut> {
    exchange.edit_record(|record| {
        record.from_upstream = false;
        record.details.clone_from(&reply.details);
    });
    let bare = (reply_pairs(&reply), reply.body.clone());
    let has_body = *method != Method::HEAD && !bodiless(reply.status);
    if !reply.through_filter || exchange.response_seen() {
        let body = if has_body { reply.body } else { Bytes::new() };
        return Ok((bare.0, Lane::unfiltered(Arc::clone(exchange), Direction::Response, body)));
    }
    let source = Source::Own(has_body.then_some(reply.body));
    let filtered = async {
        let mut lane = Lane::start(Arc::clone(exchange), Direction::Response, bare.0.clone(), source)?;
        let pairs = poll_fn(|cx| lane.poll_headers(cx)).await?;
        Ok::<_, LaneError>((pairs, lane))
    };
    match filtered.await {
        Ok(response) => Ok(response),
        // The filter interferes with the reply itself; the first reply stands, unseen by it.
        Err(error) => match exchange.take_signal() {
            Some(Signal::Close | Signal::ClientGone) | None => {
                exchange.abort(error.0);
                Err(Cut(error.0))
            }
            Some(signal) => {
                let reply = match Detour::from_signal(signal, &exchange.shared) {
                    Detour::Reply(second) => (reply_pairs(&second), second.body),
                    Detour::Cut(_) => bare,
                };
                let body = if has_body { reply.1 } else { Bytes::new() };
                Ok((reply.0, Lane::unfiltered(Arc::clone(exchange), Direction::Response, body)))
            }
        },
    }
}

fn bodiless(status: u16) -> bool {
    (100..200).contains(&status) || status == 204 || status == 304
}

fn reply_pairs(reply: &LocalReply) -> HeaderPairs {
    let mut pairs = Vec::with_capacity(reply.headers.len() + 2);
    pairs.push((b":status".to_vec(), reply.status.to_string().into_bytes()));
    pairs.extend(reply.headers.iter().filter(|(name, _)| name.first() != Some(&b':')).cloned());
    if !bodiless(reply.status) && !pairs.iter().any(|(name, _)| name == b"content-length") {
        pairs.push((b"content-length".to_vec(), reply.body.len().to_string().into_bytes()));
    }
    pairs
}

/// Puts the response on its way to the client.
fn respond(
    exchange: &Arc<Exchange>,
    guard: Guard,
    pairs: HeaderPairs,
    mut lane: Lane,
    method: &Method,
) -> Result<Response<Lane>, Cut> {
    let mut response = match headers::response_head(&pairs) {
        Ok(head) => head,
        Err(error) => {
            tracing::warn!(target: "driftlock::gateway", %error, "the filter broke the response");
            let reply = Refusal(500, "filter_broke_response", error.to_string()).reply();
            lane = Lane::unfiltered(Arc::clone(exchange), Direction::Response, reply.body.clone());
            let mut plain = HeaderMap::new();
            plain.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            let mut head = Response::new(());
            *head.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            *head.headers_mut() = plain;
            head
        }
    };
    let status = response.status().as_u16();
    if *method != Method::HEAD && !bodiless(status) {
        lane.set_declared_length(headers::content_length(response.headers()));
    }
    if let Err(signal) = exchange.start_response(status) {
        // The request side decided at the last moment.
        let reply = match Detour::from_signal(signal, &exchange.shared) {
            Detour::Reply(reply) => reply,
            Detour::Cut(reason) => {
                exchange.abort(reason);
                return Err(Cut(reason));
            }
        };
        lane = Lane::unfiltered(Arc::clone(exchange), Direction::Response, reply.body.clone());
        response = headers::response_head(&reply_pairs(&reply)).map_err(|_| Cut("filter_broke_response"))?;
        exchange.start_response(response.status().as_u16()).map_err(|_| Cut("interrupted_twice"))?;
    }
    let mut guard = guard;
    if http_body::Body::is_end_stream(&lane) {
        guard.complete();
    }
    lane.set_guard(guard);
    Ok(response.map(|()| lane))
}
