//! The guest's callbacks, and the one way into the guest.
//!
//! Every entry sets the deadline (and the fuel, where metered), so that no callback runs for ever, and
//! any failure inside loses the VM: its memory may be half-written. A missing export counts as
//! Continue, or as true. Cost of an entry: well under a microsecond.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use wasmtime::{AsContextMut as _, Instance, Store, Trap, TypedFunc, WasmParams, WasmResults};

use super::error::{AbiError, LastWords};
use super::host::Host;
use super::module::EPOCH_TICK;
use super::status::Direction;

/// A function that the guest may export.
pub(super) struct Callback<P, R> {
    pub(super) name: &'static str,
    function: Option<TypedFunc<P, R>>,
}

impl<P: WasmParams, R: WasmResults> Callback<P, R> {
    /// Looks the export up.
    pub(super) fn find(
        store: &mut Store<Host>,
        instance: &Instance,
        name: &'static str,
    ) -> Result<Self, AbiError> {
        let Some(function) = instance.get_func(store.as_context_mut(), name) else {
            return Ok(Self { name, function: None });
        };
        let function = function.typed(store).map_err(|error| AbiError::WrongType {
            name: format!("the module's export {name}"),
            message: format!("{error:#}"),
        })?;
        Ok(Self { name, function: Some(function) })
    }

    pub(super) fn is_there(&self) -> bool {
        self.function.is_some()
    }
}

/// Context and one number more.
type Two = (u32, u32);
/// Context, a size, end_of_stream.
type Three = (u32, u32, u32);
/// Root context, call id, number of headers, body bytes, number of trailers.
type CallCounts = (u32, u32, u32, u32, u32);

pub(super) struct Exports {
    pub(super) context_create: Callback<Two, ()>,
    pub(super) vm_start: Callback<Two, u32>,
    pub(super) configure: Callback<Two, u32>,
    pub(super) tick: Callback<u32, ()>,
    pub(super) queue_ready: Callback<Two, ()>,
    pub(super) http_call_response: Callback<CallCounts, ()>,
    pub(super) grpc_initial_metadata: Callback<Three, ()>,
    pub(super) grpc_receive: Callback<Three, ()>,
    pub(super) grpc_trailing_metadata: Callback<Three, ()>,
    pub(super) grpc_close: Callback<Three, ()>,
    pub(super) foreign_function: Callback<Three, ()>,
    pub(super) new_connection: Callback<u32, u32>,
    pub(super) downstream_data: Callback<Three, u32>,
    pub(super) upstream_data: Callback<Three, u32>,
    pub(super) downstream_connection_close: Callback<Two, ()>,
    pub(super) upstream_connection_close: Callback<Two, ()>,
    request: SideExports,
    response: SideExports,
    pub(super) done: Callback<u32, u32>,
    pub(super) log: Callback<u32, ()>,
    pub(super) delete: Callback<u32, ()>,
}

pub(super) struct SideExports {
    pub(super) headers: Callback<Three, u32>,
    pub(super) body: Callback<Three, u32>,
    pub(super) trailers: Callback<Two, u32>,
}

impl Exports {
    /// Finds every callback, and tells the host where the memory and the allocator are.
    pub(super) fn find(store: &mut Store<Host>, instance: &Instance) -> Result<Self, AbiError> {
        let memory = instance.get_memory(store.as_context_mut(), "memory");
        let mut allocate: Callback<u32, u32> = Callback::find(store, instance, "proxy_on_memory_allocate")?;
        if !allocate.is_there() {
            allocate = Callback::find(store, instance, "malloc")?;
        }
        let host = store.data_mut();
        host.memory = memory;
        host.allocate = allocate.function.map(Arc::new);
        macro_rules! find {
            ($name:literal) => {
                Callback::find(store, instance, $name)?
            };
        }
        Ok(Self {
            context_create: find!("proxy_on_context_create"),
            vm_start: find!("proxy_on_vm_start"),
            configure: find!("proxy_on_configure"),
            tick: find!("proxy_on_tick"),
            queue_ready: find!("proxy_on_queue_ready"),
            http_call_response: find!("proxy_on_http_call_response"),
            grpc_initial_metadata: find!("proxy_on_grpc_receive_initial_metadata"),
            grpc_receive: find!("proxy_on_grpc_receive"),
            grpc_trailing_metadata: find!("proxy_on_grpc_receive_trailing_metadata"),
            grpc_close: find!("proxy_on_grpc_close"),
            foreign_function: find!("proxy_on_foreign_function"),
            new_connection: find!("proxy_on_new_connection"),
            downstream_data: find!("proxy_on_downstream_data"),
            upstream_data: find!("proxy_on_upstream_data"),
            downstream_connection_close: find!("proxy_on_downstream_connection_close"),
            upstream_connection_close: find!("proxy_on_upstream_connection_close"),
            request: SideExports {
                headers: find!("proxy_on_request_headers"),
                body: find!("proxy_on_request_body"),
                trailers: find!("proxy_on_request_trailers"),
            },
            response: SideExports {
                headers: find!("proxy_on_response_headers"),
                body: find!("proxy_on_response_body"),
                trailers: find!("proxy_on_response_trailers"),
            },
            done: find!("proxy_on_done"),
            log: find!("proxy_on_log"),
            delete: find!("proxy_on_delete"),
        })
    }

