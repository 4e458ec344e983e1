//! zstd (RFC 8878), by `ruzstd` without its standard library.
//!
//! What: frame and block headers are read here, so that the crate is given whole blocks (at most 128 KiB)
//! and the memory that a block can take is leased before it is decoded.
//!
//! How the crate is made to give bytes early: it holds a window back until the frame has ended. So each
//! frame is begun with an empty last block; from then on the crate tells how much it holds and lends it
//! out, takes further blocks all the same, and what to let go of is decided here.
//!
//! Cost: a block of input is kept until it is complete. Bytes are given block by block until the crate's
//! ring wraps for the first time, after one to two windows; then up to a window late.
//!
//! Why not the C library: it decodes up to twice as fast, but takes 65 KiB more of the module, and a C compiler for
//! every target.
//!
//! Left out on purpose: dictionaries, checksums.

use alloc::vec::Vec;

use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::io::{Read, Write};

use super::budget::{Budget, Lease};
use super::{DecodeError, Emit};

const MAGIC: u32 = 0xfd2f_b528;
/// Magic numbers of skippable frames, the low four bits free.
const SKIPPABLE: u32 = 0x184d_2a50;
/// Largest block (section 3.1.1.2.3), and largest window that HTTP allows (RFC 9659).
const MAX_BLOCK_BYTES: usize = 128 << 10;
const MAX_WINDOW_BYTES: u64 = 8 << 20;
const BLOCK_HEADER_BYTES: usize = 3;
const CHECKSUM_BYTES: usize = 4;
/// An empty last block, and a checksum that nobody compares.
const END: [u8; BLOCK_HEADER_BYTES + CHECKSUM_BYTES] = [1, 0, 0, 0, 0, 0, 0];
/// Decoded bytes let go of at a time.
const PIECE_BYTES: usize = 4 << 10;
/// What the decoder's tables take.
const TABLE_BYTES: usize = 40 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A frame begins, or the body has ended.
    Frame,
    /// So many bytes of a skippable frame.
    Skip(u64),
    /// A block begins.
    Block,
}

impl State {
    fn skip(left: u64) -> Self {
        if left == 0 { Self::Frame } else { Self::Skip(left) }
    }
}

pub(super) struct Zstd {
    state: State,
    inner: FrameDecoder,
    /// Of the header or block under way.
    pending: Vec<u8>,
    budget: Budget,
    lease: Option<Lease>,
    window_bytes: usize,
    checksum: bool,
    /// Of the bytes that the crate holds, so many have been given.
    given: usize,
}

impl core::fmt::Debug for Zstd {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Zstd").field("state", &self.state).finish_non_exhaustive()
    }
}

/// Looks at what the crate holds, as far as it is in one piece, and takes nothing.
struct Lent<'a, 'b> {
    given: &'a mut usize,
    emit: Emit<'b>,
    result: Result<(), DecodeError>,
}

impl Write for Lent<'_, '_> {
    fn write(&mut self, held: &[u8]) -> Result<usize, ruzstd::io::Error> {
        if let Some(new) = held.get(*self.given..).filter(|new| !new.is_empty()) {
            *self.given = held.len();
            self.result = (self.emit)(new);
        }
        Ok(0)
    }

    fn flush(&mut self) -> Result<(), ruzstd::io::Error> {
        Ok(())
    }
}

/// What a frame's header says (section 3.1.1.1).
struct Header {
    bytes: usize,
    checksum: bool,
    window_bytes: u64,
}

/// The header at the front of `bytes`, if it is complete.
fn header(bytes: &[u8]) -> Option<Header> {
    let (&descriptor, rest) = bytes.get(4..)?.split_first()?;
    let single_segment = descriptor & 0x20 != 0;
    let dictionary_bytes = [0, 1, 2, 4].get(usize::from(descriptor & 3)).copied()?;
    let size_bytes = match descriptor >> 6 {
        0 => usize::from(single_segment),
        flag => 1 << flag,
    };
    let window_at = usize::from(!single_segment);
    let size_at = window_at + dictionary_bytes;
    let size = rest.get(size_at..size_at + size_bytes)?;
    let window_bytes = if single_segment {
        let size: u64 = size.iter().rev().fold(0, |size, &byte| size << 8 | u64::from(byte));
        if size_bytes == 2 { size + 256 } else { size }
    } else {
        let &window = rest.first()?;
        let base = 1u64 << (10 + (window >> 3));
        base + base / 8 * u64::from(window & 7)
    };
    Some(Header { bytes: 5 + size_at + size_bytes, checksum: descriptor & 4 != 0, window_bytes })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|&bytes| u32::from_le_bytes(bytes))
}

impl Zstd {
    pub(super) fn new(budget: &Budget) -> Self {
        let mut inner = FrameDecoder::new();
        inner.set_max_window_size(MAX_WINDOW_BYTES);
        Self {
            state: State::Frame,
            inner,
            pending: Vec::new(),
            budget: budget.clone(),
            lease: None,
            window_bytes: 0,
            checksum: false,
            given: 0,
        }
    }

