//! Files to recordings: compression, format, cutting, counting.
//!
//! What: [`Reader::fill`] cuts the next batch of recordings out of the capture, without parsing them
//! where that can be left to another thread; [`Batch::item`] parses one. [`exchanges`] does both in
//! turn for who wants one exchange after the other. A folder is read file by file, in natural order
//! (`9` before `10`), which is what Envoy's tap leaves behind.
//!
//! The bytes of each file go through a [`Fingerprinter`] while they are read, so that the digest is that
//! of what was really replayed.
//!
//! Cost: a copy of each recording into its batch; [`BATCH_BYTES`] a batch.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use flate2::bufread::MultiGzDecoder;

use super::fingerprint::{Fingerprint, Fingerprinter};
use super::json_cut::{CutError, Cutter};
use super::record::{Record, Recorded};
use super::tap::Traces;
use super::{CaptureError, Place, access_log, har, own, protobuf, rows};

/// A batch ends with the recording that reaches this size.
const BATCH_BYTES: usize = 192 << 10;
/// And with this many recordings.
const BATCH_RECORDS: usize = 512;
/// How much of a file tells its format.
const PREFIX_BYTES: u64 = 64 << 10;
/// A longer line or message is no recording of an exchange.
const MAX_RECORD_BYTES: u64 = 256 << 20;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// The evaluation data's JSON Lines.
    Rows,
    /// Driftlock's own capture.
    Capture,
    /// HAR 1.2.
    Har,
    /// Envoy tap in JSON.
    TapJson,
    /// Envoy tap, protobuf messages each after its length.
    TapDelimited,
    /// Envoy tap, one protobuf message.
    TapBinary,
    /// Access log lines.
    AccessLog,
    /// Access log, a JSON object a line.
    JsonLog,
}

/// A file that was read, as the manifest remembers it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputFile {
    /// The path as it was given; for a file of a folder, the folder's with its name.
    pub path: PathBuf,
    /// What it is.
    pub format: Option<Format>,
    /// Its identity.
    #[serde(flatten)]
    pub fingerprint: Fingerprint,
}

/// A file whose bytes are counted and fingerprinted on their way.
#[derive(Clone)]
struct Tee {
    file: Arc<File>,
    fingerprinter: Arc<Mutex<Fingerprinter>>,
    bytes_read: Arc<AtomicU64>,
}

impl Read for Tee {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = (&*self.file).read(buffer)?;
        self.fingerprinter.lock().unwrap_or_else(PoisonError::into_inner).update(&buffer[..length]);
        self.bytes_read.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

impl Tee {
    fn open(path: &Path, bytes_read: Arc<AtomicU64>) -> Result<Self, CaptureError> {
        let file = File::open(path).map_err(|source| CaptureError::File { path: path.to_owned(), source })?;
        Ok(Self { file: Arc::new(file), fingerprinter: Arc::default(), bytes_read })
    }
}

type Source = Box<dyn Read + Send>;

/// Plain, gzip (RFC 1952) or zstd (RFC 8878), told by the first bytes.
fn inflate(reader: impl Read + Send + 'static) -> io::Result<Source> {
    let mut reader = BufReader::with_capacity(1 << 18, reader);
    let first = reader.fill_buf()?;
    if first.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(MultiGzDecoder::new(reader)))
    } else if first.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Ok(Box::new(zstd::stream::read::Decoder::with_buffer(reader)?))
    } else {
        Ok(Box::new(reader))
    }
}

/// The bytes of a file, decompressed.
pub(super) fn decompressed(path: &Path) -> Result<Source, CaptureError> {
    let file_error = |source| CaptureError::File { path: path.to_owned(), source };
    inflate(File::open(path).map_err(file_error)?).map_err(file_error)
}

enum Splitter {
    Lines { lines: BufReader<Source>, line: u64 },
    Json(Cutter<BufReader<Source>>),
    Delimited { source: BufReader<Source>, number: u64 },
    Whole { source: BufReader<Source>, done: bool },
}

