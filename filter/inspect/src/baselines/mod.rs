//! Where a VM's baselines come from while it runs, and what goes back.
//!
//! What: a [`Keeper`] shares baselines learned in place with the other VMs of the process ([`share`]),
//! pulls snapshots from the host service ([`pull`]) and posts observations to it ([`outbox`]). It makes no
//! call of its own accord: the filter hands it ticks and answers, and [`Services`] to call.
//!
//! Why one VM's learning is every VM's: each worker has a VM; were each judged by what it happened to see,
//! the same request would be normal on one and anomalous on another.
//!
//! Cost: nothing a message but a push to the outbox; a tick reads one small shared value. Adopting costs
//! one copy of the snapshot and one pass over it.
//!
//! Left out on purpose: the choice of what to learn from, which is the detector's; text, which never
//! leaves.

pub mod outbox;
pub mod pull;
pub mod share;

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use driftlock_engine::ENGINE_VERSION;
use driftlock_engine::baseline::{Digest, Snapshot, StreamBaseline};
use driftlock_engine::detector::{Detector, Settings};

use crate::host::{HostError, Level, Metric};
use outbox::Outbox;
use pull::Pull;
use share::Share;

/// How often the keeper wants to be ticked.
pub const TICK_MS: u32 = 1000;

/// proxy-wasm's status for a shared value that another VM has changed meanwhile.
pub const CAS_MISMATCH: HostError = HostError(8);

/// A request to the host service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call<'a> {
    /// The proxy's name for the service.
    pub cluster: &'a str,
    /// Header pairs, pseudo-headers first.
    pub headers: &'a [(&'a str, &'a str)],
    /// Body; may be empty.
    pub body: &'a [u8],
    /// How long to wait.
    pub timeout_ms: u32,
}

/// What came back of a [`Call`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    /// Status; none if there was no response.
    pub status: Option<u16>,
    /// Body.
    pub body: &'a [u8],
}

/// What the keeper needs of the proxy.
pub trait Services {
    /// A value that all VMs share, and its compare-and-swap number.
    ///
    /// # Errors
    /// [`HostError`] if the proxy cannot tell.
    fn shared(&self, key: &str) -> Result<Option<(Vec<u8>, u32)>, HostError>;

    /// Writes a shared value. With a number other than 0, only if the value still has it.
    ///
    /// # Errors
    /// [`CAS_MISMATCH`] if it has not, else what the proxy says.
    fn set_shared(&mut self, key: &str, value: &[u8], cas: u32) -> Result<(), HostError>;

    /// Sends a request; its answer comes later, under the number returned.
    ///
    /// # Errors
    /// [`HostError`] if the proxy does not know the cluster.
    fn call(&mut self, call: Call<'_>) -> Result<u32, HostError>;

    /// Adds to a counter.
    fn count(&mut self, metric: Metric, by: u64);

    /// Writes a log line.
    fn log(&mut self, level: Level, line: &str);
}

/// How the keeper keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Supply {
    /// Share what is learned in place.
    pub share: bool,
    /// Pull snapshots.
    pub pull: Option<pull::PullFrom>,
    /// Post observations.
    pub observations: Option<outbox::PostTo>,
}

/// Keeps a VM's baselines and posts its observations.
#[derive(Debug)]
pub struct Keeper {
    name: String,
    alpha_ppm: u32,
    /// Tells VMs with another configuration apart.
    fingerprint: Digest,
    share: Option<Share>,
    pull: Option<Pull>,
    outbox: Option<Outbox>,
}

impl Keeper {
    /// For a VM whose detector has these settings; `name` is the configuration's.
    pub fn new(name: &str, settings: &Settings, supply: &Supply) -> Self {
        // What decides how a stream is learned and judged. Not the outbox, nor the limits of a message.
        let identity = format!("{name}\n{ENGINE_VERSION}\n{settings:?}\n{:?}", supply.pull);
        let fingerprint = Digest::of(identity.as_bytes());
        let share = supply.share && settings.learning.is_some();
        Self {
            name: name.into(),
            alpha_ppm: settings.alpha_ppm,
            fingerprint,
            share: share.then(|| Share::new(&fingerprint)),
            pull: supply.pull.clone().map(Pull::new),
            outbox: supply.observations.clone().map(Outbox::new),
        }
    }

