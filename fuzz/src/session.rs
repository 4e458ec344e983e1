//! An exchange against a proxy that calls back in any order and refuses host calls at will.
//!
//! Never a panic. Never `normal` for a message that a host read failed for, that was cut short, or whose JSON
//! is none. At most one verdict a direction, counted once. A route that passes never holds or answers; one
//! that refuses never lets a request's body pass before its verdict.

use std::cell::Cell;
use std::sync::OnceLock;

use driftlock_engine::baseline::Snapshot;
use driftlock_inspect::config::{Config, Uninspectable};
use driftlock_inspect::content::ApiStyle;
use driftlock_inspect::host::{Direction, Gauge, Histogram, Host, HostError, Level, Metric, Reply};
use driftlock_inspect::session::{Exchange, Plugin, Step};
use serde_json::Value;

use crate::body::is_json;
use crate::input::Input;

const LEARNED: u32 = 40;
const MAX_CALLBACKS: usize = 64;

/// See the module.
pub fn holds(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.byte();
    let refuse = choice & 1 == 1;
    let mut proxy = Proxy {
        path: input.pick(&[CHAT, CHAT, CHAT, b"/orders/7"]),
        content_types: [0, 1]
            .map(|_| input.pick(&[JSON, JSON, JSON, None, Some(b"text/plain"), Some(b"image/png")])),
        encoding: input.pick(&[None, None, None, Some(b"gzip"), Some(b"identity"), Some(b"br, x")]),
        ..Proxy::default()
    };
    let mut script = Script {
        plugin: plugin(refuse),
        exchange: Exchange::default(),
        refuse,
        messages: [question(7), answer(7)].map(Message::of),
    };
    for _ in 0..MAX_CALLBACKS {
        if input.is_empty() {
            break;
        }
        script.callback(&mut proxy, &mut input);
    }
    script.run(&mut proxy, Callback::Done);
    script.run(&mut proxy, Callback::Done);
    for (direction, verdict) in
        [(Direction::Request, &proxy.verdicts[0]), (Direction::Response, &proxy.verdicts[1])]
    {
        assert_eq!(proxy.counted[direction as usize], u64::from(verdict.is_some()), "{direction:?}");
    }
    if !refuse {
        assert_eq!(proxy.replies, 0, "a route that passes answers");
    }
}

const CHAT: &[u8] = b"/v1/chat/completions";
const JSON: Option<&[u8]> = Some(b"application/json");
const REFUSED: HostError = HostError(10);

#[derive(Debug, Default)]
struct Proxy<'a> {
    path: &'a [u8],
    content_types: [Option<&'a [u8]>; 2],
    encoding: Option<&'a [u8]>,
    /// Which calls fail in this callback: bit 0 reading headers, 1 setting them, 2 filter state, 3 answering.
    failing: u8,
    /// Reads of this message's headers that failed.
    lost: [Cell<bool>; 2],
    verdicts: [Option<Value>; 2],
    counted: [u64; 2],
    replies: u32,
}

impl Proxy<'_> {
    fn call(&self, bit: u8) -> Result<(), HostError> {
        if self.failing >> bit & 1 == 1 { Err(REFUSED) } else { Ok(()) }
    }
}

impl Host for Proxy<'_> {
    fn header(&self, direction: Direction, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        if let Err(error) = self.call(0) {
            self.lost[direction as usize].set(true);
            return Err(error);
        }
        let value = match name {
            ":method" => Some(&b"POST"[..]),
            ":path" => Some(self.path),
            "content-type" => self.content_types[direction as usize],
            "content-encoding" => self.encoding,
            _ => None,
        };
        Ok(value.map(<[u8]>::to_vec))
    }

    fn set_header(&mut self, _: Direction, name: &str, value: &str) -> Result<(), HostError> {
        assert!(name.is_ascii() && value.bytes().all(|b| (b' '..0x7f).contains(&b)), "{name}: {value}");
        self.call(1)
    }

    fn remove_header(&mut self, _: Direction, _: &str) -> Result<(), HostError> {
        self.call(1)
    }

    fn set_response_trailer(&mut self, _: &str, _: &str) -> Result<(), HostError> {
        self.call(1)
    }

    fn set_body(&mut self, _: Direction, _: &[u8]) -> Result<(), HostError> {
        panic!("without rules no body is changed");
    }

    fn now_ns(&self) -> Option<u64> {
        None
    }

    fn record(&mut self, _: Histogram, _: u64) {}

    fn gauge(&mut self, _: Gauge, _: u64) {}

    fn set_filter_state(&mut self, _: &str, _: &str) -> Result<(), HostError> {
        self.call(2)
    }

    fn respond(&mut self, reply: &Reply) -> Result<(), HostError> {
        assert!((400..600).contains(&reply.status) && is_json(reply.body.as_bytes()), "{reply:?}");
        self.call(3)?;
        self.replies += 1;
        Ok(())
    }

    fn count(&mut self, metric: Metric, by: u64) {
        assert!(by > 0, "a counter that adds nothing is an error to Envoy");
        if let Some(name) = metric.name().strip_prefix("driftlock.messages.") {
            self.counted[usize::from(name.starts_with("response."))] += by;
        }
    }

    fn log(&mut self, _: Level, line: &str) {
        let mut line: Value = serde_json::from_str(line).expect("a log line is JSON");
        for (direction, place) in
            [Direction::Request, Direction::Response].into_iter().zip(&mut self.verdicts)
        {
            if line["driftlock"] == direction.as_str() {
                let verdict = line["verdict"].take();
                assert!(place.replace(verdict).is_none(), "a second verdict on the {direction:?}");
            }
        }
    }
}

