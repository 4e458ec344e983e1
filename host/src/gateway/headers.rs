//! Header fields between hyper's map and the filter's ordered pairs.
//!
//! Hop-by-hop fields (RFC 9110 section 7.6.1) are taken out on the way in, before the filter sees
//! them, and again on the way out, so that neither a peer nor a filter can put framing on the other
//! connection. Costs two small allocations per field.
//!
//! `http::HeaderMap` keeps the order of fields of one name, and the order in which names first
//! appear; fields of one name that were scattered come out side by side, which RFC 9110 section 5.3
//! allows.

use std::hash::{BuildHasher as _, RandomState};

use base64::Engine as _;
use http::header::{
    self, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, PathAndQuery};
use http::{Method, StatusCode, Uri, Version, request, response};

use super::config::HostHeader;
use super::filter::HeaderPairs;
use super::generation::Route;
use super::plan::rewritten;
use super::tunnel::Leaving;

/// Fields that belong to one connection. `te` and `trailer` are handled apart: the gateway passes
/// trailers on, so it says so itself.
const HOP_BY_HOP: [HeaderName; 6] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Why pairs from the filter do not make a message.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub(super) enum HeaderError {
    /// A pseudo-header is missing or has an impossible value.
    #[error("the filter left {0} missing or malformed")]
    Pseudo(&'static str),
    /// A name or a value has bytes that HTTP does not allow.
    #[error("the filter set a header that HTTP does not allow: {0:?}")]
    Field(String),
}

/// Removes the fields that belong to the connection the message came on.
fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|token| HeaderName::try_from(token.trim()).ok())
        .collect();
    // A message with both had its content-length overridden (RFC 9112 section 6.3); passing the
    // number on would let the next hop disagree about where the message ends.
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    let doomed = |name: &HeaderName| HOP_BY_HOP.contains(name) || named.contains(name);
    if !headers.keys().any(doomed) {
        return;
    }
    // HeaderMap::remove moves the last field into the gap; a new map keeps the order.
    let mut kept = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers.iter() {
        if !doomed(name) {
            kept.append(name.clone(), value.clone());
        }
    }
    *headers = kept;
}

fn accepts_trailers(headers: &HeaderMap) -> bool {
    headers
        .get_all(TE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|coding| coding.trim().eq_ignore_ascii_case("trailers"))
}

fn push_fields(pairs: &mut HeaderPairs, headers: &HeaderMap) {
    pairs.extend(
        headers.iter().map(|(name, value)| (name.as_str().as_bytes().to_vec(), value.as_bytes().to_vec())),
    );
}

/// Whom the request is for. In absolute form, and in HTTP/2, the URI's authority wins over Host (RFC
/// 9112 section 3.2.2). `None`: no authority is known (HTTP/1.1 requires Host).
pub(super) fn authority(head: &request::Parts) -> Option<&str> {
    match head.uri.authority() {
        Some(authority) => Some(authority.as_str()),
        None => head.headers.get(HOST)?.to_str().ok(),
    }
}

