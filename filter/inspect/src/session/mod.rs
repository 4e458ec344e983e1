//! One exchange, from its first header to its verdicts and what is done about them.
//!
//! What: [`Plugin`] is what a VM holds (configuration and detector), [`Exchange`] what a request and its
//! response need while they pass. The caller reports each proxy callback and obeys the returned [`Step`];
//! verdicts, changed bodies and refusals go out through the [`Host`]. `inspection` reads one message, `prefix` has what
//! other requests began with, `act` passes it on or stops it, `report` says what came of it.
//!
//! Why so: the same code runs in the filter and in the native replay, so both give the same verdicts. Nothing
//! here decides by how the bytes were cut into chunks; the clock is for metrics.
//!
//! What is held: nothing, unless a rule blocks or the route fails closed. A request is then held by its body
//! (its headers have gone, the upstream waits); where `hold.headers` says that the proxy allows it, by its
//! headers too. An answer in one piece likewise; a streamed answer never: it passes part by part, is looked at
//! as it grows, and is ended between two parts when it stands out.
//!
//! Cost: beside the parser and the scorers, one verdict of a few hundred bytes a message.
//!
//! Left out on purpose: a second opinion; what the rules say is done.

mod act;
mod inspection;
mod prefix;
mod report;

use alloc::borrow::ToOwned;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use driftlock_engine::detector::Detector;
use driftlock_engine::evidence::{Outcome, Verdict};

use crate::action::{Rules, SampleHash};
use crate::baselines::{Answer, Keeper, Services};
use crate::config::{Config, ConfigError, HoldLimits, Report, Uninspectable};
use crate::content::{ApiStyle, BodyParser, Role, Unit};
use crate::decode::{self, Coding};
use crate::exclude::{Exclusions, PathMatches};
use crate::host::{Direction, Host, HostError, Level, Metric};
use crate::refusal::Dialect;
use crate::rewrite::{Format, Rewriter};
use inspection::{Defect, Feed, Hold, Inspection, Reading};
use prefix::Prefixes;
use report::{Gauges, Taken, Times, structured_field, tell};

/// Filter-state keys, as the access log finds them behind `wasm.`.
pub mod filter_state {
    /// The request's verdict: JSON, or a structured field (RFC 9651 item) where it is brief.
    pub const REQUEST: &str = "driftlock.request";
    /// The response's verdict, likewise.
    pub const RESPONSE: &str = "driftlock.response";
    /// The worse outcome of both: one word.
    pub const OUTCOME: &str = "driftlock.outcome";
    /// What was done: `request=block`, `request=redact;tokens=2, response=shadow_block`.
    pub const ACTION: &str = "driftlock.action";
}

/// The header that carries the request's verdict, a structured field (RFC 9651 item): on the response, and on
/// the request to the upstream where headers are held.
pub const REQUEST_VERDICT_HEADER: &str = "x-driftlock-request";
/// The header or trailer of the response that carries its own verdict.
pub const RESPONSE_VERDICT_HEADER: &str = "x-driftlock-response";

/// The reason of messages that the configuration excludes.
const DISABLED: &str = "disabled";

/// What one VM holds.
#[derive(Debug)]
pub struct Plugin {
    name: String,
    report: Report,
    rules: Rules,
    hold: HoldLimits,
    /// A held request has been given its body: the proxy allows headers to be held.
    hold_proven: bool,
    uninspectable: Uninspectable,
    max_body_bytes: u64,
    max_unit_bytes: usize,
    decoding: decode::Limits,
    request_headers: Vec<String>,
    exclusions: Exclusions,
    detector: Detector,
    prefixes: Prefixes,
    keeper: Keeper,
    gauges: Gauges,
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
    dialect: Dialect,
    /// The path asks for an answer whose parts are a JSON array.
    parts: bool,
    /// What sampling goes by, where rules sample and the request has an id.
    sample: Option<u64>,
    /// The exclusions that the request's path leaves open.
    excluded: PathMatches,
    /// Bytes are passed through that are no HTTP message (CONNECT).
    tunnel: bool,
    request: Option<Box<Inspection>>,
    response: Option<Box<Inspection>>,
    /// Whose headers came. Should a proxy report them again, the message still has one verdict.
    request_begun: bool,
    response_begun: bool,
    /// The stream was ended before its end; what still comes goes nowhere.
    response_cut: bool,
    /// The request's verdict as a header, if the rules let it be told.
    request_told: Option<String>,
    request_judged: bool,
    worst: Option<Outcome>,
    actions: String,
    answered: bool,
    times: Times,
}

