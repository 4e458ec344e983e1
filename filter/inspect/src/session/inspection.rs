//! One message while it is read: parser, scorers, and what the rules have in store for it.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::ControlFlow;

use driftlock_engine::detector::{Message, UnitId};
use driftlock_engine::evidence::{Outcome, Verdict};
use driftlock_engine::score::Scratch;

use super::Plugin;
use super::prefix::Trail;
use crate::action::{Plan, SampleHash};
use crate::content::{ApiStyle, BodyParser, ContentError, Framing, NotInspected, Role, Sink, Summary, Unit};
use crate::decode::{Coding, DecodeError, Decoder};
use crate::host::{Direction, Histogram, Host, HostError, Metric};
use crate::rewrite::{Format, Rewriter};

/// One message under inspection.
#[derive(Debug)]
pub(super) struct Inspection {
    pub(super) direction: Direction,
    /// Until it is judged.
    pub(super) message: Option<Message>,
    pub(super) parser: Option<BodyParser>,
    /// How far its body agrees with earlier ones, where that is followed.
    trail: Option<Box<Trail>>,
    /// Undoes the body's content codings, if it has any.
    pub(super) decoder: Option<Box<Decoder>>,
    pub(super) framing: Framing,
    /// Of which API it turned out to be, where it is of one.
    pub(super) style: Option<ApiStyle>,
    /// As they came.
    pub(super) wire_bytes: u64,
    /// Decoded.
    pub(super) body_bytes: u64,
    pub(super) defect: Option<Defect>,
    pub(super) plan: Plan,
    pub(super) hold: Hold,
    pub(super) rewriter: Option<Box<Rewriter>>,
    /// What the rewriter has let go of a message that is held.
    pub(super) rewritten: Vec<u8>,
    /// The body came encoded.
    pub(super) encoded: bool,
    /// It goes on decoded, as its headers have said already.
    pub(super) recoded: bool,
    /// Bytes that were to be rewritten could not be read.
    pub(super) lost: bool,
    /// The stream was ended; what still comes goes nowhere.
    pub(super) cut: bool,
    /// A rule in shadow mode would have ended it.
    pub(super) would_cut: bool,
    /// For an exchange without an id, where a rule samples.
    pub(super) hash: Option<SampleHash>,
    /// When the model's first word came, if there is a clock.
    pub(super) first_token_ns: Option<u64>,
    pub(super) scoring_ns: u64,
    /// What the body was about, once it is read.
    summary: Option<Summary>,
    /// A unit has been completed since the last look at a stream under way.
    pub(super) unit_ended: bool,
}

/// What the proxy holds until the verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Hold {
    #[default]
    Nothing,
    /// The headers have gone.
    Body,
    /// The headers wait too.
    Headers,
}

/// How a body is to be read.
pub(super) struct Reading {
    pub(super) parser: BodyParser,
    pub(super) decoder: Option<Box<Decoder>>,
}

impl Reading {
    /// Of a body with these headers.
    pub(super) fn new(
        plugin: &Plugin,
        codings: &[Coding],
        parser: Result<BodyParser, NotInspected>,
    ) -> Result<Self, Defect> {
        let parser = parser.map_err(|reason| Defect::ContentType(reason.as_str()))?;
        let decoder = match codings {
            [] => None,
            codings => Some(Box::new(Decoder::new(codings, &plugin.decoding).map_err(Defect::Decode)?)),
        };
        Ok(Self { parser, decoder })
    }
}

/// Why a message, or a part of it, is not inspected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Defect {
    /// A content coding that is not decoded.
    Encoding(String),
    /// Decoding failed, or went over a bound.
    Decode(DecodeError),
    ContentType(&'static str),
    /// No longer HTTP messages: `websocket`, `upgrade` or `tunnel`.
    Upgrade(&'static str),
    Size,
    Malformed(ContentError),
    CutShort,
    Host(HostError),
}

impl Defect {
    fn metric(&self) -> Metric {
        match self {
            Self::Encoding(_) | Self::Decode(_) => Metric::NotInspectedEncoding,
            Self::Upgrade(_) => Metric::NotInspectedWebsocket,
            Self::ContentType(_) => Metric::NotInspectedContentType,
            Self::Size => Metric::NotInspectedSize,
            Self::Malformed(_) => Metric::NotInspectedMalformed,
            Self::CutShort => Metric::NotInspectedCutShort,
            Self::Host(_) => Metric::HostCallErrors,
        }
    }

    /// The status that a refused request gets (RFC 9110 section 15.5).
    pub(super) fn status(&self) -> u16 {
        match self {
            Self::Encoding(_) | Self::ContentType(_) => 415,
            Self::Size | Self::Decode(DecodeError::Ratio) => 413,
            Self::Decode(DecodeError::Memory) => 503,
            Self::Upgrade(_) => 403,
            Self::Malformed(_) | Self::CutShort | Self::Decode(_) => 400,
            Self::Host(_) => 503,
        }
    }
}

impl core::fmt::Display for Defect {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Encoding(name) => write!(f, "encoding:{name}"),
            Self::Decode(error) => f.write_str(error.as_str()),
            Self::ContentType(reason) | Self::Upgrade(reason) => f.write_str(reason),
            Self::Size => f.write_str("size"),
            Self::Malformed(error) => f.write_str(error.as_str()),
            Self::CutShort => f.write_str("cut_short"),
            Self::Host(error) => write!(f, "host_call:{}", error.0),
        }
    }
}

