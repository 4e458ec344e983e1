//! Rules that the compiler does not know: who may import whom, and what no file may contain.
//!
//! The arrows between the rooms are those of `ARCHITECTURE.md`. The lists below name the direct
//! dependencies that each room may have; a new one is added here together with the reason it is
//! needed, which makes a dependency a decision. Cargo's own resolution (`cargo tree`) is read, not
//! the manifests, so a renamed or an inherited dependency does not slip through.

use std::fs;
use std::path::{Path, PathBuf};

use crate::build::GUEST;
use crate::command::{Failure, Workspace, output};

/// What a package may depend on.
struct Rule {
    package: &'static str,
    /// The direct dependencies that are allowed, where not all are.
    only: Option<&'static [&'static str]>,
    /// Packages that must not be in its whole tree.
    never: &'static [&'static str],
    why: &'static str,
}

/// Runtimes and servers: nothing that inspects bytes may need one.
const RUNTIMES: &[&str] = &["tokio", "hyper", "axum", "wasmtime", "clap", "tracing", "anyhow"];

const RULES: &[Rule] = &[
    Rule {
        package: "driftlock-engine",
        only: Some(&[
            "libm",
            "memchr",
            "wide",
            "serde",
            "sha2",
            "thiserror",
            "rand_chacha",
            "rand_core",
            "lz4_flex",
            "miniz_oxide",
            "zstd-safe",
            "driftlock-openzl",
        ]),
        never: RUNTIMES,
        why: "the engine is no_std: core, alloc, codecs and arithmetic",
    },
    Rule {
        package: "driftlock-openzl",
        only: Some(&["openzl-sys", "thiserror"]),
        never: RUNTIMES,
        why: "it holds the unsafe of one binding and nothing else",
    },
    Rule {
        package: "driftlock-inspect",
        only: Some(&[
            "driftlock-engine",
            "base64",
            "serde",
            "serde_json",
            "serde_path_to_error",
            "thiserror",
            "miniz_oxide",
            "memchr",
            "ruzstd",
            "brotli-decompressor",
        ]),
        never: RUNTIMES,
        why: "inspect is no_std: the engine and small parsers",
    },
    Rule {
        package: "driftlock-filter",
        only: Some(&["driftlock-inspect", "driftlock-engine"]),
        never: RUNTIMES,
        why: "the filter only joins host calls to inspect",
    },
    Rule {
        package: "driftlock-host",
        only: None,
        never: &["driftlock-filter", "proxy-wasm"],
        why: "the host loads the filter's .wasm and never links it",
    },
    Rule {
        package: "xtask",
        only: Some(&[]),
        never: &[],
        why: "xtask starts fast because it has no dependencies",
    },
];

/// Checks all rules and reports every breach, not only the first.
pub(crate) fn tidy(workspace: &Workspace) -> Result<(), Failure> {
    let mut breaches = Vec::new();
    for rule in RULES {
        check_arrows(workspace, rule, &mut breaches)?;
    }
    let mut files = Vec::new();
    list(&workspace.root, &mut files)?;
    let words = forbidden_words(workspace);
    for file in &files {
        check_file(workspace, file, &words, &mut breaches)?;
    }
    // A direct dependency may break both lists.
    breaches.dedup();
    if breaches.is_empty() {
        eprintln!("   {} packages and {} files keep the rules", RULES.len(), files.len());
        return Ok(());
    }
    Err(Failure::new(format!("{} breaches of the project's rules:\n{}", breaches.len(), breaches.join("\n"))))
}

fn check_arrows(workspace: &Workspace, rule: &Rule, breaches: &mut Vec<String>) -> Result<(), Failure> {
    let mut broken = |name: &str| breaches.push(format!("{} depends on {name}: {}", rule.package, rule.why));
    for name in dependencies(workspace, rule.package, &["--depth", "1"])? {
        if rule.only.is_some_and(|only| !only.contains(&name.as_str())) {
            broken(&name);
        }
    }
    if !rule.never.is_empty() {
        for name in dependencies(workspace, rule.package, &[])? {
            if rule.never.contains(&name.as_str()) {
                broken(&name);
            }
        }
    }
    Ok(())
}

