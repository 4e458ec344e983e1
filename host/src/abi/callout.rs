//! Calls that the guest makes to other services: what it asks for, and what comes back.
//!
//! The host does no I/O. After a callback the caller hands [`Plugin::send_callouts`] a [`Transport`],
//! which starts what the guest asked for, and answers later through [`Plugin::http_call_response`] and
//! [`Plugin::grpc_event`]. Tokens are numbered as Envoy numbers them (the kind in the two lowest bits).
//! Cost: one copy of the bytes out of the guest. Bounded by [`Limits::outstanding_callouts`] and, in
//! bytes, by what is not sent yet.
//!
//! Left out on purpose: Envoy's `google_grpc` targets (another gRPC client with its own credentials)
//! are refused with `BadArgument`.

use std::collections::BTreeMap;

use super::headers::HeaderMap;
use super::host::{COPY_MAX_BYTES, Host};
use super::status::Status;
#[cfg(doc)]
use super::{Limits, Plugin};

/// A request that the guest wants sent; answer it with [`Plugin::http_call_response`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpCall {
    /// Names the call in its answer.
    pub id: u32,
    /// The upstream (cluster) to send to.
    pub upstream: String,
    /// Headers with `:method`, `:path` and `:authority`.
    pub headers: HeaderMap,
    /// The body.
    pub body: Vec<u8>,
    /// The trailers.
    pub trailers: HeaderMap,
    /// How long the guest wants to wait, in milliseconds; 0 for as long as it takes. Out of time is
    /// answered as Envoy does: a response with `:status` 504 and the body `upstream request timeout`.
    pub timeout_ms: u32,
}

/// An answer to an [`HttpCall`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HttpCallResponse {
    /// Headers, `:status` included.
    pub headers: HeaderMap,
    /// The body.
    pub body: Vec<u8>,
    /// The trailers.
    pub trailers: HeaderMap,
}

/// A unary gRPC call; answer it with [`Plugin::grpc_event`]: one [`GrpcEvent::Message`] when it
/// succeeded, one [`GrpcEvent::Closed`] with the status when it failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcCall {
    /// Names the call in its answer.
    pub id: u32,
    /// The upstream (cluster) to send to.
    pub upstream: String,
    /// Full name of the service.
    pub service: String,
    /// The method.
    pub method: String,
    /// Initial metadata.
    pub metadata: HeaderMap,
    /// The request message, without gRPC framing.
    pub message: Vec<u8>,
    /// How long the guest wants to wait, in milliseconds.
    pub timeout_ms: u32,
}

/// A gRPC stream to open; what happens on it is told through [`Plugin::grpc_event`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcStream {
    /// Names the stream.
    pub id: u32,
    /// The upstream (cluster) to send to.
    pub upstream: String,
    /// Full name of the service.
    pub service: String,
    /// The method.
    pub method: String,
    /// Initial metadata.
    pub metadata: HeaderMap,
}

/// What comes back on a gRPC call or stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GrpcEvent {
    /// The server's initial metadata (streams only; Envoy does not report a unary call's).
    InitialMetadata(HeaderMap),
    /// One message, without gRPC framing.
    Message(Vec<u8>),
    /// The server's trailing metadata (streams only).
    TrailingMetadata(HeaderMap),
    /// The end, with the gRPC status (0 to 16) and its text.
    Closed {
        /// The gRPC status.
        status: u32,
        /// Its text.
        message: String,
    },
}

/// Carries call-outs to the network. Each method only starts something; it must not block.
pub trait Transport {
    /// Sends a request.
    fn http_call(&mut self, call: HttpCall);
    /// Sends a unary gRPC request.
    fn grpc_call(&mut self, call: GrpcCall);
    /// Opens a gRPC stream.
    fn grpc_stream(&mut self, stream: GrpcStream);
    /// Sends a message on an open stream; `end_of_stream` half-closes it after that.
    fn grpc_send(&mut self, id: u32, message: Vec<u8>, end_of_stream: bool);
    /// Half-closes a stream: the server's answers are still wanted.
    fn grpc_close(&mut self, id: u32);
    /// Ends a call or a stream at once; nothing more is reported about it.
    fn grpc_cancel(&mut self, id: u32);
}

