//! `openzl`: OpenZL's generic graph for serial bytes, format version 27, native code only.
//!
//! The C library is linked through `driftlock-openzl`, since this crate has no `unsafe` of its own. Its
//! generic graph hands serial bytes to zstd or to an entropy coder, whichever fits, within a window of
//! 2 MiB. It has no dictionaries that could be made from raw text, so C(x|B) is C(Bx) - C(B). What an empty
//! text takes, the frame, is not counted.
//!
//! Cost: about 4 microseconds a text, and the baseline again with each.

use alloc::boxed::Box;

use super::{Adapter, AdapterError, Compressor, Conditional, Difference, bits};

/// See the module.
#[derive(Debug)]
pub struct OpenZl {
    session: driftlock_openzl::Session,
    frame_bytes: usize,
}

impl OpenZl {
    /// A compressor.
    ///
    /// # Errors
    /// [`AdapterError::Memory`], [`AdapterError::Codec`].
    pub fn new() -> Result<Self, AdapterError> {
        let mut session = driftlock_openzl::Session::new().map_err(failed)?;
        let frame_bytes = session.compressed_bytes(&[]).map_err(failed)?;
        Ok(Self { session, frame_bytes })
    }
}

impl Compressor for OpenZl {
    fn adapter(&self) -> Adapter {
        Adapter::OpenZl
    }

    fn code_length_bits(&mut self, text: &[u8]) -> Result<u64, AdapterError> {
        Adapter::OpenZl.fits(&[text.len()])?;
        let bytes = self.session.compressed_bytes(text).map_err(failed)?;
        let counted = bytes.checked_sub(self.frame_bytes).ok_or(AdapterError::Codec {
            adapter: Adapter::OpenZl,
            reason: "a frame is shorter than an empty one",
        })?;
        Ok(bits(counted))
    }

    fn given(&mut self, baseline: &[u8]) -> Result<Box<dyn Conditional>, AdapterError> {
        Adapter::OpenZl.fits(&[baseline.len()])?;
        Ok(Box::new(Difference::new(Self::new()?, baseline)?))
    }
}

fn failed(error: driftlock_openzl::Error) -> AdapterError {
    match error {
        driftlock_openzl::Error::Memory => AdapterError::Memory(Adapter::OpenZl),
        driftlock_openzl::Error::Library { reason, .. } => {
            AdapterError::Codec { adapter: Adapter::OpenZl, reason }
        }
    }
}
