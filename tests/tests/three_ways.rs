//! The same exchanges natively, on wasmtime, in the gateway and in a real Envoy: the same verdicts.
//!
//! Verdicts are compared as the JSON text that the filter wrote, so a number that differs in its last
//! digit is a failure. That clients get the upstream's bytes is compared by the replay itself.

use std::fs::File;
use std::path::{Path, PathBuf};

use driftlock_host::capture::{self, Exchange};
use driftlock_host::replay::envoy::{ReplayOptions, ReplayedExchange, VerdictSource, replay_through};
use driftlock_host::replay::upstream::Upstream;
use driftlock_host::replay::{Args, Verdicts, Via, native, replay, run, verify, wasm};
use driftlock_host::synth::{self, SynthOptions};
use driftlock_inspect::session::Plugin;
use driftlock_tests::proxy::{start_envoy, start_gateway};
use driftlock_tests::{envoy_binary, filter, module, recorded, traffic, trained};
use serde_json::{Value, json};

fn natively(configuration: &[u8], exchanges: &[Exchange]) -> Vec<Verdicts> {
    let mut plugin = Plugin::configure(configuration).unwrap();
    exchanges.iter().map(|exchange| native::replay(&mut plugin, exchange.clone())).collect()
}

fn on_wasmtime(configuration: &[u8], exchanges: &[Exchange]) -> Vec<Verdicts> {
    let mut vm = wasm::WasmReplay::start(module(), configuration.to_vec()).unwrap();
    exchanges.iter().map(|exchange| vm.replay(exchange.clone()).unwrap()).collect()
}

async fn in_envoy(configuration: &[u8], exchanges: &[Exchange]) -> Vec<ReplayedExchange> {
    let upstream = Upstream::start().await.unwrap();
    let envoy =
        start_envoy(configuration, upstream.address()).await.unwrap_or_else(|error| panic!("{error}"));
    let mut verdicts = VerdictSource::EnvoyLog(envoy.access_log().to_owned());
    let exchanges = exchanges.iter().cloned();
    replay_through(envoy.listen(), &upstream, &mut verdicts, exchanges, &ReplayOptions::default())
        .await
        .unwrap()
}

async fn in_gateway(configuration: &[u8], exchanges: &[Exchange]) -> Vec<ReplayedExchange> {
    let upstream = Upstream::start().await.unwrap();
    let (gateway, log) = start_gateway(configuration, upstream.address()).await;
    let mut verdicts = VerdictSource::Gateway(log);
    let exchanges = exchanges.iter().cloned();
    replay_through(gateway.addr, &upstream, &mut verdicts, exchanges, &ReplayOptions::default())
        .await
        .unwrap()
}

/// Compares a proxy's verdicts with the native ones; bodies must have arrived as they were sent.
fn compare(way: &str, native: &[Verdicts], proxied: &[ReplayedExchange]) {
    assert_eq!(native.len(), proxied.len());
    for (native, proxied) in native.iter().zip(proxied) {
        assert!(proxied.failure.is_none(), "{way}: {}: {:?}", proxied.id, proxied.failure);
        assert!(proxied.body_matches, "{way}: {}: a body was changed", proxied.id);
        assert_eq!(native.request, proxied.request_verdict_json, "{way}: request of {}", proxied.id);
        assert_eq!(native.response, proxied.response_verdict_json, "{way}: response of {}", proxied.id);
    }
}

/// Passes the exchanges by the four ways and gives back the verdicts.
async fn all_ways(configuration: &[u8], exchanges: &[Exchange]) -> Vec<Verdicts> {
    let native = natively(configuration, exchanges);
    let wasm = on_wasmtime(configuration, exchanges);
    for ((native, wasm), exchange) in native.iter().zip(&wasm).zip(exchanges) {
        assert_eq!(native, wasm, "wasmtime: {}", exchange.id);
    }
    compare("gateway", &native, &in_gateway(configuration, exchanges).await);
    compare("envoy", &native, &in_envoy(configuration, exchanges).await);
    native
}

