//! Proxies beside each other: Envoy without a filter, with one that only reads, with Driftlock's; and
//! this gateway with Driftlock's.
//!
//! One worker each, the same messages through all of them, in short rounds by turns; rates are compared
//! round by round and the median ratio counts, since absolute figures say little on a machine that others
//! use. All write access logs. All run on one processor that clients and upstream do not run on (`cores`).
//!
//! The filter that only reads (`noop.wat`) has both bodies buffered and copied into its memory, which is
//! what any filter that inspects whole bodies pays before it does anything.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::cores::Sides;
use super::latency::{Beside, beside};
use super::load::{Asked, Load, Took, Upstream, asked};
use super::rounds::median;
use super::{BenchError, ProxyFigures};
use crate::capture::Exchange;
use crate::envoy::{Envoy, EnvoyOptions};
use crate::synth::{self, SynthOptions};
use crate::train::{TrainError, train, with_baseline};

/// How many exchanges take turns.
const EXCHANGES: usize = 100;
/// About the size of the messages, in bytes.
const BODY_BYTES: usize = 2048;
/// The same of those whose latency is taken.
const LATENCY_BODY_BYTES: usize = 4096;
pub(super) const PATH: &str = "/v1/chat/completions";
/// What Linux counts processor time in, everywhere.
pub(super) const TICK_US: f64 = 10_000.0;
const CONNECTIONS: usize = 8;

/// What goes through the proxies.
pub(super) struct Traffic {
    /// With a baseline in it.
    pub(super) plugin_configuration: Vec<u8>,
    /// Bodies of one size both ways; then requests of twice that without a body in the answer; then streams.
    asked: Vec<Asked>,
    /// How many of those are the first, and the first and second.
    parts: [usize; 2],
}

impl Traffic {
    /// An upstream that answers all of it.
    pub(super) fn upstream(&self) -> io::Result<Upstream> {
        Upstream::start(&self.asked)
    }

    /// Bodies of about 2 KiB both ways.
    pub(super) fn both_ways(&self) -> &[Asked] {
        &self.asked[..self.parts[0]]
    }

    /// Requests of about 4 KiB, answered without a body.
    fn requests(&self) -> &[Asked] {
        &self.asked[self.parts[0]..self.parts[1]]
    }

    /// Requests of about 2 KiB that are answered by a stream.
    fn streams(&self) -> &[Asked] {
        &self.asked[self.parts[1]..]
    }
}

/// The generated messages nearest to the size, and a baseline of the others.
pub(super) fn traffic() -> Result<Traffic, BenchError> {
    let traffic = synth::generate(&SynthOptions { count: 2500, ..SynthOptions::default() });
    let exchanges: Vec<Exchange> = traffic.into_iter().map(|labelled| labelled.exchange).collect();
    let far = |body: &[u8], bytes: usize| body.len().abs_diff(bytes);
    let chats = || exchanges.iter().filter(|exchange| exchange.request.target.starts_with(PATH));
    let nearest = |mut bodies: Vec<Vec<u8>>, bytes: usize| {
        bodies.sort_by_key(|body| far(body, bytes));
        bodies.truncate(EXCHANGES);
        bodies
    };
    let requests = |bytes| nearest(chats().map(|it| it.request.body.clone()).collect(), bytes);
    let answered =
        || chats().filter_map(|it| Some((it.request.body.clone(), it.response.as_ref()?.body.clone())));
    let answers = answered().map(|(_, answer)| answer).filter(|answer| answer.starts_with(b"{"));
    let answers = nearest(answers.collect(), BODY_BYTES);
    let both_ways: Vec<_> = requests(BODY_BYTES).into_iter().zip(answers).collect();
    let alone = requests(LATENCY_BODY_BYTES).into_iter().map(|request| (request, Vec::new()));
    let mut streams: Vec<_> = answered().filter(|(_, answer)| answer.starts_with(b"data:")).collect();
    streams.sort_by_key(|(request, _)| far(request, BODY_BYTES));
    streams.truncate(EXCHANGES);
    if both_ways.is_empty() || streams.is_empty() {
        return Err(io::Error::other("the generator made no chat").into());
    }
    let parts = [both_ways.len(), both_ways.len() + alone.len()];
    let asked = asked(PATH, both_ways.into_iter().chain(alone).chain(streams).collect());
    let config = driftlock_inspect::config::Config::parse(b"").map_err(TrainError::from)?;
    let snapshot = train(exchanges, config, 1)?.snapshot.encode();
    let configuration = serde_json::json!({"report": {"log": "never"}});
    Ok(Traffic { plugin_configuration: with_baseline(&configuration, Some(&snapshot)), asked, parts })
}

