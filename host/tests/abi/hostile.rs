//! Guests that pass whatever they like: every pointer is checked, no argument breaks the host.

use driftlock_host::abi::{Limits, PluginOptions, Step};

use crate::guest::{IMPORTS, Run, Sent, WASI, get, headers, ok};

/// Every call that takes a pointer, with one that lies outside; each must say InvalidMemoryAccess.
#[test]
fn pointers_outside_the_memory_are_refused() {
    // 131072 is the end of memory; a range that starts inside and ends outside counts too.
    let calls = [
        "$log (i32.const 0) (i32.const 131072) (i32.const 1)",
        "$log (i32.const 0) (i32.const 131071) (i32.const 2)",
        "$log (i32.const 0) (i32.const -1) (i32.const -1)",
        "$log (i32.const 0) (i32.const 0) (i32.const -1)",
        "$get_log_level (i32.const 131069)",
        "$get_current_time_nanoseconds (i32.const 131065)",
        "$get_buffer_bytes (i32.const 0) (i32.const 0) (i32.const 9) (i32.const 0) (i32.const -1)",
        "$get_buffer_bytes (i32.const 0) (i32.const 0) (i32.const 9) (i32.const -4) (i32.const 0)",
        "$get_buffer_status (i32.const 0) (i32.const -1) (i32.const 0)",
        "$set_buffer_bytes (i32.const 0) (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 9)",
        "$get_header_map_pairs (i32.const 6) (i32.const 131070) (i32.const 0)",
        "$set_header_map_pairs (i32.const 0) (i32.const 1) (i32.const 131072)",
        "$get_header_map_value (i32.const 0) (i32.const -1) (i32.const 1) (i32.const 0) (i32.const 4)",
        "$add_header_map_value (i32.const 0) (i32.const 0) (i32.const 1) (i32.const -1) (i32.const 1)",
        "$replace_header_map_value (i32.const 0) (i32.const -1) (i32.const 1) (i32.const 0) (i32.const 1)",
        "$remove_header_map_value (i32.const 0) (i32.const 131072) (i32.const 1)",
        "$get_status (i32.const -2) (i32.const 0) (i32.const 0)",
        "$send_local_response (i32.const 200) (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 0)",
        "$send_local_response (i32.const 200) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 1) (i32.const 0)",
        "$http_call (i32.const -1) (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)",
        "$get_shared_data (i32.const -1) (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 0)",
        "$set_shared_data (i32.const 0) (i32.const 1) (i32.const -1) (i32.const 1) (i32.const 0)",
        "$register_shared_queue (i32.const 0) (i32.const 1) (i32.const -1)",
        "$resolve_shared_queue (i32.const -1) (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 0)",
        "$enqueue_shared_queue (i32.const 1) (i32.const -1) (i32.const 1)",
        "$define_metric (i32.const 0) (i32.const 0) (i32.const 1) (i32.const -1)",
        "$define_metric (i32.const 0) (i32.const -1) (i32.const 1) (i32.const 0)",
        "$get_property (i32.const -1) (i32.const 1) (i32.const 0) (i32.const 0)",
        "$set_property (i32.const 0) (i32.const 1) (i32.const -1) (i32.const 1)",
        "$call_foreign_function (i32.const -1) (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)",
    ];
    let mut guest = String::from(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))
        (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)"#,
    );
    for call in calls {
        guest += &format!("(call $say (call {call}))\n");
    }
    guest += "(i32.const 0))";
    let mut run = Run::new(&guest);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    run.plugin.request_body(id, b"0123456789", true).unwrap();
    let said = run.said();
    assert_eq!(said.len(), calls.len());
    for (status, call) in said.iter().zip(calls) {
        assert_eq!(status, "6", "{call}");
    }
}

#[test]
fn an_allocator_that_lies_is_caught() {
    for (lie, status) in [("0", "6"), ("-8", "6"), ("131060", "6")] {
        let text = crate::guest::wat(
            r#"(func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
            (call $say (call $get_buffer_bytes (i32.const 0) (i32.const 0) (i32.const 99)
              (i32.const 0) (i32.const 4)))
            (i32.const 0))"#,
        )
        .replace("(local.get $at))\n;; Logs a", &format!("(i32.const {lie}))\n;; Logs a"));
        let module = driftlock_host::abi::Module::compile(&wat::parse_str(&text).unwrap()).unwrap();
        let mut run = Run::of(&module, PluginOptions::default());
        let id = run.plugin.stream().unwrap();
        run.plugin.request_headers(id, get("/"), false).unwrap();
        run.plugin.request_body(id, b"0123456789abcdef", true).unwrap();
        assert_eq!(run.said(), [status], "allocator returns {lie}");
    }
}

