//! `driftlock capture`: records what passes a gateway, or rewrites a capture.
//!
//! What: a [`Recorder`] is a filter of the gateway that lets everything pass and keeps a copy of each
//! exchange for the writing thread. Why a filter: it sees the bytes that a filter sees.
//!
//! Traffic never waits for the disk: copies under way are bounded in bytes, and an exchange that finds no
//! room is counted and not recorded; so is one whose body is larger than the limit, with its head. The
//! counts are said at the end.
//!
//! Cost: one copy of each body, the redaction on a thread of its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{io, mem};

use bytes::Bytes;
use http::Uri;

use super::record::Recorded;
use super::write::{Packing, Redaction, Writer, WriterOptions};
use super::{CaptureError, Exchange, Headers, HttpRequest, HttpResponse, Place, exchanges};
use crate::gateway::filter::{
    ConnectionInfo, Direction, FilterError, FilterFactory, FilterState, HeaderPairs, HttpFilter, Release,
    RouteInfo, Step,
};
use crate::gateway::{FilterSource, Gateway, GatewayError, GatewayOptions};

/// Written lines reach the file at the latest after this.
const FLUSH_AFTER: Duration = Duration::from_secs(1);

/// Bounds of a recording.
#[derive(Clone, Copy, Debug)]
pub struct RecorderOptions {
    /// Most bytes of one message's body; a longer exchange is not recorded.
    pub max_body_bytes: usize,
    /// Most bytes of exchanges that wait for the disk.
    pub max_waiting_bytes: usize,
}

impl Default for RecorderOptions {
    fn default() -> Self {
        Self { max_body_bytes: 4 << 20, max_waiting_bytes: 64 << 20 }
    }
}

/// What became of the exchanges.
#[derive(Debug, Default)]
pub struct Counts {
    /// In the files.
    pub recorded: AtomicU64,
    /// Lost because the disk was slower than the traffic, or refused.
    pub lost: AtomicU64,
    /// Left out for the length of a body.
    pub too_large: AtomicU64,
}

struct Shared {
    options: RecorderOptions,
    counts: Arc<Counts>,
    waiting_bytes: AtomicUsize,
    number: AtomicU64,
    // A `Sender` may be shared, but ends only when it is dropped: taken out at the end.
    queue: Mutex<Option<Sender<Recorded>>>,
}

/// Records exchanges that pass a gateway.
pub struct Recorder {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

impl Recorder {
    /// Starts the writing thread.
    ///
    /// # Errors
    /// Where the system has no thread left.
    pub fn start(writer: Writer, options: RecorderOptions) -> io::Result<Self> {
        let (queue, receiver) = channel();
        let shared = Arc::new(Shared {
            options,
            counts: Arc::default(),
            waiting_bytes: AtomicUsize::new(0),
            number: AtomicU64::new(0),
            queue: Mutex::new(Some(queue)),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("capture".to_owned())
                .spawn(move || drain(&shared, &receiver, writer))?
        };
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// What became of the exchanges so far.
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.shared.counts)
    }

    /// Writes out what waits and closes the files.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn finish(&self) -> io::Result<()> {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        thread.map_or(Ok(()), |thread| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked")))
        })
    }
}

fn drain(shared: &Shared, receiver: &Receiver<Recorded>, mut writer: Writer) -> io::Result<()> {
    let mut flushed = true;
    loop {
        let recorded = match receiver.recv_timeout(FLUSH_AFTER) {
            Ok(recorded) => recorded,
            Err(RecvTimeoutError::Timeout) => {
                if !mem::replace(&mut flushed, true) {
                    writer.flush()?;
                }
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return writer.close(),
        };
        flushed = false;
        let result = writer.write(&recorded);
        shared.waiting_bytes.fetch_sub(size(&recorded.exchange), Ordering::AcqRel);
        match result {
            Ok(()) => shared.counts.recorded.fetch_add(1, Ordering::Relaxed),
            Err(error) => {
                // A full disk may have room again: each exchange is tried.
                if shared.counts.lost.fetch_add(1, Ordering::Relaxed) == 0 {
                    tracing::error!(%error, "an exchange was not recorded; is the disk full?");
                }
                0
            }
        };
    }
}

/// What an exchange holds in memory, about.
fn size(exchange: &Exchange) -> usize {
    let fields = |headers: &Headers| headers.iter().map(|(n, v)| n.len() + v.len() + 48).sum::<usize>();
    let request = &exchange.request;
    let response = exchange.response.as_ref().map_or(0, |r| r.body.len() + fields(&r.headers));
    request.body.len() + request.target.len() + fields(&request.headers) + response + 512
}

impl FilterFactory for Recorder {
    fn open(&self, _: &ConnectionInfo, _: &RouteInfo) -> Result<Box<dyn HttpFilter>, FilterError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Box::new(Passage {
            shared: Arc::clone(&self.shared),
            unix_ns: u64::try_from(now.as_nanos()).ok(),
            messages: [Message::default(), Message::default()],
            too_large: false,
        }))
    }
}

