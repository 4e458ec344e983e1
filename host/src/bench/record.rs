//! Results with what they were measured on, as files that stay: `benches/record/`.
//!
//! A file a run, named by its time, so that a comparison over time is a look into a folder. The machine is
//! what Linux says of it; the load before the run tells how quiet it was.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::Report;
use crate::synth::calendar::day_record;

/// What was measured on, and when.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    /// `2026-11-23T08:30Z`.
    date: String,
    processor: String,
    processors: usize,
    /// Over the last minute before the run.
    load_average: Option<f64>,
}

impl Machine {
    pub(super) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let day = day_record(since);
        let day = day.split('|').next().unwrap_or_default();
        let (hour, minute) = (since / 3600 % 24, since / 60 % 60);
        let information = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = information.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            date: format!("{day}T{hour:02}:{minute:02}Z"),
            processor: model.map_or(std::env::consts::ARCH, |(_, name)| name).to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            load_average: load.split(' ').next().and_then(|load| load.parse().ok()),
        }
    }
}

#[derive(Serialize)]
struct Record<'a> {
    machine: &'a Machine,
    #[serde(flatten)]
    report: &'a Report,
}

/// Writes one run's file and names it.
pub(super) fn write(folder: &Path, machine: &Machine, report: &Report) -> io::Result<PathBuf> {
    let name = machine.date.replace(':', "");
    let path = folder.join(format!("bench-{name}.json"));
    let text = serde_json::to_string_pretty(&Record { machine, report })?;
    fs::create_dir_all(folder)?;
    fs::write(&path, text + "\n")?;
    Ok(path)
}
