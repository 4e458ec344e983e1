//! gzip (RFC 1952) and deflate: zlib (RFC 1950) or raw (RFC 1951).
//!
//! What: the wrappers are read here, a byte at a time; the deflate data by `miniz_oxide` into a ring of
//! 32 KiB, from which decoded bytes are given as they come.
//!
//! Why raw deflate: servers have sent it under the name `deflate` for as long as there is one, and clients
//! take both. What has a valid zlib header is zlib, as in browsers.
//!
//! Left out on purpose: checksums, and preset dictionaries, which HTTP has no way to name.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_HAS_MORE_INPUT;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use super::budget::{Budget, Lease};
use super::{DecodeError, Emit};

/// Deflate's window.
const RING_BYTES: usize = 32 << 10;

/// Bits of a gzip header's FLG.
const FHCRC: u8 = 2;
const FEXTRA: u8 = 4;
const FNAME: u8 = 8;
const FCOMMENT: u8 = 16;
const RESERVED: u8 = 0xe0;

/// What the next bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A gzip member's header, `at` bytes of its ten in.
    Gzip { at: u8, flags: u8 },
    /// Length of the extra field: bytes seen, low byte.
    ExtraLength { flags: u8, low: Option<u8> },
    /// So many bytes of the extra field.
    Extra { flags: u8, left: u16 },
    /// A zero-terminated name.
    Name { flags: u8 },
    /// A zero-terminated comment.
    Comment { flags: u8 },
    /// So many bytes of the header's checksum.
    HeaderCheck { left: u8 },
    /// Zlib or raw: the first byte, if it is here.
    Sniff { first: Option<u8> },
    /// Deflate data, then a trailer of so many bytes.
    Body { trailer: u8 },
    /// So many bytes of the trailer.
    Trailer { left: u8 },
    /// Nothing may follow.
    End,
}

pub(super) struct Inflate {
    state: State,
    gzip: bool,
    inner: Box<DecompressorOxide>,
    ring: Vec<u8>,
    at: usize,
    _lease: Lease,
}

impl core::fmt::Debug for Inflate {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Inflate").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Inflate {
    pub(super) fn gzip(budget: &Budget) -> Result<Self, DecodeError> {
        Self::new(State::Gzip { at: 0, flags: 0 }, true, budget)
    }

    pub(super) fn deflate(budget: &Budget) -> Result<Self, DecodeError> {
        Self::new(State::Sniff { first: None }, false, budget)
    }

    fn new(state: State, gzip: bool, budget: &Budget) -> Result<Self, DecodeError> {
        let lease = budget.lease(RING_BYTES + size_of::<DecompressorOxide>()).ok_or(DecodeError::Memory)?;
        let (inner, ring) = (Box::<DecompressorOxide>::default(), vec![0; RING_BYTES]);
        Ok(Self { state, gzip, inner, ring, at: 0, _lease: lease })
    }

    pub(super) fn push(&mut self, mut input: &[u8], emit: Emit<'_>) -> Result<(), DecodeError> {
        loop {
            if let State::Body { trailer } = self.state {
                if !self.inflate(&mut input, emit)? {
                    return Ok(());
                }
                self.state = State::Trailer { left: trailer };
            }
            if self.state == (State::Trailer { left: 0 }) {
                self.state = if self.gzip { State::Gzip { at: 0, flags: 0 } } else { State::End };
            }
            let Some((&byte, rest)) = input.split_first() else { return Ok(()) };
            input = rest;
            self.state = self.header(byte, emit)?;
        }
    }

    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        let complete = match self.state {
            State::Gzip { at, .. } => at == 0,
            State::End => true,
            _ => false,
        };
        if complete { Ok(()) } else { Err(DecodeError::Truncated) }
    }

    /// Reads one byte of a wrapper.
    fn header(&mut self, byte: u8, emit: Emit<'_>) -> Result<State, DecodeError> {
        Ok(match self.state {
            State::Gzip { at, flags } => {
                let good = match at {
                    0 => byte == 0x1f,
                    1 => byte == 0x8b,
                    2 => byte == 8,
                    3 => byte & RESERVED == 0,
                    _ => true,
                };
                if !good {
                    return Err(DecodeError::Malformed);
                }
                let flags = if at == 3 { byte } else { flags };
                if at == 9 { self.after(FEXTRA, flags) } else { State::Gzip { at: at + 1, flags } }
            }
            State::ExtraLength { flags, low: None } => State::ExtraLength { flags, low: Some(byte) },
            State::ExtraLength { flags, low: Some(low) } => match u16::from_le_bytes([low, byte]) {
                0 => self.after(FNAME, flags),
                left => State::Extra { flags, left },
            },
            State::Extra { flags, left: 1 } => self.after(FNAME, flags),
            State::Extra { flags, left } => State::Extra { flags, left: left.saturating_sub(1) },
            State::Name { flags } if byte == 0 => self.after(FCOMMENT, flags),
            State::Comment { flags } if byte == 0 => self.after(FHCRC, flags),
            state @ (State::Name { .. } | State::Comment { .. }) => state,
            State::HeaderCheck { left: 2 } => State::HeaderCheck { left: 1 },
            State::HeaderCheck { .. } => self.begin(8),
            State::Sniff { first: None } => State::Sniff { first: Some(byte) },
            State::Sniff { first: Some(first) } => {
                let (method, window) = (first & 15, first >> 4);
                let valid = u16::from_be_bytes([first, byte]).is_multiple_of(31);
                if method == 8 && window <= 7 && valid {
                    // FDICT names a dictionary that nobody gave.
                    if byte & 0x20 != 0 { return Err(DecodeError::Malformed) } else { self.begin(4) }
                } else {
                    self.state = self.begin(0);
                    return self.push(&[first, byte], emit).map(|()| self.state);
                }
            }
            State::Trailer { left } => State::Trailer { left: left.saturating_sub(1) },
            State::Body { .. } | State::End => return Err(DecodeError::Malformed),
        })
    }

    /// The gzip header's part that comes at `flag`, or the next one that is there.
    fn after(&mut self, flag: u8, flags: u8) -> State {
        let there = |wanted: u8| flags & wanted != 0;
        if flag == FEXTRA && there(FEXTRA) {
            State::ExtraLength { flags, low: None }
        } else if matches!(flag, FEXTRA | FNAME) && there(FNAME) {
            State::Name { flags }
        } else if flag != FHCRC && there(FCOMMENT) {
            State::Comment { flags }
        } else if there(FHCRC) {
            State::HeaderCheck { left: 2 }
        } else {
            self.begin(8)
        }
    }

    /// Deflate data begins.
    fn begin(&mut self, trailer: u8) -> State {
        self.inner.init();
        State::Body { trailer }
    }

    /// Whether the deflate data has ended; takes what it used from `input`.
    fn inflate(&mut self, input: &mut &[u8], emit: Emit<'_>) -> Result<bool, DecodeError> {
        loop {
            let (status, read, written) =
                decompress(&mut self.inner, input, &mut self.ring, self.at, TINFL_FLAG_HAS_MORE_INPUT);
            *input = input.get(read..).unwrap_or_default();
            let end = self.at + written;
            let piece = self.ring.get(self.at..end).unwrap_or_default();
            self.at = end % RING_BYTES;
            if !piece.is_empty() {
                emit(piece)?;
            }
            match status {
                TINFLStatus::Done => return Ok(true),
                TINFLStatus::NeedsMoreInput => return Ok(false),
                TINFLStatus::HasMoreOutput => {}
                _ => return Err(DecodeError::Malformed),
            }
        }
    }
}
