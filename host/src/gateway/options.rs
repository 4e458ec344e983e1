//! What a gateway can be told, from a program ([`GatewayOptions`]) or the command line ([`Args`]).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use http::{HeaderValue, Uri};
use schemars::JsonSchema;
use serde::Deserialize;

use super::access_log::AccessLogTarget;
use super::config::{Connect, HostHeader, HttpVersion};
use super::error::GatewayError;
use super::filter::FilterFactory;
use super::plan::{
    FilterCode, FilterPlan, Limits, ListenerPlan, Matches, Plan, RoutePlan, UpstreamPlan, VmPlan,
};
use super::tls;
use crate::replay::find_filter;
use crate::train::plugin_configuration;

/// "For ever", and far from the limits of timer arithmetic.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// What becomes of an exchange whose filter is broken. Whatever the policy, a lost VM is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailurePolicy {
    /// It is refused with 503, or aborted if the response has begun.
    #[default]
    #[value(name = "fail_closed", alias = "fail-closed")]
    FailClosed,
    /// It goes on without the filter.
    #[value(name = "fail_open", alias = "fail-open")]
    FailOpen,
    /// It is refused with 503, and a lost VM is replaced as Envoy does it: at once if it had run for
    /// `reload_backoff`, else when that time is over.
    #[value(name = "fail_reload", alias = "fail-reload")]
    FailReload,
}

impl FailurePolicy {
    /// Whether traffic passes a broken filter by.
    pub(super) fn is_open(self) -> bool {
        self == Self::FailOpen
    }
}

/// Envoy's `reload_config.backoff` unless it is set.
pub(super) const RELOAD_BACKOFF: Duration = Duration::from_secs(1);

/// The filter to run.
#[derive(Clone)]
pub enum FilterSource {
    /// None: a plain reverse proxy.
    None,
    /// A proxy-wasm module in a file.
    WasmFile(PathBuf),
    /// A proxy-wasm module in memory.
    WasmBytes(Vec<u8>),
    /// A filter in Rust.
    Native(Arc<dyn FilterFactory>),
}

impl std::fmt::Debug for FilterSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::WasmFile(path) => f.debug_tuple("WasmFile").field(path).finish(),
            Self::WasmBytes(bytes) => write!(f, "WasmBytes({} bytes)", bytes.len()),
            Self::Native(_) => f.write_str("Native"),
        }
    }
}

/// Everything a gateway needs to start.
#[derive(Debug, Clone)]
pub struct GatewayOptions {
    /// Where clients connect. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// `http://host:port` or `https://host:port`, without a path.
    pub upstream: Uri,
    /// The filter.
    pub filter: FilterSource,
    /// Handed to the filter as its plugin configuration.
    pub plugin_configuration: Vec<u8>,
    /// Handed to the filter as its root id (Istio's pluginName).
    pub root_id: String,
    /// Filter VMs; each serves one call at a time.
    pub workers: usize,
    /// Where `/metrics`, `/healthz` and `/readyz` are served, if anywhere.
    pub admin: Option<SocketAddr>,
    /// Where the access log goes.
    pub access_log: AccessLogTarget,
    /// Longest wait for response headers after the last request byte, for the next byte of a response,
    /// and for a filter to let go of a message it holds. The default suits answers of LLMs that are
    /// not streamed. A connection has to come about within 10 s of it.
    pub upstream_timeout: Duration,
    /// Longest wait for a client's request headers and for the next byte of its body.
    pub client_timeout: Duration,
    /// How long [`super::Gateway::shutdown`] waits for exchanges to end.
    pub drain_timeout: Duration,
    /// What becomes of an exchange whose filter is broken.
    pub failure_policy: FailurePolicy,
    /// Under [`FailurePolicy::FailReload`], the least time from a VM's start to the next.
    pub reload_backoff: Duration,
    /// Folder in which compiled modules are kept, so that a restart does not compile again; checked
    /// against their digests, and not used if others may write to it. `None`: nowhere.
    pub module_cache: Option<PathBuf>,
    /// Most bytes of one message the filter may hold; above it 413 (request) or 500 (response).
    pub max_buffer_bytes: usize,
    /// Whether body callbacks run while the filter holds the headers (Envoy's
    /// `allow_on_headers_stop_iteration`).
    pub allow_on_headers_stop_iteration: bool,
}

