//! The host's side of one VM: everything that a host call can read or change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use wasmtime::{Memory, StoreLimits, TypedFunc};

use super::clock::{Clock, Generator};
use super::headers::HeaderMap;
use super::log::GuestLog;
use super::plugin::{ForeignFunctions, HttpCall, Limits};
use super::shared::SharedState;
use super::status::{BufferType, Direction, MapType, Status};
use super::stream::{LocalReply, Stream};

/// Largest scratch buffer that is kept between calls.
pub(super) const SCRATCH_MAX_BYTES: usize = 1024 * 1024;
/// Most bytes of one value that the host keeps for a guest (a body it grew, a reply, a call).
pub(super) const COPY_MAX_BYTES: usize = 64 * 1024 * 1024;
/// Most filter state bytes, keys included, that one stream keeps.
pub(super) const FILTER_STATE_MAX_BYTES: usize = 1024 * 1024;

/// What the guest asked for that happens after its callback returns.
pub(super) enum Deferred {
    Continue(u32, Direction),
    Reply(u32, LocalReply),
    Close(u32),
}

impl Deferred {
    pub(super) fn stream(&self) -> u32 {
        match self {
            Self::Continue(id, _) | Self::Reply(id, _) | Self::Close(id) => *id,
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
    pub(super) foreign: ForeignFunctions,
    pub(super) upstreams: Option<BTreeSet<String>>,

    pub(super) clock: Clock,
    pub(super) started: Instant,
    pub(super) random: Generator,
    pub(super) shared: SharedState,
    pub(super) vm: u64,
    pub(super) log: GuestLog,
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

    pub(super) last_call: u32,
    pub(super) outstanding: BTreeSet<u32>,
    pub(super) calls: Vec<HttpCall>,
    pub(super) answer: Option<CallAnswer>,
    pub(super) call_status: (u32, &'static str),
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
            BufferType::CallData | BufferType::Absent => Ok(&[]),
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
        let old = stream.filter_state.get(&key).map_or(0, |old| key.len() + old.len());
        let after = stream.filter_state_bytes - old + key.len() + value.len();
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
    pub(super) fn foreign_function(&self, name: &[u8]) -> Option<super::plugin::ForeignFunction> {
        let name = std::str::from_utf8(name).ok()?;
        self.foreign.get(name).map(Arc::clone)
    }
}
