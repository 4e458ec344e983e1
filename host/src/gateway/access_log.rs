//! One JSON line per exchange.
//!
//! Lines are made and written by a thread of their own from a bounded queue, because a full disk or a
//! stopped terminal must not stop traffic: when the queue is full the line is dropped and counted
//! (`driftlock_gateway_access_log_dropped_total`). The thread gathers for a few milliseconds and is
//! woken only from its sleep: a wake-up and a write per line cost a seventh of the whole exchange.
//!
//! Left out on purpose: rotation (move the file and send SIGHUP, which reopens it) and formats.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::error::GatewayError;
use super::filter::FilterState;
use super::metrics::Counter;

/// Lines that may wait for the writer: about 1 KiB each.
const QUEUE_LINES: usize = 8192;
/// How long a line may wait for others to be written with.
const GATHERING: Duration = Duration::from_millis(5);

/// Where the access log goes.
#[derive(Debug, Clone, Default)]
pub enum AccessLogTarget {
    /// Nowhere.
    #[default]
    None,
    /// Standard output.
    Stdout,
    /// Appended to a file.
    File(PathBuf),
    /// To the program that started the gateway.
    Channel(Sender<AccessRecord>),
}

/// What happened in one exchange.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AccessRecord {
    /// When the request's headers had arrived.
    pub time: SystemTime,
    /// Request method.
    pub method: String,
    /// Path and query as the client sent them.
    pub path: String,
    /// Status sent to the client; none if it never got one.
    pub status: Option<u16>,
    /// Request body bytes received from the client.
    pub bytes_in: u64,
    /// Response body bytes handed to the client's connection.
    pub bytes_out: u64,
    /// From the request's headers to the last response byte handed over.
    pub duration: Duration,
    /// `HTTP/1.1`, `HTTP/2` or `HTTP/1.0`.
    pub protocol: &'static str,
    /// Name of the route that took the request; empty if none did.
    pub route: Arc<str>,
    /// Host and port of the route's upstream; empty if no route took the request.
    pub upstream: Arc<str>,
    /// `websocket` or `connect`, if the connection left HTTP and its bytes passed no filter.
    pub upgrade: Option<&'static str>,
    /// The client's address.
    pub client: SocketAddr,
    /// The upstream's answer was used (as opposed to a reply of the gateway or the filter).
    pub from_upstream: bool,
    /// Why the gateway or the filter answered in the upstream's place, as one word; else empty.
    pub details: String,
    /// The filter crashed or was not to be had during this exchange.
    pub filter_failed: bool,
    /// `complete`, `client_closed`, or the reason the exchange was aborted.
    pub outcome: &'static str,
    /// What the filter left: property path to value.
    pub filter_state: FilterState,
}

impl AccessRecord {
    /// The record of an exchange that has just begun.
    pub(super) fn begin(method: String, path: String, client: SocketAddr) -> Self {
        Self {
            time: SystemTime::now(),
            method,
            path,
            status: None,
            bytes_in: 0,
            bytes_out: 0,
            duration: Duration::ZERO,
            protocol: "HTTP/1.1",
            route: Arc::default(),
            upstream: Arc::default(),
            upgrade: None,
            client,
            from_upstream: false,
            details: String::new(),
            filter_failed: false,
            outcome: "complete",
            filter_state: FilterState::new(),
        }
    }

    /// The record as one line of JSON without the newline. A filter state value that is itself JSON
    /// is embedded byte for byte, so that numbers keep their digits.
    pub fn to_json(&self) -> String {
        let mut line = String::with_capacity(256);
        line.push_str("{\"time\":\"");
        push_rfc3339(&mut line, self.time);
        line.push_str("\",\"method\":");
        push_string(&mut line, &self.method);
        line.push_str(",\"path\":");
        push_string(&mut line, &self.path);
        line.push_str(",\"status\":");
        match self.status {
            Some(status) => line.push_str(&status.to_string()),
            None => line.push_str("null"),
        }
        line.push_str(&format!(
            ",\"bytes_in\":{},\"bytes_out\":{},\"duration_us\":{},\"protocol\":\"{}\",\"upgrade\":",
            self.bytes_in,
            self.bytes_out,
            self.duration.as_micros(),
            self.protocol
        ));
        match self.upgrade {
            Some(upgrade) => push_string(&mut line, upgrade),
            None => line.push_str("null"),
        }
        line.push_str(",\"route\":");
        push_string(&mut line, &self.route);
        line.push_str(",\"upstream\":");
        push_string(&mut line, &self.upstream);
        line.push_str(&format!(
            ",\"client\":\"{}\",\"from_upstream\":{},\"details\":",
            self.client, self.from_upstream
        ));
        push_string(&mut line, &self.details);
        line.push_str(&format!(
            ",\"filter_failed\":{},\"outcome\":\"{}\",\"filter_state\":{{",
            self.filter_failed, self.outcome
        ));
        for (index, (key, value)) in self.filter_state.iter().enumerate() {
            if index > 0 {
                line.push(',');
            }
            push_string(&mut line, key);
            line.push(':');
            push_value(&mut line, value);
        }
        line.push_str("}}");
        line
    }
}

