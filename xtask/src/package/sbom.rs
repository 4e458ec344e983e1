//! What went into an artefact: CycloneDX 1.5, from Cargo's own resolution for that package and target.
//!
//! `cargo tree` says what is linked (no dev- and build-dependencies) and `Cargo.lock` the checksums. Left out on
//! purpose: C sources inside crates (zstd, OpenZL), which are part of their crate here, and a serial number, which
//! would have to be random.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::digest;
use super::json::Json;
use crate::command::{Failure, Workspace, output};

/// One crate of the tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Crate {
    licence: String,
    needs: BTreeSet<String>,
}

/// The document about `artefact`, which was linked from `package` for `target`.
pub(super) fn document(
    workspace: &Workspace,
    package: &str,
    target: &str,
    artefact: &Path,
    lock: &Path,
) -> Result<Json, Failure> {
    let tree = output(&mut workspace.cargo([
        "tree",
        "--package",
        package,
        "--target",
        target,
        "--edges",
        "normal",
        "--prefix",
        "depth",
        "--format",
        "|{p}|{l}",
    ]))?;
    let (root, crates) =
        parse(&tree).ok_or_else(|| Failure::new(format!("cargo tree says nothing of {package}")))?;
    let lock = fs::read_to_string(lock).map_err(|error| Failure::file("read", lock, &error))?;
    let checksums = checksums(&lock);
    let hash =
        |hex: &str| Json::List(vec![Json::object([("alg", "SHA-256".into()), ("content", hex.into())])]);
    let component = |name_and_version: &str, kind: &str, licence: &str| {
        let (name, version) = name_and_version.split_once('@').unwrap_or((name_and_version, ""));
        let mut fields = vec![
            ("type".to_owned(), kind.into()),
            ("bom-ref".to_owned(), name_and_version.into()),
            ("name".to_owned(), name.into()),
            ("version".to_owned(), version.into()),
        ];
        if let Some(checksum) = checksums.get(name_and_version) {
            fields.push(("hashes".to_owned(), hash(checksum)));
        }
        if !licence.is_empty() {
            // Cargo's old separator, which SPDX does not know.
            let licence = licence.split('/').map(str::trim).collect::<Vec<_>>().join(" OR ");
            let expression = Json::object([("expression", licence.into())]);
            fields.push(("licenses".to_owned(), Json::List(vec![expression])));
        }
        fields.push(("purl".to_owned(), format!("pkg:cargo/{name}@{version}").into()));
        fields
    };
    let licence = |name: &String| crates.get(name).map(|it| it.licence.clone()).unwrap_or_default();
    let mut subject = component(&root, "application", &licence(&root));
    subject.push(("hashes".to_owned(), hash(&digest(artefact)?)));
    let components = crates.iter().filter(|(name, _)| **name != root);
    let components = components.map(|(name, it)| Json::Object(component(name, "library", &it.licence)));
    let dependencies = crates.iter().map(|(name, it)| {
        let needs = it.needs.iter().map(|name| name.as_str().into()).collect();
        Json::object([("ref", name.as_str().into()), ("dependsOn", Json::List(needs))])
    });
    Ok(Json::object([
        ("bomFormat", "CycloneDX".into()),
        ("specVersion", "1.5".into()),
        ("version", Json::Number(1)),
        ("metadata", Json::object([("component", Json::Object(subject))])),
        ("components", Json::List(components.collect())),
        ("dependencies", Json::List(dependencies.collect())),
    ]))
}

/// The root and all crates of `cargo tree --prefix depth --format '|{p}|{l}'`. A crate that comes again is marked
/// `(*)` and has its dependencies where it came first.
fn parse(tree: &str) -> Option<(String, BTreeMap<String, Crate>)> {
    let mut crates: BTreeMap<String, Crate> = BTreeMap::new();
    let mut above: Vec<String> = Vec::new();
    let mut root = None;
    for line in tree.lines() {
        let mut parts = line.splitn(3, '|');
        let depth: usize = parts.next()?.parse().ok()?;
        let mut words = parts.next()?.split(' ');
        let name = format!("{}@{}", words.next()?, words.next()?.trim_start_matches('v'));
        let licence = parts.next().unwrap_or_default().trim_end_matches(" (*)").trim();
        above.truncate(depth);
        if let Some(parent) = above.last().and_then(|parent| crates.get_mut(parent)) {
            parent.needs.insert(name.clone());
        }
        crates.entry(name.clone()).or_default().licence = licence.to_owned();
        root.get_or_insert_with(|| name.clone());
        above.push(name);
    }
    Some((root?, crates))
}

/// `name@version` to checksum, of all that comes from a registry.
fn checksums(lock: &str) -> BTreeMap<String, String> {
    let value = |block: &str, field: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(" = \""))?;
        line.strip_suffix('"').map(str::to_owned)
    };
    lock.split("[[package]]")
        .filter_map(|block| {
            let name = format!("{}@{}", value(block, "name")?, value(block, "version")?);
            Some((name, value(block, "checksum")?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_becomes_crates_and_their_dependencies() {
        let tree = "0|app v0.1.0 (/somewhere)|Apache-2.0\n1|a v1.2.3|MIT/Apache-2.0\n2|b v2.0.0|MIT\n1|c v3.0.0 (proc-macro)|MIT\n2|a v1.2.3|MIT/Apache-2.0 (*)\n";
        let (root, crates) = parse(tree).unwrap();
        assert_eq!(root, "app@0.1.0");
        assert_eq!(crates.len(), 4);
        let needs = |name: &str| crates[name].needs.iter().map(String::as_str).collect::<Vec<_>>();
        assert_eq!(needs("app@0.1.0"), ["a@1.2.3", "c@3.0.0"]);
        assert_eq!(needs("a@1.2.3"), ["b@2.0.0"]);
        assert_eq!(needs("c@3.0.0"), ["a@1.2.3"]);
        assert_eq!(crates["a@1.2.3"].licence, "MIT/Apache-2.0");
    }

    #[test]
    fn checksums_are_those_of_the_lock_file() {
        let lock = "[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nchecksum = \"ff\"\n\n[[package]]\nname = \"own\"\nversion = \"0.1.0\"\n";
        let known = checksums(lock);
        assert_eq!(known.get("a@1.0.0").map(String::as_str), Some("ff"));
        assert_eq!(known.len(), 1);
    }
}
