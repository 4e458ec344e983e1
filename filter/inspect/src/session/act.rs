//! What is done with the bytes of a message: they pass, are rewritten, wait, or go nowhere.

use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::vec::Vec;

use driftlock_engine::evidence::{Outcome, Verdict};

use super::inspection::{Hold, Inspection};
use super::report::{Stop, Taken, record_answer, structured_field, tell};
use super::{End, Exchange, Plugin, REQUEST_VERDICT_HEADER, RESPONSE_VERDICT_HEADER, Step};
use crate::config::Uninspectable;
use crate::host::{Direction, Histogram, Host, HostError, Metric};
use crate::refusal::{Dialect, Refusal, blocked_message, refused_message};

/// Nothing of this callback goes on.
pub(super) fn swallow(host: &mut impl Host, direction: Direction) -> Step {
    tell(host, |host| host.set_body(direction, b""));
    Step::Forward
}

/// Digests of a body that is changed would be wrong (RFC 9530, RFC 3230, RFC 1864).
pub(super) fn remove_digests(host: &mut impl Host, direction: Direction) {
    for name in ["content-digest", "repr-digest", "digest", "content-md5"] {
        tell(host, |host| host.remove_header(direction, name));
    }
}

impl Exchange {
    /// What becomes of a chunk that has been read: a step, if it does not end the message.
    pub(super) fn take_bytes<H: Host>(
        &mut self,
        plugin: &mut Plugin,
        host: &mut H,
        direction: Direction,
        chunk: Result<&[u8], HostError>,
        ended: bool,
    ) -> Option<Step> {
        let sampled_in = self.sample;
        let fails_closed = plugin.uninspectable == Uninspectable::Refuse;
        let inspection = self.side(direction)?;
        if inspection.cut {
            if !ended {
                return Some(swallow(host, direction));
            }
            return None;
        }
        if inspection.lost && !inspection.plan.shadow {
            // A body that is being rewritten has a gap now.
            return Some(self.break_off(plugin, host, direction));
        }
        let bytes = chunk.unwrap_or_default();
        if inspection.plan.shadow {
            inspection.rewritten.clear();
        }
        if !ended
            && looks(inspection, sampled_in)
            && inspection.message.as_ref().is_some_and(|message| plugin.detector.stands_out(message))
        {
            if inspection.plan.shadow {
                // Counted when it is judged.
                inspection.would_cut = true;
            } else {
                inspection.cut = true;
                return Some(self.cut(host, direction));
            }
        }
        if ended {
            return None;
        }
        if inspection.hold != Hold::Nothing {
            if inspection.wire_bytes <= plugin.hold.max_bytes || fails_closed {
                return Some(Step::Hold);
            }
            inspection.hold = Hold::Nothing;
            host.count(Metric::ErrorHoldLimit, 1);
            return Some(self.let_go(plugin, host, direction, None));
        }
        Some(self.let_go(plugin, host, direction, Some(bytes)))
    }

    /// Lets go on what the rewriter has let go; `arrived` is what the proxy has, if that is this chunk.
    fn let_go<H: Host>(
        &mut self,
        plugin: &mut Plugin,
        host: &mut H,
        direction: Direction,
        arrived: Option<&[u8]>,
    ) -> Step {
        let Some(inspection) = self.side(direction) else { return Step::Forward };
        let out = core::mem::take(&mut inspection.rewritten);
        if inspection.rewriter.is_none() || inspection.plan.shadow || arrived == Some(out.as_slice()) {
            return Step::Forward;
        }
        if host.set_body(direction, &out).is_ok() {
            return Step::Forward;
        }
        // Half a rewritten body is worse than none, whatever the route's policy.
        host.count(Metric::HostCallErrors, 1);
        self.break_off(plugin, host, direction)
    }

