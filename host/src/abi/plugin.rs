//! One VM running one plugin: its start, its streams, its callbacks.
//!
//! A [`Plugin`] owns one wasmtime store and is driven by one thread at a time (it is `Send`, not
//! `Sync`). It does no I/O: the caller tells it what arrived and is told what to forward. A crash
//! loses this VM only; every later call returns [`AbiError::Poisoned`], and [`Plugin::salvage`] gives
//! back what was held, for a caller that fails open.
//!
//! Order of the last callbacks is Envoy's: `proxy_on_log`, `proxy_on_done`, `proxy_on_delete`.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmtime::{
    AsContextMut as _, Instance, Store, StoreLimitsBuilder, Trap, TypedFunc, WasmParams, WasmResults,
};

use super::clock::{Clock, Randomness};
use super::error::{AbiError, LastWords};
use super::headers::HeaderMap;
use super::host::{CallAnswer, Deferred, Host};
use super::log::{GuestLog, LogSink};
use super::module::{EPOCH_TICK, Module};
use super::property::{PropertyValue, path_bytes};
use super::shared::SharedState;
use super::status::{Direction, MapType, Status};
use super::stream::{
    BodyCall, Event, HeadersPause, LocalReply, Release, Resume, Settled, Side, Step, Stream,
};

/// A function that guests call by name through `proxy_call_foreign_function`.
pub type ForeignFunction = Arc<dyn Fn(&[u8]) -> Result<Vec<u8>, Status> + Send + Sync>;
/// Foreign functions by name.
pub type ForeignFunctions = HashMap<String, ForeignFunction>;

/// What a VM may use.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Linear memory, in bytes. Envoy's is 1 GiB.
    pub memory_bytes: usize,
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
    /// Http calls that may be outstanding at once.
    pub outstanding_http_calls: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: 1024 * 1024 * 1024,
            request_buffer_bytes: 1024 * 1024,
            response_buffer_bytes: 1024 * 1024,
            callback_deadline: Duration::from_secs(10),
            start_deadline: Duration::from_secs(60),
            outstanding_http_calls: 128,
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
    /// Upstreams that `proxy_http_call` may name; `None` allows any name.
    pub http_call_upstreams: Option<BTreeSet<String>>,
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
            foreign_functions: ForeignFunctions::new(),
            http_call_upstreams: None,
        }
    }
}

/// A stream context of one plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u32);

impl StreamId {
    /// The context id that the guest knows the stream by.
    #[must_use]
    pub fn context_id(self) -> u32 {
        self.0
    }
}

/// A request that the guest wants sent; answer it with [`Plugin::http_call_response`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpCall {
    /// Names the call in its answer.
    pub id: u32,
    /// The upstream (cluster) to send to.
    pub upstream: String,
    /// Headers with `:method`, `:path` and `:authority`.
    pub headers: HeaderMap,
    /// The body.
    pub body: Vec<u8>,
    /// The trailers.
    pub trailers: HeaderMap,
    /// How long the guest wants to wait, in milliseconds; 0 for as long as it takes.
    pub timeout_ms: u32,
}

/// An answer to an [`HttpCall`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HttpCallResponse {
    /// Headers, `:status` included.
    pub headers: HeaderMap,
    /// The body.
    pub body: Vec<u8>,
    /// The trailers.
    pub trailers: HeaderMap,
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
    store: Store<Host>,
    exports: Exports,
    headers_pause: HeadersPause,
    poisoned: Option<String>,
    next_context: u32,
    /// What the guest asked for beyond the callback that is being answered.
    later: VecDeque<Deferred>,
    events: Vec<Event>,
}

/// Root context, call id, number of headers, body bytes, number of trailers.
type CallCounts = (u32, u32, u32, u32, u32);