/// One file under way.
struct Open {
    path: PathBuf,
    name: Option<String>,
    format: Format,
    splitter: Splitter,
    traces: Traces,
    tee: Tee,
    /// Recordings so far.
    number: u64,
}

/// Reads a capture batch by batch.
pub struct Reader {
    waiting: VecDeque<PathBuf>,
    /// Several files: errors name theirs.
    many: bool,
    open: Option<Open>,
    read: Vec<InputFile>,
    total_bytes: u64,
    bytes_read: Arc<AtomicU64>,
    batch_records: usize,
}

/// Recordings cut out, not yet parsed.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    items: Vec<Cut>,
    format: Option<Format>,
    name: Option<String>,
}

#[derive(Debug)]
enum Cut {
    Bytes {
        range: Range<usize>,
        place: Place,
        number: u64,
    },
    Ready(Result<Box<Recorded>, CaptureError>),
    /// Handed out.
    Taken,
}

/// One recording of a batch.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "it is looked at and dropped; nearly all are records")]
pub enum Item<'a> {
    /// As its bytes have it.
    Record(Record<'a>),
    /// Put together from several parts.
    Recorded(&'a Recorded),
    /// It cannot be read: the error's text, with the file's name where there are several.
    Bad(String),
}

impl Reader {
    /// Opens a file, or a folder of files.
    ///
    /// # Errors
    /// [`CaptureError::File`], and [`CaptureError::UnknownFormat`] of a single file.
    pub fn open(path: &Path) -> Result<Self, CaptureError> {
        let file_error = |source| CaptureError::File { path: path.to_owned(), source };
        let mut waiting = Vec::new();
        let many = path.is_dir();
        if many {
            for entry in std::fs::read_dir(path).map_err(file_error)? {
                let entry = entry.map_err(file_error)?;
                let hidden = entry.file_name().to_string_lossy().starts_with('.');
                if !hidden && entry.path().is_file() {
                    waiting.push(entry.path());
                }
            }
            waiting.sort_by_cached_key(|path| natural(&path.to_string_lossy()));
        } else {
            waiting.push(path.to_owned());
        }
        let mut total_bytes = 0;
        for path in &waiting {
            let file_error = |source| CaptureError::File { path: path.clone(), source };
            total_bytes += std::fs::metadata(path).map_err(file_error)?.len();
        }
        let mut reader = Self {
            waiting: waiting.into(),
            many,
            open: None,
            read: Vec::new(),
            total_bytes,
            bytes_read: Arc::default(),
            batch_records: BATCH_RECORDS,
        };
        if !many {
            reader.next_file()?;
        }
        Ok(reader)
    }

    /// Has each batch hold one recording, for who waits between them.
    pub fn one_by_one(&mut self) {
        self.batch_records = 1;
    }

    /// The files that are not read to their end.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.open.iter().map(|open| &open.path).chain(&self.waiting).cloned().collect()
    }

    /// Bytes of all files, compressed as they are.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// A counter of the bytes read so far.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.bytes_read)
    }

    /// The files read to their end, with their fingerprints.
    pub fn files(&self) -> &[InputFile] {
        &self.read
    }

    /// Opens the next file; false when there is none.
    fn next_file(&mut self) -> Result<bool, CaptureError> {
        let Some(path) = self.waiting.pop_front() else { return Ok(false) };
        let file_error = |source| CaptureError::File { path: path.clone(), source };
        let tee = Tee::open(&path, Arc::clone(&self.bytes_read))?;
        let mut source = inflate(tee.clone()).map_err(file_error)?;
        let mut prefix = Vec::new();
        source.by_ref().take(PREFIX_BYTES).read_to_end(&mut prefix).map_err(file_error)?;
        let format = match detect(&prefix) {
            Ok(format) => format,
            Err(hint) => {
                self.remember(path.clone(), None, &tee)?;
                return Err(CaptureError::UnknownFormat { path, hint });
            }
        };
        let source: Source = Box::new(Cursor::new(prefix).chain(source));
        let source = BufReader::with_capacity(1 << 18, source);
        let splitter = match format {
            Format::Rows | Format::Capture | Format::AccessLog | Format::JsonLog => {
                Splitter::Lines { lines: source, line: 0 }
            }
            Format::Har => Splitter::Json(Cutter::new(source, &["log", "entries"])),
            Format::TapJson => Splitter::Json(Cutter::new(source, &[])),
            Format::TapDelimited => Splitter::Delimited { source, number: 0 },
            Format::TapBinary => Splitter::Whole { source, done: false },
        };
        let name = self.many.then(|| path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        self.open = Some(Open { path, name, format, splitter, traces: Traces::default(), tee, number: 0 });
        Ok(true)
    }

    /// Reads what is left of a file, so that its digest is that of the whole.
    fn remember(&mut self, path: PathBuf, format: Option<Format>, tee: &Tee) -> Result<(), CaptureError> {
        io::copy(&mut tee.clone(), &mut io::sink())
            .map_err(|source| CaptureError::File { path: path.clone(), source })?;
        let fingerprinter = tee.fingerprinter.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.read.push(InputFile { path, format, fingerprint: fingerprinter.finish() });
        Ok(())
    }

    /// Cuts out the next recordings, all of one file; false at the end of the capture.
    ///
    /// # Errors
    /// [`CaptureError::File`] where a file is gone or cannot be read any more; what befalls one recording
    /// or the rest of a file is an item of the batch.
    pub fn fill(&mut self, batch: &mut Batch) -> Result<bool, CaptureError> {
        batch.bytes.clear();
        batch.items.clear();
        loop {
            let Some(open) = &mut self.open else {
                match self.next_file() {
                    Ok(true) => continue,
                    Ok(false) => return Ok(false),
                    // Of a folder: the other files may still be captures.
                    Err(error @ CaptureError::UnknownFormat { .. }) if self.many => {
                        batch.items.push(Cut::Ready(Err(error)));
                        return Ok(true);
                    }
                    Err(error) => return Err(error),
                }
            };
            batch.format = Some(open.format);
            batch.name.clone_from(&open.name);
            let more = open.fill(batch, self.batch_records);
            if !more && let Some(open) = self.open.take() {
                self.remember(open.path, Some(open.format), &open.tee)?;
            }
            if !batch.items.is_empty() {
                return Ok(true);
            }
        }
    }
}

