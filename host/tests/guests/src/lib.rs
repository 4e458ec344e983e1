//! One filter with many manners, chosen by the plugin configuration: each uses a part of the Rust SDK the
//! way filters in the field do.

use std::time::{Duration, SystemTime};

use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext, StreamContext};
use proxy_wasm::types::{Action, Bytes, ContextType, GrpcStatusCode, LogLevel, MetricType, PeerType, Status};

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Trace);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

#[derive(Default)]
struct Root {
    manner: String,
    queue: u32,
    ticks: u32,
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, headers: usize, body: usize, trailers: usize) {
        if self.manner == "tell tick" {
            // Kept for a request to fetch.
            let told = answer_in_words(self, headers, body, trailers);
            let _ = self.set_shared_data("told", Some(told.as_bytes()), None);
            return;
        }
        let status = self.get_http_call_response_header(":status");
        log::info!("root call {token}: {headers} {body} {trailers} {status:?}");
    }
}

/// What a guest can see of an http call's answer.
fn answer_in_words(context: &dyn Context, headers: usize, body: usize, trailers: usize) -> String {
    if headers == 0 {
        return format!("failed {body} {trailers}");
    }
    let header = |name| context.get_http_call_response_header(name).unwrap_or_default();
    let body = context.get_http_call_response_body(0, body).unwrap_or_default();
    let trailer = if trailers > 0 { context.get_http_call_response_trailer("t") } else { None };
    format!("{} {} {:?} {trailer:?}", header(":status"), header("x-t"), String::from_utf8_lossy(&body))
}

impl RootContext for Root {
    fn on_vm_start(&mut self, size: usize) -> bool {
        let configuration = self.get_vm_configuration().unwrap_or_default();
        log::info!("vm start {size} {}", String::from_utf8_lossy(&configuration));
        true
    }

    fn on_configure(&mut self, _: usize) -> bool {
        let manner = self.get_plugin_configuration().unwrap_or_default();
        self.manner = String::from_utf8(manner).unwrap_or_default();
        match self.manner.as_str() {
            "refuse" => return false,
            "tick" | "send" | "tell tick" => self.set_tick_period(Duration::from_millis(20)),
            "receive" => self.queue = self.register_shared_queue("inbox"),
            "environment" => {
                log::info!("MODE={:?}", std::env::var("MODE"));
                log::info!("home {:?}", std::fs::read("/etc/hostname").is_err());
                println!("to stdout");
                eprintln!("to stderr");
            }
            _ => {}
        }
        true
    }

    fn on_tick(&mut self) {
        self.ticks += 1;
        match self.manner.as_str() {
            "tick" => {
                log::info!("tick {}", self.ticks);
                if self.ticks == 2 {
                    self.set_tick_period(Duration::ZERO);
                }
                let call = self.dispatch_http_call(
                    "auth",
                    vec![(":method", "GET"), (":path", "/"), (":authority", "auth")],
                    None,
                    vec![],
                    Duration::from_secs(1),
                );
                log::info!("call {:?}", call.is_ok());
            }
            "tell tick" if self.ticks == 1 => {
                let headers = vec![(":method", "PUT"), (":path", "/tick"), (":authority", "auth")];
                let call = self.dispatch_http_call("auth", headers, None, vec![], Duration::from_millis(400));
                assert!(call.is_ok());
            }
            "send" => match self.resolve_shared_queue("receiver", "inbox") {
                Some(queue) => {
                    let item = format!("item {}", self.ticks);
                    log::info!("sent {:?}", self.enqueue_shared_queue(queue, Some(item.as_bytes())));
                }
                None => log::info!("no queue yet"),
            },
            _ => {}
        }
    }

    fn on_queue_ready(&mut self, queue: u32) {
        let item = self.dequeue_shared_queue(queue).unwrap_or_default().unwrap_or_default();
        log::info!("{} got {}", queue == self.queue, String::from_utf8_lossy(&item));
    }

    fn create_http_context(&self, context_id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Http { context_id, manner: self.manner.clone(), stream: 0, told: String::new() }))
    }

    fn create_stream_context(&self, _: u32) -> Option<Box<dyn StreamContext>> {
        Some(Box::new(Tcp))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(if self.manner == "tcp" { ContextType::StreamContext } else { ContextType::HttpContext })
    }
}

