//! When to load the configuration again: SIGHUP, or a change of any file it names.
//!
//! Files are looked at once a second by their metadata (time, length, inode), which also sees a
//! Kubernetes ConfigMap's symbolic link being turned, works on every file system, and needs no
//! notification API. A change is acted on once it has stayed the same for a second, so that a file
//! is not read while it is being written. Costs a few `stat` calls a second.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::Gateway;
use super::config::Config;
use super::error::GatewayError;

const PERIOD: Duration = Duration::from_secs(1);

/// What a signal asks for.
pub(super) enum Told {
    Stop,
    Reload,
}

/// What can be seen of a file without reading it.
type Stamp = Option<(Option<SystemTime>, u64, u64)>;

/// The files of one configuration.
pub(super) struct Watch {
    path: PathBuf,
    files: Vec<PathBuf>,
    /// As they were when they were last loaded.
    loaded: Vec<Stamp>,
    /// As they were at the last look.
    seen: Vec<Stamp>,
}

impl Watch {
    pub(super) fn new(path: PathBuf, files: Vec<PathBuf>) -> Self {
        let loaded = stamps(&files);
        Self { path, seen: loaded.clone(), loaded, files }
    }

    async fn changed(&mut self) {
        loop {
            tokio::time::sleep(PERIOD).await;
            let now = stamps(&self.files);
            let steady = now == self.seen;
            self.seen = now;
            if steady && self.seen != self.loaded {
                return;
            }
        }
    }

    /// Loads the configuration and says how that went.
    pub(super) async fn reload(&mut self, gateway: &mut Gateway) {
        let path = self.path.clone();
        let loaded = tokio::task::spawn_blocking(move || Config::load(&path)).await;
        self.loaded = stamps(&self.files);
        let result = match loaded {
            Ok(Ok(plan)) => {
                let files = plan.watched.clone();
                let reloaded = gateway.reload(plan).await;
                if reloaded.is_ok() {
                    *self = Self::new(std::mem::take(&mut self.path), files);
                }
                reloaded
            }
            Ok(Err(error)) => {
                gateway.shared.counters.reload_failures.increment();
                Err(error)
            }
            Err(error) => {
                tracing::error!(target: "driftlock::gateway", %error, "loading the configuration panicked");
                return;
            }
        };
        let name = self.path.display();
        match result {
            Ok(()) => {
                let number = gateway.shared.generation().number;
                anstream::eprintln!("driftlock gateway: {name} loaded, configuration {number}");
            }
            Err(error) => {
                anstream::eprintln!("driftlock gateway: {name} not loaded, the one before stays: {error}");
            }
        }
    }
}

/// Ready when a file has changed; never, without files.
pub(super) async fn changed(watch: Option<&mut Watch>) {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    files
        .iter()
        .map(|file| {
            let metadata = std::fs::metadata(file).ok()?;
            Some((metadata.modified().ok(), metadata.len(), inode(&metadata)))
        })
        .collect()
}

#[cfg(unix)]
fn inode(metadata: &std::fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn inode(_: &std::fs::Metadata) -> u64 {
    0
}

/// The signals that a gateway listens to.
#[cfg(unix)]
pub(super) struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    pub(super) fn new() -> Result<Self, GatewayError> {
        use tokio::signal::unix::{SignalKind, signal};
        let listen = |kind| signal(kind).map_err(GatewayError::Runtime);
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    pub(super) async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::Stop,
            _ = self.interrupt.recv() => Told::Stop,
            _ = self.hangup.recv() => Told::Reload,
        }
    }
}

/// Ctrl-C alone.
#[cfg(not(unix))]
pub(super) struct Signals;

#[cfg(not(unix))]
impl Signals {
    pub(super) fn new() -> Result<Self, GatewayError> {
        Ok(Self)
    }

    pub(super) async fn next(&mut self) -> Told {
        if let Err(error) = tokio::signal::ctrl_c().await {
            tracing::error!(target: "driftlock::gateway", %error, "cannot wait for Ctrl-C");
            std::future::pending::<()>().await;
        }
        Told::Stop
    }
}
