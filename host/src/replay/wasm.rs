//! The wasm path: exchanges through the real filter module on wasmtime, without sockets.
//!
//! What: [`WasmReplay`] drives one VM as a proxy would, callback by callback. Why: it shows that the
//! module gives the native verdicts, at a speed that a whole capture can be replayed with.
//!
//! Cost: the module's compilation once (seconds), then a few microseconds a callback beside the
//! inspection. Bodies are reported in chunks, as a proxy reads them. The guest's clock is the capture's. The filter
//! beside the program is compiled unwatched, which saves a tenth of its time; one that `--filter` names is stopped
//! where a callback takes too long.

use std::path::PathBuf;

use driftlock_inspect::host::Direction;
use driftlock_inspect::session::filter_state;

use super::cuts::Cuts;
use super::wire::{self, View};
use super::{Found, Verdicts};
use crate::abi::{
    AbiError, Clock, HeaderMap, LogLevel, LogSink, Module, Plugin, PluginOptions, SharedState, Step,
    StreamId, VirtualClock,
};
use crate::capture::Exchange;

/// One VM that replays.
pub struct WasmReplay {
    plugin: Plugin,
    clock: VirtualClock,
}

/// Why the module could not replay.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum WasmReplayError {
    /// The module file.
    #[error("cannot read the filter {path}: {source}; build it with `cargo xtask build` or give --filter")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The module or its configuration.
    #[error(transparent)]
    Abi(#[from] AbiError),
}

impl WasmReplay {
    /// Starts a VM with the plugin configuration.
    ///
    /// # Errors
    /// [`AbiError`] if the module does not compile or start, or refuses the configuration.
    pub fn start(module: &Module, plugin_configuration: Vec<u8>) -> Result<Self, AbiError> {
        let log = LogSink::new(LogLevel::Error, |line| tracing::error!("filter: {}", line.message));
        let clock = VirtualClock::at_ns(0);
        let options = PluginOptions {
            plugin_configuration: super::telling_all(plugin_configuration),
            log,
            clock: Clock::Virtual(clock.clone()),
            shared: SharedState::new(),
            ..PluginOptions::default()
        };
        Ok(Self { plugin: Plugin::start(module, options)?, clock })
    }

    /// Maps and replays one exchange.
    ///
    /// # Errors
    /// [`AbiError`] if the VM is lost; what befalls one exchange is in its [`Verdicts`].
    pub fn replay(&mut self, exchange: Exchange) -> Result<Verdicts, AbiError> {
        let exchange = match wire::on_the_wire(exchange) {
            Ok(exchange) => exchange,
            Err(reason) => return Ok(Verdicts::failed(&reason)),
        };
        self.inspect(&exchange)
    }

    /// Replays one exchange that [`wire::on_the_wire`] has mapped.
    ///
    /// # Errors
    /// As [`Self::replay`].
    pub fn inspect(&mut self, exchange: &Exchange) -> Result<Verdicts, AbiError> {
        let mut found = Found::default();
        self.judge(&View::of_mapped(exchange), None, Cuts::chunks(), &mut found)?;
        Ok(found.into_verdicts())
    }

    /// The VM's linear memory, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.plugin.memory_bytes()
    }

    /// Replays one exchange; the guest's clock is set to `unix_ns`, where it is known.
    pub(super) fn judge(
        &mut self,
        view: &View<'_>,
        unix_ns: Option<u64>,
        cuts: Cuts,
        found: &mut Found,
    ) -> Result<(), AbiError> {
        if let Some(unix_ns) = unix_ns {
            self.clock.set_ns(unix_ns);
        }
        let stream = self.plugin.stream()?;
        let passed = self.pass(stream, view, cuts);
        let ended = self.plugin.done(stream)?;
        passed?;
        if let Some(error) = ended.error {
            return Err(error);
        }
        let state = |key: &str| ended.filter_state.get(&format!("wasm.{key}"));
        if let Some(json) = state(filter_state::REQUEST) {
            found.read(Direction::Request, &String::from_utf8_lossy(json));
        }
        if let Some(json) = state(filter_state::RESPONSE) {
            found.read(Direction::Response, &String::from_utf8_lossy(json));
        }
        Ok(())
    }

    fn pass(&mut self, stream: StreamId, view: &View<'_>, mut cuts: Cuts) -> Result<(), AbiError> {
        let head = [
            (":method", view.method),
            (":path", view.target.as_ref()),
            (":scheme", "http"),
            (":authority", view.host.as_ref()),
        ];
        let no_body = view.request_body.is_empty();
        let plugin = &mut self.plugin;
        let mut step = plugin.request_headers(stream, header_map(&head, &view.request_headers), no_body);
        cuts.each(view.request_body, |piece, last| {
            if matches!(step, Ok(Step::Forward(_) | Step::Hold)) {
                step = plugin.request_body(stream, piece, last);
            }
        });
        if !matches!(step?, Step::Forward(_)) {
            return Ok(());
        }
        let status = view.status.to_string();
        let headers = header_map(&[(":status", &status)], &view.response_headers);
        let mut step = plugin.response_headers(stream, headers, view.response_body.is_empty());
        cuts.each(view.response_body, |piece, last| {
            if matches!(step, Ok(Step::Forward(_) | Step::Hold)) {
                step = plugin.response_body(stream, piece, last);
            }
        });
        step.map(|_| ())
    }
}

fn header_map(pseudo: &[(&str, &str)], headers: &[(&str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(pseudo.len() + headers.len());
    pseudo.iter().for_each(|(name, value)| map.add(name.as_bytes(), value.as_bytes()));
    for (name, value) in headers {
        map.add(name.to_ascii_lowercase().as_bytes(), value.as_bytes());
    }
    map
}
