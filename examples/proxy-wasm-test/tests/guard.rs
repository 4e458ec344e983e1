//! The filter as Envoy would run it, callback by callback, without an Envoy.

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use driftlock_host::abi::kit::{Script, call};
use driftlock_host::abi::{
    CompileOptions, Direction, HttpCallResponse, MapType, Module, PluginOptions, SharedState, Status,
};

const TARGET: &str = "wasm32-unknown-unknown";

/// Built and compiled once for all tests.
static GUARD: LazyLock<Module> = LazyLock::new(|| {
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guard");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--target", TARGET, "--target-dir"])
        .arg(&output)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(status.success(), "is the target there? rustup target add {TARGET}");
    let wasm = std::fs::read(output.join(TARGET).join("release/api_key_guard.wasm")).unwrap();
    let cache = CompileOptions { cache_directory: Some(output.join("cache")), ..CompileOptions::default() };
    Module::compile_with(&wasm, &cache).unwrap()
});

fn options() -> PluginOptions {
    PluginOptions { plugin_configuration: b"authority".to_vec(), ..PluginOptions::default() }
}

fn request(key: Option<&'static str>) -> Vec<(&'static str, &'static str)> {
    let mut headers = vec![(":method", "GET"), (":path", "/"), (":authority", "shop")];
    headers.extend(key.map(|key| ("x-api-key", key)));
    headers
}

fn answer(status: &str) -> HttpCallResponse {
    HttpCallResponse { headers: [(":status", status)].into_iter().collect(), ..HttpCallResponse::default() }
}

#[test]
fn without_a_key_nobody_is_asked() {
    Script::new()
        .request_headers(request(None), true)
        .makes_no(call("proxy_http_call"))
        .replies(401, "no entry\n")
        .metric("guard_refused", 1)
        .run(&GUARD, options())
        .unwrap();
}

#[test]
fn a_known_key_passes_and_is_remembered() {
    Script::new()
        .request_headers(request(Some("k1")), true)
        .calls([
            call("proxy_get_header_map_value").with(MapType::RequestHeaders).with("x-api-key").returning("k1"),
            call("proxy_remove_header_map_value").with(MapType::RequestHeaders).with("x-api-key"),
            call("proxy_get_shared_data").with("k1").giving(Status::NotFound),
            call("proxy_http_call").with("authority"),
        ])
        .holds()
        .http_answer(0, answer("200"))
        .resumes(0, Direction::Request)
        .stream(1)
        .request_headers(request(Some("k1")), true)
        .makes_no(call("proxy_http_call"))
        .forwards_header("x-api-key", None)
        .run(&GUARD, options())
        .unwrap();
}

#[test]
fn an_unknown_key_and_a_silent_authority_are_told_apart() {
    let asked = Script::new().request_headers(request(Some("k2")), true).holds();
    asked.clone().http_answer(0, answer("404")).replies(403, "no entry\n").run(&GUARD, options()).unwrap();
    asked.http_failure(0).replies(503, "no entry\n").run(&GUARD, options()).unwrap();
    // Envoy refuses the call when it has no such cluster; here the tape answers for it.
    Script::new()
        .answer(call("proxy_http_call"), Status::BadArgument, [])
        .request_headers(request(Some("k2")), true)
        .replies(503, "no entry\n")
        .run(&GUARD, options())
        .unwrap();
}

#[test]
fn workers_share_what_they_learned() {
    let shared = SharedState::new();
    let worker = || PluginOptions { shared: shared.clone(), ..options() };
    let learn = Script::new().request_headers(request(Some("k3")), true).http_answer(0, answer("200"));
    learn.run(&GUARD, worker()).unwrap();
    Script::new().request_headers(request(Some("k3")), true).forwards().run(&GUARD, worker()).unwrap();
}

#[test]
fn a_configuration_without_an_authority_is_refused() {
    let failure = Script::new().run(&GUARD, PluginOptions::default()).unwrap_err();
    assert!(failure.reason().contains("refused its configuration"), "{failure}");
}
