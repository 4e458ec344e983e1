//! The same guests in a real Envoy and in this host, callback for callback.
//!
//! Each guest logs what it is called with and what its host calls return; one exchange goes through
//! Envoy over sockets and one through a `Plugin`, and the two lists must be equal. Where they differ,
//! this host is wrong. Left out: buffer 8 (call data), which in Envoy is an alias of whichever buffer
//! was named last. Needs an Envoy, so these tests run only when asked for:
//! `cargo test --release -p driftlock-host --test abi -- --ignored envoy`.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use driftlock_host::abi::{
    Direction, HeaderMap, HeadersPause, HttpCallResponse, Limits, PluginOptions, Step, StreamId,
};
use driftlock_host::envoy::{Envoy, EnvoyOptions, find_binary};

use crate::guest::{Run, Sent, headers, wat};

/// Long enough that Envoy reads two writes apart, on a busy machine too.
const APART: Duration = Duration::from_millis(150);
/// Longest wait for a message that does not come.
const PATIENCE: Duration = Duration::from_secs(5);
const BUFFER_LIMIT_BYTES: u32 = 4096;
/// What Envoy puts into the body of a 503 it makes up.
const CONNECTION_REFUSED: &str =
    "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure";

/// One message: chunks of a chunked body, then trailers.
#[derive(Clone, Default)]
struct Message {
    chunks: Vec<Vec<u8>>,
    trailers: bool,
}

fn message(chunks: &[&str]) -> Message {
    Message { chunks: chunks.iter().map(|chunk| chunk.as_bytes().to_vec()).collect(), trailers: false }
}

impl Message {
    fn has_body(&self) -> bool {
        !self.chunks.is_empty()
    }

    fn with_trailers(mut self) -> Self {
        self.trailers = true;
        self
    }

    /// Writes the message in HTTP/1.1, each chunk on its own. A peer may stop listening.
    fn write(&self, mut to: &TcpStream, head: &str) {
        let mut write = |bytes: &[u8]| {
            let sent = to.write_all(bytes).and_then(|()| to.flush());
            thread::sleep(APART);
            sent.is_ok()
        };
        if !self.has_body() {
            write(format!("{head}content-length: 0\r\n\r\n").as_bytes());
            return;
        }
        let trailer = if self.trailers { "trailer: t\r\n" } else { "" };
        if !write(format!("{head}{trailer}transfer-encoding: chunked\r\n\r\n").as_bytes()) {
            return;
        }
        for chunk in &self.chunks {
            let mut bytes = format!("{:x}\r\n", chunk.len()).into_bytes();
            bytes.extend_from_slice(chunk);
            bytes.extend_from_slice(b"\r\n");
            if !write(&bytes) {
                return;
            }
        }
        write(if self.trailers { b"0\r\nt: 1\r\n\r\n" } else { b"0\r\n\r\n" });
    }
}

struct Case {
    guest: String,
    request: Message,
    response: Message,
    pause: HeadersPause,
    /// What cluster `auth` answers, if the guest calls it; `None` is a closed port.
    auth: Option<&'static str>,
}

impl Case {
    fn new(guest: &str, request: Message, response: Message) -> Self {
        Self { guest: guest.to_owned(), request, response, pause: HeadersPause::default(), auth: None }
    }

