//! From bytes to a configured plugin, and why it may not get there.

use driftlock_host::abi::{
    AbiError, AbiVersion, CacheUse, Clock, CompileOptions, LogLevel, LogSink, Module, Plugin, PluginOptions,
    Randomness, VirtualClock,
};

use crate::guest::{Run, headers, module, wat};

fn compile(text: &str) -> Result<Module, AbiError> {
    Module::compile(&wat::parse_str(text).unwrap())
}

#[test]
fn every_import_of_the_abi_links() {
    assert_eq!(module("").abi_version(), AbiVersion::V0_2_1);
    assert!(!Run::new("").plugin.is_poisoned());
}

#[test]
fn what_is_no_filter_is_refused_with_its_reason() {
    assert!(matches!(Module::compile(b"\0asm?"), Err(AbiError::Compile { .. })));
    assert_eq!(compile("(module)").unwrap_err(), AbiError::NotProxyWasm);
    assert_eq!(
        compile(r#"(module (func (export "proxy_abi_version_0_1_0")))"#).unwrap_err(),
        AbiError::UnsupportedAbi { found: "proxy_abi_version_0_1_0".to_owned() }
    );
    let both = r#"(module (func (export "proxy_abi_version_0_2_0"))
        (func (export "proxy_abi_version_0_1_0")))"#;
    assert_eq!(compile(both).unwrap().abi_version(), AbiVersion::V0_2_0);
}

#[test]
fn every_unknown_import_is_named() {
    let text = r#"(module
        (import "env" "proxy_log" (func (param i32 i32 i32) (result i32)))
        (import "env" "proxy_teleport" (func (param i32)))
        (import "wasi_snapshot_preview1" "sock_teleport" (func (result i32)))
        (func (export "proxy_abi_version_0_2_1")))"#;
    let error = compile(text).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the module imports what this host does not offer: env.proxy_teleport, \
         wasi_snapshot_preview1.sock_teleport"
    );
    let global = r#"(module (import "env" "g" (global i32))
        (func (export "proxy_abi_version_0_2_1")))"#;
    assert!(matches!(compile(global), Err(AbiError::UnknownImport { names }) if names == ["env.g"]));
}

#[test]
fn wrong_types_are_refused_and_named() {
    let import = r#"(module (import "env" "proxy_log" (func (param i32) (result i32)))
        (func (export "proxy_abi_version_0_2_1")))"#;
    let error = compile(import).unwrap_err();
    assert!(matches!(&error, AbiError::WrongType { message, .. } if message.contains("proxy_log")));

    let export = module(r#"(func (export "proxy_on_tick") (param i64))"#);
    let error = Plugin::start(&export, PluginOptions::default()).unwrap_err();
    assert!(matches!(&error, AbiError::WrongType { name, .. } if name.contains("proxy_on_tick")));
}

const FORMS: &str = r#"
    (func (export "proxy_on_context_create") (param i32 i32)
      (call $say (local.get 0)) (call $say (local.get 1)))
    (func (export "proxy_on_vm_start") (param i32 i32) (result i32)
      (call $say (local.get 1)) (i32.const 1))
    (func (export "proxy_on_configure") (param i32 i32) (result i32)
      (call $say (local.get 1)) (i32.const 1))"#;

#[test]
fn a_reactor_is_initialised_then_its_main_runs() {
    let options = || PluginOptions {
        vm_configuration: vec![0; 3],
        plugin_configuration: vec![0; 4],
        ..PluginOptions::default()
    };
    let reactor = r#"(func (export "_initialize") (call $say (i32.const 100)))
        (func (export "main") (param i32 i32) (result i32) (call $say (i32.const 101)) (i32.const 0))
        (func (export "_start") (unreachable))"#;
    let run = Run::with(&format!("{reactor}{FORMS}"), options());
    assert_eq!(run.said(), ["100", "101", "1", "0", "3", "4"]);

    let command = r#"(func (export "_start") (call $say (i32.const 102)))
        (func (export "main") (param i32 i32) (result i32) (unreachable))"#;
    let run = Run::with(&format!("{command}{FORMS}"), options());
    assert_eq!(run.said(), ["102", "1", "0", "3", "4"]);

    assert_eq!(Run::with(FORMS, options()).said(), ["1", "0", "3", "4"]);
}

