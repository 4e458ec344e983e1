//! Access logs as streams of text: a line is a log record, judged as text, with its time.
//!
//! What: Envoy's default format, the common and combined formats of nginx and Apache, and logs of one
//! JSON object a line are told apart by their first lines. Why as text: a log line has no body to
//! inspect, but its fields are the request's, and what is odd in a target or an agent is odd in the line.
//! A line that does not look like the others is not an error: it may be the attack.
//!
//! Cost: a search for the time in each line. Left out on purpose: custom formats, beyond finding a time
//! in them.

use std::borrow::Cow;

use super::record::{Content, Record};
use super::rows::Kind;
use super::{HttpRequest, HttpResponse, Place, time};

/// Whether a line looks like one of an access log: a bracketed time and a quoted request.
pub(super) fn looks_like(line: &str) -> bool {
    when(line).is_some() && line.contains("] \"")
}

/// The line's time: `[23/Nov/2026:10:00:00 +0000]` or `[2026-11-23T10:00:00.000Z]`.
fn when(line: &str) -> Option<u64> {
    let open = line.find('[')?;
    let rest = &line[open + 1..];
    let stamp = &rest[..rest.find(']')?];
    time::common_log(stamp).or_else(|| time::rfc3339(stamp))
}

/// Whether an object has the fields of a JSON access log.
pub(super) fn is_json_log(keys: &[String]) -> bool {
    let has = |names: &[&str]| names.iter().any(|name| keys.iter().any(|key| key == name));
    has(&["response_code", "status", "status_code", "code"])
        && has(&["path", "request", "request_uri", "uri", "method", "request_method", "url"])
}

/// The time of a JSON log line, under one of its usual names.
fn json_when(line: &str) -> Option<u64> {
    for key in ["\"start_time\":", "\"time_iso8601\":", "\"@timestamp\":", "\"timestamp\":", "\"time\":"] {
        if let Some(at) = line.find(key) {
            let value = line[at + key.len()..].trim_start().strip_prefix('"')?;
            return time::rfc3339(&value[..value.find('"')?]);
        }
    }
    None
}

/// Reads one line.
pub(super) fn parse(bytes: &[u8], place: Place, number: u64, json: bool) -> Record<'_> {
    let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let (unix_ns, content) = match std::str::from_utf8(line) {
        Ok(text) => {
            let at = if json { json_when(text) } else { when(text) };
            (at, Content::Text { kind: Kind::Log, text: Cow::Borrowed(text), response: None })
        }
        // Not UTF-8, so no text; the inspection will say so.
        Err(_) => {
            let headers = vec![("content-type".to_owned(), "text/plain".to_owned())];
            let request = HttpRequest {
                method: "POST".to_owned(),
                target: "/log".to_owned(),
                headers: Vec::new(),
                body: Vec::new(),
            };
            let response = Some(HttpResponse { status: 200, headers, body: line.to_owned() });
            (None, Content::Messages { request, response })
        }
    };
    Record { place, id: Cow::Owned(number.to_string()), label: Cow::Borrowed("unlabelled"), unix_ns, content }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_formats_are_known_with_their_times() {
        for line in [
            // nginx `combined`, Apache `common` and Envoy's default format.
            r#"10.1.2.3 - - [06/Nov/1994:08:49:37 +0000] "GET /a?b=c HTTP/1.1" 200 12 "-" "curl/8.5""#,
            r#"::1 - frank [06/Nov/1994:08:49:37 +0000] "GET / HTTP/1.0" 304 0"#,
            r#"[1994-11-06T08:49:37.000Z] "POST /v1/x HTTP/1.1" 200 - 5 7 3 2 "-" "agent" "id" "h" "127.0.0.1:1""#,
        ] {
            assert!(looks_like(line), "{line}");
            let record = parse(line.as_bytes(), Place::Line(1), 1, false);
            assert_eq!(record.unix_ns, Some(784_111_777_000_000_000), "{line}");
            let (_, response) = record.messages().unwrap();
            assert_eq!(response.body, line.as_bytes());
        }
        assert!(!looks_like("2026-11-23 INFO started [worker 3] \"x\""));
    }

    #[test]
    fn a_json_log_has_its_time_and_keeps_its_text() {
        let line = r#"{"start_time": "1994-11-06T08:49:37Z", "method":"GET","path":"/","response_code":200}"#;
        assert!(is_json_log(&["method".to_owned(), "path".to_owned(), "response_code".to_owned()]));
        assert_eq!(parse(line.as_bytes(), Place::Line(1), 1, true).unix_ns, Some(784_111_777_000_000_000));
    }

    #[test]
    fn bytes_that_are_no_text_are_kept() {
        let record = parse(b"\xff\xfe GET\r\n", Place::Line(9), 4, false);
        let (_, response) = record.messages().unwrap();
        assert_eq!((response.body, &*record.id), (&b"\xff\xfe GET"[..], "4"));
    }
}