    /// What the guest says in Envoy, and what the client receives.
    fn in_envoy(&self) -> (Vec<String>, String) {
        let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/envoy/bin/envoy");
        let explicit = std::env::var_os("DRIFTLOCK_ENVOY").is_none().then_some(installed);
        let binary = find_binary(explicit.as_deref()).unwrap_or_else(|error| panic!("{error}"));
        let folder = tempfile::tempdir().unwrap();
        let wasm = folder.path().join("guest.wasm");
        std::fs::write(&wasm, wat::parse_str(wat(&self.guest)).unwrap()).unwrap();

        let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut options = EnvoyOptions::new(binary, wasm, upstream.local_addr().unwrap());
        options.buffer_limit_bytes = Some(BUFFER_LIMIT_BYTES);
        options.trailers = true;
        options.allow_on_headers_stop_iteration = self.pause == HeadersPause::StopIteration;
        let auth = TcpListener::bind("127.0.0.1:0").unwrap();
        options.callout_clusters = vec![("auth".to_owned(), auth.local_addr().unwrap(), false)];
        match self.auth {
            Some(text) => drop(thread::spawn(move || {
                let Ok((stream, _)) = auth.accept() else { return };
                read_message(&stream);
                // An empty answer is one that never comes.
                let _ = (&stream).write_all(text.as_bytes());
                thread::sleep(8 * APART);
            })),
            None => drop(auth),
        }
        let envoy = Envoy::start(&options).unwrap_or_else(|error| panic!("{error}"));
        let response = self.response.clone();
        thread::spawn(move || answer(&upstream, &response));
        let received = exchange(envoy.listen(), &self.request);
        thread::sleep(4 * APART);
        let lines = envoy.log_lines().unwrap();
        envoy.stop(Duration::from_secs(5)).unwrap();
        let said = lines.iter().filter_map(|line| {
            let (_, after) = line.split_once("wasm log")?;
            Some(after.split_once(": ")?.1.to_owned())
        });
        (said.collect(), received)
    }

    /// What a proxy reports of a call to `auth`, as Envoy was seen to: no connection is a 503 that the
    /// proxy makes up, no answer in time a 504, and a connection lost in the middle of one a failure.
    fn answered(&self) -> Option<HttpCallResponse> {
        let made_up = |status: &str, body: &str| HttpCallResponse {
            headers: headers(&[(":status", status)]),
            body: body.into(),
            ..HttpCallResponse::default()
        };
        match self.auth {
            None => Some(made_up("503", CONNECTION_REFUSED)),
            Some("") => Some(made_up("504", "upstream request timeout")),
            Some(text) => {
                let (head, body) = text.split_once("\r\n\r\n")?;
                let length: usize = head.split_once("content-length: ")?.1.parse().ok()?;
                (body.len() == length).then(|| made_up(&head[9..12], body))
            }
        }
    }

    /// What the guest says here, driven as a proxy drives it.
    fn here(&self) -> Vec<String> {
        let limits = Limits {
            request_buffer_bytes: BUFFER_LIMIT_BYTES as usize,
            response_buffer_bytes: BUFFER_LIMIT_BYTES as usize,
            ..Limits::default()
        };
        // What the Envoy under test calls the plugin.
        let root_id = "driftlock".to_owned();
        let options = PluginOptions {
            limits,
            root_id,
            vm_id: "driftlock".to_owned(),
            headers_pause: self.pause,
            callout_upstreams: Some(["auth".to_owned(), "upstream".to_owned()].into()),
            ..PluginOptions::default()
        };
        let mut run = Run::with(&self.guest, options);
        let id = run.plugin.stream().unwrap();
        let request = headers(&[(":authority", "a"), (":path", "/p?q"), (":method", "POST")]);
        let mut passed = drive(&mut run, id, Direction::Request, request, &self.request);
        for call in Sent::by(&mut run.plugin).http {
            run.plugin.http_call_response(call.id, self.answered()).unwrap();
            // The guest lets the request go on when it has its answer.
            if !run.plugin.take_events().is_empty() {
                passed = Passed::Whole;
            }
        }
        while run.plugin.deliver_queues().unwrap() > 0 {}
        match passed {
            Passed::Whole => {
                let response = headers(&[(":status", "200")]);
                if let Passed::Replied(reply) =
                    drive(&mut run, id, Direction::Response, response, &self.response)
                {
                    assert!(!reply.through_response_callbacks);
                }
            }
            Passed::Replied(reply) => {
                assert!(reply.through_response_callbacks);
                let body = Some(reply.body.clone()).filter(|body| !body.is_empty());
                let whole = Message { chunks: body.into_iter().collect(), trailers: false };
                drive_local(&mut run, id, reply.response_headers(), &whole);
            }
            Passed::Stuck | Passed::Closed => {}
        }
        run.plugin.done(id).unwrap();
        run.said()
    }

