//! Everything that has to hold before a change is taken, cheapest first.
//!
//! Crates are checked one at a time: a build of the whole workspace unifies features, which hides a
//! `no_std` crate that has come to need `std`. What links wasmtime is built in the release profile
//! only, since compiling wasmtime twice would cost more than all the tests together.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::build::{self, Dist, GUEST};
use crate::command::{Failure, Workspace, output, run, succeeds};
use crate::{clients, debian, envoy, example, manifests, package, tidy};

/// A bare-metal target: it has no `std` at all, so a crate that builds for it needs none.
const BARE_METAL: &str = "thumbv7em-none-eabi";
/// 64 bits, the highest byte first.
const BIG_ENDIAN: &str = "s390x-unknown-linux-gnu";
const BIG_ENDIAN_LINKER: &str = "s390x-linux-gnu-gcc";
/// Runs of random traffic; under qemu one takes a second.
const SEEDS: &str = "3";

/// The engine's feature tiers as `engine/Cargo.toml` has them, where each must build. The tiers without
/// features and with all of them are built by other steps.
const TIERS: [(&str, &str); 4] =
    [(BARE_METAL, "lz4"), (BARE_METAL, "deflate"), (GUEST, "lz4,deflate"), (GUEST, "zstd")];

/// zstd is C code, and for wasm32 cc takes clang.
fn need_clang() -> Result<(), Failure> {
    if succeeds(Command::new("clang").arg("--version")) {
        return Ok(());
    }
    debian::install(&["clang"], "zstd for wasm32 needs a C compiler that knows wasm")
}

/// Runs all steps, stops at the first that fails, and says how long each took.
pub(crate) fn test(workspace: &Workspace) -> Result<(), Failure> {
    let mut steps = Steps { started: Instant::now(), took: Vec::new() };
    let result = all(workspace, &mut steps);
    eprintln!();
    for (name, took) in &steps.took {
        eprintln!("{:>7.1} s  {name}", took.as_secs_f64());
    }
    let total = steps.started.elapsed().as_secs();
    match result {
        Ok(()) => {
            println!("PASS: {} steps in {} min {:02} s", steps.took.len(), total / 60, total % 60);
            Ok(())
        }
        Err(failure) => {
            println!("FAIL after {} min {:02} s", total / 60, total % 60);
            Err(failure)
        }
    }
}

struct Steps {
    started: Instant,
    took: Vec<(String, Duration)>,
}

impl Steps {
    fn step<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        eprintln!("\n== {name}");
        let started = Instant::now();
        let result = work();
        self.took.push((name.to_owned(), started.elapsed()));
        result.map_err(|failure| Failure::new(format!("{name}: {failure}")))
    }
}

