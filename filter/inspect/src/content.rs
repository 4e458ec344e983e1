//! Message bodies to content units: which parser reads a body, and what it tells.
//!
//! A body is read as it streams by. A parser gives every byte's meaning once, in order: which unit (role and
//! ordinal) it belongs to and where in the body it stands. The parser is chosen from the path and the
//! content-type before any byte is paused, and never collects a body. Where they say nothing of the API, the
//! first keys of the body do (`sniff`); the bytes pass on meanwhile.
//!
//! | body | units |
//! |---|---|
//! | request of a known API ([`ApiStyle::of_path`]) | by role, calls and their results apart, the rest as envelope: see `document`, `schema` (whatever the content-type claims: servers read JSON all the same) |
//! | its answer: JSON, NDJSON, `text/event-stream`, AWS event-stream | the same, the pieces of a stream joined |
//! | other JSON | the same, if its outermost keys are those of a known API; else one body unit, raw bytes, the grammar checked |
//! | other NDJSON | one body unit |
//! | other `text/event-stream` | the same by its first event, else one body unit: the events' data, names, ids and comments, a newline after each |
//! | urlencoded form | one body unit, decoded |
//! | `multipart/…` | fields and text files each a unit, part headers as envelope, the rest counted |
//! | text, XML, JavaScript, YAML, GraphQL | one body unit, raw bytes |
//! | content-type missing or unknown | by the first non-blank byte: `{` or `[` is JSON, anything else UTF-8 text |
//! | images, audio, archives, gRPC, … | [`NotInspected`] with a reason |
//!
//! Blank bytes before a JSON document are counted, not scored: gateways send them to keep a connection open.
//! Cost: one pass (`cargo run --release -p driftlock-inspect --example parse_speed`); memory is bounded by the
//! parsers' constants (half a MiB for a hostile stream, under 10 KiB for a usual one).

use crate::json::{Tokenizer, Utf8};
use crate::sse::{self, EventReader};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::mem;

mod document;
mod form;
mod media;
mod multipart;
mod schema;
mod sniff;
mod stream;
mod style;

use document::Reader;
use form::Form;
use media::Media;
use multipart::Multipart;
use schema::{Mode, Schema};
use sniff::{EventSniffer, MAX_SNIFFED_BYTES, Sniffer};
use stream::{Events, Frames};
pub use style::{ApiStyle, Framing, Provider};

/// Which part of a message a text belongs to; part of the stream key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Role {
    /// Request path and query.
    Target,
    /// A selected request header: its name, a colon, a space and its first value.
    Header,
    /// System or developer prompt.
    System,
    /// The user's turn; also any message whose role is missing, late or unknown, since that is the least
    /// trusted reading.
    User,
    /// The model's turn: content, refusal, transcript.
    Assistant,
    /// What the model thinks before it answers.
    Reasoning,
    /// A tool call's name and arguments.
    ToolCall,
    /// What a tool returned.
    ToolResult,
    /// A field of a multipart form.
    Field,
    /// A text file of a multipart form.
    File,
    /// All of the body that is no scored text.
    Envelope,
    /// A body without known schema.
    Body,
}

impl Role {
    /// The name in stream keys, logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Target => "target",
            Self::Header => "header",
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Reasoning => "reasoning",
            Self::ToolCall => "tool_call",
            Self::ToolResult => "tool_result",
            Self::Field => "field",
            Self::File => "file",
            Self::Envelope => "envelope",
            Self::Body => "body",
        }
    }

    pub(crate) const COUNT: usize = 1 + Self::Body as usize;

    /// The role a message names, in any case (`developer` is system, `function` and `tool` are results, `model`,
    /// `chatbot` and `agent` are the assistant); anything else is the user's.
    pub fn of_message(name: &[u8]) -> Self {
        let is = |names: &[&[u8]]| names.iter().any(|known| name.eq_ignore_ascii_case(known));
        if is(&[b"system", b"developer"]) {
            Self::System
        } else if is(&[b"assistant", b"model", b"chatbot", b"agent", b"role_agent"]) {
            Self::Assistant
        } else if is(&[b"tool", b"function"]) {
            Self::ToolResult
        } else {
            Self::User
        }
    }
}

