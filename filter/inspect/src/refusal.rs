//! Refusals in the words of the API that was called, so that a client's own SDK understands them.
//!
//! What: a blocked or refused message is answered as its provider answers errors. Before headers have gone,
//! that is a whole response ([`Dialect::reply`]); in a stream that has begun, the provider's error event
//! ([`Dialect::stream_error`]); and for an answer whose status has gone, but no byte of its body, the
//! provider's own form of an answer that a filter stopped ([`Dialect::stopped`]).
//!
//! Sources: the API references of OpenAI, Anthropic, Gemini (google.rpc.Status), Bedrock (smithy restJson1
//! errors, `vnd.amazon.eventstream` exceptions), Cohere v2, Ollama; JSON-RPC 2.0 section 5.1 for MCP and A2A;
//! RFC 9457 for everything else. The path says which, since it is known when nothing else is.
//!
//! Cost: nothing until something is refused.
//!
//! Left out on purpose: request ids, and retry hints: what was refused once is refused again.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::content::{ApiStyle, Framing, Provider};
use crate::frames::Crc32;

/// An answer in the upstream's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Headers, content-type first.
    pub headers: Vec<(&'static str, &'static str)>,
    /// JSON.
    pub body: String,
    /// For the access log's response code details: `driftlock_blocked` or `driftlock_refused`.
    pub details: &'static str,
}

/// Why a message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal<'a> {
    /// HTTP status, where it can still be given.
    pub status: u16,
    /// `driftlock_blocked` or `driftlock_refused`.
    pub kind: &'static str,
    /// A short word: `anomalous`, or the reason why a message was not inspected.
    pub code: &'a str,
    /// For a person.
    pub message: &'a str,
}

/// Whose errors a client understands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Dialect {
    OpenAiChat,
    OpenAiCompletions,
    OpenAiResponses,
    /// Embeddings and the rest, whose answers no filter stops half-way.
    OpenAi,
    Anthropic,
    Gemini,
    BedrockConverse,
    Bedrock,
    Cohere,
    Ollama,
    JsonRpc,
    GraphQl,
    /// `application/problem+json`.
    #[default]
    Problem,
}

impl Dialect {
    /// From the API that the request's path belongs to.
    pub(crate) fn of(style: Option<ApiStyle>) -> Self {
        match style {
            Some(ApiStyle::OpenAiChat) => Self::OpenAiChat,
            Some(ApiStyle::OpenAiCompletions) => Self::OpenAiCompletions,
            Some(ApiStyle::OpenAiResponses) => Self::OpenAiResponses,
            Some(ApiStyle::BedrockConverse) => Self::BedrockConverse,
            Some(style) => match style.provider() {
                Provider::OpenAi => Self::OpenAi,
                Provider::Anthropic => Self::Anthropic,
                Provider::Google => Self::Gemini,
                Provider::Bedrock => Self::Bedrock,
                Provider::Cohere => Self::Cohere,
                Provider::Ollama => Self::Ollama,
                Provider::JsonRpc => Self::JsonRpc,
                Provider::GraphQl => Self::GraphQl,
                Provider::None => Self::Problem,
            },
            None => Self::Problem,
        }
    }

