//! Header maps and buffers.

use super::super::headers::{HeaderMap, PAIRS_MAX_BYTES};
use super::super::host::COPY_MAX_BYTES;
use super::super::memory::{Outcome, bytes, give, view, write_u32};
use super::super::network::Peer;
use super::super::status::{BufferType, Direction, MapType, Status};
use super::{Ctx, Range, put_u32};

/// Most entries that guest calls may grow one header map to.
const HEADERS_MAX_COUNT: usize = 4096;

pub(super) fn get_buffer_bytes(c: &mut Ctx<'_>, kind: u32, start: u32, max: u32, out: Range) -> Outcome {
    let kind = BufferType::from_abi(kind)?;
    let buffer = c.data().buffer(kind)?;
    // Out of range is nothing, a null pointer, and not an error.
    let start = (start as usize).min(buffer.len());
    let end = start.saturating_add(max as usize).min(buffer.len());
    give(c, out, |host, out| {
        out.extend_from_slice(host.buffer(kind)?.get(start..end).unwrap_or_default());
        Ok(())
    })
}

pub(super) fn get_buffer_status(c: &mut Ctx<'_>, kind: u32, len: u32, flags: u32) -> Outcome {
    let kind = BufferType::from_abi(kind)?;
    let (memory, host) = view(c)?;
    let size = u32::try_from(host.buffer(kind)?.len()).unwrap_or(u32::MAX);
    write_u32(memory, len, size)?;
    Ok(write_u32(memory, flags, 0)?)
}

pub(super) fn set_buffer_bytes(c: &mut Ctx<'_>, kind: u32, start: u32, length: u32, data: Range) -> Outcome {
    let kind = BufferType::from_abi(kind)?;
    let (memory, host) = view(c)?;
    // The others cannot be changed; a missing one is NotFound.
    let changeable = matches!(
        kind,
        BufferType::RequestBody
            | BufferType::ResponseBody
            | BufferType::DownstreamData
            | BufferType::UpstreamData
    );
    if !changeable {
        return host.buffer(kind).and(Err(Status::BadArgument)).map_err(Into::into);
    }
    let data = bytes(memory, data.0, data.1)?;
    let stream = host.stream_mut().ok_or(Status::BadArgument)?;
    let (start, length) = (start as usize, length as usize);
    let mut on_connection = |peer| {
        let connection = stream.connection.as_mut().ok_or(Status::BadArgument)?;
        connection.replace(peer, (start, length), data, COPY_MAX_BYTES)
    };
    match kind {
        BufferType::DownstreamData => on_connection(Peer::Downstream)?,
        BufferType::UpstreamData => on_connection(Peer::Upstream)?,
        BufferType::ResponseBody => {
            stream.side_mut(Direction::Response).replace_body(start, length, data, COPY_MAX_BYTES)?;
        }
        _ => stream.side_mut(Direction::Request).replace_body(start, length, data, COPY_MAX_BYTES)?,
    }
    Ok(())
}

pub(super) fn get_header_map_size(c: &mut Ctx<'_>, map: u32, out: u32) -> Outcome {
    let kind = MapType::from_abi(map)?;
    let size = c.data_mut().writable_map(kind)?.byte_size();
    put_u32(c, out, u32::try_from(size).unwrap_or(u32::MAX))
}

pub(super) fn get_header_map_pairs(c: &mut Ctx<'_>, map: u32, out: Range) -> Outcome {
    let kind = MapType::from_abi(map)?;
    give(c, out, |host, out| {
        // A map that is not there reads as an empty one.
        if let Some(headers) = host.readable_map(kind) {
            headers.encode(out);
        }
        Ok(())
    })
}

pub(super) fn set_header_map_pairs(c: &mut Ctx<'_>, map: u32, pairs: Range) -> Outcome {
    let kind = MapType::from_abi(map)?;
    let (memory, host) = view(c)?;
    let headers = HeaderMap::decode(bytes(memory, pairs.0, pairs.1)?)?;
    *host.writable_map(kind)? = headers;
    Ok(())
}

pub(super) fn get_header_map_value(c: &mut Ctx<'_>, map: u32, key: Range, out: Range) -> Outcome {
    let kind = MapType::from_abi(map)?;
    let (memory, host) = view(c)?;
    let key = bytes(memory, key.0, key.1)?;
    let Some(headers) = host.readable_map(kind) else {
        let logging = host.stream().is_some_and(|stream| stream.log_phase);
        return Err(if logging { Status::NotFound.into() } else { Status::BadArgument.into() });
    };
    let value = headers.first(key).ok_or(Status::NotFound)?.to_vec();
    give(c, out, |_, out| {
        out.extend_from_slice(&value);
        Ok(())
    })
}

/// How a value comes into a map.
#[derive(Clone, Copy)]
pub(super) enum Growth {
    Add,
    Replace,
}

pub(super) fn grow_header_map(c: &mut Ctx<'_>, map: u32, key: Range, value: Range, how: Growth) -> Outcome {
    let kind = MapType::from_abi(map)?;
    let (memory, host) = view(c)?;
    let key = bytes(memory, key.0, key.1)?;
    let value = bytes(memory, value.0, value.1)?;
    let headers = host.writable_map(kind)?;
    let after = headers.byte_size().saturating_add(key.len()).saturating_add(value.len());
    if headers.len() >= HEADERS_MAX_COUNT || after > PAIRS_MAX_BYTES {
        return Err(Status::BadArgument.into());
    }
    match how {
        Growth::Add => headers.add(key, value),
        Growth::Replace => headers.replace(key, value),
    }
    Ok(())
}

pub(super) fn remove_header_map_value(c: &mut Ctx<'_>, map: u32, key: Range) -> Outcome {
    let kind = MapType::from_abi(map)?;
    let (memory, host) = view(c)?;
    let key = bytes(memory, key.0, key.1)?;
    host.writable_map(kind)?.remove(key);
    Ok(())
}
