//! The callbacks of an exchange, and what the guest asks for beside them.
//!
//! Each report runs at most one callback, then `settle` turns the guest's answer and its own host calls
//! into a [`Step`]; whatever concerns something else waits in a queue and becomes [`Event`]s. The rules
//! themselves are in `stream`.

use super::error::AbiError;
use super::headers::HeaderMap;
use super::host::Deferred;
use super::network::Connection;
use super::plugin::{Plugin, StreamId};
use super::status::Direction;
use super::stream::{BodyCall, Event, LocalReply, Resume, Settled, Side, Step, Stream, is_grpc};

/// What a callback asked for about its own side.
pub(super) struct Own {
    /// A reply or a close.
    pub(super) end: Option<Deferred>,
    /// Continue, or resume.
    pub(super) continued: bool,
}

impl Plugin {
    /// The request's headers arrived.
    ///
    /// # Errors
    /// A lost VM, an unknown stream, or headers that came twice.
    pub fn request_headers(
        &mut self,
        id: StreamId,
        headers: HeaderMap,
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.headers(id, Direction::Request, headers, end_of_stream)
    }

    /// The response's headers arrived, `:status` included.
    ///
    /// # Errors
    /// As for [`Plugin::request_headers`].
    pub fn response_headers(
        &mut self,
        id: StreamId,
        headers: HeaderMap,
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.headers(id, Direction::Response, headers, end_of_stream)
    }

    /// A chunk of the request's body arrived. Not to be called for a request without a body; an
    /// empty last chunk is fine.
    ///
    /// # Errors
    /// A lost VM, an unknown stream, or a body before its headers or after its end.
    pub fn request_body(
        &mut self,
        id: StreamId,
        chunk: &[u8],
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.body(id, Direction::Request, chunk, end_of_stream)
    }

    /// A chunk of the response's body arrived.
    ///
    /// # Errors
    /// As for [`Plugin::request_body`].
    pub fn response_body(
        &mut self,
        id: StreamId,
        chunk: &[u8],
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.body(id, Direction::Response, chunk, end_of_stream)
    }

    /// The request's trailers arrived; they end it.
    ///
    /// # Errors
    /// A lost VM, an unknown stream, or trailers before headers or after the end.
    pub fn request_trailers(&mut self, id: StreamId, trailers: HeaderMap) -> Result<Step, AbiError> {
        self.trailers(id, Direction::Request, trailers)
    }

    /// The response's trailers arrived; they end it.
    ///
    /// # Errors
    /// As for [`Plugin::request_trailers`].
    pub fn response_trailers(&mut self, id: StreamId, trailers: HeaderMap) -> Result<Step, AbiError> {
        self.trailers(id, Direction::Response, trailers)
    }

    fn side_mut(&mut self, id: StreamId, direction: Direction) -> Result<&mut Side, AbiError> {
        Ok(self.stream_mut(id)?.side_mut(direction))
    }

    fn headers(
        &mut self,
        id: StreamId,
        direction: Direction,
        headers: HeaderMap,
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.vm.check()?;
        let side = self.side_mut(id, direction)?;
        if side.headers.is_some() {
            return Err(AbiError::OutOfOrder { part: "headers", rule: "each side has one set of headers" });
        }
        if side.over {
            return Ok(Step::Hold);
        }
        let number = count(headers.len());
        side.begin_headers(headers, end_of_stream);
        if direction == Direction::Response {
            // Unless it is the guest's own reply that comes by.
            let stream = self.stream_mut(id)?;
            stream.code_details.get_or_insert("via_upstream".into());
        }
        let action = self.call_headers(id.0, direction, number, end_of_stream)?;
        let pause = self.headers_pause;
        let step = self.settle(id, direction, |side| side.settle_headers(action, pause));
        self.drain();
        step
    }

