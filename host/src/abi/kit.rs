//! A test kit for proxy-wasm filters: drive a module by a script of callbacks, and say which host calls
//! and which outcome each must bring about.
//!
//! A [`Script`] is a list of acts (what the proxy does) with expectations after each; [`Script::run`]
//! plays it on a fresh VM and returns what is left, or a [`Failure`] that names the act, what was
//! expected, and the whole [`Tape`]. The host underneath is the real one, not a mock: headers, buffers,
//! shared data and metrics behave as in Envoy, so a script only says what it is about. What is hard to
//! bring about (a lost compare-and-swap, a property of a TLS connection) is answered in the host's place
//! by [`Script::answer`]. No globals: scripts run in parallel, each VM with its own state unless
//! [`PluginOptions::shared`] is shared on purpose.
//!
//! ```
//! use driftlock_host::abi::kit::{Script, call};
//! use driftlock_host::abi::{MapType, Module, PluginOptions, Status};
//!
//! # let wat = r#"(module
//! #   (import "env" "proxy_get_header_map_value" (func $get (param i32 i32 i32 i32 i32) (result i32)))
//! #   (import "env" "proxy_send_local_response"
//! #     (func $reply (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
//! #   (memory (export "memory") 1)
//! #   (data (i32.const 100) "authorization")
//! #   (func (export "proxy_abi_version_0_2_1"))
//! #   (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 1024))
//! #   (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
//! #     (if (call $get (i32.const 0) (i32.const 100) (i32.const 13) (i32.const 0) (i32.const 4)) (then
//! #       (drop (call $reply (i32.const 401) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
//! #         (i32.const 0) (i32.const 0) (i32.const -1)))))
//! #     (i32.const 0)))"#;
//! # let module = Module::compile(&wat::parse_str(wat).unwrap())?;
//! let asks = call("proxy_get_header_map_value").with(MapType::RequestHeaders).with("authorization");
//! Script::new()
//!     .request_headers([(":method", "GET"), (":path", "/"), ("authorization", "Bearer x")], true)
//!     .calls([asks.clone().returning("Bearer x")])
//!     .forwards()
//!     .run(&module, PluginOptions::default())?;
//! Script::new()
//!     .request_headers([(":method", "GET"), (":path", "/")], true)
//!     .makes(asks.giving(Status::NotFound))
//!     .replies(401, "")
//!     .run(&module, PluginOptions::default())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Cost: a VM start per run (tens of microseconds once the module is compiled), and the tape. Compile a
//! module once for all tests, in a `LazyLock`. Left out on purpose: a mock of the network; answer
//! call-outs with [`Script::http_answer`] and [`Script::grpc`].

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::callout::{GrpcCall, GrpcEvent, GrpcStream, HttpCall, HttpCallResponse, Transport};
use super::clock::{Clock, VirtualClock};
use super::error::AbiError;
use super::headers::HeaderMap;
use super::log::{LogLevel, LogLine, LogSink};
use super::metrics::MetricValue;
use super::module::Module;
use super::network::{ClosedBy, Peer};
use super::options::PluginOptions;
use super::plugin::{Ended, Plugin, StreamId};
use super::status::{Direction, MapType, Status};
use super::stream::{Event, Step};
use super::tape::{Answer, HostCall, Tape, Value};

/// Describes a host call: its name, and as much of its arguments, status and results as matter.
#[derive(Clone, PartialEq, Eq)]
pub struct Call {
    name: String,
    arguments: Vec<Option<Value>>,
    status: Option<Status>,
    results: Vec<Option<Value>>,
}

/// A host call of this name (`proxy_` included), whatever its arguments.
#[must_use]
pub fn call(name: impl Into<String>) -> Call {
    Call { name: name.into(), arguments: Vec::new(), status: None, results: Vec::new() }
}

impl Call {
    /// The next argument is this. Pointer and length count as one argument, the bytes; places for
    /// results do not count.
    #[must_use]
    pub fn with(mut self, argument: impl Into<Value>) -> Self {
        self.arguments.push(Some(argument.into()));
        self
    }