#[derive(Default)]
struct Message {
    headers: HeaderPairs,
    body: Vec<u8>,
}

/// One exchange on its way.
struct Passage {
    shared: Arc<Shared>,
    unix_ns: Option<u64>,
    messages: [Message; 2],
    too_large: bool,
}

impl HttpFilter for Passage {
    fn headers(
        &mut self,
        direction: Direction,
        headers: HeaderPairs,
        end: bool,
    ) -> Result<Step, FilterError> {
        self.messages[direction as usize].headers.clone_from(&headers);
        Ok(Step::Forward(Release { headers: Some(headers), end, ..Release::default() }))
    }

    fn body(&mut self, direction: Direction, chunk: Bytes, end: bool) -> Result<Step, FilterError> {
        let body = &mut self.messages[direction as usize].body;
        if body.len() + chunk.len() > self.shared.options.max_body_bytes {
            self.too_large = true;
            *body = Vec::new();
        } else if !self.too_large {
            body.extend_from_slice(&chunk);
        }
        Ok(Step::Forward(Release { body: chunk, end, ..Release::default() }))
    }

    fn trailers(&mut self, _direction: Direction, trailers: HeaderPairs) -> Result<Step, FilterError> {
        Ok(Step::Forward(Release { trailers: Some(trailers), end: true, ..Release::default() }))
    }

    fn poll_resumed(
        &mut self,
        _direction: Direction,
        _cx: &mut Context<'_>,
    ) -> Poll<Result<Step, FilterError>> {
        Poll::Pending
    }

    fn poll_interrupted(&mut self, _cx: &mut Context<'_>) -> Poll<Result<Step, FilterError>> {
        Poll::Pending
    }

    fn take_held(&mut self, _direction: Direction) -> Release {
        Release::default()
    }

    fn finish(mut self: Box<Self>) -> FilterState {
        self.keep();
        FilterState::new()
    }
}

