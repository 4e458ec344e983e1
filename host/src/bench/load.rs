//! The two ends of a measured proxy: clients in front of it, an upstream behind it.
//!
//! Every answer is compared with what the upstream sent, so a proxy cannot be fast by answering wrongly. Many
//! exchanges take turns, since text that comes again and again is scored in less time than text that does not.
//!
//! [`Load::closed_loop`] asks again as soon as it has its answer and counts. It and the upstream are an event loop
//! each, as `wrk` and most servers are: with a thread a connection, a proxy wakes another sleeping thread with
//! every message that it passes on, and much of what is measured is that. [`Load::paced`] sends by the clock and
//! counts from the time a request was due, so a proxy that stalls pays for every request that had to wait; it has a
//! thread a connection, as those can sleep to the microsecond. [`Caller`] asks one at a time and says when each
//! part of the answer came; an answer that is a stream has its first event sent, and the rest a little later.
//!
//! Left out on purpose: pipelining, TLS and HTTP/2, which would measure other people's libraries.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::iter::Cycle;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{slice, thread};

use mio::{Events, Interest, Poll, Token};

use super::BenchError;

/// A stalled proxy fails the measurement after this.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Header by which a request says which answer it wants.
const NUMBER: &str = "x-exchange";

/// How long an upstream waits behind the first event of a stream.
const PAUSE: Duration = Duration::from_millis(1);

/// A request as a client sends it, and the body that has to come back.
#[derive(Debug)]
pub(super) struct Asked {
    request: Vec<u8>,
    expected: Vec<u8>,
    /// The answer is a stream of events, of which the first ends here.
    first_event: Option<usize>,
}

impl Asked {
    /// Bytes of the answer's body.
    pub(super) fn expected_bytes(&self) -> usize {
        self.expected.len()
    }

    /// Bytes of the request with its head.
    pub(super) fn request_bytes(&self) -> usize {
        self.request.len()
    }
}

