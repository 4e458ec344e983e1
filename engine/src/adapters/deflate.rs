//! `deflate`: RFC 1951 by miniz_oxide, level 6, without the wrappers of gzip and zlib.
//!
//! Distances end at 32,768 bytes and miniz_oxide needs 258 of them for its lookahead, so text and baseline
//! together take at most 32,510 bytes. For C(x|B) the baseline is compressed once and flushed to a byte
//! boundary (RFC 1951, section 3.2.4); each text starts from a copy of that state and only its own output
//! counts. Each starts a block with Huffman codes of its own.
//!
//! Why: Huffman codes fit a short text better than zstd's. Cost: 30 to 80 MB/s, and some ten microseconds a
//! text for the state of 300 KiB.

use alloc::boxed::Box;

use miniz_oxide::deflate::core::{
    CompressorOxide, TDEFLFlush, TDEFLStatus, compress_to_output, create_comp_flags_from_zip_params,
};

use super::{Adapter, AdapterError, Compressor, Conditional, bits};

const LEVEL: i32 = 6;
/// Negative: no zlib header.
const RAW_WINDOW_BITS: i32 = -15;
const DEFAULT_STRATEGY: i32 = 0;

/// See the module.
pub struct Deflate(CompressorOxide);

impl core::fmt::Debug for Deflate {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Deflate").finish_non_exhaustive()
    }
}

impl Default for Deflate {
    fn default() -> Self {
        Self::new()
    }
}

impl Deflate {
    /// A compressor.
    pub fn new() -> Self {
        Self(CompressorOxide::new(create_comp_flags_from_zip_params(
            LEVEL,
            RAW_WINDOW_BITS,
            DEFAULT_STRATEGY,
        )))
    }
}

impl Compressor for Deflate {
    fn adapter(&self) -> Adapter {
        Adapter::Deflate
    }

    fn code_length_bits(&mut self, text: &[u8]) -> Result<u64, AdapterError> {
        Adapter::Deflate.fits(&[text.len()])?;
        self.0.reset();
        output_bits(&mut self.0, text, TDEFLFlush::Finish)
    }

    fn given(&mut self, baseline: &[u8]) -> Result<Box<dyn Conditional>, AdapterError> {
        Adapter::Deflate.fits(&[baseline.len()])?;
        self.0.reset();
        let mut after_baseline = self.0.clone();
        if !baseline.is_empty() {
            output_bits(&mut after_baseline, baseline, TDEFLFlush::Sync)?;
        }
        Ok(Box::new(Given { after_baseline, baseline_bytes: baseline.len() }))
    }
}

struct Given {
    after_baseline: CompressorOxide,
    baseline_bytes: usize,
}

impl Conditional for Given {
    fn code_length_bits(&mut self, text: &[u8]) -> Result<u64, AdapterError> {
        Adapter::Deflate.fits(&[self.baseline_bytes, text.len()])?;
        output_bits(&mut self.after_baseline.clone(), text, TDEFLFlush::Finish)
    }
}

/// Compresses all of `text` and counts what comes out.
fn output_bits(
    compressor: &mut CompressorOxide,
    text: &[u8],
    flush: TDEFLFlush,
) -> Result<u64, AdapterError> {
    let mut bytes = 0usize;
    let (status, read) = compress_to_output(compressor, text, flush, |output| {
        bytes = bytes.saturating_add(output.len());
        true
    });
    if matches!(status, TDEFLStatus::Okay | TDEFLStatus::Done) && read == text.len() {
        return Ok(bits(bytes));
    }
    Err(AdapterError::Codec { adapter: Adapter::Deflate, reason: "the compressor stopped before the end" })
}
