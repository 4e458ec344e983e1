//! Installs the clients of the tests, and an upstream for them: the openai and anthropic SDKs, a websocket client,
//! and fakellm, which answers in both APIs.

use std::path::PathBuf;
use std::process::Command;

use crate::command::{Failure, Workspace, output, succeeds};
use crate::python;

/// Names a Python that has the clients, for the tests.
pub(crate) const PYTHON_VARIABLE: &str = "DRIFTLOCK_CLIENTS";

/// Path of a Python that has the clients; installs them if need be (40 MB, half a minute).
pub(crate) fn install(workspace: &Workspace) -> Result<PathBuf, Failure> {
    const IMPORT: [&str; 2] = ["-c", "import anthropic, fakellm, openai, websockets"];
    if let Some(python) = std::env::var_os(PYTHON_VARIABLE) {
        output(Command::new(&python).args(IMPORT))?;
        return Ok(python.into());
    }
    let folder = python::environment(workspace, "clients", "clients-requirements.txt", &[], |folder| {
        succeeds(Command::new(folder.join("bin/python3")).args(IMPORT))
    })?;
    Ok(folder.join("bin/python3"))
}
