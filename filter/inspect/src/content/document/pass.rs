//! One push: the tokenizer's events with the document they belong to and the chunk they came in.

use super::super::schema::{Mode, Place, Tokens};
use super::super::style::ApiStyle;
use super::super::{Label, Role, Sink};
use super::{Active, BLOB_SAMPLE_BYTES, Document, MAX_CALLS};
use crate::envelope::Value;
use crate::json::{Container, Handler, Scalar};
use core::mem;
use driftlock_engine::bitmap::base64_run;

/// One push: the document with the chunk it is reading.
pub(super) struct Pass<'a, S: Sink> {
    pub(super) document: &'a mut Document,
    pub(super) sink: &'a mut S,
    pub(super) chunk: &'a [u8],
    pub(super) base: u64,
    /// First byte of the chunk that the envelope has not got; `None` inside what is cut out.
    pub(super) from: Option<usize>,
}

impl<S: Sink> Pass<'_, S> {
    /// Gives the envelope (or the unit whose source is being read) the chunk's bytes before `index`. Held text
    /// is given after it, so that the order of all bytes is the same for every split: who learns from the first
    /// bytes of a message depends on it.
    pub(super) fn give(&mut self, index: usize) {
        if let Some(from) = self.from {
            let bytes = self.chunk.get(from..index).unwrap_or_default();
            let body_offset = self.base + from as u64;
            match self.document.raw {
                Some((_, unit)) if !bytes.is_empty() => self.sink.text(unit, bytes, body_offset),
                Some(_) => {}
                None => self.document.envelope.put(bytes, body_offset, self.sink),
            }
            self.from = Some(index);
        }
    }

    /// Cuts what follows `index` out of the envelope.
    fn cut(&mut self, index: usize) {
        self.give(index);
        self.from = None;
    }

    /// After the bracket at `index` numbers may follow that are counted, not scored.
    fn numbers_begin(&mut self, index: usize) {
        if self.document.slot == Place::Vector {
            self.cut(index + 1);
            self.document.numbers_from = Some(self.base + index as u64 + 1);
        }
    }

    /// Something other than a number stands among those that are skipped.
    fn numbers_end(&mut self, index: usize) {
        if let Some(from) = self.document.numbers_from.take() {
            self.document.skip((self.base + index as u64).saturating_sub(from), false, self.sink);
            self.from = Some(index);
        }
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
        if self.document.is_stream() && self.document.raw.is_none() && self.document.numbers_from.is_none() {
            let (key, start) = self.document.value;
            let end = self.position(index);
            self.document.envelope.value(Value { key, start, end });
        }
    }

    /// The next source bytes of a string that may hold base64; `plain` is what they stand for.
    fn blob(&mut self, source: &[u8], plain: &[u8], body_offset: u64) {
        let Active::Blob { mut run, keep, mut skipped, media } = self.document.active else { return };
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
                    Some(_) => base64_run(rest),
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
        self.document.active = Active::Blob { run, keep, skipped, media };
    }
}

