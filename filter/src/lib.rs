//! The proxy-wasm filter: callbacks to `driftlock-inspect`, its wishes to host calls.
//!
//! What: one root context per VM holds the plugin's configuration and detector; one HTTP context per
//! stream holds an exchange. Why so thin: everything that decides is in `driftlock-inspect`, which also
//! runs natively, so a replay gives the filter's verdicts.
//!
//! Cost: a body is copied out of the host once; nothing is held unless a rule or the route asks for it.
//! Where headers may be held, a tick looks at those that wait.
//!
//! Left out on purpose: anything a test could not run without a proxy.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod abi;
mod hostcall;
mod proxy;
mod watchdog;

use std::cell::RefCell;
use std::rc::Rc;

use driftlock_inspect::baselines::{Answer, TICK_MS};
use driftlock_inspect::host::{Direction, Host, HostError, Metric};
use driftlock_inspect::session::{Exchange, Plugin, Step};
use hostcall::{BufferType, MapType};
use proxy::{MetricIds, Proxy};
use watchdog::Watchdog;

struct Root {
    /// Filled by `on_configure`, shared with the streams. A stream keeps the plugin it began with.
    plugin: Option<Rc<RefCell<Plugin>>>,
    metrics: Rc<MetricIds>,
    watchdog: Rc<Watchdog>,
}

impl Root {
    fn new(id: u32) -> Self {
        Self { plugin: None, metrics: Rc::default(), watchdog: Rc::new(Watchdog::new(id)) }
    }

    /// Runs `work` with the plugin. Streams do not run meanwhile, so it is free.
    fn with(&mut self, work: impl FnOnce(&mut Plugin, &mut Proxy)) {
        let mut proxy = Proxy::new(Rc::clone(&self.metrics));
        if let Some(mut plugin) = self.plugin.as_ref().and_then(|plugin| plugin.try_borrow_mut().ok()) {
            work(&mut plugin, &mut proxy);
        }
    }

    fn answered(&mut self, token: u32, body: usize) {
        // Without a response there are no headers to ask for.
        let status = hostcall::header(MapType::CallAnswer, ":status").ok().flatten();
        let status = status.and_then(|status| std::str::from_utf8(&status).ok()?.parse().ok());
        let body = self::body(BufferType::CallResponseBody, 0, body);
        // A body that cannot be read is as good as none.
        let answer =
            Answer { status: status.filter(|_| body.is_ok()), body: body.as_deref().unwrap_or_default() };
        self.with(|plugin, proxy| plugin.answered(token, answer, hostcall::now_ns(), proxy));
    }

    fn configure(&mut self, size: usize) -> bool {
        let configured = hostcall::buffer(BufferType::PluginConfiguration, 0, size)
            .map_err(|error| error.to_string())
            .and_then(|bytes| Plugin::configure(&bytes).map_err(|error| error.to_string()));
        match configured {
            Ok(plugin) => {
                self.metrics = Rc::new(MetricIds::define());
                let keeper = plugin.needs_ticks().then_some(TICK_MS);
                let period = [keeper, self.watchdog.configure(plugin.hold())].into_iter().flatten().min();
                self.plugin = Some(Rc::new(RefCell::new(plugin)));
                let node = hostcall::property("node\0id").ok().flatten().unwrap_or_default();
                self.with(|plugin, proxy| {
                    plugin.start(&String::from_utf8_lossy(&node), proxy);
                    if period.is_some_and(|period| hostcall::tick_every(period).is_err()) {
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

    fn tick(&mut self) {
        self.with(|plugin, proxy| plugin.tick(hostcall::now_ns(), proxy));
        self.watchdog.tick();
    }

    fn stream(&self, context_id: u32) -> Stream {
        let passing = Passing {
            plugin: self.plugin.clone(),
            exchange: Exchange::default(),
            host: Proxy::new(Rc::clone(&self.metrics)),
            held_bytes: [0; 2],
        };
        Stream { context_id, passing: Rc::new(RefCell::new(passing)), watchdog: Rc::clone(&self.watchdog) }
    }
}

/// A stream as the proxy knows it.
struct Stream {
    context_id: u32,
    passing: Rc<RefCell<Passing>>,
    watchdog: Rc<Watchdog>,
}

/// An exchange and what it needs.
struct Passing {
    plugin: Option<Rc<RefCell<Plugin>>>,
    exchange: Exchange,
    host: Proxy,
    /// Bytes of the request and the response that were already read and that the proxy still holds.
    held_bytes: [usize; 2],
}

impl Passing {
    /// Runs `callback` with the plugin; a stream without one (a VM that was never configured) passes.
    fn with<T>(
        &mut self,
        otherwise: T,
        callback: impl FnOnce(&mut Exchange, &mut Plugin, &mut Proxy) -> T,
    ) -> T {
        let Some(plugin) = &self.plugin else { return otherwise };
        match plugin.try_borrow_mut() {
            Ok(mut plugin) => {
                let result = callback(&mut self.exchange, &mut plugin, &mut self.host);
                plugin.settle(&mut self.host);
                result
            }
            // Callbacks do not nest, so this is the host's fault; count it, do not stop the traffic.
            Err(_) => {
                Host::count(&mut self.host, Metric::HostCallErrors, 1);
                otherwise
            }
        }
    }

    fn body(&mut self, direction: Direction, size: usize, end_of_stream: bool) -> Step {
        let kind = match direction {
            Direction::Request => BufferType::RequestBody,
            Direction::Response => BufferType::ResponseBody,
        };
        let place = direction as usize;
        let start = self.held_bytes.get(place).copied().unwrap_or(0);
        let step = self.with(Step::Forward, |exchange, plugin, host| {
            let chunk = body(kind, start, size);
            let chunk = chunk.as_deref().map_err(|error| *error);
            match direction {
                Direction::Request => exchange.request_body(plugin, host, chunk, end_of_stream),
                Direction::Response => exchange.response_body(plugin, host, chunk, end_of_stream),
            }
        });
        if let Some(held) = self.held_bytes.get_mut(place) {
            *held = if step == Step::Hold { size } else { 0 };
        }
        step
    }
}

impl Stream {
    fn with(&self, callback: impl FnOnce(&mut Exchange, &mut Plugin, &mut Proxy) -> Step) -> Step {
        match self.passing.try_borrow_mut() {
            Ok(mut passing) => passing.with(Step::Forward, callback),
            Err(_) => Step::Forward,
        }
    }

    /// Headers that are held are watched.
    fn headers(
        &self,
        direction: Direction,
        callback: impl FnOnce(&mut Exchange, &mut Plugin, &mut Proxy) -> Step,
    ) -> Step {
        let Ok(mut passing) = self.passing.try_borrow_mut() else { return Step::Forward };
        passing.host.opens(Some(direction));
        let step = passing.with(Step::Forward, callback);
        passing.host.opens(None);
        if step == Step::Hold {
            self.watchdog.watch(self.context_id, direction, Rc::downgrade(&self.passing));
        }
        step
    }

    fn body(&self, direction: Direction, size: usize, end_of_stream: bool) -> Step {
        match self.passing.try_borrow_mut() {
            Ok(mut passing) => passing.body(direction, size, end_of_stream),
            Err(_) => Step::Forward,
        }
    }

    fn done(&self) {
        self.with(|exchange, plugin, host| {
            exchange.done(plugin, host);
            Step::Forward
        });
    }
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
