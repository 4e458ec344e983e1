//! Chat completions on the wire: the request, and the answer as JSON or as server-sent events.
//!
//! Shapes follow the OpenAI API reference (chat completion object, chat completion chunk object);
//! the stream is the event-stream format of the HTML standard, section 9.2. Cost is linear in the
//! bytes written; a streamed answer is about eight times its text, as in real captures.

use super::apps::{App, Client};
use super::calendar;
use super::dice::Dice;
use super::json::{COMPACT, INDENTED, Json};
use crate::capture::{HttpRequest, HttpResponse};

/// One message of a conversation.
#[derive(Clone, Debug)]
pub(super) enum Message {
    System(String),
    User(String),
    Assistant(String),
    Call(Call),
    ToolResult { call_id: String, content: String },
}

/// One tool call; `arguments` is a JSON text, as the API has it.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) arguments: String,
}

/// What the model says next.
#[derive(Clone, Debug)]
pub(super) enum Reply {
    Text(String),
    Call(Call),
}

/// Who answers: the application's own model, or one that somebody put in its place.
#[derive(Clone, Debug)]
pub(super) enum Backend {
    Own,
    /// Another provider's gateway: its own id format and an extra field.
    Swapped {
        model: String,
    },
}

pub(super) struct Completion<'a> {
    pub(super) app: &'a App,
    pub(super) unix_s: u64,
    pub(super) messages: &'a [Message],
    pub(super) reply: &'a Reply,
    /// `length` where the answer was cut off; otherwise what the reply implies.
    pub(super) cut_off: bool,
    pub(super) streamed: bool,
    pub(super) backend: Backend,
}

/// The application's request.
pub(super) fn request(app: &App, messages: &[Message], streamed: bool) -> HttpRequest {
    let messages = ("messages", Json::List(messages.iter().map(|m| message(m, app.client)).collect()));
    let model = ("model", Json::text(app.model));
    let temperature = app.temperature.map(|t| ("temperature", Json::Number(t.to_owned())));
    let limit_key = if app.client == Client::Go { "max_tokens" } else { "max_completion_tokens" };
    let max_tokens = app.max_tokens.map(|n| (limit_key, Json::int(n)));
    let tools = (!app.tools.is_empty()).then(|| ("tools", Json::List(app.tools.clone())));
    let stream = streamed.then_some(("stream", Json::Bool(true)));
    let stream_options = (streamed && app.include_usage)
        .then(|| ("stream_options", Json::Object(vec![("include_usage", Json::Bool(true))])));
    let fields: Vec<_> = match app.client {
        Client::Python | Client::PythonOld => {
            [Some(messages), Some(model), max_tokens, stream, stream_options, temperature, tools].into()
        }
        Client::Node => {
            [Some(model), Some(messages), tools, temperature, max_tokens, stream, stream_options].into()
        }
        Client::Go => {
            [Some(model), Some(messages), max_tokens, temperature, stream, stream_options, tools].into()
        }
        Client::Java => {
            [Some(messages), Some(model), max_tokens, temperature, stream_options, tools, stream].into()
        }
    };
    let body = Json::Object(fields.into_iter().flatten().collect()).write(app.client.style()).into_bytes();
    let mut headers = app.client.headers();
    let name = if app.client == Client::Go { "Content-Length" } else { "content-length" };
    headers.push((name.to_owned(), body.len().to_string()));
    HttpRequest { method: "POST".to_owned(), target: "/v1/chat/completions".to_owned(), headers, body }
}

fn message(message: &Message, client: Client) -> Json {
    let mut fields = match message {
        Message::System(text) => vec![("role", Json::text("system")), ("content", Json::text(text))],
        Message::User(text) => vec![("role", Json::text("user")), ("content", Json::text(text))],
        Message::Assistant(text) => vec![("role", Json::text("assistant")), ("content", Json::text(text))],
        Message::Call(call) => vec![
            ("role", Json::text("assistant")),
            ("content", Json::Null),
            ("tool_calls", Json::List(vec![tool_call(call)])),
        ],
        Message::ToolResult { call_id, content } => vec![
            ("role", Json::text("tool")),
            ("tool_call_id", Json::text(call_id)),
            ("content", Json::text(content)),
        ],
    };
    if client == Client::Java {
        fields.sort_by_key(|(key, _)| *key);
    }
    Json::Object(fields)
}

fn tool_call(call: &Call) -> Json {
    Json::Object(vec![
        ("id", Json::text(&call.id)),
        ("type", Json::text("function")),
        (
            "function",
            Json::Object(vec![("name", Json::text(&call.name)), ("arguments", Json::text(&call.arguments))]),
        ),
    ])
}