/// What waits to be handed to a transport.
pub(super) enum Callout {
    Http(HttpCall),
    Grpc(GrpcCall),
    Open(GrpcStream),
    Send(u32, Vec<u8>, bool),
    Close(u32),
    Cancel(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum CalloutKind {
    HttpCall = 0,
    GrpcCall = 1,
    GrpcStream = 2,
}

impl CalloutKind {
    /// The kind that a token's lowest bits name.
    pub(super) fn of(id: u32) -> Option<Self> {
        Some(match id & 3 {
            0 => Self::HttpCall,
            1 => Self::GrpcCall,
            2 => Self::GrpcStream,
            _ => return None,
        })
    }
}

/// Which ends of a gRPC stream are closed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) local: bool,
    pub(super) remote: bool,
}

/// The call-outs of one VM.
#[derive(Default)]
pub(super) struct Callouts {
    /// Next number of each kind, without its kind bits.
    next: [u32; 3],
    pub(super) outstanding: BTreeMap<u32, Ends>,
    queue: Vec<Callout>,
    queued_bytes: usize,
}

impl Callouts {
    /// A token of `kind` that is not in use.
    fn fresh(&mut self, kind: CalloutKind) -> u32 {
        let next = &mut self.next[kind as usize];
        loop {
            *next = next.wrapping_add(1) & (u32::MAX >> 2);
            let id = *next << 2 | kind as u32;
            if id > 2 && !self.outstanding.contains_key(&id) {
                return id;
            }
        }
    }

    /// Queues a call-out that carries `bytes`.
    fn push(&mut self, callout: Callout, bytes: usize) -> Result<(), Status> {
        // An entry without bytes takes room too.
        let after = self.queued_bytes.saturating_add(bytes).saturating_add(64);
        if after > COPY_MAX_BYTES {
            return Err(Status::InternalFailure);
        }
        self.queued_bytes = after;
        self.queue.push(callout);
        Ok(())
    }

    /// What waits, in the order it was asked for.
    pub(super) fn take(&mut self) -> Vec<Callout> {
        self.queued_bytes = 0;
        std::mem::take(&mut self.queue)
    }
}

impl Host {
    /// Starts a call-out of `kind`; `make` is given its token.
    pub(super) fn begin_callout(
        &mut self,
        kind: CalloutKind,
        bytes: usize,
        make: impl FnOnce(u32) -> Callout,
    ) -> Result<u32, Status> {
        if self.callouts.outstanding.len() >= self.limits.outstanding_callouts {
            // Streams that the peer ended and the guest never closed make room first.
            self.callouts.outstanding.retain(|_, ends| !ends.remote);
        }
        if self.callouts.outstanding.len() >= self.limits.outstanding_callouts {
            return Err(Status::InternalFailure);
        }
        let id = self.callouts.fresh(kind);
        self.callouts.push(make(id), bytes)?;
        self.callouts.outstanding.insert(id, Ends::default());
        Ok(id)
    }

    /// Whether the caller has this upstream.
    pub(super) fn knows_upstream(&self, name: &str) -> bool {
        self.upstreams.as_ref().is_none_or(|known| known.contains(name))
    }

    /// `proxy_grpc_send`.
    pub(super) fn grpc_send(&mut self, id: u32, message: &[u8], end_of_stream: bool) -> Result<(), Status> {
        if CalloutKind::of(id) != Some(CalloutKind::GrpcStream) {
            return Err(Status::BadArgument);
        }
        let Some(ends) = self.callouts.outstanding.get_mut(&id) else { return Err(Status::NotFound) };
        if ends.local || ends.remote {
            // Envoy drops what is sent after an end, and says Ok.
            return Ok(());
        }
        ends.local = end_of_stream;
        self.callouts.push(Callout::Send(id, message.to_vec(), end_of_stream), message.len())
    }