impl Open {
    /// False at the end of the file.
    fn fill(&mut self, batch: &mut Batch, records: usize) -> bool {
        while batch.bytes.len() < BATCH_BYTES && batch.items.len() < records {
            let start = batch.bytes.len();
            let place = match self.splitter.next(&mut batch.bytes) {
                Ok(Some(place)) => place,
                Ok(None) => {
                    while let Some(trace) = self.traces.finish() {
                        batch.items.push(self.ready(trace));
                    }
                    return false;
                }
                Err((place, source)) => {
                    batch.bytes.truncate(start);
                    while let Some(trace) = self.traces.finish() {
                        batch.items.push(self.ready(trace));
                    }
                    batch.items.push(Cut::Ready(Err(CaptureError::Broken { place, source })));
                    return false;
                }
            };
            let range = start..batch.bytes.len();
            let bytes = &batch.bytes[range.clone()];
            let trace = match self.format {
                Format::TapJson => self.traces.json(bytes, place),
                Format::TapDelimited | Format::TapBinary => self.traces.protobuf(bytes, place),
                // The line that says what the file is.
                Format::Capture if matches!(own::parse_first(bytes), Some(own::VERSION)) => {
                    batch.bytes.truncate(start);
                    continue;
                }
                _ => {
                    self.number += 1;
                    batch.items.push(Cut::Bytes { range, place, number: self.number });
                    continue;
                }
            };
            batch.bytes.truncate(start);
            batch.items.extend(trace.map(|trace| self.ready(trace)));
        }
        true
    }

