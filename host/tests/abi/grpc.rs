//! gRPC call-outs, unary and streamed.

use driftlock_host::abi::{AbiError, GrpcEvent, Limits, PluginOptions};

use crate::guest::{Run, Sent, headers};

/// Ticks do what the root's next number says; every answer is said.
const CALLER: &str = r#"
  (data (i32.const 100) "auth")
  (data (i32.const 110) "pkg.Service")
  (data (i32.const 130) "Check")
  (data (i32.const 140) "hello")
  (data (i32.const 200) "\01\00\00\00\03\00\00\00\01\00\00\00x-a\001\00")
  (data (i32.const 300) "x-s")
  (global $id (mut i32) (i32.const 0))
  (func $call
    (call $say (call $grpc_call (i32.const 100) (i32.const 4) (i32.const 110) (i32.const 11)
      (i32.const 130) (i32.const 5) (i32.const 200) (i32.const 18) (i32.const 140) (i32.const 5)
      (i32.const 250) (i32.const 0)))
    (global.set $id (i32.load (i32.const 0))))
  (func $open
    (call $say (call $grpc_stream (i32.const 100) (i32.const 4) (i32.const 110) (i32.const 11)
      (i32.const 130) (i32.const 5) (i32.const 200) (i32.const 18) (i32.const 0)))
    (global.set $id (i32.load (i32.const 0))))
  (func $send (param $end i32)
    (call $say (call $grpc_send (global.get $id) (i32.const 140) (i32.const 5) (local.get $end))))
  (func $value (param $map i32)
    (call $say (call $get_header_map_value (local.get $map) (i32.const 300) (i32.const 3)
      (i32.const 0) (i32.const 4))))
  (func (export "proxy_on_grpc_receive_initial_metadata") (param i32 i32 i32)
    (call $say (i32.const 21)) (call $say (local.get 0)) (call $say (local.get 1)) (call $say (local.get 2))
    (call $value (i32.const 4)) (call $value (i32.const 5)))
  (func (export "proxy_on_grpc_receive") (param i32 i32 i32)
    (call $say (i32.const 22)) (call $say (local.get 0)) (call $say (local.get 1)) (call $say (local.get 2))
    (drop (call $get_buffer_bytes (i32.const 5) (i32.const 0) (i32.const 99) (i32.const 0) (i32.const 4)))
    (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4))))
  (func (export "proxy_on_grpc_receive_trailing_metadata") (param i32 i32 i32)
    (call $say (i32.const 23)) (call $say (local.get 2)) (call $value (i32.const 5)))
  (func (export "proxy_on_grpc_close") (param i32 i32 i32)
    (call $say (i32.const 24)) (call $say (local.get 1)) (call $say (local.get 2))
    (drop (call $get_status (i32.const 0) (i32.const 4) (i32.const 8)))
    (call $say (i32.load (i32.const 0)))
    (call $tell (i32.load (i32.const 4)) (i32.load (i32.const 8))))"#;

fn guest(ticks: &str) -> String {
    format!(r#"{CALLER} (func (export "proxy_on_tick") (param i32) {ticks})"#)
}

#[test]
fn a_unary_call_is_answered_once() {
    let mut run = Run::new(&guest("(call $call) (call $send (i32.const 0))"));
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["0", "2"], "one cannot send on a unary call");
    let call = Sent::by(&mut run.plugin).calls.remove(0);
    assert_eq!(call.upstream, "auth");
    assert_eq!((call.service.as_str(), call.method.as_str()), ("pkg.Service", "Check"));
    assert_eq!((call.message.as_slice(), call.timeout_ms), (&b"hello"[..], 250));
    assert_eq!(call.metadata, headers(&[("x-a", "1")]));
    assert_eq!(call.id & 3, 1, "Envoy's numbering");

    run.plugin.grpc_event(call.id, GrpcEvent::Message(b"yes".to_vec())).unwrap();
    assert_eq!(run.said(), ["22", "1", &call.id.to_string(), "3", "yes"]);
    let again = run.plugin.grpc_event(call.id, GrpcEvent::Message(Vec::new()));
    assert_eq!(again, Err(AbiError::UnknownCall { id: call.id }));

    run.plugin.tick().unwrap();
    let call = Sent::by(&mut run.plugin).calls.remove(0);
    run.said();
    run.plugin.grpc_event(call.id, GrpcEvent::Closed { status: 14, message: "away".into() }).unwrap();
    assert_eq!(run.said(), ["24", &call.id.to_string(), "14", "14", "away"]);
    assert!(run.plugin.grpc_event(call.id, GrpcEvent::Message(Vec::new())).is_err());
}

