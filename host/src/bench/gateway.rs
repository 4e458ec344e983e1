//! `driftlock bench gateway`: the same filter, baseline and messages through a real Envoy and through
//! this gateway, one worker each, in one run.
//!
//! Absolute figures say little on a machine that others use, so the two proxies run beside each other
//! and take turns: throughput in rounds, of which the medians are compared; latency by an open-loop client
//! (`load`) in short slices at half of what Envoy served. Both write access logs. The idle memory is the
//! gateway process's resident set before the first request.

use std::path::PathBuf;
use std::time::Duration;

use super::BenchError;
use super::cores::Sides;
use super::load::{Asked, Load};
use super::proxies::{GatewayProcess, PATH, TICK_US, processor_ticks, traffic};
use super::rounds::median;
use crate::envoy::{self, Envoy, EnvoyOptions};
use crate::replay::find_filter;

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
        median(self.rounds.clone())
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
    /// How many exchanges took turns.
    pub exchanges: usize,
    /// Their requests' mean size with the head, and their answers' without, in bytes.
    pub request_bytes: usize,
    /// See [`Self::request_bytes`].
    pub response_bytes: usize,
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
        "POST {PATH}, {} exchanges of {} and {} bytes of JSON, one worker each, {} connections",
        result.exchanges,
        result.request_bytes,
        result.response_bytes,
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
    let traffic = traffic()?;
    let (configuration, asked) = (&traffic.plugin_configuration, traffic.both_ways());
    let sides = Sides::divide();
    sides.load();
    let upstream = traffic.upstream()?.address;
    let folder = tempfile::tempdir()?;
    sides.all();
    let idle_bytes = GatewayProcess::idle_bytes(folder.path(), &wasm, configuration, upstream)?;
    sides.proxies();
    let envoy_options = EnvoyOptions {
        plugin_configuration: configuration.clone(),
        ..EnvoyOptions::new(envoy::find_binary(args.envoy.as_deref())?, wasm.clone(), upstream)
    };
    let envoy = Envoy::start(&envoy_options)?;
    let gateway = GatewayProcess::start(folder.path(), &wasm, configuration, upstream)?;
    sides.load();
    let mean = |bytes: fn(&Asked) -> usize| asked.iter().map(bytes).sum::<usize>() / asked.len().max(1);
    let mut result = Comparison {
        idle_bytes,
        exchanges: asked.len(),
        request_bytes: mean(Asked::request_bytes),
        response_bytes: mean(Asked::expected_bytes),
        ..Comparison::default()
    };
    let load = Load { asked, connections: args.connections.max(1) };
    let proxies = [("gateway", gateway.address, gateway.pid()), ("Envoy", envoy.listen(), envoy.pid())];
    let (mut ticks, mut requests) = ([0; 2], [0; 2]);
    // A first round of each warms caches and is not counted.
    for round in 0..=args.rounds {
        for (index, (name, address, pid)) in proxies.into_iter().enumerate() {
            let before = processor_ticks(pid)?;
            let (rate, count) = load.closed_loop(name, address, Duration::from_secs(args.seconds))?;
            if round > 0 {
                [&mut result.gateway, &mut result.envoy][index].rounds.push(rate);
                ticks[index] += processor_ticks(pid)? - before;
                requests[index] += count;
            }
        }
    }
    for (index, figures) in [&mut result.gateway, &mut result.envoy].into_iter().enumerate() {
        figures.cpu_us = ticks[index] as f64 * TICK_US / (requests[index] as f64).max(1.0);
    }
    result.half_load = result.envoy.requests_per_second() / 2.0;
    let mut left = Duration::from_secs(args.soak);
    while !left.is_zero() {
        let slice = left.min(SLICE);
        left -= slice;
        for (index, (name, address, _)) in proxies.into_iter().enumerate() {
            let latencies = load.paced(name, address, result.half_load, slice)?;
            [&mut result.gateway, &mut result.envoy][index].latencies_us.extend(latencies);
        }
    }
    result.gateway.latencies_us.sort_unstable();
    result.envoy.latencies_us.sort_unstable();
    result.busy_bytes = gateway.resident_bytes()?;
    Ok(result)
}
