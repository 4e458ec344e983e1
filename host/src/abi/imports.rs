//! The 39 `env.proxy_*` host calls of ABI 0.2.1, and two that C++ guests import beside them.
//!
//! Each function is short: check the pointers, ask [`Host`], give the answer back. Statuses follow
//! the C++ host (proxy-wasm-cpp-host `src/exports.cc`) and Envoy's `context.cc`, since SDKs panic on
//! a status they do not expect. Left out on purpose: gRPC calls. They link, and fail the way an
//! unreachable service does, so that a guest which handles failure goes on.

use wasmtime::{Caller, Linker};

use super::headers::HeaderMap;
use super::host::{COPY_MAX_BYTES, Deferred, Host};
use super::log::LogLevel;
use super::memory::{Outcome, bytes, finish, give, view, write_u32, write_u64};
use super::metrics::MetricKind;
use super::plugin::HttpCall;
use super::status::{BufferType, Direction, MapType, Status};
use super::stream::LocalReply;

/// Longest log message passed on, in bytes; what exceeds it is cut.
const LOG_MAX_BYTES: u32 = 1024 * 1024;
/// Most entries that guest calls may grow one header map to.
const HEADERS_MAX_COUNT: usize = 4096;

type Ctx<'a> = Caller<'a, Host>;

/// Registers the functions in `linker`.
pub(super) fn register(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    general(linker)?;
    buffers_and_maps(linker)?;
    streams_and_calls(linker)?;
    grpc(linker)?;
    shared(linker)?;
    properties(linker)
}

fn general(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    let env = "env";
    linker.func_wrap(env, "proxy_log", |mut c: Ctx<'_>, level: u32, ptr: u32, len: u32| {
        finish(log(&mut c, level, ptr, len))
    })?;
    linker.func_wrap(env, "proxy_get_log_level", |mut c: Ctx<'_>, out: u32| {
        let level = c.data().log.level() as u32;
        finish(put_u32(&mut c, out, level))
    })?;
    linker.func_wrap(env, "proxy_get_current_time_nanoseconds", |mut c: Ctx<'_>, out: u32| {
        let now = c.data().clock.realtime_ns();
        finish(put_u64(&mut c, out, now))
    })?;
    linker.func_wrap(env, "proxy_set_tick_period_milliseconds", |mut c: Ctx<'_>, period: u32| {
        c.data_mut().tick_period_ms = (period != 0).then_some(period);
        finish(Ok(()))
    })?;
    linker.func_wrap(env, "proxy_set_effective_context", |mut c: Ctx<'_>, id: u32| {
        let host = c.data_mut();
        finish(if id == host.root || host.streams.contains_key(&id) {
            host.effective = id;
            Ok(())
        } else {
            Err(Status::BadArgument.into())
        })
    })?;
    linker.func_wrap(env, "proxy_done", |mut c: Ctx<'_>| {
        let host = c.data_mut();
        finish(if std::mem::take(&mut host.root_done_pending) {
            host.root_done = true;
            Ok(())
        } else {
            Err(Status::NotFound.into())
        })
    })?;
    linker.func_wrap(
        env,
        "proxy_call_foreign_function",
        |mut c: Ctx<'_>, name: u32, name_len: u32, args: u32, args_len: u32, out: u32, out_len: u32| {
            finish(call_foreign_function(&mut c, (name, name_len), (args, args_len), out, out_len))
        },
    )?;
    linker.func_wrap(env, "emscripten_notify_memory_growth", |_: Ctx<'_>, _: u32| {})?;
    linker.func_wrap(env, "pthread_equal", |_: Ctx<'_>, a: u32, b: u32| u32::from(a == b))?;
    Ok(())
}

fn buffers_and_maps(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    let env = "env";
    linker.func_wrap(
        env,
        "proxy_get_buffer_bytes",
        |mut c: Ctx<'_>, kind: u32, start: u32, max: u32, ptr: u32, len: u32| {
            finish(get_buffer_bytes(&mut c, kind, start, max, ptr, len))
        },
    )?;
    linker.func_wrap(env, "proxy_get_buffer_status", |mut c: Ctx<'_>, kind: u32, len: u32, flags: u32| {
        finish(get_buffer_status(&mut c, kind, len, flags))
    })?;
    linker.func_wrap(
        env,
        "proxy_set_buffer_bytes",
        |mut c: Ctx<'_>, kind: u32, start: u32, length: u32, ptr: u32, len: u32| {
            finish(set_buffer_bytes(&mut c, kind, start, length, (ptr, len)))
        },
    )?;
    linker.func_wrap(env, "proxy_get_header_map_size", |mut c: Ctx<'_>, map: u32, out: u32| {
        finish(get_header_map_size(&mut c, map, out))
    })?;
    linker.func_wrap(env, "proxy_get_header_map_pairs", |mut c: Ctx<'_>, map: u32, ptr: u32, len: u32| {
        finish(get_header_map_pairs(&mut c, map, ptr, len))
    })?;
    linker.func_wrap(env, "proxy_set_header_map_pairs", |mut c: Ctx<'_>, map: u32, ptr: u32, len: u32| {
        finish(set_header_map_pairs(&mut c, map, ptr, len))
    })?;
    linker.func_wrap(
        env,
        "proxy_get_header_map_value",
        |mut c: Ctx<'_>, map: u32, key: u32, key_len: u32, ptr: u32, len: u32| {
            finish(get_header_map_value(&mut c, map, (key, key_len), ptr, len))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_add_header_map_value",
        |mut c: Ctx<'_>, map: u32, key: u32, key_len: u32, value: u32, value_len: u32| {
            finish(change_header_map(&mut c, map, (key, key_len), (value, value_len), HeaderMap::add))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_replace_header_map_value",
        |mut c: Ctx<'_>, map: u32, key: u32, key_len: u32, value: u32, value_len: u32| {
            let change = HeaderMap::replace;
            finish(change_header_map(&mut c, map, (key, key_len), (value, value_len), change))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_remove_header_map_value",
        |mut c: Ctx<'_>, map: u32, key: u32, key_len: u32| {
            let change = |headers: &mut HeaderMap, key: &[u8], _: &[u8]| headers.remove(key);
            finish(change_header_map(&mut c, map, (key, key_len), (0, 0), change))
        },
    )?;
    Ok(())
}

