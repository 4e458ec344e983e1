//! OpenAI chat completions to content units: requests, whole answers and streamed answers.
//!
//! Source: the OpenAI API reference (chat completions) and what compatible servers really send. Scored texts:
//! - request `messages[*].content` (a string, or an array of parts with `text`) under the message's role;
//! - `tool_calls[*].function.{name,arguments}` (`custom.{name,input}`, the old `function_call`): one tool-call
//!   unit per call, name and arguments joined in the order they come;
//! - `refusal`, `reasoning`, `reasoning_content`, `reasoning_details[*].{text,summary}`, `audio.transcript`:
//!   assistant;
//! - `choices[*].message` in a whole answer, `choices[*].delta` in a stream: there the pieces are joined per
//!   choice and kind into one unit.
//!
//! Everything else is the `ENVELOPE`: the body's own bytes, with the scored texts cut out between their
//! quotes. In values that carry media (`is_blob_key`) base64 (plain or in a data URL) is cut out after its
//! first `BLOB_SAMPLE_BYTES` and counted; so is the random stream padding (`obfuscation`, `p`).
//!
//! `role` may come after `content`, and a choice's `index` after its `delta`: such text is held, at most
//! `MAX_HELD_BYTES`. Beyond that a request's message counts as the user's and a choice as the one at its
//! position. The first `role` or `index` of an object counts. Cost: the tokenizer's, plus a copy of held text.

use crate::content::{ContentError, Role, Sink, Unit, Usage};
use crate::envelope::{ENVELOPE, Envelope, Value};
use crate::json::{Container, Handler, Tokenizer};
use crate::sse;
use alloc::vec::Vec;
use core::mem;

/// Text held while its role or choice is unknown.
pub(crate) const MAX_HELD_BYTES: usize = 64 * 1024;
/// Pieces (runs and escapes) held meanwhile.
pub(crate) const MAX_HELD_PIECES: usize = 4096;
/// Units a stream keeps apart; what opens later joins one shared unit per kind.
pub(crate) const MAX_OPEN_UNITS: usize = 64;
/// Tool calls told apart within one event; later ones join the last.
const MAX_CALLS: usize = 64;
/// Base64 characters of a run that the envelope keeps: enough for the file's signature.
pub(crate) const BLOB_SAMPLE_BYTES: usize = 48;

/// Which of the three bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Request,
    Response,
    Stream,
}

/// What a scored text is; in a stream, texts of one kind and choice are one unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Content,
    Refusal,
    Reasoning,
    ReasoningContent,
    ReasoningDetail,
    Transcript,
    Call,
    LegacyCall,
}

/// The meaning of a value, from its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Other,
    Top,
    Messages,
    Message,
    Content,
    ToolCalls,
    ToolCall,
    Function,
    LegacyCall,
    Details,
    Detail,
    Audio,
    Choices,
    Choice,
    Usage,
    Text(Kind),
    Role,
    ChoiceIndex,
    CallIndex,
    /// Where media are, in a content part or an answer.
    Media,
    Blob,
    Padding,
    PromptTokens,
    CompletionTokens,
    TotalTokens,
}

/// Keys whose strings may hold base64 media or opaque signatures.
fn is_blob_key(key: &[u8]) -> bool {
    matches!(
        key,
        b"url"
            | b"image_url"
            | b"file_url"
            | b"video_url"
            | b"document_url"
            | b"data"
            | b"file_data"
            | b"b64_json"
            | b"signature"
            | b"thought_signature"
            | b"encrypted_content"
    )
}