/// What came of all rounds: medians of their ratios, and each proxy's own figures.
pub(super) struct Measured {
    pub(super) vs_no_filter: f64,
    pub(super) vs_noop_filter: f64,
    pub(super) gateway_vs_envoy: f64,
    pub(super) gateway_idle_bytes: u64,
    /// Until the answer to a request of 4 KiB is here.
    pub(super) request: Beside,
    /// From a stream's first event to its first byte at the client.
    pub(super) first_byte: Beside,
    /// From the request to that.
    pub(super) to_first_byte: Beside,
    pub(super) proxies: Vec<ProxyFigures>,
}

struct Target {
    name: &'static str,
    address: SocketAddr,
    pid: u32,
    rates: Vec<f64>,
    requests: u64,
    ticks: u64,
}

impl Target {
    fn new(name: &'static str, address: SocketAddr, pid: u32) -> Self {
        Self { name, address, pid, rates: Vec::new(), requests: 0, ticks: 0 }
    }

    fn round(&mut self, load: &Load<'_>, duration: Duration) -> Result<(), BenchError> {
        let before = processor_ticks(self.pid)?;
        let (rate, count) = load.closed_loop(self.name, self.address, duration)?;
        self.ticks += processor_ticks(self.pid)? - before;
        self.rates.push(rate);
        self.requests += count;
        Ok(())
    }
}

const NO_FILTER: &str = "Envoy without a filter";
const NOOP: &str = "Envoy, filter that only reads";
const PASSING: &str = "Envoy, filter that only reads and holds nothing";
const ENVOY: &str = "Envoy, Driftlock";
const GATEWAY: &str = "gateway, Driftlock";

