//! Writes captures, redacted unless told otherwise.
//!
//! What: [`Writer`] writes files of the format in `own` into a folder, a new one when the last is full,
//! and removes the oldest when there are too many. [`Redaction`] decides what of an exchange is written.
//!
//! Redaction: header fields that carry credentials lose their values; in other fields, targets and
//! bodies each secret and each piece of personal data that `engine::normalise` knows becomes
//! `[REDACTED:class]`, in JSON without breaking it. A body that cannot be read (an unknown coding, bytes
//! that are no text) could hold anything, so it is left out and the line says why.
//!
//! Cost: the redaction's scan and one JSON line an exchange. Left out on purpose: a secret that a
//! streamed answer cuts into several events, and names or postal addresses, which no pattern finds.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use driftlock_engine::normalise::{ClassSet, redact, redact_json_string};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::own::{LineOut, MAGIC, RequestLine, ResponseLine, VERSION, body_fields};
use super::record::Recorded;
use super::{Exchange, Headers, header};

/// The schema of a line.
pub const SCHEMA: &str = include_str!("capture.schema.json");

/// Header fields whose whole value is a credential.
const CREDENTIALS: [&str; 10] = [
    "authorization",
    "proxy-authorization",
    "cookie",
    "set-cookie",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "x-auth-token",
    "x-amz-security-token",
    "x-csrf-token",
];

const CREDENTIAL_MARKER: &str = "[REDACTED:credential]";

/// What of an exchange is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redaction {
    /// Without secrets and personal data.
    On,
    /// As it was.
    Off,
}

/// How files are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Packing {
    /// Zstandard, `.zst`.
    #[default]
    Zstd,
    /// gzip, `.gz`.
    Gzip,
    /// Not at all.
    None,
}

/// Where captures go, and how much they may take.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// The folder; it is made if it is not there.
    pub folder: PathBuf,
    /// What is written.
    pub redaction: Redaction,
    /// How.
    pub packing: Packing,
    /// A file is full when this many bytes went into it, before compression.
    pub max_file_bytes: u64,
    /// The oldest file is removed when there are more.
    pub max_files: usize,
}

enum Sink {
    Plain(BufWriter<File>),
    Gzip(GzEncoder<BufWriter<File>>),
    Zstd(zstd::stream::write::Encoder<'static, BufWriter<File>>),
}

impl Sink {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(out) => out.write_all(bytes),
            Self::Gzip(out) => out.write_all(bytes),
            Self::Zstd(out) => out.write_all(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(out) => out.flush(),
            Self::Gzip(out) => out.flush(),
            Self::Zstd(out) => out.flush(),
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Plain(mut out) => out.flush(),
            Self::Gzip(out) => out.finish()?.flush(),
            Self::Zstd(out) => out.finish()?.flush(),
        }
    }
}

/// Writes captures into a folder.
pub struct Writer {
    options: WriterOptions,
    open: Option<(Sink, u64)>,
    files: VecDeque<PathBuf>,
    next_number: u64,
}

