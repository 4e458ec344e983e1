//! One exchange, from its first header to its verdicts.
//!
//! What: [`Plugin`] is what a VM holds (configuration and detector), [`Exchange`] what a request and its
//! response need while they pass. The caller reports each proxy callback and obeys the returned
//! [`Step`]; verdicts go out through the [`Host`].
//!
//! Why so: the same code runs in the filter and in the native replay, so both give the same verdicts.
//! Nothing here decides by how the bytes were cut into chunks.
//!
//! Cost: beside the parser and the scorers, one verdict of a few hundred bytes a message. Bodies pass
//! while they are read; only a fail-closed request is held.
//!
//! Left out on purpose: holding headers, blocking anomalous messages and redaction, which belong to the
//! actions.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::ControlFlow;

use driftlock_engine::detector::{Detector, Message, UnitId};
use driftlock_engine::evidence::{Outcome, Verdict};

use crate::baselines::{Answer, Keeper, Services};
use crate::config::{Config, ConfigError, LogPolicy, Report, Uninspectable};
use crate::content::{ApiStyle, BodyParser, ContentError, NotInspected, Role, Sink, Unit};
use crate::decode::{self, Coding, DecodeError, Decoder};
use crate::exclude::{Exclusions, PathMatches};
use crate::host::{Direction, Host, HostError, Level, Metric};

/// Filter-state keys, as the access log finds them behind `wasm.`.
pub mod filter_state {
    /// The request's verdict, JSON.
    pub const REQUEST: &str = "driftlock.request";
    /// The response's verdict, JSON.
    pub const RESPONSE: &str = "driftlock.response";
    /// The worse outcome of both: one word.
    pub const OUTCOME: &str = "driftlock.outcome";
}

/// The reason of messages that the configuration excludes.
const DISABLED: &str = "disabled";

/// The response header that carries the request's verdict, a structured field (RFC 9651 item).
pub const REQUEST_VERDICT_HEADER: &str = "x-driftlock-request";

/// What one VM holds.
#[derive(Debug)]
pub struct Plugin {
    name: String,
    report: Report,
    uninspectable: Uninspectable,
    max_body_bytes: u64,
    max_unit_bytes: usize,
    decoding: decode::Limits,
    exclusions: Exclusions,
    detector: Detector,
    keeper: Keeper,
}

/// What the proxy shall do with the bytes of this callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Let them pass.
    Forward,
    /// Keep them back; more will follow.
    Hold,
    /// An answer was sent in the upstream's place; the bytes go nowhere.
    Answered,
}

/// One request and its response, while they pass.
#[derive(Debug, Default)]
pub struct Exchange {
    style: Option<ApiStyle>,
    /// The exclusions that the request's path leaves open.
    excluded: PathMatches,
    /// Bytes are passed through that are no HTTP message (CONNECT).
    tunnel: bool,
    request: Option<Inspection>,
    response: Option<Inspection>,
    /// Whose headers came. Should a proxy report them again, the message still has one verdict.
    request_begun: bool,
    response_begun: bool,
    request_verdict: Option<Verdict>,
    worst: Option<Outcome>,
    answered: bool,
}

/// One message under inspection.
#[derive(Debug)]
struct Inspection {
    direction: Direction,
    message: Message,
    parser: Option<BodyParser>,
    /// Undoes the body's content codings, if it has any.
    decoder: Option<Decoder>,
    /// As they came.
    wire_bytes: u64,
    /// Decoded.
    body_bytes: u64,
    defect: Option<Defect>,
}

/// How a body is to be read.
struct Reading {
    parser: BodyParser,
    decoder: Option<Decoder>,
}

/// Why a message, or a part of it, is not inspected.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Defect {
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
    fn status(&self) -> u16 {
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
struct Feed<'a> {
    message: &'a mut Message,
    max_unit_bytes: usize,
}

fn unit_id(unit: Unit) -> UnitId {
    UnitId { name: unit.role.as_str(), index: unit.index }
}

impl Sink for Feed<'_> {
    fn text(&mut self, unit: Unit, text: &[u8], body_offset: u64) {
        self.message.text(unit_id(unit), text, body_offset, self.max_unit_bytes);
    }

    fn end(&mut self, unit: Unit) {
        self.message.end_unit(unit_id(unit));
    }

    fn skipped(&mut self, _unit: Unit, bytes: u64) {
        self.message.skip(bytes);
    }
}

