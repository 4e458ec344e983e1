//! A guest written with the published Rust SDK, built here for both wasm targets, and every manner it
//! has, through the test kit. What differs between the targets is the start-up form (`_initialize` of the
//! SDK, `_initialize` of wasi-libc), the allocator, and what std imports.

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use driftlock_host::abi::kit::{Script, call};
use driftlock_host::abi::{
    ClosedBy, Direction, GrpcEvent, HttpCallResponse, LogLevel, MapType, Module, Peer, PluginOptions,
    PropertyValue, SharedState, Status, Value,
};

const TARGETS: [&str; 2] = ["wasm32-unknown-unknown", "wasm32-wasip1"];

static GUESTS: LazyLock<[Module; 2]> = LazyLock::new(|| {
    TARGETS.map(|target| {
        let bytes = std::fs::read(build(target)).unwrap();
        Module::compile(&bytes).unwrap_or_else(|error| panic!("{target}: {error}"))
    })
});

/// Builds the guest, and says what is missing if it cannot.
pub(crate) fn build(target: &str) -> std::path::PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests");
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests");
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--locked", "--target", target, "--target-dir"])
        .arg(&output)
        .current_dir(folder)
        // Flags and wrappers meant for the tests are not for the guest.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "is the target there? rustup target add {target}\n{said}");
    output.join(target).join("release/sdk_guest.wasm")
}

fn manner(name: &str) -> PluginOptions {
    PluginOptions { plugin_configuration: name.into(), root_id: "root".into(), ..PluginOptions::default() }
}

/// Runs a script on both builds.
#[track_caller]
fn on_both(name: &str, script: &Script) {
    for (target, guest) in TARGETS.iter().zip(&*GUESTS) {
        if let Err(failure) = script.run(guest, manner(name)) {
            panic!("{target}, manner {name:?}: {failure}");
        }
    }
}

const GET: [(&str, &str); 3] = [(":method", "GET"), (":path", "/p?q"), (":authority", "a")];
const OK: [(&str, &str); 2] = [(":status", "200"), ("server", "s")];

#[test]
fn headers_are_read_and_changed() {
    let request = GET.into_iter().chain([("x-gone", "1"), ("x-set", "old"), ("x-set", "older")]);
    let script = Script::new()
        .request_headers(request.clone(), true)
        .logs(LogLevel::Info, "request headers 6 true")
        .logs(LogLevel::Info, "Some(\"1\")")
        .forwards_header("x-added", "1,2")
        .forwards_header("x-set", "new")
        .forwards_header("x-gone", None)
        .response_headers(OK, false)
        .forwards_header("x-context", "2")
        .forwards_header("server", None)
        .response_body("abc", true)
        .forwards_body("abc")
        .done();
    on_both("headers", &script);
    let script = Script::new()
        .request_headers(request, true)
        .forwards_header("x-more", "1")
        .forwards_header("x-gone", None)
        .forwards_header(":path", "/p?q");
    on_both("all headers", &script);
}

#[test]
fn bodies_are_replaced_in_every_form() {
    for (form, expected) in [
        ("replace", "replaced".to_owned()),
        ("prepend", "before hello".to_owned()),
        ("append", "hello after".to_owned()),
        ("empty", String::new()),
        ("grow", "x".repeat(100_000)),
        ("upper", "HELLO".to_owned()),
        ("none", "hello".to_owned()),
    ] {
        let script = Script::new()
            .request_headers(GET, false)
            .request_body("he", false)
            .holds()
            .request_body("llo", true)
            .forwards_body(&expected)
            .response_headers(OK.into_iter().chain([("content-length", "5")]), false)
            .forwards_header("content-length", None)
            .response_body("hel", false)
            .holds()
            .response_body("lo", false)
            .holds()
            .response_body("", true)
            .forwards_body(&expected)
            .done();
        on_both(&format!("body {form}"), &script);
    }
}

