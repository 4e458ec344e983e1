//! Held headers that wait for a body that does not come are let go.
//!
//! Why: a proxy that does not allow headers to be held gives the filter no body meanwhile, so a stream whose
//! headers wait for its body waits for ever. A guest cannot ask which kind of proxy it runs in. Cost: nothing
//! unless `hold.headers` is on; then a tick at half the deadline that looks at the streams that wait.

use std::cell::{Cell, RefCell};
use std::rc::Weak;

use driftlock_inspect::config::HoldLimits;
use driftlock_inspect::host::Direction;

use crate::{Passing, hostcall};

/// The streams whose headers are held.
pub(crate) struct Watchdog {
    root_context: u32,
    deadline_ns: Cell<u64>,
    waiting: RefCell<Vec<Waiting>>,
}

struct Waiting {
    context_id: u32,
    direction: Direction,
    since_ns: u64,
    passing: Weak<RefCell<Passing>>,
}

impl Watchdog {
    pub(crate) fn new(root_context: u32) -> Self {
        Self { root_context, deadline_ns: Cell::new(0), waiting: RefCell::default() }
    }

    /// How often it wants to be ticked, in milliseconds; not at all where headers are not held.
    pub(crate) fn configure(&self, hold: HoldLimits) -> Option<u32> {
        self.deadline_ns.set(u64::from(hold.deadline_ms) * 1_000_000);
        hold.headers.then_some((hold.deadline_ms / 2).max(1))
    }

    pub(crate) fn watch(&self, context_id: u32, direction: Direction, passing: Weak<RefCell<Passing>>) {
        let since_ns = hostcall::now_ns();
        if let Ok(mut waiting) = self.waiting.try_borrow_mut() {
            waiting.push(Waiting { context_id, direction, since_ns, passing });
        }
    }

    /// Lets go what has waited long enough.
    pub(crate) fn tick(&self) {
        let Ok(mut waiting) = self.waiting.try_borrow_mut() else { return };
        let now_ns = hostcall::now_ns();
        let mut elsewhere = false;
        waiting.retain(|stream| {
            let Some(passing) = stream.passing.upgrade() else { return false };
            if now_ns.saturating_sub(stream.since_ns) < self.deadline_ns.get() {
                return true;
            }
            let Ok(mut passing) = passing.try_borrow_mut() else { return true };
            let direction = stream.direction;
            // Its calls concern its own stream.
            elsewhere = true;
            let called = hostcall::set_effective_context(stream.context_id);
            let release = passing
                .with(false, |exchange, plugin, host| exchange.release_headers(plugin, host, direction));
            if release && called.is_ok() && hostcall::continue_stream(direction as u32).is_err() {
                hostcall::log(4, "driftlock: the proxy does not let held headers go on");
            }
            false
        });
        if elsewhere {
            let _ = hostcall::set_effective_context(self.root_context);
        }
    }
}
