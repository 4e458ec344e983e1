//! Builds `dist/`: the `driftlock` binary and the filter, side by side as they are shipped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{Failure, Workspace, output, run};
use crate::envoy;

/// The filter's target.
pub(crate) const GUEST: &str = "wasm32-unknown-unknown";
/// The filter travels to every proxy: a budget, checked at each build.
const FILTER_MAX_BYTES: u64 = 1 << 20;

/// What a build leaves.
#[derive(Debug)]
pub(crate) struct Dist {
    pub(crate) binary: PathBuf,
    pub(crate) filter: PathBuf,
}

/// Builds both, copies them to `dist/`, prints their sizes, and fails when the filter is over its
/// budget.
pub(crate) fn build(workspace: &Workspace) -> Result<Dist, Failure> {
    add_target(GUEST)?;
    run(&mut workspace.cargo([
        "build",
        "--package",
        "driftlock-filter",
        "--profile",
        "filter",
        "--target",
        GUEST,
    ]))?;
    run(&mut workspace.cargo(["build", "--package", "driftlock-host", "--release"]))?;

    let folder = workspace.root.join("dist");
    fs::create_dir_all(&folder).map_err(|error| Failure::file("create", &folder, &error))?;
    let name = format!("driftlock{}", std::env::consts::EXE_SUFFIX);
    let dist = Dist { binary: folder.join(&name), filter: folder.join("driftlock_filter.wasm") };
    let binary_bytes = place(&workspace.target.join("release").join(&name), &dist.binary)?;
    let filter_bytes =
        place(&workspace.target.join(GUEST).join("filter/driftlock_filter.wasm"), &dist.filter)?;
    eprintln!("   dist/{name}: {:.1} MiB", binary_bytes as f64 / 1_048_576.0);
    eprintln!("   dist/driftlock_filter.wasm: {} KiB", filter_bytes / 1024);
    if filter_bytes > FILTER_MAX_BYTES {
        return Err(Failure::new(format!(
            "the filter is {filter_bytes} bytes, more than its budget of {FILTER_MAX_BYTES}; `twiggy top` shows what grew"
        )));
    }
    Ok(dist)
}

/// Builds, then runs `driftlock demo` with the arguments given.
pub(crate) fn demo(workspace: &Workspace, arguments: &[String]) -> Result<(), Failure> {
    let dist = build(workspace)?;
    let mut demo = Command::new(&dist.binary);
    demo.arg("demo").args(arguments);
    if arguments.iter().any(|argument| argument == "--envoy") {
        demo.env(envoy::BINARY_VARIABLE, envoy::install(workspace)?);
    }
    run(&mut demo)
}

/// Adds a Rust target through rustup if it is not there. A toolchain without rustup has to bring
/// its own targets.
pub(crate) fn add_target(target: &str) -> Result<(), Failure> {
    let Ok(installed) = output(Command::new("rustup").args(["target", "list", "--installed"])) else {
        eprintln!("   no rustup here: taking for granted that the toolchain can build for {target}");
        return Ok(());
    };
    if installed.lines().any(|line| line.trim() == target) {
        return Ok(());
    }
    eprintln!("   installing the Rust target {target}");
    run(Command::new("rustup").args(["target", "add", target]))
}

/// Copies a build product and returns its size in bytes. A copy under another name is renamed into
/// place, so that a running binary can be replaced.
fn place(from: &Path, to: &Path) -> Result<u64, Failure> {
    let staged = to.with_extension("new");
    let bytes = fs::copy(from, &staged).map_err(|error| Failure::file("copy", from, &error))?;
    fs::rename(&staged, to).map_err(|error| Failure::file("replace", to, &error))?;
    Ok(bytes)
}