impl Place {
    /// The meaning of the value under `key` of an object that means `self`.
    fn child(self, key: Option<&[u8]>, mode: Mode) -> Self {
        let Some(key) = key else { return Self::Other };
        match (self, key) {
            (Self::Top, b"messages") if mode == Mode::Request => Self::Messages,
            (Self::Top, b"choices") if mode != Mode::Request => Self::Choices,
            (Self::Top, b"usage") if mode != Mode::Request => Self::Usage,
            (Self::Top, b"obfuscation" | b"p") if mode == Mode::Stream => Self::Padding,
            (Self::Choice, b"message") if mode == Mode::Response => Self::Message,
            (Self::Choice, b"delta") if mode == Mode::Stream => Self::Message,
            (Self::Choice, b"index") => Self::ChoiceIndex,
            (Self::Message, b"role") if mode == Mode::Request => Self::Role,
            (Self::Message, b"content") => Self::Content,
            (Self::Message, b"refusal") => Self::Text(Kind::Refusal),
            (Self::Message, b"reasoning") => Self::Text(Kind::Reasoning),
            (Self::Message, b"reasoning_content") => Self::Text(Kind::ReasoningContent),
            (Self::Message, b"reasoning_details") => Self::Details,
            (Self::Message, b"tool_calls") => Self::ToolCalls,
            (Self::Message, b"function_call") => Self::LegacyCall,
            (Self::Message, b"audio") => Self::Audio,
            (Self::Content, b"text" | b"refusal" | b"thinking" | b"content") => Self::Content,
            (Self::ToolCall, b"function" | b"custom") => Self::Function,
            (Self::ToolCall, b"index") => Self::CallIndex,
            (Self::Function, b"name" | b"arguments" | b"input") => Self::Text(Kind::Call),
            (Self::LegacyCall, b"name" | b"arguments") => Self::Text(Kind::LegacyCall),
            (Self::Detail, b"text" | b"summary") => Self::Text(Kind::ReasoningDetail),
            (Self::Audio, b"transcript") => Self::Text(Kind::Transcript),
            (Self::Usage, b"prompt_tokens") => Self::PromptTokens,
            (Self::Usage, b"completion_tokens") => Self::CompletionTokens,
            (Self::Usage, b"total_tokens") => Self::TotalTokens,
            (Self::Message, b"images") => Self::Media,
            // Only where the API puts media: text under such a key anywhere else is scored.
            (Self::Content | Self::Media | Self::Detail | Self::Audio, key) if is_blob_key(key) => Self::Blob,
            (Self::Content, b"input_audio" | b"file" | b"source" | b"video") => Self::Media,
            (Self::Blob, key) if is_blob_key(key) => Self::Blob,
            _ => Self::Other,
        }
    }

    /// The meaning of an array's elements.
    fn element(self) -> Self {
        match self {
            Self::Messages => Self::Message,
            Self::Choices => Self::Choice,
            Self::ToolCalls => Self::ToolCall,
            Self::Details => Self::Detail,
            Self::Content => Self::Content,
            Self::Media => Self::Media,
            _ => Self::Other,
        }
    }

    /// What a container found at this place means: an object where an array belongs has no meaning.
    fn opened(self, container: Container) -> Self {
        let fits = match self {
            Self::Content | Self::Media => true,
            Self::Blob => container == Container::Object,
            Self::Messages | Self::Choices | Self::ToolCalls | Self::Details => container == Container::Array,
            Self::Top | Self::Message | Self::Choice | Self::ToolCall | Self::Function => {
                container == Container::Object
            }
            Self::LegacyCall | Self::Detail | Self::Audio | Self::Usage => container == Container::Object,
            _ => false,
        };
        if fits { self } else { Self::Other }
    }

    fn scored(self) -> Option<Kind> {
        match self {
            Self::Text(kind) => Some(kind),
            Self::Content => Some(Kind::Content),
            _ => None,
        }
    }
}

/// The string being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Active {
    None,
    Scored(Kind),
    Role,
    /// Base64 characters seen in a row where media may stand (at the start, or after the comma of a data URL,
    /// RFC 2397; a web address is not media), how many of them are kept, and how many were not.
    Blob {
        run: Option<usize>,
        keep: usize,
        skipped: u64,
    },
}

