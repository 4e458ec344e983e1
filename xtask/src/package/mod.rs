//! What is handed out: `dist/package/`, the same bytes from every folder.
//!
//! | file | what |
//! |---|---|
//! | `driftlock_filter.wasm` | the filter, through `wasm-opt -O3` |
//! | `filter-compat/`, `filter-oci/` | the filter as OCI image layouts, see `oci.rs` for who takes which |
//! | `driftlock-TARGET` | the binary; static (musl) with `--static`, else linked with glibc |
//! | `filter.cdx.json`, `driftlock.cdx.json` | what went into each, CycloneDX 1.5 |
//! | `provenance.json` | what they were built from and by, an in-toto statement with SLSA's predicate, unsigned |
//! | `SHA256SUMS` | of all the above |
//!
//! Nothing in it has a time, a folder's name or an order that a folder gives: paths in panic messages are
//! remapped by `build.rs`, archives are sorted and dated 1970. `--verify` builds the filter a second time from a
//! copy in another folder and compares.
//!
//! Cost: some seconds beside the build; `--static` compiles everything once more for musl, `--verify` the filter.
//!
//! Left out on purpose: signatures, and pushing to a registry (`skopeo copy` does it, see `istio/README.md`).

mod json;
mod oci;
mod sbom;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::build::{self, Dist, GUEST};
use crate::command::{Failure, Workspace, output, run, succeeds};
use crate::debian;
use json::Json;

/// Names the folder that `pack` made, for the tests.
pub(crate) const FOLDER_VARIABLE: &str = "DRIFTLOCK_PACKAGE";
/// The filter in it.
pub(crate) const FILTER: &str = "driftlock_filter.wasm";

const STATIC_TARGET: &str = "x86_64-unknown-linux-musl";

/// Builds everything and lists it.
pub(crate) fn package(workspace: &Workspace, arguments: &[String]) -> Result<(), Failure> {
    let (mut link_static, mut verify) = (false, false);
    for argument in arguments {
        match argument.as_str() {
            "--static" => link_static = true,
            "--verify" => verify = true,
            unknown => {
                return Err(Failure::new(format!("package takes --static and --verify, not {unknown:?}")));
            }
        }
    }
    let dist = build::build(workspace)?;
    let folder = pack(workspace, &dist, link_static)?;
    if verify {
        check_reproducible(workspace, &dist)?;
    }
    println!("{}", folder.display());
    Ok(())
}

/// Builds the filter again from a copy in another folder, and fails if the bytes differ.
pub(crate) fn check_reproducible(workspace: &Workspace, dist: &Dist) -> Result<(), Failure> {
    let again = build_elsewhere(workspace)?;
    let [first, second] = [digest(&dist.filter)?, digest(&again)?];
    if first != second {
        return Err(Failure::new(format!(
            "two builds of the filter differ: {first} in {}, {second} in {}",
            dist.filter.display(),
            again.display()
        )));
    }
    println!("   the filter built from a copy in another folder has the same bytes: sha256 {first}");
    Ok(())
}

/// Packs what is built, and returns the folder.
pub(crate) fn pack(workspace: &Workspace, dist: &Dist, link_static: bool) -> Result<PathBuf, Failure> {
    if !succeeds(Command::new("wasm-opt").arg("--version")) {
        debian::install(&["binaryen"], "wasm-opt is missing")?;
    }
    let folder = workspace.root.join("dist/package");
    // What an earlier version left there must not be taken for part of this one.
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).map_err(|error| Failure::file("create", &folder, &error))?;
    let version = version(workspace)?;

    let filter = folder.join(FILTER);
    optimise(&dist.filter, &filter)?;
    for variant in [oci::Variant::Compat, oci::Variant::Oci] {
        oci::write(&folder, variant, &filter, &version)?;
    }
    let (binary, target) = if link_static {
        (static_binary(workspace)?, STATIC_TARGET.to_owned())
    } else {
        (dist.binary.clone(), host_target()?)
    };
    let shipped = folder.join(format!("driftlock-{target}"));
    fs::copy(&binary, &shipped).map_err(|error| Failure::file("copy", &binary, &error))?;

    let lock = workspace.root.join("Cargo.lock");
    for (name, package, target, file) in [
        ("filter.cdx.json", "driftlock-filter", GUEST, &filter),
        ("driftlock.cdx.json", "driftlock-host", target.as_str(), &shipped),
    ] {
        let document = sbom::document(workspace, package, target, file, &lock)?;
        write(&folder.join(name), &document.to_string())?;
    }
    let statement = provenance(workspace, &[&filter, &shipped], link_static, &lock)?;
    write(&folder.join("provenance.json"), &statement.to_string())?;
    write_sums(&folder)?;
    for file in [&dist.filter, &filter, &shipped] {
        let bytes = fs::metadata(file).map_err(|error| Failure::file("read", file, &error))?.len();
        let shown = file.strip_prefix(&workspace.root).unwrap_or(file);
        println!("{bytes:>10} bytes  {}", shown.display());
    }
    Ok(folder)
}

/// The same module, smaller: binaryen removes what LLVM leaves. `tests/tests/package.rs` and the golden verdicts
/// hold it to the module that it came from.
fn optimise(from: &Path, to: &Path) -> Result<(), Failure> {
    // The features that rustc's wasm32-unknown-unknown has on, and vectors (.cargo/config.toml).
    const FEATURES: [&str; 7] = [
        "--enable-simd",
        "--enable-bulk-memory",
        "--enable-sign-ext",
        "--enable-mutable-globals",
        "--enable-nontrapping-float-to-int",
        "--enable-reference-types",
        "--enable-multivalue",
    ];
    run(Command::new("wasm-opt").arg("-O3").args(FEATURES).arg(from).arg("-o").arg(to))
}

