//! Body parsers on arbitrary bodies, cut anywhere.
//!
//! For every body: every split gives the same units, offsets, result and summary; each text is the body's at
//! its offset, or an escape there; each unit is ended once; in one JSON document every byte is given once,
//! counted as skipped, or blank before the document. A JSON body is accepted exactly when serde_json accepts
//! it, an event stream has the data that the standard's steps give.
//!
//! Deliberate differences from serde_json:
//! - an empty body is no error (and has no unit);
//! - more than 64 containers inside one another are [`ContentError::TooDeep`];
//! - in NDJSON, values need nothing between them, so only what serde_json accepts is compared.
//!
//! As serde_json's own grammar check, the parser takes a lone surrogate escape, any size of number, and
//! duplicate keys. It is read as `IgnoredAny`, after a check that the whole body is UTF-8.

use std::collections::BTreeMap;

use driftlock_inspect::content::{
    ApiStyle, BodyParser, ContentError, NotInspected, Role, Sink, Summary, Unit,
};
use serde::de::IgnoredAny;

use crate::input::{Cuts, Input};

const MAX_BODY_BYTES: usize = 1 << 16;
const MAX_DEPTH: usize = 64;

/// See the module.
pub fn holds(data: &[u8]) {
    let mut input = Input::new(data);
    let how = Read::of(&mut input);
    let (one, other) = (input.cuts(), input.cuts());
    let rest = input.rest(MAX_BODY_BYTES);
    let framed = if how.form == Some(Form::Frames) { frames(rest) } else { Vec::new() };
    let body = if framed.is_empty() { rest } else { &framed };
    let Ok(parser) = how.parser() else {
        assert!(how.form.is_none_or(|form| form == Form::None), "{how:?} is inspected");
        return;
    };
    let style = parser.style();
    let urlencoded = how.form == Some(Form::Urlencoded);
    let whole = read(parser, body, Cuts::default(), urlencoded);
    for cuts in [one, other] {
        let parser = how.parser().expect("nothing but the headers decides");
        assert_eq!(read(parser, body, cuts, urlencoded), whole, "{how:?}");
    }
    whole.check(body);
    if let Some(form) = how.form {
        whole.agrees(form, style, body);
    }
}

/// How a body of a content-type is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Json,
    Lines,
    /// One after the other, as a stream.
    Documents,
    Events,
    Text,
    Urlencoded,
    Multipart,
    /// AWS event-stream messages.
    Frames,
    /// By its first byte.
    Unknown,
    /// Not at all.
    None,
}

/// One path of each API, and some of none.
const PATHS: [&[u8]; 20] = [
    b"/v1/chat/completions?x=1",
    b"/v1/responses",
    b"/v1/completions",
    b"/v1/embeddings",
    b"/v1/threads/t/messages",
    b"/v1/messages",
    b"/v1beta/models/g:streamGenerateContent",
    b"/v1/models/e:batchEmbedContents",
    b"/model/m/converse-stream",
    b"/model/m/invoke-with-response-stream",
    b"/v1/chat",
    b"/v2/embed",
    b"/api/chat",
    b"/api/embed",
    b"/mcp",
    b"/graphql",
    b"/orders",
    b"/",
    b"/v1/messages/batches",
    b"/v1/rerank",
];

const CONTENT_TYPES: [(Option<&[u8]>, Form); 12] = [
    (Some(b"application/json"), Form::Json),
    (Some(b"text/event-stream"), Form::Events),
    (None, Form::Unknown),
    (Some(b"application/x-ndjson"), Form::Lines),
    (Some(b"text/plain; charset=utf-8"), Form::Text),
    (Some(b"application/x-www-form-urlencoded"), Form::Urlencoded),
    (Some(b"Application/Problem+JSON ; x=y"), Form::Json),
    (Some(b"multipart/form-data; boundary=x"), Form::Multipart),
    (Some(b"multipart/mixed"), Form::None),
    (Some(b"application/vnd.amazon.eventstream"), Form::Frames),
    (Some(b"image/png"), Form::None),
    (Some(b"application/grpc+proto"), Form::None),
];