fn streams_and_calls(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    let env = "env";
    linker.func_wrap(env, "proxy_continue_stream", |mut c: Ctx<'_>, kind: u32| {
        finish(continue_stream(c.data_mut(), kind))
    })?;
    linker.func_wrap(env, "proxy_close_stream", |mut c: Ctx<'_>, kind: u32| {
        finish(close_stream(c.data_mut(), kind))
    })?;
    linker.func_wrap(env, "proxy_get_status", |mut c: Ctx<'_>, code: u32, ptr: u32, len: u32| {
        finish(get_status(&mut c, code, ptr, len))
    })?;
    linker.func_wrap(
        env,
        "proxy_send_local_response",
        |mut c: Ctx<'_>,
         status: u32,
         details: u32,
         details_len: u32,
         body: u32,
         body_len: u32,
         headers: u32,
         headers_len: u32,
         grpc_status: i32| {
            finish(send_local_response(
                &mut c,
                status,
                (details, details_len),
                (body, body_len),
                (headers, headers_len),
                grpc_status,
            ))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_http_call",
        |mut c: Ctx<'_>,
         upstream: u32,
         upstream_len: u32,
         headers: u32,
         headers_len: u32,
         body: u32,
         body_len: u32,
         trailers: u32,
         trailers_len: u32,
         timeout_ms: u32,
         out: u32| {
            finish(http_call(
                &mut c,
                (upstream, upstream_len),
                (headers, headers_len),
                (body, body_len),
                (trailers, trailers_len),
                timeout_ms,
                out,
            ))
        },
    )?;
    Ok(())
}