/// Passes a parser's units on to the engine.
pub(super) struct Feed<'a> {
    pub(super) message: &'a mut Message,
    max_unit_bytes: usize,
    /// What the engine works in.
    scratch: &'a mut Scratch,
    /// The model has said something.
    pub(super) spoken: bool,
    /// A unit is complete.
    pub(super) ended: bool,
}

impl<'a> Feed<'a> {
    pub(super) fn new(message: &'a mut Message, max_unit_bytes: usize, scratch: &'a mut Scratch) -> Self {
        Self { message, max_unit_bytes, scratch, spoken: false, ended: false }
    }

    /// A unit that is here from its beginning to its end.
    pub(super) fn whole(&mut self, unit: Unit, text: &[u8]) {
        self.message.whole(unit_id(unit), text, 0, self.max_unit_bytes, self.scratch);
    }
}

fn unit_id(unit: Unit) -> UnitId {
    UnitId { name: unit.role.as_str(), index: unit.index }
}

impl Sink for Feed<'_> {
    fn text(&mut self, unit: Unit, text: &[u8], body_offset: u64) {
        self.spoken |= matches!(unit.role, Role::Assistant | Role::Reasoning | Role::ToolCall);
        self.message.text(unit_id(unit), text, body_offset, self.max_unit_bytes, self.scratch);
    }

    fn end(&mut self, unit: Unit) {
        self.message.end_unit(unit_id(unit), self.scratch);
        self.ended = true;
    }

    fn skipped(&mut self, _unit: Unit, bytes: u64) {
        self.message.skip(bytes);
    }
}

impl Inspection {
    /// Begins a message of the stream that direction, parser and framing name.
    pub(super) fn begin(
        plugin: &mut Plugin,
        direction: Direction,
        reading: Result<Option<Reading>, Defect>,
    ) -> Box<Self> {
        let (parser, decoder, defect) = match reading {
            Ok(Some(Reading { parser, decoder })) => (Some(parser), decoder, None),
            Ok(None) => (None, None, None),
            Err(defect) => (None, None, Some(defect)),
        };
        let style = match (&parser, direction) {
            (Some(parser), _) => parser.style().as_str(),
            // The target is judged all the same, as that of a request without a body.
            (None, Direction::Request) => "bodiless",
            (None, Direction::Response) => "uninspected",
        };
        let encoded = decoder.is_some();
        let framing = parser.as_ref().map_or(Framing::Whole, BodyParser::framing);
        // A streamed chat answer has another envelope than a whole one.
        let suffix = if style == ApiStyle::Sse.as_str() { "" } else { framing.suffix() };
        let stream = [&plugin.name, "/", direction.as_str(), "/", style, suffix].concat();
        Box::new(Self {
            direction,
            message: Some(plugin.detector.begin(&stream)),
            parser,
            trail: None,
            decoder,
            framing,
            style: None,
            wire_bytes: 0,
            body_bytes: 0,
            defect,
            plan: plugin.rules.plan(&stream),
            hold: Hold::Nothing,
            rewriter: None,
            rewritten: Vec::new(),
            recoded: false,
            encoded,
            lost: false,
            cut: false,
            would_cut: false,
            hash: None,
            first_token_ns: None,
            scoring_ns: 0,
            summary: None,
            unit_ended: false,
        })
    }

