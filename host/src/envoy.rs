//! Runs a real Envoy with the filter in it, for `demo --envoy`, `replay --via envoy` and the tests.
//!
//! Driftlock's verdicts are promised to be the same in Envoy's V8 as in wasmtime and in native
//! code, and that promise is only worth what a real Envoy says. [`Envoy::start`] writes a bootstrap
//! into a temporary folder, starts the binary on free loopback ports, waits until the admin
//! interface says it is live, and reads the ports back. The child is asked to quit through the
//! admin interface, killed when it does not, and killed when the value is dropped.
//!
//! Cost: about half a second to start, most of it V8 compiling the module once a worker. Every call
//! here blocks for a few milliseconds of loopback traffic; in async code use `spawn_blocking` for
//! [`Envoy::start`] and [`Envoy::stop`].
//!
//! Left out on purpose: xDS but for the listener as a file that [`Envoy::reconfigure`] replaces, TLS, hot
//! restart and more than one listener. `envoy/minimal.yaml` is
//! what an operator starts from; this is the same attachment with the knobs a test needs.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Names the Envoy binary to use, before any other place is looked at.
pub const BINARY_VARIABLE: &str = "DRIFTLOCK_ENVOY";

/// How many of Envoy's last log lines go into an error.
const LOG_TAIL_LINES: usize = 15;
/// Limit of each admin answer; `/stats` of one listener is some 60 KiB.
const ADMIN_ANSWER_MAX_BYTES: u64 = 8 << 20;

/// Why Envoy is not running, or did not answer.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum EnvoyError {
    /// No binary in any of the places looked at.
    #[error(
        "no Envoy found; `cargo xtask envoy` installs it into target/envoy, or set DRIFTLOCK_ENVOY to the path of one (looked at: {looked_at})"
    )]
    NotFound {
        /// The places, comma-separated.
        looked_at: String,
    },
    /// A file or folder this module reads or writes.
    #[error("cannot {action} {path}: {source}; check the path and its permissions")]
    File {
        /// "read", "create", …
        action: &'static str,
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The binary is there but does not run.
    #[error("cannot run {binary}: {source}; `cargo xtask envoy` installs one that fits this machine")]
    Spawn {
        /// Which binary.
        binary: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Envoy ended before it was ready: a refused configuration, nearly always.
    #[error("Envoy ended with {status} before it was ready; its last log lines say why:\n{log}")]
    Exited {
        /// Exit status.
        status: ExitStatus,
        /// The last log lines.
        log: String,
    },
    /// Envoy runs but does not become ready.
    #[error("Envoy was not ready after {waited_ms} ms; its last log lines:\n{log}")]
    NotReady {
        /// How long it was given, in milliseconds.
        waited_ms: u128,
        /// The last log lines.
        log: String,
    },
    /// The admin interface did not answer a request.
    #[error("Envoy's admin interface at {address} does not answer {path}: {source}; is it still running?")]
    Admin {
        /// Its address.
        address: SocketAddr,
        /// What was asked.
        path: String,
        /// What went wrong.
        source: io::Error,
    },
    /// The process could not be waited for or killed.
    #[error("cannot stop Envoy (pid {pid}): {source}; stop it by hand")]
    Stop {
        /// Its process id.
        pid: u32,
        /// What the system said.
        source: io::Error,
    },
}

/// What Envoy does with traffic when the filter is broken (`PluginConfig.failure_policy`).
///
/// Whatever the policy, the stream in which the filter traps is answered with 503, and a
/// configuration that the filter refuses at start keeps a static Envoy from starting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailurePolicy {
    /// 503 for every later stream.
    Closed,
    /// Later streams pass uninspected. Driftlock's default: a broken detector must not break
    /// traffic.
    #[default]
    Open,
    /// A new VM after a back-off of one second; 503 until then.
    Reload,
}