impl Writer {
    /// Makes the folder, and finds the files that are there: numbers go on, and they count.
    ///
    /// # Errors
    /// Where the folder cannot be made or read.
    pub fn new(options: WriterOptions) -> io::Result<Self> {
        std::fs::create_dir_all(&options.folder)?;
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&options.folder)? {
            let path = entry?.path();
            if let Some(number) = file_number(&path) {
                files.push((number, path));
            }
        }
        files.sort_unstable();
        let next_number = files.last().map_or(1, |(number, _)| number + 1);
        let files = files.into_iter().map(|(_, path)| path).collect();
        Ok(Self { options, open: None, files, next_number })
    }

    /// Writes one exchange.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&mut self, recorded: &Recorded) -> io::Result<()> {
        let line = line(recorded, self.options.redaction)?;
        if self
            .open
            .as_ref()
            .is_some_and(|(_, bytes)| bytes + line.len() as u64 > self.options.max_file_bytes)
        {
            self.close()?;
        }
        let (sink, bytes) = match &mut self.open {
            Some(open) => open,
            None => {
                let sink = self.create()?;
                self.open.insert((sink, 0))
            }
        };
        *bytes += line.len() as u64;
        sink.write_all(&line)
    }

    /// Hands what was written to the system.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn flush(&mut self) -> io::Result<()> {
        self.open.as_mut().map_or(Ok(()), |(sink, _)| sink.flush())
    }

    /// Ends the file under way; the next exchange begins another.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn close(&mut self) -> io::Result<()> {
        self.open.take().map_or(Ok(()), |(sink, _)| sink.finish())
    }

    /// Files there are, oldest first.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(PathBuf::as_path)
    }

    fn create(&mut self) -> io::Result<Sink> {
        while self.files.len() >= self.options.max_files.max(1) {
            if let Some(oldest) = self.files.pop_front() {
                std::fs::remove_file(oldest)?;
            }
        }
        let suffix = match self.options.packing {
            Packing::Zstd => ".zst",
            Packing::Gzip => ".gz",
            Packing::None => "",
        };
        let path = self.options.folder.join(format!("capture-{:06}.jsonl{suffix}", self.next_number));
        self.next_number += 1;
        let file = BufWriter::new(File::options().write(true).create_new(true).open(&path)?);
        self.files.push_back(path);
        let mut sink = match self.options.packing {
            Packing::Zstd => Sink::Zstd(zstd::stream::write::Encoder::new(file, 3)?),
            Packing::Gzip => Sink::Gzip(GzEncoder::new(file, Compression::default())),
            Packing::None => Sink::Plain(file),
        };
        let first = serde_json::json!({
            MAGIC: VERSION,
            "redacted": self.options.redaction == Redaction::On,
            "written_by": concat!("driftlock ", env!("CARGO_PKG_VERSION")),
        });
        sink.write_all(format!("{first}\n").as_bytes())?;
        Ok(sink)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(%error, "the capture's last file was not closed");
        }
    }
}

/// The number in `capture-000001.jsonl…`.
fn file_number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_prefix("capture-")?;
    let (number, rest) = name.split_once('.')?;
    rest.starts_with("jsonl").then(|| number.parse().ok()).flatten()
}

/// Writes exchanges as they are, with the line that says what they are, for tests and tools.
///
/// # Errors
/// Those of `out`.
pub fn write_recorded(out: &mut impl Write, exchanges: &[Recorded]) -> io::Result<()> {
    writeln!(out, "{{\"{MAGIC}\":{VERSION},\"redacted\":false}}")?;
    exchanges.iter().try_for_each(|recorded| out.write_all(&line(recorded, Redaction::Off)?))
}

