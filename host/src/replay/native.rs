//! The native path: exchanges straight into the inspection, no proxy and no wasm.
//!
//! What: `judge` reports an exchange to [`Exchange`](driftlock_inspect::session::Exchange) as a
//! proxy would and collects what it publishes. Why: it is the fastest path, it trains, and it is the
//! reference that the filter's verdicts are compared with.
//!
//! Cost: that of the inspection; headers and bodies are not copied.

use driftlock_engine::evidence::Verdict;
use driftlock_inspect::host::{Direction, Gauge, Histogram, Host, HostError, Level, Metric, Reply};
use driftlock_inspect::session::{self, Plugin, Step};

use super::cuts::Cuts;
use super::wire::{self, View};
use super::{Found, Verdicts};
use crate::capture;

/// What the verdicts of request and response say in plain sentences.
pub type Sentences = [Vec<String>; 2];

/// A proxy that only remembers.
struct Memory<'a> {
    view: &'a View<'a>,
    found: &'a mut Found,
    sentences: Option<&'a mut Sentences>,
}

fn field<'a>(headers: &[(&'a str, &'a str)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
}

impl Host for Memory<'_> {
    fn header(&self, direction: Direction, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        let view = self.view;
        let value = match (direction, name) {
            (Direction::Request, ":method") => Some(view.method),
            (Direction::Request, ":path") => Some(view.target.as_ref()),
            (Direction::Request, ":authority") => Some(view.host.as_ref()),
            (Direction::Request, ":scheme") => Some("http"),
            (Direction::Request, name) => field(&view.request_headers, name),
            (Direction::Response, ":status") => return Ok(Some(view.status.to_string().into_bytes())),
            (Direction::Response, name) => field(&view.response_headers, name),
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

    fn set_filter_state(&mut self, _key: &str, _value: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn respond(&mut self, _reply: &Reply) -> Result<(), HostError> {
        Ok(())
    }

    fn now_ns(&self) -> Option<u64> {
        None
    }

    fn count(&mut self, _metric: Metric, _by: u64) {}

    fn record(&mut self, _histogram: Histogram, _value: u64) {}

    fn gauge(&mut self, _gauge: Gauge, _value: u64) {}

    fn log(&mut self, _level: Level, _line: &str) {}

    /// All of it, whatever the configuration has filter state hold.
    fn judged(&mut self, direction: Direction, verdict: &Verdict) {
        self.found.set(direction, verdict);
        if let Some([request, response]) = &mut self.sentences {
            *match direction {
                Direction::Request => request,
                Direction::Response => response,
            } = verdict.sentences();
        }
    }
}

/// Inspects one exchange; bodies come in pieces as `cuts` says.
pub(super) fn judge(plugin: &mut Plugin, view: &View<'_>, cuts: Cuts, found: &mut Found) {
    run(plugin, Memory { view, found, sentences: None }, cuts);
}

fn run(plugin: &mut Plugin, mut host: Memory<'_>, cuts: Cuts) {
    let view = host.view;
    let mut inspection = session::Exchange::default();
    pass(plugin, &mut host, &mut inspection, view, cuts);
    inspection.done(plugin, &mut host);
}

fn pass(
    plugin: &mut Plugin,
    host: &mut Memory<'_>,
    inspection: &mut session::Exchange,
    view: &View<'_>,
    mut cuts: Cuts,
) {
    let mut step = inspection.request_headers(plugin, host, view.request_body.is_empty());
    cuts.each(view.request_body, |piece, last| {
        if step != Step::Answered {
            step = inspection.request_body(plugin, host, Ok(piece), last);
        }
    });
    if step == Step::Answered {
        return;
    }
    step = inspection.response_headers(plugin, host, view.response_body.is_empty());
    cuts.each(view.response_body, |piece, last| {
        if step != Step::Answered {
            step = inspection.response_body(plugin, host, Ok(piece), last);
        }
    });
}

/// Inspects one exchange that [`wire::on_the_wire`] has mapped.
pub fn inspect(plugin: &mut Plugin, exchange: &capture::Exchange) -> Verdicts {
    let mut found = Found::default();
    judge(plugin, &View::of_mapped(exchange), Cuts::whole(), &mut found);
    found.into_verdicts()
}

/// Inspects one exchange that [`wire::on_the_wire`] has mapped, and says in sentences what was found.
pub fn explain(plugin: &mut Plugin, exchange: &capture::Exchange) -> (Verdicts, Sentences) {
    let (mut found, mut sentences) = (Found::default(), Sentences::default());
    let view = View::of_mapped(exchange);
    run(plugin, Memory { view: &view, found: &mut found, sentences: Some(&mut sentences) }, Cuts::whole());
    (found.into_verdicts(), sentences)
}

/// Maps and inspects one exchange.
pub fn replay(plugin: &mut Plugin, exchange: capture::Exchange) -> Verdicts {
    match wire::on_the_wire(exchange) {
        Ok(exchange) => inspect(plugin, &exchange),
        Err(reason) => Verdicts::failed(&reason),
    }
}
