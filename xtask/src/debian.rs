//! Debian packages that a task cannot do without, installed after saying so.

use std::process::Command;

use crate::command::{Failure, run, succeeds};

/// Installs packages with apt-get, as root or through a `sudo` that asks nothing.
pub(crate) fn install(packages: &[&str], why: &str) -> Result<(), Failure> {
    let names = packages.join(" ");
    let by_hand = || Failure::new(format!("{why}. Install it and try again: apt-get install {names}"));
    if !succeeds(Command::new("apt-get").arg("--version")) {
        return Err(by_hand());
    }
    let root = crate::command::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0");
    let sudo = !root && succeeds(Command::new("sudo").args(["-n", "true"]));
    if !root && !sudo {
        return Err(by_hand());
    }
    eprintln!("   {why}: installing the Debian packages {names}");
    let apt_get = |arguments: &[&str]| {
        let mut command = if sudo { Command::new("sudo") } else { Command::new("apt-get") };
        if sudo {
            command.args(["-n", "apt-get"]);
        }
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    run(&mut apt_get(&["update", "-qq"]))?;
    run(apt_get(&["install", "-y", "-qq", "--no-install-recommends"]).args(packages))
}