fn all(workspace: &Workspace, steps: &mut Steps) -> Result<(), Failure> {
    let cargo = |arguments: &[&str]| run(&mut workspace.cargo(arguments));
    steps.step("tidy", || tidy::tidy(workspace))?;
    steps.step("format", || cargo(&["fmt", "--all", "--check"]))?;

    for package in ["xtask", "driftlock-engine", "driftlock-inspect", "driftlock-fuzz"] {
        steps.step(&format!("tests of {package}"), || cargo(&["test", "--quiet", "--package", package]))?;
    }
    steps.step("bare metal: engine and inspect without std", || {
        for target in [GUEST, BARE_METAL] {
            build::add_target(target)?;
            for package in ["driftlock-engine", "driftlock-inspect"] {
                cargo(&["build", "--package", package, "--no-default-features", "--target", target])?;
            }
        }
        Ok(())
    })?;
    steps.step("tiers of the engine, each alone", || {
        need_clang()?;
        for (target, features) in TIERS {
            cargo(&[
                "build",
                "--quiet",
                "--package",
                "driftlock-engine",
                "--no-default-features",
                "--features",
                features,
                "--target",
                target,
            ])?;
        }
        // All that wasm can have, as a module for `tests/tests/code_lengths.rs`.
        cargo(&[
            "build",
            "--quiet",
            "--package",
            "driftlock-engine",
            "--example",
            "code_lengths",
            "--features",
            "zstd",
            "--target",
            GUEST,
        ])
    })?;
    steps.step("the same bytes on a big-endian machine, and in both profiles", || same_bytes(workspace))?;
    // In the release profile: the host links the same C libraries there.
    steps.step("every adapter against its codec, and its lints", || {
        cargo(&[
            "test",
            "--quiet",
            "--release",
            "--package",
            "driftlock-engine",
            "--all-features",
            "--test",
            "adapters",
        ])?;
        for package in ["driftlock-engine", "driftlock-openzl"] {
            cargo(&[
                "clippy",
                "--quiet",
                "--release",
                "--package",
                package,
                "--all-features",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])?;
        }
        Ok(())
    })?;

    for package in ["driftlock-engine", "driftlock-inspect", "driftlock-fuzz", "xtask"] {
        steps.step(&format!("lints of {package}"), || {
            cargo(&["clippy", "--quiet", "--package", package, "--all-targets", "--", "-D", "warnings"])
        })?;
    }
    steps.step("lints of driftlock-filter", || {
        cargo(&[
            "clippy",
            "--quiet",
            "--package",
            "driftlock-filter",
            "--target",
            GUEST,
            "--",
            "-D",
            "warnings",
        ])
    })?;
    for package in ["driftlock-host", "driftlock-tests", "driftlock-benches"] {
        steps.step(&format!("lints of {package}"), || {
            cargo(&[
                "clippy",
                "--quiet",
                "--release",
                "--package",
                package,
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])
        })?;
    }

    let dist = steps.step("build", || build::build(workspace))?;
    let Dist { binary, filter } = &dist;
    let envoy = steps.step("install Envoy", || envoy::install(workspace))?;
    let code_lengths = workspace.target.join(GUEST).join("debug/examples/code_lengths.wasm");
    let clients = steps.step("install clients", || clients::install(workspace))?;
    let manifests = steps.step("install what manifests are checked by", || manifests::install(workspace))?;
    let packed = steps.step("package", || {
        package::check_reproducible(workspace, &dist)?;
        package::pack(workspace, &dist, false)
    })?;
    let with_products = |command: &mut Command| {
        run(command
            .env("DRIFTLOCK_CODE_LENGTHS", &code_lengths)
            .env("DRIFTLOCK_BINARY", binary)
            .env("DRIFTLOCK_FILTER", filter)
            .env(clients::PYTHON_VARIABLE, &clients)
            .env(manifests::FOLDER_VARIABLE, &manifests)
            .env(package::FOLDER_VARIABLE, &packed)
            .env(envoy::BINARY_VARIABLE, &envoy))
    };
    // Guests written with the published SDK are built by the host's tests for this target too.
    steps.step("the target wasm32-wasip1", || build::add_target("wasm32-wasip1"))?;
    for package in ["driftlock-host", "driftlock-tests"] {
        steps.step(&format!("tests of {package}"), || {
            with_products(&mut workspace.cargo(["test", "--release", "--quiet", "--package", package]))
        })?;
    }
    steps.step("the proxy-wasm host against Envoy", || {
        with_products(&mut workspace.cargo([
            "test",
            "--release",
            "--quiet",
            "--package",
            "driftlock-host",
            "--test",
            "abi",
            "--",
            "--ignored",
            "envoy",
        ]))
    })?;
    steps.step("the test kit from outside the workspace", || test_kit(workspace))?;
    steps.step("documentation of driftlock-host", || {
        run(workspace
            .cargo(["doc", "--quiet", "--release", "--no-deps", "--lib", "--package", "driftlock-host"])
            .env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    steps.step("golden verdicts of the packaged filter", || {
        let golden = ["test", "--release", "--quiet", "--package", "driftlock-tests", "--test", "golden"];
        let module = packed.join(package::FILTER);
        run(workspace.cargo(golden).env("DRIFTLOCK_FILTER", module).env("DRIFTLOCK_BINARY", &dist.binary))
    })?;
    steps.step("the demo, through the gateway and through Envoy", || {
        for arguments in [&["demo"][..], &["demo", "--envoy"]] {
            run(Command::new(binary).args(arguments).env(envoy::BINARY_VARIABLE, &envoy))?;
        }
        Ok(())
    })?;
    steps.step("the LLM gateway example", || example::run_gateway(workspace, &dist))?;
    steps.step("envoy/README.md, word for word", || example::follow_readme(workspace))
}

/// What the engine makes of random traffic: in the dev profile, in the release profile, and on s390x (64 bits,
/// big-endian, under qemu).
fn same_bytes(workspace: &Workspace) -> Result<(), Failure> {
    build::add_target(BIG_ENDIAN)?;
    let emulator = "qemu-s390x";
    if !succeeds(Command::new(emulator).arg("--version"))
        || !succeeds(Command::new(BIG_ENDIAN_LINKER).arg("--version"))
    {
        let packages = ["qemu-user", "gcc-s390x-linux-gnu", "libc6-dev-s390x-cross"];
        debian::install(&packages, "the big-endian run needs an emulator and a linker")?;
    }
    let example = ["--quiet", "--package", "driftlock-engine", "--example", "same_bytes"];
    run(workspace
        .cargo(["build", "--target", BIG_ENDIAN])
        .args(example)
        .env("CARGO_TARGET_S390X_UNKNOWN_LINUX_GNU_LINKER", BIG_ENDIAN_LINKER))?;
    let here = output(workspace.cargo(["run"]).args(example).args(["--", SEEDS]))?;
    let built = workspace.target.join(BIG_ENDIAN).join("debug/examples/same_bytes");
    let there = output(Command::new(emulator).args(["-L", "/usr/s390x-linux-gnu"]).arg(built).arg(SEEDS))?;
    let released = output(workspace.cargo(["run", "--release"]).args(example).args(["--", SEEDS]))?;
    match here == there && here == released {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "here\n{here}\non {BIG_ENDIAN}\n{there}\nhere, release profile\n{released}"
        ))),
    }
}

/// The example is a workspace of its own. With this workspace's lock file, profile and target directory
/// it uses the dependencies that are compiled already.
fn test_kit(workspace: &Workspace) -> Result<(), Failure> {
    let folder = workspace.root.join("examples/proxy-wasm-test");
    std::fs::copy(workspace.root.join("Cargo.lock"), folder.join("Cargo.lock"))
        .map_err(|error| Failure::file("copy Cargo.lock to", &folder, &error))?;
    let mut test = workspace.cargo(["test", "--quiet", "--release", "--target-dir"]);
    run(test.arg(&workspace.target).current_dir(folder))
}
