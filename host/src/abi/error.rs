//! Why a module cannot be run, and how a run ended.
//!
//! One enum for the whole room, since a caller's answer is the same for each: fail open, fail closed
//! or start a fresh VM. Every message names what the operator can change. Statuses that go back to
//! the guest are not errors of the host; see [`Status`](super::Status).

use std::fmt::{self, Write as _};

/// Everything that can go wrong between the bytes of a module and a step of a stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AbiError {
    /// The bytes are not a module wasmtime can compile.
    #[error(
        "not a usable WebAssembly module: {message}; build the filter for wasm32-unknown-unknown or wasm32-wasip1"
    )]
    Compile {
        /// What the compiler said.
        message: String,
    },
    /// No `proxy_abi_version_*` export, so it is some other kind of module.
    #[error(
        "the module exports no proxy_abi_version_0_2_0 or proxy_abi_version_0_2_1: it is not a proxy-wasm filter, or its SDK is too old"
    )]
    NotProxyWasm,
    /// A proxy-wasm module of an ABI that this host does not speak.
    #[error(
        "the module speaks {found}; this host speaks proxy-wasm ABI 0.2.0 and 0.2.1: rebuild the filter with a current SDK"
    )]
    UnsupportedAbi {
        /// The version export that was found.
        found: String,
    },
    /// The module imports functions that no proxy-wasm host of these versions offers.
    #[error("the module imports what this host does not offer: {}", .names.join(", "))]
    UnknownImport {
        /// `module.name` of each.
        names: Vec<String>,
    },
    /// An export or import with the right name has the wrong type.
    #[error("{name} has the wrong type: {message}")]
    WrongType {
        /// The function.
        name: String,
        /// What was expected and found.
        message: String,
    },
    /// The module could not be instantiated (memory over the limit, a trap in its start function).
    #[error("cannot start the VM: {message}{log}")]
    Start {
        /// What went wrong.
        message: String,
        /// What the guest said last.
        log: LastWords,
    },
    /// `proxy_on_vm_start` or `proxy_on_configure` returned false.
    #[error("the filter refused its configuration in {callback}{log}")]
    ConfigurationRefused {
        /// Which of the two.
        callback: &'static str,
        /// The guest's last log lines at warn and above.
        log: LastWords,
    },
    /// The guest trapped; its VM is lost, other VMs are not.
    #[error("the filter crashed in {callback}: {message}{log}")]
    Trap {
        /// The guest function that was running.
        callback: &'static str,
        /// wasmtime's reason.
        message: String,
        /// The guest's last log lines at warn and above (a Rust panic writes its message there).
        log: LastWords,
    },
    /// The guest ran longer than it may; its VM is lost.
    #[error("the filter ran longer than {limit_ms} ms in {callback} and was stopped{log}")]
    Deadline {
        /// The guest function that was running.
        callback: &'static str,
        /// The limit, in milliseconds.
        limit_ms: u64,
        /// The guest's last log lines at warn and above.
        log: LastWords,
    },
    /// The guest used up its fuel; its VM is lost.
    #[error(
        "the filter used up its {fuel} units of fuel in {callback} and was stopped; raise Limits::callback_fuel if that is too few{log}"
    )]
    OutOfFuel {
        /// The guest function that was running.
        callback: &'static str,
        /// What it was given.
        fuel: u64,
        /// The guest's last log lines at warn and above.
        log: LastWords,
    },
    /// An earlier call crashed this VM.
    #[error("this VM is lost since it crashed; start a new one ({reason})")]
    Poisoned {
        /// The first error's text.
        reason: String,
    },
    /// The stream was never created or is over.
    #[error("stream {id} does not exist or is over")]
    UnknownStream {
        /// The context id.
        id: u32,
    },
    /// An answer arrived for a call that is not outstanding.
    #[error("call {id} is not outstanding: it was answered, or the filter cancelled it")]
    UnknownCall {
        /// The call id.
        id: u32,
    },
    /// A message part arrived out of order, for example a body before its headers.
    #[error("{part} came out of order: {rule}")]
    OutOfOrder {
        /// The part.
        part: &'static str,
        /// What the caller must do.
        rule: &'static str,
    },
}

/// The guest's most recent log lines at warn and above, oldest first; empty when it said nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LastWords(pub Vec<String>);

impl fmt::Display for LastWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        f.write_str("; it last said: ")?;
        for (index, line) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(" | ")?;
            }
            for c in line.chars() {
                f.write_char(if c == '\n' { ' ' } else { c })?;
            }
        }
        Ok(())
    }
}
