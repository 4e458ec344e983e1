//! Warm VMs, and what to do when one is lost.
//!
//! A VM per worker keeps a crash from spreading; replacing one costs its instantiation and its own
//! initialisation, which a [`Pool`] does ahead. [`Recovery`] is the failure policy as a state machine
//! without a clock of its own: told when a VM was lost and when one started, it says what to do with an
//! exchange now. Envoy's three policies, with one difference: a back-off grows while crashes follow
//! starts closely, so that a request that always crashes the filter cannot keep a processor busy with
//! starts.

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

/// What happens to exchanges when a VM is lost. The exchange in which it is lost is answered with 503
/// in any case, as in Envoy, unless the caller salvages it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailurePolicy {
    /// Later exchanges are answered with 503.
    FailClosed,
    /// Later exchanges pass without the filter.
    FailOpen,
    /// A new VM is started after a back-off; exchanges are answered with 503 until then. Only for
    /// crashes at run time: a filter that does not start stays failed.
    FailReload {
        /// The wait after a first crash; Envoy's is 1 s.
        first: Duration,
        /// The longest wait, when crash follows crash.
        longest: Duration,
    },
}

impl FailurePolicy {
    /// [`FailurePolicy::FailReload`] with Envoy's wait of a second, growing to at most a minute.
    pub const RELOAD: Self =
        Self::FailReload { first: Duration::from_secs(1), longest: Duration::from_secs(60) };
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
    started: Instant,
    lost: Option<Loss>,
    backoff: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Loss {
    at: Instant,
    /// It did not start, so another start would fail alike.
    for_good: bool,
}

impl Recovery {
    /// A place whose VM started at `now`.
    #[must_use]
    pub fn new(policy: FailurePolicy, now: Instant) -> Self {
        Self { policy, started: now, lost: None, backoff: Duration::ZERO }
    }

    /// The VM was lost. A VM that lived ten times the last back-off resets it; else it doubles.
    pub fn lost(&mut self, now: Instant) {
        if let FailurePolicy::FailReload { first, longest } = self.policy {
            let lived = now.saturating_duration_since(self.started);
            self.backoff = if self.backoff.is_zero() || lived >= self.backoff * 10 {
                first
            } else {
                (self.backoff * 2).min(longest)
            };
        }
        self.lost = Some(Loss { at: now, for_good: false });
    }

    /// A new VM started.
    pub fn started(&mut self, now: Instant) {
        self.started = now;
        self.lost = None;
    }

    /// A new VM did not start: it stays lost.
    pub fn did_not_start(&mut self, now: Instant) {
        self.lost = Some(Loss { at: now, for_good: true });
    }

    /// What to do with an exchange that arrives at `now`.
    #[must_use]
    pub fn disposition(&self, now: Instant) -> Disposition {
        match (self.lost, self.policy) {
            (None, _) => Disposition::Run,
            (Some(_), FailurePolicy::FailOpen) => Disposition::Bypass,
            (Some(loss), FailurePolicy::FailReload { .. })
                if !loss.for_good && now.saturating_duration_since(loss.at) >= self.backoff =>
            {
                Disposition::Rebuild
            }
            (Some(_), _) => Disposition::Refuse,
        }
    }

    /// When [`Disposition::Rebuild`] is due, if ever.
    #[must_use]
    pub fn rebuild_at(&self) -> Option<Instant> {
        let loss = self.lost.filter(|loss| !loss.for_good)?;
        matches!(self.policy, FailurePolicy::FailReload { .. }).then(|| loss.at + self.backoff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_says_what_to_do() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        for (policy, after) in [
            (FailurePolicy::FailClosed, Disposition::Refuse),
            (FailurePolicy::FailOpen, Disposition::Bypass),
            (FailurePolicy::RELOAD, Disposition::Rebuild),
        ] {
            let mut recovery = Recovery::new(policy, start);
            assert_eq!(recovery.disposition(start), Disposition::Run);
            recovery.lost(start + second);
            assert_eq!(recovery.disposition(start + second * 3), after);
        }
    }

    #[test]
    fn a_reload_waits_longer_while_crashes_follow_starts() {
        let mut now = Instant::now();
        let second = Duration::from_secs(1);
        let mut recovery = Recovery::new(FailurePolicy::RELOAD, now);
        for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
            recovery.lost(now);
            assert_eq!(recovery.disposition(now), Disposition::Refuse);
            assert_eq!(recovery.rebuild_at(), Some(now + second * wait));
            now += second * wait;
            assert_eq!(recovery.disposition(now), Disposition::Rebuild);
            recovery.started(now);
            assert_eq!(recovery.disposition(now), Disposition::Run);
        }
        now += second * 600;
        recovery.lost(now);
        assert_eq!(recovery.rebuild_at(), Some(now + second), "a long life forgives");
        recovery.did_not_start(now);
        assert_eq!(recovery.disposition(now + second * 999), Disposition::Refuse);
        assert_eq!(recovery.rebuild_at(), None);
    }
}