/// How a message comes to its verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// In its headers' callback: it has no body, or is refused for what they say.
    Headers,
    /// In a body callback.
    Body,
    /// With trailers.
    Trailers,
    /// It broke off.
    CutShort,
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
        let mut detector = Detector::new(config.settings, config.snapshot);
        if !config.reuse_scores {
            detector.scratch().score_anew();
        }
        Self {
            name: config.name,
            report: config.report,
            rules: config.actions,
            hold: config.hold,
            hold_proven: false,
            uninspectable: config.uninspectable,
            max_body_bytes: config.max_body_bytes,
            max_unit_bytes: config.settings.training.max_unit_bytes,
            decoding: decode::Limits {
                max_ratio: config.max_decoded_ratio,
                budget: decode::Budget::new(config.max_decoder_bytes),
            },
            request_headers: config.request_headers,
            exclusions: config.exclusions,
            detector,
            prefixes: Prefixes::new(config.reuse_scores),
            keeper,
            gauges: Gauges::default(),
        }
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

    /// The streams and what they learned.
    pub fn detector(&self) -> &Detector {
        &self.detector
    }

    /// The same, to set a stream's plan.
    pub fn detector_mut(&mut self) -> &mut Detector {
        &mut self.detector
    }

    /// How many bytes of requests were not read, as their beginning came before.
    pub fn taken_up_bytes(&self) -> u64 {
        self.prefixes.taken_up_bytes()
    }

    /// The request headers that are judged, in the order of their ordinals.
    pub fn selected_headers(&self) -> &[String] {
        &self.request_headers
    }

    /// What may be held, and how long. Headers are held only where this says so.
    pub fn hold(&self) -> HoldLimits {
        self.hold
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

    fn refuses(&self, inspection: &Inspection) -> bool {
        self.uninspectable == Uninspectable::Refuse && inspection.defect.is_some()
    }

    fn refuses_verdict(&self, verdict: &Verdict) -> bool {
        self.uninspectable == Uninspectable::Refuse && verdict.outcome == Outcome::NotInspected
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
        self.times.request_began_ns = host.now_ns();
        let method = host.header(Direction::Request, ":method");
        let path = host.header(Direction::Request, ":path");
        let head = method.and_then(|method| Ok((method.unwrap_or_default(), path?.unwrap_or_default())));
        let (method, path) = head.as_ref().map_or((&[][..], &[][..]), |(method, path)| (method, path));
        self.style = ApiStyle::of_path(path);
        self.dialect = Dialect::of(self.style);
        self.parts = is_array_of_parts(path);
        self.tunnel = method.eq_ignore_ascii_case(b"CONNECT");
        self.excluded = plugin.exclusions.of_path(path);
        let headers = if end_of_stream { Ok(None) } else { body_headers(host, Direction::Request).map(Some) };
        let content_type = headers.as_ref().ok().and_then(|headers| headers.as_ref()?.0.as_deref());
        if plugin.exclusions.exclude(self.excluded, Direction::Request, content_type) {
            let verdict = plugin.disabled(Direction::Request, host);
            self.publish(plugin, host, Direction::Request, &verdict, Taken::default(), None);
            self.request_told =
                plugin.rules.plan(&verdict.stream).tells().then(|| structured_field(&verdict));
            self.request_judged = true;
            return Step::Forward;
        }
        let reading = match (&head, &headers) {
            (Err(error), _) => Err(Defect::Host(*error)),
            _ if self.tunnel => Err(Defect::Upgrade("tunnel")),
            (_, Err(defect)) => Err(defect.clone()),
            (_, Ok(None)) => Ok(None),
            (Ok(_), Ok(Some((_, codings)))) => {
                codings.clone().map_err(Defect::Encoding).and_then(|codings| {
                    Reading::new(plugin, &codings, BodyParser::for_request_of(self.style, content_type))
                        .map(Some)
                })
            }
        };
        if plugin.rules.sample() {
            self.sample = request_id(host);
        }
        let mut inspection = Inspection::begin(plugin, Direction::Request, reading);
        if head.is_ok() {
            let target = Unit { role: Role::Target, index: 0 };
            if let Some(message) = &mut inspection.message {
                let mut feed = Feed::new(message, plugin.max_unit_bytes, plugin.detector.scratch());
                // Its offsets are those in the request line.
                feed.whole(target, &[method, &b" "[..], path].concat());
            }
            inspection.read_headers(plugin, host);
        }
        if plugin.hold.headers {
            // The upstream is told by nobody else.
            tell(host, |host| host.remove_header(Direction::Request, REQUEST_VERDICT_HEADER));
        }
        let ended = end_of_stream || plugin.refuses(&inspection);
        self.begun(plugin, host, inspection, ended)
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
        self.body(plugin, host, Direction::Request, chunk, end_of_stream)
    }

    /// The request ends with trailers.
    pub fn request_trailers(&mut self, plugin: &mut Plugin, host: &mut impl Host) -> Step {
        if self.answered { Step::Answered } else { self.end(plugin, host, Direction::Request, End::Trailers) }
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
            if self.end(plugin, host, Direction::Request, End::Headers) == Step::Answered {
                return Step::Answered;
            }
        }
        self.tell_request_verdict(host);
        // Our own answer, or nothing to judge.
        if !judged {
            return Step::Forward;
        }
        self.response_begun = true;
        let headers = body_headers(host, Direction::Response);
        let content_type = headers.as_ref().ok().and_then(|(content_type, _)| content_type.as_deref());
        if plugin.exclusions.exclude(self.excluded, Direction::Response, content_type) {
            let verdict = plugin.disabled(Direction::Response, host);
            self.publish(plugin, host, Direction::Response, &verdict, Taken::default(), None);
            return Step::Forward;
        }
        let upgraded = matches!(upgrade, Some(Defect::Upgrade(_)));
        let reading = match (upgrade, &headers) {
            (Some(defect), _) => Err(defect),
            (None, Err(defect)) => Err(defect.clone()),
            (None, Ok((_, Err(name)))) => Err(Defect::Encoding(name.clone())),
            (None, Ok((_, Ok(codings)))) => {
                Reading::new(plugin, codings, BodyParser::for_response(self.style, content_type))
            }
        };
        let inspection = Inspection::begin(plugin, Direction::Response, reading.map(Some));
        let ended = upgraded || plugin.refuses(&inspection);
        self.begun(plugin, host, inspection, ended)
    }

    /// A message's head has been read; `ended` tells that nothing of it is to be waited for.
    fn begun<H: Host>(
        &mut self,
        plugin: &mut Plugin,
        host: &mut H,
        mut inspection: Box<Inspection>,
        ended: bool,
    ) -> Step {
        if !ended {
            self.prepare(plugin, host, &mut inspection);
        }
        let (direction, hold) = (inspection.direction, inspection.hold);
        match direction {
            Direction::Request => self.request = Some(inspection),
            Direction::Response => self.response = Some(inspection),
        }
        if ended {
            let began_ns = match direction {
                // The target and the headers were scored in this callback.
                Direction::Request => self.times.request_began_ns,
                Direction::Response => host.now_ns(),
            };
            self.end_since(plugin, host, direction, End::Headers, began_ns)
        } else if hold == Hold::Headers {
            Step::Hold
        } else {
            Step::Forward
        }
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
        self.body(plugin, host, Direction::Response, chunk, end_of_stream)
    }

    /// The response ends with trailers.
    pub fn response_trailers(&mut self, plugin: &mut Plugin, host: &mut impl Host) -> Step {
        self.end(plugin, host, Direction::Response, End::Trailers)
    }

    /// The exchange is over, however it ended; what is still open was cut short. Call it while filter
    /// state can still be set (in Envoy: in `proxy_on_log`). Calling it again does nothing.
    pub fn done(&mut self, plugin: &mut Plugin, host: &mut impl Host) {
        self.end(plugin, host, Direction::Request, End::CutShort);
        self.end(plugin, host, Direction::Response, End::CutShort);
    }

    /// Held headers have waited for `hold.deadline_ms` and no body has come. Says whether the proxy is to let
    /// them go on. Where it has never given a held message its body, it does not allow headers to be held, and
    /// the plugin holds none from now on.
    pub fn release_headers(
        &mut self,
        plugin: &mut Plugin,
        host: &mut impl Host,
        direction: Direction,
    ) -> bool {
        let side = self.side(direction);
        let Some(inspection) = side.filter(|side| side.hold == Hold::Headers && side.wire_bytes == 0) else {
            return false;
        };
        inspection.hold = Hold::Body;
        host.count(Metric::ErrorHoldDeadline, 1);
        if !plugin.hold_proven && core::mem::take(&mut plugin.hold.headers) {
            host.log(
                Level::Error,
                "driftlock: this proxy gives no body while headers are held, so none are held from now on; set allow_on_headers_stop_iteration in the proxy's plugin configuration, or hold.headers to false in this one",
            );
        }
        true
    }

    fn side(&mut self, direction: Direction) -> Option<&mut Inspection> {
        match direction {
            Direction::Request => self.request.as_deref_mut(),
            Direction::Response => self.response.as_deref_mut(),
        }
    }

    /// Always written or removed, so that no upstream can put a verdict of its own there.
    fn tell_request_verdict(&mut self, host: &mut impl Host) {
        let open = self.request.as_ref().is_none_or(|request| request.plan.tells());
        if !self.request_judged && open {
            let value = "not_inspected;reason=response_came_first".to_owned();
            self.request_told.get_or_insert(value);
        }
        match &self.request_told {
            Some(value) => {
                tell(host, |host| host.set_header(Direction::Response, REQUEST_VERDICT_HEADER, value))
            }
            None => tell(host, |host| host.remove_header(Direction::Response, REQUEST_VERDICT_HEADER)),
        };
    }

    /// What the rules say of the message before its body comes: what is held, what is rewritten.
    fn prepare(&self, plugin: &Plugin, host: &mut impl Host, inspection: &mut Inspection) {
        let plan = inspection.plan;
        let direction = inspection.direction;
        let out = self.sample.is_some_and(|sample| !plan.applies(sample));
        if self.sample.is_none() && !plan.applies_to_all() {
            let mut hash = SampleHash::new();
            hash.add(inspection.message.as_ref().map_or("", |message| message.stream()).as_bytes());
            inspection.hash = Some(hash);
        }
        let blocks = plan.block && !plan.shadow && !out;
        let fails_closed = plugin.uninspectable == Uninspectable::Refuse;
        let stream = inspection.is_stream();
        let judged_first = match direction {
            Direction::Request => blocks || fails_closed,
            Direction::Response => blocks && !stream,
        };
        let may_hold_headers = plugin.hold.headers
            && match direction {
                // An upgrade has no body before it is answered.
                Direction::Request => {
                    host.header(Direction::Request, "upgrade").is_ok_and(|upgrade| upgrade.is_none())
                }
                Direction::Response => !stream,
            };
        inspection.hold = match (may_hold_headers && (judged_first || plan.tells()), judged_first) {
            (true, _) => Hold::Headers,
            (false, true) => Hold::Body,
            (false, false) => Hold::Nothing,
        };
        let format = inspection.format(self.parts && direction == Direction::Response);
        let classes = plan.redact.filter(|_| !out);
        if let Some(format) = format {
            let whole_parts = blocks && direction == Direction::Response && stream;
            if classes.is_some() || whole_parts {
                inspection.rewriter = Some(Box::new(Rewriter::new(format, classes)));
            }
        }
        if classes.is_some() && !format.is_some_and(Format::is_redacted) {
            host.count(Metric::ErrorNotRedacted, 1);
        }
        let rewrites = inspection.rewriter.is_some() && !plan.shadow;
        let broken_off = fails_closed && direction == Direction::Response;
        let replaced = direction == Direction::Response && inspection.hold == Hold::Body;
        if (rewrites || broken_off || replaced) && inspection.hold != Hold::Headers {
            // With a length, a client could take what came before a break for the whole answer, and a
            // changed body would not fit it.
            tell(host, |host| host.remove_header(direction, "content-length"));
            if rewrites && inspection.encoded {
                inspection.recoded = true;
                tell(host, |host| host.remove_header(direction, "content-encoding"));
            }
            if classes.is_some() && !plan.shadow {
                act::remove_digests(host, direction);
            }
        }
    }

    fn body<H: Host>(
        &mut self,
        plugin: &mut Plugin,
        host: &mut H,
        direction: Direction,
        chunk: Result<&[u8], HostError>,
        end_of_stream: bool,
    ) -> Step {
        let cut = self.response_cut && direction == Direction::Response;
        let Some(inspection) = self.side(direction) else {
            return if cut { act::swallow(host, direction) } else { Step::Forward };
        };
        let began_ns = host.now_ns();
        plugin.hold_proven |= inspection.hold == Hold::Headers;
        let spoken = inspection.read(plugin, chunk);
        // An answer in one piece says nothing about when its words were made.
        if spoken && inspection.is_stream() && inspection.first_token_ns.is_none() {
            inspection.first_token_ns = host.now_ns();
        }
        // A body over the limit is known to be refused before its end.
        let ended = end_of_stream || plugin.refuses(inspection);
        if !ended {
            inspection.scoring_ns = inspection.scoring_ns.saturating_add(elapsed(host, began_ns));
        }
        let passed = self.take_bytes(plugin, host, direction, chunk, ended);
        if let Some(step) = passed {
            return step;
        }
        self.end_since(plugin, host, direction, End::Body, began_ns)
    }
}

