//! Host calls that cannot panic.
//!
//! What: the few proxy-wasm imports (ABI 0.2.1) that the filter needs, each returning a status. Why not the
//! published SDK's: they panic on a status that they do not expect, such as BadArgument for a header set too
//! late, and a panic kills the VM for every stream on the worker.
//!
//! Cost: what the import costs, and one copy out of the host for reads.
//!
//! Left out on purpose: every call that the filter does not make.

use driftlock_inspect::baselines::Call;
use driftlock_inspect::host::{HeaderMap, HostError};

/// `proxy_map_type_t`.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum MapType {
    /// Request headers.
    RequestHeaders = 0,
    /// Response headers.
    ResponseHeaders = 2,
    /// Response trailers.
    ResponseTrailers = 3,
    /// Headers of the answer to a call of ours.
    CallAnswer = 6,
}

/// `proxy_buffer_type_t`.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum BufferType {
    /// Request body.
    RequestBody = 0,
    /// Response body.
    ResponseBody = 1,
    /// Body of the answer to a call of ours.
    CallResponseBody = 4,
    /// Plugin configuration.
    PluginConfiguration = 7,
}

const OK: u32 = 0;
const NOT_FOUND: u32 = 1;
/// What a read that came back short is reported as.
pub(crate) const BAD_ARGUMENT: HostError = HostError(2);
/// `proxy_metric_type_t`.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum MetricType {
    /// Goes up.
    Counter = 0,
    /// Goes up and down.
    Gauge = 1,
    /// Takes values.
    Histogram = 2,
}