/// How many messages have each outcome.
fn outcomes(verdicts: &[Verdicts]) -> [usize; 4] {
    let mut counts = [0; 4];
    for json in verdicts.iter().flat_map(|verdicts| [&verdicts.request, &verdicts.response]).flatten() {
        let verdict: Value = serde_json::from_str(json).unwrap();
        let names = ["normal", "warming_up", "not_inspected", "anomalous"];
        let place = names.iter().position(|name| verdict["outcome"] == *name);
        counts[place.unwrap_or_else(|| panic!("no outcome in {json}"))] += 1;
    }
    counts
}

#[tokio::test(flavor = "multi_thread")]
async fn learning_in_place_gives_the_same_verdicts_four_ways() {
    let exchanges = traffic(3, 360, 25);
    let streamed = exchanges.iter().filter(|exchange| {
        let headers = &exchange.response.as_ref().unwrap().headers;
        capture::header(headers, "content-type").is_some_and(|kind| kind.starts_with("text/event-stream"))
    });
    assert!(streamed.count() > 80, "JSON and SSE are both exercised");
    // Anomalies are among what is learned, so a smaller alpha finds next to nothing.
    let configuration = json!({"alpha": 0.1, "learn": {"messages": 60}}).to_string();
    let verdicts = all_ways(configuration.as_bytes(), &exchanges).await;
    let [normal, warming_up, _, anomalous] = outcomes(&verdicts);
    assert!(normal > 200 && warming_up > 200 && anomalous > 10, "{normal} {warming_up} {anomalous}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trained_baseline_gives_the_same_verdicts_four_ways() {
    let exchanges = traffic(4, 300, 50);
    let verdicts = all_ways(&trained(json!({})), &exchanges).await;
    let [normal, warming_up, not_inspected, anomalous] = outcomes(&verdicts);
    assert!(normal > 500 && anomalous >= 45, "{normal} {anomalous}");
    assert_eq!(warming_up, 0);
    // Streams of a few messages: forms, and JSON that is no chat.
    let all = verdicts.iter().flat_map(|verdicts| [&verdicts.request, &verdicts.response]);
    let without_baseline = all.flatten().filter(|json| json.contains(r#""reason":"no_baseline""#)).count();
    assert!(not_inspected < 20 && not_inspected == without_baseline, "{not_inspected} {without_baseline}");
    for (verdicts, exchange) in verdicts.iter().zip(&exchanges) {
        assert!(verdicts.request.is_some() && verdicts.response.is_some(), "{}", exchange.id);
    }
}

fn arguments(file: PathBuf, via: Via, config: &Path, baseline: Option<&Path>) -> Args {
    Args {
        via,
        baseline: baseline.map(Path::to_owned),
        config: Some(config.to_owned()),
        digest: true,
        filter: Some(filter()),
        envoy: Some(envoy_binary()),
        ..Args::new(file)
    }
}

#[test]
fn the_replays_digest_is_one_by_every_path() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("capture.jsonl.gz");
    let options = SynthOptions { seed: 9, count: 200, anomalies: 20, ..SynthOptions::default() };
    let mut gzip = flate2::write::GzEncoder::new(File::create(&file).unwrap(), flate2::Compression::fast());
    synth::write_jsonl(&mut gzip, &synth::generate(&options)).unwrap();
    gzip.finish().unwrap();
    let config = folder.path().join("plugin.json");
    std::fs::write(&config, json!({"alpha": 0.01}).to_string()).unwrap();
    let baseline = folder.path().join("baseline.driftlock");
    std::fs::write(&baseline, driftlock_tests::baseline().encode()).unwrap();
    let summaries = [Via::Native, Via::Wasm, Via::Envoy]
        .map(|via| replay(&arguments(file.clone(), via, &config, Some(&baseline)), std::io::sink()).unwrap());
    assert_eq!(summaries[0], summaries[1], "native and wasm");
    assert_eq!(summaries[0], summaries[2], "native and Envoy");
    assert_eq!((summaries[0].exchanges, summaries[0].failures, summaries[0].bad_rows), (220, 0, 0));
    assert_eq!(summaries[0].digest.len(), 64);
    // The digest is over the verdicts: another baseline's differ.
    let other = replay(&arguments(file, Via::Native, &config, None), std::io::sink()).unwrap();
    assert_ne!(other.digest, summaries[0].digest);
}

#[test]
fn verify_makes_the_run_again_by_another_path_and_names_a_changed_filter() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let options = SynthOptions { seed: 9, count: 40, anomalies: 4, ..SynthOptions::default() };
    synth::write_jsonl(&mut File::create(path("capture.jsonl")).unwrap(), &synth::generate(&options))
        .unwrap();
    std::fs::write(path("plugin.json"), json!({"alpha": 0.01}).to_string()).unwrap();
    std::fs::write(path("baseline"), driftlock_tests::baseline().encode()).unwrap();
    std::fs::copy(filter(), path("filter.wasm")).unwrap();
    let args = arguments(path("capture.jsonl"), Via::Wasm, &path("plugin.json"), Some(&path("baseline")));
    let args = Args { digest: false, out: path("v.jsonl"), filter: Some(path("filter.wasm")), ..args };
    run(&args).unwrap();
    let check = |via| {
        let args = verify::Args {
            manifest: path("v.jsonl.manifest.json"),
            input: None,
            baseline: None,
            filter: None,
            verdicts: None,
            via,
            envoy: Some(envoy_binary()),
            threads: None,
        };
        verify::verify(&args).unwrap().differences
    };
    for via in [None, Some(Via::Native), Some(Via::Envoy)] {
        assert_eq!(check(via), Vec::<String>::new(), "{via:?}");
    }
    let mut module = std::fs::read(path("filter.wasm")).unwrap();
    let middle = module.len() / 2;
    module[middle] ^= 16;
    std::fs::write(path("filter.wasm"), module).unwrap();
    let differences = check(None);
    assert!(
        differences[0].starts_with("the filter ") && differences[0].contains(" bytes "),
        "{differences:?}"
    );
}

/// The recorded exchanges with real providers, where this machine has them.
#[tokio::test(flavor = "multi_thread")]
async fn recorded_exchanges_give_the_same_verdicts_four_ways() {
    let Some(path) = recorded() else {
        println!("skipped: no recorded exchanges beside the workspace (shared/data/llm_exchanges.jsonl.gz)");
        return;
    };
    let rows = capture::open(&path).unwrap();
    let exchanges: Vec<Exchange> = rows.map(|row| row.unwrap().into_exchange().unwrap()).collect();
    assert_eq!(exchanges.len(), 1826);
    let configuration = json!({"alpha": 0.02, "learn": {"messages": 150}}).to_string();
    let verdicts = all_ways(configuration.as_bytes(), &exchanges).await;
    for (verdicts, exchange) in verdicts.iter().zip(&exchanges) {
        assert!(verdicts.failure.is_none(), "{}: {:?}", exchange.id, verdicts.failure);
        assert!(verdicts.request.is_some(), "{} has no verdict", exchange.id);
        let bodiless = exchange.response.as_ref().is_none_or(|response| response.body.is_empty());
        assert!(verdicts.response.is_some() || bodiless, "{}: its response has no verdict", exchange.id);
        for json in [&verdicts.request, &verdicts.response].into_iter().flatten() {
            let verdict: Value = serde_json::from_str(json).unwrap();
            let reasoned = verdict["reason"].as_str().is_some_and(|reason| !reason.is_empty());
            assert!(verdict["outcome"] != "not_inspected" || reasoned, "{}: {json}", exchange.id);
        }
    }
    let [normal, warming_up, not_inspected, anomalous] = outcomes(&verdicts);
    println!(
        "{normal} normal, {warming_up} warming up, {not_inspected} not inspected, {anomalous} anomalous"
    );
    assert!(normal > 0 && anomalous > 0);
}
