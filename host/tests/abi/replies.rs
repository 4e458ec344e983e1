//! Local replies, resets, and continuing from elsewhere.

use driftlock_host::abi::{Direction, HttpCallResponse, LocalReply, Release, Step};

use crate::guest::{Run, Sent, forwarded, get, headers, ok};

/// Answers from the callback named by the request's path: "q" request headers, "b" request body,
/// "r" response headers, "s" response body. Every answer is 403 "no!" with header a: b.
const REFUSE: &str = r#"
  (data (i32.const 100) "why so\01\00\00\00\01\00\00\00\01\00\00\00a\00b\00no!")
  (global $when (mut i32) (i32.const 0))
  (func $refuse (param $when i32)
    (if (i32.eq (local.get $when) (global.get $when)) (then
      (call $say (call $send_local_response (i32.const 403) (i32.const 100) (i32.const 6)
        (i32.const 122) (i32.const 3) (i32.const 106) (i32.const 16) (i32.const -1))))))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (drop (call $get_header_map_value (i32.const 0) (i32.const 90) (i32.const 5)
      (i32.const 0) (i32.const 4)))
    (global.set $when (i32.load8_u (i32.load (i32.const 0))))
    (call $refuse (i32.const 113)) (i32.const 0))
  (data (i32.const 90) ":path")
  (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
    (call $refuse (i32.const 98)) (i32.const 0))
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
    (call $refuse (i32.const 114)) (i32.const 0))
  (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
    (call $refuse (i32.const 115)) (i32.const 0))"#;

fn refusal(through_response_callbacks: bool) -> Step {
    Step::Reply(LocalReply {
        status: 403,
        details: "why_so".to_owned(),
        headers: headers(&[("a", "b")]),
        body: b"no!".to_vec(),
        grpc_status: None,
        through_response_callbacks,
    })
}

#[test]
fn a_reply_from_the_request_stops_it_and_runs_the_response_callbacks() {
    let mut run = Run::new(REFUSE);
    for path in ["q", "b"] {
        let id = run.plugin.stream().unwrap();
        let step = run.plugin.request_headers(id, get(path), false).unwrap();
        let step = if path == "q" {
            step
        } else {
            assert!(forwarded(step).headers);
            run.plugin.request_body(id, b"x", false).unwrap()
        };
        assert_eq!(step, refusal(true));
        assert_eq!(run.said(), ["0"]);
        // What still arrives of the request is dropped and not shown to the guest.
        assert_eq!(run.plugin.request_body(id, b"y", true), Ok(Step::Hold));
        assert_eq!(run.said(), Vec::<String>::new());
        let Step::Reply(reply) = step else { unreachable!() };
        let sent = forwarded(run.plugin.response_headers(id, reply.response_headers(), false).unwrap());
        assert!(sent.headers);
        let sent = forwarded(run.plugin.response_body(id, &reply.body, true).unwrap());
        assert_eq!(sent.body, b"no!");
        run.plugin.done(id).unwrap();
    }
}

#[test]
fn a_reply_from_the_response_replaces_it_or_resets_it() {
    let mut run = Run::new(REFUSE);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("r"), true).unwrap();
    assert_eq!(run.plugin.response_headers(id, ok(), false), Ok(refusal(false)));
    assert_eq!(run.plugin.response_body(id, b"upstream's", true), Ok(Step::Hold));

    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("s"), true).unwrap();
    run.plugin.response_headers(id, ok(), false).unwrap();
    assert_eq!(run.plugin.response_body(id, b"x", true), Ok(Step::Close));
}

#[test]
fn a_reply_gets_the_headers_envoy_gives_it() {
    let Step::Reply(reply) = refusal(true) else { unreachable!() };
    assert_eq!(
        reply.response_headers(),
        headers(&[(":status", "403"), ("a", "b"), ("content-length", "3"), ("content-type", "text/plain"),])
    );
}

