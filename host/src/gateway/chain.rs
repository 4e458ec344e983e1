//! An exchange's filters, one after the other.
//!
//! Requests pass the links in order, responses in reverse, as in Envoy; a reply that a link makes up
//! passes all of them. What one link lets go is at once given to the next. A link that breaks is taken
//! out (fail open: what it held goes on to the next link) or breaks the exchange (fail closed), each by
//! its own policy; the others stay.
//!
//! Costs a move per link and piece. Left out on purpose: state that filters read from each other.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;

use super::filter::{Direction, FilterError, FilterState, HeaderPairs, HttpFilter, Release, Step};
use super::options::FailurePolicy;

/// See the module's text.
#[derive(Default)]
pub(super) struct Chain {
    links: Vec<Link>,
    /// Filters that broke since the last [`Chain::take_failures`].
    failures: Vec<Failure>,
}

/// A filter that broke.
pub(super) struct Failure {
    pub(super) filter: Arc<str>,
    pub(super) policy: FailurePolicy,
    pub(super) error: FilterError,
}

struct Link {
    name: Arc<str>,
    policy: FailurePolicy,
    filter: Option<Box<dyn HttpFilter>>,
    /// The filter once it broke: asked only for what it held (if it failed open) and what it left.
    broken: Option<Box<dyn HttpFilter>>,
    /// By direction: what `broken` held was taken.
    salvaged: [bool; 2],
    /// By direction: whether the filter wants more while it holds.
    reads_on: [bool; 2],
}

/// What became of a piece at the end of the chain.
pub(super) enum Passed {
    /// Send this on; whether to read more.
    Forward(Release, bool),
    /// Nothing came out; whether to read more.
    Hold(bool),
    /// A reply or a close.
    End(Step),
    /// A filter with a fail-closed policy broke.
    Broken,
}

/// What became of a piece at one link.
enum Out {
    Forward(Release),
    Hold,
    End(Step),
    Broken,
}

impl Chain {
    pub(super) fn push(&mut self, name: Arc<str>, policy: FailurePolicy, filter: Box<dyn HttpFilter>) {
        self.links.push(Link {
            name,
            policy,
            filter: Some(filter),
            broken: None,
            salvaged: [false; 2],
            reads_on: [true; 2],
        });
    }

    pub(super) fn take_failures(&mut self) -> Vec<Failure> {
        std::mem::take(&mut self.failures)
    }

    pub(super) fn headers(&mut self, direction: Direction, headers: HeaderPairs, end: bool) -> Passed {
        self.pass(direction, 0, Release { headers: Some(headers), end, ..Release::default() })
    }

    pub(super) fn body(&mut self, direction: Direction, body: Bytes, end: bool) -> Passed {
        self.pass(direction, 0, Release { body, end, ..Release::default() })
    }

    pub(super) fn trailers(&mut self, direction: Direction, trailers: HeaderPairs) -> Passed {
        self.pass(direction, 0, Release { trailers: Some(trailers), end: true, ..Release::default() })
    }

    /// Index of the link that a message meets as its `place`th.
    fn link(&self, direction: Direction, place: usize) -> usize {
        match direction {
            Direction::Request => place,
            Direction::Response => self.links.len() - 1 - place,
        }
    }

    fn pass(&mut self, direction: Direction, from: usize, mut piece: Release) -> Passed {
        for place in from..self.links.len() {
            let at = self.link(direction, place);
            match self.links[at].pass(direction, piece, &mut self.failures) {
                Out::Forward(next) if next == Release::default() => {
                    return Passed::Hold(self.reads_on(direction));
                }
                Out::Forward(next) => piece = next,
                Out::Hold => return Passed::Hold(self.reads_on(direction)),
                Out::End(step) => return Passed::End(step),
                Out::Broken => return Passed::Broken,
            }
        }
        Passed::Forward(piece, self.reads_on(direction))
    }

    fn reads_on(&self, direction: Direction) -> bool {
        self.links.iter().all(|link| link.reads_on[direction as usize])
    }

    /// What the filters have for `direction` unasked.
    pub(super) fn poll_resumed(&mut self, direction: Direction, cx: &mut Context<'_>) -> Poll<Passed> {
        let mut anything = false;
        for place in 0..self.links.len() {
            let at = self.link(direction, place);
            let link = &mut self.links[at];
            let passed = if let Some(filter) = &mut link.filter {
                match filter.poll_resumed(direction, cx) {
                    Poll::Pending => continue,
                    Poll::Ready(result) => match link.settle(direction, result, &mut self.failures) {
                        Out::Forward(release) => self.pass(direction, place + 1, release),
                        Out::Hold => continue,
                        Out::End(step) => Passed::End(step),
                        Out::Broken => Passed::Broken,
                    },
                }
            } else if link.failed_open() && !link.salvaged[direction as usize] {
                let held = link.salvage(direction);
                self.pass(direction, place + 1, held)
            } else {
                continue;
            };
            match passed {
                // A later link kept it; the ones in between are asked all the same.
                Passed::Hold(_) => anything = true,
                passed => return Poll::Ready(passed),
            }
        }
        if anything { Poll::Ready(Passed::Hold(self.reads_on(direction))) } else { Poll::Pending }
    }

