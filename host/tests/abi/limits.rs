//! Crashes, loops, memory and buffers: what a guest cannot break.

use std::time::{Duration, Instant};

use driftlock_host::abi::{AbiError, Direction, Limits, Plugin, PluginOptions, Release, Step};

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
