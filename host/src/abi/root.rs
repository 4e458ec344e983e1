//! The callbacks of the root context: ticks, queues, the answers of call-outs, the end.

use std::time::Duration;

use super::callout::{Callout, CalloutKind, GrpcEvent, HttpCallResponse, Transport};
use super::error::AbiError;
use super::host::CallAnswer;
use super::plugin::{Plugin, StreamId};
use super::status::Status;

/// Most queue notifications that one call delivers.
const QUEUE_BATCH: usize = 1024;

impl Plugin {
    /// How often the guest wants [`Plugin::tick`], if it does.
    #[must_use]
    pub fn tick_period(&self) -> Option<Duration> {
        let period = self.vm.store.data().tick_period_ms?;
        Some(Duration::from_millis(period.into()))
    }

    /// Runs `proxy_on_tick`.
    ///
    /// # Errors
    /// The VM is lost.
    pub fn tick(&mut self) -> Result<(), AbiError> {
        let root = self.root()?;
        self.vm.call(&self.exports.tick, root, root)?;
        self.drain();
        Ok(())
    }

    /// Has `wake` called, from whichever thread, when another VM (or this one) puts an item into a
    /// queue of this one: then [`Plugin::deliver_queues`] is due. `wake` must not call into a plugin.
    pub fn on_queue_items(&mut self, wake: impl Fn() + Send + Sync + 'static) {
        let host = self.vm.store.data();
        host.vm.wake_with(std::sync::Arc::new(wake));
    }

    /// Tells the guest about new items in shared queues that it registered last, once per item, as
    /// Envoy does; returns how many there were. At most a thousand a call: ask again until it is 0.
    ///
    /// # Errors
    /// The VM is lost.
    pub fn deliver_queues(&mut self) -> Result<usize, AbiError> {
        let root = self.root()?;
        let ready = self.vm.store.data().vm.take_ready(QUEUE_BATCH);
        let count = ready.len();
        for queue in ready {
            self.vm.call(&self.exports.queue_ready, root, (root, queue))?;
        }
        self.drain();
        Ok(count)
    }

    /// Hands over the http and gRPC calls that the guest asked for since the last time. To be done
    /// after every call that may run guest code.
    pub fn send_callouts(&mut self, transport: &mut (impl Transport + ?Sized)) {
        for callout in self.vm.store.data_mut().callouts.take() {
            match callout {
                Callout::Http(call) => transport.http_call(call),
                Callout::Grpc(call) => transport.grpc_call(call),
                Callout::Open(stream) => transport.grpc_stream(stream),
                Callout::Send(id, message, end) => transport.grpc_send(id, message, end),
                Callout::Close(id) => transport.grpc_close(id),
                Callout::Cancel(id) => transport.grpc_cancel(id),
            }
        }
    }

    /// Answers an http call; `None` when it failed, which the guest sees as an answer without
    /// headers.
    ///
    /// # Errors
    /// The VM is lost, or the call is not outstanding.
    pub fn http_call_response(
        &mut self,
        call_id: u32,
        response: Option<HttpCallResponse>,
    ) -> Result<(), AbiError> {
        let root = self.root()?;
        let host = self.vm.store.data_mut();
        let is_call = CalloutKind::of(call_id) == Some(CalloutKind::HttpCall);
        if !is_call || host.callouts.outstanding.remove(&call_id).is_none() {
            return Err(AbiError::UnknownCall { id: call_id });
        }
        let mut counts = (0, 0, 0);
        match response {
            Some(response) => {
                counts = (
                    count(response.headers.len()),
                    count(response.body.len()),
                    count(response.trailers.len()),
                );
                host.answer = Some(CallAnswer {
                    headers: response.headers,
                    body: response.body,
                    trailers: response.trailers,
                });
            }
            None => host.call_status = (Status::BrokenConnection as u32, "reset".to_owned()),
        }
        let params = (root, call_id, counts.0, counts.1, counts.2);
        self.vm.call(&self.exports.http_call_response, root, params)?;
        let host = self.vm.store.data_mut();
        host.answer = None;
        host.call_status.1.clear();
        self.drain();
        Ok(())
    }