    /// Compares both and returns what the client received from Envoy.
    #[track_caller]
    fn same(&self) -> String {
        let (envoy, received) = self.in_envoy();
        assert!(!envoy.is_empty(), "Envoy's guest said nothing; the client got: {received}");
        let here = self.here();
        if here != envoy {
            let same = here.iter().zip(&envoy).take_while(|(a, b)| a == b).count();
            let part = |list: &[String]| list[same.saturating_sub(40)..list.len().min(same + 20)].join(" ");
            panic!(
                "they part after {same} lines\nhere:     {}\nin Envoy: {}\nthe client got: {received}",
                part(&here),
                part(&envoy)
            );
        }
        received
    }
}

enum Passed {
    Whole,
    Stuck,
    Closed,
    Replied(driftlock_host::abi::LocalReply),
}

fn drive(run: &mut Run, id: StreamId, direction: Direction, map: HeaderMap, message: &Message) -> Passed {
    let plugin = &mut run.plugin;
    let mut ended = false;
    let mut note = |step: Step| match step {
        Step::Forward(release) => {
            ended |= release.end_of_stream;
            None
        }
        Step::Hold => None,
        Step::Reply(reply) => Some(Passed::Replied(reply)),
        Step::Close => Some(Passed::Closed),
    };
    let step = match direction {
        Direction::Request => plugin.request_headers(id, map, !message.has_body()),
        Direction::Response => plugin.response_headers(id, map, !message.has_body()),
    };
    if let Some(end) = note(step.unwrap()) {
        return end;
    }
    let last = message.has_body() && !message.trailers;
    let ends = last.then(Vec::new);
    let count = message.chunks.len();
    for (index, chunk) in message.chunks.iter().chain(&ends).enumerate() {
        let step = match direction {
            Direction::Request => plugin.request_body(id, chunk, index == count),
            Direction::Response => plugin.response_body(id, chunk, index == count),
        };
        if let Some(end) = note(step.unwrap()) {
            return end;
        }
    }
    if message.trailers {
        let map = headers(&[("t", "1")]);
        let step = match direction {
            Direction::Request => plugin.request_trailers(id, map),
            Direction::Response => plugin.response_trailers(id, map),
        };
        if let Some(end) = note(step.unwrap()) {
            return end;
        }
    }
    if ended { Passed::Whole } else { Passed::Stuck }
}

/// A local reply is one frame of body, not a chunked stream.
fn drive_local(run: &mut Run, id: StreamId, map: HeaderMap, message: &Message) {
    run.plugin.response_headers(id, map, !message.has_body()).unwrap();
    for chunk in &message.chunks {
        run.plugin.response_body(id, chunk, true).unwrap();
    }
}

/// Answers one request once all of it arrived.
fn answer(listener: &TcpListener, response: &Message) {
    let Ok((stream, _)) = listener.accept() else { return };
    read_message(&stream);
    response.write(&stream, "HTTP/1.1 200 OK\r\n");
    thread::sleep(4 * APART);
}

fn exchange(to: SocketAddr, request: &Message) -> String {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_nodelay(true).unwrap();
    request.write(&stream, "POST /p?q HTTP/1.1\r\nhost: a\r\n");
    let received = read_message(&stream);
    // The peer may be gone already.
    let _ = stream.shutdown(Shutdown::Both);
    received
}

/// Reads one HTTP/1.1 message, or what there is of it when the peer goes or stays silent.
fn read_message(mut stream: &TcpStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while !is_whole(&all) {
        match stream.read(&mut buffer) {
            Ok(count) if count > 0 => all.extend_from_slice(&buffer[..count]),
            _ => break,
        }
    }
    String::from_utf8_lossy(&all).into_owned()
}

fn is_whole(message: &[u8]) -> bool {
    let text = String::from_utf8_lossy(message).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    if head.contains("transfer-encoding: chunked") {
        let body = format!("\r\n{body}");
        return body.contains("\r\n0\r\n") && body.ends_with("\r\n\r\n");
    }
    let length = head.split_once("content-length: ").map_or("0", |(_, rest)| rest);
    let length = length.lines().next().and_then(|length| length.parse().ok());
    body.len() >= length.unwrap_or(0)
}