fn grpc(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    let env = "env";
    linker.func_wrap(
        env,
        "proxy_grpc_call",
        |mut c: Ctx<'_>,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32,
         _: u32| finish(no_grpc(c.data_mut())),
    )?;
    linker.func_wrap(
        env,
        "proxy_grpc_stream",
        |mut c: Ctx<'_>, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32| {
            finish(no_grpc(c.data_mut()))
        },
    )?;
    // No call or stream was ever opened, so its token is unknown.
    let unknown = || finish(Err(Status::NotFound.into()));
    linker.func_wrap(env, "proxy_grpc_send", move |_: Ctx<'_>, _: u32, _: u32, _: u32, _: u32| unknown())?;
    linker.func_wrap(env, "proxy_grpc_cancel", move |_: Ctx<'_>, _: u32| unknown())?;
    linker.func_wrap(env, "proxy_grpc_close", move |_: Ctx<'_>, _: u32| unknown())?;
    Ok(())
}

fn shared(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    let env = "env";
    linker.func_wrap(
        env,
        "proxy_get_shared_data",
        |mut c: Ctx<'_>, key: u32, key_len: u32, ptr: u32, len: u32, cas: u32| {
            finish(get_shared_data(&mut c, (key, key_len), ptr, len, cas))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_set_shared_data",
        |mut c: Ctx<'_>, key: u32, key_len: u32, value: u32, value_len: u32, cas: u32| {
            finish(set_shared_data(&mut c, (key, key_len), (value, value_len), cas))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_register_shared_queue",
        |mut c: Ctx<'_>, name: u32, name_len: u32, out: u32| {
            finish(register_shared_queue(&mut c, (name, name_len), out))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_resolve_shared_queue",
        |mut c: Ctx<'_>, vm_id: u32, vm_id_len: u32, name: u32, name_len: u32, out: u32| {
            finish(resolve_shared_queue(&mut c, (vm_id, vm_id_len), (name, name_len), out))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_enqueue_shared_queue",
        |mut c: Ctx<'_>, queue: u32, value: u32, value_len: u32| {
            finish(enqueue_shared_queue(&mut c, queue, (value, value_len)))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_dequeue_shared_queue",
        |mut c: Ctx<'_>, queue: u32, ptr: u32, len: u32| {
            finish(give(&mut c, ptr, len, |host, out| {
                out.extend_from_slice(&host.shared.dequeue(queue)?);
                Ok(())
            }))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_define_metric",
        |mut c: Ctx<'_>, kind: u32, name: u32, name_len: u32, out: u32| {
            finish(define_metric(&mut c, kind, (name, name_len), out))
        },
    )?;
    linker.func_wrap(env, "proxy_record_metric", |c: Ctx<'_>, id: u32, value: u64| {
        finish(c.data().shared.metrics().record(id, value).map_err(Into::into))
    })?;
    linker.func_wrap(env, "proxy_increment_metric", |c: Ctx<'_>, id: u32, offset: i64| {
        finish(c.data().shared.metrics().increment(id, offset).map_err(Into::into))
    })?;
    linker.func_wrap(env, "proxy_get_metric", |mut c: Ctx<'_>, id: u32, out: u32| {
        finish(match c.data().shared.metrics().current(id) {
            Ok(value) => put_u64(&mut c, out, value),
            Err(status) => Err(status.into()),
        })
    })?;
    Ok(())
}

fn properties(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    let env = "env";
    linker.func_wrap(
        env,
        "proxy_get_property",
        |mut c: Ctx<'_>, path: u32, path_len: u32, ptr: u32, len: u32| {
            finish(get_property(&mut c, (path, path_len), ptr, len))
        },
    )?;
    linker.func_wrap(
        env,
        "proxy_set_property",
        |mut c: Ctx<'_>, path: u32, path_len: u32, value: u32, value_len: u32| {
            finish(set_property(&mut c, (path, path_len), (value, value_len)))
        },
    )?;
    Ok(())
}

/// A pointer and a length, as the guest passes them.
type Range = (u32, u32);

fn put_u32(c: &mut Ctx<'_>, out: u32, value: u32) -> Outcome {
    let (memory, _) = view(c)?;
    Ok(write_u32(memory, out, value)?)
}

fn put_u64(c: &mut Ctx<'_>, out: u32, value: u64) -> Outcome {
    let (memory, _) = view(c)?;
    Ok(write_u64(memory, out, value)?)
}

