//! Lets requests pass whose `x-api-key` an authority knows, and counts the others.
//!
//! The plugin configuration names the authority's cluster. Keys that were accepted are remembered in
//! shared data, so that workers ask once for each.

#![cfg(target_arch = "wasm32")]

use std::time::Duration;

use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel, MetricType};

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root { authority: String::new(), refused: 0 }));
}}

struct Root {
    authority: String,
    refused: u32,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        let configuration = self.get_plugin_configuration().unwrap_or_default();
        self.authority = String::from_utf8(configuration).unwrap_or_default();
        let defined = hostcalls::define_metric(MetricType::Counter, "guard_refused");
        self.refused = defined.unwrap_or_default();
        !self.authority.is_empty() && defined.is_ok()
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        let (authority, refused) = (self.authority.clone(), self.refused);
        Some(Box::new(Guard { authority, refused, key: String::new() }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Guard {
    authority: String,
    refused: u32,
    key: String,
}

impl Guard {
    fn refuse(&self, status: u32) -> Action {
        let _ = hostcalls::increment_metric(self.refused, 1);
        self.send_http_response(status, vec![], Some(b"no entry\n"));
        Action::Pause
    }
}

impl Context for Guard {
    fn on_http_call_response(&mut self, _: u32, headers: usize, _: usize, _: usize) {
        // A failed call has no headers to read; the SDK would panic.
        let status = (headers > 0).then(|| self.get_http_call_response_header(":status")).flatten();
        match status.as_deref() {
            Some("200") => {
                let _ = self.set_shared_data(&self.key, Some(b"known"), None);
                self.resume_http_request();
            }
            Some(_) => {
                self.refuse(403);
            }
            None => {
                self.refuse(503);
            }
        }
    }
}

impl HttpContext for Guard {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let Some(key) = self.get_http_request_header("x-api-key") else {
            return self.refuse(401);
        };
        self.set_http_request_header("x-api-key", None);
        self.key = key;
        if self.get_shared_data(&self.key).0.is_some() {
            return Action::Continue;
        }
        let headers = vec![
            (":method", "GET"),
            (":path", "/check"),
            (":authority", self.authority.as_str()),
            ("x-api-key", self.key.as_str()),
        ];
        match self.dispatch_http_call(&self.authority, headers, None, vec![], Duration::from_secs(2)) {
            Ok(_) => Action::Pause,
            Err(_) => self.refuse(503),
        }
    }
}