/// A run or an escape of a held text.
#[derive(Clone, Copy, Debug)]
struct Piece {
    kind: Kind,
    /// Position of the tool call within the choice.
    call: usize,
    /// Ordinal of the string, so that two strings stay two units.
    string: u64,
    body_offset: u64,
    len: usize,
    escape: bool,
}

#[derive(Debug, Default)]
struct Held {
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
}

impl Held {
    /// `false`: it does not fit, and nothing was kept.
    fn push(&mut self, text: &[u8], piece: Piece) -> bool {
        let joins = self.pieces.last().is_some_and(|last| {
            last.string == piece.string
                && !last.escape
                && !piece.escape
                && last.body_offset + last.len as u64 == piece.body_offset
        });
        if self.bytes.len() + text.len() > MAX_HELD_BYTES || !joins && self.pieces.len() >= MAX_HELD_PIECES {
            return false;
        }
        match self.pieces.last_mut() {
            Some(last) if joins => last.len += text.len(),
            _ => self.pieces.push(piece),
        }
        self.bytes.extend_from_slice(text);
        true
    }

    /// Gives the pieces with their texts and forgets them; the memory is kept for the next.
    fn drain(&mut self, mut give: impl FnMut(Piece, &[u8])) {
        let mut rest = self.bytes.as_slice();
        for piece in self.pieces.drain(..) {
            let (text, after) = rest.split_at_checked(piece.len).unwrap_or((rest, &[]));
            give(piece, text);
            rest = after;
        }
        self.bytes.clear();
    }
}

/// Ordinals handed out per role; the last one is shared by all that come after.
#[derive(Debug, Default)]
struct Ordinals([u16; 1 + Role::Body as usize]);

impl Ordinals {
    fn next(&mut self, role: Role) -> Unit {
        let Some(next) = self.0.get_mut(role as usize) else { return Unit { role, index: u16::MAX } };
        let index = *next;
        *next = next.saturating_add(1);
        Unit { role, index }
    }
}

/// What makes a unit of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct StreamKey {
    choice: u64,
    kind: Kind,
    call: u64,
}

/// Units of a stream, open until its end.
#[derive(Debug, Default)]
struct OpenUnits(Vec<(StreamKey, Unit)>);

impl OpenUnits {
    fn unit(&mut self, key: StreamKey, ordinals: &mut Ordinals) -> Unit {
        let find =
            |units: &[(StreamKey, Unit)], key| units.iter().find(|(k, _)| *k == key).map(|&(_, unit)| unit);
        if let Some(unit) = find(&self.0, key) {
            return unit;
        }
        let key = if self.0.len() < MAX_OPEN_UNITS {
            key
        } else {
            StreamKey { choice: u64::MAX, kind: key.kind, call: u64::MAX }
        };
        find(&self.0, key).unwrap_or_else(|| {
            let call = matches!(key.kind, Kind::Call | Kind::LegacyCall);
            let unit = ordinals.next(if call { Role::ToolCall } else { Role::Assistant });
            self.0.push((key, unit));
            unit
        })
    }
}

/// Everything known of the message but the tokenizer's state.
#[derive(Debug)]
struct Document {
    mode: Mode,
    envelope: Envelope,
    places: Vec<Place>,
    /// The meaning of the next value.
    slot: Place,
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
    /// The message's role, and the text of a `role` being read.
    role: Option<Role>,
    role_text: [u8; 16],
    role_len: usize,
    held: Held,
    /// The choice's `index` and its position in `choices`.
    choice: Option<u64>,
    choice_position: u64,
    /// `index` of the choice's tool calls.
    calls: Vec<Option<u64>>,
    /// The choice outgrew the bound: no more holding until it ends.
    direct: bool,
    open: OpenUnits,
    usage: Usage,
    skipped_bytes: u64,
}