    /// Reports what happened on a gRPC call or stream. A call is over with its message or with
    /// [`GrpcEvent::Closed`]; a stream stays known until both ends are closed.
    ///
    /// # Errors
    /// The VM is lost, or there is no such call or stream (the guest may have cancelled it).
    pub fn grpc_event(&mut self, id: u32, event: GrpcEvent) -> Result<(), AbiError> {
        let root = self.root()?;
        let host = self.vm.store.data_mut();
        let unknown = AbiError::UnknownCall { id };
        let is_call = match CalloutKind::of(id) {
            Some(CalloutKind::GrpcCall) => true,
            Some(CalloutKind::GrpcStream) => false,
            _ => return Err(unknown),
        };
        if host.callouts.outstanding.get(&id).is_none_or(|ends| ends.remote) {
            return Err(unknown);
        }
        let (callback, number) = match event {
            GrpcEvent::InitialMetadata(metadata) => {
                let number = count(metadata.len());
                host.grpc.initial = Some(metadata);
                (&self.exports.grpc_initial_metadata, number)
            }
            GrpcEvent::Message(message) => {
                let size = count(message.len());
                host.grpc.message = message;
                (&self.exports.grpc_receive, size)
            }
            GrpcEvent::TrailingMetadata(metadata) => {
                let number = count(metadata.len());
                host.grpc.trailing = Some(metadata);
                (&self.exports.grpc_trailing_metadata, number)
            }
            GrpcEvent::Closed { status, message } => {
                host.call_status = (status, message);
                if let Some(ends) = host.callouts.outstanding.get_mut(&id) {
                    ends.remote = true;
                }
                (&self.exports.grpc_close, status)
            }
        };
        let message = std::ptr::eq(callback, &self.exports.grpc_receive);
        self.vm.call(callback, root, (root, id, number))?;
        let host = self.vm.store.data_mut();
        host.grpc = super::host::GrpcAnswer::default();
        host.call_status.1.clear();
        let ends = host.callouts.outstanding.get(&id).copied().unwrap_or_default();
        if (is_call && (message || ends.remote)) || (ends.local && ends.remote) {
            host.callouts.outstanding.remove(&id);
        }
        self.drain();
        Ok(())
    }

    /// Runs `proxy_on_foreign_function`: the caller's side of foreign functions. `data` is what the
    /// guest reads as buffer `CallData` meanwhile. `stream`: `None` for the root context.
    ///
    /// # Errors
    /// The VM is lost, or the stream is unknown.
    pub fn foreign_function(
        &mut self,
        stream: Option<StreamId>,
        function_id: u32,
        data: &[u8],
    ) -> Result<(), AbiError> {
        let root = self.root()?;
        let context = match stream {
            Some(id) => {
                self.stream_mut(id)?;
                id.0
            }
            None => root,
        };
        self.vm.store.data_mut().call_data = data.to_vec();
        self.vm.call(&self.exports.foreign_function, context, (context, function_id, count(data.len())))?;
        self.vm.store.data_mut().call_data = Vec::new();
        self.drain();
        Ok(())
    }

    /// Ends the plugin: `proxy_on_done` on the root context. True when the guest is finished and was
    /// deleted; false when it wants more time and will call `proxy_done` (tick it, then ask again).
    ///
    /// # Errors
    /// The VM is lost.
    pub fn shut_down(&mut self) -> Result<bool, AbiError> {
        let root = self.root()?;
        if self.vm.store.data().root_done_pending {
            return Ok(false);
        }
        if !self.vm.store.data().root_done {
            // Before the call: a guest may say that it is done from inside it.
            self.vm.store.data_mut().root_done_pending = true;
            let finished = self.vm.call(&self.exports.done, root, root)?.unwrap_or(1) != 0;
            let host = self.vm.store.data_mut();
            if !finished && !host.root_done {
                return Ok(false);
            }
            host.root_done_pending = false;
            host.root_done = true;
        }
        self.vm.call(&self.exports.delete, root, root)?;
        self.drain();
        Ok(true)
    }

    fn root(&self) -> Result<u32, AbiError> {
        self.vm.check()?;
        Ok(self.vm.store.data().root)
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
