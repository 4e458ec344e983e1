//! Replays end to end, by the program itself where it is killed, else by the library: every recording has
//! its line, whatever the format, the threads or the interruptions; a flipped bit is found and named.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use driftlock_host::capture::{
    self, Exchange, HttpRequest, HttpResponse, Packing, Place, Recorded, Recorder, RecorderOptions,
    Redaction, Writer, WriterOptions,
};
use driftlock_host::gateway::{AccessLogTarget, FilterSource, Gateway, GatewayOptions};
use driftlock_host::replay::envoy::{ReplayOptions, VerdictSource, replay_through};
use driftlock_host::replay::upstream::Upstream;
use driftlock_host::replay::verify::{self, verify};
use driftlock_host::replay::{Args, Summary, Via, replay, wire};
use driftlock_host::synth::{self, SynthOptions};
use driftlock_host::train::train;
use driftlock_host::{envoy, explain};
use driftlock_inspect::config::Config;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with traffic, a baseline and a configuration.
struct Ground {
    folder: TempDir,
    traffic: PathBuf,
    baseline: PathBuf,
    config: PathBuf,
    /// Streams of the baseline.
    streams: usize,
}

fn ground(count: usize) -> Ground {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let traffic = path("traffic.jsonl");
    let options = SynthOptions { seed: 21, count, anomalies: count / 20, ..SynthOptions::default() };
    synth::write_jsonl(&mut fs::File::create(&traffic).unwrap(), &synth::generate(&options)).unwrap();
    // A row that cannot be read, and one that cannot be sent.
    let mut text = fs::read_to_string(&traffic).unwrap();
    text.insert_str(0, "{\"id\": \"broken\"\n");
    text.push_str(r#"{"id":"connect","kind":"http_exchange","text":"CONNECT a:1 HTTP/1.1\r\n\r\n"}"#);
    fs::write(&traffic, text).unwrap();
    let normals = synth::generate(&SynthOptions { seed: 3, count: 900, ..SynthOptions::default() });
    let config = Config::parse(br#"{"alpha": 0.01}"#).unwrap();
    let trained = train(normals.into_iter().map(|labelled| labelled.exchange).collect(), config, 1).unwrap();
    let baseline = path("baseline.driftlock");
    fs::write(&baseline, trained.snapshot.encode()).unwrap();
    let config = path("plugin.json");
    fs::write(&config, r#"{"alpha": 0.01}"#).unwrap();
    Ground { traffic, baseline, config, folder, streams: trained.snapshot.streams().len() }
}

impl Ground {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn args(&self) -> Args {
        Args {
            baseline: Some(self.baseline.clone()),
            config: Some(self.config.clone()),
            digest: true,
            ..Args::new(self.traffic.clone())
        }
    }

    /// The program, replaying into `out`.
    fn command(&self, out: &Path, learns: bool, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_driftlock"));
        command.arg("replay").arg(&self.traffic).arg("--config").arg(&self.config).arg("--out").arg(out);
        if !learns {
            command.arg("--baseline").arg(&self.baseline);
        }
        command.args(more).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }
}

fn lines(args: &Args) -> (Summary, Vec<Value>) {
    let mut out = Vec::new();
    let summary = replay(args, &mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    (summary, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

/// Rows in = lines out, and each is a verdict, a failure or an error.
fn accounted(summary: &Summary, lines: &[Value], rows: u64) {
    assert_eq!(lines.len() as u64, rows);
    assert_eq!(summary.exchanges + summary.bad_rows, rows);
    for line in lines {
        let verdict = line["request"]["outcome"].is_string() || line["response"]["outcome"].is_string();
        assert!(verdict || line["failure"].is_string() || line["error"].is_string(), "{line}");
    }
}

#[test]
fn threads_and_seeds_change_nothing() {
    let ground = ground(500);
    let digest = |threads: usize, seed: u64, learns: bool| {
        let args = Args { threads: Some(threads), seed, ..ground.args() };
        let args = if learns { Args { baseline: None, ..args } } else { args };
        replay(&args, std::io::sink()).unwrap()
    };
    for learns in [false, true] {
        let one = digest(1, 0, learns);
        assert_eq!((one.exchanges, one.failures, one.bad_rows), (526, 1, 1));
        for (threads, seed) in [(2, 0), (5, 0), (1, 7), (3, 8)] {
            assert_eq!(digest(threads, seed, learns), one, "{threads} threads, seed {seed}, {learns}");
        }
    }
}

/// Streams beyond the limit share one: which they are depends on the order of all exchanges.
#[test]
fn threads_change_nothing_where_streams_are_counted() {
    let ground = ground(300);
    // Room for one stream without a baseline, of several.
    let limits = json!({"max_streams": ground.streams + 1});
    fs::write(&ground.config, json!({"alpha": 0.01, "limits": limits}).to_string()).unwrap();
    let run = |threads| lines(&Args { threads: Some(threads), ..ground.args() });
    let (one, first) = run(1);
    assert!(first.iter().any(|line| line.to_string().contains("overflow")), "no stream overflowed");
    assert_eq!((run(4), run(2).0), ((one.clone(), first), one));
}

#[test]
fn a_paced_replay_takes_its_time_and_gives_the_same() {
    let ground = ground(12);
    let plain = replay(&ground.args(), std::io::sink()).unwrap();
    let started = Instant::now();
    // Some 84 seconds of traffic.
    let paced = replay(&Args { speed: Some(100.0), ..ground.args() }, std::io::sink()).unwrap();
    let took = started.elapsed();
    assert_eq!(plain, paced);
    assert!(took > Duration::from_millis(600), "{took:?}");
    let error = replay(&Args { speed: Some(-1.0), ..ground.args() }, std::io::sink()).unwrap_err();
    assert!(error.to_string().contains("--speed"), "{error}");
}

/// SplitMix64: the moments of the kills differ, and a failure names its seed.
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `DRIFTLOCK_KILLS` says how often; the bar is 100.
#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let kills = std::env::var("DRIFTLOCK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let ground = ground(2_500);
    for learns in [false, true] {
        let whole = ground.path("whole.jsonl");
        let started = Instant::now();
        assert!(ground.command(&whole, learns, &[]).status().unwrap().success());
        let took_us = started.elapsed().as_micros() as u64;
        let expected = fs::read(&whole).unwrap();
        let (mut state, mut killed, mut resumed) = (u64::from(learns) + 99, 0, 0);
        let out = ground.path("killed.jsonl");
        while killed < kills / 2 + kills % 2 {
            let mut arguments = vec!["--resume"];
            if draw(&mut state).is_multiple_of(4) {
                arguments.extend(["--threads", "1"]);
            }
            let mut child = ground.command(&out, learns, &arguments).spawn().unwrap();
            std::thread::sleep(Duration::from_micros(draw(&mut state) % took_us));
            let over = child.try_wait().unwrap().is_some();
            child.kill().unwrap();
            let status = child.wait().unwrap();
            killed += u64::from(!over);
            let partial = ground.path("killed.jsonl.partial");
            resumed += u64::from(partial.metadata().is_ok_and(|partial| partial.len() > 0));
            if over {
                assert!(status.success(), "{status}");
                assert!(fs::read(&out).unwrap() == expected, "other bytes after {killed} kills");
                fs::remove_file(&out).unwrap();
            }
        }
        assert!(ground.command(&out, learns, &["--resume"]).status().unwrap().success());
        assert!(fs::read(&out).unwrap() == expected, "other bytes after the last kill");
        assert!(
            !ground.path("killed.jsonl.partial").exists()
                && !ground.path("killed.jsonl.partial.json").exists()
        );
        println!("learns {learns}: {killed} kills, {resumed} of them with lines written");
        let manifests = ["whole.jsonl", "killed.jsonl"].map(|name| {
            let text = fs::read(ground.path(&format!("{name}.manifest.json"))).unwrap();
            serde_json::from_slice::<Value>(&text).unwrap()
        });
        assert_eq!(manifests[0]["verdicts"], manifests[1]["verdicts"]);
        assert_eq!(manifests[0]["counts"], manifests[1]["counts"]);
        fs::remove_file(&out).unwrap();
    }
}

/// What is written into a pipe; who never opens it must not keep the test waiting for ever.
fn piped(pipe: &Path) -> Vec<u8> {
    let (sender, receiver) = channel();
    let pipe = pipe.to_owned();
    std::thread::spawn(move || sender.send(fs::read(pipe).unwrap()));
    receiver.recv_timeout(Duration::from_secs(60)).unwrap()
}

#[test]
fn what_is_no_file_is_written_into_and_stays_what_it_is() {
    use std::os::unix::fs::FileTypeExt as _;
    let ground = ground(200);
    let whole = ground.path("whole.jsonl");
    assert!(ground.command(&whole, false, &[]).status().unwrap().success());
    let expected = fs::read(&whole).unwrap();

    let pipe = ground.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let manifest = pipe.to_str().unwrap();
    let mut child = ground.command(&pipe, false, &[]).spawn().unwrap();
    assert!(piped(&pipe) == expected);
    assert!(child.wait().unwrap().success());
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
    assert!(!ground.path("pipe.manifest.json").exists() && !ground.path("pipe.partial").exists());
    // A manifest too.
    let mut child = ground.command(Path::new("-"), false, &["--manifest", manifest]).spawn().unwrap();
    assert!(piped(&pipe).starts_with(b"{"));
    assert!(child.wait().unwrap().success());
    assert!(!ground.command(&pipe, false, &["--resume"]).status().unwrap().success());
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());

    let (link, target) = (ground.path("link.jsonl"), ground.path("target.jsonl"));
    fs::write(&target, "").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    assert!(ground.command(&link, false, &[]).status().unwrap().success());
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink() && fs::read(&target).unwrap() == expected);
    let folder = ground.command(ground.folder.path(), false, &[]).status().unwrap();
    assert!(!folder.success());
}

#[test]
fn lines_of_another_run_are_not_taken_up() {
    let ground = ground(400);
    let out = ground.path("v.jsonl");
    assert!(ground.command(&out, false, &[]).status().unwrap().success());
    // As if killed: some lines, a half one, and what the run was begun with.
    let lines = fs::read(&out).unwrap();
    let mut child = ground.command(&out, false, &["--speed", "0.001"]).spawn().unwrap();
    let begun = ground.path("v.jsonl.partial.json");
    while !begun.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    fs::write(ground.path("v.jsonl.partial"), &lines[..lines.len() / 3]).unwrap();
    let other = ground.command(&out, true, &["--resume"]).stderr(Stdio::piped()).output().unwrap();
    let message = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(!other.status.success() && message.contains("another baseline"), "{message}");
    assert!(ground.command(&out, false, &["--resume"]).status().unwrap().success());
    assert!(fs::read(&out).unwrap() == lines);
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn verify_names_a_flipped_bit() {
    let ground = ground(300);
    let out = ground.path("v.jsonl");
    assert!(ground.command(&out, false, &[]).status().unwrap().success());
    let manifest = ground.path("v.jsonl.manifest.json");
    let args = |via| verify::Args {
        manifest: manifest.clone(),
        input: None,
        baseline: None,
        filter: None,
        verdicts: None,
        via,
        envoy: None,
        threads: None,
    };
    let report = verify(&args(None)).unwrap();
    assert_eq!((report.differences, report.lines), (vec![], 317));

    let size = |path: &Path| path.metadata().unwrap().len() as usize;
    let mut state = 5;
    // In the input: in a text, so that a verdict may or may not change; in the baseline; in the verdicts.
    for (path, named) in
        [(&ground.traffic, "the capture "), (&ground.baseline, "the baseline "), (&out, "verdict line ")]
    {
        for _ in 0..6 {
            let at = draw(&mut state) as usize % size(path);
            flip(path, at);
            let report = verify(&args(None)).unwrap();
            flip(path, at);
            let found = report.differences.iter().any(|difference| difference.starts_with(named));
            assert!(found, "byte {at} of {}: {:?}", path.display(), report.differences);
            let names_place =
                report.differences.iter().any(|d| d.contains(" bytes ") || d.contains("from byte"));
            assert!(names_place, "{:?}", report.differences);
        }
    }
    let counts = fs::read_to_string(&manifest).unwrap().find("\"normal\"").unwrap();
    flip(&manifest, counts + 10);
    let report = verify(&args(None)).unwrap();
    assert!(report.differences[0].starts_with("the manifest was changed"), "{report:?}");
    flip(&manifest, counts + 10);
    assert!(verify(&args(None)).unwrap().differences.is_empty());
}

#[test]
fn a_har_of_5000_entries_is_accounted_for() {
    let folder = tempfile::tempdir().unwrap();
    let options = SynthOptions { seed: 4, count: 5_000, ..SynthOptions::default() };
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_owned()).unwrap();
    let pairs = |headers: &[(String, String)]| -> Vec<Value> {
        headers.iter().map(|(name, value)| json!({"name": name, "value": value})).collect()
    };
    let har = folder.path().join("session.har");
    let mut out = std::io::BufWriter::new(fs::File::create(&har).unwrap());
    writeln!(out, "{{\"log\": {{\"version\": \"1.2\", \"creator\": {{}}, \"entries\": [").unwrap();
    for (i, labelled) in synth::generator(&options).unwrap().enumerate() {
        let Exchange { request, response, .. } = labelled.exchange;
        let response = response.unwrap();
        let entry = json!({
            "startedDateTime": "2026-11-12T08:30:00.000Z",
            "request": {"method": if i % 1000 == 7 { "CONNECT" } else { &request.method }, "url": format!("https://gateway.example{}", request.target),
                "headers": pairs(&request.headers), "postData": {"mimeType": "application/json", "text": text(&request.body)}},
            "response": {"status": if i % 1000 == 9 { 0 } else { 200 }, "headers": pairs(&response.headers),
                "content": {"mimeType": "application/json", "text": text(&response.body)}},
        });
        let entry = if i % 1000 == 5 { json!({"request": 5}) } else { entry };
        write!(out, "{}{entry}", if i > 0 { ",\n" } else { "" }).unwrap();
    }
    write!(out, "]}}}}").unwrap();
    out.flush().unwrap();
    let (summary, lines) = lines(&Args::new(har));
    accounted(&summary, &lines, 5_000);
    assert_eq!((summary.bad_rows, summary.failures), (5, 5));
    assert!(lines[5]["error"].as_str().unwrap().starts_with("line 7: "), "{}", lines[5]);
}

/// Every file of the evaluation data, where this machine has them: they are not part of the project.
#[test]
fn the_evaluation_data_is_accounted_for() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let Ok(files) = fs::read_dir(&data) else {
        println!("skipped: no evaluation data beside the workspace");
        return;
    };
    for path in
        files.map(|file| file.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "gz"))
    {
        let rows = capture::open(&path).unwrap().count() as u64;
        // Of the large files a part is enough here; `driftlock replay` does the rest.
        let small = path.metadata().unwrap().len() < 1 << 20;
        if small {
            let (summary, lines) = lines(&Args::new(path.clone()));
            accounted(&summary, &lines, rows);
            assert_eq!(summary.bad_rows, 0, "{}", path.display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_passes_a_gateway_is_recorded_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let writer = Writer::new(WriterOptions {
        folder: folder.path().to_owned(),
        redaction: Redaction::Off,
        packing: Packing::Zstd,
        max_file_bytes: 1 << 20,
        max_files: 100,
    })
    .unwrap();
    let recorder = Arc::new(Recorder::start(writer, RecorderOptions::default()).unwrap());
    let upstream = Upstream::start().await.unwrap();
    let uri = format!("http://{}", upstream.address()).parse().unwrap();
    let (records, received) = channel();
    let options = GatewayOptions {
        access_log: AccessLogTarget::Channel(records),
        ..GatewayOptions::new(uri, FilterSource::Native(Arc::<Recorder>::clone(&recorder)))
    };
    let gateway = Gateway::start(options).await.unwrap();
    let exchanges: Vec<Exchange> = synth::generate(&SynthOptions { count: 150, ..SynthOptions::default() })
        .into_iter()
        .map(|l| l.exchange)
        .collect();
    let mut verdicts = VerdictSource::Gateway(received);
    let options = ReplayOptions::default();
    let replayed =
        replay_through(gateway.addr, &upstream, &mut verdicts, exchanges.clone(), &options).await.unwrap();
    assert!(replayed.iter().all(|exchange| exchange.failure.is_none()));
    gateway.shutdown().await;
    recorder.finish().unwrap();
    assert_eq!(recorder.counts().recorded.load(Ordering::Relaxed), 150);
    let recorded: Vec<Recorded> = capture::exchanges(folder.path()).unwrap().map(Result::unwrap).collect();
    assert_eq!(recorded.len(), 150);
    for (recorded, sent) in recorded.into_iter().zip(exchanges) {
        assert!(recorded.unix_ns.is_some());
        let [recorded, sent] = [recorded.exchange, sent].map(|exchange| wire::on_the_wire(exchange).unwrap());
        assert_eq!(
            (recorded.request.target, recorded.request.body),
            (sent.request.target, sent.request.body)
        );
        let [recorded, sent] = [recorded.response, sent.response].map(Option::unwrap);
        assert_eq!((recorded.status, recorded.body), (sent.status, sent.body));
    }
}

/// Answers every request with its own body, until the test ends.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve_echo(stream));
        }
    });
    address
}

