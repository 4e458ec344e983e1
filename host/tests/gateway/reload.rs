//! Other configurations and modules while requests are under way.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use driftlock_host::gateway::GatewayError;

use crate::configuration::{folder, start};
use crate::{Peer, echo, get, post, soon};

/// Marks every response; `MARK` is replaced by one letter.
const MARKING_GUEST: &str = r#"(module
  (import "env" "proxy_add_header_map_value" (func $add (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 0) "x-mark")
  (data (i32.const 16) "MARK")
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 65536))
  (func (export "proxy_on_context_create") (param i32 i32))
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
    (drop (call $add (i32.const 2) (i32.const 0) (i32.const 6) (i32.const 16) (i32.const 1)))
    (i32.const 0))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.const 1)))"#;

fn write_guest(folder: &Path, mark: char) {
    let text = MARKING_GUEST.replace("MARK", &mark.to_string());
    // Put in place as a deployment does, so that half a file is never read.
    let staged = folder.join("guest.new");
    std::fs::write(&staged, wat::parse_str(text).expect("valid text")).expect("written");
    std::fs::rename(staged, folder.join("guest.wasm")).expect("renamed");
}

fn yaml(upstream: std::net::SocketAddr, listen: &str, extra: &str) -> String {
    format!(
        "listeners: [{{address: \"{listen}\"}}]\naccess_log: none\nworkers: 2\ntimeouts: {{drain: 5s}}\nfilters: [{{name: guest, module: guest.wasm}}]\nupstreams: {{one: {{uri: \"http://{upstream}\"}}}}\nroutes: [{{upstream: one}}]\n{extra}"
    )
}