impl Passage {
    fn keep(&mut self) {
        let counts = &self.shared.counts;
        if self.too_large {
            counts.too_large.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let [request, response] = mem::take(&mut self.messages);
        let number = self.shared.number.fetch_add(1, Ordering::Relaxed) + 1;
        let exchange = Exchange {
            id: number.to_string(),
            label: "unlabelled".to_owned(),
            request: HttpRequest {
                method: pseudo(&request.headers, ":method").unwrap_or_default(),
                target: pseudo(&request.headers, ":path").unwrap_or_default(),
                headers: fields(&request.headers),
                body: request.body,
            },
            response: pseudo(&response.headers, ":status").and_then(|status| status.parse().ok()).map(
                |status| HttpResponse { status, headers: fields(&response.headers), body: response.body },
            ),
        };
        let bytes = size(&exchange);
        let waiting = &self.shared.waiting_bytes;
        if waiting.fetch_add(bytes, Ordering::AcqRel) + bytes > self.shared.options.max_waiting_bytes {
            waiting.fetch_sub(bytes, Ordering::AcqRel);
            counts.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let recorded = Recorded { place: Place::Message(number), unix_ns: self.unix_ns, exchange };
        let queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.as_ref().is_none_or(|queue| queue.send(recorded).is_err()) {
            counts.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn pseudo(headers: &HeaderPairs, name: &str) -> Option<String> {
    let (_, value) = headers.iter().find(|(n, _)| n == name.as_bytes())?;
    Some(String::from_utf8_lossy(value).into_owned())
}

fn fields(headers: &HeaderPairs) -> Headers {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let fields = headers.iter().filter_map(|(name, value)| match name.strip_prefix(b":") {
        None => Some((text(name), text(value))),
        Some(b"authority") => Some(("host".to_owned(), text(value))),
        Some(_) => None,
    });
    fields.collect()
}

/// Arguments of `driftlock capture`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Record what passes to this upstream, such as http://127.0.0.1:8000
    #[arg(long, value_name = "URI", required_unless_present_any = ["from", "schema"])]
    pub upstream: Option<Uri>,
    /// Where clients connect
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Rewrite this capture (any format that `replay` reads) instead of recording
    #[arg(long, value_name = "FILE", conflicts_with_all = ["upstream", "listen"])]
    pub from: Option<PathBuf>,
    /// Folder for the files
    #[arg(long, default_value = "captures", value_name = "FOLDER")]
    pub out: PathBuf,
    /// Write secrets and personal data as they are
    #[arg(long)]
    pub unredacted: bool,
    /// How files are compressed
    #[arg(long, value_enum, default_value_t)]
    pub packing: Packing,
    /// A new file begins after so many bytes, before compression
    #[arg(long, default_value_t = 256 << 20, value_name = "BYTES")]
    pub max_file_bytes: u64,
    /// The oldest file goes when there are more
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub max_files: usize,
    /// Leave out exchanges with a longer body
    #[arg(long, default_value_t = RecorderOptions::default().max_body_bytes, value_name = "BYTES")]
    pub max_body_bytes: usize,
    /// Print the format's JSON schema and end
    #[arg(long)]
    pub schema: bool,
}

/// Why nothing, or not all, was recorded.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The files.
    #[error("cannot write captures into {}: {source}; choose another folder with --out", folder.display())]
    Write {
        /// Which folder.
        folder: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The capture to rewrite.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The gateway.
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    /// The threads.
    #[error("cannot start the gateway's threads: {0}; check the limits on threads and memory")]
    Runtime(#[source] io::Error),
}

/// Runs `driftlock capture` until SIGTERM or SIGINT, or to the end of `--from`.
///
/// # Errors
/// [`RecordError`].
pub fn run(args: &Args) -> Result<(), RecordError> {
    if args.schema {
        anstream::print!("{}", super::SCHEMA);
        return Ok(());
    }
    let write_error = |source| RecordError::Write { folder: args.out.clone(), source };
    let writer = Writer::new(WriterOptions {
        folder: args.out.clone(),
        redaction: if args.unredacted { Redaction::Off } else { Redaction::On },
        packing: args.packing,
        max_file_bytes: args.max_file_bytes,
        max_files: args.max_files,
    })
    .map_err(write_error)?;
    match (&args.from, &args.upstream) {
        (Some(from), _) => rewrite(from, writer, write_error),
        (None, Some(upstream)) => record(args, upstream.clone(), writer, write_error),
        (None, None) => Ok(()),
    }
}

fn rewrite(
    from: &std::path::Path,
    mut writer: Writer,
    write_error: impl Fn(io::Error) -> RecordError,
) -> Result<(), RecordError> {
    let (mut written, mut bad) = (0u64, 0u64);
    for recorded in exchanges(from)? {
        match recorded {
            Ok(recorded) => {
                writer.write(&recorded).map_err(&write_error)?;
                written += 1;
            }
            Err(error) => {
                bad += 1;
                tracing::warn!("{error}");
            }
        }
    }
    writer.close().map_err(write_error)?;
    anstream::eprintln!("{written} exchanges written, {bad} could not be read");
    Ok(())
}

fn record(
    args: &Args,
    upstream: Uri,
    writer: Writer,
    write_error: impl Fn(io::Error) -> RecordError,
) -> Result<(), RecordError> {
    let limits = RecorderOptions { max_body_bytes: args.max_body_bytes, ..RecorderOptions::default() };
    let recorder = Arc::new(Recorder::start(writer, limits).map_err(&write_error)?);
    let counts = recorder.counts();
    let factory: Arc<dyn FilterFactory> = Arc::<Recorder>::clone(&recorder);
    let options = GatewayOptions {
        listen: args.listen,
        ..GatewayOptions::new(upstream.clone(), FilterSource::Native(factory))
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(RecordError::Runtime)?;
    runtime.block_on(async {
        let gateway = Gateway::start(options).await?;
        anstream::eprintln!(
            "driftlock capture: http://{} -> {upstream}, into {}",
            gateway.addr,
            args.out.display()
        );
        stopped().await.map_err(RecordError::Runtime)?;
        gateway.shutdown().await;
        Ok::<_, RecordError>(())
    })?;
    recorder.finish().map_err(write_error)?;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    anstream::eprintln!(
        "{} exchanges recorded, {} lost, {} left out for a body of more than {} bytes",
        count(&counts.recorded),
        count(&counts.lost),
        count(&counts.too_large),
        args.max_body_bytes,
    );
    Ok(())
}

#[cfg(unix)]
async fn stopped() -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

#[cfg(not(unix))]
async fn stopped() -> io::Result<()> {
    tokio::signal::ctrl_c().await
}
