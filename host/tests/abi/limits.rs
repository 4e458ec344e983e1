//! Crashes, loops, memory and buffers: what a guest cannot break.

use std::time::{Duration, Instant};

use driftlock_host::abi::{
    AbiError, CompileOptions, Direction, Limits, LogLevel, LogSink, Module, Plugin, PluginOptions, Pool,
    Release, SharedState, Step,
};

use crate::guest::{Run, forwarded, get, module, ok};

fn options(limits: Limits) -> PluginOptions {
    PluginOptions { limits, ..PluginOptions::default() }
}

#[test]
fn a_crash_loses_its_own_vm_and_nothing_else() {
    let guest = module(
        r#"(data (i32.const 0) "panicked at 'boom'")
        (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
          (if (i32.eqz (local.get 2)) (then (return (i32.const 1))))
          (drop (call $log (i32.const 5) (i32.const 0) (i32.const 18)))
          unreachable)"#,
    );
    let mut first = Run::of(&guest, PluginOptions::default());
    let mut second = Run::of(&guest, PluginOptions::default());
    let id = first.plugin.stream().unwrap();
    first.plugin.request_headers(id, get("/"), false).unwrap();
    first.plugin.request_body(id, b"ab", false).unwrap();
    let error = first.plugin.request_body(id, b"c", true).unwrap_err();
    assert!(
        matches!(&error, AbiError::Trap { callback: "proxy_on_request_body", message, .. }
            if message.contains("unreachable")),
        "{error:?}"
    );
    assert!(error.to_string().contains("panicked at 'boom'"), "{error}");
    assert!(first.plugin.is_poisoned());
    let poisoned = first.plugin.request_body(id, b"d", true).unwrap_err();
    assert!(matches!(&poisoned, AbiError::Poisoned { reason } if reason.contains("boom")));
    assert!(first.plugin.stream().is_err());
    assert!(first.plugin.tick().is_err());
    // A caller that fails open gets the bytes back.
    assert_eq!(
        first.plugin.salvage(id, Direction::Request),
        Ok(Release { body: b"abc".to_vec(), end_of_stream: true, ..Release::default() })
    );
    assert_eq!(first.plugin.done(id).unwrap().error, None);
    assert_eq!(first.plugin.stream_count(), 0);

    let id = second.plugin.stream().unwrap();
    second.plugin.request_headers(id, get("/"), false).unwrap();
    assert_eq!(second.plugin.request_body(id, b"ab", false), Ok(Step::Hold));
    assert!(!second.plugin.is_poisoned());
}

#[test]
fn headers_held_at_a_crash_are_salvaged_too() {
    let guest = r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 1))
      (func (export "proxy_on_tick") (param i32) unreachable)"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    run.plugin.request_body(id, b"ab", false).unwrap();
    run.plugin.tick().unwrap_err();
    let release = run.plugin.salvage(id, Direction::Request).unwrap();
    assert!(release.headers && !release.end_of_stream);
    assert_eq!(release.body, b"ab");
    assert_eq!(run.plugin.salvage(id, Direction::Response), Ok(Release::default()));
}

#[test]
fn a_crash_in_the_last_callbacks_is_reported_with_what_is_left() {
    let guest = r#"(data (i32.const 0) "kv")
      (func (export "proxy_on_log") (param i32)
        (drop (call $set_property (i32.const 0) (i32.const 1) (i32.const 1) (i32.const 1)))
        unreachable)"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    let ended = run.plugin.done(id).unwrap();
    assert!(matches!(ended.error, Some(AbiError::Trap { callback: "proxy_on_log", .. })));
    assert_eq!(ended.filter_state["wasm.k"], b"v");
}

