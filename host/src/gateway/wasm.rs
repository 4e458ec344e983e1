//! Runs a proxy-wasm module as the gateway's filter, through [`crate::abi`].
//!
//! A fixed number of VMs, each behind a mutex; an exchange stays on the VM it was opened on, chosen
//! in turn. Each VM has a task that ticks it and, when the guest crashed, starts a new one off the
//! async threads, from a spare that is kept instantiated; until then exchanges go to the other VMs. A
//! VM that crashes soon after its start waits longer and longer for the next, or (fail_reload) as long
//! as Envoy would, so that a request that always crashes the filter cannot keep a processor busy with
//! starts. An exchange that comes while the only VM is being started waits for it.
//!
//! A guest calls other services by the names of the gateway's upstreams, through their connections;
//! a name that is none of them is BadArgument, as Envoy's unknown cluster is. Shared queues are
//! delivered from the VM's own task.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::callout::{CallOuts, Caller, Carrier, Open};
use super::error::GatewayError;
use super::filter::{
    ConnectionInfo, Direction, FilterError, FilterFactory, FilterState, HeaderPairs, HttpFilter, LocalReply,
    Release, RouteInfo, Step,
};
use super::metrics;
use super::options::FailurePolicy;
use super::plan::FilterPlan;
use crate::abi::{
    self, AbiError, CacheUse, CompileOptions, GrpcEvent, HISTOGRAM_BOUNDS, HeaderMap, HeadersPause,
    HttpCallResponse, Limits, LogLevel, LogLine, LogSink, MapType, MetricValue, Module, Plugin,
    PluginOptions, Pool, PropertyValue, SharedState, StreamId,
};

/// Longest wait of an exchange for a VM that is being started.
const START_PATIENCE: Duration = Duration::from_secs(1);
/// Spares of each filter.
const SPARES: usize = 1;
/// A VM that lived this long before it crashed is replaced at once.
const HEALTHY_LIFE: Duration = Duration::from_secs(10);
/// First and longest wait before a VM that crashed early is replaced.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

const LOST: &str = "another exchange's call crashed the VM";

/// What all VMs of a gateway have in common, through all its configurations.
#[derive(Default)]
pub(super) struct Process {
    pub(super) call_outs: CallOuts,
    /// Shared data and queues, by vm_id; metrics.
    shared: SharedState,
}

/// The VMs of one filter.
pub(super) struct WasmFilters {
    name: Arc<str>,
    vms: Vec<Arc<Vm>>,
    next: AtomicUsize,
    tenders: Vec<JoinHandle<()>>,
    maker: Arc<Maker>,
}

/// A place for a running plugin.
struct Vm {
    life: Mutex<Option<Arc<Life>>>,
    replacement: Mutex<Replacement>,
    /// The life changed its tick period, or ended.
    changed: Notify,
    /// A shared queue has items for the guest.
    queued: Notify,
}

/// When a lost VM's place is filled again.
struct Replacement {
    /// Envoy's back-off, counted from the last start; `None`: the gateway's own, which grows.
    reload_backoff: Option<Duration>,
    /// The gateway's own, for the next crash.
    wait: Duration,
    started: Instant,
    due: Instant,
}

impl Replacement {
    fn new(reload_backoff: Option<Duration>) -> Self {
        let now = Instant::now();
        Self { reload_backoff, wait: BACKOFF.0, started: now, due: now }
    }

    /// The VM was lost at `now`, or did not start.
    fn lost(&mut self, now: Instant) {
        self.due = match self.reload_backoff {
            Some(backoff) => now.max(self.started + backoff),
            None if now.saturating_duration_since(self.started) >= HEALTHY_LIFE => {
                self.wait = BACKOFF.0;
                now
            }
            None => {
                let wait = self.wait;
                self.wait = (wait * 2).min(BACKOFF.1);
                now + wait
            }
        };
    }
}

/// One plugin from its start to its crash.
struct Life {
    running: Mutex<Running>,
    vm: Weak<Vm>,
    me: Weak<Life>,
    limit_bytes: usize,
    process: Arc<Process>,
    open: Arc<Open>,
    runtime: Handle,
}