    /// Ready with a reply, a close or a broken filter, which concern the whole exchange.
    pub(super) fn poll_interrupted(&mut self, cx: &mut Context<'_>) -> Poll<Passed> {
        for link in &mut self.links {
            let Some(filter) = &mut link.filter else { continue };
            let Poll::Ready(result) = filter.poll_interrupted(cx) else { continue };
            match result {
                Ok(step) => return Poll::Ready(Passed::End(step)),
                Err(error) => {
                    link.fail(error, &mut self.failures);
                    let hold = Passed::Hold(true);
                    return Poll::Ready(if link.failed_open() { hold } else { Passed::Broken });
                }
            }
        }
        Poll::Pending
    }

    /// The exchange is over: what the filters left, later links' values over earlier ones'.
    pub(super) fn finish(self) -> FilterState {
        let mut state = FilterState::new();
        for link in self.links {
            if let Some(filter) = link.filter.or(link.broken) {
                state.append(&mut filter.finish());
            }
        }
        state
    }
}

/// The next thing a filter is told of.
enum Part {
    Headers(HeaderPairs, bool),
    Body(Bytes, bool),
    Trailers(HeaderPairs),
}

/// Takes the first part out of `rest`; the end goes with the last one.
fn next_part(rest: &mut Release) -> Option<Part> {
    let ends_with_body = rest.trailers.is_none();
    if let Some(headers) = rest.headers.take() {
        let end = rest.end && rest.body.is_empty() && ends_with_body;
        rest.end &= !end;
        return Some(Part::Headers(headers, end));
    }
    if !rest.body.is_empty() || (rest.end && ends_with_body) {
        let end = rest.end && ends_with_body;
        rest.end &= !end;
        return Some(Part::Body(std::mem::take(&mut rest.body), end));
    }
    let trailers = rest.trailers.take()?;
    rest.end = false;
    Some(Part::Trailers(trailers))
}

impl Link {
    fn pass(&mut self, direction: Direction, mut rest: Release, failures: &mut Vec<Failure>) -> Out {
        let mut out: Option<Release> = None;
        while let Some(filter) = &mut self.filter {
            let Some(part) = next_part(&mut rest) else {
                return out.map_or(Out::Hold, Out::Forward);
            };
            let result = match part {
                Part::Headers(headers, end) => filter.headers(direction, headers, end),
                Part::Body(body, end) => filter.body(direction, body, end),
                Part::Trailers(trailers) => filter.trailers(direction, trailers),
            };
            match self.settle(direction, result, failures) {
                Out::Forward(release) => out.get_or_insert_default().append(release),
                Out::Hold => {}
                end => return end,
            }
        }
        let mut all = out.unwrap_or_default();
        all.append(self.salvage(direction));
        all.append(rest);
        Out::Forward(all)
    }

    /// A filter's answer; after a failure that is passed over, what it held.
    fn settle(
        &mut self,
        direction: Direction,
        result: Result<Step, FilterError>,
        failures: &mut Vec<Failure>,
    ) -> Out {
        match result {
            Ok(Step::Forward(release)) => {
                self.reads_on[direction as usize] = true;
                Out::Forward(release)
            }
            Ok(Step::Hold { read_on }) => {
                self.reads_on[direction as usize] = read_on;
                Out::Hold
            }
            Ok(end) => Out::End(end),
            Err(error) => {
                self.fail(error, failures);
                if self.failed_open() { Out::Forward(self.salvage(direction)) } else { Out::Broken }
            }
        }
    }

    fn fail(&mut self, error: FilterError, failures: &mut Vec<Failure>) {
        failures.push(Failure { filter: Arc::clone(&self.name), policy: self.policy, error });
        self.reads_on = [true; 2];
        self.broken = self.filter.take();
    }

    fn failed_open(&self) -> bool {
        self.broken.is_some() && self.policy.is_open()
    }

