//! The proxy-wasm filter: callbacks to `driftlock-inspect`, its wishes to host calls.
//!
//! What: one root context per VM holds the plugin's configuration and detector; one HTTP context per
//! stream holds an exchange. Why so thin: everything that decides is in `driftlock-inspect`, which also
//! runs natively, so a replay gives the filter's verdicts.
//!
//! Cost: a body is copied out of the host once; nothing is held unless the route fails closed.
//!
//! Left out on purpose: anything a test could not run without a proxy.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod hostcall;

use std::cell::RefCell;
use std::rc::Rc;

use driftlock_inspect::baselines::{Answer, Call, Services, TICK_MS};
use driftlock_inspect::host::{Direction, Host, HostError, Level, METRIC_NAMES, Metric};
use driftlock_inspect::session::{Exchange, Plugin, Step};
use hostcall::{BufferType, MapType};
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};

mod start {
    #![allow(missing_docs, reason = "the macro's exports are the ABI's")]
    use super::*;

    proxy_wasm::main! {{
        proxy_wasm::set_log_level(LogLevel::Info);
        proxy_wasm::set_root_context(|_| Box::new(Root::default()));
    }}
}

/// Counter ids by [`Metric`]; a counter that the host refused to define is absent.
type Counters = [Option<u32>; METRIC_NAMES.len()];

#[derive(Default)]
struct Root {
    /// Filled by `on_configure`, shared with the streams. A stream keeps the plugin it began with.
    plugin: Option<Rc<RefCell<Plugin>>>,
    counters: Rc<Counters>,
}

impl Root {
    /// Runs `work` with the plugin. Streams do not run meanwhile, so it is free.
    fn with(&mut self, work: impl FnOnce(&mut Plugin, &mut Proxy)) {
        let mut proxy = Proxy { counters: Rc::clone(&self.counters) };
        if let Some(mut plugin) = self.plugin.as_ref().and_then(|plugin| plugin.try_borrow_mut().ok()) {
            work(&mut plugin, &mut proxy);
        }
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, _headers: usize, body: usize, _trailers: usize) {
        // Without a response there are no headers to ask for.
        let status = hostcall::header(MapType::CallAnswer, ":status").ok().flatten();
        let status = status.and_then(|status| std::str::from_utf8(&status).ok()?.parse().ok());
        let body = self::body(BufferType::CallResponseBody, 0, body);
        // A body that cannot be read is as good as none.
        let answer =
            Answer { status: status.filter(|_| body.is_ok()), body: body.as_deref().unwrap_or_default() };
        self.with(|plugin, proxy| plugin.answered(token, answer, hostcall::now_ns(), proxy));
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, size: usize) -> bool {
        let configured = hostcall::buffer(BufferType::PluginConfiguration, 0, size)
            .map_err(|error| error.to_string())
            .and_then(|bytes| Plugin::configure(&bytes).map_err(|error| error.to_string()));
        match configured {
            Ok(plugin) => {
                self.counters = Rc::new(METRIC_NAMES.map(|name| hostcall::define_counter(name).ok()));
                let ticks = plugin.needs_ticks();
                self.plugin = Some(Rc::new(RefCell::new(plugin)));
                let node = hostcall::property("node\0id").ok().flatten().unwrap_or_default();
                self.with(|plugin, proxy| {
                    plugin.start(&String::from_utf8_lossy(&node), proxy);
                    if ticks && hostcall::tick_every(TICK_MS).is_err() {
                        Host::count(proxy, Metric::HostCallErrors, 1);
                    }
                });
                true
            }
            Err(reason) => {
                hostcall::log(4, &format!("driftlock: configuration refused: {reason}"));
                false
            }
        }
    }

    fn on_tick(&mut self) {
        self.with(|plugin, proxy| plugin.tick(hostcall::now_ns(), proxy));
    }

    fn create_http_context(&self, _context_id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream {
            plugin: self.plugin.clone(),
            exchange: Exchange::default(),
            host: Proxy { counters: Rc::clone(&self.counters) },
            held_bytes: 0,
        }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Stream {
    plugin: Option<Rc<RefCell<Plugin>>>,
    exchange: Exchange,
    host: Proxy,
    /// Request bytes that were already read and that the proxy still holds.
    held_bytes: usize,
}

impl Stream {
    /// Runs `callback` with the plugin; a stream without one (a VM that was never configured) passes.
    fn with(&mut self, callback: impl FnOnce(&mut Exchange, &mut Plugin, &mut Proxy) -> Step) -> Step {
        let Some(plugin) = &self.plugin else { return Step::Forward };
        match plugin.try_borrow_mut() {
            Ok(mut plugin) => {
                let step = callback(&mut self.exchange, &mut plugin, &mut self.host);
                plugin.settle(&mut self.host);
                step
            }
            // Callbacks do not nest, so this is the host's fault; count it, do not stop the traffic.
            Err(_) => {
                Host::count(&mut self.host, Metric::HostCallErrors, 1);
                Step::Forward
            }
        }
    }
}

fn action(step: Step) -> Action {
    match step {
        Step::Forward => Action::Continue,
        Step::Hold | Step::Answered => Action::Pause,
    }
}

impl Context for Stream {
    fn on_done(&mut self) -> bool {
        // Envoy has called on_log before; another host may not.
        self.with(|exchange, plugin, host| {
            exchange.done(plugin, host);
            Step::Forward
        });
        true
    }
}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _count: usize, end_of_stream: bool) -> Action {
        action(self.with(|exchange, plugin, host| exchange.request_headers(plugin, host, end_of_stream)))
    }

