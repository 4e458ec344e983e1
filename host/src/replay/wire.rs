//! A recorded exchange as it crosses the wire, before any replay.
//!
//! A capture can hold what no HTTP/1.1 client can send: a target with a space in it, a body after a
//! 204, a `connection` header that belonged to another hop. A proxy's filter sees the message that
//! was really sent, so a replay in native code has to inspect that one too, or the verdicts would
//! differ for reasons that have nothing to do with the engine. [`on_the_wire`] is that one mapping;
//! every replay path applies it first. What cannot be mapped is a [`NotSendable`] with its reason,
//! and the exchange is reported, not dropped.
//!
//! The mapping, which is idempotent:
//! * target: absolute form becomes origin form, a missing leading slash is added, every byte that
//!   RFC 3986 does not allow in a path or query is percent-encoded; `%` itself stays as it is.
//! * header names in lower case, values without surrounding blanks; hop-by-hop fields (RFC 9110
//!   section 7.6.1, those named by `connection` included), `content-length`, `expect` and the
//!   replay's own field are dropped; `host` is kept (the first, percent-encoded like the target, as
//!   RFC 3986 allows in a name), or set to `replay.invalid`.
//! * `accept-encoding` is kept: the replaying upstream ignores it and answers as recorded.
//! * response: no body where HTTP has none (to HEAD, 204, 304).
//!
//! Cost: one pass over the head; [`view`] copies only what it has to encode.

use std::borrow::Cow;

use crate::capture::{Exchange, Fields, Headers, RequestRef, ResponseRef, header, is_bare};

/// The request header that carries an exchange's number to the replaying upstream and into the
/// access log. Filters must not inspect it.
pub const REPLAY_ID_HEADER: &str = "x-driftlock-replay-id";

/// Most bytes of target and headers together; Envoy and hyper are configured above it.
pub const HEAD_MAX_BYTES: usize = 96 << 10;
/// Most bytes of one body.
pub const BODY_MAX_BYTES: usize = 64 << 20;

/// RFC 9110 section 7.6.1, plus framing, which the sender makes anew, and `expect`, which a proxy
/// answers on its own.
const DROPPED: [&str; 10] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "expect",
    REPLAY_ID_HEADER,
];

/// Why a recorded exchange cannot be sent over HTTP/1.1.
#[non_exhaustive]
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotSendable {
    /// A method that Envoy's parser does not know, or CONNECT, which opens a tunnel.
    #[error("the method {0:?} is not one that a proxy passes on")]
    Method(String),
    /// A target that is no path, such as `*`.
    #[error("the target {0:?} is not a path")]
    Target(String),
    /// A header that would break the message's framing.
    #[error("the {part}'s header {name:?} holds bytes that HTTP does not allow")]
    Header {
        /// `request` or `response`.
        part: &'static str,
        /// The header's name.
        name: String,
    },
    /// Larger than [`HEAD_MAX_BYTES`] or [`BODY_MAX_BYTES`].
    #[error("the {part} is {bytes} bytes, more than the {limit} a replay sends")]
    TooLarge {
        /// Which part.
        part: &'static str,
        /// Its size in bytes.
        bytes: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// An interim status, or none of HTTP's.
    #[error("the status {0} is not a final one (200 to 599)")]
    Status(u16),
    /// Nothing to answer with.
    #[error("no response was recorded")]
    NoResponse,
}

/// An exchange as it crosses the wire, without a copy of what is sent as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View<'a> {
    /// Method token.
    pub method: &'a str,
    /// Origin form.
    pub target: Cow<'a, str>,
    /// The value of `host`.
    pub host: Cow<'a, str>,
    /// The other fields that are sent, names as captured.
    pub request_headers: Fields<'a>,
    /// The request's body.
    pub request_body: &'a [u8],
    /// Final status.
    pub status: u16,
    /// The fields that are sent, names as captured.
    pub response_headers: Fields<'a>,
    /// The response's body, empty where HTTP has none.
    pub response_body: &'a [u8],
}