/// The guest's callbacks; a missing one counts as Continue, or as true.
#[derive(Default)]
struct Exports {
    memory: Option<wasmtime::Memory>,
    context_create: Option<TypedFunc<(u32, u32), ()>>,
    vm_start: Option<TypedFunc<(u32, u32), u32>>,
    configure: Option<TypedFunc<(u32, u32), u32>>,
    tick: Option<TypedFunc<u32, ()>>,
    queue_ready: Option<TypedFunc<(u32, u32), ()>>,
    http_call_response: Option<TypedFunc<CallCounts, ()>>,
    request: SideExports,
    response: SideExports,
    done: Option<TypedFunc<u32, u32>>,
    log: Option<TypedFunc<u32, ()>>,
    delete: Option<TypedFunc<u32, ()>>,
}

#[derive(Default)]
struct SideExports {
    headers: Option<TypedFunc<(u32, u32, u32), u32>>,
    body: Option<TypedFunc<(u32, u32, u32), u32>>,
    trailers: Option<TypedFunc<(u32, u32), u32>>,
}

impl Exports {
    fn side(&self, direction: Direction) -> &SideExports {
        match direction {
            Direction::Request => &self.request,
            Direction::Response => &self.response,
        }
    }
}

/// A guest function by name, or `None` when the guest has no such export.
fn export<P: WasmParams, R: WasmResults>(
    store: &mut Store<Host>,
    instance: &Instance,
    name: &str,
) -> Result<Option<TypedFunc<P, R>>, AbiError> {
    let Some(function) = instance.get_func(store.as_context_mut(), name) else {
        return Ok(None);
    };
    let typed = function.typed(store).map_err(|error| AbiError::WrongType {
        name: format!("the module's export {name}"),
        message: format!("{error:#}"),
    })?;
    Ok(Some(typed))
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
        let root = 1;
        let vm = options.shared.next_vm();
        let start_deadline = options.limits.start_deadline;
        let properties = options.properties.into_iter().map(|(path, value)| {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            (path_bytes(&path), value.into_bytes())
        });
        let host = Host {
            memory: None,
            allocate: None,
            store_limits: StoreLimitsBuilder::new()
                .memory_size(options.limits.memory_bytes)
                .instances(1)
                .memories(1)
                .table_elements(1_000_000)
                .build(),
            limits: options.limits,
            name: options.name,
            vm_id: options.vm_id,
            vm_configuration: options.vm_configuration,
            plugin_configuration: options.plugin_configuration,
            configuring: true,
            environment: options.environment,
            properties: properties.collect(),
            foreign: options.foreign_functions,
            upstreams: options.http_call_upstreams,
            clock: options.clock,
            started: Instant::now(),
            random: options.randomness.generator(),
            shared: options.shared,
            vm,
            log: GuestLog::new(options.log, &options.root_id),
            root_id: options.root_id,
            scratch: Vec::new(),
            root,
            streams: HashMap::new(),
            current: root,
            effective: 0,
            deferred: Vec::new(),
            tick_period_ms: None,
            root_done_pending: false,
            root_done: false,
            last_call: 0,
            outstanding: BTreeSet::new(),
            calls: Vec::new(),
            answer: None,
            call_status: (0, ""),
        };
        let mut store = Store::new(module.engine(), host);
        store.limiter(|host| &mut host.store_limits);
        store.set_epoch_deadline(ticks(start_deadline));
        let instance = match module.ready().instantiate(&mut store) {
            Ok(instance) => instance,
            Err(error) => {
                return Err(AbiError::Start {
                    message: format!("{error:#}"),
                    log: store.data_mut().log.take_last_words(),
                });
            }
        };
        let exports = find_exports(&mut store, &instance)?;
        let mut plugin = Self {
            store,
            exports,
            headers_pause: options.headers_pause,
            poisoned: None,
            next_context: root,
            later: VecDeque::new(),
            events: Vec::new(),
        };
        plugin.initialise(&instance, start_deadline)?;
        plugin.configure(root, start_deadline)?;
        Ok(plugin)
    }

    /// Runs the module's own initialisation: a reactor's `_initialize`, then `main` if there is one;
    /// else a command's `_start`.
    fn initialise(&mut self, instance: &Instance, deadline: Duration) -> Result<(), AbiError> {
        let store = &mut self.store;
        if let Some(initialize) = export::<(), ()>(store, instance, "_initialize")? {
            self.enter(&initialize, "_initialize", 0, deadline, ())?;
            let store = &mut self.store;
            if let Some(main) = export::<(u32, u32), u32>(store, instance, "main")? {
                self.enter(&main, "main", 0, deadline, (0, 0))?;
            }
        } else if let Some(start) = export::<(), ()>(store, instance, "_start")? {
            self.enter(&start, "_start", 0, deadline, ())?;
        }
        Ok(())
    }

    fn configure(&mut self, root: u32, deadline: Duration) -> Result<(), AbiError> {
        if let Some(create) = self.exports.context_create.clone() {
            self.enter(&create, "proxy_on_context_create", root, deadline, (root, 0))?;
        }
        let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        for (callback, function, bytes) in [
            ("proxy_on_vm_start", self.exports.vm_start.clone(), size(&self.store.data().vm_configuration)),
            (
                "proxy_on_configure",
                self.exports.configure.clone(),
                size(&self.store.data().plugin_configuration),
            ),
        ] {
            let Some(function) = function else { continue };
            if self.enter(&function, callback, root, deadline, (root, bytes))? == 0 {
                let log = self.store.data_mut().log.take_last_words();
                return Err(AbiError::ConfigurationRefused { callback, log });
            }
        }
        self.store.data_mut().configuring = false;
        self.drain();
        Ok(())
    }

    /// Calls into the guest. Any failure loses the VM.
    fn enter<P: WasmParams, R: WasmResults>(
        &mut self,
        function: &TypedFunc<P, R>,
        callback: &'static str,
        context: u32,
        deadline: Duration,
        params: P,
    ) -> Result<R, AbiError> {
        self.check()?;
        enter(&mut self.store, &mut self.poisoned, function, callback, context, deadline, params)
    }

    fn check(&self) -> Result<(), AbiError> {
        match &self.poisoned {
            None => Ok(()),
            Some(reason) => Err(AbiError::Poisoned { reason: reason.clone() }),
        }
    }

    /// Whether a crash lost this VM.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.is_some()
    }

    /// The linear memory's size now, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let memory = self.exports.memory;
        memory.map_or(0, |memory| memory.data_size(&self.store))
    }

    /// How many streams exist.
    #[must_use]
    pub fn stream_count(&self) -> usize {
        self.store.data().streams.len()
    }

    /// The state this VM shares.
    #[must_use]
    pub fn shared(&self) -> &SharedState {
        &self.store.data().shared
    }

    // Streams.

    /// Creates a stream context.
    ///
    /// # Errors
    /// The VM is lost, or is lost in `proxy_on_context_create`.
    pub fn stream(&mut self) -> Result<StreamId, AbiError> {
        self.check()?;
        let host = self.store.data_mut();
        loop {
            self.next_context = self.next_context.wrapping_add(1);
            let id = self.next_context;
            if id > host.root && !host.streams.contains_key(&id) {
                break;
            }
        }
        let id = self.next_context;
        let (request, response) = (host.limits.request_buffer_bytes, host.limits.response_buffer_bytes);
        host.streams.insert(id, Stream::new(request, response));
        let root = host.root;
        let deadline = host.limits.callback_deadline;
        if let Some(create) = &self.exports.context_create {
            let name = "proxy_on_context_create";
            let (store, poisoned) = (&mut self.store, &mut self.poisoned);
            enter(store, poisoned, create, name, id, deadline, (id, root))?;
        }
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

    /// Filter state that the guest wrote so far, by full key (`wasm.<path>`); `None` for a stream
    /// that does not exist.
    #[must_use]
    pub fn filter_state(&self, id: StreamId) -> Option<&BTreeMap<String, Vec<u8>>> {
        let stream = self.store.data().streams.get(&id.0)?;
        Some(&stream.filter_state)
    }

    /// A stream's header or trailer map as it stands: what a [`Release`] sends out.
    #[must_use]
    pub fn header_map(&self, id: StreamId, kind: MapType) -> Option<&HeaderMap> {
        let stream = self.store.data().streams.get(&id.0)?;
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
        let stream = self.store.data().streams.get(&id.0);
        stream.map_or(0, |stream| stream.side(direction).held_bytes())
    }

    /// The request's headers arrived.
    ///
    /// # Errors
    /// A lost VM, an unknown stream, or headers that came twice.
    pub fn request_headers(
        &mut self,
        id: StreamId,
        headers: HeaderMap,
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.headers(id, Direction::Request, headers, end_of_stream)
    }

    /// The response's headers arrived, `:status` included.
    ///
    /// # Errors
    /// As for [`Plugin::request_headers`].
    pub fn response_headers(
        &mut self,
        id: StreamId,
        headers: HeaderMap,
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.headers(id, Direction::Response, headers, end_of_stream)
    }

    /// A chunk of the request's body arrived. Not to be called for a request without a body; an
    /// empty last chunk is fine.
    ///
    /// # Errors
    /// A lost VM, an unknown stream, or a body before its headers or after its end.
    pub fn request_body(
        &mut self,
        id: StreamId,
        chunk: &[u8],
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.body(id, Direction::Request, chunk, end_of_stream)
    }

    /// A chunk of the response's body arrived.
    ///
    /// # Errors
    /// As for [`Plugin::request_body`].
    pub fn response_body(
        &mut self,
        id: StreamId,
        chunk: &[u8],
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.body(id, Direction::Response, chunk, end_of_stream)
    }

    /// The request's trailers arrived; they end it.
    ///
    /// # Errors
    /// A lost VM, an unknown stream, or trailers before headers or after the end.
    pub fn request_trailers(&mut self, id: StreamId, trailers: HeaderMap) -> Result<Step, AbiError> {
        self.trailers(id, Direction::Request, trailers)
    }

    /// The response's trailers arrived; they end it.
    ///
    /// # Errors
    /// As for [`Plugin::request_trailers`].
    pub fn response_trailers(&mut self, id: StreamId, trailers: HeaderMap) -> Result<Step, AbiError> {
        self.trailers(id, Direction::Response, trailers)
    }

    /// The exchange is over, in whatever way: runs `proxy_on_log`, `proxy_on_done` and
    /// `proxy_on_delete`, and forgets the stream. Works on a lost VM too, without the callbacks.
    ///
    /// # Errors
    /// [`AbiError::UnknownStream`] only; a crash in the last callbacks is in the result.
    pub fn done(&mut self, id: StreamId) -> Result<Ended, AbiError> {
        self.stream_mut(id)?.log_phase = true;
        let error = self.last_callbacks(id.0).err();
        let stream = self.store.data_mut().streams.remove(&id.0);
        self.drain();
        Ok(Ended {
            filter_state: stream.map(|stream| stream.filter_state).unwrap_or_default(),
            error: error.filter(|error| !matches!(error, AbiError::Poisoned { .. })),
        })
    }

    fn last_callbacks(&mut self, id: u32) -> Result<(), AbiError> {
        self.check()?;
        let deadline = self.store.data().limits.callback_deadline;
        let (store, poisoned) = (&mut self.store, &mut self.poisoned);
        if let Some(log) = &self.exports.log {
            enter(store, poisoned, log, "proxy_on_log", id, deadline, id)?;
        }
        if let Some(stream) = store.data_mut().streams.get_mut(&id) {
            stream.log_phase = false;
        }
        if let Some(done) = &self.exports.done {
            enter(store, poisoned, done, "proxy_on_done", id, deadline, id)?;
        }
        if let Some(delete) = &self.exports.delete {
            enter(store, poisoned, delete, "proxy_on_delete", id, deadline, id)?;
        }
        Ok(())
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

    // The root context.

    /// How often the guest wants [`Plugin::tick`], if it does.
    #[must_use]
    pub fn tick_period(&self) -> Option<Duration> {
        let period = self.store.data().tick_period_ms?;
        Some(Duration::from_millis(period.into()))
    }

    /// Runs `proxy_on_tick`.
    ///
    /// # Errors
    /// The VM is lost.
    pub fn tick(&mut self) -> Result<(), AbiError> {
        self.check()?;
        let (root, deadline) = self.root();
        if let Some(tick) = &self.exports.tick {
            let (store, poisoned) = (&mut self.store, &mut self.poisoned);
            enter(store, poisoned, tick, "proxy_on_tick", root, deadline, root)?;
        }
        self.drain();
        Ok(())
    }

    /// Tells the guest about shared queues that have new items; returns how many there were.
    ///
    /// # Errors
    /// The VM is lost.
    pub fn deliver_queues(&mut self) -> Result<usize, AbiError> {
        self.check()?;
        let (root, deadline) = self.root();
        let host = self.store.data();
        let ready = host.shared.take_ready(host.vm);
        let count = ready.len();
        if let Some(queue_ready) = &self.exports.queue_ready {
            let name = "proxy_on_queue_ready";
            for queue in ready {
                let (store, poisoned) = (&mut self.store, &mut self.poisoned);
                enter(store, poisoned, queue_ready, name, root, deadline, (root, queue))?;
            }
        }
        self.drain();
        Ok(count)
    }

    /// Http calls that the guest asked for since the last time.
    pub fn take_http_calls(&mut self) -> Vec<HttpCall> {
        std::mem::take(&mut self.store.data_mut().calls)
    }

    /// Answers an http call; `None` when it failed, which the guest sees as an answer without
    /// headers.
    ///
    /// # Errors
    /// The VM is lost, or the call is not outstanding.
    pub fn http_call_response(
        &mut self,
        call_id: u32,
        response: Option<HttpCallResponse>,
    ) -> Result<(), AbiError> {
        self.check()?;
        let (root, deadline) = self.root();
        let host = self.store.data_mut();
        if !host.outstanding.remove(&call_id) {
            return Err(AbiError::UnknownCall { id: call_id });
        }
        let mut counts = (0, 0, 0);
        match response {
            Some(response) => {
                counts = (
                    count(response.headers.len()),
                    count(response.body.len()),
                    count(response.trailers.len()),
                );
                host.answer = Some(CallAnswer {
                    headers: response.headers,
                    body: response.body,
                    trailers: response.trailers,
                });
            }
            None => host.call_status = (Status::BrokenConnection as u32, "reset"),
        }
        if let Some(answer) = &self.exports.http_call_response {
            let params = (root, call_id, counts.0, counts.1, counts.2);
            let name = "proxy_on_http_call_response";
            let (store, poisoned) = (&mut self.store, &mut self.poisoned);
            enter(store, poisoned, answer, name, root, deadline, params)?;
        }
        let host = self.store.data_mut();
        host.answer = None;
        host.call_status.1 = "";
        self.drain();
        Ok(())
    }

    /// Ends the plugin: `proxy_on_done` on the root context. True when the guest is finished and was
    /// deleted; false when it wants more time and will call `proxy_done` (tick it, then ask again).
    ///
    /// # Errors
    /// The VM is lost.
    pub fn shut_down(&mut self) -> Result<bool, AbiError> {
        self.check()?;
        let (root, deadline) = self.root();
        let (store, poisoned) = (&mut self.store, &mut self.poisoned);
        if store.data().root_done_pending {
            return Ok(false);
        }
        if !store.data().root_done
            && let Some(done) = &self.exports.done
            && enter(store, poisoned, done, "proxy_on_done", root, deadline, root)? == 0
        {
            store.data_mut().root_done_pending = true;
            return Ok(false);
        }
        if let Some(delete) = &self.exports.delete {
            enter(store, poisoned, delete, "proxy_on_delete", root, deadline, root)?;
        }
        Ok(true)
    }

    fn root(&self) -> (u32, Duration) {
        let host = self.store.data();
        (host.root, host.limits.callback_deadline)
    }

    // One side of a stream.

    fn stream_mut(&mut self, id: StreamId) -> Result<&mut Stream, AbiError> {
        let stream = self.store.data_mut().streams.get_mut(&id.0);
        stream.ok_or(AbiError::UnknownStream { id: id.0 })
    }

    fn side_mut(&mut self, id: StreamId, direction: Direction) -> Result<&mut Side, AbiError> {
        Ok(self.stream_mut(id)?.side_mut(direction))
    }

    fn headers(
        &mut self,
        id: StreamId,
        direction: Direction,
        headers: HeaderMap,
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.check()?;
        let side = self.side_mut(id, direction)?;
        if side.headers.is_some() {
            return Err(AbiError::OutOfOrder { part: "headers", rule: "each side has one set of headers" });
        }
        if side.over {
            return Ok(Step::Hold);
        }
        let number = count(headers.len());
        side.begin_headers(headers, end_of_stream);
        let action = self.call_headers(id.0, direction, number, end_of_stream)?;
        let pause = self.headers_pause;
        let step = self.settle(id, direction, |side| side.settle_headers(action, pause));
        self.drain();
        step
    }

    fn body(
        &mut self,
        id: StreamId,
        direction: Direction,
        chunk: &[u8],
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.check()?;
        let side = self.side_mut(id, direction)?;
        side.check_open("body")?;
        if side.over {
            return Ok(Step::Hold);
        }
        let step = match side.begin_body(chunk, end_of_stream) {
            BodyCall::Call(size) => {
                if side.overflowed {
                    // Envoy's reply stands before the callback that shows what was too much.
                    self.stream_mut(id)?.reply_status = Some(PAYLOAD_TOO_LARGE);
                }
                let action = self.call_body(id.0, direction, count(size), end_of_stream)?;
                self.settle(id, direction, |side| side.settle_body(action))
            }
            BodyCall::Settled(settled) => self.settle(id, direction, |_| settled),
        };
        self.drain();
        step
    }

    fn trailers(
        &mut self,
        id: StreamId,
        direction: Direction,
        trailers: HeaderMap,
    ) -> Result<Step, AbiError> {
        self.check()?;
        let side = self.side_mut(id, direction)?;
        side.check_open("trailers")?;
        if side.over {
            return Ok(Step::Hold);
        }
        let step = match side.begin_trailers(trailers) {
            Some(number) => {
                let action = self.call_trailers(id.0, direction, count(number))?;
                self.settle(id, direction, |side| side.settle_trailers(action))
            }
            None => Ok(Step::Hold),
        };
        self.drain();
        step
    }

    fn call_headers(
        &mut self,
        id: u32,
        direction: Direction,
        number: u32,
        end_of_stream: bool,
    ) -> Result<u32, AbiError> {
        let name = match direction {
            Direction::Request => "proxy_on_request_headers",
            Direction::Response => "proxy_on_response_headers",
        };
        let Some(function) = &self.exports.side(direction).headers else {
            return Ok(0);
        };
        let deadline = self.store.data().limits.callback_deadline;
        let params = (id, number, u32::from(end_of_stream));
        enter(&mut self.store, &mut self.poisoned, function, name, id, deadline, params)
    }

    fn call_body(
        &mut self,
        id: u32,
        direction: Direction,
        size: u32,
        end_of_stream: bool,
    ) -> Result<u32, AbiError> {
        let name = match direction {
            Direction::Request => "proxy_on_request_body",
            Direction::Response => "proxy_on_response_body",
        };
        let Some(function) = &self.exports.side(direction).body else {
            return Ok(0);
        };
        let deadline = self.store.data().limits.callback_deadline;
        let params = (id, size, u32::from(end_of_stream));
        enter(&mut self.store, &mut self.poisoned, function, name, id, deadline, params)
    }

    fn call_trailers(&mut self, id: u32, direction: Direction, number: u32) -> Result<u32, AbiError> {
        let name = match direction {
            Direction::Request => "proxy_on_request_trailers",
            Direction::Response => "proxy_on_response_trailers",
        };
        let Some(function) = &self.exports.side(direction).trailers else {
            return Ok(0);
        };
        let deadline = self.store.data().limits.callback_deadline;
        enter(&mut self.store, &mut self.poisoned, function, name, id, deadline, (id, number))
    }

    /// Turns a callback's outcome into a step. What the guest asked for about this very side is
    /// applied at once; the rest waits in `later`.
    fn settle(
        &mut self,
        id: StreamId,
        direction: Direction,
        outcome: impl FnOnce(&mut Side) -> Settled,
    ) -> Result<Step, AbiError> {
        let mut own = None;
        let mut continued = false;
        for deferred in std::mem::take(&mut self.store.data_mut().deferred) {
            match deferred {
                Deferred::Continue(stream, side) if stream == id.0 && side == direction => {
                    continued = true;
                }
                Deferred::Reply(..) | Deferred::Close(_) if deferred.stream() == id.0 => {
                    // The first one decides, as a stream can be ended once.
                    own.get_or_insert(deferred);
                }
                other => self.later.push_back(other),
            }
        }
        let stream = self.stream_mut(id)?;
        match own {
            Some(Deferred::Reply(_, reply)) => return Ok(end_with_reply(stream, reply)),
            Some(_) => return Ok(end_with_reset(stream)),
            None => {}
        }
        match outcome(stream.side_mut(direction)) {
            Settled::Forward(release) => Ok(Step::Forward(release)),
            Settled::OverLimit => Ok(end_over_limit(stream, direction)),
            // A stream continued from inside the callback that pauses it goes on.
            Settled::Hold if continued => Ok(self.resume(id, direction)?.unwrap_or(Step::Hold)),
            Settled::Hold => Ok(Step::Hold),
        }
    }

    /// Lets a stopped side go on; `None` when it was not stopped.
    fn resume(&mut self, id: StreamId, direction: Direction) -> Result<Option<Step>, AbiError> {
        let side = self.side_mut(id, direction)?;
        if side.over {
            return Ok(None);
        }
        let (mut all, body, trailers) = match side.resume() {
            None => return Ok(None),
            Some(Resume::Forward(release)) => return Ok(Some(Step::Forward(release))),
            Some(Resume::Replay { headers, body, trailers }) => (headers, body, trailers),
        };
        let mut steps = Vec::with_capacity(2);
        if let Some((size, end_of_stream)) = body {
            let action = self.call_body(id.0, direction, count(size), end_of_stream)?;
            steps.push(self.settle(id, direction, |side| side.settle_body(action))?);
        }
        if let Some(number) = trailers
            && !self.side_mut(id, direction)?.over
        {
            let action = self.call_trailers(id.0, direction, count(number))?;
            steps.push(self.settle(id, direction, |side| side.settle_trailers(action))?);
        }
        for step in steps {
            match step {
                Step::Forward(release) => all.append(release),
                Step::Hold => {}
                end => return Ok(Some(end)),
            }
        }
        Ok(Some(Step::Forward(all)))
    }

    /// Carries out what the guest asked for beyond the callback just answered. That may run the
    /// guest again, which may ask for more; a queue keeps the host's stack flat. A crash in here
    /// shows in the next call: the step already won is not lost with the VM.
    fn drain(&mut self) {
        loop {
            let more = std::mem::take(&mut self.store.data_mut().deferred);
            self.later.extend(more);
            let Some(deferred) = self.later.pop_front() else {
                return;
            };
            let stream = StreamId(deferred.stream());
            let Ok(target) = self.stream_mut(stream) else {
                continue;
            };
            let (direction, step) = match deferred {
                Deferred::Continue(_, direction) => match self.resume(stream, direction) {
                    Ok(Some(step)) => (direction, step),
                    Ok(None) => continue,
                    Err(_) => {
                        self.later.clear();
                        return;
                    }
                },
                _ if target.request.over && target.response.over => continue,
                Deferred::Reply(_, reply) => (Direction::Request, end_with_reply(target, reply)),
                Deferred::Close(_) => (Direction::Request, end_with_reset(target)),
            };
            self.events.push(Event { stream, direction, step });
        }
    }
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin")
            .field("root_id", &self.store.data().root_id)
            .field("streams", &self.stream_count())
            .field("poisoned", &self.poisoned)
            .finish_non_exhaustive()
    }
}