/// The upstream's answer.
pub(super) fn response(completion: &Completion<'_>, dice: &mut Dice) -> HttpResponse {
    let envelope = Envelope::new(completion, dice);
    let (body, content_type) = if completion.streamed {
        (events(completion, &envelope, dice), "text/event-stream; charset=utf-8")
    } else {
        (whole(completion, &envelope), "application/json")
    };
    let latency_ms = dice.between(180, 4_900);
    let requests_left = dice.between(9_000, 9_999);
    let tokens_left = dice.between(1_800_000, 1_999_000);
    let mut headers: Vec<(String, String)> = [
        ("date", calendar::imf_fixdate(completion.unix_s + latency_ms / 1_000)),
        ("content-type", content_type.to_owned()),
        ("openai-organization", "example-org".to_owned()),
        ("openai-processing-ms", latency_ms.to_string()),
        ("openai-version", "2020-10-01".to_owned()),
        ("x-ratelimit-limit-requests", "10000".to_owned()),
        ("x-ratelimit-limit-tokens", "2000000".to_owned()),
        ("x-ratelimit-remaining-requests", requests_left.to_string()),
        ("x-ratelimit-remaining-tokens", tokens_left.to_string()),
        ("x-request-id", format!("req_{}", dice.hex(32))),
        ("server", "uvicorn".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    if !completion.streamed {
        headers.push(("content-length".to_owned(), body.len().to_string()));
    }
    HttpResponse { status: 200, headers, body: body.into_bytes() }
}

/// The fields that every object of one answer repeats.
struct Envelope {
    id: String,
    created: Json,
    model: String,
    fingerprint: Json,
    service_tier: Option<Json>,
    provider: Option<Json>,
    usage: Json,
    finish_reason: &'static str,
}

impl Envelope {
    fn new(completion: &Completion<'_>, dice: &mut Dice) -> Self {
        let prompt_bytes: usize = completion.messages.iter().map(text_len).sum();
        let (reply_bytes, finish_reason) = match completion.reply {
            Reply::Text(text) => (text.len(), if completion.cut_off { "length" } else { "stop" }),
            Reply::Call(call) => (call.name.len() + call.arguments.len(), "tool_calls"),
        };
        let usage = usage(prompt_bytes as u64 / 4 + 9, reply_bytes as u64 / 4 + 1, dice);
        let created = Json::int(completion.unix_s);
        match &completion.backend {
            Backend::Own => Self {
                id: format!("chatcmpl-{}", dice.base62(29)),
                created,
                model: completion.app.model_answering.to_owned(),
                fingerprint: Json::text(*dice.pick(&completion.app.fingerprints)),
                service_tier: Some(Json::text("default")),
                provider: None,
                usage,
                finish_reason,
            },
            Backend::Swapped { model } => Self {
                id: format!("gen-{}-{}", completion.unix_s, dice.base62(20)),
                created,
                model: model.clone(),
                fingerprint: Json::Null,
                service_tier: None,
                provider: Some(Json::text("Budget Inference")),
                usage,
                finish_reason,
            },
        }
    }

    fn object(&self, kind: &str, choices: Vec<Json>, usage: Option<Json>, streamed: bool) -> Json {
        let mut fields = vec![("id", Json::text(&self.id))];
        if let Some(provider) = &self.provider {
            fields.push(("provider", provider.clone()));
        }
        fields.extend([
            ("object", Json::text(kind)),
            ("created", self.created.clone()),
            ("model", Json::text(&self.model)),
        ]);
        // OpenAI puts these two before the choices of a chunk and after those of a whole answer.
        let mut tail = Vec::new();
        if let Some(tier) = &self.service_tier {
            tail.push(("service_tier", tier.clone()));
        }
        tail.push(("system_fingerprint", self.fingerprint.clone()));
        let choices = ("choices", Json::List(choices));
        let usage = usage.map(|usage| ("usage", usage));
        if streamed {
            fields.extend(tail);
            fields.push(choices);
            fields.extend(usage);
        } else {
            fields.push(choices);
            fields.extend(usage);
            fields.extend(tail);
        }
        Json::Object(fields)
    }
}

fn text_len(message: &Message) -> usize {
    match message {
        Message::System(text) | Message::User(text) | Message::Assistant(text) => text.len(),
        Message::Call(call) => call.name.len() + call.arguments.len(),
        Message::ToolResult { content, .. } => content.len(),
    }
}

fn usage(prompt: u64, completion: u64, dice: &mut Dice) -> Json {
    let cached = if prompt > 1_024 && dice.percent(60) { prompt / 128 * 128 } else { 0 };
    Json::Object(vec![
        ("prompt_tokens", Json::int(prompt)),
        ("completion_tokens", Json::int(completion)),
        ("total_tokens", Json::int(prompt + completion)),
        (
            "prompt_tokens_details",
            Json::Object(vec![("cached_tokens", Json::int(cached)), ("audio_tokens", Json::int(0))]),
        ),
        (
            "completion_tokens_details",
            Json::Object(vec![
                ("reasoning_tokens", Json::int(0)),
                ("audio_tokens", Json::int(0)),
                ("accepted_prediction_tokens", Json::int(0)),
                ("rejected_prediction_tokens", Json::int(0)),
            ]),
        ),
    ])
}

fn whole(completion: &Completion<'_>, envelope: &Envelope) -> String {
    let mut message = vec![("role", Json::text("assistant"))];
    match completion.reply {
        Reply::Text(text) => message.push(("content", Json::text(text))),
        Reply::Call(call) => {
            message.extend([("content", Json::Null), ("tool_calls", Json::List(vec![tool_call(call)]))]);
        }
    }
    message.extend([("refusal", Json::Null), ("annotations", Json::List(vec![]))]);
    let choice = Json::Object(vec![
        ("index", Json::int(0)),
        ("message", Json::Object(message)),
        ("logprobs", Json::Null),
        ("finish_reason", Json::text(envelope.finish_reason)),
    ]);
    let style = if matches!(completion.backend, Backend::Own) { INDENTED } else { COMPACT };
    let mut body =
        envelope.object("chat.completion", vec![choice], Some(envelope.usage.clone()), false).write(style);
    if matches!(completion.backend, Backend::Own) {
        body.push('\n');
    }
    body
}

fn events(completion: &Completion<'_>, envelope: &Envelope, dice: &mut Dice) -> String {
    let include_usage = completion.app.include_usage;
    let mut out = String::new();
    let mut event = |delta: Vec<(&'static str, Json)>, finish: Json| {
        let choice = Json::Object(vec![
            ("index", Json::int(0)),
            ("delta", Json::Object(delta)),
            ("logprobs", Json::Null),
            ("finish_reason", finish),
        ]);
        let usage = include_usage.then_some(Json::Null);
        push_event(&mut out, &envelope.object("chat.completion.chunk", vec![choice], usage, true));
    };
    match completion.reply {
        Reply::Text(text) => {
            event(
                vec![("role", Json::text("assistant")), ("content", Json::text("")), ("refusal", Json::Null)],
                Json::Null,
            );
            for piece in pieces(text, dice) {
                event(vec![("content", Json::text(piece))], Json::Null);
            }
        }
        Reply::Call(call) => {
            let opened = Call { arguments: String::new(), ..call.clone() };
            event(
                vec![
                    ("role", Json::text("assistant")),
                    ("content", Json::Null),
                    ("tool_calls", Json::List(vec![indexed(tool_call(&opened))])),
                    ("refusal", Json::Null),
                ],
                Json::Null,
            );
            for piece in pieces(&call.arguments, dice) {
                let function = Json::Object(vec![("arguments", Json::text(piece))]);
                let part = Json::Object(vec![("function", function)]);
                event(vec![("tool_calls", Json::List(vec![indexed(part)]))], Json::Null);
            }
        }
    }
    event(vec![], Json::text(envelope.finish_reason));
    if include_usage {
        push_event(
            &mut out,
            &envelope.object("chat.completion.chunk", vec![], Some(envelope.usage.clone()), true),
        );
    }
    out.push_str("data: [DONE]\n\n");
    out
}

fn push_event(out: &mut String, data: &Json) {
    out.push_str("data: ");
    out.push_str(&data.write(COMPACT));
    out.push_str("\n\n");
}

/// Puts `index` first, as the chunks of a tool call have it.
fn indexed(value: Json) -> Json {
    match value {
        Json::Object(mut fields) => {
            fields.insert(0, ("index", Json::int(0)));
            Json::Object(fields)
        }
        other => other,
    }
}

/// Cuts a text into deltas of one to five words, each with the space before it, as a tokenizer does.
/// Concatenated they are the text.
pub(super) fn pieces<'t>(text: &'t str, dice: &mut Dice) -> Vec<&'t str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut words = dice.between(1, 5);
    for (at, c) in text.char_indices() {
        if at > start && (c == ' ' || c == '\n') {
            words -= 1;
            if words == 0 {
                pieces.push(&text[start..at]);
                start = at;
                words = dice.between(1, 5);
            }
        }
    }
    if start < text.len() {
        pieces.push(&text[start..]);
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deltas_concatenate_to_the_text() {
        for (stream, text) in
            ["", "one", "  two  spaces \n\n and é🚀 more words than five of them", " "].iter().enumerate()
        {
            let mut dice = Dice::new(9, stream as u64);
            assert_eq!(pieces(text, &mut dice).concat(), *text);
        }
    }
}
