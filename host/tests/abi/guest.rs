//! A frame for WAT guests: all imports of ABI 0.2.1, an allocator, and `$say`, which logs a number.

use std::sync::{Arc, Mutex};

use driftlock_host::abi::{
    GrpcCall, GrpcStream, HeaderMap, HttpCall, LogLevel, LogLine, LogSink, Module, Plugin, PluginOptions,
    Release, Step, Transport,
};

/// Name, parameters (i: i32, l: i64) of every `env` import of ABI 0.2.1; each returns an i32 status.
/// Written down from the specification, apart from the host's own table.
pub(crate) const IMPORTS: [(&str, &str); 39] = [
    ("proxy_log", "iii"),
    ("proxy_get_log_level", "i"),
    ("proxy_get_current_time_nanoseconds", "i"),
    ("proxy_set_tick_period_milliseconds", "i"),
    ("proxy_set_effective_context", "i"),
    ("proxy_done", ""),
    ("proxy_call_foreign_function", "iiiiii"),
    ("proxy_get_buffer_bytes", "iiiii"),
    ("proxy_get_buffer_status", "iii"),
    ("proxy_set_buffer_bytes", "iiiii"),
    ("proxy_get_header_map_size", "ii"),
    ("proxy_get_header_map_pairs", "iii"),
    ("proxy_set_header_map_pairs", "iii"),
    ("proxy_get_header_map_value", "iiiii"),
    ("proxy_add_header_map_value", "iiiii"),
    ("proxy_replace_header_map_value", "iiiii"),
    ("proxy_remove_header_map_value", "iii"),
    ("proxy_continue_stream", "i"),
    ("proxy_close_stream", "i"),
    ("proxy_get_status", "iii"),
    ("proxy_send_local_response", "iiiiiiii"),
    ("proxy_http_call", "iiiiiiiiii"),
    ("proxy_grpc_call", "iiiiiiiiiiii"),
    ("proxy_grpc_stream", "iiiiiiiii"),
    ("proxy_grpc_send", "iiii"),
    ("proxy_grpc_cancel", "i"),
    ("proxy_grpc_close", "i"),
    ("proxy_get_shared_data", "iiiii"),
    ("proxy_set_shared_data", "iiiii"),
    ("proxy_register_shared_queue", "iii"),
    ("proxy_resolve_shared_queue", "iiiii"),
    ("proxy_enqueue_shared_queue", "iii"),
    ("proxy_dequeue_shared_queue", "iii"),
    ("proxy_define_metric", "iiii"),
    ("proxy_record_metric", "il"),
    ("proxy_increment_metric", "il"),
    ("proxy_get_metric", "ii"),
    ("proxy_get_property", "iiii"),
    ("proxy_set_property", "iiii"),
];

/// The WASI functions that SDK-built guests import.
pub(crate) const WASI: [(&str, &str, bool); 8] = [
    ("fd_write", "iiii", true),
    ("clock_time_get", "ili", true),
    ("random_get", "ii", true),
    ("environ_get", "ii", true),
    ("environ_sizes_get", "ii", true),
    ("args_get", "ii", true),
    ("args_sizes_get", "ii", true),
    ("proc_exit", "i", false),
];

fn params(signature: &str) -> String {
    let types: Vec<_> = signature.chars().map(|c| if c == 'l' { "i64" } else { "i32" }).collect();
    format!("(param {})", types.join(" "))
}

