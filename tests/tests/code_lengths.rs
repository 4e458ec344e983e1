//! Compressors, metrics and contrast in wasm and in native code: the same numbers to the bit.
#![allow(missing_docs)]

use driftlock_tests::workspace;
use wasmtime::{Engine, Instance, Module, Store};

#[allow(dead_code, unreachable_pub, reason = "the exports are for the wasm build")]
#[path = "../../engine/examples/code_lengths.rs"]
mod code_lengths;

/// The same file built for wasm32, where zstd's C code is compiled by clang and words have 32 bits.
#[test]
fn wasm_and_native_code_agree() {
    let built = "target/wasm32-unknown-unknown/debug/examples/code_lengths.wasm";
    let path = std::env::var_os("DRIFTLOCK_CODE_LENGTHS")
        .map_or_else(|| workspace().join(built), std::path::PathBuf::from);
    assert!(
        path.is_file(),
        "there is no {}: run `cargo build --package driftlock-engine --example code_lengths --features zstd --target wasm32-unknown-unknown`",
        path.display()
    );
    let engine = Engine::default();
    let module = Module::from_file(&engine, &path).expect("the example is a module");
    let mut store = Store::new(&engine, ());
    let instance = Instance::new(&mut store, &module, &[]).expect("it imports nothing");
    let count = instance.get_typed_func::<(), i32>(&mut store, "count").expect("it exports count");
    let value = instance.get_typed_func::<i32, i64>(&mut store, "value").expect("it exports value");
    let native = code_lengths::values();
    assert_eq!(count.call(&mut store, ()).expect("it counts"), native.len() as i32);
    let in_wasm: Vec<u64> = (0..native.len())
        .map(|at| value.call(&mut store, at as i32).expect("it gives a value") as u64)
        .collect();
    assert_eq!(in_wasm, native);
    let refused = native.iter().filter(|value| **value == u64::MAX).count();
    assert!(native.len() > 250 && refused * 3 < native.len(), "{refused} of {} refused", native.len());
}