    pub(super) fn push(&mut self, input: &[u8], emit: Emit<'_>) -> Result<(), DecodeError> {
        let mut pending = core::mem::take(&mut self.pending);
        pending.extend_from_slice(input);
        let mut at = 0;
        let result = loop {
            let rest = pending.get(at..).unwrap_or_default();
            match self.step(rest, emit) {
                Ok(Some(used)) if used > 0 => at += used,
                Ok(_) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        pending.drain(..at.min(pending.len()));
        self.pending = pending;
        result
    }

    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        let complete = self.state == State::Frame && self.pending.is_empty();
        if complete { Ok(()) } else { Err(DecodeError::Truncated) }
    }

    /// Bytes used of `bytes`; none if more are needed.
    fn step(&mut self, bytes: &[u8], emit: Emit<'_>) -> Result<Option<usize>, DecodeError> {
        match self.state {
            State::Frame => self.frame(bytes),
            State::Skip(left) => {
                let used = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                self.state = State::skip(left - used as u64);
                Ok(Some(used))
            }
            State::Block => {
                let Some(&[a, b, c]) = bytes.first_chunk() else { return Ok(None) };
                let header = u32::from_le_bytes([a, b, c, 0]);
                let (last, kind, size) = (header & 1 == 1, header >> 1 & 3, (header >> 3) as usize);
                if size > MAX_BLOCK_BYTES {
                    return Err(DecodeError::Malformed);
                }
                // A block of one byte repeated has that byte alone.
                let content = if kind == 1 { 1 } else { size };
                let trailer = if last && self.checksum { CHECKSUM_BYTES } else { 0 };
                let length = BLOCK_HEADER_BYTES + content + trailer;
                let Some(block) = bytes.get(..length) else { return Ok(None) };
                self.block(block, last, emit)?;
                if last {
                    self.state = State::Frame;
                }
                Ok(Some(length))
            }
        }
    }

    fn frame(&mut self, bytes: &[u8]) -> Result<Option<usize>, DecodeError> {
        let Some(magic) = u32_at(bytes, 0) else { return Ok(None) };
        if magic & !15 == SKIPPABLE {
            let Some(length) = u32_at(bytes, 4) else { return Ok(None) };
            self.state = State::skip(u64::from(length));
            return Ok(Some(8));
        }
        if magic != MAGIC {
            return Err(DecodeError::Malformed);
        }
        let Some(header) = header(bytes) else { return Ok(None) };
        if header.window_bytes > MAX_WINDOW_BYTES {
            return Err(DecodeError::Memory);
        }
        // A fresh decoder: a used one would reserve the whole window.
        *self = Self { pending: Vec::new(), lease: self.lease.take(), ..Self::new(&self.budget) };
        let mut source = bytes.get(..header.bytes).unwrap_or_default();
        self.inner.init(&mut source).map_err(|_| DecodeError::Malformed)?;
        self.decode(&END)?;
        self.window_bytes = header.window_bytes as usize;
        self.checksum = header.checksum;
        self.state = State::Block;
        Ok(Some(header.bytes))
    }

    /// Decodes one whole block, the checksum after the last one included.
    fn block(&mut self, block: &[u8], last: bool, emit: Emit<'_>) -> Result<(), DecodeError> {
        let most = self.window_bytes.min(MAX_BLOCK_BYTES);
        let ring = (self.inner.can_collect() + most).next_power_of_two();
        self.lease(TABLE_BYTES + block.len() + ring + 2 * most)?;
        self.decode(block)?;
        let mut lent = Lent { given: &mut self.given, emit, result: Ok(()) };
        self.inner.collect_to_writer(&mut lent).map_err(|_| DecodeError::Malformed)?;
        lent.result?;
        let kept = if last { 0 } else { self.window_bytes };
        let mut piece = [0; PIECE_BYTES];
        loop {
            let over = self.inner.can_collect().saturating_sub(kept).min(PIECE_BYTES);
            let Some(taken) = piece.get_mut(..over).filter(|taken| !taken.is_empty()) else { return Ok(()) };
            let length = self.inner.read(taken).map_err(|_| DecodeError::Malformed)?;
            let known = self.given.min(length);
            self.given -= known;
            if let Some(new) = taken.get(known..length).filter(|new| !new.is_empty()) {
                emit(new)?;
            }
        }
    }

    fn decode(&mut self, mut block: &[u8]) -> Result<(), DecodeError> {
        let one = BlockDecodingStrategy::UptoBlocks(1);
        self.inner.decode_blocks(&mut block, one).map(|_| ()).map_err(|_| DecodeError::Malformed)
    }

    fn lease(&mut self, bytes: usize) -> Result<(), DecodeError> {
        let granted = match &mut self.lease {
            Some(lease) => lease.resize(bytes),
            None => {
                self.lease = self.budget.lease(bytes);
                self.lease.is_some()
            }
        };
        if granted { Ok(()) } else { Err(DecodeError::Memory) }
    }
}