/// The bar: reloads under load lose no request out of 50,000.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloading_under_load_loses_no_request() {
    const REQUESTS: usize = 50_000;
    const CLIENTS: usize = 32;
    let upstream = echo().await;
    let folder = folder(&yaml(upstream.address, "127.0.0.1:0", ""));
    write_guest(folder.path(), 'a');
    let mut gateway = start(&folder).await;
    let address = gateway.addr;
    let (sent, marks) = (Arc::new(AtomicUsize::new(0)), Arc::new([const { AtomicUsize::new(0) }; 26]));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        let (sent, marks) = (Arc::clone(&sent), Arc::clone(&marks));
        clients.spawn(async move {
            let mut client = Peer::connect(address).await;
            while sent.fetch_add(1, Ordering::Relaxed) < REQUESTS {
                let answer = soon("an answer", client.exchange(post("/v1", "hello"))).await;
                assert_eq!((answer.status(), answer.text().as_str()), (200, "hello"));
                let mark = answer.header("x-mark").expect("a filter").as_bytes()[0];
                marks[usize::from(mark - b'a')].fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let path = folder.path().join("gateway.yaml");
    let mut reloads = 0;
    while sent.load(Ordering::Relaxed) < REQUESTS {
        reloads += 1;
        // In turns: another module, another upstream's time-out, a configuration that is refused.
        match reloads % 3 {
            0 => write_guest(folder.path(), char::from(b'a' + u8::try_from(reloads % 26).expect("small"))),
            1 => {
                let changed = yaml(upstream.address, "127.0.0.1:0", "")
                    .replace("upstream: one", &format!("upstream: one, timeout: {}s", 100 + reloads));
                std::fs::write(&path, changed).expect("written");
            }
            _ => {
                std::fs::write(&path, "listeners: nonsense").expect("written");
                assert!(gateway.reload_file(&path).await.is_err());
                std::fs::write(&path, yaml(upstream.address, "127.0.0.1:0", "")).expect("written");
            }
        }
        gateway.reload_file(&path).await.unwrap_or_else(|error| panic!("{error}"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    while let Some(client) = clients.join_next().await {
        client.expect("no request failed");
    }
    let marks: usize = marks.iter().filter(|count| count.load(Ordering::Relaxed) > 0).count();
    assert!(reloads >= 6 && marks >= 2, "{reloads} reloads, {marks} modules served");
    assert_eq!(gateway.shutdown().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchange_under_way_ends_as_it_began_and_listeners_come_and_go() {
    let upstream = echo().await;
    let folder = folder(&yaml(upstream.address, "127.0.0.1:0", ""));
    write_guest(folder.path(), 'a');
    let mut gateway = start(&folder).await;
    let mut under_way = Peer::connect(gateway.addr).await;
    under_way.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhello").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    write_guest(folder.path(), 'b');
    let path = folder.path().join("gateway.yaml");
    // Another spelling of the loopback: another listener in the place of the first.
    std::fs::write(&path, yaml(upstream.address, "127.0.0.2:0", "")).expect("written");
    let old = gateway.addr;
    gateway.reload_file(&path).await.unwrap_or_else(|error| panic!("{error}"));
    let new = gateway.addresses()[0];
    assert_ne!(old.ip(), new.ip());
    under_way.send("world").await;
    let answer = soon("the old exchange", under_way.message()).await.expect("an answer");
    assert_eq!((answer.text().as_str(), answer.header("x-mark")), ("helloworld", Some("a")));
    let mut fresh = Peer::connect(new).await;
    assert_eq!(soon("a new one", fresh.exchange(get("/"))).await.header("x-mark"), Some("b"));
    assert!(tokio::net::TcpStream::connect(old).await.is_err(), "the old listener still accepts");
    for (changed, setting) in [("workers: 2", "workers: 3"), ("routes:", "admin: 127.0.0.1:0\nroutes:")] {
        std::fs::write(&path, yaml(upstream.address, "127.0.0.2:0", "").replace(changed, setting))
            .expect("written");
        let error = gateway.reload_file(&path).await.expect_err(setting);
        assert!(matches!(error, GatewayError::NeedsRestart { .. }), "{error}");
    }
    assert_eq!(soon("after a refusal", fresh.exchange(get("/"))).await.header("x-mark"), Some("b"));
}

/// A gateway as an operator runs it.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Program {
    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.0.id().to_string()]).status().expect("kill runs");
        assert!(sent.success());
    }
}

async fn mark(address: std::net::SocketAddr) -> Option<String> {
    let mut client = Peer::connect(address).await;
    soon("an answer", client.exchange(get("/"))).await.header("x-mark").map(str::to_owned)
}

async fn becomes(address: std::net::SocketAddr, wanted: &str) {
    soon(wanted, async {
        while mark(address).await.as_deref() != Some(wanted) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_program_reloads_on_change_and_on_sighup_and_drains_on_sigterm() {
    let upstream = echo().await;
    let free = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port").local_addr().expect("bound");
    let folder = folder(&yaml(upstream.address, &free.to_string(), ""));
    write_guest(folder.path(), 'a');
    let path = folder.path().join("gateway.yaml");
    let program = env!("CARGO_BIN_EXE_driftlock");
    let checked = Command::new(program).args(["gateway", "--check"]).arg(&path).output().expect("runs");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let child = Command::new(program)
        .args(["gateway", "--file"])
        .arg(&path)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let mut program = Program(child);
    soon("the program listens", async {
        while tokio::net::TcpStream::connect(free).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(mark(free).await.as_deref(), Some("a"));
    // A change of the module is seen without a signal.
    write_guest(folder.path(), 'b');
    becomes(free, "b").await;
    // A signal is acted on at once.
    write_guest(folder.path(), 'c');
    program.signal("-HUP");
    becomes(free, "c").await;
    // An exchange under way ends; nothing new is accepted; the program ends by itself.
    let mut under_way = Peer::connect(free).await;
    under_way.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhello").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    program.signal("-TERM");
    let refused = Arc::new(AtomicBool::new(false));
    soon("the listener closes", async {
        while tokio::net::TcpStream::connect(free).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        refused.store(true, Ordering::Relaxed);
    })
    .await;
    under_way.send("world").await;
    let answer = soon("the last answer", under_way.message()).await.expect("an answer");
    assert_eq!(answer.text(), "helloworld");
    soon("the program ends", async {
        while program.0.try_wait().expect("waits").is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(program.0.wait().expect("ended").success());
}
