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
    let built = filter(workspace)?;
    run(&mut workspace.cargo(["build", "--package", "driftlock-host", "--release"]))?;

    let folder = workspace.root.join("dist");
    fs::create_dir_all(&folder).map_err(|error| Failure::file("create", &folder, &error))?;
    let name = format!("driftlock{}", std::env::consts::EXE_SUFFIX);
    let dist = Dist { binary: folder.join(&name), filter: folder.join("driftlock_filter.wasm") };
    let binary_bytes = place(&workspace.target.join("release").join(&name), &dist.binary)?;
    let filter_bytes = place(&built, &dist.filter)?;
    eprintln!("   dist/{name}: {:.1} MiB", binary_bytes as f64 / 1_048_576.0);
    eprintln!("   dist/driftlock_filter.wasm: {} KiB", filter_bytes / 1024);
    if filter_bytes > FILTER_MAX_BYTES {
        return Err(Failure::new(format!(
            "the filter is {filter_bytes} bytes, more than its budget of {FILTER_MAX_BYTES}; `twiggy top` shows what grew"
        )));
    }
    Ok(dist)
}

/// Builds the filter and returns where it is. Its bytes are the same whatever the folders are called: what is in its
/// panic messages of them is given a name of its own. It carries no function names: rustc's `strip` leaves them, a tenth
/// of the module; a build without that flag has the same functions in the same order.
pub(crate) fn filter(workspace: &Workspace) -> Result<PathBuf, Failure> {
    add_target(GUEST)?;
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo_home = std::env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    let remap = |from: &Path, to: &str| format!("'--remap-path-prefix={}={to}'", from.display());
    let no_names = "'-Clink-arg=--strip-all'".to_owned();
    let flags = [remap(&workspace.root, "/driftlock"), remap(&cargo_home, "/cargo"), no_names].join(", ");
    let profile = ["--profile", "filter", "--target", GUEST];
    // As configuration these join the flags in .cargo/config.toml; the environment's would replace them.
    let mut cargo = workspace.cargo(["build", "--package", "driftlock-filter", "--config"]);
    cargo.arg(format!("target.{GUEST}.rustflags=[{flags}]")).arg("--target-dir").arg(&workspace.target);
    run(cargo.args(profile))?;
    Ok(workspace.target.join(GUEST).join("filter/driftlock_filter.wasm"))
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