struct Running {
    plugin: Plugin,
    mailboxes: HashMap<StreamId, Arc<Mailbox>>,
    tick_period: Option<Duration>,
    lost: bool,
}

/// What reached an exchange from outside its own calls.
#[derive(Default)]
struct Mailbox(Mutex<Mail>);

#[derive(Default)]
struct Mail {
    /// By direction.
    steps: [Option<Release>; 2],
    /// A reply or a close, which end the exchange.
    end: Option<Step>,
    /// The VM crashed, with this message.
    crash: Option<String>,
    /// By direction, then the one who waits for the upstream.
    wakers: [Option<Waker>; 3],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic of the host in the middle of a call leaves a plugin that refuses or traps; both are
    // handled as a crash.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WasmFilters {
    /// Compiles a module, off the async threads.
    /// `cache`: a folder that may have what comes of it.
    pub(super) async fn compile(
        name: &Arc<str>,
        bytes: Arc<[u8]>,
        cache: Option<&Path>,
    ) -> Result<Module, GatewayError> {
        let options =
            CompileOptions { cache_directory: cache.map(Path::to_owned), ..CompileOptions::default() };
        let module = blocking(name, move || Module::compile_with(&bytes, &options)).await?;
        match module.cache_use() {
            CacheUse::Unusable { reason } | CacheUse::Replaced { reason } => {
                let filter = &**name;
                tracing::warn!(target: "driftlock::gateway", filter, reason, "compiled anew: the module cache did not serve");
            }
            _ => {}
        }
        Ok(module)
    }

    /// Starts a filter's VMs. Inside a tokio runtime.
    pub(super) async fn start(
        plan: &FilterPlan,
        module: Module,
        upstreams: &[Arc<str>],
        process: &Arc<Process>,
    ) -> Result<Self, GatewayError> {
        let options = plugin_options(plan, upstreams, process.shared.clone());
        let maker = Arc::new(Maker {
            name: Arc::clone(&plan.name),
            limit_bytes: options.limits.request_buffer_bytes,
            pool: Pool::new(module, options, SPARES),
            reload_backoff: (plan.failure_policy == FailurePolicy::FailReload).then_some(plan.reload_backoff),
            started: Notify::new(),
            process: Arc::clone(process),
        });
        // The first start is the canary: if it fails, one message is enough.
        let mut vms = vec![maker.start_vm().await?];
        let mut starting = tokio::task::JoinSet::new();
        for _ in 1..plan.vms {
            let maker = Arc::clone(&maker);
            starting.spawn(async move { maker.start_vm().await });
        }
        while let Some(vm) = starting.join_next().await {
            vms.push(vm.map_err(|error| not_started(&plan.name, &error))??);
        }
        let tenders =
            vms.iter().map(|vm| tokio::spawn(tend(Arc::downgrade(vm), Arc::clone(&maker)))).collect();
        maker.fill_pool();
        Ok(Self { name: Arc::clone(&plan.name), vms, next: AtomicUsize::new(0), tenders, maker })
    }
}

impl Drop for WasmFilters {
    fn drop(&mut self) {
        for tender in &self.tenders {
            tender.abort();
        }
        // A filter that is no longer configured gets its last callbacks.
        for life in self.vms.iter().filter_map(|vm| vm.life()) {
            if let Err(error) = life.call(Plugin::shut_down) {
                let filter = &*self.name;
                tracing::warn!(target: "driftlock::gateway", filter, %error, "the filter crashed at its end");
            }
        }
    }
}

fn plugin_options(plan: &FilterPlan, upstreams: &[Arc<str>], shared: SharedState) -> PluginOptions {
    PluginOptions {
        name: plan.name.as_ref().to_owned(),
        root_id: plan.root_id.clone(),
        plugin_configuration: plan.plugin_configuration.clone(),
        vm_id: plan.vm.id.clone(),
        vm_configuration: plan.vm.configuration.clone(),
        environment: plan.vm.environment.clone(),
        limits: Limits {
            request_buffer_bytes: plan.max_buffer_bytes,
            response_buffer_bytes: plan.max_buffer_bytes,
            ..Limits::default()
        },
        headers_pause: if plan.allow_on_headers_stop_iteration {
            HeadersPause::StopIteration
        } else {
            HeadersPause::StopAllIterationAndWatermark
        },
        shared,
        log: LogSink::new(guest_log_level(), write_guest_log),
        callout_upstreams: Some(upstreams.iter().map(|name| name.as_ref().to_owned()).collect()),
        ..PluginOptions::default()
    }
}

