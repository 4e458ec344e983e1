//! The part of WASI preview 1 that proxy-wasm guests are built against.
//!
//! Eight functions do something; a few more only link, as in the C++ host, since TinyGo and C++
//! runtimes import them without need. There are no files, no arguments, no sockets. Standard output
//! and error become log lines (info and error). Both module names that toolchains use are offered.

use wasmtime::{Caller, Linker};

use super::host::Host;
use super::log::LogLevel;
use super::memory::{bytes, bytes_mut, read_u32, view, write_u32, write_u64};
use super::status::Status;

const SUCCESS: u32 = 0;
const EBADF: u32 = 8;
const EFAULT: u32 = 21;
const EINVAL: u32 = 28;
const ENOSYS: u32 = 52;
const ENOTSUP: u32 = 58;

/// Most random bytes per call, as in the C++ host.
const RANDOM_MAX_BYTES: u32 = 64 * 1024;
/// Most bytes taken from one `fd_write`; a writer calls again for the rest.
const WRITE_MAX_BYTES: usize = 64 * 1024;

type Ctx<'a> = Caller<'a, Host>;

/// Registers the functions in `linker`.
pub(super) fn register(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    for module in ["wasi_snapshot_preview1", "wasi_unstable"] {
        linker.func_wrap(
            module,
            "fd_write",
            |mut c: Ctx<'_>, fd: u32, iovs: u32, count: u32, written: u32| {
                errno(fd_write(&mut c, fd, iovs, count, written))
            },
        )?;
        linker.func_wrap(
            module,
            "clock_time_get",
            |mut c: Ctx<'_>, id: u32, _precision: u64, out: u32| errno(clock_time_get(&mut c, id, out)),
        )?;
        linker.func_wrap(module, "random_get", |mut c: Ctx<'_>, ptr: u32, len: u32| {
            errno(random_get(&mut c, ptr, len))
        })?;
        linker.func_wrap(module, "environ_sizes_get", |mut c: Ctx<'_>, count: u32, size: u32| {
            errno(environ_sizes_get(&mut c, count, size))
        })?;
        linker.func_wrap(module, "environ_get", |mut c: Ctx<'_>, list: u32, text: u32| {
            errno(environ_get(&mut c, list, text))
        })?;
        linker.func_wrap(module, "args_sizes_get", |mut c: Ctx<'_>, count: u32, size: u32| {
            errno(args_sizes_get(&mut c, count, size))
        })?;
        linker.func_wrap(module, "args_get", |_: Ctx<'_>, _: u32, _: u32| SUCCESS)?;
        linker.func_wrap(module, "proc_exit", |mut c: Ctx<'_>, code: u32| {
            // Envoy returns to the guest too, which then runs into its own `unreachable`.
            let message = format!("the filter called proc_exit({code})");
            c.data_mut().log(LogLevel::Error, message.as_bytes());
        })?;

        linker.func_wrap(module, "fd_fdstat_get", |mut c: Ctx<'_>, fd: u32, out: u32| {
            errno(fd_fdstat_get(&mut c, fd, out))
        })?;
        linker.func_wrap(module, "fd_read", |_: Ctx<'_>, _: u32, _: u32, _: u32, _: u32| ENOSYS)?;
        linker.func_wrap(module, "fd_seek", |_: Ctx<'_>, _: u32, _: i64, _: u32, _: u32| SUCCESS)?;
        linker.func_wrap(module, "fd_close", |_: Ctx<'_>, _: u32| SUCCESS)?;
        linker.func_wrap(module, "fd_prestat_get", |_: Ctx<'_>, _: u32, _: u32| EBADF)?;
        linker.func_wrap(module, "fd_prestat_dir_name", |_: Ctx<'_>, _: u32, _: u32, _: u32| EBADF)?;
        linker.func_wrap(module, "sched_yield", |_: Ctx<'_>| SUCCESS)?;
        linker.func_wrap(module, "poll_oneoff", |_: Ctx<'_>, _: u32, _: u32, _: u32, _: u32| ENOSYS)?;
    }
    Ok(())
}

/// What the guest gets: 0, or the error number.
fn errno(outcome: Result<(), u32>) -> u32 {
    outcome.err().unwrap_or(SUCCESS)
}

fn fault(_: Status) -> u32 {
    EFAULT
}

fn fd_write(c: &mut Ctx<'_>, fd: u32, iovs: u32, count: u32, written: u32) -> Result<(), u32> {
    let level = match fd {
        1 => LogLevel::Info,
        2 => LogLevel::Error,
        _ => return Err(EBADF),
    };
    let (memory, host) = view(c).map_err(fault)?;
    let mut text = Vec::new();
    for index in 0..count {
        let iov = index.checked_mul(8).and_then(|at| iovs.checked_add(at)).ok_or(EFAULT)?;
        let ptr = read_u32(memory, iov).map_err(fault)?;
        let len = read_u32(memory, iov.checked_add(4).ok_or(EFAULT)?).map_err(fault)?;
        let part = bytes(memory, ptr, len).map_err(fault)?;
        let room = WRITE_MAX_BYTES - text.len();
        text.extend_from_slice(part.get(..room).unwrap_or(part));
        if text.len() == WRITE_MAX_BYTES {
            break;
        }
    }
    let size = u32::try_from(text.len()).map_err(|_| EINVAL)?;
    write_u32(memory, written, size).map_err(fault)?;
    let line = text.strip_suffix(b"\n").unwrap_or(&text);
    if size > 0 {
        host.log(level, line);
    }
    Ok(())
}

fn clock_time_get(c: &mut Ctx<'_>, id: u32, out: u32) -> Result<(), u32> {
    let (memory, host) = view(c).map_err(fault)?;
    let now_ns = match id {
        0 => host.clock.realtime_ns(),
        1 => host.clock.monotonic_ns(host.started),
        _ => return Err(ENOTSUP),
    };
    write_u64(memory, out, now_ns).map_err(fault)
}

fn random_get(c: &mut Ctx<'_>, ptr: u32, len: u32) -> Result<(), u32> {
    if len > RANDOM_MAX_BYTES {
        return Err(EINVAL);
    }
    let (memory, host) = view(c).map_err(fault)?;
    host.random.fill(bytes_mut(memory, ptr, len).map_err(fault)?);
    Ok(())
}

fn environ_sizes_get(c: &mut Ctx<'_>, count: u32, size: u32) -> Result<(), u32> {
    let (memory, host) = view(c).map_err(fault)?;
    let bytes: usize = host.environment.iter().map(|(k, v)| k.len() + v.len() + 2).sum();
    let number = u32::try_from(host.environment.len()).map_err(|_| EINVAL)?;
    write_u32(memory, count, number).map_err(fault)?;
    write_u32(memory, size, u32::try_from(bytes).map_err(|_| EINVAL)?).map_err(fault)
}

fn environ_get(c: &mut Ctx<'_>, mut list: u32, mut text: u32) -> Result<(), u32> {
    let (memory, host) = view(c).map_err(fault)?;
    for (name, value) in &host.environment {
        write_u32(memory, list, text).map_err(fault)?;
        let entry = format!("{name}={value}\0");
        let len = u32::try_from(entry.len()).map_err(|_| EINVAL)?;
        bytes_mut(memory, text, len).map_err(fault)?.copy_from_slice(entry.as_bytes());
        text = text.checked_add(len).ok_or(EFAULT)?;
        list = list.checked_add(4).ok_or(EFAULT)?;
    }
    Ok(())
}

fn args_sizes_get(c: &mut Ctx<'_>, count: u32, size: u32) -> Result<(), u32> {
    let (memory, _) = view(c).map_err(fault)?;
    write_u32(memory, count, 0).map_err(fault)?;
    write_u32(memory, size, 0).map_err(fault)
}

fn fd_fdstat_get(c: &mut Ctx<'_>, fd: u32, out: u32) -> Result<(), u32> {
    /// `fs_rights_base`: writing only.
    const RIGHT_FD_WRITE: u64 = 64;
    if fd != 1 && fd != 2 {
        return Err(EBADF);
    }
    let (memory, _) = view(c).map_err(fault)?;
    let stat = bytes_mut(memory, out, 24).map_err(fault)?;
    stat.fill(0);
    write_u64(stat, 8, RIGHT_FD_WRITE).map_err(fault)
}