fn push_string(line: &mut String, text: &str) {
    // Display of a JSON string value cannot fail and escapes control characters.
    line.push_str(&serde_json::Value::from(text).to_string());
}

fn push_value(line: &mut String, value: &[u8]) {
    let text = String::from_utf8_lossy(value);
    let is_json = serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok();
    if is_json && !text.contains(['\n', '\r']) {
        line.push_str(text.trim());
    } else {
        push_string(line, &text);
    }
}

/// UTC with milliseconds, as in RFC 3339. The calendar is Howard Hinnant's `civil_from_days`.
fn push_rfc3339(line: &mut String, time: SystemTime) {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    line.push_str(&format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_millis()
    ));
}

enum Sink {
    None,
    Channel(Mutex<Sender<AccessRecord>>),
    Writer { queue: Arc<Queue>, thread: Mutex<Option<JoinHandle<()>>> },
}

/// Lines on their way to the writer's thread.
#[derive(Default)]
struct Queue {
    state: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Default)]
struct Waiting {
    lines: Vec<Line>,
    /// The thread has nothing to do until it is told.
    asleep: bool,
    closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, line: Line) -> bool {
        let mut waiting = self.lock();
        if waiting.closed || waiting.lines.len() >= QUEUE_LINES {
            return false;
        }
        waiting.lines.push(line);
        if std::mem::take(&mut waiting.asleep) {
            self.more.notify_one();
        }
        true
    }

    fn close(&self) {
        self.lock().closed = true;
        self.more.notify_one();
    }

    /// Swaps all that waits for an empty list; false once nothing will come.
    fn take(&self, lines: &mut Vec<Line>) -> bool {
        let mut waiting = self.lock();
        while waiting.lines.is_empty() {
            if waiting.closed {
                return false;
            }
            waiting.asleep = true;
            waiting = self.more.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        if !waiting.closed {
            drop(waiting);
            std::thread::sleep(GATHERING);
            waiting = self.lock();
        }
        std::mem::swap(&mut waiting.lines, lines);
        true
    }
}

type Out = Box<dyn Write + Send>;

/// What the writer's thread is told.
#[allow(
    clippy::large_enum_variant,
    reason = "nearly all are records, and a box would cost each an allocation"
)]
enum Line {
    Record(AccessRecord),
    /// Write to this from now on.
    Switch(Out),
}

/// Opens a target that lines are written to.
fn open(target: &AccessLogTarget) -> Result<Option<Out>, GatewayError> {
    Ok(match target {
        AccessLogTarget::None | AccessLogTarget::Channel(_) => None,
        AccessLogTarget::Stdout => Some(Box::new(io::stdout())),
        AccessLogTarget::File(path) => {
            let file = File::options().create(true).append(true).open(path).map_err(|source| {
                GatewayError::File { action: "open the access log", path: path.clone(), source }
            })?;
            Some(Box::new(file))
        }
    })
}

/// The open access log.
pub(super) struct AccessLog {
    sink: Sink,
    /// Lines lost because the writer could not keep up.
    pub(super) dropped: Counter,
}

impl AccessLog {
    pub(super) fn open(target: AccessLogTarget) -> Result<Self, GatewayError> {
        let sink = match (open(&target)?, target) {
            (Some(out), _) => Self::writer(out)?,
            (None, AccessLogTarget::Channel(sender)) => Sink::Channel(Mutex::new(sender)),
            (None, _) => Sink::None,
        };
        Ok(Self { sink, dropped: Counter::default() })
    }

