//! Shared data, queues, metrics, ticks, foreign functions, the end of a plugin.

use std::time::Duration;

use driftlock_host::abi::{Limits, MetricValue, PluginOptions, SharedState, Status};

use crate::guest::{Run, Sent, get, module};

/// A tick reads key "k", says its value, then writes "v2" under the cas it read.
const SHARED: &str = r#"
  (data (i32.const 100) "kv1v2")
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (drop (call $set_shared_data (i32.const 100) (i32.const 1) (i32.const 101) (i32.const 2) (i32.const 0)))
    (i32.const 1))
  (func $read
    (call $say (call $get_shared_data (i32.const 100) (i32.const 1) (i32.const 0) (i32.const 4) (i32.const 8)))
    (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4))))
  (func (export "proxy_on_tick") (param i32)
    (call $read)
    (call $say (call $set_shared_data (i32.const 100) (i32.const 1) (i32.const 103) (i32.const 2)
      (i32.load (i32.const 8))))
    ;; The same cas again is stale now.
    (call $say (call $set_shared_data (i32.const 100) (i32.const 1) (i32.const 101) (i32.const 2)
      (i32.load (i32.const 8))))
    (call $say (call $get_shared_data (i32.const 101) (i32.const 1) (i32.const 0) (i32.const 4) (i32.const 8))))"#;

#[test]
fn shared_data_is_compared_and_swapped_between_vms_of_one_id() {
    let guest = module(SHARED);
    let shared = SharedState::new();
    let options = |vm_id: &str| PluginOptions {
        vm_id: vm_id.to_owned(),
        shared: shared.clone(),
        ..PluginOptions::default()
    };
    let mut first = Run::of(&guest, options("a"));
    let mut second = Run::of(&guest, options("a"));
    let mut other = Run::of(&guest, options("b"));
    first.plugin.tick().unwrap();
    assert_eq!(first.said(), ["0", "v1", "0", "8", "1"]);
    second.plugin.tick().unwrap();
    assert_eq!(second.said(), ["0", "v2", "0", "8", "1"]);
    other.plugin.tick().unwrap();
    assert_eq!(other.said(), ["0", "v1", "0", "8", "1"], "another vm_id is another space");
    assert_eq!(shared.value("a", b"k").map(|(value, _)| value), Some(b"v2".to_vec()));
}

/// Dequeues one item a notification.
const QUEUE: &str = r#"
  (data (i32.const 100) "qitem")
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (call $say (call $register_shared_queue (i32.const 100) (i32.const 1) (i32.const 0)))
    (call $say (i32.load (i32.const 0)))
    (i32.const 1))
  (func (export "proxy_on_tick") (param i32)
    (call $say (call $resolve_shared_queue (i32.const 0) (i32.const 0) (i32.const 101) (i32.const 1) (i32.const 0)))
    (call $say (call $resolve_shared_queue (i32.const 0) (i32.const 0) (i32.const 100) (i32.const 1) (i32.const 0)))
    (call $say (call $enqueue_shared_queue (i32.load (i32.const 0)) (i32.const 101) (i32.const 4)))
    (call $say (call $enqueue_shared_queue (i32.const 99) (i32.const 101) (i32.const 4))))
  (func (export "proxy_on_queue_ready") (param i32 i32)
    (call $say (local.get 1))
    (drop (call $dequeue_shared_queue (local.get 1) (i32.const 0) (i32.const 4)))
    (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4)))
    (call $say (call $dequeue_shared_queue (local.get 1) (i32.const 0) (i32.const 4))))"#;

#[test]
fn the_vm_that_registered_a_queue_last_is_told_of_its_items() {
    let guest = module(QUEUE);
    let options = PluginOptions::default();
    let mut first = Run::of(&guest, options.clone());
    let mut last = Run::of(&guest, options);
    assert_eq!(first.said(), ["0", "1"]);
    assert_eq!(last.said(), ["0", "1"]);
    first.plugin.tick().unwrap();
    assert_eq!(first.said(), ["1", "0", "0", "1"]);
    assert_eq!(first.plugin.deliver_queues(), Ok(0));
    assert_eq!(last.plugin.deliver_queues(), Ok(1));
    assert_eq!(last.said(), ["1", "item", "7"]);
}

