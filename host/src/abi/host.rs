//! The host's side of one VM: everything that a host call can read or change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use wasmtime::{Memory, StoreLimits, TypedFunc};

use super::callout::Callouts;
use super::clock::{Clock, Generator};
use super::foreign::{ForeignFunction, ForeignFunctions};
use super::headers::HeaderMap;
use super::log::GuestLog;
use super::network::Peer;
use super::options::Limits;
use super::shared::{Enrolment, SharedState};
use super::status::{BufferType, Direction, MapType, Status};
use super::stream::{LocalReply, Stream};
use super::tape::Tape;

/// Largest scratch buffer that is kept between calls.
pub(super) const SCRATCH_MAX_BYTES: usize = 1024 * 1024;
/// Most bytes of one value that the host keeps for a guest (a body it grew, a reply, a call).
pub(super) const COPY_MAX_BYTES: usize = 64 * 1024 * 1024;
/// Most filter state bytes, keys included, that one stream keeps.
pub(super) const FILTER_STATE_MAX_BYTES: usize = 1024 * 1024;

/// What the guest asked for that happens after its callback returns.
pub(super) enum Deferred {
    Continue(u32, Direction),
    /// A connection's client may be read again.
    Resume(u32),
    Reply(u32, LocalReply),
    Close(u32),
}

impl Deferred {
    pub(super) fn stream(&self) -> u32 {
        match self {
            Self::Continue(id, _) | Self::Resume(id) | Self::Reply(id, _) | Self::Close(id) => *id,
        }
    }
}

/// An http call's answer while the guest reads it.
#[derive(Default)]
pub(super) struct CallAnswer {
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
    pub(super) trailers: HeaderMap,
}

/// What came on a gRPC call while the guest reads it.
#[derive(Default)]
pub(super) struct GrpcAnswer {
    pub(super) initial: Option<HeaderMap>,
    pub(super) trailing: Option<HeaderMap>,
    pub(super) message: Vec<u8>,
}

/// The state behind the host calls of one VM.
pub(super) struct Host {
    pub(super) memory: Option<Memory>,
    pub(super) allocate: Option<Arc<TypedFunc<u32, u32>>>,
    pub(super) store_limits: StoreLimits,
    pub(super) limits: Limits,

    pub(super) name: String,
    pub(super) root_id: String,
    pub(super) vm_id: String,
    pub(super) vm_configuration: Vec<u8>,
    pub(super) plugin_configuration: Vec<u8>,
    /// The plugin configuration is readable while the root context is created and configured.
    pub(super) configuring: bool,
    pub(super) environment: Vec<(String, String)>,
    pub(super) properties: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Names of properties declared through the foreign function `declare_property`.
    pub(super) declared: BTreeSet<Vec<u8>>,
    pub(super) foreign: ForeignFunctions,
    pub(super) upstreams: Option<BTreeSet<String>>,

    pub(super) clock: Clock,
    pub(super) started: Instant,
    pub(super) random: Generator,
    pub(super) shared: SharedState,
    pub(super) vm: Enrolment,
    pub(super) log: GuestLog,
    pub(super) tape: Option<Tape>,
    pub(super) scratch: Vec<u8>,

    pub(super) root: u32,
    pub(super) streams: HashMap<u32, Stream>,
    pub(super) current: u32,
    /// 0 when the guest has not chosen another context for its host calls.
    pub(super) effective: u32,
    pub(super) deferred: Vec<Deferred>,
    pub(super) tick_period_ms: Option<u32>,
    pub(super) root_done_pending: bool,
    pub(super) root_done: bool,

    pub(super) callouts: Callouts,
    pub(super) answer: Option<CallAnswer>,
    pub(super) grpc: GrpcAnswer,
    pub(super) call_status: (u32, String),
    /// What `proxy_on_foreign_function` was called with.
    pub(super) call_data: Vec<u8>,
}

impl Host {
    /// The context that a host call is about.
    pub(super) fn context(&self) -> u32 {
        let chosen = self.effective;
        if chosen != 0 && (chosen == self.root || self.streams.contains_key(&chosen)) {
            chosen
        } else {
            self.current
        }
    }

    pub(super) fn stream(&self) -> Option<&Stream> {
        self.streams.get(&self.context())
    }

    pub(super) fn stream_mut(&mut self) -> Option<&mut Stream> {
        let id = self.context();
        self.streams.get_mut(&id)
    }

    /// A map as the guest may read it now.
    pub(super) fn readable_map(&self, kind: MapType) -> Option<&HeaderMap> {
        match kind {
            MapType::HttpCallHeaders => self.answer.as_ref().map(|answer| &answer.headers),
            MapType::HttpCallTrailers => {
                self.answer.as_ref().map(|answer| &answer.trailers).filter(|trailers| !trailers.is_empty())
            }
            MapType::GrpcInitialMetadata => self.grpc.initial.as_ref(),
            MapType::GrpcTrailingMetadata => self.grpc.trailing.as_ref(),
            _ => self.stream()?.readable_map(kind),
        }
    }