/// Says the callback's letter, its numbers, then what every map, buffer and property answers.
const PROBE: &str = r#"
  (data (i32.const 300) "QBTRCULDXqbtrcu")
  (data (i32.const 320) "request\00path")
  (data (i32.const 340) "response\00code")
  (data (i32.const 360) ":path")
  (data (i32.const 370) "x-a1")
  (data (i32.const 380) "k")
  (data (i32.const 390) "request\00size")
  (data (i32.const 410) "plugin_root_id")
  (func $letter (param $n i32) (call $tell (i32.add (i32.const 300) (local.get $n)) (i32.const 1)))
  (func $maps (param $map i32)
    (call $say (call $get_header_map_value (local.get $map) (i32.const 360) (i32.const 5)
      (i32.const 0) (i32.const 4)))
    (call $say (call $get_header_map_pairs (local.get $map) (i32.const 0) (i32.const 4)))
    (call $say (i32.ne (i32.load (i32.const 4)) (i32.const 0)))
    (call $say (call $get_header_map_size (local.get $map) (i32.const 0)))
    (call $say (call $add_header_map_value (local.get $map) (i32.const 370) (i32.const 3)
      (i32.const 373) (i32.const 1)))
    (call $say (call $replace_header_map_value (local.get $map) (i32.const 370) (i32.const 3)
      (i32.const 373) (i32.const 1)))
    (call $say (call $remove_header_map_value (local.get $map) (i32.const 370) (i32.const 3))))
  (func $buffers (param $kind i32)
    (i64.store (i32.const 0) (i64.const 0))
    (call $say (call $get_buffer_status (local.get $kind) (i32.const 0) (i32.const 4)))
    (call $say (i32.load (i32.const 0)))
    (i64.store (i32.const 0) (i64.const 0))
    (call $say (call $get_buffer_bytes (local.get $kind) (i32.const 0) (i32.const 100)
      (i32.const 0) (i32.const 4)))
    (call $say (i32.load (i32.const 4)))
    (call $say (call $get_buffer_bytes (local.get $kind) (i32.const 1) (i32.const -1)
      (i32.const 0) (i32.const 4)))
    (call $say (i32.load (i32.const 4)))
    (call $say (call $get_buffer_bytes (local.get $kind) (i32.const -1) (i32.const 1)
      (i32.const 0) (i32.const 4)))
    (call $say (i32.load (i32.const 4)))
    (call $say (call $set_buffer_bytes (local.get $kind) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 0))))
  (func $property (param i32 i32)
    (i64.store (i32.const 0) (i64.const 0))
    (call $say (call $get_property (local.get 0) (local.get 1) (i32.const 0) (i32.const 4)))
    (call $say (i32.load (i32.const 4)))
    (if (i32.load (i32.const 0)) (then (call $say (i32.load8_u (i32.load (i32.const 0)))))))
  (func $probe
    (call $letter (i32.const 9)) (call $maps (i32.const 0))
    (call $letter (i32.const 11)) (call $maps (i32.const 1))
    (call $letter (i32.const 12)) (call $maps (i32.const 2))
    (call $letter (i32.const 14)) (call $maps (i32.const 3))
    (call $letter (i32.const 8)) (call $maps (i32.const 6))
    (call $letter (i32.const 10)) (call $buffers (i32.const 0))
    (call $letter (i32.const 13)) (call $buffers (i32.const 1))
    (call $letter (i32.const 8)) (call $buffers (i32.const 4))
    (call $buffers (i32.const 7))
    (call $property (i32.const 320) (i32.const 12))
    (call $property (i32.const 340) (i32.const 13))
    (call $property (i32.const 410) (i32.const 14))
    (call $say (call $set_property (i32.const 380) (i32.const 1) (i32.const 380) (i32.const 1)))
    (call $property (i32.const 380) (i32.const 1)))
  (func (export "proxy_on_log") (param i32) (call $letter (i32.const 6)) (call $probe))
  (func (export "proxy_on_done") (param i32) (result i32)
    (call $letter (i32.const 7)) (call $probe) (i32.const 1))
  (func (export "proxy_on_delete") (param i32) (call $letter (i32.const 8)))"#;

