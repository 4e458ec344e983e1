//! What can keep a gateway from starting or stopping, each with what to do next.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::train::ConfigurationError;

/// Why the gateway did not start or did not stop as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// The upstream is not a URI this gateway can speak to.
    #[error(
        "upstream {uri:?} is not usable: {reason}. Give a URI without a path, such as http://127.0.0.1:8000"
    )]
    Upstream {
        /// The URI as given.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The configuration file is not usable.
    #[error("{}{}: {problem}", place(path, *line, *column), in_field(field))]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// Line of the value, from 1; 0 when the file as a whole is meant.
        line: u64,
        /// Column of the value, from 1.
        column: u64,
        /// Path of the field, such as `routes[0].upstream`; empty when the file as a whole is meant.
        field: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A reload would change what only a start can.
    #[error("{setting} cannot change while the gateway runs; restart it, or put the old value back")]
    NeedsRestart {
        /// Name of the setting.
        setting: &'static str,
    },
    /// An address could not be bound.
    #[error(
        "cannot listen on {address} ({role}): {source}. Choose another address, or port 0 for any free one"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// "traffic" or "admin".
        role: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {path}: {source}. Check the path and its permissions")]
    File {
        /// "read the filter", "open the access log", …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The plugin configuration could not be put together.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// A filter did not load or start.
    #[error("the filter {name} does not start: {reason}")]
    Filter {
        /// Its name.
        name: String,
        /// What went wrong.
        reason: String,
    },
    /// A setting is outside its range.
    #[error("{setting} is {value}: {hint}")]
    Setting {
        /// Name of the setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What it has to be.
        hint: &'static str,
    },
    /// The async runtime or the signal handlers could not be set up.
    #[error("cannot set up the runtime: {0}. Check the process's limits (ulimit -n, ulimit -u)")]
    Runtime(#[source] io::Error),
}

fn place(path: &std::path::Path, line: u64, column: u64) -> String {
    if line == 0 { path.display().to_string() } else { format!("{}:{line}:{column}", path.display()) }
}

fn in_field(field: &str) -> String {
    if field.is_empty() { String::new() } else { format!(": {field}") }
}
