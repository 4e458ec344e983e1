//! One recording, before and after it is made an exchange.
//!
//! [`Record`] points into the bytes it was read from, so that the replay's fast path copies neither
//! headers nor bodies; [`Recorded`] owns what it holds.

use std::borrow::Cow;

use super::http1::{self, RequestRef, ResponseRef};
use super::rows::Kind;
use super::{CaptureError, Exchange, HttpRequest, HttpResponse, Place};

/// An exchange with what its capture says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Where it stands in its file.
    pub place: Place,
    /// When the request began, where the capture says so: nanoseconds since the Unix epoch.
    pub unix_ns: Option<u64>,
    /// The exchange.
    pub exchange: Exchange,
}

/// What one recording holds.
#[derive(Clone, Debug)]
pub struct Record<'a> {
    /// Where it stands in its file.
    pub place: Place,
    /// Its identity in the capture.
    pub id: Cow<'a, str>,
    /// `normal`, an attack family, a model's name, or `unlabelled`.
    pub label: Cow<'a, str>,
    /// When the request began: nanoseconds since the Unix epoch.
    pub unix_ns: Option<u64>,
    /// The messages.
    pub content: Content<'a>,
}

/// The messages of a recording, as its format has them.
#[derive(Clone, Debug)]
pub enum Content<'a> {
    /// Raw messages, or plain text.
    Text {
        /// What `text` is.
        kind: Kind,
        /// The request, or the text itself.
        text: Cow<'a, str>,
        /// The response.
        response: Option<Cow<'a, str>>,
    },
    /// Messages taken apart already.
    Messages {
        /// The request.
        request: HttpRequest,
        /// The response, where there is one.
        response: Option<HttpResponse>,
    },
}

const TEXT_PLAIN: (&str, &str) = ("content-type", "text/plain");

/// What stands for an answer that was not recorded: it has no body, so nothing is judged.
fn unrecorded<'a>() -> ResponseRef<'a> {
    ResponseRef { status: 204, headers: Vec::new(), body: &[] }
}

fn post<'a>(target: &'a str, body: Option<&'a str>) -> RequestRef<'a> {
    RequestRef {
        method: "POST",
        target,
        headers: body.map(|_| TEXT_PLAIN).into_iter().collect(),
        body: body.unwrap_or_default().as_bytes(),
    }
}

fn request_ref(request: &HttpRequest) -> RequestRef<'_> {
    RequestRef {
        method: &request.method,
        target: &request.target,
        headers: request.headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect(),
        body: &request.body,
    }
}

fn response_ref(response: &HttpResponse) -> ResponseRef<'_> {
    ResponseRef {
        status: response.status,
        headers: response.headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect(),
        body: &response.body,
    }
}

impl Exchange {
    /// Its two messages, without copying; the response where one was recorded.
    pub fn messages(&self) -> (RequestRef<'_>, Option<ResponseRef<'_>>) {
        (request_ref(&self.request), self.response.as_ref().map(response_ref))
    }
}

impl Record<'_> {
    /// The messages, without copying.
    ///
    /// A prompt becomes the text body of a POST, a completion or a log line that of the answer. An
    /// `http_request` whose text is not a request (a bare parameter value) becomes a text body too. An
    /// answer that was not recorded becomes an empty 204.
    ///
    /// # Errors
    /// [`CaptureError::Message`] where a raw exchange or its response does not parse.
    pub fn messages(&self) -> Result<(RequestRef<'_>, ResponseRef<'_>), CaptureError> {
        let message = |what| move |reason| CaptureError::Message { place: self.place, what, reason };
        let (kind, text, response) = match &self.content {
            Content::Messages { request, response } => {
                let response = response.as_ref().map_or_else(unrecorded, response_ref);
                return Ok((request_ref(request), response));
            }
            Content::Text { kind, text, response } => (*kind, text.as_ref(), response),
        };
        Ok(match kind {
            Kind::Prompt => (post("/prompt", Some(text)), unrecorded()),
            Kind::Completion | Kind::Log => {
                let target = if kind == Kind::Log { "/log" } else { "/completion" };
                let answer = ResponseRef { status: 200, headers: vec![TEXT_PLAIN], body: text.as_bytes() };
                (post(target, None), answer)
            }
            Kind::HttpRequest => match http1::request(text) {
                Ok(request) => (request, unrecorded()),
                Err(_) => (post("/value", Some(text)), unrecorded()),
            },
            Kind::HttpExchange => {
                let request = http1::request(text).map_err(message("request"))?;
                let response = match response {
                    Some(raw) => http1::response(raw).map_err(message("response"))?,
                    None => unrecorded(),
                };
                (request, response)
            }
        })
    }

    /// The recording as an exchange of its own.
    ///
    /// # Errors
    /// As [`Record::messages`].
    pub fn into_recorded(self) -> Result<Recorded, CaptureError> {
        let (request, response) = match self.content {
            Content::Messages { request, response } => {
                let response = response.unwrap_or_else(|| owned_response(&unrecorded()));
                (request, response)
            }
            Content::Text { .. } => {
                let (request, response) = self.messages()?;
                (owned_request(&request), owned_response(&response))
            }
        };
        let exchange = Exchange {
            id: self.id.into_owned(),
            label: self.label.into_owned(),
            request,
            response: Some(response),
        };
        Ok(Recorded { place: self.place, unix_ns: self.unix_ns, exchange })
    }
}

fn owned(headers: &[(&str, &str)]) -> super::Headers {
    headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn owned_request(request: &RequestRef<'_>) -> HttpRequest {
    HttpRequest {
        method: request.method.to_owned(),
        target: request.target.to_owned(),
        headers: owned(&request.headers),
        body: request.body.to_owned(),
    }
}

fn owned_response(response: &ResponseRef<'_>) -> HttpResponse {
    HttpResponse {
        status: response.status,
        headers: owned(&response.headers),
        body: response.body.to_owned(),
    }
}