impl GatewayOptions {
    /// A gateway on a free loopback port in front of `upstream`, with defaults for the rest.
    pub fn new(upstream: Uri, filter: FilterSource) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            upstream,
            filter,
            plugin_configuration: Vec::new(),
            root_id: "driftlock".to_owned(),
            workers: default_workers(),
            admin: None,
            access_log: AccessLogTarget::None,
            upstream_timeout: Duration::from_secs(300),
            client_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(30),
            failure_policy: FailurePolicy::default(),
            reload_backoff: RELOAD_BACKOFF,
            module_cache: None,
            max_buffer_bytes: 4 << 20,
            allow_on_headers_stop_iteration: false,
        }
    }

    /// Refuses what cannot work, and reads the filter.
    pub(super) fn plan(self) -> Result<Plan, GatewayError> {
        self.check()?;
        let code = match self.filter {
            FilterSource::None => None,
            FilterSource::Native(factory) => Some(FilterCode::Native(factory)),
            FilterSource::WasmFile(path) => {
                let bytes = std::fs::read(&path).map_err(|source| GatewayError::File {
                    action: "read the filter",
                    path,
                    source,
                })?;
                Some(FilterCode::Wasm(bytes.into()))
            }
            FilterSource::WasmBytes(bytes) => Some(FilterCode::Wasm(bytes.into())),
        };
        let filters: Vec<FilterPlan> = code
            .map(|code| FilterPlan {
                name: self.root_id.as_str().into(),
                code,
                plugin_configuration: self.plugin_configuration,
                root_id: self.root_id,
                vm: VmPlan::default(),
                vms: self.workers,
                failure_policy: self.failure_policy,
                reload_backoff: self.reload_backoff,
                max_buffer_bytes: self.max_buffer_bytes,
                allow_on_headers_stop_iteration: self.allow_on_headers_stop_iteration,
            })
            .into_iter()
            .collect();
        let upstream = upstream_plan("upstream", &self.upstream, HttpVersion::Auto, None)
            .map_err(|reason| GatewayError::Upstream { uri: self.upstream.to_string(), reason })?;
        let limits = Limits::default();
        Ok(Plan {
            listeners: vec![ListenerPlan { address: self.listen, tls: None }],
            admin: self.admin,
            access_log: self.access_log,
            workers: self.workers,
            client_timeout: self.client_timeout,
            drain_timeout: self.drain_timeout,
            tunnel_idle_timeout: Duration::from_secs(3600),
            routes: vec![RoutePlan {
                name: "1".into(),
                matches: Matches::default(),
                upstream: 0,
                filters: (0..filters.len()).collect(),
                rewrite_prefix: None,
                host: HostHeader::Auto,
                timeout: self.upstream_timeout,
                request_body_bytes: limits.request_body_bytes,
                websocket: true,
                connect: Connect::Refuse,
            }],
            limits,
            module_cache: self.module_cache,
            filters,
            upstreams: vec![UpstreamPlan {
                connect_timeout: upstream.connect_timeout.min(self.upstream_timeout),
                timeout: self.upstream_timeout,
                ..upstream
            }],
            watched: Vec::new(),
        })
    }

    fn check(&self) -> Result<(), GatewayError> {
        for (setting, value) in [("workers", self.workers), ("max_buffer_bytes", self.max_buffer_bytes)] {
            if value == 0 {
                let hint = "it has to be at least 1";
                return Err(GatewayError::Setting { setting, value: "0".to_owned(), hint });
            }
        }
        for (setting, value, least) in [
            ("upstream_timeout", self.upstream_timeout, Duration::from_millis(1)),
            ("client_timeout", self.client_timeout, Duration::from_millis(1)),
            ("drain_timeout", self.drain_timeout, Duration::ZERO),
            ("reload_backoff", self.reload_backoff, Duration::ZERO),
        ] {
            if value < least || value > LONGEST {
                return Err(GatewayError::Setting {
                    setting,
                    value: format!("{value:?}"),
                    hint: "it has to be between 1 ms (a drain or a back-off: 0) and a year",
                });
            }
        }
        Ok(())
    }
}

/// One per processor.
pub(super) fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// An upstream with defaults for its times. The error says what is wrong with the URI.
pub(super) fn upstream_plan(
    name: &str,
    uri: &Uri,
    http: HttpVersion,
    ca: Option<&Path>,
) -> Result<UpstreamPlan, String> {
    let https = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err("it does not start with http:// or https://".to_owned()),
    };
    let authority =
        uri.authority().filter(|authority| !authority.host().is_empty()).ok_or("it names no host")?;
    if authority.as_str().contains('@') {
        return Err("credentials in the URI are not sent".to_owned());
    }
    if uri.path_and_query().is_some_and(|path| path.as_str() != "/") {
        return Err("a path in front of the client's is not supported; a route can rewrite it".to_owned());
    }
    if !https && ca.is_some() {
        return Err("authorities are of use only with https://".to_owned());
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok(UpstreamPlan {
        name: name.into(),
        authority: HeaderValue::from_str(authority.as_str()).map_err(|_| "its host is no host name")?,
        authority_text: authority.as_str().into(),
        host,
        port: authority.port_u16().unwrap_or(if https { 443 } else { 80 }),
        http,
        tls: if https { Some(tls::client(ca, http)?) } else { None },
        ca_pem: Vec::new(),
        connect_timeout: Duration::from_secs(10),
        timeout: Duration::from_secs(300),
        idle_timeout: Duration::from_secs(30),
        max_connections: 1024,
    })
}

