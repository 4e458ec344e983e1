//! Installs the clients and the upstream of the SDK test: the `openai` and `anthropic` packages and
//! `fakellm`, pinned in `xtask/sdk-requirements.txt`.
//!
//! `DRIFTLOCK_SDK_PYTHON` names a Python that has them and makes this a no-op.

use std::path::PathBuf;
use std::process::Command;

use crate::command::{Failure, Workspace, succeeds};
use crate::python;

/// The same variable as in `tests/tests/sdk.rs`.
pub(crate) const PYTHON_VARIABLE: &str = "DRIFTLOCK_SDK_PYTHON";

/// Path of a Python that has the SDKs; installs them if need be (some 40 MB, half a minute).
pub(crate) fn install(workspace: &Workspace) -> Result<PathBuf, Failure> {
    if let Some(python) = std::env::var_os(PYTHON_VARIABLE) {
        return Ok(python.into());
    }
    let folder = python::environment(workspace, "sdk", "sdk-requirements.txt", &[], |folder| {
        succeeds(Command::new(folder.join("bin/python3")).args(["-c", "import anthropic, openai"]))
    })?;
    Ok(folder.join("bin/python3"))
}
