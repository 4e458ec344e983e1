//! The ordinary HTTP calls that the same applications make through the gateway.
//!
//! They make paths with queries, form posts and small JSON bodies normal traffic, so that an
//! injected path has something to differ from. Their texts come from `grammars/rest.txt`.

use super::apps::{BEARER, HOST};
use super::calendar;
use super::dice::Dice;
use super::grammar::{Grammar, Scene};
use super::parameters::{Extra, Fault};
use crate::capture::{HttpRequest, HttpResponse};

/// A call and its answer; the target is as sent.
pub(super) fn call(grammar: &Grammar, unix_s: u64, dice: &mut Dice) -> (HttpRequest, HttpResponse) {
    let mut scene = Scene::new(grammar, unix_s);
    let kind = scene.expand("calls", dice);
    let method = scene.expand(&format!("{kind}.method"), dice);
    let target = scene.expand(&format!("{kind}.target"), dice);
    let mut part = |name: &str, dice: &mut Dice| {
        let rule = format!("{kind}.{name}");
        grammar.has(&rule).then(|| scene.expand(&rule, dice))
    };
    let content_type = part("type", dice);
    let body = part("body", dice).unwrap_or_default();
    let answer = part("response", dice).unwrap_or_default();
    let request = request(method, target, content_type, body, &scene.expand("agent", dice));
    (request, response(answer, unix_s, dice))
}

/// A `GET` with this target, and the empty list that answers it.
pub(super) fn lookup(
    grammar: &Grammar,
    target: String,
    unix_s: u64,
    dice: &mut Dice,
) -> (HttpRequest, HttpResponse) {
    let agent = Scene::new(grammar, unix_s).expand("agent", dice);
    let request = request("GET".to_owned(), target, None, String::new(), &agent);
    (request, response(r#"{"items":[],"page":1,"pages":0}"#.to_owned(), unix_s, dice))
}

/// What goes wrong in place of an answer.
pub(super) fn fail(fault: Fault, response: &mut HttpResponse, extra: &mut Extra) {
    let json = |text: String| (text.into_bytes(), "application/json");
    let dice = &mut extra.0;
    let (status, (body, content_type)) = match fault {
        Fault::UpstreamError => (
            500,
            json(format!(
                r#"{{"error":{{"message":"The server had an error while processing your request. (request req_{})","type":"server_error","param":null,"code":null}}}}"#,
                dice.hex(32)
            )),
        ),
        Fault::RateLimited => (
            429,
            json(format!(
                r#"{{"error":{{"message":"Rate limit reached for requests. Please try again in {}ms.","type":"requests","param":null,"code":"rate_limit_exceeded"}}}}"#,
                dice.between(20, 900)
            )),
        ),
        Fault::ErrorPage => {
            let page = "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n";
            (502, (page.as_bytes().to_vec(), "text/html"))
        }
        Fault::Truncated => {
            // At a character's beginning, so that a row can hold it.
            let mut end = dice.below(response.body.len() as u64) as usize;
            while response.body.get(end).is_some_and(|byte| byte & 0xc0 == 0x80) {
                end -= 1;
            }
            response.body.truncate(end);
            response.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("content-length"));
            return;
        }
        Fault::Empty => (response.status, (Vec::new(), "application/json")),
    };
    response.status = status;
    response.headers.retain(|(name, _)| {
        !name.eq_ignore_ascii_case("content-length") && !name.eq_ignore_ascii_case("content-type")
    });
    response.headers.push(("content-type".to_owned(), content_type.to_owned()));
    response.body = body;
}

fn request(
    method: String,
    target: String,
    content_type: Option<String>,
    body: String,
    agent: &str,
) -> HttpRequest {
    let mut headers = vec![
        ("host".to_owned(), HOST.to_owned()),
        ("accept".to_owned(), "application/json".to_owned()),
        ("accept-encoding".to_owned(), "gzip, deflate".to_owned()),
        ("user-agent".to_owned(), agent.to_owned()),
        ("authorization".to_owned(), BEARER.to_owned()),
    ];
    if let Some(content_type) = content_type {
        headers.push(("content-type".to_owned(), content_type));
        headers.push(("content-length".to_owned(), body.len().to_string()));
    }
    HttpRequest { method, target, headers, body: body.into_bytes() }
}

fn response(body: String, unix_s: u64, dice: &mut Dice) -> HttpResponse {
    let headers = vec![
        ("date".to_owned(), calendar::imf_fixdate(unix_s)),
        ("content-type".to_owned(), "application/json".to_owned()),
        ("x-request-id".to_owned(), dice.uuid()),
        ("cache-control".to_owned(), "no-store".to_owned()),
        ("content-length".to_owned(), body.len().to_string()),
    ];
    HttpResponse { status: 200, headers, body: body.into_bytes() }
}
