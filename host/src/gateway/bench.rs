//! `driftlock bench gateway`: the same filter, baseline and messages through a real Envoy and through
//! this gateway, one worker each, in one run.
//!
//! Absolute figures say little on a machine that others use, so the two proxies run beside each other
//! and take turns: throughput by `wrk` in rounds, of which the medians are compared; latency by an
//! open-loop client (below) in short slices at half of what Envoy served. Both write access logs. The
//! idle memory is the gateway process's resident set before the first request.
//!
//! The open-loop client sends by the clock and counts from the time a request was due, so a proxy
//! that stalls pays for every request that had to wait (`wrk` would send fewer instead).
//!
//! Left out on purpose: TLS and HTTP/2, which would measure other people's libraries.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::capture::Exchange;
use crate::envoy::{self, Envoy, EnvoyError, EnvoyOptions};
use crate::replay::find_filter;
use crate::synth::{self, SynthOptions};
use crate::train::{TrainError, train, with_baseline};

/// Size of the messages, in bytes: what the bar is about.
const BODY_BYTES: usize = 2048;
/// What Linux counts processor time in, everywhere.
const TICK_US: f64 = 10_000.0;
const PATH: &str = "/v1/chat/completions";
/// How long one turn of the latency measurement is.
const SLICE: Duration = Duration::from_secs(5);

/// `driftlock bench gateway`
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Seconds of each throughput round
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub seconds: u64,
    /// Throughput rounds of each proxy
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub rounds: usize,
    /// Seconds of the latency measurement of each proxy
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub soak: u64,
    /// Client connections
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub connections: usize,
    /// proxy-wasm module to run in both; by default Driftlock's, beside this program
    #[arg(long, value_name = "FILE")]
    pub filter: Option<PathBuf>,
    /// Envoy to compare with; by default the one that `cargo xtask envoy` installed
    #[arg(long, value_name = "FILE")]
    pub envoy: Option<PathBuf>,
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// There is no Envoy, or it does not start.
    #[error(transparent)]
    Envoy(#[from] EnvoyError),
    /// No baseline could be trained.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// `wrk` does not run.
    #[error("cannot run wrk: {0}; install Debian's package wrk")]
    Wrk(String),
    /// The gateway's process did not start.
    #[error("the gateway did not start: {0}")]
    Gateway(String),
    /// A proxy answered something else than 200 and the upstream's body.
    #[error("{proxy} does not answer as it should: {what}")]
    Answer {
        /// Which one.
        proxy: &'static str,
        /// What went wrong.
        what: String,
    },
    /// The system refused something.
    #[error("cannot measure: {0}")]
    Io(#[from] io::Error),
}

/// What one proxy did.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Requests per second of each round.
    pub rounds: Vec<f64>,
    /// Processor time of the proxy's process in the rounds, per request, in microseconds: what a
    /// crowded machine disturbs least.
    pub cpu_us: f64,
    /// Latencies at half load, in microseconds, in ascending order.
    pub latencies_us: Vec<u64>,
}

impl Figures {
    /// Median of the rounds.
    #[must_use]
    pub fn requests_per_second(&self) -> f64 {
        let mut rounds = self.rounds.clone();
        rounds.sort_by(f64::total_cmp);
        rounds.get(rounds.len() / 2).copied().unwrap_or(0.0)
    }

    /// A quantile of the latencies, in microseconds; 0 if there are none.
    #[must_use]
    pub fn latency_us(&self, quantile: f64) -> u64 {
        let at = (self.latencies_us.len() as f64 * quantile) as usize;
        self.latencies_us.get(at.min(self.latencies_us.len().saturating_sub(1))).copied().unwrap_or(0)
    }
}

/// The two proxies beside each other.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// This gateway.
    pub gateway: Figures,
    /// Envoy.
    pub envoy: Figures,
    /// Resident set of the gateway with one filter before the first request, in bytes.
    pub idle_bytes: u64,
    /// The same after all of it.
    pub busy_bytes: u64,
    /// Requests per second at which latencies were taken.
    pub half_load: f64,
}

impl Comparison {
    /// Requests per second as a multiple of Envoy's; the bar is 1.
    #[must_use]
    pub fn throughput_ratio(&self) -> f64 {
        self.gateway.requests_per_second() / self.envoy.requests_per_second()
    }

    /// Envoy's processor time per request as a multiple of the gateway's.
    #[must_use]
    pub fn processor_ratio(&self) -> f64 {
        self.envoy.cpu_us / self.gateway.cpu_us
    }

    /// p99 as a multiple of Envoy's; the bar is 1.5.
    #[must_use]
    pub fn p99_ratio(&self) -> f64 {
        self.gateway.latency_us(0.99) as f64 / self.envoy.latency_us(0.99) as f64
    }
}