/// One unit of a message: role and ordinal within the message, from 0 per role. Ordinal 65,535 is shared by
/// all units from there on, each still ended on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unit {
    /// Which part of the message.
    pub role: Role,
    /// Its ordinal among the units of that role.
    pub index: u16,
}

/// Receives what a parser tells of a message. A unit begins with its first `text`; one without text does not
/// exist. Units interleave (the envelope with all others, streamed choices with each other). For every split
/// of a body into chunks each unit gets the same bytes with the same offsets; how many calls carry them may
/// differ.
pub trait Sink {
    /// The next bytes of `unit`. `text[k]` comes from the decoded body's byte `body_offset + k`, or, when the
    /// call carries one escape's character (JSON's, or an urlencoded form's), from that escape, which begins at
    /// `body_offset` and is longer. A document that Bedrock's invoke sends as base64 has the offsets that it
    /// would have if its bytes stood where the base64 begins; so nothing of [`Framing::AwsEventStream`] can be
    /// rewritten in place.
    fn text(&mut self, unit: Unit, text: &[u8], body_offset: u64);
    /// `unit` is complete. Each unit is ended once, also when the body breaks off.
    fn end(&mut self, unit: Unit);
    /// Bytes at this point of `unit` that are counted but not given (base64 media, random padding).
    fn skipped(&mut self, unit: Unit, bytes: u64);
}

/// Why a body could not be read to its end. What came before was given to the sink; what came after the
/// error was given as envelope or body text, so that a broken body is no way past the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ContentError {
    /// The JSON document is not closed.
    #[error(
        "the body ends inside a JSON document: look for a dropped connection or a body size limit before the filter"
    )]
    Truncated,
    /// Not JSON at this byte.
    #[error(
        "the body is not valid JSON at byte {offset}: compare the sender's content-type and encoding with what it sends"
    )]
    Malformed {
        /// Position in the decoded body.
        offset: u64,
    },
    /// More than 64 containers inside one another.
    #[error(
        "the JSON at byte {offset} is nested deeper than 64 levels: flatten it, or let this route pass uninspected"
    )]
    TooDeep {
        /// Position in the decoded body.
        offset: u64,
    },
    /// Not an AWS event-stream message.
    #[error(
        "the event-stream message at byte {offset} is damaged (a length, a header or a checksum): look for what rewrites the body between the server and the filter"
    )]
    Frame {
        /// Where the message begins in the decoded body.
        offset: u64,
    },
    /// Not UTF-8 at this byte.
    #[error(
        "the body is not valid UTF-8 at byte {offset}: send UTF-8, or a content-type that names the format"
    )]
    InvalidUtf8 {
        /// Position in the decoded body.
        offset: u64,
    },
}

impl ContentError {
    /// A short fixed name, for reasons and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Truncated => "json_truncated",
            Self::Malformed { .. } => "json_malformed",
            Self::TooDeep { .. } => "json_too_deep",
            Self::Frame { .. } => "eventstream_damaged",
            Self::InvalidUtf8 { .. } => "invalid_utf8",
        }
    }
}

/// Why no parser reads a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotInspected {
    /// Images, audio, archives, `application/octet-stream` and the like.
    #[error("bodies of a binary content-type are not inspected")]
    Binary,
    /// `multipart/*` without a boundary.
    #[error("multipart bodies whose content-type names no boundary are not inspected")]
    Multipart,
    /// `application/grpc*` and protobuf.
    #[error("gRPC and protobuf bodies are not inspected")]
    Protobuf,
}

impl NotInspected {
    /// A short fixed name, for reasons and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Binary => "content_type_binary",
            Self::Multipart => "content_type_multipart",
            Self::Protobuf => "content_type_protobuf",
        }
    }
}

