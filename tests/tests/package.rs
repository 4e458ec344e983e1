//! What `cargo xtask package` hands out: image layouts that an independent tool reads and that yield the filter by
//! the rules of Istio's fetcher, SBOMs by CycloneDX's schema, a provenance statement and checksums that are true.
//!
//! That two builds give the same bytes and that the optimised filter gives the golden verdicts are steps of
//! `cargo xtask test`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use driftlock_tests::{attach, workspace};
use serde_json::Value;

fn packed() -> PathBuf {
    let folder =
        std::env::var_os("DRIFTLOCK_PACKAGE").map_or_else(|| workspace().join("dist/package"), PathBuf::from);
    assert!(folder.is_dir(), "nothing at {}: run `cargo xtask package`", folder.display());
    std::path::absolute(folder).expect("a path")
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .current_dir(packed())
        .output()
        .unwrap_or_else(|error| panic!("{program}, which `cargo xtask manifests` installs: {error}"))
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(packed().join(path)).expect(path)).expect(path)
}

fn sha256(path: &Path) -> String {
    let output = run("sha256sum", &[&path.display().to_string()]);
    said(&output).split(' ').next().expect("a digest").to_owned()
}

/// Digest, then media type, of each layer of a layout as skopeo copies it out.
fn layers(layout: &str, into: &Path) -> Vec<(String, String)> {
    let target = format!("dir:{}", into.display());
    said(&run("skopeo", &["--insecure-policy", "copy", &format!("oci:{layout}:0.1.0"), &target]));
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(into.join("manifest.json")).unwrap()).unwrap();
    let layers = manifest["layers"].as_array().expect("layers");
    layers
        .iter()
        .map(|layer| {
            let of = |name: &str| layer[name].as_str().expect("text").to_owned();
            (of("digest").trim_start_matches("sha256:").to_owned(), of("mediaType"))
        })
        .collect()
}

#[test]
fn the_compat_image_yields_the_filter_as_istio_fetches_it() {
    let scratch = tempfile::tempdir().unwrap();
    let layers = layers("filter-compat", scratch.path());
    let (digest, kind) = layers.last().expect("a layer");
    assert_eq!(kind, "application/vnd.oci.image.layer.v1.tar+gzip");
    let archive = scratch.path().join(digest);
    let listed = said(&run("tar", &["--list", "--gzip", "--file", &archive.display().to_string()]));
    assert_eq!(listed, "plugin.wasm\n");
    let taken =
        ["--extract", "--gzip", "--to-stdout", "--file", &archive.display().to_string(), "plugin.wasm"];
    let module = run("tar", &taken).stdout;
    assert!(module == std::fs::read(packed().join("driftlock_filter.wasm")).unwrap());
    let config = said(&run("skopeo", &["inspect", "--config", "oci:filter-compat:0.1.0"]));
    let config: Value = serde_json::from_str(&config).unwrap();
    let unpacked = run("gzip", &["--decompress", "--stdout", &archive.display().to_string()]).stdout;
    let tar = scratch.path().join("layer.tar");
    std::fs::write(&tar, unpacked).unwrap();
    assert_eq!(config["rootfs"]["diff_ids"][0], format!("sha256:{}", sha256(&tar)));
}

#[test]
fn the_oci_artifact_has_the_two_layers_without_which_istio_refuses_it() {
    let scratch = tempfile::tempdir().unwrap();
    let layers = layers("filter-oci", scratch.path());
    let kinds: Vec<&str> = layers.iter().map(|(_, kind)| kind.as_str()).collect();
    let module = "application/vnd.module.wasm.content.layer.v1+wasm";
    assert_eq!(kinds, ["application/vnd.module.wasm.config.v1+json", module]);
    let filter = packed().join("driftlock_filter.wasm");
    assert_eq!(layers[1].0, sha256(&filter));
    assert!(std::fs::read(scratch.path().join(&layers[1].0)).unwrap() == std::fs::read(filter).unwrap());
}