/// `driftlock gateway`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run by this YAML file instead of the options below; reloaded on SIGHUP and when it changes
    #[arg(long, short, value_name = "FILE", exclusive = true)]
    pub file: Option<PathBuf>,
    /// Check a YAML file and all it names, and exit
    #[arg(long, value_name = "FILE", exclusive = true)]
    pub check: Option<PathBuf>,
    /// Print the JSON Schema of the YAML file and exit
    #[arg(long, exclusive = true)]
    pub schema: bool,
    /// Address to listen on; port 0 takes any free one
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Upstream to forward to, such as `http://127.0.0.1:8000` or `https://api.example.com`
    #[arg(long, value_name = "URI", required_unless_present_any = ["file", "check", "schema"])]
    pub upstream: Option<Uri>,
    /// proxy-wasm module to run; by default Driftlock's, beside this program
    #[arg(long, value_name = "FILE")]
    pub filter: Option<PathBuf>,
    /// Run no filter: only forward
    #[arg(long, conflicts_with_all = ["filter", "config", "baseline"])]
    pub no_filter: bool,
    /// File handed to the filter as its plugin configuration
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Baseline to put into the plugin configuration, from `driftlock train`
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
    /// Root id handed to the filter (Istio's pluginName)
    #[arg(long, value_name = "NAME", default_value = "driftlock")]
    pub root_id: String,
    /// Filter VMs [default: one per processor]
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,
    /// Address for /metrics, /healthz and /readyz
    #[arg(long, value_name = "ADDR:PORT")]
    pub admin: Option<SocketAddr>,
    /// Access log: "stdout", "none" or a file to append to
    #[arg(long, value_name = "TARGET", default_value = "stdout")]
    pub access_log: String,
    /// Seconds to wait for the upstream (response headers, next byte)
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = seconds)]
    pub upstream_timeout: Duration,
    /// Seconds to wait for a client (request headers, next byte of its body)
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub client_timeout: Duration,
    /// Seconds that exchanges get to end after SIGTERM or SIGINT
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub drain_timeout: Duration,
    /// What becomes of an exchange whose filter crashed
    #[arg(long, value_enum, default_value_t)]
    pub failure_policy: FailurePolicy,
    /// Seconds from a VM's start to the next, under fail_reload
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub reload_backoff: Duration,
    /// Folder to keep compiled modules in, so that a restart does not compile again
    #[arg(long, value_name = "DIR")]
    pub module_cache: Option<PathBuf>,
    /// Most bytes of one message the filter may hold
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20)]
    pub max_buffer_bytes: usize,
    /// Run body callbacks while the filter holds the headers
    #[arg(long)]
    pub allow_on_headers_stop_iteration: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "give seconds as a number, such as 30 or 0.5".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|_| "give a number of seconds from 0 on".to_owned())
}

impl TryFrom<Args> for GatewayOptions {
    type Error = GatewayError;

    fn try_from(args: Args) -> Result<Self, GatewayError> {
        let plugin_configuration = match (&args.config, &args.baseline) {
            (None, None) => Vec::new(),
            // Other filters than Driftlock's have configurations of any kind.
            (Some(path), None) => std::fs::read(path).map_err(|source| GatewayError::File {
                action: "read the plugin configuration",
                path: path.clone(),
                source,
            })?,
            (config, Some(baseline)) => plugin_configuration(config.as_deref(), Some(baseline))?,
        };
        let filter = match args.no_filter {
            true => FilterSource::None,
            false => FilterSource::WasmFile(find_filter(args.filter.as_deref())),
        };
        // clap has seen to it that one is given.
        let defaults = Self::new(args.upstream.unwrap_or_default(), filter);
        Ok(Self {
            listen: args.listen,
            plugin_configuration,
            root_id: args.root_id,
            workers: args.workers.unwrap_or(defaults.workers),
            admin: args.admin,
            access_log: match args.access_log.as_str() {
                "none" => AccessLogTarget::None,
                "stdout" => AccessLogTarget::Stdout,
                path => AccessLogTarget::File(PathBuf::from(path)),
            },
            upstream_timeout: args.upstream_timeout,
            client_timeout: args.client_timeout,
            drain_timeout: args.drain_timeout,
            failure_policy: args.failure_policy,
            reload_backoff: args.reload_backoff,
            module_cache: args.module_cache,
            max_buffer_bytes: args.max_buffer_bytes,
            allow_on_headers_stop_iteration: args.allow_on_headers_stop_iteration,
            ..defaults
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusable_upstreams_are_refused_with_the_reason() {
        for (uri, reason) in [
            ("127.0.0.1:80", "http://"),
            ("/only/a/path", "http://"),
            ("http://a.example/prefix", "path"),
            ("http://user:pw@a.example", "credentials"),
        ] {
            let options = GatewayOptions::new(uri.parse().expect("a URI"), FilterSource::None);
            let error = options.plan().map(|_| ()).expect_err(uri).to_string();
            assert!(error.contains(reason), "{uri}: {error}");
        }
        let mut options = GatewayOptions::new(Uri::from_static("http://a.example:8000/"), FilterSource::None);
        assert!(options.clone().plan().is_ok());
        options.upstream_timeout = Duration::MAX;
        let error = options.plan().map(|_| ()).expect_err("too long").to_string();
        assert!(error.contains("upstream_timeout"), "{error}");
    }

    #[test]
    fn seconds_are_bounded() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["-1", "NaN", "1e300", "ten", "inf"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