fn elapsed(host: &impl Host, since_ns: Option<u64>) -> u64 {
    match (since_ns, host.now_ns()) {
        (Some(since), Some(now)) => now.saturating_sub(since),
        _ => 0,
    }
}

/// Gemini streams a JSON array where it is not asked for server-sent events.
fn is_array_of_parts(path: &[u8]) -> bool {
    let method = path.split(|byte| matches!(byte, b'?' | b'#')).next().unwrap_or_default();
    method.ends_with(b":streamGenerateContent")
}

/// The hash of the request's id.
fn request_id(host: &impl Host) -> Option<u64> {
    let id = host.header(Direction::Request, "x-request-id").ok().flatten().filter(|id| !id.is_empty())?;
    let mut hash = SampleHash::new();
    hash.add(&id);
    Some(hash.finish())
}

/// A message's content-type, and its codings or the first one that is not known.
type BodyHeaders = (Option<Vec<u8>>, Result<Vec<Coding>, String>);

fn body_headers(host: &impl Host, direction: Direction) -> Result<BodyHeaders, Defect> {
    let header = |name| host.header(direction, name).map_err(Defect::Host);
    let encoding = header("content-encoding")?;
    let codings = decode::codings(encoding.as_deref().unwrap_or_default()).map_err(|unknown| unknown.0);
    Ok((header("content-type")?, codings))
}
