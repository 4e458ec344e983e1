//! Every manifest of `istio/`, and every stage of the roll-out as kustomize renders it: refused neither by the
//! published schemas nor by `driftlock config check`; and a set of broken ones that each has to refuse.
//!
//! `cargo xtask manifests` installs the validators and says where; `cargo xtask test` does so by itself.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use driftlock_host::check::{Severity, check};
use driftlock_tests::attach::file;
use driftlock_tests::workspace;

/// The same variable as in `xtask/src/manifests.rs`.
const FOLDER_VARIABLE: &str = "DRIFTLOCK_MANIFESTS";

fn validators() -> PathBuf {
    let folder =
        std::env::var_os(FOLDER_VARIABLE).map_or_else(|| workspace().join("target/manifests"), PathBuf::from);
    assert!(folder.is_dir(), "no validators at {}: run `cargo xtask manifests`", folder.display());
    std::path::absolute(folder).expect("a path")
}

/// What the published schemas have against these files; `-` is `input`.
fn schemas(files: &[&str], input: &str) -> Vec<String> {
    let folder = validators();
    let mut child = Command::new(folder.join("bin/python3"))
        .arg(workspace().join("tests/manifests/validate.py"))
        .args(files)
        .env(FOLDER_VARIABLE, &folder)
        .current_dir(workspace())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("Python runs");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.is_empty(), "{errors}");
    let refused = String::from_utf8_lossy(&output.stdout);
    refused.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// What `driftlock config check` has against a text.
fn rules(text: &str) -> Vec<String> {
    let findings = check(text, Path::new("manifest.yaml")).findings;
    let errors = findings.iter().filter(|finding| finding.severity == Severity::Error);
    errors.map(ToString::to_string).collect()
}

/// All manifests below a folder of the workspace.
fn manifests(folder: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(workspace().join(folder)).expect("a folder") {
        let path = format!("{folder}/{}", entry.expect("an entry").file_name().to_string_lossy());
        if workspace().join(&path).is_dir() {
            manifests(&path, found);
        } else if path.ends_with(".yaml") && !path.ends_with("istiod-values.yaml") {
            found.push(path);
        }
    }
    found.sort();
}

fn rendered(stage: &str) -> String {
    let own = validators().join("kubectl");
    let kubectl = if own.is_file() { own } else { "kubectl".into() };
    let output = Command::new(kubectl).arg("kustomize").arg(workspace().join(stage)).output();
    let output = output.expect("kubectl runs");
    assert!(output.status.success(), "{stage}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn every_manifest_is_valid() {
    let mut files = Vec::new();
    manifests("istio", &mut files);
    assert!(files.len() >= 15, "{files:?}");
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    assert_eq!(schemas(&files, ""), [""; 0]);
    for path in files {
        let text = file(path);
        let report = check(&text, Path::new(path));
        assert!(report.findings.is_empty(), "{path}: {:?}", report.findings);
        let plugin = text.contains("registry.example/driftlock");
        assert_eq!(plugin, !report.checked.is_empty(), "{path}: its plugin configuration is looked at");
    }
}

#[test]
fn every_stage_of_the_roll_out_changes_actions_and_nothing_else() {
    let mut stages = Vec::new();
    for entry in std::fs::read_dir(workspace().join("istio/rollout")).expect("a folder") {
        stages.push(format!("istio/rollout/{}", entry.expect("an entry").file_name().to_string_lossy()));
    }
    stages.sort();
    assert_eq!(stages.len(), 5, "{stages:?}");
    let mut different = std::collections::BTreeSet::new();
    let mut alike = std::collections::BTreeSet::new();
    for stage in &stages {
        let text = rendered(stage);
        assert_eq!(schemas(&["-"], &text), [""; 0], "{stage}");
        assert_eq!(rules(&text), [""; 0], "{stage}");
        let (before, rest) = text.split_once("      actions:\n").expect("actions");
        let (actions, after) = rest.split_once("      alpha:").expect("alpha");
        different.insert(actions.to_owned());
        let unlabelled: Vec<_> = before.lines().filter(|line| !line.contains("label")).collect();
        let unlabelled =
            unlabelled.join("\n").replace(&format!("\n    driftlock/stage: {}", &stage[14..]), "");
        alike.insert(format!("{unlabelled}{after}"));
    }
    assert_eq!(different.len(), stages.len());
    assert_eq!(alike.len(), 1, "{alike:#?}");
}

#[test]
fn broken_manifests_are_refused_by_whom_they_say() {
    let mut files = Vec::new();
    manifests("tests/manifests/refused", &mut files);
    let names: Vec<&str> = files.iter().map(String::as_str).collect();
    let by_schema = schemas(&names, "");
    let mut counts = [0, 0];
    for path in &files {
        let text = file(path);
        let schema = by_schema.iter().any(|line| line.starts_with(&format!("{path}: ")));
        match text.lines().next() {
            Some("# Refused by: schema") => {
                assert!(schema, "{path} passes the schema\n{by_schema:#?}");
                counts[0] += 1;
            }
            Some("# Refused by: rules") => {
                let refused = rules(&text);
                assert_eq!(refused.len(), 1, "{path}: {refused:?}");
                assert!(
                    refused[0].split(':').next().is_some_and(|line| line.parse::<u32>().is_ok()),
                    "{path}"
                );
                counts[1] += 1;
            }
            other => panic!("{path} does not say who refuses it: {other:?}"),
        }
    }
    assert!(counts[0] >= 6 && counts[1] >= 9, "{counts:?}");
}

#[test]
fn the_mesh_logs_what_envoy_logs() {
    let fields = |text: String| -> Vec<String> {
        let lines = text.lines().map(str::trim).filter(|line| line.contains(": \"%"));
        lines.map(str::to_owned).collect()
    };
    let mesh = fields(file("istio/istiod-values.yaml"));
    assert!(mesh.len() > 8, "{mesh:?}");
    assert_eq!(mesh, fields(file("envoy/llm-gateway.yaml")));
    let tags = |text: String| -> Vec<String> {
        text.lines().map(str::trim).filter(|line| line.contains("tag_name")).map(str::to_owned).collect()
    };
    assert_eq!(tags(file("istio/stats-tags.yaml")), tags(file("envoy/llm-gateway.yaml")));
}
