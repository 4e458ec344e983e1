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

use driftlock_engine::detector::{Detector, Message, UnitId};
use driftlock_engine::evidence::{Outcome, Verdict};

use crate::config::{Config, ConfigError, LogPolicy, Report, Uninspectable};
use crate::content::{ApiStyle, BodyParser, ContentError, Role, Sink, Unit};
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
    detector: Detector,
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
    body_bytes: u64,
    defect: Option<Defect>,
}

/// Why a message, or a part of it, is not inspected.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Defect {
    Encoding(String),
    ContentType(&'static str),
    Size,
    Malformed(ContentError),
    CutShort,
    Host(HostError),
}

impl Defect {
    fn metric(&self) -> Metric {
        match self {
            Self::Encoding(_) => Metric::NotInspectedEncoding,
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
            Self::Size => 413,
            Self::Malformed(_) | Self::CutShort => 400,
            Self::Host(_) => 503,
        }
    }
}

impl core::fmt::Display for Defect {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Encoding(name) => write!(f, "encoding:{name}"),
            Self::ContentType(reason) => f.write_str(reason),
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
        Self {
            name: config.name,
            report: config.report,
            uninspectable: config.uninspectable,
            max_body_bytes: config.max_body_bytes,
            max_unit_bytes: config.settings.training.max_unit_bytes,
            detector: Detector::new(config.settings, config.snapshot),
        }
    }

    /// The streams and what they learned.
    pub fn detector(&self) -> &Detector {
        &self.detector
    }

    /// The same, to set a stream's plan.
    pub fn detector_mut(&mut self) -> &mut Detector {
        &mut self.detector
    }

    fn begin(
        &mut self,
        direction: Direction,
        parser: Result<Option<BodyParser>, Defect>,
        event_stream: bool,
    ) -> Inspection {
        let (parser, defect) = match parser {
            Ok(parser) => (parser, None),
            Err(defect) => (None, Some(defect)),
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
        Inspection { direction, message: self.detector.begin(&stream), parser, body_bytes: 0, defect }
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
        let room = plugin.max_body_bytes.saturating_sub(self.body_bytes);
        self.body_bytes = self.body_bytes.saturating_add(chunk.len() as u64);
        let Some(parser) = &mut self.parser else { return };
        let mut feed = Feed { message: &mut self.message, max_unit_bytes: plugin.max_unit_bytes };
        let inspected = usize::try_from(room).ok().and_then(|room| chunk.get(..room)).unwrap_or(chunk);
        parser.push(inspected, &mut feed);
        if inspected.len() < chunk.len() {
            // What was read is judged.
            self.defect.get_or_insert(Defect::Size);
            self.end_of_body(plugin, true);
        }
    }

    /// The body is complete, or what came of it.
    fn end_of_body(&mut self, plugin: &Plugin, cut_short: bool) {
        let Some(mut parser) = self.parser.take() else { return };
        let mut feed = Feed { message: &mut self.message, max_unit_bytes: plugin.max_unit_bytes };
        let result = parser.finish(&mut feed);
        if cut_short {
            self.defect.get_or_insert(Defect::CutShort);
        } else if let Err(error) = result {
            self.defect.get_or_insert(Defect::Malformed(error));
        }
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
        let path = head.as_ref().map_or(&[][..], |(_, path)| path);
        self.style = ApiStyle::of_path(path);
        let parser = match &head {
            Err(error) => Err(Defect::Host(*error)),
            Ok(_) if end_of_stream => Ok(None),
            Ok((_, path)) => body_headers(host, Direction::Request).and_then(|content_type| {
                BodyParser::for_request(path, content_type.as_deref())
                    .map(Some)
                    .map_err(|reason| Defect::ContentType(reason.as_str()))
            }),
        };
        let mut inspection = plugin.begin(Direction::Request, parser, false);
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
        if plugin.report.response_headers {
            // Always written, so that no upstream can put a verdict of its own there.
            let value = self
                .request_verdict
                .as_ref()
                .map_or_else(|| "not_inspected;reason=\"response_came_first\"".to_owned(), structured_field);
            self.tell(host, |host| host.set_response_header(REQUEST_VERDICT_HEADER, &value));
        }
        // Our own answer, or nothing to judge.
        if self.answered || end_of_stream || core::mem::replace(&mut self.response_begun, true) {
            return Step::Forward;
        }
        let parser = body_headers(host, Direction::Response).and_then(|content_type| {
            let event_stream = content_type.as_deref().is_some_and(is_event_stream);
            BodyParser::for_response(self.style, content_type.as_deref())
                .map(|parser| (parser, event_stream))
                .map_err(|reason| Defect::ContentType(reason.as_str()))
        });
        let event_stream = parser.as_ref().is_ok_and(|(_, event_stream)| *event_stream);
        let inspection =
            plugin.begin(Direction::Response, parser.map(|(parser, _)| Some(parser)), event_stream);
        let refused = plugin.refuses(&inspection);
        self.response = Some(inspection);
        if plugin.uninspectable == Uninspectable::Refuse && !refused {
            // With a length, a client could take what came before the break for the whole answer: the
            // end of a body may come after its last byte has left.
            self.tell(host, |host| host.remove_response_header("content-length"));
        }
        if refused { self.end_response(plugin, host, false) } else { Step::Forward }
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

    fn publish(&mut self, plugin: &Plugin, host: &mut impl Host, verdict: &Verdict, direction: Direction) {
        self.worst = self.worst.max(Some(verdict.outcome));
        let flagged = matches!(verdict.outcome, Outcome::Anomalous | Outcome::NotInspected);
        let logged = match plugin.report.log {
            LogPolicy::Never => false,
            LogPolicy::Flagged => flagged,
            LogPolicy::Always => true,
        };
        if !logged && !plugin.report.filter_state {
            return;
        }
        let json = match serde_json::to_string(verdict) {
            Ok(json) => json,
            Err(error) => {
                host.log(Level::Error, &format!("driftlock: the verdict does not serialise: {error}"));
                return;
            }
        };
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

/// The message's content-type, if its body can be read at all.
fn body_headers(host: &mut impl Host, direction: Direction) -> Result<Option<alloc::vec::Vec<u8>>, Defect> {
    let encoding = host.header(direction, "content-encoding").map_err(Defect::Host)?;
    if let Some(encoding) = encoding {
        let encoding = encoding.trim_ascii();
        if !encoding.is_empty() && !encoding.eq_ignore_ascii_case(b"identity") {
            return Err(Defect::Encoding(token(encoding)));
        }
    }
    host.header(direction, "content-type").map_err(Defect::Host)
}

/// A header's value as a short plain word.
fn token(value: &[u8]) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b',');
    value.iter().filter(|b| plain(b)).take(24).map(|&b| b.to_ascii_lowercase() as char).collect()
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