/// Token counts that the answer itself reports; the last ones seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt, those read from a cache included where the provider counts so.
    pub input_tokens: Option<u64>,
    /// Of the answer.
    pub output_tokens: Option<u64>,
    /// Both, if the provider says so itself.
    pub total_tokens: Option<u64>,
    /// Prompt tokens read from a cache.
    pub cached_tokens: Option<u64>,
    /// Answer tokens spent on reasoning.
    pub reasoning_tokens: Option<u64>,
}

/// A short text kept from a body, cut after [`Label::MAX_BYTES`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Label {
    bytes: [u8; Self::MAX_BYTES],
    len: u8,
}

impl Label {
    /// What is kept.
    pub const MAX_BYTES: usize = 80;

    /// The text; if it was cut inside a character, without it.
    pub fn as_str(&self) -> &str {
        let bytes = self.bytes();
        match core::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let valid = bytes.get(..error.valid_up_to()).unwrap_or_default();
                core::str::from_utf8(valid).unwrap_or_default()
            }
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }

    pub(crate) fn push(&mut self, text: &[u8]) {
        for (place, byte) in self.bytes.iter_mut().skip(usize::from(self.len)).zip(text) {
            *place = *byte;
            self.len += 1;
        }
    }
}

impl Default for Label {
    fn default() -> Self {
        Self { bytes: [0; Self::MAX_BYTES], len: 0 }
    }
}

impl core::fmt::Debug for Label {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What was read, beside the units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Decoded bytes of the body.
    pub body_bytes: u64,
    /// Blank bytes before the document: counted, in no unit.
    pub leading_blank_bytes: u64,
    /// The sum of what [`Sink::skipped`] was told.
    pub skipped_bytes: u64,
    /// Images, recordings and files inside the body, of which only the beginning is scored.
    pub media: u32,
    /// Documents of a stream: events with data (`[DONE]` apart), lines, frames.
    pub events: u64,
    /// The answer came to its own end: the stream's last event, or the whole document.
    pub terminated: bool,
    /// An error event or object of the provider's.
    pub provider_error: bool,
    /// Token counts.
    pub usage: Usage,
    /// The model that the message names, the first one.
    pub model: Option<Label>,
    /// Why the model stopped, in the provider's words; the last one.
    pub finish_reason: Option<Label>,
}

#[derive(Debug)]
enum Parser {
    Documents(Box<Reader>),
    Events(Box<Events>),
    Frames(Box<Frames>),
    Json(Tokenizer),
    RawEvents(EventReader, DataUnit),
    Form(Form),
    Multipart(Box<Multipart>),
    Text,
    /// Text whose content-type did not say so.
    CheckedText(Utf8, Option<ContentError>),
    /// Nothing but blanks so far: the first byte says whether it is JSON.
    Unknown(After),
    /// JSON of an API yet to be found out, and what came of it.
    Sniffed(Box<(Sniffer, Vec<u8>)>),
    SniffedEvents(Box<(EventSniffer, Vec<u8>)>),
}

/// What a body that turns out to be JSON is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// Of no API known by its path; many documents may follow one another.
    Any { many: bool },
    /// An answer of the style's API; `json` if its content-type says so.
    Answer { json: bool },
}

/// The parser of a request's body where it stood between two bytes; see [`BodyParser::save`].
#[derive(Debug)]
pub(crate) struct SavedParser {
    style: ApiStyle,
    reader: Box<Reader>,
    summary: Summary,
}

impl SavedParser {
    /// Memory that it takes, about.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>() + self.reader.bytes()
    }
}

/// Reads one body. Make one per direction of an exchange.
#[derive(Debug)]
pub struct BodyParser {
    style: ApiStyle,
    framing: Framing,
    request: bool,
    parser: Parser,
    /// Blanks are being skipped.
    leading: bool,
    summary: Summary,
    finished: bool,
}