#[test]
fn a_refused_configuration_says_why() {
    let refuse = r#"
      (data (i32.const 0) "unknown field `alhpa`ignore me")
      (func (export "proxy_on_configure") (param i32 i32) (result i32)
        (drop (call $log (i32.const 2) (i32.const 21) (i32.const 9)))
        (drop (call $log (i32.const 4) (i32.const 0) (i32.const 21)))
        (i32.const 0))"#;
    // The sink drops errors, and still the operator learns the reason.
    let options = PluginOptions { log: LogSink::discard(), ..PluginOptions::default() };
    let error = Plugin::start(&module(refuse), options).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the filter refused its configuration in proxy_on_configure; it last said: unknown field \
         `alhpa`"
    );

    let refuse = r#"(func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 0))"#;
    let error = Plugin::start(&module(refuse), PluginOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "the filter refused its configuration in proxy_on_vm_start");
}

#[test]
fn a_crash_at_the_start_says_where() {
    let error = |body: &str| Plugin::start(&module(body), PluginOptions::default()).unwrap_err();
    assert!(matches!(
        error(r#"(func $s (unreachable)) (start $s)"#),
        AbiError::Start { message, .. } if message.contains("unreachable")
    ));
    assert!(matches!(
        error(r#"(func (export "_initialize") (unreachable))"#),
        AbiError::Trap { callback: "_initialize", message, .. } if message.contains("unreachable")
    ));
}

#[test]
fn the_configuration_is_readable_while_configuring_and_not_later() {
    let read = r#"
      (func $read (param $kind i32)
        (call $say (call $get_buffer_bytes (local.get $kind) (i32.const 1) (i32.const 99)
          (i32.const 0) (i32.const 4)))
        (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4))))
      (func (export "proxy_on_configure") (param i32 i32) (result i32)
        (call $read (i32.const 7)) (call $read (i32.const 6)) (i32.const 1))
      (func (export "proxy_on_tick") (param i32)
        (i64.store (i32.const 0) (i64.const 0))
        (call $read (i32.const 7)) (call $read (i32.const 6)))"#;
    let mut run = Run::with(
        read,
        PluginOptions {
            plugin_configuration: b"plugin".to_vec(),
            vm_configuration: b"vm".to_vec(),
            ..PluginOptions::default()
        },
    );
    assert_eq!(run.said(), ["0", "lugin", "0", "m"]);
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["1", "", "0", "m"]);
}

const AMBIENT: &str = r#"
  (func (export "proxy_on_tick") (param i32)
    (drop (call $get_current_time_nanoseconds (i32.const 0)))
    (call $say (i32.load (i32.const 0)))
    (drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 0)))
    (call $say (i32.load (i32.const 0)))
    (call $say (call $clock_time_get (i32.const 2) (i64.const 0) (i32.const 0)))
    (drop (call $random_get (i32.const 0) (i32.const 4)))
    (call $say (i32.load (i32.const 0)))
    (call $say (call $random_get (i32.const 0) (i32.const 65537)))
    (drop (call $environ_sizes_get (i32.const 0) (i32.const 4)))
    (call $say (i32.load (i32.const 0)))
    (drop (call $environ_get (i32.const 8) (i32.const 100)))
    (call $tell (i32.load (i32.const 8)) (i32.load (i32.const 4)))
    (call $say (i32.sub (i32.load (i32.const 12)) (i32.load (i32.const 8))))
    (drop (call $get_log_level (i32.const 0)))
    (call $say (i32.load (i32.const 0))))"#;

#[test]
fn time_randomness_and_environment_are_the_callers() {
    let clock = VirtualClock::at_ns(7);
    let options = PluginOptions {
        clock: Clock::Virtual(clock.clone()),
        randomness: Randomness::Seeded(1),
        environment: vec![("A".into(), "b".into()), ("C".into(), String::new())],
        ..PluginOptions::default()
    };
    let mut run = Run::with(AMBIENT, options.clone());
    run.plugin.tick().unwrap();
    let first = run.said();
    assert_eq!(first[..3], ["7", "7", "58"]);
    assert_eq!(first[4..], ["28", "2", "A=b\0C=\0", "4", "0"]);
    clock.set_ns(8);
    let mut again = Run::with(AMBIENT, options);
    again.plugin.tick().unwrap();
    let second = again.said();
    assert_eq!(second[..2], ["8", "8"]);
    assert_eq!(second[3], first[3], "one seed, one sequence");
}