    /// The next argument does not matter.
    #[must_use]
    pub fn with_any(mut self) -> Self {
        self.arguments.push(None);
        self
    }

    /// The host answered with this status.
    #[must_use]
    pub fn giving(mut self, status: Status) -> Self {
        self.status = Some(status);
        self
    }

    /// The host answered Ok, and the next result is this.
    #[must_use]
    pub fn returning(mut self, result: impl Into<Value>) -> Self {
        self.status = Some(Status::Ok);
        self.results.push(Some(result.into()));
        self
    }

    fn matches_arguments(&self, name: &str, arguments: &[Value]) -> bool {
        self.name == name && matches(&self.arguments, arguments)
    }

    fn matches(&self, call: &HostCall) -> bool {
        self.matches_arguments(call.name, &call.arguments)
            && self.status.is_none_or(|status| call.status == Some(status))
            && matches(&self.results, &call.results)
    }
}

/// Whether every expected value is there; a list may say more than is expected.
fn matches(expected: &[Option<Value>], values: &[Value]) -> bool {
    expected.iter().enumerate().all(|(index, expected)| match (expected, values.get(index)) {
        (None, _) => true,
        (Some(expected), Some(value)) => expected.same(value),
        (Some(_), None) => false,
    })
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, values: &[Option<Value>]| {
            values.iter().enumerate().try_for_each(|(index, value)| {
                f.write_str(if index > 0 { ", " } else { "" })?;
                match value {
                    Some(value) => write!(f, "{value}"),
                    None => f.write_str("_"),
                }
            })
        };
        write!(f, "{}(", self.name)?;
        list(f, &self.arguments)?;
        f.write_str(if self.arguments.is_empty() { "..)" } else { ")" })?;
        if let Some(status) = self.status {
            write!(f, " = {status:?} ")?;
            list(f, &self.results)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the proxy does.
#[derive(Debug, Clone)]
enum Act {
    Headers(Direction, HeaderMap, bool),
    Body(Direction, Vec<u8>, bool),
    Trailers(Direction, HeaderMap),
    Done,
    Stream(usize),
    Property(Vec<String>, super::PropertyValue),
    Tick,
    Queues,
    HttpAnswer(usize, Option<HttpCallResponse>),
    Grpc(usize, GrpcEvent),
    Foreign(u32, Vec<u8>),
    Connect,
    Data(Peer, Vec<u8>, bool),
    Closed(Peer, ClosedBy),
    ShutDown,
    Clock(u64),
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |direction: &Direction| match direction {
            Direction::Request => "request",
            Direction::Response => "response",
        };
        match self {
            Self::Headers(direction, map, end) => {
                write!(f, "{} headers {}{}", side(direction), Value::Pairs(map.clone()), ending(*end))
            }
            Self::Body(direction, bytes, end) => {
                write!(f, "{} body {}{}", side(direction), Value::Bytes(bytes.clone()), ending(*end))
            }
            Self::Trailers(direction, map) => {
                write!(f, "{} trailers {}", side(direction), Value::Pairs(map.clone()))
            }
            other => write!(f, "{other:?}"),
        }
    }
}

fn ending(end: bool) -> &'static str {
    if end { ", end of stream" } else { "" }
}

/// What an act brought about.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Moment {
    /// What the proxy is to do, for acts that have such an outcome.
    pub step: Option<Step>,
    /// Why the VM was lost, or the act refused.
    pub error: Option<AbiError>,
    /// Host calls, in order.
    pub calls: Vec<HostCall>,
    /// Steps about other sides or streams, in order.
    pub events: Vec<Event>,
    /// Log lines.
    pub log: Vec<LogLine>,
    /// The header map as it goes out, when the step lets headers go.
    pub headers: Option<HeaderMap>,
    /// The trailer map as it goes out, when the step lets trailers go.
    pub trailers: Option<HeaderMap>,
    /// What is left of the stream, after [`Script::done`].
    pub ended: Option<Ended>,
    /// What [`Script::shut_down`] was answered: whether the guest is finished.
    pub finished: Option<bool>,
}

/// Something that must hold after an act; the text is what to say if it does not.
type Check = Arc<dyn Fn(&Moment, &Played) -> Result<(), String> + Send + Sync>;