/// Maps an exchange without copying it; see the module.
///
/// # Errors
/// [`NotSendable`] with the first thing that no HTTP/1.1 message can carry.
pub fn view<'a>(request: RequestRef<'a>, response: ResponseRef<'a>) -> Result<View<'a>, NotSendable> {
    let RequestRef { method, target, headers, body } = request;
    if !is_method(method) {
        return Err(NotSendable::Method(method.to_owned()));
    }
    let target = wire_target(target)?;
    let host = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host"));
    let host = host.map_or("replay.invalid", |(_, value)| value);
    let host = if is_bare(host) { host } else { host.trim() };
    check_value("request", "host", host)?;
    let host = encoded(host, &HOST_BYTES);
    let mut request_headers = wire_headers("request", headers)?;
    request_headers.retain(|(name, _)| !name.eq_ignore_ascii_case("host"));
    let host_size = field_size("host", &host);
    check_size("request head", target.len() + host_size + size(&request_headers), HEAD_MAX_BYTES)?;
    check_size("request body", body.len(), BODY_MAX_BYTES)?;

    let ResponseRef { status, headers, body: mut response_body } = response;
    if !(200..=599).contains(&status) {
        return Err(NotSendable::Status(status));
    }
    if matches!(status, 204 | 304) || method == "HEAD" {
        response_body = &[];
    }
    let response_headers = wire_headers("response", headers)?;
    check_size("response head", size(&response_headers), HEAD_MAX_BYTES)?;
    check_size("response body", response_body.len(), BODY_MAX_BYTES)?;
    Ok(View {
        method,
        target,
        host,
        request_headers,
        request_body: body,
        status,
        response_headers,
        response_body,
    })
}

impl<'a> View<'a> {
    /// Of an exchange that [`on_the_wire`] has mapped; one without a response is answered with an empty
    /// 204.
    pub fn of_mapped(exchange: &'a Exchange) -> Self {
        let (request, response) = exchange.messages();
        let response = response.unwrap_or(ResponseRef { status: 204, headers: Vec::new(), body: &[] });
        let host = header(&exchange.request.headers, "host").unwrap_or_default();
        let mut request_headers = request.headers;
        request_headers.retain(|(name, _)| !name.eq_ignore_ascii_case("host"));
        Self {
            method: request.method,
            target: Cow::Borrowed(request.target),
            host: Cow::Borrowed(host),
            request_headers,
            request_body: request.body,
            status: response.status,
            response_headers: response.headers,
            response_body: response.body,
        }
    }
}

/// The exchange as a client sends it and as the upstream answers, see the module's mapping. Names are in
/// lower case and `host` comes first.
///
/// # Errors
/// [`NotSendable`] with the first thing that no HTTP/1.1 message can carry.
pub fn on_the_wire(mut exchange: Exchange) -> Result<Exchange, NotSendable> {
    let (request, response) = exchange.messages();
    let View { target, host, request_headers, response_headers, response_body, .. } =
        view(request, response.ok_or(NotSendable::NoResponse)?)?;
    let owned = |headers: Fields<'_>| -> Headers {
        headers.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect()
    };
    let has_body = !response_body.is_empty();
    let target = target.into_owned();
    let mut fields = vec![("host".to_owned(), host.into_owned())];
    fields.extend(owned(request_headers));
    let response_headers = owned(response_headers);
    exchange.request.target = target;
    exchange.request.headers = fields;
    if let Some(response) = &mut exchange.response {
        response.headers = response_headers;
        if !has_body {
            response.body.clear();
        }
    }
    Ok(exchange)
}

/// The methods that Envoy's HTTP/1.1 parser lets through (methods are case-sensitive), without CONNECT.
fn is_method(method: &str) -> bool {
    matches!(
        method,
        "ACL"
            | "BIND"
            | "CHECKOUT"
            | "COPY"
            | "DELETE"
            | "GET"
            | "HEAD"
            | "LINK"
            | "LOCK"
            | "MERGE"
            | "MKACTIVITY"
            | "MKCALENDAR"
            | "MKCOL"
            | "MOVE"
            | "MSEARCH"
            | "NOTIFY"
            | "OPTIONS"
            | "PATCH"
            | "POST"
            | "PROPFIND"
            | "PROPPATCH"
            | "PURGE"
            | "PUT"
            | "REBIND"
            | "REPORT"
            | "SEARCH"
            | "SOURCE"
            | "SUBSCRIBE"
            | "TRACE"
            | "UNBIND"
            | "UNLINK"
            | "UNLOCK"
            | "UNSUBSCRIBE"
    )
}