/// The request as the filter sees it. `None`: no authority is known.
pub(super) fn request_pairs(
    head: &mut request::Parts,
    https: bool,
    leaving: Option<&Leaving>,
) -> Option<HeaderPairs> {
    let trailers = accepts_trailers(&head.headers);
    let authority = authority(head)?.as_bytes().to_vec();
    strip_hop_by_hop(&mut head.headers);
    let mut pairs: HeaderPairs = Vec::with_capacity(head.headers.len() + 6);
    pairs.push((b":authority".to_vec(), authority));
    if leaving != Some(&Leaving::Connect) {
        let path = head.uri.path_and_query().map_or("/", PathAndQuery::as_str);
        pairs.push((b":path".to_vec(), path.as_bytes().to_vec()));
    }
    pairs.push((b":method".to_vec(), head.method.as_str().as_bytes().to_vec()));
    pairs.push((b":scheme".to_vec(), if https { b"https".to_vec() } else { b"http".to_vec() }));
    // HTTP/2 clients may cut one cookie field into many (RFC 9113 section 8.2.3).
    let whole_cookie = head.version == Version::HTTP_2;
    let mut cookie: Option<usize> = None;
    for (name, value) in &head.headers {
        // hyper answers `expect: 100-continue` itself when the body is first read.
        if *name == HOST || *name == EXPECT {
            continue;
        }
        if whole_cookie && *name == COOKIE {
            match cookie.and_then(|at| pairs.get_mut(at)) {
                Some((_, all)) => {
                    all.extend_from_slice(b"; ");
                    all.extend_from_slice(value.as_bytes());
                    continue;
                }
                None => cookie = Some(pairs.len()),
            }
        }
        pairs.push((name.as_str().as_bytes().to_vec(), value.as_bytes().to_vec()));
    }
    if trailers {
        pairs.push((b"te".to_vec(), b"trailers".to_vec()));
    }
    if leaving.is_some_and(Leaving::is_websocket) {
        pairs.push((b"connection".to_vec(), b"Upgrade".to_vec()));
        pairs.push((b"upgrade".to_vec(), b"websocket".to_vec()));
    }
    Some(pairs)
}

/// The response as the filter sees it.
pub(super) fn response_pairs(head: &mut response::Parts) -> HeaderPairs {
    strip_hop_by_hop(&mut head.headers);
    let mut pairs: HeaderPairs = Vec::with_capacity(head.headers.len() + 1);
    pairs.push((b":status".to_vec(), head.status.as_str().as_bytes().to_vec()));
    push_fields(&mut pairs, &head.headers);
    pairs
}

/// Trailers as the filter sees them.
pub(super) fn trailer_pairs(trailers: &HeaderMap) -> HeaderPairs {
    let mut pairs = Vec::with_capacity(trailers.len());
    push_fields(&mut pairs, trailers);
    pairs
}

/// The last value of a pseudo-header.
pub(super) fn pseudo<'p>(pairs: &'p HeaderPairs, name: &str) -> Option<&'p [u8]> {
    pairs.iter().rev().find(|(key, _)| key == name.as_bytes()).map(|(_, value)| value.as_slice())
}

/// The fields among `pairs`, without pseudo-headers.
pub(super) fn fields(pairs: &HeaderPairs) -> Result<HeaderMap, HeaderError> {
    let mut headers = HeaderMap::with_capacity(pairs.len());
    put_fields(pairs, &mut headers)?;
    Ok(headers)
}

fn put_fields(pairs: &HeaderPairs, headers: &mut HeaderMap) -> Result<(), HeaderError> {
    for (name, value) in pairs {
        if name.first() == Some(&b':') {
            continue;
        }
        let refused = || HeaderError::Field(String::from_utf8_lossy(name).into_owned());
        let name = HeaderName::from_bytes(name).map_err(|_| refused())?;
        let value = HeaderValue::from_bytes(value).map_err(|_| refused())?;
        if !HOP_BY_HOP.contains(&name) {
            headers.append(name, value);
        }
    }
    Ok(())
}