/// Callbacks that probe, say their numbers, and pause bodies until the end when `pause` is 1.
fn probing(pause: u32) -> String {
    let mut guest = PROBE.to_owned();
    for (letter, name) in [(0, "request_headers"), (3, "response_headers")] {
        guest += &format!(
            r#"(func (export "proxy_on_{name}") (param i32 i32 i32) (result i32)
            (call $letter (i32.const {letter})) (call $say (local.get 2)) (call $probe) (i32.const 0))"#
        );
    }
    for (letter, name) in [(1, "request_body"), (4, "response_body")] {
        guest += &format!(
            r#"(func (export "proxy_on_{name}") (param i32 i32 i32) (result i32)
            (call $letter (i32.const {letter})) (call $say (local.get 1)) (call $say (local.get 2))
            (call $probe) (i32.and (i32.eqz (local.get 2)) (i32.const {pause})))"#
        );
    }
    for (letter, name) in [(2, "request_trailers"), (5, "response_trailers")] {
        guest += &format!(
            r#"(func (export "proxy_on_{name}") (param i32 i32) (result i32)
            (call $letter (i32.const {letter})) (call $say (local.get 1)) (call $probe) (i32.const 0))"#
        );
    }
    guest
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_streams_alike() {
    Case::new(&probing(0), message(&["ab", "cde"]), message(&["fg", "h"])).same();
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_pauses_bodies_alike() {
    let received = Case::new(&probing(1), message(&["ab", "cde"]), message(&["fg", "h"])).same();
    assert!(received.contains("fgh"), "{received}");
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_handles_bodiless_messages_alike() {
    Case::new(&probing(1), message(&[]), message(&[])).same();
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_handles_trailers_alike() {
    let request = message(&["ab"]).with_trailers();
    let response = message(&["cd", "e"]).with_trailers();
    Case::new(&probing(1), request, response).same();
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_limits_requests_alike() {
    let big = "x".repeat(3000);
    // Without the probe: after the reply, Envoy still shows the buffer, which is freed here.
    let guest = r#"
      (data (i32.const 340) "response\00code")
      (func $code
        (call $say (call $get_property (i32.const 340) (i32.const 13) (i32.const 0) (i32.const 4)))
        (if (i32.load (i32.const 4)) (then (call $say (i32.load (i32.load (i32.const 0)))))))
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (call $say (local.get 1)) (call $say (local.get 2)) (call $code) (i32.eqz (local.get 2)))
      (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
        (call $say (i32.const 102)) (call $say (local.get 2)) (call $code) (i32.const 0))
      (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
        (call $say (local.get 1)) (call $say (local.get 2)) (i32.const 0))
      (func (export "proxy_on_log") (param i32) (call $say (i32.const 104)) (call $code))
      (func (export "proxy_on_delete") (param i32) (call $say (i32.const 105)))"#;
    let received = Case::new(guest, message(&[&big, &big, "y"]), message(&["z"])).same();
    assert!(received.contains(" 413 "), "{received}");
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_limits_responses_alike() {
    let big = "x".repeat(3000);
    // Without the probe: after the reset, Envoy's access log still sees the buffer, freed here.
    let guest = r#"(func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
        (call $say (local.get 1)) (i32.const 1))
      (func (export "proxy_on_log") (param i32) (call $say (i32.const 104)))
      (func (export "proxy_on_delete") (param i32) (call $say (i32.const 105)))"#;
    Case::new(guest, message(&[]), message(&[&big, &big, "y"])).same();
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_pauses_headers_alike() {
    let guest = r#"
      (data (i32.const 370) "x-a1")
      (func $add (param $map i32)
        (call $say (call $add_header_map_value (local.get $map) (i32.const 370) (i32.const 3)
          (i32.const 373) (i32.const 1))))
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 1))
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (call $say (local.get 1)) (call $say (local.get 2)) (call $add (i32.const 0))
        (i32.eqz (local.get 2)))
      (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
        (call $add (i32.const 0)) (i32.const 1))
      (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
        (call $say (local.get 1)) (call $say (local.get 2))
        (call $add (i32.const 0)) (call $add (i32.const 2))
        (i32.eqz (local.get 2)))
      (func (export "proxy_on_log") (param i32) (call $add (i32.const 0)) (call $add (i32.const 2)))"#;
    let mut case = Case::new(guest, message(&["ab", "c"]), message(&["de", "f"]));
    case.pause = HeadersPause::StopIteration;
    let received = case.same();
    assert!(received.contains("x-a: 1\r\nx-a: 1\r\n"), "{received}");
    assert!(received.contains("def"), "{received}");
}

/// A guest that answers from one callback and says which callbacks follow.
fn replying(from: &str, body_len: u32) -> String {
    let reply = format!(
        r#"(call $say (call $send_local_response (i32.const 418) (i32.const 0) (i32.const 0)
        (i32.const 380) (i32.const {body_len}) (i32.const 0) (i32.const 0) (i32.const -1)))"#
    );
    let mut guest = r#"(data (i32.const 380) "tea")"#.to_owned();
    for (letter, name) in
        [(100, "request_headers"), (101, "request_body"), (102, "response_headers"), (103, "response_body")]
    {
        let answer = if name == from { &reply } else { "" };
        guest += &format!(
            r#"(func (export "proxy_on_{name}") (param i32 i32 i32) (result i32)
            (call $say (i32.const {letter})) (call $say (local.get 2)) {answer} (i32.const 0))"#
        );
    }
    guest
        + r#"(func (export "proxy_on_log") (param i32) (call $say (i32.const 104)))
        (func (export "proxy_on_delete") (param i32) (call $say (i32.const 105)))"#
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_replies_alike() {
    for from in ["request_headers", "request_body", "response_headers", "response_body"] {
        for body_len in [3, 0] {
            let case = Case::new(&replying(from, body_len), message(&["ab"]), message(&["cd"]));
            let received = case.same();
            assert_eq!(received.contains(" 418 "), from != "response_body", "{from}: {received}");
        }
    }
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_closes_streams_alike() {
    for (name, kind) in
        [("request_headers", 0), ("request_body", 0), ("response_headers", 1), ("response_body", 1)]
    {
        let guest = format!(
            r#"(func (export "proxy_on_{name}") (param i32 i32 i32) (result i32)
            (call $say (call $close_stream (i32.const {kind}))) (i32.const 0))
            (func (export "proxy_on_log") (param i32) (call $say (i32.const 104)))
            (func (export "proxy_on_delete") (param i32) (call $say (i32.const 105)))"#
        );
        Case::new(&guest, message(&["ab"]), message(&["cd"])).same();
    }
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_replaces_bodies_alike() {
    let mut calls = String::new();
    for (start, length) in
        [(1, 0), (2, 9), (0, 1), (0, 0), (9, 0), (-1, -1), (3, 0), (0, 99), (2, 0), (0, -1)]
    {
        calls += &format!(
            "(call $say (call $set_buffer_bytes (local.get 3) (i32.const {start}) (i32.const {length})
              (i32.const 380) (i32.const 3)))
            (drop (call $get_buffer_bytes (local.get 3) (i32.const 0) (i32.const 99) (i32.const 0) (i32.const 4)))
            (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4)))\n"
        );
    }
    let mut guest = r#"(data (i32.const 380) "tea")"#.to_owned();
    for (kind, name) in [(0, "request_body"), (1, "response_body")] {
        guest += &format!(
            r#"(func (export "proxy_on_{name}") (param i32 i32 i32) (result i32) (local i32)
            (local.set 3 (i32.const {kind}))
            {calls} (i32.eqz (local.get 2)))"#
        );
    }
    Case::new(&guest, message(&["abcd", "e"]), message(&["fghi", "j"])).same();
}

