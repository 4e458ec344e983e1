//! The numbers of the ABI: result statuses, map, buffer, stream and metric kinds.
//!
//! Source: proxy-wasm ABI 0.2.1 (proxy-wasm/spec) and the `WasmResult` of the C++ host that Envoy
//! embeds. Only conversions live here; what a number does is decided where it is used.

/// What a host call returns to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// No such key, map entry, queue, metric or function.
    NotFound = 1,
    /// An argument is outside what the call accepts, or the map is closed.
    BadArgument = 2,
    /// A value has no byte form.
    SerializationFailure = 3,
    /// Bytes from the guest do not parse.
    ParseFailure = 4,
    /// An expression does not parse.
    BadExpression = 5,
    /// A pointer or length lies outside the guest's memory.
    InvalidMemoryAccess = 6,
    /// The queue holds nothing.
    Empty = 7,
    /// Someone else wrote the key since it was read.
    CasMismatch = 8,
    /// A result is not what was expected.
    ResultMismatch = 9,
    /// The host cannot do it now.
    InternalFailure = 10,
    /// The peer went away (also the code of a failed http call).
    BrokenConnection = 11,
    /// This host does not do it at all.
    Unimplemented = 12,
}

impl Status {
    /// The status of this number.
    #[must_use]
    pub fn from_abi(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::Ok,
            1 => Self::NotFound,
            2 => Self::BadArgument,
            3 => Self::SerializationFailure,
            4 => Self::ParseFailure,
            5 => Self::BadExpression,
            6 => Self::InvalidMemoryAccess,
            7 => Self::Empty,
            8 => Self::CasMismatch,
            9 => Self::ResultMismatch,
            10 => Self::InternalFailure,
            11 => Self::BrokenConnection,
            12 => Self::Unimplemented,
            _ => return None,
        })
    }
}

/// A header map that the guest can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MapType {
    /// Request headers, pseudo-headers included.
    RequestHeaders,
    /// Request trailers.
    RequestTrailers,
    /// Response headers, `:status` included.
    ResponseHeaders,
    /// Response trailers.
    ResponseTrailers,
    /// Initial metadata of the gRPC stream that is being reported on.
    GrpcInitialMetadata,
    /// Its trailing metadata.
    GrpcTrailingMetadata,
    /// Headers of the http call response being delivered.
    HttpCallHeaders,
    /// Its trailers.
    HttpCallTrailers,
}

impl MapType {
    /// The map of this number.
    ///
    /// # Errors
    /// [`Status::BadArgument`] when there is none.
    pub fn from_abi(value: u32) -> Result<Self, Status> {
        Ok(match value {
            0 => Self::RequestHeaders,
            1 => Self::RequestTrailers,
            2 => Self::ResponseHeaders,
            3 => Self::ResponseTrailers,
            4 => Self::GrpcInitialMetadata,
            5 => Self::GrpcTrailingMetadata,
            6 => Self::HttpCallHeaders,
            7 => Self::HttpCallTrailers,
            _ => return Err(Status::BadArgument),
        })
    }
}

/// A buffer that the guest can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BufferType {
    RequestBody,
    ResponseBody,
    DownstreamData,
    UpstreamData,
    HttpCallBody,
    GrpcMessage,
    VmConfiguration,
    PluginConfiguration,
    /// What `proxy_on_foreign_function` was called with.
    CallData,
}

impl BufferType {
    pub(super) fn from_abi(value: u32) -> Result<Self, Status> {
        Ok(match value {
            0 => Self::RequestBody,
            1 => Self::ResponseBody,
            2 => Self::DownstreamData,
            3 => Self::UpstreamData,
            4 => Self::HttpCallBody,
            5 => Self::GrpcMessage,
            6 => Self::VmConfiguration,
            7 => Self::PluginConfiguration,
            8 => Self::CallData,
            _ => return Err(Status::BadArgument),
        })
    }
}

/// One side of an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// From the client to the upstream.
    Request,
    /// From the upstream to the client.
    Response,
}
