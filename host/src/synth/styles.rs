//! The same conversation through other providers' APIs.
//!
//! Shapes follow the API references: OpenAI responses, Anthropic messages, Gemini generateContent, each
//! whole or as server-sent events. Texts, calls and results are those of [`super::chat`]; only what
//! carries them differs. Cost is linear in the bytes written. Left out on purpose: images, several
//! candidates, thinking.

use super::apps::{BEARER, HOST};
use super::calendar;
use super::chat::{Backend, Completion, Message, Reply, pieces};
use super::dice::Dice;
use super::json::{COMPACT, Json};
use super::parameters::Style;
use crate::capture::{HttpRequest, HttpResponse};

fn object(fields: Vec<(&'static str, Json)>) -> Json {
    Json::Object(fields)
}

/// JSON as it stands: arguments and results are JSON texts already.
fn raw(text: &str) -> Json {
    Json::Number(text.to_owned())
}

/// Name, description and parameters of an OpenAI function tool.
fn tool_parts(tool: &Json) -> Option<[Json; 3]> {
    let Json::Object(fields) = tool else { return None };
    let (_, Json::Object(function)) = fields.iter().find(|(key, _)| *key == "function")? else { return None };
    let part = |name: &str| function.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
    Some([part("name")?, part("description")?, part("parameters")?])
}

fn tools(completion: &Completion<'_>, keys: [&'static str; 3], typed: bool) -> Vec<Json> {
    let tool = |tool: &Json| {
        let parts = tool_parts(tool)?;
        let mut fields: Vec<(&'static str, Json)> = keys.into_iter().zip(parts).collect();
        if typed {
            fields.insert(0, ("type", Json::text("function")));
        }
        Some(object(fields))
    };
    completion.app.tools.iter().filter_map(tool).collect()
}

/// The application's request in another style; none for OpenAI chat, which [`super::chat`] writes.
pub(super) fn request(style: Style, completion: &Completion<'_>) -> Option<HttpRequest> {
    let (target, key, body) = match style {
        Style::OpenaiChat => return None,
        Style::OpenaiResponses => {
            ("/v1/responses".to_owned(), ("authorization", BEARER), responses_request(completion))
        }
        Style::AnthropicMessages => (
            "/v1/messages".to_owned(),
            ("x-api-key", "PLACEHOLDER-GATEWAY-KEY"),
            anthropic_request(completion),
        ),
        Style::Gemini => {
            let call = if completion.streamed { "streamGenerateContent?alt=sse" } else { "generateContent" };
            let target = format!("/v1beta/models/{}:{call}", completion.app.model);
            (target, ("x-goog-api-key", "PLACEHOLDER-GATEWAY-KEY"), gemini_request(completion))
        }
    };
    let body = body.write(COMPACT).into_bytes();
    let mut headers = vec![
        ("host", HOST.to_owned()),
        ("accept", "application/json".to_owned()),
        ("content-type", "application/json".to_owned()),
        ("user-agent", "llm-client/1.4.2".to_owned()),
        (key.0, key.1.to_owned()),
    ];
    if style == Style::AnthropicMessages {
        headers.push(("anthropic-version", "2023-06-01".to_owned()));
    }
    headers.push(("content-length", body.len().to_string()));
    let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Some(HttpRequest { method: "POST".to_owned(), target, headers, body })
}

/// The upstream's answer in that style.
pub(super) fn response(style: Style, completion: &Completion<'_>, dice: &mut Dice) -> Option<HttpResponse> {
    let body = match (style, completion.streamed) {
        (Style::OpenaiChat, _) => return None,
        (Style::OpenaiResponses, false) => responses_object(completion, &Ids::new(dice), true).write(COMPACT),
        (Style::OpenaiResponses, true) => responses_events(completion, dice),
        (Style::AnthropicMessages, false) => {
            anthropic_message(completion, &Ids::new(dice), true).write(COMPACT)
        }
        (Style::AnthropicMessages, true) => anthropic_events(completion, dice),
        (Style::Gemini, false) => {
            let ids = Ids::new(dice);
            gemini_chunk(completion, &ids, gemini_reply(completion.reply), true).write(COMPACT)
        }
        (Style::Gemini, true) => gemini_events(completion, dice),
    };
    let content_type = if completion.streamed { "text/event-stream" } else { "application/json" };
    let headers = vec![
        ("date".to_owned(), calendar::imf_fixdate(completion.unix_s)),
        ("content-type".to_owned(), content_type.to_owned()),
        ("request-id".to_owned(), format!("req_{}", dice.base62(24))),
    ];
    Some(HttpResponse { status: 200, headers, body: body.into_bytes() })
}

/// Identifiers of one answer.
struct Ids {
    answer: String,
    item: String,
}

impl Ids {
    fn new(dice: &mut Dice) -> Self {
        Self { answer: dice.base62(24), item: dice.base62(24) }
    }
}

fn model(completion: &Completion<'_>) -> Json {
    Json::text(match &completion.backend {
        Backend::Own => completion.app.model_answering,
        Backend::Swapped { model } => model,
    })
}

/// Prompt and answer in tokens, about.
fn tokens(completion: &Completion<'_>) -> (u64, u64) {
    let len = |message: &Message| match message {
        Message::System(text) | Message::User(text) | Message::Assistant(text) => text.len(),
        Message::Call(call) => call.name.len() + call.arguments.len(),
        Message::ToolResult { content, .. } => content.len(),
    };
    let prompt: usize = completion.messages.iter().map(len).sum();
    let answer = match completion.reply {
        Reply::Text(text) => text.len(),
        Reply::Call(call) => call.arguments.len(),
    };
    (prompt as u64 / 4 + 9, answer as u64 / 4 + 1)
}

fn push_event(out: &mut String, name: Option<&str>, data: &Json) {
    if let Some(name) = name {
        out.push_str("event: ");
        out.push_str(name);
        out.push('\n');
    }
    out.push_str("data: ");
    out.push_str(&data.write(COMPACT));
    out.push_str("\n\n");
}

// ---- OpenAI responses

fn responses_request(completion: &Completion<'_>) -> Json {
    let text =
        |role: &str, text: &str| object(vec![("role", Json::text(role)), ("content", Json::text(text))]);
    let mut fields = vec![("model", Json::text(completion.app.model))];
    let mut input = Vec::new();
    for message in completion.messages {
        match message {
            Message::System(prompt) => fields.push(("instructions", Json::text(prompt))),
            Message::User(said) => input.push(text("user", said)),
            Message::Assistant(said) => input.push(text("assistant", said)),
            Message::Call(call) => input.push(object(vec![
                ("type", Json::text("function_call")),
                ("call_id", Json::text(&call.id)),
                ("name", Json::text(&call.name)),
                ("arguments", Json::text(&call.arguments)),
            ])),
            Message::ToolResult { call_id, content } => input.push(object(vec![
                ("type", Json::text("function_call_output")),
                ("call_id", Json::text(call_id)),
                ("output", Json::text(content)),
            ])),
        }
    }
    fields.push(("input", Json::List(input)));
    let tools = tools(completion, ["name", "description", "parameters"], true);
    if !tools.is_empty() {
        fields.push(("tools", Json::List(tools)));
    }
    if completion.streamed {
        fields.push(("stream", Json::Bool(true)));
    }
    object(fields)
}

/// What an answer and its item are: under way, complete, or cut off.
fn responses_status(completion: &Completion<'_>, done: bool) -> Json {
    Json::text(match (done, completion.cut_off) {
        (false, _) => "in_progress",
        (true, false) => "completed",
        (true, true) => "incomplete",
    })
}

fn responses_item(completion: &Completion<'_>, ids: &Ids, done: bool) -> Json {
    let status = responses_status(completion, done);
    match completion.reply {
        Reply::Text(text) => {
            let part = object(vec![
                ("type", Json::text("output_text")),
                ("text", Json::text(text)),
                ("annotations", Json::List(vec![])),
            ]);
            object(vec![
                ("type", Json::text("message")),
                ("id", Json::text(format!("msg_{}", ids.item))),
                ("status", status),
                ("role", Json::text("assistant")),
                ("content", Json::List(if done { vec![part] } else { vec![] })),
            ])
        }
        Reply::Call(call) => object(vec![
            ("type", Json::text("function_call")),
            ("id", Json::text(format!("fc_{}", ids.item))),
            ("status", status),
            ("call_id", Json::text(&call.id)),
            ("name", Json::text(&call.name)),
            ("arguments", Json::text(if done { &call.arguments } else { "" })),
        ]),
    }
}

fn responses_object(completion: &Completion<'_>, ids: &Ids, done: bool) -> Json {
    let (input, output) = tokens(completion);
    let usage = object(vec![
        ("input_tokens", Json::int(input)),
        ("output_tokens", Json::int(output)),
        ("total_tokens", Json::int(input + output)),
    ]);
    let items = if done { vec![responses_item(completion, ids, true)] } else { vec![] };
    let mut fields = vec![
        ("id", Json::text(format!("resp_{}", ids.answer))),
        ("object", Json::text("response")),
        ("created_at", Json::int(completion.unix_s)),
        ("status", responses_status(completion, done)),
    ];
    if done && completion.cut_off {
        let details = object(vec![("reason", Json::text("max_output_tokens"))]);
        fields.push(("incomplete_details", details));
    }
    fields.extend([
        ("model", model(completion)),
        ("output", Json::List(items)),
        ("usage", if done { usage } else { Json::Null }),
    ]);
    object(fields)
}

fn responses_events(completion: &Completion<'_>, dice: &mut Dice) -> String {
    let ids = Ids::new(dice);
    let mut out = String::new();
    let mut number = 0;
    let mut event = |name: &'static str, mut rest: Vec<(&'static str, Json)>| {
        rest.insert(0, ("type", Json::text(name)));
        rest.insert(1, ("sequence_number", Json::int(number)));
        number += 1;
        push_event(&mut out, Some(name), &object(rest));
    };
    event("response.created", vec![("response", responses_object(completion, &ids, false))]);
    let index = || ("output_index", Json::int(0));
    event("response.output_item.added", vec![index(), ("item", responses_item(completion, &ids, false))]);
    let (delta, text) = match completion.reply {
        Reply::Text(text) => ("response.output_text.delta", text),
        Reply::Call(call) => ("response.function_call_arguments.delta", &call.arguments),
    };
    for piece in pieces(text, dice) {
        event(delta, vec![("item_id", Json::text(&ids.item)), index(), ("delta", Json::text(piece))]);
    }
    event("response.output_item.done", vec![index(), ("item", responses_item(completion, &ids, true))]);
    let end = if completion.cut_off { "response.incomplete" } else { "response.completed" };
    event(end, vec![("response", responses_object(completion, &ids, true))]);
    out
}

