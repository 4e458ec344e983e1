//! Classical compressors as code lengths: C(x), C(xy) and C(x|B) in bits, behind one trait.
//!
//! What: a [`Compressor`] gives the length of the shortest description that it finds of a text, of two
//! texts one after the other, and of a text when a baseline is known. [`Adapter`] names the strategies,
//! one file each; [`router`] chooses one by content kind and size; [`crate::metrics`] makes ratios and
//! distances of the lengths.
//!
//! Why beside the context coder: the normalised compression distance (Cilibrasi and Vitányi 2005) is
//! defined for any compressor, and a finding that several of them share does not rest on one model.
//!
//! **Match windows.** A compressor finds a repetition only within its match window: 64 KiB in lz4, 32 KiB
//! in deflate. If x and y together are longer, y can no longer refer to the beginning of x, C(xy) tends to
//! C(x) + C(y), and every distance to 1, whatever the texts are. So every adapter either opens a window
//! that covers all of its input (zstd) or refuses with [`AdapterError::WindowTooShort`]; no result is
//! clamped into its range.
//!
//! **What is counted.** The bytes of the compressed form without the container's constant parts (magic
//! numbers, frame header, checksums), times eight: a message of 40 bytes must not be 30 % frame.
//!
//! **Which targets agree.** zstd and deflate give the same lengths everywhere. lz4 reads words in the byte
//! order of the target, so its lengths are the same on all little-endian targets, 32-bit ones included.
//! openzl exists in native code only. None of them takes part in a verdict.
//!
//! Cost: every adapter compresses the text in full; [`Compressor::given`] digests the baseline once for
//! many texts where the format can do that (zstd, deflate), lz4 and openzl compress it again with each.
//! Memory is a few hundred KiB for each compressor and each digested baseline.
//!
//! Left out on purpose: the compressed bytes. Only their number is used.

#[cfg(feature = "deflate")]
pub mod deflate;
#[cfg(feature = "lz4")]
pub mod lz4;
#[cfg(feature = "openzl")]
pub mod openzl;
pub mod router;
#[cfg(feature = "zstd")]
pub mod zstd;

use alloc::boxed::Box;
use alloc::vec::Vec;

/// The strategies. All of them can be named in every build; [`Adapter::compressor`] says whether this one
/// has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Adapter {
    /// Zstandard (RFC 8878), level 3.
    Zstd,
    /// LZ4's block format.
    Lz4,
    /// Deflate (RFC 1951), level 6.
    Deflate,
    /// OpenZL's generic graph.
    OpenZl,
}

impl Adapter {
    /// Every adapter, in a fixed order.
    pub const ALL: [Self; 4] = [Self::Zstd, Self::Lz4, Self::Deflate, Self::OpenZl];

    /// The name in configuration, reports and features.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Deflate => "deflate",
            Self::OpenZl => "openzl",
        }
    }

    /// The adapter with that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|adapter| adapter.name() == name)
    }

    /// The longest input, bytes, whose last byte can still refer to the first. For C(xy) and C(x|B) it is
    /// the sum of both that counts.
    pub const fn match_window_bytes(self) -> u64 {
        match self {
            // The format goes to 2^41, libzstd's decoders accept 2^27 without being asked.
            Self::Zstd => 1 << 27,
            // Offsets are 16 bits. lz4_flex keeps positions in 16 bits and hashes four bytes, the same on
            // every word size, below 65,535 bytes.
            Self::Lz4 => 65_534,
            // Distances are 32,768 at most; miniz_oxide gives up the longest match length for its lookahead.
            Self::Deflate => 32_768 - 258,
            // The window of zstd level 3, to which the generic graph hands serial bytes.
            Self::OpenZl => 1 << 21,
        }
    }

    /// A compressor of this kind.
    ///
    /// # Errors
    /// [`AdapterError::NotBuilt`] if the feature is off, [`AdapterError::Memory`].
    pub fn compressor(self) -> Result<Box<dyn Compressor>, AdapterError> {
        match self {
            #[cfg(feature = "zstd")]
            Self::Zstd => Ok(Box::new(zstd::Zstd::new()?)),
            #[cfg(feature = "lz4")]
            Self::Lz4 => Ok(Box::new(lz4::Lz4::new())),
            #[cfg(feature = "deflate")]
            Self::Deflate => Ok(Box::new(deflate::Deflate::new())),
            #[cfg(feature = "openzl")]
            Self::OpenZl => Ok(Box::new(openzl::OpenZl::new()?)),
            #[allow(unreachable_patterns, reason = "with all features there is nothing left")]
            _ => Err(AdapterError::NotBuilt(self)),
        }
    }

    /// Refuses what does not fit the match window.
    pub(crate) fn fits(self, parts_bytes: &[usize]) -> Result<(), AdapterError> {
        let needed_bytes = parts_bytes
            .iter()
            .fold(0u64, |sum, part| sum.saturating_add(u64::try_from(*part).unwrap_or(u64::MAX)));
        let window_bytes = self.match_window_bytes();
        if needed_bytes <= window_bytes {
            return Ok(());
        }
        Err(AdapterError::WindowTooShort { adapter: self, needed_bytes, window_bytes })
    }
}