/// Measures and prints.
///
/// # Errors
/// As [`measure`].
pub fn run(args: &Args) -> Result<(), BenchError> {
    let result = measure(args)?;
    let row = |name: &str, figures: &Figures| {
        anstream::println!(
            "  {name:<8} {:>6.0} requests/s, {:.0} us of processor time each (of {} rounds: {}); at half load p50 {} us, p99 {} us, p99.9 {} us",
            figures.requests_per_second(),
            figures.cpu_us,
            figures.rounds.len(),
            figures.rounds.iter().map(|rate| format!("{rate:.0}")).collect::<Vec<_>>().join(" "),
            figures.latency_us(0.5),
            figures.latency_us(0.99),
            figures.latency_us(0.999),
        );
    };
    let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
    anstream::println!(
        "POST {PATH}, {BODY_BYTES} bytes of JSON both ways, one worker each, {} connections",
        args.connections
    );
    row("gateway", &result.gateway);
    row("envoy", &result.envoy);
    anstream::println!("  requests/s, gateway to Envoy: {:.2} (bar: at least 1)", result.throughput_ratio());
    anstream::println!(
        "  requests per second of processor time, gateway to Envoy: {:.2}",
        result.processor_ratio()
    );
    if args.soak > 0 {
        anstream::println!(
            "  p99 at {:.0} requests/s for {} s, gateway to Envoy: {:.2} (bar: at most 1.5)",
            result.half_load,
            args.soak,
            result.p99_ratio()
        );
    }
    anstream::println!(
        "  gateway's memory: {:.1} MiB idle (bar: under 64), {:.1} MiB after the load",
        mib(result.idle_bytes),
        mib(result.busy_bytes)
    );
    Ok(())
}

/// Runs both proxies and measures them in turns.
///
/// # Errors
/// [`BenchError`] when a part is missing or a proxy answers wrongly.
pub fn measure(args: &Args) -> Result<Comparison, BenchError> {
    let wasm = find_filter(args.filter.as_deref());
    let Traffic { plugin_configuration: configuration, request, response } = traffic()?;
    let upstream = start_upstream(&response)?;
    let folder = tempfile::tempdir()?;
    let envoy_options = EnvoyOptions {
        plugin_configuration: configuration.clone(),
        ..EnvoyOptions::new(envoy::find_binary(args.envoy.as_deref())?, wasm.clone(), upstream)
    };
    let envoy = Envoy::start(&envoy_options)?;
    let gateway = GatewayProcess::start(folder.path(), &wasm, &configuration, upstream)?;
    let mut result = Comparison { idle_bytes: gateway.resident_bytes()?, ..Comparison::default() };
    let message = wire_request(&request);
    let proxies: [(&'static str, SocketAddr); 2] = [("gateway", gateway.address), ("Envoy", envoy.listen())];
    for (proxy, address) in proxies {
        check(proxy, address, &message, &response)?;
    }
    let script = folder.path().join("post.lua");
    std::fs::write(&script, lua(&request))?;
    let pids = [gateway.child.id(), envoy.pid()];
    let (mut ticks, mut requests) = ([0; 2], [0.0; 2]);
    // A first round of each warms caches and is not counted.
    for round in 0..=args.rounds {
        for (index, (_, address)) in proxies.iter().enumerate() {
            let before = processor_ticks(pids[index])?;
            let (rate, count) = wrk(args, *address, &script)?;
            if round > 0 {
                [&mut result.gateway, &mut result.envoy][index].rounds.push(rate);
                ticks[index] += processor_ticks(pids[index])? - before;
                requests[index] += count;
            }
        }
    }
    for (index, figures) in [&mut result.gateway, &mut result.envoy].into_iter().enumerate() {
        figures.cpu_us = ticks[index] as f64 * TICK_US / requests[index].max(1.0);
    }
    result.half_load = result.envoy.requests_per_second() / 2.0;
    let mut left = Duration::from_secs(args.soak);
    while !left.is_zero() {
        let slice = left.min(SLICE);
        left -= slice;
        for (index, (_, address)) in proxies.iter().enumerate() {
            let latencies = paced(*address, &message, args.connections, result.half_load, slice)?;
            [&mut result.gateway, &mut result.envoy][index].latencies_us.extend(latencies);
        }
    }
    result.gateway.latencies_us.sort_unstable();
    result.envoy.latencies_us.sort_unstable();
    result.busy_bytes = gateway.resident_bytes()?;
    Ok(result)
}

/// What goes through both proxies.
struct Traffic {
    /// With a baseline in it.
    plugin_configuration: Vec<u8>,
    request: Vec<u8>,
    response: Vec<u8>,
}

/// The generated messages nearest to the size, and a baseline of the others.
fn traffic() -> Result<Traffic, BenchError> {
    let traffic = synth::generate(&SynthOptions { count: 2500, ..SynthOptions::default() });
    let exchanges: Vec<Exchange> = traffic.into_iter().map(|labelled| labelled.exchange).collect();
    let far = |body: &[u8]| body.len().abs_diff(BODY_BYTES);
    let chats = || exchanges.iter().filter(|exchange| exchange.request.target.starts_with(PATH));
    let request = chats().map(|it| &it.request.body).min_by_key(|body| far(body));
    let response = chats()
        .filter_map(|it| it.response.as_ref())
        .map(|response| &response.body)
        .filter(|body| body.starts_with(b"{"))
        .min_by_key(|body| far(body));
    let (Some(request), Some(response)) = (request.cloned(), response.cloned()) else {
        return Err(io::Error::other("the generator made no chat").into());
    };
    let config = driftlock_inspect::config::Config::parse(b"").map_err(TrainError::from)?;
    let snapshot = train(exchanges, config, 1)?.snapshot.encode();
    let configuration = serde_json::json!({"report": {"log": "never"}});
    Ok(Traffic { plugin_configuration: with_baseline(&configuration, Some(&snapshot)), request, response })
}

fn wire_request(body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nhost: bench.example\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn lua(body: &[u8]) -> String {
    let escaped: String = body.iter().map(|byte| format!("\\{byte:03}")).collect();
    format!(
        "wrk.method = \"POST\"\nwrk.path = \"{PATH}\"\nwrk.headers[\"content-type\"] = \"application/json\"\nwrk.body = \"{escaped}\"\n"
    )
}

/// Requests per second, and requests.
fn wrk(args: &Args, address: SocketAddr, script: &Path) -> Result<(f64, f64), BenchError> {
    let output = Command::new("wrk")
        .args(["-t1", &format!("-c{}", args.connections), &format!("-d{}s", args.seconds), "-s"])
        .arg(script)
        .arg(format!("http://{address}{PATH}"))
        .output()
        .map_err(|error| BenchError::Wrk(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("Non-2xx") || line.contains("Socket errors")) {
        return Err(BenchError::Answer { proxy: "a proxy under wrk", what: line.trim().to_owned() });
    }
    let rate = text.lines().find_map(|line| line.strip_prefix("Requests/sec:")?.trim().parse().ok());
    let count = text.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok());
    let nothing = || BenchError::Wrk(String::from_utf8_lossy(&output.stderr).into_owned());
    Ok((rate.ok_or_else(nothing)?, count.ok_or_else(nothing)?))
}

/// Processor time of a process, in clock ticks (proc(5): fields 14 and 15 of stat).
fn processor_ticks(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field, a name in brackets, may have spaces.
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    Ok(fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum())
}

/// An upstream that always answers the same: a thread per connection, no more work than that.
fn start_upstream(body: &[u8]) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?;
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let answer = [head.as_bytes(), body].concat();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            thread::spawn(move || answer_all(stream, &answer));
        }
    });
    Ok(address)
}