impl FailurePolicy {
    fn name(self) -> &'static str {
        match self {
            Self::Closed => "FAIL_CLOSED",
            Self::Open => "FAIL_OPEN",
            Self::Reload => "FAIL_RELOAD",
        }
    }
}

/// How to start an Envoy. Made by [`EnvoyOptions::new`]; every field may be changed after that.
#[derive(Clone, Debug)]
pub struct EnvoyOptions {
    /// The Envoy binary, see [`find_binary`].
    pub binary: PathBuf,
    /// The filter's module; `None` for an Envoy without a filter, to compare with.
    pub wasm: Option<PathBuf>,
    /// Plugin configuration: a `StringValue` where it is UTF-8, a `BytesValue` where not. Arrives
    /// unchanged in the filter's `on_configure`; 6 MB have been tried.
    pub plugin_configuration: Vec<u8>,
    /// Where requests go.
    pub upstream: SocketAddr,
    /// The listener comes from a file that [`Envoy::reconfigure`] replaces. A refused one then keeps Envoy
    /// from becoming ready, where a static one ends it.
    pub reconfigurable: bool,
    /// Worker threads, each with a VM of its own.
    pub concurrency: u32,
    /// `PluginConfig.allow_on_headers_stop_iteration`: whether the filter may hold headers and
    /// still be given the body.
    pub allow_on_headers_stop_iteration: bool,
    /// What happens to traffic when the filter is broken.
    pub failure_policy: FailurePolicy,
    /// JSON access log; in the temporary folder where `None`.
    pub access_log: Option<PathBuf>,
    /// `per_connection_buffer_limit_bytes` of listener and cluster; Envoy's own 1 MiB where `None`.
    pub buffer_limit_bytes: Option<u32>,
    /// Whether HTTP/1.1 trailers pass; Envoy drops them by default.
    pub trailers: bool,
    /// The upstream is spoken to in HTTP/2, with prior knowledge.
    pub upstream_http2: bool,
    /// How often a request is sent again when the upstream resets it or answers 5xx.
    pub retries: u32,
    /// Whether websockets may be opened.
    pub websockets: bool,
    /// Further clusters, which the filter may call: name, address, and whether they speak HTTP/2.
    pub callout_clusters: Vec<(String, SocketAddr, bool)>,
    /// How long Envoy may take to become ready.
    pub start_deadline: Duration,
}

impl EnvoyOptions {
    /// One worker, fail-open, no plugin configuration, Envoy's own limits.
    pub fn new(binary: PathBuf, wasm: PathBuf, upstream: SocketAddr) -> Self {
        Self {
            binary,
            wasm: Some(wasm),
            plugin_configuration: Vec::new(),
            upstream,
            reconfigurable: false,
            concurrency: 1,
            allow_on_headers_stop_iteration: false,
            failure_policy: FailurePolicy::default(),
            access_log: None,
            buffer_limit_bytes: None,
            trailers: false,
            upstream_http2: false,
            retries: 0,
            websockets: false,
            callout_clusters: Vec::new(),
            start_deadline: Duration::from_secs(60),
        }
    }
}

/// Finds an Envoy: `explicit`, else the variable [`BINARY_VARIABLE`], else `target/envoy/bin/envoy`
/// in the current folder or one above it, else `PATH`.
///
/// # Errors
/// [`EnvoyError::NotFound`] with the places looked at. A path given explicitly or by the variable
/// is never passed over in silence: when nothing is there, that is the error.
pub fn find_binary(explicit: Option<&Path>) -> Result<PathBuf, EnvoyError> {
    let given = explicit.map(Path::to_owned).or_else(|| std::env::var_os(BINARY_VARIABLE).map(PathBuf::from));
    if let Some(path) = given {
        return if path.is_file() {
            Ok(path)
        } else {
            Err(EnvoyError::NotFound { looked_at: path.display().to_string() })
        };
    }
    let here = std::env::current_dir().unwrap_or_default();
    let built =
        here.ancestors().map(|folder| folder.join("target/envoy/bin/envoy")).find(|path| path.is_file());
    let on_path = || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|folder| folder.join("envoy")).find(|path| path.is_file())
    };
    built.or_else(on_path).ok_or_else(|| EnvoyError::NotFound {
        looked_at: format!("target/envoy/bin/envoy from {} upwards, PATH", here.display()),
    })
}