#[test]
fn a_guest_that_never_returns_is_stopped() {
    let limits = Limits {
        callback_deadline: Duration::from_millis(50),
        start_deadline: Duration::from_millis(80),
        ..Limits::default()
    };
    let mut run = Run::with(
        r#"(func (export "proxy_on_tick") (param i32) (loop $l (br $l)))"#,
        options(limits.clone()),
    );
    let before = Instant::now();
    let error = run.plugin.tick().unwrap_err();
    assert!(before.elapsed() < Duration::from_secs(10));
    assert!(before.elapsed() >= Duration::from_millis(50), "stopped too early");
    assert!(matches!(error, AbiError::Deadline { callback: "proxy_on_tick", limit_ms: 50, .. }));
    assert!(run.plugin.is_poisoned());

    let endless = module(r#"(func (export "_initialize") (loop $l (br $l)))"#);
    let error = Plugin::start(&endless, options(limits)).unwrap_err();
    assert!(matches!(error, AbiError::Deadline { callback: "_initialize", limit_ms: 80, .. }));
}

#[test]
fn fuel_stops_a_guest_at_the_same_place_every_time() {
    let guest = wat::parse_str(crate::guest::wat(
        r#"(global $n (mut i32) (i32.const 0))
        (func (export "proxy_on_queue_ready") (param i32 i32) (call $say (global.get $n)))
        (func (export "proxy_on_tick") (param i32)
          (loop $l (global.set $n (i32.add (global.get $n) (i32.const 1)))
            (if (i32.eqz (i32.and (global.get $n) (i32.const 1023))) (then (call $say (global.get $n))))
            (br $l)))"#,
    ))
    .unwrap();
    let metered = CompileOptions { fuel: true, ..CompileOptions::default() };
    let metered = Module::compile_with(&guest, &metered).unwrap();
    let limits = Limits { callback_fuel: Some(1_000_000), ..Limits::default() };
    let mut said = Vec::new();
    for _ in 0..2 {
        let mut run = Run::of(&metered, options(limits.clone()));
        let error = run.plugin.tick().unwrap_err();
        let AbiError::OutOfFuel { callback: "proxy_on_tick", fuel: 1_000_000, .. } = error else {
            panic!("{error}");
        };
        said.push(run.said());
    }
    assert!(said[0].len() > 10);
    assert_eq!(said[0], said[1]);
    // No limit set, none enforced; a limit on code that does not count is refused.
    Run::of(&metered, PluginOptions::default()).plugin.stream().unwrap();
    let plain = Module::compile(&guest).unwrap();
    assert!(matches!(Plugin::start(&plain, options(limits)), Err(AbiError::Start { .. })));
}

#[test]
fn no_deadline_stops_an_unwatched_guest() {
    // A tick far beyond the deadline, that ends.
    let guest = wat::parse_str(crate::guest::wat(
        r#"(global $n (mut i64) (i64.const 0))
        (func (export "proxy_on_tick") (param i32)
          (loop $l (global.set $n (i64.add (global.get $n) (i64.const 1)))
            (br_if $l (i64.lt_u (global.get $n) (i64.const 400000000)))))"#,
    ))
    .unwrap();
    let limits = Limits { callback_deadline: Duration::from_millis(20), ..Limits::default() };
    let tick = |unwatched| {
        let compile = CompileOptions { unwatched, ..CompileOptions::default() };
        let module = Module::compile_with(&guest, &compile).unwrap();
        Run::of(&module, options(limits.clone())).plugin.tick()
    };
    assert!(matches!(tick(false), Err(AbiError::Deadline { callback: "proxy_on_tick", .. })));
    tick(true).unwrap();
}

#[test]
fn tables_are_bounded() {
    let guest = r#"(table $t 10 funcref)
      (func (export "proxy_on_tick") (param i32)
        (call $say (table.grow $t (ref.null func) (i32.const 5)))
        (call $say (i32.add (table.grow $t (ref.null func) (i32.const 50)) (i32.const 1))))"#;
    let limits = Limits { table_elements: 20, ..Limits::default() };
    let mut run = Run::with(guest, options(limits));
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["10", "0"]);
}