/// Starts all four and measures them in rounds.
pub(super) fn measure(
    binary: PathBuf,
    filter: &Path,
    rounds: usize,
    round: Duration,
    turns: usize,
) -> Result<Measured, BenchError> {
    let traffic = traffic()?;
    let plugin_configuration = &traffic.plugin_configuration;
    let sides = Sides::divide();
    sides.load();
    let upstream = traffic.upstream()?;
    sides.all();
    let folder = tempfile::tempdir()?;
    let gateway_idle_bytes =
        GatewayProcess::idle_bytes(folder.path(), filter, plugin_configuration, upstream.address)?;
    sides.proxies();
    let noop = folder.path().join("noop.wasm");
    let module =
        wat::parse_str(include_str!("noop.wat")).map_err(|error| io::Error::other(error.to_string()))?;
    std::fs::write(&noop, module)?;
    let with = |wasm| EnvoyOptions::new(binary.clone(), wasm, upstream.address);
    let without_filter = Envoy::start(&EnvoyOptions { wasm: None, ..with(PathBuf::new()) })?;
    let reading = Envoy::start(&with(noop.clone()))?;
    let passing = EnvoyOptions { plugin_configuration: b"hold nothing".to_vec(), ..with(noop) };
    let passing = Envoy::start(&passing)?;
    let envoy = Envoy::start(&EnvoyOptions {
        plugin_configuration: plugin_configuration.clone(),
        ..with(filter.to_owned())
    })?;
    let gateway = GatewayProcess::start(folder.path(), filter, plugin_configuration, upstream.address)?;
    sides.load();
    let mut targets = [
        Target::new(NO_FILTER, without_filter.listen(), without_filter.pid()),
        Target::new(NOOP, reading.listen(), reading.pid()),
        Target::new(ENVOY, envoy.listen(), envoy.pid()),
        Target::new(GATEWAY, gateway.address, gateway.pid()),
    ];
    let load = Load { asked: traffic.both_ways(), connections: CONNECTIONS };
    for target in &targets {
        // It warms caches and is not counted.
        load.closed_loop(target.name, target.address, round / 3)?;
    }
    for index in 0..rounds {
        // Nobody is always first.
        targets.rotate_left(usize::from(index > 0));
        for target in &mut targets {
            target.round(&load, round)?;
        }
    }
    let through_envoy = targets.iter().find(|target| target.name == ENVOY);
    require_inspection(&envoy, through_envoy.map_or(0, |target| target.requests))?;
    let driftlock = (ENVOY, envoy.listen());
    let (noop, passing) = ((NOOP, reading.listen()), (PASSING, passing.listen()));
    let [request] = beside(driftlock, noop, &upstream, traffic.requests(), turns, [|took| took.whole])?;
    let of: [fn(&Took) -> Duration; 2] = [|took| took.first_byte, |took| took.to_first_byte];
    let [first_byte, to_first_byte] = beside(driftlock, passing, &upstream, traffic.streams(), turns, of)?;
    let rates = |name: &str| {
        targets.iter().find(|target| target.name == name).map_or(&[][..], |target| &target.rates)
    };
    let ratio =
        |of: &str, to: &str| median(rates(of).iter().zip(rates(to)).map(|(of, to)| of / to).collect());
    let figures = |name: &&str| {
        let target = targets.iter().find(|target| target.name == *name)?;
        let processor_us = target.ticks as f64 * TICK_US / (target.requests as f64).max(1.0);
        let requests_per_s = median(target.rates.clone()).round();
        Some(ProxyFigures { proxy: target.name, requests_per_s, processor_us: processor_us.round() })
    };
    Ok(Measured {
        vs_no_filter: ratio(ENVOY, NO_FILTER),
        vs_noop_filter: ratio(ENVOY, NOOP),
        gateway_vs_envoy: ratio(GATEWAY, ENVOY),
        gateway_idle_bytes,
        request,
        first_byte,
        to_first_byte,
        proxies: [NO_FILTER, NOOP, ENVOY, GATEWAY].iter().filter_map(figures).collect(),
    })
}

/// A filter that lets messages pass unseen would be the fastest.
fn require_inspection(envoy: &Envoy, exchanges: u64) -> Result<(), BenchError> {
    let stats = envoy.stats()?;
    let judged = |(name, value): &(String, u64)| {
        let outcome = name.strip_prefix("wasmcustom.driftlock.messages.")?.rsplit('.').next()?;
        matches!(outcome, "normal" | "anomalous").then_some(*value)
    };
    let judged: u64 = stats.iter().filter_map(judged).sum();
    match judged >= 2 * exchanges {
        true => Ok(()),
        false => Err(BenchError::Wrong {
            what: format!("of {exchanges} exchanges' messages the filter in Envoy judged {judged}"),
        }),
    }
}

/// Processor time of a process, in clock ticks (proc(5): fields 14 and 15 of stat).
pub(super) fn processor_ticks(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field, a name in brackets, may have spaces.
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    Ok(fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum())
}

/// A gateway in a process of its own, killed when dropped.
pub(super) struct GatewayProcess {
    child: Child,
    pub(super) address: SocketAddr,
}

impl GatewayProcess {
    pub(super) fn start(
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

    /// What one takes before its first request. To be asked while it may run on all processors, as operators run it: it
    /// compiles on all of them, and what the threads leave behind is its memory too.
    pub(super) fn idle_bytes(
        folder: &Path,
        wasm: &Path,
        configuration: &[u8],
        upstream: SocketAddr,
    ) -> Result<u64, BenchError> {
        Ok(Self::start(folder, wasm, configuration, upstream)?.resident_bytes()?)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident set, from the kernel.
    pub(super) fn resident_bytes(&self) -> io::Result<u64> {
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
