//! What the guest asks for about its stream, and calls to other services.

use super::super::callout::{Callout, CalloutKind, GrpcCall, GrpcStream, HttpCall, grpc_upstream};
use super::super::headers::HeaderMap;
use super::super::host::{COPY_MAX_BYTES, Deferred, Host};
use super::super::memory::{Outcome, bytes, give, view, write_u32};
use super::super::status::{Direction, Status};
use super::super::stream::LocalReply;
use super::{Ctx, Range};

pub(super) fn continue_stream(host: &mut Host, kind: u32) -> Outcome {
    let id = host.context();
    let is_connection = host.stream().is_some_and(|stream| stream.connection.is_some());
    let direction = match kind {
        0 => Direction::Request,
        1 => Direction::Response,
        2 => {
            if is_connection {
                host.defer(Deferred::Resume(id));
            }
            return Ok(());
        }
        3 => return Err(Status::Unimplemented.into()),
        _ => return Err(Status::BadArgument.into()),
    };
    if let Some(stream) = host.stream_mut()
        && !is_connection
    {
        stream.request.close_maps();
        host.defer(Deferred::Continue(id, direction));
    }
    Ok(())
}

pub(super) fn close_stream(host: &mut Host, kind: u32) -> Outcome {
    let id = host.context();
    let is_connection = host.stream().map(|stream| stream.connection.is_some());
    match (kind, is_connection) {
        (0 | 1, Some(false)) | (2 | 3, Some(true)) => host.defer(Deferred::Close(id)),
        (0..=3, _) => {}
        _ => return Err(Status::BadArgument.into()),
    }
    Ok(())
}

pub(super) fn get_status(c: &mut Ctx<'_>, code: u32, out: Range) -> Outcome {
    let (memory, host) = view(c)?;
    write_u32(memory, code, host.call_status.0)?;
    give(c, out, |host, out| {
        out.extend_from_slice(host.call_status.1.as_bytes());
        Ok(())
    })
}

pub(super) fn send_local_response(
    c: &mut Ctx<'_>,
    status: u32,
    details: Range,
    body: Range,
    headers: Range,
    grpc_status: u32,
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
        grpc_status: i32::try_from(grpc_status).ok().filter(|status| *status <= 16),
        through_response_callbacks: true,
    };
    let id = host.context();
    // A connection, or a context without a stream, has nothing to reply to; Envoy says Ok all the same.
    if host.stream().is_some_and(|stream| stream.connection.is_none()) {
        host.defer(Deferred::Reply(id, reply));
    }
    Ok(())
}

pub(super) fn http_call(
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
    let complete =
        [&b":method"[..], b":path", b":authority"].iter().all(|name| headers.first(name).is_some());
    // Envoy's timeout is a signed number of milliseconds.
    if !host.knows_upstream(upstream) || !complete || i32::try_from(timeout_ms).is_err() {
        return Err(Status::BadArgument.into());
    }
    if !body.is_empty() {
        headers.replace(b"content-length", body.len().to_string().as_bytes());
    }
    let upstream = upstream.to_owned();
    let size = upstream.len() + headers.byte_size() + body.len() + trailers.byte_size();
    let body = body.to_vec();
    // The guest's memory is tried before the call exists.
    write_u32(memory, out, 0)?;
    let id = host.begin_callout(CalloutKind::HttpCall, size, |id| {
        Callout::Http(HttpCall { id, upstream, headers, body, trailers, timeout_ms })
    })?;
    Ok(write_u32(memory, out, id)?)
}

/// What `proxy_grpc_call` and `proxy_grpc_stream` have in common.
pub(super) struct Grpc {
    pub(super) target: Range,
    pub(super) service: Range,
    pub(super) method: Range,
    pub(super) metadata: Range,
}

/// A unary call with its message and timeout, or without them a stream.
pub(super) fn grpc_call(c: &mut Ctx<'_>, call: Grpc, unary: Option<(Range, u32)>, out: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let text = |range: Range| {
        let text = bytes(memory, range.0, range.1)?;
        String::from_utf8(text.to_vec()).map_err(|_| Status::BadArgument)
    };
    let target = bytes(memory, call.target.0, call.target.1)?;
    let (service, method) = (text(call.service)?, text(call.method)?);
    let metadata = HeaderMap::decode(bytes(memory, call.metadata.0, call.metadata.1)?)?;
    let message = match unary {
        Some(((ptr, len), _)) => bytes(memory, ptr, len)?,
        None => &[],
    };
    let upstream = grpc_upstream(target)?;
    if !host.knows_upstream(&upstream) {
        // What Envoy says when neither a message nor a cluster comes of it.
        return Err(Status::ParseFailure.into());
    }
    let size = target.len() + service.len() + method.len() + metadata.byte_size() + message.len();
    let message = message.to_vec();
    write_u32(memory, out, 0)?;
    let id = match unary {
        Some((_, timeout_ms)) => host.begin_callout(CalloutKind::GrpcCall, size, |id| {
            Callout::Grpc(GrpcCall { id, upstream, service, method, metadata, message, timeout_ms })
        })?,
        None => host.begin_callout(CalloutKind::GrpcStream, size, |id| {
            Callout::Open(GrpcStream { id, upstream, service, method, metadata })
        })?,
    };
    Ok(write_u32(memory, out, id)?)
}

pub(super) fn grpc_send(c: &mut Ctx<'_>, id: u32, message: Range, end_of_stream: u32) -> Outcome {
    let (memory, host) = view(c)?;
    Ok(host.grpc_send(id, bytes(memory, message.0, message.1)?, end_of_stream != 0)?)
}