/// Requests with these bodies, and what answers them.
pub(super) fn asked(path: &str, bodies: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<Asked> {
    let wire = |(number, (body, expected)): (usize, (Vec<u8>, Vec<u8>))| {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
             {NUMBER}: {number}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let first_event = first_event(&expected);
        Asked { request: [head.as_bytes(), &body].concat(), expected, first_event }
    };
    bodies.into_iter().enumerate().map(wire).collect()
}

/// Where the first event of a stream ends (WHATWG HTML, section 9.2.5); nowhere in what is no stream.
fn first_event(body: &[u8]) -> Option<usize> {
    let begins = [&b"data:"[..], b"event:", b"id:", b":"].iter().any(|field| body.starts_with(field));
    let end = memchr::memmem::find(body, b"\n\n")? + 2;
    (begins && end < body.len()).then_some(end)
}

/// An upstream that answers each request as it asks for, as long as this process lives.
#[derive(Clone, Debug)]
pub(super) struct Upstream {
    pub(super) address: SocketAddr,
    /// When an answer was last sent.
    answered: Arc<Mutex<Instant>>,
}

struct Answer {
    bytes: Vec<u8>,
    /// The rest is sent a little later.
    first: usize,
}

impl Upstream {
    pub(super) fn start(asked: &[Asked]) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        let answer = |asked: &Asked| {
            let content_type =
                if asked.first_event.is_some() { "text/event-stream" } else { "application/json" };
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n",
                asked.expected.len()
            );
            let first = head.len() + asked.first_event.unwrap_or(asked.expected.len());
            Answer { bytes: [head.as_bytes(), &asked.expected].concat(), first }
        };
        let answers: Vec<Answer> = asked.iter().map(answer).collect();
        let upstream = Self { address, answered: Arc::new(Mutex::new(Instant::now())) };
        let shared = upstream.clone();
        listener.set_nonblocking(true)?;
        let poll = Poll::new()?;
        thread::spawn(move || shared.serve(mio::net::TcpListener::from_std(listener), poll, &answers));
        Ok(upstream)
    }

    /// Answers whoever connects.
    fn serve(
        &self,
        mut listener: mio::net::TcpListener,
        mut poll: Poll,
        answers: &[Answer],
    ) -> io::Result<()> {
        const LISTENER: Token = Token(0);
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let mut events = Events::with_capacity(64);
        let mut connections: HashMap<Token, Connection> = HashMap::new();
        let mut last = LISTENER;
        loop {
            wait(&mut poll, &mut events, None)?;
            for event in &events {
                if event.token() == LISTENER {
                    while let Ok((mut stream, _)) = listener.accept() {
                        last = Token(last.0 + 1);
                        let interests = Interest::READABLE | Interest::WRITABLE;
                        // One that is gone already is none of the others' business.
                        if stream.set_nodelay(true).is_ok()
                            && poll.registry().register(&mut stream, last, interests).is_ok()
                        {
                            connections.insert(last, Connection::new(stream));
                        }
                    }
                } else if let Some(connection) = connections.get_mut(&event.token())
                    && !self.answer(connection, answers).unwrap_or(false)
                {
                    // It was closed, or what came was no HTTP.
                    connections.remove(&event.token());
                }
            }
        }
    }

    /// Answers what has come; says whether more may come.
    fn answer(&self, connection: &mut Connection, answers: &[Answer]) -> io::Result<bool> {
        connection.flush()?;
        loop {
            let number = match connection.messages.next() {
                Ok(Some(message)) => field(message.head, NUMBER.as_bytes()).and_then(|it| it.parse().ok()),
                Ok(None) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            };
            let Answer { bytes, first } = answers.get(number.unwrap_or(0)).ok_or_else(broken)?;
            let (first, rest) = bytes.split_at(*first);
            *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
            connection.send(first)?;
            if !rest.is_empty() {
                // Who asks for streams asks one at a time: nobody else waits.
                thread::sleep(PAUSE);
                connection.send(rest)?;
            }
            if connection.messages.is_empty() {
                return Ok(true);
            }
        }
    }

    /// When an answer was last sent: the one that a client has just got, if it alone asks.
    fn answered(&self) -> Instant {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for events; none may have come.
fn wait(poll: &mut Poll, events: &mut Events, most: Option<Duration>) -> io::Result<()> {
    match poll.poll(events, most) {
        // By a signal: whoever waits looks again.
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            events.clear();
            Ok(())
        }
        result => result,
    }
}

/// A message without its framing.
struct Message<'a> {
    head: &'a [u8],
    body: &'a [u8],
}

impl Message<'_> {
    /// The answer that was asked for, and no other.
    fn must_be(&self, expected: &[u8]) -> io::Result<()> {
        if self.head.get(9..12) == Some(b"200") && self.body == expected {
            return Ok(());
        }
        let head = String::from_utf8_lossy(self.head);
        let status = head.lines().next().unwrap_or_default();
        Err(io::Error::other(format!(
            "{status}, {} bytes of body where {} were sent",
            self.body.len(),
            expected.len()
        )))
    }
}

/// Reads messages framed by content-length or in chunks (RFC 9112 section 6), one after the other. Where the stream
/// does not block, a message of which some is missing is `WouldBlock`, and is read on by the next call.
struct Messages<S> {
    stream: S,
    buffer: Vec<u8>,
    /// Bytes of the buffer that the last message took.
    taken: usize,
    /// A chunked body put together.
    joined: Vec<u8>,
}

impl<S: Read> Messages<S> {
    fn new(stream: S) -> Self {
        Self { stream, buffer: Vec::with_capacity(16 << 10), taken: 0, joined: Vec::new() }
    }

    /// Nothing has come behind the last message.
    fn is_empty(&self) -> bool {
        self.taken == self.buffer.len()
    }

