//! What is held, what goes on, and what the guest may change meanwhile.

use driftlock_host::abi::{Direction, HeadersPause, Limits, MapType, PluginOptions, Release, Step};

use crate::guest::{Run, body_of, forwarded, get, headers, ok};

/// Says (size, end) of each body callback and pauses until the end.
const COLLECT: &str = r#"
  (func $body (param i32 i32 i32) (result i32)
    (call $say (local.get 1)) (call $say (local.get 2))
    (i32.eqz (local.get 2)))
  (export "proxy_on_request_body" (func $body))
  (export "proxy_on_response_body" (func $body))
  (func (export "proxy_on_request_trailers") (param i32 i32) (result i32)
    (call $say (local.get 1)) (i32.const 0))"#;

#[test]
fn a_paused_body_gathers_and_goes_on_as_one() {
    let mut run = Run::new(COLLECT);
    let id = run.plugin.stream().unwrap();
    let step = run.plugin.request_headers(id, get("/"), false).unwrap();
    assert_eq!(step, Step::Forward(Release { headers: true, ..Release::default() }));
    assert_eq!(run.plugin.request_body(id, b"ab", false), Ok(Step::Hold));
    assert_eq!(run.plugin.held_bytes(id, Direction::Request), 2);
    assert_eq!(run.plugin.request_body(id, b"cde", false), Ok(Step::Hold));
    let last = forwarded(run.plugin.request_body(id, b"", true).unwrap());
    assert_eq!((last.body.as_slice(), last.end_of_stream), (&b"abcde"[..], true));
    assert_eq!(run.said(), ["2", "0", "5", "0", "5", "1"]);
    assert_eq!(run.plugin.held_bytes(id, Direction::Request), 0);
}

#[test]
fn every_split_of_a_body_forwards_the_same_bytes() {
    let body = b"0123456789";
    for guest in [COLLECT, ""] {
        let mut run = Run::new(guest);
        for cut in 0..=body.len() {
            for second in cut..=body.len() {
                let id = run.plugin.stream().unwrap();
                run.plugin.request_headers(id, get("/"), true).unwrap();
                run.plugin.response_headers(id, ok(), false).unwrap();
                let mut out = Vec::new();
                let parts = [&body[..cut], &body[cut..second], &body[second..]];
                for (index, part) in parts.into_iter().enumerate() {
                    if let Step::Forward(release) = run.plugin.response_body(id, part, index == 2).unwrap() {
                        out.extend_from_slice(&release.body);
                        assert_eq!(release.end_of_stream, index == 2);
                    }
                }
                assert_eq!(out, body);
                run.plugin.done(id).unwrap();
            }
        }
        assert_eq!(run.plugin.stream_count(), 0);
    }
}

#[test]
fn trailers_end_a_body_that_never_said_end_of_stream() {
    let mut run = Run::new(COLLECT);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    assert_eq!(run.plugin.request_body(id, b"ab", false), Ok(Step::Hold));
    let step = run.plugin.request_trailers(id, headers(&[("t", "1"), ("u", "2")])).unwrap();
    assert_eq!(
        step,
        Step::Forward(Release {
            body: b"ab".to_vec(),
            trailers: true,
            end_of_stream: true,
            ..Release::default()
        })
    );
    assert_eq!(run.said(), ["2", "0", "2"]);
}

#[test]
fn order_is_checked() {
    let mut run = Run::new("");
    let id = run.plugin.stream().unwrap();
    assert!(run.plugin.request_body(id, b"", true).is_err());
    assert!(run.plugin.request_trailers(id, headers(&[])).is_err());
    run.plugin.request_headers(id, get("/"), true).unwrap();
    assert!(run.plugin.request_headers(id, get("/"), true).is_err());
    assert!(run.plugin.request_body(id, b"", true).is_err());
    run.plugin.done(id).unwrap();
    assert!(run.plugin.response_headers(id, ok(), true).is_err());
    assert!(run.plugin.done(id).is_err());
    assert!(!run.plugin.is_poisoned());
}