// ---- Anthropic messages

fn anthropic_request(completion: &Completion<'_>) -> Json {
    let said = |role: &str, content: Json| object(vec![("role", Json::text(role)), ("content", content)]);
    let mut fields = vec![
        ("model", Json::text(completion.app.model)),
        ("max_tokens", Json::int(completion.app.max_tokens.unwrap_or(1_024))),
    ];
    let mut messages = Vec::new();
    for message in completion.messages {
        match message {
            Message::System(prompt) => fields.push(("system", Json::text(prompt))),
            Message::User(text) => messages.push(said("user", Json::text(text))),
            Message::Assistant(text) => messages.push(said("assistant", Json::text(text))),
            Message::Call(call) => messages.push(said(
                "assistant",
                Json::List(vec![object(vec![
                    ("type", Json::text("tool_use")),
                    ("id", Json::text(&call.id)),
                    ("name", Json::text(&call.name)),
                    ("input", raw(&call.arguments)),
                ])]),
            )),
            Message::ToolResult { call_id, content } => messages.push(said(
                "user",
                Json::List(vec![object(vec![
                    ("type", Json::text("tool_result")),
                    ("tool_use_id", Json::text(call_id)),
                    ("content", Json::text(content)),
                ])]),
            )),
        }
    }
    fields.push(("messages", Json::List(messages)));
    let tools = tools(completion, ["name", "description", "input_schema"], false);
    if !tools.is_empty() {
        fields.push(("tools", Json::List(tools)));
    }
    if completion.streamed {
        fields.push(("stream", Json::Bool(true)));
    }
    object(fields)
}