#[test]
fn a_warm_vm_starts_without_having_touched_what_is_shared() {
    let guest = module(
        r#"(data (i32.const 100) "q")
        (func (export "_initialize") (drop (call $log (i32.const 2) (i32.const 100) (i32.const 1))))
        (func (export "proxy_on_configure") (param i32 i32) (result i32)
          (drop (call $define_metric (i32.const 0) (i32.const 100) (i32.const 1) (i32.const 0)))
          (i32.const 1))"#,
    );
    let (log, lines) = LogSink::capture(LogLevel::Trace);
    let shared = SharedState::new();
    let options = PluginOptions { log, shared: shared.clone(), ..PluginOptions::default() };
    let pool = Pool::new(guest, options, 2);
    pool.fill().unwrap();
    assert_eq!((pool.warm_count(), lines.lock().unwrap().len()), (2, 2));
    assert_eq!(shared.metrics().snapshot().len(), 0, "no root context yet");
    for left in [1, 0, 0] {
        pool.start().unwrap().stream().unwrap();
        assert_eq!(pool.warm_count(), left);
    }
    assert_eq!(shared.metrics().snapshot().len(), 1);
}

#[test]
fn endless_recursion_is_a_crash_of_the_guest() {
    let mut run = Run::new(
        r#"(func $f (param i32) (call $f (i32.add (local.get 0) (i32.const 1))))
        (func (export "proxy_on_tick") (param i32) (call $f (i32.const 0)))"#,
    );
    let error = run.plugin.tick().unwrap_err();
    assert!(matches!(&error, AbiError::Trap { message, .. } if message.contains("stack")), "{error}");
}

#[test]
fn memory_is_bounded_and_measured() {
    let guest = r#"(func (export "proxy_on_tick") (param i32)
        (call $say (memory.grow (i32.const 2)))
        (call $say (i32.add (memory.grow (i32.const 100)) (i32.const 1))))"#;
    let limits = Limits { memory_bytes: 10 * 65536, ..Limits::default() };
    let mut run = Run::with(guest, options(limits));
    assert_eq!(run.plugin.memory_bytes(), 2 * 65536);
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["2", "0"], "the second growth is refused");
    assert_eq!(run.plugin.memory_bytes(), 4 * 65536);

    let limits = Limits { memory_bytes: 65536, ..Limits::default() };
    let error = Plugin::start(&module(""), options(limits)).unwrap_err();
    assert!(matches!(&error, AbiError::Start { message, .. } if message.contains("memory")), "{error}");
}

const PAUSE: &str = r#"
  (func $pause (param i32 i32 i32) (result i32) (call $say (local.get 1)) (i32.const 1))
  (export "proxy_on_request_body" (func $pause))
  (export "proxy_on_response_body" (func $pause))
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
    (call $say (i32.const 1000)) (i32.const 0))"#;

fn small() -> PluginOptions {
    options(Limits { request_buffer_bytes: 4, response_buffer_bytes: 4, ..Limits::default() })
}

#[test]
fn a_request_over_the_limit_is_413_after_one_last_callback() {
    let mut run = Run::with(PAUSE, small());
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    assert_eq!(run.plugin.request_body(id, b"abcd", false), Ok(Step::Hold), "the limit fits");
    let Step::Reply(reply) = run.plugin.request_body(id, b"e", false).unwrap() else {
        panic!("no reply");
    };
    assert_eq!((reply.status, reply.details.as_str()), (413, "request_payload_too_large"));
    assert_eq!(run.said(), ["4", "5"], "Envoy shows what was too much, and ignores the answer");
    assert_eq!(run.plugin.request_body(id, b"f", true), Ok(Step::Hold));
    assert_eq!(run.plugin.held_bytes(id, Direction::Request), 0);
    // The reply itself passes the response callbacks, as in Envoy.
    run.plugin.response_headers(id, reply.response_headers(), false).unwrap();
    assert_eq!(run.said(), ["1000"]);

    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    let step = run.plugin.request_body(id, b"abcde", false).unwrap();
    assert!(matches!(step, Step::Reply(reply) if reply.status == 413), "one chunk too large");
}

#[test]
fn a_response_over_the_limit_is_reset_once_it_began() {
    let mut run = Run::with(PAUSE, small());
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), true).unwrap();
    run.plugin.response_headers(id, ok(), false).unwrap();
    assert_eq!(run.plugin.response_body(id, b"abc", false), Ok(Step::Hold));
    assert_eq!(run.plugin.response_body(id, b"de", false), Ok(Step::Close));
}