impl BodyParser {
    /// The parser for a request's body, from its path (query included or not) and its content-type header.
    ///
    /// # Errors
    /// The reason why such bodies are not inspected.
    pub fn for_request(path: &[u8], content_type: Option<&[u8]>) -> Result<Self, NotInspected> {
        Self::for_request_of(ApiStyle::of_path(path), content_type)
    }

    /// The same, once it is known of which API the path is.
    pub(crate) fn for_request_of(
        style: Option<ApiStyle>,
        content_type: Option<&[u8]>,
    ) -> Result<Self, NotInspected> {
        match style {
            // Servers read JSON whatever the content-type claims.
            Some(style) if style != ApiStyle::GraphQl => {
                let reader = Reader::whole(Schema { style, mode: Mode::Request }, false);
                Ok(Self::new(style, true, Parser::Documents(Box::new(reader))))
            }
            style => {
                let media = Media::of(content_type)?;
                match (style, media) {
                    (Some(style), Media::Json) => {
                        let reader = Reader::whole(Schema { style, mode: Mode::Request }, false);
                        Ok(Self::new(style, true, Parser::Documents(Box::new(reader))))
                    }
                    _ => Self::generic(media, content_type, true),
                }
            }
        }
    }

    /// The parser for a response's body, from the style of its request ([`ApiStyle::of_path`], or
    /// [`BodyParser::style`] where the body told) and its own content-type header.
    ///
    /// # Errors
    /// The reason why such bodies are not inspected.
    pub fn for_response(
        request: Option<ApiStyle>,
        content_type: Option<&[u8]>,
    ) -> Result<Self, NotInspected> {
        let media = Media::of(content_type)?;
        let Some(style) = request.filter(|style| style.has_schema() && *style != ApiStyle::GraphQl) else {
            return Self::generic(media, content_type, false);
        };
        Ok(match media {
            Media::EventStream => Self::new(style, false, Parser::Events(Box::new(Events::new(style)))),
            Media::AmazonEventStream => Self::new(style, false, Parser::Frames(Box::new(Frames::new(style)))),
            Media::JsonLines => {
                Self::new(style, false, Parser::Documents(Box::new(Reader::self_framed(style))))
            }
            Media::Json => Self::new(style, false, Parser::Unknown(After::Answer { json: true })),
            Media::Unknown | Media::Text => {
                Self::new(style, false, Parser::Unknown(After::Answer { json: false }))
            }
            Media::Form | Media::Multipart => return Self::generic(media, content_type, false),
        })
    }

    fn generic(media: Media, content_type: Option<&[u8]>, request: bool) -> Result<Self, NotInspected> {
        let (style, parser) = match media {
            Media::Json => (ApiStyle::Json, Parser::Unknown(After::Any { many: false })),
            Media::JsonLines => (ApiStyle::Json, Parser::Json(Tokenizer::new(true))),
            Media::EventStream => {
                (ApiStyle::Sse, Parser::SniffedEvents(Box::new((EventSniffer::new(request), Vec::new()))))
            }
            Media::Form => (ApiStyle::Form, Parser::Form(Form::default())),
            Media::Text => (ApiStyle::Text, Parser::Text),
            Media::Unknown => (ApiStyle::Unlabelled, Parser::Unknown(After::Any { many: true })),
            Media::Multipart => {
                let multipart = content_type.and_then(Multipart::new).ok_or(NotInspected::Multipart)?;
                (ApiStyle::Multipart, Parser::Multipart(Box::new(multipart)))
            }
            // Whose it is, its documents' keys say.
            Media::AmazonEventStream => {
                (ApiStyle::Json, Parser::Frames(Box::new(Frames::new(ApiStyle::Json))))
            }
        };
        Ok(Self::new(style, request, parser))
    }

