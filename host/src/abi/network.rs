//! TCP connections: the network-filter half of the ABI.
//!
//! A caller opens one with [`Plugin::connection`], reports bytes from either end, and obeys the
//! [`Step`]s as for HTTP; bytes that the guest stops are shown to it again together with the next. A
//! stopped chunk from the upstream waits here too, where Envoy loses it. The last callbacks come in
//! Envoy's order for connections: `proxy_on_done`, `proxy_on_log`, `proxy_on_delete`.

use super::error::AbiError;
use super::plugin::{Plugin, StreamId};
use super::status::Status;
use super::stream::{Release, Step, replace};

/// Who closed a connection, as the guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ClosedBy {
    /// Not known.
    Unknown = 0,
    /// This proxy.
    Local = 1,
    /// The peer.
    Remote = 2,
}

/// Which end of a connection bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The client.
    Downstream,
    /// The server.
    Upstream,
}

/// Bytes in one direction.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    pub(super) bytes: Vec<u8>,
    /// The guest may see and change them: in the callback, and after one that stopped.
    open: bool,
    ended: bool,
}

/// One connection.
#[derive(Debug, Default)]
pub(super) struct Connection {
    downstream: Pipe,
    upstream: Pipe,
    closed: bool,
}

impl Connection {
    fn pipe_mut(&mut self, peer: Peer) -> &mut Pipe {
        match peer {
            Peer::Downstream => &mut self.downstream,
            Peer::Upstream => &mut self.upstream,
        }
    }

    pub(super) fn visible(&self, peer: Peer) -> &[u8] {
        let pipe = match peer {
            Peer::Downstream => &self.downstream,
            Peer::Upstream => &self.upstream,
        };
        if pipe.open { &pipe.bytes } else { &[] }
    }

    pub(super) fn replace(
        &mut self,
        peer: Peer,
        range: (usize, usize),
        data: &[u8],
        max_bytes: usize,
    ) -> Result<(), Status> {
        let pipe = self.pipe_mut(peer);
        if !pipe.open {
            return Err(Status::BadArgument);
        }
        replace(&mut pipe.bytes, range, data, max_bytes)
    }

    /// The guest resumed reading from the client: what was stopped goes on without it.
    pub(super) fn resume(&mut self) -> Option<Release> {
        let pipe = &mut self.downstream;
        if self.closed || !std::mem::take(&mut pipe.open) {
            return None;
        }
        Some(Release {
            body: std::mem::take(&mut pipe.bytes),
            end_of_stream: pipe.ended,
            ..Release::default()
        })
    }

    pub(super) fn close(&mut self) -> Step {
        self.closed = true;
        self.downstream = Pipe::default();
        self.upstream = Pipe::default();
        Step::Close
    }
}

impl Plugin {
    /// Opens a connection: creates its context and runs `proxy_on_new_connection`. With
    /// [`Step::Hold`] the guest wants no connection to the upstream yet.
    ///
    /// # Errors
    /// The VM is lost, or is lost in one of the two callbacks.
    pub fn connection(&mut self) -> Result<(StreamId, Step), AbiError> {
        let id = self.stream()?;
        self.stream_mut(id)?.connection = Some(Connection::default());
        let action = self.vm.call(&self.exports.new_connection, id.0, id.0)?.unwrap_or(0);
        let step = self.settle_connection(id, |_| {
            if action == 0 { Step::Forward(Release::default()) } else { Step::Hold }
        });
        self.drain();
        Ok((id, step?))
    }

    /// Bytes arrived from one end. `end_of_stream`: that end has closed its half.
    ///
    /// # Errors
    /// A lost VM, or an unknown connection.
    pub fn connection_data(
        &mut self,
        id: StreamId,
        from: Peer,
        data: &[u8],
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.vm.check()?;
        let connection = self.connection_mut(id)?;
        if connection.closed {
            return Ok(Step::Hold);
        }
        let pipe = connection.pipe_mut(from);
        pipe.bytes.extend_from_slice(data);
        pipe.ended |= end_of_stream;
        pipe.open = true;
        let size = u32::try_from(pipe.bytes.len()).unwrap_or(u32::MAX);
        let callback = match from {
            Peer::Downstream => &self.exports.downstream_data,
            Peer::Upstream => &self.exports.upstream_data,
        };
        let action = self.vm.call(callback, id.0, (id.0, size, u32::from(end_of_stream)))?.unwrap_or(0);
        let step = self.settle_connection(id, |connection| {
            let pipe = connection.pipe_mut(from);
            if action != 0 {
                return Step::Hold;
            }
            pipe.open = false;
            let body = std::mem::take(&mut pipe.bytes);
            Step::Forward(Release { body, end_of_stream: pipe.ended, ..Release::default() })
        })?;
        if end_of_stream && from == Peer::Upstream {
            // As in Envoy, the end of the server's bytes is the close of its connection.
            self.connection_closed(id, Peer::Upstream, ClosedBy::Unknown)?;
        }
        self.drain();
        Ok(step)
    }

    /// A connection to one end is gone. Call [`Plugin::done`] when both are.
    ///
    /// # Errors
    /// A lost VM, or an unknown connection.
    pub fn connection_closed(&mut self, id: StreamId, end: Peer, by: ClosedBy) -> Result<(), AbiError> {
        self.vm.check()?;
        self.connection_mut(id)?;
        let callback = match end {
            Peer::Downstream => &self.exports.downstream_connection_close,
            Peer::Upstream => &self.exports.upstream_connection_close,
        };
        self.vm.call(callback, id.0, (id.0, by as u32))?;
        self.drain();
        Ok(())
    }

    fn connection_mut(&mut self, id: StreamId) -> Result<&mut Connection, AbiError> {
        let unknown = AbiError::UnknownStream { id: id.0 };
        self.stream_mut(id)?.connection.as_mut().ok_or(unknown)
    }

    /// Turns a callback's outcome into a step; a close from within it decides, and a resume.
    fn settle_connection(
        &mut self,
        id: StreamId,
        outcome: impl FnOnce(&mut Connection) -> Step,
    ) -> Result<Step, AbiError> {
        let own = self.take_own(id, None);
        let connection = self.connection_mut(id)?;
        if own.end.is_some() {
            return Ok(connection.close());
        }
        Ok(match outcome(connection) {
            Step::Hold if own.continued => connection.resume().map_or(Step::Hold, Step::Forward),
            step => step,
        })
    }
}
