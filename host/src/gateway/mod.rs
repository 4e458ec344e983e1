//! `driftlock gateway`: a reverse proxy that runs proxy-wasm filters in front of upstreams.
//!
//! It exists so that Driftlock can stand inline without an Envoy, and so that the demo, replays and
//! tests can run the real .wasm in-process. HTTP/1.1 and HTTP/2 on both sides, with TLS or without;
//! bodies stream both ways with back-pressure, and a message is collected only as far as a filter
//! itself holds it. Configuration, modules and certificates are replaced while it runs, without a
//! request lost.
//!
//! ```text
//!   config/         the YAML file, checked   ─┐
//!   options.rs      the command line         ─┴─> plan.rs ──> generation.rs   routes, upstreams, filters
//!   listener.rs     connections of clients
//!   serve.rs        request -> filters -> upstream -> filters -> response
//!   lane.rs         one direction's bytes through the filters
//!   exchange.rs     what the two directions share;  chain.rs  the filters in their order
//!   upstream.rs     connections to upstreams;  tunnel.rs  what leaves HTTP;  wire.rs, tls.rs  bytes
//!   filter.rs       the trait;  wasm.rs  implements it with host::abi;  callout.rs  filters' own calls
//! ```
//!
//! Left out on purpose: retries of answers and time-outs (an LLM call is not idempotent), load balancing, HTTP/3, caching.

mod access_log;
mod admin;
mod callout;
mod chain;
mod config;
mod error;
mod exchange;
pub mod filter;
mod generation;
mod headers;
mod lane;
mod listener;
mod metrics;
mod options;
mod plan;
mod reload;
mod serve;
mod tls;
mod tunnel;
mod upstream;
mod wasm;
mod wire;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub use access_log::{AccessLogTarget, AccessRecord};
pub use config::Config;
pub(crate) use config::yaml_problem;
pub use error::GatewayError;
pub use options::{Args, FailurePolicy, FilterSource, GatewayOptions};

use access_log::AccessLog;
use generation::Generation;
use listener::Listener;
use metrics::Counters;
use plan::Plan;
use wasm::Process;

/// What every connection of a gateway uses.
pub(crate) struct Shared {
    process: Arc<Process>,
    generation: RwLock<Arc<Generation>>,
    counters: Counters,
    access_log: AccessLog,
    draining: AtomicBool,
    /// Set when tunnels have to end.
    cut: watch::Sender<bool>,
}