    fn ready(&self, trace: Result<Recorded, CaptureError>) -> Cut {
        Cut::Ready(trace.map(|mut recorded| {
            name_id(&mut recorded, self.name.as_deref());
            Box::new(recorded)
        }))
    }
}

/// Appends a line, its end included, or [`MAX_RECORD_BYTES`] of it; how many bytes. As `read_until` with a faster
/// search.
fn read_line(source: &mut impl BufRead, out: &mut Vec<u8>) -> io::Result<u64> {
    let mut read = 0;
    loop {
        let available = match source.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            available => available?,
        };
        let room = usize::try_from(MAX_RECORD_BYTES - read).unwrap_or(usize::MAX);
        let available = &available[..available.len().min(room)];
        let end = memchr::memchr(b'\n', available);
        let taken = end.map_or(available.len(), |at| at + 1);
        out.extend_from_slice(&available[..taken]);
        source.consume(taken);
        read += taken as u64;
        if end.is_some() || taken == 0 {
            return Ok(read);
        }
    }
}

impl Splitter {
    /// Appends the next recording's bytes; its place, or none at the end.
    fn next(&mut self, out: &mut Vec<u8>) -> Result<Option<Place>, (Place, CutError)> {
        match self {
            Self::Lines { lines, line } => loop {
                let start = out.len();
                *line += 1;
                let place = Place::Line(*line);
                match read_line(lines, out).map_err(|source| (place, source.into()))? {
                    0 => return Ok(None),
                    MAX_RECORD_BYTES => {
                        return Err((place, CutError::Unexpected("a line is larger than 256 MiB")));
                    }
                    _ if out[start..].trim_ascii().is_empty() => out.truncate(start),
                    _ => return Ok(Some(place)),
                }
            },
            Self::Json(cutter) => {
                let line = cutter.next(out).map_err(|source| (Place::Line(cutter.line()), source))?;
                Ok(line.map(Place::Line))
            }
            Self::Delimited { source, number } => {
                *number += 1;
                let place = Place::Message(*number);
                let mut read = || -> Result<bool, CutError> {
                    let mut length = 0u64;
                    for shift in (0..64).step_by(7) {
                        let mut byte = [0];
                        if source.read(&mut byte)? == 0 {
                            return match shift {
                                0 => Ok(false),
                                _ => Err(CutError::Unexpected("a message's length breaks off")),
                            };
                        }
                        length |= u64::from(byte[0] & 0x7f) << shift;
                        if byte[0] < 0x80 {
                            break;
                        }
                    }
                    if length > MAX_RECORD_BYTES {
                        return Err(CutError::Unexpected("a message is larger than 256 MiB"));
                    }
                    let read = source.take(length).read_to_end(out)?;
                    match read as u64 == length {
                        true => Ok(true),
                        false => Err(CutError::Unexpected("a message breaks off")),
                    }
                };
                read().map(|more| more.then_some(place)).map_err(|error| (place, error))
            }
            Self::Whole { source, done } => {
                if std::mem::replace(done, true) {
                    return Ok(None);
                }
                let place = Place::Message(1);
                source.take(MAX_RECORD_BYTES).read_to_end(out).map_err(|error| (place, error.into()))?;
                Ok(Some(place))
            }
        }
    }
}