/// Names of a package's dependencies without those of its tests, for the target it is built for.
fn dependencies(workspace: &Workspace, package: &str, depth: &[&str]) -> Result<Vec<String>, Failure> {
    let mut tree =
        workspace.cargo(["tree", "--quiet", "--package", package, "--edges", "normal", "--prefix", "none"]);
    tree.args(depth);
    if package == "driftlock-filter" {
        tree.args(["--target", GUEST]);
    }
    let mut names: Vec<String> = output(&mut tree)?
        .lines()
        // The first line is the package itself.
        .skip(1)
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect();
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// Text that no file may hold, with the reason. Put together here so that this file passes too.
fn forbidden_words(workspace: &Workspace) -> Vec<(String, &'static str)> {
    let machine = "a path of one machine";
    let registry = "a package registry's host name; the package's name is enough";
    let mut words = vec![
        (["crates", ".io"].concat(), registry),
        (["pypi", ".org"].concat(), registry),
        (["npmjs", ".org"].concat(), registry),
        (["TO", "DO"].concat(), "unfinished work; finish it or open an issue"),
        (["FIX", "ME"].concat(), "unfinished work; finish it or open an issue"),
    ];
    // The folders of whoever runs this; a path as short as `/src` would match by chance.
    let folders = [Some(workspace.root.clone()), folder_of("CARGO_HOME"), folder_of("RUSTUP_HOME")];
    for folder in folders.into_iter().flatten().filter(|folder| folder.components().count() > 2) {
        words.push((folder.display().to_string(), machine));
    }
    words
}

fn folder_of(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from)
}

fn check_file(
    workspace: &Workspace,
    file: &Path,
    words: &[(String, &'static str)],
    breaches: &mut Vec<String>,
) -> Result<(), Failure> {
    let shown = file.strip_prefix(&workspace.root).unwrap_or(file).display();
    let bytes = fs::read(file).map_err(|error| Failure::file("read", file, &error))?;
    let text = String::from_utf8_lossy(&bytes);
    if file.extension().is_some_and(|extension| extension == "rs") && !text.starts_with("//!") {
        breaches.push(format!(
            "{shown}:1: the first line is not `//!`; say what the module does, why, at what cost"
        ));
    }
    for (number, line) in text.lines().enumerate() {
        for (word, why) in words {
            if line.contains(word.as_str()) {
                breaches.push(format!("{shown}:{}: {word:?} is {why}", number + 1));
            }
        }
    }
    Ok(())
}

/// All text files of the project, but not what is built or what Cargo writes.
fn list(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Failure> {
    const TEXT: [&str; 11] = ["rs", "toml", "md", "yaml", "yml", "json", "txt", "html", "css", "js", "sh"];
    let entries = fs::read_dir(folder).map_err(|error| Failure::file("read", folder, &error))?;
    for entry in entries {
        let path = entry.map_err(|error| Failure::file("read", folder, &error))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            if !["target", "dist", ".git", "node_modules"].contains(&&*name) {
                list(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| TEXT.iter().any(|text| extension == *text)) {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Breaches that a file with this name and text has.
    fn breaches(name: &str, text: &str) -> Vec<String> {
        let root = std::env::temp_dir().join(format!("driftlock-tidy-{}-{name}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        let workspace = Workspace { target: root.join("target"), root: root.clone() };
        fs::write(root.join(name), text).unwrap();
        let mut files = Vec::new();
        list(&root, &mut files).unwrap();
        let mut breaches = Vec::new();
        for file in &files {
            check_file(&workspace, file, &forbidden_words(&workspace), &mut breaches).unwrap();
        }
        fs::remove_dir_all(&root).unwrap();
        breaches
    }

    #[test]
    fn a_module_says_what_it_does_in_its_first_line() {
        assert_eq!(breaches("said.rs", "//! Says it.\nfn f() {}\n"), Vec::<String>::new());
        let found = breaches("unsaid.rs", "fn f() {}\n");
        assert!(found.len() == 1 && found[0].starts_with("unsaid.rs:1:"), "{found:?}");
    }

    #[test]
    fn forbidden_text_is_found_with_its_line() {
        let unfinished = ["# fine\n# TO", "DO later\n"].concat();
        let found = breaches("a.toml", &unfinished);
        assert!(found.len() == 1 && found[0].starts_with("a.toml:2:"), "{found:?}");
        let registry = ["see https://crates", ".io\n"].concat();
        assert_eq!(breaches("b.md", &registry).len(), 1);
        assert_eq!(breaches("c.bin", &registry).len(), 0, "binary files are not read");
        let here = std::env::temp_dir().join(format!("driftlock-tidy-{}-d.md", std::process::id()));
        assert_eq!(
            breaches("d.md", &format!("in {}\n", here.display())).len(),
            1,
            "the workspace's own path"
        );
    }
}
