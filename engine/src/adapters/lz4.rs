//! `lz4`: LZ4's block format by lz4_flex.
//!
//! Offsets have 16 bits, so text and baseline together take at most 65,534 bytes. C(x|B) is
//! C(Bx) - C(B): lz4_flex's dictionaries are indexed a machine word at a time, so lengths under them would
//! not be the same in 32-bit wasm and in 64-bit native code; without them lz4_flex hashes four bytes on
//! every target.
//!
//! Why: no entropy coding, so the length is almost a count of repetitions; very fast. Cost: 300 to
//! 600 MB/s over the text and, for C(x|B), over the baseline; 8 KiB of table.

use alloc::boxed::Box;
use alloc::vec::Vec;

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use super::{Adapter, AdapterError, Compressor, Conditional, Difference, bits};

/// See the module.
pub struct Lz4 {
    table: CompressTable,
    compressed: Vec<u8>,
}

impl core::fmt::Debug for Lz4 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Lz4").finish_non_exhaustive()
    }
}

impl Default for Lz4 {
    fn default() -> Self {
        Self::new()
    }
}

impl Lz4 {
    /// A compressor.
    pub fn new() -> Self {
        Self { table: CompressTable::small(), compressed: Vec::new() }
    }
}

impl Compressor for Lz4 {
    fn adapter(&self) -> Adapter {
        Adapter::Lz4
    }

    fn code_length_bits(&mut self, text: &[u8]) -> Result<u64, AdapterError> {
        Adapter::Lz4.fits(&[text.len()])?;
        self.compressed.resize(get_maximum_output_size(text.len()), 0);
        compress_into_with_table(text, &mut self.compressed, &mut self.table).map(bits).map_err(|_| {
            AdapterError::Codec {
                adapter: Adapter::Lz4,
                reason: "a block is longer than lz4_flex's own bound for it",
            }
        })
    }

    fn given(&mut self, baseline: &[u8]) -> Result<Box<dyn Conditional>, AdapterError> {
        Ok(Box::new(Difference::new(Self::new(), baseline)?))
    }
}