/// Calls set_buffer with (start, length) from the first two bytes of the response body's callback
/// state, kept at address 0 and 4 by the configuration; data is "XY".
fn replaced(start: u32, length: u32) -> (String, String) {
    let guest = format!(
        r#"(data (i32.const 100) "XY")
        (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
          (call $say (call $set_buffer_bytes (i32.const 1) (i32.const {start}) (i32.const {length})
            (i32.const 100) (i32.const 2)))
          (i32.const 0))"#
    );
    let mut run = Run::new(&guest);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), true).unwrap();
    run.plugin.response_headers(id, ok(), false).unwrap();
    let body = body_of(run.plugin.response_body(id, b"abcd", true).unwrap());
    (run.said().remove(0), body)
}

#[test]
fn a_body_is_replaced_as_in_envoy() {
    let is = |start, length, status: &str, body: &str| {
        assert_eq!(
            replaced(start, length),
            (status.to_owned(), body.to_owned()),
            "start {start} length {length}"
        );
    };
    is(0, 4, "0", "XY");
    is(0, u32::MAX, "0", "XY");
    is(0, 0, "0", "XYabcd");
    is(0, 1, "0", "XYbcd");
    is(4, 0, "0", "abcdXY");
    is(9, 1, "0", "abcdXY");
    is(u32::MAX, u32::MAX, "0", "abcdXY");
    is(1, 0, "2", "abcd");
    is(3, 9, "2", "abcd");
}

#[test]
fn a_gathered_body_can_be_replaced_while_it_is_held() {
    let guest = r#"(data (i32.const 100) "XY")
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (drop (call $set_buffer_bytes (i32.const 0) (i32.const 0) (i32.const 1)
          (i32.const 100) (i32.const 2)))
        (i32.eqz (local.get 2)))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    assert_eq!(run.plugin.request_body(id, b"ab", false), Ok(Step::Hold));
    // "XYb" is held; with "c" it is "XYbc", whose first byte is replaced again.
    assert_eq!(body_of(run.plugin.request_body(id, b"c", true).unwrap()), "XYYbc");
}

#[test]
fn reading_a_body_out_of_range_is_ok_and_null() {
    let guest = r#"
      (func $read (param i32 i32 i32)
        (i64.store (i32.const 0) (i64.const 0))
        (call $say (call $get_buffer_bytes (local.get 0) (local.get 1) (local.get 2)
          (i32.const 0) (i32.const 4)))
        (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4))))
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (call $read (i32.const 0) (i32.const 1) (i32.const 2))
        (call $read (i32.const 0) (i32.const 1) (i32.const -1))
        (call $read (i32.const 0) (i32.const 4) (i32.const 1))
        (call $read (i32.const 0) (i32.const -1) (i32.const -1))
        (call $read (i32.const 1) (i32.const 0) (i32.const 9))
        (call $read (i32.const 4) (i32.const 0) (i32.const 9))
        (call $read (i32.const 9) (i32.const 0) (i32.const 9))
        (drop (call $get_buffer_status (i32.const 0) (i32.const 0) (i32.const 4)))
        (call $say (i32.load (i32.const 0)))
        (i32.const 0))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    run.plugin.request_body(id, b"abcd", true).unwrap();
    assert_eq!(run.said(), ["0", "bc", "0", "bcd", "0", "", "0", "", "0", "", "1", "", "2", "", "4"]);
}

/// Pauses the request's headers; body callbacks say their size and continue at the end; a tick
/// continues stream 2.
const HEADERS_PAUSE: &str = r#"
  (data (i32.const 100) "x-late1")
  (func $late (drop (call $add_header_map_value (i32.const 0) (i32.const 100) (i32.const 6)
    (i32.const 106) (i32.const 1))))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
    (call $say (local.get 1)) (call $say (local.get 2))
    (call $late)
    (i32.eqz (local.get 2)))
  (func (export "proxy_on_request_trailers") (param i32 i32) (result i32)
    (call $say (local.get 1)) (i32.const 0))
  (func (export "proxy_on_tick") (param i32)
    (drop (call $set_effective_context (i32.const 2)))
    (call $say (call $continue_stream (i32.const 0))))"#;

