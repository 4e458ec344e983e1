//! The `driftlock` command.
fn main() {}
