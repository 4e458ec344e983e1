//! A JSON document of a known API to content units: requests, whole answers and streamed answers.
//!
//! `Schema` says what each value means; this follows the document. A scored string is a unit: its text is cut
//! out between its quotes. What the schema calls raw (a tool call's input, a structured result) is a unit too,
//! with its JSON source as text, so that it reads as the same thing does where an API sends it as a string.
//! Name and arguments of a call are one unit. In a stream the pieces are joined per choice, block and kind;
//! what an event repeats whole (OpenAI responses do) is units of its own.
//!
//! Everything else is the `ENVELOPE`: the body's own bytes. In values that carry media or opaque signatures
//! base64 (plain or in a data URL) is cut out after its first `BLOB_SAMPLE_BYTES` and counted, media also by
//! number; so are embeddings' numbers and random stream padding (`obfuscation`, `p`).
//!
//! What decides about a text may come after it: the `role` of its message, a choice's or block's index, the
//! `thought` of Gemini's parts, an event's `type`. Such text is held, at most `MAX_HELD_BYTES`. Beyond that a
//! request's message counts as the user's, an answer's as the assistant's, and a choice as the one at its
//! position. The first `role` or `index` of an object counts. Cost: the tokenizer's, plus a copy of held text.

mod held;
mod pass;

use held::{Held, OpenUnits, Ordinals, Piece, StreamKey};
use pass::Pass;

use super::schema::{Field, Kind, Mode, Place, Schema};
use super::style::ApiStyle;
use super::{ContentError, Label, Role, Sink, Summary, Unit};
use crate::envelope::{ENVELOPE, Envelope};
use crate::json::Tokenizer;
use alloc::vec::Vec;
use core::mem;

/// Tool calls told apart within one event; later ones join the last.
const MAX_CALLS: usize = 64;
/// Base64 characters of a run that the envelope keeps: enough for the file's signature.
pub(crate) const BLOB_SAMPLE_BYTES: usize = 48;

/// The string being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Active {
    None,
    Scored(Kind),
    Captured(Field),
    /// Base64 characters seen in a row where media may stand (at the start, or after the comma of a data URL,
    /// RFC 2397; a web address is not media), how many of them are kept, and how many were not.
    Blob {
        run: Option<usize>,
        keep: usize,
        skipped: u64,
        media: bool,
    },
}

/// Everything known of the message but the tokenizer's state.
#[derive(Clone, Debug)]
pub(super) struct Document {
    schema: Schema,
    /// Documents end by themselves; the stream's framing does not say where.
    self_framed: bool,
    /// The documents of such a stream are the elements of a list.
    in_list: bool,
    pub(super) envelope: Envelope,
    places: Vec<Place>,
    /// The meaning of the next value.
    slot: Place,
    /// Depth of the outermost container whose texts are not joined over events.
    whole: Option<usize>,
    /// Depth of the value whose source is a unit, and that unit.
    raw: Option<(usize, Unit)>,
    /// Where the numbers that are being skipped begin.
    numbers_from: Option<u64>,
    /// Position of the next value's key in the held envelope.
    key_at: Option<usize>,
    /// Position of the value being read and of its key.
    value: (usize, usize),
    active: Active,
    /// Strings begun so far.
    strings: u64,
    ordinals: Ordinals,
    /// Unit of the string or tool call being read.
    string_unit: Option<Unit>,
    call_unit: Option<Unit>,
    /// The message's role, and whether it said so itself.
    role: Option<Role>,
    role_given: bool,
    /// Whether Gemini's part is a thought, and its first held piece.
    thought: Option<bool>,
    part_from: usize,
    /// The document being read is plain text.
    plain: bool,
    captured: Label,
    event_type: Label,
    held: Held,
    /// The choice's `index` and its position in `choices`.
    choice: Option<u64>,
    choice_position: u64,
    /// Index of the event's content block.
    block: Option<u64>,
    /// `index` of the choice's tool calls.
    calls: Vec<Option<u64>>,
    /// The choice or event outgrew the bound: no more holding until it ends.
    direct: bool,
    open: OpenUnits,
    /// The event being read is the stream's last.
    last_event: bool,
    pub(super) summary: Summary,
}