    /// A body of which some went on rewritten and the rest cannot follow.
    fn break_off(&mut self, plugin: &mut Plugin, host: &mut impl Host, direction: Direction) -> Step {
        if let Some(inspection) = self.side(direction) {
            inspection.cut = true;
            inspection.rewriter = None;
        }
        self.end(plugin, host, direction, End::CutShort);
        host.count(Metric::Refused, 1);
        let message = refused_message(direction.as_str(), "not_redacted");
        let refusal =
            Refusal { status: 503, kind: "driftlock_refused", code: "not_redacted", message: &message };
        self.answer(host, &refusal)
    }

    /// Ends a stream between two of its parts; what still comes is read and goes nowhere.
    fn cut(&mut self, host: &mut impl Host, direction: Direction) -> Step {
        let dialect = self.dialect;
        let Some(inspection) = self.side(direction) else { return Step::Forward };
        let message = blocked_message(direction.as_str());
        let refusal = Refusal {
            status: inspection.plan.status,
            kind: "driftlock_blocked",
            code: "anomalous",
            message: &message,
        };
        let mut bytes = Vec::new();
        if inspection.rewriter.as_ref().is_some_and(|rewriter| rewriter.torn()) {
            // A part too long to be held has gone on without its end.
            bytes.extend_from_slice(b"\n\n");
        }
        bytes.extend(dialect.stream_error(inspection.framing, &refusal));
        if tell(host, |host| host.set_body(direction, &bytes)) {
            Step::Forward
        } else {
            self.answer(host, &refusal)
        }
    }

    /// The message is complete, or broke off: judges it and does what follows.
    pub(super) fn end<H: Host>(
        &mut self,
        plugin: &mut Plugin,
        host: &mut H,
        direction: Direction,
        how: End,
    ) -> Step {
        match self.side(direction) {
            Some(_) => {
                let now_ns = host.now_ns();
                self.end_since(plugin, host, direction, how, now_ns)
            }
            None => Step::Forward,
        }
    }

    /// The same, in a callback that began at `began_ns`, by which the time is counted that it takes.
    pub(super) fn end_since<H: Host>(
        &mut self,
        plugin: &mut Plugin,
        host: &mut H,
        direction: Direction,
        how: End,
        began_ns: Option<u64>,
    ) -> Step {
        let side = match direction {
            Direction::Request => &mut self.request,
            Direction::Response => &mut self.response,
        };
        let Some(mut inspection) = side.take() else { return Step::Forward };
        let cut_short = how == End::CutShort;
        let summary = inspection.end_of_body(plugin, cut_short);
        if direction == Direction::Request && self.style.is_none() && inspection.style.is_some() {
            // The path did not tell; the answer will be of the same API.
            self.style = inspection.style;
            self.dialect = Dialect::of(self.style);
        }
        if inspection.lost && !cut_short && !inspection.plan.shadow {
            match direction {
                Direction::Request => self.request = Some(inspection),
                Direction::Response => self.response = Some(inspection),
            }
            return self.break_off(plugin, host, direction);
        }
        // Nothing in the message is at fault where only the baseline is missing.
        let defect_status = inspection.defect.as_ref().map_or(503, super::Defect::status);
        let defective = plugin.refuses(&inspection);
        let Some(verdict) = inspection.judge(plugin, host) else { return Step::Forward };
        let refuse = !cut_short && (defective || plugin.refuses_verdict(&verdict));
        let taken = self.decide(&inspection, &verdict, refuse, cut_short);
        count(host, direction, taken);
        self.publish(plugin, host, direction, &verdict, taken, summary.as_ref());
        if direction == Direction::Request {
            self.request_told = inspection.plan.tells().then(|| structured_field(&verdict));
            self.request_judged = true;
        }
        if let (Some(began_ns), Some(now_ns)) = (began_ns, host.now_ns()) {
            inspection.scoring_ns = inspection.scoring_ns.saturating_add(now_ns.saturating_sub(began_ns));
            let histogram = match direction {
                Direction::Request => Histogram::RequestScoringTime,
                Direction::Response => Histogram::ResponseScoringTime,
            };
            host.record(histogram, inspection.scoring_ns / 1000);
            plugin.gauges.write(&plugin.detector, host, now_ns);
        }
        if let (Direction::Response, Some(summary)) = (direction, &summary) {
            let streamed = inspection.is_stream();
            record_answer(host, summary, self.times, inspection.first_token_ns, streamed);
        }
        match taken.stopped.filter(|_| !taken.shadow) {
            _ if cut_short => Step::Forward,
            _ if inspection.cut => {
                self.response_cut = true;
                // At trailers all that there was of the body has been swallowed.
                if how == End::Trailers { Step::Forward } else { swallow(host, direction) }
            }
            Some(stop) => self.stop(host, inspection, how, stop, defect_status, &verdict),
            None => self.pass_on(plugin, host, inspection, how, &verdict),
        }
    }

