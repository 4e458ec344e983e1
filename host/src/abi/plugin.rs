//! One VM running one plugin: its start, its streams, its end.
//!
//! A [`Plugin`] owns one wasmtime store and is driven by one thread at a time (it is `Send`, not
//! `Sync`). It does no I/O: the caller tells it what arrived and is told what to forward. A crash
//! loses this VM only; every later call returns [`AbiError::Poisoned`], and [`Plugin::salvage`] gives
//! back what was held, for a caller that fails open. The callbacks of an exchange are in `exchange`,
//! those of a connection in `network`, those of the root context in `root`.
//!
//! Order of the last callbacks is Envoy's: `proxy_on_log`, `proxy_on_done`, `proxy_on_delete`. As in
//! Envoy, what `proxy_on_done` answers for a stream is not waited for.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use wasmtime::{Store, StoreLimitsBuilder};

use super::error::AbiError;
use super::exports::{Callback, Exports, Vm, ticks};
use super::headers::HeaderMap;
use super::host::{Deferred, Host};
use super::log::GuestLog;
use super::module::Module;
use super::options::PluginOptions;
use super::property::{Lookup, PropertyValue, path_bytes};
use super::shared::SharedState;
use super::status::{Direction, MapType};
use super::stream::{Event, HeadersPause, Release, Stream};

/// A stream context of one plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub(super) u32);

impl StreamId {
    /// The context id that the guest knows the stream by.
    #[must_use]
    pub fn context_id(self) -> u32 {
        self.0
    }
}

/// What is left of a stream after its last callback.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Ended {
    /// Filter state that the guest wrote, by full key (`wasm.<path>`).
    pub filter_state: BTreeMap<String, Vec<u8>>,
    /// Set if the VM was lost in one of the last callbacks.
    pub error: Option<AbiError>,
}

/// One VM running one plugin.
pub struct Plugin {
    pub(super) vm: Vm,
    pub(super) exports: Exports,
    pub(super) headers_pause: HeadersPause,
    next_context: u32,
    /// What the guest asked for beyond the callback that is being answered.
    pub(super) later: VecDeque<Deferred>,
    pub(super) events: Vec<Event>,
}

/// A VM that is instantiated and initialised, but has no root context yet: the slow part of a start
/// without any of its effects on other VMs. Kept warm by a [`Pool`](super::Pool).
#[derive(Debug)]
pub struct Prepared(Plugin);

impl Prepared {
    /// Creates the root context, starts and configures it.
    ///
    /// # Errors
    /// As [`Plugin::start`], from the root context on.
    pub fn configure(self) -> Result<Plugin, AbiError> {
        let mut plugin = self.0;
        plugin.configure()?;
        Ok(plugin)
    }
}

impl Plugin {
    /// Starts one VM: instantiates the module, runs its initialisation, creates the root context,
    /// starts and configures it.
    ///
    /// # Errors
    /// [`AbiError::Start`] if the module cannot be instantiated, [`AbiError::WrongType`] for an
    /// export of the wrong type, [`AbiError::ConfigurationRefused`] if the guest returned false,
    /// [`AbiError::Trap`] or [`AbiError::Deadline`] if it crashed or did not return.
    pub fn start(module: &Module, options: PluginOptions) -> Result<Self, AbiError> {
        Self::prepare(module, options)?.configure()
    }