impl Document {
    fn new(schema: Schema, self_framed: bool) -> Self {
        Self {
            schema,
            self_framed,
            in_list: false,
            envelope: if schema.mode == Mode::Stream { Envelope::by_event() } else { Envelope::whole() },
            places: Vec::new(),
            slot: Place::Top,
            whole: None,
            raw: None,
            numbers_from: None,
            key_at: None,
            value: (0, 0),
            active: Active::None,
            strings: 0,
            ordinals: Ordinals::default(),
            string_unit: None,
            call_unit: None,
            role: None,
            role_given: false,
            thought: None,
            part_from: 0,
            plain: false,
            captured: Label::default(),
            event_type: Label::default(),
            held: Held::default(),
            choice: None,
            choice_position: 0,
            block: None,
            calls: Vec::new(),
            direct: false,
            open: OpenUnits::default(),
            last_event: false,
            summary: Summary::default(),
        }
    }

    fn is_stream(&self) -> bool {
        self.schema.mode == Mode::Stream
    }

    /// The role of a message that names none.
    fn default_role(&self) -> Role {
        if self.schema.mode == Mode::Request { Role::User } else { Role::Assistant }
    }

    fn role_of(&self, kind: Kind) -> Option<Role> {
        Some(match kind {
            Kind::Spoken => return self.role,
            Kind::System => Role::System,
            Kind::User => Role::User,
            Kind::Assistant | Kind::Refusal | Kind::Transcript => Role::Assistant,
            Kind::Reasoning | Kind::ReasoningContent | Kind::ReasoningDetail => Role::Reasoning,
            Kind::Call | Kind::LegacyCall | Kind::RepeatedCall => Role::ToolCall,
            Kind::Result => Role::ToolResult,
            Kind::Query => Role::Body,
            Kind::Delta => return None,
            Kind::Repeat => self.role_of_event(),
        })
    }

    /// What the pieces of an event of the responses API are, from its type.
    fn role_of_event(&self) -> Role {
        let name = self.event_type.bytes();
        let holds = |part: &[u8]| name.windows(part.len()).any(|window| window == part);
        if holds(b"reasoning") {
            Role::Reasoning
        } else if holds(b"_call") || holds(b"arguments") {
            Role::ToolCall
        } else {
            Role::Assistant
        }
    }

    /// Whether a part is a thought may come after its text.
    fn awaits_thought(&self, kind: Kind) -> bool {
        self.schema.style == ApiStyle::Gemini
            && self.thought.is_none()
            && matches!(kind, Kind::Spoken | Kind::Assistant)
    }

    /// The next piece of a scored text.
    #[inline]
    fn text(&mut self, kind: Kind, text: &[u8], body_offset: u64, escape: bool, sink: &mut impl Sink) {
        match self.string_unit {
            Some(unit) => sink.text(unit, text, body_offset),
            None => self.first_text(kind, text, body_offset, escape, sink),
        }
    }

    /// A piece of a text whose unit is not settled for the rest of its string.
    fn first_text(&mut self, kind: Kind, text: &[u8], body_offset: u64, escape: bool, sink: &mut impl Sink) {
        let thought = self.thought == Some(true) && matches!(kind, Kind::Spoken | Kind::Assistant);
        let kind = if thought { Kind::Reasoning } else { kind };
        let joined =
            self.is_stream() && self.whole.is_none() && !matches!(kind, Kind::Repeat | Kind::RepeatedCall);
        let role = self.role_of(kind);
        let awaits = self.awaits_thought(kind);
        if joined && !self.direct || !joined && (role.is_none() || awaits) {
            let call = self.calls.len().saturating_sub(1);
            let string = self.strings;
            let piece = Piece { kind, role, joined, call, string, body_offset, len: text.len(), escape };
            if self.held.push(text, piece) {
                return;
            }
            self.direct |= joined;
            if awaits {
                self.thought = Some(false);
            }
            if role.is_none() {
                self.role = Some(self.default_role());
            }
            self.release(sink);
        }
        let role = self.role_of(kind).unwrap_or_else(|| self.role_of_event());
        let unit = if joined {
            let key = self.stream_key(kind, role, self.calls.len().saturating_sub(1));
            self.open.unit(key, &mut self.ordinals)
        } else if matches!(kind, Kind::Call | Kind::LegacyCall) {
            *self.call_unit.get_or_insert_with(|| self.ordinals.next(role))
        } else {
            *self.string_unit.get_or_insert_with(|| self.ordinals.next(role))
        };
        sink.text(unit, text, body_offset);
    }