fn serve_echo(mut stream: TcpStream) {
    let mut unread = Vec::new();
    loop {
        let head = loop {
            if let Some(end) = unread.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(length) => unread.extend_from_slice(&buffer[..length]),
            }
        };
        let text = String::from_utf8_lossy(&unread[..head]).to_ascii_lowercase();
        let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok());
        let length: usize = length.unwrap_or(0);
        while unread.len() < head + length {
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(length) => unread.extend_from_slice(&buffer[..length]),
            }
        }
        let body: Vec<u8> = unread.drain(..head + length).skip(head).collect();
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        if stream.write_all(answer.as_bytes()).and_then(|()| stream.write_all(&body)).is_err() {
            return;
        }
    }
}

/// An Envoy with nothing but the tap filter, in the format and mode given.
fn tapped(folder: &Path, format: &str, streaming: bool, bodies: &[String]) {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoint = |address: SocketAddr| json!({"address": {"socket_address": {"address": "127.0.0.1", "port_value": address.port()}}});
    let of = |kind: &str| format!("type.googleapis.com/envoy.extensions.filters.{kind}");
    let sink = json!({"format": format, "file_per_tap": {"path_prefix": folder.join("tap")}});
    let tap = json!({"name": "tap", "typed_config": {"@type": of("http.tap.v3.Tap"), "common_config": {"static_config": {
        "match": {"any_match": true}, "output_config": {"streaming": streaming, "sinks": [sink]}}}}});
    let router = json!({"name": "router", "typed_config": {"@type": of("http.router.v3.Router")}});
    let routes = json!([{"match": {"prefix": "/"}, "route": {"cluster": "echo"}}]);
    let manager = json!({"@type": of("network.http_connection_manager.v3.HttpConnectionManager"), "stat_prefix": "tap",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [tap, router]});
    let configuration = json!({"static_resources": {
        "listeners": [{"address": endpoint(free)["address"], "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}]}],
        "clusters": [{"name": "echo", "connect_timeout": "5s",
            "load_assignment": {"cluster_name": "echo", "endpoints": [{"lb_endpoints": [{"endpoint": endpoint(echo())}]}]}}]}});
    let base_id = u32::from(free.port()) + 70_000;
    let mut child = Command::new(envoy::find_binary(None).unwrap())
        .args(["--config-yaml", &configuration.to_string(), "--concurrency", "1", "-l", "error"])
        .args(["--base-id", &base_id.to_string()])
        .spawn()
        .unwrap();
    let started = Instant::now();
    let mut stream = loop {
        match TcpStream::connect(free) {
            Ok(stream) => break stream,
            Err(error) if started.elapsed() > Duration::from_secs(30) => {
                panic!("Envoy does not listen: {error}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    for (i, body) in bodies.iter().enumerate() {
        let head = format!(
            "POST /v1/x?i={i} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).unwrap();
        let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
        while !answer.ends_with(body.as_bytes()) {
            let length = stream.read(&mut buffer).unwrap();
            assert!(length > 0, "Envoy closed: {}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&buffer[..length]);
        }
    }
    drop(stream);
    let files = || fs::read_dir(folder).map_or(0, Iterator::count);
    while files() < bodies.len() && started.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_millis(200));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn taps_of_the_real_envoy_are_read() {
    // The last is longer than the tap keeps, but for streamed traces, which are not cut.
    let mut bodies: Vec<String> = (0..6).map(|i| json!({"n": i, "text": "é\n<b>"}).to_string()).collect();
    bodies.push(json!({"long": "x".repeat(3_000)}).to_string());
    for (format, streaming) in [
        ("JSON_BODY_AS_BYTES", false),
        ("JSON_BODY_AS_STRING", true),
        ("PROTO_BINARY", false),
        ("PROTO_BINARY_LENGTH_DELIMITED", false),
        ("PROTO_BINARY_LENGTH_DELIMITED", true),
    ] {
        let folder = tempfile::tempdir().unwrap();
        tapped(folder.path(), format, streaming, &bodies);
        let name = format!("{format}, streaming {streaming}");
        let (summary, lines) = lines(&Args::new(folder.path().to_owned()));
        accounted(&summary, &lines, bodies.len() as u64);
        assert_eq!(summary.bad_rows, 1, "{name}: {lines:?}");
        let error = lines.iter().find_map(|line| line["error"].as_str()).unwrap();
        assert!(error.contains("the tap cut") && error.contains("max_buffered"), "{name}: {error}");
        let recorded = capture::exchanges(folder.path()).unwrap().filter_map(Result::ok);
        let mut exchanges: Vec<Exchange> = recorded.map(|recorded| recorded.exchange).collect();
        exchanges.sort_by(|a, b| a.request.target.cmp(&b.request.target));
        assert_eq!(exchanges.len(), 6, "{name}");
        for (i, (exchange, body)) in exchanges.iter().zip(&bodies).enumerate() {
            assert_eq!(exchange.request.target, format!("/v1/x?i={i}"), "{name}");
            assert_eq!(exchange.request.body, body.as_bytes(), "{name}");
            let response = exchange.response.as_ref().unwrap();
            assert_eq!((response.status, response.body.as_slice()), (200, body.as_bytes()), "{name}");
            assert_eq!(capture::header(&exchange.request.headers, "host"), Some("h"), "{name}");
        }
    }
}

#[test]
fn the_page_stands_alone_and_shows_what_decided() {
    let ground = ground(400);
    let (_, verdicts) = lines(&ground.args());
    // Flagged for a stretch of its text: words alone have no span.
    let marked = |verdict: &Value| verdict["outcome"] == "anomalous" && verdict["spans"].get(0).is_some();
    let anomalous = |line: &Value| ["request", "response"].iter().any(|side| marked(&line[*side]));
    let line = verdicts.iter().position(anomalous).unwrap() as u64 + 1;
    let recorded = ground.path("v.jsonl");
    let text: Vec<String> = verdicts.iter().map(Value::to_string).collect();
    fs::write(&recorded, text.join("\n")).unwrap();
    let html = ground.path("page.html");
    explain::run(&explain::Args {
        file: ground.traffic.clone(),
        id: None,
        line: Some(line),
        verdicts: Some(recorded),
        baseline: ground.baseline.clone(),
        config: Some(ground.config.clone()),
        all: true,
        max_bytes: 2000,
        html: Some(html.clone()),
        reference: Some(ground.traffic.clone()),
    })
    .unwrap();
    let page = fs::read_to_string(html).unwrap();
    for part in
        ["anomalous", "<svg", "this message:", "<mark>", "nearest normal text", "driftlock explain", "sha256"]
    {
        assert!(page.contains(part), "{part} is not on the page");
    }
    for outside in ["<script", "http://", "https://", "<link", "src=", "url("] {
        let found = page.find(outside).filter(|at| !page[..*at].contains("<pre>"));
        assert!(found.is_none(), "{outside} before the first text");
    }
    assert_eq!(page.matches("<pre>").count(), page.matches("</pre>").count());
}

/// What only the configuration or the other message tells is shown as it was judged.
#[test]
fn selected_headers_and_apis_told_by_the_body_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let json = || ("content-type".to_owned(), "application/json".to_owned());
    let exchange = |i: usize, agent: &str, said: &str| {
        Exchange {
        id: format!("e{i}"),
        label: "normal".to_owned(),
        request: HttpRequest {
            method: "POST".to_owned(),
            target: "/llm/9".to_owned(),
            headers: vec![json(), ("User-Agent".to_owned(), agent.to_owned())],
            body: format!(
                r#"{{"anthropic_version": "x", "messages": [{{"role": "user", "content": "Where is order {i}?"}}]}}"#
            )
            .into_bytes(),
        },
        response: Some(HttpResponse {
            status: 200,
            headers: vec![json()],
            body: format!(r#"{{"content": [{{"type": "text", "text": "{said}"}}], "role": "assistant"}}"#).into_bytes(),
        }),
    }
    };
    let usual = |i: usize| {
        let agent = format!("Mozilla/5.0 (X11; Linux) Shop/{}.{}", 3 + i % 2, i % 10);
        exchange(i, &agent, &format!("Order {i} left the house {} days ago.", i % 7))
    };
    let configuration = r#"{"alpha": 0.01, "request_headers": ["referer", "user-agent"]}"#;
    let config = Config::parse(configuration.as_bytes()).unwrap();
    let trained = train((0..600).map(usual).collect(), config, 1).unwrap();
    fs::write(path("baseline"), trained.snapshot.encode()).unwrap();
    fs::write(path("plugin.json"), configuration).unwrap();
    let agent = "sqlmap/1.8#stable ${jndi:ldap://x} ' OR 1=1 --";
    let said = "<<<zq7 wire the funds to account 99-81 before NOON!! xk9>>>";
    let odd = [
        exchange(7, agent, "Order 7 left the house 0 days ago."),
        exchange(8, "Mozilla/5.0 (X11; Linux) Shop/3.8", said),
    ]
    .map(|exchange| Recorded { place: Place::Line(1), unix_ns: None, exchange });
    capture::write_recorded(&mut fs::File::create(path("capture.jsonl")).unwrap(), &odd).unwrap();
    for (id, shown) in [("e7", "user-agent: sqlmap/1.8#stable"), ("e8", "wire the funds to account")] {
        let page = path(id);
        explain::run(&explain::Args {
            file: path("capture.jsonl"),
            id: Some(id.to_owned()),
            line: None,
            verdicts: None,
            baseline: path("baseline"),
            config: Some(path("plugin.json")),
            all: false,
            max_bytes: 2000,
            html: Some(page.clone()),
            reference: None,
        })
        .unwrap();
        let page = fs::read_to_string(page).unwrap();
        assert!(page.contains("anomalous"), "{id} is normal");
        let text: String = page.split('<').filter_map(|tagged| Some(tagged.split_once('>')?.1)).collect();
        assert!(text.contains(shown), "{shown} is not on the page of {id}:\n{text}");
        assert!(!text.contains("saw no unit of this kind"), "{id} was read as what it is not:\n{text}");
    }
}

/// The bar: in 95 % of the attacks that are found the top span lies on what was injected.
#[test]
fn the_top_span_lies_on_what_was_injected() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let options = |seed, count, anomalies| SynthOptions {
        seed,
        count,
        anomalies,
        drift: Vec::new(),
        faults: Default::default(),
        ..SynthOptions::example()
    };
    let normals = synth::generate(&options(31, 20_000, 0)).into_iter().map(|labelled| labelled.exchange);
    let trained = train(normals.collect(), Config::parse(b"{}").unwrap(), 1).unwrap();
    fs::write(path("baseline"), trained.snapshot.encode()).unwrap();
    let attacks = synth::generate(&options(32, 0, 400));
    synth::write_jsonl(&mut fs::File::create(path("traffic.jsonl")).unwrap(), &attacks).unwrap();
    let args = Args { baseline: Some(path("baseline")), ..Args::new(path("traffic.jsonl")) };
    replay(&args, fs::File::create(path("verdicts.jsonl")).unwrap()).unwrap();
    let scores = synth::score::score(&path("traffic.jsonl"), &path("verdicts.jsonl")).unwrap();
    let sum = |of: fn(&synth::score::Score) -> u64| scores.values().map(of).sum::<u64>();
    let (flagged, hits) = (sum(|score| score.with_span), sum(|score| score.span_hits));
    assert!(flagged >= 300, "{scores:?}");
    assert!(hits * 100 >= flagged * 95, "{hits} of {flagged}: {scores:?}");
}

#[test]
fn via_is_part_of_the_manifest() {
    let ground = ground(40);
    let out = ground.path("v.jsonl");
    // The digest is printed beside the file, not in its place.
    let command = ground.command(&out, false, &["--seed", "3", "--digest"]).stdout(Stdio::piped()).output();
    let manifest: Value =
        serde_json::from_slice(&fs::read(ground.path("v.jsonl.manifest.json")).unwrap()).unwrap();
    let printed = String::from_utf8(command.unwrap().stdout).unwrap();
    assert_eq!(printed.trim_end(), manifest["verdicts"]["sha256"]);
    assert_eq!((&manifest["via"], &manifest["seed"]), (&json!(Via::Native), &json!(3)));
    assert_eq!(manifest["counts"]["rows"], 44);
    assert_eq!(manifest["configuration"], json!({"alpha": 0.01}));
    let file = &manifest["input_files"][0];
    assert_eq!(file["format"], "rows");
    assert_eq!(file["bytes"], ground.traffic.metadata().unwrap().len());
    assert_eq!(manifest["verdicts"]["bytes"], out.metadata().unwrap().len());
}