    pub(super) fn side(&self, direction: Direction) -> &SideExports {
        match direction {
            Direction::Request => &self.request,
            Direction::Response => &self.response,
        }
    }
}

/// A store, and whether it may still be entered. Apart from the exports, so that one of them can be
/// borrowed while it is called.
pub(super) struct Vm {
    pub(super) store: Store<Host>,
    poisoned: Option<String>,
}

impl Vm {
    pub(super) fn new(store: Store<Host>) -> Self {
        Self { store, poisoned: None }
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.is_some()
    }

    pub(super) fn check(&self) -> Result<(), AbiError> {
        match &self.poisoned {
            None => Ok(()),
            Some(reason) => Err(AbiError::Poisoned { reason: reason.clone() }),
        }
    }

    /// Calls into the guest on behalf of `context`; `None` when it has no such export. Any failure
    /// loses the VM.
    pub(super) fn call<P, R>(
        &mut self,
        callback: &Callback<P, R>,
        context: u32,
        params: P,
    ) -> Result<Option<R>, AbiError>
    where
        P: WasmParams + Debug,
        R: WasmResults + Debug,
    {
        self.check()?;
        let Some(function) = &callback.function else { return Ok(None) };
        let host = self.store.data_mut();
        host.current = context;
        host.effective = 0;
        let deadline =
            if host.configuring { host.limits.start_deadline } else { host.limits.callback_deadline };
        let fuel = host.limits.callback_fuel;
        if let Some(tape) = &host.tape {
            tape.enter(callback.name, &params);
        }
        self.store.set_epoch_deadline(ticks(deadline));
        if let Some(fuel) = fuel {
            // Cannot fail: a start without metering is refused.
            let _ = self.store.set_fuel(fuel);
        }
        let result = function.call(&mut self.store, params);
        if let Some(tape) = &self.store.data().tape {
            tape.leave(callback.name, &result);
        }
        match result {
            Ok(result) => Ok(Some(result)),
            Err(error) => Err(self.lose(&error, callback.name, deadline)),
        }
    }

    fn lose(&mut self, error: &wasmtime::Error, callback: &'static str, deadline: Duration) -> AbiError {
        let host = self.store.data_mut();
        let log = host.log.take_last_words();
        let fuel = host.limits.callback_fuel.unwrap_or(u64::MAX);
        host.deferred.clear();
        let error = match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => AbiError::Deadline {
                callback,
                limit_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
                log,
            },
            Some(Trap::OutOfFuel) => AbiError::OutOfFuel { callback, fuel, log },
            _ => AbiError::Trap { callback, message: format!("{error:#}"), log },
        };
        self.poisoned = Some(error.to_string());
        error
    }

    /// What the guest said last, for an error that is no trap.
    pub(super) fn last_words(&mut self) -> LastWords {
        self.store.data_mut().log.take_last_words()
    }
}

/// A deadline in epochs; one more, since the present one is partly over.
pub(super) fn ticks(deadline: Duration) -> u64 {
    let ticks = deadline.as_nanos() / EPOCH_TICK.as_nanos();
    u64::try_from(ticks).unwrap_or(u64::MAX / 2).saturating_add(1)
}
