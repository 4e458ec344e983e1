//! One request and its response: what both directions share.
//!
//! The two bodies of an exchange are driven by different tasks (the client's connection and the
//! upstream's), so the filter and the account of what happened sit behind one mutex. It is held for
//! the length of one filter call and never across an await.
//!
//! An exchange ends exactly once, when its [`Guard`] is dropped: the guard travels from the request
//! handler into the response body, so a client that goes away ends it too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::Notify;

use super::Shared;
use super::access_log::AccessRecord;
use super::chain::{Chain, Passed};
use super::filter::{Direction, HeaderPairs, LocalReply, Release, Step};
use super::generation::Terms;

/// Something one direction's body asks of the request handler, which may be waiting for the
/// upstream at that moment.
#[derive(Debug, Clone)]
pub(super) enum Signal {
    /// The filter answers in place of the upstream.
    Reply(LocalReply),
    /// The filter wants the connection cut.
    Close,
    /// The filter is broken and the policy is fail-closed.
    FilterFailed,
    /// The request's body is over the limit.
    BodyTooLarge,
    /// The client stopped sending in the middle of its body.
    ClientStalled,
    /// The client's connection broke while it was sending.
    ClientGone,
    /// The filter held a message for longer than the upstream time-out.
    HeldTooLong,
    /// The response's body is over the limit, and its headers are still held.
    UpstreamTooLarge,
    /// The upstream stopped in the middle of a response whose headers the filter still holds.
    UpstreamStalled,
    /// The upstream's connection broke in the middle of such a response.
    UpstreamGone,
}

/// What the request body was last seen doing, for the upstream time-out.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestProgress {
    /// Last time the request body moved.
    pub(super) at: Instant,
    /// The gateway waits for the client's bytes, so the upstream cannot be blamed.
    pub(super) awaits_client: bool,
}

struct Inner {
    chain: Chain,
    response_seen: bool,
    signal: Option<Signal>,
    response_started: bool,
    /// Set once the exchange cannot be completed; both directions stop.
    aborted: Option<&'static str>,
    finished: bool,
    request_waker: Option<Waker>,
    response_waker: Option<Waker>,
    progress: RequestProgress,
    /// Until the exchange is over.
    record: Option<AccessRecord>,
}

