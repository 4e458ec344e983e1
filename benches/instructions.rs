//! Instructions a byte of each hot path, by callgrind: `cargo run --release -p driftlock-benches --bin
//! instructions [-- --record]`.
//!
//! Unlike time, it does not depend on who else uses the machine, so a regression of a few per cent can be
//! seen. The paths over generated texts run in this same program under valgrind (Debian's package), which
//! counts inside [`measured`] only. The table is compared with `record/instructions.json` and the program
//! fails where a path costs over a twentieth more; `--record` replaces it.
//!
//! Cost: two minutes. Left out on purpose: what runs in wasmtime, whose compiled code valgrind knows nothing
//! of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use driftlock_benches::{HotPath, generated_paths};

const RUNS: u64 = 3;
const TOLERANCE: f64 = 1.05;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.first().map(String::as_str) {
        Some("run") => {
            run();
            Ok(())
        }
        None | Some("--record") => count(!arguments.is_empty()),
        Some(other) => Err(format!("{other:?} is neither nothing nor --record")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Under valgrind, which begins to count here and writes down the count on leaving.
#[inline(never)]
fn measured(path: &mut HotPath) {
    (0..RUNS).for_each(|_| path.check());
}

fn run() {
    for mut path in generated_paths() {
        path.check();
        measured(&mut path);
    }
}

/// Instructions of each path, in their order.
fn instructions() -> Result<Vec<u64>, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let folder = std::env::temp_dir().join(format!("driftlock-instructions-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=instructions::measured"])
        .arg("--dump-after=instructions::measured")
        .arg(format!("--callgrind-out-file={}", folder.join("counts").display()))
        .arg(program)
        .arg("run")
        .output()
        .map_err(|error| format!("cannot run valgrind: {error}; install Debian's package valgrind"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let mut counts = Vec::new();
    while let Ok(text) = std::fs::read_to_string(folder.join(format!("counts.{}", counts.len() + 1))) {
        let total = text.lines().find_map(|line| line.strip_prefix("summary: ")?.trim().parse().ok());
        counts.push(total.ok_or("callgrind wrote no summary")?);
    }
    std::fs::remove_dir_all(&folder).map_err(|error| error.to_string())?;
    Ok(counts)
}

fn record_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("record/instructions.json")
}

fn count(record: bool) -> Result<(), String> {
    let recorded: BTreeMap<String, f64> = match std::fs::read(record_path()) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| error.to_string())?,
        Err(_) => BTreeMap::new(),
    };
    let mut table = BTreeMap::new();
    let mut worse = Vec::new();
    println!("{:<24} {:>12} {:>10}", "path", "instr./byte", "recorded");
    let paths = generated_paths();
    let counts = instructions()?;
    if counts.len() < paths.len() {
        return Err(format!("callgrind counted {} of {} paths", counts.len(), paths.len()));
    }
    for (HotPath { name, bytes, .. }, instructions) in paths.into_iter().zip(counts) {
        let per_byte = (instructions as f64 / (RUNS * bytes) as f64 * 100.0).round() / 100.0;
        let before = recorded.get(&name);
        let shown = before.map_or("-".to_owned(), |before| format!("{before:.2}"));
        println!("{name:<24} {per_byte:>12.2} {shown:>10}");
        if before.is_some_and(|before| per_byte > before * TOLERANCE) {
            worse.push(name.clone());
        }
        table.insert(name, per_byte);
    }
    if record {
        let text = serde_json::to_string_pretty(&table).map_err(|error| error.to_string())?;
        return std::fs::write(record_path(), text + "\n").map_err(|error| error.to_string());
    }
    match worse.is_empty() {
        true => Ok(()),
        false => Err(format!("over a twentieth more than recorded: {}", worse.join(", "))),
    }
}