fn anthropic_block(reply: &Reply, whole: bool) -> Json {
    match reply {
        Reply::Text(text) => {
            object(vec![("type", Json::text("text")), ("text", Json::text(if whole { text } else { "" }))])
        }
        Reply::Call(call) => object(vec![
            ("type", Json::text("tool_use")),
            ("id", Json::text(&call.id)),
            ("name", Json::text(&call.name)),
            ("input", raw(if whole { &call.arguments } else { "{}" })),
        ]),
    }
}

fn stop_reason(completion: &Completion<'_>) -> Json {
    Json::text(match completion.reply {
        Reply::Call(_) => "tool_use",
        Reply::Text(_) if completion.cut_off => "max_tokens",
        Reply::Text(_) => "end_turn",
    })
}

fn anthropic_message(completion: &Completion<'_>, ids: &Ids, whole: bool) -> Json {
    let (input, output) = tokens(completion);
    let content = if whole { vec![anthropic_block(completion.reply, true)] } else { vec![] };
    object(vec![
        ("id", Json::text(format!("msg_{}", ids.answer))),
        ("type", Json::text("message")),
        ("role", Json::text("assistant")),
        ("model", model(completion)),
        ("content", Json::List(content)),
        ("stop_reason", if whole { stop_reason(completion) } else { Json::Null }),
        ("stop_sequence", Json::Null),
        (
            "usage",
            object(vec![
                ("input_tokens", Json::int(input)),
                ("output_tokens", Json::int(if whole { output } else { 1 })),
            ]),
        ),
    ])
}