    /// Opens a target again, or another one: for a file that was moved away.
    pub(super) fn reopen(&self, target: &AccessLogTarget) -> Result<(), GatewayError> {
        match (&self.sink, open(target)?) {
            (Sink::Writer { queue, .. }, Some(out)) => {
                // Takes its place in the queue even if that is full.
                queue.lock().lines.push(Line::Switch(out));
                Ok(())
            }
            (Sink::Writer { .. }, None) | (_, Some(_)) => {
                Err(GatewayError::NeedsRestart { setting: "access_log" })
            }
            _ => Ok(()),
        }
    }

    fn writer(out: Out) -> Result<Sink, GatewayError> {
        let queue: Arc<Queue> = Arc::default();
        let source = Arc::clone(&queue);
        let thread = std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write_lines(&source, BufWriter::new(out)))
            .map_err(GatewayError::Runtime)?;
        Ok(Sink::Writer { queue, thread: Mutex::new(Some(thread)) })
    }

    pub(super) fn write(&self, record: AccessRecord) {
        let written = match &self.sink {
            Sink::None => true,
            Sink::Channel(sender) => {
                sender.lock().unwrap_or_else(PoisonError::into_inner).send(record).is_ok()
            }
            Sink::Writer { queue, .. } => queue.put(Line::Record(record)),
        };
        if !written {
            self.dropped.increment();
        }
    }

    /// Writes out what is queued and stops. Blocks for as long as the target does.
    pub(super) fn close(&self) {
        if let Sink::Writer { queue, thread } = &self.sink {
            queue.close();
            let thread = thread.lock().unwrap_or_else(PoisonError::into_inner).take();
            if thread.is_some_and(|thread| thread.join().is_err()) {
                tracing::error!(target: "driftlock::gateway", "the access log's thread panicked; its last lines are lost");
            }
        }
    }
}

fn write_lines(queue: &Queue, mut out: BufWriter<Out>) {
    let mut failing = false;
    let mut check = |result: io::Result<()>| {
        if let Err(error) = &result
            && !failing
        {
            tracing::error!(target: "driftlock::gateway", %error, "the access log cannot be written; lines are lost until it can");
        }
        failing = result.is_err();
    };
    let mut lines = Vec::new();
    while queue.take(&mut lines) {
        for line in lines.drain(..) {
            match line {
                Line::Record(record) => {
                    let mut line = record.to_json();
                    line.push('\n');
                    check(out.write_all(line.as_bytes()));
                }
                Line::Switch(next) => {
                    check(out.flush());
                    out = BufWriter::new(next);
                }
            }
        }
        check(out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> AccessRecord {
        let mut record = AccessRecord::begin(
            "POST".to_owned(),
            "/v1/\"chat\"?a=\u{1}".to_owned(),
            SocketAddr::from(([127, 0, 0, 1], 9)),
        );
        record.time = UNIX_EPOCH + Duration::from_millis(951_782_400_123);
        record.status = Some(200);
        record.duration = Duration::from_micros(56);
        record.filter_state = FilterState::from([
            ("wasm.driftlock.verdict".to_owned(), br#"{"p_value":0.10,"spans":[1]}"#.to_vec()),
            ("wasm.note".to_owned(), b"not {json}\nat all".to_vec()),
        ]);
        record
    }

    #[test]
    fn a_line_is_json_and_keeps_the_digits_of_embedded_json() {
        let line = record().to_json();
        assert!(!line.contains('\n'));
        assert!(line.contains(r#""wasm.driftlock.verdict":{"p_value":0.10,"spans":[1]}"#), "{line}");
        let value: serde_json::Value = serde_json::from_str(&line).expect("valid JSON");
        assert_eq!(value["time"], "2000-02-29T00:00:00.123Z");
        assert_eq!(value["path"], "/v1/\"chat\"?a=\u{1}");
        assert_eq!(value["filter_state"]["wasm.note"], "not {json}\nat all");
        assert_eq!(value["duration_us"], 56);
    }

    #[test]
    fn lines_reach_the_file_when_the_log_is_closed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("access.log");
        let log = AccessLog::open(AccessLogTarget::File(path.clone())).expect("opens");
        for _ in 0..100 {
            log.write(record());
        }
        log.close();
        assert_eq!(std::fs::read_to_string(path).expect("written").lines().count(), 100);
        log.write(record());
        assert_eq!(log.dropped.value(), 1);
    }
}
