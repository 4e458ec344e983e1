//! What VMs share: key-value data with compare-and-swap, queues, metrics.
//!
//! Data is keyed by `vm_id`, so plugins that name the same VM id see each other's keys across
//! threads, as in Envoy. One mutex guards data and one guards queues: guests touch them rarely, and
//! a lock is held for a map operation only. Bytes are bounded; what does not fit is refused with
//! `InternalFailure` and nothing is evicted.

use std::collections::{BTreeSet, HashMap, VecDeque};
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
    /// Queues with news, by the VM that registered last.
    ready: HashMap<u64, BTreeSet<u32>>,
}

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
        let freed = old.map_or(0, |(old, _)| key.len() + old.len());
        let after = *bytes - freed + key.len() + value.len();
        if after > self.inner.limit_bytes {
            return Err(Status::InternalFailure);
        }
        *bytes = after;
        // 0 means "unconditional", so it is never a value's own number.
        *last_cas = last_cas.wrapping_add(1).max(1);
        map.insert(key.to_vec(), (value.to_vec(), *last_cas));
        Ok(())
    }

    /// A number that tells VMs of one process apart.
    pub(super) fn next_vm(&self) -> u64 {
        let mut queues = self.queues();
        queues.last_vm += 1;
        queues.last_vm
    }

    /// The queue's id; `vm` becomes the one that is told about new items. Items are kept.
    pub(super) fn register_queue(&self, vm: u64, vm_id: &str, name: &[u8]) -> Result<u32, Status> {
        let mut queues = self.queues();
        let key = (vm_id.as_bytes().to_vec(), name.to_vec());
        if let Some(id) = queues.ids.get(&key).copied() {
            if let Some(queue) = queues.find(id) {
                queue.owner = vm;
            }
            return Ok(id);
        }
        if queues.queues.len() >= SHARED_QUEUES_MAX_COUNT {
            return Err(Status::InternalFailure);
        }
        queues.queues.push(Queue { owner: vm, items: VecDeque::new() });
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
        if queues.bytes.saturating_add(value.len()) > self.inner.limit_bytes {
            return Err(Status::InternalFailure);
        }
        let queue = queues.find(id).ok_or(Status::NotFound)?;
        queue.items.push_back(value.to_vec());
        let owner = queue.owner;
        queues.bytes += value.len();
        queues.ready.entry(owner).or_default().insert(id);
        Ok(())
    }

    pub(super) fn dequeue(&self, id: u32) -> Result<Vec<u8>, Status> {
        let mut queues = self.queues();
        let queue = queues.find(id).ok_or(Status::NotFound)?;
        let value = queue.items.pop_front().ok_or(Status::Empty)?;
        queues.bytes -= value.len();
        Ok(value)
    }

    /// Queues that `vm` has not been told about since their last new item.
    pub(super) fn take_ready(&self, vm: u64) -> BTreeSet<u32> {
        self.queues().ready.remove(&vm).unwrap_or_default()
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
        let shared = SharedState::with_limit_bytes(10);
        assert_eq!(shared.set("a", b"k", &[0; 9], 0), Ok(()));
        assert_eq!(shared.set("a", b"l", b"", 0), Err(Status::InternalFailure));
        assert_eq!(shared.set("a", b"k", &[0; 2], 0), Ok(()));
        assert_eq!(shared.set("a", b"l", &[0; 6], 0), Ok(()));
        let queue = shared.register_queue(1, "a", b"q").unwrap();
        assert_eq!(shared.enqueue(queue, &[1; 10]), Ok(()));
        assert_eq!(shared.enqueue(queue, b"x"), Err(Status::InternalFailure));
        assert_eq!(shared.dequeue(queue), Ok(vec![1; 10]));
        assert_eq!(shared.dequeue(queue), Err(Status::Empty));
        assert_eq!(shared.enqueue(queue, b"x"), Ok(()));
    }

    #[test]
    fn the_last_registrant_is_told() {
        let shared = SharedState::new();
        let (one, two) = (shared.next_vm(), shared.next_vm());
        let queue = shared.register_queue(one, "a", b"q").unwrap();
        assert_eq!(shared.register_queue(two, "a", b"q"), Ok(queue));
        assert_eq!(shared.resolve_queue(b"a", b"q"), Ok(queue));
        assert_eq!(shared.resolve_queue(b"b", b"q"), Err(Status::NotFound));
        shared.enqueue(queue, b"x").unwrap();
        assert!(shared.take_ready(one).is_empty());
        assert_eq!(shared.take_ready(two).into_iter().collect::<Vec<_>>(), [queue]);
        assert!(shared.take_ready(two).is_empty());
        assert_eq!(shared.enqueue(0, b"x"), Err(Status::NotFound));
    }
}