#[derive(Clone)]
enum Line {
    Act(Act),
    /// And whether it expects the VM to be lost.
    Check(Check, bool),
    Answer(Call, Answer, Option<usize>),
}

/// Acts and expectations, in order. Built by its methods, run by [`Script::run`]; a clone can be run
/// against another module.
#[derive(Clone, Default)]
pub struct Script {
    lines: Vec<Line>,
}

/// A script that did not come out: which act, what was expected, and the tape. `Debug` prints the same
/// as `Display`, so that `unwrap` in a test is readable.
pub struct Failure {
    act: String,
    what: String,
    tape: Tape,
}

impl Failure {
    /// What the guest did until then.
    #[must_use]
    pub fn tape(&self) -> &Tape {
        &self.tape
    }

    /// What was expected, and what was there instead.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.what
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}\nwhat the filter did:\n{}", self.act, self.what, self.tape)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Failure {}

/// What the filter sent to other services.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Sent {
    /// Http calls.
    pub http: Vec<HttpCall>,
    /// Unary gRPC calls.
    pub grpc_calls: Vec<GrpcCall>,
    /// gRPC streams.
    pub grpc_streams: Vec<GrpcStream>,
    /// Messages on gRPC streams: stream, message, whether it ended the stream.
    pub grpc_messages: Vec<(u32, Vec<u8>, bool)>,
    /// gRPC streams that were half-closed.
    pub grpc_closed: Vec<u32>,
    /// gRPC calls and streams that were cancelled.
    pub grpc_cancelled: Vec<u32>,
}

impl Transport for Sent {
    fn http_call(&mut self, call: HttpCall) {
        self.http.push(call);
    }

    fn grpc_call(&mut self, call: GrpcCall) {
        self.grpc_calls.push(call);
    }

    fn grpc_stream(&mut self, stream: GrpcStream) {
        self.grpc_streams.push(stream);
    }

    fn grpc_send(&mut self, id: u32, message: Vec<u8>, end_of_stream: bool) {
        self.grpc_messages.push((id, message, end_of_stream));
    }

    fn grpc_close(&mut self, id: u32) {
        self.grpc_closed.push(id);
    }

    fn grpc_cancel(&mut self, id: u32) {
        self.grpc_cancelled.push(id);
    }
}

/// A script's VM after, or in the middle of, a run.
#[derive(Debug)]
pub struct Played {
    plugin: Plugin,
    tape: Tape,
    streams: Vec<StreamId>,
    /// Which of the streams the next act is about.
    current: usize,
    log: Arc<Mutex<Vec<LogLine>>>,
    clock: Option<VirtualClock>,
    sent: Sent,
}

impl Played {
    /// The plugin, for whatever a script cannot say.
    pub fn plugin(&mut self) -> &mut Plugin {
        &mut self.plugin
    }

    /// What the guest did.
    #[must_use]
    pub fn tape(&self) -> &Tape {
        &self.tape
    }

    /// What the guest sent to other services.
    #[must_use]
    pub fn sent(&self) -> &Sent {
        &self.sent
    }

    /// The value of a metric that the guest defined.
    #[must_use]
    pub fn metric(&self, name: &str) -> Option<MetricValue> {
        self.plugin.shared().metrics().value(name)
    }

    fn start(module: &Module, mut options: PluginOptions) -> Result<Self, Failure> {
        let tape = options.tape.get_or_insert_default().clone();
        let (sink, log) = LogSink::capture(LogLevel::Trace);
        let also = std::mem::replace(&mut options.log, sink.clone());
        options.log = LogSink::new(LogLevel::Trace, move |line| {
            also.pass(line.clone());
            sink.pass(line);
        });
        let clock = match &options.clock {
            Clock::Virtual(clock) => Some(clock.clone()),
            Clock::Real => None,
        };
        let fail = |what: String| Failure { act: "start".to_owned(), what, tape: tape.clone() };
        let plugin = Plugin::start(module, options).map_err(|error| fail(error.to_string()))?;
        Ok(Self { plugin, tape, streams: Vec::new(), current: 0, log, clock, sent: Sent::default() })
    }

