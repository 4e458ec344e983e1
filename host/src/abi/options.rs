//! How to start a plugin, and what its VM may use.

use std::collections::BTreeSet;
use std::time::Duration;

use super::clock::{Clock, Randomness};
use super::foreign::ForeignFunctions;
use super::log::LogSink;
use super::property::PropertyValue;
use super::shared::SharedState;
use super::stream::HeadersPause;
use super::tape::Tape;

/// What a VM may use.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Linear memory, in bytes. Envoy's is 1 GiB.
    pub memory_bytes: usize,
    /// Elements of all the module's tables together.
    pub table_elements: usize,
    /// Request body bytes that are buffered for a paused guest before the request is answered with
    /// 413; 0 for no limit. Envoy's `per_connection_buffer_limit_bytes`, 1 MiB.
    pub request_buffer_bytes: usize,
    /// The same for the response, which is answered with 500, or reset once it has begun.
    pub response_buffer_bytes: usize,
    /// How long one callback may run, in wall time; 10 s unless set, far above what a filter takes even
    /// on a crowded machine, since a callback that is stopped loses the VM.
    pub callback_deadline: Duration,
    /// How long start and configuration together may run.
    pub start_deadline: Duration,
    /// Fuel (about one per WebAssembly instruction) for each callback, for a bound that does not depend
    /// on the machine's speed. Needs a module compiled with [`CompileOptions::fuel`](super::CompileOptions).
    pub callback_fuel: Option<u64>,
    /// Http and gRPC calls and gRPC streams that may be outstanding at once.
    pub outstanding_callouts: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: 1024 * 1024 * 1024,
            table_elements: 1_000_000,
            request_buffer_bytes: 1024 * 1024,
            response_buffer_bytes: 1024 * 1024,
            callback_deadline: Duration::from_secs(10),
            start_deadline: Duration::from_secs(60),
            callback_fuel: None,
            outstanding_callouts: 128,
        }
    }
}

/// How to start a plugin. `Default` is an unnamed plugin without configuration on a real clock.
#[derive(Clone)]
pub struct PluginOptions {
    /// The plugin's name, for logs and the property `plugin_name`.
    pub name: String,
    /// Which root context of the module to run.
    pub root_id: String,
    /// Shared data is keyed by this.
    pub vm_id: String,
    /// What `proxy_on_vm_start` reads.
    pub vm_configuration: Vec<u8>,
    /// What `proxy_on_configure` reads.
    pub plugin_configuration: Vec<u8>,
    /// Environment variables, in order.
    pub environment: Vec<(String, String)>,
    /// Properties that hold for every stream (`node`, `listener_direction`, ...): path parts and
    /// value.
    pub properties: Vec<(Vec<String>, PropertyValue)>,
    /// What the VM may use.
    pub limits: Limits,
    /// What a Pause on headers does.
    pub headers_pause: HeadersPause,
    /// The guest's time.
    pub clock: Clock,
    /// The guest's randomness.
    pub randomness: Randomness,
    /// Shared with the other VMs of the process.
    pub shared: SharedState,
    /// Where log lines go.
    pub log: LogSink,
    /// Functions that the guest may call by name.
    pub foreign_functions: ForeignFunctions,
    /// Upstreams that http and gRPC calls may name; `None` allows any name.
    pub callout_upstreams: Option<BTreeSet<String>>,
    /// Records every callback and host call, and can answer host calls in the host's place.
    pub tape: Option<Tape>,
}

impl PluginOptions {
    /// Runs alike every time: a clock that stands at `now_ns` and random bytes from `seed`. (NaN bits
    /// are the same in any case.)
    #[must_use]
    pub fn deterministic(mut self, now_ns: u64, seed: u64) -> Self {
        self.clock = Clock::fixed_ns(now_ns);
        self.randomness = Randomness::Seeded(seed);
        self
    }
}

impl Default for PluginOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            root_id: String::new(),
            vm_id: String::new(),
            vm_configuration: Vec::new(),
            plugin_configuration: Vec::new(),
            environment: Vec::new(),
            properties: Vec::new(),
            limits: Limits::default(),
            headers_pause: HeadersPause::default(),
            clock: Clock::default(),
            randomness: Randomness::default(),
            shared: SharedState::default(),
            log: LogSink::discard(),
            foreign_functions: ForeignFunctions::default(),
            callout_upstreams: None,
            tape: None,
        }
    }
}