#[test]
fn every_callback_can_reply() {
    let request = |script: Script| script.request_headers(GET, false);
    let all = [
        ("request headers", request(Script::new())),
        ("request body", request(Script::new()).request_body("x", false)),
        ("request trailers", request(Script::new()).request_body("x", false).request_trailers([("t", "1")])),
        ("response headers", Script::new().request_headers(GET, true).response_headers(OK, false)),
    ];
    for (callback, script) in all {
        let reply = |script: Script| {
            script.replies(418, "tea\n").check(|moment, _| match &moment.step {
                Some(driftlock_host::abi::Step::Reply(reply)) if reply.headers.first(b"x-from").is_some() => {
                    Ok(())
                }
                _ => Err("no header x-from".to_owned()),
            })
        };
        on_both(&format!("reply {callback}"), &reply(script).done());
    }
    // Once a response has begun it can only be broken off.
    let begun = Script::new().request_headers(GET, true).response_headers(OK, false);
    on_both("reply response body", &begun.clone().response_body("x", false).closes());
    on_both(
        "reply response trailers",
        &begun.response_body("x", false).response_trailers([("t", "1")]).closes(),
    );
}

#[test]
fn trailers_are_read_and_changed() {
    let script = Script::new()
        .request_headers(GET, false)
        .request_body("x", false)
        .request_trailers([("t", "1")])
        .logs(LogLevel::Info, r#"request trailers 1 [("t", "1")]"#)
        .check(|moment, _| {
            let trailers = moment.trailers.as_ref().ok_or("no trailers go on")?;
            trailers.first(b"x-more").map(drop).ok_or_else(|| format!("{trailers:?}"))
        })
        .response_headers(OK, false)
        .response_trailers([("u", "2")])
        .logs(LogLevel::Info, r#"response trailers 1 [("u", "2")]"#);
    on_both("", &script);
}

#[test]
fn an_http_call_decides() {
    let asks = Script::new()
        .request_headers(GET, true)
        .makes(call("proxy_http_call").with("auth").with_any().with("who").with_any().with(5000))
        .holds();
    let answer = |body: &str| HttpCallResponse {
        headers: OK.into_iter().collect(),
        body: body.into(),
        trailers: [("t", "1")].into_iter().collect(),
    };
    let yes = asks.clone().http_answer(0, answer("yes")).logs(LogLevel::Info, "answer 2 1 yes");
    on_both("call", &yes.resumes(0, Direction::Request).done());
    on_both("call", &asks.clone().http_answer(0, answer("nope")).replies(403, "no\n").done());
    on_both("call", &asks.http_failure(0).replies(403, "no\n").done());
    let refused = Script::new()
        .answer_times(1, call("proxy_http_call"), Status::BadArgument, [])
        .request_headers(GET, true)
        .logs(LogLevel::Info, "call refused BadArgument")
        .forwards();
    on_both("call", &refused);
}

#[test]
fn grpc_calls_and_streams_decide() {
    let asks = Script::new()
        .request_headers(GET, true)
        .makes(call("proxy_grpc_call").with("auth").with("pkg.Auth").with("Check").with_any().with("who"))
        .holds();
    let yes = asks.clone().grpc(0, GrpcEvent::Message(b"yes".to_vec())).logs(LogLevel::Info, "grpc 0 yes");
    on_both("grpc", &yes.resumes(0, Direction::Request));
    let failed = GrpcEvent::Closed { status: 14, message: "away".to_owned() };
    on_both("grpc", &asks.grpc(0, failed).logs(LogLevel::Info, "grpc 14").replies(200, "no"));

    let metadata = || [("x-s", "9")].into_iter().collect();
    let stream = Script::new()
        .request_headers(GET, true)
        .check(|_, played| {
            let sent = &played.sent().grpc_messages;
            let messages: Vec<_> = sent.iter().map(|(_, message, end)| (message.as_slice(), *end)).collect();
            (messages == [(&b"one"[..], false), (b"two", true)]).then_some(()).ok_or(format!("{sent:?}"))
        })
        .grpc(0, GrpcEvent::InitialMetadata(metadata()))
        .logs(LogLevel::Info, "initial 1 Some([57])")
        .grpc(0, GrpcEvent::Message(b"m".to_vec()))
        .logs(LogLevel::Info, "message m")
        .grpc(0, GrpcEvent::TrailingMetadata(metadata()))
        .logs(LogLevel::Info, "trailing 1 Some([57])")
        .grpc(0, GrpcEvent::Closed { status: 0, message: "bye".to_owned() })
        .logs(LogLevel::Info, r#"closed 0 (0, Some("bye"))"#)
        .resumes(0, Direction::Request);
    on_both("grpc stream", &stream);
}

#[test]
fn properties_metrics_shared_data_and_foreign_functions_work() {
    let script = Script::new()
        .stream(0)
        .property(&["source", "address"], PropertyValue::from("1.2.3.4:5"))
        .request_headers(GET.into_iter().chain([("x-a", "b")]), true)
        .logs(LogLevel::Info, r#"request.path Some("/p?q")"#)
        .logs(LogLevel::Info, r#"request.method Some("GET")"#)
        .logs(LogLevel::Info, r#"request.headers.x-a Some("b")"#)
        .logs(LogLevel::Info, r#"source.address Some("1.2.3.4:5")"#)
        .logs(LogLevel::Info, r#"plugin_root_id Some("root")"#)
        .logs(LogLevel::Info, "missing None")
        .logs(LogLevel::Info, "verdict Some")
        .done()
        .leaves("verdict", "fine");
    on_both("properties", &script);
    let script = Script::new().request_headers(GET, true).metric("c", 6).metric("g", 4).done();
    on_both("metrics", &script);
    let race = Script::new()
        .request_headers(GET, true)
        .logs(LogLevel::Info, "1 Ok(())")
        .done()
        .stream(1)
        .request_headers(GET, true)
        .logs(LogLevel::Info, "2 Ok(())")
        .answer_times(1, call("proxy_set_shared_data").with("n"), Status::CasMismatch, [])
        .stream(2)
        .request_headers(GET, true)
        .logs(LogLevel::Info, "lost the race")
        .forwards();
    on_both("shared", &race);
    let script = Script::new()
        .request_headers(GET, true)
        .logs(LogLevel::Info, "true true")
        .logs(LogLevel::Info, "Err(NotFound)");
    on_both("foreign", &script);
}

#[test]
fn time_environment_and_output_are_there() {
    for (target, guest) in TARGETS.iter().zip(&*GUESTS) {
        let options = PluginOptions {
            environment: vec![("MODE".to_owned(), "test".to_owned())],
            vm_configuration: b"vm!".to_vec(),
            ..manner("environment")
        };
        let (log, lines) = driftlock_host::abi::LogSink::capture(LogLevel::Info);
        Script::new().run(guest, PluginOptions { log, ..options }).unwrap();
        let lines: Vec<_> = lines.lock().unwrap().iter().map(|line| line.message.clone()).collect();
        assert_eq!(lines[0], "vm start 3 vm!");
        if *target == "wasm32-wasip1" {
            assert_eq!(lines[1..], ["MODE=Ok(\"test\")", "home true", "to stdout", "to stderr"]);
        }
        let options = manner("time").deterministic(1_700_000_000_000_000_001, 7);
        Script::new()
            .request_headers(GET, true)
            .logs(LogLevel::Info, "1700000000.000000001s")
            .run(guest, options)
            .unwrap();
    }
    let ticks = Script::new()
        .tick()
        .logs(LogLevel::Info, "tick 1")
        .logs(LogLevel::Info, "call true")
        .tick()
        .http_answer(0, HttpCallResponse { headers: OK.into_iter().collect(), ..HttpCallResponse::default() })
        .logs(LogLevel::Info, r#"2 0 0 Some("200")"#)
        .check(|_, played| if played.sent().http.len() == 2 { Ok(()) } else { Err("not two".to_owned()) });
    on_both("tick", &ticks);
}

#[test]
fn queues_reach_from_one_vm_to_another() {
    for (sender, receiver) in [(0, 0), (0, 1), (1, 0)] {
        let shared = SharedState::new();
        let options = |name: &str, vm_id: &str| PluginOptions {
            shared: shared.clone(),
            vm_id: vm_id.to_owned(),
            ..manner(name)
        };
        let send = Script::new().tick().logs(LogLevel::Info, "no queue yet");
        send.run(&GUESTS[sender], options("send", "sender")).unwrap();
        let mut receives = Script::new().run(&GUESTS[receiver], options("receive", "receiver")).unwrap();
        let send = Script::new().tick().logs(LogLevel::Info, "sent Ok(())").tick();
        send.run(&GUESTS[sender], options("send", "sender")).unwrap();
        assert_eq!(receives.plugin().deliver_queues(), Ok(2));
        let tape = receives.tape().to_string();
        assert!(tape.contains("true got item 1") && tape.contains("true got item 2"), "{tape}");
    }
}

#[test]
fn connections_pass_through() {
    let script = Script::new()
        .connect()
        .logs(LogLevel::Info, "connected")
        .data(Peer::Downstream, "abc", false)
        .forwards_body("ABC")
        .data(Peer::Upstream, "later", false)
        .holds()
        .data(Peer::Upstream, " now", true)
        .forwards_body("later now")
        .logs(LogLevel::Info, "upstream closed Unknown")
        .closed(Peer::Downstream, ClosedBy::Remote)
        .logs(LogLevel::Info, "downstream closed Remote")
        .done()
        .logs(LogLevel::Info, "log");
    on_both("tcp", &script);
}

#[test]
fn a_panic_is_a_crash_with_its_message_and_a_refusal_a_failure_to_start() {
    let script = Script::new().request_headers(GET, true).crashes("as asked");
    on_both("panic", &script);
    for guest in &*GUESTS {
        let failure = Script::new().run(guest, manner("refuse")).unwrap_err();
        assert!(failure.reason().contains("proxy_on_configure"), "{failure}");
    }
    on_both("reset", &Script::new().request_headers(GET, true).closes());
}

#[test]
fn a_failed_script_says_what_and_shows_the_tape() {
    let headers = |script: Script| script.request_headers(GET, true);
    let map = Value::from(MapType::RequestHeaders);
    for (script, expected) in [
        (
            headers(Script::new()).replies(500, ""),
            "the filter should reply 500, but: it goes on with headers",
        ),
        (headers(Script::new()).holds(), "it should be held"),
        (headers(Script::new()).closes(), "it should be closed"),
        (headers(Script::new()).crashes("x"), "it should crash"),
        (headers(Script::new()).forwards_body("y"), "\"y\" should go on"),
        (headers(Script::new()).forwards_header("x-set", "old"), "should be Some(\"old\"), but is \"new\""),
        (headers(Script::new()).logs(LogLevel::Error, "x"), "\"x\" should be logged"),
        (headers(Script::new()).metric("m", 1), "metric m should be 1, but is None"),
        (headers(Script::new()).done().leaves("k", "v"), "filter state wasm.k should be \"v\""),
        (headers(Script::new()).resumes(0, Direction::Request), "stream 0 should go on"),
        (headers(Script::new()).calls([]), "one host call too many"),
        (headers(Script::new()).makes(call("proxy_done")), "there is no host call proxy_done(..)"),
        (
            headers(Script::new()).makes_no(call("proxy_remove_header_map_value").with(map)),
            "there should be no host call",
        ),
        (headers(Script::new()).request_body("", true), "came out of order"),
        (Script::new().http_answer(3, HttpCallResponse::default()), "call 0 is not outstanding"),
    ] {
        let failure = script.run(&GUESTS[0], manner("headers")).unwrap_err();
        let text = format!("{failure:?}");
        assert!(text.contains(expected), "{text}");
        assert!(text.starts_with("act ") && text.contains("-> proxy_on_configure"), "{text}");
    }
    let tape = Script::new().request_headers(GET, true).run(&GUESTS[0], manner("headers")).unwrap();
    let tape = tape.tape().to_string();
    for line in [
        "proxy_add_header_map_value(RequestHeaders, \"x-added\", \"1\") = Ok",
        "proxy_get_header_map_value(RequestHeaders, \"x-added\") = Ok \"1\"",
        "-> proxy_on_request_headers(2, 3, 1)",
        "<- proxy_on_request_headers: 0",
    ] {
        assert!(tape.contains(line), "{line} is not in\n{tape}");
    }
}
