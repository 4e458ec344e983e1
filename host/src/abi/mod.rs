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
//! # Differences from Envoy 1.40
//!
//! All that were found by running the same guests in both (`tests/abi/envoy.rs`, `tests/abi/through.rs`)
//! or by reading its source; each is deliberate.
//!
//! | Envoy | here | why |
//! |---|---|---|
//! | plugins with the same `vm_id`, code and VM configuration share one VM | each plugin has its own | a crash takes one filter; shared data and queues go by `vm_id` all the same |
//! | header pairs that do not parse count as none: `set_header_map_pairs` then wipes the map | `BadArgument` | a guest's mistake must not strip a message |
//! | a local reply may have any status | `BadArgument` outside 200 to 599 | there is no such response |
//! | every definition of a metric gets another id | one id per kind and name | definitions in a loop do not grow the table |
//! | a gauge wraps below zero | stops at zero | 2^64 - 1 is never a level |
//! | buffer `CallData` is whichever buffer was named last | only what `proxy_on_foreign_function` got | an accident, not a feature |
//! | WASI: no monotonic clock, no `poll_oneoff` | both | runtimes sleep and measure with them |
//! | unknown imports keep a module from loading, one named | all are named | one round of fixing instead of many |
//! | bytes that a TCP filter stops on their way from the upstream are lost | kept, and shown with the next | a filter that waits for a whole message works |
//! | foreign functions `expr_*`, `sign`, `verify_signature`, `set_envoy_filter_state` | `NotFound` unless registered | each brings a language, a library or Envoy's own types along |
//! | the text of a gRPC call-out's status ends with response code details | the server's text alone | a filter compares it |
//! | properties `upstream.*` and `response.backend_latency` | `NotFound` in the gateway | filters are not told of the upstream's connection |
//! | properties `request` and `filter_state` as a whole: `SerializationFailure` | `NotFound` | there is no such value either way |
//! | gRPC through `google_grpc` | `BadArgument` | another client with its own credentials |
//! | `compress` encodes as its zlib does | other bytes of the same format | another encoder |
//! | after a buffer went over its limit the access log still shows it | it is freed | bounded memory |
//! | unbounded: shared data, queues, filter state, header maps, call-outs, metrics | bounded, see [`Limits`] and the constants here; then `InternalFailure` or `BadArgument` | a guest in a loop must not take the process along |
//!
//! In the gateway beside these: a status line has the usual reason phrase (Envoy writes `Unknown` for some);
//! a 503 for a broken filter says so in its body; trailers of HTTP/1.1 go on where both sides announced
//! them (RFC 9110, 6.5.1); no `x-forwarded-proto` is added; a response broken off right after its headers
//! may break off before they left.
//!
//! Left out on purpose: ABI 0.1.0 and its callbacks; HTTP/2 metadata callbacks, which no SDK offers.

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