impl Plugin {
    /// From the plugin configuration's bytes.
    ///
    /// # Errors
    /// [`ConfigError`], naming the field.
    pub fn configure(bytes: &[u8]) -> Result<Self, ConfigError> {
        Ok(Self::new(Config::parse(bytes)?))
    }

    /// From a checked configuration.
    pub fn new(config: Config) -> Self {
        let keeper = Keeper::new(&config.name, &config.settings, &config.supply);
        Self {
            name: config.name,
            report: config.report,
            uninspectable: config.uninspectable,
            max_body_bytes: config.max_body_bytes,
            max_unit_bytes: config.settings.training.max_unit_bytes,
            decoding: decode::Limits {
                max_ratio: config.max_decoded_ratio,
                budget: decode::Budget::new(config.max_decoder_bytes),
            },
            exclusions: config.exclusions,
            detector: Detector::new(config.settings, config.snapshot),
            keeper,
        }
    }

    /// The streams and what they learned.
    pub fn detector(&self) -> &Detector {
        &self.detector
    }

    /// Whether [`Self::tick`] has any use; then every [`baselines::TICK_MS`](crate::baselines::TICK_MS).
    pub fn needs_ticks(&self) -> bool {
        self.keeper.needs_ticks()
    }

    /// The VM has been configured. `node` tells this proxy from others.
    pub fn start(&mut self, node: &str, services: &mut impl Services) {
        self.keeper.start(node, &mut self.detector, services);
    }

    /// Time passes; `now_ns` counts from any moment.
    pub fn tick(&mut self, now_ns: u64, services: &mut impl Services) {
        self.keeper.tick(now_ns, &mut self.detector, services);
    }

    /// The answer to a call of the keeper's.
    pub fn answered(&mut self, token: u32, answer: Answer<'_>, now_ns: u64, services: &mut impl Services) {
        self.keeper.answered(token, answer, now_ns, &mut self.detector, services);
    }

    /// To be called after every callback of an exchange: shares what has been learned in it, so that no
    /// other VM judges the same stream by another baseline.
    pub fn settle(&mut self, services: &mut impl Services) {
        let learned = self.detector.take_learned();
        if !learned.is_empty() {
            self.keeper.learned(learned, &mut self.detector, services);
        }
    }

    /// The same, to set a stream's plan.
    pub fn detector_mut(&mut self) -> &mut Detector {
        &mut self.detector
    }

    fn begin(
        &mut self,
        direction: Direction,
        reading: Result<Option<Reading>, Defect>,
        event_stream: bool,
    ) -> Inspection {
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
        // A streamed chat answer has another envelope than a whole one.
        let streamed = if event_stream && style != ApiStyle::Sse.as_str() { ".sse" } else { "" };
        let stream = format!("{}/{}/{style}{streamed}", self.name, direction.as_str());
        let message = self.detector.begin(&stream);
        Inspection { direction, message, parser, decoder, wire_bytes: 0, body_bytes: 0, defect }
    }

    /// The verdict on a message that the configuration excludes.
    fn disabled(&mut self, direction: Direction, host: &mut impl Host) -> Verdict {
        host.count(Metric::NotInspectedDisabled, 1);
        host.count(
            match direction {
                Direction::Request => Metric::RequestNotInspected,
                Direction::Response => Metric::ResponseNotInspected,
            },
            1,
        );
        let stream = format!("{}/{}/{DISABLED}", self.name, direction.as_str());
        let message = self.detector.ignore(&stream);
        self.detector.finish(message, Some(DISABLED.to_owned()))
    }

    /// How a body with these headers is read.
    fn reading(
        &self,
        codings: &[Coding],
        parser: Result<BodyParser, NotInspected>,
    ) -> Result<Reading, Defect> {
        let parser = parser.map_err(|reason| Defect::ContentType(reason.as_str()))?;
        let decoder = match codings {
            [] => None,
            codings => Some(Decoder::new(codings, &self.decoding).map_err(Defect::Decode)?),
        };
        Ok(Reading { parser, decoder })
    }

    fn refuses(&self, inspection: &Inspection) -> bool {
        self.uninspectable == Uninspectable::Refuse && inspection.defect.is_some()
    }