    /// The stream that acts are about; opened by the first of them.
    fn stream(&mut self) -> Result<StreamId, AbiError> {
        while self.streams.len() <= self.current {
            let id = self.plugin.stream()?;
            self.streams.push(id);
        }
        self.streams.get(self.current).copied().ok_or(AbiError::UnknownStream { id: 0 })
    }

    fn perform(&mut self, act: &Act) -> Moment {
        let mut moment = Moment::default();
        let since = self.tape.len();
        let result = self.attempt(act, &mut moment);
        moment.error = moment.error.take().or(result.err());
        moment.calls = self.tape.calls_since(since);
        moment.events = self.plugin.take_events();
        self.plugin.send_callouts(&mut self.sent);
        moment.log = std::mem::take(&mut *self.log.lock().unwrap_or_else(PoisonError::into_inner));
        moment
    }

    fn attempt(&mut self, act: &Act, moment: &mut Moment) -> Result<(), AbiError> {
        match act {
            Act::Stream(index) => {
                self.current = *index;
                self.stream()?;
            }
            Act::Headers(direction, map, end) => {
                let id = self.stream()?;
                let step = match direction {
                    Direction::Request => self.plugin.request_headers(id, map.clone(), *end),
                    Direction::Response => self.plugin.response_headers(id, map.clone(), *end),
                };
                self.note(moment, *direction, step)?;
            }
            Act::Body(direction, bytes, end) => {
                let id = self.stream()?;
                let step = match direction {
                    Direction::Request => self.plugin.request_body(id, bytes, *end),
                    Direction::Response => self.plugin.response_body(id, bytes, *end),
                };
                self.note(moment, *direction, step)?;
            }
            Act::Trailers(direction, map) => {
                let id = self.stream()?;
                let step = match direction {
                    Direction::Request => self.plugin.request_trailers(id, map.clone()),
                    Direction::Response => self.plugin.response_trailers(id, map.clone()),
                };
                self.note(moment, *direction, step)?;
            }
            Act::Done => {
                let id = self.stream()?;
                let mut ended = self.plugin.done(id)?;
                moment.error = ended.error.take();
                moment.ended = Some(ended);
            }
            Act::Property(path, value) => {
                let id = self.stream()?;
                let path: Vec<&str> = path.iter().map(String::as_str).collect();
                self.plugin.set_property(id, &path, value.clone())?;
            }
            Act::Tick => self.plugin.tick()?,
            Act::Queues => while self.plugin.deliver_queues()? > 0 {},
            Act::HttpAnswer(index, response) => {
                let id = self.sent.http.get(*index).map_or(0, |call| call.id);
                self.plugin.http_call_response(id, response.clone())?;
            }
            Act::Grpc(index, event) => {
                let calls = self.sent.grpc_calls.iter().map(|call| call.id);
                let id = calls.chain(self.sent.grpc_streams.iter().map(|stream| stream.id)).nth(*index);
                self.plugin.grpc_event(id.unwrap_or(0), event.clone())?;
            }
            Act::Foreign(function, data) => {
                let stream = self.streams.get(self.current).copied();
                self.plugin.foreign_function(stream, *function, data)?;
            }
            Act::Connect => {
                let (id, step) = self.plugin.connection()?;
                self.current = self.streams.len();
                self.streams.push(id);
                moment.step = Some(step);
            }
            Act::Data(peer, bytes, end) => {
                let id = self.stream()?;
                moment.step = Some(self.plugin.connection_data(id, *peer, bytes, *end)?);
            }
            Act::Closed(peer, by) => {
                let id = self.stream()?;
                self.plugin.connection_closed(id, *peer, *by)?;
            }
            Act::ShutDown => moment.finished = Some(self.plugin.shut_down()?),
            Act::Clock(now_ns) => {
                if let Some(clock) = &self.clock {
                    clock.set_ns(*now_ns);
                }
            }
        }
        Ok(())
    }