    fn body(
        &mut self,
        id: StreamId,
        direction: Direction,
        chunk: &[u8],
        end_of_stream: bool,
    ) -> Result<Step, AbiError> {
        self.vm.check()?;
        let side = self.side_mut(id, direction)?;
        side.check_open("body")?;
        if side.over {
            return Ok(Step::Hold);
        }
        let step = match side.begin_body(chunk, end_of_stream) {
            BodyCall::Call(size) => {
                if side.overflowed {
                    // Envoy's reply stands before the callback that shows what was too much.
                    self.stream_mut(id)?.reply_status = Some(PAYLOAD_TOO_LARGE);
                }
                let action = self.call_body(id.0, direction, count(size), end_of_stream)?;
                self.settle(id, direction, |side| side.settle_body(action))
            }
            BodyCall::Settled(settled) => self.settle(id, direction, |_| settled),
        };
        self.drain();
        step
    }

    fn trailers(
        &mut self,
        id: StreamId,
        direction: Direction,
        trailers: HeaderMap,
    ) -> Result<Step, AbiError> {
        self.vm.check()?;
        let side = self.side_mut(id, direction)?;
        side.check_open("trailers")?;
        if side.over {
            return Ok(Step::Hold);
        }
        let step = match side.begin_trailers(trailers) {
            Some(number) => {
                let action = self.call_trailers(id.0, direction, count(number))?;
                self.settle(id, direction, |side| side.settle_trailers(action))
            }
            None => Ok(Step::Hold),
        };
        self.drain();
        step
    }

    fn call_headers(
        &mut self,
        id: u32,
        direction: Direction,
        number: u32,
        end: bool,
    ) -> Result<u32, AbiError> {
        let callback = &self.exports.side(direction).headers;
        Ok(self.vm.call(callback, id, (id, number, u32::from(end)))?.unwrap_or(0))
    }

    fn call_body(&mut self, id: u32, direction: Direction, size: u32, end: bool) -> Result<u32, AbiError> {
        let callback = &self.exports.side(direction).body;
        Ok(self.vm.call(callback, id, (id, size, u32::from(end)))?.unwrap_or(0))
    }

    fn call_trailers(&mut self, id: u32, direction: Direction, number: u32) -> Result<u32, AbiError> {
        let callback = &self.exports.side(direction).trailers;
        Ok(self.vm.call(callback, id, (id, number))?.unwrap_or(0))
    }

    /// Takes from what the guest asked for what is about this very side (or, with no direction, this
    /// connection); the rest waits in `later`.
    pub(super) fn take_own(&mut self, id: StreamId, direction: Option<Direction>) -> Own {
        let mut own = Own { end: None, continued: false };
        for deferred in std::mem::take(&mut self.vm.store.data_mut().deferred) {
            match deferred {
                Deferred::Continue(stream, side) if stream == id.0 && Some(side) == direction => {
                    own.continued = true;
                }
                Deferred::Resume(stream) if stream == id.0 && direction.is_none() => own.continued = true,
                Deferred::Reply(..) | Deferred::Close(_) if deferred.stream() == id.0 => {
                    // The first one decides, as a stream can be ended once.
                    own.end.get_or_insert(deferred);
                }
                other => self.later.push_back(other),
            }
        }
        own
    }

    /// Turns a callback's outcome into a step.
    fn settle(
        &mut self,
        id: StreamId,
        direction: Direction,
        outcome: impl FnOnce(&mut Side) -> Settled,
    ) -> Result<Step, AbiError> {
        let own = self.take_own(id, Some(direction));
        let continued = own.continued;
        let stream = self.stream_mut(id)?;
        match own.end {
            Some(Deferred::Reply(_, reply)) => return Ok(end_with_reply(stream, reply)),
            Some(_) => return Ok(end_with_reset(stream)),
            None => {}
        }
        match outcome(stream.side_mut(direction)) {
            Settled::Forward(release) => Ok(Step::Forward(release)),
            Settled::OverLimit => Ok(end_over_limit(stream, direction)),
            // A stream continued from inside the callback that pauses it goes on.
            Settled::Hold if continued => Ok(self.resume(id, direction)?.unwrap_or(Step::Hold)),
            Settled::Hold => Ok(Step::Hold),
        }
    }