    /// Gives what is held; what no role is known for counts as the message's or the default.
    fn release(&mut self, sink: &mut impl Sink) {
        let mut held = mem::take(&mut self.held);
        let mut last = None;
        held.drain(|piece, text| {
            let unit = if piece.joined {
                let role = piece.role.unwrap_or_else(|| match piece.kind {
                    Kind::Delta => self.role_of_event(),
                    _ => self.role.unwrap_or(self.default_role()),
                });
                let key = self.stream_key(piece.kind, role, piece.call);
                self.open.unit(key, &mut self.ordinals)
            } else {
                match last {
                    Some((string, unit)) if string == piece.string => unit,
                    _ => {
                        if let Some((_, unit)) = last {
                            sink.end(unit);
                        }
                        let role = piece.role.or(self.role).unwrap_or(self.default_role());
                        let unit = self.ordinals.next(role);
                        last = Some((piece.string, unit));
                        unit
                    }
                }
            };
            sink.text(unit, text, piece.body_offset);
        });
        self.held = held;
        self.part_from = 0;
        match last {
            Some((string, unit)) if string == self.strings && matches!(self.active, Active::Scored(_)) => {
                self.string_unit = Some(unit);
            }
            Some((_, unit)) => sink.end(unit),
            None => {}
        }
    }

    /// The message's role is known or given up: its held texts have it.
    fn settle(&mut self, role: Role, sink: &mut impl Sink) {
        self.role = Some(role);
        for piece in &mut self.held.pieces {
            if piece.kind == Kind::Spoken {
                piece.role.get_or_insert(role);
            }
        }
        self.release_whole(sink);
    }

    /// Outside a stream, what waits for nothing more is given.
    fn release_whole(&mut self, sink: &mut impl Sink) {
        if !self.is_stream() && self.held.pieces.iter().all(|piece| piece.role.is_some()) {
            self.release(sink);
        }
    }

    /// Gemini's part is complete: its texts are thoughts or not.
    fn end_part(&mut self, sink: &mut impl Sink) {
        let thought = self.thought.take() == Some(true);
        for piece in self.held.pieces.iter_mut().skip(mem::take(&mut self.part_from)) {
            if thought && matches!(piece.kind, Kind::Spoken | Kind::Assistant) {
                (piece.kind, piece.role) = (Kind::Reasoning, Some(Role::Reasoning));
            }
        }
        self.release_whole(sink);
    }

    /// Settles the choice's and the call's number: a missing `index` is the position.
    fn stream_key(&mut self, kind: Kind, role: Role, call: usize) -> StreamKey {
        let choice = *self.choice.get_or_insert(self.choice_position);
        let part = match (kind, self.calls.get_mut(call)) {
            (Kind::Call, Some(index)) => *index.get_or_insert(call as u64),
            _ => self.block.unwrap_or(0),
        };
        StreamKey { choice, role, kind, part }
    }

    fn end_unit(unit: &mut Option<Unit>, sink: &mut impl Sink) {
        if let Some(unit) = unit.take() {
            sink.end(unit);
        }
    }

    /// An event of a stream is over: nothing of it stays held.
    fn end_event(&mut self, sink: &mut impl Sink) {
        self.release(sink);
        self.calls.clear();
        (self.choice, self.choice_position, self.block) = (None, 0, None);
        self.direct = false;
        self.event_type = Label::default();
        if mem::take(&mut self.last_event) {
            self.end_open(sink);
        }
    }

    /// The stream's texts are complete. Told at its last event, not at its end, so that they are judged before
    /// a client that hangs up at that event has it; a text that comes after all is a unit of its own.
    pub(super) fn end_open(&mut self, sink: &mut impl Sink) {
        for (_, unit) in self.open.0.drain(..) {
            sink.end(unit);
        }
    }

    /// The document or event is over, complete or not: nothing stays held, nothing is half open. `body_bytes`:
    /// of the body so far.
    fn close(&mut self, pending_escape: (&[u8], u64), body_bytes: u64, sink: &mut impl Sink) {
        match self.active {
            Active::Scored(_) => self.envelope.put(pending_escape.0, pending_escape.1, sink),
            Active::Blob { skipped, media, .. } => {
                self.envelope.put(pending_escape.0, pending_escape.1, sink);
                self.skip(skipped, media, sink);
            }
            Active::None | Active::Captured(_) => {}
        }
        if let Some(from) = self.numbers_from.take() {
            self.skip(body_bytes.saturating_sub(from), false, sink);
        }
        self.end_part(sink);
        self.end_event(sink);
        self.active = Active::None;
        Self::end_unit(&mut self.string_unit, sink);
        if let Some((_, unit)) = self.raw.take()
            && self.call_unit != Some(unit)
        {
            sink.end(unit);
        }
        Self::end_unit(&mut self.call_unit, sink);
        (self.role, self.role_given, self.whole) = (None, false, None);
        self.places.clear();
        self.slot = Place::Top;
        self.key_at = None;
    }

    fn skip(&mut self, bytes: u64, media: bool, sink: &mut impl Sink) {
        if bytes > 0 {
            self.summary.skipped_bytes += bytes;
            self.summary.media += u32::from(media);
            sink.skipped(ENVELOPE, bytes);
        }
    }