#[test]
fn a_headers_pause_stops_everything_by_default() {
    let mut run = Run::new(HEADERS_PAUSE);
    let id = run.plugin.stream().unwrap();
    assert_eq!(run.plugin.request_headers(id, get("/"), false), Ok(Step::Hold));
    assert_eq!(run.plugin.request_body(id, b"ab", false), Ok(Step::Hold));
    assert_eq!(run.plugin.request_body(id, b"c", true), Ok(Step::Hold));
    assert_eq!(run.said(), Vec::<String>::new(), "no body callback while all is stopped");

    run.plugin.tick().unwrap();
    let events = run.plugin.take_events();
    assert_eq!(run.said(), ["0", "3", "1"]);
    assert_eq!((events.len(), events[0].stream, events[0].direction), (1, id, Direction::Request));
    assert_eq!(
        events[0].step,
        Step::Forward(Release { headers: true, body: b"abc".to_vec(), trailers: false, end_of_stream: true })
    );
    // The pointers went with continue_stream, so the late header was refused.
    let map = run.plugin.header_map(id, MapType::RequestHeaders).unwrap();
    assert_eq!(map.first(b"x-late"), None);

    run.plugin.tick().unwrap();
    assert_eq!(run.plugin.take_events(), [], "nothing is stopped any more");
}

#[test]
fn a_stopped_stream_with_trailers_replays_both_callbacks() {
    let mut run = Run::new(HEADERS_PAUSE);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    run.plugin.request_body(id, b"ab", false).unwrap();
    assert_eq!(run.plugin.request_trailers(id, headers(&[("t", "1")])), Ok(Step::Hold));
    run.plugin.tick().unwrap();
    // The body callback pauses (no end_of_stream), the trailers release it.
    assert_eq!(run.said(), ["0", "2", "0", "1"]);
    assert_eq!(
        run.plugin.take_events()[0].step,
        Step::Forward(Release { headers: true, body: b"ab".to_vec(), trailers: true, end_of_stream: true })
    );
}

#[test]
fn with_stop_iteration_the_body_callback_sets_and_releases_headers() {
    let mut run = Run::with(
        HEADERS_PAUSE,
        PluginOptions { headers_pause: HeadersPause::StopIteration, ..PluginOptions::default() },
    );
    let id = run.plugin.stream().unwrap();
    assert_eq!(run.plugin.request_headers(id, get("/"), false), Ok(Step::Hold));
    assert_eq!(run.plugin.request_body(id, b"ab", false), Ok(Step::Hold));
    let release = forwarded(run.plugin.request_body(id, b"c", true).unwrap());
    assert!(release.headers && release.end_of_stream);
    assert_eq!(release.body, b"abc");
    assert_eq!(run.said(), ["2", "0", "3", "1"]);
    let map = run.plugin.header_map(id, MapType::RequestHeaders).unwrap();
    assert_eq!(map.joined(b"x-late").as_deref(), Some(&b"1,1"[..]));
}

#[test]
fn a_header_map_is_closed_once_it_went_on() {
    let guest = r#"
      (data (i32.const 100) "x-a1:path")
      (func $touch (param $map i32)
        (call $say (call $add_header_map_value (local.get $map) (i32.const 100) (i32.const 3)
          (i32.const 103) (i32.const 1)))
        (call $say (call $replace_header_map_value (local.get $map) (i32.const 100) (i32.const 3)
          (i32.const 103) (i32.const 1)))
        (call $say (call $remove_header_map_value (local.get $map) (i32.const 100) (i32.const 3)))
        (call $say (call $get_header_map_value (local.get $map) (i32.const 104) (i32.const 5)
          (i32.const 0) (i32.const 4)))
        (call $say (call $get_header_map_size (local.get $map) (i32.const 8)))
        (call $say (call $get_header_map_pairs (local.get $map) (i32.const 8) (i32.const 12)))
        (call $say (i32.load (i32.const 12))))
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $touch (i32.const 0)) (i32.const 0))
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (call $touch (i32.const 0)) (i32.const 0))
      (func (export "proxy_on_log") (param i32)
        (call $touch (i32.const 0)))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    let map = headers(&[(":path", "/")]);
    run.plugin.request_headers(id, map, false).unwrap();
    assert_eq!(run.said(), ["0", "0", "0", "0", "0", "0", "20"]);
    run.plugin.request_body(id, b"x", true).unwrap();
    assert_eq!(run.said(), ["2", "2", "2", "2", "2", "0", "0"]);
    run.plugin.done(id).unwrap();
    // The access log may read once more, not write.
    assert_eq!(run.said(), ["2", "2", "2", "0", "2", "0", "20"]);
}

