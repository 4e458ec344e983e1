//! HAR 1.2 (the W3C draft "HTTP Archive format" and what browsers write): one entry to one exchange.
//!
//! A HAR holds bodies with transfer and content coding removed while its headers still name them, so
//! `content-encoding` is dropped where a text was recorded. Pseudo-headers, which browsers write for
//! HTTP/2, are not fields of a message: `:authority` becomes `host`, the others are dropped. A form that
//! is only listed as parameters is written out again.
//!
//! Cost: one JSON parse an entry. An entry without a status (blocked or aborted in the browser) has no
//! answer; its request is judged all the same.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::record::{Content, Record};
use super::{CaptureError, Headers, HttpRequest, HttpResponse, Place, time};

const EXPECTED: &str =
    "an entry of a HAR 1.2 file has a request with method, url and headers, and a response";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    #[serde(default)]
    started_date_time: Option<String>,
    request: Request,
    #[serde(default)]
    response: Option<Response>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    method: String,
    url: String,
    #[serde(default)]
    headers: Vec<Pair>,
    #[serde(default)]
    post_data: Option<PostData>,
}

#[derive(Deserialize)]
struct Pair {
    name: String,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PostData {
    #[serde(default)]
    mime_type: String,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    params: Vec<Pair>,
    /// Not in HAR 1.2; some tools write `base64` for a binary body.
    #[serde(default)]
    encoding: Option<String>,
}

#[derive(Deserialize)]
struct Response {
    #[serde(default)]
    status: i64,
    #[serde(default)]
    headers: Vec<Pair>,
    #[serde(default)]
    content: BodyContent,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BodyContent {
    #[serde(default)]
    mime_type: String,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    encoding: Option<String>,
}

/// Reads one entry; `number` counts them from 1 and is the exchange's id.
pub(super) fn parse(bytes: &[u8], place: Place, number: u64) -> Result<Record<'static>, CaptureError> {
    let entry: Entry = serde_json::from_slice(bytes).map_err(|source| CaptureError::Row {
        place,
        source,
        expected: EXPECTED,
    })?;
    let decode = |text: String, encoding: Option<&str>, what: &str| match encoding {
        None | Some("") => Ok(text.into_bytes()),
        Some("base64") => STANDARD.decode(text.trim()).map_err(|error| CaptureError::Unusable {
            place,
            reason: format!("the {what} says it is base64 and is not: {error}"),
        }),
        Some(other) => Err(CaptureError::Unusable {
            place,
            reason: format!("the {what} is encoded as {other:?}; only base64 is known"),
        }),
    };
    let Request { method, url, headers, post_data } = entry.request;
    let mut headers = fields(headers);
    let mut body = Vec::new();
    if let Some(data) = post_data {
        body = match data.text {
            Some(text) if !text.is_empty() => decode(text, data.encoding.as_deref(), "request's body")?,
            _ => form(&data.params).into_bytes(),
        };
        add_content_type(&mut headers, &data.mime_type);
    }
    let request = HttpRequest { method, target: without_fragment(url), headers, body };
    let response = match entry.response {
        // Status 0: the browser got none.
        Some(Response { status, headers, content }) if status != 0 => {
            let mut headers = fields(headers);
            let body = match content.text {
                Some(text) => {
                    headers.retain(|(name, _)| !name.eq_ignore_ascii_case("content-encoding"));
                    decode(text, content.encoding.as_deref(), "response's body")?
                }
                None => Vec::new(),
            };
            add_content_type(&mut headers, &content.mime_type);
            let status = u16::try_from(status).map_err(|_| CaptureError::Unusable {
                place,
                reason: format!("the status {status} is none of HTTP's"),
            })?;
            Some(HttpResponse { status, headers, body })
        }
        _ => None,
    };
    Ok(Record {
        place,
        id: Cow::Owned(number.to_string()),
        label: Cow::Borrowed("unlabelled"),
        unix_ns: entry.started_date_time.as_deref().and_then(time::rfc3339),
        content: Content::Messages { request, response },
    })
}

/// RFC 9110 section 7.1: a fragment is not sent.
fn without_fragment(mut url: String) -> String {
    if let Some(at) = url.find('#') {
        url.truncate(at);
    }
    url
}

fn fields(pairs: Vec<Pair>) -> Headers {
    let pairs = pairs.into_iter().filter_map(|Pair { name, value }| match name.strip_prefix(':') {
        None => Some((name, value)),
        Some("authority") => Some(("host".to_owned(), value)),
        Some(_) => None,
    });
    pairs.collect()
}

fn add_content_type(headers: &mut Headers, mime_type: &str) {
    if !mime_type.is_empty() && super::header(headers, "content-type").is_none() {
        headers.push(("content-type".to_owned(), mime_type.to_owned()));
    }
}

/// `application/x-www-form-urlencoded`. HAR writes parameters as they were sent or decoded, depending on
/// the tool; what could not stand in a form is encoded.
fn form(params: &[Pair]) -> String {
    let mut out = String::new();
    for Pair { name, value } in params {
        if !out.is_empty() {
            out.push('&');
        }
        for (i, part) in [name, value].into_iter().enumerate() {
            if i == 1 {
                out.push('=');
            }
            for byte in part.bytes() {
                match byte {
                    b'&' | b'=' | b'#' | 0..b' ' | 0x7f.. => out.push_str(&format!("%{byte:02X}")),
                    b' ' => out.push('+'),
                    _ => out.push(char::from(byte)),
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: serde_json::Value) -> Result<crate::capture::Recorded, CaptureError> {
        parse(json.to_string().as_bytes(), Place::Line(5), 3)?.into_recorded()
    }

    #[test]
    fn an_entry_of_a_browser_becomes_what_was_sent() {
        let recorded = read(serde_json::json!({
            "startedDateTime": "2026-11-12T08:30:00.250Z", "time": 12.5,
            "request": {"method": "POST", "url": "https://api.example/v1/chat?x=1#top", "httpVersion": "h2",
                "headers": [{"name": ":authority", "value": "api.example"}, {"name": ":method", "value": "POST"}, {"name": "X-A", "value": "b"}],
                "queryString": [], "postData": {"mimeType": "application/json", "text": "{\"a\":\"é\"}"}},
            "response": {"status": 200, "headers": [{"name": "content-encoding", "value": "br"}],
                "content": {"size": 4, "mimeType": "text/plain", "text": "AP8B", "encoding": "base64"}}
        }))
        .unwrap();
        let exchange = recorded.exchange;
        assert_eq!((exchange.id.as_str(), recorded.unix_ns), ("3", Some(1_794_472_200_250_000_000)));
        assert_eq!(exchange.request.target, "https://api.example/v1/chat?x=1");
        let pair = |n: &str, v: &str| (n.to_owned(), v.to_owned());
        assert_eq!(
            exchange.request.headers,
            [pair("host", "api.example"), pair("X-A", "b"), pair("content-type", "application/json")]
        );
        assert_eq!(exchange.request.body, "{\"a\":\"é\"}".as_bytes());
        let response = exchange.response.unwrap();
        assert_eq!(response.headers, [pair("content-type", "text/plain")], "the coding is removed");
        assert_eq!(response.body, [0, 255, 1]);
    }

    #[test]
    fn a_form_of_parameters_is_written_out_and_an_aborted_request_has_no_answer() {
        let recorded = read(serde_json::json!({
            "request": {"method": "POST", "url": "/login", "headers": [],
                "postData": {"mimeType": "application/x-www-form-urlencoded", "params": [{"name": "user name", "value": "a&b"}, {"name": "x"}]}},
            "response": {"status": 0, "headers": [], "content": {}}
        }))
        .unwrap();
        assert_eq!(recorded.exchange.request.body, b"user+name=a%26b&x=");
        assert_eq!(recorded.exchange.response.unwrap().status, 204);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (entry, text) in [
            (serde_json::json!({"request": {"url": "/"}}), "line 5: missing field `method`"),
            (
                serde_json::json!({"request": {"method": "GET", "url": "/"}, "response": {"status": 200, "content": {"text": "!", "encoding": "base64"}}}),
                "says it is base64",
            ),
            (
                serde_json::json!({"request": {"method": "GET", "url": "/"}, "response": {"status": 200, "content": {"text": "!", "encoding": "rot13"}}}),
                "rot13",
            ),
        ] {
            let error = read(entry).unwrap_err().to_string();
            assert!(error.contains(text) && error.starts_with("line 5"), "{error}");
        }
    }
}