    /// The next message; `None` at a clean end.
    fn next(&mut self) -> io::Result<Option<Message<'_>>> {
        match self.head()? {
            Some(head) => self.behind(head).map(Some),
            None => Ok(None),
        }
    }

    /// Where the next message's head ends; `None` at a clean end.
    fn head(&mut self) -> io::Result<Option<usize>> {
        self.buffer.drain(..std::mem::take(&mut self.taken));
        let mut searched: usize = 0;
        loop {
            let from = searched.saturating_sub(3);
            if let Some(at) = memchr::memmem::find(&self.buffer[from..], b"\r\n\r\n") {
                return Ok(Some(from + at + 4));
            }
            searched = self.buffer.len();
            if !self.fill()? {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
    }

    /// The message whose head ends there.
    fn behind(&mut self, head: usize) -> io::Result<Message<'_>> {
        match field(&self.buffer[..head], b"content-length") {
            Some(length) => {
                let length: usize = length.parse().map_err(|_| broken())?;
                self.reach(head + length)?;
                self.taken = head + length;
                Ok(Message { head: &self.buffer[..head], body: &self.buffer[head..self.taken] })
            }
            None if field(&self.buffer[..head], b"transfer-encoding").is_some() => {
                self.join(head)?;
                Ok(Message { head: &self.buffer[..head], body: &self.joined })
            }
            None => {
                self.taken = head;
                Ok(Message { head: &self.buffer[..head], body: &[] })
            }
        }
    }

    /// Takes chunks off, from `at` on.
    fn join(&mut self, mut at: usize) -> io::Result<()> {
        self.joined.clear();
        loop {
            let line = loop {
                if let Some(end) = memchr::memmem::find(&self.buffer[at..], b"\r\n") {
                    break at..at + end;
                }
                self.reach(self.buffer.len() + 1)?;
            };
            let size = std::str::from_utf8(&self.buffer[line.clone()]).map_err(|_| broken())?;
            let size = usize::from_str_radix(size.trim(), 16).map_err(|_| broken())?;
            at = line.end + 2;
            self.reach(at + size + 2)?;
            self.joined.extend_from_slice(&self.buffer[at..at + size]);
            at += size + 2;
            if size == 0 {
                self.taken = at;
                return Ok(());
            }
        }
    }

    /// Reads until the buffer holds so many bytes.
    fn reach(&mut self, bytes: usize) -> io::Result<()> {
        while self.buffer.len() < bytes {
            if !self.fill()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    fn fill(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 16 << 10];
        let count = self.stream.read(&mut bytes)?;
        self.buffer.extend_from_slice(&bytes[..count]);
        Ok(count > 0)
    }
}

fn broken() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

/// A header field's value.
fn field<'a>(head: &'a [u8], name: &[u8]) -> Option<&'a str> {
    head.split(|&byte| byte == b'\n').find_map(|line| {
        let (known, value) = line.split_at_checked(name.len())?;
        let value = known.eq_ignore_ascii_case(name).then(|| value.strip_prefix(b":")).flatten()?;
        std::str::from_utf8(value.trim_ascii()).ok()
    })
}

/// A connection that never blocks.
struct Connection {
    messages: Messages<mio::net::TcpStream>,
    /// What could not be sent yet.
    unsent: Vec<u8>,
}

impl Connection {
    fn new(stream: mio::net::TcpStream) -> Self {
        Self { messages: Messages::new(stream), unsent: Vec::new() }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.unsent.is_empty() {
            let sent = self.write(bytes)?;
            self.unsent.extend_from_slice(&bytes[sent..]);
        } else {
            self.unsent.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// Sends on.
    fn flush(&mut self) -> io::Result<()> {
        if !self.unsent.is_empty() {
            let unsent = std::mem::take(&mut self.unsent);
            self.send(&unsent)?;
        }
        Ok(())
    }

    /// How much of it was sent.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < bytes.len() {
            match self.messages.stream.write(&bytes[sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sent)
    }
}

/// One client connection.
struct Client<'a> {
    messages: Messages<TcpStream>,
    asked: Cycle<slice::Iter<'a, Asked>>,
}

impl<'a> Client<'a> {
    fn connect(address: SocketAddr, asked: Cycle<slice::Iter<'a, Asked>>) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(READ_TIMEOUT))?;
        Ok(Self { messages: Messages::new(stream), asked })
    }