/// A running Envoy. Killed when dropped.
pub struct Envoy {
    child: Child,
    listen: SocketAddr,
    admin: SocketAddr,
    access_log: PathBuf,
    options: EnvoyOptions,
    // Holds the bootstrap, the log and, by default, the access log; removed when dropped.
    folder: tempfile::TempDir,
}

impl fmt::Debug for Envoy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Envoy")
            .field("pid", &self.child.id())
            .field("listen", &self.listen)
            .field("admin", &self.admin)
            .finish_non_exhaustive()
    }
}

impl Envoy {
    /// Starts an Envoy and waits until it accepts traffic.
    ///
    /// # Errors
    /// [`EnvoyError::Exited`] with Envoy's own words when it refuses its configuration (a filter
    /// that refuses its plugin configuration included), [`EnvoyError::NotReady`] after
    /// [`EnvoyOptions::start_deadline`], and the file and spawn errors.
    pub fn start(options: &EnvoyOptions) -> Result<Self, EnvoyError> {
        let file_error = |action, path: &Path| {
            let path = path.to_owned();
            move |source| EnvoyError::File { action, path, source }
        };
        // Envoy reports a missing module only in a long line of its own.
        if let Some(wasm) = &options.wasm {
            File::open(wasm).map_err(file_error("read", wasm))?;
        }
        let folder = tempfile::Builder::new()
            .prefix("driftlock-envoy-")
            .tempdir()
            .map_err(file_error("create a folder in", &std::env::temp_dir()))?;
        let access_log = options.access_log.clone().unwrap_or_else(|| folder.path().join("access.jsonl"));
        let bootstrap_path = folder.path().join("bootstrap.json");
        let listener_path = folder.path().join(LISTENER_FILE);
        write_listener(&listener_path, options, &access_log)?;
        let bootstrap = bootstrap(options, &access_log, &listener_path).to_string();
        std::fs::write(&bootstrap_path, bootstrap).map_err(file_error("write", &bootstrap_path))?;
        let log_path = folder.path().join("envoy.log");
        let log = File::create(&log_path).map_err(file_error("create", &log_path))?;
        let admin_path = folder.path().join("admin");

        let child = Command::new(&options.binary)
            .arg("-c")
            .arg(&bootstrap_path)
            .arg("--admin-address-path")
            .arg(&admin_path)
            .args(["--concurrency", &options.concurrency.to_string()])
            .args(["--disable-hot-restart", "--file-flush-interval-msec", "20"])
            .args(["--log-level", "warning", "--component-log-level", "wasm:info"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|source| EnvoyError::Spawn { binary: options.binary.clone(), source })?;
        // From here on dropping the value kills the child; the addresses are filled in below.
        let unknown = SocketAddr::from(([127, 0, 0, 1], 0));
        let options = options.clone();
        let deadline = options.start_deadline;
        let mut envoy = Self { child, listen: unknown, admin: unknown, access_log, options, folder };
        envoy.wait_until_ready(&admin_path, deadline)?;
        Ok(envoy)
    }

    fn wait_until_ready(&mut self, admin_path: &Path, deadline: Duration) -> Result<(), EnvoyError> {
        let started = Instant::now();
        loop {
            let exited = self.child.try_wait().map_err(|source| self.stop_error(source))?;
            if let Some(status) = exited {
                return Err(EnvoyError::Exited { status, log: self.log_tail() });
            }
            if let Some((listen, admin)) = read_addresses(admin_path) {
                (self.listen, self.admin) = (listen, admin);
                return Ok(());
            }
            if started.elapsed() > deadline {
                return Err(EnvoyError::NotReady { waited_ms: deadline.as_millis(), log: self.log_tail() });
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Gives the filter another plugin configuration while traffic flows, and waits until Envoy has taken
    /// or refused it. Exchanges under way end as they began; a refused one changes nothing.
    ///
    /// # Errors
    /// [`EnvoyError::NotReady`] with Envoy's words if it refuses it, [`EnvoyError::File`],
    /// [`EnvoyError::Admin`].
    pub fn reconfigure(&mut self, plugin_configuration: Vec<u8>) -> Result<(), EnvoyError> {
        let before = self.listener_updates()?;
        self.options.plugin_configuration = plugin_configuration;
        write_listener(&self.folder.path().join(LISTENER_FILE), &self.options, &self.access_log)?;
        let started = Instant::now();
        loop {
            let (taken, refused) = self.listener_updates()?;
            if taken > before.0 {
                return Ok(());
            }
            if refused > before.1 || started.elapsed() > self.options.start_deadline {
                let waited_ms = started.elapsed().as_millis();
                return Err(EnvoyError::NotReady { waited_ms, log: self.log_tail() });
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// How often the listener's file was taken, and refused.
    fn listener_updates(&self) -> Result<(u64, u64), EnvoyError> {
        let stats = self.stats()?;
        let of = |wanted: &str| stats.iter().find(|(name, _)| name == wanted).map_or(0, |(_, value)| *value);
        Ok((of("listener_manager.lds.update_success"), of("listener_manager.lds.update_rejected")))
    }

    /// Where clients connect.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// Where the admin interface listens.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// The JSON access log, one object a line; its keys are those of `access_log_format` in
    /// `envoy/README.md`. Flushed every 20 ms.
    pub fn access_log(&self) -> &Path {
        &self.access_log
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Counters and gauges by name, e.g. `wasmcustom.driftlock_messages`. Histograms are left out.
    ///
    /// # Errors
    /// [`EnvoyError::Admin`] when the admin interface does not answer.
    pub fn stats(&self) -> Result<Vec<(String, u64)>, EnvoyError> {
        let text = self.ask("GET", "/stats")?;
        let parse = |line: &str| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        };
        Ok(text.lines().filter_map(parse).collect())
    }

    /// Everything Envoy has logged so far; the filter's own lines contain `wasm log`.
    ///
    /// # Errors
    /// [`EnvoyError::File`] when the log cannot be read.
    pub fn log_lines(&self) -> Result<Vec<String>, EnvoyError> {
        let path = self.folder.path().join("envoy.log");
        let bytes =
            std::fs::read(&path).map_err(|source| EnvoyError::File { action: "read", path, source })?;
        Ok(String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect())
    }

    /// Asks Envoy to end, kills it when it has not after `deadline`, and says how it ended. The
    /// access log is complete after this.
    ///
    /// # Errors
    /// [`EnvoyError::Stop`] when the process can be neither waited for nor killed.
    pub fn stop(mut self, deadline: Duration) -> Result<ExitStatus, EnvoyError> {
        // An Envoy that no longer answers is killed below all the same.
        let _ = self.ask("POST", "/quitquitquit");
        let asked = Instant::now();
        while asked.elapsed() < deadline {
            if let Some(status) = self.child.try_wait().map_err(|source| self.stop_error(source))? {
                return Ok(status);
            }
            sleep(Duration::from_millis(10));
        }
        self.child.kill().map_err(|source| self.stop_error(source))?;
        self.child.wait().map_err(|source| self.stop_error(source))
    }

    fn ask(&self, method: &str, path: &str) -> Result<String, EnvoyError> {
        let (status, body) =
            admin_request(self.admin, method, path).map_err(|source| self.admin_error(path, source))?;
        if status == 200 {
            return Ok(body);
        }
        let source = io::Error::other(format!("status {status}: {}", body.trim()));
        Err(self.admin_error(path, source))
    }

    fn admin_error(&self, path: &str, source: io::Error) -> EnvoyError {
        EnvoyError::Admin { address: self.admin, path: path.to_owned(), source }
    }

    fn stop_error(&self, source: io::Error) -> EnvoyError {
        EnvoyError::Stop { pid: self.child.id(), source }
    }

    fn log_tail(&self) -> String {
        let lines = self.log_lines().unwrap_or_default();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        // Both fail only when the process is gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Listener and admin address of the Envoy that writes its admin address to `admin_path`, once it is live;
/// `None` as long as it is not.
pub fn read_addresses(admin_path: &Path) -> Option<(SocketAddr, SocketAddr)> {
    let admin: SocketAddr = std::fs::read_to_string(admin_path).ok()?.trim().parse().ok()?;
    let (status, _) = admin_request(admin, "GET", "/ready").ok()?;
    if status != 200 {
        return None;
    }
    let (_, listeners) = admin_request(admin, "GET", "/listeners?format=json").ok()?;
    let listeners: Value = serde_json::from_str(&listeners).ok()?;
    let address = listeners.pointer("/listener_statuses/0/local_address/socket_address")?;
    let ip = address.get("address")?.as_str()?.parse().ok()?;
    let port = u16::try_from(address.get("port_value")?.as_u64()?).ok()?;
    Some((SocketAddr::new(ip, port), admin))
}

/// One request to the admin interface: status and body. Envoy refuses HTTP/1.0, so the answer may be
/// chunked; it ends with the connection in any case.
///
/// # Errors
/// Those of the connection, and `InvalidData` for what is no HTTP.
pub fn admin_request(address: SocketAddr, method: &str, path: &str) -> io::Result<(u16, String)> {
    let timeout = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.take(ADMIN_ANSWER_MAX_BYTES).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "not an HTTP answer");
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(malformed)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(malformed)?;
    let chunked = head.lines().any(|line| line.eq_ignore_ascii_case("transfer-encoding: chunked"));
    let body = if chunked { unchunk(body).ok_or_else(malformed)? } else { body.to_owned() };
    Ok((status, body))
}

/// Takes the chunked transfer coding off (RFC 9112 section 7.1); `None` if it is malformed.
fn unchunk(mut rest: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (length, after) = rest.split_once("\r\n")?;
        let length = usize::from_str_radix(length.trim(), 16).ok()?;
        if length == 0 {
            return Some(body);
        }
        body.push_str(after.get(..length)?);
        rest = after.get(length..)?.strip_prefix("\r\n")?;
    }
}

/// The access log's fields. `replay::envoy` reads them; `driftlock gateway` writes the same ones.
fn access_log_format() -> Value {
    json!({
        "replay_id": "%REQ(X-DRIFTLOCK-REPLAY-ID)%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(:PATH)%",
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "driftlock": {
            "request": "%FILTER_STATE(wasm.driftlock.request:PLAIN)%",
            "response": "%FILTER_STATE(wasm.driftlock.response:PLAIN)%",
            "outcome": "%FILTER_STATE(wasm.driftlock.outcome:PLAIN)%",
        },
    })
}

/// The listener, as a file that Envoy watches.
const LISTENER_FILE: &str = "listener.json";

/// Replaces the listener's file at once: Envoy reads it when it is moved there.
fn write_listener(path: &Path, options: &EnvoyOptions, access_log: &Path) -> Result<(), EnvoyError> {
    let failed = |source| EnvoyError::File { action: "write", path: path.to_owned(), source };
    let new = path.with_extension("new");
    let mut listener = listener(options, access_log);
    listener["@type"] = json!("type.googleapis.com/envoy.config.listener.v3.Listener");
    std::fs::write(&new, json!({"resources": [listener]}).to_string()).map_err(failed)?;
    std::fs::rename(&new, path).map_err(failed)
}

fn loopback_any_port() -> Value {
    json!({"socket_address": {"address": "127.0.0.1", "port_value": 0}})
}

/// The listener with the filter. Envoy adds and rewrites as few headers as it can be told to, so that the
/// filter sees a message as the client and the upstream sent it.
fn listener(options: &EnvoyOptions, access_log: &Path) -> Value {
    let http1 = json!({"enable_trailers": options.trailers});
    let many_headers = json!({"max_headers_count": 1000});
    let plugin_configuration = match std::str::from_utf8(&options.plugin_configuration) {
        Ok(text) => json!({"@type": "type.googleapis.com/google.protobuf.StringValue", "value": text}),
        Err(_) => {
            use base64::Engine as _;
            let text = base64::engine::general_purpose::STANDARD.encode(&options.plugin_configuration);
            json!({"@type": "type.googleapis.com/google.protobuf.BytesValue", "value": text})
        }
    };
    let filter = options.wasm.as_ref().map(|wasm| {
        json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm",
            "config": {
                "name": "driftlock",
                "root_id": "driftlock",
                "failure_policy": options.failure_policy.name(),
                "allow_on_headers_stop_iteration": options.allow_on_headers_stop_iteration,
                "configuration": plugin_configuration,
                "vm_config": {
                    "vm_id": "driftlock",
                    "runtime": "envoy.wasm.runtime.v8",
                    "code": {"local": {"filename": wasm}},
                },
            },
        })
    });
    let filter = filter.map(|wasm| json!({"name": "driftlock", "typed_config": wasm}));
    let router = json!({"name": "envoy.filters.http.router", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
        "suppress_envoy_headers": true,
    }});
    let filters: Vec<Value> = filter.into_iter().chain([router]).collect();
    // No route timeout: a recorded stream takes as long as it takes.
    let mut route = json!({"cluster": "upstream", "timeout": "0s"});
    if options.retries > 0 {
        route["retry_policy"] = json!({"retry_on": "5xx,reset", "num_retries": options.retries});
    }
    let mut connection_manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "driftlock",
        "generate_request_id": false,
        "server_header_transformation": "PASS_THROUGH",
        "max_request_headers_kb": 128,
        "common_http_protocol_options": many_headers,
        "http_protocol_options": http1,
        "access_log": [{
            "name": "envoy.access_loggers.file",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                "path": access_log,
                "log_format": {"json_format": access_log_format()},
            },
        }],
        "route_config": {"virtual_hosts": [{
            "name": "upstream",
            "domains": ["*"],
            "routes": [{"name": "all", "match": {"prefix": "/"}, "route": route}],
        }]},
        "http_filters": filters,
    });
    if options.websockets {
        connection_manager["upgrade_configs"] = json!([{"upgrade_type": "websocket"}]);
    }
    let mut listener = json!({
        "name": "driftlock",
        "address": loopback_any_port(),
        "filter_chains": [{"filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": connection_manager,
        }]}],
    });
    if let Some(limit) = options.buffer_limit_bytes {
        listener["per_connection_buffer_limit_bytes"] = json!(limit);
    }
    listener
}