/// The binary linked with musl: one file that needs nothing of the machine it runs on.
fn static_binary(workspace: &Workspace) -> Result<PathBuf, Failure> {
    build::add_target(STATIC_TARGET)?;
    if !succeeds(Command::new("musl-gcc").arg("--version")) {
        debian::install(&["musl-tools"], "the static binary's C libraries need musl-gcc")?;
    }
    let mut cargo =
        workspace.cargo(["build", "--package", "driftlock-host", "--release", "--target", STATIC_TARGET]);
    run(cargo.env("CC_x86_64_unknown_linux_musl", "musl-gcc"))?;
    Ok(workspace.target.join(STATIC_TARGET).join("release/driftlock"))
}

/// The filter from a copy of the tracked files under another path, by a target directory of its own.
fn build_elsewhere(workspace: &Workspace) -> Result<PathBuf, Failure> {
    let copy = workspace.target.join("reproduce/another folder, with another name");
    // The target folder in it stays: a second run compiles only what changed.
    let tracked = output(Command::new("git").args(["ls-files", "-z"]).current_dir(&workspace.root))?;
    for file in tracked.split('\0').filter(|file| !file.is_empty()) {
        let (from, to) = (workspace.root.join(file), copy.join(file));
        if !from.is_file() {
            continue;
        }
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(|error| Failure::file("create", parent, &error))?;
        }
        fs::copy(&from, &to).map_err(|error| Failure::file("copy", &from, &error))?;
    }
    let elsewhere = Workspace { target: copy.join("target"), root: copy };
    build::filter(&elsewhere)
}

/// The target that this machine's binaries are for.
fn host_target() -> Result<String, Failure> {
    let said = output(Command::new("rustc").arg("-vV"))?;
    let line = said.lines().find_map(|line| line.strip_prefix("host: "));
    line.map(str::to_owned).ok_or_else(|| Failure::new("rustc -vV does not name its host"))
}

/// The workspace's version.
fn version(workspace: &Workspace) -> Result<String, Failure> {
    let manifest = workspace.root.join("Cargo.toml");
    let text = fs::read_to_string(&manifest).map_err(|error| Failure::file("read", &manifest, &error))?;
    let line = text.lines().find_map(|line| line.strip_prefix("version = \""));
    line.and_then(|rest| rest.split('"').next())
        .map(str::to_owned)
        .ok_or_else(|| Failure::new("Cargo.toml has no version for the workspace"))
}

/// An in-toto statement (v1) with the predicate slsa.dev/provenance/v1.
fn provenance(
    workspace: &Workspace,
    subjects: &[&Path],
    link_static: bool,
    lock: &Path,
) -> Result<Json, Failure> {
    let resource = |name: &str, algorithm: &str, digest: String| {
        Json::object([("name", name.into()), ("digest", Json::object([(algorithm, digest.into())]))])
    };
    let subjects: Result<Vec<Json>, Failure> = subjects
        .iter()
        .map(|file| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            Ok(resource(&name, "sha256", digest(file)?))
        })
        .collect();
    let mut materials = vec![resource("Cargo.lock", "sha256", digest(lock)?)];
    // A source archive has no history.
    let head = output(Command::new("git").args(["rev-parse", "HEAD"]).current_dir(&workspace.root));
    if let Ok(commit) = head {
        materials.push(resource("driftlock", "gitCommit", commit.trim().to_owned()));
    }
    let said = |program: &str, argument: &str| -> Result<Json, Failure> {
        Ok(output(Command::new(program).arg(argument))?.trim().into())
    };
    let predicate = Json::object([
        (
            "buildDefinition",
            Json::object([
                ("buildType", "https://driftlock.invalid/cargo-xtask-package/v1".into()),
                ("externalParameters", Json::object([("static", Json::Bool(link_static))])),
                (
                    "internalParameters",
                    Json::object([
                        ("rustc", said("rustc", "--version")?),
                        ("wasm-opt", said("wasm-opt", "--version")?),
                    ]),
                ),
                ("resolvedDependencies", Json::List(materials)),
            ]),
        ),
        (
            "runDetails",
            Json::object([(
                "builder",
                Json::object([("id", "https://driftlock.invalid/cargo-xtask".into())]),
            )]),
        ),
    ]);
    Ok(Json::object([
        ("_type", "https://in-toto.io/Statement/v1".into()),
        ("subject", Json::List(subjects?)),
        ("predicateType", "https://slsa.dev/provenance/v1".into()),
        ("predicate", predicate),
    ]))
}

/// `SHA256SUMS` over every file below the folder, to be checked by `sha256sum --check`.
fn write_sums(folder: &Path) -> Result<(), Failure> {
    let mut files = Vec::new();
    list(folder, &mut files)?;
    files.sort();
    let mut sums = String::new();
    for file in files {
        let name = file.strip_prefix(folder).unwrap_or(&file).display().to_string();
        sums.push_str(&format!("{}  {name}\n", digest(&file)?));
    }
    write(&folder.join("SHA256SUMS"), &sums)
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Failure> {
    for entry in fs::read_dir(folder).map_err(|error| Failure::file("read", folder, &error))? {
        let path = entry.map_err(|error| Failure::file("read", folder, &error))?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).map_err(|error| Failure::file("write", path, &error))
}

/// A file's SHA-256 in hexadecimal, by coreutils.
fn digest(path: &Path) -> Result<String, Failure> {
    let line = output(Command::new("sha256sum").arg("--").arg(path))?;
    // A leading backslash says that the name, which is not wanted, is escaped.
    let digest = line.trim_start_matches('\\').split(' ').next().unwrap_or_default();
    Ok(digest.to_owned())
}