    fn refuses_verdict(&self, verdict: &Verdict) -> bool {
        self.uninspectable == Uninspectable::Refuse && verdict.outcome == Outcome::NotInspected
    }
}

impl Inspection {
    fn body(&mut self, plugin: &Plugin, chunk: Result<&[u8], HostError>) {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                // What follows a gap would be read wrongly.
                self.defect.get_or_insert(Defect::Host(error));
                self.end_of_body(plugin, true);
                return;
            }
        };
        let room = plugin.max_body_bytes.saturating_sub(self.wire_bytes);
        self.wire_bytes = self.wire_bytes.saturating_add(chunk.len() as u64);
        let inspected = first(chunk, room);
        let result = self.read(plugin, |decoder, give| match decoder {
            Some(decoder) => decoder.push(inspected, give),
            None => match give(inspected) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(DecodeError::Stopped),
            },
        });
        let defect = match result {
            Ok(()) if inspected.len() == chunk.len() => return,
            Ok(()) | Err(DecodeError::Stopped) => Defect::Size,
            Err(error) => Defect::Decode(error),
        };
        if self.parser.is_some() {
            // What was read is judged.
            self.defect.get_or_insert(defect);
            self.end_of_body(plugin, true);
        }
    }

    /// Has `decode` give decoded bytes to the parser, up to the size that is inspected.
    fn read(
        &mut self,
        plugin: &Plugin,
        decode: impl FnOnce(
            &mut Option<Decoder>,
            &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
        ) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError> {
        let Self { message, parser, decoder, body_bytes, .. } = self;
        let Some(parser) = parser else { return Ok(()) };
        let mut feed = Feed { message, max_unit_bytes: plugin.max_unit_bytes };
        decode(decoder, &mut |piece| {
            let inspected = first(piece, plugin.max_body_bytes.saturating_sub(*body_bytes));
            *body_bytes = body_bytes.saturating_add(inspected.len() as u64);
            parser.push(inspected, &mut feed);
            if inspected.len() == piece.len() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
    }

    /// The body is complete, or what came of it.
    fn end_of_body(&mut self, plugin: &Plugin, cut_short: bool) {
        let decoded = self.read(plugin, |decoder, give| match decoder {
            Some(decoder) => decoder.finish(give),
            None => Ok(()),
        });
        let Some(mut parser) = self.parser.take() else { return };
        self.decoder = None;
        let mut feed = Feed { message: &mut self.message, max_unit_bytes: plugin.max_unit_bytes };
        let parsed = parser.finish(&mut feed);
        let defect = match (decoded, parsed) {
            _ if cut_short => Defect::CutShort,
            (Ok(()), Ok(_)) => return,
            (Ok(()), Err(error)) => Defect::Malformed(error),
            (Err(DecodeError::Stopped), _) => Defect::Size,
            (Err(error), _) => Defect::Decode(error),
        };
        self.defect.get_or_insert(defect);
    }

    fn judge(self, plugin: &mut Plugin, host: &mut impl Host) -> Verdict {
        if let Some(defect) = &self.defect {
            host.count(defect.metric(), 1);
        }
        let verdict = plugin.detector.finish(self.message, self.defect.map(|defect| format!("{defect}")));
        if verdict.reason.as_deref() == Some("no_baseline") {
            host.count(Metric::NotInspectedNoBaseline, 1);
        }
        let metric = match (self.direction, verdict.outcome) {
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
        verdict
    }
}

impl Exchange {
    /// The request's headers are here. `end_of_stream`: it has no body.
    pub fn request_headers(
        &mut self,
        plugin: &mut Plugin,
        host: &mut impl Host,
        end_of_stream: bool,
    ) -> Step {
        if core::mem::replace(&mut self.request_begun, true) {
            return if self.answered { Step::Answered } else { Step::Forward };
        }
        let method = host.header(Direction::Request, ":method");
        let path = host.header(Direction::Request, ":path");
        let head = method.and_then(|method| Ok((method.unwrap_or_default(), path?.unwrap_or_default())));
        let (method, path) = head.as_ref().map_or((&[][..], &[][..]), |(method, path)| (method, path));
        self.style = ApiStyle::of_path(path);
        self.tunnel = method.eq_ignore_ascii_case(b"CONNECT");
        self.excluded = plugin.exclusions.of_path(path);
        let headers = if end_of_stream { Ok(None) } else { body_headers(host, Direction::Request).map(Some) };
        let content_type = headers.as_ref().ok().and_then(|headers| headers.as_ref()?.0.as_deref());
        if plugin.exclusions.exclude(self.excluded, Direction::Request, content_type) {
            let verdict = plugin.disabled(Direction::Request, host);
            self.publish(plugin, host, &verdict, Direction::Request);
            self.request_verdict = Some(verdict);
            return Step::Forward;
        }
        let reading = match (&head, &headers) {
            (Err(error), _) => Err(Defect::Host(*error)),
            _ if self.tunnel => Err(Defect::Upgrade("tunnel")),
            (_, Err(defect)) => Err(defect.clone()),
            (_, Ok(None)) => Ok(None),
            (Ok(_), Ok(Some((_, codings)))) => {
                codings.clone().map_err(Defect::Encoding).and_then(|codings| {
                    plugin.reading(&codings, BodyParser::for_request(path, content_type)).map(Some)
                })
            }
        };
        let mut inspection = plugin.begin(Direction::Request, reading, false);
        if let Ok((method, path)) = &head {
            let target = Unit { role: Role::Target, index: 0 };
            let mut feed = Feed { message: &mut inspection.message, max_unit_bytes: plugin.max_unit_bytes };
            // Its offsets are those in the request line.
            feed.text(target, &[method, &b" "[..], path].concat(), 0);
            feed.end(target);
        }
        let refused = plugin.refuses(&inspection);
        self.request = Some(inspection);
        if end_of_stream || refused { self.end_request(plugin, host, false) } else { Step::Forward }
    }

    /// More of the request's body; `chunk` holds only what no earlier call brought, or
    /// why the proxy did not give it.
    pub fn request_body(
        &mut self,
        plugin: &mut Plugin,
        host: &mut impl Host,
        chunk: Result<&[u8], HostError>,
        end_of_stream: bool,
    ) -> Step {
        if self.answered {
            return Step::Answered;
        }
        let Some(request) = &mut self.request else { return Step::Forward };
        request.body(plugin, chunk);
        // A body over the limit is known to be refused before its end.
        if end_of_stream || plugin.refuses(request) {
            self.end_request(plugin, host, false)
        } else if plugin.uninspectable == Uninspectable::Refuse {
            Step::Hold
        } else {
            Step::Forward
        }
    }

    /// The request ends with trailers.
    pub fn request_trailers(&mut self, plugin: &mut Plugin, host: &mut impl Host) -> Step {
        if self.answered { Step::Answered } else { self.end_request(plugin, host, false) }
    }

    fn end_request(&mut self, plugin: &mut Plugin, host: &mut impl Host, cut_short: bool) -> Step {
        let Some(mut request) = self.request.take() else { return Step::Forward };
        request.end_of_body(plugin, cut_short);
        // Nothing in the message is at fault where only the baseline is missing.
        let status = request.defect.as_ref().map_or(503, Defect::status);
        let defective = plugin.refuses(&request);
        let verdict = request.judge(plugin, host);
        let refuse = !cut_short && (defective || plugin.refuses_verdict(&verdict));
        self.publish(plugin, host, &verdict, Direction::Request);
        let reason = verdict.reason.clone();
        self.request_verdict = Some(verdict);
        if refuse { self.answer(host, status, Direction::Request, reason) } else { Step::Forward }
    }

    /// The response's headers are here. `end_of_stream`: it has no body.
    pub fn response_headers(
        &mut self,
        plugin: &mut Plugin,
        host: &mut impl Host,
        end_of_stream: bool,
    ) -> Step {
        let judged = !self.answered && !end_of_stream && !self.response_begun;
        let upgrade = if judged { self.upgrade(host) } else { None };
        if let (Some(defect @ Defect::Upgrade(_)), Some(request)) = (&upgrade, &mut self.request) {
            // What the client sends from now on is no body of this request.
            request.defect.get_or_insert(defect.clone());
            if self.end_request(plugin, host, false) == Step::Answered {
                return Step::Answered;
            }
        }
        if plugin.report.response_headers {
            // Always written, so that no upstream can put a verdict of its own there.
            let value = self
                .request_verdict
                .as_ref()
                .map_or_else(|| "not_inspected;reason=\"response_came_first\"".to_owned(), structured_field);
            self.tell(host, |host| host.set_response_header(REQUEST_VERDICT_HEADER, &value));
        }
        // Our own answer, or nothing to judge.
        if !judged {
            return Step::Forward;
        }
        self.response_begun = true;
        let headers = body_headers(host, Direction::Response);
        let content_type = headers.as_ref().ok().and_then(|(content_type, _)| content_type.as_deref());
        if plugin.exclusions.exclude(self.excluded, Direction::Response, content_type) {
            let verdict = plugin.disabled(Direction::Response, host);
            self.publish(plugin, host, &verdict, Direction::Response);
            return Step::Forward;
        }
        let event_stream = content_type.is_some_and(is_event_stream);
        let reading = match (upgrade, &headers) {
            (Some(defect), _) => Err(defect),
            (None, Err(defect)) => Err(defect.clone()),
            (None, Ok((_, Err(name)))) => Err(Defect::Encoding(name.clone())),
            (None, Ok((_, Ok(codings)))) => {
                plugin.reading(codings, BodyParser::for_response(self.style, content_type))
            }
        };
        let event_stream = event_stream && reading.is_ok();
        let inspection = plugin.begin(Direction::Response, reading.map(Some), event_stream);
        let refused = plugin.refuses(&inspection);
        self.response = Some(inspection);
        if plugin.uninspectable == Uninspectable::Refuse && !refused {
            // With a length, a client could take what came before the break for the whole answer: the
            // end of a body may come after its last byte has left.
            self.tell(host, |host| host.remove_response_header("content-length"));
        }
        if refused { self.end_response(plugin, host, false) } else { Step::Forward }
    }

    /// Whether the exchange goes on as something else than HTTP messages.
    fn upgrade(&self, host: &impl Host) -> Option<Defect> {
        if self.tunnel {
            return Some(Defect::Upgrade("tunnel"));
        }
        // The request of an upgrade has no end before the answer.
        self.request.as_ref()?;
        let header = |name| host.header(Direction::Response, name);
        let protocol = header(":status").and_then(|status| match status.as_deref() {
            Some(b"101") => header("upgrade").map(Some),
            _ => Ok(None),
        });
        match protocol {
            Ok(None) => None,
            Ok(Some(name)) => Some(Defect::Upgrade(match name {
                Some(name) if name.eq_ignore_ascii_case(b"websocket") => "websocket",
                _ => "upgrade",
            })),
            // Whatever it is, it is not known to be a response.
            Err(error) => Some(Defect::Host(error)),
        }
    }

    /// More of the response's body; `chunk` holds only what no earlier call brought, or
    /// why the proxy did not give it.
    pub fn response_body(
        &mut self,
        plugin: &mut Plugin,
        host: &mut impl Host,
        chunk: Result<&[u8], HostError>,
        end_of_stream: bool,
    ) -> Step {
        let Some(response) = &mut self.response else { return Step::Forward };
        response.body(plugin, chunk);
        if end_of_stream || plugin.refuses(response) {
            self.end_response(plugin, host, false)
        } else {
            Step::Forward
        }
    }

    /// The response ends with trailers.
    pub fn response_trailers(&mut self, plugin: &mut Plugin, host: &mut impl Host) -> Step {
        self.end_response(plugin, host, false)
    }

    fn end_response(&mut self, plugin: &mut Plugin, host: &mut impl Host, cut_short: bool) -> Step {
        let Some(mut response) = self.response.take() else { return Step::Forward };
        response.end_of_body(plugin, cut_short);
        let defective = plugin.refuses(&response);
        let verdict = response.judge(plugin, host);
        let refuse = !cut_short && (defective || plugin.refuses_verdict(&verdict));
        self.publish(plugin, host, &verdict, Direction::Response);
        if refuse { self.answer(host, 502, Direction::Response, verdict.reason) } else { Step::Forward }
    }

    /// The exchange is over, however it ended; what is still open was cut short. Call it while filter
    /// state can still be set (in Envoy: in `proxy_on_log`). Calling it again does nothing.
    pub fn done(&mut self, plugin: &mut Plugin, host: &mut impl Host) {
        self.end_request(plugin, host, true);
        self.end_response(plugin, host, true);
    }

    fn answer(
        &mut self,
        host: &mut impl Host,
        status: u16,
        direction: Direction,
        reason: Option<String>,
    ) -> Step {
        self.answered = true;
        host.count(Metric::Refused, 1);
        let reason = reason.unwrap_or_default();
        let body = serde_json::json!({"error": {
            "type": "driftlock_refused",
            "message": format!("the {} could not be inspected ({reason}) and this route refuses such messages", direction.as_str()),
            "code": reason,
        }});
        self.tell(host, |host| host.respond(status, &format!("{body}")));
        Step::Answered
    }

    fn publish(
        &mut self,
        plugin: &mut Plugin,
        host: &mut impl Host,
        verdict: &Verdict,
        direction: Direction,
    ) {
        self.worst = self.worst.max(Some(verdict.outcome));
        host.judged(direction, verdict);
        // What the operator excluded is no news.
        let disabled = verdict.reason.as_deref() == Some(DISABLED);
        let flagged = matches!(verdict.outcome, Outcome::Anomalous | Outcome::NotInspected) && !disabled;
        let logged = match plugin.report.log {
            LogPolicy::Never => false,
            LogPolicy::Flagged => flagged,
            LogPolicy::Always => true,
        };
        let observed = plugin.keeper.outbox().filter(|_| !disabled);
        if !logged && !plugin.report.filter_state && observed.is_none() {
            return;
        }
        let json = match verdict.to_json() {
            Ok(json) => json,
            Err(error) => {
                host.log(Level::Error, &format!("driftlock: the verdict does not serialise: {error}"));
                return;
            }
        };
        if let Some(outbox) = observed {
            outbox.push(direction.as_str(), &json);
        }
        if plugin.report.filter_state {
            let key = match direction {
                Direction::Request => filter_state::REQUEST,
                Direction::Response => filter_state::RESPONSE,
            };
            self.tell(host, |host| host.set_filter_state(key, &json));
            let outcome = self.worst.map_or("", Outcome::as_str);
            self.tell(host, |host| host.set_filter_state(filter_state::OUTCOME, outcome));
        }
        if logged {
            let level = if verdict.outcome == Outcome::Anomalous { Level::Warn } else { Level::Info };
            host.log(level, &format!("driftlock {} {json}", direction.as_str()));
        }
    }

    /// Makes a host call whose failure must not stop the exchange.
    fn tell<H: Host>(&mut self, host: &mut H, call: impl FnOnce(&mut H) -> Result<(), HostError>) {
        if call(host).is_err() {
            host.count(Metric::HostCallErrors, 1);
        }
    }
}

/// A message's content-type, and its codings or the first one that is not known.
type BodyHeaders = (Option<Vec<u8>>, Result<Vec<Coding>, String>);

fn body_headers(host: &impl Host, direction: Direction) -> Result<BodyHeaders, Defect> {
    let header = |name| host.header(direction, name).map_err(Defect::Host);
    let encoding = header("content-encoding")?;
    let codings = decode::codings(encoding.as_deref().unwrap_or_default()).map_err(|unknown| unknown.0);
    Ok((header("content-type")?, codings))
}

/// At most `room` bytes.
fn first(bytes: &[u8], room: u64) -> &[u8] {
    usize::try_from(room).ok().and_then(|room| bytes.get(..room)).unwrap_or(bytes)
}

fn is_event_stream(content_type: &[u8]) -> bool {
    let essence = content_type.split(|&b| b == b';').next().unwrap_or_default();
    essence.trim_ascii().eq_ignore_ascii_case(b"text/event-stream")
}

/// The verdict as a structured field item (RFC 9651 section 3.3): a token with parameters.
fn structured_field(verdict: &Verdict) -> String {
    let mut value = verdict.outcome.as_str().to_owned();
    if let Some([rank, of]) = verdict.p_fraction {
        value += &format!(";p=\"{rank}/{of}\"");
    }
    if let Some(unit) = verdict.unit {
        value += &format!(";unit={unit}");
    }
    if let Some(reason) = &verdict.reason {
        // Reasons are plain words, digits and `:/_` by construction.
        value += &format!(";reason=\"{reason}\"");
    }
    value += &format!(";stream=\"{}\"", verdict.stream);
    if let Some(baseline) = &verdict.baseline {
        value += &format!(";baseline=sha256:{}", baseline.get(..16).unwrap_or(baseline));
    }
    value
}
