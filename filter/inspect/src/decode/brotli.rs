//! br (RFC 7932), by `brotli-decompressor` without its standard library.
//!
//! What: the crate's streaming decoder with an allocator that takes each of its tables and its window
//! from the [`Budget`]; the crate takes an allocation refused for an error and stops.
//!
//! Cost: the window grows with the content up to what the stream declares, 16 MiB at most; while it
//! grows, old and new are there at once.
//!
//! Left out on purpose: large windows (beyond RFC 7932), shared dictionaries.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use brotli_decompressor::{
    Allocator, BrotliDecompressStream, BrotliResult, BrotliState, SliceWrapper, SliceWrapperMut,
};

use super::budget::{Budget, Lease};
use super::{DecodeError, Emit};

/// Decoded bytes given at a time.
const PIECE_BYTES: usize = 8 << 10;

/// What the state, the piece and the tables of a small stream take.
const FIXED_BYTES: usize = PIECE_BYTES + size_of::<State>();

type State = BrotliState<Leased, Leased, Leased>;

/// Allocates from the budget.
#[derive(Clone)]
struct Leased(Budget);

/// Memory under a lease; none if it was refused.
struct Cell<T> {
    memory: Vec<T>,
    _lease: Option<Lease>,
}

impl<T> Default for Cell<T> {
    fn default() -> Self {
        Self { memory: Vec::new(), _lease: None }
    }
}

impl<T> SliceWrapper<T> for Cell<T> {
    fn slice(&self) -> &[T] {
        &self.memory
    }
}

impl<T> SliceWrapperMut<T> for Cell<T> {
    fn slice_mut(&mut self) -> &mut [T] {
        &mut self.memory
    }
}

impl<T: Clone + Default> Allocator<T> for Leased {
    type AllocatedMemory = Cell<T>;

    fn alloc_cell(&mut self, len: usize) -> Cell<T> {
        let lease = len.checked_mul(size_of::<T>()).and_then(|bytes| self.0.lease(bytes));
        match lease {
            Some(lease) => Cell { memory: vec![T::default(); len], _lease: Some(lease) },
            None => Cell::default(),
        }
    }

    fn free_cell(&mut self, _cell: Cell<T>) {}
}

pub(super) struct Brotli {
    state: Box<State>,
    piece: Vec<u8>,
    done: bool,
    _lease: Lease,
}

impl core::fmt::Debug for Brotli {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Brotli").field("done", &self.done).finish_non_exhaustive()
    }
}

impl Brotli {
    pub(super) fn new(budget: &Budget) -> Result<Self, DecodeError> {
        let lease = budget.lease(FIXED_BYTES).ok_or(DecodeError::Memory)?;
        let leased = || Leased(budget.clone());
        let state = Box::new(BrotliState::new_strict(leased(), leased(), leased()));
        Ok(Self { state, piece: vec![0; PIECE_BYTES], done: false, _lease: lease })
    }

    pub(super) fn push(&mut self, input: &[u8], emit: Emit<'_>) -> Result<(), DecodeError> {
        let (mut left, mut at) = (input.len(), 0);
        loop {
            if self.done {
                return if left == 0 { Ok(()) } else { Err(DecodeError::Malformed) };
            }
            let (mut room, mut written, mut total) = (self.piece.len(), 0, 0);
            let result = BrotliDecompressStream(
                &mut left,
                &mut at,
                input,
                &mut room,
                &mut written,
                &mut self.piece,
                &mut total,
                &mut self.state,
            );
            let piece = self.piece.get(..written).unwrap_or_default();
            if !piece.is_empty() {
                emit(piece)?;
            }
            match result {
                BrotliResult::ResultSuccess => self.done = true,
                BrotliResult::NeedsMoreInput => return Ok(()),
                BrotliResult::NeedsMoreOutput => {}
                BrotliResult::ResultFailure => {
                    // -21 to -30 are the codes of a refused allocation.
                    let refused = (-30..=-21).contains(&(self.state.error_code as i32));
                    return Err(if refused { DecodeError::Memory } else { DecodeError::Malformed });
                }
            }
        }
    }

    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        if self.done { Ok(()) } else { Err(DecodeError::Truncated) }
    }
}