/// Names that proxies treat in their own ways when they come twice; none that a proxy keeps to itself.
const TWICE_IN_REQUESTS: [&str; 41] = [
    "accept",
    "accept-encoding",
    "accept-language",
    "access-control-request-headers",
    "access-control-request-method",
    "authorization",
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-type",
    "cookie",
    "forwarded",
    "from",
    "grpc-accept-encoding",
    "grpc-timeout",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "link",
    "origin",
    "pragma",
    "proxy-authorization",
    "range",
    "referer",
    "traceparent",
    "tracestate",
    "user-agent",
    "via",
    "warning",
    "x-b3-traceid",
    "x-client-trace-id",
    "x-custom",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-real-ip",
    "x-request-id",
];
const TWICE_IN_RESPONSES: [&str; 37] = [
    "accept-ranges",
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
    "age",
    "allow",
    "alt-svc",
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-range",
    "content-type",
    "etag",
    "expires",
    "grpc-message",
    "grpc-status",
    "last-modified",
    "link",
    "location",
    "pragma",
    "proxy-status",
    "retry-after",
    "server",
    "set-cookie",
    "strict-transport-security",
    "traceparent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "x-custom",
    "x-forwarded-for",
    "x-request-id",
];

/// Attributes that Envoy's filters read.
const ATTRIBUTES: [&str; 59] = [
    "request.path",
    "request.url_path",
    "request.host",
    "request.scheme",
    "request.method",
    "request.headers",
    "request.headers.x-a",
    "request.headers.missing",
    "request.referer",
    "request.useragent",
    "request.time",
    "request.id",
    "request.protocol",
    "request.query",
    "request.duration",
    "request.size",
    "request.total_size",
    "request",
    "response.code",
    "response.code_details",
    "response.flags",
    "response.grpc_status",
    "response.headers",
    "response.headers.x-u",
    "response.trailers",
    "response.size",
    "response.total_size",
    "response.backend_latency",
    "source.address",
    "source.port",
    "destination.address",
    "destination.port",
    "connection.id",
    "connection.mtls",
    "connection.requested_server_name",
    "connection.tls_version",
    "connection.subject_peer_certificate",
    "connection.termination_details",
    "upstream.address",
    "upstream.port",
    "upstream.local_address",
    "upstream.transport_failure_reason",
    "upstream.request_attempt_count",
    "cluster_name",
    "cluster_metadata",
    "listener_direction",
    "listener_metadata",
    "route_name",
    "route_metadata",
    "upstream_host_metadata",
    "plugin_name",
    "plugin_root_id",
    "plugin_vm_id",
    "xds.cluster_name",
    "xds.route_name",
    "xds.listener_direction",
    "metadata",
    "filter_state",
    "nothing",
];

struct Http {
    context_id: u32,
    manner: String,
    stream: u32,
    /// What came on a gRPC stream so far.
    told: String,
}

impl Http {
    fn reply_from(&self, callback: &str) -> Option<Action> {
        if self.manner.strip_prefix("reply ") != Some(callback) {
            return None;
        }
        self.send_http_response(418, vec![("x-from", callback)], Some(b"tea\n"));
        Some(Action::Pause)
    }

    /// Whom the request wants called.
    fn callee(&self) -> String {
        self.get_http_request_header("x-to").unwrap_or_else(|| "auth".to_owned())
    }

    /// Answers the client with what became of a call.
    fn tell(&self, text: &str) {
        self.send_http_response(200, vec![], Some(text.as_bytes()));
    }

    /// Notes every attribute as it reads now.
    fn note_attributes(&mut self, phase: &str) {
        for name in ATTRIBUTES {
            self.told += &match hostcalls::get_property(name.split('.').collect()) {
                Ok(Some(bytes)) => format!("{phase} {name} {} {}\n", bytes.len(), bytes.escape_ascii()),
                Ok(None) => format!("{phase} {name} -\n"),
                Err(status) => format!("{phase} {name} {status:?}\n"),
            };
        }
    }