    /// `proxy_grpc_close` and `proxy_grpc_cancel`. Closing a stream only half-closes it.
    pub(super) fn grpc_end(&mut self, id: u32, cancel: bool) -> Result<(), Status> {
        let kind = match CalloutKind::of(id) {
            Some(CalloutKind::HttpCall) | None => return Err(Status::BadArgument),
            Some(kind) => kind,
        };
        let ends = self.callouts.outstanding.get_mut(&id).ok_or(Status::NotFound)?;
        if cancel || kind == CalloutKind::GrpcCall || ends.remote {
            let over = ends.remote;
            self.callouts.outstanding.remove(&id);
            return if over { Ok(()) } else { self.callouts.push(Callout::Cancel(id), 0) };
        }
        if std::mem::replace(&mut ends.local, true) {
            return Ok(());
        }
        self.callouts.push(Callout::Close(id), 0)
    }
}

/// The cluster that `proxy_grpc_call` and `proxy_grpc_stream` name: an Envoy `GrpcService` message, or
/// the plain name, which is what most SDKs pass.
pub(super) fn grpc_upstream(service: &[u8]) -> Result<String, Status> {
    match envoy_grpc_cluster(service) {
        Some(Some(cluster)) => Ok(cluster),
        Some(None) => Err(Status::BadArgument),
        None => String::from_utf8(service.to_vec()).map_err(|_| Status::ParseFailure),
    }
}

/// Reads `GrpcService.envoy_grpc.cluster_name` (fields 1 and 1 of `envoy.config.core.v3.GrpcService`).
/// `None` when the bytes are no such message; `Some(None)` when it names no cluster.
fn envoy_grpc_cluster(message: &[u8]) -> Option<Option<String>> {
    let mut cluster = None;
    for_each_field(message, |field, value| {
        if field == 1
            && let Some(value) = value
        {
            for_each_field(value, |field, value| {
                if field == 1
                    && let Some(name) = value
                {
                    cluster = Some(String::from_utf8(name.to_vec()).ok()?);
                }
                Some(())
            })?;
        }
        Some(())
    })?;
    Some(cluster)
}

/// Walks the fields of a protobuf message: number, and bytes where the field is length-delimited.
/// `None` when it is not one.
pub(super) fn for_each_field<'a>(
    mut rest: &'a [u8],
    mut each: impl FnMut(u64, Option<&'a [u8]>) -> Option<()>,
) -> Option<()> {
    fn varint(rest: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, tail) = rest.split_first()?;
            *rest = tail;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
    fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
        let (head, tail) = rest.split_at_checked(count)?;
        *rest = tail;
        Some(head)
    }
    while !rest.is_empty() {
        let tag = varint(&mut rest)?;
        let bytes = match tag & 7 {
            0 => varint(&mut rest).map(|_| None)?,
            1 => take(&mut rest, 8).map(|_| None)?,
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                Some(take(&mut rest, length)?)
            }
            5 => take(&mut rest, 4).map(|_| None)?,
            _ => return None,
        };
        if tag >> 3 == 0 {
            return None;
        }
        each(tag >> 3, bytes)?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_target_is_a_message_or_a_name() {
        let message = [&[0x0a, 6, 0x0a, 4][..], b"auth"].concat();
        assert_eq!(grpc_upstream(&message), Ok("auth".to_owned()));
        assert_eq!(grpc_upstream(b"auth"), Ok("auth".to_owned()));
        assert_eq!(grpc_upstream(b"grpcbin"), Ok("grpcbin".to_owned()));
        let google = [&[0x12, 6, 0x0a, 4][..], b"host"].concat();
        assert_eq!(grpc_upstream(&google), Err(Status::BadArgument));
        assert_eq!(grpc_upstream(&[0xff, 0xfe]), Err(Status::ParseFailure));
    }

    #[test]
    fn tokens_name_their_kind_and_are_not_reused_while_open() {
        let mut callouts = Callouts::default();
        for kind in [CalloutKind::HttpCall, CalloutKind::GrpcCall, CalloutKind::GrpcStream] {
            let id = callouts.fresh(kind);
            assert_eq!(CalloutKind::of(id), Some(kind));
            callouts.outstanding.insert(id, Ends::default());
            callouts.next[kind as usize] = u32::MAX >> 2;
            let after_rollover = callouts.fresh(kind);
            assert!(after_rollover != id && after_rollover > 2);
        }
    }
}
