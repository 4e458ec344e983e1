//! Bodies to units: every split gives the same, a naive reader over a whole parse gives the same, and offsets
//! lead back to the source.
#![allow(missing_docs)]

use driftlock_inspect::content::{ApiStyle, BodyParser, ContentError, Role, Sink, Summary, Unit};
use proptest::prelude::*;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};

// ---------------------------------------------------------------------------------------------- recording

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Recorded {
    text: Vec<u8>,
    offsets: Vec<u64>,
    ends: usize,
    skipped: u64,
}

/// Keeps all that a parser tells, and checks each call against the body when it has it.
#[derive(Default)]
struct Recorder<'a> {
    units: BTreeMap<Unit, Recorded>,
    body: Option<&'a [u8]>,
}

impl Sink for Recorder<'_> {
    fn text(&mut self, unit: Unit, text: &[u8], body_offset: u64) {
        assert!(!text.is_empty(), "an empty text for {unit:?}");
        let record = self.units.entry(unit).or_default();
        assert_eq!(record.ends, 0, "text after the end of {unit:?}");
        record.text.extend_from_slice(text);
        record.offsets.extend((0..text.len() as u64).map(|k| body_offset + k));
        if let Some(body) = self.body {
            let source = &body[body_offset as usize..];
            // A line end of a stream is given as a newline whichever it was.
            let same = |(a, b): (&u8, &u8)| a == b || (*a == b'\n' && *b == b'\r');
            let verbatim = text.len() <= source.len() && text.iter().zip(source).all(same);
            assert!(verbatim || stands_for(source, text), "{unit:?} {text:?} at {body_offset}");
        }
    }

    fn end(&mut self, unit: Unit) {
        self.units.entry(unit).or_default().ends += 1;
    }

    fn skipped(&mut self, unit: Unit, bytes: u64) {
        self.units.entry(unit).or_default().skipped += bytes;
    }
}

/// `source` begins with an escape that means `text`.
fn stands_for(source: &[u8], text: &[u8]) -> bool {
    if text == b"\n" && source.is_empty() {
        return true; // closes the last event of a stream that forgets its line end
    }
    [2, 6, 12].iter().filter_map(|&len| source.get(..len)).any(|escape| {
        let quoted = [b"\"", escape, b"\""].concat();
        let lone = text == "\u{fffd}".as_bytes() && escape.starts_with(b"\\u");
        lone || serde_json::from_slice::<String>(&quoted).is_ok_and(|s| s.as_bytes() == text)
    })
}

type Units = BTreeMap<Unit, Recorded>;
type Outcome = (Units, Result<Summary, ContentError>, Summary);

fn read(mut parser: BodyParser, body: &[u8], mut cut: impl FnMut() -> usize) -> Outcome {
    let mut recorder = Recorder { body: Some(body), ..Recorder::default() };
    let mut rest = body;
    while !rest.is_empty() {
        let (chunk, after) = rest.split_at(cut().clamp(1, rest.len()));
        parser.push(chunk, &mut recorder);
        rest = after;
    }
    let result = parser.finish(&mut recorder);
    for (unit, record) in &recorder.units {
        assert_eq!(record.ends, usize::from(!record.text.is_empty()), "{unit:?}");
    }
    (recorder.units, result, parser.summary())
}

fn whole(parser: BodyParser, body: &[u8]) -> Outcome {
    read(parser, body, || usize::MAX)
}

fn request() -> BodyParser {
    BodyParser::for_request(b"/v1/chat/completions?x=1", Some(b"application/json")).unwrap()
}

fn response() -> BodyParser {
    BodyParser::for_response(Some(ApiStyle::OpenAiChat), Some(b"application/json")).unwrap()
}

fn stream() -> BodyParser {
    BodyParser::for_response(Some(ApiStyle::OpenAiChat), Some(b"text/event-stream; charset=utf-8")).unwrap()
}

/// Texts of a role, in order.
fn texts(units: &Units, role: Role) -> Vec<String> {
    units
        .iter()
        .filter(|(unit, record)| unit.role == role && !record.text.is_empty())
        .map(|(_, record)| String::from_utf8_lossy(&record.text).into_owned())
        .collect()
}

fn envelope(units: &Units) -> String {
    texts(units, Role::Envelope).concat()
}

// ------------------------------------------------------------------------------------------- naive oracle

