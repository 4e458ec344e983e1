//! One exchange, callback by callback, natively and through the module on wasmtime.
//!
//! The replay's drivers pass whole exchanges as they were recorded. Here the caller says into which pieces
//! bodies are cut and where a message breaks off, and gets back all that the filter did: verdicts, answers
//! in the upstream's place, what it let through, which counters moved. Both drivers take the same
//! [`Passage`], so a test compares the two.

use std::collections::BTreeMap;

use driftlock_host::abi::{
    self, HeaderMap, LogSink, MetricValue, Plugin, PluginOptions, Release, SharedState,
};
use driftlock_host::capture::{self, Exchange, HttpRequest, HttpResponse};
use driftlock_host::replay::telling_all;
use driftlock_host::replay::wire::on_the_wire;
use driftlock_inspect::host::{Direction, Gauge, Histogram, Host, HostError, Level, Metric, Reply};
use driftlock_inspect::session::{self, Step, filter_state};

/// An exchange and how it passes.
#[derive(Clone, Debug)]
pub struct Passage {
    /// From the client.
    pub request: HttpRequest,
    /// From the upstream.
    pub response: HttpResponse,
    /// Size of the pieces in which bodies are reported.
    pub chunk_bytes: usize,
    /// The request breaks off after so many bytes of its body: no end is reported, and no response.
    pub request_cut_bytes: Option<usize>,
    /// The same for the response.
    pub response_cut_bytes: Option<usize>,
}

impl Passage {
    /// The whole exchange, bodies in one piece.
    pub fn new(request: HttpRequest, response: HttpResponse) -> Self {
        Self { request, response, chunk_bytes: usize::MAX, request_cut_bytes: None, response_cut_bytes: None }
    }

    /// A generated or recorded exchange, as it crosses the wire.
    ///
    /// # Panics
    /// If it cannot.
    pub fn of(exchange: &Exchange) -> Self {
        let exchange = on_the_wire(exchange.clone()).unwrap_or_else(|reason| panic!("{reason}"));
        Self::new(exchange.request, exchange.response.expect("a response"))
    }

    fn pieces(body: &[u8], chunk_bytes: usize, cut: Option<usize>) -> Vec<(&[u8], bool)> {
        let kept = &body[..cut.unwrap_or(body.len()).min(body.len())];
        let mut pieces: Vec<_> = kept.chunks(chunk_bytes.max(1)).map(|piece| (piece, false)).collect();
        if let (None, Some(last)) = (cut, pieces.last_mut()) {
            last.1 = true;
        }
        pieces
    }

    fn request_pieces(&self) -> Vec<(&[u8], bool)> {
        Self::pieces(&self.request.body, self.chunk_bytes, self.request_cut_bytes)
    }

    fn response_pieces(&self) -> Vec<(&[u8], bool)> {
        Self::pieces(&self.response.body, self.chunk_bytes, self.response_cut_bytes)
    }
}

/// What the filter did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The request's verdict, JSON as the filter wrote it.
    pub request: Option<String>,
    /// The response's.
    pub response: Option<String>,
    /// The worse outcome.
    pub outcome: Option<String>,
    /// Status and body of its answer in the upstream's place; none once the response's headers are
    /// gone, since the proxy can then only break off.
    pub reply: Option<(u16, String)>,
    /// The whole request was let through.
    pub request_passed: bool,
    /// The whole response was let through.
    pub response_passed: bool,
    /// Counters that moved, by how much.
    pub counted: BTreeMap<String, u64>,
}

/// The inspection, natively.
#[derive(Debug)]
pub struct Native {
    plugin: session::Plugin,
}

struct Memory<'a> {
    passage: &'a Passage,
    state: BTreeMap<String, String>,
    reply: Option<(u16, String)>,
    counted: BTreeMap<String, u64>,
}