    fn replace(&self, size: usize, set: impl Fn(usize, usize, &[u8]), get: impl Fn() -> Option<Bytes>) {
        let form = self.manner.strip_prefix("body ").unwrap_or_default();
        match form {
            "replace" => set(0, size, b"replaced"),
            "prepend" => set(0, 0, b"before "),
            "append" => set(size, 0, b" after"),
            "empty" => set(0, size, b""),
            "grow" => set(0, size, &vec![b'x'; 100_000]),
            "upper" => {
                let body = get().unwrap_or_default();
                set(0, size, body.to_ascii_uppercase().as_slice());
            }
            _ => {}
        }
    }
}

impl Context for Http {
    fn on_http_call_response(&mut self, _: u32, headers: usize, body: usize, trailers: usize) {
        if self.manner == "tell http" {
            return self.tell(&answer_in_words(self, headers, body, trailers));
        }
        let answer = self.get_http_call_response_body(0, body).unwrap_or_default();
        log::info!("answer {headers} {trailers} {}", String::from_utf8_lossy(&answer));
        if headers > 0 && answer == b"yes" {
            self.resume_http_request();
        } else {
            self.send_http_response(403, vec![], Some(b"no\n"));
        }
    }

    fn on_grpc_call_response(&mut self, _: u32, status: u32, size: usize) {
        let answer = self.get_grpc_call_response_body(0, size).unwrap_or_default();
        if self.manner == "tell grpc" {
            let answer = String::from_utf8_lossy(&answer);
            return self.tell(&format!("{status} {answer:?} {:?}", self.get_grpc_status()));
        }
        log::info!("grpc {status} {}", String::from_utf8_lossy(&answer));
        if status == GrpcStatusCode::Ok as u32 {
            self.resume_http_request();
        } else {
            self.send_grpc_response(GrpcStatusCode::PermissionDenied, Some("no"), vec![]);
        }
    }

    fn on_grpc_stream_initial_metadata(&mut self, _: u32, count: u32) {
        self.told += "initial ";
        log::info!("initial {count} {:?}", self.get_grpc_stream_initial_metadata_value("x-s"));
    }

    fn on_grpc_stream_message(&mut self, _: u32, size: usize) {
        let message = self.get_grpc_stream_message(0, size).unwrap_or_default();
        self.told += &format!("{:?} ", String::from_utf8_lossy(&message));
        log::info!("message {}", String::from_utf8_lossy(&message));
    }

    fn on_grpc_stream_trailing_metadata(&mut self, _: u32, count: u32) {
        self.told += "trailing ";
        log::info!("trailing {count} {:?}", self.get_grpc_stream_trailing_metadata_value("x-s"));
    }

    fn on_grpc_stream_close(&mut self, _: u32, status: u32) {
        log::info!("closed {status} {:?}", self.get_grpc_status());
        if self.manner == "tell grpc stream" {
            return self.tell(&format!("{}closed {status} {:?}", self.told, self.get_grpc_status()));
        }
        self.resume_http_request();
    }

    fn on_done(&mut self) -> bool {
        log::info!("done");
        true
    }
}

