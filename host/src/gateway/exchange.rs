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

use super::access_log::AccessRecord;
use super::filter::{Direction, FilterError, HeaderPairs, HttpFilter, LocalReply, Release, Step};
use super::{FailurePolicy, Shared};

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
    /// The client stopped sending in the middle of its body.
    ClientStalled,
    /// The client's connection broke while it was sending.
    ClientGone,
    /// The filter held a message for longer than the upstream time-out.
    HeldTooLong,
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
    filter: Option<Box<dyn HttpFilter>>,
    /// A filter that failed open: asked only for what it still holds.
    failed_open: Option<Box<dyn HttpFilter>>,
    /// By direction: what `failed_open` held was taken.
    salvaged: [bool; 2],
    response_seen: bool,
    signal: Option<Signal>,
    response_started: bool,
    /// Set once the exchange cannot be completed; both directions stop.
    aborted: Option<&'static str>,
    finished: bool,
    request_waker: Option<Waker>,
    response_waker: Option<Waker>,
    progress: RequestProgress,
    record: AccessRecord,
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
}

/// Lets a piece go by a filter that is not there, after whatever a filter that failed open held.
fn bypass(inner: &mut Inner, direction: Direction, piece: Release) -> Outcome {
    let salvaged = std::mem::replace(&mut inner.salvaged[direction as usize], true);
    let mut all = match &mut inner.failed_open {
        Some(filter) if !salvaged => filter.take_held(direction),
        _ => Release::default(),
    };
    all.append(piece);
    Outcome::Bypass(all)
}

/// State of one exchange, shared by its two directions.
pub(super) struct Exchange {
    inner: Mutex<Inner>,
    /// Tells the request handler that `signal` is set.
    pub(super) signalled: Notify,
    pub(super) shared: Arc<Shared>,
    started: Instant,
}

/// What became of a filter call.
pub(super) enum Outcome {
    /// Act on the step.
    Step(Step),
    /// There is no filter: pass this on.
    Bypass(Release),
    /// The exchange was interrupted; the handler knows why.
    Interrupted,
}

impl Exchange {
    pub(super) fn new(shared: Arc<Shared>, record: AccessRecord) -> Arc<Self> {
        let started = Instant::now();
        Arc::new(Self {
            inner: Mutex::new(Inner {
                filter: None,
                failed_open: None,
                salvaged: [false; 2],
                response_seen: false,
                signal: None,
                response_started: false,
                aborted: None,
                finished: false,
                request_waker: None,
                response_waker: None,
                progress: RequestProgress { at: started, awaits_client: true },
                record,
            }),
            signalled: Notify::new(),
            shared,
            started,
        })
    }

    /// A panic while the mutex was held leaves plain data behind; carry on with it.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_filter(&self, filter: Box<dyn HttpFilter>) {
        self.lock().filter = Some(filter);
    }

    pub(super) fn on_headers(&self, direction: Direction, headers: HeaderPairs, end: bool) -> Outcome {
        let mut inner = self.lock();
        inner.response_seen |= direction == Direction::Response;
        match &mut inner.filter {
            Some(filter) => {
                let result = filter.headers(direction, headers, end);
                self.settle(inner, direction, result)
            }
            None => bypass(&mut inner, direction, Release { headers: Some(headers), ..Release::default() }),
        }
    }

    pub(super) fn on_body(&self, direction: Direction, body: Bytes, end: bool) -> Outcome {
        let mut inner = self.lock();
        match &mut inner.filter {
            Some(filter) => {
                let result = filter.body(direction, body, end);
                self.settle(inner, direction, result)
            }
            None => bypass(&mut inner, direction, Release { body, ..Release::default() }),
        }
    }

    pub(super) fn on_trailers(&self, direction: Direction, trailers: HeaderPairs) -> Outcome {
        let mut inner = self.lock();
        match &mut inner.filter {
            Some(filter) => {
                let result = filter.trailers(direction, trailers);
                self.settle(inner, direction, result)
            }
            None => bypass(&mut inner, direction, Release { trailers: Some(trailers), ..Release::default() }),
        }
    }

    /// What the filter has for `direction` unasked.
    pub(super) fn poll_resumed(&self, direction: Direction, cx: &mut Context<'_>) -> Poll<Outcome> {
        let mut inner = self.lock();
        if let Some(filter) = &mut inner.filter {
            return match filter.poll_resumed(direction, cx) {
                Poll::Ready(result) => Poll::Ready(self.settle(inner, direction, result)),
                Poll::Pending => Poll::Pending,
            };
        }
        if inner.failed_open.is_some() && !inner.salvaged[direction as usize] {
            return Poll::Ready(bypass(&mut inner, direction, Release::default()));
        }
        Poll::Pending
    }

    /// Ready with nothing once a signal is set by the filter on its own.
    pub(super) fn poll_interrupted(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.lock();
        let Some(filter) = &mut inner.filter else { return Poll::Pending };
        match filter.poll_interrupted(cx) {
            Poll::Ready(Ok(step)) => {
                self.settle(inner, Direction::Request, Ok(step));
            }
            Poll::Ready(Err(error)) => self.failed(&mut inner, &error),
            Poll::Pending => return Poll::Pending,
        }
        Poll::Ready(())
    }

    fn settle(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        direction: Direction,
        result: Result<Step, FilterError>,
    ) -> Outcome {
        match result {
            Ok(Step::Reply(reply)) => {
                self.interrupt_locked(&mut inner, Signal::Reply(reply), "filter_reply_after_response_start");
            }
            Ok(Step::Close) => self.interrupt_locked(&mut inner, Signal::Close, "filter_close"),
            Ok(step) => return Outcome::Step(step),
            Err(error) => {
                self.failed(&mut inner, &error);
                if inner.failed_open.is_some() {
                    return bypass(&mut inner, direction, Release::default());
                }
            }
        }
        Outcome::Interrupted
    }

    fn failed(&self, inner: &mut Inner, error: &FilterError) {
        self.shared.counters.filter_failures.increment();
        tracing::warn!(target: "driftlock::gateway", %error, policy = ?self.shared.failure_policy, "filter failed");
        inner.record.filter_failed = true;
        let Some(broken) = inner.filter.take() else { return };
        match self.shared.failure_policy {
            FailurePolicy::FailOpen => {
                inner.failed_open = Some(broken);
                // A direction may sit in a hold that nobody else will end.
                inner.wake();
            }
            FailurePolicy::FailClosed => {
                inner.record.filter_state = broken.finish();
                self.interrupt_locked(inner, Signal::FilterFailed, "filter_failed");
            }
        }
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
        inner.record.status = Some(status);
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
        edit(&mut self.lock().record);
    }

    fn finish(&self, otherwise: &'static str) {
        let mut inner = self.lock();
        if inner.finished {
            return;
        }
        inner.finished = true;
        let request_waker = inner.request_waker.take();
        let filter = inner.filter.take();
        let failed_open = inner.failed_open.take();
        let mut record = inner.record.clone();
        let aborted = inner.aborted;
        drop(inner);
        if let Some(filter) = filter {
            record.filter_state = filter.finish();
        }
        if let Some(filter) = failed_open {
            filter.finish();
        }
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