fn cluster(name: &str, address: SocketAddr, http2: bool, options: &EnvoyOptions) -> Value {
    let protocol = if http2 {
        json!({"http2_protocol_options": {}})
    } else {
        json!({"http_protocol_options": {"enable_trailers": options.trailers}})
    };
    let many_headers = json!({"max_headers_count": 1000});
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {
            "socket_address": {"address": address.ip().to_string(), "port_value": address.port()},
        }}}]}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "common_http_protocol_options": many_headers,
            "explicit_http_config": protocol,
        }},
    });
    if let Some(limit) = options.buffer_limit_bytes {
        cluster["per_connection_buffer_limit_bytes"] = json!(limit);
    }
    cluster
}

/// The whole bootstrap.
fn bootstrap(options: &EnvoyOptions, access_log: &Path, listener_path: &Path) -> Value {
    let callouts = options.callout_clusters.iter();
    let callouts = callouts.map(|(name, address, http2)| cluster(name, *address, *http2, options));
    let clusters: Vec<Value> =
        std::iter::once(cluster("upstream", options.upstream, options.upstream_http2, options))
            .chain(callouts)
            .collect();
    let mut bootstrap = json!({
        "admin": {"address": loopback_any_port()},
        // Names this proxy to the filter.
        "node": {"id": "driftlock", "cluster": "driftlock"},
        "static_resources": {"clusters": clusters},
    });
    if options.reconfigurable {
        bootstrap["dynamic_resources"] =
            json!({"lds_config": {"path_config_source": {"path": listener_path}}});
    } else {
        bootstrap["static_resources"]["listeners"] = json!([listener(options, access_log)]);
    }
    bootstrap
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explicit_path_that_is_not_there_is_refused_with_the_way_out() {
        let message = find_binary(Some(Path::new("no/such/envoy"))).unwrap_err().to_string();
        assert!(message.contains("cargo xtask envoy") && message.contains("no/such/envoy"), "{message}");
    }

    #[test]
    fn a_missing_module_is_named() {
        let upstream = SocketAddr::from(([127, 0, 0, 1], 1));
        let options = EnvoyOptions::new("no-binary".into(), "no/such.wasm".into(), upstream);
        let message = Envoy::start(&options).unwrap_err().to_string();
        assert!(message.starts_with("cannot read no/such.wasm"), "{message}");
    }

    #[test]
    fn the_last_log_lines_of_a_process_that_ends_are_shown() {
        let wasm = tempfile::NamedTempFile::new().unwrap();
        let upstream = SocketAddr::from(([127, 0, 0, 1], 1));
        // `cat` ends at once and complains about `-c` on its standard error.
        let options = EnvoyOptions::new("cat".into(), wasm.path().to_owned(), upstream);
        let error = Envoy::start(&options).unwrap_err();
        let EnvoyError::Exited { log, .. } = &error else { panic!("{error}") };
        assert!(log.contains("option"), "{log}");
    }

    #[test]
    fn chunks_are_joined_and_a_cut_answer_is_noticed() {
        assert_eq!(unchunk("3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n").unwrap(), "abc0123456789");
        for cut in ["", "3", "3\r\nab", "3\r\nabc\r\n", "x\r\nabc\r\n0\r\n\r\n"] {
            assert_eq!(unchunk(cut), None, "{cut:?}");
        }
    }

    #[test]
    fn every_option_reaches_the_bootstrap() {
        let mut options =
            EnvoyOptions::new("envoy".into(), "f.wasm".into(), SocketAddr::from(([127, 0, 0, 1], 4321)));
        options.plugin_configuration = b"{\"a\":1}".to_vec();
        options.allow_on_headers_stop_iteration = true;
        options.failure_policy = FailurePolicy::Reload;
        options.buffer_limit_bytes = Some(4096);
        options.trailers = true;
        options.callout_clusters = vec![("auth".into(), SocketAddr::from(([127, 0, 0, 1], 9876)), true)];
        let whole =
            |options: &EnvoyOptions| bootstrap(options, Path::new("log"), Path::new("lds")).to_string();
        let text = whole(&options);
        for part in [
            r#""port_value":9876"#,
            r#""http2_protocol_options":{}"#,
            r#""port_value":4321"#,
            r#""value":"{\"a\":1}""#,
            r#""allow_on_headers_stop_iteration":true"#,
            r#""FAIL_RELOAD""#,
            r#""per_connection_buffer_limit_bytes":4096"#,
            r#""enable_trailers":true"#,
            r#""filename":"f.wasm""#,
        ] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
        options.plugin_configuration = vec![0xff, 0];
        options.reconfigurable = true;
        assert!(whole(&options).contains(r#""path":"lds""#) && !whole(&options).contains("f.wasm"));
        options.reconfigurable = false;
        let text = whole(&options);
        assert!(text.contains(r#"BytesValue","value":"/wA=""#), "{text}");
        options.wasm = None;
        let text = whole(&options);
        assert!(text.contains("filters.http.router") && !text.contains("filters.http.wasm"), "{text}");
    }
}