impl HttpContext for Http {
    fn on_http_request_headers(&mut self, count: usize, end: bool) -> Action {
        if let Some(action) = self.reply_from("request headers") {
            return action;
        }
        match self.manner.as_str() {
            "headers" => {
                log::info!("request headers {count} {end} {:?}", self.get_http_request_headers());
                self.add_http_request_header("x-added", "1");
                self.add_http_request_header("x-added", "2");
                self.set_http_request_header("x-set", Some("new"));
                self.set_http_request_header("x-gone", None);
                log::info!("{:?}", self.get_http_request_header("x-added"));
            }
            "twice" => {
                for name in TWICE_IN_REQUESTS {
                    self.add_http_request_header(name, "1");
                    self.add_http_request_header(name, "2");
                }
            }
            "all headers" => {
                let mut headers = self.get_http_request_headers();
                headers.retain(|(name, _)| name != "x-gone");
                headers.push(("x-more".to_owned(), "1".to_owned()));
                let headers = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
                self.set_http_request_headers(headers);
            }
            "attributes" if self.get_http_request_header(":path").as_deref() != Some("/told") => {
                self.note_attributes("request");
            }
            "attributes" | "tell tick" => {
                let told = self.get_shared_data("told").0.unwrap_or_default();
                self.send_http_response(200, vec![], Some(&told));
                return Action::Pause;
            }
            "tell http" => {
                let headers =
                    vec![(":method", "POST"), (":path", "/check?a"), (":authority", "auth"), ("x-a", "1")];
                let wait = Duration::from_millis(400);
                let call = self.dispatch_http_call(&self.callee(), headers, Some(b"who"), vec![], wait);
                if let Err(status) = call {
                    self.tell(&format!("refused {status:?}"));
                }
                return Action::Pause;
            }
            "call" => {
                let headers = vec![(":method", "POST"), (":path", "/check"), (":authority", "auth")];
                let trailers = vec![("t", "1")];
                let call =
                    self.dispatch_http_call("auth", headers, Some(b"who"), trailers, Duration::from_secs(5));
                return match call {
                    Ok(_) => Action::Pause,
                    Err(status) => {
                        log::info!("call refused {status:?}");
                        Action::Continue
                    }
                };
            }
            "grpc" | "tell grpc" => {
                let wait = Duration::from_millis(if self.manner == "grpc" { 5000 } else { 400 });
                let metadata = vec![("x-m", b"1".as_slice())];
                let call =
                    self.dispatch_grpc_call(&self.callee(), "pkg.Auth", "Check", metadata, Some(b"who"), wait);
                log::info!("grpc call {:?}", call.is_ok());
                return Action::Pause;
            }
            "grpc stream" | "tell grpc stream" => {
                self.stream = self.open_grpc_stream(&self.callee(), "pkg.Auth", "Watch", vec![]).unwrap_or(0);
                self.send_grpc_stream_message(self.stream, Some(b"one"), false);
                self.send_grpc_stream_message(self.stream, Some(b"two"), true);
                return Action::Pause;
            }
            "properties" => {
                for path in [
                    vec!["request", "path"],
                    vec!["request", "method"],
                    vec!["request", "headers", "x-a"],
                    vec!["source", "address"],
                    vec!["plugin_root_id"],
                    vec!["missing"],
                ] {
                    let value = self.get_property(path.clone());
                    log::info!("{} {:?}", path.join("."), value.as_deref().map(String::from_utf8_lossy));
                }
                self.set_property(vec!["verdict"], Some(b"fine"));
                log::info!("verdict {:?}", self.get_property(vec!["verdict"]));
            }
            "metrics" => {
                for (kind, name) in
                    [(MetricType::Counter, "c"), (MetricType::Gauge, "g"), (MetricType::Histogram, "h")]
                {
                    let id = hostcalls::define_metric(kind, name).unwrap();
                    log::info!("{:?}", hostcalls::record_metric(id, 5));
                    if !matches!(kind, MetricType::Histogram) {
                        let down = i64::from(!matches!(kind, MetricType::Gauge)) * 2 - 1;
                        log::info!("{:?}", hostcalls::increment_metric(id, down));
                        log::info!("{:?}", hostcalls::get_metric(id));
                    }
                }
            }
            "shared" => {
                let (old, cas) = self.get_shared_data("n");
                let count: u32 = old.and_then(|old| String::from_utf8(old).ok()?.parse().ok()).unwrap_or(0);
                let new = (count + 1).to_string();
                match self.set_shared_data("n", Some(new.as_bytes()), cas) {
                    Err(Status::CasMismatch) => log::info!("lost the race"),
                    other => log::info!("{new} {other:?}"),
                }
            }
            "time" => {
                log::info!("{:?}", self.get_current_time().duration_since(SystemTime::UNIX_EPOCH).unwrap());
            }
            "foreign" => {
                let packed = self.call_foreign_function("compress", Some(&[b'a'; 100])).unwrap().unwrap();
                let back = self.call_foreign_function("uncompress", Some(&packed)).unwrap().unwrap();
                log::info!("{} {}", packed.len() < 50, back == [b'a'; 100]);
                log::info!("{:?}", self.call_foreign_function("missing", None));
            }
            "reset" => self.reset_http_request(),
            "panic" => panic!("as asked"),
            "crash on demand" if self.get_http_request_header(":path").as_deref() == Some("/crash") => {
                panic!("as asked")
            }
            "hold" => return Action::Pause,
            _ => {}
        }
        Action::Continue
    }

