//! Integration fixtures: the only crate that may import everything.
//!
//! What: where the filter and Envoy are, generated traffic, a baseline trained on it, and three ways to
//! pass an exchange that does not behave: [`drive::Native`] and [`drive::Vm`], callback by callback, and
//! [`proxy::Proxy`], a real proxy with a raw client before it and a planned upstream behind it.
//!
//! Why here: a promise such as "the same verdict in native code, in wasmtime and in Envoy" belongs to no
//! single crate.
//!
//! Cost: compiling the module once a test program (a second), an Envoy about half a second. Left out on
//! purpose: load (see `benches/`) and skipping. A test that lacks the filter or Envoy fails and names the
//! command that installs it.

pub mod attach;
pub mod drive;
pub mod proxy;
pub mod wire;

use std::path::PathBuf;
use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use driftlock_engine::baseline::Snapshot;
use driftlock_host::abi::Module;
use driftlock_host::capture::Exchange;
use driftlock_host::envoy::find_binary;
use driftlock_host::synth::{self, SynthOptions};
use driftlock_host::train::train;
use driftlock_inspect::config::Config;
use serde_json::{Value, json};

/// The alpha of [`baseline`], and of the configurations made with it.
pub const ALPHA: f64 = 0.01;

/// The workspace's root.
pub fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The filter module: the one that `DRIFTLOCK_FILTER` names, else that of `dist/`.
///
/// # Panics
/// If it is not there, naming the command that builds it.
pub fn filter() -> PathBuf {
    let path = std::env::var_os("DRIFTLOCK_FILTER")
        .map_or_else(|| workspace().join("dist/driftlock_filter.wasm"), PathBuf::from);
    assert!(path.is_file(), "there is no filter at {}: run `cargo xtask build`", path.display());
    path
}

/// The driftlock program: the one that `DRIFTLOCK_BINARY` names, else that of `dist/`.
///
/// # Panics
/// If it is not there, naming the command that builds it.
pub fn program() -> PathBuf {
    let path = std::env::var_os("DRIFTLOCK_BINARY")
        .map_or_else(|| workspace().join("dist/driftlock"), PathBuf::from);
    assert!(path.is_file(), "there is no program at {}: run `cargo xtask build`", path.display());
    path
}

/// The filter module, compiled once a test program.
///
/// # Panics
/// If it is not there or does not compile.
pub fn module() -> &'static Module {
    static MODULE: OnceLock<Module> = OnceLock::new();
    MODULE.get_or_init(|| {
        let bytes = std::fs::read(filter()).expect("the filter can be read");
        Module::compile(&bytes).expect("the filter compiles; run `cargo xtask build`")
    })
}

/// The Envoy binary.
///
/// # Panics
/// If there is none, naming the command that installs it.
pub fn envoy_binary() -> PathBuf {
    find_binary(None).unwrap_or_else(|error| panic!("{error}"))
}

/// A Python that has the clients and fakellm: the one that `DRIFTLOCK_CLIENTS` names, else that of `target/clients`.
///
/// # Panics
/// If it is not there, naming the command that installs it.
pub fn clients_python() -> PathBuf {
    let path = std::env::var_os("DRIFTLOCK_CLIENTS")
        .map_or_else(|| workspace().join("target/clients/bin/python3"), PathBuf::from);
    assert!(path.is_file(), "no clients at {}: run `cargo xtask clients`", path.display());
    path
}

/// Generated exchanges, anomalies among them.
pub fn traffic(seed: u64, count: usize, anomalies: usize) -> Vec<Exchange> {
    synth::generate(&SynthOptions { seed, count, anomalies, ..SynthOptions::default() })
        .into_iter()
        .map(|labelled| labelled.exchange)
        .collect()
}

/// A baseline trained on generated normals for [`ALPHA`]; the same bytes in every run.
///
/// # Panics
/// If training fails.
pub fn baseline() -> &'static Snapshot {
    static BASELINE: OnceLock<Snapshot> = OnceLock::new();
    BASELINE.get_or_init(|| {
        let config =
            Config::parse(json!({"alpha": ALPHA}).to_string().as_bytes()).expect("a good configuration");
        train(traffic(11, 1500, 0), config, 5).expect("enough to train on").snapshot
    })
}

/// The plugin configuration `fields` with [`baseline`], its alpha, and no learning unless `fields` asks.
///
/// # Panics
/// If `fields` is no object.
pub fn trained(fields: Value) -> Vec<u8> {
    let mut all = json!({"alpha": ALPHA, "learn": null, "baseline": STANDARD.encode(baseline().encode())});
    let all_fields = all.as_object_mut().expect("an object");
    for (name, value) in fields.as_object().expect("an object of fields") {
        all_fields.insert(name.clone(), value.clone());
    }
    all.to_string().into_bytes()
}

/// The workspace's recorded exchanges, where this machine has them: they are not part of the project.
pub fn recorded() -> Option<PathBuf> {
    let path = workspace().join("../shared/data/llm_exchanges.jsonl.gz");
    path.is_file().then_some(path)
}