    /// The first half of [`Plugin::start`]: up to the root context.
    ///
    /// # Errors
    /// As [`Plugin::start`], up to the root context.
    pub fn prepare(module: &Module, options: PluginOptions) -> Result<Prepared, AbiError> {
        if options.limits.callback_fuel.is_some() && !module.meters_fuel() {
            return Err(AbiError::Start {
                message: "Limits::callback_fuel needs a module compiled with CompileOptions::fuel".to_owned(),
                log: super::LastWords::default(),
            });
        }
        let root = 1;
        let properties = options.properties.into_iter().map(|(path, value)| {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            (path_bytes(&path), value.into_bytes())
        });
        let start_deadline = options.limits.start_deadline;
        let host = Host {
            memory: None,
            allocate: None,
            store_limits: StoreLimitsBuilder::new()
                .memory_size(options.limits.memory_bytes)
                .instances(1)
                .memories(1)
                .tables(64)
                .table_elements(options.limits.table_elements)
                .build(),
            limits: options.limits,
            name: options.name,
            vm_id: options.vm_id,
            vm_configuration: options.vm_configuration,
            plugin_configuration: options.plugin_configuration,
            configuring: true,
            environment: options.environment,
            properties: properties.collect(),
            declared: std::collections::BTreeSet::new(),
            foreign: options.foreign_functions,
            upstreams: options.callout_upstreams,
            clock: options.clock,
            started: Instant::now(),
            random: options.randomness.generator(),
            vm: options.shared.enrol(),
            shared: options.shared,
            log: GuestLog::new(options.log, &options.root_id),
            root_id: options.root_id,
            tape: options.tape,
            scratch: Vec::new(),
            root,
            streams: HashMap::new(),
            current: root,
            effective: 0,
            deferred: Vec::new(),
            tick_period_ms: None,
            root_done_pending: false,
            root_done: false,
            callouts: super::callout::Callouts::default(),
            answer: None,
            grpc: super::host::GrpcAnswer::default(),
            call_status: (0, String::new()),
            call_data: Vec::new(),
        };
        let mut store = Store::new(module.engine(), host);
        store.limiter(|host| &mut host.store_limits);
        store.set_epoch_deadline(ticks(start_deadline));
        if module.meters_fuel() {
            // Cannot fail: the engine meters fuel.
            let _ = store.set_fuel(u64::MAX);
        }
        let instance = match module.ready().instantiate(&mut store) {
            Ok(instance) => instance,
            Err(error) => {
                return Err(AbiError::Start {
                    message: format!("{error:#}"),
                    log: store.data_mut().log.take_last_words(),
                });
            }
        };
        let exports = Exports::find(&mut store, &instance)?;
        let reactor: Callback<(), ()> = Callback::find(&mut store, &instance, "_initialize")?;
        let command: Callback<(), ()> = Callback::find(&mut store, &instance, "_start")?;
        let mut vm = Vm::new(store);
        // A reactor's `_initialize`, then `main` if there is one; else a command's `_start`.
        if reactor.is_there() {
            let main: Callback<(u32, u32), u32> = Callback::find(&mut vm.store, &instance, "main")?;
            vm.call(&reactor, 0, ())?;
            vm.call(&main, 0, (0, 0))?;
        } else {
            vm.call(&command, 0, ())?;
        }
        Ok(Prepared(Self {
            vm,
            exports,
            headers_pause: options.headers_pause,
            next_context: root,
            later: VecDeque::new(),
            events: Vec::new(),
        }))
    }

    fn configure(&mut self) -> Result<(), AbiError> {
        let root = self.vm.store.data().root;
        self.vm.call(&self.exports.context_create, root, (root, 0))?;
        let host = self.vm.store.data();
        let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let (vm_size, plugin_size) = (size(&host.vm_configuration), size(&host.plugin_configuration));
        for (callback, size) in [(&self.exports.vm_start, vm_size), (&self.exports.configure, plugin_size)] {
            if self.vm.call(callback, root, (root, size))? == Some(0) {
                let log = self.vm.last_words();
                return Err(AbiError::ConfigurationRefused { callback: callback.name, log });
            }
        }
        self.vm.store.data_mut().configuring = false;
        self.drain();
        Ok(())
    }