impl Shared {
    fn generation(&self) -> Arc<Generation> {
        Arc::clone(&self.generation.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A running gateway. Dropping it stops it at once; [`Gateway::shutdown`] lets exchanges end first.
pub struct Gateway {
    /// Where clients connect, with the port that was really taken; the first, if there are several.
    pub addr: SocketAddr,
    /// Where the admin endpoints are, if they were asked for.
    pub admin_addr: Option<SocketAddr>,
    shared: Arc<Shared>,
    listeners: Vec<Listener>,
    /// Listeners that a reload took away, while their connections end.
    retired: Vec<Listener>,
    admin: Option<JoinHandle<()>>,
    /// What a reload cannot change.
    fixed: (Option<SocketAddr>, usize),
    drain_timeout: Duration,
}

impl Gateway {
    /// Starts listening. Has to run inside a tokio runtime with time and I/O enabled.
    ///
    /// # Errors
    /// [`GatewayError`] for an unusable option, an address in use, a filter that does not start.
    pub async fn start(options: GatewayOptions) -> Result<Self, GatewayError> {
        Self::launch(options.plan()?).await
    }

    /// Starts a gateway by its configuration file.
    ///
    /// # Errors
    /// As [`Gateway::start`]; what is wrong with the file names its line and field.
    pub async fn start_file(path: &Path) -> Result<Self, GatewayError> {
        Self::launch(Config::load(path)?).await
    }

    async fn launch(mut plan: Plan) -> Result<Self, GatewayError> {
        let mut sockets = Vec::new();
        for listener in &plan.listeners {
            sockets.push(listener::bind(listener.address, "traffic").await?);
        }
        let Some(addr) = sockets.first().map(|(_, local)| *local) else {
            let hint = "give at least one";
            return Err(GatewayError::Setting { setting: "listeners", value: "empty".to_owned(), hint });
        };
        let admin = match plan.admin {
            Some(address) => Some(listener::bind(address, "admin").await?),
            None => None,
        };
        let target = std::mem::take(&mut plan.access_log);
        let (listeners, drain_timeout) = (std::mem::take(&mut plan.listeners), plan.drain_timeout);
        let fixed = (plan.admin, plan.workers);
        let process: Arc<Process> = Arc::default();
        let generation = Arc::new(Generation::build(plan, None, &process).await?);
        process.call_outs.set(&generation.upstreams);
        let limits = generation.limits.clone();
        let shared = Arc::new(Shared {
            process,
            generation: RwLock::new(generation),
            counters: Counters::default(),
            access_log: AccessLog::open(target)?,
            draining: AtomicBool::new(false),
            cut: watch::Sender::new(false),
        });
        let listeners = sockets
            .into_iter()
            .zip(&listeners)
            .map(|(socket, plan)| Listener::start(socket, plan, &limits, &shared))
            .collect();
        let admin_addr = admin.as_ref().map(|(_, address)| *address);
        let admin = admin.map(|(listener, _)| tokio::spawn(admin::serve(listener, Arc::clone(&shared))));
        Ok(Self { addr, admin_addr, shared, listeners, retired: Vec::new(), admin, fixed, drain_timeout })
    }

    /// Where clients connect, one address a listener.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().map(|listener| listener.local).collect()
    }

    /// Goes over to a configuration file without dropping a request: exchanges under way end by the
    /// configuration they began with. What did not change (connections, VMs) is kept.
    ///
    /// # Errors
    /// [`GatewayError`] when the file is unusable, or changes the admin address or the number of workers;
    /// the old configuration then stays in use as it was.
    pub async fn reload_file(&mut self, path: &Path) -> Result<(), GatewayError> {
        self.reload(Config::load(path)?).await
    }

    async fn reload(&mut self, plan: Plan) -> Result<(), GatewayError> {
        let reloaded = self.try_reload(plan).await;
        let counters = &self.shared.counters;
        if reloaded.is_ok() { &counters.reloads } else { &counters.reload_failures }.increment();
        reloaded
    }

    async fn try_reload(&mut self, mut plan: Plan) -> Result<(), GatewayError> {
        if plan.admin != self.fixed.0 {
            return Err(GatewayError::NeedsRestart { setting: "admin" });
        }
        if plan.workers != self.fixed.1 {
            return Err(GatewayError::NeedsRestart { setting: "workers" });
        }
        let planned = std::mem::take(&mut plan.listeners);
        let mut sockets = Vec::new();
        for listener in &planned {
            if !self.listeners.iter().any(|known| known.configured == listener.address) {
                sockets.push((listener::bind(listener.address, "traffic").await?, listener));
            }
        }
        let target = std::mem::take(&mut plan.access_log);
        let drain_timeout = plan.drain_timeout;
        let old = self.shared.generation();
        let next = Arc::new(Generation::build(plan, Some(&*old), &self.shared.process).await?);
        self.shared.access_log.reopen(&target)?;

        // From here on nothing can fail.
        self.shared.process.call_outs.set(&next.upstreams);
        let limits = next.limits.clone();
        *self.shared.generation.write().unwrap_or_else(PoisonError::into_inner) = next;
        self.drain_timeout = drain_timeout;
        for listener in std::mem::take(&mut self.listeners) {
            match planned.iter().find(|plan| plan.address == listener.configured) {
                Some(plan) => {
                    listener.update(plan, &limits);
                    self.listeners.push(listener);
                }
                None => {
                    listener.stop();
                    self.retired.push(listener);
                }
            }
        }
        for (socket, plan) in sockets {
            self.listeners.push(Listener::start(socket, plan, &limits, &self.shared));
        }
        Ok(())
    }

    /// Stops accepting, lets exchanges end for up to the drain time-out, cuts the rest and writes
    /// out the access log. Returns how many connections had to be cut.
    pub async fn shutdown(mut self) -> usize {
        self.shared.draining.store(true, Ordering::Release);
        let listeners: Vec<Listener> = self.listeners.drain(..).chain(self.retired.drain(..)).collect();
        for listener in &listeners {
            listener.stop();
        }
        let deadline = Instant::now() + self.drain_timeout;
        let mut cut = 0;
        for listener in listeners {
            cut += listener.ended(deadline).await;
        }
        // Tunnels have left their connections; they get the same time.
        let shared = Arc::clone(&self.shared);
        let in_flight = || shared.counters.in_flight.value();
        while in_flight() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let tunnels = usize::try_from(in_flight()).unwrap_or(usize::MAX);
        cut += tunnels;
        shared.cut.send_replace(true);
        let patience = Instant::now() + Duration::from_secs(1);
        while in_flight() > 0 && Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // The admin endpoints outlive the drain, so that it can be watched.
        if let Some(admin) = self.admin.take() {
            admin.abort();
        }
        // Joining the writer blocks for as long as its file does.
        if let Err(error) = tokio::task::spawn_blocking(move || shared.access_log.close()).await {
            tracing::error!(target: "driftlock::gateway", %error, "the access log was not closed");
        }
        cut
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.shared.cut.send_replace(true);
        if let Some(admin) = &self.admin {
            admin.abort();
        }
    }
}

/// Runs `driftlock gateway` until SIGTERM or SIGINT.
///
/// # Errors
/// [`GatewayError`] as [`Gateway::start`], and when the runtime cannot be set up.
pub fn run(args: Args) -> Result<(), GatewayError> {
    if args.schema {
        anstream::print!("{}", Config::schema());
        return Ok(());
    }
    if let Some(path) = &args.check {
        check(path)?;
        anstream::println!("{} is usable", path.display());
        return Ok(());
    }
    let file = args.file.clone();
    let plan = match &file {
        Some(path) => Config::load(path)?,
        None => GatewayOptions::try_from(args)?.plan()?,
    };
    let mut runtime = match plan.workers {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.worker_threads(plan.workers).enable_all().build().map_err(GatewayError::Runtime)?;
    runtime.block_on(serve_until_told(plan, file))
}

/// Reads a configuration file, and starts every filter that it names, but serves nothing.
///
/// # Errors
/// As [`Gateway::start_file`].
pub fn check(path: &Path) -> Result<(), GatewayError> {
    let plan = Config::load(path)?;
    let runtime = tokio::runtime::Runtime::new().map_err(GatewayError::Runtime)?;
    runtime.block_on(Generation::build(plan, None, &Arc::default()))?;
    Ok(())
}

async fn serve_until_told(plan: Plan, file: Option<PathBuf>) -> Result<(), GatewayError> {
    let mut signals = reload::Signals::new()?;
    let mut watch = file.map(|path| reload::Watch::new(path, plan.watched.clone()));
    let targets: Vec<_> =
        plan.upstreams.iter().map(|it| (it.tls.is_some(), Arc::clone(&it.authority_text))).collect();
    let mut gateway = Gateway::launch(plan).await?;
    for listener in &gateway.listeners {
        let targets: Vec<String> = targets
            .iter()
            .map(|(tls, name)| format!("{}://{name}", if *tls { "https" } else { "http" }))
            .collect();
        anstream::eprintln!("driftlock gateway: {} -> {}", listener.local, targets.join(", "));
    }
    if let Some(admin) = gateway.admin_addr {
        anstream::eprintln!("driftlock gateway: metrics at http://{admin}/metrics");
    }
    loop {
        let told = tokio::select! {
            told = signals.next() => told,
            () = reload::changed(watch.as_mut()) => reload::Told::Reload,
        };
        match (told, &mut watch) {
            (reload::Told::Stop, _) => break,
            (reload::Told::Reload, Some(watch)) => watch.reload(&mut gateway).await,
            (reload::Told::Reload, None) => {
                anstream::eprintln!(
                    "driftlock gateway: started without --file, so there is nothing to reload"
                );
            }
        }
    }
    let drain_timeout = gateway.drain_timeout;
    anstream::eprintln!("driftlock gateway: stopping, exchanges have {drain_timeout:?} to end");
    let cut = gateway.shutdown().await;
    if cut > 0 {
        anstream::eprintln!("driftlock gateway: cut {cut} connections that had not ended");
    }
    Ok(())
}