fn answer_all(mut stream: TcpStream, answer: &[u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = Messages::default();
    while reader.next(&mut stream)?.is_some() {
        stream.write_all(answer)?;
    }
    Ok(())
}

/// Reads messages framed by content-length or in chunks, one after the other.
#[derive(Default)]
struct Messages {
    buffer: Vec<u8>,
}

impl Messages {
    /// The next message's start line and body; `None` at a clean end.
    fn next(&mut self, stream: &mut impl Read) -> io::Result<Option<(String, Vec<u8>)>> {
        let broken = || io::Error::from(io::ErrorKind::InvalidData);
        let head = loop {
            if let Some(end) = memchr::memmem::find(&self.buffer, b"\r\n\r\n") {
                break String::from_utf8_lossy(&self.buffer.drain(..end + 4).collect::<Vec<u8>>())
                    .into_owned();
            }
            if !self.fill(stream)? {
                return if self.buffer.is_empty() { Ok(None) } else { Err(broken()) };
            }
        };
        let lower = head.to_ascii_lowercase();
        let start = head.lines().next().unwrap_or_default().to_owned();
        if !lower.contains("transfer-encoding: chunked") {
            let length =
                lower.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            let body = self.exactly(stream, length.unwrap_or(0))?;
            return Ok(Some((start, body)));
        }
        let mut body = Vec::new();
        loop {
            let end = loop {
                if let Some(end) = memchr::memmem::find(&self.buffer, b"\r\n") {
                    break end;
                }
                if !self.fill(stream)? {
                    return Err(broken());
                }
            };
            let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
            let text = std::str::from_utf8(&line).map_err(|_| broken())?;
            let size = usize::from_str_radix(text.trim(), 16).map_err(|_| broken())?;
            let chunk = self.exactly(stream, size + 2)?;
            if size == 0 {
                return Ok(Some((start, body)));
            }
            body.extend_from_slice(&chunk[..size]);
        }
    }

    fn exactly(&mut self, stream: &mut impl Read, count: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < count {
            if !self.fill(stream)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(self.buffer.drain(..count).collect())
    }

    fn fill(&mut self, stream: &mut impl Read) -> io::Result<bool> {
        let mut bytes = [0; 16 << 10];
        let count = stream.read(&mut bytes)?;
        self.buffer.extend_from_slice(&bytes[..count]);
        Ok(count > 0)
    }
}

fn check(
    proxy: &'static str,
    address: SocketAddr,
    message: &[u8],
    expected: &[u8],
) -> Result<(), BenchError> {
    let wrong = |what: String| BenchError::Answer { proxy, what };
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(message)?;
    match Messages::default().next(&mut stream)? {
        Some((start, body)) if start.contains(" 200 ") && body == expected => Ok(()),
        Some((start, body)) => Err(wrong(format!("{start}, {}", String::from_utf8_lossy(&body)))),
        None => Err(wrong("it closes the connection".to_owned())),
    }
}

/// Sends by the clock on several connections; latencies from when each request was due, in us.
fn paced(
    address: SocketAddr,
    message: &[u8],
    connections: usize,
    rate: f64,
    duration: Duration,
) -> Result<Vec<u64>, BenchError> {
    let interval = Duration::from_secs_f64(connections as f64 / rate.max(1.0));
    let (sender, results) = mpsc::channel();
    let begin = Instant::now() + Duration::from_millis(50);
    thread::scope(|scope| {
        for index in 0..connections {
            let sender = sender.clone();
            scope.spawn(move || {
                let offset = interval.mul_f64(index as f64 / connections as f64);
                // The receiver outlives this scope.
                let _ = sender.send(paced_connection(
                    address,
                    message,
                    begin + offset,
                    interval,
                    begin + duration,
                ));
            });
        }
    });
    drop(sender);
    let mut all = Vec::new();
    for result in results {
        all.extend(result?);
    }
    Ok(all)
}

fn paced_connection(
    address: SocketAddr,
    message: &[u8],
    mut due: Instant,
    interval: Duration,
    end: Instant,
) -> io::Result<Vec<u64>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = Messages::default();
    let mut latencies = Vec::new();
    while due < end {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        stream.write_all(message)?;
        match reader.next(&mut stream)? {
            Some((start, _)) if start.contains(" 200 ") => {}
            other => return Err(io::Error::other(format!("answered {other:?}"))),
        }
        latencies.push(u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX));
        due += interval;
    }
    Ok(latencies)
}

