//! Each API's bodies by example: the units in order, the summary, and the same for every size of piece.
#![allow(missing_docs)]

use driftlock_inspect::content::{ApiStyle, BodyParser, ContentError, Role, Sink, Summary, Unit};
use serde_json::json;
use std::collections::BTreeMap;

/// What a parser told, and that it told each byte of the body once.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    units: BTreeMap<Unit, (Vec<u8>, Vec<u64>)>,
    ended: Vec<Unit>,
    skipped: u64,
}

impl Sink for Told {
    fn text(&mut self, unit: Unit, text: &[u8], body_offset: u64) {
        assert!(!text.is_empty() && !self.ended.contains(&unit), "{unit:?}");
        let (known, offsets) = self.units.entry(unit).or_default();
        known.extend_from_slice(text);
        offsets.extend((0..text.len() as u64).map(|k| body_offset + k));
    }

    fn end(&mut self, unit: Unit) {
        self.ended.push(unit);
    }

    fn skipped(&mut self, _: Unit, bytes: u64) {
        self.skipped += bytes;
    }
}

type Read = (Told, Result<Summary, ContentError>, Summary, ApiStyle);

fn read(parser: BodyParser, body: &[u8], step: usize) -> Read {
    let (mut parser, mut told) = (parser, Told::default());
    for chunk in body.chunks(step) {
        parser.push(chunk, &mut told);
    }
    let result = parser.finish(&mut told);
    told.ended.sort();
    let given: Vec<Unit> = told.units.keys().copied().collect();
    assert_eq!(told.ended, given, "each unit is ended once");
    (told, result, parser.summary(), parser.style())
}