    fn new(style: ApiStyle, request: bool, parser: Parser) -> Self {
        let framing = match &parser {
            Parser::Events(_) | Parser::RawEvents(..) | Parser::SniffedEvents(_) => Framing::Sse,
            Parser::Frames(_) => Framing::AwsEventStream,
            Parser::Documents(reader) if reader.is_self_framed() => Framing::JsonLines,
            _ => Framing::Whole,
        };
        let leading = matches!(parser, Parser::Documents(_) | Parser::Json(_) | Parser::Unknown(_));
        Self { style, framing, request, parser, leading, summary: Summary::default(), finished: false }
    }

    /// Whether nothing was read yet of a body that may be a document of a known API in a request.
    pub(crate) fn may_resume(&self) -> bool {
        self.request
            && self.summary.body_bytes == 0
            && match &self.parser {
                Parser::Documents(reader) => !reader.is_self_framed(),
                Parser::Unknown(_) => true,
                _ => false,
            }
    }

    /// Where it stands, in a document of a known API.
    pub(crate) fn save(&self) -> Option<SavedParser> {
        let Parser::Documents(reader) = &self.parser else { return None };
        let inside = !self.leading && !self.finished;
        inside.then(|| SavedParser { style: self.style, reader: reader.clone(), summary: self.summary })
    }

    /// Takes up what was [saved](Self::save), in the place of reading the same bytes with a parser that was made
    /// alike and [may](Self::may_resume).
    pub(crate) fn resume(&mut self, saved: &SavedParser) {
        let SavedParser { style, reader, summary } = saved;
        (self.style, self.summary, self.leading) = (*style, *summary, false);
        self.parser = Parser::Documents(reader.clone());
    }

    /// How this body is read. Where path and content-type did not tell, the body may while it is read.
    pub fn style(&self) -> ApiStyle {
        self.style
    }

    /// How its documents stand in it, as the content-type says.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Reads the next bytes of the body, cut anywhere. After [`BodyParser::finish`] it does nothing.
    pub fn push(&mut self, chunk: &[u8], sink: &mut impl Sink) {
        if self.finished {
            return;
        }
        let mut base = self.summary.body_bytes;
        self.summary.body_bytes += chunk.len() as u64;
        let mut chunk = chunk;
        if self.leading {
            let blank = chunk.iter().take_while(|byte| matches!(byte, b' ' | b'\n' | b'\r' | b'\t')).count();
            self.summary.leading_blank_bytes += blank as u64;
            base += blank as u64;
            chunk = chunk.get(blank..).unwrap_or_default();
            let Some(first) = chunk.first() else { return };
            self.leading = false;
            if let Parser::Unknown(after) = self.parser {
                self.parser = self.by_first_byte(*first, after);
            }
        }
        let (kept_bytes, decided) = match &mut self.parser {
            Parser::Sniffed(parts) => keep(&mut parts.1, chunk, |head| parts.0.push(head)),
            Parser::SniffedEvents(parts) => keep(&mut parts.1, chunk, |head| parts.0.push(head)),
            _ => (0, Some(None)),
        };
        if kept_bytes > 0 {
            let Some(style) = decided else { return };
            self.sniffed(style, sink);
            (chunk, base) = (chunk.get(kept_bytes..).unwrap_or_default(), base + kept_bytes as u64);
        }
        if !chunk.is_empty() {
            self.read(chunk, base, sink);
        }
    }

    /// The parser of a body that is JSON if its first byte says so.
    fn by_first_byte(&self, first: u8, after: After) -> Parser {
        let opens = matches!(first, b'{' | b'[');
        match after {
            After::Answer { json } if opens || json => {
                // A single document of Ollama's is a stream of one; Gemini's streams are arrays.
                let stream =
                    self.style == ApiStyle::Ollama || first == b'[' && self.style == ApiStyle::Gemini;
                let schema = Schema { style: self.style, mode: Mode::Response };
                Parser::Documents(Box::new(if stream {
                    Reader::self_framed(self.style)
                } else {
                    Reader::whole(schema, false)
                }))
            }
            After::Any { .. } if opens => Parser::Sniffed(Box::new((Sniffer::new(self.request), Vec::new()))),
            After::Any { many: false } => Parser::Json(Tokenizer::new(false)),
            _ => Parser::CheckedText(Utf8::new(), None),
        }
    }