    fn on_http_request_body(&mut self, size: usize, end: bool) -> Action {
        if let Some(action) = self.reply_from("request body") {
            return action;
        }
        if self.manner.starts_with("body ") {
            if !end {
                return Action::Pause;
            }
            self.replace(
                size,
                |start, length, value| self.set_http_request_body(start, length, value),
                || self.get_http_request_body(0, size),
            );
        }
        Action::Continue
    }

    fn on_http_request_trailers(&mut self, count: usize) -> Action {
        log::info!("request trailers {count} {:?}", self.get_http_request_trailers());
        if let Some(action) = self.reply_from("request trailers") {
            return action;
        }
        // A message that ends with trailers never said so in its body.
        self.replace(
            usize::MAX,
            |start, length, value| self.set_http_request_body(start, length, value),
            || self.get_http_request_body(0, usize::MAX),
        );
        self.add_http_request_trailer("x-more", "1");
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        if let Some(action) = self.reply_from("response headers") {
            return action;
        }
        if self.manner.starts_with("body ") {
            self.set_http_response_header("content-length", None);
        }
        if self.manner == "twice" {
            for name in TWICE_IN_RESPONSES {
                self.add_http_response_header(name, "1");
                self.add_http_response_header(name, "2");
            }
        }
        if self.manner == "attributes" {
            self.note_attributes("response");
        }
        if self.manner == "crash on demand" {
            self.set_http_response_header("x-guest", Some("here"));
        }
        if self.manner == "headers" {
            self.set_http_response_header("x-context", Some(&self.context_id.to_string()));
            self.set_http_response_header("server", None);
        }
        Action::Continue
    }

    fn on_http_response_body(&mut self, size: usize, end: bool) -> Action {
        if let Some(action) = self.reply_from("response body") {
            return action;
        }
        if self.manner.starts_with("body ") {
            if !end {
                return Action::Pause;
            }
            self.replace(
                size,
                |start, length, value| self.set_http_response_body(start, length, value),
                || self.get_http_response_body(0, size),
            );
        }
        Action::Continue
    }

    fn on_http_response_trailers(&mut self, count: usize) -> Action {
        log::info!("response trailers {count} {:?}", self.get_http_response_trailers());
        if let Some(action) = self.reply_from("response trailers") {
            return action;
        }
        self.replace(
            usize::MAX,
            |start, length, value| self.set_http_response_body(start, length, value),
            || self.get_http_response_body(0, usize::MAX),
        );
        Action::Continue
    }

    fn on_log(&mut self) {
        if self.manner == "attributes" && !self.told.is_empty() {
            self.note_attributes("log");
            let _ = self.set_shared_data("told", Some(self.told.as_bytes()), None);
        }
        log::info!("log");
    }
}

struct Tcp;

impl Context for Tcp {}

impl StreamContext for Tcp {
    fn on_new_connection(&mut self) -> Action {
        log::info!("connected");
        Action::Continue
    }

    fn on_downstream_data(&mut self, size: usize, end: bool) -> Action {
        let data = self.get_downstream_data(0, size).unwrap_or_default();
        log::info!("downstream {} {end}", String::from_utf8_lossy(&data));
        self.set_downstream_data(0, size, &data.to_ascii_uppercase());
        Action::Continue
    }

    fn on_downstream_close(&mut self, peer: PeerType) {
        log::info!("downstream closed {peer:?}");
    }

    fn on_upstream_data(&mut self, size: usize, end: bool) -> Action {
        let data = self.get_upstream_data(0, size).unwrap_or_default();
        log::info!("upstream {} {end}", String::from_utf8_lossy(&data));
        if data == b"later" { Action::Pause } else { Action::Continue }
    }

    fn on_upstream_close(&mut self, peer: PeerType) {
        log::info!("upstream closed {peer:?}");
    }

    fn on_log(&mut self) {
        log::info!("log");
    }
}
