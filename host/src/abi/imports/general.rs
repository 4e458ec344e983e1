//! Logging, contexts, the end of a plugin, foreign functions.

use super::super::callout::for_each_field;
use super::super::host::Host;
use super::super::log::LogLevel;
use super::super::memory::{Outcome, allocate, bytes, view, write_u32};
use super::super::status::Status;
use super::{Ctx, Range};

/// Longest log message passed on, in bytes; what exceeds it is cut.
const LOG_MAX_BYTES: u32 = 1024 * 1024;
/// Most properties that one VM declares.
const DECLARED_MAX_COUNT: usize = 1024;

pub(super) fn log(c: &mut Ctx<'_>, level: u32, ptr: u32, len: u32) -> Outcome {
    let level = LogLevel::from_abi(level).ok_or(Status::BadArgument)?;
    let (memory, host) = view(c)?;
    let message = bytes(memory, ptr, len)?;
    host.log(level, bytes(message, 0, len.min(LOG_MAX_BYTES))?);
    Ok(())
}

/// 0 goes back to the context that was called.
pub(super) fn set_effective_context(host: &mut Host, id: u32) -> Outcome {
    if id != 0 && id != host.root && !host.streams.contains_key(&id) {
        return Err(Status::BadArgument.into());
    }
    host.effective = id;
    Ok(())
}

pub(super) fn done(host: &mut Host) -> Outcome {
    if !std::mem::take(&mut host.root_done_pending) {
        return Err(Status::NotFound.into());
    }
    host.root_done = true;
    Ok(())
}

/// As in the C++ host, the result's address and size are written whatever the status.
pub(super) fn call_foreign_function(c: &mut Ctx<'_>, name: Range, arguments: Range, out: Range) -> Outcome {
    let (memory, host) = view(c)?;
    let name = bytes(memory, name.0, name.1)?;
    let arguments = bytes(memory, arguments.0, arguments.1)?;
    let outcome = match (name, host.foreign_function(name)) {
        (_, Some(function)) => function(arguments),
        // Routes are looked up after the filters here, so there is nothing to clear.
        (b"clear_route_cache", None) => Ok(Vec::new()),
        (b"declare_property", None) => declare_property(host, arguments).map(|()| Vec::new()),
        (_, None) => return Err(Status::NotFound.into()),
    };
    let (status, result) = match outcome {
        Ok(result) => (None, result),
        Err(status) => (Some(status), Vec::new()),
    };
    let mut address = 0;
    if out.0 != 0 && !result.is_empty() {
        address = allocate(c, &result)?;
    }
    let (memory, _) = view(c)?;
    if out.0 != 0 {
        write_u32(memory, out.0, address)?;
    }
    if out.1 != 0 {
        write_u32(memory, out.1, u32::try_from(result.len()).map_err(|_| Status::InternalFailure)?)?;
    }
    status.map_or(Ok(()), |status| Err(status.into()))
}

/// Envoy's `declare_property`: the name (field 1 of its argument message) may be declared once. The
/// type and life span that it also carries change nothing here: a value is bytes, kept for its stream.
fn declare_property(host: &mut Host, arguments: &[u8]) -> Result<(), Status> {
    let mut name = Vec::new();
    for_each_field(arguments, |field, value| {
        if field == 1 {
            name = value?.to_vec();
        }
        Some(())
    })
    .ok_or(Status::BadArgument)?;
    if host.declared.len() >= DECLARED_MAX_COUNT || name.len() > 4096 {
        return Err(Status::InternalFailure);
    }
    if host.declared.insert(name) { Ok(()) } else { Err(Status::BadArgument) }
}