#[test]
fn an_allocator_that_crashes_is_a_crash_of_the_guest() {
    let text = crate::guest::wat(
        r#"(func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (drop (call $get_buffer_bytes (i32.const 0) (i32.const 0) (i32.const 99)
          (i32.const 0) (i32.const 4)))
        (i32.const 0))"#,
    )
    .replace("(local.set $at (global.get $heap))", "unreachable");
    let module = driftlock_host::abi::Module::compile(&wat::parse_str(&text).unwrap()).unwrap();
    let mut run = Run::of(&module, PluginOptions::default());
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    assert!(run.plugin.request_body(id, b"0123", true).is_err());
    assert!(run.plugin.is_poisoned());
}

/// A guest that calls every import with arguments from a generator that likes edges, from every
/// callback. Nothing may crash: not the host, not even the guest.
#[test]
fn no_argument_breaks_the_host() {
    let mut calls = String::new();
    let imports = IMPORTS.iter().map(|(name, types)| (name.trim_start_matches("proxy_"), *types, true));
    let wasi = WASI.iter().copied();
    for (name, types, returns) in imports.chain(wasi) {
        if name == "log" || name == "fd_write" || name == "proc_exit" {
            continue; // they only fill the test's memory with lines
        }
        let args: String = types
            .chars()
            .map(|c| if c == 'l' { "(i64.extend_i32_s (call $any))" } else { "(call $any)" })
            .collect();
        let call = format!("(call ${name} {args})");
        calls += &if returns { format!("(drop {call})\n") } else { call };
    }
    let guest = format!(
        r#"(global $seed (mut i32) (i32.const 12345))
        (func $any (result i32)
          (local $r i32)
          (global.set $seed (i32.add (i32.mul (global.get $seed) (i32.const 1664525)) (i32.const 1013904223)))
          (local.set $r (i32.shr_u (global.get $seed) (i32.const 16)))
          (global.set $heap (i32.const 65536))
          (block $b7 (block $b6 (block $b5 (block $b4 (block $b3 (block $b2 (block $b1 (block $b0
            (br_table $b0 $b1 $b2 $b3 $b4 $b5 $b6 $b7 (i32.and (local.get $r) (i32.const 15))))
            (return (i32.const 0))) (return (i32.const 1))) (return (i32.const 2)))
            (return (i32.const 4))) (return (i32.const 64))) (return (i32.const 131068)))
            (return (i32.const -1)))
          (i32.and (local.get $r) (i32.const 255)))
        (func $all {calls})
        (func (export "proxy_on_tick") (param i32) (call $all))
        (func $part (param i32 i32 i32) (result i32) (call $all) (i32.and (call $any) (i32.const 3)))
        (func $trailers (param i32 i32) (result i32) (call $all) (i32.and (call $any) (i32.const 1)))
        (export "proxy_on_request_headers" (func $part))
        (export "proxy_on_request_body" (func $part))
        (export "proxy_on_request_trailers" (func $trailers))
        (export "proxy_on_response_headers" (func $part))
        (export "proxy_on_response_body" (func $part))
        (export "proxy_on_response_trailers" (func $trailers))
        (func (export "proxy_on_log") (param i32) (call $all))
        (func (export "proxy_on_done") (param i32) (result i32) (call $all) (i32.const 1))
        (func (export "proxy_on_delete") (param i32) (call $all))"#
    );
    let mut run = Run::with(
        &guest,
        PluginOptions {
            limits: Limits { request_buffer_bytes: 10, response_buffer_bytes: 10, ..Limits::default() },
            ..PluginOptions::default()
        },
    );
    let mut outcomes = [0; 4];
    for _ in 0..2000 {
        let plugin = &mut run.plugin;
        plugin.tick().unwrap();
        let id = plugin.stream().unwrap();
        let steps = [
            plugin.request_headers(id, get("/"), false),
            plugin.request_body(id, b"hello", false),
            plugin.request_body(id, b"world", false),
            plugin.request_trailers(id, headers(&[("t", "1")])),
            plugin.response_headers(id, ok(), false),
            plugin.response_body(id, b"hello", false),
            plugin.response_body(id, b"!", true),
        ];
        for step in steps {
            outcomes[match step.unwrap() {
                Step::Forward(_) => 0,
                Step::Hold => 1,
                Step::Reply(_) => 2,
                Step::Close => 3,
            }] += 1;
        }
        plugin.take_events();
        for call in Sent::by(plugin).http {
            plugin.http_call_response(call.id, None).unwrap();
        }
        plugin.deliver_queues().unwrap();
        assert_eq!(plugin.done(id).unwrap().error, None);
        run.said();
    }
    assert!(outcomes.iter().all(|count| *count > 0), "the generator reaches all: {outcomes:?}");
}