impl Document {
    fn new(mode: Mode) -> Self {
        Self {
            mode,
            envelope: if mode == Mode::Stream { Envelope::by_event() } else { Envelope::whole() },
            places: Vec::new(),
            slot: Place::Top,
            key_at: None,
            value: (0, 0),
            active: Active::None,
            strings: 0,
            ordinals: Ordinals::default(),
            string_unit: None,
            call_unit: None,
            role: None,
            role_text: [0; 16],
            role_len: 0,
            held: Held::default(),
            choice: None,
            choice_position: 0,
            calls: Vec::new(),
            direct: false,
            open: OpenUnits::default(),
            usage: Usage::default(),
            skipped_bytes: 0,
        }
    }

    /// The next piece of a scored text.
    fn text(&mut self, kind: Kind, text: &[u8], body_offset: u64, escape: bool, sink: &mut impl Sink) {
        let call = self.calls.len().saturating_sub(1);
        let piece = Piece { kind, call, string: self.strings, body_offset, len: text.len(), escape };
        let unit = match (self.mode, kind) {
            (Mode::Stream, _) => {
                if !self.direct {
                    if self.held.push(text, piece) {
                        return;
                    }
                    self.direct = true;
                    self.choose(sink);
                }
                let key = self.stream_key(kind, call);
                self.open.unit(key, &mut self.ordinals)
            }
            (_, Kind::Call | Kind::LegacyCall) => {
                *self.call_unit.get_or_insert_with(|| self.ordinals.next(Role::ToolCall))
            }
            (Mode::Request, Kind::Content) => {
                if self.role.is_none() {
                    if self.held.push(text, piece) {
                        return;
                    }
                    self.set_role(Role::User, sink);
                }
                let role = self.role.unwrap_or(Role::User);
                *self.string_unit.get_or_insert_with(|| self.ordinals.next(role))
            }
            _ => *self.string_unit.get_or_insert_with(|| self.ordinals.next(Role::Assistant)),
        };
        sink.text(unit, text, body_offset);
    }

    /// The message's role is known or given up: gives what was held for it.
    fn set_role(&mut self, role: Role, sink: &mut impl Sink) {
        self.role = Some(role);
        let (ordinals, mut last) = (&mut self.ordinals, None);
        self.held.drain(|piece, text| {
            let unit = match last {
                Some((string, unit)) if string == piece.string => unit,
                _ => {
                    if let Some((_, unit)) = last {
                        sink.end(unit);
                    }
                    ordinals.next(role)
                }
            };
            last = Some((piece.string, unit));
            sink.text(unit, text, piece.body_offset);
        });
        match last {
            Some((string, unit)) if string == self.strings && matches!(self.active, Active::Scored(_)) => {
                self.string_unit = Some(unit);
            }
            Some((_, unit)) => sink.end(unit),
            None => {}
        }
    }

    /// The choice is complete or given up: gives what was held for it.
    fn choose(&mut self, sink: &mut impl Sink) {
        let mut held = mem::take(&mut self.held);
        held.drain(|piece, text| {
            let key = self.stream_key(piece.kind, piece.call);
            sink.text(self.open.unit(key, &mut self.ordinals), text, piece.body_offset);
        });
        self.held = held;
    }

    /// Settles the choice's and the call's number: a missing `index` is the position.
    fn stream_key(&mut self, kind: Kind, call: usize) -> StreamKey {
        let choice = *self.choice.get_or_insert(self.choice_position);
        let call = match (kind, self.calls.get_mut(call)) {
            (Kind::Call, Some(index)) => *index.get_or_insert(call as u64),
            _ => 0,
        };
        StreamKey { choice, kind, call }
    }

    fn end_unit(unit: &mut Option<Unit>, sink: &mut impl Sink) {
        if let Some(unit) = unit.take() {
            sink.end(unit);
        }
    }

