//! The module's exports: proxy-wasm ABI 0.2.1, as far as the filter uses it.
//!
//! Why not an SDK: the published one panics on a context or a call that it does not know and on statuses that it
//! does not expect, and a panic ends the VM with all its streams. Here what is not known is passed on, and a host
//! finds only the callbacks that do something; that is also 36 KiB less. Cost: one look-up a callback.
//!
//! Left out on purpose: TCP streams, queues, gRPC and foreign functions. A host takes an export that is not there
//! for one that does nothing.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use driftlock_inspect::host::Direction;
use driftlock_inspect::session::Step;

use crate::{Root, Stream, hostcall};

#[derive(Default)]
struct Contexts {
    roots: BTreeMap<u32, Rc<RefCell<Root>>>,
    streams: BTreeMap<u32, Rc<Stream>>,
}

thread_local! {
    static CONTEXTS: RefCell<Contexts> = RefCell::default();
}

/// Runs `work` with what is known. The contexts are lent out as `Rc`s, so that nothing stays borrowed while a
/// callback runs.
fn known<T>(work: impl FnOnce(&mut Contexts) -> Option<T>) -> Option<T> {
    CONTEXTS.with(|contexts| work(&mut *contexts.try_borrow_mut().ok()?))
}

fn root<T>(context_id: u32, work: impl FnOnce(&mut Root) -> T) -> Option<T> {
    let root = known(|contexts| contexts.roots.get(&context_id).cloned())?;
    let mut root = root.try_borrow_mut().ok()?;
    Some(work(&mut root))
}

fn stream(context_id: u32) -> Option<Rc<Stream>> {
    known(|contexts| contexts.streams.get(&context_id).cloned())
}

/// `proxy_action_t`. What no stream is known of goes on.
fn action(step: Option<Step>) -> u32 {
    match step {
        None | Some(Step::Forward) => 0,
        Some(Step::Hold | Step::Answered) => 1,
    }
}

/// Names the version.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_abi_version_0_2_1() {}

/// Runs once, before everything else.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn _initialize() {
    const CRITICAL: u32 = 5;
    std::panic::set_hook(Box::new(|panic| hostcall::log(CRITICAL, &format!("driftlock: {panic}"))));
}

/// Memory for what a host call returns; `hostcall::owned` takes it over.
#[unsafe(export_name = "malloc")]
pub(crate) extern "C" fn proxy_on_memory_allocate(size: usize) -> *mut u8 {
    Box::into_raw(Box::<[u8]>::new_uninit_slice(size)).cast()
}

/// Nothing is done before the plugin is configured.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_vm_start(_context_id: u32, _configuration_size: usize) -> u32 {
    1
}

/// `root_context_id` 0: of the plugin; else of a stream.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_context_create(context_id: u32, root_context_id: u32) {
    if root_context_id == 0 {
        known(|contexts| {
            contexts.roots.entry(context_id).or_insert_with(|| Rc::new(RefCell::new(Root::new(context_id))));
            Some(())
        });
    } else if let Some(stream) = root(root_context_id, |root| root.stream(context_id)) {
        known(|contexts| contexts.streams.insert(context_id, Rc::new(stream)));
    }
}

/// False: the configuration is refused.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_configure(context_id: u32, size: usize) -> u32 {
    u32::from(root(context_id, |root| root.configure(size)).unwrap_or(false))
}

/// Time passes.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_tick(context_id: u32) {
    root(context_id, Root::tick);
}

/// The answer to a call of the plugin's; no headers: there is none.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_http_call_response(
    context_id: u32,
    token: u32,
    _headers: u32,
    body_size: usize,
    _trailers: u32,
) {
    root(context_id, |root| root.answered(token, body_size));
}

/// Headers of the request.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_request_headers(context_id: u32, _headers: u32, end_of_stream: u32) -> u32 {
    action(stream(context_id).map(|stream| {
        stream.headers(Direction::Request, |exchange, plugin, host| {
            exchange.request_headers(plugin, host, end_of_stream != 0)
        })
    }))
}

/// A piece of the request's body.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_request_body(context_id: u32, size: usize, end_of_stream: u32) -> u32 {
    action(stream(context_id).map(|stream| stream.body(Direction::Request, size, end_of_stream != 0)))
}

/// Trailers of the request.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_request_trailers(context_id: u32, _trailers: u32) -> u32 {
    action(
        stream(context_id)
            .map(|stream| stream.with(|exchange, plugin, host| exchange.request_trailers(plugin, host))),
    )
}

/// Headers of the response.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_response_headers(
    context_id: u32,
    _headers: u32,
    end_of_stream: u32,
) -> u32 {
    action(stream(context_id).map(|stream| {
        stream.headers(Direction::Response, |exchange, plugin, host| {
            exchange.response_headers(plugin, host, end_of_stream != 0)
        })
    }))
}

/// A piece of the response's body.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_response_body(context_id: u32, size: usize, end_of_stream: u32) -> u32 {
    action(stream(context_id).map(|stream| stream.body(Direction::Response, size, end_of_stream != 0)))
}

/// Trailers of the response.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_response_trailers(context_id: u32, _trailers: u32) -> u32 {
    action(
        stream(context_id)
            .map(|stream| stream.with(|exchange, plugin, host| exchange.response_trailers(plugin, host))),
    )
}

/// The exchange is about to be logged.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_log(context_id: u32) {
    if let Some(stream) = stream(context_id) {
        stream.done();
    }
}

/// The exchange is over. Envoy has called `proxy_on_log` before; another host may not.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_done(context_id: u32) -> u32 {
    proxy_on_log(context_id);
    1
}

/// Nothing more will be heard of this context.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn proxy_on_delete(context_id: u32) {
    // Dropped only when the contexts are no longer borrowed.
    let gone =
        known(|contexts| Some((contexts.streams.remove(&context_id), contexts.roots.remove(&context_id))));
    drop(gone);
}