/// Letters, digits and `others`, for a look-up a byte.
const fn bytes_of(others: &[u8]) -> [bool; 256] {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    let mut at = 0;
    while at < others.len() {
        table[others[at] as usize] = true;
        at += 1;
    }
    table
}

/// Recordings have placeholders such as `<REGION>` in host names; Envoy answers 400 to those.
static HOST_BYTES: [bool; 256] = bytes_of(b"-._~!$&'()*+,;=:[]%");
/// RFC 3986: pchar, '/', '?', and '%' of escapes that are there already.
static TARGET_BYTES: [bool; 256] = bytes_of(b"-._~!$&'()*+,;=:@/?%");
/// RFC 9110 section 5.6.2.
static TOKEN_BYTES: [bool; 256] = bytes_of(b"!#$%&'*+-.^_`|~");

/// The text, with a percent-encoding for each byte that is not allowed.
fn encoded<'a>(text: &'a str, allowed: &[bool; 256]) -> Cow<'a, str> {
    if text.bytes().all(|byte| allowed[usize::from(byte)]) {
        return Cow::Borrowed(text);
    }
    let mut wire = String::with_capacity(text.len() + 16);
    for byte in text.bytes() {
        if allowed[usize::from(byte)] {
            wire.push(char::from(byte));
        } else {
            wire.push_str(&format!("%{byte:02X}"));
        }
    }
    Cow::Owned(wire)
}

fn wire_target(target: &str) -> Result<Cow<'_, str>, NotSendable> {
    let origin = match target.split_once("://") {
        // Absolute form: the authority ends where path or query begins.
        Some((scheme, rest)) if !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphabetic()) => {
            rest.find(['/', '?']).map_or("", |start| &rest[start..])
        }
        _ => target,
    };
    if origin == "*" {
        return Err(NotSendable::Target(target.to_owned()));
    }
    let wire = encoded(origin, &TARGET_BYTES);
    Ok(if wire.starts_with('/') { wire } else { Cow::Owned(format!("/{wire}")) })
}

fn wire_headers<'a>(part: &'static str, mut headers: Fields<'a>) -> Result<Fields<'a>, NotSendable> {
    let named: Vec<&str> = headers
        .iter()
        .filter(|(name, _)| name.eq_ignore_ascii_case("connection"))
        .flat_map(|(_, value)| value.split(','))
        .map(str::trim)
        .collect();
    let mut refused = None;
    headers.retain_mut(|(name, value)| {
        if !is_bare(name) {
            *name = name.trim();
        }
        let one_hop = |dropped: &&str| dropped.eq_ignore_ascii_case(name);
        if refused.is_some() || DROPPED.iter().any(one_hop) || named.iter().any(one_hop) {
            return false;
        }
        if !is_bare(value) {
            *value = value.trim_matches([' ', '\t']);
        }
        if name.is_empty() || !name.bytes().all(|byte| TOKEN_BYTES[usize::from(byte)]) {
            refused = Some(NotSendable::Header { part, name: name.to_ascii_lowercase() });
        } else if let Err(error) = check_value(part, name, value) {
            refused = Some(error);
        }
        true
    });
    match refused {
        Some(error) => Err(error),
        None => Ok(headers),
    }
}

fn check_value(part: &'static str, name: &str, value: &str) -> Result<(), NotSendable> {
    // RFC 9110 section 5.5: visible characters, blanks, tabs and obs-text.
    // All of them, without stopping early: many at once.
    if value.bytes().fold(true, |fits, b| fits & ((b == b'\t') | ((b >= b' ') & (b != 0x7f)))) {
        return Ok(());
    }
    Err(NotSendable::Header { part, name: name.to_ascii_lowercase() })
}

fn check_size(part: &'static str, bytes: usize, limit: usize) -> Result<(), NotSendable> {
    if bytes > limit { Err(NotSendable::TooLarge { part, bytes, limit }) } else { Ok(()) }
}

fn size(headers: &[(&str, &str)]) -> usize {
    headers.iter().map(|(name, value)| field_size(name, value)).sum()
}