    /// What a filter that failed open still held; once.
    fn salvage(&mut self, direction: Direction) -> Release {
        let salvaged = std::mem::replace(&mut self.salvaged[direction as usize], true);
        match &mut self.broken {
            Some(filter) if !salvaged && self.policy.is_open() => filter.take_held(direction),
            _ => Release::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forwards all it is given, in upper case, or does as it is told once.
    struct Loud {
        mark: &'static str,
        /// On the n-th call: what to do instead.
        odd: Option<(usize, Odd)>,
        calls: usize,
        held: Release,
    }

    #[derive(Clone, Copy)]
    enum Odd {
        Hold,
        Fail,
    }

    impl Loud {
        fn step(&mut self, mut piece: Release) -> Result<Step, FilterError> {
            if let Some(headers) = &mut piece.headers {
                headers.push((b"x-seen".to_vec(), self.mark.as_bytes().to_vec()));
            }
            self.held.append(piece);
            let odd = self.odd.filter(|(at, _)| *at == self.calls).map(|(_, odd)| odd);
            self.calls += 1;
            match odd {
                None => Ok(Step::Forward(std::mem::take(&mut self.held))),
                Some(Odd::Hold) => Ok(Step::Hold { read_on: false }),
                Some(Odd::Fail) => Err(FilterError::Crashed("told to".to_owned())),
            }
        }
    }

    impl HttpFilter for Loud {
        fn headers(&mut self, _: Direction, headers: HeaderPairs, end: bool) -> Result<Step, FilterError> {
            self.step(Release { headers: Some(headers), end, ..Release::default() })
        }

        fn body(&mut self, _: Direction, body: Bytes, end: bool) -> Result<Step, FilterError> {
            self.step(Release { body, end, ..Release::default() })
        }

        fn trailers(&mut self, _: Direction, trailers: HeaderPairs) -> Result<Step, FilterError> {
            self.step(Release { trailers: Some(trailers), end: true, ..Release::default() })
        }

        fn poll_resumed(&mut self, _: Direction, _: &mut Context<'_>) -> Poll<Result<Step, FilterError>> {
            if self.held == Release::default() {
                return Poll::Pending;
            }
            Poll::Ready(Ok(Step::Forward(std::mem::take(&mut self.held))))
        }

        fn poll_interrupted(&mut self, _: &mut Context<'_>) -> Poll<Result<Step, FilterError>> {
            Poll::Pending
        }

        fn take_held(&mut self, _: Direction) -> Release {
            std::mem::take(&mut self.held)
        }

        fn finish(self: Box<Self>) -> FilterState {
            FilterState::from([
                (self.mark.to_owned(), b"done".to_vec()),
                ("last".to_owned(), self.mark.into()),
            ])
        }
    }

    fn chain(policy: FailurePolicy, links: [(&'static str, Option<(usize, Odd)>); 3]) -> Chain {
        let mut chain = Chain::default();
        for (mark, odd) in links {
            chain.push(mark.into(), policy, Box::new(Loud { mark, odd, calls: 0, held: Release::default() }));
        }
        chain
    }

    fn marks(passed: Passed) -> (String, Release) {
        let Passed::Forward(release, true) = passed else { panic!("nothing came out") };
        let marks =
            release.headers.iter().flatten().map(|(_, mark)| String::from_utf8_lossy(mark).into_owned());
        (marks.collect(), release)
    }

    #[test]
    fn responses_pass_in_reverse() {
        let mut chain = chain(FailurePolicy::FailClosed, [("a", None), ("b", None), ("c", None)]);
        assert_eq!(marks(chain.headers(Direction::Request, Vec::new(), true)).0, "abc");
        assert_eq!(marks(chain.headers(Direction::Response, Vec::new(), true)).0, "cba");
        let state = chain.finish();
        assert_eq!((state.len(), &state["last"]), (4, &b"c".to_vec()));
    }

    #[test]
    fn what_the_middle_holds_goes_on_through_the_rest() {
        let held = Some((0, Odd::Hold));
        let mut chain = chain(FailurePolicy::FailClosed, [("a", None), ("b", held), ("c", None)]);
        assert!(matches!(chain.headers(Direction::Request, Vec::new(), false), Passed::Hold(false)));
        let Poll::Ready(passed) =
            chain.poll_resumed(Direction::Request, &mut Context::from_waker(std::task::Waker::noop()))
        else {
            panic!("nothing resumed");
        };
        assert_eq!(marks(passed).0, "abc");
        let (_, release) = marks(chain.body(Direction::Request, Bytes::from_static(b"x"), true));
        assert_eq!((&release.body[..], release.end), (&b"x"[..], true));
    }

    #[test]
    fn a_link_that_breaks_is_passed_over_or_ends_the_exchange() {
        for at in 0..3 {
            let links = |fails| [("a", None), ("b", fails), ("c", None)];
            let run = |mut chain: Chain| {
                let mut all = Release::default();
                for step in 0..3 {
                    let passed = match step {
                        0 => chain.headers(Direction::Request, Vec::new(), false),
                        1 => chain.body(Direction::Request, Bytes::from_static(b"body"), false),
                        _ => chain.trailers(Direction::Request, Vec::new()),
                    };
                    match passed {
                        Passed::Forward(release, _) => all.append(release),
                        _ => return (Err(step), chain.take_failures().len()),
                    }
                }
                (Ok(all), chain.take_failures().len())
            };
            let (all, failures) = run(chain(FailurePolicy::FailOpen, links(Some((at, Odd::Fail)))));
            let all = all.expect("fails open");
            assert_eq!((&all.body[..], all.end, failures), (&b"body"[..], true, 1));
            assert!(all.trailers.is_some());
            let (stopped, failures) = run(chain(FailurePolicy::FailClosed, links(Some((at, Odd::Fail)))));
            assert_eq!((stopped, failures), (Err(at), 1));
        }
    }
}