/// The request to send to a route's upstream, in HTTP/1.1's form and without its body.
pub(super) fn request_head(
    pairs: &HeaderPairs,
    route: &Route,
    leaving: Option<&Leaving>,
) -> Result<http::Request<()>, HeaderError> {
    let method = pseudo(pairs, ":method")
        .and_then(|method| Method::from_bytes(method).ok())
        .ok_or(HeaderError::Pseudo(":method"))?;
    let authority = pseudo(pairs, ":authority").ok_or(HeaderError::Pseudo(":authority"))?;
    let upstream = &route.upstream.plan;
    let own_name = match route.plan.host {
        HostHeader::Auto => upstream.tls.is_some(),
        HostHeader::Client => false,
        HostHeader::Upstream => true,
    };
    let host = if own_name && leaving != Some(&Leaving::Connect) {
        upstream.authority.clone()
    } else {
        HeaderValue::from_bytes(authority).map_err(|_| HeaderError::Pseudo(":authority"))?
    };
    let uri = if leaving == Some(&Leaving::Connect) {
        Authority::try_from(authority).map(Uri::from).map_err(|_| HeaderError::Pseudo(":authority"))?
    } else {
        let path = pseudo(pairs, ":path").ok_or(HeaderError::Pseudo(":path"))?;
        origin_form(path, route).ok_or(HeaderError::Pseudo(":path"))?
    };
    let mut request = http::Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    headers.reserve(pairs.len());
    headers.insert(HOST, host);
    put_fields(pairs, headers)?;
    if pairs.iter().any(|(name, value)| name == b"te" && value == b"trailers") {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        // RFC 9110 section 10.1.4: whoever sends TE names it in Connection.
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    if leaving.is_some_and(Leaving::is_websocket) {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    }
    if leaving == Some(&Leaving::WebsocketStream) {
        headers.insert(header::SEC_WEBSOCKET_KEY, websocket_key());
    }
    Ok(request)
}

/// The nonce that HTTP/1.1 asks for and HTTP/2's clients do not send. It keeps caches from replaying a
/// handshake and is no secret.
fn websocket_key() -> HeaderValue {
    let random = || RandomState::new().hash_one(0).to_le_bytes();
    let key = base64::engine::general_purpose::STANDARD.encode([random(), random()].concat());
    // Base64 is visible ASCII.
    HeaderValue::try_from(key).unwrap_or(HeaderValue::from_static("AAAAAAAAAAAAAAAAAAAAAA=="))
}

/// A request that a filter makes, in HTTP/1.1's form and without its body.
pub(super) fn call_head(pairs: &HeaderPairs) -> Result<http::Request<()>, HeaderError> {
    let part = |name| pseudo(pairs, name).ok_or(HeaderError::Pseudo(name));
    let mut request = http::Request::new(());
    *request.method_mut() =
        Method::from_bytes(part(":method")?).map_err(|_| HeaderError::Pseudo(":method"))?;
    let path = PathAndQuery::try_from(part(":path")?).map_err(|_| HeaderError::Pseudo(":path"))?;
    *request.uri_mut() = Uri::from(path);
    let authority =
        HeaderValue::from_bytes(part(":authority")?).map_err(|_| HeaderError::Pseudo(":authority"))?;
    request.headers_mut().insert(HOST, authority);
    put_fields(pairs, request.headers_mut())?;
    Ok(request)
}

fn origin_form(path: &[u8], route: &Route) -> Option<Uri> {
    let plan = &route.plan;
    let path = match (&plan.matches.path_prefix, &plan.rewrite_prefix) {
        (Some(prefix), Some(replacement)) => {
            PathAndQuery::try_from(rewritten(std::str::from_utf8(path).ok()?, prefix, replacement))
        }
        _ => PathAndQuery::try_from(path),
    };
    Some(Uri::from(path.ok()?))
}

/// The response to send to the client, without its body.
pub(super) fn response_head(
    pairs: &HeaderPairs,
    leaving: Option<&Leaving>,
) -> Result<http::Response<()>, HeaderError> {
    let switching = StatusCode::SWITCHING_PROTOCOLS;
    let status = pseudo(pairs, ":status")
        .and_then(|status| StatusCode::from_bytes(status).ok())
        .filter(|status| !status.is_informational() || (*status == switching && leaving.is_some()))
        .ok_or(HeaderError::Pseudo(":status"))?;
    let mut response = http::Response::new(());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.reserve(pairs.len());
    put_fields(pairs, headers)?;
    if leaving.is_some() && (status == switching || status.is_success()) {
        headers.remove(CONTENT_LENGTH);
    }
    if status == switching && leaving == Some(&Leaving::WebsocketStream) {
        // RFC 8441 section 5: a success says all.
        headers.remove(header::SEC_WEBSOCKET_ACCEPT);
        *response.status_mut() = StatusCode::OK;
    } else if status == switching {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    }
    Ok(response)
}

/// The value of `content-length`, if the message declares one.
pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::generation::Terms;
    use crate::gateway::upstream::Upstream;
    use crate::gateway::{FilterSource, GatewayOptions};

    fn request(fields: &[(&str, &str)]) -> request::Parts {
        let mut builder = http::Request::builder().method("POST").uri("/v1?x=1");
        for (name, value) in fields {
            builder = builder.header(*name, *value);
        }
        builder.body(()).expect("valid request").into_parts().0
    }

    fn text(pairs: &HeaderPairs) -> Vec<String> {
        pairs
            .iter()
            .map(|(name, value)| {
                format!("{}={}", String::from_utf8_lossy(name), String::from_utf8_lossy(value))
            })
            .collect()
    }

    #[test]
    fn connection_fields_and_those_it_names_stay_behind() {
        let mut head = request(&[
            ("host", "a.example"),
            ("x-first", "1"),
            ("connection", "keep-alive, X-Secret-Hop"),
            ("x-secret-hop", "gone"),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("keep-alive", "timeout=5"),
            ("x-many", "1"),
            ("x-many", "2"),
            ("trailer", "x-sum"),
        ]);
        assert_eq!(
            text(&request_pairs(&mut head, false, None).expect("host is known")),
            [
                ":authority=a.example",
                ":path=/v1?x=1",
                ":method=POST",
                ":scheme=http",
                "x-first=1",
                "x-many=1",
                "x-many=2",
                "trailer=x-sum",
                "te=trailers"
            ]
        );
    }

    #[test]
    fn chunked_coding_overrides_a_content_length() {
        let mut head = request(&[("host", "a"), ("content-length", "5"), ("transfer-encoding", "chunked")]);
        let pairs = request_pairs(&mut head, false, None).expect("host is known");
        assert!(!text(&pairs).iter().any(|pair| pair.starts_with("content-length")), "{pairs:?}");
    }

    #[test]
    fn absolute_form_wins_over_host() {
        let mut head = request(&[("host", "liar.example")]);
        head.uri = Uri::from_static("http://real.example/p");
        let pairs = request_pairs(&mut head, false, None).expect("authority is known");
        assert_eq!(pseudo(&pairs, ":authority"), Some(b"real.example".as_slice()));
        assert_eq!(pseudo(&pairs, ":path"), Some(b"/p".as_slice()));
    }

    #[tokio::test]
    async fn what_the_filter_cannot_send_is_refused_by_name() {
        let options = GatewayOptions::new(Uri::from_static("http://127.0.0.1:1"), FilterSource::None);
        let mut plan = options.plan().expect("a plan");
        let long = std::time::Duration::from_secs(60);
        let route = Route {
            info: super::super::filter::RouteInfo { name: "1".into(), upstream: "u".into() },
            upstream: Upstream::new(plan.upstreams.remove(0)),
            plan: plan.routes.remove(0),
            filters: Vec::new(),
            terms: Terms {
                client_timeout: long,
                upstream_timeout: long,
                tunnel_idle_timeout: long,
                request_body_bytes: 0,
                response_body_bytes: 0,
            },
        };
        let mut pairs: HeaderPairs = [(":method", "GET"), (":path", "/"), (":authority", "a")]
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
            .collect();
        assert!(request_head(&pairs, &route, None).is_ok());
        pairs.push((b"x-split".to_vec(), b"a\r\nb: c".to_vec()));
        assert_eq!(
            request_head(&pairs, &route, None).map(|_| ()),
            Err(HeaderError::Field("x-split".to_owned()))
        );
        pairs.pop();
        pairs[1].1 = b"/has space".to_vec();
        assert_eq!(request_head(&pairs, &route, None).map(|_| ()), Err(HeaderError::Pseudo(":path")));
    }

    #[test]
    fn a_filter_cannot_set_framing() {
        let pairs: HeaderPairs = vec![
            (b":status".to_vec(), b"200".to_vec()),
            (b"transfer-encoding".to_vec(), b"chunked".to_vec()),
            (b"connection".to_vec(), b"close".to_vec()),
            (b"x-kept".to_vec(), b"\xff\xfe".to_vec()),
        ];
        let response = response_head(&pairs, None).expect("a response");
        assert_eq!(response.headers().len(), 1);
        assert_eq!(response.headers()["x-kept"].as_bytes(), b"\xff\xfe");
    }
}