impl Host for Memory<'_> {
    fn header(&self, direction: Direction, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        let request = &self.passage.request;
        let value = match (direction, name) {
            (Direction::Request, ":method") => Some(request.method.as_str()),
            (Direction::Request, ":path") => Some(request.target.as_str()),
            (Direction::Request, name) => capture::header(&request.headers, name),
            (Direction::Response, name) => capture::header(&self.passage.response.headers, name),
        };
        Ok(value.map(|value| value.as_bytes().to_vec()))
    }

    fn set_header(&mut self, _of: Direction, _name: &str, _value: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn remove_header(&mut self, _of: Direction, _name: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn set_response_trailer(&mut self, _name: &str, _value: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn set_body(&mut self, _of: Direction, _bytes: &[u8]) -> Result<(), HostError> {
        Ok(())
    }

    fn now_ns(&self) -> Option<u64> {
        None
    }

    fn record(&mut self, _histogram: Histogram, _value: u64) {}

    fn gauge(&mut self, _gauge: Gauge, _value: u64) {}

    fn set_filter_state(&mut self, key: &str, value: &str) -> Result<(), HostError> {
        self.state.insert(key.to_owned(), value.to_owned());
        Ok(())
    }

    fn respond(&mut self, reply: &Reply) -> Result<(), HostError> {
        self.reply = Some((reply.status, reply.body.clone()));
        Ok(())
    }

    fn count(&mut self, metric: Metric, by: u64) {
        *self.counted.entry(metric.name().to_owned()).or_default() += by;
    }

    fn log(&mut self, _level: Level, _line: &str) {}
}

impl Native {
    /// With a plugin configuration.
    ///
    /// # Panics
    /// If it is refused.
    pub fn start(configuration: &[u8]) -> Self {
        let configuration = telling_all(configuration.to_vec());
        Self { plugin: session::Plugin::configure(&configuration).unwrap_or_else(|error| panic!("{error}")) }
    }

    /// Passes one exchange.
    pub fn pass(&mut self, passage: &Passage) -> Seen {
        let plugin = &mut self.plugin;
        let mut host = Memory { passage, state: BTreeMap::new(), reply: None, counted: BTreeMap::new() };
        let mut exchange = session::Exchange::default();
        let mut seen = Seen::default();
        let mut headers_gone = false;
        let empty = passage.request.body.is_empty();
        let mut step = exchange.request_headers(plugin, &mut host, empty);
        for (piece, last) in passage.request_pieces() {
            if step != Step::Answered {
                step = exchange.request_body(plugin, &mut host, Ok(piece), last);
            }
        }
        seen.request_passed = step == Step::Forward && passage.request_cut_bytes.is_none();
        if seen.request_passed {
            let empty = passage.response.body.is_empty();
            step = exchange.response_headers(plugin, &mut host, empty);
            headers_gone = step == Step::Forward;
            for (piece, last) in passage.response_pieces() {
                if step != Step::Answered {
                    step = exchange.response_body(plugin, &mut host, Ok(piece), last);
                }
            }
            seen.response_passed = step == Step::Forward && passage.response_cut_bytes.is_none();
        }
        exchange.done(plugin, &mut host);
        seen.request = host.state.remove(filter_state::REQUEST);
        seen.response = host.state.remove(filter_state::RESPONSE);
        seen.outcome = host.state.remove(filter_state::OUTCOME);
        seen.reply = host.reply.filter(|_| !headers_gone);
        seen.counted = host.counted;
        seen
    }
}

/// The module on wasmtime.
pub struct Vm {
    plugin: Plugin,
    shared: SharedState,
}

impl Vm {
    /// With a plugin configuration.
    ///
    /// # Panics
    /// If the module does not start with it.
    pub fn start(configuration: &[u8]) -> Self {
        let shared = SharedState::new();
        let options = PluginOptions {
            plugin_configuration: telling_all(configuration.to_vec()),
            shared: shared.clone(),
            log: LogSink::discard(),
            ..PluginOptions::default()
        };
        let plugin = Plugin::start(crate::module(), options).unwrap_or_else(|error| panic!("{error}"));
        Self { plugin, shared }
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        let samples = self.shared.metrics().snapshot();
        samples
            .into_iter()
            .filter_map(|sample| match sample.value {
                MetricValue::Counter(value) => Some((sample.name, value)),
                _ => None,
            })
            .collect()
    }

    /// Passes one exchange.
    ///
    /// # Panics
    /// If the VM is lost, or lets through other bytes than it was given.
    pub fn pass(&mut self, passage: &Passage) -> Seen {
        let before = self.counters();
        let mut seen = Seen::default();
        let stream = self.plugin.stream().expect("a stream");
        let Passage { request, response, .. } = passage;
        let head = [(":method", request.method.as_str()), (":path", request.target.as_str())];
        let mut passed = Passed::default();
        let empty = request.body.is_empty();
        let step = self.plugin.request_headers(stream, header_map(&head, &request.headers), empty);
        let mut going = passed.note(step.expect("no trap"), &mut seen);
        for (piece, last) in passage.request_pieces() {
            if going {
                let step = self.plugin.request_body(stream, piece, last).expect("no trap");
                going = passed.note(step, &mut seen);
            }
        }
        seen.request_passed = passed.ended;
        if passed.ended {
            assert_eq!(passed.body, request.body, "the request's body was changed");
            let status = response.status.to_string();
            let headers = header_map(&[(":status", &status)], &response.headers);
            let mut passed = Passed::default();
            let step = self.plugin.response_headers(stream, headers, response.body.is_empty());
            let mut going = passed.note(step.expect("no trap"), &mut seen);
            for (piece, last) in passage.response_pieces() {
                if going {
                    let step = self.plugin.response_body(stream, piece, last).expect("no trap");
                    going = passed.note(step, &mut seen);
                }
            }
            assert!(response.body.starts_with(&passed.body), "the response's body was changed");
            seen.response_passed = passed.ended;
        }
        let ended = self.plugin.done(stream).expect("the stream ends");
        assert!(ended.error.is_none(), "{:?}", ended.error);
        let state = |key: &str| {
            let value = ended.filter_state.get(&format!("wasm.{key}"))?;
            Some(String::from_utf8(value.clone()).expect("filter state is UTF-8"))
        };
        seen.request = state(filter_state::REQUEST);
        seen.response = state(filter_state::RESPONSE);
        seen.outcome = state(filter_state::OUTCOME);
        seen.counted = self
            .counters()
            .into_iter()
            .map(|(name, value)| (name.clone(), value - before.get(&name).copied().unwrap_or(0)))
            .filter(|(_, by)| *by > 0)
            .collect();
        seen
    }
}

/// What one direction has let through.
#[derive(Default)]
struct Passed {
    body: Vec<u8>,
    ended: bool,
}

impl Passed {
    /// Whether the direction goes on.
    fn note(&mut self, step: abi::Step, seen: &mut Seen) -> bool {
        match step {
            abi::Step::Forward(Release { body, end_of_stream, .. }) => {
                self.body.extend_from_slice(&body);
                self.ended |= end_of_stream;
                true
            }
            abi::Step::Hold => true,
            abi::Step::Reply(reply) => {
                let status = u16::try_from(reply.status).expect("a status");
                seen.reply = Some((status, String::from_utf8_lossy(&reply.body).into_owned()));
                false
            }
            abi::Step::Close => false,
        }
    }
}

fn header_map(pseudo: &[(&str, &str)], headers: &[(String, String)]) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(pseudo.len() + headers.len());
    pseudo.iter().for_each(|(name, value)| map.add(name.as_bytes(), value.as_bytes()));
    headers.iter().for_each(|(name, value)| map.add(name.as_bytes(), value.as_bytes()));
    map
}