    fn note(
        &mut self,
        moment: &mut Moment,
        direction: Direction,
        step: Result<Step, AbiError>,
    ) -> Result<(), AbiError> {
        let step = step?;
        let id = self.stream()?;
        let (headers, trailers) = match direction {
            Direction::Request => (MapType::RequestHeaders, MapType::RequestTrailers),
            Direction::Response => (MapType::ResponseHeaders, MapType::ResponseTrailers),
        };
        if let Step::Forward(release) = &step {
            let map = |wanted: bool, kind| self.plugin.header_map(id, kind).filter(|_| wanted).cloned();
            moment.headers = map(release.headers, headers);
            moment.trailers = map(release.trailers, trailers);
        }
        moment.step = Some(step);
        Ok(())
    }
}

/// Header pairs, however they are written.
fn map_of<N: AsRef<[u8]>, V: AsRef<[u8]>>(pairs: impl IntoIterator<Item = (N, V)>) -> HeaderMap {
    pairs.into_iter().collect()
}

/// What the proxy does.
impl Script {
    /// An empty script.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn act(mut self, act: Act) -> Self {
        self.lines.push(Line::Act(act));
        self
    }

    /// The following acts are about stream number `index`, counted from 0, opened when it is new.
    /// Without this, all are about stream 0.
    #[must_use]
    pub fn stream(self, index: usize) -> Self {
        self.act(Act::Stream(index))
    }

    /// Sets a property of the stream, as the proxy knows it.
    #[must_use]
    pub fn property(self, path: &[&str], value: impl Into<super::PropertyValue>) -> Self {
        self.act(Act::Property(path.iter().map(|part| (*part).to_owned()).collect(), value.into()))
    }

    /// The request's headers arrive.
    #[must_use]
    pub fn request_headers<N: AsRef<[u8]>, V: AsRef<[u8]>>(
        self,
        pairs: impl IntoIterator<Item = (N, V)>,
        end_of_stream: bool,
    ) -> Self {
        self.act(Act::Headers(Direction::Request, map_of(pairs), end_of_stream))
    }

    /// A piece of the request's body arrives.
    #[must_use]
    pub fn request_body(self, bytes: impl AsRef<[u8]>, end_of_stream: bool) -> Self {
        self.act(Act::Body(Direction::Request, bytes.as_ref().to_vec(), end_of_stream))
    }

    /// The request's trailers arrive.
    #[must_use]
    pub fn request_trailers<N: AsRef<[u8]>, V: AsRef<[u8]>>(
        self,
        pairs: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        self.act(Act::Trailers(Direction::Request, map_of(pairs)))
    }

    /// The response's headers arrive, `:status` included.
    #[must_use]
    pub fn response_headers<N: AsRef<[u8]>, V: AsRef<[u8]>>(
        self,
        pairs: impl IntoIterator<Item = (N, V)>,
        end_of_stream: bool,
    ) -> Self {
        self.act(Act::Headers(Direction::Response, map_of(pairs), end_of_stream))
    }

    /// A piece of the response's body arrives.
    #[must_use]
    pub fn response_body(self, bytes: impl AsRef<[u8]>, end_of_stream: bool) -> Self {
        self.act(Act::Body(Direction::Response, bytes.as_ref().to_vec(), end_of_stream))
    }

    /// The response's trailers arrive.
    #[must_use]
    pub fn response_trailers<N: AsRef<[u8]>, V: AsRef<[u8]>>(
        self,
        pairs: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        self.act(Act::Trailers(Direction::Response, map_of(pairs)))
    }

    /// The exchange or connection is over.
    #[must_use]
    pub fn done(self) -> Self {
        self.act(Act::Done)
    }

    /// The tick period is over (the script does not wait for it).
    #[must_use]
    pub fn tick(self) -> Self {
        self.act(Act::Tick)
    }

    /// Items in shared queues are delivered.
    #[must_use]
    pub fn deliver_queues(self) -> Self {
        self.act(Act::Queues)
    }

    /// Http call number `index` of this run, counted from 0, is answered.
    #[must_use]
    pub fn http_answer(self, index: usize, response: HttpCallResponse) -> Self {
        self.act(Act::HttpAnswer(index, Some(response)))
    }

    /// Http call number `index` fails.
    #[must_use]
    pub fn http_failure(self, index: usize) -> Self {
        self.act(Act::HttpAnswer(index, None))
    }

    /// Something happens on gRPC call number `index` (unary calls first, then streams).
    #[must_use]
    pub fn grpc(self, index: usize, event: GrpcEvent) -> Self {
        self.act(Act::Grpc(index, event))
    }

    /// The proxy calls foreign function `function_id` of the filter.
    #[must_use]
    pub fn foreign_function(self, function_id: u32, data: impl AsRef<[u8]>) -> Self {
        self.act(Act::Foreign(function_id, data.as_ref().to_vec()))
    }

    /// A client connects (TCP); the following acts are about this connection.
    #[must_use]
    pub fn connect(self) -> Self {
        self.act(Act::Connect)
    }

    /// Bytes arrive on the connection.
    #[must_use]
    pub fn data(self, from: Peer, bytes: impl AsRef<[u8]>, end_of_stream: bool) -> Self {
        self.act(Act::Data(from, bytes.as_ref().to_vec(), end_of_stream))
    }

    /// One end of the connection is gone.
    #[must_use]
    pub fn closed(self, end: Peer, by: ClosedBy) -> Self {
        self.act(Act::Closed(end, by))
    }

    /// The plugin ends.
    #[must_use]
    pub fn shut_down(self) -> Self {
        self.act(Act::ShutDown)
    }

    /// The time becomes `now_ns`, if the options have a [`Clock::Virtual`].
    #[must_use]
    pub fn clock_ns(self, now_ns: u64) -> Self {
        self.act(Act::Clock(now_ns))
    }

    /// From here on, host calls that `call` describes (name and arguments) get `status` and `results`
    /// in the host's place.
    #[must_use]
    pub fn answer(mut self, call: Call, status: Status, results: impl IntoIterator<Item = Value>) -> Self {
        let answer = Answer { status, results: results.into_iter().collect() };
        self.lines.push(Line::Answer(call, answer, None));
        self
    }

    /// As [`Script::answer`], for the next `count` such calls only.
    #[must_use]
    pub fn answer_times(
        mut self,
        count: usize,
        call: Call,
        status: Status,
        results: impl IntoIterator<Item = Value>,
    ) -> Self {
        let answer = Answer { status, results: results.into_iter().collect() };
        self.lines.push(Line::Answer(call, answer, Some(count)));
        self
    }
}