    /// What is done, or would be if the rule were no shadow.
    fn decide(&self, inspection: &Inspection, verdict: &Verdict, refuse: bool, cut_short: bool) -> Taken {
        let plan = inspection.plan;
        let sample = self.sample.or_else(|| inspection.hash.map(|hash| hash.finish()));
        let applies = sample.is_none_or(|sample| plan.applies(sample));
        let anomalous = verdict.outcome == Outcome::Anomalous && !cut_short;
        let block = plan.block && applies && anomalous
            || inspection.would_cut
            || inspection.cut && inspection.rewriter.is_some();
        let redacted = inspection.rewriter.as_ref().map_or(0, |rewriter| rewriter.tokens());
        let stopped = match (refuse, block) {
            (true, _) => Some(Stop::Refuse),
            (false, true) => Some(Stop::Block),
            (false, false) => None,
        };
        // Refusing what cannot be inspected is the route's policy, not the rule's.
        let shadow = plan.shadow && !refuse;
        Taken { stopped, redacted, shadow }
    }

    /// Nothing more of the message goes on, and its peer is told in its API's words.
    fn stop<H: Host>(
        &mut self,
        host: &mut H,
        mut inspection: Box<Inspection>,
        how: End,
        stop: Stop,
        defect_status: u16,
        verdict: &Verdict,
    ) -> Step {
        let direction = inspection.direction;
        let reason = verdict.reason.as_deref().unwrap_or_default();
        let message = match stop {
            Stop::Block => blocked_message(direction.as_str()),
            Stop::Refuse => refused_message(direction.as_str(), reason),
        };
        let refusal = match (stop, direction) {
            (Stop::Block, _) => Refusal {
                status: inspection.plan.status,
                kind: "driftlock_blocked",
                code: "anomalous",
                message: &message,
            },
            (Stop::Refuse, Direction::Request) => {
                Refusal { status: defect_status, kind: "driftlock_refused", code: reason, message: &message }
            }
            (Stop::Refuse, Direction::Response) => {
                Refusal { status: 502, kind: "driftlock_refused", code: reason, message: &message }
            }
        };
        let headers_open = how == End::Headers || inspection.hold == Hold::Headers;
        if direction == Direction::Request || headers_open {
            return self.answer(host, &refusal);
        }
        if inspection.is_stream() && inspection.rewriter.is_some() && how == End::Body {
            inspection.cut = true;
            self.response = Some(inspection);
            let step = self.cut(host, direction);
            self.response = None;
            self.response_cut = true;
            return step;
        }
        // Where the headers have promised a content coding, what is said in plain would be taken for broken.
        let plain = !inspection.encoded || inspection.recoded;
        if inspection.hold == Hold::Body && stop == Stop::Block && plain {
            let body = self.dialect.stopped(&refusal);
            if tell(host, |host| host.set_body(direction, body.as_bytes())) {
                return Step::Forward;
            }
        }
        if how == End::Trailers {
            // All but the trailers has gone.
            host.count(Metric::ErrorTooLate, 1);
        }
        self.answer(host, &refusal)
    }

