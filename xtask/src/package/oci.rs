//! The filter as OCI image layouts (image-spec 1.0), in the two variants of the Wasm image specification.
//!
//! | variant | layers | taken by |
//! |---|---|---|
//! | compat | one, `…image.layer.v1.tar+gzip` with `plugin.wasm` in it; an ordinary image | Istio and Envoy Gateway, every registry and image tool |
//! | oci | two, `…module.wasm.content.layer.v1+wasm` (the module itself) and its description | Istio and Envoy Gateway; registries that take artifacts |
//!
//! Istio's fetcher (`pkg/wasm/imagefetcher.go`), and Envoy Gateway's, which is the same code: the last layer is
//! tried as compat first; an artifact is then refused unless it has exactly two layers. So an artifact with the
//! module as its single layer (CNCF's `application/vnd.wasm.config.v0+json`, what `oras push` makes of one file) is
//! refused by both, and is not made here.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::digest;
use super::json::Json;
use crate::command::{Failure, output};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DESCRIPTION: &str = "application/vnd.module.wasm.config.v1+json";

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    Compat,
    Oci,
}

/// Writes the layout into `folder`, tagged with the version.
pub(super) fn write(folder: &Path, variant: Variant, filter: &Path, version: &str) -> Result<(), Failure> {
    let layout = folder.join(match variant {
        Variant::Compat => "filter-compat",
        Variant::Oci => "filter-oci",
    });
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).map_err(|error| Failure::file("create", &blobs, &error))?;
    let manifest = match variant {
        Variant::Compat => compat(&blobs, filter)?,
        Variant::Oci => artifact(&blobs, filter)?,
    };
    let manifest = blob(
        &blobs,
        MANIFEST,
        manifest.to_string().as_bytes(),
        &[("org.opencontainers.image.ref.name", version)],
    )?;
    let index = Json::object([("schemaVersion", Json::Number(2)), ("manifests", Json::List(vec![manifest]))]);
    write_text(&layout.join("index.json"), &index.to_string())?;
    write_text(&layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
}

fn write_text(path: &Path, text: &str) -> Result<(), Failure> {
    super::write(path, text)
}

/// An image with one layer: a tar archive with `plugin.wasm`.
fn compat(blobs: &Path, filter: &Path) -> Result<Json, Failure> {
    let staged = blobs.join("staged");
    fs::create_dir_all(&staged).map_err(|error| Failure::file("create", &staged, &error))?;
    fs::copy(filter, staged.join("plugin.wasm")).map_err(|error| Failure::file("copy", filter, &error))?;
    let archive = staged.join("layer.tar");
    output(
        Command::new("tar")
            .args([
                "--format=ustar",
                "--sort=name",
                "--mtime=@0",
                "--owner=0",
                "--group=0",
                "--numeric-owner",
            ])
            .args(["--mode=0644", "--create", "--file"])
            .arg(&archive)
            .arg("--directory")
            .arg(&staged)
            .arg("plugin.wasm"),
    )?;
    let uncompressed = digest(&archive)?;
    output(Command::new("gzip").args(["--no-name", "--best", "--force"]).arg(&archive))?;
    let packed = staged.join("layer.tar.gz");
    let bytes = fs::read(&packed).map_err(|error| Failure::file("read", &packed, &error))?;
    fs::remove_dir_all(&staged).map_err(|error| Failure::file("remove", &staged, &error))?;
    let layer = blob(blobs, "application/vnd.oci.image.layer.v1.tar+gzip", &bytes, &[])?;
    let config = Json::object([
        ("architecture", "amd64".into()),
        ("os", "linux".into()),
        (
            "rootfs",
            Json::object([
                ("type", "layers".into()),
                ("diff_ids", Json::List(vec![format!("sha256:{uncompressed}").into()])),
            ]),
        ),
    ]);
    let config = blob(blobs, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes(), &[])?;
    Ok(manifest(config, vec![layer]))
}

/// An artifact with the module and its description as layers.
fn artifact(blobs: &Path, filter: &Path) -> Result<Json, Failure> {
    let description = Json::object([
        ("type", "envoy_proxy".into()),
        ("abiVersions", Json::List(vec!["v0.2.1".into()])),
        ("config", Json::object([("root_ids", Json::List(vec!["driftlock".into()]))])),
    ])
    .to_string();
    let module = fs::read(filter).map_err(|error| Failure::file("read", filter, &error))?;
    let title = "org.opencontainers.image.title";
    let config = blob(blobs, DESCRIPTION, description.as_bytes(), &[])?;
    let first = blob(blobs, DESCRIPTION, description.as_bytes(), &[(title, "runtime-config.json")])?;
    let content = "application/vnd.module.wasm.content.layer.v1+wasm";
    let second = blob(blobs, content, &module, &[(title, "driftlock_filter.wasm")])?;
    Ok(manifest(config, vec![first, second]))
}

fn manifest(config: Json, layers: Vec<Json>) -> Json {
    Json::object([
        ("schemaVersion", Json::Number(2)),
        ("mediaType", MANIFEST.into()),
        ("config", config),
        ("layers", Json::List(layers)),
    ])
}

/// Stores the bytes under their digest and describes them.
fn blob(blobs: &Path, media_type: &str, bytes: &[u8], annotations: &[(&str, &str)]) -> Result<Json, Failure> {
    let staged = blobs.join("staged-blob");
    fs::write(&staged, bytes).map_err(|error| Failure::file("write", &staged, &error))?;
    let hex = digest(&staged)?;
    let place = blobs.join(&hex);
    fs::rename(&staged, &place).map_err(|error| Failure::file("write", &place, &error))?;
    let mut fields = vec![
        ("mediaType".to_owned(), media_type.into()),
        ("digest".to_owned(), format!("sha256:{hex}").into()),
        ("size".to_owned(), Json::Number(bytes.len() as u64)),
    ];
    if !annotations.is_empty() {
        let named = annotations.iter().map(|(name, value)| ((*name).to_owned(), (*value).into()));
        fields.push(("annotations".to_owned(), Json::Object(named.collect())));
    }
    Ok(Json::Object(fields))
}