fn find_exports(store: &mut Store<Host>, instance: &Instance) -> Result<Exports, AbiError> {
    let memory = instance.get_memory(store.as_context_mut(), "memory");
    let mut allocate = export(store, instance, "proxy_on_memory_allocate")?;
    if allocate.is_none() {
        allocate = export(store, instance, "malloc")?;
    }
    let host = store.data_mut();
    host.memory = memory;
    host.allocate = allocate.map(Arc::new);
    Ok(Exports {
        memory,
        context_create: export(store, instance, "proxy_on_context_create")?,
        vm_start: export(store, instance, "proxy_on_vm_start")?,
        configure: export(store, instance, "proxy_on_configure")?,
        tick: export(store, instance, "proxy_on_tick")?,
        queue_ready: export(store, instance, "proxy_on_queue_ready")?,
        http_call_response: export(store, instance, "proxy_on_http_call_response")?,
        request: SideExports {
            headers: export(store, instance, "proxy_on_request_headers")?,
            body: export(store, instance, "proxy_on_request_body")?,
            trailers: export(store, instance, "proxy_on_request_trailers")?,
        },
        response: SideExports {
            headers: export(store, instance, "proxy_on_response_headers")?,
            body: export(store, instance, "proxy_on_response_body")?,
            trailers: export(store, instance, "proxy_on_response_trailers")?,
        },
        done: export(store, instance, "proxy_on_done")?,
        log: export(store, instance, "proxy_on_log")?,
        delete: export(store, instance, "proxy_on_delete")?,
    })
}