/// The same for every size of piece, and the units but the envelope as text.
fn check(make: impl Fn() -> BodyParser, body: &[u8]) -> (Vec<(&'static str, String)>, Read) {
    let whole = read(make(), body, usize::MAX);
    for step in (1..=40).chain([64, 100, 1000]) {
        assert_eq!(read(make(), body, step), whole, "in pieces of {step}");
    }
    let texts = whole.0.units.iter().filter(|(unit, _)| unit.role != Role::Envelope);
    let texts =
        texts.map(|(unit, (text, _))| (unit.role.as_str(), String::from_utf8_lossy(text).into_owned()));
    (texts.collect(), whole)
}

fn request(path: &str, body: &str) -> Vec<(&'static str, String)> {
    let make = || BodyParser::for_request(path.as_bytes(), Some(b"application/json")).unwrap();
    let (texts, (_, result, ..)) = check(make, body.as_bytes());
    result.unwrap();
    texts
}

fn response(path: &str, content_type: &str, body: &[u8]) -> (Vec<(&'static str, String)>, Summary) {
    let style = ApiStyle::of_path(path.as_bytes());
    let make = || BodyParser::for_response(style, Some(content_type.as_bytes())).unwrap();
    let (texts, (_, result, summary, _)) = check(make, body);
    assert_eq!(result, Ok(summary));
    (texts, summary)
}

fn answer(path: &str, body: serde_json::Value) -> (Vec<(&'static str, String)>, Summary) {
    response(path, "application/json", body.to_string().as_bytes())
}

fn sse(events: &[serde_json::Value]) -> Vec<u8> {
    events.iter().flat_map(|event| format!("data: {event}\n\n").into_bytes()).collect()
}

/// Compares texts without making each a `String`.
#[track_caller]
fn same(texts: &[(&'static str, String)], expected: &[(&str, &str)]) {
    let texts: Vec<(&str, &str)> = texts.iter().map(|(role, text)| (*role, text.as_str())).collect();
    assert_eq!(texts, expected);
}

#[test]
fn anthropic_messages() {
    let body = r#"{"model":"claude","max_tokens":9,"system":[{"type":"text","text":"Be brief."}],"messages":[
        {"role":"user","content":"hi"},
        {"role":"assistant","content":[{"type":"thinking","thinking":"hm","signature":"EqQBCgYI"},
            {"type":"text","text":"Let me look."},
            {"type":"tool_use","id":"t1","name":"find","input":{"q":"a\"b"}}]},
        {"role":"user","content":[{"type":"tool_result","tool_use_id":"t1","content":[{"type":"text","text":"found"}]},
            {"type":"image","source":{"type":"base64","media_type":"image/png","data":"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"}},
            {"type":"document","source":{"type":"text","media_type":"text/plain","data":"a plain text"}}]}]}"#;
    let texts = request("/v1/messages", body);
    same(
        &texts,
        &[
            ("system", "Be brief."),
            ("user", "hi"),
            ("user", "a plain text"),
            ("assistant", "Let me look."),
            ("reasoning", "hm"),
            ("tool_call", r#"find{"q":"a\"b"}"#),
            ("tool_result", "found"),
        ],
    );
    let make = || BodyParser::for_request(b"/v1/messages", None).unwrap();
    let (told, _, summary, _) = read(make(), body.as_bytes(), 7);
    assert_eq!((summary.media, summary.skipped_bytes), (1, 12));
    assert_eq!(summary.model.unwrap().as_str(), "claude");
    // Each unit's text leads back to the body; where there is no escape, byte by byte.
    for (text, offsets) in told.units.values() {
        for (byte, offset) in text.iter().zip(offsets) {
            assert_eq!(body.as_bytes()[*offset as usize], *byte);
        }
    }
    let batch = r#"{"requests":[{"custom_id":"0","params":{"system":"s","messages":[{"role":"user","content":"q"}]}}]}"#;
    same(&request("/v1/messages/batches", batch), &[("system", "s"), ("user", "q")]);
}

#[test]
fn anthropic_answers() {
    let (texts, summary) = answer(
        "/v1/messages",
        json!({"type":"message","role":"assistant","model":"claude-x","content":[
            {"type":"thinking","thinking":"so","signature":"x"},{"type":"text","text":"Yes."},
            {"type":"tool_use","id":"t","name":"f","input":{"a":1}}],
            "stop_reason":"tool_use","usage":{"input_tokens":7,"cache_read_input_tokens":2,"output_tokens":3}}),
    );
    // As the keys are sorted.
    same(&texts, &[("assistant", "Yes."), ("reasoning", "so"), ("tool_call", r#"{"a":1}f"#)]);
    assert_eq!((summary.usage.input_tokens, summary.usage.cached_tokens), (Some(7), Some(2)));
    assert_eq!(summary.finish_reason.unwrap().as_str(), "tool_use");
    let events = [
        json!({"type":"message_start","message":{"model":"claude-x","content":[],"usage":{"input_tokens":7}}}),
        json!({"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}),
        json!({"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Yes,"}}),
        json!({"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" so."}}),
        json!({"type":"content_block_start","index":1,"content_block":{"type":"tool_use","name":"f","input":{}}}),
        json!({"delta":{"type":"input_json_delta","partial_json":"{\"a\""},"type":"content_block_delta","index":1}),
        json!({"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":":1}"}}),
        json!({"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":5}}),
    ];
    let (texts, summary) = response("/v1/messages", "text/event-stream", &sse(&events));
    same(&texts, &[("assistant", "Yes, so."), ("tool_call", r#"f{"a":1}"#)]);
    assert_eq!((summary.usage.input_tokens, summary.usage.output_tokens), (Some(7), Some(5)));
    assert!(!summary.terminated, "no message_stop came");
    let all = [&sse(&events)[..], b"event: message_stop\ndata: {\"type\":\"message_stop\"   }\n\n"].concat();
    assert!(response("/v1/messages", "text/event-stream", &all).1.terminated);
    let failed = sse(&[json!({"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}})]);
    assert!(response("/v1/messages", "text/event-stream", &failed).1.provider_error);
}

#[test]
fn openai_responses() {
    let texts = request(
        "/v1/responses",
        &json!({"model":"gpt","instructions":"Be brief.","input":[
            {"role":"user","content":[{"type":"input_text","text":"hi"}]},
            {"type":"reasoning","summary":[{"type":"summary_text","text":"hm"}],"encrypted_content":"gAAA"},
            {"type":"function_call","call_id":"c","name":"f","arguments":"{\"a\":1}"},
            {"type":"function_call_output","call_id":"c","output":"42"},
            {"content":"late role","role":"developer"}]})
        .to_string(),
    );
    let expected = [
        ("system", "Be brief."),
        ("system", "late role"),
        ("user", "hi"),
        ("reasoning", "hm"),
        ("tool_call", r#"{"a":1}f"#), // as the keys are sorted
        ("tool_result", "42"),
    ];
    assert_eq!(texts.len(), expected.len());
    for (role, text) in expected {
        assert!(texts.contains(&(role, text.to_owned())), "{role} {text}: {texts:?}");
    }
    let (texts, summary) = answer(
        "/v1/responses",
        json!({"model":"gpt-x","error":null,"output":[
            {"type":"reasoning","summary":[{"type":"summary_text","text":"so"}]},
            {"type":"message","role":"assistant","content":[{"type":"output_text","text":"Yes."}]},
            {"type":"function_call","name":"f","arguments":"{}"}],
            "usage":{"input_tokens":3,"output_tokens":4,"total_tokens":7,"output_tokens_details":{"reasoning_tokens":2}}}),
    );
    same(&texts, &[("assistant", "Yes."), ("reasoning", "so"), ("tool_call", "{}f")]);
    assert_eq!((summary.usage.total_tokens, summary.usage.reasoning_tokens), (Some(7), Some(2)));
    assert!(!summary.provider_error);
    let events = [
        json!({"type":"response.created","response":{"model":"gpt-x","output":[]}}),
        json!({"type":"response.output_text.delta","output_index":0,"delta":"Ye"}),
        json!({"type":"response.output_text.delta","output_index":0,"delta":"s."}),
        json!({"type":"response.output_text.done","output_index":0,"text":"Yes."}),
        json!({"type":"response.reasoning_summary_text.delta","output_index":1,"delta":"so"}),
        json!({"type":"response.function_call_arguments.delta","output_index":2,"delta":"{\"a"}),
        json!({"type":"response.function_call_arguments.delta","output_index":2,"delta":"\":1}"}),
        json!({"type":"response.output_item.done","item":{"type":"message","content":[{"type":"output_text","text":"Yes."}]}}),
        json!({"type":"response.completed","response":{"usage":{"input_tokens":1,"output_tokens":2}}}),
    ];
    let (texts, summary) = response("/v1/responses", "text/event-stream", &sse(&events));
    same(
        &texts,
        &[
            ("assistant", "Yes."),
            ("assistant", "Yes."),
            ("assistant", "Yes."),
            ("reasoning", "so"),
            ("tool_call", r#"{"a":1}"#),
        ],
    );
    assert_eq!((summary.terminated, summary.events, summary.usage.output_tokens), (true, 9, Some(2)));
}

#[test]
fn openai_completions_embeddings_and_threads() {
    same(
        &request("/v1/completions", r#"{"model":"m","prompt":["a","b"],"suffix":"c"}"#),
        &[("user", "a"), ("user", "b"), ("user", "c")],
    );
    let (texts, _) = answer("/v1/completions", json!({"choices":[{"index":0,"text":"hello"}]}));
    same(&texts, &[("assistant", "hello")]);
    let pieces = [
        json!({"choices":[{"text":"he","index":0}]}),
        json!({"choices":[{"text":"x","index":1},{"text":"llo","index":0}]}),
    ];
    let (texts, summary) = response("/v1/completions", "text/event-stream", &sse(&pieces));
    same(&texts, &[("assistant", "hello"), ("assistant", "x")]);
    assert!(!summary.terminated);
    same(&request("/v1/embeddings", r#"{"input":["a","b"],"model":"m"}"#), &[("user", "a"), ("user", "b")]);
    let vector = r#"{"data":[{"index":0,"embedding":[0.25, -1e-3,7],"object":"embedding"}],"usage":{"prompt_tokens":2}}"#;
    let (texts, summary) = response("/v1/embeddings", "application/json", vector.as_bytes());
    same(&texts, &[]);
    assert_eq!((summary.skipped_bytes, summary.usage.input_tokens), (13, Some(2)));
    same(&request("/v1/threads/t/messages", r#"{"role":"user","content":"q"}"#), &[("user", "q")]);
    let list =
        json!({"data":[{"role":"user","content":[{"type":"text","text":{"value":"q","annotations":[]}}]}]});
    // Keys are sorted: the role comes last, and the text waits for it.
    same(&answer("/v1/threads/t/messages", list).0, &[("user", "q")]);
}

#[test]
fn gemini() {
    let texts = request(
        "/v1beta/models/g:generateContent",
        r#"{"systemInstruction":{"parts":[{"text":"Be brief."}]},"contents":[
            {"parts":[{"text":"role comes late"}],"role":"user"},
            {"role":"model","parts":[{"text":"a thought","thought":true},{"functionCall":{"name":"f","args":{"a":1}}}]},
            {"role":"user","parts":[{"functionResponse":{"name":"f","response":{"r":2}}},
                {"inlineData":{"mimeType":"image/png","data":"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"}}]}]}"#,
    );
    same(
        &texts,
        &[
            ("system", "Be brief."),
            ("user", "role comes late"),
            ("reasoning", "a thought"),
            ("tool_call", r#"f{"a":1}"#),
            ("tool_result", r#"{"r":2}"#),
        ],
    );
    let piece = |text: &str, more: &str| {
        format!(
            r#"{{"candidates":[{{"content":{{"parts":[{{"text":"{text}"{more}}}],"role":"model"}},"index":0}}]}}"#
        )
    };
    let last = r#"{"candidates":[{"finishReason":"STOP"}],"usageMetadata":{"promptTokenCount":4,"candidatesTokenCount":2},"modelVersion":"g-1"}"#;
    let path = "/v1beta/models/g:streamGenerateContent";
    let events = [piece("hm", r#","thought":true"#), piece("He", ""), piece("llo", ""), last.to_owned()];
    let array = format!("[{}\n]", events.join("\n,\r\n"));
    let lines: String = events.iter().map(|event| format!("data: {event}\r\n\r\n")).collect();
    for (content_type, body) in [("application/json", array), ("text/event-stream", lines)] {
        let (texts, summary) = response(path, content_type, body.as_bytes());
        same(&texts, &[("assistant", "Hello"), ("reasoning", "hm")]);
        assert_eq!((summary.events, summary.terminated), (4, true));
        assert_eq!(summary.usage.output_tokens, Some(2));
        assert_eq!(summary.model.unwrap().as_str(), "g-1");
    }
    same(
        &request("/v1/models/e:batchEmbedContents", r#"{"requests":[{"content":{"parts":[{"text":"a"}]}}]}"#),
        &[("user", "a")],
    );
}

/// An AWS event-stream message, from the format's description.
fn frame(headers: &[(&str, &str)], payload: &[u8]) -> Vec<u8> {
    let mut head = Vec::new();
    for (name, value) in headers {
        head.push(name.len() as u8);
        head.extend_from_slice(name.as_bytes());
        head.push(7);
        head.extend_from_slice(&(value.len() as u16).to_be_bytes());
        head.extend_from_slice(value.as_bytes());
    }
    let total = 16 + head.len() + payload.len();
    let mut message = [&(total as u32).to_be_bytes()[..], &(head.len() as u32).to_be_bytes()].concat();
    message.extend_from_slice(&crc32(&message).to_be_bytes());
    message.extend_from_slice(&head);
    message.extend_from_slice(payload);
    message.extend_from_slice(&crc32(&message).to_be_bytes());
    message
}

/// Bit by bit (ISO-HDLC), to check the table-driven one.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 },
        )
    })
}

#[test]
fn bedrock_converse() {
    let path = "/model/us.anthropic.claude-v1%3A0/converse";
    let texts = request(
        path,
        r#"{"system":[{"text":"s"}],"messages":[{"role":"user","content":[{"text":"q"},{"document":{"name":"d","source":{"text":"doc"}}}]},
            {"role":"assistant","content":[{"reasoningContent":{"reasoningText":{"text":"hm","signature":"s"}}},{"toolUse":{"name":"f","input":{"a":1}}}]},
            {"role":"user","content":[{"toolResult":{"toolUseId":"t","content":[{"json":{"r":1}},{"text":"ok"}]}}]}]}"#,
    );
    same(
        &texts,
        &[
            ("system", "s"),
            ("user", "q"),
            ("user", "doc"),
            ("reasoning", "hm"),
            ("tool_call", r#"f{"a":1}"#),
            ("tool_result", r#"{"r":1}"#),
            ("tool_result", "ok"),
        ],
    );
    let event = |name: &str, payload: serde_json::Value| {
        frame(
            &[(":event-type", name), (":content-type", "application/json"), (":message-type", "event")],
            payload.to_string().as_bytes(),
        )
    };
    let body = [
        event("messageStart", json!({"p":"abc","role":"assistant"})),
        event("contentBlockDelta", json!({"contentBlockIndex":0,"delta":{"text":"Hel"},"p":"abcd"})),
        event("contentBlockDelta", json!({"contentBlockIndex":0,"delta":{"text":"lo"},"p":"a"})),
        event("contentBlockStart", json!({"contentBlockIndex":1,"start":{"toolUse":{"name":"f"}}})),
        event("contentBlockDelta", json!({"contentBlockIndex":1,"delta":{"toolUse":{"input":"{}"}}})),
        event("messageStop", json!({"stopReason":"tool_use"})),
        event("metadata", json!({"usage":{"inputTokens":3,"outputTokens":5,"totalTokens":8}})),
    ]
    .concat();
    let path = "/model/m/converse-stream";
    let kind = "application/vnd.amazon.eventstream";
    let (texts, summary) = response(path, kind, &body);
    same(&texts, &[("assistant", "Hello"), ("tool_call", "f{}")]);
    assert_eq!((summary.events, summary.terminated, summary.usage.total_tokens), (7, true, Some(8)));
    assert_eq!(summary.finish_reason.unwrap().as_str(), "tool_use");
    let style = ApiStyle::of_path(path.as_bytes());
    let make = || BodyParser::for_response(style, Some(kind.as_bytes())).unwrap();
    // A damaged byte is found, wherever it is; what was read is still seen.
    for at in [0, 5, 9, 14, 40, body.len() - 1] {
        let mut damaged = body.clone();
        damaged[at] ^= 1;
        let (_, (_, result, ..)) = check(make, &damaged);
        assert!(matches!(result, Err(ContentError::Frame { .. })), "byte {at}: {result:?}");
    }
    let (texts, (_, result, ..)) = check(make, &body[..body.len() - 20]);
    assert_eq!(result, Err(ContentError::Truncated));
    same(&texts, &[("assistant", "Hello"), ("tool_call", "f{}")]);
    let exception =
        frame(&[(":message-type", "exception"), (":exception-type", "throttlingException")], b"{}");
    assert!(response(path, kind, &exception).1.provider_error);
}

#[test]
fn bedrock_invoke() {
    use base64::Engine as _;
    let chunk = |document: serde_json::Value| {
        let bytes = base64::engine::general_purpose::STANDARD.encode(document.to_string());
        frame(
            &[(":event-type", "chunk"), (":message-type", "event")],
            json!({"bytes": bytes, "p": "abcdefgh"}).to_string().as_bytes(),
        )
    };
    let body = [
        chunk(json!({"type":"message_start","message":{"model":"claude","usage":{"input_tokens":2}}})),
        chunk(json!({"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hé"}})),
        chunk(json!({"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"llo \"you\""}})),
        chunk(json!({"type":"message_stop","amazon-bedrock-invocationMetrics":{"inputTokenCount":2,"outputTokenCount":6}})),
    ]
    .concat();
    let path = "/model/anthropic.claude/invoke-with-response-stream";
    let (texts, summary) = response(path, "application/vnd.amazon.eventstream", &body);
    same(&texts, &[("assistant", "Héllo \"you\"")]);
    assert_eq!((summary.terminated, summary.usage.output_tokens), (true, Some(6)));
    for (asked, expected) in [
        (r#"{"inputText":"q"}"#, "q"),
        (r#"{"prompt":"q","max_gen_len":5}"#, "q"),
        (r#"{"anthropic_version":"x","messages":[{"role":"user","content":"q"}]}"#, "q"),
    ] {
        same(&request("/model/m/invoke", asked), &[("user", expected)]);
    }
    for answered in [
        json!({"results":[{"outputText":"a","completionReason":"FINISH"}]}),
        json!({"generation":"a","prompt_token_count":3}),
        json!({"outputs":[{"text":"a"}]}),
        json!({"completions":[{"data":{"text":"a"}}]}),
        json!({"completion":"a"}),
        json!({"output":{"message":{"role":"assistant","content":[{"text":"a"}]}}}),
        json!({"choices":[{"message":{"content":"a"}}]}),
    ] {
        same(&answer("/model/m/invoke", answered).0, &[("assistant", "a")]);
    }
}

#[test]
fn cohere() {
    let texts = request(
        "/v1/chat",
        r#"{"message":"q","preamble":"p","chat_history":[{"role":"CHATBOT","message":"a"},{"role":"USER","message":"b"}],
            "documents":[{"title":"t","snippet":"s"}]}"#,
    );
    same(
        &texts,
        &[
            ("system", "p"),
            ("user", "q"),
            ("user", "b"),
            ("assistant", "a"),
            ("tool_result", r#"[{"title":"t","snippet":"s"}]"#),
        ],
    );
    let lines = "{\"event_type\":\"stream-start\"}\n{\"event_type\":\"text-generation\",\"text\":\"He\"}\n\
        {\"event_type\":\"text-generation\",\"text\":\"y\"}\n\
        {\"event_type\":\"stream-end\",\"finish_reason\":\"COMPLETE\",\"response\":{\"text\":\"Hey\",\"meta\":{\"tokens\":{\"input_tokens\":1,\"output_tokens\":2}}}}\n";
    let (texts, summary) = response("/v1/chat", "application/stream+json", lines.as_bytes());
    same(&texts, &[("assistant", "Hey"), ("assistant", "Hey")]);
    assert_eq!((summary.terminated, summary.events, summary.usage.output_tokens), (true, 4, Some(2)));
    let events = [
        json!({"type":"content-delta","index":0,"delta":{"message":{"content":{"text":"He"}}}}),
        json!({"type":"tool-plan-delta","delta":{"message":{"tool_plan":"I will"}}}),
        json!({"type":"tool-call-start","index":0,"delta":{"message":{"tool_calls":{"function":{"name":"f","arguments":""}}}}}),
        json!({"type":"tool-call-delta","index":0,"delta":{"message":{"tool_calls":{"function":{"arguments":"{}"}}}}}),
        json!({"type":"content-delta","index":0,"delta":{"message":{"content":{"text":"y"}}}}),
        json!({"type":"message-end","delta":{"finish_reason":"COMPLETE","usage":{"tokens":{"input_tokens":9,"output_tokens":3}}}}),
    ];
    let (texts, summary) = response("/v2/chat", "text/event-stream", &sse(&events));
    same(&texts, &[("assistant", "Hey"), ("reasoning", "I will"), ("tool_call", "f{}")]);
    assert_eq!((summary.terminated, summary.usage.input_tokens), (true, Some(9)));
}

#[test]
fn ollama() {
    let texts = request(
        "/api/chat",
        r#"{"model":"g","messages":[{"role":"user","content":"q","images":["iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"]}]}"#,
    );
    same(&texts, &[("user", "q")]);
    let lines = "{\"message\":{\"role\":\"assistant\",\"content\":\"He\"},\"done\":false}\n\
        {\"message\":{\"role\":\"assistant\",\"thinking\":\"hm\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":{\"a\":1}}}]},\"done\":false}\n\
        {\"message\":{\"content\":\"y\"},\"done\":true,\"done_reason\":\"stop\",\"prompt_eval_count\":4,\"eval_count\":2}\n";
    for content_type in ["application/x-ndjson", "application/json"] {
        let (texts, summary) = response("/api/chat", content_type, lines.as_bytes());
        same(&texts, &[("assistant", "Hey"), ("reasoning", "hm"), ("tool_call", r#"f{"a":1}"#)]);
        assert_eq!((summary.terminated, summary.events, summary.usage.input_tokens), (true, 3, Some(4)));
    }
    let (texts, _) = answer("/api/generate", json!({"response":"a","context":[1,2,3],"done":true}));
    same(&texts, &[("assistant", "a")]);
}

#[test]
fn json_rpc() {
    let call =
        r#"{"method":"tools/call","params":{"name":"f","arguments":{"q":"x"}},"jsonrpc":"2.0","id":1}"#;
    // By path, and by the body where the path says nothing.
    for path in ["/mcp", "/tools"] {
        same(&request(path, call), &[("tool_call", r#"f{"q":"x"}"#)]);
    }
    let batch = format!("[{call},{call}]");
    same(&request("/mcp", &batch), &[("tool_call", r#"f{"q":"x"}"#); 2]);
    let result = json!({"jsonrpc":"2.0","id":1,"result":{"content":[{"type":"text","text":"r"},
        {"type":"resource","resource":{"uri":"u","text":"t"}}],"structuredContent":{"a":1}}});
    let expected = [("tool_result", "r"), ("tool_result", "t"), ("tool_result", r#"{"a":1}"#)];
    same(&answer("/mcp", result.clone()).0, &expected);
    // In a stream the parts are joined.
    let (texts, _) = response("/mcp", "text/event-stream", &sse(&[result]));
    same(&texts, &[("tool_result", r#"{"a":1}"#), ("tool_result", "rt")]);
    let send = r#"{"jsonrpc":"2.0","method":"message/send","params":{"message":{"kind":"message","parts":[{"kind":"text","text":"q"},{"kind":"data","data":{"d":1}}],"role":"user"}}}"#;
    // The text waits for its role.
    same(&request("/agents/7", send), &[("user", r#"{"d":1}"#), ("user", "q")]);
    let events = [
        json!({"jsonrpc":"2.0","result":{"kind":"status-update","status":{"message":{"role":"agent","parts":[{"kind":"text","text":"a"}]}}}}),
        json!({"jsonrpc":"2.0","result":{"kind":"artifact-update","artifact":{"parts":[{"kind":"text","text":"b"}]}}}),
        json!({"jsonrpc":"2.0","result":{"kind":"artifact-update","artifact":{"parts":[{"kind":"text","text":"c"}]}}}),
    ];
    let (texts, _) = response("/a2a", "text/event-stream", &sse(&events));
    same(&texts, &[("assistant", "a"), ("assistant", "bc")]);
    let error = json!({"jsonrpc":"2.0","id":1,"error":{"code":-32600,"message":"no"}});
    assert!(answer("/mcp", error).1.provider_error);
}

#[test]
fn graphql() {
    let body = r#"{"operationName":"O","query":"query O($a: Int) { a(x: $a) }","variables":{"a":"x"}}"#;
    for path in ["/graphql", "/gateway"] {
        same(&request(path, body), &[("user", r#"{"a":"x"}"#), ("body", "query O($a: Int) { a(x: $a) }")]);
    }
    let (texts, _) = answer("/graphql", json!({"data":{"a":1}}));
    same(&texts, &[("body", r#"{"data":{"a":1}}"#)]);
}

#[test]
fn forms_are_decoded() {
    let make = || BodyParser::for_request(b"/login", Some(b"application/x-www-form-urlencoded")).unwrap();
    for (body, expected) in [
        ("user=a%40b.c&note=x+y%2bz%26w", "user=a@b.c&note=x y%2bz%26w"),
        ("q=%27%20OR%201%3D1", "q=' OR 1%3D1"),
        ("a=%zz%4&b=%", "a=%zz%4&b=%"),
        ("%%41%2", "%A%2"),
    ] {
        let (texts, (told, result, ..)) = check(make, body.as_bytes());
        same(&texts, &[("body", expected)]);
        assert!(result.is_ok());
        // A decoded character stands where its escape begins.
        let (text, offsets) = &told.units[&Unit { role: Role::Body, index: 0 }];
        for (byte, offset) in text.iter().zip(offsets) {
            let source = body.as_bytes()[*offset as usize];
            assert!(source == *byte || matches!(source, b'%' | b'+'), "{body}");
        }
    }
}

#[test]
fn multipart_forms() {
    let body = "ignored\r\n--B x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nfield\r\n--B no delimiter\r\n\
        --B x\r\nContent-Disposition: form-data; name=\"f\"; filename=\"n.txt\"\r\nContent-Type: text/plain\r\n\r\nfile\r\n\
        --B x\r\ncontent-disposition: form-data; name=\"g\"; filename=\"p.png\"\r\ncontent-type: image/png\r\n\r\n\
        0123456789012345678901234567890123456789012345678901234567890123\r\n\
        --B x\r\n\r\n\r\n--B x--\r\nepilogue";
    let make = || {
        BodyParser::for_request(b"/upload", Some(b"multipart/form-data; charset=x; boundary=\"B x\""))
            .unwrap()
    };
    let (texts, (told, result, summary, style)) = check(make, body.as_bytes());
    assert_eq!((result, style), (Ok(summary), ApiStyle::Multipart));
    same(&texts, &[("field", "field\r\n--B no delimiter"), ("file", "file")]);
    assert_eq!(summary.media, 1);
    // Every byte is given once or counted.
    let given: usize = told.units.values().map(|(text, _)| text.len()).sum();
    assert_eq!(given as u64 + summary.skipped_bytes, body.len() as u64);
    for (text, offsets) in told.units.values() {
        for (byte, offset) in text.iter().zip(offsets) {
            assert_eq!(body.as_bytes()[*offset as usize], *byte);
        }
    }
    let (texts, (_, result, ..)) = check(make, b"--B x\r\n\r\ncut of");
    same(&texts, &[("field", "cut of")]);
    assert_eq!(result, Err(ContentError::Truncated));
    assert_eq!(check(make, b"no delimiter").1.1, Err(ContentError::Truncated));
}

/// Among numbers that are counted, only numbers are.
#[test]
fn nothing_hides_among_numbers() {
    let body = r#"{"embeddings":{"float":[[1,-2e3],[4]],"key":["a text"],"last":{"of":5}},"embedding":[1,"b",{"c":[2,"d"],"e":6}]}"#;
    let style = ApiStyle::of_path(b"/v1/embeddings");
    let make = || BodyParser::for_response(style, Some(b"application/json")).unwrap();
    let (_, (told, result, summary, _)) = check(make, body.as_bytes());
    assert!(result.is_ok());
    let envelope = String::from_utf8(told.units[&Unit { role: Role::Envelope, index: 0 }].0.clone()).unwrap();
    assert_eq!(
        envelope,
        r#"{"embeddings":{"float":[[][]],"key":["a text"],"last":{"of":5}},"embedding":["b",{"c":["d"],"e":6}]}"#
    );
    assert_eq!(summary.skipped_bytes + envelope.len() as u64, body.len() as u64);
}

/// Random padding in blanks does not make an event a new one.
#[test]
fn blanks_between_values_make_no_new_shape() {
    let body = "data: {\"type\":\"ping\"}\n\ndata: {\"type\":\"ping\"   }\n\ndata: {\"type\": \"ping\"}\n\n";
    let style = Some(ApiStyle::AnthropicMessages);
    let make = || BodyParser::for_response(style, Some(b"text/event-stream")).unwrap();
    let (_, (told, ..)) = check(make, body.as_bytes());
    assert_eq!(told.units[&Unit { role: Role::Envelope, index: 0 }].0, b"{\"type\":\"ping\"}");
}

#[test]
fn a_body_whose_path_says_nothing_is_found_out() {
    let make = || BodyParser::for_request(b"/custom", Some(b"application/json")).unwrap();
    let body = br#"{"model":"m","messages":[{"role":"system","content":"s"},{"role":"user","content":"q"}]}"#;
    let (texts, (.., style)) = check(make, body);
    same(&texts, &[("system", "s"), ("user", "q")]);
    assert_eq!(style, ApiStyle::OpenAiChat);
    let make = || BodyParser::for_response(None, Some(b"text/event-stream")).unwrap();
    let events = b": hello\n\nevent: message\ndata: {\"jsonrpc\":\"2.0\",\"result\":{\"content\":[{\"text\":\"r\"}]}}\n\n";
    let (texts, (.., style)) = check(make, events);
    same(&texts, &[("tool_result", "r")]);
    assert_eq!(style, ApiStyle::JsonRpc);
    let (texts, (.., style)) = check(make, b"data: {\"tick\":1}\n\ndata: {\"jsonrpc\":1}\n\n");
    same(&texts, &[("body", "{\"tick\":1}\n{\"jsonrpc\":1}\n")]);
    assert_eq!(style, ApiStyle::Sse);
    let make = || BodyParser::for_request(b"/custom", Some(b"application/json")).unwrap();
    // Too late: the body is one unit.
    let late = format!(r#"{{"filler":"{}","messages":[{{"content":"q"}}]}}"#, "x".repeat(5000));
    let (texts, (.., style)) = check(make, late.as_bytes());
    assert_eq!((texts.len(), texts[0].0, style), (1, "body", ApiStyle::Json));
}

/// Every recorded exchange, when the machine has them: the right style, no error, every size of piece alike.
#[test]
fn recorded_exchanges_read_the_same_in_pieces() {
    use base64::Engine as _;
    use std::io::Read as _;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/llm_exchanges.jsonl.gz");
    let Ok(file) = std::fs::File::open(path) else {
        eprintln!("skipped: no recorded exchanges beside the project");
        return;
    };
    let mut lines = String::new();
    flate2::read::GzDecoder::new(file).read_to_string(&mut lines).unwrap();
    let (mut messages, mut unread) = (0, Vec::new());
    for line in lines.lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let part = |raw: &serde_json::Value| {
            let (head, body) = raw.as_str().unwrap().split_once("\r\n\r\n").unwrap();
            let named = |line: &&str| line.to_ascii_lowercase().starts_with("content-type:");
            let kind = head.lines().find(named).map(|line| line["content-type:".len()..].trim().to_owned());
            // Some rows hold the body in base64: the recorder's doing.
            let letters: String = body.chars().filter(|c| !c.is_whitespace()).collect();
            let decoded = base64::engine::general_purpose::STANDARD.decode(&letters);
            (head.to_owned(), kind, decoded.unwrap_or_else(|_| body.as_bytes().to_vec()))
        };
        let (head, kind, asked) = part(&row["text"]);
        let target = head.split(' ').nth(1).unwrap().as_bytes().to_vec();
        let style = ApiStyle::of_path(&target);
        let expected = match row["extra"]["api_style"].as_str().unwrap() {
            "anthropic" => "anthropic",
            "openai_chat" => "openai.chat",
            "openai_responses" => "openai.responses",
            "completions" => "openai.completions",
            // Of many makers.
            "embeddings" => "",
            other => other,
        };
        let named = style.map_or("json", ApiStyle::as_str);
        assert!(
            named.starts_with(expected) || named == "openai.threads" || named == "json",
            "{named}: {}",
            row["id"]
        );
        let (_, answer_kind, answered) = part(&row["extra"]["response"]);
        let make_request = || BodyParser::for_request(&target, kind.as_deref().map(str::as_bytes)).unwrap();
        let make_response =
            || BodyParser::for_response(style, answer_kind.as_deref().map(str::as_bytes)).unwrap();
        for (make, body) in [(&make_request as &dyn Fn() -> BodyParser, &asked), (&make_response, &answered)]
        {
            let whole = read(make(), body, usize::MAX);
            let large = body.len() > 20_000;
            for step in [1, 2, 3, 5, 7, 11, 16, 31, 64, 1000].into_iter().skip(if large { 8 } else { 0 }) {
                assert!(read(make(), body, step) == whole, "{} in pieces of {step}", row["id"]);
            }
            messages += 1;
            if whole.1.is_err() {
                unread.push(row["id"].to_string());
            }
        }
    }
    eprintln!("{messages} bodies, of which no JSON: {unread:?}");
    assert!(messages == 2 * 1826 && unread.len() <= 2);
}