    /// The body's API is known, or that it has none: reads what was kept.
    fn sniffed(&mut self, style: Option<ApiStyle>, sink: &mut impl Sink) {
        let mode = if self.request { Mode::Request } else { Mode::Response };
        let many = self.style == ApiStyle::Unlabelled;
        let events = matches!(self.parser, Parser::SniffedEvents(_));
        let parser = match style {
            Some(style) if events => Parser::Events(Box::new(Events::new(style))),
            Some(style) => Parser::Documents(Box::new(Reader::whole(Schema { style, mode }, many))),
            None if events => Parser::RawEvents(EventReader::new(), DataUnit::default()),
            None => Parser::Json(Tokenizer::new(many)),
        };
        self.style = style.unwrap_or(self.style);
        match mem::replace(&mut self.parser, parser) {
            Parser::Sniffed(parts) => self.read(&parts.1, self.summary.leading_blank_bytes, sink),
            Parser::SniffedEvents(parts) => self.read(&parts.1, 0, sink),
            _ => {}
        }
    }

    fn read(&mut self, chunk: &[u8], base: u64, sink: &mut impl Sink) {
        match &mut self.parser {
            Parser::Documents(reader) => reader.push(chunk, base, sink),
            Parser::Events(events) => events.push(chunk, base, sink),
            Parser::Frames(frames) => frames.push(chunk, base, sink),
            Parser::RawEvents(reader, unit) => reader.push(chunk, base, &mut DataLines { unit, sink }),
            Parser::Form(form) => form.push(chunk, base, sink),
            Parser::Multipart(multipart) => multipart.push(chunk, base, sink),
            Parser::Json(tokenizer) => {
                tokenizer.push(chunk, base, &mut ());
                sink.text(BODY, chunk, base);
            }
            Parser::CheckedText(utf8, error) => {
                if error.is_none()
                    && let Err(index) = utf8.push(chunk)
                {
                    *error = Some(ContentError::InvalidUtf8 { offset: base + index as u64 });
                }
                sink.text(BODY, chunk, base);
            }
            // The last three read nothing before they are decided.
            Parser::Text | Parser::Unknown(_) | Parser::Sniffed(_) | Parser::SniffedEvents(_) => {
                sink.text(BODY, chunk, base);
            }
        }
    }

