//! What a newcomer runs first, run as a newcomer would: the LLM gateway example, and the commands in
//! `envoy/README.md`.
//!
//! Cost: the example some 10 s, the README some 30 s, of which 1,000 requests by curl are most. The README's commands
//! use fixed ports (8000, 9901, 10000), since a reader types them so.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::build::Dist;
use crate::command::{Failure, Workspace, run};
use crate::{clients, debian, envoy};

/// The README's section whose `sh` blocks are run.
const SECTION: &str = "## From nothing to a flagged request";
/// What the last of them has to show.
const FLAGGED: &str = "x-driftlock-request: anomalous";
/// The README's promise.
const PROMISED: Duration = Duration::from_secs(300);

/// `examples/llm-gateway/run.py` with the products given.
pub(crate) fn run_gateway(workspace: &Workspace, dist: &Dist) -> Result<(), Failure> {
    let python = clients::install(workspace)?;
    let envoy = envoy::install(workspace)?;
    run(Command::new(python)
        .arg(workspace.root.join("examples/llm-gateway/run.py"))
        .arg("--envoy")
        .arg(envoy)
        .arg("--filter")
        .arg(&dist.filter))
}

/// Runs the `sh` blocks of the README's first section in the workspace's root, as one shell session.
pub(crate) fn follow_readme(workspace: &Workspace) -> Result<(), Failure> {
    if !crate::command::succeeds(Command::new("curl").arg("--version")) {
        debian::install(&["curl"], "curl, which the README uses, is missing")?;
    }
    let path = workspace.root.join("envoy/README.md");
    let text = fs::read_to_string(&path).map_err(|error| Failure::file("read", &path, &error))?;
    let blocks = blocks(&text);
    if blocks.is_empty() {
        return Err(Failure::new(format!("envoy/README.md has no sh block under {SECTION:?}")));
    }
    // What a reader would stop with Ctrl-C ends with the shell.
    let session = format!("set -eu\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{}", blocks.concat());
    let started = Instant::now();
    let output = Command::new("bash")
        .args(["-c", &session])
        .current_dir(&workspace.root)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::new(format!("cannot run bash: {error}")))?;
    let took = started.elapsed();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{}", said.trim_end());
    if !output.status.success() {
        return Err(Failure::new(format!("the README's commands ended with {}", output.status)));
    }
    if !said.contains(FLAGGED) {
        return Err(Failure::new(format!("no answer to the README's commands has {FLAGGED:?}")));
    }
    if took > PROMISED {
        return Err(Failure::new(format!("the README's commands took {} s", took.as_secs())));
    }
    println!("   a flagged request after {:.1} s", took.as_secs_f64());
    Ok(())
}

/// The contents of the section's fenced `sh` blocks.
fn blocks(text: &str) -> Vec<String> {
    let section = text.split_once(SECTION).map_or("", |(_, rest)| rest);
    let section = section.split("\n## ").next().unwrap_or_default();
    let fenced = section.split("```sh\n").skip(1);
    fenced.filter_map(|block| block.split_once("```").map(|(code, _)| code.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sections_own_shell_blocks_are_run() {
        let text = format!(
            "```sh\nno\n```\n{SECTION}\n```sh\none\n```\n```\nnot sh\n```\n```sh\ntwo\n```\n## Next\n```sh\nno\n```\n"
        );
        assert_eq!(blocks(&text), ["one\n", "two\n"]);
        assert!(blocks("nothing").is_empty());
    }
}