    /// The document or event is over, complete or not: nothing stays held, nothing is half open.
    fn close(&mut self, pending_escape: (&[u8], u64), sink: &mut impl Sink) {
        match self.active {
            Active::Scored(_) => self.envelope.put(pending_escape.0, pending_escape.1, sink),
            Active::Blob { skipped, .. } => {
                self.envelope.put(pending_escape.0, pending_escape.1, sink);
                self.skip(skipped, sink);
            }
            Active::None | Active::Role => {}
        }
        if self.mode == Mode::Stream {
            self.choose(sink);
        } else if self.role.is_none() {
            self.set_role(Role::User, sink);
        }
        self.active = Active::None;
        Self::end_unit(&mut self.string_unit, sink);
        Self::end_unit(&mut self.call_unit, sink);
        self.places.clear();
        self.slot = Place::Top;
        self.key_at = None;
    }

    fn skip(&mut self, bytes: u64, sink: &mut impl Sink) {
        if bytes > 0 {
            self.skipped_bytes += bytes;
            sink.skipped(ENVELOPE, bytes);
        }
    }
}

/// One push: the document with the chunk it is reading.
struct Pass<'a, S: Sink> {
    document: &'a mut Document,
    sink: &'a mut S,
    chunk: &'a [u8],
    base: u64,
    /// First byte of the chunk that the envelope has not got; `None` inside a string that is cut out.
    from: Option<usize>,
}

impl<S: Sink> Pass<'_, S> {
    /// Gives the envelope the chunk's bytes before `index`. Held text is given after it, so that the order of
    /// all bytes is the same for every split: who learns from the first bytes of a message depends on it.
    fn give_envelope(&mut self, index: usize) {
        if let Some(from) = self.from {
            let bytes = self.chunk.get(from..index).unwrap_or_default();
            self.document.envelope.put(bytes, self.base + from as u64, self.sink);
            self.from = Some(index);
        }
    }

    /// Cuts the string whose opening quote is at `index` out of the envelope.
    fn cut(&mut self, index: usize) {
        self.give_envelope(index + 1);
        self.from = None;
    }

    /// Position in the held envelope of the chunk's byte at `index`.
    fn position(&self, index: usize) -> usize {
        self.document.envelope.held() + index.saturating_sub(self.from.unwrap_or(index))
    }

    fn value_begins(&mut self, index: usize) {
        let start = self.position(index);
        self.document.value = (self.document.key_at.take().unwrap_or(start), start);
    }

    fn value_ends(&mut self, index: usize) {
        let (key, start) = self.document.value;
        let end = self.position(index);
        self.document.envelope.value(Value { key, start, end });
    }

    /// The next source bytes of a string that may hold base64; `plain` is what they stand for.
    fn blob(&mut self, source: &[u8], plain: &[u8], body_offset: u64) {
        let Active::Blob { mut run, keep, mut skipped } = self.document.active else { return };
        let envelope = &mut self.document.envelope;
        if source.len() != plain.len() {
            // An escape: PHP writes `\/`, MIME encoders break lines.
            run = run.filter(|_| matches!(plain, b"/" | b"\n" | b"\r"));
            if run.is_some_and(|run| run >= keep) {
                skipped += source.len() as u64;
            } else {
                envelope.put(source, body_offset, self.sink);
            }
            run = run.map(|run| run + 1);
        } else {
            let (mut rest, mut offset) = (source, body_offset);
            while !rest.is_empty() {
                let base64 = match run {
                    Some(_) => rest.iter().take_while(|byte| is_base64(**byte)).count(),
                    None => 0,
                };
                let kept = base64.min(keep.saturating_sub(run.unwrap_or(0)));
                run = run.map(|run| run + base64);
                let (media, after) = rest.split_at_checked(base64).unwrap_or((rest, &[]));
                envelope.put(media.get(..kept).unwrap_or_default(), offset, self.sink);
                skipped += (base64 - kept) as u64;
                offset += base64 as u64;
                // What breaks a run off is given, up to the comma after which another may begin.
                let other =
                    after.iter().position(|byte| *byte == b',').map_or(after.len(), |comma| comma + 1);
                let (other, after) = after.split_at_checked(other).unwrap_or((after, &[]));
                envelope.put(other, offset, self.sink);
                offset += other.len() as u64;
                run = match other.last() {
                    None => run,
                    Some(b',') => Some(0),
                    Some(_) => None,
                };
                rest = after;
            }
        }
        self.document.active = Active::Blob { run, keep, skipped };
    }
}