/// One line, with its end.
fn line(recorded: &Recorded, redaction: Redaction) -> io::Result<Vec<u8>> {
    let Exchange { id, label, request, response } = &recorded.exchange;
    let (target, clean) = match redaction {
        Redaction::Off => (request.target.clone(), Body::as_it_is(&request.headers, &request.body)),
        Redaction::On => (
            redact(&request.target, ClassSet::REDACTED).text,
            Body::redacted(&request.headers, &request.body),
        ),
    };
    let request = RequestLine {
        method: request.method.clone(),
        target,
        headers: clean.headers,
        body: clean.text,
        body_base64: clean.base64,
        body_left_out: clean.left_out,
    };
    let response = response.as_ref().map(|response| {
        let clean = match redaction {
            Redaction::Off => Body::as_it_is(&response.headers, &response.body),
            Redaction::On => Body::redacted(&response.headers, &response.body),
        };
        ResponseLine {
            status: response.status,
            headers: clean.headers,
            body: clean.text,
            body_base64: clean.base64,
            body_left_out: clean.left_out,
        }
    });
    let line = LineOut { id, label, unix_ns: recorded.unix_ns, request, response };
    let mut bytes = serde_json::to_vec(&line)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Headers and body as they go into a line.
struct Body {
    headers: Headers,
    text: Option<String>,
    base64: Option<String>,
    left_out: Option<String>,
}

impl Body {
    fn as_it_is(headers: &Headers, body: &[u8]) -> Self {
        let (text, base64) = body_fields(body.to_owned());
        Self { headers: headers.clone(), text, base64, left_out: None }
    }

    fn redacted(headers: &Headers, body: &[u8]) -> Self {
        let mut clean: Headers = headers
            .iter()
            .map(|(name, value)| {
                let credential = CREDENTIALS.iter().any(|known| name.eq_ignore_ascii_case(known));
                let value = match credential {
                    true => CREDENTIAL_MARKER.to_owned(),
                    false => redact(value, ClassSet::REDACTED).text,
                };
                (name.clone(), value)
            })
            .collect();
        let coding = header(headers, "content-encoding").unwrap_or("identity").trim().to_ascii_lowercase();
        let (text, left_out) = match decoded(&coding, body) {
            Ok(decoded) => match String::from_utf8(decoded) {
                Ok(text) => {
                    if coding != "identity" {
                        clean.retain(|(name, _)| !name.eq_ignore_ascii_case("content-encoding"));
                    }
                    let text = redact_body(&text, header(headers, "content-type").unwrap_or_default());
                    ((!text.is_empty()).then_some(text), None)
                }
                Err(_) => (None, Some("its bytes are no text, so they cannot be redacted".to_owned())),
            },
            Err(reason) => (None, Some(reason)),
        };
        Self { headers: clean, text, base64: None, left_out }
    }
}

/// No decoded body is larger: a compressed one could be.
const MAX_DECODED_BYTES: u64 = 64 << 20;

fn decoded(coding: &str, body: &[u8]) -> Result<Vec<u8>, String> {
    let read = |reader: &mut dyn Read| {
        let mut out = Vec::new();
        match reader.take(MAX_DECODED_BYTES).read_to_end(&mut out) {
            Ok(n) if n as u64 == MAX_DECODED_BYTES => Err("it is too large when decoded".to_owned()),
            Ok(_) => Ok(out),
            Err(error) => Err(format!("it does not decode as {coding}: {error}")),
        }
    };
    match coding {
        "" | "identity" => Ok(body.to_owned()),
        "gzip" | "x-gzip" => read(&mut flate2::read::MultiGzDecoder::new(body)),
        "deflate" => read(&mut flate2::read::ZlibDecoder::new(body)),
        "zstd" => match zstd::stream::read::Decoder::new(body) {
            Ok(mut decoder) => read(&mut decoder),
            Err(error) => Err(format!("it does not decode as zstd: {error}")),
        },
        other => Err(format!("its coding {other:?} cannot be redacted")),
    }
}

fn redact_body(text: &str, content_type: &str) -> String {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let start = text.trim_start();
    if essence == "text/event-stream" {
        // JSON in an event never spans lines.
        text.split_inclusive('\n').map(redact_json).collect()
    } else if essence.ends_with("json") || start.starts_with(['{', '[']) {
        redact_json(text)
    } else {
        redact(text, ClassSet::REDACTED).text
    }
}

/// Redacts the strings of a JSON text, and what stands between them; a number that has to go becomes a
/// string.
fn redact_json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find('"') {
        let (before, string) = rest.split_at(open);
        push_redacted_plain(&mut out, before);
        let bytes = string.as_bytes();
        let mut end = 1;
        while end < bytes.len() && bytes[end] != b'"' {
            end += if bytes[end] == b'\\' { 2 } else { 1 };
        }
        if end >= bytes.len() {
            // Not closed: as text, so that nothing gets by.
            out.push_str(&redact(string, ClassSet::REDACTED).text);
            return out;
        }
        out.push('"');
        out.push_str(&redact_json_string(&string[1..end], ClassSet::REDACTED));
        out.push('"');
        rest = &string[end + 1..];
    }
    push_redacted_plain(&mut out, rest);
    out
}