/// Name, colon, blank, value, line end.
fn field_size(name: &str, value: &str) -> usize {
    name.len() + value.len() + 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::{HttpRequest, HttpResponse};

    fn exchange(target: &str, headers: &[(&str, &str)], status: u16, body: &str) -> Exchange {
        let pairs = |headers: &[(&str, &str)]| {
            headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect::<Vec<_>>()
        };
        Exchange {
            id: "1".to_owned(),
            label: "normal".to_owned(),
            request: HttpRequest {
                method: "POST".to_owned(),
                target: target.to_owned(),
                headers: pairs(headers),
                body: b"q".to_vec(),
            },
            response: Some(HttpResponse { status, headers: pairs(headers), body: body.as_bytes().to_vec() }),
        }
    }

    fn target(target: &str) -> String {
        on_the_wire(exchange(target, &[], 200, "")).unwrap().request.target
    }

    #[test]
    fn a_target_is_made_sendable_and_otherwise_left_alone() {
        for same in ["/", "/a%20b?c=d&e=%zz", "/v1/x;y=(1)?q='a'"] {
            assert_eq!(target(same), same);
        }
        assert_eq!(target("<BASE>/chat"), "/%3CBASE%3E/chat");
        assert_eq!(target("/a?q=1' or \"x\"#y|é"), "/a?q=1'%20or%20%22x%22%23y%7C%C3%A9");
        assert_eq!(target("http://h:8/p?q=http://z"), "/p?q=http://z");
        assert_eq!(target("http://h"), "/");
        assert_eq!(target("/p?u=http://z"), "/p?u=http://z");
        assert_eq!(target(""), "/");
        let refused = on_the_wire(exchange("*", &[], 200, "")).unwrap_err();
        assert_eq!(refused, NotSendable::Target("*".to_owned()));
    }

    #[test]
    fn a_placeholder_in_the_host_is_made_sendable() {
        let host = |host: &str| {
            let wire = on_the_wire(exchange("/", &[("host", host)], 200, "")).unwrap();
            header(&wire.request.headers, "host").unwrap().to_owned()
        };
        assert_eq!(host("api.<REGION>.example:443"), "api.%3CREGION%3E.example:443");
        assert_eq!(host("[::1]:8080"), "[::1]:8080");
    }

    #[test]
    fn fields_of_one_hop_are_dropped_and_the_rest_is_kept_in_order() {
        let headers = [
            ("X-B", " 1 "),
            ("Connection", "close, X-Hop"),
            ("x-hop", "1"),
            ("Content-Length", "9"),
            ("Host", "h"),
            ("X-A", "2"),
            ("x-b", "3"),
            ("X-Driftlock-Replay-Id", "5"),
        ];
        let wire = on_the_wire(exchange("/", &headers, 200, "")).unwrap();
        let pairs: Vec<_> = wire.request.headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        assert_eq!(pairs, [("host", "h"), ("x-b", "1"), ("x-a", "2"), ("x-b", "3")]);
        assert_eq!(on_the_wire(wire.clone()).unwrap(), wire, "the mapping is idempotent");
    }

    #[test]
    fn a_header_that_would_break_framing_is_refused_by_name() {
        for bad in [("X-Bad", "a\r\nb: c"), ("X Bad", "a"), ("X-Nul", "\0"), ("Host", "a\nb")] {
            let error = on_the_wire(exchange("/", &[bad], 200, "")).unwrap_err();
            assert!(matches!(error, NotSendable::Header { part: "request", .. }), "{error}");
        }
        assert!(on_the_wire(exchange("/", &[("x-obs", "é")], 200, "")).is_ok());
    }

    #[test]
    fn a_response_keeps_its_body_only_where_http_has_one() {
        let body = |status, method: &str| {
            let mut exchange = exchange("/", &[], status, "b");
            exchange.request.method = method.to_owned();
            on_the_wire(exchange).map(|wire| wire.response.unwrap().body)
        };
        assert_eq!(body(200, "GET").unwrap(), b"b");
        assert_eq!(body(204, "GET").unwrap(), b"");
        assert_eq!(body(304, "GET").unwrap(), b"");
        assert_eq!(body(200, "HEAD").unwrap(), b"");
        assert_eq!(body(101, "GET").unwrap_err(), NotSendable::Status(101));
        assert_eq!(body(200, "CONNECT").unwrap_err(), NotSendable::Method("CONNECT".to_owned()));
    }

    #[test]
    fn what_is_too_large_is_refused_with_its_size() {
        let long = "x".repeat(HEAD_MAX_BYTES);
        let error = on_the_wire(exchange("/", &[("x-long", &long)], 200, "")).unwrap_err();
        assert!(matches!(error, NotSendable::TooLarge { part: "request head", .. }), "{error}");
    }
}
