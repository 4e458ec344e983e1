//! A record of what a guest did: every callback, every host call with its arguments and results.
//!
//! Given to a VM by [`PluginOptions::tape`](super::PluginOptions), for tests, replays and bug reports.
//! A tape can also answer host calls in the host's place ([`Tape::answer`]), which is how a test puts a
//! filter into situations that are hard to bring about: a lost compare-and-swap, a missing property, a
//! call-out that is refused. Cost: an allocation or two per host call; none at all without a tape. The
//! oldest entries go when there are more than [`TAPE_MAX_ENTRIES`].
//!
//! Left out on purpose: WASI calls; what a guest prints is in the log.

use std::collections::VecDeque;
use std::fmt::{self, Debug, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wasmtime::Caller;

use super::headers::HeaderMap;
use super::host::Host;
use super::memory::{Outcome, Stop, bytes, deliver, finish, read_u32, view, write_u32, write_u64};
use super::status::{MapType, Status};

/// Most entries that a tape keeps.
pub const TAPE_MAX_ENTRIES: usize = 65_536;

/// An argument or result of a host call.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value {
    /// A number: statuses, identifiers, sizes, times.
    Number(u64),
    /// A header map, by the number the ABI gives it.
    Map(u32),
    /// Bytes: names, keys, values, bodies.
    Bytes(Vec<u8>),
    /// Name-value pairs.
    Pairs(HeaderMap),
    /// Pairs whose bytes do not parse, or a range outside the guest's memory.
    Invalid,
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

impl From<i32> for Value {
    fn from(number: i32) -> Self {
        Self::Number(i64::from(number).cast_unsigned())
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Bytes(text.as_bytes().to_vec())
    }
}

impl From<&[u8]> for Value {
    fn from(bytes: &[u8]) -> Self {
        Self::Bytes(bytes.to_vec())
    }
}

impl<const N: usize> From<&[u8; N]> for Value {
    fn from(bytes: &[u8; N]) -> Self {
        Self::Bytes(bytes.to_vec())
    }
}

impl From<Vec<u8>> for Value {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<HeaderMap> for Value {
    fn from(pairs: HeaderMap) -> Self {
        Self::Pairs(pairs)
    }
}

impl From<MapType> for Value {
    fn from(map: MapType) -> Self {
        Self::Map(map as u32)
    }
}

impl Value {
    /// Equal, where a number stands for the map of that number too, and a negative one for its 32 bits.
    pub(super) fn same(&self, other: &Self) -> bool {
        let narrow = |number: u64| number as u32;
        match (self, other) {
            (Self::Number(a), Self::Map(b)) | (Self::Map(b), Self::Number(a)) => *a == u64::from(*b),
            (Self::Number(a), Self::Number(b)) if a.cast_signed() < 0 && *b <= u64::from(u32::MAX) => {
                u64::from(narrow(*a)) == *b
            }
            _ => self == other,
        }
    }
}

/// Longest text of one value in a printed tape, in bytes.
const SHOWN_BYTES: usize = 200;

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) if number.cast_signed() < 0 => write!(f, "{}", number.cast_signed()),
            Self::Number(number) => write!(f, "{number}"),
            Self::Map(map) => match MapType::from_abi(*map) {
                Ok(map) => write!(f, "{map:?}"),
                Err(_) => write!(f, "map {map}"),
            },
            Self::Bytes(bytes) => show(f, bytes),
            Self::Pairs(pairs) => {
                f.write_char('{')?;
                for (index, (name, value)) in pairs.iter().enumerate() {
                    f.write_str(if index > 0 { ", " } else { "" })?;
                    show(f, name)?;
                    f.write_str(": ")?;
                    show(f, value)?;
                }
                f.write_char('}')
            }
            Self::Invalid => f.write_str("(invalid)"),
        }
    }
}

impl Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn show(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    let shown = bytes.get(..SHOWN_BYTES).unwrap_or(bytes);
    write!(f, "\"{}\"", shown.escape_ascii())?;
    if shown.len() < bytes.len() {
        write!(f, "... ({} bytes)", bytes.len())?;
    }
    Ok(())
}

/// One host call, as it happened.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostCall {
    /// Name of the import, `proxy_` included.
    pub name: &'static str,
    /// The context it was about: the root's id or a stream's.
    pub context_id: u32,
    /// The arguments, pointers and lengths read from the guest's memory.
    pub arguments: Vec<Value>,
    /// What the guest got; `None` when it trapped inside the call (in its own allocator).
    pub status: Option<Status>,
    /// The results, when the status is Ok.
    pub results: Vec<Value>,
    /// Whether the tape answered, rather than the host.
    pub answered_by_tape: bool,
}