fn is_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=')
}

impl<S: Sink> Handler for Pass<'_, S> {
    fn begin(&mut self, container: Container, _: usize) {
        let document = &mut *self.document;
        document.key_at = None;
        let place = document.slot.opened(container);
        match place {
            Place::Message if document.mode == Mode::Request => document.role = None,
            Place::Choices => {
                document.choice_position = 0;
                document.choice = None;
            }
            Place::Choice => {
                document.choice = None;
                document.direct = false;
                document.calls.clear();
            }
            Place::ToolCall if document.calls.len() < MAX_CALLS => document.calls.push(None),
            _ => {}
        }
        document.places.push(place);
        document.slot = if container == Container::Array { place.element() } else { Place::Other };
    }

    fn end(&mut self, _: Container, index: usize) {
        let mode = self.document.mode;
        match self.document.places.pop() {
            Some(Place::Message) if mode == Mode::Request && self.document.role.is_none() => {
                self.give_envelope(index);
                self.document.set_role(Role::User, self.sink);
            }
            Some(Place::ToolCall | Place::LegacyCall) => {
                Document::end_unit(&mut self.document.call_unit, self.sink);
            }
            Some(Place::Choice) if mode == Mode::Stream => {
                self.give_envelope(index);
                self.document.choose(self.sink);
                self.document.choice_position += 1;
            }
            _ => {}
        }
        let document = &mut *self.document;
        document.slot = document.places.last().map_or(Place::Other, |place| place.element());
    }

    fn key_begin(&mut self, index: usize) {
        self.document.key_at = Some(self.position(index));
    }

    fn key(&mut self, key: Option<&[u8]>) {
        let parent = self.document.places.last().copied().unwrap_or(Place::Other);
        self.document.slot = parent.child(key, self.document.mode);
    }

    fn string_begin(&mut self, index: usize) -> bool {
        self.value_begins(index);
        let slot = self.document.slot;
        self.document.active = match slot {
            Place::Role => {
                self.document.role_len = 0;
                Active::Role
            }
            Place::Blob => Active::Blob { run: Some(0), keep: BLOB_SAMPLE_BYTES, skipped: 0 },
            Place::Padding => Active::Blob { run: Some(0), keep: 0, skipped: 0 },
            _ => slot.scored().map_or(Active::None, Active::Scored),
        };
        match self.document.active {
            Active::Scored(_) => {
                self.document.strings += 1;
                self.cut(index);
            }
            Active::Blob { .. } => self.cut(index),
            Active::None | Active::Role => {}
        }
        self.document.active != Active::None
    }

    fn text(&mut self, run: &[u8], index: usize) {
        let body_offset = self.base + index as u64;
        match self.document.active {
            Active::Scored(kind) => self.document.text(kind, run, body_offset, false, self.sink),
            Active::Blob { .. } => self.blob(run, run, body_offset),
            Active::Role => self.document.role_bytes(run),
            Active::None => {}
        }
    }

    fn escape(&mut self, source: &[u8], decoded: &[u8], body_offset: u64) {
        match self.document.active {
            Active::Scored(kind) => self.document.text(kind, decoded, body_offset, true, self.sink),
            Active::Blob { .. } => self.blob(source, decoded, body_offset),
            Active::Role => self.document.role_bytes(decoded),
            Active::None => {}
        }
    }

    fn string_end(&mut self, index: usize) {
        self.from = self.from.or(Some(index));
        let active = mem::replace(&mut self.document.active, Active::None);
        match active {
            Active::Scored(_) => return Document::end_unit(&mut self.document.string_unit, self.sink),
            Active::Role if self.document.role.is_none() => {
                self.give_envelope(index);
                let role = self.document.role_text.get(..self.document.role_len);
                self.document.set_role(Role::of_message(role.unwrap_or_default()), self.sink);
            }
            Active::Blob { skipped, .. } => self.document.skip(skipped, self.sink),
            Active::None | Active::Role => {}
        }
        self.value_ends(index + 1);
    }

    fn scalar_begin(&mut self, index: usize) {
        self.value_begins(index);
    }

    fn scalar_end(&mut self, index: usize, value: Option<u64>) {
        self.value_ends(index);
        let document = &mut *self.document;
        match document.slot {
            Place::ChoiceIndex => document.choice = document.choice.or(value),
            Place::CallIndex => {
                if let Some(call) = document.calls.last_mut() {
                    *call = call.or(value);
                }
            }
            Place::PromptTokens => document.usage.input_tokens = value.or(document.usage.input_tokens),
            Place::CompletionTokens => {
                document.usage.output_tokens = value.or(document.usage.output_tokens);
            }
            Place::TotalTokens => document.usage.total_tokens = value.or(document.usage.total_tokens),
            _ => {}
        }
    }
}