/// A gateway in a process of its own, killed when dropped.
struct GatewayProcess {
    child: Child,
    address: SocketAddr,
}

impl GatewayProcess {
    fn start(
        folder: &Path,
        wasm: &Path,
        configuration: &[u8],
        upstream: SocketAddr,
    ) -> Result<Self, BenchError> {
        std::fs::write(folder.join("plugin.json"), configuration)?;
        // Taken and let go: the one moment in which another process could take it is short.
        let address = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
        let file = folder.join("gateway.yaml");
        let wasm = std::path::absolute(wasm)?;
        let yaml = serde_json::json!({
            "listeners": [{"address": address.to_string()}],
            "workers": 1,
            "access_log": "access.jsonl",
            "filters": [{
                "name": "driftlock",
                "module": wasm,
                "configuration_file": "plugin.json",
                "failure_policy": "fail_open",
            }],
            "upstreams": {"bench": {"uri": format!("http://{upstream}")}},
            "routes": [{"upstream": "bench"}],
        });
        std::fs::write(&file, yaml.to_string())?;
        let child = Command::new(std::env::current_exe()?)
            .args(["gateway", "--file"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut gateway = Self { child, address };
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            if let Some(status) = gateway.child.try_wait()? {
                let mut text = String::new();
                if let Some(errors) = &mut gateway.child.stderr {
                    errors.read_to_string(&mut text)?;
                }
                return Err(BenchError::Gateway(format!("{status}: {text}")));
            }
            if begun.elapsed() > Duration::from_secs(60) {
                return Err(BenchError::Gateway("not within a minute".to_owned()));
            }
            thread::sleep(Duration::from_millis(20));
        }
        // Compilation has just ended: let its memory be given back.
        thread::sleep(Duration::from_secs(1));
        Ok(gateway)
    }

    /// Resident set, from the kernel.
    fn resident_bytes(&self) -> io::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kib = status.lines().find_map(|line| {
            line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        });
        Ok(kib.unwrap_or(0) * 1024)
    }
}

impl Drop for GatewayProcess {
    fn drop(&mut self) {
        // Both fail only when the process is gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