impl Inner {
    fn wake(&mut self) {
        for waker in [self.request_waker.take(), self.response_waker.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    fn abort(&mut self, reason: &'static str) {
        self.aborted.get_or_insert(reason);
        self.wake();
    }

    fn edit_record(&mut self, edit: impl FnOnce(&mut AccessRecord)) {
        if let Some(record) = &mut self.record {
            edit(record);
        }
    }
}

/// State of one exchange, shared by its two directions.
pub(super) struct Exchange {
    inner: Mutex<Inner>,
    /// Tells the request handler that `signal` is set.
    pub(super) signalled: Notify,
    pub(super) shared: Arc<Shared>,
    /// The times and limits it goes by.
    pub(super) terms: Terms,
    started: Instant,
}

/// What became of a piece.
pub(super) enum Outcome {
    /// Send this on; whether to read more.
    Forward(Release, bool),
    /// The filters keep it; whether to read more.
    Hold(bool),
    /// The exchange was interrupted; the handler knows why.
    Interrupted,
}

impl Exchange {
    pub(super) fn new(shared: Arc<Shared>, terms: Terms, record: AccessRecord) -> Arc<Self> {
        let started = Instant::now();
        Arc::new(Self {
            inner: Mutex::new(Inner {
                chain: Chain::default(),
                response_seen: false,
                signal: None,
                response_started: false,
                aborted: None,
                finished: false,
                request_waker: None,
                response_waker: None,
                progress: RequestProgress { at: started, awaits_client: true },
                record: Some(record),
            }),
            signalled: Notify::new(),
            shared,
            terms,
            started,
        })
    }

    /// A panic while the mutex was held leaves plain data behind; carry on with it.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_chain(&self, chain: Chain) {
        self.lock().chain = chain;
    }

    pub(super) fn on_headers(&self, direction: Direction, headers: HeaderPairs, end: bool) -> Outcome {
        let mut inner = self.lock();
        inner.response_seen |= direction == Direction::Response;
        let passed = inner.chain.headers(direction, headers, end);
        self.settle(&mut inner, passed)
    }

    pub(super) fn on_body(&self, direction: Direction, body: Bytes, end: bool) -> Outcome {
        let mut inner = self.lock();
        let passed = inner.chain.body(direction, body, end);
        self.settle(&mut inner, passed)
    }

    pub(super) fn on_trailers(&self, direction: Direction, trailers: HeaderPairs) -> Outcome {
        let mut inner = self.lock();
        let passed = inner.chain.trailers(direction, trailers);
        self.settle(&mut inner, passed)
    }

    /// What the filters have for `direction` unasked.
    pub(super) fn poll_resumed(&self, direction: Direction, cx: &mut Context<'_>) -> Poll<Outcome> {
        let mut inner = self.lock();
        inner.chain.poll_resumed(direction, cx).map(|passed| self.settle(&mut inner, passed))
    }

    /// Ready with nothing once a signal is set by a filter on its own.
    pub(super) fn poll_interrupted(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.lock();
        inner.chain.poll_interrupted(cx).map(|passed| {
            self.settle(&mut inner, passed);
        })
    }

    fn settle(&self, inner: &mut Inner, passed: Passed) -> Outcome {
        for failure in inner.chain.take_failures() {
            self.shared.counters.filter_failures.increment();
            inner.edit_record(|record| record.filter_failed = true);
            let (filter, error, policy) = (&*failure.filter, failure.error, failure.policy);
            tracing::warn!(target: "driftlock::gateway", filter, %error, ?policy, "filter failed");
            // The other direction may sit in a hold that nobody else will end.
            inner.wake();
        }
        match passed {
            Passed::Forward(release, reads_on) => return Outcome::Forward(release, reads_on),
            Passed::Hold(reads_on) => return Outcome::Hold(reads_on),
            Passed::End(Step::Reply(reply)) => {
                self.interrupt_locked(inner, Signal::Reply(reply), "filter_reply_after_response_start");
            }
            Passed::End(_) => self.interrupt_locked(inner, Signal::Close, "filter_close"),
            Passed::Broken => self.interrupt_locked(inner, Signal::FilterFailed, "filter_failed"),
        }
        Outcome::Interrupted
    }

    /// Hands `signal` to the request handler; once the response is under way, aborts instead.
    pub(super) fn interrupt(&self, signal: Signal, otherwise: &'static str) {
        self.interrupt_locked(&mut self.lock(), signal, otherwise);
    }

    fn interrupt_locked(&self, inner: &mut Inner, signal: Signal, otherwise: &'static str) {
        if inner.response_started {
            inner.abort(otherwise);
        } else if inner.signal.is_none() {
            inner.signal = Some(signal);
            self.signalled.notify_one();
        }
    }

    /// Gives up on the exchange: both directions fail at their next poll.
    pub(super) fn abort(&self, reason: &'static str) {
        self.lock().abort(reason);
    }

    /// Whether the filter has seen response headers, which it can only once.
    pub(super) fn response_seen(&self) -> bool {
        self.lock().response_seen
    }

    pub(super) fn take_signal(&self) -> Option<Signal> {
        self.lock().signal.take()
    }

    /// From here on the status is on its way and a signal becomes an abort.
    pub(super) fn start_response(&self, status: u16) -> Result<(), Signal> {
        let mut inner = self.lock();
        if let Some(signal) = inner.signal.take() {
            return Err(signal);
        }
        inner.response_started = true;
        inner.edit_record(|record| record.status = Some(status));
        Ok(())
    }

    /// Whether a direction has to stop, and the waker to call when that changes.
    pub(super) fn check(&self, direction: Direction, cx: &mut Context<'_>) -> Option<&'static str> {
        let mut inner = self.lock();
        // The request has nobody to go to once the exchange is over.
        if inner.finished && direction == Direction::Request {
            return Some("exchange_over");
        }
        if inner.aborted.is_some() {
            return inner.aborted;
        }
        let slot = match direction {
            Direction::Request => &mut inner.request_waker,
            Direction::Response => &mut inner.response_waker,
        };
        match slot {
            Some(waker) => waker.clone_from(cx.waker()),
            None => *slot = Some(cx.waker().clone()),
        }
        None
    }

    pub(super) fn note_request_progress(&self, awaits_client: bool, moved: bool) {
        let mut inner = self.lock();
        inner.progress.awaits_client = awaits_client;
        if moved {
            inner.progress.at = Instant::now();
        }
    }

    pub(super) fn request_progress(&self) -> RequestProgress {
        self.lock().progress
    }

    pub(super) fn edit_record(&self, edit: impl FnOnce(&mut AccessRecord)) {
        self.lock().edit_record(edit);
    }

    fn finish(&self, otherwise: &'static str) {
        let mut inner = self.lock();
        if inner.finished {
            return;
        }
        inner.finished = true;
        let request_waker = inner.request_waker.take();
        let chain = std::mem::take(&mut inner.chain);
        let Some(mut record) = inner.record.take() else { return };
        let aborted = inner.aborted;
        drop(inner);
        record.filter_state = chain.finish();
        if let Some(waker) = request_waker {
            waker.wake();
        }
        record.outcome = aborted.unwrap_or(otherwise);
        record.duration = self.started.elapsed();
        self.shared.counters.finished(&record);
        self.shared.access_log.write(record);
    }
}

/// Ends the exchange when dropped.
pub(super) struct Guard {
    exchange: Arc<Exchange>,
    complete: bool,
}

impl Guard {
    pub(super) fn new(exchange: Arc<Exchange>) -> Self {
        exchange.shared.counters.in_flight.increment();
        Self { exchange, complete: false }
    }

    /// The last byte was handed to the client's connection.
    pub(super) fn complete(&mut self) {
        if !self.complete {
            self.complete = true;
            self.exchange.finish("complete");
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.exchange.finish("client_closed");
        self.exchange.shared.counters.in_flight.decrement();
    }
}
