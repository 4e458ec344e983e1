//! The `driftlock` command.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use driftlock_host::{
    adapt, aggregate, bench, capture, check, demo, drift, eval, explain, gateway, replay, synth, train, units,
};
use tracing_subscriber::EnvFilter;

/// Compression-based anomaly detection for LLM and HTTP traffic: explainable, reproducible, inline.
#[derive(Debug, Parser)]
#[command(name = "driftlock", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Learn a baseline from a capture of normal traffic.
    Train(train::Args),
    /// Let a snapshot follow recent traffic, without learning what is not normal.
    Adapt(adapt::Args),
    /// Judge every exchange of a capture, natively, through the .wasm, or through Envoy.
    Replay(replay::Args),
    /// Make a replay again from its manifest, and say whether everything is as it was.
    Verify(replay::verify::Args),
    /// Record what passes a gateway, redacted, or rewrite a capture.
    Capture(capture::Args),
    /// Show what surprised the model in one exchange, byte by byte.
    Explain(explain::Args),
    /// Say whether one capture's traffic has moved away from another's, how, and what moved it.
    Drift(drift::Args),
    /// Count what the parsers make of a capture, or show one exchange's units.
    Units(units::Args),
    /// Run a reverse proxy with the filter in front of an upstream.
    Gateway(Box<gateway::Args>),
    /// Look at configurations without starting anything.
    #[command(subcommand)]
    Config(Config),
    /// Serve baselines to filters and take their observations.
    Serve(aggregate::Args),
    /// Measure speed, with what it is compared to in the same run.
    #[command(args_conflicts_with_subcommands = true)]
    Bench {
        #[command(subcommand)]
        only: Option<Bench>,
        #[command(flatten)]
        args: bench::Args,
    },
    /// Measure detection on labelled captures, by the published protocol.
    Eval(eval::Args),
    /// Generate an LLM gateway's traffic, with labelled anomalies.
    Synth(synth::Args),
    /// Say what a replay found of the attacks that `synth` injected, and where.
    Score(synth::score::Args),
    /// Generate, train, inspect, report: the whole path in one command.
    Demo(demo::Args),
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// The gateway beside a real Envoy with the same filter: throughput, latency, memory.
    Gateway(bench::gateway::Args),
}

#[derive(Debug, Subcommand)]
enum Config {
    /// Check plugin configurations: alone, in a gateway's file, in Envoy's, or in Istio's manifests.
    Check(check::Args),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn")))
        .without_time()
        .init();
    let result = match Cli::parse().command {
        Command::Train(args) => train::run(&args).map_err(anyhow::Error::from),
        Command::Adapt(args) => adapt::run(&args).map_err(anyhow::Error::from),
        Command::Replay(args) => replay::run(&args).map_err(anyhow::Error::from),
        Command::Verify(args) => replay::verify::run(&args).map_err(anyhow::Error::from),
        Command::Capture(args) => capture::run(&args).map_err(anyhow::Error::from),
        Command::Explain(args) => explain::run(&args).map_err(anyhow::Error::from),
        Command::Drift(args) => drift::run(&args).map_err(anyhow::Error::from),
        Command::Units(args) => units::run(&args).map_err(anyhow::Error::from),
        Command::Gateway(args) => gateway::run(*args).map_err(anyhow::Error::from),
        Command::Config(Config::Check(args)) => check::run(&args).map_err(anyhow::Error::from),
        Command::Serve(args) => aggregate::run(&args).map_err(anyhow::Error::from),
        Command::Bench { only: Some(Bench::Gateway(args)), .. } => {
            bench::gateway::run(&args).map_err(anyhow::Error::from)
        }
        Command::Bench { only: None, args } => bench::run(&args).map_err(anyhow::Error::from),
        Command::Eval(args) => eval::run(&args).map_err(anyhow::Error::from),
        Command::Synth(args) => synth::run(&args).map_err(anyhow::Error::from),
        Command::Score(args) => synth::score::run(&args).map_err(anyhow::Error::from),
        Command::Demo(args) => return demo::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            anstream::eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