#[test]
fn a_response_over_the_limit_is_500_while_its_headers_are_held() {
    // 3: StopAllIterationAndBuffer, the one headers pause that the limit ends.
    let guest = r#"(func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
        (i32.const 3))"#;
    let mut run = Run::with(guest, small());
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), true).unwrap();
    assert_eq!(run.plugin.response_headers(id, ok(), false), Ok(Step::Hold));
    let Step::Reply(reply) = run.plugin.response_body(id, b"abcde", false).unwrap() else {
        panic!("no reply");
    };
    assert_eq!((reply.status, reply.through_response_callbacks), (500, false));
}

#[test]
fn a_body_that_is_not_paused_has_no_limit() {
    let mut run = Run::with("", small());
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    let release = forwarded(run.plugin.request_body(id, &[7; 100], true).unwrap());
    assert_eq!(release.body.len(), 100);
}

#[test]
fn a_plugin_can_move_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Plugin>();
    let mut run = Run::new("");
    std::thread::spawn(move || run.plugin.tick().unwrap()).join().unwrap();
}

/// The least of many batches is what the machine's other work leaves untouched.
#[test]
fn a_callback_that_does_nothing_costs_at_most_two_microseconds() {
    let mut run = Run::new(
        r#"(func $none (param i32 i32 i32) (result i32) (i32.const 0))
        (export "proxy_on_request_body" (func $none)) (func (export "proxy_on_tick") (param i32))"#,
    );
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    const CALLS: u32 = 1000;
    let mut least = [Duration::MAX; 2];
    for _ in 0..100 {
        let start = Instant::now();
        for _ in 0..CALLS {
            run.plugin.tick().unwrap();
        }
        least[0] = least[0].min(start.elapsed() / CALLS);
        let start = Instant::now();
        for _ in 0..CALLS {
            run.plugin.request_body(id, b"0123456789abcdef", false).unwrap();
        }
        least[1] = least[1].min(start.elapsed() / CALLS);
    }
    println!("tick: {:?}, body of 16 bytes: {:?}", least[0], least[1]);
    assert!(least.iter().all(|cost| *cost <= Duration::from_micros(2)), "{least:?}");
}

/// Prints what a callback costs. Run with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn cost_of_a_callback() {
    let guest = r#"
      (func $none (param i32 i32 i32) (result i32) (i32.const 0))
      (export "proxy_on_request_headers" (func $none))
      (export "proxy_on_request_body" (func $none))
      (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
        (global.set $heap (i32.const 65536))
        (drop (call $get_buffer_bytes (i32.const 1) (i32.const 0) (i32.const -1) (i32.const 0) (i32.const 4)))
        (i32.const 0))
      (func (export "proxy_on_tick") (param i32))"#;
    const ROUNDS: u32 = 200_000;
    let mut run = Run::new(guest);
    let start = Instant::now();
    for _ in 0..ROUNDS {
        run.plugin.tick().unwrap();
    }
    println!("tick: {:?}", start.elapsed() / ROUNDS);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    run.plugin.response_headers(id, ok(), false).unwrap();
    for size in [16, 4096, 65536] {
        let chunk = vec![7; size];
        let start = Instant::now();
        for _ in 0..ROUNDS / 10 {
            run.plugin.request_body(id, &chunk, false).unwrap();
        }
        println!("body of {size}, not read: {:?}", start.elapsed() / (ROUNDS / 10));
        let start = Instant::now();
        for _ in 0..ROUNDS / 10 {
            run.plugin.response_body(id, &chunk, false).unwrap();
        }
        println!("body of {size}, read: {:?}", start.elapsed() / (ROUNDS / 10));
    }
    let map = get("/chat/completions");
    let start = Instant::now();
    for _ in 0..ROUNDS {
        let id = run.plugin.stream().unwrap();
        run.plugin.request_headers(id, map.clone(), true).unwrap();
        run.plugin.done(id).unwrap();
    }
    println!("a stream of headers only: {:?}", start.elapsed() / ROUNDS);
}
