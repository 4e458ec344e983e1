//! Memory that all decoders of a VM share.
//!
//! What: a [`Budget`] is a number of bytes, a [`Lease`] a part of it that comes back when it is dropped.
//! Why: each body may need a window of several MiB, and a worker has many bodies under way; the bound has
//! to be on their sum.
//!
//! Cost: an atomic addition. Left out on purpose: fairness; who comes when nothing is left is not decoded.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicUsize, Ordering};

/// A bound on bytes in use; clones share it.
#[derive(Clone, Debug)]
pub struct Budget {
    limit: usize,
    used: Arc<AtomicUsize>,
}

impl Budget {
    /// Nothing used yet.
    pub fn new(limit_bytes: usize) -> Self {
        Self { limit: limit_bytes, used: Arc::default() }
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn lease(&self, bytes: usize) -> Option<Lease> {
        let mut lease = Lease { budget: self.clone(), bytes: 0 };
        lease.resize(bytes).then_some(lease)
    }
}

/// A part of a [`Budget`] in use.
#[derive(Debug)]
pub(super) struct Lease {
    budget: Budget,
    bytes: usize,
}

impl Lease {
    /// Makes it `bytes`, or leaves it and says no.
    pub(super) fn resize(&mut self, bytes: usize) -> bool {
        let change = |used: usize| {
            let now = used.saturating_sub(self.bytes).checked_add(bytes)?;
            (now <= self.budget.limit || bytes <= self.bytes).then_some(now)
        };
        let changed = self.budget.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change).is_ok();
        if changed {
            self.bytes = bytes;
        }
        changed
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.resize(0);
    }
}