/// Direction, path and content-type of a body.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Read<'a> {
    request: bool,
    path: &'a [u8],
    content_type: Option<&'a [u8]>,
    /// Known for the content-types of the list.
    form: Option<Form>,
}

impl<'a> Read<'a> {
    pub(crate) fn of(input: &mut Input<'a>) -> Self {
        let choice = input.byte();
        let path = match choice >> 1 & 3 {
            0..=2 => input.pick(&PATHS),
            _ => {
                let len = usize::from(input.byte());
                input.take(len)
            }
        };
        let style = ApiStyle::of_path(path).filter(|style| *style != ApiStyle::GraphQl);
        let request = choice & 1 == 0;
        let (content_type, form) = match usize::from(input.byte()) % (CONTENT_TYPES.len() + 1) {
            12 => {
                let len = usize::from(input.byte());
                (Some(input.take(len)), None)
            }
            // A request of a known API is JSON whatever its content-type.
            known => match (CONTENT_TYPES[known], style) {
                ((content_type, _), Some(_)) if request => (content_type, Some(Form::Json)),
                ((content_type, Form::Lines), Some(_)) => (content_type, Some(Form::Documents)),
                // Such answers may be many documents.
                (
                    (content_type, Form::Json | Form::Text | Form::Unknown),
                    Some(ApiStyle::Ollama | ApiStyle::Gemini),
                ) => (content_type, None),
                ((content_type, Form::Text), Some(_)) => (content_type, Some(Form::Unknown)),
                ((content_type, form), _) => (content_type, Some(form)),
            },
        };
        Self { request, path, content_type, form }
    }

    pub(crate) fn parser(&self) -> Result<BodyParser, NotInspected> {
        if self.request {
            BodyParser::for_request(self.path, self.content_type)
        } else {
            BodyParser::for_response(ApiStyle::of_path(self.path), self.content_type)
        }
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Recorded {
    text: Vec<u8>,
    offsets: Vec<u64>,
    ends: usize,
    skipped: u64,
    /// A backslash of an escaped one: that alone, or what both stand for.
    backslash: Option<usize>,
}

/// Keeps what a parser tells and checks it against the body.
struct Recorder<'a> {
    body: &'a [u8],
    units: BTreeMap<Unit, Recorded>,
    /// How often each byte of the body was given.
    given: Vec<u8>,
    /// The body is an urlencoded form.
    urlencoded: bool,
}

impl Recorder<'_> {
    /// Bytes of the body that `text` stands for.
    fn source_len(&self, unit: Unit, text: &[u8], at: usize) -> Option<usize> {
        let source = &self.body[at..];
        let raw = matches!(unit.role, Role::Envelope | Role::Body);
        // A line end of a stream is given as a newline, whichever it was, also where the last is missing.
        let ends = text == b"\n" && source.is_empty();
        let same = |(given, byte): (&u8, &u8)| given == byte || (*given == b'\n' && *byte == b'\r');
        if raw && (ends || text.len() <= source.len() && text.iter().zip(source).all(same)) {
            return Some(text.len().min(source.len()));
        }
        if self.urlencoded {
            let spaced = |(given, byte): (&u8, &u8)| given == byte || (*given == b' ' && *byte == b'+');
            return match (text, source) {
                ([_], [b'%', ..]) => Some(3),
                _ if text.len() <= source.len() && text.iter().zip(source).all(spaced) => Some(text.len()),
                _ => None,
            };
        }
        // The source of a value may be cut inside an escape.
        let cut = text == b"\\" && source.get(1) != Some(&b'\\');
        if !raw && (text != b"\\" || cut) && source.starts_with(text) {
            return Some(text.len());
        }
        // The longest first: a pair of surrogates begins with a lone one.
        [12, 6, 2].into_iter().find(|&len| {
            source.get(..len).is_some_and(|escape| {
                let quoted = [b"\"", escape, b"\""].concat();
                let lone = len == 6 && text == "\u{fffd}".as_bytes() && escape.starts_with(b"\\u");
                lone || escape.starts_with(b"\\")
                    && serde_json::from_slice::<String>(&quoted).is_ok_and(|s| s.as_bytes() == text)
            })
        })
    }
}