#[test]
fn a_stream_goes_both_ways_until_both_ends_close() {
    let steps = r#"
      (if (i32.eqz (global.get $id)) (then (call $open) (call $send (i32.const 0)))
      (else (call $send (i32.const 1)) (call $send (i32.const 0))
        (call $say (call $grpc_close (global.get $id)))))"#;
    let mut run = Run::new(&guest(steps));
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["0", "0"]);
    let sent = Sent::by(&mut run.plugin);
    let id = sent.streams[0].id;
    assert_eq!(sent.streams[0].metadata, headers(&[("x-a", "1")]));
    assert_eq!(id & 3, 2);
    assert_eq!(sent.on_streams, [format!("send {id} hello false")]);

    let name = id.to_string();
    run.plugin.grpc_event(id, GrpcEvent::InitialMetadata(headers(&[("x-s", "9"), ("b", "")]))).unwrap();
    assert_eq!(run.said(), ["21", "1", &name, "2", "0", "2"], "the other map is not there");
    for message in ["one", "two"] {
        run.plugin.grpc_event(id, GrpcEvent::Message(message.into())).unwrap();
        assert_eq!(run.said(), ["22", "1", &name, "3", message]);
    }
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["0", "0", "0"], "after its end a send is dropped, as in Envoy");
    assert_eq!(Sent::by(&mut run.plugin).on_streams, [format!("send {id} hello true")]);
    run.plugin.grpc_event(id, GrpcEvent::TrailingMetadata(headers(&[("x-s", "9")]))).unwrap();
    assert_eq!(run.said(), ["23", "1", "0"]);
    run.plugin.grpc_event(id, GrpcEvent::Closed { status: 0, message: String::new() }).unwrap();
    assert_eq!(run.said(), ["24", &name, "0", "0", ""]);
    assert_eq!(run.plugin.grpc_event(id, GrpcEvent::Message(Vec::new())), Err(AbiError::UnknownCall { id }));
}

#[test]
fn cancelling_ends_a_stream_at_once_and_closing_only_this_end() {
    let steps = r#"
      (call $open)
      (call $say (call $grpc_close (global.get $id))) (call $say (call $grpc_close (global.get $id)))
      (call $say (call $grpc_cancel (global.get $id))) (call $say (call $grpc_cancel (global.get $id)))
      (call $call) (call $say (call $grpc_close (global.get $id)))
      (call $say (call $grpc_close (global.get $id)))
      (call $say (call $grpc_close (i32.const 4))) (call $say (call $grpc_cancel (i32.const 7)))
      (call $say (call $grpc_send (i32.const 998) (i32.const 0) (i32.const 0) (i32.const 0)))
      (call $say (call $grpc_send (i32.const 4) (i32.const 0) (i32.const 0) (i32.const 0)))"#;
    let mut run = Run::new(&guest(steps));
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["0", "0", "0", "0", "1", "0", "0", "1", "2", "2", "1", "2"]);
    let sent = Sent::by(&mut run.plugin);
    let (stream, call) = (sent.streams[0].id, sent.calls[0].id);
    let ends = [format!("close {stream}"), format!("cancel {stream}"), format!("cancel {call}")];
    assert_eq!(sent.on_streams, ends);
    let event = GrpcEvent::Message(Vec::new());
    assert_eq!(run.plugin.grpc_event(stream, event), Err(AbiError::UnknownCall { id: stream }));
}

#[test]
fn unknown_targets_and_too_many_calls_are_refused() {
    let options =
        PluginOptions { callout_upstreams: Some(["other".to_owned()].into()), ..PluginOptions::default() };
    let mut run = Run::with(&guest("(call $call) (call $open)"), options);
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["4", "4"], "Envoy says ParseFailure");

    let limits = Limits { outstanding_callouts: 2, ..Limits::default() };
    let options = PluginOptions { limits, ..PluginOptions::default() };
    let mut run = Run::with(&guest("(call $open)"), options);
    for status in ["0", "0", "10"] {
        run.plugin.tick().unwrap();
        assert_eq!(run.said(), [status]);
    }
    // A stream that the peer ended makes room, though the guest never closed it.
    let id = Sent::by(&mut run.plugin).streams[0].id;
    run.plugin.grpc_event(id, GrpcEvent::Closed { status: 0, message: String::new() }).unwrap();
    run.said();
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["0"]);
}
