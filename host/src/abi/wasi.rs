//! The part of WASI preview 1 that proxy-wasm guests are built against.
//!
//! The functions that can do something without files, arguments and sockets do it; the rest of preview
//! 1 links and fails, since runtimes import much that filters never call. Standard output and error
//! become log lines (info and error). The clocks and the random bytes are the caller's choice
//! ([`Clock`](super::Clock)), so that a run can be repeated. Both module names that toolchains use are
//! offered. More than Envoy has: the monotonic clock, `clock_res_get`, and `poll_oneoff` on clocks.

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
        linker.func_wrap(module, "clock_res_get", |mut c: Ctx<'_>, id: u32, out: u32| {
            errno(clock_res_get(&mut c, id, out))
        })?;
        linker.func_wrap(
            module,
            "poll_oneoff",
            |mut c: Ctx<'_>, subs: u32, out: u32, n: u32, done: u32| {
                errno(poll_oneoff(&mut c, subs, out, n, done))
            },
        )?;
        stubs(linker, module)?;
    }
    Ok(())
}

/// The rest of preview 1, so that every runtime links: what Envoy answers where it has the function, and
/// otherwise that there is no such file.
fn stubs(linker: &mut Linker<Host>, module: &str) -> wasmtime::Result<()> {
    /// `name (parameters) => errno`.
    macro_rules! stubs {
        ($($name:ident ($($ty:ty),*) => $errno:expr;)*) => {$(
            linker.func_wrap(module, stringify!($name), stub!($errno, $($ty),*))?;
        )*};
    }
    macro_rules! stub {
        ($errno:expr, $($ty:ty),*) => {
            |_: Ctx<'_>, $(_: $ty),*| -> u32 { $errno }
        };
    }
    stubs! {
        fd_read(u32, u32, u32, u32) => ENOSYS;
        fd_seek(u32, i64, u32, u32) => SUCCESS;
        fd_close(u32) => SUCCESS;
        fd_prestat_get(u32, u32) => EBADF;
        fd_prestat_dir_name(u32, u32, u32) => EBADF;
        fd_fdstat_set_flags(u32, u32) => SUCCESS;
        fd_fdstat_set_rights(u32, u64, u64) => EBADF;
        fd_advise(u32, u64, u64, u32) => EBADF;
        fd_allocate(u32, u64, u64) => EBADF;
        fd_datasync(u32) => EBADF;
        fd_sync(u32) => EBADF;
        fd_tell(u32, u32) => EBADF;
        fd_renumber(u32, u32) => EBADF;
        fd_filestat_get(u32, u32) => EBADF;
        fd_filestat_set_size(u32, u64) => EBADF;
        fd_filestat_set_times(u32, u64, u64, u32) => EBADF;
        fd_pread(u32, u32, u32, u64, u32) => EBADF;
        fd_pwrite(u32, u32, u32, u64, u32) => EBADF;
        fd_readdir(u32, u32, u32, u64, u32) => EBADF;
        path_create_directory(u32, u32, u32) => EBADF;
        path_filestat_get(u32, u32, u32, u32, u32) => EBADF;
        path_filestat_set_times(u32, u32, u32, u32, u64, u64, u32) => EBADF;
        path_link(u32, u32, u32, u32, u32, u32, u32) => EBADF;
        path_open(u32, u32, u32, u32, u32, u64, u64, u32, u32) => EBADF;
        path_readlink(u32, u32, u32, u32, u32, u32) => EBADF;
        path_remove_directory(u32, u32, u32) => EBADF;
        path_rename(u32, u32, u32, u32, u32, u32) => EBADF;
        path_symlink(u32, u32, u32, u32, u32) => EBADF;
        path_unlink_file(u32, u32, u32) => EBADF;
        proc_raise(u32) => ENOSYS;
        sched_yield() => SUCCESS;
        sock_accept(u32, u32, u32) => EBADF;
        sock_recv(u32, u32, u32, u32, u32, u32) => EBADF;
        sock_send(u32, u32, u32, u32, u32) => EBADF;
        sock_shutdown(u32, u32) => EBADF;
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
    // What POSIX allows at least; more would keep the host busy without the guest's deadline.
    if count > 1024 {
        return Err(EINVAL);
    }
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

/// Nanoseconds: both clocks count them.
fn clock_res_get(c: &mut Ctx<'_>, id: u32, out: u32) -> Result<(), u32> {
    if id > 1 {
        return Err(ENOTSUP);
    }
    let (memory, _) = view(c).map_err(fault)?;
    write_u64(memory, out, 1).map_err(fault)
}

/// Most subscriptions of one `poll_oneoff`.
const SUBSCRIPTIONS_MAX_COUNT: u32 = 64;

/// Nothing ever waits here: a clock is over at once (Go's scheduler polls one), and descriptors are bad.
fn poll_oneoff(c: &mut Ctx<'_>, subscriptions: u32, events: u32, count: u32, done: u32) -> Result<(), u32> {
    const SUBSCRIPTION_BYTES: u32 = 48;
    const EVENT_BYTES: u32 = 32;
    if count == 0 || count > SUBSCRIPTIONS_MAX_COUNT {
        return Err(EINVAL);
    }
    let (memory, _) = view(c).map_err(fault)?;
    for index in 0..count {
        let from = subscriptions.checked_add(index * SUBSCRIPTION_BYTES).ok_or(EFAULT)?;
        let subscription = bytes(memory, from, SUBSCRIPTION_BYTES).map_err(fault)?;
        let (userdata, kind) = subscription.split_at_checked(8).ok_or(EFAULT)?;
        let kind = kind.first().copied().ok_or(EFAULT)?;
        let mut event = [0; EVENT_BYTES as usize];
        event[..8].copy_from_slice(userdata);
        let errno = if kind == 0 { SUCCESS } else { EBADF };
        event[8..10].copy_from_slice(&u16::try_from(errno).map_err(|_| EINVAL)?.to_le_bytes());
        event[10] = kind;
        let to = events.checked_add(index * EVENT_BYTES).ok_or(EFAULT)?;
        bytes_mut(memory, to, EVENT_BYTES).map_err(fault)?.copy_from_slice(&event);
    }
    write_u32(memory, done, count).map_err(fault)
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
