//! What a worker's VM holds after much traffic: the linear memory of the real module, in wasmtime.
//!
//! Linear memory never shrinks, so its size at the end is the most that was ever needed. The bound is
//! 24 MiB beside the snapshot. Cost: half a minute for 100,000 exchanges and 200 MB on a busy machine.

use std::fmt::Write as _;

use driftlock_host::abi::{
    Clock, HeaderMap, LogSink, MetricValue, Plugin, PluginOptions, SharedState, Step, VirtualClock,
};
use driftlock_host::capture::HttpResponse;
use driftlock_tests::drive::Passage;
use driftlock_tests::{baseline, module, traffic, trained};
use serde_json::json;

const MIB: usize = 1 << 20;

/// Bound beside the snapshot.
const VM_MAX_BYTES: usize = 24 * MIB;

fn start(fields: serde_json::Value) -> Plugin {
    let options = PluginOptions {
        plugin_configuration: trained(fields),
        log: LogSink::discard(),
        ..PluginOptions::default()
    };
    Plugin::start(module(), options).unwrap_or_else(|error| panic!("{error}"))
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(pairs.len());
    pairs.iter().for_each(|(name, value)| map.add(name.as_bytes(), value.as_bytes()));
    map
}

/// One exchange, bodies in one piece.
fn pass(plugin: &mut Plugin, passage: &Passage) {
    let stream = plugin.stream().unwrap();
    let Passage { request, response, .. } = passage;
    let mut map = headers(&[(":method", &request.method), (":path", &request.target)]);
    request.headers.iter().for_each(|(name, value)| map.add(name.as_bytes(), value.as_bytes()));
    plugin.request_headers(stream, map, request.body.is_empty()).unwrap();
    if !request.body.is_empty() {
        plugin.request_body(stream, &request.body, true).unwrap();
    }
    let HttpResponse { status, headers: response_headers, body, .. } = response;
    let mut map = headers(&[(":status", &status.to_string())]);
    response_headers.iter().for_each(|(name, value)| map.add(name.as_bytes(), value.as_bytes()));
    plugin.response_headers(stream, map, body.is_empty()).unwrap();
    if !body.is_empty() {
        plugin.response_body(stream, body, true).unwrap();
    }
    assert!(plugin.done(stream).unwrap().error.is_none());
}

fn assert_small(plugin: &Plugin, after: &str) {
    let (bytes, snapshot) = (plugin.memory_bytes(), baseline().encode().len());
    eprintln!("{after}: {} KiB, snapshot {} KiB", bytes >> 10, snapshot >> 10);
    assert!(bytes <= VM_MAX_BYTES + snapshot, "{after}: {bytes} bytes of memory");
}

#[test]
fn a_hundred_thousand_requests_and_a_long_stream_leave_a_small_vm() {
    let mut plugin = start(json!({"limits": {"max_body_bytes": 1 << 30}}));
    assert_small(&plugin, "configured");
    let passages: Vec<Passage> = traffic(5, 400, 40).iter().map(Passage::of).collect();
    for _ in 0..25 {
        passages.iter().for_each(|passage| pass(&mut plugin, passage));
    }
    let warm = plugin.memory_bytes();
    assert_small(&plugin, "10,000 requests");
    for _ in 0..225 {
        passages.iter().for_each(|passage| pass(&mut plugin, passage));
    }
    assert_small(&plugin, "100,000 requests");
    assert!(plugin.memory_bytes() <= warm + MIB, "it grows with requests");

    // 200 MB of server-sent events, all of them inspected.
    let stream = plugin.stream().unwrap();
    let json = ("content-type", "application/json");
    let path = (":path", "/v1/chat/completions");
    plugin.request_headers(stream, headers(&[(":method", "POST"), path, json]), true).unwrap();
    let event_stream = [(":status", "200"), ("content-type", "text/event-stream")];
    plugin.response_headers(stream, headers(&event_stream), false).unwrap();
    let mut chunk = String::new();
    let mut sent = 0;
    for i in 0u32.. {
        chunk.clear();
        while chunk.len() < 60_000 {
            let word = i.wrapping_mul(2_654_435_761) ^ chunk.len() as u32;
            write!(
                chunk,
                "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" {word}\"}}}}]}}\n\n"
            )
            .unwrap();
        }
        sent += chunk.len();
        let last = sent > 200_000_000;
        assert!(matches!(plugin.response_body(stream, chunk.as_bytes(), last).unwrap(), Step::Forward(_)));
        if last {
            break;
        }
    }
    assert!(plugin.done(stream).unwrap().error.is_none());
    assert_small(&plugin, "200 MB streamed");
}