impl fmt::Display for HostCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.name)?;
        for (index, argument) in self.arguments.iter().enumerate() {
            write!(f, "{}{argument}", if index > 0 { ", " } else { "" })?;
        }
        match self.status {
            Some(status) => write!(f, ") = {status:?}")?,
            None => f.write_str(") trapped")?,
        }
        for (index, result) in self.results.iter().enumerate() {
            write!(f, "{}{result}", if index > 0 { ", " } else { " " })?;
        }
        if self.answered_by_tape { f.write_str(" (answered by the tape)") } else { Ok(()) }
    }
}

impl Debug for HostCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One entry of a tape.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TapeEntry {
    /// The guest was entered: export and parameters.
    Entered(&'static str, String),
    /// The guest returned from an export: what it returned, or why it crashed.
    Left(&'static str, String),
    /// The guest called the host.
    Called(HostCall),
}

impl fmt::Display for TapeEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entered(name, parameters) => write!(f, "-> {name}{parameters}"),
            Self::Left(name, result) => write!(f, "<- {name}: {result}"),
            Self::Called(call) => write!(f, "     {call}"),
        }
    }
}

impl Debug for TapeEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a host call is answered with in the host's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What the guest gets.
    pub status: Status,
    /// The results, in the order of the call's out-parameters; fewer leave the rest unwritten.
    pub results: Vec<Value>,
}

/// Decides whether to answer a host call: import and arguments to answer.
type Answerer = Box<dyn FnMut(&'static str, &[Value]) -> Option<Answer> + Send>;

#[derive(Default)]
struct Inner {
    entries: VecDeque<TapeEntry>,
    forgotten: usize,
    answerers: Vec<Answerer>,
}

/// A record of one or more VMs; clones are the same tape.
#[derive(Clone, Default)]
pub struct Tape {
    inner: Arc<Mutex<Inner>>,
}

impl Tape {
    /// An empty tape.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Everything recorded so far, oldest first.
    #[must_use]
    pub fn entries(&self) -> Vec<TapeEntry> {
        self.lock().entries.iter().cloned().collect()
    }

    /// The host calls recorded since entry number `since`, counted from the tape's start.
    #[must_use]
    pub fn calls_since(&self, since: usize) -> Vec<HostCall> {
        let inner = self.lock();
        let skip = since.saturating_sub(inner.forgotten);
        let calls = inner.entries.iter().skip(skip).filter_map(|entry| match entry {
            TapeEntry::Called(call) => Some(call.clone()),
            _ => None,
        });
        calls.collect()
    }

    /// How many entries were ever recorded.
    #[must_use]
    pub fn len(&self) -> usize {
        let inner = self.lock();
        inner.forgotten + inner.entries.len()
    }

    /// Whether nothing was recorded yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lets `answerer` answer host calls in the host's place: it sees each call's name and arguments
    /// and returns `None` to leave it to the host (or to the next answerer). Later ones are asked first.
    /// It must not use the tape.
    pub fn answer(&self, answerer: impl FnMut(&'static str, &[Value]) -> Option<Answer> + Send + 'static) {
        self.lock().answerers.push(Box::new(answerer));
    }

    /// Withdraws every answerer.
    pub fn stop_answering(&self) {
        self.lock().answerers.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, entry: TapeEntry) {
        let mut inner = self.lock();
        if inner.entries.len() == TAPE_MAX_ENTRIES {
            inner.entries.pop_front();
            inner.forgotten += 1;
        }
        inner.entries.push_back(entry);
    }

    pub(super) fn enter(&self, name: &'static str, parameters: &impl Debug) {
        let text = format!("{parameters:?}");
        self.push(TapeEntry::Entered(name, if text.starts_with('(') { text } else { format!("({text})") }));
    }

    pub(super) fn leave<R: Debug>(&self, name: &'static str, result: &wasmtime::Result<R>) {
        let text = match result {
            Ok(result) => format!("{result:?}"),
            Err(error) => format!("trapped: {}", error.root_cause()),
        };
        self.push(TapeEntry::Left(name, text));
    }

    fn ask(&self, name: &'static str, arguments: &[Value]) -> Option<Answer> {
        self.lock().answerers.iter_mut().rev().find_map(|answerer| answerer(name, arguments))
    }
}

impl fmt::Display for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.lock();
        if inner.forgotten > 0 {
            writeln!(f, "({} earlier entries are gone)", inner.forgotten)?;
        }
        inner.entries.iter().try_for_each(|entry| writeln!(f, "{entry}"))
    }
}

impl Debug for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tape({} entries)", self.len())
    }
}

/// The name of a host call, and what its parameters are: one letter each for a number (`n`, `L` for 64
/// bits), a map (`m`), a buffer (`u`), bytes (`b`) and pairs (`p`) given as pointer and length; then what
/// it writes: a number (`o`, `O`), bytes (`B`) or pairs (`P`) that the guest allocates.
pub(super) struct Shape {
    pub(super) name: &'static str,
    letters: &'static str,
}