    /// Ends the body: every open unit is ended, then says what was read. An empty body is no error. A second
    /// call changes nothing and returns the summary.
    ///
    /// # Errors
    /// The first reason why the body could not be read to its end.
    pub fn finish(&mut self, sink: &mut impl Sink) -> Result<Summary, ContentError> {
        if self.finished {
            return Ok(self.summary);
        }
        self.finished = true;
        let body_bytes = self.summary.body_bytes;
        if let Parser::Sniffed(_) | Parser::SniffedEvents(_) = self.parser {
            self.sniffed(None, sink);
        }
        let result = match &mut self.parser {
            // A body with nothing but blanks (or nothing at all) has no unit.
            _ if self.leading && body_bytes == 0 => Ok(()),
            Parser::Documents(reader) => {
                let result = reader.finish(sink);
                self.summary.take(reader);
                self.summary.terminated |= result.is_ok() && self.framing == Framing::Whole;
                result
            }
            Parser::Events(events) => {
                let result = events.finish(body_bytes, sink);
                self.summary.take(events.reader());
                result
            }
            Parser::Frames(frames) => {
                let result = frames.finish(body_bytes, sink);
                self.summary.take(frames.reader());
                result
            }
            Parser::RawEvents(reader, unit) => {
                reader.finish(body_bytes, &mut DataLines { unit, sink });
                self.summary.events = unit.events;
                if unit.given {
                    sink.end(BODY);
                }
                Ok(())
            }
            Parser::Json(tokenizer) => {
                if !self.leading {
                    sink.end(BODY);
                }
                tokenizer.finish(&mut ())
            }
            Parser::CheckedText(utf8, error) => {
                sink.end(BODY);
                match error {
                    Some(error) => Err(*error),
                    None if !utf8.is_complete() => Err(ContentError::InvalidUtf8 { offset: body_bytes }),
                    None => Ok(()),
                }
            }
            Parser::Form(form) if body_bytes > 0 => {
                form.finish(body_bytes, sink);
                sink.end(BODY);
                Ok(())
            }
            Parser::Multipart(multipart) if body_bytes > 0 => {
                let result = multipart.finish(body_bytes, sink);
                self.summary.skipped_bytes = multipart.skipped_bytes;
                self.summary.media = multipart.media;
                result
            }
            Parser::Text if body_bytes > 0 => {
                sink.end(BODY);
                Ok(())
            }
            // JSON that never began.
            Parser::Unknown(After::Any { many: false } | After::Answer { json: true }) => {
                Err(ContentError::Truncated)
            }
            Parser::Text
            | Parser::Form(_)
            | Parser::Multipart(_)
            | Parser::Unknown(_)
            | Parser::Sniffed(_)
            | Parser::SniffedEvents(_) => Ok(()),
        };
        result.map(|()| self.summary)
    }

    /// What was read so far; complete after [`BodyParser::finish`], also when that failed.
    pub fn summary(&self) -> Summary {
        self.summary
    }
}

impl Summary {
    /// What the reader of the documents found out.
    fn take(&mut self, reader: &Reader) {
        *self = Self {
            body_bytes: self.body_bytes,
            leading_blank_bytes: self.leading_blank_bytes,
            ..reader.document.summary
        };
    }
}

/// Keeps what of `chunk` may still be needed to decide on the style; returns how much that is, and the decision.
fn keep(
    kept: &mut Vec<u8>,
    chunk: &[u8],
    decide: impl FnOnce(&[u8]) -> Option<Option<ApiStyle>>,
) -> (usize, Option<Option<ApiStyle>>) {
    let room = MAX_SNIFFED_BYTES.saturating_sub(kept.len()).min(chunk.len());
    let head = chunk.get(..room).unwrap_or_default();
    kept.extend_from_slice(head);
    let full = kept.len() >= MAX_SNIFFED_BYTES;
    (room, decide(head).or(full.then_some(None)))
}

/// The one unit of a body without known schema.
const BODY: Unit = Unit { role: Role::Body, index: 0 };

/// Other event streams, as one text: each line's content with a newline after it.
#[derive(Debug, Default)]
struct DataUnit {
    /// The event has data, so a newline closes it.
    has_data: bool,
    /// Where the last piece of another line ended: the newline after it is given from there.
    other_end: u64,
    given: bool,
    events: u64,
}

struct DataLines<'a, S: Sink> {
    unit: &'a mut DataUnit,
    sink: &'a mut S,
}

impl<S: Sink> sse::Handler for DataLines<'_, S> {
    fn data(&mut self, piece: &[u8], body_offset: u64) {
        self.unit.given = true;
        self.unit.has_data = true;
        self.sink.text(BODY, piece, body_offset);
    }

    // Event names, ids and comments reach the application too.
    fn other(&mut self, piece: &[u8], body_offset: u64) {
        self.unit.given = true;
        self.unit.other_end = body_offset + piece.len() as u64;
        self.sink.text(BODY, piece, body_offset);
    }

    fn other_end(&mut self) {
        self.sink.text(BODY, b"\n", self.unit.other_end);
    }

    fn event_end(&mut self, body_offset: u64) {
        if core::mem::take(&mut self.unit.has_data) {
            self.unit.events += 1;
            self.sink.text(BODY, b"\n", body_offset);
        }
    }
}
