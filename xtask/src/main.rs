//! Developer tasks: `cargo xtask build | clients | demo | envoy | test | tidy`.
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
    if task != "demo"
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
        "test" => test::test(&workspace),
        "tidy" => tidy::tidy(&workspace),
        "help" | "-h" | "--help" => {
            print!("{USAGE}");
            Ok(())
        }
        unknown => Err(Failure::new(format!("there is no task {unknown:?}\n\n{USAGE}"))),
    }
}
