//! Nanoseconds per byte of the body parsers alone: the least of many runs, whole and in pieces of 1,400 bytes.
//!
//! `cargo run --release -p driftlock-inspect --example parse_speed`. A budget of 50 us for 4 KiB, scoring
//! included, leaves the parser a few nanoseconds a byte.

use driftlock_inspect::content::{ApiStyle, BodyParser, Sink, Unit};
use std::hint::black_box;
use std::time::Instant;

struct Count(u64);

impl Sink for Count {
    fn text(&mut self, _: Unit, text: &[u8], _: u64) {
        self.0 += text.len() as u64;
    }
    fn end(&mut self, _: Unit) {}
    fn skipped(&mut self, _: Unit, _: u64) {}
}

const WORDS: &str =
    "The order of the twelfth has left the warehouse, and \\\"tomorrow\\\" it is with you.\\n";

fn chat_request() -> String {
    let message =
        |role: &str, times: usize| format!(r#"{{"role":"{role}","content":"{}"}}"#, WORDS.repeat(times));
    let messages = [message("system", 8), message("user", 6), message("assistant", 10), message("user", 20)];
    format!(r#"{{"model":"gpt-x","temperature":0.2,"stream":true,"messages":[{}]}}"#, messages.join(","))
}

fn messages_request() -> String {
    let block = |times: usize| format!(r#"{{"type":"text","text":"{}"}}"#, WORDS.repeat(times));
    let call = r#"{"type":"tool_use","id":"t","name":"find","input":{"query":"order 12","limit":[1,2,3],"deep":{"a":"b"}}}"#;
    format!(
        r#"{{"model":"claude","max_tokens":1024,"system":[{}],"messages":[{{"role":"user","content":[{},{}]}},{{"role":"assistant","content":[{call},{call}]}}]}}"#,
        block(8),
        block(20),
        block(10)
    )
}

fn chat_stream() -> String {
    let pieces: String = (0..24)
        .map(|i| {
            format!(
                "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"gpt-x\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" word{i}\"}},\"finish_reason\":null}}]}}\n\n"
            )
        })
        .collect();
    pieces + "data: [DONE]\n\n"
}

fn embeddings() -> String {
    let numbers: Vec<String> = (0..200).map(|i| format!("-0.0{}", 18_408_726_900_815u64 + i)).collect();
    format!(r#"{{"data":[{{"index":0,"embedding":[{}]}}]}}"#, numbers.join(","))
}

fn order() -> String {
    let lines: Vec<String> = (0..60)
        .map(|i| {
            format!(r#"{{"sku":"AB-{i}","quantity":{i},"price":{{"amount":"12.50","currency":"EUR"}}}}"#)
        })
        .collect();
    format!(r#"{{"customer":"c-77","lines":[{}]}}"#, lines.join(","))
}

fn main() {
    let json: Option<&[u8]> = Some(b"application/json");
    let sse: Option<&[u8]> = Some(b"text/event-stream");
    let chat = ApiStyle::of_path(b"/v1/chat/completions");
    let embeddings_style = ApiStyle::of_path(b"/v1/embeddings");
    let form =
        "name=Jos%C3%A9+Garc%C3%ADa&street=Calle+Mayor+5&note=".to_owned() + &"plain+words+".repeat(300);
    type Make = Box<dyn Fn() -> BodyParser>;
    let cases: [(&str, String, Make); 7] = [
        (
            "chat request",
            chat_request(),
            Box::new(move || BodyParser::for_request(b"/v1/chat/completions", json).expect("json")),
        ),
        (
            "anthropic request",
            messages_request(),
            Box::new(move || BodyParser::for_request(b"/v1/messages", json).expect("json")),
        ),
        (
            "chat stream",
            chat_stream(),
            Box::new(move || BodyParser::for_response(chat, sse).expect("events")),
        ),
        (
            "embeddings answer",
            embeddings(),
            Box::new(move || BodyParser::for_response(embeddings_style, json).expect("json")),
        ),
        ("other JSON", order(), Box::new(move || BodyParser::for_request(b"/orders", json).expect("json"))),
        (
            "form",
            form,
            Box::new(|| {
                BodyParser::for_request(b"/orders", Some(b"application/x-www-form-urlencoded"))
                    .expect("a form")
            }),
        ),
        (
            "text",
            WORDS.repeat(48),
            Box::new(|| BodyParser::for_request(b"/notes", Some(b"text/plain")).expect("text")),
        ),
    ];
    println!("{:<20} {:>6} {:>10} {:>10} {:>12}", "body", "bytes", "ns/byte", "in pieces", "us for 4 KiB");
    for (name, body, make) in &cases {
        let least = |step: usize| {
            (0..3000)
                .map(|_| {
                    let start = Instant::now();
                    let (mut parser, mut count) = (make(), Count(0));
                    for chunk in black_box(body.as_bytes()).chunks(step) {
                        parser.push(chunk, &mut count);
                    }
                    let _ = black_box(parser.finish(&mut count));
                    black_box(count.0);
                    start.elapsed()
                })
                .min()
                .map_or(0.0, |least| least.as_nanos() as f64 / body.len() as f64)
        };
        let (whole, pieces) = (least(usize::MAX), least(1400));
        println!("{name:<20} {:>6} {whole:>10.2} {pieces:>10.2} {:>12.1}", body.len(), whole * 4.096);
    }
}