#[test]
fn a_grpc_client_gets_an_answer_of_headers_alone() {
    let mut run = Run::new(REFUSE);
    for (content_type, speaks) in
        [("application/grpc", true), ("application/grpc+proto", true), ("application/grpcx", false)]
    {
        let id = run.plugin.stream().unwrap();
        let mut request = get("q");
        request.add(b"content-type", content_type.as_bytes());
        let Step::Reply(reply) = run.plugin.request_headers(id, request, false).unwrap() else {
            panic!("no reply");
        };
        if speaks {
            let sent = [
                (":status", "200"),
                ("a", "b"),
                ("content-type", "application/grpc"),
                ("grpc-status", "7"),
                ("grpc-message", "no!"),
            ];
            assert_eq!(reply.response_headers(), headers(&sent));
            assert!(reply.body.is_empty());
        } else {
            assert_eq!((reply.status, reply.body.as_slice()), (403, &b"no!"[..]));
        }
        run.plugin.done(id).unwrap();
    }
}

#[test]
fn a_closed_stream_is_reset_and_left_alone() {
    let guest = r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $say (call $close_stream (i32.const 0))) (i32.const 0))
      (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (unreachable))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    assert_eq!(run.plugin.request_headers(id, get("/"), true), Ok(Step::Close));
    assert_eq!(run.plugin.response_headers(id, ok(), true), Ok(Step::Hold));
    assert_eq!(run.said(), ["0"]);
}

#[test]
fn bad_arguments_of_replies_and_streams_are_refused() {
    let guest = r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $say (call $send_local_response (i32.const 99) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const -1)))
        (call $say (call $send_local_response (i32.const 403) (i32.const -1) (i32.const 2)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const -1)))
        (call $say (call $continue_stream (i32.const 2)))
        (call $say (call $continue_stream (i32.const 3)))
        (call $say (call $continue_stream (i32.const 4)))
        (call $say (call $close_stream (i32.const 3)))
        (call $say (call $close_stream (i32.const 4)))
        (call $say (call $set_effective_context (i32.const 77)))
        (call $say (call $done))
        (i32.const 0))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    assert!(forwarded(run.plugin.request_headers(id, get("/"), true).unwrap()).headers);
    assert_eq!(run.said(), ["2", "6", "0", "12", "2", "0", "2", "2", "1"]);
}

/// Pauses every request and asks an authoriser; its answer continues the stream or refuses it.
const AUTHORISE: &str = r#"
  (data (i32.const 100) "auth")
  (data (i32.const 110) ":status")
  ;; three pairs: :method GET, :path /c, :authority a
  (data (i32.const 200) "\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\02\00\00\00\0a\00\00\00\01\00\00\00:method\00GET\00:path\00/c\00:authority\00a\00")
  (global $stream (mut i32) (i32.const 0))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (global.set $stream (local.get 0))
    (call $say (call $http_call (i32.const 100) (i32.const 4) (i32.const 200) (i32.const 62)
      (i32.const 100) (i32.const 4) (i32.const 0) (i32.const 0) (i32.const 500) (i32.const 0)))
    (i32.const 1))
  (func (export "proxy_on_tick") (param i32)
    (call $say (call $get_buffer_bytes (i32.const 4) (i32.const 0) (i32.const 99) (i32.const 0) (i32.const 4))))
  (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
    (call $say (local.get 0)) (call $say (local.get 1)) (call $say (local.get 2))
    (call $say (local.get 3)) (call $say (local.get 4))
    (drop (call $get_status (i32.const 0) (i32.const 4) (i32.const 8)))
    (call $say (i32.load (i32.const 0)))
    (call $tell (i32.load (i32.const 4)) (i32.load (i32.const 8)))
    (call $say (call $get_header_map_value (i32.const 6) (i32.const 110) (i32.const 7)
      (i32.const 0) (i32.const 4)))
    (drop (call $set_effective_context (global.get $stream)))
    (if (local.get 2)
      (then
        (drop (call $get_buffer_bytes (i32.const 4) (i32.const 0) (i32.const 99) (i32.const 0) (i32.const 4)))
        (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4)))
        (drop (call $continue_stream (i32.const 0))))
      (else (drop (call $send_local_response (i32.const 503) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 14))))))"#;

