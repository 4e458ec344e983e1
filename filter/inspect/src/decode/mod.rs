//! Content codings, undone for inspection: gzip, deflate, br and zstd, also one on top of another.
//!
//! What: [`codings`] reads a `content-encoding` header (RFC 9110 section 8.4), [`Decoder`] takes the body
//! as it passes and hands what it decodes to a sink. The client still gets the encoded bytes.
//!
//! Why cells: a decoder that meets damage may have read further ahead in a long chunk than in a short
//! one. Input goes in by whole cells of [`CELL_BYTES`], counted from the body's first byte, so that what
//! comes out before an error or a bound is the same for every split, by construction. The price is that
//! the last cell of a stream under way, at most 127 encoded bytes, waits for more.
//!
//! Bounds: each coding may give at most [`Limits::max_ratio`] bytes for one (after the first
//! [`RATIO_FREE_BYTES`]), and so may all together; all decoders of a VM share one [`Budget`] of memory. A
//! window is allocated as the content grows, so a large one that is only declared costs nothing.
//!
//! Cost: natively 250 to 300 MB of decoded text a second in 4 KiB bodies, more in long ones; memory 44 KiB for gzip and deflate, for br and
//! zstd up to twice the window of the stream.
//!
//! Left out on purpose: checksums (content that a client refuses for its checksum is judged as it is),
//! dictionaries that only client and server know (`dcb`, `dcz`), `compress`.

mod brotli;
mod budget;
mod inflate;
mod zstd;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::ControlFlow;

use brotli::Brotli;
pub use budget::Budget;
use inflate::Inflate;
use zstd::Zstd;

/// Encoded bytes that are decoded at a time.
pub const CELL_BYTES: usize = 128;

/// Decoded bytes that no ratio is asked of: short texts can be all repetition.
pub const RATIO_FREE_BYTES: u64 = 256 << 10;

/// Most codings of one body.
pub const MAX_CODINGS: usize = 4;

/// One content coding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// `gzip` (RFC 1952), any number of members.
    Gzip,
    /// `deflate`: zlib (RFC 1950), and what browsers also take, raw deflate (RFC 1951).
    Deflate,
    /// `br` (RFC 7932).
    Brotli,
    /// `zstd` (RFC 8878), any number of frames.
    Zstd,
}

/// The header names a coding that is not decoded, as a short plain word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown(pub String);

/// The codings of a `content-encoding` header in the order in which they were applied, `identity` left
/// out.
///
/// # Errors
/// [`Unknown`] with the first coding that is not one of ours, or `too_many`.
pub fn codings(header: &[u8]) -> Result<Vec<Coding>, Unknown> {
    let mut list = Vec::new();
    for name in header.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
        let is = |coding: &str| name.eq_ignore_ascii_case(coding.as_bytes());
        list.push(if is("gzip") || is("x-gzip") {
            Coding::Gzip
        } else if is("deflate") {
            Coding::Deflate
        } else if is("br") {
            Coding::Brotli
        } else if is("zstd") {
            Coding::Zstd
        } else if is("identity") || is("") {
            continue;
        } else {
            return Err(Unknown(word(name)));
        });
        if list.len() > MAX_CODINGS {
            return Err(Unknown("too_many".into()));
        }
    }
    Ok(list)
}

/// A header's value as a short plain word.
fn word(value: &[u8]) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    value.iter().filter(|b| plain(b)).take(24).map(|&b| b.to_ascii_lowercase() as char).collect()
}

/// Why a body was not decoded to its end. What came before has been given to the sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Not what the header says it is, or something after its end.
    #[error("the body is not in its content-encoding")]
    Malformed,
    /// It ends too early.
    #[error("the encoded body ends too early")]
    Truncated,
    /// More bytes for one than the configuration allows: a decompression bomb.
    #[error("the body decodes to more than limits.max_decoded_ratio times its size")]
    Ratio,
    /// No room left in the [`Budget`].
    #[error("decoding the body takes more memory than limits.max_decoder_bytes leaves")]
    Memory,
    /// The sink wanted no more.
    #[error("decoding was stopped")]
    Stopped,
}

impl DecodeError {
    /// A short fixed name, for reasons.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "encoding_malformed",
            Self::Truncated => "encoding_truncated",
            Self::Ratio => "encoding_ratio",
            Self::Memory => "encoding_memory",
            Self::Stopped => "encoding_stopped",
        }
    }
}

/// Bounds of decoding.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most decoded bytes for each encoded one.
    pub max_ratio: u32,
    /// Memory that the decoder shares with others.
    pub budget: Budget,
}

/// Where decoded bytes go inside: an error ends the decoding.
type Emit<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), DecodeError>;

#[derive(Debug)]
enum Codec {
    Inflate(Inflate),
    Brotli(Brotli),
    Zstd(Box<Zstd>),
}

impl Codec {
    fn push(&mut self, input: &[u8], emit: Emit<'_>) -> Result<(), DecodeError> {
        match self {
            Self::Inflate(codec) => codec.push(input, emit),
            Self::Brotli(codec) => codec.push(input, emit),
            Self::Zstd(codec) => codec.push(input, emit),
        }
    }

    /// There is no more input. All that could be decoded has been given.
    fn finish(&self) -> Result<(), DecodeError> {
        match self {
            Self::Inflate(codec) => codec.finish(),
            Self::Brotli(codec) => codec.finish(),
            Self::Zstd(codec) => codec.finish(),
        }
    }
}