    /// Lets a stopped side go on; `None` when it was not stopped.
    fn resume(&mut self, id: StreamId, direction: Direction) -> Result<Option<Step>, AbiError> {
        let side = self.side_mut(id, direction)?;
        if side.over {
            return Ok(None);
        }
        let (mut all, body, trailers) = match side.resume() {
            None => return Ok(None),
            Some(Resume::Forward(release)) => return Ok(Some(Step::Forward(release))),
            Some(Resume::Replay { headers, body, trailers }) => (headers, body, trailers),
        };
        let mut steps = Vec::with_capacity(2);
        if let Some((size, end_of_stream)) = body {
            let action = self.call_body(id.0, direction, count(size), end_of_stream)?;
            steps.push(self.settle(id, direction, |side| side.settle_body(action))?);
        }
        if let Some(number) = trailers
            && !self.side_mut(id, direction)?.over
        {
            let action = self.call_trailers(id.0, direction, count(number))?;
            steps.push(self.settle(id, direction, |side| side.settle_trailers(action))?);
        }
        for step in steps {
            match step {
                Step::Forward(release) => all.append(release),
                Step::Hold => {}
                end => return Ok(Some(end)),
            }
        }
        Ok(Some(Step::Forward(all)))
    }

    /// Carries out what the guest asked for beyond the callback just answered. That may run the
    /// guest again, which may ask for more; a queue keeps the host's stack flat. A crash in here
    /// shows in the next call: the step already won is not lost with the VM.
    pub(super) fn drain(&mut self) {
        loop {
            let more = std::mem::take(&mut self.vm.store.data_mut().deferred);
            self.later.extend(more);
            let Some(deferred) = self.later.pop_front() else {
                return;
            };
            let stream = StreamId(deferred.stream());
            let Ok(target) = self.stream_mut(stream) else {
                continue;
            };
            let (direction, step) = match deferred {
                Deferred::Continue(_, direction) => match self.resume(stream, direction) {
                    Ok(Some(step)) => (direction, step),
                    Ok(None) => continue,
                    Err(_) => {
                        self.later.clear();
                        return;
                    }
                },
                Deferred::Resume(_) => match target.connection.as_mut().and_then(Connection::resume) {
                    Some(release) => (Direction::Request, Step::Forward(release)),
                    None => continue,
                },
                Deferred::Close(_) if target.connection.is_some() => {
                    target.connection.as_mut().map(Connection::close);
                    (Direction::Request, Step::Close)
                }
                _ if target.request.over && target.response.over => continue,
                Deferred::Reply(_, reply) => (Direction::Request, end_with_reply(target, reply)),
                Deferred::Close(_) => (Direction::Request, end_with_reset(target)),
            };
            self.events.push(Event { stream, direction, step });
        }
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// HTTP status of a request over the buffer limit.
const PAYLOAD_TOO_LARGE: u32 = 413;

/// Ends the exchange with a local reply, as far as a response has not begun.
fn end_with_reply(stream: &mut Stream, mut reply: LocalReply) -> Step {
    let request = stream.request.headers.as_ref();
    if request.and_then(|headers| headers.first(b"content-type")).is_some_and(is_grpc) {
        reply.speak_grpc();
    }
    if stream.response.headers.is_some() {
        if stream.response.headers_forwarded {
            return end_with_reset(stream);
        }
        reply.through_response_callbacks = false;
        stream.response.end_early();
    }
    stream.request.end_early();
    stream.reply_status = Some(reply.status);
    stream.code_details = Some(reply.details.clone().into());
    Step::Reply(reply)
}

fn end_with_reset(stream: &mut Stream) -> Step {
    stream.request.end_early();
    stream.response.end_early();
    Step::Close
}

fn end_over_limit(stream: &mut Stream, direction: Direction) -> Step {
    let reply = match direction {
        Direction::Request => {
            LocalReply::of_limit(PAYLOAD_TOO_LARGE, "request_payload_too_large", "Payload Too Large")
        }
        Direction::Response => {
            LocalReply::of_limit(500, "response_payload_too_large", "Internal Server Error")
        }
    };
    end_with_reply(stream, reply)
}