#[test]
fn checksums_and_provenance_are_those_of_the_files() {
    said(&run("sha256sum", &["--check", "--strict", "--quiet", "SHA256SUMS"]));
    let listed = std::fs::read_to_string(packed().join("SHA256SUMS")).unwrap().lines().count();
    assert_eq!(said(&run("find", &[".", "-type", "f"])).lines().count(), listed + 1, "all but itself");

    let statement = json("provenance.json");
    assert_eq!(statement["_type"], "https://in-toto.io/Statement/v1");
    assert_eq!(statement["predicateType"], "https://slsa.dev/provenance/v1");
    let subjects = statement["subject"].as_array().unwrap();
    assert_eq!(subjects.len(), 2);
    for subject in subjects {
        let file = packed().join(subject["name"].as_str().unwrap());
        assert_eq!(subject["digest"]["sha256"], sha256(&file), "{subject}");
    }
    let definition = &statement["predicate"]["buildDefinition"];
    let lock = std::path::absolute(workspace().join("Cargo.lock")).unwrap();
    assert_eq!(definition["resolvedDependencies"][0]["digest"]["sha256"], sha256(&lock));
    for required in ["buildType", "externalParameters"] {
        assert!(!definition[required].is_null(), "{required}");
    }
    assert!(statement["predicate"]["runDetails"]["builder"]["id"].is_string());
}

#[test]
fn the_sboms_are_valid_and_name_what_is_linked() {
    let validators = std::env::var_os("DRIFTLOCK_MANIFESTS")
        .map_or_else(|| workspace().join("target/manifests"), PathBuf::from);
    let python = std::path::absolute(validators).unwrap().join("bin/python3");
    let script = std::path::absolute(workspace().join("tests/manifests/sbom.py")).unwrap();
    let [python, script] = [python, script].map(|path| path.display().to_string());
    said(&run(&python, &[&script, "filter.cdx.json", "driftlock.cdx.json"]));
    for (file, linked, absent) in [
        ("filter.cdx.json", ["driftlock-inspect", "driftlock-engine"], "wasmtime"),
        ("driftlock.cdx.json", ["wasmtime", "hyper"], "proptest"),
    ] {
        let document = json(file);
        let components = document["components"].as_array().unwrap();
        let named = |name: &str| components.iter().any(|component| component["name"] == name);
        assert!(linked.iter().all(|name| named(name)) && !named(absent), "{file}");
        for component in components {
            let own = component["name"].as_str().unwrap().starts_with("driftlock-");
            let known = component["hashes"].is_array() && component["licenses"].is_array();
            assert!(own || known, "{file}: {component}");
        }
    }
    let filter = json("filter.cdx.json")["metadata"]["component"]["hashes"][0]["content"].clone();
    assert_eq!(filter, sha256(&packed().join("driftlock_filter.wasm")));
}

#[test]
fn the_image_of_the_binary_runs_as_nobody_from_a_build_of_its_own() {
    let text = attach::file("Dockerfile");
    let instructions: Vec<&str> = text.lines().filter(|line| !line.starts_with(['#', ' '])).collect();
    let stages: Vec<&&str> = instructions.iter().filter(|line| line.starts_with("FROM ")).collect();
    assert!(stages.len() == 2 && stages[0].ends_with(" AS build"), "{stages:?}");
    assert!(stages.iter().all(|stage| !stage.contains(":latest") && stage.contains(':')), "{stages:?}");
    let user = instructions.iter().rfind(|line| line.starts_with("USER ")).expect("a user");
    let identity = user.trim_start_matches("USER ").split(':').next().unwrap();
    assert!(
        identity.parse::<u32>().is_ok_and(|id| id > 0),
        "{user}: Kubernetes' runAsNonRoot needs a number"
    );
    let toolchain = attach::file("rust-toolchain.toml");
    let channel = toolchain.lines().find_map(|line| line.strip_prefix("channel = \"")).expect("a channel");
    assert!(stages[0].contains(&format!("rust:{}", channel.trim_end_matches('"'))), "{}", stages[0]);
}
