//! The guest's linear memory, every access checked.
//!
//! A guest's pointers are only numbers: each one is checked against the memory's present size, a
//! range that does not fit gives `InvalidMemoryAccess`, and nothing is kept across a call into the
//! guest (its allocator may grow the memory). Safe code throughout; wasmtime hands out the memory as
//! a slice.

use std::sync::Arc;

use wasmtime::{Caller, Extern};

use super::host::Host;
use super::status::Status;

/// Why a host call ends before its end: a status for the guest, or a trap from inside the guest.
pub(super) enum Stop {
    Status(Status),
    Trap(wasmtime::Error),
}

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl From<wasmtime::Error> for Stop {
    fn from(trap: wasmtime::Error) -> Self {
        Self::Trap(trap)
    }
}

/// The result of a host call's body.
pub(super) type Outcome = Result<(), Stop>;

/// What the guest gets for an outcome.
pub(super) fn finish(outcome: Outcome) -> wasmtime::Result<u32> {
    match outcome {
        Ok(()) => Ok(Status::Ok as u32),
        Err(Stop::Status(status)) => Ok(status as u32),
        Err(Stop::Trap(trap)) => Err(trap),
    }
}

/// The guest's memory and the host's state, side by side.
pub(super) fn view<'a>(caller: &'a mut Caller<'_, Host>) -> Result<(&'a mut [u8], &'a mut Host), Status> {
    let memory = match caller.data().memory {
        Some(memory) => memory,
        // The module's start function runs before the instance is handed over.
        None => caller.get_export("memory").and_then(Extern::into_memory).ok_or(Status::InternalFailure)?,
    };
    Ok(memory.data_and_store_mut(caller))
}

/// `len` bytes at `ptr`.
pub(super) fn bytes(memory: &[u8], ptr: u32, len: u32) -> Result<&[u8], Status> {
    memory.get(ptr as usize..).and_then(|rest| rest.get(..len as usize)).ok_or(Status::InvalidMemoryAccess)
}

/// `len` writable bytes at `ptr`.
pub(super) fn bytes_mut(memory: &mut [u8], ptr: u32, len: u32) -> Result<&mut [u8], Status> {
    memory
        .get_mut(ptr as usize..)
        .and_then(|rest| rest.get_mut(..len as usize))
        .ok_or(Status::InvalidMemoryAccess)
}

/// Writes a little-endian u32 at `ptr`.
pub(super) fn write_u32(memory: &mut [u8], ptr: u32, value: u32) -> Result<(), Status> {
    bytes_mut(memory, ptr, 4)?.copy_from_slice(&value.to_le_bytes());
    Ok(())
}

/// Writes a little-endian u64 at `ptr`.
pub(super) fn write_u64(memory: &mut [u8], ptr: u32, value: u64) -> Result<(), Status> {
    bytes_mut(memory, ptr, 8)?.copy_from_slice(&value.to_le_bytes());
    Ok(())
}

/// Reads a little-endian u32 at `ptr`.
pub(super) fn read_u32(memory: &[u8], ptr: u32) -> Result<u32, Status> {
    let four = bytes(memory, ptr, 4)?;
    let four: [u8; 4] = four.try_into().map_err(|_| Status::InvalidMemoryAccess)?;
    Ok(u32::from_le_bytes(four))
}

/// Copies what `fill` writes into memory that the guest allocates for it, and stores where it is and
/// how long (`out`: the two places). Nothing at all is a null pointer and length 0, without an
/// allocation.
///
/// The bytes pass through a scratch buffer, since the guest's allocator runs in between and may
/// change anything; the buffer is reused, so no call allocates once it is warm.
pub(super) fn give(
    caller: &mut Caller<'_, Host>,
    out: (u32, u32),
    fill: impl FnOnce(&mut Host, &mut Vec<u8>) -> Result<(), Status>,
) -> Outcome {
    let host = caller.data_mut();
    let mut value = std::mem::take(&mut host.scratch);
    value.clear();
    let outcome = fill(host, &mut value).map_err(Stop::Status).and_then(|()| deliver(caller, out, &value));
    if value.capacity() <= super::host::SCRATCH_MAX_BYTES {
        caller.data_mut().scratch = value;
    }
    outcome
}

/// Gives `value` to the guest, as [`give`].
pub(super) fn deliver(caller: &mut Caller<'_, Host>, out: (u32, u32), value: &[u8]) -> Outcome {
    let len = u32::try_from(value.len()).map_err(|_| Status::InternalFailure)?;
    let address = if len > 0 { allocate(caller, value)? } else { 0 };
    let (memory, _) = view(caller)?;
    write_u32(memory, out.0, address)?;
    write_u32(memory, out.1, len)?;
    Ok(())
}

/// Copies `value` into memory that the guest allocates for it, and returns where it is.
pub(super) fn allocate(caller: &mut Caller<'_, Host>, value: &[u8]) -> Result<u32, Stop> {
    let len = u32::try_from(value.len()).map_err(|_| Status::InternalFailure)?;
    let allocate = caller.data().allocate.as_ref().map(Arc::clone).ok_or(Status::InternalFailure)?;
    let address = allocate.call(&mut *caller, len)?;
    if address == 0 {
        return Err(Status::InvalidMemoryAccess.into());
    }
    let (memory, _) = view(caller)?;
    bytes_mut(memory, address, len)?.copy_from_slice(value);
    Ok(address)
}