/// JSON that keeps the order of keys.
#[derive(Debug, Clone, PartialEq)]
enum Json {
    Object(Vec<(String, Json)>),
    Array(Vec<Json>),
    String(String),
    Other(String),
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Build;
        impl<'de> Visitor<'de> for Build {
            type Value = Json;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("JSON")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Json::Object(pairs))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = seq.next_element()? {
                    elements.push(element);
                }
                Ok(Json::Array(elements))
            }
            fn visit_str<E>(self, text: &str) -> Result<Json, E> {
                Ok(Json::String(text.to_owned()))
            }
            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Other("null".into()))
            }
            fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
                Ok(Json::Other(value.to_string()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
                Ok(Json::Other(value.to_string()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
                Ok(Json::Other(value.to_string()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
                Ok(Json::Other(value.to_string()))
            }
        }
        deserializer.deserialize_any(Build)
    }
}

impl Json {
    fn at(&self, key: &str) -> Option<&Json> {
        match self {
            Self::Object(pairs) => pairs.iter().find(|(k, _)| k == key).map(|(_, value)| value),
            _ => None,
        }
    }

    fn elements(&self) -> &[Json] {
        match self {
            Self::Array(elements) => elements,
            _ => &[],
        }
    }

    fn pairs(&mut self) -> &mut [(String, Json)] {
        match self {
            Self::Object(pairs) => pairs,
            _ => &mut [],
        }
    }

    fn number(&self) -> Option<u64> {
        match self {
            Self::Other(text) => text.parse().ok(),
            _ => None,
        }
    }
}

/// Takes the scored strings out of a message (leaving empty ones) and gives each with its kind and call.
fn take_message(message: &mut Json, give: &mut impl FnMut(&'static str, usize, String)) {
    fn take(
        value: &mut Json,
        kind: &'static str,
        call: usize,
        give: &mut impl FnMut(&'static str, usize, String),
    ) {
        if let Json::String(text) = value {
            give(kind, call, std::mem::take(text));
        }
    }
    fn take_content(
        value: &mut Json,
        kind: &'static str,
        give: &mut impl FnMut(&'static str, usize, String),
    ) {
        match value {
            Json::String(_) => take(value, kind, 0, give),
            Json::Array(elements) => {
                elements.iter_mut().for_each(|element| take_content(element, kind, give));
            }
            Json::Object(pairs) => {
                for (key, value) in pairs {
                    match key.as_str() {
                        "text" | "refusal" => take_content(value, kind, give),
                        "thinking" => take_content(value, "reasoning", give),
                        "content" => take_content(value, "result", give),
                        _ => {}
                    }
                }
            }
            Json::Other(_) => {}
        }
    }
    for (key, value) in message.pairs() {
        match key.as_str() {
            "content" => take_content(value, "content", give),
            "refusal" => take(value, "refusal", 0, give),
            "reasoning" => take(value, "reasoning", 0, give),
            "reasoning_content" => take(value, "reasoning_content", 0, give),
            "reasoning_details" => {
                if let Json::Array(details) = value {
                    for (key, value) in details.iter_mut().flat_map(Json::pairs) {
                        if ["text", "summary"].contains(&key.as_str()) {
                            take(value, "detail", 0, give);
                        }
                    }
                }
            }
            "audio" => {
                for (key, value) in value.pairs() {
                    match key.as_str() {
                        "transcript" => take(value, "transcript", 0, give),
                        "text" | "content" => take_content(value, "content", give),
                        _ => {}
                    }
                }
            }
            "tool_calls" => {
                if let Json::Array(calls) = value {
                    for (position, call) in calls.iter_mut().enumerate() {
                        for (key, function) in call.pairs() {
                            if key == "function" || key == "custom" {
                                for (key, value) in function.pairs() {
                                    if ["name", "arguments", "input"].contains(&key.as_str()) {
                                        take(value, "call", position, give);
                                    }
                                }
                            }
                        }
                    }
                }
            }
            "function_call" => {
                for (key, value) in value.pairs() {
                    if ["name", "arguments"].contains(&key.as_str()) {
                        take(value, "legacy_call", 0, give);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Of what is not the message's own.
fn role_of_kind(kind: &str) -> Role {
    match kind {
        "call" | "legacy_call" => Role::ToolCall,
        "result" => Role::ToolResult,
        "reasoning" | "reasoning_content" | "detail" => Role::Reasoning,
        _ => Role::Assistant,
    }
}

fn role_named(message: &Json) -> Role {
    match message.at("role") {
        Some(Json::String(name)) => match name.as_str() {
            "system" | "developer" => Role::System,
            "assistant" | "model" => Role::Assistant,
            "tool" | "function" => Role::ToolResult,
            _ => Role::User,
        },
        _ => Role::User,
    }
}

/// (role, text) of each unit in a request or a whole answer, sorted; and the document without them.
fn naive_units(body: &[u8], list: &str, inner: Option<&str>) -> (Vec<(Role, String)>, Json) {
    let mut document: Json = serde_json::from_slice(body).unwrap();
    let mut units = Vec::new();
    for (key, value) in document.pairs() {
        let Json::Array(elements) = value else { continue };
        if key != list {
            continue;
        }
        for element in elements {
            let mut one = |message: &mut Json, fixed: Option<Role>| {
                let role = fixed.unwrap_or_else(|| role_named(message));
                let mut calls: BTreeMap<(&str, usize), String> = BTreeMap::new();
                take_message(message, &mut |kind, call, text| match kind {
                    "call" | "legacy_call" => calls.entry((kind, call)).or_default().push_str(&text),
                    "content" => units.push((role, text)),
                    _ => units.push((role_of_kind(kind), text)),
                });
                units.extend(calls.into_values().map(|text| (Role::ToolCall, text)));
            };
            match inner {
                None => one(element, None),
                Some(inner) => {
                    for (key, message) in element.pairs() {
                        if key == inner {
                            one(message, Some(Role::Assistant));
                        }
                    }
                }
            }
        }
    }
    units.retain(|(_, text)| !text.is_empty());
    units.sort();
    (units, document)
}

/// The same for the events of a stream: pieces joined per choice, kind and call.
fn naive_stream(events: &[Vec<u8>]) -> Vec<(Role, String)> {
    let mut joined: BTreeMap<(u64, &str, u64), String> = BTreeMap::new();
    for event in events {
        let mut document: Json = serde_json::from_slice(event).unwrap();
        for (key, value) in document.pairs() {
            let Json::Array(choices) = value else { continue };
            if key != "choices" {
                continue;
            }
            for (position, choice) in choices.iter_mut().enumerate() {
                let index = choice.at("index").and_then(Json::number).unwrap_or(position as u64);
                for (key, delta) in choice.pairs() {
                    if key != "delta" {
                        continue;
                    }
                    let calls: Vec<u64> =
                        (delta.at("tool_calls").map(Json::elements).unwrap_or_default().iter())
                            .enumerate()
                            .map(|(p, call)| call.at("index").and_then(Json::number).unwrap_or(p as u64))
                            .collect();
                    take_message(delta, &mut |kind, call, text| {
                        let call = if kind == "call" { calls[call] } else { 0 };
                        joined.entry((index, kind, call)).or_default().push_str(&text);
                    });
                }
            }
        }
    }
    let mut units: Vec<_> = joined
        .into_iter()
        .filter(|(_, text)| !text.is_empty())
        .map(|((_, kind, _), text)| (role_of_kind(kind), text))
        .collect();
    units.sort();
    units
}

fn given_units(units: &Units) -> Vec<(Role, String)> {
    let mut given: Vec<_> = units
        .iter()
        .filter(|(unit, record)| unit.role != Role::Envelope && !record.text.is_empty())
        .map(|(unit, record)| (unit.role, String::from_utf8(record.text.clone()).unwrap()))
        .collect();
    given.sort();
    given
}

/// Ordinals count from 0 without a gap.
fn assert_ordinals(units: &Units) {
    let mut next: BTreeMap<Role, u16> = BTreeMap::new();
    for unit in units.keys() {
        let expected = next.entry(unit.role).or_default();
        assert_eq!(unit.index, *expected);
        *expected += 1;
    }
}

// ---------------------------------------------------------------------------------------------- generator

/// A small generator (xorshift64*) so that one seed is one body.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }

    fn text(&mut self) -> String {
        const BITS: &[&str] = &[
            "plain words go here ",
            "x",
            "\n",
            "\"",
            "\\",
            "/",
            "\t",
            "é",
            "漢字",
            "😀",
            "\u{7f}",
            "\u{0}",
            "\u{8}\u{c}\r",
            "{\"a\":1}",
            "data: ",
            "\u{2028}",
            "\u{ffff}",
            "0123456789 abcdefghijklmnopqrstuvwxyz ",
        ];
        (0..self.below(8)).map(|_| self.pick(BITS)).collect()
    }

    fn shuffled(&mut self, mut pairs: Vec<(String, Json)>) -> Json {
        for i in (1..pairs.len()).rev() {
            pairs.swap(i, self.below(i + 1));
        }
        let mut seen = BTreeSet::new();
        pairs.retain(|(key, _)| seen.insert(key.clone()));
        Json::Object(pairs)
    }

    fn junk(&mut self, depth: usize) -> Json {
        match self.below(if depth == 0 { 4 } else { 6 }) {
            0 => Json::String(self.text()),
            1 => Json::Other(self.pick(&["null", "true", "false"]).into()),
            2 => Json::Other(self.pick(&["0", "-1", "12", "3.25", "18446744073709551615", "-0.5"]).into()),
            3 => Json::String(self.pick(&["user", "system", "text", "content", ""]).into()),
            4 => Json::Array((0..self.below(4)).map(|_| self.junk(depth - 1)).collect()),
            _ => {
                let pairs = (0..self.below(4)).map(|_| {
                    const KEYS: &[&str] = &[
                        "content",
                        "messages",
                        "choices",
                        "role",
                        "text",
                        "arguments",
                        "index",
                        "delta",
                        "k\"ey",
                        "a key that is longer than any the parser keeps for matching",
                        "",
                        "ключ",
                    ];
                    (self.pick(KEYS).to_owned(), self.junk(depth - 1))
                });
                let pairs = pairs.collect();
                self.shuffled(pairs)
            }
        }
    }

    fn maybe_text(&mut self) -> Json {
        if self.chance(15) { self.junk(1) } else { Json::String(self.text()) }
    }

    fn content(&mut self) -> Json {
        match self.below(5) {
            0 => Json::Other("null".into()),
            1 | 2 => Json::String(self.text()),
            3 => self.junk(3),
            _ => {
                let parts = (0..self.below(4)).map(|_| {
                    let kind = self.pick(&["text", "input_text", "thinking", "refusal", "tool_result"]);
                    let key = self.pick(&["text", "text", "thinking", "refusal", "content"]).to_owned();
                    let value = if self.chance(20) { self.content() } else { self.maybe_text() };
                    self.shuffled(vec![("type".into(), Json::String(kind.into())), (key, value)])
                });
                Json::Array(parts.collect())
            }
        }
    }

    fn message(&mut self) -> Json {
        if self.chance(4) {
            return self.junk(2);
        }
        let mut pairs = Vec::new();
        if self.chance(90) {
            const ROLES: &[&str] = &[
                "system",
                "developer",
                "user",
                "assistant",
                "tool",
                "function",
                "model",
                "critic",
                "assistant-and-more-bytes",
            ];
            let role = self.pick(ROLES).to_owned();
            pairs.push(("role".into(), if self.chance(3) { self.junk(1) } else { Json::String(role) }));
        }
        if self.chance(90) {
            pairs.push(("content".into(), self.content()));
        }
        for key in ["refusal", "reasoning", "reasoning_content", "name"] {
            if self.chance(12) {
                pairs.push((key.into(), self.maybe_text()));
            }
        }
        if self.chance(10) {
            let detail = [("type", "reasoning.text"), ("text", "because"), ("format", "x")];
            let detail = detail.map(|(k, v)| (k.to_owned(), Json::String(v.into()))).to_vec();
            pairs.push(("reasoning_details".into(), Json::Array(vec![self.shuffled(detail)])));
        }
        if self.chance(30) {
            let calls = (0..self.below(4)).map(|_| self.call()).collect();
            pairs.push(("tool_calls".into(), Json::Array(calls)));
        }
        if self.chance(6) {
            let pairs_ = vec![("name".into(), self.maybe_text()), ("arguments".into(), self.maybe_text())];
            pairs.push(("function_call".into(), self.shuffled(pairs_)));
        }
        if self.chance(20) {
            pairs.push(("audio".into(), self.junk(1)));
        }
        self.shuffled(pairs)
    }

    fn call(&mut self) -> Json {
        // An object as arguments is a unit of its own source: see the examples.
        let arguments = if self.chance(15) { self.junk(0) } else { Json::String(self.text()) };
        let function = vec![("name".into(), self.maybe_text()), ("arguments".into(), arguments)];
        let mut pairs =
            vec![("id".into(), Json::String("call_1".into())), ("function".into(), self.shuffled(function))];
        if self.chance(60) {
            pairs.push(("index".into(), Json::Other(self.below(4).to_string())));
        }
        self.shuffled(pairs)
    }

    fn body(&mut self, list: &str, element: impl Fn(&mut Self) -> Json) -> Json {
        let mut pairs = vec![("model".into(), Json::String("gpt-x".into()))];
        for key in ["temperature", "tools", "metadata", "id"] {
            pairs.push((key.into(), self.junk(3)));
        }
        pairs.push((list.into(), Json::Array((0..self.below(5)).map(|_| element(self)).collect())));
        self.shuffled(pairs)
    }

    fn choice(&mut self, inner: &str) -> Json {
        let mut pairs = vec![(inner.into(), self.message()), ("finish_reason".into(), self.junk(0))];
        if self.chance(70) {
            pairs.push(("index".into(), Json::Other(self.below(3).to_string())));
        }
        self.shuffled(pairs)
    }

    /// Writes the document with random blanks and a random choice of escapes.
    fn write(&mut self, value: &Json, lines: bool, out: &mut String) {
        self.blank(lines, out);
        match value {
            Json::Other(text) => out.push_str(text),
            Json::String(text) => self.write_string(text, out),
            Json::Array(elements) => {
                out.push('[');
                for (position, element) in elements.iter().enumerate() {
                    out.push_str(if position == 0 { "" } else { "," });
                    self.write(element, lines, out);
                }
                self.blank(lines, out);
                out.push(']');
            }
            Json::Object(pairs) => {
                out.push('{');
                for (position, (key, value)) in pairs.iter().enumerate() {
                    out.push_str(if position == 0 { "" } else { "," });
                    self.blank(lines, out);
                    self.write_string(key, out);
                    self.blank(lines, out);
                    out.push(':');
                    self.write(value, lines, out);
                }
                out.push('}');
            }
        }
        self.blank(lines, out);
    }

    fn blank(&mut self, lines: bool, out: &mut String) {
        if self.chance(5) {
            out.push_str(self.pick(if lines { &[" ", "\n", "\r\n", "\t  "] } else { &[" ", "  ", "\t"] }));
        }
    }

    fn write_string(&mut self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            let must = c < ' ' || c == '"' || c == '\\';
            if self.chance(10) || (must && self.chance(30)) {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            } else if must || (c == '/' && self.chance(50)) {
                match c {
                    '\n' => out.push_str("\\n"),
                    '\t' => out.push_str("\\t"),
                    '"' | '\\' | '/' => out.extend(['\\', c]),
                    '\u{8}' => out.push_str("\\b"),
                    '\u{c}' => out.push_str("\\f"),
                    '\r' => out.push_str("\\r"),
                    c => out.push_str(&format!("\\u{:04X}", u32::from(c))),
                }
            } else {
                out.push(c);
            }
        }
        out.push('"');
    }

    fn written(&mut self, value: &Json, lines: bool) -> Vec<u8> {
        let mut out = String::new();
        self.write(value, lines, &mut out);
        out.into_bytes()
    }

    fn cuts(&mut self) -> impl FnMut() -> usize {
        let style = self.below(3);
        let mut random = Random(self.0 | 1);
        move || match style {
            0 => 1,
            1 => 1 + random.below(4),
            _ => 1 + random.below(80),
        }
    }
}

/// An event stream with one document an event, and the events.
fn generated_stream(random: &mut Random) -> (Vec<u8>, Vec<Vec<u8>>) {
    let (mut body, mut events) = (Vec::new(), Vec::new());
    let line_end = random.pick(&["\n", "\r\n", "\r"]).as_bytes().to_vec();
    if random.chance(20) {
        body.extend_from_slice("\u{feff}".as_bytes());
    }
    for _ in 0..random.below(8) {
        if random.chance(30) {
            body.extend_from_slice(
                random
                    .pick(&[": OPENROUTER PROCESSING", "event: x", "id:7", "dat: y", "data2: z"])
                    .as_bytes(),
            );
            body.extend_from_slice(&line_end);
        }
        let document = random.body("choices", |random| random.choice("delta"));
        let lines = random.chance(20);
        let text = String::from_utf8(random.written(&document, lines)).unwrap().replace("\r\n", "\n");
        for line in text.split('\n') {
            body.extend_from_slice(if random.chance(50) && !line.starts_with(' ') {
                b"data:"
            } else {
                b"data: "
            });
            body.extend_from_slice(line.as_bytes());
            body.extend_from_slice(&line_end);
        }
        body.extend_from_slice(&line_end);
        events.push(text.into_bytes());
    }
    if random.chance(70) {
        body.extend_from_slice(b"data: [DONE]");
        body.extend_from_slice(&line_end);
        if random.chance(70) {
            body.extend_from_slice(&line_end);
        }
    }
    (body, events)
}

// ------------------------------------------------------------------------------------------------- properties

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]

    #[test]
    fn requests_agree_with_a_whole_parse(seed in 1u64..) {
        let mut random = Random(seed);
        let document = random.body("messages", Random::message);
        let body = random.written(&document, true);
        let (expected, rest) = naive_units(&body, "messages", None);
        let (units, result, _) = whole(request(), &body);
        let summary = result.unwrap();
        prop_assert_eq!(given_units(&units), expected);
        assert_ordinals(&units);
        prop_assert_eq!(serde_json::from_str::<Json>(&envelope(&units)).unwrap(), rest);
        prop_assert_eq!(summary.body_bytes, body.len() as u64);
        let (split, result, _) = read(request(), &body, random.cuts());
        prop_assert_eq!(split, units);
        prop_assert_eq!(result, Ok(summary));
    }

    #[test]
    fn answers_agree_with_a_whole_parse(seed in 1u64..) {
        let mut random = Random(seed);
        let document = random.body("choices", |random| random.choice("message"));
        let body = random.written(&document, true);
        let (expected, rest) = naive_units(&body, "choices", Some("message"));
        let (units, result, _) = whole(response(), &body);
        prop_assert_eq!(given_units(&units), expected);
        assert_ordinals(&units);
        prop_assert_eq!(serde_json::from_str::<Json>(&envelope(&units)).unwrap(), rest);
        let (split, split_result, _) = read(response(), &body, random.cuts());
        prop_assert_eq!(split, units);
        prop_assert_eq!(split_result, result);
    }

    #[test]
    fn streams_agree_with_a_whole_parse(seed in 1u64..) {
        let mut random = Random(seed);
        let (body, events) = generated_stream(&mut random);
        let (units, result, _) = whole(stream(), &body);
        prop_assert_eq!(given_units(&units), naive_stream(&events));
        assert_ordinals(&units);
        prop_assert_eq!(result.unwrap().events, events.len() as u64);
        let (split, split_result, _) = read(stream(), &body, random.cuts());
        prop_assert_eq!(split, units);
        prop_assert_eq!(split_result, result);
    }

    /// Broken bodies too: the same units, the same error, wherever the cuts are.
    #[test]
    fn damage_reads_the_same_for_every_split(seed in 1u64.., kind in 0usize..4, length in 0usize..400, damage in any::<u8>()) {
        let mut random = Random(seed);
        let (make, mut body): (fn() -> BodyParser, _) = match kind {
            0 => (request, { let d = random.body("messages", Random::message); random.written(&d, true) }),
            1 => (response, { let d = random.body("choices", |r| r.choice("message")); random.written(&d, true) }),
            2 => (stream, generated_stream(&mut random).0),
            _ => (|| BodyParser::for_request(b"/x", None).unwrap(), { let d = random.junk(3); random.written(&d, true) }),
        };
        if length < body.len() {
            match damage % 3 {
                0 => body.truncate(length),
                1 => body[length] = damage,
                _ => { body.insert(length, damage); }
            }
        }
        let (units, result, summary) = whole(make(), &body);
        for _ in 0..2 {
            let (split, split_result, split_summary) = read(make(), &body, random.cuts());
            prop_assert_eq!(&split, &units);
            prop_assert_eq!(split_result, result);
            prop_assert_eq!(split_summary, summary);
        }
        // A document that is accepted is one.
        if kind < 2 && result.is_ok() && !body.is_empty() && !body.windows(2).any(|w| w == b"\\u") {
            prop_assert!(serde_json::from_slice::<serde::de::IgnoredAny>(&body).is_ok());
        }
        // All of a document is seen: given, or counted, or an escape's source.
        if kind < 2 {
            let given: usize = units.values().map(|unit| unit.text.len()).sum();
            let escapes = body.iter().filter(|byte| **byte == b'\\').count() * 6;
            prop_assert!(given + escapes + summary.leading_blank_bytes as usize >= body.len());
        }
    }

    /// Every value of every event is in the envelope once, however the events are thinned out.
    #[test]
    fn no_value_of_a_stream_is_unseen(values in prop::collection::vec(prop::collection::vec(0u8..3, 3), 1..12)) {
        let mut body = String::new();
        for row in &values {
            let finish = if row[2] == 0 { String::new() } else { format!(r#","finish":"f{}""#, row[2]) };
            body += &format!("data: {{\"id\":\"a{}\",\"n\":1{}{finish}}}\n\n", row[0], row[1]);
        }
        let (units, result, _) = whole(stream(), body.as_bytes());
        prop_assert!(result.is_ok());
        // Naive: the last event of the same shape (with or without `finish`).
        let (mut expected, mut last) = (String::new(), [const { None::<&Vec<u8>> }; 2]);
        for row in &values {
            let slot = usize::from(row[2] != 0);
            let parts = [format!("\"id\":\"a{}\",", row[0]), format!("\"n\":1{}", row[1]), format!("\"finish\":\"f{}\"}}", row[2])];
            match last[slot].replace(row) {
                None => expected += &format!("{{{}{}{}", parts[0], parts[1], if slot == 1 { format!(",{}", parts[2]) } else { "}".into() }),
                Some(before) => {
                    if before[0] != row[0] { expected += &parts[0]; }
                    if before[1] != row[1] { expected += &parts[1]; expected += if slot == 1 { "," } else { "}" }; }
                    if slot == 1 && before[2] != row[2] { expected += &parts[2]; }
                }
            }
        }
        prop_assert_eq!(envelope(&units), expected);
    }
}

// -------------------------------------------------------------------------------------------------- examples

fn chat_request(body: &str) -> Units {
    let (units, result, _) = whole(request(), body.as_bytes());
    assert!(result.is_ok(), "{result:?}");
    units
}

fn chat_stream(body: &str) -> (Units, Summary) {
    let (units, result, _) = whole(stream(), body.as_bytes());
    (units, result.unwrap())
}

#[test]
fn a_request_is_cut_into_its_units() {
    let units = chat_request(
        r#"{"model":"m","messages":[{"role":"developer","content":"be \"kind\""},{"content":[{"type":"text","text":"hi"},{"type":"text","text":"there"}],"role":"user"},{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"tool","content":"42","tool_call_id":"c"}]}"#,
    );
    assert_eq!(texts(&units, Role::System), ["be \"kind\""]);
    assert_eq!(texts(&units, Role::User), ["hi", "there"]);
    assert_eq!(texts(&units, Role::ToolCall), ["f{\"a\":1}"]);
    assert_eq!(texts(&units, Role::ToolResult), ["42"]);
    assert_eq!(
        envelope(&units),
        r#"{"model":"m","messages":[{"role":"developer","content":""},{"content":[{"type":"text","text":""},{"type":"text","text":""}],"role":"user"},{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"","arguments":""}}]},{"role":"tool","content":"","tool_call_id":"c"}]}"#
    );
}

#[test]
fn keys_written_with_escapes_are_the_same_keys() {
    let units = chat_request(r#"{"\u006dessages":[{"r\u006fle":"syste\u006d","conten\u0074":"x"}]}"#);
    assert_eq!(texts(&units, Role::System), ["x"]);
}

#[test]
fn media_is_counted_and_sampled() {
    let data = "QUJD".repeat(1000);
    for (value, lost) in [
        (format!("data:image/png;base64,{data}"), 4000 - 48),
        (data.clone(), 4000 - 48),
        (data.replace('Q', r"\/"), 5000 - 60),
        ("https://example.com/a/picture/with/a/long/path/and/some/more/of/it.png?x=1".into(), 0),
        (format!("{data} {data}"), 4000 - 48),
        (format!("{data} now do as I say, {data}"), 4000 - 48),
    ] {
        let body = format!(
            r#"{{"messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"{value}"}}}},{{"type":"text","text":"see"}}]}}]}}"#
        );
        let (units, result, _) = whole(request(), body.as_bytes());
        assert_eq!(result.unwrap().skipped_bytes, lost);
        let record = &units[&Unit { role: Role::Envelope, index: 0 }];
        assert_eq!(record.skipped, lost);
        assert_eq!(record.text.len() as u64, body.len() as u64 - 3 - lost);
        assert_eq!(texts(&units, Role::User), ["see"]);
        assert_eq!(value.contains("say"), envelope(&units).contains(" now do as I say, "));
        for step in [1, 2, 3, 7, 50] {
            assert_eq!(read(request(), body.as_bytes(), || step).0, units);
        }
    }
}

#[test]
fn text_too_long_to_hold_is_the_users() {
    for (length, role) in [(64 * 1024, Role::System), (64 * 1024 + 1, Role::User)] {
        let text = "a".repeat(length);
        let body = format!(r#"{{"messages":[{{"content":"{text}","name":"n","role":"system"}}]}}"#);
        for step in [1000, usize::MAX] {
            let (units, ..) = read(request(), body.as_bytes(), || step);
            assert_eq!(texts(&units, role), [text.as_str()]);
        }
    }
    // Pieces are bounded too: each escape is one.
    for (count, role) in [(4096, Role::System), (4097, Role::User)] {
        let body = format!(r#"{{"messages":[{{"content":"{}","role":"system"}}]}}"#, r"\n".repeat(count));
        for step in [1, 1000, usize::MAX] {
            let (units, ..) = read(request(), body.as_bytes(), || step);
            assert_eq!(texts(&units, role), ["\n".repeat(count)]);
        }
    }
}

#[test]
fn a_choice_too_long_to_hold_is_the_one_at_its_position() {
    for (length, sizes) in [(64 * 1024, [64 * 1024, 6].as_slice()), (64 * 1024 + 1, &[64 * 1024 + 1 + 6])] {
        let body = format!(
            "data: {{\"choices\":[{{\"delta\":{{\"content\":\"{}\"}},\"index\":1}}]}}\n\ndata: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"second\"}}}}]}}\n\n",
            "a".repeat(length)
        );
        for step in [1000, usize::MAX] {
            let (units, ..) = read(stream(), body.as_bytes(), || step);
            let given: Vec<_> = texts(&units, Role::Assistant).iter().map(String::len).collect();
            assert_eq!(given, sizes);
        }
    }
}

#[test]
fn a_stream_joins_its_pieces() {
    let (units, summary) = chat_stream(concat!(
        ": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n",
        "data: {\"id\":\"a\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"He\"},\"finish_reason\":null}],\"obfuscation\":\"xYz1\"}\n\n",
        "data: {\"id\":\"a\",\"choices\":[{\"index\":1,\"delta\":{\"content\":\"Two\"},\"finish_reason\":null}],\"obfuscation\":\"Q\"}\n\n",
        "data: {\"id\":\"a\",\"choices\":[{\"delta\":{\"content\":\" too\"},\"index\":1,\"finish_reason\":null}],\"obfuscation\":\"Q\"}\n\n",
        "data: {\"id\":\"a\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"llo\"},\"finish_reason\":null}],\"obfuscation\":\"ab\"}\n\n",
        "data: {\"id\":\"a\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\"},\"finish_reason\":\"stop\"}],\"obfuscation\":\"a b\"}\n\n",
        "data: {\"id\":\"a\",\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5}}\n\n",
        "data: [DONE]\n\n",
    ));
    assert_eq!(texts(&units, Role::Assistant), ["Hello", "Two too"]);
    assert_eq!(
        envelope(&units),
        concat!(
            ": OPENROUTER PROCESSING",
            r#"{"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"obfuscation":""}"#,
            r#"{"id":"a","choices":[{"index":1,"delta":{"content":""},"finish_reason":null}],"obfuscation":""}"#,
            r#"{"id":"a","choices":[{"delta":{"content":""},"index":1,"finish_reason":null}],"obfuscation":""}"#,
            r#""index":0,"#,
            r#""finish_reason":"stop"}"#,
            r#""obfuscation":" b""#,
            "}",
            r#"{"id":"a","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}"#,
            "[DONE]",
        )
    );
    assert_eq!((summary.events, summary.terminated, summary.skipped_bytes), (6, true, 4 + 1 + 1 + 2 + 1));
    assert_eq!(summary.usage.input_tokens, Some(3));
    assert_eq!(summary.usage.output_tokens, Some(2));
    assert_eq!(summary.usage.total_tokens, Some(5));
}

#[test]
fn tool_calls_of_a_stream_are_joined_by_their_index() {
    let (units, _) = chat_stream(concat!(
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":\"\"},\"index\":0},{\"index\":1,\"function\":{\"name\":\"g\"}}]}}]}\n\n",
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[{\"function\":{\"arguments\":\"{2}\"},\"index\":1}]}}]}\n\n",
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[{\"index\":0,\"function\":{\"arguments\":\"{1}\"}}]}}]}\n\n",
    ));
    assert_eq!(texts(&units, Role::ToolCall), ["f{1}", "g{2}"]);
}

#[test]
fn units_of_a_stream_are_bounded() {
    let body: String = (0..500)
        .map(|index| {
            format!(
                "data: {{\"choices\":[{{\"index\":{index},\"delta\":{{\"content\":\"c{index};\"}}}}]}}\n\n"
            )
        })
        .collect();
    let (units, _) = chat_stream(&body);
    let texts = texts(&units, Role::Assistant);
    assert_eq!(texts.len(), 57);
    assert_eq!(texts[55], "c55;");
    assert!(texts[56].starts_with("c56;c57;") && texts[56].ends_with("c499;"));
}

#[test]
fn an_oversized_event_is_given_whole_each_time() {
    let event = format!("data: {{\"x\":\"{}\"}}\n\n", "y".repeat(9000));
    let (units, _) = chat_stream(&event.repeat(3));
    assert_eq!(envelope(&units), format!("{{\"x\":\"{}\"}}", "y".repeat(9000)).repeat(3));
    let small = "data: {\"x\":\"y\"}\n\n";
    assert_eq!(envelope(&chat_stream(&small.repeat(3)).0), "{\"x\":\"y\"}");
}

#[test]
fn a_broken_event_spoils_only_itself() {
    let body = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\ndata: {oops}\n\ndata: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"b\"}}]}\n\n";
    let (units, result, summary) = whole(stream(), body.as_bytes());
    assert_eq!(result, Err(ContentError::Malformed { offset: body.find("oops").unwrap() as u64 }));
    assert_eq!(texts(&units, Role::Assistant), ["ab"]);
    assert!(envelope(&units).contains("{oops}"));
    assert_eq!(summary.events, 3);
    // An event that ends too early is broken; a stream that ends too early is cut off.
    let (_, result, _) = whole(stream(), b"data: {\"a\":\n\ndata: {}\n\n");
    assert_eq!(result, Err(ContentError::Malformed { offset: 12 }));
    let (units, result, _) =
        whole(stream(), b"data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"abc");
    assert_eq!(
        (result, texts(&units, Role::Assistant)),
        (Err(ContentError::Truncated), vec!["abc".to_owned()])
    );
}

#[test]
fn what_follows_an_error_is_still_seen() {
    let (units, result, _) = whole(request(), br#"{"messages":[{"role":"user","content":"hi"}]} and more"#);
    assert_eq!(result, Err(ContentError::Malformed { offset: 46 }));
    assert_eq!(texts(&units, Role::User), ["hi"]);
    assert!(envelope(&units).ends_with("]} and more"));
    let (units, result, _) = whole(request(), b"{\"messages\":[{\"content\":\"hi\\u00zz\"}]}");
    assert_eq!(result, Err(ContentError::Malformed { offset: 31 }));
    assert_eq!(texts(&units, Role::User), ["hi"]);
    assert!(envelope(&units).ends_with("\"content\":\"\\u00zz\"}]}"));
}

#[test]
fn truncated_text_is_given_and_reported() {
    let body = br#"{"messages":[{"content":"cut he"#;
    let (units, result, summary) = whole(request(), body);
    assert_eq!(result, Err(ContentError::Truncated));
    assert_eq!(texts(&units, Role::User), ["cut he"]);
    assert_eq!(summary.body_bytes, body.len() as u64);
}

#[test]
fn blanks_before_a_document_are_counted() {
    let (units, result, _) = whole(response(), b"\n         \n{\"choices\":[]}");
    assert_eq!(result.unwrap().leading_blank_bytes, 11);
    assert_eq!(envelope(&units), "{\"choices\":[]}");
    assert_eq!(whole(response(), b"   \n").1, Err(ContentError::Truncated));
    assert_eq!(whole(response(), b"").1, Ok(Summary::default()));
}

#[test]
fn other_bodies_are_one_unit() {
    let make =
        |content_type: Option<&str>| BodyParser::for_request(b"/x", content_type.map(str::as_bytes)).unwrap();
    let body = |units: &Units| texts(units, Role::Body).concat();
    for (content_type, text, style, result) in [
        (Some("application/json"), "{\"a\": 1}", "json", None),
        (Some("application/vnd.api+json; v=1"), "{\"a\": ", "json", Some(ContentError::Truncated)),
        (Some("application/json"), "{\"a\": 1}{}", "json", Some(ContentError::Malformed { offset: 8 })),
        (Some("application/x-ndjson"), "{\"a\": 1}\n{}\n[1]", "json", None),
        (Some("Text/HTML"), "<p>\u{e9}", "text", None),
        (Some("application/x-www-form-urlencoded"), "a=1&b=2", "form", None),
        (None, "[1", "unlabelled", Some(ContentError::Truncated)),
        (Some("nonsense"), "hello", "unlabelled", None),
    ] {
        let parser = make(content_type);
        assert_eq!(parser.style().as_str(), style);
        let (units, got, summary) = whole(parser, text.as_bytes());
        assert_eq!(body(&units), text);
        assert_eq!(got.err(), result);
        assert_eq!(summary.body_bytes, text.len() as u64);
    }
    let (units, result, _) = whole(make(None), b"  PK\x03\x04\xff\x00");
    assert_eq!(result, Err(ContentError::InvalidUtf8 { offset: 6 }));
    assert_eq!(units[&Unit { role: Role::Body, index: 0 }].text, b"PK\x03\x04\xff\x00");
    for step in 1..9 {
        assert_eq!(
            read(make(None), b"a\xffbcd\xff", || step).1,
            Err(ContentError::InvalidUtf8 { offset: 1 })
        );
    }
    assert_eq!(whole(make(None), b"caf\xc3").1, Err(ContentError::InvalidUtf8 { offset: 4 }));
    for empty in [Some("text/plain"), Some("application/json"), Some("text/event-stream"), None] {
        assert_eq!(whole(make(empty), b""), (Units::new(), Ok(Summary::default()), Summary::default()));
    }
    let events = b"event: a\ndata: {\"x\":1}\n\n: c\n\ndata: one\rdata: two\r\n\r\ndata: end";
    let (units, result, _) = whole(make(Some("text/event-stream")), events);
    assert_eq!(body(&units), "event: a\n{\"x\":1}\n: c\none\ntwo\nend\n");
    let summary = result.unwrap();
    assert_eq!((summary.events, summary.skipped_bytes), (3, 0));
    for step in 1..9 {
        assert_eq!(read(make(Some("text/event-stream")), events, || step).0, units);
    }
}

#[test]
fn the_parser_is_chosen_by_path_and_content_type() {
    let style = |path: &[u8], content_type: Option<&[u8]>| match BodyParser::for_request(path, content_type) {
        Ok(parser) => parser.style().as_str(),
        Err(reason) => reason.as_str(),
    };
    assert_eq!(style(b"/openai/deployments/x/chat/completions?api-version=1", None), "openai.chat");
    assert_eq!(style(b"/v1/chat/completions/", Some(b"text/plain")), "openai.chat");
    assert_eq!(style(b"/v1/chat/completions", Some(b"image/png")), "openai.chat");
    assert_eq!(style(b"/v1/chat/completionsx", Some(b"application/json")), "json");
    assert_eq!(style(b"/x?p=/chat/completions", Some(b"application/json")), "json");
    assert_eq!(style(b"/x", Some(b"multipart/form-data; boundary=x")), "multipart");
    assert_eq!(style(b"/x", Some(b"multipart/form-data")), "content_type_multipart");
    assert_eq!(style(b"/mcp", None), "jsonrpc");
    assert_eq!(style(b"/graphql", Some(b"application/graphql")), "text");
    assert_eq!(style(b"/x", Some(b"application/grpc+proto")), "content_type_protobuf");
    assert_eq!(style(b"/x", Some(b"IMAGE/png")), "content_type_binary");
    assert_eq!(style(b"/x", Some(b" application/json ; charset=utf-8")), "json");
    let answer = |content_type: &[u8], body: &[u8]| match BodyParser::for_response(
        Some(ApiStyle::OpenAiChat),
        Some(content_type),
    ) {
        Ok(parser) => whole(parser, body).0,
        Err(reason) => panic!("{reason}"),
    };
    let body = br#"{"choices":[{"message":{"content":"hi"}}]}"#;
    assert_eq!(texts(&answer(b"text/plain", body), Role::Assistant), ["hi"]);
    assert_eq!(texts(&answer(b"text/html", b"<h1>502</h1>"), Role::Body), ["<h1>502</h1>"]);
}

#[test]
fn lone_surrogates_keep_their_offsets() {
    let body = br#"{"messages":[{"content":"a\ud83d\ud83d\ude00b\ud83d\nc"}]}"#;
    for step in [1, 2, 5, usize::MAX] {
        let (units, ..) = read(request(), body, || step);
        assert_eq!(texts(&units, Role::User), ["a\u{fffd}\u{1f600}b\u{fffd}\nc"]);
        let offsets = &units[&Unit { role: Role::User, index: 0 }].offsets;
        let from_the_start: Vec<_> = offsets.iter().map(|offset| offset - 25).collect();
        assert_eq!(from_the_start, [0, 1, 2, 3, 7, 8, 9, 10, 19, 20, 21, 22, 26, 28]);
    }
}

#[test]
fn the_shape_unused_longest_is_forgotten() {
    let event = |name: usize| format!("data: {{\"k{name}\":1}}\n\n");
    let fill: String = (0..8).map(event).collect();
    // 0 is used again, so 8 takes the place of 1; then 0 is still known and 1 is not.
    let (units, _) = chat_stream(&(fill + &event(0) + &event(8) + &event(0) + &event(1)));
    let expected: String = (0..9).chain([1]).map(|name| format!("{{\"k{name}\":1}}")).collect();
    assert_eq!(envelope(&units), expected);
}

#[test]
fn an_event_that_outgrows_the_bound_keeps_its_beginning() {
    let filler = "y".repeat(9000);
    let body = format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"hi\"}}}}],\"x\":\"{filler}\"}}\n\n");
    for step in [100, usize::MAX] {
        let (units, ..) = read(stream(), body.as_bytes(), || step);
        assert_eq!(envelope(&units), body[6..body.len() - 2].replace("hi", ""));
    }
    // So does one of too many values.
    let body = format!("data: [{}0]\n\n", "1,".repeat(600)).repeat(2);
    for step in [100, usize::MAX] {
        let (units, ..) = read(stream(), body.as_bytes(), || step);
        assert_eq!(envelope(&units), body.replace("data: ", "").replace('\n', ""));
    }
}

#[test]
fn after_too_much_text_a_choices_calls_count_by_position() {
    let calls = |before: &str, text: &str| {
        format!(
            "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{before}\",\"tool_calls\":[{{\"function\":{{\"arguments\":\"{text}\"}},\"index\":5}}]}}}}]}}\n\n"
        )
    };
    for (length, expected) in [(64 * 1024 - 1, vec!["xy"]), (64 * 1024 + 1, vec!["x", "y"])] {
        let body = calls(&"a".repeat(length), "x") + &calls("", "y");
        for step in [1000, usize::MAX] {
            let (units, ..) = read(stream(), body.as_bytes(), || step);
            assert_eq!(texts(&units, Role::ToolCall), expected);
        }
    }
}

#[test]
fn a_changed_element_is_given_without_its_arrays_key() {
    let (units, _) =
        chat_stream("data: {\"a\":[\"x\",1]}\n\ndata: {\"a\":[\"z\",1]}\n\ndata: {\"a\":[\"z\",2]}\n\n");
    assert_eq!(envelope(&units), "{\"a\":[\"x\",1]}\"z\",2]");
}

// -------------------------------------------------------------------------------------------- recorded traffic

/// Recorded exchanges with chat completion servers, when the machine has them.
#[test]
fn recorded_chat_exchanges_agree_with_a_whole_parse() {
    use std::io::Read;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/llm_exchanges.jsonl.gz");
    let Ok(file) = std::fs::File::open(path) else {
        eprintln!("skipped: no recorded exchanges beside the project");
        return;
    };
    let mut lines = String::new();
    flate2::read::GzDecoder::new(file).read_to_string(&mut lines).unwrap();
    let mut random = Random(7);
    let (mut requests, mut answers, mut streams, mut not_chat) = (0, 0, 0, 0);
    for line in lines.lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let part = |raw: &serde_json::Value| {
            let (head, body) = raw.as_str().unwrap().split_once("\r\n\r\n").unwrap();
            (head.to_owned(), body.as_bytes().to_vec())
        };
        let (head, body) = part(&row["text"]);
        let target = head.split(' ').nth(1).unwrap();
        if ApiStyle::of_path(target.as_bytes()) != Some(ApiStyle::OpenAiChat) {
            continue;
        }
        let check = |make: fn() -> BodyParser, body: &[u8], random: &mut Random| {
            let (units, result, summary) = whole(make(), body);
            assert_ordinals(&units);
            assert_eq!(read(make(), body, random.cuts()), (units.clone(), result, summary), "{}", row["id"]);
            (units, result)
        };
        if !body.is_empty() {
            let (units, result) = check(request, &body, &mut random);
            result.unwrap();
            assert_eq!(given_units(&units), naive_units(&body, "messages", None).0, "{}", row["id"]);
            requests += 1;
        }
        let (head, mut body) = part(&row["extra"]["response"]);
        if let Some(decoded) = recorded_as_base64(&body) {
            body = decoded;
        }
        if head.to_ascii_lowercase().contains("text/event-stream") {
            let (units, result) = check(stream, &body, &mut random);
            result.unwrap();
            let text = String::from_utf8(body).unwrap().replace("\r\n", "\n");
            let events = text.lines().filter_map(|line| line.strip_prefix("data:")).map(|line| line.trim());
            let events: Vec<_> =
                events.filter(|data| *data != "[DONE]").map(|data| data.as_bytes().to_vec()).collect();
            assert_eq!(given_units(&units), naive_stream(&events), "{}", row["id"]);
            streams += 1;
        } else if serde_json::from_slice::<Json>(&body).is_ok() {
            let (units, result) = check(response, &body, &mut random);
            result.unwrap();
            assert_eq!(
                given_units(&units),
                naive_units(&body, "choices", Some("message")).0,
                "{}",
                row["id"]
            );
            answers += 1;
        } else {
            // An empty answer, or one that is no JSON: an error, unless there is nothing at all.
            let (_, result) = check(response, &body, &mut random);
            assert_eq!(result.is_ok(), body.is_empty(), "{}", row["id"]);
            not_chat += 1;
        }
    }
    eprintln!("{requests} requests, {answers} whole answers, {streams} streams, {not_chat} other bodies");
    assert!(requests > 600 && answers > 400 && streams > 150 && not_chat < 20);
}

/// Some rows hold the body in base64: the recorder's doing.
fn recorded_as_base64(body: &[u8]) -> Option<Vec<u8>> {
    let starts = [&b"eyJ"[..], b"ewo", b"CiA", b"ZGF0", b"OiBP"];
    let text: Vec<u8> = body.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    if !starts.iter().any(|start| text.starts_with(start)) {
        return None;
    }
    let mut out = Vec::new();
    let (mut bits, mut held) = (0u32, 0);
    for byte in text {
        let digit = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        (bits, held) = (bits << 6 | u32::from(digit), held + 6);
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    Some(out)
}

/// The newline that closes an event stands for a line end of the body, also when the last line of data is
/// empty.
#[test]
fn the_newline_after_an_event_leads_back_to_a_line_end() {
    for body in ["data: x\ndata:\n\ndata: y", "data: \rdata: ", "data:x\r\ndata\r\n\r\n"] {
        let events = BodyParser::for_request(b"/", Some(b"text/event-stream")).unwrap();
        // The recorder compares each text with the body at its offset.
        let (units, result, _) = whole(events, body.as_bytes());
        result.unwrap();
        assert_eq!(units.len(), 1);
    }
}
