//! The gateway's configuration file: YAML, checked field by field before anything starts.
//!
//! The types below are the file. `host/gateway.schema.json` is generated from them (a test compares the
//! two), and every refusal names the file, the line, the column and the path of the field, also for what
//! only shows when two parts of the file are compared (a route to an upstream that is not there).
//! Unknown fields are refused; relative paths start at the file's folder.
//!
//! YAML is read by serde-saphyr: maintained, no unsafe code, duplicate keys are errors, and every value
//! can carry its place in the file. Cost: once per load, well under a millisecond for a page of routes.
//!
//! Left out on purpose: variables, includes and anchors of our own; load balancing over several hosts
//! (give the balancer's name as the upstream); values from the environment.

mod resolve;
mod scalar;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Deserialize;
use serde_saphyr::Spanned;

use super::error::GatewayError;
use super::options::FailurePolicy;
use super::plan::Plan;
pub(crate) use scalar::plain as yaml_problem;
use scalar::{ByteSize, Span};

/// The gateway's configuration file.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where clients connect; at least one.
    listeners: Vec<Listener>,
    /// Address of `/metrics`, `/healthz` and `/readyz`. It asks for no credentials.
    #[schemars(with = "Option<String>")]
    admin: Option<SocketAddr>,
    /// `stdout`, `none`, or a file to append to. SIGHUP reopens the file.
    #[serde(default = "stdout")]
    access_log: String,
    /// Threads that serve traffic, and VMs of each filter that does not say otherwise; one per processor
    /// unless set.
    workers: Option<NonZeroUsize>,
    /// Waiting for clients.
    #[serde(default)]
    timeouts: Timeouts,
    /// What a client may send.
    #[serde(default)]
    limits: Limits,
    /// Folder in which compiled modules are kept, so that a restart does not compile them again. What is
    /// found is checked against its digest; a folder that others may write to is not used.
    module_cache: Option<PathBuf>,
    /// Proxy-wasm modules, in the order in which requests pass them; responses pass in reverse.
    #[serde(default)]
    filters: Vec<Filter>,
    /// Where requests can go, by name.
    upstreams: BTreeMap<String, Upstream>,
    /// The first route that matches a request takes it; a request that none matches is answered with 404.
    routes: Vec<Route>,
}

fn stdout() -> String {
    "stdout".to_owned()
}

/// One address.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Listener {
    /// Address and port; port 0 takes any free one. HTTP/1.1 and HTTP/2 are told apart by themselves.
    #[schemars(with = "String")]
    address: Spanned<SocketAddr>,
    /// Serve TLS, with HTTP/2 and HTTP/1.1 offered by ALPN.
    tls: Option<ListenerTls>,
}

/// A listener's TLS.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ListenerTls {
    /// PEM file with the certificate chain, the server's own first.
    #[schemars(with = "PathBuf")]
    certificate: Spanned<PathBuf>,
    /// PEM file with the private key.
    #[schemars(with = "PathBuf")]
    key: Spanned<PathBuf>,
    /// PEM file with authorities: clients have to show a certificate of one of them.
    #[schemars(with = "Option<PathBuf>")]
    client_ca: Option<Spanned<PathBuf>>,
}

/// Waiting for clients.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Timeouts {
    /// Longest wait for request headers, for the next byte of a request body, and for a client to take
    /// more of its response; 60s unless set.
    #[schemars(with = "Option<Span>")]
    client: Option<Spanned<Span>>,
    /// How long exchanges get to end after SIGTERM; 30s unless set.
    drain: Option<Span>,
    /// Longest silence on a websocket or tunnel; 1h unless set.
    #[schemars(with = "Option<Span>")]
    tunnel_idle: Option<Spanned<Span>>,
}

