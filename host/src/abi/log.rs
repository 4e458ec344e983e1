//! Where a guest's log lines go, and the last few that an error message quotes.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::error::LastWords;

/// How many lines at warn and above an error quotes.
const LAST_WORDS_LINES: usize = 8;
/// Longest quoted line, in bytes.
const LAST_WORDS_LINE_BYTES: usize = 2048;

/// Severity, in the ABI's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum LogLevel {
    /// Everything.
    Trace = 0,
    /// For developers.
    Debug = 1,
    /// Worth knowing.
    Info = 2,
    /// Something is off.
    Warn = 3,
    /// Something failed.
    Error = 4,
    /// The filter cannot go on.
    Critical = 5,
}

impl LogLevel {
    pub(super) fn from_abi(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::Trace,
            1 => Self::Debug,
            2 => Self::Info,
            3 => Self::Warn,
            4 => Self::Error,
            5 => Self::Critical,
            _ => return None,
        })
    }
}

/// One line from a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// Its severity.
    pub level: LogLevel,
    /// The root id of the plugin.
    pub root_id: String,
    /// The context that spoke: the root context's id or a stream's.
    pub context_id: u32,
    /// The text; bytes that are not UTF-8 are replaced.
    pub message: String,
}

/// Receives the log lines of one or more VMs; cheap to clone.
#[derive(Clone)]
pub struct LogSink {
    level: LogLevel,
    write: Option<Arc<dyn Fn(LogLine) + Send + Sync>>,
}

impl LogSink {
    /// Passes lines at `level` and above to `write`; lower ones are dropped, and
    /// `proxy_get_log_level` tells the guest so.
    pub fn new(level: LogLevel, write: impl Fn(LogLine) + Send + Sync + 'static) -> Self {
        Self { level, write: Some(Arc::new(write)) }
    }

    /// Drops every line; the guest is told that only critical ones are wanted.
    #[must_use]
    pub fn discard() -> Self {
        Self { level: LogLevel::Critical, write: None }
    }

    /// Keeps every line at `level` and above in the returned list, for tests and replays.
    #[must_use]
    pub fn capture(level: LogLevel) -> (Self, Arc<Mutex<Vec<LogLine>>>) {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = lines.clone();
        let write = move |line| {
            sink.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        };
        (Self::new(level, write), lines)
    }

    /// Passes a line on, if its level is wanted.
    pub fn pass(&self, line: LogLine) {
        if let Some(write) = self.write.as_ref().filter(|_| line.level >= self.level) {
            write(line);
        }
    }

    /// The lowest level that is passed on.
    #[must_use]
    pub fn level(&self) -> LogLevel {
        self.level
    }
}

impl fmt::Debug for LogSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogSink").field("level", &self.level).finish_non_exhaustive()
    }
}

/// The log of one VM: its sink and what an error will quote.
pub(super) struct GuestLog {
    sink: LogSink,
    root_id: String,
    last: VecDeque<String>,
}

impl GuestLog {
    pub(super) fn new(sink: LogSink, root_id: &str) -> Self {
        Self { sink, root_id: root_id.to_owned(), last: VecDeque::new() }
    }

    pub(super) fn level(&self) -> LogLevel {
        self.sink.level
    }

    pub(super) fn write(&mut self, level: LogLevel, context_id: u32, message: &[u8]) {
        let wanted = self.sink.write.is_some() && level >= self.sink.level;
        if !wanted && level < LogLevel::Warn {
            return;
        }
        let message = String::from_utf8_lossy(message);
        if level >= LogLevel::Warn {
            if self.last.len() == LAST_WORDS_LINES {
                self.last.pop_front();
            }
            let mut end = message.len().min(LAST_WORDS_LINE_BYTES);
            while !message.is_char_boundary(end) {
                end -= 1;
            }
            self.last.push_back(message[..end].to_owned());
        }
        if let Some(write) = self.sink.write.as_ref().filter(|_| wanted) {
            write(LogLine {
                level,
                root_id: self.root_id.clone(),
                context_id,
                message: message.into_owned(),
            });
        }
    }

    /// Hands out the quoted lines and forgets them, so that the next error does not repeat them.
    pub(super) fn take_last_words(&mut self) -> LastWords {
        LastWords(self.last.drain(..).collect())
    }
}