impl Document {
    fn role_bytes(&mut self, bytes: &[u8]) {
        let end = self.role_len.saturating_add(bytes.len());
        if let Some(place) = self.role_text.get_mut(self.role_len..end) {
            place.copy_from_slice(bytes);
            self.role_len = end;
        } else {
            self.role_len = usize::MAX; // too long for any role: no prefix of it may match
        }
    }
}

/// A request or a whole answer.
#[derive(Debug)]
pub(crate) struct Chat {
    tokenizer: Tokenizer,
    document: Document,
}

impl Chat {
    pub(crate) fn new(mode: Mode) -> Self {
        Self { tokenizer: Tokenizer::new(false), document: Document::new(mode) }
    }

    /// Reads the next bytes. After an error the rest of the body is envelope, from the offending byte on.
    pub(crate) fn push(&mut self, chunk: &[u8], base: u64, sink: &mut impl Sink) {
        let failed_before = self.tokenizer.error().is_some();
        let cut = matches!(self.document.active, Active::Scored(_) | Active::Blob { .. });
        let from = if cut { None } else { Some(0) };
        let mut pass = Pass { document: &mut self.document, sink, chunk, base, from };
        let read = self.tokenizer.push(chunk, base, &mut pass);
        pass.give_envelope(read);
        if self.tokenizer.error().is_some() {
            if !failed_before {
                self.document.close(self.tokenizer.pending_escape(), sink);
            }
            let rest = chunk.get(read..).unwrap_or_default();
            self.document.envelope.put(rest, base + read as u64, sink);
        }
    }

    fn end_document(&mut self, sink: &mut impl Sink) -> Result<(), ContentError> {
        let mut pass = Pass { document: &mut self.document, sink, chunk: &[], base: 0, from: Some(0) };
        let result = self.tokenizer.finish(&mut pass);
        self.document.close(self.tokenizer.pending_escape(), sink);
        result
    }

    pub(crate) fn finish(&mut self, sink: &mut impl Sink) -> Result<(), ContentError> {
        let result = self.end_document(sink);
        self.document.envelope.finish(sink);
        result
    }

    pub(crate) fn usage(&self) -> Usage {
        self.document.usage
    }

    pub(crate) fn skipped_bytes(&self) -> u64 {
        self.document.skipped_bytes
    }
}

/// The data that ends a stream (OpenAI API reference, streaming).
const DONE: &[u8] = b"[DONE]";

/// A streamed answer: one document per event.
#[derive(Debug)]
pub(crate) struct ChatStream {
    chat: Chat,
    /// Bytes of [`DONE`] that the event's data began with, and where.
    done_len: usize,
    done_at: u64,
    /// The event's data goes to the tokenizer.
    in_document: bool,
    /// Start of the current line that is not data, in the held envelope.
    line: Option<usize>,
    at_input_end: bool,
    terminated: bool,
    events: u64,
    error: Option<ContentError>,
}