#[test]
fn headers_pairs_are_set_and_read_as_a_whole() {
    let guest = r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $say (local.get 1)) (call $say (local.get 2))
        ;; one pair: "B" = "cd"
        (i32.store (i32.const 0) (i32.const 1)) (i32.store (i32.const 4) (i32.const 1))
        (i32.store (i32.const 8) (i32.const 2)) (i32.store (i32.const 12) (i32.const 0x64630042))
        (i32.store8 (i32.const 16) (i32.const 0))
        (call $say (call $set_header_map_pairs (i32.const 0) (i32.const 0) (i32.const 16)))
        (call $say (call $set_header_map_pairs (i32.const 0) (i32.const 0) (i32.const 17)))
        (i32.const 0))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    let map = headers(&[(":path", "/"), ("a", "1"), ("a", "2")]);
    run.plugin.request_headers(id, map, true).unwrap();
    assert_eq!(run.said(), ["3", "1", "2", "0"], "a cut map is refused and changes nothing");
    let map = run.plugin.header_map(id, MapType::RequestHeaders).unwrap();
    assert_eq!(map, &headers(&[("b", "cd")]));
}

#[test]
fn trailers_can_be_added_in_the_last_body_callback() {
    let guest = r#"
      (data (i32.const 100) "x-v9")
      (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
        (call $say (call $add_header_map_value (i32.const 3) (i32.const 100) (i32.const 3)
          (i32.const 103) (i32.const 1)))
        (i32.const 0))
      (func (export "proxy_on_response_trailers") (param i32 i32) (result i32) (unreachable))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), true).unwrap();
    run.plugin.response_headers(id, ok(), false).unwrap();
    let first = forwarded(run.plugin.response_body(id, b"a", false).unwrap());
    assert!(!first.trailers);
    let last = forwarded(run.plugin.response_body(id, b"b", true).unwrap());
    assert!(last.trailers && last.end_of_stream);
    assert_eq!(run.said(), ["2", "0"]);
    let map = run.plugin.header_map(id, MapType::ResponseTrailers).unwrap();
    assert_eq!(map, &headers(&[("x-v", "9")]));
}

#[test]
fn the_last_callbacks_come_in_envoys_order_and_leave_filter_state() {
    let guest = r#"
      (data (i32.const 100) "verdictnormal")
      (func (export "proxy_on_done") (param i32) (result i32) (call $say (i32.const 2)) (i32.const 1))
      (func (export "proxy_on_log") (param i32) (call $say (i32.const 1))
        (call $say (call $set_property (i32.const 100) (i32.const 7) (i32.const 107) (i32.const 6)))
        (drop (call $get_property (i32.const 100) (i32.const 7) (i32.const 0) (i32.const 4)))
        (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4))))
      (func (export "proxy_on_delete") (param i32) (call $say (i32.const 3)))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), true).unwrap();
    assert!(run.plugin.filter_state(id).unwrap().is_empty());
    let ended = run.plugin.done(id).unwrap();
    assert_eq!(run.said(), ["1", "0", "normal", "2", "3"]);
    assert_eq!(ended.error, None);
    assert_eq!(ended.filter_state["wasm.verdict"], b"normal");
    assert!(run.plugin.filter_state(id).is_none());
}

#[test]
fn filter_state_is_readable_during_the_exchange_and_bounded() {
    let guest = r#"
      (data (i32.const 100) "k")
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $say (call $set_property (i32.const 100) (i32.const 1) (i32.const 0) (i32.const 9)))
        (drop (memory.grow (i32.const 32)))
        (call $say (call $set_property (i32.const 100) (i32.const 1) (i32.const 0)
          (i32.const 1048576)))
        (i32.const 0))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), true).unwrap();
    assert_eq!(run.said(), ["0", "10"]);
    assert_eq!(run.plugin.filter_state(id).unwrap()["wasm.k"], [0; 9]);
}