    fn on_http_request_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        let start = self.held_bytes;
        let step = self.with(|exchange, plugin, host| {
            let chunk = body(BufferType::RequestBody, start, size);
            exchange.request_body(plugin, host, chunk.as_deref().map_err(|e| *e), end_of_stream)
        });
        self.held_bytes = if step == Step::Hold { size } else { 0 };
        action(step)
    }

    fn on_http_request_trailers(&mut self, _count: usize) -> Action {
        action(self.with(|exchange, plugin, host| exchange.request_trailers(plugin, host)))
    }

    fn on_http_response_headers(&mut self, _count: usize, end_of_stream: bool) -> Action {
        action(self.with(|exchange, plugin, host| exchange.response_headers(plugin, host, end_of_stream)))
    }

    fn on_http_response_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        action(self.with(|exchange, plugin, host| {
            let chunk = body(BufferType::ResponseBody, 0, size);
            exchange.response_body(plugin, host, chunk.as_deref().map_err(|e| *e), end_of_stream)
        }))
    }

    fn on_http_response_trailers(&mut self, _count: usize) -> Action {
        action(self.with(|exchange, plugin, host| exchange.response_trailers(plugin, host)))
    }

    fn on_log(&mut self) {
        self.with(|exchange, plugin, host| {
            exchange.done(plugin, host);
            Step::Forward
        });
    }
}

/// The proxy behind the host calls.
struct Proxy {
    counters: Rc<Counters>,
}

/// Body bytes from `start` to `size`; fewer than that is an error, for what is missing was not seen.
fn body(kind: BufferType, start: usize, size: usize) -> Result<Vec<u8>, HostError> {
    let wanted = size.checked_sub(start).ok_or(hostcall::BAD_ARGUMENT)?;
    if wanted == 0 {
        return Ok(Vec::new());
    }
    let bytes = hostcall::buffer(kind, start, wanted)?;
    if bytes.len() == wanted { Ok(bytes) } else { Err(hostcall::BAD_ARGUMENT) }
}

impl Host for Proxy {
    fn header(&self, direction: Direction, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        let map = match direction {
            Direction::Request => MapType::RequestHeaders,
            Direction::Response => MapType::ResponseHeaders,
        };
        hostcall::header(map, name)
    }

    fn set_response_header(&mut self, name: &str, value: &str) -> Result<(), HostError> {
        hostcall::set_header(MapType::ResponseHeaders, name, value)
    }

    fn remove_response_header(&mut self, name: &str) -> Result<(), HostError> {
        hostcall::remove_header(MapType::ResponseHeaders, name)
    }

    fn set_filter_state(&mut self, key: &str, value: &str) -> Result<(), HostError> {
        hostcall::set_property(key, value)
    }

    fn respond(&mut self, status: u16, body: &str) -> Result<(), HostError> {
        hostcall::send_json(status, "driftlock_refused", body)
    }

    fn count(&mut self, metric: Metric, by: u64) {
        let by = i64::try_from(by).unwrap_or(i64::MAX);
        if let Some(id) = self.counters.get(metric as usize).copied().flatten() {
            // Nothing is left to report a refused increment to.
            let _ = hostcall::increment(id, by);
        }
    }

    fn log(&mut self, level: Level, line: &str) {
        let level = match level {
            Level::Info => 2,
            Level::Warn => 3,
            Level::Error => 4,
        };
        hostcall::log(level, line);
    }
}

impl Services for Proxy {
    fn shared(&self, key: &str) -> Result<Option<(Vec<u8>, u32)>, HostError> {
        hostcall::shared(key)
    }

    fn set_shared(&mut self, key: &str, value: &[u8], cas: u32) -> Result<(), HostError> {
        hostcall::set_shared(key, value, cas)
    }

    fn call(&mut self, call: Call<'_>) -> Result<u32, HostError> {
        hostcall::call(&call)
    }

    fn count(&mut self, metric: Metric, by: u64) {
        Host::count(self, metric, by);
    }

    fn log(&mut self, level: Level, line: &str) {
        Host::log(self, level, line);
    }
}