/// A coding and what has gone through it.
#[derive(Debug)]
struct Stage {
    codec: Codec,
    flow: Flow,
}

#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    consumed: u64,
    produced: u64,
}

impl Flow {
    fn produce(&mut self, bytes: usize, max_ratio: u32) -> Result<(), DecodeError> {
        self.produced = self.produced.saturating_add(bytes as u64);
        let allowed = self.consumed.saturating_mul(u64::from(max_ratio)).max(RATIO_FREE_BYTES);
        if self.produced > allowed { Err(DecodeError::Ratio) } else { Ok(()) }
    }
}

/// Undoes the codings of one body.
#[derive(Debug)]
pub struct Decoder {
    /// The coding applied last comes first.
    stages: Vec<Stage>,
    max_ratio: u32,
    /// A cell that is not full yet.
    cell: Vec<u8>,
    whole: Flow,
    ended: Option<Result<(), DecodeError>>,
}

impl Decoder {
    /// For a body with these [`codings`].
    ///
    /// # Errors
    /// [`DecodeError::Memory`] if the budget has no room.
    pub fn new(codings: &[Coding], limits: &Limits) -> Result<Self, DecodeError> {
        let budget = &limits.budget;
        let stage = |coding: &Coding| {
            let codec = match coding {
                Coding::Gzip => Codec::Inflate(Inflate::gzip(budget)?),
                Coding::Deflate => Codec::Inflate(Inflate::deflate(budget)?),
                Coding::Brotli => Codec::Brotli(Brotli::new(budget)?),
                Coding::Zstd => Codec::Zstd(Box::new(Zstd::new(budget))),
            };
            Ok(Stage { codec, flow: Flow::default() })
        };
        let stages = codings.iter().rev().map(stage).collect::<Result<Vec<Stage>, DecodeError>>()?;
        let cell = Vec::with_capacity(CELL_BYTES);
        Ok(Self { stages, max_ratio: limits.max_ratio, cell, whole: Flow::default(), ended: None })
    }

    /// Decodes the next bytes of the body, cut anywhere. The sink may break off.
    ///
    /// # Errors
    /// [`DecodeError`]; from then on each call returns it again.
    pub fn push(
        &mut self,
        mut chunk: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<(), DecodeError> {
        if let Some(ended) = self.ended {
            return ended;
        }
        if !self.cell.is_empty() {
            let (taken, rest) = chunk.split_at((CELL_BYTES - self.cell.len()).min(chunk.len()));
            self.cell.extend_from_slice(taken);
            chunk = rest;
            if self.cell.len() < CELL_BYTES {
                return Ok(());
            }
            self.whole_cell(sink)?;
        }
        let (cells, rest) = chunk.as_chunks::<CELL_BYTES>();
        for cell in cells {
            self.decode(cell, sink)?;
        }
        self.cell.extend_from_slice(rest);
        Ok(())
    }

    /// The body has ended, or broken off. A body without a byte is no error.
    ///
    /// # Errors
    /// [`DecodeError`]; [`DecodeError::Truncated`] if the codings had not come to their end.
    pub fn finish(&mut self, sink: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) -> Result<(), DecodeError> {
        if let Some(ended) = self.ended {
            return ended;
        }
        self.whole_cell(sink)?;
        // A body without a byte (the answer to a HEAD, 304) needs no coding.
        let mut stages = self.stages.iter().filter(|_| self.whole.consumed > 0);
        let result = stages.try_for_each(|stage| stage.codec.finish());
        self.ended = Some(result);
        result
    }

    /// Decoded so far.
    pub fn decoded_bytes(&self) -> u64 {
        self.whole.produced
    }

    fn whole_cell(&mut self, sink: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) -> Result<(), DecodeError> {
        let mut cell = core::mem::take(&mut self.cell);
        let result = if cell.is_empty() { Ok(()) } else { self.decode(&cell, sink) };
        cell.clear();
        self.cell = cell;
        result
    }

    fn decode(
        &mut self,
        cell: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<(), DecodeError> {
        self.whole.consumed = self.whole.consumed.saturating_add(cell.len() as u64);
        let Self { stages, max_ratio, whole, .. } = self;
        let result = run(stages, *max_ratio, cell, &mut |piece| give(whole, *max_ratio, piece, sink));
        if result.is_err() {
            self.ended = Some(result);
        }
        result
    }
}

fn give(
    whole: &mut Flow,
    max_ratio: u32,
    piece: &[u8],
    sink: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<(), DecodeError> {
    whole.produce(piece.len(), max_ratio)?;
    match sink(piece) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(DecodeError::Stopped),
    }
}

/// Sends `input` through `stages`, the first of which takes it.
fn run(stages: &mut [Stage], max_ratio: u32, input: &[u8], emit: Emit<'_>) -> Result<(), DecodeError> {
    let Some((stage, inner)) = stages.split_first_mut() else { return emit(input) };
    let Stage { codec, flow } = stage;
    flow.consumed = flow.consumed.saturating_add(input.len() as u64);
    codec.push(input, &mut |piece| {
        flow.produce(piece.len(), max_ratio)?;
        run(inner, max_ratio, piece, emit)
    })
}

#[cfg(test)]
mod tests;