#[test]
fn properties_follow_the_headers_while_they_are_open() {
    let guest = r#"
      (data (i32.const 100) "request\00path")
      (data (i32.const 120) "request\00url_path")
      (data (i32.const 140) "request\00query")
      (data (i32.const 160) "request\00headers\00X-A")
      (data (i32.const 180) "source\00port")
      (data (i32.const 200) "response\00code")
      (data (i32.const 220) "request\00size")
      (func $ask (param i32 i32)
        (i64.store (i32.const 0) (i64.const 0))
        (call $say (call $get_property (local.get 0) (local.get 1) (i32.const 0) (i32.const 4)))
        (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4))))
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $ask (i32.const 100) (i32.const 12))
        (call $ask (i32.const 120) (i32.const 16))
        (call $ask (i32.const 140) (i32.const 13))
        (call $ask (i32.const 160) (i32.const 19))
        (call $ask (i32.const 180) (i32.const 11))
        (call $ask (i32.const 200) (i32.const 13))
        (call $ask (i32.const 220) (i32.const 12))
        (i32.const 0))
      (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
        (call $ask (i32.const 100) (i32.const 12))
        (call $ask (i32.const 200) (i32.const 13))
        (call $ask (i32.const 220) (i32.const 12))
        (i32.const 0))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    run.plugin.set_property(id, &["source", "port"], 258).unwrap();
    let map = headers(&[(":path", "/p?q=1#f"), ("x-a", "1"), ("x-a", "2")]);
    run.plugin.request_headers(id, map, false).unwrap();
    run.plugin.request_body(id, b"abc", true).unwrap();
    run.plugin.response_headers(id, headers(&[(":status", "418")]), true).unwrap();
    let int = |n: i64| String::from_utf8_lossy(&n.to_le_bytes()).into_owned();
    let (port, zero, teapot, three) = (int(258), int(0), int(418), int(3));
    let expected = [
        "0", "/p?q=1#f", "0", "/p", "0", "q=1", "0", "1,2", "0", &port, "1", "", "0", &zero,
        // After the headers went on, Envoy's request.path is gone.
        "1", "", "0", &teapot, "0", &three,
    ];
    assert_eq!(run.said(), expected);
}

#[test]
fn a_guest_without_callbacks_passes_everything() {
    let mut run = Run::new("");
    let id = run.plugin.stream().unwrap();
    assert!(forwarded(run.plugin.request_headers(id, get("/"), false).unwrap()).headers);
    assert_eq!(body_of(run.plugin.request_body(id, b"abc", true).unwrap()), "abc");
    let step = forwarded(run.plugin.response_headers(id, ok(), true).unwrap());
    assert!(step.headers && step.end_of_stream);
}

#[test]
fn other_pause_numbers_keep_envoys_meaning() {
    // 2: watermark (held, not shown again); 3: no buffer (dropped).
    let guest = r#"
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (call $say (local.get 1))
        (if (result i32) (local.get 2) (then (i32.const 0))
          (else (i32.const 2))))
      (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
        (call $say (local.get 1))
        (if (result i32) (local.get 2) (then (i32.const 0))
          (else (i32.const 3))))"#;
    let limits = Limits { request_buffer_bytes: 3, ..Limits::default() };
    let mut run = Run::with(guest, PluginOptions { limits, ..PluginOptions::default() });
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), false).unwrap();
    assert_eq!(run.plugin.request_body(id, b"abcd", false), Ok(Step::Hold));
    assert_eq!(body_of(run.plugin.request_body(id, b"e", true).unwrap()), "abcde");
    run.plugin.response_headers(id, ok(), false).unwrap();
    assert_eq!(run.plugin.response_body(id, b"abcd", false), Ok(Step::Hold));
    assert_eq!(body_of(run.plugin.response_body(id, b"e", true).unwrap()), "e");
    assert_eq!(run.said(), ["4", "1", "4", "1"]);
}
