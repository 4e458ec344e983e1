//! Time of each hot path and, beside it in the same run, of what it is compared with.
//!
//! `cargo bench -p driftlock-benches --bench hot_paths [FILTER]`. Beside the paths of the library, one
//! exchange through the real filter in wasmtime against native inspection, and one callback of the host's
//! proxy-wasm ABI against a bare call into a wasm function.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use driftlock_benches::paths;
use driftlock_host::abi::{HeaderMap, LogSink, Module, Plugin, PluginOptions};
use driftlock_host::capture::Exchange;
use driftlock_host::replay::wasm::WasmReplay;
use driftlock_host::replay::{find_filter, native, wire};
use driftlock_host::synth::{SynthOptions, generate};
use driftlock_host::train::{train, with_baseline};
use driftlock_inspect::config::Config;
use driftlock_inspect::session;

fn library(c: &mut Criterion) {
    for mut path in paths() {
        path.check();
        let mut group = c.benchmark_group(&path.name);
        group.throughput(Throughput::Bytes(path.bytes)).sample_size(10);
        group.bench_function("driftlock", |b| b.iter(|| path.check()));
        let (name, beside) = &mut path.beside;
        group.bench_function(*name, |b| b.iter(|| black_box(beside())));
        group.finish();
    }
}

/// The filter, as `cargo xtask build` leaves it.
fn filter() -> Option<Module> {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/driftlock_filter.wasm");
    let path = if dist.is_file() { dist } else { find_filter(None) };
    let Ok(bytes) = std::fs::read(&path) else {
        eprintln!("no filter in {}: `cargo xtask build` makes one; its bench is left out", path.display());
        return None;
    };
    Some(Module::compile(&bytes).expect("the filter compiles"))
}

fn filter_exchange(c: &mut Criterion) {
    let Some(module) = filter() else { return };
    let traffic = generate(&SynthOptions { count: 2500, ..SynthOptions::default() });
    let exchanges: Vec<Exchange> = traffic.into_iter().map(|labelled| labelled.exchange).collect();
    let config = |bytes: &[u8]| Config::parse(bytes).expect("a configuration");
    let snapshot = train(exchanges.clone(), config(b""), 0).expect("a baseline").snapshot.encode();
    let quiet = serde_json::json!({"report": {"log": "never"}});
    let configuration = with_baseline(&quiet, Some(&snapshot));
    let chat = exchanges.into_iter().find(|it| it.request.target.starts_with("/v1/chat"));
    let exchange = wire::on_the_wire(chat.expect("the generator makes chats")).expect("it can be sent");
    let mut plugin = session::Plugin::new(config(&configuration));
    let mut vm = WasmReplay::start(&module, configuration).expect("the filter starts");
    let expected = native::inspect(&mut plugin, &exchange);
    let bytes = exchange.request.body.len() + exchange.response.as_ref().map_or(0, |it| it.body.len());
    let mut group = c.benchmark_group("exchange/chat");
    group.throughput(Throughput::Bytes(bytes as u64)).sample_size(20);
    group.bench_function("filter in wasmtime", |b| {
        b.iter(|| assert_eq!(vm.inspect(&exchange).expect("the filter runs"), expected));
    });
    group.bench_function("native", |b| {
        b.iter(|| assert_eq!(native::inspect(&mut plugin, &exchange), expected))
    });
    group.finish();
}

/// A guest that lets everything pass, and exports a function beside.
const GUEST: &str = r#"(module (memory (export "memory") 1)
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 0))
  (func (export "proxy_on_context_create") (param i32 i32))
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))
  (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (i32.const 0))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.const 1))
  (func (export "proxy_on_delete") (param i32))
  (func (export "bare") (param i32) (result i32) (local.get 0)))"#;

fn abi_callback(c: &mut Criterion) {
    let bytes = wat::parse_str(GUEST).expect("the guest is well-formed");
    let module = Module::compile(&bytes).expect("it compiles");
    let options = PluginOptions { log: LogSink::discard(), ..PluginOptions::default() };
    let mut plugin = Plugin::start(&module, options).expect("it starts");
    let stream = plugin.stream().expect("a stream");
    plugin.request_headers(stream, HeaderMap::default(), false).expect("headers pass");
    let mut group = c.benchmark_group("abi callback");
    group.bench_function("request body of no bytes", |b| {
        b.iter(|| black_box(plugin.request_body(stream, &[], false).expect("it passes")));
    });
    let engine = wasmtime::Engine::default();
    let bare = wasmtime::Module::new(&engine, &bytes).expect("it compiles");
    let mut store = wasmtime::Store::new(&engine, ());
    let instance = wasmtime::Instance::new(&mut store, &bare, &[]).expect("it imports nothing");
    let bare = instance.get_typed_func::<i32, i32>(&mut store, "bare").expect("it exports it");
    group.bench_function("bare call", |b| {
        b.iter(|| assert_eq!(bare.call(&mut store, 7).expect("it returns"), 7));
    });
    group.finish();
}

criterion_group!(benches, library, filter_exchange, abi_callback);
criterion_main!(benches);