impl ChatStream {
    pub(crate) fn new() -> Self {
        Self {
            chat: Chat::new(Mode::Stream),
            done_len: 0,
            done_at: 0,
            in_document: false,
            line: None,
            at_input_end: false,
            terminated: false,
            events: 0,
            error: None,
        }
    }

    /// Receives the stream's lines for one push.
    pub(crate) fn lines<'a, S: Sink>(&'a mut self, sink: &'a mut S) -> Lines<'a, S> {
        Lines { stream: self, sink }
    }

    /// The input has ended; the reader's last `event_end` comes after this.
    pub(crate) fn input_ends(&mut self) {
        self.at_input_end = true;
    }

    pub(crate) fn finish(&mut self, sink: &mut impl Sink) -> Result<(), ContentError> {
        for &(_, unit) in &self.chat.document.open.0 {
            sink.end(unit);
        }
        self.chat.document.envelope.finish(sink);
        self.error.map_or(Ok(()), Err)
    }

    pub(crate) fn chat(&self) -> &Chat {
        &self.chat
    }

    pub(crate) fn events(&self) -> u64 {
        self.events
    }

    /// `[DONE]` was seen.
    pub(crate) fn terminated(&self) -> bool {
        self.terminated
    }
}

/// See [`ChatStream::lines`].
pub(crate) struct Lines<'a, S: Sink> {
    stream: &'a mut ChatStream,
    sink: &'a mut S,
}

impl<S: Sink> Lines<'_, S> {
    /// What began like [`DONE`] is a document after all.
    fn begin_document(&mut self) {
        self.stream.in_document = true;
        let begun = DONE.get(..mem::take(&mut self.stream.done_len)).unwrap_or_default();
        self.stream.chat.push(begun, self.stream.done_at, self.sink);
    }
}

impl<S: Sink> sse::Handler for Lines<'_, S> {
    fn data(&mut self, piece: &[u8], body_offset: u64) {
        if !self.stream.in_document {
            let expected = DONE.get(self.stream.done_len..).unwrap_or_default();
            if self.stream.done_len == 0 {
                self.stream.done_at = body_offset;
            }
            let same = piece.iter().zip(expected).take_while(|(a, b)| a == b).count();
            if same == piece.len() {
                self.stream.done_len += same;
                return;
            }
            // All of the piece goes to the document, after what earlier pieces had in common with the marker.
            self.begin_document();
        }
        self.stream.chat.push(piece, body_offset, self.sink);
    }

    fn other(&mut self, piece: &[u8], body_offset: u64) {
        let envelope = &mut self.stream.chat.document.envelope;
        self.stream.line.get_or_insert(envelope.held());
        envelope.put(piece, body_offset, self.sink);
    }

    fn other_end(&mut self) {
        if let Some(start) = self.stream.line.take() {
            let envelope = &mut self.stream.chat.document.envelope;
            let end = envelope.held();
            envelope.value(Value { key: start, start, end });
        }
    }

    fn event_end(&mut self, body_offset: u64) {
        if self.stream.done_len == DONE.len() {
            self.stream.done_len = 0;
            self.stream.terminated = true;
            let envelope = &mut self.stream.chat.document.envelope;
            envelope.put(DONE, self.stream.done_at, self.sink);
        } else if self.stream.done_len > 0 {
            self.begin_document();
        }
        if mem::take(&mut self.stream.in_document) {
            self.stream.events += 1;
            let result = self.stream.chat.end_document(self.sink);
            if let Err(error) = result
                && self.stream.error.is_none()
            {
                let open = error == ContentError::Truncated && !self.stream.at_input_end;
                self.stream.error =
                    Some(if open { ContentError::Malformed { offset: body_offset } } else { error });
            }
            self.stream.chat.tokenizer = Tokenizer::new(false);
        }
        self.stream.chat.document.envelope.end_event(self.sink);
    }
}
