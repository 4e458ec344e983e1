//! How many bytes OpenZL makes of a text.
//!
//! What: [`Session`], one compression context with the generic graph for serial bytes, parameters fixed.
//!
//! Why a package of its own: openzl-sys is a raw binding, and the engine forbids `unsafe` in its code. All
//! of it stands here, in one file, behind two safe functions.
//!
//! Cost: the C library takes half a minute to build and adds 2 MB to a binary; a session some 100 KiB.
//! Left out on purpose: decompression, typed inputs, graphs trained for a format. The library has no
//! wasm build, so this is native code only.

use std::ffi::{CStr, c_int};
use std::ptr::NonNull;

use openzl_sys as zl;

/// Encoders emit this version whatever the library's default becomes.
const FORMAT_VERSION: c_int = 27;
/// zstd's, where the graph takes zstd.
const LEVEL: c_int = 3;
const TERNARY_DISABLE: c_int = 2;

/// Why there is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The library got no memory.
    #[error("OpenZL got no memory; free some")]
    Memory,
    /// The library refused.
    #[error("OpenZL failed with code {code}: {reason}")]
    Library {
        /// Its error code.
        code: u32,
        /// Its name for it.
        reason: &'static str,
    },
}

/// A compression context. Sizes do not depend on what was compressed before.
#[derive(Debug)]
pub struct Session {
    context: NonNull<zl::ZL_CCtx>,
    /// Holds the graph that `context` refers to.
    compressor: NonNull<zl::ZL_Compressor>,
    output: Vec<u8>,
}

// SAFETY: both objects are owned by the session alone and the library keeps no thread-local state for them;
// every use takes `&mut self`.
unsafe impl Send for Session {}

impl Session {
    /// A context with the generic graph.
    ///
    /// # Errors
    /// [`Error`].
    pub fn new() -> Result<Self, Error> {
        // SAFETY: creates an object or returns null.
        let compressor = NonNull::new(unsafe { zl::ZL_Compressor_create() }).ok_or(Error::Memory)?;
        // SAFETY: creates an object or returns null.
        let Some(context) = NonNull::new(unsafe { zl::ZL_CCtx_create() }) else {
            // SAFETY: made above, freed once, not used again.
            unsafe { zl::ZL_Compressor_free(compressor.as_ptr()) };
            return Err(Error::Memory);
        };
        // From here on dropping the session frees both.
        let session = Self { context, compressor, output: Vec::new() };
        let generic = zl::ZL_GraphID { gid: zl::ZL_StandardGraphID_compress_generic };
        // SAFETY: the compressor lives as long as the session; a standard graph needs no registration.
        checked(unsafe {
            zl::ZL_Compressor_setParameter(
                session.compressor.as_ptr(),
                zl::ZL_CParam_formatVersion,
                FORMAT_VERSION,
            )
        })?;
        // SAFETY: as above.
        checked(unsafe { zl::ZL_Compressor_selectStartingGraphID(session.compressor.as_ptr(), generic) })?;
        for (parameter, value) in [
            (zl::ZL_CParam_stickyParameters, 1),
            (zl::ZL_CParam_formatVersion, FORMAT_VERSION),
            (zl::ZL_CParam_compressionLevel, LEVEL),
            (zl::ZL_CParam_compressedChecksum, TERNARY_DISABLE),
            (zl::ZL_CParam_contentChecksum, TERNARY_DISABLE),
        ] {
            // SAFETY: the context lives as long as the session.
            checked(unsafe { zl::ZL_CCtx_setParameter(session.context.as_ptr(), parameter, value) })?;
        }
        // SAFETY: the compressor was validated by the selection of its graph and is freed after the context.
        checked(unsafe { zl::ZL_CCtx_refCompressor(session.context.as_ptr(), session.compressor.as_ptr()) })?;
        Ok(session)
    }

    /// Bytes of the frame that `text` compresses to.
    ///
    /// # Errors
    /// [`Error::Library`].
    pub fn compressed_bytes(&mut self, text: &[u8]) -> Result<usize, Error> {
        // SAFETY: a pure function of the size.
        let bound = unsafe { zl::ZL_compressBound(text.len()) };
        self.output.resize(bound, 0);
        // SAFETY: both buffers are as long as said and do not overlap; the context is not in use.
        checked(unsafe {
            zl::ZL_CCtx_compress(
                self.context.as_ptr(),
                self.output.as_mut_ptr().cast(),
                self.output.len(),
                text.as_ptr().cast(),
                text.len(),
            )
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: both were made by `new`, are freed once, and the context, which refers to the compressor,
        // goes first.
        unsafe {
            zl::ZL_CCtx_free(self.context.as_ptr());
            zl::ZL_Compressor_free(self.compressor.as_ptr());
        }
    }
}

/// The value of a report.
fn checked(report: zl::ZL_Report) -> Result<usize, Error> {
    // SAFETY: all of the report's variants begin with the code.
    let code = unsafe { report._code };
    if code == zl::ZL_ErrorCode_no_error {
        // SAFETY: without an error the value is the valid variant.
        return Ok(unsafe { report._value._value });
    }
    // SAFETY: returns a pointer to a static string, for every code.
    let reason = unsafe { zl::ZL_ErrorCode_toString(code) };
    let reason = NonNull::new(reason.cast_mut()).map_or("no reason given", |reason| {
        // SAFETY: not null, static and terminated.
        let reason: &'static CStr = unsafe { CStr::from_ptr(reason.as_ptr()) };
        reason.to_str().unwrap_or("no reason given")
    });
    Err(Error::Library { code, reason })
}
