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
use hyper::upgrade::OnUpgrade;
use tokio::time::Instant;

use super::access_log::AccessRecord;
use super::chain::Chain;
use super::config::Connect;
use super::exchange::{Exchange, Guard, Signal};
use super::filter::{ConnectionInfo, Direction, HeaderPairs, LocalReply};
use super::generation::Route;
use super::lane::{Lane, LaneError, Source};
use super::tunnel::{FarEnd, Leaving};
use super::upstream::{Answered, OutBody};
use super::wire::Wire;
use super::{Shared, headers, tunnel};

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
    fn from_signal(signal: Signal, exchange: &Exchange) -> Self {
        let terms = &exchange.terms;
        match signal {
            Signal::Reply(reply) => Self::Reply(reply),
            Signal::Close => Self::Cut("filter_close"),
            Signal::ClientGone => Self::Cut("client_closed"),
            Signal::FilterFailed => filter_failed("the filter crashed").into(),
            Signal::ClientStalled => Refusal(
                408,
                "client_stalled",
                format!("the request body did not continue within {:?}", terms.client_timeout),
            )
            .into(),
            Signal::HeldTooLong => Refusal(
                504,
                "filter_held_too_long",
                format!("the filter held the message for more than {:?}", terms.upstream_timeout),
            )
            .into(),
            Signal::BodyTooLarge => too_large(terms.request_body_bytes).into(),
            Signal::UpstreamTooLarge => Refusal(
                502,
                "upstream_too_large",
                format!("the upstream's response is longer than {} bytes", terms.response_body_bytes),
            )
            .into(),
            Signal::UpstreamStalled => upstream_timeout(exchange).into(),
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
            Some(signal) => Self::from_signal(signal, exchange),
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

fn upstream_timeout(exchange: &Exchange) -> Refusal {
    let message = format!("the upstream did not answer within {:?}", exchange.terms.upstream_timeout);
    Refusal(504, "upstream_timeout", message)
}

fn too_large(limit_bytes: u64) -> Refusal {
    Refusal(413, "request_too_large", format!("the request's body is longer than {limit_bytes} bytes"))
}

/// Cuts the client's connection: hyper closes it when a service fails.
#[derive(Debug, thiserror::Error)]
#[error("exchange cut: {0}")]
pub(super) struct Cut(&'static str);

/// The upstream's side of an exchange once its response's headers have passed the filters.
struct Forwarded {
    pairs: HeaderPairs,
    lane: Lane,
    /// Where the bytes go, when the connection leaves HTTP.
    far: Option<FarEnd<Wire>>,
}

/// Serves one request.
pub(super) async fn serve(
    shared: Arc<Shared>,
    connection: ConnectionInfo,
    mut request: Request<Incoming>,
) -> Result<Response<Lane>, Cut> {
    let leaving = Leaving::asked(&request);
    let near = leaving.as_ref().map(|_| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    if leaving == Some(Leaving::WebsocketStream) {
        head.method = Method::GET;
    }
    let generation = shared.generation();
    let path = head.uri.path_and_query().map_or_else(|| head.uri.to_string(), ToString::to_string);
    let authority = headers::authority(&head);
    let route = authority
        .and_then(|authority| generation.route(&head.method, authority, head.uri.path(), &head.headers))
        .cloned();
    let mut record = AccessRecord::begin(head.method.to_string(), path, connection.peer);
    record.protocol = connection.protocol;
    if let Some(route) = &route {
        record.route = Arc::clone(&route.plan.name);
        record.upstream = Arc::clone(&route.upstream.plan.authority_text);
    }
    let method = head.method.clone();
    let terms = route.as_ref().map_or(generation.terms, |route| route.terms);
    drop(generation);
    let exchange = Exchange::new(shared, terms, record);
    let guard = Guard::new(Arc::clone(&exchange));
    let leaving = leaving.filter(|leaving| match route.as_ref().map(|route| &route.plan) {
        // One of HTTP/2 cannot go on as a plain request: `admit` refuses it.
        Some(plan) if *leaving == Leaving::Websocket => plan.websocket,
        _ => true,
    });
    let result = match admit(&exchange, route.as_ref(), &mut head, &connection, leaving.as_ref()) {
        Ok((route, pairs)) => forward(&exchange, route, &connection, pairs, body, leaving.as_ref()).await,
        Err(refusal) => Err(refusal.into()),
    };
    let forwarded = match result {
        Ok(forwarded) => forwarded,
        Err(Detour::Cut(reason)) => {
            exchange.abort(reason);
            return Err(Cut(reason));
        }
        Err(Detour::Reply(reply)) => local_response(&exchange, reply, &method).await?,
    };
    respond(&exchange, guard, forwarded, &method, leaving.as_ref().zip(near))
}

/// Refuses what cannot be served before a filter is troubled.
fn admit<'r>(
    exchange: &Exchange,
    route: Option<&'r Arc<Route>>,
    head: &mut http::request::Parts,
    connection: &ConnectionInfo,
    leaving: Option<&Leaving>,
) -> Result<(&'r Arc<Route>, HeaderPairs), Refusal> {
    let pairs = headers::request_pairs(head, connection.tls, leaving).ok_or_else(|| {
        Refusal(400, "host_missing", "the request has no Host header (RFC 9112 section 3.2)".to_owned())
    })?;
    let route = route
        .ok_or_else(|| Refusal(404, "no_route", "no route of the gateway takes this request".to_owned()))?;
    if leaving == Some(&Leaving::WebsocketStream) && !route.plan.websocket {
        let message = "no websockets pass here".to_owned();
        return Err(Refusal(501, "websocket_refused", message));
    }
    if leaving == Some(&Leaving::Connect) && route.plan.connect == Connect::Refuse {
        let message = "this gateway is a reverse proxy and does not tunnel here".to_owned();
        return Err(Refusal(405, "method_not_supported", message));
    }
    let limit = exchange.terms.request_body_bytes;
    if headers::content_length(&head.headers).is_some_and(|length| length > limit) {
        return Err(too_large(limit));
    }
    Ok((route, pairs))
}

/// Opens the filters, takes the request to the upstream and its response through the filters'
/// response headers.
async fn forward(
    exchange: &Arc<Exchange>,
    route: &Arc<Route>,
    connection: &ConnectionInfo,
    pairs: HeaderPairs,
    body: Incoming,
    leaving: Option<&Leaving>,
) -> Result<Forwarded, Detour> {
    open_filters(exchange, route, connection).await?;
    let source = if leaving.is_some() { Source::Tunnel } else { Source::Peer(body) };
    let mut lane = Lane::start(Arc::clone(exchange), Direction::Request, pairs, source, None)
        .map_err(|error| Detour::from_lane(error, exchange))?;
    let pairs =
        poll_fn(|cx| lane.poll_headers(cx)).await.map_err(|error| Detour::from_lane(error, exchange))?;
    let head = headers::request_head(&pairs, route, leaving)
        .map_err(|error| Refusal(500, "filter_broke_request", error.to_string()))?;
    lane.set_declared_length(headers::content_length(head.headers()));
    exchange.note_request_progress(false, true);
    if leaving == Some(&Leaving::Connect) && route.plan.connect == Connect::Tunnel {
        let wire =
            route.upstream.open_tunnel().await.map_err(|error| upstream_failed(exchange, route, &error))?;
        let pairs = vec![(b":status".to_vec(), b"200".to_vec())];
        return tunnelled(exchange, pairs, FarEnd::Open(wire)).await;
    }
    let body = match leaving {
        None => OutBody::Lane(Box::new(lane)),
        Some(_) => OutBody::whole(Bytes::new(), None),
    };
    let Answered { mut response, lease } =
        answer(exchange, route, head.map(|()| body), leaving.is_some()).await?;
    exchange.edit_record(|record| record.from_upstream = true);
    let far = match leaving {
        Some(Leaving::Connect) => response.status().is_success(),
        Some(_) => response.status() == StatusCode::SWITCHING_PROTOCOLS,
        None => false,
    };
    let far = far.then(|| hyper::upgrade::on(&mut response));
    let (mut head, body) = response.into_parts();
    let pairs = headers::response_pairs(&mut head);
    if let Some(far) = far {
        return tunnelled(exchange, pairs, FarEnd::Upgrade(far)).await;
    }
    let (lane, pairs) = filtered(exchange, pairs, Source::Peer(body), Some(lease)).await?;
    Ok(Forwarded { pairs, lane, far: None })
}

async fn filtered(
    exchange: &Arc<Exchange>,
    pairs: HeaderPairs,
    source: Source,
    lease: Option<super::upstream::Lease>,
) -> Result<(Lane, HeaderPairs), Detour> {
    let mut lane = Lane::start(Arc::clone(exchange), Direction::Response, pairs, source, lease)
        .map_err(|error| Detour::from_lane(error, exchange))?;
    let pairs =
        poll_fn(|cx| lane.poll_headers(cx)).await.map_err(|error| Detour::from_lane(error, exchange))?;
    Ok((lane, pairs))
}

async fn tunnelled(
    exchange: &Arc<Exchange>,
    pairs: HeaderPairs,
    far: FarEnd<Wire>,
) -> Result<Forwarded, Detour> {
    let (_, pairs) = filtered(exchange, pairs, Source::Tunnel, None).await?;
    // What is left of HTTP has no body.
    let lane = Lane::unfiltered(Arc::clone(exchange), Direction::Response, Bytes::new());
    Ok(Forwarded { pairs, lane, far: Some(far) })
}

async fn open_filters(exchange: &Exchange, route: &Route, connection: &ConnectionInfo) -> Result<(), Detour> {
    let mut chain = Chain::default();
    for filter in &route.filters {
        let mut opened = filter.factory.open(connection, &route.info);
        if opened.is_err()
            && let Some(soon) = filter.factory.soon()
        {
            soon.await;
            opened = filter.factory.open(connection, &route.info);
        }
        match opened {
            Ok(open) => chain.push(Arc::clone(&filter.name), filter.failure_policy, open),
            Err(error) => {
                exchange.shared.counters.filter_failures.increment();
                exchange.edit_record(|record| record.filter_failed = true);
                let (name, policy) = (&*filter.name, filter.failure_policy);
                tracing::warn!(target: "driftlock::gateway", filter = name, %error, ?policy, "exchange without a filter");
                if !policy.is_open() {
                    exchange.set_chain(chain);
                    return Err(filter_failed("no filter is ready").into());
                }
            }
        }
    }
    exchange.set_chain(chain);
    Ok(())
}

fn upstream_failed(exchange: &Exchange, route: &Route, error: &super::upstream::UpstreamError) -> Detour {
    exchange.shared.counters.upstream_failures.increment();
    let (status, code) = error.status();
    tracing::warn!(target: "driftlock::gateway", code, %error, upstream = &*route.upstream.plan.name, "upstream failed");
    Refusal(status, code, error.to_string()).into()
}

/// Waits for the upstream's response, unless something else decides the exchange first.
async fn answer(
    exchange: &Arc<Exchange>,
    route: &Route,
    request: Request<OutBody>,
    http1_only: bool,
) -> Result<Answered, Detour> {
    let patience = exchange.terms.upstream_timeout;
    let response = route.upstream.send(request, http1_only);
    tokio::pin!(response);
    let deadline = tokio::time::sleep(patience);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            // The filter's decision and the failed request it causes come together.
            biased;
            () = poll_fn(|cx| exchange.poll_interrupted(cx)) => {}
            () = exchange.signalled.notified() => {
                if let Some(signal) = exchange.take_signal() {
                    return Err(Detour::from_signal(signal, exchange));
                }
            }
            result = &mut response => return result.map_err(|error| match exchange.take_signal() {
                Some(signal) => Detour::from_signal(signal, exchange),
                None => upstream_failed(exchange, route, &error),
            }),
            () = &mut deadline => {
                let progress = exchange.request_progress();
                let since = if progress.awaits_client { Duration::ZERO } else { progress.at.elapsed() };
                if since >= patience {
                    exchange.shared.counters.upstream_failures.increment();
                    return Err(upstream_timeout(exchange).into());
                }
                deadline.as_mut().reset(Instant::now() + (patience - since));
            }
        }
    }
}

/// Takes a made-up reply through the filters' response callbacks.
async fn local_response(
    exchange: &Arc<Exchange>,
    reply: LocalReply,
    method: &Method,
) -> Result<Forwarded, Cut> {
    exchange.edit_record(|record| {
        record.from_upstream = false;
        record.details.clone_from(&reply.details);
    });
    let has_body = *method != Method::HEAD && !bodiless(reply.status);
    let unfiltered = |pairs, body| {
        let body = if has_body { body } else { Bytes::new() };
        let lane = Lane::unfiltered(Arc::clone(exchange), Direction::Response, body);
        Forwarded { pairs, lane, far: None }
    };
    let bare = (reply_pairs(&reply), reply.body.clone());
    if !reply.through_filter || exchange.response_seen() {
        return Ok(unfiltered(bare.0, bare.1));
    }
    let source = Source::Own(has_body.then_some(reply.body));
    match filtered(exchange, bare.0.clone(), source, None).await {
        Ok((lane, pairs)) => Ok(Forwarded { pairs, lane, far: None }),
        // The filter interferes with the reply itself; what it wants instead stands, unseen by it.
        Err(Detour::Reply(second)) => Ok(unfiltered(reply_pairs(&second), second.body)),
        Err(Detour::Cut(reason)) => {
            exchange.abort(reason);
            Err(Cut(reason))
        }
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
    mut guard: Guard,
    forwarded: Forwarded,
    method: &Method,
    leaving: Option<(&Leaving, OnUpgrade)>,
) -> Result<Response<Lane>, Cut> {
    let Forwarded { pairs, mut lane, mut far } = forwarded;
    let asked = if far.is_some() { leaving.as_ref().map(|(leaving, _)| *leaving) } else { None };
    let mut response = match headers::response_head(&pairs, asked) {
        Ok(head) => head,
        Err(error) => {
            tracing::warn!(target: "driftlock::gateway", %error, "the filter broke the response");
            far = None;
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
    if *method != Method::HEAD && !bodiless(status) && far.is_none() {
        lane.set_declared_length(headers::content_length(response.headers()));
    }
    if let Err(signal) = exchange.start_response(status) {
        // The request side decided at the last moment.
        let reply = match Detour::from_signal(signal, exchange) {
            Detour::Reply(reply) => reply,
            Detour::Cut(reason) => {
                exchange.abort(reason);
                return Err(Cut(reason));
            }
        };
        far = None;
        lane = Lane::unfiltered(Arc::clone(exchange), Direction::Response, reply.body.clone());
        response =
            headers::response_head(&reply_pairs(&reply), None).map_err(|_| Cut("filter_broke_response"))?;
        exchange.start_response(response.status().as_u16()).map_err(|_| Cut("interrupted_twice"))?;
    }
    if let (Some(far), Some((leaving, near))) = (far, leaving) {
        exchange.edit_record(|record| record.upgrade = Some(leaving.name()));
        exchange.shared.counters.tunnels.increment();
        tokio::spawn(tunnel::run(Arc::clone(exchange), guard, near, far));
        return Ok(response.map(|()| lane));
    }
    if http_body::Body::is_end_stream(&lane) {
        guard.complete();
    }
    lane.set_guard(guard);
    Ok(response.map(|()| lane))
}
