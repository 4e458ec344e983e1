//! The native path: exchanges straight into the inspection, no proxy and no wasm.
//!
//! What: [`inspect`] reports an exchange to [`Exchange`](driftlock_inspect::session::Exchange) as a
//! proxy would and collects what it publishes. Why: it is the fastest path, it trains, and it is the
//! reference that the filter's verdicts are compared with.
//!
//! Cost: that of the inspection, plus one copy of each header.

use std::collections::BTreeMap;

use driftlock_inspect::host::{Direction, Host, HostError, Level, Metric};
use driftlock_inspect::session::{self, Plugin, Step, filter_state};

use super::{Verdicts, wire};
use crate::capture::{self, Exchange};

/// A proxy that only remembers.
struct Memory<'a> {
    exchange: &'a Exchange,
    state: BTreeMap<String, String>,
}

impl Host for Memory<'_> {
    fn header(&self, direction: Direction, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        let request = &self.exchange.request;
        let value = match (direction, name) {
            (Direction::Request, ":method") => Some(request.method.as_str()),
            (Direction::Request, ":path") => Some(request.target.as_str()),
            (Direction::Request, name) => capture::header(&request.headers, name),
            (Direction::Response, name) => {
                self.exchange.response.as_ref().and_then(|response| capture::header(&response.headers, name))
            }
        };
        Ok(value.map(|value| value.as_bytes().to_vec()))
    }

    fn set_response_header(&mut self, _name: &str, _value: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn remove_response_header(&mut self, _name: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn set_filter_state(&mut self, key: &str, value: &str) -> Result<(), HostError> {
        self.state.insert(key.to_owned(), value.to_owned());
        Ok(())
    }

    fn respond(&mut self, _status: u16, _body: &str) -> Result<(), HostError> {
        Ok(())
    }

    fn count(&mut self, _metric: Metric, _by: u64) {}

    fn log(&mut self, _level: Level, _line: &str) {}
}

/// Inspects one exchange that [`wire::on_the_wire`] has mapped.
pub fn inspect(plugin: &mut Plugin, exchange: &Exchange) -> Verdicts {
    let mut host = Memory { exchange, state: BTreeMap::new() };
    let mut inspection = session::Exchange::default();
    run(plugin, &mut host, &mut inspection, exchange);
    inspection.done(plugin, &mut host);
    Verdicts {
        request: host.state.remove(filter_state::REQUEST),
        response: host.state.remove(filter_state::RESPONSE),
        failure: None,
    }
}

fn run(plugin: &mut Plugin, host: &mut Memory<'_>, inspection: &mut session::Exchange, exchange: &Exchange) {
    let body = &exchange.request.body;
    let mut step = inspection.request_headers(plugin, host, body.is_empty());
    if step != Step::Answered && !body.is_empty() {
        step = inspection.request_body(plugin, host, Ok(body), true);
    }
    let Some(response) = exchange.response.as_ref().filter(|_| step != Step::Answered) else { return };
    step = inspection.response_headers(plugin, host, response.body.is_empty());
    if step != Step::Answered && !response.body.is_empty() {
        inspection.response_body(plugin, host, Ok(&response.body), true);
    }
}

/// Maps and inspects one exchange.
pub fn replay(plugin: &mut Plugin, exchange: Exchange) -> Verdicts {
    match wire::on_the_wire(exchange) {
        Ok(exchange) => inspect(plugin, &exchange),
        Err(reason) => Verdicts::failed(&reason),
    }
}