/// What a client may send.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Limits {
    /// Bytes of a request's headers; above it 431. 64KiB unless set.
    #[schemars(with = "Option<ByteSize>")]
    header_bytes: Option<Spanned<ByteSize>>,
    /// Header fields of one request; above it 431. 128 unless set.
    headers: Option<NonZeroUsize>,
    /// Bytes of a request's body; above it 413. Unlimited unless set: bodies are streamed.
    request_body: Option<ByteSize>,
    /// Bytes of a response's body; above it the exchange is cut. Unlimited unless set.
    response_body: Option<ByteSize>,
    /// Client connections at once, per listener; more wait to be accepted. 10000 unless set.
    connections: Option<NonZeroUsize>,
    /// Requests at once on one HTTP/2 connection; 100 unless set.
    streams: Option<NonZeroUsize>,
}

/// One proxy-wasm module with its configuration.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Filter {
    /// Names the filter in routes, logs and metrics.
    #[schemars(with = "String")]
    name: Spanned<String>,
    /// The module; Driftlock's own, beside the program, unless set.
    #[schemars(with = "Option<PathBuf>")]
    module: Option<Spanned<PathBuf>>,
    /// Plugin configuration: a text is handed to the module as it is, anything else as JSON.
    configuration: Option<serde_json::Value>,
    /// File handed to the module as its plugin configuration, byte for byte.
    #[schemars(with = "Option<PathBuf>")]
    configuration_file: Option<Spanned<PathBuf>>,
    /// Baseline to put into the plugin configuration, from `driftlock train`.
    #[schemars(with = "Option<PathBuf>")]
    baseline: Option<Spanned<PathBuf>>,
    /// Root id handed to the module (Istio's pluginName); the filter's name unless set.
    root_id: Option<String>,
    /// Names the VM: filters share data, and find each other's queues, by it. Empty unless set.
    #[serde(default)]
    vm_id: String,
    /// What the module reads when its VM starts: a text as it is, anything else as JSON.
    vm_configuration: Option<serde_json::Value>,
    /// Environment variables of the module.
    #[serde(default)]
    environment: BTreeMap<String, String>,
    /// VMs of this filter; as many as workers unless set.
    vms: Option<NonZeroUsize>,
    /// What becomes of an exchange whose filter is broken.
    #[serde(default)]
    failure_policy: FailurePolicy,
    /// Least time from a VM's start to the next under `fail_reload`; 1s unless set, as in Envoy.
    #[schemars(with = "Option<Span>")]
    reload_backoff: Option<Spanned<Span>>,
    /// Most bytes of one message that the filter may hold; above it 413 or 500. 4MiB unless set.
    #[schemars(with = "Option<ByteSize>")]
    max_buffer: Option<Spanned<ByteSize>>,
    /// Whether body callbacks run while the filter holds the headers (Envoy's field of this name).
    #[serde(default)]
    allow_on_headers_stop_iteration: bool,
}

/// Where requests can go.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Upstream {
    /// `http://host:port` or `https://host:port`, without a path.
    #[schemars(with = "String")]
    uri: Spanned<String>,
    /// Which HTTP to speak.
    #[serde(default)]
    http: HttpVersion,
    /// PEM file with the authorities that vouch for an https upstream; the system's unless set.
    #[schemars(with = "Option<PathBuf>")]
    ca: Option<Spanned<PathBuf>>,
    /// Longest wait for a connection, its TLS included; 10s unless set.
    #[schemars(with = "Option<Span>")]
    connect_timeout: Option<Spanned<Span>>,
    /// Longest wait for response headers after the last request byte, for the next byte of a response,
    /// and for a filter to let go of a message. 300s unless set, for answers of LLMs that are not streamed.
    #[schemars(with = "Option<Span>")]
    timeout: Option<Spanned<Span>>,
    /// How long an unused connection is kept; 30s unless set, shorter than common servers' keep-alive.
    idle_timeout: Option<Span>,
    /// Connections at once; requests beyond wait for `connect_timeout`, then get 503. 1024 unless set.
    max_connections: Option<NonZeroUsize>,
}