/// Calls `auth` and says everything about the answer, then lets the request go on.
fn calling(timeout_ms: u32) -> String {
    format!(
        r#"
      (data (i32.const 100) "auth")
      (data (i32.const 110) "nope")
      (data (i32.const 120) ":status")
      (data (i32.const 200) "\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\02\00\00\00\0a\00\00\00\01\00\00\00:method\00GET\00:path\00/c\00:authority\00a\00")
      (global $stream (mut i32) (i32.const 0))
      (func $call (param $name i32) (param $headers i32) (param $timeout i32)
        (call $say (call $http_call (local.get $name) (i32.const 4) (i32.const 200)
          (local.get $headers) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (local.get $timeout) (i32.const 0))))
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (global.set $stream (local.get 0))
        (call $call (i32.const 110) (i32.const 62) (i32.const 0))
        (call $call (i32.const 100) (i32.const 0) (i32.const 0))
        (call $call (i32.const 100) (i32.const 62) (i32.const -1))
        (call $call (i32.const 100) (i32.const 62) (i32.const {timeout_ms}))
        (call $say (i32.load (i32.const 0)))
        (i32.const 1))
      (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
        (call $say (i32.const 77)) (call $say (local.get 1)) (call $say (i32.gt_u (local.get 2) (i32.const 0)))
        (call $say (local.get 3)) (call $say (local.get 4))
        (drop (call $get_status (i32.const 0) (i32.const 4) (i32.const 8)))
        (call $say (i32.load (i32.const 0)))
        (call $tell (i32.load (i32.const 4)) (i32.load (i32.const 8)))
        (call $say (call $get_header_map_value (i32.const 6) (i32.const 120) (i32.const 7)
          (i32.const 0) (i32.const 4)))
        (if (local.get 2) (then (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4)))))
        (if (local.get 3) (then
          (call $say (call $get_buffer_bytes (i32.const 4) (i32.const 0) (i32.const 999) (i32.const 0) (i32.const 4)))
          (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4)))))
        (call $say (call $get_header_map_value (i32.const 0) (i32.const 120) (i32.const 7)
          (i32.const 0) (i32.const 4)))
        (call $say (call $set_effective_context (global.get $stream)))
        (call $say (call $get_header_map_value (i32.const 0) (i32.const 207) (i32.const 0)
          (i32.const 0) (i32.const 4)))
        (call $say (call $continue_stream (i32.const 0))))
      (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
        (call $say (i32.const 78)) (i32.const 0))
      (func (export "proxy_on_delete") (param i32) (call $say (i32.const 105)))"#
    )
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_answers_calls_alike() {
    for (auth, timeout_ms) in [
        (Some("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes"), 0),
        (Some("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n"), 2000),
        // Cut off in its body.
        (Some("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nyes"), 0),
        // Out of time.
        (Some(""), 100),
        (None, 0),
    ] {
        let mut case = Case::new(&calling(timeout_ms), message(&[]), message(&["x"]));
        case.auth = auth;
        case.same();
    }
}