/// The text of a guest with `body` inside: functions are called by the import's name without
/// `proxy_`; memory from 0 to 4095 is the guest's to lay out, `$say` uses 4096 to 4127, the heap
/// starts at 64 KiB.
pub(crate) fn wat(body: &str) -> String {
    let mut text = String::from("(module\n");
    for (name, signature) in IMPORTS {
        let short = name.trim_start_matches("proxy_");
        let types = params(signature);
        text += &format!("(import \"env\" \"{name}\" (func ${short} {types} (result i32)))\n");
    }
    for (name, signature, returns) in WASI {
        let types = params(signature);
        let result = if returns { "(result i32)" } else { "" };
        text += &format!("(import \"wasi_snapshot_preview1\" \"{name}\" (func ${name} {types} {result}))\n");
    }
    text += r#"
(memory (export "memory") 2)
(global $heap (mut i32) (i32.const 65536))
(func (export "proxy_abi_version_0_2_1"))
(func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
  (local $at i32)
  (if (i32.gt_u (local.get $size) (i32.const 33554432)) (then (return (i32.const 0))))
  (local.set $at (global.get $heap))
  (global.set $heap (i32.add (global.get $heap) (local.get $size)))
  (if (i32.gt_u (global.get $heap) (i32.mul (memory.size) (i32.const 65536)))
    (then (drop (memory.grow (i32.add (i32.const 1) (i32.div_u (local.get $size) (i32.const 65536)))))))
  (local.get $at))
;; Logs a number in decimal, at info.
(func $say (param $n i32)
  (local $at i32)
  (local.set $at (i32.const 4128))
  (loop $digit
    (local.set $at (i32.sub (local.get $at) (i32.const 1)))
    (i32.store8 (local.get $at) (i32.add (i32.const 48) (i32.rem_u (local.get $n) (i32.const 10))))
    (local.set $n (i32.div_u (local.get $n) (i32.const 10)))
    (br_if $digit (local.get $n)))
  (drop (call $log (i32.const 2) (local.get $at) (i32.sub (i32.const 4128) (local.get $at)))))
;; Logs bytes, at info.
(func $tell (param $ptr i32) (param $len i32)
  (drop (call $log (i32.const 2) (local.get $ptr) (local.get $len))))
"#;
    text += body;
    text += ")";
    text
}

pub(crate) fn module(body: &str) -> Module {
    let text = wat(body);
    let bytes = wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    Module::compile(&bytes).unwrap_or_else(|error| panic!("{error}"))
}

/// A plugin whose log lines can be read.
pub(crate) struct Run {
    pub(crate) plugin: Plugin,
    lines: Arc<Mutex<Vec<LogLine>>>,
}

impl Run {
    pub(crate) fn new(body: &str) -> Self {
        Self::with(body, PluginOptions::default())
    }

    pub(crate) fn with(body: &str, options: PluginOptions) -> Self {
        Self::of(&module(body), options)
    }

    pub(crate) fn of(module: &Module, mut options: PluginOptions) -> Self {
        let (log, lines) = LogSink::capture(LogLevel::Trace);
        options.log = log;
        let plugin = Plugin::start(module, options).unwrap_or_else(|error| panic!("{error}"));
        Self { plugin, lines }
    }

    /// The messages logged since the last time.
    pub(crate) fn said(&self) -> Vec<String> {
        let lines = std::mem::take(&mut *self.lines.lock().unwrap());
        lines.into_iter().map(|line| line.message).collect()
    }
}

/// What a plugin sent out.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    pub(crate) http: Vec<HttpCall>,
    pub(crate) calls: Vec<GrpcCall>,
    pub(crate) streams: Vec<GrpcStream>,
    /// What happened on streams, in words.
    pub(crate) on_streams: Vec<String>,
}

impl Sent {
    pub(crate) fn by(plugin: &mut Plugin) -> Self {
        let mut sent = Self::default();
        plugin.send_callouts(&mut sent);
        sent
    }
}

impl Transport for Sent {
    fn http_call(&mut self, call: HttpCall) {
        self.http.push(call);
    }

    fn grpc_call(&mut self, call: GrpcCall) {
        self.calls.push(call);
    }

    fn grpc_stream(&mut self, stream: GrpcStream) {
        self.streams.push(stream);
    }

    fn grpc_send(&mut self, id: u32, message: Vec<u8>, end_of_stream: bool) {
        let message = String::from_utf8_lossy(&message);
        self.on_streams.push(format!("send {id} {message} {end_of_stream}"));
    }

    fn grpc_close(&mut self, id: u32) {
        self.on_streams.push(format!("close {id}"));
    }

    fn grpc_cancel(&mut self, id: u32) {
        self.on_streams.push(format!("cancel {id}"));
    }
}

pub(crate) fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    pairs.iter().copied().collect()
}

pub(crate) fn get(path: &str) -> HeaderMap {
    headers(&[(":method", "GET"), (":path", path), (":authority", "a")])
}

pub(crate) fn ok() -> HeaderMap {
    headers(&[(":status", "200")])
}

/// The release of a step that forwards.
#[track_caller]
pub(crate) fn forwarded(step: Step) -> Release {
    match step {
        Step::Forward(release) => release,
        other => panic!("not forwarded: {other:?}"),
    }
}

/// The body of a step that forwards only a body.
#[track_caller]
pub(crate) fn body_of(step: Step) -> String {
    let release = forwarded(step);
    assert!(!release.headers && !release.trailers);
    String::from_utf8(release.body).unwrap()
}
