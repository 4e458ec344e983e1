//! One direction of one exchange: bytes come in, pass the filter, and go out, with back-pressure.
//!
//! A [`Lane`] is first asked for its headers ([`Lane::poll_headers`]) and is then an HTTP body that
//! hyper polls. It reads its source only when it is polled and has nothing left to hand out, so a
//! slow reader slows the writer and at most one chunk is in the gateway's hands, except for what the
//! filter itself holds (which the filter bounds).
//!
//! A lane never ends cleanly unless its source did: every fault is an error, and hyper then cuts
//! the connection so that the receiver can tell.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use super::exchange::{Exchange, Guard, Outcome, Signal};
use super::filter::{Direction, HeaderPairs, Release};
use super::headers;
use super::upstream::Lease;

/// Where a lane's body comes from.
pub(super) enum Source {
    /// A peer's connection.
    Peer(Incoming),
    /// A body the gateway or the filter made up; taken once.
    Own(Option<Bytes>),
    /// No body that HTTP knows of: the connection is about to leave HTTP.
    Tunnel,
}

impl Source {
    fn is_end(&self) -> bool {
        match self {
            Self::Peer(incoming) => incoming.is_end_stream(),
            Self::Own(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Self::Tunnel => false,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self {
            Self::Peer(incoming) => Pin::new(incoming).poll_frame(cx),
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Tunnel => Poll::Pending,
        }
    }
}

/// Why a lane stopped before its end.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("exchange aborted: {0}")]
pub(super) struct LaneError(pub(super) &'static str);

/// See the module's text.
pub(super) struct Lane {
    exchange: Arc<Exchange>,
    direction: Direction,
    source: Source,
    headers: Option<HeaderPairs>,
    out: VecDeque<Frame<Bytes>>,
    /// The source has ended and the filter has been told.
    input_ended: bool,
    /// Everything that will ever go out is in `out`.
    output_ended: bool,
    /// Whether the filter wants more input.
    read_on: bool,
    /// Bytes still owed under the declared content-length.
    owed_bytes: Option<u64>,
    timer: Option<Pin<Box<Sleep>>>,
    timer_armed: bool,
    /// The connection that the source reads from, until it has ended well.
    lease: Option<Lease>,
    /// Bytes that came in so far.
    taken_bytes: u64,
    guard: Option<Guard>,
}

impl Lane {
    /// A lane that starts with `headers`.
    pub(super) fn start(
        exchange: Arc<Exchange>,
        direction: Direction,
        headers: HeaderPairs,
        source: Source,
        lease: Option<Lease>,
    ) -> Result<Self, LaneError> {
        let mut lane = Self {
            exchange,
            direction,
            input_ended: source.is_end(),
            source,
            headers: None,
            out: VecDeque::new(),
            output_ended: false,
            read_on: true,
            owed_bytes: None,
            timer: None,
            timer_armed: false,
            lease,
            taken_bytes: 0,
            guard: None,
        };
        lane.return_connection();
        let outcome = lane.exchange.on_headers(direction, headers, lane.input_ended);
        lane.absorb(outcome)?;
        Ok(lane)
    }

    /// A lane that passes the filter by.
    pub(super) fn unfiltered(exchange: Arc<Exchange>, direction: Direction, body: Bytes) -> Self {
        Self {
            exchange,
            direction,
            input_ended: true,
            source: Source::Own(None),
            headers: None,
            out: if body.is_empty() { VecDeque::new() } else { VecDeque::from([Frame::data(body)]) },
            output_ended: true,
            read_on: true,
            owed_bytes: None,
            timer: None,
            timer_armed: false,
            lease: None,
            taken_bytes: 0,
            guard: None,
        }
    }

    /// Makes the end of this lane the end of the exchange.
    pub(super) fn set_guard(&mut self, guard: Guard) {
        self.guard = Some(guard);
    }

    /// Holds the filter to the content-length that went out with the headers.
    pub(super) fn set_declared_length(&mut self, bytes: Option<u64>) {
        self.owed_bytes = bytes;
    }

    /// The headers, once the filter lets them go.
    pub(super) fn poll_headers(&mut self, cx: &mut Context<'_>) -> Poll<Result<HeaderPairs, LaneError>> {
        loop {
            if let Some(headers) = self.headers.take() {
                return Poll::Ready(Ok(headers));
            }
            if self.output_ended {
                return Poll::Ready(Err(LaneError("filter_released_no_headers")));
            }
            ready!(self.pump(cx))?;
        }
    }

    /// Moves one piece from the source or the filter to `out`.
    fn pump(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LaneError>> {
        if let Some(reason) = self.exchange.check(self.direction, cx) {
            return Poll::Ready(Err(LaneError(reason)));
        }
        if let Poll::Ready(outcome) = self.exchange.poll_resumed(self.direction, cx) {
            self.timer_armed = false;
            return Poll::Ready(self.absorb(outcome));
        }
        let reads = !self.input_ended && self.read_on;
        if reads {
            if let Poll::Ready(frame) = self.source.poll(cx) {
                self.timer_armed = false;
                return Poll::Ready(self.feed(frame));
            }
            if self.direction == Direction::Request {
                self.exchange.note_request_progress(true, false);
            }
        }
        self.poll_patience(cx, reads)
    }

    fn poll_patience(&mut self, cx: &mut Context<'_>, reads: bool) -> Poll<Result<(), LaneError>> {
        // While the filter holds a message its sender is not to blame.
        let patience = match (reads, self.direction) {
            (true, Direction::Request) => self.exchange.terms.client_timeout,
            _ => self.exchange.terms.upstream_timeout,
        };
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        if !self.timer_armed {
            timer.as_mut().reset(Instant::now() + patience);
            self.timer_armed = true;
        }
        ready!(timer.as_mut().poll(cx));
        let (signal, reason) = match (reads, self.direction) {
            (false, _) => (Signal::HeldTooLong, "held_too_long"),
            (true, Direction::Request) => (Signal::ClientStalled, "client_stalled"),
            (true, Direction::Response) => (Signal::UpstreamStalled, "upstream_stalled"),
        };
        self.exchange.interrupt(signal, reason);
        Poll::Ready(Err(LaneError(reason)))
    }

    fn feed(&mut self, frame: Option<Result<Frame<Bytes>, hyper::Error>>) -> Result<(), LaneError> {
        let frame = match frame {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Err(self.source_failed(&error)),
            None => {
                self.input_ended = true;
                self.return_connection();
                return self.feed_data(Bytes::new());
            }
        };
        match frame.into_data() {
            Ok(data) => {
                self.input_ended = self.source.is_end();
                self.count_in(data.len())?;
                self.return_connection();
                if data.is_empty() && !self.input_ended { Ok(()) } else { self.feed_data(data) }
            }
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) => {
                    self.input_ended = true;
                    self.return_connection();
                    let outcome =
                        self.exchange.on_trailers(self.direction, headers::trailer_pairs(&trailers));
                    self.absorb(outcome)
                }
                // http_body knows no third kind of frame; skip what a later version may add.
                Err(_) => Ok(()),
            },
        }
    }

    fn feed_data(&mut self, data: Bytes) -> Result<(), LaneError> {
        let outcome = self.exchange.on_body(self.direction, data, self.input_ended);
        self.absorb(outcome)
    }

    fn source_failed(&self, error: &hyper::Error) -> LaneError {
        let (signal, reason) = match self.direction {
            Direction::Request => (Signal::ClientGone, "client_closed"),
            Direction::Response => (Signal::UpstreamGone, "upstream_aborted"),
        };
        self.exchange.interrupt(signal, reason);
        tracing::debug!(target: "driftlock::gateway", %error, reason, "message cut short");
        LaneError(reason)
    }

    /// The source's last byte was read: its connection is free for others.
    fn return_connection(&mut self) {
        if self.input_ended
            && let Some(lease) = self.lease.take()
        {
            lease.give_back();
        }
    }

    fn count_in(&mut self, bytes: usize) -> Result<(), LaneError> {
        self.taken_bytes += bytes as u64;
        let terms = &self.exchange.terms;
        if self.direction == Direction::Response {
            if self.taken_bytes > terms.response_body_bytes {
                self.exchange.interrupt(Signal::UpstreamTooLarge, "response_too_large");
                return Err(LaneError("response_too_large"));
            }
            return Ok(());
        }
        self.exchange.edit_record(|record| record.bytes_in += bytes as u64);
        self.exchange.note_request_progress(false, true);
        if self.taken_bytes > terms.request_body_bytes {
            self.exchange.interrupt(Signal::BodyTooLarge, "request_too_large");
            return Err(LaneError("request_too_large"));
        }
        Ok(())
    }

    fn absorb(&mut self, outcome: Outcome) -> Result<(), LaneError> {
        match outcome {
            Outcome::Forward(release, reads_on) => {
                self.release(release);
                self.read_on = reads_on;
            }
            Outcome::Hold(reads_on) => self.read_on = reads_on,
            Outcome::Interrupted => return Err(LaneError("interrupted")),
        }
        Ok(())
    }

    fn release(&mut self, release: Release) {
        if release.headers.is_some() {
            self.headers = release.headers;
        }
        if !release.body.is_empty() {
            self.out.push_back(Frame::data(release.body));
        }
        if let Some(trailers) = release.trailers {
            match headers::fields(&trailers) {
                Ok(trailers) => self.out.push_back(Frame::trailers(trailers)),
                Err(error) => {
                    tracing::warn!(target: "driftlock::gateway", %error, "trailers dropped");
                }
            }
        }
        self.output_ended |= release.end;
        if release.end && self.direction == Direction::Request {
            self.exchange.note_request_progress(false, true);
        }
    }

    fn count_out(&mut self, frame: &Frame<Bytes>) -> Result<(), LaneError> {
        let Some(data) = frame.data_ref() else { return Ok(()) };
        let bytes = data.len() as u64;
        if let Some(owed) = &mut self.owed_bytes {
            match owed.checked_sub(bytes) {
                Some(rest) => *owed = rest,
                None => {
                    tracing::warn!(
                        target: "driftlock::gateway",
                        "the filter made a body longer than its content-length; it has to remove that header first"
                    );
                    self.exchange.abort("body_exceeds_content_length");
                    return Err(LaneError("body_exceeds_content_length"));
                }
            }
        }
        if self.direction == Direction::Response {
            self.exchange.edit_record(|record| record.bytes_out += bytes);
        }
        Ok(())
    }

    fn settle_end(&mut self) {
        if self.output_ended
            && self.out.is_empty()
            && let Some(guard) = &mut self.guard
        {
            guard.complete();
        }
    }
}

impl Body for Lane {
    type Data = Bytes;
    type Error = LaneError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, LaneError>>> {
        let lane = self.get_mut();
        loop {
            // A local abort must not be outrun by bytes that were already released.
            if let Some(reason) = lane.exchange.check(lane.direction, cx) {
                return Poll::Ready(Some(Err(LaneError(reason))));
            }
            if let Some(frame) = lane.out.pop_front() {
                lane.count_out(&frame)?;
                lane.settle_end();
                return Poll::Ready(Some(Ok(frame)));
            }
            if lane.output_ended {
                lane.settle_end();
                return Poll::Ready(None);
            }
            ready!(lane.pump(cx))?;
        }
    }

    fn is_end_stream(&self) -> bool {
        self.output_ended && self.out.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        if !self.output_ended {
            return SizeHint::new();
        }
        // Trailers need the chunked coding, so their message must not look like one of known size.
        let mut bytes = 0;
        for frame in &self.out {
            match frame.data_ref() {
                Some(data) => bytes += data.len() as u64,
                None => return SizeHint::new(),
            }
        }
        SizeHint::with_exact(bytes)
    }
}