    /// The message goes on to its end.
    fn pass_on<H: Host>(
        &mut self,
        plugin: &mut Plugin,
        host: &mut H,
        inspection: Box<Inspection>,
        how: End,
        verdict: &Verdict,
    ) -> Step {
        let direction = inspection.direction;
        let headers_open = match direction {
            Direction::Request => {
                inspection.hold == Hold::Headers || how == End::Headers && plugin.hold.headers
            }
            Direction::Response => inspection.hold == Hold::Headers || how == End::Headers,
        };
        let name = match direction {
            Direction::Request => REQUEST_VERDICT_HEADER,
            Direction::Response => RESPONSE_VERDICT_HEADER,
        };
        let trailers_open = direction == Direction::Response
            && (how == End::Trailers || inspection.plan.trailers && how == End::Body);
        if inspection.plan.tells() && (headers_open || trailers_open) {
            let value = match (&self.request_told, direction) {
                (Some(told), Direction::Request) => told,
                _ => &structured_field(verdict),
            };
            if headers_open {
                tell(host, |host| host.set_header(direction, name, value));
            } else {
                tell(host, |host| host.set_response_trailer(name, value));
            }
        }
        let held = inspection.hold != Hold::Nothing;
        let shadow = inspection.plan.shadow;
        let Some(rewriter) = inspection.rewriter.as_ref().filter(|_| !shadow && how != End::Headers) else {
            return Step::Forward;
        };
        if held && rewriter.tokens() == 0 && !inspection.recoded {
            // What the proxy holds is what came.
            return Step::Forward;
        }
        if how == End::Trailers && !held {
            if !inspection.rewritten.is_empty() {
                // The last of a body that no proxy takes any more: better broken than short of it.
                host.count(Metric::ErrorTooLate, 1);
                return self.break_off(plugin, host, direction);
            }
            return Step::Forward;
        }
        if headers_open {
            if inspection.encoded {
                tell(host, |host| host.remove_header(direction, "content-encoding"));
            }
            let length = inspection.rewritten.len().to_string();
            if host.header(direction, "content-length").is_ok_and(|length| length.is_some()) {
                tell(host, |host| host.set_header(direction, "content-length", &length));
            }
            remove_digests(host, direction);
        }
        if tell(host, |host| host.set_body(direction, &inspection.rewritten)) {
            Step::Forward
        } else {
            self.break_off(plugin, host, direction)
        }
    }

    fn answer(&mut self, host: &mut impl Host, refusal: &Refusal<'_>) -> Step {
        self.answered = true;
        let reply = self.dialect.reply(refusal);
        tell(host, |host| host.respond(&reply));
        Step::Answered
    }
}

/// Whether to look at a stream that may have to be ended: once one of its units is complete, since no other is
/// looked at.
fn looks(inspection: &mut Inspection, sample: Option<u64>) -> bool {
    let plan = inspection.plan;
    core::mem::take(&mut inspection.unit_ended)
        && plan.block
        && !inspection.would_cut
        && inspection.direction == Direction::Response
        && inspection.is_stream()
        && inspection.hash.is_none()
        && sample.is_none_or(|sample| plan.applies(sample))
}

fn count(host: &mut impl Host, direction: Direction, taken: Taken) {
    let [blocked, redacted] = match (direction, taken.shadow) {
        (Direction::Request, false) => [Metric::BlockedRequest, Metric::RedactedRequest],
        (Direction::Response, false) => [Metric::BlockedResponse, Metric::RedactedResponse],
        (Direction::Request, true) => [Metric::ShadowBlockedRequest, Metric::ShadowRedactedRequest],
        (Direction::Response, true) => [Metric::ShadowBlockedResponse, Metric::ShadowRedactedResponse],
    };
    match taken.stopped {
        Some(Stop::Block) => host.count(blocked, 1),
        Some(Stop::Refuse) => host.count(Metric::Refused, 1),
        None => {}
    }
    if taken.redacted > 0 {
        host.count(redacted, 1);
        if !taken.shadow {
            host.count(Metric::RedactedTokens, taken.redacted);
        }
    }
}
