//! What VMs share: key-value data with compare-and-swap, queues, metrics.
//!
//! Data is keyed by `vm_id`, so plugins that name the same VM id see each other's keys across
//! threads, as in Envoy. One mutex guards data and one guards queues: guests touch them rarely, and
//! a lock is held for a map operation only. Bytes are bounded; what does not fit is refused with
//! `InternalFailure` and nothing is evicted.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::metrics::Metrics;
use super::status::Status;

/// Default bound on keys plus values of shared data, and separately on queued bytes.
pub const SHARED_DEFAULT_BYTES: usize = 64 * 1024 * 1024;

/// Most shared queues that one process keeps.
pub const SHARED_QUEUES_MAX_COUNT: usize = 4096;

/// Shared by every VM that is started with it; clones are the same state.
#[derive(Clone)]
pub struct SharedState {
    inner: Arc<Inner>,
}

struct Inner {
    limit_bytes: usize,
    data: Mutex<Data>,
    queues: Mutex<Queues>,
    metrics: Metrics,
}

/// A value and its compare-and-swap number.
type Versioned = (Vec<u8>, u32);

#[derive(Default)]
struct Data {
    by_vm: HashMap<String, HashMap<Vec<u8>, Versioned>>,
    last_cas: u32,
    bytes: usize,
}

#[derive(Default)]
struct Queues {
    ids: HashMap<(Vec<u8>, Vec<u8>), u32>,
    queues: Vec<Queue>,
    bytes: usize,
    last_vm: u64,
    /// How many items came for each queue, by the VM that registered it last. Only VMs that exist.
    vms: HashMap<u64, News>,
}

#[derive(Default)]
struct News {
    /// Items that the VM has not been told about yet, by queue.
    ready: BTreeMap<u32, u64>,
    wake: Option<Wake>,
}

/// Tells a VM's driver that its queues have news.
type Wake = Arc<dyn Fn() + Send + Sync>;

/// A VM's place among those that share state; the place goes with it.
pub(super) struct Enrolment {
    number: u64,
    shared: SharedState,
}

impl Enrolment {
    pub(super) fn wake_with(&self, wake: Wake) {
        let mut queues = self.shared.queues();
        if let Some(news) = queues.vms.get_mut(&self.number) {
            news.wake = Some(wake);
        }
    }

    /// One entry per item that this VM has not been told about, at most `limit`; the rest stays.
    pub(super) fn take_ready(&self, limit: usize) -> Vec<u32> {
        let mut queues = self.shared.queues();
        let mut taken = Vec::new();
        let Some(news) = queues.vms.get_mut(&self.number) else { return taken };
        while taken.len() < limit
            && let Some(mut first) = news.ready.first_entry()
        {
            taken.push(*first.key());
            *first.get_mut() -= 1;
            if *first.get() == 0 {
                first.remove();
            }
        }
        taken
    }
}

impl Drop for Enrolment {
    fn drop(&mut self) {
        self.shared.queues().vms.remove(&self.number);
    }
}

/// What an entry takes beside its bytes, so that empty ones are bounded too.
const ENTRY_BYTES: usize = 64;

struct Queue {
    owner: u64,
    items: VecDeque<Vec<u8>>,
}

impl Default for SharedState {
    fn default() -> Self {
        Self::new()
    }
}

impl SharedState {
    /// Empty state with the default bounds.
    #[must_use]
    pub fn new() -> Self {
        Self::with_limit_bytes(SHARED_DEFAULT_BYTES)
    }

    /// Empty state that keeps at most `limit_bytes` of shared data and as much in queues.
    #[must_use]
    pub fn with_limit_bytes(limit_bytes: usize) -> Self {
        Self {
            inner: Arc::new(Inner {
                limit_bytes,
                data: Mutex::default(),
                queues: Mutex::default(),
                metrics: Metrics::default(),
            }),
        }
    }

    /// The metrics that guests defined.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    fn data(&self) -> MutexGuard<'_, Data> {
        self.inner.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.inner.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A value and its compare-and-swap number.
    #[must_use]
    pub fn value(&self, vm_id: &str, key: &[u8]) -> Option<(Vec<u8>, u32)> {
        self.data().by_vm.get(vm_id)?.get(key).cloned()
    }

    /// Writes a value. `cas` 0 writes in any case; otherwise an existing value must still carry it.
    pub(super) fn set(&self, vm_id: &str, key: &[u8], value: &[u8], cas: u32) -> Result<(), Status> {
        let mut data = self.data();
        let Data { by_vm, last_cas, bytes } = &mut *data;
        let map = by_vm.entry(vm_id.to_owned()).or_default();
        let old = map.get(key);
        if old.is_some_and(|(_, current)| cas != 0 && cas != *current) {
            return Err(Status::CasMismatch);
        }
        let cost = |value: &[u8]| key.len() + value.len() + ENTRY_BYTES;
        let freed = old.map_or(0, |(old, _)| cost(old));
        let after = *bytes - freed + cost(value);
        if after > self.inner.limit_bytes {
            return Err(Status::InternalFailure);
        }
        *bytes = after;
        // 0 means "unconditional", so it is never a value's own number.
        *last_cas = last_cas.wrapping_add(1).max(1);
        map.insert(key.to_vec(), (value.to_vec(), *last_cas));
        Ok(())
    }

    /// A place for a new VM.
    pub(super) fn enrol(&self) -> Enrolment {
        let mut queues = self.queues();
        queues.last_vm += 1;
        let number = queues.last_vm;
        queues.vms.insert(number, News::default());
        Enrolment { number, shared: self.clone() }
    }

