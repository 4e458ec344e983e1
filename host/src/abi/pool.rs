//! Warm VMs, and what to do when one is lost.
//!
//! A VM per worker keeps a crash from spreading; replacing one costs its instantiation and its own
//! initialisation, which a [`Pool`] does ahead. [`Recovery`] is the failure policy as a state machine
//! without a clock of its own: told when a VM was lost and when one started, it says what to do with an
//! exchange now.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::error::AbiError;
use super::module::Module;
use super::options::PluginOptions;
use super::plugin::{Plugin, Prepared};

/// Prepared VMs of one plugin, for whichever worker needs one next.
pub struct Pool {
    module: Module,
    options: PluginOptions,
    size: usize,
    warm: Mutex<Vec<Prepared>>,
}

impl Pool {
    /// A pool that keeps `size` VMs warm. It is empty until [`Pool::fill`].
    #[must_use]
    pub fn new(module: Module, options: PluginOptions, size: usize) -> Self {
        Self { module, options, size, warm: Mutex::default() }
    }

    /// Prepares VMs until `size` are warm; takes as long as that takes, so run it off the workers.
    ///
    /// # Errors
    /// As [`Plugin::prepare`].
    pub fn fill(&self) -> Result<(), AbiError> {
        while self.warm_count() < self.size {
            let prepared = Plugin::prepare(&self.module, self.options.clone())?;
            self.warm.lock().unwrap_or_else(PoisonError::into_inner).push(prepared);
        }
        Ok(())
    }

    /// A started plugin: from a warm VM if there is one, else from scratch.
    ///
    /// # Errors
    /// As [`Plugin::start`].
    pub fn start(&self) -> Result<Plugin, AbiError> {
        let warm = self.warm.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match warm {
            Some(prepared) => prepared.configure(),
            None => Plugin::start(&self.module, self.options.clone()),
        }
    }

    /// How many VMs are warm.
    #[must_use]
    pub fn warm_count(&self) -> usize {
        self.warm.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// What the pool's VMs run.
    #[must_use]
    pub fn module(&self) -> &Module {
        &self.module
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("size", &self.size)
            .field("warm", &self.warm_count())
            .finish_non_exhaustive()
    }
}

/// What happens to exchanges when a VM is lost: Envoy's three policies. The exchange in which it is lost
/// is answered with 503 in any case, as in Envoy, unless the caller salvages it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailurePolicy {
    /// Later exchanges are answered with 503.
    FailClosed,
    /// Later exchanges pass without the filter.
    FailOpen,
    /// A new VM is started for the first exchange that comes once the back-off is over; exchanges are
    /// answered with 503 until then. Only for crashes at run time: a filter that does not start at first
    /// stays failed.
    FailReload {
        /// Least time from a start to the next, whether it succeeded or not; so a VM that ran for longer
        /// is replaced at once. Envoy makes it longer by up to half, at random.
        backoff: Duration,
    },
}

impl FailurePolicy {
    /// [`FailurePolicy::FailReload`] with Envoy's back-off of a second.
    pub const RELOAD: Self = Self::FailReload { backoff: Duration::from_secs(1) };
}

/// What to do with an exchange now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// The VM runs.
    Run,
    /// Answer 503.
    Refuse,
    /// Pass it without the filter.
    Bypass,
    /// Answer 503, and start a new VM, which is due.
    Rebuild,
}

/// The failure policy of one VM's place.
#[derive(Debug, Clone)]
pub struct Recovery {
    policy: FailurePolicy,
    /// The last start, whether it succeeded or not.
    started: Instant,
    lost: bool,
}

impl Recovery {
    /// A place whose VM started at `now`.
    #[must_use]
    pub fn new(policy: FailurePolicy, now: Instant) -> Self {
        Self { policy, started: now, lost: false }
    }

    /// The VM was lost.
    pub fn lost(&mut self) {
        self.lost = true;
    }

    /// A new VM started.
    pub fn started(&mut self, now: Instant) {
        self.started = now;
        self.lost = false;
    }

    /// A new VM did not start: the next try is after another back-off.
    pub fn did_not_start(&mut self, now: Instant) {
        self.started = now;
        self.lost = true;
    }

    /// What to do with an exchange that arrives at `now`.
    #[must_use]
    pub fn disposition(&self, now: Instant) -> Disposition {
        match (self.lost, self.policy) {
            (false, _) => Disposition::Run,
            (true, FailurePolicy::FailOpen) => Disposition::Bypass,
            (true, _) if self.rebuild_at().is_some_and(|due| due <= now) => Disposition::Rebuild,
            (true, _) => Disposition::Refuse,
        }
    }

    /// When [`Disposition::Rebuild`] is due, if ever; in the past for a VM that ran for long.
    #[must_use]
    pub fn rebuild_at(&self) -> Option<Instant> {
        match self.policy {
            FailurePolicy::FailReload { backoff } if self.lost => Some(self.started + backoff),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_says_what_to_do() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        for (policy, before, after) in [
            (FailurePolicy::FailClosed, Disposition::Refuse, Disposition::Refuse),
            (FailurePolicy::FailOpen, Disposition::Bypass, Disposition::Bypass),
            (FailurePolicy::RELOAD, Disposition::Refuse, Disposition::Rebuild),
        ] {
            let mut recovery = Recovery::new(policy, start);
            assert_eq!(recovery.disposition(start), Disposition::Run);
            recovery.lost();
            assert_eq!(recovery.disposition(start + second / 2), before);
            assert_eq!(recovery.disposition(start + second), after);
        }
    }

    #[test]
    fn a_backoff_counts_from_the_last_start() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut recovery = Recovery::new(FailurePolicy::RELOAD, start);
        recovery.lost();
        assert_eq!(recovery.rebuild_at(), Some(start + second));
        recovery.did_not_start(start + second);
        assert_eq!(recovery.disposition(start + second), Disposition::Refuse);
        assert_eq!(recovery.disposition(start + second * 2), Disposition::Rebuild);
        recovery.started(start + second * 2);
        assert_eq!(recovery.disposition(start + second * 2), Disposition::Run);
        assert_eq!(recovery.rebuild_at(), None);
        recovery.lost();
        assert_eq!(recovery.disposition(start + second * 60), Disposition::Rebuild, "a long life");
    }
}
