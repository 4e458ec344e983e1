//! `zstd`: Zstandard (RFC 8878) by libzstd, level 3.
//!
//! The window is set for each text to the smallest power of two that covers it and the baseline, so
//! nothing is out of reach up to 128 MiB. A baseline is loaded as a raw-content dictionary and indexed
//! once. Of a long one libzstd quietly indexes only the end, `8 << hashLog` bytes and never more than
//! 16 MiB: the hash table is made large enough for the first limit, beyond the second a baseline is refused.
//! The frame has neither content size nor checksum nor dictionary id, so its header is six bytes for
//! every text; they are not counted.
//!
//! Cost: about 200 to 500 MB/s, and 2 to 4 microseconds for each text; a context takes about 1.3 MB, half
//! a baseline's length more if that is over a MiB.

use alloc::boxed::Box;
use alloc::vec::Vec;

use zstd_safe::{CCtx, CParameter, compress_bound};

use super::{Adapter, AdapterError, Compressor, Conditional, bits};

const LEVEL: i32 = 3;
/// Magic number, frame header descriptor, window descriptor (RFC 8878, section 3.1.1).
const FRAME_HEADER_BYTES: usize = 6;
/// Least window that libzstd takes: 2^10.
const MIN_WINDOW_LOG: u32 = 10;
/// The longest dictionary that is indexed from its beginning: positions have 24 bits beside an 8-bit tag,
/// and the first is 2.
const MAX_BASELINE_BYTES: usize = (1 << 24) - 2;
/// libzstd indexes the last `8 << hashLog` bytes of a dictionary; the level's own hashLog is at least 17
/// for dictionaries over 256 KiB.
const LEVEL_HASH_LOG: u32 = 17;
/// A dictionary that begins so is read as a formatted one (RFC 8878, section 5).
const DICTIONARY_MAGIC: [u8; 4] = [0x37, 0xA4, 0x30, 0xEC];

/// See the module.
#[derive(Debug)]
pub struct Zstd(Session);

impl Zstd {
    /// A compressor without a baseline.
    ///
    /// # Errors
    /// [`AdapterError::Memory`].
    pub fn new() -> Result<Self, AdapterError> {
        Session::new(&[]).map(Self)
    }
}

impl Compressor for Zstd {
    fn adapter(&self) -> Adapter {
        Adapter::Zstd
    }

    fn code_length_bits(&mut self, text: &[u8]) -> Result<u64, AdapterError> {
        self.0.code_length_bits(text)
    }

    fn given(&mut self, baseline: &[u8]) -> Result<Box<dyn Conditional>, AdapterError> {
        Ok(Box::new(Session::new(baseline)?))
    }
}

/// A context with its parameters and dictionary set.
struct Session {
    context: CCtx<'static>,
    baseline_bytes: usize,
    compressed: Vec<u8>,
}

impl core::fmt::Debug for Session {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Session").field("baseline_bytes", &self.baseline_bytes).finish_non_exhaustive()
    }
}

impl Session {
    fn new(baseline: &[u8]) -> Result<Self, AdapterError> {
        if baseline.len() > MAX_BASELINE_BYTES {
            return Err(AdapterError::WindowTooShort {
                adapter: Adapter::Zstd,
                needed_bytes: u64::try_from(baseline.len()).unwrap_or(u64::MAX),
                window_bytes: MAX_BASELINE_BYTES as u64,
            });
        }
        let mut context = CCtx::try_create().ok_or(AdapterError::Memory(Adapter::Zstd))?;
        for parameter in [
            CParameter::CompressionLevel(LEVEL),
            CParameter::ContentSizeFlag(false),
            CParameter::ChecksumFlag(false),
            CParameter::DictIdFlag(false),
        ] {
            context.set_parameter(parameter).map_err(failed)?;
        }
        let indexed_log = baseline.len().next_power_of_two().trailing_zeros().saturating_sub(3);
        if indexed_log > LEVEL_HASH_LOG {
            context.set_parameter(CParameter::HashLog(indexed_log)).map_err(failed)?;
        }
        if baseline.starts_with(&DICTIONARY_MAGIC) {
            // One byte before it, and it is content.
            let mut raw = Vec::with_capacity(baseline.len() + 1);
            raw.push(0);
            raw.extend_from_slice(baseline);
            context.load_dictionary(&raw).map_err(failed)?;
        } else {
            context.load_dictionary(baseline).map_err(failed)?;
        }
        Ok(Self { context, baseline_bytes: baseline.len(), compressed: Vec::new() })
    }
}

impl Conditional for Session {
    fn code_length_bits(&mut self, text: &[u8]) -> Result<u64, AdapterError> {
        Adapter::Zstd.fits(&[self.baseline_bytes, text.len()])?;
        let covered = self.baseline_bytes.saturating_add(text.len()).max(1);
        let window_log = covered.next_power_of_two().trailing_zeros().max(MIN_WINDOW_LOG);
        self.context.set_parameter(CParameter::WindowLog(window_log)).map_err(failed)?;
        self.compressed.resize(compress_bound(text.len()), 0);
        let written = self.context.compress2(self.compressed.as_mut_slice(), text).map_err(failed)?;
        let counted = written.checked_sub(FRAME_HEADER_BYTES).ok_or(AdapterError::Codec {
            adapter: Adapter::Zstd,
            reason: "the frame is shorter than its header",
        })?;
        Ok(bits(counted))
    }
}

fn failed(code: zstd_safe::ErrorCode) -> AdapterError {
    AdapterError::Codec { adapter: Adapter::Zstd, reason: zstd_safe::get_error_name(code) }
}