    /// A short string is complete.
    fn captured(&mut self, field: Field, sink: &mut impl Sink) {
        let label = mem::take(&mut self.captured);
        match field {
            Field::Role => {
                if !mem::replace(&mut self.role_given, true) {
                    self.settle(Role::of_message(label.bytes()), sink);
                }
            }
            Field::ItemType => {
                if label.bytes() == b"reasoning" {
                    self.settle(Role::Reasoning, sink);
                }
            }
            Field::EventType => self.event_type = label,
            Field::MediaType => self.plain = label.bytes() == b"text",
            Field::Model => self.summary.model = self.summary.model.or(Some(label)),
            Field::Finish => self.summary.finish_reason = Some(label),
        }
        let last = match field {
            Field::EventType => matches!(
                label.bytes(),
                b"response.completed"
                    | b"response.incomplete"
                    | b"response.failed"
                    | b"message_stop"
                    | b"message-end"
                    | b"stream-end"
            ),
            // Neither has a last event of its own.
            Field::Finish => {
                matches!(
                    self.schema.style,
                    ApiStyle::Gemini | ApiStyle::BedrockConverse | ApiStyle::BedrockInvoke
                )
            }
            _ => false,
        };
        self.summary.terminated |= last && self.is_stream();
        self.last_event |= last && self.is_stream() && field == Field::EventType;
    }
}

/// Reads documents: one, several that follow one another, or the events of a stream one by one.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    tokenizer: Tokenizer,
    pub(super) document: Document,
    /// End of what was read, in the body.
    read: u64,
}

impl Reader {
    /// For a request or a whole answer (or a batch of them in an array); `many` may follow one another.
    pub(super) fn whole(schema: Schema, many: bool) -> Self {
        Self { tokenizer: Tokenizer::new(many), document: Document::new(schema, false), read: 0 }
    }

    /// For documents that follow one another or are the elements of one array.
    pub(super) fn self_framed(style: ApiStyle) -> Self {
        let schema = Schema { style, mode: Mode::Stream };
        Self { tokenizer: Tokenizer::new(true), document: Document::new(schema, true), read: 0 }
    }

    /// For events, each ended by [`Reader::end_document`].
    pub(super) fn by_event(style: ApiStyle) -> Self {
        let schema = Schema { style, mode: Mode::Stream };
        Self { tokenizer: Tokenizer::new(false), document: Document::new(schema, false), read: 0 }
    }

    pub(super) fn is_self_framed(&self) -> bool {
        self.document.self_framed
    }

    /// Memory that it takes, about.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + self.document.held.memory()
    }

    /// Reads the next bytes. After an error the rest of the body is envelope, from the offending byte on.
    pub(super) fn push(&mut self, chunk: &[u8], base: u64, sink: &mut impl Sink) {
        let failed_before = self.tokenizer.error().is_some();
        let cut = matches!(self.document.active, Active::Scored(_) | Active::Blob { .. })
            || self.document.numbers_from.is_some();
        let from = if cut { None } else { Some(0) };
        let mut pass = Pass { document: &mut self.document, sink, chunk, base, from };
        let read = self.tokenizer.push(chunk, base, &mut pass);
        pass.give(read);
        self.read = base + read as u64;
        if self.tokenizer.error().is_some() {
            if !failed_before {
                self.document.close(self.tokenizer.pending_escape(), self.read, sink);
            }
            let rest = chunk.get(read..).unwrap_or_default();
            self.document.envelope.put(rest, base + read as u64, sink);
        }
    }

    /// The document is complete, or what came of it.
    pub(super) fn end_document(&mut self, sink: &mut impl Sink) -> Result<(), ContentError> {
        let mut pass = Pass { document: &mut self.document, sink, chunk: &[], base: 0, from: None };
        let result = self.tokenizer.finish(&mut pass);
        self.document.close(self.tokenizer.pending_escape(), self.read, sink);
        result
    }

    /// The event is complete; another may follow.
    pub(super) fn end_event(&mut self, sink: &mut impl Sink) -> Result<(), ContentError> {
        let result = self.end_document(sink);
        self.tokenizer = Tokenizer::new(false);
        self.document.summary.events += 1;
        result
    }

    /// The body is complete.
    pub(super) fn finish(&mut self, sink: &mut impl Sink) -> Result<(), ContentError> {
        let result = self.end_document(sink);
        self.end_units(sink);
        result
    }

    /// Ends what is open over a stream's events.
    pub(super) fn end_units(&mut self, sink: &mut impl Sink) {
        self.document.end_open(sink);
        self.document.envelope.finish(sink);
    }
}