/// What the guest is told to log is what tracing would show.
fn guest_log_level() -> LogLevel {
    use tracing::level_filters::LevelFilter;
    match LevelFilter::current() {
        LevelFilter::TRACE => LogLevel::Trace,
        LevelFilter::DEBUG => LogLevel::Debug,
        LevelFilter::INFO => LogLevel::Info,
        LevelFilter::WARN => LogLevel::Warn,
        LevelFilter::ERROR => LogLevel::Error,
        _ => LogLevel::Critical,
    }
}

fn write_guest_log(line: LogLine) {
    let LogLine { level, root_id, context_id, message } = line;
    match level {
        LogLevel::Trace => tracing::trace!(target: "driftlock::filter", root_id, context_id, "{message}"),
        LogLevel::Debug => tracing::debug!(target: "driftlock::filter", root_id, context_id, "{message}"),
        LogLevel::Info => tracing::info!(target: "driftlock::filter", root_id, context_id, "{message}"),
        LogLevel::Warn => tracing::warn!(target: "driftlock::filter", root_id, context_id, "{message}"),
        LogLevel::Error | LogLevel::Critical => {
            tracing::error!(target: "driftlock::filter", root_id, context_id, "{message}");
        }
    }
}

/// Compilation and starts take from milliseconds to seconds.
async fn blocking<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T, AbiError> + Send + 'static,
) -> Result<T, GatewayError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|error| not_started(name, &error))?;
    done.map_err(|error| not_started(name, &error))
}

fn not_started(name: &str, error: &impl std::fmt::Display) -> GatewayError {
    GatewayError::Filter { name: name.to_owned(), reason: error.to_string() }
}

/// What it takes to start another VM of the same filter.
struct Maker {
    name: Arc<str>,
    pool: Pool,
    limit_bytes: usize,
    reload_backoff: Option<Duration>,
    /// A VM has started.
    started: Notify,
    process: Arc<Process>,
}

impl Maker {
    async fn start_vm(self: &Arc<Self>) -> Result<Arc<Vm>, GatewayError> {
        let vm = Arc::new(Vm {
            life: Mutex::new(None),
            replacement: Mutex::new(Replacement::new(self.reload_backoff)),
            changed: Notify::new(),
            queued: Notify::new(),
        });
        self.revive(&vm).await?;
        Ok(vm)
    }

    /// Prepares spares, beside whatever else goes on.
    fn fill_pool(self: &Arc<Self>) {
        let maker = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = maker.pool.fill() {
                let filter = &*maker.name;
                tracing::warn!(target: "driftlock::gateway", filter, %error, "no spare VM");
            }
        });
    }

    async fn revive(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), GatewayError> {
        lock(&vm.replacement).started = Instant::now();
        let maker = Arc::clone(self);
        let mut plugin = blocking(&self.name, move || maker.pool.start()).await?;
        let place = Arc::downgrade(vm);
        plugin.on_queue_items(move || {
            if let Some(vm) = place.upgrade() {
                vm.queued.notify_one();
            }
        });
        let running =
            Running { tick_period: plugin.tick_period(), plugin, mailboxes: HashMap::new(), lost: false };
        let life = Arc::new_cyclic(|me| Life {
            running: Mutex::new(running),
            vm: Arc::downgrade(vm),
            me: Weak::clone(me),
            limit_bytes: self.limit_bytes,
            process: Arc::clone(&self.process),
            open: Arc::default(),
            runtime: Handle::current(),
        });
        // Calls that the guest made while it was configured.
        life.after_call(&mut lock(&life.running));
        *lock(&vm.life) = Some(life);
        self.started.notify_waiters();
        Ok(())
    }
}

impl Vm {
    fn life(&self) -> Option<Arc<Life>> {
        lock(&self.life).clone()
    }
}