fn anthropic_events(completion: &Completion<'_>, dice: &mut Dice) -> String {
    let ids = Ids::new(dice);
    let mut out = String::new();
    let mut event = |name: &'static str, mut rest: Vec<(&'static str, Json)>| {
        rest.insert(0, ("type", Json::text(name)));
        push_event(&mut out, Some(name), &object(rest));
    };
    let index = || ("index", Json::int(0));
    event("message_start", vec![("message", anthropic_message(completion, &ids, false))]);
    event("content_block_start", vec![index(), ("content_block", anthropic_block(completion.reply, false))]);
    event("ping", vec![]);
    let (kind, key, text) = match completion.reply {
        Reply::Text(text) => ("text_delta", "text", text),
        Reply::Call(call) => ("input_json_delta", "partial_json", &call.arguments),
    };
    for piece in pieces(text, dice) {
        let delta = object(vec![("type", Json::text(kind)), (key, Json::text(piece))]);
        event("content_block_delta", vec![index(), ("delta", delta)]);
    }
    event("content_block_stop", vec![index()]);
    let delta = object(vec![("stop_reason", stop_reason(completion)), ("stop_sequence", Json::Null)]);
    let usage = object(vec![("output_tokens", Json::int(tokens(completion).1))]);
    event("message_delta", vec![("delta", delta), ("usage", usage)]);
    event("message_stop", vec![]);
    out
}

// ---- Gemini

fn part(text: &str) -> Json {
    object(vec![("text", Json::text(text))])
}

fn gemini_call(name: &str, arguments: &str) -> Json {
    object(vec![("functionCall", object(vec![("name", Json::text(name)), ("args", raw(arguments))]))])
}

fn gemini_request(completion: &Completion<'_>) -> Json {
    let turn =
        |role: &str, part: Json| object(vec![("role", Json::text(role)), ("parts", Json::List(vec![part]))]);
    let mut fields = Vec::new();
    let (mut contents, mut called) = (Vec::new(), String::new());
    for message in completion.messages {
        match message {
            Message::System(prompt) => {
                fields.push(("systemInstruction", object(vec![("parts", Json::List(vec![part(prompt)]))])));
            }
            Message::User(text) => contents.push(turn("user", part(text))),
            Message::Assistant(text) => contents.push(turn("model", part(text))),
            Message::Call(call) => {
                called.clone_from(&call.name);
                contents.push(turn("model", gemini_call(&call.name, &call.arguments)));
            }
            Message::ToolResult { content, .. } => {
                let result = object(vec![("result", Json::text(content))]);
                let response = object(vec![("name", Json::text(&called)), ("response", result)]);
                contents.push(turn("user", object(vec![("functionResponse", response)])));
            }
        }
    }
    fields.push(("contents", Json::List(contents)));
    let tools = tools(completion, ["name", "description", "parameters"], false);
    if !tools.is_empty() {
        fields.push(("tools", Json::List(vec![object(vec![("functionDeclarations", Json::List(tools))])])));
    }
    let mut generation = Vec::new();
    if let Some(temperature) = completion.app.temperature {
        generation.push(("temperature", Json::Number(temperature.to_owned())));
    }
    if let Some(limit) = completion.app.max_tokens {
        generation.push(("maxOutputTokens", Json::int(limit)));
    }
    if !generation.is_empty() {
        fields.push(("generationConfig", object(generation)));
    }
    object(fields)
}

fn gemini_reply(reply: &Reply) -> Json {
    match reply {
        Reply::Text(text) => part(text),
        Reply::Call(call) => gemini_call(&call.name, &call.arguments),
    }
}

fn gemini_chunk(completion: &Completion<'_>, ids: &Ids, part: Json, last: bool) -> Json {
    let content = object(vec![("parts", Json::List(vec![part])), ("role", Json::text("model"))]);
    let mut candidate = vec![("content", content)];
    if last {
        candidate.push(("finishReason", Json::text(if completion.cut_off { "MAX_TOKENS" } else { "STOP" })));
    }
    candidate.push(("index", Json::int(0)));
    let (prompt, answer) = tokens(completion);
    let usage = object(vec![
        ("promptTokenCount", Json::int(prompt)),
        ("candidatesTokenCount", Json::int(answer)),
        ("totalTokenCount", Json::int(prompt + answer)),
    ]);
    object(vec![
        ("candidates", Json::List(vec![object(candidate)])),
        ("usageMetadata", usage),
        ("modelVersion", model(completion)),
        ("responseId", Json::text(&ids.answer)),
    ])
}

fn gemini_events(completion: &Completion<'_>, dice: &mut Dice) -> String {
    let ids = Ids::new(dice);
    let parts: Vec<Json> = match completion.reply {
        Reply::Text(text) => pieces(text, dice).into_iter().map(part).collect(),
        Reply::Call(_) => vec![gemini_reply(completion.reply)],
    };
    let mut out = String::new();
    let last = parts.len().saturating_sub(1);
    for (i, part) in parts.into_iter().enumerate() {
        push_event(&mut out, None, &gemini_chunk(completion, &ids, part, i == last));
    }
    out
}