/// Calls into the guest; any failure loses the VM. Apart from the method, so that the function can be
/// borrowed from the plugin.
fn enter<P: WasmParams, R: WasmResults>(
    store: &mut Store<Host>,
    poisoned: &mut Option<String>,
    function: &TypedFunc<P, R>,
    callback: &'static str,
    context: u32,
    deadline: Duration,
    params: P,
) -> Result<R, AbiError> {
    let host = store.data_mut();
    host.current = context;
    host.effective = 0;
    store.set_epoch_deadline(ticks(deadline));
    function.call(&mut *store, params).map_err(|error| {
        let log = store.data_mut().log.take_last_words();
        let error = trap_error(&error, callback, deadline, log);
        *poisoned = Some(error.to_string());
        store.data_mut().deferred.clear();
        error
    })
}

fn trap_error(
    error: &wasmtime::Error,
    callback: &'static str,
    deadline: Duration,
    log: LastWords,
) -> AbiError {
    if matches!(error.downcast_ref::<Trap>(), Some(Trap::Interrupt)) {
        return AbiError::Deadline {
            callback,
            limit_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
            log,
        };
    }
    AbiError::Trap { callback, message: format!("{error:#}"), log }
}

/// A deadline in epochs; one more, since the present one is partly over.
fn ticks(deadline: Duration) -> u64 {
    let ticks = deadline.as_nanos() / EPOCH_TICK.as_nanos();
    u64::try_from(ticks).unwrap_or(u64::MAX / 2).saturating_add(1)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// HTTP status of a request over the buffer limit.
const PAYLOAD_TOO_LARGE: u32 = 413;

/// Ends the exchange with a local reply, as far as a response has not begun.
fn end_with_reply(stream: &mut Stream, mut reply: LocalReply) -> Step {
    if stream.response.headers.is_some() {
        if stream.response.headers_forwarded {
            return end_with_reset(stream);
        }
        reply.through_response_callbacks = false;
        stream.response.end_early();
    }
    stream.request.end_early();
    stream.reply_status = Some(reply.status);
    Step::Reply(reply)
}

fn end_with_reset(stream: &mut Stream) -> Step {
    stream.request.end_early();
    stream.response.end_early();
    Step::Close
}

fn end_over_limit(stream: &mut Stream, direction: Direction) -> Step {
    let reply = match direction {
        Direction::Request => {
            LocalReply::of_limit(PAYLOAD_TOO_LARGE, "request_payload_too_large", "Payload Too Large")
        }
        Direction::Response => {
            LocalReply::of_limit(500, "response_payload_too_large", "Internal Server Error")
        }
    };
    end_with_reply(stream, reply)
}