/// Ticks a VM and replaces its plugin after a crash, until the gateway is gone.
async fn tend(vm: Weak<Vm>, maker: Arc<Maker>) {
    loop {
        let Some(vm) = vm.upgrade() else { return };
        let Some(life) = vm.life() else {
            let due = lock(&vm.replacement).due;
            tokio::time::sleep_until(due.into()).await;
            match maker.revive(&vm).await {
                Ok(()) => maker.fill_pool(),
                Err(error) => {
                    tracing::error!(target: "driftlock::gateway", %error, "the filter's VM did not start again");
                    lock(&vm.replacement).lost(Instant::now());
                }
            }
            continue;
        };
        let period = lock(&life.running).tick_period;
        let ticked = async {
            match period {
                Some(period) => tokio::time::sleep(period).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = vm.changed.notified() => {}
            () = ticked => {
                if let Err(error) = life.call(Plugin::tick) {
                    tracing::error!(target: "driftlock::gateway", %error, "the filter crashed in a tick");
                }
            }
            () = vm.queued.notified() => {
                // Other exchanges get their turn in between.
                match life.call(Plugin::deliver_queues) {
                    Ok(0) => {}
                    Ok(_) => vm.queued.notify_one(),
                    Err(error) => {
                        tracing::error!(target: "driftlock::gateway", %error, "the filter crashed over a queue");
                    }
                }
            }
        }
    }
}

impl Life {
    /// Calls the plugin and sees to everything the call brought about besides its result.
    fn call<T>(&self, work: impl FnOnce(&mut Plugin) -> Result<T, AbiError>) -> Result<T, AbiError> {
        let mut running = lock(&self.running);
        let result = work(&mut running.plugin);
        self.after_call(&mut running);
        result
    }

    fn after_call(&self, running: &mut Running) {
        running.plugin.send_callouts(&mut Carrier {
            runtime: &self.runtime,
            process: &self.process,
            open: &self.open,
            caller: Answers(Weak::clone(&self.me)),
        });
        for event in running.plugin.take_events() {
            if let Some(mailbox) = running.mailboxes.get(&event.stream) {
                let step =
                    self.translate(&running.plugin, event.stream, direction_of(event.direction), event.step);
                mailbox.deliver(direction_of(event.direction), step);
            }
        }
        let period = running.plugin.tick_period();
        let crashed = running.plugin.is_poisoned() && !running.lost;
        if crashed {
            running.lost = true;
            for mailbox in running.mailboxes.values() {
                mailbox.crash(LOST);
            }
        }
        if crashed || period != running.tick_period {
            running.tick_period = period;
            if let Some(vm) = self.vm.upgrade() {
                if crashed {
                    lock(&vm.replacement).lost(Instant::now());
                    lock(&vm.life).take();
                }
                vm.changed.notify_one();
            }
        }
    }

    /// The gateway's form of a step; reads the header maps that go out, so the plugin must not have
    /// run since.
    fn translate(&self, plugin: &Plugin, id: StreamId, direction: Direction, step: abi::Step) -> Step {
        match step {
            abi::Step::Forward(release) => Step::Forward(release_of(plugin, id, direction, release)),
            abi::Step::Hold => {
                Step::Hold { read_on: plugin.held_bytes(id, abi_direction(direction)) <= self.limit_bytes }
            }
            abi::Step::Reply(reply) => Step::Reply(LocalReply {
                status: u16::try_from(reply.status).unwrap_or(500),
                headers: pairs_of(&reply.response_headers()),
                details: reply.details,
                through_filter: reply.through_response_callbacks,
                body: Bytes::from(reply.body),
            }),
            abi::Step::Close => Step::Close,
        }
    }
}

/// A VM as the one who hears of answers.
#[derive(Clone)]
struct Answers(Weak<Life>);

impl Answers {
    fn give(&self, work: impl FnOnce(&mut Plugin) -> Result<(), AbiError>) {
        let Some(life) = self.0.upgrade() else { return };
        match life.call(work) {
            // It was cancelled, or the VM was lost, while the answer was under way.
            Ok(()) | Err(AbiError::UnknownCall { .. } | AbiError::Poisoned { .. }) => {}
            Err(error) => {
                tracing::error!(target: "driftlock::gateway", %error, "the filter crashed in a call's answer");
            }
        }
    }
}

impl Caller for Answers {
    fn http_answer(&self, id: u32, answer: Option<HttpCallResponse>) {
        self.give(|plugin| plugin.http_call_response(id, answer));
    }

    fn grpc_event(&self, id: u32, event: GrpcEvent) {
        self.give(|plugin| plugin.grpc_event(id, event));
    }
}

fn release_of(plugin: &Plugin, id: StreamId, direction: Direction, release: abi::Release) -> Release {
    let (headers, trailers) = match direction {
        Direction::Request => (MapType::RequestHeaders, MapType::RequestTrailers),
        Direction::Response => (MapType::ResponseHeaders, MapType::ResponseTrailers),
    };
    let map =
        |wanted: bool, kind| wanted.then(|| plugin.header_map(id, kind).map(pairs_of).unwrap_or_default());
    Release {
        headers: map(release.headers, headers),
        body: Bytes::from(release.body),
        trailers: map(release.trailers, trailers),
        end: release.end_of_stream,
    }
}

pub(super) fn pairs_of(map: &HeaderMap) -> HeaderPairs {
    map.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
}

fn abi_direction(direction: Direction) -> abi::Direction {
    match direction {
        Direction::Request => abi::Direction::Request,
        Direction::Response => abi::Direction::Response,
    }
}

fn direction_of(direction: abi::Direction) -> Direction {
    match direction {
        abi::Direction::Request => Direction::Request,
        abi::Direction::Response => Direction::Response,
    }
}

impl Mailbox {
    fn deliver(&self, direction: Direction, step: Step) {
        let mut mail = lock(&self.0);
        match step {
            Step::Forward(release) => mail.steps[direction as usize].get_or_insert_default().append(release),
            Step::Hold { .. } => {}
            end => {
                mail.end.get_or_insert(end);
            }
        }
        mail.wake();
    }

    fn crash(&self, message: &str) {
        let mut mail = lock(&self.0);
        mail.crash = Some(message.to_owned());
        mail.wake();
    }
}

impl Mail {
    fn wake(&mut self) {
        for waker in self.wakers.iter_mut().filter_map(Option::take) {
            waker.wake();
        }
    }

    fn wait(&mut self, who: usize, cx: &Context<'_>) -> Poll<Result<Step, FilterError>> {
        if let Some(end) = self.end.take() {
            return Poll::Ready(Ok(end));
        }
        if let Some(message) = self.crash.take() {
            return Poll::Ready(Err(FilterError::Crashed(message)));
        }
        match &mut self.wakers[who] {
            Some(waker) => waker.clone_from(cx.waker()),
            slot => *slot = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

/// What the filter is told of.
enum Piece {
    Headers(HeaderPairs, bool),
    Body(Bytes, bool),
    Trailers(HeaderPairs),
}

impl From<Piece> for Release {
    fn from(piece: Piece) -> Self {
        match piece {
            Piece::Headers(headers, end) => Self { headers: Some(headers), end, ..Self::default() },
            Piece::Body(body, end) => Self { body, end, ..Self::default() },
            Piece::Trailers(trailers) => Self { trailers: Some(trailers), end: true, ..Self::default() },
        }
    }
}

pub(super) fn map_of(pairs: HeaderPairs) -> HeaderMap {
    pairs.into_iter().collect()
}

/// One exchange on one VM.
struct WasmFilter {
    life: Arc<Life>,
    stream: StreamId,
    mailbox: Arc<Mailbox>,
    /// By direction: what came for a VM that was lost already.
    late: [Release; 2],
}

impl WasmFilter {
    /// Reports a piece of the exchange. What others brought about for this direction comes first.
    fn report(&mut self, direction: Direction, piece: Piece) -> Result<Step, FilterError> {
        let (id, life) = (self.stream, &self.life);
        let mut running = lock(&life.running);
        if running.plugin.is_poisoned() {
            self.late[direction as usize].append(piece.into());
            return Err(FilterError::Crashed(LOST.to_owned()));
        }
        let plugin = &mut running.plugin;
        let result = match (piece, direction) {
            (Piece::Headers(pairs, end), Direction::Request) => {
                plugin.request_headers(id, map_of(pairs), end)
            }
            (Piece::Headers(pairs, end), Direction::Response) => {
                plugin.response_headers(id, map_of(pairs), end)
            }
            (Piece::Body(chunk, end), Direction::Request) => plugin.request_body(id, &chunk, end),
            (Piece::Body(chunk, end), Direction::Response) => plugin.response_body(id, &chunk, end),
            (Piece::Trailers(pairs), Direction::Request) => plugin.request_trailers(id, map_of(pairs)),
            (Piece::Trailers(pairs), Direction::Response) => plugin.response_trailers(id, map_of(pairs)),
        };
        let result = match result {
            Ok(step) => Ok(life.translate(plugin, id, direction, step)),
            Err(error) => Err(FilterError::Crashed(error.to_string())),
        };
        // Taken only after a success: after a crash `take_held` looks for it.
        let earlier =
            if result.is_ok() { lock(&self.mailbox.0).steps[direction as usize].take() } else { None };
        life.after_call(&mut running);
        drop(running);
        Ok(match (earlier, result?) {
            (None, step) => step,
            (Some(mut earlier), Step::Forward(release)) => {
                earlier.append(release);
                Step::Forward(earlier)
            }
            (Some(earlier), Step::Hold { .. }) => Step::Forward(earlier),
            (Some(_), end) => end,
        })
    }
}

impl HttpFilter for WasmFilter {
    fn headers(
        &mut self,
        direction: Direction,
        headers: HeaderPairs,
        end: bool,
    ) -> Result<Step, FilterError> {
        self.report(direction, Piece::Headers(headers, end))
    }

    fn body(&mut self, direction: Direction, chunk: Bytes, end: bool) -> Result<Step, FilterError> {
        self.report(direction, Piece::Body(chunk, end))
    }

    fn trailers(&mut self, direction: Direction, trailers: HeaderPairs) -> Result<Step, FilterError> {
        self.report(direction, Piece::Trailers(trailers))
    }

    fn poll_resumed(
        &mut self,
        direction: Direction,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Step, FilterError>> {
        let mut mail = lock(&self.mailbox.0);
        match mail.steps[direction as usize].take() {
            Some(release) => Poll::Ready(Ok(Step::Forward(release))),
            None => mail.wait(direction as usize, cx),
        }
    }

    fn poll_interrupted(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step, FilterError>> {
        lock(&self.mailbox.0).wait(2, cx)
    }

    fn take_held(&mut self, direction: Direction) -> Release {
        let mut running = lock(&self.life.running);
        let mut held = lock(&self.mailbox.0).steps[direction as usize].take().unwrap_or_default();
        if let Ok(release) = running.plugin.salvage(self.stream, abi_direction(direction)) {
            held.append(release_of(&running.plugin, self.stream, direction, release));
        }
        held.append(std::mem::take(&mut self.late[direction as usize]));
        held
    }

    fn finish(self: Box<Self>) -> FilterState {
        let mut running = lock(&self.life.running);
        let ended = running.plugin.done(self.stream);
        running.mailboxes.remove(&self.stream);
        self.life.after_call(&mut running);
        drop(running);
        let ended = ended.unwrap_or_default();
        if let Some(error) = ended.error {
            tracing::error!(target: "driftlock::gateway", %error, "the filter crashed at the end of an exchange");
        }
        ended.filter_state
    }
}

impl FilterFactory for WasmFilters {
    fn open(
        &self,
        connection: &ConnectionInfo,
        route: &RouteInfo,
    ) -> Result<Box<dyn HttpFilter>, FilterError> {
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let mut last_error = None;
        for offset in 0..self.vms.len() {
            let vm = self.vms.get(first.wrapping_add(offset) % self.vms.len());
            let Some(life) = vm.and_then(|vm| vm.life()) else { continue };
            match open_on(&life, connection, route) {
                Ok(filter) => return Ok(Box::new(filter)),
                Err(error) => last_error = Some(error),
            }
        }
        Err(FilterError::Unavailable(
            last_error.map_or_else(
                || "all have crashed and are being replaced".to_owned(),
                |error| error.to_string(),
            ),
        ))
    }

    fn soon(&self) -> Option<Pin<Box<dyn Future<Output = ()> + Send + '_>>> {
        let now = Instant::now();
        self.vms.iter().find(|vm| lock(&vm.replacement).due <= now)?;
        Some(Box::pin(async {
            let started = self.maker.started.notified();
            // It may have come in between.
            if !self.ready() {
                let _ = tokio::time::timeout(START_PATIENCE, started).await;
            }
        }))
    }

    fn ready(&self) -> bool {
        self.vms.iter().any(|vm| vm.life().is_some())
    }

    fn vms_ready(&self) -> u64 {
        self.vms.iter().filter(|vm| vm.life().is_some()).count() as u64
    }
}

/// What a guest can ask about an exchange beside its messages.
struct Told {
    connection: ConnectionInfo,
    route: RouteInfo,
    begun: SystemTime,
}

impl Told {
    /// By Envoy's names.
    fn property(&self, path: &[u8]) -> Option<PropertyValue> {
        let Self { connection, route, begun } = self;
        Some(match path {
            b"source\0address" => connection.peer.to_string().as_str().into(),
            b"source\0port" => i64::from(connection.peer.port()).into(),
            b"destination\0address" => connection.local.to_string().as_str().into(),
            b"destination\0port" => i64::from(connection.local.port()).into(),
            b"connection\0id" => PropertyValue::Uint(connection.id),
            b"request\0protocol" => connection.protocol.into(),
            b"request\0time" => {
                let since = begun.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
                PropertyValue::TimestampNs(i64::try_from(since).unwrap_or(i64::MAX))
            }
            // 1 is INBOUND in Envoy's TrafficDirection.
            b"listener_direction" | b"xds\0listener_direction" => 1.into(),
            b"connection\0mtls" => connection.mtls.into(),
            b"xds\0route_name" => (&*route.name).into(),
            b"xds\0cluster_name" => (&*route.upstream).into(),
            _ => return None,
        })
    }
}

fn open_on(life: &Arc<Life>, connection: &ConnectionInfo, route: &RouteInfo) -> Result<WasmFilter, AbiError> {
    let mut running = lock(&life.running);
    let opened = running.plugin.stream();
    if let Ok(stream) = opened {
        let told = Told { connection: *connection, route: route.clone(), begun: SystemTime::now() };
        running.plugin.properties_from(stream, move |path| told.property(path))?;
        let mailbox = Arc::new(Mailbox::default());
        running.mailboxes.insert(stream, Arc::clone(&mailbox));
        life.after_call(&mut running);
        return Ok(WasmFilter { life: Arc::clone(life), stream, mailbox, late: Default::default() });
    }
    life.after_call(&mut running);
    Err(opened.err().unwrap_or(AbiError::Poisoned { reason: "no stream".to_owned() }))
}

impl Process {
    /// Appends the guests' metrics. A name that two kinds share keeps its first; Prometheus allows one.
    pub(super) fn write_metrics(&self, out: &mut String) {
        let mut taken = BTreeSet::new();
        for sample in self.shared.metrics().snapshot() {
            let name = metrics::sanitised_name(&sample.name);
            if !taken.insert(name.clone()) {
                continue;
            }
            match sample.value {
                MetricValue::Counter(value) => {
                    metrics::header(out, &name, "counter", "Counted by a filter.");
                    metrics::sample(out, &name, value);
                }
                MetricValue::Gauge(value) => {
                    metrics::header(out, &name, "gauge", "Set by a filter.");
                    metrics::sample(out, &name, value);
                }
                MetricValue::Histogram { count, sum, buckets } => {
                    metrics::header(out, &name, "histogram", "Recorded by a filter.");
                    let mut total = 0;
                    for (bound, bucket) in HISTOGRAM_BOUNDS.iter().zip(buckets) {
                        total += bucket;
                        metrics::sample(out, &format!("{name}_bucket{{le=\"{bound}\"}}"), total);
                    }
                    metrics::sample(out, &format!("{name}_bucket{{le=\"+Inf\"}}"), count);
                    metrics::sample(out, &format!("{name}_sum"), sum);
                    metrics::sample(out, &format!("{name}_count"), count);
                }
            }
        }
    }
}
