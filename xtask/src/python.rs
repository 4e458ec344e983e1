//! Python environments in the target folder, so that the machine's own Python stays as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{Failure, Workspace, run, succeeds};
use crate::debian;

/// `target/NAME` with what `requirements` (a file in `xtask/`) lists; made anew when the list changed or
/// `works` says so. `options` go to pip.
pub(crate) fn environment(
    workspace: &Workspace,
    name: &str,
    requirements: &str,
    options: &[&str],
    works: impl Fn(&Path) -> bool,
) -> Result<PathBuf, Failure> {
    let folder = workspace.target.join(name);
    let requirements = workspace.root.join("xtask").join(requirements);
    let wanted =
        fs::read_to_string(&requirements).map_err(|error| Failure::file("read", &requirements, &error))?;
    // Written last, so it also tells a whole installation from one that was interrupted.
    let installed = folder.join("installed-requirements.txt");
    if fs::read_to_string(&installed).is_ok_and(|installed| installed == wanted) && works(&folder) {
        return Ok(folder);
    }
    // `venv` alone is in Debian's python3; `ensurepip`, which it needs, is in python3-venv.
    if !succeeds(Command::new("python3").args(["-c", "import venv, ensurepip"])) {
        debian::install(&["python3", "python3-venv"], "Python's venv module is missing")?;
    }
    eprintln!("   installing {name} into {}", folder.display());
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    run(Command::new(folder.join("bin/python3"))
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(["--only-binary=:all:", "--no-deps"])
        .args(options)
        .arg("-r")
        .arg(&requirements))?;
    if !works(&folder) {
        return Err(Failure::new(format!("what was installed into {} does not run", folder.display())));
    }
    fs::write(&installed, wanted).map_err(|error| Failure::file("write", &installed, &error))?;
    Ok(folder)
}
