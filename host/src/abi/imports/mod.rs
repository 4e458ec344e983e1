//! The 39 `env.proxy_*` host calls of ABI 0.2.1, and what C++ guests import beside them.
//!
//! Each function is short: check the pointers, ask [`Host`], give the answer back. Statuses follow
//! the C++ host (proxy-wasm-cpp-host `src/exports.cc`) and Envoy's `context.cc`, since SDKs panic on
//! a status they do not expect. Here is the table, with the shape of each call's arguments, by which a
//! [`Tape`](super::Tape) reads and answers them; the functions are in `general`, `maps`, `calls` and
//! `shared`. Without a tape, the table costs a branch a call.

mod calls;
mod general;
mod maps;
mod shared;

use wasmtime::{Caller, Linker};

use super::host::Host;
use super::memory::{Outcome, finish, view, write_u32, write_u64};
use super::tape::{Shape, observed};

type Ctx<'a> = Caller<'a, Host>;
/// A pointer and a length, as the guest passes them.
type Range = (u32, u32);

/// Registers the functions in `linker`.
pub(super) fn register(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    /// `name shape (parameters) => call`: one host call, observed.
    macro_rules! host_calls {
        ($($name:ident $shape:literal ($($arg:ident: $ty:ty),*) => |$c:ident| $call:expr;)*) => {$({
            static SHAPE: Shape = Shape::new(stringify!($name), $shape);
            linker.func_wrap("env", SHAPE.name, |mut caller: Ctx<'_>, $($arg: $ty),*| {
                let call = |$c: &mut Ctx<'_>| -> Outcome { $call };
                if caller.data().tape.is_none() {
                    return finish(call(&mut caller));
                }
                let raw: &[u64] = &[$(u64::from($arg)),*];
                observed(&mut caller, &SHAPE, raw, call)
            })?;
        })*};
    }
    host_calls! {
        proxy_log "nb" (level: u32, ptr: u32, len: u32) => |c| general::log(c, level, ptr, len);
        proxy_get_log_level "o" (out: u32) => |c| {
            let level = c.data().log.level() as u32;
            put_u32(c, out, level)
        };
        proxy_get_current_time_nanoseconds "O" (out: u32) => |c| {
            let now = c.data().clock.realtime_ns();
            put_u64(c, out, now)
        };
        proxy_set_tick_period_milliseconds "n" (period: u32) => |c| {
            c.data_mut().tick_period_ms = (period != 0).then_some(period);
            Ok(())
        };
        proxy_set_effective_context "n" (id: u32) => |c| general::set_effective_context(c.data_mut(), id);
        proxy_done "" () => |c| general::done(c.data_mut());
        proxy_call_foreign_function "bbB"
            (name: u32, name_len: u32, args: u32, args_len: u32, out: u32, out_len: u32) =>
            |c| general::call_foreign_function(c, (name, name_len), (args, args_len), (out, out_len));

        proxy_get_buffer_bytes "unnB" (kind: u32, start: u32, max: u32, out: u32, out_len: u32) =>
            |c| maps::get_buffer_bytes(c, kind, start, max, (out, out_len));
        proxy_get_buffer_status "uoo" (kind: u32, len: u32, flags: u32) =>
            |c| maps::get_buffer_status(c, kind, len, flags);
        proxy_set_buffer_bytes "unnb" (kind: u32, start: u32, length: u32, ptr: u32, len: u32) =>
            |c| maps::set_buffer_bytes(c, kind, start, length, (ptr, len));
        proxy_get_header_map_size "mo" (map: u32, out: u32) => |c| maps::get_header_map_size(c, map, out);
        proxy_get_header_map_pairs "mP" (map: u32, out: u32, out_len: u32) =>
            |c| maps::get_header_map_pairs(c, map, (out, out_len));
        proxy_set_header_map_pairs "mp" (map: u32, ptr: u32, len: u32) =>
            |c| maps::set_header_map_pairs(c, map, (ptr, len));
        proxy_get_header_map_value "mbB" (map: u32, key: u32, key_len: u32, out: u32, out_len: u32) =>
            |c| maps::get_header_map_value(c, map, (key, key_len), (out, out_len));
        proxy_add_header_map_value "mbb" (map: u32, key: u32, key_len: u32, value: u32, value_len: u32) =>
            |c| maps::grow_header_map(c, map, (key, key_len), (value, value_len), maps::Growth::Add);
        proxy_replace_header_map_value "mbb"
            (map: u32, key: u32, key_len: u32, value: u32, value_len: u32) =>
            |c| maps::grow_header_map(c, map, (key, key_len), (value, value_len), maps::Growth::Replace);
        proxy_remove_header_map_value "mb" (map: u32, key: u32, key_len: u32) =>
            |c| maps::remove_header_map_value(c, map, (key, key_len));

        proxy_continue_stream "n" (kind: u32) => |c| calls::continue_stream(c.data_mut(), kind);
        proxy_close_stream "n" (kind: u32) => |c| calls::close_stream(c.data_mut(), kind);
        proxy_get_status "oB" (code: u32, out: u32, out_len: u32) =>
            |c| calls::get_status(c, code, (out, out_len));
        proxy_send_local_response "nbbpn"
            (status: u32, details: u32, details_len: u32, body: u32, body_len: u32, headers: u32,
             headers_len: u32, grpc_status: u32) =>
            |c| calls::send_local_response(
                c, status, (details, details_len), (body, body_len), (headers, headers_len), grpc_status,
            );
        proxy_http_call "bpbpno"
            (upstream: u32, upstream_len: u32, headers: u32, headers_len: u32, body: u32, body_len: u32,
             trailers: u32, trailers_len: u32, timeout_ms: u32, out: u32) =>
            |c| calls::http_call(
                c, (upstream, upstream_len), (headers, headers_len), (body, body_len),
                (trailers, trailers_len), timeout_ms, out,
            );
        proxy_grpc_call "bbbpbno"
            (target: u32, target_len: u32, service: u32, service_len: u32, method: u32, method_len: u32,
             metadata: u32, metadata_len: u32, message: u32, message_len: u32, timeout_ms: u32, out: u32) =>
            |c| calls::grpc_call(
                c, calls::Grpc {
                    target: (target, target_len), service: (service, service_len),
                    method: (method, method_len), metadata: (metadata, metadata_len),
                }, Some(((message, message_len), timeout_ms)), out,
            );
        proxy_grpc_stream "bbbpo"
            (target: u32, target_len: u32, service: u32, service_len: u32, method: u32, method_len: u32,
             metadata: u32, metadata_len: u32, out: u32) =>
            |c| calls::grpc_call(
                c, calls::Grpc {
                    target: (target, target_len), service: (service, service_len),
                    method: (method, method_len), metadata: (metadata, metadata_len),
                }, None, out,
            );
        proxy_grpc_send "nbn" (id: u32, message: u32, message_len: u32, end_of_stream: u32) =>
            |c| calls::grpc_send(c, id, (message, message_len), end_of_stream);
        proxy_grpc_cancel "n" (id: u32) => |c| Ok(c.data_mut().grpc_end(id, true)?);
        proxy_grpc_close "n" (id: u32) => |c| Ok(c.data_mut().grpc_end(id, false)?);

        proxy_get_shared_data "bBo" (key: u32, key_len: u32, out: u32, out_len: u32, cas: u32) =>
            |c| shared::get_shared_data(c, (key, key_len), (out, out_len), cas);
        proxy_set_shared_data "bbn" (key: u32, key_len: u32, value: u32, value_len: u32, cas: u32) =>
            |c| shared::set_shared_data(c, (key, key_len), (value, value_len), cas);
        proxy_register_shared_queue "bo" (name: u32, name_len: u32, out: u32) =>
            |c| shared::register_shared_queue(c, (name, name_len), out);
        proxy_resolve_shared_queue "bbo" (vm_id: u32, vm_id_len: u32, name: u32, name_len: u32, out: u32) =>
            |c| shared::resolve_shared_queue(c, (vm_id, vm_id_len), (name, name_len), out);
        proxy_enqueue_shared_queue "nb" (queue: u32, value: u32, value_len: u32) =>
            |c| shared::enqueue_shared_queue(c, queue, (value, value_len));
        proxy_dequeue_shared_queue "nB" (queue: u32, out: u32, out_len: u32) =>
            |c| shared::dequeue_shared_queue(c, queue, (out, out_len));
        proxy_define_metric "nbo" (kind: u32, name: u32, name_len: u32, out: u32) =>
            |c| shared::define_metric(c, kind, (name, name_len), out);
        proxy_record_metric "nL" (id: u32, value: u64) =>
            |c| c.data().shared.metrics().record(id, value).map_err(Into::into);
        proxy_increment_metric "nL" (id: u32, offset: u64) =>
            |c| c.data().shared.metrics().increment(id, offset.cast_signed()).map_err(Into::into);
        proxy_get_metric "nO" (id: u32, out: u32) => |c| {
            let value = c.data().shared.metrics().current(id)?;
            put_u64(c, out, value)
        };
        proxy_get_property "bB" (path: u32, path_len: u32, out: u32, out_len: u32) =>
            |c| shared::get_property(c, (path, path_len), (out, out_len));
        proxy_set_property "bb" (path: u32, path_len: u32, value: u32, value_len: u32) =>
            |c| shared::set_property(c, (path, path_len), (value, value_len));
    }
    linker.func_wrap("env", "emscripten_notify_memory_growth", |_: Ctx<'_>, _: u32| {})?;
    linker.func_wrap("env", "pthread_equal", |_: Ctx<'_>, a: u32, b: u32| u32::from(a == b))?;
    Ok(())
}

fn put_u32(c: &mut Ctx<'_>, out: u32, value: u32) -> Outcome {
    let (memory, _) = view(c)?;
    Ok(write_u32(memory, out, value)?)
}

fn put_u64(c: &mut Ctx<'_>, out: u32, value: u64) -> Outcome {
    let (memory, _) = view(c)?;
    Ok(write_u64(memory, out, value)?)
}
