//! A proxy-wasm host: runs any module of ABI 0.2.0 or 0.2.1 on wasmtime, and knows no HTTP server
//! and no detection engine.
//!
//! It exists so that the filter that runs in Envoy also runs in `driftlock gateway` and
//! `driftlock replay`, with the same answers; where the ABI leaves room, Envoy decides. A caller
//! compiles a [`Module`] once, starts a [`Plugin`] per thread, and for each exchange opens a
//! [`StreamId`], reports what arrives and obeys the [`Step`] it gets:
//!
//! ```text
//! stream() → request_headers → request_body* → [request_trailers]
//!          → response_headers → response_body* → [response_trailers] → done()
//! after any of them: take_events(), send_callouts()
//! ```
//!
//! TCP connections go `connection() → connection_data()* → connection_closed() → done()`.
//!
//! Authors of filters find a test kit in [`kit`].
//!
//! Cost: a callback that does nothing takes well under a microsecond; body bytes are copied once into
//! the host and once into the guest when it asks for them. Memory: the guest's (bounded by
//! [`Limits::memory_bytes`]), what is buffered per stream (bounded too), nothing else grows.
//!
//! Left out on purpose: ABI 0.1.0; several plugins in one VM (each has its own, so that a crash takes
//! one filter, not all; shared data and queues go by `vm_id` all the same).

mod cache;
mod callout;
mod clock;
mod error;
mod exchange;
mod exports;
mod foreign;
mod headers;
mod host;
mod imports;
pub mod kit;
mod log;
mod memory;
mod metrics;
mod module;
mod network;
mod options;
mod plugin;
mod pool;
mod property;
mod root;
mod shared;
mod status;
mod stream;
mod tape;
mod wasi;

pub use cache::CacheUse;
pub use callout::{GrpcCall, GrpcEvent, GrpcStream, HttpCall, HttpCallResponse, Transport};
pub use clock::{Clock, Randomness, VirtualClock};
pub use error::{AbiError, LastWords};
pub use foreign::{ForeignFunction, ForeignFunctions};
pub use headers::{HeaderMap, PAIRS_MAX_BYTES, PAIRS_MAX_COUNT};
pub use log::{LogLevel, LogLine, LogSink};
pub use metrics::{HISTOGRAM_BOUNDS, METRICS_MAX_COUNT, MetricKind, MetricSample, MetricValue, Metrics};
pub use module::{AbiVersion, CompileOptions, Module};
pub use network::{ClosedBy, Peer};
pub use options::{Limits, PluginOptions};
pub use plugin::{Ended, Plugin, Prepared, StreamId};
pub use pool::{Disposition, FailurePolicy, Pool, Recovery};
pub use property::PropertyValue;
pub use shared::{SHARED_DEFAULT_BYTES, SHARED_QUEUES_MAX_COUNT, SharedState};
pub use status::{Direction, MapType, Status};
pub use stream::{Event, HeadersPause, LocalReply, Release, Step};
pub use tape::{Answer, HostCall, TAPE_MAX_ENTRIES, Tape, TapeEntry, Value};