fn log(c: &mut Ctx<'_>, level: u32, ptr: u32, len: u32) -> Outcome {
    let level = LogLevel::from_abi(level).ok_or(Status::BadArgument)?;
    let (memory, host) = view(c)?;
    let message = bytes(memory, ptr, len)?;
    host.log(level, bytes(message, 0, len.min(LOG_MAX_BYTES))?);
    Ok(())
}

fn call_foreign_function(c: &mut Ctx<'_>, name: Range, arguments: Range, out: u32, out_len: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let name = bytes(memory, name.0, name.1)?;
    let arguments = bytes(memory, arguments.0, arguments.1)?;
    let function = host.foreign_function(name).ok_or(Status::NotFound)?;
    let result = function(arguments)?;
    if out == 0 || out_len == 0 {
        return Ok(());
    }
    give(c, out, out_len, |_, value| {
        value.extend_from_slice(&result);
        Ok(())
    })
}

fn get_buffer_bytes(c: &mut Ctx<'_>, kind: u32, start: u32, max: u32, ptr: u32, len: u32) -> Outcome {
    let kind = BufferType::from_abi(kind)?;
    let buffer = c.data().buffer(kind)?;
    // Out of range is nothing, a null pointer, and not an error.
    let start = (start as usize).min(buffer.len());
    let end = start.saturating_add(max as usize).min(buffer.len());
    give(c, ptr, len, |host, out| {
        out.extend_from_slice(host.buffer(kind)?.get(start..end).unwrap_or_default());
        Ok(())
    })
}

fn get_buffer_status(c: &mut Ctx<'_>, kind: u32, len: u32, flags: u32) -> Outcome {
    let kind = BufferType::from_abi(kind)?;
    let (memory, host) = view(c)?;
    let size = u32::try_from(host.buffer(kind)?.len()).unwrap_or(u32::MAX);
    write_u32(memory, len, size)?;
    Ok(write_u32(memory, flags, 0)?)
}

fn set_buffer_bytes(c: &mut Ctx<'_>, kind: u32, start: u32, length: u32, data: Range) -> Outcome {
    let kind = BufferType::from_abi(kind)?;
    let (memory, host) = view(c)?;
    let direction = match kind {
        BufferType::RequestBody => Direction::Request,
        BufferType::ResponseBody => Direction::Response,
        // The others cannot be changed; a missing one is NotFound.
        _ => return host.buffer(kind).and(Err(Status::BadArgument)).map_err(Into::into),
    };
    let data = bytes(memory, data.0, data.1)?;
    let stream = host.stream_mut().ok_or(Status::BadArgument)?;
    let side = stream.side_mut(direction);
    Ok(side.replace_body(start as usize, length as usize, data, COPY_MAX_BYTES)?)
}

fn get_header_map_size(c: &mut Ctx<'_>, map: u32, out: u32) -> Outcome {
    let kind = MapType::from_abi(map)?;
    let size = c.data_mut().writable_map(kind)?.byte_size();
    put_u32(c, out, u32::try_from(size).unwrap_or(u32::MAX))
}

fn get_header_map_pairs(c: &mut Ctx<'_>, map: u32, ptr: u32, len: u32) -> Outcome {
    let kind = MapType::from_abi(map)?;
    give(c, ptr, len, |host, out| {
        // A map that is not there reads as an empty one.
        if let Some(headers) = host.readable_map(kind) {
            headers.encode(out);
        }
        Ok(())
    })
}

fn set_header_map_pairs(c: &mut Ctx<'_>, map: u32, ptr: u32, len: u32) -> Outcome {
    let kind = MapType::from_abi(map)?;
    let (memory, host) = view(c)?;
    let headers = HeaderMap::decode(bytes(memory, ptr, len)?)?;
    *host.writable_map(kind)? = headers;
    Ok(())
}