    /// Asks the next and waits for all of its answer; returns when the first byte of its body was here.
    fn ask(&mut self) -> io::Result<Instant> {
        let Asked { request, expected, .. } =
            self.asked.next().ok_or_else(|| io::Error::other("there is nothing to ask"))?;
        self.messages.stream.write_all(request)?;
        let Some(head) = self.messages.head()? else {
            return Err(io::Error::other("it closes the connection"));
        };
        if !expected.is_empty() {
            self.messages.reach(head + 1)?;
        }
        let first_byte = Instant::now();
        self.messages.behind(head)?.must_be(expected)?;
        Ok(first_byte)
    }
}

/// What one request took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Took {
    /// From its first byte sent to the last one of the answer.
    pub(super) whole: Duration,
    /// From its first byte sent to the first one of the answer's body.
    pub(super) to_first_byte: Duration,
    /// Of that, what went by since the upstream answered.
    pub(super) first_byte: Duration,
}

/// A client who asks one at a time, while nobody else asks.
pub(super) struct Caller<'a> {
    proxy: &'static str,
    upstream: &'a Upstream,
    client: Client<'a>,
}

impl<'a> Caller<'a> {
    pub(super) fn connect(
        proxy: &'static str,
        address: SocketAddr,
        upstream: &'a Upstream,
        asked: &'a [Asked],
    ) -> io::Result<Self> {
        Ok(Self { proxy, upstream, client: Client::connect(address, asked.iter().cycle())? })
    }

    /// Asks the next.
    pub(super) fn ask(&mut self) -> Result<Took, BenchError> {
        let begin = Instant::now();
        let wrong = |error: io::Error| BenchError::Answer { proxy: self.proxy, what: error.to_string() };
        let first_byte = self.client.ask().map_err(wrong)?;
        Ok(Took {
            whole: begin.elapsed(),
            to_first_byte: first_byte.saturating_duration_since(begin),
            first_byte: first_byte.saturating_duration_since(self.upstream.answered()),
        })
    }
}

/// What goes through a proxy, over and over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load<'a> {
    /// Asked in turn, by each connection from another place on.
    pub(super) asked: &'a [Asked],
    pub(super) connections: usize,
}