impl Sink for Recorder<'_> {
    fn text(&mut self, unit: Unit, text: &[u8], body_offset: u64) {
        assert!(!text.is_empty(), "an empty text for {unit:?}");
        let at = usize::try_from(body_offset).unwrap();
        assert!(at <= self.body.len(), "{unit:?} at {at} of {}", self.body.len());
        let source_len = self.source_len(unit, text, at);
        let mut len = source_len.unwrap_or_else(|| panic!("{unit:?} is given {text:?} at {at}"));
        let record = self.units.entry(unit).or_default();
        if let Some(before) = record.backslash.take()
            && at != before + 1
        {
            self.given[before + 1] = self.given[before + 1].saturating_add(1);
        }
        if text == b"\\" && len == 2 {
            record.backslash = Some(at);
            len = 1;
        }
        for count in &mut self.given[at..at + len] {
            *count = count.saturating_add(1);
        }
        let record = self.units.entry(unit).or_default();
        assert_eq!(record.ends, 0, "text after the end of {unit:?}");
        record.text.extend_from_slice(text);
        record.offsets.extend((0..text.len() as u64).map(|k| body_offset + k));
    }

    fn end(&mut self, unit: Unit) {
        let record = self.units.entry(unit).or_default();
        record.ends += 1;
        if let Some(before) = record.backslash.take() {
            self.given[before + 1] = self.given[before + 1].saturating_add(1);
        }
    }

    fn skipped(&mut self, unit: Unit, bytes: u64) {
        self.units.entry(unit).or_default().skipped += bytes;
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Reading {
    style: ApiStyle,
    units: BTreeMap<Unit, Recorded>,
    given: Vec<u8>,
    result: Result<Summary, ContentError>,
    summary: Summary,
}

fn read(mut parser: BodyParser, body: &[u8], cuts: Cuts<'_>, urlencoded: bool) -> Reading {
    let mut recorder = Recorder { body, units: BTreeMap::new(), given: vec![0; body.len()], urlencoded };
    for range in cuts.of(body.len()) {
        parser.push(&body[range], &mut recorder);
    }
    let result = parser.finish(&mut recorder);
    // Nothing comes after the end.
    parser.push(b"{}", &mut recorder);
    assert_eq!(parser.finish(&mut recorder), Ok(parser.summary()));
    let style = parser.style();
    Reading { style, units: recorder.units, given: recorder.given, result, summary: parser.summary() }
}

impl Reading {
    fn text(&self, role: Role) -> &[u8] {
        self.units.get(&Unit { role, index: 0 }).map_or(&[], |record| &record.text)
    }

    /// What holds of every body.
    fn check(&self, body: &[u8]) {
        for (unit, record) in &self.units {
            assert_eq!(record.ends, usize::from(!record.text.is_empty()), "ends of {unit:?}");
        }
        let summary = self.summary;
        assert_eq!(summary.body_bytes, body.len() as u64);
        assert_eq!(summary.skipped_bytes, self.units.values().map(|record| record.skipped).sum::<u64>());
        assert!(summary.leading_blank_bytes <= summary.body_bytes);
        if let Ok(whole) = self.result {
            assert_eq!(whole, summary);
        }
        if let Err(
            ContentError::Malformed { offset }
            | ContentError::TooDeep { offset }
            | ContentError::InvalidUtf8 { offset },
        ) = self.result
        {
            assert!(offset <= summary.body_bytes, "an error at {offset} of {}", summary.body_bytes);
        }
        if self.style == ApiStyle::Sse {
            assert!(self.units.keys().all(|unit| unit.role == Role::Body));
        }
    }

    /// In one document every byte is given once, skipped, or blank before it.
    fn covers(&self, body: &[u8]) {
        let blank = self.summary.leading_blank_bytes as usize;
        assert!(body[..blank].iter().all(|b| b" \t\r\n".contains(b)));
        assert!(self.given[..blank].iter().all(|&count| count == 0));
        assert!(self.given.iter().all(|&count| count <= 1), "a byte was given twice");
        let missing = self.given[blank..].iter().filter(|&&count| count == 0).count();
        assert_eq!(missing as u64, self.summary.skipped_bytes, "bytes that nothing saw");
    }

    /// What is counted and not given is base64 (its escapes included), or numbers in a list.
    fn skips_no_structure(&self, body: &[u8]) {
        let blank = self.summary.leading_blank_bytes as usize;
        for (byte, _) in body.iter().zip(&self.given).skip(blank).filter(|(_, count)| **count == 0) {
            let known = byte.is_ascii_alphanumeric() || b"+/=-_\\., \t\r\n".contains(byte);
            assert!(known, "{:?} passed unseen in {}", *byte as char, lossy(body));
        }
    }

    fn agrees(&self, form: Form, style: ApiStyle, body: &[u8]) {
        let known = style.has_schema() && style != ApiStyle::GraphQl;
        let document = body.trim_ascii_start_blank();
        match form {
            Form::None => panic!("{style:?} is inspected"),
            Form::Events if self.style != ApiStyle::Sse && self.style != ApiStyle::GraphQl => {
                self.agrees_with_known_events(&events(body))
            }
            // The framing is right; its documents may be none.
            Form::Frames => assert!(!matches!(self.result, Err(ContentError::Frame { .. }))),
            Form::Multipart => self.covers(body),
            Form::Urlencoded => {
                self.covers(body);
                assert_eq!(self.result, Ok(self.summary));
            }
            Form::Documents => self.agrees_with_lines(body),
            Form::Events => self.agrees_with_events(&events(body)),
            Form::Text => {
                assert_eq!((self.text(Role::Body), self.result), (body, Ok(self.summary)));
                self.covers(body);
            }
            Form::Json => {
                self.covers(body);
                self.skips_no_structure(body);
                self.agrees_with_json(body);
            }
            Form::Lines => {
                self.covers(body);
                self.agrees_with_lines(body);
            }
            Form::Unknown => {
                self.covers(body);
                match document.first() {
                    Some(b'{' | b'[') if known => self.agrees_with_json(body),
                    Some(b'{' | b'[') => self.agrees_with_lines(body),
                    Some(_) => {
                        assert_eq!(self.text(Role::Body), document);
                        assert_eq!(self.result.is_ok(), std::str::from_utf8(body).is_ok());
                    }
                    None => assert_eq!(self.result, Ok(self.summary)),
                }
            }
        }
    }

    fn agrees_with_json(&self, body: &[u8]) {
        match (self.result, is_json(body)) {
            (result, _) if body.is_empty() => assert_eq!(result, Ok(self.summary)),
            (Ok(_), valid) => assert!(valid && depth(body) <= MAX_DEPTH, "accepted: {}", lossy(body)),
            (Err(ContentError::TooDeep { .. }), valid) => assert!(!valid || depth(body) > MAX_DEPTH),
            (Err(error), valid) => assert!(!valid, "{error}: {}", lossy(body)),
        }
    }

    fn agrees_with_lines(&self, body: &[u8]) {
        let values = serde_json::Deserializer::from_slice(body).into_iter::<IgnoredAny>();
        let valid = std::str::from_utf8(body).is_ok() && values.fold(true, |all, value| all & value.is_ok());
        let any = !body.trim_ascii_start_blank().is_empty();
        if valid && any && depth(body) <= MAX_DEPTH {
            assert_eq!(self.result, Ok(self.summary), "{}", lossy(body));
        }
    }

    fn agrees_with_events(&self, events: &[Event]) {
        let text: Vec<u8> = events.iter().flat_map(|event| event.text.iter().copied()).collect();
        assert_eq!(lossy(self.text(Role::Body)), lossy(&text));
        assert_eq!((self.result, self.summary.skipped_bytes), (Ok(self.summary), 0));
        let with_data = events.iter().filter(|event| !event.data.is_empty());
        assert_eq!(self.summary.events, with_data.count() as u64);
    }

    fn agrees_with_known_events(&self, events: &[Event]) {
        let (done, documents): (Vec<&[u8]>, Vec<&[u8]>) =
            events.iter().map(|event| event.data.as_slice()).partition(|data| *data == b"[DONE]");
        let documents: Vec<&[u8]> = documents.into_iter().filter(|data| !data.is_empty()).collect();
        assert!(self.summary.terminated || done.is_empty());
        assert_eq!(self.summary.events, documents.len() as u64);
        let valid = |data: &&[u8]| is_json(data) && depth(data) <= MAX_DEPTH;
        assert_eq!(self.result.is_ok(), documents.iter().all(valid), "{:?}", self.result);
    }
}

/// The bytes as the payloads of AWS event-stream messages, with right checksums.
fn frames(bytes: &[u8]) -> Vec<u8> {
    const HEADERS: &[u8] = b"\x0b:event-type\x07\x00\x01x\x04size\x04\x00\x00\x00\x07";
    let mut out = Vec::new();
    for payload in bytes.split(|byte| *byte == b'\n') {
        let start = out.len();
        let total = 16 + HEADERS.len() + payload.len();
        out.extend_from_slice(&(total as u32).to_be_bytes());
        out.extend_from_slice(&(HEADERS.len() as u32).to_be_bytes());
        out.extend_from_slice(&crc32fast::hash(&out[start..]).to_be_bytes());
        out.extend_from_slice(HEADERS);
        out.extend_from_slice(payload);
        out.extend_from_slice(&crc32fast::hash(&out[start..]).to_be_bytes());
    }
    out
}

trait TrimBlank {
    /// Without JSON's blanks at the start.
    fn trim_ascii_start_blank(&self) -> &[u8];
}

impl TrimBlank for [u8] {
    fn trim_ascii_start_blank(&self) -> &[u8] {
        let blank = self.iter().take_while(|b| b" \t\r\n".contains(b)).count();
        &self[blank..]
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One JSON document, by serde_json.
pub(crate) fn is_json(document: &[u8]) -> bool {
    std::str::from_utf8(document).is_ok() && serde_json::from_slice::<IgnoredAny>(document).is_ok()
}

/// Containers inside one another, of what is JSON.
fn depth(document: &[u8]) -> usize {
    let (mut depth, mut deepest, mut string, mut escaped) = (0usize, 0, false, false);
    for byte in document {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if string => escaped = true,
            b'"' => string = !string,
            b'{' | b'[' if !string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[derive(Debug, Default)]
struct Event {
    data: Vec<u8>,
    /// All lines in order: what is not data with a newline after it; data with one between two lines of it,
    /// and one where the event ends.
    text: Vec<u8>,
}

/// The standard's steps over a whole stream (WHATWG HTML, "Interpreting an event stream"), with an event for
/// an unfinished end.
fn events(body: &[u8]) -> Vec<Event> {
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let mut lines: Vec<Vec<u8>> = vec![Vec::new()];
    for (i, &byte) in body.iter().enumerate() {
        match byte {
            b'\n' if i > 0 && body[i - 1] == b'\r' => {}
            b'\n' | b'\r' => lines.push(Vec::new()),
            _ => lines.last_mut().expect("one line").push(byte),
        }
    }
    lines.push(Vec::new());
    let (mut events, mut open) = (Vec::new(), false);
    let (mut now, mut data): (Event, Vec<&[u8]>) = (Event::default(), Vec::new());
    for line in &lines {
        let (name, value) = match line.iter().position(|&b| b == b':') {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (&line[..], &[][..]),
        };
        if line.is_empty() {
            now.data = data.join(&b'\n');
            data.clear();
            if !now.data.is_empty() {
                now.text.push(b'\n');
            }
            if std::mem::take(&mut open) {
                events.push(std::mem::take(&mut now));
            }
            continue;
        }
        open = true;
        if name == b"data" {
            let value = value.strip_prefix(b" ").unwrap_or(value);
            now.text.extend_from_slice(if data.is_empty() { b"" } else { b"\n" });
            now.text.extend_from_slice(value);
            data.push(value);
        } else {
            now.text.extend_from_slice(line);
            now.text.push(b'\n');
        }
    }
    events
}