fn get_header_map_value(c: &mut Ctx<'_>, map: u32, key: Range, ptr: u32, len: u32) -> Outcome {
    let kind = MapType::from_abi(map)?;
    let (memory, host) = view(c)?;
    let key = bytes(memory, key.0, key.1)?;
    let Some(headers) = host.readable_map(kind) else {
        let logging = host.stream().is_some_and(|stream| stream.log_phase);
        return Err(if logging { Status::NotFound.into() } else { Status::BadArgument.into() });
    };
    let value = headers.first(key).ok_or(Status::NotFound)?.to_vec();
    give(c, ptr, len, |_, out| {
        out.extend_from_slice(&value);
        Ok(())
    })
}

fn change_header_map(
    c: &mut Ctx<'_>,
    map: u32,
    key: Range,
    value: Range,
    change: impl FnOnce(&mut HeaderMap, &[u8], &[u8]),
) -> Outcome {
    let kind = MapType::from_abi(map)?;
    let (memory, host) = view(c)?;
    let key = bytes(memory, key.0, key.1)?;
    let value = bytes(memory, value.0, value.1)?;
    let headers = host.writable_map(kind)?;
    if headers.len() >= HEADERS_MAX_COUNT || key.len() + value.len() > super::PAIRS_MAX_BYTES {
        return Err(Status::BadArgument.into());
    }
    change(headers, key, value);
    Ok(())
}

fn continue_stream(host: &mut Host, kind: u32) -> Outcome {
    let direction = match kind {
        0 => Direction::Request,
        1 => Direction::Response,
        // An HTTP stream has no network filter to resume.
        2 => return Ok(()),
        3 => return Err(Status::Unimplemented.into()),
        _ => return Err(Status::BadArgument.into()),
    };
    let id = host.context();
    if let Some(stream) = host.stream_mut() {
        stream.request.close_maps();
        host.deferred.push(Deferred::Continue(id, direction));
    }
    Ok(())
}

fn close_stream(host: &mut Host, kind: u32) -> Outcome {
    let id = host.context();
    match kind {
        0 | 1 if host.streams.contains_key(&id) => host.deferred.push(Deferred::Close(id)),
        0..=3 => {}
        _ => return Err(Status::BadArgument.into()),
    }
    Ok(())
}

fn get_status(c: &mut Ctx<'_>, code: u32, ptr: u32, len: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let (status, message) = host.call_status;
    write_u32(memory, code, status)?;
    give(c, ptr, len, |_, out| {
        out.extend_from_slice(message.as_bytes());
        Ok(())
    })
}

fn send_local_response(
    c: &mut Ctx<'_>,
    status: u32,
    details: Range,
    body: Range,
    headers: Range,
    grpc_status: i32,
) -> Outcome {
    let (memory, host) = view(c)?;
    let details = bytes(memory, details.0, details.1.min(1024))?;
    let body = bytes(memory, body.0, body.1)?;
    let headers = HeaderMap::decode(bytes(memory, headers.0, headers.1)?)?;
    if !(200..=599).contains(&status) || body.len() > COPY_MAX_BYTES {
        return Err(Status::BadArgument.into());
    }
    let reply = LocalReply {
        status,
        details: String::from_utf8_lossy(details).replace(char::is_whitespace, "_"),
        headers,
        body: body.to_vec(),
        // SDKs pass -1 for "not a gRPC status".
        grpc_status: (0..=16).contains(&grpc_status).then_some(grpc_status),
        through_response_callbacks: true,
    };
    let id = host.context();
    if host.streams.contains_key(&id) {
        host.deferred.push(Deferred::Reply(id, reply));
    }
    Ok(())
}