/// What must hold after the act before.
impl Script {
    /// Anything: `check` says what is wrong.
    #[must_use]
    pub fn check(
        mut self,
        check: impl Fn(&Moment, &Played) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.lines.push(Line::Check(Arc::new(check), false));
        self
    }

    /// Exactly these host calls were made, in this order.
    #[must_use]
    pub fn calls(self, expected: impl IntoIterator<Item = Call>) -> Self {
        let expected: Vec<Call> = expected.into_iter().collect();
        self.check(move |moment, _| {
            for index in 0..expected.len().max(moment.calls.len()) {
                match (expected.get(index), moment.calls.get(index)) {
                    (Some(expected), Some(call)) if expected.matches(call) => {}
                    (Some(expected), Some(call)) => {
                        return Err(format!("host call {index} should be {expected}, but is {call}"));
                    }
                    (Some(expected), None) => {
                        return Err(format!("host call {index} should be {expected}, but there is none"));
                    }
                    (None, Some(call)) => return Err(format!("one host call too many: {call}")),
                    (None, None) => {}
                }
            }
            Ok(())
        })
    }

    /// Such a host call was made, among others.
    #[must_use]
    pub fn makes(self, expected: Call) -> Self {
        self.check(move |moment, _| {
            let made = moment.calls.iter().any(|call| expected.matches(call));
            made.then_some(()).ok_or_else(|| format!("there is no host call {expected}"))
        })
    }

    /// No such host call was made.
    #[must_use]
    pub fn makes_no(self, unwanted: Call) -> Self {
        self.check(move |moment, _| match moment.calls.iter().find(|call| unwanted.matches(call)) {
            Some(call) => Err(format!("there should be no host call {unwanted}, but there is {call}")),
            None => Ok(()),
        })
    }

