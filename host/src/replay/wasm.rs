//! The wasm path: exchanges through the real filter module on wasmtime, without sockets.
//!
//! What: [`WasmReplay`] drives one VM as a proxy would, callback by callback. Why: it shows that the
//! module gives the native verdicts, at a speed that a whole capture can be replayed with.
//!
//! Cost: the module's compilation once (seconds), then a few microseconds a callback beside the
//! inspection. Bodies are reported in chunks of [`CHUNK_BYTES`], as a proxy reads them.

use std::path::PathBuf;

use driftlock_inspect::session::filter_state;

use super::{Verdicts, wire};
use crate::abi::{
    AbiError, HeaderMap, LogLevel, LogSink, Module, Plugin, PluginOptions, SharedState, Step, StreamId,
};
use crate::capture::Exchange;

/// Envoy reads bodies in pieces of about this size.
pub const CHUNK_BYTES: usize = 32 << 10;

/// One VM that replays.
pub struct WasmReplay {
    plugin: Plugin,
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
        let options = PluginOptions {
            plugin_configuration,
            log,
            shared: SharedState::new(),
            ..PluginOptions::default()
        };
        Ok(Self { plugin: Plugin::start(module, options)? })
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
        let stream = self.plugin.stream()?;
        let passed = self.pass(stream, &exchange);
        let ended = self.plugin.done(stream)?;
        passed?;
        if let Some(error) = ended.error {
            return Err(error);
        }
        let state = |key: &str| {
            let value = ended.filter_state.get(&format!("wasm.{key}"))?;
            Some(String::from_utf8_lossy(value).into_owned())
        };
        Ok(Verdicts {
            request: state(filter_state::REQUEST),
            response: state(filter_state::RESPONSE),
            failure: None,
        })
    }

    fn pass(&mut self, stream: StreamId, exchange: &Exchange) -> Result<(), AbiError> {
        let request = &exchange.request;
        let head =
            [(":method", request.method.as_str()), (":path", request.target.as_str()), (":scheme", "http")];
        let mut step = self.plugin.request_headers(
            stream,
            header_map(&head, &request.headers),
            request.body.is_empty(),
        )?;
        for (chunk, last) in chunks(&request.body) {
            if !matches!(step, Step::Forward(_) | Step::Hold) {
                break;
            }
            step = self.plugin.request_body(stream, chunk, last)?;
        }
        let Some(response) = &exchange.response else { return Ok(()) };
        if !matches!(step, Step::Forward(_)) {
            return Ok(());
        }
        let status = response.status.to_string();
        let headers = header_map(&[(":status", &status)], &response.headers);
        step = self.plugin.response_headers(stream, headers, response.body.is_empty())?;
        for (chunk, last) in chunks(&response.body) {
            if !matches!(step, Step::Forward(_) | Step::Hold) {
                break;
            }
            step = self.plugin.response_body(stream, chunk, last)?;
        }
        Ok(())
    }
}

fn header_map(pseudo: &[(&str, &str)], headers: &[(String, String)]) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(pseudo.len() + headers.len());
    pseudo.iter().for_each(|(name, value)| map.add(name.as_bytes(), value.as_bytes()));
    for (name, value) in headers {
        let name = if name.eq_ignore_ascii_case("host") { ":authority" } else { name.as_str() };
        map.add(name.as_bytes(), value.as_bytes());
    }
    map
}

/// The body's pieces, each with whether it is the last; none for an empty body.
fn chunks(body: &[u8]) -> impl Iterator<Item = (&[u8], bool)> {
    let last = body.len().div_ceil(CHUNK_BYTES).saturating_sub(1);
    body.chunks(CHUNK_BYTES).enumerate().map(move |(i, chunk)| (chunk, i == last))
}