#[test]
#[ignore = "needs an Envoy: cargo xtask envoy"]
fn envoy_keeps_shared_things_alike() {
    let mut calls = String::new();
    for kind in 0..4 {
        calls += &format!(
            "(call $say (call $define_metric (i32.const {kind}) (i32.const 100) (i32.const 3) (i32.const 0)))
             (call $say (i32.load (i32.const 0)))
             (call $metric (i32.load (i32.const 0)))\n"
        );
    }
    for id in [0, 1, 2, 3, 4000, 4001, 4002, 4003] {
        calls += &format!("(call $metric (i32.const {id}))\n");
    }
    let guest = format!(
        r#"
      (data (i32.const 100) "xyz")
      (data (i32.const 110) "other")
      (func $metric (param i32)
        (call $say (call $increment_metric (local.get 0) (i64.const 0)))
        (call $say (call $increment_metric (local.get 0) (i64.const -2)))
        (call $say (call $record_metric (local.get 0) (i64.const 7)))
        (call $say (call $increment_metric (local.get 0) (i64.const 5)))
        (call $say (call $increment_metric (local.get 0) (i64.const -2)))
        (i64.store (i32.const 8) (i64.const 99))
        (call $say (call $get_metric (local.get 0) (i32.const 8)))
        (call $say (i32.load (i32.const 8))))
      (func $data (param $cas i32)
        (call $say (call $set_shared_data (i32.const 100) (i32.const 1) (i32.const 100) (i32.const 2)
          (local.get $cas))))
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        {calls}
        (call $say (call $get_shared_data (i32.const 100) (i32.const 1) (i32.const 0) (i32.const 4) (i32.const 8)))
        (call $data (i32.const 55)) (call $data (i32.const 0))
        (call $say (call $get_shared_data (i32.const 100) (i32.const 1) (i32.const 0) (i32.const 4) (i32.const 8)))
        (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4)))
        (call $data (i32.load (i32.const 8))) (call $data (i32.load (i32.const 8)))
        (call $say (call $set_shared_data (i32.const 102) (i32.const 1) (i32.const 100) (i32.const 0) (i32.const 0)))
        (call $say (call $get_shared_data (i32.const 102) (i32.const 1) (i32.const 0) (i32.const 4) (i32.const 8)))
        (call $say (i32.load (i32.const 4)))

        (call $say (call $resolve_shared_queue (i32.const 0) (i32.const 0) (i32.const 100) (i32.const 3) (i32.const 0)))
        (call $say (call $register_shared_queue (i32.const 100) (i32.const 3) (i32.const 0)))
        (call $say (i32.load (i32.const 0)))
        (call $say (call $register_shared_queue (i32.const 100) (i32.const 3) (i32.const 0)))
        (call $say (i32.load (i32.const 0)))
        (call $say (call $register_shared_queue (i32.const 100) (i32.const 2) (i32.const 0)))
        (call $say (i32.load (i32.const 0)))
        (call $say (call $resolve_shared_queue (i32.const 0) (i32.const 0) (i32.const 100) (i32.const 3) (i32.const 0)))
        (call $say (i32.load (i32.const 0)))
        (call $say (call $resolve_shared_queue (i32.const 110) (i32.const 5) (i32.const 100) (i32.const 3) (i32.const 0)))
        (call $say (call $dequeue_shared_queue (i32.const 1) (i32.const 0) (i32.const 4)))
        (call $say (call $dequeue_shared_queue (i32.const 9) (i32.const 0) (i32.const 4)))
        (call $say (call $enqueue_shared_queue (i32.const 1) (i32.const 110) (i32.const 5)))
        (call $say (call $enqueue_shared_queue (i32.const 1) (i32.const 111) (i32.const 2)))
        (call $say (call $enqueue_shared_queue (i32.const 9) (i32.const 110) (i32.const 5)))

        (call $say (call $done)) (call $say (call $set_effective_context (i32.const 0)))
        (call $say (call $set_effective_context (i32.const 9999)))
        (call $say (call $get_status (i32.const 0) (i32.const 4) (i32.const 8)))
        (call $say (i32.load (i32.const 0)))
        (call $say (call $call_foreign_function (i32.const 100) (i32.const 3) (i32.const 0) (i32.const 0)
          (i32.const 8) (i32.const 12)))
        (call $say (call $grpc_send (i32.const 2) (i32.const 0) (i32.const 0) (i32.const 0)))
        (call $say (call $grpc_send (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 0)))
        (call $say (call $grpc_close (i32.const 0))) (call $say (call $grpc_close (i32.const 1)))
        (call $say (call $grpc_cancel (i32.const 2))) (call $say (call $grpc_cancel (i32.const 3)))
        (call $say (call $grpc_call (i32.const 100) (i32.const 3) (i32.const 100) (i32.const 3)
          (i32.const 100) (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (i32.const 100) (i32.const 0)))
        (call $say (call $grpc_stream (i32.const 100) (i32.const 3) (i32.const 100) (i32.const 3)
          (i32.const 100) (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 0)))
        (i32.const 0))
      (func (export "proxy_on_queue_ready") (param i32 i32)
        (call $say (i32.const 88)) (call $say (local.get 1))
        (call $say (call $dequeue_shared_queue (local.get 1) (i32.const 0) (i32.const 4)))
        (call $tell (i32.load (i32.const 0)) (i32.load (i32.const 4))))"#
    );
    Case::new(&guest, message(&[]), message(&["x"])).same();
}