impl Load<'_> {
    /// On all connections at once: what `work` gives for each.
    fn on_all<T: Send>(
        &self,
        proxy: &'static str,
        address: SocketAddr,
        work: impl Fn(usize, Client<'_>) -> io::Result<T> + Sync,
    ) -> Result<Vec<T>, BenchError> {
        let connect = |index: usize| Client::connect(address, self.asked_from(index));
        let connect = &connect;
        let results: Vec<io::Result<T>> = thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = (0..self.connections)
                .map(|index| scope.spawn(move || work(index, connect(index)?)))
                .collect();
            let joined = threads.into_iter().map(thread::ScopedJoinHandle::join);
            joined
                .map(|result| result.unwrap_or_else(|_| Err(io::Error::other("its client panicked"))))
                .collect()
        });
        let results: io::Result<Vec<T>> = results.into_iter().collect();
        results.map_err(|error| BenchError::Answer { proxy, what: error.to_string() })
    }

    /// What a connection asks, one after the other.
    fn asked_from(&self, connection: usize) -> Cycle<slice::Iter<'_, Asked>> {
        let mut asked = self.asked.iter().cycle();
        for _ in 0..connection * self.asked.len() / self.connections.max(1) {
            asked.next();
        }
        asked
    }

    /// Requests a second, each connection asking again as soon as it is answered; and their number.
    pub(super) fn closed_loop(
        &self,
        proxy: &'static str,
        address: SocketAddr,
        duration: Duration,
    ) -> Result<(f64, u64), BenchError> {
        let begin = Instant::now();
        let count = self
            .drive(address, begin + duration)
            .map_err(|error| BenchError::Answer { proxy, what: error.to_string() })?;
        Ok((count as f64 / begin.elapsed().as_secs_f64(), count))
    }

    /// Asks on all connections until `end`; returns how many answers there were.
    fn drive(&self, address: SocketAddr, end: Instant) -> io::Result<u64> {
        let nothing = || io::Error::other("there is nothing to ask");
        let mut poll = Poll::new()?;
        let mut clients = Vec::new();
        for index in 0..self.connections {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let mut stream = mio::net::TcpStream::from_std(stream);
            poll.registry().register(&mut stream, Token(index), Interest::READABLE | Interest::WRITABLE)?;
            let (mut connection, mut asked) = (Connection::new(stream), self.asked_from(index));
            let first = asked.next().ok_or_else(nothing)?;
            connection.send(&first.request)?;
            clients.push((connection, asked, Some((first, Instant::now()))));
        }
        let mut events = Events::with_capacity(64);
        let (mut count, mut waiting) = (0, clients.len());
        while waiting > 0 {
            wait(&mut poll, &mut events, Some(READ_TIMEOUT))?;
            let now = Instant::now();
            let stalled = |since: Instant| now.saturating_duration_since(since) >= READ_TIMEOUT;
            if clients.iter().any(|(_, _, awaited)| awaited.is_some_and(|(_, since)| stalled(since))) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            for event in &events {
                let Some((connection, asked, awaited)) = clients.get_mut(event.token().0) else { continue };
                let Some((of, _)) = *awaited else { continue };
                connection.flush()?;
                match connection.messages.next() {
                    Ok(Some(message)) => message.must_be(&of.expected)?,
                    Ok(None) => return Err(io::Error::other("it closes the connection")),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(error) => return Err(error),
                }
                count += 1;
                let now = Instant::now();
                if now < end {
                    let next = asked.next().ok_or_else(nothing)?;
                    connection.send(&next.request)?;
                    *awaited = Some((next, now));
                } else {
                    *awaited = None;
                    waiting -= 1;
                }
            }
        }
        Ok(count)
    }

    /// Sends `rate` requests a second by the clock; latencies from when each was due, in us.
    pub(super) fn paced(
        &self,
        proxy: &'static str,
        address: SocketAddr,
        rate: f64,
        duration: Duration,
    ) -> Result<Vec<u64>, BenchError> {
        let interval = Duration::from_secs_f64(self.connections as f64 / rate.max(1.0));
        let begin = Instant::now() + Duration::from_millis(50);
        let latencies = self.on_all(proxy, address, |index, mut client| {
            let mut due = begin + interval.mul_f64(index as f64 / self.connections as f64);
            let mut latencies = Vec::new();
            while due < begin + duration {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                client.ask()?;
                latencies.push(u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX));
                due += interval;
            }
            Ok(latencies)
        })?;
        Ok(latencies.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(answers: &'static [&'static str]) -> SocketAddr {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || -> io::Result<()> {
                    let mut messages = Messages::new(stream);
                    for answer in answers.iter().cycle() {
                        if messages.next()?.is_none() {
                            break;
                        }
                        // In two pieces, cut in the middle.
                        let (first, second) = answer.as_bytes().split_at(answer.len() / 2);
                        messages.stream.write_all(first)?;
                        thread::sleep(Duration::from_millis(1));
                        messages.stream.write_all(second)?;
                    }
                    Ok(())
                });
            }
        });
        address
    }

    #[test]
    fn requests_are_counted_and_wrong_answers_are_not_taken() {
        let asked =
            asked("/", vec![(b"{}".to_vec(), b"right".to_vec()), (b"[]".to_vec(), b"right".to_vec())]);
        let load = Load { asked: &asked, connections: 2 };
        let (brief, name) = (Duration::from_millis(500), "a proxy");
        let upstream = Upstream::start(&asked).unwrap().address;
        let (rate, count) = load.closed_loop(name, upstream, brief).unwrap();
        assert!(count > 2 && rate > 0.0, "{rate} {count}");
        assert_eq!(load.paced(name, upstream, 100.0, brief).unwrap().len(), 50);
        let chunked = proxy(&[
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nri\r\n3\r\nght\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright",
        ]);
        assert!(load.closed_loop(name, chunked, brief).unwrap().1 > 2);
        for wrong in [
            &["HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong"] as &[_],
            &["HTTP/1.1 500 No\r\ncontent-length: 5\r\n\r\nright"],
            &["HTTP/1.1 200 OK\r\n\r\n"],
            &["HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nx\r\n"],
        ] {
            let error = load.closed_loop(name, proxy(wrong), brief).unwrap_err();
            assert!(matches!(error, BenchError::Answer { proxy: "a proxy", .. }), "{error}");
        }
    }
}