    /// How the body is to be rewritten, if it can be. `parts`: a JSON array is a stream of answers.
    pub(super) fn format(&self, parts: bool) -> Option<Format> {
        let parser = self.parser.as_ref()?;
        Some(match (self.framing, parser.style()) {
            (Framing::Sse, _) => Format::Events,
            (Framing::JsonLines, _) => Format::Lines,
            (Framing::AwsEventStream, _) => Format::AmazonEvents,
            (Framing::Whole, ApiStyle::Form | ApiStyle::Text) => Format::Text,
            (Framing::Whole, ApiStyle::Multipart) => return None,
            (Framing::Whole, _) if parts => Format::Array,
            (Framing::Whole, _) => Format::Document,
        })
    }

    pub(super) fn is_stream(&self) -> bool {
        self.framing != Framing::Whole
    }

    /// Reads the request headers that the configuration selects. One that is not there is no unit.
    pub(super) fn read_headers(&mut self, plugin: &mut Plugin, host: &impl Host) {
        let Some(message) = &mut self.message else { return };
        let mut feed = Feed::new(message, plugin.max_unit_bytes, plugin.detector.scratch());
        for (name, index) in plugin.request_headers.iter().zip(0u16..) {
            match host.header(Direction::Request, name) {
                Ok(None) => {}
                Ok(Some(value)) => {
                    let unit = Unit { role: Role::Header, index };
                    feed.whole(unit, &[name.as_bytes(), b": ", &value].concat());
                }
                Err(error) => {
                    self.defect.get_or_insert(Defect::Host(error));
                }
            }
        }
    }