/// Ten thousand keys that clients would like to make of paths, hosts, kinds and models: there are as many streams
/// as the configuration allows, and one for the rest.
#[test]
fn ten_thousand_stream_keys_stay_in_bounds() {
    const KEYS: usize = 10_000;
    let (shared, clock) = (SharedState::new(), VirtualClock::at_ns(1));
    let options = PluginOptions {
        plugin_configuration: br#"{"alpha": 0.01, "learn": {"messages": 400}, "limits": {"max_streams": 8}}"#
            .to_vec(),
        shared: shared.clone(),
        clock: Clock::Virtual(clock.clone()),
        log: LogSink::discard(),
        ..PluginOptions::default()
    };
    let mut plugin = Plugin::start(module(), options).unwrap_or_else(|error| panic!("{error}"));
    let paths = [
        "/v1/chat/completions",
        "/v1/messages",
        "/v1/embeddings",
        "/model/m/converse",
        "/api/chat",
        "/mcp",
        "/v2/chat",
        "/v1/responses",
        "/v1/completions",
        "/graphql",
        "/",
    ];
    let kinds = [
        "application/json",
        "text/plain",
        "application/x-www-form-urlencoded",
        "text/event-stream",
        "application/x-ndjson",
        "image/png",
    ];
    let mut half = 0;
    for i in 0..KEYS {
        // Gauges are written once a second.
        clock.set_ns(i as u64 * 1_000_000_000);
        let stream = plugin.stream().unwrap();
        let path = format!("/tenant-{i}{}?key={i}", paths[i % paths.len()]);
        let (kind, host) = (kinds[i % kinds.len()], format!("host-{i}.example"));
        let head = [(":method", "POST"), (":path", &path), (":authority", &host), ("content-type", kind)];
        let body = format!("{{\"model\": \"model-{i}\", \"input\": \"text {i}\"}}");
        plugin.request_headers(stream, headers(&head), false).unwrap();
        plugin.request_body(stream, body.as_bytes(), true).unwrap();
        plugin
            .response_headers(stream, headers(&[(":status", "200"), ("content-type", kind)]), false)
            .unwrap();
        plugin.response_body(stream, body.as_bytes(), true).unwrap();
        assert!(plugin.done(stream).unwrap().error.is_none());
        if i == KEYS / 2 {
            half = plugin.memory_bytes();
        }
    }
    let samples = shared.metrics().snapshot();
    let streams =
        samples.iter().find(|sample| sample.name == "driftlock.streams").map(|sample| &sample.value);
    // The ninth is the one that all others share.
    assert!(matches!(streams, Some(MetricValue::Gauge(8..=9))), "{streams:?}");
    eprintln!("{KEYS} names: {} KiB", plugin.memory_bytes() >> 10);
    assert!(plugin.memory_bytes() <= VM_MAX_BYTES && plugin.memory_bytes() <= half + MIB);
}

/// Many encoded answers under way at once share one budget; what finds no room passes all the same.
#[test]
fn many_encoded_streams_at_once_stay_within_the_decoders_budget() {
    let mut plugin = start(json!({}));
    let text: String = (0..300_000u32).map(|i| format!("{:x} ", i.wrapping_mul(2_654_435_761))).collect();
    let bodies = [
        ("gzip", {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut encoder, text.as_bytes()).unwrap();
            encoder.finish().unwrap()
        }),
        // A raw zstd frame with a window of 8 MiB: one block after another, none compressed.
        ("zstd", {
            let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 13 << 3];
            let blocks: Vec<&[u8]> = text.as_bytes().chunks(100_000).collect();
            for (block, left) in blocks.iter().zip((0..blocks.len()).rev()) {
                let header = (block.len() as u32) << 3 | u32::from(left == 0);
                frame.extend_from_slice(&header.to_le_bytes()[..3]);
                frame.extend_from_slice(block);
            }
            frame
        }),
    ];
    let mut open = Vec::new();
    for i in 0..200 {
        let (coding, body) = &bodies[i % 2];
        let stream = plugin.stream().unwrap();
        let request = [(":method", "GET"), (":path", "/v1/models")];
        plugin.request_headers(stream, headers(&request), true).unwrap();
        let response = [(":status", "200"), ("content-type", "text/plain"), ("content-encoding", coding)];
        plugin.response_headers(stream, headers(&response), false).unwrap();
        let part = &body[..body.len() / 2];
        let step = plugin.response_body(stream, part, false).unwrap();
        let Step::Forward(release) = step else { panic!("the answer is held") };
        assert!(release.body == part, "the client gets what was sent");
        open.push(stream);
    }
    let snapshot = baseline().encode().len();
    let bytes = plugin.memory_bytes();
    eprintln!("200 encoded streams at once: {} KiB", bytes >> 10);
    // The decoders' 16 MiB, and half of it more while a ring grows.
    assert!(bytes <= VM_MAX_BYTES + 24 * MIB + snapshot, "{bytes} bytes of memory");
    for stream in open {
        assert!(plugin.done(stream).unwrap().error.is_none());
    }
}