    /// The error's JSON.
    fn error(self, refusal: &Refusal<'_>) -> String {
        let status = refusal.status;
        let (template, class) = match self {
            Self::OpenAi | Self::OpenAiChat | Self::OpenAiCompletions | Self::OpenAiResponses => {
                (r#"{"error":{"message":$m,"type":$k,"param":null,"code":$c}}"#, "")
            }
            Self::Anthropic => (
                r#"{"type":"error","error":{"type":$x,"message":$m}}"#,
                match status {
                    401 => "authentication_error",
                    403 => "permission_error",
                    404 => "not_found_error",
                    413 => "request_too_large",
                    429 => "rate_limit_error",
                    400..500 => "invalid_request_error",
                    _ => "api_error",
                },
            ),
            Self::Gemini => (
                r#"{"error":{"code":$s,"message":$m,"status":$x,"details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":$K,"domain":"driftlock","metadata":{"code":$c}}]}}"#,
                match status {
                    401 => "UNAUTHENTICATED",
                    403 => "PERMISSION_DENIED",
                    404 => "NOT_FOUND",
                    429 => "RESOURCE_EXHAUSTED",
                    400..500 => "INVALID_ARGUMENT",
                    503 => "UNAVAILABLE",
                    _ => "INTERNAL",
                },
            ),
            Self::Bedrock | Self::BedrockConverse | Self::Cohere => (r#"{"message":$m}"#, ""),
            Self::Ollama => (r#"{"error":$m}"#, ""),
            Self::GraphQl => (r#"{"errors":[{"message":$m,"extensions":{"code":$c,"type":$k}}]}"#, ""),
            // The code is in the range that JSON-RPC 2.0 leaves to servers.
            Self::JsonRpc => (
                r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32001,"message":$m,"data":{"type":$k,"code":$c}}}"#,
                "",
            ),
            Self::Problem => (
                r#"{"type":"about:blank","title":$x,"status":$s,"detail":$m,"code":$c,"reason":$k}"#,
                title(status),
            ),
        };
        filled(template, refusal, class)
    }

    /// A whole response.
    pub(crate) fn reply(self, refusal: &Refusal<'_>) -> Reply {
        let mut headers = Vec::new();
        headers.push((
            "content-type",
            if self == Self::Problem { "application/problem+json" } else { "application/json" },
        ));
        if matches!(self, Self::Bedrock | Self::BedrockConverse) {
            headers.push((
                "x-amzn-errortype",
                match refusal.status {
                    403 => "AccessDeniedException",
                    400..500 => "ValidationException",
                    _ => "InternalServerException",
                },
            ));
        }
        Reply { status: refusal.status, headers, body: self.error(refusal), details: refusal.kind }
    }

    /// What ends a stream that has begun. The stream stands between two of its parts.
    pub(crate) fn stream_error(self, framing: Framing, refusal: &Refusal<'_>) -> Vec<u8> {
        let (event, data, after) = match self {
            Self::OpenAi | Self::OpenAiChat | Self::OpenAiCompletions => {
                (None, self.error(refusal), "data: [DONE]\n\n")
            }
            Self::OpenAiResponses => (
                Some("error"),
                // The SDKs raise on an `error` that is there, and read the other fields where they know them.
                filled(
                    r#"{"type":"error","code":$c,"message":$m,"param":null,"error":{"type":$k,"code":$c,"message":$m}}"#,
                    refusal,
                    "",
                ),
                "",
            ),
            Self::Cohere => (
                Some("message-end"),
                filled(r#"{"type":"message-end","delta":{"finish_reason":"ERROR","error":$m}}"#, refusal, ""),
                "",
            ),
            Self::JsonRpc => (Some("message"), self.error(refusal), ""),
            Self::Gemini => (None, self.error(refusal), ""),
            Self::Anthropic
            | Self::Bedrock
            | Self::BedrockConverse
            | Self::Ollama
            | Self::GraphQl
            | Self::Problem => (Some("error"), self.error(refusal), ""),
        };
        match framing {
            // Where documents are not told apart, nothing better fits.
            Framing::Sse | Framing::Whole => {
                let event = event.map(|event| format!("event: {event}\n")).unwrap_or_default();
                format!("{event}data: {data}\n\n{after}").into_bytes()
            }
            Framing::JsonLines => format!("{data}\n").into_bytes(),
            Framing::AwsEventStream => {
                let payload = Self::Bedrock.error(refusal);
                amazon_exception("modelStreamErrorException", payload.as_bytes())
            }
        }
    }

    /// An answer that a filter stopped, in the shape of a whole one: for a client that has been told 200
    /// and has seen none of the body. Where an API has no such shape, its error.
    pub(crate) fn stopped(self, refusal: &Refusal<'_>) -> String {
        let template = match self {
            Self::OpenAiChat => {
                r#"{"id":"driftlock-blocked","object":"chat.completion","created":0,"model":"","choices":[{"index":0,"finish_reason":"content_filter","logprobs":null,"message":{"role":"assistant","content":null,"refusal":$m}}],"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}"#
            }
            Self::OpenAiCompletions => {
                r#"{"id":"driftlock-blocked","object":"text_completion","created":0,"model":"","choices":[{"index":0,"finish_reason":"content_filter","logprobs":null,"text":""}],"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}"#
            }
            Self::OpenAiResponses => {
                r#"{"id":"driftlock-blocked","object":"response","created_at":0,"model":"","status":"incomplete","incomplete_details":{"reason":"content_filter"},"error":null,"instructions":null,"metadata":{},"parallel_tool_calls":false,"temperature":null,"tool_choice":"auto","tools":[],"top_p":null,"output":[{"id":"driftlock-blocked","type":"message","role":"assistant","status":"incomplete","content":[{"type":"refusal","refusal":$m}]}]}"#
            }
            Self::Anthropic => {
                r#"{"id":"driftlock-blocked","type":"message","role":"assistant","model":"","content":[],"stop_reason":"refusal","stop_sequence":null,"usage":{"input_tokens":0,"output_tokens":0}}"#
            }
            Self::Gemini => r#"{"promptFeedback":{"blockReason":"OTHER","blockReasonMessage":$m}}"#,
            Self::BedrockConverse => {
                r#"{"output":{"message":{"role":"assistant","content":[{"text":$m}]}},"stopReason":"guardrail_intervened","usage":{"inputTokens":0,"outputTokens":0,"totalTokens":0},"metrics":{"latencyMs":0}}"#
            }
            Self::Cohere => {
                r#"{"id":"driftlock-blocked","finish_reason":"ERROR","message":{"role":"assistant","content":[]}}"#
            }
            Self::Ollama => {
                r#"{"model":"","created_at":"1970-01-01T00:00:00Z","done":true,"done_reason":"content_filter","message":{"role":"assistant","content":""},"response":"","error":$m}"#
            }
            Self::OpenAi | Self::Bedrock | Self::JsonRpc | Self::GraphQl | Self::Problem => {
                return self.error(refusal);
            }
        };
        filled(template, refusal, "")
    }
}

/// `template` with the refusal in the places of `$m` (message), `$c` (code), `$k` and `$K` (kind, in capitals),
/// `$s` (status) and `$x` (`class`). Templates, since the same trees built with `json!` take 25 KiB of wasm.
fn filled(template: &str, refusal: &Refusal<'_>, class: &str) -> String {
    let mut out = String::with_capacity(template.len() + refusal.message.len());
    let mut pieces = template.split('$');
    out += pieces.next().unwrap_or_default();
    for piece in pieces {
        let (place, rest) = piece.split_at_checked(1).unwrap_or_default();
        match place {
            "s" => out += &refusal.status.to_string(),
            "m" => quote(&mut out, refusal.message),
            "c" => quote(&mut out, refusal.code),
            "k" => quote(&mut out, refusal.kind),
            "K" => quote(&mut out, &refusal.kind.to_ascii_uppercase()),
            _ => quote(&mut out, class),
        }
        out += rest;
    }
    out
}

/// Appends a JSON string.
pub(crate) fn quote(out: &mut String, text: &str) {
    // A string always serialises.
    *out += &serde_json::to_string(text).unwrap_or_default();
}

/// The status's phrase (RFC 9110 section 15), as RFC 9457 wants it for `about:blank`.
fn title(status: u16) -> &'static str {
    match status {
        400 => "Bad Request",
        403 => "Forbidden",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        422 => "Unprocessable Content",
        451 => "Unavailable For Legal Reasons",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        status if status < 500 => "Refused",
        _ => "Failed",
    }
}

/// One exception message of an AWS event stream: prelude (total and header length), its CRC, headers, payload,
/// CRC of all before; big-endian. Source: "Amazon Transcribe, event stream encoding" and the smithy
/// specification `vnd.amazon.eventstream`.
fn amazon_exception(kind: &str, payload: &[u8]) -> Vec<u8> {
    let mut headers = Vec::new();
    for (name, value) in
        [(":message-type", "exception"), (":exception-type", kind), (":content-type", "application/json")]
    {
        headers.push(name.len() as u8);
        headers.extend_from_slice(name.as_bytes());
        headers.push(7); // a string
        headers.extend_from_slice(&(value.len() as u16).to_be_bytes());
        headers.extend_from_slice(value.as_bytes());
    }
    let total = 12 + headers.len() + payload.len() + 4;
    let mut out = Vec::with_capacity(total);
    out.extend_from_slice(&(total as u32).to_be_bytes());
    out.extend_from_slice(&(headers.len() as u32).to_be_bytes());
    out.extend_from_slice(&Crc32::of(&out).to_be_bytes());
    out.extend_from_slice(&headers);
    out.extend_from_slice(payload);
    out.extend_from_slice(&Crc32::of(&out).to_be_bytes());
    out
}

/// What a blocked message is answered with, for a person.
pub(crate) fn blocked_message(direction: &str) -> String {
    format!(
        "Driftlock blocked this {direction}: it is unlike the traffic that this route knows. Ask the operator of the gateway if it should pass."
    )
}

/// The same for one that could not be inspected.
pub(crate) fn refused_message(direction: &str, reason: &str) -> String {
    "the ".to_owned()
        + direction
        + " could not be inspected ("
        + reason
        + ") and this route refuses such messages"
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const REFUSAL: Refusal<'static> =
        Refusal { status: 403, kind: "driftlock_blocked", code: "anomalous", message: "no" };
    const ALL: [Dialect; 13] = [
        Dialect::OpenAiChat,
        Dialect::OpenAiCompletions,
        Dialect::OpenAiResponses,
        Dialect::OpenAi,
        Dialect::Anthropic,
        Dialect::Gemini,
        Dialect::BedrockConverse,
        Dialect::Bedrock,
        Dialect::Cohere,
        Dialect::Ollama,
        Dialect::JsonRpc,
        Dialect::GraphQl,
        Dialect::Problem,
    ];

    #[test]
    fn every_style_has_a_dialect() {
        for style in ApiStyle::ALL {
            let known = Dialect::of(Some(style)) != Dialect::Problem;
            assert_eq!(known, style.provider() != Provider::None, "{style:?}");
        }
        assert_eq!(Dialect::of(None), Dialect::Problem);
    }

    #[test]
    fn every_refusal_is_json_with_its_words_in_it() {
        for dialect in ALL {
            let reply = dialect.reply(&REFUSAL);
            let body: Value = serde_json::from_str(&reply.body).unwrap();
            assert!(reply.body.contains("\"no\"") && body.is_object(), "{dialect:?}: {}", reply.body);
            assert_eq!((reply.status, reply.details), (403, "driftlock_blocked"));
            assert!(reply.headers[0].1.ends_with("json"));
            let stopped: Value = serde_json::from_str(&dialect.stopped(&REFUSAL)).unwrap();
            assert!(stopped.is_object());
            let events = String::from_utf8(dialect.stream_error(Framing::Sse, &REFUSAL)).unwrap();
            assert!(events.ends_with("\n\n"), "{events}");
            let data = events.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
            assert!(serde_json::from_str::<Value>(data).is_ok(), "{events}");
            let line = String::from_utf8(dialect.stream_error(Framing::JsonLines, &REFUSAL)).unwrap();
            assert!(serde_json::from_str::<Value>(&line).is_ok() && line.ends_with('\n'), "{line}");
        }
    }

    #[test]
    fn an_amazon_exception_is_well_formed() {
        let frame = Dialect::Bedrock.stream_error(Framing::AwsEventStream, &REFUSAL);
        let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
        assert_eq!(word(0) as usize, frame.len());
        assert_eq!(word(8), crc32fast::hash(&frame[..8]));
        let end = frame.len() - 4;
        assert_eq!(word(end), crc32fast::hash(&frame[..end]));
        let payload = &frame[12 + word(4) as usize..end];
        assert_eq!(payload, br#"{"message":"no"}"#);
    }
}