impl core::fmt::Display for Adapter {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why there is no code length.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdapterError {
    /// The text, with what it is joined to or conditioned on, is longer than the match window.
    #[error(
        "{adapter} sees {window_bytes} bytes back and was given {needed_bytes}; take a shorter baseline, or zstd, which covers more"
    )]
    WindowTooShort {
        /// Which.
        adapter: Adapter,
        /// Bytes of everything together.
        needed_bytes: u64,
        /// [`Adapter::match_window_bytes`].
        window_bytes: u64,
    },
    /// The build has not got it.
    #[error("this build has no {0}; build the engine with the feature of that name")]
    NotBuilt(Adapter),
    /// The codec could not allocate.
    #[error("{0} got no memory; free some or use fewer compressors at a time")]
    Memory(Adapter),
    /// The codec refused, which no input should bring about.
    #[error("{adapter} failed: {reason}; report it with the input")]
    Codec {
        /// Which.
        adapter: Adapter,
        /// What the codec said.
        reason: &'static str,
    },
}

/// Code lengths by one compressor. Deterministic: what was compressed before changes nothing.
pub trait Compressor: Send {
    /// Which strategy this is.
    fn adapter(&self) -> Adapter;

    /// C(x), bits.
    ///
    /// # Errors
    /// [`AdapterError::WindowTooShort`], and what the codec reports.
    fn code_length_bits(&mut self, text: &[u8]) -> Result<u64, AdapterError>;

    /// C(xy), bits: both texts, one after the other.
    ///
    /// # Errors
    /// As [`Self::code_length_bits`].
    fn joint_bits(&mut self, first: &[u8], second: &[u8]) -> Result<u64, AdapterError> {
        self.adapter().fits(&[first.len(), second.len()])?;
        let mut both = Vec::with_capacity(first.len() + second.len());
        both.extend_from_slice(first);
        both.extend_from_slice(second);
        self.code_length_bits(&both)
    }

    /// Prepares C(x|B) for many x.
    ///
    /// # Errors
    /// [`AdapterError::WindowTooShort`] if the baseline alone is too long, and what the codec reports.
    fn given(&mut self, baseline: &[u8]) -> Result<Box<dyn Conditional>, AdapterError>;

    /// C(x|B), bits.
    ///
    /// # Errors
    /// As [`Self::code_length_bits`].
    fn conditional_bits(&mut self, text: &[u8], baseline: &[u8]) -> Result<u64, AdapterError> {
        self.given(baseline)?.code_length_bits(text)
    }
}

/// Code lengths given one baseline.
pub trait Conditional: Send {
    /// C(x|B), bits.
    ///
    /// # Errors
    /// [`AdapterError::WindowTooShort`] if text and baseline together are too long, and what the codec
    /// reports.
    fn code_length_bits(&mut self, text: &[u8]) -> Result<u64, AdapterError>;
}

/// C(x|B) as C(Bx) - C(B), for formats without dictionaries.
///
/// The difference is below zero when the end of B costs less with something after it (lz4 never ends a
/// block in a match); C(x|B) is 0 then, for no description is shorter.
#[cfg(any(feature = "lz4", feature = "openzl"))]
pub(crate) struct Difference<C> {
    compressor: C,
    baseline_bits: u64,
    /// B, then the text at hand.
    both: Vec<u8>,
    baseline_bytes: usize,
}

#[cfg(any(feature = "lz4", feature = "openzl"))]
impl<C: Compressor> Difference<C> {
    pub(crate) fn new(mut compressor: C, baseline: &[u8]) -> Result<Self, AdapterError> {
        let baseline_bits = compressor.code_length_bits(baseline)?;
        Ok(Self { compressor, baseline_bits, both: baseline.to_vec(), baseline_bytes: baseline.len() })
    }
}

#[cfg(any(feature = "lz4", feature = "openzl"))]
impl<C: Compressor> Conditional for Difference<C> {
    fn code_length_bits(&mut self, text: &[u8]) -> Result<u64, AdapterError> {
        self.compressor.adapter().fits(&[self.baseline_bytes, text.len()])?;
        self.both.truncate(self.baseline_bytes);
        self.both.extend_from_slice(text);
        Ok(self.compressor.code_length_bits(&self.both)?.saturating_sub(self.baseline_bits))
    }
}

/// Bytes as bits.
#[cfg(any(feature = "zstd", feature = "lz4", feature = "deflate", feature = "openzl"))]
pub(crate) fn bits(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX).saturating_mul(8)
}
