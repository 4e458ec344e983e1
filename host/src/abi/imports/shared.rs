//! Shared data, queues, metrics, properties.

use super::super::memory::{Outcome, bytes, give, view};
use super::super::metrics::MetricKind;
use super::super::status::Status;
use super::{Ctx, Range, put_u32};

pub(super) fn get_shared_data(c: &mut Ctx<'_>, key: Range, out: Range, cas_out: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let key = bytes(memory, key.0, key.1)?;
    let (value, cas) = host.shared.value(&host.vm_id, key).ok_or(Status::NotFound)?;
    give(c, out, |_, out| {
        out.extend_from_slice(&value);
        Ok(())
    })?;
    put_u32(c, cas_out, cas)
}

pub(super) fn set_shared_data(c: &mut Ctx<'_>, key: Range, value: Range, cas: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let key = bytes(memory, key.0, key.1)?;
    let value = bytes(memory, value.0, value.1)?;
    Ok(host.shared.set(&host.vm_id, key, value, cas)?)
}

pub(super) fn register_shared_queue(c: &mut Ctx<'_>, name: Range, out: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let name = bytes(memory, name.0, name.1)?;
    let id = host.shared.register_queue(&host.vm, &host.vm_id, name)?;
    put_u32(c, out, id)
}

pub(super) fn resolve_shared_queue(c: &mut Ctx<'_>, vm_id: Range, name: Range, out: u32) -> Outcome {
    let (memory, host) = view(c)?;
    let mut vm_id = bytes(memory, vm_id.0, vm_id.1)?;
    if vm_id.is_empty() {
        vm_id = host.vm_id.as_bytes();
    }
    let id = host.shared.resolve_queue(vm_id, bytes(memory, name.0, name.1)?)?;
    put_u32(c, out, id)
}

pub(super) fn enqueue_shared_queue(c: &mut Ctx<'_>, queue: u32, value: Range) -> Outcome {
    let (memory, host) = view(c)?;
    Ok(host.shared.enqueue(queue, bytes(memory, value.0, value.1)?)?)
}

pub(super) fn dequeue_shared_queue(c: &mut Ctx<'_>, queue: u32, out: Range) -> Outcome {
    give(c, out, |host, out| {
        out.extend_from_slice(&host.shared.dequeue(queue)?);
        Ok(())
    })
}

pub(super) fn define_metric(c: &mut Ctx<'_>, kind: u32, name: Range, out: u32) -> Outcome {
    let kind = MetricKind::from_abi(kind)?;
    let (memory, host) = view(c)?;
    let name =
        std::str::from_utf8(bytes(memory, name.0, name.1.min(4096))?).map_err(|_| Status::BadArgument)?;
    let id = host.shared.metrics().define(kind, name)?;
    put_u32(c, out, id)
}

pub(super) fn get_property(c: &mut Ctx<'_>, path: Range, out: Range) -> Outcome {
    let (memory, host) = view(c)?;
    let path = bytes(memory, path.0, path.1)?;
    let value = host.property(path).ok_or(Status::NotFound)?;
    give(c, out, |_, out| {
        out.extend_from_slice(&value);
        Ok(())
    })
}

pub(super) fn set_property(c: &mut Ctx<'_>, path: Range, value: Range) -> Outcome {
    let (memory, host) = view(c)?;
    let path = bytes(memory, path.0, path.1)?;
    let value = bytes(memory, value.0, value.1)?;
    Ok(host.set_filter_state(path, value)?)
}