impl Shape {
    pub(super) const fn new(name: &'static str, letters: &'static str) -> Self {
        Self { name, letters }
    }
}

/// Runs a host call and records it, or has the tape answer it.
pub(super) fn observed<'a>(
    caller: &mut Caller<'a, Host>,
    shape: &Shape,
    raw: &[u64],
    call: impl FnOnce(&mut Caller<'a, Host>) -> Outcome,
) -> wasmtime::Result<u32> {
    let Some(tape) = caller.data().tape.clone() else { return finish(call(caller)) };
    let context_id = caller.data().context();
    let arguments = read_values(caller, shape, raw, false);
    let answer = tape.ask(shape.name, &arguments);
    let answered_by_tape = answer.is_some();
    let status = finish(match answer {
        Some(answer) => write_answer(caller, shape, raw, answer),
        None => call(caller),
    });
    let results = match status {
        Ok(0) => read_values(caller, shape, raw, true),
        _ => Vec::new(),
    };
    let got = status.as_ref().ok().and_then(|status| Status::from_abi(*status));
    let name = shape.name;
    let call = HostCall { name, context_id, arguments, status: got, results, answered_by_tape };
    tape.push(TapeEntry::Called(call));
    status
}

/// The arguments that a shape describes, or the results.
fn read_values(caller: &mut Caller<'_, Host>, shape: &Shape, raw: &[u64], results: bool) -> Vec<Value> {
    let Ok((memory, _)) = view(caller) else { return Vec::new() };
    let memory: &[u8] = memory;
    let mut raw = raw.iter().copied();
    let mut next = || raw.next().unwrap_or(0);
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let range = |ptr: u32, len: u32, pairs: bool| match bytes(memory, ptr, len) {
        Ok(bytes) if pairs => HeaderMap::decode(bytes).map_or(Value::Invalid, Value::Pairs),
        Ok(bytes) => Value::Bytes(bytes.to_vec()),
        Err(_) => Value::Invalid,
    };
    let mut values = Vec::new();
    for letter in shape.letters.chars() {
        let first = next();
        let value = match letter {
            'n' if !results => Value::Number(u64::from(narrow(first))),
            'L' | 'u' if !results => Value::Number(first),
            'm' if !results => Value::Map(narrow(first)),
            'b' | 'p' => {
                let length = narrow(next());
                if results {
                    continue;
                }
                range(narrow(first), length, letter == 'p')
            }
            'B' | 'P' => {
                let at = (narrow(first), narrow(next()));
                if !results {
                    continue;
                }
                match (read_u32(memory, at.0), read_u32(memory, at.1)) {
                    (Ok(ptr), Ok(len)) => range(ptr, len, letter == 'P'),
                    _ => Value::Invalid,
                }
            }
            'o' if results => {
                read_u32(memory, narrow(first)).map_or(Value::Invalid, |value| Value::Number(value.into()))
            }
            'O' if results => match bytes(memory, narrow(first), 8).ok().and_then(|b| b.try_into().ok()) {
                Some(eight) => Value::Number(u64::from_le_bytes(eight)),
                None => Value::Invalid,
            },
            _ => continue,
        };
        values.push(value);
    }
    values
}

/// Writes an answer's results where the guest wants them.
fn write_answer(caller: &mut Caller<'_, Host>, shape: &Shape, raw: &[u64], answer: Answer) -> Outcome {
    let mut raw = raw.iter().map(|value| u32::try_from(*value).unwrap_or(u32::MAX));
    let mut next = || raw.next().unwrap_or(0);
    let mut results = answer.results.into_iter();
    for letter in shape.letters.chars() {
        let first = next();
        match letter {
            'b' | 'p' => {
                next();
            }
            'B' | 'P' => {
                let at = (first, next());
                let value = match results.next() {
                    Some(Value::Bytes(bytes)) => bytes,
                    Some(Value::Pairs(pairs)) => {
                        let mut bytes = Vec::new();
                        pairs.encode(&mut bytes);
                        bytes
                    }
                    Some(Value::Number(number)) => number.to_le_bytes().to_vec(),
                    _ => continue,
                };
                deliver(caller, at, &value)?;
            }
            'o' | 'O' => {
                let Some(Value::Number(number)) = results.next() else { continue };
                let (memory, _) = view(caller)?;
                if letter == 'O' {
                    write_u64(memory, first, number)?;
                } else {
                    write_u32(memory, first, u32::try_from(number).unwrap_or(u32::MAX))?;
                }
            }
            _ => {}
        }
    }
    match answer.status {
        Status::Ok => Ok(()),
        status => Err(Stop::Status(status)),
    }
}