#[test]
fn standard_output_becomes_log_lines() {
    let write = r#"
      (data (i32.const 100) "one two\n")
      (func (export "proxy_on_tick") (param i32)
        (i32.store (i32.const 0) (i32.const 100)) (i32.store (i32.const 4) (i32.const 4))
        (i32.store (i32.const 8) (i32.const 104)) (i32.store (i32.const 12) (i32.const 4))
        (call $say (call $fd_write (i32.const 2) (i32.const 0) (i32.const 2) (i32.const 16)))
        (call $say (i32.load (i32.const 16)))
        (call $say (call $fd_write (i32.const 3) (i32.const 0) (i32.const 2) (i32.const 16)))
        (call $say (call $fd_write (i32.const 1) (i32.const -8) (i32.const 2) (i32.const 16))))"#;
    let mut run = Run::new(write);
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["one two", "0", "8", "8", "21"]);
}

#[test]
fn compiled_code_is_kept_on_disk_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("cache");
    let options = CompileOptions { cache_directory: Some(directory.clone()), ..CompileOptions::default() };
    let bytes = wat::parse_str(wat("")).unwrap();
    let used = || Module::compile_with(&bytes, &options).unwrap().cache_use().clone();
    assert_eq!(used(), CacheUse::Miss);
    assert_eq!(used(), CacheUse::Hit);

    let entries: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(entries.len(), 1);
    let whole = std::fs::read(&entries[0]).unwrap();
    // One bit anywhere, or a lost end: compiled again, never run.
    for at in [0, 9, 41, whole.len() / 2, whole.len() - 1] {
        let mut rotten = whole.clone();
        rotten[at] ^= 1;
        std::fs::write(&entries[0], rotten).unwrap();
        assert!(matches!(used(), CacheUse::Replaced { .. }), "bit at {at}");
        assert_eq!(used(), CacheUse::Hit);
    }
    for length in [0, 5, 30, whole.len() - 1] {
        std::fs::write(&entries[0], &whole[..length]).unwrap();
        assert!(matches!(used(), CacheUse::Replaced { .. }), "cut at {length}");
    }
    // Another setting is another entry.
    let metered = CompileOptions { fuel: true, ..options.clone() };
    assert_eq!(*Module::compile_with(&bytes, &metered).unwrap().cache_use(), CacheUse::Miss);
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 2);

    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(used(), CacheUse::Unusable { .. }), "others may write there");
    }
}

#[test]
fn properties_of_the_plugin_and_the_host_are_readable() {
    let ask = r#"
      (data (i32.const 100) "plugin_name\00plugin_root_id\00plugin_vm_id\00node\00id\00request\00path")
      (func $ask (param i32 i32)
        (call $say (call $get_property (local.get 0) (local.get 1) (i32.const 0) (i32.const 4)))
        (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4))))
      (func (export "proxy_on_tick") (param i32)
        (call $ask (i32.const 100) (i32.const 11))
        (call $ask (i32.const 112) (i32.const 14))
        (call $ask (i32.const 127) (i32.const 12))
        (call $ask (i32.const 140) (i32.const 7))
        (call $ask (i32.const 148) (i32.const 12))
        (call $say (call $set_property (i32.const 100) (i32.const 4) (i32.const 100) (i32.const 4))))"#;
    let mut run = Run::with(
        ask,
        PluginOptions {
            name: "n".into(),
            root_id: "r".into(),
            vm_id: "v".into(),
            properties: vec![(vec!["node".into(), "id".into()], "gw-1".into())],
            ..PluginOptions::default()
        },
    );
    run.plugin.tick().unwrap();
    // A request property outside a stream is NotFound, and so is filter state.
    assert_eq!(run.said(), ["0", "n", "0", "r", "0", "v", "0", "gw-1", "1", "gw-1", "1"]);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, headers(&[]), true).unwrap();
}

#[test]
fn the_level_a_guest_is_told_is_the_sinks() {
    let level = r#"(func (export "proxy_on_tick") (param i32)
        (drop (call $get_log_level (i32.const 0)))
        (if (i32.ne (i32.load (i32.const 0)) (i32.const 3)) (then unreachable)))"#;
    let options = PluginOptions { log: LogSink::new(LogLevel::Warn, |_| {}), ..PluginOptions::default() };
    let mut plugin = Plugin::start(&module(level), options).unwrap();
    plugin.tick().unwrap();
}
