//! Baselines in a real Envoy with two workers: learned by one and judged by both, pulled from `driftlock
//! serve`, swapped under load; and observations that arrive.
//!
//! Every test starts an Envoy of its own. Which worker gets a connection is the kernel's choice, so the
//! tests open many and look at what all of them say.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use driftlock_host::aggregate::{Args, Service, WatchArgs};
use driftlock_host::envoy::{Envoy, EnvoyOptions};
use driftlock_tests::{ALPHA, baseline, envoy_binary, filter, trained};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

const ANSWER: &str = r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"Paris."}}]}"#;

/// An upstream that gives every request the same answer, `delay` after its end.
async fn upstream(delay: Duration) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            tokio::spawn(async move {
                let mut seen = Vec::new();
                loop {
                    while whole_message(&seen).is_none() {
                        if stream.read_buf(&mut seen).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let length = whole_message(&seen).unwrap();
                    seen.drain(..length);
                    tokio::time::sleep(delay).await;
                    let head = format!(
                        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{ANSWER}",
                        ANSWER.len()
                    );
                    if stream.write_all(head.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// The length of the first message, if it is complete.
fn whole_message(bytes: &[u8]) -> Option<usize> {
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok());
    (bytes.len() >= head + length.unwrap_or(0)).then_some(head + length.unwrap_or(0))
}

/// A request on a connection of its own: what the filter says of it in the response's header, or all of
/// what came back if that is no answer.
async fn ask(envoy: std::net::SocketAddr, body: &str) -> Result<String, String> {
    let mut stream = TcpStream::connect(envoy).await.map_err(|error| error.to_string())?;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.map_err(|error| error.to_string())?;
    if !answer.starts_with("HTTP/1.1 200") || !answer.ends_with(ANSWER) {
        return Err(answer);
    }
    let verdict = answer.lines().find_map(|line| line.strip_prefix("x-driftlock-request: "));
    Ok(verdict.unwrap_or_default().to_owned())
}

fn question(i: usize) -> String {
    let model = ["m-small", "m-large"][i % 2];
    format!(
        r#"{{"model":"{model}","messages":[{{"role":"user","content":"What is the price of order {i} today?"}}]}}"#
    )
}

async fn start(options: EnvoyOptions) -> Envoy {
    tokio::task::spawn_blocking(move || Envoy::start(&options))
        .await
        .unwrap()
        .unwrap_or_else(|e| panic!("{e}"))
}

fn options(upstream: std::net::SocketAddr, configuration: Vec<u8>) -> EnvoyOptions {
    let mut options = EnvoyOptions::new(envoy_binary(), filter(), upstream);
    options.plugin_configuration = configuration;
    options.concurrency = 2;
    options
}

fn counter(envoy: &Envoy, name: &str) -> u64 {
    let name = format!("wasmcustom.driftlock.{name}");
    let stats = tokio::task::block_in_place(|| envoy.stats()).unwrap();
    stats.into_iter().find(|(known, _)| *known == name).map_or(0, |(_, value)| value)
}

/// Waits for `met`, at most so long.
async fn eventually(what: &str, mut met: impl FnMut() -> bool) {
    let started = Instant::now();
    while !met() {
        assert!(started.elapsed() < Duration::from_secs(20), "{what} does not come");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn serve(folder: &Path) -> Service {
    let listen = "127.0.0.1:0".parse().unwrap();
    let args = Args {
        listen,
        snapshots: folder.join("snapshots"),
        observations: folder.join("seen.jsonl"),
        watch: WatchArgs::default(),
    };
    Service::start(&args).await.unwrap()
}

/// Digests named in verdicts.
fn baselines(verdicts: &[String]) -> BTreeSet<&str> {
    verdicts.iter().filter_map(|verdict| verdict.split("baseline=").nth(1)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_judge_by_the_one_baseline_that_was_learned_first() {
    let configuration = json!({"alpha": 0.05, "learn": {"messages": 60}});
    let envoy = start(options(upstream(Duration::ZERO).await, configuration.to_string().into_bytes())).await;
    // Until one worker has finished; the other is under way then.
    let mut verdicts = Vec::new();
    for i in 0..200 {
        verdicts.push(ask(envoy.listen(), &question(i)).await.unwrap());
        if i >= 60 && counter(&envoy, "baselines.shared") > 0 {
            break;
        }
    }
    eventually("its adoption", || counter(&envoy, "baselines.adopted") > 0).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let mut warming = 0;
    for i in 0..60 {
        let verdict = ask(envoy.listen(), &question(i)).await.unwrap();
        warming += usize::from(verdict.starts_with("warming_up"));
        verdicts.push(verdict);
    }
    assert_eq!(warming, 0, "both workers judge now");
    assert_eq!(baselines(&verdicts).len(), 1, "by one baseline: {:?}", baselines(&verdicts));
    assert_eq!(counter(&envoy, "errors.baseline"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_pull_what_the_service_has_and_post_what_they_saw() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("snapshots")).unwrap();
    let service = serve(folder.path()).await;
    let configuration = json!({
        "alpha": ALPHA, "learn": null,
        "pull": {"cluster": "driftlock_service", "interval_s": 1},
        "observations": {"cluster": "driftlock_service"},
    });
    let mut options = options(upstream(Duration::ZERO).await, configuration.to_string().into_bytes());
    options.callout_clusters.push(("driftlock_service".to_owned(), service.address, false));
    let envoy = start(options).await;
    // Nothing there yet: said, and tried again.
    eventually("a failure", || counter(&envoy, "baselines.pull_failures") > 0).await;
    let verdict = ask(envoy.listen(), &question(1)).await.unwrap();
    assert!(verdict.contains("no_baseline"), "{verdict}");
    // A damaged one is not offered; a good one is taken by both workers.
    let bytes = baseline().encode();
    std::fs::write(folder.path().join("snapshots/damaged"), &bytes[..bytes.len() - 1]).unwrap();
    std::fs::write(folder.path().join("snapshots/good"), &bytes).unwrap();
    let taken = || counter(&envoy, "baselines.pulled") + counter(&envoy, "baselines.adopted");
    eventually("both workers' baseline", || taken() >= 2).await;
    let mut verdicts = Vec::new();
    for i in 0..20 {
        verdicts.push(ask(envoy.listen(), &question(i)).await.unwrap());
    }
    assert!(verdicts.iter().all(|verdict| !verdict.contains("no_baseline")), "{verdicts:?}");
    assert_eq!(baselines(&verdicts).len(), 1);
    // 21 exchanges, a line for each message.
    let seen = folder.path().join("seen.jsonl");
    let lines = || std::fs::read_to_string(&seen).unwrap();
    eventually("the observations", || lines().lines().count() >= 42).await;
    for line in lines().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(line["verdict"]["stream"].as_str().unwrap().contains(line["message"].as_str().unwrap()));
    }
    assert_eq!(counter(&envoy, "observations.sent"), 42);
    assert_eq!(counter(&envoy, "observations.dropped"), 0);
    // The service goes away: what was taken stays.
    drop(service);
    let failures = counter(&envoy, "baselines.pull_failures");
    eventually("a failure", || counter(&envoy, "baselines.pull_failures") > failures).await;
    let verdict = ask(envoy.listen(), &question(1)).await.unwrap();
    assert!(verdicts.contains(&verdict), "{verdict}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_configuration_under_load_loses_nothing_and_a_bad_one_changes_nothing() {
    let with_alpha = |alpha: f64| {
        let mut configuration: Value = serde_json::from_slice(&trained(json!({}))).unwrap();
        configuration["alpha"] = json!(alpha);
        configuration["report"] = json!({"log": "never"});
        configuration.to_string().into_bytes()
    };
    let mut options = options(upstream(Duration::from_millis(3)).await, with_alpha(ALPHA));
    options.reconfigurable = true;
    let mut envoy = start(options).await;
    let (stop, passed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for client in 0..4usize {
        let (address, stop, passed) = (envoy.listen(), Arc::clone(&stop), Arc::clone(&passed));
        clients.spawn(async move {
            let mut failures = Vec::new();
            for i in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                match ask(address, &question(client * 100_000 + i)).await {
                    Ok(verdict) if !verdict.is_empty() => passed.fetch_add(1, Ordering::Relaxed),
                    other => {
                        failures.push(format!("{other:?}"));
                        continue;
                    }
                };
            }
            failures
        });
    }
    let passed_so_far = || passed.load(Ordering::Relaxed);
    for alpha in [0.02, 0.03, 0.04] {
        let before = passed_so_far();
        eventually("traffic", || passed_so_far() > before + 50).await;
        tokio::task::block_in_place(|| envoy.reconfigure(with_alpha(alpha))).unwrap();
    }
    // Refused with path and reason; the one before stays.
    let refused =
        tokio::task::block_in_place(|| envoy.reconfigure(br#"{"alpha": 0.02, "alhpa": 1}"#.to_vec()));
    assert!(refused.is_err(), "a bad configuration was taken");
    let said = envoy.log_lines().unwrap().join("\n");
    assert!(said.contains("alhpa") && said.contains("unknown field"), "{said}");
    let before = passed_so_far();
    eventually("traffic", || passed_so_far() > before + 50).await;
    stop.store(true, Ordering::Relaxed);
    while let Some(failures) = clients.join_next().await {
        assert_eq!(failures.unwrap(), Vec::<String>::new());
    }
    let log = std::fs::read_to_string(envoy.access_log()).unwrap();
    let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    let verdict: Value = serde_json::from_str(last["driftlock"]["request"].as_str().unwrap()).unwrap();
    assert_eq!(verdict["alpha"], 0.04);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_answers_what_it_has_and_takes_whole_batches() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("snapshots")).unwrap();
    let service = serve(folder.path()).await;
    let address = service.address;
    let send = |request: String| async move {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        let head = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
        let text = String::from_utf8_lossy(&answer[..head]).to_ascii_lowercase();
        (text[9..12].parse::<u16>().unwrap(), text, answer[head + 4..].to_vec())
    };
    let get = |path: &str, more: &str| {
        send(format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{more}\r\n"))
    };
    let post = |body: &str| {
        let length = body.len();
        send(format!(
            "POST /v1/observations HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
    };
    assert_eq!(get("/healthz", "").await.0, 200);
    assert_eq!(get("/v1/snapshots/current", "").await.0, 404);
    let bytes = baseline().encode();
    let digest = baseline().digest().to_string();
    std::fs::write(folder.path().join("snapshots/a"), &bytes).unwrap();
    for path in ["current", digest.as_str()] {
        let (status, head, body) = get(&format!("/v1/snapshots/{path}"), "").await;
        assert_eq!((status, body == bytes), (200, true));
        assert!(head.contains(&format!("etag: \"{digest}\"")), "{head}");
    }
    let (status, _, body) = get("/v1/snapshots/current", &format!("if-none-match: \"{digest}\"\r\n")).await;
    assert_eq!((status, body.len()), (304, 0));
    assert_eq!(get("/v1/snapshots/00", "").await.0, 404);
    assert_eq!(get("/v1/observations", "").await.0, 405);
    assert_eq!(get("/", "").await.0, 404);

    assert_eq!(post("{\"a\":1}\n\n {\"b\":{}}\r\n").await.0, 204);
    for bad in ["{\"a\":1}\n[2]\n", "{\"a\":1}\n{\"b\"", "1", "{} {}"] {
        let (status, _, body) = post(bad).await;
        assert_eq!(status, 400, "{bad}");
        assert!(String::from_utf8_lossy(&body).contains("line "), "{bad}");
    }
    let seen = std::fs::read_to_string(folder.path().join("seen.jsonl")).unwrap();
    let lines: Vec<&str> = seen.lines().collect();
    let [first, second] = lines[..] else { panic!("{seen}") };
    assert!(first.starts_with("{\"received_unix_ms\":1") && first.ends_with(",\"a\":1}"), "{first}");
    assert!(second.ends_with(",\"b\":{}}"), "{second}");
    // Neither is a verdict, and that is said; what follows verdicts is tested in the aggregation.
    let report: Value = serde_json::from_slice(&get("/v1/streams", "").await.2).unwrap();
    assert_eq!((&report["observations"], &report["unreadable"]), (&json!(0), &json!(2)));
    let metrics = String::from_utf8(get("/metrics", "").await.2).unwrap();
    assert!(metrics.contains("driftlock_observations_unreadable_total 2\n"), "{metrics}");
    assert!(
        Service::start(&Args {
            listen: address,
            snapshots: folder.path().join("none"),
            observations: folder.path().join("seen.jsonl"),
            watch: WatchArgs::default(),
        })
        .await
        .unwrap_err()
        .to_string()
        .contains("none")
    );
}