#[test]
fn an_http_calls_answer_continues_the_stream() {
    let mut run = Run::new(AUTHORISE);
    let id = run.plugin.stream().unwrap();
    assert_eq!(run.plugin.request_headers(id, get("/"), true), Ok(Step::Hold));
    let calls = Sent::by(&mut run.plugin).http;
    assert_eq!(calls.len(), 1);
    assert_eq!((calls[0].upstream.as_str(), calls[0].timeout_ms), ("auth", 500));
    assert_eq!(calls[0].body, b"auth");
    assert_eq!(
        calls[0].headers,
        headers(&[(":method", "GET"), (":path", "/c"), (":authority", "a"), ("content-length", "4")])
    );
    assert_eq!(run.said(), ["0"]);

    let answer = HttpCallResponse { headers: ok(), body: b"yes".to_vec(), ..HttpCallResponse::default() };
    let call = calls[0].id;
    run.plugin.http_call_response(call, Some(answer.clone())).unwrap();
    assert_eq!(run.said(), ["1", "4", "1", "3", "0", "0", "", "0", "yes"]);
    let events = run.plugin.take_events();
    let release = Release { headers: true, end_of_stream: true, ..Release::default() };
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].stream, &events[0].step), (id, &Step::Forward(release)));
    assert!(run.plugin.http_call_response(call, Some(answer)).is_err(), "answered once");
    run.plugin.tick().unwrap();
    assert_eq!(run.said(), ["1"], "the answer is gone after its callback");
}

#[test]
fn a_failed_http_call_has_no_headers() {
    let mut run = Run::new(AUTHORISE);
    let id = run.plugin.stream().unwrap();
    run.plugin.request_headers(id, get("/"), true).unwrap();
    let call = Sent::by(&mut run.plugin).http.remove(0);
    run.said();
    run.plugin.http_call_response(call.id, None).unwrap();
    assert_eq!(run.said(), ["1", "4", "0", "0", "0", "11", "reset", "2"]);
    let events = run.plugin.take_events();
    assert_eq!((events[0].stream, events[0].direction), (id, Direction::Request));
    let Step::Reply(reply) = &events[0].step else {
        panic!("{events:?}");
    };
    assert_eq!((reply.status, reply.grpc_status), (503, Some(14)));
}

#[test]
fn a_stream_continued_from_its_own_pausing_callback_goes_on() {
    let guest = r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (drop (call $continue_stream (i32.const 0))) (i32.const 1))
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (drop (call $continue_stream (i32.const 0))) (i32.const 1))"#;
    let mut run = Run::new(guest);
    let id = run.plugin.stream().unwrap();
    assert!(forwarded(run.plugin.request_headers(id, get("/"), false).unwrap()).headers);
    let release = forwarded(run.plugin.request_body(id, b"ab", true).unwrap());
    assert_eq!((release.body.as_slice(), release.end_of_stream), (&b"ab"[..], true));
}

#[test]
fn streams_that_continue_each_other_need_no_deep_stack() {
    // Every stream pauses its headers; each body callback continues the next stream.
    let guest = r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 1))
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (drop (call $set_effective_context (i32.add (local.get 0) (i32.const 1))))
        (drop (call $continue_stream (i32.const 0)))
        (i32.const 0))
      (func (export "proxy_on_tick") (param i32)
        (drop (call $set_effective_context (i32.const 2)))
        (drop (call $continue_stream (i32.const 0))))"#;
    const STREAMS: usize = 20_000;
    let mut run = Run::new(guest);
    for _ in 0..STREAMS {
        let id = run.plugin.stream().unwrap();
        run.plugin.request_headers(id, get("/"), false).unwrap();
        run.plugin.request_body(id, b"x", true).unwrap();
    }
    run.plugin.tick().unwrap();
    assert_eq!(run.plugin.take_events().len(), STREAMS);
}