    /// Reads what came. Returns whether the model has said something in it.
    pub(super) fn read(&mut self, plugin: &mut Plugin, chunk: Result<&[u8], HostError>) -> bool {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                // What follows a gap would be read wrongly.
                self.defect.get_or_insert(Defect::Host(error));
                self.lost |= self.rewriter.is_some();
                self.end_of_body(plugin, true);
                return false;
            }
        };
        if let Some(hash) = &mut self.hash {
            hash.add(chunk);
        }
        let room = plugin.max_body_bytes.saturating_sub(self.wire_bytes);
        self.wire_bytes = self.wire_bytes.saturating_add(chunk.len() as u64);
        // What is rewritten is rewritten to its end, however much of it is judged.
        let within = if self.rewriter.is_some() { chunk } else { first(chunk, room) };
        let (result, spoken) = self.decode(plugin, |decoder, give| match decoder {
            Some(decoder) => decoder.push(within, give),
            None => match give(within) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(DecodeError::Stopped),
            },
        });
        let defect = match result {
            Ok(()) if self.wire_bytes <= plugin.max_body_bytes => return spoken,
            Ok(()) | Err(DecodeError::Stopped) => Defect::Size,
            Err(error) => {
                self.lost |= self.rewriter.is_some();
                Defect::Decode(error)
            }
        };
        if self.parser.is_some() {
            // What was read is judged.
            self.defect.get_or_insert(defect);
            self.end_parser(plugin, true);
        }
        spoken
    }

    /// Has `decode` give decoded bytes to the parser, up to the size that is inspected, and to the rewriter.
    fn decode(
        &mut self,
        plugin: &mut Plugin,
        decode: impl FnOnce(
            &mut Option<Box<Decoder>>,
            &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
        ) -> Result<(), DecodeError>,
    ) -> (Result<(), DecodeError>, bool) {
        let Self { message, parser, trail, decoder, body_bytes, rewriter, rewritten, unit_ended, .. } = self;
        let Some(message) = message else { return (Ok(()), false) };
        if parser.is_none() && rewriter.is_none() {
            return (Ok(()), false);
        }
        let Plugin { detector, prefixes, max_unit_bytes, max_body_bytes, .. } = plugin;
        let mut feed = Feed::new(message, *max_unit_bytes, detector.scratch());
        let result = decode(decoder, &mut |piece| {
            let inspected = first(piece, max_body_bytes.saturating_sub(*body_bytes));
            if let (Some(parser), 0) = (&parser, *body_bytes) {
                *trail = prefixes.begin(feed.message, parser);
            }
            *body_bytes = body_bytes.saturating_add(piece.len() as u64);
            match (&mut *parser, &mut *trail) {
                (Some(parser), Some(trail)) => prefixes.read(trail, inspected, parser, &mut feed),
                (Some(parser), None) => parser.push(inspected, &mut feed),
                (None, _) => {}
            }
            if let Some(rewriter) = rewriter {
                rewriter.push(piece, rewritten);
                return ControlFlow::Continue(());
            }
            if inspected.len() == piece.len() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        let result = match result {
            Ok(()) if *body_bytes > plugin.max_body_bytes => Err(DecodeError::Stopped),
            result => result,
        };
        *unit_ended |= feed.ended;
        (result, feed.spoken)
    }

    /// The body is complete, or what came of it. Says what it was about. A stream that broke off after its own
    /// last event is complete: clients hang up there.
    pub(super) fn end_of_body(&mut self, plugin: &mut Plugin, cut_short: bool) -> Option<Summary> {
        let (decoded, _) = self.decode(plugin, |decoder, give| match decoder {
            Some(decoder) => decoder.finish(give),
            None => Ok(()),
        });
        self.decoder = None;
        if let (Some(rewriter), false) = (&mut self.rewriter, cut_short) {
            rewriter.finish(&mut self.rewritten);
        }
        let defect = match decoded {
            Ok(()) => None,
            Err(DecodeError::Stopped) => Some(Defect::Size),
            Err(error) => {
                self.lost |= self.rewriter.is_some();
                Some(Defect::Decode(error))
            }
        };
        let had_parser = self.parser.is_some();
        let summary = self.end_parser(plugin, cut_short || defect.is_some());
        if let (Some(defect), true, false) = (defect, had_parser, cut_short) {
            // More is known than that it ended early.
            if matches!(self.defect, None | Some(Defect::CutShort)) {
                self.defect = Some(defect);
            }
        }
        summary.or(self.summary.take())
    }

    fn end_parser(&mut self, plugin: &mut Plugin, cut_short: bool) -> Option<Summary> {
        let (parser, message) = (self.parser.as_mut()?, self.message.as_mut()?);
        let Plugin { detector, prefixes, max_unit_bytes, .. } = plugin;
        let mut feed = Feed::new(message, *max_unit_bytes, detector.scratch());
        if let Some(mut trail) = self.trail.take() {
            prefixes.finish(&mut trail, parser, &mut feed);
        }
        let result = parser.finish(&mut feed);
        let summary = parser.summary();
        self.style = Some(parser.style()).filter(|style| style.has_schema());
        self.parser = None;
        let stream = self.framing != Framing::Whole;
        match result {
            Ok(_) if cut_short && !(stream && summary.terminated) => {
                self.defect.get_or_insert(Defect::CutShort);
            }
            Err(_) if cut_short => {
                self.defect.get_or_insert(Defect::CutShort);
            }
            Ok(_) => {}
            Err(error) => {
                self.defect.get_or_insert(Defect::Malformed(error));
            }
        }
        self.summary = Some(summary);
        self.summary
    }

    /// The verdict; none a second time.
    pub(super) fn judge(&mut self, plugin: &mut Plugin, host: &mut impl Host) -> Option<Verdict> {
        let (message, direction) = (self.message.take()?, self.direction);
        if let Some(defect) = &self.defect {
            host.count(defect.metric(), 1);
        }
        let reason = self.defect.as_ref().map(|defect| format!("{defect}"));
        let verdict = plugin.detector.finish(message, reason);
        if verdict.reason.as_deref() == Some("no_baseline") {
            host.count(Metric::NotInspectedNoBaseline, 1);
        }
        let metric = match (direction, verdict.outcome) {
            (Direction::Request, Outcome::Normal) => Metric::RequestNormal,
            (Direction::Request, Outcome::WarmingUp) => Metric::RequestWarmingUp,
            (Direction::Request, Outcome::NotInspected) => Metric::RequestNotInspected,
            (Direction::Request, Outcome::Anomalous) => Metric::RequestAnomalous,
            (Direction::Response, Outcome::Normal) => Metric::ResponseNormal,
            (Direction::Response, Outcome::WarmingUp) => Metric::ResponseWarmingUp,
            (Direction::Response, Outcome::NotInspected) => Metric::ResponseNotInspected,
            (Direction::Response, Outcome::Anomalous) => Metric::ResponseAnomalous,
        };
        host.count(metric, 1);
        if verdict.metrics.bytes > 0 {
            host.count(Metric::BytesInspected, verdict.metrics.bytes);
        }
        if verdict.metrics.skipped_bytes > 0 {
            host.count(Metric::BytesSkipped, verdict.metrics.skipped_bytes);
        }
        if let Some([rank, of]) = verdict.p_fraction {
            let ppm = (u64::from(rank) * 1_000_000).div_ceil(u64::from(of.max(1)));
            let histogram = match direction {
                Direction::Request => Histogram::RequestPValue,
                Direction::Response => Histogram::ResponsePValue,
            };
            host.record(histogram, ppm);
        }
        Some(verdict)
    }
}

/// At most `room` bytes.
fn first(bytes: &[u8], room: u64) -> &[u8] {
    usize::try_from(room).ok().and_then(|room| bytes.get(..room)).unwrap_or(bytes)
}