const NO_GRPC_STATUS: i32 = -1;

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_log(level: u32, data: *const u8, size: usize) -> u32;
    fn proxy_get_buffer_bytes(
        kind: u32,
        start: usize,
        max: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> u32;
    fn proxy_get_buffer_status(kind: u32, length: *mut usize, flags: *mut u32) -> u32;
    fn proxy_set_buffer_bytes(kind: u32, start: usize, length: usize, data: *const u8, size: usize) -> u32;
    fn proxy_get_header_map_value(
        map: u32,
        key: *const u8,
        key_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> u32;
    fn proxy_get_header_map_pairs(map: u32, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_replace_header_map_value(
        map: u32,
        key: *const u8,
        key_size: usize,
        value: *const u8,
        value_size: usize,
    ) -> u32;
    fn proxy_remove_header_map_value(map: u32, key: *const u8, key_size: usize) -> u32;
    fn proxy_get_property(path: *const u8, path_size: usize, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_get_shared_data(
        key: *const u8,
        key_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
        cas: *mut u32,
    ) -> u32;
    fn proxy_set_shared_data(
        key: *const u8,
        key_size: usize,
        value: *const u8,
        value_size: usize,
        cas: u32,
    ) -> u32;
    fn proxy_get_current_time_nanoseconds(time: *mut u64) -> u32;
    fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
    fn proxy_set_property(path: *const u8, path_size: usize, value: *const u8, value_size: usize) -> u32;
    fn proxy_define_metric(kind: u32, name: *const u8, size: usize, id: *mut u32) -> u32;
    fn proxy_increment_metric(id: u32, by: i64) -> u32;
    fn proxy_record_metric(id: u32, value: u64) -> u32;
    fn proxy_set_effective_context(context: u32) -> u32;
    fn proxy_http_call(
        cluster: *const u8,
        cluster_size: usize,
        headers: *const u8,
        headers_size: usize,
        body: *const u8,
        body_size: usize,
        trailers: *const u8,
        trailers_size: usize,
        timeout_ms: u32,
        token: *mut u32,
    ) -> u32;
    fn proxy_continue_stream(stream: u32) -> u32;
    fn proxy_send_local_response(
        status: u32,
        details: *const u8,
        details_size: usize,
        body: *const u8,
        body_size: usize,
        headers: *const u8,
        headers_size: usize,
        grpc_status: i32,
    ) -> u32;
}

fn checked(status: u32) -> Result<(), HostError> {
    if status == OK { Ok(()) } else { Err(HostError(status)) }
}

/// Bytes that the host allocated in our memory through `proxy_on_memory_allocate`.
fn owned(data: *mut u8, size: usize) -> Vec<u8> {
    if data.is_null() {
        return Vec::new();
    }
    // SAFETY: the host obtained `data` from this module's `abi::proxy_on_memory_allocate(size)` (a
    // boxed slice of that length), wrote all `size` bytes, and gives up ownership by returning it.
    unsafe { Vec::from_raw_parts(data, size, size) }
}

/// `proxy_log` with the level's number in the ABI: 2 info, 3 warn, 4 error.
pub(crate) fn log(level: u32, line: &str) {
    // SAFETY: pointer and length are of a live slice, which the host only reads.
    unsafe { proxy_log(level, line.as_ptr(), line.len()) };
}

pub(crate) fn buffer(kind: BufferType, start: usize, max: usize) -> Result<Vec<u8>, HostError> {
    let (mut data, mut size) = (core::ptr::null_mut(), 0);
    // SAFETY: both out-pointers are live locals of the right type.
    match unsafe { proxy_get_buffer_bytes(kind as u32, start, max, &mut data, &mut size) } {
        NOT_FOUND => Ok(Vec::new()),
        status => checked(status).map(|()| owned(data, size)),
    }
}

pub(crate) fn header(map: MapType, name: &str) -> Result<Option<Vec<u8>>, HostError> {
    let (mut data, mut size) = (core::ptr::null_mut(), 0);
    // SAFETY: the name is a live slice, both out-pointers are live locals of the right type.
    let status =
        unsafe { proxy_get_header_map_value(map as u32, name.as_ptr(), name.len(), &mut data, &mut size) };
    match status {
        NOT_FOUND => Ok(None),
        // A host may answer OK with no pointer for a header that is not there.
        status => checked(status).map(|()| (!data.is_null()).then(|| owned(data, size))),
    }
}

/// All headers of a map: one call instead of one for each, of which each calls back for memory.
pub(crate) fn headers(map: MapType) -> Result<HeaderMap, HostError> {
    let (mut data, mut size) = (core::ptr::null_mut(), 0);
    // SAFETY: both out-pointers are live locals of the right type.
    checked(unsafe { proxy_get_header_map_pairs(map as u32, &mut data, &mut size) })?;
    Ok(HeaderMap::new(owned(data, size)))
}

pub(crate) fn set_header(map: MapType, name: &str, value: &str) -> Result<(), HostError> {
    // SAFETY: pointers and lengths are of live slices, which the host only reads.
    checked(unsafe {
        proxy_replace_header_map_value(map as u32, name.as_ptr(), name.len(), value.as_ptr(), value.len())
    })
}

pub(crate) fn remove_header(map: MapType, name: &str) -> Result<(), HostError> {
    // SAFETY: pointer and length are of a live slice, which the host only reads.
    match unsafe { proxy_remove_header_map_value(map as u32, name.as_ptr(), name.len()) } {
        NOT_FOUND => Ok(()),
        status => checked(status),
    }
}

/// `path` has a NUL between its elements.
pub(crate) fn property(path: &str) -> Result<Option<Vec<u8>>, HostError> {
    let (mut data, mut size) = (core::ptr::null_mut(), 0);
    // SAFETY: the path is a live slice, both out-pointers are live locals of the right type.
    match unsafe { proxy_get_property(path.as_ptr(), path.len(), &mut data, &mut size) } {
        NOT_FOUND => Ok(None),
        status => checked(status).map(|()| Some(owned(data, size))),
    }
}

/// A shared value and its compare-and-swap number.
pub(crate) fn shared(key: &str) -> Result<Option<(Vec<u8>, u32)>, HostError> {
    let (mut data, mut size, mut cas) = (core::ptr::null_mut(), 0, 0);
    // SAFETY: the key is a live slice, the out-pointers are live locals of the right type.
    match unsafe { proxy_get_shared_data(key.as_ptr(), key.len(), &mut data, &mut size, &mut cas) } {
        NOT_FOUND => Ok(None),
        status => checked(status).map(|()| Some((owned(data, size), cas))),
    }
}

pub(crate) fn set_shared(key: &str, value: &[u8], cas: u32) -> Result<(), HostError> {
    // SAFETY: pointers and lengths are of live slices, which the host only reads.
    checked(unsafe { proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), cas) })
}

/// The proxy's clock; 0 if it has none.
pub(crate) fn now_ns() -> u64 {
    let mut time = 0;
    // SAFETY: the out-pointer is a live local of the right type.
    match checked(unsafe { proxy_get_current_time_nanoseconds(&mut time) }) {
        Ok(()) => time,
        Err(_) => 0,
    }
}

pub(crate) fn tick_every(milliseconds: u32) -> Result<(), HostError> {
    // SAFETY: takes no pointers.
    checked(unsafe { proxy_set_tick_period_milliseconds(milliseconds) })
}

/// Calls a cluster of the proxy's; the answer comes with the returned number.
pub(crate) fn call(call: &Call<'_>) -> Result<u32, HostError> {
    let (headers, trailers) = (serialised(call.headers), serialised(&[]));
    let mut token = 0;
    // SAFETY: pointers and lengths are of live slices, which the host only reads; the out-pointer is a live local.
    checked(unsafe {
        proxy_http_call(
            call.cluster.as_ptr(),
            call.cluster.len(),
            headers.as_ptr(),
            headers.len(),
            call.body.as_ptr(),
            call.body.len(),
            trailers.as_ptr(),
            trailers.len(),
            call.timeout_ms,
            &mut token,
        )
    })
    .map(|()| token)
}

/// `path` is one element: a NUL inside it would split it.
pub(crate) fn set_property(path: &str, value: &str) -> Result<(), HostError> {
    // SAFETY: pointers and lengths are of live slices, which the host only reads.
    checked(unsafe { proxy_set_property(path.as_ptr(), path.len(), value.as_ptr(), value.len()) })
}

/// Puts `bytes` in the place of all that the host has of this body now.
pub(crate) fn set_buffer(kind: BufferType, bytes: &[u8]) -> Result<(), HostError> {
    let (mut length, mut flags) = (0, 0);
    // SAFETY: both out-pointers are live locals of the right type.
    checked(unsafe { proxy_get_buffer_status(kind as u32, &mut length, &mut flags) })?;
    // SAFETY: pointer and length are of a live slice, which the host only reads.
    checked(unsafe { proxy_set_buffer_bytes(kind as u32, 0, length, bytes.as_ptr(), bytes.len()) })
}

pub(crate) fn define_metric(kind: MetricType, name: &str) -> Result<u32, HostError> {
    let mut id = 0;
    // SAFETY: the name is a live slice, the out-pointer a live local.
    checked(unsafe { proxy_define_metric(kind as u32, name.as_ptr(), name.len(), &mut id) }).map(|()| id)
}

pub(crate) fn increment(id: u32, by: i64) -> Result<(), HostError> {
    // SAFETY: takes no pointers.
    checked(unsafe { proxy_increment_metric(id, by) })
}

/// Sets a gauge, adds a value to a histogram.
pub(crate) fn record(id: u32, value: u64) -> Result<(), HostError> {
    // SAFETY: takes no pointers.
    checked(unsafe { proxy_record_metric(id, value) })
}

/// Has the calls that follow concern another context.
pub(crate) fn set_effective_context(context: u32) -> Result<(), HostError> {
    // SAFETY: takes no pointers.
    checked(unsafe { proxy_set_effective_context(context) })
}

/// Lets a paused request (0) or response (1) of the effective context go on, once this callback is over.
pub(crate) fn continue_stream(stream: u32) -> Result<(), HostError> {
    // SAFETY: takes no pointers.
    checked(unsafe { proxy_continue_stream(stream) })
}

/// Answers in the upstream's place. `details` goes to `%RESPONSE_CODE_DETAILS%`.
pub(crate) fn send_local_response(
    status: u16,
    details: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Result<(), HostError> {
    let headers = serialised(headers);
    // SAFETY: pointers and lengths are of live slices, which the host only reads.
    checked(unsafe {
        proxy_send_local_response(
            u32::from(status),
            details.as_ptr(),
            details.len(),
            body.as_ptr(),
            body.len(),
            headers.as_ptr(),
            headers.len(),
            NO_GRPC_STATUS,
        )
    })
}

/// Header pairs in the ABI's form: count, sizes, then each string with a NUL.
fn serialised(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(&(pairs.len() as u32).to_le_bytes());
    for (name, value) in pairs {
        out.extend_from_slice(&(name.len() as u32).to_le_bytes());
        out.extend_from_slice(&(value.len() as u32).to_le_bytes());
    }
    for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
        out.extend_from_slice(text.as_bytes());
        out.push(0);
    }
    out
}
