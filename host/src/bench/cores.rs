//! Which processors the measured proxies and the load run on.
//!
//! What: the proxies on one, what is in front of them and behind them on the others. Why: a proxy with one worker
//! whose clients and upstream are scheduled beside it shares its caches and its time with them, now more and now
//! less; what is measured then is the scheduler. On one processor there is nothing to divide, and elsewhere than on
//! Linux the system divides as it likes.
//!
//! Left out on purpose: more than one worker.

#[cfg(target_os = "linux")]
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where this thread and what it starts from now on run; as before when dropped.
#[cfg(target_os = "linux")]
pub(super) struct Sides {
    before: CpuSet,
    proxies: CpuSet,
    load: CpuSet,
}

#[cfg(target_os = "linux")]
impl Sides {
    /// Divides the processors that this thread may run on; all are both sides' if it may not run on two.
    pub(super) fn divide() -> Self {
        // What cannot be told is left as it is: no thread may run on no processor.
        let before = sched_getaffinity(None).unwrap_or_default();
        let mut allowed = (0..CpuSet::MAX_CPU).filter(|&cpu| before.is_set(cpu));
        let (mut proxies, mut load) = (CpuSet::new(), CpuSet::new());
        allowed.by_ref().take(1).for_each(|cpu| proxies.set(cpu));
        allowed.for_each(|cpu| load.set(cpu));
        if load.count() == 0 {
            (proxies, load) = (before, before);
        }
        Self { before, proxies, load }
    }

    /// What is started now is a proxy.
    pub(super) fn proxies(&self) {
        place(&self.proxies);
    }

    /// What is started now is load.
    pub(super) fn load(&self) {
        place(&self.load);
    }

    /// What is started now runs where it likes.
    pub(super) fn all(&self) {
        place(&self.before);
    }
}

/// A system that refuses leaves the threads where they were: the figures are then as on one that does not divide.
#[cfg(target_os = "linux")]
fn place(processors: &CpuSet) {
    let _ = sched_setaffinity(None, processors);
}

#[cfg(target_os = "linux")]
impl Drop for Sides {
    fn drop(&mut self) {
        place(&self.before);
    }
}

/// There is nothing to divide by.
#[cfg(not(target_os = "linux"))]
pub(super) struct Sides;

#[cfg(not(target_os = "linux"))]
impl Sides {
    pub(super) fn divide() -> Self {
        Self
    }

    pub(super) fn proxies(&self) {}

    pub(super) fn load(&self) {}

    pub(super) fn all(&self) {}
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_sides_share_no_processor_and_all_is_given_back() {
        // Threads have processors of their own, so other tests do not notice.
        let before = sched_getaffinity(None).unwrap();
        let now = || sched_getaffinity(None).unwrap();
        let sides = Sides::divide();
        sides.proxies();
        let of_proxies = now();
        sides.load();
        if before.count() > 1 {
            assert_eq!((of_proxies.count(), now().count()), (1, before.count() - 1));
            assert!((0..CpuSet::MAX_CPU).all(|cpu| !(of_proxies.is_set(cpu) && now().is_set(cpu))));
        } else {
            assert!(of_proxies == before && now() == before);
        }
        sides.all();
        assert!(now() == before);
        sides.load();
        drop(sides);
        assert!(now() == before);
    }
}