#[test]
fn every_item_of_a_queue_is_told_of_and_its_vm_woken() {
    let queue = r#"
      (data (i32.const 100) "q12")
      (func (export "proxy_on_configure") (param i32 i32) (result i32)
        (drop (call $register_shared_queue (i32.const 100) (i32.const 1) (i32.const 0))) (i32.const 1))
      (func (export "proxy_on_queue_ready") (param i32 i32)
        (call $say (call $dequeue_shared_queue (local.get 1) (i32.const 0) (i32.const 4)))
        (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4))))"#;
    let sender = r#"
      (data (i32.const 100) "receiverq12")
      (func (export "proxy_on_tick") (param i32)
        (drop (call $resolve_shared_queue (i32.const 100) (i32.const 8) (i32.const 108) (i32.const 1) (i32.const 0)))
        (drop (call $enqueue_shared_queue (i32.load (i32.const 0)) (i32.const 109) (i32.const 1)))
        (drop (call $enqueue_shared_queue (i32.load (i32.const 0)) (i32.const 110) (i32.const 1))))"#;
    let shared = SharedState::new();
    let options = |vm_id: &str| PluginOptions {
        vm_id: vm_id.to_owned(),
        shared: shared.clone(),
        ..PluginOptions::default()
    };
    let mut receiver = Run::with(queue, options("receiver"));
    let mut sender = Run::with(sender, options("sender"));
    let (woken, wakes) = std::sync::mpsc::channel();
    receiver.plugin.on_queue_items(move || woken.send(()).unwrap());
    // From another thread, as another worker's VM.
    std::thread::spawn(move || sender.plugin.tick().unwrap()).join().unwrap();
    assert_eq!(wakes.try_iter().count(), 2);
    assert_eq!(receiver.plugin.deliver_queues(), Ok(2));
    assert_eq!(receiver.said(), ["0", "1", "0", "2"]);
    assert_eq!(receiver.plugin.deliver_queues(), Ok(0));
}

#[test]
fn built_in_foreign_functions_are_there_and_the_callback_too() {
    let guest = r#"
      (data (i32.const 100) "compressuncompressclear_route_cachedeclare_property")
      (data (i32.const 200) "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
      (data (i32.const 300) "\0a\01k")
      (func (export "proxy_on_tick") (param i32)
        (call $say (call $call_foreign_function (i32.const 100) (i32.const 8) (i32.const 200)
          (i32.const 40) (i32.const 8) (i32.const 4)))
        (call $say (i32.lt_u (i32.load (i32.const 4)) (i32.const 40)))
        (call $say (call $call_foreign_function (i32.const 108) (i32.const 10) (i32.load (i32.const 8))
          (i32.load (i32.const 4)) (i32.const 8) (i32.const 4)))
        (call $tell (i32.load (i32.const 8)) (i32.load (i32.const 4)))
        (call $say (call $call_foreign_function (i32.const 108) (i32.const 10) (i32.const 200)
          (i32.const 40) (i32.const 8) (i32.const 4)))
        (call $say (i32.load (i32.const 4)))
        (call $say (call $call_foreign_function (i32.const 118) (i32.const 17) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 0)))
        (call $say (call $call_foreign_function (i32.const 135) (i32.const 16) (i32.const 300)
          (i32.const 3) (i32.const 0) (i32.const 0)))
        (call $say (call $call_foreign_function (i32.const 135) (i32.const 16) (i32.const 300)
          (i32.const 3) (i32.const 0) (i32.const 0))))
      (func (export "proxy_on_foreign_function") (param i32 i32 i32)
        (call $say (local.get 0)) (call $say (local.get 1)) (call $say (local.get 2))
        (drop (call $get_buffer_bytes (i32.const 8) (i32.const 0) (i32.const 99) (i32.const 0) (i32.const 4)))
        (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4))))"#;
    let mut run = Run::new(guest);
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["0", "1", "0", &"a".repeat(40), "3", "0", "0", "0", "2"]);
    run.plugin.foreign_function(None, 7, b"data").unwrap();
    assert_eq!(run.said(), ["1", "7", "4", "data"]);
    let id = run.plugin.stream().unwrap();
    run.plugin.foreign_function(Some(id), 8, b"").unwrap();
    assert_eq!(run.said(), ["2", "8", "0", ""]);
}

#[test]
fn metrics_keep_envoys_rules() {
    let guest = r#"
      (data (i32.const 100) "requests")
      (func (export "proxy_on_tick") (param i32)
        (call $say (call $define_metric (i32.const 0) (i32.const 100) (i32.const 8) (i32.const 0)))
        (call $say (call $increment_metric (i32.load (i32.const 0)) (i64.const 0)))
        (call $say (call $increment_metric (i32.load (i32.const 0)) (i64.const -5)))
        (call $say (call $increment_metric (i32.load (i32.const 0)) (i64.const 5)))
        (call $say (call $record_metric (i32.load (i32.const 0)) (i64.const 2)))
        (call $say (call $get_metric (i32.load (i32.const 0)) (i32.const 8)))
        (call $say (i32.load (i32.const 8)))
        (call $say (call $define_metric (i32.const 3) (i32.const 100) (i32.const 8) (i32.const 0)))
        (call $say (call $get_metric (i32.const 77) (i32.const 8))))"#;
    let guest = module(guest);
    let options = PluginOptions::default();
    let mut first = Run::of(&guest, options.clone());
    let mut second = Run::of(&guest, options.clone());
    first.plugin.tick().unwrap();
    assert_eq!(first.said(), ["0", "2", "2", "0", "0", "0", "7", "2", "1"]);
    second.plugin.tick().unwrap();
    assert_eq!(second.said()[6], "14", "VMs add into one counter");
    let value = options.shared.metrics().value("requests");
    assert_eq!(value, Some(MetricValue::Counter(14)));
}