impl Batch {
    /// Recordings in it.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Parses one of them; none past the end.
    pub fn item(&self, index: usize) -> Option<Item<'_>> {
        let (range, place, number) = match self.items.get(index)? {
            Cut::Ready(Ok(recorded)) => return Some(Item::Recorded(recorded)),
            Cut::Ready(Err(error)) => return Some(Item::Bad(self.text_of(error))),
            Cut::Taken => return None,
            Cut::Bytes { range, place, number } => (range.clone(), *place, *number),
        };
        Some(match self.parse(range, place, number) {
            Ok(mut record) => {
                if let Some(name) = &self.name {
                    record.id = format!("{name}:{}", record.id).into();
                }
                Item::Record(record)
            }
            Err(error) => Item::Bad(self.text_of(&error)),
        })
    }

    fn parse(&self, range: Range<usize>, place: Place, number: u64) -> Result<Record<'_>, CaptureError> {
        let bytes = &self.bytes[range];
        match self.format {
            Some(Format::Capture) => own::parse(bytes, place),
            Some(Format::Har) => har::parse(bytes, place, number),
            Some(Format::AccessLog) => Ok(access_log::parse(bytes, place, number, false)),
            Some(Format::JsonLog) => Ok(access_log::parse(bytes, place, number, true)),
            _ => rows::parse(bytes, place),
        }
    }

    /// Takes one of them out as an exchange of its own; none past the end.
    fn take(&mut self, index: usize) -> Option<Result<Recorded, CaptureError>> {
        let recorded = match std::mem::replace(self.items.get_mut(index)?, Cut::Taken) {
            Cut::Ready(recorded) => recorded.map(|recorded| *recorded),
            Cut::Bytes { range, place, number } => {
                let recorded = self.parse(range, place, number).and_then(Record::into_recorded);
                recorded.map(|mut recorded| {
                    name_id(&mut recorded, self.name.as_deref());
                    recorded
                })
            }
            Cut::Taken => return None,
        };
        Some(recorded.map_err(|source| match &self.name {
            Some(name) => CaptureError::InFile { name: name.clone(), source: Box::new(source) },
            None => source,
        }))
    }

    /// The error with its file's name, where there are several.
    pub fn text_of(&self, error: &CaptureError) -> String {
        match &self.name {
            Some(name) => format!("{name}: {error}"),
            None => error.to_string(),
        }
    }
}

/// All exchanges of a capture, one after the other; what cannot be read is an error and those after it
/// still come.
///
/// # Errors
/// As [`Reader::open`].
pub fn exchanges(path: &Path) -> Result<Exchanges, CaptureError> {
    Ok(Exchanges { reader: Reader::open(path)?, batch: Batch::default(), next: 0, done: false })
}

/// See [`exchanges`].
pub struct Exchanges {
    reader: Reader,
    batch: Batch,
    next: usize,
    done: bool,
}