    /// A map as the guest may change it now; `BadArgument` once it is closed.
    pub(super) fn writable_map(&mut self, kind: MapType) -> Result<&mut HeaderMap, Status> {
        self.stream_mut().and_then(|stream| stream.writable_map(kind)).ok_or(Status::BadArgument)
    }

    /// A buffer's bytes; `NotFound` when there is no such buffer now.
    pub(super) fn buffer(&self, kind: BufferType) -> Result<&[u8], Status> {
        let body = |direction| {
            let stream = self.stream();
            // A body that is not there now is an empty one.
            stream.and_then(|stream| stream.side(direction).visible_body()).unwrap_or_default()
        };
        match kind {
            BufferType::RequestBody => Ok(body(Direction::Request)),
            BufferType::ResponseBody => Ok(body(Direction::Response)),
            BufferType::HttpCallBody => {
                self.answer.as_ref().map(|answer| answer.body.as_slice()).ok_or(Status::NotFound)
            }
            BufferType::VmConfiguration => Ok(&self.vm_configuration),
            BufferType::PluginConfiguration if self.configuring => Ok(&self.plugin_configuration),
            BufferType::PluginConfiguration => Err(Status::NotFound),
            BufferType::DownstreamData => Ok(self.connection_bytes(Peer::Downstream)),
            BufferType::UpstreamData => Ok(self.connection_bytes(Peer::Upstream)),
            BufferType::GrpcMessage => Ok(&self.grpc.message),
            BufferType::CallData => Ok(&self.call_data),
        }
    }

    fn connection_bytes(&self, peer: Peer) -> &[u8] {
        let connection = self.stream().and_then(|stream| stream.connection.as_ref());
        connection.map_or(&[], |connection| connection.visible(peer))
    }

    /// Notes what is to happen after the callback; what says nothing new is dropped, so that a guest in
    /// a loop cannot make the list grow.
    pub(super) fn defer(&mut self, deferred: Deferred) {
        let id = deferred.stream();
        let known = self.deferred.iter().any(|old| match (old, &deferred) {
            (Deferred::Reply(old, _) | Deferred::Close(old), Deferred::Reply(..) | Deferred::Close(_)) => {
                *old == id
            }
            (Deferred::Continue(old, side), Deferred::Continue(_, new)) => *old == id && side == new,
            (Deferred::Resume(old), Deferred::Resume(_)) => *old == id,
            _ => false,
        });
        if !known {
            self.deferred.push(deferred);
        }
    }

    /// A property by its NUL-separated path.
    pub(super) fn property(&self, path: &[u8]) -> Option<Vec<u8>> {
        // A path may end with its separator.
        let path = path.strip_suffix(b"\0").unwrap_or(path);
        match path {
            b"plugin_name" => return Some(self.name.as_bytes().to_vec()),
            b"plugin_root_id" => return Some(self.root_id.as_bytes().to_vec()),
            b"plugin_vm_id" => return Some(self.vm_id.as_bytes().to_vec()),
            _ => {}
        }
        if let Some(stream) = self.stream() {
            if let Some(value) = stream.properties.get(path) {
                return Some(value.clone());
            }
            // Known once the exchange is over.
            if path == b"request\0duration" && stream.log_phase {
                let lasted = self.clock.realtime_ns().saturating_sub(stream.begun_ns);
                return Some(lasted.to_le_bytes().to_vec());
            }
            if let Some(value) = stream.lookup.as_ref().and_then(|lookup| (lookup.0)(path)) {
                return Some(value.into_bytes());
            }
            if let Some(value) = super::property::derived(stream, path) {
                return Some(value);
            }
        }
        self.properties.get(path).cloned()
    }

    /// Writes filter state `wasm.<path>` of the current stream.
    pub(super) fn set_filter_state(&mut self, path: &[u8], value: &[u8]) -> Result<(), Status> {
        let stream = self.stream_mut().ok_or(Status::NotFound)?;
        let key = format!("wasm.{}", String::from_utf8_lossy(path));
        // An entry takes room beside its bytes.
        let cost = |value: &[u8]| key.len() + value.len() + 64;
        let old = stream.filter_state.get(&key).map_or(0, |old| cost(old));
        let after = stream.filter_state_bytes - old + cost(value);
        if after > FILTER_STATE_MAX_BYTES {
            return Err(Status::InternalFailure);
        }
        stream.filter_state_bytes = after;
        stream.filter_state.insert(key, value.to_vec());
        Ok(())
    }

    pub(super) fn log(&mut self, level: super::LogLevel, message: &[u8]) {
        let context = self.context();
        self.log.write(level, context, message);
    }

    /// Looks up a function that the embedder registered.
    pub(super) fn foreign_function(&self, name: &[u8]) -> Option<ForeignFunction> {
        self.foreign.find(name)
    }
}