/// Which HTTP to speak to an upstream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum HttpVersion {
    /// What ALPN agrees on over TLS, else HTTP/1.1.
    #[default]
    Auto,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2; without TLS by prior knowledge (h2c).
    Http2,
}

/// Which requests go where.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Route {
    /// Names the route in the access log; its number, from 1, unless set.
    name: Option<String>,
    /// All that is given has to hold; nothing given matches every request.
    #[serde(default, rename = "match")]
    matches: Match,
    /// Name of the upstream.
    #[schemars(with = "String")]
    upstream: Spanned<String>,
    /// Names of the filters; all of them, in their order, unless set.
    #[schemars(with = "Option<Vec<String>>")]
    filters: Option<Vec<Spanned<String>>>,
    /// Replaces the matched path prefix on the way to the upstream.
    #[schemars(with = "Option<String>")]
    rewrite_prefix: Option<Spanned<String>>,
    /// The Host that the upstream sees.
    #[serde(default)]
    host: HostHeader,
    /// Replaces the upstream's `timeout`.
    #[schemars(with = "Option<Span>")]
    timeout: Option<Spanned<Span>>,
    /// Replaces `limits.request_body`.
    request_body: Option<ByteSize>,
    /// Whether websockets pass. Their headers go through the filters, their frames do not.
    #[serde(default = "yes")]
    websocket: bool,
    /// What becomes of CONNECT requests.
    #[serde(default)]
    connect: Connect,
}

fn yes() -> bool {
    true
}

/// What a request has to look like.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Match {
    /// Host names, any of which will do, without a port; `*.example.com` for any name below one.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    hosts: Vec<Spanned<String>>,
    /// Start of the path, up to its end or a `/`: `/v1` matches `/v1` and `/v1/chat`, not `/v10`.
    #[schemars(with = "Option<String>")]
    path_prefix: Option<Spanned<String>>,
    /// Methods, any of which will do.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    methods: Vec<Spanned<String>>,
    /// Header fields and the exact value each has to have.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, String>")]
    headers: BTreeMap<String, Spanned<String>>,
}

/// The Host that an upstream sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum HostHeader {
    /// The upstream's name for https, the client's otherwise.
    #[default]
    Auto,
    /// What the client sent.
    Client,
    /// The upstream's host and port.
    Upstream,
}

/// What becomes of CONNECT requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Connect {
    /// They are refused with 405.
    #[default]
    Refuse,
    /// The gateway opens a TCP connection to the route's upstream, whatever host the client names, and
    /// passes bytes.
    Tunnel,
    /// They are passed on to the upstream, which is itself a proxy.
    Forward,
}

impl Config {
    /// Reads a configuration and all files it names.
    ///
    /// # Errors
    /// [`GatewayError::ConfigFile`] with line and field; [`GatewayError::File`] for the file itself.
    pub(super) fn load(path: &Path) -> Result<Plan, GatewayError> {
        let text = std::fs::read_to_string(path).map_err(|source| GatewayError::File {
            action: "read the configuration",
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)?.resolve(path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, GatewayError> {
        let mut field = String::new();
        let parsed = serde_saphyr::with_deserializer_from_str(text, |yaml| {
            serde_path_to_error::deserialize(yaml).map_err(|error| {
                field = error.path().to_string();
                error.into_inner()
            })
        });
        parsed.map_err(|error| {
            let (line, column) =
                error.location().map_or((0, 0), |location| (location.line(), location.column()));
            // A value with its place is a structure to serde, whose field this is.
            let field = field.strip_suffix(".value").unwrap_or(&field);
            let field = if matches!(field, "." | "?") { String::new() } else { field.to_owned() };
            let problem = scalar::plain(&error);
            GatewayError::ConfigFile { path: path.to_owned(), line, column, field, problem }
        })
    }

    /// The JSON Schema of the file (draft 2020-12), with a newline at its end.
    pub fn schema() -> String {
        let schema = schemars::schema_for!(Self);
        // Display of a JSON value cannot fail.
        format!("{:#}\n", schema.as_value())
    }
}
