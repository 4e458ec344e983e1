//! Which adapter compresses what: a table of content kind and size.
//!
//! What: a [`Router`] goes through its routes in order and takes the first of the content's kind whose
//! size limit is not below the content's size. Routes given to [`Router::with`] stand before those of
//! [`DEFAULT_ROUTES`], so any of them can be overridden, for all sizes or for some.
//!
//! The choice is a pure function of kind, size and table. It does not depend on which adapters a build
//! has: distances by different compressors are not comparable, so one that is missing must be an error
//! ([`super::AdapterError::NotBuilt`]) and not a quiet second choice.
//!
//! Size is that of everything in the match window together: the text for C(x), both for C(xy), text and
//! baseline for C(x|B). A route may not promise more than its adapter's window.
//!
//! Cost: a walk over some twenty entries. Left out on purpose: looking at the bytes; whoever parsed the
//! message knows what it is.

use alloc::vec::Vec;

use super::Adapter;

/// What a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ContentKind {
    /// Natural language: prompts, completions.
    Text,
    /// JSON, whole or as server-sent events.
    Json,
    /// Paths, queries and forms: short keys and values.
    Form,
    /// Header fields, or whole HTTP messages.
    Http,
    /// Log lines.
    Log,
    /// Anything else.
    Binary,
}

impl ContentKind {
    /// Every kind, in a fixed order.
    pub const ALL: [Self; 6] = [Self::Text, Self::Json, Self::Form, Self::Http, Self::Log, Self::Binary];

    /// The name in configuration and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
            Self::Form => "form",
            Self::Http => "http",
            Self::Log => "log",
            Self::Binary => "binary",
        }
    }

    /// The kind with that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// One line of the table: content of this kind, up to this size, goes to this adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Of content of this kind,
    pub kind: ContentKind,
    /// up to this many bytes,
    pub max_bytes: u64,
    /// the lengths are by this adapter.
    pub adapter: Adapter,
}

/// The table. Measured as the AUROC of `driftlock eval --detector ncd` with each adapter for everything
/// (figures and command in DECISIONS.md):
/// - Up to 256 bytes lz4: Huffman tables and block headers are noise as large as such texts.
/// - Up to 1 KiB deflate: its Huffman codes pay off before zstd's tables do.
/// - Beyond, zstd.
/// - Natural language: all four are equally good, so lz4, the fastest, as far as it sees.
/// - Binary: zstd, whose entropy coding is the best of the four.
pub const DEFAULT_ROUTES: &[Route] = &[
    Route { kind: ContentKind::Text, max_bytes: LZ4, adapter: Adapter::Lz4 },
    Route { kind: ContentKind::Text, max_bytes: ZSTD, adapter: Adapter::Zstd },
    Route { kind: ContentKind::Json, max_bytes: TINY, adapter: Adapter::Lz4 },
    Route { kind: ContentKind::Json, max_bytes: SHORT, adapter: Adapter::Deflate },
    Route { kind: ContentKind::Json, max_bytes: ZSTD, adapter: Adapter::Zstd },
    Route { kind: ContentKind::Form, max_bytes: TINY, adapter: Adapter::Lz4 },
    Route { kind: ContentKind::Form, max_bytes: SHORT, adapter: Adapter::Deflate },
    Route { kind: ContentKind::Form, max_bytes: ZSTD, adapter: Adapter::Zstd },
    Route { kind: ContentKind::Http, max_bytes: TINY, adapter: Adapter::Lz4 },
    Route { kind: ContentKind::Http, max_bytes: SHORT, adapter: Adapter::Deflate },
    Route { kind: ContentKind::Http, max_bytes: ZSTD, adapter: Adapter::Zstd },
    Route { kind: ContentKind::Log, max_bytes: TINY, adapter: Adapter::Lz4 },
    Route { kind: ContentKind::Log, max_bytes: SHORT, adapter: Adapter::Deflate },
    Route { kind: ContentKind::Log, max_bytes: ZSTD, adapter: Adapter::Zstd },
    Route { kind: ContentKind::Binary, max_bytes: ZSTD, adapter: Adapter::Zstd },
];

const TINY: u64 = 256;
const SHORT: u64 = 1024;
const LZ4: u64 = Adapter::Lz4.match_window_bytes();
const ZSTD: u64 = Adapter::Zstd.match_window_bytes();

/// Why a table or a choice was refused.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// A route promises more than its adapter can see.
    #[error(
        "the route for {kind} up to {max_bytes} bytes names {adapter}, which sees {window_bytes} bytes back; lower the size or take zstd"
    )]
    BeyondWindow {
        /// [`ContentKind::name`].
        kind: &'static str,
        /// The route's size.
        max_bytes: u64,
        /// The route's adapter.
        adapter: Adapter,
        /// [`Adapter::match_window_bytes`].
        window_bytes: u64,
    },
    /// No route goes so far.
    #[error("no adapter for {kind} of {bytes} bytes; cut it, or compare a shorter baseline")]
    TooLong {
        /// [`ContentKind::name`].
        kind: &'static str,
        /// The content's size.
        bytes: u64,
    },
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Router {
    routes: Vec<Route>,
}

impl Default for Router {
    fn default() -> Self {
        Self { routes: DEFAULT_ROUTES.to_vec() }
    }
}

impl Router {
    /// The default table with `overrides` before it, in their order.
    ///
    /// # Errors
    /// [`RouteError::BeyondWindow`].
    pub fn with(overrides: &[Route]) -> Result<Self, RouteError> {
        for route in overrides {
            let window_bytes = route.adapter.match_window_bytes();
            if route.max_bytes > window_bytes {
                return Err(RouteError::BeyondWindow {
                    kind: route.kind.name(),
                    max_bytes: route.max_bytes,
                    adapter: route.adapter,
                    window_bytes,
                });
            }
        }
        Ok(Self { routes: overrides.iter().chain(DEFAULT_ROUTES).copied().collect() })
    }

    /// The adapter for `bytes` bytes of content of this kind.
    ///
    /// # Errors
    /// [`RouteError::TooLong`].
    pub fn route(&self, kind: ContentKind, bytes: u64) -> Result<Adapter, RouteError> {
        let route = self.routes.iter().find(|route| route.kind == kind && bytes <= route.max_bytes);
        route.map(|route| route.adapter).ok_or(RouteError::TooLong { kind: kind.name(), bytes })
    }
}