    /// Whether ticks have any use.
    pub fn needs_ticks(&self) -> bool {
        self.share.is_some() || self.pull.is_some() || self.outbox.is_some()
    }

    /// Where observations go, if they go anywhere.
    pub fn outbox(&mut self) -> Option<&mut Outbox> {
        self.outbox.as_mut()
    }

    /// The VM has been configured: takes over what others have learned or pulled. `node` tells this proxy
    /// from others.
    pub fn start(&mut self, node: &str, detector: &mut Detector, services: &mut impl Services) {
        if let Some(share) = &mut self.share {
            share.start(services);
            share.adopt(&[], detector, services);
        }
        if self.pull.is_some() || self.outbox.is_some() {
            let ordinal = share::ordinal(&self.fingerprint, services);
            let seed = Digest::of(format!("{node}\n{ordinal}\n{}", self.fingerprint).as_bytes());
            if let Some(pull) = &mut self.pull {
                pull.start(seed, ordinal);
            }
            if let Some(outbox) = &mut self.outbox {
                outbox.start(seed);
            }
        }
    }

    /// Streams have finished learning: publishes them, or adopts what another VM published before.
    pub fn learned(
        &mut self,
        baselines: Vec<Arc<StreamBaseline>>,
        detector: &mut Detector,
        services: &mut impl Services,
    ) {
        let Some(share) = &mut self.share else { return };
        for baseline in baselines {
            share.publish(&baseline, detector, services);
        }
    }

    /// Time passes. `now_ns` counts from any moment.
    pub fn tick(&mut self, now_ns: u64, detector: &mut Detector, services: &mut impl Services) {
        if let Some(share) = &mut self.share {
            let pulled = self.pull.as_ref().map_or(&[][..], |pull| &pull.streams);
            share.adopt(pulled, detector, services);
        }
        if let Some(pull) = &mut self.pull {
            let check = Check { name: &self.name, alpha_ppm: self.alpha_ppm };
            pull.tick(now_ns, &self.fingerprint, check, detector, services);
        }
        if let Some(outbox) = &mut self.outbox {
            outbox.tick(now_ns, services);
        }
    }

    /// The answer to a call.
    pub fn answered(
        &mut self,
        token: u32,
        answer: Answer<'_>,
        now_ns: u64,
        detector: &mut Detector,
        services: &mut impl Services,
    ) {
        if let Some(pull) = &mut self.pull {
            let check = Check { name: &self.name, alpha_ppm: self.alpha_ppm };
            pull.answered(token, answer, now_ns, &self.fingerprint, check, detector, services);
        }
        if let Some(outbox) = &mut self.outbox {
            outbox.answered(token, answer, now_ns, services);
        }
    }
}

/// What a snapshot from elsewhere has to agree with.
#[derive(Clone, Copy, Debug)]
struct Check<'a> {
    name: &'a str,
    alpha_ppm: u32,
}

impl Check<'_> {
    fn of(self, snapshot: &Snapshot) -> Result<(), String> {
        crate::config::check_snapshot(self.name, self.alpha_ppm, snapshot).map_err(|error| format!("{error}"))
    }
}

/// Waiting times that grow with failures, spread by a stable hash so that proxies do not come together.
#[derive(Clone, Copy, Debug)]
struct Backoff {
    seed: Digest,
    failures: u32,
}

const SECOND_NS: u64 = 1_000_000_000;

impl Backoff {
    fn new() -> Self {
        Self { seed: Digest([0; 32]), failures: 0 }
    }

    /// Between 1/2 and 1 of 2^failures seconds, at most `most_ns`.
    fn after_failure(&mut self, most_ns: u64) -> u64 {
        let whole = (SECOND_NS << self.failures.min(20)).min(most_ns).max(2);
        self.failures = self.failures.saturating_add(1);
        whole / 2 + self.spread(whole / 2)
    }

    /// A number below `below`, by seed and failures so far.
    fn spread(&self, below: u64) -> u64 {
        let hash = Digest::of(format!("{}\n{}", self.seed, self.failures).as_bytes());
        let hash = hash.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        hash.checked_rem(below).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