fn http_call(
    c: &mut Ctx<'_>,
    upstream: Range,
    headers: Range,
    body: Range,
    trailers: Range,
    timeout_ms: u32,
    out: u32,
) -> Outcome {
    let (memory, host) = view(c)?;
    let upstream = bytes(memory, upstream.0, upstream.1)?;
    let upstream = std::str::from_utf8(upstream).map_err(|_| Status::BadArgument)?;
    let body = bytes(memory, body.0, body.1)?;
    let mut headers = HeaderMap::decode(bytes(memory, headers.0, headers.1)?)?;
    let trailers = HeaderMap::decode(bytes(memory, trailers.0, trailers.1)?)?;
    // Envoy's timeout is a signed number of milliseconds.
    let known = host.upstreams.as_ref().is_none_or(|known| known.contains(upstream));
    let complete =
        [&b":method"[..], b":path", b":authority"].iter().all(|name| headers.first(name).is_some());
    if !known || !complete || i32::try_from(timeout_ms).is_err() {
        return Err(Status::BadArgument.into());
    }
    if host.outstanding.len() >= host.limits.outstanding_http_calls || body.len() > COPY_MAX_BYTES {
        return Err(Status::InternalFailure.into());
    }
    if !body.is_empty() {
        headers.replace(b"content-length", body.len().to_string().as_bytes());
    }
    let upstream = upstream.to_owned();
    let body = body.to_vec();
    let mut id = host.last_call.wrapping_add(1).max(1);
    while host.outstanding.contains(&id) {
        id = id.wrapping_add(1).max(1);
    }
    write_u32(memory, out, id)?;
    host.last_call = id;
    host.outstanding.insert(id);
    host.calls.push(HttpCall { id, upstream, headers, body, trailers, timeout_ms });
    Ok(())
}

fn no_grpc(host: &mut Host) -> Outcome {
    host.log(LogLevel::Warn, b"this host makes no gRPC calls: the filter's call fails");
    Err(Status::InternalFailure.into())
}

fn get_shared_data(c: &mut Ctx<'_>, key: Range, ptr: u32, len: u32, cas_out: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let key = bytes(memory, key.0, key.1)?;
    let (value, cas) = host.shared.value(&host.vm_id, key).ok_or(Status::NotFound)?;
    give(c, ptr, len, |_, out| {
        out.extend_from_slice(&value);
        Ok(())
    })?;
    put_u32(c, cas_out, cas)
}

fn set_shared_data(c: &mut Ctx<'_>, key: Range, value: Range, cas: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let key = bytes(memory, key.0, key.1)?;
    let value = bytes(memory, value.0, value.1)?;
    Ok(host.shared.set(&host.vm_id, key, value, cas)?)
}

fn register_shared_queue(c: &mut Ctx<'_>, name: Range, out: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let name = bytes(memory, name.0, name.1)?;
    let id = host.shared.register_queue(host.vm, &host.vm_id, name)?;
    put_u32(c, out, id)
}

fn resolve_shared_queue(c: &mut Ctx<'_>, vm_id: Range, name: Range, out: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let mut vm_id = bytes(memory, vm_id.0, vm_id.1)?;
    if vm_id.is_empty() {
        vm_id = host.vm_id.as_bytes();
    }
    let id = host.shared.resolve_queue(vm_id, bytes(memory, name.0, name.1)?)?;
    put_u32(c, out, id)
}

fn enqueue_shared_queue(c: &mut Ctx<'_>, queue: u32, value: Range) -> Outcome {
    let (memory, host) = view(c)?;
    Ok(host.shared.enqueue(queue, bytes(memory, value.0, value.1)?)?)
}

fn define_metric(c: &mut Ctx<'_>, kind: u32, name: Range, out: u32) -> Outcome {
    let kind = MetricKind::from_abi(kind)?;
    let (memory, host) = view(c)?;
    let name =
        std::str::from_utf8(bytes(memory, name.0, name.1.min(4096))?).map_err(|_| Status::BadArgument)?;
    let id = host.shared.metrics().define(kind, name)?;
    put_u32(c, out, id)
}

fn get_property(c: &mut Ctx<'_>, path: Range, ptr: u32, len: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let path = bytes(memory, path.0, path.1)?;
    let value = host.property(path).ok_or(Status::NotFound)?;
    give(c, ptr, len, |_, out| {
        out.extend_from_slice(&value);
        Ok(())
    })
}

fn set_property(c: &mut Ctx<'_>, path: Range, value: Range) -> Outcome {
    let (memory, host) = view(c)?;
    let path = bytes(memory, path.0, path.1)?;
    let value = bytes(memory, value.0, value.1)?;
    Ok(host.set_filter_state(path, value)?)
}