/// What the script knows of one message.
struct Message {
    /// A body that is normal.
    usual: Vec<u8>,
    /// How much of it was given.
    at: usize,
    /// What was given since the headers.
    given: Vec<u8>,
    /// A body read failed since the headers.
    lost: bool,
    begun: bool,
}

impl Message {
    fn of(usual: String) -> Self {
        Self { usual: usual.into_bytes(), at: 0, given: Vec::new(), lost: false, begun: false }
    }

    fn chunk<'a>(&mut self, flags: u8, input: &mut Input<'a>) -> Result<Vec<u8>, HostError> {
        let left = &self.usual[self.at..];
        let chunk = match flags >> 4 {
            0..8 => left.to_vec(),
            8..12 => left[..left.len().min(20)].to_vec(),
            12 => Vec::new(),
            13 | 14 => {
                let len = usize::from(input.byte());
                return Ok(input.take(len).to_vec());
            }
            _ => return Err(REFUSED),
        };
        self.at += chunk.len();
        Ok(chunk)
    }
}

enum Callback {
    Headers(Direction, bool),
    Body(Direction, Result<Vec<u8>, HostError>, bool),
    Trailers(Direction),
    Done,
}

struct Script {
    plugin: Plugin,
    exchange: Exchange,
    refuse: bool,
    messages: [Message; 2],
}

impl Script {
    /// Two bytes a callback: which (bits 0 to 2), end of stream (bit 3) and which chunk (bits 4 to 7); then
    /// which host calls fail.
    fn callback(&mut self, proxy: &mut Proxy<'_>, input: &mut Input<'_>) {
        let flags = input.byte();
        proxy.failing = input.byte();
        let end = flags >> 3 & 1 == 1;
        let (request, response) = (Direction::Request, Direction::Response);
        let callback = match flags & 7 {
            0 => Callback::Headers(request, end),
            1 | 2 => Callback::Body(request, self.messages[0].chunk(flags, input), end),
            3 => Callback::Trailers(request),
            4 => Callback::Headers(response, end),
            5 => Callback::Body(response, self.messages[1].chunk(flags, input), end),
            6 => Callback::Trailers(response),
            _ if end => Callback::Done,
            _ => Callback::Body(response, self.messages[1].chunk(flags, input), end),
        };
        self.run(proxy, callback);
    }

    fn run(&mut self, proxy: &mut Proxy<'_>, callback: Callback) {
        let had = [0, 1].map(|i| proxy.verdicts[i].is_some());
        let (exchange, plugin) = (&mut self.exchange, &mut self.plugin);
        let step = match &callback {
            Callback::Headers(direction, end) => {
                let message = &mut self.messages[*direction as usize];
                if !message.begun {
                    proxy.lost[*direction as usize].set(false);
                    (message.lost, message.given) = (false, Vec::new());
                }
                // Headers that end a response end nothing that could be judged.
                message.begun |= *direction == Direction::Request || !*end;
                match direction {
                    Direction::Request => exchange.request_headers(plugin, proxy, *end),
                    Direction::Response => exchange.response_headers(plugin, proxy, *end),
                }
            }
            Callback::Body(direction, chunk, end) => {
                let message = &mut self.messages[*direction as usize];
                message.lost |= chunk.is_err();
                message.given.extend_from_slice(chunk.as_deref().unwrap_or_default());
                let chunk = chunk.as_deref().map_err(|error| *error);
                match direction {
                    Direction::Request => exchange.request_body(plugin, proxy, chunk, *end),
                    Direction::Response => exchange.response_body(plugin, proxy, chunk, *end),
                }
            }
            Callback::Trailers(Direction::Request) => exchange.request_trailers(plugin, proxy),
            Callback::Trailers(Direction::Response) => exchange.response_trailers(plugin, proxy),
            Callback::Done => {
                exchange.done(plugin, proxy);
                Step::Forward
            }
        };
        let judged = [0, 1].map(|i| !had[i] && proxy.verdicts[i].is_some());
        let cut_short = matches!(callback, Callback::Done);
        for (i, _) in judged.iter().enumerate().filter(|(_, judged)| **judged) {
            self.judged(proxy, i, cut_short, step);
        }
        self.obeys(&callback, had, judged, step);
    }