    /// The message goes on, whole or in part.
    #[must_use]
    pub fn forwards(self) -> Self {
        self.check(|moment, _| match &moment.step {
            Some(Step::Forward(_)) => Ok(()),
            _ => Err(format!("it should go on, but: {}", said(moment))),
        })
    }

    /// These body bytes go on.
    #[must_use]
    pub fn forwards_body(self, body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref().to_vec();
        self.check(move |moment, _| match &moment.step {
            Some(Step::Forward(release)) if release.body == body => Ok(()),
            _ => Err(format!("{} should go on, but: {}", Value::Bytes(body.clone()), said(moment))),
        })
    }

    /// The headers go on, and `name` then has this value (all values, joined with commas), or none.
    #[must_use]
    pub fn forwards_header<'v>(self, name: &str, value: impl Into<Option<&'v str>>) -> Self {
        let name = name.to_owned();
        let value = value.into().map(str::to_owned);
        self.check(move |moment, _| {
            let Some(headers) = &moment.headers else {
                return Err(format!("the headers should go on, but: {}", said(moment)));
            };
            let found = headers.joined(name.as_bytes());
            if found.as_deref() == value.as_deref().map(str::as_bytes) {
                return Ok(());
            }
            let found = found.map_or("not there".to_owned(), |found| Value::Bytes(found).to_string());
            Err(format!("header {name} should be {value:?}, but is {found}"))
        })
    }

    /// Nothing goes on yet.
    #[must_use]
    pub fn holds(self) -> Self {
        self.check(|moment, _| match &moment.step {
            Some(Step::Hold) => Ok(()),
            _ => Err(format!("it should be held, but: {}", said(moment))),
        })
    }

    /// The filter answers the client itself; from another stream's act or a tick it counts too.
    #[must_use]
    pub fn replies(self, status: u32, body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref().to_vec();
        self.check(move |moment, _| {
            let steps = moment.step.iter().chain(moment.events.iter().map(|event| &event.step));
            let mut replies = steps.filter_map(|step| match step {
                Step::Reply(reply) => Some(reply),
                _ => None,
            });
            match replies.next() {
                Some(reply) if reply.status == status && reply.body == body => Ok(()),
                Some(reply) => {
                    let (expected, is) = (Value::Bytes(body.clone()), Value::Bytes(reply.body.clone()));
                    Err(format!("the reply should be {status} {expected}, but is {} {is}", reply.status))
                }
                None => Err(format!("the filter should reply {status}, but: {}", said(moment))),
            }
        })
    }

    /// The exchange or connection is reset.
    #[must_use]
    pub fn closes(self) -> Self {
        self.check(|moment, _| {
            let mut steps = moment.step.iter().chain(moment.events.iter().map(|event| &event.step));
            let closed = steps.any(|step| *step == Step::Close);
            closed.then_some(()).ok_or_else(|| format!("it should be closed, but: {}", said(moment)))
        })
    }

    /// What was held on another side or stream goes on now: the act let stream `index` continue.
    #[must_use]
    pub fn resumes(self, index: usize, direction: Direction) -> Self {
        self.check(move |moment, played| {
            let stream = played.streams.get(index).copied();
            let resumed = moment.events.iter().any(|event| {
                Some(event.stream) == stream
                    && event.direction == direction
                    && matches!(event.step, Step::Forward(_))
            });
            let why = || format!("stream {index} should go on; other streams' steps are {:?}", moment.events);
            resumed.then_some(()).ok_or_else(why)
        })
    }

    /// The VM is lost, and the message contains `text`. (Without this, losing it fails the script.)
    #[must_use]
    pub fn crashes(self, text: &str) -> Self {
        let text = text.to_owned();
        let check = move |moment: &Moment, _: &Played| match &moment.error {
            Some(error) if error.to_string().contains(&text) => Ok(()),
            _ => Err(format!("it should crash with {text:?}, but: {}", said(moment))),
        };
        let mut script = self;
        script.lines.push(Line::Check(Arc::new(check), true));
        script
    }

    /// A line at this level was logged that contains `text`.
    #[must_use]
    pub fn logs(self, level: LogLevel, text: &str) -> Self {
        let text = text.to_owned();
        self.check(move |moment, _| {
            let logged = moment.log.iter().any(|line| line.level == level && line.message.contains(&text));
            let why = || format!("{text:?} should be logged at {level:?}; the log is {:?}", moment.log);
            logged.then_some(()).ok_or_else(why)
        })
    }

    /// The counter or gauge has this value.
    #[must_use]
    pub fn metric(self, name: &str, value: u64) -> Self {
        let name = name.to_owned();
        self.check(move |_, played| match played.metric(&name) {
            Some(MetricValue::Counter(is) | MetricValue::Gauge(is)) if is == value => Ok(()),
            is => Err(format!("metric {name} should be {value}, but is {is:?}")),
        })
    }

    /// After [`Script::done`]: the filter left this as filter state (the key without `wasm.`).
    #[must_use]
    pub fn leaves(self, key: &str, value: impl AsRef<[u8]>) -> Self {
        let key = format!("wasm.{key}");
        let value = value.as_ref().to_vec();
        self.check(move |moment, _| {
            let state = moment.ended.as_ref().and_then(|ended| ended.filter_state.get(&key));
            if state == Some(&value) {
                return Ok(());
            }
            let is = state.map_or("not there".to_owned(), |state| Value::Bytes(state.clone()).to_string());
            Err(format!("filter state {key} should be {}, but is {is}", Value::Bytes(value.clone())))
        })
    }
}

