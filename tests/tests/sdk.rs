//! The `openai` and `anthropic` Python SDKs through a real Envoy with the filter to an upstream that speaks
//! both APIs (`fakellm`): no client error, answers as the upstream's, and what the filter stops or redacts seen
//! in the SDKs' own exceptions and values. What is asked and expected is in `clients/sdks.py`.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use driftlock_host::envoy::{Envoy, EnvoyOptions};
use driftlock_tests::{clients_python, envoy_binary, filter, workspace};
use serde_json::{Value, json};

/// fakellm on a free port, ended with the value.
struct Upstream {
    child: Child,
    address: SocketAddr,
}

impl Upstream {
    fn start() -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let child = Command::new(clients_python())
            .args(["-c", "from fakellm.cli import main; main()", "serve", "--config", "fakellm.yaml"])
            .args(["--port", &address.port().to_string()])
            .current_dir(workspace().join("tests/clients"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("fakellm starts");
        let started = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(started.elapsed() < Duration::from_secs(30), "fakellm does not listen");
            sleep(Duration::from_millis(50));
        }
        Self { child, address }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the clients in `mode` through an Envoy whose plugin has these further fields.
fn clients(mode: &str, upstream: &Upstream, fields: Value) {
    let mut configuration = json!({"alpha": 0.02, "learn": {"messages": 80}});
    for (name, value) in fields.as_object().unwrap() {
        configuration[name] = value.clone();
    }
    let mut options = EnvoyOptions::new(envoy_binary(), filter(), upstream.address);
    options.plugin_configuration = configuration.to_string().into_bytes();
    options.allow_on_headers_stop_iteration = mode == "hold";
    let envoy = Envoy::start(&options).unwrap_or_else(|error| panic!("{error}"));
    let output = Command::new(clients_python())
        .arg(workspace().join("tests/clients/sdks.py"))
        .arg(mode)
        .args([upstream.address, envoy.listen()].map(|address| format!("http://{address}")))
        .output()
        .expect("python runs");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let log = envoy.log_lines().unwrap_or_default();
    let log = &log[log.len().saturating_sub(10)..];
    assert!(output.status.success(), "{mode}: {}\n{}\n{}", said[0], said[1], log.join("\n"));
}

#[test]
fn the_sdks_see_redacted_values_and_no_errors() {
    let upstream = Upstream::start();
    clients("redact", &upstream, json!({"actions": [{"stream": "*", "do": ["tag", "redact"]}]}));
}

#[test]
fn the_sdks_raise_their_own_exceptions_for_what_is_blocked() {
    let upstream = Upstream::start();
    let block = json!([{"stream": "*", "do": ["tag", "block"]}]);
    clients("block", &upstream, json!({"actions": block}));
    clients("hold", &upstream, json!({"actions": block, "hold": {"headers": true}}));
}