    /// A verdict came out of this callback.
    fn judged(&self, proxy: &Proxy<'_>, i: usize, cut_short: bool, step: Step) {
        let Some(verdict) = &proxy.verdicts[i] else { return };
        let message = &self.messages[i];
        let lost = message.lost || proxy.lost[i].get();
        let outcome = verdict["outcome"].as_str().expect("an outcome");
        if lost || cut_short {
            assert!(matches!(outcome, "not_inspected" | "anomalous"), "lost: {lost}, {verdict}");
            assert!(verdict["reason"].is_string(), "{verdict}");
        }
        let chat = ApiStyle::of_path(proxy.path) == Some(ApiStyle::OpenAiChat);
        let json = match i {
            0 => chat || proxy.content_types[0] == JSON,
            _ => proxy.content_types[1] == JSON,
        };
        if outcome == "normal" && json && !message.given.is_empty() {
            assert!(is_json(&message.given), "normal without being JSON: {verdict}");
        }
        if self.refuse && outcome == "not_inspected" && !cut_short {
            assert_eq!(step, Step::Answered, "{verdict}");
        }
    }

    fn obeys(&self, callback: &Callback, had: [bool; 2], judged: [bool; 2], step: Step) {
        if !self.refuse {
            assert_eq!(step, Step::Forward, "a route that passes holds");
        }
        if step == Step::Hold {
            assert!(
                matches!(callback, Callback::Body(Direction::Request, ..)),
                "only a request's body is held"
            );
        }
        let waits = self.refuse && self.messages[0].begun && !had[0] && !judged[0];
        if waits && matches!(callback, Callback::Body(Direction::Request, ..)) {
            assert_ne!(step, Step::Forward, "bytes pass before their verdict");
        }
    }
}

pub(crate) fn question(i: u32) -> String {
    let order = i.wrapping_mul(2_654_435_761) >> 20;
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"Where is order {order} now?"}}]}}"#)
}

fn answer(i: u32) -> String {
    let order = i.wrapping_mul(2_654_435_761) >> 20;
    format!(
        r#"{{"choices":[{{"index":0,"message":{{"role":"assistant","content":"Order {order} is on its way."}}}}]}}"#
    )
}

/// With baselines for chat, learned once, that find the usual messages normal.
fn plugin(refuse: bool) -> Plugin {
    static SNAPSHOT: OnceLock<Snapshot> = OnceLock::new();
    let config =
        format!(r#"{{"alpha": 0.2, "learn": {{"messages": {LEARNED}}}, "report": {{"log": "always"}}}}"#);
    let config = Config::parse(config.as_bytes()).expect("a valid configuration");
    let snapshot = SNAPSHOT.get_or_init(|| {
        let mut plugin = Plugin::new(config.clone());
        for i in (0..LEARNED).map(|i| i * 7) {
            let mut proxy = Proxy { path: CHAT, content_types: [JSON; 2], ..Proxy::default() };
            let mut exchange = Exchange::default();
            exchange.request_headers(&mut plugin, &mut proxy, false);
            exchange.request_body(&mut plugin, &mut proxy, Ok(question(i).as_bytes()), true);
            exchange.response_headers(&mut plugin, &mut proxy, false);
            exchange.response_body(&mut plugin, &mut proxy, Ok(answer(i).as_bytes()), true);
        }
        plugin.detector().snapshot()
    });
    let uninspectable = if refuse { Uninspectable::Refuse } else { Uninspectable::Pass };
    // A route with baselines learns nothing here, so that each case stands for itself.
    Plugin::new(Config { snapshot: snapshot.clone(), uninspectable, ..config })
}

/// The outcomes of an exchange in which nothing fails, so that a test can see that `normal` is possible.
pub fn undisturbed(refuse: bool) -> [Option<String>; 2] {
    let mut proxy = Proxy { path: CHAT, content_types: [JSON; 2], ..Proxy::default() };
    let mut script = Script {
        plugin: plugin(refuse),
        exchange: Exchange::default(),
        refuse,
        messages: [question(7), answer(7)].map(Message::of),
    };
    for (direction, body) in [(Direction::Request, question(7)), (Direction::Response, answer(7))] {
        script.run(&mut proxy, Callback::Headers(direction, false));
        script.run(&mut proxy, Callback::Body(direction, Ok(body.into_bytes()), true));
    }
    script.run(&mut proxy, Callback::Done);
    proxy.verdicts.map(|verdict| verdict.and_then(|verdict| Some(verdict["outcome"].as_str()?.to_owned())))
}