    /// Whether a crash lost this VM.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.vm.is_poisoned()
    }

    /// The linear memory's size now, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let memory = self.vm.store.data().memory;
        memory.map_or(0, |memory| memory.data_size(&self.vm.store))
    }

    /// How many streams exist.
    #[must_use]
    pub fn stream_count(&self) -> usize {
        self.vm.store.data().streams.len()
    }

    /// The state this VM shares.
    #[must_use]
    pub fn shared(&self) -> &SharedState {
        &self.vm.store.data().shared
    }

    /// Creates a stream context.
    ///
    /// # Errors
    /// The VM is lost, or is lost in `proxy_on_context_create`.
    pub fn stream(&mut self) -> Result<StreamId, AbiError> {
        self.vm.check()?;
        let host = self.vm.store.data_mut();
        loop {
            self.next_context = self.next_context.wrapping_add(1);
            let id = self.next_context;
            if id > host.root && !host.streams.contains_key(&id) {
                break;
            }
        }
        let id = self.next_context;
        let (request, response) = (host.limits.request_buffer_bytes, host.limits.response_buffer_bytes);
        let begun_ns = host.clock.realtime_ns();
        host.streams.insert(id, Stream { begun_ns, ..Stream::new(request, response) });
        let root = host.root;
        self.vm.call(&self.exports.context_create, id, (id, root))?;
        self.drain();
        Ok(StreamId(id))
    }

    /// Sets a property of one stream, for example `["source", "address"]`. It takes precedence over
    /// what follows from the headers.
    ///
    /// # Errors
    /// [`AbiError::UnknownStream`].
    pub fn set_property(
        &mut self,
        id: StreamId,
        path: &[&str],
        value: impl Into<PropertyValue>,
    ) -> Result<(), AbiError> {
        let stream = self.stream_mut(id)?;
        stream.properties.insert(path_bytes(path), value.into().into_bytes());
        Ok(())
    }

    /// Has `answer` asked for properties of one stream that [`Plugin::set_property`] did not set, by
    /// their NUL-separated paths. It goes before what follows from the headers, and must not call into a
    /// plugin. Costs nothing until a guest asks.
    ///
    /// # Errors
    /// [`AbiError::UnknownStream`].
    pub fn properties_from(
        &mut self,
        id: StreamId,
        answer: impl Fn(&[u8]) -> Option<PropertyValue> + Send + Sync + 'static,
    ) -> Result<(), AbiError> {
        self.stream_mut(id)?.lookup = Some(Lookup(Arc::new(answer)));
        Ok(())
    }

    /// Filter state that the guest wrote so far, by full key (`wasm.<path>`); `None` for a stream
    /// that does not exist.
    #[must_use]
    pub fn filter_state(&self, id: StreamId) -> Option<&BTreeMap<String, Vec<u8>>> {
        let stream = self.vm.store.data().streams.get(&id.0)?;
        Some(&stream.filter_state)
    }

    /// A stream's header or trailer map as it stands: what a [`Release`] sends out.
    #[must_use]
    pub fn header_map(&self, id: StreamId, kind: MapType) -> Option<&HeaderMap> {
        let stream = self.vm.store.data().streams.get(&id.0)?;
        match kind {
            MapType::RequestHeaders => stream.request.headers.as_ref(),
            MapType::RequestTrailers => stream.request.trailers.as_ref(),
            MapType::ResponseHeaders => stream.response.headers.as_ref(),
            MapType::ResponseTrailers => stream.response.trailers.as_ref(),
            _ => None,
        }
    }

    /// Body bytes that are held back on one side. Once they exceed the limit the caller should stop
    /// reading from that peer: a side that is stopped as a whole is not ended by the limit.
    #[must_use]
    pub fn held_bytes(&self, id: StreamId, direction: Direction) -> usize {
        let stream = self.vm.store.data().streams.get(&id.0);
        stream.map_or(0, |stream| stream.side(direction).held_bytes())
    }

    /// The exchange or connection is over, in whatever way: runs the last callbacks and forgets it.
    /// Works on a lost VM too, without the callbacks.
    ///
    /// # Errors
    /// [`AbiError::UnknownStream`] only; a crash in the last callbacks is in the result.
    pub fn done(&mut self, id: StreamId) -> Result<Ended, AbiError> {
        let is_connection = self.stream_mut(id)?.connection.is_some();
        let error = self.last_callbacks(id.0, is_connection).err();
        let stream = self.vm.store.data_mut().streams.remove(&id.0);
        self.drain();
        Ok(Ended {
            filter_state: stream.map(|stream| stream.filter_state).unwrap_or_default(),
            error: error.filter(|error| !matches!(error, AbiError::Poisoned { .. })),
        })
    }

    fn last_callbacks(&mut self, id: u32, is_connection: bool) -> Result<(), AbiError> {
        let Exports { done, .. } = &self.exports;
        if is_connection {
            self.vm.call(done, id, id)?;
        }
        self.set_log_phase(id, true);
        let logged = self.vm.call(&self.exports.log, id, id);
        self.set_log_phase(id, false);
        logged?;
        let Exports { done, delete, .. } = &self.exports;
        if !is_connection {
            self.vm.call(done, id, id)?;
        }
        self.vm.call(delete, id, id)?;
        Ok(())
    }

    fn set_log_phase(&mut self, id: u32, now: bool) {
        if let Some(stream) = self.vm.store.data_mut().streams.get_mut(&id) {
            stream.log_phase = now;
        }
    }

    /// Takes what one side holds back, and leaves the guest out of it from now on: for a caller that
    /// fails open after a crash. Works on a lost VM.
    ///
    /// # Errors
    /// [`AbiError::UnknownStream`].
    pub fn salvage(&mut self, id: StreamId, direction: Direction) -> Result<Release, AbiError> {
        Ok(self.stream_mut(id)?.side_mut(direction).salvage())
    }

    /// Steps that no call returned, in the order they came about. To be asked for after every call
    /// that may run guest code.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    pub(super) fn stream_mut(&mut self, id: StreamId) -> Result<&mut Stream, AbiError> {
        let stream = self.vm.store.data_mut().streams.get_mut(&id.0);
        stream.ok_or(AbiError::UnknownStream { id: id.0 })
    }
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin")
            .field("root_id", &self.vm.store.data().root_id)
            .field("streams", &self.stream_count())
            .field("is_poisoned", &self.is_poisoned())
            .finish_non_exhaustive()
    }
}