#[test]
fn ticks_come_when_asked_for() {
    let guest = r#"
      (func (export "proxy_on_configure") (param i32 i32) (result i32)
        (drop (call $set_tick_period_milliseconds (i32.const 250))) (i32.const 1))
      (func (export "proxy_on_tick") (param i32)
        (call $say (local.get 0))
        (drop (call $set_tick_period_milliseconds (i32.const 0))))"#;
    let mut run = Run::new(guest);
    assert_eq!(run.plugin.tick_period(), Some(Duration::from_millis(250)));
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["1"]);
    assert_eq!(run.plugin.tick_period(), None);
}

#[test]
fn foreign_functions_are_found_by_name() {
    let guest = r#"
      (data (i32.const 100) "shoutabc")
      (func (export "proxy_on_tick") (param i32)
        (call $say (call $call_foreign_function (i32.const 100) (i32.const 4) (i32.const 105)
          (i32.const 3) (i32.const 0) (i32.const 4)))
        (call $say (call $call_foreign_function (i32.const 100) (i32.const 5) (i32.const 105)
          (i32.const 0) (i32.const 0) (i32.const 4)))
        (call $say (call $call_foreign_function (i32.const 100) (i32.const 5) (i32.const 105)
          (i32.const 3) (i32.const 8) (i32.const 4)))
        (call $tell (i32.load (i32.const 8)) (i32.load (i32.const 4))))"#;
    let mut options = PluginOptions::default();
    options.foreign_functions.insert("shout", |text| match text {
        [] => Err(Status::BadArgument),
        text => Ok(text.to_ascii_uppercase()),
    });
    let mut run = Run::with(guest, options);
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["1", "2", "0", "ABC"]);
}

#[test]
fn http_calls_are_checked_and_bounded() {
    let guest = r#"
      (data (i32.const 100) "auth")
      (data (i32.const 200) "\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\02\00\00\00\0a\00\00\00\01\00\00\00:method\00GET\00:path\00/c\00:authority\00a\00")
      (func $call (param $name i32) (param $headers i32) (param $timeout i32)
        (call $say (call $http_call (i32.const 100) (local.get $name) (i32.const 200)
          (local.get $headers) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (local.get $timeout) (i32.const 0))))
      (func (export "proxy_on_tick") (param i32)
        (call $call (i32.const 3) (i32.const 62) (i32.const 0))
        (call $call (i32.const 4) (i32.const 0) (i32.const 0))
        (call $call (i32.const 4) (i32.const 61) (i32.const 0))
        (call $call (i32.const 4) (i32.const 62) (i32.const -1))
        (call $call (i32.const 4) (i32.const 62) (i32.const 0))
        (call $say (i32.load (i32.const 0)))
        (call $call (i32.const 4) (i32.const 62) (i32.const 0)))"#;
    let options = PluginOptions {
        callout_upstreams: Some(["auth".to_owned()].into()),
        limits: Limits { outstanding_callouts: 1, ..Limits::default() },
        ..PluginOptions::default()
    };
    let mut run = Run::with(guest, options);
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["2", "2", "2", "2", "0", "4", "10"]);
    assert_eq!(Sent::by(&mut run.plugin).http.len(), 1);
    assert_eq!(Sent::by(&mut run.plugin).http.len(), 0);
}

#[test]
fn a_plugin_may_take_its_time_to_end() {
    let guest = r#"
      (func (export "proxy_on_done") (param i32) (result i32) (call $say (local.get 0)) (i32.const 0))
      (func (export "proxy_on_delete") (param i32) (call $say (i32.const 9)))
      (func (export "proxy_on_tick") (param i32) (call $say (call $done)))"#;
    let mut run = Run::new(guest);
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["1"], "nothing is ending");
    assert_eq!(run.plugin.shut_down(), Ok(false));
    assert_eq!(run.plugin.shut_down(), Ok(false));
    run.plugin.tick().unwrap();
    assert_eq!(run.plugin.shut_down(), Ok(true));
    assert_eq!(run.said(), ["1", "0", "9"]);
}

#[test]
fn context_ids_are_never_reused_while_a_stream_lives() {
    let mut run = Run::new("");
    let first = run.plugin.stream().unwrap();
    let second = run.plugin.stream().unwrap();
    assert_ne!(first, second);
    assert_eq!(first.context_id(), 2, "1 is the root context");
    run.plugin.done(first).unwrap();
    assert_eq!(run.plugin.stream().unwrap().context_id(), 4);
    run.plugin.request_headers(second, get("/"), true).unwrap();
}