impl<S: Sink> Handler for Pass<'_, S> {
    fn begin(&mut self, container: Container, index: usize) {
        self.numbers_end(index);
        let document = &mut *self.document;
        document.key_at = None;
        let slot = document.slot;
        let place = slot.opened(container);
        let depth = document.places.len();
        if let (Place::Raw(kind) | Place::Data(kind), None) = (slot, document.raw) {
            let unit = match document.role_of(kind).unwrap_or(document.default_role()) {
                Role::ToolCall => {
                    *document.call_unit.get_or_insert_with(|| document.ordinals.next(Role::ToolCall))
                }
                role => document.ordinals.next(role),
            };
            self.give(index);
            self.document.raw = Some((depth, unit));
        }
        let document = &mut *self.document;
        if document.whole.is_none() && place.is_whole() {
            document.whole = Some(depth);
        }
        if slot == Place::Error {
            document.summary.provider_error = true;
        }
        match place {
            _ if place.is_message() && container == Container::Object => {
                // A message inside a message: what the outer one holds is settled.
                if !document.held.pieces.is_empty() {
                    let role = document.role.unwrap_or(document.default_role());
                    self.give(index);
                    self.document.settle(role, self.sink);
                }
                let document = &mut *self.document;
                let answers = place == Place::Item && document.schema.mode != Mode::Request;
                document.role = answers.then_some(Role::Assistant);
                document.role_given = false;
            }
            Place::Choices => {
                document.choice_position = 0;
                document.choice = None;
            }
            Place::Choice => {
                document.choice = None;
                document.direct = false;
                document.calls.clear();
            }
            // Only a list has positions.
            Place::ToolCall { .. }
                if document.calls.len() < MAX_CALLS
                    && matches!(document.places.last(), Some(Place::ToolCalls { .. })) =>
            {
                document.calls.push(None);
            }
            Place::Media(_) => document.plain = false,
            Place::Content(_) | Place::Part(_) if container == Container::Object => {
                document.thought = None;
                document.part_from = document.held.pieces.len();
            }
            _ => {}
        }
        let document = &mut *self.document;
        if depth == 0 {
            document.in_list = container == Container::Array;
        }
        document.places.push(place);
        document.slot = if container == Container::Array { place.element() } else { Place::Other };
        self.numbers_begin(index);
    }

    fn end(&mut self, container: Container, index: usize) {
        self.numbers_end(index);
        let place = self.document.places.pop().unwrap_or(Place::Other);
        let depth = self.document.places.len();
        let object = container == Container::Object;
        if let Some((from, unit)) = self.document.raw
            && from == depth
        {
            self.give(index + 1);
            self.document.raw = None;
            if self.document.call_unit != Some(unit) {
                self.sink.end(unit);
            }
        }
        if object
            && matches!(place, Place::Content(_) | Place::Part(_))
            && self.document.schema.style == ApiStyle::Gemini
        {
            self.give(index);
            self.document.end_part(self.sink);
        }
        if object && place.is_message() {
            if self.document.role.is_none() {
                self.give(index);
                let role = self.document.default_role();
                self.document.settle(role, self.sink);
            }
            // What an outer one says after this has no speaker yet.
            (self.document.role, self.document.role_given) = (None, false);
        }
        if object && place.is_call() {
            Document::end_unit(&mut self.document.call_unit, self.sink);
        }
        if self.document.is_stream() {
            if place == Place::Choice {
                self.give(index);
                self.document.release(self.sink);
                self.document.choice_position += 1;
            }
            if self.document.self_framed && object && depth == usize::from(self.document.in_list) {
                self.give(index + 1);
                self.document.summary.events += 1;
                self.document.end_event(self.sink);
                self.document.envelope.end_event(self.sink);
            }
        }
        let document = &mut *self.document;
        if document.whole == Some(depth) {
            document.whole = None;
        }
        document.slot = document.places.last().map_or(Place::Top, |place| place.element());
        self.numbers_begin(index);
    }

    fn key_begin(&mut self, index: usize) {
        self.document.key_at = Some(self.position(index));
    }

    fn key(&mut self, key: Option<&[u8]>) {
        let parent = self.document.places.last().copied().unwrap_or(Place::Other);
        self.document.slot = self.document.schema.child(parent, key);
    }

    fn string_begin(&mut self, index: usize) -> bool {
        self.numbers_end(index);
        self.value_begins(index);
        let slot = self.document.slot;
        let blob = |keep, media| Active::Blob { run: Some(0), keep, skipped: 0, media };
        let active = match slot {
            Place::Captured(field) => {
                self.document.captured = Label::default();
                Active::Captured(field)
            }
            Place::Blob { media } => blob(BLOB_SAMPLE_BYTES, media),
            Place::Data(kind) if self.document.plain => Active::Scored(kind),
            Place::Data(_) | Place::Media(_) => blob(BLOB_SAMPLE_BYTES, true),
            Place::Vector => blob(BLOB_SAMPLE_BYTES, false),
            Place::Padding => blob(0, false),
            Place::Error => {
                self.document.summary.provider_error = true;
                Active::None
            }
            _ => slot.scored().map_or(Active::None, Active::Scored),
        };
        self.document.active = active;
        match active {
            Active::Scored(_) => {
                self.document.strings += 1;
                self.cut(index + 1);
            }
            Active::Blob { .. } => self.cut(index + 1),
            Active::None | Active::Captured(_) => {}
        }
        active != Active::None
    }

    fn text(&mut self, run: &[u8], index: usize) {
        let body_offset = self.base + index as u64;
        match self.document.active {
            Active::Scored(kind) => self.document.text(kind, run, body_offset, false, self.sink),
            Active::Blob { .. } => self.blob(run, run, body_offset),
            Active::Captured(_) => self.document.captured.push(run),
            Active::None => {}
        }
    }

    fn escape(&mut self, source: &[u8], decoded: &[u8], body_offset: u64) {
        match self.document.active {
            Active::Scored(kind) => self.document.text(kind, decoded, body_offset, true, self.sink),
            Active::Blob { .. } => self.blob(source, decoded, body_offset),
            Active::Captured(_) => self.document.captured.push(decoded),
            Active::None => {}
        }
    }

    fn string_end(&mut self, index: usize) {
        self.from = self.from.or(Some(index));
        let active = mem::replace(&mut self.document.active, Active::None);
        match active {
            Active::Scored(_) => return Document::end_unit(&mut self.document.string_unit, self.sink),
            Active::Captured(field) => {
                self.give(index);
                self.document.captured(field, self.sink);
            }
            Active::Blob { skipped, media, .. } => self.document.skip(skipped, media, self.sink),
            Active::None => {}
        }
        self.value_ends(index + 1);
    }

    fn scalar_begin(&mut self, index: usize) {
        self.value_begins(index);
    }

    fn scalar_end(&mut self, index: usize, value: Scalar) {
        self.value_ends(index);
        let document = &mut *self.document;
        match (document.slot, value) {
            (Place::ChoiceIndex, Scalar::Unsigned(index)) => {
                document.choice.get_or_insert(index);
            }
            (Place::BlockIndex, Scalar::Unsigned(index)) => {
                document.block.get_or_insert(index);
            }
            (Place::CallIndex, Scalar::Unsigned(index)) => {
                if let Some(call) = document.calls.last_mut() {
                    call.get_or_insert(index);
                }
            }
            (Place::Thought, Scalar::True) => document.thought = Some(true),
            (Place::Done, Scalar::True) => {
                document.summary.terminated = true;
                document.last_event |= document.is_stream();
            }
            (Place::Tokens(tokens), Scalar::Unsigned(count)) => {
                let usage = &mut document.summary.usage;
                let place = match tokens {
                    Tokens::Input => &mut usage.input_tokens,
                    Tokens::Output => &mut usage.output_tokens,
                    Tokens::Total => &mut usage.total_tokens,
                    Tokens::Cached => &mut usage.cached_tokens,
                    Tokens::Reasoning => &mut usage.reasoning_tokens,
                };
                *place = Some(count);
            }
            _ => {}
        }
    }
}