    /// The queue's id; `vm` becomes the one that is told about new items. Items are kept.
    pub(super) fn register_queue(&self, vm: &Enrolment, vm_id: &str, name: &[u8]) -> Result<u32, Status> {
        let mut queues = self.queues();
        let key = (vm_id.as_bytes().to_vec(), name.to_vec());
        if let Some(id) = queues.ids.get(&key).copied() {
            if let Some(queue) = queues.find(id) {
                queue.owner = vm.number;
            }
            return Ok(id);
        }
        if queues.queues.len() >= SHARED_QUEUES_MAX_COUNT {
            return Err(Status::InternalFailure);
        }
        queues.queues.push(Queue { owner: vm.number, items: VecDeque::new() });
        let id = u32::try_from(queues.queues.len()).map_err(|_| Status::InternalFailure)?;
        queues.ids.insert(key, id);
        Ok(id)
    }

    pub(super) fn resolve_queue(&self, vm_id: &[u8], name: &[u8]) -> Result<u32, Status> {
        let queues = self.queues();
        let id = queues.ids.get(&(vm_id.to_vec(), name.to_vec()));
        id.copied().ok_or(Status::NotFound)
    }

    pub(super) fn enqueue(&self, id: u32, value: &[u8]) -> Result<(), Status> {
        let mut queues = self.queues();
        if queues.bytes.saturating_add(value.len() + ENTRY_BYTES) > self.inner.limit_bytes {
            return Err(Status::InternalFailure);
        }
        let queue = queues.find(id).ok_or(Status::NotFound)?;
        queue.items.push_back(value.to_vec());
        let owner = queue.owner;
        queues.bytes += value.len() + ENTRY_BYTES;
        let wake = queues.vms.get_mut(&owner).and_then(|news| {
            *news.ready.entry(id).or_default() += 1;
            news.wake.clone()
        });
        drop(queues);
        if let Some(wake) = wake {
            wake();
        }
        Ok(())
    }

    pub(super) fn dequeue(&self, id: u32) -> Result<Vec<u8>, Status> {
        let mut queues = self.queues();
        let queue = queues.find(id).ok_or(Status::NotFound)?;
        let value = queue.items.pop_front().ok_or(Status::Empty)?;
        queues.bytes -= value.len() + ENTRY_BYTES;
        Ok(value)
    }
}

impl Queues {
    fn find(&mut self, id: u32) -> Option<&mut Queue> {
        self.queues.get_mut(id.checked_sub(1)? as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_with_a_stale_cas_is_refused() {
        let shared = SharedState::new();
        assert_eq!(shared.set("a", b"k", b"1", 77), Ok(()), "a new key takes any cas");
        let (_, cas) = shared.value("a", b"k").unwrap();
        assert_eq!(shared.set("a", b"k", b"2", cas), Ok(()));
        assert_eq!(shared.set("a", b"k", b"3", cas), Err(Status::CasMismatch));
        assert_eq!(shared.value("a", b"k").unwrap().0, b"2");
        assert_eq!(shared.set("a", b"k", b"4", 0), Ok(()));
        assert_eq!(shared.value("b", b"k"), None, "another vm_id sees nothing");
    }

    #[test]
    fn data_and_queues_are_bounded_and_space_comes_back() {
        let shared = SharedState::with_limit_bytes(ENTRY_BYTES * 2 + 10);
        assert_eq!(shared.set("a", b"k", &[0; 70], 0), Ok(()));
        assert_eq!(shared.set("a", b"l", b"", 0), Err(Status::InternalFailure));
        assert_eq!(shared.set("a", b"k", &[0; 2], 0), Ok(()));
        assert_eq!(shared.set("a", b"l", &[0; 6], 0), Ok(()));
        assert_eq!(shared.set("a", b"m", b"", 0), Err(Status::InternalFailure));
        let vm = shared.enrol();
        let queue = shared.register_queue(&vm, "a", b"q").unwrap();
        assert_eq!(shared.enqueue(queue, &[1; 10]), Ok(()));
        assert_eq!(shared.enqueue(queue, b""), Ok(()));
        assert_eq!(shared.enqueue(queue, b""), Err(Status::InternalFailure), "empty items count too");
        assert_eq!(shared.dequeue(queue), Ok(vec![1; 10]));
        assert_eq!(shared.dequeue(queue), Ok(Vec::new()));
        assert_eq!(shared.dequeue(queue), Err(Status::Empty));
        assert_eq!(shared.enqueue(queue, b"x"), Ok(()));
    }

    #[test]
    fn the_last_registrant_is_told_of_each_item_and_woken() {
        let shared = SharedState::new();
        let (one, two) = (shared.enrol(), shared.enrol());
        let queue = shared.register_queue(&one, "a", b"q").unwrap();
        assert_eq!(shared.register_queue(&two, "a", b"q"), Ok(queue));
        assert_eq!(shared.resolve_queue(b"a", b"q"), Ok(queue));
        assert_eq!(shared.resolve_queue(b"b", b"q"), Err(Status::NotFound));
        let woken = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let count = Arc::clone(&woken);
        two.wake_with(Arc::new(move || {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }));
        for _ in 0..3 {
            shared.enqueue(queue, b"x").unwrap();
        }
        assert_eq!(woken.load(std::sync::atomic::Ordering::Relaxed), 3);
        assert!(one.take_ready(9).is_empty());
        assert_eq!(two.take_ready(2), [queue, queue]);
        assert_eq!(two.take_ready(2), [queue]);
        assert!(two.take_ready(2).is_empty());
        assert_eq!(shared.enqueue(0, b"x"), Err(Status::NotFound));
        // Items for a VM that is gone wait for the next one that registers.
        drop(two);
        assert_eq!(shared.enqueue(queue, b"x"), Ok(()));
        assert_eq!(shared.queues().vms.len(), 1);
    }
}