fn push_redacted_plain(out: &mut String, text: &str) {
    let redacted = redact(text, ClassSet::REDACTED).text;
    match redacted == text {
        true => out.push_str(text),
        false => out.push_str(&redacted.replace("[REDACTED:", "\"[REDACTED:").replace(']', "]\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::{HttpRequest, HttpResponse, Place, exchanges};

    fn recorded(body: &[u8], headers: &[(&str, &str)]) -> Recorded {
        let headers: Headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        Recorded {
            place: Place::Line(2),
            unix_ns: Some(7),
            exchange: Exchange {
                id: "a\"b".to_owned(),
                label: "normal".to_owned(),
                request: HttpRequest {
                    method: "POST".to_owned(),
                    target: "/x?mail=jane.roe@example.org&y=1".to_owned(),
                    headers: headers.clone(),
                    body: body.to_owned(),
                },
                response: Some(HttpResponse { status: 200, headers, body: body.to_owned() }),
            },
        }
    }

    fn write(options: WriterOptions, exchanges: &[Recorded]) -> Vec<PathBuf> {
        let mut writer = Writer::new(options).unwrap();
        exchanges.iter().for_each(|exchange| writer.write(exchange).unwrap());
        writer.close().unwrap();
        writer.files().map(Path::to_owned).collect()
    }

    fn options(folder: &Path, redaction: Redaction, packing: Packing) -> WriterOptions {
        WriterOptions { folder: folder.to_owned(), redaction, packing, max_file_bytes: 1 << 20, max_files: 9 }
    }

    #[test]
    fn what_is_written_unredacted_is_read_back() {
        let all = [
            recorded(b"{\"a\":1}", &[("content-type", "application/json")]),
            recorded(&[0xff, 0], &[]),
            recorded(b"", &[]),
        ];
        for packing in [Packing::Zstd, Packing::Gzip, Packing::None] {
            let folder = tempfile::tempdir().unwrap();
            let files = write(options(folder.path(), Redaction::Off, packing), &all);
            let read: Vec<Recorded> = exchanges(&files[0]).unwrap().map(Result::unwrap).collect();
            assert_eq!(read.len(), 3);
            for (read, written) in read.iter().zip(&all) {
                assert_eq!((&read.exchange, read.unix_ns), (&written.exchange, written.unix_ns));
            }
        }
    }

    #[test]
    fn secrets_and_persons_do_not_reach_the_file() {
        let secrets = [
            "jane.roe@example.org",
            "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789ABCD",
            "4111111111111111",
            "hunter2-cookie",
        ];
        let body = format!(
            "{{\"mail\": \"\\u006aane.roe@example.org\", \"key\": \"{}\", \"card\": {}, \"n\": 12}}",
            secrets[1], secrets[2]
        );
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(body.as_bytes()).unwrap();
        let gzip = gzip.finish().unwrap();
        let cookie = ("Cookie", "id=hunter2-cookie");
        let json = ("content-type", "application/json");
        let events = format!("data: {body}\n\ndata: {{\"t\": \"unclosed jane.roe@example.org\n\n");
        let all = [
            recorded(body.as_bytes(), &[json, cookie]),
            recorded(&gzip, &[json, ("content-encoding", "gzip")]),
            recorded(events.as_bytes(), &[("content-type", "text/event-stream")]),
            recorded(
                b"mail jane.roe@example.org",
                &[("content-type", "text/plain"), ("x-mail", "jane.roe@example.org")],
            ),
            recorded(&gzip, &[json, ("content-encoding", "br")]),
            recorded(&gzip, &[json]),
        ];
        let folder = tempfile::tempdir().unwrap();
        let files = write(options(folder.path(), Redaction::On, Packing::None), &all);
        let text = std::fs::read_to_string(&files[0]).unwrap();
        for secret in secrets {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
        let read: Vec<_> = exchanges(&files[0]).unwrap().collect();
        for read in &read[..2] {
            let body: serde_json::Value =
                serde_json::from_slice(&read.as_ref().unwrap().exchange.request.body).unwrap();
            assert_eq!(body["n"], 12);
            assert_eq!(body["card"], "[REDACTED:card]");
            assert_eq!(body["mail"], "[REDACTED:email]");
        }
        assert!(header(&read[1].as_ref().unwrap().exchange.request.headers, "content-encoding").is_none());
        for (read, reason) in read[4..].iter().zip(["\"br\"", "no text"]) {
            let error = read.as_ref().unwrap_err().to_string();
            assert!(error.contains("left out") && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn files_rotate_and_the_oldest_go() {
        let folder = tempfile::tempdir().unwrap();
        let one = recorded(&[b'x'; 500], &[]);
        let small = WriterOptions {
            max_file_bytes: 3000,
            max_files: 3,
            ..options(folder.path(), Redaction::Off, Packing::None)
        };
        let files = write(small.clone(), &vec![one.clone(); 20]);
        assert_eq!(files.len(), 3);
        let there = || std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(there(), 3);
        assert!(files.iter().all(|file| file.metadata().unwrap().len() < 3200));
        // A second run goes on where the first ended and counts its files.
        let later = write(small, &[one]);
        assert_eq!((later.len(), there()), (3, 3));
        assert!(later[2] > files[2], "{later:?}");
    }

    #[test]
    fn the_schema_names_every_field_that_is_written() {
        let schema: serde_json::Value = serde_json::from_str(SCHEMA).unwrap();
        let line = line(&recorded(&[0xff], &[]), Redaction::On).unwrap();
        let line: serde_json::Value = serde_json::from_slice(&line).unwrap();
        let known = &schema["$defs"]["exchange"]["properties"];
        for (key, value) in line.as_object().unwrap() {
            assert!(known[key].is_object(), "{key}");
            for field in value.as_object().into_iter().flatten().map(|(field, _)| field) {
                assert!(known[key]["properties"][field].is_object(), "{key}.{field}");
            }
        }
    }
}