impl Iterator for Exchanges {
    type Item = Result<Recorded, CaptureError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.done {
            if let Some(recorded) = self.batch.take(self.next) {
                self.next += 1;
                return Some(recorded);
            }
            self.next = 0;
            match self.reader.fill(&mut self.batch) {
                Ok(more) => self.done = !more,
                Err(error) => {
                    self.done = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

/// Numbers say which recording of a file it is: of several files, the file belongs to it.
fn name_id(recorded: &mut Recorded, name: Option<&str>) {
    if let Some(name) = name {
        recorded.exchange.id = format!("{name}:{}", recorded.exchange.id);
    }
}

/// Text and numbers apart, so that `trace_10` comes after `trace_9`.
fn natural(name: &str) -> Vec<(String, u64)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (text, tail) = rest.split_at(digits);
        let end = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
        let (number, tail) = tail.split_at(end);
        key.push((text.to_owned(), number.parse().unwrap_or(u64::MAX)));
        rest = tail;
    }
    key
}

/// The format by a file's beginning; the error is a hint on what it looks like.
fn detect(prefix: &[u8]) -> Result<Format, &'static str> {
    let text = prefix.strip_prefix(b"\xef\xbb\xbf").unwrap_or(prefix).trim_ascii_start();
    if text.is_empty() {
        // Nothing to read is read as nothing.
        return if prefix.is_empty() { Ok(Format::Rows) } else { Err("; it holds blanks only") };
    }
    if text.starts_with(b"{") {
        // A damaged first line must not hide what the others are.
        let lines = text.split_inclusive(|&b| b == b'\n').take(20);
        let whole = std::iter::once(text);
        let format = whole.chain(lines).map(top_level_keys).find_map(|keys| by_keys(&keys));
        return format.ok_or("; its JSON objects have other keys");
    }
    if let Some(format) = protobuf_format(prefix) {
        return Ok(format);
    }
    let mut lines = text.split(|&b| b == b'\n').take(20).filter_map(|line| std::str::from_utf8(line).ok());
    if lines.any(access_log::looks_like) {
        return Ok(Format::AccessLog);
    }
    // One bad line before good rows.
    let mut rows = text.split(|&b| b == b'\n').take(20).filter(|line| line.trim_ascii().starts_with(b"{"));
    if let Some(format) = rows.find_map(|line| by_keys(&top_level_keys(line))) {
        return Ok(format);
    }
    if text.starts_with(b"http_buffered_trace") || text.starts_with(b"http_streamed_trace") {
        return Err(
            "; it is a tap in protobuf's text form: set the sink's format to PROTO_BINARY_LENGTH_DELIMITED or JSON_BODY_AS_BYTES",
        );
    }
    Err("")
}

fn by_keys(keys: &[String]) -> Option<Format> {
    let has = |name: &str| keys.iter().any(|key| key == name);
    if has("log") {
        Some(Format::Har)
    } else if keys.iter().any(|key| {
        let key = key.to_ascii_lowercase().replace('_', "");
        matches!(
            key.as_str(),
            "httpbufferedtrace"
                | "httpstreamedtracesegment"
                | "socketbufferedtrace"
                | "socketstreamedtracesegment"
        )
    }) {
        Some(Format::TapJson)
    } else if has(own::MAGIC) || (has("request") && !has("kind") && has("id")) {
        Some(Format::Capture)
    } else if has("kind") || (has("text") && has("id")) {
        Some(Format::Rows)
    } else if access_log::is_json_log(keys) {
        Some(Format::JsonLog)
    } else {
        None
    }
}

/// The keys of the first object, as far as the text goes.
fn top_level_keys(text: &[u8]) -> Vec<String> {
    let (mut keys, mut depth, mut i) = (Vec::new(), 0u32, 0);
    // A string directly inside the object is a key until a colon was seen.
    let mut key_follows = true;
    while let Some(&byte) = text.get(i) {
        match byte {
            b'"' => {
                let start = i + 1;
                i = start;
                while let Some(&byte) = text.get(i) {
                    match byte {
                        b'\\' => i += 1,
                        b'"' => break,
                        _ => {}
                    }
                    i += 1;
                }
                if depth == 1 && key_follows {
                    let key = text.get(start..i).unwrap_or_default();
                    keys.push(String::from_utf8_lossy(key).into_owned());
                }
            }
            b'{' | b'[' => {
                depth += 1;
                key_follows = depth == 1;
            }
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    break;
                }
            }
            b':' if depth == 1 => key_follows = false,
            b',' if depth == 1 => key_follows = true,
            _ => {}
        }
        i += 1;
    }
    keys
}

/// A tap's first field is one of `TraceWrapper`'s four, and its length fits its message's.
fn protobuf_format(prefix: &[u8]) -> Option<Format> {
    let one_field = |mut bytes: &[u8], length: Option<u64>| {
        let before = bytes.len();
        let tag = bytes.first().is_some_and(|tag| matches!(tag, 0x0a | 0x12 | 0x1a | 0x22));
        bytes = bytes.get(1..)?;
        let inner = protobuf::varint(&mut bytes)?;
        let head = (before - bytes.len()) as u64;
        (tag && length.is_none_or(|length| head.checked_add(inner) == Some(length))).then_some(())
    };
    let mut bytes = prefix;
    let length = protobuf::varint(&mut bytes)?;
    if one_field(bytes, Some(length)).is_some() {
        return Some(Format::TapDelimited);
    }
    let whole = ((prefix.len() as u64) < PREFIX_BYTES).then_some(prefix.len() as u64);
    one_field(prefix, whole).map(|()| Format::TapBinary)
}