impl Script {
    /// Plays the script on a fresh VM of `module`. The options' log still gets every line, and their
    /// tape, if they have one, is the one used.
    ///
    /// # Errors
    /// [`Failure`] for the first expectation that does not hold, or a VM lost that no
    /// [`Script::crashes`] expects.
    pub fn run(&self, module: &Module, options: PluginOptions) -> Result<Played, Failure> {
        let mut played = Played::start(module, options)?;
        let mut act = "before the first act".to_owned();
        let mut number = 0;
        let mut moment = Moment::default();
        // Whether the error of the act at hand was expected.
        let mut accepted = true;
        let fail =
            |act: &str, what: String, tape: &Tape| Failure { act: act.to_owned(), what, tape: tape.clone() };
        for line in &self.lines {
            match line {
                Line::Act(next) => {
                    if let Some(error) = moment.error.take().filter(|_| !accepted) {
                        return Err(fail(&act, error.to_string(), &played.tape));
                    }
                    number += 1;
                    act = format!("act {number}, {next}");
                    moment = played.perform(next);
                    accepted = false;
                }
                Line::Check(check, expects_error) => {
                    check(&moment, &played).map_err(|what| fail(&act, what, &played.tape))?;
                    accepted |= *expects_error;
                }
                Line::Answer(call, answer, times) => {
                    let (call, answer, mut left) = (call.clone(), answer.clone(), *times);
                    played.tape.answer(move |name, arguments| {
                        if left == Some(0) || !call.matches_arguments(name, arguments) {
                            return None;
                        }
                        left = left.map(|left| left - 1);
                        Some(answer.clone())
                    });
                }
            }
        }
        match moment.error.take().filter(|_| !accepted) {
            Some(error) => Err(fail(&act, error.to_string(), &played.tape)),
            None => Ok(played),
        }
    }
}

/// An act's outcome in words.
fn said(moment: &Moment) -> String {
    match (&moment.step, &moment.error) {
        (_, Some(error)) => error.to_string(),
        (Some(Step::Forward(release)), None) => {
            format!(
                "it goes on{}, body {}{}",
                if release.headers { " with headers" } else { "" },
                Value::Bytes(release.body.clone()),
                ending(release.end_of_stream)
            )
        }
        (Some(Step::Hold), None) => "it is held".to_owned(),
        (Some(Step::Reply(reply)), None) => {
            format!("the filter replies {} {}", reply.status, Value::Bytes(reply.body.clone()))
        }
        (Some(Step::Close), None) => "it is closed".to_owned(),
        (None, None) => "nothing comes of it".to_owned(),
    }
}
