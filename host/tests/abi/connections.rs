//! TCP connections: the network half of the ABI.

use driftlock_host::abi::{ClosedBy, Peer, Step};

use crate::guest::{Run, body_of, forwarded};

/// Says what it is called with; pauses "p", replaces "r", closes on "c", continues from a tick.
const TCP: &str = r#"
  (data (i32.const 100) "REPLACED")
  (func (export "proxy_on_new_connection") (param i32) (result i32)
    (call $say (i32.const 90)) (call $say (local.get 0)) (i32.const 0))
  (func $data (param $kind i32) (param $size i32) (param $end i32) (result i32) (local $first i32)
    (call $say (local.get $kind)) (call $say (local.get $size)) (call $say (local.get $end))
    (if (i32.eqz (local.get $size)) (then (return (i32.const 0))))
    (drop (call $get_buffer_bytes (local.get $kind) (i32.const 0) (i32.const 99) (i32.const 0) (i32.const 4)))
    (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4)))
    (local.set $first (i32.load8_u (i32.load (i32.const 0))))
    (if (i32.eq (local.get $first) (i32.const 112)) (then (return (i32.const 1))))
    (if (i32.eq (local.get $first) (i32.const 114)) (then
      (call $say (call $set_buffer_bytes (local.get $kind) (i32.const 0) (i32.const 99)
        (i32.const 100) (i32.const 8)))))
    (if (i32.eq (local.get $first) (i32.const 99)) (then
      (call $say (call $close_stream (i32.sub (local.get $kind) (i32.const 0))))))
    (i32.const 0))
  (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32)
    (call $data (i32.const 2) (local.get 1) (local.get 2)))
  (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32)
    (call $data (i32.const 3) (local.get 1) (local.get 2)))
  (func (export "proxy_on_downstream_connection_close") (param i32 i32)
    (call $say (i32.const 91)) (call $say (local.get 1)))
  (func (export "proxy_on_upstream_connection_close") (param i32 i32)
    (call $say (i32.const 92)) (call $say (local.get 1)))
  (func (export "proxy_on_tick") (param i32)
    (drop (call $set_effective_context (i32.const 2)))
    (call $say (call $continue_stream (i32.const 2)))
    (call $say (call $continue_stream (i32.const 3)))
    (call $say (call $send_local_response (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const -1)))
    (call $say (call $get_header_map_value (i32.const 0) (i32.const 100) (i32.const 1)
      (i32.const 0) (i32.const 4))))
  (func (export "proxy_on_done") (param i32) (result i32) (call $say (i32.const 93)) (i32.const 1))
  (func (export "proxy_on_log") (param i32) (call $say (i32.const 94)))
  (func (export "proxy_on_delete") (param i32) (call $say (i32.const 95)))"#;

#[test]
fn bytes_pass_pause_and_change_in_both_directions() {
    let mut run = Run::new(TCP);
    let (id, step) = run.plugin.connection().unwrap();
    assert!(matches!(step, Step::Forward(_)));
    assert_eq!(run.said(), ["90", "2"]);

    let step = run.plugin.connection_data(id, Peer::Downstream, b"abc", false).unwrap();
    assert_eq!(body_of(step), "abc");
    assert_eq!(run.said(), ["2", "3", "0", "abc"]);
    let step = run.plugin.connection_data(id, Peer::Upstream, b"run", false).unwrap();
    assert_eq!(body_of(step), "REPLACED");
    run.said();

    // Stopped bytes are shown again with the next, and go on when the guest resumes.
    for (chunk, seen) in [("p1", "p1"), ("2", "p12")] {
        let step = run.plugin.connection_data(id, Peer::Downstream, chunk.as_bytes(), false).unwrap();
        assert_eq!(step, Step::Hold);
        assert_eq!(run.said()[3], seen);
    }
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["0", "12", "0", "2"], "no reply and no headers on a connection");
    let events = run.plugin.take_events();
    assert_eq!(events.len(), 1);
    assert_eq!(body_of(events[0].step.clone()), "p12");

    let step = run.plugin.connection_data(id, Peer::Upstream, b"x", true).unwrap();
    assert!(forwarded(step).end_of_stream);
    assert_eq!(run.said(), ["3", "1", "1", "x", "92", "0"], "the server's end closes its connection");
    run.plugin.connection_closed(id, Peer::Downstream, ClosedBy::Remote).unwrap();
    run.plugin.done(id).unwrap();
    assert_eq!(run.said(), ["91", "2", "93", "94", "95"], "Envoy's order for connections");
    assert!(run.plugin.connection_data(id, Peer::Downstream, b"", true).is_err());
}

#[test]
fn a_connection_can_be_closed_from_a_callback() {
    let mut run = Run::new(TCP);
    for peer in [Peer::Downstream, Peer::Upstream] {
        let (id, _) = run.plugin.connection().unwrap();
        assert_eq!(run.plugin.connection_data(id, peer, b"c", false), Ok(Step::Close));
        run.said();
        assert_eq!(run.plugin.connection_data(id, peer, b"more", false), Ok(Step::Hold));
        assert_eq!(run.said(), Vec::<String>::new());
    }
    let http = run.plugin.stream().unwrap();
    assert!(run.plugin.connection_data(http, Peer::Downstream, b"", false).is_err());
}
